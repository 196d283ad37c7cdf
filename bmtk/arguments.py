"""One flat YAML file per run, bound to dataclasses; the command line wins over the file.

    values = RunConfig.read(sys.argv[1:], configs=Path("recipes/configs"), default="causal_lm/tiny_shakespeare")
    values.get("task")                              # what file and command line say, before anything is bound
    data, loop = values.bind([DataArguments, LoopArguments], description="Pretrain a model.")

Types come from the dataclasses (`1e-3` is a number, whatever YAML thinks); unknown keys are errors with a suggestion.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Where a run's data are, and what they are called: the command line replaces all of them or none.
SOURCE_KEYS = frozenset(("dataset", "train_file", "validation_file", "test_file"))
NAMES_OF_SOURCES = frozenset(("data_name", "data_licence"))
ABOUT_ROWS = re.compile(r"label_names|\w+_column")  # what only the rows of a file's own source are sure to have
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
USAGE = "%(prog)s [--config FILE.yaml | --preset NAME] [--key value ...]"
# Keys that may differ when a run goes on: they say where it is described and published, not what is learned.
FREE_RUN_KEYS = frozenset(
    ("config", "preset", "dry_run", "find_lr", "push_to_hub", "private", "trust_remote_code", "trials")
)


@dataclass
class RunArguments:
    """What every recipe reads."""

    _argument_group_name = "run"

    config: str | None = field(default=None, metadata={"help": "YAML file of this run; the command line wins over it"})
    preset: str | None = field(
        default=None, metadata={"help": "Name of a config beside the default one; 'smoke' runs in under two minutes"}
    )
    task: str | None = field(default=None, metadata={"help": "What to train for; decides which data options exist"})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model to start from; none: a new one of model_type"}
    )
    model_type: str = field(
        default="bm_transformer",
        metadata={"help": "Architecture of a new model: a bm_... family or any of transformers"},
    )
    preset_model: str | None = field(
        default=None, metadata={"help": "Published shape of a new model, such as resnet-18; `bmtk models` lists them"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub or folder: only for sources you have read"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the resolved config, size, tokens per step and time; train nothing"}
    )
    find_lr: bool = field(
        default=False, metadata={"help": "Try learning rates from far too small to far too large, and suggest one"}
    )
    skip_test: bool = field(
        default=False, metadata={"help": "Leave the test rows unread: for runs by which settings are chosen"}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "user/name to publish the result under; needs `hf auth login` or HF_TOKEN"}
    )
    private: bool = field(default=False, metadata={"help": "Create the Hub repository as a private one"})

    @property
    def loading(self) -> dict[str, bool]:
        """What `from_pretrained` is told about code that comes with a model."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}

    @property
    def is_plan(self) -> bool:
        """Whether nothing is trained, so that a large corpus need not be read whole."""
        return self.dry_run or self.find_lr

    @property
    def reading(self) -> dict[str, object]:
        """What a task is told of its model and of the parts of its data."""
        splits = ("train", "validation", *(() if self.skip_test else ("test",)))
        return {"model": self.model, "splits": splits, "is_plan": self.is_plan, **self.loading}


class RunConfig:
    """The flat values of a run: a YAML file and the command line over it."""

    def __init__(self, file_values: dict[str, object], argv: list[str], path: Path | None = None):
        self.file_values, self.path = file_values, path
        self.argv = argv
        self.cli_values = dict(_cli_pairs(argv))

    @classmethod
    def read(cls, argv: list[str], *, configs: Path, default: str) -> "RunConfig":
        """Read `--config FILE`, or `--preset NAME` beside the task's configs, or `configs/<default>.yaml` of its task.

        Raises: FileNotFoundError for a missing file (listing what is there), ValueError for a file that is not flat.
        """
        cli = dict(_cli_pairs(argv))
        if {"config", "preset"} <= cli.keys():
            raise ValueError("--config and --preset both name a config file; give one of them")
        default_task, default_name = default.split("/")
        if isinstance(cli.get("config"), str):
            path = Path(cli["config"])
        else:
            task = str(cli.get("task", default_task))
            if task != default_task and "preset" not in cli:
                return cls({}, argv)  # the command line says everything
            path = configs / task / f"{cli.get('preset', default_name)}.yaml"
        values = read_yaml(path)
        if SOURCE_KEYS & cli.keys():  # the user's own data: neither mixed with the file's nor under its name
            is_default = not {"config", "preset"} & cli.keys()
            dropped = (
                SOURCE_KEYS | NAMES_OF_SOURCES | {key for key in values if is_default and ABOUT_ROWS.fullmatch(key)}
            )
            values = {key: value for key, value in values.items() if key not in dropped}
        return cls(values, argv, path)

    def get(self, key: str, default: object = None) -> object:
        """The raw value of `key`: from the command line, else from the file, else `default`."""
        return self.cli_values.get(key, self.file_values.get(key, default))

    def bind(self, classes: list[type], *, description: str) -> list:
        """Instances of `classes` (dataclasses), in order; a name that two of them declare belongs to the first.

        Exits with one line on stderr and status 2 for a value of the wrong type.
        Raises: ValueError for unknown keys, each with the nearest known one.
        """
        classes = _without_repeated_fields(classes)
        known = {f.name for cls in classes for f in dataclasses.fields(cls) if f.init}
        switches = {f"no_{f.name}" for cls in classes for f in dataclasses.fields(cls) if f.default is True}
        at = f"{self.path}: " if self.path else ""
        unknown = [at + unknown_key(key, known) for key in self.file_values if key not in known]
        unknown += [unknown_key(key, known) for key in self.cli_values if key not in known | switches | {"help"}]
        if unknown:
            raise ValueError("\n".join(unknown))
        if short := [text for text in self.argv if re.match(r"-[A-Za-z]\w+", text)]:
            raise ValueError(f"'{short[0]}' is no option; options begin with two dashes: '-{short[0]}'")
        parser = _Parser(classes, description=description, usage=USAGE, allow_abbrev=False, formatter_class=_Help)
        in_file = [text for key, value in self.file_values.items() for text in _as_argv(key, value)]
        return list(parser.parse_args_into_dataclasses([*in_file, *self.argv], look_for_args_file=False))


def resolved_config(*instances: object) -> dict[str, object]:
    """Flat, JSON-ready values of bound dataclasses: everything of ours, and of foreign classes what is not default."""
    resolved = {}
    for instance in instances:
        foreign = any(cls.__module__.split(".")[0] == "transformers" for cls in type(instance).__mro__)
        for f in dataclasses.fields(instance):
            value = getattr(instance, f.name)
            if "token" in f.name.split("_") and f.name.startswith("hub"):
                continue  # a secret has no place in a file
            if f.name in getattr(instance, "derived_fields", ()):
                continue  # decided by another field, which is recorded
            ours = f.name in inspect.get_annotations(type(instance))
            if not f.init or (foreign and value == _default(f) and not ours):
                continue
            if foreign and (value == [] or not isinstance(value, str | int | float | list | dict | None)):
                continue  # not what was given, but what the class made of it
            resolved[f.name] = json.loads(json.dumps(value, default=str))
    return resolved


def changed_settings(*instances: object) -> dict[str, object]:
    """What of `resolved_config` is not the default: the content of a config file that says the same."""
    defaults = {f.name: _default(f) for instance in instances for f in dataclasses.fields(instance) if f.init}
    config = resolved_config(*instances).items()
    changed = {name: value for name, value in config if value is not None and value != defaults[name]}
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in changed.items()}


def field_types(*instances: object) -> dict[str, type]:
    """The type of every field that a config file may set, as `bind` reads it: a list's is `list[...]`."""
    hints = [(instance, typing.get_type_hints(type(instance))) for instance in instances]
    return {f.name: _plain_type(of[f.name]) for instance, of in hints for f in dataclasses.fields(instance) if f.init}


def _default(f: dataclasses.Field) -> object:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def model_type_of(values: RunConfig) -> str:
    """The model type of a new model: that of its `preset_model`, else `model_type`.

    Raises: ValueError for a preset that no family has, or another family than `model_type`.
    """
    preset, given = values.get("preset_model"), values.get("model_type")
    if preset is None:
        return str(given or RunArguments.model_type)
    families = {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING.keys() if name.startswith("bm_")}
    owner = next((name for name, config_class in families.items() if preset in config_class.presets), None)
    if owner is None:
        known = "; ".join(f"{name}: {', '.join(sorted(cls.presets))}" for name, cls in families.items())
        raise ValueError(f"preset_model={preset!r} is unknown; there are {known}")
    if given not in (None, owner):
        raise ValueError(f"preset_model={preset} is a {owner}, and model_type={given}; leave it out")
    return owner


def model_fields(model_type: str) -> type:
    """A dataclass of the architecture fields of a model type; None stands for the configuration class's own default.

    Left out: what the data decides (vocab_size, special token ids) and what belongs to inference (use_cache).
    The help text of a field is the comment beside it in the configuration file.
    """
    config_class = _config_class(model_type)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config_class), re.MULTILINE))

    def help_text(name: str) -> str:
        default = config_class.__dataclass_fields__[name].default
        return f"{comments.get(name, '')} [{default}]".replace("%", "%%").strip()

    fields = [
        (name, _plain_type(hint) | None, field(default=None, metadata={"help": help_text(name)}))
        for name, hint in inspect.get_annotations(config_class).items()
        if name in {f.name for f in dataclasses.fields(config_class)}
        and name not in {"vocab_size", "use_cache"}
        and not name.endswith("_token_id")
    ]
    group = {"_argument_group_name": f"architecture of a new {config_class.model_type} (with no --model)"}
    return dataclasses.make_dataclass(f"{config_class.__name__}Fields", fields, namespace=group)


def chosen_fields(architecture: object) -> dict[str, object]:
    """The fields of a bound `model_fields` that file or command line set; JSON text of dictionaries is read.

    Raises: ValueError for a size below 1.
    """
    chosen = {name: value for name, value in vars(architecture).items() if value is not None}
    if wrong := [f"{name}={chosen[name]}" for name in SIZES if chosen.get(name, 1) < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")
    return {k: json.loads(v) if isinstance(v, str) and v.startswith(("{", "[")) else v for k, v in chosen.items()}


def read_yaml(path: Path) -> dict[str, object]:
    """The flat mapping in a YAML file.  Raises FileNotFoundError or ValueError that name the file and the remedy."""
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else path.parent.parent
        there = (
            sorted(p.stem for p in folder.glob("*") if p.suffix == ".yaml" or p.is_dir()) if folder.is_dir() else []
        )
        hint = f"; {folder} holds {', '.join(there)}" if there else ""
        raise FileNotFoundError(f"config file {path} does not exist{hint}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError(f"config file {path} must be flat: one `key: value` per line, no nesting")
    return values


@contextlib.contextmanager
def clean_errors():
    """Turn what a user can mend (ValueError, OSError, a loss that is not finite) into one message and exit status 1.

    BMTK_DEBUG=1 shows the traceback instead.
    """
    try:
        yield
    except (ValueError, OSError, ArithmeticError, StrictDataclassError) as error:
        if os.environ.get("BMTK_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (process {rank})"
        if isinstance(error, StrictDataclassError):  # the reason is what a validate_... method of the config raised
            error = error.__cause__ or error
        sys.stderr.write(f"\n{prefix}: {error}\n  (BMTK_DEBUG=1 shows where this was raised)\n")
        sys.exit(1)


def _config_class(model_type: str) -> type:
    """The configuration class of a model type.  Raises: ValueError naming what is near."""
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        ours = [name for name in CONFIG_MAPPING.keys() if name.startswith("bm_")]
        near = f"; names of transformers that are near: {', '.join(near)}" if near else ""
        raise ValueError(f"model_type={model_type!r} is unknown; ours are {', '.join(ours)}{near}")
    return CONFIG_MAPPING[model_type]


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that there are, and leaves the line breaks of the description alone."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line: the usage of a hundred options hides what was wrong."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def _cli_pairs(argv: list[str]):
    """(key, raw value) for each `--key value`, `--key=value` and bare `--flag` (True) of a command line."""
    for position, text in enumerate(argv):
        if not text.startswith("--"):
            continue
        key, equals, value = text[2:].partition("=")
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        yield key.replace("-", "_"), value if equals else (True if following.startswith("--") else following)


def _as_argv(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}"]


def unknown_key(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; see --help for the known ones")


def _without_repeated_fields(classes: list[type]) -> list[type]:
    seen: set[str] = set()
    kept = []
    for cls in classes:
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        if names & seen:
            left = [(f.name, f.type, f) for f in dataclasses.fields(cls) if f.name not in seen]
            cls = dataclasses.make_dataclass(cls.__name__, left, namespace={"__doc__": cls.__doc__})
        seen |= names
        kept.append(cls)
    return kept


def _plain_type(hint: object) -> object:
    """The one type a command line can carry: `int | float` is a float, `X | None` an X, a dict is JSON text."""
    members = [m for m in typing.get_args(hint) if m is not type(None)] if typing.get_origin(hint) is not None else []
    if typing.get_origin(hint) is typing.Literal:
        return hint
    if typing.get_origin(hint) in (list, tuple):
        return list[_plain_type(members[0])]
    if float in members:
        return float
    if members:
        return _plain_type(members[0])
    return hint if hint in (bool, int, float, str) else str
