"""The commands say what they wrote; importing them loads no tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints
import typer
from recorded_runs import compress_run
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_elastic import ElasticConfig, export, make_elastic
from hf_elastic.reporting.command import report_command, try_command


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("report")(report_command)
    app.command("try")(try_command)
    return app


def test_report_names_the_page_and_its_size(app: typer.Typer, tmp_path: Path) -> None:
    run = compress_run(tmp_path / "out.run")
    said = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "page.html")])
    assert said.exit_code == 0 and (tmp_path / "page.html").is_file()
    assert said.stdout.startswith(f"{tmp_path / 'page.html'} (") and " MB)" in said.stdout


def test_try_takes_a_pair_of_sentences(app: typer.Typer, tmp_path: Path) -> None:
    parent = tiny_checkpoints.sentence_encoder(tmp_path / "parent")
    supernet = make_elastic(AutoModel.from_pretrained(parent), ElasticConfig(intermediate_size=[0.5, 1.0]))
    export(supernet, supernet.space.smallest(), tmp_path / "child", loadability="remote-code")
    pair = ["The cat sleeps.", "The dog runs."]
    said = CliRunner().invoke(app, ["try", str(tmp_path / "child"), "--pair", *pair])
    assert said.exit_code == 0, said.output
    assert all(repr(text) in said.stdout for text in pair) and said.stdout.count("  cosine ") == 2


def test_try_gives_a_classifier_two_texts_together(app: typer.Typer, tmp_path: Path) -> None:
    parent = tiny_checkpoints.classifier(tmp_path / "parent")
    made = AutoModelForSequenceClassification.from_pretrained(parent)
    supernet = make_elastic(made, ElasticConfig(intermediate_size=[0.5, 1.0]))
    export(supernet, supernet.space.smallest(), tmp_path / "child")
    said = CliRunner().invoke(app, ["try", str(tmp_path / "child"), "--prompt", "one", "--pair", "two", "three"])
    assert said.exit_code == 0, said.output
    assert said.stdout.count("  parent ") == 2 and "\n'two'\n'three'\n  parent " in said.stdout


def test_reporting_itself_needs_no_torch() -> None:
    """The package registers model types, for which it loads torch; here that is kept away."""
    code = (
        "import sys, types; package = types.ModuleType('hf_elastic'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['hf_elastic'] = package\n"
        "import hf_elastic.reporting.command, hf_elastic.reporting.writing\n"
        "assert 'torch' not in sys.modules and 'plotly' not in sys.modules, 'loaded'"
    )
    folder = Path(sys.modules["hf_elastic"].__file__ or "").parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
