"""Shears on arithmetic problems (Mode A): elastic ranks on a sparse frozen LLaMA, trained and searched.

    python examples/shears_math.py --model my-llama --output shears
    python examples/shears_math.py --tiny --steps 4 --rows 40 --test-rows 8 --evaluations 6 --output shears

The base is made sparse first (the smallest weights of each output row; any other mask does as well) and stays frozen.
The stock Trainer trains one sub-adapter a micro-batch, as the official code does. What is found is written as a plain
peft adapter that any peft loads onto the sparse base. Rows come from ``HF_ELASTIC_DATA``/math.
"""

from __future__ import annotations

import torch
from instructions import DATA, accuracy, batches, features, load, number, parser, read, show, training_arguments
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer

import hf_elastic as he

SETS = ("gsm8k", "mawps", "SVAMP")
BUDGET = 0.75  # of the adapter parameters: what the heuristic sub-adapter has


@torch.no_grad()
def prune_(model: PreTrainedModel, sparsity: float) -> None:
    """Sets the smallest weights of each output row of the layers to zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            weight = module.weight
            smallest = weight.abs().topk(int(weight.shape[1] * sparsity), dim=1, largest=False).indices
            weight.scatter_(1, smallest, 0.0)


def zeros(model: nn.Module) -> float:
    """Share of zeros in the adapted weights."""
    weights = [part.base.get_parameter("weight") for part in he.Supernet(model).adapter_parts]
    return sum(float((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    arguments_of = parser(__doc__, steps=300, rows=5000, evaluations=100)
    arguments_of.add_argument("--sparsity", type=float, default=0.5)
    arguments = arguments_of.parse_args()
    model, tokenizer = load(arguments)
    prune_(model, arguments.sparsity)
    supernet = he.spaces.shears_llama(model.config).make(model, seed=arguments.seed)
    before = zeros(supernet.model)
    source = DATA / "math" / "gsm8k_openai_train_5000.jsonl"
    rows = features(tokenizer, read(source, arguments.rows), cutoff=arguments.cutoff)
    held = max(8, len(rows) // 20)
    statistics = he.SubnetStatistics(supernet)
    sampling = he.SubnetSamplingCallback(supernet, he.RandomSubnet(seed=arguments.seed), per="micro_batch")
    with sampling:
        Trainer(
            model=supernet.model, args=training_arguments(arguments), train_dataset=rows[held:],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), callbacks=[sampling, statistics],
        ).train()  # fmt: skip
    supernet.model.eval()

    validation = batches(tokenizer, rows[:held])
    result = he.search_subnets(
        supernet.space, [he.objectives.loss(supernet, validation), he.objectives.adapter_parameters(supernet)],
        evaluations=arguments.evaluations, within={"adapter_parameters": BUDGET}, seed=arguments.seed,
    )  # fmt: skip
    found = result.best("loss", within={"adapter_parameters": BUDGET}).architecture
    space = supernet.space
    points = {
        "maximal": space.largest(), "heuristic (midpoint)": space.midpoint(), "minimal": space.smallest(),
        "lowest training loss": statistics.lowest_loss_values(), "most active": statistics.most_active(),
        "found": found,
    }  # fmt: skip
    named: dict[str, dict[str, float]] = {}
    for label, point in points.items():
        with supernet.activate(point):
            named[label] = {
                name: accuracy(
                    supernet.model, tokenizer, read(DATA / "math" / f"{name}.jsonl", arguments.test_rows),
                    extract=number, tokens=128,
                )
                for name in SETS
            }  # fmt: skip
    show(supernet, named)
    he.extract_adapter(supernet, found).save_pretrained(arguments.output)
    kept = f"{zeros(supernet.model):.1%} of the adapted weights are zero, {before:.1%} before training"
    print(f"found by {len(result.evaluations)} evaluations; {kept}")
    print(f"PeftModel.from_pretrained(base, {arguments.output!r})")


if __name__ == "__main__":
    main()
