"""A Hugging Face Hub on loopback that serves local folders, for the tests.

It answers what `transformers` and `datasets` ask when they load a repository: its
description, the list of its files, and the files.
"""

import contextlib
import hashlib
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


@contextlib.contextmanager
def serve(models: dict[str, Path], datasets: dict[str, Path], fault=lambda n: None):
    """Serve the folders under these names; gives the address for HF_ENDPOINT.

    `fault` maps the number of a request, from 0 on, to the status that it is refused
    with, or None; it may take its time, and the answer waits for it. Requests for data
    sets are numbered by themselves.
    """
    counted = {"datasets": itertools.count(), "models": itertools.count()}
    repositories = {f"models/{name}": folder for name, folder in models.items()}
    repositories |= {f"datasets/{name}": folder for name, folder in datasets.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, code, body, **headers):
            if not isinstance(body, bytes):
                body, headers["Content_Type"] = (
                    json.dumps(body).encode(),
                    "application/json",
                )
            self.send_response(code)
            for name, value in {**headers, "Content_Length": len(body)}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, what):
            self.answer(404, {"error": what}, X_Error_Code=what)

        def do_GET(self, posted=b""):
            kind = "datasets" if "datasets/" in self.path else "models"
            if refused := fault(next(counted[kind])):
                # After no time, so that the retries of the tests do not take minutes
                return self.answer(refused, {"error": "out of order"}, Retry_After=0)
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/"):
                return self.describe(path.removeprefix("api/"), posted)
            kind = "" if path.startswith("datasets/") else "models/"
            name, _, rest = (kind + path).partition("/resolve/")
            file = repositories.get(name, Path("/missing")) / rest.partition("/")[2]
            if name not in repositories:
                return self.missing("RepoNotFound")
            if not file.is_file():
                return self.missing("EntryNotFound")
            data = file.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def do_POST(self):
            self.do_GET(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def describe(self, path, posted):
            name = next(
                (n for n in repositories if (path + "/").startswith(n + "/")), None
            )
            if name is None:
                return self.missing("RepoNotFound")
            folder, rest = repositories[name], path.removeprefix(name).strip("/")
            entries = {
                found.relative_to(folder).as_posix(): {
                    "type": "directory" if found.is_dir() else "file",
                    "path": found.relative_to(folder).as_posix(),
                    "size": found.stat().st_size,
                    "oid": COMMIT,
                }
                for found in sorted(folder.rglob("*"))
            }
            if rest.startswith("tree/"):
                under = folder.joinpath(*rest.split("/")[2:])
                if not under.is_dir():
                    return self.missing("EntryNotFound")
                all_below = "recursive=true" in self.path.lower()
                found = under.rglob("*") if all_below else under.iterdir()
                names = sorted(path.relative_to(folder).as_posix() for path in found)
                return self.answer(200, [entries[name] for name in names])
            if rest.startswith("paths-info/"):
                wanted = json.loads(posted)["paths"]
                return self.answer(200, [entries[n] for n in wanted if n in entries])
            files = [e for e in entries.values() if e["type"] == "file"]
            names = [{"rfilename": file["path"]} for file in files]
            repository = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": names}
            self.answer(200, {**repository, "tags": [], "private": False})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
