"""The YAML at the top of a card: what the Hub filters, links and offers by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_elastic.hub.artefacts import CAUSAL_TYPES, Artefact
from hf_elastic.hub.methods import Method
from hf_elastic.hub.parents import Parent
from hf_elastic.hub.runs import found_row, hub_datasets, shown_data
from hf_elastic.reporting.reading import Run

_PIPELINES: Mapping[str, str] = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "Model": "feature-extraction",
}  # fmt: skip
_PEFT_PIPELINES: Mapping[str, str] = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_LABELLED = ("text-classification", "token-classification")
_KNOWN_METRICS = ("accuracy", "perplexity")


def card_data(
    artefact: Artefact, *, method: Method, parent: Parent, run: Run | None, license: str | None, title: str
) -> ModelCardData:
    """Metadata of a card.

    Args:
        artefact: what the card is of.
        method: how it was made.
        parent: what its card carries over.
        run: what was measured.
        license: stated instead of the parent's.
        title: name of the model.
    """
    carried: dict[str, Any] = dict(parent.data)
    if license is not None:
        carried = {key: value for key, value in carried.items() if not key.startswith("license")} | {"license": license}
    if (base := parent.name or parent.ancestor) is not None:
        carried |= {"base_model": base, "base_model_relation": relation_of(artefact) if parent.name else "finetune"}
    measured = _measured(artefact, run)
    return ModelCardData(
        **carried,
        library_name=library_of(artefact),
        pipeline_tag=pipeline_of(artefact),
        tags=_tags(artefact, method),
        datasets=list(hub_datasets(run)) or None if run is not None else None,
        metrics=[result.metric_type for result in measured if result.metric_type in _KNOWN_METRICS] or None,
        eval_results=measured or None,
        model_name=title if measured else None,
    )


def library_of(artefact: Artefact) -> str:
    """The library that the Hub's *Use this model* button should speak of.

    A model that brings its code is loaded by transformers, whose snippet then says ``trust_remote_code=True``. What
    only hf_elastic understands is named so, rather than to be loaded as something less.
    """
    if artefact.sentence_transformers:
        return "sentence-transformers"
    if artefact.kind == "model":
        return "transformers"
    return "peft" if artefact.kind == "adapter" and not artefact.in_weight else "hf-elastic"


def pipeline_of(artefact: Artefact) -> str | None:
    """The task, as the Hub names it."""
    if artefact.sentence_transformers:
        return "sentence-similarity"
    if artefact.kind == "adapter":
        return _PEFT_PIPELINES.get(str(artefact.adapter.get("task_type")))
    if artefact.kind == "routers":
        return "text-generation" if artefact.routers.get("model_type") in CAUSAL_TYPES else None
    stated = str((artefact.config.get("architectures") or [""])[0])
    return next((tag for ending, tag in _PIPELINES.items() if stated.endswith(ending)), None)


def relation_of(artefact: Artefact) -> str:
    """How it is related to its base model, in the Hub's words."""
    if artefact.kind in ("adapter", "routers"):
        return "adapter"
    return "quantized" if artefact.bits else "finetune"


def _tags(artefact: Artefact, method: Method) -> list[str]:
    """Tags; those that the Hub derives itself (library, licence, base model, arXiv) are not repeated."""
    tags = ["hf-elastic", method.tag]
    if artefact.kind == "supernet":
        tags += ["supernet"]
    if artefact.kind == "model" and artefact.loadability == "stock-padded":
        tags += ["stock-padded"]
    if artefact.remote_code:
        tags += ["custom_code"]
    if artefact.bits:
        tags += ["compressed-tensors", f"{artefact.bits}-bit"]
    if artefact.kind == "adapter":
        tags += ["lora", *(["elastic-lora"] if artefact.elastic else [])]
    return list(dict.fromkeys(tags))


def _measured(artefact: Artefact, run: Run | None) -> list[EvalResult]:
    """Qualities of what was exported, on the data that the run held out."""
    row = found_row(run) if run is not None and artefact.kind != "supernet" else None
    task = pipeline_of(artefact)
    if run is None or row is None or task is None:
        return []
    named = hub_datasets(run)
    data = named[0] if named else ", ".join(shown_data(run)) or "text"
    return [
        EvalResult(
            task_type=task,
            dataset_type=named[0] if named else "held-out",
            dataset_name=f"held out of {data}",
            metric_type=name,
            metric_value=float(row[name]),
            metric_name=name,
        )
        for name in _numbers(row, run.quality)
        if name != "accuracy" or task in _LABELLED  # of a classifier beside the model
    ]


def _numbers(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if isinstance(row.get(name), int | float)]
