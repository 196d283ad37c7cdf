"""From raw text to batches: tokens a CPU second and peak memory, beside datasets.map and datatrove; a store's batches.

    python benchmarks/run.py tokenising first_batch
    python -m benchmarks.data --megabytes 50 1000      # also 1 GB, by ours only
    python -m benchmarks.data --line 300               # also one line of 300 MB, of text and of JSON

The text is the source code of the installed Python packages, a document a file, so that any machine has it; the
tokenizer is a byte-level BPE of 16,384 tokens, trained on 4 MB of it.  Each measurement has a process of its own; peak
memory is what it needs beyond its imports.  CPU seconds are those of all threads and child processes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.rows import ROOT, Line, Settings, at_most, row, take_turns
from bmtk.training.memory import peak_memory

VOCABULARY, TRAINED_ON = 16_384, 4 << 20
CONTEXT, ROWS = 1024, 32  # of a batch
LONGEST_FOR_MAP = 50  # MB
PLACES = (0, 10**9)  # rows of the order at which a run begins or resumes


@row
def tokenising(settings: Settings) -> list[Line]:
    """Raw text to token ids: tokens a CPU second and peak memory, beside `datasets.map` and datatrove."""
    folder = prepared_folder(settings.folder / "tokenising")
    peers = ["datasets.map", *(["datatrove"] if find_spec("datatrove") else [])]
    facts: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *peers)}

    def rate(name: str) -> float:
        # A text of another name each turn, because both engines keep what they have made of a file.
        corpus = folder / f"text-{len(facts[name])}.jsonl"
        if not corpus.exists():
            write_corpus(corpus, 1 if settings.quick else LONGEST_FOR_MAP // 2, as_line=False)
        facts[name].append(measured(name, corpus, folder))
        return facts[name][-1]["tokens a CPU second, M"]

    turns = min(settings.turns, 3)
    found = take_turns({name: lambda name=name: rate(name) for name in facts}, turns, warm_up=False)
    memory = {name: [max(1.0, one["peak MB"]) for one in of_name] for name, of_name in facts.items()}
    speed, peak = "tokenising", "tokenising, peak memory beyond imports"
    return [
        *(Line(speed, "M tokens a CPU s", found["ours"], found[peer], peer) for peer in peers),
        *(Line(peak, "MB", memory["ours"], memory[peer], peer) for peer in peers),
    ]


@row
def first_batch(settings: Settings) -> Line:
    """The first batch of a run resumed at row 1,000,000,000, beside that of a run that begins."""
    folder = prepared_folder(settings.folder / "first_batch")
    corpus = folder / "text.jsonl"
    write_corpus(corpus, 1, as_line=False)
    measured("ours", corpus, folder)
    laps = [measured("batches", corpus, folder) for _ in range(min(settings.turns, 3))]
    begun, resumed = ([lap[f"first batch at row {place:,}, ms"] for lap in laps] for place in PLACES)
    return Line("first batch at row 1,000,000,000", "ms", resumed, begun, "at row 0", at_most(1.5))


def prepared_folder(folder: Path) -> Path:
    """A folder with a tokenizer, for both engines."""
    if not folder.is_dir():
        (folder / "exact").mkdir(parents=True)
        train(folder / "tokenizer")
        (folder / "exact" / "tokenizer").symlink_to(folder / "tokenizer")
    return folder


def source_texts() -> Iterator[str]:
    """The files of the installed packages, over and over."""
    files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    while True:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text


def write_corpus(path: Path, megabytes: int, *, as_line: bool) -> None:
    """JSON lines of about that much text, or one line of text or JSON."""
    left, is_json = megabytes * 1_000_000, path.suffix == ".jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write('{"text": "' if as_line and is_json else "")
        for text in source_texts():
            if as_line:
                file.write(json.dumps(text)[1:-1] if is_json else text.replace("\n", " "))
            else:
                file.write(json.dumps({"text": text}) + "\n")
            left -= len(text)
            if left <= 0:
                break
        file.write('"}\n' if as_line and is_json else "")


def train(folder: Path) -> None:
    from bmtk.data.tokenizers import train_tokenizer

    texts, left = [], TRAINED_ON
    for text in source_texts():
        texts.append(text)
        left -= len(text)
        if left <= 0:
            break
    train_tokenizer(texts, kind="byte_bpe", vocab_size=VOCABULARY).save_pretrained(folder)


# ------------------------------------------------------------------------------------- measured in their own process


def prepare_ours(corpus: Path, folder: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    from bmtk.data.sources import read_texts
    from bmtk.data.token_store import build_token_store

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = read_texts(corpus, sample_by="line")
    meter = Meter()
    store = build_token_store(texts, tokenizer, folder / f"store-{corpus.name}", workers=0)
    return meter.facts(store.num_tokens)


def prepare_exactly(corpus: Path, folder: Path) -> dict[str, float]:
    """Ours, without the fast engine."""
    sys.modules["fastokens"] = None  # type: ignore[assignment]
    return prepare_ours(corpus, folder / "exact")


def prepare_by_map(corpus: Path, folder: Path) -> dict[str, float]:
    """What the example scripts of transformers do: tokenise in batches, then join and cut."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    meter = Meter()
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(lambda batch: tokenizer(batch["text"], verbose=False), batched=True, remove_columns=["text"])

    def grouped(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        cut = [joined[i : i + CONTEXT] for i in range(0, len(joined) // CONTEXT * CONTEXT, CONTEXT)]
        return {"input_ids": cut, "labels": cut}

    rows = rows.map(grouped, batched=True, remove_columns=rows.column_names)
    return meter.facts(len(rows) * CONTEXT)


def prepare_by_datatrove(corpus: Path, folder: Path) -> dict[str, float]:
    """datatrove's tokenizer in this process, which writes what our store can read, too.

    The rows are parsed by Python's json: datatrove's reader of JSON wants orjson.
    """
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    made = folder / f"datatrove-{corpus.name}"
    tokenizer = str(folder / "tokenizer" / "tokenizer.json")
    writer = DocumentTokenizer(str(made), tokenizer, save_final_metadata=False, shuffle_documents=False)
    meter = Meter()
    with corpus.open(encoding="utf-8") as file:
        writer.run(Document(json.loads(line)["text"], str(number)) for number, line in enumerate(file))
    tokens = sum(file.stat().st_size for file in made.rglob("*.ds")) // 2  # bytes of a token below 65,536
    return meter.facts(tokens)


def read_batches(corpus: Path, folder: Path) -> dict[str, float]:
    from bmtk.data.batches import GlobalBatches
    from bmtk.data.packing import PackedRows
    from bmtk.data.token_store import TokenStore

    found: dict[str, float] = {}
    for place in (PLACES[0], *PLACES):  # the first warms up
        began = time.perf_counter()
        store = TokenStore(folder / f"store-{corpus.name}")
        batches = GlobalBatches(PackedRows(store, CONTEXT), batch_size=ROWS, seed=0)
        batches[place // ROWS]
        found[f"first batch at row {place:,}, ms"] = (time.perf_counter() - began) * 1000
    began, steps = time.process_time(), 300
    for step in range(steps):
        batches[step]
    found["tokens of batches a CPU second, M"] = steps * ROWS * CONTEXT / (time.process_time() - began) / 1e6
    return found


class Meter:
    """CPU time and memory from now on."""

    def __init__(self) -> None:
        self.memory, self.seconds = peak_memory(), self._seconds()

    def used(self) -> float:
        """CPU seconds."""
        return self._seconds() - self.seconds

    def facts(self, tokens: int) -> dict[str, float]:
        rate = tokens / self.used() / 1e6
        megabytes = (peak_memory() - self.memory) / 2**20
        return {"tokens, M": tokens / 1e6, "tokens a CPU second, M": rate, "peak MB": megabytes}

    @staticmethod
    def _seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)


MEASURES = {
    "ours": prepare_ours,
    "ours, tokenizers": prepare_exactly,
    "datasets.map": prepare_by_map,
    "datatrove": prepare_by_datatrove,
    "batches": read_batches,
}


def measured(name: str, corpus: Path, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data", "--measure", name, str(corpus), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def show(corpus: str, name: str, facts: dict[str, float]) -> None:
    print(f"{corpus:22}{name:20}{', '.join(f'{key}: {value:,.2f}' for key, value in facts.items())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[50], help="of text; several are measured in turn")
    parser.add_argument("--line", type=int, default=0, help="MB of a text that is one line; 0: none")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "CORPUS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, corpus, folder = options.measure
        print(json.dumps(MEASURES[name](Path(corpus), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = prepared_folder(Path(name) / "work")
        for size in options.megabytes:
            corpus = folder / f"{size}.jsonl"
            write_corpus(corpus, size, as_line=False)
            for measure in MEASURES:
                if measure == "datatrove" and not find_spec("datatrove"):
                    continue  # pip install 'big-model-toolkit[clean]'
                if size <= LONGEST_FOR_MAP or measure in ("ours", "batches"):
                    show(f"{size:,} MB", measure, measured(measure, corpus, folder))
        for suffix in (".txt", ".jsonl") if options.line else ():
            corpus = folder / f"line{suffix}"
            write_corpus(corpus, options.line, as_line=True)
            show(f"{options.line} MB, a {suffix} line", "ours", measured("ours", corpus, folder))


if __name__ == "__main__":
    main()
