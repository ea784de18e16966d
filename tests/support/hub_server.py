"""The part of the Hugging Face hub that data sets are read through, on a loopback address.

As at the hub, a file is resolved by its name and revision and then fetched elsewhere: from another
host name, which is never sent the token of the hub.
"""

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"/datasets/(?P<repository>.+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
INFORM = re.compile(r"/api/datasets/(?P<repository>.+?)(/revision/(?P<revision>.+))?")
LIST = re.compile(r"/api/datasets/(?P<repository>.+)/tree/(?P<revision>[^/]+)/(?P<folder>.+)")
FETCH = re.compile(r"/content/(?P<repository>.+)/-/(?P<path>.+)")


class Hub(ThreadingHTTPServer):
    """Data sets as {repository: {path: bytes}}, all of them at one revision.

    `faults[method, path]` is an iterator of what happens to one request after the other: None for
    nothing, or a dictionary with some of `status` and `headers` (the answer, without a body),
    `content` (sent instead), `stop` (close the connection after so many bytes), `stall` (send no
    more after so many bytes) and `ranges` (False: ignore the Range header). The method is HEAD or
    GET for the hub itself, and FETCH where the bytes come from.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.datasets = defaultdict(dict)
        self.revision = "a" * 40
        self.faults = defaultdict(lambda: iter(()))
        self.requests = []  # (method, path, Range, Authorization)
        self.resolved = set()  # revisions that files were wanted at
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def seen(self, method: str, path: str) -> list[str | None]:
        """Return the Range header of all requests of one kind for one file."""
        return [span for seen, name, span, _ in self.requests if (seen, name) == (method, path)]

    def handle_error(self, request, client_address):
        """The client may hang up: some tests kill it."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        for pattern, action in (
            (FETCH, self.fetch),
            (RESOLVE, self.resolve),
            (LIST, self.list_folder),
            (INFORM, self.inform),
        ):
            match = pattern.fullmatch(path)
            if match and match["repository"] in self.server.datasets:
                files = self.server.datasets[match["repository"]]
                return action(files, **match.groupdict())
        self.reply(404, {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fault(self, method: str, path: str) -> dict:
        span, token = self.headers.get("Range"), self.headers.get("Authorization")
        self.server.requests.append((method, path, span, token))
        return next(self.server.faults[method, path], None) or {}

    def inform(self, files, repository, revision):
        revision = revision or self.server.revision
        information = {"id": repository, "sha": revision, "siblings": [], "tags": []}
        self.reply(200, {}, json.dumps({**information, "private": False}).encode())

    def list_folder(self, files, folder, **_):
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in reversed(files.items())
            if path.startswith(f"{folder}/")
        ]
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())

    def resolve(self, files, repository, revision, path):
        self.server.resolved.add(revision)
        fault = self.fault(self.command, path)
        if "status" in fault:
            self.reply(fault["status"], fault.get("headers", {}))
        elif path not in files:
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
        else:
            elsewhere = f"http://localhost:{self.server.server_port}/content/{repository}/-/{path}"
            digest = hashlib.sha256(files[path]).hexdigest()
            headers = {
                "X-Repo-Commit": self.server.revision,
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(files[path])),
                "Location": elsewhere,
            }
            self.reply(302, headers | fault.get("headers", {}))

    def fetch(self, files, repository, path):
        fault = self.fault("FETCH", path)
        content = fault.get("content", files[path])
        headers = {}
        status, start, stop = 200, 0, len(content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and fault.get("ranges", True):
            status, start = 206, int(span[1])
            stop = min(int(span[2]) + 1, stop) if span[2] else stop
            if start >= stop:
                return self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        headers["Content-Length"] = str(stop - start)
        part = content[start:stop]
        self.reply(status, headers, part[: fault.get("stop", fault.get("stall"))])
        if "stall" in fault:
            self.wfile.flush()
            self.server.closing.wait()


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            hub.shutdown()
            thread.join()
