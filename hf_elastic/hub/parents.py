"""The card of the parent: what a card made from it has to carry over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from hf_elastic.hub.names import hub_name

CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Parent:
    """What is known of the model that an artefact was made from.

    Attributes:
        name: on the Hub; ``None`` where it is not there.
        data: metadata of its card that is carried over.
        note: what was not found, and what to do.
    """

    name: str | None
    data: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None


def parent_of(stated: str | None, *, token: str | bool | None = None) -> Parent:
    """Reads the card of a parent: in its folder, or on the Hub (offline: in the cache).

    Args:
        stated: its folder or its name; ``None``: unknown.
        token: of the Hub.
    """
    if not stated:
        return Parent(None, note="the base model is not known: name it by base_model=")
    folder, name = Path(stated).expanduser(), hub_name(stated)
    if folder.is_dir():
        data = _metadata(folder / "README.md")
        theirs = data.get("base_model")
        grandparent = hub_name(theirs if isinstance(theirs, str) else None)
        return _told(name or grandparent, data)
    if name is None:
        return Parent(None, note="the base model is a folder that is gone: name it by base_model=")
    return _on_the_hub(name, token=token)


def _on_the_hub(name: str, *, token: str | bool | None) -> Parent:
    try:
        return _told(name, _metadata(Path(hf_hub_download(name, "README.md", token=token))))
    except GatedRepoError:
        return _told(name, {})
    except RepositoryNotFoundError:
        return Parent(None, note=f"{name} is not on the Hub, or not for this token: name the base model by base_model=")
    except EntryNotFoundError:  # no card, or offline and none in the cache
        return _told(name, {})
    except Exception as error:  # huggingface_hub raises whatever its parts raise
        told = _told(name, {})
        return Parent(told.name, note=f"the card of {name} could not be read ({type(error).__name__}); {told.note}")


def _told(name: str | None, data: Mapping[str, Any]) -> Parent:
    carried = {key: data[key] for key in CARRIED if data.get(key)}
    note = None if "license" in carried else "the licence of the base model is not known: state one by license="
    return Parent(name, carried, note)


def _metadata(card: Path) -> Mapping[str, Any]:
    """The YAML of a card; empty where there is none, or none that can be read."""
    if not card.is_file():
        return {}
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML of anyone
        return {}
