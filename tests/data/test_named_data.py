"""Data sets by name: small made-up files of the true published form, from a server on this machine."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import bmtk_cli
from bmtk.data import conversions, downloads
from bmtk.data.content_hashes import content_hash
from bmtk.data.named_data import DATA, Upstream
from bmtk.data.named_downloads import get, named
from bmtk.errors import UserError

ROOT = Path(__file__).parents[2]
SQUAD = {
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} is a place.",
                    "qas": [{"id": title, "question": "What?", "answers": [{"text": "place", "answer_start": 9}]}],
                }
            ],
        }
        for title in ("Super_Bowl_50", "Warsaw", "Normans")
    ]
}
ANNOTATION = """<annotation><size><width>640</width><height>480</height></size>
<object><name>Platelets</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>13</xmax><ymax>24</ymax></bndbox></object>
<object><name>RBC</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>
</annotation>"""


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"repository-1a2b/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(name, content)
    return buffer.getvalue()


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def converted(convert, files, folder, **places):
    paths = []
    for number, (name, content) in enumerate(files):
        path = folder / f"from{number}" / name
        path.parent.mkdir()
        path.write_bytes(content)
        paths.append(path)
    (folder / "to").mkdir()
    convert(paths, folder / "to", {split: np.array(chosen) for split, chosen in places.items()})
    return folder / "to"


def rows(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_of_texts_and_labels_become_tables(tmp_path):
    files = [("train.tsv", b'1\ta "fine" , film\n0\tdull\n'), ("dev.tsv", b"1\tgood\n"), ("test.tsv", b"0\tbad\n")]
    (tmp_path / "a").mkdir()
    out = converted(conversions.sst2, files, tmp_path / "a")
    assert (out / "train.csv").read_text() == 'sentence,label\n"a ""fine"" , film",1\ndull,0\n'
    assert (out / "test.csv").read_text() == "sentence,label\nbad,0\n"
    (tmp_path / "b").mkdir()
    files = [("TREC.train", "HUM:ind Who is José ?\n".encode("latin-1")), ("TREC.test", b"NUM:date When ?\n")]
    out = converted(conversions.trec, files, tmp_path / "b")
    assert rows(out / "train.jsonl") == [{"text": "Who is José ?", "label": "HUM", "fine_label": "HUM:ind"}]
    (tmp_path / "c").mkdir()
    conll = "@a\tO\nNew\tB-location\nYork\tI-location\n\t\nb\tO\n"
    out = converted(conversions.wnut17, [(f"{n}.conll", conll.encode()) for n in "xyz"], tmp_path / "c")
    tags = ["O", "B-location", "I-location"]
    assert rows(out / "test.jsonl") == [
        {"id": "0", "tokens": ["@a", "New", "York"], "ner_tags": tags},
        {"id": "1", "tokens": ["b"], "ner_tags": ["O"]},
    ]


def test_splits_of_our_own_are_the_rows_at_their_places(tmp_path):
    chosen = {"train": [2, 0], "validation": [1], "test": []}
    for name in "abc":
        (tmp_path / name).mkdir()
    reviews = '\ufefflabel,review\n1,"好,很好"\n0,差\n1,行\n'.encode()
    out = converted(conversions.hotel_reviews, [("a.csv", reviews)], tmp_path / "a", **chosen)
    assert (out / "train.csv").read_text(encoding="utf-8") == 'text,label\n行,1\n"好,很好",1\n'
    out = converted(
        conversions.tatoeba, [("cmn.txt", "Hi.\t嗨。\nRun.\t跑。\nWait!\t等。\n".encode())], tmp_path / "b", **chosen
    )
    assert [row["translation"]["zh"] for row in rows(out / "train.jsonl")] == ["等。", "嗨。"]
    assert rows(out / "test.jsonl") == []
    poem = {"author": "和岘", "rhythmic": "导引", "paragraphs": ["气和。", "阳生。"]}
    files = [("ci.song.0.json", json.dumps([poem])), ("ci.song.1000.json", json.dumps([poem, poem]))]
    out = converted(conversions.song_ci, [(name, text.encode()) for name, text in files], tmp_path / "c", **chosen)
    assert [row["id"] for row in rows(out / "train.jsonl")] == ["ci.song.1000-1", "ci.song.0-0"]
    assert rows(out / "validation.jsonl")[0]["text"] == "气和。\n阳生。"


def test_pairs_of_files_become_translations(tmp_path):
    files = [
        (f"{n}.gz", gzip.compress(f"{n} eins\n{n} zwei\n".encode()))
        for n in ("a.de", "a.en", "b.de", "b.en", "c.de", "c.en")
    ]
    out = converted(conversions.multi30k, files, tmp_path)
    assert rows(out / "validation.jsonl")[1] == {"translation": {"de": "b.de zwei", "en": "b.en zwei"}}


def test_questions_become_rows_and_articles_stay_in_one_split(tmp_path):
    (tmp_path / "a").mkdir()
    out = converted(conversions.squad_v1_dev, [("d.zip", zipped("dev-v1.1.json", json.dumps(SQUAD)))], tmp_path / "a")
    titles = [[row["title"] for row in rows(out / f"{split}.parquet")] for split in conversions.SPLITS]
    assert titles == [["Warsaw"], ["Super_Bowl_50"], ["Normans"]]
    assert rows(out / "train.parquet")[0]["answers"] == {"text": ["place"], "answer_start": [9]}
    (tmp_path / "b").mkdir()
    out = converted(
        conversions.cmrc2018, [("a.json", json.dumps(SQUAD).encode()), ("b.json", b'{"data": []}')], tmp_path / "b"
    )
    assert len(rows(out / "train.parquet")) == 3
    assert rows(out / "validation.parquet") == []


def test_images_keep_their_pixels_and_boxes_their_places(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    pixels = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    files = [("a.gz", idx(pixels)), ("b.gz", idx(np.array([9, 0])))] * 2
    out = converted(conversions.fashion_mnist, files, tmp_path / "a")
    found = rows(out / "test.parquet")
    assert [row["label"] for row in found] == [9, 0]
    assert np.array(Image.open(io.BytesIO(found[1]["image"]["bytes"]))).tolist() == pixels[1].tolist()
    names = {f"{split}/cat/{number:04}.jpg": b"%d" % number for split in ("train", "test") for number in range(502)}
    out = converted(conversions.cifar10_mini, [("a.tar.gz", archive({**names, "README.md": b""}))], tmp_path / "b")
    assert [len(list((out / split).rglob("*.jpg"))) for split in ("train", "test")] == [500, 100]
    assert (out / "test/cat/0099.jpg").read_bytes() == b"99"
    blood = {
        f"BCCD/ImageSets/Main/{name}.txt": f"Image_{i:05}\n".encode()
        for i, name in enumerate(["train", "val", "test"])
    }
    blood |= {f"BCCD/Annotations/Image_{i:05}.xml": ANNOTATION.encode() for i in range(3)}
    blood |= {f"BCCD/JPEGImages/Image_{i:05}.jpg": b"jpg%d" % i for i in range(3)}
    out = converted(conversions.bccd, [("a.tar.gz", archive(blood))], tmp_path / "c")
    objects = {"bbox": [[3.0, 4.0, 10.0, 20.0]], "category": [2], "category_name": ["Platelets"]}
    size = {"width": 640, "height": 480}
    assert rows(out / "validation/metadata.jsonl") == [
        {"file_name": "Image_00001.jpg", "image_id": 1, **size, "objects": objects}
    ]
    assert (out / "validation/Image_00001.jpg").read_bytes() == b"jpg1"


def test_recordings_keep_their_bytes_and_their_names_are_labels(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    files = {f"recordings/{name}.wav": name.encode() for name in ("7_ann_4", "7_ann_5", "0_bob_12")}
    out = converted(conversions.fsdd, [("a.tar.gz", archive(files))], tmp_path / "a")
    assert [(row["transcription"], row["speaker"], row["take"]) for row in rows(out / "train.parquet")] == [
        ("zero", "bob", 12),
        ("seven", "ann", 5),
    ]
    assert rows(out / "test.parquet")[0]["audio"] == {"bytes": b"7_ann_4", "path": "7_ann_4.wav"}
    files = {f"waves_yesno/{'_'.join(f'{number:08b}')}.wav": b"%d" % number for number in range(33)}
    out = converted(conversions.yesno, [("a.tar.gz", archive(files))], tmp_path / "b")
    assert rows(out / "train.parquet")[5]["transcription"] == "no no no no no yes no yes"
    assert [row["audio"]["bytes"] for row in rows(out / "test.parquet")] == [b"31", b"32"]


def test_the_content_hash_sees_rows_and_pixels_but_no_compression(tmp_path):
    table = pq.read_table(ROOT / "recipes" / "data" / "shapes" / "validation.parquet")
    first, second, third = (tmp_path / f"{name}.parquet" for name in "abc")
    pq.write_table(table, first, compression="gzip", row_group_size=7)
    found = table.to_pylist()
    for row in found:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row["image"]["bytes"])).save(buffer, "PNG", compress_level=0)
        row["image"] = {"bytes": buffer.getvalue(), "path": None}
    pq.write_table(type(table).from_pylist(found, schema=table.schema), second)
    pq.write_table(table.slice(1), third)
    assert content_hash(first) == content_hash(second) != content_hash(third)
    image = Image.open(io.BytesIO(found[3]["image"]["bytes"])).convert("RGB")
    red, green, blue = image.getpixel((5, 5))
    image.putpixel((5, 5), (red, green, blue ^ 1))
    image.save(changed := io.BytesIO(), "PNG")
    found[3]["image"]["bytes"] = changed.getvalue()
    pq.write_table(type(table).from_pylist(found, schema=table.schema), second)
    assert content_hash(first) != content_hash(second)
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert content_hash(tmp_path / "a.txt") == hashlib.sha256(b"abc").hexdigest()
    before = content_hash(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert content_hash(tmp_path) != before


# ------------------------------------------------------------------------------------------------ fetching

PUBLISHED = {"/o/r/c/train.txt": b"one\n", "/o/r/c/%E5%AE%8B.txt": b"two\n"}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        body = self.server.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("BMTK_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files = dict(PUBLISHED)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def toy(**changes):
    digests = [hashlib.sha256(body).hexdigest() for body in PUBLISHED.values()]
    sources = [
        Upstream(f"https://raw.githubusercontent.com{path}", 4, digest)
        for path, digest in zip(PUBLISHED, digests, strict=True)
    ]
    content = dict(zip(("train.txt", "test.txt"), digests, strict=True))
    ptb = named("ptb")
    data = dataclasses.replace(ptb, name="toy", sources=tuple(sources), content=content, layout="train and test.txt")
    return dataclasses.replace(data, convert=conversions.copies("train.txt", "test.txt"), **changes)


def fetch(data, tmp_path, server, **options):
    lines = []
    mirror = f"http://127.0.0.1:{server.server_port}"
    get(data, tmp_path / "data", places=tmp_path, mirror=mirror, log=lines.append, **options)
    return "\n".join(lines)


def test_a_data_set_is_fetched_checked_and_left_alone_afterwards(server, tmp_path):
    assert "the same rows as those of the results" in fetch(toy(), tmp_path, server)
    folder = tmp_path / "data" / "toy"
    assert (folder / "test.txt").read_bytes() == b"two\n"
    assert "licence: LDC99T42 (restricted)" in (folder / "README.md").read_text(encoding="utf-8")
    server.files.clear()
    assert "is there already" in fetch(toy(), tmp_path, server)
    (folder / "test.txt").write_bytes(b"other\n")
    with pytest.raises(UserError, match=r"toy is there, but test.txt holds other rows .* move it away"):
        fetch(toy(), tmp_path, server)


def test_a_wrong_hash_is_refused_by_name_and_not_kept(server, tmp_path):
    server.files["/o/r/c/train.txt"] = b"oNe\n"
    with pytest.raises(UserError, match=r"r/c/train.txt is another file than it was: it has 4 bytes and sha256 "):
        fetch(toy(), tmp_path, server)
    assert not (tmp_path / "data" / "toy").exists()
    server.files = dict(PUBLISHED)
    fetch(toy(), tmp_path, server)
    assert (tmp_path / "data" / "toy" / "train.txt").read_bytes() == b"one\n"


def test_what_is_made_of_unverified_files_is_compared_all_the_same(server, tmp_path):
    unverified = tuple(Upstream(source.url) for source in toy().sources)
    server.files["/o/r/c/train.txt"] = b"oNe\n"
    with pytest.raises(UserError, match=r"toy: train.txt holds other rows .*; nothing was written"):
        fetch(toy(sources=unverified), tmp_path, server)
    assert list((tmp_path / "data").iterdir()) == []


def test_without_a_network_the_message_says_what_to_put_where(server, tmp_path):
    server.files.clear()
    with pytest.raises(UserError, match="404") as caught:
        fetch(toy(), tmp_path, server)
    assert "put train.txt, 宋.txt into a folder DIR" in unquote(str(caught.value))
    assert "`bmtk data get toy --from DIR`" in str(caught.value)
    assert "https://raw.githubusercontent.com/o/r/c/train.txt" in str(caught.value)
    by_hand = tmp_path / "hand"
    by_hand.mkdir()
    (by_hand / "train.txt").write_bytes(b"one\n")
    with pytest.raises(UserError, match=r"宋.txt is not there; get it from https://raw"):
        fetch(toy(), tmp_path, server, given=by_hand)
    (by_hand / "宋.txt").write_bytes(b"twO\n")
    with pytest.raises(UserError, match="is another file than it was"):
        fetch(toy(), tmp_path, server, given=by_hand)
    assert (by_hand / "宋.txt").exists()  # a file of the user's is never deleted
    (by_hand / "宋.txt").write_bytes(b"two\n")
    assert "the same rows" in fetch(toy(), tmp_path, server, given=by_hand)


def test_a_kill_leaves_no_half_of_a_data_set(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from bmtk.data import named_downloads
import test_named_data as tests
folder = Path({str(tmp_path)!r})
named_downloads._differing = lambda data, folder: os.kill(os.getpid(), signal.SIGKILL)
named_downloads.get(tests.toy(), folder / "data", places=folder, given=folder, log=print)
"""
    for path, body in PUBLISHED.items():
        (tmp_path / unquote(path.rpartition("/")[2])).write_bytes(body)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".partial-toy"]
    get(toy(), tmp_path / "data", places=tmp_path, given=tmp_path, log=lambda line: None)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["toy"]


# ------------------------------------------------------------------------------------------------ the list itself


def test_the_list_has_every_data_set_that_a_config_names():
    configs = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "recipes" / "configs").rglob("*.yaml"))
    wanted = set(re.findall(r"^\w+: data/(\w+)", configs, re.MULTILINE))
    assert {data.name for data in DATA} == wanted
    assert len(wanted) == len(DATA) > 15
    for data in DATA:
        tasks = {
            path.parent.name
            for path in (ROOT / "recipes" / "configs").rglob("*.yaml")
            if f": data/{data.name}" in path.read_text(encoding="utf-8")
        }
        assert set(data.task.split(", ")) >= tasks, data.name
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in data.content.values())
        assert all(source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256) for source in data.sources)
        assert len({source.name for source in data.sources}) == len(data.sources) or data.convert is None
        assert data.has_places == (ROOT / "recipes" / "data" / "splits" / f"{data.name}.npz").is_file()


def test_the_command_lists_in_aligned_columns(tmp_path, capsys):
    for file in named("ptb").content:
        (tmp_path / "ptb").mkdir(exist_ok=True)
        (tmp_path / "ptb" / file).touch()
    (tmp_path / "trec").mkdir()
    (tmp_path / "trec" / "train.jsonl").touch()
    assert bmtk_cli.main(["data", "list", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[: len(DATA) + 1]
    place = lines[0].index("here")
    assert {line.split()[0]: line[place:] for line in lines[1:]} == {
        data.name: {"ptb": "yes", "trec": "in part"}.get(data.name, "no") for data in DATA
    }
    assert len({line.index(data.licence) for line, data in zip(lines[1:], DATA, strict=True)}) == 1
    assert bmtk_cli.main(["data", "list", "sst2"]) == 0
    printed = capsys.readouterr().out
    assert "data/sst2 holds train, validation and test.csv with sentence, label (0, 1)" in printed
    assert "94,452 bytes, sha256 c9ddb67ce3068540c5bb6562e1f34788302dd06d570e6ca0d5e61f7d5ef2bfad" in printed
    assert bmtk_cli.main(["data", "get", "sst"]) == 1
    assert "did you mean 'sst2'?" in capsys.readouterr().err
    assert bmtk_cli.main(["data", "get", "emoji_captions", "--folder", str(tmp_path)]) == 1
    assert "There is no conversion for it: put the files above into" in capsys.readouterr().err
