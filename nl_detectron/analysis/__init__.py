"""Looking into the non-local blocks of a model: what they get, attend to, do and cost."""

from nl_detectron.submodules import submodules

__getattr__ = submodules(__name__)
