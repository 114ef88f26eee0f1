"""A free energy difference with its error, and what to think of it in words."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import (
    LARGEST_SHARE,
    largest_share,
    pareto_k,
)
from openmm_regflow.units import KJ_PER_KCAL, temperature_kelvin, thermal_energy

#: Overlap below which BAR and MBAR are not to be trusted, and with care. For two states of as many samples it is twice
#: the element O_12, for which Klimovich, Shirts & Mobley 2015 give the limit 0.03; errors hold down to half of that.
OVERLAP_LIMIT, OVERLAP_CARE = 0.03, 0.1
#: Fewer independent samples than this on either side make any error bar meaningless; below the second, doubtful.
INDEPENDENT_LIMIT, INDEPENDENT_CARE = 20, 50


@dataclass(frozen=True)
class TargetedFreeEnergy:
    """A free energy difference, its error, and how far to believe both.

    Attributes:
        delta_f: f_B - f_A [kT].
        uncertainty: one standard error [kT]: the larger of pymbar's and the bootstrap's.
        method: estimator.
        overlap: of forward and reverse works, 0 to 1 (1 minus the second eigenvalue of the overlap matrix); None for
            one-sided estimators.
        ess: Kish fraction of exp(-w), the smaller of the sides used.
        n_forward: number of forward works.
        n_reverse: number of reverse works.
        n_independent: decorrelated samples on the (forward, reverse) side.
        pymbar_error: [kT] on decorrelated samples.
        bootstrap_error: [kT] by blocks over all samples.
        forward: delta_f by forward exponential averaging [kT], or None.
        reverse: delta_f by reverse exponential averaging [kT], or None.
        crooks_slope: slope of log p_F(w)/p_R(-w) against w with its error; exactly 1 for consistent works.
        verdict: in words; starts with ``reliable``, ``use with care``, ``do not trust`` or ``diagnostic only``.
        temperature: [K] of both states, for kJ/mol and kcal/mol; None where they differ, and where `delta_f` is that of
            ``F / kT`` alone.
        plain: the same estimate with the identity map; None where it has no overlap, or was not computed.
    """

    delta_f: float
    uncertainty: float
    method: str
    overlap: float | None
    ess: float
    n_forward: int
    n_reverse: int
    n_independent: tuple[float, float]
    pymbar_error: float
    bootstrap_error: float
    forward: float | None = None
    reverse: float | None = None
    crooks_slope: tuple[float, float] | None = None
    verdict: str = ""
    temperature: float | None = 300.0
    plain: "TargetedFreeEnergy | None" = field(default=None, repr=False)

    def in_units(self, unit: str) -> tuple[float, float]:
        """Value and standard error in ``kT``, ``kJ/mol`` or ``kcal/mol``.

        Raises:
            InputError: any other unit, or any but kT between states of two temperatures.
        """
        if self.temperature is None and unit != "kT":
            raise InputError(
                f"the states differ in temperature, so their f = F / kT do not differ by a free energy in {unit}; "
                'take "kT"'
            )
        kt = 1.0 if self.temperature is None else thermal_energy(self.temperature)
        factors = {"kT": 1.0, "kJ/mol": kt, "kcal/mol": kt / KJ_PER_KCAL}
        if unit not in factors:
            raise InputError(f"unit is {unit!r}; choose one of {', '.join(factors)}")
        return self.delta_f * factors[unit], self.uncertainty * factors[unit]

    def __str__(self) -> str:
        pairs = [(*self.in_units(u), u) for u in self._units]
        values = " = ".join(f"{value:.3f} ± {error:.3f} {u}" for value, error, u in pairs)
        where = "between two temperatures" if self.temperature is None else f"at {self.temperature:g} K"
        return f"delta_f = {values} {where} ({self.method}; {self.verdict})"

    @property
    def _units(self) -> tuple[str, ...]:
        return ("kT",) if self.temperature is None else ("kT", "kJ/mol", "kcal/mol")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON (infinite values become None)."""
        out = {k: _plain_value(getattr(self, k)) for k in self.__dataclass_fields__ if k != "plain"}
        out |= {name: [_plain_value(v) for v in self.in_units(name)] for name in self._units[1:]}
        out["plain"] = self.plain.to_dict() if self.plain is not None else None
        return out


def kelvin(temperature: Any) -> float | None:
    """A temperature [K] from a number or a Quantity; None, for states that differ in theirs, stays None."""
    return None if temperature is None else temperature_kelvin(temperature)


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_value(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def verdict_two_sided(result: TargetedFreeEnergy, dissipation: float) -> str:
    """Words for BAR and MBAR; ``dissipation`` is the z-score of mean w_F + mean w_R below zero."""
    overlap, independent = result.overlap or 0.0, min(result.n_independent)
    figures = f"overlap {overlap:.2g}, {independent:.0f} independent samples"
    if dissipation < -4:
        return (
            f"do not trust: the works break the second law (mean forward + mean reverse is {dissipation:.0f} standard "
            "errors below zero); check the sign of the works and of the log-determinants"
        )
    if result.crooks_slope is not None and abs(result.crooks_slope[0] - 1) > 5 * result.crooks_slope[1]:
        b, e = result.crooks_slope
        return (
            f"do not trust: forward and reverse works are inconsistent (Crooks slope {b:.2f} ± {e:.2f}, should be 1); "
            "check signs, log-determinants, equilibration, and that no sample trained the map"
        )
    if independent < INDEPENDENT_LIMIT:
        return f"do not trust: {figures}; run longer or give less correlated samples"
    if overlap < OVERLAP_LIMIT or not math.isfinite(result.uncertainty):
        return f"do not trust: {figures}; the map does not connect the states, train it further"
    if overlap < OVERLAP_CARE or independent < INDEPENDENT_CARE or result.uncertainty > 1.0:
        return f"use with care: {figures}"
    return f"reliable: {figures}"


def verdict_one_sided(result: TargetedFreeEnergy, works: np.ndarray, covered: bool = True) -> str:
    """Words for exponential averages: the tail of exp(-w) decides.

    Args:
        result: of which the works are.
        works: `(n,)` [kT].
        covered: the opposite works said how much of the other state is reached, or the samples reach all of it.
    """
    effective = result.ess * min(n for n in result.n_independent if n > 0)
    figures = f"ESS {100 * result.ess:.3g} %, {effective:.0f} effective samples"
    try:
        k_hat = pareto_k(-works)
        figures += f", k-hat {k_hat:.2f}"
    except InsufficientDataError:
        return f"do not trust: {figures}; too few finite works to judge the tail"
    if effective < INDEPENDENT_LIMIT or k_hat > 0.7:
        return f"do not trust: {figures}; one-sided averages of such works are biased, use BAR with both directions"
    if not covered and not np.isfinite(works).all():
        return (
            f"do not trust: {figures}; some samples leave the other state, and one direction cannot tell how much "
            "of it the others reach"
        )
    if not covered:
        return f"use with care: {figures}; one direction cannot tell whether all of the other state is reached"
    share = largest_share(-works)
    if share > LARGEST_SHARE:
        return (
            f"use with care: {figures}; one work holds {100 * share:.0f} % of the sum of squared weights, on "
            "which this error bar rests"
        )
    if effective < 100 or k_hat > 0.5:
        return f"use with care: {figures}"
    return f"reliable: {figures}"
