"""The command demo/attention.py."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from demo import attention

SIZE = (48, 80)


@pytest.fixture
def run(trained, tmp_path):
    model = ["--config-file", trained / "config.yaml", "--weights", trained / "model_final.pth"]

    def run(*words):
        words = [*model, "--output", tmp_path / "output", *words]
        attention.main([str(word) for word in words])
        return sorted(path.name for path in (tmp_path / "output").iterdir())

    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "noise.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8))
    return path


def drawn_maps(monkeypatch):
    """What is passed on to be drawn: maps and the number of arrows."""
    drawn = []
    draw = attention.draw_attention

    def spy(maps, *, arrows, plain):
        drawn.append((maps, arrows))
        return draw(maps, arrows=arrows, plain=plain)

    monkeypatch.setattr(attention, "draw_attention", spy)
    return drawn


def test_points_blocks_and_arrows(run, image, tmp_path, monkeypatch):
    drawn = drawn_maps(monkeypatch)
    gray = tmp_path / "gray.png"
    cv2.imwrite(str(gray), np.zeros(SIZE, np.uint8))
    words = ["--points", "10,20", "79.5,3", "--block", "res4.nonlocal0", "--arrows", "2"]
    files = run("--input", image, gray, *words, "--flip", "MODEL.NONLOCAL.SCALE", "False")
    assert files == ["gray.html", "gray.png", "noise.html", "noise.png"]
    assert cv2.imread(str(tmp_path / "output" / "noise.png")).std() > 10
    page = (tmp_path / "output" / "noise.html").read_text()
    assert "<title>noise.jpg</title>" in page
    assert "keypoint_head" not in page
    for maps, arrows in drawn:
        assert maps.points == [(10, 20), (79.5, 3)]
        assert [block.name for block in maps.blocks] == ["backbone.bottom_up.res4.nonlocal0"]
        assert arrows == 2


def test_a_run_and_an_image(trained, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attention.main([str(trained), str(image), "--at", "grid", "--block", "nonlocal0"])
    assert (tmp_path / "output" / "attention" / "noise.html").exists()


def test_on_a_grid(run, image, monkeypatch):
    drawn = drawn_maps(monkeypatch)
    run("--input", image, "--at", "grid", "--block", "nonlocal0")
    ((maps, _),) = drawn
    assert len(maps.points) == 9
    assert maps.points[5] == pytest.approx((80 * 5 / 6, 24))


def test_at_objects(run, image, monkeypatch):
    drawn = drawn_maps(monkeypatch)
    run("--input", image, "--confidence", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    ((maps, _),) = drawn
    assert len(maps.points) == 3
    # The centre of an object is in its box, at the least.
    assert all(attention_map for block in maps.blocks for attention_map in block.maps)


def test_shows_what_is_asked_for(run, image, monkeypatch):
    drawn = drawn_maps(monkeypatch)
    words = ["--confidence", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    for show in ([], ["--show", "weights"], ["--show", "effect"]):
        run("--input", image, *show, *words)
    assert [maps.what for maps, _ in drawn] == ["contributions", "weights", "effect"]
    assert [len(maps.blocks) for maps, _ in drawn] == [3, 3, 1]
    assert all(drawn[2][0].blocks[0].maps)


def test_flipping_gives_another_map_of_the_same_place(run, image, monkeypatch):
    drawn = drawn_maps(monkeypatch)
    words = ["--points", "10,20", "--block", "nonlocal0", "--show", "weights"]
    for flip in ([], ["--flip"]):
        run("--input", image, *words, *flip)
    (plain,), (flipped,) = [maps.blocks[0].maps for maps, _ in drawn]
    assert plain.query[0] <= 10 <= plain.query[2]
    assert flipped.query[0] <= 10 <= flipped.query[2]
    assert not np.array_equal(plain.values, flipped.values)


def test_without_objects_there_is_the_page_alone(run, image, capsys):
    assert run("--input", image, "--confidence", "1") == ["noise.html"]
    assert "nothing found with a score of 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "missing.jpg"], "missing.jpg cannot be read as an image"),
        (["--input", "IMAGE", "IMAGE"], "several images of the name noise"),
        (["--input", "IMAGE", "--points", "80.5,4"], "the point 80.5,4 lies outside the image"),
        (["--input", "IMAGE", "--points", "5;4"], "'5;4' is not of the form X,Y"),
        (["--input", "IMAGE", "--points", "1,1", "--at", "grid"], "not allowed with"),
        (["--input", "IMAGE", "--block", "res5.nonlocal1"], "'res5.nonlocal1', but backbone.bott"),
        (
            ["--input", "IMAGE", "--show", "effect", "--block", "keypoint_head.nonlocal2"],
            "nonlocal2 has no effect on scores: it is in a head after them",
        ),
        (["--input", "IMAGE", "--confidence", "1.1"], "1.1 is not between 0 and 1"),
        (["--input", "IMAGE", "--arrows", "-1"], "-1 is negative"),
        (["--input", "IMAGE", "--flip", "SOLVER.BASE"], "in pairs of KEY VALUE"),
        (["--input", "IMAGE", "--flip", "SOLVER.BASELR", "1"], "key SOLVER.BASELR"),
        (["--input", "IMAGE", "--weights", "none.pth"], "none.pth, a file that does not exist"),
        (["--input", "IMAGE", "--config-file", "none.yaml"], "the config none.yaml does not exist"),
    ],
)
def test_errors_of_the_user(run, image, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        run(*[image if word == "IMAGE" else word for word in words])
    assert error.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last_line


def test_never_replaces_an_input(run, tmp_path, capsys):
    (tmp_path / "output").mkdir()
    path = tmp_path / "output" / "picture.png"
    cv2.imwrite(str(path), np.zeros((*SIZE, 3), np.uint8))
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        run("--input", path)
    assert "picture.png would be replaced" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_help():
    command = [sys.executable, attention.__file__, "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "--points 320,240 100,80 --block res4.nonlocal4" in text
