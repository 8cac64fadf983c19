"""No test touches the network, and each process keeps to one thread (the tests themselves start several)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])

LONG = ("test_faults.py", "test_training.py")


def pytest_collection_modifyitems(items: list) -> None:
    """The long files first, so that no worker of pytest-xdist is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)
