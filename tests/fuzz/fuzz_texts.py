"""Targets that read one text or one file: spaces, architectures, results, tables, benchmarks, data, options."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fuzz_mutations import (
    DEEP,
    NAMES,
    NUMBERS,
    Random,
    Raw,
    hostile_bytes,
    hostile_data,
    hostile_json,
    hostile_lines,
    hostile_text,
    hostile_values,
    written,
)
from fuzz_running import Target
from fuzz_seeds import Seeds
from fuzz_watching import Place

import hf_elastic as he
from hf_elastic.architecture import Architecture
from hf_elastic.commands.arguments import given_architecture, given_space, parse_limits
from hf_elastic.pipeline.elm_options import ElmOptions
from hf_elastic.pipeline.kept import options_of
from hf_elastic.pipeline.options import CompressOptions
from hf_elastic.pipeline.scoring import RankingOptions, score_source
from hf_elastic.pipeline.steps import front_row
from hf_elastic.pipeline.texts import digest, read_rows, split_sentences
from hf_elastic.proxies import read_benchmark
from hf_elastic.search import SearchResult
from hf_elastic.space import SearchSpace
from hf_elastic.tables.block_latencies import BlockLatencyTable
from hf_elastic.tables.budgets import Budgets
from hf_elastic.tables.latencies import LatencyTable
from hf_elastic.tables.quality import QualityTable

Call = Callable[[], object]


def _file(place: Place, name: str, data: bytes) -> Path:
    path = place.inside / name
    path.write_bytes(data)
    return path


def _use(space: SearchSpace) -> None:
    """What is done with a space once it is read."""
    assert space.size >= 1
    rng = random.Random(0)
    for point in (space.largest(), space.smallest(), space.midpoint(), space.sample(rng)):
        assert space.decode(space.encode(point)) == point and space.in_effect(point) is not None
    assert SearchSpace.from_json(space.to_json()) == space
    assert repr(space) and space.digest


def _space(seeds: Seeds) -> Callable[[Random, Place], Call]:
    import json

    known = [json.loads(space.to_json()) for space in seeds.spaces]

    def make(rng: Random, place: Place) -> Call:
        data = rng.choice(known)
        if rng.random() < 0.1:
            data = _tangled(rng)
        text = hostile_text(rng, data)
        _file(place, "space.json", text.encode("utf-8", errors="surrogatepass"))
        return lambda: _use(SearchSpace.from_json(text))

    return make


def _tangled(rng: Random) -> dict[str, Any]:
    """A space of many choices that depend on one another, whose points are hard to count."""
    count = rng.choice((5, 20, 40))
    choices: list[dict[str, Any]] = []
    for number in range(count):
        on = rng.sample(range(number), min(number, rng.randint(0, 4)))
        when = [{"choice": f"c{other}", "values": sorted(rng.sample(range(4), rng.randint(1, 3)))} for other in on]
        choices.append({"name": f"c{number}", "kind": "ordered", "values": [0, 1, 2, 3], "when": when})
    return {"format": "hf_elastic.search_space", "version": 1, "choices": choices}


def _architecture(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        space = rng.choice(seeds.spaces)
        text = hostile_text(rng, dict(space.sample(rng)))
        path = _file(place, "architecture.json", text.encode("utf-8", errors="surrogatepass"))
        given = rng.choice((text, str(path), rng.choice(NAMES)))

        def direct() -> object:
            found = Architecture.from_json(text)
            assert found.digest and repr(found) and hash(found) is not None
            assert found in space or found not in space
            return space.canonical(found)

        return direct if rng.random() < 0.5 else lambda: space.canonical(given_architecture(given))

    return make


def _result(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        path = _file(place, "result.json", hostile_json(rng, seeds.result))
        limit = rng.choice((0.5, 100, 1.0))

        def call() -> None:
            found = SearchResult.load(path)
            assert found.front is not None and found.midpoint is None or found.even is None or found.largest is None
            found.save(place.out / "again.json")
            assert SearchResult.load(place.out / "again.json").to_json() == found.to_json()
            for goal in found.objectives:
                found.best(goal.name, within={goal.name: limit})

        return call

    return make


def _row(seeds: Seeds) -> Callable[[Random, Place], Call]:
    supernet = he.Supernet.from_pretrained(seeds.folder("supernet"))

    def make(rng: Random, place: Place) -> Call:
        path = _file(place, "result.json", hostile_json(rng, seeds.result_of_supernet))
        row = rng.choice(("1", "2", "0", "-1", "99999999999999999999", "9" * 5000, "²", "٣", "1.0", "", "x", "1#1"))
        text = rng.choice((f"{path}#{rng.randint(1, 3)}", f"{path}#{row}", f"{rng.choice(NAMES)}#1"))
        written_out = rng.random() < 0.05

        def call() -> None:
            point = supernet.space.canonical(front_row(text))
            if written_out:
                he.export(supernet, point, place.out / "model")

        return call

    return make


_TABLES: Mapping[str, Any] = {"quality": QualityTable, "latency": LatencyTable, "blocks": BlockLatencyTable}


def _table(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        kind = rng.choice(list(_TABLES))
        path = _file(place, "table.json", hostile_json(rng, seeds.tables[kind]))

        def call() -> None:
            table = _TABLES[kind].load(path)
            assert str(table)
            table.save(place.out / "table.json")
            if kind == "latency":
                assert table.noise >= 0 and (not table.finished or table.parent > 0)

        return call

    return make


def _benchmark(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        kind = rng.choice(list(seeds.benchmarks))
        path = _file(place, f"{kind}.txt", hostile_lines(rng, seeds.benchmarks[kind]))
        truth = {"flexibert": "glue", "lts": "valid_ppl", "csv": "truth"}[kind]
        if rng.random() < 0.1:
            truth = rng.choice(NAMES)
        options = RankingOptions(truth=truth, labelled=3, draws=1, resamples=2)
        if rng.random() < 0.3:
            return lambda: str(score_source(str(path), options, json_file=str(place.out / "scores.json")))
        return lambda: read_benchmark(path, truth=truth)

    return make


def _data(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        ending = rng.choice(list(seeds.rows))
        text = seeds.rows[ending]
        data = hostile_bytes(rng, text.encode()) if ending == ".txt" else hostile_lines(rng, text)
        path = _file(place, f"rows{ending}", data)
        column = "text" if rng.random() < 0.9 else rng.choice(NAMES)

        def call() -> None:
            rows = read_rows([str(path)], text_column=column)
            assert split_sentences(row[column] for row in rows) is not None and digest(rows, (column, "label"))

        return call

    return make


_COMPRESS: dict[str, Any] = {
    "model": "a/model", "data": ("text.txt",), "output": "out/small", "within": {"parameters": 0.5}, "task": "auto",
    "recipe": "fast", "minutes": 1.0, "evaluations": 10, "seed": 0, "batch_size": 8, "sequence_length": 32,
    "loadability": "stock", "learning_rate": 1e-3,
}  # fmt: skip
_FURTHER = (
    "speedup",
    "latency",
    "memory",
    "phase",
    "lora",
    "sparsity",
    "bits",
    "group_size",
    "share",
    "space",
    "device",
)
_ELM: dict[str, Any] = {
    "teacher": "a/model", "data": ("text.txt",), "output": "out/elm", "size": "micro", "epochs": 1, "batch_size": 8,
    "sequence_length": 32, "learning_rate": 1e-3, "seed": 0, "evaluations": 20,
}  # fmt: skip
_ELM_FURTHER = (
    "layers", "steps", "retrain_epochs", "dropout", "distill", "growth", "total_parameters", "growth_every",
    "calc_freq",
    "fusion", "threshold", "weights", "within", "speedup", "latency", "phase", "task", "finetune", "device",
    "precision",
)  # fmt: skip
_TYPED = (
    "1.7", "1.7@16x128", "@", "1e999", "nan", "-1", "0", "1.7@0x0", "1.7@999999999999x9", "8ms", "8 ms", "8parsec",
    "1" * 5000,
    "1.7@1x1x1", "٣", "inf ms", "6GB@8x2048", "0.0000000001us", "1_0", "\0", "r=", "r=1", "r=32,24", "r=-1", "r=a",
    "r=9999999999999999999",
)  # fmt: skip


def _options(seeds: Seeds) -> Callable[[Random, Place], Call]:
    def make(rng: Random, place: Place) -> Call:
        chance = rng.randrange(4)
        if chance == 0:
            given = hostile_values(rng, _COMPRESS, _FURTHER)
            given |= (
                {rng.choice(("speedup", "latency", "memory", "lora")): rng.choice(_TYPED)} if rng.random() < 0.4 else {}
            )
            return lambda: CompressOptions(**given).to_dict()
        if chance == 1:
            elm = hostile_values(rng, _ELM, _ELM_FURTHER)
            return lambda: ElmOptions(**elm).to_dict()
        if chance == 2:
            stored = hostile_values(rng, {**_COMPRESS, "space": {"skip": ["layer"]}, "data": ["text.txt"]}, _FURTHER)
            stored.pop("output", None)
            return lambda: options_of({"options": stored}, output="out/small")
        texts = {name: rng.choice(_TYPED) for name in ("speedup", "latency", "memory") if rng.random() < 0.7}
        limits = [
            f"{rng.choice(('parameters', *NAMES[:12]))}={rng.choice((0.5, *_TYPED))}" for _ in range(rng.randint(0, 3))
        ]
        return lambda: (Budgets.parse(**texts), parse_limits(limits))

    return make


_DECLARED: dict[str, Any] = {
    "intermediate_size": [0.25, 0.5, 24, 1.0], "num_attention_heads": {"0": [1, 2], "1": [0.5]},
    "num_hidden_layers": [1, 2],
    "skip": {"0": ["attention"], "2": ["mlp"]}, "layer_order": [2, 0, 1], "multiple_of": 4, "loadability": "any",
}  # fmt: skip


def _declared(seeds: Seeds) -> Callable[[Random, Place], Call]:
    from tiny_models import tiny

    model = tiny("bert")

    def make(rng: Random, place: Place) -> Call:
        kept = {name: value for name, value in _DECLARED.items() if rng.random() < 0.6} or {"skip": ["layer"]}
        text = hostile_text(rng, kept)
        if not text.lstrip().startswith("{"):
            _file(place, "space.json", text.encode("utf-8", errors="surrogatepass"))

        def call() -> None:
            config = given_space(text, "any")
            import copy

            supernet = he.make_elastic(copy.deepcopy(model), config)
            assert supernet.space.size > 1 or supernet.space.size == 1
            supernet.save_pretrained(place.out / "supernet")

        return call

    return make


_ROUTING: dict[str, Any] = {
    "mlp_tokens": [0.5, 1.0], "attention_tokens": [0.6], "heads": [1], "experts": [1, 2], "num_experts": 4,
    "layers": [0, 1],
    "router": "linear", "share": "layer", "router_hidden_size": 8, "every": 1,
}  # fmt: skip


def _routing(seeds: Seeds) -> Callable[[Random, Place], Call]:
    import copy

    def make(rng: Random, place: Place) -> Call:
        kept = {name: value for name, value in _ROUTING.items() if rng.random() < 0.5} or {"heads": [1]}
        data = _without_raw(hostile_data(rng, kept))
        base = seeds.base

        def call() -> None:
            he.add_routing(copy.deepcopy(base), he.RoutingConfig.from_dict(data))

        return call

    return make


def _without_raw(data: Any) -> Any:
    """Data as JSON gives it; what is no JSON becomes a text."""
    import json

    try:
        return json.loads(written(data))
    except (ValueError, RecursionError):
        return "no JSON"


def _paths(seeds: Seeds) -> Callable[[Random, Place], Call]:
    """Names of files and folders that cannot be, wherever one is taken."""
    from hf_elastic.hub.card import model_card
    from hf_elastic.report import describe_folder
    from hf_elastic.reporting.writing import write_report
    from hf_elastic.routers_folder import read_routers

    supernet = he.Supernet.from_pretrained(seeds.folder("supernet"))
    readers: tuple[Callable[[str], object], ...] = (
        SearchResult.load, he.Supernet.from_pretrained, describe_folder_of(describe_folder), write_report, model_card,
        read_benchmark, lambda name: read_rows([name], text_column="text"), QualityTable.load, LatencyTable.load,
        BlockLatencyTable.load, read_routers, lambda name: he.load_adapter(seeds.base, name),
        lambda name: he.load_routers(seeds.base, name), lambda name: given_space(name, "any"), given_architecture,
        lambda name: score_source(name, RankingOptions()), lambda name: front_row(f"{name}#1"),
    )  # fmt: skip

    def make(rng: Random, place: Place) -> Call:
        name = rng.choice(NAMES)
        if rng.random() < 0.3:
            name = f"{place.inside}/{name}"
        reader = rng.choice(readers)
        if rng.random() < 0.15:
            safe = name if not name.startswith(("/", ".", "~")) and name else "x"
            (place.out / "work").mkdir()
            return lambda: he.export(supernet, supernet.space.smallest(), place.out / "work" / safe.replace("..", "_"))
        return lambda: reader(name)

    return make


def describe_folder_of(describe: Callable[[Path], str]) -> Callable[[str], object]:
    """``hf-elastic info`` as the command calls it."""
    return lambda name: describe(Path(name)).encode("utf-8")


def text_targets(seeds: Seeds) -> list[Target]:
    """All targets of this file."""
    return [
        Target("search space JSON", _space(seeds), 30),
        Target("architecture JSON", _architecture(seeds), 25),
        Target("search result JSON", _result(seeds), 25),
        Target("export of result.json#ROW", _row(seeds), 12),
        Target("tables JSON", _table(seeds), 25),
        Target("benchmark files", _benchmark(seeds), 25),
        Target("data files", _data(seeds), 20),
        Target("options", _options(seeds), 20),
        Target("declared space", _declared(seeds), 8),
        Target("routing config", _routing(seeds), 8),
        Target("names of files", _paths(seeds), 10),
    ]


__all__ = ["DEEP", "NUMBERS", "Raw", "text_targets"]
