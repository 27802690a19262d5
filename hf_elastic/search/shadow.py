"""An Optuna storage in memory that holds finished trials plus one scratch trial to propose into.

Samplers read their history through a storage. The shadow lets one propose without leaving a trace: the
scratch trial is thrown away, and what a sampler writes meanwhile (attributes of trial and study) is handed
out, so that the caller can keep it with the trial that is evaluated in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from datetime import datetime
from typing import Any, NoReturn

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


def _refusal(what: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(f"it tries to {what} while it proposes, which hf_elastic does not allow")

    return refuse


SHADOW_NAME = "shadow"
_STUDY_ID = 0
_EPOCH = datetime(2000, 1, 1)  # samplers must not see the clock


class ShadowStorage(BaseStorage):
    """Hold one study: finished trials under their numbers, and at most one running scratch trial."""

    def __init__(self) -> None:
        self._directions: list[StudyDirection] = []
        self._study_attrs: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._finished: dict[int, FrozenTrial] = {}
        self._ordered: list[FrozenTrial] = []
        self._scratch: FrozenTrial | None = None

    def add_finished(self, trial: FrozenTrial) -> None:
        """Add a finished trial; its number is also its id."""
        trial._trial_id = trial.number
        in_order = not self._ordered or self._ordered[-1].number < trial.number
        self._finished[trial.number] = trial
        self._ordered.append(trial)
        if not in_order:
            self._ordered.sort(key=lambda t: t.number)

    def open_scratch(self) -> FrozenTrial:
        """Replace the scratch trial by an empty one and return it."""
        self._before = dict(self._study_attrs)
        number = self._ordered[-1].number + 1 if self._ordered else 0
        self._scratch = FrozenTrial(
            number=number,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=_EPOCH,
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=number,
        )
        return self._scratch

    def close_scratch(self) -> dict[str, Any]:
        """Throw the scratch trial away; return, and undo, what was noted at the study since it was opened."""
        noted = {k: v for k, v in self._study_attrs.items() if k not in self._before or self._before[k] != v}
        self._study_attrs = self._before
        self._scratch = None
        return noted

    # What follows is Optuna's storage interface, as far as samplers use it.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        self._directions = list(directions)
        return _STUDY_ID

    def get_study_id_from_name(self, study_name: str) -> int:
        return _STUDY_ID

    def get_study_name_from_id(self, study_id: int) -> str:
        return SHADOW_NAME

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attrs

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._study_attrs[key] = value

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if self._scratch is not None and trial_id == self._scratch._trial_id:
            return self._scratch
        return self._finished[trial_id]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        # Never copied: samplers do not write to trials, and a copy of the history per proposal is too slow.
        trials = self._ordered if self._scratch is None else [*self._ordered, self._scratch]
        return list(trials) if states is None else [t for t in trials if t.state in states]

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._writable(trial_id).user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._writable(trial_id).system_attrs[key] = value

    def _writable(self, trial_id: int) -> FrozenTrial:
        if self._scratch is None or trial_id != self._scratch._trial_id:
            raise NotImplementedError(f"it tries to write to trial {trial_id}, which is finished")
        return self._scratch

    create_new_trial = _refusal("create a trial")
    set_trial_param = _refusal("set a parameter")
    set_trial_state_values = _refusal("finish a trial")
    set_trial_intermediate_value = _refusal("report an intermediate value")
    set_study_user_attr = _refusal("write a user attribute of the study")
    delete_study = _refusal("delete the study")
    get_all_studies = _refusal("list studies")
