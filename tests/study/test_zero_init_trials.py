import torch
from torch import nn

from zero_init_trials import multiply_rate


def test_parameters_of_the_module_alone_get_the_higher_rate():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    groups = [
        {"params": [model[0].weight, model[1].weight]},
        {"params": [model[0].bias, model[1].bias], "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    multiply_rate(optimizer, model[1], 10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert [rates[id(p)] for p in model.parameters()] == [0.5, 0.5, 5, 5]
    assert [decays[id(p)] for p in model.parameters()] == [0, 0.5, 0, 0.5]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
