"""Write the model card of a run: a README.md with Hub front matter, made of the run's own facts and nothing else.

The facts are `run.json` (what was run, on what, with which result) and `history.jsonl` (one line per log). Any of
their keys may be missing; what is there is shown. Their texts are of unknown origin, so they are scrubbed when read
(secrets, user names in paths, control characters) and escaped when written.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader

TEMPLATES = Path(__file__).parent / "templates"

# task: (Hub pipeline tag, Auto class, noun phrase, limits)
TASKS = {
    "causal_lm": (
        "text-generation",
        "AutoModelForCausalLM",
        "causal language model",
        "It continues text in the manner of its training data. What it writes may be false, offensive or copied from "
        "that data; it was not trained to follow instructions or to refuse.",
    ),
    "sequence_classification": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "text classifier",
        "It knows only the labels it was trained with, and its scores are not calibrated probabilities. Expect lower "
        "accuracy on text that differs from its training data.",
    ),
}
UNKNOWN_TASK = (None, "AutoModel", "model", "It was evaluated on the data named above only.")

PROCEDURE = (
    *("optimizer", "optim", "learning_rate", "muon_learning_rate", "schedule", "lr_scheduler_type", "warmup_steps"),
    *("warmup_ratio", "decay_fraction", "min_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("num_train_steps", "max_steps", "num_train_epochs", "batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "micro_batch_size", "context_length", "max_length", "precision", "seed"),
)
LICENCES = frozenset(
    "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0 agpl-3.0 "
    "lgpl-3.0 mpl-2.0 openrail unlicense".split()
)
LOCAL_FOLDERS = frozenset("bmtk data datasets examples models outputs recipes tests".split())  # not taken for owners
DATA_SUFFIXES = frozenset(".txt .csv .tsv .json .jsonl .parquet".split())
NOT_QUALITY = frozenset("epoch runtime samples_per_second steps_per_second model_preparation_time".split())

SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf_(?:oauth_|jwt_)?|api_org_|gh[opsur]_)[A-Za-z0-9]{10,}|(?:sk-|github_pat_)[\w-]{16,})",
    re.ASCII,
)
SECRET_NAME = r"(?:\w*(?:hub|hf|api|auth|access)[_-]?token|token|\w*(?:password|passwd|secret|api[_-]?key))"
SECRET_ASSIGNED = re.compile(rf"(?i)(--{SECRET_NAME}[\s=]+|\b{SECRET_NAME}=)(\"[^\"]*\"|'[^']*'|\S+)")
USER_HOME = re.compile(r"(?<![\w.~-])(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s\"']+|(?<![\w./~-])/root\b(?!-)")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
REDACTED = "[redacted]"


def write_card(directory: str | Path, *, repo_id: str | None = None) -> Path:
    """Write `<directory>/README.md` from the run's facts and return its path; `repo_id` is named in the examples.

    Raises: FileNotFoundError or ValueError when `run.json` is missing or is not a JSON object.
    """
    run = read_run(directory)
    last_step = max((row["step"] for row in read_history(directory)), default=None)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(md=escape_markdown, fence=fence)
    tag, auto_class, _, limits = TASKS.get(run["task"], UNKNOWN_TASK)
    text = environment.get_template("card.md").render(
        front_matter=front_matter(run, repo_id or run_title(run)).to_yaml(),
        title=repo_id.split("/")[-1] if repo_id else run_title(run),
        run=run,
        description=describe(run),
        status=run_status(run, last_step),
        has_own_code=str(run["model"].get("model_type", "")).startswith("bm_"),
        example=usage_example(tag, auto_class, repo_id or local_name(directory), run["samples"]),
        metrics=metric_rows(run),
        data=data_rows(run),
        procedure=procedure_rows(run),
        environment=environment_rows(run),
        limits=limits,
    )
    path = Path(directory) / "README.md"
    path.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8", newline="\n")
    return path


# --------------------------------------------------------------------------------------------- reading the facts


def read_run(directory: str | Path) -> dict:
    """Return the scrubbed `run.json`: the sections are always dictionaries, `samples` and `figures` always lists."""
    path = Path(directory) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the output folder of a training run, which holds run.json")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or run the recipe again") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} holds a JSON {type(run).__name__}, not an object; run the recipe again")
    figures = run.pop("figures", [])  # binary or markup: never shown as text, so not scrubbed
    run = scrub(run)
    if isinstance(run.get("command"), str):
        run["command"] = SECRET_ASSIGNED.sub(rf"\1{REDACTED}", run["command"])
    run["task"] = str(run.get("task"))
    for section in ("model", "data", "config", "metrics", "throughput", "environment"):
        run[section] = run[section] if isinstance(run.get(section), dict) else {}
    samples = run["samples"] if isinstance(run.get("samples"), list) else []
    run["samples"] = [
        {key: str(sample.get(key) or "") for key in ("prompt", "text")}
        for sample in samples
        if isinstance(sample, dict)
    ]
    run["figures"] = [figure for figure in figures if isinstance(figure, dict)] if isinstance(figures, list) else []
    return run


def read_history(directory: str | Path) -> Iterator[dict]:
    """Yield the rows of `history.jsonl` that have a step; a line cut short by an interruption is passed over."""
    path = Path(directory) / "history.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), (int, float)) and math.isfinite(row["step"]):
                yield row


def scrub(value):
    """Return JSON `value` without secrets, names of users in paths, absolute working paths and control characters."""
    if isinstance(value, dict):
        is_secret = re.compile(rf"(?i){SECRET_NAME}").fullmatch
        return {
            scrub_text(key): REDACTED if is_secret(key) and isinstance(item, str) and item else scrub(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value


def scrub_text(text: str) -> str:
    """Redact access tokens, shorten paths (relative to here, else to ~) and replace what cannot be printed."""
    text = UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = SECRET.sub(REDACTED, text)
    text = re.sub(r"(://)[^/\s@]+:[^/\s@]+@", rf"\1{REDACTED}@", text)
    for place, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if place != Path(place.anchor):
            inside = rf"(?<![\w.~-]){re.escape(str(place))}"
            text = re.sub(rf"{inside}(?![\w./-])", short.rstrip("/") or ".", re.sub(rf"{inside}/", short, text))
    return USER_HOME.sub("~", text)


# ------------------------------------------------------------------------------------------- telling the facts


def run_title(run: dict) -> str:
    """Name of the model and its data in one line."""
    name = run["model"].get("class") or run["model"].get("model_type") or "Model"
    data = run["data"].get("name")
    return one_line(f"{name} on {data}" if data else name)


def describe(run: dict) -> str:
    """Say in one sentence what the model is and where it comes from."""
    model, data = run["model"], run["data"]
    size = model.get("num_parameters")
    size = f" with {format_compact(size)} parameters" if size else ""
    noun = TASKS.get(run["task"], UNKNOWN_TASK)[2]
    adapter = (
        f" with a {'LoRA' if model['adapter'] == 'lora' else model['adapter']} adapter" if model.get("adapter") else ""
    )
    base = model.get("base_model")
    origin = f"fine-tuned{adapter} from {base}" if base else "trained from scratch"
    name = f" on {data['name']}" if data.get("name") else ""
    return one_line(f"A {noun}{size}, {origin}{name}.")


def run_status(run: dict, last_step: float | None) -> str:
    """Say what is missing when the run did not reach its end; empty when it did."""
    config = run["config"]
    planned = next((config[key] for key in ("num_train_steps", "max_steps") if is_positive(config.get(key))), None)
    gap = config["logging_steps"] if is_positive(config.get("logging_steps")) else 1
    where = f" at step {last_step:,.0f}" if last_step is not None else " before its first log line"
    if planned and (last_step or 0) + max(gap, 1) <= planned and (last_step is not None or not run["metrics"]):
        verb = "Stopped" if run["metrics"] else "Interrupted"
        return f"{verb}{where} of {planned:,.0f}."
    return "" if run["metrics"] else f"Not finished: no final evaluation was recorded; the log ends{where}."


def metric_rows(run: dict) -> list[tuple[str, str, float]]:
    """Return (label, shown value, value) of every metric, quality before speed, in the run's own order."""
    named = {key: value for key, value in run["metrics"].items() if is_number(value)}
    return [(metric_label(key), format_number(value), value) for key, value in named.items() if is_quality(key)]


def data_rows(run: dict) -> list[tuple[str, str]]:
    """Return (split, sizes) for each split that the run describes."""
    splits = ((name, run["data"].get(name)) for name in ("train", "validation", "test"))
    sized = ((name, split) for name, split in splits if isinstance(split, dict))
    return [
        (
            name,
            ", ".join(
                f"{format_number(count)} {plural(unit, count)}" for unit, count in split.items() if is_number(count)
            ),
        )
        for name, split in sized
    ]


def procedure_rows(run: dict) -> list[tuple[str, str]]:
    """Return the hyper-parameters that a reader needs to judge or repeat the run, then its time and speed."""
    rows = [(key, show(run["config"][key])) for key in PROCEDURE if run["config"].get(key) is not None]
    speed = run["throughput"]
    if is_number(run.get("train_seconds")):
        rows.append(("training time", format_seconds(run["train_seconds"])))
    if is_number(speed.get("tokens_per_second")):
        rows.append(("tokens per second", format_compact(speed["tokens_per_second"])))
    if is_number(speed.get("mfu")):
        rows.append(("model FLOPs utilisation", f"{100 * speed['mfu']:.1f} %"))
    return rows


def environment_rows(run: dict) -> list[tuple[str, str]]:
    """Return the named facts of the machine and its software; never shell variables (their names are upper case)."""
    facts = run["environment"].items()
    return [(key, show(value)) for key, value in facts if not key.isupper() and not isinstance(value, (dict, list))]


# ------------------------------------------------------------------------------------------------ front matter


def front_matter(run: dict, model_name: str) -> ModelCardData:
    """Return the Hub metadata that the run knows; what it does not know is left out."""
    model, data = run["model"], run["data"]
    tag = TASKS.get(run["task"], UNKNOWN_TASK)[0]
    base, dataset = hub_id(model.get("base_model")), hub_id(data.get("source"), needs_owner=True)
    tags = ["bmtk", *(slug(item) for item in (model.get("model_type"), model.get("adapter")) if item)]
    licence = slug(run.get("license") or run["config"].get("license") or "").lower()
    language = data.get("language")
    return ModelCardData(
        language=language if re.fullmatch(r"[a-z]{2,3}", str(language)) else None,
        license=(licence if licence in LICENCES else "other") if licence else None,
        license_name=licence if licence and licence not in LICENCES else None,
        library_name="transformers",
        pipeline_tag=tag,
        tags=tags,
        datasets=[dataset] if dataset else None,
        base_model=base,
        base_model_relation=("adapter" if model.get("adapter") else "finetune") if base else None,
        model_name=one_line(model_name).split("/")[-1],
        eval_results=list(eval_results(run, tag or "other", dataset)) or None,
    )


def eval_results(run: dict, task_type: str, dataset: str | None) -> Iterator[EvalResult]:
    """Yield one model-index entry per finite metric (the Hub cannot store NaN)."""
    name = one_line(run["data"].get("name") or dataset or "unnamed")
    for key, value in run["metrics"].items():
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


def usage_example(tag: str | None, auto_class: str, name: str, samples: list[dict]) -> dict[str, str]:
    """Return the lines of the loading example: imports, then the call with `{remote}` for trust_remote_code."""
    lines = [f"name = {json.dumps(name)}  # this repository, or a folder that holds it"]
    lines += [f"model = {auto_class}.from_pretrained(name{{remote}})"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(name)"]
    imported = f"from transformers import {auto_class}, AutoTokenizer"
    if tag in ("text-generation", "text-classification"):
        text = next((sample["prompt"] for sample in samples if sample["prompt"]), "Once upon a time, there was")
        length = ", max_new_tokens=60" if tag == "text-generation" else ""
        imported += ", pipeline"
        lines += [f'pipe = pipeline("{tag}", model=model, tokenizer=tokenizer)']
        lines += [f"print(pipe({json.dumps(text, ensure_ascii=False)}{length}))"]
    body = "\n".join([imported, "", *lines])
    return {"plain": body.replace("{remote}", ""), "remote": body.replace("{remote}", ", trust_remote_code=True")}


# ---------------------------------------------------------------------------------------- words and numbers


def escape_markdown(value) -> str:
    """Return one line of Markdown that shows `value` literally, in a paragraph or in a table cell."""
    text = re.sub(r"([\\`*\[\]|#~$!])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", one_line(value))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fence(value, language: str = "text") -> str:
    """Return a fenced code block which no run of backticks in `value` can close."""
    longest = max((len(run) for run in re.findall("`+", str(value))), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{value}\n{ticks}"


def one_line(value) -> str:
    """Return `value` as a text without line breaks, at most 200 characters long."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"


def slug(value) -> str:
    """Return `value` as an identifier of letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]+", "-", one_line(value), flags=re.ASCII).strip("-")


def is_number(value) -> bool:
    """Whether `value` is a JSON number (NaN is; true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_positive(value) -> bool:
    """Whether `value` is a number above zero."""
    return is_number(value) and value > 0


def split_metric(key: str) -> tuple[str, str]:
    """Split `validation/loss` or `eval_loss` into the split ("" when the key names none) and the metric."""
    match = re.fullmatch(r"(validation|eval|test|train)[/_](.+)", key)
    return ("validation" if match[1] == "eval" else match[1], match[2]) if match else ("", key)


def is_quality(key: str) -> bool:
    """Whether a metric says how good the model is, rather than how fast it was evaluated."""
    return split_metric(key)[1] not in NOT_QUALITY


def metric_label(key: str) -> str:
    """Return `validation/macro_f1` as "Validation macro-F1"."""
    split, metric = split_metric(key)
    words = metric.replace("macro_f1", "macro-F1").replace("_", " ")
    label = re.sub(r"\bf1\b", "F1", f"{split} {words}".strip())
    return label[:1].upper() + label[1:]


def format_number(value: float) -> str:
    """Return a number as a reader wants it: grouped when whole, four significant digits otherwise."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda match: f"e{match[1].replace('+', '')}", f"{value:.4g}")


def plural(unit: str, count: float) -> str:
    """Return the plural `unit`, or its singular for a count of one."""
    return unit.removesuffix("s") if count == 1 else unit


def format_compact(value: float) -> str:
    """Return a count in three significant digits with its power of a thousand: 4.92 M."""
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if is_number(value) and math.isfinite(value) and abs(value) >= size * 0.9995:
            return f"{float(f'{value / size:.3g}'):g}{suffix}"
    return format_number(value) if is_number(value) else one_line(value)


def format_seconds(seconds: float) -> str:
    """Return a duration in its two largest units: 2 min 31 s."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{format_number(round(seconds, 1) if math.isfinite(seconds) else seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def show(value) -> str:
    """Return a configuration value as it would be typed."""
    if isinstance(value, str):
        return value
    return ", ".join(map(show, value)) if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
