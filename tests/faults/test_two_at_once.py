"""Two commands at once, a few times (see ``two_at_once``).

``python -m tests.faults.two_at_once`` does it often, and with whole pipelines.
"""

import multiprocessing
import threading
from contextlib import ExitStack, contextmanager

import pytest

from drank.project.files import FileError, replacing_folder, scratch_folder, write_text
from drank.project.turns import turn
from tests.faults.two_at_once import Projects, tried


@pytest.fixture(scope="module")
def projects(reproduced, tmp_path_factory):
    return Projects(reproduced, tmp_path_factory.mktemp("two"), seed=0, quick=True)


@pytest.mark.pipeline
@pytest.mark.parametrize("case", ["one stage twice by hand", "drank track of two clones"])
def test_nothing_is_lost(projects, case):
    assert tried(projects, case) in (("both",), ("refused",))


def filled_by_another(enter, entered, leave):
    with enter():
        entered.set()
        leave.wait()


@contextmanager
def another_in(block):
    """A process that is in this block, until it is killed."""
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    process = context.Process(target=filled_by_another, args=(block, entered, leave))
    process.start()
    entered.wait()
    yield process
    process.kill()
    process.join()


def test_a_turn_waits_until_the_process_that_has_it_is_killed(tmp_path, caplog):
    caplog.set_level("INFO")
    with another_in(lambda: turn(str(tmp_path), "another")) as process:
        threading.Timer(0.3, process.kill).start()
        with turn(str(tmp_path), "another"):
            assert caplog.messages == ["waiting: another is at work"]
    with turn(str(tmp_path), "another"), turn(str(tmp_path / "other"), "another"):
        assert len(caplog.messages) == 1


def test_a_folder_that_another_process_fills_is_refused_until_that_is_killed(tmp_path):
    destination = tmp_path / "folder"
    with another_in(lambda: replacing_folder(destination)):
        with pytest.raises(FileError, match=r"folder.*another process is writing this"), replacing_folder(destination):
            pass
        assert names(tmp_path) == [".folder.partial"]
    with replacing_folder(destination) as folder:
        write_text(folder / "a", "1")
    assert names(tmp_path) == ["folder"]


def test_the_next_one_may_start_while_the_last_one_ends(tmp_path):
    """A folder that was renamed is no longer in the way, and the new one is not removed with the old name."""
    with ExitStack() as last:
        partial = last.enter_context(scratch_folder(tmp_path / ".folder.partial"))
        partial.rename(tmp_path / "folder")
        with scratch_folder(partial):
            write_text(partial / "a", "1")
            last.close()
            assert (partial / "a").read_text() == "1"
    assert names(tmp_path) == ["folder"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())
