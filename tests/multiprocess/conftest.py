import pytest
from launch import SmallRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> SmallRuns:
    return SmallRuns(tmp_path_factory.mktemp("runs"))
