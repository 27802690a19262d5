"""Adapters that are merged: the plain model afterwards computes what the adapted one did."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from tiny_models import inputs, point, supernet_of, tiny
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_elastic import TrainingError, extract
from hf_elastic.adapters import Lora, adapted, described

MODELS = [("bert", "lm"), ("bert", "sequence"), ("gpt2", "lm"), ("llama", "lm"), ("qwen3", "base")]


def per_layer(family: str, head: str = "lm") -> PreTrainedModel:
    """An extracted model whose layers differ, of an ``elastic_*`` class."""
    made = supernet_of(family, head)
    model = extract(made, point(made, ffn0=16, ffn1=24, heads2=1, skip1="attention", skip2="mlp"))
    assert model.config.model_type == f"elastic_{family}"
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model))[0]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def randomise(adapters: nn.Module) -> None:
    """Gives the adapters weights as a training would; their second factors begin with zeros."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def merge_by_hand(adapters: nn.Module) -> dict[str, Tensor]:
    """``W + (alpha / r) B A`` in float64 of every adapted weight, by its name in the plain model."""
    found = {}
    for name, module in adapters.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            low, high = (m["default"].weight.detach().double() for m in (module.lora_A, module.lora_B))
            delta = module.scaling["default"] * high @ low
            base = module.get_base_layer().weight.detach().double()
            plain = name.removeprefix("base_model.model.")
            found[f"{plain}.weight"] = base + (delta.t() if module.fan_in_fan_out else delta)
    return found


@pytest.mark.parametrize(("family", "head"), MODELS)
@pytest.mark.parametrize("lora", [4, LoraConfig(r=2, lora_alpha=3, target_modules=r".*(query|c_fc|q_proj|up_proj)$")])
def test_merged_equals_unmerged_and_the_formula(family: str, head: str, lora: Lora) -> None:
    model = tiny(family, head)
    plain, names = type(model), list(model.state_dict())
    before = logits(model)
    with adapted(model, lora) as student:
        torch.testing.assert_close(logits(student), before, rtol=0, atol=0)  # fresh adapters change nothing
        randomise(student)
        expected, weights = logits(student), merge_by_hand(student)
        assert (expected - before).abs().max() > 1e-2
    assert type(model) is plain and list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert weights
    for name, tensor in weights.items():
        torch.testing.assert_close(model.state_dict()[name].double(), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_merged_model_with_per_layer_shapes_reloads_as_a_plain_one(family: str, tmp_path: Path) -> None:
    model = per_layer(family, "base" if family == "bert" else "lm")
    plain, before = type(model), bits(model)
    with adapted(model, 4) as student:
        randomise(student)
        expected = logits(student)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = (AutoModel if family == "bert" else AutoModelForCausalLM).from_pretrained(tmp_path)
    assert type(loaded) is plain
    assert torch.equal(logits(loaded), logits(model))


def test_a_rank_adapts_every_linear_layer_but_the_output_head() -> None:
    for family in ("gpt2", "llama"):
        model = tiny(family)
        with adapted(model, 2) as student:
            weights = merge_by_hand(student)
        linears = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        assert set(weights) == linears - {"lm_head.weight"}


def test_only_adapters_train_inside_and_what_trained_before_trains_again() -> None:
    model = tiny("llama")
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    with adapted(model, 2) as student:
        assert {n.split(".")[-3] for n, p in student.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not frozen)


def test_after_an_error_the_model_is_bit_for_bit_the_one_before() -> None:
    model = tiny("gpt2")
    before, names = bits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(KeyboardInterrupt), adapted(model, 4) as student:
        randomise(student)
        raise KeyboardInterrupt
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with adapted(model, 4):  # and can be adapted anew
        pass


def test_first_weights_are_a_function_of_the_seed_alone() -> None:
    def drawn(seed: int, noise: int) -> list[Tensor]:
        torch.rand(noise)
        with adapted(tiny("llama"), 4, seed=seed) as student:
            return [p.detach().clone() for p in student.parameters() if p.requires_grad]

    first, same, other = drawn(1, 3), drawn(1, 8), drawn(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    state = torch.get_rng_state()
    with adapted(tiny("llama"), 4):
        assert torch.equal(torch.get_rng_state(), state)


def test_a_configuration_of_the_caller_is_left_alone() -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    before = copy.deepcopy(config)
    with adapted(tiny("bert"), config):
        pass
    assert config.to_dict() == before.to_dict()


def test_half_precision_weights_keep_their_type() -> None:
    model = tiny("llama").to(torch.bfloat16)
    with adapted(model, 4) as student:
        assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
        randomise(student)
        expected = logits(student)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (0, "neither a rank"), (True, "neither a rank"), ("all", "neither a rank"),
        (IA3Config(), "neither a rank"), (LoraConfig(target_modules=["nothing"]), "peft cannot adapt"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_refused_and_changes_nothing(lora: Lora, message: str) -> None:
    model = tiny("bert")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TrainingError, match=message), adapted(model, lora):
        pass
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    with adapted(model, 2):
        pass


def test_a_model_with_adapters_is_refused_and_keeps_them() -> None:
    model = tiny("llama")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TrainingError, match="has adapters already"), adapted(model, 4):
        pass
    assert model.active_adapters() == ["default"]


@pytest.mark.slow
def test_the_description_of_adapters_is_the_same_in_every_process() -> None:
    config = LoraConfig(r=2, target_modules=["v_proj", "q_proj", "up_proj"])
    code = (
        "from peft import LoraConfig; from hf_elastic.adapters import described\n"
        "print(described(LoraConfig(r=2, target_modules=['v_proj', 'q_proj', 'up_proj'])))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == described(config)
    assert described(LoraConfig(r=3)) != described(LoraConfig(r=2)) and described(4) == "4"
