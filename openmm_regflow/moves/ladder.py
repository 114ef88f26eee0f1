"""Learned replica exchange: a ladder with flow moves in the states that need them."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_regflow.errors import InputError
from openmm_regflow.moves.flow_move import FlowMove
from openmm_regflow.units import positions_nm, temperature_kelvin


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
        system: one that the moves cover: constraints if their flows hold them, a periodic box for subset moves, whose
            box is the System's.
        temperatures: [K or Quantities], such as :func:`openmm_regflow.ladders.temperature_ladder` gives.
        flow_moves: one move for all states, or state index -> move; negative indices count from the end.
        positions: start `(n_atoms, 3)` for all replicas, or `(n_states, n_atoms, 3)` [nm or Quantity].
        storage: path of the NetCDF file (str or Path), or an openmmtools reporter.
        dynamics: move before each flow move; by default 500 Langevin steps of 1 fs at 1/ps, seeded from NumPy's global
            state. An exchange leaves velocities at the temperature that a replica came from, so the copies of this move
            draw them anew at every iteration (openmmtools' ``reassign_velocities``); one of another kind has to do that
            itself.
        sampler_class: an openmmtools multistate sampler, such as ``ParallelTemperingSampler``; by default
            ``ReplicaExchangeSampler``.
        options: of the sampler. ``number_of_iterations``, beyond which its ``run`` does not go, is infinite by default
            (openmmtools' own default is 1).

    Returns:
        The created sampler, ready for ``run(n_iterations)``; ``run()`` goes on to ``number_of_iterations``, which has
        to be finite then (openmmtools' own timing fails on an infinite one).

    Raises:
        InputError: an index that is no state, or positions for another number of replicas.
    """
    from openmmtools import mcmc, multistate, states

    kelvin = [temperature_kelvin(t) for t in temperatures]
    if not kelvin:
        raise InputError("there are no temperatures; give one per state, such as temperature_ladder does")
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
    if starts.shape[1] != system.getNumParticles():
        raise InputError(f"positions of {starts.shape[1]} atoms for a System of {system.getNumParticles()}")
    options = {"number_of_iterations": math.inf} | options
    storage = os.fspath(storage) if isinstance(storage, os.PathLike) else storage
    sampler = (sampler_class or multistate.ReplicaExchangeSampler)(mcmc_moves=moves, **options)
    ladder = [states.ThermodynamicState(system, t * unit.kelvin) for t in kelvin]
    box = system.getDefaultPeriodicBoxVectors() if system.usesPeriodicBoundaryConditions() else None
    replicas = [states.SamplerState(x * unit.nanometer, box_vectors=box) for x in starts]
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
    wrong = [k for k in flow_moves if not (isinstance(k, Integral) and -n_states <= k < n_states)]
    if wrong:
        raise InputError(f"flow_moves names state {wrong[0]}; there are {n_states}")
    return {k % n_states: move for k, move in flow_moves.items()}
