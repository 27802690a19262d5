"""What ``ElmOptions`` asks for becomes a plan; what cannot be is said in one line before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from block_models import path, supernet_of, tiny
from elm_runs import options
from tiny_checkpoints import classifier, masked_model, write_text

from hf_elastic import ElasticError, ElmOptions, make_elm
from hf_elastic.pipeline.elm_data import read_texts, require_stock
from hf_elastic.pipeline.elm_options import in_words_of_options
from hf_elastic.pipeline.elm_plan import describe_plan, new_supernet, plan_of
from hf_elastic.pipeline.elm_table import written_as

pytestmark = pytest.mark.usefixtures("nano")
Find = Callable[[str], Path]


def silent(chosen: ElmOptions) -> None:
    make_elm(chosen, say=lambda text: None)


def test_standard_blocks_of_one_width_are_written_as_the_stock_class() -> None:
    supernet = supernet_of("elastic_gpt2")
    assert written_as(supernet, path(supernet, "standard")) == "stock"
    grown = supernet_of("elastic_gpt2", candidate_widths=[[16] * 6, [24] * 6, [16] * 6])
    assert written_as(grown, path(grown, "standard")) == "remote-code"
    assert written_as(supernet, path(supernet, "bottleneck")) == "remote-code"
    encoder = supernet_of("elastic_bert", embedding_size=8)
    assert written_as(encoder, path(encoder, "standard")) == "remote-code"


def test_the_depth_follows_the_teachers(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    deep = masked_model(tmp_path / "deep", num_hidden_layers=8)
    depths = {}
    for layers in (None, 2, 8):
        chosen = options(deep, data("masked-lm"), tmp_path / "out", layers=layers)
        depths[layers] = plan_of(chosen, read_texts(chosen)).layers
    assert depths == {None: 2, 2: 2, 8: 8}  # the size has three, which does not divide eight
    free = options(deep, data("masked-lm"), tmp_path / "out", layers=3, distill="none")
    assert plan_of(free, read_texts(free)).layers == 3


def test_numbers_of_steps_follow_from_epochs(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    def plan(**changes: Any) -> Any:
        chosen = options(checkpoint("masked-lm"), data("masked-lm"), tmp_path / "out", steps=None, **changes)
        return plan_of(chosen, read_texts(chosen))

    whole = plan(epochs=3)
    assert whole.steps == whole.retrain_steps == 3 * whole.epoch
    assert plan(epochs=3, retrain_epochs=6).retrain_steps == 6 * whole.epoch
    assert plan(epochs=0.5).steps == round(0.5 * whole.epoch)
    ten = plan(epochs=10)
    assert (ten.growing.every, ten.growing.decisions) == (-(-ten.steps // 11), 10)
    assert ten.growing.count == 3 * 3 * 6 // 10 and plan(growth=False).growing is None


Change = tuple[dict[str, Any], str]
BAD: list[Change] = [
    ({"size": "huge"}, "size='huge' is not one of small, tiny, micro"),
    ({"size": ["micro"]}, r"size=\['micro'\] is not one of small, tiny, micro"),
    ({"task": "vision"}, "task='vision' is not one of"),
    ({"task": "causal-lm"}, "does not fit a bert model"),
    ({"distill": "logits"}, "distill='logits' is not one of relational, mse, none"),
    ({"fusion": "prune"}, "fusion='prune' is not one of"),
    ({"weights": "old"}, "weights='old' is not one of inherit, fresh"),
    ({"epochs": 0}, "epochs=0 must be a number above 0"),
    ({"steps": 0}, "steps=0 must be an integer of at least 1"),
    ({"dropout": 1.0}, "dropout=1.0 must be"),
    ({"threshold": 1.5}, "threshold=1.5 must be"),
    ({"retrain_epochs": -1}, "retrain_epochs=-1 must be"),
    ({"retrain_epochs": 0, "weights": "fresh"}, "never trained"),
    ({"evaluations": 2}, "evaluations=2 must be an integer of at least 4"),
    ({"evaluations": 3}, "evaluations=3 must be an integer of at least 4"),
    ({"threshold": 0}, "threshold=0 must be a number above 0 and at most 1"),
    ({"total_parameters": 0.5}, "total_parameters=0.5 must be a number of parameters above 1, no fraction"),
    ({"learning_rate": 0}, "learning_rate=0 must be"),
    ({"stream": True, "steps": None}, "say how many steps="),
    ({"growth": False, "calc_freq": 3}, "calc_freq= is of growth"),
    ({"growth_every": 13}, "growth_every=13 is more than steps=12"),
    ({"calc_freq": 3}, "calc_freq=3 is more than the 2 steps between two growths"),
    ({"layers": 2}, "layers=2 does not divide the teacher's 3 layers"),
    ({"total_parameters": 9_000}, "total_parameters=9,000 is below the"),
    ({"total_parameters": 10**6}, "total_parameters=1,000,000 is above the"),
    ({"within": {"total_parameters": 5_000}}, "no path keeps total_parameters=5000"),
    ({"within": {"macs": 0.01}}, "no path keeps macs=0.01"),
    ({"within": {"weight": 0.5}}, "weight"),
    ({"latency": "1ns"}, "latency"),
    ({"latency": "1us"}, "latency=1us cannot be reached"),
    ({"sequence_length": 65}, "more than the 64 positions"),
    ({"sequence_length": 64, "batch_size": 2}, "at least 40 are needed"),
    ({"finetune": ("none.jsonl",)}, "there is no file none.jsonl"),
    ({"finetune": 3}, "finetune=3 is no tuple"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_line_before_any_work(
    changes: dict[str, Any], words: str, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "few.txt", count=40) if changes.get("sequence_length") == 64 else data("masked-lm")
    with pytest.raises(ElasticError, match=words) as raised:
        silent(options(checkpoint("masked-lm"), text, tmp_path / "out", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("growth_every=13 is more than steps=12", "--growth-every 13 is more than --steps 12"),
        ("stream=True reads data; say how many steps=", "--stream reads data; say how many --steps"),
        (
            "calc_freq= is of growth, which growth=False leaves out",
            "--calc-freq is of growth, which --no-growth leaves out",
        ),
        ("weights='fresh' would", "--weights fresh would"),
        ("no path keeps total_parameters=5000; loosen within=", "no path keeps total_parameters=5000; loosen --within"),
        ("total_parameters=9,000 is below", "--total-parameters 9,000 is below"),
        ("no path keeps macs=0.1", "no path keeps macs=0.1"),
    ],
)
def test_errors_name_options_as_they_are_typed(said: str, typed: str) -> None:
    assert in_words_of_options(said) == typed


def test_a_student_that_is_larger_than_its_teacher_is_told_what_can_be_done(
    checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    for size, words in (("nano", "so take a larger teacher, or fewer"), ("micro", "a smaller size (nano), or fewer")):
        chosen = options(checkpoint("masked-lm"), data("masked-lm"), tmp_path / "out", size=size)
        texts = read_texts(chosen)
        plan = replace(plan_of(chosen, texts), budget=1e6)
        assert words in describe_plan(plan, new_supernet(plan_of(chosen, texts), chosen), options=chosen, texts=texts)


def test_what_elm_has_made_is_no_teacher(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    tiny("elastic_gpt2").save_pretrained(tmp_path / "made")
    with pytest.raises(ElasticError, match="type elastic_gpt2.*hf-elastic elm starts from stock checkpoints"):
        silent(options(tmp_path / "made", data("causal-lm"), tmp_path / "out"))
    with pytest.raises(ElasticError, match="hf-elastic compress starts from stock checkpoints"):
        require_stock(str(tmp_path / "made"), command="compress")


def test_teachers_that_cannot_teach_are_refused(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    text = data("masked-lm")
    with pytest.raises(ElasticError, match="is a classifier"):
        silent(options(classifier(tmp_path / "classifier"), text, tmp_path / "out"))
    with pytest.raises(ElasticError, match="speedup= and latency= are of models with an output head"):
        silent(options(checkpoint("embedding"), text, tmp_path / "out", speedup=2))
    other = masked_model(tmp_path / "other", vocab_size=20)  # a folder whose tokenizer is of another model
    with pytest.raises(ElasticError, match="its model knows 20; they are of two models"):
        silent(options(other, text, tmp_path / "out"))
    with pytest.raises(ElasticError, match="its model knows 20; they are of two models"):
        silent(options(other, text, tmp_path / "out", stream=True))
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a dog", "label": 1}] * 30, "30 rows of 1 labels"),
        ([{"text": "a dog", "label": n % 2} for n in range(9)], "9 rows of 2 labels"),
        ([{"text": "a dog"}] * 30, "needs a column 'label'"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused(
    rows: list[Any], words: str, checkpoint: Find, data: Find, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = options(
        checkpoint("masked-lm"), data("masked-lm"), tmp_path / "out", finetune=(str(tmp_path / "rows.jsonl"),)
    )  # fmt: skip
    with pytest.raises(ElasticError, match=words):
        silent(chosen)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.jsonl", None, "there is no file"),
        ("empty.txt", "", "holds no text"),
        ("rows.jsonl", '{"body": "a dog"}', "has no text in column 'text'"),
        ("rows.jsonl", '{"text": ', "cannot stream"),
        ("few.txt", "a dog", "at least 40 are needed"),
    ],
)
def test_a_stream_that_cannot_be_read_is_one_line(
    name: str, content: str | None, words: str, checkpoint: Find, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ElasticError, match=words) as raised:
        silent(options(checkpoint("masked-lm"), tmp_path / name, tmp_path / "out", stream=True))
    assert "\n" not in str(raised.value)


def test_an_output_that_holds_something_else_is_refused(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(ElasticError, match="is not empty and no run made it"):
        silent(options(checkpoint("masked-lm"), data("masked-lm"), tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ElasticError, match="is a file"):
        silent(options(checkpoint("masked-lm"), data("masked-lm"), tmp_path / "file"))


def test_the_search_sees_other_text_than_the_table(checkpoint: Find, data: Find, tmp_path: Path) -> None:
    texts = read_texts(options(checkpoint("causal-lm"), data("causal-lm"), tmp_path / "out"))
    searched, reported, trained = (
        {tuple(row) for row in rows}
        for rows in (
            [row for batch in texts.searched for row in batch["labels"].tolist()],
            [row for batch in texts.reported for row in batch["labels"].tolist()],
            [feature["input_ids"] for feature in texts.data.train],
        )
    )
    assert searched and reported and not (searched & reported or (searched | reported) & trained)
