"""How a sentence encoder makes one vector of its tokens, by the names of sentence-transformers and of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_elastic.checkpoint.companions import MODULES
from hf_elastic.errors import CheckpointError, ExportError
from hf_elastic.files import read_json

# Of older config files the flags, of newer ones ``pooling_mode``: one name, or several whose vectors are joined.
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
_KNOWN = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}


def gguf_pooling(folder: Path | None) -> str:
    """Name of a member of ``gguf.PoolingType``: ``MEAN``, ``CLS`` or ``LAST``.

    Args:
        folder: of the checkpoint; the mean where there are no sentence-transformers modules in it, as in these.

    Raises:
        ExportError: llama.cpp does not pool so, or a module behind changes more than the length of the vectors.
        CheckpointError: a file of the folder is broken.
    """
    if folder is None or not (folder / MODULES).is_file():
        return "MEAN"
    modes = ["mean"]
    for kind, path in _modules(folder / MODULES):
        if kind == "Pooling":
            modes = _modes(read_json(folder / path / "config.json"))
        elif kind not in ("Transformer", "Normalize"):
            raise ExportError(f"no GGUF: llama.cpp has no {kind} behind the states, which {folder / MODULES} names")
    if len(modes) != 1 or modes[0] not in _KNOWN:
        raise ExportError(f"no GGUF: llama.cpp pools tokens by one of {', '.join(_KNOWN)}, not by {', '.join(modes)}")
    return _KNOWN[modes[0]]


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        return [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in stated]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no list of sentence-transformers modules: {error!r}") from error


def _modes(config: Mapping[str, Any]) -> list[str]:
    stated = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    return [stated] if isinstance(stated, str) else [str(mode) for mode in stated]
