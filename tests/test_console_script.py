"""The console script lists the commands by itself, without loading torch, and what it says of them is true."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import hf_elastic_cli
from hf_elastic.cli import app


def run_without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the console script in a process where importing torch or transformers is an error."""
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, hf_elastic=None); import hf_elastic_cli; "
        f"sys.argv = ['hf-elastic', *{list(arguments)!r}]; hf_elastic_cli.main()"
    )
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_help_lists_every_command_without_loading_anything() -> None:
    found = run_without_torch("--help")
    assert found.returncode == 0 and found.stdout == hf_elastic_cli.overview() + "\n"
    assert all(f"  {command.name} " in found.stdout for command in app.registered_commands)


def test_without_a_command_the_list_is_printed_and_the_status_says_that_something_is_missing() -> None:
    found = run_without_torch()
    assert found.returncode == 2 and "Commands:" in found.stdout


def test_a_command_loads_the_package() -> None:
    assert run_without_torch("info", "nowhere").returncode != 0


def test_the_list_is_that_of_the_application_in_its_words_and_order() -> None:
    told = {
        command.name: " ".join((inspect.getdoc(command.callback) or "").split("\n\n")[0].split())
        for command in app.registered_commands
        if command.callback is not None
    }
    assert list(hf_elastic_cli.COMMANDS.items()) == list(told.items())


def test_the_entry_point_is_the_light_module() -> None:
    (script,) = entry_points(group="console_scripts", name="hf-elastic")
    assert script.value == "hf_elastic_cli:main"


@pytest.mark.parametrize("command", hf_elastic_cli.COMMANDS)
def test_the_help_of_a_command_says_how_it_is_used(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app([command, "--help"])
    assert ended.value.code == 0 and command in capsys.readouterr().out
