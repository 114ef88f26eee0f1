"""Flow proposals as Markov moves of openmmtools samplers: exact, batched, and safe across a restart.

``FlowMove`` goes wherever an ``MCMCMove`` goes: ``MCMCSampler``, ``SequenceMove``, ``WeightedMove`` and every
multistate sampler with its NetCDF storage. ``relink`` tells a restarted run where its flow file went.
"""

from openmm_regflow.ladders import exchange_acceptance, temperature_ladder
from openmm_regflow.moves.flow_move import FlowMove
from openmm_regflow.moves.ladder import learned_replica_exchange
from openmm_regflow.moves.ncmc import NCMCFlowMove
from openmm_regflow.moves.registry import relink

__all__ = [
    "FlowMove",
    "NCMCFlowMove",
    "exchange_acceptance",
    "learned_replica_exchange",
    "relink",
    "temperature_ladder",
]
