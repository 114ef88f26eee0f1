"""What a flow's samples of a molecule become: figures against a reference, a trajectory, plots, a free energy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_regflow import metrics, plots, reweighting, tfep
from openmm_regflow.chains import write_trajectory
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.evaluation import Evaluation, evaluate, reference_block, rotatable_torsions
from openmm_regflow.files import write_json
from openmm_regflow.proposals import FlowProposal, ProposalBatch
from openmm_regflow.sampling import Annealed, annealed_samples
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.tfep import TargetedFreeEnergy
from openmm_regflow.training import Stage

#: Points on either side of the exact T-W2: the cost matrix grows with the square, the solver faster.
TORSION_POINTS = 4000
Rows = list[tuple[str, ...]]


@contextmanager
def timed(stage: Stage | None, name: str, total: int = 1) -> Iterator[None]:
    """A stage that is shown while its block runs and is done with it."""
    progress = stage(name, total) if stage else None
    yield
    if progress:
        progress(total, total, {})


def drawn(proposal: FlowProposal, n: int, seed: int, refine_samples: int = 0) -> tuple[ProposalBatch, Annealed | None]:
    """Samples of a flow, annealed to the target in ``refine_samples`` steps if that is not zero."""
    generator = torch.Generator(device=proposal.device).manual_seed(seed)
    if not refine_samples:
        return proposal.sample(n, generator), None
    found = annealed_samples(proposal, n, generator, n_steps=refine_samples)
    return found.batch, found


def ess_words(log_weights: torch.Tensor, seed: int) -> str:
    """ESS of weights `(n,)` in per cent with its error; without one where there are too few."""
    log_weights = log_weights.cpu()
    ess = f"{100 * reweighting.effective_sample_size(log_weights):.3g}"
    try:
        error = 100 * reweighting.effective_sample_size_error(log_weights, generator=seed)
    except InsufficientDataError:  # of which the verdict says more
        return f"{ess} %"
    return f"{ess} ± {error:.2g} %"


def evaluate_batch(
    batch: ProposalBatch, proposal: FlowProposal, molecule: MolecularSystem, reference: np.ndarray, seed: int
) -> Evaluation:
    """All figures of a batch of flow samples against reference positions `(m, n_atoms, 3)` [nm]."""
    phi, psi = molecule.torsions("phi"), molecule.torsions("psi")
    return evaluate(
        batch.positions.cpu(),
        batch.log_q.cpu(),
        batch.u.cpu(),
        reference,
        proposal.reduced_potential(reference).cpu(),
        phi=phi,
        psi=psi,
        torsions=rotatable_torsions(molecule.topology, but=[*phi, *psi]),
        centres=molecule.chiral_centres,
        n_torsion_points=TORSION_POINTS,
        generator=seed,
    )


def write_evaluation(
    proposal: FlowProposal,
    molecule: MolecularSystem,
    reference: np.ndarray,
    folder: Path,
    n: int,
    seed: int,
    refine_samples: int = 0,
    stage: Stage | None = None,
) -> Rows:
    """Draw samples, write metrics.json, the samples and the plots; the table of figures.

    Args:
        proposal: a flow and its target.
        molecule: its torsions and chiral centres.
        reference: positions `(m, n_atoms, 3)` [nm] of the target that did not train the flow.
        folder: where the files go.
        n: samples.
        seed: of samples and bootstrap.
        refine_samples: annealing steps of every sample.
        stage: makes the progress callback of each stage.
    """
    with timed(stage, "samples", n):
        batch, annealed = drawn(proposal, n, seed, refine_samples)
    with timed(stage, "figures"):
        evaluation = evaluate_batch(batch, proposal, molecule, reference, seed)
    record = evaluation.to_dict() | ({"annealed": annealed.to_dict()} if annealed else {})
    write_json(folder / "metrics.json", record)
    with timed(stage, "plots"):
        draw_samples(folder, molecule, batch, reference, proposal)
        write_batch(folder, batch, molecule, density=annealed is None)
    return [*evaluation.rows(), *(annealed.rows() if annealed else [])]


def write_batch(folder: Path, batch: ProposalBatch, molecule: MolecularSystem, density: bool = True) -> int:
    """Samples as samples.dcd (finite frames) and samples.npz (every row); returns the frames written.

    Annealed samples have weights, but no density that could be written.
    """
    positions = batch.positions.cpu().numpy()
    columns: dict[str, Any] = {"in_trajectory": np.isfinite(positions).all(axis=(1, 2))}
    columns |= {"u": batch.u.cpu().numpy(), "log_weights": batch.log_weights.cpu().numpy()}
    columns |= {"log_q": batch.log_q.cpu().numpy()} if density else {}
    np.savez(folder / "samples.npz", **columns)
    return write_trajectory(folder / "samples.dcd", positions, molecule.topology)


def write_equilibrium(folder: Path, batch: ProposalBatch, molecule: MolecularSystem, n: int, seed: int) -> str:
    """``n`` different samples that need no weights as equilibrium.dcd; what was written, in words with its bias.

    Raises:
        InsufficientDataError: fewer than ``n`` samples have a weight.
    """
    rows, cut = reweighting.accept(batch.log_weights, n, seed)
    positions = batch.positions.cpu().numpy()[rows]
    path = folder / "equilibrium.dcd"
    write_trajectory(path, positions, molecule.topology)
    bias = f"{100 * cut:.2g} % of all weight cut; fewer frames cut less" if cut else "no weight cut"
    return f"wrote {n:,} different frames without weights to {path}: {bias}"


def draw_samples(
    folder: Path, molecule: MolecularSystem, batch: ProposalBatch, reference: np.ndarray, proposal: FlowProposal
) -> dict[str, Path]:
    """Plots of a batch against the reference: energies, weights, and densities of a residue with phi and psi."""
    finite = torch.isfinite(batch.positions).flatten(1).all(1).cpu().numpy()
    x, log_w = batch.positions.cpu().numpy()[finite], batch.log_weights.cpu().numpy()[finite]
    figures = {}
    if len(molecule.backbone_residues):
        both = molecule.backbone_residues[0]
        (phi, psi), (phi_r, psi_r) = (metrics.dihedrals(p, both).T for p in (x, reference))
        panels = {"reference (test)": (phi_r, psi_r), "flow": (phi, psi), "flow, reweighted": (phi, psi, log_w)}
        profiles = {
            "reference (test)": metrics.free_energy_profile(phi_r, block=reference_block(phi_r)),
            "flow": metrics.free_energy_profile(phi),
            "flow, reweighted": metrics.free_energy_profile(phi, log_weights=log_w),
        }
        figures["ramachandran"] = plots.ramachandran(panels)
        figures["free_energy_phi"] = plots.free_energy_profiles(profiles)
    u_reference = proposal.reduced_potential(reference).cpu().numpy()
    figures["energies"] = plots.energies(u_reference, batch.u.cpu().numpy()[finite], log_w)
    figures["weights"] = plots.weights(batch.log_weights.cpu().numpy())
    return {name: plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()}


def basin_tfep(
    batch: ProposalBatch, proposal: FlowProposal, molecule: MolecularSystem, reference: np.ndarray, seed: int
) -> TargetedFreeEnergy:
    """F(phi > 0) - F(phi < 0) of the first phi by TFEP: flow samples one way, frames of each basin the other way.

    Args:
        batch: samples of the flow.
        proposal: the flow and its target.
        molecule: its torsions, its temperature.
        reference: positions `(m, n_atoms, 3)` [nm] of the target that did not train the flow.
        seed: of the bootstrap.

    Raises:
        InputError: a molecule without a backbone phi.
    """
    phi = molecule.torsions("phi")
    if not len(phi):
        raise InputError(
            f"{molecule.name} has no backbone phi, so no basins phi > 0 and phi < 0; give two states in a states file"
        )
    proposal.check_labels(reference[:1000], "the held-out frames")
    # A free molecule lies wherever its dynamics left it; the flow's own density has a frame.
    generator = torch.Generator().manual_seed(seed)
    held_out = proposal.evaluate(proposal.redraw_frame(torch.as_tensor(reference, dtype=torch.float64), generator))
    positive = metrics.dihedrals(held_out.positions.cpu().numpy(), phi)[:, 0] > 0
    angle = metrics.dihedrals(batch.positions.cpu().numpy(), phi)[:, 0]
    log_q, u = held_out.log_q.cpu().numpy(), held_out.u.cpu().numpy()
    return tfep.basin_free_energy(
        batch.log_q.cpu().numpy(),
        batch.u.cpu().numpy(),
        angle < 0,
        angle > 0,
        log_q[~positive],
        u[~positive],
        log_q[positive],
        u[positive],
        temperature=molecule.temperature,
        generator=seed,
    )
