"""Every proxy against its definition, what a score must leave alone, and what it must refuse."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.offload import offload_module
from proxy_oracles import ORACLES, OWN_ROLES, Own, batches_for, gradients, own, projections, zerolm
from tiny_models import inputs, point, supernet_of, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_elastic as he
from hf_elastic.packed_format import write_weights
from hf_elastic.proxies import BASELINES, DATA_FREE, ON_DATA, PROXIES, Subject, roles_of, score
from hf_elastic.proxies.subject import signs

MODELS = ["bert", "gpt2", "llama"]


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


NEEDS_POSITIONS = "jacobian_cosine"  # which LLaMA has not as a table
TARGETED = [n for n in ON_DATA if n not in ("attention_confidence", "softmax_confidence", "activation_distance")]


def test_every_proxy_has_an_oracle() -> None:
    assert ORACLES.keys() == PROXIES.keys()
    assert set(signs(200).tolist()) == {-1, 1} and torch.equal(signs(200), signs(200))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_of_the_models_own_loss_is_its_definition(name: str, family: str) -> None:
    if (name, family) == (NEEDS_POSITIONS, "llama"):
        return
    model = tiny(family).double()
    batches = batches_for(model, labels=True)
    # RMSNorms compute in single precision whatever they are given.
    close = 1e-4 if family == "llama" else 1e-8
    assert score(model, name, batches) == pytest.approx(ORACLES[name](model, batches, "loss"), rel=close)


@pytest.mark.parametrize(
    ("family", "target"),
    [("bert", "signs"), ("gpt2", "sum"), slow("llama", "signs"), slow("bert", "sum"), slow("gpt2", "signs"),
     slow("llama", "sum")],
)  # fmt: skip
@pytest.mark.parametrize("name", TARGETED)
def test_a_proxy_of_outputs_is_its_definition(name: str, family: str, target: Any) -> None:
    if (name, family) == (NEEDS_POSITIONS, "llama"):
        return
    model = tiny(family).double()
    batches = batches_for(model)[:1]
    found = score(model, name, batches, target="auto" if target == "signs" else target)
    assert found == pytest.approx(ORACLES[name](model, batches, target), rel=1e-4 if family == "llama" else 1e-8)


@pytest.mark.parametrize("name", [name for name in PROXIES if name != "softmax_confidence"])
def test_a_model_of_ones_own_is_scored_by_its_roles(name: str) -> None:
    model = own()
    batches = batches_for(model)
    found = score(model, name, batches, roles=OWN_ROLES)
    assert found == pytest.approx(ORACLES[name](model, batches, "signs"), rel=1e-8)


@pytest.mark.parametrize("family", ["gpt2", slow("bert"), slow("llama")])
def test_single_precision_is_enough(family: str) -> None:
    model = tiny(family)
    batches = batches_for(model, labels=True)
    exact = copy.deepcopy(model).double()
    for name in PROXIES:
        if (name, family) != (NEEDS_POSITIONS, "llama") and name != "eznas":  # whose signs of tiny gradients may flip
            assert score(model, name, batches) == pytest.approx(score(exact, name, batches), rel=1e-4), name


def test_grasp_is_the_change_of_the_gradient_along_itself() -> None:
    model = tiny("gpt2").double()
    batches = batches_for(model)
    step = 1e-5 / score(model, "grad_norm", batches)
    found, shifted = gradients(model, batches, "signs"), []
    for sign in (1, -1):
        twin = copy.deepcopy(model)
        for module, (_, _, g) in zip(projections(twin).values(), found, strict=True):
            module.weight.data += sign * step * g.t()  # type: ignore
        shifted.append(gradients(twin, batches, "signs"))
    weights = [w for _, w, _ in found]
    change = [(up - down) / (2 * step) for (_, _, up), (_, _, down) in zip(*shifted, strict=True)]
    wanted = -sum(float((w * c).sum()) for w, c in zip(weights, change, strict=True))
    assert score(model, "grasp", batches) == pytest.approx(wanted, rel=1e-6)


def test_the_same_batch_twice_scores_as_once() -> None:
    model = tiny("bert")
    batch = batches_for(model, labels=True)[0]
    for name in PROXIES:
        once = score(model, name, batch)
        assert score(model, name, iter([batch, dict(batch)])) == pytest.approx(once, rel=1e-5), name


def test_the_sum_behind_a_layer_norm_is_constant_and_its_gradients_are_rounding_noise() -> None:
    model = tiny("bert", "base")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    batches = [inputs(model)]
    noise, signal = (score(model, "grad_norm", batches, target=t) for t in ("sum", "signs"))
    assert 0 < noise < 1e-5 * signal
    exact = copy.deepcopy(model).double()
    assert score(exact, "grad_norm", batches, target="sum") < 1e-6 * noise  # with the precision the noise goes
    assert score(exact, "grad_norm", batches) == pytest.approx(signal, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", slow("bert"), slow("gpt2")])
def test_a_searched_model_with_layers_of_their_own_sizes_is_scored(family: str) -> None:
    supernet = supernet_of(family)
    architecture = point(supernet, ffn0=16, heads1=1, skip2="attention")
    one = he.extract(supernet, architecture, loadability="remote-code").double()
    batches = batches_for(one, labels=True)
    for name in PROXIES:
        if (name, family) != (NEEDS_POSITIONS, "llama"):
            wanted = ORACLES[name](one, batches, "loss")
            assert score(one, name, batches) == pytest.approx(wanted, rel=1e-4), name


def test_an_exported_model_scores_as_the_extracted_one(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    architecture = point(supernet, ffn0=16, heads1=1, skip2="mlp")
    he.export(supernet, architecture, tmp_path / "out", loadability="remote-code")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    one = he.extract(supernet, architecture, loadability="remote-code")
    for name in ("snip", "synflow", "softmax_confidence"):
        batches = batches_for(one)
        assert score(again, name, batches) == pytest.approx(score(one, name, batches), rel=1e-5)


def test_the_row_of_a_supernet_fits_what_is_extracted_of_it() -> None:
    supernet = supernet_of("distilbert")
    one = he.extract(supernet, point(supernet, ffn0=16), loadability="remote-code")
    assert one.config.model_type == "elastic_bert"
    assert score(one, "zerolm", family=supernet.family) == score(one, "zerolm")


@pytest.mark.parametrize("family", ["gpt2", slow("bert"), slow("llama")])
def test_a_supernet_scores_as_the_model_it_was_made_of(family: str) -> None:
    supernet, stock = supernet_of(family), tiny(family)
    batches = batches_for(stock)
    for name in ("zerolm", "synflow", "snip", "grasp", "fisher", "lpzero", "attention_confidence"):
        assert score(supernet.model, name, batches) == pytest.approx(score(stock, name, batches), rel=1e-5)


# What a score leaves alone.


def hooks_of(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [list(getattr(module, kind).items()) for module in model.modules() for kind in kinds]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    parameters = dict(model.named_parameters())
    return (
        {n: (id(p), id(p.grad), p.requires_grad, p.dtype, p._version) for n, p in parameters.items()},
        {n: (id(b), b._version) for n, b in model.named_buffers()},
        [module.training for module in model.modules()], hooks_of(model), torch.get_rng_state().tolist(),
        torch.is_grad_enabled(), getattr(getattr(model, "config", None), "_attn_implementation", None),
        [sorted(vars(module)) for module in model.modules()],
    )  # fmt: skip


def unlike_modules(family: str) -> PreTrainedModel:
    """A model with gradients, hooks, and modes and flags that differ from module to module."""
    model = tiny(family, **({"hidden_dropout_prob": 0.3} if family == "bert" else {}))
    for number, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training = bool(number % 2)
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.full_like(parameter, 7.0) if number % 3 != 0 else None
    next(iter(projections(model).values())).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_a_score_leaves_everything_as_it_was(family: str) -> None:
    model = unlike_modules(family)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slopes = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = state_of(model)
    for name in PROXIES:
        if (name, family) != (NEEDS_POSITIONS, "llama"):
            score(model, name, batches_for(model, labels=True))
        assert state_of(model) == before, name
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, slopes[n]) for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["snip", "fisher", "grasp", "lpzero", "synflow", "softmax_confidence"])
def test_a_score_that_fails_leaves_everything_as_it_was(name: str) -> None:
    model = tiny("bert").train()
    nn.init.constant_(model.bert.encoder.layer[1].intermediate.dense.weight, math.nan)
    before = state_of(model)
    with pytest.raises(he.DataError):
        score(model, name, batches_for(model))
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("family", "around"),
    [("bert", torch.inference_mode), slow("llama", torch.no_grad), slow("gpt2", torch.no_grad)],
)
def test_a_frozen_model_in_training_mode_scores_the_same_where_gradients_are_off(family: str, around: Any) -> None:
    dropout = {"bert": "hidden_dropout_prob", "gpt2": "resid_pdrop", "llama": "attention_dropout"}[family]
    model = tiny(family, **{dropout: 0.5})
    batches = batches_for(model, labels=True)
    names = [name for name in PROXIES if (name, family) != (NEEDS_POSITIONS, "llama")]
    wanted = {name: score(model, name, batches) for name in names}
    model.train().requires_grad_(False)
    with around():
        assert {name: score(model, name, batches) for name in names} == wanted


# What a score refuses.


def test_unknown_names_and_targets_are_listed() -> None:
    model = tiny("bert")
    with pytest.raises(he.DataError, match="no proxy 'snap'; known: zerolm, synflow"):
        score(model, "snap")
    with pytest.raises(he.DataError, match="no target 'Loss'; known: auto, loss, signs, sum"):
        score(model, "snip", batches_for(model), target="Loss")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROXIES)
def test_only_proxies_on_data_need_batches(name: str) -> None:
    model = tiny("bert")
    if name in ON_DATA:
        with pytest.raises(he.DataError, match="needs batches"):
            score(model, name)
    else:
        assert score(model, name) == score(model, name, batches_for(model))
    assert name in {**DATA_FREE, **BASELINES, **ON_DATA}


@pytest.mark.parametrize("batches", [["text"], [{"input_ids": [[1, 2]]}], [torch.ones(2, 3)]])
def test_batches_that_are_no_dicts_of_tensors_are_named(batches: Any) -> None:
    with pytest.raises(he.DataError, match="must be a dict of tensors"):
        score(tiny("bert"), "snip", batches)


def test_a_loss_needs_labels_and_has_to_be_finite() -> None:
    model = tiny("bert")
    ids = inputs(model)["input_ids"]
    with pytest.raises(he.DataError, match="returns no loss on this batch; add labels"):
        score(model, "snip", [{"input_ids": ids}], target="loss")
    with pytest.raises(he.DataError, match="the model's loss is not finite"):
        score(model, "snip", [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])


@pytest.mark.parametrize(
    ("family", "bad"),
    [("bert", math.nan), ("gpt2", math.inf), slow("llama", math.nan), slow("bert", math.inf), slow("llama", math.inf)],
)
def test_a_model_that_is_not_finite_has_no_score(family: str, bad: float) -> None:
    model = tiny(family)
    batches = batches_for(model)
    chosen = [module for name, module in projections(model).items() if "1" in name]
    with torch.no_grad():
        for module in chosen:
            module.weight[0, 0] = bad  # type: ignore
    for name in [*DATA_FREE, *ON_DATA]:
        if (name, family) != (NEEDS_POSITIONS, "llama"):
            with pytest.raises(he.DataError, match="not finite|is nan|is inf"):
                score(model, name, batches)
    for name in BASELINES:
        assert score(model, name) == score(tiny(family), name)


def test_what_overflows_in_half_precision_is_said_to() -> None:
    model = tiny("bert").half()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.mul_(1e5)
    for name in ("snip", "grad_norm", "fisher", "synaptic_diversity", "jacobian_cosine"):
        with pytest.raises(he.DataError, match="not finite|is nan|is inf"):
            score(model, name, batches_for(model))
    wide = copy.deepcopy(model).float()
    for name in ("grasp", "eznas"):  # computed in single precision, where nothing overflows
        assert score(model, name, batches_for(model)) == pytest.approx(score(wide, name, batches_for(wide)), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", torch.float16), slow("bert", torch.bfloat16), slow("llama", torch.float16)]
)
def test_half_precision_is_added_up_in_single_precision(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    wide = copy.deepcopy(model).float()
    batches = batches_for(model, labels=True)
    for name in ("zerolm", "synflow", "dss", "snip", "synaptic_diversity", "attention_confidence", "lpzero"):
        assert score(model, name, batches) == pytest.approx(score(wide, name, batches), rel=0.1), name


def test_synflow_of_half_precision_does_not_overflow_but_that_of_huge_weights_is_refused() -> None:
    model = tiny("gpt2").half()
    assert score(model, "synflow") == pytest.approx(score(copy.deepcopy(model).float(), "synflow"))
    with torch.no_grad():
        for module in projections(model.float()).values():
            module.weight.mul_(1e37)  # type: ignore
    for name in ("synflow", "log_synflow", "dss"):
        with pytest.raises(he.DataError, match="at absolute weights, in double precision, .* is not finite"):
            score(model, name)


def test_cosines_need_a_table_of_positions() -> None:
    model = tiny("llama")
    with pytest.raises(he.UnsupportedModelError, match="needs a table of learned positions"):
        score(model, "jacobian_cosine", batches_for(model))


@pytest.mark.parametrize("family", MODELS)
def test_attention_probabilities_are_those_of_the_eager_form(family: str) -> None:
    fast, eager = tiny(family), tiny(family, attn_implementation="eager")
    assert fast.config._attn_implementation == "sdpa"
    found = score(fast, "softmax_confidence", batches_for(fast))
    assert found == score(eager, "softmax_confidence", batches_for(fast))
    assert fast.config._attn_implementation == "sdpa"
    with pytest.raises(he.UnsupportedModelError, match="Own returns no attention probabilities"):
        score(own(), "softmax_confidence", batches_for(fast), roles=OWN_ROLES)


@pytest.mark.parametrize("changes", [{"ffn0": 16}, {"heads1": 1}, {"skip1": "attention"}, {"num_hidden_layers": 2}])
@pytest.mark.parametrize("family", MODELS)
def test_a_supernet_with_a_subnet_active_is_refused(family: str, changes: dict[str, Any]) -> None:
    supernet = supernet_of(family)
    roles = roles_of(supernet.model)
    with supernet.activate(point(supernet, **changes)):
        for given in (None, roles):
            with pytest.raises(he.UnsupportedModelError, match="a subnet is active"):
                score(supernet.model, "zerolm", roles=given)
    assert score(supernet.model, "zerolm", roles=roles) > 0


def test_a_quantised_model_is_scored_by_its_values_and_a_packed_one_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    dense, batches = copy.deepcopy(model), batches_for(model)
    he.quantize_(model, group_size=16, method="rtn")
    for module, quantised in zip(projections(dense).values(), projections(model).values(), strict=True):
        module.weight.data.copy_(quantised.weight)  # type: ignore
    names = ("zerolm", "synflow", "snip", "grasp", "attention_confidence")
    wanted = {name: score(dense, name, batches) for name in names}
    assert {name: score(model, name, batches) for name in names} == pytest.approx(wanted, rel=1e-6)
    write_weights(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = sorted(again.state_dict())
    for name in names:
        with pytest.raises(he.UnsupportedModelError, match=r"packed; call hf_elastic.unpack_\(model\) first"):
            score(again, name, batches)
    assert sorted(again.state_dict()) == before, "a score has unpacked the model"
    he.unpack_(again)
    assert {name: score(again, name, batches) for name in names} == pytest.approx(wanted, rel=1e-6)


def test_a_cache_of_parameters_is_not_written_to() -> None:
    model, stock = tiny("llama"), tiny("llama")
    offload_module(model.model.layers[1].mlp.up_proj, "cpu", "cpu")
    before, batches = state_of(model), batches_for(model)
    for name in ("synflow", "snip", "grasp"):
        assert score(model, name, batches) == score(stock, name, batches)
    assert state_of(model) == before
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_integers_are_refused() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[1].attention.self.key.weight = nn.Parameter(
        torch.ones(32, 32, dtype=torch.int8), requires_grad=False
    )
    for name in ("zerolm", "snip", "synflow"):
        with pytest.raises(he.UnsupportedModelError, match=r"layer.1.attention.self.key \(Linear\) holds no matrix"):
            score(model, name, batches_for(model))


@pytest.mark.parametrize("compute", [lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm])
def test_weights_computed_from_others_are_refused_where_they_would_be_replaced(compute: Any) -> None:
    model = tiny("bert")
    compute(model.bert.encoder.layer[1].intermediate.dense)
    for name in ("snip", "fisher", "grasp", "synflow"):
        with pytest.raises(he.UnsupportedModelError, match="intermediate.dense computes its weight from other tensors"):
            score(model, name, batches_for(model))
    assert score(model, "zerolm") == pytest.approx(zerolm(model, (), ""))


def test_a_model_without_values_has_sizes_only() -> None:
    with torch.device("meta"):
        model = type(tiny("bert"))(tiny("bert").config)
    assert score(model, "params") == score(tiny("bert"), "params")
    for name in ("zerolm", "snip", "synflow"):
        with pytest.raises(he.UnsupportedModelError, match="on the meta device"):
            score(model, name, batches_for(model))


def test_models_that_are_not_known_need_roles_or_a_row() -> None:
    with pytest.raises(he.UnsupportedModelError, match=r"Own is no transformers model; pass roles=Roles\(...\)"):
        score(own(), "snip", batches_for(own()))
    row = replace(he.Family(**vars(supernet_of("bert").family)), ffn_in=("intermediate.missing",))
    with pytest.raises(he.UnsupportedModelError, match="has no 'intermediate.missing', which the family row"):
        score(tiny("bert"), "snip", batches_for(own()), family=row)


@pytest.mark.parametrize("name", ["zerolm", "snip", "synflow", "attention_confidence"])
def test_roles_that_the_model_does_not_have_are_named(name: str) -> None:
    roles = replace(OWN_ROLES, heads=("attention",), attention=("attention", "attention_out"))
    with pytest.raises(he.UnsupportedModelError, match="Own has no module 'attention', which its roles name"):
        score(own(), name, batches_for(own()), roles=roles)


def test_an_encoder_whose_roles_name_no_queries_is_refused_by_lpzero() -> None:
    with pytest.raises(he.UnsupportedModelError, match=r"Roles\(queries=...\) names none"):
        score(own(), "lpzero", batches_for(own()), roles=replace(OWN_ROLES, queries=()))


class Twice(Own):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.ffn_out(self.ffn_in(super().forward(input_ids)).tanh())


class Detached(Own):
    def forward(self, input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(input_ids)


class Named(Own):
    def forward(self, tokens: Tensor) -> Any:  # type: ignore[override]
        return {"hidden": super().forward(tokens)}


class Wordless(Own):
    def forward(self, input_ids: Tensor) -> Any:
        return (super().forward(input_ids).sum(),)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Twice, "fisher", "ffn_in runs twice"), (Twice, "activation_distance", "ffn_out runs twice"),
        (Detached, "snip", "has no gradient by its projections"), (Wordless, "snip", "returned a Tensor where"),
        (Detached, "synflow", "has no gradient by its projections"), (Named, "synflow", "forward takes no input_ids"),
    ],
)  # fmt: skip
def test_models_of_ones_own_that_cannot_be_scored_are_told_why(kind: type[Own], name: str, message: str) -> None:
    with pytest.raises(he.UnsupportedModelError, match=message):
        score(kind(), name, batches_for(own()), roles=OWN_ROLES)


def test_a_model_of_ones_own_may_name_its_inputs_and_outputs() -> None:
    other = Named().double()
    other.load_state_dict(own().state_dict())
    found = score(other, "snip", [{"tokens": batch["input_ids"]} for batch in batches_for(own())], roles=OWN_ROLES)
    assert found == pytest.approx(score(own(), "snip", batches_for(own()), roles=OWN_ROLES))


def test_what_the_target_does_not_depend_on_adds_nothing() -> None:
    class Linear(Own):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.ffn_out(self.words(input_ids).repeat(1, 1, 2)[..., :12])  # type: ignore[no-any-return]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Linear()
    only = Subject(model, replace(OWN_ROLES, attention=(), ffn=("ffn_out",)), tuple(batches_for(model)))
    assert score(model, "snip", only.batches, roles=OWN_ROLES) == score(model, "snip", only.batches, roles=only.roles)
    assert score(model, "grasp", only.batches, roles=OWN_ROLES) == 0  # its Hessian is zero
