import itertools
import multiprocessing
import os
import random
import resource
import select
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from PIL import Image
from torch.utils.data import IterableDataset

from nl_detectron.data import TrainLoader, build_train_loader, toy
from nl_detectron.data.order import BatchOrder
from nl_detectron.data.pictures import UnreadableImageError


def records(count):
    """Every third image is wide."""
    return [{"id": i, "width": 3 if i % 3 == 0 else 2, "height": 2} for i in range(count)]


def draw(record):
    """What augmentations draw from."""
    return (record["id"], random.random(), np.random.rand(), torch.rand(()).item())


def take(count, size=10, batch=4, mapper=draw, **options):
    loader = TrainLoader(records(size), mapper=mapper, total_batch_size=batch, **options)
    return list(itertools.islice(loader, count))


def ids(batches):
    return [[sample[0] for sample in batch] for batch in batches]


def samplers(size):
    return [
        None,
        TrainingSampler(size),
        TrainingSampler(size, shuffle=False),
        RandomSubsetTrainingSampler(size, 0.5 if size > 1 else 1.0),
        RepeatFactorTrainingSampler(torch.linspace(0.5, 3.2, size)),
    ]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(("size", "batch"), [(10, 4), (1, 4), (3, 8)])
def test_starts_anywhere(size, batch, kind, grouping):
    sampler = samplers(size)[kind]
    options = {"sampler": sampler, "aspect_ratio_grouping": grouping, "seed": 3}
    whole = take(30, size, batch, **options)
    assert all(len(one) == batch for one in whole)
    for start in (1, 7, 29):
        assert take(30 - start, size, batch, start_iteration=start, **options) == whole[start:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(world_size):
    whole = take(20)
    ranks = [take(20, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks)] == whole


def test_number_of_workers_does_not_matter():
    whole = take(12)
    assert take(12, num_workers=1) == whole
    assert take(12, num_workers=3) == whole
    assert len({sample[1:] for batch in whole for sample in batch}) == 48


def test_seed_matters():
    first, second = take(20, seed=1), take(20, seed=2)
    assert ids(first) != ids(second)
    assert not {s[1] for b in first for s in b} & {s[1] for b in second for s in b}


def test_batches_are_of_one_kind_and_every_image_comes():
    batches = ids(take(500))
    assert all(len({i % 3 == 0 for i in batch}) == 1 for batch in batches)
    counts = Counter(itertools.chain(*batches))
    assert set(counts) == set(range(10))
    # Of 200 epochs; those of the last may wait for a batch.
    assert all(195 <= count <= 202 for count in counts.values())


def test_epochs_differ_and_are_permutations():
    epochs = ids(take(50, batch=10, aspect_ratio_grouping=False))
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 50
    in_order = TrainingSampler(10, shuffle=False)
    epochs = ids(take(3, batch=10, aspect_ratio_grouping=False, sampler=in_order))
    assert epochs == [list(range(10))] * 3


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("size", "batch"), [(10, 4), (7, 3), (40, 4), (3, 8)])
def test_blocks_go_on_where_the_last_one_ends(size, batch, shuffle):
    """Each block is of at most 20 images, or of one epoch; images wait for batches across them."""
    repeats = np.where(np.arange(size) % 4 == 1, 1.6, 1.0)
    is_wide = np.arange(size) % 3 == 0

    def first(count, is_wide, batch_size, start=0):
        order = BatchOrder(repeats, is_wide, batch_size, 5, shuffle, block_size=20)
        return [tuple(one) for one in itertools.islice(order.batches(start), count)]

    flat = [index for (index,) in first(60 * batch, np.zeros(size, bool), 1)]
    expected, waiting = [], {True: [], False: []}
    for index in flat:  # Detectron2's AspectRatioGroupedDataset
        bucket = waiting[bool(is_wide[index])]
        bucket.append(index)
        if len(bucket) == batch:
            expected.append(tuple(bucket))
            bucket.clear()
    assert first(len(expected), is_wide, batch) == expected
    for start in range(0, len(expected), 3):
        assert first(5, is_wide, batch, start)[: len(expected) - start] == expected[start:][:5]


def test_epochs_differ_across_blocks():
    order = BatchOrder(np.ones(20), np.zeros(20, bool), 20, seed=5, block_size=40)
    epochs = [tuple(epoch) for epoch in itertools.islice(order.batches(), 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == 10


def test_repeat_factors_are_kept():
    factors = torch.tensor([1.0, 1.5, 3.2, 0.25])
    sampler = RepeatFactorTrainingSampler(factors)
    batches = ids(take(4000, 4, batch=1, sampler=sampler, aspect_ratio_grouping=False))
    counts = Counter(itertools.chain(*batches))
    for image, factor in enumerate(factors / factors.sum()):
        assert counts[image] / 4000 == pytest.approx(factor.item(), abs=0.02)


def test_subset_depends_on_the_seed_alone():
    subsets = [
        set(itertools.chain(*ids(take(30, sampler=RandomSubsetTrainingSampler(10, 0.4), seed=s))))
        for s in (5, 5, 6)
    ]
    assert [len(subset) for subset in subsets] == [4, 4, 4]
    assert subsets[0] == subsets[1] != subsets[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_mapper_may_leave_images_out(num_workers):
    def mapper(record):
        return None if record["id"] < 6 else draw(record)

    whole = take(20, mapper=mapper, num_workers=num_workers)
    assert set(itertools.chain(*ids(whole))) == {6, 7, 8, 9}
    assert whole == take(20, mapper=mapper)
    assert take(15, mapper=mapper, start_iteration=5) == whole[5:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named_in_one_line(tmp_path, num_workers):
    path = tmp_path / "cat.jpg"
    Image.new("RGB", (64, 48)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    record = {"file_name": str(path), "image_id": 1, "width": 64, "height": 48, "annotations": []}
    mapper = DatasetMapper(get_cfg(), is_train=True)
    loader = TrainLoader([record], mapper=mapper, total_batch_size=1, num_workers=num_workers)
    with pytest.raises(UnreadableImageError) as error:
        next(iter(loader))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"The image {path} does not decode: ")
    assert not multiprocessing.active_children()  # Python would wait for them at its end


def fail(record):
    raise ZeroDivisionError("of the mapper")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_with_sound_pictures_stay_as_they_are_and_end_the_workers(tmp_path, num_workers):
    Image.new("RGB", (64, 48)).save(tmp_path / "cat.png")
    for dataset in (records(4), [{"file_name": str(tmp_path / "cat.png")}]):
        loader = TrainLoader(dataset, mapper=fail, total_batch_size=1, num_workers=num_workers)
        with pytest.raises(ZeroDivisionError, match="of the mapper"):
            next(iter(loader))
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("end", ["close", "collect"])
def test_no_worker_outlives_the_iterator(end):
    batches = iter(TrainLoader(records(4), mapper=draw, total_batch_size=1, num_workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    if end == "close":
        batches.close()
    del batches
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_workers_answer_to_their_parent_alone(number):
    batches = iter(TrainLoader(records(4), mapper=draw, total_batch_size=1, num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for _ in range(3):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True, timeout=60)
    for _ in range(5):
        next(batches)
    assert worker.is_alive()
    worker.terminate()  # as Python does when it exits
    worker.join(5)
    assert worker.exitcode == 0


def test_workers_end_with_their_parent():
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        batches = iter(TrainLoader(records(4), mapper=draw, total_batch_size=1, num_workers=2))
        next(batches)
        workers = [str(worker.pid) for worker in multiprocessing.active_children()]
        os.write(writer, " ".join(workers).encode())
        time.sleep(60)
        os._exit(1)
    assert select.select([reader], [], [], 30)[0]
    workers = os.read(reader, 100).split()
    assert len(workers) == 2
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    deadline = time.monotonic() + 10
    while any(is_alive(int(worker)) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process):
    """Whether it runs: nobody may ask for the status of an orphan."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


def test_open_files(monkeypatch):
    limits, set_to = [(64, 5000), (64, 70)], []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.pop(0))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: set_to.append(limit))
    options = {"mapper": draw, "total_batch_size": 4, "num_workers": 2}
    TrainLoader(records(8), **options)
    ((limit, highest),) = set_to
    assert (2 * (8 + 4 * 8) < limit < 200, highest) == (True, 5000)
    with pytest.raises(
        ValueError, match=rf"^ulimit -n is 70, but 2 .* may need {limit} open files"
    ):
        TrainLoader(records(8), **options)


def test_mapper_that_leaves_all_out_is_an_error():
    with pytest.raises(ValueError, match="None for each of the 10 images"):
        take(1, mapper=lambda record: None)


def test_global_generators_are_left_alone():
    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    take(5)
    take(5, num_workers=1)
    assert state() == before


def test_starts_at_once_in_a_long_run():
    kinds = np.random.RandomState(0).rand(118_000) < 0.7
    dataset = [{"width": 1 + kind, "height": 1} for kind in kinds]
    options = {"mapper": lambda record: record["width"], "total_batch_size": 16}
    loader = TrainLoader(dataset, start_iteration=89_999, **options)
    start = time.process_time()
    (batch,) = itertools.islice(loader, 1)
    assert time.process_time() - start < 1
    assert len(batch) == 16


class Stream(IterableDataset):
    def __iter__(self):
        return iter(records(3))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (records(3), {"total_batch_size": 3, "world_size": 2}, "is 3, but must be a multiple of"),
        (records(3), {"total_batch_size": 0}, "is 0, but"),
        (records(3), {"total_batch_size": 1, "sampler": InferenceSampler(3)}, "InferenceSampler"),
        (Stream(), {"total_batch_size": 1}, "iterable"),
        ([], {"total_batch_size": 1}, "no image"),
    ],
)
def test_what_it_cannot_load_is_an_error(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(dataset, mapper=None, **options)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    toy.register_shapes(toy.make_shapes(tmp_path_factory.mktemp("toy") / "shapes", 20, 1))
    yield "shapes_train"
    toy.register_shapes()


@pytest.mark.parametrize(
    "name", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
)
def test_of_a_config(name, shapes):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (shapes,)
    cfg.DATALOADER.SAMPLER_TRAIN = name
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 4
    batches = list(itertools.islice(build_train_loader(cfg), 6))
    again = list(itertools.islice(build_train_loader(cfg, start_iteration=4), 2))
    cfg.SEED = 5
    other_seed = list(itertools.islice(build_train_loader(cfg), 6))
    orders = [[s["file_name"] for b in stream for s in b] for stream in (batches, other_seed)]
    assert orders[0] != orders[1]
    names = {record["file_name"] for record in DatasetCatalog.get(shapes)}
    for batch, other in zip(batches[4:], again):
        for sample, same in zip(batch, other):
            assert sample["file_name"] == same["file_name"]
            assert sample["file_name"] in names
            assert torch.equal(sample["image"], same["image"])
            boxes, same_boxes = (x["instances"].gt_boxes.tensor for x in (sample, same))
            assert torch.equal(boxes, same_boxes)


@pytest.mark.parametrize("least", [0, 99])
def test_filters_that_leave_no_image_are_named(least):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("crowds",)
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = least
    crowd = {"iscrowd": int(not least), "keypoints": [1, 1, 2] * 3 + [0] * 3, "category_id": 0}
    DatasetCatalog.register("crowds", lambda: [{"annotations": [crowd]}])
    message = (
        "PER_IMAGE is 99, but no image of crowds has more than 3 visible keypoints$"
        if least
        else "no image to train on: all images of crowds are without annotations, or with crowds"
    )
    try:
        with pytest.raises(ValueError, match=message):
            build_train_loader(cfg)
    finally:
        DatasetCatalog.pop("crowds")
