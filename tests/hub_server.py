"""A small Hub on this machine: as much of the HTTP interface as `huggingface_hub` needs to push and to fetch.

It keeps what it is given, commit by commit, and answers with the status codes and headers of the real one.
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

    def at(self, revision):
        if revision == "main":
            return self.commits[-1]
        return next((found for found in self.commits if found[0] == revision), None)


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server; `with HubServer() as hub` runs it in a thread."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos = {}
        self.large = {}
        self.asked = []
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

    def __init__(self, status, code=None, message=""):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
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
            self.answer(refusal.status, {"error": str(refusal)}, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_call

    def route(self, parts, body):
        match parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                self.validate(json.loads(body)["content"])
            case ["api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                self.tree(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "preupload", _]:
                self.preupload(f"{owner}/{name}", json.loads(body))
            case ["api", "models", owner, name, "commit", "main"]:
                self.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case ["stop"]:
                self.server.stop()
                self.answer(200)
            case ["large", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                self.server.large[digest] = body
                self.answer(200)
            case [owner, name, "resolve", revision, file]:
                self.resolve(f"{owner}/{name}", revision, file)
            case _:
                raise Refusal(404, message=f"this Hub has no {self.path}")

    def writes(self, name):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, message="Invalid username or password.")
        if name.partition("/")[0] != OWNER:
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")

    def repo(self, name, revision="main"):
        """Return a repository and a commit of it.

        Raises:
            Refusal: there is none, or the caller may not see it.
        """
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not known):
            if not known:
                raise Refusal(401, message="Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        found = repo.at(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, found

    def create(self, asked):
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        self.writes(name)
        url = f"{self.server.address}/{name}"
        if name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.add(name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer(200, {"url": url, "name": name, "id": name})

    def validate(self, content):
        errors = []
        try:
            _, front, _ = content.split("---\n", 2)
            data = yaml.safe_load(front)
            texts = [data["library_name"], *data["tags"], data.get("base_model", "")]
            errors += [f"{text!r} must be a string" for text in texts if not isinstance(text, str)]
        except Exception as error:
            errors.append(repr(error))
        told = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer(400 if errors else 200, told)

    def info(self, name, revision):
        repo, (commit, files) = self.repo(name, revision)
        told = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0}
        self.answer(200, {**told, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, name, revision):
        _, (_, files) = self.repo(name, revision)
        self.answer(
            200,
            [
                {"type": "file", "path": file, "size": len(content), "oid": git_id(content)}
                for file, content in files.items()
            ],
        )

    def preupload(self, name, asked):
        self.writes(name)
        self.repo(name)
        self.answer(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked["files"]
                ]
            },
        )

    def batch(self, name, asked):
        self.writes(name)
        there = [
            {**entry, "actions": {"upload": {"href": f"{self.server.address}/large/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": there})

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
        self.answer(200, {"commitUrl": address, "commitOid": commit, "success": True})

    def resolve(self, name, revision, file):
        repo, (commit, files) = self.repo(name, revision)
        if repo.gated:
            raise Refusal(403, "GatedRepo", "Access to this model is restricted")
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        self.answer(200, files[file], {"ETag": f'"{git_id(files[file])}"', "X-Repo-Commit": commit})
