"""One stage as several processes: torchrun's workers, started by the stage itself or, on many machines, by a person.

Everything that goes between processes is a sum of tensors or a JSON document.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, distributed

from drank.project.command import end_without
from drank.project.files import replacing_folder, write_json
from drank.project.params import Covariance
from drank.project.progress import progress

# A process may wait for the slowest one for hours; a lost one is noticed by its closed connection.
PATIENCE = timedelta(weeks=1)


class ProcessError(ValueError):
    """A process of the stage failed; the message is its own if it had one, or says how it ended."""


class PeerLostError(ValueError):
    """Another process ended while this one waited for it."""


@dataclass(frozen=True)
class Group:
    """The processes that run this stage, as seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True in the process that speaks and writes for all."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's part of a list that all processes have."""
        return slice(self.rank, None, self.size)

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor, of one shape and dtype everywhere, by its sum over the processes.

        Raises:
            PeerLostError: a process ended before it took part.
        """
        if self.size > 1:
            with _peers():
                for tensor in tensors:
                    distributed.all_reduce(tensor)

    def gather(self, document: Any) -> list[Any]:
        """Every process's JSON document, by rank. Nobody goes on before all have come here.

        Raises:
            PeerLostError: a process ended before it took part.
        """
        if self.size == 1:
            return [document]
        text = torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _peers():
            distributed.all_gather(lengths, torch.tensor([len(text)]))
            padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
            padded[: len(text)] = text
            texts = [torch.empty_like(padded) for _ in range(self.size)]
            distributed.all_gather(texts, padded)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def progress(self, items: Iterable[Any] | None = None, *, desc: str, unit: str, **more: Any) -> Any:
        """``progress.progress``, which the first process alone shows."""
        return progress(items, desc=desc, unit=unit, quiet=not self.is_first, **more)

    @contextmanager
    def replacing_folder(self, destination: Path) -> Iterator[Path]:
        """``files.replacing_folder``, which all processes fill: put in place when the blocks of all ended well."""
        with replacing_folder(destination) if self.rank == 0 else nullcontext() as folder:
            yield Path(self.gather(str(folder))[0])
            self.gather(None)


def launched(n_processes: int, stage: str, key: str, root: Path) -> bool:
    """True once that many processes have run a stage, where a user or DVC started one and more are wanted.

    False where this process has to run the stage itself.

    Raises:
        ProcessError: one failed.
    """
    if n_processes == 1 or "WORLD_SIZE" in os.environ:
        return False
    launch(n_processes, f"stages.{stage}", key, "--root", str(root))
    return True


def fill_folder(on: Covariance, stage: str, key: str, root: Path, work: Callable[[Group, Path], object]) -> None:
    """data/<stage>/<key>/ from as many processes as are asked for: ``work`` fills it and gives its summary.json."""
    if launched(on.processes, stage, key, root):
        return
    with process_group(on.threads, on.device) as group, group.replacing_folder(root / f"data/{stage}/{key}") as folder:
        summary = work(group, folder)
        if group.is_first:
            write_json(folder / "summary.json", summary)


def launch(n_processes: int, module: str, *arguments: str) -> None:
    """Run ``python -m module arguments`` as that many processes of one torchrun, and wait for them.

    If one fails, the others are ended too.

    Raises:
        ProcessError: one failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its page of traceback; ours is a line
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=n_processes, run_id="drank", max_restarts=0, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", logs_specs=DefaultLogsSpecs(logs),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            raise ProcessError(_failure(Path(logs), error.failures)) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ProcessError: no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ProcessError(
            f"device is cuda, but torch {torch.__version__} finds no GPU: install a build of torch for yours, or set "
            f"device to cpu where params.yaml has cuda (covariance, evaluation, healing of a variant)"
        )


@contextmanager
def process_group(threads: int, device: str = "cpu") -> Iterator[Group]:
    """This process as one of its group, with its share of the machine's ``threads``; alone without torchrun.

    Each process of a machine takes the GPU of its number, if there are several. A user's error in the block goes to the
    launching process, which shows it once.

    Raises:
        ProcessError: no such device here.
    """
    check_device(device)
    threads = max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    if "WORLD_SIZE" not in os.environ:
        yield Group()
        return
    end_without([psutil.Process(os.getppid())])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate, in lm-eval, sets torch's anew where this is missing
    if os.environ["RANK"] != "0":
        logging.disable(logging.WARNING)  # process 0 says it
    # A process that is told to end cleans up, as after an error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        with _peers():
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backends, timeout=PATIENCE)
        yield Group(distributed.get_rank(), distributed.get_world_size())
    except ValueError as error:
        if not type(error).__module__.startswith("drank.") or "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        if not isinstance(error, PeerLostError):  # the consequence of what another process says
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending; an exception now would only be noise
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises; NCCL's errors are subclasses
        raise PeerLostError(f"another process of the stage ended: {error}") from error


def _failure(logs: Path, failures: Mapping[int, Any]) -> str:
    """The user's error that a process left behind, or how the process ended that failed by itself."""
    for file in sorted(logs.rglob("error.json")):
        text: str = json.loads(file.read_text())["message"]["message"]
        return text.partition(": ")[2]  # torchrun puts the name of the class before it
    rank = max(failures, key=lambda rank: failures[rank].exitcode not in (1, -signal.SIGTERM))
    failure = failures[rank]
    if failure.exitcode < 0:
        return (
            f"process {rank} was ended by {failure.signal_name()}, and the others with it. If memory ran out: fewer "
            f"processes, smaller batch_windows, or covariance.offload: true"
        )
    return f"process {rank} ended with status {failure.exitcode}, and the others with it: its traceback is above"
