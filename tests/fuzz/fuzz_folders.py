"""Targets that read a folder: supernets, checkpoints, adapters, routers, runs, cards, exports for runtimes."""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from fuzz_changed_folders import (
    hostile_code,
    hostile_folder,
    hostile_record,
    plant_code,
    plant_pickle,
    read_or_empty,
    rewrite,
)
from fuzz_mutations import NAMES, Random, hostile_bytes, hostile_card, hostile_data, hostile_safetensors, written
from fuzz_running import Target
from fuzz_seeds import Seeds
from fuzz_watching import Place, Refusal

import hf_elastic as he
from hf_elastic.evaluation import FolderOptions, evaluate_folder
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
            stated = read_or_empty(folder / "config.json")
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


def _evaluation(seeds: Seeds) -> Callable[[Random, Place], Call]:
    """Checkpoints that are measured on sound rows; every metric is of one of them."""
    whole = {
        "sentence-encoder": ('{"sentence1": "the dog runs", "sentence2": "a cat sings", "score": %d}\n', "spearman"),
        "classifier": ('{"text": "the dog runs %d", "label": 1}\n', "accuracy"),
        "base": ('{"text": "the dog runs and a cat sings %d"}\n', "perplexity"),
    }

    def make(rng: Random, place: Place) -> Call:
        kind = rng.choice(("sentence-encoder", "sentence-encoder", "classifier", "base"))
        folder = hostile_folder(rng, seeds.folder(kind), place, focus=("config.json", "modules.json", "tokenizer.json"))
        row, metric = whole[kind]
        data = place.inside / "rows.jsonl"
        data.write_text("".join(row % number for number in range(6)))
        options = FolderOptions(metric=rng.choice((None, None, metric, "spearman")), batch_size=4)
        return lambda: evaluate_folder(folder, data, options=options)

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
            (run / "result.json").write_bytes(hostile_record(rng, run / "result.json"))
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
        rewrite(place.inside / "given" / "architecture.json", parent=str(parent))

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
            plant_pickle(rng, folder, place)
        if rng.random() < 0.6:
            plant_code(rng, folder, place)
        for file in folder.glob("*elastic*.py"):
            file.write_text(hostile_code(place.marker))
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
        Target("evaluation of a folder", _evaluation(seeds), 10),
        Target("report of a run", _report(seeds), 20),
        Target("folder to be shared", _hub(seeds), 20),
        Target("card of a parent", _card(seeds), 15),
        Target("runtimes", _runtime(seeds), 12),
        Target("pickles and code", _foreign(seeds), 20),
        Target("search storage", _storage(seeds), 3),
    ]


assert os.name == "posix", "children are forked"
