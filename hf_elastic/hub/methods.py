"""How an artefact was made, in the words of a card: the method, its paper and its tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_elastic.hub.artefacts import Artefact


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        tag: on the Hub.
        title: what it is called.
        what: a sentence that says what was done.
        arxiv: number of the paper, where there is one.
    """

    tag: str
    title: str
    what: str
    arxiv: str | None = None


_RETROSPECTIVE = "2501.16372"
ELM = Method(
    "elm", "ELM", "A path of candidate blocks, found in a supernet that was distilled from a teacher and grown by PCA.",
    "2510.27037",
)  # fmt: skip
ELASTIFORMER = Method(
    "elastiformer", "ElastiFormer",
    "Routers on a frozen model decide which tokens enter a sublayer, and which heads and experts serve them.",
    "2411.15281",
)  # fmt: skip
SQFT = Method(
    "sqft", "SQFT", "Low-rank adapters on a sparse or quantised base, which a merge keeps sparse and quantised.",
    _RETROSPECTIVE,
)  # fmt: skip
SHEARS = Method(
    "shears", "Shears", "Low-rank adapters whose ranks were searched, trained on a sparse base.", _RETROSPECTIVE
)
LONAS = Method("lonas", "LoNAS", "Low-rank adapters and the widths of the frozen base shrink together.", _RETROSPECTIVE)
ELASTIC_LORA = Method(
    "elastic-lora", "Elastic LoRA",
    "Low-rank adapters whose ranks are choices: one training, many ranks (Mode A of the paper).", _RETROSPECTIVE,
)  # fmt: skip
PRUNED = Method(
    "structured-pruning", "Elastic width, heads and depth",
    "Widths, heads and layers were cut out of a supernet whose largest subnet is the base model.",
)  # fmt: skip
SUPERNET = Method(
    "supernet", "Supernet", "One set of weights whose sizes are choices; as a whole it is an ordinary model."
)
INTEGERS = Method("quantization", "Post-training quantisation", "Linear layers were rounded to integers.")
_RECIPES: Mapping[str, str] = {
    "fast": "Exact search over measured damages; the weights were repaired in closed form, nothing was trained.",
    "balanced": "Exact search over measured damages, closed-form repair, then distillation from the base model.",
    "best": "A supernet was trained and searched, and the subnet found was distilled from the base model.",
}


def method_of(artefact: Artefact, options: Mapping[str, Any] | None) -> Method:
    """The method, by the options of the run where they are known, else by what the folder holds."""
    if options is not None and (found := _of_run(options)) is not None:
        return found
    blocks = any("block" in layer for layer in artefact.architecture.get("layers") or ())
    if blocks or artefact.config.get("candidate_blocks"):
        return ELM
    if artefact.kind == "routers" or artefact.routed:
        return ELASTIFORMER
    if artefact.kind == "adapter":
        return _of_adapter(artefact.adapter)
    if artefact.kind == "supernet":
        return SUPERNET
    return INTEGERS if artefact.bits and not artefact.architecture else PRUNED


def _of_run(options: Mapping[str, Any]) -> Method | None:
    if "teacher" in options:
        return ELM
    if options.get("lora"):
        if options.get("bits") or (options.get("sparsity") and not options.get("apart")):
            return SQFT
        return SHEARS if options.get("sparsity") else LONAS if options.get("space") else ELASTIC_LORA
    if options.get("recipe") in _RECIPES:
        return Method(PRUNED.tag, PRUNED.title, f"{PRUNED.what} {_RECIPES[options['recipe']]}")
    return None


def _of_adapter(config: Mapping[str, Any]) -> Method:
    if config.get("sparse") or config.get("quantization_aware"):
        return SQFT
    elastic_base = (config.get("trained_on") or {}).get("space")
    return LONAS if elastic_base else ELASTIC_LORA
