"""JSON lines that are not held in memory: the same rows and the same faults as those of json.loads."""

import json
import logging
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bmtk.data import corpus_files, json_rows, long_lines
from bmtk.data.corpus_files import CorpusFile, documents, pieces_of
from bmtk.data.json_rows import json_lines
from bmtk.data.long_lines import LongString
from bmtk.data.sources import read_texts
from bmtk.data.text_files import BadRow, TableFormat, Unreadable, opened_text
from bmtk.data.token_store import TokenStore, build_token_store
from bmtk.data.tokenizers import train_tokenizer
from bmtk.errors import UserError

ROOT = Path(__file__).parents[2]
LETTERS = [*'ab"\\/\n\t\x00é中😀\u2028\u007f {}[]:,', "\\u0041", "\ud83d", "\\n"]


@pytest.fixture(params=[(4, 5), (5, 7), (8, 3), (30, 64)], ids=str)
def small(monkeypatch, request):
    string, part = request.param
    monkeypatch.setattr(long_lines, "LONG_STRING", string)
    monkeypatch.setattr(long_lines, "PART", part)
    monkeypatch.setattr(json_rows, "PART", part)
    return part


def random_lines(seed, count):
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices(LETTERS, k=draw.randrange(24)))

    for _ in range(count):
        row = {"text": text(), text(): draw.choice([None, 1.5, text(), [text(), 2], {"a": text()}]), "last": text()}
        yield row, json.dumps(row, ensure_ascii=draw.random() < 0.5).replace("\ud83d", "\\ud83d")


def whole(row):
    return {name: "".join(cell.pieces()) if isinstance(cell, LongString) else cell for name, cell in row.items()}


def is_unicode(value):
    return not any("\ud800" <= character <= "\udfff" for character in value)


def test_rows_are_those_of_json_loads(tmp_path, small):
    rows, lines = zip(*random_lines(small, 400), strict=True)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    num_long = 0
    for (_, row), wanted in zip(json_lines(path, TableFormat(), long_line=7), rows, strict=True):
        num_long += sum(isinstance(cell, LongString) for cell in row.values())
        for name in ("text", "last"):
            cell, value = row[name], wanted[name]
            if isinstance(cell, LongString):
                assert bool(cell.fault) != is_unicode(value)
                assert cell.fault or "".join(cell.pieces()) == value
            else:
                assert cell == value
    assert num_long > 100


def test_a_damaged_line_is_one_of_those_that_json_loads_refuses(tmp_path, small):
    draw = random.Random(small)
    lines = []
    for _, line in random_lines(small + 1, 600):
        place = draw.randrange(len(line))
        lines.append(line[:place] + draw.choice(["", '"', "\\", "x", "\t"]) + line[place + draw.randrange(2) :])
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found, normal = [], []
    for limit, faults in ((7, found), (-1, normal)):
        number = [
            place
            for place, _ in json_lines(
                path, TableFormat(), on_bad=lambda error, to=faults: to.append(error.line), long_line=limit
            )
        ]
        faults.append(number)
    assert found == normal
    assert 50 < len(normal) < 550
    with pytest.raises(BadRow, match=rf"line {normal[0]}: "):
        list(json_lines(path, TableFormat(), long_line=7))


def test_blank_and_last_lines_may_be_long(tmp_path, small):
    path = tmp_path / "a.jsonl"
    path.write_text(" " * 50 + "\n" + '{"text": "0123456789012345678901234567890123456789"}')
    assert [(place, whole(row)) for place, row in json_lines(path, TableFormat(), long_line=7)] == [
        ("line 2", {"text": "0123456789" * 4})
    ]
    path.write_text('{"text": "' + "0" * 50)
    with pytest.raises(BadRow, match="Unterminated string"):
        list(json_lines(path, TableFormat(), long_line=7))
    path.write_text('{"text": "' + "0" * 50 + '", "text": 1}')
    with pytest.raises(BadRow, match="'text' twice"):
        list(json_lines(path, TableFormat(), long_line=7))


def test_the_ids_of_a_corpus_are_the_same_and_so_is_what_is_left_out(tmp_path, small, monkeypatch):
    path, draw = tmp_path / "a.jsonl", random.Random(3)
    lines = [json.dumps({"text": "".join(draw.choices("ab .\n中", k=90))}) for _ in range(30)]
    lines[4], lines[9] = lines[4][:-1], lines[9].replace("b", "\udcff", 1)
    lines[12], lines[20] = '{"text": "%s\\ud800"}' % ("x" * 60), json.dumps({"other": "y" * 99})
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    tokenizer = train_tokenizer(["ab a.b"], kind="byte_bpe", vocab_size=260)
    stores = []
    for name, limit in (("whole", 1 << 22), ("long", 20)):
        monkeypatch.setattr(corpus_files, "LONG_LINE", limit)
        texts = read_texts(path, on_corrupt="skip")
        stores.append(build_token_store(texts, tokenizer, tmp_path / name, workers=0))
    first, second = stores
    assert first.num_documents == second.num_documents == 26
    assert [first.document(i).tolist() for i in range(26)] == [second.document(i).tolist() for i in range(26)]
    assert second.left_out == first.left_out == 4
    assert isinstance(second, TokenStore)


def test_long_cells_of_columns_come_in_pieces(tmp_path, monkeypatch, small):
    monkeypatch.setattr(corpus_files, "LONG_LINE", 30)
    texts = ["é" * 40, None, "short", "中文" * 30, b"\xff" * 40, "end"]
    columns = {
        "string": texts[:4] + texts[5:],
        "large_string": texts[:4] + texts[5:],
        "binary": [t.encode() if isinstance(t, str) else t for t in texts],
    }
    for kind, values in columns.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"text": pa.array(values, type=getattr(pa, kind)())}), path)
        file = CorpusFile(str(path), skips=kind == "binary")
        assert list(documents(file)) == [text for text in texts if isinstance(text, str)]
        assert sum(1 for _ in pieces_of(file)) > 6
    with pytest.raises(UserError, match=r"binary.parquet, row 5: the text is not Unicode .*invalid start byte"):
        list(documents(CorpusFile(str(tmp_path / "binary.parquet"))))


@pytest.mark.parametrize("ascii", [True, False])
def test_a_line_of_sixty_megabytes_needs_little_memory(tmp_path, ascii):
    path = tmp_path / "a.jsonl"
    sentence = "千里之行、始于足下。 A journey of a thousand miles "
    with path.open("w", encoding="utf-8") as file:
        file.write('{"id": 1, "text": "')
        written = json.dumps(sentence * 1000, ensure_ascii=ascii)[1:-1]
        count = 60_000_000 // len(written.encode())
        file.writelines(written for _ in range(count))
        file.write('"}\n')
    code = f"""
from bmtk.data.corpus_files import CorpusFile, pieces_of
from bmtk.training.memory import peak_memory
before = peak_memory()
print(sum(len(text) for text, _ in pieces_of(CorpusFile({str(path)!r}))))
print(peak_memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    characters, bytes_more = map(int, done.stdout.split())
    assert characters == len(sentence) * 1000 * count
    assert bytes_more < 60_000 * 1024


@pytest.mark.parametrize(
    ("content", "encoding", "warns"),
    [
        ("naïve café façade".encode(), "latin-1", True),
        ("千里之行".encode(), "gbk", True),
        ("千里之行".encode() + b"a" * 70_000, "big5", True),
        ("naïve café façade".encode(), "utf-8", False),
        ("naïve café façade".encode("latin-1"), "latin-1", False),
        ("千里之行".encode("gbk"), "gbk", False),
        (b"plain", "latin-1", False),
        ("one ï".encode(), "windows-1252", False),
        ("naïve café façade".encode("utf-16"), "utf-16", False),
    ],
)
def test_an_encoding_that_is_set_for_a_file_in_utf8_is_noticed(tmp_path, caplog, content, encoding, warns):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with suppress(Unreadable), opened_text(path, encoding) as file:  # other encodings may lack the bytes
                file.read()
    assert caplog.text.count("reads as UTF-8 without a fault") == warns
