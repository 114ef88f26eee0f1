"""Flow steps in a plain ``openmm.app.Simulation``: no openmmtools, one object and a reporter.

    python examples/plain_openmm_loop.py [flow.safetensors] [iterations]

Writes ``flow_steps.csv`` (acceptance, log-weights, ESS so far) and ``plain_openmm_loop.dcd``.
"""

import sys

import openmm
from openmm import app, unit

import openmm_regflow as rf
from openmm_regflow.sampling import FlowReporter, FlowSimulation


def main(flow_path, n_iterations):
    mol = rf.load_system("alanine-dipeptide")
    integrator = openmm.LangevinMiddleIntegrator(
        mol.temperature * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtosecond
    )
    simulation = app.Simulation(mol.topology, mol.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(mol.positions)
    simulation.context.setVelocitiesToTemperature(mol.temperature)
    simulation.reporters.append(app.DCDReporter("plain_openmm_loop.dcd", 500))

    # What the flow adds to a script that was here before:
    proposal = rf.FlowProposal(rf.Flow.load(flow_path), rf.TorchPotential(mol.system), mol.temperature)
    mixed = FlowSimulation(simulation, proposal, n_proposals=32, pool_size=1024)
    simulation.reporters.append(FlowReporter("flow_steps.csv", 500, mixed))

    statistics = mixed.run(n_iterations, n_md_steps=500)
    print(f"accepted {statistics.n_accepted} of {statistics.n_proposed} flow steps")
    print(f"effective sample size of the proposals: {statistics.effective_sample_size:.3g} of 1")


if __name__ == "__main__":
    default = rf.load_system("alanine-dipeptide").folder / "flow.safetensors"
    arguments = dict(enumerate(sys.argv))
    main(arguments.get(1, default), int(arguments.get(2, 200)))
