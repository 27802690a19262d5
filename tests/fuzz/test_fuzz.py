"""Hostile input ends in an ``ElasticError`` of one line, and in nothing else; and each kind of finding is found."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))
from fuzz_mutations import hostile_data, hostile_json  # noqa: E402  # found by its name only behind the line above
from fuzz_running import KINDS, Target, generator, run, shares, summary  # noqa: E402
from fuzz_targets import prepared  # noqa: E402
from fuzz_watching import Place  # noqa: E402

from hf_elastic import Architecture, ElasticError, SearchSpace  # noqa: E402
from hf_elastic.declaration import ElasticConfig  # noqa: E402
from hf_elastic.search import SearchResult  # noqa: E402

CASES, MANY = 300, 4_000
KNOWN: dict[str, set[str]] = {
    # transformers' own: it takes memory for tensors of other sizes than the file's before it refuses them.
    "AutoModel of our types": {"memory", "time"},
}
"""What falls short, see docs/reliability.md; everything else is a failure."""


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Target], Path]]:
    root = tmp_path_factory.mktemp("fuzz")
    with prepared(root / "fuzz") as found:
        yield found, root / "fuzz" / "work"


def failures(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        verdict.to_dict()
        for name, verdicts in found.items()
        for verdict in verdicts
        if set(verdict.findings) - KNOWN.get(name, set())
    ]


def test_a_seeded_subset_finds_nothing(targets: tuple[list[Target], Path]) -> None:
    chosen, folder = targets
    found = run(chosen, shares(chosen, CASES), seed=11, folder=folder)
    assert failures(found) == []
    assert sum(len(verdicts) for verdicts in found.values()) >= CASES


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_many_cases_find_nothing_and_every_target_accepts_some(targets: tuple[list[Target], Path]) -> None:
    chosen, folder = targets
    found = run(chosen, shares(chosen, MANY), seed=12, folder=folder)
    assert failures(found) == []
    assert [row["target"] for row in summary(found) if not row["accepted"]] == []
    assert [row["target"] for row in summary(found) if not row["refused"] and row["target"] != "card of a parent"] == []


# -- what is looked for is found -------------------------------------------------------------------------------------


def judged(call: Callable[[Place], object], folder: Path) -> dict[str, str]:
    """Findings of one case that does what it is told."""

    def make(rng: random.Random, place: Place) -> Callable[[], object]:
        (place.inside / "given.py").write_text(f"open({str(place.marker)!r}, 'w')\n")
        (place.inside / "given.bin").write_bytes(pickle.dumps(Path))
        return lambda: call(place)

    return run([Target("made up", make)], {"made up": 1}, seed=0, folder=folder)["made up"][0].findings


def _refuse(message: str) -> None:
    error = ElasticError("fine")
    error.args = (message,)  # as if the class did not take care of it
    raise error


def _fork_forever() -> None:
    while True:
        pass


CAUGHT: dict[str, Callable[[Place], object]] = {
    "exception": lambda place: {}["missing"],
    "message": lambda place: _refuse("two\nlines"),
    "memory": lambda place: bytearray(600 * 2**20),
    "write": lambda place: (place.inside / "new.txt").write_text("x"),
    "code": lambda place: exec(
        compile((place.inside / "given.py").read_text(), str(place.inside / "given.py"), "exec")
    ),
    "pickle": lambda place: pickle.loads((place.inside / "given.bin").read_bytes()),
}


@pytest.mark.parametrize("kind", CAUGHT)
def test_each_kind_of_finding_is_found(kind: str, tmp_path: Path) -> None:
    assert kind in judged(CAUGHT[kind], tmp_path) and kind in KINDS


def test_a_case_that_does_not_answer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz_running._KILLED_AFTER", 0.5)
    assert list(judged(lambda place: _fork_forever(), tmp_path)) == ["time"]


@pytest.mark.parametrize("way", ["replace", "link", "mkdir", "remove", "outside"])
def test_files_changed_outside_of_the_output_folder_are_found(way: str, tmp_path: Path) -> None:
    ways: dict[str, Callable[[Place], object]] = {
        "replace": lambda place: os.replace(place.inside / "given.py", place.inside / "other.py"),
        "link": lambda place: (place.inside / "link").symlink_to("/etc"),
        "mkdir": lambda place: (place.out / ".." / "escaped").mkdir(),
        "remove": lambda place: (place.inside / "given.py").unlink(),
        "outside": lambda place: (tmp_path / "escaped").write_text("x"),
    }
    assert set(judged(ways[way], tmp_path)) == {"write"}


def test_reading_and_writing_where_one_may_is_no_finding(tmp_path: Path) -> None:
    def fine(place: Place) -> None:
        (place.out / "new").mkdir()
        (place.out / "new" / "a.txt").write_text((place.inside / "given.py").read_text())
        (place.tmp / "b.txt").write_text("x")

    assert judged(fine, tmp_path) == {}


def test_a_case_is_a_pure_function_of_its_seed_target_and_number() -> None:
    data = json.loads(SearchSpace.from_json(_SPACE).to_json())
    made = [hostile_json(generator(3, "a", number), data) for number in range(50)]
    assert made == [hostile_json(generator(3, "a", number), data) for number in range(50)] and len(set(made)) > 40


# -- with hypothesis, which makes a failing text short -----------------------------------------------------------

_SPACE = (
    '{"format": "hf_elastic.search_space", "version": 1, "choices": ['
    '{"name": "a", "kind": "ordered", "values": [1, 2]}, {"name": "b", "kind": "ordered", "values": [3],'
    ' "when": [{"choice": "a", "values": [2]}]}]}'
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
READERS: list[Callable[[str], object]] = [SearchSpace.from_json, Architecture.from_json, SearchResult.from_json]


def put(data: Any, value: Any, rng: random.Random) -> Any:
    """Data with a value at a random place."""
    if not isinstance(data, dict | list) or not data or rng.random() < 0.2:
        return value
    key = rng.choice(list(data)) if isinstance(data, dict) else rng.randrange(len(data))
    changed = dict(data) if isinstance(data, dict) else list(data)
    changed[key] = put(data[key], value, rng)
    return changed


@given(value=anything, place=st.integers(0, 2**32), reader=st.sampled_from(READERS))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_anywhere_in_a_json_is_accepted_or_refused(value: Any, place: int, reader: Any) -> None:
    text = json.dumps(put(json.loads(_SPACE), value, random.Random(place)))
    try:
        reader(text)
    except ElasticError as error:
        assert len(str(error).splitlines()) <= 1


@given(value=anything, place=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_value_anywhere_in_a_declared_space_is_accepted_or_refused(value: Any, place: int) -> None:
    declared = {"intermediate_size": {"0": [0.5, 8]}, "skip": ["mlp"], "multiple_of": 4, "loadability": "any"}
    data = put(declared, value, random.Random(place))
    try:
        ElasticConfig.from_dict(data)
    except ElasticError as error:
        assert len(str(error).splitlines()) <= 1


def test_hostile_data_leaves_what_it_was_made_from_as_it_was() -> None:
    data = json.loads(_SPACE)
    for number in range(200):
        hostile_data(generator(0, "copy", number), data)
    assert data == json.loads(_SPACE)
