"""The table of speed: ours beside peers, in turns; printed, written as JSON, and drawn.

    python benchmarks/run.py --list
    python benchmarks/run.py --all                                    # about an hour on two cores
    python benchmarks/run.py lm_step ptb_lstm --repeats 7
    python benchmarks/run.py lm_time_to_loss --nanogpt DIR            # DIR: a clone of github.com/karpathy/nanoGPT
    python benchmarks/run.py image_classification --clock processor   # CPU seconds, where others use the machine too

A ratio is ours over the peer's, the median over the turns, with the least and the most.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project; a script has only its own folder

from benchmarks import (  # noqa: F401 - enter their rows
    cleaning,
    data,
    finetuning,
    gpu,
    recurrent,
    shards,
    start,
    steps,
    time_to_loss,
)
from benchmarks.plot import draw
from benchmarks.rows import ROWS, Line, Settings, hardware_line, measured, record, show, write_json


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows; see --list")
    parser.add_argument("--all", action="store_true", help="every row that needs no GPU")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and what they measure")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant (default: 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn: to see that a row runs")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="which seconds (default: wall)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of fashion_mnist, cifar10_mini")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="clone of nanoGPT")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmarks"), help="folder of speed.json, speed.png"
    )
    args = parser.parse_args(argv)
    if args.list:
        return print_rows()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if unknown := set(args.names) - set(ROWS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    chosen = [one for name, one in ROWS.items() if name in args.names or (args.all and not one.is_gpu)]
    if not chosen:
        parser.error("name some rows, or give --all; --list prints them")
    with tempfile.TemporaryDirectory() as folder:
        paths = [path and path.resolve() for path in (args.data, args.nanogpt)]  # children have other folders
        settings = Settings(Path(folder), args.repeats, args.quick, args.clock, *paths)
        args.output.mkdir(parents=True, exist_ok=True)

        def keep(found: dict[str, list[Line]]) -> None:
            write_json(args.output / "speed.json", record(found, settings))

        found = measured(chosen, settings, apart=len(chosen) > 1, keep=keep)
    facts = show(found, settings)
    draw(found, args.output / "speed.png", title=hardware_line(facts["machine"]))
    print(f"\nwritten: {args.output / 'speed.json'}, {args.output / 'speed.png'}")


def print_rows() -> None:
    width = max(map(len, ROWS))
    for one in ROWS.values():
        print(f"{one.name:{width}}  {one.summary}{' (GPU)' if one.is_gpu else ''}")


if __name__ == "__main__":
    main(sys.argv[1:])
