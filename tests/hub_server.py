"""A local hub: serves files of a dict over HTTP to `huggingface_hub` (data sets) and transformers (models)."""

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
