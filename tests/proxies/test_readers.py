"""Readers of benchmarks against modules that are counted, against the files' own numbers, and on bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from tiny_benchmarks import OPERATORS, Row, flexibert_layer, flexibert_row, flexibert_rows, lts_row, write_lines
from torch import nn

import hf_elastic as he
from hf_elastic.proxies import BenchmarkRows, ShapeBatch, read_benchmark, read_csv, read_flexibert, read_lts
from hf_elastic.proxies.readers import Setting

# -- FlexiBERT ---------------------------------------------------------------------------------------------------------


def built_layer(layer: Row, hidden: int, *, setting: Setting) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The modules of a layer, attention and FFN apart, as the source's PyTorch code has them."""
    kind, option = layer["operation_type"], layer["operation_parameter"]
    kind, option = (kind, option) if setting != "trained" else ("SA", "SDP")
    attention = nn.ModuleList([nn.Linear(hidden, hidden)])
    if kind == "SA":
        attention += [nn.Linear(hidden, hidden) for _ in range(3)]
        attention += [nn.Linear(hidden, hidden, bias=False)] if option == "WMA" else []
    if kind == "DSC":
        half, taps = hidden // 2, layer["num_operation_heads"] // 2 * option
        attention += [*(nn.Linear(hidden, half) for _ in range(4)), nn.Linear(half, taps)]
        attention += [nn.Conv1d(hidden, hidden, option, groups=hidden, bias=False), nn.Conv1d(hidden, half, 1)]
    attention += [nn.LayerNorm(hidden)] if kind != "LT" else []
    widths = [1024 if setting == "published" else layer["feed_forward_dimension"]] * layer["num_feed_forward"]
    widths[:1] = [4 * hidden] if setting == "trained" else widths[:1]
    sizes = [hidden, *widths, hidden]
    ffn = nn.ModuleList([nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)])
    return attention, ffn.append(nn.LayerNorm(hidden))


def counted(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def expected_score(modules: nn.ModuleList) -> float:
    return sum(max(module.weight.shape) for module in modules if isinstance(module, nn.Linear))


@pytest.mark.parametrize("setting", ["published", "specified", "trained"])
@pytest.mark.parametrize("hidden", [128, 256])
def test_sizes_of_flexibert_are_those_of_the_modules(setting: Setting, hidden: int, tmp_path: Path) -> None:
    layers = [
        flexibert_layer(operator, heads=heads, neurons=neurons, stacked=stacked)
        for operator in OPERATORS for heads, neurons, stacked in ((2, 512, 1), (4, 1024, 3), (4, 512, 3))
    ]  # fmt: skip
    rows = [flexibert_row([layer, flexibert_layer()], hidden=hidden) for layer in layers]
    found = read_flexibert(write_lines(tmp_path / "rows.jsonl", rows), setting=setting)
    assert found.shapes is not None
    width = 256 if setting == "published" else hidden
    embeddings: list[nn.Module] = [nn.Embedding(n, 128) for n in (30522, 512, 2)]
    embeddings += [nn.LayerNorm(128), *([nn.Linear(128, width)] if width != 128 else [])]
    for index, row in enumerate(rows):
        built = [built_layer(layer, width, setting=setting) for layer in row["encoder_layers"]]
        inside = counted([part for parts in built for part in parts])
        assert found.shapes.decoder_parameters[index] == inside
        assert found.shapes.parameters[index] == inside + counted(embeddings)
        attention, ffn = (part[index] for part in found.shapes.zerolm_parts())
        assert attention == sum(expected_score(a) for a, _ in built) and ffn == sum(expected_score(f) for _, f in built)
    assert set(found.shapes.width) == {width} and set(found.shapes.depth) == {2}


def test_flexibert_rows_carry_their_truth_and_their_metrics_as_stored(tmp_path: Path) -> None:
    rows = flexibert_rows(5)
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found = read_flexibert(file)
    assert list(found.truth) == [row["scores"]["glue"] for row in rows] and found.truth_name == "glue"
    assert list(found.published) == ["Head Confidence", "Constant", "train_seconds"]
    assert list(found.published["Head Confidence"]) == [row["published_metrics"]["Head Confidence"] for row in rows]
    assert list(read_flexibert(file, truth="cola").truth) == [row["scores"]["cola"] for row in rows]
    assert "specified" in found.name and found.left_out == 0
    bare = [{k: v for k, v in row.items() if k not in ("published_metrics", "train_seconds")} for row in rows]
    assert read_flexibert(write_lines(tmp_path / "bare.jsonl", bare)).published == {}


def test_flexibert_counts_are_the_files_own(data_dir: Path) -> None:
    file = data_dir / "flexibert" / "flexibert.jsonl"
    if not file.is_file():
        pytest.skip("no FlexiBERT benchmark")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    specified, published = read_flexibert(file), read_flexibert(file, setting="published")
    assert specified.shapes is not None and published.shapes is not None
    assert list(specified.shapes.parameters) == [row["params"] for row in rows]
    assert list(specified.shapes.decoder_parameters) == [row["params_encoder"] for row in rows]
    assert list(published.shapes.parameters) == list(published.published["Number of Parameters"])


def agrees(values: np.ndarray, truth: np.ndarray, wanted: dict[str, float]) -> bool:
    found = spearmanr(values, truth).statistic, kendalltau(values, truth).statistic
    return bool(np.allclose(found, (wanted["spearman"], wanted["kendall"]), atol=6e-5))


def test_flexibert_correlations_are_the_reference_ones(data_dir: Path) -> None:
    folder = data_dir / "flexibert"
    if not folder.is_dir():
        pytest.skip("no FlexiBERT benchmark")
    wanted = json.loads((folder / "reference_correlations.json").read_text())["shared_even"]
    found = read_flexibert(folder / "flexibert.jsonl")
    assert found.shapes is not None
    ours = {
        "true #params (hidden, ffn of the row)": found.shapes.parameters,
        "true encoder #params": found.shapes.decoder_parameters,
        "number of layers": found.shapes.depth,
        "hidden_size": found.shapes.width,
        "train seconds": found.published["train_seconds"],
        **{name: values for name, values in found.published.items() if name in wanted},
    }
    assert len(ours) == 20
    assert [name for name, values in ours.items() if not agrees(values, found.truth, wanted[name])] == []


def test_published_figures_of_zerolm_are_near_on_flexibert(data_dir: Path) -> None:
    """The paper: .532 / .765 over all 500 rows, of which half are here; on the models that were never trained."""
    file = data_dir / "flexibert" / "flexibert.jsonl"
    if not file.is_file():
        pytest.skip("no FlexiBERT benchmark")
    found = read_flexibert(file, setting="published")
    assert found.shapes is not None
    best = max(np.arange(-15, 16) / 10, key=lambda alpha: kendalltau(found.shapes.zerolm(alpha), found.truth).statistic)
    for alpha in (0.5, best):
        scores = found.shapes.zerolm(alpha)
        assert kendalltau(scores, found.truth).statistic == pytest.approx(0.532, abs=0.03)
        assert spearmanr(scores, found.truth).statistic == pytest.approx(0.765, abs=0.03)


# -- LiteTransformerSearch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fifth", [False, True])
def test_lts_rows_become_the_matrices_of_their_decoder(fifth: bool, tmp_path: Path) -> None:
    rows = [
        lts_row(depth=2, width=128, neurons=[300, 77], fifth=fifth, ppl={"valid_ppl": 30.0, "train_elapsed": 5.0}),
        lts_row(depth=3, width=100, neurons=64, fifth=fifth, ppl={"valid_ppl": 45.5, "train_elapsed": 6.0}),
    ]
    rows[1]["arch"]["n_head"] = 4
    found = read_lts(write_lines(tmp_path / "rows.jsonl", rows))
    assert found.shapes is not None and list(found.truth) == [-30.0, -45.5] and found.truth_name == "-valid_ppl"
    attention, ffn = found.shapes.zerolm_parts()
    matrices = 5 if fifth else 4
    assert list(attention) == [2 * matrices * 128, 3 * matrices * 100]
    assert list(ffn) == [2 * 300 + 2 * 128, 6 * 100]
    assert list(found.shapes.parameters) == [row["params"]["total"] for row in rows]
    assert list(found.shapes.decoder_parameters) == [row["params"]["nonembedding"] for row in rows]
    assert list(found.shapes.depth) == [2, 3] and list(found.shapes.width) == [128, 100]
    assert list(found.published) == ["AdaEmb", "Attn", "FFN", "train_elapsed"]


def test_heads_of_their_own_size_make_attention_wider_than_the_stream(tmp_path: Path) -> None:
    row = lts_row(depth=2, width=128)
    row["arch"] |= {"d_head": 96, "n_head": [2, 4]}
    found = read_lts(write_lines(tmp_path / "rows.jsonl", [row]))
    assert found.shapes is not None and list(found.shapes.zerolm_parts()[0]) == [4 * 192 + 4 * 384]


def test_lts_rows_without_a_perplexity_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [lts_row(ppl=ppl) for ppl in (30.0, None, 35)]
    del (missing := lts_row())["ppl"]
    for row in (*rows, missing):
        row |= {"latency": 2.5, "memory": 7.0}
    found = read_lts(write_lines(tmp_path / "pareto.jsonl", [missing, *rows]))
    assert list(found.truth) == [-30.0, -35.0] and found.left_out == 2
    assert list(found.published) == ["AdaEmb", "Attn", "FFN", "latency", "memory"]
    named = [lts_row(ppl={"valid_ppl": 3.0, "test_ppl": 4.0}), lts_row(ppl={"valid_ppl": 3.0})]
    file = write_lines(tmp_path / "random.jsonl", named)
    assert read_lts(file, truth="test_ppl").left_out == 1
    with pytest.raises(he.DataError, match="no row with ppl 'word_ppl'; its rows have test_ppl, valid_ppl"):
        read_lts(file, truth="word_ppl")


def test_lts_counts_and_correlations_are_the_files_own(data_dir: Path) -> None:
    folder = data_dir / "lts"
    if not folder.is_dir():
        pytest.skip("no LiteTransformerSearch benchmark")
    wanted = json.loads((folder / "reference_correlations.json").read_text())
    assert len(wanted) == 11
    for name, reference in wanted.items():
        found = read_lts(folder / f"{name}.jsonl")
        assert found.shapes is not None and len(found.truth) == reference["n"]
        ours = {
            "decoder (non-embedding) #params": found.shapes.decoder_parameters,
            "total #params": found.shapes.parameters,
            "n_layer": found.shapes.depth,
            "d_model": found.shapes.width,
            "attention #params": found.published["Attn"],
            "feed-forward #params": found.published["FFN"],
        }
        assert [key for key, values in ours.items() if not agrees(values, found.truth, reference[key])] == [], name
        for sizes, column in ((found.shapes.attention, "Attn"), (found.shapes.ffn, "FFN")):
            weights = sizes.prod(axis=2).sum(axis=1)
            assert (weights <= found.published[column]).all() and (weights > 0.97 * found.published[column]).all(), name


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_a_csv_gives_its_truth_and_all_other_columns_of_numbers(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text('\ufeffname,ppl, size ,note\n"a, first",30.5,1e6,\nb,20,2000000,x\n\nc,25,3,y\n', encoding="utf-8")
    found = read_csv(file, truth="ppl", smaller_is_better=True)
    assert list(found.truth) == [-30.5, -20, -25] and found.truth_name == "-ppl" and found.shapes is None
    assert {name: list(values) for name, values in found.published.items()} == {"size": [1e6, 2e6, 3]}
    assert list(read_csv(file, truth="ppl").truth) == [30.5, 20, 25]


# -- any format --------------------------------------------------------------------------------------------------------


def test_the_format_is_told_from_the_fields(tmp_path: Path) -> None:
    flexibert = write_lines(tmp_path / "a.txt", flexibert_rows(3))
    lts = write_lines(tmp_path / "b.txt", [lts_row(ppl=3.0)])
    (table := tmp_path / "c.txt").write_text("x,y\n1,2\n")
    assert read_benchmark(flexibert).name == "FlexiBERT as specified"
    assert read_benchmark(flexibert, setting="trained", truth="cola").truth_name == "cola"
    assert read_benchmark(lts).name == "LiteTransformerSearch random_GPT2_made_up"
    assert read_benchmark(table, truth="y", smaller_is_better=True).truth_name == "-y"


def spoiled(change: object, *, of: Row | None = None) -> str:
    row = of or flexibert_row([flexibert_layer()])
    return json.dumps(row | change) if isinstance(change, dict) else str(change)


LAYER = flexibert_layer()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "is empty"),
        (" \n\n", {}, "is empty"),
        ('{"a": 1}', {}, "is no benchmark .fields: a.; known: FlexiBERT"),
        ('[{"a": 1}]', {}, "is no benchmark .fields: none"),
        ('{"a": 1', {}, "first line is no JSON object of one line"),
        ('{\n  "a": 1\n}', {}, "first line is no JSON object of one line"),
        (spoiled({}) + "\n3\n", {}, "line 2 is a int, expected an object"),
        (spoiled({}) + "\n{\n", {}, "line 2 is no JSON"),
        (spoiled({"hidden_size": 0}), {}, "line 1: hidden_size is '0', expected a positive whole number"),
        (spoiled({"hidden_size": 128.5}), {}, "hidden_size is '128.5'"),
        (spoiled({"hidden_size": True}), {}, "hidden_size is 'True'"),
        (spoiled({"encoder_layers": []}), {}, "encoder_layers is no list of at least one"),
        (spoiled({"encoder_layers": [3]}), {}, r"encoder_layers\[0\] is a int"),
        (spoiled({"encoder_layers": [{}]}), {}, r"encoder_layers\[0\]: operator None with None is none of SA SDP"),
        (spoiled({"encoder_layers": [LAYER | {"operation_parameter": "FFT"}]}), {}, "operator 'SA' with 'FFT'"),
        (spoiled({"encoder_layers": [LAYER | {"num_feed_forward": "1"}]}), {}, "num_feed_forward is '1'"),
        (spoiled({"scores": {}}), {}, "scores has no field 'glue'; it has none"),
        (spoiled({"scores": {"glue": "70"}}), {}, "glue is '70', expected a finite number"),
        (spoiled({"scores": {"glue": float("nan")}}), {}, "glue is 'nan', expected a finite number"),
        (spoiled({"scores": {"glue": 10**400}}), {}, "expected a finite number"),
        (spoiled({}) + "\n" + spoiled({"published_metrics": {}}), {}, "line 2: published_metrics has no field"),
        (spoiled({}), {"truth": "squad"}, "scores has no field 'squad'; it has glue, cola"),
        (spoiled({}), {"smaller_is_better": True}, "smaller_is_better does not apply to .* format FlexiBERT"),
        (spoiled({"ppl": None}, of=lts_row()), {}, "no row with ppl 'valid_ppl'"),
        (spoiled({"ppl": float("inf")}, of=lts_row()), {}, "ppl is 'inf'"),
        (spoiled({"arch": {"n_layer": 2}}, of=lts_row()), {}, "arch has no field 'd_model'; it has n_layer"),
        (spoiled({"params": {}}, of=lts_row()), {}, "params has no field 'AdaEmb'"),
        (spoiled({}, of=lts_row(neurons=[64, 64, 64])), {}, "d_inner has 3 entries for 2 layers"),
        (spoiled({}, of=lts_row()), {"setting": "trained"}, "setting does not apply"),
        ("x,y\n1,2\n", {}, "say which of its columns is the truth .x,y."),
        ("x,y\n1,2\n", {"truth": "z"}, "has no column 'z'; its columns: x, y"),
        ("x,y\n1,2\n", {"truth": "x", "setting": "trained"}, "setting does not apply"),
        ("x,y\n", {"truth": "x"}, "holds no rows"),
        ("x,x\n1,2\n", {"truth": "x"}, "column names are empty or occur twice"),
        ("x,\n1,2\n", {"truth": "x"}, "column names are empty or occur twice"),
        ("x,y\n1,2\n3\n", {"truth": "x"}, "line 3 has 1 cells, but there are 2 columns"),
        ('x,y\n1,"2\n', {"truth": "x"}, "is no CSV"),
        ("x,y\na,2\nb,3\n", {"truth": "x"}, "column 'x' holds no numbers, such as 'a'"),
        ("x,y\n1,2\n,3\n", {"truth": "x"}, "column 'x', line 3: '' is no finite number"),
        ("x,y\n1,2\nnan,3\n", {"truth": "x"}, "column 'x', line 3: 'nan' is no finite number"),
        ("x,y\n1,2\n2,-inf\n", {"truth": "x"}, "column 'y', line 3: '-inf' is no finite number"),
        ("x,y\n1,2\n2,n/a\n", {"truth": "x"}, "column 'y', line 3: 'n/a' is no finite number"),
    ],
)
def test_a_bad_file_is_named_in_one_line(content: str, options: dict, message: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    (file := tmp_path / "rows").write_text(content)
    with pytest.raises(he.DataError, match=message) as raised:
        read_benchmark(file, **options)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(he.DataError, match="cannot read .*missing.csv: No such file"):
        read_benchmark(tmp_path / "missing.csv")
    with pytest.raises(he.DataError, match="cannot read"):
        read_benchmark(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(he.DataError, match="is no text file"):
        read_benchmark(tmp_path / "binary")
    file = write_lines(tmp_path / "rows.jsonl", flexibert_rows(3))
    with pytest.raises(he.DataError, match="setting='real' is not one of published, specified, trained"):
        read_flexibert(file, setting="real")  # type: ignore[arg-type]


def test_numbers_of_other_architectures_than_the_truth_are_refused() -> None:
    one = np.ones(1)
    shapes = ShapeBatch.padded(attention=[[]], ffn=[[]], depth=one, width=one, parameters=one, decoder_parameters=one)
    with pytest.raises(he.DataError, match="shapes is of 1 architectures, but the truth of 2"):
        BenchmarkRows("made up", np.ones(2), "truth", shapes, {})
    with pytest.raises(he.DataError, match="size is of 3 architectures"):
        BenchmarkRows("made up", np.ones(2), "truth", None, {"size": np.ones(3)})
