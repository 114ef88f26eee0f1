"""Internal coordinates: bonds, angles and torsions of a Z-matrix, whitened, with the exact volume element.

Volume element of the rigid-body-free configuration space: ``b^2`` for the second atom, ``b^2 sin(theta)`` for
every further one (e.g. Noe et al. 2019, arXiv 1812.01729; here derived from the placement itself); the
factor ``8 pi^2 V`` of the rigid motion is left out, so absolute free energies lack it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.bijections.couplings import wrap
from openmm_regflow.coordinates.base import CoordinateMap
from openmm_regflow.coordinates.zmatrix import Rotor, ZMatrix
from openmm_regflow.errors import InputError

#: A torsion whose circular standard deviation in the data is below this is stiff: a line, not a circle [rad].
STIFF_TORSION = 0.6
#: Unless more than this share of the data lies beyond a quarter turn from its mean: a second minimum, however rare.
FAR_SHARE = 1e-3
#: [nm^2, rad^2] Variance of a combination of stiff coordinates that does not vary; thermal ones have 1e-6 and more.
LEAST_VARIANCE = 1e-10
#: Bonds of fixed length: ``(i, j, length [nm])``.
FixedBonds = Sequence[tuple[int, int, float]]


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product along the first axis, `(3, ...)`: three fused multiply-adds, no reshuffling."""
    return torch.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def bond_angle_torsion(xyz: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bond [nm], angle [rad] and torsion [rad] of Z-matrix rows.

    Args:
        xyz: positions with the component first, `(3, n_atoms, n)` [nm].
        rows: `(k, 4)` atom, bonded to, angle with, torsion with.

    Returns:
        three tensors `(k, n)`; torsions in (-pi, pi].
    """
    p = xyz[:, rows.T.reshape(-1)].view(3, 4, rows.shape[0], -1)
    d, e, f = p[:, 0] - p[:, 1], p[:, 2] - p[:, 1], p[:, 3] - p[:, 2]
    b = d.pow(2).sum(0).sqrt()
    normal = cross(d, e)
    # atan2 keeps full precision near straight and folded angles, where acos has none.
    theta = torch.atan2(normal.pow(2).sum(0).sqrt(), (d * e).sum(0))
    other = cross(f, e)
    length = e.pow(2).sum(0).sqrt()
    tau = torch.atan2((cross(normal, other) * e).sum(0) / length, (normal * other).sum(0))
    return b, theta, tau


def place(c: Tensor, e: Tensor, f: Tensor, b: Tensor, theta: Tensor, tau: Tensor) -> Tensor:
    """Position of an atom from its references; the inverse of `bond_angle_torsion`.

    Args:
        c: position of the bonded atom `(3, k, n)` [nm].
        e: position of the angle's other end.
        f: position of the torsion's other end.
        b: bond `(k, n)` [nm].
        theta: angle `(k, n)` [rad].
        tau: torsion `(k, n)` [rad].
    """
    axis = e - c
    axis = axis / axis.pow(2).sum(0).sqrt()
    side = f - e
    normal = cross(side, axis)
    normal = normal / normal.pow(2).sum(0).sqrt()
    across = cross(axis, normal)
    reach = b * theta.sin()
    return c + axis * (b * theta.cos()) + across * (reach * tau.cos()) + normal * (reach * tau.sin())


class InternalMap(CoordinateMap):
    """Whitened internal coordinates of one molecule.

    Features: first the stiff ones (bonds, angles, stiff torsions), whitened together with their full
    covariance, then the soft torsions as angles. A methyl-like rotor of m interchangeable atoms is described
    by its mean torsion times m, an angle; the labels of its atoms are made canonical going in and, in
    `relabel`, drawn uniformly coming out, so that the m equivalent labellings are exactly equally likely. The
    factor m of the angle and the 1/m of the labels cancel in the density.

    Rows outside the chart (a bond <= 0, an angle outside (0, pi), a stiff torsion more than pi from its mean, an atom
    of a rotor that has passed the first one) come back as NaN positions: they carry no weight, and no sample is folded
    back silently.

    Bonds of fixed length (constraints) are no features: positions are built with their length, whatever they measure
    in positions that come in, and the density is that of ``prod_k delta(b_k - d_k)`` times the volume element. The
    metric term of constrained dynamics is not part of it; see ``openmm_regflow.constraints``.

    Args:
        zmatrix: from `build_zmatrix`.
        soft: positions in ``zmatrix.rows`` whose torsion is a circle.
        origin: `(dim,)` raw centre of each stiff coordinate, 0 for soft ones.
        whitening: `(n_stiff, n_stiff)`, raw stiff deviation = whitening @ stiff feature.
        fixed: ``(i, j, length [nm])`` of bonds of fixed length, each a bond of the Z-matrix.

    Raises:
        InputError: a fixed distance that is no bond of the Z-matrix, or not positive.
    """

    rotation_invariant = True
    com_std = 0.0
    rows: Tensor
    order: Tensor
    unorder: Tensor
    origin: Tensor
    whitening: Tensor
    unwhitening: Tensor
    log_whitening: Tensor
    multiplicity: Tensor
    slots: Tensor
    fixed_columns: Tensor
    fixed_lengths: Tensor

    def __init__(
        self, zmatrix: ZMatrix, soft: list[int], origin: Tensor, whitening: Tensor, fixed: FixedBonds = ()
    ) -> None:
        super().__init__()
        self.zmatrix = zmatrix
        self.n_atoms = zmatrix.n_atoms
        rows = torch.tensor(zmatrix.rows, dtype=torch.long).view(-1, 4)
        self.register_buffer("rows", rows, persistent=False)
        self.soft = sorted(soft)
        n_rows = rows.shape[0]
        stiff = [k for k in range(n_rows) if k not in set(self.soft)]
        # Raw vector: bonds (n_rows + 2), angles (n_rows + 1), torsions (n_rows).
        first_torsion = 2 * n_rows + 3
        lengths = _fixed_columns(zmatrix, fixed)
        self.fixed_bonds = tuple((int(i), int(j), float(length)) for i, j, length in fixed)
        free = [column for column in range(first_torsion) if column not in lengths]
        self.n_lengths = len(free)
        order = [*free, *(first_torsion + k for k in stiff), *(first_torsion + k for k in self.soft)]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("unorder", torch.argsort(torch.tensor([*order, *lengths])), persistent=False)
        self.register_buffer("fixed_columns", torch.tensor(list(lengths), dtype=torch.long), persistent=False)
        fixed_lengths = torch.tensor(list(lengths.values()), dtype=torch.float64)
        self.register_buffer("fixed_lengths", fixed_lengths, persistent=False)
        self.n_stiff = len(order) - len(self.soft)
        circular = torch.zeros(len(order), dtype=torch.bool)
        circular[self.n_stiff :] = True
        self.register_buffer("circular", circular, persistent=False)
        self.register_buffer("origin", origin.double())
        self.register_buffer("whitening", whitening.double())
        self.register_buffer("unwhitening", torch.linalg.inv(self.whitening), persistent=False)
        self.register_buffer("log_whitening", torch.linalg.slogdet(self.whitening)[1], persistent=False)
        self._prepare_rotors()
        self._prepare_levels()

    def refresh(self) -> None:
        """Recompute the inverse and the determinant of the whitening that was loaded."""
        self.unwhitening = torch.linalg.inv(self.whitening)
        self.log_whitening = torch.linalg.slogdet(self.whitening)[1]

    def _prepare_rotors(self) -> None:
        first_torsion = 2 * len(self.zmatrix.rows) + 3
        row_of = {row[0]: k for k, row in enumerate(self.zmatrix.rows)}
        lengths = _fixed_columns(self.zmatrix, self.fixed_bonds)

        def alike(rotor: Rotor) -> bool:  # or a turn of the labels would put atoms at the length of others
            return len({lengths.get(row_of[a] + 2) for a in rotor.atoms}) == 1

        self.rotors = [r for r in self.zmatrix.rotors if row_of[r.atoms[0]] in self.soft and alike(r)]
        self._rotor_raw = [([first_torsion + row_of[a] for a in r.atoms], len(r.atoms)) for r in self.rotors]
        # Buffers, as for the levels below: a list as an index would be sent to a GPU in every call, which waits for it.
        for k, (rotor, (raw, _)) in enumerate(zip(self.rotors, self._rotor_raw)):
            self.register_buffer(f"rotor_atoms_{k}", torch.tensor(rotor.atoms), persistent=False)
            self.register_buffer(f"rotor_siblings_{k}", torch.tensor(raw[1:], dtype=torch.long), persistent=False)
        multiplicity = torch.ones(len(self.circular), dtype=torch.float64)
        for raw, m in self._rotor_raw:
            multiplicity[int(self.unorder[raw[0]])] = m
        self.register_buffer("multiplicity", multiplicity, persistent=False)

    def _prepare_levels(self) -> None:
        depth = dict.fromkeys(self.zmatrix.seed, 0)
        levels: dict[int, list[int]] = {}
        for k, (atom, *refs) in enumerate(self.zmatrix.rows):
            depth[atom] = 1 + max(depth[r] for r in refs)
            levels.setdefault(depth[atom], []).append(k)
        ordered = [levels[d] for d in sorted(levels)]
        placed = [*self.zmatrix.seed, *(self.zmatrix.rows[k][0] for level in ordered for k in level)]
        slot = {atom: i for i, atom in enumerate(placed)}
        self._n_levels = len(ordered)
        # Buffers, so that they follow to a GPU: as plain tensors they would be copied there in every call.
        for d, level in enumerate(ordered):
            slots = torch.tensor([[slot[a] for a in self.zmatrix.rows[k][1:]] for k in level]).T
            self.register_buffer(f"level_rows_{d}", torch.tensor(level), persistent=False)
            self.register_buffer(f"level_slots_{d}", slots, persistent=False)
        self.register_buffer("slots", torch.tensor([slot[a] for a in range(self.n_atoms)]), persistent=False)

    def _levels(self) -> list[tuple[Tensor, Tensor]]:
        """Rows `(k,)` of the Z-matrix that can be placed at once, and the slots `(3, k)` of their references."""
        return [(getattr(self, f"level_rows_{d}"), getattr(self, f"level_slots_{d}")) for d in range(self._n_levels)]

    @classmethod
    def fit(
        cls, zmatrix: ZMatrix, x: Tensor, stiff_below: float = STIFF_TORSION, fixed: FixedBonds = ()
    ) -> "InternalMap":
        """Decide from data which torsions are soft, and whiten the stiff coordinates with their covariance.

        Args:
            zmatrix: from `build_zmatrix`.
            x: positions `(n, n_atoms, 3)` [nm], at least twice as many frames as stiff coordinates.
            stiff_below: circular standard deviation [rad] under which a torsion is stiff.
            fixed: ``(i, j, length [nm])`` of bonds of fixed length.

        Raises:
            InputError: too few frames, NaN, a wrong number of atoms, a fixed distance that is no bond, or coordinates
                that do not vary.
        """
        if x.ndim != 3 or x.shape[1] != zmatrix.n_atoms:
            raise InputError(f"positions of shape {tuple(x.shape)} do not fit a molecule of {zmatrix.n_atoms} atoms")
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
            raise InputError(f"frame {bad} holds a NaN or infinite position; remove it before fitting")
        dim = 3 * zmatrix.n_atoms - 6 - len(fixed)
        if x.shape[0] < 2 * dim:
            raise InputError(
                f"{x.shape[0]} frames cannot fit the covariance of {dim} coordinates; give {2 * dim} or more"
            )
        x = x.double().cpu()  # where the map is made; it may go to another device afterwards
        n_rows = len(zmatrix.rows)
        zmatrix = _order_rotors(zmatrix, x)
        plain = cls(zmatrix, list(range(n_rows)), torch.zeros(dim), torch.eye(dim - n_rows), fixed)
        raw = plain.raw(plain.canonical(x))
        broken = ~torch.isfinite(raw).all(1)
        if bool(broken.any()):
            raise InputError(
                f"frame {int(broken.nonzero()[0])} has no internal coordinates, with atoms in one place or in a line "
                f"({int(broken.sum())} of {len(x)} frames are so); remove it before fitting"
            )
        torsions = raw[:, 2 * n_rows + 3 :]
        cosine, sine = torsions.cos().mean(0), torsions.sin().mean(0)
        resultant = torch.hypot(cosine, sine).clamp(1e-12, 1.0)
        proper = [k for k in range(n_rows) if k not in zmatrix.siblings]
        rotor_rows = {k for k, row in enumerate(zmatrix.rows) for r in zmatrix.rotors if row[0] == r.atoms[0]}
        spread = (-2.0 * resultant.log()).sqrt()
        far = (wrap(torsions - torch.atan2(sine, cosine)).abs() > math.pi / 2).double().mean(0) > FAR_SHARE
        loose = (spread > stiff_below) | far
        _refuse_mixed_labels(zmatrix, loose)
        soft = [k for k in range(n_rows) if bool(loose[k]) or (k in proper and k in rotor_rows)]
        draft = cls(zmatrix, soft, torch.zeros(dim), torch.eye(dim - len(soft)), fixed)
        raw = draft.raw(draft.canonical(x))[:, draft.order]
        origin = draft._centres(raw)
        deviation = draft._deviation(raw, origin)[:, : draft.n_stiff]
        values, vectors = torch.linalg.eigh(torch.cov(deviation.T))
        if float(values[0]) < LEAST_VARIANCE:
            raise InputError(
                "a combination of bonds, angles and stiff torsions does not vary over the frames: atoms are frozen, a "
                "bond is constrained that is not among the fixed ones (constraints.fixed_bonds(system)), or the frames "
                "are copies of a few; learn from frames in which all of them move"
            )
        # Symmetric (ZCA) whitening: each feature stays close to the coordinate it came from.
        return cls(zmatrix, soft, origin, vectors * values.sqrt() @ vectors.T, fixed)

    def _centres(self, raw: Tensor) -> Tensor:
        origin = torch.zeros(raw.shape[1], dtype=raw.dtype)
        n_lengths = self.n_lengths
        origin[:n_lengths] = raw[:, :n_lengths].mean(0)
        torsions = raw[:, n_lengths : self.n_stiff]
        first = torch.atan2(torsions.sin().mean(0), torsions.cos().mean(0))
        origin[n_lengths : self.n_stiff] = first + wrap(torsions - first).mean(0)
        return origin

    def _deviation(self, raw: Tensor, origin: Tensor) -> Tensor:
        n_lengths = self.n_lengths
        delta = raw - origin
        return torch.cat([delta[:, :n_lengths], wrap(delta[:, n_lengths:])], dim=1)

    def raw(self, x: Tensor) -> Tensor:
        """Bonds [nm], angles [rad], torsions [rad], `(n, 3 n_atoms - 6)`, rotors by their mean torsion."""
        xyz = x.permute(2, 1, 0)
        b, theta, tau = bond_angle_torsion(xyz, self.rows)
        a0, a1, a2 = (xyz[:, i] for i in self.zmatrix.seed)
        d, e = a0 - a1, a2 - a1
        angle = torch.atan2(cross(d, e).pow(2).sum(0).sqrt(), (d * e).sum(0))
        seed = torch.stack([d.pow(2).sum(0).sqrt(), e.pow(2).sum(0).sqrt()])
        raw = torch.cat([seed, b, angle[None], theta, tau]).T
        for columns, m in self._rotor_raw:
            raw = raw.clone()
            raw[:, columns[0]] = raw[:, columns[0]] + self._offset(raw, columns, m)
        return raw

    @staticmethod
    def _offset(raw: Tensor, columns: list[int], m: int) -> Tensor:
        """Mean torsion of a rotor minus the torsion of its first atom: siblings deviate from the even spacing."""
        spacing = 2.0 * math.pi / m
        deviation = [wrap(raw[:, c] - _side(raw[:, c]) * spacing) for c in columns[1:]]
        return torch.stack(deviation).sum(0) / m

    def turns(self, x: Tensor) -> Tensor:
        """Labels of every rotor `(n, n_rotors)`: in which of the m sectors its mean torsion lies; 0 is canonical."""
        if not self.rotors:
            return super().turns(x)
        raw = self.raw(x)
        sectors = [torch.floor(wrap(raw[:, c[0]]) * m / (2 * math.pi) + 0.5).long() % m for c, m in self._rotor_raw]
        return torch.stack(sectors, dim=1)

    def turned(self, x: Tensor, turns: Tensor) -> Tensor:
        """The same conformations with the labels of every rotor `(n, n_rotors)` turned on by so many places."""
        if not self.rotors:
            return x
        index = torch.arange(self.n_atoms, device=x.device).repeat(x.shape[0], 1)
        for k, (rotor, turn) in enumerate(zip(self.rotors, turns.unbind(1), strict=True)):
            m, ring = len(rotor.atoms), getattr(self, f"rotor_atoms_{k}").to(x.device)
            shift = (torch.arange(m, device=x.device)[None, :] + turn[:, None]) % m
            index[:, ring] = ring[shift]
        return x.gather(1, index[..., None].expand(-1, -1, 3))

    def canonical(self, x: Tensor) -> Tensor:
        """The same conformations with the labels of interchangeable atoms in canonical order.

        Canonical: the mean torsion of every rotor, named by its first atom, lies in [-pi/m, pi/m).
        """
        return self.turned(x, -self.turns(x))

    def relabel(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the labels of every rotor uniformly among its m cyclic orders."""
        return self.turned(x, self.random_turns(len(x), generator).to(x.device))

    def random_turns(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Labels of every rotor `(n, n_rotors)`, each uniform among its m cyclic orders."""
        if not self.rotors:
            return super().random_turns(n, generator)
        device = generator.device if generator is not None else self.circular.device
        turns = [torch.randint(len(r.atoms), (n,), generator=generator, device=device) for r in self.rotors]
        return torch.stack(turns, dim=1)

    def to_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] -> features `(n, dim)`, log-determinant `(n,)`: -inf where none `covers`."""
        raw = self.raw(self.canonical(x))
        if self.fixed_bonds:
            raw = raw.clone()
            raw[:, self.fixed_columns] = self.fixed_lengths.to(raw.dtype)
        log_volume = self._log_volume(raw)
        log_volume = torch.where(self._go_round(raw), log_volume, torch.inf)  # no latent leads elsewhere
        delta = self._deviation(raw[:, self.order], self.origin.to(raw.dtype))
        stiff = delta[:, : self.n_stiff] @ self.unwhitening.T.to(raw.dtype)
        soft = wrap(delta[:, self.n_stiff :] * self.multiplicity[self.n_stiff :].to(raw.dtype))
        return torch.cat([stiff, soft], dim=1), -log_volume - self.log_whitening.to(raw.dtype)

    def to_positions(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(n, dim)` -> positions `(n, n_atoms, 3)` [nm], log-determinant `(n,)`."""
        delta = torch.cat(
            [
                y[:, : self.n_stiff] @ self.whitening.T.to(y.dtype),
                wrap(y[:, self.n_stiff :]) / self.multiplicity[self.n_stiff :].to(y.dtype),
            ],
            dim=1,
        )
        lengths = self.fixed_lengths.to(y.dtype).expand(len(y), -1)
        raw = torch.cat([delta + self.origin.to(y.dtype), lengths], dim=1)[:, self.unorder]
        inside = self._inside(raw, delta)
        x = self._build(raw.T.contiguous())
        log_det = self._log_volume(raw) + self.log_whitening.to(y.dtype)
        return torch.where(inside[:, None, None], x, torch.nan), log_det

    def _inside(self, raw: Tensor, delta: Tensor) -> Tensor:
        n_bonds, n_lengths = len(self.zmatrix.rows) + 2, 2 * len(self.zmatrix.rows) + 3
        bonds, angles = raw[:, :n_bonds], raw[:, n_bonds:n_lengths]
        fine = (bonds > 0).all(1) & (angles > 0).all(1) & (angles < math.pi).all(1)
        return fine & self._go_round(raw) & (delta[:, self.n_lengths : self.n_stiff].abs() < math.pi).all(1)

    def _go_round(self, raw: Tensor) -> Tensor:
        """Whether all rotors go round as in the frames of the fit `(n,)`, less than half a turn from atom to atom.

        Past its side a sibling would count as deviating the other way, and the rotor's mean would jump, whichever atom
        the labels call the first.
        """
        fine = torch.ones(len(raw), dtype=torch.bool, device=raw.device)
        for k in range(len(self.rotors)):
            columns = getattr(self, f"rotor_siblings_{k}")
            siblings = raw[:, columns] * _side(self.origin[self.unorder[columns]]).to(raw.dtype)
            gaps = torch.cat([siblings, 2.0 * math.pi - siblings.sum(1, keepdim=True)], dim=1)
            fine = fine & ((gaps > 0) & (gaps < math.pi)).all(1)
        return fine

    def _log_volume(self, raw: Tensor) -> Tensor:
        n_bonds, n_lengths = len(self.zmatrix.rows) + 2, 2 * len(self.zmatrix.rows) + 3
        bonds = raw[:, :n_bonds].abs().log().sum(1)
        return 2.0 * bonds + raw[:, n_bonds:n_lengths].sin().abs().log().sum(1)

    def _build(self, raw: Tensor) -> Tensor:
        """Positions `(n, n_atoms, 3)` from raw coordinates `(dim, n)`: the seed in the plane, then by levels."""
        n_rows = len(self.zmatrix.rows)
        torsions = list(raw[2 * n_rows + 3 :].unbind(0))
        for columns, m in self._rotor_raw:
            k = columns[0] - 2 * n_rows - 3
            torsions[k] = torsions[k] - self._offset(raw.T, columns, m)
        tau = torch.stack(torsions)
        bonds, angles = raw[: n_rows + 2], raw[n_rows + 2 : 2 * n_rows + 3]
        zero = torch.zeros_like(bonds[0])
        first = torch.stack([bonds[0], zero, zero])
        third = torch.stack([bonds[1] * angles[0].cos(), bonds[1] * angles[0].sin(), zero])
        placed = torch.stack([first, torch.zeros_like(first), third], dim=1)
        for level, slots in self._levels():
            c, e, f = (placed[:, s] for s in slots)
            fresh = place(c, e, f, bonds[2 + level], angles[1 + level], tau[level])
            placed = torch.cat([placed, fresh], dim=1)
        return placed[:, self.slots].permute(2, 1, 0)

    def covers(self, x: Tensor) -> Tensor:
        """Whether rotors go round as in the frames of the fit `(n,)`; others have no place in these coordinates."""
        return self._go_round(self.raw(x.double()))

    def between(self, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        """Conformations on the way from one to another, straight in bonds, angles and torsions.

        Torsions go the shorter way round, so the way back is the same. The frame is the coordinates' own, not x's.

        Args:
            x: positions `(n_atoms, 3)` [nm] at share 0.
            y: positions `(n_atoms, 3)` [nm] at share 1.
            share: `(n,)` of the way.

        Returns:
            positions `(n, n_atoms, 3)` [nm].
        """
        start, end = self.raw(torch.stack([x, y])).split(1)
        first_torsion = 2 * len(self.zmatrix.rows) + 3
        step = end - start
        step = torch.cat([step[:, :first_torsion], wrap(step[:, first_torsion:])], dim=1)
        return self._build((start + share.to(step)[:, None] * step).T.contiguous())

    def config(self) -> Mapping[str, Any]:
        """JSON-ready constructor arguments, without origin and whitening, which are tensors of the flow file."""
        fixed = {"fixed": [list(bond) for bond in self.fixed_bonds]} if self.fixed_bonds else {}
        return fixed | {
            "kind": "internal",
            "seed": list(self.zmatrix.seed),
            "rows": [list(row) for row in self.zmatrix.rows],
            "siblings": sorted(self.zmatrix.siblings),
            "rotors": [list(r.atoms) for r in self.zmatrix.rotors],
            "soft": self.soft,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "InternalMap":
        """An unfitted map of the same shape; load_state_dict then brings origin and whitening."""
        zmatrix = ZMatrix(
            seed=tuple(config["seed"]),
            rows=tuple(tuple(row) for row in config["rows"]),
            siblings=frozenset(config["siblings"]),
            rotors=tuple(Rotor(tuple(atoms)) for atoms in config["rotors"]),
        )
        fixed = tuple(tuple(bond) for bond in config.get("fixed", ()))
        dim = 3 * zmatrix.n_atoms - 6 - len(fixed)
        n_stiff = dim - len(config["soft"])
        return cls(zmatrix, list(config["soft"]), torch.zeros(dim), torch.eye(n_stiff), fixed)


def _fixed_columns(zmatrix: ZMatrix, fixed: FixedBonds) -> dict[int, float]:
    """Raw column -> length [nm] of every fixed bond."""
    column = {frozenset(bond): k for k, bond in enumerate(zmatrix.bonds)}
    lengths = {}
    for i, j, length in fixed:
        if frozenset((i, j)) not in column:
            raise InputError(
                f"the distance between atoms {i} and {j} is fixed, but is no bond of the Z-matrix (an angle, water, a "
                "ring or atoms without a bond in the topology); fix bonds alone: constraints=HBonds, rigidWater=False"
            )
        if not length > 0:
            raise InputError(f"the bond between atoms {i} and {j} is fixed at {length} nm; a positive length is needed")
        lengths[column[frozenset((i, j))]] = float(length)
    return lengths


def _order_rotors(zmatrix: ZMatrix, x: Tensor) -> ZMatrix:
    """The same Z-matrix with the atoms of every rotor in the order of rising torsion, as in the data."""
    rows = torch.tensor(zmatrix.rows, dtype=torch.long).view(-1, 4)
    tau = bond_angle_torsion(x.permute(2, 1, 0), rows)[2]
    row_of = {row[0]: k for k, row in enumerate(zmatrix.rows)}

    def rising(rotor: Rotor) -> Rotor:
        first, *others = rotor.atoms
        return Rotor((first, *sorted(others, key=lambda a: float((tau[row_of[a]] % (2 * math.pi)).median()))))

    return replace(zmatrix, rotors=tuple(rising(r) for r in zmatrix.rotors))


def _refuse_mixed_labels(zmatrix: ZMatrix, loose: Tensor) -> None:
    """Atoms of a rotor go round the same way in all frames, or in nearly all: nothing but labels can turn them round.

    Args:
        zmatrix: with its rotors.
        loose: `(n_rows,)`, whether a torsion is none about a single place.

    Raises:
        InputError: structures that were prepared apart, whose hydrogens got their numbers in another order.
    """
    row_of = {row[0]: k for k, row in enumerate(zmatrix.rows)}
    for rotor in zmatrix.rotors:
        if any(bool(loose[row_of[atom]]) for atom in rotor.atoms[1:]):
            raise InputError(
                f"atoms {', '.join(map(str, rotor.atoms))} go round one way in some frames and the other way in the "
                "others, as if their labels differed between structures that were prepared apart; exchange two of them "
                "in one set of frames"
            )


def _side(torsion: Tensor) -> Tensor:
    """+1 or -1: on which side of the first atom a sibling sits."""
    return torch.where(torsion >= 0, 1.0, -1.0).to(torsion.dtype)
