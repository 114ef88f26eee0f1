"""The training loop: learns, resumes bit for bit, rolls back, stops early, refuses bad data."""

import math

import pytest
import torch
from torch import nn

from openmm_regflow import ranks
from openmm_regflow.bijections import Composition
from openmm_regflow.errors import CorruptFileError, DivergenceError, IncompatibleFlowError, InputError
from openmm_regflow.frames import COPIES
from openmm_regflow.objectives import LikelihoodLoss, RegFlowLoss
from openmm_regflow.pools import LABELS, MOVES, SAMPLES
from openmm_regflow.priors import Prior
from openmm_regflow.training import Batches, TrainConfig, _Run, train


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


def test_stops_of_the_clock_are_no_validations_of_the_schedule(tmp_path):
    """Patience of four at a flat validation, every 20 steps: it ends at one step however often the clock stopped it."""
    ends = {}
    for budgets in ([None], [0.037, 0.06, None]):
        clock = iter(k / 1000 for k in range(10**6))  # a millisecond a look
        path = tmp_path / f"{len(budgets)}.safetensors"
        for seconds in budgets:
            changes = {"steps": 10_000, "patience": 4, "validate_every": 20, "seconds": seconds}
            config, module = CONFIG.model_copy(update=changes), network()
            history = train(
                module, loss, Batches(problem(), 32), config, validation=lambda m: 1.0, checkpoint=path,
                clock=lambda clock=clock: next(clock),
            )  # fmt: skip
        ends[len(budgets)] = (history.stopped, history.step[-1])
    assert ends[1] == ends[3] and ends[1][0] == "patience"


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


@pytest.mark.parametrize("at", [1, 5, 19, 20])
def test_an_explosion_is_seen_from_the_start(at):
    calls = iter(range(10_000))

    def jumps(module, batch, generator):
        value, parts = loss(module, batch, generator)
        return value * (5e4 if next(calls) == at else 1.0), parts

    with pytest.warns(UserWarning, match="went back to step 0"):
        history = train(network(), jumps, Batches(problem(), 32), CONFIG)
    assert history.rollbacks == 1 and max(history.loss) < 100


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


@pytest.mark.filterwarnings("ignore:the loss became")
def test_a_phase_that_only_harms_is_undone_even_if_it_was_rolled_back():
    """To the first step, before any checkpoint: what was judged there is still known."""
    calls = iter(range(10_000))

    def harms(module, batch, generator):
        value = -sum(p.square().sum() for p in module.parameters())
        return (value * math.nan if next(calls) == 15 else value), {}

    def judge(module):
        return sum(float(p.square().sum()) for p in module.parameters())

    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    settings = CONFIG.model_copy(update={"steps": 60, "validate_every": 10, "checkpoint_every": 1000})
    history = train(module, harms, Batches(problem(), 32), settings, validation=judge)
    assert history.rollbacks == 1 and history.validation_step[0] == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


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


def steps_of(run_, n):
    """Learning rates and weights of `n` steps."""
    rates, weights = [], []
    for _ in range(n):
        run_.advance()
        rates.append(run_.optimizer.param_groups[0]["lr"])
        weights.append([p.detach().clone() for p in run_.module.parameters()])
    return rates, weights


def test_warm_up_and_cosine():
    """Linear up to the full rate at the end of the warm-up, then half a cosine down to its final part."""
    settings = {"steps": 60, "warmup": 10, "learning_rate": 0.02, "final_rate": 0.1}
    config = TrainConfig(batch_size=32, **settings)
    rates, _ = steps_of(_Run(network(), loss, Batches(problem(), 32), config, None, None), 60)
    assert rates[:10] == pytest.approx([0.02 * (k + 1) / 10 for k in range(10)])
    cosine = [0.002 + 0.018 * 0.5 * (1 + math.cos(math.pi * k / 50)) for k in range(50)]
    assert rates[10:] == pytest.approx(cosine)


def test_weight_decay_shrinks_what_no_gradient_moves():
    """A loss without a gradient: AdamW (arXiv 1711.05101) multiplies every weight by 1 - rate x decay, no more."""

    def flat(module, batch, generator):
        value = 0.0 * sum(p.sum() for p in module.parameters())
        return value, {"flat": value}

    for decay in (0.0, 0.3):
        config = TrainConfig(steps=20, batch_size=32, warmup=5, learning_rate=0.05, weight_decay=decay)
        start = [p.detach().clone() for p in network().parameters()]
        rates, weights = steps_of(_Run(network(), flat, Batches(problem(), 32), config, None, None), 20)
        factor = math.prod(1 - rate * decay for rate in rates)
        assert (factor < 0.95) == (decay > 0)
        for before, after in zip(start, weights[-1]):
            torch.testing.assert_close(after, factor * before, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.999])
def test_averaged_weights(ema):
    """The exponential moving average of the weights after every step, with the early decay (1 + k) / (10 + k)."""
    config = CONFIG.model_copy(update={"ema": ema})
    run_ = _Run(network(), loss, Batches(problem(), 32), config, None, None)
    expected = [p.detach().clone() for p in network().parameters()]
    _, weights = steps_of(run_, 40)
    for k, now in enumerate(weights):
        decay = min(ema, (1 + k) / (10 + k))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now)]
    for ours, theirs in zip(run_.averaged.parameters(), expected):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    run_.finish()
    for ours, theirs in zip(run_.module.parameters(), expected):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.1, 1e9])
def test_gradients_are_clipped(clip):
    """The norm over all weights that the optimiser sees is `clip`, or what it was if that is less."""
    run_ = _Run(network(), loss, Batches(problem(), 32), CONFIG.model_copy(update={"clip": clip}), None, None)
    plain = network()
    generator = ranks.stream(CONFIG.seed, 0, 0)
    loss(plain, run_.batches(0, generator), generator)[0].backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters()))
    assert norm > 0.1
    run_.advance()
    seen = math.sqrt(sum(float(p.grad.square().sum()) for p in run_.module.parameters()))
    assert seen == pytest.approx(min(clip, norm), rel=1e-4)


def test_checkpoint_keeps_the_best_weights(tmp_path):
    """The best validation lies before the interruption, and everything after it is worse."""
    config = CONFIG.model_copy(update={"validate_every": 25})

    def judge(log):
        return lambda module: log.append(1) or abs(len(log) - 4.0)  # best at the fourth: step 75

    def kill(step, total, figures):
        if step == 175:
            raise Killed

    straight, _ = run(config, validation=judge([]))
    log = []
    with pytest.raises(Killed):
        run(config, validation=judge(log), checkpoint=tmp_path / "c.safetensors", progress=kill)
    del log[7:]  # the validations up to step 150, where the last checkpoint lies
    resumed, history = run(config, validation=judge(log), checkpoint=tmp_path / "c.safetensors")
    assert history.validation[3] == 0.0 and history.validation_step[3] == 75
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    last, _ = run(config)
    assert not all(torch.equal(a, b) for a, b in zip(last.parameters(), resumed.parameters()))


def test_checkpoint_of_another_loss_is_refused(tmp_path):
    """By its kind, by a weight of it, by its prior; the same loss goes on."""
    lines = torch.zeros(4, dtype=torch.bool)
    flow = Composition([])
    flow.shift = nn.Parameter(torch.zeros(4))
    x = problem()[0]
    config = TrainConfig(steps=5, batch_size=32)
    path = tmp_path / "c.safetensors"

    def go(some):
        train(flow, some, Batches((x, x), 32), config, checkpoint=path)

    class Shifted(RegFlowLoss):
        def of(self, module, drawn):
            total, parts = super().of(module, drawn)
            return total + module.shift.square().sum(), parts

    go(Shifted(lines, log_det=0.1))
    go(Shifted(lines, log_det=0.1))
    with pytest.raises(IncompatibleFlowError, match=r"another loss \(log_det\)"):
        go(Shifted(lines, log_det=0.2))
    with pytest.raises(IncompatibleFlowError, match=r"another loss \(.*loss"):
        go(LikelihoodLoss(Prior(lines)))
    with pytest.raises(IncompatibleFlowError, match="another loss"):
        go(loss)


def test_batches_cover_every_epoch_once():
    x = torch.arange(100.0)[:, None]
    batches = Batches((x,), 10, seed=3)
    epochs = [torch.cat([batches(10 * e + k, torch.Generator())[0] for k in range(10)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == x[:, 0].tolist()
    assert not torch.equal(*epochs)
    assert torch.equal(batches(3, torch.Generator())[0], Batches((x,), 10, seed=3)(3, torch.Generator())[0])


def test_streams_differ():
    of_training = [(s, k, p) for s in (0, 1) for k in (0, 1) for p in (0, 1)]
    of_pools = [(s, k, p, j) for s in (0, 1) for k in (0, 1) for p in (SAMPLES, MOVES, LABELS, COPIES) for j in (0, 1)]
    draws = {float(torch.rand(1, generator=ranks.stream(*numbers))) for numbers in of_training + of_pools}
    assert len(draws) == 8 + 32


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
