"""Batches on the CPU and a model on a device, wherever batches are taken: they are moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import cut, rows
from grown_run import candidates
from on_device import feed, placed, token_batches
from routed_models import ALL, routed, turn
from tiny_models import point, supernet_of, tiny
from torch import Tensor

import hf_elastic as he
from hf_elastic import RoutingConfig, Supernet, add_routing, costs, objectives
from hf_elastic.fusion import fuse_heads_
from hf_elastic.proxies import score

NARROW = {"ffn0": 16, "ffn1": 24}
Batches = list[dict[str, Tensor]]


def elastic(family: str = "llama", head: str = "lm") -> Supernet:
    return supernet_of(family, head)


def with_routers() -> Supernet:
    return add_routing(tiny("llama"), RoutingConfig(**ALL))


def calibrated(made: Supernet, batches: Batches) -> Any:
    he.fit_routers(made, [feed(batch, str(made.base.device)) for batch in batches])
    return he.calibrate_routing(made, batches)


def watched(made: Supernet, batches: Batches) -> Any:
    turn(made, 0)
    return he.routing_statistics(made, batches)


def timed(made: Supernet, batches: Batches) -> Any:
    return costs.architecture_latency(made, {"largest": made.space.largest()}, inputs=batches[0], repeats=3)


def plain_batches(batches: Batches) -> Batches:
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


CALLS: dict[str, tuple[Callable[[], Supernet], Callable[[Supernet, Batches], Any]]] = {
    "sort_by_importance_, activation": (elastic, lambda made, b: he.sort_by_importance_(made, b, method="activation")),
    "sort_by_importance_, taylor": (elastic, lambda made, b: he.sort_by_importance_(made, b, method="taylor")),
    "sort_by_importance_, reconstruction": (
        elastic, lambda made, b: he.sort_by_importance_(made, b, method="reconstruction")
    ),
    "refit": (elastic, lambda made, b: he.refit(made, point(made, **NARROW), b)),
    "measure_quality_table": (elastic, lambda made, b: he.measure_quality_table(made, b, b[:1], measure="kl")),
    "objectives.loss": (elastic, lambda made, b: objectives.loss(made, b)(made.space.midpoint())),
    "objectives.accuracy": (elastic, lambda made, b: objectives.accuracy(made, b)(made.space.midpoint())),
    "objectives.embedding_cosine": (
        lambda: elastic("bert", "base"),
        lambda made, b: objectives.embedding_cosine(made, plain_batches(b))(made.space.midpoint()),
    ),
    "objectives.proxy": (
        elastic, lambda made, b: objectives.proxy(made, "snip", batches=b)(made.space.midpoint())
    ),
    "objectives.latency": (
        elastic, lambda made, b: objectives.latency(made, inputs=b[0], repeats=3)(made.space.midpoint())
    ),
    "architecture_latency": (elastic, timed),
    "fuse_heads": (
        lambda: elastic("bert"), lambda made, b: he.fuse_heads(tiny("bert").to(made.base.device), b, threshold=0.5)
    ),
    "fuse_heads_": (candidates, lambda made, b: fuse_heads_(made, b, threshold=0.5, min_heads=1)),
    "fit_routers": (with_routers, he.fit_routers),
    "calibrate_routing": (with_routers, calibrated),
    "routing_statistics": (lambda: routed("llama"), watched),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_batches_on_the_cpu_are_moved_to_the_model(call: str, device: str) -> None:
    make, function = CALLS[call]
    made = placed(make(), device)
    batches = token_batches(made.model, rows=10, labels=True)
    function(made, batches)
    assert all(tensor.device.type == "cpu" for batch in batches for tensor in batch.values())


MODELS: dict[str, Callable[[Any, Batches], Any]] = {
    "sparsify_": lambda model, b: he.sparsify_(model, plain_batches(b)),
    "quantize_": lambda model, b: he.quantize_(model, plain_batches(b), group_size=16),
    "score, gradients": lambda model, b: score(model, "snip", b),
    "score, activations": lambda model, b: score(model, "attention_confidence", b),
    "score, probabilities": lambda model, b: score(model, "softmax_confidence", plain_batches(b)),
}


@pytest.mark.parametrize("call", MODELS)
def test_batches_on_the_cpu_are_moved_to_a_plain_model(call: str, device: str) -> None:
    model = placed(tiny("llama"), device)
    MODELS[call](model, token_batches(model, labels=True))


def test_examples_on_the_cpu_are_moved_to_teachers_and_students(device: str, tmp_path: Path) -> None:
    teacher, model = (placed(one, device) for one in cut("bert", "lm", uniform=True))
    he.cache_teacher(teacher, rows(), tmp_path / "cache")
    use_cpu = torch.device(device).type == "cpu"
    arguments = {"use_cpu": use_cpu, "disable_tqdm": True}
    he.recover(model, teacher, rows(), output=tmp_path / "run", steps=1, batch_size=4, arguments=arguments)


def test_a_teacher_on_the_cpu_is_moved_to_where_training_is(device: str, tmp_path: Path) -> None:
    teacher, model = cut("bert", "lm", uniform=True)
    use_cpu = torch.device(device).type == "cpu"
    arguments = {"use_cpu": use_cpu, "disable_tqdm": True}
    placed(model, device)
    he.recover(model, teacher, rows(), output=tmp_path / "run", steps=1, batch_size=4, cache=False, arguments=arguments)
    assert teacher.device.type == "cpu" and model.device.type == torch.device(device).type


def test_a_float_base_on_the_cpu_serves_a_model_on_the_device(device: str) -> None:
    float_base = tiny("llama")
    he.sparsify_(float_base, method="magnitude")
    model = placed(tiny("llama"), device)
    he.sparsify_(model, method="magnitude")
    he.quantize_(model, group_size=16, method="rtn")
    config = he.ElasticLoraConfig(r=4, ranks=[2], target_modules="all-linear", sparse=True, quantization_aware=True)
    made = he.add_lora(model, config, float_base=float_base)
    assert made.model(**feed(token_batches(model)[0], device)).logits.device.type == torch.device(device).type
