"""What the tests of training share."""

import pytest

from tests.support.training import run


@pytest.fixture(scope="package")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder
