"""``metrics.json`` of a run that goes on from a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nl_detectron.files import whole_file

logger = logging.getLogger(__name__)


class MetricsFile:
    """
    What Detectron2's ``JSONWriter`` writes, which has the file open all the time.

    Attributes:
        size: of the file, when it was looked at last.
        written: the highest iteration of the lines that this run has written; -1 if none.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the file; it need not exist.
        """
        self._path = path
        self.size = 0
        self.written = -1

    def look(self, *, is_ours: bool = True) -> None:
        """Notice what was added since the last look, by this run or before it."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self.size and is_ours:
            with self._path.open("rb") as file:
                file.seek(self.size)
                lines = list(_lines(file.read()))
            new = [line.iteration for line in lines if line.iteration is not None]
            self.written = max([self.written, *new])
        self.size = size

    def set_aside(self) -> None:
        """Copy all that is there to ``metrics.old.json``, and begin anew."""
        if self._path.exists() and self._path.stat().st_size:
            with whole_file(self._path.with_name("metrics.old.json")) as draft:
                shutil.copyfile(self._path, draft)
            self._overwrite(b"")

    def go_back(self, size: int, written: int) -> None:
        """
        Remove what was written later, and what is damaged, with a warning.

        Args:
            size: :attr:`size` when the checkpoint was written.
            written: :attr:`written` then; checkpoints of earlier versions do not know: -1.
        """
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = list(_lines(content))
        sound = [(line.iteration, line) for line in lines if line.iteration is not None]
        # By the iteration, which damage does not move, if this run had written anything.
        while sound and (sound[-1][0] > written if written >= 0 else sound[-1][1].start >= size):
            sound.pop()
        iterations = [iteration for iteration, _ in sound]
        problems = []
        if damaged := [line.number for line in lines if line.iteration is None]:
            others = f" and {len(damaged) - 1} more are" if len(damaged) > 1 else " is"
            problems.append(f"line {damaged[0]}{others} left out, as no metrics can be read there")
        if written not in (-1, *iterations):
            problems.append(f"the lines up to iteration {written} are gone")
        if problems:
            logger.warning(f"{self._path} is damaged: {'; '.join(problems)}")
        kept = b"".join(line.text + b"\n" for _, line in sound)
        if kept != content:
            self._overwrite(kept)
        self.written = written if written >= 0 else max(iterations, default=-1)

    def _overwrite(self, content: bytes) -> None:
        """In place, because a writer has the file open, and onto the disk."""
        with self._path.open("r+b") as file:
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


class _Line(NamedTuple):
    number: int  # from 1
    start: int  # its first byte in the file
    text: bytes
    iteration: int | None  # None if it is damaged


def _lines(content: bytes) -> Iterator[_Line]:
    start = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        text = line.rstrip(b"\r\n")
        yield _Line(number, start, text, _iteration_of(text))
        start += len(line)


def _iteration_of(line: bytes) -> int | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    iteration = record.get("iteration") if isinstance(record, dict) else None
    return iteration if type(iteration) is int else None
