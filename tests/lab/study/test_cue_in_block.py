from pathlib import Path

import pytest

import cue_in_block
from lab.study.plan import load_plan


@pytest.fixture(scope="module")
def runs():
    plan = load_plan(Path(cue_in_block.__file__).with_name("long_range.yaml"))
    return {run.setting: run for run in plan.part(seeds=[1]).runs(Path("unused"))}


def test_share_is_that_of_the_changed_input(runs):
    assert 0.1 < cue_in_block.cue_share(runs["nl"]) < 1
    assert cue_in_block.cue_share(runs["zero_bn"]) == 0


@pytest.mark.parametrize("setting", ["baseline", "near_nl", "blocks_2", "keypoint_nl"])
def test_only_single_blocks_and_the_far_cue_are_measured(runs, setting):
    assert cue_in_block.cue_share(runs[setting]) is None
