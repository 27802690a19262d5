"""hf-elastic: elastic language models on unpatched transformers and peft.

Importing the package registers ``elastic_bert``, ``elastic_llama`` and ``elastic_gpt2`` with the transformers Auto
classes; everything else is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_elastic.late_imports import on_first_use
from hf_elastic.models import register_auto_classes

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ imports on first use
    from hf_elastic import costs as costs
    from hf_elastic import distillation as distillation
    from hf_elastic import evaluation as evaluation
    from hf_elastic import objectives as objectives
    from hf_elastic import proxies as proxies
    from hf_elastic import runtimes as runtimes
    from hf_elastic import spaces as spaces
    from hf_elastic import testing as testing
    from hf_elastic.adapters import ElasticLoraConfig as ElasticLoraConfig
    from hf_elastic.adapters import ExtractedAdapter as ExtractedAdapter
    from hf_elastic.adapters import SubnetStatistics as SubnetStatistics
    from hf_elastic.adapters import add_lora as add_lora
    from hf_elastic.adapters import extract_adapter as extract_adapter
    from hf_elastic.adapters import load_adapter as load_adapter
    from hf_elastic.checkpoint import ExportReport as ExportReport
    from hf_elastic.checkpoint import export as export
    from hf_elastic.checkpoint import extract as extract
    from hf_elastic.checkpoint import save_quantized as save_quantized
    from hf_elastic.compression import QuantizationReport as QuantizationReport
    from hf_elastic.compression import SparsityReport as SparsityReport
    from hf_elastic.compression import quantize_ as quantize_
    from hf_elastic.compression import sparsify_ as sparsify_
    from hf_elastic.compression import sparsity_of as sparsity_of
    from hf_elastic.conversion import make_elastic as make_elastic
    from hf_elastic.declaration import ElasticConfig as ElasticConfig
    from hf_elastic.errors import ActivationError as ActivationError
    from hf_elastic.errors import ArchitectureError as ArchitectureError
    from hf_elastic.errors import CheckpointError as CheckpointError
    from hf_elastic.errors import CompressionError as CompressionError
    from hf_elastic.errors import DataError as DataError
    from hf_elastic.errors import ElasticError as ElasticError
    from hf_elastic.errors import ExportError as ExportError
    from hf_elastic.errors import InfeasibleError as InfeasibleError
    from hf_elastic.errors import SearchError as SearchError
    from hf_elastic.errors import SpaceError as SpaceError
    from hf_elastic.errors import StorageError as StorageError
    from hf_elastic.errors import TrainingError as TrainingError
    from hf_elastic.errors import UnsupportedModelError as UnsupportedModelError
    from hf_elastic.families import FAMILIES as FAMILIES
    from hf_elastic.families import Family as Family
    from hf_elastic.fusion import FusionReport as FusionReport
    from hf_elastic.hub.card import model_card as model_card
    from hf_elastic.hub.pushing import PushPlan as PushPlan
    from hf_elastic.hub.pushing import PushReport as PushReport
    from hf_elastic.hub.pushing import plan_push as plan_push
    from hf_elastic.hub.pushing import push_to_hub as push_to_hub
    from hf_elastic.importance import set_layer_order as set_layer_order
    from hf_elastic.importance import sort_by_importance_ as sort_by_importance_
    from hf_elastic.layers import Skip as Skip
    from hf_elastic.packed_format import unpack_ as unpack_
    from hf_elastic.pipeline import CompressOptions as CompressOptions
    from hf_elastic.pipeline import CompressResult as CompressResult
    from hf_elastic.pipeline import ElmOptions as ElmOptions
    from hf_elastic.pipeline import ElmResult as ElmResult
    from hf_elastic.pipeline import compress as compress
    from hf_elastic.pipeline import make_elm as make_elm
    from hf_elastic.proxies import score as score
    from hf_elastic.repair.fusing import fuse_heads as fuse_heads
    from hf_elastic.repair.recovery import RecoverReport as RecoverReport
    from hf_elastic.repair.recovery import recover as recover
    from hf_elastic.repair.refitting import RefitReport as RefitReport
    from hf_elastic.repair.refitting import refit as refit
    from hf_elastic.repair.refitting import refitted as refitted
    from hf_elastic.repair.teacher_cache import TeacherCache as TeacherCache
    from hf_elastic.repair.teacher_cache import cache_teacher as cache_teacher
    from hf_elastic.routers_folder import save_routers as save_routers
    from hf_elastic.routing import CalibrationReport as CalibrationReport
    from hf_elastic.routing import RouterFit as RouterFit
    from hf_elastic.routing import RoutingConfig as RoutingConfig
    from hf_elastic.routing import RoutingStatistics as RoutingStatistics
    from hf_elastic.routing import add_routing as add_routing
    from hf_elastic.routing import calibrate_routing as calibrate_routing
    from hf_elastic.routing import fit_routers as fit_routers
    from hf_elastic.routing import load_routers as load_routers
    from hf_elastic.routing import routing_statistics as routing_statistics
    from hf_elastic.routing import set_capacity as set_capacity
    from hf_elastic.routing import train_routers as train_routers
    from hf_elastic.search import Evaluation as Evaluation
    from hf_elastic.search import Objective as Objective
    from hf_elastic.search import SearchResult as SearchResult
    from hf_elastic.search import search_subnets as search_subnets
    from hf_elastic.search.processes import ProcessExecutor as ProcessExecutor
    from hf_elastic.search.samplers import uniform_evolution as uniform_evolution
    from hf_elastic.space import Architecture as Architecture
    from hf_elastic.space import Choice as Choice
    from hf_elastic.space import Condition as Condition
    from hf_elastic.space import SearchSpace as SearchSpace
    from hf_elastic.supernet import Supernet as Supernet
    from hf_elastic.tables.block_latencies import BlockLatencyTable as BlockLatencyTable
    from hf_elastic.tables.block_latencies import LatencyCheck as LatencyCheck
    from hf_elastic.tables.block_latencies import check_latency as check_latency
    from hf_elastic.tables.block_latencies import measure_block_latency_table as measure_block_latency_table
    from hf_elastic.tables.budgets import Budgets as Budgets
    from hf_elastic.tables.budgets import Workload as Workload
    from hf_elastic.tables.latencies import LatencyTable as LatencyTable
    from hf_elastic.tables.latencies import measure_latency_table as measure_latency_table
    from hf_elastic.tables.quality import Additivity as Additivity
    from hf_elastic.tables.quality import QualityTable as QualityTable
    from hf_elastic.tables.quality import additivity as additivity
    from hf_elastic.tables.quality import measure_quality_table as measure_quality_table
    from hf_elastic.training import Distillation as Distillation
    from hf_elastic.training import ElasticTrainer as ElasticTrainer
    from hf_elastic.training import ElasticTrainerMixin as ElasticTrainerMixin
    from hf_elastic.training import FixedSubnet as FixedSubnet
    from hf_elastic.training import HeadFusionCallback as HeadFusionCallback
    from hf_elastic.training import PCAGrowthCallback as PCAGrowthCallback
    from hf_elastic.training import ProgressiveShrinking as ProgressiveShrinking
    from hf_elastic.training import RandomSubnet as RandomSubnet
    from hf_elastic.training import RoutingLoss as RoutingLoss
    from hf_elastic.training import RoutingLosses as RoutingLosses
    from hf_elastic.training import SandwichRule as SandwichRule
    from hf_elastic.training import SubnetSamplingCallback as SubnetSamplingCallback
    from hf_elastic.training import last_complete_checkpoint as last_complete_checkpoint
    from hf_elastic.training.schedule import GrowthHistory as GrowthHistory

_HOMES = {
    "errors": (
        "ActivationError",
        "ArchitectureError",
        "CheckpointError",
        "CompressionError",
        "DataError",
        "ElasticError",
        "ExportError",
        "InfeasibleError",
        "SearchError",
        "SpaceError",
        "StorageError",
        "TrainingError",
        "UnsupportedModelError",
    ),
    "space": ("Architecture", "Choice", "Condition", "SearchSpace"),
    "search": ("Evaluation", "Objective", "SearchResult", "search_subnets"),
    "search.samplers": ("uniform_evolution",),
    "families": ("FAMILIES", "Family"),
    "layers": ("Skip",),
    "conversion": ("make_elastic",),
    "declaration": ("ElasticConfig",),
    "supernet": ("Supernet",),
    "fusion": ("FusionReport",),
    "importance": ("set_layer_order", "sort_by_importance_"),
    "training": (
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
        "SandwichRule",
        "SubnetSamplingCallback",
        "last_complete_checkpoint",
    ),
    "training.schedule": ("GrowthHistory",),
    "adapters": (
        "ElasticLoraConfig",
        "ExtractedAdapter",
        "SubnetStatistics",
        "add_lora",
        "extract_adapter",
        "load_adapter",
    ),
    "compression": ("QuantizationReport", "SparsityReport", "quantize_", "sparsify_", "sparsity_of"),
    "checkpoint": ("ExportReport", "export", "extract", "save_quantized"),
    "packed_format": ("unpack_",),
    "proxies": ("score",),
    "routing": (
        "CalibrationReport",
        "RouterFit",
        "RoutingConfig",
        "RoutingStatistics",
        "add_routing",
        "calibrate_routing",
        "fit_routers",
        "load_routers",
        "routing_statistics",
        "set_capacity",
        "train_routers",
    ),
    "routers_folder": ("save_routers",),
    "repair.fusing": ("fuse_heads",),
    "repair.recovery": ("RecoverReport", "recover"),
    "repair.refitting": ("RefitReport", "refit", "refitted"),
    "repair.teacher_cache": ("TeacherCache", "cache_teacher"),
    "tables.block_latencies": (
        "BlockLatencyTable",
        "LatencyCheck",
        "check_latency",
        "measure_block_latency_table",
    ),
    "tables.budgets": ("Budgets", "Workload"),
    "tables.latencies": ("LatencyTable", "measure_latency_table"),
    "tables.quality": ("Additivity", "QualityTable", "additivity", "measure_quality_table"),
    "pipeline": ("CompressOptions", "CompressResult", "ElmOptions", "ElmResult", "compress", "make_elm"),
    "hub.card": ("model_card",),
    "hub.pushing": (
        "PushPlan",
        "PushReport",
        "plan_push",
        "push_to_hub",
    ),
    "search.processes": ("ProcessExecutor",),
}
_MODULES = ("costs", "distillation", "evaluation", "objectives", "proxies", "runtimes", "spaces", "testing")

__all__ = [
    "ActivationError",
    "Additivity",
    "Architecture",
    "ArchitectureError",
    "BlockLatencyTable",
    "Budgets",
    "CalibrationReport",
    "CheckpointError",
    "Choice",
    "CompressOptions",
    "CompressResult",
    "CompressionError",
    "Condition",
    "DataError",
    "Distillation",
    "ElasticConfig",
    "ElasticError",
    "ElasticLoraConfig",
    "ElasticTrainer",
    "ElasticTrainerMixin",
    "ElmOptions",
    "ElmResult",
    "Evaluation",
    "ExportError",
    "ExportReport",
    "ExtractedAdapter",
    "FAMILIES",
    "Family",
    "FixedSubnet",
    "FusionReport",
    "GrowthHistory",
    "HeadFusionCallback",
    "InfeasibleError",
    "LatencyCheck",
    "LatencyTable",
    "Objective",
    "PCAGrowthCallback",
    "ProcessExecutor",
    "ProgressiveShrinking",
    "PushPlan",
    "PushReport",
    "QualityTable",
    "QuantizationReport",
    "RandomSubnet",
    "RecoverReport",
    "RefitReport",
    "RouterFit",
    "RoutingConfig",
    "RoutingLoss",
    "RoutingLosses",
    "RoutingStatistics",
    "SandwichRule",
    "SearchError",
    "SearchResult",
    "SearchSpace",
    "Skip",
    "SpaceError",
    "SparsityReport",
    "StorageError",
    "SubnetSamplingCallback",
    "SubnetStatistics",
    "Supernet",
    "TeacherCache",
    "TrainingError",
    "UnsupportedModelError",
    "Workload",
    "__version__",
    "add_lora",
    "add_routing",
    "additivity",
    "cache_teacher",
    "calibrate_routing",
    "check_latency",
    "compress",
    "costs",
    "distillation",
    "evaluation",
    "export",
    "extract",
    "extract_adapter",
    "fit_routers",
    "fuse_heads",
    "last_complete_checkpoint",
    "load_adapter",
    "load_routers",
    "make_elastic",
    "make_elm",
    "measure_block_latency_table",
    "measure_latency_table",
    "measure_quality_table",
    "model_card",
    "objectives",
    "plan_push",
    "proxies",
    "push_to_hub",
    "quantize_",
    "recover",
    "refit",
    "refitted",
    "routing_statistics",
    "runtimes",
    "save_quantized",
    "save_routers",
    "score",
    "search_subnets",
    "set_capacity",
    "set_layer_order",
    "sort_by_importance_",
    "spaces",
    "sparsify_",
    "sparsity_of",
    "testing",
    "train_routers",
    "uniform_evolution",
    "unpack_",
]

__getattr__, __dir__ = on_first_use(globals(), _HOMES, modules=_MODULES)

register_auto_classes()
