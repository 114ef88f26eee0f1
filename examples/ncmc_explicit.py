"""Alanine dipeptide in explicit water: a plain flow jump of the peptide, and one with nonequilibrium switching (NCMC).

    python examples/ncmc_explicit.py [--flow flow.safetensors] [--steps 2500] [--moves 40] [--plain 300]

The box is openmmtools' AlanineDipeptideExplicit (2269 atoms, AMBER ff96, TIP3P, PME) with hydrogens of 4 dalton and
a peptide without constraints. The flow is the shipped one, trained in implicit solvent with AMBER99SB-ILDN: for a
SubsetProposal that costs acceptance and nothing else. Atoms are matched by name, and the hydrogens of each methyl so
that they turn the same way round.

Printed are, for each kind of move, the number tried and accepted, the acceptance rate with the central 68 % of its
posterior under a uniform prior (binomial; its upper end is the bound where nothing was accepted), and quantiles of the
log acceptance ratio; for NCMC also what it is made of (mean and spread): the flow's densities, the work of the drives,
the shadow work of the integrator.
"""

import argparse
import itertools
import time

import numpy as np
import openmm
import torch
from openmm import unit
from openmmtools import cache, mcmc, states, testsystems
from scipy import stats

import openmm_regflow as rf
from openmm_regflow.moves import NCMCFlowMove
from openmm_regflow.proposals import SubsetProposal

METHYLS = [(("ACE", "H2"), ("ACE", "H3")), (("ALA", "HB2"), ("ALA", "HB3")), (("NME", "H2"), ("NME", "H3"))]
BACKBONE = [("ALA", "N"), ("ALA", "CA"), ("ALA", "C")]


def names(topology):
    """(residue, atom) of every atom."""
    return [(atom.residue.name, atom.name) for atom in topology.atoms()]


def matched_atoms(flow, molecule, box):
    """Atoms of the box in the flow's order, a methyl's hydrogens turning the way that the flow knows."""
    own, others = names(molecule.topology), names(box.topology)
    x = torch.as_tensor(box.positions.value_in_unit(unit.nanometer))
    candidates = []
    for swaps in itertools.product((False, True), repeat=len(METHYLS)):
        renamed = dict(pair for (a, b), swap in zip(METHYLS, swaps) if swap for pair in ((a, b), (b, a)))
        candidates.append([others.index(renamed.get(name, name)) for name in own])
    return max(candidates, key=lambda atoms: float(flow.log_prob(x[atoms][None])))


def log_ratio_of_move(move, apply):
    """The log acceptance ratio of one move of one proposal; -inf for an impossible proposal."""
    before = move.statistics
    apply()
    after = move.statistics
    impossible = after["n_impossible"] > before["n_impossible"]
    return -np.inf if impossible else after["sum_log_weight"] - before["sum_log_weight"]


def line(name, n, accepted, ratios, seconds):
    """One row of the table."""
    low, high = stats.beta(accepted + 1, n - accepted + 1).ppf([0.16, 0.84])
    low = 0.0 if accepted == 0 else low
    quantiles = "   ".join(f"{value:10.3g}" for value in np.quantile(ratios, [0.5, 1.0], method="nearest"))
    return (
        f"{name:24} {n:6d} {accepted:9d}   {accepted / n:8.4f} ({low:.4f} to {high:.4f})   {quantiles} {seconds:9.3g}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    molecule = rf.load_system("alanine-dipeptide")
    parser.add_argument("--flow", default=molecule.folder / "flow.safetensors")
    parser.add_argument("--steps", type=int, nargs="+", default=[2500], help="of a switch, 2 fs each")
    parser.add_argument("--moves", type=int, default=40, help="switches per length")
    parser.add_argument("--plain", type=int, default=300, help="plain flow moves")
    parser.add_argument("--equilibration", type=int, default=1000, help="Langevin steps before, 2 fs each")
    parser.add_argument("--between", type=int, default=50, help="Langevin steps before each move")
    parser.add_argument("--steps-per-drive", type=int, default=5, help="Langevin steps between two drives")
    parser.add_argument("--threads", default="1", help="of OpenMM's CPU platform")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    np.random.seed(options.seed)
    platform = openmm.Platform.getPlatformByName("CPU")
    platform.setPropertyDefaultValue("Threads", options.threads)
    cache.global_context_cache.platform = platform

    box = testsystems.AlanineDipeptideExplicit(
        constraints=None, hydrogenMass=4.0 * unit.dalton, nonbondedCutoff=0.8 * unit.nanometer, ewaldErrorTolerance=5e-4
    )
    flow = rf.Flow.load(options.flow)
    atoms = matched_atoms(flow, molecule, box)
    frame = [names(molecule.topology).index(name) for name in BACKBONE]
    proposal = SubsetProposal(
        flow, rf.OpenMMPotential(box.system, "CPU"), molecule.temperature, atoms, frame_atoms=frame
    )
    thermodynamic = states.ThermodynamicState(box.system, molecule.temperature * unit.kelvin)
    sampler = states.SamplerState(box.positions, box_vectors=box.system.getDefaultPeriodicBoxVectors())

    def dynamics(n_steps):
        langevin = mcmc.LangevinDynamicsMove(2.0 * unit.femtosecond, 5.0 / unit.picosecond, n_steps)
        langevin.apply(thermodynamic, sampler)

    mcmc.MCMCSampler(thermodynamic, sampler, mcmc.LangevinDynamicsMove()).minimize(max_iterations=30)
    dynamics(options.equilibration)
    print(f"{'move':24} {'tried':>6} {'accepted':>9}   rate                            log ratio: median, best  s/move")

    def report(name, move, ratio, n):
        began = time.process_time()
        ratios = np.array([ratio(move) for _ in range(n)])
        print(line(name, n, move.n_accepted, ratios, (time.process_time() - began) / n), flush=True)

    def ratio_after_dynamics(move):
        dynamics(options.between)
        return log_ratio_of_move(move, lambda: move.apply(thermodynamic, sampler))

    if options.plain:
        report("FlowMove", rf.FlowMove(proposal, seed=options.seed), ratio_after_dynamics, options.plain)
    for n_steps in options.steps:
        move = NCMCFlowMove(proposal, n_steps, steps_per_drive=options.steps_per_drive, seed=options.seed)
        works = []

        def recorded(move, works=works):
            ratio = ratio_after_dynamics(move)
            works.append(move.last_work)
            return ratio

        report(f"NCMC, {n_steps * 0.002:g} ps", move, recorded, options.moves)
        for name in works[0]:
            values = np.array([work[name] for work in works])
            print(f"    {name:9} {np.nanmean(values):7.1f} +- {np.nanstd(values):.1f} kT", flush=True)


if __name__ == "__main__":
    main()
