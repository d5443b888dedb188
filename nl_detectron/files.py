"""Files that appear whole or not at all, and folders that one process uses at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

_DRAFT = "draft"


def missing(path: str | Path) -> str:
    """What is wrong with a path to a file, such as "does not exist"; empty if there is one."""
    if Path(path).is_dir():
        return "is a folder, not a file"
    return "" if Path(path).is_file() else "does not exist"


def check_target(
    name: str, path: str | Path, sources: Iterable[str | Path] = (), *, overwrite: bool = False
) -> None:
    """
    Check that a file may be written, before the work for it is done. ValueError: it is one of the
    sources or a folder, or it is there and ``overwrite`` is not given.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name} is {path}, which is a folder, not a file")
    if not path.exists():
        return
    if any(Path(source).exists() and path.samefile(source) for source in sources):
        raise ValueError(f"{name} is {path}, which is the source: name another one")
    if not overwrite:
        raise ValueError(f"{name} is {path}, which exists: name another one, or add --overwrite")


def make_folder(name: str, path: str | Path) -> Path:
    """Make a folder, unless it is there; ValueError: no file can be written in it."""
    if not str(path):
        raise ValueError(f"{name} is empty, but must be a folder")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} is {path}, which is no folder that can be written to: {error.strerror}"
        ) from error
    return Path(path)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file so that it appears whole or not at all, whatever happens meanwhile: a path beside
    it, which takes its name at the end of the ``with``, when the content is on the disk. Until
    then, and after any error, what was there before stays.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{_DRAFT}")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of :func:`whole_file`. No process may be writing there."""
    for draft in folder.glob(f".*.{_DRAFT}"):
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_user(folder: Path, what: str) -> Iterator[None]:
    """
    Within the ``with``, no other process may be in a ``with`` of the same folder, even if that is
    removed and made anew (on Linux): ValueError, that another ``what`` is there. The lock ends with
    the process, however that ends.
    """
    with (folder / ".lock").open("w") as lock, socket.socket(socket.AF_UNIX) as place:
        for held in (lock, place):
            # A child, such as a loader's worker that outlives this process, must not hold it.
            os.register_at_fork(after_in_child=held.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if sys.platform == "linux":
                place.bind(_address(folder))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EADDRINUSE):
                raise
            raise ValueError(f"{folder} is where another {what} is running now") from None
        yield


def _address(folder: Path) -> str:
    """A name without a file for the place of a folder, whatever folder is there."""
    parent = folder.resolve().parent.stat()  # another container may have another of the same path
    place = f"{parent.st_dev} {parent.st_ino} {folder.resolve().name}"
    return f"\0nl_detectron {hashlib.sha256(place.encode()).hexdigest()}"


def is_used(folder: Path) -> bool:
    """Whether a process of this machine is in a ``with`` of :func:`sole_user` in a folder."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_name(folder: Path) -> str:
    """The name of a run by its folder; in a study with the setting, such as ``baseline/seed_1``."""
    folder = folder.resolve()
    is_of_study = re.fullmatch(r"seed_\d+", folder.name) is not None
    return f"{folder.parent.name}/{folder.name}" if is_of_study else folder.name
