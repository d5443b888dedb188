"""The training batches of a run, as a function of its seed and of the iteration alone."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from nl_detectron.data.pictures import UnreadableImageError, picture_problem

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16  # images; whole epochs of a small dataset are drawn together up to this many


def build_train_loader(cfg: CfgNode, **options: Any) -> TrainLoader:
    """
    What Detectron2's ``build_detection_train_loader(cfg)`` loads (the same images, filters, sampler
    kind, mapper and batch size), in an order that a resumed run goes on with. In a project's own
    trainer, ``nl_detectron.engine.ExactResume`` says where to start.

    Args:
        cfg: a config of Detectron2.
        **options: ``mapper``, ``dataset`` and ``sampler`` as ``build_detection_train_loader`` takes
            them; ``seed`` (default: ``cfg.SEED``, 0 if that is negative), ``start_iteration``,
            ``rank`` and ``world_size`` as :class:`TrainLoader` takes them.

    Returns:
        The loader.

    Raises:
        ValueError: see :class:`TrainLoader`.
    """
    own = {key: options.pop(key) for key in ("mapper", "dataset", "sampler") if key in options}
    options = {"seed": max(cfg.SEED, 0), **options}
    return TrainLoader(**build_detection_train_loader.from_config(cfg, **own), **options)


class TrainLoader:
    """
    An endless iterable of batches, each a function of the seed and its iteration: not of the
    iteration that was started at, not of the number of loader workers, not of any random state.
    The batches of all ranks of an iteration are, one after the other, the batch of one process.

    An epoch shows every image once (or as often as the sampler says), in an order of its own. With
    aspect ratio grouping an image waits until there is a batch of its kind, wide or not, as in
    Detectron2, but by its recorded size, before anything is loaded. While a sample is mapped,
    Python's, NumPy's and torch's (CPU) generators are seeded by the seed and its place in the
    stream. If the mapper returns None, other images are tried, in an order drawn in the same way.

    Attributes:
        seed, start_iteration: may be set until the first batch is taken.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]] | Dataset,
        *,
        mapper: Callable[[dict[str, Any]], Any] | None,
        total_batch_size: int,
        sampler: Any = None,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        start_iteration: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            dataset: Detectron2's records, or a dataset with an index that has such records.
            mapper: from a record to what the model takes, or None to leave the image out.
            total_batch_size: the images of an iteration, of all ranks together.
            sampler: one of Detectron2's training samplers, which says how often an image comes in
                an epoch; by default each comes once.
            aspect_ratio_grouping: make batches of images that are wide, or are not.
            num_workers: processes that load; 0 is this one.
            collate_fn: makes a batch of a list of samples; by default it is the list.
            seed: of everything that is drawn.
            start_iteration: the iteration of the first batch.
            rank, world_size: whose part of the batch is loaded; by default this process's.
            **options: more options of torch's ``DataLoader``.

        Raises:
            ValueError: the dataset is empty or has no index; the ranks cannot share the batch
                equally; the sampler is of another kind.
            UnreadableImageError: while it is iterated, a picture cannot be read.
        """
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
            self._is_wide = np.fromiter(map(_is_wide, _items(dataset)), bool, self._size)
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self._dataset = dataset
        self._mapper = PicklableWrapper(mapper or _identity)
        self._options = {
            "num_workers": num_workers,
            "collate_fn": collate_fn or _identity,
            "worker_init_fn": _outlive_first_signal,
            **options,
        }
        self.seed = seed
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn or started before the first batch is asked for:
        # Detectron2 0.6 makes the iterator before it knows where the run goes on.
        repeats = repeats_of(self._sampler, self._size, self.seed)
        shuffle = getattr(self._sampler, "_shuffle", True)
        samples = _Samples(self._dataset, self._mapper, self.seed, np.flatnonzero(repeats))
        # A generator of its own: otherwise the loader would draw from torch's global one.
        loader = DataLoader(
            samples,
            batch_sampler=self._keys(repeats, shuffle),
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        try:
            yield from loader
        except Exception as error:
            if not loader.num_workers:
                raise
            # The frames here would keep the workers, for which Python waits at its end, for ever.
            # What happened in a worker is in the message.
            failure = error.with_traceback(None)
            if isinstance(error, UnreadableImageError):
                message = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
                failure = UnreadableImageError(message)
        raise failure

    def _keys(self, repeats: np.ndarray, shuffle: bool) -> Iterator[list[tuple[int, int]]]:
        """For each iteration the place in the stream and the image, of each of our samples."""
        start = self.start_iteration
        batches = index_batches(
            repeats, self._is_wide, self._batch_size, self.seed, start, shuffle=shuffle
        )
        first = self._rank * self._rank_size
        for iteration, batch in enumerate(batches, start):
            place = iteration * self._batch_size
            ours = range(first, first + self._rank_size)
            yield [(place + slot, int(batch[slot])) for slot in ours]


def index_batches(
    repeats: np.ndarray,
    is_wide: np.ndarray,
    batch_size: int,
    seed: int,
    start: int = 0,
    *,
    shuffle: bool = True,
) -> Iterator[np.ndarray]:
    """
    The endless stream of batches, as indices into the dataset.

    Args:
        repeats: (N,), how often each image comes in an epoch; a fraction is a chance, drawn anew in
            each epoch.
        is_wide: (N,) bool; a batch has images of one kind only.
        batch_size: B, images in a batch.
        seed: of the shuffles and the chances.
        start: the number of the first batch to yield; those before it cost far less than a batch.
        shuffle: without it, an epoch is in the order of the dataset.

    Yields:
        (B,) int64.
    """
    waiting = [np.empty(0, np.int64)] * 2
    number = 0
    for block in itertools.count():
        indices = _epochs(repeats, seed, block, shuffle)
        full, ends = [], []
        for kind in (0, 1):
            places = np.flatnonzero(is_wide[indices] == kind)
            num_waiting = len(waiting[kind])
            queue = np.concatenate([waiting[kind], indices[places]])
            end = len(queue) // batch_size * batch_size
            full.append(queue[:end].reshape(-1, batch_size))
            # A batch comes when its last image does.
            ends.append(places[np.arange(batch_size - 1, end, batch_size) - num_waiting])
            waiting[kind] = queue[end:]
        batches = np.concatenate(full)[np.argsort(np.concatenate(ends))]
        yield from batches[max(start - number, 0) :]
        number += len(batches)


def repeats_of(sampler: Any, size: int, seed: int) -> np.ndarray:
    """
    How often each of ``size`` images comes in an epoch, as one of Detectron2's samplers has it.

    Args:
        sampler: the sampler; None is a ``TrainingSampler``.
        size: N, the images of the dataset.
        seed: draws the subset of a ``RandomSubsetTrainingSampler``.

    Returns:
        (N,) float64.

    Raises:
        ValueError: the sampler is of another kind.
    """
    if isinstance(sampler, RepeatFactorTrainingSampler):
        return (sampler._int_part + sampler._frac_part).double().numpy()
    if isinstance(sampler, RandomSubsetTrainingSampler):
        order = _random_state(seed, "subset").random_sample(size).argsort(kind="stable")
        return (order.argsort() < sampler._size_subset).astype(float)
    if sampler is None or type(sampler) is TrainingSampler:
        return np.ones(size)
    raise ValueError(f"The training sampler is a {type(sampler).__name__}, which is not known here")


def seed_generators(*key: int | str) -> None:
    """
    Seed Python's, NumPy's and torch's global generators, CUDA's included, by what the key says.

    Args:
        *key: numbers and words; another key is another seed.
    """
    _seed_cpu(*key)
    # torch.manual_seed would note where it was called, in milliseconds, where there is no CUDA.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(_hash(*key))


class _Samples(Dataset):
    """From a place in the stream and an image to a mapped sample."""

    def __init__(
        self, dataset: Any, mapper: Callable[[Any], Any], seed: int, images: np.ndarray
    ) -> None:
        self._dataset, self._mapper, self._seed, self._images = dataset, mapper, seed, images

    def __getitem__(self, key: tuple[int, int]) -> Any:
        place, index = key
        with _global_generators_kept():
            _seed_cpu(self._seed, "sample", place)
            sample = self._map(index)
            if sample is not None:
                return sample
            others = _random_state(self._seed, "instead", place).permutation(self._images)
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


def _epochs(repeats: np.ndarray, seed: int, block: int, shuffle: bool) -> np.ndarray:
    """The images of a block of epochs, in order. The legacy generator of NumPy never changes."""
    images = np.flatnonzero(repeats)
    num_epochs = max(1, _BLOCK // len(images))
    rng = _random_state(seed, "epochs", block)
    floor = np.floor(repeats[images])
    chance = rng.random_sample((num_epochs, len(images)))
    times = (floor + (chance < repeats[images] - floor)).astype(np.int64).ravel()
    indices = np.repeat(np.tile(images, num_epochs), times)
    if not shuffle:
        return indices
    epoch = np.repeat(np.arange(num_epochs * len(images)) // len(images), times)
    return indices[np.argsort(epoch + rng.random_sample(len(indices)))]  # equal keys: never


def _hash(*key: int | str) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _random_state(*key: int | str) -> np.random.RandomState:
    high, low = divmod(_hash(*key), 1 << 32)
    return np.random.RandomState([high, low])


def _seed_cpu(*key: int | str) -> None:
    value = _hash(*key)
    random.seed(value)
    np.random.seed(divmod(value, 1 << 32))
    torch.default_generator.manual_seed(value)


@contextlib.contextmanager
def _global_generators_kept() -> Iterator[None]:
    if get_worker_info() is not None:  # a worker's are used for nothing else
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _items(dataset: Any) -> Iterator[dict[str, Any]]:
    return (dataset[index] for index in range(len(dataset)))


def _is_wide(record: dict[str, Any]) -> bool:
    """Without a recorded size an image counts as not wide."""
    return record.get("width", 0) > record.get("height", 0)


def _identity(value: Any) -> Any:
    return value


def _outlive_first_signal(worker_id: int) -> None:
    """
    A signal to the whole group of processes must not end a worker before the run has stopped. The
    second one does, and so does torch's own, when a worker does not end by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, functools.partial(_die_next_time, number))


def _die_next_time(number: signal.Signals, *_: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
