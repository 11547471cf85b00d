"""What several test files share: a small data set and a run trained on it.

pytest-xdist's first process runs no test, but reads this file as well: what takes seconds to import is imported by the
fixture that uses it.
"""

import os
import signal
import socket

import pytest

os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"  # with symbols for sizes it costs more than it saves


def pytest_collection_modifyitems(items):
    """The longest files come first, for the two processes of `make test` to end together."""
    items.sort(key=lambda item: item.path.name not in ("test_released.py", "test_compile.py"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return data_of(12, 5, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    """Data of which an epoch has a single step."""
    return data_of(4, 1, tmp_path_factory.mktemp("four"))


def data_of(train_images, val_images, folder):
    from small_runs import write_images

    write_images(folder, "train", train_images)
    write_images(folder, "val", val_images)
    return folder


@pytest.fixture(autouse=True)
def signals():
    """A run sets handlers for signals, and a shell in the background ignores some: a test begins with Python's own."""
    from util.distributed import SIGNALS

    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """The folder of a run of two epochs of three steps, trained without any network."""
    from small_runs import train_in

    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        assert train_in(folder, out, "--epochs", 2) == 0
    return out


@pytest.fixture
def score(monkeypatch):
    """Evaluations cost nothing: each epoch of a run gets its AP_box from this list, and 5 when it is empty."""
    scores = []
    nothing = {name + area: None for name in ("AP_box", "AP_mask") for area in ("", "_50", "_S", "_M", "_L")}

    def evaluate(model, *_):
        model.eval()
        return {**nothing, "AP_box": scores.pop(0) if scores else 5.0, "AP_mask": 5.0}, []

    monkeypatch.setattr("train.evaluate", evaluate)
    monkeypatch.setattr("train.Log.draw_curves", lambda self: None)
    monkeypatch.setattr("util.log.draw_dataset", lambda *_: 1.0)
    return scores


@pytest.fixture
def still(monkeypatch, score):
    """Steps cost nothing either, and change no weight."""
    import torch

    losses = {"class_0": torch.tensor(1.0)}
    monkeypatch.setattr("train.train_step", lambda *_: (losses, torch.tensor(1.0)))
