"""A small hub on loopback: listings, HEAD and GET of files, etags, redirects, ranges, tokens, and faults on demand."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants

from wan_mlx.hub import download

COMMIT = "c0ffee" * 6 + "beef"
LARGE = (".safetensors", ".pth", ".gguf", ".model", ".mp4")  # kept in LFS: etag is the SHA-256, GET is redirected


class Hub(ThreadingHTTPServer):
    """Serves ``repos``: repository → path → bytes.

    Attributes:
        requests: (method, path, headers) of each request so far.
        cuts: path → how many bytes a GET of it sends before the connection ends, one entry for each GET.
        damage: path → bytes sent instead of the file's.
        etags: path → etag sent instead of the file's.
        sizes: path → size told on HEAD instead of the file's.
        private: repository → token that may read it; gated: repositories whose files are gated.
        failures: statuses to answer the next requests of a file with.
        ignore_range: send the whole file when a part is asked for.
        pace: seconds for each 64 KiB of a file.
    """

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests = repos, []
        self.cuts, self.damage, self.sizes, self.private, self.failures = {}, {}, {}, {}, []
        self.etags = {}
        self.pace = 0.0
        self.gated, self.forbidden, self.lost, self.ignore_range = set(), set(), set(), False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.cdn = f"http://localhost:{self.server_address[1]}/cdn"  # another host, as the real one has
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def got(self) -> Counter:
        """How often each file's bytes were asked for."""
        paths = [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.requests
                 if method == "GET" and "/resolve/" in path]  # fmt: skip
        return Counter(paths)

    def ranges(self, path) -> list:
        return [
            h.get("range") for m, p, h in self.requests if m == "GET" and p.startswith("/cdn/") and p.endswith(path)
        ]


@contextmanager
def serving(repos, monkeypatch, tmp_path):
    """A `Hub` that huggingface_hub takes for its own, with an empty cache in ``tmp_path``."""
    hub = Hub(repos)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(download, "WAITS", (0,))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()
    huggingface_hub.close_session()


def etag_of(path, data):
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.listing(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self.file(match[2], hub.repos[match[1]][match[2]])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def allowed(self, repo) -> bool:
        hub = self.server
        if self.headers.get("Authorization") == "Bearer hf_expired":
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo not in hub.repos:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif repo in hub.private and self.headers.get("Authorization") != f"Bearer {hub.private[repo]}":
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif repo in hub.forbidden:
            self.answer(403, {"X-Error-Message": "no"})
        else:
            return True
        return False

    def listing(self, repo, revision):
        if not self.allowed(repo):
            return
        if revision not in ("main", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path, data in self.server.repos[repo].items():
            entry = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if path.endswith(LARGE):
                entry["lfs"] = {"sha256": etag_of(path, data), "size": len(data), "pointerSize": 130}
            else:
                entry["blobId"] = etag_of(path, data)
            siblings.append(entry)
        self.answer(200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def resolve(self, repo, revision, path):
        hub = self.server
        if not self.allowed(repo):
            return
        if hub.failures:
            return self.answer(hub.failures.pop())
        if repo in hub.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if path in hub.lost or path not in hub.repos[repo]:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        data = hub.repos[repo][path]
        etag = hub.etags.get(path, etag_of(path, data))
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if path.endswith(LARGE):
            headers |= {"ETag": '"of the pointer"', "X-Linked-Etag": f'"{etag}"'}
            headers |= {
                "X-Linked-Size": str(hub.sizes.get(path, len(data))),
                "Location": f"{hub.cdn}/{repo}/{path}",
            }
            self.answer(302, headers)
        else:
            self.file(path, data, headers)

    def file(self, path, data, headers=()):
        hub = self.server
        data, status = hub.damage.get(path, data), 200
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and not hub.ignore_range:
            status, start = 206, int(match[1])
            headers = {**dict(headers), "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data = data[start:]
        cuts = hub.cuts.get(path) if self.command == "GET" else None
        self.answer(status, headers, data, cuts.pop(0) if cuts else None)

    def answer(self, status, headers=(), data=b"", cut=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for at in range(0, len(data[:cut]) if self.command == "GET" else 0, 1 << 16):
            self.wfile.write(data[:cut][at : at + (1 << 16)])
            time.sleep(self.server.pace)
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args):
        pass
