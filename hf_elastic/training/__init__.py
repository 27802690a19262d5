"""Training supernets: sampling rules, a callback for the stock Trainer, and ElasticTrainer."""

from __future__ import annotations

from hf_elastic.training.auxiliary import RoutingLosses
from hf_elastic.training.callbacks import SubnetSamplingCallback
from hf_elastic.training.growth import PCAGrowthCallback
from hf_elastic.training.head_fusion import HeadFusionCallback
from hf_elastic.training.resume import CompleteCheckpointCallback, last_complete_checkpoint
from hf_elastic.training.routing_loss import RoutingLoss
from hf_elastic.training.sampling import (
    FixedSubnet,
    ProgressiveShrinking,
    RandomSubnet,
    SamplingRule,
    SandwichRule,
)
from hf_elastic.training.targets import Distillation
from hf_elastic.training.trainer import ElasticTrainer, ElasticTrainerMixin

__all__ = [
    "CompleteCheckpointCallback",
    "Distillation",
    "ElasticTrainer",
    "ElasticTrainerMixin",
    "FixedSubnet",
    "HeadFusionCallback",
    "PCAGrowthCallback",
    "ProgressiveShrinking",
    "RandomSubnet",
    "RoutingLoss",
    "RoutingLosses",
    "SamplingRule",
    "SandwichRule",
    "SubnetSamplingCallback",
    "last_complete_checkpoint",
]
