"""Cleaning of raw text: how fast, and in how much memory; 60 MB beside 15.

    python benchmarks/run.py cleaning
    python -m benchmarks.cleaning --megabytes 15 60

The pages are drawn from the sentences of the shipped play, so that most of them pass; one in ten is a copy of the one
before, every second of these with another end.  All rules are applied but `decontaminate`, for want of an evaluation
set.  Each measurement has a process of its own, which does the work itself (one worker).
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.data import Meter
from benchmarks.rows import ROOT, Line, Settings, at_most, not_run, row

SIZES = (15, 60)  # MB
PLAY = ROOT / "recipes" / "data" / "tiny_shakespeare" / "train.txt"
RULES = ("unicode", "length", "language", "repetition", "gopher", "c4", "fineweb", "scrub", "exact", "near")
SENTENCES = (20, 60)  # of a page


@row
def cleaning(settings: Settings) -> list[Line]:
    """`bmtk clean` by ten rules: megabytes and documents a CPU second, and peak memory, of 60 MB beside 15 MB."""
    if find_spec("datatrove") is None:
        return [not_run("cleaning", "needs datatrove (the extra clean)")]
    facts = []
    for size in SIZES:
        folder = settings.folder / f"cleaning-{size}"
        folder.mkdir(parents=True)
        write_pages(folder / "pages.jsonl", size // 10 if settings.quick else size)
        facts.append([measured(folder, turn) for turn in range(min(settings.turns, 2))])
    of = {name: [[one[name] for one in of_size] for of_size in facts] for name in facts[0][0]}
    peer = f"{SIZES[0]} MB"
    return [
        Line("cleaning 60 MB", "MB a CPU s", *reversed(of["MB a CPU second"]), peer),
        Line("the same", "documents a CPU s", *reversed(of["documents a CPU second"]), peer),
        Line("cleaning 60 MB, peak memory", "MB", *reversed(of["peak MB"]), peer, at_most(1.5)),
    ]


def write_pages(path: Path, megabytes: int) -> None:
    draw = random.Random(0)
    text = re.sub(r"\n+[A-Z][A-Za-z ]*:\n", " ", PLAY.read_text(encoding="utf-8"))  # without the names of who speaks
    sentences = [" ".join(words.split()) for words in re.findall(r"[A-Z][^.?!]+[.?!]", text)]
    written, page = 0, ["A page."]
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            kind = draw.random()
            if kind >= 0.1:
                page = draw.sample(sentences, draw.randint(*SENTENCES))
            elif kind >= 0.05:
                page = [*page[:-1], draw.choice(sentences)]
            paragraphs = [" ".join(page[start : start + 5]) for start in range(0, len(page), 5)]
            written += file.write(json.dumps({"text": "\n".join(paragraphs)}) + "\n")


def clean_once(folder: Path, turn: int) -> dict[str, float]:
    from bmtk.cleaning import job  # noqa: F401  (what is imported is not measured)
    from bmtk.cleaning.command import clean, read_settings

    source, output = folder / "pages.jsonl", folder / f"cleaned-{turn}"
    words = ["--input", str(source), "--output_dir", str(output), "--workers", "1", "--languages", "en"]
    settings = read_settings([*words, "--rules", *RULES], ROOT / "recipes")
    meter = Meter()
    clean(settings, lambda line: print(line, file=sys.stderr))
    found = meter.facts(0)
    with source.open("rb") as file:
        pages = sum(1 for _ in file)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    seconds = meter.used()
    return {
        "MB a CPU second": source.stat().st_size / 1e6 / seconds,
        "documents a CPU second": pages / seconds,
        "peak MB": found["peak MB"],
        "kept": report["counts"]["kept_documents"] / pages,
    }


def measured(folder: Path, turn: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cleaning", "--measure", str(folder), str(turn)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=int, nargs="*", default=SIZES, help="of pages; several are cleaned in turn"
    )
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "TURN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, turn = options.measure
        print(json.dumps(clean_once(Path(folder), int(turn))))
        return
    for size in options.megabytes:
        with tempfile.TemporaryDirectory() as name:
            write_pages(Path(name) / "pages.jsonl", size)
            facts = measured(Path(name), 0)
            print(f"{size:,} MB: {', '.join(f'{key}: {value:,.2f}' for key, value in facts.items())}", flush=True)


if __name__ == "__main__":
    main()
