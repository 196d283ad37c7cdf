"""The model card: front matter that the Hub reads back, a body that no name can break, and no secret in either."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from bmtk.hub import card, formatting
from bmtk.hub.card import describe, write_card
from bmtk.hub.redaction import scrub
from bmtk.hub.run_record import RunRecord

RUN = {
    "bmtk_version": "0.1.0",
    "recipe": "pretrain",
    "task": "causal_lm",
    "about": {
        "pipeline_tag": "text-generation",
        "auto_class": "AutoModelForCausalLM",
        "noun": "causal language model",
    },
    "command": "accelerate launch recipes/pretrain.py",
    "train_seconds": 151.2,
    "model": {"class": "BmTransformerForCausalLM", "model_type": "bm_transformer", "num_parameters": 3_214_592},
    "data": {"name": "Tiny Shakespeare", "source": "data/tiny", "licence": "public domain", "train": {"documents": 1}},
    "config": {"learning_rate": 0.003, "optimizer": "muon", "num_train_steps": 600, "context_length": 128},
    "metrics": {"validation/loss": 3.4121, "validation/perplexity": 30.33},
    "throughput": {"tokens_per_second": 54_120.3, "mfu": 0.412},
    "environment": {"torch": "2.13.0", "hardware": "2 CPU cores"},
    "samples": [{"prompt": "ROMEO:", "text": "ROMEO:\nSpeak."}],
}
HOSTILE = (
    "x</td><script>alert(1)</script>\n---\nlicense: mit\n---\n# Heading\n| a | b |\n```\n<img src=x> "
    "`{{ 7 * 7 }}` [a](b)"
)
TOKEN = "hf_" + "aB3" * 11


def card_of(directory: Path, run: dict, **options) -> str:
    (directory / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return write_card(directory, **options).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """The tags of a page in order, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def outline(text: str) -> Outline:
    return Outline(MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(text).text))


def test_the_front_matter_holds_what_the_run_knows_and_nothing_else(tmp_path):
    data = ModelCard(card_of(tmp_path, RUN)).data.to_dict()
    results = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bmtk", "bm_transformer"],
    }
    assert results[0]["results"][0]["dataset"] == {
        "name": "Tiny Shakespeare",
        "type": "Tiny-Shakespeare",
        "split": "validation",
    }
    assert [(metric["type"], metric["value"]) for metric in results[0]["results"][0]["metrics"]] == [
        ("loss", 3.4121),
        ("perplexity", 30.33),
    ]


def test_hub_ids_are_linked_and_local_paths_are_not(tmp_path):
    run = {**RUN, "model": {"base_model": "google-bert/bert-base-uncased"}, "data": {"source": "stanfordnlp/sst2"}}
    data = ModelCard(card_of(tmp_path, run)).data
    assert (data.base_model, data.base_model_relation, data.datasets) == (
        "google-bert/bert-base-uncased",
        "finetune",
        ["stanfordnlp/sst2"],
    )
    for local in (
        "outputs/pretrain",
        "/data/bert",
        "./bert",
        "data/train.csv",
        "corpora/train.csv",
        "a/b/c",
        "x" * 500,
        3,
        "",
        None,
    ):
        run = {**RUN, "model": {"base_model": local}, "data": {"source": local}}
        data = ModelCard(card_of(tmp_path, run)).data
        assert (data.base_model, data.datasets) == (None, None)


def test_a_translator_is_used_by_generate_as_there_is_no_pipeline_for_it(tmp_path):
    about = {"pipeline_tag": "translation", "auto_class": "AutoModelForSeq2SeqLM", "noun": "translator"}
    text = card_of(tmp_path, {**RUN, "about": about, "samples": [{"prompt": 'Ein "Hund"', "text": " -> a dog"}]})
    code = text.split("```python\n")[1].split("```")[0].splitlines()
    assert code[1] == "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer"
    assert code[-2:] == [
        'inputs = tokenizer(["Ein \\"Hund\\""], return_tensors="pt")',
        "print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))",
    ]
    assert "pipeline(" not in text


@pytest.mark.parametrize(
    ("licence", "expected"), [("Apache-2.0", ("apache-2.0", None)), ("My Own: 1", ("other", "my-own-1"))]
)
def test_an_unknown_licence_is_called_other(tmp_path, licence, expected):
    data = ModelCard(card_of(tmp_path, {**RUN, "license": licence})).data
    assert (data.license, data.license_name) == expected


def test_hostile_names_change_neither_the_front_matter_nor_the_outline(tmp_path):
    text = {**RUN, "command": HOSTILE, "started_at": HOSTILE, "bmtk_version": HOSTILE, "recipe": HOSTILE}
    text["data"] = {**RUN["data"], "name": HOSTILE, "source": HOSTILE, "licence": HOSTILE}
    text["config"] = {**RUN["config"], "optimizer": HOSTILE}
    text["environment"] = {"torch": HOSTILE, HOSTILE.lower(): "value"}
    text["samples"] = [{"prompt": HOSTILE, "text": HOSTILE}]
    safe = json.loads(json.dumps(text).replace(json.dumps(HOSTILE)[1:-1], "safe"))
    safe["environment"] = {"torch": "safe", "other": "value"}
    hostile_card, safe_card = card_of(tmp_path, text), card_of(tmp_path, safe)
    hostile_data, safe_data = (ModelCard(content).data.to_dict() for content in (hostile_card, safe_card))
    assert hostile_data.pop("model-index") != safe_data.pop("model-index")
    assert hostile_data == safe_data
    assert outline(hostile_card).tags == outline(safe_card).tags
    assert "{{ 7 * 7 }}" in outline(hostile_card).text
    assert "49" not in outline(hostile_card).text


def test_escaped_text_reads_as_it_was_written():
    text = r"a_b _c_ *d* `e` <f> & [g](h) | \ # ~~i~~ 1 < 2"
    html = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(f"| {formatting.escape_markdown(text)} |\n|---|\n")
    )
    assert Outline(html).text.strip() == text
    assert not set("<>") & set(formatting.escape_markdown(text))


def test_secrets_and_names_of_users_never_reach_the_card(tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    monkeypatch.setattr(Path, "home", lambda: home)
    secrets = ("s3cret-value", "hunter2", TOKEN)
    run = {
        **RUN,
        "command": f"HF_TOKEN=hunter2 train --hub_token s3cret-value --out {home}/out --in /home/bob/x {Path.cwd()}/y",
        "config": {"hub_token": "s3cret-value", "api_key": "s3cret-value", "optimizer": TOKEN},
        "environment": {"torch": TOKEN, "HF_TOKEN": "hunter2", "LOGNAME": "carol", "environ": {"PASSWORD": "hunter2"}},
        "samples": [{"prompt": TOKEN, "text": f"x_{TOKEN}"}],
        "data": {"name": f"https://user:hunter2@example.org/{TOKEN}", "source": f"file:///home/bob/{TOKEN}"},
    }
    text = card_of(tmp_path, run, repo_id=None)
    assert not [secret for secret in (*secrets, "alice", "bob", "carol", str(Path.cwd())) if secret in text]
    assert "HF_TOKEN=[redacted] train --hub_token [redacted] --out ~/out --in ~/x y" in text


def test_ordinary_words_are_not_taken_for_secrets():
    text = "the secret -- hf_hub_download max_token=1 tokens = 5, /homework/root-beer, num_tokens"
    assert scrub({"eos_token": "<|endoftext|>", "text": text}) == {
        "eos_token": "<|endoftext|>",
        "text": text,
    }


def test_the_card_loads_with_bmtk_and_with_remote_code(tmp_path):
    text = card_of(tmp_path, RUN, repo_id="user/name")
    assert 'name = "user/name"' in text
    assert "import bmtk\n" in text
    assert "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)" in text
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_a_model_of_the_library_needs_no_remote_code(tmp_path):
    text = card_of(tmp_path, {**RUN, "model": {"class": "BertForMaskedLM", "model_type": "bert"}})
    assert "import bmtk" not in text
    assert "trust_remote_code" not in text


def test_nan_is_shown_and_kept_out_of_the_model_index(tmp_path):
    text = card_of(tmp_path, {**RUN, "metrics": {"validation/loss": float("nan"), "validation/accuracy": 0.5}})
    assert "| Validation loss | NaN |" in text
    metrics = ModelCard(text).data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["accuracy"]


def test_licence_and_languages_of_the_model_reach_the_metadata(tmp_path):
    data = ModelCard(card_of(tmp_path, {**RUN, "license": "mit", "language": ["en"]})).data
    assert (data.license, data.language) == ("mit", "en")
    data = ModelCard(card_of(tmp_path, {**RUN, "language": ["zh-Hant", "de", "not a code"]})).data
    assert (data.license, data.language) == (None, ["zh-Hant", "de"])


def test_the_way_to_install_is_one_that_works(tmp_path, monkeypatch):
    text = card_of(tmp_path, RUN)
    assert "pip install big-model-toolkit" not in text
    assert "`pip install .` in a copy of its source" in text
    monkeypatch.setattr(card, "install_command", lambda: 'pip install "git+https://example.org/x@abc"')
    assert '(`pip install "git+https://example.org/x@abc"`)' in card_of(tmp_path, RUN)


def test_numbers_that_stand_for_unset_are_no_settings(tmp_path):
    config = {"max_steps": -1, "num_train_steps": None, "optimizer": "auto", "weight_decay": 0.0, "seed": 0}
    text = card_of(tmp_path, {**RUN, "config": {**config, "micro_batch_size": 0}})
    assert "| weight_decay | 0.0 |" in text
    assert "| seed | 0 |" in text
    assert not [name for name in ("max_steps", "num_train_steps", "optimizer", "micro_batch_size") if name in text]


def test_a_model_that_a_baseline_beats_says_so(tmp_path):
    about = {**RUN["about"], "main_metric": "mse"}
    worse = {**RUN, "about": about, "metrics": {"test/mse": 1.4, "test/naive_mse": 1.294, "validation/naive_mse": 9.0}}
    assert "**A baseline without a model does better: test MSE 1.4, last value 1.294.**" in card_of(tmp_path, worse)
    better = {**worse, "metrics": {**worse["metrics"], "test/mse": 1.2}}
    assert "A baseline" not in card_of(tmp_path, better)
    about = {**RUN["about"], "main_metric": "accuracy"}
    accuracy = {**RUN, "about": about, "metrics": {"test/accuracy": 0.5, "test/majority_accuracy": 0.6}}
    assert "test accuracy 0.5, majority class 0.6" in card_of(tmp_path, accuracy)


def test_an_empty_run_still_makes_a_card(tmp_path):
    text = card_of(tmp_path, {})
    assert ModelCard(text).data.tags == ["bmtk"]
    assert "No evaluation was recorded." in text


def test_settings_without_effect_are_left_out(tmp_path):
    config = {
        "optimizer": "adamw",
        "muon_learning_rate": 0.02,
        "muon_momentum": 0.9,
        "schedule": "wsd",
        "decay_fraction": 0.2,
    }
    text = card_of(tmp_path, {**RUN, "config": config})
    assert "muon" not in text
    assert "| decay_fraction | 0.2 |" in text


def test_how_much_was_evaluated_is_shown_and_is_no_result(tmp_path):
    text = card_of(tmp_path, {**RUN, "metrics": {"validation/tokens": 55_989, "eval_runtime": 2.0, "eval_f1": 0.5}})
    assert "| Validation tokens | 55,989 |\n| Validation F1 | 0.5 |" in text
    metrics = ModelCard(text).data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert [metric["name"] for metric in metrics] == ["Validation F1"]


def test_sizes_are_counted_in_words(tmp_path):
    run = {**RUN, "data": {"train": {"documents": 1, "tokens": 301_966}, "validation": {"rows": 872}}}
    text = card_of(tmp_path, run)
    assert "| train | 1 document, 301,966 tokens |\n| validation | 872 rows |" in text


def test_corpora_that_were_mixed_have_a_row_each(tmp_path):
    corpora = [{"name": "wiki", "weight": 0.7, "rows": 7, "share": 0.7, "epochs": 1.25}, "no corpus", {"name": "|"}]
    rows = card.data_rows(RunRecord.from_json({**RUN, "data": {"corpora": corpora}}))
    assert rows == [
        ("corpus wiki", "weight 0.7, 70.00% of the rows read, 1.25 epochs"),
        ("corpus |", "weight 0, 0.00% of the rows read, 0 epochs"),
    ]
    assert "corpus wiki" in card_of(tmp_path, {**RUN, "data": {"name": "mixed", "corpora": corpora}})


def test_facts_of_the_wrong_kind_are_passed_over(tmp_path):
    run = {"task": [], "model": None, "metrics": 3, "samples": [None, {"prompt": 1}], "figures": {}, "config": []}
    assert "No evaluation was recorded." in card_of(tmp_path, run)


def test_a_run_that_stopped_says_so(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 340, "loss": 2.0}\n{"step": 34')
    assert "**Stopped at step 340 of 600.**" in card_of(tmp_path, RUN)
    assert "**Interrupted at step 340 of 600.**" in card_of(tmp_path, {**RUN, "metrics": {}})


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[]", "holds a JSON list"), (None, "run.json is missing")]
)
def test_a_folder_without_facts_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3.41214, "3.412"), (1234567, "1,234,567"), (5e-05, "5e-5"), (float("inf"), "∞"), (0.5, "0.5"), (0, "0")],
)
def test_numbers_are_shown_as_a_reader_wants_them(value, expected):
    assert formatting.format_number(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(151.2, "2 min 31 s"), (31.04, "31 s"), (15_000, "4 h 10 min")])
def test_durations_have_two_units(value, expected):
    assert formatting.format_seconds(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(3_214_592, "3.21 M"), (999, "999"), (999_900, "1 M"), (2e9, "2 B")])
def test_counts_have_three_digits(value, expected):
    assert formatting.format_compact(value) == expected


def test_the_example_loads_the_processor_that_the_task_has(tmp_path):
    about = {"pipeline_tag": "image-classification", "auto_class": "AutoModelForImageClassification"}
    for processor, expected in {
        "AutoImageProcessor": "processor = AutoImageProcessor.from_pretrained(name",
        None: "",
    }.items():
        folder = tmp_path / str(processor)
        folder.mkdir()
        facts = {"about": {**about, "processor_class": processor}, "model": {"model_type": "bm_cnn"}}
        (folder / "run.json").write_text(json.dumps(facts))
        text = write_card(folder).read_text()
        assert expected in text
        assert "tokenizer" not in text.lower()


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("validation/macro_f1", "Validation macro-F1"),
        ("test/map_50", "Test mAP 50"),
        ("eval_chrf", "Validation chrF"),
        ("test/top5_accuracy", "Test top-5 accuracy"),
        ("bits_per_byte", "Bits per byte"),
        ("test/seasonal_naive_mse", "Test seasonal naive MSE"),
    ],
)
def test_metrics_are_spelled_as_the_field_spells_them(key, label):
    assert formatting.metric_label(key) == label


@pytest.mark.parametrize(("noun", "article"), [("image classifier", "An"), ("tagger", "A")])
def test_the_article_fits_the_noun(noun, article):
    run = RunRecord.from_json({**RUN, "about": {"noun": noun}})
    assert describe(run).startswith(f"{article} {noun} with ")
