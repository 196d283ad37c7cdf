"""A store of several shards: the same tokens however it is divided, by whomever it is written, and after any kill."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bmtk.data import shard_plan, text_cuts, token_store, workers
from bmtk.data.corpus_files import CorpusFile, pieces_of
from bmtk.data.encoders import Encoder, WrongIds
from bmtk.data.packing import PackedRows
from bmtk.data.shard_plan import plan_shards
from bmtk.data.shards import ShardJob
from bmtk.data.sources import read_texts
from bmtk.data.store_report import report, stores_in
from bmtk.data.text_cuts import cut_pieces, pieces
from bmtk.data.token_store import TokenStore, build_token_store
from bmtk.data.tokenizers import WORDS, train_tokenizer
from bmtk.errors import UserError

VERSE = "To be, or not to be:\nthat is the question; whether 'tis nobler\n in the mind\n\nto suffer. 我们\uff0c去。\n"
TOKENIZER = train_tokenizer([VERSE], kind="byte_bpe", vocab_size=300)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards, pieces and batches of a few characters; no engine with threads, which a fork would not have."""
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 400)
    monkeypatch.setattr(token_store, "SMALL_BYTES", 0)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 150)
    monkeypatch.setattr(token_store.tokenizers, "PIECE_CHARACTERS", 20)
    monkeypatch.setitem(sys.modules, "fastokens", None)


def write_corpus(folder, *, size=4):
    """A text that is divided, lines that are divided, and small files that share a shard."""
    folder.mkdir()
    (folder / "a.txt").write_text(VERSE * 3 * size, encoding="utf-8")
    rows = [json.dumps({"text": f"{number} {VERSE[: number * 3]}"}) for number in range(5 * size)]
    (folder / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name in ("c.txt", "d.txt", "e.txt"):
        (folder / name).write_text(f"{name} {VERSE}", encoding="utf-8")
    return folder


def documents_of(folder):
    """What `write_corpus` wrote, read in another way."""
    rows = [json.loads(line)["text"] for line in (folder / "b.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("a.txt", "c.txt", "d.txt", "e.txt")]
    return [texts[0], *rows, *texts[1:]]


def ids_of(documents):
    return [i for text in documents for i in (0, *TOKENIZER(text, split_special_tokens=True)["input_ids"], 0)]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def build(folder, directory, **options):
    return build_token_store(read_texts(folder), TOKENIZER, directory, **{"workers": 0, **options})


# ------------------------------------------------------------------------------------------------------------ shards


def test_shards_are_read_as_one_store(tmp_path, small_shards, monkeypatch):
    folder = write_corpus(tmp_path / "corpus")
    store, documents = build(folder, tmp_path / "store"), documents_of(folder)
    assert store.num_shards > 5
    assert store.tokens.tolist() == ids_of(documents)
    assert [store.document(i).tolist() for i in range(len(documents))] == [ids_of([text]) for text in documents]
    assert (store.num_documents, store.num_bytes) == (len(documents), sum(len(text.encode()) for text in documents))
    store.verify()
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 1 << 26)
    whole = build(folder, tmp_path / "whole")
    assert whole.num_shards == 1
    rows, of_whole = PackedRows(store, 7), PackedRows(whole, 7)
    assert len(rows) == len(of_whole)
    for place in range(len(rows)):
        one, other = rows[[place]], of_whole[[place]]
        assert one.keys() == other.keys()
        assert all(one[name].tolist() == other[name].tolist() for name in one)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, small_shards):
    folder = write_corpus(tmp_path / "corpus")
    build(folder, tmp_path / "store0")
    for count in (1, 2, 3):
        build(folder, tmp_path / f"store{count}", workers=count)
        assert contents(tmp_path / f"store{count}") == contents(tmp_path / "store0")


def test_a_build_that_is_killed_at_any_write_ends_in_the_same_bytes(tmp_path, small_shards, monkeypatch):
    folder = write_corpus(tmp_path / "corpus", size=2)
    build(folder, tmp_path / "undisturbed")
    wanted, place = contents(tmp_path / "undisturbed"), 0
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill leaves what the system has, unlike a power cut
    while killed_at(place, lambda: build(folder, tmp_path / "store")):
        build(folder, tmp_path / "store")
        assert contents(tmp_path / "store") == wanted
        assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
            "corpus",
            "store",
            "undisturbed",
        ]
        for path in (tmp_path / "store").iterdir():
            path.unlink()
        place += 1
    assert place > 60


def test_a_build_goes_on_after_one_kill_after_another(tmp_path, small_shards):
    folder = write_corpus(tmp_path / "corpus")
    build(folder, tmp_path / "undisturbed")
    kills = 0
    while killed_at(15, lambda: build(folder, tmp_path / "store")):
        kills += 1
        assert kills < 50, "it does not come any further"
    assert kills > 5
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def killed_at(place, work):
    """Run `work` in a fork that is killed before its write number `place`; whether it came so far."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    left = [place]

    def before_a_write(event, arguments):
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.addaudithook(before_a_write)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_files_that_are_added_at_the_end_cost_only_themselves(tmp_path, small_shards, monkeypatch):
    folder = write_corpus(tmp_path / "corpus")
    former = build(folder, tmp_path / "store")
    kept = [(tmp_path / "store" / name).stat().st_ino for name in contents(former.directory) if "tokens" in name]
    (folder / "f.txt").write_text("the rest is silence", encoding="utf-8")
    read = []
    pieces_of_file = token_store.write_shard
    monkeypatch.setattr(token_store, "write_shard", lambda job, *rest: read.append(job) or pieces_of_file(job, *rest))
    store = build(folder, tmp_path / "store")
    assert [[os.path.basename(file.path) for file in job.files] for job in read] == [["f.txt"]]
    assert store.num_shards == former.num_shards + 1
    assert {path.stat().st_ino for path in store.directory.glob("tokens*")} >= set(kept)
    assert store.tokens.tolist() == ids_of([*documents_of(folder), "the rest is silence"])
    store.verify()


def test_a_file_that_changes_is_read_again_and_no_other(tmp_path, small_shards, monkeypatch):
    folder = write_corpus(tmp_path / "corpus")
    build(folder, tmp_path / "store")
    (folder / "d.txt").write_text("other", encoding="utf-8")
    os.utime(folder / "a.txt", ns=(5, 5))  # touched
    read, write = [], token_store.write_shard
    monkeypatch.setattr(token_store, "write_shard", lambda job, *rest: read.append(job) or write(job, *rest))
    store = build(folder, tmp_path / "store")
    names = {os.path.basename(file.path) for job in read for file in job.files}
    assert "d.txt" in names
    assert "a.txt" not in names
    assert store.tokens.tolist() == ids_of(documents_of(folder))


def test_the_plan_divides_large_files_and_joins_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 100)
    sizes = {"a.txt": 30, "b.txt": 60, "c.txt": 30, "d.jsonl": 250, "e.csv": 250}
    for name, size in sizes.items():
        (tmp_path / name).write_text(("line of a file\n" * size)[:size])
    files = [(CorpusFile(str(tmp_path / name)), name) for name in sizes]
    plan = [[(unit.digest, unit.file.span) for unit in group] for group in plan_shards(files, has_cuts=True)]
    assert plan == [
        [("a.txt", None), ("b.txt", None)],
        [("c.txt", None)],
        [("d.jsonl", (0, 105))],  # up to the end of a line
        [("d.jsonl", (105, 210))],
        [("d.jsonl", (210, 250))],
        [("e.csv", None)],  # a cell may hold line breaks
    ]


def test_a_document_is_divided_only_where_the_tokenizer_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 200)
    (tmp_path / "a.txt").write_text(VERSE * 9, encoding="utf-8")
    files = [(CorpusFile(str(tmp_path / "a.txt")), "")]
    assert [len(plan_shards(files, has_cuts=cuts)) for cuts in (False, True)] == [
        1,
        -(-len((VERSE * 9).encode()) // 200),
    ]


def test_row_groups_of_parquet_are_shards(tmp_path, small_shards):
    texts = [f"{number} {VERSE[:50]}" for number in range(60)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    store = build(tmp_path / "a.parquet", tmp_path / "store")
    assert store.num_shards > 2
    assert store.tokens.tolist() == ids_of(texts)


def test_a_worker_imports_neither_torch_nor_transformers():
    program = workers.PROGRAM.format(path=sys.path).replace("main()", "")
    heavy = "[name for name in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if name in sys.modules]"
    done = subprocess.run([sys.executable, "-c", f"{program}\nprint({heavy})"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_bad_file_in_a_worker_is_named_and_finished_shards_are_kept(tmp_path, small_shards):
    folder = write_corpus(tmp_path / "corpus")
    (folder / "z.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(UserError, match=r"z.jsonl, line 2: text_column='text' holds int, expected text"):
        build(folder, tmp_path / "store", workers=1)
    finished = list((tmp_path / "store.partial").glob("shard*.json"))
    assert len(finished) > 5
    (folder / "z.jsonl").write_text('{"text": "a"}\n')
    lines = []
    store = build(folder, tmp_path / "store", log=lines.append)
    assert f"going on: {len(finished)} of {store.num_shards} shards are there already" in lines
    assert store.tokens.tolist() == ids_of([*documents_of(folder), "a"])


def test_a_job_travels_as_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    file = CorpusFile("a.txt", span=(3, 7), ends=False)
    layout = token_store.Layout(1, 2, "<u2", 5, 6)
    job = ShardJob("folder", 3, (file,), ("digest",), layout, "identity")
    assert ShardJob.from_json(job.to_json()) == job
    assert "\n" not in job.to_json()


# -------------------------------------------------------------------------------------------------------------- cuts


def tokenizer_with(expression):
    backend = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([VERSE * 3, "don't I'll 12 345 6789 we'RE ("], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def random_texts(count, seed=0):
    draw = np.random.default_rng(seed)
    parts = [
        "to",
        "be",
        " ",
        "  ",
        "\n",
        "\r\n",
        "'s",
        "'",
        "1234",
        ",",
        "。",
        "我们",
        "é",
        "e\u0301",
        "\u0301",
        "(",
        "ß",
    ]
    parts += [
        "\u3000",
        "\t",
        "!?",
        "_",
        "-",
        "\u2028",
        "\U0001f600",
        "ال",
        "\u064e",
        "½",
        "²",
        "x" * 9,
        "\x1c",
        '"',
        "VE",
    ]
    return ["".join(draw.choice(parts, size)) for size in draw.integers(1, 80, count)]


@pytest.mark.parametrize("expression", [WORDS, *text_cuts.KNOWN], ids=["ours", "gpt2", "gpt4", "qwen2"])
def test_pieces_of_one_line_have_the_ids_of_the_whole(expression):
    backend = tokenizer_with(expression).backend_tokenizer
    assert text_cuts.is_certain(json.loads(backend.to_str()), (WORDS,))
    cuts, split = 0, backend.pre_tokenizer.pre_tokenize_str
    for text in random_texts(3000):
        found = list(pieces(text, 2))
        assert "".join(found) == text
        cuts += len(found) - 1
        words = [word for piece in found for word, _ in split(piece)]
        assert words == [word for word, _ in split(text)], repr(text)
        assert [i for piece in found for i in backend.encode(piece).ids] == backend.encode(text).ids, repr(text)
    assert cuts > 5000


def test_the_cuts_of_a_document_do_not_depend_on_how_it_is_read():
    draw = np.random.default_rng(1)
    for text in random_texts(300, seed=2):
        text *= 5
        for size in (3, 10):
            places = np.sort(draw.integers(0, len(text), 6)).tolist()
            parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
            stream = [*((part, False) for part in parts), ("", True)]
            assert [piece for piece, _ in cut_pieces(iter(stream), size)] == list(pieces(text, size))


@pytest.mark.parametrize(
    ("change", "is_certain"),
    [
        ({}, True),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"added_tokens": [{"content": "a b", "special": True, "lstrip": True}]}, True),
        ({"added_tokens": [{"content": "a b", "special": False, "lstrip": False}]}, False),
    ],
)
def test_documents_are_cut_for_known_tokenizers_only(change, is_certain):
    facts = json.loads(TOKENIZER.backend_tokenizer.to_str()) | change
    assert text_cuts.is_certain(facts, (WORDS,)) is is_certain


# ----------------------------------------------------------------------------------------------------------- engines


class FakeEngine:
    """An encoder with the interface of fastokens: the ids of tokenizers, but for those of texts with `wrong`."""

    def __init__(self, text):
        self.backend, self.wrong, self.calls = Tokenizer.from_str(text), "\0", 0

    def encode_batch_flat(self, texts, **options):
        self.calls += 1
        ids = [[*self.backend.encode(text).ids, *([7] if self.wrong in text else [])] for text in texts]
        ends = np.cumsum([0, *map(len, ids)]).astype("<u8")
        return np.array([i for one in ids for i in one], "<u4").tobytes(), ends.tobytes()


@pytest.fixture
def fast_engine(monkeypatch):
    engine = FakeEngine(TOKENIZER.backend_tokenizer.to_str())
    module = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_json_str=lambda text: engine))
    monkeypatch.setitem(sys.modules, "fastokens", module)
    return engine


def test_the_fast_engine_is_used_where_it_agrees(tmp_path, fast_engine):
    (tmp_path / "a.txt").write_text(VERSE, encoding="utf-8")
    lines = []
    store = build(tmp_path / "a.txt", tmp_path / "store", log=lines.append)
    assert fast_engine.calls > 1
    assert lines == []
    assert store.tokens.tolist() == ids_of([VERSE])


@pytest.mark.parametrize("place", [0, 40], ids=["in the first batch", "in a later one"])
def test_a_shard_on_which_the_fast_engine_is_wrong_is_written_by_the_other(tmp_path, fast_engine, monkeypatch, place):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 50)
    rows = [f"{number} {VERSE}" for number in range(60)]
    rows[place] = f"wrong {rows[place]}"
    fast_engine.wrong = "wrong"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    lines = []
    store = build(tmp_path / "a.jsonl", tmp_path / "store", log=lines.append)
    assert store.tokens.tolist() == ids_of(rows)
    assert lines == [
        "note: fastokens gives other ids than tokenizers on this text; tokenizers is used, which is slower"
    ]


def test_texts_in_memory_are_written_by_the_other_engine_too(tmp_path, fast_engine, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 50)
    rows, lines = [f"{number} {VERSE}" for number in range(30)], []
    rows[20], fast_engine.wrong = f"wrong {VERSE}", "wrong"
    store = build_token_store(rows, TOKENIZER, tmp_path / "store", log=lines.append)
    assert store.tokens.tolist() == ids_of(rows)
    assert len(lines) == 1
    assert lines[0].startswith("note: fastokens gives other ids")


def test_a_tokenizer_that_the_fast_engine_cannot_read_is_noted_once(tmp_path, small_shards, monkeypatch):
    def refuse(text):
        raise ValueError("no such model")

    module = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_json_str=refuse))
    monkeypatch.setitem(sys.modules, "fastokens", module)
    folder, lines = write_corpus(tmp_path / "corpus"), []
    assert build(folder, tmp_path / "store", log=lines.append).tokens.tolist() == ids_of(documents_of(folder))
    assert lines == ["note: fastokens cannot read this tokenizer (no such model); tokenizers is used, which is slower"]


@pytest.mark.parametrize("expression", [WORDS, *text_cuts.KNOWN], ids=["ours", "gpt2", "gpt4", "qwen2"])
def test_fastokens_gives_the_ids_of_tokenizers(expression):
    pytest.importorskip("fastokens")
    tokenizer = tokenizer_with(expression)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    assert encoder.engine == "fastokens", encoder.problem
    texts = random_texts(500, seed=3)
    ids, bounds = encoder.encode(texts)
    for text, first, last in zip(texts, bounds, bounds[1:], strict=False):
        assert ids[first:last].tolist() == tokenizer.backend_tokenizer.encode(text).ids


def test_wrong_ids_are_found_in_a_sample(fast_engine):
    encoder = Encoder(TOKENIZER.backend_tokenizer.to_str())
    fast_engine.wrong = "question"
    with pytest.raises(WrongIds):
        encoder.encode([VERSE])


# ------------------------------------------------------------------------------------------------------------- files


def table_of(texts):
    return pyarrow.table({"id": list(range(len(texts))), "text": texts})


def write_arrow(path, texts, *, is_stream):
    with pyarrow.OSFile(str(path), "wb") as file:
        opened = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
        with opened(file, table_of(texts).schema) as writer:
            writer.write_table(table_of(texts), max_chunksize=2)
    return path


def compressed(path, suffix):
    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }[suffix]
    target = path.with_name(path.name + suffix)
    target.write_bytes(pack(path.read_bytes()))
    return target


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet", ".arrow", "stream"])
def test_every_kind_of_file_is_read_compressed_or_not(tmp_path, kind, suffix):
    texts = ["one, two", "three 我们", "four"]
    path = tmp_path / f"a{'.arrow' if kind == 'stream' else kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(table_of(texts), path)
    elif kind in (".arrow", "stream"):
        write_arrow(path, texts, is_stream=kind == "stream")
    elif kind == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif kind == ".csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    file = compressed(path, suffix) if suffix else path
    assert list(read_texts(file, sample_by="line")) == texts


@pytest.mark.parametrize(
    ("name", "kept", "fault"),
    [
        ("a.txt.gz", 0, "a.txt.gz is not UTF-8 text .*the compressed file .* is damaged"),
        ("a.jsonl.zst", 0, "a.jsonl.zst: not a line of JSON .*the compressed file .* is damaged"),
        ("a.jsonl", 99, "a.jsonl, line 41: not a line of JSON"),
        ("b.jsonl", 99, "b.jsonl, line 41: text_column='text' holds int, expected text"),
        ("a.csv", 99, "a.csv, line 42: the row has 3 fields, the header 2"),
        ("a.parquet", 0, "a.parquet is not a Parquet file"),
        ("b.parquet", 99, "b.parquet, row 41: text_column='text' holds bytes that are not UTF-8"),
        ("a.arrow", 0, "a.arrow is not an Arrow file"),
        ("b.txt", 99, "b.txt is not UTF-8 text .line 41: can't decode 0xff"),
    ],
)
def test_a_bad_file_is_named_with_its_row_and_can_be_skipped(tmp_path, name, kept, fault):
    path = write_bad_file(tmp_path / name)
    with pytest.raises(UserError, match=fault):
        list(read_texts(path, sample_by="line"))
    (tmp_path / "z.txt").write_text("the last\n")
    texts = read_texts([path, tmp_path / "z.txt"], sample_by="line", on_corrupt="skip")
    found = list(texts)
    assert found[-1] == "the last"
    assert len(found) - 1 == kept if kept else len(found) <= 100
    store = build_token_store(texts, TOKENIZER, tmp_path / "store")
    assert (store.num_documents, store.left_out) == (len(found), 1)
    assert fault.split(" .")[0].split(" is not")[0].split(":")[0] in store.faults[0]
    assert read_texts(path).fingerprint != read_texts(path, on_corrupt="skip").fingerprint


def write_bad_file(path):
    """100 rows, of which number 41 is bad, or a file that ends too early."""
    rows = [f"row {number} {'of the file ' * 9}{os.urandom(20).hex()}" for number in range(100)]
    lines = [json.dumps({"text": row}) for row in rows]
    if path.name == "a.jsonl":
        lines[40] = lines[40][:-5]
    elif path.name == "b.jsonl":
        lines[40] = '{"text": 5}'
    elif path.suffix == ".csv":
        lines = ["id,text", *(f"{number},{row}" for number, row in enumerate(rows))]
        lines[41] += ",more"
    elif path.name == "b.txt":
        lines = rows
    content = "\n".join(lines).encode()
    if path.name == "b.txt":
        content = content.replace(b"row 40 ", b"row \xff\xff ")
    if path.name == "b.parquet":
        values = [row.encode() for row in rows]
        values[40] = b"\xff\xff"
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    elif path.suffix in (".parquet", ".arrow"):
        pyarrow.parquet.write_table(table_of(rows), path) if path.suffix == ".parquet" else write_arrow(
            path, rows, is_stream=False
        )
        path.write_bytes(path.read_bytes()[:-50])
    elif path.suffix in (".gz", ".zst"):
        packed = gzip.compress(content) if path.suffix == ".gz" else pyarrow.compress(content, "zstd", asbytes=True)
        path.write_bytes(packed[: len(packed) // 2])
    else:
        path.write_bytes(content)
    return path


def test_the_line_of_a_fault_is_counted_from_the_beginning_of_the_file(tmp_path):
    lines = [json.dumps({"text": f"row {number}"}) for number in range(50)]
    lines[30] = "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    start = len("\n".join(lines[:20])) + 1
    with pytest.raises(UserError, match=r"a.jsonl, line 31: not a line of JSON"):
        list(pieces_of(CorpusFile(str(path), span=(start, path.stat().st_size))))


def test_the_parts_of_a_file_have_the_documents_of_the_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\nthree 我们\n  \nfour".encode())
    whole = list(pieces_of(CorpusFile(str(path), sample_by="line")))
    ends = [place + 1 for place, byte in enumerate(path.read_bytes()) if byte == ord("\n")]
    for end in ends:
        parts = [(0, end), (end, path.stat().st_size)]
        found = [piece for span in parts for piece in pieces_of(CorpusFile(str(path), sample_by="line", span=span))]
        assert (
            [text for text, _ in found if text]
            == [text for text, _ in whole if text]
            == [
                "one",
                "two",
                "three 我们",
                "four",
            ]
        )


def test_a_pattern_names_several_files_in_order(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/3.md", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_texts(f"{tmp_path}/*/*")) == ["a/1.txt", "b/2.txt"]
    assert list(read_texts(f"{tmp_path}/**/*.txt")) == ["a/1.txt", "b/2.txt", "c.txt"]
    with pytest.raises(UserError, match=r"x\*.txt' matches no file that ends in .txt"):
        read_texts(f"{tmp_path}/x*.txt")


# ------------------------------------------------------------------------------------------------------------ report


def test_a_store_is_shown_with_its_sources_packing_and_samples(tmp_path, small_shards):
    folder = write_corpus(tmp_path / "corpus")
    store = build(folder, tmp_path / "run" / "corpus" / "train")
    assert stores_in(tmp_path / "run") == stores_in(tmp_path / "run" / "corpus") == [store.directory]
    text = report(store.directory, context_length=50, num_samples=2)
    documents = documents_of(folder)
    tokens, longest = len(ids_of(documents)), len(ids_of(documents[:1]))
    rows = -(-(tokens - 1) // 50)
    assert "  documents   24\n" in text
    assert f"  tokens      {tokens:,} of 2 bytes, in {store.num_shards} shards\n" in text
    assert f"in rows of 50 tokens: {rows:,} rows\n" in text
    assert f"  padding     {rows * 50 - (tokens - 1)} tokens" in text
    assert f'  document 0: {longest:,} tokens, "To be, or not to be:' in text
    counted = next(line for line in text.splitlines() if "b.jsonl" in line).split()
    assert counted[1:3] == ["20", f"{len(ids_of(documents[1:21])):,}"]
    assert text.count("\n  row ") == 2
    ends = np.cumsum([len(ids_of([document])) for document in documents]).tolist()
    divided = sum(first // 50 != (last - 1) // 50 for first, last in zip([0, *ends], ends, strict=False))
    assert f"  divided     {divided} of 24 documents lie in more than one row\n" in text
    with pytest.raises(UserError, match=r"holds no token store; `bmtk prepare --config FILE` writes one"):
        stores_in(tmp_path)


def test_a_store_of_the_former_format_is_opened(tmp_path):
    store = build_token_store(["ab"], TOKENIZER, tmp_path / "store")
    path = store.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    kept = ("tokenizer_fingerprint", "source_fingerprint", "num_documents", "num_tokens", "num_bytes", "dtype")
    path.write_text(json.dumps({"format": 1, **{k: manifest[k] for k in (*kept, "pad_token_id", "files")}}))
    stamp = path.stat().st_mtime_ns
    again = build_token_store(["ab"], TOKENIZER, tmp_path / "store")
    assert (again.tokens.tolist(), path.stat().st_mtime_ns) == (store.tokens.tolist(), stamp)
    assert TokenStore(store.directory).num_shards == 1
