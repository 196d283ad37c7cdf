"""SQuAD's own files, {"data": [{"paragraphs": [{"context", "qas"}]}]}, as rows of a question and a text each."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

NESTED = "paragraphs"


def is_nested(table: Dataset) -> bool:
    """Whether a table is such a file (one row with "data"), or its articles (a row each)."""
    if NESTED in table.column_names:
        return True
    first = table[0].get("data") if len(table) and "data" in table.column_names else None
    return isinstance(first, list) and bool(first) and isinstance(first[0], dict) and NESTED in first[0]


def flattened(table: Dataset, columns: Mapping[str, str]) -> Dataset:
    """A row for each question; `columns` names those of question, context and answers."""
    rows = list(_questions(table))
    found = {"id": [str(question.get("id", number)) for number, (_, question) in enumerate(rows)]}
    return Dataset.from_dict(
        {
            **found,
            columns["question"]: [question.get("question") for _, question in rows],
            columns["context"]: [context for context, _ in rows],
            columns["answers"]: [_answers(question.get("answers")) for _, question in rows],
        }
    )


def _questions(table: Dataset) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in table:
        articles = [row] if NESTED in row else row["data"] or []
        for article in articles:
            for paragraph in article.get(NESTED) or []:
                for question in paragraph.get("qas") or []:
                    yield paragraph.get("context") or "", question


def _answers(answers: Any) -> dict[str, list[Any]]:
    given = answers or []
    return {name: [answer.get(name) for answer in given] for name in ("text", "answer_start")}
