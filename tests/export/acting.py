"""Non-local blocks that act: an export of blocks that are the identity would prove nothing."""

import torch
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.analysis.recording import record_calls
from nl_detectron.modeling import nonlocal_blocks


def make_act(model, gain=1.0):
    """Random weights, in place, with which all blocks add something of the size of their input."""
    for block in nonlocal_blocks(model).values():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
        if block.norm is not None:
            nn.init.ones_(block.norm.weight)
    return model


def make_acting_block(channels, block_class=NonLocalBlock, **options):
    torch.manual_seed(1)
    return make_act(block_class(channels, **options), gain=2.5)


@torch.no_grad()
def run_acting(model, *inputs):
    """What the model returns; its blocks do act on these inputs."""
    blocks = nonlocal_blocks(model)
    with record_calls(blocks) as calls:
        outputs = model(*inputs)
    for name, block in blocks.items():
        assert calls[name]
        for (x,) in calls[name]:
            assert (block(x) - x).norm() >= 0.3 * x.norm(), name
    return outputs
