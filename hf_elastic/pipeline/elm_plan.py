"""What a run of ELM is going to do: the student, its budget, and how many steps of what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hf_elastic import objectives, spaces
from hf_elastic.blocks import config_width
from hf_elastic.conversion import make_elastic
from hf_elastic.costs import count
from hf_elastic.errors import InfeasibleError, SpaceError, TrainingError
from hf_elastic.layers import seeded
from hf_elastic.pipeline.elm_data import ElmTexts
from hf_elastic.pipeline.elm_options import DECISIONS, ElmOptions
from hf_elastic.search.limits import resolve_limits
from hf_elastic.spaces import ElmSize
from hf_elastic.supernet import Supernet
from hf_elastic.training import PCAGrowthCallback
from hf_elastic.training.schedule import growths_per_epoch

_POSITIONS = 512
_AVERAGE_GROWTHS, _STEPS_AWAY, _SHARE_GROWN = 3, 5, 0.7
_SCORES, _RAREST = 24, 30  # PCA scores between two growths, at most so many steps apart


@dataclass(frozen=True)
class Growing:
    """When blocks grow.

    Attributes:
        every: steps from one growth to the next.
        decisions: how often that is.
        count: ``K``, how many blocks grow each time.
        calc_freq: steps from one PCA score to the next.
    """

    every: int
    decisions: int
    count: int
    calc_freq: int


@dataclass(frozen=True)
class ElmPlan:
    """What is going to be trained.

    Attributes:
        size: of the student.
        config: of the supernet, all blocks at their first width.
        teacher_layers: depth of the teacher.
        budget: parameters that the mean path is to have.
        epoch: steps of one pass over the text; ``None`` for a stream.
        steps: of the supernet.
        retrain_steps: of the found path.
        growing: when blocks grow, where they do.
    """

    size: ElmSize
    config: Any
    teacher_layers: int
    budget: float
    epoch: int | None
    steps: int
    retrain_steps: int
    growing: Growing | None

    @property
    def layers(self) -> int:
        """Depth of the student."""
        return int(self.config.num_hidden_layers)

    @property
    def architecture_class(self) -> str:
        """Name of the class of the student."""
        return spaces.elm_model_class(self.config).__name__

    @property
    def widths(self) -> list[int]:
        """FFN widths that a block may have, ascending."""
        largest = config_width(self.config)
        return sorted({*range(self.size.start, largest, self.size.step), largest})


def plan_of(options: ElmOptions, texts: ElmTexts) -> ElmPlan:
    """Works out what a run is going to do.

    Raises:
        SpaceError: the depths of teacher and student do not go together.
        TrainingError: growth does not fit the number of steps.
    """
    size = spaces.ELM_SIZES[options.size]
    depth = int(texts.config.num_hidden_layers)
    config = student_config(options, texts, layers=_layers(options, size, depth))
    budget = options.total_parameters
    if budget is None:
        budget = spaces.elm_budget(size, config)
    epoch = None if options.stream else max(1, len(texts.data.train) // options.batch_size)
    steps = options.steps or 0
    if epoch is not None:
        wanted = max(1, round(options.epochs * epoch))
        steps = min(wanted, options.steps or wanted)
    again = options.epochs if options.retrain_epochs is None else options.retrain_epochs
    growing = _growing(options, steps, size=size, layers=config.num_hidden_layers) if options.growth else None
    retrain_steps = max(1, round(steps * again / options.epochs)) if again else 0
    return ElmPlan(size, config, depth, float(budget), epoch, steps, retrain_steps, growing)


def _layers(options: ElmOptions, size: ElmSize, depth: int) -> int:
    """Depth of the student: each of its layers is compared with one of the teacher's."""
    fitting = [layers for layers in range(1, depth + 1) if depth % layers == 0]
    if options.layers is None:
        return max(layers for layers in fitting if layers <= size.layers)
    if options.layers not in fitting and options.distill != "none":
        raise SpaceError(
            f"layers={options.layers} does not divide the teacher's {depth} layers, of which each of the student's is "
            f"to follow one; take {', '.join(map(str, fitting))}, or distill='none'"
        )
    return options.layers


def _growing(options: ElmOptions, steps: int, *, size: ElmSize, layers: int) -> Growing:
    """When blocks grow: ten times, and not behind the last step, as nothing would train what it adds.

    A block grows three times on average, as published, where its largest width is five steps away, as published; where
    it is further, for it to come as far, more often.
    """
    every = options.growth_every or -(-steps // (DECISIONS + 1))
    if every > steps:
        raise TrainingError(f"growth_every={every} is more than the {steps} steps, so no block would grow")
    calc_freq = options.calc_freq or max(1, min(_RAREST, every // _SCORES))
    if calc_freq > every:
        raise TrainingError(
            f"calc_freq={calc_freq} is more than the {every} steps between two growths, so some would have no score; "
            "lower it, or set growth_every"
        )
    decisions = max(1, (steps - 1) // every)
    away = -(-(size.largest - size.start) // size.step)
    average = _AVERAGE_GROWTHS if away <= _STEPS_AWAY else _SHARE_GROWN * away
    count = growths_per_epoch(layers, len(spaces.BLOCKS), decisions, average_growths=average)
    return Growing(every, decisions, count, calc_freq)


def student_config(options: ElmOptions, texts: ElmTexts, *, layers: int) -> Any:
    """Config of the supernet: the size's, with what follows from the teacher."""
    teacher, rate = texts.config, options.dropout
    known = getattr(teacher, "max_position_embeddings", None) or _POSITIONS
    if texts.causal:
        changes: dict[str, Any] = {"resid_pdrop": rate, "embd_pdrop": rate, "attn_pdrop": rate}
        changes |= {name: getattr(teacher, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    else:
        changes = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        changes["pad_token_id"] = texts.tokenizer.pad_token_id
    return spaces.elm_config(
        options.size, task="causal-lm" if texts.causal else "masked-lm", vocab_size=int(teacher.vocab_size),
        positions=max(options.sequence_length, min(_POSITIONS, int(known))), layers=layers, **changes,
    )  # fmt: skip


def new_supernet(plan: ElmPlan, options: ElmOptions) -> Supernet:
    """The supernet before any training, with weights of the run's seed.

    Without growth all blocks have the width whose mean path is nearest to the budget.

    Raises:
        TrainingError: growth could never reach the budget.
        InfeasibleError: no path can keep a limit, however blocks grow.
        SearchError: a limit names no cost.
    """
    with seeded(options.seed):
        supernet = make_elastic(spaces.elm_model_class(plan.config)(plan.config))
    supernet.model.eval()
    growth_of(supernet, plan)  # refuses a budget out of reach
    _check_limits(supernet, plan, options.limits(plan.budget))
    if plan.growing is None:
        means = {width: spaces.mean_path_parameters(supernet, width=width) for width in plan.widths}
        set_widths(supernet, [min(means, key=lambda width: abs(means[width] - plan.budget))])
    return supernet


def growth_of(supernet: Supernet, plan: ElmPlan) -> PCAGrowthCallback:
    """The callback that widens blocks, as planned.

    Raises:
        TrainingError: it could never reach the budget.
    """
    when = plan.growing or Growing(1, 1, 1, 1)
    return PCAGrowthCallback(
        supernet, total_parameters=plan.budget, step=plan.size.step, count=when.count, calc_freq=when.calc_freq,
        every=when.every,
    )  # fmt: skip


def _check_limits(supernet: Supernet, plan: ElmPlan, within: Mapping[str, float]) -> None:
    """Refuses limits that not even the smallest path before growth keeps."""
    known = objectives.related_costs(supernet)
    resolve_limits(within, known, supernet.space)
    smallest = {name: known[name](supernet.space.smallest()) for name in within}
    with spread_widths(supernet, plan.widths[-1:]):
        largest = {name: objectives.related_costs(supernet)[name](supernet.space.largest()) for name in within}
    for name, limit in within.items():
        bound = limit * largest[name] if limit <= 1 else limit
        if smallest[name] > bound:
            raise InfeasibleError(
                f"no path keeps {name}={limit:g}: the smallest, before any growth, has {count(smallest[name])}, and "
                f"the largest can grow to {count(largest[name])}; loosen within="
            )


def set_widths(supernet: Supernet, widths: list[int]) -> None:
    """Gives the blocks of layer ``l`` the width ``widths[l % len(widths)]``."""
    for part in supernet.block_parts:
        for block in part.blocks:
            part.set_width(block, widths[part.index % len(widths)])
    supernet.resized()


@contextmanager
def spread_widths(supernet: Supernet, widths: list[int]) -> Iterator[None]:
    """Inside, :func:`set_widths`; afterwards all blocks are as wide as they were."""
    before = [{block: part.width(block) for block in part.blocks} for part in supernet.block_parts]
    set_widths(supernet, widths)
    try:
        yield
    finally:
        for part, known in zip(supernet.block_parts, before, strict=True):
            for block, width in known.items():
                part.set_width(block, width)
        supernet.resized()


def describe_plan(plan: ElmPlan, supernet: Supernet, *, options: ElmOptions, texts: ElmTexts) -> str:
    """What a dry run says: the space, the budget, growth, trainings and what is distilled."""
    size, space, start = plan.size, supernet.space, spaces.mean_path_parameters(supernet)
    end = spaces.mean_path_parameters(supernet, width=plan.widths[-1])
    ends = [int(objectives.total_parameters(supernet)(point)) for point in (space.smallest(), space.largest())]
    own = "" if plan.layers == size.layers else f" instead of {size.layers}"
    passes = "" if plan.epoch is None else f" ({plan.epoch} to a pass over the text)"
    again = f"then {plan.retrain_steps} of the found path, {_STARTS[options.weights]}" if plan.retrain_steps else (
        "the found path is not trained again"
    )  # fmt: skip
    within = [f"{name}={limit:g}" for name, limit in options.limits(plan.budget).items()]
    asked = [f"{name}={getattr(options, name)}" for name in ("speedup", "latency") if getattr(options, name)]
    fused = f"{options.fusion} above a CKA of {options.threshold:g}" if options.fusion != "none" else "none"
    lines = [
        f"{type(supernet.base).__name__} supernet of size {options.size} for {texts.task.name}",
        f"  layers         {plan.layers}{own}, of which the teacher has {plan.teacher_layers}; {size.hidden_size} "
        f"wide, {size.heads} heads, FFNs of {plan.widths[0]} to {plan.widths[-1]} in steps of {size.step}",
        f"  paths          {count(space.size)} from {len(space)} choices of {len(spaces.BLOCKS)} blocks",
        f"  parameters     {count(ends[0])} to {count(ends[1])} at first; mean path {count(start)} to {count(end)}",
        f"  teacher        {_teacher_words(plan, texts)}",
        f"  growth         {_growth_words(plan)}",
        f"  text           {len(texts.data.train)} blocks of {options.sequence_length} tokens"
        + (" and what the stream gives" if options.stream else "")
        + f"; held out: {_examples(texts.searched)} to search, {_examples(texts.reported)} to report",
        f"  training       {plan.steps} steps of {options.batch_size} sequences{passes}, {again}",
        f"  distillation   {distillation_words(options, texts, plan)}",
        f"  search         {options.evaluations} evaluations within {', '.join([*asked, *within])}",
        f"  head fusion    {fused}",
    ]
    rows = [f"  fine-tuning    {options.finetune_epochs:g} epochs on {', '.join(options.finetune)}"]
    return "\n".join([*lines, *(rows if options.finetune else [])])


_STARTS = {"inherit": "from its weights in the supernet", "fresh": "from new weights"}


def _examples(batches: tuple[Any, ...]) -> int:
    return sum(len(batch["labels"]) for batch in batches)


def _teacher_words(plan: ElmPlan, texts: ElmTexts) -> str:
    with torch.device("meta"):
        teacher = texts.teacher_task.auto_class.from_config(texts.config)
    size = sum(parameter.numel() for parameter in teacher.parameters())
    if plan.budget < size:
        return f"{count(size)} parameters"
    known = spaces.ELM_SIZES.items()
    smaller = [name for name, one in known if one.total_parameters < plan.size.total_parameters]
    cure = f"a smaller size ({', '.join(smaller)})" if smaller else "a larger teacher"
    return f"{count(size)} parameters; the student will be larger, so take {cure}, or fewer layers"


def _growth_words(plan: ElmPlan) -> str:
    budget = f"to {count(plan.budget)} of the mean path"
    if plan.growing is None:
        return f"none: all blocks have the width nearest {budget}"
    when = plan.growing
    return (
        f"{budget}: K={when.count} blocks every {when.every} steps, {when.decisions} times; scores every "
        f"{when.calc_freq} steps"
    )


def distillation_words(options: ElmOptions, texts: ElmTexts, plan: ElmPlan) -> str:
    """What is distilled, in words."""
    if options.distill == "none":
        return "none: the student learns from the text alone"
    how = {"relational": "correlation", "mse": "squared distance"}[options.distill]
    logits = ", and predictions" if texts.causal and not texts.headless else ""
    each = plan.teacher_layers // plan.layers
    taught = "layer by layer" if each == 1 else f"with every {each}. layer of the teacher"
    return f"{options.distill}: {2 * plan.layers + 1} states by {how}, {taught}{logits}; labels of the text beside them"
