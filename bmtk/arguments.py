"""One flat YAML file per run, bound to dataclasses; the command line wins over the file.

    values = RunConfig.read(sys.argv[1:], configs=Path("recipes/configs"), default="causal_lm/tiny_shakespeare")
    values.get("task")                              # the raw value, before anything is bound
    data, loop = values.bind([DataArguments, LoopArguments], description="Pretrain a model.")

Types come from the dataclasses (`1e-3` is a number, although YAML reads a string); unknown keys are errors with a
suggestion.
"""

import dataclasses
import difflib
import inspect
import json
import os
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from bmtk.errors import UserError
from bmtk.option_help import FirstScreen, OptionParser, help_topic, shown_default
from bmtk.settings import set_in_file, setting

# Sources of a run's data, and their names for the model card: the command line replaces all of them or none.
SOURCE_KEYS = frozenset(("dataset", "corpora", "train_file", "validation_file", "test_file"))
NAMES_OF_SOURCES = frozenset(("data_name", "data_licence"))
UNSET = "null"  # on the command line: neither this nor the file's value, but the default
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"),
    *("context_length", "prediction_length"),  # of series
)
USAGE = "%(prog)s [--config FILE.yaml | --preset NAME] [--key value ...]   (--key null: as if FILE did not set it)"
# What a bare --help shows: the first group of a recipe -> its groups -> their options, of those that the recipe has.
FIRST_SCREEN: FirstScreen = {
    "run": {
        "run": ("config", "preset", "task", "model", "model_type", "dry_run", "find_lr", "push_to_hub"),
        "data": ("dataset", "train_file", "corpora", "validation_file", "context_length", "max_length"),
        "training": (
            *("output_dir", "num_train_steps", "num_train_epochs", "batch_size", "learning_rate", "optimizer"),
            *("schedule", "precision"),
        ),
        "size": ("size", "budget"),
        "adapter": ("adapter",),
        "search": ("search",),
        "architecture": ("hidden_size", "num_hidden_layers"),
    },
    "evaluation": {
        "evaluation": ("model", "split", "batch_size", "output", "config", "task"),
        "data": ("dataset", "test_file", "max_length"),
    },
    "prediction": {"prediction": ("model", "input", "output", "pictures", "batch_size", "task")},
}
# Settings that may differ when a run is resumed: they decide where it is described and published, not what it learns.
FREE_RUN_KEYS = frozenset(
    (
        *("config", "preset", "dry_run", "find_lr", "push_to_hub", "private", "license", "language"),
        *("trust_remote_code", "trials"),
    )
)


AUTO = ("micro_batch_size", -1)  # a setting and its value that users write as auto


@dataclass
class RunArguments:
    """What every recipe reads."""

    _argument_group_name = "run"

    config: str | None = setting(
        None, "YAML file of this run; the command line overrides it; default: the recipe's own"
    )
    preset: str | None = setting(
        None, "YAML file in recipes/configs/TASK, by its name; smoke: a run of seconds; default: none"
    )
    task: str | None = setting(None, "what to train for, which decides the data options; default: the recipe's own")
    model: str | None = setting(
        None, "folder or Hub id of a pretrained model to start from; default: a new model of model_type"
    )
    model_type: str = setting("bm_transformer", "architecture of a new model: a bm_... family or one of transformers")
    preset_model: str | None = setting(
        None, "published configuration of a new model, such as resnet-18; `bmtk models` lists them"
    )
    trust_remote_code: bool = setting(
        False, "run model code from the Hub or a folder; only for code that you have read"
    )
    dry_run: bool = setting(False, "print the resolved config, model size and time; train nothing")
    find_lr: bool = setting(False, "learning rate range test: try rates from low to high and suggest one")
    skip_test: bool = setting(False, "do not read or evaluate the test rows, as in runs that choose settings")
    push_to_hub: str | None = setting(
        None, "publish the result as user/name on the Hub (needs `hf auth login` or HF_TOKEN); default: no"
    )
    private: bool = setting(False, "make the new Hub repository private")
    license: str | None = setting(None, "licence of the model for its card: apache-2.0, mit, ...; default: not stated")
    language: list[str] | None = setting(
        None, "languages of the model for its card, as ISO codes: en, or en de; default: not stated"
    )

    @property
    def loading(self) -> dict[str, bool]:
        """Keyword arguments of `from_pretrained` about code that comes with a model."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}

    @property
    def is_plan(self) -> bool:
        """Whether nothing is trained, so that a large corpus need not be read whole."""
        return self.dry_run or self.find_lr

    @property
    def reading(self) -> dict[str, object]:
        """Keyword arguments of a task: its model, and which splits of its data to read."""
        splits = ("train", "validation", *(() if self.skip_test else ("test",)))
        return {"model": self.model, "splits": splits, "is_plan": self.is_plan, **self.loading}


class RunConfig:
    """The flat values of a run: a YAML file and the command line over it."""

    def __init__(self, file_values: dict[str, object], argv: list[str], path: Path | None = None):
        self.path = path
        unset = {key for key, value in _cli_pairs(argv) if value == UNSET}
        self.argv = [re.sub(r"^(--\w+=)?~/", rf"\1{Path.home()}/", text) for text in _without_unset(argv)]
        self.cli_values = dict(_cli_pairs(self.argv))
        self.file_values = {key: _at_home(value) for key, value in file_values.items() if key not in unset}
        self.derived: dict[str, object] = {}  # values that follow from others, where neither of them has one
        self.remarks: list[str] = []  # on what was left out of the file

    @classmethod
    def read(cls, argv: list[str], *, configs: Path, default: str) -> "RunConfig":
        """Read `--config FILE`, or `--preset NAME` beside the task's configs, or `configs/<default>.yaml` of its task.

        Of another family than the default's, `--model_type bm_rnn` reads `configs/<default>_rnn.yaml`, if it is there.

        Raises: FileNotFoundError for a missing file (listing those there are), UserError for one that is not flat.
        """
        cli = dict(_cli_pairs(argv))
        if {"config", "preset"} <= cli.keys():
            raise UserError("--config and --preset both name a config file; give one of them")
        default_task, default_name = default.split("/")
        if isinstance(config := cli.get("config"), str):
            path = Path(config)
        else:
            task = str(cli.get("task", default_task))
            if task != default_task and "preset" not in cli:
                return cls({}, argv)  # the default file is for another task
            family = str(cli.get("model_type", RunArguments.model_type))
            of_family = configs / task / f"{default_name}_{family.removeprefix('bm_')}.yaml"
            path = configs / task / f"{cli.get('preset', default_name)}.yaml"
            if "preset" not in cli and family != RunArguments.model_type and of_family.is_file():
                path = of_family
        values = with_shipped_data(read_yaml(path), configs.parent)
        return cls(values, argv, path)

    def drop_facts_of_other_data(self, facts: Collection[str]) -> list[str]:
        """Leave out what a config file says of its own data, where the command line names others.

        facts: settings that are about data.  Names of columns stay, for other data may have them too.
        Returns: the settings of columns that stay.
        """
        if not SOURCE_KEYS & self.cli_values.keys() or not SOURCE_KEYS & self.file_values.keys():
            return []
        of_file = [key for key in self.file_values if key in facts and key not in self.cli_values]
        columns = [key for key in of_file if key.endswith("_column")]
        dropped = [key for key in of_file if key not in (*columns, *NAMES_OF_SOURCES)]
        without = SOURCE_KEYS | NAMES_OF_SOURCES | set(dropped)
        self._drop(without)
        if dropped:
            self.remarks.append(f"{self.path} is about other data; not used of it: {', '.join(dropped)}")
        return columns

    def _drop(self, keys: Collection[str]) -> None:
        self.file_values = {key: value for key, value in self.file_values.items() if key not in keys}

    def keep_data_of_default_file(self, of_task: Any) -> None:
        """Leave out what the recipe's own default file says of model and training, which follow from a size instead.

        of_task: the dataclass of the task's data.  A file that the command line names stays as it is.
        """
        if self.names_no_file:
            kept = {f.name for f in dataclasses.fields(of_task)} - {"vocab_size", "context_length"} | {"task"}
            self._drop(self.file_values.keys() - kept)

    @property
    def given(self) -> dict[str, object]:
        """The raw values that the file and the command line have."""
        return {**self.file_values, **self.cli_values}

    @property
    def names_no_file(self) -> bool:
        """Whether the file is the recipe's own default."""
        return not {"config", "preset"} & self.cli_values.keys()

    def get(self, key: str, default: object = None) -> object:
        """The raw value of `key`: from the command line, else from the file, else `default`."""
        return self.cli_values.get(key, self.file_values.get(key, default))

    def bind(self, classes: list[Any], *, description: str) -> list[Any]:
        """Instances of `classes` (dataclasses), in order; a name that two of them declare belongs to the first.

        Exits with one line on stderr and status 2 for a value of the wrong type, and as `answer` does.
        """
        parser = self.answer(classes, description=description)
        set_in_file(self.path, self.file_values.keys() - self.cli_values.keys())
        return list(parser.parse_args_into_dataclasses(self.words, look_for_args_file=False))

    @property
    def words(self) -> list[str]:
        """File and command line as one command line, with numbers for the words that stand for them."""
        values = {**self.derived, **self.file_values}
        words = [text for key, value in values.items() for text in _as_argv(key, value)] + self.argv
        option = AUTO[0].replace("_", "[_-]")
        line = re.sub(rf"(--{option})[=\0]auto(?=\0|$)", rf"\1={AUTO[1]}", "\0".join(words))
        return line.split("\0") if words else []

    def answer(self, classes: list[Any], *, description: str) -> OptionParser:
        """The parser of the options of `classes`, if they are not asked for: exits after `--help`.

        Raises: UserError for unknown keys, each with the nearest known one.
        """
        classes = _without_repeated_fields(classes)
        parser = OptionParser(
            cast(Any, classes), description=description, usage=USAGE, allow_abbrev=False, add_help=False
        )
        if (topic := help_topic(self.argv)) is not None:
            parser.show_help(topic, FIRST_SCREEN)
        fields = [f for cls in classes for f in dataclasses.fields(cls)]
        self._drop_sizes_of_other_model({f.name for f in fields})
        self._refuse_unknown(fields)
        return parser

    def _drop_sizes_of_other_model(self, known: Collection[str]) -> None:
        """Leave out what the recipe's own file, which nobody named, says of another model than the command line's.

        A model that has not even its width gets nothing of it: the rates would be those of another size.
        """
        unknown = [key for key in self.file_values if key not in known]
        is_another = self.names_no_file and {"model_type", "preset_model"} & self.cli_values.keys()
        if unknown and is_another and "hidden_size" in known:
            self._drop(unknown)
            self.remarks.append(f"{self.path} is about another model; not used of it: {', '.join(unknown)}")

    def _refuse_unknown(self, fields: list[dataclasses.Field[Any]]) -> None:
        known = {f.name for f in fields if f.init}
        switches = {f"no_{f.name}" for f in fields if f.default is True}
        at = f"{self.path}: " if self.path else ""
        unknown = [at + unknown_key(key, known) for key in self.file_values if key not in known]
        unknown += [unknown_key(key, known) for key in self.cli_values if key not in known | switches]
        if unknown:
            raise UserError("\n".join(unknown))
        if short := [text for text in self.argv if re.match(r"-[A-Za-z]\w+", text)]:
            raise UserError(f"'{short[0]}' is no option; options begin with two dashes: '-{short[0]}'")


def resolved_config(*instances: Any) -> dict[str, object]:
    """Flat, JSON-ready values of bound dataclasses: all fields of our classes, and changed ones of others."""
    resolved = {}
    for instance in instances:
        foreign = any(cls.__module__.split(".")[0] == "transformers" for cls in type(instance).__mro__)
        for f in dataclasses.fields(instance):
            value = getattr(instance, f.name)
            if "token" in f.name.split("_") and f.name.startswith("hub"):
                continue  # an access token must not be written to a file
            if f.name in getattr(instance, "derived_fields", ()):
                continue  # decided by another field, which is recorded
            ours = f.name in inspect.get_annotations(type(instance))
            if not f.init or (foreign and value == _default(f) and not ours):
                continue
            if foreign and (value == [] or not isinstance(value, str | int | float | list | dict | None)):
                continue  # computed by the class, not given by the user
            value = "auto" if (f.name, value) == AUTO else value
            resolved[f.name] = json.loads(json.dumps(value, default=str))
    return resolved


def default_keys(*instances: Any) -> frozenset[str]:
    """Names of the settings in `resolved_config` that have their default values."""
    return frozenset(resolved_config(*instances).keys() - changed_settings(*instances).keys())


def changed_settings(*instances: Any) -> dict[str, object]:
    """The values of `resolved_config` that are not the default: the content of an equivalent config file."""
    defaults = {f.name: _default(f) for instance in instances for f in dataclasses.fields(instance) if f.init}
    config = resolved_config(*instances).items()
    changed = {name: value for name, value in config if value is not None and value != defaults[name]}
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in changed.items()}


def field_types(*instances: Any) -> dict[str, Any]:
    """The type of every field that a config file may set, as `bind` reads it: a list's is `list[...]`."""
    types: dict[str, Any] = {}
    for instance in instances:
        hints = typing.get_type_hints(type(instance))
        types |= {f.name: _plain_type(hints[f.name]) for f in dataclasses.fields(instance) if f.init}
    return types


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def model_type_of(values: RunConfig) -> str:
    """The model type of a new model: that of its `preset_model`, else `model_type`.

    Raises: UserError for an unknown preset, or one of another family than `model_type`.
    """
    preset, given = values.get("preset_model"), values.get("model_type")
    if preset is None:
        return str(given or RunArguments.model_type)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # imports torch

    families: dict[str, Any] = {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING.keys() if name.startswith("bm_")}
    owner = next((name for name, config_class in families.items() if preset in config_class.presets), None)
    if owner is None:
        known = "; ".join(f"{name}: {', '.join(sorted(cls.presets))}" for name, cls in families.items())
        raise UserError(f"preset_model={preset!r} is unknown; there are {known}")
    if given not in (None, owner):
        raise UserError(f"preset_model={preset} is a {owner}, and model_type={given}; leave it out")
    return owner


def model_fields(model_type: str) -> type:
    """A dataclass of the architecture fields of a model type; None stands for the configuration class's own default.

    Without fields that the data decide (vocab_size, special token ids) or that concern inference only (use_cache).
    The help of a field is that of the configuration class.
    """
    return fields_of_configuration(_config_class(model_type))


def fields_of_configuration(config_class: Any) -> type:
    """`model_fields` of a configuration class, or of what it declares."""
    fields = [
        (name, _plain_type(config_class.__annotations__[name]) | None, setting(None, field_help(config_class, name)))
        for name in architecture_fields(config_class)
    ]
    group = {"_argument_group_name": f"architecture of a new {config_class.model_type} (without --model)"}
    return dataclasses.make_dataclass(f"{config_class.__name__}Fields", fields, namespace=group)


def architecture_fields(config_class: Any) -> list[str]:
    """The fields of a configuration class itself that decide the shape of a model."""
    known = {f.name for f in dataclasses.fields(config_class)} - {"vocab_size", "use_cache"}
    own = inspect.get_annotations(config_class)
    return [name for name in own if name in known and not name.endswith("_token_id")]


def field_help(config_class: Any, name: str) -> str:
    """The help of a configuration field and its default; fields of transformers' own classes have no help."""
    described = next(f for f in dataclasses.fields(config_class) if f.name == name)
    text = described.metadata.get("help", f"field of transformers' {config_class.__name__}")
    if _default(described) is not None or "default:" not in text:
        text = f"{text} (default: {shown_default(_default(described))})"
    return text.replace("%", "%%")


def chosen_fields(architecture: object) -> dict[str, object]:
    """The fields of a bound `model_fields` that file or command line set; dictionaries are parsed from JSON text.

    Raises: UserError for a size below 1, and for text that is not JSON.
    """
    chosen = {name: value for name, value in vars(architecture).items() if value is not None}
    if wrong := [f"{name}={chosen[name]}" for name in SIZES if chosen.get(name, 1) < 1]:
        raise UserError(f"{', '.join(wrong)} must be at least 1")
    for name, value in chosen.items():
        if isinstance(value, str) and value.startswith(("{", "[")):
            try:
                chosen[name] = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{name}={value} is not valid JSON: {error}") from error
    return chosen


def read_yaml(path: Path) -> dict[str, object]:
    """The flat mapping in a YAML file.  Raises FileNotFoundError or UserError that name the file and the remedy."""
    path = path.expanduser()
    if not path.exists() or path.is_dir():  # a pipe, as of <(...), is no regular file
        folder = path.parent if path.parent.is_dir() else path.parent.parent
        there = sorted(p.stem for p in folder.glob("[!.]*") if p.suffix == ".yaml" or p.is_dir())
        hint = f"; {folder} holds {', '.join(there)}" if there else ""
        raise FileNotFoundError(f"config file {path} does not exist{hint}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UserError(f"config file {path} must be flat: one `key: value` per line, no nesting")
    return values


def with_shipped_data(values: dict[str, object], recipes: Path) -> dict[str, object]:
    """Values of a config file, whose paths `recipes/data/...` are found also where the working folder is no clone."""

    def found(value: object) -> object:
        if isinstance(value, list):
            return [found(item) for item in value]
        if isinstance(value, dict):  # an item of a list
            return {name: found(item) for name, item in value.items()}
        if not isinstance(value, str) or not value.startswith("recipes/data/") or Path(value).exists():
            return value
        shipped = recipes / value.removeprefix("recipes/")
        return str(shipped) if shipped.exists() else value

    return {key: found(value) for key, value in values.items()}


def _config_class(model_type: str) -> Any:
    """The configuration class of a model type.  Raises: UserError with similar names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # imports torch

    if model_type not in CONFIG_MAPPING:
        similar = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        ours = [name for name in CONFIG_MAPPING.keys() if name.startswith("bm_")]
        hint = f"; names of transformers that are near: {', '.join(similar)}" if similar else ""
        raise UserError(f"model_type={model_type!r} is unknown; ours are {', '.join(ours)}{hint}")
    return CONFIG_MAPPING[model_type]


def _cli_pairs(argv: list[str]) -> Iterator[tuple[str, str | bool]]:
    """(key, raw value) for each `--key value`, `--key=value` and bare `--flag` (True) of a command line."""
    for position, text in enumerate(argv):
        if not text.startswith("--"):
            continue
        key, equals, value = text[2:].partition("=")
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        yield key.replace("-", "_"), value if equals else (True if following.startswith("--") else following)


def _at_home(value: object) -> object:
    """`value` with ~/ replaced by the home folder, which a shell does for the command line only."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, dict):
        return {name: _at_home(item) for name, item in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _without_unset(argv: list[str]) -> list[str]:
    """The command line without `--key null` and `--key=null`."""
    kept: list[str] = []
    for text in argv:
        if text == UNSET and kept and kept[-1].startswith("--") and "=" not in kept[-1]:
            kept.pop()
        elif not (text.startswith("--") and text.endswith(f"={UNSET}")):
            kept.append(text)
    return kept


def _as_argv(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        items = (json.dumps(item, ensure_ascii=False) if isinstance(item, dict) else str(item) for item in value)
        return [f"--{key}", *items]
    return [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}"]


def unknown_key(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; see --help for the known ones")


def _without_repeated_fields(classes: list[Any]) -> list[Any]:
    seen: set[str] = set()
    kept = []
    for cls in classes:
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        if names & seen:
            left = [(f.name, f.type, f) for f in dataclasses.fields(cls) if f.name not in seen]
            kept_attributes = {k: v for k, v in vars(cls).items() if k in ("__doc__", "_argument_group_name")}
            cls = dataclasses.make_dataclass(cls.__name__, left, namespace=kept_attributes)
        seen |= names
        kept.append(cls)
    return kept


def _plain_type(hint: Any) -> Any:
    """The type for the command line: `int | float` becomes float, `X | None` X, and a dictionary its JSON text."""
    members = [m for m in typing.get_args(hint) if m is not type(None)] if typing.get_origin(hint) is not None else []
    if typing.get_origin(hint) is typing.Literal:
        return hint
    if typing.get_origin(hint) in (list, tuple):
        return list[_plain_type(members[0])]  # type: ignore[misc]
    if float in members:
        return float
    if members:
        return _plain_type(members[0])
    return hint if hint in (bool, int, float, str) else str
