"""Scripts that know nothing of this package, run on its configs and data."""

import json

import pytest
from detectron2.config import defaults, get_cfg

from nl_detectron import run
from tests import commands
from tests.commands import ROOT

SCRIPT = """
import sys
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from sibling import report

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])


def work(rank):
    report(rank, [cfg.MODEL.NONLOCAL.BLOCK, MetadataCatalog.get("own").thing_classes])


if __name__ == "__main__":
    from nl_detectron import add_nonlocal_config

    add_nonlocal_config(cfg)  # as a script that knows it does
    assert {"shapes_train", "long_range_val", "own"} <= set(DatasetCatalog.list())
    assert (__doc__, __file__) == (None, sys.argv[0])
    report("main", sys.argv[2:])
    mp.spawn(work, nprocs=2)  # as Detectron2's launch does
"""
SIBLING = """
import json, pathlib

def report(name, value):
    pathlib.Path(f"{name}.json").write_text(json.dumps(value))
"""


def test_script_and_its_processes_know_all_that_is_registered(tmp_path):
    images = [{"id": 1, "file_name": "run.py", "height": 9, "width": 9}]
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": 0, "area": 9}
    data = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "own.json").write_text(json.dumps(data))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "sibling.py").write_text(SIBLING)
    own = ["--data", "own", "own.json", str(ROOT / "nl_detectron")]
    words = ["scripts/script.py", str(ROOT / "configs" / "quick_start.yaml"), "--data", "x"]
    done = commands.run("-m", "nl_detectron.run", *own, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "main.json").read_text()) == ["--data", "x"]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["NonLocalBlock", ["cat"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.py"], "the script none.py does not exist"),
        (["."], "the script . is a folder"),
        ([], "SCRIPT.py"),
        (["--data", "own", "none.json", ".", __file__], "annotation file none.json does not exist"),
    ],
)
def test_errors_of_the_user(words, message, capsys, monkeypatch):
    monkeypatch.setattr(defaults, "_C", get_cfg())
    with pytest.raises(SystemExit) as exit_:
        run.prepare(words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
