"""OpenMM reference data: replica exchange (openmmtools', or batched), export to HDF5, an analysis with error bars."""

from openmm_regflow.simulate.analysis import (
    TemperingAnalysis,
    analyse,
    flattening_bias,
    mbar_weights,
    round_trips,
    torsion_bias,
    with_torsion_bias,
)
from openmm_regflow.simulate.batched import BatchedSettings, batched_tempering, load_batched, torsion_bias_system
from openmm_regflow.simulate.export import (
    analysis_record,
    checked_frames,
    export_hdf5,
    export_reference,
    load_runs,
    target_frames,
    thin,
)
from openmm_regflow.simulate.multistate import MultistateRun, load_multistate
from openmm_regflow.simulate.tempering import (
    RECORD,
    STORAGE,
    Progress,
    TemperingRun,
    TemperingSettings,
    load_run,
    no_progress,
    parallel_tempering,
    read_record,
    temperature_ladder,
    with_hydrogen_mass,
)

__all__ = [
    "RECORD",
    "STORAGE",
    "BatchedSettings",
    "MultistateRun",
    "Progress",
    "TemperingAnalysis",
    "TemperingRun",
    "TemperingSettings",
    "analyse",
    "analysis_record",
    "batched_tempering",
    "checked_frames",
    "export_hdf5",
    "export_reference",
    "flattening_bias",
    "load_batched",
    "load_multistate",
    "load_run",
    "load_runs",
    "mbar_weights",
    "no_progress",
    "parallel_tempering",
    "read_record",
    "round_trips",
    "target_frames",
    "temperature_ladder",
    "thin",
    "torsion_bias",
    "torsion_bias_system",
    "with_hydrogen_mass",
    "with_torsion_bias",
]
