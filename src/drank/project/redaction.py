"""No password or token in what drank says: messages, tracebacks, logs, and the pages of MLflow."""

import logging
import os
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST = 6  # characters; a shorter value of a variable stands in too many words
NAMES = re.compile(r"(?i).*(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY)")  # of variables
ADDRESS = re.compile(r"(?<=://)[^\s/?#]*@")
QUERY = re.compile(r"(?i)([?&;][\w.-]*(?:token|passw|pwd|secret|key|credential|sig|auth)[\w.-]*=)[^\s&;#'\"]+")
HEADER = re.compile(r"(?i)\b(bearer|basic) +[\w.~+/=-]{8,}")


def redact(text: str) -> str:
    """A text without users and passwords of addresses, secrets in their queries, and secrets of the environment."""
    for secret in sorted(_of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = QUERY.sub(rf"\g<1>{HIDDEN}", ADDRESS.sub(f"{HIDDEN}@", text))
    return HEADER.sub(rf"\g<1> {HIDDEN}", text)


def _of_environment() -> set[str]:
    """Secrets in the environment, by the names of variables and as passwords of addresses, in every spelling."""
    found = {value for name, value in os.environ.items() if NAMES.fullmatch(name)}
    for value in os.environ.values():
        scheme, _, rest = value.partition("://")
        if scheme in ("http", "https"):
            # A password may hold a slash or another @, which should be encoded in it.
            found.add(rest.rpartition("@")[0].partition(":")[2])
        elif user := ADDRESS.search(value):
            found.add(user[0][:-1].partition(":")[2])
    spelled = {spelling for secret in found for spelling in (secret, unquote(secret), quote(secret, safe=""))}
    return {secret for secret in spelled if len(secret) >= SHORTEST}


def redact_logs() -> None:
    """From now on, no secret in a record of any logger of this process, those of libraries included."""
    factory = logging.getLogRecordFactory()

    def redacted(*arguments: object, **options: object) -> logging.LogRecord:
        record = factory(*arguments, **options)
        try:
            record.msg, record.args = redact(record.getMessage()), None
        except (TypeError, ValueError):  # a mistake of who logs, which the handler tells
            return record
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    logging.setLogRecordFactory(redacted)


def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback on standard error; takes the place of ``sys.excepthook``."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
