"""The only boundary between ``openmm.unit.Quantity`` and plain floats: nm, kJ/mol, ps, K, dalton.

Users may pass a Quantity or a plain number wherever a physical value is expected; everything inside the
package is a float or an array in the MD unit system named above.
"""

from typing import Any

import numpy as np
from openmm import unit

from openmm_regflow.errors import InputError

#: Molar gas constant [kJ/mol/K] (Boltzmann constant times Avogadro's number, exact in the 2019 SI).
GAS_CONSTANT = 8.31446261815324e-3
#: kcal/mol in kJ/mol (thermochemical calorie).
KJ_PER_KCAL = 4.184

#: [ps] With hydrogens of 4 dalton; a number above is one in fs.
LONGEST_STEP = 0.01

_UNITS = {
    "length": unit.nanometer,
    "energy": unit.kilojoule_per_mole,
    "time": unit.picosecond,
    "temperature": unit.kelvin,
    "mass": unit.dalton,
    "rate": unit.picosecond**-1,
}


def to_float(value: Any, kind: str) -> float:
    """A number in MD units.

    Args:
        value: a ``Quantity`` or a plain number already in MD units.
        kind: one of ``length`` [nm], ``energy`` [kJ/mol], ``time`` [ps], ``temperature`` [K],
            ``mass`` [dalton], ``rate`` [1/ps].

    Raises:
        InputError: the unit does not fit ``kind`` or the value is not finite.
    """
    if unit.is_quantity(value):
        if not value.unit.is_compatible(_UNITS[kind]):
            raise InputError(f"{value} is not a {kind}; give a Quantity of {kind} or a number in {_UNITS[kind]}")
        value = value.value_in_unit(_UNITS[kind])
    return finite_number(value, kind, str(_UNITS[kind]))


def finite_number(value: Any, what: str, units: str) -> float:
    """A number that is finite.

    Args:
        value: anything that may be one.
        what: it is, in words.
        units: that it is given in, in words.

    Raises:
        InputError: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{value!r} is not a number; {what} is given in {units}") from error
    if not np.isfinite(number):
        raise InputError(f"{what} is {number}; a finite number in {units} is needed")
    return number


def time_step(value: Any) -> float:
    """A time step of dynamics [ps] from a Quantity or a number.

    Raises:
        InputError: not above zero, or longer than bonds allow.
    """
    step = to_float(value, "time")
    if not 0 < step <= LONGEST_STEP:
        raise InputError(f"the time step is in ps, and {step:g} is no step that bonds allow; did you mean 0.002?")
    return step


def temperature_kelvin(value: Any) -> float:
    """A positive temperature [K] from a Quantity or a number.

    Raises:
        InputError: zero, negative or not finite.
    """
    kelvin = to_float(value, "temperature")
    if kelvin <= 0:
        raise InputError(f"temperature is {kelvin} K; it must be above zero")
    return kelvin


def thermal_energy(temperature: Any) -> float:
    """kT per mole [kJ/mol] at ``temperature`` [K or Quantity]."""
    return GAS_CONSTANT * temperature_kelvin(temperature)


def positions_nm(positions: Any) -> np.ndarray:
    """Positions as a float64 array [nm], shape ``(n_atoms, 3)`` or ``(n, n_atoms, 3)``.

    Args:
        positions: Quantity or array-like of that shape.

    Raises:
        InputError: the last axis is not 3.
    """
    if unit.is_quantity(positions):
        positions = positions.value_in_unit(unit.nanometer)
    array = np.asarray(positions, dtype=np.float64)
    if array.ndim not in (2, 3) or array.shape[-1] != 3:
        raise InputError(f"positions have shape {array.shape}; (n_atoms, 3) or (n, n_atoms, 3) in nm is needed")
    return array
