"""Relational distillation: where states come from, the loss against one written out by hand, what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, inputs, supernet_of, tiny
from tiny_training import (
    VOCABULARY,
    GradientsOfFirstStep,
    bert,
    bert_config,
    bert_supernet,
    seeded,
    sentences,
    texts,
    weights,
)
from torch import Tensor, nn
from transformers import BertForMaskedLM, PreTrainedModel, TrainingArguments

from hf_elastic import ElasticConfig, Supernet, make_elastic
from hf_elastic.distillation import dist_loss, label_mask, logits_loss, pearson_hidden_loss
from hf_elastic.errors import TrainingError, UnsupportedModelError
from hf_elastic.models import config_class, model_class
from hf_elastic.training import Distillation, ElasticTrainer, FixedSubnet, RandomSubnet, SandwichRule
from hf_elastic.training.sublayers import LayerStates, Sublayers, captured
from hf_elastic.training.targets import LossContext

Arguments = Callable[..., TrainingArguments]
WIDTHS = ElasticConfig(intermediate_size=[16, 48])
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.0}
BLOCKS = ["standard", "standard-qv", "bottleneck", "bottleneck-kv"]


def trainer_of(supernet: Supernet, plan: Distillation, args: TrainingArguments, **kwargs: Any) -> ElasticTrainer:
    rule = kwargs.pop("sampling", None) or FixedSubnet(supernet.space.largest())
    return ElasticTrainer(supernet=supernet, sampling=rule, distill=plan, args=args, **kwargs)


def first_gradients(
    supernet: Supernet, plan: Distillation, args: TrainingArguments, **kwargs: Any
) -> dict[str, Tensor]:
    keep = GradientsOfFirstStep()
    trainer_of(supernet, plan, args, callbacks=[keep], **kwargs).train()
    return keep.found


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {n for n, g in found.items() if g.any()} == {n for n, g in expected.items() if g.any()}
    for name in found.keys() & expected.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=1e-6, msg=name)


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def states_by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], Any]:
    """Embedding, outputs of attention, outputs of layers and output of a stock BERT, module by module."""
    outputs = model(**{n: v for n, v in batch.items() if n != "labels"}, output_hidden_states=True)
    padding = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, batch["input_ids"].shape[1], -1)
    states = outputs.hidden_states
    attention = [
        layer.attention(state, padding)[0]
        for layer, state in zip(model.base_model.encoder.layer, states[:-1], strict=True)
    ]
    return states[0], attention, list(states[1:]), outputs


def candidates(kind: str, *, blocks: list[str] = BLOCKS, layers: int = 2, **changes: Any) -> Supernet:
    """A supernet of candidate blocks, 24 wide and 8 in its bottlenecks."""
    shared = {"candidate_blocks": blocks, "bottleneck_size": 8, "vocab_size": VOCABULARY, **changes}
    sizes: dict[str, Any] = {
        "elastic_bert": {
            "hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32,
            "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "elastic_gpt2": {
            "n_embd": 24, "n_layer": layers, "n_head": 4, "n_inner": 32, "n_positions": 32, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    }[kind]  # fmt: skip
    name = {"elastic_bert": "ElasticBertForMaskedLM", "elastic_gpt2": "ElasticGPT2ForCausalLM"}[kind]
    return make_elastic(seeded(lambda: model_class(kind, name)(config_class(kind)(**sizes, **shared))))


# --- where states come from


def rest_of_block(family: str, layer: Any, entering: Tensor, attention: Tensor) -> Tensor:
    """What a stock layer makes of its input and of the output of its attention."""
    if family in ("bert", "roberta"):
        return layer.output(layer.intermediate(attention), attention)
    if family == "distilbert":
        middle = layer.sa_layer_norm(attention + entering)
        return layer.output_layer_norm(layer.ffn(middle) + middle)
    middle = entering + attention
    norm = layer.ln_2 if family == "gpt2" else layer.post_attention_layernorm
    return middle + layer.mlp(norm(middle))


@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_what_the_layers_of_a_family_take_and_give(family: str) -> None:
    model = tiny(family)
    sublayers = Sublayers(model)
    with torch.no_grad(), captured(sublayers) as seen:
        states = model(**inputs(model), output_hidden_states=True).hidden_states
    found = seen.states()
    assert found is not None and sublayers.depth == 3 and sublayers.width == 32
    assert sublayers.attention_widths == {32} and sublayers.vocabulary == 61
    assert torch.equal(found.embedding, states[0])
    assert list(found.blocks) == list(found.attention) == [0, 1, 2]
    for number in range(2):  # the last of these follows the final norm of decoders
        assert torch.equal(found.blocks[number], states[number + 1])
    with torch.no_grad():
        for number, layer in enumerate(sublayers._layers):
            made = rest_of_block(family, layer, states[number], found.attention[number])
            torch.testing.assert_close(made, found.blocks[number])


def rest_of_bottleneck(kind: str, block: Any, entering: Tensor, attention: Tensor) -> Tensor:
    if kind == "elastic_bert":
        inner = block.output(block.intermediate(attention), attention)
        return block.bottleneck_out_norm(block.bottleneck_out(inner) + entering)
    inner = attention + block.c_in(block.ln_1(entering))
    return entering + block.c_out(inner + block.mlp(block.ln_2(inner)))


@pytest.mark.parametrize("kind", ["elastic_bert", "elastic_gpt2"])
def test_states_of_candidate_blocks_are_those_of_the_block_that_ran(kind: str) -> None:
    supernet = candidates(kind)
    model = supernet.model.eval()
    sublayers = Sublayers(model)
    assert sublayers.attention_widths == {24, 8}
    rule, seen_blocks = RandomSubnet(seed=1), set()
    for step in range(12):
        (architecture,) = rule.draw(supernet.space, step, 0)
        with supernet.activate(architecture), torch.no_grad(), captured(sublayers) as seen:
            model(**inputs(model))
            found = seen.states()
            assert found is not None
            entering = found.embedding
            for number, layer in enumerate(sublayers._layers):
                name = str(architecture[f"layers.{number}.block"])
                block, attention = layer.candidates[name], found.attention[number]
                narrow = name.startswith("bottleneck")
                assert attention.shape[-1] == (8 if narrow else 24)
                family = kind.removeprefix("elastic_")
                made = (
                    rest_of_bottleneck(kind, block, entering, attention)
                    if narrow
                    else rest_of_block(family, block, entering, attention)
                )
                torch.testing.assert_close(made, found.blocks[number])
                entering = found.blocks[number]
                seen_blocks.add(name)
    assert seen_blocks == set(BLOCKS)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_model_has_no_hooks_outside_of_the_forward_that_is_looked_at() -> None:
    model = tiny("bert")
    sublayers, before = Sublayers(model), hooks_of(model)
    with captured(sublayers):
        assert hooks_of(model) > before
    assert hooks_of(model) == before
    with pytest.raises(ValueError, match="inside"), captured(sublayers):
        raise ValueError("inside")
    assert hooks_of(model) == before


def test_the_first_of_several_forwards_counts_and_a_forward_without_layers_is_told() -> None:
    model = tiny("bert")
    one, other = inputs(model), inputs(model, seed=1)
    with torch.no_grad(), captured(Sublayers(model)) as seen:
        model(**one)
        model(**other)
    with torch.no_grad(), captured(Sublayers(model)) as alone:
        model(**one)
    found, expected = seen.states(), alone.states()
    assert found is not None and expected is not None
    assert torch.equal(found.blocks[2], expected.blocks[2]) and torch.equal(found.embedding, expected.embedding)
    with captured(Sublayers(model)) as nothing:
        pass
    with pytest.raises(TrainingError, match="did not run"):
        nothing.states()
    with captured(None) as none:
        model(**one)
    assert none.states() is None


def test_skipped_sublayers_have_no_output_of_attention() -> None:
    for family in ("bert", "distilbert", "llama", "gpt2"):
        supernet = supernet_of(family)
        largest = supernet.space.largest()
        architecture = supernet.space.canonical({**largest, "layers.1.skip": "attention"})
        with supernet.activate(architecture), torch.no_grad(), captured(Sublayers(supernet.model)) as seen:
            supernet.model(**inputs(supernet.model))
        found = seen.states()
        assert found is not None and list(found.attention) == [0, 2] and list(found.blocks) == [0, 1, 2]


def test_models_of_no_known_family_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="holds no transformers model"):
        Sublayers(nn.Linear(2, 2))
    model = tiny("bert")
    model.config.model_type = "unheard_of"
    with pytest.raises(UnsupportedModelError, match="'unheard_of' has no family row"):
        Sublayers(model)


# --- the loss


def test_a_step_has_the_gradient_of_the_mean_distance_over_all_states(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True), bert(base=True, seed=9, num_hidden_layers=6)
    rows, rule = sentences(4, labels=False), SandwichRule(seed=2)
    batch = collated(rows)
    mask = batch["attention_mask"]
    with torch.no_grad():
        embedding, attention, blocks, _ = states_by_hand(teacher.eval(), batch)
    drawn, total = rule.draw(supernet.space, 0, 0), torch.zeros(())
    supernet.model.zero_grad()
    for architecture in drawn:
        with supernet.activate(architecture):
            own, own_attention, own_blocks, _ = states_by_hand(supernet.model, batch)
            terms = [pearson_hidden_loss(own, embedding, mask=mask)]
            terms += [pearson_hidden_loss(own_attention[n], attention[2 * n + 1], mask=mask) for n in range(3)]
            terms += [pearson_hidden_loss(own_blocks[n], blocks[2 * n + 1], mask=mask) for n in range(3)]
            loss = sum(terms) / 7 / len(drawn)
            loss.backward()
            total += loss.detach()
    expected = {n: p.grad.clone() for n, p in supernet.model.named_parameters() if p.grad is not None}
    plan = Distillation(target="relational", teacher=teacher)
    assert plan.state_distance == "pearson" and Distillation().state_distance == "mse"
    keep = GradientsOfFirstStep()
    trainer = trainer_of(supernet, plan, arguments(**ONE_STEP), sampling=rule, train_dataset=rows, callbacks=[keep])
    assert trainer.train().training_loss == pytest.approx(total.item(), rel=1e-5)
    assert_equal_gradients(keep.found, expected)
    assert trainer.fit_layers is None and all(p.grad is None for p in teacher.parameters())


def test_maps_to_the_teachers_width_are_part_of_the_loss(arguments: Arguments) -> None:
    supernet = bert_supernet(base=True, hidden_size=16)
    teacher, rows = bert(base=True, seed=9).eval(), sentences(4, labels=False)
    batch = collated(rows)
    keep = GradientsOfFirstStep()
    plan = Distillation(target="relational", teacher=teacher, fit=True, state_distance="mse")
    trainer = trainer_of(supernet, plan, arguments(**ONE_STEP), train_dataset=rows, callbacks=[keep])
    assert trainer.fit_layers is not None
    fit: Any = copy.deepcopy(trainer.fit_layers)
    mask = batch["attention_mask"].bool()

    def distance(mapping: nn.Module, student: Tensor, taught: Tensor) -> Tensor:
        return (student @ mapping.weight.T + mapping.bias - taught)[mask].square().mean()

    with torch.no_grad():
        embedding, attention, blocks, _ = states_by_hand(teacher, batch)
    own, own_attention, own_blocks, _ = states_by_hand(supernet.model, batch)
    terms = [distance(fit.states, own, embedding)]
    for n in range(3):
        terms.append(distance(fit.attention["16"], own_attention[n], attention[n]))
        terms.append(distance(fit.states, own_blocks[n], blocks[n]))
    expected = gradients(supernet.model, sum(terms) / 7)
    taken: list[dict[str, Tensor]] = []

    def look(*args: Any, **kwargs: Any) -> None:
        assert trainer.fit_layers is not None
        taken.append({name: p.grad.clone() for name, p in trainer.fit_layers.named_parameters()})

    keep.on_optimizer_step = look  # type: ignore[method-assign]
    trainer.train()
    assert_equal_gradients(keep.found, expected)
    assert_equal_gradients(taken[0], {name: p.grad for name, p in fit.named_parameters()})


def test_layers_that_a_subnet_skips_are_left_out(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True, skip=("attention", "layer")), bert(base=True, seed=9).eval()
    rows = sentences(4, labels=False)
    batch, mask = collated(rows), collated(rows)["attention_mask"]
    largest = supernet.space.largest()
    architecture = supernet.space.canonical({**largest, "layers.0.skip": "attention", "layers.1.skip": "layer"})
    with torch.no_grad():
        embedding, attention, blocks, _ = states_by_hand(teacher, batch)
    with supernet.activate(architecture):
        own, own_attention, own_blocks, _ = states_by_hand(supernet.model, batch)
        pairs = [
            (own, embedding), (own_blocks[0], blocks[0]), (own_attention[2], attention[2]), (own_blocks[2], blocks[2]),
        ]  # fmt: skip
        loss = sum(pearson_hidden_loss(student, taught, mask=mask) for student, taught in pairs) / 4
        expected = gradients(supernet.model, loss)
    plan = Distillation(target="relational", teacher=teacher)
    found = first_gradients(
        supernet, plan, arguments(**ONE_STEP), sampling=FixedSubnet(architecture), train_dataset=rows
    )
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("prediction", ["dist", "kl"])
def test_predictions_and_labels_add_their_share(arguments: Arguments, prediction: Any) -> None:
    supernet, teacher, rows = bert_supernet(num_labels=3), bert(seed=9, num_labels=3).eval(), sentences(4)
    batch = collated(rows)
    mask = batch["attention_mask"]
    with torch.no_grad():
        embedding, attention, blocks, outputs = states_by_hand(teacher, batch)
    own, own_attention, own_blocks, own_outputs = states_by_hand(supernet.model, batch)
    pairs = [(own, embedding), *zip(own_attention, attention, strict=True), *zip(own_blocks, blocks, strict=True)]
    hidden = sum(pearson_hidden_loss(student, taught, mask=mask) for student, taught in pairs) / 7
    compare = dist_loss if prediction == "dist" else logits_loss
    soft = compare(own_outputs.logits, outputs.logits, temperature=2.0)
    hard = torch.nn.functional.cross_entropy(own_outputs.logits, batch["labels"])
    expected = gradients(supernet.model, 0.7 * (hidden + 0.3 * soft) + 0.25 * hard)
    plan = Distillation(
        target="relational", teacher=teacher, weight=0.7, label_weight=0.25, prediction=prediction,
        prediction_weight=0.3, temperature=2.0,
    )  # fmt: skip
    assert_equal_gradients(first_gradients(supernet, plan, arguments(**ONE_STEP), train_dataset=rows), expected)


@pytest.mark.parametrize("prediction", ["dist", "kl"])
def test_tokens_are_predicted_where_they_have_labels(arguments: Arguments, prediction: Any) -> None:
    def masked(seed: int) -> PreTrainedModel:
        return seeded(lambda: BertForMaskedLM(bert_config()), seed=seed)

    supernet, teacher, rows = make_elastic(masked(0), WIDTHS), masked(5).eval(), texts(4, uneven=True)
    batch = collated(rows)
    with torch.no_grad():
        embedding, attention, blocks, outputs = states_by_hand(teacher, batch)
    own, own_attention, own_blocks, own_outputs = states_by_hand(supernet.model, batch)
    pairs = [(own, embedding), *zip(own_attention, attention, strict=True), *zip(own_blocks, blocks, strict=True)]
    hidden = sum(pearson_hidden_loss(student, taught) for student, taught in pairs) / 7
    compare = dist_loss if prediction == "dist" else logits_loss
    soft = compare(own_outputs.logits, outputs.logits, mask=label_mask(batch["labels"]))
    expected = gradients(supernet.model, hidden + soft)
    plan = Distillation(target="relational", teacher=teacher, label_weight=0, prediction=prediction)
    assert_equal_gradients(first_gradients(supernet, plan, arguments(**ONE_STEP), train_dataset=rows), expected)


def test_without_labels_weight_and_prediction_the_head_is_not_trained(arguments: Arguments) -> None:
    finals = []
    for labels in (False, True):
        supernet, teacher = bert_supernet(), bert(seed=9)
        before = weights(supernet.model)
        plan = Distillation(target="relational", teacher=teacher, label_weight=0)
        rows = sentences(16, labels=labels)
        trainer_of(supernet, plan, arguments(), sampling=SandwichRule(seed=0), train_dataset=rows).train()
        finals.append(weights(supernet.model))
        for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight"):
            assert torch.equal(before[name], finals[-1][name])
        words = "bert.embeddings.word_embeddings.weight"
        assert not torch.equal(before[words], finals[-1][words])
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_without_a_teacher_subnets_learn_from_the_largest_and_it_from_the_labels(
    arguments: Arguments, label_weight: float
) -> None:
    supernet, rule, rows = bert_supernet(), SandwichRule(seed=2, random=1), sentences(4)
    batch, largest = collated(rows), supernet.space.largest()
    mask = batch["attention_mask"]
    with torch.no_grad():
        embedding, attention, blocks, _ = states_by_hand(supernet.model, batch)
    supernet.model.zero_grad()
    drawn = rule.draw(supernet.space, 0, 0)
    for architecture in drawn:
        with supernet.activate(architecture):
            loss = supernet.model(**batch).loss
            if architecture != largest:
                own, own_attention, own_blocks, _ = states_by_hand(supernet.model, batch)
                pairs = [(own, embedding), *zip(own_attention, attention, strict=True)]
                pairs += zip(own_blocks, blocks, strict=True)
                loss = label_weight * loss + sum(pearson_hidden_loss(s, t, mask=mask) for s, t in pairs) / 7
            (loss / len(drawn)).backward()
    expected = {n: p.grad.clone() for n, p in supernet.model.named_parameters() if p.grad is not None}
    plan = Distillation(target="relational", label_weight=label_weight)
    found = first_gradients(supernet, plan, arguments(**ONE_STEP), sampling=rule, train_dataset=rows)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("plan", [{}, {"prediction": "kl"}], ids=["states", "with predictions"])
def test_accumulated_micro_batches_have_the_gradient_of_one_batch(arguments: Arguments, plan: dict[str, Any]) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(**ONE_STEP, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        supernet = make_elastic(seeded(lambda: BertForMaskedLM(bert_config())), WIDTHS)
        teacher = seeded(lambda: BertForMaskedLM(bert_config()), seed=5)
        given = Distillation(target="relational", teacher=teacher, state_distance="mse", label_weight=0, **plan)
        rule = SandwichRule(seed=1)
        rows = texts(8, uneven=True)
        found.append(first_gradients(supernet, given, args, sampling=rule, train_dataset=rows))
    assert_equal_gradients(*found)


def test_losses_of_micro_batches_are_shares_of_one_loss() -> None:
    def drawn() -> LayerStates:
        state = torch.randn(3, 2, 3, 4)
        return LayerStates(state[0], {0: state[1]}, {0: state[2]}, (torch.randn(2, 3, 5),))

    student, teacher, labels = drawn(), drawn(), torch.tensor([[1, -100, 2], [3, 4, -100]])
    for prediction, divisor in (("dist", 4), ("kl", 1), (None, 4)):
        plan: Any = Distillation(target="relational", prediction=prediction, prediction_weight=1e6)
        whole, part = (
            plan.loss(student, teacher, context=LossContext({"labels": labels}, pairs=((0, 0),), steps=steps, count=4))
            for steps in (1, 4)
        )
        assert part.item() == pytest.approx(whole.item() / divisor, rel=1e-4)


def test_activation_checkpointing_changes_no_gradient(arguments: Arguments) -> None:
    found = []
    for checkpointing in (False, True):
        supernet, teacher = bert_supernet(base=True, hidden_dropout_prob=0.2), bert(base=True, seed=9)
        calls: list[int] = []
        supernet.model.encoder.layer[1].attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        plan = Distillation(target="relational", teacher=teacher)
        args = arguments(**ONE_STEP, gradient_checkpointing=checkpointing)
        rows, rule = sentences(4, labels=False), SandwichRule(seed=2)
        found.append(first_gradients(supernet, plan, args, sampling=rule, train_dataset=rows))
        assert len(calls) == (2 if checkpointing else 1) * len(rule.draw(supernet.space, 0, 0))
    assert_equal_gradients(*found)


def test_reentrant_checkpointing_is_refused_since_it_hides_states(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True), bert(base=True, seed=9)
    args = arguments(**ONE_STEP, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    plan, rows = Distillation(target="relational", teacher=teacher), sentences(4, labels=False)
    trainer = trainer_of(supernet, plan, args, train_dataset=rows)
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        trainer.train()


def test_hooks_are_gone_after_an_exception_in_a_forward(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True), bert(base=True, seed=9)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inside")

    hook = supernet.model.encoder.layer[1].register_forward_hook(broken)
    before = hooks_of(supernet.model)
    plan, rows = Distillation(target="relational", teacher=teacher), sentences(4, labels=False)
    trainer = trainer_of(supernet, plan, arguments(**ONE_STEP), train_dataset=rows)
    with pytest.raises(RuntimeError, match="inside"):
        trainer.train()
    assert hooks_of(supernet.model) == before
    hook.remove()
    trainer.train()
    assert hooks_of(teacher) == 0


def test_evaluation_without_labels_gives_the_distillation_loss(arguments: Arguments) -> None:
    supernet, teacher, rows = bert_supernet(base=True), bert(base=True, seed=9), sentences(6, labels=False)
    batch, small = collated(rows), supernet.space.smallest()
    trainer = trainer_of(
        supernet, Distillation(target="relational", teacher=teacher, state_distance="mse"),
        arguments(per_device_eval_batch_size=6), eval_dataset=rows, eval_architectures={"small": small},
        compute_metrics=lambda prediction: {"never": 1.0},
    )  # fmt: skip
    metrics = trainer.evaluate()
    mask = batch["attention_mask"].bool()
    for name, architecture in (("eval_loss", supernet.space.largest()), ("eval_small_loss", small)):
        with supernet.activate(architecture), torch.no_grad():
            taught, own = (states_by_hand(model.eval(), batch) for model in (teacher, supernet.model))
        pairs = [(own[0], taught[0]), *zip(own[1], taught[1], strict=True), *zip(own[2], taught[2], strict=True)]
        expected = sum((student - wanted)[mask].square().mean() for student, wanted in pairs) / 7
        assert metrics[name] == pytest.approx(expected.item(), rel=1e-4)
    assert "eval_never" not in metrics


@pytest.mark.parametrize("distance", ["pearson", "mse"])
def test_a_narrow_student_comes_closer_to_a_wide_teacher(arguments: Arguments, distance: Any) -> None:
    supernet = bert_supernet(base=True, hidden_size=16, num_hidden_layers=2)
    teacher = bert(base=True, seed=9, num_hidden_layers=4)
    plan = Distillation(target="relational", teacher=teacher, fit=True, state_distance=distance)
    rows = sentences(32, labels=False)
    args = arguments(max_steps=40, learning_rate=5e-3, per_device_train_batch_size=8, per_device_eval_batch_size=32)
    trainer = trainer_of(
        supernet, plan, args, sampling=SandwichRule(seed=0, random=1), train_dataset=rows, eval_dataset=rows,
        eval_architectures={"small": supernet.space.smallest()},
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_small_loss"):
        assert after[name] < 0.6 * before[name]


@pytest.mark.parametrize("kind", ["elastic_bert", "elastic_gpt2"])
def test_a_supernet_of_candidate_blocks_comes_closer_to_its_teacher(arguments: Arguments, kind: str) -> None:
    supernet = candidates(kind)
    family = kind.removeprefix("elastic_")
    depth = {"num_hidden_layers": 4} if family == "bert" else {"n_layer": 4}
    teacher = tiny(family, seed=3, vocab_size=VOCABULARY, **depth)
    plan = Distillation(target="relational", teacher=teacher, fit=True, label_weight=0)
    rows = texts(32)
    args = arguments(max_steps=40, learning_rate=5e-3, per_device_train_batch_size=8)
    trainer = trainer_of(supernet, plan, args, sampling=RandomSubnet(seed=0), train_dataset=rows)
    losses = []
    for _ in range(2):
        bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        losses.append(trainer.evaluate(bare)["eval_loss"])
        trainer.train()
    assert losses[1] < 0.8 * losses[0]


# --- what does not fit


def test_a_teacher_that_does_not_fit_is_refused_before_training(arguments: Arguments) -> None:
    supernet = bert_supernet(base=True)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"vocab_size": 41}, {}, "vocabulary of 41 tokens, the student of 40"),
        ({"num_hidden_layers": 4}, {}, "4 layers are no multiple of a student's 3"),
        ({"hidden_size": 64}, {}, r"32 wide, the teacher's 64; give Distillation\(fit=True\)"),
        ({"num_hidden_layers": 2, "hidden_size": 64}, {"fit": True}, "may have 1, 2 layers"),
    ]
    for changes, plan, message in cases:
        teacher = bert(base=True, **changes)
        with pytest.raises(TrainingError, match=message) as caught:
            trainer_of(supernet, Distillation(target="relational", teacher=teacher, **plan), arguments())
        assert "\n" not in str(caught.value)
    causal = [candidates("elastic_gpt2").base, bert(base=True, is_decoder=True)]
    for student, teacher in ((supernet, causal[0]), (supernet, causal[1]), (candidates("elastic_gpt2"), bert())):
        plan = Distillation(target="relational", teacher=teacher, fit=True)
        with pytest.raises(TrainingError, match=r"causal.*bidirectional|bidirectional.*causal") as caught:
            trainer_of(student, plan, arguments())
        assert "tokens that the other does not see; give a" in str(caught.value)
    narrow = candidates("elastic_bert")
    with pytest.raises(TrainingError, match="states are 8 and 24 wide"):
        trainer_of(narrow, Distillation(target="relational"), arguments())
    for plan in ({}, {"fit": True}):
        with pytest.raises(TrainingError, match="8 wide and its layers' 24; give a teacher without bottlenecks"):
            bottlenecks = candidates("elastic_bert", layers=3).model
            trainer_of(supernet, Distillation(target="relational", teacher=bottlenecks, **plan), arguments())
    with pytest.raises(UnsupportedModelError):
        trainer_of(supernet, Distillation(target="relational", teacher=nn.Linear(2, 2)), arguments())


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "relational", "prediction": "words"},
        {"target": "relational", "prediction": "kl", "prediction_weight": 0},
        {"target": "logits", "fit": True},
        {"target": "hidden_states", "prediction": "dist"},
        {"target": "relational", "teacher": "bert-base-uncased"},
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingError) as caught:
        Distillation(**changes)
    assert "\n" not in str(caught.value)


def test_who_does_not_look_into_models_is_told_to_choose_another_target() -> None:
    plan = Distillation(target="relational")
    with pytest.raises(TrainingError, match="only ElasticTrainer"):
        plan.signal({"logits": torch.zeros(1, 2)}, {})
    states = LayerStates(torch.zeros(1, 2, 3), {}, {})
    assert plan.signal({}, {}, states=states) is states
    with pytest.raises(TrainingError, match="cannot distil relational"):
        Distillation(target="relational", prediction="kl").signal({"last_hidden_state": states}, {}, states=states)
