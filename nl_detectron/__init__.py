"""
Non-local blocks for Detectron2. Importing this package registers its blocks, backbones and heads.

The other subpackages, such as ``nl_detectron.engine``, are loaded when they are asked for. Without
Detectron2 there is nothing to register with: then only :mod:`nl_detectron.layers`, which needs
PyTorch alone, can be used, and an ImportError says so of the other names.
"""

import warnings

try:
    with warnings.catch_warnings():  # of what PyTorch no longer recommends
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # it is there, but lacks something itself
        raise
    _HAS_DETECTRON2 = False
else:
    _HAS_DETECTRON2 = True

__version__ = "0.1.0"

from nl_detectron.layers import GlobalContextBlock, NonLocalBlock
from nl_detectron.submodules import submodules

if _HAS_DETECTRON2:
    from nl_detectron.config import add_nonlocal_config, use_nonlocal_backbone
    from nl_detectron.modeling import (
        NONLOCAL_BLOCK_REGISTRY,
        NonLocalKeypointHead,
        build_nonlocal_backbone,
        insert_blocks,
        insert_nonlocal_blocks,
    )

_submodule = submodules(__name__)


def __getattr__(name: str) -> object:
    if not _HAS_DETECTRON2 and name in __all__:
        raise ImportError(
            f"nl_detectron.{name} needs Detectron2, which is not installed here: run `make setup` "
            "in nl_detectron's folder, or install it as "
            "https://detectron2.readthedocs.io/tutorials/install.html says."
        )
    return _submodule(name)


__all__ = [
    "NONLOCAL_BLOCK_REGISTRY",
    "GlobalContextBlock",
    "NonLocalBlock",
    "NonLocalKeypointHead",
    "add_nonlocal_config",
    "build_nonlocal_backbone",
    "insert_blocks",
    "insert_nonlocal_blocks",
    "use_nonlocal_backbone",
]
