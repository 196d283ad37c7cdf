"""Extractive question answering: the part of a text that answers a question.  Exact match and F1 over all questions.

A row is a question.  Its text is read in windows that overlap, each after the question; all windows of a question are
in one batch, and compete in one softmax (Clark & Gardner 2018, arXiv:1710.10723, section 3.3).  So the answer is the
best of all windows by the same scores that were trained.  F windows, Q questions, L positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from matplotlib.figure import Figure
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from bmtk.data.tables import check_column
from bmtk.metrics.answers import agreement, is_chinese
from bmtk.settings import setting

from .figures import as_svg
from .task import DataArguments, Prediction, mean_loss, spread_and_worst
from .texts import TextArguments, TextTask, padded

SCORED_BY = ("words", "characters")
NO_CHARACTER = -1  # where a token is not of the text
OVERLAPPING = 4  # copies of one answer that windows may hold, at most
LENGTHS = {"1": 1, "2": 2, "3-5": 5, "6-10": 10, "more": np.inf}  # of an answer, for the figure


@dataclass
class QuestionAnsweringArguments(TextArguments, DataArguments):
    """Which questions and texts, and how long texts are read."""

    _argument_group_name = "data of question_answering"

    question_column: str = setting("question", "column of the question")
    context_column: str = setting("context", "column of the text that holds the answer")
    answers_column: str = setting("answers", 'column of the answers: {"text": [...], "answer_start": [...]}')
    max_question_length: int = setting(64, "tokens read of a question")
    stride: int = setting(64, "tokens of a text that two windows share, for texts longer than max_length")
    max_answer_length: int = setting(30, "tokens of a predicted answer, at most")
    n_best: int = setting(3, "answers that a prediction holds, the best first")
    scored_by: str | None = setting(
        None, "words (SQuAD) or characters (CMRC 2018); default: by the script of the texts"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_lengths()
        for name in ("max_question_length", "max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.stride < 0:
            raise ValueError(f"stride={self.stride} must be at least 0 tokens")
        if self.scored_by not in (None, *SCORED_BY):
            raise ValueError(f"scored_by={self.scored_by!r} is unknown; choose one of {', '.join(SCORED_BY)}")


class QuestionAnswering(TextTask):
    """Questions, texts, and where the answers are in them."""

    name = "question_answering"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "question-answering",
        "auto_class": "AutoModelForQuestionAnswering",
        "noun": "question answerer",
        "limits": "It always cuts an answer out of the text it is given, even where the text holds none. "
        "Expect lower accuracy on text that differs from its training data.",
    }
    arguments = QuestionAnsweringArguments
    auto_class = AutoModelForQuestionAnswering
    peft_task_type = None  # peft's own class for this task takes token_type_ids and does not pass them on
    metrics = ("loss", "exact_match", "f1")
    main_metric = "f1"
    inputs = ("question", "context")

    @classmethod
    def incomparable(cls, args: QuestionAnsweringArguments, metric: str) -> dict[str, str]:
        return {"answers_column": "decides what the right answers are", "scored_by": "decides what F1 is counted in"}

    # ------------------------------------------------------------------------------------------------ rows

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Columns "question" and "context"; "texts" and "starts" of the answers, which rows without any lack."""
        columns = {name: getattr(self.args, f"{name}_column") for name in ("question", "context")}
        for name, column in columns.items():
            check_column(table, column, option=f"{name}_column", where=where)
        found = {name: ["" if x is None else str(x) for x in table[column]] for name, column in columns.items()}
        if not labelled:
            return Dataset.from_dict(found)
        check_column(table, self.args.answers_column, option="answers_column", where=where)
        answers = [
            self._answers(value, f"{where} row {row}") for row, value in enumerate(table[self.args.answers_column], 1)
        ]
        found |= {
            name: [[answer[place] for answer in of] for of in answers]
            for place, name in enumerate(("texts", "starts"))
        }
        kept = [row for row, of in enumerate(answers) if of]
        if not kept:
            raise ValueError(f"answers_column={self.args.answers_column!r} of the {where} data holds no answer at all")
        if len(kept) < len(answers):
            self.notes.append(
                f"{len(answers) - len(kept):,} of {len(answers):,} {where} questions have no answer: left out"
            )
        return self._located(Dataset.from_dict(found).select(kept), where)

    def _answers(self, value: object, where: str) -> list[tuple[str, int]]:
        """(text, first character) of each answer; written as a dictionary of lists, or a list of dictionaries."""
        try:
            if isinstance(value, dict):
                return [
                    (str(text), int(start)) for text, start in zip(value["text"], value["answer_start"], strict=True)
                ]
            return [(str(answer["text"]), int(answer["answer_start"])) for answer in value or []]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"answers_column={self.args.answers_column!r} of {where} holds {str(value)[:80]!r}; it needs "
                '{"text": [...], "answer_start": [...]}, lists of one length'
            ) from error

    def _located(self, rows: Dataset, where: str) -> Dataset:
        """Make the start of answers that stand elsewhere NO_CHARACTER; training rows need another answer then."""

        def checked(row: dict) -> dict:
            places = zip(row["texts"], row["starts"], strict=True)
            is_there = [at >= 0 and text != "" and row["context"].startswith(text, at) for text, at in places]
            return {
                "starts": [at if there else NO_CHARACTER for at, there in zip(row["starts"], is_there, strict=True)]
            }

        rows = rows.map(checked)
        starts = [at for of in rows["starts"] for at in of]
        if count := starts.count(NO_CHARACTER):
            answers = f"{count:,} of {len(starts):,} {where} answers"
            self.notes.append(f"{answers} are not in the text at their answer_start: nothing is learned from them")
        if where != "train":
            return rows
        kept = [row for row, found in enumerate(rows["starts"]) if max(found) >= 0]
        if not kept:
            raise ValueError(f"none of the {len(rows):,} train rows has an answer that is in its text at answer_start")
        return rows.select(kept)

    @property
    def group_option(self) -> str:
        """The text, unless told otherwise: who has learned from one question about it has read it for the others."""
        return "group_column" if self.args.group_column else "context_column"

    def training_texts(self) -> list[str]:
        rows = self.rows["train"]
        return [*dict.fromkeys(rows["context"]), *rows["question"]]

    def prepare(self) -> None:
        """Make the tokenizer, and see that it puts something between a question and its text."""
        super().prepare()
        tokenizer = self.processor
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot say where in a text a token is; question_answering needs a fast "
                "tokenizer"
            )
        tokenizer.truncation_side = "right"  # a question that is too long loses its end; of a text nothing is lost
        if not tokenizer.num_special_tokens_to_add(pair=True):
            mark = tokenizer.eos_token or tokenizer.pad_token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="$A", pair=f"$A:0 {mark}:0 $B:1", special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark))]
            )

    def configure(self, config, **options) -> None:
        """Also decide what `token_type_ids` say, by how many kinds of tokens the model knows."""
        self.num_kinds = getattr(config, "type_vocab_size", 0) or 0
        super().configure(config, **options)
        references = [text for rows in self.rows.values() for text in rows["context"][:100]]
        self.scored_by = self.args.scored_by or SCORED_BY[is_chinese(references)]

    # ------------------------------------------------------------------------------------------------ windows

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """Add the windows of each question: tokens, their "firsts" and "lasts" (characters), "spans" of answers."""
        room = self.longest - self.args.max_question_length - self.processor.num_special_tokens_to_add(pair=True)
        if room <= self.args.stride:
            raise ValueError(
                f"max_length={self.longest} leaves {room} tokens of a text beside a question of "
                f"max_question_length={self.args.max_question_length}, but windows share stride={self.args.stride}; "
                "lower one of the two"
            )
        lists = {name: List(List(Value("int32"))) for name in ("input_ids", "kinds", "firsts", "lasts", "spans")}
        features = Features({**rows.features, **lists, "length": Value("int64")})
        rows = rows.map(self._windows, batched=True, batch_size=200, features=features)
        several = sum(len(windows) > 1 for windows in rows["input_ids"])
        if several:
            self.notes.append(f"{several:,} of {len(rows):,} {where} texts are read in several windows")
        return rows

    def _windows(self, batch: dict[str, list]) -> dict[str, list]:
        encoded = self.processor(
            self._shortened(batch["question"]),
            batch["context"],
            truncation="only_second",
            max_length=self.longest,
            stride=self.args.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found = {name: [[] for _ in batch["question"]] for name in ("input_ids", "kinds", "firsts", "lasts", "spans")}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            ids, owners = encoded["input_ids"][window], encoded.sequence_ids(window)
            offsets = [
                span if owner == 1 else (NO_CHARACTER,) * 2
                for span, owner in zip(encoded["offset_mapping"][window], owners, strict=True)
            ]
            firsts, lasts = map(list, zip(*(trimmed(batch["context"][row], *span) for span in offsets), strict=True))
            answers = zip(batch["starts"][row], batch["texts"][row], strict=True) if "starts" in batch else ()
            ends = {(at, at + len(text)) for at, text in answers if at != NO_CHARACTER}
            spans = [span for start, end in sorted(ends) if (span := span_of(start, end, firsts, lasts))]
            found["spans"][row] += [[len(found["input_ids"][row]), *span] for span in dict.fromkeys(spans)]
            kinds = kinds_of(ids, owners, num_kinds=self.num_kinds)
            values = {"input_ids": ids, "kinds": kinds, "firsts": firsts, "lasts": lasts}
            for name, value in values.items():
                found[name][row].append(value)
        return {**found, "length": [sum(map(len, windows)) for windows in found["input_ids"]]}

    def _shortened(self, questions: list[str]) -> list[str]:
        """The questions as far as they are read."""
        encoded = self.processor(
            questions,
            add_special_tokens=False,
            truncation=True,
            max_length=self.args.max_question_length,
            return_offsets_mapping=True,
        )
        ends = [
            spans[-1][1] if len(spans) == self.args.max_question_length else None
            for spans in encoded["offset_mapping"]
        ]
        return [question[:end] for question, end in zip(questions, ends, strict=True)]

    def collator(self) -> "PadWindows":
        return PadWindows(self.processor, num_kinds=self.num_kinds)

    @staticmethod
    def inputs_of(batch: Mapping[str, object]) -> dict[str, torch.Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}

    @staticmethod
    def num_items(batch: Mapping[str, torch.Tensor]) -> int:
        """Questions with an answer that is in one of their windows."""
        return len(batch["labels"][:, 0].unique())

    def _num_tokens(self, split: str) -> int:
        return sum(self.rows[split]["length"])

    # ------------------------------------------------------------------------------------------------ results

    def criterion(self, outputs, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0) -> torch.Tensor:
        if label_smoothing:
            raise ValueError("label_smoothing_factor has no meaning where several answers may be right; leave it out")
        return losses_of(*log_probabilities(outputs, batch), batch)[batch["labels"][:, 0].unique()].sum()

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        """The best answers to each question: exact over all starts, lengths and windows."""
        starts, ends = log_probabilities(model(**self.inputs_of(batch)), batch)
        scores = span_scores(starts, ends, self.args.max_answer_length)  # (F, L, M)
        predictions = [{"answers": self._best(scores, question, batch)} for question in range(len(batch["contexts"]))]
        if "labels" in batch:
            losses = losses_of(starts, ends, batch).tolist()
            located = set(batch["labels"][:, 0].tolist())
            for question, prediction in enumerate(predictions):
                is_located = question in located
                prediction |= {"loss": losses[question] if is_located else 0.0, "items": int(is_located)}
        return predictions

    def _best(self, scores: torch.Tensor, question: int, batch: Mapping) -> list[dict[str, object]]:
        windows = (batch["question_of"] == question).nonzero().flatten()
        own = scores[windows]
        values, places = own.flatten().topk(min(self.args.n_best * OVERLAPPING, own.numel()))
        found = {}
        for value, place in zip(values.exp().tolist(), places.tolist(), strict=True):
            window, start, more = np.unravel_index(place, own.shape)
            first = int(batch["firsts"][windows[window], start])
            last = int(batch["lasts"][windows[window], min(start + more, own.shape[1] - 1)])
            if value > 0 and (first, last) not in found:
                found[first, last] = value
        best = list(found.items())[: self.args.n_best] or [((0, 0), 0.0)]
        context = batch["contexts"][question]
        return [{"text": context[a:b], "start": a, "end": b, "score": value} for (a, b), value in best]

    def score(self, predictions: Sequence[Prediction], rows) -> dict[str, float]:
        exact, f1 = self._agreement(predictions, rows).mean(0).tolist()
        return {"loss": mean_loss(predictions), "exact_match": exact, "f1": f1}

    def _agreement(self, predictions: Sequence[Prediction], rows) -> np.ndarray:
        """Exact match and F1 of each question (N, 2)."""
        pairs = zip(predictions, rows["texts"], strict=True)
        return np.array([agreement(p["answers"][0]["text"], texts, by=self.scored_by) for p, texts in pairs])

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """The best answer, its probability and its place in characters; then the next best."""
        best, *others = prediction["answers"]
        place = {"score": round(best["score"], 6), "start": best["start"], "end": best["end"]}
        return {"prediction": best["text"], **place, "others": [answer["text"] for answer in others]}

    def samples(self, predictions: Sequence[Prediction], rows, count: int = 4) -> list[dict[str, str]]:
        found = []
        for row in spread_and_worst(predictions, count):
            said, wanted = predictions[row]["answers"][0]["text"], rows[row]["texts"]
            labelled = "" if said in wanted else f" (labelled {' | '.join(dict.fromkeys(wanted))})"
            found.append({"prompt": rows[row]["question"], "text": f" -> {said}{labelled}"})
        return found

    def figures(self, predictions: Sequence[Prediction], rows) -> list[dict[str, str]]:
        """Mean exact match and F1 of questions by the length of their answer."""
        count = len if self.scored_by == "characters" else (lambda text: len(text.split()))
        groups = np.digitize([min(map(count, texts)) for texts in rows["texts"]], list(LENGTHS.values()), right=True)
        scores, found = self._agreement(predictions, rows), np.unique(groups)
        means = np.array([scores[groups == group].mean(0) for group in found])
        figure = Figure(figsize=(6, 3))
        axes, places = figure.add_subplot(), np.arange(len(found))
        for side, name, heights in zip((-0.2, 0.2), ("exact match", "F1"), means.T, strict=True):
            axes.bar(places + side, heights, 0.4, label=name)
        axes.set_xticks(places, [f"{list(LENGTHS)[group]}\n({(groups == group).sum():,})" for group in found])
        axes.set(xlabel=f"{self.scored_by} of the shortest answer (questions)", ylabel="mean", ylim=(0, 1))
        axes.legend()
        return [as_svg(figure, "Agreement by length of the answer")]

    def next_command(self, directory: Path) -> str:
        """transformers 5 has no pipeline for this task."""
        return f"accelerate launch recipes/predict.py --model {directory} --input QUESTIONS.jsonl"


def trimmed(text: str, first: int, last: int) -> tuple[int, int]:
    """The characters of a token without blanks at their ends, as several tokenizers count a blank to the next word.

    >>> trimmed("an answer", 2, 9)
    (3, 9)
    """
    piece = text[first:last] if first >= 0 else ""
    return (
        (first + len(piece) - len(piece.lstrip()), last - len(piece) + len(piece.rstrip()))
        if piece.strip()
        else (first, last)
    )


def span_of(start: int, end: int, firsts: Sequence[int], lasts: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last token of the characters [start, end); None if the window does not hold all of them.

    Where tokens reach beyond the answer, the fewest that hold it.
    """
    first = next((at for at, (a, b) in enumerate(zip(firsts, lasts, strict=True)) if 0 <= a <= start < b), None)
    last = next((at for at, (a, b) in enumerate(zip(firsts, lasts, strict=True)) if 0 <= a < end <= b), None)
    return None if first is None or last is None else (first, last)


def kinds_of(ids: Sequence[int], owners: Sequence[int | None], *, num_kinds: int) -> list[int]:
    """What each token is: 0 of the question, or between; 1 of the text; 1 + n of n that the question has in a row.

    The longest run counts; 1 + n is `num_kinds` - 1 at most.
    """
    question = [token for token, owner in zip(ids, owners, strict=True) if owner == 0]
    kinds = [int(owner == 1) for owner in owners]
    for size in range(1, num_kinds - 1):
        asked = {tuple(question[at : at + size]) for at in range(len(question) - size + 1)}
        for at in range(len(ids) - size + 1):
            if all(kinds[at : at + size]) and tuple(ids[at : at + size]) in asked:
                kinds[at : at + size] = [1 + size] * size
    return [min(kind, max(num_kinds - 1, 0)) for kind in kinds]


def log_probabilities(outputs, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each position (F, L) to be the start, and the end, of the answer; 1 in all over the windows of a question."""
    is_text, question_of = batch["firsts"] >= 0, batch["question_of"]
    found = []
    for name in ("start_logits", "end_logits"):
        logits = outputs[name].float().masked_fill(~is_text, -torch.inf)
        of_window = logits.logsumexp(-1)  # (F,)
        sums = [of_window[question_of == question].logsumexp(0) for question in range(len(batch["contexts"]))]
        sums = torch.stack(sums).clamp(min=torch.finfo(logits.dtype).min)  # of a text without tokens: not -inf
        found.append(logits - sums[question_of][:, None])
    return found[0], found[1]


def losses_of(starts: torch.Tensor, ends: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Half the negative log probability of all right answers of each question (Q,), in nats; inf where none is known.

    With one answer in one window it is the mean of the two cross-entropies, as models compute it themselves.
    """
    question, window, start, end = batch["labels"].T
    of_answers = starts[window, start] + ends[window, end]
    losses = [-of_answers[question == one].logsumexp(0) / 2 for one in range(len(batch["contexts"]))]
    return torch.stack(losses)


def span_scores(starts: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
    """(F, L, M): log probability of the answer from a position to m positions later."""
    length = starts.shape[1]
    padded_ends = torch.nn.functional.pad(ends, (0, longest - 1), value=-torch.inf)
    return starts[..., None] + torch.stack([padded_ends[:, more : more + length] for more in range(longest)], dim=-1)


@dataclass(frozen=True)
class PadWindows:
    """The windows of several questions in one batch.

    "question_of" (F,) is the question of each window; "firsts" and "lasts" (F, L) the characters of the text that a
    token stands for, [first, last), NO_CHARACTER for others; "labels" (S, 4) question, window, start and end of each
    right answer in tokens; "contexts" the texts.
    """

    tokenizer: PreTrainedTokenizerBase
    num_kinds: int

    def __call__(self, rows: list[dict]) -> dict[str, object]:
        windows = [window for row in rows for window in row["input_ids"]]
        batch = dict(self.tokenizer.pad({"input_ids": windows}, return_tensors="pt"))
        batch["attention_mask"] = padded([[1] * len(window) for window in windows], 0)
        if self.num_kinds:
            kinds = [window for row in rows for window in row["kinds"]]
            batch["token_type_ids"] = padded(kinds, 0)
        for name in ("firsts", "lasts"):
            batch[name] = padded([window for row in rows for window in row[name]], NO_CHARACTER)
        batch["question_of"] = torch.tensor([place for place, row in enumerate(rows) for _ in row["input_ids"]])
        batch["contexts"] = [row["context"] for row in rows]
        if "starts" in rows[0]:
            before = np.cumsum([0, *(len(row["input_ids"]) for row in rows)]).tolist()
            labels = [
                [place, before[place] + window, *span]
                for place, row in enumerate(rows)
                for window, *span in row["spans"]
            ]
            batch["labels"] = torch.tensor(labels, dtype=torch.long).view(-1, 4)
        return batch
