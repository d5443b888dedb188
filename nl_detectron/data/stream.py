"""The training batches of a run, as a function of its seed and of the iteration alone."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from nl_detectron.data.order import BatchOrder, is_shuffled, repeats_of
from nl_detectron.data.pictures import UnreadableImageError, picture_problem
from nl_detectron.data.seeding import cpu_generators_kept, random_state, seed_cpu_generators
from nl_detectron.data.workers import belonging_to_parent, check_open_files

logger = logging.getLogger(__name__)


def build_train_loader(cfg: CfgNode, **options: Any) -> TrainLoader:
    """Build the loader of what Detectron2's ``build_detection_train_loader(cfg)`` loads (the same
    images, filters, sampler kind, mapper and batch size), in an order that a resumed run goes on
    with. In a project's own trainer, ``nl_detectron.engine.ExactResume`` says where to start.

    Args:
        **options: ``mapper``, ``dataset`` and ``sampler`` as ``build_detection_train_loader`` takes
            them; ``seed`` (default: ``cfg.SEED``, 0 if that is negative), ``start_iteration``,
            ``rank`` and ``world_size`` as :class:`TrainLoader` takes them.

    Raises:
        ValueError: no image passes Detectron2's filters, or see :class:`TrainLoader`.
    """
    own = {key: options.pop(key) for key in ("mapper", "dataset", "sampler") if key in options}
    options = {"seed": max(cfg.SEED, 0), **options}
    try:
        loaded = build_detection_train_loader.from_config(cfg, **own)
    except AssertionError as error:
        if not str(error).startswith("No valid data found"):
            raise
        raise ValueError(f"There is no image to train on: {_why_none(cfg)}") from error
    return TrainLoader(**loaded, **options)


def _why_none(cfg: CfgNode) -> str:
    """The one of Detectron2's filters that leaves no image of the datasets."""
    names, least = cfg.DATASETS.TRAIN, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    counts = [
        sum(v > 0 for a in record["annotations"] for v in a.get("keypoints", ())[2::3])
        for record in itertools.chain.from_iterable(map(DatasetCatalog.get, names))
    ]
    if cfg.MODEL.KEYPOINT_ON and max(counts) < least:
        return (
            f"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE is {least}, but no image of "
            f"{', '.join(names)} has more than {max(counts)} visible keypoints"
        )
    return f"all images of {', '.join(names)} are without annotations, or with crowds alone"


class TrainLoader:
    """Loads batches without end, each a function of the seed and its iteration: not of the
    iteration that was started at, not of the number of loader workers, not of any random state. The
    batches of all ranks of an iteration are, one after the other, the batch of one process.

    An epoch shows every image once (or as often as the sampler says), in an order of its own. With
    aspect ratio grouping an image waits until there is a batch of its kind, wide or not, as in
    Detectron2, but by its recorded size, before anything is loaded. While a sample is mapped,
    Python's, NumPy's and torch's (CPU) generators are seeded by the seed and its place in the
    stream. If the mapper returns None, other images are tried, in an order drawn in the same way.

    Args:
        dataset: Detectron2's records, or a dataset with an index that has such records.
        mapper: from a record to what the model takes, or None to leave the image out.
        total_batch_size: the images of an iteration, of all ranks together.
        sampler: one of Detectron2's training samplers; by default each image comes once.
        seed, start_iteration: what the first batch depends on; also attributes, read when it is
            asked for: Detectron2's trainers make the iterator before they know where a run goes on.
        rank, world_size: whose part of the batch is loaded; by default this process's.
        **options: of torch's ``DataLoader``, such as ``num_workers``, or ``collate_fn`` (by
            default a batch is a list of samples).

    Raises:
        ValueError: the dataset is empty or has no index; the ranks cannot share the batch
            equally; the sampler is of another kind; the workers may open too few files.
        UnreadableImageError: while it is iterated, a picture cannot be read.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]] | Dataset,
        *,
        mapper: Callable[[dict[str, Any]], Any] | None,
        total_batch_size: int,
        sampler: Any = None,
        aspect_ratio_grouping: bool = True,
        seed: int = 0,
        start_iteration: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        self._rank = comm.get_rank() if rank is None else rank
        world_size = comm.get_world_size() if world_size is None else world_size
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                f"The batch size (SOLVER.IMS_PER_BATCH) is {total_batch_size}, but must be a "
                f"multiple of the {world_size} processes"
            )
        if isinstance(dataset, IterableDataset):
            raise ValueError("An iterable dataset has no positions to go on from: give it an index")
        self._batch_size = total_batch_size
        self._rank_size = total_batch_size // world_size
        self._sampler = sampler
        self._size = len(dataset)  # type: ignore[arg-type]
        if not self._size or not repeats_of(sampler, self._size, 0).any():
            raise ValueError("There is no image to train on")
        self._is_wide = np.zeros(self._size, bool)
        if aspect_ratio_grouping:
            records = (dataset[index] for index in range(self._size))
            self._is_wide = np.fromiter(map(_is_wide, records), bool, self._size)
        num_samples = self._rank_size * (options.get("prefetch_factor") or 2)
        check_open_files(options.get("num_workers", 0), num_samples)
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self._dataset = dataset
        self._mapper = PicklableWrapper(mapper or _identity)
        self._options = {
            **options,
            "collate_fn": options.get("collate_fn") or _identity,
            "worker_init_fn": belonging_to_parent(options.get("worker_init_fn")),
        }
        self.seed = seed
        self.start_iteration = start_iteration

    @property
    def iterations_per_epoch(self) -> float:
        """How many batches it takes to show as many images as there are."""
        return self._size / self._batch_size

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn or started before the first batch is asked for, and
        # so that the workers end with it: its frame has the only reference to their iterator.
        order = BatchOrder(
            repeats_of(self._sampler, self._size, self.seed),
            self._is_wide,
            self._batch_size,
            self.seed,
            is_shuffled(self._sampler),
        )
        loader = DataLoader(
            _Samples(self._dataset, self._mapper, self.seed, np.flatnonzero(order.repeats)),
            batch_sampler=self._keys(order),
            # Of its own: otherwise the loader would draw from torch's global one.
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        try:
            yield from loader
        except Exception as error:
            if not loader.num_workers:
                raise
            # Without its frames, which would keep the workers; the message has what happened there.
            failure = error.with_traceback(None)
            if isinstance(error, UnreadableImageError):
                message = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
                failure = UnreadableImageError(message)
        raise failure

    def _keys(self, order: BatchOrder) -> Iterator[list[tuple[int, int]]]:
        """For each iteration the place in the stream and the image, of each of our samples."""
        start = self.start_iteration
        ours = range(self._rank * self._rank_size, (self._rank + 1) * self._rank_size)
        for iteration, batch in enumerate(order.batches(start), start):
            yield [(iteration * self._batch_size + slot, int(batch[slot])) for slot in ours]


class _Samples(Dataset):
    """From a place in the stream and an image to a mapped sample."""

    def __init__(
        self, dataset: Any, mapper: Callable[[Any], Any], seed: int, images: np.ndarray
    ) -> None:
        self._dataset, self._mapper, self._seed, self._images = dataset, mapper, seed, images

    def __getitem__(self, key: tuple[int, int]) -> Any:
        place, index = key
        # Those of a worker are used for nothing else.
        is_worker = get_worker_info() is not None
        with contextlib.nullcontext() if is_worker else cpu_generators_kept():
            seed_cpu_generators(self._seed, "sample", place)
            sample = self._map(index)
            if sample is not None:
                return sample
            others = random_state(self._seed, "instead", place).permutation(self._images)
            for tries, other in enumerate(others[others != index], start=2):
                if tries == 4:
                    logger.warning(f"The mapper leaves out image {index} and the 2 tried instead")
                sample = self._map(int(other))
                if sample is not None:
                    return sample
        raise ValueError(f"The mapper returns None for each of the {len(self._images)} images")

    def _map(self, index: int) -> Any:
        record = self._dataset[index]
        try:
            return self._mapper(record)
        except Exception as error:  # PIL's decoders raise anything, mostly without the file's name
            path = record.get("file_name") if isinstance(record, dict) else None
            size = (record.get("width"), record.get("height")) if path else (None, None)
            if path and (problem := picture_problem(path, *size, decode=True)):
                raise UnreadableImageError(f"The image {path} {problem}") from error
            raise


def _is_wide(record: dict[str, Any]) -> bool:
    """Without a recorded size an image counts as not wide."""
    return record.get("width", 0) > record.get("height", 0)


def _identity(value: Any) -> Any:
    return value
