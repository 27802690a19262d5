"""GPTQ against its definition worked out column by column, and what quantised models must do."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import batches_of, linears
from tiny_models import tiny
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hf_elastic import (
    CheckpointError,
    CompressionError,
    ElasticConfig,
    ElasticLoraConfig,
    ExportError,
    UnsupportedModelError,
    add_lora,
    make_elastic,
    quantize_,
    save_quantized,
    sparsify_,
    unpack_,
)
from hf_elastic.compression.quantization import _Fit, gptq
from hf_elastic.families import family_of, layers_of
from hf_elastic.least_squares import NormalEquations
from hf_elastic.packed_format import quantised_layers
from hf_elastic.quantgrid import Grid, grid_of

KINDS = [(family, symmetric) for family in ("llama", "bert") for symmetric in (True, False)]


def gptq_oracle(weight: Tensor, x: Tensor, *, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Frantar et al. 2023, eq. 2 and 3: the inverse of the Hessian of the columns that are left, made anew at each."""
    damped = (x.double().t() @ x.double()).clone()
    damped += 0.01 * float(damped.diagonal().mean()) * torch.eye(len(damped), dtype=torch.float64)
    rest, kept = weight.double().clone(), weight != 0
    integers, scales = torch.zeros_like(weight, dtype=torch.int8), []
    for column in range(weight.shape[1]):
        if column % group == 0:
            span = (rest * kept)[:, column : column + group]
            low, high = span.amin(1).clamp(max=0), span.amax(1).clamp(min=0)
            scale = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
            zero = torch.zeros_like(scale) if symmetric else (-8 - low / scale).round().clamp(-8, 7)
            scales.append(scale)
        inverse = torch.linalg.inv(damped[column:, column:])
        whole = (rest[:, column] / scale + zero).round().clamp(-8, 7)
        whole = torch.where(kept[:, column], whole, zero)
        integers[:, column] = whole.to(torch.int8)
        error = (rest[:, column] - scale * (whole - zero)) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0][None]
    return integers, torch.stack(scales, dim=1)


def inputs_of(size: int, *, count: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing


def sums_of(x: Tensor) -> NormalEquations:
    sums = NormalEquations(x.shape[1])
    sums.add(x)
    return sums


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "group"), [(32, 8), (160, 32), (160, 160), (160, 80)])
def test_columns_are_rounded_as_the_paper_says(size: int, group: int, symmetric: bool, sparse: bool) -> None:
    weight, x = torch.randn(5, size, generator=torch.Generator().manual_seed(1)), inputs_of(size)
    if sparse:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5] = 0
    integers, grid = gptq(weight, sums_of(x), fit=_Fit(4, group, symmetric))
    wanted, scales = gptq_oracle(weight, x, group=group, symmetric=symmetric)
    torch.testing.assert_close(grid.scale.double(), scales, rtol=1e-4, atol=1e-5)
    # A weight halfway between two integers may go either way in float32.
    assert float((integers != wanted).float().mean()) < 0.01
    assert bool((grid.values(integers)[weight == 0] == 0).all())


def test_the_outputs_change_less_than_by_rounding_each_weight() -> None:
    weight, x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), inputs_of(64)
    integers, grid = gptq(weight, sums_of(x), fit=_Fit(4, 32, True))
    nearest = Grid.fit(weight, bits=4, group_size=32, symmetric=True).nearest(weight)
    ours, theirs = (float((x @ (weight - other).t()).square().mean()) for other in (grid.values(integers), nearest))
    assert ours < 0.7 * theirs


def test_a_silent_column_is_rounded_to_the_nearest_and_moves_nothing() -> None:
    weight, x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), inputs_of(16)
    x[:, [3, 15]] = 0
    integers, grid = gptq(weight, sums_of(x), fit=_Fit(4, 16, True))
    assert torch.equal(grid.integers(weight)[:, [3, 15]], integers[:, [3, 15]])
    changed = weight.clone()
    changed[:, [3, 15]] = 0.5 * weight[:, [3, 15]]  # not the largest of a row, so the grid stays
    again, other = gptq(changed, sums_of(x), fit=_Fit(4, 16, True))
    same = [row for row in range(4) if torch.equal(grid.scale[row], other.scale[row])]
    alone = [n for n in range(16) if n not in (3, 15)]
    assert same and torch.equal(again[same][:, alone], integers[same][:, alone]), "a silent column moved others"
    moved = gptq(weight, sums_of(torch.zeros_like(x)), fit=_Fit(4, 16, True))
    assert torch.equal(moved[0], moved[1].integers(weight)), "with no input at all GPTQ is rounding to the nearest"


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(("family", "symmetric"), KINDS)
def test_weights_lie_on_their_grids_and_zeros_stay(family: str, symmetric: bool, method: Any) -> None:
    model = tiny(family)
    batches = batches_of(model)
    sparsify_(model, batches)
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items()}
    outside = {n: p.clone() for n, p in model.named_parameters() if ".layer" not in n}
    report = quantize_(model, batches, group_size=16, symmetric=symmetric, method=method)
    layers = quantised_layers(model)
    assert set(layers) == set(report.group_sizes) and len(layers) == (21 if family == "llama" else 18)
    for name, module in layers.items():
        grid = grid_of(module, name=name)
        assert grid is not None and torch.equal(grid.nearest(module.weight), module.weight)
        assert bool((module.weight[zeros[f"{name}.weight"]] == 0).all()) and not module.weight.requires_grad
        assert grid.bits == 4 and grid.scale.shape[1] == module.in_features // 16
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in outside.items())
    assert (set(report.errors) == set(layers)) if method == "gptq" else not report.errors
    assert all(0 <= error < 0.2 for error in report.errors.values())


def test_reported_errors_are_those_of_the_outputs() -> None:
    model, before = tiny("llama"), tiny("llama")
    batches = [{"input_ids": batch["input_ids"]} for batch in batches_of(model)]
    report = quantize_(model, batches, group_size=16, skip=[r"layers\.[12]\..*"])
    seen: list[Tensor] = []
    layer = before.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            before(**batch)
    x = torch.cat([tensor.flatten(0, 1) for tensor in seen])
    quantised = model.model.layers[0].mlp.up_proj.weight.data
    # Before the first block nothing is changed, so that the float model shows the very inputs of it (not of the FFN's,
    # which the block's own attention comes before: that is not changed yet either when the block is measured).
    moved, whole = x @ (layer.weight.data - quantised).t(), x @ layer.weight.data.t()
    expected = float(moved.square().sum() / whole.square().sum())
    assert report.errors["model.layers.0.mlp.up_proj"] == pytest.approx(expected, rel=1e-3)
    assert "4 bits" in str(report) and "%" in str(report)


def test_layers_of_a_block_are_quantised_on_what_the_blocks_before_give() -> None:
    model, alone = tiny("llama"), tiny("llama")
    batches = batches_of(model)
    quantize_(model, batches, group_size=16, bits=2)
    quantize_(alone, batches, group_size=16, bits=2, skip=[r"layers\.[01]\..*"])
    first, last = (m.model.layers[2].mlp.up_proj.weight for m in (model, alone))
    assert not torch.equal(first, last)


def test_groups_may_differ_between_layers_and_layers_may_be_left() -> None:
    model = tiny("llama")
    sizes = {"down_proj": 12, r"self_attn\..*": 8, ".*": 32}
    report = quantize_(model, group_size=sizes, method="rtn", skip=["o_proj"])
    assert report.group_sizes["model.layers.1.mlp.down_proj"] == 12
    assert report.group_sizes["model.layers.1.self_attn.q_proj"] == 8
    assert report.group_sizes["model.layers.1.mlp.up_proj"] == 32
    assert not any(name.endswith("o_proj") for name in quantised_layers(model))
    whole = tiny("llama")
    assert quantize_(whole, group_size=None, method="rtn").group_sizes["model.layers.0.mlp.down_proj"] == 48


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_more_bits_change_less(bits: int) -> None:
    model, finer = tiny("bert"), tiny("bert")
    batches = batches_of(model)
    coarse = quantize_(model, batches, bits=bits, group_size=16)
    if bits < 8:
        fine = quantize_(finer, batches, bits=bits + 1, group_size=16)
        assert sum(fine.errors.values()) < sum(coarse.errors.values())
    assert all(int(grid_of(m, name=n).integers(m.weight).max()) < 2 ** (bits - 1)  # type: ignore[union-attr]
               for n, m in quantised_layers(model).items())  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------

STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
folder, kind = sys.argv[1:]
auto = AutoModelForCausalLM if kind == "llama" else AutoModelForMaskedLM
model = auto.from_pretrained(folder).eval()
ids = torch.arange(24).reshape(2, 12) + 3
with torch.no_grad():
    out = model(input_ids=ids).logits
assert not any(name.split(".")[0] == "hf_elastic" for name in sys.modules), "hf_elastic was imported"
print(json.dumps(out.double().flatten().tolist()))
"""


def ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) + 3


@pytest.mark.parametrize(
    ("family", "symmetric"), [("llama", True), pytest.param("bert", False, marks=pytest.mark.slow)]
)
def test_stock_transformers_loads_exactly_what_was_quantised(family: str, symmetric: bool, tmp_path: Path) -> None:
    model = tiny(family)
    sizes: Any = {"down_proj": 12, ".*": 16} if family == "llama" else 16
    quantize_(model, batches_of(model), group_size=sizes, symmetric=symmetric)
    before = copy.deepcopy(model.state_dict())
    save_quantized(model, tmp_path / "packed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "packed"), family], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        ours = model(input_ids=ids()).logits.double().flatten()
    theirs = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())


def loaded(family: str, folder: Path) -> PreTrainedModel:
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForMaskedLM
    model: PreTrainedModel = auto.from_pretrained(folder).eval()
    return model


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(("family", "symmetric"), [("llama", True), ("llama", False), ("bert", True)])
def test_a_checkpoint_is_a_base_again_whether_it_ran_or_not(
    family: str, symmetric: bool, ran: bool, tmp_path: Path
) -> None:
    model = tiny(family)
    quantize_(model, group_size=16, symmetric=symmetric, method="rtn")
    save_quantized(model, tmp_path / "packed")
    again = loaded(family, tmp_path / "packed")
    if ran:
        with torch.no_grad():
            again(input_ids=ids())
    assert unpack_(again) is again
    for (name, ours), theirs in zip(quantised_layers(model).items(), quantised_layers(again).values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight) and "forward" not in vars(theirs)
        first, second = grid_of(ours, name=name), grid_of(theirs, name=name)
        assert first is not None and second is not None and torch.equal(first.zero, second.zero)
    save_quantized(again, tmp_path / "again")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("packed", "again")]
    assert sizes[0] == sizes[1], "written again it became dense"
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, loaded(family, tmp_path / "again")(input_ids=ids()).logits)


def test_an_unpacked_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    save_quantized(model, tmp_path / "out")
    loaded = unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for module in loaded.modules():
        assert type(module._parameters) is dict and type(module._buffers) is dict and "forward" not in vars(module)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    other = {name: torch.zeros_like(parameter) for name, parameter in loaded.named_parameters()}
    torch.func.functional_call(loaded, other, args=(), kwargs={"input_ids": ids()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_a_packed_file_is_smaller_and_states_its_layers(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=64, intermediate_size=256)
    model.save_pretrained(tmp_path / "float")
    quantize_(model, group_size=32, method="rtn", skip=[r"layers\.1\.mlp\.down_proj"])
    save_quantized(model, tmp_path / "packed")
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "packed")}
    assert sizes["packed"] < 0.35 * sizes["float"]
    stated = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stated["format"] == "pack-quantized" and stated["quant_method"] == "compressed-tensors"
    targets = stated["config_groups"]["group_0"]["targets"]
    assert any(r"layers\.\d+\.mlp\.up_proj" in target for target in targets)
    assert sum(r"mlp\.down_proj" in target for target in targets) == 2, "one of three is not quantised"


def test_a_head_that_is_put_on_later_is_not_taken_for_quantised(tmp_path: Path) -> None:
    model = tiny("bert")
    quantize_(model, group_size=16, method="rtn")
    save_quantized(model, tmp_path / "packed")
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=2).eval()
    assert not any("classifier" in name or "pooler" in name for name in quantised_layers(other))
    with torch.no_grad():
        assert bool(torch.isfinite(other(input_ids=ids()).logits).all())


def test_a_weight_that_left_its_grid_is_not_written(tmp_path: Path) -> None:
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj is not on its grid"):
        save_quantized(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(ExportError, match="no layer of the LlamaForCausalLM carries a grid"):
        save_quantized(tiny("llama"), tmp_path / "packed")


# -- nonsense ---------------------------------------------------------------------------------------------------------

NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"bits": 1}, "from 2 to 8"),
    ({"bits": 4.0}, "from 2 to 8"),
    ({"bits": True}, "from 2 to 8"),
    ({"method": "awq"}, "'gptq', 'rtn'"),
    ({"group_size": 128}, "does not divide the 32 inputs of model.layers.0.self_attn.q_proj"),
    ({"group_size": 0}, "does not divide"),
    ({"group_size": {"down_proj": 48}}, "names no size for"),
    ({"group_size": {"donw_proj": 48, ".*": 16}}, "end in down_proj"),
    ({"skip": ["head"]}, "end in down_proj"),
    ({"skip": [".*"]}, "nothing to quantise"),
    ({"batches": None}, "needs calibration batches"),
]


@pytest.mark.parametrize(("settings", "message"), NONSENSE)
def test_nonsense_is_refused_and_nothing_changes(settings: dict[str, Any], message: str) -> None:
    model, before = tiny("llama"), tiny("llama").state_dict()
    given = {"batches": batches_of(model), "group_size": 16, **settings}
    with pytest.raises(CompressionError, match=message):
        quantize_(model, given.pop("batches"), **given)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_that_cannot_be_quantised_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Conv1D, GPT-2's transposed linear"):
        quantize_(tiny("gpt2"), group_size=16, method="rtn")
    elastic = tiny("llama")
    make_elastic(elastic, ElasticConfig(intermediate_size=[0.5]))
    with pytest.raises(UnsupportedModelError, match="is elastic"):
        quantize_(elastic, group_size=16, method="rtn")
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    with pytest.raises(UnsupportedModelError, match="is quantised already"):
        quantize_(model, group_size=16, method="rtn")
    with pytest.raises(UnsupportedModelError, match="is quantised already"):
        sparsify_(model, method="magnitude")
    with pytest.raises(UnsupportedModelError, match="is quantised: a cut through a group"):
        make_elastic(model, ElasticConfig(intermediate_size=[0.5]))
    broken = tiny("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[1, 1] = math.inf
    with pytest.raises(CompressionError, match="NaN or infinite"):
        quantize_(broken, group_size=16, method="rtn")


def test_constant_weights_are_quantised_without_nan() -> None:
    model = tiny("llama")
    for layer in layers_of(model, family_of(model)):
        for number, module in enumerate(linears(layer).values()):
            nn.init.constant_(module.weight, 0.0 if number % 2 else 0.3)
    quantize_(model, batches_of(model), group_size=16)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_quantised_base_takes_adapters_kept_apart() -> None:
    """SQFT: an integer base, elastic adapters beside it."""
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    with torch.no_grad():
        wanted = model(input_ids=ids()).logits
    supernet = add_lora(model, ElasticLoraConfig(r=4, ranks=[2], target_modules="all-linear"), seed=0)
    with torch.no_grad(), supernet.model.disable_adapter():
        assert torch.equal(supernet.model(input_ids=ids()).logits, wanted)


def test_gptq_is_better_than_rounding_on_a_real_model(data_dir: Path) -> None:
    folder = data_dir / "stories260K" / "hf"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no checkpoint in {folder}")
    parent = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        ids = parent.generate(torch.full((16, 1), 1), do_sample=True, max_new_tokens=63, pad_token_id=0)
        wanted = parent(ids).logits
    found = {}
    for method in ("gptq", "rtn"):
        model = copy.deepcopy(parent)
        quantize_(model, [{"input_ids": ids}], group_size=4, method=method)  # type: ignore[arg-type]
        with torch.no_grad():
            found[method] = float((model(ids).logits - wanted).square().mean())
    assert found["gptq"] < 0.8 * found["rtn"]


@pytest.mark.parametrize("change", [{"group_size": 7}, {"num_bits": 3}, {"num_bits": 64}, {"group_size": -3}])
def test_integers_that_are_not_what_the_config_says_are_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    save_quantized(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for module in quantised_layers(loaded).values():
        scheme = vars(module)["quantization_scheme"]
        scheme.weights = scheme.weights.model_copy(update=change)
    with pytest.raises(CheckpointError) as caught:
        unpack_(loaded)
    assert len(str(caught.value).splitlines()) == 1
