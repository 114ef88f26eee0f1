"""From positions to a trained flow in one call: teacher, pairs, regression, likelihood phase, refinement.

The configuration is one TOML file; unknown keys are refused and every setting can be printed with what it means.
"""

from openmm_regflow.recipes.config import (
    FlowConfig,
    LikelihoodConfig,
    PairsConfig,
    RegressionConfig,
    RunConfig,
    TeacherConfig,
    check_config,
    needs_energies,
    needs_mover,
    with_seed,
)
from openmm_regflow.recipes.data import check_data, data_batches, features
from openmm_regflow.recipes.fitting import fit
from openmm_regflow.recipes.toml import load_config, print_config
from openmm_regflow.recipes.workspace import FitResult
from openmm_regflow.training import Stage

__all__ = [
    "FitResult",
    "FlowConfig",
    "LikelihoodConfig",
    "PairsConfig",
    "RegressionConfig",
    "RunConfig",
    "Stage",
    "TeacherConfig",
    "check_config",
    "check_data",
    "data_batches",
    "features",
    "fit",
    "load_config",
    "needs_energies",
    "needs_mover",
    "print_config",
    "with_seed",
]
