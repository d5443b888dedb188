#!/usr/bin/env python3
"""Write the first images of a COCO JSON file, and the annotations of these, as a file of their own.

    python tools/subset_coco_json.py instances_train2017.json first_16.json --images 16

Good for seeing whether a model can learn a few images by heart.
"""

from __future__ import annotations

import json
from pathlib import Path

from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.files import check_target, whole_file


@exit_on_user_error()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="annotations in COCO's format")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument(
        "--images", type=positive_int, required=True, help="how many images to take"
    )
    parser.add_overwrite()
    args = parser.parse_args()
    check_target("target", args.target, [args.source], overwrite=args.overwrite)
    try:
        coco = first_images(json.loads(args.source.read_text()), args.images)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{args.source} is not in COCO's format: {error!r}") from error
    with whole_file(args.target) as draft:
        draft.write_text(json.dumps(coco))
    print(f"{args.target}: {len(coco['images'])} images, {len(coco['annotations'])} annotations")


def first_images(coco: dict, count: int) -> dict:
    """The dataset with its first ``count`` images and their annotations; all categories stay."""
    images = coco["images"][:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
    return {**coco, "images": images, "annotations": annotations}


if __name__ == "__main__":
    main()
