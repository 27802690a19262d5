"""``hf-elastic worker``: what it takes, what it prints, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hf_elastic.errors import CheckpointError, ElasticError, SearchError, StorageError
from hf_elastic.search import SearchResult, search_subnets
from hf_elastic.workers import WorkerOptions, problem_of, work
from hf_elastic.workers.command import worker_command
from tests.workers.searching import BARE_PACKAGE, ROOT, evaluated, problem, wait_for

PROBLEM = "tests.workers.searching:problem"


def run(*arguments: str) -> str:
    """Run the command in this process and return what it prints."""
    app = typer.Typer()
    app.command()(worker_command)
    ended = CliRunner().invoke(app, list(arguments))
    if isinstance(ended.exception, ElasticError):
        raise ended.exception
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_a_worker_ends_with_the_result_of_search_subnets_and_its_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    url, kept = f"sqlite:///{tmp_path / 's.db'}", tmp_path / "result.json"
    options = ["--storage", url, "--evaluations", "9", "--seed", "3", "--within", "parameters=0.7"]
    printed = run(PROBLEM, *options, "--result", str(kept))
    alone = search_subnets(*problem(), evaluations=9, seed=3, within={"parameters": 0.7}, progress=False)
    assert SearchResult.load(kept) == alone
    assert "9 evaluated, 0 failed; 9 of them here" in printed
    assert printed.count(": loss ") == 9 and repr(alone.front[0].architecture) in printed
    assert "0 of them here" in run(PROBLEM, *options)


def test_what_is_wrong_is_said_in_words_of_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    url = f"sqlite:///{tmp_path / 's.db'}"
    run(PROBLEM, "--storage", url, "--evaluations", "5")
    with pytest.raises(StorageError, match=r"pass another --name or --storage"):
        run(PROBLEM, "--storage", url, "--evaluations", "5", "--seed", "1")
    with pytest.raises(SearchError, match="--evaluations 2 are fewer"):
        run(PROBLEM, "--storage", url, "--evaluations", "2", "--name", "other")
    with pytest.raises(SearchError, match="--timeout -1.0 is not a positive number"):
        run(PROBLEM, "--storage", url, "--timeout", "-1")
    with pytest.raises(SearchError, match="processes=-1"):
        work(WorkerOptions(PROBLEM, url, processes=-1))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", "neither a run folder nor module:function"),
        ("no.such.module:problem", "No module named 'no'"),
        ("tests.workers.searching:nothing", "has no attribute 'nothing'"),
        ("tests.workers.searching:STEPS", "has no attribute"),
        ("tests.workers.searching:ROOT", "not a function"),
        ("tests.workers.searching:objectives", r"not \(space, objectives\)"),
        ("a b:c", "neither a run folder"),
    ],
)
def test_a_source_that_is_no_problem_is_named(source: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SearchError, match=words) as caught:
        problem_of(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def make():\n    raise OSError('no weights\\nhere')",
            r"mine:make raised OSError: no weights \(mine.py, line 2\)",
        ),
        ("def make(:", r"mine:make cannot be imported: SyntaxError: .*mine.py, line 1"),
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(mine.py, line 1\)"),
    ],
)
def test_what_a_module_of_the_user_raises_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(SearchError, match=words) as caught:
        problem_of("mine:make")
    assert "\n" not in str(caught.value)
    sys.modules.pop("mine", None)
    sys.path.remove(str(tmp_path))


def test_a_result_that_cannot_be_written_is_said_before_anything_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    for place, words in ((tmp_path, "it is a folder"), (tmp_path / "file/front.json", "is no folder")):
        with pytest.raises(CheckpointError, match=words):
            run(PROBLEM, "--storage", f"sqlite:///{tmp_path / 's.db'}", "--result", str(place))
    assert not (tmp_path / "s.db").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ElasticError, match="is no run"):
        problem_of(str(tmp_path))


@pytest.mark.slow
def test_a_preempted_worker_exits_with_143_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    module = tmp_path / "mine.py"
    module.write_text(
        "from functools import partial\nfrom tests.workers.searching import logged, problem\n"
        f"def make():\n    return problem()[0], logged({str(log)!r}, until={str(tmp_path / 'never')!r})\n"
    )
    code = f"{BARE_PACKAGE} package.__path__ = [{str(ROOT / 'hf_elastic')!r}]; "
    code += "import typer; from hf_elastic.workers.command import worker_command; typer.run(worker_command)"
    command = [sys.executable, "-c", code, "mine:make", "--storage", f"sqlite:///{tmp_path / 's.db'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: evaluated(log))
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM; the evaluation was handed back" in process.communicate(timeout=60)[1]
    assert process.returncode == 143


def test_the_module_of_the_command_needs_no_torch() -> None:
    text = (ROOT / "hf_elastic/workers/command.py").read_text() + (ROOT / "hf_elastic/workers/worker.py").read_text()
    assert "import torch" not in text and "import transformers" not in text
