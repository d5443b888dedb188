from nl_detectron.config import build_config
from nl_detectron.engine.arguments import parse_arguments
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.exact_resume import ExactResume
from nl_detectron.engine.interruption import Interruption
from nl_detectron.engine.launch import launch
from nl_detectron.engine.trainer import Trainer

__all__ = [
    "ExactResume",
    "Interruption",
    "NonLocalCheckpointer",
    "Trainer",
    "build_config",
    "launch",
    "parse_arguments",
]
