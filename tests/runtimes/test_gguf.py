"""GGUF: transformers' own reader and llama.cpp itself as oracles; what they do not hold is refused with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import MIXED, byte_tokenizer, mixed_folder, sentencepiece_like, stock_folder
from tiny_checkpoints import decoder_tokenizer, sentence_encoder
from tiny_models import DECODER, point, supernet_of, tiny, tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hf_elastic import ExportError, extract
from hf_elastic.models import config_class, model_class
from hf_elastic.runtimes import export_gguf, runs_where_folder
from hf_elastic.runtimes.gguf_layouts import gguf_layout
from hf_elastic.runtimes.gguf_tensors import interleaved, rope_factors
from hf_elastic.runtimes.gguf_vocabulary import BYTE, CONTROL, CUTS, UNUSED, vocabulary_of

gguf = pytest.importorskip("gguf")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors of a file, by gguf's own reader."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_transformers_reads_the_file_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, family)
    export_gguf(folder, tmp_path / "out", precision="f32", vocabulary=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny(family)(ids).logits)


@pytest.mark.parametrize(("precision", "off"), [("f16", 2e-3), ("q8_0", 0.05)])
def test_coarser_weights_give_nearly_the_same_logits(precision: Any, off: float, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, "llama", hidden_size=64, intermediate_size=96)
    report = export_gguf(folder, tmp_path / "out", precision=precision, vocabulary=False)
    assert report.finer == ()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = tiny("llama", hidden_size=64, intermediate_size=96)(ids).logits
        gap = float((loaded(ids).logits - wanted).abs().max() / wanted.abs().max())
    assert 0 < gap < off


def test_rows_that_hold_no_whole_blocks_stay_finer_and_are_named(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, "llama")  # FFN width 48
    report = export_gguf(folder, tmp_path / "out", precision="q8_0", vocabulary=False)
    assert report.finer == tuple(f"blk.{layer}.ffn_down.weight" for layer in range(3))
    assert "no multiple of 32" in str(report)


def test_deci_holds_the_sizes_of_each_layer(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, "llama", skip2="mlp")
    report = export_gguf(folder, tmp_path / "out", precision="f32", vocabulary=False)
    fields, tensors = read(tmp_path / "out")
    assert report.architecture == fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [2, 0, 4] and fields["deci.attention.head_count_kv"] == [1, 0, 2]
    assert fields["deci.feed_forward_length"] == [16, 48, 32]
    assert "blk.1.attn_q.weight" not in tensors
    assert not tensors["blk.2.ffn_down.weight"].any()  # deci cannot leave out an FFN alone
    assert any("zeros" in note for note in report.notes)


def test_a_first_layer_without_attention_is_filled_and_a_skipped_one_left_out(tmp_path: Path) -> None:
    layers = {0: {"skip": ["attention"]}, 1: {"skip": ["attention", "mlp"]}}
    config = config_class("elastic_llama")(**DECODER, per_layer_config=layers)
    model = model_class("elastic_llama", "ElasticLlamaForCausalLM")(config).eval()
    export_gguf(model, tmp_path / "out", precision="f32", vocabulary=False)
    fields, tensors = read(tmp_path / "out")
    assert fields["deci.block_count"] == 2 and fields["deci.attention.head_count"] == [2, 4]
    assert not tensors["blk.0.attn_output.weight"].any() and tensors["blk.0.ffn_down.weight"].any()
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 9, 7]])).logits[0].numpy()
    assert np.abs(decoder_of(fields, tensors, [5, 9, 7]) - wanted).max() < 1e-4


def decoder_of(fields: dict[str, Any], tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """llama.cpp's ``deci`` written in NumPy: what its source says, layer by layer; logits of all tokens."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        eps = fields["deci.attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[name]

    def turned(x: np.ndarray) -> np.ndarray:  # (T, H, head_dim): pairs are neighbours
        size, places = x.shape[-1], np.arange(len(x))[:, None, None]
        angles = places * fields["deci.rope.freq_base"] ** -(np.arange(0, size, 2) / size)
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = [even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)]
        return np.stack(pairs, -1).reshape(x.shape)

    def times(x: np.ndarray, name: str) -> np.ndarray:
        bias = tensors.get(f"{name}.bias")
        return x @ tensors[f"{name}.weight"].T + (0 if bias is None else bias)

    stream, size = tensors["token_embd.weight"][ids], fields["deci.attention.key_length"]
    for layer in range(fields["deci.block_count"]):
        heads, groups = (fields[f"deci.attention.head_count{kind}"][layer] for kind in ("", "_kv"))
        if heads:
            normed = norm(stream, f"blk.{layer}.attn_norm.weight")
            query = turned(times(normed, f"blk.{layer}.attn_q").reshape(len(ids), heads, size))
            key = turned(times(normed, f"blk.{layer}.attn_k").reshape(len(ids), groups, size))
            value = times(normed, f"blk.{layer}.attn_v").reshape(len(ids), groups, size)
            key, value = (np.repeat(x, heads // groups, axis=1) for x in (key, value))
            scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(size)
            scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(len(ids), heads * size)
            stream = stream + times(mixed, f"blk.{layer}.attn_output")
        assert fields["deci.feed_forward_length"][layer], "deci drops the attention of a layer without FFN"
        normed = norm(stream, f"blk.{layer}.ffn_norm.weight")
        gate = times(normed, f"blk.{layer}.ffn_gate")
        inner = gate / (1 + np.exp(-gate)) * times(normed, f"blk.{layer}.ffn_up")
        stream = stream + times(inner, f"blk.{layer}.ffn_down")
    output = "output" if "output.weight" in tensors else "token_embd"
    return times(norm(stream, "output_norm.weight"), output)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("changes", [{}, {"skip2": "mlp"}, {"skip0": "attention", "skip1": "none"}])
def test_what_llamacpp_computes_of_unequal_layers_are_torchs_logits(
    family: str, changes: dict[str, str], tmp_path: Path
) -> None:
    folder = mixed_folder(tmp_path, family, **changes)
    report = export_gguf(folder, tmp_path / "out", precision="f32", vocabulary=False)
    assert report.architecture == "deci"
    ids = [5, 17, 3, 42, 8]
    with torch.no_grad():
        wanted = extract_like(family, changes)(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(decoder_of(*read(tmp_path / "out"), ids) - wanted).max() < 1e-4


def extract_like(family: str, changes: dict[str, str]) -> Any:
    supernet = supernet_of(family)
    return extract(supernet, point(supernet, **{**MIXED, **changes}), loadability="remote-code")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_names_and_orientations_of_the_others_are_llamacpps(family: str, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path, family, "lm" if family == "gpt2" else "base")
    export_gguf(folder, tmp_path / "out", precision="f32", vocabulary=False)
    fields, tensors = read(tmp_path / "out")
    assert fields["general.architecture"] == family and fields[f"{family}.block_count"] == 3
    # rows are outputs, as llama.cpp multiplies
    assert tensors["blk.0.ffn_up.weight"].shape == (48, 32) and tensors["blk.0.ffn_down.weight"].shape == (32, 48)
    state = tiny(family, "lm" if family == "gpt2" else "base").state_dict()
    if family == "gpt2":
        assert np.array_equal(tensors["blk.1.attn_qkv.weight"], state["transformer.h.1.attn.c_attn.weight"].T.numpy())
    else:
        assert np.array_equal(
            tensors["blk.1.attn_k.weight"], state["encoder.layer.1.attention.self.key.weight"].numpy()
        )
        assert fields["bert.attention.causal"] is False and fields["bert.pooling_type"] == 1


def test_interleaving_brings_the_halves_of_a_head_together() -> None:
    rows = np.arange(12.0)[:, None]  # two heads of six
    assert interleaved(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_frequencies_of_llama_3_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=512)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    found = rope_factors(config, head_dim=32)
    assert found is not None and len(set(found.tolist())) > 2
    assert np.allclose(plain / found, LlamaRotaryEmbedding(config).inv_freq.numpy(), rtol=1e-5)


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("bert", "sequence", {}, "takes the encoder that embeds text"),
    ("bert", "base", {"hidden_act": "relu"}, "bert has gelu"),
    ("llama", "base", {}, "no language-model head"),
    ("llama", "lm", {"hidden_act": "gelu"}, "llama.cpp has silu"),
    ("gpt2", "lm", {"scale_attn_by_inverse_layer_idx": True}, "size of a head alone"),
    ("distilbert", "base", {}, "no GGUF of a distilbert"),
]


@pytest.mark.parametrize(("family", "head", "changes", "said"), REFUSED)
def test_what_llamacpp_does_not_hold_is_refused_with_the_reason(
    family: str, head: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = tiny(family, head, **changes)
    with pytest.raises(ExportError, match=said):
        export_gguf(model, tmp_path / "out", vocabulary=False)
    assert not (tmp_path / "out").exists()


def test_per_layer_shapes_beyond_deci_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="loadability='stock-padded'"):
        export_gguf(mixed_folder(tmp_path / "a", "gpt2"), tmp_path / "out", vocabulary=False)
    with pytest.raises(ExportError, match="no norm on queries and keys"):
        export_gguf(mixed_folder(tmp_path / "b", "qwen3"), tmp_path / "out", vocabulary=False)


def test_a_sliding_window_ends_the_context() -> None:
    layout = gguf_layout(tiny("mistral").config, "MistralForCausalLM")
    assert layout.context == 5 and "sliding window" in layout.notes[0]


def test_ways_of_cutting_text_have_llamacpps_names_or_are_refused() -> None:
    assert vocabulary_of(byte_tokenizer(), size=300).cut == "gpt-2"
    for pattern, name in CUTS.items():
        assert vocabulary_of(byte_tokenizer(pattern), size=300).cut == name
    with pytest.raises(ExportError, match="has no name in llama.cpp; vocabulary=False"):
        vocabulary_of(byte_tokenizer(r"\w+"), size=300)
    with pytest.raises(ExportError, match="no tokenizer of kind WordLevel"):
        vocabulary_of(tokenizer(), size=300)
    with pytest.raises(ExportError, match="no list of no merges"):
        vocabulary_of(decoder_tokenizer(), size=300)
    with pytest.raises(ExportError, match="the model 10 embeddings"):
        vocabulary_of(byte_tokenizer(), size=10)


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.Lowercase(), "AB"),
        (normalizers.NFKC(), "\uff41b"),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Replace("b", "a")]), "bb"),
    ],
)
def test_bytes_that_a_normalizer_changes_are_refused(normalizer: Any, text: str) -> None:
    plain, made = byte_tokenizer(), byte_tokenizer()
    made.backend_tokenizer.normalizer = normalizer
    assert made(text).input_ids != plain(text).input_ids  # llama.cpp, which changes no text, would give the plain ids
    with pytest.raises(ExportError, match="changes text before it is cut .* vocabulary=False"):
        vocabulary_of(made, size=300)


def test_composing_accents_is_noted_as_what_llamacpp_leaves(tmp_path: Path) -> None:
    plain, made = byte_tokenizer(), byte_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen2's tokenizers have it
    assert made("ab \u00e9").input_ids == plain("ab \u00e9").input_ids  # composed already
    assert made("e\u0301").input_ids != plain("e\u0301").input_ids
    assert vocabulary_of(plain, size=300).notes == ()
    report = export_gguf(tiny("llama", vocab_size=300), tmp_path / "out", tokenizer=made)
    assert any("NFC" in note for note in report.notes) and "NFC" in str(report)


def test_sentencepiece_puts_underscores_for_spaces_and_nothing_else() -> None:
    before, metaspace = sentencepiece_like().backend_tokenizer.normalizer, pre_tokenizers.Metaspace
    accepted = [
        (before, None, True),
        (normalizers.Replace(" ", "\u2581"), None, False),
        (None, metaspace(prepend_scheme="never", split=False), False),
        (None, metaspace(prepend_scheme="first", split=False), True),
    ]
    for normalizer, cut, prefixes in accepted:
        made = sentencepiece_like()
        made.backend_tokenizer.normalizer, made.backend_tokenizer.pre_tokenizer = normalizer, cut
        found = vocabulary_of(made, size=270)
        assert found.flags["add_space_prefix"] is prefixes and bool(found.notes) is (prefixes and cut is not None)
    refused = [
        (normalizers.Sequence([normalizers.NFKC(), before]), None),
        (normalizers.Replace(" ", "_"), None),
        (before, pre_tokenizers.Digits()),
        (None, metaspace(split=True)),
        (None, None),
    ]
    for normalizer, cut in refused:
        made = sentencepiece_like()
        made.backend_tokenizer.normalizer, made.backend_tokenizer.pre_tokenizer = normalizer, cut
        with pytest.raises(ExportError, match="makes each space an underscore and changes nothing else"):
            vocabulary_of(made, size=270)


def test_wordpiece_that_keeps_accents_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    for changes in ({}, {"strip_accents": False}, {"handle_chinese_chars": False}, {"lowercase": False}):
        backend.normalizer = normalizers.BertNormalizer(**{"lowercase": True, **changes})
        made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        if not changes:
            assert vocabulary_of(made, size=8).model == "bert"
            continue
        with pytest.raises(ExportError, match="for WordPiece, and this one does not"):
            vocabulary_of(made, size=8)


POOLINGS = {
    "mean": 1, "cls": 2, "lasttoken": 3, "max": None, "mean_sqrt_len_tokens": None, "weightedmean": None,
    ("cls", "mean"): None,
}  # fmt: skip


@pytest.mark.parametrize("mode", POOLINGS)
def test_llamacpp_pools_as_sentence_transformers_or_not_at_all(mode: Any, tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = sentence_encoder(tmp_path / "sentences")
    modules.Pooling(32, pooling_mode=mode).save(str(folder / "1_Pooling"))
    row = runs_where_folder(folder)["GGUF / llama.cpp"]
    if (number := POOLINGS[mode]) is None:
        with pytest.raises(ExportError, match="pools tokens by one of mean, cls, lasttoken, not by"):
            export_gguf(folder, tmp_path / "out", vocabulary=False)
        assert row.answer == "no" and "pools tokens" in row.reason and not (tmp_path / "out").exists()
        return
    export_gguf(folder, tmp_path / "out", vocabulary=False)
    assert read(tmp_path / "out")[0]["bert.pooling_type"] == number and row.answer == "yes"


def test_flags_of_older_poolings_are_read(tmp_path: Path) -> None:
    export_gguf(sentence_encoder(tmp_path / "cls", pooling="cls"), tmp_path / "out", vocabulary=False)
    assert read(tmp_path / "out")[0]["bert.pooling_type"] == 2
    with pytest.raises(ExportError, match="not by max"):
        export_gguf(sentence_encoder(tmp_path / "max", pooling="max"), tmp_path / "other", vocabulary=False)


def test_a_dense_layer_behind_the_pooling_is_refused(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "sentences")
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[2] |= {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(ExportError, match="llama.cpp has no Dense behind the states"):
        export_gguf(folder, tmp_path / "out", vocabulary=False)


def test_scores_of_sentencepiece_follow_the_order_of_merges(tmp_path: Path) -> None:
    found = vocabulary_of(sentencepiece_like(), size=270)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["ab"] > scores["\u2581a"] > scores["abc"] > scores["\u2581ab"] > scores["a"]
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert kinds["<0x0A>"] == BYTE and kinds["<s>"] == CONTROL and kinds["[PAD269]"] == UNUSED
    assert found.flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert found.special == {"bos": 1, "eos": 2, "unknown": 0}
    model = tiny("llama", vocab_size=270)
    report = export_gguf(model, tmp_path / "out", tokenizer=sentencepiece_like())
    fields, _ = read(tmp_path / "out")
    assert report.vocabulary == fields["tokenizer.ggml.model"] == "llama"
    assert (
        fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
        and len(fields["tokenizer.ggml.tokens"]) == 270
    )


def test_a_model_without_a_tokenizer_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="vocabulary=False"):
        export_gguf(tiny("llama"), tmp_path / "out")
