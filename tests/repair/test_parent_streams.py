"""What the parent makes of batches, remembered or not, against hooks on the model, and repairs that share it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, supernet_of
from torch import Tensor

from hf_elastic import DataError, Supernet
from hf_elastic.repair.parent_streams import ParentStreams
from hf_elastic.repair.refitting import repaired_shapes
from hf_elastic.streams import LayerRunner
from hf_elastic.tables.quality import additivity, measure_quality_table

ENOUGH = 2**24


def batches(made: Supernet) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(2):
        ids = torch.randint(3, made.model.config.vocab_size, (8, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def leaving(made: Supernet, batch: dict[str, Tensor]) -> list[Tensor]:
    """What leaves each layer of the whole model."""
    seen: list[Tensor] = []

    def note(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [part.layer.register_forward_hook(note) for part in made.layer_parts]
    made.model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


class Counted(LayerRunner):
    """Counts how often a layer runs."""

    runs = 0

    def run(self, *args: object) -> Tensor:
        self.runs += 1
        return super().run(*args)  # type: ignore[arg-type]


def counted(made: Supernet, *, memory: int) -> tuple[ParentStreams, Counted]:
    parent, runner = ParentStreams(made, batches(made), memory=memory), Counted(made)
    parent.runner = runner
    return parent, runner


@pytest.mark.parametrize("memory", [0, ENOUGH])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_pass_gives_what_leaves_the_models_layers(family: str, memory: int) -> None:
    made = supernet_of(family, "base")
    parent = ParentStreams(made, batches(made), memory=memory)
    for index, batch in enumerate(parent.batches):
        seen = leaving(made, batch)
        for _ in range(2):  # the second time as it is remembered, or anew
            with parent.walk() as walk:
                for part, wanted in zip(made.layer_parts, seen, strict=True):
                    found = walk.through(part, index)
                    assert torch.equal(found.after, wanted) and torch.equal(walk.last(index), wanted)
                    assert found.attention.shape == found.mlp.shape == wanted.shape
                    if part.family.pre_norm:
                        assert torch.equal(found.mlp, wanted)


@pytest.mark.parametrize(("memory", "again"), [(0, 6), (ENOUGH, 0)])
@torch.no_grad()
def test_a_second_pass_runs_the_parent_only_where_it_is_not_remembered(memory: int, again: int) -> None:
    made = supernet_of("bert", "base")
    parent, runner = counted(made, memory=memory)
    layers = made.layer_parts
    for wanted in (2 * len(layers), again):
        runner.runs = 0
        with parent.walk() as walk:
            for part in layers:
                for index in range(2):
                    walk.through(part, index)
        assert runner.runs == wanted


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_repairs_that_share_a_pass_are_those_that_do_not(family: str) -> None:
    """One after the other, with layers skipped, repaired for some layers only, and judged: the same bits."""
    made = supernet_of(family, "base", num_hidden_layers=None)
    shared, runner = counted(made, memory=ENOUGH)
    full = made.layer_shapes(made.space.largest())
    small, skipped = (dict(made.space.largest()) for _ in range(2))
    for choice in made.space:
        if choice.name.endswith("intermediate_size"):
            small[choice.name] = min(choice.values)
    skipped["layers.1.skip"] = "layer"
    shapes = [made.layer_shapes(made.space.canonical(point)) for point in (small, skipped)]
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    spent = []
    for shape in (*shapes, *shapes):
        for reach in (None, 1):
            weights, runner.runs = [], 0
            for source in (batches(made), shared):
                with repaired_shapes(made, shape, source, reach=reach) as report:
                    weights.append({name: value.clone() for name, value in made.model.state_dict().items()})
                assert report.sublayers
            spent.append(runner.runs)
            assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
            assert any(not torch.equal(before[name], value) for name, value in weights[1].items())
    assert spent[0] - spent[4] == 2 * len(full), "the first repair alone runs the parent"
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())


def test_tables_and_additivity_that_share_a_pass_are_those_that_do_not() -> None:
    made = supernet_of("llama", "lm")
    held, rng_points = batches(made)[:1], [made.space.smallest(), made.space.midpoint(), made.space.largest()]
    found = []
    for source in (batches(made), ParentStreams(made, batches(made))):
        table = measure_quality_table(made, source, held, measure="kl", sizes=3)
        found.append((table, additivity(made, table, rng_points, calibration=source, validation=held, measure="kl")))
    assert found[0][0] == found[1][0]
    assert found[0][1].measured == found[1][1].measured


def test_streams_of_other_weights_are_refused() -> None:
    made, other = supernet_of("bert", "base"), supernet_of("bert", "base")
    shared, shapes = ParentStreams(made, batches(made)), made.layer_shapes(made.space.smallest())
    for _ in range(2):
        with repaired_shapes(made, shapes, shared):
            pass
    with pytest.raises(DataError, match="of another supernet"), repaired_shapes(other, shapes, shared):
        pass
    with torch.no_grad():
        made.layer_parts[1].layer.output.dense.weight.mul_(1.3)
    with pytest.raises(DataError, match="have changed"), repaired_shapes(made, shapes, shared):
        pass


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(DataError, match="there is no calibration batch"):
        ParentStreams(supernet_of("bert", "base"), [])
