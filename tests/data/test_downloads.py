"""Files behind URLs, from a server on this machine that fails, stalls, cuts short, and changes what it serves."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from bmtk.data import downloads
from bmtk.data.downloads import fetched, matching_urls
from bmtk.data.sources import read_texts
from bmtk.errors import UserError

BODY = "".join(f"line {number}\n" for number in range(20_000)).encode()


class Server(ThreadingHTTPServer):
    """Serves `body`; `plan` holds what happens to the next GETs: a status, "cut", "stall", "change"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.mark, self.plan, self.asked = BODY, '"1"', [], []
        self.url = f"http://127.0.0.1:{self.server_port}/a.txt"

    def handle_error(self, request, address):
        """A reader that hangs up is what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(200, self.server.body, 0)

    def answer(self, status, body, start):
        self.send_response(status)
        self.send_header("ETag", self.server.mark)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()

    def do_GET(self):
        server, headers = self.server, self.headers
        begin = headers.get("Range")
        server.asked.append(begin)
        event = server.plan.pop(0) if server.plan else None
        if isinstance(event, int):
            self.send_response(event)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        is_rest = begin is not None and headers.get("If-Range", server.mark) == server.mark
        start = int(begin.removeprefix("bytes=").rstrip("-")) if is_rest else 0
        self.answer(206 if is_rest else 200, server.body, start)
        half = (start + len(server.body)) // 2
        self.wfile.write(server.body[start : half if event else None])
        self.wfile.flush()
        if event == "stall":
            time.sleep(1.5)
        if event == "change":
            server.body, server.mark = server.body.replace(b"line", b"verse"), '"2"'
        if event:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(downloads, "STALLED", 0.5)
    monkeypatch.setenv("BMTK_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        ([], 1),
        ([503, 500, 429], 4),
        (["cut", "cut"], 3),
        (["stall"], 2),
        (["cut", 503, "stall"], 4),
    ],
    ids=["well", "failing", "cut short", "stalling", "all of these"],
)
def test_a_copy_is_whole_however_the_server_behaves(server, plan, asked):
    server.plan = list(plan)
    assert fetched(server.url).read_bytes() == BODY
    assert len(server.asked) == asked
    if "cut" in plan or "stall" in plan:  # what came is not asked for again
        assert server.asked[-1] is not None


def test_a_file_that_changes_midway_is_copied_anew(server):
    server.plan = ["change"]
    assert fetched(server.url).read_bytes() == BODY.replace(b"line", b"verse")
    assert server.asked == [None, f"bytes={len(BODY) // 2}-"]


def test_a_finished_copy_is_asked_for_no_more_until_it_changes(server):
    first = fetched(server.url)
    assert fetched(server.url) == first
    assert len(server.asked) == 1
    server.body, server.mark = b"other\n", '"2"'
    assert fetched(server.url).read_bytes() == b"other\n"
    former = read_texts(server.url).fingerprint
    server.body, server.mark = b"others\n", '"3"'
    assert read_texts(server.url).fingerprint != former


def test_a_copy_is_used_when_the_server_is_gone(server, caplog):
    path = fetched(server.url)
    url = server.url
    server.shutdown()
    server.server_close()
    assert fetched(url) == path
    assert "cannot be reached" in caplog.text
    assert path.read_bytes() == BODY


def test_an_interrupted_copy_goes_on_in_another_process(server, monkeypatch):
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.plan = ["cut", 503]
    with pytest.raises(UserError, match="cannot be read after 1 attempts: 503"):
        fetched(server.url)
    assert fetched(server.url).read_bytes() == BODY
    assert server.asked[-1] == f"bytes={len(BODY) // 2}-"


def test_what_no_attempt_changes_is_refused_at_once(server):
    server.plan = [404]
    with pytest.raises(UserError, match=r"a.txt' cannot be read: the server answers 404"):
        fetched(server.url)
    assert len(server.asked) == 1
    server.plan = [503] * 20
    with pytest.raises(UserError, match="cannot be read after 6 attempts: 503"):
        fetched(server.url)
    with pytest.raises(UserError, match=r"a.pdf' is no file that ends in .txt"):
        read_texts("http://127.0.0.1/a.pdf")


def test_a_url_is_a_source_of_documents(server):
    texts = read_texts([server.url], sample_by="line")
    assert list(texts)[:2] == ["line 0", "line 1"]
    assert texts.num_bytes == len(BODY)
    assert texts.files[0].path.endswith("/a.txt")


def test_other_file_systems_are_read_through_fsspec(tmp_path, monkeypatch):
    monkeypatch.setenv("BMTK_CACHE", str(tmp_path))
    files = fsspec.filesystem("memory")
    files.pipe({"/corpus/b.txt": b"B", "/corpus/a.txt": b"A", "/corpus/c.md": b"C"})
    try:
        assert matching_urls("memory://corpus/*", (".txt",)) == ["memory:///corpus/a.txt", "memory:///corpus/b.txt"]
        assert list(read_texts("memory://corpus/*")) == ["A", "B"]
        files.pipe("/corpus/a.txt", b"other")
        assert list(read_texts("memory://corpus/*")) == ["other", "B"]
        with pytest.raises(UserError, match=r"matches no file that ends in .txt"):
            read_texts("memory://nothing/*")
    finally:
        files.rm("/corpus", recursive=True)
