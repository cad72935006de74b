"""The write side of the tests' own Hub: who one is, new repositories, uploads by three ways, commits, pull requests.

After the requests of ``huggingface_hub``: regular files travel inside the commit, large ones before it, either by the
LFS protocol or, where ``xet`` is set, through ``hf_xet``'s own store in a folder.
"""

import base64
import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LICENSES = {"apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "cc-by-4.0", "other"}


@dataclass
class User:
    """Who a token belongs to, and what it may."""

    name: str
    role: str = "write"
    orgs: list[str] = field(default_factory=list)
    permissions: list[str] | None = None  # of a fine-grained token

    def may_write(self, owner):
        return self.role != "read" and owner in (self.name, *self.orgs)

    def describe(self):
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.permissions is not None:
            token["fineGrained"] = {
                "scoped": [{"entity": {"type": "user", "name": self.name}, "permissions": self.permissions}]
            }
        orgs = [{"name": name, "type": "org"} for name in self.orgs]
        return {
            "type": "user",
            "name": self.name,
            "fullname": self.name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }


@dataclass
class XetStore:
    """``hf_xet``'s store in a folder: a writer's own for each upload, gathered here; shards say which file is which."""

    root: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="xet-")))
    folders: list[Path] = field(default_factory=list)

    def new_folder(self):
        self.folders.append(self.root / str(len(self.folders)))
        self.folders[-1].mkdir()
        return self.folders[-1]

    def read(self, sha256, size):
        """A file's bytes, read by ``hf_xet`` from a copy of the store that holds it."""
        for number, folder in enumerate(self.folders):
            xet_hash = _find_xet_hash(folder, sha256)
            if xet_hash is not None:
                return self._download(folder, number, xet_hash, size)
        return None

    def _download(self, folder, number, xet_hash, size):
        import hf_xet

        copy = self.root / f"copy-{number}-{len(list(self.root.iterdir()))}"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.lock"))
        target = copy / "file"
        session = hf_xet.XetSession()
        with session.new_file_download_group(endpoint=f"local://{copy}") as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
        return target.read_bytes()


def _find_xet_hash(folder, sha256):
    """The Xet hash beside a file's SHA-256 in the shards of a store."""
    wanted = _reversed_words(bytes.fromhex(sha256))
    for shard in folder.rglob("*.mdb"):
        data = shard.read_bytes()
        for needle in (bytes.fromhex(sha256), wanted):
            at = data.find(needle)
            while at >= 0:
                block = 48
                start = at
                while start >= block:  # back over the file's blocks of 48 bytes to its header
                    start -= block
                    if data[start : start + 32] != needle and data[start + 32 : start + 36] != b"\0\0\0\0":
                        return _reversed_words(data[start : start + 32]).hex()
                at = data.find(needle, at + 1)
    return None


def _reversed_words(data):
    return b"".join(data[i : i + 8][::-1] for i in range(0, 32, 8))


class WritingRoutes:
    """The handlers of requests that write; mixed into the simulator's."""

    def do_POST(self):
        self._serve()

    def do_PUT(self):
        self._serve()

    def serve_writing(self, path):
        """Answer if the path is one of writing; whether it was."""
        routes: dict[str, Any] = {
            r"/api/whoami-v2": self._whoami,
            r"/api/repos/create": self._create,
            r"/api/validate-yaml": self._validate_yaml,
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self._preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/upload/([0-9a-f]{64})": self._store,
            r"/verify": self._verify,
            r"/api/models/([^/]+/[^/]+)/xet-(write|read)-token/(.+)": self._xet_token,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self._commit,
            r"/api/models/([^/]+/[^/]+)/branch/(.+)": self._branch,
        }
        for pattern, handle in routes.items():
            if found := re.fullmatch(pattern, path):
                handle(*found.groups())
                return True
        return False

    def user(self):
        return self.simulator.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def read_json(self):
        return json.loads(self.read_body() or b"{}")

    def answer_json(self, value, status=200, headers=None):
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _whoami(self):
        user = self.user()
        if user is None:
            return self._fail(401, "", "Invalid credentials in Authorization header")
        return self.answer_json(user.describe())

    def _create(self):
        said, user = self.read_json(), self.user()
        if user is None:
            return self._fail(401, "", "Invalid username or password.")
        owner = said.get("organization") or user.name
        if not user.may_write(owner):
            return self._fail(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{said['name']}"
        answer = {"url": f"{self.simulator.url}/{name}", "name": name, "id": name}
        if name in self.simulator.repos:
            return self.answer_json(answer | {"error": "You already created this model repo"}, 409)
        self.simulator.create(name, private=said.get("visibility") == "private")
        return self.answer_json(answer)

    def _validate_yaml(self):
        content = self.read_json()["content"]
        errors = []
        try:
            said = read_front_matter(content.encode()) or {}
            if said.get("license") not in (None, *LICENSES):
                errors.append({"message": '"license" must be one of [apache-2.0, mit, …]'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error).splitlines()[0]})
        return self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _may_write(self, name):
        user, repo = self.user(), self.simulator.repos.get(name)
        if user is None:
            return self._fail(401, "RepoNotFound", "Repository not found")
        if repo is None:
            return self._fail(404, "RepoNotFound", "Repository not found")
        if not user.may_write(name.partition("/")[0]):
            return self._fail(403, "", f"Forbidden: pass `create_pr=1`; the token {self.headers['Authorization']} no")
        return repo

    def _preupload(self, name, revision):
        said = self.read_json()
        repo = self._may_write(name)
        if repo is None:
            return None
        if revision not in repo.refs:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head = repo.commits.get(repo.refs[revision], {})
        files = []
        for file in said["files"]:
            known = head.get(file["path"])
            large = self.simulator.is_large(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else known.etag,
                }
            )
        return self.answer_json({"files": files})

    def _batch(self, name):
        said = self.read_json()
        if self._may_write(name) is None:
            return None
        objects = []
        for item in said["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.simulator.uploaded:
                url = f"{self.simulator.url}/upload/{item['oid']}"
                answer["actions"] = {
                    "upload": {"href": url, "header": {}},
                    "verify": {"href": f"{self.simulator.url}/verify"},
                }
            objects.append(answer)
        return self.answer_json({"transfer": "basic", "objects": objects})

    def _store(self, oid):
        content = self.read_body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._fail(400, "", "the bytes are not those of the oid")
        self.simulator.uploaded[oid] = content
        return self._answer(200, b"", {"ETag": f'"{oid}"'})

    def _verify(self):
        said = self.read_json()
        known = self.simulator.uploaded.get(said["oid"])
        ok = known is not None and len(known) == said["size"]
        return self.answer_json({}, 200 if ok else 404)

    def _xet_token(self, name, kind, revision):
        if kind == "write" and self._may_write(name) is None:
            return None
        if not self.simulator.xet:
            return self._fail(404, "", "no Xet here")
        url = f"local://{self.simulator.xet.new_folder()}"
        values = {"casUrl": url, "accessToken": "xet", "exp": 4_000_000_000}
        headers = {
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": "4000000000",
        }
        return self.answer_json(values, headers=headers)

    def _commit(self, name, revision):
        lines = [json.loads(line) for line in self.read_body().splitlines() if line]
        repo = self._may_write(name)
        if repo is None:
            return None
        with self.simulator.lock:
            return self._commit_alone(name, repo, revision, lines)

    def _commit_alone(self, name, repo, revision, lines):
        if revision not in repo.refs:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent and not repo.refs[revision].startswith(parent):
            return self._fail(412, "", "A commit has happened since. Please refresh and try again.")
        changed: dict[str, Any] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._find_uploaded(value["oid"], value["size"])
                if content is None:
                    return self._fail(400, "", f"LFS object {value['oid']} was never uploaded")
                changed[value["path"]] = content
            else:
                changed[value["path"]] = None
        answer = self.simulator.add_commit(name, revision, changed, header, pull_request="create_pr=1" in self.path)
        return self.answer_json(answer)

    def _branch(self, name, branch):
        start = self.read_json().get("startingPoint", "main")
        if repo := self._may_write(name):
            repo.refs.setdefault(branch, repo.refs.get(start, start))
            self.answer_json({})

    def _find_uploaded(self, oid, size):
        uploaded = self.simulator.uploaded
        if oid not in uploaded and self.simulator.xet:
            content = self.simulator.xet.read(oid, size)
            if content is not None:
                uploaded[oid] = content
        return uploaded.get(oid)


def read_front_matter(content):
    """What a card says in YAML; ``None`` without."""
    found = re.match(rb"^\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|$)", content, re.DOTALL)
    return yaml.safe_load(found[1].decode()) if found else None
