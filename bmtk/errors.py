"""Errors that a user can mend, separated from faults of bmtk."""

import errno
import platform
import re
import traceback
from importlib.metadata import PackageNotFoundError, version

from huggingface_hub.errors import StrictDataclassError

ISSUE_TRACKER = "the issue tracker of big-model-toolkit"
VERSIONS_TO_QUOTE = {"bmtk": "big-model-toolkit", "torch": "torch", "transformers": "transformers"}
# Modules whose ValueErrors are about settings, names or files of the user.  Code in models/ is uploaded, so it cannot
# import UserError; the libraries have no such class.
RAISE_FOR_USERS = (
    "bmtk.models.",
    "transformers_modules.",  # the same code, loaded from a repository
    "transformers.training_args",
    "transformers.hf_argparser",
    "transformers.configuration_utils",
    "transformers.dynamic_module_utils",
    "transformers.integrations.integration_utils",
    "transformers.models.auto.",
    "huggingface_hub.",
    "datasets.load",
    "datasets.builder",
    "datasets.data_files",
    "accelerate.",
    "peft.",
)

# Libraries that name a package to install, where one of their options needs it.
NAME_PACKAGES = ("transformers.", "accelerate.", "peft.", "datasets.")
# Of torch on a CPU, which has no class for it, and of CUDA where torch asks for memory in another library's name.
NO_MEMORY = "DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
# What is said where a disk is full, or a quota used up: by the system (through Rust in an Exception or a
# SafetensorError), by torch.save (in a RuntimeError) and by numpy.
NO_SPACE = re.compile(
    r"No space left on device|Disk quota exceeded|PytorchStreamWriter|inline_container\.cc:\d+\] \. unexpected pos"
    r"|iostream error|\d+ requested and \d+ written"
)
ROOM = "make room"  # the remedy
LOST_PROCESS = "onnection closed by peer", "onnection reset by peer"  # of gloo and of NCCL's store


class UserError(ValueError):
    """Bad input: a setting, file, row or model that the message names, with what is allowed and the remedy.

    The recipes and the command show its message as one line and exit with status 1.  Every other exception keeps its
    traceback, because it is a fault of bmtk.
    """


class Diverged(FloatingPointError):
    """A run whose steps cannot be applied any more, whatever was tried."""

    exit_code = 65


def exit_code_of(error: BaseException) -> int:
    """The status with which a command ends after `error`."""
    return error.exit_code if isinstance(error, Diverged) else 1


def user_message(error: BaseException) -> str | None:
    """The message of an error that the user can mend; None for a fault of bmtk.

    Mendable: UserError, files (OSError, text that is not UTF-8, an exception of datasets), a full disk, a
    configuration that its own checks refuse, a loss that is not finite, too little memory, a package that an option of
    a library needs, and ValueErrors of `RAISE_FOR_USERS`.  A process that lost another one only points to the message
    of that one.
    """
    if isinstance(error, StrictDataclassError):  # the cause is what a validate_... method of the configuration raised
        return str(error.__cause__ or error)
    if isinstance(error, UserError | OSError | UnicodeDecodeError | FloatingPointError) or is_disk_full(error):
        return str(error) + remedy_for_disk(error)
    if is_out_of_memory(error):
        return f"out of memory: {error}\nlower micro_batch_size or batch_size, or set gradient_checkpointing"
    if type(error).__module__ == "datasets.exceptions":  # not all of them are OSErrors
        return str(error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PROCESS):
        return "another process of this run has stopped; its own message says why"
    if isinstance(error, RuntimeError) and raising_module(error).startswith(
        "transformers.integrations.integration_utils"
    ):
        return str(error)  # of report_to, for a service whose package is not installed
    if isinstance(error, PackageNotFoundError):  # transformers' own check of an optional package
        name = re.sub(r".*The '(.+?)' distribution.*", r"\1", str(error.args[0]), flags=re.DOTALL)
        return f"an option needs the package {name}, which is not installed: pip install '{name}', or leave it out"
    if isinstance(error, ImportError) and raising_module(error).startswith(NAME_PACKAGES):
        return str(error)
    if isinstance(error, ValueError) and raising_module(error).startswith(RAISE_FOR_USERS):
        return str(error)
    return None


def remedy_for_disk(error: BaseException) -> str:
    """A line on what to do where the disk is full; "" where it is not, or the message says it already."""
    if not is_disk_full(error) or ROOM in str(error):
        return ""
    return f"\nthe disk is full: {ROOM}, then run the same command again; what was saved before is whole"


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written because no room was left, or allowed, for it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, Exception) and bool(NO_SPACE.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too little: of Python, of a device, or of torch on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; slow to import
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def raising_module(error: BaseException) -> str:
    """The name of the module whose code raised `error`; "" if it was never raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def fault_report(error: BaseException) -> str:
    """The traceback of a fault of bmtk, and two lines that say where to report it and which versions to quote."""
    lines = str(error).splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    return (
        f"\n{trace}\nerror: {what}. This is a fault of bmtk, not of your settings or data.\n"
        f"Please report it in {ISSUE_TRACKER}, with the lines above and these versions: {versions()}\n"
    )


def versions() -> str:
    """The versions that decide how bmtk behaves: of itself, torch, transformers and Python."""
    found = [f"{name} {installed_version(package)}" for name, package in VERSIONS_TO_QUOTE.items()]
    return ", ".join([*found, f"python {platform.python_version()}"])


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # bmtk itself, run from a folder
        return "(not installed)"
