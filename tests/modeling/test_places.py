"""Places in backbones that are not built as Detectron2 builds its ResNet: right, or refused."""

import copy
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import FPN, Backbone
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional

from nl_detectron import insert_nonlocal_blocks
from nl_detectron.modeling import nonlocal_blocks

DEFAULT = [[], [], [-2], []]
CHANNELS = 8


class Bottleneck(nn.Module):
    """A residual block that says nothing of itself."""

    def __init__(self, stride=1):
        super().__init__()
        self.conv3 = Conv2d(CHANNELS, CHANNELS, 3, stride, 1, norm=get_norm("BN", CHANNELS))
        self.shortcut = nn.MaxPool2d(1, stride)

    def forward(self, x):
        return functional.relu(self.conv3(x) + self.shortcut(x))


class Contract(CNNBlockBase):
    """One that states what Detectron2 wants to know."""

    def __init__(self, stride=1):
        super().__init__(CHANNELS, CHANNELS, stride)
        self.inner = Bottleneck(stride)

    def forward(self, x):
        return self.inner(x)


def sequential(block=Bottleneck, stride=2, kind=nn.Sequential):
    return kind(block(stride), block(), block())


class Body(Backbone):
    """A stem and four stages, which give their outputs to ``outputs``."""

    def __init__(self, outputs=(1, 2, 3, 4), block=Bottleneck, **units):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.ReLU())
        stages = {f"layer{i}": sequential(block) for i in (1, 2, 3, 4)}
        self._names = {**{"base": stem}, **stages, **units}
        for name, unit in self._names.items():
            self.add_module(name, unit)
        self._names = list(self._names)
        self._out_features = [f"res{i + 1}" for i in outputs]
        self._out_feature_channels = dict.fromkeys(self._out_features, CHANNELS)
        self._out_feature_strides = {f"res{i + 1}": 2 ** (i + 1) for i in outputs}

    def forward(self, x):
        features = {}
        for name in self._names:
            x = self.run(getattr(self, name), x)
            features[f"res{int(name[-1]) + 1}" if name.startswith("layer") else "res1"] = x
        return {name: features[name] for name in self._out_features}

    def run(self, unit, x):
        return unit(x)


class RunsBlocksItself(Body):
    def run(self, unit, x):
        for block in unit:
            x = block(x)
        return x


class Reverses(nn.Sequential):
    def forward(self, x):
        for block in reversed(list(self)):
            x = block(x)
        return x


class TwoBlocks(nn.Module):
    """Children as Detectron2's contract has them, but none more is run."""

    def __init__(self, *_):
        super().__init__()
        self.first, self.second = Contract(2), Contract()

    def forward(self, x):
        return self.second(self.first(x))


class Wrapper(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.held(x)


class TopLevels(Backbone):
    """As AdelaiDet's BiFPN has its ResNet, in ``bottom_up.backbone``."""

    def __init__(self):
        super().__init__()
        self.backbone = Body()
        self.extra = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1)

    def forward(self, x):
        features = self.backbone(x)
        return {**features, "res6": self.extra(features["res5"])}

    def output_shape(self):
        return {**self.backbone.output_shape(), "res6": ShapeSpec(channels=CHANNELS, stride=64)}


def fpn(bottom_up):
    return FPN(bottom_up, ["res3", "res4", "res5"], CHANNELS)


class SwinLike(Backbone):
    """Positions last within, as Swin's and ViT's; feature maps at the end."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, CHANNELS, 4, 4)
        self.layers = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.norm = nn.LayerNorm(CHANNELS)
        self._out_features = ["res3", "res4", "res5"]
        self._out_feature_channels = dict.fromkeys(self._out_features, CHANNELS)
        self._out_feature_strides = {"res3": 8, "res4": 16, "res5": 32}

    def forward(self, x):
        x, features = self.patch_embed(x).permute(0, 2, 3, 1), {}
        for name, layer in zip(self._out_features, self.layers):
            x = layer(x[:, ::2, ::2])
            features[name] = self.norm(x).permute(0, 3, 1, 2)
        return features


def torchvision_body(layers=(1, 2, 3, 4)):
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter

    names = {f"layer{i}": f"res{i + 1}" for i in layers}
    return IntermediateLayerGetter(resnet18(), names)


def timm_body():
    timm = pytest.importorskip("timm")
    return Wrapper(timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)))


MAXPOOL = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Identity())


def lpf(**options):
    """AdelaiDet's: conv1, a sequential maxpool, layer1 of the same stride."""
    body = Body(**options, layer1=sequential(stride=1))
    body.maxpool = MAXPOOL
    body._names.insert(1, "maxpool")
    return body


def uncompiled():
    """What is compiled runs as it is, which takes no minute; PyTorch 2.6 can."""
    return getattr(torch.compiler, "set_stance", nullcontext)("force_eager")


def wrapped(name, wrap, **units):
    return Body(**{name: wrap(sequential())}, **units)


@pytest.mark.parametrize(
    ("backbone", "block"),
    [
        (Body(), "layer3.nonlocal1"),
        (Body(block=Contract), "layer3.nonlocal1"),
        (Body(outputs=(2, 3, 4)), "layer3.nonlocal1"),
        (Body(outputs=(3,)), "layer3.nonlocal1"),
        (lpf(), "layer3.nonlocal1"),
        (lpf(outputs=(2, 3, 4)), "layer3.nonlocal1"),
        (fpn(Body()), "bottom_up.layer3.nonlocal1"),
        (fpn(TopLevels()), "bottom_up.backbone.layer3.nonlocal1"),
        (torchvision_body(), "layer3.nonlocal0"),
        (torchvision_body((2, 3, 4)), "layer3.nonlocal0"),
        (Wrapper(torchvision_body()), "held.layer3.nonlocal0"),
        (wrapped("layer2", checkpoint_wrapper), "layer3.nonlocal1"),
        (wrapped("layer3", checkpoint_wrapper), "layer3.nonlocal1"),
        (wrapped("layer2", torch.compile), "layer3.nonlocal1"),
        (wrapped("layer3", torch.compile), "layer3._orig_mod.nonlocal1"),
        (wrapped("layer1", Wrapper), "layer3.nonlocal1"),
        (wrapped("layer3", Wrapper), "layer3.held.nonlocal1"),
        (wrapped("layer1", lambda stage: Wrapper(checkpoint_wrapper(stage))), "layer3.nonlocal1"),
        (Body(layer3=nn.Sequential(*map(checkpoint_wrapper, sequential()))), "layer3.nonlocal1"),
    ],
)
def test_a_list_by_position_means_the_third_stage(backbone, block):
    keys = list(backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    backbone.eval()
    with torch.no_grad(), uncompiled():
        before = backbone(x)
    insert_nonlocal_blocks(backbone, DEFAULT)
    assert list(nonlocal_blocks(backbone)) == [block]
    assert [key for key in backbone.state_dict() if "nonlocal" not in key] == keys
    with uncompiled():
        after = backbone(x)
        assert all(torch.equal(after[name], before[name]) for name in before)
        sum(output.sum() for output in after.values()).backward()
    (inserted,) = nonlocal_blocks(backbone).values()
    assert inserted.norm.weight.grad.any()


STEM = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 4, 1))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Body(layer2=Reverses(*sequential())), r"layer2 \(a Reverses\) does not run its blocks in"),
        (Body(outputs=(0, 1, 2, 3, 4)), "4 lists for its 5 stages"),
        (Body(base=STEM, outputs=(0, 1, 2, 3, 4)), "4 lists for its 5 stages"),
        (RunsBlocksItself(), "as no child returns what it returns"),
        (SwinLike(), r"SwinLike has no stages.*\(patch_embed, layers.0, .*AFTER_MODULES"),
        (Body(outputs=(2, 4), layer4=sequential(stride=1)), r"layer3 .* may be none"),
    ],
)
def test_a_list_by_position_is_refused_where_the_stages_are_in_doubt(backbone, message):
    before = str(backbone)
    with pytest.raises(ValueError, match=message):
        insert_nonlocal_blocks(backbone, DEFAULT)
    assert str(backbone) == before


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"layer2": [0]}, r"layer2 \(a TwoBlocks\) would not run .* as in \[\"layer2.second\"\]"),
        ({"layer3": [0]}, r"layer3 \(a Reverses\) would not .* as in \[\"layer3.2\"\]"),
        ({"layer5": [0]}, "stage is 'layer5', but must be one of 'base', .* 'layer4'; did you"),
        (
            ["layer1.3"],
            "Body has no module 'layer1.3', .*did you mean 'layer1.[012]'.*children are b",
        ),
        (["layer9.*"], r"Body has no module 'layer9.\*', nor one that fits it as a pattern"),
        (["layer1.0", 3], r"places is \['layer1.0', 3\], but must be .* list of names of modules"),
        ("layer1.0", "places is 'layer1.0', but must be"),
    ],
)
def test_a_place_that_would_do_nothing_is_refused(places, message):
    backbone = Body(layer2=TwoBlocks(), layer3=Reverses(*sequential()), block=Contract)
    before = str(backbone)
    with pytest.raises(ValueError, match=message):
        insert_nonlocal_blocks(backbone, places)
    assert str(backbone) == before


def test_positions_last_are_refused_and_what_would_do_is_named():
    model = fpn(SwinLike())
    last = r"channels last \(B, H, W, C\), but a block needs one tensor \(B, C, H, W\), as '(\w+)'"
    with pytest.raises(ValueError, match=last) as refusal:
        insert_nonlocal_blocks(model, ["bottom_up.layers.1"])
    name = re.search(last, str(refusal.value))[1]
    assert name == "fpn_lateral5"
    insert_nonlocal_blocks(model, [name, "bottom_up.patch_embed"])
    assert len(nonlocal_blocks(model)) == 2
    with pytest.raises(ValueError, match=r"bottom_up \(a SwinLike\) returns a dict of 3"):
        insert_nonlocal_blocks(model, ["bottom_up"])


def test_names_and_patterns():
    model = fpn(Body())
    model.train()
    x = torch.randn(2, 3, 64, 64)
    expected = copy.deepcopy(model)(x)
    keys = list(model.state_dict())
    insert_nonlocal_blocks(model, ["fpn_output*", "bottom_up.layer3.*.conv3", "fpn_output4"])
    names = [f"bottom_up.layer3.{i}.conv3.nonlocal" for i in range(3)]
    names += [f"fpn_output{i}.nonlocal" for i in (3, 4, 5)]
    assert sorted(nonlocal_blocks(model)) == names
    assert [key for key in model.state_dict() if ".nonlocal." not in key] == keys
    assert all(module.training for module in model.modules())
    actual = model(x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    sum(output.square().sum() for output in actual.values()).backward()
    blocks = nonlocal_blocks(model)
    assert all(block.norm.weight.grad.any() for block in blocks.values())
    # "After conv3" is after its norm.
    conv3, block = model.bottom_up.layer3[1].conv3, blocks["bottom_up.layer3.1.conv3.nonlocal"]
    torch.nn.init.ones_(block.norm.weight)
    y = torch.randn(2, CHANNELS, 4, 4)
    model.eval()
    plain = functional.conv2d(y, conv3.weight, conv3.bias, padding=1)
    assert torch.equal(conv3(y), block(conv3.norm(plain)))
    with pytest.raises(ValueError, match="there is a block after fpn_output4 already"):
        insert_nonlocal_blocks(model, ["fpn_output4"])


def learnt(model):
    for block in nonlocal_blocks(model).values():
        nn.init.ones_(block.norm.weight)
    return model.eval()


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.optim.swa_utils.AveragedModel(model),
        lambda model: torch.compile(model, backend="eager", fullgraph=True),
        lambda model: torch.jit.trace(model, torch.zeros(1, 3, 64, 64), strict=False),
        lambda model: torch.export.export(model, (torch.zeros(1, 3, 64, 64),)).module(),
    ],
    ids=["deepcopy", "pickle", "EMA", "compile", "trace", "export"],
)
def test_a_block_after_a_module_goes_wherever_the_model_goes(copied):
    model = fpn(Body())
    plain = copy.deepcopy(model).eval()
    learnt(insert_nonlocal_blocks(model, ["fpn_output4", "bottom_up.layer3.1.conv3"]))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = model(x), copied(model)(x)
        assert not torch.allclose(plain(x)["p3"], expected["p3"])
    for name, output in expected.items():
        torch.testing.assert_close(actual[name], output, rtol=1e-4, atol=1e-5)
