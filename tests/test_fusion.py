"""Head fusion in supernets of blocks: twins that a test plants, CKA of contexts that it records, parts it counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from block_models import BLOCKS, LAYERS, TYPES, close, output, output_of, path, supernet_of, tiny, tokens
from torch import Tensor, nn

import hf_elastic.fusion
from hf_elastic import FusionReport, Supernet, costs, extract, make_elastic
from hf_elastic.errors import CompressionError, DataError, ElasticError, UnsupportedModelError
from hf_elastic.fusion import fuse_heads_
from hf_elastic.head_similarity import Samples

ALIKE = 0.9999  # twins are, others are not
SOME = 0.35  # some heads of these random models are
FEW = ["standard", "standard-qv", "bottleneck-kv"]
TOLERANCE = {"merge": 1e-5, "remove": 1e-5}
DROPOUTS: dict[str, dict[str, float]] = {
    "elastic_bert": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "elastic_gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
}
SIX_HEADS: dict[str, dict[str, Any]] = {
    "elastic_bert": {"hidden_size": 24, "num_attention_heads": 6, "bottleneck_size": 12},
    "elastic_gpt2": {"n_embd": 24, "n_head": 6, "bottleneck_size": 12, "scale_attn_by_inverse_layer_idx": True},
}


def texts(*, batches: int = 3, padded: bool = False) -> list[dict[str, Tensor]]:
    """Batches with labels; with ``padded``, some sequences are shorter, and their padding is anything."""
    made = []
    for number in range(batches):
        ids = tokens(batch=8, length=12, seed=10 + number)
        made.append({"input_ids": ids, "labels": ids})
        if padded:
            made[-1]["attention_mask"] = (torch.arange(12) < 12 - torch.arange(8)[:, None] % 5).long()
    return made


def head_views(module: Any, head: int) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Rows (d, D_in) and biases of each projection of a head, and its columns (D_out, d) of the output."""
    if "attention" in dict(module.named_children()):
        attention, size = module.attention, module.attention.self.config_head_size
        here = slice(head * size, (head + 1) * size)
        named = {name: p for name, p in attention.self.named_children() if isinstance(p, nn.Linear)}
        return {n: (p.weight[here], p.bias[here]) for n, p in named.items()}, attention.output.dense.weight[:, here]
    size, fused = module.attn.config_head_size, module.attn.c_attn
    names = ("query", "key") if fused.shared else ("query", "key", "value")
    starts = [number * fused.nf // len(names) + head * size for number in range(len(names))]
    views = {n: (fused.weight.t()[s : s + size], fused.bias[s : s + size]) for n, s in zip(names, starts, strict=True)}
    return views, module.attn.c_proj.weight.t()[:, head * size : (head + 1) * size]


@torch.no_grad()
def plant(supernet: Supernet, first: int, second: int, *, turned: bool = True, beside: float = 0.0) -> None:
    """Makes the second head of every block say what the first says, in other coordinates; its output is its own.

    With ``beside`` a context stands by so much beside the first, where the value has a bias of its own.
    """
    generator = torch.Generator().manual_seed(5)
    for part in supernet.block_parts:
        for block in part.blocks:
            (views, out), (others, _) = (head_views(part.module(block), head) for head in (first, second))
            turn, other = torch.linalg.qr(torch.randn(2, out.shape[1], out.shape[1], generator=generator))[0]
            turns = {
                "": {"query": other, "key": other, "value": 1.7 * turn},
                "qv": {"query": 1.7 * turn, "key": turn / 1.7},
                "kv": {"query": turn / 1.7, "key": 1.7 * turn},
            }[block.partition("-")[2]]
            for name, (weight, bias) in views.items():
                matrix = turns[name] if turned else torch.eye(len(weight))
                others[name][0].copy_(matrix @ weight)
                others[name][1].copy_(matrix @ bias + (beside if name == "value" else 0))


def block_paths(supernet: Supernet) -> list[Any]:
    return [path(supernet, block) for block in supernet.block_parts[0].blocks]


def groups_of(report: FusionReport) -> set[tuple[tuple[int, ...], ...]]:
    return {entry.groups for entry in report.layers}


def heads_of(supernet: Supernet) -> list[Any]:
    return [part.heads[block] for part in supernet.block_parts for block in part.blocks]


def contexts_of(supernet: Supernet, architecture: Any, *, feed: Mapping[str, Tensor]) -> list[Tensor]:
    """What enters the output projection of each layer, (B, T, H·d), float64."""
    found: list[Tensor] = []
    hooks = [
        part.projection(part.chosen(architecture), part.roles.attention_out).register_forward_pre_hook(
            lambda module, inputs: found.append(inputs[0].double())
        )
        for part in supernet.block_parts
    ]
    output_of(supernet, architecture, **feed)
    for hook in hooks:
        hook.remove()
    return found


# --- heads that say the same


@pytest.mark.parametrize("turned", [False, True], ids=["copied", "turned"])
@pytest.mark.parametrize("mode", ["merge", "remove"])
@pytest.mark.parametrize("kind", TYPES)
def test_one_of_three_heads_that_say_the_same_writes_for_all_in_every_block(kind: str, mode: Any, turned: bool) -> None:
    supernet = supernet_of(kind, **DROPOUTS[kind])
    for second in (2, 3):
        plant(supernet, 0, second, turned=turned, beside=0.5 if mode == "remove" else 0.0)
    before = [output_of(supernet, architecture) for architecture in block_paths(supernet)]
    supernet.model.train()
    report = fuse_heads_(supernet, texts(), mode=mode, threshold=ALIKE)
    assert supernet.model.training and all(module.training for module in supernet.model.modules())
    supernet.model.eval()
    assert groups_of(report) == {((0, 2, 3), (1,))}
    assert heads_of(supernet) == [[0, 1]] * LAYERS * len(BLOCKS)
    for architecture, wanted in zip(block_paths(supernet), before, strict=True):
        assert close(output_of(supernet, architecture), wanted, tolerance=TOLERANCE[mode]), architecture
        small = extract(supernet, architecture)
        assert small.config.num_attention_heads == 2
        assert close(output(small), wanted, tolerance=TOLERANCE[mode]), architecture


@pytest.mark.parametrize("mode", ["merge", "remove"])
@pytest.mark.parametrize("kind", TYPES)
def test_so_it_is_where_every_layer_is_one_block_of_its_own(kind: str, mode: Any) -> None:
    layers = {0: {"block": "standard-kv"}, 1: {"block": "bottleneck-qv"}, 2: {"block": "standard"}}
    supernet = supernet_of(kind, candidate_blocks=None, per_layer_config=layers)
    plant(supernet, 1, 3)
    wanted = output(supernet.model)
    report = fuse_heads_(supernet, texts(), mode=mode, threshold=ALIKE)
    assert [entry.block for entry in report.layers] == ["standard-kv", "bottleneck-qv", "standard"]
    assert groups_of(report) == {((0,), (1, 3), (2,))}
    assert close(output(supernet.model), wanted, tolerance=TOLERANCE[mode])
    assert close(output(extract(supernet, supernet.space.largest())), wanted, tolerance=TOLERANCE[mode])
    whole = type(supernet.model)(supernet.model.config).eval()  # as a checkpoint of a Trainer is read
    whole.load_state_dict(supernet.model.state_dict())
    assert close(output(whole), wanted, tolerance=TOLERANCE[mode])


@pytest.mark.parametrize("kind", TYPES)
def test_heads_that_are_not_alike_stay_bit_equal(kind: str) -> None:
    supernet = supernet_of(kind)
    before, space = copy.deepcopy(supernet.model.state_dict()), supernet.space
    report = fuse_heads_(supernet, texts(), threshold=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.model.state_dict().items())
    assert heads_of(supernet) == [None] * LAYERS * len(BLOCKS)
    assert supernet.model.config.candidate_heads is None and supernet.space == space
    assert report.loss_after == report.loss_before and report.parameters_after == report.parameters_before
    assert "72 heads became 72, 0.0%" in str(report) and "none has heads so much alike" in str(report)


# --- which heads are alike


def cka_of_tokens(contexts: Tensor, *, heads: int) -> Tensor:
    """||X^T Y||² / (||X^T X|| ||Y^T Y||) of centred features (N, H·d), pair by pair."""
    split = (contexts - contexts.mean(0)).chunk(heads, dim=1)
    pairs = [[(x.t() @ y).square().sum() / ((x.t() @ x).norm() * (y.t() @ y).norm()) for y in split] for x in split]
    return torch.tensor(pairs, dtype=torch.float64)


def cka_of_sequences(batches: list[Tensor], *, heads: int) -> Tensor:
    """From the means over batches (B, T, H·d) of the biased HSIC of doubly centred Gram matrices."""
    hsic = torch.zeros(heads, heads, dtype=torch.float64)
    for batch in batches:
        size = len(batch)
        centre = torch.eye(size, dtype=torch.float64) - 1 / size
        grams = [centre @ x.flatten(1) @ x.flatten(1).t() @ centre for x in batch.chunk(heads, dim=2)]
        hsic += torch.tensor([[(k * m).sum() for m in grams] for k in grams]) / (size - 1) ** 2
    return hsic / torch.outer(hsic.diagonal(), hsic.diagonal()).sqrt()


def greedy(cka: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    taken: set[int] = set()
    groups = []
    for first in range(len(cka)):
        if first not in taken:
            alike = {k for k in range(first, len(cka)) if k not in taken and (k == first or cka[first, k] > threshold)}
            groups.append(tuple(sorted(alike)))
            taken |= alike
    return tuple(groups)


@pytest.mark.parametrize("samples", ["tokens", "sequences"])
@pytest.mark.parametrize("kind", TYPES)
def test_groups_are_those_of_contexts_that_the_test_records_without_padding(kind: str, samples: Samples) -> None:
    supernet, data = supernet_of(kind), texts(padded=True)
    wanted: dict[tuple[int, str], Tensor] = {}
    for shift in range(len(BLOCKS)):  # as the documentation of fuse_heads_ lays down
        named = [BLOCKS[(layer + shift) % len(BLOCKS)] for layer in range(LAYERS)]
        runs = [contexts_of(supernet, path(supernet, *named), feed=batch) for batch in data]
        masks = [batch["attention_mask"].bool() for batch in data]
        for layer, block in enumerate(named):
            seen = [run[layer] for run in runs]
            if samples == "tokens":
                rows = torch.cat([context[mask] for context, mask in zip(seen, masks, strict=True)])
                wanted[layer, block] = cka_of_tokens(rows, heads=4)
            else:
                real = [context * mask[..., None] for context, mask in zip(seen, masks, strict=True)]
                wanted[layer, block] = cka_of_sequences(real, heads=4)
    above = torch.cat([cka[torch.triu(torch.ones(4, 4), 1).bool()] for cka in wanted.values()]).sort().values
    threshold = float(above[53:55].mean())  # half of the pairs are alike, none just so
    report = fuse_heads_(supernet, data, mode="resplit", samples=samples, threshold=threshold, min_heads=1)
    assert len(groups_of(report)) > 3 and len(report.layers) == LAYERS * len(BLOCKS)
    for entry in report.layers:
        torch.testing.assert_close(entry.cka, wanted[entry.layer, entry.block], rtol=1e-5, atol=1e-6)
        assert entry.groups == greedy(wanted[entry.layer, entry.block], threshold)
        largest = max(n for n in range(1, len(entry.groups) + 1) if 32 % n == 0)
        assert (entry.before, entry.after) == (4, largest)


@pytest.mark.parametrize("kind", TYPES)
def test_several_batches_say_what_one_says_and_padding_nothing(kind: str) -> None:
    first = texts(batches=1, padded=True)[0]
    other = {**first, "input_ids": first["input_ids"].where(first["attention_mask"].bool(), torch.tensor(7))}
    many = [{name: value[start : start + 3] for name, value in other.items()} for start in (0, 3, 6)]
    reports, models = [], []
    for data in ([first], many):
        supernet = supernet_of(kind, candidate_blocks=FEW)
        reports.append(fuse_heads_(supernet, data, threshold=SOME, min_heads=1))
        models.append(supernet.model.state_dict())
    assert [entry.groups for entry in reports[0].layers] == [entry.groups for entry in reports[1].layers]
    assert any(entry.after < entry.before for entry in reports[0].layers)
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-3, atol=1e-5)


# --- heads that are split anew


@pytest.mark.parametrize("kind", TYPES)
def test_resplit_makes_fewer_wider_heads_of_the_same_weights_as_a_static_model_has_them(kind: str) -> None:
    supernet = supernet_of(kind, **SIX_HEADS[kind])
    plant(supernet, 0, 4)
    before, whole = copy.deepcopy(supernet.model.state_dict()), costs.total_parameters(supernet, supernet.active)
    report = fuse_heads_(supernet, texts(), mode="resplit", threshold=ALIKE)
    assert groups_of(report) == {((0, 4), (1,), (2,), (3,), (5,))}
    assert {entry.after for entry in report.layers} == {4}  # five heads do not divide 24 or 12 dimensions
    assert report.parameters_after == report.parameters_before
    assert costs.total_parameters(supernet, supernet.active) == whole
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.model.state_dict().items())
    for architecture in block_paths(supernet):
        block = architecture["layers.0.block"]
        size = {"bottleneck_head_dim": 3} if str(block).startswith("bottleneck") else {"head_dim": 6}
        per_layer = {layer: {"num_attention_heads": 4, **size} for layer in range(LAYERS)}
        changes = {**SIX_HEADS[kind], "candidate_blocks": None, "block": block, "per_layer_config": per_layer}
        static = tiny(kind, seed=1, **changes)
        inner = f".candidates.{block}."
        static.load_state_dict({n.replace(inner, "."): t for n, t in before.items() if inner in n or ".cand" not in n})
        wanted = output(static)
        assert torch.equal(output_of(supernet, architecture), wanted)
        assert close(output(extract(supernet, architecture)), wanted, tolerance=1e-6)
        with supernet.activate(architecture):
            assert supernet.measured(input_ids=tokens()) == supernet.expected(architecture)
            assert supernet.expected(architecture)["layers.1.num_attention_heads"] == 4


@pytest.mark.parametrize("mode", ["resplit", "merge"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_supernet_comes_back_with_its_heads(kind: str, mode: Any, tmp_path: Path) -> None:
    supernet = supernet_of(kind, candidate_blocks=FEW)
    fuse_heads_(supernet, texts(), mode=mode, threshold=SOME, min_heads=1)
    supernet.save_pretrained(tmp_path / "saved")
    again = Supernet.from_pretrained(tmp_path / "saved")
    assert heads_of(again) == heads_of(supernet) and any(heads_of(again))
    assert again.space == supernet.space
    for architecture in block_paths(supernet):
        assert torch.equal(output_of(again, architecture), output_of(supernet, architecture))


@pytest.mark.parametrize("mode", ["resplit", "merge"])
def test_decoding_step_by_step_with_a_cache_gives_what_one_forward_gives(mode: Any) -> None:
    supernet = supernet_of("elastic_gpt2")
    report = fuse_heads_(supernet, texts(), mode=mode, threshold=SOME, min_heads=1)
    assert len({entry.after for entry in report.layers}) > 1
    ids, mask = tokens(length=8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for architecture in [*block_paths(supernet), path(supernet, *BLOCKS)]:
        whole = output_of(supernet, architecture, input_ids=ids, attention_mask=mask, position_ids=positions)
        pieces, cache = [], None
        with supernet.activate(architecture), torch.no_grad():
            for start, stop in [(0, 4), *((n, n + 1) for n in range(4, 8))]:
                found = supernet.model(
                    input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                    position_ids=positions[:, start:stop], use_cache=True,
                )  # fmt: skip
                pieces, cache = [*pieces, found.logits], found.past_key_values
        real = mask.bool()
        assert close(torch.cat(pieces, dim=1)[real], whole[real])
        keys = [cache.layers[layer].keys.shape for layer in range(LAYERS)]
        shapes = supernet.block_shapes(architecture)
        assert [(k[1], k[3]) for k in keys] == [(s.num_attention_heads, s.head_dim) for s in shapes]


# --- what is reported


@pytest.mark.parametrize("mode", ["merge", "remove", "resplit"])
@pytest.mark.parametrize("kind", TYPES)
def test_parameters_losses_and_costs_are_those_that_a_test_counts(kind: str, mode: Any) -> None:
    supernet, data = supernet_of(kind, candidate_blocks=FEW), texts(padded=True)

    def counted() -> tuple[int, float]:
        numbers, losses = 0, []
        for shift in range(len(FEW)):
            architecture = path(supernet, *(FEW[(layer + shift) % len(FEW)] for layer in range(LAYERS)))
            small: Any = extract(supernet, architecture)
            layers = small.bert.encoder.layer if kind == "elastic_bert" else small.transformer.h
            numbers += sum(parameter.numel() for parameter in layers.parameters())
            with torch.no_grad():
                losses += [float(small(**batch).loss) for batch in data]
            assert costs.total_parameters(supernet, architecture) == sum(p.numel() for p in small.parameters())
            alone = make_elastic(small)
            only = alone.space.largest()
            for cost in (costs.macs, costs.kv_cache_bytes):
                assert cost(supernet, architecture, seq_len=7) == cost(alone, only, seq_len=7)
            with supernet.activate(architecture):
                assert supernet.measured(input_ids=tokens()) == supernet.expected(architecture)
        return numbers, sum(losses) / len(losses)

    before = counted()
    report = fuse_heads_(supernet, data, mode=mode, threshold=SOME, min_heads=1)
    after = counted()
    assert (report.parameters_before, report.parameters_after) == (before[0], after[0])
    assert (after[0] < before[0]) == (mode != "resplit")
    assert report.loss_before == pytest.approx(before[1], rel=1e-5)
    assert report.loss_after == pytest.approx(after[1], rel=1e-5)
    assert supernet.active == supernet.space.largest()


def test_the_report_says_what_was_done_and_draws_the_matrices() -> None:
    supernet = supernet_of("elastic_bert", candidate_blocks=["standard", "bottleneck"])
    plant(supernet, 0, 1)
    report = fuse_heads_(supernet, texts(), threshold=ALIKE)
    first, layers, loss = str(report).splitlines()
    share = 1 - report.parameters_after / report.parameters_before
    assert 0 < share < 0.5
    head = "head fusion (merge, CKA above 0.9999): 24 heads became 18"
    assert first == f"{head}, {share:.1%} of the parameters of the layers are gone"
    assert layers.startswith("  layers: 0 (standard): 4 -> 3, 0 (bottleneck): 4 -> 3, 1 (standard): 4 -> 3")
    assert loss == f"  loss: {report.loss_before:.4f} before, {report.loss_after:.4f} afterwards, before training"
    drawn = report.figure()
    assert [list(map(list, trace.z)) for trace in drawn.data] == [entry.cka.tolist() for entry in report.layers]
    assert [note.text for note in drawn.layout.annotations][:3] == [
        "layer 0, standard", "layer 0, bottleneck", "layer 1, standard",
    ]  # fmt: skip
    unlabelled = fuse_heads_(supernet, [{"input_ids": tokens(batch=8)}], threshold=1)
    assert unlabelled.loss_before is None and len(str(unlabelled).splitlines()) == 2


# --- once more


@pytest.mark.parametrize(("mode", "again"), [("merge", "merge"), ("remove", "remove"), ("merge", "remove")])
@pytest.mark.parametrize("kind", TYPES)
def test_heads_that_stayed_can_be_fused_again(kind: str, mode: Any, again: Any) -> None:
    supernet = supernet_of(kind, candidate_blocks=FEW)
    plant(supernet, 0, 1)
    fuse_heads_(supernet, texts(), mode=mode, threshold=ALIKE)
    plant(supernet, 2, 3)
    before = [output_of(supernet, architecture) for architecture in block_paths(supernet)]
    report = fuse_heads_(supernet, texts(), mode=again, threshold=ALIKE)
    assert groups_of(report) == {((0,), (1, 2))}  # places among the three that stayed
    assert heads_of(supernet) == [[0, 2]] * LAYERS * len(FEW)
    for architecture, wanted in zip(block_paths(supernet), before, strict=True):
        assert close(output_of(supernet, architecture), wanted, tolerance=TOLERANCE[again])
        assert close(output(extract(supernet, architecture)), wanted, tolerance=TOLERANCE[again])


def test_heads_that_were_split_anew_can_be_so_again_and_go_on_where_all_their_weights_are_heads() -> None:
    supernet = supernet_of("elastic_bert", **SIX_HEADS["elastic_bert"])
    fuse_heads_(supernet, texts(), mode="resplit", threshold=SOME, min_heads=1)
    first = [entry if entry is not None else 6 for entry in heads_of(supernet)]
    report = fuse_heads_(supernet, texts(), mode="resplit", threshold=0.1, min_heads=1)
    assert [entry.before for entry in report.layers] == first
    second = [entry if entry is not None else 6 for entry in heads_of(supernet)]
    assert [entry.after for entry in report.layers] == second != first


@pytest.mark.parametrize("kind", TYPES)
def test_a_cut_of_another_kind_waits_for_an_extraction(kind: str) -> None:
    cuts = (("resplit", ("merge", "remove"), "was split anew before"), ("merge", ("resplit",), "lost heads before"))
    for mode, others, message in cuts:
        supernet = supernet_of(kind, candidate_blocks=["standard", "bottleneck-kv"])
        plant(supernet, 0, 1)
        fuse_heads_(supernet, texts(), mode=mode, threshold=ALIKE)
        plant(supernet, 0, 2, turned=False)
        for other in others:
            with pytest.raises(CompressionError, match=message):
                fuse_heads_(supernet, texts(), mode=other, threshold=0.01, min_heads=1)
            assert not fuse_heads_(supernet, texts(), mode=other, threshold=1).layers[0].after < 2
        small = make_elastic(extract(supernet, path(supernet, "bottleneck-kv")))
        report = fuse_heads_(small, texts(), mode=others[0], threshold=0.01, min_heads=1)
        assert {entry.after for entry in report.layers} == {1}
        assert output(extract(small, small.space.largest())).isfinite().all()


# --- what is refused, and errors half-way


def state_of(supernet: Supernet) -> tuple[Any, ...]:
    model = supernet.model
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    modes = [module.training for module in model.modules()]
    return heads_of(supernet), model.config.to_dict(), supernet.active, supernet.space, hooks, modes


def assert_untouched(supernet: Supernet, attempt: Callable[[], object], *, error: Any, match: str) -> None:
    before, weights = state_of(supernet), copy.deepcopy(supernet.model.state_dict())
    with pytest.raises(error, match=match) as raised:
        attempt()
    assert not isinstance(raised.value, ElasticError) or "\n" not in str(raised.value)
    assert state_of(supernet) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in supernet.model.state_dict().items())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown mode": ({"mode": "average"}, CompressionError, "allowed: resplit, merge, remove"),
    "unknown samples": ({"samples": "words"}, CompressionError, "allowed: tokens, sequences"),
    "merging by sequences": ({"samples": "sequences"}, CompressionError, "samples='tokens'"),
    "a threshold of 0": ({"threshold": 0.0}, CompressionError, "above 0 and at most 1"),
    "a threshold above 1": ({"threshold": 1.5}, CompressionError, "above 0 and at most 1"),
    "no heads at all": ({"min_heads": 0}, CompressionError, "at least 1"),
    "fewer heads than are wanted": ({"threshold": 0.01}, CompressionError, "allow it by min_heads=1"),
    "no batches": ({"batches": []}, DataError, "at least one"),
    "no tensors": ({"batches": [{"input_ids": [[1, 2]]}]}, DataError, "dict of tensors"),
    "a single token": ({"batches": [{"input_ids": torch.tensor([[5]])}]}, DataError, "a single token"),
    "one sequence": (
        {"batches": [{"input_ids": tokens(batch=1)}], "samples": "sequences", "mode": "resplit"}, DataError, "two",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_fused_is_refused_in_one_line_and_nothing_changes(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    supernet = supernet_of("elastic_gpt2", candidate_blocks=["standard", "bottleneck"])
    supernet.model.train()
    options: Any = {"batches": texts(), **changes}
    assert_untouched(supernet, lambda: fuse_heads_(supernet, **options), error=error, match=match)


def test_models_without_heads_to_fuse_or_numbers_to_compare_are_refused() -> None:
    supernet = supernet_of("elastic_bert")
    with torch.no_grad():
        supernet.block_parts[1].projection("standard", "attention.self.value").bias[0] = torch.inf
    with pytest.raises(DataError, match="NaN or infinity"):
        fuse_heads_(supernet, texts())
    with pytest.raises(UnsupportedModelError, match="one head"):
        fuse_heads_(supernet_of("elastic_bert", num_attention_heads=1), texts())
    with pytest.raises(UnsupportedModelError, match=r"hf_elastic\.fuse_heads"):
        fuse_heads_(tiny_models.supernet_of("bert"), texts())


def test_a_block_of_one_head_stands_beside_others() -> None:
    layers = {1: {"num_attention_heads": 1, "head_dim": 32}}
    supernet = supernet_of("elastic_bert", candidate_blocks=None, per_layer_config=layers)
    report = fuse_heads_(supernet, texts(), threshold=SOME, min_heads=1)
    assert [entry.before for entry in report.layers] == [4, 1, 4]
    assert report.layers[1].after == 1 and report.layers[1].cka.tolist() == [[1.0]]


@pytest.mark.parametrize("place", ["merge_heads", "remove_heads", "_mean_loss"])
@pytest.mark.parametrize("earlier", [False, True], ids=["whole", "fused before"])
@pytest.mark.parametrize("kind", TYPES)
def test_an_error_half_way_leaves_weights_and_heads_as_they_were(
    kind: str, *, earlier: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = supernet_of(kind, candidate_blocks=["standard-kv", "bottleneck"])
    if earlier:
        plant(supernet, 0, 1)
        fuse_heads_(supernet, texts(batches=1), threshold=ALIKE)
    plant(supernet, 2, 3)
    supernet.set_active(path(supernet, "bottleneck"))
    real, calls = vars(hf_elastic.fusion)[place], count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt("half-way")
        return real(*args, **kwargs)

    monkeypatch.setattr(hf_elastic.fusion, place, interrupted)
    options: dict[str, Any] = {"mode": "remove" if place == "remove_heads" else "merge", "threshold": ALIKE}
    attempt = lambda: fuse_heads_(supernet, texts(), **options)  # noqa: E731
    assert_untouched(supernet, attempt, error=KeyboardInterrupt, match="half-way")
    monkeypatch.undo()
    report = fuse_heads_(supernet, texts(batches=1), **options)
    assert all(entry.after == entry.before - 1 for entry in report.layers)
    assert supernet.active == path(supernet, "bottleneck")


@pytest.mark.parametrize(("mode", "least", "left"), [("merge", 3, 3), ("remove", 2, 2), ("resplit", 3, 4)])
def test_a_fusion_that_stops_keeps_the_heads_that_are_least_like_the_first(mode: Any, least: int, left: int) -> None:
    supernet = supernet_of("elastic_bert")
    report = fuse_heads_(supernet, texts(), mode=mode, threshold=0.001, min_heads=least, too_few="stop")
    for entry in report.layers:
        assert (entry.before, entry.after, entry.alike) == (4, left, 1)
        assert len(entry.groups) == least
        (group,) = [group for group in entry.groups if len(group) > 1]
        inside, outside = group[1:], [other[0] for other in entry.groups if len(other) == 1]
        assert group[0] == 0 and min(entry.cka[0, list(inside)]) >= max(entry.cka[0, outside])
    count = len(report.layers)
    assert f"stopped at min_heads in {count} of {count} blocks: 0 (standard): {left} instead of 1" in str(report)
    with pytest.raises(CompressionError, match="allow it by min_heads=1"):
        fuse_heads_(supernet_of("elastic_bert"), texts(), mode=mode, threshold=0.001, min_heads=least)
    with pytest.raises(CompressionError, match="too_few='keep' is unknown; allowed: raise, stop"):
        fuse_heads_(supernet, texts(), too_few="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TYPES)
def test_a_config_says_how_weights_were_split_and_loads_so(kind: str, tmp_path: Path) -> None:
    parts = {0: {"block": "bottleneck"}, 2: {"block": "standard-kv"}}
    supernet = supernet_of(kind, candidate_blocks=None, per_layer_config=parts)
    fuse_heads_(supernet, texts(), mode="resplit", threshold=0.001, min_heads=1)
    supernet.model.save_pretrained(tmp_path)
    loaded = type(supernet.model).from_pretrained(tmp_path).eval()
    assert close(output(loaded), output(supernet.model))
    again = make_elastic(loaded)
    assert [shape.num_attention_heads for shape in again.block_shapes(again.space.largest())] == [1, 1, 1]
    small = extract(supernet, supernet.space.largest())
    assert close(output(small), output(supernet.model))
