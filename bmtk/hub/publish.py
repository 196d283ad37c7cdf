"""Publish a saved model: check the folder, push what may be pushed, verify that it loads; only then log "published".

The token comes from the environment or the login (`hf auth login`) and is sent only to the Hub.
"""

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .bundle import PROCESSOR, Bundle, PublishError, is_allowed, read_bundle, read_json, refuse_tokens
from .card import write_card
from .secrets import SECRET
from .verification import record_outputs, verify

logger = logging.getLogger(__name__)

TRANSIENT = (408, 412, 429, 500, 502, 503, 504)  # 412: somebody else's commit came first
PAUSES = (0.5, 1.0, 2.0)  # seconds before each new attempt
LONGEST_PAUSE = 60.0
NEUTRAL = {".gitattributes", "README.md", "LICENSE"}  # what a repository may hold before a model is in it
LOGIN = "log in with `hf auth login`, or set HF_TOKEN; create a token at https://huggingface.co/settings/tokens"

Log = Callable[[str], None]


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    commit_message: str = "Publish with bmtk",
    revision: str | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    log: Log = logger.info,
) -> str:
    """Push a saved model or adapter to `repo_id`, load it back in a clean process, compare, and return its address.

    private: for a new repository; refused where the repository exists and is public.
    revision: branch to commit to, made if missing; None is the main branch.
    dry_run: check and list the files; nothing is sent, and the Hub is not asked.
    trust_remote_code: run code that the base of an adapter brings, to verify the adapter.
    Raises: PublishError, in words for the user; its text never holds a token.
    """
    with tempfile.TemporaryDirectory(prefix="bmtk-publish-") as folder, plain_words(repo_id):
        room = Path(folder)
        check_repo_id(repo_id)
        bundle = with_card(read_bundle(directory), repo_id, room, log)
        refuse_tokens(bundle, get_token())
        announce(bundle, log)
        url = f"{constants.ENDPOINT}/{repo_id}"
        if dry_run:
            log(f"dry run: nothing was sent to {url}")
            return url
        if get_token() is None:
            raise PublishError(f"not logged in to the Hub; {LOGIN}")
        base = adapter_base(bundle) if bundle.is_adapter else None
        is_trusted = base is None or trust_remote_code or not brings_foreign_code(base)
        can_verify = is_trusted and (base is not None or not bundle.is_adapter)
        if can_verify:
            record_here(bundle, room, base)
        pushed = patiently(lambda: push(bundle, repo_id, private, revision, commit_message), log)
        log(f"pushed to {url}, commit {pushed.sha}")
        if can_verify:
            verify_there(room, pushed, needs_token=pushed.private or bundle.is_adapter, log=log)
        log(conclusion(bundle, url, base, is_trusted=is_trusted))
        return url


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not a repository name ({error}); write USER/NAME") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"{repo_id!r} is not a repository name; write USER/NAME")


def with_card(bundle: Bundle, repo_id: str, room: Path, log: Log) -> Bundle:
    """The bundle with a card that names `repo_id`; a card that somebody edited is kept.  The folder is not touched."""
    run, card = bundle.files.get("run.json"), bundle.files.get("README.md")
    if run is None:
        if card is None:
            log(f"no card: {bundle.directory} has neither README.md nor run.json; describe the model in README.md")
            return bundle
        return replace(bundle, files={**bundle.files, "README.md": without_local_base(card, bundle, room)})
    for name in ("run.json", "history.jsonl"):
        if (bundle.directory / name).is_file():
            shutil.copy(bundle.directory / name, room / name)
    try:
        new = write_card(room, repo_id=repo_id)
    except ValueError as error:
        raise PublishError(f"run.json of {bundle.directory} cannot be read: {error}") from error
    if card and card.stat().st_mtime >= run.stat().st_mtime and without_names(card) != without_names(new):
        log("README.md was edited since the run and is pushed as it is")
        return bundle
    return replace(bundle, files=dict(sorted({**bundle.files, "README.md": new}.items())))


def without_local_base(card: Path, bundle: Bundle, room: Path) -> Path:
    """The card that PEFT writes, without the lines that give a folder as base model: the Hub refuses such a card."""
    base = read_json(bundle.directory / "adapter_config.json").get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        return card
    lines = card.read_text(encoding="utf-8").splitlines(keepends=True)
    new = room / "README.md"
    new.write_text("".join(line for line in lines if base not in line), encoding="utf-8")
    return new


def without_names(card: Path) -> str:
    """The card without the lines that name the folder or the repository: all that differs between the two versions."""
    return re.sub(r"(?m)^(# |name = |model_name: |- name: ).*\n", "", card.read_text(encoding="utf-8"))


def announce(bundle: Bundle, log: Log) -> None:
    log(f"{len(bundle.files)} files, {bundle.num_bytes / 1e6:.1f} MB: {', '.join(bundle.files)}")
    if bundle.left_out:
        log(f"left out: {', '.join(bundle.left_out)}")


def adapter_base(bundle: Bundle) -> str | None:
    """The adapter's base model as an absolute path or a Hub id; None if it cannot be reached from here."""
    base = read_json(bundle.directory / "adapter_config.json")["base_model_name_or_path"]
    if Path(base).is_dir():
        return str(Path(base).resolve())
    try:
        return HfApi(token=get_token()).model_info(base).id
    except (HfHubHTTPError, HFValidationError, httpx2.TransportError):
        return None


def brings_foreign_code(base: str) -> bool:
    """Whether a model, a folder or a Hub id, comes with code that is not that of this bmtk; nothing of it is run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(base)
        if not folder.is_dir():
            patterns = ["*.py", "*config.json"]
            folder = Path(snapshot_download(base, allow_patterns=patterns, local_dir=scratch, token=get_token()))
        holders = ("config.json", "tokenizer_config.json", *PROCESSOR)
        if not any(read_json(folder / holder).get("auto_map") for holder in holders):
            return False
        ours = Path(__file__).parent.parent / "models"
        return any(
            not (ours / path.name).is_file() or path.read_bytes() != (ours / path.name).read_bytes()
            for path in folder.glob("*.py")
        ) or any("--" in str(read_json(folder / holder).get("auto_map", "")) for holder in holders)


def check_publishing(repo_id: str | None, *, is_main: bool) -> None:
    """Find out before a run what would stop `publish` after it: the name, the login, the right to write.

    Only the main process asks, if there is a name.  A Hub that does not answer now may do so later: a warning.
    Raises: PublishError.
    """
    if repo_id is None or not is_main:
        return
    check_repo_id(repo_id)
    if get_token() is None:
        raise PublishError(f"push_to_hub={repo_id}: not logged in to the Hub; {LOGIN}")
    owner = repo_id.split("/")[0]
    try:
        found = HfApi(token=get_token()).whoami()
    except OfflineModeIsEnabled as error:
        raise PublishError(f"push_to_hub={repo_id}, but HF_HUB_OFFLINE is set; unset it, or leave one out") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PublishError(redact(explain(error, repo_id))) from error
        logger.warning(
            "the Hub answered %d, so the right to write to %s is not known", error.response.status_code, repo_id
        )
        return
    except httpx2.TransportError as error:
        logger.warning(
            "the Hub does not answer now (%s); the model is to be pushed to %s", type(error).__name__, repo_id
        )
        return
    names = [found["name"], *(org["name"] for org in found.get("orgs", ()))]
    role = found.get("auth", {}).get("accessToken", {}).get("role")
    if owner not in names or role == "read":
        raise PublishError(
            f"push_to_hub={repo_id}: the token of {found['name']} may not write to {owner!r}; use a token with write "
            f"access, or publish under {' or '.join(names)}"
        )


def record_here(bundle: Bundle, room: Path, base: str | None) -> None:
    try:
        record_outputs(bundle.directory, room, base)
    except Exception as error:  # the model's own code runs here and may raise anything
        reason = redact(f"{type(error).__name__}: {error}")
        raise PublishError(f"{bundle.directory} does not load here, so nothing was sent: {reason}") from error


def push(bundle: Bundle, repo_id: str, private: bool, revision: str | None, message: str) -> ModelInfo:
    """Create the repository if needed and commit the bundle; files of an older bundle are deleted.  Safe to repeat."""
    api = HfApi(token=get_token())
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    if private and not before.private:
        raise PublishError(f"{repo_id} exists and is public; make it private in its settings, or leave out `private`")
    refuse_other_content(api, before, bundle)
    there = {sibling.rfilename for sibling in before.siblings or ()}
    stale = sorted(name for name in there - set(bundle.files) - NEUTRAL if is_allowed(name))
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationAdd(name, path) for name, path in bundle.files.items()]
    operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
    options: dict[str, Any] = {"commit_message": message, "revision": revision, "parent_commit": before.sha}
    try:
        before.sha = api.create_commit(repo_id, operations, **options).oid
    except json.JSONDecodeError:  # validate-yaml reads its answer before looking at the status
        raise
    except ValueError as error:
        raise PublishError(redact(f"the Hub refuses the files: {error}")) from error
    return before


def refuse_other_content(api: HfApi, there: ModelInfo, bundle: Bundle) -> None:
    """Raise PublishError unless the repository is new, or holds a model or adapter of the same type."""
    names = {sibling.rfilename for sibling in there.siblings or ()} - NEUTRAL
    holder, key = ("adapter_config.json", "peft_type") if bundle.is_adapter else ("config.json", "model_type")
    what = "no model"
    if holder in names:
        with tempfile.TemporaryDirectory() as folder:
            copy = api.hf_hub_download(there.id, holder, revision=there.sha, local_dir=folder)
            theirs = read_json(Path(copy)).get(key)
        if theirs == read_json(bundle.directory / holder).get(key):
            return
        what = f"{key} {theirs!r}"
    if names:
        raise PublishError(
            f"{there.id} exists and holds other content ({what}: {', '.join(sorted(names)[:4])}); it was not changed. "
            "Choose another name, or empty that repository first"
        )


def verify_there(room: Path, pushed: ModelInfo, needs_token: bool, log: Log) -> None:
    """Raise PublishError unless a clean process gets from the Hub what this one got from the folder."""
    log("loading it back in a clean process without bmtk ...")
    assert pushed.sha  # create_commit has set it
    findings = verify(room, pushed.id, pushed.sha, get_token() if needs_token else None)
    if findings:
        lines = "\n".join(f"  - {redact(line)}" for line in findings)
        raise PublishError(
            f"the files are at {constants.ENDPOINT}/{pushed.id}, commit {pushed.sha}, but not verified: loaded back "
            f"without bmtk they do not give what the folder gives.\n{lines}\n"
            "Do not rely on that repository until this is fixed"
        )


def conclusion(bundle: Bundle, url: str, base: str | None, *, is_trusted: bool) -> str:
    """The last line of the log: published, and what was verified, or why it could not be."""
    if not bundle.is_adapter:
        return f"published: {url} (loads without bmtk, with the same outputs)"
    named = read_json(bundle.directory / "adapter_config.json")["base_model_name_or_path"]
    if base is None:
        return f"pushed, not verified: the adapter at {url} needs its base model {named}, which cannot be reached here"
    if not is_trusted:
        return (
            f"pushed, not verified: the base {named} of the adapter at {url} brings its own code, which was not run; "
            "read it, then push again with --trust-remote-code"
        )
    advice = f"; its base {named} is a folder of this machine: publish that too, or nobody else can load the adapter"
    return f"published: {url} (loads without bmtk, with the same outputs){advice if Path(base).is_dir() else ''}"


def patiently(action: Callable[[], ModelInfo], log: Log) -> ModelInfo:
    """Repeat what failed for a transient reason: no or half an answer, a server error, a concurrent commit."""
    for pause in PAUSES:
        try:
            return action()
        except (httpx2.TransportError, json.JSONDecodeError) as error:
            reason = type(error).__name__
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            reason = f"the Hub answered {error.response.status_code}"
            pause = max(pause, wanted_pause(error.response.headers.get("Retry-After")))
        log(f"{reason}; trying again in {pause:g} s")
        time.sleep(pause)
    return action()


def wanted_pause(retry_after: str | None) -> float:
    """Seconds that the Hub asks to wait (RFC 9110: a number, or a date that is not read), at most a minute."""
    return min(float(retry_after), LONGEST_PAUSE) if retry_after and retry_after.strip().isdecimal() else 0.0


@contextmanager
def plain_words(repo_id: str) -> Iterator[None]:
    """Turn what the network and the Hub throw into PublishError with a remedy."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError("HF_HUB_OFFLINE is set, so the Hub cannot be asked; unset it to publish") from error
    except (httpx2.TransportError, json.JSONDecodeError) as error:
        reason = redact(f"{type(error).__name__}: {error}")
        remedy = "check the network, the proxy and HF_ENDPOINT, then run the same command again"
        raise PublishError(f"cannot reach {constants.ENDPOINT} ({reason}); {remedy}") from error
    except HfHubHTTPError as error:
        raise PublishError(redact(explain(error, repo_id))) from error


def explain(error: HfHubHTTPError, repo_id: str) -> str:
    """The meaning of an error of the Hub, and what to do about it."""
    status = error.response.status_code
    remedies = {
        401: f"the Hub does not accept the token; {LOGIN}",
        403: f"the token may not write to {repo_id}; use a token with write access to {repo_id.split('/')[0]!r}, or "
        "publish under your own name",
        404: f"{repo_id} does not exist, or the token may not read it; check the name, the branch and the token",
    }
    trouble = "the Hub has a server error; run the same command again later" if status >= 500 else "the Hub refused"
    answer = error.server_message or str(error).strip().splitlines()[0]
    return f"{remedies.get(status, trouble)} (the Hub answered {status}: {answer})"


def redact(text: str) -> str:
    """The text without the active token and without anything shaped like a token."""
    active = get_token()
    return SECRET.sub("hf_***", text.replace(active, "hf_***") if active else text)
