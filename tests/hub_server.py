"""A local hub: serves files of a dict over HTTP to `huggingface_hub` (data sets) and transformers (models), and takes commits of models."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

Repositories = dict[tuple[str, str], dict[str, bytes]]
"""(name, revision) -> path -> content; a data set, or a model whose branch main is at that revision."""


class Hub:
    """A running hub.

    Attributes:
        url: for HF_ENDPOINT.
        asked: paths of the files that were requested, in that order.
        held: paths that are not sent until `release` is set.
    """

    def __init__(self, url: str, held: set[str]) -> None:
        self.url, self.held, self.asked, self.release = url, held, list[str](), threading.Event()


@contextmanager
def local_hub(repositories: Repositories, held: set[str] = frozenset()) -> Iterator[Hub]:
    """Serves repositories until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(with_body=False)

        def do_GET(self, with_body: bool = True) -> None:
            path = urlparse(self.path).path
            for (name, revision), files in repositories.items():
                if path == f"/api/datasets/{name}/tree/{revision}":
                    tree = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
                    return self.send(json.dumps(tree).encode(), "application/json", revision, with_body)
                for prefix in (f"/datasets/{name}/resolve/{revision}/", f"/{name}/resolve/main/", f"/{name}/resolve/{revision}/"):
                    file = path.removeprefix(prefix)
                    if not path.startswith(prefix) or file not in files:
                        continue
                    if with_body:
                        hub.asked.append(file)
                        if file in hub.held:
                            hub.release.wait(60)
                    return self.send(files[file], "application/octet-stream", revision, with_body)
            known = any(f"/{name}/" in path for name, _ in repositories)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def do_POST(self) -> None:
            """Takes what `create_repo` and `upload_folder` send: all files as base64 in one commit."""
            path, body = urlparse(self.path).path, self.body()
            answer: dict[str, object] = {"errors": [], "warnings": []}  # of /api/validate-yaml
            if path == "/api/repos/create":
                asked = json.loads(body)
                answer = {"url": f"{hub.url}/{asked['organization']}/{asked['name']}"}
            elif path.endswith("/preupload/main"):
                answer = {
                    "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                }
            elif path.endswith("/commit/main"):
                name, revision = path.removeprefix("/api/models/").removesuffix("/commit/main"), hashlib.sha1(body).hexdigest()
                sent = [json.loads(line) for line in body.splitlines()]
                files = {part["value"]["path"]: base64.b64decode(part["value"]["content"]) for part in sent if part["key"] == "file"}
                repositories[name, revision] = files
                answer = {"success": True, "commitUrl": f"{hub.url}/{name}/commit/{revision}", "commitOid": revision, "hookOutput": ""}
            self.send(json.dumps(answer).encode(), "application/json", "main", with_body=True)

        def body(self) -> bytes:
            """Reads what was sent, in one piece or in chunks."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def send(self, content: bytes, kind: str, revision: str, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", revision)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", set(held))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
