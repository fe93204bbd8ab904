"""Loader processes that end at once."""

import pytest
from torch.utils.data import _utils


@pytest.fixture(autouse=True)
def impatient_loaders(monkeypatch) -> None:
    """A loader that the garbage collector finds waits this long for each of its processes; it has closed their queues already."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
