import sys
from pathlib import Path

import pytest

from lab.study.plan import StudyPlan

HERE = Path(__file__).resolve().parent
FAKE_TRAIN = [sys.executable, str(HERE / "fake_train.py")]


class Study:
    """A study of two settings and two seeds in a temporary folder; its training is not real."""

    train = FAKE_TRAIN

    def __init__(self, output):
        self.output = output
        self.plan = StudyPlan(
            HERE.parents[2] / "configs" / "quick_start.yaml",
            seeds=[1, 2],
            settings={"nl": {}, "baseline": {"MODEL.NONLOCAL.REDUCTION": 4}},
            groups={"All": ["baseline", "nl"], "One": ["nl"]},
        )
        self.runs = self.plan.runs(output)
        self.behave()

    def behave(self, *words):
        (self.output / "behaviour").write_text(" ".join(words))

    def starts(self):
        """Folder to a line for each start of its run."""
        return {
            path.parent.relative_to(self.output).as_posix(): path.read_text().splitlines()
            for path in self.output.glob("*/*/starts")
        }


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)
