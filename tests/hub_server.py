"""A small Hub on this machine: as much of the HTTP interface as `huggingface_hub` and `datasets` need.

It keeps what it is given, commit by commit, and answers with the status codes and headers of the real one. Data sets
are repositories whose name begins with `datasets/`.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, OWNER = "hf_writer", "me"


@dataclass
class Repo:
    """A repository: its commits, each an id and the files by name, the newest last."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files):
        whole = {**(self.commits[-1][1] if self.commits else {}), **files}
        text = f"{len(self.commits)} {sorted((name, git_id(content)) for name, content in whole.items())}"
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), whole))
        return self.commits[-1][0]


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server; `with HubServer() as hub` runs it in a thread."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos, self.large, self.asked = {}, {}, []
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
            self.server_close()

    def add(self, name, files, **options):
        """Put a repository there, as the Hub does: with a first commit of its own."""
        self.repos[name] = Repo(**options)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})


class Refusal(Exception):
    """An answer other than 200, with the code by which the client tells errors apart."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, content, status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_call(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        try:
            self.route(path.strip("/").split("/"), body)
        except Refusal as refusal:
            self.answer({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_call

    def route(self, parts, body):
        match parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                self.validate(json.loads(body)["content"])
            case ["api", "models" | "datasets" as kind, owner, name, *what]:
                self.ask(f"{owner}/{name}" if kind == "models" else f"datasets/{owner}/{name}", what, body)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case ["stop"]:
                self.server.stop()
                self.answer(b"")
            case ["large", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                self.server.large[digest] = body
                self.answer(b"")
            case ["datasets", owner, name, "resolve", revision, *path]:
                self.resolve(f"datasets/{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, file]:
                self.resolve(f"{owner}/{name}", revision, file)
            case _:
                raise Refusal(404, f"this Hub has no {self.path}")

    def ask(self, name, what, body):
        match what:
            case [] | ["revision", _]:
                repo, (commit, files) = self.repo(name, *what[1:])
                told = {"id": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0}
                self.answer({**told, "siblings": [{"rfilename": file} for file in files]})
            case ["tree", revision, *folder]:
                self.answer(self.entries(name, revision, "".join(f"{part}/" for part in folder)))
            case ["paths-info", revision]:
                self.answer([entry for entry in self.entries(name, revision) if entry["path"] in body.decode()])
            case ["preupload", _]:
                self.writes(name)
                self.repo(name)
                paths = [file["path"] for file in json.loads(body)["files"]]
                mode = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
                self.answer({"files": [{"path": p, "uploadMode": mode[p], "shouldIgnore": False} for p in paths]})
            case ["commit", "main"]:
                self.commit(name, [json.loads(line) for line in body.splitlines()])

    def entries(self, name, revision, folder=""):
        """Return the files of a folder, or of all below, and the folders in it."""
        _, (commit, files) = self.repo(name, revision)
        deep = "recursive=True" in self.path or "paths-info" in self.path
        found = {}
        for path, content in files.items():
            rest = path.removeprefix(folder)
            if path.startswith(folder) and (deep or "/" not in rest):
                found[path] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            elif path.startswith(folder):
                below = folder + rest.partition("/")[0]
                found[below] = {"type": "directory", "path": below, "oid": commit}
        return list(found.values())

    def writes(self, name):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid username or password.")
        if name.partition("/")[0] != OWNER:
            raise Refusal(403, "You don't have the rights to create a model under this namespace")

    def repo(self, name, revision="main"):
        """Return a repository and a commit of it.

        Raises:
            Refusal: there is none, or the caller may not see it.
        """
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not known):
            if known or name.startswith("datasets/"):  # only over https is a 401 taken for an absent repository
                raise Refusal(404, "Repository not found", "RepoNotFound")
            raise Refusal(401, "Invalid username or password.")
        for commit in reversed(repo.commits):
            if revision in ("main", commit[0]):
                return repo, commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create(self, asked):
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        self.writes(name)
        url = f"{self.server.address}/{name}"
        if name in self.server.repos:
            self.answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.server.add(name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer({"url": url, "name": name, "id": name})

    def validate(self, content):
        try:
            _, front, _ = content.split("---\n", 2)
            data = yaml.safe_load(front)
            texts = [data["library_name"], *data["tags"], data.get("base_model", "")]
            errors = [f"{text!r} must be a string" for text in texts if not isinstance(text, str)]
        except Exception as error:
            errors = [repr(error)]
        told = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer(told, 400 if errors else 200)

    def batch(self, name, asked):
        self.writes(name)
        upload = f"{self.server.address}/large/"
        objects = [{**one, "actions": {"upload": {"href": upload + one["oid"]}}} for one in asked["objects"]]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name, lines):
        self.writes(name)
        repo, _ = self.repo(name)
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commit = repo.commit(files)
        address = f"{self.server.address}/{name}/commit/{commit}"
        self.answer({"commitUrl": address, "commitOid": commit, "success": True})

    def resolve(self, name, revision, file):
        repo, (commit, files) = self.repo(name, revision)
        if repo.gated:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        if file not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        self.answer(files[file], headers={"ETag": f'"{git_id(files[file])}"', "X-Repo-Commit": commit})
