"""Model cards, made from ``architecture.json``, ``result.json`` and what else lies beside the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from hf_elastic.costs import count
from hf_elastic.errors import CheckpointError
from hf_elastic.hub.artefacts import BASE_FOLDER, CLASSIFIER_FOLDER, Artefact, recognise, written_by_us
from hf_elastic.hub.layers import layer_table
from hf_elastic.hub.markdown import code, prose, table
from hf_elastic.hub.metadata import card_data
from hf_elastic.hub.methods import Method, method_of
from hf_elastic.hub.names import without_folders
from hf_elastic.hub.parents import Parent, named_parent, parent_of
from hf_elastic.hub.readme import MARKER
from hf_elastic.hub.runs import run_of, shown_data
from hf_elastic.hub.snippets import snippet_of
from hf_elastic.hub.spaces import space_size
from hf_elastic.report import legend
from hf_elastic.reporting.reading import Run

FIGURE_ENDINGS = (".png", ".svg")
_LOADS: Mapping[str, str] = {
    "stock": "stock transformers, nothing else needed",
    "stock-padded": "stock transformers; layers are padded with zeros to one shape, so it is no faster than its base",
    "remote-code": "transformers with `trust_remote_code=True` (its code is here), or after `import hf_elastic`",
}
_COSTS = ("parameters", "total_parameters", "adapter_parameters", "macs")
_HEADERS: Mapping[str, str] = {
    "parameters": "parameters", "total_parameters": "with embeddings", "adapter_parameters": "adapter parameters",
    "macs": "MACs", "latency": "latency",
}  # fmt: skip


@dataclass(frozen=True)
class About:
    """What a user says about a card; see :func:`model_card`."""

    run: str | Path | None = None
    base_model: str | None = None
    license: str | None = None
    figure: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Card:
    """A card, and what its reader will miss.

    Attributes:
        text: Markdown with its YAML.
        base: name of the base model on the Hub, where there is one.
        notes: what is not known, and how it is stated.
    """

    text: str
    base: str | None
    notes: tuple[str, ...]


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    run: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figure: str | Path | None = None,
    token: str | bool | None = None,
) -> str:
    """Makes the model card of a folder: a searched model, a supernet, adapters or routers.

    Numbers are those that were recorded when the folder was made; what nobody measured is not in the card.

    Args:
        folder: what the card is of.
        repo_id: where it will be, for the snippet that loads it; by default the folder.
        run: folder of the run that made it, or its ``result.json``; by default the record inside or beside the folder,
            if it is of this architecture.
        base_model: name of the base model on the Hub, where the records name a folder or nothing.
        license: stated instead of the one that the base model's card states.
        figure: a picture (.png or .svg) of the Pareto front, shown by its name beside the card.
        token: to read the base model's card; without network it is read from the cache.

    Raises:
        CheckpointError: the folder is no artefact, a record is broken, or the run or the figure is not there.
    """
    about = About(run=run, base_model=base_model, license=license, figure=figure, token=token)
    return make_card(recognise(folder), about, repo_id=repo_id).text


def make_card(artefact: Artefact, about: About, *, repo_id: str | None) -> Card:
    """Makes a card, as :func:`model_card` does, and says what it lacks."""
    with written_by_us(artefact.folder):
        return _made_card(artefact, about, repo_id=repo_id)


def _made_card(artefact: Artefact, about: About, *, repo_id: str | None) -> Card:
    license = about.license
    picture = None if about.figure is None else figure_name(about.figure)
    record, mismatch = run_of(artefact, about.run)
    method = method_of(artefact, None if record is None else record.options)
    stated = (record.options.get("model") if record is not None else None) or artefact.stated_base
    taught = method.tag == "elm" and not stated
    parent = _parent(artefact, about, stated=stated, taught=taught)
    title = (repo_id or artefact.folder.resolve().name).rpartition("/")[2]
    data = card_data(artefact, method=method, parent=parent, run=record, license=license, title=title)
    where = repo_id or str(artefact.folder)
    base = parent.name or (stated if repo_id is None else None)
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n{MARKER}",
        f"# {prose(title)}\n\n{prose(method.what)}",
        _facts(artefact, method, parent=parent, run=record),
        f"## Loading\n\n{_needed(artefact)}\n\n```python\n{snippet_of(artefact, where, base=base)}\n```",
        *_numbers(record),
        *([f"![Pareto front of the search]({picture})"] if picture else []),
        *([f"## Architecture\n\n{layers}"] if (layers := layer_table(artefact)) else []),
        *_origin(artefact, record),
    ]
    licensed = license is not None or "license" in parent.data
    unlicensed = None if licensed else _NO_LICENCE[taught and parent.name is None]
    notes = [note for note in (mismatch, parent.note, unlicensed) if note]
    return Card("\n\n".join(sections) + "\n", parent.name, tuple(notes))


def _parent(artefact: Artefact, about: About, *, stated: str | None, taught: bool) -> Parent:
    """The model that weights are from: the one that the user names, else the one that the records state."""
    if about.base_model is not None:
        return named_parent(about.base_model, token=about.token)
    if taught:
        return Parent(None)
    found = parent_of(stated, beside=artefact.folder, token=about.token)
    on_it = artefact.kind in ("adapter", "routers")  # these fit their base alone, not what that was made from
    return replace(found, ancestor=None) if on_it else found


_NO_LICENCE = {
    False: "the licence of the base model is not known: state one by license=",
    True: "the licence is not known, as a teacher gives none: state one by license=",
}


def figure_name(figure: str | Path) -> str:
    """Name of a figure beside a card.

    Raises:
        CheckpointError: it is not there, or no picture that the Hub shows.
    """
    path = Path(figure).expanduser()
    if path.suffix.lower() not in FIGURE_ENDINGS or not path.is_file():
        raise CheckpointError(f"figure {path} is no file with an ending of {', '.join(FIGURE_ENDINGS)}")
    return f"pareto_front{path.suffix.lower()}"


def _facts(artefact: Artefact, method: Method, *, parent: Parent, run: Run | None) -> str:
    """The list at the top."""
    record, lines = artefact.architecture, []
    if method.tag == "elm" and run is not None and run.options.get("teacher"):
        lines.append(f"**Teacher:** {code(without_folders(run.options['teacher'], beside=run.folder))}")
    elif (base := parent.name or parent.ancestor) is not None:
        lines.append(f"**Base model:** [{base}](https://huggingface.co/{base})")
    paper = f", [arXiv:{method.arxiv}](https://arxiv.org/abs/{method.arxiv})" if method.arxiv else ""
    lines.append(f"**Method:** {method.title}{paper}")
    if (size := _space(artefact, run)) is not None:
        lines.append(f"**Search space:** {size} architectures")
    if artefact.kind == "model":
        lines.append(f"**Loads with:** {_LOADS.get(artefact.loadability, code(artefact.loadability))}")
    if artefact.bits:
        lines.append(f"**Weights:** {artefact.bits}-bit integers (compressed-tensors)")
    if isinstance(record.get("total_parameters"), int):
        inner = f" ({count(record['parameters'])} without embeddings)" if record.get("parameters") else ""
        lines.append(f"**Parameters:** {count(record['total_parameters'])}{inner}")
    if isinstance(record.get("adapter_parameters"), int):
        lines.append(f"**Adapter parameters:** {count(record['adapter_parameters'])}")
    if isinstance(record.get("macs"), int):
        length = f" at {record['macs_seq_len']} tokens" if record.get("macs_seq_len") else ""
        lines.append(f"**MACs:** {count(record['macs'])}{length}")
    if artefact.kind == "model" and (artefact.folder / CLASSIFIER_FOLDER).is_dir():
        lines.append(f"**Classifier:** fine-tuned from it, in `{CLASSIFIER_FOLDER}/`; accuracies are the classifier's")
    if artefact.elastic and artefact.adapter.get("ranks"):
        ranks = f"{code(artefact.adapter['ranks'])} beside {artefact.adapter['r']}"
        lines.append(f"**Ranks:** {ranks}" + ("" if artefact.in_weight else "; stock peft loads the largest"))
    if artefact.space.get("elastic_config"):
        choices = {name: value for name, value in artefact.space["elastic_config"].items() if value}
        lines.append(f"**Choices:** {code(json.dumps(choices))}")
    return "\n".join(f"- {line}" for line in lines)


def _space(artefact: Artefact, run: Run | None) -> str | None:
    if artefact.kind == "supernet":
        return count(space_size(artefact))
    found = str(run.stage("space").get("size", "")) if run is not None else ""
    return count(int(found)) if found.isdigit() else None


def _needed(artefact: Artefact) -> str:
    """What has to be installed."""
    packages = []
    if artefact.kind in ("supernet", "routers") or (artefact.kind == "adapter" and artefact.elastic):
        packages.append("hf-elastic")
    elif artefact.kind == "adapter":
        packages.append("peft")
    elif artefact.sentence_transformers:
        packages.append("sentence-transformers")
    else:
        packages.append(_transformers() if artefact.remote_code else "transformers")
    if artefact.bits or (artefact.folder / BASE_FOLDER).is_dir():
        packages.append("compressed-tensors")
    return f"`pip install {' '.join(packages)}`"


def _transformers() -> str:
    """The oldest transformers that the code of a model runs with, which is ours."""
    stated = next((text for text in requires("hf-elastic") or () if text.startswith("transformers")), "")
    oldest = re.search(r">=\s*([\d.]+)", stated)
    return f'"transformers>={oldest[1]}"' if oldest else "transformers"


def _numbers(run: Run | None) -> list[str]:
    """The comparison that the run made, and whether its budgets were met."""
    if run is None or not run.rows:
        return []
    stage = run.stages["compare"]
    told = [line for line in (*run.stage("check").get("lines", ()), *stage.get("lines", ())) if line]
    below = [*legend(run.quality, stage["setting"]).split("\n")] if "setting" in stage else []
    said = "\n".join(f"- {prose(line)}" for line in [*below, *told])
    return ["\n\n".join(part for part in ("## Measured", measured_table(run.rows, run.quality), said) if part)]


def measured_table(rows: Sequence[Mapping[str, Any]], qualities: Sequence[str]) -> str:
    """The rows of a run as a table, sizes as shares of the largest."""
    costs = [name for name in _COSTS if any(row.get(name) for row in rows)]
    timed = any(row.get("latency") for row in rows)
    whole = {name: max(row.get(name) or 0 for row in rows) for name in costs}
    first = next((row["latency"] for row in rows if row.get("latency")), None)

    def cells(row: Mapping[str, Any]) -> list[str]:
        sizes = [f"{count(row[n])} ({row[n] / whole[n]:.0%})" if row.get(n) else "-" for n in costs]
        time = row.get("latency")
        times = [f"{1e3 * time:.2f} ms", f"{first / time:.2f}x"] if time and first else ["-", "-"]
        found = ["-" if not isinstance(row.get(n), int | float) else f"{row[n]:.4f}" for n in qualities]
        name = f"{row['name']} (over the limit)" if row.get("over_limit") else row["name"]
        return [prose(name), *sizes, *(times if timed else []), *found]

    header = ["", *(_HEADERS[name] for name in costs), *(["latency", "speed-up"] if timed else []), *qualities]
    return table(header, [cells(row) for row in rows])


def _origin(artefact: Artefact, run: Run | None) -> list[str]:
    """Seed, data and versions."""
    recorded = run.record if run is not None else artefact.architecture
    told = [f"{prose(name)} {prose(number)}" for name, number in recorded.get("versions", {}).items()]
    lines = [", ".join([f"Made with hf-elastic {version('hf-elastic')}", *told])]
    if run is not None:
        if data := shown_data(run):
            lines.append(f"Data: {', '.join(code(name) for name in data)}")
        shown = {key: label for key, label in _SHOWN.items() if key in run.options and _applied(key, run)}
        lines += [f"{label}: {prose(run.options[key])}" for key, label in shown.items()]
    return ["## How it was made\n\n" + "\n".join(f"- {line}" for line in lines)]


def _applied(option: str, run: Run) -> bool:
    """Whether a run had a use for an option that may be there by default."""
    if option == "recipe":
        return not run.options.get("lora")
    if option == "evaluations":
        return "evaluations" in run.stage("search")
    return not (option == "task" and run.options["task"] == "auto")


_SHOWN: Mapping[str, str] = {
    "seed": "Seed", "recipe": "Recipe", "task": "Task", "sequence_length": "Longest sequence in tokens",
    "evaluations": "Architectures evaluated",
}  # fmt: skip
