"""A Hugging Face Hub on loopback that serves local folders, for the tests.

It answers what `transformers` and `datasets` ask when they load a repository: its
description, the list of its files, and the files. What `huggingface_hub` sends to make
a repository and to fill it is taken.
"""

import contextlib
import hashlib
import itertools
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40
NO_REPOSITORY, NO_FILE = (404, "RepoNotFound"), (404, "EntryNotFound")


def entry(file):
    size = file.stat().st_size
    return {"type": "file", "path": file.name, "size": size, "oid": COMMIT}


@contextlib.contextmanager
def serve(models, datasets, fault=lambda n: None, files=(), sent=None):
    """Serve the files of folders under their names; the address for HF_ENDPOINT.

    `fault` maps the number of a request, from 0 on, to the status that it is refused
    with, or None; a status may come with the hub's word for it, as (403, "GatedRepo").
    `files` refuses so the files of a repository that is described: {name: status}.
    What is posted goes to the list `sent`: token, path, and a value for each line.
    """
    counted, files = itertools.count(), dict(files)
    repositories = {f"models/{name}": folder for name, folder in models.items()}
    repositories |= {f"datasets/{name}": folder for name, folder in datasets.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, code, body, **headers):
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(code)
            for name, value in {**headers, "Content_Length": len(body)}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status):
            code, word = status if isinstance(status, tuple) else (status, "refused")
            # After no time, so that the retries of the tests do not take minutes
            self.answer(code, {"error": word}, Retry_After=0, X_Error_Code=word)

        def do_GET(self, posted=b""):
            if status := fault(next(counted)):
                return self.refuse(status)
            path = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/")
            path = path if re.match("models|datasets", path) else f"models/{path}"
            known = (n for n in repositories if f"{path}/".startswith(f"{n}/"))
            if not (name := next(known, "")):
                return self.refuse(NO_REPOSITORY)
            folder, id = repositories[name], name.split("/", 1)[1]
            what, _, rest = path.removeprefix(name).strip("/").partition("/")
            _, _, rest = rest.partition("/")  # after the revision
            if what == "resolve":
                if id in files or not (folder / rest).is_file():
                    return self.refuse(files.get(id, NO_FILE))
                data = (folder / rest).read_bytes()
                tag = hashlib.sha256(data).hexdigest()
                return self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
            entries = [entry(x) for x in sorted(folder.iterdir()) if x.is_file()]
            if what == "tree":
                return self.refuse(NO_FILE) if rest else self.answer(200, entries)
            if what == "paths-info":
                wanted = json.loads(posted)["paths"]
                return self.answer(200, [e for e in entries if e["path"] in wanted])
            names = [{"rfilename": entry["path"]} for entry in entries]
            about = {"id": id, "sha": COMMIT, "tags": [], "private": False}
            self.answer(200, {**about, "siblings": names})

        do_HEAD = do_GET

        def do_POST(self):
            posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "/paths-info/" in self.path:
                return self.do_GET(posted)
            if status := fault(next(counted)):
                return self.refuse(status)
            first, *_ = lines = [json.loads(line) for line in posted.splitlines()]
            sent.append((self.headers["Authorization"], self.path, lines))
            how = {"shouldIgnore": False, "uploadMode": "regular"}
            found = [{**file, **how} for file in first.get("files", ())]
            names = (first.get(part, "it") for part in ("organization", "name"))
            made = "/".join([f"http://{self.headers['Host']}", *names])
            commit = {"commitUrl": f"{made}/commit/{COMMIT}", "commitOid": COMMIT}
            self.answer(200, {"url": made, "files": found, **commit})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def nobody():
    with silent() as address:
        return contextlib.nullcontext(address)
