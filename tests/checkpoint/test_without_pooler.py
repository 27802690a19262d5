"""Base models made without a pooler: subnets of them have none either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import SIZES
from transformers import BertConfig, BertModel, PreTrainedModel, RobertaConfig, RobertaModel

import hf_elastic as he


@pytest.mark.parametrize(("config", "model"), [(BertConfig, BertModel), (RobertaConfig, RobertaModel)])
@pytest.mark.parametrize("loadability", ["stock", "remote-code"])
def test_a_subnet_of_a_model_without_pooler_has_none(
    config: type, model: type[PreTrainedModel], loadability: str, tmp_path: Path
) -> None:
    settings = {**SIZES, "pad_token_id": 1 if model is RobertaModel else 0}
    base = model(config(**settings), add_pooling_layer=False).eval()
    supernet = he.make_elastic(base, he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    middle = int(0.5 * SIZES["intermediate_size"])
    widths = [middle] * 3 if loadability == "stock" else [middle, middle, 2 * middle]
    point = {f"layers.{n}.intermediate_size": width for n, width in enumerate(widths)}
    ids = torch.arange(2, 12)[None]
    with supernet.activate(point), torch.no_grad():
        wanted = supernet.model(input_ids=ids).last_hidden_state
    small = he.extract(supernet, point)
    assert small.pooler is None
    assert not any("pooler" in name for name in small.state_dict())
    with torch.no_grad():
        assert torch.allclose(small(input_ids=ids).last_hidden_state, wanted, atol=1e-6)
    he.export(supernet, point, tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").is_file()
