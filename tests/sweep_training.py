"""Repeat every test that trains over seeds, CPU instruction sets and threads, and name those that hold by luck.

A test that trains a model must pass by a margin, not by the last bits of one processor: another instruction set sums
in another order, and after some tens of steps the weights differ as much as those of another seed. So each test marked
`trains` is run with several seeds in each setting, one pytest process per setting:

    python tests/sweep_training.py                                         # everything: hours
    python tests/sweep_training.py --capabilities unset --threads 1        # this processor as it is: half an hour
    python tests/sweep_training.py --seeds 5 -k question_answering         # after a change to some of the tests
    python tests/sweep_training.py --capabilities avx512:AVX512_CORE_BF16  # as on a processor without AMX

A capability is a value of ATEN_CPU_CAPABILITY (default, avx2 or avx512: which of its compiled kernels PyTorch uses) or
`unset`. Behind a colon may stand a value of ONEDNN_MAX_CPU_ISA (the best instructions that oneDNN may use). A
processor can restrict itself to older instructions, and lacks newer ones.

Seed 0 is that of a plain run of pytest. The environment variable BMTK_TEST_SEED names another first seed: 20 tries
twenty others, and `BMTK_TEST_SEED=7 python -m pytest -m trains -k NAME` repeats a failure of seed 7. It is meant for
tests marked `trains` only.

Exit code: 0 if every test passed in every setting, 1 if one failed, 2 if a setting could not be run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
CAPABILITIES = ["default", "avx2", "avx512", "unset", "avx512:AVX512_CORE_BF16", "avx2:AVX2"]
SEED = re.compile(r"-?seed(\d+)(?=[-\]])")
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")


class Setting(NamedTuple):
    """How one pytest process is started."""

    capability: str
    threads: int

    def __str__(self) -> str:
        return f"{self.capability}/{self.threads}"

    def environment(self) -> dict[str, str]:
        aten, _, onednn = self.capability.partition(":")
        asked = {"ATEN_CPU_CAPABILITY": "" if aten == "unset" else aten, "ONEDNN_MAX_CPU_ISA": onednn}
        inherited = {name: value for name, value in os.environ.items() if name not in asked}
        # conftest.py sets OMP_NUM_THREADS by BMTK_TEST_THREADS; here it is set too, for what is imported before.
        asked |= {
            "BMTK_TEST_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
        }
        return inherited | {name: value for name, value in asked.items() if value}


class Result(NamedTuple):
    """One test with one seed in one setting."""

    test: str
    seed: int
    outcome: str  # passed, failed or skipped
    seconds: float


def capability(text: str) -> str:
    aten = text.partition(":")[0]
    if aten not in ("default", "avx2", "avx512", "unset"):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with default, avx2, avx512 or unset")
    return text


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    usage, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=usage, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="seeds per test and setting (default: 20)")
    parser.add_argument(
        "--capabilities", nargs="+", type=capability, default=CAPABILITIES, metavar="ATEN[:ONEDNN]",
        help=f"instruction sets (default: {' '.join(CAPABILITIES)})",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="threads (default: 1 2)")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that match, as pytest's -k")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep pytest's output, a file per setting")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    settings = [Setting(*pair) for pair in ((name, count) for name in args.capabilities for count in args.threads)]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for number, setting in enumerate(settings, start=1):
            say(f"[{number}/{len(settings)}] {setting}: {args.seeds} seeds")
            found[setting] = sweep(setting, args, folder / f"{str(setting).replace('/', '-').replace(':', '-')}.log")
    say("\n" + table(found))
    if not all(found.values()):
        return 2
    return int(any(result.outcome == "failed" for results in found.values() for result in results))


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  this is a program, though it lies beside the tests


def sweep(setting: Setting, args: argparse.Namespace, log: Path) -> list[Result]:
    """All tests with all seeds in one process; failures are named as they happen, and progress once in 30 seconds."""
    report = log.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-m", "trains", "--training-seeds", str(args.seeds), "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *(["-k", args.k] if args.k else [])]
    started, shown, done, failed = time.monotonic(), time.monotonic(), 0, 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=setting.environment(), **pipes) as child, log.open("w") as file:
        for line in child.stdout:
            file.write(line)
            if not (outcome := OUTCOME.match(line)):
                continue
            done += 1
            if outcome[2] in ("FAILED", "ERROR"):
                failed += 1
                say(f"  failed: {outcome[1]}")
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                say(f"  {done} done, {failed} failed, {shown - started:.0f} s")
    results = list(read_report(report)) if report.exists() else []
    say(f"  {len(results)} runs, {failed} failed, {time.monotonic() - started:.0f} s")
    if not results:
        say("".join(log.read_text().splitlines(keepends=True)[-20:]) + f"  nothing was run: pytest {child.returncode}")
    return results


def read_report(path: Path) -> Iterator[Result]:
    """The results in a file of pytest's --junitxml."""
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname').removeprefix('tests.')}::{case.get('name')}"
        seed = SEED.search(name)
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        test = SEED.sub("", name).replace("[]", "").replace("[-", "[")
        yield Result(test, int(seed[1]) if seed else 0, outcome, float(case.get("time")))


def table(found: dict[Setting, list[Result]]) -> str:
    """A line per test that failed somewhere and a column per setting (failures of runs), and their seeds."""
    tests = {result.test: None for results in found.values() for result in results}
    by_test = {setting: {test: [] for test in tests} for setting in found}
    for setting, results in found.items():
        for result in results:
            by_test[setting][result.test].append(result)
    lines, seeds = ["failures of runs | " + " | ".join(map(str, found)) + " | test"], []
    for test in tests:
        cells = []
        for setting in found:
            runs = [result for result in by_test[setting][test] if result.outcome != "skipped"]
            bad = [result.seed for result in runs if result.outcome == "failed"]
            cells.append(f"{len(bad)} of {len(runs)}")
            seeds += [f"  {test}  {setting}: {' '.join(map(str, bad))}"] if bad else []
        if any(not cell.startswith("0 of") for cell in cells):
            lines.append(" | ".join(["", *cells, test]))
    skipped = {result.test for results in found.values() for result in results if result.outcome == "skipped"}
    lines += ["", f"{len(tests)} tests; skipped here: {len(skipped)}; failed somewhere: {len(lines) - 1}"]
    return "\n".join([*lines, *(["", "seeds that failed:", *seeds] if seeds else [])])


if __name__ == "__main__":
    sys.exit(main())
