"""Which couplings suit a peptide: architectures side by side, by likelihood alone in equal time.

Every row trains one flow on many frames for each one of the trajectory, for the same number of seconds, and is judged
on frames of other runs: KL(p || q) [nat], and how the log-density of the torsions and that of the stiff coordinates
given the torsions compare with those of the first row, where the two are factors. Finished rows are kept.

    python examples/coupling_layouts.py runs/layouts                   # alanine dipeptide, a quarter of an hour
    python examples/coupling_layouts.py runs/layouts-4 --system alanine-tetrapeptide --copies 100 --seconds 600
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from jacobian_gap import log_evidence

import openmm_regflow as rf
from openmm_regflow import flows, recipes
from openmm_regflow.ensemble import ReducedPotential, frame_mover
from openmm_regflow.files import write_json
from openmm_regflow.flows import FlowMetadata
from openmm_regflow.frames import FramesConfig, more_frames
from openmm_regflow.objectives import LikelihoodLoss
from openmm_regflow.training import Batches, TrainConfig, train

SPLINES: dict[str, Any] = {"n_layers": 8, "torsion_layers": 8, "hidden": 128, "depth": 1, "line_bins": 4}
AFFINE: dict[str, Any] = SPLINES | {"n_layers": 12, "depth": 2, "line_bins": 0, "harmonics": 3}
ROWS: dict[str, dict[str, Any]] = {
    "8 + 12, no bins on lines, three harmonics": AFFINE,
    "8 + 8, four bins on lines, torsions see lines": SPLINES | {"torsions_alone": False},
    "8 + 8, four bins on lines": SPLINES,
    "8 + 8, four bins on lines, three harmonics": SPLINES | {"harmonics": 3},
    "8 + 12, no bins on lines": AFFINE | {"harmonics": 1},
    "8 + 8, four bins on lines, three harmonics, torsions see lines": SPLINES
    | {"harmonics": 3, "torsions_alone": False},
    "8 + 12, no bins on lines, three harmonics, torsions see lines": AFFINE | {"torsions_alone": False},
}


class Bench:
    """Frames and the normalisation of the target, which the rows share."""

    def __init__(self, folder: Path, system: str, copies: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.molecule = rf.load_system(system)
        few, *others = (torch.as_tensor(self.molecule.reference(k)) for k in ("train", "validation", "test"))
        self.others = torch.cat(others)
        self.coordinates = flows.coordinates_for(self.molecule.topology, few)
        config = FramesConfig(copies=copies, moves=1)
        target = FlowMetadata(system, self.molecule.fingerprint, self.molecule.temperature).target
        mover = frame_mover(self.molecule, few, compile=True)
        many, _ = more_frames(few, mover, config, folder / "frames.safetensors", target=target)
        self.y = recipes.features(self.coordinates, many, torch.Generator())
        shipped = rf.Flow.load(self.molecule.folder / "flow.safetensors").fuse()
        potential = ReducedPotential(self.molecule, compile=True)
        self.log_p = -potential(self.others) - log_evidence(shipped, potential, self.others)

    def train(self, architecture: dict[str, Any], seconds: float) -> tuple[flows.Flow, int]:
        """A flow after so many seconds of likelihood, and the steps that it took."""
        flow = flows.spline(self.coordinates, **architecture).fuse()
        loss = LikelihoodLoss(flow.prior)
        rows, generator = self.y[:1024], torch.Generator()
        loss(flow.bijection, (rows,), generator)[0].backward()  # compiled before the clock starts
        config = TrainConfig(
            steps=1_000_000, seconds=seconds, schedule="seconds", batch_size=1024, learning_rate=2e-3, ema=0.998,
            warmup=100, precision="mixed",
        )  # fmt: skip
        history = train(flow.bijection, loss, Batches((self.y,), config.batch_size), config)
        return flow.eval(), history.step[-1]

    @torch.no_grad()
    def judge(self, flow: flows.Flow) -> dict[str, torch.Tensor]:
        """Log-ratio of the densities on frames of other runs and, where they are factors, the log-densities of both."""
        found = {"ratio": self.log_p - flow.log_prob(self.others).double()}
        first, *rest = flow.bijection.parts
        if isinstance(first, rf.bijections.Within):
            y = recipes.features(self.coordinates, self.others, torch.Generator())
            lines = rf.bijections.Composition(rest)
            z, log_det = lines.inverse(y)
            circular = flow.prior.circular
            found["lines"] = log_det - 0.5 * z[:, ~circular].square().sum(1)
            found["torsions"] = first.inverse(z)[1]
        return found


def figures(found: dict[str, torch.Tensor], first: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Means with standard errors; those of factors against the first row, frame by frame."""

    def mean(values: torch.Tensor) -> tuple[float, float]:
        return float(values.mean()), float(values.std() / math.sqrt(len(values)))

    factors = {k: mean(first[k] - found[k]) for k in ("torsions", "lines") if k in found}
    return {"kl": mean(found["ratio"]), "above the first row": mean(found["ratio"] - first["ratio"])} | factors


def table(folder: Path) -> str:
    """The rows of a folder as Markdown."""
    lines = [
        "| couplings (torsions + lines) | steps | KL(p‖q) [nat] | above the first row | of torsions | of lines |",
        "|---|" + "---|" * 5,
    ]
    for path in sorted(folder.glob("[0-9]*.json")):
        f = json.loads(path.read_text())
        parts = [
            f"{f[k][0]:+.3f} ± {f[k][1]:.3f}" if k in f else "–" for k in ("above the first row", "torsions", "lines")
        ]
        lines.append(f"| {f['row']} | {f['steps']:,} | {f['kl'][0]:.3f} ± {f['kl'][1]:.3f} | {' | '.join(parts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default="runs/layouts", help="of finished rows")
    parser.add_argument("--system", default="alanine-dipeptide", help="one that comes with reference frames and a flow")
    parser.add_argument("--copies", type=int, default=20, help="frames for each one of the trajectory")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training for each row")
    options = parser.parse_args()
    bench = Bench(options.folder, options.system, options.copies)
    first: dict[str, torch.Tensor] | None = None
    for k, (row, architecture) in enumerate(ROWS.items()):
        path, judged = options.folder / f"{k}.safetensors", options.folder / f"{k}.json"
        if judged.exists():
            flow, steps = rf.Flow.load(path), json.loads(judged.read_text())["steps"]
        else:
            flow, steps = bench.train(architecture, options.seconds)
            flow.save(path)
        found = bench.judge(flow.fuse())
        first = first or found
        write_json(judged, {"row": row, "steps": steps, **figures(found, first)})
    print(table(options.folder))
