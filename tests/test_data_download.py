"""Downloading from a Hub: a small one on this machine, that serves one data set to the real clients."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

datasets = pytest.importorskip("datasets")

COMMIT = hashlib.sha1(b"a commit").hexdigest()
PROGRAM = """
import logging, sys
logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
import datasets
datasets.logging.set_verbosity_error()
datasets.disable_progress_bars()
from residual_steer.data import plan, splits

def said(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(said(plan, "owner/texts", "small"))
parts = said(splits, "owner/texts", "small")
print(parts if isinstance(parts, str) else {name: list(rows["text"]) for name, rows in parts.items()})
print(said(plan, "owner/texts", "small"))
print(said(splits, "owner/nothing"))
print(said(splits, "owner/texts", "huge"))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks about the files in `self.server.files`."""

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        files = self.server.files
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.asked.append("/".join(parts))
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        entries += [
            {"type": "directory", "path": name.partition("/")[0], "oid": COMMIT} for name in files if "/" in name
        ]
        match parts:
            case ["api", "datasets", "owner", "texts"] | ["api", "datasets", "owner", "texts", "revision", _]:
                told = {"id": "owner/texts", "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
                self.answer(200, told | {"siblings": [{"rfilename": name} for name in files]})
            case ["api", "datasets", "owner", "texts", "tree", _, *folder]:
                self.answer(200, [entry for entry in entries if inside(entry["path"], "/".join(folder), self.path)])
            case ["api", "datasets", "owner", "texts", "paths-info", _]:
                self.answer(200, [entry for entry in entries if entry["path"] in body])
            case ["datasets", "owner", "texts", "resolve", _, *path] if "/".join(path) in files:
                content = files["/".join(path)]
                self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
            case ["datasets", "owner", "texts", "resolve", *_]:
                self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            case _:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = route


def inside(path, folder, address):
    rest = path if not folder else path[len(folder) + 1 :] if path.startswith(folder + "/") else ""
    return bool(rest) and ("recursive=True" in address or "/" not in rest)


@pytest.fixture
def hub(tmp_path):
    """The server, with a data set in the schema of WikiText: a README with sizes, and Parquet files."""
    info = {
        "config_name": "small",
        "features": [{"name": "text", "dtype": "string"}],
        "splits": [
            {"name": "train", "num_bytes": 30, "num_examples": 2},
            {"name": "test", "num_bytes": 9, "num_examples": 1},
        ],
        "download_size": 1234567,
        "dataset_size": 39,
    }
    parts = [{"split": name, "path": f"small/{name}-*"} for name in ("train", "test")]
    readme = {"dataset_info": [info], "configs": [{"config_name": "small", "data_files": parts}]}
    files = {"README.md": f"---\n{json.dumps(readme)}\n---\n# Texts\n".encode()}
    for name, texts in (("train", ["one", "two"]), ("test", ["three"])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "part")
        files[f"small/{name}-00000-of-00001.parquet"] = (tmp_path / "part").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.daemon_threads = files, [], True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    yield server
    server.shutdown()
    server.server_close()


def session(hub, home, offline=False):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_a_download_is_told_before_it_begins_and_read_from_the_cache_after(hub, tmp_path):
    texts = "{'train': ['one', 'two'], 'test': ['three']}"
    told = "owner/texts (small): a download of 1.2 MB from the Hugging Face Hub; rows: train 2, test 1"
    cached = "owner/texts (small): nothing to download; rows: train 2, test 1"
    online = session(hub, tmp_path / "home")
    assert online[:4] == [told, f"residual_steer.data.hub: {told}", texts, cached]
    absent, unknown = online[4:]
    assert absent.startswith("SteerError: the data set 'owner/nothing' cannot be had: DatasetNotFoundError: ")
    assert unknown.startswith("SteerError: the data set 'owner/texts' (huge) cannot be had: ValueError: ")
    assert "Available: ['small']" in unknown

    asked = len(hub.asked)
    offline = session(hub, tmp_path / "home", offline=True)
    assert offline[:3] == [cached, texts, cached]  # and no line of a download
    assert all("HF_HUB_OFFLINE is set" in line for line in offline[3:4])
    assert "(huge) cannot be had" in offline[4]
    assert len(hub.asked) == asked
