"""The whole job on alanine dipeptide: reference data, a flow, samples, a chain, a free energy, a report.

Every figure in the report is computed in the run that writes it.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from openmm_regflow import metrics, plots, reweighting
from openmm_regflow._version import __version__
from openmm_regflow.chains import ChainTrace, run_chain, write_trajectory
from openmm_regflow.device import resolve_device
from openmm_regflow.ensemble import ReducedPotential, frame_mover, rare_phi
from openmm_regflow.errors import InputError
from openmm_regflow.evaluation import Evaluation
from openmm_regflow.files import read_json, write_json
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.frames import FramesConfig
from openmm_regflow.moves import FlowMove
from openmm_regflow.outputs import Rows, basin_tfep, draw_samples, evaluate_batch, write_batch
from openmm_regflow.potentials import OpenMMPotential, cpu_platform
from openmm_regflow.proposals import FlowProposal, ProposalBatch
from openmm_regflow.recipes import (
    FitResult,
    FlowConfig,
    LikelihoodConfig,
    PairsConfig,
    RegressionConfig,
    RunConfig,
    Stage,
    TeacherConfig,
    fit,
    needs_mover,
)
from openmm_regflow.refinement import RefineConfig
from openmm_regflow.report import Figure, Table, write_report
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.teachers import save_teacher
from openmm_regflow.tfep import TargetedFreeEnergy
from openmm_regflow.training import Progress, TrainConfig, write_history

SYSTEM = "alanine-dipeptide"
FLOW_FILE = "flow.safetensors"
#: Proposals per flow move: a batch of 32 costs less than the density at the current state does.
PROPOSALS = 32
#: Name of the refinement's panel among the training curves.
REFINED = "refinement: 1 − ESS"

LEAD = (
    "A flow trained by regression on alanine dipeptide (Ace-Ala-Nme, amber99sbildn with OBC implicit solvent, 300 K) "
    "proposes whole conformations. Every figure below was computed in the run that wrote this page. The effective "
    "sample size (ESS) says what the samples are worth after reweighting: without it no other figure counts."
)
CAPTIONS = {
    "ramachandran": (
        "Ramachandran plots",
        "Backbone torsions of held-out reference data, of the flow as it is, and of the flow reweighted to the target.",
    ),
    "energies": ("Energies", "Potential energy of the same three sets; the reweighted one must cover the reference."),
    "weights": ("Weights", "Importance weights of the flow samples; a long tail to the right means a small ESS."),
    "free_energy_phi": ("Free energy along φ", "Bands are one standard error; the φ > 0 basin is the hard one."),
    "training": ("Training", "Each phase has a loss and a unit of its own; the refinement counts energies."),
    "phi_time": ("φ against time", "Langevin dynamics with and without flow moves, for the same wall-clock time."),
}


def demo_config(seed: int = 0) -> RunConfig:
    """Training settings sized for ten minutes on two CPU cores, chains and plots included."""
    return RunConfig(
        frames=FramesConfig(copies=15, moves=1, seed=seed),
        flow=FlowConfig(n_layers=10, hidden=64, depth=2, torsion_layers=6, torsion_hidden=48, line_bins=0, seed=seed),
        teacher=TeacherConfig(
            hidden=256, depth=3, seed=seed, train=TrainConfig(steps=4000, seconds=110, learning_rate=1e-3, seed=seed)
        ),
        pairs=PairsConfig(n=50_000, n_steps=8, log_det="hutchinson", seed=seed + 1),
        regression=RegressionConfig(
            forward_backward=1e-6,
            log_det=0.06,
            train=TrainConfig(steps=1500, seconds=110, learning_rate=1e-3, ema=0.998, seed=seed),
        ),
        likelihood=LikelihoodConfig(
            train=TrainConfig(
                steps=1500, seconds=70, learning_rate=1e-3, ema=0.99, validate_every=50, patience=5, seed=seed
            )
        ),
        refinement=RefineConfig(enabled=True, rounds=6, pool=40_000, rare_share=0.05, seed=seed),
    )


@dataclass
class Monitor:
    """What a run tells the person who waits; the default tells nothing.

    Attributes:
        say: one line of text.
        bar: (name, total) -> progress callback; opens a progress bar.
    """

    say: Callable[[str], None] = lambda text: None
    bar: Stage | None = None

    def progress(self, name: str, total: int) -> Progress:
        """A progress callback, open or null."""
        return self.bar(name, total) if self.bar else lambda done, total, figures: None


@dataclass
class DemoResult:
    """Outcome of `run_demo`.

    Attributes:
        metrics: every figure, as written to metrics.json.
        tables: (title, rows), each table's first row its header.
        verdicts: what to think of the figures, in words.
        seconds: wall-clock by part [s].
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    tables: list[tuple[str, Rows]] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time of a block to `seconds`."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


@dataclass
class Chains:
    """Dynamics with and without flow moves, for equal wall-clock.

    Attributes:
        mixed: Langevin dynamics and flow moves.
        plain: Langevin dynamics alone.
        phi_mixed: `(n,)` first backbone phi [rad].
        phi_plain: `(m,)` likewise.
    """

    mixed: ChainTrace
    plain: ChainTrace
    phi_mixed: np.ndarray
    phi_plain: np.ndarray

    def rows(self) -> Rows:
        """Table of both chains."""
        crossings = [metrics.count_crossings(p) for p in (self.phi_mixed, self.phi_plain)]
        accepted, proposed = (self.mixed.statistics.get(k, 0) for k in ("n_accepted", "n_proposed"))
        return [
            ("", "Langevin + FlowMove", "Langevin alone"),
            ("wall-clock [s]", f"{self.mixed.seconds[-1]:.1f}", f"{self.plain.seconds[-1]:.1f}"),
            ("iterations", f"{len(self.mixed.seconds):,}", f"{len(self.plain.seconds):,}"),
            ("Langevin steps", f"{self.mixed.md_steps:,}", f"{self.plain.md_steps:,}"),
            ("proposals per flow move", f"{self.mixed.statistics.get('n_proposals', 0) / max(proposed, 1):.0f}", "-"),
            ("flow moves accepted", f"{accepted / max(proposed, 1):.1%} of {proposed:,.0f}", "-"),
            ("crossings of phi", str(crossings[0]), str(crossings[1])),
            ("fraction with phi > 0", f"{(self.phi_mixed > 0).mean():.4f}", f"{(self.phi_plain > 0).mean():.4f}"),
        ]


def run_demo(
    folder: Path,
    *,
    pretrained: bool = False,
    seed: int = 0,
    device: str = "cpu",
    n_samples: int = 20_000,
    chain_seconds: float | None = None,
    config: RunConfig | None = None,
    monitor: Monitor | None = None,
) -> DemoResult:
    """Train (or load) a flow for alanine dipeptide and show what it does.

    Args:
        folder: where everything is written; an interrupted training in it is continued.
        pretrained: use the flow shipped with the system.
        seed: of training, samples and chains.
        device: of the flow.
        n_samples: flow samples for the reweighted figures.
        chain_seconds: wall-clock of each of the two chains [s]; default 40, with a pretrained flow 15.
        config: training settings; default `demo_config`.
        monitor: progress; default silent.

    Raises:
        InputError: no shipped flow, or missing reference data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    monitor, result = monitor or Monitor(), DemoResult()
    molecule = load_system(SYSTEM)
    test = molecule.reference("test")
    with result.clock("training"):
        flow, trained = obtain_flow(folder, molecule, pretrained, config or demo_config(seed), device, monitor)
    flow.save(folder / FLOW_FILE)
    platform = cpu_platform(molecule.system) if flow.device.type == "cpu" else None
    proposal = FlowProposal(flow, OpenMMPotential(molecule.system, platform), molecule.temperature)
    monitor.say(f"drawing {n_samples:,} samples")
    with result.clock("samples, densities, energies"):
        batch = proposal.sample(n_samples, torch.Generator().manual_seed(seed))
    with result.clock("evaluation"):
        evaluation = evaluate_batch(batch, proposal, molecule, test, seed)
        stages = phase_rows(trained, proposal, seed)
    seconds = chain_seconds or (15.0 if pretrained else 40.0)
    with result.clock("chains"):
        chains = run_chains(molecule, proposal, seconds, seed, monitor)
    with result.clock("free energy"):
        free_energy = basin_tfep(batch, proposal, molecule, test, seed)
    with result.clock("plots and files"):
        figures = draw(folder, molecule, batch, test, proposal, chains, trained)
        write_samples(folder, batch, chains, molecule)
    _tabulate(result, molecule, evaluation, stages, chains, free_energy, trained)
    _write(folder, result, figures, molecule, flow, pretrained, seed)
    return result


def obtain_flow(
    folder: Path, molecule: MolecularSystem, pretrained: bool, config: RunConfig, device: str, monitor: Monitor
) -> tuple[Flow, FitResult | None]:
    """The shipped flow, or one trained here on the training split alone (validation stops the last phase)."""
    if pretrained:
        path = (molecule.folder or Path()) / FLOW_FILE
        if not path.is_file():
            raise InputError(f"no flow is shipped for {molecule.name}; run the demo without --pretrained")
        return Flow.load(path, resolve_device(device)), None
    train, held_out = (torch.as_tensor(molecule.reference(split)) for split in ("train", "validation"))
    # A minute of compilation pays where millions of energies are wanted.
    where, many = resolve_device(device), needs_mover(config)
    provenance = {"config": config.model_dump(), "data": f"{molecule.name}: train", "frames": len(train)}
    trained = fit(
        molecule.topology,
        train,
        held_out,
        config,
        metadata=FlowMetadata(molecule.name, molecule.fingerprint, molecule.temperature, provenance),
        folder=folder / "work",
        stage=monitor.bar,
        device=where,
        reduced_potential=ReducedPotential(molecule, where, compile=many),
        mover=frame_mover(molecule, train, where, compile=True) if many else None,
        watch=rare_phi(molecule, train),
    )
    if trained.field is not None:
        save_teacher(folder / "teacher.safetensors", trained.field)
    write_history(folder / "history.json", trained.histories)
    return trained.flow, trained


def phase_rows(trained: FitResult | None, proposal: FlowProposal, seed: int, n: int = 10_000) -> Rows:
    """ESS of the student after each training phase, on fresh samples."""
    if trained is None:
        return []
    rows: Rows = [("after", "samples", "ESS", "ESS without the top 0.2 %", "median u [kT]")]
    final = {k: v.clone() for k, v in trained.flow.bijection.state_dict().items()}
    for name, state in trained.phases.items():
        trained.flow.bijection.load_state_dict(state)
        batch = proposal.sample(n, torch.Generator().manual_seed(seed + 1))
        weights = batch.log_weights.cpu()
        whole, cut = reweighting.effective_sample_size(weights), reweighting.truncated_effective_sample_size(weights)
        rows.append((name, f"{n:,}", f"{whole:.2%}", f"{cut:.2%}", f"{float(batch.u.median()):.1f}"))
    trained.flow.bijection.load_state_dict(final)
    return rows


def run_chains(
    molecule: MolecularSystem, proposal: FlowProposal, seconds: float, seed: int, monitor: Monitor
) -> Chains:
    """Both chains, each for `seconds` of wall-clock from the same start."""
    move = FlowMove(proposal, n_proposals=PROPOSALS, pool_size=2048, seed=seed)
    traces = []
    for name, flow_move in (("Langevin+flow", move), ("Langevin", None)):
        progress = monitor.progress(name, int(seconds))
        traces.append(run_chain(molecule, flow_move, seconds=seconds, seed=seed, progress=progress))
    phi = molecule.torsions("phi")
    mixed, plain = traces
    return Chains(mixed, plain, *(metrics.dihedrals(t.positions, phi)[:, 0] for t in traces))


def write_samples(folder: Path, batch: ProposalBatch, chains: Chains, molecule: MolecularSystem) -> None:
    """Every conformation of the run as a trajectory that mdtraj and VMD open."""
    write_batch(folder, batch, molecule)
    write_trajectory(folder / "chain_flow.dcd", chains.mixed.positions, molecule.topology)
    write_trajectory(folder / "chain_md.dcd", chains.plain.positions, molecule.topology)


def draw(
    folder: Path,
    molecule: MolecularSystem,
    batch: ProposalBatch,
    reference: np.ndarray,
    proposal: FlowProposal,
    chains: Chains,
    trained: FitResult | None,
) -> dict[str, Path]:
    """Every plot of the report, by name."""
    paths = draw_samples(folder, molecule, batch, reference, proposal)
    series = {"Langevin + FlowMove": chains.phi_mixed, "Langevin alone": chains.phi_plain}
    steps = {name: t.seconds[-1] / len(t.seconds) for name, t in zip(series, (chains.mixed, chains.plain))}
    figure = plots.chains(series, time_step=steps, unit="s of wall-clock")
    paths["phi_time"] = plots.save(figure, folder / "phi_time.png")
    if trained is not None:
        curves = plots.training_curves(_curves(trained), {REFINED: "energies evaluated"})
        paths["training"] = plots.save(curves, folder / "training.png")
    return paths


def _curves(trained: FitResult) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Curves by stage, in the form that `plots.training_curves` draws."""
    curves = {name: {"training": (h.step, h.loss)} for name, h in trained.histories.items()}
    for name, history in trained.histories.items():
        if history.validation:
            curves[name]["held out"] = (history.validation_step, history.validation)
    if trained.rounds:
        pools = [r.energies for r in trained.rounds]
        curves[REFINED] = {
            "all weights": (pools, [1 - r.ess for r in trained.rounds]),
            "top 0.2 % dropped": (pools, [1 - r.ess_truncated for r in trained.rounds]),
        }
    return curves


def recorded_delta_f(molecule: MolecularSystem) -> dict[str, Any] | None:
    """The reference free energy recorded beside the shipped data, None if there is no record."""
    path = (molecule.folder or Path()) / "reference.json"
    record = read_json(path, "copy it again") if path.is_file() else {}
    return record.get("delta_f_phi_mbar") or record.get("delta_f_phi")


def _tabulate(
    result: DemoResult,
    molecule: MolecularSystem,
    evaluation: Evaluation,
    stages: Rows,
    chains: Chains,
    free_energy: TargetedFreeEnergy,
    trained: FitResult | None,
) -> None:
    figures = [row for row in evaluation.rows() if row[0] != "verdict"]
    result.tables.append(("Flow samples against the test set", [("figure", "value"), *figures]))
    if stages:
        result.tables.append(("What each training phase gives", stages))
    result.tables.append(("Chains of equal wall-clock", chains.rows()))
    rows: Rows = [("estimate of F(φ>0) − F(φ<0)", "kT", "kJ/mol")]
    rows.append(("TFEP through the flow", *(_pair(*free_energy.in_units(u)) for u in ("kT", "kJ/mol"))))
    recorded = recorded_delta_f(molecule)
    if recorded:
        rows.append(("recorded with the reference data", _pair(recorded["value"], recorded["error"]), ""))
    rows.append(("published, umbrella sampling", "4.10 ± 0.26", ""))
    result.tables.append(("Free energy between the basins", rows))
    if trained is not None:
        result.seconds |= {f"training: {k}": v for k, v in trained.seconds.items()}
    timings: Rows = [("part", "seconds"), *((k, f"{v:.1f}") for k, v in result.seconds.items())]
    result.tables.append(("Wall-clock", timings))
    result.verdicts |= {"samples": evaluation.verdict, "free energy": free_energy.verdict}
    result.metrics = {
        "evaluation": evaluation.to_dict(),
        "phases": stages,
        "chains": {"table": chains.rows(), "flow_move": chains.mixed.statistics},
        "tfep": free_energy.to_dict(),
        "recorded_delta_f_phi": recorded,
        "seconds": result.seconds,
    }


def _pair(value: float, error: float) -> str:
    return f"{value:.2f} ± {error:.2f}"


def _write(
    folder: Path,
    result: DemoResult,
    figures: dict[str, Path],
    molecule: MolecularSystem,
    flow: Flow,
    pretrained: bool,
    seed: int,
) -> None:
    provenance = {
        "package": f"openmm_regflow {__version__}",
        "libraries": f"OpenMM {openmm.Platform.getOpenMMVersion()}, torch {torch.__version__}, NumPy {np.__version__}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads, device {flow.device}",
        "flow": "shipped with the system" if pretrained else "trained in this run",
        "system": f"{molecule.name}, {molecule.n_atoms} atoms, {molecule.temperature:g} K",
        "seed": str(seed),
    }
    write_json(folder / "metrics.json", result.metrics | {"provenance": provenance})
    write_report(
        folder / "report.html",
        title="Alanine dipeptide with a RegFlow proposal",
        lead=LEAD,
        tables={name: Table(rows[1:], rows[0]) for name, rows in result.tables},
        figures={CAPTIONS[name][0]: Figure(path, CAPTIONS[name][1]) for name, path in figures.items()},
        verdicts=result.verdicts,
        provenance=provenance,
    )
