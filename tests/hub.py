"""A hub on this machine: http.server with the few routes that huggingface_hub and datasets ask, and their headers."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_accepted"


class Hub(ThreadingHTTPServer):
    """Repositories of one commit, which is also `main`.

    Attributes:
        repositories: content by file, by (kind, name), where kind is models or datasets.
        gated: names that only the owner of TOKEN may read.
        asked: paths of all files that were asked for.
        sent: bytes of content sent, by file name.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: set[str] = set()
        self.sent: Counter[str] = Counter()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_) -> None:
        """A client that hangs up early is part of what is tested."""


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 4:
            what, revision = parts[4:6] or ("revision", "main")
            self._api(parts[1], "/".join(parts[2:4]), what, revision, "/".join(parts[6:]))
            return
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        if len(parts) < 5 or parts[2] != "resolve":
            self._refuse(404, "RepoNotFound")
            return
        self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    do_HEAD = do_GET
    do_POST = do_GET

    def _api(self, kind: str, name: str, what: str, revision: str, path: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode())
        files = self._repository(kind, name, revision)
        if files is None:
            return
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        elif what == "tree":
            deep = "recursive=true" in self.path
            self._json([_entry(p, files.get(p)) for p in _tree(files) if deep or _in(p, path)])
        else:
            self._json([_entry(file, files.get(file)) for file in form["paths"] if file in _tree(files)])

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        self.server.asked.add(path)
        files = self._repository(kind, name, revision, content=True)
        if files is None:
            return
        if path not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[path]
        asked = self.headers.get("Range")
        first, last = asked.removeprefix("bytes=").split("-") if asked else ("0", "")
        part = content[int(first) : int(last) + 1 if last else None]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._send(206 if asked else 200, part, headers, file=PurePosixPath(path).name)

    def _repository(self, kind: str, name: str, revision: str, content: bool = False) -> dict[str, bytes] | None:
        files = self.server.repositories.get((kind, name))
        if files is None:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif content and name in self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        else:
            return files
        return None

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(content), 1 << 16):
            chunk = content[start : start + (1 << 16)]
            self.wfile.write(chunk)
            self.server.sent[file] += len(chunk)


def _tree(files: dict[str, bytes]) -> list[str]:
    """Every file, and every folder that one of them is in."""
    folders = {str(parent) for file in files for parent in PurePosixPath(file).parents if parent.name}
    return sorted(folders | files.keys())


def _in(path: str, folder: str) -> bool:
    return PurePosixPath(path).parent == PurePosixPath(folder)


def _entry(path: str, content: bytes | None) -> dict[str, object]:
    if content is None:
        return {"type": "directory", "path": path, "oid": _digest(path.encode())}
    return {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
