"""The FlexiBERT encoder of the benchmarks against oracles and the published numbers, and its benchmark script."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from tiny_benchmarks import OPERATORS, Row, flexibert_layer, flexibert_row, flexibert_rows, write_lines
from torch import Tensor, nn
from torch.nn import functional
from transformers import ConvBertConfig, ElectraConfig, ElectraModel
from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention

from hf_elastic.proxies import PROXIES, read_flexibert, score
from hf_elastic.proxies.readers import Setting

pytestmark = pytest.mark.usefixtures("scripts")
EACH_OPERATOR = pytest.mark.parametrize("operator", OPERATORS, ids=["-".join(map(str, one)) for one in OPERATORS])


@pytest.fixture
def flexi() -> ModuleType:
    return import_module("flexibert_model")


@pytest.fixture
def benchmark() -> ModuleType:
    return import_module("flexibert")


def close(found: Tensor, wanted: Tensor | np.ndarray, *, rtol: float = 1e-5) -> None:
    wanted = torch.as_tensor(wanted).detach().to(found)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def operator(flexi: ModuleType, kind: tuple[str, str | int], *, hidden: int = 24, heads: int = 4) -> nn.Module:
    """A random operator, biases included."""
    found = flexi.operator_of(flexibert_layer(kind, heads=heads), hidden)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return found


def states(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# -- Counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["published", "specified", "trained"])
@pytest.mark.parametrize("hidden", [128, 256])
def test_parameters_and_matrices_are_those_that_the_reader_counts(
    flexi: ModuleType, setting: Setting, hidden: int, tmp_path: Path
) -> None:
    layers = [
        flexibert_layer(one, heads=heads, neurons=neurons, stacked=stacked)
        for one in OPERATORS for heads, neurons, stacked in ((2, 512, 1), (4, 1024, 3), (4, 512, 3))
    ]  # fmt: skip
    rows = [flexibert_row([layer, flexibert_layer()], hidden=hidden) for layer in layers]
    shapes = read_flexibert(write_lines(tmp_path / "rows.jsonl", rows), setting=setting).shapes
    assert shapes is not None
    for index, row in enumerate(rows):
        model = flexi.unfilled(row, setting=setting)
        roles = flexi.roles_of_flexibert(model)
        counted = sum(parameter.numel() for parameter in model.parameters())
        inside = counted - sum(parameter.numel() for parameter in model.embeddings.parameters())
        assert (counted, inside) == (shapes.parameters[index], shapes.decoder_parameters[index])
        for names, sizes in ((roles.attention, shapes.attention), (roles.ffn, shapes.ffn)):
            ours = sorted(tuple(sorted(model.get_submodule(name).weight.shape)) for name in names)
            assert ours == sorted(tuple(sorted(map(int, size))) for size in sizes[index] if size.all())
        assert (roles.layers, roles.hidden_size) == (shapes.depth[index], shapes.width[index])


def published_rows(data_dir: Path) -> list[Row]:
    file = data_dir / "flexibert" / "flexibert.jsonl"
    if not file.is_file():
        pytest.skip("no FlexiBERT benchmark")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_row_has_the_published_number_of_parameters_and_of_tensors(flexi: ModuleType, data_dir: Path) -> None:
    for row in published_rows(data_dir):
        model, metrics = flexi.unfilled(row), row["published_metrics"]
        roles = flexi.roles_of_flexibert(model)
        assert sum(parameter.numel() for parameter in model.parameters()) == metrics["Number of Parameters"]
        tensors = {
            "Synaptic Diversity": len(roles.attention), "Synaptic Saliency": len(roles.ffn),
            "Head Confidence": len(roles.heads), "Head Softmax Confidence": roles.layers,
        }  # fmt: skip
        assert {name: round(metrics[name] / metrics[f"{name} Normalized"]) for name in tensors} == tensors
        # A whole number of hooks on each, those of earlier models included.
        hooks = metrics["Activation Distance"] / metrics["Activation Distance Normalized"] / len(roles.ffn_out)
        assert hooks == pytest.approx(round(hooks), rel=1e-6)


def test_values_that_follow_from_the_architecture_are_the_published_ones(
    flexi: ModuleType, benchmark: ModuleType, data_dir: Path
) -> None:
    """As near as two draws of weights are on other text; the whole width or a used softmax would be further away."""
    batch = benchmark.inputs(data_dir / "wikitext2" / "valid.txt", batch=1, length=512)
    wanted = {20: "DFT WMA", 28: "SDP DFT", 60: "5 DCT", 64: "DFT DCT", 104: "SDP WMA", 114: "DCT SDP"}
    for row in published_rows(data_dir):
        if row["id"] not in wanted:
            continue
        assert " ".join(str(layer["operation_parameter"]) for layer in row["encoder_layers"]) == wanted[row["id"]]
        model, metrics = flexi.model_of(row, seed=row["id"]), row["published_metrics"]
        roles = flexi.roles_of_flexibert(model)
        columns = benchmark.published_columns([row], {name: np.array([v]) for name, v in metrics.items()})
        for name, column, within in (
            ("softmax_confidence", "Head Softmax Confidence", 0.012), ("attention_confidence", "Head Confidence", 0.12),
            ("activation_distance", benchmark.ONCE, 0.06),
        ):  # fmt: skip
            assert score(model, name, batch, roles=roles) == pytest.approx(columns[column][0], rel=within), (row, name)


# -- Operators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DFT", "DCT"])
def test_a_transform_is_that_of_numpy_and_scipy_head_by_head(flexi: ModuleType, kind: str) -> None:
    module, x = operator(flexi, ("LT", kind)), states(2, 7, 24)
    found, probabilities = module(x)
    entering = module.entering(x).detach().double().numpy()
    for head in range(4):
        part = entering[:, :, 6 * head : 6 * head + 6]
        wanted = np.fft.fft2(part).real if kind == "DFT" else dctn(part, type=2, axes=(1, 2))
        close(found[:, :, 6 * head : 6 * head + 6], wanted)
        close(probabilities[:, head], torch.from_numpy(wanted).softmax(-1), rtol=1e-4)


def test_the_transforms_are_those_of_torch_and_scipy(flexi: ModuleType) -> None:
    x = states(2, 3, 5, 8).double()
    close(flexi.fourier(x), torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real, rtol=1e-12)
    close(flexi.cosine(x), dctn(x.numpy(), type=2, axes=(-2, -1)), rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_attention_is_that_of_torch(flexi: ModuleType, weighted: bool) -> None:
    module, x = operator(flexi, ("SA", "WMA" if weighted else "SDP")), states(2, 7, 24)
    q = functional.linear(x, module.query.weight, module.query.bias)
    q = q @ module.weighting.weight.t() if weighted else q
    heads = [part.view(2, 7, 4, 6).transpose(1, 2) for part in (q, module.key(x), module.value(x))]
    found, probabilities = module(x)
    close(found, functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 7, 24))
    close(probabilities.sum(-1), torch.ones(2, 4, 7))


@pytest.mark.parametrize("kernel", [5, 9])
def test_the_dynamic_convolution_is_a_plain_loop(flexi: ModuleType, kernel: int) -> None:
    module, x = operator(flexi, ("DSC", kernel)), states(2, 7, 24)
    found, _ = module(x)
    span = module.pointwise(module.depthwise(x.transpose(1, 2))).transpose(1, 2)
    kernels = module.taps(span * module.query(x)).view(2, 7, 2, kernel).softmax(-1)
    values = module.convolved(x).view(2, 7, 2, 6)
    for head in range(2):
        for token in range(7):
            wanted = torch.zeros(2, 6)
            for tap in range(kernel):
                if 0 <= (place := token + tap - kernel // 2) < 7:
                    wanted += kernels[:, token, head, tap, None] * values[:, place, head]
            close(found[:, token, 12 + 6 * head : 18 + 6 * head], wanted)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_span_based_operator_is_convberts_mixed_attention(flexi: ModuleType, heads: int) -> None:
    module, x = operator(flexi, ("DSC", 5), heads=heads), states(2, 7, 24)
    settings = {"hidden_size": 24, "embedding_size": 24, "num_attention_heads": heads, "conv_kernel_size": 5}
    theirs = ConvBertSelfAttention(ConvBertConfig(**settings, head_ratio=2)).eval()
    names = {"taps": "conv_kernel_layer", "convolved": "conv_out_layer"}
    state = {}
    for name, value in module.state_dict().items():
        part, kind = name.split(".")
        separable = f"key_conv_attn_layer.{part}.weight" if kind == "weight" else "key_conv_attn_layer.bias"
        state[separable if part in ("depthwise", "pointwise") else f"{names.get(part, part)}.{kind}"] = value
    state["key_conv_attn_layer.bias"] = state["key_conv_attn_layer.bias"].unsqueeze(1)
    theirs.load_state_dict(state)
    found, probabilities = module(x)
    wanted, expected = theirs(x)
    close(found, wanted)
    close(probabilities, expected)


# -- The encoder -------------------------------------------------------------------------------------------------------


def electra_of(model: nn.Module, *, layers: int) -> ElectraModel:
    """The same weights in transformers' ELECTRA, which plain attention with one FFN a layer is."""
    theirs = ElectraModel(ElectraConfig(
        vocab_size=30522, embedding_size=128, hidden_size=256, intermediate_size=1024, num_attention_heads=4,
        num_hidden_layers=layers,
    )).eval()  # fmt: skip
    names = {
        "embeddings.tokens": "embeddings.word_embeddings", "embeddings.positions": "embeddings.position_embeddings",
        "embeddings.types": "embeddings.token_type_embeddings", "embeddings.norm": "embeddings.LayerNorm",
        "embeddings.projection": "embeddings_project",
    }  # fmt: skip
    for number in range(layers):
        inside, there = f"layers.{number}", f"encoder.layer.{number}"
        names |= {f"{inside}.operator.{name}": f"{there}.attention.self.{name}" for name in ("query", "key", "value")}
        names |= {
            f"{inside}.output": f"{there}.attention.output.dense", f"{inside}.ffn.0": f"{there}.intermediate.dense",
            f"{inside}.output_norm": f"{there}.attention.output.LayerNorm",
            f"{inside}.ffn.1": f"{there}.output.dense", f"{inside}.ffn_norm": f"{there}.output.LayerNorm",
        }  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        state[f"{names[part]}.{kind}"] = value
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys)
    return theirs


def test_plain_attention_with_one_ffn_a_layer_is_electra(flexi: ModuleType) -> None:
    layers = [flexibert_layer(heads=4, neurons=1024)] * 2
    model = flexi.model_of(flexibert_row(layers, hidden=256), setting="specified", seed=3)
    ids = torch.randint(1, 30522, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(model(ids).last_hidden_state, electra_of(model, layers=2)(ids).last_hidden_state, rtol=1e-4)


def test_a_stack_of_ffns_has_an_activation_between_its_matrices_and_one_residual(flexi: ModuleType) -> None:
    row = flexibert_row([flexibert_layer(("LT", "DCT"), neurons=512, stacked=3)])
    (layer,) = flexi.model_of(row, setting="specified", seed=1).layers
    x = states(2, 5, 128)
    mixed, _ = layer.operator(x)
    a, b, c, d = layer.ffn
    inner = d(functional.gelu(c(functional.gelu(b(functional.gelu(a(mixed)))))))
    close(layer(x)[0], functional.layer_norm(mixed + inner, (128,), eps=1e-12))


@EACH_OPERATOR
def test_outputs_have_the_hidden_size_and_each_layer_a_softmax(
    flexi: ModuleType, operator: tuple[str, str | int]
) -> None:
    row = flexibert_row([flexibert_layer(operator, heads=4), flexibert_layer(heads=2, stacked=3)])
    model, ids = flexi.model_of(row, setting="specified"), torch.arange(1, 11).view(2, 5)
    found = model(ids, output_attentions=True)
    assert found.last_hidden_state.shape == (2, 5, 128) and model(ids).attentions is None
    shape = {"SA": (2, 4, 5, 5), "LT": (2, 4, 5, 32), "DSC": (2, 2, 5, 5)}[operator[0]]
    assert [tuple(layer.shape) for layer in found.attentions] == [shape, (2, 2, 5, 5)]
    assert all(torch.allclose(layer.sum(-1), torch.ones(1)) for layer in found.attentions)


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn(flexi: ModuleType) -> None:
    row = flexibert_row([flexibert_layer(("DSC", 5)), flexibert_layer(("SA", "WMA"))])
    before = torch.random.get_rng_state()
    one, same, other = (flexi.model_of(row, setting="specified", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name, value in one.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            assert not torch.equal(value, other[name]) and float(value.std()) == pytest.approx(0.02, rel=0.15), name


def test_what_is_no_row_of_the_benchmark_is_named(flexi: ModuleType) -> None:
    for operator in (("SA", "DFT"), ("LT", "SDP"), ("DSC", 4), ("CNN", "SDP")):
        with pytest.raises(ValueError, match=f"operator '{operator[0]}' with {operator[1]!r} is none of SA SDP|WMA"):
            flexi.unfilled(flexibert_row([flexibert_layer(operator)]))
    with pytest.raises(ValueError, match="setting='real' is not one of published, specified, trained"):
        flexi.unfilled(flexibert_row([flexibert_layer()]), setting="real")


# -- Proxies and the benchmark -----------------------------------------------------------------------------------------


@EACH_OPERATOR
def test_every_proxy_scores_every_operator(
    flexi: ModuleType, benchmark: ModuleType, operator: tuple[str, str | int]
) -> None:
    row = flexibert_row([flexibert_layer(operator, heads=4, stacked=3)])
    model = flexi.model_of(row, setting="specified", seed=2)
    roles, ids = flexi.roles_of_flexibert(model), torch.arange(1, 25).view(2, 12)
    found = {}
    for name, target in benchmark.measurements(list(PROXIES), benchmark.TARGETS):
        found[name, target] = score(model, name, {"input_ids": ids}, target=target or "auto", roles=roles)
    assert all(np.isfinite(list(found.values()))) and set(dict(found)) >= {("zerolm", ""), ("snip", "sum")}
    assert found["depth", ""] == 1 and found["params", ""] == sum(p.numel() for p in model.parameters())
    for name in ("grad_norm", "snip", "head_importance", "synaptic_saliency"):
        assert 0 <= found[name, "sum"] < 1e-4 * found[name, "signs"]


def folder_of(rows: list[Row], tmp_path: Path) -> Path:
    (tmp_path / "data" / "flexibert").mkdir(parents=True)
    write_lines(tmp_path / "data" / "flexibert" / "flexibert.jsonl", rows)
    return tmp_path / "data"


def run(benchmark: ModuleType, data: Path, *given: str) -> dict[str, Any]:
    file = data.parent / "flexibert.json"
    tiny = ["--setting", "specified", "--batch", "1", "--length", "8", "--threads", "1"]
    benchmark.main([*tiny, *given, "--data", str(data), "--json", str(file)])
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_the_benchmark_ranks_every_proxy_beside_the_published_metrics(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = flexibert_rows(4)
    for row in rows:
        row["published_metrics"] |= {"Activation Distance": 8.0, "Activation Distance Normalized": 1.0 + row["id"]}
    data = folder_of(rows, tmp_path)
    names = ["depth", "snip", "grad_norm", "attention_confidence", "activation_distance"]
    found = run(benchmark, data, "--proxies", *names)
    assert [(row["proxy"], row["target"], row["published"]) for row in found["rows"]] == [
        ("depth", "", ""), ("snip", "sum", ""), ("snip", "signs", ""), ("grad_norm", "sum", ""),
        ("grad_norm", "signs", ""), ("attention_confidence", "", "Head Confidence"),
        ("activation_distance", "", "Activation Distance"), ("activation_distance", "", "Activation Distance, once"),
    ]  # fmt: skip
    depths, confidence, constant = found["rows"][0], found["rows"][5], found["rows"][6]
    assert -1 <= depths["Spearman"] <= 1 and depths["its Spearman"] == "" and depths["rows"] == 4
    assert -1 <= confidence["ours with it"] <= 1 and confidence["ours / it"] > 0
    assert constant["its Spearman"] == "" and constant["ours with it"] == ""
    assert 0 < found["noise"] < 1e-4 and found["failed"] == [] and found["architectures"] == found["of"] == 4
    assert str(tmp_path) not in json.dumps(found) and found["settings"]["text"] == "random ids"
    page = import_module("render").page({"flexibert": found})
    assert "4 of the 4 rows" in page and "| snip | signs |" in page and "| Head Confidence | attention_con" in page


def test_published_activation_distances_are_put_back_to_one_hook(benchmark: ModuleType) -> None:
    rows = [flexibert_row([flexibert_layer(stacked=3), flexibert_layer(stacked=1)])]
    once = benchmark.published_columns(rows, {"Activation Distance Normalized": np.array([2.5])})[benchmark.ONCE]
    assert list(once) == [10.0]
    assert benchmark.published_columns(rows, {}) == {}


def test_a_run_that_ended_early_goes_on_where_it_was(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, kept = folder_of(flexibert_rows(5), tmp_path), tmp_path / "kept"
    given = ["--proxies", "params", "attention_confidence", "--output", str(kept)]
    run(benchmark, data, *given, "--rows", "2")
    lines = (kept / "rows.jsonl").read_text().splitlines()
    (kept / "rows.jsonl").write_text("\n".join([*lines, '{"id": 3, "sco']))
    measured, ids = benchmark.measured, []
    monkeypatch.setattr(benchmark, "measured", lambda row, *more: ids.append(row["id"]) or measured(row, *more))
    found = run(benchmark, data, *given, "--rows", "4")
    assert found["architectures"] == 4 and len(ids) == 2
    assert (kept / "rows.jsonl").read_text().splitlines()[:3] == lines
    monkeypatch.setattr(benchmark, "measured", None)
    assert run(benchmark, data, *given, "--rows", "4")["rows"] == found["rows"]
    with pytest.raises(SystemExit, match="is of a run with other settings: .*give another folder"):
        run(benchmark, data, *given, "--seed", "1")


def test_what_cannot_be_scored_is_left_out_and_said(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of = benchmark.model_of

    def spoiled(row: Row, *, setting: Setting, seed: int) -> nn.Module:
        model = model_of(row, setting=setting, seed=seed)
        with torch.no_grad():
            model.layers[0].ffn[0].weight.fill_(torch.nan if row["id"] == 1 else 0.01)
        return model

    monkeypatch.setattr(benchmark, "model_of", spoiled)
    found = run(benchmark, folder_of(flexibert_rows(4), tmp_path), "--proxies", "depth", "activation_distance")
    assert [row["rows"] for row in found["rows"]] == [4, 3]
    assert len(found["failed"]) == 1 and "not finite" in found["failed"][0]


def test_words_are_hashed_into_the_vocabulary_and_repeated_as_needed(benchmark: ModuleType, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("one two one\nthree two")
    (first, second) = benchmark.inputs(text, batch=2, length=5)["input_ids"]
    assert (
        torch.equal(first, second) and first[0] == first[2] and first[1] == first[4] and len(set(first.tolist())) == 3
    )
    ids = benchmark.inputs(tmp_path / "missing.txt", batch=4, length=100)["input_ids"]
    assert ids.shape == (4, 100) and ids.min() >= 1 and ids.max() < 30522


def test_the_benchmark_says_which_data_it_misses(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--data", str(tmp_path)])
    assert not stopped.value.code and "HF_ELASTIC_DATA" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmark.main(["--length", "513"])
