"""Training, loading and prediction; what is named here is imported when it is asked for."""

from nl_detectron.engine.launch import launch  # at once, as its module has the same name
from nl_detectron.submodules import submodules

_HOMES = {
    "ExactResume": "nl_detectron.engine.exact_resume",
    "Interruption": "nl_detectron.engine.interruption",
    "NonLocalCheckpointer": "nl_detectron.engine.checkpoint",
    "Trainer": "nl_detectron.engine.trainer",
    "build_config": "nl_detectron.config",
    "get_optimizer_params": "nl_detectron.engine.optimizer",
    "parse_arguments": "nl_detectron.engine.arguments",
    "scale_block_lr": "nl_detectron.engine.optimizer",
}
__all__ = ["launch", *_HOMES]
__getattr__ = submodules(__name__, _HOMES)
