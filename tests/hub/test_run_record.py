"""run.json: written in one order and redacted, read back whatever it holds; and what a finished run leaves."""

import json
from dataclasses import dataclass, field, replace

import pytest

from bmtk.errors import UserError
from bmtk.hub import finalize
from bmtk.hub.finalize import FinishedRun, check_publishing, finalize_run, is_finished
from bmtk.hub.run_record import ModelRecord, RunRecord, TaskDescription

MODEL = ModelRecord("BertModel", "bert", 10, "google-bert/bert-base-uncased", "lora", "adapter")
RECORD = RunRecord(
    bmtk_version="0.1.0",
    command="accelerate launch recipes/finetune.py",
    task="token_classification",
    about={"noun": "tagger", "main_metric": "f1"},
    data={"name": "errands", "train": {"rows": 3}},
    config={"seed": 42, "learning_rate": 1e-3},
    environment={"torch": "2.13.0", "hardware": "2 CPU cores"},
    recipe="finetune",
    started_at="2026-02-03T10:15:00+00:00",
    train_seconds=1.5,
    model=MODEL,
    throughput={"tokens_per_second": 12.5, "mfu": 0.25},
    metrics={"test/f1": 0.5},
    samples=[{"prompt": "a", "text": "ü"}],
    inference={"rows_per_second": 3.0},
    figures=[{"title": "t", "svg": "<svg>/home/ann</svg>"}],  # markup is not scrubbed
)
ORDER = ["bmtk_version", "command", "task", "about", "data", "config", "environment", "recipe", "started_at"]
ORDER += ["train_seconds", "model", "throughput", "metrics", "samples", "inference", "figures"]


def test_the_file_has_one_order_and_reads_back_as_it_was_written(tmp_path):
    path = RECORD.write(tmp_path)
    assert path == tmp_path / "run.json"
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n}\n")
    assert "ü" in text
    content = json.loads(text)
    assert list(content) == ORDER
    assert list(content["model"]) == ["class", "model_type", "num_parameters", "base_model", "adapter", "saved_as"]
    assert RunRecord.read(tmp_path) == RECORD
    assert replace(RECORD, license="mit").write(tmp_path) == path
    assert RunRecord.read(tmp_path).license == "mit"


def test_pictures_and_languages_are_kept_as_they_are(tmp_path):
    sample = {"prompt": "/home/ann/x", "text": "b", "png_base64": "iVBOR/root/+/home/ann=="}
    replace(RECORD, samples=[sample], language=["en"]).write(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["samples"] == [{**sample, "prompt": "~/x"}]
    assert content["language"] == ["en"]
    read = RunRecord.read(tmp_path)
    assert (read.samples, read.language) == (content["samples"], ["en"])


def test_what_a_model_lacks_is_null_but_how_it_was_saved_is_left_out():
    section = {"class": "BmCnn", "model_type": "bm_cnn", "num_parameters": 3, "base_model": None, "adapter": None}
    assert ModelRecord("BmCnn", "bm_cnn", 3).to_json() == section
    assert ModelRecord.from_json(section) == ModelRecord("BmCnn", "bm_cnn", 3)


def test_facts_of_another_version_are_kept_and_those_of_a_wrong_kind_are_not():
    found = ModelRecord.from_json({"class": 3, "num_parameters": "many", "base_model": ["a"], "bits": 4})
    assert found == ModelRecord(other={"bits": 4})
    assert found.to_json()["bits"] == 4


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, TaskDescription()),
        ({"noun": "tagger", "limits": 3, "unheard_of": "x"}, TaskDescription(noun="tagger")),
        ({"processor_class": None, "auto_class": None}, TaskDescription(processor_class=None)),
        ({"processor_class": 3}, TaskDescription(processor_class="AutoTokenizer")),
    ],
)
def test_a_description_has_defaults_for_what_is_not_said(about, expected):
    assert RunRecord(about=about).description == expected


def test_foreign_content_becomes_a_record_of_the_right_kinds():
    run = RunRecord.from_json({"task": 3, "inference": [], "train_seconds": "long", "throughput": {"mfu": "much"}})
    assert (run.task, run.inference, run.train_seconds, run.mfu) == ("3", {}, None, None)
    assert (run.model, run.samples, run.figures, run.data_name) == (ModelRecord(), [], [], None)
    run = RunRecord.from_json({"data": {"name": 7}, "figures": ["x", {"svg": 1}], "samples": [3, {"text": None}]})
    assert (run.data_name, run.figures, run.samples) == ("7", [{"svg": 1}], [{"prompt": "", "text": ""}])


def test_secrets_are_redacted_when_a_record_is_written_and_when_it_is_read(tmp_path):
    token = "hf_" + "aB3" * 11
    secret = replace(RECORD, command=f"train --hub_token {token}", config={"hub_token": "abc"}, recipe=token)
    secret.write(tmp_path)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert token not in text
    assert "abc" not in text
    read = RunRecord.from_json({"command": "train --hub_token s3cret", "config": {"hub_token": "abc"}})
    assert (read.command, read.config) == ("train --hub_token [redacted]", {"hub_token": "[redacted]"})


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("3", "holds a JSON int, not an object")])
def test_a_file_that_is_no_record_is_the_users_to_mend(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        RunRecord.read(tmp_path)


@dataclass
class Results:
    metrics: dict = field(default_factory=lambda: {"test/f1": 0.5, "test/loss": 0.25})
    samples: list = field(default_factory=lambda: [{"prompt": "a", "text": "b"}])
    figures: list = field(default_factory=list)
    inference: dict = field(default_factory=lambda: {"rows_per_second": 3.0})


class Objective:
    about = {"noun": "tagger", "auto_class": "AutoModelForTokenClassification"}
    decided_settings = {"context_length": 7, "unset": None}

    class scorer:
        main_metric = "f1"

    def data_record(self):
        return {"name": "errands"}

    def next_command(self, folder):
        return f"predict --model {folder.name}"


@dataclass
class Settings:
    task: str = "token_classification"
    push_to_hub: str | None = None
    private: bool = True
    trust_remote_code: bool = False
    license: str | None = None
    language: list | None = None


def finished() -> FinishedRun:
    config = {"seed": 1, "context_length": None}
    environment = {"hardware": "2 CPU cores"}
    return FinishedRun("finetune", config, environment, "2026", 1.5, MODEL, {"mfu": 0.25}, Results())


def test_a_finished_run_leaves_its_record_card_report_and_recipe(tmp_path):
    said = []
    finalize_run(tmp_path, run=Settings(), objective=Objective(), finished=finished(), log=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "recipe.yaml", "report.html", "run.json"]
    content = json.loads((tmp_path / "run.json").read_text())
    assert list(content) == ORDER
    assert content["about"] == {**Objective.about, "main_metric": "f1"}
    assert content["config"] == {"seed": 1, "context_length": 7, "unset": None}
    assert (content["task"], content["data"]) == ("token_classification", {"name": "errands"})
    assert content["samples"] == [{"prompt": "a", "text": "b"}]
    assert (tmp_path / "recipe.yaml").read_text() == "seed: 1\ncontext_length: 7\n"
    assert f"next: predict --model {tmp_path.name}" in said[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": ["English"]}, "language='English' is no language code"),
        ({"license": " "}, "license=' ' has no name in it"),
    ],
)
def test_what_no_card_can_hold_is_refused_before_the_run(settings, message):
    with pytest.raises(UserError, match=message):
        check_publishing(Settings(**settings), log=str)
    check_publishing(Settings(license="mit", language=["en", "zh-Hant"]), log=str)


def test_a_finished_run_is_published_where_its_settings_ask_for_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(finalize, "publish", lambda *given, **options: asked.append((given, options["private"])))
    run = Settings(push_to_hub="user/name")
    finalize_run(tmp_path, run=run, objective=Objective(), finished=finished(), log=str)
    assert asked == [((tmp_path, "user/name"), True)]


def test_a_finished_run_of_a_former_version_is_finished_where_new_settings_have_their_defaults(tmp_path):
    for name in ("config.json", "model.safetensors", "report.html"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"learning_rate": 0.1}}))
    now = {"learning_rate": 0.1, "momentum": 0.95}
    assert is_finished(tmp_path, now, {"momentum"})
    assert not is_finished(tmp_path, now)
    assert not is_finished(tmp_path, now | {"learning_rate": 0.2}, {"momentum", "learning_rate"})
