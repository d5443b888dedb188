import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import ImageDraw

from nl_detectron.config import build_config
from nl_detectron.engine.drawing import draw_ground_truth, draw_predictions, side_by_side
from nl_detectron.engine.predictor import Predictor, dataset_metadata
from nl_detectron.weights.checkpoint_io import CheckpointError
from tests.random_model import QUICK_START, save_random_model

SIZE = (60, 80)
BLUE, RED = (0, 0, 255), (255, 0, 0)  # RGB, as in Detectron2's metadata


@pytest.fixture
def gray():
    return np.full((*SIZE, 3), 128, np.uint8)


@pytest.fixture
def labels(monkeypatch):
    """The labels that are drawn: text to (left, top, right, bottom)."""
    drawn = {}
    text = ImageDraw.ImageDraw.text

    def spy(self, place, label, color, font):
        drawn[label] = (*place, *np.add(place, font.getbbox(label)[2:]))
        return text(self, place, label, color, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
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
    picture = draw_predictions(gray, ring_and_spot(), metadata)
    assert picture.shape == gray.shape
    blue, _, red = picture[45, 25].astype(int)
    assert blue > 150 > 100 > red
    blue, _, red = picture[30, 65].astype(int)
    assert red > 150 > 100 > blue
    assert (picture[30, 25] == 128).all()


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
    points = torch.tensor([[[25.0, 30, 1]], [[65, 30, 1]]])
    if fields:
        instances.pred_keypoints = points
    picture = draw_predictions(gray, instances, Metadata(), scale=2)
    assert picture.shape == (120, 160, 3)
    circles = (picture[60, [53, 133]] != 128).any(axis=1)
    assert circles.all() if fields else not circles.any()
    assert (abs(picture[60, [50, 130]].astype(int) - 128) < 10).all()  # they are open


def test_nothing_found_is_the_image(gray):
    image = gray + np.array([0, 50, 100], np.uint8)
    assert (draw_predictions(image, ring_and_spot()[:0], Metadata()) == image).all()


@pytest.mark.parametrize(
    "boxes",
    [
        [[20, 100, 60, 120], [62, 100, 102, 120], [20, 122, 60, 142]],
        [[233, 38, 259, 64], [233, 38, 259, 64], [263, 41, 289, 67]],  # two in one place
    ],
)
def test_labels_cover_neither_neighbours_nor_each_other(boxes, labels):
    image = np.full((200, 300, 3), 128, np.uint8)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    instances = Instances(image.shape[:2])
    instances.pred_boxes, instances.scores = Boxes(boxes), torch.tensor([0.9, 0.8, 0.7])
    instances.pred_classes = torch.tensor([0, 0, 0])
    draw_predictions(image, instances, Metadata(thing_classes=["name"]))
    places = list(labels.values())
    for i, (left, top, right, bottom) in enumerate(places):
        assert 0 <= left < right <= 300
        others = [*boxes[:i].tolist(), *boxes[i + 1 :].tolist(), *places[:i]]
        for x0, y0, x1, y1 in others:
            assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top


@pytest.mark.parametrize("parts", [(), ("segmentation",)])
def test_ground_truth_has_the_colours_and_shapes_of_a_prediction(parts):
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
    truth = draw_ground_truth(image, record, metadata, 2, parts)
    predicted = draw_predictions(image, instances, metadata, 2)
    assert truth.shape == (2 * height, 2 * width, 3)
    assert (truth != predicted).any(2).mean() < 0.05  # but for the score in the label


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


def test_predictor_predicts_what_the_model_does(tmp_path, gray):
    cfg = save_random_model(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    predictor = Predictor(cfg)
    found = predictor(gray)["instances"]
    assert len(found) == 3
    drawn = draw_predictions(gray, found, predictor.metadata, 2)
    assert (predictor.draw(gray, 2) == drawn).all()
    weights = torch.load(cfg.MODEL.WEIGHTS)["model"]
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_predictor_refuses_weights_that_do_not_fit(tmp_path):
    cfg = save_random_model(tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(CheckpointError, match="cls_score"):
        Predictor(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_predictor_runs_without_cuda(tmp_path):
    cfg = save_random_model(tmp_path)
    cfg.MODEL.DEVICE = "cuda"
    cfg.freeze()
    assert Predictor(cfg).model.device.type == "cpu"


@pytest.mark.parametrize(
    ("overrides", "is_known"),
    [
        ([], True),
        (["DATASETS.TEST", "()"], False),
        (["DATASETS.TEST", "('not_registered',)"], False),
        (["DATASETS.TEST", "('coco_2017_val',)"], False),
        (["DATASETS.TEST", "('coco_2017_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "80"], True),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], False),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "3"], True),
        (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "17"], False),
        (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "17", "MODEL.KEYPOINT_ON", "False"], True),
    ],
)
def test_names_are_known_if_they_fit_the_model(overrides, is_known):
    cfg = build_config(QUICK_START, overrides)
    assert bool(dataset_metadata(cfg).get("thing_classes")) == is_known
