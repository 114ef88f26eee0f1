"""Recording a block function and handing it to `torch.compile`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_regflow.compiling import WithFallback
from openmm_regflow.potentials.base import register_materialise

#: A function of coordinates (x, y, z), each `(n_blocks, n_atoms, lanes)`, and of nested coefficients.
BlockFunction = Callable[[tuple[Tensor, ...], list[dict[str, Tensor]]], tuple[Tensor, ...]]

# A number of blocks that no other axis has: axes of equal length would share a symbol in the recorded graph.
_SYMBOLIC_BLOCKS = 10_007


class CompiledBlocks(WithFallback):
    """A block function, compiled once for any number of blocks from two upwards; called without gradient recording.

    The function (with the derivative taken inside, where it has one) is recorded as a single graph of tensor
    operations, which `torch.compile` then fuses; its on-disk cache (``TORCHINDUCTOR_CACHE_DIR``) makes the next
    process skip code generation and the C++ compiler.

    Args:
        function: the block function.
        name: what it computes, for the warning.
    """

    def __init__(self, function: BlockFunction, name: str) -> None:
        super().__init__(function, name)
        self._compiled: Callable[..., Any] | None = None

    def quick(self, *arguments: Any) -> Any:
        """The compiled function, recorded on the first call."""
        x, constants = arguments
        if self._compiled is None:
            register_materialise()
            record = make_fx(self.plain, tracing_mode="symbolic", _allow_non_fake_inputs=True)
            self._compiled = torch.compile(record(_symbolic(x), constants))
        for c in x:
            torch._dynamo.mark_dynamic(c, 0)
        return self._compiled(x, constants)


def _symbolic(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Stand-ins for coordinates, with any number of blocks, on their device and without memory.

    Real ones would take 15 MB of a GPU for every atom. Recorded on the CPU instead, the code would keep the CPU as the
    device of what it makes, and meet the potential's own tables on the GPU.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # brings SymPy: slow, and needed here alone

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, allow_fallback_kernels=False)
    shapes = [mode.from_tensor(torch.empty((_SYMBOLIC_BLOCKS, *c.shape[1:]), device="meta")).shape for c in x]
    with mode:
        return tuple(torch.empty(shape, dtype=c.dtype, device=c.device) for shape, c in zip(shapes, x))
