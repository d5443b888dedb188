import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from nl_detectron.analysis.curves import plot_metrics, read_curves


def write_run(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def losses(count, scale=1.0):
    return [{"iteration": 20 * i + 19, "total_loss": scale * (2 + (-1) ** i)} for i in range(count)]


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def test_reads_losses_and_aps_and_nothing_else(tmp_path):
    run = write_run(
        tmp_path,
        {"iteration": 19, "total_loss": 2.0, "loss_mask": 1.0, "lr": 0.1, "time": 0.5},
        {"iteration": 39, "total_loss": 1.0},
        {"iteration": 39, "bbox/AP": 10.0, "bbox/AP50": 20.0, "bbox/AP-person": 5.0},
    )
    curves = read_curves(run)
    assert set(curves) == {"total_loss", "loss_mask", "bbox/AP"}
    np.testing.assert_equal(curves["total_loss"], ([19, 39], [2, 1]))
    np.testing.assert_equal(curves["bbox/AP"], ([39], [10]))
    assert set(read_curves(run / "metrics.json")) == set(curves)


def test_of_repeated_iterations_the_last_counts(tmp_path):
    before = [{"iteration": i, "total_loss": 1.0} for i in (19, 39, 59)]
    resumed = [{"iteration": i, "total_loss": 0.5} for i in (39, 59, 79)]
    curves = read_curves(write_run(tmp_path, *before, *resumed))
    np.testing.assert_equal(curves["total_loss"], ([19, 39, 59, 79], [1, 0.5, 0.5, 0.5]))


def test_iterations_are_sorted_and_what_is_not_finite_is_left_out(tmp_path):
    records = [(39, 1.0), (19, 2.0), (59, float("nan")), (79, float("inf"))]
    run = write_run(tmp_path, *({"iteration": i, "total_loss": v} for i, v in records))
    np.testing.assert_equal(read_curves(run)["total_loss"], ([19, 39], [2, 1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"iteration": 19, "total_loss": 1}\n{"iterat', r"line 2.*'\{\"iterat'"),
        (b'{"total_loss": 1}\n', "line 1"),
        (b"[1, 2]\n", "line 1"),
        (b"\x80\x04\x95", "line 1"),
        (b"", "neither losses nor APs"),
        (b'{"iteration": 19, "lr": 1}\n', "neither losses nor APs"),
    ],
)
def test_broken_file_is_an_error_that_names_it(tmp_path, content, message):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        plot_metrics({"run": tmp_path})
    assert str(tmp_path / "metrics.json") in str(error.value)


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        plot_metrics({"run": tmp_path})
    with pytest.raises(ValueError, match="no run"):
        plot_metrics({})


def test_a_panel_for_each_metric_of_any_run(tmp_path):
    a = write_run(tmp_path / "a", {"iteration": 19, "loss_cls": 1.0, "total_loss": 2.0})
    b = write_run(tmp_path / "b", {"iteration": 19, "total_loss": 3.0, "segm/AP": 34.56})
    figure = plot_metrics({"R50": a, "R50 + NL": b})
    axes = panels(figure)
    assert list(axes) == ["total_loss", "loss_cls", "mask AP"]
    assert [axes[name].get_ylabel() for name in axes] == ["loss", "loss", "AP, %"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["R50", "R50 + NL"]
    assert [text.get_text() for text in axes["mask AP"].get_legend().get_texts()] == ["34.6"]
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(colors)) == 2
    assert {line.get_color() for line in axes["total_loss"].lines} == set(colors)
    assert {line.get_color() for line in axes["mask AP"].lines} == {colors[1]}


def test_weights_of_blocks_come_last_as_they_were_written(tmp_path):
    name = "nonlocal/backbone.bottom_up.res4.nonlocal4"
    records = [
        {
            "iteration": i,
            "total_loss": 1.0,
            f"{name}/mean_abs_gamma": w,
            f"{name}/out_weight_norm": 1,
        }
        for i, w in ((19, 0.0), (39, 0.125))
    ]
    run = write_run(tmp_path, *records, {"iteration": 39, "bbox/AP": 10.0})
    axes = panels(plot_metrics({"run": run}))
    gamma = r"mean $|\gamma|$, res4.nonlocal4"
    assert list(axes) == ["total_loss", "box AP", gamma, r"$\Vert W_z\Vert$, res4.nonlocal4"]
    (line,) = axes[gamma].lines
    np.testing.assert_equal(line.get_xydata(), [(19, 0), (39, 0.125)])


def test_losses_are_drawn_as_written_and_smoothed(tmp_path):
    run = write_run(tmp_path, *losses(100))
    faint, thick = panels(plot_metrics({"run": run}))["total_loss"].lines
    np.testing.assert_equal(faint.get_ydata(), [2 + (-1) ** i for i in range(100)])
    assert faint.get_linewidth() < thick.get_linewidth()
    np.testing.assert_allclose(thick.get_ydata()[2:-2], 2)  # a mean of 4
    assert len(thick.get_ydata()) == 100
    assert thick.get_ydata().max() <= 3


def test_wide_losses_have_a_logarithmic_axis(tmp_path):
    narrow = write_run(tmp_path / "a", *losses(10))
    wide = write_run(tmp_path / "b", *losses(10), *losses(5, scale=0.01))
    negative = write_run(tmp_path / "c", *losses(10), *losses(5, scale=-1))
    scales = [
        panels(plot_metrics({"run": run}))["total_loss"].get_yscale()
        for run in (narrow, wide, negative)
    ]
    assert scales == ["linear", "log", "linear"]


def test_figure_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    run = write_run(tmp_path, *losses(30), {"iteration": 600, "bbox/AP": 30.0})
    before = plt.get_fignums()
    figure = plot_metrics({f"run {i}": run for i in range(9)})  # more than there are colours
    lines = figure.legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == before
