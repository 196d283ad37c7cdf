"""Kill a run at each of its writes, repeat its command, and compare the results with those of an undisturbed run.

    python tests/sweep_kills.py                          # every write of both recipes: about half an hour
    python tests/sweep_kills.py --recipes finetune --every 7
    python tests/sweep_kills.py --signal TERM            # the same with a signal that the run may answer

A write is what Python reports of one (sys.addaudithook): a file in the run's folder that is opened to be written, a
rename, a deletion, a new folder. The process is killed before it, so whatever the write before has left in a buffer is
lost. A try passes if the same command then ends with exit code 0, with the very weights and metrics of the run that
was not killed, and without an unfinished file or folder. (Linux and macOS: each try is a fork of one process that has
imported everything.)

Exit code: 0 if every try passed, else 1.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree")
SMALL = {
    "pretrain": ["--num_train_steps", "3", "--save_steps", "1", "--eval_steps", "2", "--logging_steps", "1"],
    "finetune": ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "true"],
}


def command(recipe: str, folder: Path) -> list[str]:
    return ["--preset", "smoke", "--output_dir", str(folder), *SMALL[recipe]]


def forked(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a fork whose output goes to `log`; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(file, stream)
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(recipe: str, folder: Path, on_write: Callable[[str], None] | None = None) -> None:
    """A whole run in this process, which calls `on_write` before each of its writes below `folder`."""
    from bmtk.process import clean_errors
    from bmtk.training.signals import ending_signals
    from recipes import finetune, pretrain

    def hook(event: str, args: tuple[object, ...]) -> None:
        is_write = event in CHANGES or (event == "open" and is_writing(args))
        if is_write and str(args[0]).startswith(str(folder)):
            on_write(f"{event} {args[0]}")

    def is_writing(args: tuple[object, ...]) -> bool:
        return bool(isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))

    os.chdir(ROOT)
    if on_write:
        sys.addaudithook(hook)
    with clean_errors(), ending_signals():
        {"pretrain": pretrain, "finetune": finetune}[recipe].main(command(recipe, folder))


def writes(recipe: str, folder: Path) -> list[str]:
    """The writes of a run that is not killed, whose folder stays for comparison."""
    listed = folder.with_name("writes")

    def note(what: str) -> None:
        with listed.open("a") as file:
            file.write(what + "\n")

    if code := forked(lambda: run(recipe, folder, note), folder.with_name("log")):
        sys.exit(f"the run that is not killed ended with {code}:\n{folder.with_name('log').read_text()}")
    return listed.read_text().splitlines()


def killed_at(recipe: str, folder: Path, number: int, how: signal.Signals) -> int:
    """Run with `how` sent before write `number`, counted from 0; the exit code."""
    left = [number]

    def kill(what: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), how)
        left[0] -= 1

    return forked(lambda: run(recipe, folder, kill), folder.with_name("log"))


def differences(folder: Path, whole: Path) -> Iterator[str]:
    """In what the run that was killed and repeated differs from the whole one."""
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (folder / name).is_file() or (folder / name).read_bytes() != (whole / name).read_bytes():
            yield f"{name} is another"
    metrics = [json.loads((one / "run.json").read_text())["metrics"] for one in (folder, whole)]
    if metrics[0] != metrics[1]:
        yield f"metrics {metrics[0]}, not {metrics[1]}"
    yield from (f"{path.relative_to(folder)} is left" for path in folder.rglob("*partial*"))


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  this is a program, though it lies beside the tests


def attempt(recipe: str, number: int, whole: Path, how: signal.Signals) -> str:
    """What is wrong after a kill before write `number` and the same command again; "" if nothing is."""
    folder = whole.with_name("run")
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name("log").unlink(missing_ok=True)
    first = killed_at(recipe, folder, number, how)
    allowed = {-how, 128 + how, 0} if how != signal.SIGKILL else {-how}  # 0: nothing was left to be stopped
    if first not in allowed:
        return f"ended with {first} when it was killed"
    if code := forked(lambda: run(recipe, folder), folder.with_name("log")):
        return f"the same command ended with {code}: {folder.with_name('log').read_text()[-600:]}"
    return "; ".join(differences(folder, whole))


def sweep(recipe: str, every: int, how: signal.Signals) -> int:
    """Try every `every`th write; the number of those after which something is wrong."""
    with tempfile.TemporaryDirectory(prefix="sweep-kills-") as scratch:
        whole, started, failed = Path(scratch) / "whole", time.monotonic(), 0
        found = writes(recipe, whole)
        chosen = range(0, len(found), every)
        say(f"{recipe}: {len(found)} writes, {len(chosen)} of them tried")
        for number in chosen:
            if wrong := attempt(recipe, number, whole, how):
                failed += 1
                say(f"  before write {number} ({found[number].replace(str(whole), 'RUN')}): {wrong}")
        say(
            f"{recipe}: {how.name} before {len(chosen)} writes, {len(chosen) - failed} survived, {failed} failed, "
            f"{time.monotonic() - started:.0f} s",
        )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every Nth write only")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "USR1"), default="KILL")
    args = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    import recipes.finetune
    import recipes.pretrain  # noqa: F401  imported once, for all forks

    failed = sum(sweep(recipe, args.every, getattr(signal, f"SIG{args.signal}")) for recipe in args.recipes)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
