"""MLflow's store: where it is, how it is opened, and how to get to its pages."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from drank.project.refusals import check_access, refusal
from drank.project.turns import turn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "drank"
LOCAL_UI = "http://127.0.0.1:5000"


class TrackingError(ValueError):
    """MLflow's store cannot be used."""


@dataclass(frozen=True)
class Store:
    """A store that can be used: its address, a client of it, and the number of our experiment in it."""

    uri: str
    client: "MlflowClient"
    experiment_id: str

    def link(self, page: str) -> str:
        """A page of the experiment, such as ``runs/<id>``: on the server, or where ``mlflow ui`` shows a file."""
        base = LOCAL_UI
        if _sqlite_file(self.uri) is None:
            address = urlsplit(self.uri)
            # Without the user and password that it may hold.
            base = urlunsplit((address.scheme, address.netloc.rpartition("@")[2], address.path.rstrip("/"), "", ""))
        return f"{base}/#/experiments/{self.experiment_id}/{page}"

    def where_to_look(self, page: str) -> str:
        """The command to type, if the store has no server, and the address of a page."""
        if _sqlite_file(self.uri) is None:
            return self.link(page)
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}\nthen {self.link(page)}"


@contextmanager
def open_store(root: Path) -> Iterator[Store]:
    """The store of ``root`` with our experiment in it, both created where they are missing.

    It is ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in the folder that DVC names in ``DVC_ROOT`` (an experiment in
    a temporary folder points to its repository there), or else in ``root``. One process of a machine and a user at a
    time has it, whichever clone it is in; the others wait.

    Raises:
        TrackingError: a store that cannot be used, or that fails in the block.
    """
    uri = _uri_of(root)
    file = _sqlite_file(uri)
    # Two processes that create one SQLite store break it, and two that look for a run would both make it.
    with turn(str(file or uri), "another drank on MLflow's store"), _explained():
        if file is not None and file.exists():
            check_access(file, "r+b")
        elif file is not None:
            _create_database(file)
        client = _new_client(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT) or _create_experiment(client, file)
        if experiment.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow's experiment '{EXPERIMENT}' is deleted; bring it back with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        if file is not None and experiment.artifact_location.startswith("mlflow-artifacts:"):
            raise TrackingError(
                f"{file}: its experiment '{EXPERIMENT}' was made through a server, which keeps the artefacts: start "
                f"it and give its address, as in MLFLOW_TRACKING_URI={LOCAL_UI}"
            )
        yield Store(uri, client, experiment.experiment_id)


@contextmanager
def existing_store(root: Path) -> Iterator[Store | None]:
    """The store of ``root``, or None where there is none or no experiment in it; nothing is created.

    Raises:
        TrackingError: a store that cannot be used, or that fails in the block.
    """
    uri = _uri_of(root)
    file = _sqlite_file(uri)
    if file is not None and not file.is_file():
        yield None
        return
    if file is not None:
        check_access(file)
    with _explained():
        client = _new_client(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        yield None if experiment is None else Store(uri, client, experiment.experiment_id)


def _uri_of(root: Path) -> str:
    home = Path(os.environ.get("DVC_ROOT") or root).resolve()
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').as_posix()}"


def _sqlite_file(uri: str) -> Path | None:
    address = urlsplit(uri)
    return Path(address.path.removeprefix("/")).resolve() if address.scheme == "sqlite" else None


def _create_database(file: Path) -> None:
    """A new one, put in place when its tables are there: MLflow refuses one that a killed call left half-made."""
    partial = file.with_name(f"{file.name}.partial")
    partial.with_name(f"{partial.name}-journal").unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    check_access(partial, "wb")
    _new_client(f"sqlite:///{partial.as_posix()}").search_experiments(max_results=1)
    partial.replace(file)


def _create_experiment(client: "MlflowClient", file: Path | None) -> "Experiment":
    """Ours, with its artifacts beside the SQLite file or where the server puts them.

    MLflow's own default is the current folder, for ever.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(
            client.create_experiment(EXPERIMENT, None if file is None else (file.parent / "mlartifacts").as_uri())
        )
    except MlflowException:
        experiment = client.get_experiment_by_name(EXPERIMENT)  # another machine was quicker
        if experiment is None:
            raise
        return experiment


def _new_client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # both are read when mlflow is first used
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 keep a person waiting for minutes
    from mlflow import MlflowClient

    # A client of our own, never mlflow.start_run: that one re-opens the run of `mlflow run` (MLFLOW_RUN_ID).
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _explained() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if (refused := refusal(error)) is not None:
            raise refused from error
        raise TrackingError(f"MLflow's store cannot be used; is MLFLOW_TRACKING_URI right? {error}") from error
