#!/usr/bin/env python3
"""Export a trained detector to a file that runs without Detectron2 and nl_detectron.

Before the file appears it is verified, in a process that can import neither: there it finds the
same as the model, in IMAGE, in a smaller one and in a blank one. If not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from nl_detectron.engine import NonLocalCheckpointer
from nl_detectron.engine.command_line import USER_ERRORS, Parser, exit_on_user_error
from nl_detectron.engine.predictor import image_mapper, trained_config
from nl_detectron.export import FORMATS, ExportError, export_detector
from nl_detectron.files import check_target

EPILOG = """
Examples:

The model that `make demo` trains, as TorchScript:
    $ tools/export.py --config-file output/quick_start/config.yaml \\
        --weights output/quick_start/model_final.pth --image picture.png --output model.ts

Your own, without keypoints, for ONNX Runtime (onnx and onnxruntime have to be installed):
    $ tools/export.py --config-file output/config.yaml --weights output/model_final.pth \\
        --image photo.jpg --output model.onnx

The config that fits weights best is the config.yaml that train_net.py writes beside them. Faster
and Mask R-CNN can be exported in both formats, Keypoint R-CNN as TorchScript, Cascade R-CNN as ONNX
(with Detectron2's main branch traced, too): as far as Detectron2's own can.

The file takes an image of any size, and returns what is found in it before Detectron2 scales boxes
and pastes masks into the original image: nl_detectron/export/detector.py explains each output.
"""

USAGE = {
    "torchscript": """
    import torch
    import torchvision  # for its operators nms and roi_align
    detect = torch.jit.load("{file}")
    with torch.no_grad():
        found = detect(image)  # a dict of tensors""",
    "onnx": """
    import onnxruntime
    detect = onnxruntime.InferenceSession("{file}")
    names = [output.name for output in detect.get_outputs()]
    found = dict(zip(names, detect.run(names, {{"image": image}})))""",
}


def make_parser() -> Parser:
    parser = Parser(__doc__, EPILOG)
    parser.add_model_arguments()
    parser.add_argument(
        "--image",
        metavar="IMAGE",
        required=True,
        help="one in which the model finds something, to trace and verify with",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", required=True, help="to be written")
    parser.add_argument(
        "--format",
        type=exportable,
        choices=FORMATS,
        help="traced TorchScript, or ONNX (default: onnx for an --output of that suffix, else "
        "traced)",
    )
    parser.add_overwrite()
    parser.add_overrides()
    return parser


def exportable(format: str) -> str:
    if format == "scripted":
        raise argparse.ArgumentTypeError("PyTorch deprecates scripting: use traced, or onnx")
    return format


@exit_on_user_error((*USER_ERRORS, ImportError))
def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_with_overrides(arguments)
    setup_logger(name="nl_detectron")
    try:
        export(args)
    except ExportError as error:
        print(f"{args.output} is not written: {error}", file=sys.stderr)
        return 1
    return 0


def export(args: argparse.Namespace) -> None:
    cfg = trained_config(args.config_file, args.weights, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    sources = [args.config_file, cfg.MODEL.WEIGHTS, args.image]
    check_target("--output", args.output, sources, overwrite=args.overwrite)
    image = image_mapper(cfg)({"file_name": args.image})["image"].float()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    model = build_model(cfg)
    NonLocalCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
    format = args.format or ("onnx" if args.output.suffix == ".onnx" else "traced")
    export_detector(model, image, args.output, format)

    channels, height, width = image.shape
    usage = USAGE["onnx" if format == "onnx" else "torchscript"].format(file=args.output)
    print(
        f"{args.output} finds what the model finds. To run it, all that is needed is:\n{usage}\n\n"
        f"where image is ({channels}, height, width), float32, its channels {cfg.INPUT.FORMAT} "
        f"from 0 to 255, resized as in training: here to {height} x {width}."
    )


if __name__ == "__main__":
    sys.exit(main())
