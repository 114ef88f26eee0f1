"""F(phi > 0) - F(phi < 0) of a peptide at its own temperature: by a learned map, through a flow, through its teacher.

    python examples/tfep_basins.py alanine-dipeptide --flow flow.safetensors --teacher teacher.safetensors
    python examples/tfep_basins.py alanine-tetrapeptide --phi 2

Samples of each basin come from 32 ladders up to 400 K behind a wall that is zero inside the basin,
``500 kJ/mol min(0, +-sin phi)^2``: frames inside follow the Boltzmann distribution of the basin exactly, and a rare
basin has as many as a common one. How many there are of each does not enter the free energy. Upper states of a ladder
have the other phi torsions flattened, so that these cross. The runs take three million energies per basin and rung.
The same command goes on where it stopped; results in basins.json are not made again. No frame has trained the flow.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import torch

import openmm_regflow as rf
from openmm_regflow import metrics, tfep
from openmm_regflow.files import write_json
from openmm_regflow.flows import coordinates_for
from openmm_regflow.mixtures import one_flow
from openmm_regflow.simulate import (
    BatchedSettings,
    batched_tempering,
    flattening_bias,
    load_batched,
    torsion_bias_system,
)
from openmm_regflow.teachers import integrate, load_teacher
from openmm_regflow.training import TrainConfig

LADDER = {"n_copies": 32, "max_temperature": 400.0, "scramble_steps": 10_000}
ITERATIONS, BURN_IN = 80, 10
N_FLOW, N_TEACHER = 100_000, 5_000
EVERY = 4  # of the frames, for the teacher
FOLDS = 4


def others_flattened(molecule, torsion):
    """The bias that flattens the other phi torsions, found for alanine dipeptide; None where there are none."""
    small = rf.load_system("alanine-dipeptide")
    phi = metrics.dihedrals(small.reference("train"), small.torsions("phi"))
    others = [row for row in molecule.torsions("phi") if tuple(row) != tuple(torsion)]
    amplitudes = flattening_bias(phi, small.temperature)
    return torsion_bias_system(molecule.n_atoms, [(row, amplitudes) for row in others]) if others else None


def basin_frames(molecule, torsion, sign, folder):
    """Frames with ``sign`` * phi > 0 `(n, n_atoms, 3)` [nm], ladder by ladder."""
    wall = openmm.CustomTorsionForce(f"500*min(0, {sign}*sin(theta))^2")
    wall.addTorsion(*map(int, torsion))
    system = openmm.XmlSerializer.clone(molecule.system)
    system.addForce(wall)
    frames = molecule.reference("train")
    inside = frames[sign * metrics.dihedrals(frames, torsion[None])[:, 0] > 0]
    walled = replace(molecule, system=system, positions=inside[0].astype(float))
    bias = others_flattened(molecule, torsion)
    rungs = 2 if bias is None else 3
    settings = BatchedSettings.create(**LADDER, n_replicas=rungs, n_iterations=ITERATIONS, seed=10 + sign)
    batched_tempering(walled, folder, settings, bias=bias)
    runs = [run.after(BURN_IN) for run in load_batched(folder)]
    found = np.concatenate([run.at_temperature(run.positions) for run in runs])
    return found[sign * metrics.dihedrals(found, torsion[None])[:, 0] > 0]


class Teacher:
    """Samples and log-densities of a continuous flow in the student's coordinates: an ODE with its exact divergence."""

    def __init__(self, field, coordinates, n_steps=20):
        self.field, self.coordinates, self.n_steps = field, coordinates, n_steps

    def _carry(self, z, reverse):
        parts = [
            integrate(self.field, part, n_steps=self.n_steps, log_det="exact", reverse=reverse) for part in z.split(500)
        ]
        return tuple(torch.cat(column).double() for column in zip(*parts))

    def sample(self, n, generator):
        z = self.field.prior.sample(n, generator)
        features, log_det = self._carry(z, False)
        x, log_volume = self.coordinates.to_positions(features)
        return x, self.field.prior.log_prob(z).double() - log_det - log_volume

    def log_prob(self, x):
        features, log_volume = self.coordinates.to_features(x)
        z, log_det = self._carry(features.float(), True)
        return self.field.prior.log_prob(z.float()).double() + log_det + log_volume


def through(density, molecule, torsion, potential, left, right, n):
    """The free energy through a density, and the seconds that the density and the whole took."""
    kt = rf.units.thermal_energy(molecule.temperature)
    start = time.perf_counter()
    with torch.no_grad():
        x, log_q = density.sample(n, torch.Generator().manual_seed(0))
        log_q_left, log_q_right = (density.log_prob(torch.as_tensor(v).double()) for v in (left, right))
    seconds = time.perf_counter() - start
    fine = torch.isfinite(x).flatten(1).all(1)
    u = torch.full((n,), torch.inf, dtype=torch.float64)
    u[fine] = potential(x[fine].double()) / kt
    angle = np.zeros(n)
    angle[fine] = metrics.dihedrals(x[fine].numpy(), torsion[None])[:, 0]
    u_left, u_right = (potential(torch.as_tensor(v).double()) / kt for v in (left, right))
    log_q = torch.where(fine & torch.isfinite(u), log_q.double(), 0.0)
    result = tfep.basin_free_energy(
        log_q, u, angle < 0, angle > 0, log_q_left, u_left, log_q_right, u_right,
        temperature=molecule.temperature, generator=0,
    )  # fmt: skip
    return result, {"density": seconds, "samples": n + len(left) + len(right)}


def by_map(molecule, torsion, potential, left, right):
    """The free energy by cross-fitted maps from basin to basin, refined with energies."""
    kelvin = molecule.temperature
    a, b = (tfep.State(potential, kelvin, tfep.torsion_basin(torsion, arc)) for arc in ((-np.pi, 0.0), (0.0, np.pi)))
    regression = TrainConfig(steps=600, batch_size=256, learning_rate=2e-3, ema=0.99)
    refinement = TrainConfig(steps=300, batch_size=256, learning_rate=1e-3, ema=0.99, validate_every=50, patience=3)

    def fit(x, y):
        coordinates = coordinates_for(molecule.topology, torch.cat([x, y]))
        return tfep.fit_map(coordinates, x, y, config=regression, refine=(a, b), refine_config=refinement)

    start = time.perf_counter()
    result = tfep.cross_fit(fit, a, b, left, right, folds=FOLDS, generator=0)
    return result, {"training and evaluation": time.perf_counter() - start}


def main(options):
    molecule = rf.load_system(options.system)
    torsion = molecule.torsions("phi")[options.phi - 1]
    root = options.folder / f"{molecule.name}-{options.phi}"
    left, right = (basin_frames(molecule, torsion, s, root / n) for s, n in ((-1, "left"), (1, "right")))
    print(f"{len(left)} frames with phi < 0, {len(right)} with phi > 0")
    potential = rf.TorchPotential(molecule.system)
    common, few = (molecule, torsion, potential), (left[::EVERY], right[::EVERY])
    runs = {"map": lambda: by_map(*common, left, right)}
    if options.flow:
        flow = rf.load_flow(options.flow)
        runs["student"] = lambda: through(flow, *common, left, right, N_FLOW)
        runs["student, as few samples as the teacher"] = lambda: through(flow, *common, *few, N_TEACHER)
    if options.teacher:
        teacher = Teacher(load_teacher(options.teacher), one_flow(flow, "the teacher").coordinates)
        runs["teacher"] = lambda: through(teacher, *common, *few, N_TEACHER)
    path = root / "basins.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for name, run in runs.items():
        if name not in record:
            result, seconds = run()
            plain = None if result.plain is None else str(result.plain)
            record[name] = {**result.to_dict(), "line": str(result), "plain FEP": plain, "seconds": seconds}
            write_json(path, record)
        print(f"{name}: {record[name]['line']}\n    seconds: {record[name]['seconds']}", flush=True)
        if name == "map":
            print(f"    without a map: {record[name]['plain FEP'] or 'no overlap'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="name or folder")
    parser.add_argument("--phi", type=int, default=1, help="which phi torsion, from 1")
    parser.add_argument("--flow", type=Path, help="flow file of this system")
    parser.add_argument("--teacher", type=Path, help="its teacher; needs --flow, whose coordinates it shares")
    parser.add_argument("--folder", type=Path, default=Path("runs/tfep-basins"))
    chosen = parser.parse_args()
    if chosen.teacher and not chosen.flow:
        parser.error("--teacher needs --flow")
    main(chosen)
