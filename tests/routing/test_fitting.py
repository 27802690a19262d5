"""What fitted routers may be asked for, what else stays as it was, and what they have learned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from routed_models import ALL
from tiny_models import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig, RoutingConfig, Supernet, add_routing, make_elastic, set_capacity
from hf_elastic.errors import DataError, TrainingError, UnsupportedModelError
from hf_elastic.files import read_json
from hf_elastic.layers import seeded
from hf_elastic.pipeline.elm_reproduction import _llama2c_tokenizer
from hf_elastic.routing.calibration import calibrate_routing
from hf_elastic.routing.fitting import fit_routers

FAMILIES = ("llama", "gpt2", "bert")
MADE = RoutingConfig(**ALL)
ADAPTED = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}


def batches(*, rows: int = 6, length: int = 12, count: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random tokens, one row padded on the left and one on the right."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3], mask[-1, -4:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def scores_of(supernet: Supernet) -> dict[str, Tensor]:
    """Weights and biases that are fitted, by layer, kind and name."""
    return {
        f"{part.layer.index}.{kind}.{name}": parameter.detach().clone()
        for part in supernet.router_parts
        for kind in part.routers
        for name, parameter in part.routers[kind].scores.named_parameters()
    }


def others_of(supernet: Supernet) -> dict[str, Tensor]:
    """All other parameters, and the buffers but for thresholds."""
    named = [*supernet.model.named_parameters(), *supernet.model.named_buffers()]
    return {name: t.detach().clone() for name, t in named if ".scores." not in name and "thresholds" not in name}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], *, tolerance: float = 1e-3) -> None:
    assert found.keys() == wanted.keys() and found
    gaps = {n: float((found[n] - w).abs().max()) / max(0.1, float(w.abs().max())) for n, w in wanted.items()}
    assert not {name: gap for name, gap in gaps.items() if gap > tolerance}


@contextmanager
def everything_else_as_it_was(supernet: Supernet) -> Iterator[None]:
    """Asserts behind the block that it changed nothing but scores and thresholds."""

    def seen() -> Any:
        return (
            {name: module.training for name, module in supernet.model.named_modules()},
            {name: parameter.requires_grad for name, parameter in supernet.model.named_parameters()},
            supernet.active,
            [dict(part.routers.active) for part in supernet.router_parts],
        )

    before, tensors, state = seen(), others_of(supernet), torch.get_rng_state()
    yield
    assert seen() == before
    assert_same(others_of(supernet), tensors)
    assert torch.equal(torch.get_rng_state(), state), "the random state that all share has moved"
    assert all(parameter.grad is None for parameter in supernet.model.parameters())
    assert all(part.routers.probe is None and not part.routers.observers for part in supernet.router_parts)


DROPOUT = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_scores_and_thresholds_changes_and_nothing_is_dropped(family: str) -> None:
    supernet, calm = add_routing(tiny(family, **DROPOUT[family]), MADE, freeze=False), add_routing(tiny(family), MADE)
    supernet.model.train()
    supernet.router_parts[1].layer.layer.eval()
    before = scores_of(supernet)
    with supernet.activate(supernet.space.smallest()), everything_else_as_it_was(supernet), torch.no_grad():
        fit_routers(supernet, batches(), points=2)
    after = scores_of(supernet)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    fit_routers(calm, batches(), points=2)
    assert_same(after, scores_of(calm))


@pytest.mark.parametrize("forward", [1, 2, 5], ids=["whole", "under a probe", "second batch"])
def test_a_forward_that_fails_leaves_everything_as_it_was(forward: int) -> None:
    supernet, calls = add_routing(tiny("llama"), MADE), []
    supernet.model.train()

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(output)
        if len(calls) == forward:
            raise InterruptedError("in the middle of a layer")

    inside = supernet.router_parts[1].layer.layer.get_submodule("mlp.down_proj")
    scores = scores_of(supernet)
    handle = inside.register_forward_hook(fail)
    with everything_else_as_it_was(supernet), pytest.raises(InterruptedError):
        fit_routers(supernet, batches(), points=3)
    handle.remove()
    assert_same(scores_of(supernet), scores)
    fit_routers(supernet, batches(), points=1)


def test_a_batch_that_the_model_cannot_read_leaves_everything_as_it_was() -> None:
    supernet = add_routing(tiny("bert"), MADE)
    scores = scores_of(supernet)
    with everything_else_as_it_was(supernet), pytest.raises(IndexError):
        fit_routers(supernet, [*batches(), {"input_ids": torch.full((2, 5), 10_000)}], points=1)
    assert_same(scores_of(supernet), scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_call_gives_the_same_bits_whatever_the_routers_were(family: str) -> None:
    supernet, other = add_routing(tiny(family), MADE), add_routing(tiny(family), MADE)
    report = fit_routers(supernet, batches(), points=2)
    first = scores_of(supernet)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in supernet.router_parts:
            for parameter in part.routers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert fit_routers(supernet, iter(batches()), points=2) == report
    assert_same(scores_of(supernet), first)
    assert fit_routers(other, batches(), points=2) == report
    assert_same(scores_of(other), first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_model_needs_thresholds_anew_and_works_with_them(family: str) -> None:
    supernet = add_routing(tiny(family), MADE)
    for part in supernet.router_parts:
        for kind in ("attention_tokens", "mlp_tokens"):
            part.routers[kind].thresholds.zero_()
    fit_routers(supernet, batches(), points=2)
    set_capacity(supernet, mlp_tokens=0.6)
    with pytest.raises(RuntimeError, match="no threshold for a capacity of 60 %"), torch.no_grad():
        supernet.model(**batches()[0])
    assert calibrate_routing(supernet, batches()).worst <= 0.01  # one token of 130
    set_capacity(supernet, attention_tokens=0.5, heads=1, experts=1)
    with torch.no_grad():
        assert torch.isfinite(supernet.model(**batches()[0]).logits).all()


def test_an_encoder_needs_nothing_more() -> None:
    supernet = add_routing(tiny("bert"), MADE)
    fit_routers(supernet, batches(), points=2)
    set_capacity(supernet, mlp_tokens=0.6, attention_tokens=0.5, heads=1, experts=1)
    with torch.no_grad():
        assert torch.isfinite(supernet.model(**batches()[0]).logits).all()


def test_labels_are_left_out() -> None:
    found = []
    for labels in (False, True):
        supernet = add_routing(tiny("llama"), MADE)
        data = [{**batch, **({"labels": batch["input_ids"] + 999} if labels else {})} for batch in batches()]
        fit_routers(supernet, data, points=2)
        found.append(scores_of(supernet))
    assert_same(found[1], found[0])


def test_the_report_goes_into_json_and_a_table() -> None:
    report = fit_routers(add_routing(tiny("bert"), MADE), batches(), points=2)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["tokens"] == 2 * (6 * 12 - 7) and told["distance"] == report.distance > 0
    assert [each["layer"] for each in told["routers"]] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(0 < each["explained"] < 1 for each in told["routers"])
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "explained"] and len(lines) == 1 + 12 + 1
    assert lines[1].split()[:2] == ["0", "attention_tokens"] and "130 tokens" in lines[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_elastic_base_is_fitted_at_its_largest_size(family: str) -> None:
    plain = add_routing(tiny(family), MADE)
    elastic = make_elastic(tiny(family), ElasticConfig(intermediate_size=[16, 48], skip=["attention", "mlp"]))
    supernet = add_routing(elastic.model, MADE)
    with supernet.activate(supernet.space.smallest()), everything_else_as_it_was(supernet):
        fit_routers(supernet, batches(), points=2)
    fit_routers(plain, batches(), points=2)
    assert_near(scores_of(supernet), scores_of(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_and_others_count_as_if_they_were_merged(family: str) -> None:
    found = {}
    for fresh in (True, False):
        settings = LoraConfig(target_modules=ADAPTED[family], r=4, init_lora_weights=fresh)
        with seeded(0):
            adapted, merged = (get_peft_model(tiny(family), settings) for _ in range(2))
        merged.load_state_dict(adapted.state_dict())
        supernet, plain = add_routing(adapted, MADE), add_routing(merged.merge_and_unload(), MADE)
        with everything_else_as_it_was(supernet):
            fit_routers(supernet, batches(), points=2)
        assert supernet.model is adapted
        fit_routers(plain, batches(), points=2)
        found[fresh] = scores_of(supernet)
        assert_near(found[fresh], scores_of(plain))
    bare = add_routing(tiny(family), MADE)
    fit_routers(bare, batches(), points=2)
    assert_near(found[True], scores_of(bare))
    assert [name for name in found[True] if not torch.allclose(found[True][name], found[False][name], atol=1e-2)]


def test_a_hidden_layer_stays_bitwise_as_it_was() -> None:
    supernet = add_routing(tiny("bert"), RoutingConfig(**ALL, router="mlp", router_hidden_size=16))
    assert sum(".hidden." in name for name in others_of(supernet)) == 3 * 4 * 2
    with everything_else_as_it_was(supernet):
        report = fit_routers(supernet, batches(), points=2)
    assert all(each.explained > 0 for each in report.routers)


def test_layers_that_share_a_choice_are_fitted_as_those_that_have_their_own() -> None:
    found = []
    for share in ("layer", "model"):
        supernet = add_routing(tiny("llama"), RoutingConfig(**ALL, share=share))  # type: ignore[arg-type]
        fit_routers(supernet, batches(), points=2)
        found.append(scores_of(supernet))
    assert_same(found[0], found[1])


def test_a_model_without_routers_is_refused() -> None:
    plain = make_elastic(tiny("llama"), ElasticConfig(intermediate_size=[16, 48]))
    with pytest.raises(UnsupportedModelError, match="no routers for fit_routers; call hf_elastic.add_routing first"):
        fit_routers(plain, batches())


@pytest.mark.parametrize(("options", "words"), [
    ({"target": "loss"}, r"target='loss'\) is unknown; allowed: 'logits', 'embeddings'"),
    ({"points": 0}, r"points=0\) must be a whole number of at least 1"),
    ({"points": True}, r"points=True\) must be a whole number"),
    ({"points": 2.5}, r"points=2.5\) must be a whole number"),
    ({"ridge": 0}, r"ridge=0\) must be above 0"),
    ({"ridge": -1.0}, r"ridge=-1.0\) must be above 0"),
    ({"ridge": math.nan}, r"ridge=nan\) must be above 0"),
    ({"ridge": math.inf}, r"ridge=inf\)"), ({"ridge": "a"}, "ridge='a'"), ({"ridge": True}, r"ridge=True\)"),
    ({"target": "embeddings", "pooling": "max"}, "unknown pooling 'max'; allowed: 'mean', 'cls', 'last'"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    supernet = add_routing(tiny("llama"), MADE)
    with everything_else_as_it_was(supernet), pytest.raises(TrainingError, match=words):
        fit_routers(supernet, batches(), **options)
    assert not any(tensor.any() for tensor in scores_of(supernet).values())


def padding(*, rows: int = 4) -> list[dict[str, Tensor]]:
    return [{**batch, "attention_mask": torch.zeros_like(batch["input_ids"])} for batch in batches(rows=rows)]


@pytest.mark.parametrize(("data", "words"), [
    ([], "there is no calibration batch"),
    (padding(), "no tokens but padding"),
    ([{**batches()[0], "attention_mask": torch.eye(6, 12).long()}], "6 calibration tokens cannot determine 32 inputs"),
    ([torch.zeros(2, 3)], "must be a dict of tensors"),
], ids=["none", "padding", "few", "no dict"])  # fmt: skip
@pytest.mark.parametrize("head", ["lm", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_that_say_too_little_are_refused(family: str, head: str, data: Any, words: str) -> None:
    supernet = add_routing(tiny(family, head), MADE)
    with everything_else_as_it_was(supernet), pytest.raises(DataError, match=words):
        fit_routers(supernet, data, points=1)
    assert not any(tensor.any() for tensor in scores_of(supernet).values())


@pytest.mark.parametrize("head", ["lm", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_nothing_but_padding_among_others_counts_nothing(family: str, head: str) -> None:
    found = []
    for empty in ([], padding()):
        supernet = add_routing(tiny(family, head), MADE)
        report = fit_routers(supernet, [*empty, *batches()], points=2)
        found.append((scores_of(supernet), report.tokens, report.routers))
    assert_same(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]


def test_a_sentence_of_nothing_but_padding_is_no_sentence() -> None:
    supernet = add_routing(tiny("bert", "base"), MADE)
    alone, beside = (fit_routers(supernet, [*more, *batches()], points=2).distance for more in ([], padding()))
    assert beside == pytest.approx(alone)


BROKEN = {
    "llama": ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight"),
    "gpt2": ("transformer.h.0.attn.c_attn.weight", "transformer.ln_f.weight"),
    "bert": ("bert.encoder.layer.0.output.dense.weight", "cls.predictions.transform.dense.weight"),
}


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", ["mlp_tokens", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_no_numbers_are_refused(family: str, where: int, kind: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        model.get_parameter(BROKEN[family][where]).view(-1)[0] = math.nan
    supernet = add_routing(model, RoutingConfig(**{kind: ALL[kind]}))
    with pytest.raises(DataError, match="NaN or infinity"):
        fit_routers(supernet, batches(), points=1)
    assert not any(tensor.any() for tensor in scores_of(supernet).values())


def test_what_cannot_be_fitted_is_said_before_anything_runs() -> None:
    supernet, batch = add_routing(tiny("llama"), MADE), batches()[0]
    with torch.inference_mode(), pytest.raises(TrainingError, match="outside of torch.inference_mode"):
        fit_routers(supernet, batch)
    square = torch.ones(len(batch["input_ids"]), 1, batch["input_ids"].shape[1], batch["input_ids"].shape[1])
    with pytest.raises(DataError, match=r"attention_mask is .*; give one of shape \(batch, tokens\)"):
        fit_routers(supernet, {**batch, "attention_mask": square})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_that_the_model_does_not_give_is_refused(family: str) -> None:
    supernet = add_routing(tiny(family, "base"), MADE)
    with pytest.raises(TrainingError, match="cannot fit routers to logits: the model returned .*last_hidden_state"):
        fit_routers(supernet, batches(), target="logits")


def planted() -> Any:
    """A LLaMA of one layer whose FFN adds nothing to odd tokens: their first feature is negative, as are all gates."""
    model: Any = tiny("llama", num_hidden_layers=1, hidden_act="relu")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1 - 2.0 * (torch.arange(61) % 2)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.gate_proj.weight.zero_()
        layer.mlp.gate_proj.weight[:, 0] = 1.0
    return model


def mixed_rows(*, rows: int, seed: int) -> Tensor:
    """Rows of eight even and eight odd tokens in random order."""
    generator = torch.Generator().manual_seed(seed)
    halves = [2 * torch.randint(2, 30, (rows, 8), generator=generator) + odd for odd in (0, 1)]
    order = torch.rand(rows, 16, generator=generator).argsort(-1)
    return torch.cat(halves, dim=1).gather(1, order)


def test_tokens_for_which_the_ffn_does_nothing_stay_out() -> None:
    supernet, parent, found = add_routing(planted(), RoutingConfig(mlp_tokens=[0.5])), planted(), []
    fit_routers(supernet, [{"input_ids": mixed_rows(rows=12, seed=n)} for n in (0, 1)])
    calibrate_routing(supernet, {"input_ids": mixed_rows(rows=32, seed=2)})
    set_capacity(supernet, mlp_tokens=0.5)
    ids, (part,) = mixed_rows(rows=32, seed=3), supernet.router_parts
    part.routers.observers.append(lambda what: found.append(what.decision.keep))
    scores: Any = part.routers["mlp_tokens"].scores

    def weigh(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (0.5 + 0.5 * 2 * (args[0] @ scores.weight[0] + scores.bias[0]).sigmoid()).unsqueeze(-1)

    with torch.no_grad():
        logits, whole = supernet.model(input_ids=ids).logits, parent(input_ids=ids).logits
        parent.model.layers[0].mlp.register_forward_hook(weigh)
        weighted = parent(input_ids=ids).logits
    assert torch.equal(found[0], ids % 2 == 0)
    torch.testing.assert_close(logits[ids % 2 == 1], whole[ids % 2 == 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, weighted, atol=1e-4, rtol=1e-4)


def stories(data_dir: Path, *, length: int = 128) -> tuple[Any, list[dict[str, Tensor]]]:
    folder, text = data_dir / "stories260K" / "hf", data_dir / "tinystories" / "train_944k.txt"
    if not (folder / "config.json").is_file() or not text.is_file():
        pytest.skip(f"no checkpoint in {folder}, or no {text}")
    tokenizer = _llama2c_tokenizer(read_json(folder / "llama2c_tokenizer.json"))
    ids = tokenizer(text.read_text(encoding="utf-8")[:120_000], add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return folder, [{"input_ids": part} for part in rows.split(32)]


def loss_of(model: Any, data: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in data) / len(data)


def choose_at_random(supernet: Supernet) -> None:
    """Lets four of five tokens into each layer, others in each, with weights of one."""
    for part in supernet.router_parts:
        router, generator = part.routers["mlp_tokens"], torch.Generator().manual_seed(part.layer.index)

        def draw(module: nn.Module, args: Any, scores: Tensor, generator: torch.Generator = generator) -> Tensor:
            return 1e-4 * (torch.rand(scores.shape, generator=generator) - 0.2)

        router.register_forward_hook(draw)
        router.thresholds.zero_()


def test_real_text_loses_less_than_half_of_what_a_random_choice_costs(data_dir: Path) -> None:
    folder, data = stories(data_dir)
    fitted, random = (
        add_routing(AutoModelForCausalLM.from_pretrained(folder).eval(), RoutingConfig(mlp_tokens=[0.8]))
        for _ in range(2)
    )
    held_out = data[8:10]
    parent = loss_of(fitted.model, held_out)
    fit_routers(fitted, data[:1])
    calibrate_routing(fitted, data[1:3])
    choose_at_random(random)
    for supernet in (fitted, random):
        set_capacity(supernet, mlp_tokens=0.8)
    assert 0 < loss_of(fitted.model, held_out) - parent < (loss_of(random.model, held_out) - parent) / 2
