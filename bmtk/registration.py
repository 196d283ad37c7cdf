"""When the model families are registered: as soon as transformers' Auto classes are imported, before or after bmtk.

The Auto classes need torch, which takes seconds to import; `--help` and a mistyped option need neither.  So `import
bmtk` leaves a note for the import system instead: the module of an Auto class is imported, then ours are added to it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = ("configuration", "modeling", "feature_extraction", "image_processing", "video_processing")
MODULES = (  # in the order in which their classes look each other up
    *(f"transformers.models.auto.{name}_auto" for name in _AUTO),
    *(f"bmtk.models.modeling_{family}" for family in ("bm_cnn", "bm_rnn", "bm_transformer")),
)


def register() -> None:
    """Register every family with each Auto class, now or once it is imported; calling it again changes nothing."""
    if any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        return
    finder = AfterImport(set(MODULES))
    sys.meta_path.insert(0, finder)
    for name in MODULES:
        if name in sys.modules:
            finder.waiting.discard(name)
            add_families(name)


def add_families(module: str) -> None:
    """Add our classes to the Auto classes of a module that has been imported, or name these to the heads of ours."""
    from bmtk import models  # its configurations need torch

    models.AFTER_IMPORT_OF[module.rpartition(".")[2]]()


class AfterImport(MetaPathFinder):
    """Finds the modules that are waited for as Python does, and adds our classes once they have been executed."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            self.waiting.discard(fullname)
            add_families(fullname)

        # The loader stays what it is, for those who ask it for source or data.
        setattr(spec.loader, "exec_module", execute_and_add)  # noqa: B010  mypy knows the method only
        return spec
