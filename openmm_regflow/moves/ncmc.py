"""``NCMCFlowMove``: a flow proposal in solvent, with the solvent given time to make room.

Nonequilibrium candidate Monte Carlo (Nilmeier, Crooks, Minh and Chodera, PNAS 108, E1009 (2011)): the interactions
between the subset and its surroundings are weakened over half of a protocol, the flow proposes the subset's
internal coordinates while it hardly feels the surroundings, and the interactions are switched on again. Dynamics run
all the time; the total work decides.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.moves.flow_move import FlowMove, box_of, check_atom_count
from openmm_regflow.proposals import ProposalBatch, SubsetProposal
from openmm_regflow.sampling import KernelInfo, context_potential, redrawn, system_masses
from openmm_regflow.units import thermal_energy, to_float

#: Share of either half of the protocol in which the sterics change; the charges, whose work is larger, have the rest.
STERIC_SHARE = 0.25


def schedule(electrostatics: float = 0.0, sterics: float = 0.0, share: float = STERIC_SHARE) -> dict[str, str]:
    """Couplings as functions of lambda in [0, 1]: from 1 to their least values and back, charges first and last.

    Args:
        electrostatics: least coupling of the charges.
        sterics: least coupling of the Lennard-Jones interactions.
        share: of either half in which the sterics change; the charges have the rest.
    """
    c = "abs(2*lambda-1)"
    return {
        "lambda_electrostatics": f"{electrostatics}+{1 - electrostatics}*max(0, ({c}-{share})/{1 - share})",
        "lambda_sterics": f"{sterics}+{1 - sterics}*min(1, {c}/{share})",
    }


class NCMCFlowMove(FlowMove):
    """A flow move of an atom subset with nonequilibrium switching, for openmmtools samplers.

    Exactness. Fresh velocities are drawn, so that the state is in equilibrium with respect to them. The protocol is
    its own time reverse (palindromic splitting ``O V R H R V O``, a schedule symmetric about its middle, and the jump
    in the middle), so the ratio of path probabilities is ``exp(-W/kT)`` with the protocol and shadow work of the
    dynamics, and the jump from x to y at the least coupling, where the reduced energy is ``u_0``, adds
    ``u_0(y) - u_0(x) + log q(y) - log q(x)`` to ``W/kT``.
    Switching from the state's System to the alchemical one at full coupling, and back, counts as work too, so
    approximations in the alchemical System (reaction fields, dispersion) cost acceptance and nothing else. After an
    acceptance all velocities are drawn anew: those at the end of the protocol had a part in the decision. After a
    rejection the old positions and velocities stay; the old velocities had none.

    Args:
        proposal: of the subset that is switched. Its potential is not used.
        n_steps: dynamics steps of a whole protocol, an even number.
        timestep: [ps or Quantity].
        collision_rate: [1/ps or Quantity].
        least_coupling: of electrostatics and of sterics at the jump, each in [0, 1). Soft cores at half coupling let
            atoms overlap for a few kT, and still keep the solvent from filling the place of the subset.
        steric_share: of either half of the protocol in which the sterics change; the charges change in the rest.
        pool_size: see :class:`FlowMove`.
        flow_path: see :class:`FlowMove`.
        seed: see :class:`FlowMove`.

    Attributes:
        last_work: what the log acceptance ratio of the latest move was made of, ``{"jump", "protocol", "shadow"}``
            [kT]: minus their sum, up to the switch between the state's System and the alchemical one. NaN after a
            protocol that blew up. Says whether a longer protocol would help (it lessens the protocol's part alone).

    Raises:
        InputError: not a subset proposal, one with bonds of fixed length, an odd or too small number of steps,
            couplings outside [0, 1), or a share outside (0, 1).
    """

    __module__ = "openmm_regflow.moves"

    def __init__(
        self,
        proposal: SubsetProposal,
        n_steps: int = 1000,
        timestep: Any = 0.001,
        collision_rate: Any = 1.0,
        pool_size: int = 256,
        *,
        least_coupling: tuple[float, float] = (0.0, 0.5),
        steric_share: float = STERIC_SHARE,
        flow_path: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        if proposal.atom_subset is None:
            raise InputError("NCMCFlowMove switches a part of a System; give it a SubsetProposal")
        if proposal.constraints is not None:
            raise InputError(
                "NCMCFlowMove jumps in the middle of dynamics, which bonds of fixed length in the subset do not "
                "survive; use a flow and a System without constraints in the subset"
            )
        if n_steps < 2 or n_steps % 2:
            raise InputError(f"n_steps is {n_steps}; an even number is needed, as the flow jumps in the middle")
        if len(least_coupling) != 2 or not all(0 <= c < 1 for c in least_coupling):
            raise InputError(f"least_coupling is {least_coupling}; two numbers from 0 to below 1 are needed")
        if not 0 < steric_share < 1:
            raise InputError(f"steric_share is {steric_share}; a share of the protocol above 0 and below 1 is needed")
        super().__init__(proposal, 1, pool_size, flow_path=flow_path, energy="context", seed=seed)
        self.n_steps = n_steps
        self.least_coupling = float(least_coupling[0]), float(least_coupling[1])
        self.timestep, self.collision_rate = to_float(timestep, "time"), to_float(collision_rate, "rate")
        self.steric_share, self.last_work = float(steric_share), _unknown_work()
        self._switched: Any = None

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """One switching protocol at a thermodynamic state of constant volume.

        Raises:
            UnsupportedForceError: constraints or virtual sites in the subset.
            InputError: constant pressure (the protocol would need its own barostat), or a flow file that is gone.
        """
        if thermodynamic_state.pressure is not None:
            raise InputError("NCMCFlowMove needs constant volume; use it in a ThermodynamicState without pressure")
        step = self._loaded(thermodynamic_state)
        check_atom_count(sampler_state, step.proposal)
        energy, _ = self._energy(thermodynamic_state, sampler_state, context_cache)
        positions = sampler_state.positions.value_in_unit(unit.nanometer)
        positions = step.proposal.make_whole(positions, box_of(thermodynamic_state, sampler_state))
        context = self._context(thermodynamic_state, context_cache)
        new, log_ratio = self._protocol(context, sampler_state, positions, energy, thermodynamic_state)
        if self._decide(log_ratio):
            self._redraw_velocities(context, thermodynamic_state)
            velocities = context.getState(getVelocities=True).getVelocities(asNumpy=True)
            sampler_state.positions = unit.Quantity(new, unit.nanometer)
            sampler_state.velocities = velocities

    def __getstate__(self, **kwargs: Any) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("n_steps", "timestep", "collision_rate", "steric_share")}
        settings["least_coupling"] = list(self.least_coupling)
        return super().__getstate__(**kwargs) | {"ncmc": settings}

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        super().__setstate__(serialization)
        settings = serialization.get("ncmc", {})
        if missing := sorted({"n_steps", "timestep", "collision_rate", "least_coupling"} - set(settings)):
            raise CorruptFileError(f"a stored NCMCFlowMove lacks {', '.join(missing)}; the storage file is damaged")
        self.steric_share, self.last_work = STERIC_SHARE, _unknown_work()
        for name, value in settings.items():
            setattr(self, name, tuple(value) if name == "least_coupling" else value)
        self._switched = None

    def _decide(self, log_ratio: float) -> bool:
        """Metropolis decision; anything that is not a number is a counted rejection."""
        step = self._step
        draw = float(torch.rand(1, generator=step.generator, dtype=torch.float64))  # type: ignore[union-attr]
        possible = math.isfinite(log_ratio)
        accepted = possible and (log_ratio >= 0 or draw < math.exp(log_ratio))
        log_weight = torch.tensor([[log_ratio if possible else -math.inf]], dtype=torch.float64)
        flags = torch.tensor([accepted]), torch.tensor([0 if accepted else -1])
        outside = torch.tensor([False])
        self._statistics.update(KernelInfo(*flags, log_weight.squeeze(0).exp().clamp(max=1), log_weight, outside))
        return accepted

    def _protocol(
        self, context: openmm.Context, sampler_state: Any, positions: np.ndarray, energy: Any, state: Any
    ) -> tuple[np.ndarray, float]:
        """Weaken, jump, restore: final positions, at which the Context is left, and the log acceptance ratio."""
        kT, integrator = thermal_energy(state.temperature), context.getIntegrator()
        self.last_work = _unknown_work()
        try:
            if sampler_state.box_vectors is not None:
                context.setPeriodicBoxVectors(*sampler_state.box_vectors)
            context.setPositions(positions)
            integrator.reset()
            for name in schedule():  # a protocol that blew up has left them on its way
                context.setParameter(name, 1.0)
            self._redraw_velocities(context, state)
            log_ratio = float(energy(torch.as_tensor(np.array(positions))[None])) - _energy_of(context) / kT
            integrator.step(self.n_steps // 2)
            jump = self._jump(context, kT)
            integrator.step(self.n_steps // 2)
            log_ratio += jump - integrator.get_total_work(dimensionless=True)
            self.last_work = {
                "jump": -jump,
                "protocol": float(integrator.get_protocol_work(dimensionless=True)),
                "shadow": float(integrator.get_shadow_work(dimensionless=True)),
            }
            final = context.getState(getPositions=True)
            new = final.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
            log_ratio += _energy_of(context) / kT - float(energy(torch.as_tensor(np.array(new))[None]))
        except openmm.OpenMMException:  # a protocol that blew up: NaN coordinates
            return positions, math.nan
        return new, log_ratio

    def _redraw_velocities(self, context: openmm.Context, state: Any) -> None:
        """Maxwell-Boltzmann velocities, without components along constraints."""
        temperature = state.temperature.value_in_unit(unit.kelvin)
        masses, generator = system_masses(context.getSystem()), self._step.generator  # type: ignore[union-attr]
        context.setVelocities(redrawn(None, masses, None, temperature, generator))
        context.applyVelocityConstraints(1e-8)

    def _jump(self, context: openmm.Context, kT: float) -> float:
        """The flow's proposal at the least coupling; its part of the log acceptance ratio."""
        step, proposal = self._step, self._step.proposal  # type: ignore[union-attr]
        state = context.getState(getPositions=True)
        x = torch.as_tensor(np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)))[None]
        drawn: ProposalBatch = step.pool.take(1, energies=False)  # type: ignore[union-attr]
        y = proposal.in_place(drawn.positions, x)
        energies = context_potential(context, kT)(torch.cat([x, y]))
        context.setPositions(y[0].numpy())
        return float(energies[0] - energies[1] + proposal.log_q(x)[0] - drawn.log_q[0])

    def _context(self, thermodynamic_state: Any, context_cache: Any) -> openmm.Context:
        """The alchemical Context of this state, built on first use."""
        from openmmtools import cache

        if self._switched is None or not self._switched[0].is_state_compatible(thermodynamic_state):
            system = thermodynamic_state.get_system(remove_thermostat=True)
            switched = alchemical_system(system, self._step.proposal.atom_subset)  # type: ignore[union-attr, arg-type]
            platform = (cache.global_context_cache if context_cache is None else context_cache).platform
            integrator = self._integrator(thermodynamic_state)
            arguments = (switched, integrator) if platform is None else (switched, integrator, platform)
            self._switched = (copy.deepcopy(thermodynamic_state), openmm.Context(*arguments), integrator)
        self._switched[2].setTemperature(thermodynamic_state.temperature)  # which compatible states need not share
        return self._switched[1]

    def _integrator(self, thermodynamic_state: Any) -> Any:
        """Langevin dynamics that switch the coupling and measure protocol and shadow work."""
        from openmmtools import integrators

        electrostatics, sterics = self.least_coupling
        return integrators.AlchemicalNonequilibriumLangevinIntegrator(
            alchemical_functions=schedule(electrostatics, sterics, self.steric_share),
            splitting="O V R H R V O",
            nsteps_neq=self.n_steps,
            temperature=thermodynamic_state.temperature,
            collision_rate=self.collision_rate / unit.picosecond,
            timestep=self.timestep * unit.picosecond,
            measure_shadow_work=True,
        )


def _unknown_work() -> dict[str, float]:
    return dict.fromkeys(("jump", "protocol", "shadow"), math.nan)


def _energy_of(context: openmm.Context) -> float:
    """Potential energy [kJ/mol] of a Context as it is."""
    return float(context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))


def alchemical_system(system: openmm.System, subset: list[int]) -> openmm.System:
    """The System with a subset whose nonbonded interactions with the rest scale with two global parameters.

    With Ewald sums the charges of the subset are scaled, reciprocal space included, so electrostatics within the subset
    vanish as well; otherwise interactions within the subset stay. The subset's part of the dispersion correction is
    left out: a constant at constant volume. So is a CMMotionRemover, whose changes of velocities no work accounts for.
    """
    from openmmtools.alchemy import AbsoluteAlchemicalFactory, AlchemicalRegion

    region = AlchemicalRegion(
        alchemical_atoms=subset, annihilate_electrostatics=_has_ewald_sum(system), annihilate_sterics=False
    )
    factory = AbsoluteAlchemicalFactory(alchemical_pme_treatment="exact", disable_alchemical_dispersion_correction=True)
    switched = factory.create_alchemical_system(system, region)
    for k in reversed(range(switched.getNumForces())):
        if isinstance(switched.getForce(k), openmm.CMMotionRemover):
            switched.removeForce(k)
    return switched


def _has_ewald_sum(system: openmm.System) -> bool:
    """Whether charges interact through reciprocal space."""
    methods = (openmm.NonbondedForce.Ewald, openmm.NonbondedForce.PME)
    forces = (force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
    return any(force.getNonbondedMethod() in methods for force in forces)
