"""ELM step by step: a causal supernet of six blocks a layer, distilled from a LLaMA, grown, searched, fused, retrained.

    python examples/elm_stories.py --teacher my-llama --data stories.txt --output small
    python examples/elm_stories.py --teacher my-llama --data stories.txt --output small --size tiny --epochs 10

What ``hf-elastic elm`` does in one command is written out here with the Python API: config, supernet, a trainer with
relational distillation that samples a path a step, PCA growth behind each tenth of the steps, evolutionary search, CKA
head fusion, training of the path that was found, export. The teacher needs a tokenizer beside it; one small enough for
a CPU is made by ``hf-elastic reproduce elm`` (``OUTPUT/teacher``). Interrupted, the same command goes on: checkpoints
and evaluations are in ``OUTPUT.work``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from going_on import checkpoint_before, search_storage, texts, training_arguments, work_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_elastic as he
from hf_elastic.fusion import fuse_heads_

Batch = dict[str, torch.Tensor]


def blocks_of(tokenizer, sources: list[str], *, length: int) -> list[dict[str, list[int]]]:
    """The texts as one stream of tokens, cut into blocks."""
    ids = tokenizer("\n".join(texts(sources)), add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[start : start + length]} for start in starts]


def collate(rows: list[dict[str, list[int]]]) -> Batch:
    ids = torch.tensor([row["input_ids"] for row in rows])  # (B, T)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def batches(rows: list[dict[str, list[int]]], *, size: int = 32) -> list[Batch]:
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def make_supernet(teacher, arguments: argparse.Namespace) -> he.Supernet:
    """All blocks at their first width; the depth is the largest up to the size's that divides the teacher's."""
    config = teacher.config
    most = min(he.spaces.ELM_SIZES[arguments.size].layers, config.num_hidden_layers)
    layers = next(depth for depth in range(most, 0, -1) if config.num_hidden_layers % depth == 0)
    student = he.spaces.elm_config(
        arguments.size, task="causal-lm", vocab_size=config.vocab_size, positions=arguments.length, layers=layers,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    set_seed(arguments.seed)
    return he.make_elastic(he.spaces.elm_model_class(student)(student))


def train(supernet, teacher, rows, *, rule, arguments, folder: Path, steps: int, callbacks=()) -> None:
    """States by their correlation, summed as in the paper, predictions, and the text's own labels beside them."""
    states = 2 * len(supernet.block_parts) + 1
    args = training_arguments(
        folder, steps=steps, per_device_train_batch_size=arguments.batch_size, learning_rate=arguments.learning_rate,
        warmup_steps=max(1, steps // 10), lr_scheduler_type="linear", weight_decay=0.01, seed=arguments.seed,
    )  # fmt: skip
    he.ElasticTrainer(
        supernet=supernet, sampling=rule, args=args, train_dataset=rows, data_collator=collate,
        distill=he.Distillation(
            target="relational", teacher=teacher, fit=True, prediction="dist", weight=states,
            prediction_weight=1 / states,
        ),
        callbacks=list(callbacks),
    ).train(resume_from_checkpoint=checkpoint_before(folder, steps=steps))  # fmt: skip
    supernet.model.eval()


def grow(supernet, teacher, rows, *, arguments, budget: float, folder: Path, steps: int) -> None:
    """Each step trains one path; ten times, the blocks whose pre-activations need the room grow."""
    every = max(1, steps // 10)
    growth = he.PCAGrowthCallback(
        supernet, total_parameters=budget, step=he.spaces.ELM_SIZES[arguments.size].step, every=every,
        calc_freq=max(1, every // 24),
    )  # fmt: skip
    train(
        supernet, teacher, rows, rule=he.RandomSubnet(seed=arguments.seed), arguments=arguments, steps=steps,
        callbacks=[growth], folder=folder / "supernet",
    )  # fmt: skip
    print(f"mean path: {growth.history.entries[-1].parameters_after:,.0f} parameters of {budget:,.0f}")
    supernet.save_pretrained(folder / "grown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a causal model with its tokenizer, or its name")
    parser.add_argument("--data", required=True, nargs="+", help="text: .txt, .jsonl, .csv, or names of data sets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--size", default="micro", choices=list(he.spaces.ELM_SIZES))
    parser.add_argument("--epochs", type=float, default=2.0, help="of each of the two trainings")
    parser.add_argument("--steps", type=int, help="of each, instead of epochs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--threshold", type=float, default=0.9, help="CKA above which heads are alike")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    folder = work_folder(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval().requires_grad_(False)
    rows = blocks_of(tokenizer, arguments.data, length=arguments.length)
    held = max(4, min(256, len(rows) // 10))
    searched, reported, rows = batches(rows[:held]), batches(rows[held : 2 * held]), rows[2 * held :]
    steps = arguments.steps or max(1, round(arguments.epochs * len(rows) / arguments.batch_size))

    supernet = make_supernet(teacher, arguments)
    budget = he.spaces.elm_budget(he.spaces.ELM_SIZES[arguments.size], supernet.base.config)
    if (folder / "grown").is_dir():
        supernet = he.Supernet.from_pretrained(folder / "grown")
        print(f"going on behind the supernet in {folder / 'grown'}")
    else:
        print(supernet)
        grow(supernet, teacher, rows, arguments=arguments, budget=budget, folder=folder, steps=steps)
    result = he.search_subnets(
        supernet.space, [he.objectives.perplexity(supernet, searched)], algorithm=he.uniform_evolution(20),
        evaluations=arguments.evaluations, within={"total_parameters": budget}, seed=arguments.seed,
        storage=search_storage(folder),
    )  # fmt: skip
    found = result.best("perplexity", within={"total_parameters": budget}).architecture
    perplexity = {"found path": he.objectives.perplexity(supernet, reported)(found)}

    # The path becomes a model of its own, loses the heads that write alike, and is trained further.
    single = he.make_elastic(he.extract(supernet, found, loadability="remote-code"))
    print(fuse_heads_(single, batches(rows[:256]), threshold=arguments.threshold, min_heads=1))
    perplexity["after head fusion"] = he.objectives.perplexity(single, reported)(single.space.largest())
    fixed = he.FixedSubnet(single.space.largest())
    train(single, teacher, rows, rule=fixed, arguments=arguments, steps=steps, folder=folder / "path")
    perplexity["after retraining"] = he.objectives.perplexity(single, reported)(single.space.largest())

    with torch.inference_mode():
        losses = [float(teacher(**batch).loss) for batch in reported]
    perplexity["teacher"] = math.exp(sum(losses) / len(losses))
    for name, value in perplexity.items():
        print(f"{name:<20} perplexity {value:8.3f}")
    path = single.space.largest()
    form = "stock" if single.loadability(path) == "stock" else "remote-code"  # compact rather than padded with zeros
    print(he.export(single, path, arguments.output, loadability=form, tokenizer=tokenizer, overwrite=True))


if __name__ == "__main__":
    main()
