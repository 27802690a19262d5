"""Targets that read a folder: supernets, checkpoints, adapters, routers, runs, cards, exports for runtimes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_mutations import (
    NAMES,
    Random,
    hostile_bytes,
    hostile_card,
    hostile_data,
    hostile_json,
    hostile_safetensors,
    hostile_value,
    written,
)
from fuzz_running import Target
from fuzz_seeds import Seeds
from fuzz_watching import Place, Refusal

import hf_elastic as he
from hf_elastic.files import file_digest
from hf_elastic.hub.artefacts import recognise
from hf_elastic.hub.card import model_card
from hf_elastic.hub.contents import contents_of, without_local_folders
from hf_elastic.hub.readme import is_handwritten
from hf_elastic.packed_format import unpack_
from hf_elastic.pipeline.scoring import RankingOptions, score_source
from hf_elastic.report import describe_folder
from hf_elastic.reporting.writing import write_figures, write_report
from hf_elastic.runtimes.matrix import runs_where_folder
from hf_elastic.runtimes.opening import open_model
from hf_elastic.runtimes.runtime_model import RuntimeModel

Call = Callable[[], object]


class _Payload:
    """What a pickle runs when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.marker), "w")


def _code(marker: Path) -> str:
    """A modeling file that leaves a trace when it is run."""
    return (
        f"open({str(marker)!r}, 'w').write('ran')\nfrom transformers import PreTrainedConfig, PreTrainedModel\n\n\n"
        "class HostileConfig(PreTrainedConfig):\n    model_type = 'hostile'\n\n\n"
        "class HostileModel(PreTrainedModel):\n    config_class = HostileConfig\n"
    )


# -- folders ---------------------------------------------------------------------------------------------------------


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
        file.write_bytes(_hostile_record(rng, file))
    elif file.suffix == ".safetensors":
        file.write_bytes(hostile_safetensors(rng, file.read_bytes()))
    elif file.suffix == ".md":
        file.write_bytes(hostile_card(rng))
    elif file.suffix == ".py":
        file.write_text(_code(place.marker))
    else:
        file.write_bytes(hostile_bytes(rng, file.read_bytes()))


def _hostile_record(rng: Random, file: Path) -> bytes:
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
        _plant_pickle(rng, folder, place)
    else:
        _plant_code(rng, folder, place)


_PICKLES = {"adapter_model.safetensors": "adapter_model.bin", "model.safetensors": "pytorch_model.bin"}


def _plant_pickle(rng: Random, folder: Path, place: Place) -> None:
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
        _rewrite(record, weights={pickled.name: file_digest(pickled)})
    if file.name == "model.safetensors" and rng.random() < 0.3:
        names = {"weight_map": {"a.weight": pickled.name}, "metadata": {}}
        (folder / f"{pickled.name}.index.json").write_text(json.dumps(names))


def _plant_code(rng: Random, folder: Path, place: Place) -> None:
    """A config that names classes in a file beside it, of a type that is known or not."""
    (folder / "modeling_hostile.py").write_text(_code(place.marker))
    config = folder / "config.json"
    stated = _read(config)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoTokenizer")
    classes = {kind: f"modeling_hostile.Hostile{'Config' if kind == 'AutoConfig' else 'Model'}" for kind in kinds}
    if rng.random() < 0.5:
        stated["model_type"] = "hostile"
    config.write_text(json.dumps({**stated, "auto_map": classes}))
    for name in ("tokenizer_config.json", "adapter_config.json"):
        if (folder / name).is_file():
            (folder / name).write_text(
                json.dumps({**_read(folder / name), "auto_map": classes, "auto_mapping": classes})
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**_read(file), **changes}))


def _reseal(folder: Path) -> None:
    """Writes digests of changed weights into records that state them, so that what lies behind the check is reached."""
    record, routers = folder / "search_space.json", folder / "routers.json"
    if isinstance(stated := _read(record).get("weights"), dict):
        files = {file.name: file for file in folder.iterdir() if file.is_file()}
        sums = {name: file_digest(files[name]) for name in stated if name in files}
        _rewrite(record, weights=sums or stated)
    if routers.is_file() and _read(routers) and (folder / "routers.safetensors").is_file():
        _rewrite(routers, weights=file_digest(folder / "routers.safetensors"))


# -- targets ---------------------------------------------------------------------------------------------------------


def _info(seeds: Seeds) -> Callable[[Random, Place], Call]:
    kinds = (
        "run", "supernet", "blocks", "export", "stock", "static-bert", "routed", "sharded", "base", "adapter",
        "plain-adapter",
        "integers", "graph", "routers",
    )  # fmt: skip

    def make(rng: Random, place: Place) -> Call:
        folder = hostile_folder(rng, seeds.folder(rng.choice(kinds)), place)
        return lambda: describe_folder(folder).encode("utf-8")

    return make


def _supernet(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        source = seeds.folder(rng.choice(("supernet", "bert", "blocks")))
        folder = hostile_folder(rng, source, place, focus=("search_space.json", "config.json"))

        def call() -> None:
            supernet = he.Supernet.from_pretrained(folder)
            assert str(supernet)
            supernet.set_active(supernet.space.smallest())

        return call

    return make


def _automodel(seeds: Seeds) -> Callable[[Random, Place], Call]:
    from transformers import AutoConfig, AutoModel

    def make(rng: Random, place: Place) -> Call:
        source = seeds.folder(rng.choice(("export", "static-bert", "static-gpt2", "routed", "blocks")))
        # AutoModel is transformers' own, which reads pickles of tensors alone (weights_only); it is not asked to here.
        folder = hostile_folder(rng, source, place, focus=("config.json",), pickles=False)

        def call() -> None:
            try:
                AutoConfig.from_pretrained(folder, trust_remote_code=False)
                AutoModel.from_pretrained(folder, trust_remote_code=False)
            except MemoryError:
                raise
            except Exception as error:
                raise_unless_of_others(error)

        return call

    return make


_SAID = (ValueError, TypeError, OSError, RuntimeError)
"""What a config and a model of transformers say to what they do not take."""


def raise_unless_of_others(error: Exception) -> None:
    """Raises on what a static class stumbled over; what it says, and what transformers does alone, is a refusal."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        place, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    if "/hf_elastic/" in place and not isinstance(error, _SAID):
        raise error
    raise Refusal("said by transformers, or by a static class to it") from error


def _adapter(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        kind = "adapter" if rng.random() < 0.85 else "plain-adapter"
        folder = hostile_folder(rng, seeds.folder(kind), place, focus=("adapter_config.json",))
        base = seeds.base

        def call() -> None:
            model = copy.deepcopy(base)
            before = set(model.state_dict())
            try:
                supernet = he.load_adapter(model, folder)
            except he.ElasticError:
                assert set(model.state_dict()) == before, "the model is not as it was"
                raise
            supernet.set_active(supernet.space.smallest())

        return call

    return make


def _routers(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        folder = hostile_folder(rng, seeds.folder("routers"), place, focus=("routers.json",))
        base = seeds.base
        other = rng.random() < 0.3

        def call() -> None:
            model = copy.deepcopy(base)
            before = set(model.state_dict())
            try:
                he.load_routers(model, folder, allow_other_base=other)
            except he.ElasticError:
                assert set(model.state_dict()) == before, "the model is not as it was"
                raise

        return call

    return make


def _packed(seeds: Seeds) -> Callable[[Random, Place], Call]:
    from transformers import AutoModelForCausalLM

    def make(rng: Random, place: Place) -> Call:
        ours = rng.random() < 0.5
        if ours:
            folder = hostile_folder(rng, seeds.folder("integers"), place, focus=("config.json",))
        else:  # what a user loads by transformers itself: only what unpack_ reads of it is hostile
            folder = place.inside / "given"
            shutil.copytree(seeds.folder("integers"), folder)
            stated = _read(folder / "config.json")
            stated["quantization_config"] = hostile_data(rng, stated["quantization_config"])
            (folder / "config.json").write_bytes(written(stated).encode("utf-8", errors="surrogatepass"))
            if rng.random() < 0.5:
                file = folder / "model.safetensors"
                file.write_bytes(hostile_safetensors(rng, file.read_bytes()))

        def call() -> None:
            if ours:
                open_model(folder)
                return
            try:
                model = AutoModelForCausalLM.from_pretrained(folder)
            except MemoryError:
                raise
            except Exception as error:
                raise Refusal("said by transformers") from error
            unpack_(model)

        return call

    return make


def _score(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        source = seeds.folder(rng.choice(("base", "sharded", "stock", "integers", "export")))
        folder = hostile_folder(rng, source, place, focus=("model.safetensors.index.json", "config.json"))
        return lambda: str(score_source(str(folder), RankingOptions()))

    return make


def _report(seeds: Seeds) -> Callable[[Random, Place], Call]:
    names = ("result.json", "search.json", "exact.json", "quality.json", "latency.json", "routing.json", "config.json")
    write_figures(seeds.folder("run"), seeds.root / "figures")  # matplotlib looks for fonts once

    def make(rng: Random, place: Place) -> Call:
        focus = rng.sample(names, 2) if rng.random() < 0.5 else ("result.json",)
        folder = hostile_folder(rng, seeds.folder("run"), place, focus=focus)
        if rng.random() < 0.1:
            return lambda: write_figures(folder, place.out / "figures", format="svg")
        return lambda: write_report(folder, place.out / "report.html")

    return make


def _hub(seeds: Seeds) -> Callable[[Random, Place], Call]:
    kinds = (
        "supernet",
        "blocks",
        "export",
        "stock",
        "routed",
        "sharded",
        "base",
        "adapter",
        "plain-adapter",
        "routers",
        "integers",
    )

    def make(rng: Random, place: Place) -> Call:
        folder = hostile_folder(rng, seeds.folder(rng.choice(kinds)), place)
        run = None
        if rng.random() < 0.3:
            shutil.copytree(seeds.folder("run"), place.inside / "work")
            run = place.inside / "work"
            (run / "result.json").write_bytes(_hostile_record(rng, run / "result.json"))
        if rng.random() < 0.4 and not (folder / "README.md").is_dir():
            (folder / "README.md").unlink(missing_ok=True)
            (folder / "README.md").write_bytes(hostile_card(rng))
        base = rng.choice((None, None, "someone/base", rng.choice(NAMES)))

        def call() -> None:
            contents = contents_of(folder)
            without_local_folders(contents, base="someone/base")
            for name in contents.files:
                assert not Path(name).is_absolute() and ".." not in Path(name).parts, name
                assert contents.size(name) >= 0
            model_card(folder, run=run, base_model=base).encode("utf-8")

        return call

    return make


def _card(seeds: Seeds) -> Callable[[Random, Place], Call]:
    """Cards of parents, whose metadata a card carries over."""

    def make(rng: Random, place: Place) -> Call:
        shutil.copytree(seeds.folder("stock"), place.inside / "given")
        parent = place.inside / "parent"
        parent.mkdir()
        (parent / "README.md").write_bytes(hostile_card(rng))
        _rewrite(place.inside / "given" / "architecture.json", parent=str(parent))

        def call() -> None:
            recognise(place.inside / "given")
            text = (parent / "README.md").read_text(encoding="utf-8", errors="replace")
            assert is_handwritten(text) in (True, False)
            made = model_card(place.inside / "given")
            made.encode("utf-8")
            assert len(made) < 2**20, f"a card of {len(made)} characters"

        return call

    return make


def _runtime(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        kind = rng.choice(("graph", "graph", "export", "stock", "static-gpt2", "adapter"))
        folder = hostile_folder(rng, seeds.folder(kind), place, focus=("runtime.json", "config.json"))
        if kind == "graph" and rng.random() < 0.5:
            return lambda: RuntimeModel(folder)
        return lambda: str(runs_where_folder(folder)).encode("utf-8")

    return make


def _foreign(seeds: Seeds) -> Callable[[Random, Place], Call]:
    """Pickles and code, in the face of everything that opens a folder."""
    kinds = (
        "supernet",
        "bert",
        "blocks",
        "export",
        "stock",
        "base",
        "adapter",
        "routers",
        "integers",
        "sharded",
        "run",
    )

    def readers(folder: Path) -> tuple[Callable[[], object], ...]:
        return (
            lambda: he.Supernet.from_pretrained(folder), lambda: describe_folder(folder), lambda: open_model(folder),
            lambda: he.load_adapter(copy.deepcopy(seeds.base), folder), lambda: model_card(folder),
            lambda: he.load_routers(copy.deepcopy(seeds.base), folder), lambda: contents_of(folder),
            lambda: score_source(str(folder), RankingOptions()), lambda: write_report(folder,
            folder.parents[1] / "out" / "x.html"),
            lambda: runs_where_folder(folder),
        )  # fmt: skip

    def make(rng: Random, place: Place) -> Call:
        folder = place.inside / "given"
        shutil.copytree(seeds.folder(rng.choice(kinds)), folder)
        if rng.random() < 0.7:
            _plant_pickle(rng, folder, place)
        if rng.random() < 0.6:
            _plant_code(rng, folder, place)
        for file in folder.glob("*elastic*.py"):
            file.write_text(_code(place.marker))
        return rng.choice(readers(folder))

    return make


def _storage(seeds: Seeds) -> Callable[[Random, Place], Call]:
    """Databases of a search that were damaged, or that are something else."""
    from recorded_runs import macs, space, structure

    goals = [
        he.Objective("structure", structure, direction="maximize"),
        he.Objective("macs", macs, cost=True),
    ]

    def searched(path: Path) -> object:
        return he.search_subnets(
            space(), goals, evaluations=8, within={"macs": 0.75}, seed=0, progress=False, storage=f"sqlite:///{path}"
        )

    whole = seeds.root / "search.db"
    searched(whole)
    content = whole.read_bytes()

    def make(rng: Random, place: Place) -> Call:
        path = place.out / "search.db"
        damaged = hostile_bytes(rng, content)
        for _ in range(rng.randint(0, 3)):
            damaged = hostile_bytes(rng, damaged) if rng.random() < 0.3 else _flipped(rng, damaged)
        path.write_bytes(damaged)
        (place.inside / "search.db").write_bytes(damaged)
        return lambda: searched(path)

    return make


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 10, 100))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def folder_targets(seeds: Seeds) -> list[Target]:
    """All targets of this file."""
    return [
        Target("info of a folder", _info(seeds), 25),
        Target("supernet folder", _supernet(seeds), 20),
        Target("AutoModel of our types", _automodel(seeds), 20),
        Target("adapter folder", _adapter(seeds), 20),
        Target("routers folder", _routers(seeds), 20),
        Target("packed integers", _packed(seeds), 10),
        Target("score of a checkpoint", _score(seeds), 12),
        Target("report of a run", _report(seeds), 20),
        Target("folder to be shared", _hub(seeds), 20),
        Target("card of a parent", _card(seeds), 15),
        Target("runtimes", _runtime(seeds), 12),
        Target("pickles and code", _foreign(seeds), 20),
        Target("search storage", _storage(seeds), 3),
    ]


assert os.name == "posix", "children are forked"
