"""A Hub for tests, on this machine: the routes that reading and writing need, with the faults that they must survive.

Written after the requests that ``huggingface_hub`` makes: model info with blobs, lists of models, and resolve with
redirects to another host for large files, byte ranges included; :mod:`tests.support.hub_writing` has what writes.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.hub_writing import User, WritingRoutes, read_front_matter

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
        return self.sha256 if self.large else hashlib.sha1(b"blob %d\0" % len(named) + named).hexdigest()

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
    downloads: int = 0
    likes: int = 0
    messages: list[str] = field(default_factory=list)  # of the commits, in order


@dataclass
class Fault:
    """What requests whose path fits get instead, this many times."""

    path: str
    status: int
    times: int
    headers: Mapping[str, str]
    wait: float
    body: bytes


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
        self.users = {self.token: User("alice", orgs=["lab"]), "hf_reader": User("alice", role="read")}
        self.uploaded = {}  # large files by SHA-256, before a commit names them
        self.regular = False  # whether all files travel inside the commit
        self.xet = None  # a store, where large files go through Xet
        self.cut_upload = None  # bytes of requests' bodies that are still read; then the connection ends
        self.watch = lambda request_number: None  # called before every answer
        self.requests = 0
        self.lock = threading.Lock()
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

    def create(self, name, **flags):
        """An empty repository: one commit, as the real Hub makes it."""
        return self.commit(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, **flags)

    def is_large(self, path):
        return path.endswith(LARGE) and not self.regular

    def add_commit(self, name, revision, changed, header, *, pull_request=False):
        """What a client commits: files by path, ``None`` for one that goes."""
        repo = self.repos[name]
        sha = hashlib.sha1(f"{name}{len(repo.commits)}".encode()).hexdigest()
        files = dict(repo.commits.get(repo.refs[revision], {}))
        for path, content in changed.items():
            files.pop(path, None)
            files |= {} if content is None else {path: Blob(content, self.is_large(path))}
        repo.commits[sha] = files
        repo.messages.append(header["summary"])
        answer = {"commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}
        if not pull_request:
            repo.refs[revision] = sha
            return answer
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        repo.refs[f"refs/pr/{number}"] = sha
        return answer | {"pullRequestUrl": f"{self.url}/{name}/discussions/{number}"}

    def files(self, name, revision="main"):
        """What a repository holds: bytes by path."""
        repo = self.repos[name]
        return {path: blob.content for path, blob in repo.commits[repo.refs[revision]].items()}

    def fault(self, path, status, *, times=1_000, headers=None, wait=0.0, body=b"{}"):
        """Answer requests whose path contains a match of ``path`` with a status, after ``wait`` seconds."""
        self.faults.append(Fault(path, status, times, headers or {}, wait, body))

    @property
    def sent(self):
        """Bytes of all bodies."""
        return sum(request.sent for request in self.log)


class _Handler(WritingRoutes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    simulator: HubSimulator
    _body: bytes | None

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def read_body(self):
        """The request's body, once; where uploads are cut, the connection ends in the middle of it."""
        if self._body is None:
            length, left = int(self.headers.get("Content-Length", 0)), self.simulator.cut_upload
            if left is not None and left < length:
                self.rfile.read(left)
                self.simulator.cut_upload = 0
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError("cut")
            if left is not None:
                self.simulator.cut_upload = left - length
            self._body = self.rfile.read(length)
        return self._body

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        self._body = None
        self.simulator.requests += 1
        self.simulator.watch(self.simulator.requests)
        self.read_body()
        for fault in self.simulator.faults:
            if fault.times > 0 and re.search(fault.path, path):
                fault.times -= 1
                time.sleep(fault.wait)
                return self._answer(fault.status, fault.body, fault.headers)
        if path.startswith("/large/"):
            return self._send_blob(self._find_large(path.removeprefix("/large/")), {})
        if self.serve_writing(path):
            return None
        if path == "/api/models":
            return self._send_models(parse_qs(urlsplit(self.path).query))
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._open(info[1], info[2] or "main", self._send_info)
        if tree := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            return self._open(tree[1], tree[2], self._send_tree)
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40}|[^/]+)/(.+)", path):
            return self._open(file[1], file[2], self._send_file, file[3])
        return self._fail(404, "NotFound", "no such route")

    def _open(self, name, revision, send, *arguments):
        repo = self.simulator.repos.get(name)
        authorized = self.user() is not None
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
        return self.answer_json(self._describe(name, sha) | {"siblings": siblings})

    def _send_tree(self, name, sha, blobs):
        entries = [{"type": "file", "path": path, "size": blob.size, "oid": blob.etag} for path, blob in blobs.items()]
        for entry, blob in zip(entries, blobs.values(), strict=True):
            entry.update({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.large else {})
        folders = {path.rpartition("/")[0] for path in blobs if "/" in path}
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
        return self.answer_json(entries)

    def _describe(self, name, sha):
        """What the Hub says of a repository by its card."""
        repo = self.simulator.repos[name]
        readme = repo.commits[sha].get("README.md")
        card = (read_front_matter(readme.content) if readme else None) or {}
        tags = [*(card.get("tags") or []), *([f"license:{card['license']}"] if "license" in card else [])]
        if isinstance(base := card.get("base_model"), str):
            tags += [f"base_model:{base}", f"base_model:{card.get('base_model_relation', 'finetune')}:{base}"]
        return {
            "id": name,
            "modelId": name,
            "sha": sha,
            "author": name.partition("/")[0],
            "tags": tags,
            "cardData": card,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "downloads": repo.downloads,
            "likes": repo.likes,
            "lastModified": "2026-01-01T00:00:00.000Z",
        }

    def _send_models(self, query):
        """Repositories whose tags are all those asked for and whose names hold the words; a page of five at a time."""
        found = [self._describe(name, repo.refs["main"]) for name, repo in self.simulator.repos.items()]
        wanted = [tag for value in query.get("filter", []) for tag in value.split(",")]
        words = query.get("search", [""])[0].lower()
        found = [one for one in found if set(wanted) <= set(one["tags"]) and words in one["id"].lower()]
        found = [one for one in found if not one["private"] or self.user() is not None]
        if author := query.get("author"):
            found = [one for one in found if one["author"] == author[0]]
        key = {"downloads": "downloads", "likes": "likes"}.get(query.get("sort", [""])[0], "lastModified")
        found.sort(key=lambda one: one[key], reverse=True)
        size, page = min(int(query.get("limit", ["1000"])[0]), 5), int(query.get("page", ["0"])[0])
        part = found[page * size : (page + 1) * size]
        for one in part:
            blobs = self.simulator.repos[one["id"]].commits[one["sha"]]
            one["siblings"] = [{"rfilename": path} for path in blobs]
        headers = {}
        if (page + 1) * size < len(found):
            rest = "&".join(f"{key}={quote(v)}" for key, values in query.items() if key != "page" for v in values)
            headers["Link"] = f'<{self.simulator.url}/api/models?{rest}&page={page + 1}>; rel="next"'
        return self.answer_json(part, headers=headers)

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
