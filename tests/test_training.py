"""The training loop: learns, resumes bit for bit, rolls back, stops early, refuses bad data."""

import math

import pytest
import torch
from torch import nn

from openmm_regflow.errors import CorruptFileError, DivergenceError, IncompatibleFlowError, InputError
from openmm_regflow.training import Batches, TrainConfig, _Run, step_generator, train


def problem(seed=0, n=256):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 1.0


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))


def loss(module, batch, generator):
    x, y = batch
    value = (module(x + 0.01 * torch.randn(x.shape, generator=generator)) - y).square().mean()
    return value, {"mse": value}


CONFIG = TrainConfig(steps=300, batch_size=32, learning_rate=1e-2, checkpoint_every=50, validate_every=20, warmup=10)


def run(config=CONFIG, **kwargs):
    module = network()
    history = train(module, loss, Batches(problem(), config.batch_size, config.seed), config, **kwargs)
    return module, history


def test_it_learns():
    _, history = run()
    assert history.loss[-1] < 0.02 * history.loss[0] and history.step[-1] == 300 and history.stopped == "steps"


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [60, 175, 299])
def test_resume_is_bit_for_bit(tmp_path, at):
    straight, full = run()

    def kill(step, total, figures):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint=tmp_path / "c.safetensors", progress=kill)
    resumed, history = run(checkpoint=tmp_path / "c.safetensors")
    assert history.loss == full.loss and history.step == full.step
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_a_finished_run_is_not_run_again(tmp_path):
    first, _ = run(checkpoint=tmp_path / "c.safetensors")
    steps = []
    second, _ = run(checkpoint=tmp_path / "c.safetensors", progress=lambda *a: steps.append(a))
    assert not steps and all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_checkpoint_of_other_settings_or_damaged(tmp_path):
    path = tmp_path / "c.safetensors"
    run(checkpoint=path)
    with pytest.raises(IncompatibleFlowError, match="learning_rate"):
        run(CONFIG.model_copy(update={"learning_rate": 1e-3}), checkpoint=path)
    with pytest.raises(IncompatibleFlowError, match="another network"):
        train(nn.Linear(4, 1), loss, Batches(problem(), 32), CONFIG, checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptFileError):
        run(checkpoint=path)


def test_early_stopping_keeps_the_best_weights():
    """Validation that only gets worse: the weights of the start come back."""
    module = network()
    before = [p.clone() for p in module.parameters()]
    count = iter(range(1000))
    config = CONFIG.model_copy(update={"patience": 3})
    history = train(module, loss, Batches(problem(), 32), config, validation=lambda m: float(next(count)))
    assert history.stopped == "patience" and history.step[-1] <= 80
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


def test_a_run_that_stopped_early_is_over(tmp_path):
    """Given again, it ends where it had ended; more seconds let it go on."""
    count = iter(range(1000))
    config = CONFIG.model_copy(update={"patience": 3})
    keywords = {"validation": lambda m: float(next(count)), "checkpoint": tmp_path / "a.safetensors"}
    first, before = run(config, **keywords)
    second, after = run(config, **keywords)
    assert before.to_dict() == after.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    short = CONFIG.model_copy(update={"steps": 10_000_000, "seconds": 0.3})
    _, before = run(short, checkpoint=tmp_path / "b.safetensors")
    _, after = run(short, checkpoint=tmp_path / "b.safetensors")
    assert after.seconds == before.seconds and after.stopped == "seconds"
    _, longer = run(short.model_copy(update={"seconds": 0.6}), checkpoint=tmp_path / "b.safetensors")
    assert longer.seconds >= 0.6 > before.seconds


def test_a_validation_that_is_not_a_number_says_nothing():
    values = iter([math.nan, 3.0, 1.0, 2.0, 2.0, 2.0, *[2.0] * 100])
    _, history = run(CONFIG.model_copy(update={"patience": 4}), validation=lambda m: next(values))
    assert history.stopped == "patience" and history.validation_step[-1] == 120  # four after the best, at 40


@pytest.mark.filterwarnings("ignore:the loss became")
def test_every_rollback_halves_the_rate_again():
    """Three in a row, all to the same snapshot."""
    rates, calls = [], iter(range(10_000))

    def explodes(module, batch, generator):
        value, parts = loss(module, batch, generator)
        rates.append(run_.optimizer.param_groups[0]["lr"])
        return (value * math.nan, parts) if next(calls) in (60, 61, 62) else (value, parts)

    settings = CONFIG.model_copy(update={"warmup": 0, "final_rate": 1.0})
    run_ = _Run(network(), explodes, Batches(problem(), 32), settings, None, None)
    while run_.step < 100:
        run_.advance()
    assert run_.history.rollbacks == 3
    assert rates[59] == pytest.approx(8 * rates[63]) and rates[-1] == pytest.approx(rates[63])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_an_explosion_is_seen_at_any_level(scale):
    """A loss of a thousandth that jumps to five is none that went from one to five thousand."""
    calls = iter(range(10_000))

    def jumps(module, batch, generator):
        value, parts = loss(module, batch, generator)
        return scale * value * (5e4 if next(calls) == 250 else 1.0), parts

    with pytest.warns(UserWarning, match="went back to step"):
        history = train(network(), jumps, Batches(problem(), 32), CONFIG)
    assert history.rollbacks == 1


@pytest.mark.filterwarnings("ignore:the loss became")
def test_divergence_rolls_back_and_then_gives_up():
    calls = iter(range(10_000))

    def explodes_once(module, batch, generator):
        value, parts = loss(module, batch, generator)
        return (value * math.nan, parts) if next(calls) == 120 else (value, parts)

    module = network()
    history = train(module, explodes_once, Batches(problem(), 32), CONFIG)
    assert history.rollbacks == 1 and history.loss[-1] < 0.05 * history.loss[0]

    def always(module, batch, generator):
        value, parts = loss(module, batch, generator)
        return value * math.inf, parts

    with pytest.raises(DivergenceError, match="lower learning_rate"):
        train(network(), always, Batches(problem(), 32), CONFIG)


def test_seconds_bound_the_run():
    _, history = run(CONFIG.model_copy(update={"steps": 10_000_000, "seconds": 0.3}))
    assert history.stopped == "seconds"


def test_schedule_follows_the_clock():
    """Ten million steps are far, and yet the last rate is the final one."""
    settings = {"steps": 10_000_000, "seconds": 0.5, "schedule": "seconds", "final_rate": 0.0}
    rates = []

    def watched(module, batch, generator):
        rates.append(run_.rate())
        return loss(module, batch, generator)

    run_ = _Run(network(), watched, Batches(problem(), 32), CONFIG.model_copy(update=settings), None, None)
    for k in range(31):
        run_.history.seconds = 0.5 * k / 30
        run_.advance()
    assert rates[15] == pytest.approx(CONFIG.learning_rate / 2) and rates[30] == pytest.approx(0.0, abs=1e-12)


def test_batches_cover_every_epoch_once():
    x = torch.arange(100.0)[:, None]
    batches = Batches((x,), 10, seed=3)
    epochs = [torch.cat([batches(10 * e + k, torch.Generator())[0] for k in range(10)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == x[:, 0].tolist()
    assert not torch.equal(*epochs)
    assert torch.equal(batches(3, torch.Generator())[0], Batches((x,), 10, seed=3)(3, torch.Generator())[0])


def test_step_generators_differ():
    draws = {float(torch.rand(1, generator=step_generator(s, k, p))) for s in (0, 1) for k in (0, 1) for p in (0, 1)}
    assert len(draws) == 8


def test_bad_data():
    x, y = problem()
    with pytest.raises(InputError, match="fewer than one batch"):
        Batches((x, y), 1000)
    with pytest.raises(InputError, match="lengths"):
        Batches((x, y[:5]), 4)
    x[7, 1] = math.nan
    with pytest.raises(InputError, match="sample 7"):
        Batches((x, y), 32)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="stepz"):
        TrainConfig(stepz=3)
    with pytest.raises(ValueError, match="needs seconds"):
        TrainConfig(schedule="seconds")
