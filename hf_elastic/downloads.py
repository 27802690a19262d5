"""Folders by their names on the Hub: what ``from_pretrained`` and ``load_...`` read may lie there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_elastic.errors import CheckpointError
from hf_elastic.files import given_path

_READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
"""What may be read of a repository: no pickles."""


def checkpoint_folder(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of that path, or a copy of the repository of that name, in the Hub's cache.

    Args:
        source: a folder, or ``user/name``. What is neither is returned as it is, for the caller to say what is missing.
        revision: branch, tag or commit of the repository.
        token: of the Hub; by default the one that is logged in.

    Raises:
        CheckpointError: the repository is not there, cannot be read, or names files outside of itself.
    """
    folder = given_path(source)
    if folder.is_dir() or isinstance(source, Path) or not _may_be_a_name(source):
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for a name on the Hub, {source} is a folder; leave it out")
        return folder
    try:
        return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=list(_READ)))
    except Exception as error:  # huggingface_hub and its transports raise whatever their parts raise
        raise CheckpointError(f"{source} is no folder here, and {_reason(error)}") from error


def _may_be_a_name(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, RevisionNotFoundError):
        return "on the Hub it has no such revision"
    if isinstance(error, GatedRepoError):
        return "on the Hub access to it has to be asked for"
    if isinstance(error, RepositoryNotFoundError):
        return "not on the Hub, or not for this token"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set and it" if is_offline_mode() else "the Hub cannot be reached; it"
        return f"{offline} is not in the cache"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"it cannot be read from the Hub: {lines[0][:300]}"
