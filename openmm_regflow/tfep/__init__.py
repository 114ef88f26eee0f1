"""Targeted free energy perturbation (TFEP): from a map and samples of two states to a delta_f with an error
bar.

* arrays of works -> result: :func:`estimate` (BAR, MBAR, exponential averages), :func:`estimate_states`;
* positions, potentials and a map -> works -> result: :func:`free_energy_difference`, :func:`cross_fit`;
* two states described in a file -> result on disk: :func:`load_states`, :func:`run_states`;
* the state that dynamics of a System sample, constraints included: :func:`state_of`;
* states of an openmmtools sampler: :func:`state_from_storage`, MBAR over all of them: :func:`storage_reference`;
* no map, but a flow that covers both states: :func:`basin_free_energy`, :func:`through_prior`.
"""

from openmm_regflow.tfep.bennett import crooks_slope
from openmm_regflow.tfep.bridge import (
    FlowWorks,
    basin_free_energy,
    flow_works,
    states_through_flow,
    through_prior,
)
from openmm_regflow.tfep.compatibility import shared_bonds
from openmm_regflow.tfep.ensembles import ConstrainedEnergy, potential_of, state_of
from openmm_regflow.tfep.estimators import convergence, estimate
from openmm_regflow.tfep.learned import WorkLoss, fit_map
from openmm_regflow.tfep.multistate import MultistateFreeEnergy, estimate_states
from openmm_regflow.tfep.nearby import NearbyMap, WorkSpread, fit_nearby_map
from openmm_regflow.tfep.pipeline import (
    AffineMap,
    CoordinatesMap,
    IdentityMap,
    InvertibleMap,
    State,
    Works,
    cross_fit,
    free_energy_difference,
    mapped_energies,
    split,
    torsion_basin,
    works,
)
from openmm_regflow.tfep.results import TargetedFreeEnergy
from openmm_regflow.tfep.states import StatesConfig, load_states, run_states
from openmm_regflow.tfep.storage import state_from_storage, storage_reference

__all__ = [
    "AffineMap",
    "ConstrainedEnergy",
    "CoordinatesMap",
    "FlowWorks",
    "IdentityMap",
    "InvertibleMap",
    "MultistateFreeEnergy",
    "NearbyMap",
    "State",
    "StatesConfig",
    "TargetedFreeEnergy",
    "WorkLoss",
    "WorkSpread",
    "Works",
    "basin_free_energy",
    "convergence",
    "crooks_slope",
    "cross_fit",
    "estimate",
    "estimate_states",
    "fit_map",
    "fit_nearby_map",
    "flow_works",
    "free_energy_difference",
    "load_states",
    "mapped_energies",
    "potential_of",
    "run_states",
    "shared_bonds",
    "split",
    "state_from_storage",
    "state_of",
    "states_through_flow",
    "storage_reference",
    "through_prior",
    "torsion_basin",
    "works",
]
