"""Commands whose code is elsewhere: from any folder, as any Python runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize("name", ["analyze", "compare_runs", "quick_start", "study"])
def test_commands_run_from_any_folder(name, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(tmp_path)
    (tmp_path / "nl_detectron").symlink_to(TOOLS.parent / "nl_detectron")  # as if installed
    command = [sys.executable, str(TOOLS / f"{name}.py"), "--no-such-option"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{name}.py: error: ")
