"""Question answering: windows, the loss over all of them, the best answer, agreement, and a run of every recipe."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering

from bmtk.data.tables import read_table
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.answer_spans import log_probabilities, losses_of, span_scores
from bmtk.tasks.context_windows import span_of, token_types, trimmed
from bmtk.tasks.question_answering import TASK, QuestionAnsweringArguments
from bmtk.training.adapters import AdapterArguments, add_adapter
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
CONTEXT = "Ada lives in Rome . Bo lives in the old Oslo ."


def row(question="Where is Bo ?", context=CONTEXT, answers=(("old Oslo", 36),)):
    return {
        "question": question,
        "context": context,
        "answers": {"text": [text for text, _ in answers], "answer_start": [at for _, at in answers]},
    }


TRAIN = [row(), row("Where is Ada ?", answers=[("Rome", 13), ("in Rome", 10)])]
OTHERS = [row("Who lives in Rome ?", answers=[("Ada", 0)])]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [str(path)]


def read_data(tmp_path, train=TRAIN, validation=OTHERS, **settings):
    files = {"train_file": write(tmp_path / "train.jsonl", train)}
    files["validation_file"] = write(tmp_path / "validation.jsonl", validation)
    defaults = {"tokenizer": "uncased_word", "max_question_length": 5, "stride": 2}
    return TASK.read(QuestionAnsweringArguments(**{**files, **defaults, **settings}))


def bound(data, **fields):
    sizes = {"max_position_embeddings": 32, "is_causal": False}
    return data.bind(BmTransformerConfig(**{**data.config_fields, **sizes, **fields}))


def words(data, ids):
    return " ".join(data.tokenizer.convert_ids_to_tokens(ids))


def test_a_text_is_read_after_its_question_in_windows_that_overlap(tmp_path):
    objective = bound(read_data(tmp_path), max_position_embeddings=12)
    found = objective.rows["train"][0]
    assert [words(objective, ids) for ids in found["input_ids"]] == [
        "where is bo ? <|endoftext|> ada lives in rome . bo lives",
        "where is bo ? <|endoftext|> bo lives in the old oslo .",
    ]
    starts, ends = found["char_starts"], found["char_ends"]
    assert [
        CONTEXT[a:b] for a, b in zip(starts[1], ends[1], strict=True) if a >= 0
    ] == "Bo lives in the old Oslo .".split()
    assert starts[0][:5] == [-1] * 5
    assert found["spans"] == [[1, 9, 10]]  # in the second window only
    assert found["length"] == 24
    assert "2 of 2 train texts are read in several windows" in objective.notes
    assert objective.data_record()["train"] == {"rows": 2, "tokens": 48}
    again = objective.rows["train"][1]["spans"]
    assert again == [[0, 7, 8], [0, 8, 8]]  # both answers


def test_a_long_question_is_cut_and_an_answer_may_be_in_two_windows(tmp_path):
    data = read_data(tmp_path, [row("bo " * 50, answers=[("Bo lives", 20)])], max_question_length=3, stride=5)
    found = bound(data, max_position_embeddings=11).rows["train"][0]
    assert words(data, found["input_ids"][0]) == "bo bo bo <|endoftext|> ada lives in rome . bo lives"
    assert found["spans"][:2] == [[0, 9, 10], [1, 7, 8]]


def test_a_tokenizer_that_cuts_on_the_left_reads_the_same_windows(tmp_path):
    question = row("Where is Bo now and where was he before ?")
    right = bound(read_data(tmp_path, [question]), max_position_embeddings=12)
    right.tokenizer.truncation_side = "left"
    right.tokenizer.save_pretrained(tmp_path / "left")
    left = bound(read_data(tmp_path, [question], tokenizer=str(tmp_path / "left")), max_position_embeddings=12)
    assert left.rows["train"][0] == right.rows["train"][0]


def test_questions_about_a_text_are_held_out_together(tmp_path):
    rows = [{**row(), "context": f"{row()['context']} {number // 3}"} for number in range(12)]
    write(tmp_path / "train.jsonl", rows)
    args = {"train_file": [str(tmp_path / "train.jsonl")], "tokenizer": "uncased_word", "validation_fraction": 0.25}
    data = TASK.read(QuestionAnsweringArguments(**args, leakage="allow"))
    trained, held_out = (set(data.rows[split]["context"]) for split in ("train", "validation"))
    assert (len(trained), len(held_out), trained & held_out) == (3, 1, set())
    with pytest.raises(ValueError, match="context_column='c' is not in the train data"):
        TASK.read(QuestionAnsweringArguments(**args, context_column="c"))


def test_what_the_question_has_is_marked_by_how_much_of_it_in_a_row():
    ids, sequence_ids = [5, 6, 8, 0, 6, 7, 5, 6, 5, 6, 8, 0], [0] * 3 + [None] + [1] * 7 + [None]
    marks = {
        0: [0, 0, 0, 0, 0, 0, 0], 1: [0, 0, 0, 0, 0, 0, 0], 2: [1, 1, 1, 1, 1, 1, 1], 3: [2, 1, 2, 2, 2, 2, 2],
        4: [2, 1, 3, 3, 3, 3, 3], 5: [2, 1, 3, 3, 4, 4, 4], 9: [2, 1, 3, 3, 4, 4, 4],
    }  # fmt: skip
    for num_types, expected in marks.items():
        assert token_types(ids, sequence_ids, num_types=num_types) == [0] * 4 + expected + [0]


def test_what_occurs_in_the_question_is_marked_where_the_model_knows_three_kinds(tmp_path):
    data = read_data(tmp_path)
    for fields, largest in (({"type_vocab_size": 3}, 2), ({"type_vocab_size": 2}, 1)):
        objective = bound(data, **fields)
        batch = objective.collator()([objective.rows["train"][0]])
        assert batch["token_type_ids"].max() == largest
    objective = bound(data)
    assert "token_type_ids" not in objective.collator()([objective.rows["train"][0]])


def test_tokens_are_found_by_their_characters():
    assert trimmed("an answer ", 2, 10) == (3, 9)
    assert trimmed("a  b", 1, 3) == (1, 3)
    assert trimmed("ab", -1, -1) == (-1, -1)
    starts, ends = [-1, 0, 3, 8], [-1, 2, 7, 10]
    assert span_of(3, 10, starts, ends) == (2, 3)
    assert span_of(4, 9, starts, ends) == (2, 3)  # both tokens reach beyond the answer
    assert span_of(4, 7, starts, ends) == (2, 2)
    assert span_of(11, 12, starts, ends) is None


def test_answers_that_are_not_where_they_should_be_are_not_learned(tmp_path):
    wrong = row("Where is Ada ?", answers=[("Rome", 14)])
    half = row("Where is Ada now ?", answers=[("Rome", 14), ("Rome", 13)])
    data = read_data(tmp_path, [*TRAIN, wrong, half, row("no ?", answers=[])], [row("Where ?", answers=[("Rome", 1)])])
    assert len(data.rows["train"]) == 3
    assert data.notes[:3] == [
        "1 of 5 train questions have no answer: left out",
        "2 of 6 train answers are not in the text at their answer_start: nothing is learned from them",
        "1 of 1 validation answers are not in the text at their answer_start: nothing is learned from them",
    ]
    objective = bound(data)
    batch = objective.collator()([objective.rows["validation"][0]])
    assert objective.num_items(batch) == 0
    assert batch["labels"].shape == (0, 4)


def test_a_nested_file_of_squad_gives_the_same_rows_as_a_flat_one(tmp_path):
    def nested(rows):
        """As SQuAD 2.0 has it: answers are a list, and questions without one have other keys."""
        questions = [
            {"id": str(place), "question": one["question"], "is_impossible": not one["answers"]["text"]}
            | {
                "answers": [
                    {"text": text, "answer_start": start}
                    for text, start in zip(one["answers"]["text"], one["answers"]["answer_start"], strict=True)
                ]
            }
            | ({} if one["answers"]["text"] else {"plausible_answers": [{"text": "Oslo", "answer_start": 40}]})
            for place, one in enumerate(rows)
        ]
        return {"version": "v2.0", "data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}

    rows = [*TRAIN, row("Who is rich ?", answers=[])]
    flat = read_data(tmp_path, rows)
    files = {}
    for name, content in (("train", rows), ("validation", OTHERS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(nested(content)), encoding="utf-8")
        files[f"{name}_file"] = [str(tmp_path / f"{name}.json")]
    data = TASK.read(QuestionAnsweringArguments(**files, tokenizer="uncased_word"))
    for split in ("train", "validation"):
        for column in ("question", "context", "texts", "starts"):
            assert list(data.rows[split][column]) == list(flat.rows[split][column])
    assert data.notes[0] == "train: a nested file as SQuAD's own: 3 questions"
    assert "1 of 3 train questions have no answer: left out" in data.notes
    asked = data.readable_rows(read_table([tmp_path / "train.json"]), "input")
    assert data.read_rows(asked, "input", labelled=False)["question"] == [one["question"] for one in rows]


def test_starts_are_characters_and_those_of_javascript_and_of_bytes_are_found(tmp_path):
    context = "👩‍👩‍👧 été שלום 🇩🇪 Bo lives in Oslo 🚢 ."
    start = context.index("Oslo")
    units = {
        "characters": start,
        "UTF-16 units": len(context[:start].encode("utf-16-le")) // 2,
        "bytes": len(context[:start].encode()),
    }
    assert len(set(units.values())) == 3
    for name, at in units.items():
        data = read_data(tmp_path, [row(context=context, answers=[("Oslo", at)])])
        assert list(data.rows["train"]["starts"]) == [[start]]
        noted = [note for note in data.notes if "answer_start" in note]
        assert noted == (
            [f"1 of 1 train answers are where answer_start counts {name}, not characters: read so"]
            if name != "characters"
            else []
        )


def outputs_for(batch, seed=0):
    draw = torch.Generator().manual_seed(seed)
    size = batch["input_ids"].shape
    return {name: torch.randn(size, generator=draw) for name in ("start_logits", "end_logits")}


def test_with_one_answer_in_one_window_the_loss_is_that_of_the_models(tmp_path):
    objective = bound(read_data(tmp_path, TRAIN[:1]))
    batch = objective.collator()([objective.rows["train"][0]])
    outputs = outputs_for(batch)
    is_text = batch["char_starts"] >= 0
    start, end = (outputs[name].masked_fill(~is_text, -1e30) for name in ("start_logits", "end_logits"))
    *_, first, last = batch["labels"][0]
    expected = (F.cross_entropy(start, first[None]) + F.cross_entropy(end, last[None])) / 2
    assert torch.allclose(objective.criterion(outputs, batch), expected)


def test_all_windows_of_a_question_compete_and_all_answers_are_right(tmp_path):
    objective = bound(read_data(tmp_path), max_position_embeddings=12)
    rows = [objective.rows["train"][number] for number in (1, 0)]
    batch = objective.collator()(rows)
    outputs = outputs_for(batch)
    starts, ends = log_probabilities(outputs, batch)
    assert batch["question_of"].tolist() == [0, 0, 1, 1]
    for question in (0, 1):
        assert starts[batch["question_of"] == question].exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert starts[:, :5].eq(-torch.inf).all()  # the question is no answer
    right = sum((starts[0, first] + ends[0, last]).exp() for first, last in ((7, 8), (8, 8)))
    assert losses_of(starts, ends, batch)[0].item() == pytest.approx(-right.log().item() / 2, rel=1e-5)


def test_the_loss_is_a_sum_over_questions_whatever_the_batches(tmp_path):
    objective = bound(read_data(tmp_path), max_position_embeddings=12)
    rows, collate = list(objective.rows["train"]), objective.collator()
    whole, parts = collate(rows), [collate([one]) for one in rows]
    outputs, loss, window = outputs_for(whole), 0.0, 0
    for part in parts:
        count, width = part["input_ids"].shape
        own = {name: logits[window : window + count, :width] for name, logits in outputs.items()}
        loss, window = loss + objective.criterion(own, part), window + count
    assert torch.allclose(loss, objective.criterion(outputs, whole))
    assert (objective.num_items(whole), [objective.num_items(part) for part in parts]) == (2, [1, 1])
    assert set(objective.inputs_of(whole)) == {"input_ids", "attention_mask"}


def test_scores_of_spans_are_those_of_every_pair():
    starts, ends = torch.randn(2, 5), torch.randn(2, 5)
    scores = span_scores(starts, ends, 3)
    for window, start, more in itertools.product(range(2), range(5), range(3)):
        expected = starts[window, start] + ends[window, start + more] if start + more < 5 else -torch.inf
        assert scores[window, start, more] == expected


class Fixed(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids, attention_mask):
        return self.outputs


def test_the_best_answer_is_that_of_all_windows_by_brute_force(tmp_path):
    objective = bound(read_data(tmp_path, max_answer_length=3), max_position_embeddings=12)
    batch = objective.collator()(list(objective.rows["train"]))
    for seed in range(20):
        outputs = outputs_for(batch, seed)
        predictions = objective.scorer.predict(Fixed(outputs), batch)
        starts, ends = (logits.double() for logits in log_probabilities(outputs, batch))
        for question, prediction in enumerate(predictions):
            best = {}
            for window in (batch["question_of"] == question).nonzero().flatten().tolist():
                for start, end in itertools.product(range(5, 12), range(5, 12)):
                    if start <= end < start + 3 and batch["char_starts"][window, [start, end]].min() >= 0:
                        span = (batch["char_starts"][window, start].item(), batch["char_ends"][window, end].item())
                        score = (starts[window, start] + ends[window, end]).exp().item()
                        best[span] = max(score, best.get(span, 0))
            expected = sorted(best, key=best.get, reverse=True)[:3]
            assert [(answer["start"], answer["end"]) for answer in prediction["answers"]] == expected
            assert prediction["answers"][0]["score"] == pytest.approx(best[expected[0]], rel=1e-4)
            assert prediction["answers"][0]["text"] == CONTEXT[slice(*expected[0])]


def test_predictions_are_scored_described_and_shown(tmp_path):
    objective = bound(read_data(tmp_path))
    scorer, rows = objective.scorer, objective.rows["train"]
    answers = [("Oslo", 40, 44), ("in Rome", 10, 17)]
    predictions = [
        {"answers": [{"text": text, "start": a, "end": b, "score": 0.5}], "loss": 1.0, "items": 1}
        for text, a, b in answers
    ]
    metrics = scorer.score(predictions, rows)
    assert metrics == {"loss": 1.0, "exact_match": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2)}
    # "bo lives in old oslo" for "old oslo", and "ada lives in rome" for "in rome"
    f1 = pytest.approx((2 * 2 / (5 + 2) + 2 * 2 / (4 + 2)) / 2)
    assert scorer.baselines(predictions, rows) == {"best_sentence_exact_match": 0.0, "best_sentence_f1": f1}
    assert scorer.describe(predictions[0]) == {
        "prediction": "Oslo",
        "score": 0.5,
        "start": 40,
        "end": 44,
        "others": [],
    }
    assert scorer.samples(predictions, rows, count=1) == [
        {"prompt": "Where is Bo ?", "text": " -> Oslo (labelled old Oslo)"},
        {"prompt": "Where is Ada ?", "text": " -> in Rome"},
    ]
    assert "<svg" in scorer.figures(predictions, rows)[0]["svg"]


def test_chinese_texts_are_scored_by_characters_by_default(tmp_path):
    chinese = [
        row("谁住在罗马?", "艾达住在罗马。", [("艾达", 0)]),
        row("艾达住在哪?", "艾达住在罗马。", [("罗马", 4)]),
    ]
    assert read_data(tmp_path, chinese[:1], chinese[1:]).scored_by == "characters"
    assert read_data(tmp_path, chinese[:1], chinese[1:], scored_by="words").scored_by == "words"


def test_an_empty_text_has_an_empty_answer(tmp_path):
    objective = bound(read_data(tmp_path))
    rows = objective.encode_inputs(
        Dataset.from_dict({"question": ["Where ?", "Where is Bo ?"], "context": ["", CONTEXT]})
    )
    batch = objective.collator()(list(rows))
    assert not torch.stack(log_probabilities(outputs_for(batch), batch)).isnan().any()
    empty, full = objective.scorer.predict(Fixed(outputs_for(batch)), batch)
    assert objective.scorer.describe(empty) == {"prediction": "", "score": 0.0, "start": 0, "end": 0, "others": []}
    assert full["answers"][0]["text"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"question_column": "q"},
            r"question_column='q' is not in the train data; its columns are question, context,",
        ),
        ({"context_column": "c"}, r"context_column='c' is not in the train data"),
        ({"answers_column": "a"}, r"answers_column='a' is not in the train data"),
        (
            {"train": [{**row(), "answers": {"text": ["x"], "answer_start": []}}]},
            r"answers_column='answers' of train row 1 holds .*; it needs \{\"text\"",
        ),
        ({"train": [row(answers=[])]}, r"answers_column='answers' of the train data holds no answer at all"),
        ({"train": [row(answers=[("Rome", 14)])]}, r"none of the 1 train rows has an answer that is in its text"),
        ({"stride": 30}, r"max_length=32 leaves 26 tokens of a text beside a question of max_question_length=5, but"),
        ({"stride": -1}, r"stride=-1 must be at least 0 tokens"),
        ({"n_best": 0}, r"n_best=0 must be at least 1"),
        ({"scored_by": "sentences"}, r"scored_by='sentences' is unknown; choose one of words, characters"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        bound(read_data(tmp_path, **settings))


def test_a_mark_between_question_and_text_is_saved_with_the_tokenizer(tmp_path):
    data = read_data(tmp_path)
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("bo", "rome")["input_ids"]
    assert words(data, ids) == "bo <|endoftext|> rome"
    assert data.tokenizer("bo")["input_ids"] == ids[:1]


def test_the_gradient_does_not_depend_on_accumulation(tmp_path):
    data = read_data(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(data.tokenizer), pad_token_id=0, max_position_embeddings=12, **sizes)
    objective = data.bind(config)
    model, rows = BertForQuestionAnswering(config).eval(), list(objective.rows["train"])
    gradients = []
    for batches in ([rows], [rows[:1], rows[1:]]):
        model.zero_grad()
        for part in batches:
            batch = objective.collator()(part)
            (objective.criterion(model(**objective.inputs_of(batch)), batch) / len(rows)).backward()
        gradients.append(model.qa_outputs.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


FAMILIES = {
    "bm_rnn": BmRnnConfig(cell_type="gru", is_causal=False, hidden_size=32, num_hidden_layers=2),
    "bm_cnn": BmCnnConfig(input_type="tokens", is_causal=False, hidden_size=32, num_hidden_layers=4),
    "bm_transformer": BmTransformerConfig(is_causal=False, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
}


@pytest.mark.trains
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_finds_what_the_question_asks_for_in_one_and_the_same_text(tmp_path, family):
    """Without token types: only the mark between them separates question and text."""
    asked = {"Where is Bo ?": ("old Oslo", 36), "Where is Ada ?": ("Rome", 13), "Who is in Rome ?": ("Ada", 0)}
    data = read_data(tmp_path, [row(question, answers=[answer]) for question, answer in asked.items()])
    fields = {**FAMILIES[family].to_diff_dict(), **data.config_fields, "initializer_range": 0.1}
    config = type(FAMILIES[family])(**fields)
    objective = data.bind(config)
    model = AutoModelForQuestionAnswering.from_config(config)
    rows, batch = objective.rows["train"], objective.collator()(list(objective.rows["train"]))
    assert "token_type_ids" not in batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        objective.criterion(model(**objective.inputs_of(batch)), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        predictions = objective.scorer.predict(model.eval(), batch)
        assert objective.scorer.score(predictions, rows)["exact_match"] == 1.0


def test_an_adapter_reads_the_kinds_of_tokens(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    objective = bound(read_data(tmp_path), type_vocab_size=3, **sizes)
    batch = objective.collator()(list(objective.rows["train"]))
    model = AutoModelForQuestionAnswering.from_config(objective.config).eval()
    with torch.no_grad():
        before = model(**objective.inputs_of(batch)).start_logits
        plain = model(batch["input_ids"], batch["attention_mask"]).start_logits
        adapted = add_adapter(model, AdapterArguments(adapter="lora"), task_type=TASK.peft_task_type).eval()
        after = adapted(**objective.inputs_of(batch)).start_logits  # a new adapter adds nothing
    assert not torch.allclose(before, plain)
    assert torch.allclose(before, after)


def test_a_plan_refuses_the_smoothing_that_the_loss_would_refuse(tmp_path):
    argv = ["--task", "question_answering", "--train_file", *write(tmp_path / "train.jsonl", TRAIN)]
    argv += ["--validation_file", *write(tmp_path / "validation.jsonl", OTHERS), "--tokenizer", "uncased_word"]
    argv += ["--max_question_length", "5", "--stride", "2", "--model_type", "bm_rnn", "--hidden_size", "8"]
    with pytest.raises(ValueError, match="label_smoothing_factor has no meaning where several answers may be right"):
        finetune.main([*argv, "--output_dir", str(tmp_path / "run"), "--dry_run", "--label_smoothing_factor", "0.1"])


@pytest.mark.trains
def test_the_smoke_run_learns_and_every_recipe_reads_it(tmp_path, monkeypatch, capsys, seed_argv):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    config = "recipes/configs/question_answering/smoke.yaml"
    finetune.main(["--config", config, "--output_dir", str(folder), "--dry_run"])
    assert "tokens per step" in capsys.readouterr().out
    finetune.main(["--config", config, "--output_dir", str(folder), "--disable_tqdm", "true", *seed_argv])
    assert f"recipes/predict.py --model {folder}" in capsys.readouterr().out
    metrics = json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["test/exact_match"] > 0.8
    evaluate.main(["--model", str(folder), "--batch_size", "7"])
    again = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert again["test/exact_match"] == metrics["test/exact_match"]
    text = "The coat of Emil is in the hall. The lamp of Ada lies in the blue box."
    write(tmp_path / "rows.jsonl", [{"question": "Where is the lamp of Ada?", "context": text}])
    predict.main(["--model", str(folder), "--input", f"{tmp_path}/rows.jsonl", "--output", f"{tmp_path}/p.jsonl"])
    line = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8"))
    assert line["prediction"] == "blue box" == text[line["start"] : line["end"]]
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer("Where is the lamp of Ada?", text, return_tensors="pt")
    ids = encoded["input_ids"][0].tolist()
    is_text = torch.tensor([sequence == 1 for sequence in encoded.sequence_ids(0)])
    found = model(**encoded, token_type_ids=torch.tensor([token_types(ids, encoded.sequence_ids(0), num_types=3)]))
    start, end = (
        logits[0].where(is_text, -torch.inf).argmax().item() for logits in (found.start_logits, found.end_logits)
    )
    assert tokenizer.decode(ids[start : end + 1]) == "blue box"
    assert np.isfinite(metrics["test/loss"])
