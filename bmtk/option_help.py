"""The --help of a recipe: a first screen of the options that people change, and all options group by group."""

import argparse
import copy
import difflib
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmtk.declarations import module_alone
from bmtk.errors import UserError

if TYPE_CHECKING:
    from transformers import HfArgumentParser
else:  # the rest of transformers takes half of the time that `--help` takes
    HfArgumentParser = module_alone("transformers.hf_argparser").HfArgumentParser

ALL = "all"
WIDEST = 119  # columns; longer lines are hard to read
OPTION_COLUMN = 34  # columns of an option and its value, before its help
FirstScreen = Mapping[str, Mapping[str, Collection[str]]]  # first group of a recipe -> group -> options


def help_topic(argv: Sequence[str]) -> str | None:
    """TOPIC of `--help TOPIC` or `--help=TOPIC`; "" for a bare `--help` or `-h`, None without one."""
    for position, text in enumerate(argv):
        option, _, value = text.partition("=")
        if option in ("-h", "--help"):
            following = argv[position + 1] if position + 1 < len(argv) else "-"
            return value or ("" if following.startswith("-") else following)
    return None


class OptionHelp(argparse.RawDescriptionHelpFormatter):
    """An option, its value and its help in two columns; every help ends in the default."""

    def __init__(self, prog: str):
        columns = shutil.get_terminal_size((WIDEST, 24)).columns
        super().__init__(prog, max_help_position=OPTION_COLUMN, width=min(columns, WIDEST))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {_value_name(action)}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = re.sub(r"(?<!%)%(?![%(])", "%%", action.help or "")  # argparse formats it: "10 %" is no placeholder
        if action.choices is not None:
            text = f"[{'|'.join(map(str, action.choices))}] {text}"
        if "default:" in text or _is_negation(action):
            return text
        default = shown_default(action.default).replace("%", "%%")  # argparse formats the text with %
        return f"{text} (default: {default})".lstrip()


class FirstScreenHelp(OptionHelp):
    """The same, cut to the first sentence: those of transformers.TrainingArguments are paragraphs."""

    def _get_help_string(self, action: argparse.Action) -> str:
        cut = copy.copy(action)
        cut.help = re.split(r"(?<=\w)\. ", action.help or "")[0].rstrip(".")
        return super()._get_help_string(cut)


@dataclass
class Group:
    """Options that one dataclass declares."""

    title: str
    actions: list[argparse.Action]

    @property
    def name(self) -> str:
        """What `--help NAME` selects it by: the first word of the title."""
        return self.title.split()[0]

    @property
    def options(self) -> list[argparse.Action]:
        """All but the negations of switches."""
        return [action for action in self.actions if not _is_negation(action)]

    def chosen(self, names: Collection[str]) -> list[argparse.Action]:
        return [action for action in self.options if action.dest in names]

    def of_topic(self, topic: str) -> list[argparse.Action]:
        return self.actions if topic in (ALL, self.name) else []


class OptionParser(HfArgumentParser):
    """HfArgumentParser with short error messages, and a help that is shown in parts."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line: the usage of a hundred options hides what was wrong."""
        self.exit(2, f"error: {message}\n")

    def show_help(self, topic: str, first_screen: FirstScreen) -> None:
        """Print the help of `topic` and exit: "" for the options of `first_screen`, "all", or the name of a group.

        Raises: UserError for an unknown topic.
        """
        sys.stdout.write(self.help_screen(topic, first_screen))
        self.exit()

    def help_screen(self, topic: str, first_screen: FirstScreen) -> str:
        groups = [Group(str(g.title), g._group_actions) for g in self._action_groups if g._group_actions]
        names = list(dict.fromkeys(group.name for group in groups))
        if topic not in ("", ALL, *names):
            near = [n for n in names if n.startswith(topic)] or difflib.get_close_matches(topic, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--help {topic}: there is no such group{hint}; choose {ALL}, {', '.join(names)}")
        first = first_screen.get(names[0], {})
        screen = FirstScreenHelp(self.prog) if topic == "" else OptionHelp(self.prog)
        if topic in ("", ALL):
            screen.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
            screen.add_text(self.description)
        for group in groups:
            screen.start_section(group.title)
            screen.add_arguments(group.chosen(first.get(group.name, ())) if topic == "" else group.of_topic(topic))
            screen.end_section()
        num_options = sum(len(group.options) for group in groups)
        screen.add_text(
            f"--help {ALL} shows all {num_options} options, each also a key of the YAML file.\n"
            f"--help GROUP shows one group: {', '.join(names)}."
        )
        return screen.format_help()


def _is_negation(action: argparse.Action) -> bool:
    """Whether it is the `--no_x` that HfArgumentParser adds to a switch which is on by default."""
    return action.option_strings[0] == f"--no_{action.dest}"


def _value_name(action: argparse.Action) -> str:
    if action.nargs == 0 or action.const is True:
        return ""
    if action.choices is not None:
        return "NAME"
    kind = {int: "N", float: "NUMBER", str: "TEXT"}.get(action.type, "true|false")  # type: ignore[call-overload]
    if kind == "TEXT" and action.dest.endswith(("file", "config")):
        kind = "FILE"
    return f"{kind} ..." if action.nargs == "+" else kind


def shown_default(default: object) -> str:
    """A default as a YAML file would have it."""
    if default is None or default == [] or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, list | tuple):
        return " ".join(map(shown_default, default))
    return f"'{default}'" if isinstance(default, str) and not default.strip() else str(default)
