"""--project: models and config keys of other people's code, in our tools."""

import json
import sys

import pytest
import torch
from detectron2.config import CfgNode, defaults, get_cfg

from nl_detectron.config import build_config
from nl_detectron.engine.command_line import Parser
from nl_detectron.project import use_project
from tests.commands import ROOT, run

CONFIG_OF_PROJECT = """
from detectron2.config import CfgNode

def add_config(cfg):
    cfg.MODEL.FOREIGN = CfgNode({"WIDTH": 0.5, "KIND": "plain"})

def add_more_config(cfg):
    cfg.MODEL.FOREIGN.KIND = "better"

def adds_config(cfg):
    raise AssertionError

add_no_config = None
"""
MODEL_OF_PROJECT = """
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.config import configurable
from .config import add_config, add_more_config

@META_ARCH_REGISTRY.register()
class Foreign(GeneralizedRCNN):
    @classmethod
    def from_config(cls, cfg):
        assert cfg.MODEL.FOREIGN.KIND == "better", cfg.MODEL.FOREIGN
        return super().from_config(cfg)
"""
CONFIG = f"""
_BASE_: {ROOT}/configs/quick_start.yaml
MODEL:
  META_ARCHITECTURE: Foreign
  DEVICE: cpu
  FOREIGN: {{WIDTH: 1}}
"""
UNDECLARED = "  UNKNOWN: {A: 1}\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package ``foreign`` and a config of its own in the working directory."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "__init__.py").write_text(MODEL_OF_PROJECT)
    (tmp_path / "foreign" / "config.py").write_text(CONFIG_OF_PROJECT)
    (tmp_path / "alone.py").write_text(CONFIG_OF_PROJECT)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(defaults, "_C", get_cfg())
    return tmp_path


@pytest.mark.parametrize("name", ["alone", "alone.py", "./alone.py", "foreign.config"])
def test_keys_of_a_project(name, project):
    use_project(name)
    for cfg in (get_cfg(), build_config("config.yaml")):
        assert cfg.MODEL.FOREIGN.KIND == "better"
    assert cfg.MODEL.FOREIGN.WIDTH == 1.0
    assert type(cfg.MODEL.FOREIGN.WIDTH) is float
    assert type(cfg) is CfgNode


def test_keys_that_nobody_declared(project, caplog):
    (project / "config.yaml").write_text(CONFIG + UNDECLARED)
    with pytest.raises(KeyError, match=r"key MODEL.FOREIGN.*--project names the code"):
        build_config("config.yaml")
    use_project("alone")
    assert build_config("config.yaml").MODEL.UNKNOWN.A == 1
    assert [record.getMessage() for record in caplog.records] == [
        "config.yaml has keys that nobody declared: MODEL.UNKNOWN, MODEL.UNKNOWN.A"
    ]
    with pytest.raises(KeyError, match=r"Unknown config key MODEL\.FOREIGN\.X"):
        build_config("config.yaml", ["MODEL.FOREIGN.X", "1"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing cannot be imported: No module named 'nothing'"),
        ("nothing.py", "nothing.py cannot be imported: the file does not exist"),
        ("broken.py", "broken.py cannot be imported: No module named 'nothing'"),
        ("wrong.py", "wrong.py cannot be imported: SyntaxError: "),
        ("two.py", "two.py cannot be imported: TypeError: add_config() missing 1 required"),
        ("json.py", "json.py cannot be imported: there is another module json, "),
    ],
)
def test_a_project_that_cannot_be_imported(name, message, project, capsys):
    (project / "broken.py").write_text("import nothing")
    (project / "json.py").write_text("")
    (project / "wrong.py").write_text("def f(:")
    (project / "two.py").write_text("def add_config(cfg, more): pass")
    with pytest.raises(SystemExit) as exit_:
        Parser("").parse_args(["--project", name])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_a_project_from_training_to_what_its_blocks_do(project):
    """Through every kind of command; the saved config needs the project again."""
    foreign = ["--project", "foreign"]
    small = [
        *("OUTPUT_DIR", "out", "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "TEST.EVAL_PERIOD", 0),
        *("DATASETS.TEST", "()", "SOLVER.GAMMA", 1),
    ]
    train = [ROOT / "train_net.py", "--config-file", "config.yaml"]
    done = run(*train, *foreign, *small, cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("res4.nonlocal") >= 2  # put in, and trained
    weights = torch.load(project / "out" / "model_final.pth", weights_only=True)["model"]
    torch.save(weights, project / "out" / "bare.pth")
    picture = next((ROOT / "docs").glob("*.png"))
    look = [ROOT / "tools" / "inspect_blocks.py", "out/bare.pth", "--image", picture]
    assert run(*look, *foreign, "--json", "blocks.json", cwd=project).returncode == 0
    assert json.loads((project / "blocks.json").read_text())[0]["block"].endswith("res4.nonlocal0")
    (project / "script.py").write_text(
        "import sys; from detectron2.config import get_cfg; from detectron2.modeling import *\n"
        "cfg = get_cfg(); cfg.merge_from_file(sys.argv[1]); print(type(build_model(cfg)).__name__)"
    )
    script = ["-m", "nl_detectron.run", *foreign, "script.py", "out/config.yaml"]
    assert run(*script, cwd=project).stdout.split() == ["Foreign"]
