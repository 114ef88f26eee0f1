"""What a flow is for: ``sample``, ``evaluate``, ``check``, ``mcmc``, ``tfep``."""

from pathlib import Path
from typing import Annotated

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
    platform_of_dynamics,
    report_of,
    resumable,
    show_table,
    use_platform,
)
from openmm_regflow.errors import InputError

RefineSamples = Annotated[
    int, typer.Option(help="Annealing steps that carry every sample to the target; weights stay unbiased.")
]
TestData = Annotated[
    Path | None,
    typer.Option(help="Test trajectory (HDF5, DCD, NetCDF) that did not train the flow; default: the system's own."),
]


@command
def sample(
    flow: FlowFile,
    output: Output = Path("runs/sample"),
    system: System = None,
    n: Annotated[int, typer.Option("-n", help="Samples.")] = 10_000,
    refine_samples: RefineSamples = 0,
    equilibrium: Annotated[
        int,
        typer.Option(min=0, help="Write as many of the samples, none twice, that need no weights: equilibrium.dcd."),
    ] = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Samples with log-densities, energies and weights: a DCD trajectory and an .npz.

    Example: openmm-regflow sample systems/alanine-dipeptide/flow.safetensors -n 10000 --output runs/samples
    """
    from openmm_regflow import reweighting
    from openmm_regflow.outputs import drawn, ess_words, timed, write_batch, write_equilibrium

    if equilibrium > n:
        raise InputError(f"--equilibrium {equilibrium} of {n} samples; raise -n")
    system, mol, proposal = open_proposal(flow, system, device)
    described = {"flow": str(flow), "system": system, "n": n, "seed": seed, "refine_samples": refine_samples}
    described |= {"equilibrium": equilibrium} if equilibrium else {}
    with output_of(output, "sample", described, overwrite), bars() as bar:
        with timed(bar, "samples", n):
            batch, annealed = drawn(proposal, n, seed, refine_samples)
        kept = write_batch(output, batch, mol, density=annealed is None)
        words = write_equilibrium(output, batch, mol, equilibrium, seed) if equilibrium else None
    for name, value in annealed.rows() if annealed else []:
        print(f"{name}: {value}")
    print(f"ESS {ess_words(batch.log_weights, seed)} of {n:,} samples")
    print(reweighting.verdict(batch.log_weights.cpu()))
    print(f"wrote {kept:,} frames to {output / 'samples.dcd'}")
    if words:
        print(words)


@command
def evaluate(
    flow: FlowFile,
    output: Output = Path("runs/evaluate"),
    system: System = None,
    n: Annotated[int, typer.Option("-n", help="Samples.")] = 20_000,
    refine_samples: RefineSamples = 0,
    data: TestData = None,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """ESS, E-W1, T-W2, chirality, delta F against a test set: a table, plots and metrics.json.

    Example: openmm-regflow evaluate systems/alanine-dipeptide/flow.safetensors --output runs/evaluate
    """
    from openmm_regflow.outputs import write_evaluation

    system, mol, proposal = open_proposal(flow, system, device)
    reference = given_frames(mol, data, "test")
    described = {"flow": str(flow), "system": system, "n": n, "seed": seed, "refine_samples": refine_samples}
    with output_of(output, "evaluate", described | {"data": str(data)}, overwrite), bars() as bar:
        rows = write_evaluation(proposal, mol, reference, output, n, seed, refine_samples, bar)
    show_table(f"{mol.name}: {n:,} samples", [("figure", "value"), *rows])


@command
def check(
    system: Annotated[str, typer.Argument(help="Name of a system or path of a system folder.")],
    flow: FlowFile,
    atoms: Annotated[
        str | None,
        typer.Option(
            "--atoms",
            help="Part of the System that the flow moves: an mdtraj selection, or numbers from 0 such as '0-21' or "
            "'4,0-2' in the flow's order. Default: all.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Flow samples for the kernel test.")] = 2000,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the findings.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Is this flow exact on this System? Round trip, log-determinant, energies, what the System has, the kernel.

    Prints a table and a verdict; exit code 1 if something fails.

    Example: openmm-regflow check my-system/ runs/my-flow/flow.safetensors

    Example: openmm-regflow check my-box/ runs/my-flow/flow.safetensors --atoms "protein"
    """
    from openmm_regflow.check import run_checks
    from openmm_regflow.device import resolve_device
    from openmm_regflow.files import write_json
    from openmm_regflow.mixtures import load_flow
    from openmm_regflow.potentials import cpu_platform
    from openmm_regflow.systems import load_system, select_atoms

    report_of(output, flow)
    platform = use_platform(device)
    molecule = load_system(system)
    platform = platform or cpu_platform(molecule.system)
    loaded = load_flow(flow, resolve_device(device))
    subset = None if atoms is None else select_atoms(molecule.topology, atoms)
    with bars() as bar:
        progress = bar("kernel", n)
        report = run_checks(
            loaded, molecule, n=n, seed=seed, progress=progress, atom_subset=subset, platform=platform
        )
    show_table(f"{flow} on {molecule.name}", [("what", "found", ""), *report.rows()])
    print(report.verdict)
    if output:
        write_json(output, report.to_dict())
    if not report.passed:
        raise typer.Exit(1)


@command
def mcmc(
    flow: FlowFile,
    output: Output = Path("runs/mcmc"),
    system: System = None,
    iterations: Annotated[int, typer.Option(help="Iterations of dynamics and flow move.")] = 1000,
    md_steps: Annotated[int, typer.Option(min=0, help="Langevin steps per iteration.")] = 250,
    n_proposals: Annotated[int, typer.Option(help="1: Metropolis-Hastings; more: i-SIR.")] = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """An openmmtools chain of Langevin dynamics and flow moves: a DCD trajectory and statistics.

    On a GPU the dynamics run on OpenMM's CUDA platform; a molecule of a hundred atoms may well be faster on the CPU.

    Example: openmm-regflow mcmc systems/alanine-dipeptide/flow.safetensors --iterations 1000 --output runs/mcmc
    """
    from openmm_regflow import reweighting
    from openmm_regflow.chains import run_chain, write_trajectory
    from openmm_regflow.files import write_json
    from openmm_regflow.moves import FlowMove

    system, mol, proposal = open_proposal(flow, system, device)
    platform = platform_of_dynamics(device, mol.system)
    settings = {"flow": str(flow), "system": system, "iterations": iterations, "md_steps": md_steps, "seed": seed}
    with output_of(output, "mcmc", settings | {"n_proposals": n_proposals}, overwrite):
        with bars() as bar:
            trace = run_chain(
                mol,
                FlowMove(proposal, n_proposals=n_proposals, seed=seed),
                n_iterations=iterations,
                n_md_steps=md_steps,
                platform=platform,
                seed=seed,
                progress=bar("chain", iterations),
            )
        write_trajectory(output / "chain.dcd", trace.positions, mol.topology)
        record = trace.statistics | {"longest_stretch": reweighting.longest_stretch(trace.accepted)}
        write_json(output / "statistics.json", record)
    print(reweighting.chain_verdict(trace.accepted))
    print(f"wrote {output / 'chain.dcd'} and {output / 'statistics.json'}")


@command
def tfep(
    source: Annotated[Path, typer.Argument(help="A states file (.toml), or a flow file (.safetensors).")],
    output: Output = Path("runs/tfep"),
    system: System = None,
    n: Annotated[int | None, typer.Option("-n", help="Flow samples; 20,000 by default.")] = None,
    data: TestData = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; default the states file's, or 0.")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Free energy difference by targeted perturbation, with pymbar.

    Of the two states that a TOML file describes, with their trajectories; or, given a flow, of the basins phi > 0 and
    phi < 0 of its system.

    Example: openmm-regflow tfep states.toml --output runs/tfep
    """
    if source.suffix == ".toml":
        if data is not None:
            raise InputError("--data goes with a flow; a states file names the trajectories of its states")
        if system is not None or n is not None:
            raise InputError("--system and -n go with a flow; a states file says them of its states")
        from openmm_regflow.device import resolve_device
        from openmm_regflow.tfep import load_states, run_states

        where = resolve_device(device)
        config = load_states(source)
        config = config if seed is None else config.model_copy(update={"seed": seed})
        kept = any(state.simulate is not None for state in (config.a, config.b))
        with output_of(output, "tfep", config.model_dump(mode="json"), overwrite), resumable(kept), bars() as bar:
            result = run_states(config, source.parent, output, device=where, stage=bar)
    else:
        import torch

        from openmm_regflow.files import write_json
        from openmm_regflow.outputs import basin_tfep

        seed, n = seed or 0, 20_000 if n is None else n
        system, mol, proposal = open_proposal(source, system, device)
        reference = given_frames(mol, data, "test")
        described = {"flow": str(source), "system": system, "n": n, "seed": seed, "data": str(data)}
        with output_of(output, "tfep", described, overwrite):
            batch = proposal.sample(n, torch.Generator(device=proposal.device).manual_seed(seed))
            result = basin_tfep(batch, proposal, mol, reference, seed)
            write_json(output / "tfep.json", result.to_dict())
    print(result)
    if source.suffix == ".toml" and config.map != "identity":  # else there is nothing to compare with
        print(f"without a map: {'no overlap' if result.plain is None else result.plain}")
        plain = result.plain
        if plain and plain.uncertainty < result.uncertainty and not plain.verdict.startswith("do not trust"):
            print("the map did not help: without it the error is smaller; take that value, or train the map longer")
    print(result.verdict)
