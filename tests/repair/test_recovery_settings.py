"""What a recovery refuses: each with one line that says what was wrong, before anything is trained or written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny

from hf_elastic import CheckpointError, DataError, Distillation, ElasticError, TrainingError
from hf_elastic.repair.teacher_cache import cache_teacher
from tests.repair.cut_models import bits, cut, rows, run, same


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": None}, "give either minutes= or steps="),
        ({"minutes": 1.0}, "give either minutes= or steps="),
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"steps": None, "minutes": float("nan")}, "minutes=nan must be a number above 0"),
        ({"batch_size": True}, "batch_size=True must be an integer of at least 1"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1"),
        ({"top_k": 62}, "top_k=62 is not within 1..61"),
        ({"top_k": 4, "cache": False}, "top_k=4 is for cached logits"),
        ({"top_k": 4, "target": "embeddings"}, "top_k=4 is for cached logits"),
        ({"kept_layers": (0, 1)}, "kept_layers= is for target='hidden_states', not 'logits'"),
        ({"target": "hidden_states", "kept_layers": (0, 1)}, "say which of the teacher's layers the model has"),
        ({"target": "hidden_states", "kept_layers": (2, 1, 0)}, "kept layers must be ascending"),
        ({"target": "nothing"}, "target='nothing'"),
        ({"target": Distillation(divergence="mse"), "cache": True}, "compares all logits, which are not kept"),
        ({"lora": 0}, "lora=0 is neither a rank"),
        ({"lora": LoraConfig(target_modules=["nothing"])}, "peft cannot adapt"),
        ({"arguments": {"max_steps": 3}}, "is not for recover(), or is set by it; pass steps="),
        ({"arguments": {"eval_strategy": "steps"}}, "is not for recover(), or is set by it; leave it out"),
        ({"arguments": {"nonsense": 3}}, "TrainingArguments refuses arguments="),
        ({"steps": None, "minutes": 1.0, "arguments": {"gradient_checkpointing": True}}, "give steps= instead"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    before = bits(model)
    with pytest.raises(TrainingError) as caught:
        run(model, teacher, rows(), tmp_path / "run", **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert same(bits(model), before) and not list(tmp_path.rglob("checkpoint-*"))
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    teacher, model = cut("llama", "lm")
    frozen = copy.deepcopy(model).requires_grad_(False)
    encoder, classifier = tiny("bert", "base"), tiny("bert", "sequence")
    unequal: list[tuple[Any, Any, dict[str, Any], str]] = [
        (model, model, {}, "model and teacher are one object"),
        (model, tiny("llama", vocab_size=70), {}, "the teacher reads 70 tokens, the model 61"),
        (model, tiny("llama", hidden_size=16), {"target": "last_hidden_state"}, "hidden size is 32, its teacher's 16"),
        (model, tiny("llama", hidden_size=16), {"target": "embeddings"}, "take target='logits'"),
        (
            model,
            tiny("llama", num_hidden_layers=5),
            {"target": "hidden_states"},
            "the model has 3 layers, the teacher 5",
        ),
        (classifier, tiny("bert", "sequence", num_labels=4), {"cache": False}, "logits must have one shape"),
        (encoder, tiny("bert", "base", seed=1), {}, "cannot distil logits"),
        (frozen, teacher, {}, "every weight of the model is frozen"),
        (copy.deepcopy(model).half(), teacher, {}, "weights in float16 cannot be trained"),
        (get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear")), teacher, {}, "merge"),
        (torch.nn.Linear(2, 2), teacher, {}, "got Linear; extract"),
        (model, "a name", {}, "the teacher must be a model or a TeacherCache, got str"),
    ]
    for student, other, given, message in unequal:
        with pytest.raises(TrainingError) as caught:
            run(student, other, rows(), tmp_path / "run", **given)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    adapted = copy.deepcopy(model)
    adapted.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    for lora in (None, 4):
        with pytest.raises(TrainingError, match="has adapters already; merge them first"):
            run(adapted, teacher, rows(), tmp_path / "run", lora=lora)
    assert not (tmp_path / "run").exists()


def test_teachers_of_another_width_teach_by_their_logits(tmp_path: Path) -> None:
    run(cut("llama", "lm")[1], tiny("llama", hidden_size=16, num_hidden_layers=5), rows(), tmp_path / "run", steps=2)


def test_a_regression_head_is_not_compared_by_a_divergence_that_is_always_zero(tmp_path: Path) -> None:
    model, teacher = (tiny("bert", "sequence", num_labels=1, seed=seed) for seed in (0, 1))
    for cache in (False, True):
        with pytest.raises(TrainingError, match="divergence='mse' for a regression head"):
            run(model, teacher, rows(), tmp_path / "run", cache=cache)
    kept = cache_teacher(teacher, rows(), tmp_path / "kept")
    with pytest.raises(TrainingError, match="divergence='mse' for a regression head"):
        run(model, kept, rows(), tmp_path / "run")
    before = bits(model)
    run(model, teacher, rows(), tmp_path / "run", steps=2, target=Distillation(divergence="mse"))
    assert not same(bits(model), before)


def test_models_that_give_nan_are_refused_before_any_work(tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    broken = copy.deepcopy(model)
    broken.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(TrainingError, match="before any training: the model or its teacher gives NaN"):
        run(broken, teacher, rows(), tmp_path / "run")
    teacher.transformer.ln_f.weight.data[0] = torch.inf
    with pytest.raises(TrainingError, match="NaN or infinity"):
        run(model, teacher, rows(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rate_that_blows_the_weights_up_is_an_error_and_no_model(tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    with pytest.raises(TrainingError, match=r"the loss of step \d+ is (nan|inf).*lower learning_rate"):
        run(model, teacher, rows(), tmp_path / "run", learning_rate=1e38, arguments={"max_grad_norm": 0})
    teacher, model = cut("gpt2", "lm")
    with pytest.raises(TrainingError, match="is not finite after the last step"):
        run(model, teacher, rows(), tmp_path / "one", learning_rate=1e39, steps=1)


def test_data_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    for data, message in (
        ([], "there is no data"), (["hi"], "must be a dict"), ([{"input_ids": [99]}], "row 1 has token 99"),
        ([{"input_ids": [3] * 65}], "65 tokens, the model 64 positions"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            run(model, teacher, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    given: dict[str, Any] = {"steps": 2, "top_k": 8}
    run(copy.deepcopy(model), teacher, rows(), tmp_path / "run", **given)
    for student, parent, data, changed, message in (
        (tiny("gpt2"), teacher, rows(), {}, "other weights of the model at its beginning"),
        (model, tiny("gpt2", seed=3), rows(), {}, "another teacher"),
        (model, teacher, rows(seed=3), {}, "other data"),
        (model, teacher, rows(), {"steps": 3}, "steps=2 instead of 3"),
        (model, teacher, rows(), {"top_k": 9}, "top_k=8 instead of 9"),
        (model, teacher, rows(), {"lora": 4}, "lora=None instead of '4'"),
        (model, teacher, rows(), {"target": Distillation(temperature=2.0, label_weight=0.0)}, "temperature=1.0"),
        (model, teacher, rows(), {"arguments": {"weight_decay": 0.1}}, "a run with arguments="),
    ):
        with pytest.raises(CheckpointError) as caught:
            run(copy.deepcopy(student), parent, data, tmp_path / "run", **{**given, **changed})
        assert message in str(caught.value) and "give another folder, or delete it" in str(caught.value)
    run(copy.deepcopy(model), teacher, rows(), tmp_path / "run", arguments={"logging_steps": 1}, **given)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    teacher, model = cut("gpt2", "lm")
    mine = tmp_path / "mine" / "letter.txt"
    mine.parent.mkdir()
    mine.write_text("dear")
    for output in (mine.parent, mine):
        with pytest.raises(CheckpointError, match=r"holds no run of recover\(\)"):
            run(model, teacher, rows(), output)
    assert mine.read_text() == "dear" and list(tmp_path.rglob("*")) == [mine.parent, mine]
    (tmp_path / "mine" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON file"):
        run(model, teacher, rows(), mine.parent)


def test_a_cache_of_another_teacher_or_other_data_is_refused(tmp_path: Path) -> None:
    teacher, model = cut("llama", "lm")
    cache = cache_teacher(teacher, rows(), tmp_path / "cache", top_k=6)
    for student, data, given, message in (
        (model, rows(seed=1), {}, "other data"),
        (model, rows(), {"top_k": 7}, "top_k=6 instead of 7"),
        (model, rows(), {"target": "embeddings"}, "instead of"),
        (model, rows(), {"target": Distillation(temperature=3.0)}, "temperature=1.0 instead of 3.0"),
        (model, rows(), {"cache": False}, "cache=False asks for a teacher that runs"),
        (tiny("llama", vocab_size=70), rows(), {}, "the teacher reads 61 tokens, the model 70"),
    ):
        with pytest.raises(ElasticError) as caught:
            run(student, cache, data, tmp_path / "run", **given)
        assert message in str(caught.value)
    heads = cache_teacher(tiny("bert", "sequence", num_labels=4), rows(), tmp_path / "heads", top_k=2)
    with pytest.raises(TrainingError, match="have 3 classes, those of the cached teacher 4"):
        run(tiny("bert", "sequence"), heads, rows(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
