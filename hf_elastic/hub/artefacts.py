"""What a folder is: a model, a supernet, adapters or routers, by the records in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_elastic.checkpoint.companions import MODULES
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.checkpoint.run_record import RESULT_FILE
from hf_elastic.errors import CheckpointError, ElasticError
from hf_elastic.files import given_path, read_json
from hf_elastic.routers_folder import ROUTERS_FILE
from hf_elastic.runtimes.graph_folder import RUNTIME_FILE
from hf_elastic.runtimes.opening import gguf_file
from hf_elastic.supernet_folder import SPACE_FILE

Kind = Literal["model", "supernet", "adapter", "routers"]
CAUSAL_TYPES = ("gpt2", "llama", "qwen2", "qwen3", "mistral")
CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
BASE_FOLDER = "base"
"""Where an export of adapters keeps the base that it was compressed with (``--apart``)."""
CLASSIFIER_FOLDER = "classifier"
"""Where ``hf-elastic elm --finetune`` puts the classifier that it made of its model."""


@dataclass(frozen=True)
class Artefact:
    """A folder that can be shared, and its records; those that it has not are empty.

    Attributes:
        folder: where.
        kind: what it is first of all.
        config: ``config.json``.
        adapter: ``adapter_config.json``.
        architecture: ``architecture.json``.
        routers: ``routers.json``.
        space: ``search_space.json``.
    """

    folder: Path
    kind: Kind
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    architecture: Mapping[str, Any]
    routers: Mapping[str, Any]
    space: Mapping[str, Any]

    @property
    def remote_code(self) -> bool:
        """Whether it brings code of its own."""
        return bool(self.config.get("auto_map"))

    @property
    def loadability(self) -> str:
        """How a model loads, as its export said, or by its config."""
        return str(self.architecture.get("loadability") or ("remote-code" if self.remote_code else "stock"))

    @property
    def bits(self) -> int | None:
        """Bits of the integers that linear layers are stored as."""
        groups = (self.config.get("quantization_config") or {}).get("config_groups") or {}
        found = [int(group["weights"]["num_bits"]) for group in groups.values() if group.get("weights")]
        return min(found, default=None)

    @property
    def sentence_transformers(self) -> bool:
        """Whether it is a sentence encoder as sentence-transformers saves it."""
        return self.kind == "model" and (self.folder / MODULES).is_file()

    @property
    def routed(self) -> bool:
        """Whether it is a model that holds routers itself."""
        return bool(self.config.get("routing"))

    @property
    def elastic(self) -> bool:
        """Whether it is an adapter whose ranks are choices, or that is part of the weight."""
        return bool(self.adapter.get("ranks")) or self.in_weight

    @property
    def in_weight(self) -> bool:
        """Whether it is an adapter that only hf_elastic computes: SparsePEFT or QA-SparsePEFT."""
        return bool(self.adapter.get("sparse") or self.adapter.get("quantization_aware"))

    @property
    def stated_base(self) -> str | None:
        """Folder or name of what it was made from, as its own records say."""
        stated = (
            self.adapter.get("base_model_name_or_path"), self.routers.get("base"), self.space.get("parent"),
            self.architecture.get("parent"), self.config.get("_name_or_path"),
        )  # fmt: skip
        return next((str(name) for name in stated if name), None)


def recognise(folder: str | Path) -> Artefact:
    """Reads the records of a folder.

    Raises:
        CheckpointError: it is no artefact (a run, a family, what is for a runtime, nothing of ours), or a record in it
            is broken.
    """
    place = given_path(folder)
    if not place.is_dir():
        raise CheckpointError(f"{place} is no folder; give one that holds a model, a supernet, adapters or routers")
    if (place / RUNTIME_FILE).is_file() or gguf_file(place):
        raise CheckpointError(
            f"{place} was converted for a runtime, which has no card of ours; `hf upload` takes such a folder"
        )
    names = {
        name: (place / name).is_file()
        for name in (SPACE_FILE, ROUTERS_FILE, ADAPTER_CONFIG, CONFIG_FILE, ARCHITECTURE_FILE)
    }
    kind = _kind(names)
    if kind is None:
        raise CheckpointError(f"{place} {_what_else(place)}")
    config, adapter, architecture, routers, space = (
        read_json(place / name) if names[name] else {}
        for name in (CONFIG_FILE, ADAPTER_CONFIG, ARCHITECTURE_FILE, ROUTERS_FILE, SPACE_FILE)
    )
    return Artefact(place, kind, config, adapter, architecture, routers, space)


@contextmanager
def written_by_us(folder: Path) -> Iterator[None]:
    """Turns what a record lacks, or holds in another form than hf_elastic writes, into one line.

    Raises:
        CheckpointError: the block stumbled over a record.
    """
    try:
        yield
    except ElasticError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        wrong = f"{reason} is missing" if isinstance(error, KeyError) else reason
        raise CheckpointError(
            f"a record in {folder}, or of its run, is not as hf_elastic writes it ({wrong}); write it again, or name "
            "another run"
        ) from error


def _kind(there: Mapping[str, bool]) -> Kind | None:
    if there[SPACE_FILE]:
        return "supernet"
    if there[ROUTERS_FILE]:
        return "routers"
    if there[ADAPTER_CONFIG]:
        return "adapter"
    return "model" if there[CONFIG_FILE] else None


def _what_else(place: Path) -> str:
    """What a folder is that is no artefact, and what to do."""
    if place.name.endswith(".run") or (place / RESULT_FILE).is_file():
        output = place.name.removesuffix(".run")
        return f"is the folder of a run, which is not shared; push what it exported, {place.with_name(output)}"
    sizes = sorted(child.name for child in place.iterdir() if (child / ARCHITECTURE_FILE).is_file())
    if sizes:
        return f"is a family of {', '.join(sizes)}; push each of them into a repository of its own"
    return (
        f"holds no {CONFIG_FILE}, {SPACE_FILE}, {ADAPTER_CONFIG} or {ROUTERS_FILE}: it is no model, supernet, adapter "
        "or routers; write one by export, save_pretrained or save_routers"
    )
