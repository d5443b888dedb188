"""Non-local blocks for Detectron2. Importing this package registers all that it provides."""

import warnings

try:
    import detectron2

    with warnings.catch_warnings():  # of what PyTorch no longer recommends
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # it is there, but lacks something itself
        raise
    raise ImportError(
        "nl_detectron needs Detectron2, which is not installed here: run `make setup` in "
        "nl_detectron's folder, or install it as "
        "https://detectron2.readthedocs.io/tutorials/install.html says."
    ) from error

__version__ = "0.1.0"

import nl_detectron.data  # noqa: F401
from nl_detectron.config import add_nonlocal_config
from nl_detectron.layers import GlobalContextBlock, NonLocalBlock
from nl_detectron.modeling import (
    NONLOCAL_BLOCK_REGISTRY,
    NonLocalKeypointHead,
    build_nonlocal_backbone,
    insert_blocks,
    insert_nonlocal_blocks,
)

__all__ = [
    "NONLOCAL_BLOCK_REGISTRY",
    "GlobalContextBlock",
    "NonLocalBlock",
    "NonLocalKeypointHead",
    "add_nonlocal_config",
    "build_nonlocal_backbone",
    "insert_blocks",
    "insert_nonlocal_blocks",
]
