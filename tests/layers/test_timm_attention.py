"""timm's attention layers as blocks."""

import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg

from nl_detectron import add_nonlocal_config
from nl_detectron.layers import TIMM_ATTENTION, TimmAttention
from nl_detectron.modeling import build_block, gamma_parameters, mean_abs_gamma

pytest.importorskip("timm")


@pytest.mark.parametrize("name", TIMM_ATTENTION)
def test_starts_as_the_identity_and_learns(name):
    torch.manual_seed(0)
    try:
        block = TimmAttention(64, timm=name)
    except ValueError as error:  # an older timm has fewer of them
        pytest.skip(str(error))
    x = torch.randn(2, 64, 7, 10)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.gamma.grad.any()
    assert gamma_parameters(block) == [block.gamma]
    assert mean_abs_gamma(block) == 0
    torch.nn.init.constant_(block.gamma, 0.5)
    block.eval()
    torch.testing.assert_close(block(x), (x + block.attention(x)) / 2)
    block.zero_grad()
    block(x[:0]).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_from_the_config():
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_list(["MODEL.NONLOCAL.BLOCK", "TimmAttention", "MODEL.NONLOCAL.TIMM", "cbam"])
    assert type(build_block(cfg, 64).attention).__name__ == "CbamModule"
    cfg.MODEL.NONLOCAL.TIMM = "nl"
    with pytest.raises(
        ValueError, match=r"^MODEL.NONLOCAL.TIMM is 'nl', but must be one of 'se', "
    ):
        build_block(cfg, 64)


def test_refuses_what_timm_cannot_make():
    with pytest.raises(ValueError, match=r"timm is 'ecaa', .*did you mean 'eca'"):
        TimmAttention(64, timm="ecaa")


def test_needs_timm_only_when_it_is_asked_for():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from nl_detectron.layers import TimmAttention\n"
        "try: TimmAttention(8)\n"
        "except ImportError as error: assert 'pip install timm' in str(error), error\n"
        "else: raise SystemExit('made without timm')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
