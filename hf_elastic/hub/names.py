"""Names on the Hub: which texts are such, and what a local folder is called there."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_elastic.errors import CheckpointError

_CACHED = re.compile(r"(?:models|datasets)--(?P<name>[^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")
_ENDINGS = (".txt", ".jsonl", ".csv", ".json", ".md")
_BRANCH = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9][\w./-]{0,199}(?<![./])")


def checked_repo_id(text: str) -> str:
    """The name of a repository, if it can be one.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{str(text)[:120]!r} is no name of a repository, such as user/name: {reason}") from error
    return text


def checked_revision(text: str | None) -> str | None:
    """A branch to push to, if its name can be one.

    Raises:
        CheckpointError: it cannot.
    """
    if text is not None and not _BRANCH.fullmatch(text):
        raise CheckpointError(f"revision {text[:120]!r} is no name of a branch (letters, digits, '-', '_', '/', '.')")
    return text


def hub_name(text: object, *, beside: Path | None = None) -> str | None:
    """The name on the Hub that a record means by its parent; ``None`` for a folder of this machine or nothing.

    The folder of a snapshot in the Hub's cache has the name of its repository.

    Args:
        text: what the record says.
        beside: the folder that the record is in, see :func:`local_folder`.
    """
    if not isinstance(text, str) or not text:
        return None
    name = found["name"].replace("--", "/", 1) if (found := _CACHED.search(text)) else text
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name == text and _place_of(text, beside) else name


def local_folder(text: str, *, beside: Path | None = None) -> Path | None:
    """The folder of this machine that a record means; ``None`` where it means none that is there.

    A relative path was relative to wherever the run was started, which nobody recorded; it is looked for from here, and
    from all folders above the one that the record is in.

    Args:
        text: what the record says.
        beside: the folder that the record is in.
    """
    place = _place_of(text, beside)
    return place if place is not None and place.is_dir() else None


def _place_of(text: str, beside: Path | None) -> Path | None:
    path = Path(text).expanduser()
    above = () if beside is None else beside.resolve().parents
    return next((place for place in (path, *(folder / path for folder in above)) if place.exists()), None)


def without_folders(text: object, *, beside: Path | None = None) -> str:
    """A model or a file as a reader may see it: its name on the Hub, or the last part of its path."""
    return hub_name(text, beside=beside) or re.split(r"[/\\]", str(text).rstrip("/\\"))[-1]


def dataset_name(source: str) -> str | None:
    """The data set on the Hub that ``--data`` named; ``None`` for a file."""
    name = source.partition(":")[0]
    return None if name.endswith(_ENDINGS) else hub_name(name)
