from nl_detectron.config import build_config
from nl_detectron.engine.arguments import parse_arguments
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.exact_resume import ExactResume
from nl_detectron.engine.interruption import Interruption
from nl_detectron.engine.launch import launch
from nl_detectron.engine.optimizer import get_optimizer_params, scale_block_lr
from nl_detectron.engine.trainer import Trainer
from nl_detectron.submodules import submodules

__all__ = [
    "ExactResume",
    "Interruption",
    "NonLocalCheckpointer",
    "Trainer",
    "build_config",
    "get_optimizer_params",
    "launch",
    "parse_arguments",
    "scale_block_lr",
]

__getattr__ = submodules(__name__)
