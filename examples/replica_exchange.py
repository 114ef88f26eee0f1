"""Learned replica exchange of alanine dipeptide: a flow in the coldest and the hottest state of a short ladder.

    python examples/replica_exchange.py [flow.safetensors] [iterations] [run.nc]

Run it again with the same storage file and it continues where it stopped. The storage holds the path and the hash of
the flow file, never its weights.
"""

import sys
from pathlib import Path

import openmm
from openmmtools import cache
from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

import openmm_regflow as rf
from openmm_regflow.moves import learned_replica_exchange, temperature_ladder


def main(flow_path, n_iterations, storage):
    cache.global_context_cache.platform = openmm.Platform.getPlatformByName("Reference")
    mol = rf.load_system("alanine-dipeptide")
    if Path(storage).exists():
        sampler = ReplicaExchangeSampler.from_storage(MultiStateReporter(storage, open_mode="r+"))
        sampler.extend(n_iterations)
    else:
        proposal = rf.FlowProposal(rf.Flow.load(flow_path), rf.TorchPotential(mol.system), mol.temperature)
        move = rf.FlowMove(proposal, n_proposals=32, flow_path=flow_path)
        ladder = temperature_ladder(mol.temperature, 600, n_atoms=len(mol.positions))
        sampler = learned_replica_exchange(
            mol.system,
            ladder,
            {0: move, -1: move},
            mol.positions,
            MultiStateReporter(storage, checkpoint_interval=10),
            number_of_iterations=n_iterations,
            online_analysis_interval=None,
        )
        sampler.run()
    for state, move in zip(sampler._thermodynamic_states, sampler.mcmc_moves):
        flow_moves = [m for m in getattr(move, "move_list", []) if isinstance(m, rf.FlowMove)]
        for m in flow_moves:
            ess = m.statistics["effective_sample_size"]
            print(f"{state.temperature}: accepted {m.n_accepted} of {m.n_proposed}, ESS of the flow {ess:.3g}")


if __name__ == "__main__":
    default = rf.load_system("alanine-dipeptide").folder / "flow.safetensors"
    arguments = dict(enumerate(sys.argv))
    main(arguments.get(1, default), int(arguments.get(2, 100)), arguments.get(3, "replica_exchange.nc"))
