import json
import sys
from html.parser import HTMLParser

import cv2
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from demo import proof, quick_start
from nl_detectron.analysis.partner import SquareAttention
from nl_detectron.modeling import nonlocal_blocks
from tests.random_model import save_random_model

APS = {"AP": 71.23, "AP50": 97.5, "AP75": 85.3}
NO_BLOCKS = [
    *("MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", "[[], [], [], []]"),
    *("MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY", "0"),
]
BLOCKS = ["backbone.bottom_up.res4.nonlocal0", "roi_heads.keypoint_head.nonlocal2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Show a random model and whatever it predicts; returns the output folder."""

    def run(*overrides):
        folder = tmp_path_factory.mktemp("quick_start")
        save_random_model(folder, *overrides)
        records = [{"iteration": i, "total_loss": 3.0 - i} for i in range(3)]
        for value in (1.0, APS["AP"]):
            records.append({"iteration": 2, **{f"bbox/{k}": v for k, v in APS.items()}})
            records[-1]["bbox/AP"] = value
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.json").write_text(lines)
        (folder / quick_start.WITHOUT).mkdir()
        (folder / quick_start.WITHOUT / "metrics.json").write_text(
            json.dumps({"iteration": 2, "bbox/AP": 60.0}) + "\n"
        )
        (folder / "inference").mkdir()
        for name in ("log.txt", "inference/coco_instances_results.json"):
            (folder / name).touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quick_start, "MIN_SCORE", 0.0)
            quick_start.main(["--skip-training", "OUTPUT_DIR", str(folder)])
        return folder

    return run


@pytest.fixture(scope="module")
def folder(run):
    return run()


def linked_files(page):
    files = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: files.extend(
        value for name, value in attributes if name in ("src", "href")
    )
    parser.feed(page.read_text())
    return files


def test_all_that_the_page_shows_or_links_is_beside_it(folder):
    files = linked_files(folder / "index.html")
    for name in ("curves.png", "model_final.pth", "metrics.json", "config.yaml", "log.txt"):
        assert name in files
    for name in files:
        assert (folder / name).is_file(), name
    assert sum(file.startswith("predictions/") for file in files) == 6


def test_page_says_what_was_reached_and_goes_on(folder):
    text = (folder / "index.html").read_text()
    for words in ("box AP<b>71.2</b>", "without blocks 60.0", "shapes_val", *BLOCKS):
        assert words in text
    for words in ("keypoint AP", "minutes", "$"):
        assert words not in text
    assert f"--weights {folder / 'model_final.pth'}" in text


def test_pictures_are_drawn(folder):
    for picture in [*folder.glob("*/*.png"), folder / "curves.png"]:
        image = cv2.imread(str(picture))
        assert min(image.shape[:2]) > 300
        assert image.std() > 5


def test_a_model_without_blocks(run):
    folder = run(*NO_BLOCKS)
    assert "inspect_blocks" not in (folder / "index.html").read_text()


def test_summary(run, capsys):
    folder = run(*NO_BLOCKS)
    text = capsys.readouterr().out
    for words in ("On shapes_val:", "box AP 71.2", str(folder / "index.html"), "--eval-only"):
        assert words in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.MASK_ONN", "True"], "did you mean 'MODEL.MASK_ON'"),
        (["OUTPUT_DIR"], "OUTPUT_DIR"),
        (["--skip-training", "OUTPUT_DIR", "gone"], "config.yaml does not exist; it"),
    ],
)
def test_bad_command_lines(words, message, capsys, monkeypatch):
    monkeypatch.delattr(quick_start, "run_all")
    with pytest.raises(SystemExit) as exit_info:
        quick_start.main(words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


FAKE_TRAIN = """
import json, pathlib, sys
assert sys.argv[1:3] == ["--resume", "--config-file"]
folder = pathlib.Path(sys.argv[5])
with (folder / "starts").open("a") as starts:
    starts.write("started\\n")
if folder.name == "demo" and len((folder / "starts").read_text().splitlines()) == 1:
    sys.exit(3)
(folder / "metrics.json").write_text(json.dumps({"iteration": 9, "bbox/AP": 50.0}))
"""


def test_goes_on_where_it_has_failed_or_was_interrupted(tmp_path, monkeypatch, capsys):
    fake = [sys.executable, "-c", FAKE_TRAIN]
    monkeypatch.setattr(quick_start, "train_command", lambda *_: fake)
    for name in ("trained_config", "write_page", "print_summary"):
        monkeypatch.setattr(quick_start, name, lambda *_: None)
    output = tmp_path / "demo"
    command = ["OUTPUT_DIR", str(output)]
    folders = [output, *(output / "proof" / name / "seed_1" for name in proof.PROOF_SETTINGS)]
    folders.append(output / quick_start.WITHOUT)

    def starts():
        return [len((f / "starts").read_text().splitlines()) for f in folders]

    assert quick_start.main(command) == 1
    assert starts() == [1, 1, 1, 1]
    assert "FAILED, exit status 3; see" in capsys.readouterr().out
    for _ in range(2):  # then there is nothing left to train
        assert quick_start.main(command) == 0
        assert starts() == [2, 1, 1, 1]
    assert "1 of 4: what was interrupted goes on" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quick_start.main([*command, "SOLVER.MAX_ITER", "7"])
    assert f"{output} holds a run with other settings" in capsys.readouterr().err
    assert starts() == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("classes", "boxes", "is_wrong"),
    [
        ([0, 1], [[10, 10, 30, 30], [60, 10, 80, 30]], [False, False]),
        ([1, 1], [[10, 10, 30, 30], [60, 10, 80, 30]], [True, False]),
        ([1, 0, 1], [[10, 10, 30, 30], [10, 10, 30, 30], [60, 10, 80, 30]], [True, False]),
        ([0, 1], [[10, 10, 30, 30], [80, 10, 99, 30]], [False, True]),
        ([], [], [True, True]),
    ],
)
def test_the_best_prediction_that_fits_decides(classes, boxes, is_wrong):
    instances = Instances((40, 100))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes)
    record = {
        "annotations": [
            {"category_id": i, "bbox": [x, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS}
            for i, x in enumerate((10, 60))
        ]
    }
    wrong = proof.wrong_objects(lambda _: {"instances": instances}, None, record)
    assert wrong == [a for a, is_so in zip(record["annotations"], is_wrong) if is_so]


def test_proof_shows_pictures_that_only_one_model_gets_right(tmp_path, monkeypatch):
    for setting in proof.PROOF_SETTINGS:
        folder = tmp_path / "proof" / setting / "seed_1"
        folder.mkdir(parents=True)
        match = ["DATASETS.TEST", "('long_range_match_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
        blocks = NO_BLOCKS if setting == "baseline" else NO_BLOCKS[2:]  # none in the head
        everything = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
        save_random_model(folder, *match, *everything, *blocks)
        record = {"iteration": 2, **{f"bbox/{k}": v for k, v in APS.items()}}
        (folder / "metrics.json").write_text(json.dumps(record) + "\n")

    def wrong_objects(predictor, _, record):
        return [] if list(nonlocal_blocks(predictor.model)) else record["annotations"]

    monkeypatch.setattr(proof, "wrong_objects", wrong_objects)
    is_right = True

    def planted(_, squares):
        return {"block": [SquareAttention(0, 1, 0.1, is_right, 0.1)] * len(squares)}

    monkeypatch.setattr(proof, "attention_at", planted)
    monkeypatch.setattr(proof, "NUM_INSPECTED", 2)
    html = proof.draw_proof(tmp_path)
    assert "98 without a block and 98 with a non-local block" in html
    assert "% of 4 cases" in html
    picture = cv2.imread(str(tmp_path / "proof.png"))
    assert picture.shape[0] > 3 * 96  # truth and both models
    squares = DatasetCatalog.get("long_range_match_val")[0]["annotations"]
    for x, y, _ in (square["partner"] for square in squares):  # the tips of the arrows
        column, row = round(proof.SCALE * x), round(proof.SCALE * y)
        assert picture[-proof.SCALE * 32 + row, column].min() > 200
    assert (tmp_path / "proof.html").is_file()
    monkeypatch.setattr(proof, "attention_of", lambda *_: None)
    is_right = False
    assert "No picture was found" in proof.draw_proof(tmp_path)
    is_right = True
    monkeypatch.setattr(proof, "wrong_objects", lambda *_: [])
    assert "No picture was found" in proof.draw_proof(tmp_path)


@pytest.mark.slow
def test_trains_evaluates_and_shows(tmp_path, capfd, monkeypatch):
    plan = yaml.safe_load(quick_start.PROOF.read_text())
    plan["config"] = str(quick_start.ROOT / "configs" / "long_range_match.yaml")
    few = {"SOLVER.MAX_ITER": 1, "SOLVER.STEPS": [], "SOLVER.IMS_PER_BATCH": 2}
    plan["settings"] = {name: {**plan["settings"][name], **few} for name in proof.PROOF_SETTINGS}
    plan["groups"] = {"Proof": list(proof.PROOF_SETTINGS)}
    monkeypatch.setattr(quick_start, "PROOF", tmp_path / "proof.yaml")
    quick_start.PROOF.write_text(yaml.safe_dump(plan))
    words = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"]
    words += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    assert quick_start.main([*words, "MODEL.RPN.POST_NMS_TOPK_TEST", "10"]) == 0
    assert "Trained and evaluated in" in capfd.readouterr().out
    assert "to train and evaluate" in (tmp_path / "index.html").read_text()
    for name in linked_files(tmp_path / "index.html"):
        assert (tmp_path / name).is_file(), name
