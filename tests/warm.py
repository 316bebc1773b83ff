"""Programs that start at once: one process imports what stages, DVC and drank import, and forks for each of them.

On a tiny model a stage computes for a tenth of a second and imports for two to four, and the tests start some hundred.
Two more shortcuts, whose results are the same, are those of ``quick_locks`` and ``copy_databases``.
``programs`` makes a folder whose `python`, `dvc` and `drank` hand command line, environment, folder and standard
streams to that process; a fork of it then runs the modules that the real program would run. The real Python starts any
other program, and one with other variables of the kind that is read before a program's first line.
That forks leave the bytes that real processes leave is a test (test_pipeline); tests of kills, of two at once and of
other people's computers start real processes alone.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Beside the modules of drank: what those, DVC and the stages import in functions, and by name only.
HEAVY = (
    "dvc.cli", "dvc.commands.repro", "dvc.repo.reproduce", "dvc.repo.status", "dvc.repo.experiments", "dvc.repo.push",
    "lm_eval.evaluator", "lm_eval.models.huggingface", "matplotlib.pyplot", "mlflow.store.db.utils",
    "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store", "pandas", "peft", "torch",
    "transformers",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
)  # fmt: skip
# Variables that Python or a library reads before a program can say otherwise.
EARLY = (
    "PYTHON", "HF_", "TRANSFORMERS_", "OMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "TQDM_", "LC_",
    "LANG",
)  # fmt: skip

ENTRIES = {"dvc": "dvc.cli:main", "drank": "drank.cli:app"}

# Without site-packages it takes 15 ms.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
module = arguments[1] if name == "python" and arguments[:1] == ["-m"] and len(arguments) > 1 else ""
status = ""
if name != "python" or module == "dvc" or module.startswith("stages."):
    asked = dict(program=name, arguments=arguments, folder=os.getcwd(), environment=dict(os.environ))
    with socket.socket(socket.AF_UNIX) as server:
        server.connect({address!r})
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(asked).encode())
        server.shutdown(socket.SHUT_WR)
        status = server.makefile().read()
if status:
    os._exit(int(status))
program = os.path.join({bin!r}, name)
os.execv(program, [program, *arguments])
"""


@contextlib.contextmanager
def programs(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A folder for the front of PATH; the process behind it imports nothing before it is first asked."""
    address, real = folder / "socket", Path(sys.executable)
    for name in ("python", "dvc", "drank"):
        (folder / name).write_text(CLIENT.format(python=real, address=str(address), bin=str(real.parent)))
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(64)
        server = subprocess.Popen(
            [real, "-P", __file__, str(listening.fileno())], env=environment, pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield folder
    finally:
        assert server.stdin
        server.stdin.close()  # by which it learns that these tests are over, however they ended
        server.wait()


def serve(listening: socket.socket) -> dict[str, Any]:
    """Fork for every command line that comes; returns in the forks, with what is asked."""
    early: dict[str, str] = {}
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            os._exit(0)
        connection, _ = listening.accept()
        if not early:
            early = early_variables(os.environ)
            import_all()
            quick_locks()
            copy_databases(Path(listening.getsockname()).with_name("mlflow.db"))
            gc.collect()
            gc.freeze()  # or the forks' collections would copy every page
            set_by_imports = {key for key, value in os.environ.items() if early.get(key) != value}
        if os.fork() == 0:
            break
        connection.close()
    listening.close()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    asked = json.loads(connection.makefile("rb").read())
    asked_for = early_variables(asked["environment"])
    if any(early.get(key) != asked_for.get(key) for key in (early.keys() | asked_for.keys()) - set_by_imports):
        os._exit(0)  # no status: a real Python is started
    if (worker := os.fork()) == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return asked
    status = waited(worker, connection)
    with contextlib.suppress(OSError):  # whoever asked may be gone
        connection.sendall(str(status if status >= 0 else 128 - status).encode())
    os._exit(0)


def waited(worker: int, connection: socket.socket) -> int:
    """The exit status of a process, which is killed where the program that stands for it is."""
    hung_up = select.poll()
    hung_up.register(connection, 0)
    while not (ended := os.waitpid(worker, os.WNOHANG))[0]:
        if hung_up.poll(10):  # milliseconds
            os.kill(worker, signal.SIGKILL)
            hung_up.unregister(connection)
    return os.waitstatus_to_exitcode(ended[1])


def early_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(EARLY) and key != "PYTHONPATH"}


def import_all() -> None:
    import drank

    for module in pkgutil.walk_packages(drank.__path__, "drank."):
        if module.name != "drank.serving.vllm":  # which needs an environment that has vLLM
            importlib.import_module(module.name)
    for name in HEAVY:
        importlib.import_module(name)


def quick_locks() -> None:
    """DVC reads and writes the whole dvc.lock for every stage, in pure Python, longer than a tiny stage computes.

    Here libyaml reads it, but for what DVC is to refuse, and a stage that did not change is written as it was.
    """
    import yaml
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    from drank.project.dvc import LOADER

    slow, dump, blocks = _yaml.parse_yaml, _yaml._dump, dict[str, str]()

    def parse_yaml(text: str, path: str, typ: str = "safe") -> Any:
        if Path(path).name == "dvc.lock":
            with contextlib.suppress(yaml.YAMLError, ValueError):
                return yaml.load(text, LOADER) or {}
        return slow(text, path, typ)

    def text_of(data: dict[str, Any]) -> str:
        dump(data, stream := io.StringIO())
        return stream.getvalue()

    def dump_by_stages(data: dict[str, Any], stream: TextIO) -> None:
        if data.keys() != {"schema", "stages"} or not data["stages"]:
            dump(data, stream)
            return
        stream.write(text_of({"schema": data["schema"]}) + "stages:\n")
        for stage in data["stages"].items():
            if (key := json.dumps(stage, default=repr)) not in blocks:
                blocks[key] = text_of({"stages": dict([stage])}).partition("\n")[2]
            stream.write(blocks[key])

    _yaml.parse_yaml = strictyaml.parse_yaml = parse_yaml
    _yaml._dump = dump_by_stages


def copy_databases(template: Path) -> None:
    """A new database of MLflow is a copy of the first one, whose tables some fifty migrations have made."""
    import sqlalchemy
    from filelock import FileLock
    from mlflow.store.db import utils

    make = utils._initialize_tables

    def copy(engine: sqlalchemy.Engine) -> None:
        with FileLock(f"{template}.lock"):
            if not template.exists():
                partial = template.with_suffix(".partial")
                make(sqlalchemy.create_engine(f"sqlite:///{partial}"))
                partial.rename(template)
        with contextlib.closing(sqlite3.connect(template)) as source, engine.connect() as connection:
            source.backup(connection.connection.driver_connection)

    utils._initialize_tables = copy


def run(programs: Path, program: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """As the real program would, in this process; whatever starts this Python again starts one of ``programs``."""
    real = Path(sys.executable)
    sys.executable = str(programs / "python")
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = folder if program == "python" else str(real.parent)
    sys.path[:] = [first, *added, *(path for path in sys.path if path not in own)]
    importlib.invalidate_caches()
    if program == "python":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(real.with_name(program)), *arguments]
        module, _, name = ENTRIES[program].partition(":")
        sys.exit(getattr(importlib.import_module(module), name)())


def end(error: BaseException | None) -> NoReturn:
    """As Python ends, but for the objects that it would free one by one, which takes half a second."""
    told = error.code if isinstance(error, SystemExit) else error
    if isinstance(told, BaseException):
        traceback.print_exception(told)
    elif not isinstance(told, int | None):
        sys.stderr.write(f"{told}\n")
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(told if isinstance(told, int) else told is not None)


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    place = Path(listening.getsockname()).parent
    asked = serve(listening)
    try:
        run(place, **asked)
    except BaseException as error:
        end(error)
    end(None)
