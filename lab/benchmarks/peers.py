"""The same blocks of other packages, with the weights of ours."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor, nn

from nl_detectron.layers import GlobalContextBlock, NonLocalBlock

Block = NonLocalBlock | GlobalContextBlock
# theta (B, N_q, d), phi (B, N_k, d), g (B, N_k, c), and for "disentangled" m (B, N_k, 1), to y
# (B, N_q, c)
Operation = Callable[..., Tensor]
# The whole block, (B, C, H, W) to the same shape, and the operation, or None if it cannot be
# taken out of the block.
Built = tuple[nn.Module, Operation | None]


def mmcv(block: Block) -> Built:
    """``NonLocal2d`` or ``ContextBlock``. ImportError, here and below: it is not installed."""
    if isinstance(block, GlobalContextBlock):
        return _context_block(block), None
    module = importlib.import_module("mmcv.cnn.bricks.non_local")
    weights, arguments = _converted(block, "mmcv", dims=2)
    theirs = getattr(module, arguments.pop("type"))(**arguments)
    theirs.load_state_dict(weights)

    def y(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        if block.pairwise == "concatenation":
            return theirs.concatenation(theta.mT.unsqueeze(3), phi.mT.unsqueeze(2)) @ g
        return getattr(theirs, block.pairwise)(theta, phi.mT) @ g

    return theirs, y


def pytorchvideo(block: NonLocalBlock) -> Built:
    """``NonLocal``, for a video of one frame."""
    module = importlib.import_module("pytorchvideo.layers.nonlocal_net")
    weights, arguments = _converted(block, "pytorchvideo", dims=3)
    theirs = module.create_nonlocal(**arguments)
    theirs.load_state_dict(weights)
    return _OneFrame(theirs), None


def timm(block: NonLocalBlock) -> Built:
    """``NonLocalAttn``."""
    module = importlib.import_module("timm.layers.non_local_attn")
    width = block.g.out_channels
    theirs = module.NonLocalAttn(block.in_channels, rd_channels=width, rd_divisor=1)
    # Its children come in the order of ours.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), block.state_dict().values())))
    theirs.scale = block.logit_scale  # it takes C^-1/2, we d^-1/2
    return theirs, None


def disentangled(block: NonLocalBlock) -> Built:
    """mmsegmentation's ``DisentangledNonLocal2d``, with our norm behind it."""
    dnl_head, _ = mmsegmentation()
    theirs = dnl_head.DisentangledNonLocal2d(
        block.in_channels, temperature=block.temperature, mode="embedded_gaussian"
    )
    for name in ("theta", "phi", "g"):
        getattr(theirs, name).conv.load_state_dict(getattr(block, name).state_dict())
    theirs.conv_mask.load_state_dict(block.get_submodule("unary").state_dict())
    theirs.conv_out = nn.Sequential(block.out, block.norm or nn.Identity())
    return theirs, None


def pyramid(block: NonLocalBlock) -> Built:
    """mmsegmentation's attention of ANN without its own norms, with our norm and sum."""
    _, ann_head = mmsegmentation()
    channels = block.in_channels
    theirs = ann_head.SelfAttentionBlock(
        low_in_channels=channels,
        high_in_channels=channels,
        channels=block.g.out_channels,
        out_channels=channels,
        share_key_query=False,
        query_scale=1,
        key_pool_scales=(1, 3, 6, 8),
        conv_cfg=None,
        norm_cfg=None,
        act_cfg=None,
    )
    theirs.query_project.conv.load_state_dict(block.get_submodule("theta").state_dict())
    theirs.key_project.conv.load_state_dict(block.get_submodule("phi").state_dict())
    theirs.value_project.load_state_dict(block.g.state_dict())
    theirs.out_project.load_state_dict(block.out.state_dict())
    return _Residual(theirs, block.norm or nn.Identity()), None


@functools.cache  # it registers itself with mmengine, which takes no second one
def mmsegmentation() -> tuple[ModuleType, ModuleType]:
    """The modules with the decode heads of DNL and ANN. Its packages, which import all there is and
    refuse recent versions of mmcv, are passed by; nothing stays in ``sys.modules``."""
    importlib.import_module("mmcv.cnn")
    spec = importlib.util.find_spec("mmseg")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'mmseg'")
    heads = "mmseg.models.decode_heads"
    contents: dict[str, dict[str, Any]] = {
        "mmseg": {},
        "mmseg.models": {},
        "mmseg.models.utils": {},
        heads: {},
        f"{heads}.fcn_head": {"FCNHead": nn.Module},
        f"{heads}.decode_head": {"BaseDecodeHead": nn.Module},
    }
    packages = {}
    for name, attributes in contents.items():
        packages[name] = ModuleType(name)
        folder = [spec.submodule_search_locations[0], *name.split(".")[1:]]
        packages[name].__dict__.update(attributes, __path__=["/".join(folder)])
    with mock.patch.dict(sys.modules, packages):
        attention = importlib.import_module("mmseg.models.utils.self_attention_block")
        packages["mmseg.models.utils"].__dict__.update(vars(attention))
        return (
            importlib.import_module(f"{heads}.dnl_head"),
            importlib.import_module(f"{heads}.ann_head"),
        )


def _context_block(block: GlobalContextBlock) -> nn.Module:
    module = importlib.import_module("mmcv.cnn.bricks.context_block")
    theirs = module.ContextBlock(block.in_channels, block.out.in_channels / block.in_channels)
    # Its children come in the order of ours; its layer norm has two dimensions more.
    weights = zip(theirs.state_dict().items(), block.state_dict().values())
    theirs.load_state_dict({name: ours.reshape(t.shape) for (name, t), ours in weights})
    return theirs


class _OneFrame(nn.Sequential):
    """A block for videos on images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2)).squeeze(2)


class _Residual(nn.Module):
    """z = x + norm(attention(x, x))."""

    def __init__(self, attention: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm = attention, norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.attention(x, x))


def _converted(
    block: NonLocalBlock, to: str, dims: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of ``block`` for another implementation, and what to build its block with."""
    from nl_detectron.weights import convert  # needs Detectron2

    result = convert(
        block.state_dict(),
        to=to,
        pairwise=block.pairwise,
        scale=block.logit_scale != 1,
        subsample=block.subsample,
        dims=dims,
    )
    return result.state_dict, next(iter(result.settings.values()))
