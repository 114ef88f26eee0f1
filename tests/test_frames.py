"""More frames of one ensemble: invariant on a molecule with known answers, kept on disk, refused elsewhere."""

import pytest
import torch
from analytic_molecules import MASSES, TEMPERATURE, Chain, z_scores

from openmm_regflow import frames, ranks
from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.frames import FramesConfig, frames_of_run, lifted, more_frames
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.sampling import HamiltonianMonteCarlo

SIGMAS = 4.5  # 1e-5 two-sided probability per figure
CHAIN = Chain(4)


def mover(scale=1.0):
    """Hamiltonian Monte Carlo at ``scale`` times the temperature: a wrong kernel unless it is one."""
    kernel = HamiltonianMonteCarlo(TorchPotential(CHAIN.system), scale * TEMPERATURE, MASSES, 0.02, 5)

    def move(x, generator):
        before = kernel.n_energies
        return kernel(x, generator), kernel.n_energies - before

    return move


def worst(frames, n):
    """Largest z-score over the last copies, which are independent of each other."""
    return max(abs(z) for z in z_scores(frames[-n:], CHAIN.observables()).values())


def test_copies_are_of_the_same_ensemble():
    x, n = CHAIN.sample(8000, torch.Generator().manual_seed(0)), 8000
    made, energies = more_frames(x, mover(), FramesConfig(copies=5, moves=2))
    assert torch.equal(made[:n], x) and len(made) == 5 * n
    assert energies == 4 * 2 * 6 * n
    assert worst(made, n) < SIGMAS
    assert worst(more_frames(x, mover(1.3), FramesConfig(copies=5, moves=2))[0], n) > 2 * SIGMAS  # planted


def test_copies_move_and_no_two_are_alike():
    x = CHAIN.sample(50, torch.Generator().manual_seed(1))
    made, _ = more_frames(x, mover(), FramesConfig(copies=3))
    assert len(torch.unique(made.flatten(1), dim=0)) > 100
    other, _ = more_frames(x, mover(), FramesConfig(copies=3, seed=1))
    assert not torch.equal(made, other)
    assert torch.equal(made, more_frames(x, mover(), FramesConfig(copies=3))[0])


def test_frames_are_kept_and_belong_to_their_trajectory(tmp_path):
    x = CHAIN.sample(20, torch.Generator().manual_seed(2))
    path = tmp_path / "frames.safetensors"
    made, energies = more_frames(x, mover(), FramesConfig(copies=2), path)

    def must_not_move(x, generator):
        raise AssertionError("frames that exist are read")

    again, same = more_frames(x, must_not_move, FramesConfig(copies=2), path)
    assert torch.equal(made, again) and same == energies
    for others, config in ((x + 1, FramesConfig(copies=2)), (x, FramesConfig(copies=3))):
        with pytest.raises(CorruptFileError, match="another trajectory, target or of other settings"):
            more_frames(others, mover(), config, path)
    path.unlink()
    more_frames(x, mover(), FramesConfig(copies=2), path, target={"temperature": TEMPERATURE})
    with pytest.raises(CorruptFileError, match="target"):
        more_frames(x, mover(), FramesConfig(copies=2), path, target={"temperature": 2 * TEMPERATURE})


@pytest.mark.parametrize(("stop", "seconds", "lost"), [(3, 0.0, 0), (7, 0.0, 0), (7, 1e9, 4), (3, 1e9, 6)])
def test_an_interruption_costs_no_copies(tmp_path, monkeypatch, stop, seconds, lost):
    """Two parts of the chains, of which the first is finished or not, go on as if nothing had been.

    A finished part is kept however little time it took, others after some seconds.
    """
    monkeypatch.setattr(frames, "KEEP_SECONDS", seconds)
    monkeypatch.setattr(ranks, "LEAST_ROWS", 10)
    x, path = CHAIN.sample(20, torch.Generator().manual_seed(2)), tmp_path / "frames.safetensors"
    config = FramesConfig(copies=6)
    whole, energies = more_frames(x, mover(), config)
    calls = 0

    def counted(x, generator):
        nonlocal calls
        calls += 1
        if calls > 2 * stop:
            raise KeyboardInterrupt
        return mover()(x, generator)

    with pytest.raises(KeyboardInterrupt):
        more_frames(x, counted, config, path)
    calls = -100
    again, same = more_frames(x, counted, config, path)
    assert torch.equal(again, whole) and same == energies
    assert calls == -100 + 20 - 2 * stop + lost
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_frames_of_a_run_are_those_of_its_target(tmp_path):
    x, path, target = CHAIN.sample(20, torch.Generator().manual_seed(1)), tmp_path / "a.safetensors", {"system": "a"}
    made, _ = more_frames(x, mover(), FramesConfig(copies=3), path, target=target)
    assert torch.equal(frames_of_run(path, target), made)
    with pytest.raises(InputError, match="another System"):
        frames_of_run(path, {"system": "b"})
    with pytest.raises(InputError, match="no frames"):
        frames_of_run(tmp_path / "nothing.safetensors", target)


def test_rare_conformations_get_their_share_and_the_rest_stays_as_it_was():
    """All rare frames, in their order; of the others a random part, so that within it nothing is more frequent."""
    x = torch.randn(40_000, 2, 3, generator=torch.Generator().manual_seed(3))

    def rare(x):
        return x[:, 0, 0] > 2.0  # 2.3 %

    def other(x):
        return x[:, 0, 1] > 2.5  # 0.6 %

    n = int((rare(x) | other(x)).sum())
    made = lifted(x, [rare, other], 0.2)
    kept = rare(made) | other(made)
    assert torch.equal(made[kept], x[rare(x) | other(x)]) and len(made) == pytest.approx(n / 0.2, abs=1)
    outside = made[~kept, 1, 2]
    assert abs(float(outside.mean())) < SIGMAS / len(outside) ** 0.5
    assert abs(float(outside.square().mean()) - 1) < SIGMAS * (2 / len(outside)) ** 0.5
    assert not torch.equal(lifted(x, [rare], 0.2), lifted(x, [rare], 0.2, seed=1))
    assert lifted(x, [rare], 0.0) is x
    with pytest.warns(RuntimeWarning, match="changes nothing: the watched sets hold 0.02"):
        assert lifted(x, [rare], 0.01) is x


@pytest.mark.parametrize("sets", [None, [], [lambda x: torch.zeros(len(x), dtype=torch.bool)]])
def test_a_share_of_no_conformations_is_refused(sets):
    with pytest.raises(InputError, match="rare_share"):
        lifted(torch.zeros(5, 2, 3), sets, 0.2)
