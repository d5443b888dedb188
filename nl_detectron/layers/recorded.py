"""Is what is called only written down, to be run elsewhere and for other sizes?"""

from __future__ import annotations

import torch

# PyTorch 2.1 has it under a private name only.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
"""Does torch.export or torch.compile write down the operators that are called?"""


def is_recorded() -> bool:
    """Does a tracer, an exporter or a compiler write down the operators that are called?"""
    return torch.jit.is_tracing() or is_compiling()
