"""Folders of data: what is hidden, what is read, what is left out and counted, and which kind of folder it is."""

import json

import numpy as np
import PIL.Image
import pytest
import soundfile

from bmtk.data.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, decode_audio, decode_image
from bmtk.data.sources import read_texts
from bmtk.data.tables import one_table, read_all, read_splits
from bmtk.errors import UserError


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8), colour).save(path)


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def splits_of(folder, splits=("train", "validation", "test")):
    notes: list[str] = []
    return read_splits(str(folder), files={}, splits=splits, notes=notes), notes


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for place in ("train/red", "train/blue", "test/red", "train/.ipynb_checkpoints", "__MACOSX/train/red", ".git/x"):
        picture(tmp_path / place / "a.png")
    for name in ("._a.png", ".hidden.png"):
        write(tmp_path / "train" / "red" / name)
    write(tmp_path / "train" / "red" / "Thumbs.db")
    found, notes = splits_of(tmp_path)
    assert found["train"]["label"] == ["blue", "red"]
    assert found["test"]["label"] == ["red"]
    assert notes == [
        f"{tmp_path}: hidden files and folders are left out: ._*, .git, .hidden.png, .ipynb_checkpoints, Thumbs.db, "
        "__MACOSX"
    ]
    hidden = tmp_path / ".home" / "data"  # a folder that a user names may itself be in a hidden one
    picture(hidden / "cat" / "a.png")
    assert splits_of(hidden)[0]["train"]["label"] == ["cat"]


def test_hidden_tables_and_texts_are_no_data(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,b\n")
    write(tmp_path / ".ipynb_checkpoints" / "train.csv", "text,label\nc,d\n")
    write(tmp_path / "._train.csv", "\0")
    assert splits_of(tmp_path)[0]["train"]["text"] == ["a"]
    write(tmp_path / "texts" / "train.txt", "one")
    write(tmp_path / "texts" / ".ipynb_checkpoints" / "train.txt", "two")
    assert list(read_texts(tmp_path / "texts")) == ["one"]
    write(tmp_path / "one" / "rows.csv", "text\na\n")
    write(tmp_path / "one" / "._rows.csv", "\0")
    assert one_table(str(tmp_path / "one")) == [tmp_path / "one" / "rows.csv"]


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path):
    for number in range(4):
        picture(tmp_path / "red" / f"{number}.png")
        write(tmp_path / "blue" / f"{number}.heic")
    write(tmp_path / "blue" / "notes.txt")
    write(tmp_path / "README.md")
    found, notes = splits_of(tmp_path)
    assert len(found["train"]) == 4
    message = f"{tmp_path} is read as a folder of images; 5 files are left out: 4 .heic, 1 .txt (the first: 0.heic)"
    assert notes == [message]
    notes = []
    assert len(read_all(str(tmp_path), option="input", notes=notes)) == 4
    assert notes == [message]


def test_a_picture_among_tables_and_a_table_among_pictures_are_left_out(tmp_path):
    tables = tmp_path / "tables"
    picture(tables / "assets" / "logo.png")
    write(tables / "train.csv", "text,label\na,b\nc,d\n")
    found, notes = splits_of(tables)
    assert found["train"]["text"] == ["a", "c"]
    assert notes == [f"{tables} is read as a folder of tables; 1 file is left out: 1 .png (the first: logo.png)"]
    pictures = tmp_path / "pictures"
    for number in range(3):
        picture(pictures / ("cat" if number else "dog") / f"{number}.png")
    write(pictures / "list.csv", "name,label\n" + "a,b\n" * 50)
    found, notes = splits_of(pictures)
    assert sorted(found["train"]["label"]) == ["cat", "cat", "dog"]
    assert "1 file is left out: 1 .csv" in notes[0]
    soundfile.write(pictures / "cat" / "a.wav", np.zeros(10), 8000)
    assert "2 files are left out: 1 .wav, 1 .csv" in splits_of(pictures)[1][0]
    for number in range(2):
        soundfile.write(pictures / "cat" / f"{number}.wav", np.zeros(10), 8000)
    with pytest.raises(UserError, match="holds 3 image and as many audio files; give a folder of one kind"):
        splits_of(pictures)


def test_metadata_beside_images_are_read_and_hidden_ones_are_not(tmp_path):
    picture(tmp_path / "train" / "a.png")
    row = json.dumps({"file_name": "a.png", "label": "cat"})
    write(tmp_path / "train" / "metadata.jsonl", row)
    write(tmp_path / "train" / ".ipynb_checkpoints" / "metadata.jsonl", row)
    found, notes = splits_of(tmp_path)
    assert found["train"]["label"] == ["cat"]
    assert notes == [f"{tmp_path}: hidden files and folders are left out: .ipynb_checkpoints"]


def test_images_outside_the_folders_of_splits_are_counted(tmp_path):
    for place in ("train/cat", "extra/cat"):
        picture(tmp_path / place / "a.png")
    found, notes = splits_of(tmp_path)
    assert len(found["train"]) == 1
    assert notes == [f"{tmp_path}: 1 files lie in no folder that is named after a split, and are not read"]


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".avif", ".tiff", ".webp", ".ppm"])
def test_images_of_many_suffixes_are_read(tmp_path, suffix):
    if suffix.lower() not in IMAGE_SUFFIXES:
        pytest.skip(f"the installed Pillow reads no {suffix}")
    kind = {".jfif": "jpeg", ".jpg": "jpeg"}.get(suffix.lower(), suffix[1:])
    (tmp_path / "red").mkdir()
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "red" / f"a{suffix}", format=kind)
    value = splits_of(tmp_path)[0]["train"]["image"][0]
    assert np.abs(np.array(decode_image(value, "it").convert("RGB"))[0, 0].astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize(("suffix", "kind"), [(".aiff", {}), (".opus", {"format": "OGG", "subtype": "OPUS"})])
def test_recordings_of_many_suffixes_are_read(tmp_path, suffix, kind):
    if suffix not in AUDIO_SUFFIXES:
        pytest.skip(f"the installed libsndfile reads no {suffix}")
    wave = np.sin(np.arange(8000) * 0.2) * 0.5
    (tmp_path / "tone").mkdir()
    soundfile.write(tmp_path / "tone" / f"a{suffix}", wave, 8000, **kind)
    value = splits_of(tmp_path)[0]["train"]["audio"][0]
    assert np.abs(decode_audio(value, "it", sampling_rate=8000)).max() == pytest.approx(0.5, abs=0.1)
