"""Work that a GPU replays from a recording (a CUDA graph) instead of being told kernel by kernel.

A training step of a flow is about a thousand kernels of a few microseconds each; telling a GPU of them takes several
times as long as they do. `Replayed` records what a function of tensors does, once for each shape of its arguments, and
replays that. It is the function itself on a CPU, and, after one warning, where recording fails.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_regflow.errors import first_line, warn_once
from openmm_regflow.products import coarse_gradients

#: Runs before a recording, on a stream of their own: libraries allocate, kernels are compiled and chosen.
WARM_UP = 3
#: Recordings that are kept; each holds the memory of all its intermediate results.
MOST = 4
#: What a function returns: tensors, or None in place of one.
Values = tuple[Any, ...]


class Replayed:
    """A function of tensors whose work on a GPU is recorded for each shape and replayed from then on.

    The function must do the same for equal shapes: no decisions by values, no random numbers, nothing that is left
    behind except what it returns. What it reads beside its arguments (weights) is read where it lay at the recording,
    so it may change in place, but not move.

    Args:
        function: tensors -> tuple of tensors (or None).
        name: what it computes, for the warning.
        patience: calls with one shape before it is recorded: a recording takes as long as some calls and is for many.

    Attributes:
        failed: it could not be recorded and runs as it is.
        recordings: how many are kept.
    """

    def __init__(self, function: Callable[..., Values], name: str, patience: int = 0) -> None:
        self.function, self.name, self.patience = function, name, patience
        self.failed = False
        self._kept: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Values]] = {}
        self._seen: Counter[Any] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and pickled without its recordings: they are of this process, and of the weights of this module.
        return Replayed, (self.function, self.name, self.patience)

    def forget(self) -> None:
        """Drop the recordings, where what the function does has changed."""
        self._kept.clear()
        self._seen.clear()

    @property
    def recordings(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def __call__(self, *given: Tensor, state: Any = None) -> Values:
        """The function's values; those of a recording are overwritten by the next call with the same shapes.

        Args:
            given: arguments.
            state: what else the function depends on; another state is another recording.
        """
        if self.failed or any(t.device.type != "cuda" for t in given):
            return self.function(*given)
        key = (state, *((t.shape, t.dtype, t.device) for t in given))
        if key not in self._kept:
            self._seen[key] += 1
            if self._seen[key] <= self.patience:
                return self.function(*given)
            with torch.cuda.device(given[0].device):
                places = self._warm_up(given)
                try:
                    graph, values = self._record(places)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # an operation that waits for the GPU, or that cannot be recorded at all
                    self._give_up(error)
                    return self.function(*given)
            if len(self._kept) >= MOST:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = graph, places, values
        graph, places, values = self._kept[key]
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return values

    def _warm_up(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the arguments, where a recording will read them; errors of the function itself are raised here."""
        places = [t.detach().clone() for t in given]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        return places

    def _record(self, places: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Values]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values = self.function(*places)
        return graph, values

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        torch.cuda.synchronize()
        # A recording that broke off leaves torch's random numbers in the belief that it goes on; one that ends well
        # puts that right.
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
        reason = first_line(error)
        warn_once(
            f"could not record {self.name} ({reason}); the GPU is told kernel by kernel, several times slower",
            stacklevel=4,
        )


class Gradients:
    """Loss and gradients of a module in one call, recorded on a GPU.

    Args:
        of: (module, drawn) -> loss and its parts, of tensors alone (``objectives.SplitLoss.of``).
        module: its parameters get their gradients.
        precision: "float32", "mixed" or "bfloat16", as in ``training.TrainConfig``.
        record: False for a loss that draws random numbers or decides by values.

    Attributes:
        names: of the parts.
    """

    def __init__(
        self,
        of: Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]],
        module: nn.Module,
        precision: str = "float32",
        record: bool = True,
    ) -> None:
        self._of, self._module, self._precision = of, module, precision
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        whole: Callable[..., Values] = self._compute
        self._replayed = Replayed(whole, "training steps") if record else whole
        self.names: tuple[str, ...] = ()

    def __call__(self, drawn: tuple[Tensor, ...]) -> Tensor:
        """The loss and its parts `(1 + k,)`; the gradients are in the parameters until the next call."""
        figures, *gradients = self._replayed(*drawn)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return figures

    def _compute(self, *drawn: Tensor) -> Values:
        for parameter in self._parameters:
            parameter.grad = None
        # Rounded weights are not kept from one product to the next: a recording would keep those of its own step.
        enabled = self._precision == "bfloat16"
        with torch.autocast(drawn[0].device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
            total, parts = self._of(self._module, drawn)
        with coarse_gradients(self._precision == "mixed"):
            total.backward()
        self.names = tuple(parts)
        figures = torch.stack([total.detach(), *(p.detach().to(total) for p in parts.values())])
        return figures, *(p.grad for p in self._parameters)
