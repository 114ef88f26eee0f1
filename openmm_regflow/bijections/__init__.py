"""Invertible maps with exact log-determinants: couplings with affine, spline and circular-spline transforms."""

from openmm_regflow.bijections.base import Bijection, Composition, Within
from openmm_regflow.bijections.couplings import AffineCoupling, Coupling, SplineCoupling, wrap
from openmm_regflow.bijections.splines import rational_quadratic, spline

__all__ = [
    "AffineCoupling",
    "Bijection",
    "Composition",
    "Coupling",
    "SplineCoupling",
    "Within",
    "rational_quadratic",
    "spline",
    "wrap",
]
