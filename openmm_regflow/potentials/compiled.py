"""Recording a block function and handing it to `torch.compile`, with a fall-back to eager execution."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_regflow.potentials.base import register_materialise

#: A function of coordinates (x, y, z), each `(n_blocks, n_atoms, lanes)`, and of nested coefficients.
BlockFunction = Callable[[tuple[Tensor, ...], list[dict[str, Tensor]]], tuple[Tensor, ...]]

# A number of blocks that no other axis has: axes of equal length would share a symbol in the recorded graph.
_SYMBOLIC_BLOCKS = 10_007


#: What has been warned about in this process: a missing compiler is said once, not for every function of every System.
_WARNED: list[str] = []


class CompiledBlocks:
    """A block function, compiled once for any number of blocks from two upwards.

    The function (with the derivative taken inside, where it has one) is recorded as a single graph of tensor
    operations, which `torch.compile` then fuses; its on-disk cache (``TORCHINDUCTOR_CACHE_DIR``) makes the next
    process skip code generation and the C++ compiler. If anything in this chain fails, for example for want of a
    C++ compiler, one warning is given and the function runs eagerly from then on.

    Args:
        function: the block function.
        name: what it computes, for the warning.
    """

    def __init__(self, function: BlockFunction, name: str) -> None:
        self._function, self._name = function, name
        self._compiled: Callable[..., Any] | None = None
        self._worked = False
        self.failed = False

    def __call__(self, x: tuple[Tensor, ...], constants: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """The value of the function; called without gradient recording."""
        if not self.failed:
            try:
                return self._run(x, constants)
            except Exception as error:
                # The chain raises many kinds of error (missing compiler, failed compiler, unsupported operation);
                # the eager function below decides whether the input itself was at fault.
                if self._worked:
                    raise
                self._fall_back(error)
        return self._function(x, constants)

    def _run(self, x: tuple[Tensor, ...], constants: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        if self._compiled is None:
            register_materialise()
            example = tuple(c.new_empty((_SYMBOLIC_BLOCKS, *c.shape[1:])) for c in x)
            record = make_fx(self._function, tracing_mode="symbolic", _allow_non_fake_inputs=True)
            self._compiled = torch.compile(record(example, constants))
        for c in x:
            torch._dynamo.mark_dynamic(c, 0)
        result = self._compiled(x, constants)
        self._worked = True
        return result

    def _fall_back(self, error: Exception) -> None:
        self.failed = True
        if _WARNED:
            return
        _WARNED.append(self._name)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"could not compile {self._name} ({reason}); running eagerly, several times slower. "
            "A C++ compiler on the path (or in the variable CXX) is needed.",
            RuntimeWarning,
            stacklevel=2,
        )
