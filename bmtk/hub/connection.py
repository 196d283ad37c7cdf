"""The connection to the Hub: patience with its faults, time-outs, its refusals in words, and who may write where."""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory

from .bundle import PublishError
from .credentials import without_credentials

TRANSIENT = (408, 412, 429, 500, 502, 503, 504)  # 412: somebody else's commit came first
PAUSES = (0.5, 1.0, 2.0)  # seconds before each new attempt
LONGEST_WAIT = 330  # seconds; the Hub counts requests in windows of five minutes
LOGIN = "log in with `hf auth login`, or set HF_TOKEN; create a token at https://huggingface.co/settings/tokens"


Log = Callable[[str], None]
Answer = TypeVar("Answer")


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not a repository name ({error}); write USER/NAME") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"{repo_id!r} is not a repository name; write USER/NAME")


def check_rights(repo_id: str, *, private: bool, log: Log) -> None:
    """Raise PublishError unless this process may publish to `repo_id`: asked before a run, not after it."""
    with plain_words(repo_id), answers_in_time():
        check_repo_id(repo_id)
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        if get_token() is None:
            raise PublishError(f"not logged in to the Hub; {LOGIN}")
        api = HfApi(token=get_token())
        who = patiently(api.whoami, log)
        if reason := why_not_allowed(who, repo_id):
            raise PublishError(
                f"the token may not write to {repo_id}: {reason}; use a token with write access to "
                f"{repo_id.split('/')[0]!r}, or publish under your own name ({who['name']}/...)"
            )
        with contextlib.suppress(RepositoryNotFoundError):  # it will be created
            if not patiently(lambda: api.model_info(repo_id), log).private and private:
                raise PublishError(public_already(repo_id))


def public_already(repo_id: str) -> str:
    return f"{repo_id} exists and is public; make it private in its settings, or leave out `private`"


def why_not_allowed(who: Mapping[str, Any], repo_id: str) -> str:
    """Why the owner of the token may not write to `repo_id`, by an answer of /api/whoami-v2; "" if nothing forbids it.

    What the answer does not name is left to the push itself.
    """
    namespace = repo_id.split("/")[0].lower()
    organizations = {str(org.get("name")).lower(): org.get("roleInOrg") for org in who.get("orgs") or ()}
    if namespace != str(who.get("name")).lower() and namespace not in organizations:
        return f"it belongs to {who.get('name')}"
    if organizations.get(namespace) == "read":
        return "its owner may only read there"
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "it is for reading only"
    scopes = (token.get("fineGrained") or {}).get("scoped") if token.get("role") == "fineGrained" else None
    if scopes is None:
        return ""
    names = (namespace, repo_id.lower())
    here = [scope for scope in scopes if str((scope.get("entity") or {}).get("name")).lower() in names]
    return "" if any("repo.write" in (scope.get("permissions") or ()) for scope in here) else "it lacks `repo.write`"


def patiently(action: Callable[[], Answer], log: Log) -> Answer:
    """Repeat what failed for a transient reason: no or half an answer, a server error, a concurrent commit.

    Waits as long as the Hub asks for, within `LONGEST_WAIT`.
    """
    for pause in PAUSES:
        try:
            return action()
        except (httpx2.TransportError, json.JSONDecodeError) as error:
            reason = type(error).__name__
        except HfHubHTTPError as error:
            asked = asked_pause(error.response.headers)
            if error.response.status_code not in TRANSIENT or asked > LONGEST_WAIT:
                raise
            reason, pause = f"the Hub answered {error.response.status_code}", max(pause, asked)
        log(f"{reason}; trying again in {pause:g} s")
        time.sleep(pause)
    return action()


def asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait, by Retry-After (number or date) or the Hub's own RateLimit; else 0."""
    after = headers.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    with contextlib.suppress(ValueError):
        date = parsedate_to_datetime(after)
        return max(0.0, date.timestamp() - time.time())
    window = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    return float(window[1]) if window and re.search(r"\br=0\b", headers["ratelimit"]) else 0.0


@contextmanager
def answers_in_time() -> Iterator[None]:
    """Give every request of huggingface_hub a time-out: its own client waits for an answer for ever."""
    seconds = float(os.environ.get("BMTK_HUB_TIMEOUT", 60))
    set_client_factory(lambda: client_with_timeout(seconds))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def client_with_timeout(seconds: float) -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(seconds)
    return client


@contextmanager
def plain_words(repo_id: str) -> Iterator[None]:
    """Turn what the network and the Hub throw into PublishError with a remedy."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError("HF_HUB_OFFLINE is set, so the Hub cannot be asked; unset it to publish") from error
    except (httpx2.TransportError, json.JSONDecodeError) as error:
        reason = without_credentials(f"{type(error).__name__}: {error}")
        remedy = "check the network, the proxy and HF_ENDPOINT, then run the same command again"
        raise PublishError(f"cannot reach {constants.ENDPOINT} ({reason}); {remedy}") from error
    except HfHubHTTPError as error:
        raise PublishError(without_credentials(explain(error, repo_id))) from error


def explain(error: HfHubHTTPError, repo_id: str) -> str:
    """The meaning of an error of the Hub, and what to do about it."""
    status = error.response.status_code
    remedies = {
        401: f"the Hub does not accept the token; {LOGIN}",
        403: f"the token may not write to {repo_id}; use a token with write access to {repo_id.split('/')[0]!r}, or "
        "publish under your own name",
        404: f"{repo_id} does not exist, or the token may not read it; check the name, the branch and the token",
    }
    later = "run the same command again later, it sends only what is missing"
    trouble = f"the Hub has a server error; {later}" if status >= 500 else "the Hub refused"
    if status == 429:
        trouble = f"too many requests; {later}"
    answer = error.server_message or str(error).strip().splitlines()[0]
    return f"{remedies.get(status, trouble)} (the Hub answered {status}: {answer})"
