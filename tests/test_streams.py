"""Layers run one at a time against the model run as a whole; hidden states in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, supernet_of
from torch import Tensor

from hf_elastic import DataError, Supernet
from hf_elastic.streams import SUBLAYERS, HiddenStates, LayerRunner, Sublayers, checked_batches, output_projection


def batch(supernet: Supernet) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, supernet.model.config.vocab_size, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_layers_one_at_a_time_give_what_the_model_gives(family: str) -> None:
    supernet = supernet_of(family, "lm")
    feed = batch(supernet)
    whole = supernet.model(**feed).logits
    names = set(supernet.model.state_dict())
    runner = LayerRunner(supernet)
    calls = runner.calls(feed)
    hidden = calls.hidden
    for index in range(len(runner.layers)):
        hidden = runner.run(index, hidden, calls)
    assert torch.equal(runner.finish(feed, hidden).logits, whole)
    base = supernet.model.base_model(**feed).last_hidden_state
    assert torch.equal(runner.finish_base(feed, hidden), base)
    assert set(supernet.model.state_dict()) == names and torch.equal(supernet.model(**feed).logits, whole)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_the_streams_behind_both_sublayers_are_the_models_own(family: str) -> None:
    """Pre-norm: the stream behind the FFN is the layer's output. Post-norm: its LayerNorm of it is."""
    supernet = supernet_of(family, "base")
    runner = LayerRunner(supernet)
    calls = runner.calls(batch(supernet))
    for part in supernet.layer_parts:
        hidden = torch.randn_like(calls.hidden)
        with Sublayers(part) as seen:
            after = runner.run(part.index, hidden, calls)
        stream = seen.stream("mlp", hidden)
        if not part.family.pre_norm:
            norm = "ffn" if family == "distilbert" else "output"
            layer = part.layer.get_submodule("output_layer_norm" if norm == "ffn" else "output.LayerNorm")
            stream = layer(stream)
        torch.testing.assert_close(stream, after, rtol=1e-5, atol=1e-5)
        for sublayer in SUBLAYERS:
            projected = output_projection(part, sublayer)(seen.inputs[sublayer])
            torch.testing.assert_close(projected, seen.outputs[sublayer])


@torch.no_grad()
def test_a_layer_can_be_stopped_behind_a_projection() -> None:
    supernet = supernet_of("llama", "base")
    runner = LayerRunner(supernet)
    calls = runner.calls(batch(supernet))
    part = supernet.layer_parts[0]
    with Sublayers(part, until="attention") as seen:
        runner.run(0, calls.hidden, calls)
    assert set(seen.inputs) == set(seen.outputs) == {"attention"}
    with pytest.raises(KeyError), Sublayers(part):
        raise KeyError
    assert not part.layer.self_attn.o_proj._forward_pre_hooks


def test_rows_are_real_tokens() -> None:
    supernet = supernet_of("bert", "base")
    feed = batch(supernet)
    calls = LayerRunner(supernet).calls(feed)
    values = torch.arange(33.0).reshape(3, 11, 1)
    wanted = values[feed["attention_mask"].bool()]
    assert torch.equal(calls.rows(values), wanted) and torch.equal(calls.rows(values.reshape(-1, 1)), wanted)
    with pytest.raises(DataError, match="do not fit"):
        calls.rows(values[:2])


def test_a_failing_model_gets_its_layers_back() -> None:
    supernet = supernet_of("bert", "base")
    layers = list(supernet.model.encoder.layer)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(IndexError):
        LayerRunner(supernet).calls({"input_ids": ids, "token_type_ids": 9 * ids})
    for bad in (10**6, -1):
        with pytest.raises(DataError, match=f"has the token {bad}, the model knows 0 to"):
            LayerRunner(supernet).calls({"input_ids": torch.tensor([[3, bad]])})
    assert all(a is b for a, b in zip(layers, supernet.model.encoder.layer, strict=True))


@pytest.mark.parametrize("memory", [0, 40, 10**9])
def test_hidden_states_come_back_as_they_were(memory: int, tmp_path: Path) -> None:
    states = HiddenStates(memory=memory, folder=tmp_path)
    tensors = [torch.randn(2, 3, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    for index, tensor in enumerate(tensors):
        states[index] = tensor
    states[1] = tensors[1] = tensors[1] * 2
    assert all(torch.equal(states[index], tensor) for index, tensor in enumerate(tensors))
    assert bool(list(tmp_path.iterdir())) == (memory < 10**9)
    states.close()
    assert not list(tmp_path.iterdir())


def test_batches_are_checked() -> None:
    assert checked_batches({"input_ids": torch.ones(1, 1)})[0]["input_ids"].shape == (1, 1)
    with pytest.raises(DataError, match="no calibration batch"):
        checked_batches([])
    with pytest.raises(DataError, match="got a list for input_ids"):
        checked_batches([{"input_ids": [1, 2]}])  # type: ignore[dict-item]
    with pytest.raises(DataError, match="got a str"):
        checked_batches(["text"])  # type: ignore[list-item]
