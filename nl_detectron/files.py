"""Files that appear whole or not at all, and folders that one process uses at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_DRAFT = "draft"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file so that it appears whole or not at all, whatever happens meanwhile; until then,
    and after any error, what was there before stays.

    Args:
        path: the file; its folder exists.

    Yields:
        A path beside it to write to. At the end of the ``with`` its content is on the disk, and it
        takes the name.
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
    Within the ``with``, no other process may be in a ``with`` of the same folder. The lock ends
    with the process, however that ends.

    Args:
        folder: it exists.
        what: what uses it, for the message, such as "study".

    Raises:
        ValueError: one is.
    """
    with (folder / ".lock").open("w") as lock:
        # A child, such as a loader's worker that outlives this process, must not hold it.
        os.register_at_fork(after_in_child=lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is where another {what} is running now") from None
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
