"""Files written whole or not at all."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_elastic.errors import CheckpointError


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON aside and renames it into place, so that a reader never sees half a file.

    Raises:
        CheckpointError: the file cannot be written (the old one, if any, is untouched).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        os.chmod(aside, 0o644)  # mkstemp makes it private
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


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
        CheckpointError: the file is missing, unreadable, or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
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
        _remove_empty(made)


def remove_half_written(target: Path) -> None:
    """Removes what :func:`whole_folder` left beside a folder when it was killed; nobody else may be writing there."""
    for aside in target.parent.glob(f".{glob.escape(target.name)}.*/"):
        shutil.rmtree(aside, ignore_errors=True)


def _prepared(target: str | Path, *, overwrite: bool) -> tuple[Path, list[Path]]:
    """Checks the target and makes the folders above it; returns it and what was made, innermost first."""
    made: list[Path] = []
    try:
        final = Path(target).expanduser().resolve()  # behind a link: the folder is replaced, the link stays
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
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
    try:
        os.replace(final, old / "replaced")
        os.replace(aside, final)
    except BaseException:
        if (old / "replaced").exists():
            os.replace(old / "replaced", final)
        old.rmdir()
        raise
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
