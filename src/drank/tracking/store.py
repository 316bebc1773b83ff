"""MLflow's store: where it is, how it is opened, and how to get to its pages."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from drank.project.redaction import redact
from drank.project.refusals import check_access, refusal
from drank.project.turns import turn

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
        """A page of the experiment, such as ``runs/<id>``: on the server, or where ``mlflow ui`` shows a database."""
        base = LOCAL_UI
        if not is_database(self.uri):
            address = urlsplit(self.uri)
            # Without the user, password and query, which may be secret.
            base = urlunsplit((address.scheme, address.netloc.rpartition("@")[2], address.path.rstrip("/"), "", ""))
        return f"{base}/#/experiments/{self.experiment_id}/{page}"

    def where_to_look(self, page: str) -> str:
        """The command to type, if the store has no server, and the address of a page."""
        if not is_database(self.uri):
            return self.link(page)
        address = shlex.quote(self.uri) if redact(self.uri) == self.uri else '"$MLFLOW_TRACKING_URI"'
        return f"mlflow ui --backend-store-uri {address}\nthen {self.link(page)}"


@contextmanager
def open_store(root: Path, create: bool = True) -> Iterator[Store]:
    """The store of ``root`` with our experiment in it, both created where they are missing, unless not to ``create``.

    One process of a machine and a user at a time has it, whichever clone it is in; the others wait.

    Raises:
        TrackingError: a store that cannot be used, or that fails in the block.
    """
    uri = uri_of(root)
    file = sqlite_file(uri)
    missing = TrackingError("no MLflow store here: `drank track` makes one")
    if file is not None and not file.exists() and not create:
        raise missing
    # Two processes that create one SQLite store break it, and two that look for a run would both make it.
    with turn(str(file or uri), "another drank on MLflow's store"), _explained():
        if file is not None and file.exists():
            check_access(file, "r+b" if create else "rb")
        elif file is not None:
            _create_database(file)
        client = _new_client(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            if not create:
                raise missing
            # MLflow's own default is the current folder, for ever; a server has a place of its own.
            place = (file.parent if file else _home(root)) / "mlartifacts" if is_database(uri) else None
            experiment = client.get_experiment(client.create_experiment(EXPERIMENT, place and place.as_uri()))
        if experiment.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow's experiment '{EXPERIMENT}' is deleted; bring it back with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        yield Store(uri, client, experiment.experiment_id)


def _home(root: Path) -> Path:
    return Path(os.environ.get("DVC_ROOT") or root).resolve()


def uri_of(root: Path) -> str:
    """The address of the store of ``root``: ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in ``root``.

    An experiment that DVC runs in a temporary folder has the store of its repository, which DVC names in ``DVC_ROOT``.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(_home(root) / "mlflow.db")


def is_database(uri: str) -> bool:
    """True if MLflow opens the store itself, with SQLAlchemy, instead of asking a server."""
    return _dialect(uri) in ("sqlite", "postgresql", "mysql", "mssql")


def _dialect(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]


def sqlite_uri(file: Path) -> str:
    """The address of a SQLite file, the plain one if SQLAlchemy reads it as that file: versions differ in ``%``."""
    from sqlalchemy import URL

    if sqlite_file(plain := f"sqlite:///{file.as_posix()}") == file:
        return plain
    # With a driver's name, since MLflow makes the folders of an address without one, encoded as they are there.
    address = URL.create("sqlite+pysqlite", database=file.as_uri(), query={"uri": "true"})
    return address.render_as_string()


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite database, whatever driver the address names; None for other stores."""
    if _dialect(uri) != "sqlite":
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        address = make_url(uri)
    except ArgumentError:  # MLflow will say so
        return None
    path = address.database or ""
    if path.startswith("file:") and "uri" in address.query:
        path = unquote(urlsplit(path).path)
    return None if path in ("", ":memory:") else Path(path).resolve()


def _create_database(file: Path) -> None:
    """A new one, put in place when its tables are there: MLflow refuses one that a killed call left half-made."""
    partial = file.with_name(f"{file.name}.partial")
    partial.with_name(f"{partial.name}-journal").unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    check_access(partial, "wb")
    _new_client(sqlite_uri(partial)).search_experiments(max_results=1)
    partial.replace(file)


def _new_client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # both are read when mlflow is first used
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 keep a person waiting for minutes
    from mlflow import MlflowClient

    # A client of our own, never mlflow.start_run: that one re-opens the run of `mlflow run` (MLFLOW_RUN_ID).
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _explained() -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ModuleNotFoundError) as error:  # no driver
        if (refused := refusal(error)) is not None:
            raise refused from error
        raise TrackingError(
            f"MLflow's store cannot be used; is MLFLOW_TRACKING_URI right? {redact(str(error))}"
        ) from error
