"""``hf-elastic sparsify``, ``quantize`` and ``merge``: compressed checkpoints, and adapters merged into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic.adapters import load_adapter
from hf_elastic.checkpoint import ExportReport, export
from hf_elastic.checkpoint.companions import copy_companions
from hf_elastic.checkpoint.merging import SPARSE
from hf_elastic.compression import quantize_, sparsify_, sparsity_of
from hf_elastic.errors import CheckpointError, CompressionError
from hf_elastic.files import read_json, whole_folder
from hf_elastic.layers import evaluating
from hf_elastic.packed_format import integer_bits, quantised_layers, unpack_, write_weights
from hf_elastic.pipeline.options import CompressOptions, TaskName
from hf_elastic.pipeline.tasks import Task, load_model, load_tokenizer, resolve_task
from hf_elastic.pipeline.texts import read_rows
from hf_elastic.pipeline.training import device_of
from hf_elastic.quantgrid import pruned_share
from hf_elastic.report import aligned
from hf_elastic.space import Value
from hf_elastic.streams import Batch

Say = Callable[[str], None]


def compress_base_(model: PreTrainedModel, batches: Sequence[Batch], options: CompressOptions) -> str:
    """Makes a base sparse and then of integers, as far as options say; returns what was done."""
    told = []
    if options.sparsity is not None:
        told.append(str(sparsify_(model, batches, sparsity=options.sparsity)))
    if options.bits is not None and not own_integers(model, options):
        told.append(str(quantize_(model, batches, bits=options.bits, group_size=options.group_size)))
    elif options.bits is not None:
        told.append(f"the checkpoint's own integers of {options.bits} bits are kept")
    return "; ".join(told)


def own_integers(model: PreTrainedModel, options: CompressOptions) -> bool:
    """Whether the checkpoint is of integers already, which are then kept.

    Raises:
        CompressionError: they are of other bits than asked for.
    """
    bits = integer_bits(model)
    if bits is not None and bits != options.bits:
        raise CompressionError(f"{options.model} is of {bits}-bit integers; say bits={bits} to keep them")
    return bits is not None


def has_zeros(model: PreTrainedModel) -> bool:
    """Whether a share of the weights is zero by pruning, which a merge is to keep."""
    layers = quantised_layers(model)
    shares = [pruned_share(module, name=name) for name, module in layers.items()] or [sparsity_of(model).share]
    return max(shares) >= SPARSE


@dataclass(frozen=True)
class Compression:
    """What ``sparsify`` or ``quantize`` does to a checkpoint.

    Attributes:
        kind: which of them.
        settings: arguments of :func:`hf_elastic.sparsify_` or :func:`hf_elastic.quantize_`.
    """

    kind: Literal["sparsify", "quantize"]
    settings: Mapping[str, Any]

    @property
    def needs_data(self) -> bool:
        """Whether it is calibrated."""
        return self.settings["method"] in ("wanda", "gptq")


def compress_checkpoint(options: CompressOptions, compression: Compression, *, say: Say = print) -> Path:
    """Compresses a checkpoint on text, writes it, and says what that did to its quality on held-out text.

    Args:
        options: ``model``, ``data``, ``output`` and how text is read; the rest is not used.
        compression: what to do.
        say: where the table goes.

    Returns:
        The folder that was written.

    Raises:
        ElasticError: the checkpoint, the text or a setting cannot be; nothing is written then.
    """
    task = resolve_task(options)
    output = options.output_folder
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output} is not empty; choose another output, or delete it")
    data = task.prepare(load_tokenizer(options), read_rows(options.data, text_column=options.text_column), options)
    model, parent = load_model(task, options, dtype="auto"), load_model(task, options, dtype="auto")
    for one in (model, parent):
        one.to(device_of(options))  # type: ignore[arg-type]
    change: Callable[..., object] = sparsify_ if compression.kind == "sparsify" else quantize_
    report = change(model, data.calibration if compression.needs_data else None, **compression.settings)
    names = task.quality[-1:]
    rows = [["", *names]]
    for label, one in (("parent", parent), (compression.kind, model)):
        rows.append([label, *(f"{plain_quality(task, one, data.validation, parent=parent):.4f}" for _ in names)])
    with whole_folder(output, overwrite=False) as folder:
        write_weights(model, folder)
        copy_companions(options.model, folder)
    say(f"{report}\n{aligned(rows)}\n{output}: loads with {type(model).__name__}.from_pretrained")
    return output


def plain_quality(task: Task, model: PreTrainedModel, batches: Sequence[Batch], *, parent: PreTrainedModel) -> float:
    """The quality of a plain model on validation batches: cosine to the parent's embeddings, perplexity or accuracy."""
    total = weight = 0.0
    with evaluating(model), evaluating(parent), torch.inference_mode():
        for batch in batches:
            feed = {name: value.to(model.device) for name, value in batch.items()}
            if task.name == "embedding":
                found = nn.functional.cosine_similarity(_embedded(model, feed), _embedded(parent, feed))  # (B,)
            elif task.name == "classification":
                found = (model(**feed).logits.argmax(-1) == feed["labels"]).float()  # (B,)
            else:
                scored = feed["labels"][:, 1:] if task.name == "causal-lm" else feed["labels"]
                found = model(**feed).loss.expand(int((scored != -100).sum()))
            total, weight = total + float(found.double().sum()), weight + len(found)
    if not weight:
        raise CompressionError("the held-out text scores nothing; pass more text")
    mean = total / weight
    return math.exp(mean) if task.name in ("causal-lm", "masked-lm") else mean


def _embedded(model: PreTrainedModel, feed: Mapping[str, Tensor]) -> Tensor:
    """Mean of the token states of each sentence, ``(B, D)``."""
    mask = feed["attention_mask"].unsqueeze(-1)  # (B, T, 1)
    states: Tensor = model(**feed).last_hidden_state  # (B, T, D)
    return (states * mask).sum(1) / mask.sum(1)


def merge_adapter(
    base: str,
    adapter: str,
    output: str,
    *,
    architecture: str | Mapping[str, Value] = "largest",
    allow_dense: bool = False,
    float_base: str | None = None,
    task: TaskName = "auto",
) -> ExportReport:
    """Merges elastic adapters that were saved into their base, and keeps it sparse or of integers where it is so.

    Args:
        base: folder or Hub name.
        adapter: folder that ``PeftModel.save_pretrained`` wrote of elastic adapters.
        output: folder to write.
        architecture: ``largest``, ``midpoint``, ``smallest``, or ranks by name of the choice.
        allow_dense: whether zeros of the base may be filled.
        float_base: folder or Hub name of the weights that the base was rounded from, where the adapters saw them.
        task: what the base is for; by default what the adapters say.

    The base is loaded in the precision that the adapters saw: another would round to other integers.

    Raises:
        ElasticError: they do not fit, or the merge would lose zeros or integers.
    """
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"{adapter} holds no adapter_config.json; give a folder that save_pretrained wrote")
    stated = read_json(file)
    if task == "auto":
        task = _TASKS.get(str(stated.get("task_type")), "auto")
    noted = stated.get("trained_on")
    name = noted.get("dtype") if isinstance(noted, dict) else None
    dtype: torch.dtype | Literal["auto"] = _DTYPES.get(str(name), "auto")

    def loaded(source: str) -> PreTrainedModel:
        options = CompressOptions(model=source, data=("none",), output=output, task=task)
        return unpack_(load_model(resolve_task(options, integers=True), options, dtype=dtype))

    supernet = load_adapter(loaded(base), adapter, float_base=None if float_base is None else loaded(float_base))
    space = supernet.space
    points = {"largest": space.largest, "midpoint": space.midpoint, "smallest": space.smallest}
    point = points[architecture]() if isinstance(architecture, str) else space.canonical(architecture)
    return export(supernet, point, output, merge=True, source=base, allow_dense=allow_dense)


_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_TASKS: Mapping[str, TaskName] = {
    "CAUSAL_LM": "causal-lm", "SEQ_CLS": "classification", "FEATURE_EXTRACTION": "embedding",
}  # fmt: skip
