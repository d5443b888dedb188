"""Commands whose code is elsewhere: from any folder, as any Python runs them."""

import pytest

from tests.commands import ROOT, run


@pytest.mark.parametrize("name", ["analyze", "compare_runs", "quick_start", "study"])
def test_commands_run_from_any_folder(name, tmp_path):
    (tmp_path / "nl_detectron").symlink_to(ROOT / "nl_detectron")  # as if installed
    environment = {"PYTHONPATH": str(tmp_path)}
    script = ROOT / "tools" / f"{name}.py"
    done = run(script, "--no-such-option", cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{name}.py: error: ")
