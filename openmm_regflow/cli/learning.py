"""Training: ``train``, ``refine`` and ``mix``."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmm_regflow.cli.shell import (
    Device,
    FlowFile,
    Output,
    Overwrite,
    Seed,
    System,
    bars,
    command,
    given_frames,
    open_proposal,
    output_of,
    resumable,
    show_table,
)
from openmm_regflow.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from openmm_regflow.ranks import Ranks


@command
@resumable()
def train(
    system: Annotated[str, typer.Argument(help="Name of a system or path of a system folder.")] = "alanine-dipeptide",
    output: Output = Path("runs/train"),
    config: Annotated[Path | None, typer.Option(help="TOML configuration; default: built-in settings.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Training trajectory (HDF5, DCD, NetCDF); default: the system's own.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="Held-out trajectory; default: the system's own.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Overrides the seeds of the configuration.")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Train a flow: teacher, pairs, regression, likelihood phase. Interrupted runs continue.

    Several processes: torchrun --standalone --nproc-per-node 4 -m openmm_regflow train ... shares every batch.

    Example: openmm-regflow train alanine-dipeptide --output runs/aldp-flow
    """
    from openmm_regflow import recipes

    settings = recipes.load_config(config) if config else recipes.RunConfig()
    settings = recipes.with_seed(settings, seed) if seed is not None else settings
    if print_config:
        print(recipes.print_config(settings), end="")
        return
    from openmm_regflow import ranks

    with ranks.job() as peers:
        _train(system, output, settings, data, validation, device, overwrite, peers)


def _train(
    system: str,
    output: Path,
    settings: Any,
    data: Path | None,
    validation: Path | None,
    device: str,
    overwrite: bool,
    peers: "Ranks",
) -> None:
    """`train` on one rank; one of them writes and prints."""
    import torch

    from openmm_regflow import recipes
    from openmm_regflow.constraints import fixed_bonds
    from openmm_regflow.device import resolve_device
    from openmm_regflow.ensemble import ReducedPotential, check_trainable, frame_mover, is_held, rare_phi
    from openmm_regflow.flows import FlowMetadata
    from openmm_regflow.systems import load_system

    where = resolve_device(device)
    mol = load_system(system)
    check_trainable(mol)
    frames = given_frames(mol, data, "train")
    held_out = given_frames(mol, validation, "validation")
    check_held_out(frames, held_out)
    held = is_held(mol, frames)
    provenance = {"config": settings.model_dump(), "data": str(data or f"{mol.name}: train"), "frames": len(frames)}
    metadata = FlowMetadata(mol.name, mol.fingerprint, mol.temperature, provenance)
    described = {"system": system, "config": settings.model_dump(), "data": str(data), "validation": str(validation)}
    described |= {"target": metadata.target}
    with ExitStack() as stack:
        peers.first(lambda: stack.enter_context(output_of(output, "train", described, overwrite)))
        with bars() as bar:
            result = recipes.fit(
                mol.topology,
                torch.as_tensor(frames),
                torch.as_tensor(held_out),
                settings,
                metadata=metadata,
                folder=output / "work",
                stage=bar,
                device=where,
                reduced_potential=ReducedPotential(mol, where, settings.compile)
                if recipes.needs_energies(settings)
                else None,
                mover=frame_mover(mol, torch.as_tensor(frames), where, settings.compile)
                if recipes.needs_mover(settings)
                else None,
                watch=rare_phi(mol, torch.as_tensor(frames)),
                fixed=fixed_bonds(mol.system),
                held=held,
            )
        if peers.main:
            _write_training(output, result)


def check_held_out(frames: "np.ndarray", held_out: "np.ndarray") -> None:
    """Refuse validation frames that are training frames, too: they would tell nothing of what was not seen."""
    known = {frame.tobytes() for frame in frames}
    shared = sum(frame.tobytes() in known for frame in held_out)
    if shared:
        raise InputError(
            f"{shared} of {len(held_out)} validation frames are training frames, too; give frames of an independent "
            "run, or of a later stretch of the same"
        )


def _write_training(output: Path, result: Any) -> None:
    """The flow and what else came out of `train`."""
    from openmm_regflow.files import write_json
    from openmm_regflow.teachers import save_teacher
    from openmm_regflow.training import write_history

    result.flow.save(output / "flow.safetensors")
    result.save_phases(output / "phases")
    if result.field is not None:
        save_teacher(output / "teacher.safetensors", result.field)
    write_history(output / "history.json", result.histories)
    if result.rounds:
        write_json(output / "refinement.json", [record.to_dict() for record in result.rounds])
    for record in result.rounds:
        print(f"refinement: {record.energies:,} energies  ESS {record.ess:.2%}  truncated {record.ess_truncated:.2%}")
    print("  ".join(f"{k} {v:.0f} s" for k, v in result.seconds.items()))
    print(f"wrote {output / 'flow.safetensors'}")


@command
@resumable()
def refine(
    flow: FlowFile,
    output: Output = Path("runs/refine"),
    system: System = None,
    rounds: Annotated[int, typer.Option(help="Pools.")] = 10,
    pool: Annotated[int, typer.Option(help="Flow samples, and energies, per round.")] = 100_000,
    learning_rate: Annotated[float, typer.Option(help="Of each round.")] = 4e-4,
    anchors: Annotated[int, typer.Option(help="Training frames mixed into every pool.")] = 10_000,
    anchor_moves: Annotated[int, typer.Option(help="Monte Carlo trajectories of every frame before each pool.")] = 0,
    rare_share: Annotated[float, typer.Option(help="Least share of the target with a phi on its rare side.")] = 0.0,
    path: Annotated[float, typer.Option(help="Share of the path gradient, which takes forces.")] = 0.0,
    tail: Annotated[float, typer.Option(help="Power of p/q in the weights: below 1, for fewer large ones.")] = 0.0,
    ema: Annotated[float, typer.Option(help="Of the weights.")] = 0.98,
    compile: Annotated[bool, typer.Option("--compile", help="Fused splines, compiled float32 energies.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Trajectory, or work/frames.safetensors of a run; default: the system's own.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Refine a flow on energies: forward KL on its own reweighted samples and on training frames; resumable.

    Several processes: torchrun --standalone --nproc-per-node 2 -m openmm_regflow refine ... share every pool.

    Example: openmm-regflow refine runs/flow/flow.safetensors --rounds 10 --output runs/refined
    """
    from openmm_regflow import ranks
    from openmm_regflow.refinement import RefineConfig

    settings = RefineConfig(
        enabled=True, rounds=rounds, pool=pool, learning_rate=learning_rate, anchors=anchors, anchor_moves=anchor_moves,
        rare_share=rare_share, path=path, tail=tail, ema=ema, seed=seed,
    )  # fmt: skip
    with ranks.job() as peers:
        _refine(flow, system, output, settings, compile, data, device, overwrite, peers)


def _refine(
    flow: Path,
    system: str | None,
    output: Path,
    settings: Any,
    compile: bool,
    data: Path | None,
    device: str,
    overwrite: bool,
    peers: "Ranks",
) -> None:
    """`refine` on one rank; one of them writes and prints."""
    import torch

    from openmm_regflow.ensemble import ReducedPotential, frame_mover, is_held, rare_phi
    from openmm_regflow.errors import IncompatibleFlowError
    from openmm_regflow.flows import FlowMetadata
    from openmm_regflow.frames import frames_of_run
    from openmm_regflow.mixtures import one_flow
    from openmm_regflow.recipes import features
    from openmm_regflow.refinement import refine as run

    system, mol, proposal = open_proposal(flow, system, device)
    opened = one_flow(proposal.flow, "refinement")
    target = FlowMetadata(mol.name, mol.fingerprint, mol.temperature).target
    if data is not None and data.suffix == ".safetensors":
        frames = frames_of_run(data, target)
    else:
        frames = torch.as_tensor(given_frames(mol, data, "train"))
    if is_held(mol, frames) != opened.coordinates.held:
        held, free = f"forces hold {mol.name} in its place", "the flow takes it as free"
        if opened.coordinates.held:
            held, free = "the flow is of a molecule in its place", f"nothing holds {mol.name}"
        raise IncompatibleFlowError(f"{held}, and {free}; train a flow for this System")
    proposal.check_labels(frames[:1000], "the frames")
    described = {"flow": str(flow), "system": system, "data": str(data), "compile": compile}
    described |= {"config": settings.model_dump(), "target": target}
    with ExitStack() as stack:
        peers.first(lambda: stack.enter_context(output_of(output, "refine", described, overwrite)))
        with bars() as bar:
            records = run(
                opened.fuse(compile),
                ReducedPotential(mol, opened.device, compile),
                settings,
                data=frames.to(opened.device),
                mover=frame_mover(mol, frames, opened.device, compile) if settings.anchor_moves else None,
                watch=rare_phi(mol, frames),
                checkpoint=output / "refinement-checkpoint.safetensors",
                progress=bar("refinement", settings.rounds) if peers.main else None,
            )
        if peers.main:
            y = features(opened.coordinates, frames[:1000], torch.Generator().manual_seed(settings.seed))
            refined = {"refinement of": str(flow), "refinement": settings.model_dump()}
            refined["inverse_error"] = opened.secure(y, settings.seed)
            _write_refined(output, opened, refined, records)


def _write_refined(output: Path, flow: Any, refined: dict[str, Any], records: list[Any]) -> None:
    """The flow and what else came out of `refine`."""
    import dataclasses

    from openmm_regflow.files import write_json

    before = flow.metadata.training
    energies = before.get("energies", 0) + records[-1].energies
    refined = refined | {"energies": energies}
    if "refinement" in before:
        refined["refined before"] = [*before.get("refined before", []), before["refinement"]]
    flow.metadata = dataclasses.replace(flow.metadata, training=before | refined)
    flow.save(output / "flow.safetensors")
    write_json(output / "refinement.json", [record.to_dict() for record in records])
    best = min(record.divergence for record in records)
    print(f"KL {records[0].divergence:.3f} -> {best:.3f} nat, {energies:,} energies in all")
    if best == records[0].divergence:
        print("no round was better than the flow as it came, whose weights are kept")
    print(f"wrote {output / 'flow.safetensors'}")


@command
def mix(
    flows: Annotated[list[Path], typer.Argument(help="Two flow files or more, of one system.")],
    output: Output = Path("runs/mixture"),
    system: System = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Of each flow, as often as there are flows; default: fitted.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Samples, and energies, of each flow and of the mixture.")] = 20_000,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Several flows of one system as one proposal: what one of them misses, another may not.

    A mixture's file stands for a flow's wherever one is sampled or asked for densities; a sample of it costs as many
    passes as it has parts. Without shares those of least KL(p || q) are fitted to samples of all parts.

    Example: openmm-regflow mix runs/seed0/flow.safetensors runs/seed1/flow.safetensors --output runs/mixture
    """
    import torch

    from openmm_regflow import reweighting
    from openmm_regflow.mixtures import FlowMixture
    from openmm_regflow.outputs import ess_words, timed
    from openmm_regflow.sampling import fit_mixture

    if n < 1:
        raise InputError(f"-n is {n}; at least one sample of each flow is needed")
    opened = [open_proposal(flow, system, device) for flow in flows]
    name, proposals = opened[0][0], [proposal for *_, proposal in opened]
    mixture = FlowMixture([p.flow for p in proposals], share)  # refuses what cannot be mixed
    described = {"flows": [str(flow) for flow in flows], "system": name, "share": share, "n": n, "seed": seed}
    generator = torch.Generator(device=proposals[0].device).manual_seed(seed)
    with output_of(output, "mix", described, overwrite), bars() as bar:
        with timed(bar, "samples of the parts", n * len(flows)):
            if share is None:
                mixture, batches = fit_mixture(proposals, n, generator)
            else:
                batches = [proposal.sample(n, generator) for proposal in proposals]
        mixture.save(output / "flow.safetensors")
        with timed(bar, "samples of the mixture", n):
            batches.append(proposals[0].with_flow(mixture).sample(n, generator))
    shares = [f"{float(s):.3f}" for s in mixture.shares]
    rows = zip([*map(str, flows), "mixture"], [*shares, ""], (ess_words(b.log_weights, seed) for b in batches))
    show_table(f"{name}: {n:,} samples of each", [("flow", "share", "ESS"), *rows])
    print(reweighting.verdict(batches[-1].log_weights.cpu()))
    print(f"wrote {output / 'flow.safetensors'}")
