"""What the tests take for a process is one, and does not outlive its limit."""

import time

import pytest

from tests.commands import run, start_python

ENDS = {
    "normally": "print(1)",
    "status": "import sys; print(1); sys.exit(3)",
    "message": "import sys; sys.exit('why')",
    "error": "raise ValueError('why')",
    "signal": "import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGTERM)",
    "interrupt": "raise KeyboardInterrupt",
    "atexit": "import atexit; atexit.register(print, 2); print(1)",
    "thread": "import threading; threading.Timer(0.5, print, [2]).start(); print(1)",
}
ARGUMENTS = "import sys; print(sys.argv, sys.path[:2], __name__)"


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_python_does(code, tmp_path):
    compare(tmp_path, "-c", code)


@pytest.mark.parametrize("words", [["script.py"], ["-m", "script"], ["-c", ARGUMENTS]])
def test_a_fork_is_told_what_python_is(words, tmp_path):
    (tmp_path / "script.py").write_text(ARGUMENTS)
    compare(tmp_path, *words, "a", "-b")


def compare(folder, *words):
    """The same status, the same words."""
    expected, done = (start(*words, cwd=folder) for start in (start_python, run))
    assert (done.returncode, done.stdout) == (expected.returncode, expected.stdout)
    assert done.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    ("code", "seconds", "message"),
    [
        ("import time\ndef stuck(): time.sleep(60)\nstuck()", 1, r"(?s)did not end in .*in stuck"),
        ("import os, time\nif not os.fork(): time.sleep(90)", 60, "has ended, but left"),
    ],
)
def test_what_does_not_end_is_killed(code, seconds, message):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run("-c", code, seconds=seconds)
    assert time.monotonic() - start < 40
