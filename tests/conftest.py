"""What the tests share: one thread count, the GPU marker, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "120"  # as in a pipe, whatever runs the tests; tables are as wide
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core; in every process of a test the same sums
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: threads that spin starve other processes

import pytest
import torch

from tests.support.watching import broken_rules, watch_files


def pytest_configure(config):
    """From here on every file that our code opens is looked at."""
    watch_files()


@pytest.fixture(autouse=True)
def files_are_opened_by_the_rules():
    """Only ``files`` opens tensor files, and everything is written through ``files.writing``: held in every test."""
    broken_rules()
    yield
    assert broken_rules() == []


def pytest_collection_modifyitems(config, items):
    """GPU tests are skipped with a reason; campaigns run only when asked for by marker."""
    asked = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("campaign") and "campaign" not in asked:
            item.add_marker(pytest.mark.skip(reason="a campaign: run it by its make target"))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """One folder for the saved pipelines that many tests read."""
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A simulated Hub that this process reads from, an empty cache, and an empty working folder."""
    from tests.support.hub_session import connect, forget
    from tests.support.hub_simulator import HubSimulator

    with HubSimulator() as simulator:
        connect(monkeypatch, simulator, tmp_path)
        yield simulator
        forget()


@pytest.fixture
def offline(monkeypatch):
    """A switch: from now on there is no network, and nothing is remembered but on disk."""
    from huggingface_hub import constants

    from tests.support.hub_session import forget

    def go():
        forget()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return go
