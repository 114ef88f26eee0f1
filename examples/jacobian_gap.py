"""What closes the Jacobian gap: every lever alone and together, on alanine dipeptide.

Regression teaches a flow where samples go; the weights of samples are made of its Jacobian. Each row trains one flow
and is judged by its weights: ESS with and without the largest 0.2 %, Pareto k-hat, and the divergence KL(p || q) on
frames that trained nothing. Finished rows are kept; the page that reads them is examples/jacobian_gap.md.

    python examples/jacobian_gap.py runs/gap            # about an hour on one core; give it again after a stop
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import openmm_regflow as rf
from openmm_regflow import flows, recipes, reweighting, teachers
from openmm_regflow.ensemble import ReducedPotential, frame_mover, rare_phi
from openmm_regflow.files import write_json
from openmm_regflow.frames import FramesConfig, more_frames
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss, wrapped_difference
from openmm_regflow.pools import log_normalisation
from openmm_regflow.refinement import RefineConfig, refine
from openmm_regflow.sampling import annealed_samples
from openmm_regflow.slopes import slopes
from openmm_regflow.targets import Pairs, StreamedPairs, optimal_transport_pairs, reflow_pairs
from openmm_regflow.teachers import VectorField, integrate
from openmm_regflow.training import Batches, TrainConfig, train
from openmm_regflow.units import thermal_energy

SYSTEM, SAMPLES, COPIES = "alanine-dipeptide", 20_000, 20
PAIRS, FEW_PAIRS, ODE_STEPS = 100_000, 20_000, 8
FLOW = {"n_layers": 6, "hidden": 96, "n_bins": 8, "line_bins": 4}
TEACHER = TrainConfig(steps=3000, learning_rate=1e-3, validate_every=250, patience=6)
REGRESSION = TrainConfig(steps=2000, learning_rate=1e-3, ema=0.998)
LIKELIHOOD = TrainConfig(steps=1500, learning_rate=1e-3, ema=0.99, warmup=100, validate_every=50, patience=8)
#: Positions `(n, n_atoms, 3)` [nm] -> reduced energies `(n,)` [kT].
Potential = Callable[[torch.Tensor], torch.Tensor]
#: [K] From where a flow is cooled down.
HOT = 600.0
#: Length of the finite differences that stand for Jacobian-vector products, in latent units.
PROBE = 0.05


@dataclass(frozen=True)
class DirectionalLoss(RegFlowLoss):
    """RegFlow that also regresses Jacobian-vector products: the student's difference between neighbours, the teacher's.

    Attributes:
        directional: weight of the squared difference of derivatives along one random unit direction.
    """

    directional: float = 0.0

    def of(self, module: Any, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch (z, y, log-determinant, neighbours of z, their images)."""
        z, y, _, z_near, y_near = drawn
        total, parts = super().of(module, drawn[:3])
        mine = wrapped_difference(module(z_near)[0], module(z)[0], self.circular)
        error = (mine - wrapped_difference(y_near, y, self.circular)) / PROBE
        parts["directional"] = self.directional * error.square().sum(1).mean()
        return total + parts["directional"], parts


def log_evidence(flow: flows.Flow, potential: Potential, frames: torch.Tensor) -> float:
    """log of the integral of ``exp(-u)``, by bridge sampling between a good flow and frames of the target."""
    x, log_q = flow.sample(SAMPLES, torch.Generator().manual_seed(0))
    both = torch.cat([x, frames.to(x)])
    log_p = -potential(both).numpy()
    log_q = torch.cat([log_q, flow.log_prob(frames)])
    return log_normalisation(log_p, log_q.double().numpy(), len(x), len(frames))


class Bench:
    """Data, teacher and pairs that the rows share, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.molecule = folder, rf.load_system(SYSTEM)
        self.few, self.held_out, self.test = (
            torch.as_tensor(self.molecule.reference(split)) for split in ("train", "validation", "test")
        )
        self.potential = ReducedPotential(self.molecule, compile=True)
        self.molecule_kt = thermal_energy(self.molecule.temperature)
        self.many, _ = more_frames(
            self.few,
            frame_mover(self.molecule, self.few, compile=True),
            FramesConfig(copies=COPIES, moves=1),
            folder / "frames",
        )
        self.coordinates = flows.coordinates_for(self.molecule.topology, self.few)
        self.circular = self.coordinates.circular
        shipped = rf.Flow.load(self.molecule.folder / "flow.safetensors").fuse()
        self.log_z = log_evidence(shipped, self.potential, self.test)

    def flow(self, **other: int) -> flows.Flow:
        """A new flow, of other sizes if wished."""
        return flows.spline(self.coordinates, **FLOW | other).fuse()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features `(n, dim)` of frames."""
        return recipes.features(self.coordinates, x, torch.Generator().manual_seed(0))

    def teacher(self, name: str, x: torch.Tensor) -> VectorField:
        """A residual MLP trained by flow matching on frames; read if it exists."""
        path = self.folder / f"teacher-{name}.safetensors"
        if path.exists():
            return teachers.load_teacher(path)
        field = VectorField(self.circular, "mlp", 256, 3, 0)
        loss, y = FlowMatchingLoss(self.flow().prior), self.features(self.held_out)

        def judge(module: torch.nn.Module) -> float:
            g = torch.Generator().manual_seed(0)
            return sum(float(loss(module, (y,), g)[0]) for _ in range(5))

        train(field, loss, Batches((self.features(x),), 512), TEACHER, validation=judge)
        teachers.save_teacher(path, field)
        return field

    def pairs(self, name: str, x: torch.Tensor) -> Pairs:
        """Reflow pairs with log-determinants from the teacher of that name."""
        options: dict[str, Any] = {
            "n_steps": ODE_STEPS,
            "log_det": "hutchinson",
            "folder": self.folder / f"pairs-{name}",
        }
        return reflow_pairs(self.teacher(name, x), PAIRS, seed=1, **options)

    def neighbours(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents one probe away from those of the pairs, and where the teacher carries them."""
        v = torch.randn(pairs.z.shape, generator=torch.Generator().manual_seed(2))
        z = pairs.z + PROBE * v / v.norm(dim=1, keepdim=True)
        field = self.teacher("few", self.few)
        return z, torch.cat([integrate(field, part, n_steps=ODE_STEPS)[0] for part in z.split(8192)])

    def judge(self, flow: flows.Flow) -> dict[str, float]:
        """Figures of a flow's weights."""
        flow.eval()
        x, log_q = flow.sample(SAMPLES, torch.Generator().manual_seed(5))
        u = self.potential(x)
        log_w = torch.where(torch.isfinite(u), -u - log_q, -torch.inf).double().numpy()
        ratio = (-self.potential(self.test) - self.log_z - flow.log_prob(self.test).double()).numpy()
        (inside,) = rare_phi(self.molecule, self.test)
        ess, cut = reweighting.effective_sample_size, reweighting.truncated_effective_sample_size
        return {
            "ess": ess(log_w),
            "ess_error": reweighting.effective_sample_size_error(log_w),
            "ess_truncated": cut(log_w),
            "k_hat": reweighting.pareto_k(log_w),
            "kl": float(ratio.mean()),
            "kl_error": float(ratio.std() / math.sqrt(len(ratio))),
            "phi_positive": float(inside(x).double().mean() / inside(self.test).double().mean()),
            "u_excess": float(u.median() - self.potential(self.test).median()),
        }


def regression(bench: Bench, source: Any, loss: RegFlowLoss) -> flows.Flow:
    """A flow regressed on pairs, a tuple of tensors, or on a stream."""
    flow = bench.flow()
    train(flow.bijection, loss, Batches(source, 512) if isinstance(source, tuple) else source, REGRESSION)
    return flow


def likelihood(
    bench: Bench,
    flow: flows.Flow,
    x: torch.Tensor,
    noise: float = 0.0,
    rate: float = 1e-3,
    path: float = 0.0,
    held_out: torch.Tensor | None = None,
    **settings: str,
) -> flows.Flow:
    """The flow after likelihood on frames, stopped by held-out ones; with their forces by the path gradient."""
    y = bench.features(bench.held_out if held_out is None else held_out)
    clean = LikelihoodLoss(flow.prior)

    def judge(module: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(clean(module, (y,), torch.Generator())[0])

    config = LIKELIHOOD.model_copy(update={"learning_rate": rate, **settings})
    data = (bench.features(x),)
    if path:
        y, _, _, slope = slopes(bench.coordinates, x.double(), bench.potential)
        data = (y.float(), slope.float())
    train(flow.bijection, LikelihoodLoss(flow.prior, noise, path), Batches(data, 512), config, validation=judge)
    return flow


def refined(bench: Bench, flow: flows.Flow, anchors: int, path: float = 0.0, rounds: int = 10) -> flows.Flow:
    """The flow after pools of 50,000 energies, with and without frames in them."""
    config = RefineConfig(rounds=rounds, pool=50_000, anchors=anchors, path=path)
    refine(flow, bench.potential, config, data=bench.many)
    return flow


def with_reverse_kl(bench: Bench, flow: flows.Flow, steps: int = 1300, n: int = 384) -> flows.Flow:
    """The flow after likelihood on frames with half of the reverse KL, E_q[log q + u], added: 500,000 energies."""
    y, g = bench.features(bench.many), torch.Generator().manual_seed(3)
    potential = rf.TorchPotential(bench.molecule.system, dtype=torch.float32, compile=True)
    optimizer = torch.optim.Adam(flow.bijection.parameters(), lr=3e-4)
    for _ in range(steps):
        back, log_det = flow.bijection.inverse(y[torch.randint(len(y), (512,), generator=g)])
        loss = -(flow.prior.log_prob(back) + log_det).mean()
        features, log_det = flow.bijection(flow.prior.sample(n, g))
        x, log_volume = flow.coordinates.to_positions(features.double())
        energy, force = (t.double() / bench.molecule_kt for t in potential.energy_and_forces(x.detach().float()))
        fine = torch.isfinite(x).flatten(1).all(1) & torch.isfinite(energy) & (energy < energy.median() + 100)
        along = -(force * x).sum((1, 2))[fine]  # the gradient of the energy, as that of a number
        loss = loss + 0.5 * (along - log_det[fine] - log_volume[fine]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.bijection.parameters(), 1.0)
        optimizer.step()
    return flow


def with_annealed_pools(bench: Bench, flow: flows.Flow, pools: int = 10, n: int = 2380) -> flows.Flow:
    """The flow after ten pools of annealed samples, at 21 energies each, weighted: 500,000 energies."""
    potential = rf.TorchPotential(bench.molecule.system, dtype=torch.float32, compile=True)
    proposal = rf.FlowProposal(flow, potential, bench.molecule.temperature, allow_mismatch=True)
    optimizer, kept = torch.optim.Adam(flow.bijection.parameters(), lr=3e-4), []
    for k in range(pools):
        made = annealed_samples(proposal, n, torch.Generator().manual_seed(k), n_steps=4).batch
        w = reweighting.normalised_weights(made.log_weights.numpy())
        rows = torch.multinomial(torch.as_tensor(w), n, replacement=True, generator=torch.Generator().manual_seed(k))
        kept.append(bench.features(made.positions[rows]))  # a replay buffer of all pools so far
        y, g = torch.cat(kept), torch.Generator().manual_seed(k)
        for _ in range(100):
            back, log_det = flow.bijection.inverse(y[torch.randint(len(y), (512,), generator=g)])
            loss = -(flow.prior.log_prob(back) + log_det).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.bijection.parameters(), 1.0)
            optimizer.step()
    return flow


def cooled(bench: Bench, pools: int = 10) -> flows.Flow:
    """Row: likelihood on frames of 600 K, then pools of 50,000 energies whose temperature falls to the target's."""
    hot = replace(bench.molecule, temperature=HOT)

    def heated(name: str, x: torch.Tensor) -> torch.Tensor:
        mover = frame_mover(hot, x, compile=True)
        made, _ = more_frames(x, mover, FramesConfig(copies=COPIES, moves=1), bench.folder / f"hot-{name}")
        return made[COPIES // 4 * len(x) :]  # the first copies are still cold

    held_out = heated("held-out", bench.held_out)
    flow = likelihood(bench, bench.flow(), heated("frames", bench.few), held_out=held_out)
    ratio = HOT / bench.molecule.temperature
    for k in range(1, pools + 1):
        colder = ratio ** (k / pools - 1)  # the target's temperature over that of this pool
        config = RefineConfig(rounds=1, pool=50_000, anchors=0, final_rate=0.5, seed=k)
        refine(flow, lambda x, part=colder: part * bench.potential(x), config, data=bench.many)
    return flow


def of_pairs(n: int, **weights: float) -> Any:
    """Row: regression on the first n pairs of the teacher of few frames."""

    def run(bench: Bench, start: Any) -> flows.Flow:
        p = bench.pairs("few", bench.few)
        tensors = (p.z[:n], p.y[:n], p.log_det[:n])
        return regression(bench, tensors, RegFlowLoss(bench.circular, forward_backward=1e-6, **weights))

    return run


def directional(**weights: float) -> Any:
    """Row: regression on values and Jacobian-vector products."""

    def run(bench: Bench, start: Any) -> flows.Flow:
        p = bench.pairs("few", bench.few)
        loss = DirectionalLoss(bench.circular, forward_backward=1e-6, directional=1e-2, **weights)
        return regression(bench, (p.z, p.y, p.log_det, *bench.neighbours(p)), loss)

    return run


def transport(bench: Bench, start: Any) -> flows.Flow:
    """Row: exact optimal transport between the prior and all frames."""
    y = bench.features(bench.few)
    z = bench.flow().prior.sample(len(y), torch.Generator().manual_seed(1))
    p = optimal_transport_pairs(z, y, bench.circular)
    return regression(bench, (p.z, p.y), RegFlowLoss(bench.circular, forward_backward=1e-6))


def streamed(bench: Bench, start: Any) -> flows.Flow:
    """Row: fresh pairs in every step."""
    stream = StreamedPairs(bench.teacher("few", bench.few), 512, n_steps=ODE_STEPS)
    return regression(bench, stream, RegFlowLoss(bench.circular, forward_backward=1e-6))


def teacher_of_many(bench: Bench, start: Any) -> flows.Flow:
    """Row: everything from a teacher that has seen the many frames."""
    p = bench.pairs("many", bench.many)
    return regression(bench, (p.z, p.y, p.log_det), RegFlowLoss(bench.circular, log_det=0.06, forward_backward=1e-6))


LOG_DET = "100,000 pairs, log-determinants"
ALONE = "likelihood alone, 200,000 frames"
BOTH = "regression, then likelihood, 200,000 frames"
#: The last rows judge architecture (6 + 6: couplings of torsions, then of lines), arithmetic and the path gradient.
#: row -> (the row it starts from or None, how it is trained)
ROWS: dict[str, tuple[str | None, Any]] = {
    "OT pairs": (None, transport),
    "20,000 reflow pairs": (None, of_pairs(FEW_PAIRS)),
    "100,000 reflow pairs": (None, of_pairs(PAIRS)),
    "1,024,000 reflow pairs, streamed": (None, streamed),
    LOG_DET: (None, of_pairs(PAIRS, log_det=0.06)),
    "100,000 pairs, Jacobian-vector products": (None, directional()),
    "100,000 pairs, both": (None, directional(log_det=0.06)),
    "teacher of 200,000 frames, log-determinants": (None, teacher_of_many),
    "likelihood alone, 10,000 frames": (None, lambda b, s: likelihood(b, b.flow(), b.few)),
    "the same with noise of 0.1": (None, lambda b, s: likelihood(b, b.flow(), b.few, 0.1)),
    "regression, then likelihood, 10,000 frames": (LOG_DET, lambda b, s: likelihood(b, s, b.few, rate=2e-4)),
    "the same with noise of 0.1 ": (LOG_DET, lambda b, s: likelihood(b, s, b.few, 0.1, rate=2e-4)),
    ALONE: (None, lambda b, s: likelihood(b, b.flow(), b.many)),
    BOTH: (LOG_DET, lambda b, s: likelihood(b, s, b.many)),
    "... then likelihood and reverse KL": (BOTH, lambda b, s: with_reverse_kl(b, s)),
    "... then 10 pools of annealed samples": (BOTH, lambda b, s: with_annealed_pools(b, s)),
    "... then 10 pools, no frames in them": (BOTH, lambda b, s: refined(b, s, 0)),
    "... then 10 pools with 10,000 frames": (BOTH, lambda b, s: refined(b, s, 10_000)),
    "likelihood alone, 200,000 frames, 10 layers": (None, lambda b, s: likelihood(b, b.flow(n_layers=10), b.many)),
    "likelihood alone, 200,000 frames, 6 + 6 layers": (
        None, lambda b, s: likelihood(b, b.flow(torsion_layers=6, torsions_alone=False), b.many),
    ),
    "likelihood alone, 200,000 frames, mixed precision": (
        None, lambda b, s: likelihood(b, b.flow(), b.many, precision="mixed"),
    ),
    "likelihood alone, 200,000 frames, half by the path": (
        None, lambda b, s: likelihood(b, b.flow(), b.many, path=0.5),
    ),
    "likelihood alone, 200,000 frames, then nine tenths by the path": (
        ALONE, lambda b, s: likelihood(b, s, b.many, path=0.9),
    ),
    "likelihood alone, 200,000 frames, then once more": (ALONE, lambda b, s: likelihood(b, s, b.many)),
    "likelihood alone, 200,000 frames, then 10 pools with 10,000 frames": (ALONE, lambda b, s: refined(b, s, 10_000)),
    "the same, nine tenths by the path": (ALONE, lambda b, s: refined(b, s, 10_000, 0.9)),
    "likelihood alone, 200,000 frames, then 20 pools with 10,000 frames": (
        ALONE, lambda b, s: refined(b, s, 10_000, rounds=20),
    ),
    "likelihood alone, 10,000 frames, half by the path": (
        None, lambda b, s: likelihood(b, b.flow(), b.few, path=0.5),
    ),
    "likelihood alone, frames of 600 K, then 10 pools from 560 to 300 K": (None, lambda b, s: cooled(b)),
}  # fmt: skip


def run_row(bench: Bench, name: str) -> None:
    """Train and judge one row; its flow and figures stay in the folder."""
    path = bench.folder / f"{list(ROWS).index(name):02d}.json"
    if path.exists():
        return
    start, make = ROWS[name]
    before = None
    if start is not None:
        before = rf.Flow.load(bench.folder / f"{list(ROWS).index(start):02d}.safetensors").fuse()
    began = time.process_time()
    flow = make(bench, before)
    figures = {"row": name, "minutes": (time.process_time() - began) / 60, **bench.judge(flow)}
    flow.save(path.with_suffix(".safetensors"))
    write_json(path, figures)
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}, flush=True)


def annealing(bench: Bench) -> list[dict[str, float]]:
    """Annealing of samples of two flows: what it gives, and what it costs."""
    path, found = bench.folder / "annealing.json", []
    if path.exists():
        return json.loads(path.read_text())
    potential = rf.TorchPotential(bench.molecule.system, dtype=torch.float32, compile=True)
    for row in (LOG_DET, BOTH):
        flow = rf.Flow.load(bench.folder / f"{list(ROWS).index(row):02d}.safetensors")
        proposal = rf.FlowProposal(flow, potential, bench.molecule.temperature, allow_mismatch=True)
        for steps in (0, 4, 16):
            made = annealed_samples(proposal, 10_000, torch.Generator().manual_seed(6), n_steps=steps)
            log_w = made.batch.log_weights.numpy()
            ess = reweighting.effective_sample_size(log_w)
            error = reweighting.effective_sample_size_error(log_w)
            entry = {"row": row, "steps": steps, "ess": ess, "ess_error": error, "k_hat": reweighting.pareto_k(log_w)}
            found.append(entry | {"energies_per_effective_sample": made.energies / (ess * 10_000)})
    write_json(path, found)
    return found


def table(folder: Path) -> str:
    """The rows of a folder as Markdown."""
    lines = [
        "| | ESS | without the top 0.2 % | k̂ | KL(p‖q) [nat] | median u [kT] | share of φ > 0 | CPU minutes |",
        "|---|" + "---|" * 7,
    ]
    for path in sorted(folder.glob("[0-9]*.json")):
        f = json.loads(path.read_text())
        lines.append(
            f"| {f['row'].strip()} | {100 * f['ess']:.2g} ± {100 * f['ess_error']:.2g} % "
            f"| {100 * f['ess_truncated']:.2g} % | "
            f"{f['k_hat']:.2f} | {f['kl']:.2f} ± {f['kl_error']:.2f} | {f['u_excess']:+.1f} | {f['phi_positive']:.2f} "
            f"| {f['minutes']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default="runs/gap", help="of finished rows; default: runs/gap")
    parser.add_argument("rows", nargs="*", type=int, metavar="row", help="numbers from 0; default: all")
    parser.add_argument("--page", action="store_true", help="put the folder's rows into examples/jacobian_gap.md")
    options = parser.parse_args()
    bench = Bench(options.folder)
    for name in [list(ROWS)[k] for k in options.rows] or ROWS:
        run_row(bench, name)
    print(table(bench.folder))
    if options.page:
        page = Path(__file__).with_suffix(".md")
        head, rest = page.read_text().split("<!-- table: begin -->")
        tail = rest.split("<!-- table: end -->")[1]
        page.write_text(f"{head}<!-- table: begin -->\n{table(bench.folder)}\n<!-- table: end -->{tail}")
    if not options.rows:
        print(*annealing(bench), sep="\n")
