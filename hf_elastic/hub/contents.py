"""Which files of a folder are shared, and whether they are whole. Nothing is uploaded that is not expected here."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hf_elastic.checkpoint.companions import CHAT_TEMPLATES, MODULES, SENTENCE_TRANSFORMERS_FILES, TOKENIZER_FILES
from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.errors import CheckpointError
from hf_elastic.files import read_json
from hf_elastic.hub.artefacts import ADAPTER_CONFIG, BASE_FOLDER, CLASSIFIER_FOLDER, CONFIG_FILE, Artefact, recognise
from hf_elastic.routers_folder import ROUTERS_FILE, read_routers
from hf_elastic.routers_folder import WEIGHTS_FILE as ROUTER_WEIGHTS
from hf_elastic.supernet_folder import SPACE_FILE, read_record

CARD = "README.md"
_LEGAL = re.compile(r"(LICENSE|LICENCE|NOTICE|COPYING)([.-][\w.-]+)?", re.IGNORECASE)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = "model.safetensors.index.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICTURE = re.compile(r"[\w][\w.-]*\.(png|svg|jpg|jpeg|gif)")
_SHOWN = re.compile(r"!\[[^\]]*\]\(\s*(?:\./)?([\w][\w.-]*)\s*\)")
_INSIDE = {
    "model": ((CLASSIFIER_FOLDER, "model"),),
    "supernet": (("adapter", "adapter"), ("routers", "routers")),
    "adapter": ((BASE_FOLDER, "model"),),
    "routers": (),
}
_NAMES = {
    "model": (CONFIG_FILE, "generation_config.json", ARCHITECTURE_FILE, MODULES, *SENTENCE_TRANSFORMERS_FILES),
    "supernet": (CONFIG_FILE, "generation_config.json", SPACE_FILE),
    "adapter": (ADAPTER_CONFIG, ARCHITECTURE_FILE),
    "routers": (ROUTERS_FILE,),
}
_OURS = re.compile(
    r"(adapter/|routers/|base/|classifier/)?"
    r"(config\.json|generation_config\.json|architecture\.json|search_space\.json|routers\.(json|safetensors)"
    r"|adapter_(config\.json|model\.safetensors)|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|modules\.json|(configuration|modeling)_elastic_\w+\.py|elastic_\w+\.py)"
)


@dataclass(frozen=True)
class Contents:
    """What is uploaded of a folder.

    Attributes:
        artefact: the folder.
        files: where each file lies, by its path in the repository; the card is not among them.
        rewritten: contents of records in which folders of this machine were replaced.
        left_out: paths of files that are not shared.
    """

    artefact: Artefact
    files: dict[str, Path]
    rewritten: dict[str, bytes]
    left_out: tuple[str, ...]

    def size(self, name: str) -> int:
        """Bytes of one file."""
        return len(self.rewritten[name]) if name in self.rewritten else self.files[name].stat().st_size


def contents_of(folder: str | Path) -> Contents:
    """Lists what is shared of a folder, and checks that it is whole.

    Raises:
        CheckpointError: the folder is no artefact, a file is missing, truncated or broken, or a link leads out of it.
    """
    artefact = recognise(folder)
    files = dict(sorted(_files_of(artefact)))
    for name, file in files.items():
        _check_place(artefact.folder, name, file)
    there = {p.relative_to(artefact.folder).as_posix() for p in artefact.folder.rglob("*") if p.is_file()}
    left_out = tuple(sorted(there - files.keys() - {CARD}))
    return Contents(artefact, files, {}, left_out)


TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_TOKENIZERS = {"name_or_path", "special_tokens_map_file", "tokenizer_file"}  # paths of whoever saved it


def may_be_of_a_push(name: str) -> bool:
    """Whether a file of a repository has a name that pushes give to weights, records and code."""
    return _OURS.fullmatch(name) is not None


def without_local_folders(contents: Contents, *, base: str | None) -> Contents:
    """Records without folders of this machine: what they call the parent becomes ``base``, its name on the Hub."""
    keys = {
        ADAPTER_CONFIG: "base_model_name_or_path", ROUTERS_FILE: "base", SPACE_FILE: "parent",
        ARCHITECTURE_FILE: "parent", CONFIG_FILE: "_name_or_path",
    }  # fmt: skip
    rewritten = {}
    for name, file in contents.files.items():
        key = keys.get(PurePosixPath(name).name)
        if PurePosixPath(name).name == TOKENIZER_CONFIG and _OF_TOKENIZERS & (told := read_json(file)).keys():
            kept = {entry: value for entry, value in told.items() if entry not in _OF_TOKENIZERS}
            rewritten[name] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
        if key is None:
            continue
        data = read_json(file)
        nothing = None if key == "base_model_name_or_path" else ""
        stated = [entry for entry in (key, "base") if isinstance(data.get(entry), str) and data[entry]]
        changed = {entry: base or nothing for entry in stated}
        if any(data[entry] != value for entry, value in changed.items()):
            rewritten[name] = (json.dumps({**data, **changed}, indent=2) + "\n").encode()
    return replace(contents, rewritten=rewritten)


def _files_of(artefact: Artefact, prefix: str = "") -> Iterator[tuple[str, Path]]:
    folder = artefact.folder
    names = [name for name in (*_NAMES[artefact.kind], *TOKENIZER_FILES) if (folder / name).is_file()]
    names += [child.name for child in folder.iterdir() if child.is_file() and _LEGAL.fullmatch(child.name)]
    names += sorted({*_checked_weights(artefact)})
    names += _pictures(folder)
    if artefact.kind in ("model", "supernet"):
        names += _code(artefact)
    if artefact.kind == "model":
        names += _module_files(folder)
    templates = folder / CHAT_TEMPLATES
    names += [f"{CHAT_TEMPLATES}/{p.name}" for p in sorted(templates.glob("*.jinja"))] if templates.is_dir() else []
    yield from ((prefix + name, folder / name) for name in dict.fromkeys(names))
    for name, kind in _INSIDE[artefact.kind] if not prefix else ():
        if (folder / name).is_dir() and (inner := recognise(folder / name)).kind == kind:
            yield from _files_of(inner, f"{prefix}{name}/")


def _checked_weights(artefact: Artefact) -> tuple[str, ...]:
    """Names of the files of weights, which are all there and of the length that they say."""
    folder = artefact.folder
    if artefact.kind == "routers":
        read_routers(folder)
        return (ROUTER_WEIGHTS,)
    if artefact.kind == "adapter":
        names: tuple[str, ...] = (_ADAPTER_WEIGHTS,)
    elif (folder / _INDEX).is_file():
        names = tuple(sorted({str(file) for file in _mapped(folder).values()}))
    else:
        names = ("model.safetensors",)
    for name in names:
        check_safetensors(folder / name, only=_ADAPTER_WEIGHTS if artefact.kind == "adapter" else None)
    if artefact.kind == "supernet":
        read_record(folder)
    return (*names, _INDEX) if artefact.kind != "adapter" and (folder / _INDEX).is_file() else names


def _mapped(folder: Path) -> dict[str, Any]:
    """Which file each tensor is in."""
    found = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{folder / _INDEX} names no weights; copy the folder again")
    if wrong := sorted(str(file) for file in found.values() if not _WEIGHTS.fullmatch(str(file))):
        raise CheckpointError(f"{folder / _INDEX} names {wrong[0]!r}, which holds no weights; copy the folder again")
    return found


def check_safetensors(file: Path, *, only: str | None = None) -> None:
    """Compares the length of a file with the one that its header says, without reading its weights.

    Raises:
        CheckpointError: it is missing, truncated or no safetensors file.
    """
    if not file.is_file():
        pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in file.parent.glob(suffix))
        also = f"; {pickled[0]} is a pickle, which is not shared: save as safetensors" if pickled else ""
        raise CheckpointError(f"{file.parent} is not whole: {only or file.name} is missing{also}")
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length) if length < file.stat().st_size else b"")
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file; write it again") from error
    if (size := file.stat().st_size) != 8 + length + end:
        raise CheckpointError(f"{file} is truncated: it has {size} bytes of {8 + length + end}; write it again")


def _code(artefact: Artefact) -> list[str]:
    """Names of the modules that a model's ``auto_map`` reaches."""
    from transformers.dynamic_module_utils import get_relative_import_files

    folder, found = artefact.folder, set()
    stated = (artefact.config.get("auto_map") or {}).values()
    targets = [str(target) for value in stated for target in (value if isinstance(value, list) else [value]) if target]
    for target in (target for target in targets if "--" not in target):  # such are of another repository
        module = folder / f"{target.rpartition('.')[0]}.py"
        try:
            found |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
        except OSError as error:
            missing = Path(str(error.filename or module)).name
            raise CheckpointError(f"{folder} is not whole: {missing}, code of the model, is missing") from error
    return sorted(found)


def _module_files(folder: Path) -> list[str]:
    """Files of the modules that sentence-transformers adds to a model."""
    if not (folder / MODULES).is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads((folder / MODULES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MODULES} is no list of sentence-transformers modules: {error!r}") from error
    names = []
    for path in filter(None, paths):
        parts = path.replace("\\", "/").split("/")
        if ".." in parts or Path(path).is_absolute() or (folder / path).resolve() == folder.resolve():
            raise CheckpointError(f"{folder / MODULES} names {path!r}, which is not a folder inside of it")
        inside = [p for p in sorted((folder / path).rglob("*")) if p.suffix in (".json", ".safetensors", ".txt")]
        for file in (p for p in inside if p.suffix == ".safetensors"):
            check_safetensors(file)
        _check_no_pickle_is_needed(folder, path)
        names += [p.relative_to(folder).as_posix() for p in inside]
    return names


def _check_no_pickle_is_needed(folder: Path, path: str) -> None:
    """Refuses a module whose only weights are a pickle, which is not shared and without which nothing loads it."""
    pickles = [p for p in sorted((folder / path).rglob("pytorch_model*.bin")) if not [*p.parent.glob("*.safetensors")]]
    if pickles:
        raise CheckpointError(
            f"the only weights of {pickles[0].parent} are {pickles[0].name}, a pickle, which is not shared: save them "
            f"as safetensors by SentenceTransformer({str(folder)!r}).save_pretrained({str(folder)!r}, "
            "create_model_card=False)"
        )


def _pictures(folder: Path) -> list[str]:
    """Pictures that the folder's card shows."""
    card = folder / CARD
    if not card.is_file():
        return []
    shown = _SHOWN.findall(card.read_text(encoding="utf-8", errors="replace"))
    return [name for name in shown if _PICTURE.fullmatch(name) and (folder / name).is_file()]


def _check_place(folder: Path, name: str, file: Path) -> None:
    """Refuses a file that is a link out of the folder; those of the Hub's cache lead to its blobs."""
    root, target = folder.resolve(), file.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise CheckpointError(f"{name} in {folder} is a link to {target}, outside of it; copy the file there")
