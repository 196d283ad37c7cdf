"""The options that a dataclass declares, read from its source: no library that its module needs is imported.

    declared("bmtk.tasks.causal_lm", "CausalLMArguments")     # fields, types, defaults and help of the real class

torch, transformers and peft take seconds to import, and `--help` needs none of them.  Of a module, only the statements
that a name depends on are executed; of a class, its fields and constants, without methods.
"""

import ast
import dataclasses
import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, resolve_name, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

READ = ("bmtk", "transformers")  # packages whose modules are read; a class of any other is `Absent`
IMPORTED = {*sys.stdlib_module_names, "packaging"}  # what takes no time; transformers asks packaging for versions


class _Anything(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: object) -> type:
        return cls


class Absent(metaclass=_Anything):
    """Stands for whatever a library has that is not imported: as a base class, in an annotation or in a constant."""

    def __init__(self, *args: object):
        pass


def declared(module: str, name: str) -> Any:
    """The dataclass `name` of a module, without its methods."""
    return source_of(module)[name]


def module_alone(name: str) -> ModuleType:
    """A module whose package is not imported with it; who imports it later gets the same one."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, path_of(name))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]  # as `import` does: the next one would get half of it
            raise
    return sys.modules[name]


@cache
def source_of(module: str) -> "ModuleSource":
    return ModuleSource(module, path_of(module))


def path_of(module: str) -> Path:
    first, *rest = module.split(".")
    package = find_spec(first)
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], *rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class ModuleSource:
    """The names that a file defines at its top level, each executed when it is asked for."""

    def __init__(self, module: str, path: Path):
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        # transformers' functions that make a logger add a handler to it, as they do again once they are imported
        self.names: dict[str, Any] = {"__name__": module, "logger": Absent}
        self.begun: set[ast.stmt] = set()  # a function may call itself
        self.statements = {name: node for node in _statements(self.tree.body) for name in _defined(node)}

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            node = self.statements[name]
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.names[name] = self._imported(node, name)
            else:
                self._execute(node)
        return self.names[name]

    def __getattr__(self, name: str) -> Any:
        """A name, as it is asked for where the module is imported."""
        if name in self.statements:
            return self[name]
        raise AttributeError(name)

    def keyword(self, name: str, argument: str) -> str:
        """The name that an argument of a call is given: C of `name = Call(argument=C)`."""
        call = getattr(self.statements[name], "value", None)
        assert isinstance(call, ast.Call)
        return next(
            word.value.id for word in call.keywords if word.arg == argument and isinstance(word.value, ast.Name)
        )

    def _execute(self, node: ast.stmt) -> None:
        self.begun.add(node)
        has_fields = isinstance(node, ast.ClassDef) and _has_fields(node)
        if isinstance(node, ast.ClassDef):
            node = ast.ClassDef(node.name, node.bases, [], [*_without_methods(node), ast.Pass()], [])
            self._import_for_class(node)
        read = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
        for name in read & self.statements.keys():
            if self.statements[name] not in self.begun:
                self[name]
        only = ast.fix_missing_locations(ast.Module([node], []))
        exec(compile(only, f"<{self.names['__name__']}>", "exec"), self.names)
        if isinstance(node, ast.ClassDef) and has_fields:
            dataclasses.dataclass(kw_only=True)(self.names[node.name])

    def _import_for_class(self, node: ast.ClassDef) -> None:
        """What the body of a class imports, under its conditions, becomes names of the module."""
        blocks: list[ast.ClassDef | ast.If] = [node, *(item for item in ast.walk(node) if isinstance(item, ast.If))]
        for parent in blocks:
            for place, child in enumerate(parent.body):
                if isinstance(child, ast.ImportFrom):
                    self.names |= {alias.name: self._imported(child, alias.name) for alias in child.names}
                    parent.body[place] = ast.Pass()

    def _imported(self, node: ast.Import | ast.ImportFrom, name: str) -> Any:
        alias = next(alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) == name)
        if isinstance(node, ast.Import):
            return _module(alias.name if alias.asname else name)
        module = resolve_name("." * node.level + (node.module or ""), self.package) if node.level else str(node.module)
        if (found := _module(module)) is not Absent:
            if not hasattr(found, alias.name):  # a module of a package
                exec(f"import {module}.{alias.name}")
            return getattr(found, alias.name)
        if module.split(".")[0] not in READ:
            return Absent
        if alias.name in (there := source_of(module)).statements:
            return there[alias.name]
        return source_of(whole) if path_of(whole := f"{module}.{alias.name}").exists() else Absent


def _module(name: str) -> Any:
    """A module that is `IMPORTED`, or that has been imported; else `Absent`.

    The package transformers imports what it is asked for.
    """
    if name.split(".")[0] in IMPORTED:
        exec(f"import {name}")
    return sys.modules.get(name, Absent) if name != "transformers" else Absent


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Those of a module, also under an `if`; where a name is defined in both branches, the first wins."""
    found: list[ast.stmt] = []
    for node in reversed(body):
        found += [*_statements(node.orelse), *_statements(node.body)] if isinstance(node, ast.If) else [node]
    return found


def _has_fields(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass, of its own or by its base class, as configurations are."""
    by_name = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return by_name or any(isinstance(item, ast.AnnAssign) for item in node.body)


def _without_methods(node: ast.ClassDef) -> list[ast.stmt]:
    """The body of a class without its methods, and without what is made of them."""
    methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    rest = [item for item in node.body if not isinstance(item, ast.FunctionDef)]
    return [item for item in rest if not methods & {name.id for name in ast.walk(item) if isinstance(name, ast.Name)}]


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return [name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
    return []
