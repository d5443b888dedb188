#!/usr/bin/env python3
"""Draw the picture of the data sets in STUDY.md: squares of each class, in each of the sets.

python docs/draw_long_range.py docs/long_range.png
"""

import argparse

from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from PIL import Image

import nl_detectron.data.toy  # noqa: F401  registers the sets

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", help="the PNG to write")
picture = parser.parse_args().picture

NAMES = ("long_range", "long_range_near", "long_range_none")
MATCH_NAMES = ("long_range_match", "long_range_match_near")

figure = Figure(figsize=(9, 3.5), dpi=110, layout="constrained")
for name, row in zip(NAMES + MATCH_NAMES, figure.subplots(len(NAMES + MATCH_NAMES), 2)):
    # The sets of a kind have the same squares in the same order.
    pictures = DatasetCatalog.get(f"{name}_val")
    names = MetadataCatalog.get(f"{name}_val").thing_classes
    for category, panel in enumerate(row):
        # The first square of this class, the second, if there is one, of the other.
        classes = [category, 1 - category][: len(pictures[0]["annotations"])]
        shown = (p for p in pictures if [a["category_id"] for a in p["annotations"]] == classes)
        panel.imshow(Image.open(next(shown)["file_name"]), interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        if name in (NAMES[0], MATCH_NAMES[0]):
            title = " and ".join(names[c] for c in classes)
            panel.set_title(f"class {title}", fontsize=9)
    row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, family="monospace")
figure.savefig(picture)
