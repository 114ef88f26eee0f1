"""One rank of the job that `speed.processes` times: the dipeptide's spline, RegFlow steps of 1024 and refinement.

    torchrun --standalone --nproc-per-node 2 tests/benchmarks/ranks_job.py 15
"""

import json
import sys
import time

import torch
from speed.likelihoods import features

from openmm_regflow import flows, load_system, ranks
from openmm_regflow.ensemble import ReducedPotential
from openmm_regflow.objectives import RegFlowLoss
from openmm_regflow.refinement import RefineConfig, refine
from openmm_regflow.training import Batches, TrainConfig, train


def main() -> None:
    steps, skip = int(sys.argv[1]), 3
    torch.set_num_threads(1)
    torch.manual_seed(0)
    molecule = load_system("alanine-dipeptide")
    coordinates = flows.coordinates_for(molecule.topology, torch.as_tensor(molecule.reference("train")[:4096]))
    flow = flows.spline(coordinates, n_layers=8, hidden=128, depth=1)
    y = features(molecule, coordinates, 4096)
    frames = torch.as_tensor(molecule.reference("train")[:2048])
    stamps: list[float] = []
    pools: list[float] = []
    with ranks.job() as peers:
        config = TrainConfig(steps=steps + skip, batch_size=1024, checkpoint_every=10**6)
        loss = RegFlowLoss(flow.prior.circular, log_det=1e-3, forward_backward=1e-6)
        batches = Batches((flow.prior.sample(len(y), torch.Generator().manual_seed(1)), y), 1024)
        train(flow.bijection, loss, batches, config, progress=lambda *_: stamps.append(time.perf_counter()))
        records = refine(
            flow,
            ReducedPotential(molecule),
            RefineConfig(rounds=3, pool=16_384, anchors=len(frames)),
            data=frames,
            progress=lambda *_: pools.append(time.perf_counter()),
        )
        if any(record.undone for record in records):
            raise RuntimeError("a round that is undone is not trained on")
        if peers.main:
            rates = {"training": steps / (stamps[-1] - stamps[skip - 1]), "refinement": 2 / (pools[-1] - pools[-3])}
            print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    main()
