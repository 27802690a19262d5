"""Shears on arithmetic problems (Mode A): elastic ranks on a sparse frozen LLaMA, trained and searched.

    python examples/shears_math.py --model my-llama --output shears
    python examples/shears_math.py --tiny --steps 4 --rows 40 --test-rows 8 --evaluations 6 --output shears

The base is made sparse first, by Wanda, and stays frozen. The stock Trainer trains one sub-adapter a micro-batch, as
the official code does. What is found is written as a plain peft adapter that any peft loads onto the sparse base. Rows
come from ``HF_ELASTIC_DATA``/math, or of training from ``--data``. Killed and started again with the same options, it
goes on (``OUTPUT.work``).
"""

from __future__ import annotations

import argparse
from typing import Any

from going_on import checkpoint_before, search_storage, work_folder
from instructions import DATA, Row, accuracy, batches, features, load, number, parser, read, show, training_arguments
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer

import hf_elastic as he

SETS = ("gsm8k", "mawps", "SVAMP")


def zeros(model: nn.Module) -> float:
    """Share of zeros in the adapted weights."""
    weights = [part.base.get_parameter("weight") for part in he.Supernet(model).adapter_parts]
    return sum(float((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def training_rows(tokenizer: Any, arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows held back to search and to calibrate with."""
    source = arguments.data or DATA / "math" / "gsm8k_openai_train_5000.jsonl"
    rows = features(tokenizer, read(source, arguments.rows), cutoff=arguments.cutoff)
    held = max(8, len(rows) // 20)
    return rows[held:], rows[:held]


def train(supernet: he.Supernet, tokenizer: Any, rows: list[Row], arguments: argparse.Namespace) -> he.SubnetStatistics:
    """Trains one random sub-adapter a micro-batch."""
    statistics = he.SubnetStatistics(supernet)
    sampling = he.SubnetSamplingCallback(supernet, he.RandomSubnet(seed=arguments.seed), per="micro_batch")
    with sampling:
        Trainer(
            model=supernet.model, args=training_arguments(arguments), train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), callbacks=[sampling, statistics],
        ).train(resume_from_checkpoint=checkpoint_before(work_folder(arguments), steps=arguments.steps))  # fmt: skip
    supernet.model.eval()
    return statistics


def chosen(
    supernet: he.Supernet,
    tokenizer: Any,
    held: list[Row],
    arguments: argparse.Namespace,
    *,
    statistics: he.SubnetStatistics,
) -> he.Architecture:
    """Searches within what the heuristic sub-adapter costs, and prints the accuracy of what was found beside it."""
    budget = {"adapter_parameters": he.costs.adapter_parameters(supernet, supernet.space.midpoint())}
    result = he.search_subnets(
        supernet.space,
        [he.objectives.loss(supernet, batches(tokenizer, held)), he.objectives.adapter_parameters(supernet)],
        evaluations=arguments.evaluations, within=budget, seed=arguments.seed,
        storage=search_storage(work_folder(arguments)),
    )  # fmt: skip
    found = result.best("loss", within=budget).architecture
    space = supernet.space
    points = {
        "maximal": space.largest(), "heuristic (midpoint)": space.midpoint(), "minimal": space.smallest(),
        "lowest training loss": statistics.lowest_loss_values(), "most active": statistics.most_active(),
        "found": found,
    }  # fmt: skip
    named: dict[str, dict[str, float]] = {}
    for label, point in points.items():
        with supernet.activate(point):
            named[label] = {name: on_set(supernet.model, tokenizer, name, arguments) for name in SETS}
    show(supernet, named)
    print(f"found by {len(result.evaluations)} evaluations")
    return found


def on_set(model: Any, tokenizer: Any, name: str, arguments: argparse.Namespace) -> float:
    rows = read(DATA / "math" / f"{name}.jsonl", arguments.test_rows)
    return accuracy(model, tokenizer, rows, extract=number, tokens=128)


def main() -> None:
    arguments_of = parser(__doc__, steps=300, rows=5000, evaluations=100)
    arguments_of.add_argument("--sparsity", type=float, default=0.5)
    arguments = arguments_of.parse_args()
    model, tokenizer = load(arguments)
    rows, held = training_rows(tokenizer, arguments)
    print(he.sparsify_(model, batches(tokenizer, held), sparsity=arguments.sparsity))
    supernet = he.spaces.shears_llama(model.config).make(model, seed=arguments.seed)
    before = zeros(supernet.model)
    statistics = train(supernet, tokenizer, rows, arguments)
    found = chosen(supernet, tokenizer, held, arguments, statistics=statistics)
    he.extract_adapter(supernet, found).save_pretrained(arguments.output, overwrite=True)
    print(f"{zeros(supernet.model):.1%} of the adapted weights are zero, {before:.1%} before training")
    print(f"PeftModel.from_pretrained(base, {arguments.output!r})")


if __name__ == "__main__":
    main()
