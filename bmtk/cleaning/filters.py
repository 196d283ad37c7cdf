"""Rules that datatrove does not have, or not without a download."""

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from .arguments import LengthRule
from .words import Words

CLASSIFIED = 4096  # characters: enough to know a language, and the classifier walks over every byte


class Language(BaseFilter):
    """Keeps documents in some languages.  py3langid ships its model; datatrove's filter downloads one of fastText."""

    name = "language"

    def __init__(self, languages: list[str], confidence: float):
        super().__init__()
        self.languages, self.confidence = frozenset(languages), confidence
        self.model = None

    def filter(self, doc: Document) -> tuple[bool, str]:
        if self.model is None:  # not before a worker needs it: it is large to send
            self.model = language_model()
        language, confidence = self.model.classify(doc.text[:CLASSIFIED])
        doc.metadata["language"] = language
        is_certain = confidence >= self.confidence
        return language in self.languages and is_certain, language if is_certain else "uncertain"


def language_model():  # type: ignore[no-untyped-def]  # py3langid has no types
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # reads a model of 4 MB

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


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
