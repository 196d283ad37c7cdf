"""How a recipe starts: what needs no torch is answered first, and what takes seconds is imported once, in a hurry.

if __name__ == "__main__":
    begin(__file__, __doc__, sys.argv[1:])
import torch ...
"""

import gc
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from bmtk import arguments
from bmtk.declarations import ModuleSource, declared, source_of
from bmtk.option_help import help_topic
from bmtk.process import clean_errors
from bmtk.tasks import check_task

DEFERRED = "scipy.optimize"
TRAINED_FOR = "sequence_classification"  # by models without a run.json, as in the recipes
# Recipe -> its config file, its own settings after those of run and data.  Recipes that train make a new model, too.
TRAINING: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "pretrain": (
        "causal_lm/tiny_shakespeare",
        (
            ("bmtk.training.arguments", "LoopArguments"),
            ("bmtk.training.sizes", "SizeArguments"),
            ("bmtk.search.space", "SearchArguments"),
        ),
    ),
    "finetune": (
        "sequence_classification/sst2",
        (
            ("bmtk.training.finetuning_arguments", "FineTuningArguments"),
            ("bmtk.training.adapters", "AdapterArguments"),
            ("bmtk.search.space", "SearchArguments"),
        ),
    ),
}
FAMILIES = {"bm_cnn": "BmCnnConfig", "bm_rnn": "BmRnnConfig", "bm_transformer": "BmTransformerConfig"}
SERVING = {  # recipe -> its settings, and those without which it does nothing
    "evaluate": ("EvaluationArguments", ("model",)),
    "predict": ("PredictionArguments", ("model", "input")),
}


def begin(recipe: str, description: str, argv: list[str]) -> None:
    """Answer `--help` and unknown keys of `recipe` (a file) and exit; else say that the libraries are imported.

    Python looks for unused objects all the time while it imports: of those that are made here none is unused, and to
    look for them takes a fifth of the time.  `imported` turns that on again, and what Ctrl-C raises.
    """
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends an import without a traceback; status 130
    with clean_errors():
        answer(Path(recipe), description, argv)
    say("loading PyTorch and transformers ...")
    read_models_once()
    defer_scipy()


def read_models_once() -> None:
    """Let transformers 5.23 read the sources of its models once: `import transformers` does, and its `models` again.

    Each time takes 0.3 seconds.  Its cache has the whole under the path that was used first; of the folders inside it
    keeps the last 128, known by text.
    """
    from transformers.utils import import_utils

    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is None:  # another version
        return

    def of_folder(path: str | Path) -> Any:
        folder = Path(path).parent
        if Path(path).name != "__init__.py":
            return read(path)
        return read(folder if folder.name == "models" else str(folder))

    setattr(import_utils, "create_import_structure_from_path", of_folder)  # noqa: B010  mypy knows a cached function


def defer_scipy() -> None:
    """Stand in for scipy.optimize (0.3 seconds) until `imported`: transformers 5.23 imports a function of it.

    That is called where a detector of theirs matches boxes, and then is scipy's own.  Its submodules are found.
    """
    stand_in = ModuleType(DEFERRED)
    scipy = importlib.util.find_spec("scipy")
    stand_in.__path__ = [f"{folder}/optimize" for folder in scipy.submodule_search_locations or ()] if scipy else []

    def of_scipy(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(DEFERRED) is stand_in:
            del sys.modules[DEFERRED]
        import scipy.optimize

        return getattr(scipy.optimize, name)

    stand_in.__dict__["__getattr__"] = of_scipy
    stand_in.__dict__["linear_sum_assignment"] = lambda *costs, **options: of_scipy("linear_sum_assignment")(
        *costs, **options
    )
    sys.modules.setdefault(DEFERRED, stand_in)


def imported() -> None:
    """All is imported: what there is stays, and is not looked through again."""
    if getattr(sys.modules.get(DEFERRED), "__spec__", None) is None:
        sys.modules.pop(DEFERRED, None)
    gc.freeze()
    gc.enable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    say("reading the data ...")


def say(what_takes_seconds: str) -> None:
    """A line on stderr, of the main process."""
    if os.environ.get("RANK", "0") == "0":
        print(what_takes_seconds, file=sys.stderr, flush=True)  # noqa: T201


def answer(recipe: Path, description: str, argv: list[str]) -> None:
    """Show help, or refuse unknown keys and values of a wrong type, as the recipe itself does later.

    Nothing is done where only the libraries know the options.  Raises: as `RunConfig.read` and `RunConfig.answer`.
    """
    read = read_training if recipe.stem in TRAINING else read_serving
    values, classes = read(recipe, argv)
    if classes:
        values.answer(classes, description=description).parse_known_args(values.words)


def read_training(recipe: Path, argv: list[str]) -> tuple[arguments.RunConfig, list[Any]]:
    """The values of a run that trains, and what its dataclasses declare; [] for a family that is not ours."""
    default, settings = TRAINING[recipe.stem]
    values = arguments.RunConfig.read(argv, configs=recipe.parent / "configs", default=default)
    task, config_class = check_task(values.get("task", default.split("/")[0])), configuration(values)
    if config_class is None:
        return values, []
    of_task, architecture = task_arguments(task), arguments.fields_of_configuration(config_class)
    if values.get("size") is not None:
        values.keep_data_of_default_file(of_task)
    own = [declared(*setting) for setting in settings]
    return values, [arguments.RunArguments, of_task, *own, architecture]


def read_serving(recipe: Path, argv: list[str]) -> tuple[arguments.RunConfig, list[Any]]:
    """The same for a recipe that uses a model: its run.json names the task."""
    name, needed = SERVING[recipe.stem]
    values = arguments.RunConfig({}, argv)
    if recipe.stem == "evaluate" and values.get("config"):
        path = Path(str(values.get("config")))
        values = arguments.RunConfig(arguments.read_yaml(path), argv, path)
    record = Path(str(values.get("model"))) / "run.json"
    if help_topic(argv) is None and not all(values.get(key) for key in needed):
        return values, []
    trained_for = json.loads(record.read_text(encoding="utf-8")).get("task") if record.is_file() else TRAINED_FOR
    task = check_task(values.get("task", trained_for))
    return values, [ModuleSource(recipe.stem, recipe)[name], task_arguments(task)]


def task_arguments(task: str) -> Any:
    source = source_of(f"bmtk.tasks.{task}")
    return source[source.keyword("TASK", "arguments")]


def configuration(values: arguments.RunConfig) -> Any:
    """What the configuration class of a new model declares, if it is of a family of ours."""
    preset, model_type = values.get("preset_model"), values.get("model_type")
    for family, name in FAMILIES.items():
        source = source_of(f"bmtk.models.configuration_{family}")
        if preset in source["PRESETS"] and model_type in (None, family):
            return source[name]
        if preset is None and family == (model_type or arguments.RunArguments.model_type):
            return source[name]
    return None
