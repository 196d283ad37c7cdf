"""What may be uploaded from a run folder: an allow-list of files, their checks, and a search for access tokens."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from bmtk.errors import UserError

from .credentials import holds_credential

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX, "adapter_model.safetensors")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
PAPERS = ("README.md", "LICENSE", "report.html", "run.json", "recipe.yaml")
ALLOWED = (*WEIGHTS, *TOKENIZER, *PROCESSOR, *BESIDE_TOKENIZER, *CONFIGS, *PAPERS)
HOLDERS_OF_CODE = ("config.json", "tokenizer_config.json", *PROCESSOR)
NAMED_CODE = re.compile(r"(?:(?P<repo>[^\s]+)--)?(?P<module>[^\W\d]\w*)\.(?P<name>[^\W\d]\w*)")  # as in auto_map


class PublishError(UserError):
    """A reason why a model cannot be published."""


@dataclass(frozen=True)
class Bundle:
    """The files to upload (name on the Hub -> local path), and the names in `directory` that are left out."""

    directory: Path
    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def is_adapter(self) -> bool:
        return "adapter_config.json" in self.files

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def is_allowed(name: str) -> bool:
    """Whether a file of that name belongs to a published model (code files are allowed by `auto_map` instead)."""
    return any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def read_bundle(directory: str | Path) -> Bundle:
    """Choose the files of a saved model or adapter and check that they are whole.

    Raises: PublishError that names every problem at once; links are refused before any file is read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise PublishError(f"{directory} is not a folder; pass the folder that save_pretrained wrote")
    refuse_links(directory)
    present = {path.name for path in directory.iterdir() if path.is_file()}
    code, problems = code_files(directory)
    files = {name for name in present if is_allowed(name)} | code
    problems += (adapter_problems if "adapter_config.json" in files else model_problems)(directory, files)
    problems += weight_problems(directory, files)
    if problems:
        raise PublishError(f"{directory} cannot be published:\n" + "\n".join(f"  - {line}" for line in problems))
    left_out = sorted(path.name + "/" * path.is_dir() for path in directory.iterdir() if path.name not in files)
    return Bundle(directory, {name: directory / name for name in sorted(files)}, tuple(left_out))


def refuse_links(directory: Path) -> None:
    """Raise PublishError for symbolic links among what could be published: what they point to may lie anywhere."""
    links = sorted(
        path.name for path in directory.iterdir() if path.is_symlink() and (is_allowed(path.name) or is_code(path))
    )
    if links:
        raise PublishError(
            f"{directory} cannot be published, as bmtk does not follow symbolic links: {', '.join(links)}; put "
            "the files themselves there (`cp -rL FOLDER COPY` makes a folder without links)"
        )


def is_code(path: Path) -> bool:
    return path.suffix == ".py"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no file.  Raises: PublishError where the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise PublishError(f"{path} is not valid JSON ({error}); save it again") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} holds a JSON {type(content).__name__}, not an object; save it again")
    return content


def code_files(directory: Path) -> tuple[set[str], list[str]]:
    """The *.py files that `auto_map` names, the siblings they import, and the problems with them."""
    files: set[str] = set()
    problems = []
    for holder in HOLDERS_OF_CODE:
        for auto_name, reference in references(read_json(directory / holder)):
            named = NAMED_CODE.fullmatch(reference) if isinstance(reference, str) else None
            if not named:
                problems.append(
                    f"{holder}: {auto_name} names {reference!r}; only code beside it is published, as module.Class "
                    "without folders"
                )
            elif named["repo"]:
                problems.append(
                    f"{holder}: {auto_name} takes its code from {named['repo']}, which can change at any "
                    "time; save the model with its own code (import bmtk, from_pretrained, save_pretrained)"
                )
            elif not defines(directory / f"{named['module']}.py", named["name"]):
                problems.append(
                    f"{holder}: {auto_name} names {reference}, but {named['module']}.py does not define it"
                )
            else:
                files |= with_siblings(directory, f"{named['module']}.py")
    problems += [f"{name} is imported by the model's code and missing" for name in sorted(missing(directory, files))]
    return files, problems


def references(content: Any) -> Iterator[tuple[str, Any]]:
    """(Auto class, class that it names) of every `auto_map` at any depth: a processor holds those of its parts."""
    if isinstance(content, list):
        for item in content:
            yield from references(item)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key != "auto_map":
                yield from references(value)
                continue
            for auto_name, named in (value if isinstance(value, dict) else {key: value}).items():
                for one in named if isinstance(named, list) else [named]:
                    if one is not None:
                        yield str(auto_name), one


def missing(directory: Path, files: set[str]) -> set[str]:
    return {name for name in files if not (directory / name).is_file()}


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, empty where there is none.  Raises: PublishError where it is not Python."""
    try:
        return ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PublishError(f"{path} is not valid Python ({error}); save the model again") from error


def defines(path: Path, class_name: str) -> bool:
    return any(isinstance(node, ast.ClassDef) and node.name == class_name for node in parse(path).body)


def with_siblings(directory: Path, name: str) -> set[str]:
    """`name` and every file that it reaches through `from .sibling import Name`, present or not."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            imports = [node for node in ast.walk(parse(directory / name)) if isinstance(node, ast.ImportFrom)]
            waiting += [f"{node.module}.py" for node in imports if node.level == 1 and node.module]  # a dot: no file
    return found


def model_problems(directory: Path, files: set[str]) -> list[str]:
    """Problems of a folder with a whole model: a config that others cannot load, no tokenizer."""
    config = read_json(directory / "config.json")
    if not config:
        return ["no config.json (nor adapter_config.json): pass the folder that save_pretrained wrote"]
    problems = []
    architectures = config.get("architectures") or []
    if not architectures:
        problems.append("config.json names no architecture; save the model with its own save_pretrained")
    auto_map = config.get("auto_map", {})
    if auto_map and isinstance(auto_map, dict):
        named = {reference.split(".")[-1] for reference in auto_map.values() if isinstance(reference, str)}
        lacking = {"AutoConfig", "AutoModel"} - set(auto_map)
        problems += [f"config.json: auto_map lacks {name}" for name in sorted(lacking)]
        problems += [f"config.json: auto_map does not name {name}" for name in architectures if name not in named]
    elif config.get("model_type") not in CONFIG_MAPPING_NAMES:
        problems.append(
            f"model_type {config.get('model_type')!r} is not one of transformers' own and config.json has no "
            "auto_map, so it could not be loaded; import bmtk, from_pretrained, save_pretrained again"
        )
    if "vocab_size" in config and not files.intersection((*TOKENIZER, *PROCESSOR)):
        problems.append("no tokenizer; save it beside the model with tokenizer.save_pretrained(folder)")
    return problems


def adapter_problems(directory: Path, files: set[str]) -> list[str]:
    """Problems of a PEFT folder besides those of `weight_problems`."""
    problems = []
    if not read_json(directory / "adapter_config.json").get("base_model_name_or_path"):
        problems.append("adapter_config.json names no base_model_name_or_path, so the adapter could not be loaded")
    if "adapter_model.safetensors" not in files:
        problems.append("no adapter_model.safetensors; save the adapter with peft's save_pretrained")
    return problems


def weight_problems(directory: Path, files: set[str]) -> list[str]:
    """No weights, pickled weights, shards that the index names and that are missing, files cut short."""
    problems = []
    shards = read_json(directory / INDEX).get("weight_map", {})
    shards = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    problems += [f"{name} is named by {INDEX} and missing" for name in sorted(shards - files)]
    weights = [name for name in sorted(files) if name.endswith(".safetensors")]
    if not weights and (directory / "pytorch_model.bin").is_file():
        problems.append("pytorch_model.bin holds pickled weights; save them as safetensors with save_pretrained")
    elif not weights:
        problems.append("no weights (model.safetensors)")
    for name in weights:
        try:
            with safe_open(directory / name, framework="numpy"):
                pass
        except SafetensorError as error:
            problems.append(f"{name} is damaged ({error}); save the model again")
    return problems


def refuse_tokens(bundle: Bundle, active_token: str | None) -> None:
    """Raise PublishError if a file to be published holds the active token, or anything shaped like a credential."""
    holders = [name for name, path in bundle.files.items() if holds_token(path, active_token)]
    if holders:
        raise PublishError(
            f"{', '.join(holders)} in {bundle.directory} hold what looks like an access token; nothing was sent. "
            "Remove it, and revoke that token where it was issued (https://huggingface.co/settings/tokens for the "
            "Hub) if the file was ever shared"
        )


def holds_token(path: Path, active_token: str | None) -> bool:
    """Whether a file holds a credential; of a safetensors file only the header is searched, which may hold text."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else -1
        if header < 0:
            file.seek(0)
        return holds_credential(file.read(header), active_token)
