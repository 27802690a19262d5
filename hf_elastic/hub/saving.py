"""What is given to a push, as a folder: folders as they are, models and handles saved into one that goes again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.checkpoint import export
from hf_elastic.checkpoint.companions import MODULES, TOKENIZER_FILES, copy_companions
from hf_elastic.errors import CheckpointError
from hf_elastic.files import whole_folder
from hf_elastic.hub.artefacts import recognise
from hf_elastic.layers import PartHolder
from hf_elastic.packed_format import write_weights
from hf_elastic.routers_folder import save_routers
from hf_elastic.space import Architecture, Value
from hf_elastic.supernet import Supernet
from hf_elastic.supernet_folder import save_generation_config, write_code


class Saved(Protocol):
    """What writes itself into a folder, as adapters do."""

    def save_pretrained(self, directory: str, /) -> Any:
        """Writes it."""


Thing = str | Path | Supernet | PreTrainedModel | Saved


@contextmanager
def staged(
    thing: Thing,
    *,
    architecture: Architecture | Mapping[str, Value] | None = None,
    model: PreTrainedModel | None = None,
    merge: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Path]:
    """Yields a folder that holds a thing.

    Args:
        thing: a folder, a supernet, a model, or adapters.
        architecture: of a supernet: this subnet instead of all of it.
        model: of this architecture, made better, as for :func:`hf_elastic.export`.
        merge: what becomes of adapters, as for :func:`hf_elastic.export`.
        tokenizer: saved instead of the parent's tokenizer files, and beside adapters and routers.

    Raises:
        CheckpointError: it cannot be saved so, or an argument does not fit the thing.
    """
    if isinstance(thing, str | Path):
        _require_nothing(architecture, model, merge, tokenizer, what="a folder")
        yield Path(thing).expanduser()
        return
    if not isinstance(thing, Supernet):
        _require_nothing(architecture, model, merge, what=f"a {type(thing).__name__}")
    with tempfile.TemporaryDirectory(prefix="hf-elastic-push-") as aside:
        folder = Path(aside) / "pushed"
        if isinstance(thing, Supernet) and architecture is not None:
            export(thing, architecture, folder, model=model, merge=merge, tokenizer=tokenizer)
        elif isinstance(thing, Supernet):
            _require_nothing(model, merge, what="a supernet without architecture=")
            _save_supernet(thing, folder, tokenizer=tokenizer)
        elif isinstance(thing, PreTrainedModel):
            _save_model(thing, folder, tokenizer=tokenizer)
        else:
            _save_adapters(thing, folder, tokenizer=tokenizer)
        yield folder


def _require_nothing(*given: object, what: str) -> None:
    if any(value is not None for value in given):
        raise CheckpointError(
            f"architecture=, model=, merge= and tokenizer= say what to write of a supernet; with {what} leave them out"
        )


def _save_supernet(supernet: Supernet, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """All of a supernet, with its parent's tokenizer; on a base without choices what stands on it."""
    if supernet.block_parts or any(part.choices for part in supernet.layer_parts):
        supernet.save_pretrained(folder)
        copy_companions(str(supernet.base.config._name_or_path or ""), folder, tokenizer=tokenizer)
        return
    if supernet.adapter_parts and supernet.router_parts:
        raise CheckpointError(
            "adapters and routers are pushed apart; save them by save_pretrained and save_routers, push these folders"
        )
    if supernet.router_parts:
        save_routers(supernet, folder)
        _save_tokenizer(tokenizer, folder)
        return
    with supernet.activate(supernet.space.largest()):
        _save_adapters(supernet.model, folder, tokenizer=tokenizer)


def _save_model(model: PreTrainedModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """A model as export writes it: integers packed, code beside the weights, the parent's tokenizer."""
    if any(isinstance(module, PartHolder) for module in model.modules()):
        raise CheckpointError(
            f"the {type(model).__name__} is the body of a supernet; push that, with architecture= for one subnet"
        )
    with whole_folder(folder) as place:
        save_generation_config(model, place)
        write_weights(model, place)
        write_code(model, place)
        copy_companions(str(model.config._name_or_path or ""), place, tokenizer=tokenizer)


def _save_adapters(thing: Any, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Adapters, by their own method; the card that peft writes with them is not taken."""
    peft = isinstance(thing, nn.Module) and any(kind.__module__.startswith("peft.") for kind in type(thing).__mro__)
    if not peft and not callable(getattr(thing, "save_pretrained", None)):
        raise CheckpointError(f"cannot push a {type(thing).__name__}; pass a folder, a supernet, a model or adapters")
    thing.save_pretrained(str(folder))
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def missing_companions(folder: Path, aside: Path) -> tuple[str, ...]:
    """Copies aside what a saved supernet leaves in its parent's folder and an export of it needs.

    Returns:
        Paths of what was copied, below ``aside``.
    """
    artefact = recognise(folder)
    parent = Path(artefact.stated_base or "")
    has = any((folder / name).is_file() for name in (*TOKENIZER_FILES, MODULES))
    if artefact.kind != "supernet" or has or not (parent.is_absolute() and parent.is_dir()):
        return ()
    return copy_companions(parent, aside)
