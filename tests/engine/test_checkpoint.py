import logging
import os
import pickle
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model

import train_net
from nl_detectron import add_nonlocal_config, model_zoo
from nl_detectron.engine import NonLocalCheckpointer, parse_arguments
from nl_detectron.weights.checkpoint_io import CheckpointError, save_checkpoint

KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16] * 4)


def build(*overrides, blocks=True):
    return build_model(config(*overrides, blocks=blocks))


def config(*overrides, blocks=True):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    name = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone" if blocks else name
    cfg.merge_from_list(list(overrides))
    return cfg


def build_backbone(*overrides):
    """A ResNet-18-FPN with blocks, alone."""
    cfg = config(*overrides)
    return BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))


def load(model, path, caplog):
    """Load, and return what was logged at each level."""
    with caplog.at_level(logging.INFO, logger="nl_detectron.engine.checkpoint"):
        logging.getLogger("nl_detectron").propagate = True
        NonLocalCheckpointer(model).load(str(path))
    records = [r for r in caplog.records if r.name == "nl_detectron.engine.checkpoint"]
    text = {
        level: "\n".join(r.getMessage() for r in records if r.levelname == level)
        for level in ("INFO", "WARNING")
    }
    caplog.clear()
    return text


@pytest.fixture(scope="module")
def plain():
    return build(blocks=False)


@pytest.fixture
def detector(plain, tmp_path):
    path = tmp_path / "detector.pth"
    torch.save({"model": plain.state_dict()}, path)
    return path


@pytest.fixture
def classifier(plain, tmp_path):
    """What Detectron2's ImageNet weights look like."""
    weights = {
        name: tensor.numpy() for name, tensor in plain.backbone.bottom_up.state_dict().items()
    }
    weights["linear.bias"] = torch.zeros(1000).numpy()
    path = tmp_path / "classifier.pkl"
    content = {"model": weights, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return path


def test_detector_into_a_model_with_blocks(plain, detector, caplog):
    model = build()
    text = load(model, detector, caplog)
    count = len(plain.state_dict())
    assert f"Loaded {count} tensors from {detector}" in text["INFO"]
    assert "start fresh: backbone.bottom_up.res4.nonlocal0; nothing else" in text["INFO"]
    assert not text["WARNING"]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_classifier_into_a_detector_with_blocks(plain, classifier, caplog):
    model = build()
    text = load(model, classifier, caplog)
    count = len(plain.backbone.bottom_up.state_dict())
    assert f"Loaded {count} tensors" in text["INFO"]
    assert "start fresh: backbone.bottom_up.res4.nonlocal0" in text["INFO"]
    assert "tensors of the detector around it start fresh" in text["INFO"]
    assert "Not used by the model" in text["INFO"]
    assert "linear.bias" in text["INFO"]
    assert not text["WARNING"]
    name = "res4.1.conv1.weight"
    loaded = model.backbone.bottom_up.state_dict()[name]
    assert torch.equal(loaded, plain.backbone.bottom_up.state_dict()[name])


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_warns_of_a_missing_backbone_tensor(kind, request, caplog):
    path = request.getfixturevalue(kind)
    content = torch.load(path) if kind == "detector" else pickle.loads(path.read_bytes())
    name = next(key for key in content["model"] if key.endswith("res4.1.conv1.weight"))
    del content["model"][name]
    if kind == "detector":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    text = load(build(), path, caplog)
    assert "NOT LOADED: 1 tensors" in text["WARNING"]
    assert "res4.1.conv1.weight" in text["WARNING"]
    assert "nothing else is missing" not in text["INFO"]


def test_warns_of_another_shape(detector, caplog):
    text = load(build("MODEL.ROI_HEADS.NUM_CLASSES", 3), detector, caplog)
    assert "cls_score.weight has shape (81, 16) in the checkpoint and (4, 16)" in text["WARNING"]
    assert text["WARNING"].count("NOT LOADED") == 1  # one line names all of them


def test_own_checkpoint_loads_whole(tmp_path, caplog):
    model = build()
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    text = load(build(), path, caplog)
    assert "nothing else is missing" in text["INFO"]
    assert "fresh" not in text["INFO"]
    assert not text["WARNING"]


def save(model, path):
    torch.save({"model": model.state_dict()}, path)
    return path


def refused(model, path, **options):
    """The message of the error that loading ends in."""
    with pytest.raises(CheckpointError) as error:
        NonLocalCheckpointer(model, **options).load(str(path))
    return str(error.value)


AFTER_BLOCKS = "MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"
NO_BLOCKS = (AFTER_BLOCKS, "[[], [], [], []]")


@pytest.mark.parametrize(
    ("trained", "loaded", "settings"),
    [
        (
            (),
            NO_BLOCKS,
            [
                "MODEL.BACKBONE.NAME build_nonlocal_backbone",
                f'{AFTER_BLOCKS} "[[], [], [0], []]"',
                "MODEL.NONLOCAL.PAIRWISE embedded_gaussian (or dot_product)",
                "MODEL.NONLOCAL.NORM BN (or SyncBN, FrozenBN)",
                "MODEL.NONLOCAL.REDUCTION 2",
            ],
        ),
        (
            (AFTER_BLOCKS, "[[], [0, 1], [-1], []]"),
            (),
            [f'{AFTER_BLOCKS} "[[], [0, 1], [1], []]"'],
        ),
        (("MODEL.NONLOCAL.REDUCTION", 4), (), ["MODEL.NONLOCAL.REDUCTION 4"]),
        (
            ("MODEL.NONLOCAL.PAIRWISE", "gaussian"),
            (),
            ["MODEL.NONLOCAL.PAIRWISE gaussian"],
        ),
        (
            (),
            ("MODEL.NONLOCAL.PAIRWISE", "gaussian"),
            ["MODEL.NONLOCAL.PAIRWISE embedded_gaussian (or dot_product)"],
        ),
        (
            ("MODEL.NONLOCAL.PAIRWISE", "concatenation"),
            (),
            ["MODEL.NONLOCAL.PAIRWISE concatenation"],
        ),
        (("MODEL.NONLOCAL.NORM", ""), (), ['MODEL.NONLOCAL.NORM ""']),
        ((), ("MODEL.NONLOCAL.NORM", ""), ["MODEL.NONLOCAL.NORM BN (or SyncBN, FrozenBN)"]),
        (("MODEL.NONLOCAL.NORM", "GN"), (), ["MODEL.NONLOCAL.NORM GN (or LN)"]),
    ],
)
def test_other_blocks_are_an_error_that_says_what_to_set(trained, loaded, settings, tmp_path):
    path = tmp_path / "model.pth"
    save_checkpoint(build_backbone(*trained).state_dict(), path)
    message = refused(build_backbone(*loaded), path)
    assert str(path) in message
    assert message.splitlines()[1:] == [f"    {setting}" for setting in settings]


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_other_blocks_are_an_error_in_every_format(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    save_checkpoint(build_backbone().state_dict(), path)
    message = refused(build_backbone("MODEL.NONLOCAL.PAIRWISE", "gaussian"), path)
    assert "MODEL.NONLOCAL.PAIRWISE embedded_gaussian" in message


def test_blocks_of_a_keypoint_head_are_an_error_that_says_what_to_set(tmp_path):
    path = save(
        build(*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NAME", "NonLocalKeypointHead"),
        tmp_path / "m.pth",
    )
    message = refused(build(*KEYPOINTS), path)
    assert "MODEL.ROI_KEYPOINT_HEAD.NAME NonLocalKeypointHead" in message
    assert "MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY 2" in message
    assert AFTER_BLOCKS not in message  # these the model has


def test_blocks_may_be_added_to_blocks(tmp_path, caplog):
    path = tmp_path / "model.pth"
    save_checkpoint(build_backbone().state_dict(), path)
    text = load(build_backbone(AFTER_BLOCKS, "[[], [1], [0], []]"), path, caplog)
    assert "start fresh: bottom_up.res3.nonlocal1; nothing else" in text["INFO"]


def test_strict_admits_fresh_blocks(detector, caplog):
    NonLocalCheckpointer(build(), strict=True).load(str(detector))


@pytest.mark.parametrize("kind", ["missing", "unused", "shape", "classifier"])
def test_strict_refuses_all_else(kind, plain, classifier, tmp_path):
    weights = plain.state_dict()
    path = tmp_path / "model.pth"
    name = "roi_heads.box_predictor.cls_score.bias"
    if kind == "missing":
        del weights[name]
        expected = f"1 fresh: {name}"
    elif kind == "unused":
        weights["classifier.fc.weight"] = torch.zeros(3)
        expected = "1 unused: classifier.fc.weight"
    elif kind == "shape":
        weights[name] = torch.zeros(3)
        expected = f"1 of another shape: {name}"
    save_checkpoint(weights, path)
    if kind == "classifier":
        path, expected = classifier, "1 unused: linear.bias"
    message = refused(build(), path, strict=True)
    assert expected in message
    assert str(path) in message


def test_strict_refuses_no_weights_at_all():
    assert "MODEL.WEIGHTS is empty" in refused(build_backbone(), "", strict=True)


def test_report_has_every_tensor(plain, tmp_path, caplog):
    weights = plain.state_dict()
    weights["extra"] = torch.zeros(2, 3)
    weights["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(3)
    del weights["roi_heads.box_head.fc1.bias"]
    path = tmp_path / "model.pth"
    save_checkpoint(weights, path)
    model = build()
    with caplog.at_level(logging.INFO, logger="nl_detectron.engine.checkpoint"):
        logging.getLogger("nl_detectron").propagate = True
        NonLocalCheckpointer(model, report=True).load(str(path))
    (table,) = (r.getMessage() for r in caplog.records if "Weights from" in r.getMessage())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    loaded = {module: detail for kind, module, detail in rows if kind == "loaded"}
    assert loaded["backbone.bottom_up.res5.*"].startswith("25 tensors, ")
    assert loaded["proposal_generator.*"].startswith("6 tensors, ")
    count = sum(int(d.split()[0]) if "tensors" in d else 1 for d in loaded.values())
    others = [row for row in rows if row[0] != "loaded"]
    in_model = [row for row in others if row[0] != "unused"]
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    assert count + len(in_model) + len(counters) == len(model.state_dict())
    block = "backbone.bottom_up.res4.nonlocal0"
    assert ["fresh", f"{block}.norm.weight", "(256,) all 0"] in others
    (theta,) = (row for row in others if row[1] == f"{block}.theta.weight")
    assert theta[2].startswith("(128, 256, 1, 1) random: mean ")
    assert float(theta[2].split()[-1]) == pytest.approx(0.01, rel=0.05)
    assert ["fresh", "roi_heads.box_head.fc1.bias", "(16,) all 0"] in others
    shapes = "(3,) in the checkpoint, (81,) in the model"
    assert ["shape mismatch", "roi_heads.box_predictor.cls_score.bias", shapes] in others
    assert ["unused", "extra", "(2, 3) in the checkpoint"] in others


def test_report_of_another_shape_under_a_shorter_name(plain, tmp_path, caplog):
    weights = plain.backbone.bottom_up.state_dict()
    weights["res5.1.conv2.weight"] = torch.zeros(3)
    path = tmp_path / "model.pkl"
    save_checkpoint(weights, path)
    text = load(build(), path, caplog)
    assert "res5.1.conv2.weight has shape (3,) in the checkpoint" in text["WARNING"]


def test_caffe2_and_pycls_files(plain, tmp_path, caplog):
    name = "res4.1.conv1.weight"
    tensor = torch.randn_like(plain.backbone.bottom_up.state_dict()[name])
    blobs = {"res4_1_branch2a_w": tensor.numpy(), "res4_1_branch2a_w_momentum": tensor.numpy()}
    files = {"detectron.pkl": {"blobs": blobs, "cfg": "MODEL: x"}, "imagenet.pkl": blobs}
    for file, content in files.items():
        (tmp_path / file).write_bytes(pickle.dumps(content, protocol=2))
    torch.save(
        {"model_state": {name: tensor, "epoch.num_batches_tracked": tensor}},
        tmp_path / "pycls.pyth",
    )
    for file in (*files, "pycls.pyth"):
        model = build()
        text = load(model, tmp_path / file, caplog)
        assert torch.equal(model.backbone.bottom_up.state_dict()[name], tensor), file
        assert "Not used" not in text["INFO"]


@pytest.mark.skipif(
    not hasattr(DetectionCheckpointer, "_torch_load"), reason="this Detectron2 has no queries"
)
def test_matching_by_suffix_where_the_url_asks_for_it(plain, tmp_path):
    path = tmp_path / "body.pth"
    weights = {
        name: torch.rand_like(t) for name, t in plain.backbone.bottom_up.state_dict().items()
    }
    save_checkpoint(weights, path)
    model = build()
    NonLocalCheckpointer(model).load(f"{path}?matching_heuristics=True")
    loaded = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("words", [["--eval-only"], []])
def test_the_command_line_ends_in_the_same_errors(words, tmp_path):
    path = tmp_path / "weights.pth"
    save_checkpoint(model_zoo.get_model("quick_start", device="cpu").state_dict(), path)
    words += ["--config-file", model_zoo.get_config_file("quick_start"), "--strict-weights"]
    words += ["--traceback", "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(path)]
    for overrides, message in (
        (["MODEL.FPN.OUT_CHANNELS", "32"], "Strict loading"),
        (["MODEL.NONLOCAL.REDUCTION", "4"], "MODEL.NONLOCAL.REDUCTION 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train_net.main(parse_arguments([*words, *overrides]))


def test_files_of_other_programs_are_named(tmp_path):
    path = tmp_path / "mmdetection.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": {"epoch": 1}}, path)
    message = refused(build_backbone(), path)
    assert str(path) in message
    assert "tools/convert_weights.py" in message


def test_nothing_in_a_file_is_run(tmp_path):
    evidence = tmp_path / "evidence"
    for suffix in (".pth", ".pkl", ".pyth"):
        path = tmp_path / f"model{suffix}"
        content = {"model": {"a": MakesFolder(evidence)}, "__author__": "x"}
        if suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        assert str(path) in refused(build_backbone(), path)
        assert not evidence.exists()


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modules", [["fpn_output3", "bottom_up.res4.0.conv2"], []])
def test_weights_of_blocks_after_modules_are_never_dropped_in_silence(modules, tmp_path):
    name = "build_nonlocal_backbone" if modules else "build_balanced_fpn_backbone"
    models = []
    for overrides in (
        [AFTER_BLOCKS, "[]"],
        ["MODEL.BACKBONE.NAME", name, AFTER_BLOCKS, "[]", "MODEL.NONLOCAL.AFTER_MODULES", modules],
    ):
        models.append(torch.nn.Module())
        models[-1].backbone = build_backbone(*overrides)
    plain, model = models
    NonLocalCheckpointer(model, str(tmp_path)).save("with")
    NonLocalCheckpointer(plain, str(tmp_path)).save("without")
    NonLocalCheckpointer(model, strict=True).load(str(tmp_path / "with.pth"))
    NonLocalCheckpointer(model, strict=True).load(str(tmp_path / "without.pth"))
    wanted = f'MODEL.NONLOCAL.AFTER_MODULES "{modules}"' if modules else name
    with pytest.raises(CheckpointError, match=f"(?s)lacks .*{re.escape(wanted)}"):
        NonLocalCheckpointer(plain).load(str(tmp_path / "with.pth"))


class Versioned(torch.nn.Linear):
    """As the heads of Mask2Former: the tensors of an earlier version have other names."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"model": weights}])
def test_versions_of_modules_are_kept(wrap, tmp_path):
    model = torch.nn.ModuleDict({"head": Versioned(2, 2)})
    torch.save(wrap(model.state_dict()), tmp_path / "model.pth")
    NonLocalCheckpointer(model, strict=True).load(str(tmp_path / "model.pth"))
