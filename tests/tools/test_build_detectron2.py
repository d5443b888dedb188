"""The wheel builder, on small made-up archives; and the wheel itself where it is installed."""

import hashlib
import json
import os
import pickle
import random
import re
import tarfile
import zipfile
from pathlib import Path

import detectron2
import numpy as np
import pytest

import build_detectron2
from build_detectron2 import BuildError, Patch

PATCH = Patch("__init__.py", "np.int", "int", "NumPy has no such alias")

ours = pytest.mark.skipif(
    not Path(detectron2.__path__[0], "_C.py").is_file(),
    reason="the installed Detectron2 was not built by tools/build_detectron2.py",
)


@pytest.fixture
def tree(tmp_path):
    """What the source archive holds, in small."""
    tree = tmp_path / "pb1-detectron2-0.6"
    files = {
        "LICENSE": "Apache License\n",
        "setup.py": "raise RuntimeError('it needs torch')\n",
        "detectron2/__init__.py": "x = np.int(1)\n",
        "detectron2/model_zoo/__init__.py": "",
        "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
        "detectron2/model_zoo/configs/common/train.py": "",
        "detectron2/projects/__init__.py": "",
        **{f"projects/{project}/__init__.py": "" for project in build_detectron2.PROJECTS},
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


@pytest.fixture
def output(tree, tmp_path, monkeypatch):
    """An output folder that already holds the archive."""
    output = tmp_path / "output"
    output.mkdir()
    archive = output / build_detectron2.ARCHIVE_NAME
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, tree.name)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(build_detectron2, "ARCHIVE_SHA256", digest)
    monkeypatch.setattr(build_detectron2, "PATCHES", (PATCH,))
    return output


def test_wrong_hash_is_an_error_that_names_file_and_hashes(tmp_path):
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(BuildError) as error:
        build_detectron2.check_hash(archive)
    for part in (archive, hashlib.sha256(b"something else"), build_detectron2.ARCHIVE_SHA256):
        assert (part.hexdigest() if hasattr(part, "hexdigest") else str(part)) in str(error.value)


def test_patch_replaces_text(tree):
    build_detectron2.apply_patches(tree / "detectron2", (PATCH,))
    assert (tree / "detectron2" / PATCH.file).read_text() == "x = int(1)\n"


@pytest.mark.parametrize("text", ["x = int(1)\n", "x = np.int(np.int(1))\n"])
def test_patch_that_no_longer_applies_is_an_error(tree, text):
    (tree / "detectron2" / PATCH.file).write_text(text)
    with pytest.raises(BuildError, match=rf"{PATCH.file} holds 'np.int' \d times, not 1"):
        build_detectron2.apply_patches(tree / "detectron2", (PATCH,))


def test_patch_of_a_missing_file_is_an_error(tree):
    (tree / "detectron2" / PATCH.file).unlink()
    with pytest.raises(BuildError, match=PATCH.file):
        build_detectron2.apply_patches(tree / "detectron2", (PATCH,))


def test_wheel_holds_the_patched_package_and_its_projects(output):
    with zipfile.ZipFile(build_detectron2.build(output)) as wheel:
        assert wheel.read("detectron2/__init__.py") == b"x = int(1)\n"
        assert "detectron2/_C.py" in wheel.namelist()
        assert "detectron2/model_zoo/configs/Base.yaml" in wheel.namelist()
        assert "detectron2/model_zoo/configs/common/train.py" in wheel.namelist()
        assert "detectron2/projects/point_rend/__init__.py" in wheel.namelist()
        assert b"Name: detectron2\nVersion: 0.6\n" in wheel.read(
            "detectron2-0.6.dist-info/METADATA"
        )


def test_finished_wheel_is_not_built_again(output):
    wheel = build_detectron2.build(output)
    (output / build_detectron2.ARCHIVE_NAME).unlink()  # building again would miss it
    assert build_detectron2.build(output) == wheel


def test_wheel_older_than_the_tool_is_built_again(output):
    wheel = build_detectron2.build(output)
    wheel.write_bytes(b"old")
    os.utime(wheel, (0, 0))
    assert zipfile.is_zipfile(build_detectron2.build(output))


def test_interrupted_build_leaves_no_wheel(output, monkeypatch):
    def interrupted(*command):
        folder = command[command.index("--wheel-dir") + 1]
        Path(folder, build_detectron2.WHEEL_NAME).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build_detectron2, "run_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_detectron2.build(output)
    assert [path.name for path in output.iterdir()] == [build_detectron2.ARCHIVE_NAME]


def test_download_asks_the_index_that_pip_is_configured_for(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def run(*command, env):
        raise Asked(" ".join(command))

    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setattr(build_detectron2, "run_module", run)
    monkeypatch.setattr(build_detectron2.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(Asked, match=r"--index-url https://mirror\.example/simple"):
        build_detectron2.download(tmp_path / build_detectron2.ARCHIVE_NAME)


def test_installed_detectron2_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_detectron2, "installed_package", lambda: tmp_path / "detectron2")
    monkeypatch.setattr(build_detectron2, "build", lambda output: pytest.fail("it was built"))
    build_detectron2.main(["--install"])
    assert str(tmp_path / "detectron2") in capsys.readouterr().out


@ours
def test_every_compiled_operation_in_use_says_how_to_get_it():
    from detectron2 import _C

    package = Path(detectron2.__path__[0])
    sources = [*package.glob("layers/*.py"), package / "evaluation" / "fast_eval_api.py"]
    operations = {name for path in sources for name in re.findall(r"\b_C\.(\w+)", path.read_text())}
    assert "nms_rotated" in operations
    for operation in operations:
        with pytest.raises(ImportError, match=rf"_C\.{operation} .* compile Detectron2"):
            getattr(_C, operation)


@ours
def test_substitute_allows_introspection():
    from detectron2 import _C

    assert not hasattr(_C, "__wrapped__")
    assert pickle.loads(pickle.dumps(np.add)) is np.add  # pickle looks for `add` in all modules


@ours
def test_coco_evaluation_works_with_its_defaults(tmp_path):
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    box = {"bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0, "category_id": 1}
    annotations = {
        "images": [{"id": 1, "height": 100, "width": 100, "file_name": "1.png"}],
        "annotations": [{"id": 1, "image_id": 1, **box}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    json_file = tmp_path / "annotations.json"
    json_file.write_text(json.dumps({"info": {}, **annotations}))
    name = f"test_coco_evaluation_{tmp_path.name}"
    MetadataCatalog.get(name).set(
        json_file=str(json_file), thing_dataset_id_to_contiguous_id={1: 0}, thing_classes=["thing"]
    )
    prediction = Instances((100, 100))
    prediction.pred_boxes = Boxes(torch.tensor([[10.0, 20.0, 40.0, 60.0]]))
    prediction.scores = torch.tensor([0.9])
    prediction.pred_classes = torch.tensor([0])

    evaluator = COCOEvaluator(name, output_dir=str(tmp_path))
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": prediction}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    MetadataCatalog.remove(name)


@ours
def test_environment_report_says_not_compiled():
    from detectron2.utils.collect_env import collect_env_info

    assert re.search(r"detectron2\._C +not compiled", collect_env_info())


@ours
def test_state_of_torch_schedulers_is_saved():
    import torch
    from detectron2.engine.hooks import LRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    assert LRScheduler(optimizer, scheduler).state_dict()["step_size"] == 2


@ours
def test_image_without_annotations_is_replaced_by_another():
    from detectron2.data import MapDataset

    dataset = MapDataset(list(range(10)), lambda item: item if item > 4 else None)
    random.seed(0)
    assert dataset[0] > 4


@ours
def test_model_zoo_and_export_can_be_used():
    from detectron2 import model_zoo
    from detectron2.export import TracingAdapter, scripting_with_instances

    assert model_zoo.get_config(
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    ).MODEL.META_ARCHITECTURE
    assert callable(TracingAdapter)
    assert callable(scripting_with_instances)
