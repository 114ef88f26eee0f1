"""What the time of each part is spent on, by torch's profiler: products, element-wise passes, copies, and the rest."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from openmm_regflow import Flow, TorchPotential, load_system
from openmm_regflow.objectives import FlowMatchingLoss, RegFlowLoss
from openmm_regflow.teachers import VectorField
from speed.energies import frames

PRODUCTS = ("mm", "addmm", "bmm", "matmul", "linear", "_linear_pointwise", "baddbmm")
COPIES = ("copy_", "cat", "index", "clone", "contiguous", "gather", "index_put_", "_index_put_impl_", "stack", "to",
          "_to_copy", "index_select", "index_add_", "fill_", "zero_", "zeros_like", "empty")  # fmt: skip
KINDS = ("products", "element-wise", "copies", "outside of operations")


def measure(repeats: int = 4) -> dict[str, Any]:
    """Shares of the wall-clock of one thread, by kind of operation."""
    torch.set_num_threads(1)
    molecule = load_system("alanine-dipeptide")
    flow = Flow.load(molecule.folder / "flow.safetensors").train()
    z = flow.prior.sample(1024)
    y = flow.bijection(z)[0].detach()
    loss = RegFlowLoss(flow.prior.circular, log_det=1e-3, forward_backward=1e-6)
    field = VectorField(flow.prior.circular, "mlp", 256, 3)
    matching, generator = FlowMatchingLoss(field.prior), torch.Generator().manual_seed(0)
    eager, quick = (TorchPotential(molecule.system, dtype=torch.float32, compile=c) for c in (False, True))
    x = frames(molecule)

    def step() -> None:
        loss(flow.bijection, (z, y, torch.zeros(len(z))), generator)[0].backward()

    def teacher() -> None:
        matching(field, (y,), generator)[0].backward()

    found = {}
    for way in ("eager", "fused"):
        flow.fuse(way == "fused")
        found[f"sampling, batch 8192, {way}"] = shares(lambda: flow.sample(8192), repeats)
        found[f"sampling, batch 32, {way}"] = shares(lambda: flow.sample(32), repeats)
        found[f"RegFlow step, batch 1024, {way}"] = shares(step, repeats)
    found["teacher's step, batch 1024"] = shares(teacher, repeats)
    found["energies, batch 2048, eager"] = shares(lambda: eager(x), repeats)
    found["energies, batch 2048, compiled"] = shares(lambda: quick(x), repeats)
    return found


def shares(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of a call and what part of it each kind of operation takes."""
    for _ in range(3):
        call()
    bare = min(timed(call) for _ in range(repeats))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            call()
    spent = dict.fromkeys(KINDS[:-1], 0.0)
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += 1e-6 * event.self_cpu_time_total / repeats
    # The profiler's own cost falls outside of the operations: they are held against the call without it.
    rest = max(0.0, bare - sum(spent.values()))
    total = rest + sum(spent.values())
    return {"milliseconds": 1e3 * bare, **{k: v / total for k, v in spent.items()}, KINDS[-1]: rest / total}


def timed(call: Callable[[], Any]) -> float:
    """Process time of one call [s]."""
    began = time.process_time()
    call()
    return time.process_time() - began


def kind_of(operation: str) -> str:
    """The kind of an operation of torch; kernels made by `torch.compile` are element-wise."""
    name = operation.removeprefix("aten::").removeprefix("mkldnn::")
    if name in PRODUCTS or "_Linear" in operation:
        return "products"
    return "copies" if name in COPIES else "element-wise"
