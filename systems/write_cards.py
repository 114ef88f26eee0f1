"""Writes ``systems/<name>/README.md`` and its Ramachandran plot from the files beside it.

Usage: ``python systems/write_cards.py [name ...]``; all systems by default. Figures of a shipped flow come from
``flow_metrics.json``, which ``openmm-regflow evaluate`` wrote (the command is in the card).
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_regflow import metrics, plots
from openmm_regflow.files import read_safetensors
from openmm_regflow.flows import FORMAT_VERSION, KIND, ROUNDED_VERSION, Flow
from openmm_regflow.systems import MolecularSystem, available_systems, load_system

#: Systems whose frames every user makes.
UNSHIPPED = ("alanine-hexapeptide",)


def pair(estimate: dict[str, Any] | None) -> str:
    """A recorded estimate in words."""
    return "not visited" if estimate is None else f"{estimate['value']:.2f} ± {estimate['error']:.2f}"


def ramachandran(molecule: MolecularSystem, path: Path) -> None:
    """One panel for each phi with the psi of the same residue, from the training frames."""
    x = molecule.reference("train")
    torsions = [metrics.dihedrals(x, both).T for both in molecule.backbone_residues]
    panels = {f"φ{k}, ψ{k}": (phi, psi) for k, (phi, psi) in enumerate(torsions, start=1)}
    plots.save(plots.ramachandran(panels), path)


def reference_part(molecule: MolecularSystem, record: dict[str, Any]) -> list[str]:
    """How the reference data were made and what they hold."""
    made = (
        "`python systems/make_reference.py trajectories`, then `python systems/make_reference.py free-energy`"
        if molecule.name == "alanine-dipeptide"
        else f"`python systems/make_reference.py {molecule.name}`"
    )
    lines = ["## Reference data", "", f"Made by {made}. Settings, seeds and versions are in `reference.json`.", ""]
    if molecule.name in UNSHIPPED:
        lines[-2] += " The frames are not in the repository, which is to stay small: make them before training."
    lines += ["| split | frames | engine | ladders × states | iterations used | steps × time step | seeds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for split, entry in record["splits"].items():
        for run in entry["runs"]:
            s = run["settings"]
            lines.append(
                f"| {split} | {entry['frames']} | {run.get('engine', 'openmmtools')} | {run.get('ladders', 1)} × "
                f"{s['n_replicas']} up to {s['max_temperature']:g} K | {run['used_iterations']} | "
                f"{s['steps_per_iteration']} × {1000 * s['timestep']:g} fs | {s['seed']} |"
            )
    lines += ["", "Frames are float32 positions [nm] at the system's temperature, centred; wrong chirality dropped: "]
    lines[-1] += ", ".join(f"{k} {v['wrong_chirality_dropped']}" for k, v in record["splits"].items()) + "; with a cis "
    lines[-1] += "peptide bond: " + ", ".join(f"{k} {v['cis_frames']}" for k, v in record["splits"].items()) + "."
    lines += ["", "| free energy of φ > 0 above φ < 0, runs of all splits together | kT |", "|---|---|"]
    basins = [record, *record.get("basins", [])]
    for k, basin in enumerate(basins, start=1):
        best = basin.get("delta_f_phi_mbar") or basin["delta_f_phi"]
        lines.append(f"| φ{k if len(basins) > 1 else ''} | {pair(best)} |")
    for name in ("unbiased", "biased", "batched"):
        if name in record:
            lines.append(f"| of which {name} runs | {pair(record[name]['delta_f_phi_mbar'])} |")
    mixing = record.get("unbiased", record)
    lines += [
        "",
        f"Mixing of the {'unbiased ' if 'unbiased' in record else ''}runs: {mixing['round_trips']} round trips in "
        f"temperature, swaps accepted {', '.join(f'{a:.2f}' for a in mixing['acceptance'])}, statistical inefficiency "
        f"of cos φ {mixing['inefficiency']:.1f} iterations, {mixing['visits']} entries into 0 < φ < 2 rad (first φ).",
    ]
    if "step_bias" in record:
        command = f"python systems/make_reference.py step-bias runs {molecule.name}"
        bias = record["step_bias"]
        lines += ["", f"Step bias ({bias['definition']}): {bias['value']:.3f} ± {bias['error']:.3f} kT (`{command}`)."]
    if molecule.name == "alanine-dipeptide":
        lines += ["", "Published, umbrella sampling: 4.10 ± 0.26 kT."]
    return [*lines, "", "![Ramachandran plots](ramachandran.png)", ""]


def refine_command(molecule: MolecularSystem, settings: dict[str, Any], source: str, target: str) -> str:
    """The command of one refinement, from what the flow file recorded."""
    names = ("rounds", "pool", "learning_rate", "anchors", "anchor_moves", "rare_share", "tail", "ema")
    options = [k for k in names if settings.get(k)]
    flags = " ".join(f"--{k.replace('_', '-')} {settings[k]}" for k in options)
    flags += " --compile" if settings.get("anchor_moves") else ""
    return f"$ openmm-regflow refine {source}/flow.safetensors --system {molecule.name} {flags} --output {target}"


def stored_bits(path: Path) -> int:
    """In how many bits the weights of a flow file are stored."""
    _, tensors = read_safetensors(path, KIND, FORMAT_VERSION, ROUNDED_VERSION)
    types = {v.dtype for v in tensors.values()}
    return 8 if torch.int8 in types else 16 if torch.float16 in types else 32


def rounding_command(path: str, bits: int) -> str:
    """The command that rounds the weights of a flow file, in place."""
    return f"$ python -c \"from openmm_regflow import Flow; Flow.load('{path}').save('{path}', bits={bits})\""


def flow_part(molecule: MolecularSystem, folder: Path) -> list[str]:
    """The card of the shipped flow."""
    path, figures = folder / "flow.safetensors", folder / "flow_metrics.json"
    if not (path.is_file() and figures.is_file()):
        return []
    flow, found = Flow.load(path), json.loads(figures.read_text())
    training = flow.metadata.training
    refinements = [*training.get("refined before", []), *([training["refinement"]] if "refinement" in training else [])]
    folders = ["runs/flow", *(f"runs/refined-{k + 1}" for k in range(len(refinements)))]
    seconds = ", ".join(f"{k} {v / 60:.1f}" for k, v in training.get("seconds", {}).items())
    a, made = flow.architecture, training.get("frame energies", 0)
    lines = [
        "## The shipped flow",
        "",
        f"`flow.safetensors`: {a['name']}, {a['n_layers']} layers of {a['hidden']} units"
        + (f" behind {a['torsion_layers']} for torsions alone" if a.get("torsion_layers") else "")
        + ", in internal coordinates.",
        "",
        "```console",
        f"$ openmm-regflow train {molecule.name} --config systems/{molecule.name}/train.toml --output runs/flow",
        *(refine_command(molecule, r, *places) for r, places in zip(refinements, pairwise(folders))),
        *([rounding_command(f"{folders[-1]}/flow.safetensors", bits)] if (bits := stored_bits(path)) < 32 else []),
        f"$ openmm-regflow evaluate {folders[-1]}/flow.safetensors --system {molecule.name} -n {found['n']} "
        "-o runs/card",
        "```",
        "",
        f"`train` took, in minutes on one core shared with other work: {seconds}. Energies evaluated in all: "
        f"{training.get('energies', 0):,}" + (f", of these {made:,} for more frames." if made else "."),
        *([training["note"]] if "note" in training else []),
        "",
        f"| figure ({found['n']:,} fresh samples, float64 energies of OpenMM) | |",
        "|---|---|",
        f"| ESS | {100 * found['ess']:.1f} ± {100 * found['ess_error']:.2g} % |",
        f"| ESS, top 0.2 % dropped | {100 * found['ess_truncated']:.1f} ± {100 * found['ess_truncated_error']:.1g} % |",
        f"| Pareto k̂ | {found['k_hat']:.2f} |",
        f"| E-W1 plain / reweighted [kT] | {with_error(found, 'e_w1')} / {with_error(found, 'e_w1_reweighted')} |",
        f"| T-W2 plain / reweighted / floor [rad] | {with_error(found, 't_w2')} / "
        f"{with_error(found, 't_w2_reweighted')} / {found['t_w2_floor']:.3f} |",
        f"| wrong chirality [%] | {with_error(found, 'wrong_chirality', 100)} |",
        f"| ΔF of φ > 0, reweighted [kT] | {found['delta_f_phi_reweighted'][0]:.2f} ± "
        f"{found['delta_f_phi_reweighted'][1]:.2f} |",
        "",
        f"Verdict on the weights: {found['verdict']}.",
        "",
        f"It must not be used for another force field, another solvent model, a temperature other than "
        f"{molecule.temperature:g} K or another atom order (loading refuses), nor without its weights.",
        "",
    ]
    return lines


def with_error(found: dict[str, Any], name: str, factor: float = 1.0) -> str:
    """A figure and its error, where it was measured with one."""
    error = found.get(f"{name}_error")
    return f"{factor * found[name]:.3g}" + ("" if error is None else f" ± {factor * error:.1g}")


def write_card(name: str) -> None:
    """README.md and ramachandran.png of one system."""
    molecule = load_system(name)
    folder = molecule.folder
    if folder is None:
        raise SystemExit(f"{name} has no folder")
    lines = [f"# {name}", "", f"{molecule.description}; {molecule.n_atoms} atoms, {molecule.temperature:g} K. "]
    lines[-1] += "Force field and non-bonded method are in `system.toml`."
    lines.append("")
    record = folder / "reference.json"
    if record.is_file():
        if (folder / "reference" / "train.h5").is_file():
            ramachandran(molecule, folder / "ramachandran.png")
        lines += reference_part(molecule, json.loads(record.read_text()))
    else:
        lines += [f"No reference data are shipped; `python systems/make_reference.py {name}` makes them.", ""]
    lines += flow_part(molecule, folder)
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of systems: {', '.join(available_systems())}")
    np.set_printoptions(precision=3)
    for system in parser.parse_args().names or available_systems():
        write_card(system)
