"""Copies of valid folders in which some things are not as they should be: files, sizes, links, pickles, code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_mutations import (
    Random,
    hostile_bytes,
    hostile_card,
    hostile_json,
    hostile_safetensors,
    hostile_value,
    written,
)
from fuzz_watching import Place

from hf_elastic.files import file_digest


class _Payload:
    """What a pickle runs when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.marker), "w")


def hostile_code(marker: Path) -> str:
    """A modeling file that leaves a trace when it is run."""
    return (
        f"open({str(marker)!r}, 'w').write('ran')\nfrom transformers import PreTrainedConfig, PreTrainedModel\n\n\n"
        "class HostileConfig(PreTrainedConfig):\n    model_type = 'hostile'\n\n\n"
        "class HostileModel(PreTrainedModel):\n    config_class = HostileConfig\n"
    )


def hostile_folder(rng: Random, source: Path, place: Place, *, focus: Sequence[str] = (), pickles: bool = True) -> Path:
    """A copy of a folder in which one to three things are not as they should be; one in twenty is.

    Args:
        rng: of everything random.
        source: a valid folder.
        place: of the case.
        focus: names of files that are changed more often than others.
        pickles: whether weights may be replaced by one.
    """
    folder = place.inside / "given"
    shutil.copytree(source, folder)
    for _ in range(0 if rng.random() < 0.05 else rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        liked = [path for path in files if path.name in focus]
        if not files:
            break
        file = rng.choice(liked) if liked and rng.random() < 0.75 else rng.choice(files)
        with suppress(OSError, RecursionError):  # of a second change, where the first left a link, or a deep nesting
            _change(rng, file, place, pickles=pickles)
    if rng.random() < 0.5:
        _reseal(folder)
    return folder


def _change(rng: Random, file: Path, place: Place, *, pickles: bool) -> None:
    chance = rng.random()
    if chance < 0.06:
        _misplace(rng, file, place)
    elif chance < 0.12:
        _plant(rng, file.parent, place, pickles=pickles)
    elif file.suffix == ".json":
        file.write_bytes(hostile_record(rng, file))
    elif file.suffix == ".safetensors":
        file.write_bytes(hostile_safetensors(rng, file.read_bytes()))
    elif file.suffix == ".md":
        file.write_bytes(hostile_card(rng))
    elif file.suffix == ".py":
        file.write_text(hostile_code(place.marker))
    else:
        file.write_bytes(hostile_bytes(rng, file.read_bytes()))


def hostile_record(rng: Random, file: Path) -> bytes:
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return hostile_bytes(rng, file.read_bytes())
    if isinstance(data, dict) and "model_type" in data and rng.random() < 0.4:
        _resize(rng, data)
        return written(data).encode("utf-8", errors="surrogatepass")
    return hostile_json(rng, data)


_SIZES = (
    "hidden_size", "n_embd", "intermediate_size", "n_inner", "num_hidden_layers", "n_layer", "num_attention_heads",
    "n_head",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "n_positions", "head_dim", "type_vocab_size",
    "bottleneck_size", "bottleneck_head_dim", "embedding_size", "pad_token_id", "sliding_window", "num_labels",
)  # fmt: skip
_ABSURD: tuple[Any, ...] = (
    0, -1, 1, 3, 2**20, 10**6, 10**7, 10**9, 10**12, 2**31, 2**62, 2**63, 10**30, 1.5, "32", None, True, [1],
    [32] * 3, {},
)  # fmt: skip


def _resize(rng: Random, config: dict[str, Any]) -> None:
    """Gives a config of a model absurd sizes, for all layers or for one."""
    holders = [config]
    layers = config.get("per_layer_config")
    if isinstance(layers, dict):
        holders += [entry for entry in layers.values() if isinstance(entry, dict)]
    for _ in range(rng.randint(1, 2)):
        holder = rng.choice(holders)
        known = [name for name in _SIZES if name in holder] or list(_SIZES)
        holder[rng.choice(known if rng.random() < 0.8 else list(_SIZES))] = rng.choice(_ABSURD)
    if rng.random() < 0.2:
        for name in ("candidate_widths", "candidate_heads", "candidate_blocks", "layer_types", "architectures"):
            if isinstance(config.get(name), list) and rng.random() < 0.5:
                config[name] = rng.choice((config[name][:-1], config[name] * 2, [], [hostile_value(rng)], None))
    if isinstance(layers, dict) and rng.random() < 0.3:
        layers[rng.choice(("-1", "99", "x", "10000000000", "0"))] = rng.choice(
            ({}, {"skip": ["x"]}, {"skip": "mlp"}, None, [])
        )


def _misplace(rng: Random, file: Path, place: Place) -> None:
    """No file, a folder, a link in a circle, out of the folder, or to nothing."""
    content = file.read_bytes()
    file.unlink()
    chance = rng.randrange(6)
    if chance == 0:
        file.mkdir()
    elif chance == 1:
        file.symlink_to(file.name)
    elif chance == 2:
        outside = place.root / f"outside-{file.name}"
        outside.write_bytes(content)
        file.symlink_to(outside)
    elif chance == 3:
        file.symlink_to("/nowhere")
    elif chance == 4:
        file.write_bytes(b"")


def _plant(rng: Random, folder: Path, place: Place, *, pickles: bool) -> None:
    """Pickles in the place of weights, or code that a config names."""
    if pickles and rng.random() < 0.5:
        plant_pickle(rng, folder, place)
    else:
        plant_code(rng, folder, place)


_PICKLES = {"adapter_model.safetensors": "adapter_model.bin", "model.safetensors": "pytorch_model.bin"}


def plant_pickle(rng: Random, folder: Path, place: Place) -> None:
    """The weights as a pickle, which runs something or only holds tensors."""
    import torch
    from safetensors.torch import load_file

    file = rng.choice(sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"])
    pickled = folder / _PICKLES.get(file.name, rng.choice(("pytorch_model.bin", "adapter_model.bin", "model.pt")))
    if rng.random() < 0.5:
        pickled.write_bytes(pickle.dumps({"weight": _Payload(place.marker)}))
    else:
        try:
            torch.save(load_file(file), pickled)
        except Exception:  # a file that was changed before, or is none
            pickled.write_bytes(pickle.dumps({}))
    if rng.random() < 0.8:
        file.unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    record = folder / "search_space.json"
    if record.is_file() and rng.random() < 0.8:
        rewrite(record, weights={pickled.name: file_digest(pickled)})
    if file.name == "model.safetensors" and rng.random() < 0.3:
        names = {"weight_map": {"a.weight": pickled.name}, "metadata": {}}
        (folder / f"{pickled.name}.index.json").write_text(json.dumps(names))


def plant_code(rng: Random, folder: Path, place: Place) -> None:
    """A config that names classes in a file beside it, of a type that is known or not."""
    (folder / "modeling_hostile.py").write_text(hostile_code(place.marker))
    config = folder / "config.json"
    stated = read_or_empty(config)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoTokenizer")
    classes = {kind: f"modeling_hostile.Hostile{'Config' if kind == 'AutoConfig' else 'Model'}" for kind in kinds}
    if rng.random() < 0.5:
        stated["model_type"] = "hostile"
    config.write_text(json.dumps({**stated, "auto_map": classes}))
    for name in ("tokenizer_config.json", "adapter_config.json"):
        if (folder / name).is_file():
            (folder / name).write_text(
                json.dumps({**read_or_empty(folder / name), "auto_map": classes, "auto_mapping": classes})
            )


def read_or_empty(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**read_or_empty(file), **changes}))


def _reseal(folder: Path) -> None:
    """Writes digests of changed weights into records that state them, so that what lies behind the check is reached."""
    record, routers = folder / "search_space.json", folder / "routers.json"
    if isinstance(stated := read_or_empty(record).get("weights"), dict):
        files = {file.name: file for file in folder.iterdir() if file.is_file()}
        sums = {name: file_digest(files[name]) for name in stated if name in files}
        rewrite(record, weights=sums or stated)
    if routers.is_file() and read_or_empty(routers) and (folder / "routers.safetensors").is_file():
        rewrite(routers, weights=file_digest(folder / "routers.safetensors"))
