import re
import sys

import numpy as np
import pytest
import torch
import torchvision
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

import convert_weights
from nl_detectron import NonLocalBlock, add_nonlocal_config
from nl_detectron.config import build_config
from nl_detectron.weights import SOURCES, ConversionError, convert, recognise
from nl_detectron.weights.checkpoint_io import load_checkpoint, save_checkpoint
from tests.weights.test_named_families import caffe2_block

# The parts of a block of 8 channels with 4 inside, and their names.
NAMES = {
    "nl_detectron": ("theta", "phi", "g", "out"),
    "mmcv": ("theta.conv", "phi.conv", "g.conv", "conv_out.conv"),
    "alexhex7": ("theta", "phi", "g", "W"),
    "slowfast": tuple(f"s3.pathway0_nonlocal1.conv_{p}" for p in ("theta", "phi", "g", "out")),
    "pytorchvideo": ("conv_theta", "conv_phi", "conv_g", "conv_out"),
    "timm": ("t", "p", "g", "z"),
}
SAID = {"pairwise": "embedded_gaussian", "scale": True, "subsample": "none"}


def block(family, channels=8, inner=4, prefix=""):
    theta, phi, g, out = (f"{prefix}{name}" for name in NAMES[family])
    tensors = {}
    for name in (theta, phi, g, out):
        shape = (channels, inner) if name == out else (inner, channels)
        tensors[f"{name}.weight"] = torch.randn(*shape, 1, 1)
        tensors[f"{name}.bias"] = torch.randn(shape[0])
    return tensors


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("prefix", ["", "module.", "module.head.3."])
def test_recognises(family, prefix):
    tensors = block(family, prefix=prefix)
    wrapped = {"state_dict": tensors, "epoch": 3, "meta": {"config": "x"}}
    result = convert(wrapped, pairwise="embedded_gaussian", **open_options(family))
    assert result.family == family
    assert {row.source for row in result.rows if not row.target} == {"epoch", "meta"}


def open_options(family):
    subsample = {"slowfast": "none", "pytorchvideo": "none"}.get(family)
    return {"subsample": subsample, "scale": True if family == "mmcv" else None}


def test_recognises_the_others():
    assert recognise({k: torch.zeros(1) for k in caffe2_block("nonlocal_conv3_1")}) == "caffe2"
    assert recognise(torchvision.models.resnet18().state_dict()) == "torchvision"
    assert recognise({"backbone.bottom_up.res2.0.conv1.weight": torch.zeros(1)}) == "detectron2"
    ours = {f"res4.nonlocal4.{name}": t for name, t in NonLocalBlock(8).state_dict().items()}
    assert recognise({**ours, "res2.0.conv1.weight": torch.zeros(1)}) == "nl_detectron"


def test_ambiguous_and_unknown_names():
    both = {**block("mmcv", prefix="a."), **block("timm", prefix="b.")}
    with pytest.raises(ConversionError, match=r"fit mmcv and timm.*family='mmcv' or 'timm'"):
        convert(both)
    result = convert(both, "timm")
    assert sum(not row.target for row in result.rows) == 8
    with pytest.raises(ConversionError, match=r"neither.*among the 1 tensors \(encoder.weight"):
        convert({"encoder.weight": torch.zeros(3)})
    with pytest.raises(ConversionError, match="no non-local block in mmcv's names"):
        convert(block("timm"), "mmcv")
    with pytest.raises(ValueError, match=r"family is 'mmvc'.*did you mean 'mmcv'"):
        convert(both, "mmvc")


SOFTMAX, DOT = {"pairwise": "embedded_gaussian"}, {"pairwise": "dot_product"}


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("mmcv", {}, r"pairwise='embedded_gaussian' or 'dot_product' \(mmcv's default.*; scale="),
        ("mmcv", SOFTMAX, r"tell scale=True or False.*--scale"),
        ("alexhex7", {}, r"tell pairwise='embedded_gaussian' or 'dot_product'\. Say"),
        ("pytorchvideo", DOT, r"tell subsample='input' or 'none'"),
    ],
)
def test_what_the_file_does_not_tell_has_to_be_said(family, said, message):
    with pytest.raises(ConversionError, match=message):
        convert(block(family), **said)


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("timm", {"to": "pytorchvideo", "dims": 2}, "PyTorchVideo's blocks are 3-D, not 2-D"),
        ("alexhex7", {**SOFTMAX, "scale": True}, "scale is True.*one of False"),
        ("mmcv", {"pairwise": "gaussian"}, "pairwise is 'gaussian', but must be one of"),
        ("mmcv", {**DOT, "subsample": "input"}, "subsample is 'input'.*'none'"),
        ("timm", {"dims": 4}, "dims is 4"),
        ("timm", {"to": "mmdet"}, "to is 'mmdet'.*'mmcv'"),
        ("timm", {"norm": "BN"}, "norm is 'BN'.*one of ''"),
        ("timm", {"pairwse": "x"}, "option is 'pairwse'.*'subsample'.*did you mean 'pairwise'"),
    ],
)
def test_what_contradicts_the_file_is_refused(family, said, message):
    with pytest.raises(ValueError, match=message):
        convert(block(family), **said)


def test_inner_width_that_no_reduction_gives():
    with pytest.raises(ConversionError, match=r"no integer reduction.*5 of 8"):
        convert(block("timm", 8, 5))
    assert reduction(convert(block("timm", 10, 3))) == 3
    two = {**block("timm", 8, 4, "a."), **block("timm", 9, 4, "b.")}
    assert reduction(convert(two)) == 2
    with pytest.raises(ConversionError, match="4 of 8, 3 of 9"):
        convert({**block("timm", 8, 4, "a."), **block("timm", 9, 3, "b.")})


def reduction(result):
    return result.settings["MODEL"]["NONLOCAL"]["REDUCTION"]


def pooled(tensors, *parts):
    """Under the names that mmcv has in a block that subsamples."""
    return {re.sub(rf"^({'|'.join(parts)})\.", r"\1.0.", name): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta.conv.weight": torch.zeros(4, 8, 3, 1, 1)}, r"theta has shape \(4, 8, 3, 1, 1\)"),
        ({"theta.conv.weight": torch.zeros(5, 8, 1, 1)}, r"theta has shape \(5, 8, 1, 1\)"),
        ({"theta.conv.weight": None, "theta.conv.bias": None}, "only one of theta and phi"),
        ({"phi.conv.bias": None}, "phi has no bias: it is incomplete"),
        ({"g.0.conv.weight": torch.zeros(4, 8, 1, 1)}, "both g.conv and g.0.conv"),
        ({"conv_out.bn.running_var": torch.ones(8)}, "no norm.bias, norm.running_mean, norm.weig"),
        ({"conv_out.gn.weight": torch.ones(8)}, "no running statistics.*norm='GN'"),
        ("phi", "of phi and g only phi is subsampled"),
    ],
)
def test_incomplete_blocks(change, message):
    tensors = block("mmcv")
    tensors = pooled(tensors, change) if change == "phi" else {**tensors, **change}
    with pytest.raises(ConversionError, match=message):
        convert({k: v for k, v in tensors.items() if v is not None}, "mmcv", **DOT)


def test_blocks_that_differ_do_not_fit_one_config():
    other = pooled(block("mmcv"), "phi", "g")
    tensors = {**block("mmcv", prefix="a."), **{f"b.{name}": t for name, t in other.items()}}
    with pytest.raises(ConversionError, match=r"a and b differ.*'none'.*'embeddings'"):
        convert(tensors, pairwise="dot_product")


def test_rename_puts_blocks_in_their_place():
    tensors = {**block("timm", prefix="body.nl4."), **block("timm", prefix="body.nl2.")}
    unplaced = convert(tensors)
    assert "AFTER_BLOCKS_PER_STAGE" not in unplaced.settings["MODEL"]["NONLOCAL"]
    assert "'body.nl4', 'body.nl2' in our model is not known" in unplaced.notes[-1]
    result = convert(tensors, rename={"body.nl4": "res4.nonlocal4", "body.nl2": "res4.nonlocal2"})
    node = result.settings["MODEL"]["NONLOCAL"]
    assert node["AFTER_BLOCKS_PER_STAGE"] == [[], [], [2, 4], []]
    assert "body.nl4.t.weight  res4.nonlocal4.theta.weight  4x8x1x1  done" in result.table()
    with pytest.raises(ConversionError, match=r"no block 'body.nl3'.*did you mean 'body.nl"):
        convert(tensors, rename={"body.nl3": "res4.nonlocal4"})
    with pytest.raises(ConversionError, match="two tensors would become res4"):
        convert(tensors, rename={"body.nl4": "res4.nonlocal4", "body.nl2": "res4.nonlocal4"})
    assert (
        "res5.nonlocal0.g.bias" in convert(block("timm"), rename={"": "res5.nonlocal0"}).state_dict
    )


@pytest.mark.parametrize(
    ("to", "said", "message"),
    [
        ("pytorchvideo", {"pairwise": "concatenation"}, "PyTorchVideo has no pairwise='concat"),
        ("pytorchvideo", {"pairwise": "gaussian"}, "PyTorchVideo has no pairwise='gaussian'"),
        ("pytorchvideo", {"subsample": "embeddings"}, "no subsample='embeddings', only 'input'"),
        ("mmcv", {"subsample": "input"}, "no subsample='input', only 'none', 'embeddings'"),
        ("mmcv", {"pairwise": "gaussian"}, "no gaussian with scale=True, and without theta"),
        ("mmcv", {"norm": "LN"}, "no norm='LN'"),
        ("pytorchvideo", {"norm": "GN"}, "no norm='GN'"),
        ("mmcv", {"norm": "GN"}, "no bias between W_z and GN"),
    ],
)
def test_what_others_do_not_have_is_not_written(to, said, message):
    options = {**SAID, **said}
    ours = NonLocalBlock(64, **{"norm": "BN", **options})
    torch.nn.init.ones_(ours.out.bias)
    with pytest.raises(ConversionError, match=message):
        convert(ours.state_dict(), to=to, **options)


def test_only_blocks_are_written_for_others():
    resnet = {"res2.0.conv1.weight": torch.zeros(1)}
    ours = {f"res4.nonlocal4.{k}": v for k, v in NonLocalBlock(8, norm="").state_dict().items()}
    result = convert({**resnet, **ours}, to="mmcv", **SAID)
    assert result.rows[-1].outcome == "left out: not a non-local block's"
    assert result.settings["res4.nonlocal4"]["sub_sample"] is False
    with pytest.raises(ConversionError, match="only non-local blocks"):
        convert(torchvision.models.resnet18().state_dict(), to="mmcv")


def test_frozen_norm_has_no_counter():
    ours = NonLocalBlock(8, norm="BN").state_dict()
    result = convert(ours, to="mmcv", **SAID, norm="FrozenBN")
    assert "conv_out.bn.num_batches_tracked" not in result.state_dict
    assert "a counter that a frozen batch norm does not have" in result.table()


def test_own_names_are_copied():
    tensors = {
        "backbone.bottom_up.res2.0.conv1.weight": torch.rand(2),
        "roi_heads.x": torch.rand(1),
    }
    result = convert({"model": tensors, "iteration": 9})
    assert result.state_dict == tensors
    assert "copied as it is" in result.notes[0]


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    convert_weights.main()


def test_tool_end_to_end(tmp_path, monkeypatch, capsys):
    """A C2-named block and a torchvision ResNet, into one Detectron2 model by the written YAML."""
    blobs = {
        name: np.resize(v, [{32: 1024, 16: 512}.get(n, n) for n in v.shape])
        for name, v in caffe2_block("nonlocal_conv4_4").items()
    }
    save_checkpoint(blobs, tmp_path / "caffe2.pkl")
    save_checkpoint(torchvision.models.resnet50().state_dict(), tmp_path / "tv.safetensors")
    for source in ("caffe2.pkl", "tv.safetensors"):
        target = tmp_path / f"ours-{source}".replace("safetensors", "pkl")
        run_tool(monkeypatch, tmp_path / source, target)
    printed = capsys.readouterr().out
    assert "recognised as caffe2: 12 tensors" in printed.replace("\n", " ")
    assert "nonlocal_conv4_4_theta_w" in printed
    assert "STRIDE_IN_1X1: false" in printed

    cfg = get_cfg()
    add_nonlocal_config(cfg)
    (tmp_path / "both.yaml").write_text(f"_BASE_: {tmp_path}/ours-caffe2.yaml\n")
    cfg.merge_from_file(str(tmp_path / "both.yaml"))
    blocks_file = cfg.MODEL.WEIGHTS
    cfg.merge_from_file(str(tmp_path / "ours-tv.yaml"))
    assert cfg.MODEL.NONLOCAL.SUBSAMPLE == "input"
    assert cfg.INPUT.FORMAT == "RGB"
    model = torch.nn.Module()
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.backbone = build_backbone(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    DetectionCheckpointer(model).load(blocks_file)
    body = model.backbone.bottom_up
    written = load_checkpoint(tmp_path / "ours-tv.pkl")["model"]
    assert np.array_equal(body.res4[3].conv2.weight.detach(), written["res4.3.conv2.weight"])
    theta = blobs["nonlocal_conv4_4_theta_w"].squeeze(2)
    assert np.array_equal(body.res4.nonlocal4.theta.weight.detach(), theta)


def test_tool_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    save_checkpoint(block("mmcv"), tmp_path / "theirs.pth")
    for source, message in (
        ("theirs.pth", r"theirs.pth is not converted.*--pairwise, --scale"),
        ("nowhere.pth", r"nowhere.pth does not exist"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_tool(monkeypatch, tmp_path / source, tmp_path / "ours.pth")
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit, match=r"2"):
        run_tool(monkeypatch, "a.pth", "b.pth", "--rename", "res4")
    assert not list(tmp_path.glob("ours*"))


def test_tool_both_ways(tmp_path, monkeypatch, capsys):
    save_checkpoint(block("mmcv"), tmp_path / "theirs.pth")

    def tool(source, target, *options):
        said = ["--pairwise", "embedded_gaussian", "--no-scale", *options]
        run_tool(monkeypatch, tmp_path / source, tmp_path / target, *said)

    tool("theirs.pth", "ours.pth", "--rename", "=res3.nonlocal1")
    assert "only, so not in" in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    assert settings["MODEL"]["NONLOCAL"]["AFTER_BLOCKS_PER_STAGE"] == [[], [1], [], []]
    tool(
        "ours.pth", "back.pth", "--to", "mmcv", "--subsample", "none", "--rename", "res3.nonlocal1="
    )
    theirs, back = (load_checkpoint(tmp_path / f"{n}.pth")["model"] for n in ("theirs", "back"))
    assert set(theirs) == set(back)
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)


@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian", "dot_product"])
def test_config_beside_a_checkpoint_of_ours_tells_its_options(
    tmp_path, monkeypatch, capsys, pairwise
):
    options = {"pairwise": pairwise, "scale": False, "subsample": "embeddings"}
    block = NonLocalBlock(32, **options)
    tensors = {f"backbone.res4.nonlocal4.{n}": t for n, t in block.state_dict().items()}
    save_checkpoint({"model": tensors}, tmp_path / "model_final.pth")
    keys = [word for k, v in options.items() for word in (f"MODEL.NONLOCAL.{k.upper()}", v)]
    (tmp_path / "config.yaml").write_text(build_config("configs/long_range.yaml", keys).dump())
    paths = [tmp_path / "model_final.pth", tmp_path / "theirs.pth"]
    run_tool(monkeypatch, *paths, "--to", "mmcv")
    told = f"{tmp_path / 'config.yaml'} tells PAIRWISE {pairwise} SCALE False SUBSAMPLE embeddings"
    assert told in capsys.readouterr().out
    said = ["--pairwise", pairwise, "--no-scale", "--overwrite"]
    run_tool(monkeypatch, *paths, "--to", "mmcv", *said)
    assert "tells SUBSAMPLE embeddings" in capsys.readouterr().out


def test_help_names_all_families():
    text = convert_weights.make_parser().format_help()
    assert all(source in text for source in SOURCES)
