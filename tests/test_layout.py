"""The plan of the house, enforced: who may import whom, where things stand, what is never written down."""

import ast
import difflib
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BMTK = ROOT / "bmtk"
MODELS = BMTK / "models"
UPLOADED = sorted(path for path in MODELS.glob("*.py") if path.name != "__init__.py")
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CACHES = {"__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
IGNORED = {".venv", ".git", "build", "dist", "outputs", *CACHES}

GROUND_FLOOR = {"errors", "files", "settings", "process"}  # any room but models may import them
# Room -> the rooms it may import from, besides itself.  What is not listed is forbidden.
ARROWS = {
    "bmtk": {"registration"},  # bmtk/__init__.py: registration, and nothing else
    "registration": {"models"},
    "__main__": {"bmtk_cli"},
    "errors": set(),
    "files": set(),
    "settings": set(),
    "process": {"errors", "settings"},
    "option_help": {"declarations", *GROUND_FLOOR},
    "arguments": {"option_help", *GROUND_FLOOR},
    "declarations": GROUND_FLOOR,
    "start": {"arguments", "option_help", "declarations", "tasks", *GROUND_FLOOR},  # of tasks: their names
    "catalogue": {"models"},
    "data": GROUND_FLOOR,
    "metrics": GROUND_FLOOR,
    "tasks": {"data", "metrics", *GROUND_FLOOR},
    "training": GROUND_FLOOR,
    "hub": GROUND_FLOOR,
    "models": set(),
    "search": {"arguments", "training", "hub", *GROUND_FLOOR},
    "cleaning": {"arguments", "option_help", "data", "hub", *GROUND_FLOOR},
    "tools": {
        *("bmtk", "arguments", "catalogue", "data", "metrics", "search", "tasks", "training", "hub", "models"),
        *GROUND_FLOOR,
    },  # they read everything, and nothing but the command reads them
    "recipes": {"bmtk", "start", "arguments", "search", "tasks", "training", "hub", *GROUND_FLOOR},
    "bmtk_cli": {
        "bmtk",
        *GROUND_FLOOR,
        "arguments",
        "catalogue",
        "cleaning",
        "data",
        "metrics",
        "search",
        "tasks",
        "training",
        "hub",
        "models",
        "tools",
    },
}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "misc"}
MODEL_PACKAGES = {"torch", "numpy", "transformers", "huggingface_hub"}
PROCESSOR_PACKAGES = {"PIL"}  # transformers itself asks for it where images are processed
# Fields of a configuration that transformers reads, not we: generate(), from_pretrained() and the cache.
READ_BY_TRANSFORMERS = {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}


def project_files(*suffixes: str) -> list[Path]:
    """The project's own files of these kinds; what is built, installed or written by a run is not among them."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in IGNORED and not name.endswith(".egg-info")]
        found += [Path(folder) / name for name in names if Path(name).suffix in suffixes]
    return sorted(found)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "bmtk":
        return parts[0]
    return "bmtk" if parts[1] == "__init__" else parts[1]


def imported_modules(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at any depth; relative imports are made absolute.

    `from bmtk import hub` counts as `bmtk.hub`, and so does `from bmtk.hub import card` as `bmtk.hub.card`.
    """
    package = list(path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] in {"bmtk_cli", "recipes", "tests"}:
            rooms.add(parts[0])
        elif parts[0] == "bmtk":
            in_room = len(parts) > 1 and ((BMTK / parts[1]).is_dir() or (BMTK / f"{parts[1]}.py").is_file())
            rooms.add(parts[1] if in_room else "bmtk")
    return rooms


GUARDED = sorted([*BMTK.rglob("*.py"), *RECIPES, ROOT / "bmtk_cli.py"])


@pytest.mark.parametrize("path", GUARDED, ids=shown)
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    assert room in ARROWS, f"{room} is a new room: say in ARROWS and in CONTRIBUTING.md what it may import"
    assert rooms_imported(path) - {room} <= ARROWS[room]


def test_every_listed_room_exists():
    assert {room_of(path) for path in GUARDED} == set(ARROWS)


@pytest.mark.parametrize("path", GUARDED, ids=shown)
def test_nothing_is_imported_by_a_computed_name(path):
    """An arrow that the test above cannot see.  Two registries turn names into modules, of their own room."""
    if path in (MODELS / "__init__.py", BMTK / "tasks" / "__init__.py"):
        assert re.findall(r"import_module\((.*?),", path.read_text(encoding="utf-8")) in (
            ['f".{module}"'],
            ['f".{name}"'],
        )
        return
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
    }
    assert not calls & {"import_module", "__import__"}


def test_the_command_imports_only_the_standard_library_until_it_is_asked_for_something():
    path = ROOT / "bmtk_cli.py"
    roots = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots <= set(sys.stdlib_module_names)


def test_help_answers_without_torch():
    code = (
        "import sys, bmtk_cli\n"
        "try:\n    bmtk_cli.main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'bmtk', 'datasets'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: " in child.stdout
    assert child.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", GUARDED, ids=shown)
def test_importing_a_module_does_nothing(path):
    """Top-level code defines names.  Only `import bmtk` itself acts: it registers the families."""
    definitions = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    acts = []
    for position, node in enumerate(tree_of(path).body):
        is_docstring = position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        # Two files that name each other in annotations alone.
        is_for_checkers = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_docstring and not is_for_checkers and not isinstance(node, definitions):
            acts.append(ast.unparse(node).splitlines()[0])
    allowed = {"bmtk/__init__.py": ["register()"]}.get(shown(path), [])
    assert [act for act in acts if act != "if __name__ == '__main__':"] == allowed


def test_no_file_is_a_dumping_ground():
    named = [shown(path) for path in project_files(".py") if path.stem in FORBIDDEN_NAMES]
    folders = [shown(path) for path in BMTK.rglob("*") if path.is_dir() and path.name in FORBIDDEN_NAMES]
    assert named + folders == []


# Code that is uploaded with a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UPLOADED, ids=shown)
def test_uploaded_code_imports_what_a_machine_without_bmtk_has(path):
    """transformers copies `from .sibling import Name` and nothing else; every other import becomes a requirement."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            line = f"line {node.lineno} of {path.name}"
            assert node.level == 1, line
            assert node.module, f"{line}: `from . import x` is not copied"
            assert (MODELS / f"{node.module}.py").is_file(), line
            assert [alias.name for alias in node.names] != ["*"], line
            continue
        elif isinstance(node, ast.ImportFrom):
            roots = {node.module.split(".")[0]}
        else:
            continue
        allowed = MODEL_PACKAGES | (PROCESSOR_PACKAGES if path.stem.startswith("image_processing_") else set())
        assert roots <= allowed | set(sys.stdlib_module_names), f"line {node.lineno} of {path.name}"


def test_the_model_folder_is_flat_and_its_files_are_named_after_families():
    assert [path.name for path in MODELS.iterdir() if path.is_dir() and path.name != "__pycache__"] == []
    families = {
        path.stem.removeprefix("configuration_") for path in UPLOADED if path.stem.startswith("configuration_")
    }
    expected = {f"{kind}_{family}" for family in families for kind in ("configuration", "modeling")}
    stems = {path.stem for path in UPLOADED}
    of_families = {stem for stem in stems if stem.startswith(("configuration_", "modeling_"))}
    assert of_families == expected
    shared = stems - of_families  # what they are made of: NOUN_bm, heads_INPUT_bm, stems_INPUT_bm, FAMILY_NOUN_bm
    assert {"heads_bm", "stems_bm"} <= shared
    assert [stem for stem in shared if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)?_bm", stem)] == []


def config_classes() -> list[type]:
    return list(importlib.import_module("bmtk.models").FAMILIES)


def test_every_configuration_file_is_a_registered_family():
    files = {path.stem for path in UPLOADED if path.stem.startswith("configuration_")}
    assert {config_class.__module__.rpartition(".")[2] for config_class in config_classes()} == files


def test_the_auto_map_names_every_head_class_and_no_other():
    transformers = importlib.import_module("transformers")
    for config_class in config_classes():
        auto_map = config_class().auto_map
        assert auto_map.pop("AutoConfig") == f"{config_class.__module__.rpartition('.')[2]}.{config_class.__name__}"
        assert auto_map == config_class.heads
        named = set()
        for auto_name, reference in auto_map.items():
            module, class_name = reference.split(".")
            model_class = getattr(importlib.import_module(f"bmtk.models.{module}"), class_name)
            assert model_class.config_class is config_class
            assert config_class in getattr(transformers, auto_name)._model_mapping
            named.add(class_name)
        tree = tree_of(MODELS / f"modeling_{config_class.model_type}.py")
        written = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and "For" in node.name}
        assert {name for name in named if "For" in name} == written


def names_read(path: Path) -> set[str]:
    """Attributes that a file reads, outside of validate_* methods: a field that is only validated is not used."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [item for item in node.body if not getattr(item, "name", "").startswith("validate_")]
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_every_config_field_is_read_by_a_line():
    read = set().union(*(names_read(path) for path in UPLOADED)) | READ_BY_TRANSFORMERS
    for config_class in config_classes():
        tree = tree_of(MODELS / f"configuration_{config_class.model_type}.py")
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
        fields = {
            node.target.id
            for node in body
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
        }
        assert len(fields) > 5
        assert fields - read == set()


def test_no_configuration_file_postpones_its_annotations():
    """With `from __future__ import annotations` the field checks of @strict are silently off."""
    files = [path for path in UPLOADED if path.stem.startswith("configuration_")]
    assert files
    for path in files:
        assert "__future__.annotations" not in imported_modules(path), shown(path)


# Classes -------------------------------------------------------------------------------------------------------------

CLASSES = {node.name: node for path in GUARDED for node in tree_of(path).body if isinstance(node, ast.ClassDef)}
MOST_METHODS = 25
# Attributes that a base class of another library gives birth to.
CACHE_LAYER = {"keys", "values", "device", "dtype"}  # of transformers' CacheLayerMixin
BORN_ELSEWHERE = {
    "PatchedTrainer": {"_globalstep_last_logged"},
    "TaskTrainer": {"model", "model_wrapped", "optimizer"},
    "RecurrentState": CACHE_LAYER,
    "ConvolutionCacheLayer": CACHE_LAYER,
}


def lineage(node: ast.ClassDef) -> list[ast.ClassDef]:
    """The class and those of the project that it inherits from."""
    names = [ast.unparse(base).split("[")[0] for base in node.bases]
    return [node, *(ancestor for name in names if name in CLASSES for ancestor in lineage(CLASSES[name]))]


def assigned_to_self(function: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def born(node: ast.ClassDef) -> set[str]:
    """Attributes of the class body and of the constructor."""
    found = set(BORN_ELSEWHERE.get(node.name, ()))
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__post_init__", "__new__"):
            found |= assigned_to_self(item)
        elif isinstance(item, ast.AnnAssign):
            found.add(item.target.id)
        elif isinstance(item, ast.Assign):
            found |= {target.id for target in item.targets if isinstance(target, ast.Name)}
        elif isinstance(item, ast.FunctionDef) and item.decorator_list:
            found.add(item.name)  # a property with a setter
    return found


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_no_attribute_is_born_outside_a_constructor(name):
    """What an object has can be read in one place; that it is not known yet is a None, with its type."""
    known = set().union(*(born(ancestor) for ancestor in lineage(CLASSES[name])))
    assert assigned_to_self(CLASSES[name]) - known == set()


def test_no_two_classes_have_one_name():
    names = [node.name for path in GUARDED for node in tree_of(path).body if isinstance(node, ast.ClassDef)]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_is_one_thing(name):
    methods = [item for item in CLASSES[name].body if isinstance(item, ast.FunctionDef)]
    assert len(methods) <= MOST_METHODS


# Recipes -------------------------------------------------------------------------------------------------------------


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def num_statements(node: ast.AST) -> int:
    """Statements inside of a function or a file, with those in its blocks."""
    return sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - isinstance(node, ast.stmt)


def nesting(node: ast.AST) -> int:
    """How many blocks lie within each other."""
    return max((nesting(child) + isinstance(child, BLOCKS) for child in ast.iter_child_nodes(node)), default=0)


@pytest.mark.parametrize("path", RECIPES, ids=shown)
def test_a_recipe_is_a_short_straight_line(path):
    functions = [node for node in tree_of(path).body if isinstance(node, ast.FunctionDef)]
    assert "main" in {function.name for function in functions}
    assert {function.name for function in functions if num_statements(function) > 40} == set()
    assert {function.name for function in functions if nesting(function) > 2} == set()
    assert sum(num_statements(function) for function in functions) <= 75
    loops = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
    counting = [ast.unparse(loop).splitlines()[0] for loop in loops if "range(" in ast.unparse(loop).splitlines()[0]]
    assert [loop for loop in loops if isinstance(loop, ast.While)] == counting == [], (
        "a loop over steps or epochs belongs to bmtk/training"
    )


def code_lines(path: Path) -> list[str]:
    """A recipe's lines without blank ones, comments, docstrings and imports, which honest recipes share."""
    tree = tree_of(path)
    skipped = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [line.strip() for number, line in lines if number not in skipped and line.strip(" \t#")]


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(RECIPES, 2)), ids=lambda path: path.stem if path else ""
)
def test_no_two_recipes_are_copies(one, other):
    first, second = code_lines(one), code_lines(other)
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in blocks) <= 0.6 * min(len(first), len(second))


# The whole project ---------------------------------------------------------------------------------------------------


def test_no_file_names_a_place_on_somebodys_machine():
    """Written so that this file passes too.  Tests may invent a user's home, in order to see it scrubbed."""
    machine, home = re.compile(r"(?<![\w.])/(?:work|root|mnt)/"), re.compile(r"/(?:home|Users)/\w")
    files = project_files(".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".html", ".cfg", "")
    assert len(files) > 30
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        patterns = [machine] if shown(path).startswith("tests/") else [machine, home]
        found += [f"{shown(path)}: {match.group()}" for pattern in patterns for match in pattern.finditer(text)]
    assert found == []
