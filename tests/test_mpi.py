"""Replica exchange with flow moves over two MPI ranks, through openmmtools' mpiplus; run by ``mpirun`` as a program."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

N_RANKS, N_REPLICAS, N_ITERATIONS, N_MORE = 2, 3, 80, 10


def mpirun():
    """The launcher of this environment, else one on the path; None where there is no MPI for Python."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    return shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")


def launch(*arguments):
    """This file on all ranks. Open MPI alone reads the settings: more ranks than cores, and root in a container."""
    settings = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMP_NUM_THREADS": "1",
        # openmmtools' from_storage opens the file on every rank, to write on rank 0 while others may still be reading.
        "HDF5_USE_FILE_LOCKING": "FALSE",
    }
    command = [mpirun(), "-n", str(N_RANKS), sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(mpirun() is None, reason="needs mpi4py and mpirun")
def test_replica_exchange_over_two_ranks(tmp_path):
    """Sampled, stored and continued: every rank drew for its own replicas, and rank 0 wrote what all of them did."""
    import torch
    from test_exchange import TORSIONS
    from test_moves import make_flow
    from test_sampling import SIGMAS, chain_z

    make_flow().save(tmp_path / "flow.safetensors")
    launch("run", tmp_path)
    launch("continue", tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(N_RANKS)]
    for found in ranks:
        assert found["size"] == N_RANKS
        assert found["n_proposed"] == [N_ITERATIONS] * N_REPLICAS
        assert all(0 < n < N_ITERATIONS for n in found["n_accepted"])
    assert ranks[0]["n_accepted"] == ranks[1]["n_accepted"]
    assert ranks[0]["seed"] != ranks[1]["seed"]
    more = [json.loads((tmp_path / f"continued{rank}.json").read_text()) for rank in range(N_RANKS)]
    assert [found["n_proposed"] for found in more] == [[N_ITERATIONS + N_MORE] * N_REPLICAS] * N_RANKS
    cold = torch.as_tensor(np.load(tmp_path / "cold.npy"))
    assert len(cold) == N_ITERATIONS
    scores = chain_z(cold, TORSIONS)
    assert max(map(abs, scores.values())) < SIGMAS, scores


def rank():
    import mpiplus

    communicator = mpiplus.get_mpicomm()
    return communicator.rank, communicator.size


def flow_moves(sampler):
    return [move.move_list[1] for move in sampler.mcmc_moves]


def report(sampler, name, folder):
    """What this rank knows, as JSON."""
    from openmm_regflow.moves import registry

    (shared,) = registry._SHARED.values()
    found = {
        "size": rank()[1],
        "n_proposed": [move.n_proposed for move in flow_moves(sampler)],
        "n_accepted": [move.n_accepted for move in flow_moves(sampler)],
        "seed": shared.pool.generator.initial_seed(),
    }
    (folder / f"{name}{rank()[0]}.json").write_text(json.dumps(found))


def run(folder):
    """Replica exchange from scratch, the flow in every state, with one seed for all ranks."""
    from openmmtools.multistate import MultiStateReporter
    from test_exchange import dynamics
    from test_moves import MOLECULE, TEMPERATURE, generator, make_proposal

    from openmm_regflow.moves import FlowMove, learned_replica_exchange, temperature_ladder

    path = folder / "flow.safetensors"
    move = FlowMove(make_proposal(path), 2, pool_size=50, flow_path=path, seed=3)
    sampler = learned_replica_exchange(
        MOLECULE.system, temperature_ladder(TEMPERATURE, 450, N_REPLICAS), move,
        MOLECULE.sample(N_REPLICAS, generator()).numpy(),
        MultiStateReporter(str(folder / "run.nc"), checkpoint_interval=1),
        dynamics=dynamics(), number_of_iterations=N_ITERATIONS, online_analysis_interval=None,
    )  # fmt: skip
    sampler.run()
    report(sampler, "rank", folder)
    if rank()[0] == 0:
        np.save(folder / "cold.npy", cold_frames(folder))


def cold_frames(folder):
    """Frames of the coldest state [nm] as stored, the start left out."""
    from openmmtools.multistate import MultiStateReporter

    reporter, frames = MultiStateReporter(str(folder / "run.nc"), open_mode="r"), []
    for iteration in range(1, N_ITERATIONS + 1):
        replica = list(reporter.read_replica_thermodynamic_states(iteration)).index(0)
        frames.append(reporter.read_sampler_states(iteration)[replica].positions._value)
    return np.array(frames)


def continue_(folder):
    """A new job takes up the stored run."""
    from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

    sampler = ReplicaExchangeSampler.from_storage(MultiStateReporter(str(folder / "run.nc")))
    assert [move.n_proposed for move in flow_moves(sampler)] == [N_ITERATIONS] * N_REPLICAS
    sampler.extend(N_MORE)
    report(sampler, "continued", folder)


if __name__ == "__main__":
    import openmm
    from openmmtools import cache

    np.random.seed(rank()[0])
    cache.global_context_cache.platform = openmm.Platform.getPlatformByName("Reference")
    {"run": run, "continue": continue_}[sys.argv[1]](Path(sys.argv[2]))
