from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import even_attention  # noqa: F401  the project of even_attention.yaml
import nl_detectron.data.toy  # noqa: F401  its datasets
from lab.study.plan import load_plan
from lab.study.runner import start_command

ROOT = Path(__file__).resolve().parents[3]
STUDIES = sorted((ROOT / "lab" / "studies").glob("*.yaml"))
PLAN = {
    "config": str(ROOT / "configs" / "quick_start.yaml"),
    "seeds": [3, 1],
    "settings": {"nl": None, "dot-product": {"MODEL.NONLOCAL.PAIRWISE": "dot_product"}},
    "groups": {"Pairwise functions": ["nl", "dot-product"]},
}

DATA = dict.fromkeys(("train_json", "train_images", "val_json", "val_images"), "a")


@pytest.fixture
def load(tmp_path):
    def load(**changes):
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
        return load_plan(path)

    return load


def test_runs_and_their_configs(load, tmp_path):
    """Every setting with the first seed comes first."""
    runs = load().runs(tmp_path)
    order = [("nl", 3), ("dot-product", 3), ("nl", 1), ("dot-product", 1)]
    assert [(run.setting, run.seed) for run in runs] == order
    assert runs[3].folder == tmp_path / "dot-product" / "seed_1"
    assert len({run.folder for run in runs}) == 4
    configs = [CfgNode.load_cfg(run.config) for run in runs]
    assert [cfg.SEED for cfg in configs] == [3, 3, 1, 1]
    pairwise = [cfg.MODEL.NONLOCAL.PAIRWISE for cfg in configs]
    assert pairwise == ["embedded_gaussian", "dot_product"] * 2
    assert configs[0].DATASETS.TRAIN == ["shapes_train"]


def test_weights_of_the_same_seed(load, tmp_path):
    weights = {"MODEL.WEIGHTS": "base/seed_{seed}/model_final.pth"}
    runs = load(settings={"nl": weights}, groups={"All": ["nl"]}, seeds=[3, 10]).runs(tmp_path)
    found = [CfgNode.load_cfg(run.config).MODEL.WEIGHTS for run in runs]
    assert found == ["base/seed_3/model_final.pth", "base/seed_10/model_final.pth"]


def test_configs_are_relative_to_the_plan_and_a_setting_may_have_its_own(load, tmp_path):
    for name, iterations in (("all", 7), ("own", 9)):
        (tmp_path / f"{name}.yaml").write_text(f"SOLVER: {{MAX_ITER: {iterations}}}\nVERSION: 2\n")
    own = {"config": "own.yaml", "paper": {"bbox/AP": 38}, "SOLVER.BASE_LR": 0.5}
    settings = {"nl": None, "own": own}
    plan = load(config="all.yaml", settings=settings, groups={"All": ["nl", "own"]})
    assert plan.paper == {"own": {"bbox/AP": 38}}
    of_plan, of_setting = (CfgNode.load_cfg(r.config).SOLVER for r in plan.runs(tmp_path)[:2])
    assert (of_setting.MAX_ITER, of_setting.BASE_LR) == (9, 0.5)
    assert (of_plan.MAX_ITER, of_plan.BASE_LR) == (7, 0.001)


def test_data_are_below_detectron2s_folder(load, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    files = ("train_json", "train_images", "val_json", "val_images")
    plan = load(data={**{key: key[:3] for key in files}, "sha256": {"val_json": "08da"}})
    for run in plan.part(["nl"]).runs(tmp_path):
        command = start_command(run, ["train"])
        assert command[2:10:2] == [f"--{key.replace('_', '-')}" for key in files]
        assert command[3:10:2] == [
            "elsewhere/tra",
            "elsewhere/tra",
            "elsewhere/val",
            "elsewhere/val",
        ]
        assert run.data.sha256 == {"val_json": "08da"}


def test_overrides_of_the_command_line_come_last(load, tmp_path):
    plan = load(settings={"nl": {"SOLVER.MAX_ITER": 7}}, groups={"All": ["nl"]})
    for run in plan.runs(tmp_path, ["SOLVER.MAX_ITER", "8"]):
        assert CfgNode.load_cfg(run.config).SOLVER.MAX_ITER == 8


def test_a_part_of_a_plan(load, tmp_path):
    plan = load(groups={"All": ["nl", "dot-product"], "Other": ["dot-product"]})
    part = plan.part(["nl"], [5])
    assert [(run.setting, run.seed) for run in part.runs(tmp_path)] == [("nl", 5)]
    assert part.groups == {"All": ["nl"]}
    assert plan.part() == plan
    with pytest.raises(ValueError, match=r"a setting is 'nll', .*did you mean 'nl'"):
        plan.part(["nll"])
    with pytest.raises(ValueError, match=r"seeds is \[-1\]"):
        plan.part(seeds=[-1])


def test_groups_that_compare_no_more_than_another_are_left_out(load):
    groups = {"First": ["a"], "Second": ["a", "b"], "Again": ["b", "a"], "Third": ["a", "c"]}
    plan = load(settings=dict.fromkeys("abcd"), groups=groups)
    for chosen, titles in {
        "a": ["First"],
        "ab": ["Second"],
        "bc": ["Second", "Third"],
        "abc": ["Second", "Third"],
        "d": [],
    }.items():
        assert list(plan.part([*chosen]).groups) == titles
    assert list(plan.part().groups) == list(groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"nl": {"config": 3}}}, "settings: nl: config is 3, not the path"),
        ({"settings": {"nl": {"paper": [38]}}}, r"settings: nl: paper is \[38\], not a mapping"),
        ({"settings": {"nl": {"paper": {"bbox/AP": "38"}}}}, "nl: paper: bbox/AP is '38', not a"),
        ({"seed": [1]}, "a key is 'seed', .*did you mean 'seeds'"),
        ({"groups": None}, "it has no groups"),
        ({"data": ["mine.json"]}, r"data is \['mine.json'\], not a mapping"),
        ({"data": {"train_jsn": "a"}}, "data: a key is 'train_jsn', .*did you mean 'train_json'"),
        ({"data": {"source": "a"}}, "data: train_json is None, not a path"),
        ({"data": {**DATA, "val_json": 3}}, "data: val_json is 3, not a path"),
        ({"data": {**DATA, "sha256": {"json": "0"}}}, "data: sha256: a file is 'json'"),
        ({"compare": {"metric": "segm/AP"}}, "compare is .*, not a mapping with a metric and"),
        ({"compare": {"metric": "a", "to": "nll"}}, "compare: to is 'nll', .*did you mean 'nl'"),
        ({"config": 3}, "config is 3"),
        ({"config": "none.yaml"}, "there is no file .*none.yaml"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"seeds": [-1]}, r"seeds is \[-1\]"),
        ({"seeds": [True]}, r"seeds is \[True\]"),
        ({"seeds": 1}, "seeds is 1"),
        ({"settings": ["nl"]}, r"settings is \['nl'\]"),
        ({"settings": {"../nl": {}}}, "settings: '../nl' is no name"),
        ({"settings": {"nl": "GN"}}, "settings: nl is 'GN'"),
        ({"settings": {"nl": {"SEED": 1}}}, "settings: nl: SEED is for the study"),
        ({"groups": ["nl"]}, r"groups is \['nl'\]"),
        ({"groups": {"All": []}}, r"groups: All is \[\]"),
        ({"groups": {"All": ["nll"]}}, "groups: All: a setting is 'nll', .*did you mean 'nl'"),
    ],
)
def test_bad_plans_are_refused(load, changes, message):
    with pytest.raises(ValueError, match=rf"plan\.yaml: .*{message}"):
        load(**changes)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "plan.yaml"
    for text in ("settings: [", "- nl", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"plan\.yaml"):
            load_plan(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL.NONLOCAL.PAIRWIZE": "gaussian"}, "settings: nl: .*did you mean .*PAIRWISE"),
        ({"SOLVER.BASE_LR": "fast"}, "settings: nl: .*SOLVER.BASE_LR"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(load, tmp_path, overrides, message):
    plan = load(settings={"nl": overrides}, groups={"All": ["nl"]})
    with pytest.raises(ValueError, match=message):
        plan.runs(tmp_path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_that_come_with_the_package(path, tmp_path):
    plan = load_plan(path)
    grouped = {name for names in plan.groups.values() for name in names}
    assert grouped == set(plan.settings)
    runs = plan.part(seeds=[1]).runs(tmp_path)
    assert len({run.config for run in runs}) == len(runs)  # no setting is another's twin
    for run in runs:
        cfg = CfgNode.load_cfg(run.config)
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            build_model(cfg)
        assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())


def test_quick_study_is_a_part_of_the_whole(tmp_path):
    quick, whole = (
        load_plan(ROOT / "lab" / "studies" / f"{name}.yaml") for name in ("quick", "long_range")
    )
    part = whole.part(list(quick.settings), [1])
    assert set(quick.runs(tmp_path)) == set(part.runs(tmp_path))
