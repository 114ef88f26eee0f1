"""Free energies through a flow: its own normalised density q as a bridge to every state.

A flow has a density q(x) that integrates to one, so it is a thermodynamic state of known free energy f_q = 0
and reduced potential -log q. Mapped works between q and a state S with reduced potential u are

    x ~ q:  w_F = u(x) + log q(x), or +inf outside S        x ~ S:  w_R = -log q(x) - u(x)

and Bennett's equation on both gives the absolute f_S = -log Z_S, whatever the shape of q. No map is left:
the flow's Jacobian is inside log q. Only differences of f_S between states in the same coordinates (one
measure) have a meaning.

**Measure.** For a flow over Cartesian coordinates exp(-u) does not normalise: pass ``u -
frame_log_density(x)``, and give held-out samples of a free molecule, which lie wherever their dynamics left them, the
flow's own distribution of place and orientation first (``FlowProposal.redraw_frame``).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Seed, as_generator, effective_sample_size, population_delta_f, to_numpy
from openmm_regflow.tfep.bennett import bar_overlap, bar_root, crooks_slope, exponential_average, one_sided
from openmm_regflow.tfep.estimators import estimate
from openmm_regflow.tfep.multistate import mbar_solution
from openmm_regflow.tfep.results import TargetedFreeEnergy, kelvin, verdict_one_sided, verdict_two_sided
from openmm_regflow.tfep.sides import CLIP, Side, bootstrap, make_side, most_inconsistent, second_law, spread


def _energies(log_q: Any, u: Any, name: str, may_be_infinite: bool) -> np.ndarray:
    """``u + log q`` as float64 `(n,)`, checked."""
    a, b = (to_numpy(v).astype(np.float64).ravel() for v in (log_q, u))
    if a.shape != b.shape:
        raise InputError(f"{name}: {a.size} values of log_q and {b.size} of u; give one of each per sample")
    # A flow sample outside the coordinates' domain has no position, so neither a density nor a finite energy.
    a = np.where(b == np.inf, 0.0, a)
    if not np.isfinite(a).all() or np.isnan(b).any() or (b == -np.inf).any():
        raise InputError(f"{name}: log_q must be finite and u neither NaN nor -inf; unusable samples have u = +inf")
    if not may_be_infinite and not np.isfinite(b).all():
        raise InputError(f"{name}: {int((~np.isfinite(b)).sum())} held-out energies are infinite; check the trajectory")
    return a + b


@dataclass(frozen=True)
class FlowWorks:
    """Works between a flow's own density and one state.

    Attributes:
        forward: `(n,)` ``u + log q`` on flow samples [kT]; +inf outside the state.
        reverse: `(m,)` ``-log q - u`` on held-out samples of the state [kT].
    """

    forward: np.ndarray
    reverse: np.ndarray


def flow_works(log_q: Any, u: Any, log_q_data: Any, u_data: Any, inside: Any | None = None) -> FlowWorks:
    """Works between a flow and a state.

    Args:
        log_q: `(n,)` log-density of flow samples.
        u: `(n,)` their reduced energy in the state, in the flow's measure [kT].
        log_q_data: `(m,)` log-density of held-out samples of the state, in order of time.
        u_data: `(m,)` their reduced energy [kT].
        inside: `(n,)` booleans: the flow sample lies in the state; None for a state that is the whole space.

    Raises:
        InputError: lengths differ, log_q not finite, a held-out energy not finite.
    """
    w_n = _energies(log_q, u, "flow samples", True)
    if inside is not None:
        inside = to_numpy(inside).astype(bool).ravel()
        if inside.shape != w_n.shape:
            raise InputError(f"{inside.size} basin indicators for {w_n.size} flow samples; give one per sample")
        w_n = np.where(inside, w_n, np.inf)
    return FlowWorks(w_n, -_energies(log_q_data, u_data, "held-out samples", False))


def through_prior(
    a: FlowWorks,
    b: FlowWorks,
    *,
    temperature: Any = 300.0,
    correlated: bool = True,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """delta_f of two states, each reached from its own Boltzmann generator.

    The absolute reduced free energies f_A and f_B follow from Bennett's equation between each state and its
    flow; independent flows give independent errors, added in quadrature. Both flows must use the same
    coordinates. For two basins under one flow use :func:`basin_free_energy`, which knows that its samples
    are shared.

    Args:
        a: works between state A and its flow, from :func:`flow_works`.
        b: works between state B and its flow.
        temperature: [K or Quantity] for printing; None if the states differ in theirs.
        correlated: held-out samples are in order of time.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.
    """
    rng = as_generator(generator)
    f_a, f_b = (
        estimate(s.forward, s.reverse, temperature=temperature, correlated=correlated, n_resamples=n_resamples,
                 generator=rng)
        for s in (a, b)
    )  # fmt: skip
    worse = min((f_a, f_b), key=lambda f: _rank(f.verdict))
    return replace(
        worse,
        delta_f=f_b.delta_f - f_a.delta_f,
        uncertainty=math.hypot(f_a.uncertainty, f_b.uncertainty),
        pymbar_error=math.hypot(f_a.pymbar_error, f_b.pymbar_error),
        bootstrap_error=math.hypot(f_a.bootstrap_error, f_b.bootstrap_error),
        forward=_difference(f_b.forward, f_a.forward),
        reverse=_difference(f_b.reverse, f_a.reverse),
        overlap=min(f_a.overlap or 0.0, f_b.overlap or 0.0),
        ess=min(f_a.ess, f_b.ess),
        method="bar through the prior",
    )


def _rank(verdict: str) -> int:
    return ["do not trust", "use with care", "reliable"].index(verdict.split(":")[0])


def _difference(x: float | None, y: float | None) -> float | None:
    return None if x is None or y is None else x - y


def states_through_flow(
    log_q: Any,
    u_a: Any,
    u_b: Any,
    *,
    temperature: Any = 300.0,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """delta_f of two states of one molecule from samples of one flow: no dynamics, one energy per sample and state.

    With the works w_S = u_S + log q, exp(-f_S) = E_q[exp(-w_S)] for any state S that the flow covers (Zwanzig 1954, the
    flow in the place of the sampled state). One sample serves both states, and what is common to both cancels: two
    temperatures or two force fields differ by much less than either differs from the flow.

    Nothing here can see a region that the flow does not reach. Compare with held-out samples (:func:`flow_works` and
    :func:`openmm_regflow.tfep.estimate`) where there are any.

    Args:
        log_q: `(n,)` log-density of independent flow samples.
        u_a: `(n,)` their reduced energy in A, in the flow's measure [kT]; +inf is legal.
        u_b: `(n,)` their reduced energy in B.
        temperature: [K or Quantity] for printing; None if the states differ in theirs.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.

    Returns:
        delta_f = f_B - f_A [kT]; the verdict and ``ess`` are those of the state that the flow fits less well. The
        asymptotic error is that of pymbar's MBAR over (q, A, B) with samples of q alone.

    Raises:
        InputError: lengths differ, log_q not finite.
        InsufficientDataError: no sample with a finite energy in one of the states.
    """
    w_a, w_b = (_energies(log_q, u, f"flow samples in {name}", True) for u, name in ((u_a, "A"), (u_b, "B")))
    f_a, f_b = exponential_average(w_a), exponential_average(w_b)
    # Energies relative to q and shifted by the free energies just found: every entry that matters is near 0.
    u_kn = np.stack([np.zeros_like(w_a), *(np.clip(w - f, -CLIP, 2 * CLIP) for w, f in ((w_a, f_a), (w_b, f_b)))])
    pymbar_error = float(mbar_solution(u_kn, np.array([w_a.size, 0, 0]))[1][1, 2])

    def difference(count_n: np.ndarray) -> float:
        return exponential_average(w_b, count_n) - exponential_average(w_a, count_n)

    error = spread(bootstrap(difference, [Side(w_a[None], 1.0)], n_resamples, generator))
    result = TargetedFreeEnergy(
        delta_f=f_b - f_a, uncertainty=max(pymbar_error, error), method="exp through the flow", overlap=None, ess=1.0,
        n_forward=w_a.size, n_reverse=0, n_independent=(float(w_a.size), 0.0), pymbar_error=pymbar_error,
        bootstrap_error=error, forward=f_b - f_a, temperature=kelvin(temperature), verdict="",
    )  # fmt: skip
    judged = [replace(result, ess=effective_sample_size(-w)) for w in (w_a, w_b)]
    judged = [replace(r, verdict=verdict_one_sided(r, w)) for r, w in zip(judged, (w_a, w_b))]
    return min(judged, key=lambda r: (_rank(r.verdict), r.ess))


def basin_free_energy(
    log_q: Any,
    u: Any,
    in_a: Any,
    in_b: Any,
    log_q_a: Any,
    u_a: Any,
    log_q_b: Any,
    u_b: Any,
    *,
    temperature: Any = 300.0,
    correlated: bool = True,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """delta_f of two disjoint basins of one potential through one flow.

    Derivation. Let A and B be disjoint sets, ``p_S = 1_S exp(-u) / Z_S`` the target restricted to S, and q
    the flow (normalised over everything, not over S). For any function h, the identity

        E_q[ h(x) 1_S(x) exp(-u(x)) ] = Z_S E_{p_S}[ h(x) q(x) ]

    holds because both sides are ``integral_S h q exp(-u)``. Bennett's optimal h for n_q flow samples and n_S
    basin samples, ``h = 1/(n_q q + n_S exp(f_S - u))``, turns it into BAR with ``f_q = 0``:

        sum_{flow samples in S} s(log(n_q/n_S) + w_F - f_S) = sum_{samples of S} s(log(n_S/n_q) + w_R + f_S),

    s the Fermi function. n_q counts *all* flow samples, also those outside S, which have w_F = +inf: leaving
    them out would estimate Z_S / q(S) instead of Z_S. Each E_{p_S} is a conditional mean, so the numbers n_A
    and n_B of held-out samples set the weights alone and their ratio does not enter delta_f = f_B - f_A: a
    trajectory that seldom visits B still gives an unbiased f_B. Three-state MBAR over (q, A, B) splits into
    these two equations, since no sample lies in both basins; it supplies the joint asymptotic error.

    The bare reverse average, log E_{p_S}[q exp(u)] = log(q(S) / Z_S), lacks log q(S); ``reverse`` adds it.

    Args:
        log_q: `(n,)` log-density of flow samples.
        u: `(n,)` their reduced energy in the flow's measure [kT]; +inf is legal.
        in_a: `(n,)` booleans, flow sample lies in A.
        in_b: `(n,)` booleans, flow sample lies in B.
        log_q_a: `(n_A,)` log-density of held-out samples of A, in order of time, which did not train the flow.
        u_a: `(n_A,)` their reduced energy [kT].
        log_q_b: `(n_B,)` log-density of held-out samples of B, likewise.
        u_b: `(n_B,)` their reduced energy [kT].
        temperature: [K or Quantity] for printing; None if the states differ in theirs.
        correlated: held-out samples are in order of time and may be correlated.
        n_resamples: joint bootstrap replicas (flow samples shared, held-out samples in blocks).
        generator: NumPy generator or seed.

    Returns:
        delta_f = f_B - f_A [kT]; ``forward`` is the importance-sampling estimate from flow samples alone.

    Raises:
        InputError: lengths differ, overlapping basins, bad values.
        InsufficientDataError: an empty basin, on either side.
    """
    in_a, in_b = (to_numpy(v).astype(bool).ravel() for v in (in_a, in_b))
    if in_a.shape == in_b.shape and (in_a & in_b).any():
        raise InputError(f"{int((in_a & in_b).sum())} flow samples lie in both basins; the basins must be disjoint")
    states = [flow_works(log_q, u, log_q_a, u_a, in_a), flow_works(log_q, u, log_q_b, u_b, in_b)]
    for state, name in zip(states, "AB"):
        counts = int(np.isfinite(state.forward).sum()), state.reverse.size
        if min(counts) < 2:
            raise InsufficientDataError(
                f"basin {name}: {counts[0]} flow samples of finite energy and {counts[1]} held-out samples; both "
                "need at least two: sample more, or train the flow on this basin"
            )
    return replace(
        _joint(states, in_a, in_b, correlated, n_resamples, generator), temperature=kelvin(temperature)
    )


def _joint(
    states: list[FlowWorks], in_a: np.ndarray, in_b: np.ndarray, correlated: bool, n_resamples: int, generator: Seed
) -> TargetedFreeEnergy:
    roots = [bar_root(s.forward, s.reverse) for s in states]
    flow = Side(states[0].forward[None], 1.0)
    data = [
        make_side(s.reverse[None], expit(-f - math.log(s.reverse.size / s.forward.size) - s.reverse)[None], correlated)
        for s, f in zip(states, roots)
    ]
    replicas = _joint_replicas(states, roots, flow, data, n_resamples, generator)
    error = _joint_error(states, roots, data), spread(replicas)
    overlaps = [bar_overlap(s.forward, s.reverse, f) for f, s in zip(roots, states)]
    log_w_n = -np.where(in_a, states[0].forward, states[1].forward)
    result = TargetedFreeEnergy(
        delta_f=roots[1] - roots[0], uncertainty=max(error), method="bar through the flow", overlap=min(overlaps),
        ess=effective_sample_size(log_w_n), n_forward=flow.n, n_reverse=sum(d.n for d in data),
        n_independent=(float(min(np.isfinite(s.forward).sum() for s in states)), min(d.n_independent for d in data)),
        pymbar_error=error[0], bootstrap_error=error[1], forward=population_delta_f(in_a, in_b, log_w_n).value,
        reverse=_reverse(states[1]) - _reverse(states[0]),
        crooks_slope=most_inconsistent([crooks_slope(s.forward, s.reverse, f, d.inefficiency)
                                        for s, f, d in zip(states, roots, data)]),
    )  # fmt: skip
    dissipation = min(second_law(Side(s.forward[None], 1.0), d) for s, d in zip(states, data))
    return replace(result, verdict=verdict_two_sided(result, dissipation))


def _reverse(state: FlowWorks) -> float:
    """f_S by the reverse average corrected for q(S)."""
    return -one_sided(state.reverse, state.forward)


def _joint_replicas(
    states: list[FlowWorks], roots: list[float], flow: Side, data: list[Side], n_resamples: int, generator: Seed
) -> np.ndarray:
    """Bootstrap replicas of delta_f: one resample of the flow serves both basins."""
    rng = as_generator(generator)
    replicas = np.full(n_resamples, np.nan)
    for i in range(n_resamples):
        shared = flow.counts(rng)
        try:
            f_a, f_b = (
                bar_root(s.forward, s.reverse, shared, d.counts(rng), start=f) for s, d, f in zip(states, data, roots)
            )
        except InsufficientDataError:
            continue
        replicas[i] = f_b - f_a
    return replicas


def _joint_error(states: list[FlowWorks], roots: list[float], data: list[Side]) -> float:
    """Asymptotic error of f_B - f_A by three-state MBAR on decorrelated held-out samples."""
    w_a, w_b = (d.decorrelated()[0] for d in data)
    n_k = np.array([states[0].forward.size, w_a.size, w_b.size])
    ends = np.cumsum(n_k)
    # Energies relative to q and shifted by the free energies just found: every entry that matters is near 0.
    u_kn = np.full((3, ends[2]), 2 * CLIP)
    u_kn[0] = 0.0
    u_kn[1, : ends[0]], u_kn[2, : ends[0]] = (np.clip(s.forward - f, -CLIP, 2 * CLIP) for s, f in zip(states, roots))
    u_kn[1, ends[0] : ends[1]] = np.clip(-w_a - roots[0], -CLIP, CLIP)
    u_kn[2, ends[1] :] = np.clip(-w_b - roots[1], -CLIP, CLIP)
    error = mbar_solution(u_kn, n_k)[1][1, 2]
    return float(error) if np.isfinite(error) else math.inf
