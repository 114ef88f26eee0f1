"""Alanine dipeptide between two temperatures and between two force fields: learned maps and a flow beside MBAR.

    python examples/tfep_thermodynamic_states.py temperature [folder]
    python examples/tfep_thermodynamic_states.py force-field [folder]

``temperature``: 300 K to 330 K, amber99sbildn with its OBC model. ``force-field``: the same at 300 K to amber14 with
OBC2. Each end state is sampled by 32 ladders of two replicas, the upper one hotter and with phi flattened; a map is
learned from these samples, cross-fitted so that each is evaluated by a map that it did not train. The shipped flow of
the molecule needs no samples of either state: its own are reweighted to both. The reference is
MBAR over replica exchange with openmmtools: four states from one end to the other and two upper ones that cross the
barriers of phi. All energy evaluations are counted, dynamics and training included; give the command again after an
interruption and it goes on where it stopped.
"""

import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import unit
from openmmtools import cache, mcmc, multistate, states
from openmmtools.states import GlobalParameterState

import openmm_regflow as rf
from openmm_regflow import metrics, tfep
from openmm_regflow.files import write_json
from openmm_regflow.flows import coordinates_for
from openmm_regflow.simulate import (
    BatchedSettings,
    batched_tempering,
    flattening_bias,
    load_batched,
    torsion_bias_system,
    with_hydrogen_mass,
)
from openmm_regflow.simulate.tempering import writable_folder
from openmm_regflow.units import GAS_CONSTANT

LADDER = {"n_copies": 32, "n_replicas": 2, "max_temperature": 400.0, "scramble_steps": 5000, "steps_per_iteration": 50}
ITERATIONS, BURN_IN = 600, 50
REFERENCE_ITERATIONS, REFERENCE_BURN_IN, REFERENCE_STEPS = 1200, 20, 500
TIMESTEP, COLLISION_RATE, HYDROGEN_MASS = 0.003, 1.0, 4.0  # ps, 1/ps, dalton; of both samplers
FOLDS = 4
N_FLOW = 100_000


def ends(change):
    """The molecule in both states."""
    a = rf.load_system("alanine-dipeptide")
    if change == "temperature":
        return a, replace(a, temperature=330.0)
    return a, rf.load_system(a.folder, force_field=["amber14-all.xml", "implicit/obc2.xml"])


def phi_bias(molecule):
    """Amplitudes of the bias that flattens phi, from the shipped training frames."""
    phi = metrics.dihedrals(molecule.reference("train"), molecule.torsions("phi"))
    return flattening_bias(phi, molecule.temperature)


def trajectory(molecule, amplitudes, folder, seed):
    """Frames of the unbiased lowest state, ladder by ladder `(n, n_atoms, 3)` [nm], and the energies they took."""
    dynamics = {"timestep": TIMESTEP, "collision_rate": COLLISION_RATE, "hydrogen_mass": HYDROGEN_MASS}
    settings = BatchedSettings.create(**LADDER, **dynamics, n_iterations=ITERATIONS, seed=seed)
    bias = torsion_bias_system(molecule.n_atoms, [(molecule.torsions("phi")[0], amplitudes)])
    batched_tempering(molecule, folder, settings, bias=bias)
    runs = [run.after(BURN_IN) for run in load_batched(folder)]
    steps = settings.scramble_steps + ITERATIONS * (settings.steps_per_iteration + 1)
    cost = settings.n_copies * settings.n_replicas * steps
    return np.concatenate([run.at_temperature(run.positions) for run in runs]), cost


# ---------------------------------------------------------------------------------------- openmmtools' reference


def with_native_obc(system):
    """A copy with OBC2 as OpenMM's own force, which the Reference platform evaluates 40 times faster than a formula."""
    copy = openmm.XmlSerializer.clone(system)
    for index, force in enumerate(copy.getForces()):
        if isinstance(force, openmm.CustomGBForce):
            native = openmm.GBSAOBCForce()
            for particle in range(force.getNumParticles()):
                charge, offset_radius, scaled_radius = force.getParticleParameters(particle)
                native.addParticle(charge, offset_radius + 0.009, scaled_radius / offset_radius)
            native.setSolventDielectric(78.5)
            copy.removeForce(index)
            copy.addForce(native)
            break
    return copy


def mixed_system(a, b, torsion, amplitudes):
    """(1 - lambda_ff) U_A + lambda_ff U_B + phi_bias times the torsion bias: two global parameters.

    ``b`` is None where the force field does not change.
    """
    system = openmm.System()
    for particle in range(a.getNumParticles()):
        system.addParticle(a.getParticleMass(particle))
    if b is None:
        for force in a.getForces():
            system.addForce(openmm.XmlSerializer.clone(force))
    else:
        names = [[f"u{side}_{k}" for k in range(s.getNumForces())] for side, s in enumerate((a, b))]
        mixed = openmm.CustomCVForce(f"(1-lambda_ff)*({'+'.join(names[0])})+lambda_ff*({'+'.join(names[1])})")
        mixed.addGlobalParameter("lambda_ff", 0.0)
        for side, row in zip((a, b), names):
            for name, force in zip(row, side.getForces()):
                mixed.addCollectiveVariable(name, openmm.XmlSerializer.clone(force))
        system.addForce(mixed)
    terms = "+".join(f"{p:.8g}*(1+cos({n}*theta-({q:.8g})))" for n, (p, q) in enumerate(amplitudes, start=1))
    bias = openmm.CustomTorsionForce(f"phi_bias*({terms})")
    bias.addGlobalParameter("phi_bias", 0.0)
    bias.addTorsion(*map(int, torsion))
    system.addForce(bias)
    return system


class Mixture(GlobalParameterState):
    """The parameters of :func:`mixed_system`."""

    lambda_ff = GlobalParameterState.GlobalParameter("lambda_ff", standard_value=0.0)
    phi_bias = GlobalParameterState.GlobalParameter("phi_bias", standard_value=0.0)


#: (temperature [K], lambda_ff, phi_bias): A, two between, B, and two that cross the barriers of phi
REFERENCE_STATES = {
    "temperature": [(300, None, 0), (310, None, 0), (320, None, 0), (330, None, 0), (363, None, 0.5), (400, None, 1)],
    "force-field": [(300, 0, 0), (300, 1 / 3, 0), (300, 2 / 3, 0), (300, 1, 0), (346, 0.5, 0.5), (400, 0.5, 1)],
}
LAST = 3  # B's place among them


class RescalingSampler(multistate.ReplicaExchangeSampler):
    """Velocities follow a swap of temperatures (Sugita & Okamoto 1999, equation 11); openmmtools leaves them.

    Drawing them anew instead heats stiff modes: this integrator's velocities belong to half steps, and independent ones
    raise a mode's energy by (omega dt)^2 / 8, here by 0.4 kT in all, most of which friction has not taken out again
    when the next ones are drawn.
    """

    def _mix_replicas(self):
        before = np.array(self._replica_thermodynamic_states)
        after = super()._mix_replicas()
        kelvin = np.array([state.temperature.value_in_unit(unit.kelvin) for state in self._thermodynamic_states])
        for replica in np.flatnonzero(before != np.asarray(after)):
            state = self._sampler_states[replica]
            state.velocities = state.velocities * np.sqrt(kelvin[after[replica]] / kelvin[before[replica]])
        return after


def new_sampler(change, a, b, amplitudes, storage):
    """Replica exchange of openmmtools over the reference states."""
    other = with_native_obc(b.system) if change == "force-field" else None
    system = mixed_system(with_hydrogen_mass(a.system, HYDROGEN_MASS), other, a.torsions("phi")[0], amplitudes)
    points = []
    for kelvin, lambda_ff, phi_bias in REFERENCE_STATES[change]:
        parameters = {"phi_bias": phi_bias} | ({} if lambda_ff is None else {"lambda_ff": lambda_ff})
        state = states.ThermodynamicState(system, kelvin * unit.kelvin)
        points.append(states.CompoundThermodynamicState(state, [Mixture(**parameters)]))
    integrator = openmm.LangevinMiddleIntegrator(300, COLLISION_RATE, TIMESTEP)
    move = mcmc.IntegratorMove(integrator, REFERENCE_STEPS)
    sampler = RescalingSampler(mcmc_moves=move, online_analysis_interval=None)
    rng = np.random.default_rng(7)
    mass = np.array([system.getParticleMass(i)._value for i in range(a.n_atoms)])
    starts = []
    for x, state in zip(rng.choice(a.reference("train"), len(points), replace=False), points):
        kt = GAS_CONSTANT * state.temperature.value_in_unit(unit.kelvin)
        v = rng.standard_normal(x.shape) * np.sqrt(kt / mass)[:, None]
        starts.append(states.SamplerState(x * unit.nanometer, v * unit.nanometer / unit.picosecond))
    sampler.create(points, starts, multistate.MultiStateReporter(str(storage), checkpoint_interval=10))
    return sampler


def reference(change, a, b, amplitudes, folder):
    """MBAR over replica exchange with openmmtools, and the energy evaluations that it took."""
    storage = writable_folder(folder) / "exchange.nc"
    if storage.exists():
        reporter = multistate.MultiStateReporter(str(storage), open_mode="r+", checkpoint_interval=10)
        sampler = RescalingSampler.from_storage(reporter)
    else:
        sampler = new_sampler(change, a, b, amplitudes, storage)
    # One Context for dynamics and energies, made at the integrator's own temperature.
    contexts = cache.ContextCache(capacity=None, time_to_live=None, platform=openmm.Platform.getPlatform("Reference"))
    contexts.get_context(sampler._thermodynamic_states[0], copy.deepcopy(sampler.mcmc_moves[0].integrator))
    sampler.energy_context_cache = sampler.sampler_context_cache = contexts
    sampler._have_displayed_citations_before = True
    if sampler.iteration < REFERENCE_ITERATIONS:
        sampler.extend(REFERENCE_ITERATIONS - sampler.iteration)
    sampler._reporter.close()
    n = len(REFERENCE_STATES[change])
    return tfep.storage_reference(storage, burn_in=REFERENCE_BURN_IN), n * sampler.iteration * (REFERENCE_STEPS + n)


# ---------------------------------------------------------------------------------------- maps


class Counted:
    """A potential that counts the configurations it has evaluated."""

    def __init__(self, potential):
        self.potential, self.count = potential, 0

    def __call__(self, x):
        self.count += len(x)
        return self.potential(x)


def mapped(a, b, x, y):
    """delta_f by cross-fitted maps, plain perturbation on the same samples, and the energies that both took."""
    potential = Counted(rf.TorchPotential(a.system))
    other = potential if b.system is a.system else Counted(rf.TorchPotential(b.system))
    state_a, state_b = tfep.State(potential, a.temperature), tfep.State(other, b.temperature)

    def fit(x_a, x_b):
        coordinates = coordinates_for(a.topology, torch.cat([x_a, x_b]))
        return tfep.fit_nearby_map(coordinates, x_a, x_b, (state_a, state_b))

    result = tfep.cross_fit(fit, state_a, state_b, x, y, folds=FOLDS, generator=0)
    return result, sum(p.count for p in {id(p): p for p in (potential, other)}.values())


def through_flow(a, b):
    """delta_f from samples of A's shipped flow alone, and its energies: for this result, and in the flow's training."""
    flow = rf.Flow.load(a.folder / "flow.safetensors")
    x, log_q = flow.sample(N_FLOW, torch.Generator().manual_seed(0))
    potential_a = rf.TorchPotential(a.system)
    potential_b = potential_a if b.system is a.system else rf.TorchPotential(b.system)
    u_a, u_b = (u(x) / rf.units.thermal_energy(m.temperature) for u, m in ((potential_a, a), (potential_b, b)))
    kelvin = a.temperature if a.temperature == b.temperature else None
    result = tfep.states_through_flow(log_q, u_a, u_b, temperature=kelvin, generator=0)
    return result, (1 if potential_b is potential_a else 2) * N_FLOW, flow.metadata.training["energies"]


def main(change, root):
    a, b = ends(change)
    amplitudes = phi_bias(a)
    x, cost_a = trajectory(a, amplitudes, root / "a", 1)
    y, cost_b = trajectory(b, amplitudes, root / f"{change}-b", 2)
    start = time.perf_counter()
    result, extra = mapped(a, b, x, y)
    print(f"learned maps  {result}\nplain FEP     {result.plain}", flush=True)
    flow, flow_cost, training = through_flow(a, b)
    print(f"through flow  {flow}", flush=True)
    mbar, cost = reference(change, a, b, amplitudes, root / f"{change}-reference")
    value, error = float(mbar.delta_f[LAST]), float(mbar.uncertainty[LAST])
    print(f"MBAR          delta_f = {value:.3f} ± {error:.3f} kT ({mbar.verdict})")
    # Errors fall with the root of the evaluations: their ratio at equal error is that of n * error^2.
    rows = {
        "learned maps": (result.delta_f, result.uncertainty, cost_a + cost_b + extra),
        "plain FEP (BAR)": (result.plain.delta_f, result.plain.uncertainty, cost_a + cost_b + 2 * (len(x) + len(y))),
        "through the flow": (flow.delta_f, flow.uncertainty, flow_cost),
        "through the flow, with its training": (flow.delta_f, flow.uncertainty, flow_cost + training),
        "MBAR": (value, error, cost),
    }
    record = {
        name: {"delta_f": v, "error": e, "evaluations": n, "evaluations_for_0.01_kT": n * (e / 0.01) ** 2,
               "of_MBAR": n * e**2 / (cost * error**2)}
        for name, (v, e, n) in rows.items()
    }  # fmt: skip
    for name, r in (("learned maps", result), ("through the flow", flow)):
        record[name]["z"] = (r.delta_f - value) / np.hypot(r.uncertainty, error)
    record["training_and_evaluation_seconds"] = time.perf_counter() - start
    write_json(root / f"{change}.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in REFERENCE_STATES:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/tfep-states"))
