"""``hf-elastic push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
import pytest
import typer
from typer.testing import CliRunner

from hf_elastic import CheckpointError
from hf_elastic.hub.command import push_command
from hf_elastic.hub.readme import MARKER


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.remote(tmp_path_factory.mktemp("export") / "small")


def run(*arguments: object) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(push_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_dry_run_shows_files_sizes_and_the_card_and_pushes_nothing(hub: Any, small: Path) -> None:
    ended = run(small, "tester/small", "--dry-run", "--license", "mit")
    assert ended.exit_code == 0 and MARKER in ended.output and "license: mit" in ended.output
    assert all(file.name in ended.output for file in small.iterdir())
    assert f"{(small / 'model.safetensors').stat().st_size:,} bytes" in ended.output
    assert hub.repositories == {} and not hub.asked("POST")


def test_a_dry_run_needs_no_token_and_no_network(hub: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(small, "tester/small", "--dry-run").exit_code == 0 and hub.requests == []


def test_a_push_says_what_was_pushed_where(hub: Any, small: Path) -> None:
    ended = run(small, "tester/small", "--private", "--message", "Mine", "--revision", "v1", "--license", "mit")
    repository = hub.repositories["tester/small"]
    assert ended.exit_code == 0 and ended.stdout.startswith("tester/small: ") and repository.private
    assert repository.history("v1") == ["Mine", "initial commit"] and repository.branches["v1"] in ended.output
    assert "note: there is no tokenizer beside the weights" in ended.output


def test_errors_are_raised_for_the_command_line_to_show(hub: Any, small: Path) -> None:
    ended = run(small, "not a name")
    assert isinstance(ended.exception, CheckpointError) and hub.requests == []
