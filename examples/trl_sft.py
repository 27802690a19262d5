"""TRL's SFTTrainer on an elastic model: conversations or texts, elastic LoRA, one adapter of the ranks that were found.

    python examples/trl_sft.py --model my-llama --data chats.jsonl --output adapter
    python examples/trl_sft.py --model my-llama --data trl-lib/Capybara:train --steps 1000 --output adapter

Rows have ``messages``, ``prompt`` and ``completion``, or ``text``, as TRL reads them; a tenth of them, at most 200, is
held back to search by. ``ElasticTrainerMixin`` in front of any Trainer gives it ``supernet=`` and ``sampling=``; the
rest is TRL's. The run keeps checkpoints and evaluations in ``OUTPUT.work``: killed and started again with the same
options, it goes on. Needs ``pip install "hf-elastic[trl]"``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from going_on import checkpoint_before, search_storage, work_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_elastic as he

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.exit('this example needs trl: pip install "hf-elastic[trl]"')

KNOWN = ("messages", "prompt", "completion", "text")


class ElasticSFTTrainer(he.ElasticTrainerMixin, SFTTrainer):
    """SFTTrainer that trains subnets."""


def rows_of(source: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a ``.jsonl`` file or of a data set on the Hub (NAME or NAME:SPLIT), in TRL's columns."""
    if Path(source).is_file():
        found = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()[:count]]
    else:
        name, _, split = source.partition(":")
        found = list(load_dataset(name, split=split or "train").take(count))
    rows = [{name: row[name] for name in KNOWN if name in row} for row in found]
    if len(rows) < 10 or not rows[0]:
        sys.exit(f"{source} gives {len(rows)} rows with one of {', '.join(KNOWN)}; give at least 10")
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal model")
    parser.add_argument("--data", required=True, help=".jsonl file, or name of a data set on the Hub")
    parser.add_argument("--output", required=True, help="folder of the adapter")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--within", type=float, default=0.5, help="adapter parameters, as a share of the largest")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def trainer_of(supernet: he.Supernet, tokenizer: Any, arguments: argparse.Namespace, *, folder: Path) -> Any:
    rows = rows_of(arguments.data, arguments.rows)
    held = max(1, min(200, len(rows) // 10))
    args = SFTConfig(
        str(folder), max_steps=arguments.steps, per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate, warmup_steps=max(1, arguments.steps // 20),
        logging_steps=max(1, arguments.steps // 10), save_strategy="steps", save_steps=max(1, arguments.steps // 5),
        save_total_limit=2, report_to="none", seed=arguments.seed, max_length=arguments.length, bf16=False,
        gradient_checkpointing=True,
    )  # fmt: skip
    return ElasticSFTTrainer(
        model=supernet.model, supernet=supernet, sampling=he.RandomSubnet(seed=arguments.seed), args=args,
        train_dataset=Dataset.from_list(rows[held:]), eval_dataset=Dataset.from_list(rows[:held]),
        processing_class=tokenizer,
    )  # fmt: skip


def held_out(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of the held-out rows, as TRL tokenises and masks them."""
    rows = list(trainer.eval_dataset)
    return [dict(trainer.data_collator(rows[start : start + 8])) for start in range(0, len(rows), 8)]


def main() -> None:
    arguments = parsed()
    folder = work_folder(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    largest = max(arguments.ranks)
    config = he.ElasticLoraConfig(
        r=largest, ranks=arguments.ranks, lora_alpha=2 * largest, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    supernet = he.add_lora(model, config, seed=arguments.seed)
    trainer = trainer_of(supernet, tokenizer, arguments, folder=folder)
    trainer.train(resume_from_checkpoint=checkpoint_before(folder, steps=arguments.steps))
    supernet.model.eval()

    within = {"adapter_parameters": arguments.within}
    result = he.search_subnets(
        supernet.space,
        [he.objectives.loss(supernet, held_out(trainer)), he.objectives.adapter_parameters(supernet)],
        evaluations=arguments.evaluations, within=within, seed=arguments.seed, storage=search_storage(folder),
    )  # fmt: skip
    best = result.best("loss")
    values = ", ".join(f"{name} {value:,.4g}" for name, value in best.values.items())
    print(f"found by {len(result.evaluations)} evaluations: {values}")
    adapter = he.extract_adapter(supernet, best.architecture, base=arguments.model)
    adapter.save_pretrained(arguments.output, overwrite=True)
    print(f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({arguments.model!r}), {arguments.output!r})")


if __name__ == "__main__":
    main()
