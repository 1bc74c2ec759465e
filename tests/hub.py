"""A Hugging Face Hub on loopback that serves local folders, for the tests.

It answers what `transformers` and `datasets` ask when they load a repository: its
description, the list of its files, and the files. With accounts it also takes
repositories, as `huggingface_hub` sends them.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "0" * 40
CARD_NEEDS = {"license": str, "pipeline_tag": str, "tags": list, "model-index": list}
NO_REPOSITORY, NO_FILE = (404, "RepoNotFound"), (404, "EntryNotFound")


@contextlib.contextmanager
def serve(models, datasets, fault=lambda n: None, accounts=None, store=None, files=()):
    """Serve folders under their names; gives the address for HF_ENDPOINT.

    `fault` maps the number of a request, from 0 on, to the status that it is refused
    with, or None; a status may come with the hub's word for it, as (403, "GatedRepo").
    `files` refuses so the files of a repository that is described: {name: status}.
    `accounts` maps tokens to the owners that they may write for; what is sent is
    written to the folder `store`, and is private.
    """
    counted = itertools.count()
    repositories = {f"models/{name}": folder for name, folder in models.items()}
    repositories |= {f"datasets/{name}": folder for name, folder in datasets.items()}
    accounts, files, private = accounts or {}, dict(files), set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, code, body, **headers):
            if not isinstance(body, bytes):
                headers["Content_Type"] = "application/json"
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

        def owner(self):
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            return accounts.get(token)

        def may_write(self, name):
            return name in repositories and name.split("/")[1] == self.owner()

        def may_read(self, name):
            return self.may_write(name) if name in private else name in repositories

        def do_GET(self, posted=b""):
            if status := fault(next(counted)):
                return self.refuse(status)
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/"):
                return self.describe(path.removeprefix("api/"), posted)
            kind = "" if path.startswith("datasets/") else "models/"
            name, _, rest = (kind + path).partition("/resolve/")
            if not self.may_read(name):
                return self.refuse(NO_REPOSITORY)
            if status := files.get(name.partition("/")[2]):
                return self.refuse(status)
            file = repositories[name] / rest.partition("/")[2]
            if not file.is_file():
                return self.refuse(NO_FILE)
            data = file.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def describe(self, path, posted):
            known = (n for n in repositories if f"{path}/".startswith(f"{n}/"))
            if not self.may_read(name := next(known, "")):
                return self.refuse(NO_REPOSITORY)
            folder, rest = repositories[name], path.removeprefix(name).strip("/")

            def entry(found):
                kind = "directory" if found.is_dir() else "file"
                path, size = found.relative_to(folder).as_posix(), found.stat().st_size
                return {"type": kind, "path": path, "size": size, "oid": COMMIT}

            if rest.startswith("tree/"):
                under = folder.joinpath(*rest.split("/")[2:])
                if not under.is_dir():
                    return self.refuse(NO_FILE)
                all_below = "recursive=true" in self.path.lower()
                found = under.rglob("*") if all_below else under.iterdir()
                return self.answer(200, [entry(path) for path in sorted(found)])
            entries = [entry(found) for found in sorted(folder.rglob("*"))]
            if rest.startswith("paths-info/"):
                wanted = json.loads(posted)["paths"]
                return self.answer(200, [e for e in entries if e["path"] in wanted])
            names = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
            repository = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": names}
            self.answer(200, {**repository, "tags": [], "private": False})

        def do_POST(self):
            posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            name, what = f"models/{'/'.join(path.split('/')[3:5])}", path.split("/")[5:]
            if path == "/api/validate-yaml":
                self.validate(
                    yaml.safe_load(json.loads(posted)["content"].split("---")[1])
                )
            elif path == "/api/repos/create":
                self.create(json.loads(posted))
            elif what[:1] not in (["preupload"], ["commit"]):
                self.do_GET(posted)
            elif status := fault(next(counted)):
                self.refuse(status)
            elif not self.may_write(name):
                self.refuse(403)
            elif what[0] == "preupload":
                how = {"shouldIgnore": False, "uploadMode": "regular"}
                found = [{**file, **how} for file in json.loads(posted)["files"]]
                self.answer(200, {"files": found})
            else:
                for line in map(json.loads, posted.splitlines()):
                    if line["key"] == "file":
                        file = repositories[name] / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
                self.answer(200, {"commitUrl": url, "commitOid": COMMIT})

        def create(self, asked):
            name = f"{asked['organization'] or self.owner()}/{asked['name']}"
            if self.owner() is None:
                return self.answer(401, {"error": "Invalid username or password."})
            if name.split("/")[0] != self.owner():
                return self.answer(403, {"error": "You don't have the rights"})
            if f"models/{name}" in repositories:
                return self.answer(409, {"error": "You already created this repo"})
            repositories[f"models/{name}"] = store / name
            (store / name).mkdir(parents=True)
            if asked.get("private") or asked.get("visibility") == "private":
                private.add(f"models/{name}")
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})

        def validate(self, head):
            """What the hub asks of a card's header, as far as it is documented."""
            wrong = [
                k for k, x in CARD_NEEDS.items() if not isinstance(head.get(k, x()), x)
            ]
            errors = [{"message": f'"{key}" must be of another type'} for key in wrong]
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
