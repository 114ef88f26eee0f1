"""Thermodynamic states and their samples from the storage file of an openmmtools sampler.

Any two of its states become the ends of a targeted perturbation: two temperatures, the ends of an alchemical path, a
restraint on and off. :func:`storage_reference` gives MBAR over all of its states for comparison.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Seed
from openmm_regflow.simulate import MultistateRun, load_multistate
from openmm_regflow.tfep.ensembles import state_of
from openmm_regflow.tfep.multistate import MultistateFreeEnergy, estimate_states, mixture_log_weights
from openmm_regflow.tfep.pipeline import State
from openmm_regflow.tfep.sides import load_pymbar, statistical_inefficiency

#: Frames whose energies are compared; iterations that are enough for weights of which only the memory is asked.
N_COMPARED, ENOUGH = 8, 500
#: [kT], and relative to the energy: what single precision makes of stored positions and of a GPU's energies.
ROUNDING = 0.1, 1e-4
#: Relative to differences between two states, in which most rounding cancels, and to their energies.
ROUNDING_BETWEEN = 1e-4, 3e-6


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
        The state, its potential with all global parameters set and in the box of the run, and positions
        `(n, n_atoms, 3)` [nm], see ``MultistateRun.frames``.

    Raises:
        InputError: no such file or state, one at constant pressure or in a box that changed, or energies that are not
            those that the sampler stored.
        CorruptFileError: a damaged file.
        InsufficientDataError: fewer than two frames.
    """
    run = storage if isinstance(storage, MultistateRun) else load_multistate(storage)
    frames = run.frames(index, burn_in, stride)
    state = state_of(run.system(index), run.temperature(index), device=device)
    _check_energies(run, state, index, frames, run.rows(index, burn_in, stride), device)
    return state, frames


def _check_energies(
    run: MultistateRun,
    state: State,
    index: int,
    frames: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    device: torch.device | str,
) -> None:
    """Refuse a state whose energies of some frames are not those that the sampler stored.

    Whatever a storage does not say (another box, other parameters) would move every work.

    Raises:
        InputError: they differ by more than rounding.
    """
    some = np.linspace(0, len(frames) - 1, min(N_COMPARED, len(frames))).astype(int)
    x, (time, replica) = torch.as_tensor(frames[some], dtype=torch.float64), (each[some] for each in rows)
    stored = run.energies[run.stored[time], replica]
    own = _without_metric(state).reduced(x)
    off, allowed = np.abs(own - stored[:, index]), ROUNDING[0] + ROUNDING[1] * np.abs(stored[:, index])
    index %= len(run.thermodynamic_states)
    # A large energy hides an offset that the difference to another state does not.
    known = [k for k in (index - 1, index + 1) if 0 <= k < stored.shape[1] and np.isfinite(stored[:, k]).all()]
    for other in known[:1]:
        there = _without_metric(state_of(run.system(other), run.temperature(other), device=device)).reduced(x)
        between = stored[:, index] - stored[:, other]
        relative, absolute = ROUNDING_BETWEEN
        off = np.append(off, abs(np.mean(own - there - between)))
        allowed = np.append(allowed, ROUNDING[0] + np.mean(relative * np.abs(between) + absolute * np.abs(own)))
    if not (off <= allowed).all():
        raise InputError(
            f"the energies of state {index} are off by up to {off[off > allowed].max():.3g} kT from those in "
            f"{run.storage}, or their differences to those of another state are: the sampler had other parameters, or "
            "another box, than the state says; make the state by tfep.state_of, of the System that was simulated"
        )


def _without_metric(state: State) -> State:
    """The state as a sampler counts its energies, without the metric term of constraints."""
    return replace(state, potential=getattr(state.potential, "potential", state.potential))


def storage_reference(
    storage: str | Path | MultistateRun, *, burn_in: int = 0, n_resamples: int = 50, generator: Seed = None
) -> MultistateFreeEnergy:
    """MBAR over all states of an openmmtools sampler (Shirts & Chodera 2008), in kT of each state.

    Iterations are thinned by the largest statistical inefficiency of what they contribute to the differences between
    neighbours and between the ends: the mixture weights of the states, added up over replicas. (openmmtools' own
    analysis takes that of the summed reduced energy, which does not see a slow mode under a bath of fast ones.)

    Args:
        storage: NetCDF file, or what :func:`load_multistate` read from it.
        burn_in: iterations left out at the start.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.

    Raises:
        InputError: no such file, a negative burn-in, or energies that a sampler with ``locality`` has not computed.
        CorruptFileError: a damaged file.
        InsufficientDataError: too few independent iterations.
    """
    if burn_in < 0:
        raise InputError(f"burn_in is {burn_in}; at least 0 iterations are left out")
    run = storage if isinstance(storage, MultistateRun) else load_multistate(storage)
    states, energies = run.states[burn_in:], run.energies[burn_in:]
    if len(states) < 10:
        raise InsufficientDataError(f"{len(states)} iterations after {burn_in} of burn-in; at least ten are needed")
    if np.isnan(energies).any():
        raise InputError(
            f"{run.storage} is of a sampler with locality, which has not computed the energies of far states; estimate "
            "between neighbours by state_from_storage and free_energy_difference, or run it with locality=None"
        )
    inefficiency = _inefficiency(states, energies)
    kept = load_pymbar().timeseries.subsample_correlated_data(np.arange(len(states)), g=inefficiency)
    if len(kept) < 2:
        raise InsufficientDataError(
            f"the {len(states)} iterations of {run.storage} remember each other (one in {inefficiency:.0f} is "
            "independent); run longer"
        )
    samples = _by_state(states[kept], energies[kept])
    return estimate_states(*samples, n_resamples=n_resamples, generator=generator)


def _by_state(states: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies `(n_states, n)` of all replicas, grouped by the state that they were in, and their numbers."""
    owners = states.ravel()
    order = np.argsort(owners, kind="stable")
    u_kn = energies.reshape(owners.size, -1).T[:, order]
    return u_kn, np.bincount(owners, minlength=energies.shape[2])


def _inefficiency(states: np.ndarray, energies: np.ndarray) -> float:
    """Iterations per independent one, by what each adds to the free energies."""
    some = slice(None, None, max(1, len(states) // ENOUGH))
    f_k = estimate_states(*_by_state(states[some], energies[some]), n_resamples=2, generator=0).delta_f
    n_k = np.bincount(states.ravel(), minlength=energies.shape[2])
    log_w = mixture_log_weights(energies.reshape(-1, len(n_k)).T, n_k, f_k)
    share = np.exp(log_w).T.reshape(energies.shape).sum(axis=1)  # over replicas
    pairs = [*pairwise(range(len(n_k))), (0, len(n_k) - 1)]
    return max((statistical_inefficiency(share[:, i] - share[:, j]) for i, j in pairs if i != j), default=1.0)
