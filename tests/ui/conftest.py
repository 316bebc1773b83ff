"""A real MLflow server over a store that `drank track` made, and the system's Chromium. `make test-ui` demands both."""

import os
import shutil
from pathlib import Path

import pytest

from drank.tracking import track
from drank.tracking.store import LOCAL_UI
from tests.toy import Runs, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the pages that are asked for: no profile of before, no GPU, no calls home.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


def missing() -> str | None:
    """Programs that these tests need and that are not here."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the Python package playwright: pip install 'drank[ui]'"
    if not any(map(shutil.which, BROWSERS)):
        return f"a browser ({', '.join(BROWSERS)}): apt-get install chromium"
    return None


@pytest.fixture(scope="module")
def tracked(request, tmp_path_factory):
    """A finished state, tracked into a store of its own: of DRANK_UI_ROOT, or the tiny project of tests/conftest.

    Its root, the address of its page, and its runs.
    """
    if (what := missing()) is not None:
        message = f"not here: {what}"
        pytest.fail(message) if os.environ.get("DRANK_UI") == "required" else pytest.skip(message)
    given = os.environ.get("DRANK_UI_ROOT")
    root = Path(given).resolve() if given else request.getfixturevalue("reproduced")
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
        page = track(root).where.split()[-1]
    return root, page, Runs(store)


@pytest.fixture(scope="module")
def server(tracked, tmp_path_factory):
    with serving(tracked[2].uri, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")  # not longer: while it is there, an event loop is running
def browser(tracked):
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, request, tmp_path):
    """A page of a new profile; what it shows at the end of the test is kept in the folder DRANK_UI_SCREENSHOTS."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(30_000)
    shown = context.new_page()
    yield shown
    folder = os.environ.get("DRANK_UI_SCREENSHOTS", tmp_path)
    shown.screenshot(path=Path(folder, f"{request.node.name.removeprefix('test_')}.png"))
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
