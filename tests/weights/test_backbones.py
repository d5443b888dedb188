"""ResNets of torchvision and timm: the same features, in Detectron2's names."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from PIL import Image

from nl_detectron import add_nonlocal_config
from nl_detectron.modeling import build_nonlocal_backbone
from nl_detectron.weights import Conversion, ConversionError, convert
from tests.weights.blocks import randomize
from tests.weights.test_named_families import caffe2_block

ROOT = Path(__file__).resolve().parents[2]
COCO_SAMPLE = ROOT.parent / "shared" / "data" / "coco"
LAYERS = {f"res{stage}": f"layer{stage - 1}" for stage in range(2, 6)}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
TIMM = (*DEPTHS, "resnext50_32x4d", "resnext101_32x8d")
TORCHVISION = (*TIMM, "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")


@pytest.fixture(scope="module")
def photos():
    """Two images, RGB in 0..1, (2, 3, 64, 96), float64."""
    files = sorted((COCO_SAMPLE / "val2017").glob("*.jpg"))[:2]
    if len(files) < 2:
        return torch.rand(2, 3, 64, 96, dtype=torch.float64)
    images = [np.asarray(Image.open(f).convert("RGB").resize((96, 64))) for f in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255


def detectron2_resnet(result, build=build_resnet_backbone):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_other_cfg(type(cfg)(result.settings))
    cfg.MODEL.RESNETS.OUT_FEATURES = list(LAYERS)
    return build(cfg, ShapeSpec(channels=3)), cfg


def build(library, name):
    if library == "timm":
        return pytest.importorskip("timm").create_model(name)
    return getattr(torchvision.models, name)()


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_features_are_equal(library, name, photos):
    theirs = randomize(build(library, name)).double()
    result = convert(theirs.state_dict())
    assert result.family == "torchvision"
    ours, cfg = detectron2_resnet(result)
    missing, unexpected = ours.double().eval().load_state_dict(result.state_dict, strict=False)
    assert not missing
    assert unexpected == ["linear.weight", "linear.bias"]

    assert cfg.INPUT.FORMAT == "RGB"
    their_mean, their_std, our_mean, our_std = (
        torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
        for values in (*IMAGENET, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    expected = {}
    for stage, layer in LAYERS.items():
        getattr(theirs, layer).register_forward_hook(
            lambda module, args, output, stage=stage: expected.__setitem__(stage, output)
        )
    with torch.no_grad():
        theirs((photos - their_mean) / their_std)
        features = ours((photos * 255 - our_mean) / our_std)
    for stage in LAYERS:
        assert expected[stage].std() > 0
        size = expected[stage].abs().max()
        torch.testing.assert_close(features[stage] / size, expected[stage] / size)


@pytest.mark.parametrize(
    ("library", "name"),
    [*(("torchvision", name) for name in TORCHVISION), *(("timm", name) for name in TIMM)],
)
def test_every_depth_and_width(library, name):
    with torch.device("meta"):
        tensors = build(library, name).state_dict()
    result = convert(tensors)
    # That each tensor has its place and shape in Detectron2's model, the conversion checks.
    node = result.settings["MODEL"]["RESNETS"]
    assert node["DEPTH"] == int(re.match(r"\D+(\d+)", name)[1])
    assert node["STRIDE_IN_1X1"] is False
    groups = re.search(r"_(\d+)x(\d+)d", name)
    if groups:
        assert (node["NUM_GROUPS"], node["WIDTH_PER_GROUP"]) == tuple(map(int, groups.groups()))
    left_out = {row.source for row in result.rows if not row.target}
    assert left_out == {n for n in tensors if n.endswith("num_batches_tracked")}


def timm_block(channels):
    return importlib.import_module("timm.layers").NonLocalAttn(channels)


def mmcv_block(channels):
    options = {"reduction": 4, "use_scale": False, "norm_cfg": {"type": "BN"}}
    return importlib.import_module("mmcv.cnn").NonLocal2d(channels, **options)


def context_block(channels):
    return importlib.import_module("mmcv.cnn").ContextBlock(channels, ratio=1 / 4)


@pytest.mark.parametrize(
    ("make_block", "name", "said", "prefix"),
    [
        (timm_block, "se", {"scale": True}, ""),
        (
            mmcv_block,
            "nonlocal_block1",
            {"scale": False, "pairwise": "embedded_gaussian"},
            "backbone.",
        ),
        (context_block, "context_block", {}, "backbone."),
    ],
)
def test_blocks_after_conv3(make_block, name, said, prefix, photos):
    """timm's "se" is where mmdetection has its plug-ins after conv3."""
    theirs = pytest.importorskip("timm").create_model("resnet50")
    pytest.importorskip("mmcv")
    units = {"res3.0": theirs.layer2[0], "res4.4": theirs.layer3[4], "res4.5": theirs.layer3[5]}
    for unit in units.values():
        unit.se = make_block(unit.conv3.out_channels)
    state_dict = randomize(theirs).double().state_dict()
    resnet = convert({n: t for n, t in state_dict.items() if ".se." not in n})
    source = {f"{prefix}{n}".replace(".se.", f".{name}."): t for n, t in state_dict.items()}
    family = {"se": "timm", "nonlocal_block1": "mmcv", "context_block": "gcnet"}[name]
    blocks = convert(source, family, **said)
    assert not any("SAME NETWORK" in note or "not known" in note for note in blocks.notes)
    node = blocks.settings["MODEL"]["NONLOCAL"]
    assert node["AFTER_MODULES"] == [f"*{unit}.conv3" for unit in units]
    assert node["AFTER_BLOCKS_PER_STAGE"] == [[], [], [], []]

    both = Conversion("both", settings={"MODEL": {**blocks.settings["MODEL"]}})
    both.settings["MODEL"].update(RESNETS=resnet.settings["MODEL"]["RESNETS"])
    both.settings["MODEL"]["NONLOCAL"]["BACKBONE"] = "build_resnet_backbone"
    ours, _ = detectron2_resnet(both, build_nonlocal_backbone)
    tensors = {**resnet.state_dict, **blocks.state_dict}
    ours.double().eval().load_state_dict({n: t for n, t in tensors.items() if "linear" not in n})
    with torch.no_grad():
        expected = theirs.forward_features(photos)
        torch.testing.assert_close(ours(photos)["res5"], expected, rtol=1e-4, atol=1e-4)
        for unit in units.values():
            unit.se = torch.nn.Identity()
        assert (theirs.forward_features(photos) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("widths", "name"),
    [
        ((8, 4, 4), "context_block"),  # after conv1
        ((4, 8, 8), "context_block"),  # conv2, or conv3
        ((4, 4, 8), "gcb"),
        ((4, 4, 16), "nonlocal_block"),
        ((), "context_block"),
    ],
)
def test_blocks_elsewhere_in_a_branch_are_another_network(widths, name):
    shapes = {"theta": (4, 8), "phi": (4, 8), "g": (4, 8), "conv_out": (8, 4)}
    unit = "backbone.layer3.4"
    tensors = {f"{unit}.{name}.{n}.conv.weight": torch.rand(*s, 1, 1) for n, s in shapes.items()}
    tensors |= {f"{unit}.{name}.{n}.conv.bias": torch.rand(s[0]) for n, s in shapes.items()}
    convs = {f"{unit}.conv{i}.weight": torch.rand(w, 1, 1, 1) for i, w in enumerate(widths, 1)}
    said = {"family": "mmcv", "pairwise": "dot_product"}
    with pytest.raises(ConversionError, match=r"layer3.4.* is within a residual block's branch"):
        convert({**tensors, **convs}, **said)
    both = {
        **tensors,
        **{n.replace(f"{unit}.{name}", "neck.refine"): t for n, t in tensors.items()},
    }
    result = convert(both, **said)
    assert sum("not tell that it is after conv3" in row.note for row in result.rows) == 8
    assert "neck.refine.theta.weight" in result.state_dict
    forced = convert(tensors, **said, rename={f"{unit}.{name}": "res4.nonlocal4"})
    assert forced.notes[0].startswith("NOT THE SAME NETWORK")
    told = convert(tensors, **said, rename={f"{unit}.{name}": "res4.4.conv3.nonlocal"})
    assert not told.notes
    assert told.settings["MODEL"]["NONLOCAL"]["AFTER_MODULES"] == ["*res4.4.conv3"]


def test_detectron2_form_is_copied():
    resnet = convert(build("torchvision", "resnet18").state_dict())
    arrays = {name: tensor.numpy() for name, tensor in resnet.state_dict.items()}
    checkpoint = {"model": arrays, "__author__": "someone", "matching_heuristics": True}
    result = convert(checkpoint)
    assert result.family == "detectron2"
    assert all(np.array_equal(result.state_dict[name], arrays[name]) for name in arrays)
    assert len(result.state_dict) == len(arrays)
    assert result.settings == {"MODEL": {"RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}}}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50d", {}, "conv1.0.weight: a stem of several convolutions"),
        ("resnet50", {"avg_down": True}, r"downsample.*average pooling in the shortcuts"),
        ("seresnet50", {}, "attention within its residual blocks"),
        ("resnet26", {}, r"\(2, 2, 2, 2\).*depths 18, 34, 50, 101, 152"),
        ("resnet50_gn", {}, "stem.conv1.norm.running_mean has shape none"),
        ("resnet50", {"in_chans": 1}, r"stem.conv1.weight has shape \(64, 1, 7, 7\)"),
        ("ecaresnet50d", {}, "Detectron2's ResNet does not have"),
        ("resnetrs50", {}, "Detectron2's ResNet does not have"),
    ],
)
def test_other_networks_are_refused(name, options, message):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        tensors = timm.create_model(name, **options).state_dict()
    with pytest.raises(ConversionError, match=message):
        convert(tensors)


def caffe2_resnet50(temporal_kernel=1, affine=False):
    """The blobs of a C2D, or with a larger kernel an I3D, without values."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    leaves = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    blobs = {}
    with torch.device("meta"):
        state_dict = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
        for name, tensor in state_dict.items():
            conv, _, leaf = name.partition(".norm.")
            if conv == "stem.conv1" or name == "stem.conv1.weight":
                blob = "res_conv1" if leaf else "conv1"
            else:
                stage, block, kind, *_ = name.split(".")
                branch = "1" if kind == "shortcut" else f"2{'abc'[int(kind[-1]) - 1]}"
                blob = f"{stage}_{block}_branch{branch}"
            if not leaf:
                kernel = temporal_kernel if blob == "res3_2_branch2a" else 1
                out, channels, *space = tensor.shape
                blobs[f"{blob}_w"] = torch.empty(out, channels, kernel, *space)
            elif not affine or leaf in ("weight", "bias"):
                blobs[f"{blob}_bn_{leaves[leaf]}"] = tensor
        blobs["pred_w"] = torch.empty(400, 2048)
    return blobs, state_dict


@pytest.mark.parametrize("affine", [True, False])
def test_caffe2_backbone(affine):
    blobs, expected = caffe2_resnet50(affine=affine)
    result = convert({"blobs": {**blobs, **caffe2_block("nonlocal_conv3_1")}})
    shapes = {n: t.shape for n, t in result.state_dict.items() if "nonlocal" not in n}
    assert shapes == {n: t.shape for n, t in expected.items()}
    model = result.settings["MODEL"]
    assert model["RESNETS"]["DEPTH"] == 50
    assert model["PIXEL_STD"] == [57.375] * 3
    assert any("pools without padding" in note for note in result.notes)
    assert "pred_w" in {row.source for row in result.rows if not row.target}


def test_inflated_caffe2_backbone_is_left_out():
    blobs, _ = caffe2_resnet50(temporal_kernel=3)
    result = convert({"blobs": {**blobs, **caffe2_block("nonlocal_conv3_1")}})
    assert all("nonlocal" in name for name in result.state_dict)
    assert "RESNETS" not in result.settings["MODEL"]
    notes = {row.source: row.note for row in result.rows}
    assert notes["res3_2_branch2a_w"] == "temporal kernel 3 has no 2-D form"
    assert "inflated convolutions" in notes["conv1_w"]
