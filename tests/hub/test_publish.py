"""Publishing against the stand-in Hub: what is sent, what is refused, what is verified, what is logged."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from stand_in_hub import ANN, ANN_READ_ONLY, BOB, running_hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bmtk.hub.bundle import PublishError, read_bundle, refuse_tokens
from bmtk.hub.connection import asked_pause, why_not_allowed
from bmtk.hub.publish import with_card
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.models.modeling_bm_transformer import BmTransformerForCausalLM

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "bmtk" / "models"


def code_of(name: str) -> set[str]:
    """A file of bmtk/models and all that it imports from beside it."""
    found, waiting = set(), [name]
    while waiting:
        found.add(name := waiting.pop())
        siblings = re.findall(r"^from \.(\w+) import", (MODELS / name).read_text(), re.MULTILINE)
        waiting += [f"{sibling}.py" for sibling in siblings if f"{sibling}.py" not in found]
    return found


CODE = code_of("configuration_bm_transformer.py") | code_of("modeling_bm_transformer.py")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}

PUBLISHER = """
import json, os, sys
from bmtk.hub.connection import check_rights
from bmtk.hub.publish import PublishError, publish
for line in sys.stdin:
    job = json.loads(line)
    os.environ["HF_TOKEN"] = job.pop("token") or ""
    os.environ["BMTK_HUB_TIMEOUT"] = job.pop("timeout", "60")
    outcome = {"url": None, "error": None, "log": []}
    try:
        if job["directory"] == "None":
            check_rights(job["repo_id"], private=job.get("private", False), log=outcome["log"].append)
        else:
            outcome["url"] = publish(job.pop("directory"), job.pop("repo_id"), log=outcome["log"].append, **job)
    except PublishError as error:
        outcome["error"] = str(error)
    print("outcome:" + json.dumps(outcome), flush=True)
"""

# What a newcomer without bmtk does.  The name `bmtk` is taken away first, so that only the uploaded code can serve.
NEWCOMER = """
import json, os, sys, torch
from safetensors.torch import save_file
sys.modules["bmtk"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
ids, private, public, token, folder = torch.arange(12)[None], *sys.argv[1:]
seen = {}
try:
    AutoConfig.from_pretrained(private, trust_remote_code=True)
except OSError as error:
    seen["without token"] = str(error)
model = AutoModelForCausalLM.from_pretrained(public, trust_remote_code=True)
trunk = AutoModel.from_pretrained(public, trust_remote_code=True)
with torch.no_grad():
    outputs = {"logits": model(ids).logits, "hidden": trunk(ids).last_hidden_state}
pipe = pipeline("text-generation", model=public, trust_remote_code=True)
seen["text"] = pipe("abc", max_new_tokens=4, do_sample=False)[0]["generated_text"]
os.environ["HF_TOKEN"] = token
with torch.no_grad():
    private_model = AutoModelForCausalLM.from_pretrained(private, trust_remote_code=True)
    outputs["private"] = private_model(ids).logits.clone()
save_file(outputs, folder + "/outputs.safetensors")
print("seen:" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with running_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def publish(hub, tmp_path_factory):
    """publish(directory, repo_id, token=..., ...) in one child process, whose HF_ENDPOINT is set before any import."""
    environment = hub.environment(tmp_path_factory.mktemp("home"), token=None, PYTHONPATH=str(ROOT))
    child = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER],
        env=environment,
        cwd=tmp_path_factory.mktemp("cwd"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def ask(directory, repo_id, token=ANN, **options) -> SimpleNamespace:
        job = {"directory": str(directory), "repo_id": repo_id, "token": token, **options}
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            if line.startswith("outcome:"):
                assert not token or token not in line
                return SimpleNamespace(**json.loads(line.removeprefix("outcome:")))
        raise AssertionError("the publishing process died")

    yield ask
    child.stdin.close()
    child.wait(timeout=60)


@pytest.fixture(autouse=True)
def forget(hub):
    """Each test sees its own requests; no fault outlives its test."""
    hub.requests.clear()
    yield
    hub.faults.clear()
    hub.after_commit = None


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}, []))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer):
    """The output folder of a run: a tiny decoder, and all that must stay at home.  Never edited: `copied` is."""
    folder = tmp_path_factory.mktemp("runs") / "decoder"
    torch.manual_seed(0)
    config = BmTransformerConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BmTransformerForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = {"task": "causal_lm", "model": {"class": "BmTransformerForCausalLM", "model_type": "bm_transformer"}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "recipe.yaml").write_text("seed: 0")
    for name in (
        "training_args.bin",
        "optimizer.safetensors",
        "history.jsonl",
        "trainer_state.json",
        "notes.txt",
        "a.lock",
    ):
        (folder / name).write_text("{}")
    for name in ("checkpoints/step-00000001/model.safetensors", "corpus/tokens.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def copied(decoder, tmp_path):
    return Path(shutil.copytree(decoder, tmp_path / "copied"))


def edit_json(path: Path, **changes) -> None:
    """Set keys; None takes one away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ------------------------------------------------------------------------------------------ published and loaded


@pytest.fixture(scope="module")
def published(hub, decoder, tmp_path_factory):
    """The decoder pushed by the command, copied to a private repository, and both loaded by a newcomer."""
    folder = tmp_path_factory.mktemp("newcomer")
    command = [sys.executable, ROOT / "bmtk_cli.py", "push", decoder, "ann/public"]
    public = subprocess.run(command, env=hub.environment(folder / "home"), capture_output=True, text=True)
    requests = list(hub.requests)
    hub.add("ann/private", {name: hub.read("ann/public", name) for name in hub.files("ann/public")}, private=True)
    newcomer = subprocess.run(
        [sys.executable, "-c", NEWCOMER, "ann/private", "ann/public", ANN, str(folder)],
        env=hub.environment(folder / "home", token=None),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert newcomer.returncode == 0, newcomer.stderr[-2000:]
    seen = json.loads(newcomer.stdout.split("seen:")[-1])
    return SimpleNamespace(public=public, requests=requests, seen=seen, folder=folder)


def test_the_command_says_published_last_and_ends_with_0(hub, published):
    assert published.public.returncode == 0
    assert published.public.stdout.splitlines()[-1].startswith(f"published: {hub.url}/ann/public ")


def test_the_token_is_sent_to_nobody_but_the_hub(hub, published):
    assert ANN not in published.public.stdout + published.public.stderr
    assert not any(ANN.encode() in hub.read("ann/public", name) for name in hub.files("ann/public"))


def test_only_what_belongs_to_the_model_is_sent(hub, published):
    sent = (
        {"config.json", "generation_config.json", "model.safetensors", "README.md", "run.json", "recipe.yaml"}
        | TOKENIZER
        | CODE
    )
    assert hub.files("ann/public") - {".gitattributes"} == sent


def test_what_stays_at_home_is_named(published):
    assert published.public.stdout.splitlines()[1] == (
        "left out: a.lock, checkpoints/, corpus/, history.jsonl, notes.txt, optimizer.safetensors, "
        "trainer_state.json, training_args.bin"
    )


def test_a_newcomer_without_bmtk_gets_the_same_outputs_by_name(published, decoder):
    outputs, ids = load_file(published.folder / "outputs.safetensors"), torch.arange(12)[None]
    model = BmTransformerForCausalLM.from_pretrained(decoder).eval()
    with torch.no_grad():
        assert torch.allclose(outputs["logits"], model(ids).logits, atol=1e-5)
        assert torch.allclose(outputs["hidden"], model.model(ids).last_hidden_state, atol=1e-5)


def test_the_pipeline_writes_text_from_the_uploaded_code(published):
    assert published.seen["text"].startswith("abc")


def test_a_private_model_needs_a_token(published):
    assert "ann/private" in published.seen["without token"]
    outputs = load_file(published.folder / "outputs.safetensors")
    assert torch.equal(outputs["private"], outputs["logits"])


def test_a_public_model_is_verified_without_token(published):
    assert {user for _, path, user in published.requests if "/ann/public/resolve/" in path} == {None}


def test_the_card_is_made_for_the_repository_and_the_folder_is_left_as_it_was(hub, published, decoder):
    assert 'name = "ann/public"' in hub.read("ann/public", "README.md").decode()
    assert not (decoder / "README.md").exists()


def test_a_native_model_is_verified_on_a_private_branch_and_main_is_left_alone(hub, publish, tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    outcome = publish(tmp_path, "ann/bert", private=True, revision="trial")
    assert outcome.error is None
    assert hub.repositories["model", "ann/bert"].private
    assert {user for _, path, user in hub.requests if "/ann/bert/resolve/" in path} == {"ann"}
    assert hub.files("ann/bert", "trial") == {".gitattributes", "config.json", "model.safetensors"} | TOKENIZER
    assert hub.files("ann/bert") == {".gitattributes"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, decoder):
    """A LoRA adapter with a head of five labels, as PEFT saves it: its base is a folder of this machine."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=5)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(folder)
    return folder


def test_an_adapter_is_verified_on_its_base_and_says_what_others_will_miss(hub, publish, decoder, adapter):
    outcome = publish(adapter, "ann/adapter")
    assert outcome.error is None
    assert hub.files("ann/adapter") == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert str(decoder) not in hub.read("ann/adapter", "README.md").decode()
    assert outcome.log[-1].startswith("published: ")
    assert f"its base {decoder} is a folder of this machine: publish that too" in outcome.log[-1]


def test_an_adapter_without_its_base_is_pushed_and_not_called_published(hub, publish, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="ann/nowhere")
    (tmp_path / "README.md").unlink()
    outcome = publish(tmp_path, "ann/lonely")
    assert outcome.error is None
    assert hub.files("ann/lonely") == {".gitattributes", "adapter_config.json", "adapter_model.safetensors"}
    assert outcome.log[-1].startswith("pushed, not verified: ")
    assert "needs its base model ann/nowhere" in outcome.log[-1]


@pytest.fixture
def canary(copied, tmp_path):
    """A base model whose code leaves a file that holds the token; it must not exist unless somebody has allowed it."""
    code = copied / "modeling_bm_transformer.py"
    line = (
        f"import os, pathlib; pathlib.Path({str(tmp_path / 'canary')!r}).write_text(os.environ.get('HF_TOKEN', '-'))\n"
    )
    code.write_text(code.read_text() + line)
    return copied


@pytest.fixture
def adapter_of(adapter, tmp_path):
    """adapter_of(base): the adapter with that base."""

    def build(base) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter", dirs_exist_ok=True))
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
        (folder / "README.md").unlink(missing_ok=True)
        return folder

    return build


@pytest.mark.slow
def test_a_base_runs_its_own_code_only_where_it_is_allowed(hub, publish, canary, adapter_of, tmp_path):
    refused = publish(adapter_of(canary), "ann/canary")
    assert "comes with code of its own (modeling_bm_transformer.py)" in refused.error
    assert "--trust-remote-code" in refused.error
    hub.add("ann/canary-base", {path.name: path.read_bytes() for path in canary.iterdir() if path.is_file()})
    assert "ann/canary-base comes with code of its own" in publish(adapter_of("ann/canary-base"), "ann/canary").error
    assert not (tmp_path / "canary").exists()
    assert ("model", "ann/canary") not in hub.repositories
    assert publish(adapter_of(canary), "ann/canary", trust_remote_code=True).error is None
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("reference", ["bob/code--modeling_x.X", "../x.Secret"])
def test_a_base_that_names_code_elsewhere_is_not_trusted(hub, publish, canary, adapter_of, reference):
    heads(AutoModelForSequenceClassification=reference)(canary)
    assert "comes with code of its own" in publish(adapter_of(canary), "ann/elsewhere").error
    assert ("model", "ann/elsewhere") not in hub.repositories


@pytest.mark.slow
def test_a_base_on_the_hub_with_our_own_code_needs_no_permission(hub, publish, decoder, adapter_of):
    hub.add("ann/our-base", {path.name: path.read_bytes() for path in decoder.iterdir() if path.is_file()})
    outcome = publish(adapter_of("ann/our-base"), "ann/of-ours")
    assert outcome.error is None
    assert outcome.log[-1].startswith("published: ")


# ------------------------------------------------------------------------------------------------- again and again


def test_publishing_again_survives_lost_answers_and_removes_what_an_older_model_left(hub, publish, copied):
    config = (copied / "config.json").read_bytes()
    stale = {"model-00001-of-00002.safetensors": b"", "adapter_config.json": b"{}"}
    hub.add("ann/again", {"config.json": config, "logo.png": b"", **stale})
    weights = {name: tensor * 2 for name, tensor in load_file(copied / "model.safetensors").items()}
    (copied / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))  # nowhere uploaded yet
    hub.fail_once("POST", "/api/repos/create", 503)
    hub.fail_once("PUT", "/lfs/upload/", 500)
    hub.fail_once("POST", "/commit/", "drop-after")
    outcome = publish(copied, "ann/again")
    assert outcome.error is None
    assert hub.faults == []
    assert len(hub.repositories["model", "ann/again"].commits) == 2
    assert "logo.png" in hub.files("ann/again")
    assert not hub.files("ann/again") & set(stale)


def test_a_repository_with_other_content_is_left_alone(hub, publish, decoder):
    for name, files in {
        "ann/bert-there": {"config.json": b'{"model_type": "bert"}'},
        "ann/csv": {"data.csv": b"1"},
    }.items():
        hub.add(name, files)
        outcome = publish(decoder, name)
        assert f"{name} exists and holds other content" in outcome.error
        assert hub.files(name) == set(files)


def test_private_is_never_answered_with_a_public_repository(hub, publish, decoder):
    hub.add("ann/open", {"README.md": b"# mine"})
    assert "exists and is public" in publish(decoder, "ann/open", private=True).error
    assert hub.files("ann/open") == {"README.md"}


@pytest.mark.slow
def test_faults_on_the_way_are_waited_out_as_the_hub_asks(hub, publish, copied):
    """The third commit hangs; reading back fails, too, which does not make the files wrong."""
    hub.fail_once("POST", "/api/repos/create", 429, Retry_After="1")
    hub.fail_once("POST", "/api/validate-yaml", 502)
    hub.fail_once("POST", "/commit/", "hang")
    for _ in range(2):
        hub.fail_once("GET", "/ann/busy/resolve/.*/config.json", 503)
    hub.fail_once("GET", "/ann/busy/resolve/.*/model.safetensors", "drop")
    outcome = publish(copied, "ann/busy", timeout="1")
    assert outcome.error is None
    assert hub.faults == []
    assert [line for line in outcome.log if "trying again" in line] == [
        "the Hub answered 429; trying again in 1 s",
        "the Hub answered 502; trying again in 1 s",
        "ReadTimeout; trying again in 2 s",
        "the Hub could not be read; trying again in 0.5 s",
    ]
    assert outcome.log[-1].startswith("published: ")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=489;t=55'}, 0),
        ({}, 0),
    ],
)
def test_a_pause_is_read_in_each_of_its_forms(headers, seconds):
    assert asked_pause(headers) == seconds


def test_a_pause_of_an_hour_is_not_waited_for(hub, publish, decoder):
    hub.fail_once("POST", "/api/repos/create", 429, Retry_After="3600")
    outcome = publish(decoder, "ann/hour")
    assert outcome.error.startswith("too many requests; run the same command again later")
    assert not any("trying again" in line for line in outcome.log)


@pytest.mark.slow
def test_a_push_that_broke_off_uploads_only_what_lacks_when_it_is_repeated(hub, publish, copied):
    weights = {name: tensor + 3 for name, tensor in load_file(copied / "model.safetensors").items()}
    (copied / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))  # nowhere uploaded yet
    uploads = []
    for status, words in ((403, "the token may not write to"), (404, "does not exist, or"), (None, None)):
        if status:
            hub.fail_once("POST", "/commit/", status)
        outcome = publish(copied, "ann/partial")
        assert (words in outcome.error and "\n" not in outcome.error) if words else outcome.error is None
        uploads.append([method for method, _, _ in hub.requests].count("PUT"))
        hub.requests.clear()
    assert uploads == [1, 0, 0]
    assert len(hub.repositories["model", "ann/partial"].commits) == 2  # the empty one, and the model


def test_nothing_that_was_uploaded_holds_a_token(hub, published):
    blobs = list(hub.blobs.iterdir())
    assert len(blobs) > 10
    assert not [blob.name for blob in blobs if ANN.encode() in blob.read_bytes()]


# ----------------------------------------------------------------------------------------------------- not verified


def test_other_weights_on_the_hub_are_not_called_published(hub, publish, decoder):
    wrong = {name: tensor + 0.1 for name, tensor in load_file(decoder / "model.safetensors").items()}
    content = save(wrong, metadata={"format": "pt"})
    hub.after_commit = lambda repo_id: hub.replace(repo_id, "model.safetensors", content)
    outcome = publish(decoder, "ann/wrong")
    assert "but not verified" in outcome.error
    assert "output of AutoModelForCausalLM: differs by" in outcome.error
    assert f"{hub.url}/ann/wrong" in outcome.error
    assert not any(line.startswith("published") for line in outcome.log)


def test_uploaded_code_that_needs_bmtk_is_not_verified(publish, copied):
    code = copied / "heads_bm.py"
    code.write_text(code.read_text().replace("import torch\n", "import torch\nimport bmtk\n", 1))
    outcome = publish(copied, "ann/needs-bmtk")
    assert "but not verified" in outcome.error
    assert "bmtk" in outcome.error.split("loading failed")[1]


# ---------------------------------------------------------------------------------------------- refused by the Hub


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (
            "hf_" + "Wrong" * 6,
            "ann/m",
            r"does not accept the token; log in with `hf auth login`, or set HF_TOKEN.*401",
        ),
        (None, "ann/m", r"not logged in to the Hub; log in with"),
        (BOB, "ann/m", r"may not write to ann/m; use a token with write access to 'ann'.*403"),
        (ANN_READ_ONLY, "ann/m", r"may not write to ann/m.*403"),
        (ANN, "m", r"'m' is not a repository name; write USER/NAME"),
        (ANN, "ann/a b", r"'ann/a b' is not a repository name"),
    ],
    ids=["unknown token", "no token", "foreign namespace", "read-only token", "no namespace", "bad name"],
)
def test_a_refusal_is_one_clear_message(hub, publish, decoder, token, repo_id, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(publish(decoder, repo_id, token=token).error)
    assert ("model", repo_id) not in hub.repositories


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_" + "Wrong" * 6, "ann/m", "does not accept the token"),
        (None, "ann/m", "not logged in to the Hub; log in with"),
        (BOB, "ann/m", r"may not write to ann/m: it belongs to bob; use a token with write access to 'ann'"),
        (ANN_READ_ONLY, "ann/m", "may not write to ann/m: it is for reading only"),
        (ANN, "me", "'me' is not a repository name; write USER/NAME"),
        (ANN, "True", "'True' is not a repository name"),
        (ANN, "ann/seen", "ann/seen exists and is public"),
    ],
)
def test_what_cannot_be_published_is_known_before_the_run(hub, publish, token, repo_id, message):
    hub.add("ann/seen", {"README.md": b"#"})
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(publish(None, repo_id, token=token, private=True).error)
    assert publish(None, "ann/unheard-of", private=True).error is None
    assert not [path for method, path, _ in hub.requests if method != "GET"]


ORGS = [{"name": "Lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]


@pytest.mark.parametrize(
    ("repo_id", "token", "reason"),
    [
        ("ann/m", {"role": "write"}, ""),
        ("lab/m", {"role": "write"}, ""),
        ("club/m", {"role": "write"}, "its owner may only read there"),
        ("ann/m", {}, ""),
        ("ann/m", {"role": "fineGrained", "fineGrained": {"scoped": []}}, "it lacks `repo.write`"),
        *(
            (repo_id, {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}, reason)
            for scope in [{"entity": {"name": "ann"}, "permissions": ["repo.content.read", "repo.write"]}]
            for repo_id, reason in (("ann/m", ""), ("lab/m", "it lacks `repo.write`"))
        ),
    ],
)
def test_rights_are_read_from_what_the_hub_knows_of_a_token(repo_id, token, reason):
    assert why_not_allowed({"name": "ann", "orgs": ORGS, "auth": {"accessToken": token}}, repo_id) == reason


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_a_recipe_refuses_a_push_that_cannot_work_before_it_trains(tmp_path, recipe):
    main = importlib.import_module(f"recipes.{recipe}").main
    with pytest.raises(PublishError, match="'me' is not a repository name"):
        main(["--preset", "smoke", "--push_to_hub", "me", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer_is_named_after_four_attempts(hub, publish, decoder):
    for _ in range(4):
        hub.fail_once("POST", "/api/repos/create", "drop")
    outcome = publish(decoder, "ann/silent")
    assert f"cannot reach {hub.url}" in outcome.error
    assert [line for line in outcome.log if "trying again" in line][-1].endswith("trying again in 2 s")
    assert not hub.faults


def test_a_card_that_the_hub_refuses_is_reported_with_its_reason(hub, publish, copied):
    (copied / "README.md").write_text("---\nlicense:\n---\n# mine")
    assert "the Hub refuses the files: Invalid metadata in README.md.\n" in publish(copied, "ann/card").error


# ------------------------------------------------------------------------------------------- refused before sending


def test_a_token_in_a_file_stops_everything(hub, publish, copied):
    (copied / "run.json").write_text(json.dumps({"command": f"train --hub_token {BOB}"}))
    outcome = publish(copied, "ann/leak")
    assert "run.json" in outcome.error
    assert "access token; nothing was sent" in outcome.error
    assert BOB not in outcome.error
    assert hub.requests == []


def test_the_active_token_is_found_whatever_its_shape_even_in_a_header(decoder, copied):
    save_file({"a": torch.zeros(1)}, copied / "model.safetensors", metadata={"by": "s3cret"})
    (copied / "stems_bm.py").write_text("# s3cret\n" + (copied / "stems_bm.py").read_text())
    with pytest.raises(PublishError, match=r"model.safetensors, stems_bm.py in"):
        refuse_tokens(read_bundle(copied), "s3cret")
    refuse_tokens(read_bundle(decoder), "s3cret")


def test_a_folder_that_does_not_load_is_not_sent(hub, publish, copied):
    edit_json(copied / "config.json", hidden_size=32)
    assert "does not load here, so nothing was sent" in publish(copied, "ann/broken").error
    assert hub.requests == []


def test_a_dry_run_asks_nobody(hub, publish, decoder):
    outcome = publish(decoder, "ann/dry", token=None, dry_run=True)
    assert outcome.log[-1] == f"dry run: nothing was sent to {hub.url}/ann/dry"
    assert hub.requests == []


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    os.truncate(folder / "model.safetensors", 1000)


def shards(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def heads(*names, **changes):
    def edit(folder):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        edit_json(folder / "config.json", auto_map={k: v for k, v in auto_map.items() if k not in names} | changes)

    return edit


LINKED = ("LICENSE", "README.md", "config.json", "heads_bm.py", "model.safetensors", "report.html", "tokenizer.json")


def linked(name):
    """A link out of the folder, to a file that is otherwise as it should be."""

    def link(folder):
        secret = folder.parent / f"secret-{name}"
        secret.write_bytes((folder / name).read_bytes() if (folder / name).is_file() else b"secret")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)

    return link


def nested(reference):
    content = {"image_processor": {"auto_map": {"AutoImageProcessor": reference}}}
    return lambda folder: (folder / "processor_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json is not valid JSON .*; save it again"),
        (without("model.safetensors"), r"no weights \(model.safetensors\)"),
        (pickled, "pytorch_model.bin holds pickled weights"),
        (cut, "model.safetensors is damaged"),
        (shards, "model-00001-of-00002.safetensors is named by model.safetensors.index.json and missing"),
        (without("tokenizer.json"), "no tokenizer; save it beside the model"),
        (without("heads_bm.py"), "heads_bm.py is imported by the model's code and missing"),
        (lambda folder: (folder / "stems_bm.py").write_text("def"), r"stems_bm.py is not valid Python"),
        (heads("AutoModel"), "auto_map lacks AutoModel"),
        (heads("AutoModelForCausalLM"), "auto_map does not name BmTransformerForCausalLM"),
        (heads(AutoModel="modeling_bm_transformer.Nothing"), "modeling_bm_transformer.py does not define it"),
        (heads(AutoModel="bob/code--modeling_x.X"), "takes its code from bob/code, which can change at any time"),
        (lambda folder: edit_json(folder / "config.json", auto_map=None), "is not one of transformers' own"),
        (lambda folder: edit_json(folder / "config.json", architectures=None), "config.json names no architecture"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names no base_model_name_or_path"),
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a JSON list, not an object"),
        (heads(AutoModel="/abs/x.Secret"), "AutoModel names '/abs/x.Secret'; only code beside it is published"),
        (heads(AutoModel="../x.Secret"), r"AutoModel names '../x.Secret'; only code beside it"),
        (heads(AutoModel="folder/x.Secret"), "AutoModel names 'folder/x.Secret'"),
        (heads(AutoModel=3), "AutoModel names 3; only code beside it"),
        (nested("/abs/x.Secret"), "processor_config.json: AutoImageProcessor names '/abs/x.Secret'"),
        *((linked(name), f"does not follow symbolic links: {name}") for name in LINKED),
    ],
)
def test_a_damaged_folder_is_refused_with_its_problem(copied, damage, message):
    damage(copied)
    with pytest.raises(PublishError, match=message):
        read_bundle(copied)


def test_all_problems_are_reported_at_once(copied):
    (copied / "model.safetensors").unlink()
    (copied / "tokenizer.json").unlink()
    with pytest.raises(PublishError, match=r"(?s)no tokenizer.*no weights"):
        read_bundle(copied)


def test_a_card_that_was_edited_is_kept(copied, tmp_path):
    room, said = tmp_path / "room", []
    room.mkdir()
    written = with_card(read_bundle(copied), "ann/m", room, said.append).files["README.md"]
    shutil.copy(written, copied / "README.md")
    assert with_card(read_bundle(copied), "bob/n", room, said.append).files["README.md"].parent == room
    (copied / "README.md").write_text("# my own words")
    assert with_card(read_bundle(copied), "bob/n", room, said.append).files["README.md"].parent == copied
    assert said == ["README.md was edited since the run and is pushed as it is"]


def test_a_card_older_than_its_run_is_written_anew(copied, tmp_path):
    (copied / "README.md").write_text("# the run before")
    os.utime(copied / "README.md", (0, 0))
    assert with_card(read_bundle(copied), "ann/m", tmp_path, print).files["README.md"].parent == tmp_path
