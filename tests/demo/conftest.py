import pytest

from tests.random_model import save_random_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small model with random weights."""
    folder = tmp_path_factory.mktemp("trained")
    save_random_model(folder)
    return folder
