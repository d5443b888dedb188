import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.visualizer import VisImage

import nl_detectron.data.toy  # noqa: F401  its datasets
from nl_detectron.engine.drawing import draw_annotations, draw_predictions, side_by_side

SIZE = (60, 80)
BLUE, RED = (0, 0, 255), (255, 0, 0)  # RGB, as in Detectron2's metadata


@pytest.fixture
def gray():
    return np.full((*SIZE, 3), 128, np.uint8)


@pytest.fixture
def labels(monkeypatch):
    """The labels that are drawn, and after the drawing what they cover: (2, 2) corners."""
    drawn = {}
    get_image = VisImage.get_image

    def spy(self):
        for label in self.ax.texts:
            box = label.get_window_extent().get_points()
            corners = np.abs([[0, self.fig.bbox.height]] * 2 - box)
            drawn[label.get_text()] = np.sort(corners, axis=0)
        return get_image(self)

    monkeypatch.setattr(VisImage, "get_image", spy)
    return drawn


def ring_and_spot():
    """An object of class 0 with a hole, and one of class 1."""
    instances = Instances(SIZE)
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 10:50, 5:45] = True
    masks[0, 20:40, 15:35] = False
    masks[1, 20:40, 55:75] = True
    instances.pred_masks = torch.from_numpy(masks)
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 10, 45, 50], [55, 20, 75, 40]]))
    instances.pred_classes = torch.tensor([0, 1])
    instances.scores = torch.tensor([0.75, 0.5])
    return instances


def test_masks_have_the_colour_of_the_class_and_open_holes(gray):
    metadata = Metadata(thing_classes=["ring", "spot"], thing_colors=[BLUE, RED])
    picture = draw_predictions(gray, ring_and_spot(), metadata, scale=4)
    assert picture.shape == (240, 320, 3)
    blue, _, red = picture[180, 100].astype(int)
    assert blue > 150 > 100 > red
    blue, _, red = picture[120, 260].astype(int)
    assert red > 150 > 100 > blue
    assert (picture[120, 100] == 128).all()
    assert draw_predictions(gray, ring_and_spot(), metadata).shape == gray.shape


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (Metadata(thing_classes=["ring", "spot"]), ["ring 75%", "spot 50%"]),
        (Metadata(), ["0 75%", "1 50%"]),
    ],
)
def test_classes_without_names_are_numbers(metadata, expected, gray, labels):
    draw_predictions(gray, ring_and_spot(), metadata)
    assert list(labels) == expected


@pytest.mark.parametrize("fields", [[], ["pred_keypoints"]])
def test_models_without_masks(fields, gray):
    instances = ring_and_spot()
    instances.remove("pred_masks")
    points = torch.tensor([[[25.0, 40, 0]], [[65, 35, 0]]])  # a model is not sure of them
    if fields:
        instances.pred_keypoints = points
    picture = draw_predictions(gray, instances, Metadata(), scale=4)
    assert picture.shape == (240, 320, 3)
    circles = [(picture[y, x] != 128).any() for x, y in ((100, 160), (260, 140))]
    assert all(circles) if fields else not any(circles)


def test_nothing_found_is_the_image(gray):
    image = gray + np.array([0, 50, 100], np.uint8)
    assert (draw_predictions(image, ring_and_spot()[:0], Metadata()) == image).all()


@pytest.mark.parametrize(
    "boxes",
    [
        [[100, 60, 120, 80], [270, 2, 298, 22], [2, 178, 22, 198], [278, 190, 299, 199]],
        [[20, 30, 140, 170], [180, 30, 299, 180]],
        [[-9, -9, 140, 170], [180, -9, 320, 230]],  # predictions may reach over the borders
    ],
)
def test_labels_lie_in_the_picture_and_leave_small_objects_free(boxes, labels):
    image = np.full((200, 300, 3), 128, np.uint8)
    names = [f"name {i}" for i in range(len(boxes))]
    instances = Instances(image.shape[:2])
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.scores, instances.pred_classes = torch.ones(len(boxes)), torch.arange(len(boxes))
    draw_predictions(image, instances, Metadata(thing_classes=names))
    for ((left, top), (right, bottom)), (x0, y0, x1, y1) in zip(labels.values(), boxes):
        assert -1 <= left < right <= 301
        assert -1 <= top < bottom <= 201
        assert y1 - y0 > 100 or bottom <= y0 + 1 or y1 - 1 <= top
        assert abs(left - max(x0, 0)) < 2 or abs(right - min(x1, 300)) < 2


def test_labels_avoid_each_other(labels):
    image = np.full((400, 400, 3), 128, np.uint8)
    boxes = [[60 + i, 60 + i, 250 + 2 * i, 250 + i] for i in range(6)]
    instances = Instances(image.shape[:2])
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.scores, instances.pred_classes = torch.ones(6), torch.arange(6)
    names = [f"name {i}" for i in range(6)]
    draw_predictions(image, instances, Metadata(thing_classes=names))
    corners = list(labels.values())
    assert len(corners) == 6
    for i, (a, b) in enumerate(corners):
        for c, d in corners[:i]:
            assert (b <= c + 1).any() or (d <= a + 1).any()


@pytest.mark.parametrize("parts", [(), ("segmentation",)])
def test_annotations_have_the_colours_and_shapes_of_a_prediction(parts):
    metadata = MetadataCatalog.get("shapes_val")
    record = next(r for r in DatasetCatalog.get("shapes_val") if len(r["annotations"]) == 1)
    image = cv2.imread(record["file_name"])
    (annotation,) = record["annotations"]
    height, width = image.shape[:2]
    instances = Instances((height, width))
    if parts:
        masks = BitMasks.from_polygon_masks([annotation["segmentation"]], height, width)
        instances.pred_masks = masks.tensor
    x, y, w, h = annotation["bbox"]
    instances.pred_boxes = Boxes(torch.tensor([[x, y, x + w, y + h]]))
    instances.pred_classes = torch.tensor([annotation["category_id"]])
    instances.scores = torch.ones(1)
    truth = draw_annotations(image, record["annotations"], metadata, 2, parts)
    predicted = draw_predictions(image, instances, metadata, 2)
    assert truth.shape == (2 * height, 2 * width, 3)
    assert (truth != predicted).any(2).mean() < 0.05  # but for the score in the label
    scored = draw_annotations(image, [{**annotation, "score": 1.0}], metadata, 2, parts)
    assert (scored == predicted).all()


def test_side_by_side(gray):
    small, large = gray[:30, :40], np.zeros((*SIZE, 3), np.uint8)
    joined = side_by_side([small, large], ["a", "MMMMMMMMMMMM"])
    height, width = joined.shape[:2]
    above = height - len(large)
    assert (joined[above : above + 30, :40] == small).all()
    assert (joined[above:, width - 80 :] == large).all()
    assert (joined[above + 30 :, :40] == 255).all()
    for caption in (joined[:above, :40], joined[:above, width - 80 :]):
        assert 0 < (caption < 200).mean() < 0.4
        assert (caption[:, [0, -1]] == 255).all()  # it fits


def test_one_below_the_other(gray):
    joined = side_by_side([gray[:30, :40], gray], ["a", "b"], axis=0)
    assert joined.shape[1] == SIZE[1]
    assert (joined[-60:] == gray).all()
    assert (joined[: -60 - 25, 40:] == 255).all()
