import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import check_data
from tests import commands


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script on a dataset of three pictures; return its status, output and errors."""
    coco = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 1, "bbox": [1, 2, 30, 40]}
            for i in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    for image in coco["images"]:
        Image.new("RGB", (64, 48)).save(tmp_path / image["file_name"])

    def run(spoil, *options):
        spoil(coco, tmp_path)
        json_file = tmp_path / "mine.json"
        json_file.write_text(json.dumps(coco))
        monkeypatch.setattr(sys, "argv", ["check_data.py", str(json_file), str(tmp_path), *options])
        try:
            status = check_data.main()
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def spoil_all(coco, folder):
    (folder / "2.png").write_bytes(b"")
    coco["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": "oo"}
    coco["annotations"].append({**coco["annotations"][2], "id": 14, "bbox": [5, 5, 0, 5]})


def test_sound_data(run):
    status, output, _ = run(lambda *_: None)
    assert status == 0
    assert output.startswith("3 images, 3 annotations in ")
    assert output.endswith("\n0 errors\n0 warnings\n")


def test_lists_all_problems_with_counts(run):
    status, output, _ = run(spoil_all)
    assert status == 1
    lines = output.splitlines()[1:]
    assert [line.split(" (id")[0][:40] for line in lines] == [
        "error: annotations[0] has segmentation {",
        "error: images[1] '2.png'",
        "warning: annotations[3] has bbox [5, 5, ",
        "2 errors: 1 x wrong segmentation, 1 x ba",
        "1 warnings: 1 x empty box",
    ]
    assert lines[0].endswith("(id 11, image_id 1)")
    assert lines[1].endswith("'2.png' (id 2) is empty (0 bytes)")


def test_drop_bad_writes_a_sound_file(run, tmp_path):
    target = tmp_path / "clean.json"
    status, output, _ = run(spoil_all, "--drop-bad", str(target))
    assert status == 0
    assert output.endswith(f"{target}: 2 images, 1 annotations\n")
    clean = json.loads(target.read_text())
    assert [image["id"] for image in clean["images"]] == [1, 3]
    assert [annotation["id"] for annotation in clean["annotations"]] == [13]
    status, output, _ = run(lambda coco, _: coco.update(clean))
    assert status == 0
    assert "0 errors\n0 warnings" in output


def test_what_cannot_be_dropped_stays_an_error(run, tmp_path):
    def spoil(coco, _):
        coco["categories"].append({"id": 1, "name": "dog"})

    status, output, _ = run(spoil, "--drop-bad", str(tmp_path / "clean.json"))
    assert status == 1
    assert "error that stays: categories[0] has id 1, as have 1 others" in output


def test_mistakes_are_one_line(run, tmp_path):
    def break_json(coco, _):
        coco["images"] = {}

    def break_boxes(coco, _):
        for annotation in coco["annotations"]:
            annotation["bbox"] = [1]

    for spoil, options, message in (
        (lambda *_: None, ["--drop-bad", str(tmp_path / "mine.json")], "name another one"),
        (break_boxes, ["--drop-bad", "x"], ""),
        (break_json, [], "has no list 'images'"),
    ):
        status, _, errors = run(spoil, *options)
        assert status == 2
        (line,) = errors.splitlines()
        assert line.startswith("check_data.py: error: ")
        assert message in line


def test_entries_without_a_mask_are_named_and_left_out(run, tmp_path):
    def spoil(coco, _):
        for annotation, mask in zip(coco["annotations"], ([[1, 2, 31, 2, 31, 42]], [], None)):
            annotation["segmentation"] = mask

    status, output, _ = run(spoil, "--drop-bad", str(tmp_path / "clean.json"))
    assert status == 0
    for i in (1, 2):
        where = f"(id {11 + i}, image_id {i + 1})"
        said = f"warning: annotations[{i}] has no segmentation, as others have {where}"
        assert said in output
    assert "2 warnings: 2 x no mask" in output
    clean = json.loads((tmp_path / "clean.json").read_text())
    assert [annotation["id"] for annotation in clean["annotations"]] == [11]


def test_a_test_set_has_a_warning_and_can_be_cleaned(run, tmp_path):
    def spoil(coco, folder):
        coco["annotations"].clear()
        (folder / "2.png").write_bytes(b"")

    status, output, _ = run(spoil, "--drop-bad", str(tmp_path / "clean.json"))
    assert status == 0
    assert "warning: there are no annotations" in output
    assert len(json.loads((tmp_path / "clean.json").read_text())["images"]) == 2


def test_the_trainer_is_not_loaded():
    code = "import sys, check_data; assert not sys.modules.keys() & {'nl_detectron.engine.trainer'}"
    assert commands.run("-c", code, cwd=Path(check_data.__file__).parent).returncode == 0
