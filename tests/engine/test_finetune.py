"""The recipe of --finetune, its table in docs/TRAINING.md, and what is said of a schedule."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import build_lr_scheduler

import train_net
from nl_detectron.config import build_config
from nl_detectron.data.coco_json import Facts
from nl_detectron.engine import parse_arguments
from nl_detectron.engine.finetune import in_epochs, pictures, schedule, tell_schedule, use_recipe
from nl_detectron.engine.setup import drop_late_steps

ROOT = Path(__file__).resolve().parents[2]
MASK = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.yaml"
BASELINE = MASK.with_name("mask_rcnn_R_50_FPN_1x.yaml")
MACHINES = {"the CPU": (1, False), "1 GPU": (1, True), "8 GPUs": (8, True)}


@pytest.fixture
def photographs():
    """Registers so many photographs, which nobody has to load."""

    def register(number):
        DatasetCatalog.pop("train", None)
        MetadataCatalog.pop("train", None)
        DatasetCatalog.register("train", lambda: pytest.fail("the data are loaded"))
        facts = Facts(number, 5 * number, 0, 5 * number, False, False)
        MetadataCatalog.get("train").set(thing_classes=["a"], annotation_facts=facts)

    yield register
    DatasetCatalog.pop("train", None)
    MetadataCatalog.pop("train", None)


@pytest.fixture
def make(photographs, tmp_path, monkeypatch):
    """A config with the recipe, by the words of overrides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def make(number=500, *words, config_file=MASK, weights=None, device="cpu"):
        photographs(number)
        torch.save({"model": weights or {"a.weight": torch.zeros(1)}}, tmp_path / "w.pth")
        cfg = build_config(config_file, [str(word) for word in words])
        cfg.DATASETS.TRAIN, cfg.MODEL.DEVICE = ("train",), device
        if "MODEL.WEIGHTS" not in words:
            cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
        use_recipe(cfg, [str(word) for word in words[::2]])
        return cfg

    return make


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("number", [50, 500, 5000])
def test_the_table_in_the_docs(machine, number):
    processes, on_gpu = MACHINES[machine]
    values = schedule(number, processes, on_gpu, {})
    sizes = pictures(build_config(MASK), number, on_gpu)["INPUT.MIN_SIZE_TRAIN"]
    batch, iterations = values["SOLVER.IMS_PER_BATCH"], values["SOLVER.MAX_ITER"]
    period = values["TEST.EVAL_PERIOD"]
    row = [
        *(f"{number:,}", machine, batch, f"{values['SOLVER.BASE_LR']:g}", f"{iterations:,}"),
        *(f"{iterations * batch / number:.1f}", values["SOLVER.WARMUP_ITERS"]),
        *(f"{values['SOLVER.STEPS'][0]:,}", f"{min(sizes)} to {max(sizes)}"),
        f"every {period:,}" if period else "at the end",
    ]
    assert f"| {' | '.join(map(str, row))} |" in (ROOT / "docs/TRAINING.md").read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("number", [1, 50, 478, 5000, 118287])
def test_any_number_gives_a_sound_schedule(number, device, make):
    cfg = make(number, device=device)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], cfg.SOLVER.BASE_LR)
    build_lr_scheduler(cfg, optimizer)
    solver = cfg.SOLVER
    assert 0 < solver.WARMUP_ITERS < solver.STEPS[0] < solver.MAX_ITER
    assert 0 < solver.CHECKPOINT_PERIOD <= solver.MAX_ITER
    assert solver.MAX_ITER >= 240


def test_coco_gets_its_schedule():
    """12 epochs, as the 1x schedule of Detectron."""
    values = schedule(118_287, 8, True, {})
    assert abs(values["SOLVER.MAX_ITER"] - 90_000) < 2_000
    assert (values["SOLVER.IMS_PER_BATCH"], values["SOLVER.BASE_LR"]) == (16, 0.02)


def test_what_is_given_stays_and_the_rest_follows(make):
    cfg = make(500, "SOLVER.MAX_ITER", 1000, "INPUT.MIN_SIZE_TRAIN", "(99,)", "SOLVER.GAMMA", 0.5)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (1000, (800,), 100)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (99,)
    cfg = make(500, "SOLVER.IMS_PER_BATCH", 6, device="cuda")
    assert cfg.SOLVER.BASE_LR == 0.0025 * 6
    assert cfg.SOLVER.MAX_ITER == 2155
    assert make(500, "SOLVER.BASE_LR", 0.1).SOLVER.BASE_LR == 0.1


def test_a_resumed_run_keeps_its_batch_on_another_machine(make):
    saved = {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.BASE_LR": 0.01, "MODEL.WEIGHTS": "gone.pth"}
    cfg = make(500, device="cuda")
    before = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.MODEL.ANCHOR_GENERATOR.SIZES = "gone.pth", [[32]]
    use_recipe(cfg, [], {**saved, "MODEL.NONLOCAL.GAMMA_LR_FACTOR": 100.0})
    assert cfg.SOLVER == before.SOLVER
    cfg.SOLVER.IMS_PER_BATCH = 2
    use_recipe(cfg, ["SOLVER.IMS_PER_BATCH"], saved)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (6464, 0.01)


def test_blocks_start_as_their_weights_say(make):
    block = {"backbone.bottom_up.res4.nonlocal4.g.weight": torch.zeros(2, 4, 1, 1)}
    assert make().MODEL.NONLOCAL.GAMMA_LR_FACTOR == 100
    assert make(weights=block).MODEL.NONLOCAL.GAMMA_LR_FACTOR == 1
    assert make(config_file=BASELINE).MODEL.NONLOCAL.GAMMA_LR_FACTOR == 1
    assert make(500, "MODEL.NONLOCAL.GAMMA_LR_FACTOR", 7).MODEL.NONLOCAL.GAMMA_LR_FACTOR == 7


def test_smaller_pictures_have_smaller_anchors(make):
    on_gpu, on_cpu = make(device="cuda"), make()
    sizes = [cfg.MODEL.ANCHOR_GENERATOR.SIZES for cfg in (on_gpu, on_cpu)]
    assert sizes == [[[32], [64], [128], [256], [512]], [[16], [32], [64], [128], [256]]]
    assert (on_gpu.INPUT.MIN_SIZE_TEST, on_cpu.INPUT.MIN_SIZE_TEST) == (800, 320)
    for device, expected in (("cpu", sizes[1]), ("cuda", sizes[0])):  # a recipe's own config
        cfg = on_cpu.clone()
        cfg.MODEL.DEVICE = device
        use_recipe(cfg, [])
        assert expected == cfg.MODEL.ANCHOR_GENERATOR.SIZES


def test_one_line_says_what_was_chosen(make, caplog):
    caplog.set_level(logging.INFO, logger="nl_detectron")
    make(478)
    line = caplog.messages[-1]
    start = "--finetune, for 478 photographs on the CPU: 240 iterations of 2 photographs, 1.0"
    assert line.startswith(start)
    for word in ("rate 0.005", "warm-up 24", "from 192", "100 times", "192 to 256", "at the end"):
        assert word in line


def test_other_schedules_are_told_in_epochs(photographs, caplog):
    caplog.set_level(logging.INFO, logger="nl_detectron")
    photographs(500)
    cfg = build_config(MASK)
    tell_schedule(cfg)
    assert not caplog.messages  # COCO's schedule on COCO needs no comment
    cfg.DATASETS.TRAIN = ("train",)
    tell_schedule(cfg)
    assert "90,000 iterations of 16 photographs, 2,880.0 epochs. --finetune" in caplog.text
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    assert in_epochs(cfg, 500).startswith("720,000 iterations of 2 photographs, 2,880.0")


def test_nothing_to_start_from(make):
    with pytest.raises(ValueError, match="--finetune goes on from trained weights"):
        make(500, "MODEL.WEIGHTS", "")


def test_evaluation_is_no_fine_tuning(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--config-file", str(MASK), "--finetune", "--eval-only"])
    assert "--finetune is for training" in capsys.readouterr().err


def test_steps_that_a_run_does_not_reach_are_left_out():
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 20, (10, 20, 30)
    drop_late_steps(cfg)
    assert cfg.SOLVER.STEPS == (10,)


def test_a_run_ends_with_what_to_do_next(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 9, "bbox/AP": 12.34}\n')
    cfg = build_config(MASK, ["OUTPUT_DIR", str(tmp_path)])
    text = train_net.end_of(cfg)
    assert "On coco_2017_val: box AP 12.3\n" in text
    assert f"python demo/demo.py {tmp_path} PHOTO" in text
