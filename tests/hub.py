"""A Hugging Face Hub on loopback that serves local folders, for the tests.

It answers what `transformers` and `datasets` ask when they load a repository: its
description, the list of its files, and the files. With accounts it also takes
repositories, as `huggingface_hub` sends them: large files by Git LFS, the others in the
commit.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "0" * 40
CARD_NEEDS = {"license": str, "pipeline_tag": str, "tags": list, "model-index": list}


def large(path: str) -> bool:
    """Whether the hub keeps such a file by Git LFS."""
    return path.endswith(".safetensors")


@contextlib.contextmanager
def serve(
    models: dict[str, Path],
    datasets: dict[str, Path],
    fault=lambda n: None,
    accounts: dict[str, str] | None = None,
    store: Path | None = None,
):
    """Serve the folders under these names; gives the address for HF_ENDPOINT.

    `fault` maps the number of a request, from 0 on, to the status that it is refused
    with, or None; it may take its time, and the answer waits for it. Requests for data
    sets are numbered by themselves. `accounts` maps tokens to the owners that they may
    write for; what is sent is written to the folder `store`, and is private.
    """
    counted = {"datasets": itertools.count(), "models": itertools.count()}
    repositories = {f"models/{name}": folder for name, folder in models.items()}
    repositories |= {f"datasets/{name}": folder for name, folder in datasets.items()}

    private, objects = set(), {}

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
            if name in private and not self.may_write(name):
                return self.missing("RepoNotFound")
            file = repositories.get(name, Path("/missing")) / rest.partition("/")[2]
            if name not in repositories:
                return self.missing("RepoNotFound")
            if not file.is_file():
                return self.missing("EntryNotFound")
            data = file.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self):
            posted, path = self.body(), unquote(urlsplit(self.path).path)
            if path == "/api/validate-yaml":
                return self.validate(json.loads(posted)["content"])
            if path == "/api/repos/create":
                return self.create(json.loads(posted))
            name, what = f"models/{'/'.join(path.split('/')[3:5])}", path.split("/")[5:]
            if path.endswith(".git/info/lfs/objects/batch"):
                name, what = f"models{path.partition('.git/')[0]}", ["batch"]
            if what[:1] not in (["preupload"], ["batch"], ["commit"]):
                return self.do_GET(posted)
            if fault_of := fault(next(counted["models"])):
                return self.answer(fault_of, {"error": "out of order"})
            if name not in repositories or not self.may_write(name):
                return self.answer(403, {"error": "forbidden"})
            getattr(self, what[0])(name, posted)

        def owner(self):
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            return (accounts or {}).get(token)

        def may_write(self, name):
            return name.split("/")[1] == self.owner()

        def create(self, asked):
            if (owner := self.owner()) is None:
                return self.answer(401, {"error": "Invalid username or password."})
            name = f"{asked['organization'] or owner}/{asked['name']}"
            if name.split("/")[0] != owner:
                return self.answer(403, {"error": "You don't have the rights"})
            if f"models/{name}" in repositories:
                return self.answer(409, {"error": "You already created this repo"})
            folder = store / name
            folder.mkdir(parents=True)
            repositories[f"models/{name}"] = folder
            if asked.get("private") or asked.get("visibility") == "private":
                private.add(f"models/{name}")
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})

        def validate(self, card):
            """What the hub asks of a card's header, as far as it is documented."""
            head = yaml.safe_load(card.split("---")[1])
            errors = [
                {"message": f'"{key}" must be a {kind.__name__}'}
                for key, kind in CARD_NEEDS.items()
                if key in head and not isinstance(head[key], kind)
            ]
            errors += [
                {"message": '"model-index" results need task, dataset and metrics'}
                for model in head.get("model-index", [])
                for result in model["results"]
                if not {"task", "dataset", "metrics"} <= set(result)
                or not {"name", "type"} <= set(result["dataset"])
                or not all({"type", "value"} <= set(m) for m in result["metrics"])
            ]
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

        def preupload(self, name, posted):
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if large(file["path"]) else "regular",
                }
                for file in json.loads(posted)["files"]
            ]
            self.answer(200, {"files": modes})

        def batch(self, name, posted):
            there = f"http://{self.headers['Host']}/lfs"
            upload = [
                {**wanted, "actions": {"upload": {"href": f"{there}/{wanted['oid']}"}}}
                for wanted in json.loads(posted)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": upload})

        def do_PUT(self):
            sent, oid = self.body(), self.path.rpartition("/")[2]
            if hashlib.sha256(sent).hexdigest() != oid:
                return self.answer(422, {"error": "another content than announced"})
            objects[oid] = sent
            self.answer(200, {})

        def commit(self, name, posted):
            for line in map(json.loads, posted.splitlines()):
                kind, value = line["key"], line["value"]
                if kind == "header":
                    continue
                file = repositories[name] / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                if kind == "lfsFile":
                    file.write_bytes(objects[value["oid"]])
                else:
                    file.write_bytes(base64.b64decode(value["content"]))
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT})

        def describe(self, path, posted):
            name = next(
                (n for n in repositories if (path + "/").startswith(n + "/")), None
            )
            if name is None:
                return self.missing("RepoNotFound")
            if name in private and not self.may_write(name):
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
