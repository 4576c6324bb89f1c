"""A Hub on the loopback interface for tests: create, commit, list, download, and fail on demand.

Its files live in memory. Every file is answered as "regular", so that huggingface_hub sends it inside the
commit and never turns to Xet. The client reads `HF_ENDPOINT` when it is imported: run it by `HubServer.run`.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import forked

ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT: dict[str, str] = {}
NO_COMMIT = "0" * 40


@dataclass
class Repo:
    """A repository: branches point to commits, a commit is all of its files. Nobody may read a gated one's files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {NO_COMMIT: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": NO_COMMIT})
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch name or a commit id stands for."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the main branch."""
        return self.commits[self.branches["main"]]


def prepare_clients() -> None:
    """Makes the server the Hub of this process and of those that it starts: called before any import that reads it.

    Its address and the folder of its files are then those of all tests, one after another, and none reaches another.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _ENVIRONMENT.update(
            HF_ENDPOINT=f"http://127.0.0.1:{free.getsockname()[1]}",
            HF_HOME=str(Path(tempfile.mkdtemp()) / "home"),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
            OMP_NUM_THREADS="1",
        )
    os.environ.update(_ENVIRONMENT)


class HubServer:
    """The server. `repos` holds what was pushed, `requests` every (method, path, status) in order.

    Models are called "user/name" there, data sets "datasets/user/name".

    Attributes:
        tokens: token -> {"name": user, "orgs": [...], "write": bool}.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, dict[str, Any]] = {"dummy": {"name": "user", "orgs": ["lab"], "write": True}}
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        self._failures: dict[str, list[int]] = defaultdict(list)
        self.open = threading.Event()  # while it is not set, pushes wait
        self.open.set()
        self.dead = ""
        address = ("127.0.0.1", int(_ENVIRONMENT["HF_ENDPOINT"].rpartition(":")[2]))
        self._http = ThreadingHTTPServer(address, type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def die(self, *, silent: bool) -> None:
        """From now on every request is dropped, or is taken and never answered."""
        self.dead = "silent" if silent else "gone"

    def add_dataset(self, repo: str, folder: Path, *, private: bool = False, gated: bool = False) -> None:
        """Puts the files of `folder` into a data set repository ("user/name") as one commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commit = hashlib.sha1("".join(sorted(files)).encode()).hexdigest()
        commits, branches = {NO_COMMIT: {}, commit: files}, {"main": commit}
        self.repos[f"datasets/{repo}"] = Repo(private=private, gated=gated, commits=commits, branches=branches)

    def fail(self, route: str, status: int, *, times: int = 1) -> None:
        """The next `times` requests of `route` are answered with `status`. Clients may also GET /hold and /release.

        Routes: whoami, create, auth-check, validate-yaml, preupload, commit, info, tree, paths-info, resolve.
        Clients may arrange the same by GET /fail/ROUTE/STATUS/TIMES.
        """
        self._failures[route] += [status] * times

    def recover(self) -> None:
        """Forgets the failures not yet used; clients may GET /recover."""
        self._failures.clear()

    def next_failure(self, route: str) -> int | None:
        with self.lock:
            return self._failures[route].pop(0) if self._failures[route] else None

    def env(self, home: Path, *, token: str | None = "dummy") -> dict[str, str]:
        """Environment of a client process whose Hub is this server, and whose files of it lie in `home`."""
        home.mkdir(parents=True, exist_ok=True)
        link = Path(_ENVIRONMENT["HF_HOME"])
        if link.is_symlink():
            link.unlink()
        elif link.exists():  # libraries of this process keep something there
            shutil.rmtree(link)
        link.symlink_to(home)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        return kept | _ENVIRONMENT | ({"HF_TOKEN": token} if token is not None else {})

    def run(self, code: str, home: Path, *args: str, token: str | None = "dummy", fresh: bool = False) -> str:
        """Runs Python `code` as a client and returns what it printed; fails with its stderr when it fails.

        `fresh`: by an interpreter of its own, for code that changes what is read at import.
        """
        words, env = ["-c", code, *args], self.env(home, token=token)
        if fresh:
            done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
        else:
            done = forked.run((words, env))
        if done.returncode != 0:
            raise AssertionError(f"client exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate-yaml"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check(?P<write>/write)?", "auth-check"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/(?P<repo>datasets/[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", r"/api/(?P<repo>datasets/[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths-info"),
        ("GET", r"/api/(?P<repo>datasets/[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        if self.hub.dead:
            self.close_connection = True
            if self.hub.dead == "silent":
                threading.Event().wait()
            return None
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        asked = re.fullmatch(r"/fail/([\w-]+)/(\d+)/(\d+)", url.path)  # for clients that arrange their own failures
        if asked:
            self.hub.fail(asked[1], int(asked[2]), times=int(asked[3]))
        elif url.path == "/recover":
            self.hub.recover()
        elif url.path == "/hold":
            self.hub.open.clear()
        elif url.path == "/release":
            self.hub.open.set()
        if asked or url.path in ("/recover", "/hold", "/release"):
            return self._send(200, b"", {})
        for wanted, pattern, route in self.ROUTES:
            found = re.fullmatch(pattern, url.path)
            if wanted == method and found:
                status = self.hub.next_failure(route)
                if status is not None:
                    return self._error(status, "a failure that the test asked for")
                parts = {key: unquote(value) if value else None for key, value in found.groupdict().items()}
                return getattr(self, "_" + route.replace("-", "_"))(**parts)
        return self._error(404, f"{method} {url.path}: this test Hub has no such route")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(value).encode(), headers)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status=status, headers=headers)

    def _user(self) -> dict[str, Any] | None:
        """The sender's account; answers 401 and returns None for a missing or unknown token."""
        user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if user is None:
            self._error(401, "Invalid credentials in Authorization header")
        return user

    def _may_write(self, repo: str) -> bool:
        """Whether the sender may write to `repo`; answers the refusal."""
        user = self._user()
        if user is None:
            return False
        if repo.split("/")[0] not in (user["name"], *user["orgs"]) or not user["write"]:
            self._error(403, "You don't have the rights to write to this repository")
            return False
        return True

    def _find(self, repo: str, revision: str | None) -> tuple[Repo, str] | None:
        """Repository and commit; answers 404 and returns None where there is none."""
        found = self.hub.repos.get(repo)
        if found is None:
            return self._error(404, "Repository not found", "RepoNotFound")
        if found.private and "Authorization" not in self.headers:  # the Hub does not say that it exists
            return self._error(401, "Invalid username or password.")
        if found.private and self._user() is None:
            return None
        commit = found.resolve(revision or "main")
        if commit is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit

    def _whoami(self) -> None:
        user = self._user()
        if user is not None:
            role = {"displayName": "test", "role": "write" if user["write"] else "read"}
            orgs = [{"name": name} for name in user["orgs"]]
            self._json({"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": role}})

    def _create(self) -> None:
        wanted = json.loads(self.body)
        user = self._user()
        if user is None:
            return
        repo = f"{wanted.get('organization') or user['name']}/{wanted['name']}"
        if not self._may_write(repo):
            return
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            exists = repo in self.hub.repos
            if not exists:
                self.hub.repos[repo] = Repo(private=wanted.get("visibility") == "private")
        if exists:
            return self._json({"error": "You already created this model repo", **answer}, status=409)
        self._json(answer)

    def _auth_check(self, repo: str, write: str | None) -> None:
        if self._find(repo, None) and (not write or self._may_write(repo)):
            self._json({})

    def _validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        problem = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata"}]
        self._json({"errors": problem, "warnings": []}, status=400 if problem else 200)

    def _preupload(self, repo: str, revision: str) -> None:
        self.hub.open.wait()
        if self._may_write(repo) and self._find(repo, revision):
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": f["path"], **modes} for f in json.loads(self.body)["files"]]})

    def _commit(self, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        found = self._find(repo, revision)
        if found is None:
            return
        repository, parent = found
        files, message = dict(repository.commits[parent]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                return self._error(400, f"this test Hub takes files only, not {entry['key']!r}")
        digest = hashlib.sha1(parent.encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        commit = digest.hexdigest()
        with self.hub.lock:
            repository.commits[commit] = files
            repository.branches[revision] = commit
            repository.messages.append(message)
        where = {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit}
        self._json({"success": True, **where, "pullRequestUrl": None, "hookOutput": ""})

    def _info(self, repo: str, revision: str | None) -> None:
        found = self._find(repo, revision)
        if found is not None:
            repository, commit = found
            names = [{"rfilename": path} for path in sorted(repository.commits[commit])]
            name = repo.removeprefix("datasets/")
            about = {"id": name, "modelId": name, "sha": commit, "private": repository.private}
            self._json({**about, "siblings": names})

    def _tree(self, repo: str, revision: str, path: str | None) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        prefix = f"{path}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows: dict[str, dict[str, Any]] = {}
        for name, content in sorted(found[0].commits[found[1]].items()):
            if not name.startswith(prefix):
                continue
            parents = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                folder = prefix + "/".join(parents[:depth])
                rows[folder] = {"type": "directory", "path": folder, "oid": _blob_id(folder.encode())}
            if recursive or not parents:
                about = {"path": name, "size": len(content), "oid": _blob_id(content)}
                rows[name] = {"type": "file", **about}
        self._json(list(rows.values()))

    def _paths_info(self, repo: str, revision: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        files, body = found[0].commits[found[1]], self.body.decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        rows: list[dict[str, Any]] = []
        for path in paths:
            if path in files:
                rows.append({"type": "file", "path": path, "size": len(files[path]), "oid": _blob_id(files[path])})
            elif any(name.startswith(f"{path}/") for name in files):
                rows.append({"type": "directory", "path": path, "oid": _blob_id(path.encode())})
        self._json(rows)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        content = found[0].commits[found[1]].get(path)
        if content is None:
            return self._error(404, f"{path} does not exist", "EntryNotFound")
        if found[0].gated:
            return self._error(403, "Access to this repository is restricted; ask for access on its page", "GatedRepo")
        headers = {
            "X-Repo-Commit": found[1],
            "ETag": f'"{_blob_id(content)}"',
            "X-Linked-Etag": f'"{_blob_id(content)}"',
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers)
        self._send(200, content, headers)


def _blob_id(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
