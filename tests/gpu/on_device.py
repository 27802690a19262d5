"""Models and batches on a device, and comparisons of what they give with what the CPU gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lora_models import SETTINGS, randomise
from tiny_models import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_elastic import ElasticLoraConfig, Supernet, add_lora, quantize_, sparsify_

TOLERANCE = 1e-4  # of the largest entry: float32 summed in another order


def placed(model: Any, device: str) -> Any:
    """The model (or handle) itself, on a device."""
    model.to(device)
    return model


def feed(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_batches(
    model: PreTrainedModel, *, count: int = 3, rows: int = 6, tokens: int = 12, labels: bool = False
) -> list[dict[str, Tensor]]:
    """Batches of random tokens on the CPU, padded on the right in the last row."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(3, int(model.config.vocab_size), (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens - 4 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        found.append(batch)
    return found


def sparse_adapted(kind: str) -> Supernet:
    """Adapters, which are not zero, on a sparse base on the CPU, of integers where ``kind`` says so."""
    model = tiny("llama")
    sparsify_(model, method="magnitude")
    if kind == "integers":
        quantize_(model, group_size=16, method="rtn")
    settings: dict[str, Any] = {**SETTINGS, "ranks": [2, 4], "sparse": True, "quantization_aware": kind == "integers"}
    made = add_lora(model, ElasticLoraConfig(**settings))
    randomise(made.model)
    return made


def output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The first output at real tokens, without gradients, on the CPU; the batch goes to where the model is."""
    where = next(model.parameters()).device
    given = {name: tensor.to(where) for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        found: Tensor = model(**given)[0]
    assert found.device.type == where.type
    mask = batch.get("attention_mask")
    if mask is not None and found.shape[:2] == mask.shape:
        found = found[mask.bool().to(where)]
    return found.float().cpu()


def devices_of(module: nn.Module) -> set[str]:
    """Kinds of devices that parameters and buffers are on."""
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def stays(module: nn.Module, device: str) -> None:
    """Asserts that all of a model is on a device."""
    wanted = torch.device(device).type
    off = [name for name, tensor in module.state_dict().items() if tensor.device.type != wanted]
    assert not off and devices_of(module) == {wanted}, f"{len(off)} tensors left {wanted}, such as {off[:3]}"


def close(got: Any, wanted: Any, *, tolerance: float = TOLERANCE, what: str = "values") -> None:
    """Asserts that two tensors are equal within a share of the largest entry; the message has the numbers."""
    one, other = (torch.as_tensor(value).detach().double().cpu() for value in (got, wanted))
    assert one.shape == other.shape, f"{what}: shape {tuple(one.shape)}, wanted {tuple(other.shape)}"
    if not other.numel():
        return
    assert bool(torch.isfinite(one).all()), f"{what}: {int((~torch.isfinite(one)).sum())} entries are not finite"
    gap, scale = float((one - other).abs().max()), float(other.abs().max())
    assert gap <= tolerance * max(scale, 1e-12), (
        f"{what}: differ by {gap:.2e}, largest {scale:.2e}, allowed {tolerance}"
    )


def all_close(
    got: Mapping[Any, Any], wanted: Mapping[Any, Any], *, tolerance: float = TOLERANCE, what: str = "values"
) -> None:
    """As :func:`close`, of tensors by name."""
    assert got.keys() == wanted.keys(), f"{what}: {sorted(map(str, got.keys() ^ wanted.keys()))[:5]} are in one only"
    for name, value in got.items():
        close(value, wanted[name], tolerance=tolerance, what=f"{what}, {name}")


def share_equal(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Share of equal entries of tensors, pair by pair."""
    pairs = [(one.cpu(), other.cpu()) for one, other in zip(got, wanted, strict=True)]
    total = sum(one.numel() for one, _ in pairs)
    return sum(int((one == other).sum()) for one, other in pairs) / total


def numbers_close(got: Sequence[float], wanted: Sequence[float], *, tolerance: float, what: str = "numbers") -> None:
    """Asserts that numbers are finite and equal within a share of each."""
    assert len(got) == len(wanted), f"{what}: {len(got)} numbers, wanted {len(wanted)}"
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        near = math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-9)
        assert math.isfinite(one) and near, f"{what}, number {place}: {one!r}, wanted {other!r} within {tolerance}"


def moved_alike(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, before: Mapping[str, Tensor], tolerance: float = 1e-3
) -> None:
    """Asserts that two trainings moved all weights from ``before`` alike, within a share of the largest move."""
    assert got.keys() == wanted.keys() <= before.keys()
    moves = {name: tensor.cpu().double() - before[name].cpu().double() for name, tensor in wanted.items()}
    largest = max(float(move.abs().max()) for move in moves.values())
    assert largest > 1e-4, f"nothing was trained: the largest move is {largest:.1e}"
    for name, tensor in got.items():
        gap = float((tensor.cpu().double() - before[name].cpu().double() - moves[name]).abs().max())
        assert gap <= tolerance * largest, f"{name} moved otherwise by {gap:.1e}, weights move by up to {largest:.1e}"
