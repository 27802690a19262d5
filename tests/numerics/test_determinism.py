"""The same seed gives the same bits, whatever the generators say that all libraries share, and leaves those alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import block_models
import numpy as np
import pytest
import torch
from half_models import batches
from lora_models import SETTINGS
from routed_models import ALL
from tiny_models import inputs, point, supernet_of, tiny
from tiny_training import settings
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_elastic import (
    ElasticLoraConfig,
    ElasticTrainer,
    HeadFusionCallback,
    PCAGrowthCallback,
    RandomSubnet,
    RoutingConfig,
    SandwichRule,
    SubnetSamplingCallback,
    add_lora,
    add_routing,
    calibrate_routing,
    costs,
    extract,
    fit_routers,
    fuse_heads,
    make_elastic,
    measure_quality_table,
    objectives,
    quantize_,
    recover,
    refit,
    routing_statistics,
    score,
    search_subnets,
    sort_by_importance_,
    sparsify_,
)
from hf_elastic.adapters import adapted
from hf_elastic.models.elastic_routers import routers_of
from hf_elastic.proxies import PROXIES
from hf_elastic.proxies.ranking import correlation, label_free_alpha
from hf_elastic.training.fit_layers import FitLayers
from hf_elastic.training.order import training_order


def bits(value: Any) -> Iterator[Any]:
    """All that a result is made of, in a form whose equality is that of bits."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        yield value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, nn.Module):
        yield from bits(dict(value.state_dict()))
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for name in value:
            yield str(name)
            yield from bits(value[name])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from bits(each)
    elif is_dataclass(value):
        for each in fields(value):
            yield from bits(getattr(value, each.name))
    else:
        yield repr(value)


def calibration(model: Any, *, labels: bool = False) -> Any:
    return batches(model, count=6, rows=6, tokens=16, labels=labels)


def trained_rows(model: Any) -> list[dict[str, Tensor]]:
    return [{n: v[row] for n, v in batch.items()} for batch in batches(model, labels=True) for row in range(4)]


def searched(algorithm: str) -> Any:
    supernet = supernet_of("llama")
    data = [{**inputs(supernet.model), "labels": inputs(supernet.model)["input_ids"]}]
    goals = [objectives.loss(supernet, data), objectives.parameters(supernet)]
    found = search_subnets(supernet.space, goals, algorithm=algorithm, evaluations=12, seed=3, progress=False)
    return [(dict(one.architecture), dict(one.values)) for one in found.evaluations]


def sorted_(method: Any) -> Any:
    supernet = supernet_of("bert")
    data = None if method == "weight" else calibration(supernet.model, labels=True)
    return sort_by_importance_(supernet, data, method=method), supernet.model


def refitted_model() -> nn.Module:
    supernet = supernet_of("llama")
    return refit(supernet, point(supernet, ffn0=16, heads1=1), calibration(supernet.model))


def table() -> Any:
    supernet = supernet_of("bert")
    data = calibration(supernet.model)
    return measure_quality_table(supernet, data, data[:1], measure="hidden")


def compressed(method: str) -> Any:
    model = tiny("bert")
    if method in ("wanda", "magnitude"):
        sparsify_(model, calibration(model), method=method)  # type: ignore[arg-type]
    else:
        quantize_(model, calibration(model), group_size=16, method=method)  # type: ignore[arg-type]
    return model


def routed_model() -> Any:
    supernet = add_routing(tiny("llama"), RoutingConfig(**ALL, router="mlp", router_hidden_size=8), seed=5)
    data = calibration(supernet.model)
    return (
        fit_routers(supernet, data), calibrate_routing(supernet, data),
        routing_statistics(supernet, data, supernet.space.smallest()), list(routers_of(supernet.model)),
    )  # fmt: skip


def fused(mode: Any) -> Any:
    model = tiny("bert")
    return fuse_heads(model, calibration(model, labels=True), mode=mode, threshold=0.1, min_heads=1)


def scored() -> Any:
    model = tiny("gpt2")
    data = batches(model, count=1, labels=True)
    return {name: score(model, name, data) for name in PROXIES}


def ranked() -> Any:
    generator = np.random.default_rng(0)
    first, second = generator.random(20), generator.random(20)
    return correlation(first, second, seed=4), label_free_alpha(first, second, list(range(20)))


def lent_adapters() -> Any:
    model = tiny("llama")
    with adapted(model, 2, seed=7) as wrapped:
        return {n: p.clone() for n, p in wrapped.named_parameters() if p.requires_grad}


CALLS: dict[str, Callable[[], Any]] = {
    **{f"search {name}": (lambda name=name: searched(name)) for name in ("nsga2", "tpe", "random")},
    **{f"sort {m}": (lambda m=m: sorted_(m)) for m in ("activation", "reconstruction", "taylor", "weight")},
    "refit": refitted_model,
    "quality table": table,
    **{name: (lambda name=name: compressed(name)) for name in ("wanda", "magnitude", "gptq", "rtn")},
    "routing": routed_model,
    **{f"fuse {mode}": (lambda mode=mode: fused(mode)) for mode in ("merge", "remove", "resplit")},
    "proxies": scored,
    "ranking": ranked,
    "fit layers": lambda: FitLayers(8, attention=frozenset({8}), teacher=12, seed=3),
    "adapters of a training": lent_adapters,
    "order of examples": lambda: training_order([3, 5, 4, 9] * 5, batch_size=4, steps=9, seed=2),
    "random subnets": lambda: [
        dict(a) for step in range(4) for a in RandomSubnet(seed=1).draw(supernet_of("bert").space, step, 0)
    ],
    "measured costs": lambda: costs.macs(supernet_of("gpt2"), supernet_of("gpt2").space.midpoint(), seq_len=8),
}


def states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (kind, keys.tobytes(), *rest)  # type: ignore[union-attr]


def under(seed: int, call: Callable[[], Any]) -> tuple[list[Any], bool]:
    """What a call gives under a state of the shared generators, and whether it leaves that as it was."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        before = states()
        found = list(bits(call()))
        return found, before == states()
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_same_bits_come_of_the_same_seed_and_nobody_else_is_disturbed(name: str) -> None:
    first, untouched = under(1, CALLS[name])
    again, _ = under(1, CALLS[name])
    other, _ = under(2, CALLS[name])
    assert len(first) > 0 and first == again, "twice in one process"
    assert first == other, "it depends on the state that all libraries share"
    assert untouched, "it moves the state that all libraries share"


def test_another_seed_gives_something_else() -> None:
    seeds, hidden = (3, 4), RoutingConfig(**ALL, router="mlp", router_hidden_size=8)
    made: list[Callable[[int], Any]] = [
        lambda seed: list(routers_of(add_routing(tiny("llama"), hidden, seed=seed).model)),
        lambda seed: FitLayers(8, attention=frozenset({8}), teacher=12, seed=seed),
        lambda seed: training_order([3, 5, 4, 9] * 5, batch_size=4, steps=9, seed=seed),
        lambda seed: [dict(a) for a in SandwichRule(seed=seed).draw(supernet_of("bert").space, 0, 0)],
    ]
    for make in made:
        one, other = (list(bits(make(seed))) for seed in seeds)
        assert one != other


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(**settings(str(folder), max_steps=4, learning_rate=1e-3))


def elastic_run(folder: Path) -> Any:
    supernet = supernet_of("bert")
    ElasticTrainer(
        supernet=supernet, sampling=SandwichRule(seed=0), distill=True, args=arguments(folder),
        train_dataset=trained_rows(supernet.model),
    ).train()  # fmt: skip
    return supernet.model


def block_run(folder: Path, callback: Callable[[Any, Any], Any]) -> Any:
    supernet = make_elastic(block_models.tiny("elastic_bert", candidate_widths=[[16] * 6] * 3))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
            for row in block_models.tokens(batch=16)]  # fmt: skip
    extra = callback(supernet, data)
    Trainer(
        model=supernet.model, args=arguments(folder), train_dataset=data,
        callbacks=[SubnetSamplingCallback(supernet, RandomSubnet(seed=0)), extra],
    ).train()  # fmt: skip
    made = extra.history.entries if isinstance(extra, PCAGrowthCallback) else extra.reports
    return supernet.model, [list(bits(vars(entry))) for entry in made]


def growing(supernet: Any, data: Any) -> Any:
    return PCAGrowthCallback(supernet, total_parameters=19_000, step=8, count=2, calc_freq=1, every=2)


def fusing(supernet: Any, data: Any) -> Any:
    feed = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    return HeadFusionCallback(supernet, [feed], threshold=0.5, min_heads=1, every=2)


def recovering(folder: Path, **options: Any) -> Any:
    supernet = supernet_of("llama")
    small = extract(supernet, point(supernet, ffn0=24, ffn1=24, ffn2=24))
    data = [{"input_ids": row.tolist()} for batch in batches(supernet.model) for row in batch["input_ids"]]
    options |= {"steps": 3, "batch_size": 4, "seed": 5, "arguments": {"use_cpu": True, "disable_tqdm": True}}
    return recover(small, supernet.model, data, output=folder, **options)


RUNS: dict[str, Callable[[Path], Any]] = {
    "ElasticTrainer": elastic_run,
    "growth": lambda folder: block_run(folder, growing),
    "fusion": lambda folder: block_run(folder, fusing),
    "recover": recovering,
    "recover with adapters": lambda folder: recovering(folder, lora=2),
}


@pytest.mark.filterwarnings("ignore:growth ended")
@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_training_is_a_function_of_its_seed(name: str, tmp_path: Path) -> None:
    """The stock Trainer seeds the generators that all libraries share, so they are not left as they were."""
    found = [under(seed, lambda n=n: RUNS[name](tmp_path / str(n)))[0] for n, seed in enumerate((1, 1, 2))]
    assert len(found[0]) > 0 and found[0] == found[1] == found[2]


def test_adapters_of_peft_are_drawn_by_peft_unless_a_seed_is_given() -> None:
    """``get_peft_model`` draws from the shared state: seed that, or use what takes a seed."""
    config = ElasticLoraConfig(**{**SETTINGS, "ranks": [2, 4]})
    drawn = [under(seed, lambda: add_lora(tiny("llama"), config).model) for seed in (1, 1, 2)]
    assert drawn[0][0] == drawn[1][0] != drawn[2][0] and not drawn[0][1]
    seeded = [under(seed, lambda: add_lora(tiny("llama"), config, seed=4).model) for seed in (1, 1, 2)]
    assert seeded[0][0] == seeded[1][0] == seeded[2][0] and all(untouched for _, untouched in seeded)


def test_bits_tell_values_apart() -> None:
    assert list(bits(torch.tensor(0.0))) != list(bits(torch.tensor(-0.0)))
    assert list(bits({"a": [1, torch.ones(2)]})) != list(bits({"a": [1, torch.ones(3)]}))
    assert under(1, lambda: torch.rand(1))[1] is False and under(1, random.random)[1] is False
    assert under(1, np.random.rand)[1] is False and under(1, lambda: 1)[1] is True
