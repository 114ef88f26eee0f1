"""Temperatures of a replica exchange: how many, and how far apart."""

import math
from typing import Any

import numpy as np

from openmm_regflow.errors import InputError
from openmm_regflow.units import temperature_kelvin


def exchange_acceptance(ratio: float, heat_capacity: float) -> float:
    """Expected acceptance of swaps between temperatures ``T`` and ``ratio * T``.

    With a constant heat capacity C the energies at both temperatures are close to Gaussian with variance ``C (kT)^2``,
    so the log-ratio of a swap has variance ``s^2 = C (1 - 1/r)^2 (1 + r^2)`` and mean ``-s^2 / 2``; the mean of
    ``min(1, exp(.))`` is ``erfc(s / sqrt(8))`` (Kofke, J. Chem. Phys. 117, 6911 (2002)).

    Args:
        ratio: of neighbouring temperatures, above 1.
        heat_capacity: of the potential energy, in units of k.
    """
    spread = math.sqrt(heat_capacity * (1 - 1 / ratio) ** 2 * (1 + ratio**2))
    return math.erfc(spread / math.sqrt(8))


def temperature_ladder(
    minimum: Any,
    maximum: Any,
    n_states: int | None = None,
    *,
    n_atoms: int | None = None,
    heat_capacity: float | None = None,
    acceptance: float = 0.3,
) -> np.ndarray:
    """Geometric ladder of temperatures [K], the coldest first.

    Args:
        minimum: [K or Quantity].
        maximum: [K or Quantity].
        n_states: how many; by default the fewest whose neighbours should exchange with probability ``acceptance``.
        n_atoms: of a flexible molecule, whose heat capacity is taken as that of 3N - 6 harmonic modes.
        heat_capacity: of the potential energy in units of k, if known better: the variance of u at one temperature.
        acceptance: wanted probability of a swap.

    Raises:
        InputError: temperatures out of order, an acceptance outside (0, 1), or nothing to find the number from.
    """
    cold, hot = temperature_kelvin(minimum), temperature_kelvin(maximum)
    if hot <= cold:
        raise InputError(f"the ladder runs from {cold:g} to {hot:g} K; the maximum must be above the minimum: raise it")
    if n_states is None:
        n_states = _fewest(hot / cold, n_atoms, heat_capacity, acceptance)
    if n_states < 2 or n_states != int(n_states):
        raise InputError(f"a ladder of {n_states} states has no exchange; at least 2 are needed, a whole number")
    return np.geomspace(cold, hot, int(n_states))


def _fewest(span: float, n_atoms: int | None, heat_capacity: float | None, acceptance: float) -> int:
    """Fewest states over a total temperature ratio with at least the wanted acceptance."""
    if not 0 < acceptance < 1:
        raise InputError(f"acceptance is {acceptance}; choose a probability between 0 and 1")
    if heat_capacity is None:
        if n_atoms is None or n_atoms < 3:
            raise InputError("give n_states, or n_atoms (at least 3) or heat_capacity to find it from")
        heat_capacity = (3 * n_atoms - 6) / 2
    if not 0 < heat_capacity < math.inf:
        raise InputError(f"heat_capacity is {heat_capacity}; a positive one, in units of k, is needed")
    n_states = 2
    while exchange_acceptance(span ** (1 / (n_states - 1)), heat_capacity) < acceptance:
        n_states += 1
    return n_states
