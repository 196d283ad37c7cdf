"""Access tokens and keys in a text: the one list that redaction and the search before an upload share.

Two kinds are found: what has the shape of a credential, whoever it belongs to, and the very values that this process
holds (the login of the Hub, long values of environment variables whose names speak of secrets), whatever their shape.
The shapes begin with the prefix that their issuer gives them, so checksums, hashes and base64 pictures are none.

Sources: the issuers' own documentation of their formats (GitHub 2021, GitLab 2024, AWS IAM identifiers, RFC 7519).
"""

import os
import re
from collections.abc import Mapping

from huggingface_hub import get_token

REDACTED = "[redacted]"
SHAPES = {
    "Hugging Face": r"hf_(?:oauth|jwt)_[\w.-]{10,}|(?:hf|api_org)_[A-Za-z0-9]{10,}",
    "GitHub": r"gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    "GitLab": r"(?:glpat|gldt|glrt|glptt|glcbt|gloas|glagent)-[\w.-]{16,}",
    "OpenAI, Anthropic": r"sk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{16,}|(?=[\w-]*[0-9A-Z])\w{16,}[\w-]*)",
    "AWS": r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}(?![A-Za-z0-9+/])",
    "Google": r"AIza[\w-]{35}(?![\w+/=-])|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}",
    "Azure": r"AccountKey=[A-Za-z0-9+/=]{40,}",
    "Slack": r"xox[abeoprs]-[\w-]{10,}|xapp-\d-[\w-]{10,}|https://hooks\.slack\.com/services/[\w/]{20,}",
    "Stripe": r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "npm, PyPI, Docker": r"npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{32,}|dckr_(?:pat|oat)_[\w-]{20,}",
    "inference services": r"(?:r8|gsk|nvapi|xai|wandb_v1)[_-](?=[\w-]*\d)[\w-]{20,}",
    "SendGrid, Telegram": r"SG\.[\w-]{16,}\.[\w-]{16,}|\d{8,10}:AA[\w-]{33}",
    "JSON Web Token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
}
PRIVATE_KEY = (  # the header alone counts; the rest of the block, with real or escaped line ends, is redacted with it
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----)[\s\S])*?-----END [A-Z0-9 ]+-----|[A-Za-z0-9+/=\s\\]*)"
)
SHAPE = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(SHAPES.values())})|{PRIVATE_KEY}", re.ASCII)
URL_LOGIN = re.compile(r"(?<=://)[^/\s:@\"'<>]+:[^/\s@\"'<>]+(?=@[\w.-])")
HUB_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SECRET_VARIABLE = re.compile(r"(?i)(?:.*_)?(?:token|password|passwd|secret|api_?key|access_?key)")
SHORTEST_OF_HUB, SHORTEST = 6, 16  # characters; a shorter value could be an ordinary word of a text


def own_credentials() -> list[str]:
    """The values of this process that are secret, longest first."""
    hub = [get_token(), *(os.environ.get(name) for name in HUB_VARIABLES)]
    found = {value for value in hub if value and len(value) >= SHORTEST_OF_HUB}
    for name, value in os.environ.items():
        if SECRET_VARIABLE.fullmatch(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", ".")):
            found.add(value)
    return sorted(found, key=len, reverse=True)


def without_credentials(text: str) -> str:
    """The text with everything that `holds_credential` finds replaced."""
    for value in own_credentials():
        text = text.replace(value, REDACTED)
    return URL_LOGIN.sub(REDACTED, SHAPE.sub(REDACTED, text))


def holds_credential(content: bytes, active_token: str | None = None) -> bool:
    """Whether bytes of any kind hold a credential; `active_token` counts besides those of this process."""
    text = content.decode("latin-1")  # loses no byte, and joins none that other bytes separate
    values = [*own_credentials(), *filter(None, [active_token])]
    written = {form for value in values for form in (value.encode(), value.encode("utf-16-le"))}
    return bool(SHAPE.search(text)) or any(form in content for form in written)


def redact_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """JSON-ready settings without credentials, for the files of a run; paths and everything else stay as they are."""
    return {key: _redacted(value) for key, value in settings.items()}


def _redacted(value: object) -> object:
    if isinstance(value, dict):
        return {without_credentials(str(key)): _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
