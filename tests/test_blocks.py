"""Supernets of candidate blocks: promises, costs, exact search, folders, sizes that change, what they are not for."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import (
    BLOCKS,
    EVERY_HEAD,
    FUSED,
    GROWN,
    SHAPES,
    TYPES,
    close,
    config_of,
    output,
    output_of,
    path,
    supernet_of,
    tiny,
    tokens,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hf_elastic as he
from hf_elastic import Architecture, Supernet, UnsupportedModelError, costs, extract, make_elastic, objectives, testing
from hf_elastic.models.elastic_blocks import SlicedLinear
from hf_elastic.pipeline import CompressOptions
from hf_elastic.proxies.zerolm_table import ZeroLMTable
from hf_elastic.report import describe_folder
from hf_elastic.search import Objective, SearchResult, search_subnets
from hf_elastic.tables.additive import layer_table
from hf_elastic.tables.budgets import Budgets, Workload, memory_bytes
from hf_elastic.testing import Case
from tests.search.additive import brute_forced_front

# -- promises ---------------------------------------------------------------------------------------------------------

AUTO = {
    ("elastic_bert", "lm"): AutoModelForMaskedLM,
    ("elastic_bert", "sequence"): AutoModelForSequenceClassification,
    ("elastic_gpt2", "lm"): AutoModelForCausalLM,
}


def case_of(kind: str, head: str, shape: str, *, sampled: int = 1) -> Case:
    return Case(lambda: tiny(kind, head, **SHAPES[shape]), None, sampled=sampled)


CHEAP = [check for check in testing.PROMISES if check is not testing.check_gradients_stay_inside]


@pytest.mark.parametrize("promise", CHEAP, ids=lambda check: check.__name__)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "head"), AUTO)
def test_blocks_keep_every_promise(kind: str, head: str, shape: str, promise: Callable[[Case], None]) -> None:
    promise(case_of(kind, head, shape, sampled=3 if (head, shape) == ("lm", "fused") else 1))


@pytest.mark.parametrize(
    ("kind", "head", "shape"),
    [("elastic_bert", "sequence", "fused"), ("elastic_gpt2", "lm", "fused")],
)
def test_gradients_and_decay_stay_inside_what_is_in_use(kind: str, head: str, shape: str) -> None:
    testing.check_gradients_stay_inside(case_of(kind, head, shape, sampled=0))


def test_blocks_with_dropout_recompute_alike_under_gradient_checkpointing() -> None:
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    testing.check_sampling_is_pure(Case(lambda: tiny("elastic_bert", **dropout, **FUSED), None))


def test_gradient_checkpointing_runs_the_active_block_twice() -> None:
    supernet = supernet_of("elastic_bert")
    supernet.model.gradient_checkpointing_enable()
    supernet.model.train()
    calls: list[int] = []
    with supernet.activate(path(supernet, "bottleneck-qv")):
        for part in supernet.block_parts:
            part.projection("bottleneck-qv", "attention.self.query").register_forward_hook(lambda *_: calls.append(1))
        supernet.model(input_ids=tokens()).logits.sum().backward()
    assert len(calls) == 2 * len(supernet.block_parts)


def _patched(patch: pytest.MonkeyPatch) -> None:
    original = SlicedLinear.forward
    patch.setattr(SlicedLinear, "forward", lambda self, x: original(self, x) * (1.01 if self.columns else 1))


def test_a_path_that_differs_from_its_static_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _patched(monkeypatch)
    with pytest.raises(AssertionError, match="^promise 1: the path .* differs from its static model"):
        testing.check_largest_is_parent(case_of("elastic_bert", "lm", "fused"))


# -- each path is the static model of its own config ------------------------------------------------------------------

PATHS = [("standard-qv", "bottleneck-kv", "standard"), ("bottleneck", "standard-kv", "bottleneck-qv")]


def cut_by_hand(name: str, tensor: torch.Tensor, *, width: int, kept: list[int], parts: int) -> torch.Tensor:
    """What a static layer has of a weight of a candidate; ``parts`` is 0 in BERT, whose projections are not fused."""
    transposed = parts > 0 and tensor.ndim == 2
    tensor = tensor.T if transposed else tensor
    if name.startswith(("attention.self.", "attn.c_attn.")):
        step = tensor.shape[0] // max(parts, 1)
        tensor = torch.cat([tensor[[start + row for row in kept]] for start in range(0, tensor.shape[0], step)])
    elif name in ("attention.output.dense.weight", "attn.c_proj.weight"):
        tensor = tensor[:, kept]
    elif name.startswith(("intermediate.dense.", "mlp.c_fc.")):
        tensor = tensor[:width]
    elif name in ("output.dense.weight", "mlp.c_proj.weight"):
        tensor = tensor[:, :width]
    return tensor.T if transposed else tensor


def static_by_hand(kind: str, head: str, shape: str, *, blocks: Sequence[str]) -> PreTrainedModel:
    """A model of one block per layer from a config written here, with the weights of a supernet by their names."""
    stated = {"candidate_widths": [[48] * 6] * 3, "candidate_heads": [[None] * 6] * 3, **SHAPES[shape]}
    per_layer: dict[int, dict[str, Any]] = {}
    cuts: dict[int, dict[str, Any]] = {}
    for number, block in enumerate(blocks):
        place = BLOCKS.index(block)
        width, heads = stated["candidate_widths"][number][place], stated["candidate_heads"][number][place]
        own = heads if isinstance(heads, list) else [0, 1, 2, 3]
        count = heads if isinstance(heads, int) else len(own)
        size, field = (4, "bottleneck_head_dim") if block.startswith("bottleneck") else (8, "head_dim")
        per_layer[number] = {
            "block": block, "intermediate_size": width, "num_attention_heads": count, field: len(own) * size // count,
        }  # fmt: skip
        parts = 0 if kind == "elastic_bert" else 2 if "-" in block else 3
        kept = [number * size + i for number in own for i in range(size)]
        cuts[number] = {"width": width, "kept": kept, "parts": parts}
    made = AUTO[kind, head].from_config(config_of(kind, candidate_blocks=None, per_layer_config=per_layer)).eval()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tiny(kind, head, **SHAPES[shape]).state_dict().items():
        before, _, inside = name.partition(".candidates.")
        block, _, rest = inside.partition(".")
        number = int(before.rpartition(".")[2]) if inside else 0
        if not inside:
            weights[name] = tensor
        elif block == blocks[number]:
            weights[f"{before}.{rest}"] = cut_by_hand(rest, tensor, **cuts[number])
    made.load_state_dict(weights)
    return made


@pytest.mark.parametrize("blocks", PATHS, ids=str)
@pytest.mark.parametrize("shape", ["whole", "fused"])
@pytest.mark.parametrize(("kind", "head"), AUTO)
def test_a_path_equals_the_static_model_of_its_config(
    kind: str, head: str, shape: str, blocks: tuple[str, ...]
) -> None:
    supernet = supernet_of(kind, head, **SHAPES[shape])
    static = static_by_hand(kind, head, shape, blocks=blocks)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    for feed in ({"input_ids": tokens()}, {"input_ids": tokens(), "attention_mask": mask}):
        got, wanted = output_of(supernet, path(supernet, *blocks), **feed), output(static, **feed)
        kept = mask.bool() if wanted.ndim == 3 and len(feed) == 2 else ...
        assert close(got[kept], wanted[kept])
    ours, theirs = (
        {n: p.shape for n, p in m.named_parameters()} for m in (extract(supernet, path(supernet, *blocks)), static)
    )
    assert ours == theirs


# -- costs ------------------------------------------------------------------------------------------------------------


def points(supernet: Supernet, *, count: int = 4) -> list[Architecture]:
    rng, space = random.Random(0), supernet.space
    return [space.largest(), space.midpoint(), space.smallest(), *(space.sample(rng) for _ in range(count))]


def counted(model: PreTrainedModel, ids: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("kind", "head"), EVERY_HEAD)
def test_macs_equal_half_the_counted_flops_of_an_eager_forward(kind: str, head: str) -> None:
    words = {"embedding_size": 8, "trigram_input": True} if kind == "elastic_bert" and head != "lm" else {}
    supernet = supernet_of(kind, head, attn_implementation="eager", **FUSED, **words)
    for point in points(supernet, count=1):
        with supernet.activate(point):
            wanted = counted(supernet.model, tokens(batch=3, length=4))
        assert costs.macs(supernet, point, seq_len=4, batch_size=3) == wanted
        model = extract(supernet, point)
        assert costs.macs(supernet, point, seq_len=9, batch_size=2) == counted(model, tokens())


@pytest.mark.parametrize(("kind", "head"), EVERY_HEAD)
def test_parameters_equal_those_of_the_extracted_model(kind: str, head: str) -> None:
    supernet = supernet_of(kind, head, **(GROWN if head == "lm" else FUSED))
    for point in points(supernet, count=2):
        model = extract(supernet, point)
        tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        total = sum(p.numel() for p in model.parameters())
        assert costs.total_parameters(supernet, point) == total
        assert costs.parameters(supernet, point) == total - sum(tables.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["whole", "fused"])
def test_kv_cache_and_memory_equal_those_of_the_extracted_model(shape: str, dtype: torch.dtype) -> None:
    supernet = make_elastic(tiny("elastic_gpt2", **SHAPES[shape]).to(dtype))
    for point in points(supernet):
        model = extract(supernet, point)
        with torch.no_grad():
            cache = model(input_ids=tokens(), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        assert costs.kv_cache_bytes(supernet, point, seq_len=9, batch_size=2) == held
        assert memory_bytes(supernet, point, workload=Workload(2, 9)) == weights + held
        goal = objectives.memory(supernet, batch_size=2, seq_len=9, dtype=torch.float16)
        assert goal(point) == goal.additive.value(point) == (weights + held) * 2 // dtype.itemsize
    encoder = supernet_of("elastic_bert")
    largest = encoder.space.largest()
    assert costs.kv_cache_bytes(encoder, largest, seq_len=9) == 0
    assert memory_bytes(encoder, largest) == 4 * costs.total_parameters(encoder, largest)


@pytest.mark.parametrize("kind", TYPES)
def test_the_front_of_an_additive_objective_is_the_brute_forced_one(kind: str) -> None:
    supernet = supernet_of(kind, **FUSED)
    rng, known = random.Random(0), {}

    def damage(part: Any, block: str) -> float:
        return known.setdefault((part.index, block), rng.random())

    table = layer_table(supernet, block=damage, constant=1.0)
    goals = [
        Objective("damage", table.value, additive=table, related=lambda: objectives.related_costs(supernet)),
        objectives.parameters(supernet), objectives.macs(supernet, seq_len=8), objectives.memory(supernet, seq_len=8),
    ]  # fmt: skip
    for chosen in (goals[:2], [goals[0], goals[2], goals[3]]):
        result = search_subnets(supernet.space, chosen, algorithm="exact", progress=False)
        found = {tuple(e.values[goal.name] for goal in chosen) for e in result.front}
        assert found == brute_forced_front(supernet.space, chosen)
        assert SearchResult.from_json(result.to_json()) == result
    within = {"parameters": 0.7, "total_parameters": 0.9, "macs": 0.8}
    (best,) = search_subnets(supernet.space, goals[:1], algorithm="exact", within=within, progress=False).front
    limits = objectives.related_costs(supernet)
    most = {name: share * limits[name](supernet.space.largest()) for name, share in within.items()}
    allowed = [a for a in supernet.space.architectures() if all(limits[n](a) <= most[n] for n in within)]
    assert best.values["damage"] == pytest.approx(min(table.value(a) for a in allowed))


def test_printing_says_what_paths_cost() -> None:
    supernet = supernet_of("elastic_gpt2", **GROWN)
    text, (low, high) = str(supernet), (supernet.space.smallest(), supernet.space.largest())
    small, large = (costs.count(costs.parameters(supernet, point)) for point in (low, high))
    assert "216 from 3 choices" in text and f"{small} to {large} without embeddings" in text and "remote-code" in text


def test_a_fingerprint_tells_heads_apart_that_cost_the_same() -> None:
    supernet = supernet_of("elastic_bert")
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    prints = set()
    for heads in (None, 2, [0, 1], [2, 3]):
        supernet.block_parts[0].set_heads("standard", heads)
        supernet.resized()
        prints.add(objectives.loss(supernet, batches).fingerprint)
    assert len(prints) == 4


# -- folders, copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "head", "shape"),
    [("elastic_bert", "lm", "grown"), ("elastic_bert", "sequence", "fused"), ("elastic_gpt2", "lm", "fused"),
     ("elastic_gpt2", "base", "whole")],
)
def test_a_saved_supernet_is_restored_bit_equal(kind: str, head: str, shape: str, tmp_path: Path) -> None:
    supernet = supernet_of(kind, head, **SHAPES[shape])
    with supernet.activate(supernet.space.smallest()):
        supernet.save_pretrained(tmp_path / "saved")
    again = Supernet.from_pretrained(tmp_path / "saved")
    assert again.space == supernet.space and again.active == again.space.largest()
    for name, tensor in supernet.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    for point in points(supernet):
        assert torch.equal(output_of(again, point), output_of(supernet, point))
        with again.activate(point):
            assert again.measured(input_ids=tokens()) == again.expected(point) == supernet.expected(point)


@pytest.mark.parametrize("kind", TYPES)
def test_such_a_folder_loads_as_an_ordinary_model_whose_largest_path_is_active(kind: str, tmp_path: Path) -> None:
    supernet = supernet_of(kind, **FUSED)
    supernet.save_pretrained(tmp_path / "saved")
    body = AutoModel.from_pretrained(tmp_path / "saved").eval()
    wanted = output_of(make_elastic(copy.deepcopy(body)), supernet.space.largest())
    with torch.no_grad(), supernet.activate(supernet.space.largest()):
        assert torch.equal(output(body), supernet.model.base_model(input_ids=tokens())[0])
    assert torch.equal(output(body), wanted)
    assert f"{type(supernet.model).__name__} supernet" in describe_folder(tmp_path / "saved")


def test_a_record_without_a_config_is_of_blocks_only(tmp_path: Path) -> None:
    from tiny_models import supernet_of as of_layers

    of_layers("bert").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "search_space.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "elastic_config": None}))
    with pytest.raises(he.CheckpointError, match="says nothing usable about elastic_config"):
        Supernet.from_pretrained(tmp_path / "saved")


def test_a_record_of_other_widths_is_refused(tmp_path: Path) -> None:
    supernet_of("elastic_bert").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **GROWN}))
    with pytest.raises(he.CheckpointError, match="was made for another space"):
        Supernet.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", TYPES)
def test_copies_are_independent(kind: str, duplicate: Callable[[Any], Any]) -> None:
    supernet = supernet_of(kind, **FUSED)
    wanted = output(supernet.model)
    twin = Supernet(duplicate(supernet.model))
    assert twin.space == supernet.space and torch.equal(output(twin.model), wanted)
    part = twin.block_parts[0]
    part.set_width("standard", 3)
    part.set_heads("standard", [1])
    twin.resized()
    with twin.activate(path(twin, "standard")):
        assert twin.measured(input_ids=tokens()) == twin.expected(twin.active)
        assert supernet.active == supernet.space.largest()
    assert torch.equal(output(supernet.model), wanted)
    assert supernet.model.config.candidate_widths == GROWN["candidate_widths"] != twin.model.config.candidate_widths


# -- sizes that change ------------------------------------------------------------------------------------------------


def test_outside_of_activate_the_largest_of_the_new_sizes_is_active() -> None:
    supernet = supernet_of("elastic_bert")
    assert set(supernet.active.values()) == {"standard"}
    for part in supernet.block_parts:
        part.set_width("standard", 1)
    supernet.resized()
    assert supernet.active == supernet.space.largest() and set(supernet.active.values()) == {"standard-qv"}
    counts = supernet.space.choices[0].parameters
    assert counts is not None and counts[0] == supernet.block_parts[0].parameters("standard") == min(counts[:3])
    assert supernet.measured(input_ids=tokens()) == supernet.expected(supernet.active)
    assert supernet.model.config.candidate_widths == [[1, 48, 48, 48, 48, 48]] * 3


def test_inside_of_activate_the_blocks_stay_and_outside_the_largest_comes_back() -> None:
    supernet = supernet_of("elastic_gpt2")
    before = supernet.space
    chosen = path(supernet, "bottleneck", "standard", "bottleneck-kv")
    with supernet.activate(chosen):
        for part in supernet.block_parts:
            part.set_width("standard", 1)
        supernet.resized()
        assert supernet.active == chosen and supernet.space != before
        with supernet.activate(supernet.space.smallest()):
            pass
        assert supernet.measured(input_ids=tokens()) == supernet.expected(chosen)
    assert supernet.active == supernet.space.largest() and "standard" not in set(supernet.active.values())


def test_what_was_chosen_outside_is_carried_over_a_change_of_sizes() -> None:
    supernet = supernet_of("elastic_bert")
    chosen = path(supernet, "bottleneck-qv", "standard")
    supernet.set_active(chosen)
    with supernet.activate(supernet.space.largest()):
        supernet.block_parts[2].set_width("standard", 2)
        supernet.resized()
        assert supernet.active == supernet.space.largest()
    assert supernet.active == chosen and supernet.measured(input_ids=tokens()) == supernet.expected(chosen)


def test_growth_leaves_what_was_in_use_and_comes_with_weights_that_were_there() -> None:
    supernet = supernet_of("elastic_bert", **GROWN)
    whole = tiny("elastic_bert")
    for part, block in itertools.product(supernet.block_parts, BLOCKS):
        part.set_width(block, 48)
    supernet.resized()
    other = make_elastic(whole)
    assert supernet.space == other.space
    for point in points(other):
        assert torch.equal(output_of(supernet, point), output_of(other, point))


@pytest.mark.parametrize("kind", TYPES)
def test_sizes_that_cannot_be_are_refused_and_change_nothing(kind: str) -> None:
    supernet = supernet_of(kind, **FUSED)
    part, before = supernet.block_parts[0], copy.deepcopy(supernet.model.config.to_dict())
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: part.set_width("standard", 49), r"width 49 of standard in layer 0 is outside 1\.\.48, all it can use"),
        (lambda: part.set_width("standard", 0), r"outside 1\.\.48"),
        (lambda: part.set_width("wide", 8), "layer 0 has no block 'wide'; it has standard, standard-qv, "),
        (lambda: part.set_heads("wide", 2), "layer 0 has no block 'wide'"),
        (lambda: part.set_heads("standard", [4]), r"standard in layer 0: .* ascending list of heads below 4, .* \[4\]"),
        (lambda: part.set_heads("standard", []), r"got \[\]"),
        (lambda: part.set_heads("standard", 3), "up to 4 that divides their 32 dimensions; got 3"),
        (lambda: part.set_heads("bottleneck", 5), "up to 4 that divides their 16 dimensions; got 5"),
        (lambda: part.set_heads("standard", (0, 1)), r"got \(0, 1\)"),  # type: ignore[arg-type]
    ]
    for call, message in wrong:
        with pytest.raises(he.SpaceError, match=message):
            call()
    assert supernet.model.config.to_dict() == before
    assert supernet.measured(input_ids=tokens()) == supernet.expected(supernet.active)


# -- what blocks are not for ------------------------------------------------------------------------------------------

BATCH = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long), "labels": tokens()}
TABLE = he.QualityTable("hidden", "x", ({}, {}, {}))
REFUSED: dict[str, Callable[[Supernet, Path], object]] = {
    "family": lambda s, _: s.family,
    "sort by weights": lambda s, _: he.sort_by_importance_(s),
    "sort by data": lambda s, _: he.sort_by_importance_(s, [BATCH]),
    "set_layer_order": lambda s, _: he.set_layer_order(s, [2, 1, 0]),
    "refit": lambda s, _: he.refit(s, s.space.smallest(), [BATCH]),
    "refitted": lambda s, _: he.refitted(s, s.space.smallest(), [BATCH]).__enter__(),
    "quality table": lambda s, _: he.measure_quality_table(s, [BATCH], [BATCH], measure="hidden"),
    "additivity": lambda s, _: he.additivity(
        s, TABLE, points(s)[:3], calibration=[BATCH], validation=[BATCH], measure="hidden"
    ),
    "damage": lambda s, _: objectives.damage(s, TABLE),
    "latency table": lambda s, _: he.measure_latency_table(s),
    "zerolm of the space": lambda s, _: objectives.proxy(s, "zerolm"),
    "depth of the space": lambda s, _: objectives.proxy(s, "depth"),
    "score of the model": lambda s, _: he.score(s.model, "zerolm"),
    "table of the model": lambda s, _: ZeroLMTable.of_model(s.model),
    "sparsify_": lambda s, _: he.sparsify_(s.model, [BATCH]),
    "quantize_": lambda s, _: he.quantize_(s.model, [BATCH]),
    "make_elastic again": lambda s, _: make_elastic(s.model),
    "extract_adapter": lambda s, _: he.extract_adapter(s, s.space.smallest()),
    "compress": lambda s, f: he.compress(saved_run(s, f)),
    "add_lora": lambda s, _: he.add_lora(
        s.model, he.ElasticLoraConfig(r=4, ranks=[2, 4], target_modules="all-linear")
    ),
}


def saved_run(supernet: Supernet, folder: Path) -> CompressOptions:
    supernet.save_pretrained(folder / "saved")
    (folder / "text.txt").write_text("some words\n" * 30)
    return CompressOptions(str(folder / "saved"), (str(folder / "text.txt"),), str(folder / "out"), speedup=1.2)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_widths_and_heads_to_choose_is_refused_in_one_line(name: str, kind: str, tmp_path: Path) -> None:
    supernet = supernet_of(kind)
    wanted = output(supernet.model)
    with pytest.raises(he.ElasticError) as caught:
        REFUSED[name](supernet, tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 30
    assert torch.equal(output(supernet.model), wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_objectives_that_run_a_path_or_extract_it_work(kind: str) -> None:
    supernet = supernet_of(kind, **FUSED)
    for point in (path(supernet, "standard"), path(supernet, "bottleneck", "standard"), *points(supernet, count=1)):
        model = extract(supernet, point)
        with torch.no_grad():
            wanted = float(model(**BATCH).loss)
        assert objectives.loss(supernet, [BATCH])(point) == pytest.approx(wanted, rel=1e-4)
        assert objectives.proxy(supernet, "params")(point) == sum(p.numel() for p in model.parameters())
        if kind == "elastic_bert" or not any("-" in str(block) for block in point.values()):
            synflow = objectives.proxy(supernet, "synflow")(point)
            assert synflow == pytest.approx(he.score(model, "synflow"), rel=1e-6)
        else:  # two parts of a fused projection, of which one is used twice
            with pytest.raises(UnsupportedModelError, match="a projection that attention uses twice"):
                objectives.proxy(supernet, "synflow")(point)
    within = Budgets(memory=1).limits
    with pytest.raises(he.InfeasibleError, match="the space goes from"):
        within(supernet)
