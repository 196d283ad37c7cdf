"""Publish a saved model: check the folder, push what may be pushed, verify that it loads; only then log "published".

The token comes from the environment or the login (`hf auth login`) and is sent only to the Hub.
"""

import json
import logging
import re
import shutil
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .bundle import (
    HOLDERS_OF_CODE,
    Bundle,
    PublishError,
    code_files,
    is_allowed,
    read_bundle,
    read_json,
    refuse_tokens,
)
from .card import write_card
from .connection import LOGIN, PAUSES, Log, answers_in_time, check_repo_id, patiently, plain_words, public_already
from .credentials import without_credentials
from .verification import Base, is_hub_fault, record_outputs, verify

logger = logging.getLogger(__name__)

NEUTRAL = {".gitattributes", "README.md", "LICENSE"}  # what a repository may hold before a model is in it
OUR_CODE = Path(__file__).parents[1] / "models"


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
    trust_remote_code: let the base model of an adapter run code of its own; it can read what this process can.
    Raises: PublishError, in words for the user; its text never holds a token.
    """
    with tempfile.TemporaryDirectory(prefix="bmtk-publish-") as folder, plain_words(repo_id), answers_in_time():
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
        base = None
        if bundle.is_adapter:
            base = adapter_base(bundle, trust_remote_code=trust_remote_code, log=log)
        can_verify = base is not None or not bundle.is_adapter
        if can_verify:
            record_here(bundle, room, base)
        pushed = patiently(lambda: push(bundle, repo_id, private, revision, commit_message), log)
        log(f"pushed to {url}, commit {pushed.sha}")
        if can_verify:
            verify_there(room, pushed, needs_token=pushed.private or bundle.is_adapter, log=log)
        log(conclusion(bundle, url, base))
        return url


def with_card(bundle: Bundle, repo_id: str, room: Path, log: Log) -> Bundle:
    """The bundle with a card that names `repo_id`; a card that somebody edited is kept.  The folder is not touched."""
    run, card = bundle.files.get("run.json"), bundle.files.get("README.md")
    if run is None:
        if card is None:
            log(f"no card: {bundle.directory} has neither README.md nor run.json; describe the model in README.md")
            return bundle
        return replace(bundle, files={**bundle.files, "README.md": without_local_base(card, bundle, room)})
    for name in ("run.json", "history.jsonl"):
        if (bundle.directory / name).is_file() and not (bundle.directory / name).is_symlink():
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


def adapter_base(bundle: Bundle, *, trust_remote_code: bool, log: Log) -> Base | None:
    """The adapter's base model; None if it is not on the Hub, or may not be read with this token.

    Raises: PublishError if the base would run code of its own that nobody has allowed.
    """
    named = read_json(bundle.directory / "adapter_config.json")["base_model_name_or_path"]
    if Path(named).is_dir():
        folder = Path(named).resolve()
        return Base(str(folder), None, trust_remote_code or only_our_code(named, folder))
    api = HfApi(token=get_token())
    try:
        there = patiently(lambda: api.model_info(named), log)
        if trust_remote_code:
            return Base(there.id, there.sha, trust_remote_code=True)
        with tempfile.TemporaryDirectory() as room:
            for name in (sibling.rfilename for sibling in there.siblings or ()):
                if "/" not in name and (name in HOLDERS_OF_CODE or name.endswith(".py")):
                    download = partial(api.hf_hub_download, there.id, name, revision=there.sha, local_dir=room)
                    patiently(download, log)
            return Base(there.id, there.sha, only_our_code(there.id, Path(room)))
    except (HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in (401, 403, 404):
            raise
        return None


def only_our_code(name: str, folder: Path) -> bool:
    """Whether a base needs code of its own, and all of it is bmtk's, byte for byte; False if it needs none.

    Raises: PublishError for any other code, as its author decides what it does with what this process may read.
    """
    code, problems = code_files(folder)
    foreign = sorted(file for file in code if not is_ours(folder / file))
    if not code and not problems:
        return False
    if foreign or problems:
        raise PublishError(
            f"the base model {name} comes with code of its own ({', '.join(foreign) or problems[0]}), which would run "
            "here, with your token, to verify the adapter; nothing was sent. Read that code, then allow it with "
            "--trust-remote-code (trust_remote_code in a recipe)"
        )
    return True


def is_ours(path: Path) -> bool:
    """Whether a code file is one that this version of bmtk saves with its models."""
    original = OUR_CODE / path.name
    return original.is_file() and path.is_file() and original.read_bytes() == path.read_bytes()


def record_here(bundle: Bundle, room: Path, base: Base | None) -> None:
    try:
        record_outputs(bundle.directory, room, base)
    except Exception as error:  # the model's own code runs here and may raise anything
        reason = without_credentials(f"{type(error).__name__}: {error}")
        raise PublishError(f"{bundle.directory} does not load here, so nothing was sent: {reason}") from error


def push(bundle: Bundle, repo_id: str, private: bool, revision: str | None, message: str) -> ModelInfo:
    """Create the repository if needed and commit the bundle; files of an older bundle are deleted.  Safe to repeat."""
    api = HfApi(token=get_token())
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    if private and not before.private:
        raise PublishError(public_already(repo_id))
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
        raise PublishError(without_credentials(f"the Hub refuses the files: {error}")) from error
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
    for pause in (*PAUSES, None):
        findings = verify(room, pushed.id, pushed.sha, get_token() if needs_token else None)
        if pause is None or not any(is_hub_fault(line) for line in findings):
            break
        log(f"the Hub could not be read; trying again in {pause:g} s")
        time.sleep(pause)
    if any(is_hub_fault(line) for line in findings):
        raise PublishError(
            f"the files are at {constants.ENDPOINT}/{pushed.id}, commit {pushed.sha}, but not verified, as "
            f"{without_credentials(findings[0])}; run the same command again later to verify them"
        )
    if findings:
        lines = "\n".join(f"  - {without_credentials(line)}" for line in findings)
        raise PublishError(
            f"the files are at {constants.ENDPOINT}/{pushed.id}, commit {pushed.sha}, but not verified: loaded back "
            f"without bmtk they do not give what the folder gives.\n{lines}\n"
            "Do not rely on that repository until this is fixed"
        )


def conclusion(bundle: Bundle, url: str, base: Base | None) -> str:
    """The last line of the log: published, and what was verified, or why it could not be."""
    if not bundle.is_adapter:
        return f"published: {url} (loads without bmtk, with the same outputs)"
    named = read_json(bundle.directory / "adapter_config.json")["base_model_name_or_path"]
    if base is None:
        return f"pushed, not verified: the adapter at {url} needs its base model {named}, which cannot be reached here"
    advice = f"; its base {named} is a folder of this machine: publish that too, or nobody else can load the adapter"
    return f"published: {url} (loads without bmtk, with the same outputs){advice if Path(base.name).is_dir() else ''}"
