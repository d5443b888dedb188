#!/usr/bin/env python3
"""Draw what a trained model, or two of them side by side, finds in images or videos.

A picture of the same name for each image, or an .mp4 for a video, is written to --output.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from nl_detectron.data import register_coco_json
from nl_detectron.engine.command_line import Parser, exit_on_user_error, score
from nl_detectron.engine.drawing import legible_scale, side_by_side
from nl_detectron.engine.predictor import Predictor, dataset_metadata, model_files, trained_config
from nl_detectron.files import run_name

EPILOG = """
Examples:

What a run has learnt, on a photograph; the model that `make demo` trains, on its own pictures:
    $ demo/demo.py output photo.jpg
    $ demo/demo.py output/quick_start ~/.torch/iopath_cache/nl_detectron/shapes-v1/val

Photographs, by a folder and a pattern; whatever is found with a score from 0.7:
    $ demo/demo.py output holiday/ 'more/*.jpg' --confidence 0.7 --output pictures

A baseline on the left, a model with non-local blocks on the right:
    $ demo/demo.py --config-file baseline.yaml --weights baseline.pth \\
        --compare non_local.yaml non_local.pth --captions baseline NL \\
        --input photo.jpg --output pictures

A video; the camera, until Ctrl-C:
    $ demo/demo.py output --video-input street.mov --output videos
    $ demo/demo.py output --webcam --output videos

Names of the classes of your own data, for a run that does not have them in its config.yaml:
    $ demo/demo.py --config-file old/config.yaml --weights old/model_final.pth \\
        --val-json val.json --val-images val/ photo.jpg

The config that fits weights best is the config.yaml that train_net.py writes beside them. CUDA is
used where there is some, else the CPU. The exit status is 1 if some images could not be read.
"""

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DEFAULT_FPS = 30.0  # of cameras and files that do not tell


class Model(NamedTuple):
    caption: str
    predictor: Predictor


def make_parser() -> Parser:
    parser = Parser(__doc__, EPILOG)
    parser.add_model_arguments(or_run=True)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="images, folders of images, quoted patterns"
    )
    source.add_argument("--video-input", type=Path, metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera, until Ctrl-C")
    parser.add_argument(
        "--output", type=Path, default="output/demo", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--confidence", type=score, default=0.5, help="lowest score to draw (default: %(default)s)"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("FILE", "WEIGHTS"), help="config and weights of a second one"
    )
    parser.add_argument(
        "--captions", nargs=2, metavar=("LEFT", "RIGHT"), help="default: names of the configs"
    )
    names = parser.add_argument_group("names of the classes, for your own data in COCO's format")
    names.add_argument("--val-json", metavar="FILE", help="annotations as for train_net.py")
    names.add_argument("--val-images", metavar="DIR", help="folder of the images in it")
    parser.add_overrides("but not right behind --input; they are for both models")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_with_overrides(arguments)
    setup_logger(name="nl_detectron")
    with exit_on_user_error():
        check_combinations(args)
        args.config_file, args.weights = model_files(args)
        if args.val_json:
            register_coco_json("val", args.val_json, args.val_images)
        configs = [load_config(args, *pair) for pair in compared(args)]
        # All that can be wrong with the command line, before models are built.
        if args.images:
            targets = name_targets(find_images(args.images), args.output)
        else:
            video, target = open_video(args.video_input, args.output)
        args.output.mkdir(parents=True, exist_ok=True)
        models = [Model(*pair) for pair in zip(captions(args), map(Predictor, configs))]
    if args.images:
        failures = draw_images(targets, models)
    else:
        failures = draw_video(video, target, models, live=args.webcam)
    print(f"What was found is drawn in {args.output}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def check_combinations(args: argparse.Namespace) -> None:
    args.images += args.input or []
    if bool(args.images) + bool(args.video_input) + args.webcam != 1:
        raise ValueError(
            "images behind RUN or one of the arguments --input --video-input --webcam is required"
        )
    if args.captions and not args.compare:
        raise ValueError("--captions are for --compare, which is not given")
    if (args.val_json is None) != (args.val_images is None):
        raise ValueError("--val-json and --val-images are needed together")


def compared(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Config and weights of each model."""
    return [(args.config_file, args.weights), *([tuple(args.compare)] if args.compare else [])]


def load_config(args: argparse.Namespace, config_file: str, weights: str | None) -> CfgNode:
    cfg = trained_config(config_file, weights, args.opts)
    for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        head.SCORE_THRESH_TEST = args.confidence
    if args.val_json:
        cfg.DATASETS.TEST = ("val",)
        if not dataset_metadata(cfg).get("thing_classes"):
            raise ValueError(
                f"{args.val_json} has another number of classes or keypoints than the model of "
                f"{config_file}; name the config.yaml that train_net.py wrote"
            )
    return cfg


def captions(args: argparse.Namespace) -> Sequence[str]:
    """Those given, else the configs' names, or for a config.yaml that of its folder."""
    files = [Path(config_file) for config_file, _ in compared(args)]
    return args.captions or [
        run_name(file.parent) if file.stem == "config" else file.stem for file in files
    ]


def find_images(words: Sequence[str]) -> list[Path]:
    """The images that words name; FileNotFoundError: one is no file, folder or pattern of any."""
    images: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            found = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())
        if not found:
            kind = "no images in the folder" if path.is_dir() else "no such image, folder or match:"
            raise FileNotFoundError(f"--input: {kind} {word}")
        images += found
    return list(dict.fromkeys(images))


def name_targets(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The file of each image's picture, to be written. ValueError: it would replace an input or
    another picture, or has a suffix that OpenCV cannot write."""
    inputs = {image.resolve() for image in images}
    targets: dict[Path, Path] = {}
    for image in images:
        target = folder / image.name
        if target.resolve() in inputs:
            raise ValueError(f"{target} is an input; name another folder with --output")
        if target in targets.values():
            raise ValueError(f"--input has several images of the name {image.name}")
        if not cv2.haveImageWriter(str(target)):
            kind = f"of suffix {image.suffix}" if image.suffix else "without a suffix"
            raise ValueError(f"--input: {image}: OpenCV does not write images {kind}")
        targets[image] = target
    return targets


def open_video(file: Path | None, folder: Path) -> tuple[cv2.VideoCapture, Path]:
    """Open a video, or for None the first camera, and name the new video in ``folder``.
    FileNotFoundError, ValueError: it cannot be opened, or would be replaced."""
    target = folder / f"{file.stem if file else 'webcam'}.mp4"
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"the video {file} does not exist")
    if file is not None and target.resolve() == file.resolve():
        raise ValueError(f"{target} is the input; name another folder with --output")
    video = cv2.VideoCapture(0 if file is None else str(file))
    if not video.isOpened():
        raise ValueError("there is no camera" if file is None else f"{file} is no readable video")
    return video, target


def draw_images(targets: dict[Path, Path], models: Sequence[Model]) -> list[str]:
    """Write the pictures; returns a line for each image for which that failed."""
    failures = []
    for source, target in tqdm(targets.items(), unit="image"):
        image = cv2.imread(str(source))  # turned as its EXIF says; 8 bits; grey as BGR; no alpha
        if image is None:
            failures.append(f"{source} cannot be read as an image")
        elif not cv2.imwrite(str(target), draw(image, models)):
            failures.append(f"{target} cannot be written")
    return failures


def draw_video(
    video: cv2.VideoCapture, target: Path, models: Sequence[Model], live: bool
) -> list[str]:
    """Write the video, of a camera (`live`) until Ctrl-C; returns a line if that failed."""
    fps = video.get(cv2.CAP_PROP_FPS)
    fps = fps if fps > 0 else DEFAULT_FPS
    total = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None  # -1 or 0 if not known
    writer, written, start = None, 0, time.perf_counter()
    try:
        for frame in tqdm(read_frames(video), total=total, unit="frame"):
            picture = draw(frame, models)
            if writer is None:
                size = picture.shape[1::-1]
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
                if not writer.isOpened():
                    return [f"{target} cannot be written"]
            # A camera does not wait for the model: its frame is shown for as long as that took.
            elapsed = round((time.perf_counter() - start) * fps)
            repeats = max(elapsed - written, 1) if live else 1
            for _ in range(repeats):
                writer.write(picture)
            written += repeats
    except KeyboardInterrupt:
        if not live:
            raise
    finally:
        if writer is not None:
            writer.release()
    return [] if writer else ["the video has no readable frames"]


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        is_frame, frame = video.read()
        if not is_frame:
            return
        yield frame


def draw(image: np.ndarray, models: Sequence[Model]) -> np.ndarray:
    """What the model finds in a BGR image; with two models, in two captioned halves."""
    scale = legible_scale(image)
    pictures = [model.predictor.draw(image, scale) for model in models]
    if len(pictures) == 1:
        return pictures[0]
    return side_by_side(pictures, [model.caption for model in models])


if __name__ == "__main__":
    sys.exit(main())
