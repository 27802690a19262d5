"""Elastic linears against linears cut by hand, skippable modules against the stock ones, and what cannot be swapped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from hf_elastic import Skip, UnsupportedModelError
from hf_elastic.layers import (
    ElasticConv1D,
    ElasticLinear,
    PartHolder,
    SkippableModule,
    check_linear,
    evaluating,
    make_elastic_linear,
    make_part_holder,
    make_skippable,
    without_autocast,
)

sizes = st.integers(1, 6)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> ElasticLinear:
    made = make_elastic_linear(nn.Linear(inputs, outputs, bias=bias), name="fc")
    assert isinstance(made, ElasticLinear)
    return made


def conv(inputs: int, outputs: int, *, fused: int = 1) -> ElasticConv1D:
    module = Conv1D(outputs, inputs)
    nn.init.normal_(module.bias)
    made = make_elastic_linear(module, name="c_attn", fused=fused)
    assert isinstance(made, ElasticConv1D)
    return made


@settings(max_examples=40, deadline=None)
@given(inputs=sizes, outputs=sizes, data=st.data(), bias=st.booleans())
def test_an_active_prefix_equals_a_linear_cut_by_hand(
    inputs: int, outputs: int, data: st.DataObject, bias: bool
) -> None:
    module = linear(inputs, outputs, bias=bias)
    rows, columns = data.draw(st.integers(1, inputs)), data.draw(st.integers(1, outputs))
    cut = nn.Linear(rows, columns, bias=bias)
    with torch.no_grad():
        cut.weight.copy_(module.weight[:columns, :rows])
        if bias:
            cut.bias.copy_(module.bias[:columns])
    module.active_in_features, module.active_out_features = rows, columns
    x = torch.randn(2, 3, rows)
    torch.testing.assert_close(module(x), cut(x))


@settings(max_examples=40, deadline=None)
@given(inputs=sizes, part=sizes, fused=st.sampled_from([1, 2, 3]), data=st.data())
def test_a_fused_prefix_is_taken_within_each_output(inputs: int, part: int, fused: int, data: st.DataObject) -> None:
    module = conv(inputs, part * fused, fused=fused)
    rows, columns = data.draw(st.integers(1, inputs)), data.draw(st.integers(1, part))
    wanted = []
    x = torch.randn(2, 3, rows)
    for k in range(fused):  # each fused output is a linear of its own
        weight = module.weight[:, k * part : (k + 1) * part]
        wanted.append(x @ weight[:rows, :columns] + module.bias[k * part : k * part + columns])
    module.active_in_features, module.active_out_features = rows, fused * columns
    torch.testing.assert_close(module(x), torch.cat(wanted, dim=-1))


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), lambda: Conv1D(6, 5)])
def test_the_whole_width_is_bit_identical_and_keeps_object_parameters_and_names(make: Callable[[], nn.Module]) -> None:
    module = make()
    parameters, x = dict(module.named_parameters()), torch.randn(3, 5)
    before, stock = module(x), type(module)
    made = make_elastic_linear(module, name="fc")
    assert made is module and isinstance(made, stock)
    assert {name: id(p) for name, p in made.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert torch.equal(made(x), before)


def test_active_regions_are_the_entries_that_change_the_output() -> None:
    module = conv(4, 9, fused=3)
    module.active_in_features, module.active_out_features = 3, 6
    found = torch.zeros(4, 9, dtype=torch.bool)
    module(torch.ones(1, 3)).sum().backward()
    for box in module.active_region()["weight"]:
        found[box] = True
    assert torch.equal(found, module.weight.grad != 0)
    assert module.active_region()["bias"] == ((slice(0, 2),), (slice(3, 5),), (slice(6, 8),))


def test_a_linear_without_bias_names_no_bias_region() -> None:
    assert set(linear(3, 3, bias=False).active_region()) == {"weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_work(dtype: torch.dtype) -> None:
    for module in (linear(8, 6), conv(8, 6, fused=3)):
        module.active_in_features, module.active_out_features = 4, 3
        x = torch.randn(2, 4)
        wanted = module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        torch.testing.assert_close(module.to(dtype)(x.to(dtype)).float(), wanted, rtol=0.05, atol=0.05)


def test_a_compiled_linear_follows_its_active_sizes() -> None:
    module = linear(6, 6)
    compiled = torch.compile(module, backend="eager")
    for size in (6, 2, 5, 3, 6):
        module.__dict__["active_in_features"] = module.__dict__["active_out_features"] = size
        x = torch.randn(2, size)
        torch.testing.assert_close(compiled(x), x @ module.weight[:size, :size].T + module.bias[:size])


class Quantised(nn.Linear):
    """Stands for bitsandbytes and peft layers, which are subclasses of nn.Linear."""


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=2)


def parametrised() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


REFUSED: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "subclass": (lambda: Quantised(4, 4), 1, r"test_layers.Quantised, only nn.Linear and Conv1D"),
    "elastic": (lambda: linear(4, 4), 1, r"ElasticLinear"),
    "other": (lambda: nn.Conv1d(4, 4, 1), 1, r"torch.nn.modules.conv.Conv1d"),
    "fused": (lambda: nn.Linear(4, 12), 3, r"a fused nn.Linear"),
    "pruned": (pruned, 1, r"prune.remove"),
    "parametrised": (parametrised, 1, r"ParametrizedLinear"),
    "hooked": (lambda: add_hook_to_module(nn.Linear(4, 4), AlignDevicesHook()), 1, r"remove_hook_from_module"),
}


@pytest.mark.parametrize(("make", "fused", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_class_swap_would_break_is_refused_and_left_as_it_was(
    make: Callable[[], nn.Module], fused: int, message: str
) -> None:
    module = make()
    kind, state = type(module), dict(vars(module))
    for refuse in (check_linear, make_elastic_linear):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            refuse(module, name="layer.0.fc", fused=fused)
        assert str(caught.value).startswith("layer.0.fc") and "\n" not in str(caught.value)
    assert type(module) is kind and vars(module) == state


class Adder(nn.Module):
    """Adds its last argument to its first; has a cache slot, as an attention module has."""

    layer_idx = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden_states: torch.Tensor, other: Any = 0, past_key_values: Any = None) -> Any:
        return self.scale * hidden_states + other


def test_a_skippable_module_computes_what_the_stock_module_does_until_it_is_skipped() -> None:
    module, x = Adder(), torch.randn(2, 3, 4)
    before = module(x)
    made = make_skippable(module, Skip("mlp", "zero"))
    assert made is module and isinstance(made, Adder) and type(made).__name__ == "Adder"
    assert torch.equal(made(x), before) and list(made.state_dict()) == ["scale"]
    made.skipped = True
    assert torch.equal(x + made(x), x)
    made.skipped = False
    assert torch.equal(made(x), before)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(("returns", "position"), [("input", 0), ("residual", 1)])
def test_a_skipped_module_hands_on_the_argument_its_rule_names(returns: Any, position: int, outputs: int) -> None:
    module = make_skippable(Adder(), Skip("mlp", returns, outputs=outputs))
    module.skipped = True
    arguments = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    result = module(*arguments)
    assert (result[0] if outputs == 2 else result) is arguments[position]
    assert outputs == 1 or result[1] is None


def test_a_skipped_module_takes_its_input_by_keyword_too() -> None:
    module, x = make_skippable(Adder(), Skip("attn", "zero", outputs=2)), torch.randn(1, 2, 3)
    module.skipped = True
    branch, weights = module(hidden_states=x)
    assert torch.equal(x + branch, x) and weights is None


def test_a_skipped_attention_keeps_the_length_of_the_cache() -> None:
    module, cache = make_skippable(Adder(), Skip("attn", "zero", outputs=2)), DynamicCache()
    module.skipped = True
    for seen in (3, 4):
        module(torch.randn(2, 3 if seen == 3 else 1, 4), past_key_values=cache)
        assert cache.get_seq_length() == seen
    assert cache.layers[0].keys.shape == (2, 1, 4, 1)


def test_making_a_module_skippable_again_takes_the_new_rule_and_no_second_mixin() -> None:
    module = make_skippable(Adder(), Skip("mlp", "zero"))
    module.skipped = True
    again = make_skippable(module, Skip("mlp", "input"))
    assert not again.skipped and again.skip_rule.returns == "input"
    assert type(again).__mro__.count(SkippableModule) == 1


def test_modules_of_one_class_share_the_class_that_is_made_for_them() -> None:
    assert type(make_skippable(Adder(), Skip("a", "zero"))) is type(make_skippable(Adder(), Skip("b", "input")))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_swapped_modules_survive_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    skipping = make_skippable(Adder(), Skip("mlp", "input"))
    skipping.skipped = True
    shrunk = conv(4, 6, fused=3)
    shrunk.active_out_features = 3
    both = make_skippable(linear(4, 4), Skip("fc", "input"))
    for module in (skipping, shrunk, both, make_part_holder(Adder(), ["part"])):
        twin, x = copied(module), torch.randn(2, 4)
        assert type(twin) is type(module) and twin is not module
        assert torch.equal(twin(x), module(x))
        assert isinstance(twin, PartHolder) == isinstance(module, PartHolder)


def test_a_compiled_module_can_still_be_copied() -> None:
    module = make_skippable(Adder(), Skip("mlp", "input"))
    module.compile(backend="eager")
    module(torch.randn(2, 4))
    assert torch.equal(copy.deepcopy(module)(torch.ones(1)), 2 * torch.ones(1))


def test_a_part_holder_computes_what_the_stock_module_does_and_carries_its_parts() -> None:
    module, x, parts = Adder(), torch.randn(2), [object()]
    before = module(x)
    holder = make_part_holder(module, parts)
    assert torch.equal(holder(x), before) and holder.elastic_parts is parts and list(holder.state_dict()) == ["scale"]


def test_evaluating_gives_each_module_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    model[1][0].train()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError("inside")
    assert [module.training for module in model.modules()] == before


def test_a_model_prepared_for_mixed_precision_computes_in_its_own_inside_and_as_prepared_outside() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    inputs = torch.randn(4, 64)
    wanted = model(inputs)
    inner = type(model).forward
    model._original_forward = model.forward  # as accelerate does

    def mixed(self: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(self, x)

    model.forward = MethodType(mixed, model)
    with without_autocast(model):
        assert torch.equal(model(inputs), wanted) and model(inputs).dtype == torch.float32
    assert model(inputs).dtype == torch.bfloat16
