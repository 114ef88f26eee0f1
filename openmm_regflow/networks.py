"""Conditioner and vector-field networks: residual MLPs and transformers over tokens; no physics here."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from openmm_regflow.errors import InputError
from openmm_regflow.products import Linear, SiluLinear, columns

#: Attention heads of a transformer, unless it is told otherwise.
HEADS = 4
#: Outputs of a head that are computed by one product in a training step.
SMALL_HEAD = 256


class Conditioner(nn.Module):
    """What a coupling takes its parameters from: `(n, n_in)` -> `(n, n_out)`, or in parts with the samples last."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    @property
    def floats_per_sample(self) -> int:
        """About how many numbers a sample takes at once, outside any recording of gradients; 0 where unknown."""
        return 0

    def columns(self, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        """`(n, n_in)` -> tensors `(size, n)`, whose sizes add up to n_out."""
        return self(x).T.split(sizes)


class HeadedNetwork(Conditioner):
    """A conditioner that ends in a linear head.

    A head that parametrises splines has a dozen times more outputs than the network has inputs. Written at once in
    parts with the samples last, as a spline reads them, they need not be moved, nor their gradients be put together,
    unless they are so few that one product is quicker than several.
    """

    head: nn.Linear

    @property
    def floats_per_sample(self) -> int:
        """A few layers, and the parameters with what a spline makes of them."""
        return 4 * self.head.in_features + 6 * self.head.out_features

    def hidden(self, x: Tensor) -> Tensor:
        """What the head sees, `(n, n_in)` -> `(n, width)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`(n, n_in)` -> `(n, n_out)`."""
        return self.head(self.hidden(x))

    def columns(self, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        """`(n, n_in)` -> contiguous tensors `(size, n)`."""
        h = self.hidden(x)
        if not torch.is_grad_enabled() or sum(sizes) <= SMALL_HEAD:
            return columns(h, self.head.weight, self.head.bias).split(sizes)
        parts = zip(self.head.weight.split(sizes), self.head.bias.split(sizes))
        return tuple(columns(h, weight, bias) for weight, bias in parts)


class MLP(HeadedNetwork):
    """Plain multilayer perceptron with SiLU activations.

    Args:
        n_in: input features.
        n_out: output features.
        hidden: width of every hidden layer.
        depth: number of hidden layers.
        zero_init: start the last layer at zero, so that what it parametrises starts as the identity.
    """

    def __init__(self, n_in: int, n_out: int, hidden: int = 128, depth: int = 2, zero_init: bool = True) -> None:
        super().__init__()
        widths = [n_in] + [hidden] * depth
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [SiluLinear(a, b), nn.Identity()]  # the place that activations had: files name weights by it
        self.body = nn.Sequential(*layers)
        self.head = Linear(widths[-1], n_out)
        if zero_init:
            zero_(self.head)

    def hidden(self, x: Tensor) -> Tensor:
        """`(n, n_in)` -> `(n, hidden)`."""
        return self.body(x)


class ResidualMLP(HeadedNetwork):
    """Residual network of pre-activation blocks ``h + W2 silu(W1 silu(h))``.

    Args:
        n_in: input features.
        n_out: output features.
        hidden: width of the residual stream.
        depth: number of residual blocks.
        zero_init: start the last layer at zero.
    """

    def __init__(self, n_in: int, n_out: int, hidden: int = 128, depth: int = 2, zero_init: bool = True) -> None:
        super().__init__()
        self.lift = Linear(n_in, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), SiluLinear(hidden, hidden), nn.Identity(), Linear(hidden, hidden))
            for _ in range(depth)
        )
        self.head = Linear(hidden, n_out)
        if zero_init:
            zero_(self.head)

    def hidden(self, x: Tensor) -> Tensor:
        """`(n, n_in)` -> `(n, hidden)`."""
        h = self.lift(x)
        for block in self.blocks:
            h = h + block(h)
        return nn.functional.silu(h)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention block, optionally modulated by a condition (adaLN-Zero, Peebles & Xie 2023).

    Args:
        width: token width.
        heads: attention heads; must divide ``width``.
        n_condition: width of the condition vector, 0 for none.
    """

    def __init__(self, width: int, heads: int, n_condition: int = 0) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"{heads} attention heads do not divide a width of {width}; choose a divisor")
        self.heads = heads
        affine = n_condition == 0
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.feed = nn.Sequential(Linear(width, 2 * width), nn.GELU(), Linear(2 * width, width))
        self.modulation = Linear(n_condition, 6 * width) if n_condition else None
        if self.modulation is not None:
            zero_(self.modulation)

    def attend(self, h: Tensor) -> Tensor:
        """Multi-head self-attention over tokens, `(n, tokens, width)` -> the same."""
        n, tokens, width = h.shape
        q, k, v = self.qkv(h).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # Written out: the fused kernel has no forward-mode derivative, which exact divergences need.
        mixed = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        """`(n, tokens, width)`, condition `(n, n_condition)` -> `(n, tokens, width)`."""
        if self.modulation is None or condition is None:
            h = h + self.attend(self.norm1(h))
            return h + self.feed(self.norm2(h))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        h = h + gate1 * self.attend(self.norm1(h) * (1 + scale1) + shift1)
        return h + gate2 * self.feed(self.norm2(h) * (1 + scale2) + shift2)


class TokenTransformer(Conditioner):
    """Transformer from one set of tokens to another: the conditioner of Jet couplings.

    Known tokens carry values; asked-for tokens enter with their learned embedding alone, and their outputs
    are read off. (Kolesnikov et al. 2024, "Jet".) A token is ``token_size`` consecutive elements: an atom, where the
    features are Cartesian and whole atoms are kept and transformed.

    Args:
        n_in: input features, split into tokens of ``token_size``, the last one padded with zeros.
        n_out: output features.
        token_size: elements per token, on both sides.
        places: `n_out` pairs (element, slot): the transformed element that an output belongs to, and which of that
            element's parameters it is; None: output i is the only parameter of element i.
        hidden: token width.
        depth: number of blocks.
        heads: attention heads.
    """

    order: Tensor

    def __init__(
        self,
        n_in: int,
        n_out: int,
        token_size: int,
        places: Sequence[tuple[int, int]] | None = None,
        hidden: int = 64,
        depth: int = 2,
        heads: int = HEADS,
    ) -> None:
        super().__init__()
        places = [(i, 0) for i in range(n_out)] if places is None else places
        slots = 1 + max(slot for _, slot in places)
        self.token_size = token_size
        self.n_known = math.ceil(n_in / token_size)
        self.n_asked = math.ceil((1 + max(element for element, _ in places)) / token_size)
        order = [element * slots + slot for element, slot in places]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.heads = heads
        self.lift = Linear(token_size, hidden)
        self.known = nn.Parameter(0.5 * torch.randn(self.n_known, hidden))
        self.asked = nn.Parameter(0.5 * torch.randn(self.n_asked, hidden))
        self.blocks = nn.ModuleList(TransformerBlock(hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.head = Linear(hidden, token_size * slots)
        zero_(self.head)

    @property
    def floats_per_sample(self) -> int:
        """Scores of every pair of tokens before, in and after the softmax; queries, keys, values and what follows."""
        tokens, width = self.n_known + self.n_asked, self.known.shape[1]
        return 3 * self.heads * tokens**2 + 8 * tokens * width

    def forward(self, x: Tensor) -> Tensor:
        """`(n, n_in)` -> `(n, n_out)`."""
        n = x.shape[0]
        padded = nn.functional.pad(x, (0, self.n_known * self.token_size - x.shape[1]))
        known = self.lift(padded.view(n, self.n_known, self.token_size)) + self.known
        h = torch.cat([known, self.asked.expand(n, -1, -1)], dim=1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, self.n_known :])).flatten(1)[:, self.order]


class TimeEmbedding(nn.Module):
    """Fourier features of a time in [0, 1].

    Args:
        n_features: number of features (even).
    """

    frequencies: Tensor

    def __init__(self, n_features: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, n_features // 2 + 1, dtype=torch.float32))

    def forward(self, t: Tensor) -> Tensor:
        """`(n,)` -> `(n, n_features)`."""
        angles = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_(layer: nn.Linear) -> None:
    """Set a linear layer to the zero map in place."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
