"""`bmtk clean`: reads the settings, has done what is left to do in the output folder, and says what was done."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bmtk.arguments import RunConfig, read_yaml, with_shipped_data
from bmtk.errors import UserError
from bmtk.files import read_json, write_json
from bmtk.option_help import help_topic

from .arguments import CLASSES, DOCUMENTS, PACKAGES, WORK, Cleaning, cleaning

DESCRIPTION = """\
Clean a corpus by the rules of a YAML file, and report what each of them has removed.

  bmtk clean --config recipes/configs/cleaning/web_text.yaml     the shipped example
  bmtk clean --config my.yaml --rules unicode near --workers 8   the command line overrides the file

The documents that are kept, report.html and report.json are written to output_dir. Neither the executor nor the number
of workers changes a byte of them. Interrupted at any point, the same command goes on where it stopped.
"""
RECORD, LOCK = "clean.json", ".clean.lock"
Log = Callable[[str], None]


def read_settings(argv: list[str], recipes: Path) -> Cleaning:
    """The settings of a config file and a command line.  Exits after --help.  Raises: UserError."""
    if help_topic(argv) == "":
        argv = ["--help=all"]
    values = RunConfig({}, argv)
    if config := values.get("config"):
        path = Path(str(config))
        in_file = with_shipped_data(read_yaml(path), recipes)
        if isinstance(sets := in_file.get("evaluation_sets"), list):
            in_file["evaluation_sets"] = [_with_shipped_source(text, recipes) for text in sets]
        values = RunConfig(in_file, argv, path)
    return cleaning(values.bind(CLASSES, description=DESCRIPTION))


def _with_shipped_source(text: object, recipes: Path) -> str:
    """NAME=SOURCE#COLUMN with a source that is found also where the working folder is no clone."""
    name, equals, source = str(text).partition("=")
    source, mark, columns = source.partition("#")
    return f"{name}{equals}{with_shipped_data({'source': source}, recipes)['source']}{mark}{columns}"


def clean(settings: Cleaning, log: Log) -> None:
    """Do what is left to do, unless Slurm will do it later.  Raises: UserError."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"bmtk clean needs {', '.join(missing)}: pip install 'big-model-toolkit[clean]', or in a clone "
            "pip install -c constraints.txt '.[clean]'"
        )
    output = Path(settings.run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK, timeout=0):
            _clean(settings, output, log)
    except Timeout as error:
        raise UserError(
            f"another process is cleaning into {output}; wait for it, or choose another output_dir"
        ) from error


def _clean(settings: Cleaning, output: Path, log: Log) -> None:
    from .job import Job

    for remark in settings.unused():
        log(f"note: {remark}")
    log("reading what the corpus consists of ...")
    job = Job(settings, output)
    if settings.run.overwrite:
        _delete(output)
    is_begun = _check_record(output, job.record())
    if (output / "report.json").is_file():
        log("finished before: neither the settings nor the input has changed")
    else:
        if is_begun:
            log("going on where the last run stopped")
        write_json(output / RECORD, job.record())
        job.run(log)
    report = read_json(output / "report.json")
    if isinstance(report, dict):
        shutil.rmtree(output / WORK, ignore_errors=True)
        _say(report, output, log)


def _delete(output: Path) -> None:
    for name in (WORK, DOCUMENTS):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("report.json", "report.html", RECORD):
        (output / name).unlink(missing_ok=True)


def _check_record(output: Path, record: dict[str, Any]) -> bool:
    """Whether the same run has begun in the folder.  Raises: UserError if it holds anything else."""
    former = read_json(output / RECORD)
    if former is None:
        if others := sorted(path.name for path in output.iterdir() if not path.name.startswith(".")):
            raise UserError(
                f"output_dir={output} is not empty ({', '.join(others[:3])}) and no folder of bmtk clean; "
                "choose another"
            )
        return False
    if former == json.loads(json.dumps(record)):
        return True
    raise UserError(
        f"output_dir={output} holds the result of another run: {'; '.join(_differences(former, record))}. "
        "Choose another output_dir, or start again with --overwrite"
    )


def _differences(former: Any, now: dict[str, Any]) -> list[str]:
    if not isinstance(former, dict) or former.get("format") != now["format"]:
        return ["it was written by another version of bmtk"]
    found = []
    for part in ("settings", "versions"):
        old, new = former[part], json.loads(json.dumps(now[part]))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        found += [f"{name} was {old.get(name)}, and is {new.get(name)}" for name in names]
    for part in ("inputs", "evaluation_sets"):
        if former[part] != now[part]:
            found.append(f"the {part.replace('_', ' ')} have changed")
    return found


def _say(report: dict[str, Any], output: Path, log: Log) -> None:
    from .report import table

    log("")
    for line in table(report):
        log(line)
    folder = output / DOCUMENTS
    log(f"\nreport: {output / 'report.html'}\nnext:   bmtk prepare --train_file {folder} --output_dir {output}-tokens")
