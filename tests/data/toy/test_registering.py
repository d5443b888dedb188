"""When the built-in datasets are registered, in a process of its own."""

import subprocess
import sys

import pytest

NOT_BEFORE = """
import sys
import nl_detectron
import nl_detectron.data
from detectron2.data import DatasetCatalog
from nl_detectron.data import register_built_in
assert "shapes_train" not in DatasetCatalog
register_built_in(["coco_2017_train", "lvis_v1_val"])
register_built_in([])
assert not any(name.startswith(("nl_detectron.data.toy", "shapely")) for name in sys.modules)
"""
WHEN_ASKED = {
    "a name": "register_built_in(['coco_2017_train', 'long_range_match_near_val'])",
    "a config that is checked": """
from nl_detectron.config import build_config
from nl_detectron.engine.setup import check_datasets
check_datasets(build_config("configs/quick_start.yaml"))
""",
    "a misspelt name": """
from nl_detectron.config import build_config
from nl_detectron.engine.setup import check_datasets
try:
    check_datasets(build_config("configs/quick_start.yaml", ["DATASETS.TRAIN", "('shape_val',)"]))
except ValueError as error:
    assert "did you mean 'shapes_val'?" in str(error)
""",
    "the model zoo": """
from nl_detectron import model_zoo
model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x")
assert "shapes_train" not in DatasetCatalog
model_zoo.get_config("long_range")
""",
    "a function that draws": "nl_detectron.data.make_shapes",
}
WITHOUT_SHAPELY = """
sys.modules["shapely"] = None
register_built_in(["mine"])
try:
    register_built_in(["mine", "shapes_val"])
except ValueError as error:
    assert "shapes_val is drawn with shapely, which is not installed" in str(error)
else:
    raise AssertionError
"""


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("code", WHEN_ASKED.values(), ids=WHEN_ASKED)
def test_registered_when_they_are_asked_for_and_not_before(code):
    all_there = "assert {'shapes_train', 'long_range_match_near_val'} <= set(DatasetCatalog.list())"
    run(f"{NOT_BEFORE}\n{code}\n{all_there}")


def test_without_shapely():
    run(NOT_BEFORE + WITHOUT_SHAPELY)
