"""Run by test_distributed.py, once per rank: trains with DDP over gloo and saves what each rank ends with."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tiny_routed import routed
from tiny_training import bert_supernet, llama_supernet, same, sentences, settings, texts, weights
from transformers import Trainer, TrainingArguments

from hf_elastic import Supernet
from hf_elastic.errors import TrainingError
from hf_elastic.training import (
    Distillation,
    ElasticTrainer,
    RandomSubnet,
    RoutingLoss,
    RoutingLosses,
    SandwichRule,
    SubnetSamplingCallback,
    last_complete_checkpoint,
)


def run(case: str, output_dir: str, *, batch: int) -> Supernet:
    """Train one case; one process with ``batch`` examples sees what two processes see with half of them."""
    skips = case.endswith("skips")
    changes: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "ddp_find_unused_parameters": skips,
        "gradient_accumulation_steps": 2,
    }
    supernet = llama_supernet(skip=("attention", "mlp", "layer") if skips else ())
    rows = texts(uneven=True)
    args = TrainingArguments(**settings(f"{output_dir}/{case}", **changes))
    if case.startswith("callback"):
        sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=1), per="micro_batch")
        Trainer(model=supernet.model, args=args, train_dataset=rows, callbacks=[sampling]).train()
    else:
        rule = SandwichRule(seed=1, random=1)
        ElasticTrainer(supernet=supernet, sampling=rule, distill=True, args=args, train_dataset=rows).train()
    return supernet


def run_routed(case: str, output_dir: str, *, batch: int, losses: RoutingLosses) -> Supernet:
    """Train routers and adapters from the parent; a subnet of a step may use nothing that is trained."""
    supernet = routed(adapters=None if case.endswith("alone") else "stock")
    # Later steps would differ where a score of one token passes that of another by rounding.
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, "max_steps": 3}
    args = TrainingArguments(**settings(f"{output_dir}/{case}", **changes))
    plan = Distillation(teacher="parent", label_weight=0.2)
    rule, rows = RandomSubnet(seed=1), texts(uneven=True)
    if case.startswith("routed-stock"):
        loss, sampling = RoutingLoss(supernet, plan, routing=losses), SubnetSamplingCallback(supernet, rule)
        callbacks = [sampling, loss]
        Trainer(
            model=supernet.model, args=args, train_dataset=rows, compute_loss_func=loss, callbacks=callbacks
        ).train()
    elif case == "routed-sandwich-alone":
        sandwich = SandwichRule(seed=1, random=0)
        ElasticTrainer(
            supernet=supernet, sampling=sandwich, distill=plan, routing=losses, args=args, train_dataset=rows
        ).train()
    else:
        ElasticTrainer(
            supernet=supernet, sampling=rule, distill=plan, routing=losses, args=args, train_dataset=rows
        ).train()
    return supernet


CASES = ("callback", "callback-skips", "sandwich", "sandwich-skips")
ROUTED = ("routed", "routed-stock", "routed-sandwich-alone")


def refuses_to_wait_for_skipped_layers(output_dir: str) -> bool:
    supernet = bert_supernet(skip=("layer",))
    args = TrainingArguments(**settings(output_dir, ddp_find_unused_parameters=False))
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=1))
    try:
        Trainer(model=supernet.model, args=args, train_dataset=sentences(), callbacks=[sampling]).train()
    except TrainingError as error:
        return "ddp_find_unused_parameters=True" in str(error)
    return False


def resumes(output_dir: str) -> bool:
    """A run stopped after step 2 ends as one that was not."""
    finals = []
    for stop in (4, 2):
        folder = f"{output_dir}/resumed-{stop}"
        changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        for steps in (stop, 4)[: 1 if stop == 4 else 2]:
            supernet = bert_supernet(hidden_dropout_prob=0.2)
            trainer = ElasticTrainer(
                supernet=supernet,
                sampling=SandwichRule(seed=1),
                args=TrainingArguments(**settings(folder, max_steps=steps, **changes)),
                train_dataset=sentences(),
            )
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        finals.append(weights(supernet.model))
    return same(*finals)


if __name__ == "__main__":
    folder, rank = sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    results: dict[str, Any] = {case: weights(run(case, folder, batch=2).model) for case in CASES}
    for case in ROUTED:
        none, some = RoutingLosses(tokens=0.0, balance=0.0), RoutingLosses(tokens=0.3, balance=0.7)
        results[case] = weights(run_routed(case, folder, batch=2, losses=none).model)
        results[f"{case} with losses"] = weights(run_routed(case, folder, batch=2, losses=some).model)
    results["refused"] = refuses_to_wait_for_skipped_layers(folder)
    results["resumed"] = resumes(folder)
    torch.save(results, f"{folder}/rank{rank}.pt")
