"""Exact Markov kernels on flow proposals, and the loops that use them without openmmtools.

Kernels are pure functions of tensors: explicit generator in, ``(state, info)`` out. Their target is
``exp(-u(x))`` in the measure of ``log_q`` (see :class:`openmm_regflow.proposals.FlowProposal`).

How the frame of a free molecule is handled, and why that is exact. Write a configuration as shape and frame
(centre and orientation). The Boltzmann distribution is that of the shape times any frame distribution with
uniform orientation. One flow step (1) draws an auxiliary frame from the flow's own distribution, which leaves
shape times that distribution invariant; (2) applies a kernel that is invariant for shape times that
distribution; (3) after an acceptance keeps only the new shape, puts it at the old centre and turns it at
random, and after a rejection keeps the old configuration untouched. Steps 1 and 2 map the Boltzmann
distribution of shapes to itself, the acceptance does not depend on the old frame, and step 3 returns a frame
with the old centre and a uniform orientation independent of the shape. So the whole is invariant. Velocities
are independent of positions in equilibrium: they are drawn from Maxwell-Boltzmann after an acceptance and
kept after a rejection.
"""

from openmm_regflow.sampling.adaptive import AdaptiveFlow
from openmm_regflow.sampling.annealed import Annealed, annealed_samples
from openmm_regflow.sampling.hamiltonian import HamiltonianMonteCarlo
from openmm_regflow.sampling.kernels import (
    FlowStatistics,
    KernelInfo,
    ProposalPool,
    flow_kernel,
    independence_metropolis_hastings,
    iterated_sir,
    proposal_log_weights,
    state_log_weight,
)
from openmm_regflow.sampling.mixing import fit_mixture
from openmm_regflow.sampling.openmm_app import FlowReplicaExchange, FlowReporter, FlowSimulation, alternate
from openmm_regflow.sampling.steps import (
    ChainResult,
    FlowStep,
    Orientation,
    ReducedPotential,
    context_potential,
    maxwell_boltzmann,
    new_pool,
    put_back,
    redrawn,
    run_chain,
    seeded_generator,
    system_masses,
)

__all__ = [
    "AdaptiveFlow",
    "Annealed",
    "ChainResult",
    "FlowReplicaExchange",
    "FlowReporter",
    "FlowSimulation",
    "FlowStatistics",
    "FlowStep",
    "HamiltonianMonteCarlo",
    "KernelInfo",
    "Orientation",
    "ProposalPool",
    "ReducedPotential",
    "alternate",
    "annealed_samples",
    "context_potential",
    "fit_mixture",
    "flow_kernel",
    "independence_metropolis_hastings",
    "iterated_sir",
    "maxwell_boltzmann",
    "new_pool",
    "proposal_log_weights",
    "put_back",
    "redrawn",
    "run_chain",
    "seeded_generator",
    "state_log_weight",
    "system_masses",
]
