"""A free energy difference from files: two states described in TOML, their trajectories, a result on disk.

.. code-block:: toml

    map = "learned"            # or "identity"
    folds = 5                  # cross-fitting of a learned map
    seed = 0

    [a]
    system = "alanine-dipeptide"          # a name, a folder with system.toml, or a PDB file
    trajectory = "left.h5"                # HDF5, DCD, NetCDF: positions in full precision
    temperature = 300.0                   # [K]
    basin = { torsion = [4, 6, 8, 10], range = [-180.0, 0.0] }      # [degrees], optional

    [b]
    system = "alanine-dipeptide"
    trajectory = "right.h5"
    temperature = 300.0
    basin = { torsion = [4, 6, 8, 10], range = [0.0, 180.0] }

Instead of ``trajectory`` a state may name one state of an openmmtools sampler (``storage = "exchange.nc"``,
``state = 3``), which brings its own System and temperature (``system`` is then needed for the topology, which a storage
lacks, and for nothing else), or be simulated in the output folder, resumably:
``simulate = { n_copies = 8, n_iterations = 200 }``, with the keys of
:class:`~openmm_regflow.simulate.BatchedSettings`; seeds are 0 and 1 unless given, and must differ. ``burn_in``
leaves out that many iterations of either, or frames of a trajectory.

Relative paths are taken from the folder of the TOML file. States may differ in system (force field, restraints),
temperature and basin; the atoms and their order, and the constraints, must be the same. A map keeps constrained
bonds at their length, and the metric term of constrained dynamics is included.
"""

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openmm_regflow import plots
from openmm_regflow.elements import symbol
from openmm_regflow.errors import InputError, InsufficientDataError, complaints
from openmm_regflow.files import read_toml, write_json
from openmm_regflow.flows import coordinates_for
from openmm_regflow.simulate import BatchedSettings, batched_tempering, load_runs
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.tfep.compatibility import shared_bonds
from openmm_regflow.tfep.ensembles import state_of
from openmm_regflow.tfep.estimators import convergence, estimate
from openmm_regflow.tfep.learned import fit_map
from openmm_regflow.tfep.nearby import TRAINING as NEARBY_TRAINING
from openmm_regflow.tfep.nearby import fit_nearby_map
from openmm_regflow.tfep.pipeline import (
    CoordinatesMap,
    IdentityMap,
    State,
    Works,
    common_temperature,
    cross_fit_works,
    result_of,
    torsion_basin,
    works,
)
from openmm_regflow.tfep.results import TargetedFreeEnergy
from openmm_regflow.tfep.storage import state_from_storage
from openmm_regflow.training import Stage, TrainConfig
from openmm_regflow.trajectories import check_box


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BasinConfig(_Section):
    """An arc of one torsion."""

    torsion: tuple[int, int, int, int] = Field(description="four atoms")
    range: tuple[float, float] = Field(description="(low, high] in degrees; high < low runs through 180")

    @model_validator(mode="after")
    def _four(self) -> "BasinConfig":
        if len(set(self.torsion)) < 4 or min(self.torsion) < 0:
            raise ValueError(f"torsion {list(self.torsion)} needs the indices of four different atoms")
        return self


class StateConfig(_Section):
    """One thermodynamic state and its samples."""

    system: str = Field(description="name, folder with system.toml, or PDB file; with a storage for its topology")
    trajectory: str | None = Field(None, description="HDF5, DCD or NetCDF file")
    storage: str | None = Field(None, description="NetCDF file of an openmmtools multistate sampler")
    state: int = Field(0, description="thermodynamic state in that file; negative counts from the last")
    simulate: dict[str, Any] | None = Field(None, description="settings of batched replica exchange")
    burn_in: int = Field(0, ge=0, description="iterations of a storage or a simulation, or frames, left out")
    temperature: float | None = Field(None, gt=0, description="[K]; the system's own by default")
    force_field: tuple[str, ...] | None = Field(None, description="overrides the system's own")
    system_xml: str | None = None
    basin: BasinConfig | None = None
    stride: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> "StateConfig":
        if sum(v is not None for v in (self.trajectory, self.storage, self.simulate)) != 1:
            raise ValueError("give one of trajectory, storage (of openmmtools) and simulate")
        if self.state and self.storage is None:
            raise ValueError("state is one of a storage, and there is none; leave it out")
        for name in ("force_field", "system_xml"):
            if self.storage is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} is of no effect beside storage, which brings its own System; leave it out")
        return self


class StatesConfig(_Section):
    """Both states and how to connect them."""

    a: StateConfig
    b: StateConfig
    map: Literal["identity", "learned", "nearby"] = Field(
        "learned", description="nearby: for states that resemble each other, such as two temperatures or force fields"
    )
    method: Literal["bar", "mbar", "exp", "exp_reverse", "cumulant"] = "bar"
    folds: int = Field(5, ge=2, description="cross-fitting folds of a learned map")
    gap: int = Field(0, ge=0, description="frames beside a held-out fold that train nothing")
    coordinates: Literal["internal", "cartesian"] = "internal"
    architecture: Literal["spline", "real_nvp", "res_nvp", "jet"] = "spline"
    coupling: Literal["torsional", "full", "aligned", "reflow"] = Field(
        "torsional", description="pairs that train the map"
    )
    max_pairs: int = Field(3000, ge=2)
    target_noise: float = Field(0.0, ge=0)
    refine: bool = Field(False, description="go on with the variational bound (differentiable potentials)")
    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({"steps": 2000, "batch_size": 256, "learning_rate": 2e-3})
    )
    n_resamples: int = Field(200, ge=2)
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _short_training(cls, values: Any) -> Any:
        """A nearby map has a training of its own, of which ``[train]`` may change a part."""
        if isinstance(values, dict) and values.get("map") == "nearby" and isinstance(values.get("train", {}), dict):
            return values | {"train": NEARBY_TRAINING | values.get("train", {})}
        return values

    @model_validator(mode="after")
    def _map_is_needed(self) -> "StatesConfig":
        learned = ("coupling", "architecture", "max_pairs", "target_noise", "refine")
        fitted = ("folds", "gap", "coordinates", "train")
        for name in (*(learned if self.map != "learned" else ()), *(fitted if self.map == "identity" else ())):
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                kinds = "'learned' or 'nearby'" if name in fitted else "'learned'"
                raise ValueError(f"{name} needs map = {kinds}; leave it out")
        return self

    @model_validator(mode="after")
    def _noise_of_their_own(self) -> "StatesConfig":
        """Runs with common random numbers stay together, and errors take the two sides as independent."""
        if self.a.simulate is not None and self.b.simulate is not None:
            seeds = [each.simulate.get("seed", k) for k, each in enumerate((self.a, self.b))]  # type: ignore[union-attr]
            if seeds[0] == seeds[1]:
                raise ValueError(f"a.simulate and b.simulate both have seed {seeds[0]}; give each one of its own")
        return self


def load_states(path: str | Path) -> StatesConfig:
    """Read the TOML description of two states.

    Raises:
        InputError: no such file, bad TOML, an unknown key or a value out of range, each named.
    """
    try:
        return StatesConfig.model_validate(read_toml(path))
    except OSError as error:
        raise InputError(
            f"states file {path} cannot be read: {error.strerror}; give the path of a TOML file"
        ) from error
    except ValidationError as error:
        sections: dict[str, type[BaseModel]] = {"a": StateConfig, "b": StateConfig, "train": TrainConfig}
        sections |= {"a.basin": BasinConfig, "b.basin": BasinConfig, "": StatesConfig}
        wrong = dict.fromkeys(".".join(map(str, e["loc"][:-1])) for e in error.errors() if "extra" in e["type"])
        known = [(name, ", ".join(sections[name].model_fields)) for name in wrong if name in sections]
        words = "; ".join(keys if len(known) == 1 else f"{keys} ({name or 'file'})" for name, keys in known)
        words = f"; known keys: {words}" if known else ""
        raise InputError(f"{path}: {complaints(error, 'file')}{words}") from error


def open_state(
    config: StateConfig, folder: Path, run_folder: Path, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[State, np.ndarray, MolecularSystem]:
    """The state, its samples inside the basin `(n, n_atoms, 3)` [nm], and its molecule.

    Args:
        config: the state.
        folder: that relative paths start from.
        run_folder: for the state's own simulation, if it asks for one.
        device: of the energies, and of that simulation unless its settings name one.
        seed: of that simulation, likewise.

    Raises:
        InputError: missing or unfitting files or settings.
        InsufficientDataError: fewer than two frames lie in the basin.
    """
    local = folder / config.system
    molecule = load_system(
        local if local.exists() else config.system,
        force_field=config.force_field,
        system_xml=None if config.system_xml is None else folder / config.system_xml,
        temperature=config.temperature,
    )
    defaults = {"device": str(device), "seed": seed}
    state, x = _source(config, folder, run_folder, molecule, defaults)
    if config.basin is not None:
        low, high = np.radians(config.basin.range)
        basin = torsion_basin(config.basin.torsion, (float(low), float(high)))
        n, x = len(x), x[np.asarray(basin(x))]
        place = config.trajectory or config.storage or run_folder
        if len(x) < 2:
            raise InsufficientDataError(f"{len(x)} frames of {place} lie in the basin {config.basin.range}")
        if 2 * len(x) < n:
            warnings.warn(
                f"{n - len(x)} of {n} frames of {place} lie outside the basin {config.basin.range} of the torsion "
                f"{config.basin.torsion} and are left out; unless they are of other basins, check the torsion against "
                "load_system(...).torsions('phi') or the topology, and the range",
                stacklevel=2,
            )
        state = replace(state, basin=basin)
    return state, x, molecule


def _source(
    config: StateConfig, folder: Path, run_folder: Path, molecule: MolecularSystem, defaults: dict[str, Any]
) -> tuple[State, np.ndarray]:
    """The state without its basin, and its frames, from whichever source the file names."""
    device = defaults["device"]
    if config.storage is not None:
        state, x = state_from_storage(
            folder / config.storage, config.state, burn_in=config.burn_in, stride=config.stride, device=device
        )
        if x.shape[1] != molecule.n_atoms:
            raise InputError(f"{config.storage} holds {x.shape[1]} atoms, {config.system} has {molecule.n_atoms}")
        if config.temperature not in (None, state.temperature):
            raise InputError(
                f"state {config.state} of {config.storage} is at {state.temperature} K, the file says "
                f"{config.temperature} K; leave temperature out"
            )
        return state, x
    state = state_of(molecule.system, molecule.temperature, device=device)
    if config.simulate is None:
        frames = molecule.load_trajectory(folder / str(config.trajectory), stride=config.stride)
        check_box(folder / str(config.trajectory), molecule.topology, molecule.system)
        return state, frames[math.ceil(config.burn_in / config.stride) :]
    batched_tempering(molecule, run_folder, BatchedSettings.create(**defaults | config.simulate))
    ladders = load_runs(run_folder, config.burn_in)
    return state, np.concatenate([run.at_temperature(run.positions)[:: config.stride] for run in ladders])


def run_states(
    config: StatesConfig,
    folder: str | Path,
    output: str | Path,
    device: torch.device | str = "cpu",
    stage: Stage | None = None,
) -> TargetedFreeEnergy:
    """Compute the free energy difference that a states file describes and write it.

    Args:
        config: from :func:`load_states`.
        folder: that relative paths start from.
        output: folder for ``tfep.json``, ``works.npz``, ``works.png`` and ``convergence.png``, and for the runs of
            states that are simulated.
        device: of energies, simulations and the training of a map.
        stage: makes the progress callback of the folds in which a map is fitted.

    Returns:
        The result; unless the map is the identity, plain perturbation on the same samples is ``.plain`` (None where it
        has no overlap).

    Raises:
        InputError: bad files, or molecules that differ.
        InsufficientDataError: too few samples, or no overlap.
    """
    folder, output = Path(folder), Path(output)
    (state_a, x_a, molecule), (state_b, x_b, other) = (
        open_state(c, folder, output / f"run-{name}", device, seed)
        for seed, (name, c) in enumerate((("a", config.a), ("b", config.b)))
    )
    names = [[symbol(atom) for atom in m.topology.atoms()] for m in (molecule, other)]
    if names[0] != names[1]:
        raise InputError(
            f"{config.a.system} and {config.b.system} differ in their atoms; both states need one molecule"
        )
    a, b = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (x_a, x_b))
    result, mapped = _solve(config, molecule, state_a, state_b, a, b, stage)
    output.mkdir(parents=True, exist_ok=True)
    record = {"result": result.to_dict(), "settings": config.model_dump(mode="json")}
    write_json(output / "tfep.json", record)
    np.savez(output / "works.npz", forward=mapped.forward, reverse=mapped.reverse)
    if math.isfinite(result.uncertainty) and np.isfinite(mapped.forward).any() and np.isfinite(mapped.reverse).any():
        plots.save(plots.work_distributions(mapped.forward, mapped.reverse, result.delta_f), output / "works.png")
        plots.save(plots.convergence(convergence(mapped.forward, mapped.reverse)), output / "convergence.png")
    return result


def _solve(
    config: StatesConfig,
    molecule: MolecularSystem,
    state_a: State,
    state_b: State,
    x_a: torch.Tensor,
    x_b: torch.Tensor,
    stage: Stage | None = None,
) -> tuple[TargetedFreeEnergy, Works]:
    fixed, training = shared_bonds(state_a, state_b), config.train.model_copy(update={"seed": config.seed})
    options: dict[str, Any] = {"method": config.method, "n_resamples": config.n_resamples, "generator": config.seed}
    if config.map == "identity":
        same = works(IdentityMap(), state_a, state_b, x_a, x_b)
        return estimate(same.forward, same.reverse, temperature=common_temperature(state_a, state_b), **options), same

    progress, begun = stage("folds", config.folds) if stage else None, itertools.count()

    def fit(a: torch.Tensor, b: torch.Tensor) -> CoordinatesMap:
        if progress:
            progress(next(begun), config.folds, {})
        coordinates = coordinates_for(molecule.topology, torch.cat([a, b]).cpu(), config.coordinates, fixed)
        coordinates = coordinates.to(a.device)
        if config.map == "nearby":
            return fit_nearby_map(coordinates, a, b, (state_a, state_b), config=training)
        return fit_map(
            coordinates, a, b, coupling=config.coupling, architecture=config.architecture,
            max_pairs=config.max_pairs, config=training, target_noise=config.target_noise,
            refine=(state_a, state_b) if config.refine else None,
        )  # fmt: skip

    mapped = cross_fit_works(fit, state_a, state_b, x_a, x_b, folds=config.folds, gap=config.gap)
    if progress:
        progress(config.folds, config.folds, {})
    return result_of(mapped, state_a, state_b, x_a, x_b, **options), mapped
