"""How a sentence encoder makes one vector of its tokens, by the names of sentence-transformers and of llama.cpp."""

from __future__ import annotations

from pathlib import Path

from hf_elastic.checkpoint.companions import MODULES, pooling_modes, sentence_modules
from hf_elastic.errors import ExportError

_KNOWN = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}


def gguf_pooling(folder: Path | None) -> str:
    """Name of a member of ``gguf.PoolingType``: ``MEAN``, ``CLS`` or ``LAST``.

    Args:
        folder: of the checkpoint; the mean where there are no sentence-transformers modules in it, as in these.

    Raises:
        ExportError: llama.cpp does not pool so, or a module behind changes more than the length of the vectors.
        CheckpointError: a file of the folder is broken.
    """
    if folder is None:
        return "MEAN"
    for kind, _ in sentence_modules(folder):
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ExportError(f"no GGUF: llama.cpp has no {kind} behind the states, which {folder / MODULES} names")
    modes = pooling_modes(folder)
    if len(modes) != 1 or modes[0] not in _KNOWN:
        raise ExportError(f"no GGUF: llama.cpp pools tokens by one of {', '.join(_KNOWN)}, not by {', '.join(modes)}")
    return _KNOWN[modes[0]]
