"""A local stand-in for Google Cloud Storage: the part of its JSON API that gcsfs uses.

`epath.Path("gs://bucket/...")` reaches it where `STORAGE_EMULATOR_HOST` is set, in this process and
its children. Objects are kept in memory. `refuse` makes requests fail as the real service does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec.config
import pytest
from etils.epath import backend

from trainer.workdir.paths import keep_no_listings

BUCKET = "bucket"
ANONYMOUS = {"token": "anon"}  # do not look for credentials
# gcsfs reads this on import; else it asks for the type of bucket over gRPC with TLS.
NO_GRPC = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
os.environ.update(NO_GRPC)


class ObjectStore:
    """Buckets of named bytes behind HTTP, on a free port of 127.0.0.1.

    Attributes:
        objects: the bytes by `bucket/name`; tests may read and change them.
        refuse: asked before each request, with its method and `bucket/name` (or the prefix of a
            listing); an HTTP status it returns is the answer.
        requests: method and `bucket/name` of every request.
        environ: what a process needs in its environment to reach this store.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets = set(buckets)
        self.objects: dict[str, bytes] = {}
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._changed: dict[str, float] = {}
        self._uploads: dict[str, tuple[str, bytearray]] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environ = {
            "STORAGE_EMULATOR_HOST": self.url,
            "FSSPEC_GCS": json.dumps(ANONYMOUS),
            **NO_GRPC,
        }
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Is gone: connections are refused, and those that are open break at the next request."""
        self._server.store = None
        self._server.shutdown()
        self._server.server_close()

    def names(self, prefix: str) -> list[str]:
        """The objects below `gs://PREFIX/`, without the prefix."""
        start = prefix.removeprefix("gs://").rstrip("/") + "/"
        with self._lock:
            return sorted(key[len(start) :] for key in self.objects if key.startswith(start))

    def put(self, key: str, content: bytes) -> dict[str, Any]:
        """Stores an object whole and returns its description."""
        with self._lock:
            self.objects[key] = content
            self._changed[key] = time.time()
        return self.describe(key)

    def describe(self, key: str) -> dict[str, Any]:
        """The description of an object, as the JSON API gives it."""
        content, changed = self.objects[key], self._changed.get(key, 0.0)
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(changed)) + ".000Z"
        bucket, name = key.split("/", 1)
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(int(changed * 1e6)),
            "timeCreated": when,
            "updated": when,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        }

    def listing(self, bucket: str, prefix: str, delimiter: str, start: str, count: int) -> Any:
        """One page of the objects and "folders" that begin with a prefix."""
        with self._lock:
            names = sorted(key.split("/", 1)[1] for key in self.objects if _in(bucket, key))
        found: dict[str, bool] = {}  # name: whether it stands for what is below it
        for name in names:
            if name.startswith(prefix):
                head, cut, _ = name[len(prefix) :].partition(delimiter or "\0")
                found[prefix + head + cut if cut else name] = bool(cut)
        page = [name for name in found if name > start][:count]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["prefixes"] = [name for name in page if found[name]]
        answer["items"] = [self.describe(f"{bucket}/{n}") for n in page if not found[n]]
        if page and page[-1] != list(found)[-1]:
            answer["nextPageToken"] = page[-1]
        return answer

    def begin_upload(self, key: str) -> str:
        """Begins an upload in several requests; returns its id."""
        with self._lock:
            number = str(len(self._uploads) + 1)
            self._uploads[number] = (key, bytearray())
        return number

    def name_of_upload(self, number: str) -> str:
        """The `bucket/name` that an upload is for."""
        return self._uploads[number][0]

    def add_to_upload(self, number: str, content: bytes, is_last: bool) -> Any:
        """Adds to an upload. Returns the object's description, or how many bytes there are."""
        key, parts = self._uploads[number]
        parts += content
        return self.put(key, bytes(parts)) if is_last else len(parts)


def _in(bucket: str, key: str) -> bool:
    return key.startswith(bucket + "/")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    store: ObjectStore | None

    def handle_error(self, *request: Any) -> None:
        """Tells, unless the peer is gone: gcsfs asks in two ways and drops the slower answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)


class _Handler(BaseHTTPRequestHandler):
    """One connection. Names are quoted whole, slashes too, so paths split at slashes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def store(self) -> ObjectStore:
        if self.server.store is None:
            raise ConnectionResetError("the store is closed")
        return self.server.store

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in re.sub("^.*?/b(?=/)", "", url.path).split("/")][1:]
        bucket, name = parts[0], parts[2] if len(parts) > 2 else ""
        key = f"{bucket}/{name or query.get('name') or query.get('prefix', '')}"
        if "upload_id" in query:
            key = self.store.name_of_upload(query["upload_id"])
        self.store.requests.append((self.command, key))
        refused = self.store.refuse(self.command, key)
        if refused:
            self._send_error(refused, "refused for a test")
        elif bucket not in self.store.buckets:
            self._send_error(404, "no such bucket")
        elif "/upload/" in url.path:
            self._upload(bucket, query, body)
        elif len(parts) == 1:
            self._send(200, {"kind": "storage#bucket", "name": bucket})
        elif not name:
            page = query.get("prefix", ""), query.get("delimiter", ""), query.get("pageToken", "")
            self._send(200, self.store.listing(bucket, *page, int(query.get("maxResults", 1000))))
        elif key not in self.store.objects:
            self._send_error(404, "no such object")
        elif len(parts) > 3:
            self._transfer(key, parts[3:])
        elif self.command == "DELETE":
            del self.store.objects[key]
            self._send(204)
        elif query.get("alt") == "media":
            self._send_content(self.store.objects[key])
        else:
            self._send(200, self.store.describe(key))

    do_POST = do_PUT = do_DELETE = do_GET

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "multipart":  # a description, then the bytes
            mark = re.search("""boundary=["']?([^"']+)""", self.headers["Content-Type"])
            assert mark
            described, content = re.split(rb"\r?\n--" + re.escape(mark[1].encode()), body)[:2]
            name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            self._send(200, self.store.put(f"{bucket}/{name}", content))
        elif query["uploadType"] == "media":
            self._send(200, self.store.put(f"{bucket}/{query['name']}", body))
        elif "upload_id" not in query:
            number = self.store.begin_upload(f"{bucket}/{query['name']}")
            place = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            self._send(200, {}, {"Location": f"{place}&upload_id={number}"})
        else:
            is_last = not self.headers["Content-Range"].endswith("/*")
            added = self.store.add_to_upload(query["upload_id"], body, is_last)
            if is_last:
                self._send(200, added)
            else:
                self._send(308, None, {"Range": f"bytes=0-{added - 1}"})

    def _transfer(self, key: str, to: list[str]) -> None:
        bucket = key.split("/", 1)[0]
        content = self.store.objects[key]
        if to[0] == "moveTo":  # .../moveTo/o/NAME
            put = self.store.put(f"{bucket}/{to[2]}", content)
            del self.store.objects[key]
            self._send(200, put)
        else:  # .../rewriteTo/b/BUCKET/o/NAME
            put = self.store.put(f"{to[2]}/{to[4]}", content)
            self._send(200, {"kind": "storage#rewriteResponse", "done": True, "resource": put})

    def _send_content(self, content: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self._send(200, content)
        elif int(span[1]) >= len(content):
            self._send_error(416, "beyond the end")
        else:
            end = min(int(span[2] or len(content)), len(content) - 1)
            where = f"bytes {span[1]}-{end}/{len(content)}"
            self._send(206, content[int(span[1]) : end + 1], {"Content-Range": where})

    def _send_error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"code": status, "message": message}})

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        is_bytes = isinstance(body, bytes)
        content = body if is_bytes else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_bytes else "text/json")
        self.send_header("Content-Length", str(len(content)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty store with one bucket, `gs://bucket`, for this process and for those it starts."""
    pytest.importorskip("gcsfs")
    store = ObjectStore(BUCKET)
    for name, value in store.environ.items():
        monkeypatch.setenv(name, value)
    keep_no_listings()
    _forget_file_systems()
    with pytest.MonkeyPatch.context() as patch:  # the environment was read at the import
        patch.setitem(fsspec.config.conf, "gcs", {**fsspec.config.conf.get("gcs", {}), **ANONYMOUS})
        yield store
    _forget_file_systems()
    store.close()


def _forget_file_systems() -> None:
    """Both fsspec and epath keep a file system for the whole process."""
    import gcsfs

    gcsfs.core.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
