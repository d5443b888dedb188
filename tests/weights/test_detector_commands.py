"""A detector of mmdetection's from its file to APs, pictures and fine-tuning, by the commands."""

import json
import runpy
import sys
from types import SimpleNamespace

import cv2
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from pycocotools import mask as masks

import train_net
from demo import attention, demo
from nl_detectron.config import build_config
from nl_detectron.engine import parse_arguments
from nl_detectron.weights.checkpoint_io import load_checkpoint
from tests.weights.mmdet_peer import Detector, is_installed
from tests.weights.test_mmdetection import DETECTORS, ROOT, picture

pytestmark = pytest.mark.skipif(not is_installed(), reason="mmdet is not installed")

# The size of the pictures, at which the peer finds something.
SIZES = ["INPUT.MIN_SIZE_TEST", "400", "INPUT.MAX_SIZE_TEST", "600"]


def write_coco(path, photos, instances, names):
    """What a detector found, every other instance of it and moved by 2 pixels, as the truth."""
    annotations = []
    for number, found in enumerate(instances):
        for i in range(0, len(found), 2):
            x, y, width, height = BoxMode.convert(
                found.pred_boxes.tensor[i].tolist(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
            )
            mask = torch.roll(found.pred_masks[i], 2, 1).numpy().astype("uint8", order="F")
            rle = masks.encode(mask)
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": number, "iscrowd": 0},
                    **{"category_id": found.pred_classes[i].item() % len(names) + 1},
                    **{"bbox": [x + 2, y, width, height], "area": width * height},
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    images = [
        {"id": number, "file_name": photo.name, "height": 400, "width": 600}
        for number, photo in enumerate(photos)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The file of a detector, converted by the tool; two pictures and what is to be found there."""
    folder = tmp_path_factory.mktemp("detector")
    name, model = DETECTORS["gc_r4"]
    theirs = Detector(name, picture(), **model)
    torch.save(theirs.checkpoint(), folder / "theirs.pth")
    weights, config = folder / "ours.pth", folder / "ours.yaml"
    with pytest.MonkeyPatch.context() as patch:
        tool = ROOT / "tools" / "convert_weights.py"
        patch.setattr(sys, "argv", [str(tool), str(folder / "theirs.pth"), str(weights)])
        runpy.run_path(str(tool), run_name="__main__")

    (folder / "photos").mkdir()
    photos = [folder / "photos" / "a.png", folder / "photos" / "b.png"]
    for photo, image in zip(photos, (picture(), picture().flip(2))):
        cv2.imwrite(str(photo), image.permute(1, 2, 0).numpy())
    cfg = build_config(config, ["MODEL.DEVICE", "cpu", *SIZES])
    ours = build_model(cfg).eval()
    ours.load_state_dict(load_checkpoint(weights)["model"])
    found = []
    with torch.no_grad():
        for image in (picture(), picture().flip(2)):
            found.append(ours([{"image": image.flip(0)}])[0]["instances"])
    assert cfg.INPUT.FORMAT == "RGB"
    write_coco(folder / "val.json", photos, found, [f"class {i}" for i in range(80)])
    write_coco(folder / "own.json", photos, found, ["cat", "dog", "cow"])
    model = ["--config-file", str(config)]
    return SimpleNamespace(
        folder=folder, weights=str(weights), model=model, cfg=cfg, ours=ours, expected=len(found[0])
    )


def train(converted, tmp_path, data, *words):
    data, images = str(converted.folder / data), str(converted.folder / "photos")
    files = ["--train-json", data, "--train-images", images]
    files += ["--val-json", data, "--val-images", images]
    settings = ["MODEL.WEIGHTS", converted.weights, "OUTPUT_DIR", str(tmp_path), *SIZES]
    settings += ["DATALOADER.NUM_WORKERS", "0"]
    flags = [word for word in words if word.startswith("--")]
    settings += [word for word in words if word not in flags]
    return train_net.main(parse_arguments([*converted.model, *files, *flags, *settings]))


def test_average_precisions_are_those_of_the_model(converted, tmp_path):
    words = ["--eval-only", "--strict-weights"]
    results = train(converted, tmp_path / "output", "val.json", *words)
    data = converted.folder / "val.json", converted.folder / "photos"
    register_coco_instances("converted_detector", {}, *map(str, data))
    evaluator = COCOEvaluator("converted_detector", output_dir=str(tmp_path))
    loader = build_detection_test_loader(converted.cfg, "converted_detector")
    expected = inference_on_dataset(converted.ours, loader, evaluator)
    assert results.keys() == expected.keys() == {"bbox", "segm"}
    for task in results:
        assert results[task] == pytest.approx(expected[task], rel=0, abs=0, nan_ok=True)
        assert 10 < results[task]["AP"] < 90
    inference = tmp_path / "output" / "inference" / "coco_instances_results.json"
    assert len(json.loads(inference.read_text())) > converted.expected


def test_pictures_of_what_it_finds_and_looks_at(converted, tmp_path):
    model = [*converted.model, "--weights", converted.weights]
    photos = str(converted.folder / "photos")
    found = ["--input", photos, "--output", str(tmp_path / "found"), "--confidence", "0.05"]
    demo.main([*model, *found, *SIZES])
    maps = ["--points", "300,200", "--input", f"{photos}/a.png", "--output", str(tmp_path / "maps")]
    attention.main([*model, *maps, *SIZES])
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert drawn == {"found/a.png", "found/b.png", "maps/a.png"}
    folders = converted.folder / "photos", tmp_path / "found"
    before, after = (cv2.imread(str(folder / "a.png")) for folder in folders)
    assert (before != after).any()


def test_training_goes_on_with_other_classes(converted, tmp_path, caplog):
    words = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
    words += ["INPUT.MIN_SIZE_TRAIN", "(200,)", "INPUT.MAX_SIZE_TRAIN", "300"]
    with caplog.at_level("INFO"):
        train(converted, tmp_path, "own.json", *words)
    trained = load_checkpoint(tmp_path / "model_final.pth")["model"]
    before = load_checkpoint(converted.weights)["model"]
    assert trained["roi_heads.box_predictor.cls_score.bias"].shape == (4,)
    assert trained.keys() == before.keys()
    block = "backbone.bottom_up.res4.4.conv3.nonlocal.out.weight"
    change = (trained[block] - before[block]).abs().max()
    assert 0 < change < 0.2 * before[block].abs().max()
    records = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("segm/AP" in record for record in records)
    assert all(torch.isfinite(torch.tensor(r["total_loss"])) for r in records if "total_loss" in r)
