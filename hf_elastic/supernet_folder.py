"""Files of a saved supernet: the record of its space, and the model beside it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import CheckpointError
from hf_elastic.families import Family
from hf_elastic.files import file_digest, read_json, write_json
from hf_elastic.models import MODEL_TYPES, STATIC_CLASSES, model_class, source_files
from hf_elastic.stored_sizes import require_filled

SPACE_FILE = "search_space.json"
FORMAT = 1


def save_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes the generation config alone, before any work is done, as transformers refuses to write some.

    Raises:
        CheckpointError: transformers refuses to write it.
    """
    if not model.can_generate():
        return
    try:
        model.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(
            f"transformers does not write this generation config: {' '.join(str(error).split())}; "
            "correct model.generation_config"
        ) from error


def write_code(model: PreTrainedModel, folder: Path) -> None:
    """Copies the code of a static model beside its weights, so that it loads where hf_elastic is not installed."""
    if model.config.model_type in MODEL_TYPES:
        for file in source_files(model.config.model_type):
            shutil.copyfile(file, folder / file.name)


def parent_of(model: PreTrainedModel) -> str:
    """Folder, absolute, or Hub name that a model was loaded from; empty when it was made from a config."""
    name = str(model.config._name_or_path or "")
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def can_be_read(parent: str) -> bool:
    """Whether a parent may still be there: a folder that is, or a name on the Hub."""
    return bool(parent) and (not Path(parent).is_absolute() or Path(parent).is_dir())


def write_record(
    base: PreTrainedModel,
    folder: Path,
    *,
    config: ElasticConfig | None,
    row: Family | None,
    layer_order: tuple[int, ...],
    space_digest: str,
) -> None:
    """Writes ``search_space.json`` beside weights that are there.

    Args:
        base: whose space it is.
        folder: where.
        config: what was declared; ``None`` where the model's own config says the space.
        row: family row of a user.
        layer_order: layers from the most to the least important.
        space_digest: of the space of the layers.
    """
    record = {
        "format": FORMAT,
        "class": type(base).__name__,
        "elastic_config": None if config is None else config.to_dict(),
        "family": None if row is None else row.to_dict(),
        "layer_order": list(layer_order),
        "parent": parent_of(base),
        "space_digest": space_digest,
        "weights": {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))},
    }
    write_json(folder / SPACE_FILE, record)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads ``search_space.json`` and checks the weights against it."""
    file = folder / SPACE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is no saved supernet, it has no {SPACE_FILE}; write one with "
            "Supernet.save_pretrained, or load an exported model by from_pretrained of its own class"
        )
    record = read_json(file)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {record.get('format')!r}, this version reads {FORMAT}")
    kinds = {"class": str, "space_digest": str, "weights": dict}
    static = record.get("elastic_config") is None and read_json(folder / "config.json").get("model_type") in MODEL_TYPES
    if not static:  # the space of candidate blocks is in the model's own config
        kinds |= {"elastic_config": dict, "layer_order": list}
    if bad := [name for name, kind in kinds.items() if not isinstance(record.get(name), kind) or not record[name]]:
        raise CheckpointError(f"{file} says nothing usable about {', '.join(bad)}; copy the folder again")
    for name, digest in record["weights"].items():
        if Path(name).name != name or file_digest(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is truncated or is not the file this supernet was saved with; copy the folder again"
            )
    return record


def warn_of_companions(folder: Path, *, adapters: str, routers: str) -> None:
    """Says how what stands beside a saved supernet, in folders of these names, is put onto it."""
    for kind, name, function in (("adapters", adapters, "load_adapter"), ("routers", routers, "load_routers")):
        if (folder / name).is_dir():
            warnings.warn(
                f"{folder} holds {kind}, which are not loaded with their base; put them onto it: "
                f"hf_elastic.{function}(supernet.model, {str(folder / name)!r})",
                stacklevel=3,
            )


def class_named(name: str) -> type[PreTrainedModel]:
    """The class of that name, of transformers or of our static models.

    Raises:
        CheckpointError: there is none.
    """
    found = getattr(transformers, name, None) or _static_classes().get(name)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"{SPACE_FILE} names {name!r}, which is no model of transformers; pass model_class=")
    return found


def _static_classes() -> dict[str, type[PreTrainedModel]]:
    return {name: model_class(kind, name) for kind, name in set(STATIC_CLASSES.values())}


def load_model(folder: Path, model_class: type[PreTrainedModel], kwargs: dict[str, Any]) -> PreTrainedModel:
    if not kwargs.get("use_safetensors", True):
        raise CheckpointError("use_safetensors=False would read pickles, which is not done here; leave it out")
    options = {"dtype": "auto", **kwargs, "output_loading_info": True, "use_safetensors": True}
    try:
        require_filled(folder, model_class)
        loaded: Any = model_class.from_pretrained(folder, **options)
        model, report = loaded
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot load {folder} as {model_class.__name__}: {lines[0]}") from error
    if wrong := sorted(str(key) for keys in report.values() for key in keys):
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json ({len(wrong)} tensors, e.g. {wrong[0]}); "
            "copy the folder again"
        )
    return model
