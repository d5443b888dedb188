"""What is said of inserted blocks at the first step of their training, by whatever trainer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nl_detectron.modeling.blocks import gamma_parameters, nonlocal_blocks, norm_after_out
from nl_detectron.surgery import is_applied

_LOST = (
    "is not applied any more: what it came after was replaced, as a conversion to SyncBatchNorm or "
    "FrozenBatchNorm2d does with batch norm; convert first, and put blocks in then"
)


Inserted = tuple[str, nn.Module, int]
"""A block's name in what it was put into, itself, and its channels."""


def announce_at_first_step(module: nn.Module, inserted: Sequence[Inserted]) -> None:
    """
    At the first step of an optimizer that trains ``module``, log a line that tells which blocks
    are trained, and a warning for each that cannot learn, or that changes though it is frozen.
    """
    references = [(name, weakref.ref(block), channels) for name, block, channels in inserted]

    def announce(model: nn.Module, optimizer: Optimizer) -> None:
        states: dict[str, list[str]] = {}
        for name, reference, channels in references:
            block = reference()
            if block is None or not is_applied(block, model):
                _say(logging.WARNING, f"{name} {_LOST}")
                continue
            state = _state(block, optimizer)
            label = f"{type(block).__name__} {name} ({channels} channels)"
            states.setdefault(state, []).append(label)
            for problem in _problems(block, state):
                _say(logging.WARNING, f"{name} {problem}")
        text = "; ".join(f"{', '.join(names)}: {state}" for state, names in states.items())
        what = f"Blocks in {type(model).__name__}: {text or 'none'}"
        _say(logging.INFO, f"{what} ({type(optimizer).__name__})")

    if references:
        _at_first_step(module, announce)


def expect_lr_factors(module: nn.Module, gamma_lr_factor: float, lr_factor: float) -> None:
    """At the first step of an optimizer that trains ``module``, warn if that asks for learning
    rates of its blocks that they do not have."""
    if (gamma_lr_factor, lr_factor) == (1, 1):
        return

    def compare(model: nn.Module, optimizer: Optimizer) -> None:
        blocks = nonlocal_blocks(model).values()
        gammas = {p for block in blocks for p in gamma_parameters(block)}
        others = _parameters(blocks) - gammas
        rest = _parameters([model]) - gammas - others
        rates = {p: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        common = {rates[p] for p in rest & rates.keys()} - {0.0}
        for key, factor, parameters in (
            ("GAMMA_LR_FACTOR", gamma_lr_factor, gammas),
            ("LR_FACTOR", lr_factor, others),
        ):
            if factor != 1 and common & {rates[p] for p in parameters & rates.keys()}:
                _say(
                    logging.WARNING,
                    f"MODEL.NONLOCAL.{key} is {factor:g}, but this trainer does not apply it: see "
                    "nl_detectron.engine.scale_block_lr",
                )

    _at_first_step(module, compare)


def _at_first_step(module: nn.Module, check: Callable[[nn.Module, Optimizer], None]) -> None:
    """Call ``check`` at the first step of an optimizer that has parameters of ``module``; if all of
    these are frozen, of any. The hook is PyTorch's optimizers': copies of the model lack it."""
    reference = weakref.ref(module)
    is_done = False

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        nonlocal is_done
        if is_done or (model := reference()) is None:
            return
        own = _parameters([model])
        if own & _in(optimizer) or not any(p.requires_grad for p in own):
            is_done = True
            check(model, optimizer)

    register_optimizer_step_pre_hook(before_step)


def _state(block: nn.Module, optimizer: Optimizer) -> str:
    own = _parameters([block])
    trainable = {p for p in own if p.requires_grad}
    found = (trainable or own) & _in(optimizer)
    where = "in" if found == (trainable or own) else "partly in" if found else "not in"
    return f"{'trainable' if trainable else 'frozen'}, {where} the optimizer"


def _problems(block: nn.Module, state: str) -> list[str]:
    problems = []
    if state.startswith("trainable, not"):
        problems.append(
            "is not in the optimizer and will not learn: put blocks in before the optimizer is made"
        )
    norm = norm_after_out(block)
    is_dead = isinstance(norm, FrozenBatchNorm2d) and not norm.weight.any()
    if state.startswith("trainable") and is_dead:
        problems.append(
            "will never learn: its gamma is 0 and frozen, as batch norm was converted when the "
            "block was in the model already; put it in later, or set ZERO_INIT_LAYER to out"
        )
    norms = (module for module in block.modules() if isinstance(module, _BatchNorm))
    if state.startswith("frozen") and any(m.training and m.track_running_stats for m in norms):
        problems.append(
            "has no parameter that is trained, but its batch norm still moves: freeze it with "
            "FrozenBatchNorm2d.convert_frozen_batchnorm, or block.eval() in each iteration"
        )
    return problems


def _in(optimizer: Optimizer) -> set[nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _say(level: int, message: str) -> None:
    """To our log; where a trainer has set up none, to Detectron2's; if there is none, on screen."""
    if not comm.is_main_process():
        return
    for name in (__name__, "detectron2"):
        logger = logging.getLogger(name)
        if logger.hasHandlers() and logger.isEnabledFor(level):
            logger.log(level, message)
            return
    print(message)
