"""``hf-elastic reproduce elm``: the path of ELM on a teacher and text, beside what is known of the paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from hf_elastic import costs
from hf_elastic.errors import DataError, SearchError
from hf_elastic.files import read_json, whole_folder
from hf_elastic.pipeline.elm_options import ElmOptions
from hf_elastic.pipeline.elm_plan import spread_widths
from hf_elastic.pipeline.elm_run import ElmResult, ElmRun
from hf_elastic.pipeline.elm_table import FOUND, FUSED, TEACHER
from hf_elastic.pipeline.kept import TRAINED
from hf_elastic.report import aligned
from hf_elastic.spaces import BLOCKS
from hf_elastic.supernet import Supernet

Say = Callable[[str], None]
NOT_FOUND = "NOT FOUND"
SOURCE = "Wang 2025, arXiv 2510.27037; settings of the author's sibling code (W-PCA); its tables could not be obtained"

_STORIES, _TEXT = "stories260K/hf", "tinystories/train_944k.txt"
_SCALES: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "size": "micro", "epochs": 2.0, "batch_size": 16, "sequence_length": 64, "learning_rate": 2e-3,
        "evaluations": 60,
    },
    "full": {
        "teacher": "google-bert/bert-base-uncased", "size": "small", "epochs": 10.0, "batch_size": 256,
        "sequence_length": 128, "learning_rate": 1e-4, "dropout": 0.1, "weights": "fresh", "evaluations": 2000,
    },
}  # fmt: skip
PUBLISHED_SETTINGS: Mapping[str, str] = {
    "teacher": "BERT-base", "text": "Wikipedia and BooksCorpus", "layers": "12", "width": "528",
    "batch": "256", "learning rate": "0.0001", "epochs of the supernet": "10", "tokens of a sequence": NOT_FOUND,
    "labels": "none, states alone", "evaluations": "2000 (40 generations of 50)", "fitness": "accuracy on MNLI",
    "found path starts from": "new weights", "blocks": "6",
}  # fmt: skip


def reproduce_elm(
    *,
    output: str | Path,
    scale: str = "small",
    data: str | Path | None = None,
    say: Say = print,
    model: str | None = None,
    steps: int | None = None,
    evaluations: int | None = None,
    seed: int | None = None,
) -> str:
    """Runs the path of ELM and says what the paper has, what we have, and what differs.

    ``small`` distils stories260K (a decoder of 0.26 million parameters) on 0.9 MB of TinyStories, two epochs for the
    supernet and two for what it found: ten minutes on one busy core, about five on two. ``full`` is the paper's own:
    BERT-base into ELM-Small, on text of one's own; days on a GPU.

    Args:
        output: folder that keeps the run (in ``elm.run``) and the model (in ``elm``).
        scale: ``small`` or ``full``.
        data: folder with the data of ``small``, by default ``HF_ELASTIC_DATA``; of ``full`` a file of text, a folder of
            them, or the name of a data set.
        say: where progress lines go.
        model: another teacher.
        steps: at most so many for the supernet; at scale ``full`` text is then streamed, as it may not fit into memory.
        evaluations: of the search.
        seed: of everything random.

    Returns:
        The tables and the differences.

    Raises:
        SearchError: there is no such scale.
        DataError: there is no data.
        ElasticError: as :class:`~hf_elastic.pipeline.elm_run.ElmRun`.
    """
    if scale not in _SCALES:
        raise SearchError(f"scale={scale!r} is not one of {', '.join(_SCALES)}")
    folder = Path(output)
    found = _small(folder, data, model) if scale == "small" else _full(data, model)
    changes = {"steps": steps, "evaluations": evaluations, "seed": seed}
    settings = {**_SCALES[scale], **found, **{key: value for key, value in changes.items() if value is not None}}
    settings["stream"] = scale == "full" and steps is not None
    run = ElmRun(ElmOptions(output=str(folder / "elm"), **settings), say=say)
    return beside_the_paper(run, run.run(), teacher=model or _TEACHERS[scale])


def _small(folder: Path, data: str | Path | None, model: str | None) -> dict[str, Any]:
    given = data or os.environ.get("HF_ELASTIC_DATA")
    source = Path(given or "")
    needed = [_TEXT, *([] if model else [_STORIES])]
    if given is None or any(not (source / name).exists() for name in needed):
        raise DataError(
            f"elm needs {' and '.join(needed)} in a folder: pass --data FOLDER or set HF_ELASTIC_DATA"
        )  # fmt: skip
    teacher = model or str(teacher_with_tokenizer(source / _STORIES, folder / "teacher"))
    return {"teacher": teacher, "data": (str(source / _TEXT),)}


def _full(data: str | Path | None, model: str | None) -> dict[str, Any]:
    if data is None:
        raise DataError("elm at scale full needs text: pass --data a file, a folder of .txt files, or a data set")
    path = Path(data)
    files = sorted(str(file) for file in path.glob("*.txt")) if path.is_dir() else [str(data)]
    if not files:
        raise DataError(f"{path} holds no .txt file")
    return {"data": tuple(files), **({} if model is None else {"teacher": model})}


_TEACHERS: Mapping[str, str] = {"small": "stories260K", "full": "BERT-base"}


def beside_the_paper(run: ElmRun, result: ElmResult, *, teacher: str) -> str:
    """The table of the paper's numbers and ours, and what differs; ``teacher`` is what the teacher is called."""
    rows = {row["name"]: row for row in result.rows}
    supernet = Supernet.from_pretrained(result.folder / TRAINED)
    with spread_widths(supernet, run.plan.widths[-1:]):
        whole = costs.total_parameters(supernet, supernet.space.canonical(result.architecture))
    grown, fused = rows[FOUND]["total_parameters"], rows[FUSED]["total_parameters"]
    stages = result.record["stages"]
    minutes = sum(stage.get("seconds", 0.0) for stage in stages.values()) / 60
    before = sum(layer["before"] for layer in stages["fusion"].get("layers", ()))
    after = sum(layer["after"] for layer in stages["fusion"].get("layers", ()))
    last = result.rows[-1]
    lines = [
        ["", "paper", "ours"],
        ["total parameters", "15.6 M (ELM-Small)", costs.count(last["total_parameters"])],
        ["fewer by growth and fusion", "15-25 %, both together", f"{1 - fused / whole:.0%}"],
        ["  by growth", NOT_FOUND, f"{1 - grown / whole:.0%} (of the same blocks at their largest width)"],
        ["  by head fusion", NOT_FOUND, f"{1 - fused / grown:.1%} ({before} heads, {after} afterwards)"],
        ["quality", "GLUE 84.5 (ELM-Small)", f"perplexity {_shown(last['perplexity'])}"],
        ["  of the teacher", NOT_FOUND, f"perplexity {_shown(rows[TEACHER]['perplexity'])}"],
        ["  of the found path in the supernet", NOT_FOUND, f"perplexity {_shown(rows[FOUND]['perplexity'])}"],
        ["perplexity of a decoder", NOT_FOUND, _shown(last["perplexity"]) if run.texts.causal else "-"],
        ["latency", NOT_FOUND, f"{1e3 * last['latency']:.2f} ms, teacher {1e3 * rows[TEACHER]['latency']:.2f} ms"],
        ["time", "7.1 GPU days (8.5 without growth)", f"{minutes:.0f} minutes on {run.setting.device}"],
    ]
    return "\n".join([aligned(lines), "", f"paper: {SOURCE}", "what differs:", *_differences(run, teacher)])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _differences(run: ElmRun, teacher: str) -> list[str]:
    options, plan = run.options, run.plan
    epochs = "-" if plan.epoch is None else f"{plan.steps / plan.epoch:.3g}"
    ours = {
        "teacher": teacher,
        "text": ", ".join(Path(name).name for name in options.data),
        "layers": str(plan.layers),
        "width": str(plan.size.hidden_size),
        "batch": str(options.batch_size),
        "learning rate": f"{options.learning_rate:g}",
        "epochs of the supernet": epochs,
        "tokens of a sequence": str(options.sequence_length),
        "labels": "of the text, beside the states" + (" and predictions" if run.texts.causal else ""),
        "evaluations": str(options.evaluations),
        "fitness": "perplexity on held-out text",
        "found path starts from": "new weights" if options.weights == "fresh" else "its weights in the supernet",
        "blocks": str(len(BLOCKS)),
    }
    differing = [f"  {key}: paper {value}, ours {ours[key]}" for key, value in PUBLISHED_SETTINGS.items()
                 if value != ours[key]]  # fmt: skip
    heads = f"  head fusion: paper {NOT_FOUND} (the code re-splits, no parameter goes), ours {options.fusion}"
    return [*differing, heads, "  fine-tuning of the supernet on GLUE: paper yes, ours no"]


def teacher_with_tokenizer(source: Path, folder: Path) -> Path:
    """A teacher whose tokenizer transformers can read; one that has only llama2.c's is copied with one made of that.

    Args:
        source: the checkpoint.
        folder: where the copy goes.
    """
    stated = source / "llama2c_tokenizer.json"
    if (source / "tokenizer.json").is_file() or not stated.is_file():
        return source
    if not (folder / "tokenizer.json").is_file():
        with whole_folder(folder, overwrite=True) as aside:
            for name in ("config.json", "generation_config.json", "model.safetensors"):
                shutil.copyfile(source / name, aside / name)
            _llama2c_tokenizer(read_json(stated)).save_pretrained(aside)
    return folder


def _llama2c_tokenizer(stated: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """BPE with the merges that scored pieces stand for: pairs of pieces that make a third, by the third's score."""
    pieces, scores = list(stated["pieces"]), stated["scores"]
    special = {name: pieces[stated[name]].strip() for name in ("bos", "eos", "unk")}
    for name, token in special.items():
        pieces[stated[name]] = token
    numbers: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        numbers.setdefault(piece, number)
    order = sorted(numbers, key=lambda piece: -scores[numbers[piece]])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in numbers and piece[cut:] in numbers
    ]
    bytes_known = "<0x0A>" in numbers
    made = Tokenizer(models.BPE(numbers, merges, unk_token=special["unk"], byte_fallback=bytes_known))
    made.normalizer = normalizers.Prepend(" ")
    made.post_processor = processors.TemplateProcessing(
        single=f"{special['bos']} $A", special_tokens=[(special["bos"], stated["bos"])]
    )
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{name}_token": token for name, token in special.items()})
