"""Energies and forces of any `openmm.System`, by OpenMM itself: one configuration at a time, on many workers.

Every worker (and this process) keeps its Contexts in a registry keyed by the SHA-256 of the exact System bytes
and the platform, so that a changed System can never meet an old Context. Energies are not cached at all.
"""

import copy
import hashlib
import os
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from numbers import Integral
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_regflow.device import openmm_properties
from openmm_regflow.device.choice import GPU_PLATFORMS
from openmm_regflow.errors import InputError
from openmm_regflow.potentials.base import LARGEST_COORDINATE, check_positions, parameter_value

_PROBE_SECONDS = 0.05
_CHUNKS_PER_WORKER = 4

#: Contexts that a process keeps; with more Systems times threads, the one that was used longest ago goes.
_MAX_CONTEXTS = 32
#: Contexts by process, thread and `_Engine.key`, the last used last. A Context holds one configuration at a time, so
#: threads cannot share one; and one that came along with a fork has lost its own threads, for which its end would wait.
_CONTEXTS: dict[tuple[int, int, str], openmm.Context] = {}
#: Fastest platform and its properties in this process, by the digest of the System.
_FASTEST: dict[tuple[str, frozenset[str]], tuple[str, dict[str, str]]] = {}


@dataclass(frozen=True)
class _Engine:
    """All that a worker needs to know to build a Context."""

    system: bytes  # compressed XML
    digest: str
    platform: str
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return "|".join([self.digest, self.platform, *map(str, sorted(self.properties.items()))])

    def context(self) -> openmm.Context:
        """The Context of this thread of this process, built on first use."""
        place = os.getpid(), threading.get_ident(), self.key
        context = _CONTEXTS.pop(place, None)
        if context is None:
            system = openmm.XmlSerializer.deserialize(zlib.decompress(self.system).decode())
            context = openmm.Context(
                system,
                openmm.VerletIntegrator(0.001),
                openmm.Platform.getPlatformByName(self.platform),
                self.properties,
            )
        _CONTEXTS[place] = context
        for old in _own_places()[:-_MAX_CONTEXTS]:
            _CONTEXTS.pop(old, None)
        return context


def _own_places() -> list[tuple[int, int, str]]:
    """Keys of this process's Contexts, the longest unused first."""
    return [place for place in list(_CONTEXTS) if place[0] == os.getpid()]


def _evaluate(
    engine: _Engine, x: np.ndarray, parameters: Mapping[str, float], groups: int, forces: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Energies `(n,)` and, on demand, forces `(n, n_atoms, 3)` of one chunk; +inf and zero forces on failure."""
    context = engine.context()
    for name, value in parameters.items():
        context.setParameter(name, value)
    virtual = any(map(context.getSystem().isVirtualSite, range(context.getSystem().getNumParticles())))
    energy = np.full(len(x), np.inf)
    force = np.zeros(x.shape) if forces else None
    for i in np.flatnonzero((np.abs(x) <= LARGEST_COORDINATE).all((1, 2))):
        try:
            context.setPositions(x[i])
            if virtual:
                context.computeVirtualSites()
            state = context.getState(getEnergy=True, getForces=forces, groups=groups)
        except openmm.OpenMMException as error:
            if "nan" not in str(error).lower():
                raise
            continue
        _store(state, int(i), energy, force)
    return energy, force


def _store(state: openmm.State, i: int, energy: np.ndarray, force: np.ndarray | None) -> None:
    """Copy one State into row ``i`` unless its energy or a force is not finite."""
    value = state.getPotentialEnergy()._value
    if not np.isfinite(value):
        return
    if force is not None:
        row = state.getForces(asNumpy=True)._value
        if not np.isfinite(row).all():
            return
        force[i] = row
    energy[i] = value


def platform_names() -> list[str]:
    """Names of the platforms that this OpenMM has, in its own order."""
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def small_platform(system: openmm.System) -> str | None:
    """Reference for small molecules, where it is the fastest, except for CustomGBForce; None for the others."""
    slow = any(isinstance(force, openmm.CustomGBForce) for force in system.getForces())
    return None if slow or system.getNumParticles() > 100 else "Reference"


def cpu_platform(system: openmm.System) -> str | None:
    """Platform for a System where no GPU is to be used; None: the faster one, and none of this OpenMM needs a GPU."""
    return small_platform(system) or "CPU" if set(platform_names()) & set(GPU_PLATFORMS) else None


def _candidates() -> list[tuple[str, dict[str, str]]]:
    """Platforms of this installation; the CPU platform also with one thread, which suits small molecules."""
    names = platform_names()
    choices: list[tuple[str, dict[str, str]]] = [(name, openmm_properties(name)) for name in names]
    return choices + ([("CPU", {"Threads": "1"})] if "CPU" in names else [])


def _property_names(platform: str) -> set[str]:
    return set(openmm.Platform.getPlatformByName(platform).getPropertyNames())


def _probe(engine: _Engine, x: np.ndarray) -> float:
    """Energies per second of an engine at one configuration; 0 where its platform does not work."""
    try:
        _evaluate(engine, x, {}, -1, False)
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _PROBE_SECONDS or done < 2:
            _evaluate(engine, x, {}, -1, False)
            done += 1
    except openmm.OpenMMException:
        return 0.0
    return done / elapsed


class OpenMMPotential:
    """Energies and forces of any System on any OpenMM platform, through the calls of `TorchPotential`.

    Args:
        system: the System; it is copied, later changes to it have no effect.
        platform: name of an OpenMM platform; by default the fastest one, found by a timed probe at the first
            evaluation, once per process and System.
        executor: a `concurrent.futures.Executor` that takes the chunks of a batch, or a number of processes
            (spawned here, and started anew if one dies); by default this process does the work.
        properties: platform properties, for example ``{"DeviceIndex": "1"}``; on a GPU mixed precision and torch's
            current device are the default.
        groups: force groups to include; all by default.

    Attributes:
        system: the copy of the System.
        n_atoms: its number of particles.
        constraints: its number of constraints, which play no part in the energy.
        sites: virtual sites among them.
        parameters: current values of the global parameters; see `set_parameter`.
        non_finite: number of configurations so far whose energy was not finite and came back as +inf.

    Raises:
        InputError: no platform of that name, a force group outside 0 to 31, or an executor that is none.
    """

    def __init__(
        self,
        system: openmm.System,
        platform: str | None = None,
        executor: Executor | int | None = None,
        properties: Mapping[str, str] | None = None,
        groups: Iterable[int] | None = None,
    ) -> None:
        xml = openmm.XmlSerializer.serialize(system)
        self.system = openmm.XmlSerializer.deserialize(xml)
        self._xml, self._digest = zlib.compress(xml.encode()), hashlib.sha256(xml.encode()).hexdigest()
        self.n_atoms, self.constraints = system.getNumParticles(), system.getNumConstraints()
        self.sites = [i for i in range(self.n_atoms) if system.isVirtualSite(i)]
        # Contexts are shared by potentials of equal Systems: every evaluation sets all parameters.
        self.parameters = context_parameters(self.system)
        self.non_finite = 0
        self._groups = -1 if groups is None else sum(1 << g for g in check_groups(groups))
        if not (executor is None or isinstance(executor, Executor | int)):
            raise InputError(
                f"executor is {executor!r}; give a concurrent.futures.Executor, a number of processes, or nothing"
            )
        self._properties = dict(properties or {})
        self._platform = self._check_platform(platform)
        self._executor = executor if isinstance(executor, Executor) else None
        self._processes = executor if isinstance(executor, int) else 0

    @staticmethod
    def _check_platform(name: str | None) -> str | None:
        available = [choice for choice, _ in _candidates()]
        if name is not None and name not in available:
            raise InputError(f"no OpenMM platform {name!r} here; available: {', '.join(dict.fromkeys(available))}")
        return name

    def on_platform(self, name: str) -> "OpenMMPotential":
        """The same energies (System, groups, parameters) on another platform, evaluated in this process.

        Raises:
            InputError: no platform of that name.
        """
        other = copy.copy(self)
        other._platform, other._properties = self._check_platform(name), {}
        other.parameters = dict(self.parameters)
        return other

    @property
    def options(self) -> dict[str, Any]:
        """Arguments beside the System, as plain values: what a file needs to build the same potential again.

        An executor of the caller's is not among them; a number of processes is.
        """
        groups = None if self._groups == -1 else [k for k in range(32) if self._groups >> k & 1]
        return {
            "platform": self._platform, "executor": self._processes or None,
            "properties": dict(self._properties), "groups": groups,
        }  # fmt: skip

    def set_parameter(self, name: str, value: Any) -> None:
        """Set a global parameter of the Contexts.

        Raises:
            InputError: no force of this System has a parameter of that name, or no finite value.
        """
        if name not in self.parameters:
            raise InputError(f"no global parameter {name!r}; this System has {sorted(self.parameters)}")
        self.parameters[name] = parameter_value(name, value)

    def __call__(self, x: Any) -> Tensor:
        """Potential energies ``(n,)`` [kJ/mol], float64 on the CPU; +inf where not finite.

        Args:
            x: `(n, n_atoms, 3)` positions [nm]: tensor, array or Quantity. Virtual sites are placed anew. A tensor
                that requires a gradient gets one, from the forces (first order only).

        Raises:
            InputError: the shape does not fit the System.
        """
        x = check_positions(x, self.n_atoms)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Energy.apply(x, self)
        return self._run(x, False)[0]

    def energy_and_forces(self, x: Any) -> tuple[Tensor, Tensor]:
        """Energies ``(n,)`` [kJ/mol] and forces ``(n, n_atoms, 3)`` [kJ/mol/nm]; zero forces where the energy is +inf.

        Args:
            x: `(n, n_atoms, 3)` positions [nm].

        Raises:
            InputError: the shape does not fit the System.
        """
        energy, forces = self._run(check_positions(x, self.n_atoms), True)
        return energy, forces

    def engine(self, x: np.ndarray) -> _Engine:
        """Platform and System, after the probe at the first of these configurations where none was named."""
        if self._platform is not None:
            properties = openmm_properties(self._platform) | self._properties
            return _Engine(self._xml, self._digest, self._platform, properties)
        asked = frozenset(self._properties)
        if (self._digest, asked) not in _FASTEST:
            finite = x[(np.abs(x) <= LARGEST_COORDINATE).all((1, 2))][:1]
            if not len(finite):  # nothing to time; any platform gives the same +inf, and the next batch is probed
                return _Engine(self._xml, self._digest, "Reference")
            choices = [choice for choice in _candidates() if asked <= _property_names(choice[0])]
            if not choices:
                raise InputError(f"no platform has the properties {sorted(asked)}; name the platform that they are of")
            engines = [_Engine(self._xml, self._digest, name, own | self._properties) for name, own in choices]
            rates = [_probe(engine, finite) for engine in engines]
            _FASTEST[self._digest, asked] = choices[int(np.argmax(rates))]
        platform, properties = _FASTEST[self._digest, asked]
        return _Engine(self._xml, self._digest, platform, properties | self._properties)

    def _run(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor]:
        array = x.detach().to("cpu", torch.float64).numpy()
        engine = self.engine(array)
        tasks = [(engine, part, dict(self.parameters), self._groups, forces) for part in self._chunks(array)]
        results = [_evaluate(*task) for task in tasks] if len(tasks) == 1 else self._dispatch(tasks)
        energy = torch.from_numpy(np.concatenate([result[0] for result in results]))
        self.non_finite += int(torch.isinf(energy).sum())
        force = np.concatenate([result[1] for result in results]) if forces else np.empty(0)
        return energy, torch.from_numpy(force)

    def _workers(self) -> int:
        if self._processes:
            return self._processes
        return 0 if self._executor is None else getattr(self._executor, "_max_workers", None) or 8

    def _chunks(self, x: np.ndarray) -> list[np.ndarray]:
        parts = min(max(1, len(x)), self._workers() * _CHUNKS_PER_WORKER)
        return np.array_split(x, max(1, parts))

    def _dispatch(self, tasks: list[tuple]) -> list[tuple]:
        """Run tasks on the executor; what is lost with a dead worker runs on a new pool, or else here."""
        results, lost = self._collect(tasks)
        if lost:
            warnings.warn(f"{len(lost)} of {len(tasks)} chunks were lost with a worker; evaluating again", stacklevel=4)
        if lost and self._processes:
            self.close()
            again, still = self._collect([tasks[k] for k in lost])
            results |= {lost[k]: value for k, value in again.items()}
            lost = [lost[k] for k in still]
        results |= {k: _evaluate(*tasks[k]) for k in lost}
        return [results[k] for k in range(len(tasks))]

    def _collect(self, tasks: list[tuple]) -> tuple[dict[int, tuple], list[int]]:
        """Results by number of task, and the numbers of those which a dead worker took along."""
        results, lost = {}, []
        futures: list[Future | None] = [self._submit(task) for task in tasks]
        for k, future in enumerate(futures):
            try:
                if future is None:
                    lost.append(k)
                else:
                    results[k] = future.result()
            except openmm.OpenMMException:
                raise
            except Exception:
                # Executors name the death of a worker differently (BrokenProcessPool, KilledWorker, MPI errors);
                # an error of the chunk itself returns when it is evaluated again in this process.
                lost.append(k)
        return results, lost

    def _submit(self, task: tuple) -> Future | None:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(self._processes, mp_context=get_context("spawn"))
        try:
            return self._executor.submit(_evaluate, *task)
        except RuntimeError:
            return None

    def close(self) -> None:
        """Stop the worker processes started here, and let go of this process's Contexts of the System.

        An executor passed in is left to its owner. A later evaluation starts anew.
        """
        for place in _own_places():
            if place[2].startswith(self._digest):
                _CONTEXTS.pop(place, None)
        if self._processes and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> "OpenMMPotential":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but Contexts and executor: a copy in another process works in that process."""
        state = {name: value for name, value in vars(self).items() if name not in ("system", "_executor")}
        return state | {"_processes": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._executor = None
        self.system = openmm.XmlSerializer.deserialize(zlib.decompress(self._xml).decode())


def context_parameters(system: openmm.System) -> dict[str, float]:
    """Global parameters of all forces and their defaults.

    Raises:
        InputError: two forces give one parameter different defaults, which no Context takes either.
    """
    found: dict[str, float] = {}
    for name, value in (own for force in system.getForces() for own in parameters_of(force)):
        if found.setdefault(name, value) != value:
            raise InputError(
                f"two forces give the global parameter {name!r} different defaults, {found[name]:g} and {value:g}; "
                "make them equal"
            )
    return found


def parameters_of(force: openmm.Force) -> list[tuple[str, float]]:
    """Names and defaults of the parameters by which a Context can change a force's energies.

    Those of the forces within a CustomCVForce or an ATMForce are the Context's, too.
    """
    found = []
    if hasattr(force, "getNumGlobalParameters"):
        count = range(force.getNumGlobalParameters())
        found = [(force.getGlobalParameterName(k), force.getGlobalParameterDefaultValue(k)) for k in count]
    elif hasattr(force, "getGlobalParameters"):  # PythonForce
        found = [(name, float(value)) for name, value in dict(force.getGlobalParameters()).items()]
    if isinstance(force, openmm.AmoebaVdwForce) and force.getAlchemicalMethod() in (force.Decouple, force.Annihilate):
        found.append((force.Lambda(), 1.0))
    inner: list[openmm.Force] = []
    if isinstance(force, openmm.CustomCVForce):
        inner = [force.getCollectiveVariable(k) for k in range(force.getNumCollectiveVariables())]
    elif isinstance(force, openmm.ATMForce):
        # As plain forces, which know no parameters; a copy has its own type again.
        inner = [openmm.XmlSerializer.clone(force.getForce(k)) for k in range(force.getNumForces())]
    return found + [own for one in inner for own in parameters_of(one)]


def check_groups(groups: Iterable[int]) -> frozenset[int]:
    """Force groups as a set.

    Raises:
        InputError: no collection of whole numbers, or a group outside 0 to 31.
    """
    given = list(groups) if isinstance(groups, Iterable) else [groups]
    if not isinstance(groups, Iterable) or not all(isinstance(g, Integral) for g in given):
        raise InputError(f"groups is {groups!r}; give the numbers of force groups, such as [0, 1]")
    chosen = frozenset(map(int, given))
    if wrong := sorted(g for g in chosen if not 0 <= g <= 31):
        raise InputError(f"force group {wrong[0]} is outside 0 to 31")
    return chosen


class _Energy(torch.autograd.Function):
    """Energies with a first derivative from the forces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, potential: OpenMMPotential) -> Tensor:
        energy, forces = potential._run(x, True)
        if len(potential.sites):  # placed anew from their atoms, which have their forces already
            forces[:, potential.sites] = 0.0
        ctx.save_for_backward(forces.to(x.device, x.dtype))
        return energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -grads[0].to(forces)[:, None, None] * forces, None
