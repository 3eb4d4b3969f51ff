"""The PyTorch oracle is imported only where a parity test asks for it, and is then required."""

import pytest


@pytest.fixture(scope="session")
def oracle():
    import oracle

    return oracle
