"""Candidate blocks of the static models: sizes of the paper, forwards in a few lines of torch, embeddings, configs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_models import BLOCKS, FUSED, GROWN, TYPES, VOCABULARY, close, config_of, output, tiny, tokens
from torch import Tensor, nn
from transformers import MobileBertConfig
from transformers.models.mobilebert.modeling_mobilebert import MobileBertEmbeddings

from hf_elastic import extract, make_elastic
from hf_elastic.models import config_class, model_class
from hf_elastic.models.elastic_blocks import CandidateBlocks, NoNorm
from hf_elastic.models.elastic_layers import static_cache_shapes

# -- sizes ------------------------------------------------------------------------------------------------------------

WIDTHS = tuple(range(132, 793, 132))
PAPER = {  # reference/papers.md 1.2: millions of parameters at each width, H = 528, I = 132
    "standard": (1.259, 1.399, 1.538, 1.678, 1.818, 1.957),
    "bottleneck": (0.404, 0.439, 0.474, 0.509, 0.544, 0.579),
}
HIDDEN, INNER = 528, 132


def elm(kind: str, **changes: Any) -> Any:
    """A model of ELM's sizes without memory, whose layer ``l`` has all its blocks at the width ``132 (l + 1)``."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 792}
    if kind == "elastic_gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": 6, "n_head": 12, "n_inner": 792}
    widths = [[width] * len(BLOCKS) for width in WIDTHS]
    config = config_class(kind)(**{**sizes, "candidate_blocks": list(BLOCKS), "candidate_widths": widths, **changes})
    with torch.device("meta"):
        return model_class(kind, {"elastic_bert": "ElasticBertModel", "elastic_gpt2": "ElasticGPT2Model"}[kind])(config)


def sizes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Parameters of each block at each width, as the handle counts them."""
    parts = make_elastic(elm(kind)).block_parts
    return {block: tuple(part.parameters(block) for part in parts) for block in BLOCKS}


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def closed_form(kind: str, block: str, width: int) -> int:
    """Norms, attention and FFN, counted by hand."""
    bottleneck = block.startswith("bottleneck")
    inner = INNER if bottleneck else HIDDEN
    projections = 2 if "-" in block else 3
    total = projections * linear(HIDDEN, inner) + linear(inner, inner) + linear(inner, width) + linear(width, inner)
    if not bottleneck:
        return total + 4 * HIDDEN
    norms = 2 * (3 * INNER + HIDDEN) if kind == "elastic_bert" else 2 * (HIDDEN + INNER)
    return total + linear(HIDDEN, INNER) + linear(INNER, HIDDEN) + norms


def test_blocks_have_the_sizes_of_the_paper() -> None:
    found = sizes_of("elastic_bert")
    for block, millions in PAPER.items():
        assert tuple(round(count / 1e6, 3) for count in found[block]) == millions


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_have_the_sizes_of_closed_forms(kind: str) -> None:
    found = sizes_of(kind)
    assert found == {block: tuple(closed_form(kind, block, width) for width in WIDTHS) for block in BLOCKS}


@pytest.mark.parametrize("kind", TYPES)
def test_sharing_saves_one_projection_and_growth_costs_a_step_of_the_ffn(kind: str) -> None:
    found = sizes_of(kind)
    saved = {"standard": HIDDEN * HIDDEN + HIDDEN, "bottleneck": HIDDEN * INNER + INNER}
    steps = {"standard": 139_524, "bottleneck": 34_980}  # the sheet's 0.1396 M and 0.0350 M are of rounded sizes
    for family, shared in itertools.product(saved, ("-qv", "-kv")):
        assert {a - b for a, b in zip(found[family], found[family + shared], strict=True)} == {saved[family]}
    for block in BLOCKS:
        (step,) = {b - a for a, b in itertools.pairwise(found[block])}
        assert step == steps[block.partition("-")[0]]


def test_the_embedding_has_the_size_of_the_paper() -> None:
    model = elm("elastic_bert", vocab_size=30522, embedding_size=128, trigram_input=True, max_position_embeddings=512)
    assert sum(p.numel() for p in model.embeddings.parameters()) == 4_382_544


def test_a_width_that_is_asked_about_costs_what_it_then_costs() -> None:
    for kind in TYPES:
        part = make_elastic(tiny(kind, **FUSED)).block_parts[0]
        for block, width in itertools.product(BLOCKS, (1, 16, 48)):
            wanted = part.parameters_at(block, width)
            part.set_width(block, width)
            assert part.parameters(block) == wanted


def test_by_default_a_bottleneck_is_a_quarter_wide_and_its_heads_follow() -> None:
    config = config_of("elastic_bert", bottleneck_size=None)
    layer = tiny("elastic_bert", "base", bottleneck_size=None).encoder.layer[0].candidates["bottleneck"]
    assert config.bottleneck_head_dim == 2 and layer.bottleneck_in.out_features == 8


# -- forwards ---------------------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]


def norm(x: Tensor, p: Weights, name: str, *, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def affine(x: Tensor, p: Weights, name: str) -> Tensor:
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def dense(x: Tensor, p: Weights, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attend(query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax attention, head after head."""
    size, found = query.shape[-1] // heads, []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        scores = query[..., own] @ key[..., own].transpose(1, 2) * size**-0.5 * scale + mask
        found.append(scores.softmax(-1) @ value[..., own])
    return torch.cat(found, dim=-1)


def bert_block(p: Weights, x: Tensor, *, block: str, heads: int, mask: Tensor) -> Tensor:
    """Post-norm; a bottleneck in the way of MobileBERT, with one FFN and ReLU."""
    query, key = dense(x, p, "attention.self.query"), dense(x, p, "attention.self.key")
    value = {"qv": query, "kv": key}.get(block.partition("-")[2])
    value = dense(x, p, "attention.self.value") if value is None else value
    mixed = dense(attend(query, key, value, heads=heads, mask=mask), p, "attention.output.dense")
    if block.startswith("standard"):
        y = norm(mixed + x, p, "attention.output.LayerNorm", eps=1e-12)
        z = dense(nn.functional.gelu(dense(y, p, "intermediate.dense")), p, "output.dense")
        return norm(z + y, p, "output.LayerNorm", eps=1e-12)
    narrow = affine(dense(x, p, "bottleneck_in"), p, "bottleneck_in_norm")
    y = affine(mixed + narrow, p, "attention.output.LayerNorm")
    z = affine(dense(dense(y, p, "intermediate.dense").relu(), p, "output.dense") + y, p, "output.LayerNorm")
    return affine(dense(z, p, "bottleneck_out") + x, p, "bottleneck_out_norm")


def gpt2_block(p: Weights, x: Tensor, *, block: str, heads: int, mask: Tensor, scale: float = 1.0) -> Tensor:
    """Pre-norm; projections are stored transposed, those of attention side by side."""
    p = {name: t.T if t.ndim == 2 else t for name, t in p.items()}
    n = norm(x, p, "ln_1", eps=1e-5)
    parts = dense(n, p, "attn.c_attn").chunk(2 if "-" in block else 3, dim=-1)
    value = {"": parts[-1], "qv": parts[0], "kv": parts[1]}[block.partition("-")[2]]
    mixed = attend(parts[0], parts[1], value, heads=heads, mask=mask, scale=scale)
    bottleneck = block.startswith("bottleneck")
    y = dense(mixed, p, "attn.c_proj") + (dense(n, p, "c_in") if bottleneck else x)
    inner = dense(norm(y, p, "ln_2", eps=1e-5), p, "mlp.c_fc")
    z = y + dense(inner.relu() if bottleneck else nn.functional.gelu(inner, approximate="tanh"), p, "mlp.c_proj")
    return x + dense(z, p, "c_out") if bottleneck else z


ORACLES: dict[str, Callable[..., Tensor]] = {"elastic_bert": bert_block, "elastic_gpt2": gpt2_block}
NAMES = {
    "elastic_bert": (("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
                     "intermediate.dense", "output.dense"),
    "elastic_gpt2": (("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}  # fmt: skip


def cut_by_hand(kind: str, layer: nn.Module, *, width: int, heads: Any) -> tuple[Weights, int]:
    """Weights of a block of which some neurons and heads are in use, and into how many heads they are split."""
    p = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    entering, leaving, ffn_in, ffn_out = NAMES[kind]
    outputs, inputs = (0, 1) if kind == "elastic_bert" else (1, 0)
    first = torch.arange(width)
    p[f"{ffn_in}.weight"] = p[f"{ffn_in}.weight"].index_select(outputs, first)
    p[f"{ffn_in}.bias"], p[f"{ffn_out}.weight"] = p[f"{ffn_in}.bias"][:width], p[f"{ffn_out}.weight"].index_select(
        inputs, first
    )
    if not isinstance(heads, list):
        return p, heads or 4
    whole = p[f"{leaving}.weight"].shape[inputs]
    size = whole // 4
    kept = torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])
    p[f"{leaving}.weight"] = p[f"{leaving}.weight"].index_select(inputs, kept)
    for name in entering:
        if f"{name}.bias" in p:
            own = torch.cat([kept + start for start in range(0, len(p[f"{name}.bias"]), whole)])
            p[f"{name}.weight"] = p[f"{name}.weight"].index_select(outputs, own)
            p[f"{name}.bias"] = p[f"{name}.bias"][own]
    return p, len(heads)


def layers_of(kind: str, model: Any) -> Any:
    return model.base_model.encoder.layer if kind == "elastic_bert" else model.base_model.h


def masks(kind: str, length: int) -> Tensor:
    """What is added to scores: of the encoder one padded token at the end, of the decoder the future."""
    if kind == "elastic_gpt2":
        return torch.full((length, length), -1e9).triu(1)
    mask = torch.zeros(length, length)
    mask[:, -1] = -1e9
    return mask


IN_USE = [(48, None), (20, None), (48, [1, 3]), (48, 2), (9, [0, 1, 3]), (16, 1)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", TYPES)
def test_a_block_computes_what_a_few_lines_of_torch_compute(kind: str, block: str) -> None:
    model = tiny(kind)
    part = make_elastic(model).block_parts[1]
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    mask = masks(kind, 7)
    for width, heads in IN_USE:
        part.set_width(block, width)
        part.set_heads(block, heads)
        layer = part.module(block)
        weights, count = cut_by_hand(kind, layer, width=width, heads=heads)
        with torch.no_grad():
            wanted = ORACLES[kind](weights, x, block=block, heads=count, mask=mask)
            got = layer(x, attention_mask=mask[None, None])
        assert close(got, wanted), (width, heads)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("flags", [{"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
                                   {"scale_attn_weights": False}])  # fmt: skip
def test_blocks_of_gpt2_keep_its_ways_to_scale_scores(block: str, flags: dict[str, bool]) -> None:
    model = tiny("elastic_gpt2", attn_implementation="eager", **flags)
    part = make_elastic(model).block_parts[2]
    x, mask = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3)), masks("elastic_gpt2", 7)
    for heads in (None, 2):
        part.set_heads(block, heads)
        size = part.shape_of(block).head_dim
        scale = 1 / 3 if "reorder_and_upcast_attn" in flags else size**0.5
        weights, count = cut_by_hand("elastic_gpt2", part.module(block), width=48, heads=heads)
        with torch.no_grad():
            wanted = gpt2_block(weights, x, block=block, heads=count, mask=mask, scale=scale)
            assert close(part.module(block)(x, attention_mask=mask[None, None]), wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_every_attention_implementation_computes_the_same(kind: str) -> None:
    for block in BLOCKS:
        shared = {"candidate_blocks": None, "block": block, "seed": 4}
        wanted = output(tiny(kind, attn_implementation="eager", **shared))
        assert close(output(tiny(kind, attn_implementation="sdpa", **shared)), wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_hidden_states_and_attentions_are_those_of_the_active_blocks(kind: str) -> None:
    supernet = make_elastic(tiny(kind, "base", attn_implementation="eager", **FUSED))
    for architecture in (supernet.space.largest(), supernet.space.smallest()):
        with supernet.activate(architecture), torch.no_grad():
            found = supernet.model(input_ids=tokens(), output_hidden_states=True, output_attentions=True)
        heads = [shape.num_attention_heads for shape in supernet.block_shapes(architecture)]
        assert [a.shape for a in found.attentions] == [(2, count, 9, 9) for count in heads]
        assert [h.shape for h in found.hidden_states] == [(2, 9, 32)] * 4


def test_a_model_starts_as_its_family_starts() -> None:
    for kind, small in (("elastic_bert", 0.02), ("elastic_gpt2", 0.02 / 6**0.5)):
        sizes = {"hidden_size": 256} if kind == "elastic_bert" else {"n_embd": 256}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(kind, {"elastic_bert": "ElasticBertModel", "elastic_gpt2": "ElasticGPT2Model"}[kind])(
                config_of(kind, **sizes, bottleneck_size=64)
            )
        names = ("output.dense", "bottleneck_out", "c_proj", "c_out")
        for name, module in model.named_modules():
            if isinstance(module, NoNorm):
                assert bool((module.weight == 1).all()) and not bool(module.bias.any())
            elif name.endswith(names):
                assert abs(float(module.weight.detach().std()) / small - 1) < 0.1, name
            elif name.endswith(("query", "c_attn", "c_fc", "c_in", "bottleneck_in")):
                assert abs(float(module.weight.detach().std()) / 0.02 - 1) < 0.1 and not bool(module.bias.any()), name


def test_of_equal_candidates_the_first_is_active_as_in_the_space() -> None:
    model = tiny("elastic_bert", candidate_blocks=["bottleneck", "standard-kv", "standard-qv"])
    supernet = make_elastic(model)
    assert {m.active for m in model.modules() if isinstance(m, CandidateBlocks)} == {"standard-kv"}
    assert set(supernet.space.largest().values()) == {"standard-kv"}


# -- embeddings, head, padding ----------------------------------------------------------------------------------------


def test_trigrams_are_embedded_as_google_s_mobilebert_embeds_them() -> None:
    ours = tiny("elastic_bert", "base", embedding_size=8, trigram_input=True, layer_norm_eps=1e-5).embeddings
    google = MobileBertEmbeddings(MobileBertConfig(
        vocab_size=VOCABULARY, hidden_size=32, embedding_size=8, trigram_input=True, max_position_embeddings=32,
        normalization_type="layer_norm", hidden_dropout_prob=0.0,
    )).eval()  # fmt: skip
    google.load_state_dict(ours.state_dict())
    ids, kinds = tokens(), torch.randint(0, 2, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert close(ours(ids, token_type_ids=kinds), google(ids, token_type_ids=kinds), tolerance=1e-6)
        assert close(ours(inputs_embeds=ours.word_embeddings(ids)), google(ids), tolerance=1e-6)
        assert close(ours(ids[:, :1]), google(ids[:, :1]), tolerance=1e-6)  # one token has no neighbours


def test_words_of_another_size_are_mapped_in_and_out_with_one_table() -> None:
    model = tiny("elastic_bert", embedding_size=8)
    p = model.state_dict()
    words = p["bert.embeddings.word_embeddings.weight"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        hidden = model.bert(input_ids=tokens()).last_hidden_state
        head = {name.removeprefix("cls.predictions."): t for name, t in p.items()}
        inner = nn.functional.gelu(dense(hidden, head, "transform.dense"))
        wanted = norm(inner, head, "transform.LayerNorm", eps=1e-12) @ words.T + head["bias"]
        assert close(model(input_ids=tokens()).logits, wanted)
        embedded = dense(words[tokens()], p, "bert.embeddings.embedding_transformation")
        embedded = embedded + p["bert.embeddings.position_embeddings.weight"][:9]
        embedded = embedded + p["bert.embeddings.token_type_embeddings.weight"][0]
        wanted = norm(embedded, p, "bert.embeddings.LayerNorm", eps=1e-12)
        assert close(model.bert.embeddings(tokens()), wanted)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert output(model).shape == (2, 9, VOCABULARY + 4)


def padded(model: Any, *, left: bool, extra: int = 3) -> tuple[Tensor, Tensor]:
    """Outputs of a row alone, and of the same row beside a longer one."""
    short, long = tokens(batch=1, length=6), tokens(batch=1, length=6 + extra, seed=7)
    filler = torch.zeros(1, extra, dtype=torch.long)
    row = torch.cat([filler, short] if left else [short, filler], dim=1)
    ids, mask = torch.cat([row, long]), torch.ones(2, 6 + extra, dtype=torch.long)
    mask[0] = row[0] != 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else {}
    both = output(model, input_ids=ids, attention_mask=mask, **positions)
    return output(model, input_ids=short)[0], both[0][mask[0].bool()]


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_in_a_padded_batch_is_the_row_alone(kind: str) -> None:
    supernet = make_elastic(tiny(kind, "base", **FUSED))
    for block in BLOCKS:
        with supernet.activate(dict.fromkeys(supernet.space.names, block)):
            for left in {kind == "elastic_gpt2", True}:
                alone, beside = padded(supernet.model, left=left)
                assert close(beside, alone), (block, left)


def test_a_row_with_trigrams_in_a_padded_batch_is_the_row_alone_whatever_padding_is_embedded_as() -> None:
    model = tiny("elastic_bert", "base", embedding_size=8, trigram_input=True)
    assert model.embeddings.word_embeddings.weight[0].abs().max() > 0  # as the tied output trains it
    for left in (False, True):
        for extra in (1, 4):
            alone, beside = padded(model, left=left, extra=extra)
            assert close(beside, alone), (left, extra)


# -- configs ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"block": "mobile"}, "block 'mobile' is unknown; allowed: standard, standard-qv, "),
    ({"candidate_blocks": ["standard", "wide"]}, "block 'wide' is unknown; allowed: standard, "),
    ({"candidate_blocks": []}, r"candidate_blocks=\[\] must name at least one block, each once"),
    ({"candidate_blocks": ["standard"] * 2}, "must name at least one block, each once"),
    ({"candidate_blocks": None, "per_layer_config": {1: {"block": "x"}}}, "block 'x' is unknown; allowed: "),
    ({"candidate_widths": [[0] * 6] * 3}, "candidate_widths lie between 1 and .*=48, which is allocated; got 0 to 0"),
    ({"candidate_widths": [[49] * 6] * 3}, "candidate_widths lie between 1 and .*=48, .* got 49 to 49"),
    ({"candidate_widths": [[8] * 6] * 2}, r"candidate_widths needs one list per layer \(3\) with an entry for each"),
    ({"candidate_widths": [[8] * 5] * 3}, r"candidate_widths needs one list per layer \(3\) with an entry for each"),
    ({"candidate_heads": [[None] * 6] * 4}, r"candidate_heads needs one list per layer \(3\) with an entry for each"),
    ({"candidate_blocks": None, "candidate_widths": [[8]] * 3}, r"candidate_widths needs .* candidate_blocks \(None\)"),
    ({"candidate_heads": [[[1, 0]] * 6] * 3}, r"an ascending list of heads below 4, .* got \[1, 0\]"),
    ({"candidate_heads": [[[4]] * 6] * 3}, r"an ascending list of heads below 4, .* got \[4\]"),
    ({"candidate_heads": [[[]] * 6] * 3}, r"an ascending list of heads below 4, .* got \[\]"),
    ({"candidate_heads": [[0] * 6] * 3}, "a number up to 4 that divides their 32 dimensions; got 0"),
    ({"candidate_heads": [[5] * 6] * 3}, "a number up to 4 that divides their 32 dimensions; got 5"),
    ({"candidate_heads": [[3] * 6] * 3}, "a number up to 4 that divides their 32 dimensions; got 3"),
    ({"bottleneck_size": 3}, "a bottleneck of 3 dimensions has no room for 4 heads; set bottleneck_size, or fewer"),
    ({"bottleneck_size": 0}, "a bottleneck of 0 dimensions has no room for 4 heads"),
    ({"per_layer_config": {0: {"intermediate_size": 8}}}, "candidate_blocks says sizes by .* leave out per_layer_conf"),
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_config_of_blocks_that_cannot_be_is_refused_in_one_line(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        config_of(kind, **changes)
    reason = caught.value.__cause__ or caught.value
    assert isinstance(reason, ValueError) and "\n" not in str(reason)


@pytest.mark.parametrize("kind", TYPES)
def test_a_config_of_blocks_survives_json(kind: str, tmp_path: Any) -> None:
    config = config_of(kind, **FUSED)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert (again.candidate_widths, again.candidate_heads) == (GROWN["candidate_widths"], FUSED["candidate_heads"])
    assert again.candidate_blocks == list(BLOCKS) and again.bottleneck_head_dim == 4


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}])
def test_a_static_cache_takes_the_shapes_of_the_blocks_that_are_active(options: dict[str, int]) -> None:
    supernet = make_elastic(tiny("elastic_gpt2", **FUSED))
    feed = {"attention_mask": torch.ones(2, 9, dtype=torch.long), "max_new_tokens": 4, "do_sample": False}
    for architecture in (supernet.space.largest(), supernet.space.smallest(), supernet.space.midpoint()):
        for model in (supernet.model, extract(supernet, architecture)):
            with supernet.activate(architecture):
                wanted = model.generate(tokens(), **feed)
                assert torch.equal(model.generate(tokens(), **feed, cache_implementation="static", **options), wanted)


def test_the_shapes_of_a_preallocated_cache_follow_the_blocks() -> None:
    blocks = {0: {"block": "bottleneck", "num_attention_heads": 2}, 2: {"num_attention_heads": 3}}
    config = config_of("elastic_gpt2", candidate_blocks=None, per_layer_config=blocks)
    assert static_cache_shapes(config) == ([2, 4, 3], [4, 8, 8])
