"""Matrix products of the networks, by the quicker of the two libraries that torch has for them on a CPU.

torch gives float32 products to MKL, which uses half the vector width on processors that are not Intel's: 90 to 110
GFLOP/s where oneDNN, in the same torch, reaches 190 to 240 (one thread of an AMD EPYC with AVX-512). oneDNN is taken
where it is known to win, and where a product is large enough to pay for its set-up; everything else (other processors,
devices and types, small products, autocast) stays with torch. Intel's processors with matrix units (AMX) multiply
bfloat16 at three to four times the rate of float32: gradients may be had from there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

#: Multiplications of the smallest product that is worth oneDNN's set-up of ten microseconds.
LEAST_WORK = 128**3
#: Whether `coarse_gradients` is on; autograd runs the backward pass of CPU tensors in the thread that asked for it.
_coarse = False


@contextmanager
def coarse_gradients(enabled: bool = True) -> Iterator[None]:
    """Within, products of a backward pass on a CPU round their factors to bfloat16, with sums in float32.

    Values, and so losses, stay those of float32; a gradient is off by a few thousandths of its length, far less than
    one batch differs from another, at half the time. Put the backward pass alone into it: with AMX it is torch's own
    setting for all float32 products of the process. Elsewhere nothing changes but for what `linear` gives to oneDNN,
    and not where the backward pass itself is differentiated.
    """
    global _coarse
    way = rounding() if enabled else None
    before, _coarse = _coarse, way == "oneDNN"
    setting = _matmul_setting() if way == "AMX" else None
    if setting:
        former, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        _coarse = before
        if setting:
            setting.fp32_precision = former


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """``x weight^T + bias``, as ``torch.nn.functional.linear``, and ``x sigmoid(x)`` of that if wished.

    Args:
        x: `(..., n_in)`.
        weight: `(n_out, n_in)`.
        bias: `(n_out,)`.
        silu: apply the activation; without derivatives in the same pass over memory.
    """
    rows, shape = x.numel() // max(1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if not _worth_it(x, weight, rows):
        result = nn.functional.linear(x, weight, bias)
    elif _differentiating():
        result = _Linear.apply(x.reshape(rows, x.shape[-1]), weight, bias, 1).view(shape)
    else:
        return _onednn(x.reshape(rows, x.shape[-1]), weight, bias, "swish" if silu else "none").view(shape)
    return nn.functional.silu(result) if silu else result


def columns(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` with the samples last: `(n, n_in)` -> contiguous `(n_out, n)`."""
    if not _worth_it(x, weight, len(x)):
        return torch.addmm(bias[:, None], weight, x.T)
    if not _differentiating():
        return _onednn(weight, x, None).add_(bias[:, None])
    return _Linear.apply(weight, x, bias, 0)


class Linear(nn.Linear):
    """``torch.nn.Linear`` through `linear`; its weights have the same names."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., n_in)` -> `(..., n_out)`."""
        return linear(input, self.weight, self.bias)


class SiluLinear(Linear):
    """A linear layer and its activation, ``silu(x W^T + b)``."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., n_in)` -> `(..., n_out)`."""
        return linear(input, self.weight, self.bias, silu=True)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, activation, [], "")


def _differentiating() -> bool:
    """Whether anything records or carries derivatives, backwards or forwards: oneDNN's own call knows none."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _worth_it(x: Tensor, weight: Tensor, rows: int) -> bool:
    return (
        rows * weight.numel() >= LEAST_WORK
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and onednn_is_quicker()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    """``a b^T + bias`` by oneDNN, differentiable any number of times, and forwards (for divergences of teachers).

    The bias runs along ``axis`` of the result: 1, as in a linear layer, or 0 for one whose samples come last.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        result = _onednn(a, b, bias if axis else None)
        return result if axis or bias is None else result.add_(bias[:, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        a, b, bias, axis = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.has_bias, ctx.axis = bias is not None, axis

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (a, b), needs = grads, ctx.saved_tensors, ctx.needs_input_grad
        of_bias = g.sum(1 - ctx.axis) if ctx.has_bias and needs[2] else None
        if not (g.is_contiguous() or g.T.is_contiguous()):  # of a sum, one number for all: oneDNN would crawl
            g = g.contiguous()
        if _coarse and not torch.is_grad_enabled():
            g, a, b = g.bfloat16(), a.bfloat16(), b.bfloat16()
        of_a = _Linear.apply(g, b.T, None, 1).float() if needs[0] else None
        # g^T a, as the transpose of a^T g: oneDNN takes its second factor as it lies but copies a first one that is
        # transposed, and a is several times smaller than the gradient of a spline's parameters.
        of_b = None
        if needs[1]:
            turned = _Linear.apply(a.T, g.T, None, 1).T
            of_b = turned.to(torch.float32, memory_format=torch.contiguous_format)  # one pass for both
        return of_a, of_b, of_bias, None

    @staticmethod
    def jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None, bias_t: Tensor | None, _: None) -> Tensor:
        a, b = ctx.saved_tensors
        parts = [
            None if a_t is None else _Linear.apply(a_t, b, None, 1),
            None if b_t is None else _Linear.apply(a, b_t, None, 1),
            None if bias_t is None else bias_t.expand(len(a), -1) if ctx.axis else bias_t[:, None].expand(-1, len(b)),
        ]
        return sum(part for part in parts if part is not None)  # type: ignore[return-value]


@cache
def rounding() -> Literal["oneDNN", "AMX"] | None:
    """By what `coarse_gradients` multiplies on this processor; None where it would gain nothing."""
    try:
        if onednn_is_quicker():
            return "oneDNN" if torch.cpu._is_avx512_bf16_supported() else None
        return "AMX" if _matmul_setting() and torch.cpu._is_amx_tile_supported() else None
    except AttributeError:  # another torch
        return None


def _matmul_setting() -> Any:
    """Where torch keeps whether oneDNN may round the factors of float32 products; None in a torch without it."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if torch.backends.mkldnn.is_available() and hasattr(setting, "fp32_precision") else None


@cache
def onednn_is_quicker() -> bool:
    """Whether this processor has AVX-512, is not Intel's, and torch's oneDNN multiplies correctly."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        if "vendor_id\t: GenuineIntel" in Path("/proc/cpuinfo").read_text():
            return False
        a, b = torch.linspace(-1, 1, 60).view(20, 3), torch.linspace(-2, 1, 21).view(7, 3)
        found = _onednn(a, b, None)
    except (OSError, AttributeError, RuntimeError, NotImplementedError):  # another system, or another torch
        return False
    return bool(torch.allclose(found, a @ b.T, atol=1e-5))
