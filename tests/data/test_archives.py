"""Tar archives as WebDataset writes them: rows, order, and that nothing is unpacked or held."""

import gzip
import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
import soundfile

from bmtk.data import row_batches
from bmtk.data.fingerprints import row_marks
from bmtk.data.media import decode_audio, decode_image
from bmtk.data.tables import read_splits, read_table
from bmtk.errors import UserError


def png(number):
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 5, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path, numbers):
    files = {}
    for number in numbers:
        files |= {f"./a/{number:03}.png": png(number), f"./a/{number:03}.cls": f"{number % 3}\n".encode()}
    return write_tar(path, files)


def test_rows_of_all_shards_come_in_order_with_their_pixels(tmp_path):
    shards = [shard(tmp_path / "train-000.tar", [5, 3, 9]), shard(tmp_path / "train-001.tar", [1, 200])]
    rows = read_table(shards)
    assert rows["label"][:] == ["2", "0", "0", "1", "2"]
    assert [decode_image(value, "row").getpixel((4, 3))[0] for value in rows["image"]] == [5, 3, 9, 1, 200]
    assert all(value["bytes"] is None for value in rows["image"])  # a row holds the place, not the image
    assert decode_image(rows["image"][4], "row").size == (5, 4)


def test_a_folder_of_shards_has_splits_by_their_names(tmp_path):
    shard(tmp_path / "data" / "train-000.tar", [1, 2])
    shard(tmp_path / "data" / "val-000.tar", [3])
    found = read_splits(str(tmp_path / "data"), files={})
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "validation": 1}
    alone = read_splits(str(tmp_path / "data" / "train-000.tar"), files={})
    assert alone["train"]["image"][:] == found["train"]["image"][:]


def test_a_row_is_known_by_its_content_wherever_it_is(tmp_path):
    one = read_table([shard(tmp_path / "a.tar", [7, 8])]).select_columns(["image"])
    other = read_table([shard(tmp_path / "b.tar", [9, 7])]).select_columns(["image"])
    assert row_marks(one)[0] == row_marks(other)[1]
    assert len({*row_marks(one), *row_marks(other)}) == 3


def test_json_and_texts_are_columns_and_recordings_are_read(tmp_path):
    sound = io.BytesIO()
    soundfile.write(sound, np.linspace(-0.5, 0.5, 80), 8000, format="WAV")
    files = {
        "x.wav": sound.getvalue(),
        "x.json": json.dumps({"speaker": "ann", "age": 3}).encode(),
        "x.txt": b"some words\n",
        "x.seg.npy": b"left out",
        "y.wav": sound.getvalue(),
        ".hidden.wav": b"",
    }
    rows = read_table([write_tar(tmp_path / "train.tar", files)])
    assert rows.remove_columns("audio").to_list() == [
        {"speaker": "ann", "age": 3, "text": "some words"},
        {"speaker": None, "age": None, "text": None},
    ]
    assert decode_audio(rows["audio"][1], "row", sampling_rate=8000).shape == (80,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"1", "a.jpg": b"2"}, r"train\.tar: row a has image twice; leave one of them out"),
        ({"a.json": b"[1]"}, r"train\.tar: a\.json cannot be read: it holds no object"),
        ({"a.json": b"{"}, r"train\.tar: a\.json cannot be read: Expecting"),
        ({"a.cls": b"\xff"}, r"train\.tar: a\.cls cannot be read"),
        ({"readme": b"1"}, r"train\.tar has no rows: no image, recording"),
    ],
)
def test_what_is_no_row_is_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        read_table([write_tar(tmp_path / "train.tar", files)])


def test_files_that_are_no_archive_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match=r"a\.tar is not a tar archive that can be read"):
        read_table([tmp_path / "a.tar"])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"1"))
    with pytest.raises(UserError, match=r"b\.tar\.gz is compressed as a whole, .* unpack it to \.tar"):
        read_table([tmp_path / "b.tar.gz"])


def test_an_image_that_is_broken_is_named_by_its_place(tmp_path):
    rows = read_table([write_tar(tmp_path / "a.tar", {"x.png": b"nothing"})])
    with pytest.raises(UserError, match=r"row 1 is not an image that can be read: .*a\.tar!512\+7!x\.png"):
        decode_image(rows["image"][0], "row 1")


@pytest.mark.parametrize("row", [0, 1, 2])
def test_an_archive_that_is_cut_off_names_the_last_file(tmp_path, row):
    whole = shard(tmp_path / "train.tar", [1, 2, 3]).read_bytes()
    with tarfile.open(tmp_path / "train.tar") as archive:
        members = archive.getmembers()
    inside = members[2 * row].offset_data + 20  # of an image
    behind = members[2 * row + 1].offset_data + 512  # of the row: nothing is cut but other rows, or the end
    for place, name in ((inside, f"{row + 1:03}.png"), (behind, f"{row + 1:03}.cls")):
        (tmp_path / "cut.tar").write_bytes(whole[:place])
        with pytest.raises(UserError, match=rf"cut\.tar is damaged or cut off at or after a/{name} .*copy or pack"):
            read_table([tmp_path / "cut.tar"])


def test_a_header_that_is_damaged_is_not_the_end(tmp_path):
    path = shard(tmp_path / "train.tar", [1, 2, 3])
    with tarfile.open(path) as archive:
        place = archive.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[place + 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.tar is damaged or cut off at or after a/001\.cls"):
        read_table([path])


def test_the_rows_of_many_files_are_kept_in_a_file_and_the_same(tmp_path, monkeypatch):
    shards = [shard(tmp_path / f"{number}.tar", [number, number + 7]) for number in range(3)]
    small = read_table(shards)
    monkeypatch.setattr(row_batches, "SMALL", 0)
    large = read_table(shards)
    assert large.cache_files
    assert large.to_list() == small.to_list() == read_table(shards).to_list()
    shard(shards[1], [50, 60, 70])
    assert len(read_table(shards)) == 7
