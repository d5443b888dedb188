"""Which values --resume takes from its checkpoint, and what it says."""

import logging

import pytest
import torch
from omegaconf import OmegaConf

from nl_detectron import model_zoo
from nl_detectron.config import build_config
from nl_detectron.engine import run_config
from nl_detectron.engine.run_config import keep_values_of_checkpoint, values_to_keep

CONFIG = model_zoo.get_config_file("quick_start")
LAZY = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.py"


def resume(config, folder, caplog, processes=1, **changed):
    """Go on with a config whose checkpoint has some other values; what is said."""
    state = {"config": {**values_to_keep(config), **changed}, "processes": processes}
    trainer = {"iteration": 4, "hooks": {"ExactResume": state}}
    torch.save({"model": {}, "trainer": trainer}, folder / "model_0000004.pth")
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    logging.getLogger("nl_detectron").propagate = True
    caplog.clear()
    keep_values_of_checkpoint(config, str(folder))
    # A record may reach the capture by its logger and by the root.
    records = {id(r): r for r in caplog.records if r.name == run_config.logger.name}
    return [record.getMessage() for record in records.values()]


def value_of(node, key):
    for part in key.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("SOLVER.BASE_LR", 0.5, 0.25),
        ("SOLVER.WEIGHT_DECAY", 0.5, 0.25),
        ("SOLVER.MOMENTUM", 0.5, 0.25),
        ("SOLVER.IMS_PER_BATCH", 8, 4),
        ("SEED", 3, 5),
        ("INPUT.MIN_SIZE_TRAIN", [32], (64,)),
        ("INPUT.MAX_SIZE_TRAIN", 64, 128),
        ("MODEL.NONLOCAL.GAMMA_LR_FACTOR", 10.0, 100.0),
        ("MODEL.NONLOCAL.LR_FACTOR", 2.0, 1.0),
        ("MODEL.NONLOCAL.PAIRWISE", "gaussian", "dot_product"),
        ("DATASETS.TRAIN", ["shapes_val"], ("shapes_train",)),
    ],
)
def test_what_makes_the_run_goes_on_and_is_said(key, before, now, tmp_path, caplog):
    config = build_config(CONFIG, [key, now])
    (line,) = resume(config, tmp_path, caplog, **{key: before})
    value = value_of(config, key)
    assert type(value) is type(now)
    assert (list(value) if isinstance(value, tuple) else value) == before
    shown = list(now) if isinstance(now, tuple) else now
    assert line.startswith(
        f"--resume goes on with the checkpoint's {key} {before!r} (not {shown!r});"
    )


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("SOLVER.MAX_ITER", 77),
        ("SOLVER.STEPS", (1, 2)),
        ("SOLVER.CHECKPOINT_PERIOD", 3),
        ("SOLVER.CHECKPOINT_KEEP_LAST", 3),
        ("TEST.EVAL_PERIOD", 3),
        ("INPUT.MIN_SIZE_TEST", 99),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3),
        ("DATASETS.TEST", ("shapes_train",)),
        ("DATALOADER.NUM_WORKERS", 1),
        ("OUTPUT_DIR", "elsewhere"),
        ("MODEL.WEIGHTS", "w.pth"),
        ("MODEL.DEVICE", "cpu"),
    ],
)
def test_what_may_change_takes_effect(key, now, tmp_path, caplog):
    config = build_config(CONFIG, [key, now])
    assert key not in values_to_keep(config)
    assert resume(config, tmp_path, caplog, **{key: "before"}) == []
    assert value_of(config, key) == now


def test_all_in_one_line(tmp_path, caplog):
    config = build_config(CONFIG)
    (line,) = resume(config, tmp_path, caplog, SEED=3, VERSION=1, **{"SOLVER.BASE_LR": 0.5})
    assert "SEED 3 (not 1), SOLVER.BASE_LR 0.5 (not " in line or "SOLVER.BASE_LR 0.5 (not " in line
    assert "\n" not in line


def test_another_number_of_processes_is_said(tmp_path, caplog):
    (line,) = resume(build_config(CONFIG), tmp_path, caplog, processes=2)
    assert line == (
        "--resume goes on with 1 processes, not 2: with the same images, but not bit for bit"
    )
    scaled = build_config(CONFIG, ["SOLVER.REFERENCE_WORLD_SIZE", 8])
    with pytest.raises(ValueError, match=r"REFERENCE_WORLD_SIZE scales the run to its 2 processes"):
        resume(scaled, tmp_path, caplog, processes=2)


def test_lazy_config(tmp_path, caplog):
    config = model_zoo.get_config(LAZY)
    kept = values_to_keep(config)
    assert {"optimizer.lr", "dataloader.train.total_batch_size"} <= kept.keys()
    assert not [key for key in kept if key.startswith(("dataloader.test", "train.max_iter"))]
    size = "dataloader.train.mapper.augmentations.0.short_edge_length"
    config = OmegaConf.merge(config, {"train": {"max_iter": 7}})
    changed = {"optimizer.lr": 0.5, size: 640, "train.max_iter": 9}
    (line,) = resume(config, tmp_path, caplog, **changed)
    assert "optimizer.lr 0.5 (not 0.02)" in line
    assert (config.optimizer.lr, config.train.max_iter) == (0.5, 7)
    assert config.dataloader.train.mapper.augmentations[0].short_edge_length == 640


@pytest.mark.parametrize(
    "trainer",
    [
        *(None, {}, [], 5, {"iteration": 1}, {"iteration": "1"}, {"iteration": 2**62}),
        {"iteration": 1, "hooks": 5},
        *({"iteration": 1, "hooks": {"ExactResume": state}} for state in (5, {}, {"config": 5})),
    ],
)
def test_checkpoints_without_a_config_change_nothing(trainer, tmp_path, caplog):
    config = build_config(CONFIG)
    before = config.clone()
    torch.save({"model": {}, "trainer": trainer or {}}, tmp_path / "model_0000001.pth")
    keep_values_of_checkpoint(config, str(tmp_path if trainer is not None else tmp_path / "none"))
    assert config == before
    assert not [r for r in caplog.records if r.name == run_config.logger.name]
