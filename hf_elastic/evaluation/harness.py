"""Tasks of lm-eval on a subnet in memory: nothing is exported, and the subnet stays active until the last request."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.errors import DataError, UnsupportedModelError
from hf_elastic.evaluation.measuring import first_line, measured, required, running
from hf_elastic.families import shifts_labels
from hf_elastic.fingerprints import fingerprint, state_of
from hf_elastic.search import Objective
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet

Task = str | dict[str, Any] | Any
"""A task, group or tag by name, the path of a task's YAML file, a task's config, or a task of lm-eval itself."""


class Harness:
    """Runs tasks of lm-eval on one causal language model after another; the tasks are loaded once.

    Args:
        tasks: what to run. A task's file may name Python code of its own, which is run: pass files you trust.
        include: folder of task files that may be named besides lm-eval's own; all of it is read, so trust all of it.
        num_fewshot: examples before each question; what the task says by default. A task whose file says 0 keeps it.
        limit: documents of each task; all by default.
        seed: of the choice of examples, the same for every model.

    Attributes:
        directions: for each ``task/metric`` whether larger is better, as the tasks say.
        kept: what the last subnet scored, by the digest of what it depends on.

    Raises:
        DataError: lm-eval is not installed, there is no such task here, or its data cannot be read.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        include: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        seed: int = 1234,
    ) -> None:
        if isinstance(tasks, str | dict) or not tasks:
            raise DataError(f"tasks={tasks!r} is no list of tasks; write tasks=['lambada_openai']")
        if limit is not None and limit < 1:
            raise DataError(f"limit={limit} must be at least 1, the documents of each task")
        if num_fewshot is not None and num_fewshot < 0:
            raise DataError(f"num_fewshot={num_fewshot} must be at least 0, the examples before each question")
        required("lm_eval", extra="eval", what="a task of lm-eval")
        self.seed, self.limit, self.num_fewshot = seed, limit, num_fewshot
        self.kept: dict[str, dict[str, float]] = {}
        with _quiet():
            self._loaded: Any = _load(list(tasks), include)
        for task in self._loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        known = {*self._loaded["tasks"], *self._loaded["groups"]}
        self._named = [task for task in tasks if isinstance(task, str) and task in known]
        self.directions: dict[str, bool] = {
            f"{name}/{entry}": better
            for name, task in self._loaded["tasks"].items()
            for entry, better in _entries(task).items()
        }

    @property
    def settings(self) -> tuple[object, ...]:
        """What results depend on besides the model."""
        configs = [(name, repr(task.dump_config())) for name, task in sorted(self._loaded["tasks"].items())]
        return configs, self.limit, self.num_fewshot, self.seed

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> dict[str, float]:
        """Runs all tasks on a model as it is now.

        Args:
            batch_size: requests of a forward.
            max_length: tokens of a request; what the model has positions for by default.

        Returns:
            Values by ``task/metric``, or ``task/metric,filter`` where a task filters answers; groups likewise.

        Raises:
            UnsupportedModelError: the model is no causal language model.
            DataError: a task fails.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        if not shifts_labels(model):
            raise UnsupportedModelError(
                f"lm-eval asks causal language models, not a {type(model).__name__}; "
                "use objectives.metric or objectives.spearman"
            )
        with _quiet():
            # It sets a padding token on the tokenizer, which is the caller's.
            asked = HFLM(
                pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size,
                max_length=max_length,
            )  # fmt: skip
            for task in self._loaded["tasks"].values():
                task.set_fewshot_seed(seed=self.seed)  # else a second run draws other examples
            try:
                # simple_evaluate() would seed the generators that all libraries share and collect facts about the
                # machine for seconds, of every architecture; this is what it calls.
                found = lm_eval.evaluate(
                    lm=asked, task_dict=self._loaded, limit=self.limit, bootstrap_iters=0, log_samples=False
                )
            except Exception as error:  # whatever a task's file does
                raise DataError(f"lm-eval fails: {type(error).__name__}: {first_line(error)}") from error
        return _flat(found)

    def chosen(self, key: str | None) -> tuple[str, bool]:
        """Which ``task/metric`` is meant, and whether larger is better; of ``metric`` alone the mean over the tasks.

        Raises:
            DataError: there is no such metric, several could be meant, or the tasks disagree about which way is better.
        """
        entries = {name.partition("/")[2] for name in self.directions}
        if key is None and len(entries) == 1:
            key = next(iter(entries))
        owner, _, entry = (key or "").rpartition("/")
        asked = [self._measured_by(name, entry) for name in ([owner] if owner else self._owners)]
        if key is None or not all(asked):
            shown = ", ".join(sorted(self.directions))
            raise DataError(f"key={key!r} names none of what the tasks measure: {shown}; give one, or what follows /")
        ways = {self.directions[name]: name for names in asked for name in names}
        if len(ways) > 1:
            raise DataError(
                f"key={key!r} has no direction: larger {ways[True]} is better, and smaller {ways[False]}; name one "
                f"task, such as key={ways[True]!r}"
            )
        return key, next(iter(ways))

    def _measured_by(self, owner: str, entry: str) -> list[str]:
        """``task/metric`` of the task, or of each task of the group, that measures ``entry``."""
        group = self._loaded["groups"].get(owner)
        tasks = [owner] if group is None else [task.task_name for task in group.get_all_tasks()]
        return [name for name in (f"{task}/{entry}" for task in tasks) if name in self.directions]

    @property
    def _owners(self) -> list[str]:
        """The tasks and groups that were named; of a tag, its tasks."""
        return self._named or list(self._loaded["tasks"])

    def value(self, results: dict[str, float], key: str) -> float:
        """The number that ``key`` names, of what :meth:`run` returned.

        Raises:
            DataError: a task has no such value.
        """
        names = [key] if "/" in key else [f"{name}/{key}" for name in self._owners]
        if missing := [name for name in names if name not in results]:
            raise DataError(f"the tasks gave no {missing[0]!r}, but {', '.join(sorted(results))}; set key=")
        return sum(results[name] for name in names) / len(names)


def lm_eval(
    supernet: Supernet,
    tasks: Sequence[Task] | Harness,
    *,
    tokenizer: PreTrainedTokenizerBase,
    key: str | None = None,
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 1234,
) -> Objective:
    """What a subnet scores on tasks of lm-eval, in memory; which way is better is as the tasks say.

    Args:
        tasks: as of :class:`Harness`, or one: several objectives then load tasks once, and ask a subnet once.
        tokenizer: of the model.
        key: ``task/metric`` (``task/metric,filter`` where answers are filtered), or ``metric``: its mean over the
            tasks. Not needed where the tasks measure one thing.
        include, num_fewshot, limit, seed: as for :class:`Harness`.
        batch_size, max_length: as for :meth:`Harness.run`.

    Raises:
        DataError: lm-eval is not installed, there is no such task here, or no such metric.
        UnsupportedModelError: the model is no causal language model.

    Example:
        >>> goal = objectives.lm_eval(supernet, ["arc_easy"], tokenizer=tokenizer, key="acc_norm", limit=200)
    """
    if isinstance(tasks, Harness):
        if (include, num_fewshot, limit, seed) != (None, None, None, 1234):
            raise DataError("include, num_fewshot, limit and seed are of the Harness that was given; leave them out")
        harness = tasks
    else:
        harness = Harness(tasks, include=include, num_fewshot=num_fewshot, limit=limit, seed=seed)
    if not shifts_labels(supernet.model):
        raise UnsupportedModelError(
            f"lm-eval asks causal language models, not a {type(supernet.base).__name__}; use objectives.metric"
        )
    meant, larger = harness.chosen(key)

    def measure(architecture: Architecture) -> float:
        results = lm_eval_results(
            supernet, architecture, harness, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )
        return harness.value(results, meant)

    rest = (meant, tokenizer.name_or_path, len(tokenizer), max_length, *harness.settings)
    return measured(supernet, f"lm-eval {meant}", measure, direction="maximize" if larger else "minimize", rest=rest)


def lm_eval_results(
    supernet: Supernet,
    architecture: Architecture,
    harness: Harness,
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, float]:
    """All values of a subnet by ``task/metric``, see :meth:`Harness.run`.

    Several objectives that look at one subnet in turn ask it once, as long as its weights stay.

    Raises:
        ArchitectureError: the architecture is not a point of the space.
        DataError, UnsupportedModelError: as :meth:`Harness.run`.
    """
    point = supernet.point(architecture)
    rest = [state_of(supernet), point.digest, tokenizer.name_or_path, len(tokenizer), max_length]
    asked = fingerprint(supernet.model, rest=rest)
    if asked not in harness.kept:
        with running(supernet, point):
            results = harness.run(supernet.base, tokenizer, batch_size=batch_size, max_length=max_length)
        harness.kept = {asked: results}
    return dict(harness.kept[asked])


def _load(tasks: list[Task], include: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise DataError(f"include={str(include)!r} is no folder; give one that holds task files (.yaml)")
    path = None if include is None else str(include)
    try:
        narrow = TaskManager(include_path=path, include_defaults=False)
        if all(not isinstance(task, str) or task in narrow.all_tasks or Path(task).is_file() for task in tasks):
            with suppress(KeyError, TypeError):  # a group, or an inherited file, of lm-eval's own
                return narrow.load(tasks)
        return TaskManager(include_path=path).load(tasks)  # reads thousands of files
    except Exception as error:  # whatever a task's file or its data set do
        raise DataError(
            f"lm-eval cannot load {', '.join(map(str, tasks))}: {type(error).__name__}: {first_line(error)}; check the "
            "names (lm-eval ls tasks), and that their data sets are on this machine"
        ) from error


def _entries(task: Any) -> dict[str, bool]:
    """Whether larger is better by ``metric``, or ``metric,filter`` where answers are filtered."""
    filters = [str(dict(kept)["name"]) for kept in task.get_config("filter_list") or ()] or ["none"]
    return {
        metric if kept == "none" else f"{metric},{kept}": bool(better)
        for metric, better in task.higher_is_better().items()
        for kept in filters
    }


def _set_fewshot(task: Any, wanted: int | None) -> None:
    """Sets the number of examples as lm-eval's own ``simple_evaluate`` does."""
    stated = task.get_config("num_fewshot")
    if stated is None or (wanted is not None and stated != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)


def _flat(found: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, entries in {**found["results"], **found.get("groups", {})}.items():
        for entry, value in entries.items():
            metric, comma, kept = entry.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                values[f"{name}/{metric}" if kept == "none" else f"{name}/{entry}"] = float(value)
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's warnings about models that are in memory from the user, who asked for just that."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
