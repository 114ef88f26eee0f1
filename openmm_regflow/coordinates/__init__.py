"""Coordinate maps between positions and the vectors that flows work on, each with its exact measure."""

from openmm_regflow.coordinates.alignment import align, identical_atoms, rotated_squared_distances
from openmm_regflow.coordinates.base import CoordinateMap
from openmm_regflow.coordinates.cartesian import CartesianMap
from openmm_regflow.coordinates.internal import InternalMap
from openmm_regflow.coordinates.zmatrix import Rotor, ZMatrix, build_zmatrix, topology_tables

__all__ = [
    "CartesianMap",
    "CoordinateMap",
    "InternalMap",
    "Rotor",
    "ZMatrix",
    "align",
    "build_zmatrix",
    "identical_atoms",
    "rotated_squared_distances",
    "topology_tables",
]
