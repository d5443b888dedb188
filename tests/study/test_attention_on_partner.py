from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import attention_on_partner
from nl_detectron import model_zoo
from nl_detectron.analysis.attention_map import AttentionMap
from nl_detectron.data import make_long_range_match, register_long_range_match
from nl_detectron.data.long_range_match import default_long_range_match_root
from nl_detectron.modeling import nonlocal_blocks
from nl_detectron.study.plan import load_plan


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("long_range_match")
    make_long_range_match(root / "far", "far", num_train=1, num_val=3)
    register_long_range_match(root)
    yield
    register_long_range_match(default_long_range_match_root())


def model_with(*overrides):
    cfg = model_zoo.get_config("long_range_match")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    torch.manual_seed(0)
    return build_model(cfg)


def measure(model):
    return attention_on_partner.measure(model, "long_range_match_val", 3)


def test_keys_of_a_disc():
    attention = AttentionMap(
        np.zeros((4, 32), np.float32), (0, 0, 256, 32), query=(0, 0, 8, 8), outside=0, keys=128
    )
    found = attention_on_partner.keys_of((231, 8.5, 7.5), attention)
    assert np.argwhere(found).tolist() == [[0, 28], [0, 29], [1, 28], [1, 29]]
    # A grid so coarse that no centre is in the disc: the nearest key.
    coarse = AttentionMap(
        np.zeros((1, 8), np.float32), (0, 0, 256, 32), query=(0, 0, 32, 32), outside=0, keys=8
    )
    assert np.argwhere(attention_on_partner.keys_of((231, 5, 7.5), coarse)).tolist() == [[0, 7]]


def test_even_attention_has_an_even_share():
    model = model_with("MODEL.NONLOCAL.PAIRWISE", "embedded_gaussian")
    (block,) = nonlocal_blocks(model).values()
    torch.nn.init.zeros_(block.theta.weight)
    (numbers,) = measure(model).values()
    assert numbers["entropy"] == pytest.approx([1])
    assert numbers["bright"] + numbers["dark"] == pytest.approx([4 / 128] * 6)
    assert numbers["even"] == pytest.approx([4 / 128] * 12)


def test_planted_attention_is_found():
    """All weight on the upper row's half of the far end's two columns of places."""
    model = model_with()
    (block,) = nonlocal_blocks(model).values()

    def planted(x, positions):
        weights = torch.zeros(1, len(positions), *x.shape[2:])
        weights[..., :2, :4] = weights[..., :2, -4:] = 1 / 16  # two discs on either end
        return weights

    block.attention = planted
    (numbers,) = measure(model).values()
    shares = numbers["bright"] + numbers["dark"]
    assert len(shares) == 6
    assert set(np.round(shares, 3)) == {0, 0.25}
    for share, added in zip(shares, numbers["adds, bright"] + numbers["adds, dark"]):
        assert 0.1 < added < 0.3 if share else added < 0.03


def test_models_without_attention_have_nothing_to_measure():
    assert measure(model_with("MODEL.NONLOCAL.BLOCK", "LocalBlock")) == {}


def test_every_setting_of_the_study_fits_the_config():
    plan = load_plan(Path(attention_on_partner.__file__).with_name("long_range_match.yaml"))
    assert len(plan.part(seeds=[1]).runs(Path("unused"))) == len(plan.settings)
    assert {name for names in plan.groups.values() for name in names} == set(plan.settings)
