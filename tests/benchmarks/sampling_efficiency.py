"""Effective samples of phi per second: Langevin dynamics, flow moves with dynamics, parallel tempering, in one run.

    python tests/benchmarks/sampling_efficiency.py flow.safetensors --system alanine-dipeptide --seconds 60 -o out.json

Every method runs on one core for the same time and with the same dynamics (Langevin, 2 fs, hydrogens of 4 dalton, which
changes no distribution of positions). Effective samples are n over the integrated autocorrelation time of cos phi,
sin phi and the indicator of the basin; the slowest of the three counts. Rates are per second of processor time, so that
another job on the machine does not matter. A chain that crossed fewer than ten times between the basins does not know
its own correlation time: its rate is an upper bound ("at most"), and ratios to it are lower bounds.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import openmm_regflow as rf
from openmm_regflow import metrics
from openmm_regflow.chains import run_chain
from openmm_regflow.files import write_json
from openmm_regflow.simulate import TemperingSettings, load_run, parallel_tempering
from openmm_regflow.simulate.tempering import with_hydrogen_mass

TIMESTEP, HYDROGEN_MASS = 0.002, 4.0
FEWEST_CROSSINGS = 10


class Clock:
    """Processor and wall time between the first and the last report of progress; stops a run that is over its time."""

    def __init__(self, seconds=None):
        self.seconds, self.stamps = seconds, []

    def __call__(self, done, total, figures=None):
        self.stamps.append((done, time.process_time(), time.monotonic()))
        if self.seconds is not None and self.stamps[-1][2] - self.stamps[0][2] > self.seconds:
            raise TimeIsUp

    @property
    def spent(self):
        """(iterations, processor seconds, wall seconds)."""
        return tuple(b - a for a, b in zip(self.stamps[0], self.stamps[-1]))


class TimeIsUp(Exception):
    """Ends a sampler that knows no clock."""


def efficiency(frames, mol, cpu, wall):
    """Effective samples, their rate and what it is worth, of one chain `(n, n_atoms, 3)` [nm]."""
    phi = metrics.dihedrals(np.asarray(frames, dtype=np.float64), mol.torsions("phi")[:1])[:, 0]
    inside = metrics.in_range(phi, metrics.CORE_POSITIVE).astype(float)
    series = {"cos phi": np.cos(phi), "sin phi": np.sin(phi), "basin": inside}
    effective = {k: len(v) / metrics.integrated_autocorrelation_time(v) for k, v in series.items()}
    crossings = metrics.count_crossings(phi)
    return {
        "effective_samples": effective,
        "population": float(inside.mean()),
        "crossings": crossings,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "per_second": min(effective.values()) / cpu,
        "upper_bound": crossings < FEWEST_CROSSINGS,
    }


def chain(mol, seconds, seed, proposal=None, n_proposals=1, md_steps=250):
    """One openmmtools MCMCSampler for a number of seconds."""
    move = None if proposal is None else rf.FlowMove(proposal, n_proposals, pool_size=1024, seed=seed)
    clock = Clock()
    trace = run_chain(
        mol, move, seconds=seconds, n_md_steps=md_steps, timestep=TIMESTEP, seed=seed, progress=clock
    )  # fmt: skip
    _, cpu, wall = clock.spent
    found = efficiency(trace.positions, mol, cpu, wall)
    if move is not None:
        found |= {k: trace.statistics[k] for k in ("acceptance_rate", "effective_sample_size", "n_proposed")}
    return found | {"md_steps_per_second": trace.md_steps / cpu, "iterations": len(trace.positions)}


def tempering(mol, seconds, seed, max_temperature, n_replicas, steps):
    """openmmtools parallel tempering; the replica at the target temperature is the chain. Start-up is not counted."""
    settings = TemperingSettings.create(
        max_temperature=max_temperature, n_replicas=n_replicas, steps_per_iteration=steps, n_iterations=10**7,
        timestep=TIMESTEP, hydrogen_mass=HYDROGEN_MASS, checkpoint_interval=1000, seed=seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(seconds)
        with contextlib.suppress(TimeIsUp):
            parallel_tempering(mol, Path(folder) / "run", settings, progress=clock)
        run = load_run(Path(folder) / "run")
        iterations, cpu, wall = clock.spent
        found = efficiency(run.at_temperature(run.positions)[:iterations], mol, cpu, wall)
    ladder = {"max_temperature": max_temperature, "n_replicas": n_replicas, "steps": steps}
    return found | {"ladder": ladder, "swap_acceptance": run.acceptance.tolist(), "iterations": iterations}


def rejected_move_overhead(mol, proposal, n=500):
    """Milliseconds of a rejected FlowMove beyond its flow and energies: one density and one energy; medians."""
    from openmm import unit
    from openmmtools import states

    move = rf.FlowMove(proposal, 1, pool_size=n + 100, seed=0)
    move._step.pool.take(1)  # fills it, so that no move draws anything
    thermodynamic = states.ThermodynamicState(mol.system, mol.temperature * unit.kelvin)
    sampler = states.SamplerState(mol.positions * unit.nanometers)
    rejected, parts = [], []
    for _ in range(n):
        x = torch.as_tensor(sampler.positions.value_in_unit(unit.nanometer))[None]
        accepted, began = move.n_accepted, time.process_time()
        move.apply(thermodynamic, sampler)
        middle = time.process_time()
        with torch.no_grad():
            proposal.flow.log_prob(x)
            proposal.potential(x)
        parts.append(time.process_time() - middle)
        if move.n_accepted == accepted:
            rejected.append(middle - began)
    milliseconds = {"rejected_move": 1e3 * float(np.median(rejected)), "flow_and_energy": 1e3 * float(np.median(parts))}
    return milliseconds | {"overhead": milliseconds["rejected_move"] - milliseconds["flow_and_energy"]}


def break_even(flow, results):
    """Seconds of sampling after which training and flow moves have given more than the baseline in the same time."""
    training = flow.metadata.training.get("seconds")
    if not training:
        return None
    spent = float(sum(training.values()))
    best = max(r["per_second"] for k, r in results.items() if k.startswith("flow"))
    found = {"training_seconds": spent}
    for name, rate in ((k, r["per_second"]) for k, r in results.items() if not k.startswith("flow")):
        found[name] = spent * rate / (best - rate) if best > rate else None
    return found


def table(results):
    """Lines for people."""
    reference = results["langevin"]
    at_least = ">=" if reference["upper_bound"] else ""
    # Ladders that crossed often enough to know their rate; without one, the highest bound makes the ratio a lower one.
    ladders = [r for k, r in results.items() if k.startswith("tempering")]
    known = [r for r in ladders if not r["upper_bound"]] or ladders
    best = max((r["per_second"] for r in known), default=float("nan"))
    heads = f"{'eff./s':>11} {'x MD':>9} {'x tempering':>12} {'accepted':>9}"
    yield f"{'method':24} {'iter.':>8} {'cross.':>7} {'P(phi>0)':>9} {heads}"
    for name, r in results.items():
        bound = "<=" if r["upper_bound"] else "  "
        ratio = "1" if r is reference else f"{at_least}{r['per_second'] / reference['per_second']:.3g}"
        accepted = f"{r['acceptance_rate']:.3f}" if "acceptance_rate" in r else "-"
        yield (
            f"{name:24} {r['iterations']:8d} {r['crossings']:7d} {r['population']:9.4f} {bound}{r['per_second']:9.4g} "
            f"{ratio:>9} {r['per_second'] / best:12.3g} {accepted:>9}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", help="flow file")
    parser.add_argument("--system", default="alanine-dipeptide")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall-clock per method")
    parser.add_argument("--proposals", type=int, nargs="*", default=[1, 32], help="n_proposals of the flow chains")
    parser.add_argument("--md-steps", type=int, default=50, help="Langevin steps between flow moves")
    parser.add_argument(
        "--ladders", nargs="*", default=["600:4:250", "700:6:500"], help="hottest [K] : replicas : steps between swaps"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the dynamics use one")
    parser.add_argument("-o", "--output", type=Path, default=Path("sampling_efficiency.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mol = rf.load_system(options.system)
    mol = dataclasses.replace(mol, system=with_hydrogen_mass(mol.system, HYDROGEN_MASS))
    flow = rf.Flow.load(options.flow)
    proposal = rf.FlowProposal(flow, rf.OpenMMPotential(mol.system, "Reference"), mol.temperature)
    # A Langevin chain is looked at as often as it is worth: every picosecond.
    jobs = {"langevin": lambda: chain(mol, options.seconds, options.seed, md_steps=500)}
    for n in options.proposals:
        jobs[f"flow, {n} proposals"] = lambda n=n: chain(
            mol, options.seconds, options.seed, proposal, n, options.md_steps
        )
    for ladder in options.ladders:
        hottest, replicas, steps = (float(v) for v in ladder.split(":"))
        jobs[f"tempering {ladder}"] = lambda h=hottest, r=int(replicas), s=int(steps): tempering(
            mol, options.seconds, options.seed, h, r, s
        )
    results = {}
    for name, job in jobs.items():
        results[name] = job()
        print(f"{name}: {results[name]['per_second']:.4g} effective samples per second", flush=True)
    summary = {
        "flow": str(options.flow), "system": options.system, "seconds": options.seconds, "results": results,
        "break_even": break_even(flow, results), "milliseconds": rejected_move_overhead(mol, proposal),
        "versions": {"openmm_regflow": rf.__version__, "torch": torch.__version__}, "threads": options.threads,
    }  # fmt: skip
    write_json(options.output, summary)
    print("\n".join(table(results)))
    print(f"a rejected move costs {summary['milliseconds']['overhead']:.2f} ms beyond its flow and energies")
    if summary["break_even"]:
        print("training has paid for itself after [s]:", summary["break_even"])
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
