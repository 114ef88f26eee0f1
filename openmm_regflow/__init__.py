"""Normalizing flows trained by regression (RegFlow) as proposal generators for OpenMM.

Names are imported on first use: ``import openmm_regflow`` is quick and silent.
"""

from importlib import import_module
from typing import Any

from openmm_regflow._version import __version__

_NAMES = {
    "Flow": "flows",
    "FlowMixture": "mixtures",
    "FlowMove": "moves",
    "FlowProposal": "proposals",
    "OpenMMPotential": "potentials",
    "RegflowError": "errors",
    "TorchPotential": "potentials",
    "load_flow": "mixtures",
    "load_system": "systems",
}
_MODULES = (
    "allocation",
    "bijections",
    "check",
    "constraints",
    "coordinates",
    "errors",
    "evaluation",
    "fingerprints",
    "flows",
    "metrics",
    "mixtures",
    "moves",
    "networks",
    "objectives",
    "paper",
    "plots",
    "potentials",
    "priors",
    "proposals",
    "ranks",
    "recipes",
    "refinement",
    "report",
    "reweighting",
    "sampling",
    "simulate",
    "systems",
    "targets",
    "teachers",
    "tfep",
    "toys",
    "training",
    "units",
)

__all__ = ["__version__", *sorted(_NAMES), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"openmm_regflow.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"openmm_regflow.{name}")
    raise AttributeError(f"module 'openmm_regflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
