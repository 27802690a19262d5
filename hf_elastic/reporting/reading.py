"""What a run left in its folder, read as data: nothing is loaded, nothing is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hf_elastic.errors import CheckpointError, SearchError
from hf_elastic.files import given_path, read_json
from hf_elastic.reporting.pictures import ModelSizes
from hf_elastic.search import SearchResult

Kind = Literal["compress", "adapters", "elm", "recovery", "study"]
Row = Mapping[str, Any]

EXACT_FILE = "exact.json"
"""Search result: the exact front of the predicted damage, where a run keeps it."""
ROUTING_FILE = "routing.json"
"""``RoutingStatistics.to_dict()``, where a run keeps it."""
RESULT_FILE = "result.json"
_ARCHITECTURE, _SPACE = "architecture.json", "search_space.json"
_QUALITY, _LATENCY = "quality.json", "latency.json"
# Folders of a run that hold the parent with all its widths, the likeliest first.
_WHOLE = ("sorted", "supernet", "base", "parent")


@dataclass(frozen=True)
class Run:
    """A folder with a ``result.json``: of a run, or of what a run exported.

    Args:
        folder: the folder.
        record: contents of ``result.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        """What the run was asked for."""
        found: Mapping[str, Any] = self.record["options"]
        return found

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """What each stage recorded, in order."""
        found: Mapping[str, Mapping[str, Any]] = self.record["stages"]
        return found

    def stage(self, name: str) -> Mapping[str, Any]:
        """What one stage recorded; nothing where it did not begin."""
        return self.stages.get(name, {})

    @cached_property
    def kind(self) -> Kind:
        """What sort of run it is."""
        if "recover" in self.stages or "settings" in self.options:
            return "recovery"
        if "teacher" in self.options:
            return "elm"
        if self.options.get("lora"):
            return "adapters"
        return "compress" if "within" in self.options else "study"

    @property
    def parent(self) -> str:
        """Folder or Hub name of what the run began with; empty where only its weights are known."""
        name = self.options.get("teacher" if self.kind == "elm" else "model", "")
        return name if isinstance(name, str) and self.kind != "recovery" else ""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        if self.kind == "study":
            return all(stage.get("finished") for stage in self.stages.values())
        return bool(self.stage("recover" if self.kind == "recovery" else "export").get("finished"))

    @property
    def rows(self) -> Sequence[Row]:
        """Rows of the comparison table; none before it was made."""
        found: Sequence[Row] = self.stage("compare").get("rows") or ()
        return found

    @property
    def final_row(self) -> Row | None:
        """The row of what is exported; none before the table was made."""
        if self.kind == "elm":
            return self.rows[-1] if self.rows else None
        named = [row for row in self.rows if row.get("name") == "found"]
        return next(iter([*named, *self.rows[1:]]), None)

    @property
    def quality(self) -> tuple[str, ...]:
        """Names of the measured qualities in the table, those that only some rows have among them."""
        numbers = (name for row in self.rows for name, value in row.items() if isinstance(value, int | float))
        return tuple(dict.fromkeys(name for name in numbers if name not in _NO_QUALITY))

    @cached_property
    def found(self) -> Mapping[str, Any] | None:
        """The architecture the run chose, as far as it has come."""
        by_name = {row.get("name"): row for row in self.rows}
        rows = [by_name[name] for name in ("found",) if name in by_name and "architecture" in by_name[name]]
        if rows:
            return dict(rows[0]["architecture"])
        if self.kind == "compress" and len(self.rows) == 2:  # one size of a family
            return dict(self.rows[1]["architecture"])
        for name in ("search", "repair"):
            if "architecture" in self.stage(name):
                return dict(self.stage(name)["architecture"])
        return None

    @cached_property
    def export(self) -> Mapping[str, Any] | None:
        """The ``architecture.json`` of what the run exported, where it lies where it was written."""
        folder = self.folder.with_name(self.folder.name.removesuffix(".run"))
        path = folder / _ARCHITECTURE
        return read_json(path) if path.is_file() else None

    @cached_property
    def families(self) -> Mapping[str, Mapping[str, Any]]:
        """Stages of families of nested sizes that were compared, by name."""
        return {name: stage for name, stage in self.stages.items() if "outcomes" in stage and "rows" in stage}

    @cached_property
    def searches(self) -> Mapping[str, SearchResult]:
        """Results of the searches in the folder, by the name of their file; the run's own first."""
        names = sorted(self.folder.glob("search*.json"), key=lambda path: (path.stem != "search", path.name))
        return {path.name: _search_in(path) for path in names if path.name != _SPACE}

    @cached_property
    def exact(self) -> SearchResult | None:
        """The exact front of the predicted damage."""
        path = self.folder / EXACT_FILE
        return _search_in(path) if path.is_file() else None

    @cached_property
    def routing(self) -> Mapping[str, Any] | None:
        """What routers chose."""
        path = self.folder / ROUTING_FILE
        return read_json(path) if path.is_file() else None

    @cached_property
    def damages(self) -> Mapping[str, Any] | None:
        """The quality table: its measure, and damages by layer and option."""
        path = self.folder / _QUALITY
        if not path.is_file():
            return None
        from hf_elastic.tables.quality import QualityTable

        table = QualityTable.load(path)
        return {"measure": table.measure, "damages": table.damages}

    @cached_property
    def latencies(self) -> Mapping[str, Any] | None:
        """What a finished latency table of layers says of each kind of layer: seconds by size, and itself in words."""
        path = self.folder / _LATENCY
        if self.kind == "elm" or not path.is_file():
            return None
        from hf_elastic.tables.latencies import LatencyTable

        table = LatencyTable.load(path)
        if not table.finished:
            return None
        kinds = [table.kinds.count(kind) for kind in range(len(table.whole))]
        return {"attention": table.fit.attention, "mlp": table.fit.mlp, "layers": kinds, "text": str(table)}

    @cached_property
    def sizes(self) -> ModelSizes | None:
        """Sizes of the whole parent, where the run keeps a config of it."""
        for name in _WHOLE:
            path = self.folder / name / "config.json"
            if path.is_file():
                record = self.folder / name / _SPACE
                order = read_json(record).get("layer_order") if record.is_file() else None
                return ModelSizes.from_config(read_json(path), order=order)
        return None


_NO_QUALITY = {
    "name", "parameters", "total_parameters", "macs", "latency", "loadability", "architecture", "adapter_parameters",
    "over_limit", "blocks", "widths", "heads",
}  # fmt: skip


def _search_in(path: Path) -> SearchResult:
    try:
        return SearchResult.load(path)
    except SearchError as error:
        raise CheckpointError(f"{path} is broken: {error}; delete it, or copy the run again") from error


def open_run(folder: str | Path) -> Run:
    """Opens the folder of a run, or of what a run exported.

    Raises:
        CheckpointError: it holds no ``result.json``, or a broken one.
    """
    path = given_path(folder)
    path = path if path.name not in ("", "..") else path.resolve()
    if not (path / RESULT_FILE).is_file():
        beside = path.with_name(f"{path.name}.run")
        hint = f"; its run is {beside}" if (beside / RESULT_FILE).is_file() else ""
        raise CheckpointError(
            f"{path} is no run: it holds no {RESULT_FILE}; give the OUTPUT.run that a command made{hint}"
        )
    from hf_elastic.checkpoint.run_record import read_record

    return Run(path, read_record(path / RESULT_FILE))


def shown_name(model: str) -> str:
    """The last part of a path, or a Hub name as it is."""
    return Path(model).name if re.match(r"[/.~]|\w:\\", model) else model
