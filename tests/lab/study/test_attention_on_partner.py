from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import attention_on_partner
import even_attention  # noqa: F401  its block is registered
from nl_detectron import model_zoo
from nl_detectron.data.toy import make_long_range_match, register_long_range_match
from nl_detectron.modeling import nonlocal_blocks


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("long_range_match")
    make_long_range_match(root / "far", "far", num_train=1, num_val=3)
    register_long_range_match(root)
    yield
    register_long_range_match()


def predictor_with(*overrides):
    """Of a model with random weights."""
    cfg = model_zoo.get_config("long_range_match")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    torch.manual_seed(0)
    return SimpleNamespace(cfg=cfg, model=build_model(cfg), aug=None, input_format="BGR")


def measure(predictor):
    return attention_on_partner.measure(predictor, "long_range_match_val", 3)


def test_even_attention_has_an_even_share():
    (numbers,) = measure(predictor_with("MODEL.NONLOCAL.BLOCK", "EvenAttention")).values()
    assert numbers["entropy"] == pytest.approx([1])
    assert numbers["bright"] + numbers["dark"] == pytest.approx([4 / 128] * 6)
    assert numbers["even"] == pytest.approx([4 / 128] * 12)


def test_planted_attention_is_found():
    """All weight on the upper row's half of the far end's two columns of places."""
    predictor = predictor_with()
    (block,) = nonlocal_blocks(predictor.model).values()

    def planted(x, positions):
        weights = torch.zeros(1, len(positions), *x.shape[2:])
        weights[..., :2, :4] = weights[..., :2, -4:] = 1 / 16  # two discs on either end
        return weights

    block.attention = planted
    (numbers,) = measure(predictor).values()
    shares = numbers["bright"] + numbers["dark"]
    assert len(shares) == 6
    assert set(np.round(shares, 3)) == {0, 0.25}
    for share, added in zip(shares, numbers["adds, bright"] + numbers["adds, dark"]):
        assert 0.1 < added < 0.3 if share else added < 0.03


def test_models_without_attention_have_nothing_to_measure():
    assert measure(predictor_with("MODEL.NONLOCAL.BLOCK", "LocalBlock")) == {}
