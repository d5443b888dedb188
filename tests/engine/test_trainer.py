"""train_net.py as a user runs it, and COCO evaluation against pycocotools."""

import json
import math
import re
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import nl_detectron.data.toy  # noqa: F401  its datasets
import train_net
from nl_detectron import NonLocalBlock
from nl_detectron.config import build_config
from nl_detectron.engine import Trainer, parse_arguments
from nl_detectron.engine.setup import use_cpu_without_cuda
from tests.commands import ROOT

QUICK_START = ["--config-file", str(ROOT / "configs" / "quick_start.yaml")]
SMALL = [
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
]
CHANGED = [
    *("SOLVER.BASE_LR", "0.5", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.5"),
    *("MODEL.NONLOCAL.GAMMA_LR_FACTOR", "7.0", "MODEL.NONLOCAL.LR_FACTOR", "3.0"),
    *("SEED", "77", "INPUT.MAX_SIZE_TRAIN", "100"),
]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def run(folder, iterations, *words):
    overrides = [*SMALL, "OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", str(iterations)]
    train_net.main(parse_arguments([*QUICK_START, *words, *overrides]))


@pytest.fixture(scope="module")
def few():
    """The first two pictures of the built-in shapes to evaluate on."""
    records = DatasetCatalog.get("shapes_val")[:2]
    DatasetCatalog.register("few_val", lambda: records)
    known = MetadataCatalog.get("shapes_val").as_dict()
    del known["name"], known["json_file"]
    MetadataCatalog.get("few_val").set(**known)
    yield ["DATASETS.TEST", "('few_val',)", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    DatasetCatalog.remove("few_val")
    MetadataCatalog.remove("few_val")


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    """Two iterations, then two more after --resume, with other values; an evaluation after each."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, 2, *few)
    first = torch.load(folder / "model_final.pth", weights_only=False)
    run(folder, 4, "--resume", *few, *CHANGED)
    shutil.copy(folder / "config.yaml", folder / "resumed.yaml")  # --eval-only writes another
    return folder, first


def test_training_writes_what_detectron2_users_expect(trained):
    folder, _ = trained
    for name in ("metrics.json", "log.txt", "config.yaml", "model_final.pth", "last_checkpoint"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("events.out.tfevents.*"))
    losses = [r for r in metrics(folder) if "total_loss" in r]
    assert losses
    for record in losses:
        for key in ("loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint"):
            assert math.isfinite(record[key])
    assert any("bbox/AP" in record for record in metrics(folder))


def test_resuming_goes_on_where_it_stopped(trained):
    folder, first = trained
    log = (folder / "log.txt").read_text()
    assert "Starting training from iteration 2" in log
    final = torch.load(folder / "model_final.pth", weights_only=False)
    assert (first["iteration"], final["iteration"]) == (1, 3)
    # The schedule and the optimizer's momentum come back too.
    assert final["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 4
    assert first["trainer"]["_trainer"]["optimizer"]["state"]


def test_a_resumed_run_goes_on_with_its_own_values(trained, few):
    folder, first = trained
    final = torch.load(folder / "model_final.pth", weights_only=False)
    groups = [c["trainer"]["_trainer"]["optimizer"]["param_groups"] for c in (first, final)]
    assert groups[0] == groups[1]
    expected = build_config(
        QUICK_START[1], [*few, *SMALL, "SOLVER.MAX_ITER", 4, "OUTPUT_DIR", str(folder)]
    )
    use_cpu_without_cuda(expected)
    assert (folder / "resumed.yaml").read_text() == expected.dump()
    (line,) = (r for r in (folder / "log.txt").read_text().splitlines() if "--resume goes on" in r)
    for key, value in zip(CHANGED[::2], CHANGED[1::2]):
        assert re.search(rf"{re.escape(key)} [^ ]+ \(not {value}\)", line), key


def test_momentum_is_loaded(trained):
    folder, _ = trained
    final = torch.load(folder / "model_final.pth", weights_only=False)
    cfg = build_config(folder / "config.yaml")
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    expected = final["trainer"]["_trainer"]["optimizer"]["state"]
    actual = trainer.optimizer.state_dict()["state"]
    assert actual.keys() == expected.keys() != set()
    for number, state in expected.items():
        assert torch.equal(actual[number]["momentum_buffer"], state["momentum_buffer"])


def test_every_block_learns(trained):
    folder, first = trained
    cfg = build_config(QUICK_START[1], ["OUTPUT_DIR", str(folder)])
    use_cpu_without_cuda(cfg)
    blocks = [
        n for n, m in Trainer.build_model(cfg).named_modules() if isinstance(m, NonLocalBlock)
    ]
    assert len(blocks) == 3
    final = torch.load(folder / "model_final.pth", weights_only=False)["model"]
    for block in blocks:
        for child in ("theta", "phi", "g", "out"):
            key = f"{block}.{child}.weight"
            assert not torch.equal(first["model"][key], final[key]), key


def test_weights_of_blocks_are_written(trained):
    folder, _ = trained
    final = torch.load(folder / "model_final.pth", weights_only=False)["model"]
    blocks = [key[: -len(".out.weight")] for key in final if key.endswith(".out.weight")]
    assert len(blocks) == 3
    (last,) = (record for record in metrics(folder) if record["iteration"] == 3)
    for block in blocks:
        expected = final[f"{block}.out.weight"].norm().item()
        assert last[f"nonlocal/{block}/out_weight_norm"] == pytest.approx(expected, rel=1e-5)
        gamma = final[f"{block}.norm.weight"].abs().mean().item()
        assert last[f"nonlocal/{block}/mean_abs_gamma"] == pytest.approx(gamma, rel=1e-5)
        assert gamma > 0


def test_eval_only_gives_the_results_of_training(trained, few):
    folder, _ = trained
    weights = str(folder / "model_final.pth")
    words = [*few, *SMALL, "OUTPUT_DIR", str(folder), "MODEL.WEIGHTS", weights]
    results = train_net.main(parse_arguments([*QUICK_START, "--eval-only", *words]))
    assert json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    last = [record for record in metrics(folder) if "bbox/AP" in record][-1]
    for task in ("bbox", "segm", "keypoints"):
        np.testing.assert_equal(results[task]["AP"], last[f"{task}/AP"])


def test_evaluation_with_test_time_augmentation(few, tmp_path):
    words = [
        *few,
        *("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48,64)"),
        *("MODEL.KEYPOINT_ON", "False"),
    ]
    run(tmp_path, 1, *words)
    (last,) = (record for record in metrics(tmp_path) if "bbox/AP" in record)
    assert {"bbox_TTA/AP", "segm_TTA/AP50"} <= last.keys()  # beside those without
    for folder in ("inference", "inference_TTA"):
        assert json.loads((tmp_path / folder / "coco_instances_results.json").read_text())
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "OUTPUT_DIR", str(tmp_path)]
    args = parse_arguments([*QUICK_START, "--eval-only", *SMALL, *words, *weights])
    results = train_net.main(args)
    assert list(results) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    np.testing.assert_equal(results["bbox_TTA"]["AP"], last["bbox_TTA/AP"])


def test_resumed_run_keeps_the_best_checkpoint(tmp_path, monkeypatch):
    aps = iter([10, 30, 20, 20, 5])  # the third is done again on resuming
    monkeypatch.setattr(Trainer, "test", lambda *args: {"bbox": {"AP": next(aps)}})
    words = [
        *("TEST.EVAL_PERIOD", "1", "TEST.BEST_CHECKPOINT_METRIC", "bbox/AP"),
        *("SOLVER.CHECKPOINT_PERIOD", "1"),
    ]
    step = Trainer.run_step

    def killed(trainer):
        if trainer.iter == 3:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(Trainer, "run_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 4, *words)
    monkeypatch.setattr(Trainer, "run_step", step)
    run(tmp_path, 4, "--resume", *words)
    assert not list(aps)
    best, second, third = (
        torch.load(tmp_path / f"model_{name}.pth", weights_only=False)["model"]
        for name in ("best", "0000001", "0000002")
    )
    assert all(torch.equal(best[key], second[key]) for key in second)
    assert not all(torch.equal(best[key], third[key]) for key in third)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def noisy(record, rng):
    """The ground truth of an image with errors of some pixels, and with scores."""
    height, width = record["height"], record["width"]
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    instances = Instances((height, width))
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    boxes = np.reshape(boxes, (-1, 4)) + rng.normal(0, 2, (len(annotations), 4))
    instances.pred_boxes = Boxes(torch.from_numpy(boxes).float())
    instances.scores = torch.from_numpy(rng.random(len(annotations)))
    classes = [a["category_id"] if rng.random() < 0.8 else 0 for a in annotations]
    instances.pred_classes = torch.tensor(classes, dtype=torch.long)
    masks = [
        np.roll(polygons_to_bitmask(a["segmentation"], height, width), rng.integers(-2, 3), 1)
        for a in annotations
    ]
    instances.pred_masks = torch.from_numpy(np.reshape(masks, (-1, height, width))).bool()
    keypoints = np.reshape([a["keypoints"] for a in annotations], (-1, 2, 3)).astype("float32")
    keypoints[..., :2] += rng.normal(0, 1, keypoints[..., :2].shape)
    instances.pred_keypoints = torch.from_numpy(keypoints)
    return instances


def test_evaluation_is_pycocotools(tmp_path):
    cfg = build_config(QUICK_START[1], ["OUTPUT_DIR", str(tmp_path)])
    records = DatasetCatalog.get("shapes_val")
    evaluator = Trainer.build_evaluator(cfg, "shapes_val")
    evaluator.reset()
    rng = np.random.default_rng(0)
    evaluator.process(records, [{"instances": noisy(record, rng)} for record in records])
    results = evaluator.evaluate()

    truth = COCO(MetadataCatalog.get("shapes_val").json_file)
    written = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    for task in ("bbox", "segm", "keypoints"):
        detections = [dict(d) for d in written]
        for detection in detections:
            if task == "segm":  # else pycocotools takes areas from boxes
                del detection["bbox"]
        ours = COCOeval(truth, truth.loadRes(detections), task)
        if task == "keypoints":
            ours.params.kpt_oks_sigmas = np.array(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        ours.evaluate()
        ours.accumulate()
        ours.summarize()
        names = ["AP", "AP50", "AP75"]
        expected = [100 * ours.stats[i] for i in range(3)]
        np.testing.assert_allclose([results[task][n] for n in names], expected, rtol=1e-12)
        assert 20 < results[task]["AP"] < 99.9
    assert all(mask_util.area(d["segmentation"]) > 0 for d in written)
