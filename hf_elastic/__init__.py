"""hf-elastic: elastic language models on unpatched transformers and peft.

Importing the package registers ``elastic_bert``, ``elastic_llama`` and ``elastic_gpt2`` with the transformers Auto
classes; everything else is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_elastic.models import register_auto_classes

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "ActivationError", "ArchitectureError", "CheckpointError", "DataError", "ElasticError", "ExportError",
        "InfeasibleError", "SearchError", "SpaceError", "StorageError", "TrainingError", "UnsupportedModelError",
    ),
    "space": ("Architecture", "Choice", "Condition", "SearchSpace"),
    "search": ("Evaluation", "Objective", "SearchResult", "search_subnets"),
    "families": ("FAMILIES", "Family"),
    "layers": ("Skip",),
    "conversion": ("ElasticConfig", "make_elastic"),
    "supernet": ("Supernet",),
    "importance": ("set_layer_order", "sort_by_importance_"),
    "training": (
        "Distillation", "ElasticTrainer", "ElasticTrainerMixin", "FixedSubnet", "ProgressiveShrinking", "RandomSubnet",
        "SandwichRule", "SubnetSamplingCallback", "last_complete_checkpoint",
    ),
    "checkpoint": ("ExportReport", "export", "extract"),
    "pipeline": ("CompressOptions", "CompressResult", "compress"),
}
_SOURCE = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("costs", "distillation", "objectives", "testing")

__all__ = [*sorted(_SOURCE), *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _SOURCE:
        value = getattr(import_module(f".{_SOURCE[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
