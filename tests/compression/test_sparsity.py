"""Wanda and magnitude against a few lines written from the paper, block after block on the whole model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import batches_of, linears, rows_of
from tiny_models import inputs, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_elastic import (
    CompressionError,
    DataError,
    ElasticConfig,
    ElasticLoraConfig,
    Supernet,
    UnsupportedModelError,
    add_lora,
    make_elastic,
    sparsify_,
    sparsity_of,
)
from hf_elastic.families import family_of, layers_of
from hf_elastic.layers import seeded

FAMILIES = ["llama", "bert", "gpt2", "distilbert"]


def wanda_oracle(model: PreTrainedModel, batches: list[dict[str, Tensor]], *, sparsity: float) -> None:
    """Sun et al. 2024, eq. 1, on whole forward passes: after each block the model is run again from its beginning."""
    for layer in layers_of(model, family_of(model)):
        seen: dict[str, list[Tensor]] = {name: [] for name in linears(layer)}
        hooks = [
            module.register_forward_pre_hook(lambda _m, args, into=seen[name]: into.append(args[0]))
            for name, module in linears(layer).items()
        ]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for hook in hooks:
            hook.remove()
        for name, module in linears(layer).items():
            kept = [x[batch["attention_mask"].bool()] for x, batch in zip(seen[name], batches, strict=True)]
            norm = torch.cat(kept).double().norm(dim=0)
            weight = rows_of(module)
            for row in weight:
                order = sorted(range(len(row)), key=lambda j: float(row[j].abs() * norm[j].float()))
                row[order[: int(sparsity * len(row))]] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_paper(family: str) -> None:
    model, by_hand = tiny(family), tiny(family)
    batches = batches_of(model)
    report = sparsify_(model, batches, sparsity=0.4)
    wanda_oracle(by_hand, batches, sparsity=0.4)
    theirs = by_hand.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), f"{name} has another mask"
    assert report == sparsity_of(model) and 0.35 < report.share <= 0.4
    assert all(share == int(0.4 * 48) / 48 or share == int(0.4 * 32) / 32 for share in report.layers.values())


def test_a_block_sees_what_the_pruned_blocks_before_it_give() -> None:
    model, at_once = tiny("llama"), tiny("llama")
    batches = batches_of(model)
    sparsify_(model, batches, sparsity=0.6)
    for number in range(3):  # each block alone, on what the unpruned model gives
        other = tiny("llama")
        others = {rf"layers\.{k}\..*": 0.0 for k in range(3) if k != number}
        sparsify_(other, batches, sparsity=0.6, overrides=others)
        at_once.model.layers[number].load_state_dict(other.model.layers[number].state_dict())
    masks = [[(p == 0) for p in m.model.layers[n].parameters()] for n in (0, 2) for m in (model, at_once)]
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(masks[2], masks[3], strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_of_four_neighbouring_inputs_go(family: str) -> None:
    model = tiny(family)
    before = copy.deepcopy(model)
    sparsify_(model, method="magnitude", pattern="2:4")
    for layer, old in zip(layers_of(model, family_of(model)), layers_of(before, family_of(before)), strict=True):
        for name, module in linears(layer).items():
            four, was = rows_of(module).unflatten(1, (-1, 4)), rows_of(linears(old)[name]).unflatten(1, (-1, 4))
            assert bool(((four == 0).sum(-1) == 2).all())
            assert bool((four.abs().sum(-1) == was.abs().topk(2, dim=-1).values.sum(-1)).all())


def test_magnitude_needs_no_data_and_takes_the_least_of_each_row() -> None:
    model, before = tiny("bert"), tiny("bert")
    sparsify_(model, method="magnitude", sparsity=0.25)
    new, old = (m.bert.encoder.layer[1].output.dense.weight.data for m in (model, before))
    for row, was in zip(new, old, strict=True):
        assert float(was[row == 0].abs().max()) <= float(was[row != 0].abs().min())
        assert int((row == 0).sum()) == 12


def test_layers_can_have_shares_of_their_own_and_the_first_pattern_counts() -> None:
    model = tiny("llama")
    overrides = {r"layers\.0\..*": 0.0, "down_proj": 0.75}
    report = sparsify_(model, batches_of(model), sparsity=0.5, overrides=overrides)
    assert report.layers["model.layers.0.mlp.down_proj"] == 0.0
    assert report.layers["model.layers.2.mlp.down_proj"] == 0.75
    assert report.layers["model.layers.2.mlp.up_proj"] == 0.5
    assert str(report).startswith(f"{report.share:.1%}")


def test_hidden_states_may_wait_on_disk_and_progress_is_told() -> None:
    model, other = tiny("gpt2"), tiny("gpt2")
    told: list[tuple[int, int]] = []
    sparsify_(model, batches_of(model), memory=0, progress=lambda done, whole: told.append((done, whole)))
    sparsify_(other, batches_of(other))
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_elastic_model_is_pruned_whole_and_stays_elastic() -> None:
    model, plain = tiny("llama"), tiny("llama")
    supernet = make_elastic(model, ElasticConfig(intermediate_size=[0.5], skip=["attention", "mlp"]))
    supernet.set_active(supernet.space.smallest())
    sparsify_(model, batches_of(model))
    assert supernet.active == supernet.space.smallest()
    sparsify_(plain, batches_of(plain))
    theirs = plain.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.0}, "from 0 to below 1"),
    ({"sparsity": -0.1}, "from 0 to below 1"),
    ({"sparsity": math.nan}, "from 0 to below 1"),
    ({"sparsity": True}, "from 0 to below 1"),
    ({"sparsity": "half"}, "from 0 to below 1"),
    ({"sparsity": 0.4, "pattern": "2:4"}, "removes half"),
    ({"pattern": "4:8"}, "pattern='4:8'"),
    ({"method": "sparsegpt"}, "method='sparsegpt'"),
    ({"overrides": {"dwon_proj": 0.1}}, "'dwon_proj', but the layers to be compressed end in down_proj"),
    ({"overrides": {"(": 0.1}}, "no regular expression"),
    ({"batches": None}, "needs calibration batches"),
]


@pytest.mark.parametrize(("settings", "message"), NONSENSE)
def test_nonsense_is_refused_and_nothing_changes(settings: dict[str, Any], message: str) -> None:
    model, before = tiny("llama"), tiny("llama").state_dict()
    given = {"batches": batches_of(model), **settings}
    with pytest.raises(CompressionError, match=message.replace("(", r"\(")):
        sparsify_(model, given.pop("batches"), **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_finite_or_do_not_divide_are_refused() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[2].output.dense.weight.data[0, 0] = math.nan
    before = copy.deepcopy(model.bert.encoder.layer[0].state_dict())
    with pytest.raises(CompressionError, match=r"layer\.2\.output\.dense is NaN"):
        sparsify_(model, batches_of(model))
    assert all(torch.equal(t, before[n]) for n, t in model.bert.encoder.layer[0].state_dict().items())
    odd = tiny("llama", intermediate_size=46)
    with pytest.raises(CompressionError, match="down_proj has 46 inputs, not a multiple of 4"):
        sparsify_(odd, batches_of(odd), pattern="2:4")
    sparsify_(odd, batches_of(odd), pattern="2:4", overrides={"down_proj": 0})


def test_models_that_cannot_be_pruned_are_refused() -> None:
    adapted = add_lora(tiny("llama"), ElasticLoraConfig(r=4, ranks=[2], target_modules=["q_proj"]), seed=0)
    with pytest.raises(UnsupportedModelError, match="without adapters, got a PeftModel"):
        sparsify_(adapted.model, batches_of(adapted.base))
    with pytest.raises(UnsupportedModelError, match="q_proj has an adapter"):
        sparsify_(adapted.base, batches_of(adapted.base))
    with pytest.raises(UnsupportedModelError, match="transformers model"):
        sparsify_(nn.Linear(3, 3), [])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one"):
        sparsify_(tiny("llama"), [])
    with pytest.raises(DataError, match="the model knows"):
        sparsify_(tiny("llama"), [{"input_ids": torch.full((1, 4), 400)}])


def test_adapters_go_onto_a_pruned_base() -> None:
    """Shears: a sparse base, elastic adapters kept apart."""
    model = tiny("llama")
    sparsify_(model, batches_of(model))
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items()}
    supernet = add_lora(model, ElasticLoraConfig(r=4, ranks=[2], target_modules="all-linear"), seed=0)
    assert isinstance(supernet, Supernet) and supernet.space.size > 1
    with supernet.plain() as base:
        for name, tensor in base.state_dict().items():
            assert torch.equal(tensor == 0, zeros[name])
        base(**inputs(base))


def test_wanda_hurts_a_real_model_less_than_magnitude(data_dir: Path) -> None:
    folder = data_dir / "stories260K" / "hf"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no checkpoint in {folder}")
    parent = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad(), seeded(0):  # text of the model's own
        starts = torch.full((8, 1), int(parent.config.bos_token_id or 1))
        ids = parent.generate(starts, do_sample=True, max_new_tokens=63, pad_token_id=0)
    batches = [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}]
    losses = {}
    for method in ("wanda", "magnitude"):
        model = copy.deepcopy(parent)
        sparsify_(model, batches, method=method)  # type: ignore[arg-type]
        with torch.no_grad():
            losses[method] = sum(float(model(**b, labels=b["input_ids"]).loss) for b in batches)
    assert losses["wanda"] < losses["magnitude"]
