"""Routers on a device: fitting, calibration, training, files, decoding; beside what they give on the CPU."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import all_close, close, feed, moved_alike, numbers_close, output, placed, share_equal, stays
from routed_checkpoints import routing_of
from routed_models import ALL, padded_inputs, routed, turn
from tiny_models import space, tiny
from tiny_routed import EVERY_KIND
from tiny_routed import routed as routed_to_train
from tiny_training import same, texts, weights
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import hf_elastic as he
from hf_elastic import Distillation, ElasticTrainer, RandomSubnet, RoutingConfig, RoutingLoss, Supernet, add_routing
from hf_elastic.models.elastic_routers import LayerRouters

Arguments = Callable[..., TrainingArguments]
FAMILIES = ["llama", "gpt2", "bert"]
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}


def batches(*, count: int = 2) -> list[dict[str, Tensor]]:
    """Random tokens on the CPU, one row padded on the left and one on the right."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(3, 61, (8, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3], mask[-1, -4:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def on(device: str, given: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [feed(batch, device) for batch in given]


def router_tensors(supernet: Supernet) -> dict[str, Tensor]:
    """Weights and thresholds of all routers."""
    modules = [m for m in supernet.model.modules() if isinstance(m, LayerRouters)]
    return {f"{n}.{name}": t.detach().clone() for n, m in enumerate(modules) for name, t in m.state_dict().items()}


def lowest(supernet: Supernet) -> Supernet:
    turn(supernet, 0)
    return supernet


# -- routers are made, fitted, calibrated, looked at ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routers_are_made_where_the_model_is_in_single_precision(dtype: torch.dtype, device: str) -> None:
    model = placed(tiny("llama").to(dtype), device)
    made = add_routing(model, RoutingConfig(**ALL))
    stays(made.model, device)
    assert {t.dtype for t in router_tensors(made).values()} == {torch.float32}


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_fitted_and_calibrated_as_on_the_cpu(family: str, router: Any, device: str) -> None:
    config = RoutingConfig(**ALL, router=router, **({"router_hidden_size": 7} if router == "mlp" else {}))
    found = []
    for where in ("cpu", device):
        made = add_routing(placed(tiny(family), where), config, seed=1)
        fit = he.fit_routers(made, on(where, batches()))
        fitted = router_tensors(made)
        report = he.calibrate_routing(made, on(where, batches()))
        lowest(made)
        statistics = he.routing_statistics(made, on(where, batches()))
        stays(made.model, where)
        out = output(made.model, batches()[0])
        found.append((fit, fitted, report, router_tensors(made), statistics, out))
    there, here = found
    numbers_close([one.explained for one in here[0].routers], [one.explained for one in there[0].routers],
                  tolerance=2e-2, what="explained variance")  # fmt: skip
    close(here[0].distance, there[0].distance, tolerance=1e-3, what="distance")
    scores = {name for name in there[1] if ".scores." in name}
    all_close({n: here[1][n] for n in scores}, {n: there[1][n] for n in scores}, tolerance=1e-2, what="fitted routers")
    measured = [[share.measured for share in one[2].shares] for one in found]
    assert len(measured[0]) == len(measured[1])
    assert all(abs(a - b) <= 0.03 for a, b in zip(*measured, strict=True)), "shares of calibration differ"
    assert here[2].tokens == there[2].tokens
    for one, other in zip(here[4].routers, there[4].routers, strict=True):
        assert (one.layer, one.kind) == (other.layer, other.kind)
        assert one.share == pytest.approx(other.share, abs=0.03), f"layer {one.layer} {one.kind}"
        assert one.units == pytest.approx(other.units, abs=0.05), f"layer {one.layer} {one.kind}"
    if family == "bert":  # which token of two that score nearly alike enters decides about the rest of a causal model
        close(here[5], there[5], tolerance=2e-2, what="outputs at the lowest capacities")


@pytest.mark.parametrize("target", ["logits", "embeddings"])
def test_each_target_is_fitted_on_the_device(target: Any, device: str) -> None:
    found = []
    for where in ("cpu", device):
        made = add_routing(placed(tiny("bert"), where), RoutingConfig(**ALL))
        fit = he.fit_routers(made, on(where, batches()), target=target, points=2)
        found.append([one.explained for one in fit.routers])
    numbers_close(found[1], found[0], tolerance=2e-2, what="explained variance")


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_outputs_are_those_of_the_cpu(family: str, device: str) -> None:
    made = routed(family)
    batch = padded_inputs(made.model)
    wanted = output(made.model, batch)
    sizes = made.measured(**batch)
    placed(made, device)
    stays(made.model, device)
    close(output(made.model, batch), wanted, what="routed outputs")
    assert made.measured(**feed(batch, device)) == sizes
    again = Supernet(copy.deepcopy(made.model))
    lowest(again)
    close(output(again.model, batch), wanted, what="outputs of a copy")


@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_and_weighted_forwards_agree_on_the_device(family: str, device: str) -> None:
    made = placed(routed(family), device)
    batch = feed(padded_inputs(made.model), device)
    for part in made.router_parts:  # causal models decide by rank while they learn, which thresholds need not match
        part.routers.causal = False
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = made.model(**batch)[0][kept]
        for part in made.router_parts:
            part.routers.train()
        got = made.model(**batch)[0][kept]
    close(got, wanted, tolerance=1e-4, what="outputs")


# -- decoding ---------------------------------------------------------------------------------------------------------


def in_pieces(model: Any, batch: dict[str, Tensor], ends: list[int], *, cache: Any) -> Tensor:
    """Logits of calls that each go on where the last one ended."""
    pieces, begin = [], 0
    for end in ends:
        now = slice(begin, end)
        with torch.no_grad():
            found = model(
                input_ids=batch["input_ids"][:, now], attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, now], past_key_values=cache, use_cache=True,
            )  # fmt: skip
        pieces.append(found.logits)
        cache, begin = found.past_key_values, end
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_decoding_on_a_cache_gives_what_one_forward_gives(
    family: str, kind: str, implementation: str, device: str
) -> None:
    made = placed(routed(family), device)
    made.model.set_attn_implementation(implementation)
    batch = feed(padded_inputs(made.model), device)
    with torch.no_grad():
        wanted = made.model(**batch, use_cache=False).logits
    config, kept = made.model.config, batch["attention_mask"].bool()
    for ends in ([*range(1, 10)], [6, 7, 8, 9]):
        cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
        got = in_pieces(made.model, batch, ends, cache=cache)
        assert cache.get_seq_length() == 9
        close(got[kept], wanted[kept], what=f"logits of calls up to {ends}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_elastic_model_decodes_on_a_static_cache(family: str, device: str) -> None:
    made = placed(he.make_elastic(tiny(family), space(family)), device)
    batch = feed(padded_inputs(made.model), device)
    kept = batch["attention_mask"].bool()
    with made.activate(made.space.midpoint()), torch.no_grad():
        wanted = made.model(**batch, use_cache=False).logits
        cache = StaticCache(config=made.model.config, max_cache_len=16)
        got = in_pieces(made.model, batch, [4, 5, 7, 9], cache=cache)
    close(got[kept], wanted[kept], what="logits")


def test_a_routed_model_generates_what_it_generates_on_the_cpu(device: str) -> None:
    made, prompt = routed("llama"), torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = made.model.generate(prompt, **settings)
    got = placed(made, device).model.generate(prompt.to(device), **settings)
    assert share_equal([got], [wanted]) > 0.9


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_routed_export_from_the_device_loads_on_the_cpu(family: str, device: str, tmp_path: Path) -> None:
    made = placed(routed(family), device)
    batch = padded_inputs(made.model)
    he.export(made, made.active, tmp_path / "out")
    wanted = output(made.model, batch)
    for where in ("cpu", device):
        loaded = AUTO[family].from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        close(output(placed(loaded, where), batch), wanted, what=f"logits on {where}")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_routers_written_on_the_device_come_back_there_and_on_the_cpu(family: str, device: str, tmp_path: Path) -> None:
    made = placed(add_routing(tiny(family), routing_of(family)), device)
    he.fit_routers(made, on(device, batches()))
    he.calibrate_routing(made, on(device, batches()))
    lowest(made)
    he.save_routers(made, tmp_path / "routers")
    wanted, tensors = output(made.model, batches()[0]), router_tensors(made)
    for where in ("cpu", device):
        again = he.load_routers(placed(tiny(family), where), tmp_path / "routers")
        stays(again.model, where)
        assert again.active == made.active
        ours = {name: tensor.cpu() for name, tensor in tensors.items()}
        theirs = {name: tensor.cpu() for name, tensor in router_tensors(again).items()}
        assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)
        close(output(again.model, batches()[0]), wanted, tolerance=1e-3, what=f"outputs on {where}")


# -- training ---------------------------------------------------------------------------------------------------------


def learning(made: Supernet, args: TrainingArguments, trainer: str, callbacks: list[Any] | None = None) -> Trainer:
    plan = Distillation(teacher="parent", label_weight=0.5)
    rows = texts(16, uneven=True)
    if trainer == "elastic":
        run: Trainer = ElasticTrainer(
            supernet=made, sampling=RandomSubnet(seed=2), distill=plan, args=args, train_dataset=rows
        )
        return run
    loss = RoutingLoss(made, plan)
    sampling = he.SubnetSamplingCallback(made, RandomSubnet(seed=2))
    return Trainer(
        model=made.model, args=args, train_dataset=rows, compute_loss_func=loss,
        callbacks=[sampling, loss, *(callbacks or [])],
    )  # fmt: skip


@pytest.mark.parametrize("adapters", ["stock", None])
@pytest.mark.parametrize("trainer", ["elastic", "stock"])
def test_routers_are_trained_as_on_the_cpu(
    trainer: str, adapters: str | None, device: str, arguments: Arguments
) -> None:
    found = []
    for where in ("cpu", device):
        made = routed_to_train(adapters=adapters)
        learning(made, arguments(where, gradient_accumulation_steps=2, learning_rate=0.1), trainer).train()
        stays(made.model, where)
        found.append(weights(made.model))
    moved_alike(found[1], found[0], before=weights(routed_to_train(adapters=adapters).model), tolerance=5e-3)


@pytest.mark.parametrize("trainer", ["elastic", "stock"])
def test_routers_learn_in_mixed_precision_with_checkpointing(trainer: str, device: str, arguments: Arguments) -> None:
    made = routed_to_train()
    before = router_tensors(made)
    args = arguments(
        device, bf16=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    learning(made, args, trainer).train()
    stays(made.model, device)
    after = router_tensors(made)
    trained = {name for name in after if "thresholds" not in name}
    assert all(bool(torch.isfinite(after[name]).all()) for name in trained)
    assert any(not torch.equal(after[name].cpu(), before[name].cpu()) for name in trained)


@pytest.mark.parametrize("trainer", ["elastic", "stock"])
def test_routers_beside_adapters_resume_bit_equal(trainer: str, device: str, arguments: Arguments) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch_fused"}
    args, finals, resume = arguments(device, **saving), [], None
    for _ in range(2):
        made = routed_to_train(config=EVERY_KIND, adapters="stock")
        learning(made, args, trainer).train(resume_from_checkpoint=resume)
        finals.append(weights(made.model))
        if resume is None:
            shutil.rmtree(Path(str(args.output_dir)) / "checkpoint-4")
            resume = he.last_complete_checkpoint(str(args.output_dir))
            assert resume is not None
    assert same(*finals)
