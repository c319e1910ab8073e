"""A local fake of the Hugging Face hub's HTTP API, as far as huggingface_hub calls it to make a repository and upload files.

What it does not know, it answers with 501, so that a client that asks for more is noticed. Import it as `fake_hub`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_aTokenThatOnlyThisFakeKnows"
PART_BYTES = 200_000
"""Larger objects are uploaded in parts."""


@dataclass
class Hub:
    """The content of the hub. `requests`: method and path of each, in order."""

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """By name, whether it is private."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Of the only branch of all repositories, by `owner/name/path`."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Of the large file storage, by sha256."""
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    """What requests had as authorization."""
    refuse: str = ""
    """A regular expression: requests that match are answered with 400."""
    commits: list[dict[str, Any]] = field(default_factory=list)
    on_request: Callable[[str], None] = lambda request: None

    def sent(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, content: Any = None, **headers: str) -> None:
        body = json.dumps({} if content is None else content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        hub, body, path = self.hub, self._body(), self.path.partition("?")[0]
        request = f"{self.command} {path}"
        hub.requests.append(request)
        hub.on_request(request)
        if path.startswith("/storage/"):  # by signed URLs, without the token
            return self._store(path, body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub.tokens.add(token)
        if hub.refuse and re.search(hub.refuse, request):
            return self._answer(400, {"error": "the fake was told to refuse this"})
        if self.command != "HEAD" and token != TOKEN:
            return self._answer(401, {"error": "Invalid user token."})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, request):
                return method(self, *found.groups(), body)
        return self._answer(404 if self.command == "HEAD" else 501, {"error": f"unknown: {request}"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        owner, name = wanted["organization"], wanted["name"]
        if owner != "me":
            return self._answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        repo, url = f"{owner}/{name}", f"{self.hub.url}/{owner}/{name}"
        if repo in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[repo] = wanted.get("visibility", "public") == "private" or wanted.get("private") is True
        return self._answer(200, {"url": url, "name": repo})

    def _info(self, repo: str, body: bytes) -> None:
        del body
        if repo not in self.hub.repos:
            return self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        return self._answer(200, {"id": repo, "private": self.hub.repos[repo], "tags": [], "siblings": []})

    def _preupload(self, repo: str, body: bytes) -> None:
        del repo
        names = [each["path"] for each in json.loads(body)["files"]]
        modes = {True: "lfs", False: "regular"}
        files = [{"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False} for name in names]
        return self._answer(200, {"files": files})

    def _validate_card(self, body: bytes) -> None:
        """As the hub, refuses a front matter that is no YAML mapping, or has an entry of the wrong type."""
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
        kinds = {"license": str, "library_name": str, "pipeline_tag": str, "tags": list, "datasets": list, "base_model": str}
        wrong = [key for key in front if not isinstance(front[key], kinds[key])] if isinstance(front, dict) else ["front matter"]
        errors = [{"message": f"{key} is of the wrong type"} for key in wrong]
        return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _batch(self, repo: str, body: bytes) -> None:
        answers = []
        for each in json.loads(body)["objects"]:
            oid, size = each["oid"], each["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                place = f"{self.hub.url}/storage/{oid}"
                upload: dict[str, Any] = {"href": place}
                if size > PART_BYTES:
                    count = -(-size // PART_BYTES)
                    header = {f"{number:05d}": f"{place}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(PART_BYTES), **header}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}/verify"}}
            answers.append(answer)
        return self._answer(200, {"transfer": "multipart", "objects": answers})

    def _store(self, path: str, body: bytes) -> None:
        oid, _, part = path.removeprefix("/storage/").partition("/")
        if self.hub.refuse and re.search(self.hub.refuse, path):
            return self._answer(400, {"error": "the fake was told to refuse this"})
        if part.isdecimal():
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            return self._answer(200, ETag=f'"{part}"')
        if part == "complete":
            said = [each["partNumber"] for each in json.loads(body)["parts"]]
            assert said == sorted(self.hub.parts[oid])
            body = b"".join(self.hub.parts[oid][number] for number in said)
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return self._answer(200)

    def _verify(self, repo: str, body: bytes) -> None:
        del repo
        said = json.loads(body)
        known = len(self.hub.objects.get(said["oid"], b"")) == said["size"]
        return self._answer(200 if known else 404)

    def _commit(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        made = {}
        for line in lines[1:]:
            value = line["value"]
            made[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else self.hub.objects[value["oid"]]
        self.hub.files |= {f"{repo}/{name}": content for name, content in made.items()}
        self.hub.commits.append(lines[0]["value"])
        oid = hashlib.sha1(body).hexdigest()
        return self._answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})


ROUTES = (
    (r"GET /api/agent-harnesses", lambda self, body: self._answer(200, [])),
    (r"POST /api/validate-yaml", _Handler._validate_card),
    (r"POST /api/repos/create", _Handler._create),
    (r"GET /api/models/(\w+/[\w.-]+)", _Handler._info),
    (r"POST /api/models/(\w+/[\w.-]+)/preupload/main", _Handler._preupload),
    (r"POST /(\w+/[\w.-]+)\.git/info/lfs/objects/batch", _Handler._batch),
    (r"POST /(\w+/[\w.-]+)/verify", _Handler._verify),
    (r"POST /api/models/(\w+/[\w.-]+)/commit/main", _Handler._commit),
)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serves an empty hub on 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads, server.handle_error = True, lambda request, client: None  # clients may hang up
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
