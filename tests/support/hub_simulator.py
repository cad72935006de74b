"""A Hub for tests: the routes that reading needs, on this machine, with the faults that reading must survive.

Written after the requests that ``huggingface_hub`` makes: model info with blobs, and resolve with redirects to
another host for large files, byte ranges included.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".ckpt")


@dataclass
class Blob:
    """A file's bytes, in memory or in a file (which may be sparse: its hash is then that of its name)."""

    content: bytes | Path
    large: bool

    @property
    def size(self):
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def sha256(self):
        named = self.content if isinstance(self.content, bytes) else str(self.content).encode()
        return hashlib.sha256(named).hexdigest()

    @property
    def etag(self):
        named = self.content if isinstance(self.content, bytes) else str(self.content).encode()
        return self.sha256 if self.large else hashlib.sha1(named).hexdigest()

    def read(self, begin, end):
        if isinstance(self.content, bytes):
            return self.content[begin:end]
        with self.content.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)


@dataclass
class Repo:
    """Commits by hash, and what points at them."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


@dataclass
class Fault:
    """What requests whose path fits get instead, this many times."""

    path: str
    status: int
    times: int
    headers: Mapping[str, str]
    wait: float


@dataclass(frozen=True)
class Request:
    """One request, and how many bytes of body it was answered with."""

    method: str
    path: str
    authorized: bool
    sent: int


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that gives up is no news."""


class HubSimulator:
    """A Hub with repositories of one process; ``url`` is its endpoint, ``log`` what it was asked."""

    token = "hf_simulated"

    def __init__(self):
        self.repos = {}
        self.faults = []
        self.log = []
        self.listed = {}  # what model info says of a file instead of the truth: path -> (key, value)
        self.claimed = {}  # headers of resolve instead of the true ones
        self.ranges = True
        self.cut = None  # bytes after which the bodies of large files end
        hub = self

        class Handler(_Handler):
            simulator = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name, files, *, tag=None, **flags):
        """Put files into a repository (made if new); ``main`` and ``tag`` point at the commit that is returned."""
        repo = self.repos.setdefault(name, Repo())
        vars(repo).update(flags)
        before = repo.commits.get(repo.refs.get("main"), {})
        sha = hashlib.sha1(f"{name}{len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = before | {path: Blob(content, path.endswith(LARGE)) for path, content in files.items()}
        repo.refs |= {"main": sha} | ({tag: sha} if tag else {})
        return sha

    def fault(self, path, status, *, times=1_000, headers=None, wait=0.0):
        """Answer requests whose path contains a match of ``path`` with a status, after ``wait`` seconds."""
        self.faults.append(Fault(path, status, times, headers or {}, wait))

    @property
    def sent(self):
        """Bytes of all bodies."""
        return sum(request.sent for request in self.log)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    simulator: HubSimulator

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        for fault in self.simulator.faults:
            if fault.times > 0 and re.search(fault.path, path):
                fault.times -= 1
                time.sleep(fault.wait)
                return self._answer(fault.status, b"{}", fault.headers)
        if path.startswith("/large/"):
            return self._send_blob(self._find_large(path.removeprefix("/large/")), {})
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._open(info[1], info[2] or "main", self._send_info)
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40}|[^/]+)/(.+)", path):
            return self._open(file[1], file[2], self._send_file, file[3])
        return self._fail(404, "NotFound", "no such route")

    def _open(self, name, revision, send, *arguments):
        repo = self.simulator.repos.get(name)
        authorized = self.headers.get("Authorization") == f"Bearer {self.simulator.token}"
        if repo is None or (repo.private and not authorized):
            return self._fail(401 if not authorized else 404, "RepoNotFound", "Repository not found")
        if repo.gated and (send == self._send_file or repo.private):
            return self._fail(403, "GatedRepo", "Access to this model is restricted")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return send(name, sha, repo.commits[sha], *arguments)

    def _send_info(self, name, sha, blobs):
        siblings = [{"rfilename": path, "size": blob.size, "blobId": blob.etag} for path, blob in blobs.items()]
        for entry, blob in zip(siblings, blobs.values(), strict=True):
            if blob.large:
                entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
            key, value = self.simulator.listed.get(entry["rfilename"], (None, None))
            where = entry["lfs"] if key in entry.get("lfs", {}) else entry
            where |= {key: value} if key else {}
        body = json.dumps({"id": name, "sha": sha, "siblings": siblings}).encode()
        return self._answer(200, body, {"Content-Type": "application/json"})

    def _send_file(self, _, sha, blobs, path):
        blob = blobs.get(path)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob is None:
            return self._fail(404, "EntryNotFound", "Entry not found", headers)
        if not blob.large:
            return self._send_blob(blob, headers | {"ETag": f'"{blob.etag}"'} | self.simulator.claimed)
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        headers |= {"Location": f"http://localhost:{self.simulator.port}/large/{blob.sha256}"}
        return self._answer(302, b"", headers | self.simulator.claimed)

    def _find_large(self, sha256):
        blobs = [b for repo in self.simulator.repos.values() for files in repo.commits.values() for b in files.values()]
        return next(blob for blob in blobs if blob.sha256 == sha256)

    def _send_blob(self, blob, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.simulator.ranges:
            return self._answer(200, blob.read(0, blob.size)[: self.simulator.cut], headers)
        begin, end = int(asked[1]), min(int(asked[2] or blob.size - 1) + 1, blob.size)
        span = {"Content-Range": f"bytes {begin}-{end - 1}/{blob.size}"}
        return self._answer(206, blob.read(begin, end), headers | span)

    def _fail(self, status, code, message, headers=None):
        body = json.dumps({"error": message}).encode()
        return self._answer(status, body, (headers or {}) | {"X-Error-Code": code, "X-Error-Message": message})

    def _answer(self, status, body, headers):
        sent = 0 if self.command == "HEAD" else len(body)
        authorized = "Authorization" in self.headers
        self.simulator.log.append(Request(self.command, unquote(self.path), authorized, sent))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if sent:
            self.wfile.write(body)
