"""The shapes of access tokens and keys: what is redacted from a record, and never published."""

import re
from typing import Any

REDACTED = "[redacted]"
# Only shapes with a mark of their own: a bare run of letters and digits may be a hash.
SHAPES = (
    r"(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{16,}|hf_(?:oauth|jwt)_[\w.-]{10,}",  # Hugging Face
    r"gh[opsur]_[A-Za-z0-9]{10,}|github_pat_\w{16,}",
    r"glpat-[\w-]{16,}",  # GitLab
    r"sk-[\w-]{16,}|sk_(?:live|test)_\w{16,}",  # OpenAI, Anthropic, Stripe
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # Amazon
    r"AIza[\w-]{35}",  # Google
    r"ya29\.[\w-]{20,}",
    r"xox[abeoprs]-[\w-]{10,}",  # Slack
    r"npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{20,}",
    r"wandb_v1_[\w-]{20,}",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # a JSON web token
)
_BEGIN, _END = (rf"-----{word} (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----" for word in ("BEGIN", "END"))
PRIVATE_KEY = rf"{_BEGIN}[\s\S]*?(?:{_END}|\Z)"
SECRET = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(SHAPES)})|{PRIVATE_KEY}", re.ASCII)
SECRET_NAME = (
    r"(?:\w*(?:hub|hf|api|auth|access)[_-]?token|token|"
    r"\w*(?:password|passwd|secret|api[_-]?key|private[_-]?key|access[_-]?key(?:[_-]?id)?))"
)
_is_secret_name = re.compile(rf"(?i){SECRET_NAME}").fullmatch
_of_an_address = re.compile(r"(://)[^/\s@:]*:[^/\s@]+@")


def without_secrets(value: Any) -> Any:
    """JSON `value` with its secrets redacted: shapes in texts, values of keys such as `api_key`, passwords in URLs."""
    if isinstance(value, dict):
        return {
            without_secrets(key): REDACTED
            if isinstance(key, str) and _is_secret_name(key) and isinstance(item, str) and item
            else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return _of_an_address.sub(rf"\1{REDACTED}@", SECRET.sub(REDACTED, value)) if isinstance(value, str) else value
