import itertools
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from demo import demo
from nl_detectron.config import build_config
from tests.random_model import QUICK_START

SIZE = (64, 48)


@pytest.fixture
def run(trained, tmp_path):
    """Run the demo, by default so that a random model's predictions are drawn."""

    def run(*words, config_file=trained / "config.yaml", confidence=0.0):
        model = ["--config-file", config_file, "--weights", trained / "model_final.pth"]
        options = ["--confidence", confidence, "--output", tmp_path / "output"]
        return demo.main([str(word) for word in (*model, *options, *words)])

    return run


@pytest.fixture
def no_model(monkeypatch):
    def fail(cfg):
        raise AssertionError("a model is built")

    monkeypatch.setattr(demo, "Predictor", fail)


def random_image(size=SIZE, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return cv2.GaussianBlur(image, (0, 0), 4)


def write_images(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        cv2.imwrite(str(folder / name), random_image())
    return folder


def write_video(path, frames=4, size=SIZE, fps=12.5):
    height, width = size
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (width, height))
    for i in range(frames):
        writer.write(random_image(size, seed=i))
    writer.release()
    return path


def read_video(path):
    video = cv2.VideoCapture(str(path))
    fps = video.get(cv2.CAP_PROP_FPS)
    return list(demo.read_frames(video)), fps


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "output").iterdir())


def test_images_folders_and_patterns(run, tmp_path):
    folder = write_images(tmp_path / "in", "b.png", "a.jpg", "c.txt.PNG")
    (folder / "notes.txt").write_text("no image")
    write_images(tmp_path / "more", "x1.png", "x2.png", "y.png")
    words = ["--input", folder, tmp_path / "more" / "x*.png", folder / "a.jpg"]
    assert run(*words) == 0
    assert written(tmp_path) == ["a.jpg", "b.png", "c.txt.PNG", "x1.png", "x2.png"]
    picture = cv2.imread(str(tmp_path / "output" / "b.png"))
    enlarged = picture.shape[0] // SIZE[0]
    assert picture.shape == (SIZE[0] * enlarged, SIZE[1] * enlarged, 3)
    assert min(picture.shape[:2]) > 200  # large enough for labels
    assert (picture != random_image().repeat(enlarged, 0).repeat(enlarged, 1)).any()


@pytest.mark.parametrize("name", ["", "model_final.pth"])
def test_a_run_and_photographs(name, trained, tmp_path, monkeypatch):
    """In any order with options and overrides; names in capitals are no config keys."""
    monkeypatch.chdir(write_images(tmp_path / "in", "IMG_1.JPG", "b.png"))
    words = ["MODEL.DEVICE", "cpu", trained / name, "--confidence", 0, "IMG_1.JPG"]
    assert demo.main([*map(str, words), "b.png", "TEST.DETECTIONS_PER_IMAGE", "1"]) == 0
    pictures = sorted(path.name for path in Path("output/demo").iterdir())
    assert pictures == ["IMG_1.JPG", "b.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in/x.png", "in"], "in/config.yaml does not exist: name the config with --config-file"),
        (["no", "in/x.png"], "the run or checkpoint is no, a file that does not exist"),
        (["--input", "in/x.png"], "a RUN is needed"),
        (["{trained}"], "images behind RUN or one of the arguments --input"),
        (["{trained}", "in/x.png", "--webcam"], "images behind RUN or one of the arguments"),
        (["{trained}", "MODEL.DEVIC", "cpu", "in/x.png"], "did you mean 'MODEL.DEVICE'"),
        (["{trained}", "in/x.png", "MODEL.DEVICE"], "pairs of KEY VALUE"),
        (["{trained}", "in/x.png", "--no"], "unrecognized arguments: --no"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_bad_runs(words, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in", "x.png")
    with pytest.raises(SystemExit) as exit_info:
        demo.main([word.format(trained=trained) for word in words])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def save_rotated(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(image).save(path, exif=exif)


GRAY = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE).round().astype(np.uint8)
RGB = np.dstack([GRAY, GRAY[::-1], GRAY[:, ::-1]])
KINDS = {
    "gray": (lambda path: Image.fromarray(GRAY).save(path), np.dstack([GRAY] * 3)),
    "alpha": (lambda path: Image.fromarray(np.dstack([RGB, GRAY])).save(path), RGB),
    "palette": (lambda path: Image.fromarray(GRAY).convert("P").save(path), np.dstack([GRAY] * 3)),
    "16 bits": (
        lambda path: Image.fromarray(GRAY.astype(np.uint16) * 257).save(path),
        np.dstack([GRAY] * 3),
    ),
    "EXIF": (lambda path: save_rotated(RGB, path), np.rot90(RGB, -1)),
    "1 x 1": (lambda path: Image.fromarray(RGB[:1, :1]).save(path), RGB[:1, :1]),
    "flat": (lambda path: Image.fromarray(RGB[:2]).save(path), RGB[:2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_images(kind, run, tmp_path):
    save, expected = KINDS[kind]
    save(tmp_path / "x.png")
    assert run("--input", tmp_path / "x.png", confidence=1.0) == 0  # nothing is drawn over it
    picture = cv2.imread(str(tmp_path / "output" / "x.png"))[:, :, ::-1]
    scale = len(picture) // len(expected)
    enlarged = expected.repeat(scale, 0).repeat(scale, 1)
    assert picture.shape == enlarged.shape
    assert np.abs(picture - enlarged.astype(int)).max() <= 1


def test_a_bad_image_is_skipped(run, tmp_path, capsys):
    folder = write_images(tmp_path / "in", "a.png", "c.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:500])
    assert run("--input", folder) == 1
    assert written(tmp_path) == ["a.png", "c.png"]
    assert f"{folder / 'b.png'} cannot be read as an image" in capsys.readouterr().err


def test_compare(run, trained, tmp_path):
    write_images(tmp_path, "x.png")
    weights = trained / "model_final.pth"
    assert run("--input", tmp_path / "x.png") == 0
    alone = cv2.imread(str(tmp_path / "output" / "x.png"))
    assert run("--compare", QUICK_START, weights, "--input", tmp_path / "x.png") == 0
    both = cv2.imread(str(tmp_path / "output" / "x.png"))
    height, width = alone.shape[:2]
    assert (both[-height:, :width] == alone).all()
    assert (both[-height:, -width:] != alone).any()  # that config has other test settings
    for caption in both[:-height, :width], both[:-height, -width:]:
        assert (caption < 128).any()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["runs", "quick_start"]),
        (["--captions", "baseline", "NL"], ["baseline", "NL"]),
    ],
)
def test_captions(words, expected):
    compare = ["--compare", "configs/quick_start.yaml", "w.pth"]
    words = ["--config-file", "runs/config.yaml", "--input", "x.png", *compare, *words]
    assert demo.captions(demo.make_parser().parse_args(words)) == expected


def test_captions_of_runs_of_a_study():
    files = ["study/baseline/seed_1/config.yaml", "study/nl/seed_1/config.yaml"]
    words = ["--config-file", files[0], "--input", "x.png", "--compare", files[1], "w.pth"]
    expected = ["baseline/seed_1", "nl/seed_1"]
    assert demo.captions(demo.make_parser().parse_args(words)) == expected


@pytest.mark.parametrize("size", [SIZE, (63, 49)])
def test_video(size, run, tmp_path, monkeypatch):
    source = write_video(tmp_path / "clip.avi", size=size)
    monkeypatch.setattr(demo.time, "perf_counter", itertools.count().__next__)  # a slow machine
    assert run("--video-input", source, "MODEL.DEVICE", "cpu") == 0
    assert written(tmp_path) == ["clip.mp4"]
    frames, fps = read_video(tmp_path / "output" / "clip.mp4")
    assert (len(frames), fps) == (4, 12.5)
    originals, _ = read_video(source)
    for frame, original in zip(frames, originals):
        height, width = frame.shape[:2]
        enlarged = cv2.resize(original, (width, height), interpolation=cv2.INTER_NEAREST)
        difference = np.abs(frame.astype(int) - enlarged).max(axis=2)
        assert np.median(difference) < 64  # the frame,
        assert difference.max() > 64  # and what was found


class Camera:
    """Stands in for ``cv2.VideoCapture``: some frames, then Ctrl-C."""

    def __init__(self, frames):
        self.frames = iter([random_image()] * frames)

    def isOpened(self):
        return True

    def get(self, key):
        return 5.0 if key == cv2.CAP_PROP_FPS else -1

    def read(self):
        frame = next(self.frames, None)
        if frame is None:
            raise KeyboardInterrupt
        return True, frame


def test_webcam_until_control_c(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "VideoCapture", lambda index: Camera(frames=2) if index == 0 else None)
        patch.setattr(demo.time, "perf_counter", iter([0.0, 1.0, 1.4]).__next__)
        assert run("--webcam") == 0
    frames, _ = read_video(tmp_path / "output" / "webcam.mp4")
    assert len(frames) == 7  # 5 in each of the 1.4 s that the two took


def test_no_frames(run, monkeypatch, capsys):
    monkeypatch.setattr(cv2, "VideoCapture", lambda index: Camera(frames=0))
    assert run("--webcam") == 1
    assert "no readable frames" in capsys.readouterr().err


def test_names_of_own_classes(run, trained, tmp_path, monkeypatch):
    labels, draw_text = [], Visualizer.draw_text

    def spy(self, text, *arguments, **options):
        labels.append(text)
        return draw_text(self, text, *arguments, **options)

    monkeypatch.setattr(Visualizer, "draw_text", spy)
    write_images(tmp_path, "x.png")
    keypoints = {"keypoints": ["a", "b"], "skeleton": []}
    coco = {
        "images": [{"id": 1, "file_name": "x.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40]}],
        "categories": [{"id": i, "name": f"own{i}", **keypoints} for i in (7, 8, 9)],
    }
    (tmp_path / "val.json").write_text(json.dumps(coco))
    own = ["--val-json", tmp_path / "val.json", "--val-images", tmp_path]
    assert run(*own, "--input", tmp_path / "x.png") == 0
    assert labels
    assert all(label.startswith("own") for label in labels)

    labels.clear()  # as train_net.py keeps them in config.yaml: no option is needed
    cfg = build_config(trained / "config.yaml", ["DATASETS.TEST", "('val',)"])
    cfg.DATASETS.OWN.CATEGORIES = [{**c, "name": f"kept {c['id']}"} for c in coco["categories"]]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert run("--input", tmp_path / "x.png", config_file=tmp_path / "config.yaml") == 0
    assert labels
    assert all(label.startswith("kept ") for label in labels)

    coco["categories"].pop()
    (tmp_path / "val.json").write_text(json.dumps(coco))
    with pytest.raises(SystemExit):
        run(*own, "--input", tmp_path / "x.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --input --video-input --webcam is required"),
        (["--input", "no.png"], "no such image, folder or match: no.png"),
        (["--input", "*.gone"], "no such image, folder or match: *.gone"),
        (["--input", "."], "no images in the folder ."),
        (["--input", "x.txt"], "x.txt: OpenCV does not write images of suffix .txt"),
        (["--input", "in", "more"], "several images of the name x.png"),
        (["--input", "in", "--output", "in"], "x.png is an input"),
        (["--video-input", "no.mp4"], "the video no.mp4 does not exist"),
        (["--video-input", "x.txt"], "x.txt is no readable video"),
        (["--video-input", "x.mp4", "--output", "."], "x.mp4 is the input"),
        (["--webcam"], "there is no camera"),
        (["--input", "in", "--confidence", "1.5"], "1.5 is not between 0 and 1"),
        (["--input", "in", "--weights", "no.pth"], "no.pth, a file that does not exist"),
        (["--input", "in", "--weights", ""], "no weights are given"),
        (["--input", "in", "--config-file", "no.yaml"], "the config no.yaml does not exist"),
        (["--input", "in", "--compare", "no.yaml", "x.pth"], "the config no.yaml does not exist"),
        (["--input", "in", "--captions", "a", "b"], "--captions are for --compare"),
        (["--input", "in", "--val-json", "val.json"], "--val-images are needed together"),
        (["MODEL.MASK_ONN", "True", "--input", "in"], "did you mean 'MODEL.MASK_ON'"),
        (["MODEL.MASK_ON", "--input", "in"], "pairs of KEY VALUE"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_bad_command_lines(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: cv2.VideoWriter())  # is not opened
    write_images(tmp_path / "in", "x.png")
    write_images(tmp_path / "more", "x.png")
    for name in ("x.txt", "x.mp4", "x.pth"):
        (tmp_path / name).write_text("text")
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--config-file", str(QUICK_START), "--weights", "x.pth", *words])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_weights_that_do_not_fit_are_refused(run, tmp_path, capsys):
    write_images(tmp_path, "x.png")
    with pytest.raises(SystemExit) as exit_info:
        run("MODEL.ROI_HEADS.NUM_CLASSES", "5", "--input", tmp_path / "x.png")
    assert exit_info.value.code == 2
    assert "cls_score" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    text = capsys.readouterr().out
    options = ("--compare", "--video-input", "--webcam", "--val-json")
    for word in ("Examples", *options, "'more/*.jpg'"):
        assert word in text


def test_as_a_script(tmp_path):
    command = [sys.executable, demo.__file__, "--config-file", "no.yaml", "--input", "x.png"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].endswith("error: the config no.yaml does not exist")
    assert not any(Path(tmp_path).iterdir())
