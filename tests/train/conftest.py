import pytest
from tiny_run import write_config


@pytest.fixture(scope="session")
def _tiny_data(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(_tiny_data, tmp_path):
    """Config file of a tiny run whose output goes to a directory of this test; the data are shared."""
    path = tmp_path / "tiny.yaml"
    path.write_text(_tiny_data.read_text().replace(f"{_tiny_data.parent}/runs", f"{tmp_path}/runs"))
    return path
