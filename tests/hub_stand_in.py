"""A small stand-in of the Hugging Face hub on this machine: what its HTTP interface answers to the public libraries.

It knows repositories with commits, branches and tags, tokens with a role, private and gated repositories, and uploads:
creation, validation of a card, preupload, LFS batch, upload, commit.
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
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pytest
import transformers.utils.hub
import yaml

Files = dict[str, bytes]
LARGE = (".safetensors", ".pt", ".bin", ".gguf")
ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message


@dataclass
class Repository:
    """Commits by their id, oldest first, and the names of some."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit with exactly these files."""
        hashes = sorted((name, _blob_id(data)) for name, data in files.items())
        identity = hashlib.sha1(f"{len(self.commits)} {hashes}".encode()).hexdigest()
        self.commits[identity] = dict(files)
        self.branches[branch] = identity
        return identity

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, tag or commit."""
        names = {**self.tags, **self.branches, **{commit: commit for commit in self.commits}}
        if revision not in names:
            raise Refused(404, "RevisionNotFound")
        return names[revision]

    @property
    def files(self) -> Files:
        """The files of the main branch."""
        return self.commits[self.branches["main"]]


@dataclass
class Hub:
    """The state of the hub, which tests read and change."""

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_write": "write", "hf_read": "read"})
    objects: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail: Callable[[str], Refused | None] = lambda request: None
    """Called with ``METHOD path`` before each answer."""

    def add(self, kind: str, name: str, files: Files, **options: Any) -> Repository:
        """Add a repository with one commit."""
        repository = self.repositories[kind, name] = Repository(**options)
        repository.commit(files)
        return repository

    def answer(self, method: str, path: str, query: dict[str, list[str]], role: str | None, body: bytes) -> Any:
        """Return what is answered: bytes of a file with its headers, or something for JSON."""
        match path.strip("/").split("/"):
            case ["api", "whoami-v2"]:
                if role is None:
                    raise Refused(401, message="Invalid credentials in Authorization header")
                return {"type": "user", "name": "ann", "orgs": [], "auth": {"accessToken": {"role": role}}}
            case ["api", "repos", "create"]:
                return self._create(json.loads(body), role)
            case ["api", "validate-yaml"]:
                return _validate(json.loads(body)["content"])
            case ["api", "agent-harnesses"]:
                raise Refused(404)
            case ["api", kind, owner, name, *rest]:
                repository = self._repository(kind.removesuffix("s"), f"{owner}/{name}", role)
                return self._api(repository, f"{owner}/{name}", rest, query, role, body)
            case ["upload", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise Refused(400, message="the content is not that of its name")
                self.objects[oid] = body
                return {}
            case ["datasets", owner, name, "resolve", revision, *file]:
                return self._file("dataset", f"{owner}/{name}", unquote(revision), "/".join(file), role)
            case [owner, name, "resolve", revision, *file]:
                return self._file("model", f"{owner}/{name}", unquote(revision), "/".join(file), role)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._repository("model", f"{owner}/{name.removesuffix('.git')}", role)
                return self._batch(json.loads(body))
        raise Refused(404, "EntryNotFound")

    def _repository(self, kind: str, name: str, role: str | None) -> Repository:
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and role is None):
            raise Refused(401 if role is None else 404, "RepoNotFound")
        return repository

    def _file(self, kind: str, name: str, revision: str, file: str, role: str | None) -> tuple[bytes, str, str]:
        repository = self._repository(kind, name, role)
        if repository.gated:
            raise Refused(401 if role is None else 403, "GatedRepo")
        commit = repository.resolve(revision)
        if file not in repository.commits[commit]:
            raise Refused(404, "EntryNotFound")
        content = repository.commits[commit][file]
        return content, _blob_id(content), commit

    def _create(self, request: dict[str, Any], role: str | None) -> dict[str, str]:
        name = f"{request.get('organization') or 'ann'}/{request['name']}"
        if role != "write" or not name.startswith("ann/"):
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if ("model", name) in self.repositories:
            raise Refused(409, message="You already created this model repo")
        self.add("model", name, {".gitattributes": b""}, private=request.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{name}", "name": name}

    def _api(
        self,
        repository: Repository,
        name: str,
        rest: list[str],
        query: dict[str, list[str]],
        role: str | None,
        body: bytes,
    ) -> Any:
        match rest:
            case ["auth-check", *_]:
                if repository.gated:
                    raise Refused(401 if role is None else 403, "GatedRepo")
                return {}
            case [] | ["revision", _]:
                commit = repository.resolve(unquote(rest[1]) if rest else "main")
                files = [{"rfilename": file} for file in repository.commits[commit]]
                return {"id": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []}
            case ["refs"]:
                kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
                refs = {
                    kind: [
                        {"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": commit}
                        for ref, commit in names.items()
                    ]
                    for kind, (folder, names) in kinds.items()
                }
                return {**refs, "converts": []}
            case ["tree", revision, *folder]:
                return self._tree(
                    repository, unquote(revision), unquote("/".join(folder)), recursive="recursive" in query
                )
            case ["paths-info", revision]:
                paths = {
                    entry["path"]: entry for entry in self._tree(repository, unquote(revision), "", recursive=True)
                }
                wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
                return [paths[path] for path in wanted if path in paths]
            case ["preupload", _]:
                files = [file["path"] for file in json.loads(body)["files"]]
                return {
                    "files": [
                        {
                            "path": file,
                            "uploadMode": "lfs" if file.endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                            "oid": _blob_id(repository.files[file]) if file in repository.files else None,
                        }
                        for file in files
                    ]
                }
            case ["commit", "main"]:
                if role != "write":
                    raise Refused(403, message="you don't have the permission to write")
                return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        raise Refused(404, "EntryNotFound")

    def _tree(self, repository: Repository, revision: str, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        files = repository.commits[repository.resolve(revision)]
        prefix = f"{folder}/" if folder else ""
        below = {name: content for name, content in files.items() if name.startswith(prefix)}
        if not below and folder:
            raise Refused(404, "EntryNotFound")
        names = {name: name[len(prefix) :].split("/") for name in below}
        folders = {prefix + "/".join(parts[:depth]) for parts in names.values() for depth in range(1, len(parts))}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted(folders)
            if recursive or "/" not in path[len(prefix) :]
        ]
        entries += [
            {"type": "file", "oid": _blob_id(content), "size": len(content), "path": name}
            for name, content in below.items()
            if recursive or len(names[name]) == 1
        ]
        return entries

    def _batch(self, request: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for each in request["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/upload/{each['oid']}"}}
            objects.append({**each, **({} if each["oid"] in self.objects else {"actions": upload})})
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        header, *operations = lines
        parent = header["value"].get("parentCommit")
        if parent not in (None, repository.branches["main"]):
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        raise Refused(400, message=f"{value['path']} was not uploaded")
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = repository.commit(files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}"}


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _validate(card: str) -> dict[str, Any]:
    """Refuse what the hub refuses of a card's metadata: a base model that is no name on the hub."""
    metadata = yaml.safe_load(card.split("---")[1])
    base = metadata.get("base_model")
    if base is not None and not ID.fullmatch(base):
        raise Refused(400, message=f'"base_model" with value "{base}" is not valid. Use a model id from {ID.pattern}')
    return {"errors": [], "warnings": []}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet: two wait for each other

        def log_message(self, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.requests.append(request := f"{self.command} {address.path}")
            headers = {"Content-Type": "application/json"}
            try:
                refused = hub.fail(request)
                if refused is not None:
                    raise refused
                role = hub.tokens.get(token)
                answer = hub.answer(self.command, address.path, parse_qs(address.query), role, body)
                status = 200
                if isinstance(answer, tuple):
                    content, etag, commit = answer
                    headers |= {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
                else:
                    content = json.dumps(answer).encode()
            except Refused as refused:
                status, content = refused.status, json.dumps({"error": refused.message}).encode()
                headers |= {"X-Error-Code": refused.code} if refused.code else {}
                headers |= {"X-Error-Message": refused.message} if refused.message else {}
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty hub while the context lasts; ``endpoint`` is its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub: Hub, patch: pytest.MonkeyPatch, cache: Any) -> None:
    """Let the libraries of this process, which read HF_ENDPOINT at import, use a hub; nobody is logged in."""
    constants = huggingface_hub.constants
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # which keeps the endpoint of its first use
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    patch.setattr(datasets.config, "HUB_DATASETS_URL", hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    patch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # of another server of the hub's
    huggingface_hub.utils.close_session()
