"""Refit against a dense float64 least-squares oracle that walks the layers by itself, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import GROUPED, supernet_of
from torch import Tensor

from hf_elastic import ArchitectureError, DataError, Supernet, extract, sort_by_importance_
from hf_elastic.repair.refitting import RefitReport, refit, refitted
from hf_elastic.space import Architecture

FAMILIES = ("bert", "distilbert", "roberta", "llama", "qwen3", "gpt2")
RIDGE = 1e-3


def supernet(family: str, **changes: object) -> Supernet:
    made = supernet_of(family, "base", **changes)
    sort_by_importance_(made, calibration(made))
    return made


def calibration(made: Supernet, *, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches with padding, of more tokens than any projection has inputs."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, made.model.config.vocab_size, (8, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:], mask[1, 5:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def narrow(made: Supernet, **given: object) -> Architecture:
    """The largest architecture but for the choices given by their endings, in every layer that has them."""
    values = dict(made.space.largest())
    for name, largest in values.items():
        values[name] = given.get(name, given.get(name.rpartition(".")[2], largest))
    return made.space.canonical(values)


def last_states(model: torch.nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**b).last_hidden_state[b["attention_mask"].bool()] for b in data])


def distance(model: torch.nn.Module, parent: torch.nn.Module, data: list[dict[str, Tensor]]) -> float:
    return float((last_states(model, data) - last_states(parent, data)).norm())


def heads_name(family: str) -> str:
    return "num_key_value_heads" if family in GROUPED else "num_attention_heads"


def tapped(model: torch.nn.Module, module: torch.nn.Module, data: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What enters and leaves a module at real tokens, in float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    masks = [b["attention_mask"].bool() for b in data]
    return tuple(torch.cat([s[k][m] for s, m in zip(seen, masks, strict=True)]).double() for k in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_last_ffn_is_the_dense_least_squares_solution(family: str) -> None:
    """Only the last FFN is cut: its residual is the parent's, the target the projection's own output."""
    made = supernet(family)
    data = calibration(made)
    last = made.layer_parts[-1]
    path = last.family.ffn_out
    x, y = tapped(made.model, last.layer.get_submodule(path), data)
    point = narrow(made, **{f"layers.{last.index}.intermediate_size": 16})
    small = refit(made, point, data, ridge=RIDGE, loadability=None)
    projection = small.base_model.get_submodule(last.family.layers)[last.index].get_submodule(path)
    weight = projection.weight.double().detach()
    weight = weight if family == "gpt2" else weight.t()  # (16, D)

    parent = last.layer.get_submodule(path)
    start = parent.weight.double().detach()
    start = (start if family == "gpt2" else start.t())[:16].numpy()
    kept, target, has_bias = x[:, :16].numpy(), y.numpy(), parent.bias is not None
    centred = kept - kept.mean(0) if has_bias else kept
    strength = RIDGE * np.square(centred).sum(0).mean()
    system = np.vstack([np.hstack([kept, np.ones((len(kept), 1))]) if has_bias else kept,
                        np.sqrt(strength) * np.eye(16, 17 if has_bias else 16)])  # fmt: skip
    expected = np.linalg.lstsq(system, np.vstack([target, np.sqrt(strength) * start]), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), expected[:16], rtol=1e-3, atol=1e-5)
    if has_bias:
        np.testing.assert_allclose(projection.bias.double().detach().numpy(), expected[16], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("carry", [0.0, 0.4, 1.0])
def test_the_error_of_a_skipped_layer_is_carried_as_stated(family: str, carry: float) -> None:
    """Attention behind a skipped layer, against one dense system made of both streams as hooks see them."""
    made = supernet(family, num_hidden_layers=None)
    data = calibration(made)
    point = narrow(made, **{"layers.1.skip": "layer"})
    part = made.layer_parts[2]
    projection = part.layer.get_submodule(part.family.attention_out)
    parent = [*tapped(made.model, projection, data), tapped(made.model, part.layer, data)[0]]
    with made.activate(point):
        x, alone = tapped(made.model, projection, data)
        residual = tapped(made.model, part.layer, data)[0]
    target = alone + carry * ((parent[1] + parent[2]) - (alone + residual))
    weight = projection.weight.double().detach()
    start = (weight if family == "gpt2" else weight.t()).numpy()
    kept, has_bias = x.numpy(), projection.bias is not None
    strength = RIDGE * np.square(kept - kept.mean(0) if has_bias else kept).sum(0).mean()
    rows = np.hstack([kept, np.ones((len(kept), 1))]) if has_bias else kept
    penalty = np.sqrt(strength) * np.eye(len(start), rows.shape[1])
    expected = np.linalg.lstsq(
        np.vstack([rows, penalty]), np.vstack([target.numpy(), np.sqrt(strength) * start]), rcond=None
    )[0]
    with refitted(made, point, data, ridge=RIDGE, carry=carry):
        found = projection.weight.double().detach().clone()
    np.testing.assert_allclose(
        (found if family == "gpt2" else found.t()).numpy(), expected[: len(start)], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_tells_of_every_projection_in_order(family: str) -> None:
    made = supernet(family)
    data = calibration(made)
    reports: list[RefitReport] = []
    point = narrow(made, intermediate_size=16, **{heads_name(family): 1})
    refit(made, point, data, on_report=reports.append)
    assert [(fit.layer, fit.sublayer) for fit in reports[0].sublayers] == [
        (part.index, sublayer) for part in made.layer_parts for sublayer in ("attention", "mlp")
    ]
    for fit in reports[0].sublayers:
        assert fit.error_after <= fit.error_before and fit.rows == sum(int(b["attention_mask"].sum()) for b in data)
    with refitted(made, point, data) as report:
        assert report.sublayers == reports[0].sublayers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repaired_subnet_is_nearer_to_its_parent_than_the_cut(family: str) -> None:
    made = supernet(family)
    data = calibration(made)
    point = narrow(made, intermediate_size=16, **{heads_name(family): 1})
    reports: list[RefitReport] = []
    small = refit(made, point, data, on_report=reports.append)
    cut = extract(made, point)
    before, after = distance(cut, made.model, data), distance(small, made.model, data)
    assert after < 0.9 * before
    assert reports[0].repaired and reports[0].error < reports[0].error_cut
    assert {n: t.shape for n, t in small.state_dict().items()} == {n: t.shape for n, t in cut.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_kept_nothing_changes(family: str) -> None:
    made = supernet(family)
    data = calibration(made)
    kept = refit(made, made.space.largest(), data)
    assert torch.equal(last_states(kept, data), last_states(extract(made, made.space.largest()), data))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_supernet_is_as_it_was_bit_for_bit(family: str) -> None:
    made = supernet(family)
    before = {name: t.clone() for name, t in made.model.state_dict().items()}
    made.model.train()
    made.set_active(made.space.midpoint())
    refit(made, made.space.smallest(), calibration(made))
    assert all(torch.equal(before[name], t) for name, t in made.model.state_dict().items())
    assert made.active == made.space.midpoint() and made.model.training


def test_the_supernet_is_as_it_was_after_a_failure() -> None:
    made = supernet("bert")
    before = {name: t.clone() for name, t in made.model.state_dict().items()}
    data = calibration(made)
    data[1] = {**data[1], "attention_mask": torch.zeros_like(data[1]["attention_mask"])}
    with torch.no_grad():
        made.layer_parts[2].layer.intermediate.dense.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="layer 2, mlp: .*NaN"):
        refit(made, narrow(made, intermediate_size=16), data)
    with torch.no_grad():
        made.layer_parts[2].layer.intermediate.dense.bias.copy_(before["encoder.layer.2.intermediate.dense.bias"])
    assert all(torch.equal(before[name], t) for name, t in made.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_before_the_first_cut_stay_bit_for_bit(family: str) -> None:
    made = supernet(family)
    small = refit(made, narrow(made, **{"layers.2.intermediate_size": 16}), calibration(made))
    cut = extract(made, narrow(made, **{"layers.2.intermediate_size": 16})).state_dict()
    changed = [name for name, t in small.state_dict().items() if not torch.equal(t, cut[name])]
    assert changed and all(".2." in name for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", ["attention", "mlp", "layer"])
def test_the_error_of_a_skip_is_carried_into_the_next_layers(family: str, skip: str) -> None:
    made = supernet(family, num_hidden_layers=None)
    data = calibration(made)
    point = narrow(made, **{"layers.1.skip": skip})
    small = refit(made, point, data)
    assert distance(small, made.model, data) < distance(extract(made, point), made.model, data)


def test_the_repair_can_be_used_inside_the_supernet() -> None:
    made = supernet("llama")
    data = calibration(made)
    point = made.space.midpoint()
    small = refit(made, point, data)
    with refitted(made, point, data), made.activate(point):
        inside = last_states(made.model, data)
    torch.testing.assert_close(inside, last_states(small, data), rtol=1e-4, atol=1e-5)


def test_hidden_states_on_disk_give_the_same_as_in_memory() -> None:
    made = supernet("gpt2")
    data = calibration(made)
    point = made.space.midpoint()
    ample, none = refit(made, point, data), refit(made, point, data, memory=0)
    for name, tensor in ample.state_dict().items():
        assert torch.equal(tensor, none.state_dict()[name]), name


def test_a_repair_that_would_end_farther_away_is_dropped_and_said() -> None:
    made = supernet("bert")
    data = calibration(made)
    point = made.space.midpoint()
    with torch.no_grad(), refitted(made, point, data) as report:
        repaired = report.repaired
    assert repaired
    from hf_elastic.repair import refitting

    original = refitting.NormalEquations.solve

    def spoilt(self: refitting.NormalEquations, *args: object, **kwargs: object) -> refitting.Solution:
        solved = original(self, *args, **kwargs)  # type: ignore[arg-type]
        return refitting.Solution(**{**vars(solved), "weight": -solved.weight})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refitting.NormalEquations, "solve", spoilt)
        with refitted(made, point, data) as report:
            assert not report.repaired and report.error == report.error_cut
            small = extract(made, point)
    assert torch.equal(last_states(small, data), last_states(extract(made, point), data))


def test_bf16_stays_bf16() -> None:
    made = supernet("llama")
    made.model.to(torch.bfloat16)
    data = calibration(made)
    point = narrow(made, intermediate_size=16)
    small = refit(made, point, data)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert distance(small.float(), made.model.float(), data) < distance(extract(made, point), made.model, data)


def test_nonsense_is_refused_in_one_line() -> None:
    made = supernet("bert")
    data, point = calibration(made), made.space.midpoint()
    with pytest.raises(DataError, match="no calibration batch"):
        refit(made, point, [])
    with pytest.raises(DataError, match="layer 0, attention: .* tokens cannot determine"):
        refit(made, narrow(made, num_attention_heads=2), [{"input_ids": torch.tensor([[3, 4]])}])
    with pytest.raises(DataError, match="ridge"):
        refit(made, point, data, ridge=0.0)
    with pytest.raises(DataError, match="carry=1.5"):
        refit(made, point, data, carry=1.5)
    with pytest.raises(DataError, match="input_ids"):
        refit(made, point, [{"attention_mask": torch.ones(1, 2)}])
    with pytest.raises(ArchitectureError):
        refit(made, {"layers.0.intermediate_size": 5}, data)


def test_one_cut_and_uniform_spaces_are_repaired_too() -> None:
    made = supernet_of("bert", "base", skip=["layer"], loadability="stock", num_attention_heads=None,
                       num_hidden_layers=None)  # fmt: skip
    data = calibration(made)
    point = made.space.canonical({**made.space.largest(), "intermediate_size": 16, "layers.1.skip": "layer"})
    small = refit(made, point, data)
    assert type(small).__name__ == "BertModel" and small.config.num_hidden_layers == 2
    assert distance(small, made.model, data) < distance(extract(made, point), made.model, data)
