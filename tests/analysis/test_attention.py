import math

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch.utils._python_dispatch import TorchDispatchMode

from nl_detectron import GlobalContextBlock, NonLocalBlock, model_zoo
from nl_detectron.analysis import contribution
from nl_detectron.analysis.attention import (
    AttentionRecord,
    attention_maps,
    record_attention,
)
from nl_detectron.analysis.attention_map import AttentionMap
from nl_detectron.analysis.contribution import WHAT, contributions_on_grid, effect_on_grid
from nl_detectron.analysis.placement import place
from nl_detectron.analysis.recording import choose_blocks
from tests.analysis.planted import PlantedDetector, centre, image_with_bright_cells

KEYPOINT_BLOCK = "roi_heads.keypoint_head.nonlocal4"
FLIP = T.RandomFlip(1.0)


def only_map(maps):
    ((attention_map,),) = [block.maps for block in maps.blocks]
    return attention_map


@pytest.mark.parametrize("subsample", ["none", "embeddings", "input"])
@pytest.mark.parametrize("size_divisibility", [0, 32])
@pytest.mark.parametrize(
    "augmentation",
    [
        None,
        FLIP,
        T.ResizeShortestEdge(144, 1000),
        T.AugmentationList([T.ResizeShortestEdge(160, 1000), FLIP]),
    ],
    ids=["as it is", "flipped", "enlarged", "enlarged and flipped"],
)
@pytest.mark.parametrize("target", [(0, 5), (2, 1), (3, 2), (1, 4)])
def test_a_bright_place_attends_to_the_other(subsample, size_divisibility, augmentation, target):
    # 5 x 7 cells, not all of which are covered by pooled keys, and padding at the right or left.
    image = image_with_bright_cells(80, 112, (1, 2), target)
    model = PlantedDetector(size_divisibility, subsample=subsample)
    maps = attention_maps(model, image, [centre(1, 2)], augmentation=augmentation)
    attention_map = only_map(maps)
    left, top, right, bottom = attention_map.extent
    rows, columns = attention_map.values.shape
    x, y = centre(*target)
    column = math.floor((x - left) / (right - left) * columns)
    row = math.floor((y - top) / (bottom - top) * rows)
    assert attention_map.values[row, column] > 100 * np.median(attention_map.values)


def test_keys_of_an_odd_grid():
    image = image_with_bright_cells(48, 80, (0, 0))  # 3 x 5 cells
    model = PlantedDetector(0, subsample="embeddings")
    straight = only_map(attention_maps(model, image, [(0, 0)]))
    assert straight.values.shape == (1, 2)
    assert straight.extent == (0, 0, 64, 32)
    assert straight.query == (0, 0, 16, 16)
    flipped = only_map(attention_maps(model, image, [(79, 47)], augmentation=FLIP))
    assert flipped.extent == (16, 0, 80, 32)
    assert flipped.query == (64, 32, 80, 48)


@pytest.mark.parametrize("augmentation", [None, FLIP])
@pytest.mark.parametrize(
    ("subsample", "extent", "outside"),
    # 4 x 6 keys for an image of 3 x 5 cells; then 2 x 3 of which each has some of the image.
    [("none", (0, 0, 80, 48), 1 - 15 / 24), ("embeddings", (0, 0, 96, 64), 0)],
)
def test_weight_in_the_padding(augmentation, subsample, extent, outside):
    image = image_with_bright_cells(48, 80)
    model = PlantedDetector(32, subsample=subsample)
    attention_map = only_map(attention_maps(model, image, [(8, 8)], augmentation=augmentation))
    if augmentation:
        left, top, right, bottom = extent
        extent = (80 - right, top, 80 - left, bottom)
    assert attention_map.extent == extent
    assert attention_map.outside == pytest.approx(outside, abs=1e-6)
    # Black attends to all black alike.
    assert attention_map.values == pytest.approx(1 / attention_map.keys)


def test_an_image_smaller_than_its_padding():
    image = image_with_bright_cells(10, 12)
    attention_map = only_map(attention_maps(PlantedDetector(32), image, [(5, 5)]))
    assert attention_map.query == attention_map.extent == (0, 0, 16, 16)
    assert attention_map.outside == pytest.approx(0.75)


def test_colours_reach_the_model_in_its_order():
    image = image_with_bright_cells(32, 32, (0, 0))
    image[:16, :16, 1:] = 0  # blue
    for input_format, channel in [("BGR", 0), ("RGB", 2)]:
        record = record_attention(PlantedDetector(), image, input_format=input_format)
        (features,) = record.features["backbone.1"]
        assert features.x[0, :, 0, 0].nonzero().tolist() == [[channel]]
        assert record.image[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = PlantedDetector().train(training)
    attention_maps(model, image_with_bright_cells(32, 32), [(5, 5)])
    assert model.training is training
    assert not any(module._forward_pre_hooks for module in model.modules())


def small_detector():
    cfg = model_zoo.get_config("quick_start")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 6
    torch.manual_seed(0)
    return build_model(cfg).eval()


@pytest.mark.parametrize("flip", [False, True])
def test_a_head_attends_within_the_box_of_its_object(flip):
    model = small_detector()
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    record = record_attention(
        model, image, blocks=[KEYPOINT_BLOCK], augmentation=FLIP if flip else None, min_score=0
    )

    # What Detectron2 gives the head, by Detectron2's own means.
    seen = np.ascontiguousarray(image[:, ::-1] if flip else image).transpose(2, 0, 1)
    inputs = {"image": torch.as_tensor(seen)}
    head = model.roi_heads.keypoint_head
    with torch.no_grad():
        (instances,) = model.inference([inputs], do_postprocess=False)
        features = model.backbone(model.preprocess_image([inputs]).tensor)
        pooled = model.roi_heads.keypoint_pooler(
            [features[name] for name in model.roi_heads.in_features], [instances.pred_boxes]
        )
        for name, layer in head.named_children():
            if name == "nonlocal4":
                break
            pooled = layer(pooled)
        boxes = instances.pred_boxes.tensor.numpy().copy()
        if flip:
            boxes[:, [0, 2]] = 128 - boxes[:, [2, 0]]
        assert record.boxes == pytest.approx(boxes, abs=1e-3) or flip
        assert len(boxes) == 6
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        smallest = areas.argmin()
        left, top, right, bottom = boxes[smallest]
        x, y = left + (right - left) * 3.5 / 14, top + (bottom - top) * 9.5 / 14
        expected = head.nonlocal4.attention(pooled, [(9, 10 if flip else 3)])[smallest, 0]
    if flip:
        expected = expected.flip(1)
    attention_map = only_map(record.maps([(x, y)]))
    assert attention_map.values == pytest.approx(expected.numpy(), rel=1e-4)
    assert attention_map.extent == pytest.approx((left, top, right, bottom), abs=1e-3)
    assert attention_map.outside == 0


def test_a_point_in_several_boxes_is_asked_in_the_smallest():
    block = NonLocalBlock(2)
    boxes = np.array([[0.0, 0, 60, 60], [20, 20, 40, 40], [10, 10, 50, 50]])
    placed = [place(torch.randn(1, 2, 4, 4), box) for box in boxes]
    image = np.zeros((64, 64, 3), np.uint8)
    record = AttentionRecord(image, boxes, {"head.nonlocal2": block}, {"head.nonlocal2": placed})
    (attended,) = record.maps([(5, 5), (30, 30), (62, 30), (45, 45), (31, 21)]).blocks
    extents = [attention_map and attention_map.extent for attention_map in attended.maps]
    outer, inner, middle = map(tuple, boxes.tolist())
    assert extents == [outer, inner, None, middle, inner]


def test_a_head_sees_nothing_outside_the_boxes_of_confident_objects():
    image = np.zeros((96, 128, 3), np.uint8)
    maps = attention_maps(small_detector(), image, [(64, 48)], min_score=1.0)
    found = {block.name: block.maps[0] is not None for block in maps.blocks}
    assert found == {
        "backbone.bottom_up.res4.nonlocal0": True,
        "roi_heads.keypoint_head.nonlocal2": False,
        KEYPOINT_BLOCK: False,
    }


def test_blocks_by_name():
    model = small_detector()
    assert list(choose_blocks(model, ["keypoint_head.nonlocal2", "res4.nonlocal0"])) == [
        "backbone.bottom_up.res4.nonlocal0",
        "roi_heads.keypoint_head.nonlocal2",
    ]
    assert len(choose_blocks(model)) == 3
    for name in ("local0", "res4", "backbone.bottom_up.res4.nonlocal1"):
        with pytest.raises(
            ValueError, match=rf"no non-local block '{name}', but backbone.*nonlocal4"
        ):
            choose_blocks(model, [name])
    with pytest.raises(ValueError, match="no non-local blocks"):
        choose_blocks(torch.nn.ReLU())


@pytest.mark.parametrize("point", [(-1, 5), (32.5, 5), (5, 33), (float("nan"), 5)])
def test_refuses_points_outside(point):
    with pytest.raises(ValueError, match="lies outside the image, which is 32 pixels wide"):
        attention_maps(PlantedDetector(), image_with_bright_cells(32, 32), [(5, 5), point])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((32, 32), np.uint8)}, r"uint8 of shape \(32, 32\)"),
        ({"image": np.zeros((32, 32, 3))}, "float64 of shape"),
        ({"input_format": "L"}, "input_format is 'L'.*'BGR', 'RGB'"),
    ],
)
def test_refuses(options, message):
    arguments = {"image": image_with_bright_cells(32, 32), **options}
    with pytest.raises(ValueError, match=message):
        record_attention(PlantedDetector(), **arguments)


def test_refuses_blocks_without_a_place_in_the_image():
    class Twice(PlantedDetector):
        def forward(self, batched_inputs):
            return super().forward(batched_inputs * 2) + super().forward(batched_inputs)

    class Batched(PlantedDetector):
        def forward(self, batched_inputs):
            return super().forward(batched_inputs * 2)

    image = image_with_bright_cells(32, 32)
    with pytest.raises(ValueError, match=r"backbone.1 runs 2 times"):
        record_attention(Twice(), image)
    with pytest.raises(ValueError, match=r"backbone.1 is given features of shape \(2, 3, 2, 2\)"):
        record_attention(Batched(), image)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_grows_with_the_points_only():
    # As res3 of an image of 800 x 1344 pixels: 16,800 positions, so 282 million pairs.
    image = image_with_bright_cells(1600, 2688, (3, 4))
    record = record_attention(PlantedDetector(), image)
    with LargestTensor() as largest:
        record.maps([(100, 100), (2000, 1500)])
        record.maps([(100, 100), (2000, 1500)], "contributions")
    assert largest.elements <= 3 * 16_800


def test_strongest_are_peaks_in_order_of_magnitude():
    weights = np.array(
        [
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 5.0, 4.0, 0.0, -7.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [2.0, 0.0, 0.0, 0.0, 1.0],
        ],
        np.float32,
    )
    attention_map = AttentionMap(weights, (10, 20, 110, 60), (0, 0, 1, 1), 0, 20)
    peaks = [((100, 35), -7), ((40, 35), 5), ((20, 55), 2), ((100, 55), 1)]
    assert attention_map.strongest(9) == peaks
    assert attention_map.strongest(2) == peaks[:2]
    assert AttentionMap(0 * weights, (0, 0, 5, 4), (0, 0, 1, 1), 0, 20).strongest(3) == []
    # Not the point's own cell nor a neighbour of it, nor less than a hundredth of the strongest.
    beside = AttentionMap(weights, (10, 20, 110, 60), (30, 40, 50, 50), 0, 20)
    assert beside.strongest(9) == [peaks[0], peaks[3]]
    weights[3, 4] = 0.069
    assert AttentionMap(weights, (10, 20, 110, 60), (0, 0, 1, 1), 0, 20).strongest(9) == peaks[:3]


def test_multiples_are_of_the_mean_of_all_keys():
    attention_map = AttentionMap(np.array([[0.1, -0.3]]), (0, 0, 2, 1), (0, 0, 1, 1), 0.5, 8)
    assert attention_map.mean == pytest.approx(0.1)
    assert attention_map.multiples.ravel() == pytest.approx([1, -3])


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product", "concatenation"])
def test_weights_are_those_of_the_block(pairwise):
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    torch.manual_seed(0)
    model = PlantedDetector(pairwise=pairwise)
    record = record_attention(model, image)
    (features,) = record.features["backbone.1"]
    block: NonLocalBlock = model.backbone[1]
    with torch.no_grad():
        expected = block.attention(features.x, [(2, 3)])[0, 0]
    attention_map = only_map(record.maps([centre(2, 3)]))
    assert attention_map.values == pytest.approx(expected.numpy())
    assert record.maps([]).blocks[0].maps == []


@pytest.mark.parametrize("augmentation", [None, FLIP])
@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "disentangled"])
def test_a_pyramids_weights_lie_on_the_cells_of_its_bins(pairwise, augmentation):
    """With these weights of the cells, what the block adds to a cell follows."""
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    torch.manual_seed(0)
    options = {"pairwise": pairwise, "subsample": "pyramid", "norm": "", "zero_init": False}
    model = PlantedDetector(**options)
    block = model.backbone[1]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    record = record_attention(model, image, augmentation=augmentation)
    attention_map = only_map(record.maps([centre(2, 3)]))
    assert attention_map.values.shape == (4, 6)
    assert attention_map.keys == 24
    assert attention_map.values.sum() == pytest.approx(2 if pairwise == "disentangled" else 1)
    assert attention_map.extent == (0, 0, 96, 64)
    weights, column = torch.from_numpy(attention_map.values), 3
    if augmentation:
        weights, column = weights.flip(1), 2
    (features,) = record.features["backbone.1"]
    with torch.no_grad():
        y = (weights * block.g(features.x)).sum((2, 3), keepdim=True)
        z = features.x[:, :, 2, column] + block.out(y)[:, :, 0, 0]
        torch.testing.assert_close(z, block(features.x)[:, :, 2, column])


def averaging_detector(detector=PlantedDetector, away_from_red=0.0):
    """Its block averages over all places, or with less weight on red ones, what is red there."""
    model = detector(pairwise="embedded_gaussian", norm="", zero_init=False)
    block = model.backbone[1]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.theta.bias[0] = 1
        block.phi.weight[0, :, 0, 0] = away_from_red * torch.tensor([1.0, 0, -1])
        block.g.weight[0, :, 0, 0] = torch.tensor([-1.0, 0, 1])
        block.out.weight[0, 0] = 1
    return model


def image_with_a_red_cell(row, column):
    image = np.full((64, 96, 3), 128, np.uint8)
    left, top = 16 * column, 16 * row
    image[top : top + 16, left : left + 16] = (28, 128, 228)
    return image


@pytest.mark.parametrize("away_from_red", [0.0, 1.0])
def test_what_is_found_by_averaging_lights_up_by_contribution(away_from_red):
    model = averaging_detector(away_from_red=away_from_red)
    record = record_attention(model, image_with_a_red_cell(1, 4))
    weights, contributions = (only_map(record.maps([centre(3, 0)], w)) for w in WHAT[:2])
    assert weights.multiples[1, 4] < (0.2 if away_from_red else 1.0001)
    assert weights.multiples.max() < 1.1
    others = np.delete(contributions.multiples.ravel(), 6 + 4)
    assert contributions.multiples[1, 4] > 10 > 10 * others.max()
    assert contributions.strongest(1) == [(centre(1, 4), contributions.values[1, 4])]


def test_where_attention_points_contributions_do():
    model = PlantedDetector(norm="", zero_init=False)
    for name in ("g", "out"):
        torch.nn.init.dirac_(getattr(model.backbone[1], name).weight)
    record = record_attention(model, image_with_bright_cells(64, 96, (0, 0), (2, 4)))
    for what in WHAT[:2]:
        attention_map = only_map(record.maps([centre(0, 0)], what))
        assert attention_map.strongest(1)[0][0] == centre(2, 4)


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_contributions_are_their_formula(pairwise):
    torch.manual_seed(0)
    block = NonLocalBlock(6, pairwise=pairwise, norm="", zero_init=False).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 6, 3, 4).double()
    with torch.no_grad():
        parts = block.attention(x, [1, 7])[0, :, None] * block.values(x)[0]
        expected = (parts - parts.mean((2, 3), keepdim=True)).norm(dim=1).float()
    actual = contributions_on_grid(block, x, torch.tensor([1, 7]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_effects_are_gradients_with_respect_to_g(pairwise, monkeypatch):
    monkeypatch.setattr(contribution, "_MAX_PAIRS", 40)  # a few queries at a time
    torch.manual_seed(0)
    block = NonLocalBlock(6, pairwise=pairwise, norm="BN", zero_init=False).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    kept = []
    block.g.register_forward_hook(lambda module, arguments, output: kept.append(output))
    x = torch.randn(1, 6, 3, 4)
    z = block(x)
    number = (z * torch.randn_like(z)).sum().tanh()
    of_g, of_z = torch.autograd.grad(number, [kept[0], z])
    expected = (of_g * (kept[0] - kept[0].mean((2, 3), keepdim=True))).sum(1)[0]
    torch.testing.assert_close(effect_on_grid(block, x, of_z), expected, rtol=1e-4, atol=1e-6)


class ScoringDetector(PlantedDetector):
    """Finds two objects: red anywhere speaks for the first, and against the second."""

    BOXES = ((0.0, 32, 30, 64), (60.0, 0, 90, 20))

    def forward(self, batched_inputs):
        x = batched_inputs[0]["image"][None] / 50
        z = self.backbone(x)[0, 0]
        found = Instances((64, 96))
        found.pred_boxes = Boxes(torch.tensor(self.BOXES))
        found.scores = torch.stack([z[3, 0], 3 - z[0, 4]]).sigmoid()
        return [{"instances": found}]


def test_effect_on_a_score_is_found_with_its_sign():
    model = averaging_detector(ScoringDetector)
    image = image_with_a_red_cell(1, 5)
    record = record_attention(model, image, effects=True)
    assert record.boxes.tolist() == [list(box) for box in ScoringDetector.BOXES]
    maps = record.maps([(15, 48), (75, 10), (40, 40)], "effect")
    (first, second, nothing) = maps.blocks[0].maps
    assert maps.what == "effect"
    assert nothing is None
    assert first.query == ScoringDetector.BOXES[0]
    for attention_map, sign in ((first, 1), (second, -1)):
        assert attention_map.extent == (0, 0, 96, 64)
        multiples = sign * attention_map.multiples
        assert np.unravel_index(multiples.argmax(), (4, 6)) == (1, 5)
        assert multiples.max() > 10
        assert np.abs(np.delete(multiples.ravel(), 11)).max() < 1
    with pytest.raises(ValueError, match="call record_attention with effects=True"):
        record_attention(model, image).maps([(15, 48)], "effect")


def test_effects_in_a_detector_of_detectron2():
    model = small_detector()
    for block in choose_blocks(model).values():
        torch.nn.init.ones_(block.norm.weight)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    record = record_attention(model, image, min_score=0, effects=True)
    left, top, right, bottom = record.boxes[0]
    (block,) = record.maps([((left + right) / 2, (top + bottom) / 2)], "effect").blocks
    assert block.name == "backbone.bottom_up.res4.nonlocal0"  # those of the head have no part
    assert np.abs(block.maps[0].values).max() > 0
    with pytest.raises(ValueError, match="nonlocal4 has no effect on scores: it is in a head"):
        record_attention(model, image, blocks=[KEYPOINT_BLOCK], effects=True)


def test_contributions_of_global_context():
    torch.manual_seed(0)
    block = GlobalContextBlock(3, reduction=1, zero_init=False)
    maps = attention_maps(PlantedDetector(block=block), image_with_a_red_cell(1, 4), [(5, 5)])
    record = record_attention(PlantedDetector(block=block), image_with_a_red_cell(1, 4))
    contributions = only_map(record.maps([(5, 5)], "contributions"))
    assert contributions.values.argmax() == 6 + 4
    assert contributions.values.shape == only_map(maps).values.shape


def test_global_context_is_one_map_for_all_points():
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    torch.manual_seed(0)
    block = GlobalContextBlock(3, reduction=1)
    maps = attention_maps(PlantedDetector(block=block), image, [centre(2, 3), centre(0, 0)])
    (attended,) = maps.blocks
    assert attended.pairwise == "global_context"
    first, second = attended.maps
    assert first.values.shape == (4, 6)
    assert np.array_equal(first.values, second.values)
    assert first.values.sum() == pytest.approx(1)
    assert len(set(first.values.ravel())) > 1
    assert first.query != second.query
