"""What must not leave the machine in a text: secrets, names of users in paths, characters that cannot be printed."""

import re
from pathlib import Path
from typing import Any

from .credentials import REDACTED, without_credentials

SECRET_NAME = r"(?:\w*(?:hub|hf|api|auth|access)[_-]?token|token|\w*(?:password|passwd|secret|api[_-]?key))"
SECRET_ASSIGNED = re.compile(rf"(?i)(--{SECRET_NAME}[\s=]+|\b{SECRET_NAME}=)(\"[^\"]*\"|'[^']*'|\S+)")
USER_HOME = re.compile(r"(?<![\w.~-])(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s\"']+|(?<![\w./~-])/root\b(?!-)")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def scrub(value: Any) -> Any:
    """Return JSON `value` without secrets, names of users in paths, absolute working paths and control characters."""
    if isinstance(value, dict):
        is_secret = re.compile(rf"(?i){SECRET_NAME}").fullmatch
        return {
            scrub_text(key): REDACTED if is_secret(key) and isinstance(item, str) and item else scrub(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value


def scrub_command(command: str) -> str:
    """Redact the values of options such as --hub_token, besides what `scrub_text` redacts."""
    return SECRET_ASSIGNED.sub(rf"\1{REDACTED}", scrub_text(command))


def scrub_text(text: str) -> str:
    """Redact access tokens, shorten paths (relative to here, else to ~) and replace what cannot be printed."""
    text = UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = without_credentials(text)
    # The working folder comes first: it usually lies in the home folder, and is shortened to nothing there.
    for place, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if place != Path(place.anchor):
            inside = rf"(?<![\w.~-]){re.escape(str(place))}"
            text = re.sub(rf"{inside}(?![\w./-])", short.rstrip("/") or ".", re.sub(rf"{inside}/", short, text))
    return USER_HOME.sub("~", text)
