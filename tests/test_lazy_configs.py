"""The LazyConfigs say the same as the YAML configs of the same name."""

from __future__ import annotations

import functools

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

import lazy_train_net
from nl_detectron import NonLocalBlock, model_zoo
from nl_detectron.data import register_built_in

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_101_FPN_nl_head_backbone_1x"
DISENTANGLED = "successors/mask_rcnn_R_50_FPN_dnl_1x"
LAZY = [MASK, KEYPOINT, DISENTANGLED]
SHORT_EDGE = "mapper.augmentations.0.short_edge_length"


def build(name: str, device: str = "meta") -> tuple[nn.Module, nn.Module]:
    """The model by the YAML and by the LazyConfig."""
    cfg = model_zoo.get_config(f"{name}.yaml")
    cfg.MODEL.DEVICE = device
    with torch.device(device):
        return build_model(cfg), instantiate(model_zoo.get_config(f"{name}.py").model)


on_meta = functools.cache(build)


def test_there_are_no_others():
    lazy = [name for name in model_zoo.list_configs() if name.endswith(".py")]
    assert lazy == sorted(f"{name}.py" for name in LAZY)


@pytest.mark.parametrize("name", LAZY)
def test_same_model(name):
    """Parameters, buffers, modules, and what blocks do not show."""
    expected, actual = (
        [
            str(model),
            *((k, p.shape, p.dtype, p.requires_grad) for k, p in model.named_parameters()),
            *((k, b.shape, b.dtype) for k, b in model.named_buffers()),
            *((k, m.pairwise, m.subsample, m.logit_scale) for k, m in blocks_of(model)),
        ]
        for model in on_meta(name)
    )
    assert actual == expected
    assert len(blocks_of(on_meta(name)[0])) == (5 if name == KEYPOINT else 1)


def blocks_of(model):
    return [(key, m) for key, m in model.named_modules() if isinstance(m, NonLocalBlock)]


@pytest.mark.parametrize("name", LAZY)
def test_same_weights_data_and_schedule(name):
    cfg, lazy = (model_zoo.get_config(name + suffix) for suffix in (".yaml", ".py"))
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert (lazy.dataloader.train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (lazy.dataloader.test.dataset.names,) == cfg.DATASETS.TEST
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    for mapper, sizes, longest in (
        (lazy.dataloader.train.mapper, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN),
        (lazy.dataloader.test.mapper, (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST),
    ):
        resize = instantiate(mapper.augmentations[0])
        assert isinstance(resize, ResizeShortestEdge)
        assert set(resize.short_edge_length) == set(sizes)
        assert resize.max_size == longest


def test_same_optimizer():
    cfg, lazy = (model_zoo.get_config(MASK + suffix) for suffix in (".yaml", ".py"))
    by_yaml, by_lazy = on_meta(MASK)
    lazy.optimizer.params.model = by_lazy
    expected, actual = build_optimizer(cfg, by_yaml), instantiate(lazy.optimizer)

    def groups(optimizer, model):
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {
            names[parameter]: (group["lr"], group["momentum"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    assert groups(actual, by_lazy) == groups(expected, by_yaml)
    scheduler = build_lr_scheduler(cfg, expected)
    multiplier = instantiate(lazy.lr_multiplier)
    for iteration in (0, 500, 1000, 59999, 60001, 79999, 80001, 89999):
        scheduler.last_epoch = iteration
        rate = lazy.optimizer.lr * multiplier(iteration / lazy.train.max_iter)
        assert rate == pytest.approx(scheduler.get_lr()[0])


def example(size: int = 64) -> list[dict]:
    """One image with one instance, as Detectron2's models take it."""
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 56.0, 48.0]]))
    instances.gt_classes = torch.tensor([0])
    masks = torch.zeros(1, size, size, dtype=torch.bool)
    masks[:, 8:48, 8:56] = True
    instances.gt_masks = BitMasks(masks)
    instances.gt_keypoints = Keypoints(torch.tensor([20.0, 20.0, 2.0]).expand(1, 17, 3).clone())
    image = torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(0))
    return [{"image": image, "instances": instances, "height": size, "width": size}]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAZY)
def test_same_losses_and_predictions(name):
    by_yaml, by_lazy = build(name, "cpu")
    for key, buffer in by_yaml.named_buffers():
        if key.endswith("conv3.norm.weight"):
            buffer.fill_(0.1)  # a random ResNet-101 overflows without any normalisation
    for _, block in blocks_of(by_yaml):
        nn.init.ones_(block.norm.weight)  # or the blocks would be the identity
    by_lazy.load_state_dict(by_yaml.state_dict())
    outputs = []
    for model in (by_yaml, by_lazy):
        model.roi_heads.box_predictor.test_score_thresh = 0.0
        model.roi_heads.box_predictor.test_topk_per_image = 5
        torch.manual_seed(0)
        with EventStorage():
            losses = model(example())
        with torch.no_grad():
            (prediction,) = model.eval()(example())
        outputs.append((losses, prediction["instances"].get_fields()))
    (expected_losses, expected), (losses, actual) = outputs
    assert losses == expected_losses
    assert actual.keys() == expected.keys()
    assert len(actual["scores"]) > 0
    for key in actual.keys() - {"pred_boxes"}:
        assert torch.equal(actual[key], expected[key]), key
    assert torch.equal(actual["pred_boxes"].tensor, expected["pred_boxes"].tensor)


@pytest.mark.slow
def test_trains_resumes_and_evaluates(tmp_path):
    register_few_shapes()
    num_classes = len(MetadataCatalog.get("few_shapes").thing_classes)
    words = [
        *("--config-file", model_zoo.get_config_file(f"{MASK}.py")),
        *("train.init_checkpoint=", f"train.output_dir={tmp_path}"),
        f"model.roi_heads.num_classes={num_classes}",
        *(f"dataloader.{split}.dataset.names=few_shapes" for split in ("train", "test")),
        *(f"dataloader.{split}.num_workers=0" for split in ("train", "test")),
        *(f"dataloader.{split}.{SHORT_EDGE}=64" for split in ("train", "test")),
        *("dataloader.train.total_batch_size=1", "train.max_iter=1"),
    ]
    lazy_train_net.main(lazy_train_net.parse_arguments(words))
    words[-1] = "train.max_iter=2"
    lazy_train_net.main(lazy_train_net.parse_arguments(["--resume", *words]))
    checkpoint = torch.load(tmp_path / "model_final.pth")
    assert checkpoint["iteration"] == 1
    words[2] = f"train.init_checkpoint={tmp_path / 'model_final.pth'}"
    args = lazy_train_net.parse_arguments(["--eval-only", "--strict-weights", *words])
    assert "bbox" in lazy_train_net.main(args)


def register_few_shapes():
    register_built_in(["shapes_val"])
    DatasetCatalog.register("few_shapes", lambda: DatasetCatalog.get("shapes_val")[:2])
    metadata = MetadataCatalog.get("shapes_val").as_dict()
    metadata.pop("name")
    MetadataCatalog.get("few_shapes").set(**metadata)


def test_the_tool_wants_a_lazy_config(capsys):
    with pytest.raises(SystemExit):
        lazy_train_net.parse_arguments(["--config-file", "a.yaml"])
    assert "see train_net.py for YAML" in capsys.readouterr().err
