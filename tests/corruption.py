"""What random damage and hostile content do to a reader: for the tests of everything that reads."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

NUM_CORRUPTIONS = 200
_RUNS_SOMETHING = ("os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn")
_watched: list[list[str]] = []

Errors = type[BaseException] | tuple[type[BaseException], ...]


def corrupt(content: bytes, seed: int) -> bytes:
    """Content with a few of its bytes changed, cut off, removed, repeated or made up."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not data:
            break
        start = rng.randrange(len(data))
        end = start + rng.choice([1, 2, 4, 16])
        kind = rng.choice(["change", "flip", "digits", "remove", "repeat", "cut"])
        if kind == "change":
            data[start:end] = rng.randbytes(len(data[start:end]))
        elif kind == "flip":
            data[start] ^= 1 << rng.randrange(8)
        elif kind == "digits":
            data[start:end] = b"9" * len(data[start:end])
        elif kind == "remove":
            del data[start:end]
        elif kind == "repeat":
            data[end:end] = data[start:end] * rng.choice([1, 50])
        elif rng.random() < 0.3 and start > 0:
            del data[start:]
    return bytes(data)


def read_corrupted(
    content: bytes, path: Path, read: Callable[[Path], object], error: Errors
) -> int:
    """
    Read 200 corruptions of a file, none of which may run anything or end in an error but those
    given, with a message that names the file.

    Returns:
        How many were refused; damage may leave a file that is sound.
    """
    num_refused = 0
    for seed in range(NUM_CORRUPTIONS):
        path.write_bytes(corrupt(content, seed))
        with nothing_is_run():
            message = _refusal(read, path, error)
        assert message is None or str(path) in message, (seed, message)
        num_refused += message is not None
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    return num_refused


def _refusal(read: Callable[[Path], object], path: Path, error: Errors) -> str | None:
    try:
        read(path)
    except error as refusal:
        return str(refusal)
    return None


@contextmanager
def nothing_is_run():
    """Fails if a program is started, a tree of files changed, or anything connected to."""
    if not _watched:
        sys.addaudithook(_audit)  # for good: Python has no way to take one away
        _watched.append([])
    _watched[0] = events = []
    yield
    _watched[0] = []
    assert not events, events


def _audit(event: str, args: tuple) -> None:
    if event.startswith((*_RUNS_SOMETHING, "subprocess.", "shutil.", "socket.connect")):
        _watched[0].append(f"{event}{args}")
