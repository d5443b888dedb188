#!/usr/bin/env python3
"""Convert weights of another implementation, so that they compute here what they computed there.

    python tools/convert_weights.py resnet50.pth R-50-torchvision.pkl
    python tools/convert_weights.py i3d_nonlocal_32x2_IN_pretrain_400k.pkl nonlocal.pkl
    python tools/convert_weights.py mmcv.pth ours.pkl --pairwise embedded_gaussian --no-scale \\
        --rename body.nl=res4.nonlocal4
    python tools/convert_weights.py ours.pth theirs.pth --to mmcv --pairwise dot_product \\
        --subsample embeddings

In: non-local blocks, alone or in a whole checkpoint, of video-nonlocal-net (Caffe2, with its
backbone if it does not convolve over time), mmcv, AlexHex7/Non-local_pytorch, SlowFast,
PyTorchVideo and timm; global context blocks of GCNet and mmcv, and mmsegmentation's disentangled
ones; keras-non-local-nets (.h5); ResNets and ResNeXts of torchvision and timm; what has
Detectron2's names already is copied.
Out: nl_detectron, or the blocks as mmcv or PyTorchVideo have them.

Prints a line for every tensor. The settings under which the result computes the same are printed
and written beside TARGET, as .yaml: merge them into a config, or name them as its _BASE_.
What the file does not tell has to be given; the error names it, and the option for it. For a
checkpoint of ours the config.yaml beside it tells.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nl_detectron.config import build_config
from nl_detectron.engine.block_settings import block_of
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.files import check_target, whole_file
from nl_detectron.layers import PAIRWISE, SUBSAMPLE
from nl_detectron.weights import SOURCES, TARGETS, Options, convert
from nl_detectron.weights.checkpoint_io import load_checkpoint, save_checkpoint


@exit_on_user_error()
def main() -> None:
    args = make_parser().parse_args()
    try:
        run(args)
    except ValueError as error:
        raise ValueError(f"{args.source} is not converted: {error}") from error


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "source", type=Path, help=".pth, .pkl, .safetensors or .h5, read as data only"
    )
    parser.add_argument(
        "target",
        type=Path,
        help=".pkl, whose names Detectron2 completes (res4... to backbone.bottom_up.res4...), or "
        ".pth or .safetensors, for names that are the model's",
    )
    parser.add_argument(
        "--family", choices=SOURCES, help="whose names the source has (default: recognised)"
    )
    parser.add_argument(
        "--to", choices=TARGETS, default="nl_detectron", help="default: %(default)s"
    )
    options = parser.add_argument_group("what the source computes, where the file does not tell")
    options.add_argument("--pairwise", choices=PAIRWISE, help="softmax or dot product, mostly")
    options.add_argument(
        "--scale",
        action=argparse.BooleanOptionalAction,
        help="are the logits of the softmax multiplied by d^-1/2?",
    )
    options.add_argument(
        "--subsample", choices=SUBSAMPLE, help="max-pooling after phi and g, of their input, none"
    )
    options.add_argument("--norm", help="kind of a norm without statistics: GN or LN")
    options.add_argument("--norm-eps", type=float, help="epsilon of the batch norm, if unusual")
    options.add_argument("--temperature", type=float, help="a disentangled block's (default: 0.05)")
    options.add_argument("--dims", type=int, choices=(1, 2, 3), help="of the result (default: 2)")
    options.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        type=old_and_new,
        help="the source's name of a block, or of what it is in, and ours; repeatable",
    )
    parser.add_argument(
        "--detector-config",
        metavar="FILE.py",
        help="mmdetection's config of a detector, for a file that does not carry it",
    )
    parser.add_overwrite()
    return parser


def old_and_new(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OLD=NEW")
    return old, new


def run(args: argparse.Namespace) -> None:
    settings_file = args.target.with_suffix(".yaml")
    for target in (args.target, settings_file):
        check_target("target", target, [args.source], overwrite=args.overwrite)
    options = {option.name: getattr(args, option.name) for option in fields(Options)}
    options["rename"] = dict(args.rename)
    if args.detector_config:
        options["detector_config"] = Path(args.detector_config).read_text(encoding="utf-8")
    checkpoint = load_checkpoint(args.source)
    options = {**options, **options_of_config(args.source, checkpoint, options)}
    conversion = convert(checkpoint, args.family, to=args.to, **options)
    model = conversion.settings.get("MODEL", {})
    if {"BACKBONE", "RESNETS"} & set(model):
        model["WEIGHTS"] = str(args.target)
        bare = any(name.startswith(("stem.", "res")) for name in conversion.state_dict)
        if bare and args.target.suffix != ".pkl":
            conversion.notes.append(
                f"Detectron2 completes names (res4... to backbone.bottom_up.res4...) in a .pkl "
                f"only, so not in {args.target}: it would load nothing."
            )
    save_checkpoint(conversion.state_dict, args.target)
    with whole_file(settings_file) as draft:
        draft.write_text(conversion.to_yaml())
    left_out = sum(not row.target for row in conversion.rows)
    print(conversion.table())
    print(
        f"\n{args.source}, recognised as {conversion.family}: {len(conversion.state_dict)} tensors"
    )
    print(f"in {args.target}, {left_out} left out. Settings, also in {settings_file}:\n")
    print(conversion.to_yaml())


def options_of_config(
    source: Path, checkpoint: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Those not given that the config.yaml beside a checkpoint of ours tells; it says so."""
    file, tensors = source.with_name("config.yaml"), checkpoint.get("model", checkpoint)
    if not file.is_file() or not any(map(block_of, tensors)):
        return {}
    node = build_config(file).MODEL.NONLOCAL
    if node.BLOCK != "NonLocalBlock":
        return {}
    keys = ("pairwise", "scale", "subsample", "norm", "temperature")
    told = {
        key: node[key.upper()] for key in keys if given[key] is None and node[key.upper()] != ""
    }
    words = " ".join(f"{key.upper()} {value}" for key, value in told.items())
    print(f"{file} tells {words or 'nothing that was not given'}\n")
    return told


if __name__ == "__main__":
    main()
