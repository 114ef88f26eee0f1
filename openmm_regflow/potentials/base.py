"""What every potential shares: the protocol, checks of the input, and batched linear maps between atoms and terms.

Inside the torch potential every coordinate is an array ``(n_blocks, n_atoms, lanes)``: one row per atom,
configurations side by side in the last, contiguous axis. Gathers and sums then move whole rows, and a compiler
vectorises over the lanes without looking at the indices. A vector is a tuple of three such arrays.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_regflow.errors import InputError, UnsupportedForceError
from openmm_regflow.units import finite_number

#: Positions beyond this [nm] have energy +inf, on every platform alike.
LARGEST_COORDINATE = 1e9
#: Largest dense matrix (entries) used for a transposed gather outside the compiler; see `Incidence`.
_DENSE_LIMIT = 500_000

#: x, y and z of a set of vectors, each `(n_blocks, rows, lanes)`.
Vector = tuple[Tensor, ...]


@runtime_checkable
class Potential(Protocol):
    """Anything that returns potential energies of a batch of configurations."""

    def __call__(self, x: Tensor) -> Tensor:
        """Potential energies ``(n,)`` [kJ/mol] of positions ``(n, n_atoms, 3)`` [nm]."""
        ...


def check_positions(x: Any, n_atoms: int) -> Tensor:
    """Positions as a floating-point tensor ``(n, n_atoms, 3)`` [nm].

    Args:
        x: tensor, array or length Quantity of that shape.
        n_atoms: number of particles of the System.

    Raises:
        InputError: another shape, or not numbers.
    """
    if unit.is_quantity(x):
        x = x.value_in_unit(unit.nanometer)
    try:
        tensor = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"positions of type {type(x).__name__} are not numeric; give an array in nm") from error
    if tensor.ndim == 2 and tuple(tensor.shape) == (n_atoms, 3):
        raise InputError(f"positions have shape {tuple(tensor.shape)}; add a batch axis, x[None], for one frame")
    if tensor.ndim != 3 or tuple(tensor.shape[1:]) != (n_atoms, 3):
        raise InputError(f"positions have shape {tuple(tensor.shape)}; this System needs (n, {n_atoms}, 3) in nm")
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def parameter_value(name: str, value: Any) -> float:
    """A global parameter as a number, a Quantity in OpenMM's units (nm, ps, dalton, kJ/mol).

    Raises:
        InputError: no finite number.
    """
    if unit.is_quantity(value):
        value = value.value_in_unit_system(unit.md_unit_system)
    return finite_number(value, f"parameter {name!r}", "OpenMM's units")


def force_label(force: openmm.Force) -> str:
    """The class of a force and, where the user gave one, its name, for messages."""
    kind = type(force).__name__
    return kind if force.getName() == kind else f"{kind} '{force.getName()}'"


def refuse(force: openmm.Force, what: str) -> UnsupportedForceError:
    """The exception for a feature of a force which is not evaluated here.

    Args:
        force: the force.
        what: the feature, as the subject of "is not covered".
    """
    return UnsupportedForceError(
        f"{force_label(force)}: {what} is not covered by TorchPotential; use OpenMMPotential(system) instead"
    )


class Incidence:
    """A sparse matrix with few non-zeros per row, applied along the row axis of ``(..., rows, lanes)`` arrays.

    Row ``p`` of the product is ``sum_m weights[p, m] * values[..., columns[p, m], :]``. The transpose is kept
    beside it in the same padded form, so that the backward pass is again a gather followed by a sum over a short
    axis: no scatter with atomic additions, which compilers do not vectorise, and any order of derivative.

    Args:
        columns: `(rows, width)` or `(rows,)` integer column indices.
        n_columns: number of columns of the matrix.
        weights: `(rows, width)` coefficients; ones by default, 0 marks padding.
    """

    shape: tuple[int, int]
    width: int
    columns: Tensor
    other_columns: Tensor
    weights: Tensor
    dense: Tensor | None
    unweighted: bool
    is_difference: bool
    transpose: "Incidence"

    def __init__(self, columns: np.ndarray, n_columns: int, weights: np.ndarray | None = None) -> None:
        columns = np.asarray(columns, dtype=np.int64)
        columns = columns[:, None] if columns.ndim == 1 else columns
        weights = np.ones(columns.shape) if weights is None else np.asarray(weights, dtype=np.float64)
        self._init_tables(columns, n_columns, weights)
        self.transpose = Incidence.__new__(Incidence)
        self.transpose._init_tables(*_transposed(columns, n_columns, weights))
        self.transpose.transpose = self
        #: for a matrix of differences: the other column of each row that the transposed table lists
        self.other_columns = self.columns
        if self.is_difference and len(columns):
            slots = self.transpose.columns.numpy().reshape(n_columns, -1)
            others = torch.as_tensor((columns.sum(1)[slots] - np.arange(n_columns)[:, None]).reshape(-1))
            self.other_columns = _spread(others * (self.transpose.weights.reshape(-1) != 0))

    def _init_tables(self, columns: np.ndarray, n_columns: int, weights: np.ndarray) -> None:
        self.shape = (len(columns), n_columns)
        self.width = columns.shape[1]
        self.columns = self.other_columns = _spread(torch.as_tensor(columns.reshape(-1)))
        self.weights = _spread(torch.as_tensor(weights[..., None]))
        self.unweighted = bool((weights == 1).all())
        self.is_difference = self.width == 2 and bool((weights == [1.0, -1.0]).all())
        self.dense = None
        if self.width > 2 and len(columns) * n_columns <= _DENSE_LIMIT:
            dense = np.zeros(self.shape)
            np.add.at(dense, (np.arange(len(columns))[:, None], columns), weights)
            self.dense = torch.as_tensor(dense)

    def to(self, dtype: torch.dtype, device: torch.device) -> "Incidence":
        """Move the tables (and those of the transpose) in place; returns self."""
        for matrix in (self, self.transpose):
            matrix.columns = _spread(matrix.columns.to(device))
            matrix.other_columns = _spread(matrix.other_columns.to(device))
            matrix.weights = _spread(matrix.weights.to(device, dtype))
            matrix.dense = None if matrix.dense is None else matrix.dense.to(device, dtype)
        return self

    def __call__(self, values: Tensor) -> Tensor:
        """The product with ``values`` `(..., n_columns, lanes)`: `(..., rows, lanes)`."""
        return _Apply.apply(values, self)

    def product(self, values: Tensor) -> Tensor:
        """The product without a derivative."""
        if self.dense is not None and values.device.type == "cpu" and not tracing():
            return self.dense @ values
        rows = (materialise(values) if self.width > 2 else values).index_select(-2, self.columns)
        if self.width == 1 and self.unweighted:
            return rows
        rows = rows.unflatten(-2, (self.shape[0], self.width))
        if self.is_difference:
            return rows[..., 0, :] - rows[..., 1, :]
        return (rows if self.unweighted else rows * self.weights).sum(-2)


def _spread(table: Tensor) -> Tensor:
    """The same table with a gap after each entry.

    Inductor vectorises over the axis along which most loads are contiguous. Tables with unit stride draw it to
    their own axis; with gaps the lanes are the only candidate.
    """
    return torch.stack([table, table], dim=-1)[..., 0]


def _transposed(columns: np.ndarray, n_columns: int, weights: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """Padded table of the transposed matrix: columns, number of columns, weights."""
    row, entry = np.nonzero(weights)
    target, coefficient = columns[row, entry], weights[row, entry]
    order = np.argsort(target, kind="stable")
    row, target, coefficient = row[order], target[order], coefficient[order]
    counts = np.bincount(target, minlength=n_columns)
    position = np.arange(len(target)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((n_columns, max(1, int(counts.max(initial=0)))), dtype=np.int64)
    scale = np.zeros(table.shape)
    table[target, position], scale[target, position] = row, coefficient
    return table, len(columns), scale


class _Apply(torch.autograd.Function):
    """Product with an `Incidence`; the derivative is the product with its transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, matrix: Incidence) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.transpose(grads[0]), None


def tracing() -> bool:
    """Whether a graph is being recorded (for the compiler) at this moment."""
    return torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None


_LIBRARY = torch.library.Library("openmm_regflow", "DEF")
_LIBRARY.define("materialise(Tensor x) -> Tensor")
torch.library.impl(_LIBRARY, "materialise", "CompositeExplicitAutograd")(torch.clone)


def materialise(x: Tensor) -> Tensor:
    """The same values; while a graph is recorded, a mark that the compiler is to store them at this point.

    Inductor inlines whatever has one consumer. Where that consumer reads every row several times (a sum over the
    pairs of an atom), inlining repeats the work of the row each time.
    """
    return torch.ops.openmm_regflow.materialise(x) if tracing() else x


def register_materialise() -> None:
    """Teach inductor `materialise`; called before the first compilation, since the import is slow."""
    from torch._inductor import lowering

    def realize(x: Any) -> Any:
        x.realize()
        return x

    lowering.register_lowering(torch.ops.openmm_regflow.materialise, type_promotion_kind=None)(realize)


class PairTable:
    """The union of all atom pairs that the pair forces of one potential look at, each stored once.

    Pairs that only some forces need come last in the order of registration, so that a force whose pairs are a
    contiguous range reads a slice and not a gather.
    """

    def __init__(self, n_atoms: int) -> None:
        self.n_atoms = n_atoms
        self._keys = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, pairs: np.ndarray) -> np.ndarray:
        """Rows of the table for ``pairs`` `(k, 2)`, added where new; the order within a pair does not matter."""
        pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        keys = pairs.min(axis=1) * self.n_atoms + pairs.max(axis=1)
        unknown = keys[~np.isin(keys, self._keys)]
        _, first = np.unique(unknown, return_index=True)
        self._keys = np.concatenate([self._keys, unknown[np.sort(first)]])
        order = np.argsort(self._keys)
        return order[np.searchsorted(self._keys, keys, sorter=order)]

    def pairs(self) -> np.ndarray:
        """All pairs so far `(n_pairs, 2)`, first index the smaller one."""
        return np.stack(np.divmod(self._keys, self.n_atoms), axis=1)


class Take:
    """Rows of a table: a slice where they are a contiguous range, else a gather.

    Args:
        rows: `(k,)` row numbers.
        size: number of rows of the table.
    """

    def __init__(self, rows: np.ndarray, size: int) -> None:
        contiguous = len(rows) > 0 and bool((np.diff(rows) == 1).all())
        self.start = int(rows[0]) if contiguous else 0
        self.length = len(rows)
        self.full = contiguous and len(rows) == size
        self.gather = None if contiguous else Incidence(rows, size)

    def to(self, dtype: torch.dtype, device: torch.device) -> "Take":
        """Move the index in place; returns self."""
        if self.gather is not None:
            self.gather.to(dtype, device)
        return self

    def __call__(self, values: Tensor) -> Tensor:
        """``values`` `(..., size, lanes)` -> `(..., k, lanes)`."""
        if self.full:
            return values
        if self.gather is not None:
            return self.gather(values)
        return values.narrow(-2, self.start, self.length)


class Geometry:
    """Positions of one block of configurations and, computed on first use, the distances of the pair table.

    Args:
        x: x, y and z, each `(n_blocks, n_atoms, lanes)` [nm].
        differences: displacement matrix of the pair table, or None where it is empty.
    """

    def __init__(self, x: Vector, differences: Incidence | None) -> None:
        self.x = x
        self._differences = differences
        self._cache: dict[str, Tensor] = {}

    def zeros(self) -> Tensor:
        """Zero energies `(n_blocks, lanes)` in the layout of the block."""
        return self.x[0].new_zeros((self.x[0].shape[0], self.x[0].shape[-1]))

    @property
    def r2(self) -> Tensor:
        """Squared distances `(n_blocks, n_pairs, lanes)` [nm^2]."""
        if "r2" not in self._cache:
            if self._differences is None:
                raise InputError("this potential has no pair forces and so no pair distances")
            if tracing():
                self._cache["r2"] = _SquaredDistances.apply(*self.x, self._differences)
            else:
                self._cache["r2"] = squared_norm(displace(self._differences, self.x))
        return self._cache["r2"]

    @property
    def inv_r(self) -> Tensor:
        """Inverse distances `(n_blocks, n_pairs, lanes)` [1/nm]; +inf for coincident atoms."""
        if "inv_r" not in self._cache:
            self._cache["inv_r"] = torch.rsqrt(self.r2)
        return self._cache["inv_r"]

    @property
    def r(self) -> Tensor:
        """Distances `(n_blocks, n_pairs, lanes)` [nm]; NaN for coincident atoms, whose energy is +inf."""
        if "r" not in self._cache:
            self._cache["r"] = self.r2 * self.inv_r
        return self._cache["r"]


class _SquaredDistances(torch.autograd.Function):
    """Squared distances of the pair table, for the compiler.

    The derivative stores one number per pair and sums it times the displacement over the pairs of each atom, so
    that neither displacements nor their gradients are ever written to memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, z: Tensor, differences: Incidence) -> Tensor:
        ctx.save_for_backward(x, y, z)
        ctx.differences = differences
        return squared_norm(displace(differences, (x, y, z)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.differences.transpose
        slots = (back.shape[0], back.width)
        weighted = materialise(grads[0]).index_select(-2, back.columns).unflatten(-2, slots)
        weighted = weighted * (2.0 * back.weights.abs())
        others = ctx.differences.other_columns
        return *(
            (weighted * (c.unsqueeze(-2) - c.index_select(-2, others).unflatten(-2, slots))).sum(-2)
            for c in ctx.saved_tensors
        ), None


class Term:
    """One OpenMM force, compiled: index tables fixed at construction, numbers depending on global parameters.

    Attributes:
        force: the OpenMM force.
        parameters: global parameters and their defaults.
    """

    def __init__(self, force: openmm.Force) -> None:
        self.force = force
        self.parameters: dict[str, float] = {}

    def finalise(self, pairs: PairTable) -> None:
        """Build what needs the complete pair table; called once, after every term has registered its pairs."""

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the index tables in place."""
        for value in vars(self).values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Incidence | Take):
                    item.to(dtype, device)

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Float64 coefficients under these global parameters, each broadcastable to `(rows, lanes)`."""
        raise NotImplementedError

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        raise NotImplementedError


def column(values: Sequence[float] | np.ndarray) -> Tensor:
    """One coefficient per row as a float64 tensor `(rows, 1)`."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64)).reshape(-1, 1)


def displace(matrix: Incidence, x: Vector) -> Vector:
    """The product of a matrix with each of the three coordinates."""
    return matrix(x[0]), matrix(x[1]), matrix(x[2])


def squared_norm(d: Vector) -> Tensor:
    """Squared length `(n_blocks, rows, lanes)`."""
    return dot(d, d)


def dot(a: Vector, b: Vector) -> Tensor:
    """Inner product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> Vector:
    """Vector product."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def safe_sqrt(values: Tensor) -> Tensor:
    """Square root with derivatives zero, not infinite, at zero (coincident atoms, straight angles)."""
    tiny = torch.finfo(values.dtype).tiny ** (2 / 3)  # the second derivative, v^(-3/2), is finite down to here
    return torch.where(values > tiny, values.clamp(min=tiny).sqrt(), torch.zeros_like(values))
