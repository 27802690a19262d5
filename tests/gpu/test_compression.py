"""Sorting, closed-form repair, recovery, sparsity and integers on a device, beside what they give on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import batches_of
from cut_models import cut, rows, run
from lora_models import randomise
from on_device import (
    all_close,
    close,
    numbers_close,
    output,
    placed,
    share_equal,
    sparse_adapted,
    stays,
    token_batches,
)
from tiny_models import point, supernet_of, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import hf_elastic as he
from hf_elastic import ElasticLoraConfig, cache_teacher, export, extract, quantize_, refit, sparsify_
from hf_elastic.checkpoint.merging import base_weights
from hf_elastic.families import family_of, layers_of
from hf_elastic.packed_format import quantised_layers
from hf_elastic.quantgrid import Grid, grid_of
from hf_elastic.repair.recovery import RecoverReport
from hf_elastic.repair.refitting import RefitReport

ALIKE = 0.995  # of masks and integers: ties and weights halfway may go either way
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
NARROW = {"ffn0": 16, "ffn1": 24, "heads0": 1, "skip2": "mlp"}
UNIFORM = {"ffn0": 24, "ffn1": 24, "ffn2": 24}


def on_both(make: Callable[[], Any], device: str) -> tuple[Any, Any]:
    """What is made twice: on the CPU, and moved to the device."""
    return make(), placed(make(), device)


# -- sorting and closed-form repair -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["activation", "weight", "taylor", "reconstruction"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_units_are_sorted_as_on_the_cpu_and_the_function_stays(family: str, method: Any, device: str) -> None:
    there, here = on_both(lambda: supernet_of(family), device)
    batches = token_batches(there.model, labels=True)
    before = output(here.model, batches[0])
    given = None if method == "weight" else batches
    wanted, got = (he.sort_by_importance_(one, given, method=method) for one in (there, here))
    stays(here.model, device)
    close(output(here.model, batches[0]), before, what="outputs after sorting")
    if method == "reconstruction":  # scores are ranks
        units = [name for name in wanted if name != "layers"]
        assert share_equal([got[n] for n in units], [wanted[n] for n in units]) > 0.95
        close(got["layers"], wanted["layers"], what="influence of layers")
    else:
        all_close(got, wanted, what="scores")
    assert here.layer_order == there.layer_order
    with here.activate(here.space.smallest()), there.activate(there.space.smallest()):
        close(output(here.model, batches[0]), output(there.model, batches[0]), what="outputs of the smallest")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_refit_solves_what_it_solves_on_the_cpu(family: str, device: str) -> None:
    there, here = on_both(lambda: supernet_of(family), device)
    batches = token_batches(there.model, rows=10)
    for one in (there, here):
        he.sort_by_importance_(one, batches)
    models, reports = [], list[RefitReport]()
    for one in (there, here):
        models.append(refit(one, point(one, **NARROW), batches, on_report=reports.append))
    stays(models[1], device)
    stays(here.model, device)
    assert reports[0].repaired and reports[1].repaired
    errors = [[*(fit.error_after for fit in report.sublayers), report.error, report.error_cut] for report in reports]
    numbers_close(errors[1], errors[0], tolerance=1e-2, what="errors of the repair")
    close(output(models[1], batches[0]), output(models[0], batches[0]), tolerance=2e-3, what="repaired outputs")
    with here.activate(here.space.largest()), there.activate(there.space.largest()):
        close(output(here.model, batches[0]), output(there.model, batches[0]), what="the supernet, which is unchanged")


def test_hidden_states_beyond_the_memory_come_back_to_the_device(device: str) -> None:
    made = placed(supernet_of("bert"), device)
    batches = token_batches(made.model, rows=10)
    wanted, got = (refit(made, point(made, **NARROW), batches, memory=memory) for memory in (2**29, 0))
    close(output(got, batches[0]), output(wanted, batches[0]), tolerance=1e-6, what="outputs")


# -- recovery ---------------------------------------------------------------------------------------------------------


def arguments_on(device: str) -> dict[str, Any]:
    return {"use_cpu": torch.device(device).type == "cpu", "optim": "sgd"}


RECOVERIES: dict[str, dict[str, Any]] = {
    "logits from a cache": {"top_k": 20},
    "logits beside the teacher": {"cache": False},
    "states": {"target": "last_hidden_state"},
    "adapters": {"lora": 4},
}


@pytest.mark.parametrize("kind", RECOVERIES)
def test_recovery_learns_what_it_learns_on_the_cpu(kind: str, device: str, tmp_path: Path) -> None:
    found: list[tuple[Tensor, RecoverReport]] = []
    for where in ("cpu", device):
        teacher, model = (placed(one, where) for one in cut("bert", "lm", uniform=True))
        reports: list[RecoverReport] = []
        given = {"steps": 4, "learning_rate": 0.05, "arguments": arguments_on(where), "on_report": reports.append}
        folder = tmp_path / f"{where}-{len(found)}"
        run(model, teacher, rows(), folder, **{**given, **RECOVERIES[kind]})
        stays(model, where)
        stays(teacher, where)
        found.append((output(model, token_batches(model)[0]), reports[0]))
    (wanted, there), (got, here) = found
    close(got, wanted, tolerance=1e-3, what="recovered outputs")
    numbers_close([x for _, x in here.losses], [x for _, x in there.losses], tolerance=2e-3, what="losses")


def test_a_model_on_the_cpu_is_recovered_on_the_device_and_comes_back(device: str, tmp_path: Path) -> None:
    teacher, model = cut("bert", "lm", uniform=True)
    run(model, teacher, rows(), tmp_path / "run", steps=2, arguments=arguments_on(device))
    stays(model, "cpu")
    stays(teacher, "cpu")


def test_minutes_become_steps_by_what_they_take_on_the_device(device: str, tmp_path: Path) -> None:
    teacher, model = (placed(one, device) for one in cut("bert", "lm", uniform=True))
    reports: list[RecoverReport] = []
    given = {"steps": None, "minutes": 0.002, "arguments": arguments_on(device), "on_report": reports.append}
    run(model, teacher, rows(), tmp_path / "run", **given)
    assert reports[0].steps >= 1 and reports[0].step_seconds is not None and reports[0].step_seconds > 0


@pytest.mark.parametrize("target", ["logits", "embeddings", "hidden_states"])
def test_a_cache_holds_what_the_teacher_says_on_the_cpu(target: Any, device: str, tmp_path: Path) -> None:
    there, here = on_both(lambda: tiny("bert"), device)
    wanted = cache_teacher(there, rows(), tmp_path / "there", target=target)
    got = cache_teacher(here, rows(), tmp_path / "here", target=target)
    stays(here, device)
    assert len(got) == len(wanted)
    for index in range(len(wanted)):
        one, other = got[index], wanted[index]
        if target == "logits":  # which classes come in which order where two are as good as equal is open
            assert share_equal([one["indices"]], [other["indices"]]) > 0.98
            one, other = ({n: t for n, t in kept.items() if n != "indices"} for kept in (one, other))
        all_close(one, other, tolerance=2e-3, what=f"example {index}")


def test_a_recovery_from_a_cache_needs_no_teacher_on_the_device(device: str, tmp_path: Path) -> None:
    teacher, model = (placed(one, device) for one in cut("bert", "lm", uniform=True))
    cache = cache_teacher(teacher, rows(), tmp_path / "cache")
    placed(teacher, "cpu")
    run(model, cache, rows(), tmp_path / "run", steps=2, arguments=arguments_on(device))
    stays(model, device)


# -- sparsity and integers --------------------------------------------------------------------------------------------


def block_weights(model: PreTrainedModel) -> list[Tensor]:
    layers = layers_of(model, family_of(model))
    return [parameter.detach() for parameter in layers.parameters() if parameter.dim() == 2]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_wanda_masks_what_it_masks_on_the_cpu(family: str, pattern: Any, device: str) -> None:
    there, here = on_both(lambda: tiny(family), device)
    batches = batches_of(there)
    wanted, got = (sparsify_(model, batches, pattern=pattern) for model in (there, here))
    stays(here, device)
    assert got.share == pytest.approx(wanted.share) and got.share > 0.4
    masks = ([weight == 0 for weight in block_weights(model)] for model in (here, there))
    assert share_equal(*masks) >= ALIKE
    close(output(here, batches[0]), output(there, batches[0]), tolerance=2e-2, what="outputs")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_integers_are_those_of_the_cpu(family: str, method: Any, symmetric: bool, device: str) -> None:
    there, here = on_both(lambda: tiny(family), device)
    batches = batches_of(there)
    for model in (there, here):
        sparsify_(model, batches)
        quantize_(model, batches, group_size=16, method=method, symmetric=symmetric)
    stays(here, device)
    pairs = list(zip(on_grids(here), on_grids(there), strict=True))
    integers = ([grid.integers(module.weight) for grid, module in found] for found in zip(*pairs, strict=True))
    alike = share_equal(*integers)
    # GPTQ lets the columns behind a weight that was rounded the other way make up for it.
    assert alike >= (0.99 if method == "gptq" else ALIKE), f"{alike:.2%} of the integers are equal"
    for grid, module in (one for one, _ in pairs):
        assert torch.equal(grid.nearest(module.weight), module.weight), "a weight is not on its grid"
    apart = torch.cat([((g.scale.cpu() - other.scale) / other.scale).abs().flatten() for (g, _), (other, _) in pairs])
    share = float((apart > 1e-3).float().mean())
    assert share < (0.05 if method == "gptq" else 0.005), f"{share:.1%} of the scales differ"
    close(output(here, batches[0]), output(there, batches[0]), tolerance=5e-2, what="outputs")


def on_grids(model: PreTrainedModel) -> list[tuple[Grid, nn.Linear]]:
    """Quantised layers with their grids."""
    found = [(grid_of(module, name=name), module) for name, module in quantised_layers(model).items()]
    assert found
    return [(grid, module) for grid, module in found if grid is not None]


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [UNIFORM, NARROW], ids=["stock", "compact"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_an_export_from_the_device_loads_on_the_cpu_with_equal_logits(
    family: str, shape: dict[str, Any], device: str, tmp_path: Path
) -> None:
    made = placed(supernet_of(family), device)
    architecture, batch = point(made, **shape), token_batches(made.model)[0]
    report = export(made, architecture, tmp_path / "out")
    stays(made.model, device)
    loaded = AUTO[family].from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with made.activate(architecture):
        wanted = output(made.model, batch)
    close(output(loaded, batch), wanted, what=f"logits of a {report.loadability} export")
    extracted = extract(made, architecture, loadability=report.loadability)
    stays(extracted, device)
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor.cpu(), theirs[name]) for name, tensor in extracted.state_dict().items())


def test_a_refitted_model_is_written_from_the_device(device: str, tmp_path: Path) -> None:
    made = placed(supernet_of("llama"), device)
    batches, architecture = token_batches(made.model, rows=10), point(made, **UNIFORM)
    repaired = refit(made, architecture, batches)
    export(made, architecture, tmp_path / "out", model=repaired)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(output(loaded, batches[0]), output(repaired, batches[0]), what="logits")


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_written_from_the_device_are_read_on_the_cpu(symmetric: bool, device: str, tmp_path: Path) -> None:
    model = placed(tiny("llama"), device)
    quantize_(model, batches_of(model), group_size=16, symmetric=symmetric)
    he.save_quantized(model, tmp_path / "out")
    loaded = he.unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    ours = {name: module.weight for name, module in quantised_layers(model).items()}
    assert all(torch.equal(loaded.get_submodule(name).weight, weight.cpu()) for name, weight in ours.items())
    batch = token_batches(model)[0]
    close(output(loaded, batch), output(model, batch), what="logits")


def test_integers_that_were_read_are_unpacked_on_the_device(device: str, tmp_path: Path) -> None:
    model = tiny("llama")
    quantize_(model, group_size=16, method="rtn")
    he.save_quantized(model, tmp_path / "out")
    loaded = he.unpack_(placed(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), device))
    stays(loaded, device)
    close(output(loaded, token_batches(model)[0]), output(model, token_batches(model)[0]), what="logits")


# -- adapters that are part of the weight -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["floats", "integers"])
def test_a_merge_on_the_device_keeps_zeros_and_the_grid(kind: str, device: str, tmp_path: Path) -> None:
    there, here = on_both(lambda: sparse_adapted(kind), device)
    zeros = {name: t == 0 for name, t in here.base.state_dict().items() if name.endswith("base_layer.weight")}
    architecture = here.space.midpoint()
    with here.activate(architecture):
        wanted, weights = output(here.model, token_batches(here.base)[0]), base_weights(here, merge=True)
    with there.activate(architecture):
        close(wanted, output(there.model, token_batches(here.base)[0]), tolerance=1e-3, what="outputs of the training")
        others = base_weights(there, merge=True)
    merged = extract(here, architecture, merge=True)
    stays(merged, device)
    close(output(merged, token_batches(merged)[0]), wanted, what="outputs of the merged model")
    assert zeros and all(bool((weights[name][places] == 0).all()) for name, places in zeros.items())
    if kind == "integers":
        for name, module in quantised_layers(merged).items():
            grid = grid_of(module, name=name)
            assert grid is not None and torch.equal(grid.nearest(module.weight), module.weight), name
        assert share_equal([weights[n] for n in zeros], [others[n] for n in zeros]) >= ALIKE
    else:
        all_close({n: weights[n] for n in zeros}, {n: others[n] for n in zeros}, what="merged weights")
    export(here, architecture, tmp_path / "out", merge=True)
    loaded = he.unpack_(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(output(loaded, token_batches(merged)[0]), wanted, what="outputs of the export")


def test_a_float_base_moves_with_the_model(device: str) -> None:
    float_base = tiny("llama")
    sparsify_(float_base, method="magnitude")
    model = tiny("llama")
    sparsify_(model, method="magnitude")
    quantize_(model, group_size=16, method="rtn")
    settings: dict[str, Any] = {"r": 4, "ranks": [2], "target_modules": "all-linear", "sparse": True}
    made = he.add_lora(model, ElasticLoraConfig(**settings, quantization_aware=True), float_base=float_base)
    batch = token_batches(model)[0]
    wanted = output(made.model, batch)
    close(output(placed(made.model, device), batch), wanted, tolerance=1e-3, what="outputs after the move")


def test_adapters_saved_on_the_device_load_on_the_cpu_and_back(device: str, tmp_path: Path) -> None:
    made = he.add_lora(tiny("llama"), ElasticLoraConfig(r=8, ranks=[2, 4], target_modules="all-linear"))
    randomise(made.model)
    placed(made, device)
    batch, small = token_batches(made.base)[0], made.space.smallest()
    made.model.save_pretrained(tmp_path / "adapter")
    extracted = he.extract_adapter(made, small)
    with made.activate(small):
        wanted = output(made.model, batch)
    for where in ("cpu", device):
        again = he.load_adapter(placed(tiny("llama"), where), tmp_path / "adapter")
        stays(again.model, where)
        with again.activate(small):
            close(output(again.model, batch), wanted, what=f"outputs of the adapters on {where}")
        plain = extracted.onto(placed(tiny("llama"), where))
        stays(plain, where)
        close(output(plain, batch), wanted, what=f"outputs of the extracted adapter on {where}")
