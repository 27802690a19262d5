"""Paths of candidate blocks as models and folders of their own: in every form, read without hf_elastic, made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from block_models import (
    EVERY_HEAD,
    FUSED,
    GROWN,
    SHAPES,
    TYPES,
    VOCABULARY,
    close,
    output,
    output_of,
    path,
    supernet_of,
    tiny,
    tokens,
)
from safetensors.torch import load_file, save_file

from hf_elastic import ExportError, SpaceError, Supernet, UnsupportedModelError, costs, export, extract, make_elastic
from hf_elastic.checkpoint.block_extraction import path_config
from hf_elastic.checkpoint.static_form import stock_class, stock_config
from hf_elastic.errors import CheckpointError
from hf_elastic.models import config_class, model_class
from hf_elastic.report import describe_folder

LISTED = {**GROWN, "candidate_heads": [[None] * 6, [[0, 1, 3]] * 6, [[2]] * 6]}
"""Widths that differ, and heads that are left out."""
MIXED = ("standard-qv", "bottleneck-kv", "standard")
FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stock": ({}, ("standard",)), "stock-padded": (LISTED, ("standard",)), "remote-code": (FUSED, MIXED),
}  # fmt: skip
STOCK = {"elastic_bert": transformers.BertForMaskedLM, "elastic_gpt2": transformers.GPT2LMHeadModel}

# -- loadability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("changes", "blocks", "wanted"),
    [
        ({}, ("standard",), "stock"),
        ({"candidate_widths": [[20] * 6] * 3}, ("standard",), "stock"),
        (GROWN, ("standard",), "stock-padded"),
        (LISTED, ("standard",), "stock-padded"),
        ({"candidate_heads": [[2] * 6] * 3}, ("standard",), "remote-code"),
        ({"head_dim": 6}, ("standard",), "remote-code"),
        ({}, ("standard", "standard-qv"), "remote-code"),
        ({}, ("bottleneck",), "remote-code"),
    ],
)
def test_what_a_path_needs_to_load_is_known_before(
    kind: str, changes: dict[str, Any], blocks: tuple[str, ...], wanted: str
) -> None:
    supernet = supernet_of(kind, **changes)
    assert supernet.loadability(path(supernet, *blocks)) == wanted


OTHER = [
    {"embedding_size": 8}, {"trigram_input": True}, {"pooler_activation": "relu"}, {"mlm_activation": "relu"},
    {"positions_skip_padding": True}, {"type_vocab_size": 0}, {"attention_output_dropout_prob": 0.5},
    {"pooler_dropout": 0.5}, {"qa_dropout": 0.5}, {"token_classifier_dropout": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_what_a_stock_bert_does_otherwise_needs_remote_code(changes: dict[str, Any]) -> None:
    supernet = supernet_of("elastic_bert", **changes)
    point = path(supernet, "standard")
    assert supernet.loadability(point) == "remote-code"
    assert close(output(extract(supernet, point)), output_of(supernet, point))


@pytest.mark.parametrize("said", [True, False])
def test_a_body_without_a_pooler_is_no_stock_bert_and_stays_without(said: bool) -> None:
    config = tiny("elastic_bert", "base", add_pooling_layer=said).config
    model = model_class("elastic_bert", "ElasticBertModel")(config, add_pooling_layer=False).eval()
    supernet = make_elastic(model)
    for point in (path(supernet, "standard"), path(supernet, *MIXED)):
        assert supernet.loadability(point) == "remote-code"
        found = extract(supernet, point)
        assert found.pooler is None and close(output(found), output_of(supernet, point))


# -- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), EVERY_HEAD)
def test_every_head_is_extracted_in_every_form(kind: str, head: str) -> None:
    for form, (changes, blocks) in FORMS.items():
        supernet = supernet_of(kind, head, tie_word_embeddings=form == "stock", **changes)
        point = path(supernet, *blocks)
        wanted = output_of(supernet, point)
        for allowed in list(FORMS)[list(FORMS).index(form) :]:
            model = extract(supernet, point, loadability=allowed)  # type: ignore[arg-type]
            static = allowed == "remote-code"
            assert type(model) is (type(supernet.model) if static else stock_class(type(supernet.model)))
            assert model.config.num_labels == supernet.model.config.num_labels and not model.training
            assert close(output(model), wanted), (form, allowed)
        assert torch.equal(output_of(supernet, point), wanted) and supernet.active == supernet.space.largest()


@pytest.mark.parametrize("kind", TYPES)
def test_an_extracted_model_is_compact_of_its_dtype_and_shares_no_memory(kind: str) -> None:
    supernet = make_elastic(tiny(kind, **FUSED).to(torch.bfloat16))
    point = path(supernet, *MIXED)
    model = extract(supernet, point)
    held = {p.data_ptr() for p in supernet.model.parameters()}
    assert not held & {p.data_ptr() for p in model.parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == costs.total_parameters(supernet, point)
    assert {type(m) for m in model.modules() if "Sliced" in type(m).__name__} == (
        set() if kind == "elastic_bert" else {type(model.transformer.h[0].attn.c_attn)}  # hands out a shared part
    )


@pytest.mark.parametrize("kind", TYPES)
def test_a_form_that_cannot_hold_a_path_is_refused(kind: str) -> None:
    supernet = supernet_of(kind, **LISTED)
    with pytest.raises(ExportError, match="'stock' checkpoint cannot hold this architecture, it needs 'stock-padded'"):
        extract(supernet, path(supernet, "standard"), loadability="stock")
    with pytest.raises(ExportError, match="'stock-padded' checkpoint cannot hold .* it needs 'remote-code'"):
        extract(supernet, path(supernet, *MIXED), loadability="stock-padded")


def test_a_stock_config_says_what_the_static_one_said_and_nothing_else() -> None:
    settings = {"layer_norm_eps": 1e-7, "hidden_act": "gelu_new", "classifier_dropout": 0.3, "initializer_range": 0.5}
    model = tiny("elastic_bert", "sequence", **settings)
    config = stock_config(model.config, intermediate_size=7)
    assert type(config) is transformers.BertConfig and config.intermediate_size == 7
    assert {name: getattr(config, name) for name in settings} == settings
    assert (config.num_labels, config.vocab_size, config.num_hidden_layers) == (3, VOCABULARY, 3)
    assert not {"block", "candidate_blocks", "trigram_input", "head_dim"} & set(config.to_dict())
    with pytest.raises(ExportError, match="ElasticLlamaForCausalLM has no stock class; export with"):
        stock_class(model_class("elastic_llama", "ElasticLlamaForCausalLM"))


def test_the_config_of_a_path_says_once_what_all_its_layers_share() -> None:
    supernet = supernet_of("elastic_gpt2", candidate_widths=[[20] * 6] * 3, candidate_heads=[[2] * 6] * 3)
    alike = path_config(supernet.model.config, supernet.block_shapes(path(supernet, "bottleneck-qv")))
    assert not alike.is_heterogeneous and (alike.block, alike.n_inner, alike.n_head) == ("bottleneck-qv", 20, 2)
    assert (alike.bottleneck_head_dim, alike.head_dim, alike.candidate_widths) == (8, 8, None)
    mixed = path_config(supernet.model.config, supernet.block_shapes(path(supernet, *MIXED)))
    shapes = [(c.block, c.n_inner, c.n_head, c.head_dim, c.bottleneck_head_dim) for c in mixed.per_layer_config]
    assert shapes == [("standard-qv", 20, 2, 16, 4), ("bottleneck-kv", 20, 2, 8, 8), ("standard", 20, 2, 16, 4)]
    assert supernet.model.config.candidate_widths == [[20] * 6] * 3


# -- folders, read in a process without hf_elastic --------------------------------------------------------------------

READER = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
sys.modules["hf_elastic"] = None  # importing it now raises
root = sys.argv[1]
ids, found = load_file(root + "/ids.safetensors")["ids"], {}
for name, auto_class, trust in json.load(open(root + "/jobs.json")):
    options = {"trust_remote_code": True} if trust else {}
    model = getattr(transformers, auto_class).from_pretrained(root + "/" + name, **options).eval()
    home = "transformers_modules." if trust else "transformers.models."
    assert type(model).__module__.startswith(home), type(model).__module__
    with torch.no_grad():
        found[name] = model(input_ids=ids, return_dict=False)[0].contiguous()
    if auto_class == "AutoModelForCausalLM":
        mask = torch.ones_like(ids)
        found[name + ".text"] = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
save_file(found, root + "/found.safetensors")
"""
LANGUAGE = {"elastic_bert": "AutoModelForMaskedLM", "elastic_gpt2": "AutoModelForCausalLM"}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exports in every form and saved supernets, read by one process; outputs and reports by name."""
    root, jobs, wanted, reports = tmp_path_factory.mktemp("blocks"), [], {}, {}
    for kind in TYPES:
        for form, (changes, blocks) in FORMS.items():
            supernet, name = supernet_of(kind, **changes), f"{kind}-{form}"
            point = path(supernet, *blocks)
            reports[name] = export(supernet, point, root / name)
            wanted[name] = output_of(supernet, point)
            trust = form == "remote-code"
            jobs.append((name, LANGUAGE[kind] if trust else STOCK[kind].__name__, trust))
        supernet, name = supernet_of(kind, **FUSED), f"{kind}-supernet"
        supernet.save_pretrained(root / name)
        wanted[name] = output(supernet.model)
        jobs.append((name, LANGUAGE[kind], True))
    save_file({"ids": tokens()}, root / "ids.safetensors")
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", READER, str(root)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"root": root, "wanted": wanted, "reports": reports, "found": load_file(root / "found.safetensors")}


@pytest.mark.parametrize("form", [*FORMS, "supernet"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_folder_of_each_form_loads_where_hf_elastic_is_not_installed(
    kind: str, form: str, read: dict[str, Any]
) -> None:
    name = f"{kind}-{form}"
    assert close(read["found"][name], read["wanted"][name])
    if form in FORMS:
        report = read["reports"][name]
        auto = report.snippet.split(".")[1]
        assert report.loadability == form and report.max_difference <= 1e-5
        assert auto == (LANGUAGE[kind] if form == "remote-code" else STOCK[kind].__name__)
        assert any(read["root"].joinpath(name).glob("*.py")) == (form == "remote-code")


def test_remote_code_of_blocks_generates_as_the_supernet_does(read: dict[str, Any]) -> None:
    supernet = supernet_of("elastic_gpt2", **FUSED)
    for name, point in (("remote-code", path(supernet, *MIXED)), ("supernet", supernet.space.largest())):
        with supernet.activate(point):
            feed = {"attention_mask": torch.ones(2, 9, dtype=torch.long), "max_new_tokens": 4, "do_sample": False}
            assert torch.equal(read["found"][f"elastic_gpt2-{name}.text"], supernet.model.generate(tokens(), **feed))


@pytest.mark.parametrize("kind", TYPES)
def test_the_record_says_what_was_written(kind: str, read: dict[str, Any]) -> None:
    supernet, folder = supernet_of(kind, **FUSED), read["root"] / f"{kind}-remote-code"
    point, record = path(supernet, *MIXED), json.loads((folder / "architecture.json").read_text())
    assert supernet.space.canonical(record["architecture"]) == point and record["space_digest"] == supernet.space.digest
    assert [layer["block"] for layer in record["layers"]] == list(MIXED)
    assert record["total_parameters"] == costs.total_parameters(supernet, point)
    assert record["macs"] == costs.macs(supernet, point, seq_len=128)
    text = describe_folder(folder)
    assert f"blocks         {', '.join(MIXED)}" in text and "layers         3 of 3: FFN" in text


def test_a_model_that_was_made_better_is_written_instead(tmp_path: Path) -> None:
    supernet = supernet_of("elastic_bert", **LISTED)
    point = path(supernet, "standard")
    better = extract(supernet, point)
    with torch.no_grad():
        better.cls.predictions.bias += 1
    report = export(supernet, point, tmp_path / "out", model=better)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert report.loadability == "remote-code" and torch.equal(output(again), output(better))
    with pytest.raises(ExportError, match="this architecture of"):
        export(supernet, path(supernet, "standard", "standard-kv"), tmp_path / "other", model=better)


# -- models of one path -----------------------------------------------------------------------------------------------

SINGLE = [
    ("whole", ("standard",)), ("whole", ("bottleneck-kv",)), ("fused", MIXED), ("fused", ("standard", "bottleneck")),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "blocks"), SINGLE, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_a_model_of_one_path_is_a_space_of_one_point(
    kind: str, shape: str, blocks: tuple[str, ...], tmp_path: Path
) -> None:
    parent = supernet_of(kind, **SHAPES[shape])
    point = path(parent, *blocks)
    export(parent, point, tmp_path / "out", loadability="remote-code")
    model = getattr(transformers, LANGUAGE[kind]).from_pretrained(tmp_path / "out").eval()
    before = output(model)
    supernet = make_elastic(model)
    only = supernet.space.largest()
    assert torch.equal(output(model), before) and close(before, output_of(parent, point))
    assert supernet.space.size == 1 and dict(only) == dict(point) and supernet.active == only
    assert supernet.block_shapes(only) == parent.block_shapes(point)
    assert supernet.measured(input_ids=tokens()) == supernet.expected(only)
    again = extract(supernet, only, loadability="remote-code")
    assert torch.equal(output(again), before) and type(again) is type(model)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {"architectures", "auto_map"}
    assert costs.total_parameters(supernet, only) == sum(p.numel() for p in model.parameters())
    assert str(supernet).startswith(type(model).__name__)
    export(supernet, only, tmp_path / "again")


def one_path(kind: str) -> Supernet:
    parent = supernet_of(kind)
    return make_elastic(extract(parent, path(parent, *MIXED)))


@pytest.mark.parametrize("kind", TYPES)
def test_the_only_block_of_a_layer_does_not_grow_and_is_not_saved_as_a_supernet(kind: str, tmp_path: Path) -> None:
    supernet = one_path(kind)
    with pytest.raises(SpaceError, match="layer 0 is one block of a fixed width; only candidates grow"):
        supernet.block_parts[0].set_width("standard-qv", 8)
    with pytest.raises(SpaceError, match="layer 0 has no block 'standard'; it has standard-qv"):
        supernet.block_parts[0].parameters("standard")
    with pytest.raises(CheckpointError, match=r"one block each, with nothing to choose; write the model by export\(\)"):
        supernet.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("heads", [[1, 3], 2, 1])
@pytest.mark.parametrize("kind", TYPES)
def test_heads_of_the_only_block_can_be_left_out_and_the_extracted_model_lacks_them(kind: str, heads: Any) -> None:
    supernet = one_path(kind)
    for part in supernet.block_parts:
        part.set_heads(part.blocks[0], heads)
    supernet.resized()
    only = supernet.space.largest()
    model = extract(supernet, only)
    assert close(output(model), output(supernet.model))
    assert supernet.measured(input_ids=tokens()) == supernet.expected(only)
    assert sum(p.numel() for p in model.parameters()) == costs.total_parameters(supernet, only)
    assert extract(make_elastic(model), only).num_parameters() == model.num_parameters()


def test_a_layer_without_a_sublayer_is_no_block_and_the_model_stays_as_it_was() -> None:
    for kind, name in (("elastic_bert", "ElasticBertForMaskedLM"), ("elastic_gpt2", "ElasticGPT2ForCausalLM")):
        sizes = {k: v for k, v in tiny(kind).config.to_dict().items() if k in ("hidden_size", "n_embd", "vocab_size")}
        sizes |= {"num_attention_heads": 4, "num_hidden_layers": 3} if kind == "elastic_bert" else {"n_head": 4}
        config = config_class(kind)(**sizes, per_layer_config={2: {"skip": ["mlp"]}})
        model = model_class(kind, name)(config)
        before = [type(module) for module in model.modules()]
        with pytest.raises(UnsupportedModelError, match="layer 2 skips a sublayer"):
            make_elastic(model)
        assert [type(module) for module in model.modules()] == before
