"""Thermodynamic states and their samples from the storage file of an openmmtools sampler.

Any two of its states become the ends of a targeted perturbation: two temperatures, the ends of an alchemical path, a
restraint on and off. :func:`storage_reference` gives MBAR over all of its states for comparison.
"""

from pathlib import Path

import numpy as np
import torch

from openmm_regflow.errors import InsufficientDataError
from openmm_regflow.reweighting import Seed
from openmm_regflow.simulate import MultistateRun, load_multistate
from openmm_regflow.tfep.ensembles import state_of
from openmm_regflow.tfep.multistate import MultistateFreeEnergy, estimate_states
from openmm_regflow.tfep.pipeline import State
from openmm_regflow.tfep.sides import load_pymbar, quiet


def state_from_storage(
    storage: str | Path | MultistateRun,
    index: int,
    *,
    burn_in: int = 0,
    stride: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[State, np.ndarray]:
    """One thermodynamic state of an openmmtools sampler, and the frames that its replicas left there.

    Args:
        storage: NetCDF file of the ``MultiStateReporter``, or what :func:`load_multistate` read from it.
        index: of the state; negative counts from the last.
        burn_in: iterations left out at the start.
        stride: keep every so many of the stored frames.
        device: of the energies.

    Returns:
        The state, its potential with all global parameters set, and positions `(n, n_atoms, 3)` [nm] in time.

    Raises:
        InputError: no such file or state, or one at constant pressure.
        CorruptFileError: a damaged file.
        InsufficientDataError: fewer than two frames.
    """
    run = storage if isinstance(storage, MultistateRun) else load_multistate(storage)
    frames = run.frames(index, burn_in, stride)
    return state_of(run.system(index), run.temperature(index), device=device), frames


def storage_reference(
    storage: str | Path | MultistateRun, *, burn_in: int = 0, n_resamples: int = 50, generator: Seed = None
) -> MultistateFreeEnergy:
    """MBAR over all states of an openmmtools sampler (Shirts & Chodera 2008), in kT of each state.

    Iterations are thinned by the statistical inefficiency of the summed reduced energy of the occupied states, the
    series that openmmtools' own analysis uses (Chodera 2016, J. Chem. Theory Comput. 12, 1799).

    Args:
        storage: NetCDF file, or what :func:`load_multistate` read from it.
        burn_in: iterations left out at the start.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.

    Raises:
        InputError: no such file.
        CorruptFileError: a damaged file.
        InsufficientDataError: too few independent iterations.
    """
    run = storage if isinstance(storage, MultistateRun) else load_multistate(storage)
    states, energies = run.states[burn_in:], run.energies[burn_in:]
    if len(states) < 10:
        raise InsufficientDataError(f"{len(states)} iterations after {burn_in} of burn-in; at least ten are needed")
    occupied = np.take_along_axis(energies, states[:, :, None], axis=2)[:, :, 0].sum(axis=1)
    timeseries = load_pymbar().timeseries
    with quiet():
        inefficiency = float(timeseries.statistical_inefficiency(occupied))
        kept = np.asarray(timeseries.subsample_correlated_data(occupied, g=inefficiency))
    owners = states[kept].ravel()
    order = np.argsort(owners, kind="stable")
    u_kn = energies[kept].reshape(owners.size, -1).T[:, order]
    n_k = np.bincount(owners, minlength=energies.shape[2])
    return estimate_states(u_kn, n_k, n_resamples=n_resamples, generator=generator)
