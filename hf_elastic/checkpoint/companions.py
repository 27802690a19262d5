"""Files that travel with a checkpoint: tokenizer, chat template, sentence-transformers modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"
SENTENCE_TRANSFORMERS_FILES = (
    "config_sentence_transformers.json", "sentence_bert_config.json", "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
)  # fmt: skip
MODULES = "modules.json"
# Of older config files the flags, of newer ones ``pooling_mode``: one name, or several whose vectors are joined.
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip


def copy_companions(
    source: str | Path, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[str, ...]:
    """Copies the companions that the parent has into an export folder.

    Args:
        source: the parent's folder, or its name on the Hub (only the local cache is read).
        folder: the export.
        tokenizer: saved in place of the parent's tokenizer files.

    Returns:
        Relative paths of what was written, sorted; empty when the parent has no folder.

    Raises:
        CheckpointError: the parent's ``modules.json`` is broken or points outside its folder.
    """
    parent = parent_folder(source)
    before = {p for p in folder.rglob("*") if p.is_file()}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if parent is not None:
        for name in SENTENCE_TRANSFORMERS_FILES + (() if tokenizer is not None else TOKENIZER_FILES):
            if (parent / name).is_file():
                shutil.copyfile(parent / name, folder / name)
        if tokenizer is None and (parent / CHAT_TEMPLATES).is_dir():
            shutil.copytree(parent / CHAT_TEMPLATES, folder / CHAT_TEMPLATES)
        _copy_modules(parent, folder)
    written = {p for p in folder.rglob("*") if p.is_file()} - before
    return tuple(sorted(str(p.relative_to(folder)) for p in written))


def sentence_modules(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each sentence-transformers module of a checkpoint, in order; empty where it has none.

    Raises:
        CheckpointError: ``modules.json`` is broken.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        return [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in stated]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no list of sentence-transformers modules: {error!r}") from error


def pooling_modes(folder: Path) -> tuple[str, ...]:
    """How a sentence encoder makes one vector of its tokens: ``mean``, ``cls``, ``lasttoken``, ``max`` and so on.

    Several where their vectors are joined; the mean where there are no modules, as in sentence-transformers.

    Raises:
        CheckpointError: a file of the folder is broken.
    """
    place = next((path for kind, path in sentence_modules(folder) if kind == "Pooling"), None)
    if place is None:
        return ("mean",)
    config = read_json(folder / place / "config.json")
    stated = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    return (stated,) if isinstance(stated, str) else tuple(map(str, stated))


def parent_folder(source: str | Path) -> Path | None:
    """Folder of a checkpoint: itself, or its snapshot in the Hub cache; ``None`` when it is in neither."""
    if not str(source):
        return None
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _module_folder(parent: Path, path: str) -> Path:
    """Folder of a module: inside the parent, and not reached by ``..``, from the root, or by a link."""
    root = parent.resolve()
    parts = path.replace("\\", "/").split("/")
    source = root if ".." in parts or "\0" in path else (root / path).resolve()
    if source == root or not source.is_relative_to(root):
        raise CheckpointError(
            f"{parent / MODULES} names the module folder {path!r}, which is not inside the checkpoint"
        )
    return source


def _copy_modules(parent: Path, folder: Path) -> None:
    """Copies the module folders that ``modules.json`` names; the transformer itself is the export."""
    if not (parent / MODULES).is_file():
        return
    try:
        modules = json.loads((parent / MODULES).read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
        types = [str(module["type"]) for module in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{parent / MODULES} is no list of sentence-transformers modules: {error!r}") from error
    for module, path, kind in zip(modules, paths, types, strict=True):
        if kind.endswith(".Transformer"):
            module["path"] = ""
            continue
        source = _module_folder(parent, path)
        if source.is_dir():
            shutil.copytree(source, folder / path)
        # a Normalize module has no files, and git keeps no empty folders; the loader wants the folder
        (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")
