"""LoNAS on commonsense questions (Mode B): elastic ranks, and FFN widths of the frozen LLaMA, trained and searched.

    python examples/lonas_commonsense.py --model my-llama --output lonas        # settings of the paper, fewer rows
    python examples/lonas_commonsense.py --tiny --steps 4 --rows 40 --test-rows 8 --evaluations 6 --output lonas

The space is the published one at the model's size (2^64 * 5^32 for LLaMA-7B); every micro-batch draws a subnet, as in
the official code. What is found is written as one merged, smaller model. Rows: ``HF_ELASTIC_DATA``/commonsense, or of
training ``--data``. Killed and started again with the same options, it goes on (``OUTPUT.work``).
"""

from __future__ import annotations

from going_on import checkpoint_before, search_storage, work_folder
from instructions import DATA, accuracy, batches, features, load, option, parser, read, show, training_arguments
from transformers import DataCollatorForSeq2Seq

import hf_elastic as he

SETS = ("boolq", "piqa", "social_i_qa", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
MACS = 0.84  # LoNAS search-1: 1.4 of 1.7 TFLOPs (arXiv 2501.16372, table 1)


def main() -> None:
    arguments = parser(__doc__, steps=300, rows=5000, evaluations=200).parse_args()
    model, tokenizer = load(arguments)
    supernet = he.spaces.lonas_llama(model.config).make(model, seed=arguments.seed)
    print(supernet)
    source = arguments.data or DATA / "commonsense" / "train_5k.jsonl"
    rows = features(tokenizer, read(source, arguments.rows), cutoff=arguments.cutoff)
    held = max(8, len(rows) // 20)
    trainer = he.ElasticTrainer(
        supernet=supernet, sampling=he.RandomSubnet(seed=arguments.seed), per="micro_batch",
        args=training_arguments(arguments), train_dataset=rows[held:],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )  # fmt: skip
    folder = work_folder(arguments)
    trainer.train(resume_from_checkpoint=checkpoint_before(folder, steps=arguments.steps))
    supernet.model.eval()

    validation = batches(tokenizer, rows[:held])
    result = he.search_subnets(
        supernet.space, [he.objectives.loss(supernet, validation), he.objectives.macs(supernet)],
        evaluations=arguments.evaluations, within={"macs": MACS}, seed=arguments.seed, storage=search_storage(folder),
    )  # fmt: skip
    found = result.best("loss", within={"macs": MACS}).architecture
    space = supernet.space
    named: dict[str, dict[str, float]] = {}
    for label, point in {"largest": space.largest(), "heuristic (midpoint)": space.midpoint(), "found": found}.items():
        with supernet.activate(point):
            named[label] = {
                name: accuracy(
                    supernet.model, tokenizer, read(DATA / "commonsense" / f"{name}.jsonl", arguments.test_rows),
                    extract=option, tokens=32,
                )
                for name in SETS
            }  # fmt: skip
    show(supernet, named)
    report = he.export(
        supernet, found, arguments.output, merge=True, tokenizer=tokenizer, loadability="remote-code", overwrite=True
    )
    print(f"found by {len(result.evaluations)} evaluations; {report}")


if __name__ == "__main__":
    main()
