"""Searches in a database: killed and started again, shared by processes, foreign, corrupt."""

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import psutil
import pytest
from sqlalchemy.exc import OperationalError

import hf_elastic
from hf_elastic.errors import SearchError, StorageError
from hf_elastic.search import Objective, SearchResult, search_subnets
from hf_elastic.search import engine as search_engine
from hf_elastic.search import storage as storage_module
from hf_elastic.search.claims import ClaimTable, is_gone, owner_name
from hf_elastic.search.identity import Identity
from hf_elastic.search.journal import Proposal
from hf_elastic.search.samplers import TrialEncoding, sampler_factory
from hf_elastic.search.storage import DatabaseJournal
from tests.search.toy import widths_problem

ROOT = Path(hf_elastic.__file__).parents[1]
# A process that only searches needs no torch, so ours skip what `import hf_elastic` registers with transformers.
BARE_PACKAGE = (
    "import sys, types; package = types.ModuleType('hf_elastic'); package.__path__ = ['hf_elastic'];"
    "sys.modules['hf_elastic'] = package;"
)


def url_of(path):
    return f"sqlite:///{path}"


def start(tmp_path, **options):
    options = {"log": str(tmp_path / "log"), "storage": url_of(tmp_path / "s.db"), **options}
    options.setdefault("output", str(tmp_path / "output"))
    code = f"{BARE_PACKAGE} import json; from tests.search.toy import main; main(json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", code, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def evaluated(tmp_path):
    return [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]


def reference(algorithm, evaluations):
    """The same search in memory, never interrupted."""
    space, objectives = widths_problem(layers=5)
    return search_subnets(
        space,
        objectives,
        algorithm=algorithm,
        evaluations=evaluations,
        within={"parameters": 0.7},
        seed=3,
        progress=False,
    )


@pytest.mark.parametrize("algorithm", ["nsga2", "tpe", "random"])
def test_a_search_killed_twice_and_restarted_ends_bit_equal(tmp_path, algorithm):
    options = {"algorithm": algorithm, "evaluations": 25}
    for death in ({"die_in": 3}, {"die_recording": 14}):
        process = start(tmp_path, **options, **death)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    process = start(tmp_path, **options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "output").read_text() == reference(algorithm, 25).to_json()
    digests = evaluated(tmp_path)
    assert len(digests) == len(set(digests)) == 25


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE UNIQUE INDEX",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("CREATE INDEX", "INSERT INTO version_info", "INSERT INTO st")
        ),
    ],
)
def test_a_search_killed_while_it_makes_its_tables_goes_on_and_may_be_continued(tmp_path, statement):
    process = start(tmp_path, evaluations=8, die_before=statement)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    space, objectives = widths_problem(layers=5)
    options = {"within": {"parameters": 0.7}, "seed": 3, "progress": False}
    first = search_subnets(space, objectives, evaluations=8, storage=url_of(tmp_path / "s.db"), **options)
    assert first.to_json() == reference("nsga2", 8).to_json()
    more = search_subnets(space, objectives, evaluations=12, storage=url_of(tmp_path / "s.db"), **options)
    assert more.evaluations[:8] == first.evaluations and len(more.evaluations) == 12


def test_four_processes_share_the_work_and_evaluate_nothing_twice(tmp_path):
    outputs = [tmp_path / f"output{i}" for i in range(4)]
    processes = [start(tmp_path, evaluations=40, seconds=0.02, output=str(output)) for output in outputs]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    digests = evaluated(tmp_path)
    assert len(digests) == len(set(digests)) == 40
    assert len({output.read_text() for output in outputs}) == 1
    assert len(SearchResult.load(outputs[0]).evaluations) == 40
    workers = {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}
    assert len(workers) > 1


def journal(path, lease_seconds=600.0):
    space, objectives = widths_problem(layers=5)
    return DatabaseJournal(
        url_of(path),
        TrialEncoding(space),
        Identity(space, objectives, 0, "nsga2"),
        planned=10,
        study_name=None,
        lease_seconds=lease_seconds,
    )


def test_a_claim_belongs_to_one_owner_and_the_budget_to_all(tmp_path):
    one, other = journal(tmp_path / "s.db"), journal(tmp_path / "s.db")
    space, _ = widths_problem(layers=5)
    largest, smallest = Proposal(space.largest()), Proposal(space.smallest())
    assert one.claim(largest, budget=2)
    assert not other.claim(largest, budget=2)
    assert other.open_digests() == {largest.architecture.digest}
    assert other.adopt() is None
    assert other.claim(smallest, budget=2)
    assert not one.claim(Proposal(space.midpoint()), budget=2)
    assert one.is_full(2) and not one.is_full(3)
    one.release(largest)
    assert one.is_full(2) and not one.claim(Proposal(space.midpoint()), budget=2)  # it is the next one's to evaluate
    assert other.adopt() == largest and one.adopt() is None


def test_a_process_does_not_adopt_what_it_evaluates_itself(tmp_path):
    slow = journal(tmp_path / "s.db", lease_seconds=0.02)
    space, _ = widths_problem(layers=5)
    proposal = Proposal(space.largest())
    assert slow.claim(proposal, budget=1)
    time.sleep(0.1)
    assert slow.adopt({proposal.architecture.digest}) is None
    assert slow.adopt() == proposal


def test_a_search_takes_over_what_is_handed_back_while_it_waits_for_the_last(tmp_path):
    space, objectives = widths_problem(layers=5)
    options = {
        "algorithm": "random",
        "evaluations": 5,
        "seed": 0,
        "progress": False,
        "storage": url_of(tmp_path / "s.db"),
    }
    alone = search_subnets(space, objectives, **{**options, "storage": None})
    other = DatabaseJournal(
        options["storage"],
        TrialEncoding(space),
        Identity(space, objectives, 0, "random"),
        planned=5,
        study_name=None,
        lease_seconds=600.0,
    )
    begun = [Proposal(one.architecture) for one in alone.evaluations]
    assert all(other.claim(proposal, budget=5) for proposal in begun)
    for proposal, evaluation in zip(begun[:-1], alone.evaluations, strict=False):
        other.finish(proposal, tuple(evaluation.values[o.name] for o in objectives), None)
    handing = threading.Timer(0.5, other.release, [begun[-1]])
    handing.start()
    assert search_subnets(space, objectives, **options) == alone
    handing.join()


def test_the_late_record_of_a_claim_that_was_handed_back_since_ends_no_search_in_a_wait(tmp_path, monkeypatch):
    """Its owner fell silent, another took it over and was ended; then the first one comes back with its outcome."""
    space, objectives = widths_problem(layers=5)
    identity = Identity(space, objectives, 0, "random")
    options = {"planned": 6, "study_name": None}
    url = url_of(tmp_path / "s.db")
    late = DatabaseJournal(url, TrialEncoding(space), identity, lease_seconds=0.02, **options)
    ended = DatabaseJournal(url, TrialEncoding(space), identity, lease_seconds=600.0, **options)
    alone = search_subnets(space, objectives, algorithm="random", evaluations=6, seed=0, progress=False)
    first = Proposal(alone.evaluations[0].architecture)
    assert late.claim(first, budget=6)
    time.sleep(0.1)
    assert ended.adopt() == first
    with monkeypatch.context() as patched:  # it asked whether the claim is its own just before that
        patched.setattr(ClaimTable, "is_mine", lambda table, digest: True)
        patched.setattr(ClaimTable, "mark_done", lambda table, digest: ended.release(first))
        late.finish(first, tuple(alone.evaluations[0].values[o.name] for o in objectives), None)
    storage = {"storage": url, "progress": False}
    assert search_subnets(space, objectives, algorithm="random", evaluations=6, seed=0, **storage) == alone


def test_to_be_handed_back_counts_against_no_architecture(tmp_path):
    journals = [journal(tmp_path / "s.db") for _ in range(9)]
    space, _ = widths_problem(layers=5)
    proposal = Proposal(space.largest())
    assert journals[0].claim(proposal, budget=1)
    for before, after in itertools.pairwise(journals):
        before.release(proposal)
        assert after.adopt() == proposal


def test_an_expired_claim_is_taken_over_and_its_old_owner_records_nothing(tmp_path):
    slow, other = journal(tmp_path / "s.db", lease_seconds=0.02), journal(tmp_path / "s.db")
    space, _ = widths_problem(layers=5)
    proposal = Proposal(space.largest(), {"generation": 1}, {"counter": [1, 2]})
    assert slow.claim(proposal, budget=1)
    time.sleep(0.1)
    assert other.adopt() == proposal
    slow.finish(proposal, (1.0, 2.0), None)
    assert other.read() == []
    other.finish(proposal, (3.0, 4.0), None)
    (record,) = slow.read()
    assert (record.values, record.proposal) == ((3.0, 4.0), proposal)
    assert slow.read() == [] and slow.open_digests() == frozenset()


def test_a_lease_is_renewed_while_the_evaluation_runs(tmp_path):
    busy, other = journal(tmp_path / "s.db", lease_seconds=0.4), journal(tmp_path / "s.db")
    space, _ = widths_problem(layers=5)
    proposal = Proposal(space.largest())
    assert busy.claim(proposal, budget=1)
    with busy.keep_claim(proposal):
        time.sleep(1.0)
        assert other.adopt() is None
    time.sleep(0.6)
    assert other.adopt() == proposal


def test_only_owners_whose_process_ended_are_gone():
    code = f"{BARE_PACKAGE} from hf_elastic.search.claims import owner_name; print(owner_name())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert is_gone(done.stdout.strip())
    mine = owner_name()
    assert not is_gone(mine)
    host, process_id, started, nonce = mine.rsplit("|", 3)
    assert is_gone(f"{host}|{process_id}|{float(started) - 5}|{nonce}")  # the process id was given out again
    assert not is_gone(f"elsewhere|{process_id}|1|{nonce}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the start is known by the clock only")
def test_a_clock_that_is_set_ends_no_process_and_another_boot_is_another_host(monkeypatch):
    mine = owner_name()
    began = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: began(process) + 60.0)
    assert not is_gone(mine)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert mine.count(boot) == 1
    host, process_id, _, nonce = mine.rsplit("|", 3)
    image = host.replace(boot, "another start of a machine with this name")
    assert not is_gone(f"{image}|{process_id}|1|{nonce}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_that_was_killed_is_gone_before_its_parent_asks():
    code = f"{BARE_PACKAGE} from hf_elastic.search.claims import owner_name; print(owner_name(), flush=True); input()"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    owner = process.stdout.readline().strip()
    assert not is_gone(owner)
    process.kill()
    until = time.monotonic() + 60
    while not is_gone(owner) and time.monotonic() < until:
        time.sleep(0.01)
    assert is_gone(owner) and Path(f"/proc/{process.pid}").exists()
    process.communicate()
    assert is_gone(owner)


def test_a_failed_evaluation_is_stored_with_its_cause_and_not_repeated(tmp_path):
    space, (loss, cost) = widths_problem(layers=2, values=3)
    calls = []

    def fragile(architecture):
        calls.append(architecture.digest)
        if architecture["layers.0.intermediate_size"] == 192:
            raise RuntimeError("out of memory\non this device")
        return loss(architecture)

    for _ in range(2):
        result = search_subnets(
            space,
            [Objective("loss", fragile), cost],
            algorithm="random",
            evaluations=9,
            storage=url_of(tmp_path / "s.db"),
            progress=False,
        )
        assert len(calls) == len(set(calls)) == 9
        assert {f.cause for f in result.failures} == {"loss: RuntimeError: out of memory"}
        assert len(result.failures) == 3 and len(result.evaluations) == 6
    study = optuna.load_study(study_name="hf_elastic", storage=url_of(tmp_path / "s.db"))
    assert len(study.get_trials(states=[optuna.trial.TrialState.FAIL])) == 3


def test_an_interrupted_search_goes_on_in_the_same_process(tmp_path):
    space, (loss, cost) = widths_problem(layers=5)
    calls = 0

    def interrupted(architecture):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return loss(architecture)

    options = {"evaluations": 20, "within": {"parameters": 0.7}, "seed": 3, "progress": False}
    storage = url_of(tmp_path / "s.db")
    with pytest.raises(KeyboardInterrupt):
        search_subnets(space, [Objective("loss", interrupted), cost], storage=storage, **options)
    result = search_subnets(space, [Objective("loss", interrupted), cost], storage=storage, **options)
    assert result.to_json() == search_subnets(space, [loss, cost], **options).to_json()
    assert calls == 21


def test_more_evaluations_continue_a_finished_search(tmp_path):
    space, objectives = widths_problem(layers=5)
    storage = url_of(tmp_path / "s.db")
    first = search_subnets(space, objectives, evaluations=10, storage=storage, progress=False)
    more = search_subnets(space, objectives, evaluations=15, storage=storage, progress=False)
    assert more.evaluations[:10] == first.evaluations and len(more.evaluations) == 15
    fewer = search_subnets(space, objectives, evaluations=5, storage=storage, progress=False)
    assert fewer.evaluations == more.evaluations


@pytest.mark.parametrize(
    ("make_other", "words"),
    [
        (lambda: widths_problem(layers=4), "(4 choices"),
        (lambda: (widths_problem(layers=5)[0], widths_problem(layers=5)[1][:1]), "minimize loss)"),
        (
            lambda: (widths_problem(layers=5)[0], [Objective("loss", len, fingerprint="abcdef012345")]),
            "minimize loss [abcdef01]",
        ),
    ],
)
def test_a_storage_of_another_search_is_refused_and_both_are_named(tmp_path, make_other, words):
    space, objectives = widths_problem(layers=5)
    storage = url_of(tmp_path / "s.db")
    search_subnets(space, objectives, evaluations=3, storage=storage, progress=False)
    other_space, other_objectives = make_other()
    with pytest.raises(StorageError) as caught:
        search_subnets(other_space, other_objectives, evaluations=3, storage=storage, progress=False)
    message = str(caught.value)
    was = "(5 choices) instead of " if "choices" in words else "(minimize loss, minimize parameters) instead of "
    assert words in message and was in message
    assert "study_name=" in message and "\n" not in message
    search_subnets(other_space, other_objectives, evaluations=3, storage=storage, study_name="other", progress=False)


SEARCHES = {
    "seed": ({"seed": 1}, "seed 0 instead of 1"),
    "algorithm": ({"algorithm": "random"}, "algorithm 'nsga2' instead of 'random'"),
    "factory": (
        {"algorithm": lambda seed: optuna.samplers.TPESampler(seed=seed)},
        "algorithm 'nsga2' instead of 'sampler factory of TPESampler'",
    ),
    "tighter limit": ({"within": {"loss": 20.0}}, "limits (loss <= 30.0) instead of (loss <= 20.0)"),
    "no limit": ({"within": None}, "limits (loss <= 30.0) instead of ()"),
    "two": ({"seed": 1, "within": {"loss": 20.0}}, "seed 0 instead of 1, limits (loss <= 30.0) instead of"),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_a_storage_is_refused_to_a_search_of_other_arguments_and_the_difference_is_named(tmp_path, case):
    changed, words = SEARCHES[case]
    space, objectives = widths_problem(layers=5)
    options = {"within": {"loss": 30.0}, "evaluations": 6, "storage": url_of(tmp_path / "s.db"), "progress": False}
    first = search_subnets(space, objectives, **options)
    with pytest.raises(StorageError) as caught:
        search_subnets(space, objectives, **{**options, **changed})
    message = str(caught.value)
    assert f"holds, as study 'hf_elastic', a search with {words}" in message
    assert message.endswith("; pass another study_name= or storage=") and "\n" not in message
    again = search_subnets(space, objectives, study_name="other", **{**options, **changed})
    assert again.seed == changed.get("seed", 0)
    assert search_subnets(space, objectives, **options) == first


def test_a_storage_is_refused_when_a_limited_cost_changed_its_meaning(tmp_path):
    space, (loss, cost) = widths_problem(layers=5)
    options = {"within": {"macs": 900}, "evaluations": 6, "storage": url_of(tmp_path / "s.db"), "progress": False}

    def searched(mark):
        macs = Objective("macs", cost.function, cost=True, fingerprint=mark)
        return search_subnets(space, [Objective("loss", loss.function, related=lambda: {"macs": macs})], **options)

    assert searched("one") == searched("one")
    with pytest.raises(StorageError, match=r"limits \(macs <= 900.0 \[one\]\) instead of \(macs <= 900.0 \[two\]\)"):
        searched("two")


def test_a_study_of_an_earlier_version_is_refused_as_such(tmp_path):
    space, objectives = widths_problem(layers=5)
    storage = url_of(tmp_path / "s.db")
    study = optuna.create_study(study_name="hf_elastic", storage=storage, directions=["minimize"] * 2)
    study.set_user_attr("hf_elastic:identity", {"version": 1, "space": space.digest})
    with pytest.raises(StorageError, match="a search of another version of hf_elastic; pass another study_name="):
        search_subnets(space, objectives, evaluations=5, storage=storage, progress=False)


def test_an_unusable_algorithm_leaves_no_study_behind(tmp_path):
    space, objectives = widths_problem(layers=5)
    options = {"evaluations": 5, "storage": url_of(tmp_path / "s.db"), "progress": False}
    for algorithm in ("genetic", lambda seed: "nsga2"):
        with pytest.raises(SearchError):
            search_subnets(space, objectives, algorithm=algorithm, **options)
    assert len(search_subnets(space, objectives, **options).evaluations) == 5


def test_a_continued_search_keeps_the_population_it_was_begun_with(tmp_path, monkeypatch):
    space, objectives = widths_problem(layers=6)
    populations = []

    def watched(*arguments, evaluations):
        factory = sampler_factory(*arguments, evaluations=evaluations)

        def make(seed):
            populations.append(factory(seed).population_size)
            return factory(seed)

        return make

    monkeypatch.setattr(search_engine, "sampler_factory", watched)
    results = []
    for name, budgets in (("short", (120, 150)), ("long", (120, 130, 150))):
        for budget in budgets:
            storage = url_of(tmp_path / f"{name}.db")
            results.append(search_subnets(space, objectives, evaluations=budget, storage=storage, progress=False))
    assert set(populations) == {12}
    assert results[1] == results[4] and len(results[1].evaluations) == 150


def corrupt(path):
    path.write_bytes(b"this is no database" * 1000)
    return url_of(path)


def truncated(path):
    space, objectives = widths_problem(layers=5)
    search_subnets(space, objectives, evaluations=5, storage=url_of(path), progress=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return url_of(path)


def foreign(path):
    optuna.create_study(study_name="hf_elastic", storage=url_of(path)).optimize(lambda t: t.suggest_int("x", 0, 1), 1)
    return url_of(path)


def other_tables(path):
    with sqlite3.connect(path) as connection:
        connection.execute("create table hf_elastic_claims (something integer)")
    return url_of(path)


@pytest.mark.parametrize(
    "make",
    [
        corrupt,
        truncated,
        foreign,
        other_tables,
        lambda path: url_of(path.parent / "missing" / "s.db"),
        str,
        lambda path: "sqlite://",
        lambda path: "nosuchdatabase://host/name",
        lambda path: "postgresql+nosuchdriver://user:secret@host/name",
        lambda path: path,
    ],
)
def test_an_unusable_storage_is_one_line_before_anything_is_evaluated(tmp_path, make):
    space, objectives = widths_problem(layers=5)
    storage = make(tmp_path / "s.db")

    def never(architecture):
        raise AssertionError("evaluated")

    with pytest.raises(StorageError) as caught:
        search_subnets(space, [Objective("loss", never), objectives[1]], evaluations=5, storage=storage, progress=False)
    message = str(caught.value)
    assert "\n" not in message and "secret" not in message and len(message) < 500


def test_a_claim_that_is_handed_back_keeps_its_slot(tmp_path):
    storage = optuna.storages.RDBStorage(url_of(tmp_path / "s.db"))
    claims = ClaimTable(storage.engine, 1, lease_seconds=60.0)
    assert [claims.insert(str(i), "{}", budget=3) for i in range(4)] == [True, True, True, False]
    claims.hand_back("1")
    assert [(one.digest, one.handed_back, one.expired) for one in claims.open_claims()] == [
        ("0", False, False),
        ("1", True, True),
        ("2", False, False),
    ]
    other = ClaimTable(storage.engine, 1, lease_seconds=60.0)
    assert other.take_over(claims.open_claims()[1], "{}") and not claims.is_mine("1")
    claims.mark_done("0")
    assert claims.count() == 3 and not claims.insert("5", "{}", budget=3)
    assert claims.slots() == {"0": 0, "1": 1, "2": 2}


def test_a_server_without_a_free_connection_is_asked_again_and_a_signal_ends_that(tmp_path, monkeypatch):
    space, objectives = widths_problem(layers=5)
    options = {"evaluations": 5, "storage": url_of(tmp_path / "s.db"), "progress": False}
    opened, calls = storage_module._open_database, []

    def crowded(url):
        calls.append(url)
        if len(calls) <= 3:
            raise OperationalError("connect", {}, Exception("FATAL:  sorry, too many clients already"))
        return opened(url)

    monkeypatch.setattr(storage_module, "_open_database", crowded)
    assert len(search_subnets(space, objectives, **options).evaluations) == 5 and len(calls) == 4
    monkeypatch.setattr(storage_module, "_open_database", lambda url: crowded(calls.clear()))
    alarm = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM])
    alarm.start()
    with pytest.raises(SystemExit):
        search_subnets(space, objectives, **options)
    alarm.join()


def test_stored_values_and_architectures_are_readable_with_optuna(tmp_path):
    space, objectives = widths_problem(layers=2)
    result = search_subnets(space, objectives, evaluations=6, storage=url_of(tmp_path / "s.db"), progress=False)
    study = optuna.load_study(study_name="hf_elastic", storage=url_of(tmp_path / "s.db"))
    for trial, evaluation in zip(study.trials, result.evaluations, strict=True):
        assert trial.values == [evaluation.values["loss"], evaluation.values["parameters"]]
        assert trial.user_attrs["hf_elastic:architecture"] == dict(evaluation.architecture)
