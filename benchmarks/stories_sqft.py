"""SQFT on a small real LLaMA: half of the weights zero, adapters kept apart, merged sparse, merged as integers.

    python benchmarks/stories_sqft.py [--seeds 0 1 2] [--steps 400] [--json FILE]

stories260K after Wanda (50 %), before any adapter; with LoRA of rank 8 kept apart; with SparsePEFT, merged; and after
GPTQ with QA-SparsePEFT, merged, with and without the float weights as the start. A rank costs nothing once it is
merged, so merged adapters are of rank 32 as well, and, to tell what the rank does, so is LoRA. Perplexities are of
TinyStories' validation pieces and of the merged models themselves; training and calibration see text of the training
split only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from measuring import print_table, started, write_json
from stories import MODELS, add_data_argument, checked_data, load_parent, perplexity, prepare
from stories_adapters import NAME, RANK, TARGETS, Trainings, summary
from transformers import LlamaForCausalLM

import hf_elastic as he

SPARSITY, BITS, BAR = 0.5, 4, 0.99
RANKS = (RANK, 32)
GROUPS = {"down_proj": 43, ".*": 32}  # the model's 172 FFN neurons have no larger divisor below 86
LORA = "LoRA, kept apart"


class Sparse(Trainings):
    """Trainings on a base that Wanda made sparse."""

    def copy(self) -> LlamaForCausalLM:
        base = super().copy()
        he.sparsify_(base, self.texts.calibration, sparsity=SPARSITY)
        return base

    def merged(self, method: str, rank: int, *, integers: bool, from_floats: bool = False) -> dict[str, Any]:
        """Trains adapters that are part of the weight, and measures the model that they are merged into."""
        base, before = self.copy(), self.copy() if from_floats else None
        if integers:
            he.quantize_(base, self.texts.calibration, bits=BITS, group_size=GROUPS)
        config = he.ElasticLoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, sparse=True, quantization_aware=integers
        )
        supernet = he.add_lora(base, config, seed=self.seed, float_base=before)
        largest = supernet.space.largest()
        self.train(supernet.model, supernet, he.FixedSubnet(largest))
        one = he.extract(supernet, largest, merge=True)
        zeros = he.sparsity_of(one).share
        assert zeros >= SPARSITY - 0.01, "merging lost zeros"
        count = he.costs.adapter_parameters(supernet, largest)
        return self.row(method, f"rank {rank}, {zeros:.0%} zeros", perplexity(one, self.texts.validation), count, 1.0)


def one_seed(trainings: Sparse, plain: Trainings) -> list[dict[str, Any]]:
    """Rows of all methods."""
    base = trainings.copy()
    integers = trainings.copy()
    he.quantize_(integers, trainings.texts.calibration, bits=BITS, group_size=GROUPS)
    pieces = trainings.texts.validation
    rows = [plain.row("parent", "dense", perplexity(plain.parent, pieces), 0, 1.0)]
    rows.append(trainings.row("no adapters", "sparse", perplexity(base, pieces), 0, 1.0))
    rows.append(trainings.row("no adapters", f"sparse, {BITS} bits", perplexity(integers, pieces), 0, 1.0))
    for rank in RANKS:
        rows += [{**row, "method": LORA, "subnet": f"rank {rank}"} for row in trainings.fixed(rank)]
        rows.append(trainings.merged("SparsePEFT, merged", rank, integers=False))
        rows.append(trainings.merged("QA-SparsePEFT, merged", rank, integers=True))
        rows.append(trainings.merged("QA-SparsePEFT from floats, merged", rank, integers=True, from_floats=True))
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--stories", type=int)
    parser.add_argument("--pieces", type=int)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args(given)
    folder = checked_data(options.data)
    machine = started(options.threads)
    parent, tokenizer = load_parent(folder, NAME)
    texts = prepare(folder, MODELS[NAME], (parent, tokenizer), options)
    rows = []
    for seed in options.seeds:
        rows += one_seed(Sparse(texts, parent, options, seed=seed), Trainings(texts, parent, options, seed=seed))
    means = summary(rows)
    print_table(means)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    write_json(options.json, {"environment": machine, "settings": settings, "summary": means, "rows": rows})


if __name__ == "__main__":
    main()
