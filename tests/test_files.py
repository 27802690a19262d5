"""Files and folders that are written whole or not at all, whatever fails on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import disk_full_at

from hf_elastic import CheckpointError, DataError, SpaceError
from hf_elastic.files import (
    file_digest,
    given_path,
    only_worker,
    read_json,
    remove_folder,
    remove_half_written,
    whole_files,
    whole_folder,
    write_json,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(b"x" * 5000)


# -- one process at a time ---------------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys
from pathlib import Path
from hf_elastic.files import only_worker
with only_worker(Path(sys.argv[1])):
    print("working", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_has_one_worker_until_that_ends_or_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", WORKER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdin is not None
        assert worker.stdout.readline() == "working\n"
        with pytest.raises(CheckpointError, match=f"another process is at work in {folder}"), only_worker(folder):
            pass
        worker.stdin.close()
    assert worker.returncode < 0
    for _ in range(2):
        with only_worker(folder):
            pass


def test_a_failure_that_wrote_nothing_leaves_no_folder_and_one_that_did_leaves_its_work(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with pytest.raises(SpaceError), only_worker(folder):
        raise SpaceError("no")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(SpaceError), only_worker(folder):
        (folder / "work").write_text("")
        raise SpaceError("no")
    assert {file.name for file in folder.iterdir()} == {".lock", "work"}
    with pytest.raises(SpaceError), only_worker(folder):
        raise SpaceError("no")
    assert (folder / "work").is_file()


def test_where_nothing_can_be_locked_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("hf_elastic.files.FileLock.acquire", refused)
    with only_worker(tmp_path / "run"):
        pass
    assert "cannot be locked here" in caplog.text


def test_what_a_killed_export_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a[b]"
    for name in (".a[b].12345678.partial", ".ab.12345678.partial", ".a[b].backup", "a[b]", "other"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name)
    (tmp_path / ".a[b].abcdefgh.partial").write_text("")
    remove_half_written(target)
    assert {path.name for path in tmp_path.iterdir()} == {".ab.12345678.partial", "a[b]", "other", ".a[b].backup"}
    remove_half_written(tmp_path / "never" / "made")


def test_a_folder_that_a_kill_caught_on_its_way_out_is_given_back(tmp_path: Path) -> None:
    old = tmp_path / ".a.12345678.replaced" / "old"
    old.mkdir(parents=True)
    fill(old)
    remove_half_written(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert any((tmp_path / "a").iterdir())


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to "), only_worker(tmp_path / "file" / "run"):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_elastic import files
target, at = Path(sys.argv[1]), sys.argv[2]
class Killed(dict):
    def items(self):
        os.kill(os.getpid(), signal.SIGKILL)
replace, calls = os.replace, []
def killing(source, to):
    calls.append(to)
    if at == f"rename {len(calls)}":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, to)
os.replace = killing
if at == "json":
    files.write_json(target, {"old": 1, "new": Killed(a=1)})
with files.whole_folder(target, overwrite=True) as folder:
    (folder / "half").write_text("")
    if at == "wait":
        print("writing", flush=True)
        sys.stdin.read()
    if at == "block":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("at", ["block", "rename 1", "rename 2", "json"])
def test_what_a_killed_process_left_is_removed_by_whoever_writes_next_and_what_it_replaced_is_back(
    at: str, tmp_path: Path
) -> None:
    target, other = tmp_path / "out", tmp_path / ".out.of-users.partial"
    other.mkdir()
    if at != "json":
        target.mkdir()
        (target / "old").write_text("precious")
    command = [sys.executable, "-c", KILLED, str(target), at]
    killed = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(os.listdir(tmp_path)) == {"block": 3, "rename 1": 4, "rename 2": 3, "json": 2}[at]
    assert target.exists() == (at not in ("rename 2", "json"))
    if at == "json":
        write_json(target, {"new": 1})
        assert read_json(target) == {"new": 1}
    else:
        with pytest.raises(SpaceError), whole_folder(target, overwrite=True):
            raise SpaceError("no")
        assert contents(tmp_path) == {"out/old": b"precious"}
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "out"])


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == "writing\n"
        with whole_folder(tmp_path / "out") as aside:
            fill(aside)
        writer.stdin.close()
    assert writer.returncode == 0
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["half"]


def test_files_of_others_are_moved_in_whole_and_none_where_one_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with whole_files(tmp_path) as aside:
        (aside / "a.json").write_text("new")
        (aside / "b.js").write_text("x")
        assert (tmp_path / "a.json").read_text() == "old"
    assert contents(tmp_path) == {"a.json": b"new", "b.js": b"x"} and len(os.listdir(tmp_path)) == 2
    before = contents(tmp_path)
    for size in (0, 100):
        with (
            pytest.raises(CheckpointError, match="cannot write .*File too large") as caught,
            disk_full_at(size),
            whole_files(tmp_path) as aside,
        ):
            (aside / "a.json").write_text("newer" * 10 if size else "")
            (aside / "b.js").write_text("x" * 1000)
        assert "\n" not in str(caught.value) and contents(tmp_path) == before and len(os.listdir(tmp_path)) == 2
    with pytest.raises(CheckpointError, match="cannot write"), whole_files(tmp_path / "a.json"):
        pass


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fill(folder)
    seen: list[dict[str, bytes]] = []
    unlink = os.unlink

    def watched(path: Any, **kwargs: Any) -> None:
        seen.append(contents(folder))
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "unlink", watched)
    remove_folder(folder)
    assert seen == [{}, {}] and os.listdir(tmp_path) == []
    remove_folder(folder)


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json_is_written_readable_and_replaces_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    for data in ({"a": 1}, {"b": [1.5, None, "ü"]}):
        write_json(file, data)
        assert read_json(file) == data
    assert stat.S_IMODE(file.stat().st_mode) == 0o644 and os.listdir(file.parent) == ["a.json"]


@pytest.mark.parametrize("data", [{"x": float("nan")}, {"x": object()}])
def test_what_json_cannot_say_leaves_the_old_file_and_nothing_else(data: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with disk_full_at(100), pytest.raises(CheckpointError, match=r"cannot write .*a.json: File too large"):
        write_json(tmp_path / "a.json", {"long": "x" * 1000})
    assert read_json(tmp_path / "a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is no JSON file.*truncated or foreign"),
        (b'{"a": ', "is no JSON file"),
        (b"\x80\x81", "is no JSON file"),
        (b"[1, 2]", "holds a JSON list, expected an object"),
        (b"[" * 100_000, "is no JSON file"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(file)
    assert "record.json" in str(caught.value) and "\n" not in str(caught.value)


def test_json_cannot_replace_a_folder_or_go_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "a.json"):
        with pytest.raises(CheckpointError, match="cannot write"):
            write_json(path, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_appears_only_at_the_end_of_the_block(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    if exists:
        target.mkdir(parents=True)
    with whole_folder(target) as aside:
        fill(aside)
        assert aside.parent == target.parent and (not target.exists() or not any(target.iterdir()))
    assert set(contents(target)) == {"config.json", "sub/weights"} and os.listdir(tmp_path / "a") == ["b"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_an_old_folder_is_replaced_whole_on_request(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with whole_folder(target, overwrite=True) as aside:
        fill(aside)
        assert os.listdir(target) == ["old"]
    assert set(contents(target)) == {"config.json", "sub/weights"} and os.listdir(tmp_path) == ["out"]


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("error", [SpaceError("wrong"), RuntimeError("wrong"), Interrupt("wrong")])
@pytest.mark.parametrize("old", [True, False])
def test_an_error_inside_goes_through_unchanged_and_leaves_everything_as_it_was(
    error: BaseException, old: bool, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "out"
    if old:
        target.mkdir(parents=True)
        fill(target)
    before = contents(tmp_path)
    with pytest.raises(type(error), match="wrong") as caught, whole_folder(target, overwrite=True) as aside:
        (aside / "half").touch()
        raise error
    assert caught.value is error and contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["deep"] if old else [])


@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_is_one_line_and_leaves_everything_as_it_was(old: bool, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    if old:
        target.mkdir(parents=True)
        (target / "old").write_text("precious")
    before = contents(tmp_path)
    writers: list[Callable[[Path], object]] = [
        lambda folder: (folder / "a").write_bytes(b"x" * 10_000),
        lambda folder: save_file({"x": torch.ones(10_000)}, folder / "model.safetensors"),
        lambda folder: write_json(folder / "a.json", {"x": "y" * 10_000}),
    ]
    for write in writers:
        with (
            pytest.raises(CheckpointError, match="cannot write .*[Ff]ile too large") as caught,
            disk_full_at(4000),
            whole_folder(target, overwrite=True) as aside,
        ):
            write(aside)
        assert "\n" not in str(caught.value) and contents(tmp_path) == before
        assert os.listdir(tmp_path) == (["deep"] if old else [])


def failing(monkeypatch: pytest.MonkeyPatch, *, call: int) -> None:
    """Lets the given call of os.replace fail, counted from the first."""
    original, calls = os.replace, iter(range(100))

    def replace(source: Any, target: Any) -> None:
        if next(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("call", [0, 1])
def test_the_old_folder_is_back_when_the_last_rename_fails(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("precious")
    failing(monkeypatch, call=call)
    with (
        pytest.raises(CheckpointError, match="cannot write .*Input/output error"),
        whole_folder(target, overwrite=True) as aside,
    ):
        fill(aside)
    assert contents(tmp_path) == {"out/old": b"precious"} and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (root / "file").write_text("") or root / "file", "is a file, expected a folder"),
        (lambda root: (root / "file").write_text("") or root / "file" / "out", "cannot write to .*file/out"),
        (
            lambda root: (root / "full").mkdir() or (root / "full" / "x").touch() or root / "full",
            "is not empty; give another",
        ),
        (lambda root: root / ("x" * 300), "cannot write to .*File name too long"),
        (lambda root: root / "a" / ("x" * 300) / "b", "cannot write to .*File name too long"),
        (lambda root: f"{root}/a\0b", "cannot write to .*null"),
        (lambda root: "~nobody-of-this-name/out", "cannot write to ~nobody"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_the_block_runs(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    target = make(tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught, whole_folder(target):
        raise AssertionError("the block ran")
    assert "\n" not in str(caught.value) and sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with (
        pytest.raises(CheckpointError, match="cannot write to .*Permission denied"),
        whole_folder(tmp_path / "locked" / "a"),
    ):
        raise AssertionError("the block ran")


@pytest.mark.parametrize("name", ["mkdir", "exists"])
def test_a_parent_that_denies_access_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, name, deny)
    with (
        pytest.raises(CheckpointError, match="cannot write to .*Permission denied"),
        whole_folder(tmp_path / "a" / "b"),
    ):
        raise AssertionError("the block ran")


def test_no_room_for_the_temporary_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with (
        pytest.raises(CheckpointError, match="cannot write to .*Read-only file system"),
        whole_folder(tmp_path / "a" / "b"),
    ):
        raise AssertionError("the block ran")
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_folder_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    with whole_folder(tmp_path / "link") as aside:
        fill(aside)
    assert (tmp_path / "link").is_symlink() and set(contents(real)) == {"config.json", "sub/weights"}


def test_a_relative_target_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_folder("out") as aside:
        fill(aside)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**21 + 3])
def test_a_digest_is_sha256_of_the_bytes(size: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(size))
    assert file_digest(tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_a_digest_of_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="cannot read"):
            file_digest(path)


def test_json_written_is_plain_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"n": 1}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b", "embedded null byte"), ("x" * 300, "File name too long"),
        ("\ud800", "surrogates not allowed"), ("~nobody-of-that-name/x", "home"),
    ],
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_refused(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        given_path(name)
    assert "can be no file here" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match="can be no file here"):
        given_path(name, error=DataError)


def test_an_empty_name_is_refused_and_the_current_folder_has_to_be_named() -> None:
    for error in (CheckpointError, DataError):
        with pytest.raises(error, match=r"a path is empty; name a file or a folder, '\.' for the current one"):
            given_path("", error=error)
    with pytest.raises(CheckpointError, match="a path is empty"), whole_folder(""):
        pass
    assert given_path(".") == Path()


def test_a_name_that_a_file_may_have_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("x")
    assert given_path("~/file") == tmp_path / "file" and given_path(tmp_path / "missing") == tmp_path / "missing"
    assert given_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"


def test_half_a_surrogate_pair_in_a_json_is_refused_and_a_whole_one_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"name": "\\ud83d\\ude00"}')
    assert read_json(file) == {"name": "\N{GRINNING FACE}"}
    for half in ('{"name": "\\ud800"}', '{"\\uDC00": 1}', '{"a": [{"b": "\\ude00\\ud83d"}]}'):
        file.write_text(half)
        with pytest.raises(CheckpointError, match="surrogates not allowed") as caught:
            read_json(file)
        assert str(caught.value).isprintable()
