"""The old place of :mod:`nl_detectron.weights.checkpoint_io`."""

from nl_detectron.weights.checkpoint_io import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]
