"""Verification of a publication: a clean process that cannot import bmtk gets the same outputs from the Hub.

The publishing process calls `record_outputs` (what the folder on disk gives) and `verify`. `verify` starts this very
file in a new interpreter with an empty home; there `main` loads the repository at the exact commit and compares. So
this file imports nothing of bmtk.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5  # largest absolute difference of an output: same machine, but threads may add in another order
SAMPLE = "Was it a cat I saw? 12 + 30 = 42;\n\tnaïve — 你好 🙂"
TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
HUB_FAULT = 75  # exit status of the clean process where the Hub failed, not the files
HUB_FAILED = "the Hub failed: "  # how such a finding begins
KEPT_SETTINGS = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DOWNLOAD_TIMEOUT")


@dataclass(frozen=True)
class Base:
    """The base model of an adapter: a path or Hub id, its commit on the Hub, and whether its own code may run."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


def record_outputs(directory: Path, room: Path, base: Base | None = None) -> None:
    """Load the folder here, run it on seeded inputs, and leave inputs, outputs and facts in `room`.

    base: for an adapter, its base model; None for a whole model.
    Raises: whatever loading raises, and ValueError for weights that lack a part of the model.
    """
    from safetensors.torch import save_file

    names = {path.name for path in directory.iterdir()}
    plan = {
        "base": asdict(base) if base else None,
        "num_labels": adapter_labels(directory) if base else None,
        "tokenizer": bool(names & {"tokenizer.json", "tokenizer_config.json"}),
        "processor": bool(names & {"preprocessor_config.json", "processor_config.json"}),
    }
    inputs: dict[str, Any] = {}
    facts, outputs = observe(str(directory), plan, inputs)
    room.mkdir(parents=True, exist_ok=True)
    (room / "plan.json").write_text(json.dumps({"plan": plan, "facts": facts}), encoding="utf-8")
    save_file(inputs, room / "inputs.safetensors")
    save_file(outputs, room / "outputs.safetensors")


def observe(
    source: str, plan: dict[str, Any], inputs: dict[str, Any], revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that a user of `source` would see: facts (JSON) and the first output of every model (tensors).

    inputs: what the models are run on; filled with seeded values if empty.
    """
    import torch
    import transformers

    pinned = {"trust_remote_code": True, **({"revision": revision} if revision else {})}
    facts: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    if plan["tokenizer"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **pinned)
        ids = tokenizer(SAMPLE)["input_ids"]
        facts["tokenizer"] = {"ids": ids, "text": tokenizer.decode(ids)}
    if plan["processor"]:
        facts["processor"] = type(transformers.AutoProcessor.from_pretrained(source, **pinned)).__name__
    loaders = {"adapter": adapted_model} if plan["base"] else model_loaders(source, pinned, facts)
    for name, load in loaders.items():
        model = load(source, plan, pinned).eval()
        if not inputs:
            inputs.update(seeded_inputs(model))
        with torch.no_grad():
            outputs[name] = model(**inputs)[0].float().contiguous().clone()
        facts[name] = type(model).__name__
    return facts, outputs


def model_loaders(source: str, pinned: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """{Auto class: loader} for AutoModel and the saved head; every class that `auto_map` names must resolve."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = AutoConfig.from_pretrained(source, **pinned)
    auto_map = getattr(config, "auto_map", None) or {}
    revision = pinned.get("revision")
    for auto_name, reference in auto_map.items():
        facts[f"auto_map {auto_name}"] = get_class_from_dynamic_module(reference, source, revision=revision).__name__
    names = ["AutoModel", head_auto_class(config, auto_map)]
    return {name: (lambda *given, name=name: whole_model(name, *given)) for name in dict.fromkeys(names)}


def head_auto_class(config: Any, auto_map: dict[str, Any]) -> str:
    """The Auto class that gives the architecture in config.json: by `auto_map`, or by transformers' own tables."""
    from transformers.models.auto import modeling_auto

    architecture = config.architectures[0]
    for auto_name, reference in auto_map.items():
        if reference.split(".")[-1] == architecture:
            return auto_name
    names = [name for name in dir(modeling_auto) if name.startswith("AutoModelFor")]
    for name in [*sorted(names, key="AutoModelForPreTraining".__eq__), "AutoModel"]:
        served = getattr(modeling_auto, name)._model_mapping.get(type(config), ())
        if architecture in [one.__name__ for one in (served if isinstance(served, tuple) else (served,))]:
            return name
    raise ValueError(f"no Auto class of transformers gives {architecture}, the architecture in config.json")


def whole_model(auto_name: str, source: str, plan: dict[str, Any], pinned: dict[str, Any]) -> Any:
    """A model through its Auto class.  Raises: ValueError if a head was saved without some of its weights."""
    import transformers

    model, info = getattr(transformers, auto_name).from_pretrained(source, output_loading_info=True, **pinned)
    if auto_name != "AutoModel" and info["missing_keys"]:
        raise ValueError(f"the weights lack {', '.join(sorted(info['missing_keys']))}")
    return model


def adapted_model(source: str, plan: dict[str, Any], pinned: dict[str, Any]) -> Any:
    """The base model with the adapter on top; the base's own code runs only where the plan allows it."""
    import transformers
    from peft import PeftConfig, PeftModel

    revision = pinned.get("revision")
    peft_config = PeftConfig.from_pretrained(source, revision=revision)
    auto_class = getattr(transformers, TASK_CLASSES.get(peft_config.task_type, "AutoModel"))
    options: dict[str, Any] = {"num_labels": plan["num_labels"]} if plan["num_labels"] else {}
    options |= {"trust_remote_code": plan["base"]["trust_remote_code"], "revision": plan["base"]["revision"]}
    base = auto_class.from_pretrained(plan["base"]["name"], **options)
    return PeftModel.from_pretrained(base, source, revision=revision)


def adapter_labels(directory: Path) -> int | None:
    """How many labels the head beside an adapter has: PEFT writes it nowhere but in the shape of that head."""
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", framework="numpy") as file:
        heads = [name for name in file.keys() if re.search(r"\.(score|classifier)(\.out_proj)?\.weight$", name)]
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


def seeded_inputs(model: Any) -> dict[str, Any]:
    """Random inputs of one row for the model's main input, the same for every process."""
    import torch

    config, draw = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        vocab_size = config.get_text_config().vocab_size
        inputs = {"input_ids": torch.randint(vocab_size, (1, 16), generator=draw)}
        return inputs | ({"decoder_input_ids": inputs["input_ids"].clone()} if config.is_encoder_decoder else {})
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, config.num_channels, height, width, generator=draw)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(1, 16000, generator=draw)}
    raise ValueError(
        f"no seeded input is known for main_input_name={model.main_input_name!r}, so nothing can be verified"
    )


def verify(room: Path, repo_id: str, commit: str, token: str | None) -> list[str]:
    """Load the repository at `commit` in a clean process and return what differs: nothing, if it is verified.

    token: given to the process's environment only; None loads it as anybody would.
    """
    script = shutil.copy(__file__, room / "load_from_hub.py")  # alone: nothing else to import
    run = subprocess.run(
        [sys.executable, script, repo_id, commit],
        cwd=room,
        env=clean_environment(room, token),
        capture_output=True,
        text=True,
        errors="replace",
    )
    findings = room / "findings.json"
    if run.returncode == 0 and findings.is_file():
        return json.loads(findings.read_text(encoding="utf-8"))
    last = run.stderr.strip().splitlines()[-3:] or [f"the process ended with code {run.returncode}"]
    start = HUB_FAILED if run.returncode == HUB_FAULT else "loading failed: "
    return [start + " | ".join(line.strip() for line in last)]


def is_hub_fault(finding: str) -> bool:
    """Whether loading failed because the Hub was busy, broken or out of reach, and not because of the files."""
    return finding.startswith(HUB_FAILED)


def caused_by_hub(error: BaseException | None) -> bool:
    """Whether an exception, or what it was raised from, is a fault of the Hub or of the network."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            return status in (408, 429) or status >= 500
        if isinstance(error, httpx2.TransportError | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def clean_environment(room: Path, token: str | None) -> dict[str, str]:
    """This environment without caches, offline switches, launcher settings and tokens; the home is empty."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign) or key in KEPT_SETTINGS}
    env |= {"HF_HOME": str(room / "home"), "HF_MODULES_CACHE": str(room / "modules")}
    return env | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})


class WithoutBmtk(MetaPathFinder):
    """Refuses to import bmtk, installed or not."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in ("bmtk", "bmtk_cli"):
            raise ModuleNotFoundError(f"No module named {fullname!r} (this process verifies that it is not needed)")


def compare(
    expected_facts: dict[str, Any], facts: dict[str, Any], expected: dict[str, Any], outputs: dict[str, Any]
) -> list[str]:
    """What differs, one line each."""
    findings = [
        f"{name}: {facts.get(name)} on the Hub, {value} in the folder"
        for name, value in expected_facts.items()
        if facts.get(name) != value
    ]
    for name, wanted in expected.items():
        given = outputs[name]
        if given.shape != wanted.shape:
            findings.append(f"output of {name}: shape {tuple(given.shape)} on the Hub, {tuple(wanted.shape)} here")
        elif not (difference := (given - wanted).abs().max().item()) <= TOLERANCE:
            findings.append(f"output of {name}: differs by {difference:.3g}, more than {TOLERANCE:g}")
    return findings


def main(repo_id: str, commit: str) -> None:
    """In the clean process: load, compare with what the folder gave, leave findings.json."""
    sys.meta_path.insert(0, WithoutBmtk())
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory
    from safetensors.torch import load_file

    def with_timeout() -> Any:  # the Hub's own client waits for an answer for ever
        client = default_client_factory()
        client.timeout = float(os.environ.get("BMTK_HUB_TIMEOUT", 60))
        return client

    set_client_factory(with_timeout)
    expected = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    try:
        facts, outputs = observe(repo_id, expected["plan"], load_file("inputs.safetensors"), commit)
    except Exception as error:
        if not caused_by_hub(error):
            raise
        traceback.print_exc()
        sys.exit(HUB_FAULT)
    findings = compare(expected["facts"], facts, load_file("outputs.safetensors"), outputs)
    Path("findings.json").write_text(json.dumps(findings), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
