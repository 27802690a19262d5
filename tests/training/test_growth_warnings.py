"""What growth says where a run cannot give what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from grown_run import callbacks, candidates, padded
from transformers import Trainer, TrainingArguments

from hf_elastic.errors import TrainingError
from hf_elastic.training import PCAGrowthCallback, SubnetSamplingCallback

Arguments = Callable[..., TrainingArguments]


def run(given: list[PCAGrowthCallback | SubnetSamplingCallback], args: TrainingArguments) -> None:
    Trainer(given[-1].supernet.model, args, train_dataset=padded(), callbacks=list(given)).train()


def test_weight_decay_that_nothing_restricts_is_refused_before_the_first_step(arguments: Arguments) -> None:
    supernet = candidates(blocks=("standard",))
    before = {name: value.clone() for name, value in supernet.model.state_dict().items()}
    growth = callbacks(supernet, total_parameters=4_300)[1]
    args = arguments(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8, weight_decay=0.1)
    with pytest.raises(TrainingError, match="weight decay would move neurons .* add a SubnetSampling"):
        run([growth], args)
    growth.release()
    assert all((before[name] == value).all() for name, value in supernet.model.state_dict().items())


@pytest.mark.parametrize("first", [0, 1])
def test_weight_decay_beside_a_sampling_callback_is_taken_in_either_order(arguments: Arguments, first: int) -> None:
    both = callbacks(candidates())
    args = arguments(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8, weight_decay=0.1)
    with pytest.warns(UserWarning):
        run([both[first], both[1 - first]], args)
    assert len(both[1].history.entries) == 1


def test_a_budget_that_was_not_reached_is_said_with_its_numbers(arguments: Arguments) -> None:
    both = callbacks(candidates(), count=1)
    args = arguments(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8)
    with pytest.warns(UserWarning, match=r"growth ended at 3,\d+ parameters of the mean path, below the 4,400"):
        run(list(both), args)


def test_blocks_that_were_never_measured_are_counted(arguments: Arguments) -> None:
    both = callbacks(candidates(), calc_freq=6, count=50)
    args = arguments(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8)
    with pytest.warns(UserWarning, match=r"2 of 12 blocks were measured since the last growth"):
        run(list(both), args)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_growth_without_anything_that_samples_is_refused_before_the_first_step(
    arguments: Arguments, decay: float
) -> None:
    supernet = candidates()
    growth = callbacks(supernet)[1]
    args = arguments(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8, weight_decay=decay)
    with pytest.raises(TrainingError, match="nothing samples subnets.*add a SubnetSamplingCallback"):
        run([growth], args)
    growth.release()
    alone = callbacks(candidates(blocks=("standard",)), total_parameters=4_300)[1]
    args.weight_decay = 0.0
    run([alone], args)  # there is one path
    assert alone.history.entries


@pytest.mark.parametrize("value", [None, "5e5", True, 0.5, 1])
def test_a_budget_is_a_number_of_parameters(value: object) -> None:
    with pytest.raises(TrainingError, match=f"total_parameters={value!r} must be a number of parameters above 1"):
        callbacks(candidates(), total_parameters=value)


def test_a_model_is_no_supernet() -> None:
    with pytest.raises(
        TrainingError, match=r"got a ElasticBertForMaskedLM; make one of it by hf_elastic\.make_elastic"
    ):
        PCAGrowthCallback(candidates().model, total_parameters=4_400, step=6)  # type: ignore[arg-type]
