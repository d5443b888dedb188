import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

import train_net
from nl_detectron.data.toy import make_shapes
from nl_detectron.data.toy.built_in import cache_folder
from nl_detectron.engine import build_config, parse_arguments
from tests.corruption import read_corrupted

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICK_START = str(CONFIGS / "quick_start.yaml")
MASK = str(CONFIGS / "COCO-InstanceSegmentation" / "mask_rcnn_R_50_FPN_nl_1x.yaml")


@pytest.fixture(autouse=True)
def _no_log(monkeypatch):
    """Nothing is written or downloaded, nor the environment looked at, which takes seconds."""
    for name in ("set_up_logging", "default_setup"):
        monkeypatch.setattr(train_net, name, lambda *args, **kwargs: None)
    monkeypatch.setattr("nl_detectron.engine.setup.PathManager.get_local_path", lambda path: path)


def config(*arguments, config_file=QUICK_START):
    args = parse_arguments(["--config-file", config_file, *arguments])
    cfg = build_config(args.config_file, args.opts)
    train_net.setup(cfg, args)
    return cfg


def test_config_file_then_overrides():
    """They may be lists and negative numbers, and options may follow them."""
    after_blocks = ["MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", "[[], [], [-1], []]"]
    numbers = ["SOLVER.BASE_LR", "0.5", "SEED", "-1", "SOLVER.GAMMA", "-1e-4"]
    no_data = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    cfg = config(*after_blocks, *numbers, *no_data, "--resume", config_file=MASK)
    assert cfg.MODEL.BACKBONE.NAME == "build_nonlocal_backbone"
    assert cfg.MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE == [[], [], [-1], []]
    assert (cfg.SOLVER.BASE_LR, cfg.SEED, cfg.SOLVER.GAMMA) == (0.5, -1, -1e-4)
    args = parse_arguments(["--config-file", QUICK_START, *numbers, "--resume"])
    assert (args.resume, args.opts) == (True, numbers)


def test_options_are_detectron2s():
    theirs = vars(default_argument_parser().parse_args(["--config-file", QUICK_START]))
    ours = vars(parse_arguments(["--config-file", QUICK_START]))
    assert theirs.items() <= ours.items()
    data = {"train_json", "train_images", "val_json", "val_images"}
    own = data | {"weights_report", "strict_weights", "traceback", "timeout", "project", "finetune"}
    assert ours.keys() - theirs.keys() == own


@pytest.mark.parametrize("value", ["--resume", "--resum"])
def test_a_key_takes_no_option_as_its_value(value, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--config-file", QUICK_START, "SOLVER.BASE_LR", value])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_datasets_must_be_registered(key):
    with pytest.raises(ValueError, match=f"DATASETS.{key} is 'shape_val'.*did you mean 'shapes_v"):
        config(f"DATASETS.{key}", "('shape_val',)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("overrides", [[], ["MODEL.DEVICE", "cuda"], ["MODEL.DEVICE", "cpu"]])
def test_runs_on_the_cpu_without_cuda(overrides):
    assert config(*overrides).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config-file is needed"),
        (["--config-file", "no.yaml"], "no.yaml does not exist"),
        (["--config-file", QUICK_START, "SOLVER.BASE_LR"], "pairs of KEY VALUE"),
        (["--config-file", QUICK_START, "--train-json", "a.json"], "a.json does not exist"),
        (["--config-file", QUICK_START, "--num-gpus", "99"], "--num-gpus is 99"),
        (["--config-file", QUICK_START, "--resum-e"], "unrecognized arguments"),
    ],
)
def test_bad_command_lines(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for word in ("Examples", "--train-json", "--resume", "REFERENCE_WORLD_SIZE", "quick_start"):
        assert word in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.NONLOCAL.PAIRWSE", "MODEL.NONLOCAL.PAIRWISE"),
        ("SOLVER.BASE_RL", "SOLVER.BASE_LR"),
    ],
)
def test_unknown_keys_name_the_nearest(key, nearest, tmp_path):
    with pytest.raises(KeyError, match=f"{key}.*did you mean '{nearest}'"):
        config(key, "1")
    path = tmp_path / "config.yaml"
    *sections, leaf = key.split(".")
    text = "VERSION: 2\n"
    for depth, section in enumerate(sections):
        text += "  " * depth + f"{section}:\n"
    path.write_text(text + "  " * len(sections) + f"{leaf}: 1\n")
    with pytest.raises(KeyError, match=f"{key}.*did you mean '{nearest}'"):
        config(config_file=str(path))


def test_yaml_runs_no_python(tmp_path):
    evidence = tmp_path / "evidence"
    path = tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{evidence}']\nVERSION: 2\n")
    with pytest.raises(Exception, match="python/object"):
        config(config_file=str(path))
    assert not evidence.exists()


def test_corrupt_config_files(tmp_path):
    path = tmp_path / "config.yaml"
    errors = (ValueError, KeyError)
    content = Path(QUICK_START).read_bytes()
    num_refused = read_corrupted(content, path, lambda p: config(config_file=str(p)), errors)
    assert num_refused > 50


@pytest.mark.parametrize(
    "text",
    ["", "- 1", "text", "_BASE_: self.yaml", "_BASE_: no.yaml", "VERSION: 99", "MODEL: 1", "\0"],
)
def test_other_files_are_named(text, tmp_path):
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"self\.yaml cannot be read as a config: \w"):
        config(config_file=str(path))


def test_own_data_sets_classes_and_keypoints(tmp_path):
    root = make_shapes(cache_folder("shapes-v1"))
    paths = {}
    for split in ("train", "val"):
        coco = json.loads((root / f"{split}.json").read_text())
        coco["categories"] = [c for c in coco["categories"] if c["id"] <= 2]
        coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] <= 2]
        paths[split] = tmp_path / f"{split}.json"
        paths[split].write_text(json.dumps(coco))
    cfg = config(
        *("--train-json", str(paths["train"]), "--train-images", str(root / "train")),
        *("--val-json", str(paths["val"]), "--val-images", str(root / "val")),
        *("MODEL.KEYPOINT_ON", "True"),
        config_file=MASK,
    )
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2
    assert len(cfg.TEST.KEYPOINT_OKS_SIGMAS) == 2


def test_weights_must_exist(tmp_path):
    missing = str(tmp_path / "nothere.pth")
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS is .*nothere\.pth"):
        config("MODEL.WEIGHTS", missing)
    # What --resume goes on from may be another file.
    config("--resume", "MODEL.WEIGHTS", missing)
    config("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    (tmp_path / "nothere.pth").touch()
    config("MODEL.WEIGHTS", missing)
