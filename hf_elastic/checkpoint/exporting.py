"""Writes a subnet as a Hugging Face checkpoint folder: whole or not at all, checked before it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic import costs
from hf_elastic.checkpoint.companions import copy_companions
from hf_elastic.checkpoint.extraction import extract
from hf_elastic.errors import ExportError
from hf_elastic.files import whole_folder, write_json
from hf_elastic.models import source_files
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Loadability, Supernet

ARCHITECTURE_FILE = "architecture.json"
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}

NOTES: Mapping[Loadability, str] = {
    "stock": "ordinary checkpoint of the stock class, smaller and faster",
    "stock-padded": "stock class, padded with zeros: same logits, no speed gain (loadability='remote-code' is compact)",
    "remote-code": "loads with trust_remote_code=True, or after `import hf_elastic`",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        directory: the folder.
        loadability: how it loads.
        note: the same in a sentence.
        snippet: Python that loads it.
        files: names of the files copied from the parent (tokenizer, chat template, sentence-transformers
            modules).
        max_difference: largest |difference| of outputs between the written model and the supernet, on token
            ids.
    """

    directory: Path
    loadability: Loadability
    note: str
    snippet: str
    files: tuple[str, ...]
    max_difference: float


def export(
    supernet: Supernet,
    architecture: Architecture | Mapping[str, Value],
    directory: str | Path,
    *,
    loadability: Loadability | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a subnet to a folder that ``from_pretrained`` loads.

    The folder holds ``config.json``, safetensors, the generation config, ``architecture.json``, and what the
    parent's folder (or its copy in the Hub cache) held of tokenizer, chat template and sentence-transformers
    modules.

    Args:
        supernet: where from; unchanged.
        architecture: what.
        directory: a folder that does not exist or is empty.
        loadability: form; by default the one :meth:`Supernet.loadability` says.
        tokenizer: saved instead of the parent's tokenizer files.
        source: the parent's folder or Hub name; by default what it was loaded from.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        ExportError: the form cannot hold it, or the written model would not equal the subnet.
        CheckpointError: the folder cannot be written; nothing is left half-written.
    """
    point = supernet.point(architecture)
    form = loadability or supernet.loadability(point)
    with whole_folder(directory, overwrite=overwrite) as folder:
        model = extract(supernet, point, loadability=form)
        difference = _check_parity(supernet, point, model)
        _save_model(model, folder, form)
        names = copy_companions(source or supernet.model.config._name_or_path, folder, tokenizer=tokenizer)
        write_json(folder / ARCHITECTURE_FILE, _record(supernet, point, form))
    path = Path(directory)
    return ExportReport(path, form, NOTES[form], _snippet(model, path, form), names, difference)


def _save_model(model: PreTrainedModel, folder: Path, form: Loadability) -> None:
    model.save_pretrained(folder)
    if form == "remote-code":
        for file in source_files(model.config.model_type):
            shutil.copyfile(file, folder / file.name)


def _check_parity(supernet: Supernet, architecture: Architecture, model: PreTrainedModel) -> float:
    """Compares the extracted model with the supernet on token ids before anything is written."""
    inputs = costs.default_inputs(supernet, seq_len=32)
    training = supernet.model.training
    supernet.model.eval()
    try:
        with torch.inference_mode(), supernet.activate(architecture):
            wanted = supernet.model(**inputs)[0]
            got = model(**inputs)[0]
    finally:
        supernet.model.train(training)
    difference, scale = float((wanted - got).abs().max()), float(wanted.abs().max())
    if not difference <= _TOLERANCE.get(wanted.dtype, 5e-2) * max(scale, 1e-6):
        raise ExportError(
            f"the extracted model differs from the subnet by {difference:.2e} (outputs up to {scale:.2e}), "
            "nothing was written; please report this with the model's config"
        )
    return difference


def _record(supernet: Supernet, architecture: Architecture, form: Loadability) -> dict[str, object]:
    tokens = costs.default_inputs(supernet)["input_ids"].shape[-1]
    return {
        "architecture": dict(architecture),
        "digest": architecture.digest,
        "space_digest": supernet.space.digest,
        "loadability": form,
        "family": supernet.family.model_type,
        "parent": str(supernet.model.config._name_or_path),
        "layers": [asdict(shape) for shape in supernet.layer_shapes(architecture)],
        "parameters": costs.parameters(supernet, architecture),
        "total_parameters": costs.total_parameters(supernet, architecture),
        "macs": costs.macs(supernet, architecture, seq_len=tokens),
        "macs_seq_len": tokens,
        "versions": {name: version(name) for name in ("transformers", "torch")},
    }


def _snippet(model: PreTrainedModel, path: Path, form: Loadability) -> str:
    name = type(model).__name__
    if form == "remote-code":
        auto = next(iter(_auto_class(model)), "AutoModel")
        return f"transformers.{auto}.from_pretrained({json.dumps(str(path))}, trust_remote_code=True)"
    return f"transformers.{name}.from_pretrained({json.dumps(str(path))})"


def _auto_class(model: PreTrainedModel) -> list[str]:
    mapping = getattr(model.config, "auto_map", None) or {}
    return [auto for auto, target in mapping.items() if str(target).endswith("." + type(model).__name__)]
