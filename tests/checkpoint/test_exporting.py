"""Export: folders that from_pretrained loads with the subnet's outputs, checked before, whole or not at all."""

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
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    DECODERS,
    TRANSFORMER,
    class_of,
    disk_full_at,
    inputs,
    module,
    outputs,
    point,
    space,
    supernet_of,
    tiny,
    tokenizer,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_elastic import (
    ArchitectureError,
    CheckpointError,
    ElasticConfig,
    ExportError,
    Supernet,
    costs,
    export,
    extract,
    make_elastic,
)
from hf_elastic.checkpoint import exporting


def loaded_logits(model_class: Any, folder: Path, feed: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    model = model_class.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(**feed)[0]


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of each family, with a tokenizer; encoders are sentence-transformers too."""
    root, found = tmp_path_factory.mktemp("parents"), {}
    for family in ("bert", "llama"):
        folder = found[family] = root / family
        tiny(family, "base" if family == "bert" else "lm").save_pretrained(folder)
        tokenizer(words=" ".join(f"w{i}" for i in range(40))).save_pretrained(folder)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    folder = found["bert"]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [TRANSFORMER, module("1_Pooling"), module("2_Normalize", "Normalize", 2)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    return found


def loaded(parents: dict[str, Path], family: str, **changes: Any) -> Supernet:
    model = class_of(family, "base" if family == "bert" else "lm").from_pretrained(parents[family]).eval()
    return make_elastic(model, space(family, **changes))


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stock_export_loads_in_the_stock_class_with_the_subnets_outputs(family: str, tmp_path: Path) -> None:
    supernet = supernet_of(family)
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16, num_hidden_layers=2)
    report = export(supernet, arch, tmp_path / "out")
    feed = inputs(supernet.model)
    assert same(loaded_logits(class_of(family, "lm"), tmp_path / "out", feed), outputs(supernet, arch, **feed))
    assert (report.loadability, report.directory, report.files) == ("stock", tmp_path / "out", ())
    assert report.snippet == f'transformers.{class_of(family, "lm").__name__}.from_pretrained("{tmp_path / "out"}")'
    assert 0 <= report.max_difference < 1e-4 and "smaller and faster" in report.note
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_padded_export_loads_in_the_stock_class_with_the_subnets_outputs(family: str, tmp_path: Path) -> None:
    supernet = supernet_of(family, **({} if family in DECODERS else {"skip": ["layer"]}))
    arch = point(supernet, ffn0=16, heads1=1, **({"skip2": "attention"} if family in DECODERS else {"skip2": "layer"}))
    report = export(supernet, arch, tmp_path / "out")
    feed = inputs(supernet.model)
    assert report.loadability == "stock-padded" and "no speed gain" in report.note
    assert same(loaded_logits(class_of(family, "lm"), tmp_path / "out", feed), outputs(supernet, arch, **feed))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_remote_code_export_loads_where_hf_elastic_is_imported(family: str, tmp_path: Path) -> None:
    import hf_elastic  # noqa: F401  # registers the static classes

    supernet = supernet_of(family)
    arch = point(supernet, ffn0=16, skip1="mlp", heads2=1)
    report = export(supernet, arch, tmp_path / "out", loadability="remote-code")
    auto = AutoModelForCausalLM if family in DECODERS else transformers.AutoModelForMaskedLM
    feed = inputs(supernet.model)
    assert same(loaded_logits(auto, tmp_path / "out", feed), outputs(supernet, arch, **feed))
    assert (
        report.snippet == f'transformers.{auto.__name__}.from_pretrained("{tmp_path / "out"}", trust_remote_code=True)'
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", auto.__name__} <= set(config["auto_map"])
    for target in config["auto_map"].values():
        assert (tmp_path / "out" / f"{target.split('.')[0]}.py").is_file()


READER = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
sys.modules["hf_elastic"] = None
found = {}
for family, snippet in zip(("bert", "llama"), sys.argv[1:3]):
    model = eval(snippet).eval()
    with torch.no_grad():
        found[family] = model(**load_file(sys.argv[3]))[0].contiguous()
save_file(found, sys.argv[4])
"""


def test_the_snippet_of_a_remote_code_export_works_in_a_process_without_hf_elastic(tmp_path: Path) -> None:
    wanted, snippets = {}, []
    feed = {"input_ids": torch.randint(3, 61, (2, 9))}
    save_file(feed, tmp_path / "ids.safetensors")
    for family, head in (("bert", "base"), ("llama", "lm")):
        supernet = supernet_of(family, head)
        arch = point(supernet, ffn0=16, skip1="attention", heads2=1)
        snippets.append(export(supernet, arch, tmp_path / family, loadability="remote-code").snippet)
        wanted[family] = outputs(supernet, arch, **feed)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", READER, *snippets, str(tmp_path / "ids.safetensors"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "out")
    assert all(same(found[family], wanted[family]) for family in wanted)


def test_the_record_of_the_architecture_says_what_was_written(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    arch = point(supernet, ffn0=16, skip1="mlp", heads2=1)
    export(supernet, arch, tmp_path / "out", loadability="remote-code")
    record = json.loads((tmp_path / "out" / "architecture.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert supernet.space.canonical(record["architecture"]) == arch
    assert (record["digest"], record["space_digest"]) == (arch.digest, supernet.space.digest)
    assert record["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert record["macs"] == costs.macs(supernet, arch, seq_len=128) and record["macs_seq_len"] == 128
    assert record["layer_order"] == [0, 2, 1]
    assert [layer["intermediate_size"] for layer in record["layers"]] == [16, 48, 48]
    assert [layer["mlp"] for layer in record["layers"]] == [True, False, True]
    assert record["versions"]["transformers"] == transformers.__version__


def test_bfloat16_stays(tmp_path: Path) -> None:
    supernet = make_elastic(tiny("llama").to(torch.bfloat16), space("llama"))
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16)
    export(supernet, arch, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    feed = inputs(supernet.model)
    got = loaded_logits(AutoModelForCausalLM, tmp_path / "out", feed)
    torch.testing.assert_close(got, outputs(supernet, arch, **feed), rtol=0.05, atol=0.05)


def test_generation_config_tokenizer_and_template_travel(parents: dict[str, Path], tmp_path: Path) -> None:
    supernet = loaded(parents, "llama")
    supernet.model.generation_config.max_new_tokens = 5
    report = export(supernet, point(supernet, ffn0=16), tmp_path / "out")
    assert set(report.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 5
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert text.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"


def test_an_export_of_a_saved_supernet_finds_the_parents_tokenizer(parents: dict[str, Path], tmp_path: Path) -> None:
    loaded(parents, "llama").save_pretrained(tmp_path / "saved")
    again = Supernet.from_pretrained(tmp_path / "saved")
    report = export(again, again.space.smallest(), tmp_path / "out")
    assert "tokenizer.json" in report.files and "no tokenizer" not in report.note


def test_the_report_says_where_no_tokenizer_was_found_and_what_the_macs_are(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    arch = supernet.space.midpoint()
    report = export(supernet, arch, tmp_path / "unnamed")
    assert report.note.endswith("no tokenizer found in the parent, which was not loaded from a folder; "
                                "pass tokenizer= or source=")  # fmt: skip
    assert (report.macs, report.macs_seq_len) == (costs.macs(supernet, arch, seq_len=128), 128)
    (tmp_path / "bare").mkdir()
    named = export(supernet, arch, tmp_path / "named", source=tmp_path / "bare")
    assert f"no tokenizer found in {tmp_path / 'bare'}; pass tokenizer= or source=" in named.note


def test_the_snippet_of_remote_code_loads_the_tokenizer_in_the_same_way(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    arch = point(supernet, ffn0=16)
    report = export(supernet, arch, tmp_path / "out", loadability="remote-code", tokenizer=tokenizer())
    model, text = report.snippet.splitlines()
    assert "AutoModelForMaskedLM" in model
    assert text == f'transformers.AutoTokenizer.from_pretrained("{tmp_path / "out"}", trust_remote_code=True)'
    assert eval(text)("a b")["input_ids"] == [2, 3]  # the snippet is ours


def test_a_generation_config_that_transformers_refuses_is_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = supernet_of("llama")
    supernet.model.generation_config.temperature = 0.5
    supernet.model.generation_config.do_sample = False

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the subnet was extracted")

    monkeypatch.setattr(exporting, "extract", work)
    with pytest.raises(CheckpointError, match="does not write this generation config.*temperature") as caught:
        export(supernet, supernet.space.smallest(), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_export_keeps_every_modules_mode(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    supernet.model.train()
    supernet.model.bert.embeddings.eval()
    modes = [module.training for module in supernet.model.modules()]
    export(supernet, supernet.space.smallest(), tmp_path / "out")
    assert [module.training for module in supernet.model.modules()] == modes


def test_a_parents_folder_may_be_named_and_a_tokenizer_given(parents: dict[str, Path], tmp_path: Path) -> None:
    supernet = supernet_of("bert", "base")
    arch = point(supernet, ffn0=16)
    assert export(supernet, arch, tmp_path / "none").files == ()
    assert "tokenizer.json" in export(supernet, arch, tmp_path / "named", source=parents["bert"]).files
    assert "tokenizer.json" in export(supernet, arch, tmp_path / "given", tokenizer=tokenizer()).files
    assert not (tmp_path / "given" / "modules.json").exists()


def test_a_sentence_encoder_stays_one(parents: dict[str, Path], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    supernet = loaded(parents, "bert", skip=["layer"])
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16, num_hidden_layers=2)
    export(supernet, arch, tmp_path / "out")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts = ["w1 w2 w3", "w4 w5 w6"]
    ids = {
        "input_ids": transformers.AutoTokenizer.from_pretrained(parents["bert"])(texts, return_tensors="pt")[
            "input_ids"
        ]
    }
    mean = outputs(supernet, arch, **ids).mean(1)
    torch.testing.assert_close(
        torch.tensor(encoder.encode(texts)), mean / mean.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
    )
    padded = export(supernet, point(supernet, ffn0=16), tmp_path / "compact", loadability="remote-code")
    again = sentence_transformers.SentenceTransformer(str(padded.directory), device="cpu", trust_remote_code=True)
    wanted = outputs(supernet, point(supernet, ffn0=16), **ids).mean(1)
    torch.testing.assert_close(
        torch.tensor(again.encode(texts)), wanted / wanted.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
    )


def test_an_export_can_itself_be_made_elastic_and_exported_again(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    export(supernet, point(supernet, ffn0=24, ffn1=24, ffn2=24, heads0=1, heads1=1, heads2=1), tmp_path / "first")
    again = make_elastic(AutoModelForCausalLM.from_pretrained(tmp_path / "first"), ElasticConfig(intermediate_size=[8]))
    arch = again.space.smallest()
    export(again, arch, tmp_path / "second")
    feed = inputs(supernet.model)
    assert same(loaded_logits(AutoModelForCausalLM, tmp_path / "second", feed), outputs(again, arch, **feed))
    assert AutoConfig.from_pretrained(tmp_path / "second").intermediate_size == 8


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "choice"), ("bert", "qa"), ("gpt2", "token"), ("llama", "sequence")]
)
def test_other_heads_are_exported(family: str, head: str, tmp_path: Path) -> None:
    supernet = supernet_of(family, head, skip=["layer"])
    arch = point(supernet, ffn0=16)
    export(supernet, arch, tmp_path / "out")
    feed = inputs(supernet.model)
    if head == "choice":
        feed = {"input_ids": feed["input_ids"][:, None]}
    assert same(loaded_logits(class_of(family, head), tmp_path / "out", feed), outputs(supernet, arch, **feed))


def test_the_supernet_is_unchanged_by_an_export(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    supernet.model.train()
    supernet.model.config._name_or_path = "me/parent"
    state, config = {n: t.clone() for n, t in supernet.model.state_dict().items()}, supernet.model.config.to_dict()
    with supernet.activate(supernet.space.midpoint()):
        export(supernet, supernet.space.smallest(), tmp_path / "out")
        assert supernet.active == supernet.space.midpoint()
    assert supernet.model.training and supernet.model.config.to_dict() == config
    assert supernet.model.config._name_or_path == "me/parent"
    assert all(torch.equal(t, state[n]) for n, t in supernet.model.state_dict().items())
    assert json.loads((tmp_path / "out" / "architecture.json").read_text())["parent"] == "me/parent"
    assert "me/parent" not in (tmp_path / "out" / "config.json").read_text()


# -- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200, 20_000])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_nothing_and_keeps_the_old_export(old: bool, size: int, tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    if old:
        export(supernet, supernet.space.largest(), tmp_path / "out")
    before = tree(tmp_path)
    with disk_full_at(size), pytest.raises(CheckpointError, match="cannot write .*out.*; free space") as caught:
        export(supernet, supernet.space.midpoint(), tmp_path / "out", overwrite=True)
    assert "\n" not in str(caught.value) and tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if old else [])


def test_a_parent_with_broken_modules_leaves_nothing(parents: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "parent"
    source.mkdir()
    (source / "modules.json").write_text(json.dumps([TRANSFORMER, module("../secret")]))
    supernet = supernet_of("bert", "base")
    with pytest.raises(CheckpointError, match="not inside the checkpoint"):
        export(supernet, supernet.space.largest(), tmp_path / "out", source=source)
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


def test_the_folder_is_looked_at_before_any_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = supernet_of("bert")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the subnet was extracted")

    monkeypatch.setattr(exporting, "extract", work)
    for target, message in (("full", "is not empty"), ("file", "is a file"), ("file/out", "cannot write")):
        with pytest.raises(CheckpointError, match=message):
            export(supernet, supernet.space.largest(), tmp_path / target)


@pytest.mark.parametrize("error", [0.01, float("nan"), float("inf")])
def test_a_model_that_does_not_equal_the_subnet_is_not_written(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet, original = supernet_of("bert"), exporting.extract

    def spoiled(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model = original(*args, **kwargs)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias[0] += error
        return model

    monkeypatch.setattr(exporting, "extract", spoiled)
    with pytest.raises(ExportError, match="differs from the subnet by .*nothing was written") as caught:
        export(supernet, supernet.space.largest(), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arch", "options", "error", "message"),
    [
        (None, {}, ArchitectureError, "a NoneType is no architecture"),
        ({"layers.0.intermediate_size": 16}, {}, ArchitectureError, "no value for"),
        ("smallest", {"loadability": "stock"}, ExportError, "a 'stock' checkpoint cannot hold this architecture"),
        ("largest", {"loadability": "gguf"}, ExportError, "loadability='gguf' is not one of"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    arch: Any, options: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    supernet = supernet_of("bert")
    chosen = getattr(supernet.space, arch)() if isinstance(arch, str) else arch
    with pytest.raises(error, match=message):
        export(supernet, chosen, tmp_path / "deep" / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_architecture_of_another_supernet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="has no choice|no value for"):
        export(supernet_of("bert"), supernet_of("llama").space.largest(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_automodel_loads_the_body_of_a_stock_export(tmp_path: Path) -> None:
    supernet = supernet_of("bert")
    export(supernet, point(supernet, ffn0=16, ffn1=16, ffn2=16), tmp_path / "out")
    assert AutoModel.from_pretrained(tmp_path / "out").config.intermediate_size == 16


# -- a model that was made better -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_itself", [False, True])
@pytest.mark.parametrize("form", ["stock", "remote-code"])
def test_a_model_that_was_made_better_is_written_in_place_of_the_cut(
    form: Any, by_itself: bool, tmp_path: Path
) -> None:
    supernet = supernet_of("llama")
    arch = point(supernet, ffn0=16, ffn1=16, ffn2=16)
    better = extract(supernet, arch, loadability=form).eval()
    with torch.no_grad():
        better.get_input_embeddings().weight.mul_(1.5)
    export(supernet, arch, tmp_path / "out", loadability=None if by_itself else form, model=better)
    written = load_file(tmp_path / "out" / "model.safetensors")
    state = better.state_dict()
    assert written and all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    if form == "remote-code":
        assert (tmp_path / "out" / "modeling_elastic_llama.py").is_file()


def test_what_extract_returns_can_be_written_whatever_the_architecture(tmp_path: Path) -> None:
    """Of shapes that differ by layer ``extract`` makes a compact model, ``Supernet.loadability`` says padded."""
    supernet = supernet_of("llama")
    arch = point(supernet, ffn0=16)
    assert supernet.loadability(arch) == "stock-padded"
    report = export(supernet, arch, tmp_path / "out", model=extract(supernet, arch))
    assert report.loadability == "remote-code"
    assert str(report).startswith(f"{tmp_path / 'out'}: loads with trust_remote_code=True")


def test_a_model_of_another_architecture_or_class_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    supernet = supernet_of("llama")
    small, smaller = point(supernet, ffn0=16, ffn1=16, ffn2=16), point(supernet, ffn0=24, ffn1=24, ffn2=24)
    for wrong, form, words in (
        (smaller, "remote-code", "pass the architecture that the model was made for"),
        (small, "stock", "model is a LlamaForCausalLM, in this form the architecture is a ElasticLlamaForCausalLM"),
    ):
        model = extract(supernet, wrong, loadability=form)
        with pytest.raises(ExportError, match=words):
            export(supernet, small, tmp_path / "out", loadability="remote-code", model=model)
        assert list(tmp_path.iterdir()) == []
