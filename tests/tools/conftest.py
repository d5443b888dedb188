import logging

import pytest


@pytest.fixture(autouse=True)
def _no_handlers_of_other_tests(monkeypatch):
    """They write to a stdout that is closed by now."""
    for name in ("detectron2", "fvcore", "nl_detectron"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
