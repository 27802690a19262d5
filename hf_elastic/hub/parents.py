"""The card of the parent: what a card made from it has to carry over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_elastic.errors import CheckpointError
from hf_elastic.hub.names import checked_repo_id, hub_name, local_folder

CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Parent:
    """What is known of the model that an artefact was made from.

    Attributes:
        name: on the Hub; ``None`` where it is not there.
        ancestor: name on the Hub of what a parent in a folder was made from itself, as its card says.
        data: metadata of its card that is carried over.
        note: what was not found, and what to do.
        confirmed: whether the Hub, or its cache, holds it.
    """

    name: str | None
    ancestor: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None
    confirmed: bool = False


def named_parent(name: str, *, token: str | bool | None = None) -> Parent:
    """The parent that a user names; the name stays, whether or not this token finds it on the Hub.

    Args:
        name: on the Hub.
        token: of the Hub.

    Raises:
        CheckpointError: it can be no name on the Hub, or is a folder here and was not found there.
    """
    known = hub_name(name) or checked_repo_id(name)
    found = _on_the_hub(known, token=token)
    if not found.confirmed and local_folder(name) is not None and known == name:
        raise CheckpointError(
            f"base_model={name!r} is a folder here and was not found on the Hub; push it, and give its name there"
        )
    note = found.note if found.name else f"{found.note}; it is named as the base model all the same"
    return replace(found, name=known, note=note)


def parent_of(stated: str | None, *, beside: Path | None = None, token: str | bool | None = None) -> Parent:
    """Reads the card of a parent that a record states: in its folder, or on the Hub (offline: in the cache).

    Args:
        stated: its folder or its name; ``None``: unknown.
        beside: the folder that the record is in.
        token: of the Hub.
    """
    if not stated:
        return Parent(None, note="the base model is not known: name it by base_model=")
    folder, name = local_folder(stated, beside=beside), hub_name(stated, beside=beside)
    if folder is not None:
        data = _metadata(folder / "README.md")
        theirs = data.get("base_model")
        ancestor = hub_name(theirs, beside=folder) if name is None else None
        note = None if name else f"the base model is the folder {folder}: push it, and name it by base_model="
        return Parent(name, ancestor, _carried(data), note, confirmed=name is not None)
    if name is None:
        return Parent(None, note="the base model is a folder that is gone: name it by base_model=")
    found = _on_the_hub(name, token=token)
    return found if found.name else replace(found, note=f"{found.note}; name the base model by base_model=")


def _on_the_hub(name: str, *, token: str | bool | None) -> Parent:
    try:
        data = _metadata(Path(hf_hub_download(name, "README.md", token=token)))
        return Parent(name, data=_carried(data), confirmed=True)
    except GatedRepoError:
        return Parent(name, confirmed=True)
    except RepositoryNotFoundError:
        return Parent(None, note=f"{name} is not on the Hub, or not for this token")
    except LocalEntryNotFoundError:  # offline, and none in the cache
        return Parent(name)
    except EntryNotFoundError:  # no card
        return Parent(name, confirmed=True)
    except Exception as error:  # huggingface_hub raises whatever its parts raise
        return Parent(name, note=f"the card of {name} could not be read ({type(error).__name__})")


def _carried(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: data[key] for key in CARRIED if data.get(key)}


def _metadata(card: Path) -> Mapping[str, Any]:
    """The YAML of a card; empty where there is none, or none that can be read."""
    if not card.is_file():
        return {}
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML of anyone
        return {}
