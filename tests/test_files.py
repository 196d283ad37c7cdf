"""Writing beside and renaming: what is read under the final name is whole, whatever happens to the writer."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bmtk import files
from bmtk.files import delete_partial, replacing, replacing_folder, sha256, write_bytes, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(path, error):
    path.write_text("half")
    raise error


def test_a_file_gets_its_content_and_its_parent_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "naïve\r\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "naïve\r\n".encode()
    assert names(tmp_path / "a" / "b") == ["c.txt"]


def test_json_ends_in_a_newline_and_keeps_or_escapes_its_letters(tmp_path):
    write_json(tmp_path / "a.json", {"name": "ä"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "ä"\n}\n'
    write_json(tmp_path / "a.json", {"name": "\udc80"}, indent=1, ensure_ascii=True)
    assert (tmp_path / "a.json").read_bytes() == b'{\n "name": "\\udc80"\n}\n'


def test_while_a_file_is_written_its_former_content_is_read_and_no_pattern_finds_the_new_one(tmp_path):
    write_text(tmp_path / "run.json", "old")
    with replacing(tmp_path / "run.json") as beside:
        beside.write_text("new")
        assert (tmp_path / "run.json").read_text() == "old"
        assert beside.parent == tmp_path
        assert list(tmp_path.glob("*.json")) == [tmp_path / "run.json"]
    assert (tmp_path / "run.json").read_text() == "new"


def test_an_error_leaves_the_former_file_and_no_debris(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as beside:
        write_half(beside, KeyboardInterrupt)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.txt", {"key": object()})
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass  # the body wrote nothing
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


KILLED = """
import os, sys
room, folder, place = sys.argv[1:]
sys.path.insert(0, room)  # the module alone: importing bmtk takes seconds
import files
if place == "before the rename":
    os.replace = lambda source, target: os._exit(9)
with files.replacing(f"{folder}/a.txt") as beside:
    beside.write_text("half")
    if place == "in the body":
        os._exit(9)
"""


@pytest.mark.parametrize("place", ["in the body", "before the rename"])
def test_a_kill_leaves_the_former_file_and_the_next_writer_clears_up(tmp_path, place):
    write_text(tmp_path / "a.txt", "old")
    assert (
        subprocess.run(
            [sys.executable, "-c", KILLED, str(Path(files.__file__).parent), str(tmp_path), place]
        ).returncode
        == 9
    )
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(names(tmp_path)) == 2
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_name_afterwards(tmp_path, monkeypatch):
    events = []
    replace = os.replace

    def noted(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", noted)
    write_bytes(tmp_path / "a.bin", b"\0")
    assert events == [str(tmp_path / ".partial-a.bin.new"), "rename", str(tmp_path)]


def test_permissions_are_those_of_the_former_file_or_of_any_new_one(tmp_path):
    (tmp_path / "by_hand.txt").write_text("")
    write_text(tmp_path / "new.txt", "")
    assert (tmp_path / "new.txt").stat().st_mode == (tmp_path / "by_hand.txt").stat().st_mode
    (tmp_path / "new.txt").chmod(0o600)
    write_text(tmp_path / "new.txt", "secret")
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("elsewhere/a.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "elsewhere" / "a.txt").read_text() == "new"
    assert names(tmp_path / "elsewhere") == ["a.txt"]


def test_what_is_no_regular_file_is_written_to_and_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join(10)
    assert found == ["text"]
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "text")


def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path, monkeypatch):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "model") as folder:
            (folder / f"{content}.txt").write_text(content)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new.txt"]
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "model") as folder:
        write_half(folder / "half.txt", ZeroDivisionError)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new.txt"]


def test_what_a_kill_has_left_of_a_folder_does_not_get_into_the_next_one(tmp_path):
    (tmp_path / ".partial-model").mkdir()
    (tmp_path / ".partial-model" / "rest.txt").write_text("half")
    (tmp_path / ".partial-replaced-model").mkdir()
    (tmp_path / "model").mkdir()
    with replacing_folder(tmp_path / "model") as folder:
        (folder / "a.txt").write_text("whole")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a.txt"]


def test_unfinished_files_and_folders_are_deleted_and_nothing_else(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / ".partial-model").mkdir()
    (tmp_path / ".partial-run.json.new").write_text("{")
    (tmp_path / ".partially").write_text("mine")
    delete_partial(tmp_path)
    assert names(tmp_path) == [".partially", "keep"]


def test_a_hash_is_that_of_the_whole_content(tmp_path):
    content = bytes(range(256)) * 8193  # more than one block of 1 MiB
    (tmp_path / "a.bin").write_bytes(content)
    assert sha256(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()
