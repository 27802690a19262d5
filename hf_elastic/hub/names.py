"""Names on the Hub: which texts are such, and what a local folder is called there."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_elastic.errors import CheckpointError

_CACHED = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")
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


def hub_name(text: object) -> str | None:
    """The name on the Hub that a record means by its parent; ``None`` for a folder of this machine or nothing.

    The folder of a snapshot in the Hub's cache has the name of its repository.
    """
    if not isinstance(text, str) or not text:
        return None
    if found := _CACHED.search(text):
        text = found["name"].replace("--", "/", 1)
    elif Path(text).expanduser().exists():
        return None
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def dataset_name(source: str) -> str | None:
    """The data set on the Hub that ``--data`` named; ``None`` for a file."""
    name = source.partition(":")[0]
    return None if name.endswith(_ENDINGS) else hub_name(name)
