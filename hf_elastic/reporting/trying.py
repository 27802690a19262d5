"""``hf-elastic try``: a smaller model and its parent side by side on a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_elastic.errors import CheckpointError, DataError, UnsupportedModelError
from hf_elastic.files import read_json

if TYPE_CHECKING:
    from hf_elastic.pipeline.tasks import Task

PARENT, CHILD = "parent", "smaller"
_MASK = "[MASK]"
_FILLS = 5
_TIMED_TOKENS, _TIMED_SECONDS = 128, 4.0
_ENDINGS = {
    "ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "classification", "Model": "embedding",
}  # fmt: skip
_ANSWERS_TO = {
    "causal-lm": "a text to go on with", "masked-lm": f"a text with a {_MASK}",
    "classification": "a text to classify, or two as --pair A B",
    "embedding": "two sentences, as --pair A B or two --prompt",
}  # fmt: skip
Prompt = str | tuple[str, str]
"""A text, or two that belong together."""
Told = Sequence[str]


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    name: str
    source: str
    model: Any
    tokenizer: Any
    disk_bytes: int
    task: Task
    able: bool

    @property
    def parameters(self) -> int:
        """Of the model, adapters included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def encoded(self, texts: Sequence[str], second: Sequence[str] | None = None, **more: Any) -> Any:
        """Token ids as the model takes them, cut to its positions; with ``second`` two texts each."""
        config = self.model.config
        known = getattr(config, "max_position_embeddings", None)
        given = [list(texts)] if second is None else [list(texts), list(second)]
        batch = self.tokenizer(*given, return_tensors="pt", truncation=True, max_length=known, **more)
        told_apart = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []
        return {name: batch[name] for name in ("input_ids", "attention_mask", *told_apart) if name in batch}


def try_models(
    folder: str | Path, *, parent: str | None = None, prompts: Sequence[Prompt] = (), new_tokens: int = 32
) -> str:
    """Lets a smaller model and its parent answer the same prompts, and compares their size and speed.

    Both run on the CPU in fp32. A causal model goes on with each prompt greedily; a masked one fills its ``[MASK]``
    with the five likeliest tokens; a classifier tells label and probability, a regression its number; an encoder the
    cosine of each two texts.

    Args:
        folder: an export: a checkpoint of any form, or a plain adapter.
        parent: folder or Hub name of the other model; by default what ``architecture.json`` names.
        prompts: texts. For a classifier a tuple is a text and its second one, as in entailment; an encoder has no use
            for which two are given together.
        new_tokens: that a causal model generates.

    Returns:
        Tables and answers as text.

    Raises:
        CheckpointError: the folder is no export, its parent is not named or not there, or one of both is broken.
        DataError: there are no prompts, or not such as the model answers to.
        UnsupportedModelError: the model is for something else.
    """
    import torch

    path = Path(folder).expanduser()
    origin = _parent_of(path, parent)
    _require_reachable(origin)
    purpose = _purpose(path, origin)
    _check_prompts(purpose, prompts, new_tokens=new_tokens)
    # Two texts are one question to a classifier, and one each to an encoder.
    asked: Sequence[Any] = [text for p in prompts for text in _texts(p)] if purpose == "embedding" else prompts
    sides = [_opened(PARENT, origin, origin, purpose=purpose), _opened(CHILD, str(path), origin, purpose=purpose)]
    answer: Callable[[_Side, Sequence[Any], int], list[Told]] = {
        "causal-lm": _continued, "masked-lm": _filled, "classification": _labelled, "embedding": _likened,
    }[purpose]  # fmt: skip
    with torch.inference_mode():
        told = {side.name: answer(side, asked, new_tokens) if side.able else _unable(asked) for side in sides}
        costs = _costs(sides)
    questions = _pairs(asked) if purpose == "embedding" else ["\n".join(map(repr, _texts(p))) for p in asked]
    parts = [costs]
    for number, question in enumerate(questions):
        lines = [line for side in sides for line in _indented(side.name, told[side.name][number])]
        parts.append("\n".join([question, *lines]))
    return "\n\n".join(parts)


def _texts(prompt: Prompt) -> tuple[str, ...]:
    return (prompt,) if isinstance(prompt, str) else prompt


def _unable(prompts: Sequence[Prompt]) -> list[Told]:
    return [["has no weights for this task"] for _ in prompts]


def _indented(name: str, lines: Told) -> list[str]:
    return [f"  {name if place == 0 else '':<8} {line}" for place, line in enumerate(lines)]


def _parent_of(folder: Path, given: str | None) -> str:
    """What to compare with: as given, or as the export says.

    Raises:
        CheckpointError: the folder is no export, or its parent is not known.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give one that a run exported")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        hint = (
            f"; it is a run, whose model is in {folder.with_suffix('')}" if (folder / "result.json").is_file() else ""
        )
        raise CheckpointError(f"{folder} holds no config.json and no adapter_config.json{hint}")
    if given is not None:
        return given
    record = read_json(folder / "architecture.json") if (folder / "architecture.json").is_file() else {}
    named = record.get("parent") or record.get("base") or _asked_for(folder)
    if not named:
        raise CheckpointError(f"nothing in {folder} says what its parent is; give --parent FOLDER")
    return str(named)


def _require_reachable(origin: str) -> None:
    """Refuses a parent that has no config where this runs.

    Raises:
        CheckpointError: it has none.
    """
    from hf_elastic.pipeline.tasks import read_config

    try:
        read_config(origin)
    except CheckpointError as error:
        raise CheckpointError(f"the parent is not to be had: {error}; give --parent FOLDER") from error


def _asked_for(folder: Path) -> str:
    """The parent or teacher in the copy of ``result.json`` that an export holds."""
    if not (folder / "result.json").is_file():
        return ""
    options = read_json(folder / "result.json").get("options") or {}
    return str(options.get("model") or options.get("teacher") or "")


def _purpose(folder: Path, origin: str) -> str:
    """What a model is for, by its class.

    Raises:
        UnsupportedModelError: it is for something else.
    """
    if (folder / "modules.json").is_file():
        return "embedding"
    if (folder / "config.json").is_file():
        name = str((read_json(folder / "config.json").get("architectures") or [""])[0])
    else:
        task = read_json(folder / "adapter_config.json").get("task_type")
        name = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification"}.get(str(task), "")
        name = name or _class_of(origin)
    found = next((purpose for ending, purpose in _ENDINGS.items() if name.endswith(ending)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{folder} is a {name or 'model of no stated class'}; tried are models that end in {', '.join(_ENDINGS)}"
        )
    return found


def _class_of(model: str) -> str:
    from hf_elastic.pipeline.tasks import read_config

    return str((read_config(model).architectures or [""])[0])


def _check_prompts(purpose: str, prompts: Sequence[Prompt], *, new_tokens: int) -> None:
    if type(new_tokens) is not int or new_tokens < 1:
        raise DataError(f"new_tokens={new_tokens!r} must be an integer of at least 1")
    least, texts = 2 if purpose == "embedding" else 1, [text for prompt in prompts for text in _texts(prompt)]
    in_pairs = purpose in ("classification", "embedding")
    if len(texts) < least or not all(text.strip() for text in texts) or (len(texts) > len(prompts) and not in_pairs):
        raise DataError(f"a model for {purpose} needs {_ANSWERS_TO[purpose]}, got {len(prompts)} prompts: {prompts!r}")
    if purpose == "masked-lm" and (bare := next((text for text in texts if _MASK not in text), None)):
        raise DataError(f"{bare!r} holds no {_MASK}; put one where a word is to be guessed")


def _opened(name: str, source: str, origin: str, *, purpose: str) -> _Side:
    """Loads a model in fp32 with its tokenizer, an adapter onto its base.

    Raises:
        CheckpointError: it is not there, or broken.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from hf_elastic.checkpoint.companions import parent_folder
    from hf_elastic.pipeline.tasks import one_line

    task = _task(purpose, origin)
    adapter = (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file()
    try:
        holder = source if source == origin or _holds_tokenizer(source) else origin
        tokenizer = AutoTokenizer.from_pretrained(holder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"cannot load the tokenizer of the {name} {source!r}: {one_line(error)}") from error
    model, able = _with_adapter(task, Path(source), origin) if adapter else _loaded(task, source), True
    if model is None:
        model, able = _loaded(replace(task, name="embedding", auto_class=AutoModel), source), False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    where = parent_folder(source)
    size = sum(file.stat().st_size for file in where.glob("*.safetensors")) if where is not None else 0
    return _Side(name, source, model.to(torch.float32).eval(), tokenizer, size, task, able)


def _holds_tokenizer(folder: str) -> bool:
    from hf_elastic.checkpoint.companions import TOKENIZER_FILES

    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def _task(purpose: str, origin: str) -> Task:
    """How models of this kind are loaded; sentences are pooled as the parent's modules say."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    from hf_elastic.pipeline.options import CompressOptions
    from hf_elastic.pipeline.tasks import Task, resolve_task

    if purpose == "embedding":
        return resolve_task(CompressOptions(origin, ("-",), "-", task="embedding", sequence_length=4))
    classes = {"causal-lm": AutoModelForCausalLM, "masked-lm": AutoModelForMaskedLM,
               "classification": AutoModelForSequenceClassification}  # fmt: skip
    return Task(purpose, classes[purpose], "logits", ())


def _loaded(task: Task, source: str) -> Any:
    """A checkpoint; ``None`` where it lacks what the task needs, as a parent that never was a classifier does."""
    from hf_elastic.models import register_auto_classes
    from hf_elastic.pipeline.options import CompressOptions
    from hf_elastic.pipeline.tasks import load_model

    register_auto_classes()  # what is remote code elsewhere is at home here
    try:
        return load_model(task, CompressOptions(source, ("-",), "-"))
    except UnsupportedModelError:
        return None


def _with_adapter(task: Task, folder: Path, origin: str) -> Any:
    """A plain adapter on its base; a classifier of its own comes with it."""
    from hf_elastic.adapters.loading import load_fixed_lora
    from hf_elastic.packed_format import unpack_
    from hf_elastic.pipeline.tasks import load_with_classifier

    labels = read_json(folder / "architecture.json").get("labels") if (folder / "architecture.json").is_file() else None
    fresh = task.name == "classification" and not _class_of(origin).endswith("ForSequenceClassification")
    if fresh and labels:
        base: Any = load_with_classifier(origin, labels, seed=0)[0]
    else:
        base = unpack_(_loaded(task, origin))
    return load_fixed_lora(base, folder)


def _costs(sides: Sequence[_Side]) -> str:
    """Size and latency of both, timed in turns."""
    from hf_elastic.costs import count, measure_latency
    from hf_elastic.report import aligned

    length = min(_TIMED_TOKENS, *(_positions(side) for side in sides))
    ids = sides[0].encoded(["a "])["input_ids"][:, :1].expand(1, length)  # (1, T)
    runs = {side.name: partial(side.model, input_ids=ids) for side in sides}
    timed = measure_latency(runs, seconds=_TIMED_SECONDS)
    whole = sides[0]
    lines = [["", "parameters", "on disk", f"latency of 1x{length}", "speed-up"]]
    for side in sides:
        share = f"{count(side.parameters)} ({side.parameters / whole.parameters:.0%})"
        latency = timed[side.name].median
        faster = f"{timed[whole.name].median / latency:.2f}x"
        lines.append([side.name, share, f"{side.disk_bytes / 1e6:.1f} MB", f"{1e3 * latency:.2f} ms", faster])
    return "\n".join([*(f"{side.name}: {side.source}" for side in sides), aligned(lines)])


def _positions(side: _Side) -> int:
    return int(getattr(side.model.config, "max_position_embeddings", _TIMED_TOKENS)) - 2


def _continued(side: _Side, prompts: Sequence[str], new_tokens: int) -> list[Told]:
    told: list[Told] = []
    for prompt in prompts:
        inputs = side.encoded([prompt])
        side.model.generate(**inputs, do_sample=False, max_new_tokens=1)  # the first call of a process takes longer
        began = time.perf_counter()
        ids = side.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        spent = time.perf_counter() - began
        made = ids[0, inputs["input_ids"].shape[1] :]
        text = side.tokenizer.decode(made, skip_special_tokens=True)
        told.append([*(text.splitlines() or [""]), f"({len(made)} tokens, {len(made) / spent:.1f} a second)"])
    return told


def _filled(side: _Side, prompts: Sequence[str], new_tokens: int) -> list[Told]:
    told: list[Told] = []
    for prompt in prompts:
        inputs = side.encoded([prompt.replace(_MASK, side.tokenizer.mask_token)])
        logits = side.model(**inputs).logits[0]  # (T, V)
        places = (inputs["input_ids"][0] == side.tokenizer.mask_token_id).nonzero().flatten()
        lines = []
        for place in places.tolist():
            best = logits[place].softmax(-1).topk(min(_FILLS, logits.shape[-1]))
            words = [side.tokenizer.decode([token]).strip() for token in best.indices.tolist()]
            pairs = zip(words, best.values.tolist(), strict=True)
            lines.append(", ".join(f"{word} {chance:.1%}" for word, chance in pairs))
        told.append(lines or ["the prompt is longer than the model's positions, its mask is cut off"])
    return told


def _labelled(side: _Side, prompts: Sequence[Prompt], new_tokens: int) -> list[Told]:
    told: list[Told] = []
    kind = side.model.config.problem_type
    for prompt in prompts:
        text, *second = _texts(prompt)
        logits = side.model(**side.encoded([text], second or None)).logits[0].float()  # (L,)
        if len(logits) == 1 or kind == "regression":
            told.append([", ".join(f"{number:.4f}" for number in logits.tolist())])
            continue
        chances = logits.sigmoid() if kind == "multi_label_classification" else logits.softmax(-1)
        best = chances.topk(min(3, len(chances)))
        names = [side.model.config.id2label[number] for number in best.indices.tolist()]
        told.append([", ".join(f"{n} {c:.1%}" for n, c in zip(names, best.values.tolist(), strict=True))])
    return told


def _likened(side: _Side, prompts: Sequence[str], new_tokens: int) -> list[Told]:
    import torch

    from hf_elastic.distillation import pooled

    inputs = side.encoded(prompts, padding=True)
    states = side.model(**inputs).last_hidden_state  # (B, T, D)
    vectors = pooled(states, inputs["attention_mask"], pooling=side.task.pooling)
    alike = torch.nn.functional.normalize(vectors.float(), dim=-1)
    cosines = alike @ alike.T  # (B, B)
    pairs = [(a, b) for a in range(len(prompts)) for b in range(a + 1, len(prompts))]
    return [[f"cosine {float(cosines[a, b]):.4f}"] for a, b in pairs]


def _pairs(prompts: Sequence[str]) -> list[str]:
    return [f"{a!r}\n{b!r}" for place, a in enumerate(prompts) for b in prompts[place + 1 :]]
