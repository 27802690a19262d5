from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_elastic import DataError, ElasticConfig, InfeasibleError, Objective, Supernet, make_elastic, objectives
from hf_elastic.pipeline.fast import candidates, ranking_streams, require_calibration, tried
from hf_elastic.pipeline.goal import Goal, goal_of
from hf_elastic.pipeline.tasks import TaskData
from hf_elastic.space import Architecture
from hf_elastic.tables.budgets import Budgets
from hf_elastic.tables.quality import QualityTable, predicted_damage

LAYERS = 4


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=LAYERS
    )
    space = ElasticConfig(intermediate_size=[8, 16, 32], skip=["layer"], loadability="stock")
    return make_elastic(BertModel(config).eval(), space)


def table(*, without: list[float]) -> QualityTable:
    rows = [
        {"mlp/32": 0.0, "mlp/16": 1.0 + i / 10, "mlp/8": 3.0 + i / 10, "attention/2": 0.0, "layer": without[i]}
        for i in range(LAYERS)
    ]
    return QualityTable("hidden", "made up", tuple(rows))


def within(supernet: Supernet, parameters: float) -> Goal:
    return goal_of(supernet, Budgets(within={"parameters": parameters}), dtype=torch.float32)


def kept(supernet: Supernet, point: Architecture) -> int:
    return sum(not shape.skipped for shape in supernet.layer_shapes(point))


@pytest.mark.parametrize("limit", [0.4, 0.6, 0.8])
def test_the_candidates_are_the_least_damage_of_each_depth(supernet: Supernet, limit: float) -> None:
    damages = table(without=[9.0, 2.0, 4.0, 2.5])
    found = candidates(supernet, damages, within(supernet, limit))
    most = limit * objectives.parameters(supernet)(supernet.space.largest())
    allowed = [a for a in supernet.space.architectures() if objectives.parameters(supernet)(a) <= most]
    for depth in range(LAYERS, LAYERS - 3, -1):
        among = [a for a in allowed if 1 <= kept(supernet, a) <= depth]
        least = min(predicted_damage(supernet, damages, a) for a in among)
        assert any(predicted_damage(supernet, damages, a) == pytest.approx(least) for a in found if a in among)
    assert len(set(found)) == len(found)
    assert all(a in allowed for a in found)


def test_a_model_without_layers_is_no_candidate_though_the_sum_prefers_it(supernet: Supernet) -> None:
    found = candidates(supernet, table(without=[-1.0] * LAYERS), within(supernet, 0.9))
    assert found and all(kept(supernet, point) == 1 for point in found)


def test_limits_that_leave_no_layer_are_refused(supernet: Supernet) -> None:
    with pytest.raises(InfeasibleError):
        candidates(supernet, table(without=[1.0] * LAYERS), within(supernet, 0.01))


@pytest.mark.parametrize(
    ("direction", "values", "distance"),
    [
        ("maximize", (0.9, 0.5), 0.05), ("maximize", (1.0, 0.5), 0.0), ("minimize", (7.0, 0.5), 3.5),
        ("maximize", (math.nan, 0.5), math.inf), ("minimize", (math.nan, 0.5), math.inf),
        ("minimize", (math.inf, 1.0), math.inf),
    ],
)  # fmt: skip
def test_the_distance_of_a_trial(
    supernet: Supernet, direction: Any, values: tuple[float, float], distance: float
) -> None:
    measures = [
        Objective("first", lambda a: values[0], direction),
        Objective("second", lambda a: values[1], "maximize"),
    ]
    ids = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    point = candidates(supernet, table(without=[1.0] * LAYERS), within(supernet, 0.7))[0]
    assert tried(supernet, point, measures=measures, calibration=[ids]).distance == pytest.approx(distance)
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.model.state_dict().items())


def task_data(rows: int, length: int = 8) -> TaskData:
    ids = {
        "input_ids": torch.ones(rows, length, dtype=torch.long),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }
    return TaskData([], [], [ids, ids], lambda features: ids)


def test_a_wide_model_is_ranked_on_more_tokens(supernet: Supernet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its widest projection has 32 inputs, so that 64 tokens are needed whatever the usual number is."""
    for usual, wanted in ((10, 64), (100, 112), (1000, 160)):
        monkeypatch.setattr("hf_elastic.pipeline.fast._RANKING_TOKENS", usual)
        batches = ranking_streams(supernet, task_data(10)).batches
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == wanted


def test_text_that_cannot_determine_the_widest_projection_is_refused(supernet: Supernet) -> None:
    require_calibration(supernet, task_data(2))
    with pytest.raises(DataError, match="gives 16 tokens .* must determine 32 inputs; pass more text, at least 64"):
        require_calibration(supernet, task_data(1))
