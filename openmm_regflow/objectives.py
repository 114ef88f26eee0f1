"""Training losses: RegFlow with its regularisers, maximum likelihood, flow matching.

Every loss is a function of (module, batch, generator) that returns the scalar to minimise and its parts: `draw` adds
what is random to a batch, `of` is the loss of what was drawn. Several processes draw alike and take a slice each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openmm_regflow.bijections import Bijection, wrap
from openmm_regflow.priors import Prior
from openmm_regflow.teachers import VectorField, interpolate

#: What is expensive and adds little is computed for every so many samples of a batch.
QUARTER = 4
#: (module, batch, generator) -> loss and its parts; each loss says which kind of module it takes
Loss = Callable[[Any, tuple[Tensor, ...], torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class SplitLoss:
    """A loss whose random part is drawn for a whole batch before the batch is split.

    Attributes:
        every: a part of the loss takes every so-many-th row of a batch, and of each slice of it.
    """

    @property
    def every(self) -> int:
        """1 where all parts take all rows."""
        return 1

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """The batch with everything random in it; first axis of every tensor is the sample."""
        return batch

    def of(self, module: Any, drawn: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts of what `draw` returned, or of a slice of it: means over samples."""
        raise NotImplementedError

    def __call__(
        self, module: Any, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and its parts."""
        return self.of(module, self.draw(batch, generator))


def noisy(y: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """`y` with Gaussian noise of standard deviation `scale`; untouched, and nothing drawn, if that is zero."""
    if not scale:
        return y
    return y + scale * torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)


def wrapped_difference(a: Tensor, b: Tensor, circular: Tensor) -> Tensor:
    """``a - b`` `(n, dim)`, the shorter way round on circles."""
    return torch.where(circular, wrap(a - b), a - b)


@dataclass(frozen=True)
class RegFlowLoss(SplitLoss):
    """``E |f(z) - y|^2 + regularisers`` (arXiv 2506.01158, equation 5 and section 4.2), all of it per dimension.

    Attributes:
        circular: `(dim,)` bool.
        log_det: weight of ``(log|det J|)^2``; if the batch carries the teacher's log-determinant, of the squared
            difference to it.
        forward_backward: weight of ``|f^-1(f(z)) - z|^2``.
        target_noise: standard deviation of Gaussian noise added to the target.
    """

    circular: Tensor
    log_det: float = 0.0
    forward_backward: float = 0.0
    target_noise: float = 0.0

    @property
    def every(self) -> int:
        """That of the forward-backward regulariser."""
        return QUARTER if self.forward_backward else 1

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Target noise for a batch (z `(n, dim)`, y `(n, dim)`[, teacher's log-determinant `(n,)`])."""
        z, y = batch[:2]
        return (z, noisy(y, self.target_noise, generator), *batch[2:])

    def of(self, module: Bijection, drawn: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch as `draw` returns it."""
        z, y = drawn[:2]
        out, log_det = module(z)
        parts = {"regression": wrapped_difference(out, y, self.circular).square().mean()}
        if self.log_det:
            reference = drawn[2] if len(drawn) > 2 else 0.0
            parts["log_det"] = self.log_det * (log_det - reference).square().mean() / z.shape[1]
        if self.forward_backward:
            # On a quarter of the batch: the expectation is the same and the inverse costs as much as all the rest.
            back, _ = module.inverse(out[::QUARTER])
            error = wrapped_difference(back, z[::QUARTER], self.circular).square().mean()
            parts["forward_backward"] = self.forward_backward * error
        return torch.stack(list(parts.values())).sum(), parts


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, nothing is recorded for the parameters of a module: gradients by its arguments come at half the cost."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def score(module: Bijection, prior: Prior, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of a flow's log-density by the features; nothing is recorded for its parameters.

    Args:
        module: the flow's bijection.
        prior: of the latent.
        y: features `(n, dim)`.

    Returns:
        grad_y log q `(n, dim)`, log q `(n,)`, latents `(n, dim)`.
    """
    with torch.enable_grad(), frozen(module):
        y = y.detach().requires_grad_()
        z, log_det = module.inverse(y)
        log_q = prior.log_prob(z) + log_det
        (own,) = torch.autograd.grad(log_q.sum(), y)
    return own, log_q.detach(), z.detach()


def path_gradient(module: Bijection, prior: Prior, y: Tensor, slope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Path gradient of the forward KL.

    For samples y = f(z) of a target p, that of a flow's density q with parameters theta,

        -mean(w (grad_y log p - grad_y log q) . df(z)/dtheta),        z = f^-1(y) held fixed,

    has the expectation of ``-grad mean(w log q)``: it is the derivative of KL(p || q) as a divergence in the latent
    space less a term that is zero on average (Vaitl et al. 2022, arXiv 2207.08219, section 4). Where q equals p it
    vanishes sample by sample, and a sample says dim numbers instead of one, so that far fewer are needed and they are
    hardly learnt by heart. It compares slopes alone, which hardly moves mass between basins that few samples connect:
    so it is mixed with the plain gradient.

    Args:
        module: the flow's bijection f.
        prior: of the latent.
        y: features `(n, dim)`.
        slope: grad_y log p `(n, dim)`.
        weight: w `(n,)`.

    Returns:
        a number whose value says nothing and whose gradient is meant, and log q of the features `(n,)`.
    """
    own, log_q, z = score(module, prior, y)
    out, _ = module(z)
    return -(weight * ((slope - own) * out).sum(1)).mean(), log_q


def _mixed(value: Tensor, share: float, pull: Tensor, plain: Tensor | None) -> Tensor:
    """A loss with this value, and a gradient of which `share` is that of `pull` and the rest that of `plain`."""
    total = value + share * (pull - pull.detach())
    return total if plain is None else total + (1 - share) * (plain - plain.detach())


def rows_of_path(path: float) -> int:
    """Every so-many-th row of a batch has the plain gradient, beside a share of that of the path."""
    return QUARTER if 0 < path < 1 else 1


@dataclass(frozen=True)
class LikelihoodLoss(SplitLoss):
    """Negative log-likelihood of features, ``-E log q(y)``.

    Attributes:
        prior: of the latent.
        noise: standard deviation of Gaussian noise added to the features, in units of the whitened coordinate.
        path: share of `path_gradient`, from 0 to 1; above 0, a batch brings the slopes of log p, and the rest of the
            gradient comes from a quarter of it.
    """

    prior: Prior
    noise: float = 0.0
    path: float = 0.0

    @property
    def every(self) -> int:
        """That of the plain gradient beside that of the path."""
        return rows_of_path(self.path)

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise for a batch (y `(n, dim)`[, grad log p `(n, dim)`])."""
        return (noisy(batch[0], self.noise, generator), *batch[1:])

    def of(self, module: Bijection, drawn: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch as `draw` returns it."""
        y = drawn[0]
        if not self.path:
            nll = self._plain(module, y)
            return nll, {"nll": nll}
        pull, log_q = path_gradient(module, self.prior, y, drawn[1], torch.ones_like(y[:, 0]))
        plain = self._plain(module, y[::QUARTER]) if self.path < 1 else None
        return _mixed(-log_q.mean(), self.path, pull, plain), {"nll": -log_q.mean()}

    def _plain(self, module: Bijection, y: Tensor) -> Tensor:
        z, log_det = module.inverse(y)
        return -(self.prior.log_prob(z) + log_det).mean()


@dataclass(frozen=True)
class GeneralisedKLLoss(SplitLoss):
    """Forward KL of reweighted samples, ``E_p log(p/q) + (integral of q) - 1``, estimated on samples of an older q.

    For samples y of the density q0, with w = p/q0 normalised to mean one and r = q/q0,

        loss = mean(-w log r + r).

    The gradient is ``-mean((w - r) grad log q)``: where q already equals p it vanishes sample by sample, so a
    finite pool is not over-fitted, as it is by ``-mean(w log q)`` alone. (q is normalised, so the second term has
    the expectation one and acts as a control variate that stays valid when q has moved away from q0.)

    Attributes:
        prior: of the latent.
        path: share of `path_gradient`, from 0 to 1; above 0, a batch brings the slopes of log p, and the rest of the
            gradient comes from a quarter of it.
    """

    prior: Prior
    path: float = 0.0

    @property
    def every(self) -> int:
        """That of the plain gradient beside that of the path."""
        return rows_of_path(self.path)

    def of(self, module: Bijection, drawn: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (y `(n, dim)`, log q0 of the features `(n,)`, w `(n,)`[, grad log p `(n, dim)`])."""
        y, log_q0, w = drawn[:3]
        if not self.path:
            loss = self._plain(module, y, log_q0, w)
            return loss, {"kl": loss}
        pull, log_q = path_gradient(module, self.prior, y, drawn[3], w)
        plain = self._plain(module, *(t[::QUARTER] for t in drawn[:3])) if self.path < 1 else None
        value = self._divergence(log_q - log_q0, w)
        return _mixed(value, self.path, pull, plain), {"kl": value}

    def _plain(self, module: Bijection, y: Tensor, log_q0: Tensor, w: Tensor) -> Tensor:
        z, log_det = module.inverse(y)
        return self._divergence(self.prior.log_prob(z) + log_det - log_q0, w)

    @staticmethod
    def _divergence(log_r: Tensor, w: Tensor) -> Tensor:
        return (log_r.exp() - 1.0 - w * log_r).mean()


@dataclass(frozen=True)
class FlowMatchingLoss(SplitLoss):
    """Conditional flow matching with straight paths (arXiv 2210.02747, equation 23), per dimension.

    A batch is data alone, with paths from the prior, or samples of two ensembles, with paths from the first to the
    second (stochastic interpolants, arXiv 2209.15571).

    Attributes:
        prior: of the start points where a batch brings none, and of what is circular.
        couple: matches a batch of start points to the data (minibatch OT); None leaves them independent.
    """

    prior: Prior
    couple: Callable[[Tensor, Tensor], Tensor] | None = None

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Times, points and velocities of the paths to a batch (y `(n, dim)`,), or from x to y of a batch (x, y)."""
        y = batch[-1]
        if len(batch) == 1:
            z = self.prior.sample(y.shape[0], generator, y.dtype)
        else:  # paired anew each time: the rows of a batch belong together in no way
            z = batch[0][torch.randperm(len(y), generator=generator).to(y.device)]
        if self.couple is not None:
            z = self.couple(z, y)
        t = torch.rand(y.shape[0], generator=generator, dtype=y.dtype).to(y.device)
        return (t, *interpolate(z, y, t, self.prior.circular))

    def of(self, module: VectorField, drawn: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch as `draw` returns it."""
        t, point, velocity = drawn
        loss = (module(t, point) - velocity).square().mean()
        return loss, {"flow_matching": loss}


def describe(loss: Any) -> dict[str, Any]:
    """JSON-ready settings of a loss, for provenance and for checkpoints; of a plain function its name."""
    plain: dict[str, Any] = {}
    for key, value in vars(loss).items():
        if isinstance(value, int | float | str):
            plain[key] = value
        elif isinstance(value, Prior):
            plain[key] = value.kind
        elif callable(value):
            plain[key] = _name(value)
    return {"loss": _name(loss), **plain}


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", type(thing).__name__)
