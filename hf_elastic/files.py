"""Files written whole or not at all.

What is written aside is locked by its process for as long as that lives. Of what a killed process left, nothing is
locked, so whoever writes the same file or folder next removes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_elastic.errors import CheckpointError, ElasticError

try:
    import fcntl
except ImportError:  # no such locks on Windows, where nothing is removed that may be in use
    fcntl = None  # type: ignore[assignment]

_ASIDE, _REPLACED = ".partial", ".replaced"  # end the names of what is being written, and of what makes room for it


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON aside and renames it into place, so that a reader never sees half a file.

    Raises:
        CheckpointError: the file cannot be written (the old one, if any, is untouched).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_half_written(path)
        aside, lock = _locked_aside(path, folder=False)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        os.chmod(aside, 0o644)  # it was made private
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def given_path(name: str | os.PathLike[str], *, error: type[ElasticError] = CheckpointError) -> Path:
    """A path as a user gives it, ``~`` read as a home; there need be nothing.

    Raises:
        ElasticError: of the class ``error``; no file can have that name, or it is empty.
    """
    _require_name(name, error=error)
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: no home for ~
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{os.fspath(name)[:200]!r} can be no file here ({reason}); check the path") from problem
    return path


def _require_name(name: str | os.PathLike[str], *, error: type[ElasticError]) -> None:
    """Refuses an empty path: Python reads it as the current folder, which an unset shell variable does not mean."""
    if not os.fspath(name):
        raise error("a path is empty; name a file or a folder, '.' for the current one")


def require_writable(path: Path) -> None:
    """Makes sure, before the work that leads to it, that a file may be written; nothing is made.

    Raises:
        CheckpointError: it is a folder, or the folder it would be in cannot be written or made.
    """
    if path.is_dir():
        raise CheckpointError(f"cannot write {path}: it is a folder; name a file")
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise CheckpointError(f"cannot write {path}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {path}: {folder} may not be written by this user")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no JSON object, or half a surrogate pair.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair would be no text that can be written or shown
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON file: {error}; it is truncated or foreign") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
logger = logging.getLogger(__name__)


@contextmanager
def only_worker(folder: Path) -> Iterator[None]:
    """Keeps other processes from working in a folder inside the block; a process that dies gives it free.

    The folder is made if it is missing, and is gone again if the block fails and has written nothing. File systems that
    cannot lock are told apart by a warning; there nothing is kept from anyone.

    Raises:
        CheckpointError: another process works there, or the folder cannot be written.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"another process is at work in {folder}; wait for it, or choose another output"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            _remove_empty(made)
            raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error
        logger.warning("%s cannot be locked here: do not start two commands on it at once", folder)
    try:
        yield
    except BaseException:
        if folder in made and [file.name for file in folder.iterdir()] == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            _remove_empty(made)
        raise
    finally:
        lock.release()


@contextmanager
def whole_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` that becomes ``target`` when the block ends without an error.

    Args:
        target: the folder to make. It may exist if it is empty.
        overwrite: whether a non-empty folder may be replaced.

    Raises:
        CheckpointError: ``target`` is a file, holds something, or cannot be written; nothing is left behind.
    """
    final, made = _prepared(target, overwrite=overwrite)
    try:
        aside, lock = _locked_aside(final, folder=True)
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(f"cannot write to {final.parent}: {error.strerror or error}") from error
    try:
        yield aside
        _swap(aside, final)
    except OSError as error:
        raise error if isinstance(error, CheckpointError) else _cannot_write(final, error) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # a full disk, by an exception of its own
            raise _cannot_write(final, error) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
        _remove_empty(made)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside another, from where each file is moved into it, whole, when the block ends well.

    For what libraries would write into its place.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    place = folder / "files"
    try:
        remove_half_written(place)
        aside, lock = _locked_aside(place, folder=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield aside
        for path in sorted(aside.iterdir()):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise error if isinstance(error, CheckpointError) else _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()


def remove_folder(folder: Path) -> None:
    """Removes a folder if it is there; whoever looks, also after a kill, sees all of it or nothing."""
    if not folder.is_dir():
        return
    with suppress(OSError):  # then it stays, as whole as it was
        aside, lock = _locked_aside(folder, folder=True)
        try:
            os.replace(folder, aside / folder.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            lock.release()


def _prepared(target: str | Path, *, overwrite: bool) -> tuple[Path, list[Path]]:
    """Checks the target and makes the folders above it; returns it and what was made, innermost first."""
    made: list[Path] = []
    try:
        _require_name(target, error=CheckpointError)
        final = Path(target).expanduser().resolve()  # behind a link: the folder is replaced, the link stays
        remove_half_written(final)
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{final} is a file, expected a folder to write to")
        if final.is_dir() and any(final.iterdir()) and not overwrite:
            raise CheckpointError(f"{final} is not empty; give another folder or overwrite=True")
        made = [folder for folder in final.parents if not folder.exists()]
        final.parent.mkdir(parents=True, exist_ok=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home for ~, or links in a circle
        _remove_empty(made)
        raise CheckpointError(f"cannot write to {target}: {getattr(error, 'strerror', None) or error}") from error
    return final, made


class _Lock:
    """A lock on a file or folder until it is released or the process ends; nothing where there are no such locks.

    Args:
        path: what to lock.
        wait: whether to wait for another process that has it.

    Attributes:
        held: whether it is locked.
    """

    def __init__(self, path: Path, *, wait: bool) -> None:
        self.held, self._handle = False, -1
        if fcntl is None:
            return
        with suppress(OSError):  # in use, gone, of another user, or on a file system without locks
            self._handle = os.open(path, os.O_RDONLY)
            fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self.held = True

    def release(self) -> None:
        """Gives it free."""
        if self._handle >= 0:
            os.close(self._handle)
        self.held, self._handle = False, -1


def _locked_aside(final: Path, *, folder: bool, end: str = _ASIDE) -> tuple[Path, _Lock]:
    """Makes an empty file or folder beside another, which nobody takes for abandoned."""
    while True:
        name = f".{final.name}."
        if folder:
            aside = Path(tempfile.mkdtemp(prefix=name, suffix=end, dir=final.parent))
        else:
            handle, made = tempfile.mkstemp(prefix=name, suffix=end, dir=final.parent)
            os.close(handle)
            aside = Path(made)
        lock = _Lock(aside, wait=True)
        if aside.exists():  # or else it was taken for abandoned before it was locked
            return aside, lock
        lock.release()


def remove_half_written(final: Path) -> None:
    """Removes what killed processes left beside a file or folder that they were writing; gives back what they replaced.

    Only what is named as this module names it, and locked by nobody.
    """
    ours = re.compile(rf"\.{re.escape(final.name)}\.\w{{8}}({re.escape(_ASIDE)}|{re.escape(_REPLACED)})")
    entries: list[str] = []
    with suppress(OSError):  # no folder, or none that this user may list
        entries = os.listdir(final.parent)
    for aside in [final.parent / name for name in entries if ours.fullmatch(name)]:
        lock = _Lock(aside, wait=False)
        if not lock.held:
            continue
        with suppress(OSError):
            if (aside / "old").exists() and aside.suffix == _REPLACED and not final.exists():
                os.replace(aside / "old", final)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        lock.release()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty: the write succeeded
            folder.rmdir()


def _cannot_write(final: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(f"cannot write {final}: {' '.join(reason.split())}; free space or give another folder")


def _swap(aside: Path, final: Path) -> None:
    os.chmod(aside, 0o755)  # mkdtemp makes it private
    if not final.is_dir():
        os.replace(aside, final)
        return
    old, lock = _locked_aside(final, folder=True, end=_REPLACED)
    try:
        os.replace(final, old / "old")
        os.replace(aside, final)
    except BaseException:
        if (old / "old").exists():
            os.replace(old / "old", final)
        old.rmdir()
        raise
    finally:
        lock.release()
    shutil.rmtree(old, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
