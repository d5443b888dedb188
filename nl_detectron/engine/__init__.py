from nl_detectron.engine.arguments import build_config, fit_config, parse_arguments
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.launch import launch
from nl_detectron.engine.trainer import Trainer

__all__ = [
    "NonLocalCheckpointer",
    "Trainer",
    "build_config",
    "fit_config",
    "launch",
    "parse_arguments",
]
