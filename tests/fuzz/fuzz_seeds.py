"""Valid inputs of every kind, tiny and made by the package itself: what hostile ones are made from."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(folder) for folder in (TESTS, TESTS / "reporting", TESTS / "hub") if str(folder) not in sys.path]

import block_models  # noqa: E402  # found by their names only behind the line above
import made as shared  # noqa: E402
import recorded_runs  # noqa: E402
import tiny_benchmarks  # noqa: E402
import tiny_checkpoints  # noqa: E402
from tiny_models import point, supernet_of, tiny  # noqa: E402

import hf_elastic as he  # noqa: E402
from hf_elastic.space import Choice, Condition, SearchSpace  # noqa: E402
from hf_elastic.tables.block_latencies import measure_block_latency_table  # noqa: E402
from hf_elastic.tables.latencies import measure_latency_table  # noqa: E402
from hf_elastic.tables.quality import QualityTable  # noqa: E402


def _by_parameters(call: Any) -> float:
    """A timer that runs nothing."""
    return 0.25 + sum(parameter.numel() for parameter in call.model.parameters()) / 1e5


@dataclass
class Seeds:
    """Folders and data of valid inputs; each is made when it is first asked for.

    Args:
        root: an empty folder for those on disk.
    """

    root: Path
    made: dict[str, Path] = field(default_factory=dict)

    def make_all(self) -> None:
        """Makes everything now, before children are forked, each of which would make it again."""
        for name in _MAKERS:
            self.folder(name)
        for name in ("spaces", "result", "result_of_supernet", "tables", "base", "benchmarks", "rows"):
            getattr(self, name)

    def folder(self, name: str) -> Path:
        """Folder of a valid artefact; read only."""
        if name not in self.made:
            self.made[name] = _MAKERS[name](self, self.root / name)
        return self.made[name]

    @cached_property
    def spaces(self) -> list[SearchSpace]:
        """Spaces with every kind of choice."""
        conditional = SearchSpace(
            [
                Choice("layers.0.skip", ("none", "layer"), kind="categorical", parameters=(10, 0)),
                Choice("layers.0.size", (1, 2, 4), when=(Condition("layers.0.skip", ("none",)),)),
                Choice("layers.1.block", ("a", "b", "c"), kind="categorical", parameters=(3, 1, 2)),
                Choice("layers.1.size", (8, 16), when=(Condition("layers.1.block", ("a", "b")),)),
            ]
        )
        return [recorded_runs.space(), conditional, supernet_of("bert").space, supernet_of("llama").space]

    @cached_property
    def result(self) -> dict[str, Any]:
        """A search result as JSON data."""
        return json.loads(recorded_runs.searched().to_json())

    @cached_property
    def result_of_supernet(self) -> dict[str, Any]:
        """A search result in the space of the folder ``supernet``."""
        supernet = he.Supernet.from_pretrained(self.folder("supernet"))
        goals = [he.objectives.parameters(supernet), he.objectives.macs(supernet, seq_len=8)]
        found = he.search_subnets(supernet.space, goals, evaluations=8, seed=0, progress=False)
        return json.loads(found.to_json())

    @cached_property
    def tables(self) -> dict[str, dict[str, Any]]:
        """Contents of tables by their kind."""
        entries = {
            "attention/0": 0.5,
            "attention/1": 0.2,
            "attention/2": 0.0,
            "mlp/0": 0.4,
            "mlp/16": 0.1,
            "mlp/48": 0.0,
        }
        QualityTable("hidden", "made up", tuple({**entries, "layer": 0.9} for _ in range(3))).save(self.root / "q.json")
        options: dict[str, Any] = {"rounds": 3, "seconds": 1e9, "timer": _by_parameters}
        measure_latency_table(supernet_of("bert"), path=self.root / "l.json", **options)
        blocks = block_models.supernet_of("elastic_bert")
        measure_block_latency_table(blocks, path=self.root / "b.json", widths=3, **options)
        names = {"quality": "q.json", "latency": "l.json", "blocks": "b.json"}
        return {kind: json.loads((self.root / name).read_text()) for kind, name in names.items()}

    @cached_property
    def base(self) -> Any:
        """The model that adapters and routers stand on."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder("base")).eval()

    @cached_property
    def benchmarks(self) -> dict[str, str]:
        """Benchmark files of every format."""
        numbers = random.Random(0)
        rows = [f"net{n},{numbers.random():.4f},{numbers.randint(1, 90)},{numbers.random():.3f}" for n in range(12)]
        lts = [
            tiny_benchmarks.lts_row(depth=2 + n % 2, ppl={"valid_ppl": 40.0 + n, "train_elapsed": 3.0})
            for n in range(6)
        ]
        lines = {"flexibert": tiny_benchmarks.flexibert_rows(8), "lts": lts}
        texts = {name: "".join(f"{json.dumps(row)}\n" for row in found) for name, found in lines.items()}
        return {**texts, "csv": "\n".join(["name,truth,parameters,snip", *rows]) + "\n"}

    @cached_property
    def rows(self) -> dict[str, str]:
        """Data to train on, of every ending."""
        sentences = tiny_checkpoints.sentences(12)
        return {
            ".jsonl": "\n".join(json.dumps({"text": text, "label": n % 2}) for n, text in enumerate(sentences)),
            ".csv": "text,label\n" + "\n".join(f'"{text}",{n % 2}' for n, text in enumerate(sentences)),
            ".txt": " ".join(sentences),
        }


def _supernet(seeds: Seeds, folder: Path) -> Path:
    supernet_of("llama").save_pretrained(folder)
    return folder


def _bert_supernet(seeds: Seeds, folder: Path) -> Path:
    supernet_of("bert").save_pretrained(folder)
    return folder


def _block_supernet(seeds: Seeds, folder: Path) -> Path:
    block_models.supernet_of("elastic_bert").save_pretrained(folder)
    return folder


def _export(seeds: Seeds, folder: Path) -> Path:
    return shared.remote(folder)


def _static(family: str) -> Any:
    def make(seeds: Seeds, folder: Path) -> Path:
        supernet = supernet_of(family)
        he.export(supernet, point(supernet, ffn0=16, ffn1=24), folder, loadability="remote-code")
        return folder

    return make


def _routed(seeds: Seeds, folder: Path) -> Path:
    supernet = shared.routed(seeds.folder("base"))
    he.export(supernet, supernet.active, folder)
    return folder


def _stock(seeds: Seeds, folder: Path) -> Path:
    return shared.stock(folder)


def _sharded(seeds: Seeds, folder: Path) -> Path:
    tiny("bert").save_pretrained(folder, max_shard_size="20KB")
    return folder


def _base(seeds: Seeds, folder: Path) -> Path:
    return tiny_checkpoints.language_model(folder)


def _sentence_encoder(seeds: Seeds, folder: Path) -> Path:
    return tiny_checkpoints.sentence_encoder(folder)


def _classifier(seeds: Seeds, folder: Path) -> Path:
    return tiny_checkpoints.classifier(folder)


def _adapter(seeds: Seeds, folder: Path) -> Path:
    shared.adapted(seeds.folder("base")).model.save_pretrained(folder)
    return folder


def _plain_adapter(seeds: Seeds, folder: Path) -> Path:
    supernet = shared.adapted(seeds.folder("base"))
    he.extract_adapter(supernet, supernet.space.smallest()).save_pretrained(folder)
    return folder


def _routers(seeds: Seeds, folder: Path) -> Path:
    he.save_routers(shared.routed(seeds.folder("base")), folder)
    return folder


def _integers(seeds: Seeds, folder: Path) -> Path:
    return shared.integers(folder)


def _run(seeds: Seeds, folder: Path) -> Path:
    recorded_runs.compress_run(folder)
    recorded_runs.searched(seed=1).save(folder / "exact.json")
    table = {"mlp/16": 0.4, "mlp/32": 0.1, "mlp/64": 0.0, "attention/1": 0.3, "attention/2": 0.1, "attention/4": 0.0}
    QualityTable("hidden", "made up", tuple({**table, "layer": 1.0} for _ in range(3))).save(folder / "quality.json")
    (folder / "latency.json").write_text(json.dumps(seeds.tables["latency"]))
    supernet = shared.routed(seeds.folder("base"))
    batches = [{"input_ids": torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0))}]
    found = he.routing_statistics(supernet, batches)
    (folder / "routing.json").write_text(json.dumps(found.to_dict()))
    return folder


def _graph(seeds: Seeds, folder: Path) -> Path:
    """What an export for a runtime notes; the graph itself is not one."""
    folder.mkdir()
    record = {
        "format": 1, "model_file": "onnx/model.onnx", "runtime": "onnx", "int8": None, "max_difference": 1e-6,
        "int8_difference": None, "size": 10, "inputs": ["input_ids", "attention_mask"], "outputs": ["logits"],
        "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / "runtime.json").write_text(json.dumps(record))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08\x08")
    (folder / "config.json").write_text((seeds.folder("base") / "config.json").read_text())
    return folder


_MAKERS = {
    "supernet": _supernet, "bert": _bert_supernet, "blocks": _block_supernet, "export": _export, "stock": _stock,
    "static-bert": _static("bert"), "static-gpt2": _static("gpt2"), "routed": _routed, "sharded": _sharded,
    "base": _base,
    "adapter": _adapter, "plain-adapter": _plain_adapter, "routers": _routers, "integers": _integers, "run": _run,
    "graph": _graph, "sentence-encoder": _sentence_encoder, "classifier": _classifier,
}  # fmt: skip
