"""ElasticTrainer: gradients against sums written out by hand, evaluation, distillation without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_training import GradientsOfFirstStep, bert, bert_supernet, llama_supernet, same, sentences, texts, weights
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_elastic import Supernet
from hf_elastic.distillation import embedding_loss, hidden_state_loss, label_mask, logits_loss, pooled
from hf_elastic.errors import ArchitectureError, TrainingError
from hf_elastic.families import shifts_labels
from hf_elastic.space import Architecture
from hf_elastic.training import (
    Distillation,
    ElasticTrainer,
    ElasticTrainerMixin,
    FixedSubnet,
    RandomSubnet,
    SandwichRule,
    SubnetSamplingCallback,
)

Arguments = Callable[..., TrainingArguments]


def first_gradients(supernet: Supernet, args: TrainingArguments, **kwargs: Any) -> dict[str, Tensor]:
    keep = GradientsOfFirstStep()
    ElasticTrainer(supernet=supernet, args=args, callbacks=[keep], **kwargs).train()
    return keep.found


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def by_hand(supernet: Supernet, loss: Callable[[Architecture, Any], Tensor], drawn: Any) -> dict[str, Tensor]:
    """Gradients of the mean of ``loss`` over subnets; it gets the architecture (active) and the model."""
    supernet.model.zero_grad()
    for architecture in drawn:
        with supernet.activate(architecture):
            (loss(architecture, supernet.model) / len(drawn)).backward()
    return {name: p.grad.clone() for name, p in supernet.model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# One step on data in order: what the Trainer shuffles is a permutation of all of it.
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.0}


def test_a_sandwich_step_has_the_gradient_of_the_mean_loss_of_its_subnets(arguments: Arguments) -> None:
    supernet, rule, rows = bert_supernet(skip=("mlp",)), SandwichRule(seed=2), sentences(4)
    expected = by_hand(supernet, lambda a, m: m(**collated(rows)).loss, rule.draw(supernet.space, 0, 0))
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, train_dataset=rows)
    assert_equal_gradients(found, expected)
    assert supernet.active == supernet.space.largest()


def test_in_place_distillation_teaches_subnets_what_the_largest_says_and_the_largest_the_labels(
    arguments: Arguments,
) -> None:
    supernet, rule, rows = bert_supernet(), SandwichRule(seed=2, random=1), sentences(4)
    batch, largest = collated(rows), supernet.space.largest()
    teacher = supernet.model(**batch).logits.detach()

    def loss(architecture: Architecture, model: Any) -> Tensor:
        outputs = model(**batch)
        if architecture == largest:
            return outputs.loss
        soft = logits_loss(outputs.logits, teacher, temperature=2.0)
        return 0.7 * soft + 0.25 * outputs.loss

    expected = by_hand(supernet, loss, rule.draw(supernet.space, 0, 0))
    plan = Distillation(temperature=2.0, weight=0.7, label_weight=0.25)
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=plan, train_dataset=rows)
    assert_equal_gradients(found, expected)


def test_in_place_distillation_of_a_single_subnet_asks_the_largest_without_dropout(
    arguments: Arguments,
) -> None:
    supernet, rows = bert_supernet(), sentences(4)
    batch, small = collated(rows), supernet.space.smallest()
    teacher = supernet.model(**batch).logits.detach()
    expected = by_hand(supernet, lambda a, m: logits_loss(m(**batch).logits, teacher), [small])
    modes: list[tuple[bool, bool]] = []
    supernet.model.register_forward_pre_hook(lambda model, _: modes.append((supernet.active == small, model.training)))
    plan, rule = Distillation(label_weight=0), FixedSubnet(small)
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=plan, train_dataset=rows)
    assert_equal_gradients(found, expected)
    assert modes == [(True, True), (False, False)]
    assert supernet.model.training


def test_a_given_teacher_teaches_the_largest_too_and_gets_no_gradient(arguments: Arguments) -> None:
    supernet, teacher, rows = bert_supernet(), bert(seed=9), sentences(4)
    rule, batch = SandwichRule(seed=2, random=0), collated(sentences(4))
    target = teacher.eval()(**batch).logits.detach()

    def loss(architecture: Architecture, model: Any) -> Tensor:
        outputs = model(**batch)
        return logits_loss(outputs.logits, target) + outputs.loss

    expected = by_hand(supernet, loss, rule.draw(supernet.space, 0, 0))
    plan = Distillation(teacher=teacher.train())
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=plan, train_dataset=rows)
    assert_equal_gradients(found, expected)
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_causal_logits_are_distilled_where_the_loss_has_labels(arguments: Arguments) -> None:
    supernet, rows = llama_supernet(skip=("attention",)), texts(4, uneven=True)
    rule, batch, largest = SandwichRule(seed=2), collated(texts(4, uneven=True)), supernet.space.largest()
    teacher = supernet.model(**batch).logits.detach()

    def loss(architecture: Architecture, model: Any) -> Tensor:
        outputs = model(**batch)
        if architecture == largest:
            return outputs.loss
        mask = label_mask(batch["labels"], shifted=True)
        return outputs.loss + logits_loss(outputs.logits, teacher, mask=mask)

    expected = by_hand(supernet, loss, rule.draw(supernet.space, 0, 0))
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=True, train_dataset=rows)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize(
    "distill",
    [
        False,
        True,
        Distillation(target="hidden_states"),
        Distillation(target="embeddings", pooling="last", label_weight=0),
    ],
    ids=["labels", "logits", "hidden states", "embeddings"],
)
def test_accumulated_micro_batches_have_the_gradient_of_one_batch_also_with_uneven_numbers_of_labels(
    arguments: Arguments, distill: bool | Distillation
) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(**ONE_STEP, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        rows, rule = texts(8, uneven=True), SandwichRule(seed=1)
        found.append(first_gradients(llama_supernet(), args, sampling=rule, distill=distill, train_dataset=rows))
    assert_equal_gradients(*found)


@pytest.mark.parametrize("target", ["embeddings", "hidden_states", "logits"])
def test_accumulation_without_labels_has_the_gradient_of_one_batch(arguments: Arguments, target: Any) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(**ONE_STEP, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        plan = Distillation(target=target, teacher=bert(seed=5))
        rows = [row for row in sentences(16, labels=False) if row["attention_mask"].all()]
        rule = SandwichRule(seed=1)
        found.append(first_gradients(bert_supernet(), args, sampling=rule, distill=plan, train_dataset=rows))
    assert_equal_gradients(*found)


def test_the_logged_loss_is_the_mean_over_subnets(arguments: Arguments) -> None:
    supernet, rule, rows = bert_supernet(), SandwichRule(seed=2), sentences(4)
    losses = []
    for architecture in rule.draw(supernet.space, 0, 0):
        with supernet.activate(architecture):
            losses.append(supernet.model(**collated(rows)).loss.item())
    trained = ElasticTrainer(supernet=supernet, sampling=rule, args=arguments(**ONE_STEP), train_dataset=rows).train()
    assert trained.training_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_step_of_the_largest_alone_is_bit_equal_to_the_stock_trainer(arguments: Arguments) -> None:
    supernet, plain, args = bert_supernet(), bert(), arguments(gradient_accumulation_steps=2)
    rule = FixedSubnet(supernet.space.largest())
    ElasticTrainer(supernet=supernet, sampling=rule, distill=True, args=args, train_dataset=sentences()).train()
    Trainer(model=plain, args=args, train_dataset=sentences()).train()
    assert same(weights(supernet.model), weights(plain))


def test_a_single_subnet_trains_as_with_the_callback_of_the_stock_trainer(arguments: Arguments) -> None:
    one, other, rule = bert_supernet(skip=("layer",)), bert_supernet(skip=("layer",)), RandomSubnet(seed=8)
    args = arguments(gradient_accumulation_steps=2)
    ElasticTrainer(
        supernet=one,
        sampling=rule,
        per="micro_batch",
        freeze_inactive=True,
        args=args,
        train_dataset=sentences(),
    ).train()
    sampling = SubnetSamplingCallback(other, rule, per="micro_batch", freeze_inactive=True)
    Trainer(model=other.model, args=args, train_dataset=sentences(), callbacks=[sampling]).train()
    assert same(weights(one.model), weights(other.model))


# --- without labels


def test_embeddings_are_distilled_from_a_given_teacher_without_labels(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True), bert(base=True, seed=9)
    rows, rule = sentences(4, labels=False), SandwichRule(seed=2, random=1)
    batch = collated(rows)
    target = pooled(teacher.eval()(**batch).last_hidden_state, batch["attention_mask"]).detach()

    def loss(architecture: Architecture, model: Any) -> Tensor:
        return embedding_loss(pooled(model(**batch).last_hidden_state, batch["attention_mask"]), target)

    expected = by_hand(supernet, loss, rule.draw(supernet.space, 0, 0))
    plan = Distillation(target="embeddings", teacher=teacher)
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=plan, train_dataset=rows)
    assert_equal_gradients(found, expected)


def test_embeddings_computed_beforehand_come_as_a_column_and_give_the_same(arguments: Arguments) -> None:
    teacher, rows, finals = bert(base=True, seed=9).eval(), sentences(16, labels=False), []
    with torch.no_grad():
        batch = collated(rows)
        embeddings = pooled(teacher(**batch).last_hidden_state, batch["attention_mask"])
    with_column = [
        {**row, "teacher_embeddings": embedding.tolist()} for row, embedding in zip(rows, embeddings, strict=True)
    ]
    for given, data in ((teacher, rows), (None, with_column)):
        supernet = bert_supernet(base=True)
        plan = Distillation(target="embeddings", teacher=given, relational_weight=0.5)
        trainer = ElasticTrainer(
            supernet=supernet,
            sampling=SandwichRule(seed=2),
            distill=plan,
            args=arguments(),
            train_dataset=data,
        )
        trainer.train()
        finals.append(weights(supernet.model))
    for name, weight in finals[0].items():
        torch.testing.assert_close(finals[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_hidden_states_of_kept_layers_are_compared_without_labels(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True, skip=("layer",)), bert(base=True, seed=9)
    rows = sentences(4, labels=False)
    batch, mask = collated(rows), collated(rows)["attention_mask"]
    architecture = supernet.space.canonical({**supernet.space.largest(), "layers.1.skip": "layer"})
    target = [state.detach() for state in teacher.eval()(**batch, output_hidden_states=True).hidden_states]

    def loss(_: Architecture, model: Any) -> Tensor:
        states = model(**batch, output_hidden_states=True).hidden_states
        return hidden_state_loss(states, target, mask=mask, pairs=[(0, 0), (1, 2), (3, 3)])

    expected = by_hand(supernet, loss, [architecture])
    plan, rule = Distillation(target="hidden_states", teacher=teacher), FixedSubnet(architecture)
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=plan, train_dataset=rows)
    assert_equal_gradients(found, expected)


def test_evaluation_without_labels_gives_the_distillation_loss_and_both_signals(arguments: Arguments) -> None:
    supernet, teacher, rows = bert_supernet(base=True), bert(base=True, seed=9), sentences(6, labels=False)
    small = supernet.space.smallest()

    def cosine(prediction: EvalPrediction) -> dict[str, float]:
        student, target = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        return {"cosine": float(torch.cosine_similarity(student, target).mean())}

    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=SandwichRule(seed=0),
        distill=Distillation(target="embeddings", teacher=teacher),
        eval_architectures={"small": small},
        compute_metrics=cosine,
        args=arguments(per_device_eval_batch_size=3),
        eval_dataset=rows,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(1 - metrics["eval_cosine"], abs=1e-5)
    assert metrics["eval_small_loss"] == pytest.approx(1 - metrics["eval_small_cosine"], abs=1e-5)
    assert metrics["eval_loss"] != metrics["eval_small_loss"]


def test_in_place_distillation_without_labels_is_refused_since_nothing_would_be_learned(
    arguments: Arguments,
) -> None:
    supernet = bert_supernet(base=True)
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=SandwichRule(seed=0),
        distill=Distillation(target="embeddings"),
        args=arguments(),
        train_dataset=sentences(8, labels=False),
    )
    with pytest.raises(TrainingError, match="teacher_embeddings"):
        trainer.train()
    assert supernet.active == supernet.space.largest()


# --- evaluation


def test_named_architectures_are_evaluated_during_training_under_their_names(arguments: Arguments) -> None:
    supernet, rows = bert_supernet(), sentences(8)
    names = {"small": supernet.space.smallest(), "middle": dict(supernet.space.midpoint())}
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=SandwichRule(seed=0),
        distill=True,
        eval_architectures=names,
        args=arguments(eval_strategy="steps", eval_steps=2),
        train_dataset=sentences(),
        eval_dataset=rows,
    )
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_loss", "eval_small_loss", "eval_middle_loss"} <= logged
    metrics = trainer.evaluate()
    supernet.model.eval()
    for prefix, architecture in (
        ("eval", supernet.space.largest()),
        ("eval_small", supernet.space.smallest()),
    ):
        with supernet.activate(architecture), torch.no_grad():
            assert metrics[f"{prefix}_loss"] == pytest.approx(supernet.model(**collated(rows)).loss.item(), rel=1e-5)
    assert supernet.active == supernet.space.largest()


def test_several_evaluation_sets_are_each_evaluated_with_each_architecture(arguments: Arguments) -> None:
    supernet = bert_supernet()
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=SandwichRule(seed=0),
        eval_architectures={"small": supernet.space.smallest()},
        args=arguments(),
        eval_dataset={"a": sentences(4), "b": sentences(4, seed=1)},
    )
    losses = {key for key in trainer.evaluate() if key.endswith("_loss")}
    assert losses == {"eval_a_loss", "eval_a_small_loss", "eval_b_loss", "eval_b_small_loss"}


def test_an_architecture_of_another_space_is_refused_before_training(arguments: Arguments) -> None:
    other = bert_supernet(skip=("layer",)).space.smallest()
    with pytest.raises(ArchitectureError):
        ElasticTrainer(
            supernet=bert_supernet(),
            sampling=SandwichRule(seed=0),
            eval_architectures={"x": other},
            args=arguments(),
        )


# --- mixing, errors


class DoubledLoss(Trainer):
    """Another trainer, with a loss of its own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class DoubledElastic(ElasticTrainerMixin, DoubledLoss):
    pass


def test_the_mixin_takes_the_loss_of_the_trainer_it_stands_before(arguments: Arguments) -> None:
    supernet, rule, rows = bert_supernet(), SandwichRule(seed=2), sentences(4)
    batch, largest = collated(rows), supernet.space.largest()
    teacher = supernet.model(**batch).logits.detach()

    def loss(architecture: Architecture, model: Any) -> Tensor:
        outputs = model(**batch)
        soft = logits_loss(outputs.logits, teacher) if architecture != largest else 0.0
        return 2 * outputs.loss + soft

    expected = by_hand(supernet, loss, rule.draw(supernet.space, 0, 0))
    keep = GradientsOfFirstStep()
    DoubledElastic(
        supernet=supernet,
        sampling=rule,
        distill=True,
        args=arguments(**ONE_STEP),
        train_dataset=rows,
        callbacks=[keep],
    ).train()
    assert_equal_gradients(keep.found, expected)


class Bomb(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("boom")


def test_after_an_exception_the_largest_is_active_and_training_can_start_again(arguments: Arguments) -> None:
    supernet = bert_supernet()
    given: dict[str, Any] = {
        "supernet": supernet,
        "sampling": SandwichRule(seed=0),
        "train_dataset": sentences(),
    }
    with pytest.raises(RuntimeError, match="boom"):
        ElasticTrainer(**given, args=arguments(), callbacks=[Bomb()]).train()
    assert supernet.active == supernet.space.largest()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inside")

    hook = supernet.model.bert.encoder.layer[1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="inside"):
        ElasticTrainer(**given, args=arguments()).train()
    assert supernet.active == supernet.space.largest()
    hook.remove()
    ElasticTrainer(**given, args=arguments()).train()


def test_span_models_are_distilled_by_both_their_logits(arguments: Arguments) -> None:
    from tiny_training import bert_config, seeded
    from transformers import BertForQuestionAnswering

    from hf_elastic import ElasticConfig, make_elastic

    supernet = make_elastic(
        seeded(lambda: BertForQuestionAnswering(bert_config())), ElasticConfig(intermediate_size=[16, 48])
    )
    rows = [{**row, "start_positions": n % 4, "end_positions": 4} for n, row in enumerate(sentences(4, labels=False))]
    batch, rule, largest = collated(rows), SandwichRule(seed=0, random=0), supernet.space.largest()
    teacher = supernet.model(**batch)
    starts, ends = teacher.start_logits.detach(), teacher.end_logits.detach()

    def loss(architecture: Architecture, model: Any) -> Tensor:
        outputs = model(**batch)
        if architecture == largest:
            return outputs.loss
        soft = logits_loss(outputs.start_logits, starts) + logits_loss(outputs.end_logits, ends)
        return outputs.loss + soft / 2

    expected = by_hand(supernet, loss, rule.draw(supernet.space, 0, 0))
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=True, train_dataset=rows)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "words"},
        {"divergence": "sideways"},
        {"pooling": "max"},
        {"state_distance": "far"},
        {"weight": 0},
        {"label_weight": -1},
        {"temperature": 0},
        {"relational_weight": -1},
    ],
    ids=str,
)
def test_a_distillation_with_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingError):
        Distillation(**changes)


def test_arguments_that_do_not_go_together_are_refused(arguments: Arguments) -> None:
    supernet, rule = bert_supernet(), SandwichRule(seed=0)
    sampling = SubnetSamplingCallback(supernet, RandomSubnet(seed=0))
    for wrong in (
        {"callbacks": [sampling]},
        {"model_init": bert},
        {"per": "epoch"},
        {"distill": Distillation(teacher=supernet.model)},
    ):
        with pytest.raises(TrainingError):
            ElasticTrainer(supernet=supernet, sampling=rule, args=arguments(), **wrong)


def test_a_model_without_the_asked_output_is_named_in_the_error(arguments: Arguments) -> None:
    supernet = bert_supernet(base=True)
    trainer = ElasticTrainer(
        supernet=supernet,
        sampling=SandwichRule(seed=0),
        distill=Distillation(target="logits", teacher=bert(seed=1)),
        args=arguments(),
        train_dataset=sentences(8, labels=False),
    )
    with pytest.raises(TrainingError, match="last_hidden_state"):
        trainer.train()


def test_causal_models_shift_their_labels_whatever_their_class_is_called() -> None:
    sizes = {"vocab_size": 31, "bos_token_id": 1, "eos_token_id": 2}
    causal = [
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **sizes)),
        LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **sizes)
        ),
    ]
    masked = BertForMaskedLM(
        BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=31)
    )
    ids = torch.randint(3, 31, (2, 8), generator=torch.Generator().manual_seed(0))
    for model in [*causal, masked]:
        shifted = shifts_labels(model)
        output = model.eval()(input_ids=ids, labels=ids)
        logits, labels = (output.logits[:, :-1], ids[:, 1:]) if shifted else (output.logits, ids)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(output.loss, expected)


def test_the_last_hidden_state_is_distilled_token_by_token_without_labels(arguments: Arguments) -> None:
    supernet, teacher = bert_supernet(base=True, skip=("layer",)), bert(base=True, seed=9)
    rows = sentences(4, labels=False)
    batch, mask = collated(rows), collated(rows)["attention_mask"]
    architecture = supernet.space.smallest()
    target = teacher.eval()(**batch).last_hidden_state.detach()

    def loss(_: Architecture, model: Any) -> Tensor:
        missed = (model(**batch).last_hidden_state - target).square()[mask.bool()].sum()
        return missed / target.square()[mask.bool()].sum()

    expected = by_hand(supernet, loss, [architecture])
    plan = Distillation(target="last_hidden_state", teacher=teacher, state_distance="relative")
    rule = FixedSubnet(architecture)
    found = first_gradients(supernet, arguments(**ONE_STEP), sampling=rule, distill=plan, train_dataset=rows)
    assert_equal_gradients(found, expected)
