"""A stand-in for the Hub on a loopback socket: repositories in memory, the real protocol, and faults on demand.

It speaks what `huggingface_hub` needs to create, commit (files in the commit, or by LFS), list and download. A fault
is a rule: requests whose method and path match it are answered with its status, or cut off in the middle, so often.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_loopbackTokenForTests"
OWNER = "someone"


@dataclass
class Repository:
    """Branches of commits of files; the first commit has none."""

    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    pulls: int = 0

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        commits = self.branches.setdefault(branch, [])
        digest = hashlib.sha1(repr((branch, len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((digest, files))
        return digest

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for commits in self.branches.values() for commit in commits)
        return next((commit for commit in commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path matches."""

    method: str
    path: str
    status: int | None  # None cuts the connection in the middle of what the client sends
    times: int = 1


class LoopbackHub:
    """The server: `with LoopbackHub() as hub: … hub.url …`. Repositories, LFS objects and what was asked are open.

    Args:
        lfs_from: bytes from which on a file goes by LFS.
    """

    def __init__(self, lfs_from: int = 10_000):
        self.lfs_from = lfs_from
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that is there already."""
        self.repositories[repo_id] = Repository(private)
        self.repositories[repo_id].commit("main", files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].find(revision)[1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments) -> None:
        pass

    def _any(self) -> None:
        path = unquote(urlparse(self.path).path)
        query = urlparse(self.path).query
        self.hub.requests[f"{self.command} {path}"] += 1
        fault = self.hub.take_fault(self.command, path)
        if fault is not None and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None:
            return self._error(fault.status, "a fault")
        with self.hub.lock:
            self._route(path, query, body)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    # What is asked

    def _route(self, path: str, query: str, body: bytes) -> None:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            self.hub.objects[path.removeprefix("/lfs/")] = body
            return self._answer({})
        if match := re.fullmatch(r"/(?:api/models/|api/datasets/|datasets/)?([\w.-]+/[\w.-]+?)(\.git)?(/.*)?", path):
            repo_id, _, rest = match.groups()
            return self._of_repository(repo_id, rest or "", query, body)
        return self._error(404, "no such path", "RepoNotFound")

    def _create(self, wanted: dict) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Invalid credentials")
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        if not repo_id.startswith(f"{OWNER}/"):
            return self._error(403, "You don't have the rights to create a model under that namespace")
        there = repo_id in self.hub.repositories
        if not there:
            self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, self._is_private(wanted))
        return self._answer({"url": f"{self.hub.url}/{repo_id}"}, 409 if there else 200)

    @staticmethod
    def _is_private(wanted: dict) -> bool:
        return bool(wanted.get("private")) or wanted.get("visibility") == "private"

    def _of_repository(self, repo_id: str, rest: str, query: str, body: bytes) -> None:
        repository = self.hub.repositories.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            return self._error(401 if not known else 404, "Repository not found", "RepoNotFound")
        if self.command in ("POST", "PUT") and not known:
            return self._error(401, "Invalid credentials")
        if rest == "/info/lfs/objects/batch":
            return self._lfs_batch(json.loads(body))
        action, _, revision = rest.lstrip("/").partition("/")
        if action == "branch":
            if revision in repository.branches:
                return self._error(409, "Reference already exists")
            repository.branches[revision] = repository.branches["main"][:1]
            return self._answer({})
        if action == "preupload":
            return self._answer({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
        if action == "commit":
            return self._commit(repo_id, repository, revision, "create_pr=1" in query, body)
        if action in ("", "revision"):
            return self._info(repo_id, repository, revision or "main")
        if action == "tree":
            return self._tree(repository, revision)
        if action == "resolve":
            return self._file(repository, revision)
        return self._error(404, "no such path")

    def _upload_mode(self, file: dict) -> dict:
        mode = "lfs" if file["size"] >= self.hub.lfs_from else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _lfs_batch(self, wanted: dict) -> None:
        objects = []
        for entry in wanted["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.objects else upload)})
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, repository: Repository, revision: str, as_pull: bool, body: bytes) -> None:
        found = repository.find(revision)
        if found is None:
            return self._error(404, "Revision not found", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, found[0]):
            return self._error(412, "A commit has happened since.")
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, "LFS object missing")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if as_pull:
            repository.pulls += 1
            revision = f"refs/pr/{repository.pulls}"
        oid = repository.commit(revision, files)
        answer = {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
        if as_pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{repository.pulls}"
        self._answer(answer)

    def _info(self, repo_id: str, repository: Repository, revision: str) -> None:
        found = repository.find(revision)
        if found is None:
            return self._error(404, "Revision not found", "RevisionNotFound")
        names = [{"rfilename": name} for name in found[1]]
        self._answer({"id": repo_id, "sha": found[0], "private": repository.private, "siblings": names})

    def _tree(self, repository: Repository, revision: str) -> None:
        """All files of a revision, or of a folder in it."""
        folder = ""
        if repository.find(revision) is None:
            revision, _, folder = revision.partition("/")
        found = repository.find(revision)
        if found is None:
            return self._error(404, "Revision not found", "RevisionNotFound")
        self._answer(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in found[1].items()
                if not folder or name.startswith(f"{folder}/")
            ]
        )

    def _file(self, repository: Repository, rest: str) -> None:
        revision, _, name = rest.partition("/")
        found = repository.find(revision)
        if found is None:
            return self._error(404, "Revision not found", "RevisionNotFound")
        if name not in found[1]:
            return self._error(404, "Entry not found", "EntryNotFound", found[0])
        content = found[1][name]
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found[0]}
        start = int(re.search(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self._send(206 if start else 200, content[start:], etag)

    # What is answered

    def _answer(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
