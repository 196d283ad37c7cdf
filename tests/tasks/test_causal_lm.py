import json
import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import bmtk  # noqa: F401  registers the model families
from bmtk.data.store_report import mixture_report
from bmtk.errors import UserError
from bmtk.tasks import corpora
from bmtk.tasks.causal_lm import TASK, CausalLMArguments
from bmtk.tasks.corpora import CorpusData
from recipes import finetune

TEXT = "the cat sat \n on the mat \n and the dog sat \n on the cat \n"


def read(folder, **settings) -> CorpusData:
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text(TEXT)
    files = {"train_file": [str(folder / "train.txt")], "validation_file": [str(folder / "validation.txt")]}
    settings = {"tokenizer": "word", "vocab_size": 50, "leakage": "allow", **settings}
    return TASK.read(CausalLMArguments(**files, **settings), folder=folder)


SMALL = {"hidden_size": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_longer_rows_of_an_evaluation_give_the_perplexity_of_the_unbroken_text(tmp_path, batch_size):
    data = read(tmp_path, context_length=4, eval_context_length=64)
    config = data.new_config("bm_rnn", {**SMALL, "initializer_range": 0.7})
    objective = data.bind(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict())).eval()
    store = objective.rows["validation"].store
    tokens = torch.tensor(store.tokens.astype("int64"))[None]
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    whole = F.cross_entropy(logits[0], tokens[0, 1:]).item()

    def measured(objective):
        batches = objective.batches_in_order(objective.rows["validation"], batch_size=batch_size)
        with torch.no_grad():
            predictions = [one for batch in batches for one in objective.scorer.predict(model, batch)]
        return objective.scorer.score(predictions, objective.rows["validation"])

    metrics = measured(objective)
    assert metrics["loss"] == pytest.approx(whole, abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(whole), rel=1e-6)
    assert metrics["tokens"] == len(TEXT.split(" ")) + 1  # every word and end of line, and the end of the text
    assert {len(row) for row in objective.rows["train"][[0, 1]]["input_ids"]} == {4}
    short = read(tmp_path, context_length=4).bind(config)
    assert measured(short)["loss"] != pytest.approx(whole, abs=1e-4)  # short rows forget


def test_an_empty_prompt_is_continued_alone_as_beside_others(tmp_path):
    data = read(tmp_path, context_length=16, sample_tokens=3)
    config = data.new_config("bm_transformer", {**SMALL, "num_attention_heads": 2})
    objective = data.bind(config)
    model, predict = AutoModelForCausalLM.from_config(config).eval(), objective.scorer.predict
    rows = list(objective.encode_inputs(Dataset.from_dict({"text": ["the cat", ""]})))
    together = predict(model, objective.collator()(rows))
    assert [predict(model, objective.collator()([row]))[0] for row in rows] == together


def test_samples_stay_within_the_positions_of_the_model(tmp_path, monkeypatch):
    data = read(tmp_path, context_length=6, sample_tokens=50, prompts=["the cat", "the cat sat on " * 9])
    config = data.new_config("bm_transformer", {**SMALL, "num_attention_heads": 2})
    objective = data.bind(config)
    model, lengths = AutoModelForCausalLM.from_config(config).eval(), []
    model.generation_config.eos_token_id = None
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: lengths.append(generate(**given)) or generate(**given))
    objective.scorer.generated_samples(model, seed=0)
    assert config.max_position_embeddings == 6
    assert [output.shape[1] for output in lengths] == [6, 6]
    unlimited = data.bind(data.new_config("bm_rnn", SMALL))
    assert unlimited.num_new_tokens(3, wanted=50) == 50
    assert "max_new_tokens=4)" in objective.next_command(tmp_path)
    assert "max_new_tokens=100)" in unlimited.next_command(tmp_path)


def test_a_new_model_of_every_family_reads_tokens(tmp_path):
    data = read(tmp_path, context_length=6)
    assert {data.new_config(name, {}).input_type for name in ("bm_cnn", "bm_rnn", "bm_transformer")} == {"tokens"}


def test_a_new_model_reads_the_longest_row(tmp_path):
    longer = read(tmp_path, context_length=4, eval_context_length=16)
    assert longer.config_fields["max_position_embeddings"] == 16
    assert longer.tokenizer.model_max_length == 16
    with pytest.raises(UserError, match="context_length=16 exceeds max_position_embeddings=8; lower it"):
        longer.bind(AutoConfig.for_model("bm_transformer", max_position_embeddings=8))
    with pytest.raises(UserError, match="eval_context_length=0 must be at least 1 token"):
        CausalLMArguments(eval_context_length=0)


def test_rows_that_carry_a_state_come_in_the_order_of_the_text(tmp_path):
    data = read(tmp_path, context_length=4, carry_state=True)
    objective = data.bind(data.new_config("bm_rnn", SMALL))
    batches = objective.train_batches(batch_size=2, micro_batch_size=0, seed=1)
    assert batches.carries_state
    assert objective.keeps_order
    tokens = objective.rows["train"].store.tokens.tolist()
    lanes = torch.cat([batches[step][0]["input_ids"] for step in range(int(batches.steps_per_epoch))], dim=1)
    assert lanes.flatten().tolist()[: len(tokens) - 1] == tokens[:-1]


LONG = [f"line {i} of a text whose lines are long enough to be compared" for i in range(40)]


def corpus(folder, train, validation, **settings):
    for split, lines in {"train": train, "validation": validation}.items():
        (folder / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    return TASK.read(CausalLMArguments(dataset=str(folder), vocab_size=300, **settings), folder=folder / "run")


def test_training_text_that_is_measured_on_is_refused_dropped_or_allowed(tmp_path):
    """As a document, and as part of one; once for all, until a file changes."""
    whole = r"dataset=\S+: 100% of the validation text, in lines of 32 characters or more, is also in the "
    with pytest.raises(UserError, match=whole + r"training text \(for example 'line 0 of a text"):
        corpus(tmp_path, LONG, LONG)
    with pytest.raises(UserError, match="50% of the validation text"):
        corpus(tmp_path, LONG, [*LONG[:3], *(line.upper() for line in LONG[:3])])
    with pytest.raises(UserError, match="nothing would be left to train on"):
        corpus(tmp_path, LONG, LONG[:3], leakage="drop")
    data = corpus(tmp_path, LONG, LONG[:3], leakage="drop", sample_by="line")
    assert list(data.rows["train"]) == LONG[3:]
    assert data.notes[0].endswith("the documents that hold it are left out of training")
    assert len(data.bind(data.new_config("bm_rnn", SMALL)).rows["train"].store.offsets) == 37 + 1
    assert list(corpus(tmp_path, LONG, LONG[:3], leakage="allow", sample_by="line").rows["train"]) == LONG
    apart = corpus(tmp_path, LONG[10:], LONG[:3], sample_by="line")
    assert apart.notes == []
    assert corpus(tmp_path, LONG[10:], LONG[:3], sample_by="line").notes == []  # from what was remembered
    with pytest.raises(UserError, match="is also in the training text"):
        corpus(tmp_path, LONG[2:], LONG[:3], sample_by="line")


def test_one_text_is_enough_and_what_is_held_out_is_not_trained_on(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(LONG), encoding="utf-8")

    def parts(seed=1, **settings):
        args = CausalLMArguments(**{"dataset": str(path), "vocab_size": 300, **settings})
        return TASK.read(args, folder=tmp_path / "run", seed=seed)

    data = parts()
    assert data.notes == [
        "there is no validation text: 1 of 14 stretches of text, cut at blank lines, are held out "
        "(validation_fraction=0.1, seed 1)"
    ]
    lines = {split: {line for text in data.rows[split] for line in text.split("\n\n") if line} for split in data.rows}
    assert lines["train"] | lines["validation"] == set(LONG)
    assert not lines["train"] & lines["validation"]
    assert len(lines["validation"]) == 3
    assert list(parts(dataset=None, train_file=[str(path)]).rows["validation"]) == list(data.rows["validation"])
    assert list(parts(seed=3).rows["validation"]) != list(data.rows["validation"])
    assert len(list(parts(validation_fraction=0.3).rows["validation"])) == 2
    assert data.bind(data.new_config("bm_rnn", SMALL)).rows["validation"].store.num_documents == 1
    path.write_text("\n\n".join([*LONG, *LONG]), encoding="utf-8")
    with pytest.raises(UserError, match="of the validation text, in lines of 32 characters or more, is also in the"):
        parts()


def test_a_folder_without_a_validation_part_is_held_out_of_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(LONG), encoding="utf-8")
    args = CausalLMArguments(dataset=str(tmp_path), vocab_size=300, leakage="allow", sample_by="line")
    data = TASK.read(args, folder=tmp_path / "run")
    assert {split: len(list(texts)) for split, texts in data.rows.items()} == {"train": 72, "validation": 8}


def test_a_large_validation_text_does_not_hide_a_leak_of_the_test_text(tmp_path):
    apart = [f"{line} held out, {i}" for i in range(10) for line in LONG]
    files = {"train": LONG, "validation": apart, "test": [*LONG[:2], *(line.upper() for line in LONG[:2])]}
    for split, lines in files.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"^dataset=\S+: 50% of the test text, in lines"):
        TASK.read(CausalLMArguments(dataset=str(tmp_path), vocab_size=300), folder=tmp_path / "run")
    named = {f"{split}_file": [str(tmp_path / f"{split}.txt")] for split in files}
    with pytest.raises(UserError, match=r"^train_file=\S+train\.txt, validation_file=\S+validation\.txt, test_file="):
        TASK.read(CausalLMArguments(**named, vocab_size=300), folder=tmp_path / "run")


def test_a_plan_that_has_read_all_texts_of_a_large_file_estimates_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SAMPLE_CHARACTERS", 3000)
    rows = "".join(f"{line},{'x' * 500}\n" for line in LONG)
    (tmp_path / "train.csv").write_text(f"text,more\n{rows}", encoding="utf-8")
    (tmp_path / "validation.txt").write_text("\n".join(line.upper() for line in LONG), encoding="utf-8")
    data = TASK.read(CausalLMArguments(dataset=str(tmp_path), vocab_size=300), folder=tmp_path / "run", is_plan=True)
    assert (data.sampled_share, data.notes) == (1.0, [])


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    data = corpus(tmp_path, LONG, [line.upper() for line in LONG], tokenizer=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from '\S+nothing': .+; name one with tokenizer"):
        _ = data.tokenizer


def test_set_phrases_are_no_leak(tmp_path):
    """One short line, and one long line in two hundred."""
    phrase = "this sentence stands in many reports of the same kind"
    validation = [f"{line} held out, {i}" for i in range(5) for line in LONG]
    data = corpus(tmp_path, [*LONG, phrase, "Citizen:"], [*validation, phrase[:-1], phrase, "Citizen:"])
    assert data.notes == []


def test_a_plan_reads_the_beginning_of_a_large_corpus_or_the_tokens_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SAMPLE_CHARACTERS", 500)
    args = {"train": LONG, "validation": [line.upper() for line in LONG]}
    for split, lines in args.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")

    def planned():
        arguments = CausalLMArguments(dataset=str(tmp_path), vocab_size=300, context_length=8)
        data = TASK.read(arguments, folder=tmp_path / "run", is_plan=True)
        return data, data.bind(data.new_config("bm_rnn", SMALL))

    data, objective = planned()
    assert objective.sampled_share == pytest.approx(500 / (tmp_path / "train.txt").stat().st_size)
    assert objective.rows["train"].store.num_bytes == 500
    assert data.notes == [
        "the plan reads the first 0.0 MB of 0.0 MB of training text: vocabulary, steps and time are estimates"
    ]
    assert not (tmp_path / "run").exists()
    whole = TASK.read(
        CausalLMArguments(dataset=str(tmp_path), vocab_size=300, context_length=8), folder=tmp_path / "run"
    )
    tokens = whole.bind(whole.new_config("bm_rnn", SMALL)).rows["train"].store.num_tokens
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    data, objective = planned()
    assert (objective.sampled_share, objective.rows["train"].store.num_tokens, data.notes) == (1.0, tokens, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--carry_state", "true"], r"Trainer shuffles the rows; carry_state=True is for recipes/pretrain\.py"),
        (["--label_smoothing_factor", "0.1"], r"label_smoothing_factor=0\.1 has no effect on causal_lm"),
        (["--load_best_model_at_end", "true", "--metric_for_best_model", "f1"], "metric_for_best_model='f1' is not"),
    ],
)
def test_a_plan_of_fine_tuning_refuses_what_the_run_would(tmp_path, setting, message):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 20, encoding="utf-8")
    files = ["--task", "causal_lm", "--train_file", str(text), "--validation_file", str(text)]
    files += ["--leakage", "allow"]
    sizes = ["--vocab_size", "300", "--context_length", "8", "--model_type", "bm_rnn", "--hidden_size", "8"]
    with pytest.raises(ValueError, match=message):
        finetune.main([*files, *sizes, "--output_dir", str(tmp_path / "run"), "--dry_run", *setting])


def mixture(folder, **settings):
    """Two corpora of one-line documents: 30 lines under "body", and a folder with a validation part of its own."""
    rows = [{"body": f"page {i} of a book that nobody has read to its end"} for i in range(30)]
    (folder / "books.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "web").mkdir(exist_ok=True)
    (folder / "web" / "train.txt").write_text("\n".join(LONG), encoding="utf-8")
    (folder / "web" / "validation.txt").write_text("something else altogether", encoding="utf-8")
    books = {"path": str(folder / "books.jsonl"), "text_column": "body", "weight": 3}
    corpora = [json.dumps(one) for one in (books, {"path": str(folder / "web"), **settings.pop("web", {})})]
    sizes = {"vocab_size": 300, "context_length": 16, "sample_by": "line", **settings}
    return TASK.read(CausalLMArguments(corpora=corpora, **sizes), folder=folder / "run", seed=1)


def test_corpora_are_mixed_by_weights(tmp_path):
    data = mixture(tmp_path)
    assert len(list(data.rows["train"])) == 27 + 40
    held_out = list(data.rows["validation"])
    assert held_out[-1] == "something else altogether"  # a folder's own validation text
    assert len(held_out) == 3 + 1
    assert data.notes == [
        "books: there is no validation text: 3 of 30 documents are held out (validation_fraction=0.1, seed 1)"
    ]
    lines = []
    data.prepare(lines.append)
    objective = data.bind(data.new_config("bm_rnn", SMALL))
    books, web = objective.rows["train"].members
    assert [store.store.directory.name for store in (books, web)] == ["train.books", "train.web"]
    text = objective.tokenizer.decode(books.store.document(0))
    assert text.startswith("<|endoftext|>page ")
    batches = objective.train_batches(batch_size=4, seed=1)
    for step in range(30):
        places, _ = batches.places(step)
        assert (places < len(books)).sum() == 3
    assert batches.steps_per_epoch == (len(books) + len(web)) / 4
    assert "corpora" not in objective.data_record()
    assert objective.reading.shares(8)[0].startswith("books: weight 3, 75.00% of the rows, ")
    assert objective.reading.account(8) == {"epochs/books": 6 / len(books), "epochs/web": 2 / len(web)}
    assert [corpus["rows"] for corpus in objective.data_record()["corpora"]] == [6, 2]
    assert objective.data_record()["train"]["documents"] == 67
    shown = mixture_report(tmp_path / "run" / "corpus", context_length=16).splitlines()
    assert shown[0].startswith(f"mixture, in the first {len(books) + len(web)} rows of 16 tokens:")
    assert shown[1].startswith("  train.books: weight 3, 75.")
    assert mixture_report(tmp_path, context_length=16) == ""


def test_one_corpus_is_read_as_a_training_file_is(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(LONG), encoding="utf-8")

    def read(**source):
        data = TASK.read(
            CausalLMArguments(vocab_size=300, context_length=16, **source), folder=tmp_path / next(iter(source))
        )
        objective = data.bind(data.new_config("bm_rnn", SMALL))
        found = objective.train_batches(batch_size=3, seed=2)
        return type(found), data.notes, [found[step][0]["input_ids"].tolist() for step in range(9)]

    assert read(corpora=[json.dumps({"path": str(tmp_path / "a.txt"), "weight": 7})]) == read(
        train_file=[str(tmp_path / "a.txt")]
    )


def test_a_run_that_is_longer_than_its_corpora_is_refused(tmp_path):
    data = mixture(tmp_path, web={"repeat": 2})
    objective = data.bind(data.new_config("bm_rnn", SMALL))
    assert objective.reading.shares(10**6)[1].endswith(
        f", 2 epochs of at most 2 of {len(objective.rows['train'].members[1])} rows"
    )
    one = json.dumps({"path": str(tmp_path / "web"), "repeat": 1})
    data = TASK.read(CausalLMArguments(corpora=[one], vocab_size=300, context_length=16), folder=tmp_path / "one")
    objective = data.bind(data.new_config("bm_rnn", SMALL))
    num_rows = len(objective.rows["train"])
    assert objective.reading.shares(num_rows)[0].startswith(
        "web: weight 1, 100.00% of the rows, 1 epochs of at most 1 of"
    )
    with pytest.raises(UserError, match=f"all are used up after {num_rows} rows"):
        objective.reading.shares(num_rows + 1)


def test_a_plan_reads_the_beginning_of_each_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SAMPLE_CHARACTERS", 600)
    data = mixture(tmp_path, tokenizer="char")
    whole = data.bind(data.new_config("bm_rnn", SMALL))
    planned = TASK.read(data.args, folder=tmp_path / "plan", seed=1, is_plan=True)
    objective = planned.bind(planned.new_config("bm_rnn", SMALL))
    assert sum(map(len, planned.rows["train"])) == 600
    shown = [line.rpartition("epochs of ")[2] for line in objective.reading.shares(8)]
    for line, rows in zip(shown, whole.rows["train"].members, strict=True):
        assert int(line.split(" ")[0]) == pytest.approx(len(rows), rel=0.3)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_file": ["a.txt"]},
            r"corpora and train_file=\['a.txt'\] both name the training text; leave one of them",
        ),
        ({"dataset": "a"}, "corpora and dataset=a both name the training text"),
        ({"carry_state": True}, "carry_state reads one text in its order; leave it out, or train on one corpus"),
    ],
)
def test_settings_that_contradict_corpora_are_refused(settings, message):
    items = ['{"path": "b.txt"}', '{"path": "c.txt"}']
    with pytest.raises(UserError, match=message):
        CausalLMArguments(corpora=items, **settings)


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    items = [json.dumps({"path": str(tmp_path / name)}) for name in ("a.txt", "b.txt")]
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"b\.txt' does not exist"):
        TASK.read(CausalLMArguments(corpora=items), folder=tmp_path / "run")


def test_fine_tuning_does_not_take_corpora(tmp_path):
    data = mixture(tmp_path)
    assert data.bind(data.new_config("bm_rnn", SMALL)).keeps_order
