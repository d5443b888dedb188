"""
Run a script of Detectron2, or of another project, on this package's configs and datasets.

    $ python -m nl_detectron.run detectron2/tools/visualize_data.py --source annotation \\
        --config-file configs/quick_start.yaml --output-dir pictures
    $ python -m nl_detectron.run --data val val.json val/ \\
        detectron2/tools/visualize_json_results.py --dataset val --output pictures \\
        --input output/inference/coco_instances_results.json

Before the script runs as ``__main__``, with the arguments behind it: all that the package provides
is registered, with your own data if they are named; FLOP counters learn what the blocks cost; and
``MODEL.NONLOCAL`` is added to the defaults that ``get_cfg()`` copies
(``detectron2.config.defaults``), so that nothing in Detectron2 or in the script is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import nl_detectron

# isort: split
from detectron2.config import defaults

from nl_detectron.analysis.flops import register_flop_handles
from nl_detectron.data import register_built_in, register_coco_json
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.files import missing

_ARGUMENTS = "NL_DETECTRON_RUN_ARGUMENTS"


@exit_on_user_error()
def prepare(arguments: list[str]) -> Any:
    """Register everything, let ``sys`` look as if Python ran the script, and compile that."""
    parser = Parser(__doc__)
    parser.prog = "python -m nl_detectron.run"
    parser.add_argument(
        "--data",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register data in COCO's format, such as the train or val of train_net.py; any number",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the script")
    args = parser.parse_args(arguments)
    if problem := missing(args.script):
        raise FileNotFoundError(f"the script {args.script} {problem}")
    nl_detectron.add_nonlocal_config(defaults._C)
    register_flop_handles()
    words = [str(args.script), *args.arguments]
    register_built_in(words)  # any of them may name one, or a config with one
    for name, json_file, images in args.data:
        register_coco_json(name, json_file, images)
    sys.argv = words
    sys.path.insert(0, str(args.script.resolve().parent))
    return compile(args.script.read_bytes(), str(args.script), "exec", dont_inherit=True)


if __name__ == "__main__":
    os.environ[_ARGUMENTS] = json.dumps(sys.argv[1:])
if __name__ in ("__main__", "__mp_main__"):
    # The second is the name in processes that the script starts (with Detectron2's launch): they
    # import this module again, and find the script in it under its names.
    code = prepare(json.loads(os.environ[_ARGUMENTS]))
    globals().update(__file__=sys.argv[0], __doc__=None)
    exec(code)
