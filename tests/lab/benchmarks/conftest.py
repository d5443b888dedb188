import gc

import pytest


@pytest.fixture(autouse=True)
def quick_garbage_collection():
    """Memory is measured after collecting garbage, which takes long where much is imported."""
    gc.freeze()
    yield
    gc.unfreeze()
