#!/usr/bin/env python3
"""Draw the picture of the data sets in STUDY.md: a square of each class, in each of the three sets.

python docs/draw_long_range.py docs/long_range.png
"""

import argparse

from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from PIL import Image

import nl_detectron  # noqa: F401  registers the sets

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", help="the PNG to write")
picture = parser.parse_args().picture

NAMES = ("long_range", "long_range_near", "long_range_none")

figure = Figure(figsize=(9, 2.1), dpi=110, layout="constrained")
for name, row in zip(NAMES, figure.subplots(len(NAMES), 2)):
    # The three sets have the same squares in the same order.
    pictures = DatasetCatalog.get(f"{name}_train")
    classes = MetadataCatalog.get(f"{name}_train").thing_classes
    for category, panel in enumerate(row):
        of_class = (p for p in pictures if p["annotations"][0]["category_id"] == category)
        panel.imshow(Image.open(next(of_class)["file_name"]), interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        if name == NAMES[0]:
            panel.set_title(f"class {classes[category]}", fontsize=9)
    row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, family="monospace")
figure.savefig(picture)
