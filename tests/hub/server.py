"""A Hub on the loopback interface: the part of its protocol that the real client speaks.

It keeps everything in memory, listens on a port of its own, and makes faults on demand. It is our
reading of the protocol: what the real Hub adds (Xet, quotas, checks of cards) is not shown by it.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
USER = "user"
LFS_SUFFIXES = (".safetensors", ".parquet", ".npz", ".png", ".bin", ".gz", ".arrow")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `pattern`.

    Attributes
    ----------
    pattern : str
        Regular expression.
    status : int
        HTTP status to answer with; 0 for none.
    drop_after : int
        Close the connection after so many bytes of the request's body; -1 for never.
    delay : float
        Seconds to wait first.
    times : int
        How often; then the fault is over.
    late : bool
        The request is carried out, and then its answer is lost (with `drop_after`) or replaced.
    wait_after : float
        Seconds between carrying the request out and answering.
    """

    pattern: str
    status: int = 0
    drop_after: int = -1
    delay: float = 0.0
    times: int = 1
    late: bool = False
    wait_after: float = 0.0


@dataclass
class Commit:
    """One revision: all files, and the title."""

    sha: str
    title: str
    files: dict[str, bytes]
    parent: str | None


@dataclass
class Repository:
    """One repository with its commits, oldest first, branches and tags."""

    kind: str
    name: str
    private: bool
    sdk: str | None = None
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        parent = self.refs.get(branch)
        content = json.dumps([title, parent, sorted((p, blob_oid(b)) for p, b in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        made = Commit(sha, title, files, parent)
        self.commits.append(made)
        self.refs[branch] = sha
        return made

    def find(self, revision: str) -> Commit | None:
        sha = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((one for one in self.commits if one.sha == sha), None)

    @property
    def head(self) -> Commit:
        found = self.find("main")
        assert found is not None
        return found


def blob_oid(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """The server, its state, and the faults that are due."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: object, token: str | None = TOKEN) -> dict[str, str]:
        """What a client process needs in its environment to speak to this Hub."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
        }
        return values | ({} if token is None else {"HF_TOKEN": token})

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def fault_for(self, line: str) -> Fault | None:
        """The first fault that is due for a request, counted down."""
        with self.lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Dropped(Exception):
    """The connection is to be closed without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            super().handle()

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ------------------------------------------------------------------ requests

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route = unquote(parts.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        fault = self.hub.fault_for(f"{self.command} {self.route}")
        try:
            if fault is not None:
                time.sleep(fault.delay)
            early = fault is not None and not fault.late
            self.body = self._read(fault.drop_after if early and fault else -1)
            if early and fault and fault.status:
                self._fail(fault.status, "made by the test")
                return
            if fault is not None and fault.late:
                self._answer = (lambda *_, **__: None) if fault.drop_after >= 0 else self._answer
                self._route()
                raise _Dropped
            if fault is not None and fault.wait_after:
                answers: list = []
                self._answer = lambda *given, **named: answers.append((given, named))
                self._route()
                time.sleep(fault.wait_after)
                del self._answer  # the method again
                for given, named in answers:
                    self._answer(*given, **named)
                return
            self._route()
        except _Dropped:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _read(self, drop_after: int) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if drop_after >= 0:
            self.rfile.read(min(length, drop_after))
            raise _Dropped
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self._line(), 16):
                parts.append(self.rfile.read(size))
                self._line()
            self._line()
            return b"".join(parts)
        body = self.rfile.read(length)
        if len(body) < length:  # the client is gone, and half a request asks for nothing
            raise _Dropped
        return body

    def _line(self) -> bytes:
        """A line between chunks; the last one, and that after a chunk, are empty but for CRLF."""
        line = self.rfile.readline()
        if not line:
            raise _Dropped
        return line.strip()

    def _answer(self, value=None, status=200, headers=None, content=None) -> None:
        body = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if content is None:
            self.send_header("Content-Type", "application/json")
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        if status == 429:
            headers["Retry-After"] = "0"
        self._answer({"error": message}, status, headers)

    def _user(self) -> str | None:
        return USER if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    # ------------------------------------------------------------------ routes

    def _route(self) -> None:
        with self.hub.lock:
            if self.route == "/api/whoami-v2":
                self._whoami()
            elif self.route == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif self.route.startswith("/api/repos/"):
                self._repositories()
            elif match := re.fullmatch(
                r"/(?:(datasets|spaces)/)?(.+?)\.git/info/lfs/.+", self.route
            ):
                self._lfs_batch(match)
            elif match := re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", self.route):
                self._lfs_object(match)
            elif match := re.match(
                r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(/.*)?$", self.route
            ):
                self._api(*match.groups())
            elif match := re.fullmatch(
                r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+|refs/.+?)/(.+)", self.route
            ):
                self._resolve(*match.groups())
            else:
                self._fail(404, f"no route {self.route}")

    def _whoami(self) -> None:
        if self._user() is None:
            self._fail(401, "Invalid username or password.")
            return
        token = {"displayName": "test", "role": "write"}
        user = {"type": "user", "name": USER, "fullname": USER, "orgs": []}
        self._answer(user | {"auth": {"type": "access_token", "accessToken": token}})

    def _repositories(self) -> None:
        if self._user() is None:
            self._fail(401, "Invalid username or password.")
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name'].rpartition('/')[2]}"
        key = asked.get("type") or "model", name
        if self.route.endswith("/delete"):
            self.hub.repositories.pop(key, None)
            self._answer({})
            return
        if key[0] == "space" and not asked.get("sdk"):
            self._fail(400, "A Space needs an SDK.")
            return
        url = f"{self.hub.url}/{'' if key[0] == 'model' else key[0] + 's/'}{name}"
        if key in self.hub.repositories:
            self._answer({"error": "You already created this repo", "url": url}, 409)
            return
        made = Repository(
            *key,
            private=asked.get("private") or asked.get("visibility") == "private",
            sdk=asked.get("sdk"),
        )
        made.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[key] = made
        self._answer({"url": url, "name": name, "id": name})

    def _find(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self._user() is None):
            self._fail(404 if self._user() else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def _at(self, repository: Repository, revision: str) -> Commit | None:
        found = repository.find(revision)
        if found is None:
            self._fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _api(self, kinds: str, name: str, rest: str | None) -> None:
        repository = self._find(KINDS[kinds], name)
        if repository is None:
            return
        verb, _, value = (rest or "").strip("/").partition("/")
        if verb in ("", "revision"):
            commit = self._at(repository, value or "main")
            if commit:
                files = [{"rfilename": path} for path in sorted(commit.files)]
                about = {"id": name, "sha": commit.sha, "private": repository.private}
                self._answer(about | {"siblings": files, "tags": [], "downloads": 0, "likes": 0})
        elif verb == "refs":
            found = {"branches": repository.refs, "tags": repository.tags}
            self._answer(
                {
                    what: [
                        {"name": n, "ref": f"refs/{n}", "targetCommit": sha}
                        for n, sha in values.items()
                    ]
                    for what, values in found.items()
                }
                | {"converts": []}
            )
        elif verb == "commits":
            self._answer(
                [
                    {"id": c.sha, "title": c.title, "message": "", "date": _DATE, "authors": []}
                    for c in reversed(repository.commits)
                ]
            )
        elif verb in ("tree", "paths-info"):
            self._tree(repository, verb, value)
        elif self._user() is None:
            self._fail(401, "Invalid username or password.")
        elif verb == "tag":
            commit = self._at(repository, value or "main")
            if commit:
                repository.tags[json.loads(self.body)["tag"]] = commit.sha
                self._answer({})
        elif verb == "preupload":
            self._preupload(repository, value)
        elif verb == "commit":
            self._commit(repository, value)
        else:
            self._fail(404, f"no route {self.route}")

    def _tree(self, repository: Repository, verb: str, value: str) -> None:
        revision, _, folder = value.partition("/")
        commit = self._at(repository, revision)
        if commit is None:
            return
        if verb == "paths-info":
            text = self.body.decode()
            asked = json.loads(text)["paths"] if text[:1] == "{" else parse_qs(text)["paths"]
            asked = [asked] if isinstance(asked, str) else asked
            entries = [_entry(p, commit.files[p]) for p in asked if p in commit.files]
            entries += [
                _folder(p) for p in asked if any(f.startswith(f"{p}/") for f in commit.files)
            ]
            self._answer(entries)
            return
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict] = {}
        for path, content in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                if depth == 1 or "recursive" in self.query:
                    parent = prefix + "/".join(parents[:depth])
                    found.setdefault(parent, _folder(parent))
            if not parents or self.query.get("recursive", "").lower() in ("true", "1"):
                found[path] = _entry(path, content)
        if folder and not found:
            self._fail(404, f"no {folder}", "EntryNotFound")
            return
        self._answer(list(found.values()))

    def _preupload(self, repository: Repository, revision: str) -> None:
        commit = self._at(repository, revision)
        if commit is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in commit.files:
                content = commit.files[path]
                lfs = hashlib.sha256(content).hexdigest()
                answer["oid"] = lfs if mode == "lfs" else blob_oid(content)
            answers.append(answer)
        self._answer({"files": answers, "commitOid": commit.sha})

    def _commit(self, repository: Repository, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header, operations = lines[0]["value"], lines[1:]
        head = repository.find(revision)
        assert head is not None
        if header.get("parentCommit") not in (None, head.sha):
            self._fail(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.objects:
                files[path] = self.hub.objects[value["oid"]]
            elif key == "lfsFile":
                self._fail(400, f"LFS object of {path} was never uploaded")
                return
            elif key == "deletedFile":
                files.pop(path, None)
            elif key == "deletedFolder":
                files = {p: c for p, c in files.items() if not p.startswith(path.rstrip("/") + "/")}
        made = repository.commit(header["summary"], files, revision)
        url = f"{self.hub.url}/{repository.name}/commit/{made.sha}"
        self._answer({"success": True, "commitOid": made.sha, "commitUrl": url})

    # ------------------------------------------------------------------ large files and downloads

    def _lfs_batch(self, match: re.Match) -> None:
        if self._find({None: "model"}.get(match[1], (match[1] or "")[:-1]), match[2]) is None:
            return
        if self._user() is None:
            self._fail(401, "Invalid username or password.")
            return
        answers = []
        for one in json.loads(self.body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"], "authenticated": True}
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{one['oid']}"
                answer["actions"] = {
                    "upload": {"href": href},
                    "verify": {"href": f"{href}/verify"},
                }
            answers.append(answer)
        self._answer({"transfer": "basic", "objects": answers})

    def _lfs_object(self, match: re.Match) -> None:
        if match[2]:
            held = json.loads(self.body)["oid"] in self.hub.objects
            self._answer({}, 200 if held else 404)
        elif hashlib.sha256(self.body).hexdigest() != match[1]:
            self._fail(400, "content does not have this sha256")
        else:
            self.hub.objects[match[1]] = self.body
            self._answer({}, headers={"ETag": match[1]})

    def _resolve(self, kinds: str | None, name: str, revision: str, path: str) -> None:
        repository = self._find((kinds or "models")[:-1], name)
        commit = repository and self._at(repository, revision)
        if not commit:
            return
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"no {path}"}
            self._answer({"error": f"no {path}"}, 404, headers | message)
            return
        content = commit.files[path]
        entry = _entry(path, content)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            headers["X-Linked-Etag"] = f'"{entry["lfs"]["oid"]}"'
            headers["X-Linked-Size"] = str(len(content))
        status, wanted = 200, re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            total = len(content)
            if wanted[1]:
                first, last = int(wanted[1]), min(int(wanted[2] or total), total - 1)
            else:
                first, last = total - int(wanted[2]), total - 1
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        self._answer(status=status, headers=headers, content=content)


_DATE = "2026-11-01T00:00:00.000Z"


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
    if path.endswith(LFS_SUFFIXES):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def _folder(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": blob_oid(path.encode())}
