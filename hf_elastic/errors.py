"""The error tree: everything a user can cause is an :class:`ElasticError` and also the builtin it resembles.

    ElasticError
    ├── SpaceError          (ValueError)    a choice or a search space that cannot be
    ├── ArchitectureError   (ValueError)    an architecture that is not a point of this space
    ├── UnsupportedModelError (TypeError)   a model, layer or option we cannot make elastic
    ├── ActivationError     (RuntimeError)  a handle used in a way that would leave the wrong subnet active
    ├── InfeasibleError     (ValueError)    limits that nothing satisfies
    ├── SearchError         (RuntimeError)  a search that cannot go on
    │   └── StorageError                    a storage that is foreign, corrupt or unreachable
    ├── CompressionError    (ValueError)    a sparsity or a quantisation that cannot be, or would be lost
    ├── TrainingError       (RuntimeError)  a Trainer set up so that promises would break
    ├── DataError           (ValueError)    text or labels we cannot read
    └── CheckpointError     (OSError)       a folder or file that cannot be read or written
        └── ExportError                     an architecture that cannot be written in the form asked for

Messages are one line: what was wrong, what was got, what is allowed or what to do. Names and texts out of files of
others stand in them, so that breaks, terminal codes and endless names are taken out where a message is made.
"""

from __future__ import annotations

import re

_LONGEST = 2000  # characters of a message; of a longer one the middle is left out
_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


class ElasticError(Exception):
    """Root of all errors raised on purpose by hf_elastic."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_one_line(each) if isinstance(each, str) else each for each in arguments))


def _one_line(message: str) -> str:
    """A message as one line that any terminal shows as it is: what cannot be printed is escaped."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    if message.isprintable():
        return message
    line = _BREAK.sub(" ", message.strip())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


class SpaceError(ElasticError, ValueError):
    """A choice or a search space is malformed."""


class ArchitectureError(ElasticError, ValueError):
    """An architecture is not a point of the space it is used with."""


class UnsupportedModelError(ElasticError, TypeError):
    """A model, layer or option cannot be made elastic."""


class ActivationError(ElasticError, RuntimeError):
    """A handle is used in a way that would leave the wrong subnet active."""


class InfeasibleError(ElasticError, ValueError):
    """No architecture satisfies the limits."""


class SearchError(ElasticError, RuntimeError):
    """A search cannot start or go on."""


class StorageError(SearchError):
    """A search storage is foreign, corrupt or unreachable."""


class CompressionError(ElasticError, ValueError):
    """A sparsity or a quantisation cannot be, or an operation would lose it."""


class TrainingError(ElasticError, RuntimeError):
    """A Trainer is set up in a way that would break a promise."""


class DataError(ElasticError, ValueError):
    """Text, labels or a data set cannot be read."""


class CheckpointError(ElasticError, OSError):
    """A checkpoint folder or file cannot be read or written."""


class ExportError(CheckpointError):
    """An architecture cannot be written in the form asked for."""
