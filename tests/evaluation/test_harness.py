"""Tasks of lm-eval on a subnet in memory: equal to lm-eval on the extracted model, and to likelihoods by hand."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import local_tasks
import pytest
import torch
from tiny_checkpoints import decoder_tokenizer, language_model
from tiny_models import supernet_of, tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_elastic import (
    Architecture,
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    Supernet,
    UnsupportedModelError,
    add_lora,
    extract,
    make_elastic,
    search_subnets,
)
from hf_elastic.evaluation import lm_eval, lm_eval_results
from hf_elastic.evaluation.harness import Harness
from hf_elastic.objectives import parameters

harness_package = pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "hf-elastic[eval]"')

TASKS = ["tiny_choice", "tiny_likelihood", "tiny_rolling", "tiny_reply"]
SPACE = ElasticConfig(intermediate_size=[16, 64], num_key_value_heads=[1, 2], skip=["attention", "mlp"])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks.task_folder(tmp_path_factory.mktemp("lm") / "tasks")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("lm") / "model", max_position_embeddings=512)


@pytest.fixture
def supernet(checkpoint: Path) -> Iterator[Supernet]:
    """A model whose weights are small enough for likelihoods that are no extremes."""
    made = make_elastic(AutoModelForCausalLM.from_pretrained(checkpoint), SPACE)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(0.3)
    yield made
    assert made.active == made.space.largest(), "an evaluation left another subnet active"


def by_lm_eval(model: Any, tasks: Path, **settings: Any) -> dict[str, float]:
    """What lm-eval's own entry point says of a model of its own."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = HFLM(pretrained=model.eval(), tokenizer=decoder_tokenizer(), batch_size=settings.pop("batch_size", 3))
    found = harness_package.simple_evaluate(
        asked, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0, **settings,
    )  # fmt: skip
    return {
        f"{task}/{name.removesuffix(',none')}": value
        for task, entries in found["results"].items()
        for name, value in entries.items()
        if "," in name and "_stderr" not in name
    }


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"num_fewshot": 2, "limit": 7}])
def test_a_subnets_results_are_those_of_the_extracted_model(
    supernet: Supernet, tasks: Path, settings: dict[str, Any]
) -> None:
    harness = Harness(TASKS, include=tasks, **settings)
    seen = []
    for point in (supernet.space.largest(), supernet.space.smallest()):
        wanted = by_lm_eval(extract(supernet, point), tasks, **settings)
        found = lm_eval_results(supernet, point, harness, tokenizer=decoder_tokenizer(), batch_size=5)
        assert found == pytest.approx(wanted, rel=1e-4)
        assert set(found) == {
            "tiny_choice/acc", "tiny_choice/acc_norm", "tiny_likelihood/perplexity", "tiny_rolling/word_perplexity",
            "tiny_reply/exact_match,first", "tiny_reply/chrf,first",
        }  # fmt: skip
        seen.append(found)
    for name in ("tiny_likelihood/perplexity", "tiny_rolling/word_perplexity", "tiny_reply/chrf,first"):
        assert seen[0][name] != seen[1][name]


@torch.no_grad()
def test_accuracy_and_perplexity_by_hand(supernet: Supernet, tasks: Path) -> None:
    point = supernet.space.canonical({c.name: c.values[0] if c.kind == "ordered" else "none" for c in supernet.space})
    model, tokens = extract(supernet, point).eval(), decoder_tokenizer()

    def likelihood(context: str, reply: str) -> float:
        before, after = tokens(context)["input_ids"], tokens(reply)["input_ids"]
        scores = F.log_softmax(model(torch.tensor([before + after])).logits[0].double(), -1)
        return sum(float(scores[len(before) + n - 1, token]) for n, token in enumerate(after))

    rows = local_tasks.rows()
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        sums = [likelihood(row["question"], f" {choice}") for choice in row["choices"]]
        normed = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right["acc"] += max(range(3), key=sums.__getitem__) == row["answer"]
        right["acc_norm"] += max(range(3), key=normed.__getitem__) == row["answer"]
    perplexity = math.exp(-sum(likelihood(row["question"], f" {row['reply']}") for row in rows) / len(rows))
    harness = Harness(["tiny_choice", "tiny_likelihood"], include=tasks)
    for key, wanted in (
        ("tiny_choice/acc", right["acc"] / len(rows)), ("tiny_choice/acc_norm", right["acc_norm"] / len(rows)),
        ("perplexity", None), ("tiny_likelihood/perplexity", perplexity),
    ):  # fmt: skip
        if wanted is None:
            with pytest.raises(DataError, match="key='perplexity' names none"):  # not of both tasks
                lm_eval(supernet, harness, tokenizer=tokens, key=key)
            continue
        measure = lm_eval(supernet, harness, tokenizer=tokens, key=key)
        assert measure(point) == pytest.approx(wanted, rel=1e-5)
        assert measure.name == f"lm-eval {key}"


@torch.no_grad()
def test_the_subnet_stays_active_while_it_writes(
    supernet: Supernet, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = supernet.space.smallest()
    active: list[Architecture] = []
    supernet.base.register_forward_pre_hook(lambda *_: active.append(supernet.active))
    replies: list[str] = []
    huggingface = importlib.import_module("lm_eval.models.huggingface").HFLM
    generate = huggingface.generate_until

    def kept(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        replies.extend(generate(self, requests, disable_tqdm=disable_tqdm))
        return replies

    monkeypatch.setattr(huggingface, "generate_until", kept)
    lm_eval_results(supernet, point, Harness(["tiny_reply"], include=tasks, limit=4), tokenizer=decoder_tokenizer())
    assert set(active) == {point} and len(active) > 4
    model, tokens, wanted = extract(supernet, point).eval(), decoder_tokenizer(), []
    for row in local_tasks.rows()[:4]:
        ids = tokens(row["question"], return_tensors="pt")["input_ids"]
        for _ in range(6):  # greedy, without a cache
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == tokens.eos_token_id:
                break
        reply = tokens.decode(ids[0, len(tokens(row["question"])["input_ids"]) :], skip_special_tokens=True)
        wanted.append(reply.split("\n")[0])
    assert replies == wanted


def test_which_way_is_better_is_as_the_tasks_say(supernet: Supernet, tasks: Path) -> None:
    tokens = decoder_tokenizer()
    assert lm_eval(supernet, ["tiny_choice"], tokenizer=tokens, key="acc", include=tasks).direction == "maximize"
    rolling = lm_eval(supernet, ["tiny_rolling"], tokenizer=tokens, include=tasks)  # it measures one thing
    assert rolling.direction == "minimize" and rolling.name == "lm-eval word_perplexity"


def test_which_way_is_better_is_told_of_the_task_that_is_asked_for(supernet: Supernet, tasks: Path) -> None:
    choice = (tasks / "tiny_choice.yaml").read_text()
    contrary = choice.replace("tiny_choice", "tiny_contrary").replace(
        "higher_is_better: true", "higher_is_better: false"
    )
    (tasks / "tiny_contrary.yaml").write_text(contrary)
    group = (tasks / "tiny_group.yaml").read_text().replace("tiny_group", "tiny_quarrel")
    (tasks / "tiny_quarrel.yaml").write_text(group.replace("[tiny_choice]", "[tiny_choice, tiny_contrary]"))
    tokens = decoder_tokenizer()
    harness = Harness(["tiny_choice", "tiny_contrary"], include=tasks)

    def direction(harness: Harness, key: str) -> str:
        return lm_eval(supernet, harness, tokenizer=tokens, key=key).direction

    assert direction(harness, "tiny_choice/acc") == "maximize"
    assert direction(harness, "tiny_contrary/acc") == "minimize"
    message = "has no direction: larger tiny_choice/acc is better, and smaller tiny_contrary/acc; name one task"
    for asked, key in ((harness, "acc"), (Harness(["tiny_quarrel"], include=tasks), "tiny_quarrel/acc")):
        with pytest.raises(DataError, match=f"key='{key}' {message}"):
            direction(asked, key)
    both = Harness(["tiny_group", "tiny_contrary"], include=tasks)
    assert direction(both, "tiny_group/acc") == "maximize" and direction(both, "tiny_contrary/acc") == "minimize"


def test_a_metric_alone_is_the_mean_over_the_tasks_and_groups_have_their_own(supernet: Supernet, tasks: Path) -> None:
    second = (
        (tasks / "tiny_choice.yaml")
        .read_text()
        .replace("tiny_choice", "tiny_second")
        .replace("test.jsonl", "train.jsonl")
    )
    (tasks / "tiny_second.yaml").write_text(second)
    point, tokens = supernet.space.smallest(), decoder_tokenizer()
    harness = Harness(["tiny_choice", "tiny_second"], include=tasks)
    values = [
        lm_eval(supernet, harness, tokenizer=tokens, key=f"{name}/acc")(point)
        for name in ("tiny_choice", "tiny_second")
    ]
    assert lm_eval(supernet, harness, tokenizer=tokens, key="acc")(point) == pytest.approx(sum(values) / 2)
    group = Harness(["tiny_group"], include=tasks)
    assert lm_eval(supernet, group, tokenizer=tokens, key="tiny_group/acc")(point) == pytest.approx(values[0])
    assert lm_eval(supernet, group, tokenizer=tokens, key="acc")(point) == pytest.approx(values[0])
    assert lm_eval(supernet, group, tokenizer=tokens, key="tiny_choice/acc")(point) == pytest.approx(values[0])


def test_objectives_of_one_harness_ask_a_subnet_once(supernet: Supernet, tasks: Path) -> None:
    harness = Harness(["tiny_choice"], include=tasks)
    goals = [lm_eval(supernet, harness, tokenizer=decoder_tokenizer(), key=key) for key in ("acc", "acc_norm")]
    runs: list[Any] = []
    supernet.base.register_forward_pre_hook(lambda *_: runs.append(1))
    point = supernet.space.smallest()
    first = [goal(point) for goal in goals]
    once = len(runs)
    assert [goal(point) for goal in goals] == first and len(runs) == once > 0
    with torch.no_grad():
        supernet.model.lm_head.weight.copy_(supernet.model.lm_head.weight.flip(0))
    goals[0](point)
    assert len(runs) == 2 * once, "results of other weights were given"
    goals[0](supernet.space.largest())
    assert len(runs) == 3 * once


def test_a_second_run_draws_the_same_examples(supernet: Supernet, tasks: Path) -> None:
    harness = Harness(["tiny_likelihood"], include=tasks, num_fewshot=3)
    model, tokens = supernet.base.eval(), decoder_tokenizer()
    assert harness.run(model, tokens) == harness.run(model, tokens)
    other = Harness(["tiny_likelihood"], include=tasks, num_fewshot=3, seed=5)
    assert other.run(model, tokens) != harness.run(model, tokens)


def test_the_state_of_random_numbers_and_the_tokenizer_stay(supernet: Supernet, tasks: Path) -> None:
    import random

    import numpy

    tokens = decoder_tokenizer()
    measure = lm_eval(supernet, ["tiny_choice"], tokenizer=tokens, key="acc", include=tasks)
    states = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    measure(supernet.space.smallest())
    now = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert now == states and tokens.pad_token is None


@pytest.mark.slow
def test_adapters_take_part(checkpoint: Path, tasks: Path) -> None:
    adapted = add_lora(
        AutoModelForCausalLM.from_pretrained(checkpoint), ElasticLoraConfig(r=8, ranks=[2], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    harness = Harness(TASKS, include=tasks, limit=4)
    results = []
    for point in (adapted.space.largest(), adapted.space.smallest()):
        results.append(lm_eval_results(adapted, point, harness, tokenizer=decoder_tokenizer()))
        wanted = by_lm_eval(extract(adapted, point, merge=True), tasks, limit=4)
        assert results[-1] == pytest.approx(wanted, rel=1e-3)
    assert results[0] != results[1]


def test_a_search_goes_by_a_task(supernet: Supernet, tasks: Path) -> None:
    goal = lm_eval(supernet, ["tiny_rolling"], tokenizer=decoder_tokenizer(), include=tasks, limit=4)
    result = search_subnets(supernet.space, [goal, parameters(supernet)], evaluations=6, seed=0)
    best = result.best(goal.name)
    assert best.values[goal.name] == goal(best.architecture)


def test_fingerprints_tell_tasks_limits_and_keys_apart(supernet: Supernet, tasks: Path) -> None:
    tokens = decoder_tokenizer()

    def fingerprint(names: list[str], **changes: Any) -> str:
        return lm_eval(supernet, names, tokenizer=tokens, include=tasks, **changes).fingerprint

    prints = {
        fingerprint(["tiny_rolling"]), fingerprint(["tiny_likelihood"]), fingerprint(["tiny_rolling"], limit=3),
        fingerprint(["tiny_rolling"], num_fewshot=1), fingerprint(["tiny_choice"], key="acc"),
        fingerprint(["tiny_choice"], key="acc_norm"), fingerprint(["tiny_rolling"], seed=1),
    }  # fmt: skip
    assert len(prints) == 7 and fingerprint(["tiny_rolling"]) in prints


def test_a_model_that_is_no_causal_language_model_is_refused(tasks: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="asks causal language models, not a BertForMaskedLM"):
        lm_eval(supernet_of("bert"), ["tiny_choice"], tokenizer=tokenizer(), key="acc", include=tasks)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ("tiny_choice", {}, "is no list of tasks"),
        ([], {}, "is no list of tasks"),
        (
            ["tiny_choice"],
            {"key": "f1"},
            "key='f1' names none of what the tasks measure: tiny_choice/acc, tiny_choice/acc_norm",
        ),
        (["tiny_choice"], {}, "key=None names none"),
        (["tiny_choice"], {"key": "tiny_reply/acc"}, "key='tiny_reply/acc' names none"),
        (["tiny_reply"], {"key": "exact_match"}, "tiny_reply/exact_match,first; give one"),
        (["tiny_choice"], {"limit": 0}, "limit=0 must be at least 1"),
        (["tiny_choice"], {"key": "acc", "num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        (["tiny_choice"], {"include": "/no/such/folder"}, "'/no/such/folder' is no folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_runs(
    supernet: Supernet, tasks: Path, names: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        lm_eval(supernet, names, tokenizer=decoder_tokenizer(), **{"include": tasks, **changes})


def test_settings_of_a_harness_are_not_given_twice(supernet: Supernet, tasks: Path) -> None:
    harness = Harness(["tiny_rolling"], include=tasks)
    with pytest.raises(DataError, match="are of the Harness that was given"):
        lm_eval(supernet, harness, tokenizer=decoder_tokenizer(), limit=3)


def test_a_task_whose_data_is_missing_is_refused(tasks: Path) -> None:
    (tasks / "gone.yaml").write_text(
        (tasks / "tiny_choice.yaml").read_text().replace("tiny_choice", "gone").replace("test.j", "no.j")
    )
    with pytest.raises(DataError, match="lm-eval cannot load gone: FileNotFoundError"):
        Harness(["gone"], include=tasks)


def test_a_task_that_fails_says_why(supernet: Supernet, tasks: Path) -> None:
    reply = (tasks / "tiny_reply.yaml").read_text().replace("tiny_reply", "endless")
    (tasks / "endless.yaml").write_text(reply.replace("max_gen_toks: 6", "max_gen_toks: 600"))
    measure = lm_eval(supernet, ["endless"], tokenizer=decoder_tokenizer(), key="chrf,first", include=tasks)
    with pytest.raises(DataError, match="lm-eval fails: AssertionError: .*max tokens to generate"):
        measure(supernet.space.largest())


@pytest.mark.slow
def test_a_task_that_is_nowhere_is_refused(tasks: Path) -> None:
    """Slow: lm-eval reads the files of all its tasks."""
    with pytest.raises(DataError, match="lm-eval cannot load no_such_task: .*check the names"):
        Harness(["no_such_task"], include=tasks)
