import json

import numpy as np
import pytest

from lab.study.runner import prepare_runs
from lab.study.study_report import (
    difference_table,
    draw_group,
    group_table,
    paper_table,
    write_report,
)


def finish(run, **aps):
    result = {"bbox/AP": 50.0, "bbox/AP50": 80.0, "seconds": 60.0, **aps}
    (run.folder / "result.json").write_text(json.dumps(result))
    lines = [{"iteration": 9, "bbox/AP": 10.0}, {"iteration": 19, "bbox/AP": result["bbox/AP"]}]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def runs(study):
    prepare_runs(study.runs)
    nl_1, baseline_1, nl_2, _ = study.runs
    finish(nl_1, **{"bbox/AP": 90.0, "segm/AP": 70.0})
    finish(nl_2, **{"bbox/AP": 93.0, "segm/AP": 70.0})
    finish(baseline_1)
    return {"nl": [nl_1, nl_2], "baseline": [baseline_1]}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_mean_deviation_and_n(runs):
    header, _, *rows = cells(group_table(runs))
    assert header == ["setting", "box AP", "box AP50", "mask AP", "n"]
    assert rows == [
        ["`nl`", "91.5 ± 2.1", "80.0 ± 0.0", "70.0 ± 0.0", "2"],
        ["`baseline`", "50.0", "80.0", "", "1"],
    ]


def test_ours_beside_the_papers(runs):
    paper = {
        "nl": {"bbox/AP": 92.5, "segm/AP": 69.0, "bbox/AP50": 81.0, "keypoints/AP": 1},
        "baseline": {"bbox/AP": 50},
    }
    header, _, *rows = cells(paper_table(runs, paper))
    assert header == ["setting", "", "ours", "paper", "ours - paper", "n", "seed noise"]
    assert rows == [
        ["`nl`", "box AP", "91.5", "92.5", "-1.0 ± 2.1", "2", "±0.7"],  # 0.6 times root of 1.5
        ["`nl`", "mask AP", "70.0", "69.0", "+1.0 ± 0.0", "2", "±0.7"],
        ["`nl`", "box AP50", "80.0", "81.0", "-1.0 ± 0.0", "2", ""],
        ["`baseline`", "box AP", "50.0", "50.0", "+0.0", "1", "±0.8"],
    ]
    assert paper_table(runs, {"nl": {"Kinetics top-1": 72.7}}) == ""


def test_the_comparison_that_counts(study, runs):
    pytest.importorskip("scipy")
    _, _, row = cells(difference_table(runs, "bbox/AP", "baseline"))
    assert row == ["`nl`", "+41.50", "", "2, 1"]  # a single run has no deviation
    finish(study.runs[3], **{"bbox/AP": 52.0})
    runs["baseline"].append(study.runs[3])
    _, _, row = cells(difference_table(runs, "bbox/AP", "baseline"))
    # Variances 4.5 and 2, so 1.803 for the difference of the means, with 1.742 degrees of freedom.
    low, high = map(float, row[2].split(" to "))
    assert (float(row[1]), (low + high) / 2) == pytest.approx((40.5, 40.5), abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.803 * 4.974, abs=0.01)
    assert difference_table(runs, "bbox/AP", "none") == ""
    compare = {"metric": "bbox/AP", "to": "baseline"}
    report = write_report({}, study.runs, study.output, "Study", compare=compare)
    assert "box AP less that of `baseline`, with Welch's interval:" in report.read_text()


def test_a_papers_other_metrics_are_in_the_table(runs):
    header, _, nl, baseline = cells(group_table(runs, {"nl": {"Kinetics top-1": 72.7}}))
    assert header[-2:] == ["n", "paper: Kinetics top-1"]
    assert (nl[-1], baseline[-1]) == ("72.7", "")


def test_figure_has_dots_and_curves(runs):
    box, mask, curves = draw_group(runs).axes
    assert [label.get_text() for label in box.get_yticklabels()] == ["nl", "baseline"]
    dots = [line for line in box.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[90.0, 93.0], [50.0]]
    assert [list(line.get_xdata()) for line in mask.lines if line.get_marker() == "o"] == [
        [70.0, 70.0],
        [],
    ]
    nl, baseline = curves.lines
    assert [nl.get_label(), baseline.get_label()] == ["nl", "baseline"]
    assert np.allclose(nl.get_xydata(), [[9, 10.0], [19, 91.5]])
    assert np.allclose(curves.collections[0].get_datalim(curves.transData).intervaly, [10, 93])


def test_report_of_an_unfinished_study(study, runs):
    report = write_report(study.plan.groups, study.runs, study.output, "Study of two")
    text = report.read_text()
    assert "noise" not in text
    assert text.startswith(
        "# Study of two\n\n3 of 4 runs are finished. A run took 60 s on average, 3 min in sum.\n"
    )
    assert text.index("## All") < text.index("group_1.png") < text.index("## One")
    for name in ("group_1.png", "group_2.png"):
        assert f"]({name})" in text
        assert (report.parent / name).read_bytes().startswith(b"\x89PNG")
    paper = {"nl": {"bbox/AP": 92.5}}
    write_report(study.plan.groups, study.runs, study.output, "Study of two", paper)
    assert report.read_text().count("Ours beside the paper's:") == 2
    assert report.read_text().count("Seed noise: ") == 1


def test_reports_without_aps(study, runs):
    for run in runs["nl"]:
        finish(run, **{"bbox/AP": float("nan")})
        line = '{"iteration": 9, "total_loss": 1.0, "bbox/AP": NaN}'
        (run.folder / "metrics.json").write_text(line)
    text = write_report(study.plan.groups, study.runs, study.output, "Study").read_text()
    assert "| nan ± nan " in text
    for run in study.runs:
        (run.folder / "result.json").unlink(missing_ok=True)
    text = write_report(study.plan.groups, study.runs, study.output, "Study").read_text()
    assert "0 of 4 runs are finished." in text
    assert text.count("No run of this group is finished.") == 2
