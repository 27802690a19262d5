"""Measures of damage against plain torch on the outputs of an extracted model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import supernet_of
from torch import Tensor, nn

from hf_elastic import DataError, Supernet, extract
from hf_elastic.streams import LayerRunner
from hf_elastic.tables.measures import layer_outputs, measure_named


def held_out(supernet: Supernet) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for tokens in (7, 10):
        ids = torch.randint(3, supernet.model.config.vocab_size, (4, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@torch.no_grad()
def damage(supernet: Supernet, name: str, held: list[dict[str, Tensor]]) -> float:
    measure, runner = measure_named(name, supernet), LayerRunner(supernet)
    measure.start(runner, held)
    assert measure.damage(runner, layer_outputs(runner, held)) == pytest.approx(0.0, abs=1e-9)
    with supernet.activate(supernet.space.midpoint()):
        return measure.damage(runner, layer_outputs(runner, held))


def outputs(model: nn.Module, held: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    with torch.no_grad():
        return [getattr(model(**batch), name) for batch in held]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "mistral"])
def test_the_divergence_is_the_mean_kl_of_real_tokens(family: str) -> None:
    supernet = supernet_of(family, "lm")
    held = held_out(supernet)
    small = extract(supernet, supernet.space.midpoint())
    total, tokens = 0.0, 0
    for ours, theirs, batch in zip(
        outputs(small, held, "logits"), outputs(supernet.model, held, "logits"), held, strict=True
    ):
        kept = batch["attention_mask"].bool()
        p, q = theirs[kept].double().softmax(-1), ours[kept].double().softmax(-1)
        total, tokens = total + float((p * (p / q).log()).sum()), tokens + int(kept.sum())
    assert damage(supernet, "kl", held) == pytest.approx(total / tokens, rel=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_similarity_error_is_that_of_all_pairs_of_embeddings(family: str, pooling: str) -> None:
    supernet = supernet_of(family, "base")
    held = held_out(supernet)

    def similarities(model: nn.Module) -> Tensor:
        rows = []
        for hidden, batch in zip(outputs(model, held, "last_hidden_state"), held, strict=True):
            for sentence, mask in zip(hidden.double(), batch["attention_mask"].bool(), strict=True):
                real = sentence[mask]
                rows.append({"mean": real.mean(0), "cls": real[0], "last": real[-1]}[pooling])
        unit = torch.stack([row / row.norm() for row in rows])
        return torch.stack([unit[i] @ unit[j] for i in range(len(unit)) for j in range(i)])

    small = extract(supernet, supernet.space.midpoint())
    wanted = float((similarities(small) - similarities(supernet.model)).square().mean())
    name = "similarity" if pooling == "mean" else f"similarity/{pooling}"
    assert damage(supernet, name, held) == pytest.approx(wanted, rel=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    supernet = supernet_of("bert", "base")
    with pytest.raises(DataError, match="needs a language model"):
        measure_named("kl", supernet)
    with pytest.raises(DataError, match="'speed' is not one of"):
        measure_named("speed", supernet)
    with pytest.raises(DataError, match="similarity/max"):
        measure_named("similarity/max", supernet)
    runner = LayerRunner(supernet)
    with pytest.raises(DataError, match="at least two"), torch.no_grad():
        measure_named("similarity", supernet).start(runner, [{"input_ids": torch.tensor([[3, 4]])}])
