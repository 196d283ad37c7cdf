"""Write the model card of a run: a README.md with Hub front matter, made from the records of the run only.

The records are `run.json` (settings, data, results) and `history.jsonl` (one line per log). Any of their keys may be
missing; what is there is shown. Their texts are of unknown origin, so they are redacted when read (secrets, user names
in paths, control characters) and escaped when written.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader

from bmtk.files import write_text

from .formatting import (
    escape_markdown,
    fence,
    format_compact,
    format_number,
    format_seconds,
    is_chosen,
    is_number,
    is_positive,
    is_quality,
    metric_label,
    one_line,
    plural,
    show,
    slug,
    speed_of,
    split_metric,
)
from .launch import install_command
from .redaction import scrub_text
from .results import metric_rows, worse_than_baseline
from .run_record import RunRecord, TaskDescription, read_history

TEMPLATES = Path(__file__).parent / "templates"

PROCEDURE = (
    *("optimizer", "optim", "learning_rate", "muon_learning_rate", "muon_momentum"),
    *("schedule", "lr_scheduler_type", "warmup_steps"),
    *("warmup_ratio", "decay_fraction", "min_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("num_train_steps", "max_steps", "num_train_epochs", "batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "micro_batch_size", "context_length", "max_length", "precision", "seed"),
)
LICENCES = frozenset(
    "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0 agpl-3.0 "
    "lgpl-3.0 mpl-2.0 openrail unlicense".split()
)
LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|multilingual|code")  # ISO 639, and what else the Hub knows
LOCAL_FOLDERS = frozenset(
    "bmtk data datasets examples models outputs recipes tests".split()
)  # not the owner in a Hub id
DATA_SUFFIXES = frozenset(".txt .csv .tsv .json .jsonl .parquet".split())
NEEDS = {
    "muon_learning_rate": ("optimizer", "muon"),
    "muon_momentum": ("optimizer", "muon"),
    "decay_fraction": ("schedule", "wsd"),
}  # else without effect


def write_card(directory: str | Path, *, repo_id: str | None = None) -> Path:
    """Write `<directory>/README.md` from the run's records and return its path; `repo_id` is named in the examples.

    Raises: FileNotFoundError or UserError when `run.json` is missing or is not a JSON object.
    """
    run = RunRecord.read(directory)
    last_step = max((row["step"] for row in read_history(directory)), default=None)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(md=escape_markdown, fence=fence)
    text = environment.get_template("card.md").render(
        front_matter=front_matter(run, repo_id or run_title(run)).to_yaml(),
        title=repo_id.split("/")[-1] if repo_id else run_title(run),
        run=run,
        description=describe(run),
        status=run_status(run, last_step),
        warning=worse_than_baseline(run),
        install=install_command(),
        has_own_code=(run.model.model_type or "").startswith("bm_"),
        example=usage_example(run.description, repo_id or local_name(directory), run.samples),
        metrics=[row[1:] for row in metric_rows(run)],
        data=data_rows(run),
        procedure=procedure_rows(run),
        environment=environment_rows(run),
        limits=run.description.limits,
    )
    path = Path(directory) / "README.md"
    write_text(path, re.sub(r"\n{3,}", "\n\n", text))
    return path


def run_title(run: RunRecord) -> str:
    """Name of the model and its data in one line."""
    name = run.model.class_name or run.model.model_type or "Model"
    return one_line(f"{name} on {run.data_name}" if run.data_name else name)


def describe(run: RunRecord) -> str:
    """Say in one sentence what the model is and where it comes from."""
    model, noun = run.model, run.description.noun
    size = f" with {format_compact(model.num_parameters)} parameters" if model.num_parameters else ""
    adapter = f" with a {'LoRA' if model.adapter == 'lora' else model.adapter} adapter" if model.adapter else ""
    origin = f"fine-tuned{adapter} from {model.base_model}" if model.base_model else "trained from scratch"
    name = f" on {run.data_name}" if run.data_name else ""
    article = "An" if noun.startswith(tuple("aeiou")) else "A"
    return one_line(f"{article} {noun}{size}, {origin}{name}.")


def run_status(run: RunRecord, last_step: float | None) -> str:
    """Say what is missing when the run did not reach its end; empty when it did."""
    config = run.config
    planned = next((config[key] for key in ("num_train_steps", "max_steps") if is_positive(config.get(key))), None)
    gap = config["logging_steps"] if is_positive(config.get("logging_steps")) else 1
    where = f" at step {last_step:,.0f}" if last_step is not None else " before its first log line"
    if planned and (last_step or 0) + max(gap, 1) <= planned and (last_step is not None or not run.metrics):
        verb = "Stopped" if run.metrics else "Interrupted"
        return f"{verb}{where} of {planned:,.0f}."
    return "" if run.metrics else f"Not finished: no final evaluation was recorded; the log ends{where}."


def data_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Return (split, sizes) for each split that the run describes."""
    splits = ((name, run.data.get(name)) for name in ("train", "validation", "test"))
    corpora = run.data.get("corpora")
    sized = ((name, split) for name, split in splits if isinstance(split, dict))
    return [
        (
            name,
            ", ".join(
                f"{format_number(count)} {plural(unit, count)}" for unit, count in split.items() if is_number(count)
            ),
        )
        for name, split in sized
    ] + [corpus_row(one) for one in (corpora if isinstance(corpora, list) else ()) if isinstance(one, dict)]


def corpus_row(corpus: Mapping[str, Any]) -> tuple[str, str]:
    """Return (name, weight, share of the rows that were read, epochs) of a corpus that was mixed with others."""
    numbers = {key: corpus[key] if is_number(corpus.get(key)) else 0.0 for key in ("weight", "share", "epochs")}
    shown = f"weight {numbers['weight']:g}, {numbers['share']:.2%} of the rows read, {numbers['epochs']:.3g} epochs"
    return f"corpus {corpus.get('name')}", shown


def procedure_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Return the hyper-parameters needed to judge or repeat the run, then its time and speed."""
    config = run.config
    rows = [
        (key, show(config[key]))
        for key in PROCEDURE
        if is_chosen(key, config.get(key)) and (key not in NEEDS or config.get(NEEDS[key][0]) in (None, NEEDS[key][1]))
    ]
    if run.train_seconds is not None:
        rows.append(("training time", format_seconds(run.train_seconds)))
    if speed := speed_of(run.throughput):
        rows.append((speed[0], format_compact(speed[1])))
    if run.mfu is not None:
        rows.append(("model FLOPs utilisation", f"{100 * run.mfu:.1f} %"))
    return rows


def environment_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Return the named facts of the machine and its software; never shell variables (their names are upper case)."""
    facts = run.environment.items()
    return [(key, show(value)) for key, value in facts if not key.isupper() and not isinstance(value, (dict, list))]


# ------------------------------------------------------------------------------------------------ front matter


def front_matter(run: RunRecord, model_name: str) -> ModelCardData:
    """Return the Hub metadata that the run knows; what it does not know is left out."""
    tag = run.description.pipeline_tag
    base, dataset = hub_id(run.model.base_model), hub_id(run.data.get("source"), needs_owner=True)
    tags = ["bmtk", *(slug(item) for item in (run.model.model_type, run.model.adapter) if item)]
    licence = slug(run.license or run.config.get("license") or "").lower()
    languages = [*run.language, *([] if run.language else [str(run.data.get("language"))])]
    languages = [code for code in languages if LANGUAGE.fullmatch(code)]
    return ModelCardData(
        language=(languages if len(languages) > 1 else languages[0]) if languages else None,
        license=(licence if licence in LICENCES else "other") if licence else None,
        license_name=licence if licence and licence not in LICENCES else None,
        library_name="transformers",
        pipeline_tag=tag,
        tags=tags,
        datasets=[dataset] if dataset else None,
        base_model=base,
        base_model_relation=("adapter" if run.model.adapter else "finetune") if base else None,
        model_name=one_line(model_name).split("/")[-1],
        eval_results=list(eval_results(run, tag or "other", dataset)) or None,
    )


def eval_results(run: RunRecord, task_type: str, dataset: str | None) -> Iterator[EvalResult]:
    """Yield one model-index entry per finite metric (the Hub cannot store NaN)."""
    name = one_line(run.data_name or dataset or "unnamed")
    for key, value in run.metrics.items():
        if is_quality(key) and is_number(value) and math.isfinite(value):
            split, metric = split_metric(key)
            yield EvalResult(
                task_type=task_type,
                dataset_type=dataset or slug(name),
                dataset_name=name,
                dataset_split=split or None,
                metric_type=slug(metric),
                metric_name=one_line(metric_label(key)),
                metric_value=float(f"{value:.6g}"),
            )


def hub_id(name: str | None, *, needs_owner: bool = False) -> str | None:
    """Return `name` when it reads as a Hub id and no file of that name exists here, else None."""
    pattern = r"(?:\w[\w.-]{0,95}/)" + ("" if needs_owner else "?") + r"\w[\w.-]{0,95}"
    if not isinstance(name, str) or not re.fullmatch(pattern, name, re.ASCII) or Path(name).exists():
        return None
    folder = name.split("/")[0] if "/" in name else ""
    is_path = folder in LOCAL_FOLDERS or (folder and Path(folder).is_dir()) or Path(name).suffix in DATA_SUFFIXES
    return None if is_path else name


def local_name(directory: str | Path) -> str:
    """Return the folder as it can be typed here: relative when it lies under the working directory."""
    name = scrub_text(Path(directory).as_posix())
    return Path(directory).name if name.startswith(("/", "~")) else name


def usage_example(about: TaskDescription, name: str, samples: list[dict[str, str]]) -> dict[str, str]:
    """Return the lines of the loading example: imports, then the call with `{remote}` for trust_remote_code."""
    tag, auto_class = about.pipeline_tag, about.auto_class
    lines = [f"name = {json.dumps(name)}  # this repository, or a folder that holds it"]
    lines += [f"model = {auto_class}.from_pretrained(name{{remote}})"]
    imported = f"from transformers import {auto_class}"
    if processor := about.processor_class:
        variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
        lines += [f"{variable} = {processor}.from_pretrained(name{{remote}})"]
        imported += f", {processor}"
    if tag in ("text-generation", "text-classification", "token-classification"):
        text = next((sample["prompt"] for sample in samples if sample["prompt"]), "Once upon a time, there was")
        length = ", max_new_tokens=60" if tag == "text-generation" else ""
        imported += ", pipeline"
        whole_words = ', aggregation_strategy="first"' if tag == "token-classification" else ""
        lines += [f'pipe = pipeline("{tag}", model=model, tokenizer=tokenizer{whole_words})']
        lines += [f"print(pipe({json.dumps(text, ensure_ascii=False)}{length}))"]
    elif tag == "translation":  # transformers 5 has no pipeline for it
        text = next((sample["prompt"] for sample in samples if sample["prompt"]), "A text of your own.")
        lines += [f'inputs = tokenizer([{json.dumps(text, ensure_ascii=False)}], return_tensors="pt")']
        lines += ["print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))"]
    body = "\n".join([imported, "", *lines])
    return {"plain": body.replace("{remote}", ""), "remote": body.replace("{remote}", ", trust_remote_code=True")}
