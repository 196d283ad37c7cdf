"""A crawl with planted faults is cleaned: the faults go, everything else stays, whoever does the work and when."""

import filecmp
import gzip
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra clean")

import pyarrow.parquet
from datatrove.pipeline.base import PipelineStep

from bmtk.cleaning.arguments import RULES
from bmtk.cleaning.command import clean, read_settings
from bmtk.data import shard_plan
from bmtk.data.sources import read_texts
from bmtk.errors import UserError

ROOT = Path(__file__).parents[2]
CRAWL = ROOT / "recipes" / "data" / "web_text"
CONFIG = ROOT / "recipes" / "configs" / "cleaning" / "web_text.yaml"
FAULTS = json.loads((CRAWL / "faults.json").read_text())
REMOVED_BY = set(RULES) - {"unicode", "scrub"}


def run(*argv, config=CONFIG):
    lines = []
    words = ["--config", str(config)] if config else []
    clean(read_settings([*words, *map(str, argv)], ROOT / "recipes"), lines.append)
    return lines


def texts_by_id(output: Path) -> dict[str, str]:
    rows = []
    for path in sorted((output / "documents").iterdir()):
        rows += [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    return {row["id"]: row["text"] for row in rows}


def crawl() -> dict[str, str]:
    found = {}
    for name in ("pages-1.jsonl.gz", "pages-2.jsonl.gz"):
        lines = gzip.open(CRAWL / name, "rt", encoding="utf-8")
        found |= {f"{name}/{number}": json.loads(line)["text"] for number, line in enumerate(lines, 1)}
    return found


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def same_folders(one: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes; hidden files are not compared."""
    names = [{path.relative_to(f) for path in f.rglob("[!.]*") if path.is_file()} for f in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "web_text"
    return output, run("--output_dir", output, "--workers", 1)


@pytest.fixture
def small_shards(monkeypatch):
    """Eight or more of them from the crawl, unpacked."""
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 20_000)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    texts, folder = list(crawl().values()), tmp_path_factory.mktemp("pages")
    return [write_jsonl(folder / "a.jsonl", texts[:100]), write_jsonl(folder / "b.jsonl", texts[100:])]


class KilledStep(PipelineStep):
    """Ends the process that runs it, as the system does when memory runs out."""

    type, name = "test", "killed"

    def run(self, data=None, rank=0, world_size=1):
        os.kill(os.getpid(), signal.SIGKILL)


# What goes and what stays --------------------------------------------------------------------------------------------


def test_every_planted_fault_is_removed_and_every_innocent_page_is_kept(cleaned, capsys):
    output, _ = cleaned
    kept, all_ids = set(texts_by_id(output)), set(crawl())
    planted = {page for page, fault in FAULTS.items() if fault in REMOVED_BY}
    removed = all_ids - kept
    right = len(removed & planted)
    with capsys.disabled():
        print(  # noqa: T201
            f"\nplanted crawl: precision {right / len(removed):.3f}, recall {right / len(planted):.3f}", end=" "
        )
    assert removed == planted


def test_each_fault_is_removed_by_its_own_rule(cleaned):
    report = json.loads((cleaned[0] / "report.json").read_text())
    assert [step["rule"] for step in report["rules"]] == list(RULES)
    planted = Counter(fault for fault in FAULTS.values() if fault in REMOVED_BY)
    assert {step["rule"]: step["removed"] for step in report["rules"] if step["removed"]} == planted
    for step in report["rules"]:
        by_reason = sum(facts["documents"] for facts in step["reasons"]["removed"].values())
        assert by_reason == step["removed"]
        assert step["left"] == step["seen"] - step["removed"]
    assert report["counts"]["kept_documents"] == report["rules"][-1]["left"] == len(texts_by_id(cleaned[0]))
    assert report["counts"]["read_documents"] == len(crawl())


def test_pages_without_a_fault_are_kept_as_they_are(cleaned):
    kept = texts_by_id(cleaned[0])
    for page, text in crawl().items():
        if page not in FAULTS:
            assert kept[page] == text


def test_what_was_planted_within_pages_is_repaired_or_replaced(cleaned):
    kept = texts_by_id(cleaned[0])
    original = runpy.run_path(str(CRAWL / "make_web_text.py"))["QUOTES"]
    marks = {"email": "[email]", "phone": "[phone]", "ip": "[ip]", "key": "[key]"}
    for page, fault in FAULTS.items():
        if fault in marks:
            assert kept[page].count(marks[fault]) == 1
            assert "@" not in kept[page]
            assert "AKIA" not in kept[page]
        if fault == "unicode":
            assert any(quote in kept[page] for quote in original)


def test_of_copies_the_first_is_kept(cleaned):
    kept, pages = texts_by_id(cleaned[0]), crawl()
    for page, fault in FAULTS.items():
        if fault == "exact":
            first = next(name for name, text in pages.items() if text == pages[page])
            assert first in kept
            assert page not in kept


def test_the_shipped_crawl_is_what_its_script_writes(tmp_path):
    runpy.run_path(str(CRAWL / "make_web_text.py"))["make"](tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["faults.json", "pages-1.jsonl.gz", "pages-2.jsonl.gz", "quiz.jsonl"]
    for name in names:
        opened = gzip.open if name.endswith(".gz") else open
        assert opened(tmp_path / name).read() == opened(CRAWL / name).read()


# What is written -----------------------------------------------------------------------------------------------------


def test_the_result_is_a_corpus_for_prepare_and_the_next_step_is_printed(cleaned):
    output, lines = cleaned
    assert list(read_texts(output / "documents")) == list(texts_by_id(output).values())
    assert lines[-1].endswith(f"bmtk prepare --train_file {output / 'documents'} --output_dir {output}-tokens")
    assert not (output / ".work").exists()


def test_the_table_in_the_terminal_fits_and_has_a_line_for_each_rule(cleaned):
    lines = cleaned[1][cleaned[1].index("") + 1 :]
    assert [line.split()[0] for line in lines[1 : len(RULES) + 1]] == list(RULES)
    assert lines[len(RULES) + 1].startswith("Of 195 documents 145 are kept (74.4%), and of 169 k characters ")
    assert max(map(len, lines[: len(RULES) + 2])) <= 119


def test_the_page_shows_examples_and_no_secret(cleaned):
    page = (cleaned[0] / "report.html").read_text()
    assert "too few stop words" in page
    assert "Der Müller reparierte" in page  # an example of the language rule
    assert "Write to [email] to order" in page
    assert "mill-house" not in page
    assert "AKIA" not in page
    assert "<script" not in page


def test_hostile_texts_do_not_break_the_page(tmp_path):
    pages = write_jsonl(tmp_path / "a.jsonl", ["<script>alert(1)</script>", "{{ 7 * 7 }} \u202e x", "fine words here"])
    run("--input", pages, "--output_dir", tmp_path / "out", "--rules", "length", "--min_words", 20, config=None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "\u202e" not in page


def test_a_page_of_which_repair_leaves_nothing_is_removed_and_counted_as_it_was(tmp_path):
    pages = write_jsonl(tmp_path / "a.jsonl", ["\x07\x08", "fine words here"])
    run("--input", pages, "--output_dir", tmp_path / "out", "--rules", "unicode", config=None)
    step = json.loads((tmp_path / "out" / "report.json").read_text())["rules"][0]
    reason = step["reasons"]["removed"]["nothing is left"]
    assert (step["removed"], reason["documents"], reason["characters"]) == (1, 1, 2)
    assert list(texts_by_id(tmp_path / "out").values()) == ["fine words here"]


def test_parquet_holds_the_same_documents(tmp_path, pages):
    common = ("--input", *pages, "--rules", "length", "--min_words", 20, "--num_examples", 0)
    run(*common, "--output_dir", tmp_path / "a", config=None)
    run(*common, "--output_dir", tmp_path / "b", "--output_format", "parquet", config=None)
    table = pyarrow.parquet.read_table(tmp_path / "b" / "documents" / "00000.parquet")
    assert dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)) == texts_by_id(tmp_path / "a")
    assert list(read_texts(tmp_path / "b" / "documents")) == list(read_texts(tmp_path / "a" / "documents"))


def test_rows_that_cannot_be_read_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a first page"}\n{"text": \n{"text": "a second"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not a line of JSON"):
        run("--input", path, "--output_dir", tmp_path / "out", "--rules", "length", config=None)
    lines = run(
        *("--input", path, "--output_dir", tmp_path / "other", "--rules", "length", "--on_corrupt", "skip"),
        config=None,
    )
    assert any(line.startswith("left out: 1 row that could not be read, the first: ") for line in lines)
    assert list(texts_by_id(tmp_path / "other").values()) == ["a first page", "a second"]


def test_texts_of_any_format_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.csv").write_text('text,n\n"three, four",1\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "six"}\n'))
    run("--input", tmp_path, "--output_dir", tmp_path / "out", "--rules", "length", "--sample_by", "line", config=None)
    found = texts_by_id(tmp_path / "out")
    assert found == {
        "a.txt/1": "one",
        "a.txt/2": "two",
        "b.csv/1": "three, four",
        "c.parquet/1": "five",
        "d.jsonl.gz/1": "six",
    }


# Whoever does the work, and when -------------------------------------------------------------------------------------


def test_how_a_corpus_is_divided_does_not_change_what_is_kept(tmp_path, pages, cleaned, small_shards):
    run("--input", *pages, "--output_dir", tmp_path / "out", "--workers", 1)
    assert len(list((tmp_path / "out" / "documents").iterdir())) >= 8
    assert sorted(texts_by_id(tmp_path / "out").values()) == sorted(texts_by_id(cleaned[0]).values())


DRIVER = "import sys, bmtk_cli, bmtk.data.shard_plan as p; p.SHARD_BYTES = 40_000; bmtk_cli.main(sys.argv[1:])"


def start(output: Path, pages, *argv) -> subprocess.Popen:
    """The command in a process group of its own, with several shards."""
    words = ["clean", "--config", CONFIG, "--input", *pages, "--output_dir", output, *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, *map(str, words)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_several_workers_and_kills_leave_the_same_bytes(tmp_path, pages, monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 40_000)
    whole, killed = tmp_path / "1" / "out", tmp_path / "2" / "out"
    run("--input", *pages, "--output_dir", whole, "--workers", 1)
    for stage, kill in (
        ("sieve", subprocess.Popen.kill),
        ("keep", lambda process: os.killpg(process.pid, signal.SIGKILL)),
    ):
        process = start(killed, pages, "--workers", "2")
        while not any((killed / ".work" / "tasks" / stage).glob("completions/*")) and process.poll() is None:
            time.sleep(0.01)
        kill(process)
        process.communicate(timeout=60)  # what is printed ends when the last worker has ended
    process = start(killed, pages, "--workers", "2")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert same_folders(whole, killed)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_and_not_a_wait(tmp_path):
    from bmtk.cleaning.executors import run_locally
    from bmtk.cleaning.stages import Stage

    settings = read_settings(["--input", "a.txt", "--rules", "length", "--workers", "2"], ROOT)
    stage = Stage("die", "look at what is there", [KilledStep()], 3)
    with pytest.raises(UserError, match=r"a worker process was killed while it did this: look at what is there\."):
        run_locally([stage], tmp_path / "tasks", settings, print)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
def test_ray_on_one_machine_leaves_the_same_bytes(tmp_path, pages, monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 40_000)
    run("--input", *pages, "--output_dir", tmp_path / "1" / "out", "--workers", 1)
    process = start(tmp_path / "2" / "out", pages, "--workers", "2", "--executor", "ray", "--memory_gb", "0.2")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert same_folders(tmp_path / "1" / "out", tmp_path / "2" / "out")


def test_a_killed_run_goes_on_at_the_task(tmp_path, pages, small_shards, monkeypatch):
    """Interrupted in the middle of the third shard: the first two are not read again."""
    from bmtk.cleaning import documents

    pieces_of, read = documents.pieces_of, []

    def stopped(file, on_bad):
        read.append(file.span)
        if len(read) == 3:
            raise KeyboardInterrupt
        yield from pieces_of(file, on_bad)

    common = ("--input", *pages, "--output_dir", tmp_path / "out", "--workers", 1)
    monkeypatch.setattr(documents, "pieces_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*common)
    monkeypatch.setattr(
        documents, "pieces_of", lambda file, on_bad: (read.append(file.span), pieces_of(file, on_bad))[1]
    )
    lines = run(*common)
    assert "going on where the last run stopped" in lines
    assert any(", 2 of them before, " in line for line in lines)
    assert read[2] == read[3]
    assert len(read) == len(list((tmp_path / "out" / "documents").iterdir())) + 1
    run("--input", *pages, "--output_dir", tmp_path / "1" / "out", "--workers", 1)
    assert same_folders(tmp_path / "out", tmp_path / "1" / "out")


def test_a_finished_run_does_nothing_and_says_so(tmp_path, pages):
    common = ("--input", *pages, "--output_dir", tmp_path / "out", "--rules", "length")
    first = run(*common, config=None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "documents").iterdir()}
    again = run(*common, "--workers", 2, config=None)
    assert "finished before: neither the settings nor the input has changed" in again
    assert again[again.index("") :] == first[first.index("") :]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "documents").iterdir()} == before


def test_another_config_or_input_in_the_same_folder_is_refused_or_starts_again(tmp_path, pages):
    page = Path(shutil.copy(pages[0], tmp_path / "a.jsonl"))
    common = ("--input", page, "--output_dir", tmp_path / "out", "--rules", "length", "--min_words")
    run(*common, 20, config=None)
    with pytest.raises(UserError, match=r"another run: min_words was 20, and is 30\. Choose another .* --overwrite"):
        run(*common, 30, config=None)
    write_jsonl(page, ["a new page"])
    with pytest.raises(UserError, match="the inputs have changed"):
        run(*common, 20, config=None)
    run(*common, 2, "--overwrite", config=None)
    assert list(texts_by_id(tmp_path / "out").values()) == ["a new page"]


def test_a_folder_with_other_files_is_not_touched(tmp_path, pages):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty \(thesis\.txt\) and no folder of bmtk clean"):
        run("--input", *pages, "--output_dir", tmp_path / "out", "--rules", "length", config=None)


# What the user can mend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rules", "unicod"], r"rules: 'unicod' is unknown; did you mean 'unicode'\?"),
        (["--rules", "length", "--min_word", "3"], r"unknown key 'min_word'; did you mean 'min_words'\?"),
        (["--rules", "scrub", "--scrub", "mail"], r"scrub: 'mail' is unknown; .*choose from email, phone, ip, key"),
        (["--rules", "length", "--executor", "slrm"], r"executor: 'slrm' is unknown; did you mean 'slurm'\?"),
        (["--rules", "length", "--output_format", "csv"], r"output_format: 'csv' is unknown; .*jsonl\.gz, parquet"),
        (["--rules", "length", "--executor", "slurm"], "executor=slurm needs slurm_partition"),
        (["--rules", "language"], "the rule language needs languages; set it, or leave language out of rules"),
        (["--rules", "decontaminate"], "the rule decontaminate needs evaluation_sets"),
        (["--rules", "near", "--near_buckets", "0"], r"near_buckets=0 must be above 0"),
        (["--rules", "length", "--workers", "0"], r"workers=0 must be above 0"),
        (["--rules", "repetition", "--max_top_ngrams", "0.2"], r"max_top_ngrams=\[0\.2\] must have 3 numbers"),
        ([], "rules is empty; choose some of unicode, length"),
        (["--rules", "decontaminate", "--evaluation_sets", "quiz"], "'quiz' is not NAME=SOURCE"),
        (["--rules", "decontaminate", "--evaluation_sets", "a={quiz}#x"], "text_column='x' is not in"),
        (
            ["--rules", "language", "--languages", "english"],
            r"languages: 'english' is unknown; choose from the ISO 639 codes .*en",
        ),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_sentence(argv, message, tmp_path, pages):
    words = [word.replace("{quiz}", str(CRAWL / "quiz.jsonl")) for word in argv]
    with pytest.raises(UserError, match=message):
        run("--input", pages[0], "--output_dir", tmp_path / "out", *words, config=None)


def test_missing_input_is_named(tmp_path):
    with pytest.raises(UserError, match="input is empty; name the files"):
        run("--rules", "length", "--output_dir", tmp_path / "out", config=None)
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl' does not exist"):
        run("--input", tmp_path / "gone.jsonl", "--rules", "length", "--output_dir", tmp_path / "out", config=None)


def test_a_setting_of_a_rule_that_is_not_used_is_noted(tmp_path, pages):
    argv = ("--input", pages[0], "--output_dir", tmp_path / "out", "--rules", "length", "--languages", "en")
    assert run(*argv, config=None)[0] == "note: languages is not used: language is not among rules"


def test_the_settings_of_rules_that_are_not_used_decide_nothing(tmp_path, pages):
    common = ("--input", pages[0], "--output_dir", tmp_path / "out", "--rules", "length")
    run(*common, config=None)
    assert "finished before: neither the settings nor the input has changed" in run(
        *common, "--near_seed", 5, config=None
    )
