"""s3://, gs:// and hf:// as sources of a corpus: their real clients, against servers on this machine."""

import json
import subprocess
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from bmtk.data.downloads import BLOCK
from tests.stand_in_hub import ANN, StandInHub

READ = (
    "import sys; from bmtk.data.sources import read_texts; print(*read_texts(sys.argv[1:], sample_by='line'), sep='|')"
)
NAMES = ("corpus/a.txt", "corpus/b.txt", "corpus/notes.pdf", "other/c.txt")


class Bucket(ThreadingHTTPServer):
    """One bucket of S3: listing, HEAD, GET of ranges.  `faults`: what happens to the next GETs of an object."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.objects = {f"/bucket/{name}": f"{name}, first\nsecond\n".encode() for name in NAMES}
        self.faults, self.reads = [], []
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_EC2_METADATA_DISABLED": "true",
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.server_port}",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google by gRPC what kind a bucket is
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class BucketHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Quiet."""

    def do_HEAD(self):
        content = self.server.objects.get(urlsplit(self.path).path)
        self.send(404 if content is None else 200, content or b"")

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == "/bucket":
            return self.send(200, self.listing(parse_qs(url.query).get("prefix", [""])[0]))
        return self.send_range(url.path)

    def send_range(self, path):
        content, fault = self.server.objects[path], self.server.faults.pop(0) if self.server.faults else None
        begin, end = self.headers["Range"].removeprefix("bytes=").split("-")
        self.server.reads.append((path, int(begin)))
        if fault == "change":
            self.server.objects[path] = content.replace(b"first", b"other")
        if isinstance(fault, int):
            return self.send(fault, b"")
        return self.send(206, content[int(begin) : int(end) + 1], whole=content)

    def listing(self, prefix):
        found = "".join(
            f"<Contents><Key>{path.removeprefix('/bucket/')}</Key><Size>{len(content)}</Size>"
            f'<ETag>"{hash(content)}"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>'
            for path, content in sorted(self.server.objects.items())
            if path.startswith(f"/bucket/{prefix}")
        )
        return (
            f"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
        )

    def send(self, status, content, whole=None):
        self.send_response(status)
        self.send_header("ETag", f'"{hash(content if whole is None else whole)}"')
        self.send_header("Last-Modified", formatdate(0, usegmt=True))  # MinIO's, too, is not that of its listing
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


class GoogleHandler(BucketHandler):
    """The same bucket by Google's JSON API."""

    def do_GET(self):
        url, (_, _, name) = urlsplit(self.path), self.path.partition("/b/bucket/o")
        path = f"/bucket{unquote(urlsplit(name).path)}"
        if url.path.startswith("/download/"):
            return self.send_range(path)
        if path == "/bucket":
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            names = [one for one in sorted(self.server.objects) if one.startswith(f"/bucket/{prefix}")]
            return self.send(200, json.dumps({"items": list(map(self.facts, names))}).encode())
        is_there = path in self.server.objects
        return self.send(200 if is_there else 404, json.dumps(self.facts(path) if is_there else {}).encode())

    def facts(self, path):
        content, time = self.server.objects[path], "2026-01-01T00:00:00.000Z"
        named = {"bucket": "bucket", "name": path.removeprefix("/bucket/"), "size": str(len(content))}
        return {"kind": "storage#object", **named, "etag": str(hash(content)), "updated": time, "timeCreated": time}


@pytest.fixture(params=[("s3", BucketHandler), ("gs", GoogleHandler)], ids=["s3", "gs"])
def bucket(request, tmp_path, monkeypatch):
    scheme, handler = request.param
    if find_spec({"s3": "s3fs", "gs": "gcsfs"}[scheme]) is None:
        pytest.skip("needs the client of this store")
    server = Bucket(handler)
    server.address = f"{scheme}://bucket"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {**server.environment, "BMTK_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def read(*sources, environment=None):
    done = subprocess.run([sys.executable, "-c", READ, *sources], capture_output=True, text=True, env=environment)
    return done.stdout.strip().split("|") if done.returncode == 0 else done.stderr.splitlines()[-1]


def test_objects_of_a_bucket_are_documents(bucket):
    assert read(f"{bucket.address}/corpus/*") == ["corpus/a.txt, first", "second", "corpus/b.txt, first", "second"]
    reads = len(bucket.reads)
    assert read(f"{bucket.address}/corpus/a.txt") == ["corpus/a.txt, first", "second"]
    assert len(bucket.reads) == reads  # it was in the cache
    bucket.objects["/bucket/corpus/a.txt"] = b"new\n"
    assert read(f"{bucket.address}/corpus/a.txt") == ["new"]
    assert "matches no file that ends in" in read(f"{bucket.address}/nothing/*")
    assert f"{bucket.address}/corpus/absent.txt" in read(f"{bucket.address}/corpus/absent.txt")


def test_an_object_that_changes_while_it_is_read_is_read_anew(bucket):
    bucket.objects["/bucket/corpus/a.txt"] = b"first\n" * (2 * 5 * BLOCK // 6)  # two reads of a client
    bucket.faults = ["change"]
    assert set(read(f"{bucket.address}/corpus/a.txt")) == {"other"}


def test_files_of_a_data_set_on_the_hub_are_documents(tmp_path):
    hub = StandInHub(tmp_path)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        hub.add(
            "ann/corpus", {name: f"{name}, first\nsecond\n".encode() for name in NAMES}, kind="dataset", private=True
        )
        cache = str(tmp_path / "cache")
        environment = hub.environment(tmp_path / "home", token=ANN, BMTK_CACHE=cache)
        address = "hf://datasets/ann/corpus"
        assert read(f"{address}/corpus/*", environment=environment) == [
            "corpus/a.txt, first",
            "second",
            "corpus/b.txt, first",
            "second",
        ]
        assert read(f"{address}/other/c.txt", environment=environment) == ["other/c.txt, first", "second"]
        stranger = hub.environment(tmp_path / "home", token=None, BMTK_CACHE=str(tmp_path / "empty"))
        refused = read(f"{address}/other/c.txt", environment=stranger)
        assert f"source='{address}/other/c.txt' cannot be read: " in refused  # at once, not after some attempts
    finally:
        hub.shutdown()
        hub.server_close()
