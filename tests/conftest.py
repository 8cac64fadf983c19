"""No test touches the network, and each process keeps to one thread (the tests themselves start several)."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # its own tokenised rows, which its workers and children share
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])

LONG = ("test_faults.py", "test_training.py", "test_run.py", "test_real.py", "test_bon.py")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run in this process takes SIGTERM and Ctrl-C to itself; after each test they are as before."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)


def pytest_collection_modifyitems(items: list) -> None:
    """The long files first, so that no worker of pytest-xdist is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)
