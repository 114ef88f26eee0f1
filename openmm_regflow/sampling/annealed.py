"""Annealed importance sampling from a flow to its target: unbiased weights that are worth more than the flow's own.

Neal, Stat. Comput. 11, 125 (2001). With ``w(z)`` the importance weight of the flow's sample at the latent point z, the
bridge is ``pi_b(z) ~ prior(z) w(z)^b``: the flow itself at b = 0, the target at b = 1. Between two of its members every
sample takes one trajectory of Hamiltonian Monte Carlo in the latent space, where a good flow has made the target
nearly a standard normal (Hoffman et al. 2019, arXiv 1903.03704), and its log-weight grows by ``(b' - b) log w``. Labels
of interchangeable atoms, which the latent space leaves out, are drawn at the start and kept. The product of these
weights is unbiased for the ratio of normalisations whatever the trajectories do; steps are tuned on samples that are
thrown away.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_regflow import reweighting
from openmm_regflow.bijections import wrap
from openmm_regflow.errors import InputError
from openmm_regflow.mixtures import one_flow
from openmm_regflow.proposals import FlowProposal, ProposalBatch, chunk_sizes
from openmm_regflow.sampling.hamiltonian import correction, varied

#: Rounds of tuning, and samples of each.
TRIALS, PILOT = 8, 500


@dataclass(frozen=True)
class Annealed:
    """Samples with annealed weights.

    Attributes:
        batch: positions `(n, n_atoms, 3)` [nm] and ``u`` after the last trajectory; ``batch.log_weights`` are the
            annealed log-weights. ``batch.log_q`` is what makes them so and no density: of use in reweighting alone.
        log_weights_before: `(n,)` of the flow's own samples, where the trajectories began.
        energies: evaluations, the pilot's included; all but n of them with forces.
        acceptance: of every trajectory along the bridge.
        step: of the leapfrog, in latent units.
    """

    batch: ProposalBatch
    log_weights_before: Tensor
    energies: int
    acceptance: tuple[float, ...]
    step: float

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a printed table."""
        before, after = (
            100 * reweighting.effective_sample_size(w.cpu()) for w in (self.log_weights_before, self.batch.log_weights)
        )
        per_sample = self.energies / len(self.batch.u)
        return [
            ("ESS before and after annealing", f"{before:.3g} % and {after:.3g} %"),
            ("energies, and energies per effective sample", f"{self.energies:,}, {100 * per_sample / after:.3g}"),
            ("per effective sample without annealing", f"{100 / before:.3g}"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        before = reweighting.effective_sample_size(self.log_weights_before.cpu())
        keys = ("energies", "acceptance", "step")
        return {"ess_before": before} | {k: getattr(self, k) for k in keys}


def annealed_samples(
    proposal: FlowProposal,
    n: int,
    generator: torch.Generator | None = None,
    *,
    n_steps: int = 4,
    n_leapfrog: int = 5,
) -> Annealed:
    """Samples of the flow, carried to the target along ``n_steps`` intermediate densities.

    Args:
        proposal: a flow with a potential that has forces (``TorchPotential``, ``OpenMMPotential``).
        n: samples.
        generator: random state on the flow's device; None uses torch's global one.
        n_steps: intermediate densities, and trajectories of each sample; 0 gives plain importance sampling.
        n_leapfrog: leapfrog steps, and energies with forces, of each trajectory.

    Raises:
        InputError: numbers below their least, constraints, a subset of atoms, a mixture, or a potential without forces.
    """
    _check(proposal, n, n_steps, n_leapfrog)
    latent = _Latent(proposal, n_leapfrog)
    if n_steps:
        latent.tune(generator)
    parts, accepted = [], torch.zeros(n_steps)
    for size in chunk_sizes(n, proposal.chunk_size):
        state, log_w, log_w_before, rates = _carry(latent, size, n_steps, generator)
        parts.append((state.x, state.u, log_w, log_w_before))
        accepted += torch.tensor(rates) * size / n
    x, u, log_w, before = (torch.cat(column) for column in zip(*parts))
    u = torch.where(torch.isfinite(log_w), u, torch.inf)  # what begins without weight ends without
    log_q = torch.where(torch.isfinite(u), -u - log_w, 0.0)
    return Annealed(ProposalBatch(x, log_q, u), before, latent.energies, tuple(accepted.tolist()), latent.step)


def _check(proposal: FlowProposal, n: int, n_steps: int, n_leapfrog: int) -> None:
    if n < 1 or n_steps < 0 or n_leapfrog < 1:
        raise InputError(f"n = {n}, n_steps = {n_steps}, n_leapfrog = {n_leapfrog}; at least 1, 0 and 1 are needed")
    if proposal.constraints is not None or proposal.atom_subset is not None:
        raise InputError("annealing covers neither constraints nor a subset of atoms; use plain weights there")
    one_flow(proposal.flow, "annealing")
    if n_steps and not hasattr(proposal.potential, "energy_and_forces"):
        raise InputError("annealing needs forces; give the proposal a TorchPotential or an OpenMMPotential")


def _carry(
    latent: "_Latent", n: int, n_steps: int, generator: torch.Generator | None
) -> tuple["_State", Tensor, Tensor, list[float]]:
    """``n`` samples along the bridge: last state, log-weights `(n,)` of the path and of its start, acceptances."""
    state = latent.start(n, generator, forces=n_steps > 0)
    before, log_w, rates = state.log_w, torch.zeros_like(state.log_w), []
    share = 1.0 / (n_steps + 1)
    for k in range(1, n_steps + 1):
        log_w = log_w + share * state.log_w
        state, rate = latent.trajectory(state, k * share, generator)
        rates.append(rate)
    return state, log_w + share * state.log_w, before, rates


@dataclass
class _State:
    """Latent points `z` `(n, dim)` and what a trajectory needs: labels, `x` [nm], `u` [kT], `log_w`, gradients by z."""

    z: Tensor
    turns: Tensor
    x: Tensor
    u: Tensor
    log_w: Tensor
    log_prior: Tensor
    grad_log_w: Tensor
    grad_log_prior: Tensor

    def where(self, mine: Tensor, other: "_State") -> "_State":
        """Rows of this state where ``mine`` `(n,)`, else of the other."""
        pairs = [(getattr(self, k), getattr(other, k)) for k in self.__dataclass_fields__]
        return _State(*(torch.where(mine.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))

    def log_density(self, b: float) -> Tensor:
        """log of ``prior(z) w(z)^b`` `(n,)`."""
        return self.log_prior + b * self.log_w

    def gradient(self, b: float) -> Tensor:
        """Of `log_density`, `(n, dim)`."""
        return self.grad_log_prior + b * self.grad_log_w


class _Latent:
    """The target in the flow's latent space, and trajectories there."""

    def __init__(self, proposal: FlowProposal, n_leapfrog: int) -> None:
        self.proposal, self.flow, self.n_leapfrog = proposal, proposal.flow, n_leapfrog
        self.step, self.energies = 0.5 * self.flow.dim**-0.25, 0

    def start(self, n: int, generator: torch.Generator | None, forces: bool = True) -> _State:
        """``n`` samples of the flow, their labels drawn uniformly."""
        z = self.flow.prior.sample(n, generator, self.flow.dtype)
        return self.at(z, self.flow.coordinates.random_turns(n, generator).to(z.device), forces)

    def at(self, z: Tensor, turns: Tensor, forces: bool = True) -> _State:
        """Energies, weights and gradients of latent points `(n, dim)` with labels `(n, n_groups)`."""
        z = torch.where(self.flow.prior.circular, wrap(z), z).detach().requires_grad_(forces)
        with torch.set_grad_enabled(forces):
            log_prior = self.flow.prior.log_prob(z).double()
            y, log_det = self.flow.bijection(z)
            x, log_volume = self.flow.coordinates.to_positions(y.double())
            x = self.flow.coordinates.turned(x, turns)
            # log w = -u - log_q: what of it depends on z beside the energy
            rest = log_det.double() + log_volume - log_prior + self.proposal.frame_log_density(x)
        u, u_gradient = self._energies(x.detach(), forces)
        weighty = torch.isfinite(u) & torch.isfinite(rest.detach())
        log_w = torch.where(weighty, rest.detach() - u, -torch.inf)
        if not forces:
            zeros = torch.zeros_like(z)
            return _State(z, turns, x, u, log_w, log_prior, zeros, zeros)
        (by_prior,) = torch.autograd.grad(log_prior.sum(), z, retain_graph=True)
        (by_w,) = torch.autograd.grad([rest, x], z, [torch.ones_like(rest), -u_gradient.to(x)])
        by_w, by_prior = (torch.nan_to_num(g) for g in (by_w, by_prior))  # only of points without weight
        return _State(z.detach(), turns, x.detach(), u, log_w, log_prior.detach(), by_w, by_prior)

    def _energies(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor]:
        """Reduced energies `(n,)`, +inf where impossible, and their gradients `(n, n_atoms, 3)` [kT/nm]."""
        self.energies += len(x)
        if not forces:
            return self.proposal.reduced_potential(x), torch.zeros_like(x)
        there = torch.isfinite(x).flatten(1).all(1)
        safe = torch.where(there[:, None, None], x, x[there][:1] if bool(there.any()) else torch.zeros_like(x[:1]))
        energy, force = self.proposal.potential.energy_and_forces(safe)  # type: ignore[attr-defined]
        energy, force = (torch.as_tensor(t).to(x) / self.proposal.kT for t in (energy, force))
        u = self.proposal.without_absurd(torch.where(there, energy, torch.inf))
        fine = torch.isfinite(u) & torch.isfinite(force).flatten(1).all(1)
        return u, torch.where(fine[:, None, None], -force, 0.0)

    def trajectory(self, start: _State, b: float, generator: torch.Generator | None) -> tuple[_State, float]:
        """One trajectory and one decision for every sample, invariant for ``prior w^b``; and the part accepted."""
        device = generator.device if generator is not None else start.z.device
        v = torch.randn(start.z.shape, generator=generator, dtype=start.z.dtype, device=device).to(start.z)
        step = varied(self.step, generator, device)
        kinetic, now = 0.5 * v.double().square().sum(1), start
        for _ in range(self.n_leapfrog):
            v = v + 0.5 * step * now.gradient(b)
            now = self.at(now.z + step * v, now.turns)
            v = v + 0.5 * step * now.gradient(b)
        gain = now.log_density(b) - start.log_density(b) + kinetic - 0.5 * v.double().square().sum(1)
        threshold = torch.rand(len(v), generator=generator, dtype=torch.float64, device=device).to(gain.device).log()
        accepted = threshold < gain  # False where the end, or the gain, is not a number
        return now.where(accepted, start), float(accepted.double().mean())

    def tune(self, generator: torch.Generator | None) -> None:
        """Set the step for trajectories at the middle of the bridge, on samples that are thrown away."""
        state = self.start(PILOT, generator)
        for trial in range(TRIALS):
            state, rate = self.trajectory(state, 0.5, generator)
            self.step *= correction(rate, trial)
