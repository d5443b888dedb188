"""What a run on data of one's own keeps in config.yaml, and who finds it again."""

import json
import os
import shutil
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

import nl_detectron
import train_net
from nl_detectron.data.toy import make_shapes
from nl_detectron.data.toy.built_in import cache_folder
from nl_detectron.engine import build_config, parse_arguments
from nl_detectron.engine.predictor import dataset_metadata
from tests.random_model import QUICK_START

CLASSES = ["ring", "triangle", "square"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The built-in shapes as files of a user's, with pictures enough for a batch."""
    folder = tmp_path_factory.mktemp("own")
    made = make_shapes(cache_folder("shapes-v1"))
    for split in ("train", "val"):
        coco = json.loads((made / f"{split}.json").read_text())
        kept = {image["id"] for image in coco["images"][:6]}
        coco["images"] = coco["images"][:6]
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
        (folder / f"{split}.json").write_text(json.dumps(coco))
        (folder / split).symlink_to(made / split)
    return folder


@pytest.fixture
def data(shapes, tmp_path, monkeypatch):
    """A copy of them, which a test may move."""
    shutil.copytree(shapes, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("train", "val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def setup(monkeypatch):
    """The config of a command line of train_net.py, set up; as in another process."""
    for name in ("set_up_logging", "default_setup"):
        monkeypatch.setattr(train_net, name, lambda *_, **__: None)

    def setup(*words):
        for name in ("train", "val"):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
        args = parse_arguments(["--config-file", *map(str, words)])
        cfg = build_config(args.config_file, args.opts)
        train_net.setup(cfg, args)
        return cfg

    return setup


def options(folder):
    words = ["--train-json", "train.json", "--train-images", "train"]
    return [*words, "--val-json", "val.json", "--val-images", "val"]


@pytest.fixture
def run(data, setup):
    """The config.yaml that a run leaves."""
    cfg = setup(QUICK_START, *options(data))
    (data / "config.yaml").write_text(cfg.dump())
    return data / "config.yaml"


def test_detectron2_loads_the_config(run):
    cfg = get_cfg()
    nl_detectron.add_nonlocal_config(cfg)
    cfg.merge_from_file(str(run))
    own = cfg.DATASETS.OWN
    assert Path(own.VAL_JSON) == run.with_name("val.json")
    names = [category["name"] for category in own.CATEGORIES]
    assert names == CLASSES


@pytest.mark.parametrize("words", [[], ["--eval-only", "MODEL.WEIGHTS", "train.json"]])
def test_data_are_found_again_from_any_folder(words, run, setup, tmp_path_factory, monkeypatch):
    weights = ["MODEL.WEIGHTS", str(run)] if words else []
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    first = build_config(run)
    cfg = setup(run, *words[:1], *weights)
    assert (cfg.DATASETS, cfg.TEST) == (first.DATASETS, first.TEST)
    assert len(DatasetCatalog.get("val")) == 6
    assert ("train" in DatasetCatalog) == (not words)


def test_training_data_may_be_evaluated_on(run, setup):
    cfg = setup(run, "--eval-only", "MODEL.WEIGHTS", run, "DATASETS.TEST", "('train',)")
    assert cfg.DATASETS.TEST == ("train",)
    assert len(DatasetCatalog.get("train")) == 6


def test_names_need_no_data(run):
    for path in ("val.json", "train.json"):
        os.remove(path)
    metadata = dataset_metadata(build_config(run))
    assert metadata.thing_classes == CLASSES
    assert len(metadata.keypoint_names) == 2
    cfg = build_config(run, ["MODEL.ROI_HEADS.NUM_CLASSES", 2])  # another model's
    assert not dataset_metadata(cfg).get("thing_classes")


def test_data_that_have_moved(run, setup):
    os.rename("val.json", "moved.json")
    words = [run, "--eval-only", "MODEL.WEIGHTS", run]
    with pytest.raises(FileNotFoundError) as error:
        setup(*words)
    line = f"DATASETS.OWN.VAL_JSON is '{os.path.abspath('val.json')}', which does not exist: "
    assert str(error.value).startswith(line)
    for again in (["--val-json", "moved.json"], ["DATASETS.OWN.VAL_JSON", "moved.json"]):
        assert again[0] in str(error.value)
        setup(*words, *again)
        assert len(DatasetCatalog.get("val")) == 6


def test_other_classes_than_the_models(run, setup):
    file = Path("val.json")
    coco = json.loads(file.read_text())
    coco["categories"][0]["name"] = "oblong"
    file.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="but the model was trained on \\['ring'"):
        setup(run, "--eval-only", "MODEL.WEIGHTS", run)


def test_incomplete_options(data, setup):
    with pytest.raises(ValueError, match="--val-images are needed together"):
        setup(QUICK_START, "--train-json", "train.json", "--train-images", "train")
