"""Continuous teachers: vector fields trained by flow matching, and their integration with log-determinants.

Flow matching on straight (optimal-transport) paths: Lipman et al. 2023, arXiv 2210.02747, equation 22 with
sigma_min = 0; on circles the straight path is the geodesic (Chen & Lipman 2024, arXiv 2302.03660).
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openmm_regflow.bijections import wrap
from openmm_regflow.errors import InputError
from openmm_regflow.files import read_safetensors, write_safetensors
from openmm_regflow.networks import MLP, ResidualMLP, TimeEmbedding, TransformerBlock, zero_
from openmm_regflow.priors import Prior
from openmm_regflow.products import Linear

LogDet = Literal["none", "exact", "hutchinson"]
#: Methods of torchdiffeq with steps of one length, and with steps to a tolerance.
Fixed = Literal["euler", "midpoint", "rk4"]
Adaptive = Literal["bosh3", "dopri5", "dopri8"]
Method = Literal[Fixed, Adaptive]
FIXED, ADAPTIVE = get_args(Fixed), get_args(Adaptive)
#: In the header of a teacher's file.
KIND = "openmm_regflow.teacher"
#: torch has one level of forward derivatives for all threads of a process.
_FORWARD = threading.Lock()


class VectorField(nn.Module):
    """Velocity on lines and circles: features `(n, dim)` and time `(n,)` -> velocity `(n, dim)`.

    Args:
        circular: `(dim,)` bool; an angle enters as its cosine and sine, so the field is periodic.
        kind: "mlp" (residual MLP), "transformer" (adaLN transformer over tokens of three features: atoms, if the
            features are Cartesian) or "equivariant" (graph network over atoms; Cartesian features only).
        hidden: width.
        depth: number of blocks.
        seed: of the initial weights.
        factor: of a harmonic prior, see ``priors.Prior``.

    Attributes:
        origin: what latents and features mean, see ``flows.origin``; empty if unknown.

    Raises:
        InputError: an unknown kind, or one that needs atoms where there are angles.
    """

    circular: Tensor
    linear_index: Tensor
    circular_index: Tensor

    def __init__(
        self,
        circular: Tensor,
        kind: str = "mlp",
        hidden: int = 256,
        depth: int = 3,
        seed: int = 0,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("mlp", "transformer", "equivariant"):
            raise InputError(f"unknown vector field {kind!r}; known: mlp, transformer, equivariant")
        if kind == "equivariant" and (bool(circular.any()) or circular.numel() % 3):
            raise InputError('an equivariant field works on atoms; choose coordinates = "cartesian" or another kind')
        self.architecture = {"kind": kind, "hidden": hidden, "depth": depth, "seed": seed}
        self.origin: dict[str, str] = {}
        self.prior = Prior(circular.clone(), factor)
        self.register_buffer("circular", circular.clone(), persistent=False)
        self.register_buffer("linear_index", (~circular).nonzero().flatten(), persistent=False)
        self.register_buffer("circular_index", circular.nonzero().flatten(), persistent=False)
        self.time = TimeEmbedding(32)
        n_in = circular.numel() + int(circular.sum())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "mlp":
                self.network: nn.Module = ResidualMLP(n_in + 32, circular.numel(), hidden, depth)
            elif kind == "transformer":
                self.network = TokenField(n_in, circular.numel(), 32, hidden, depth)
            else:
                self.network = EquivariantField(circular.numel() // 3, 32, hidden, depth)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity `(n, dim)` at times `(n,)` and features `(n, dim)`."""
        angles = x[:, self.circular_index]
        features = torch.cat([x[:, self.linear_index], angles.cos(), angles.sin()], dim=-1)
        return self.network(torch.cat([features, self.time(t)], dim=-1))


class TokenField(nn.Module):
    """Transformer over tokens of three features, its blocks modulated by the time (a small DiT).

    Args:
        n_in: features, without the time.
        n_out: velocities.
        n_time: time features, the last ones of the input.
        hidden: token width.
        depth: blocks.
    """

    def __init__(self, n_in: int, n_out: int, n_time: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.n_time, self.n_out = n_time, n_out
        self.n_tokens = -(-max(n_in, n_out) // 3)
        self.lift = Linear(3, hidden)
        self.place = nn.Parameter(0.5 * torch.randn(self.n_tokens, hidden))
        self.condition = nn.Sequential(Linear(n_time, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU())
        self.blocks = nn.ModuleList(TransformerBlock(hidden, 4, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.head = Linear(hidden, 3)
        zero_(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, n_in + n_time)` -> `(n, n_out)`."""
        features, time = x[:, : -self.n_time], self.condition(x[:, -self.n_time :])
        padded = nn.functional.pad(features, (0, 3 * self.n_tokens - features.shape[1]))
        h = self.lift(padded.view(x.shape[0], self.n_tokens, 3)) + self.place
        for block in self.blocks:
            h = block(h, time)
        return self.head(self.norm(h)).flatten(1)[:, : self.n_out]


class EquivariantField(nn.Module):
    """Graph network over atoms whose velocities turn with the molecule.

    The layers are those of Satorras et al. 2021, arXiv 2102.09844, equations 3 to 6. Velocities are sums of
    differences between atoms, of their cross products about the centre, and of the centre itself, with invariant
    weights. Without the cross products (Schneuing et al. 2024, arXiv 2210.13695) the field would not know a molecule
    from its mirror image, and half of the samples would be of the wrong chirality.

    Args:
        n_atoms: nodes; each has a learned embedding.
        n_time: time features, the last ones of the input.
        hidden: width of messages and embeddings.
        depth: layers.
    """

    def __init__(self, n_atoms: int, n_time: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.n_atoms, self.n_time = n_atoms, n_time
        self.embedding = nn.Parameter(0.5 * torch.randn(n_atoms, hidden))
        self.time = Linear(n_time, hidden)
        self.messages = nn.ModuleList(MLP(2 * hidden + 2, hidden, hidden, 1, zero_init=False) for _ in range(depth))
        self.updates = nn.ModuleList(MLP(2 * hidden, hidden, hidden, 1, zero_init=False) for _ in range(depth))
        self.weights = nn.ModuleList(Linear(hidden, 2) for _ in range(depth))
        self.drift = Linear(n_time, 1)
        for layer in (*self.weights, self.drift):
            zero_(layer)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3 n_atoms + n_time)` -> `(n, 3 n_atoms)`."""
        n, time = len(x), x[:, -self.n_time :]
        start = x[:, : -self.n_time].reshape(n, self.n_atoms, 3)
        centre = start.mean(1, keepdim=True)
        position = start = start - centre
        h = self.embedding + self.time(time)[:, None]
        for message, update, weight in zip(self.messages, self.updates, self.weights):
            apart = position[:, :, None] - position[:, None]
            squared = torch.stack([(p[:, :, None] - p[:, None]).square().sum(-1) for p in (position, start)], -1)
            pair = [h[:, :, None].expand(-1, -1, self.n_atoms, -1), h[:, None].expand(-1, self.n_atoms, -1, -1)]
            m = nn.functional.silu(message(torch.cat([*pair, squared], -1)))
            along, across = weight(m).unsqueeze(-1).unbind(-2)
            cross = torch.linalg.cross(position[:, :, None], position[:, None].expand_as(apart))
            reach = (squared[..., :1] + 1.0).sqrt()
            position = position + ((along * apart + across * cross) / reach).mean(2)
            h = h + update(torch.cat([h, m.mean(2)], -1))
        return (position - start + self.drift(time)[:, None] * centre).flatten(1)


def interpolate(x0: Tensor, x1: Tensor, t: Tensor, circular: Tensor) -> tuple[Tensor, Tensor]:
    """Point and velocity of the straight path at time `t`; the shorter way round on circles.

    Args:
        x0: `(n, dim)` prior samples.
        x1: `(n, dim)` data.
        t: `(n,)` in [0, 1].
        circular: `(dim,)` bool.

    Returns:
        point `(n, dim)`, velocity `(n, dim)`.
    """
    velocity = torch.where(circular, wrap(x1 - x0), x1 - x0)
    return x0 + t[:, None] * velocity, velocity


def divergence(field: nn.Module, t: Tensor, x: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """Velocity `(n, dim)` and its divergence `(n,)`: exact (probe None), or Hutchinson's estimate with `probe`.

    Args:
        field: (t, x) -> velocity.
        t: `(n,)`.
        x: `(n, dim)`.
        probe: `(n, dim)` of independent entries with unit variance (Hutchinson 1989; FFJORD, arXiv 1810.01367).
    """
    if probe is not None:
        velocity, along = _along(field, t, x, probe)
        return velocity, (along * probe).sum(-1)
    total = x.new_zeros(x.shape[0])
    for i in range(x.shape[1]):
        direction = torch.zeros_like(x)
        direction[:, i] = 1.0
        velocity, along = _along(field, t, x, direction)
        total = total + along[:, i]
    return velocity, total


def _along(field: nn.Module, t: Tensor, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and its derivative along a direction, both `(n, dim)`, by one thread at a time."""
    with _FORWARD:
        return torch.func.jvp(lambda v: field(t, v), (x,), (direction,))[:2]


def check_integration(method: str, log_det: str, n_steps: int) -> None:
    """Refuse unknown words and no steps.

    Raises:
        InputError: an unknown method or kind of log-determinant, or n_steps < 1.
    """
    if n_steps < 1:
        raise InputError(f"n_steps is {n_steps}; at least 1 is needed")
    for name, value, known in (("method", method, get_args(Method)), ("log_det", log_det, get_args(LogDet))):
        if value not in known:
            raise InputError(f"{name} is {value!r}; known: {', '.join(known)}")


@torch.no_grad()
def integrate(
    field: VectorField,
    x: Tensor,
    *,
    n_steps: int = 20,
    method: str = "midpoint",
    reverse: bool = False,
    log_det: LogDet = "none",
    generator: torch.Generator | None = None,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Carry features along the teacher's ODE, with the log-determinant of the map.

    Args:
        field: the teacher.
        x: `(n, dim)` start: prior samples, or data if `reverse`.
        n_steps: steps of a fixed-step method.
        method: of torchdiffeq: one of `FIXED`, with steps of one length, or of `ADAPTIVE`, to a tolerance.
        reverse: from data to prior.
        log_det: "none" (zeros), "exact", or "hutchinson" (unbiased, one probe per sample).
        generator: for the probe.
        tolerance: absolute and relative, of an adaptive method.

    Returns:
        end `(n, dim)` with angles in [-pi, pi), log|det| `(n,)`.

    Raises:
        InputError: an unknown method or kind of log-determinant, or n_steps < 1.
    """
    from torchdiffeq import odeint

    check_integration(method, log_det, n_steps)
    probe = None
    if log_det == "hutchinson":
        # A generator draws on its own device alone.
        source = x.device if generator is None else generator.device
        probe = torch.randint(0, 2, x.shape, generator=generator, device=source).to(x) * 2 - 1

    def rate(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        time = t.to(x.dtype).expand(x.shape[0])
        if log_det == "none":
            return field(time, state[0]), torch.zeros_like(state[1])
        return divergence(field, time, state[0], probe)

    def grid(_: Any, __: Any, t: Tensor) -> Tensor:  # with a step size, torchdiffeq rounds some numbers of steps up
        return torch.linspace(float(t[0]), float(t[-1]), n_steps + 1, dtype=t.dtype, device=t.device)

    times = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0], dtype=x.dtype, device=x.device)
    options = {} if method in ADAPTIVE else {"options": {"grid_constructor": grid}}
    end, total = odeint(
        rate, (x, x.new_zeros(x.shape[0])), times, method=method, rtol=tolerance, atol=tolerance, **options
    )
    return torch.where(field.circular, wrap(end[-1]), end[-1]), total[-1]


def field_from_architecture(
    circular: Tensor, architecture: Mapping[str, Any], factor: Tensor | None = None
) -> VectorField:
    """Rebuild a vector field from its ``architecture`` (weights come with the state dict)."""
    return VectorField(circular, **architecture, factor=factor)


def save_teacher(path: str | Path, teacher: VectorField) -> None:
    """Write a teacher as safetensors."""
    header = {"format": KIND, "format_version": 1, "architecture": teacher.architecture}
    header["origin"] = teacher.origin
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in teacher.state_dict().items()}
    write_safetensors(Path(path), tensors | {"circular": teacher.circular.cpu()}, header)


def load_teacher(path: str | Path, device: str | torch.device = "cpu") -> VectorField:
    """Read a teacher.

    Raises:
        InputError: no such file.
        CorruptFileError: damaged, or no teacher of this package.
    """
    header, tensors = read_safetensors(Path(path), KIND, 1)
    teacher = field_from_architecture(tensors.pop("circular"), header["architecture"], tensors.get("prior.factor"))
    teacher.load_state_dict(tensors)
    teacher.origin = header.get("origin", {})
    return teacher.to(device).eval()
