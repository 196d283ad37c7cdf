"""What a command imports before it answers, and that its early answers are those of the recipe itself."""

import gc
import importlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from bmtk import start
from bmtk.declarations import Absent, ModuleSource, module_alone
from bmtk.errors import UserError
from bmtk.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
SLOW = (
    *("torch", "transformers", "peft", "accelerate", "sklearn", "scipy", "datasets", "pandas", "matplotlib"),
    *("optuna", "numpy", "huggingface_hub.utils"),
)
RECIPES = ("pretrain", "finetune", "evaluate", "predict")


def child(code, *argv):
    """What Python prints last, as JSON, in a process of its own."""
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


AFTER = f"""
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print()
    print(json.dumps([end.code, sorted(set({SLOW}) & set(sys.modules))]))
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_and_a_mistyped_option_are_answered_without_the_libraries(recipe):
    path = f"recipes/{recipe}.py"
    assert child(AFTER, path, "--help") == [0, []]
    needed = [] if recipe in start.TRAINING else ["--model", "none", "--input", "none"]
    assert child(AFTER, path, *needed, "--outptu", "x") == [1, []]


def test_a_value_of_a_wrong_type_is_refused_without_the_libraries():
    assert child(AFTER, "recipes/finetune.py", "--preset", "smoke", "--learning_rate", "fast") == [2, []]


def test_bmtk_is_imported_without_the_libraries():
    assert child(f"import json, sys, bmtk; print(json.dumps(sorted(set({SLOW}) & set(sys.modules))))") == []


@pytest.mark.slow
def test_a_recipe_that_pretrains_imports_no_library_of_other_tasks():
    others = ("sklearn", "scipy.stats", "matplotlib", "jiwer", "sacrebleu", "pycocotools", "evaluate")
    code = f"import json, sys, recipes.pretrain; print(json.dumps(sorted(set({others}) & set(sys.modules))))"
    assert child(code) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import bmtk; from transformers import BertModel, pipeline",  # its modeling_layers asks for the Auto classes
        "import transformers.modeling_layers; import bmtk.models.modeling_bm_rnn",
    ],
)
def test_the_families_are_registered_whatever_is_imported_first(first):
    code = f"""
{first}
import json, transformers
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
from bmtk.models import FAMILIES
known = [[name, getattr(transformers, name)._model_mapping[family]] for family in FAMILIES for name in family.heads]
assert all(head._auto_class == name for name, head in known)
assert FAMILIES[0] in VIDEO_PROCESSOR_MAPPING and transformers.AutoImageProcessor
config = transformers.AutoConfig.for_model("bm_rnn", hidden_size=8, num_hidden_layers=1, vocab_size=9)
print(json.dumps([len(known), type(transformers.AutoModelForCausalLM.from_config(config)).__name__]))
"""
    number, name = child(code)
    assert (number > 30, name) == (True, "BmRnnForCausalLM")


EARLY = """
import contextlib, io, json, sys
from pathlib import Path
from bmtk import start
from bmtk.declarations import ModuleSource
sys.argv = ["recipe"]
found = []
for recipe, argv in json.loads(Path(sys.stdin.readline().strip()).read_text()):
    path = Path("recipes", recipe + ".py")
    description = ModuleSource(recipe, path).tree.body[0].value.value
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        start.answer(path, description, argv)
    found.append(text.getvalue())
assert "torch" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_early_help_is_that_of_the_classes_themselves(tmp_path, capsys, monkeypatch):
    """Every option of every task, family and recipe, its type, choices, default and help."""
    monkeypatch.setenv("COLUMNS", "119")
    monkeypatch.setattr(sys, "argv", ["recipe"])
    asked = [(recipe, ["--help", "all", "--task", task]) for recipe in RECIPES for task in TASKS]
    asked += [(r, ["--help", "all", "--model_type", f]) for r in start.TRAINING for f in start.FAMILIES]
    asked += [("finetune", ["--help", "--preset_model", "resnet-18", "--model_type", "bm_cnn"])]
    asked += [("pretrain", ["--help", "data"])]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", EARLY]
    path = str(tmp_path / "asked.json")
    done = subprocess.run(command, cwd=ROOT, input=path, capture_output=True, text=True, check=True)
    early = json.loads(done.stdout)
    for (recipe, argv), text in zip(asked, early, strict=True):
        with pytest.raises(SystemExit):
            importlib.import_module(f"recipes.{recipe}").read_arguments(argv)
        assert (recipe, argv, in_any_order(text)) == (recipe, argv, in_any_order(capsys.readouterr().out))
        assert text.count("--") > 10


def in_any_order(text):
    """Choices sorted: for typing, Literal["a", "b"] is Literal["b", "a"], and `| None` gives the one it saw first."""
    return re.sub(r"\[([a-z0-9_|]+)\]", lambda found: "|".join(sorted(found[1].split("|"))), text)


ALONE = """
import json, logging, sys
from bmtk.declarations import declared
from bmtk.option_help import OptionParser
read = declared("transformers.training_args", "TrainingArguments")
is_alone = "transformers" not in sys.modules
import transformers.hf_argparser
from transformers import TrainingArguments
same = [
    module.HfArgumentParser is OptionParser.__mro__[1] for module in (transformers, transformers.hf_argparser)
]
optimizers = {str(cls.__dataclass_fields__["optim"].default) for cls in (read, TrainingArguments)}
print(json.dumps([is_alone, same, len(optimizers), len(logging.getLogger("transformers").handlers)]))
"""


def test_transformers_is_the_same_when_it_is_imported_after_its_declarations_were_read():
    assert child(ALONE) == [True, [True, True], 1, 1]
    assert child(ALONE.replace("import json", "import json, transformers.trainer", 1)) == [False, [True, True], 1, 1]


READ = """
import json, sys
from pathlib import Path
from bmtk import start
from transformers.utils import import_utils
read, define = import_utils.create_import_structure_from_path, import_utils.define_import_structure.__wrapped__
if sys.argv[1] == "once":
    start.read_models_once()
before = read.cache_info().misses
import transformers.models
files = [transformers.__path__[0] + name for name in ("/models/__init__.py", "/models/auto/__init__.py")]
found, misses = [define(file) for file in files], read.cache_info().misses - before
read.cache_clear()
print(json.dumps([misses, found == [define(Path(file).parent) for file in files]]))
"""


def test_transformers_reads_its_models_once():
    misses, _ = child(READ, "plain")
    assert misses > 100, "transformers no longer needs read_models_once: delete it"
    misses, is_the_same = child(READ, "once")
    assert misses <= 1
    assert is_the_same


ASSIGN = """
import json, sys
from bmtk import start
start.defer_scipy()
import transformers.modeling_utils
from transformers.loss import loss_for_object_detection as losses
is_loaded = "scipy.optimize._optimize" in sys.modules
start.imported()
rows, columns = losses.linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]], maximize=False)
from scipy.optimize import linear_sum_assignment, minimize
same = all((a == b).all() for a, b in zip(linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]]), (rows, columns)))
print(json.dumps([is_loaded, columns.tolist(), same]))
"""


def test_scipy_is_imported_when_boxes_are_matched():
    assert child(ASSIGN) == [False, [1, 0, 2], True]
    plain = ASSIGN.replace("start.defer_scipy()\n", "")
    assert child(plain)[0], "transformers no longer needs defer_scipy: delete it"


BELOW = """
import json
from bmtk import start
start.defer_scipy()
from scipy.optimize._linesearch import line_search_wolfe1
from scipy.optimize import minimize
start.imported()
import scipy.optimize
from scipy.optimize import _linesearch
print(json.dumps([line_search_wolfe1 is _linesearch.line_search_wolfe1, minimize is scipy.optimize.minimize]))
"""


def test_modules_of_scipy_are_imported_while_it_is_stood_in_for():
    assert child(BELOW) == [True, True]


def test_an_unknown_task_is_refused_early():
    with pytest.raises(UserError, match="task='nothing' is unknown; choose one of audio_classification"):
        start.answer(ROOT / "recipes" / "finetune.py", "", ["--task", "nothing"])


def test_what_only_the_libraries_know_is_left_to_them():
    finetune, evaluate = ROOT / "recipes" / "finetune.py", ROOT / "recipes" / "evaluate.py"
    start.answer(finetune, "", ["--model_type", "bert", "--hidden_siez", "3"])  # nothing is raised
    start.answer(finetune, "", ["--preset_model", "resnet-18", "--learning_rat", "1"])  # the file names another family
    start.answer(evaluate, "", ["--split", "test"])  # which model?


def test_with_a_size_the_model_of_the_default_file_is_no_mistake():
    pretrain = ROOT / "recipes" / "pretrain.py"
    start.answer(pretrain, "", ["--size", "1M", "--model_type", "bm_rnn"])  # nothing is raised
    named = ["--config", str(ROOT / "recipes" / "configs" / "causal_lm" / "tiny_shakespeare.yaml")]
    with pytest.raises(UserError, match=r"tiny_shakespeare\.yaml: unknown key 'num_attention_heads'"):
        start.answer(pretrain, "", [*named, "--model_type", "bm_rnn"])


def test_garbage_is_collected_again_when_all_is_imported():
    gc.disable()
    try:
        start.imported()
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("after", ["", "start.imported(); "])
def test_ctrl_c_in_an_import_ends_it_without_a_traceback_and_later_it_is_an_exception(after):
    # A shell starts what it runs in the background with the signal ignored, and children inherit that.
    code = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bmtk import start; "
    code += "start.begin('recipes/finetune.py', '', ['--preset', 'smoke']); "
    code += after + "os.kill(os.getpid(), signal.SIGINT); print('not ended')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT  # as the shell's 130; also how Python ends after a KeyboardInterrupt
    assert ("KeyboardInterrupt" in done.stderr) == bool(after)
    assert "not ended" not in done.stdout


def test_a_module_that_fails_alone_is_not_left_behind(tmp_path, monkeypatch):
    (tmp_path / "halves").mkdir()
    (tmp_path / "halves" / "__init__.py").touch()
    (tmp_path / "halves" / "broken.py").write_text("begun = True\nimport no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    for load in (module_alone, importlib.import_module):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            load("halves.broken")


def test_declarations_are_read_without_running_their_module(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import sys\nimport no_such_library as lib\nfrom dataclasses import dataclass, field\n"
        "from no_such_library.part import Row, helper\nraise SystemExit('executed')\n"
        "if sys.maxsize:\n    CHOICES, LEAST = ('a', 'b'), lib.number('7')\nelse:\n    CHOICES = ()\n"
        "def setting(default):\n    return field(default=default, metadata={'help': ', '.join(CHOICES)})\n"
        "@dataclass\nclass Base(Row):\n    name: str = 'x'\n    rows: Row | None = None\n"
        "@helper(CHOICES)\nclass Arguments(Base):\n    size: int = setting(3)\n    def __str__(self): pass\n"
        "    __repr__ = __str__\n    if LEAST:\n        from no_such_library import most\n        most_of_all = most\n"
        "    name: str = 'y'\nTASK = dict(arguments=Arguments)\n"
        "from bmtk import process\nfrom packaging import version\nfrom importlib import metadata\n"
    )
    source = ModuleSource("module", path)
    declared = source[source.keyword("TASK", "arguments")]
    assert [(f.name, f.type, f.default) for f in fields(declared)] == [
        ("name", str, "y"),
        ("rows", Absent | None, None),
        ("size", int, 3),
    ]
    assert fields(declared)[2].metadata["help"] == "a, b"
    assert issubclass(declared, Absent)
