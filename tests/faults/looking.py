"""What a folder holds after a kill: all that loads, as digests; and what differs from the run that was not killed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor

import hf_elastic as he
from hf_elastic.files import LOCK_FILE
from hf_elastic.supernet_folder import class_named
from hf_elastic.training.resume import MARKER, incompleteness

# What is no result of the work, by its name, and why. All else has to have the same bits.
IGNORED_KEYS = {
    "seconds": "how long it took",
    "latency": "measured with a clock",
    "problem_type": "stock classifiers note it in their config in the first forward pass, and a run that was over when "
    "it was resumed has none; it is found out again from the labels",
}
IGNORED_FILES = {  # patterns of paths
    "*search.db": "a database with times of day in it; what the search made of it is in search.json or result.json",
    f"*/checkpoint-*/{MARKER}": "sizes of the files beside it, each of which is compared; the same tensors make a file "
    "of another size when some of them were loaded",
    "*/checkpoint-*/README.md": "peft puts a model card into each checkpoint, and goes on from one that it finds, "
    "be it half",
}
_PICTURE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # plotly draws a new name for each picture
_PICKLED = (".pt", ".pth", ".bin")

Loaded = dict[str, str]
"""Digest of what loads, by ``kind place``."""


def loaded(folder: Path) -> Loaded:
    """Loads every folder that loads, in each way in which it does; what is written aside is nobody's to load."""
    found: Loaded = {}
    for place in (folder, *sorted(path for path in folder.rglob("*") if path.is_dir())):
        name = place.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in place.relative_to(folder).parts):
            continue
        for kind, (marker, load) in LOADERS.items():
            if any(place.glob(marker)) and (digest := _tried(load, place)) is not None:
                found[f"{kind} {name}"] = digest
    return found


def torn(folder: Path) -> list[str]:
    """JSON files in their place that are no JSON; those of a Trainer's checkpoint are told by its marker."""
    found = []
    for file in sorted(folder.rglob("*.json")):
        parts = file.relative_to(folder).parts
        if any(part.startswith((".", "checkpoint-")) for part in parts):
            continue
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found.append("/".join(parts))
    return found


def _tried(load: Callable[[Path], str], place: Path) -> str | None:
    try:
        return load(place)
    except Exception:  # it does not load, which is what half a folder should do
        return None


def _stock(place: Path) -> str:
    """As everybody does; weights that are missing, which transformers fills at random, are noted."""
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    model, report = class_named(config["architectures"][0]).from_pretrained(place, output_loading_info=True)  # type: ignore[misc]
    lacks = {key: sorted(map(str, values)) for key, values in report.items() if values}
    stated = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return _digest(model.state_dict(), [stated, lacks])


def _supernet(place: Path) -> str:
    supernet = he.Supernet.from_pretrained(place)
    return _digest(supernet.model.state_dict(), [supernet.space.digest, list(supernet.layer_order)])


def _adapter(place: Path) -> str:
    config = PeftConfig.from_pretrained(str(place))
    return _digest(load_peft_weights(str(place), device="cpu"), [config.to_dict()])


def _checkpoint(place: Path) -> str:
    """What a run would be resumed from."""
    if (reason := incompleteness(place)) is not None:
        raise ValueError(reason)
    files = [file for file in sorted(place.iterdir()) if file.name != MARKER and not file.name.startswith(".")]
    return hashlib.sha256(repr([(file.name, content(file)) for file in files]).encode()).hexdigest()


LOADERS: Mapping[str, tuple[str, Callable[[Path], str]]] = {
    "stock": ("config.json", _stock),
    "supernet": ("search_space.json", _supernet),
    "adapter": ("adapter_config.json", _adapter),
    "checkpoint": ("trainer_state.json", _checkpoint),
}


def _digest(tensors: Mapping[str, Tensor], beside: list[Any]) -> str:
    digest = hashlib.sha256(repr(_plain(beside)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _plain(value: Any) -> Any:
    """The value with mappings and sets in order, tensors as digests, and without what is ignored."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(_bytes(value)).hexdigest())
    if isinstance(value, Mapping):
        return sorted((str(key), _plain(one)) for key, one in value.items() if key not in IGNORED_KEYS)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return repr(value)


def content(file: Path) -> str:
    """A digest of what a file says."""
    if file.suffix == ".json":
        said: Any = _plain(json.loads(file.read_text(encoding="utf-8")))
    elif file.suffix == ".safetensors":
        said = _plain(load_file(file))
    elif file.suffix in _PICKLED:
        value = torch.load(file, weights_only=False)
        said = _plain(value.to_dict() if file.name == "training_args.bin" else value)
    elif file.suffix == ".html":
        said = _PICTURE.sub("", file.read_text(encoding="utf-8"))
    else:
        said = file.read_bytes()
    return hashlib.sha256(repr(said).encode()).hexdigest()


def differences(whole: Path, killed: Path) -> list[str]:
    """Files of two folders that are not the same, leftovers not counted: of each, what is wrong with it."""
    one, other = dict(_files(whole)), dict(_files(killed))
    found = [f"{name} is missing" for name in sorted(one.keys() - other.keys())]
    found += [f"{name} is there, too" for name in sorted(other.keys() - one.keys())]
    for name in sorted(one.keys() & other.keys()):
        ignored = any(fnmatch(name, pattern) for pattern in IGNORED_FILES)
        if not ignored and one[name].read_bytes() != other[name].read_bytes():
            found += [f"{name} differs"] if content(one[name]) != content(other[name]) else []
    checkpoints = sorted(file.parent for name, file in other.items() if fnmatch(name, f"*/checkpoint-*/{MARKER}"))
    return found + [f"{path.name} is not whole: {why}" for path in checkpoints if (why := incompleteness(path))]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), file


def leftovers(folder: Path) -> list[str]:
    """What was written aside and is still there: the outermost of each."""
    found = []
    for path in sorted(folder.rglob(".*")):
        name = path.relative_to(folder)
        if path.name != LOCK_FILE and not any(part.startswith(".") for part in name.parts[:-1]):
            found.append(name.as_posix())
    return found
