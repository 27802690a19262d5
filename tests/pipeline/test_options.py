from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, tiny

from hf_elastic import (
    CheckpointError,
    CompressOptions,
    DataError,
    ElasticConfig,
    ElasticError,
    SearchError,
    SpaceError,
    TrainingError,
    make_elastic,
)  # fmt: skip
from hf_elastic.pipeline.kept import options_of
from hf_elastic.pipeline.options import default_space
from hf_elastic.tables.budgets import Budgets, Workload


def made(**changes: Any) -> CompressOptions:
    return CompressOptions(**{"model": "m", "data": ("d.txt",), "output": "out/small", **changes})


BAD: list[tuple[type[ElasticError], dict[str, Any], str]] = [
    (DataError, {"data": ()}, "data="),
    (DataError, {"data": "d.txt"}, "tuple of names"),
    (DataError, {"task": "translation"}, "task='translation'"),
    (SpaceError, {"within": {}}, "within="),
    (SpaceError, {"within": {"parameters": 0}}, "limit above 0"),
    (SpaceError, {"within": {"parameters": float("nan")}}, "limit above 0"),
    (SpaceError, {"within": {"parameters": float("inf")}}, "limit above 0"),
    (SpaceError, {"within": {"parameters": "0.5"}}, "limit above 0"),
    (SpaceError, {"loadability": "remote-code"}, "loadability='remote-code'"),
    (TrainingError, {"precision": "fp16"}, "precision='fp16'"),
    (TrainingError, {"device": "tpu"}, "device='tpu'"),
    (TrainingError, {"minutes": -1}, "minutes=-1"),
    (TrainingError, {"minutes": float("inf")}, "minutes=inf"),
    (TrainingError, {"learning_rate": 0.0}, "learning_rate=0.0"),
    (TrainingError, {"share": 1.5}, "share=1.5"),
    (TrainingError, {"batch_size": 0}, "batch_size=0"),
    (TrainingError, {"batch_size": 2.5}, "batch_size=2.5"),
    (DataError, {"sequence_length": 3}, "sequence_length=3"),
    (SearchError, {"evaluations": 2}, "evaluations=2"),
    (SearchError, {"seed": -1}, "seed=-1"),
    (SearchError, {"seed": 2**32}, "seed=4294967296"),
    (CheckpointError, {"output": "/"}, "output='/'"),
    (CheckpointError, {"output": ""}, "output='' names no folder"),
    (SpaceError, {"speedup": 1.0}, "number above 1"),
    (SpaceError, {"speedup": "fast"}, "speedup 'fast'"),
    (SpaceError, {"latency": "8"}, "8ms"),
    (SpaceError, {"memory": "6"}, "6GB"),
    (SpaceError, {"memory": "6GB", "loadability": "stock-padded"}, "seldom smaller"),
    (SpaceError, {"phase": "training"}, "phase='training'"),
    (SpaceError, {"latency": 8}, "latency=8 must be text with a unit, such as '8ms'"),
    (SpaceError, {"memory": 6e9}, "memory=6000000000.0 must be text with a unit"),
    (SpaceError, {"within": [("macs", 0.5)]}, "must be a dict such as"),
    (CheckpointError, {"model": 3}, "model=3 must be a name or a path"),
    (CheckpointError, {"data": (None,)}, "data=None must be a name or a path"),
    (DataError, {"data": Path("t.txt")}, "is no tuple of names"),
    (SpaceError, {"phase": "decode"}, "phase='decode' is what a speed-up or a latency is of"),
    (SpaceError, {"phase": "decode", "memory": "6GB"}, "give one, or leave it out"),
    (SpaceError, {"speedup": 1.5, "loadability": "stock-padded"}, "never faster"),
]


@pytest.mark.parametrize(("error", "changes", "words"), BAD, ids=[words for _, _, words in BAD])
def test_a_bad_option_is_named_in_one_line(error: type[ElasticError], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(error) as caught:
        made(**changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_paths_are_taken_as_names() -> None:
    given = made(model=Path("m"), data=[Path("a.txt"), "b.txt"], output=Path("o"))
    assert (given.model, given.data, given.output) == ("m", ("a.txt", "b.txt"), "o")
    assert given == made(model="m", data=("a.txt", "b.txt"), output="o")


def test_options_survive_a_record_as_json() -> None:
    space = ElasticConfig(intermediate_size={0: [0.5]}, skip=["layer"], multiple_of=4)
    for given in (None, space):
        before = made(space=given, data=("a.txt", "b.txt"), within={"macs": 0.5, "parameters": 1e6}, seed=3, speedup=2)
        record = {"options": json.loads(json.dumps({**before.to_dict(), "text": "digest"}))}
        assert options_of(record, output="out/small") == before
        assert record["options"] == {**before.to_dict(), "text": "digest"}


def test_a_budget_takes_the_place_of_the_default_limit() -> None:
    assert made().within == {"parameters": 0.6} and made().asked == "parameters=0.6"
    assert made(speedup=1.7).within == {} and made(speedup=1.7).budgets == Budgets(speedup=1.7)
    both = made(speedup="1.7@16x128", memory="6GB", within={"macs": 0.5}, phase="decode")
    assert both.budgets == Budgets(1.7, None, 6 * 10**9, {"macs": 0.5}, "decode", Workload(16, 128))
    assert both.asked == "speedup=1.7@16x128, memory=6GB, macs=0.5"
    assert made(speedup=1.7) == made(speedup="1.7") and hash(made(speedup=1.7).speedup) == hash("1.7")


def test_where_the_output_goes_is_not_what_the_run_is() -> None:
    assert made(output="a").to_dict() == made(output="b").to_dict()


def test_the_work_is_kept_beside_the_output() -> None:
    assert made().run_folder == Path("out/small.run")
    assert made(output="out/small/").run_folder == Path("out/small.run")
    assert made(output="out/v1.0").run_folder == Path("out/v1.0.run")
    assert made(output=".").run_folder == Path.cwd().with_name(Path.cwd().name + ".run")
    assert made(output="~/small").run_folder == Path.home() / "small.run"


def test_a_space_says_itself_what_may_be_exported() -> None:
    assert made().form == "stock"
    assert made(loadability="any").form == "any"
    assert made(space=ElasticConfig(intermediate_size=[0.5])).form == "any"
    assert made(space=ElasticConfig(intermediate_size=[0.5], loadability="stock"), loadability="any").form == "stock"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("loadability", ["stock", "stock-padded", "any"])
def test_the_default_space_of_every_family_is_as_loadable_as_asked(family: str, loadability: Any) -> None:
    model = tiny(family, "base")
    supernet = make_elastic(model, default_space(model, loadability))
    space = supernet.space
    forms = {supernet.loadability(point) for point in (space.largest(), space.midpoint(), space.smallest())}
    allowed = {"stock": {"stock"}, "stock-padded": {"stock", "stock-padded"}}
    assert forms <= allowed.get(loadability, {"stock", "stock-padded", "remote-code"})
    assert space.size > 10
    widths = {value for choice in space.choices if "intermediate" in choice.name for value in choice.values}
    assert all(width % 8 == 0 for width in widths)


def test_the_default_space_of_a_model_of_one_layer_skips_nothing() -> None:
    model = tiny("bert", "base", num_hidden_layers=1)
    for loadability in ("stock", "stock-padded", "any"):
        supernet = make_elastic(tiny("bert", "base", num_hidden_layers=1), default_space(model, loadability))
        assert not any("skip" in name for name in supernet.space.names)


def test_options_are_compared_by_value() -> None:
    assert made() == replace(made(), minutes=8.0) != replace(made(), minutes=7.0)


@pytest.mark.parametrize("space", [{"skip": ["layer"]}, "skip", 3])
def test_a_space_that_is_none_is_refused(space: Any) -> None:
    with pytest.raises(SpaceError, match=f"^space is a {type(space).__name__}, expected ElasticConfig"):
        made(space=space)
