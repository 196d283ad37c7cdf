"""Extractive question answering: the part of a text that answers a question.  Exact match and F1 over all questions.

A row is a question.  Its text is read in windows that overlap, each after the question; all windows of a question are
in one batch, and compete in one softmax.  So the answer is the best of all windows by the same scores that were
trained.
"""

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig

from bmtk.data.columns import cells
from bmtk.data.squad import flattened, is_nested
from bmtk.data.tables import TextColumn, changed_rows, check_column, encoded_rows, text_rows
from bmtk.errors import UserError
from bmtk.metrics.answers import agreement, best_sentence, is_chinese
from bmtk.settings import fact, setting

from .answer_spans import best_answers, log_probabilities, losses_of, span_scores
from .context_windows import NO_CHARACTER, ContextWindows, PadWindows, separate_pairs
from .figures import as_svg, new_figure
from .scorer import Scorer, mean_loss, spread_and_worst
from .task import Criterion, Prediction, Task
from .task_data import DataArguments
from .texts import TextArguments, TextData, TextObjective

SCORED_BY = ("words", "characters")
CHARACTERS, NOWHERE = "characters", ""  # what answer_start counts, and of answers that are not where it says
ANSWERS = {"texts": List(Value("string")), "starts": List(Value("int64")), "units": List(Value("string"))}
LENGTHS = {"1": 1, "2": 2, "3-5": 5, "6-10": 10, "more": np.inf}  # of an answer, for the figure


@dataclass
class QuestionAnsweringArguments(TextArguments, DataArguments):
    """Which questions and texts, and how long texts are read."""

    _argument_group_name = "data of question_answering"

    question_column: str = fact("question", "column of the question")
    context_column: str = fact("context", "column of the text that holds the answer")
    answers_column: str = fact("answers", 'column of the answers: {"text": [...], "answer_start": [...]}')
    max_question_length: int = setting(64, "tokens read of a question")
    stride: int = setting(64, "tokens of a text that two windows share, for texts longer than max_length")
    max_answer_length: int = setting(30, "tokens of a predicted answer, at most")
    n_best: int = setting(3, "answers that a prediction holds, the best first")
    scored_by: str | None = fact(None, "words (SQuAD) or characters (CMRC 2018); default: by the script of the texts")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()
        for name in ("max_question_length", "max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.stride < 0:
            raise UserError(f"stride={self.stride} must be at least 0 tokens")
        if self.scored_by not in (None, *SCORED_BY):
            raise UserError(f"scored_by={self.scored_by!r} is unknown; choose one of {', '.join(SCORED_BY)}")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        return {
            **super().settings_that_change(metric),
            "answers_column": "decides what the right answers are",
            "scored_by": "decides what F1 is counted in",
        }


class QuestionAnsweringData(TextData):
    """Columns "question" and "context"; "texts" and "starts" of the answers, which rows without labels lack."""

    inputs = ("question", "context")

    def __init__(self, task: Task, args: QuestionAnsweringArguments, **reading: Any):
        super().__init__(task, args, **reading)
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} does not give the characters that a token stands for; "
                "question_answering needs a fast tokenizer"
            )
        separate_pairs(self.tokenizer)
        contexts = [text for rows in self.rows.values() for text in rows["context"][:100]]
        self.scored_by: str = args.scored_by or SCORED_BY[is_chinese(contexts)]

    @property
    def group_option(self) -> str:
        """By default the text: a model that was trained on one question about it has seen it for the others."""
        return "group_column" if self.args.group_column else "context_column"

    def readable_rows(self, table: Dataset, where: str) -> Dataset:
        """A file in SQuAD's nested form becomes rows."""
        if not is_nested(table):
            return table
        rows = flattened(
            table, {name: getattr(self.args, f"{name}_column") for name in ("question", "context", "answers")}
        )
        self.notes.append(f"{where}: a nested file as SQuAD's own: {len(rows):,} questions")
        return rows

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Questions without an answer are left out, but not of those to be predicted."""
        args = self.args
        columns = {name: TextColumn(getattr(args, f"{name}_column"), f"{name}_column") for name in self.inputs}
        if not labelled:
            return text_rows(table, columns, where=where)
        for column, option in (*(one[:2] for one in columns.values()), (args.answers_column, "answers_column")):
            check_column(table, column, option=option, where=where)
        reader = QuestionReader(columns, args.answers_column, where)
        read = changed_rows(table, reader, {**dict.fromkeys(self.inputs, Value("string")), **ANSWERS})
        counts = Counter(units for of_row in cells(read, "units") for units in of_row)
        rows = read.remove_columns("units")
        rows = rows.select([row for row, of_row in enumerate(cells(rows, "starts")) if of_row])
        if not len(rows):
            raise UserError(f"answers_column={args.answers_column!r} of the {where} data holds no answer at all")
        if len(rows) < len(read):
            self.notes.append(f"{len(read) - len(rows):,} of {len(read):,} {where} questions have no answer: left out")
        self._note_places(counts, where)
        return self._learnable(rows) if where == "train" else rows

    def training_texts(self) -> Iterator[str]:
        rows, seen = self.rows["train"], set()
        for text in cells(rows, "context"):
            mark = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if mark not in seen:
                seen.add(mark)
                yield text
        yield from cells(rows, "question")

    def _note_places(self, counts: Counter[str], where: str) -> None:
        """Note answers that are not at their character: how many there are of each way to count."""
        for units in sorted(set(counts) - {CHARACTERS, NOWHERE}):
            self.notes.append(
                f"{counts[units]:,} of {counts.total():,} {where} answers are where answer_start counts {units}, "
                "not characters: read so"
            )
        if counts[NOWHERE]:
            answers = f"{counts[NOWHERE]:,} of {counts.total():,} {where} answers"
            self.notes.append(f"{answers} are not in the text at their answer_start: nothing is learned from them")

    @staticmethod
    def _learnable(rows: Dataset) -> Dataset:
        """The rows with an answer that is in the text."""
        kept = [row for row, found in enumerate(cells(rows, "starts")) if max(found) >= 0]
        if not kept:
            raise UserError(f"none of the {len(rows):,} train rows has an answer that is in its text at answer_start")
        return rows.select(kept)


@dataclass(frozen=True)
class QuestionReader:
    """Some rows of a table, and their numbers, as texts, and the "texts", "starts" and "units" of their answers.

    The start of an answer that stands elsewhere is NO_CHARACTER.
    """

    columns: Mapping[str, TextColumn]
    answers_column: str
    where: str

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            name: column.texts(batch, rows, self.where) for name, column in self.columns.items()
        }
        found |= {name: [] for name in ANSWERS}
        for row, value, context in zip(rows, batch[self.answers_column], found["context"], strict=True):
            answers = self._answers(value, f"{self.where} row {row + 1}")
            places = [located(context, text, start) for text, start in answers]
            found["texts"].append([text for text, _ in answers])
            found["starts"].append([start for start, _ in places])
            found["units"].append([units for _, units in places])
        return found

    def _answers(self, value: Any, where: str) -> list[tuple[str, int]]:
        """(text, first character) of each answer; written as a dictionary of lists, or a list of dictionaries."""
        try:
            if isinstance(value, dict):
                texts, starts = value["text"] or [], value["answer_start"] or []
                return [(str(text), int(start)) for text, start in zip(texts, starts, strict=True)]
            return [(str(answer["text"]), int(answer["answer_start"])) for answer in value or []]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"answers_column={self.answers_column!r} of {where} holds {str(value)[:80]!r}; it needs "
                '{"text": [...], "answer_start": [...]}, lists of one length'
            ) from error


def located(context: str, text: str, start: int) -> tuple[int, str]:
    """The first character of an answer, NO_CHARACTER if it is not at `start`; and in what `start` is counted:
    JavaScript counts 2 for an emoji, others bytes.
    """
    if start < 0 or not text:
        return NO_CHARACTER, NOWHERE
    if context.startswith(text, start):
        return start, CHARACTERS
    if not context.isascii():
        for units, encoding, size in (("UTF-16 units", "utf-16-le", 2), ("bytes", "utf-8", 1)):
            before = context.encode(encoding, "surrogatepass")[: start * size].decode(encoding, "ignore")
            if context.startswith(before + text):
                return len(before), units
    return NO_CHARACTER, NOWHERE


class QuestionAnsweringObjective(TextObjective):
    """The windows of each question are added to its row; all of them are in one batch."""

    batch_can_be_cut = False  # several windows of a question, and labels that name them by number

    data: QuestionAnsweringData

    def __init__(self, data: QuestionAnsweringData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.num_types: int = getattr(config, "type_vocab_size", 0) or 0
        self.windows = ContextWindows(
            self.tokenizer,
            longest=self.longest,
            max_question_length=self.args.max_question_length,
            stride=self.args.stride,
            num_types=self.num_types,
        )

    def encode(self, rows: Dataset, where: str) -> Dataset:
        self.windows.check_room()
        features = self.windows.features(rows.features)
        rows = encoded_rows(rows, self.windows.encode, most=200, features=features)
        several = sum(len(windows) > 1 for windows in cells(rows, "input_ids"))
        if several:
            self.notes.append(f"{several:,} of {len(rows):,} {where} texts are read in several windows")
        return rows

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return PadWindows(self.tokenizer, num_types=self.num_types)

    def inputs_of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}

    def num_items(self, batch: Mapping[str, Any]) -> int:
        """Questions with an answer that is in one of their windows."""
        return len(batch["labels"][:, 0].unique())

    @property
    def criterion(self) -> Criterion:
        return self._criterion

    def _criterion(
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any], *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        if label_smoothing:
            raise UserError("label_smoothing_factor has no meaning where several answers may be right; leave it out")
        return losses_of(*log_probabilities(outputs, batch), batch)[batch["labels"][:, 0].unique()].sum()

    def next_command(self, directory: Path) -> str:
        """transformers 5 has no pipeline for this task."""
        return f"accelerate launch recipes/predict.py --model {shlex.quote(str(directory))} --input QUESTIONS.jsonl"

    def _num_tokens(self, split: str) -> int:
        return sum(cells(self.rows[split], "length"))


class QuestionAnsweringScorer(Scorer):
    """Exact match and F1 of the best answer to each question, over its reference answers."""

    objective: QuestionAnsweringObjective

    metrics = ("loss", "exact_match", "f1")

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """The best answers to each question: exact over all starts, lengths and windows."""
        args = self.objective.args
        starts, ends = log_probabilities(model(**self.objective.inputs_of(batch)), batch)
        scores = span_scores(starts, ends, args.max_answer_length)  # (F, L, M)
        questions = range(len(batch["contexts"]))
        predictions: list[Prediction] = [
            {"answers": best_answers(scores, question, batch, args.n_best)} for question in questions
        ]
        if "labels" in batch:
            losses = losses_of(starts, ends, batch).tolist()
            located = set(batch["labels"][:, 0].tolist())
            for question, prediction in enumerate(predictions):
                is_located = question in located
                prediction |= {"loss": losses[question] if is_located else 0.0, "items": int(is_located)}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: Dataset) -> dict[str, float]:
        exact, f1 = self._agreement(predictions, rows).mean(0).tolist()
        return {"loss": mean_loss(predictions), "exact_match": exact, "f1": f1}

    def baselines(self, predictions: Sequence[Prediction], rows: Dataset) -> dict[str, float]:
        """Agreement of the sentence of the text that has most units in common with the question."""
        by = self.objective.data.scored_by
        columns = zip(rows["question"], rows["context"], rows["texts"], strict=True)
        scores = [agreement(best_sentence(text, question, by=by), texts, by=by) for question, text, texts in columns]
        exact, f1 = np.mean(scores, axis=0).tolist()
        return {"best_sentence_exact_match": exact, "best_sentence_f1": f1}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """The best answer, its probability and its characters in the text; then the next best."""
        best, *others = prediction["answers"]
        position = {"score": round(best["score"], 6), "start": best["start"], "end": best["end"]}
        return {"prediction": best["text"], **position, "others": [answer["text"] for answer in others]}

    def samples(self, predictions: Sequence[Prediction], rows: Dataset, count: int = 4) -> list[dict[str, str]]:
        found = []
        for row in spread_and_worst(predictions, count):
            predicted, references = predictions[row]["answers"][0]["text"], rows[row]["texts"]
            labelled = "" if predicted in references else f" (labelled {' | '.join(dict.fromkeys(references))})"
            found.append({"prompt": rows[row]["question"], "text": f" -> {predicted}{labelled}"})
        return found

    def figures(self, predictions: Sequence[Prediction], rows: Dataset) -> list[dict[str, str]]:
        """Mean exact match and F1 of questions by the length of their answer."""
        scored_by = self.objective.data.scored_by
        count: Callable[[str], int] = len if scored_by == "characters" else (lambda text: len(text.split()))
        lengths = [min(map(count, texts)) for texts in rows["texts"]]
        groups = np.digitize(lengths, list(LENGTHS.values()), right=True)
        scores, found = self._agreement(predictions, rows), np.unique(groups)
        means = np.array([scores[groups == group].mean(0) for group in found])
        figure = new_figure(figsize=(6, 3))
        axes, positions = figure.add_subplot(), np.arange(len(found))
        for side, name, heights in zip((-0.2, 0.2), ("exact match", "F1"), means.T, strict=True):
            axes.bar(positions + side, heights, 0.4, label=name)
        axes.set_xticks(positions, [f"{list(LENGTHS)[group]}\n({(groups == group).sum():,})" for group in found])
        axes.set(xlabel=f"{scored_by} of the shortest answer (questions)", ylabel="mean", ylim=(0, 1))
        axes.legend()
        return [as_svg(figure, "Agreement by length of the answer")]

    def _agreement(self, predictions: Sequence[Prediction], rows: Dataset) -> np.ndarray:
        """Exact match and F1 of each question (N, 2)."""
        scored_by, pairs = self.objective.data.scored_by, zip(predictions, rows["texts"], strict=True)
        return np.array([agreement(p["answers"][0]["text"], texts, by=scored_by) for p, texts in pairs])


TASK = Task(
    name="question_answering",
    auto_class=AutoModelForQuestionAnswering,
    about={
        "pipeline_tag": "question-answering",
        "auto_class": "AutoModelForQuestionAnswering",
        "noun": "question answerer",
        "limits": "It always cuts an answer out of the text it is given, even where the text holds none. "
        "Expect lower accuracy on text that differs from its training data.",
    },
    arguments=QuestionAnsweringArguments,
    data=QuestionAnsweringData,
    objective=QuestionAnsweringObjective,
    scorer=QuestionAnsweringScorer,
    main_metric="f1",
    unit="tokens",
    peft_task_type=None,  # peft's own class for this task takes token_type_ids and does not pass them on
)
