"""What several test files share: a small data set and a run trained on it."""

import signal
import socket

import pytest

from small_runs import train_in, write_images


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, "train", 12)
    write_images(folder, "val", 5)
    return folder


@pytest.fixture(autouse=True)
def signals():
    """A run sets handlers for signals: put back what pytest had."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """The folder of a run of two epochs of three steps, trained without any network."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        assert train_in(folder, out, "--epochs", 2) == 0
    return out
