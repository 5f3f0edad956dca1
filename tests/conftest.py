"""Fixtures of all tests: where optional real data lies, and a timm that imports without torchvision's binary."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared-data",
        default=None,
        help="folder with imagenette/, imagenet-sample/ and weights/ (default: ../shared/data beside the checkout)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: one begun last would run when the other processes have nothing left."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.name != "test_rehearsal.py", -slow[item.path]))


@pytest.fixture(autouse=True, scope="session")
def signals_are_heard() -> None:
    """A job in the background ignores Ctrl-C, and under nohup SIGHUP, and so would all runs that tests start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Manifests go to a folder of this session, also those of the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("DEITFAST_HOME", raising=False)
        yield


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """Folder of real images and weights; the test is skipped, with the reason, where there is none."""
    option = request.config.getoption("--shared-data")
    folder = Path(option) if option else request.config.rootpath.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (give --shared-data FOLDER)")
    return folder


@pytest.fixture(scope="session")
def timm():
    """The timm module, importable even where torchvision's compiled operators are missing."""
    from tests.reference import import_timm

    return import_timm()
