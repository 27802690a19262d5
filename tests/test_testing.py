"""All eight promises, for every family; and that each check fails when its promise is broken."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)  # fmt: skip

from hf_elastic import (
    ElasticConfig,
    Family,
    RandomSubnet,
    Skip,
    Supernet,
    UnsupportedModelError,
    conversion,
    make_elastic,
    testing,
)
from hf_elastic.checkpoint import extraction
from hf_elastic.layers import ElasticLinear, SkippableModule
from hf_elastic.parts import LayerPart, LayerShape
from hf_elastic.testing import Case
from hf_elastic.training.decay import ActiveSliceStep

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDTHS = ElasticConfig(intermediate_size=[0.25, 0.5, 1.0], num_hidden_layers=[2, 3], skip=["attention", "mlp"])
HEADS = replace(WIDTHS, num_attention_heads=[1, 3])
GROUPS = replace(WIDTHS, num_key_value_heads=[1, 2])

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=32, hidden_dim=64, n_layers=3, n_heads=4, vocab_size=101, max_position_embeddings=64)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=101, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **GROUPED)),
}
CASES = {
    name: Case(make, GROUPS if name in ("llama", "qwen2", "qwen3", "mistral") else HEADS)
    for name, make in MODELS.items()
}


@pytest.mark.parametrize("promise", testing.PROMISES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", CASES)
def test_every_family_keeps_every_promise(family: str, promise: Callable[[Case], None]) -> None:
    promise(CASES[family])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_promises_hold_in_stock_restricted_spaces(family: str) -> None:
    heads = {"num_key_value_heads": [1, 2]} if family == "llama" else {}
    config = ElasticConfig(intermediate_size=[16, 32], skip=["layer"], loadability="stock", **heads)
    case = replace(CASES[family], config=config)
    supernet = case.supernet()
    kept = [a for a in case.architectures(supernet) if any(not s.skipped for s in supernet.layer_shapes(a))]
    assert {supernet.loadability(a) for a in kept} == {"stock"}
    testing.check_extracted_equals_active(case)
    testing.check_active_is_measurable(case)


def test_a_users_row_for_a_family_we_lack_keeps_every_promise() -> None:
    row = Family(
        model_type="opt",
        layers="decoder.layers",
        ffn_in=("fc1",),
        ffn_out="fc2",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_out="self_attn.out_proj",
        attention="self_attn",
        head_size="head_dim",
        attributes={"num_heads": "heads"},
        skip_attention=(Skip("self_attn_layer_norm", "input"), Skip("self_attn", "zero", outputs=2)),
        skip_mlp=(Skip("final_layer_norm", "input"), Skip("fc1", "input"), Skip("activation_fn", "input"),
                  Skip("fc2", "zero")),
        pre_norm=True,
        causal=True,
        config_names={"intermediate_size": "ffn_dim"},
    )  # fmt: skip
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 101,
    }
    config = ElasticConfig(intermediate_size=[0.25, 0.5], num_attention_heads=[1, 3], num_hidden_layers=[2, 3])
    case = Case(
        lambda: OPTForCausalLM(OPTConfig(max_position_embeddings=64, word_embed_proj_dim=32, **sizes)),
        config,
        family=row,
    )
    testing.check_family(case)


Patch = pytest.MonkeyPatch


def _sticky_activation(patch: Patch) -> None:
    class Sticky:
        def __init__(self, supernet: Supernet, architecture: object) -> None:
            supernet.set_active(architecture)  # type: ignore[arg-type]

        def __enter__(self) -> None: ...
        def __exit__(self, *exc: object) -> None: ...

    patch.setattr(Supernet, "activate", lambda self, arch: Sticky(self, arch))  # noqa: PLW0108 - binds self


def _new_names_in_the_state(patch: Patch) -> None:
    original = conversion.make_part_holder

    def hold(module: nn.Module, parts: list[object]) -> object:
        module.register_buffer("active_width", torch.zeros(1))
        return original(module, parts)

    patch.setattr(conversion, "make_part_holder", hold)


def _wrong_cut(patch: Patch) -> None:
    original = extraction.take_region
    patch.setattr(extraction, "take_region", lambda tensor, region: original(tensor, region).flip(0))


def _leaking_gradient(patch: Patch) -> None:
    original = ElasticLinear.forward
    patch.setattr(ElasticLinear, "forward", lambda self, x: original(self, x) + 1e-3 * self.weight.sum())


def _decay_everywhere(patch: Patch) -> None:
    patch.setattr(ActiveSliceStep, "_boxes", lambda self, parameter: None)


def _impure_draw(patch: Patch) -> None:
    rng = random.Random(0)
    patch.setattr(RandomSubnet, "draw", lambda self, space, step, micro_step: (space.sample(rng),))


def _redrawn_on_recomputation(patch: Patch) -> None:
    original, seen = ElasticLinear.forward, itertools.count()
    patch.setattr(ElasticLinear, "forward", lambda self, x: original(self, x) * (1 + 1e-3 * next(seen)))


def _no_cache_slot(patch: Patch) -> None:
    patch.setattr("hf_elastic.layers.write_cache_filler", lambda *args: None)


def _another_width(patch: Patch) -> None:
    original = LayerPart.apply

    def apply(self: LayerPart, shape: LayerShape) -> None:
        original(self, replace(shape, intermediate_size=min(shape.intermediate_size + 1, 64)))

    patch.setattr(LayerPart, "apply", apply)


BREAKS = [
    (2, _sticky_activation, testing.check_activation_is_restored),
    (3, _new_names_in_the_state, testing.check_state_dict_is_stock),
    (4, _wrong_cut, testing.check_extracted_equals_active),
    (5, _leaking_gradient, testing.check_gradients_stay_inside),
    (5, _decay_everywhere, testing.check_gradients_stay_inside),
    (6, _impure_draw, testing.check_sampling_is_pure),
    (6, _redrawn_on_recomputation, testing.check_sampling_is_pure),
    (7, _no_cache_slot, testing.check_cache_is_exact),
    (8, _another_width, testing.check_active_is_measurable),
]


@pytest.mark.parametrize(("promise", "damage", "check"), BREAKS, ids=lambda f: getattr(f, "__name__", None))
def test_a_broken_promise_is_found_and_named(
    promise: int, damage: Callable[[Patch], None], check: Callable[[Case], None], monkeypatch: Patch
) -> None:
    damage(monkeypatch)
    with pytest.raises(AssertionError, match=f"^promise {promise}"):
        check(CASES["llama"])


def test_unsorted_state_is_found_when_the_largest_is_not_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: PreTrainedModel, config: ElasticConfig, **kwargs: object) -> Supernet:
        with torch.no_grad():
            next(model.base_model.parameters()).mul_(1.01)
        return make_elastic(model, config, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(testing, "make_elastic", spoil)
    with pytest.raises(AssertionError, match="promise 1"):
        testing.check_largest_is_parent(CASES["bert"])


def test_copies_are_independent_handles() -> None:
    supernet = CASES["bert"].supernet()
    twin = Supernet(copy.deepcopy(supernet.model))
    with twin.activate(twin.space.smallest()):
        assert supernet.active == supernet.space.largest()
        inputs = CASES["bert"].inputs(supernet.model)
        assert supernet.measured(**inputs) == supernet.expected(supernet.space.largest())
        assert twin.measured(**inputs) == twin.expected(twin.space.smallest())


def test_a_model_without_parts_has_no_handle() -> None:
    with pytest.raises(UnsupportedModelError, match="make_elastic"):
        Supernet(MODELS["bert"]())


def test_skippable_modules_survive_pickling() -> None:
    import pickle

    supernet = CASES["llama"].supernet()
    twin = Supernet(pickle.loads(pickle.dumps(supernet.model)))
    inputs = CASES["llama"].inputs(supernet.model)
    with supernet.activate(supernet.space.smallest()), twin.activate(twin.space.smallest()), torch.no_grad():
        assert torch.equal(supernet.model(**inputs)[0], twin.model(**inputs)[0])
    assert any(isinstance(module, SkippableModule) for module in twin.model.modules())
