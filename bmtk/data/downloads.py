"""Files behind URLs, copied to a cache: interrupted copies go on where they stopped, changed files are copied anew.

http and https are read with the standard library, because the resume of a copy must be refused by the server when the
file has changed (If-Range), which fsspec does not ask for; s3, gs, hf and others go through fsspec.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from bmtk.errors import UserError
from bmtk.files import PARTIAL, flush, read_json, write_json

from .text_files import suffix_of

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
ATTEMPTS = 6  # in a row that bring nothing
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts; doubled each time
STALLED = 30.0  # seconds without a byte
BLOCK = 1 << 20
FINAL = (400, 401, 403, 404, 405, 410, 451)  # answers that another attempt does not change
logger = logging.getLogger(__name__)


class _Changed(Exception):
    """The file is another one than that whose beginning was copied."""


def is_url(source: str) -> bool:
    return URL.match(source) is not None


def matching_urls(url: str, suffixes: Sequence[str]) -> list[str]:
    """The URL itself, or those that its pattern (`*`, `?`) matches; for http there is no listing to match.

    Raises: UserError for a file of another kind, or a pattern without a match.
    """
    scheme = urlsplit(url).scheme.lower()
    if scheme not in ("http", "https") and "*" in url:
        import fsspec  # slow to import, and only needed here

        system, path = fsspec.core.url_to_fs(url)
        names = [name for name in sorted(system.glob(path)) if suffix_of(Path(name)) in suffixes]
        if not names:
            raise UserError(f"source={url!r} matches no file that ends in {', '.join(suffixes)}")
        return [system.unstrip_protocol(name) for name in names]
    if suffix_of(Path(file_name(url))) not in suffixes:
        raise UserError(f"source={url!r} is no file that ends in {', '.join(suffixes)} (a query may follow)")
    return [url]


def file_name(url: str) -> str:
    return unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]


def cache_folder() -> Path:
    """$BMTK_CACHE, else ~/.cache/bmtk."""
    return Path(os.environ.get("BMTK_CACHE") or "~/.cache/bmtk").expanduser() / "downloads"


def fetched(url: str, folder: Path | None = None) -> Path:
    """The local copy of a URL, made or brought up to date; an old one is used where the server cannot be reached.

    Raises: UserError after ATTEMPTS that brought nothing, or for an answer that none would change.
    """
    folder = (folder or cache_folder()) / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(url)
    with FileLock(folder / ".lock"):  # two runs may read the same URL
        copy = _Copy(url, path)
        if path.exists() and copy.is_current():
            return path
        _with_retries(copy.step, url)
        copy.finish()
    return path


def _with_retries(step: Callable[[], int | None], url: str) -> None:
    """Call `step` until it returns None; a number is of bytes that came before the connection was lost."""
    failed = 0
    while True:
        try:
            if (brought := step()) is None:
                return
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code in FINAL:
                raise UserError(
                    f"source={url!r} cannot be read: the server answers {error.code} {error.reason}"
                ) from error
            brought, problem = 0, f"{error.code} {error.reason}"
        except _Changed:
            brought, problem = 0, "the file has changed meanwhile; copying it anew"
        except (FileNotFoundError, PermissionError) as error:  # of fsspec: what 401, 403 and 404 are for http
            raise UserError(f"source={url!r} cannot be read: {str(error) or type(error).__name__}") from error
        except (OSError, http.client.HTTPException) as error:
            brought, problem = 0, str(error) or type(error).__name__
        failed = 0 if brought else failed + 1
        if failed == ATTEMPTS:
            raise UserError(f"source={url!r} cannot be read after {ATTEMPTS} attempts: {problem}")
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, failed - 1))
        logger.warning("%s: %s; trying again in %.0f s", url, problem, pause)
        time.sleep(pause)


class _Copy:
    """A file that is being copied: `path`, with its identity on the server beside it."""

    def __init__(self, url: str, path: Path):
        self.url, self.path = url, path
        self.partial = path.with_name(f"{PARTIAL}{path.name}")
        self.facts = path.with_name(f".{path.name}.json")  # of the finished copy
        self.partial_facts = path.with_name(f"{PARTIAL}{path.name}.json")
        self.is_http = urlsplit(url).scheme.lower() in ("http", "https")

    def is_current(self) -> bool:
        """Whether the copy that is there is what the server has; also True if the server does not answer."""
        known = read_json(self.facts)
        if not isinstance(known, dict) or known.get("size") != self.path.stat().st_size:
            return False
        try:
            found = self._facts()
        except (OSError, http.client.HTTPException) as error:  # HTTPError is an OSError
            logger.warning("%s cannot be reached (%s); using the copy in %s", self.url, error, self.path)
            return True
        return bool(found["mark"] == known.get("mark") and found["size"] in (None, known.get("size")))

    def step(self) -> int | None:
        """Copy as much as comes; None if the copy is whole, else the number of bytes that came."""
        return self._http_step() if self.is_http else self._fsspec_step()

    def finish(self) -> None:
        facts = read_json(self.partial_facts)
        mark = facts.get("mark") if isinstance(facts, dict) else None
        flush(self.partial)
        os.replace(self.partial, self.path)
        write_json(self.facts, {"url": self.url, "mark": mark, "size": self.path.stat().st_size})
        self.partial_facts.unlink(missing_ok=True)

    def _facts(self) -> dict[str, Any]:
        if self.is_http:
            request = urllib.request.Request(self.url, method="HEAD", headers={"Accept-Encoding": "identity"})
            with urllib.request.urlopen(request, timeout=STALLED) as answer:
                length = answer.headers.get("Content-Length")
                return {"mark": _mark(answer.headers), "size": int(length) if length else None}
        import fsspec

        system, path = fsspec.core.url_to_fs(self.url)
        info = system.info(path)
        # An ETag alone where there is one: times of a listing may be finer than those of a single file.
        tags = {key: info[key] for key in ("ETag", "etag") if info.get(key)}
        times = {key: str(info[key]) for key in ("mtime", "LastModified", "created") if key in info}
        return {"mark": json.dumps(tags or times, sort_keys=True), "size": info.get("size")}

    def _start_over(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.partial_facts.unlink(missing_ok=True)

    def _http_step(self) -> int | None:
        known = read_json(self.partial_facts)
        mark = known.get("mark") if isinstance(known, dict) else None
        done = self.partial.stat().st_size if self.partial.exists() and mark else 0
        headers = {"Accept-Encoding": "identity"}  # else the bytes would be those of a compressed answer
        if done:
            headers |= {"Range": f"bytes={done}-", "If-Range": _strong(str(mark))}
        try:
            answer = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=STALLED)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            self._start_over()  # the file is shorter than what was copied
            raise _Changed from error
        with answer:
            if answer.status != 206:  # the whole file: it has changed, or the server knows no ranges
                done = 0
                write_json(self.partial_facts, {"mark": _mark(answer.headers)})
            total = _total(answer.headers, done)
            came, is_cut = self._append(answer.read1, done)
        if is_cut or (total is not None and done + came < total):
            return came
        self._check_unchanged(_mark(answer.headers))
        return None

    def _check_unchanged(self, mark: str) -> None:
        """Raise _Changed if the file was replaced while it was copied: its beginning is another file's."""
        try:
            found = self._facts()["mark"]
        except urllib.error.HTTPError:  # a server may not answer HEAD
            return
        if found != mark:
            self._start_over()
            raise _Changed

    def _append(self, read: Callable[[int], bytes], done: int) -> tuple[int, bool]:
        """Write what `read` gives after the first `done` bytes: how many bytes, and whether it broke off."""
        came = 0
        with self.partial.open("r+b" if done else "wb") as file:
            file.truncate(done)
            file.seek(done)
            try:
                while block := read(BLOCK):
                    file.write(block)
                    came += len(block)
            except (OSError, http.client.HTTPException) as error:
                if not came:
                    raise
                logger.info("%s: %s", self.url, error)
                return came, True
        return came, False

    def _fsspec_step(self) -> int | None:
        import fsspec

        facts = self._facts()
        if read_json(self.partial_facts) != facts:
            self._start_over()
            write_json(self.partial_facts, facts)
        system, path = fsspec.core.url_to_fs(self.url)
        done = self.partial.stat().st_size if self.partial.exists() else 0
        with system.open(path, "rb") as file:
            file.seek(done)
            came, is_cut = self._append(file.read, done)
        if self._facts() != facts:
            self._start_over()
            raise _Changed
        return came if is_cut or (facts["size"] is not None and done + came < facts["size"]) else None


def _mark(headers: Any) -> str:
    """What changes when the file does; "" where a server does not say."""
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _strong(mark: str) -> str:
    return mark.removeprefix("W/")


def _total(headers: Any, done: int) -> int | None:
    length = headers.get("Content-Length")
    return done + int(length) if length else None
