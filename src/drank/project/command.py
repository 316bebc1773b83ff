"""How every stage starts: ``run_stage(main)`` under ``if __name__ == "__main__"``."""

import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil
import typer

from drank.project.redaction import print_redacted, redact, redact_logs
from drank.project.refusals import refusal


def run_stage(main: Callable[..., None]) -> None:
    """Run a stage's ``main`` as a command line; what the user can mend ends in one message and exit status 1.

    That is every ``ValueError`` class that drank itself defines (wrong parameters, an unreachable source, a
    damaged file), and what the operating system refuses (a full disk, a forbidden file, a closed standard output).
    Any other exception is a bug, here or in a library, and keeps its traceback.
    """
    if "DVC_STAGE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:  # processes of a group have a launcher
        ancestors = above()
        if os.getsid(ancestors[-1].pid) != os.getsid(0):
            raise SystemExit("error: the dvc that started this stage has ended")  # its orphans are adopted elsewhere
        end_without(ancestors)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line of several commands with the same promise as :func:`run_stage`."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("drank").setLevel(logging.INFO)
    redact_logs()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Exception as error:
        if (message := _told(error)) is None:
            sys.excepthook = print_redacted
            raise
        with suppress(OSError):
            typer.echo(redact(message), nl=False, err=True)
        raise SystemExit(1) from None


def _told(error: Exception) -> str | None:
    """The user's message; None for a bug."""
    if isinstance(error, OSError) and error.filename is None and _abandoned(sys.stdout):
        if error.errno == errno.EPIPE:
            return ""  # the reader has seen enough, as `head` has
        return f"error: standard output: {error.strerror}; send it to a file or a program that takes it\n"
    ours = isinstance(error, ValueError) and type(error).__module__.startswith("drank.")
    told = error if ours else refusal(error)
    return None if told is None else f"error: {told}\n"


def _abandoned(stream: TextIO) -> bool:
    """True if text cannot be delivered; it is then dropped, since Python would try again when it ends."""
    try:
        stream.write("\n")  # Python may have kept nothing of the text that failed
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def above() -> list[psutil.Process]:
    """The processes that this one comes from, its parent first: shells, if any, then the DVC that runs the stage."""
    found = []
    for process in psutil.Process().parents():
        found.append(process)
        try:
            if "DVC_STAGE" not in process.environ():
                break
        except psutil.Error:
            break
    return found


def end_without(ancestors: Sequence[psutil.Process]) -> None:
    """Have this process end soon after one of the processes that it comes from.

    A stage that outlives a killed ``dvc repro`` would write the files that the next one writes too, and a process of
    a group would wait for the others for ever.
    """

    def watch() -> None:
        while all(map(runs, ancestors)):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher ends its processes with it
        time.sleep(30)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def runs(process: psutil.Process) -> bool:
    """True unless a process has ended, also where nobody has asked for its status yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def quieten_libraries() -> None:
    """No telemetry, and no progress bars in a log file; libraries read this when they are imported, later."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file would take its number, and what a library writes there
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
