"""Learned replica exchange: a temperature ladder with flow moves in the states that need them."""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_regflow.errors import InputError
from openmm_regflow.moves.flow_move import FlowMove
from openmm_regflow.units import positions_nm, temperature_kelvin


def exchange_acceptance(ratio: float, heat_capacity: float) -> float:
    """Expected acceptance of swaps between temperatures ``T`` and ``ratio * T``.

    With a constant heat capacity C the energies at both temperatures are close to Gaussian with variance ``C (kT)^2``,
    so the log-ratio of a swap has variance ``s^2 = C (1 - 1/r)^2 (1 + r^2)`` and mean ``-s^2 / 2``; the mean of
    ``min(1, exp(.))`` is ``erfc(s / sqrt(8))`` (Kofke, J. Chem. Phys. 117, 6911 (2002)).

    Args:
        ratio: of neighbouring temperatures, above 1.
        heat_capacity: of the potential energy, in units of k.
    """
    spread = math.sqrt(heat_capacity * (1 - 1 / ratio) ** 2 * (1 + ratio**2))
    return math.erfc(spread / math.sqrt(8))


def temperature_ladder(
    minimum: Any,
    maximum: Any,
    n_states: int | None = None,
    *,
    n_atoms: int | None = None,
    heat_capacity: float | None = None,
    acceptance: float = 0.3,
) -> np.ndarray:
    """Geometric ladder of temperatures [K], the coldest first.

    Args:
        minimum: [K or Quantity].
        maximum: [K or Quantity].
        n_states: how many; by default the fewest whose neighbours should exchange with probability ``acceptance``.
        n_atoms: of a flexible molecule, whose heat capacity is taken as that of 3N - 6 harmonic modes.
        heat_capacity: of the potential energy in units of k, if known better: the variance of u at one temperature.
        acceptance: wanted probability of a swap.

    Raises:
        InputError: temperatures out of order, an acceptance outside (0, 1), or nothing to find the number from.
    """
    cold, hot = temperature_kelvin(minimum), temperature_kelvin(maximum)
    if hot <= cold:
        raise InputError(f"the ladder runs from {cold:g} to {hot:g} K; the maximum must be above the minimum")
    if n_states is None:
        n_states = _fewest(hot / cold, n_atoms, heat_capacity, acceptance)
    if n_states < 2:
        raise InputError(f"a ladder of {n_states} states has no exchange; at least 2 are needed")
    return np.geomspace(cold, hot, n_states)


def _fewest(span: float, n_atoms: int | None, heat_capacity: float | None, acceptance: float) -> int:
    """Fewest states over a total temperature ratio with at least the wanted acceptance."""
    if not 0 < acceptance < 1:
        raise InputError(f"acceptance is {acceptance}; choose a probability between 0 and 1")
    if heat_capacity is None:
        if n_atoms is None or n_atoms < 3:
            raise InputError("give n_states, or n_atoms (at least 3) or heat_capacity to find it from")
        heat_capacity = (3 * n_atoms - 6) / 2
    n_states = 2
    while exchange_acceptance(span ** (1 / (n_states - 1)), heat_capacity) < acceptance:
        n_states += 1
    return n_states


def learned_replica_exchange(
    system: openmm.System,
    temperatures: Sequence[Any],
    flow_moves: FlowMove | Mapping[int, FlowMove],
    positions: Any,
    storage: Any,
    *,
    dynamics: Any = None,
    sampler_class: Any = None,
    **options: Any,
) -> Any:
    """An openmmtools replica-exchange sampler with flow moves after the dynamics of some or all states.

    A flow for the hottest state feeds the ladder with independent configurations that the exchanges pass down; one
    for the coldest makes it forget at once; a single move is copied to every state, its pool rescaled to each
    temperature.

    Args:
        system: without constraints, not periodic.
        temperatures: [K or Quantities], such as :func:`temperature_ladder` gives.
        flow_moves: one move for all states, or state index -> move; negative indices count from the end.
        positions: start `(n_atoms, 3)` for all replicas, or `(n_states, n_atoms, 3)` [nm or Quantity].
        storage: path of the NetCDF file, or an openmmtools reporter.
        dynamics: move before each flow move; by default 500 Langevin steps of 1 fs at 1/ps, seeded from NumPy's global
            state. An exchange leaves velocities at the temperature that a replica came from, so the copies of this move
            draw them anew at every iteration (openmmtools' ``reassign_velocities``); one of another kind has to do that
            itself.
        sampler_class: an openmmtools multistate sampler, such as ``ParallelTemperingSampler``; by default
            ``ReplicaExchangeSampler``.
        options: of the sampler. ``number_of_iterations``, beyond which its ``run`` does not go, is infinite by default
            (openmmtools' own default is 1).

    Returns:
        The created sampler, ready for ``run(n_iterations)``; ``run()`` goes on to ``number_of_iterations``.

    Raises:
        InputError: an index that is no state, or positions for another number of replicas.
    """
    from openmmtools import mcmc, multistate, states

    kelvin = [temperature_kelvin(t) for t in temperatures]
    if dynamics is None:
        dynamics = _langevin_class()(
            timestep=1.0 * unit.femtosecond, collision_rate=1.0 / unit.picosecond, n_steps=500
        )
    dynamics = _reassigning(dynamics)
    chosen = _moves_by_state(flow_moves, len(kelvin))
    moves = [mcmc.SequenceMove([dynamics, chosen[k]]) if k in chosen else dynamics for k in range(len(kelvin))]
    starts = positions_nm(positions)
    starts = np.repeat(starts[None], len(kelvin), axis=0) if starts.ndim == 2 else starts
    if len(starts) != len(kelvin):
        raise InputError(f"{len(starts)} sets of positions for {len(kelvin)} temperatures; give one per state")
    options = {"number_of_iterations": math.inf} | options
    sampler = (sampler_class or multistate.ReplicaExchangeSampler)(mcmc_moves=moves, **options)
    ladder = [states.ThermodynamicState(system, t * unit.kelvin) for t in kelvin]
    replicas = [states.SamplerState(x * unit.nanometer) for x in starts]
    if isinstance(sampler, multistate.ParallelTemperingSampler):  # makes the states itself
        each = [t * unit.kelvin for t in kelvin]
        sampler.create(ladder[0], replicas, storage, temperatures=each, n_temperatures=len(each))
    else:
        sampler.create(ladder, replicas, storage)
    return sampler


def _reassigning(move: Any) -> Any:
    """A copy of an openmmtools move in which all dynamics draw new velocities before they start.

    With velocities of another temperature a swap is not reversible: kinetic energy flows down the ladder, and the
    coldest state is sampled too hot. The moves are stored and so keep to it after a restart, with any sampler class,
    which rescaling on every swap (:mod:`openmm_regflow.simulate.tempering`) would not.
    """
    move = copy.deepcopy(move)
    parts = [move]
    for part in parts:  # grows
        parts += [*getattr(part, "move_list", ()), *(inner for inner, _ in getattr(part, "move_set", ()))]
        if hasattr(part, "reassign_velocities"):
            part.reassign_velocities = True
    return move


@lru_cache(maxsize=1)
def _langevin_class() -> type[Any]:
    """openmmtools' Langevin move with noise and velocities from NumPy's global state (made here: its import is slow).

    Nothing of it is stored, so that a run which goes on after a restart does not repeat its noise.
    """
    import mpiplus
    from openmmtools import mcmc

    def seed() -> int:
        communicator = mpiplus.get_mpicomm()  # ranks may share NumPy's state, but not their replicas
        entropy = [np.random.randint(2**31 - 1), 0 if communicator is None else communicator.rank]
        return 1 + int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1) % (2**31 - 2)  # zero: from the clock

    class SeededLangevinMove(mcmc.LangevinDynamicsMove):
        def _get_integrator(self, thermodynamic_state: Any) -> Any:
            integrator = super()._get_integrator(thermodynamic_state)
            integrator.setRandomNumberSeed(seed())  # counts where it makes the Context
            return integrator

        def _before_integration(self, context: openmm.Context, thermodynamic_state: Any) -> None:
            super()._before_integration(context, thermodynamic_state)
            if self.reassign_velocities:
                context.setVelocitiesToTemperature(thermodynamic_state.temperature, seed())

    SeededLangevinMove.__qualname__ = SeededLangevinMove.__name__  # storage finds it by this name in this module
    return SeededLangevinMove


def __getattr__(name: str) -> Any:
    if name == "SeededLangevinMove":
        return _langevin_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _moves_by_state(flow_moves: FlowMove | Mapping[int, FlowMove], n_states: int) -> dict[int, FlowMove]:
    """State index (from zero) -> flow move."""
    if not isinstance(flow_moves, Mapping):
        return dict.fromkeys(range(n_states), flow_moves)
    wrong = [k for k in flow_moves if not -n_states <= k < n_states]
    if wrong:
        raise InputError(f"flow_moves names state {wrong[0]}; there are {n_states}")
    return {k % n_states: move for k, move in flow_moves.items()}
