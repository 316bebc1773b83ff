"""A real MLflow server over a store that `drank track` made, and the system's Chromium. `make test-ui` demands both."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from drank.tracking import track
from drank.tracking.store import LOCAL_UI
from tests.test_tracking import Runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the pages that are asked for: no profile of before, no GPU, no calls home.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
SECONDS_TO_START = 120


def missing() -> str | None:
    """What is not here of what these tests need."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the Python package playwright: pip install 'drank[ui]'"
    if not any(map(shutil.which, BROWSERS)):
        return f"a browser ({', '.join(BROWSERS)}): apt-get install chromium"
    return None


@pytest.fixture(scope="module")
def needed() -> None:
    if (what := missing()) is not None:
        message = f"not here: {what}"
        pytest.fail(message) if os.environ.get("DRANK_UI") == "required" else pytest.skip(message)


@pytest.fixture(scope="module")
def tracked(needed, request, tmp_path_factory):
    """A finished state, tracked into a store of its own: of DRANK_UI_ROOT, or the tiny project of tests/conftest."""
    given = os.environ.get("DRANK_UI_ROOT")
    root = Path(given).resolve() if given else request.getfixturevalue("reproduced")
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
        state = track(root)
    return root, store, state, Runs(store)


@pytest.fixture(scope="module")
def server(tracked):
    """The address of `mlflow server` on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", tracked[2].tracking_uri],
            cwd=tracked[1],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(f"{address}/health", process)
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address}; mlflow server ended with {process.poll()}")


@pytest.fixture(scope="module")  # not longer: while it is there, an event loop is running
def browser(needed):
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("DRANK_UI_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(browser, screenshots, request):
    """A page of a new profile; what it shows at the end of the test is kept under the test's name."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(30_000)
    shown = context.new_page()
    yield shown
    shown.screenshot(path=screenshots / f"{request.node.name.removeprefix('test_')}.png")
    context.close()


@pytest.fixture
def open_page(page, server):
    """Open a page of MLflow by its path behind `#`, in its mode for models and without the panel of its assistant."""

    def open_it(path: str, **query: str):
        if path.startswith(LOCAL_UI):
            page.goto(path.replace(LOCAL_UI, server) + "".join(f"&{key}={value}" for key, value in query.items()))
        else:
            pairs = "&".join(f"{key}={value}" for key, value in (query | {"workflowType": "machine_learning"}).items())
            page.goto(f"{server}/#{path}?{pairs}")
        page.get_by_role("button", name="Close", exact=True).first.click()
        return page

    return open_it
