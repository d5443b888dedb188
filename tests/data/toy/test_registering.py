"""When the built-in datasets are registered: cases in forks of one fresh process."""

from tests.commands import ROOT, start_python

NOT_BEFORE = """
import os, sys
import detectron2.model_zoo, detectron2.evaluation
import nl_detectron
import nl_detectron.data
from detectron2.data import DatasetCatalog
from nl_detectron.data import register_built_in
assert "shapes_train" not in DatasetCatalog
register_built_in(["coco_2017_train", "lvis_v1_val"])
register_built_in([])
assert not any(name.startswith(("nl_detectron.data.toy", "shapely")) for name in sys.modules)

def in_fork(title, code):
    if (child := os.fork()) == 0:
        exec(code, globals())
        sys.stderr.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(title)
"""
ALL_THERE = "assert {'shapes_train', 'long_range_match_near_val'} <= set(DatasetCatalog.list())"
CONFIG = """
from nl_detectron.config import build_config
from nl_detectron.engine.setup import check_datasets, register_datasets

def check(*overrides):
    cfg = build_config("configs/quick_start.yaml", overrides)
    register_datasets(cfg)
    check_datasets(cfg)

"""
WHEN_ASKED = {
    "a name": "register_built_in(['coco_2017_train', 'long_range_match_near_val'])",
    "a config that is checked": CONFIG + "check()",
    "a misspelt name": CONFIG
    + """
try:
    check("DATASETS.TRAIN", "('shape_val',)")
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
for name in ("shapes_val", "long_range_train"):
    try:
        register_built_in(["mine", name])
    except ValueError as error:
        assert f"{name} is drawn with shapely, which is not installed" in str(error)
    else:
        raise AssertionError
"""


def test_registered_when_they_are_asked_for_and_not_before():
    cases = {title: f"{code}\n{ALL_THERE}" for title, code in WHEN_ASKED.items()}
    cases["without shapely"] = WITHOUT_SHAPELY
    forks = [f"in_fork({title!r}, {code!r})" for title, code in cases.items()]
    code = "\n".join([NOT_BEFORE, *forks])
    done = start_python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
