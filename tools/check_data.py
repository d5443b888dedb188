#!/usr/bin/env python3
"""Check a dataset in COCO's format to the end: everything that is wrong with it, at once.

    python tools/check_data.py train.json train/
    python tools/check_data.py train.json train/ --drop-bad clean.json

Every picture is decoded. An error is what Detectron2 cannot live with; with the rest, the warnings,
it trains. The exit status is 1 if there are errors that were not dropped, and 0 otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

from nl_detectron.data.coco_checks import Problem, check_coco, counts_of_kinds, without_bad
from nl_detectron.data.coco_format import Record, read_coco
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.files import check_target, whole_file


@exit_on_user_error()
def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("json_file", type=Path, help="annotations in COCO's format")
    parser.add_argument("image_root", type=Path, help="folder of the images in it")
    parser.add_argument(
        "--drop-bad",
        type=Path,
        metavar="OUT.json",
        help="write the dataset without images and annotations that have an error, files that are "
        "listed again, boxes that are negative, empty or outside, and annotations without a mask "
        "where others have one",
    )
    parser.add_overwrite()
    args = parser.parse_args()
    if args.drop_bad:
        check_target("--drop-bad", args.drop_bad, [args.json_file], overwrite=args.overwrite)
    coco = read_coco(args.json_file)
    print(f"{_size_of(coco)} in {args.json_file}; pictures of {args.image_root}", flush=True)
    problems = check_coco(coco, args.image_root, "decoded")
    _print_report(problems)
    if args.drop_bad:
        problems = _drop_bad(coco, problems, args.drop_bad)
    return int(any(problem.is_error for problem in problems))


def _size_of(coco: Record) -> str:
    return f"{len(coco['images'])} images, {len(coco['annotations'])} annotations"


def _print_report(problems: list[Problem]) -> None:
    """A line for each, then how many of each kind there are."""
    levels: dict[str, list[Problem]] = {"error": [], "warning": []}
    for problem in problems:
        levels["error" if problem.is_error else "warning"].append(problem)
    for level, found in levels.items():
        for problem in found:
            print(f"{level}: {problem.text}")
    for level, found in levels.items():
        print(f"{len(found)} {level}s{': ' if found else ''}{counts_of_kinds(found)}")


def _drop_bad(coco: Record, problems: list[Problem], target: Path) -> list[Problem]:
    """Write what is left, and return the errors of this."""
    clean = without_bad(coco, problems)
    if not clean["images"] or (coco["annotations"] and not clean["annotations"]):
        raise ValueError(f"{target} is not written: no image or no annotation is without an error")
    with whole_file(target) as draft:
        draft.write_text(json.dumps(clean), encoding="utf-8")
    print(f"{target}: {_size_of(clean)}")
    left = [p for p in problems if p.is_error and (p.place is None or p.section == "categories")]
    for problem in left:
        print(f"error that stays: {problem.text}")
    return left


if __name__ == "__main__":
    raise SystemExit(main())
