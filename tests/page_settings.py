"""What the snippets of each page need: tiny checkpoints under the names that the page uses, variables that it takes
for granted, and what is changed in them so that a run takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tiny_benchmarks import flexibert_rows, lts_row, write_lines
from tiny_checkpoints import (
    classifier,
    decoder_tokenizer,
    language_model,
    masked_model,
    sentence_encoder,
    write_rows,
    write_text,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    TrainingArguments,
)

import hf_elastic as he

Names = dict[str, Any]
LENGTH = 12
GROUPS = {"hidden_size": 128, "intermediate_size": 256}  # of 128 inputs that share a scale
LLAMA = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
QUICK = ("--minutes", "0", "--evaluations", "6", "--sequence-length", "24", "--batch-size", "8", "--device", "cpu",
         "--precision", "fp32")  # fmt: skip
TRAINED = ("--minutes", "1", *QUICK[2:])
ELM = ("--size", "nano", "--steps", "12", "--batch-size", "4", "--sequence-length", "16", "--evaluations", "6",
       "--device", "cpu", "--learning-rate", "5e-3")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What one section of a page needs.

    Attributes:
        files: writes checkpoints and data into the folder in which the section runs.
        names: variables that the page takes for granted, made before its first block of Python.
        replaced: text of the section and what stands in its place; all of it has to be there.
        added: options of a command of ``hf-elastic``, by its name; they stand in place of equal ones of the page.
        needs: modules without which the section is not run.
    """

    files: Callable[[Path], object] = lambda folder: None
    names: Callable[[], Names] = dict
    replaced: tuple[tuple[str, str], ...] = ()
    added: Mapping[str, tuple[str, ...]] | None = None
    needs: tuple[str, ...] = ()


def token_rows(*, count: int = 32, length: int = LENGTH, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of token ids that every vocabulary here holds, with labels as a causal model takes them."""
    ids = torch.randint(6, 40, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in ids]


def token_batches(count: int = 4, *, labels: bool = True, seed: int = 0, length: int = LENGTH) -> list[dict[str, Any]]:
    """Batches of 16 rows as a collator makes them."""
    rows = token_rows(count=16 * count, seed=seed, length=length)
    kept = [name for name in rows[0] if labels or name != "labels"]
    return [
        {name: torch.tensor([row[name] for row in rows[i : i + 16]]) for name in kept} for i in range(0, 16 * count, 16)
    ]


def arguments(steps: int = 2) -> TrainingArguments:
    """Of a training of two steps."""
    return TrainingArguments("training", max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True)


def llama(**changes: Any) -> PreTrainedModel:
    """A tiny LLaMA with four groups of keys and values, read again from its folder at each call."""
    folder = Path("-".join(["llama", *(f"{name}-{value}" for name, value in changes.items())]))
    if not folder.exists():
        language_model(folder, **{**LLAMA, **changes})
    return AutoModelForCausalLM.from_pretrained(folder)


def training() -> Names:
    """What examples of training take for granted."""
    return {
        "batches": token_batches(), "validation": token_batches(1, seed=1), "held_out": token_batches(1, seed=1),
        "train": token_rows(), "args": arguments(), "he": he,
    }  # fmt: skip


def readme_python() -> Names:
    language_model(Path("my-llama"), **LLAMA)
    teacher = AutoModelForCausalLM.from_pretrained("my-llama")
    rows = [{"input_ids": row["input_ids"]} for row in token_rows(count=80)]
    inputs = {"input_ids": torch.tensor([rows[0]["input_ids"]]), "max_new_tokens": 2}
    return {**training(), "teacher": teacher, "rows": rows, "inputs": inputs}


def readme_adapters() -> Names:
    config = he.ElasticLoraConfig(r=32, ranks=[16, 24, 32], target_modules=["q_proj", "v_proj"])
    space = he.Supernet(get_peft_model(llama(), config)).space
    return {**training(), "model": llama(), "architecture": space.midpoint()}


def grouped() -> Names:
    """A LLaMA whose projections divide into groups of 128."""
    return {**training(), "model": llama(**GROUPS)}


def compression_python() -> Names:
    config = he.ElasticLoraConfig(r=32, ranks=[16, 24, 32], target_modules="all-linear")
    model = llama(**GROUPS)
    space = he.add_lora(model, config).space
    return {**grouped(), "architecture": space.midpoint()}


def readme_scores() -> Names:
    language_model(Path("my-llama"), **LLAMA)
    config = he.ElasticConfig(intermediate_size=[0.25, 0.5, 1.0])
    return {**training(), "model": llama(), "supernet": he.make_elastic(llama(), config)}


def readme_blocks() -> Names:
    config = he.spaces.elm_config("micro")
    space = he.make_elastic(AutoModelForMaskedLM.from_config(config)).space
    args = TrainingArguments("grown", num_train_epochs=2, per_device_train_batch_size=1, report_to=[], use_cpu=True)
    return {**training(), "args": args, "architecture": space.smallest()}


def readme_routing() -> Names:
    return {**training(), "model": llama(), "batches": token_batches(8, labels=False)}


def adapters_python() -> Names:
    return {**training(), "model": llama()}


def adapters_with_base() -> Names:
    return {**training(), "model": llama(num_key_value_heads=8), "batches": token_batches()}


def adapters_saved() -> Names:
    model = llama()
    he.make_elastic(model, he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    supernet = he.add_lora(model, he.ElasticLoraConfig(r=8, ranks=[4, 8], target_modules="all-linear"))
    supernet.save_pretrained("both")
    return {}


def fast_python() -> Names:
    batches = token_batches(12, labels=False)
    model = AutoModel.from_pretrained(sentence_encoder(Path("encoder"), max_position_embeddings=128))
    return {"model": model, "batches": batches, "held_out": token_batches(2, labels=False, seed=1)}


def proxies_python() -> Names:
    roles = he.proxies.roles_of(llama())
    return {**training(), "model": llama(), "my_module": llama(), "my_roles": roles}


def routing_python() -> Names:
    language_model(Path("gpt2"), "gpt2", n_inner=256)
    return {"batches": token_batches(8, labels=False), "held_out": token_batches(1)}


def routing_training() -> Names:
    rows = [{"input_ids": row["input_ids"]} for row in token_rows()]
    tokenizer = decoder_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return {"model": llama(), "train": rows, "args": arguments(), "tokenizer": tokenizer}


def training_page() -> Names:
    supernet = he.make_elastic(llama(), he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    return {**training(), "supernet": supernet}


def decoder_files(folder: Path) -> None:
    language_model(folder / "my-model", **GROUPS)
    write_rows(folder / "rows.jsonl", count=200)
    write_text(folder / "text.txt", count=300)


def encoder_files(folder: Path) -> None:
    sentence_encoder(folder / "my-encoder", num_hidden_layers=4)
    write_text(folder / "text.txt", count=300)


def model_files(folder: Path) -> None:
    masked_model(folder / "MODEL", num_hidden_layers=4, **{**GROUPS, "intermediate_size": 512})
    write_text(folder / "text.txt", count=300)
    write_rows(folder / "rows.jsonl", count=200)


def choose_routing() -> Names:
    language_model(Path("DECODER"), **LLAMA)
    return {"batches": token_batches(8, labels=False)}


def search_page() -> Names:
    model = llama(intermediate_size=512)
    supernet = he.make_elastic(model, he.ElasticConfig(intermediate_size=[0.25, 0.5, 0.75, 1.0]))
    return {**training(), "supernet": supernet}


def extending_page() -> Names:
    return {"batch": {"input_ids": token_batches(1)[0]["input_ids"]}}


def score_files(folder: Path) -> None:
    write_lines(folder / "flexibert.jsonl", flexibert_rows(60))
    rows = [lts_row(depth=2 + n % 3, width=64 * (1 + n % 4), ppl=40 - n / 10) for n in range(60)]
    write_lines(folder / "random_GPT2_wt103.jsonl", rows)
    lines = [f"{number / 7},{number % 5}" for number in range(40)]
    (folder / "mine.csv").write_text("\n".join(["accuracy,other", *lines]), encoding="utf-8")
    language_model(folder / "my-llama", **LLAMA)


def elm_files(folder: Path) -> None:
    write_text(folder / "text.txt")
    masked_model(folder / "teacher", num_hidden_layers=4)
    language_model(folder / "decoder", "gpt2")


def minilm_files(folder: Path) -> None:
    sentence_encoder(folder / "sentence-transformers" / "all-MiniLM-L6-v2", num_hidden_layers=4)
    write_text(folder / "my_text.txt", count=300)


def labelled_files(folder: Path) -> None:
    classifier(folder / "my-model", **GROUPS)
    write_rows(folder / "rows.jsonl", count=200)
    write_text(folder / "text.txt", count=300)


def fast_files(folder: Path) -> None:
    sentence_encoder(folder / "MODEL", num_hidden_layers=4)
    write_text(folder / "text.txt", count=300)


def lonas_files(folder: Path) -> None:
    labelled_files(folder)
    masked_model(folder / "bert")
    for name, seed in (("sst2_train", 0), ("sst2_dev", 1)):
        (folder / "glue").mkdir(exist_ok=True)
        rows = write_rows(folder / "rows-of-glue.jsonl", count=80, seed=seed).read_text(encoding="utf-8")
        (folder / "glue" / f"{name}.jsonl").write_text(rows.replace('"text"', '"sentence"'), encoding="utf-8")


def elm_commands(folder: Path) -> None:
    language_model(folder / "TEACHER", num_hidden_layers=2)
    write_text(folder / "text.txt")
    language_model(folder / "stories260K" / "hf", num_hidden_layers=2)
    (folder / "tinystories").mkdir()
    write_text(folder / "tinystories" / "train_944k.txt")


def readme_elm_files(folder: Path) -> None:
    masked_model(folder / "my-teacher")
    write_text(folder / "text.txt")


SETTINGS: dict[tuple[str, str], Settings] = {
    ("README.md", "One command"): Settings(
        minilm_files, added={"compress": QUICK, "search": ("--evaluations", "6")},
    ),
    ("README.md", "In Python"): Settings(
        names=readme_python, replaced=(("minutes=10", "minutes=0.02"), ("evaluations=200", "evaluations=6"))
    ),
    ("README.md", "Adapters"): Settings(labelled_files, readme_adapters, added={"compress": TRAINED}),
    ("README.md", "Sparse and 4-bit models that stay so"): Settings(
        labelled_files, grouped, added={"compress": TRAINED}
    ),
    ("README.md", "Scores without training"): Settings(score_files, readme_scores, added={"score": ()}),
    ("README.md", "Candidate blocks that grow"): Settings(readme_elm_files, readme_blocks, added={"elm": ELM}),
    ("README.md", "Compute chosen at inference"): Settings(names=readme_routing),
    ("docs/index.md", ""): Settings(minilm_files, added={"compress": QUICK}),
    ("docs/quickstart.md", "A smaller checkpoint"): Settings(encoder_files, added={"compress": QUICK}),
    ("docs/quickstart.md", "The same in Python"): Settings(encoder_files),
    **{
        ("docs/choose.md", section): Settings(model_files, added={"compress": added, "search": ("--evaluations", "6")})
        for section, added in (
            ("1. Minutes, no labels, no training", QUICK), ("2. Time to train", QUICK),
            ("3. An adapter, with the rank chosen for each layer", TRAINED),
            ("4. A fine-tuned model that is smaller as well", TRAINED),
            ("5. A fine-tuned model of zeros and 4-bit integers", TRAINED), ("Before all of these: which shape?", ()),
        )
    },
    ("docs/choose.md", "6. Compute chosen at inference"): Settings(names=choose_routing),
    ("docs/choose.md", "7. A new small model from a teacher"): Settings(elm_commands, added={"elm": ELM}),
    ("docs/search.md", "In Python"): Settings(names=search_page, replaced=(("evaluations=200", "evaluations=6"),)),
    ("docs/search.md", "From the command line"): Settings(
        encoder_files, added={"compress": QUICK, "search": ("--evaluations", "6")}
    ),
    ("docs/extending.md", "An objective"): Settings(names=extending_page),
    ("docs/adapters.md", "Ranks alone"): Settings(
        names=adapters_python,
        replaced=(("evaluations=100", "evaluations=6"), ("target_modules=[...]", 'target_modules="all-linear"')),
    ),
    ("docs/adapters.md", "With an elastic base"): Settings(names=adapters_with_base),
    ("docs/adapters.md", "Saving and loading"): Settings(names=adapters_saved),
    ("docs/adapters.md", "From the command line"): Settings(
        lonas_files, added={"compress": TRAINED, "reproduce": ("--data", ".", "--model", "bert", "--steps", "4",
                                                               "--evaluations", "5")},
    ),
    ("docs/compression.md", "In Python"): Settings(names=compression_python),
    ("docs/compression.md", "From the command line"): Settings(
        decoder_files, added={"compress": TRAINED}
    ),
    ("docs/elm.md", "One command"): Settings(
        elm_commands, added={"elm": ELM, "reproduce": ("--data", ".", "--steps", "10", "--evaluations", "6")}
    ),
    ("docs/elm.md", "In Python"): Settings(elm_files),
    ("docs/fast.md", ""): Settings(fast_files, fast_python, added={"compress": QUICK}),
    ("docs/proxies.md", "In Python"): Settings(
        score_files, proxies_python, replaced=(("proxies.Roles(...)", "my_roles"),)
    ),
    ("docs/proxies.md", "From the command line"): Settings(score_files),
    ("docs/routing.md", "Two minutes"): Settings(names=routing_python),
    ("docs/routing.md", "What can be routed"): Settings(names=lambda: {"model": llama(intermediate_size=256)}),
    ("docs/routing.md", "Training"): Settings(names=routing_training, replaced=(("max_steps=300", "max_steps=2"),)),
    ("docs/training.md", "Which tool"): Settings(names=training_page),
}  # fmt: skip
# Blocks of Python, by their number on the page, in the order in which they run where that is not the order of the page.
ORDER = {"docs/elm.md": (0, 3, 1, 2)}
