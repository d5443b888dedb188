"""Places in backbones that are not built as Detectron2 builds its ResNet: right, or refused."""

import copy
import logging
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import FPN, Backbone, build_backbone, build_resnet_backbone
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nl_detectron import (
    NonLocalBlock,
    add_nonlocal_config,
    insert_blocks,
    insert_nonlocal_blocks,
)
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


class Nested(nn.Module):
    """As a stage of ConvNeXt: its blocks, and what comes before them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.blocks = sequential()

    def forward(self, x):
        return self.blocks(self.norm(x))


class Chain(Backbone):
    """Four of these after a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 1)
        self.stages = nn.ModuleList(Nested() for _ in range(4))

    def forward(self, x):
        x, features = self.conv(x), {}
        for i, stage in enumerate(self.stages):
            features[f"res{i + 2}"] = x = stage(x)
        return features


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


class Merge(Backbone):
    """As AdelaiDet's SingleBiFPN, a backbone that runs on features and has no stages."""

    def __init__(self):
        super().__init__()
        self.outputs = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, features):
        return {name: self.outputs(x) for name, x in features.items()}


class BiFPN(Backbone):
    def __init__(self, layer=Merge):
        super().__init__()
        self.bottom_up = TopLevels()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x):
        x = self.bottom_up(x)
        for layer in self.layers:
            x = layer(x)
        return x


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


class TimmBody(Backbone):
    def __init__(self):
        super().__init__()
        timm = pytest.importorskip("timm")
        self.body = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))

    def forward(self, x):
        return dict(zip(("res2", "res3", "res4", "res5"), self.body(x)))


def test_a_wrapper_of_timms():
    backbone = insert_nonlocal_blocks(TimmBody(), DEFAULT)
    insert_nonlocal_blocks(backbone, ["body.layer3.*.conv2"])
    names = ["body.layer3.nonlocal0", *(f"body.layer3.{i}.conv2.nonlocal" for i in (0, 1))]
    assert sorted(nonlocal_blocks(backbone)) == sorted(names)


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
        (BiFPN(), "bottom_up.backbone.layer3.nonlocal1"),
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
        (
            Body(**{f"layer{i}": Nested() for i in (1, 2, 3, 4)}),
            "layer1 .* does not run its blocks",
        ),
        (
            Chain(),
            "Nested the stages cannot be numbered, as it has only a part of 4 that are returned",
        ),
        (SwinLike(), r"SwinLike has no stages.*\(patch_embed, layers.0, .*AFTER_MODULES"),
        (Body(outputs=(2, 4), layer4=sequential(stride=1)), r"layer3 .* may be none"),
        (BiFPN(Body), "BiFPN has several backbones: give one of them"),
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


def resnet50():
    cfg = cfg_of("build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 50)
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = CHANNELS
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS = 4 * CHANNELS, CHANNELS
    return build_backbone(cfg, ShapeSpec(channels=3))


@torch.no_grad()
def test_a_block_before_the_last_relu_of_a_bottleneck():
    model = resnet50().eval()
    x, keys, before = torch.randn(1, 3, 64, 96), list(model.state_dict()), str(model)
    expected = model(x)
    for places in (["bottom_up.res4.*.sum", "no.sum"], ["bottom_up.res4.6.sum"]):
        with pytest.raises(ValueError, match=r"no module '(no\.sum|bottom_up\.res4\.6\.sum)'"):
            insert_nonlocal_blocks(model, places)
    with pytest.raises(ValueError, match="must keep shape"):
        insert_blocks(model, ["bottom_up.res4.4.sum"], lambda channels: nn.Flatten())
    assert str(model) == before
    insert_nonlocal_blocks(model, ["bottom_up.res4.4.sum", "bottom_up.res4.4"])
    blocks = nonlocal_blocks(model)
    assert set(blocks) == {f"bottom_up.res4.4{n}.nonlocal" for n in ("", ".sum")}
    assert [key for key in model.state_dict() if ".nonlocal." not in key] == keys
    actual = model(x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"a block after bottom_up.res4.4.sum already"):
        insert_nonlocal_blocks(model, ["bottom_up.res4.4.sum"])

    block, unit = blocks["bottom_up.res4.4.sum.nonlocal"], model.bottom_up.res4[4]
    nn.init.ones_(block.norm.weight)
    y = torch.randn(1, unit.in_channels, 4, 6)
    total = unit.conv3(unit.conv2(unit.conv1(y).relu()).relu()) + y
    for other in (unit, copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(other(y), block(total).relu())
    assert not torch.equal(unit(y), total.relu())


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


def test_a_block_after_a_module_is_trained_by_distributed_data_parallel(tmp_path):
    model = insert_nonlocal_blocks(fpn(Body()), ["fpn_output4"])
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        distributed = DistributedDataParallel(model, find_unused_parameters=False)
        outputs = distributed(torch.randn(2, 3, 64, 64))
        sum(output.square().sum() for output in outputs.values()).backward()
        assert model.get_submodule("fpn_output4.nonlocal").norm.weight.grad.any()
        with pytest.raises(ValueError, match="before DistributedDataParallel"):
            insert_nonlocal_blocks(distributed, ["module.fpn_output3"])
    finally:
        torch.distributed.destroy_process_group()


def test_a_block_within_a_checkpointed_module_is_run_again_in_the_backward_pass():
    torch.manual_seed(0)
    model = insert_nonlocal_blocks(Body(), ["layer3.1.conv3"], zero_init=False)
    checkpointed = copy.deepcopy(model)
    checkpointed.layer3 = checkpoint_wrapper(checkpointed.layer3)
    x = torch.randn(2, 3, 64, 64)
    for net in (model, checkpointed):
        net(x)["res5"].square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    for gradient, parameter in zip(gradients, checkpointed.parameters()):
        torch.testing.assert_close(parameter.grad, gradient)


def test_names_reach_through_wrappers():
    model = Body(layer3=checkpoint_wrapper(sequential()))
    insert_nonlocal_blocks(model, ["layer3.*.conv3", "layer3"])
    keys = {key.rpartition(".theta")[0] for key in model.state_dict() if ".theta." in key}
    assert keys == {"layer3.nonlocal", *(f"layer3.{i}.conv3.nonlocal" for i in range(3))}
    assert set(nonlocal_blocks(model)) == keys


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
@pytest.mark.parametrize("places", [[[], [-2], []], {"res3": [-2]}], ids=str)
@pytest.mark.parametrize("stage", ["res2", "res3"])
def test_a_wrapped_stage_of_detectron2s_has_its_name(stage, places, wrap):
    backbone = resnet18()
    setattr(backbone, stage, wrap(getattr(backbone, stage)))
    insert_nonlocal_blocks(backbone, places)
    (name,) = (name.replace("_orig_mod.", "") for name in nonlocal_blocks(backbone))
    assert name == "res3.nonlocal0"


def test_a_block_in_frozen_surroundings_is_frozen(caplog):
    model = Body()
    model.layer2.requires_grad_(False)
    insert_blocks(model, ["layer2.0.conv3", "layer3.0.conv3", "layer2.1.shortcut"], PlainBlock)
    frozen = {name: not b.scale.requires_grad for name, b in nonlocal_blocks(model).items()}
    assert frozen == {
        "layer2.0.conv3.nonlocal": True,
        "layer2.1.shortcut.nonlocal": True,
        "layer3.0.conv3.nonlocal": False,
    }
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert warning == (
        "PlainBlock layer2.0.conv3.nonlocal after layer2.0.conv3 (8 channels), PlainBlock "
        "layer2.1.shortcut.nonlocal after layer2.1.shortcut (8 channels): frozen, as its stage is; "
        "it will not learn"
    )


class PlainBlock(nn.Module):
    """A block of a user's own, without anything that Detectron2 knows."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.scale * self.norm(x).sigmoid()


@pytest.mark.parametrize("places", [{"res4": [0]}, ["res4.0"], ["res4.0.conv2"]], ids=str)
def test_any_module_that_keeps_the_shape_is_a_block(places):
    backbone = resnet18()
    x = torch.randn(1, 3, 64, 64)
    expected = copy.deepcopy(backbone)(x)["res4"]
    insert_blocks(backbone, places, PlainBlock)
    assert torch.equal(backbone(x)["res4"], expected)
    backbone(x)["res4"].sum().backward()
    (block,) = nonlocal_blocks(backbone).values()
    assert block.scale.grad.any()
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        other.freeze(4)  # which asks each block of a stage to freeze itself
        (block,) = nonlocal_blocks(other).values()
        assert not block.scale.requires_grad
        assert isinstance(block.norm, FrozenBatchNorm2d)
    assert next(iter(nonlocal_blocks(backbone).values())).scale.requires_grad


def resnet18():
    return build_resnet_backbone(cfg_of("build_resnet_backbone"), ShapeSpec(channels=3))


TWO_PLACES = [{"res3": [0], "res4": [0]}, ["res3.0", "res4.0.conv2"]]


class Fails(logging.Handler):
    def emit(self, record):
        raise OSError("no space left")


@pytest.mark.parametrize(
    ("make_block", "message"),
    [
        (
            lambda channels: nn.Conv2d(channels, 2 * channels, 1),
            "a Conv2d, returns a tensor",
        ),
        (lambda channels: nn.AvgPool2d(2), r"returns .* for a tensor .*, but must keep shape and"),
        (lambda channels: nn.Flatten(), "a Flatten, returns a tensor"),
        (lambda channels: ToHalf(), "ToHalf, returns .* float16 for .* float32"),
        (lambda channels: ToTuple(), "a ToTuple, returns a tuple of 1"),
        (lambda channels: 3, "the block for .* is a int, not an nn.Module"),
        (lambda channels: 1 / 0, "division by zero"),
        (nn.Linear, "missing"),
    ],
)
@pytest.mark.parametrize(
    "places", [{"res3": [0], "res4": [0]}, ["res3.0", "res4.0.conv2"]], ids=str
)
def test_what_is_no_block_leaves_the_model_as_it_was(places, make_block, message):
    assert_refused(resnet18(), places, make_block, message)


class ToHalf(nn.Module):
    def forward(self, x):
        return x.half()


class ToTuple(nn.Module):
    def forward(self, x):
        return (x,)


@pytest.mark.parametrize(
    "places", [{"res3": [0], "res4": [0]}, ["res3.0", "res4.0.conv2"]], ids=str
)
def test_an_error_of_the_log_leaves_the_model_as_it_was(places):
    logger, handler = logging.getLogger("nl_detectron.modeling.insertion"), Fails()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        assert_refused(resnet18(), places, NonLocalBlock, "no space left")
    finally:
        logger.removeHandler(handler)


def assert_refused(model, places, make_block, message):
    def everything():
        hooks = [len(m._forward_hooks) for m in model.modules()]
        state = {key: value.clone() for key, value in model.state_dict().items()}
        return str(model), hooks, [m.training for m in model.modules()], state

    before = everything()
    with pytest.raises(Exception, match=message):
        insert_blocks(model, places, make_block)
    after = everything()
    assert before[:3] == after[:3]
    assert all(torch.equal(after[3][key], value) for key, value in before[3].items())


def test_a_run_to_see_the_channels_changes_nothing():
    class Counts(Bottleneck):
        def __init__(self, stride=1):
            super().__init__(stride)
            self.register_buffer("calls", torch.zeros(()))
            self.dropout = nn.Dropout()

        def forward(self, x):
            self.calls += 1
            return self.dropout(super().forward(x))

    model = Body(block=Counts)
    model.layer2.eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    insert_blocks(model, ["layer1.0"], lambda channels: nn.Identity())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(new, old) for new, old in zip(model.buffers(), buffers))
    delattr(model.layer1.get_submodule("0"), "nonlocal")
    after = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    assert [training for training, _ in after] == [training for training, _ in before]
    assert sum(hooks for _, hooks in after) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "AFTER_MODULES",
            ["fpn_outptu4"],
            "AFTER_MODULES is .* of build_resnet_fpn_backbone: ",
        ),
        ("AFTER_MODULES", ["bottom_up"], "AFTER_MODULES .* returns a dict of 4"),
        ("TIMM", "cbma", "MODEL.NONLOCAL.TIMM is 'cbma', .*did you mean 'cbam'"),
    ],
)
def test_the_config_refuses_by_key(key, value, message):
    pytest.importorskip("timm")
    cfg = cfg_of("build_nonlocal_backbone", "MODEL.NONLOCAL.BLOCK", "TimmAttention")
    cfg.MODEL.NONLOCAL[key] = value
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg, ShapeSpec(channels=3))


def test_places_from_the_config():
    names = ["fpn_output*", "bottom_up.res4.*.conv2"]
    cfg = cfg_of("build_nonlocal_backbone", "MODEL.NONLOCAL.AFTER_MODULES", names)
    blocks = list(nonlocal_blocks(build_backbone(cfg, ShapeSpec(channels=3))))
    assert sorted(blocks) == [
        "bottom_up.res4.0.conv2.nonlocal",
        "bottom_up.res4.1.conv2.nonlocal",
        "bottom_up.res4.nonlocal0",
        *(f"fpn_output{i}.nonlocal" for i in (2, 3, 4, 5)),
    ]


def cfg_of(backbone, *overrides):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(list(overrides))
    return cfg
