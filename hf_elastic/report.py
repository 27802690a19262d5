"""Tables made from a run's ``result.json``; numbers are computed, never typed."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_elastic.checkpoint.exporting import ARCHITECTURE_FILE
from hf_elastic.checkpoint.run_record import RESULT_FILE, read_record
from hf_elastic.costs import LATENCY_TOKENS, count
from hf_elastic.errors import CheckpointError, ElasticError
from hf_elastic.families import FAMILIES
from hf_elastic.files import given_path, read_json
from hf_elastic.packed_format import stated_quantisation, stored_weights
from hf_elastic.runtimes.graph_folder import RUNTIME_FILE
from hf_elastic.runtimes.matrix import runs_where_folder
from hf_elastic.runtimes.opening import gguf_file
from hf_elastic.supernet import Supernet
from hf_elastic.supernet_folder import SPACE_FILE

Row = Mapping[str, Any]


def comparison_table(rows: Sequence[Row], *, quality: Sequence[str], seq_len: int) -> str:
    """The table of a run: one row a model, costs as absolute numbers and shares of the first row (the parent).

    Args:
        rows: each with name, parameters, total_parameters, macs, latency (seconds or ``None``), loadability, and
            the measured qualities by name.
        quality: names of the qualities, in order.
        seq_len: the length for which MACs are counted.
    """
    parent = rows[0]
    header = [
        "",
        "parameters",
        "with embeddings",
        f"MACs at {seq_len}",
        "latency",
        "speed-up",
        *quality,
        "loads as",
    ]
    lines = [header]
    for row in rows:
        lines.append(
            [
                str(row["name"]),
                _share(row["parameters"], parent["parameters"]),
                _share(row["total_parameters"], parent["total_parameters"]),
                _share(row["macs"], parent["macs"]),
                "-" if row["latency"] is None else f"{row['latency'] * 1e3:.1f} ms",
                "-" if row["latency"] is None else f"{parent['latency'] / row['latency']:.2f}x",
                *("-" if row[name] is None else f"{row[name]:.4f}" for name in quality),
                str(row["loadability"]),
            ]
        )
    return aligned(lines)


def adapter_table(rows: Sequence[Row], *, quality: Sequence[str]) -> str:
    """The table of a run with adapters: what they and the merged model cost, and the quality on held-out data."""
    names = [name for name in ("adapter_parameters", "parameters", "macs") if name in rows[-1]]
    largest = next(row for row in rows if row["name"] == "largest")
    headers = {"adapter_parameters": "adapter parameters", "parameters": "parameters, merged", "macs": "MACs, merged"}
    lines = [["", *(headers[name] for name in names), *quality]]
    for row in rows:
        shares = [f"{count(row[name])} ({row[name] / largest[name]:.0%})" for name in names]
        name = f"{row['name']} (over the limit)" if row.get("over_limit") else str(row["name"])
        lines.append([name, *shares, *("-" if row[n] is None else f"{row[n]:.4f}" for n in quality)])
    return aligned(lines)


def legend(quality: Sequence[str], setting: object) -> str:
    """What stands below a table: in which setting latencies were measured, and what the qualities are."""
    return "\n".join([f"latency: {setting}", *(f"{name}: {_MEANINGS[name]}" for name in quality if name in _MEANINGS)])


_MEANINGS: Mapping[str, str] = {
    "structure": "correlation of the similarities of all pairs of held-out sentences with the parent's",
    "cosine": "mean cosine of the embeddings of held-out sentences to the parent's",
    "perplexity": "on held-out text, less is better",
    "accuracy": "on held-out rows",
}


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width, the first to the left and the others to the right, a rule below the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([shown[0].rstrip(), "-" * len(shown[0]), *(line.rstrip() for line in shown[1:])])


def _share(value: float, whole: float) -> str:
    return f"{count(value)} ({value / whole:.0%})" if whole else count(value)


def stage_times(record: Mapping[str, Any]) -> str:
    """How long each stage of a run took."""
    stages = record.get("stages", {})
    lines = [
        ["stage", "seconds"],
        *([name, f"{stage['seconds']:.1f}"] for name, stage in stages.items() if "seconds" in stage),
    ]
    return aligned(lines)


def describe_folder(folder: Path) -> str:
    """Says what a folder is (run, supernet, export, family of exports, checkpoint) and what it holds, in a few lines.

    Raises:
        CheckpointError: it is none of these, or a file in it is broken.
    """
    folder = given_path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give one that holds a checkpoint, a supernet or a run")
    if (folder / SPACE_FILE).is_file():
        return str(Supernet.from_pretrained(folder))
    if (folder / RUNTIME_FILE).is_file() or gguf_file(folder):
        return f"exported for a runtime\n{_runs_where(folder)}"
    parts = (
        ("adapter_config.json", _describe_adapter),
        ("config.json", _describe_checkpoint),
        (ARCHITECTURE_FILE, _describe_export),
        (RESULT_FILE, _describe_run),
    )
    lines = [
        f"{child.name}\n{_read(_describe_export, child, ARCHITECTURE_FILE)}"
        for child in sorted(folder.iterdir())
        if (child / ARCHITECTURE_FILE).is_file()
    ]
    for name, describe in parts:
        if (folder / name).is_file():
            lines.append(_read(describe, folder, name))
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        lines.append(_runs_where(folder))
    if not lines:
        raise CheckpointError(
            f"{folder} holds no config.json, {SPACE_FILE} or {RESULT_FILE}, so it is no checkpoint, supernet or run"
        )
    return "\n".join(lines)


def _runs_where(folder: Path) -> str:
    try:
        return f"  runs where\n{textwrap.indent(str(runs_where_folder(folder)), '    ')}"
    except ElasticError as error:
        return f"  runs where     {error}"


def _describe_adapter(folder: Path) -> str:
    config = read_json(folder / "adapter_config.json")
    ranks = config.get("ranks")
    kind = f"elastic adapter, ranks {ranks} of {config['r']}" if ranks else f"adapter of rank {config['r']}"
    loads = "hf_elastic.load_adapter (stock peft: the largest rank)" if ranks else "PeftModel.from_pretrained"
    if config.get("sparse") or config.get("quantization_aware"):
        loads = "hf_elastic.load_adapter alone: it is part of the weight"
    return f"{kind}, of {config.get('base_model_name_or_path') or 'a model in memory'}, loads by {loads}"


def _read(describe: Callable[[Path], str], folder: Path, name: str) -> str:
    try:
        return describe(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ElasticError):
            raise
        raise CheckpointError(f"{folder / name} is not what hf_elastic or transformers writes: {error!r}") from error


def _describe_checkpoint(folder: Path) -> str:
    config = read_json(folder / "config.json")
    tensors = checkpoint_shapes(folder)
    total, weights = _contents(folder, tensors)
    known = {family.model_type: family for family in FAMILIES}
    model_type = str(config.get("model_type"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        elastic = f"quantised ({method}): takes adapters, cannot be cut"
    elif model_type in known:
        choices = f"intermediate_size, {known[model_type].heads_choice}, skip, num_hidden_layers"
        elastic = f"can be made elastic in {choices}"
    else:
        elastic = (
            "a static model of hf_elastic"
            if model_type.startswith("elastic_")
            else "of no family hf_elastic has a row for"
        )
    return "\n".join(
        [
            f"{(config.get('architectures') or ['model'])[0]} checkpoint ({model_type}), {elastic}",
            f"  parameters     {count(total)} in {len(tensors)} tensors, {_size_on_disk(folder)} on disk",
            *weights,
        ]
    )


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_SPARSE = 0.01  # share of zeros from which on a layer is worth a line


def _size_on_disk(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _contents(folder: Path, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, list[str]]:
    """Parameters of a checkpoint, and lines about bits and zeros of its layers where there is something to say."""
    beside = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point")
    total = sum(math.prod(shape) for name, shape in tensors.items() if not name.endswith(beside))
    zeros: dict[str, list[int]] = {}
    for name, weight in stored_weights(folder):
        if f"{name}_packed" in tensors:
            total += weight.numel()
        if found := _LAYER.search(name):
            counts = zeros.setdefault(found[1], [0, 0])
            counts[0], counts[1] = counts[0] + int((weight == 0).sum()), counts[1] + weight.numel()
    lines = []
    for group in ((stated_quantisation(folder) or {}).get("config_groups") or {}).values():
        stated = group["weights"]
        size = f"groups of {stated['group_size']}" if stated.get("group_size") else "one scale an output"
        form = group.get("format") or "compressed-tensors"
        lines.append(f"  integers       {stated['num_bits']} bits, {size}, {form}")
    shares = {number: none / whole for number, (none, whole) in zeros.items()}
    if any(share >= _SPARSE for share in shares.values()):
        shown = ", ".join(f"{n} {shares[n]:.1%}" for n in sorted(shares, key=int))
        lines.append(f"  zeros          by layer: {shown}")
    return total, lines


def _way(options: Mapping[str, Any]) -> str:
    return f"adapters {options['lora']}" if options.get("lora") else f"recipe {options.get('recipe', 'best')}"


def _budgets(options: Mapping[str, Any]) -> str:
    given = {name: options.get(name) for name in ("speedup", "latency", "memory")} | options["within"]
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint, read from the safetensors headers without loading weights.

    Raises:
        CheckpointError: there is no safetensors file, or one is truncated or no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); copy it again") from error
    return shapes


def _describe_export(folder: Path) -> str:
    record = read_json(folder / ARCHITECTURE_FILE)
    if "adapter_parameters" in record:
        labels = f", labels {', '.join(record['labels'][:8])}" if record.get("labels") else ""
        size = count(record["adapter_parameters"])
        return f"  adapter        plain peft, {size} parameters, of {record['base']}{labels}"
    layers = record["layers"]
    there = [layer for layer in layers if "block" in layer or layer["attention"] or layer["mlp"]]
    blocks = [layer["block"] for layer in there if "block" in layer]
    widths = sorted({layer["intermediate_size"] for layer in there})
    heads = sorted({layer["num_attention_heads"] for layer in there})
    cost = f"{count(record['parameters'])} parameters without embeddings"
    cost += f", {count(record['macs'])} MACs" if record["macs"] is not None else ""
    lines = [
        f"  exported       {record['loadability']} from {record['parent'] or 'a model in memory'}",
        f"  layers         {len(there)} of {len(layers)}: FFN {widths}, heads {heads}",
        *([f"  blocks         {', '.join(blocks)}"] if blocks else []),
        f"  cost           {cost} at {record['macs_seq_len']} tokens",
    ]
    if not layers:  # adapters were merged into a base of one shape
        return lines[0]
    return "\n".join(lines)


def _describe_run(folder: Path) -> str:
    record = read_record(folder / RESULT_FILE)
    options, stages = record["options"], record["stages"]
    if (recovery := stages.get("recover")) is not None:
        return _describe_recovery(options["settings"], recovery)
    if "teacher" in options:
        return _describe_elm(options, stages)
    if "within" not in options:
        return _describe_study(options, stages)
    lines = [
        f"run: {options['model']} within {_budgets(options)}, {_way(options)}, seed {options['seed']}",
        stage_times(record),
    ]
    if "rows" in stages.get("compare", {}):
        lines += _compared(stages["compare"])
    lines += stages.get("check", {}).get("lines", [])
    for family in (stage for stage in stages.values() if "outcomes" in stage):
        lines += _compared(family)
        lines += [f"{name}: {line}" for name, found in family["outcomes"].items() for line in found["lines"]]
    if not stages.get("export", {}).get("finished"):
        lines.append("not finished: the same compress command goes on")
    return "\n".join(lines)


def _describe_elm(options: Mapping[str, Any], stages: Mapping[str, Any]) -> str:
    """Says what a run of ELM was asked for, what it found and where it is."""
    lines = [f"run of ELM: size {options['size']} from {options['teacher']}, seed {options['seed']}"]
    lines.append(stage_times({"stages": stages}))
    if "table" in stages.get("compare", {}):
        lines += [stages["compare"]["layers"], stages["compare"]["table"], *stages["compare"]["lines"]]
    if not stages.get("export", {}).get("finished"):
        lines.append("not finished: the same elm command goes on")
    return "\n".join(lines)


def _describe_study(options: Mapping[str, Any], stages: Mapping[str, Any]) -> str:
    """Says what a study of adapters measured."""
    lines = [["", "subnet", "accuracy", "adapter parameters", "MACs, merged"]]
    for row in (row for stage in stages.values() for row in stage.get("rows", ())):
        shares = [f"{row['accuracy']:.4f}", count(row["adapter_parameters"]), f"{row['macs_share']:.0%}"]
        lines.append([row["method"], row["subnet"], *shares])
    settings = f"{options['steps']} steps, seed {options['seed']}"
    return f"study of adapters on {options['model']}, {settings}\n{aligned(lines)}"


def _describe_recovery(settings: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    """Says what a run of ``recover()`` was asked for and where it is."""
    first = f"recovery: {settings['target']} distilled for {stage['steps']} steps, seed {settings['seed']}"
    if not stage.get("finished"):
        return f"{first}\nnot finished: the same call goes on"
    losses = [f"{point['loss']:.4g} at step {point['step']}" for point in stage["losses"]]
    shown = f", loss {losses[0]}, {losses[-1]}" if losses else ""
    return f"{first}\n  done in {stage['seconds']:.0f} s{shown}"


def _compared(stage: Mapping[str, Any]) -> list[str]:
    """The table that a stage recorded, and in which setting it was timed."""
    fixed = {"name", "parameters", "total_parameters", "macs", "latency", "loadability", "architecture"}
    fixed |= {"adapter_parameters"}
    quality = [name for name in stage["rows"][0] if name not in fixed]
    if "adapter_parameters" in stage["rows"][0]:
        return [adapter_table(stage["rows"], quality=quality)]
    table = comparison_table(stage["rows"], quality=quality, seq_len=LATENCY_TOKENS)
    return [table, *([legend(quality, stage["setting"])] if "setting" in stage else [])]
