"""Rules that datatrove does not have, or not without a download."""

from functools import cache
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from bmtk.errors import UserError

from .arguments import LengthRule
from .words import Words

CLASSIFIED = 4096  # characters: enough to know a language, and the classifier walks over every byte


class Language(BaseFilter):
    """Keeps documents in some languages.  py3langid ships its model; datatrove's filter downloads one of fastText."""

    name = "language"

    def __init__(self, languages: list[str], confidence: float):
        super().__init__()
        self.languages, self.confidence = frozenset(languages), confidence

    def filter(self, doc: Document) -> tuple[bool, str]:
        language, confidence = language_model().classify(doc.text[:CLASSIFIED])
        doc.metadata["language"] = language
        is_certain = confidence >= self.confidence
        return language in self.languages and is_certain, language if is_certain else "uncertain"


@cache
def language_model() -> Any:
    """The classifier, once in each process that needs it."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # reads a model of 4 MB

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages: list[str]) -> None:
    """Raise UserError for a code that the classifier does not know."""
    known = sorted(language_model().labels)
    if unknown := [language for language in languages if language not in known]:
        raise UserError(f"languages: {unknown[0]!r} is unknown; choose from the ISO 639 codes {', '.join(known)}")


class Length(BaseFilter):
    """Keeps documents whose characters and words are within bounds."""

    name = "length"

    def __init__(self, bounds: LengthRule):
        super().__init__()
        self.bounds = bounds

    def filter(self, doc: Document) -> tuple[bool, str]:
        bounds, num_words = self.bounds, len(Words().word_tokenize(doc.text))
        if len(doc.text) < bounds.min_characters or num_words < bounds.min_words:
            return False, "too short"
        is_long = bounds.max_characters is not None and len(doc.text) > bounds.max_characters
        if is_long or (bounds.max_words is not None and num_words > bounds.max_words):
            return False, "too long"
        return True, ""
