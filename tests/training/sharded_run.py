"""Run by test_fsdp.py, once per rank: trains sampled subnets of a supernet that torch's ``fully_shard`` shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from tiny_training import llama_supernet, sentences, settings, texts
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_elastic import Supernet
from hf_elastic.errors import TrainingError
from hf_elastic.training import RandomSubnet, SubnetSamplingCallback
from hf_elastic.training.decay import ActiveSliceStep

STEPS, ROWS = 6, 8
CASES = ("widths", "skips")


def supernet_of(case: str) -> Supernet:
    return llama_supernet(skip=("attention", "mlp", "layer") if case == "skips" else ())


def train(supernet: Supernet, *, rank: int, ranks: int, whole: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Train a subnet of each step on this rank's rows; return losses, and ``whole`` gradients and weights."""
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2, weight_decay=0.0)
    rule, rows = RandomSubnet(seed=1), texts(STEPS * ROWS)
    found: dict[str, Any] = {"losses": [], "gradients": [], "architectures": []}
    for step in range(STEPS):
        mine = rows[step * ROWS : (step + 1) * ROWS][rank::ranks]
        batch = {name: torch.stack([row[name] for row in mine]) for name in mine[0]}
        (architecture,) = rule.draw(supernet.space, step, 0)
        with supernet.activate(architecture):
            loss = supernet.model(**batch).loss
            loss.backward()
        gradients = {
            name: None if parameter.grad is None else whole(parameter.grad).clone()
            for name, parameter in supernet.model.named_parameters()
        }
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        found["gradients"].append(gradients)
        found["architectures"].append(dict(architecture))
    found["weights"] = {name: whole(p.detach()).clone() for name, p in supernet.model.named_parameters()}
    return found


def sharded(case: str, *, rank: int, ranks: int) -> dict[str, Any]:
    supernet = supernet_of(case)
    for layer in supernet.model.model.layers:
        fully_shard(layer)
    fully_shard(supernet.model)
    parameters = dict(supernet.model.named_parameters())
    kinds = {type(parameter.data).__name__ for parameter in parameters.values()}
    local = sum(parameter.to_local().numel() for parameter in parameters.values() if isinstance(parameter, DTensor))
    found = train(supernet, rank=rank, ranks=ranks, whole=lambda tensor: tensor.full_tensor())  # type: ignore[attr-defined]
    total = sum(parameter.numel() for parameter in parameters.values())
    return {**found, "kinds": kinds, "local": local, "total": total, "decay": decay_refused(supernet)}


def decay_refused(supernet: Supernet) -> str:
    """Return what is said of decay that would have to follow slices of shards."""
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-2, weight_decay=0.1)
    try:
        ActiveSliceStep(supernet).start(optimizer)
    except TrainingError as error:
        return str(error)
    return ""


def trainer_refused(folder: str) -> str:
    """Return what the Trainer's callback says where accelerate was told to shard and does not, as on a CPU."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    supernet = llama_supernet()
    args = TrainingArguments(**settings(folder))
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=1))
    try:
        Trainer(model=supernet.model, args=args, train_dataset=sentences(labels=False), callbacks=[sampling]).train()
    except TrainingError as error:
        return str(error)
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]
    return ""


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {case: sharded(case, rank=rank, ranks=2) for case in CASES}
    # Before the group ends: in a second one a rank could meet the store of the first, which is about to go.
    results["trainer"] = trainer_refused(folder)
    torch.distributed.destroy_process_group()
    torch.save(results, f"{folder}/rank{rank}.pt")
