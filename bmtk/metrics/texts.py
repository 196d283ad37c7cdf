"""How well texts agree with what they should be, and how well a text was foreseen."""

import math
from collections.abc import Sequence

import jiwer
from sacrebleu.metrics import BLEU, CHRF


def error_rates(said: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """Word and character errors over the length of what was said, summed over all rows; share of rows without any."""
    exact = sum(one == other for one, other in zip(said, heard, strict=True)) / len(said)
    return {"wer": jiwer.wer(list(said), list(heard)), "cer": jiwer.cer(list(said), list(heard)), "exact_match": exact}


def translation_scores(
    texts: Sequence[str], references: Sequence[str], *, tokenizer: str = "13a", lower_case: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU and chrF of a corpus, and their signatures; figures with different ones do not compare."""
    metrics = {"bleu": BLEU(tokenize=tokenizer, lowercase=lower_case), "chrf": CHRF(lowercase=lower_case)}
    scores = {name: metric.corpus_score(list(texts), [list(references)]).score for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}


def sentence_chrf(texts: Sequence[str], references: Sequence[str], *, lower_case: bool = False) -> list[float]:
    """chrF of each text."""
    metric = CHRF(lowercase=lower_case)
    return [metric.sentence_score(text, [other]).score for text, other in zip(texts, references, strict=True)]


def perplexity(loss: float) -> float:
    """Of nats per token."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Of the loss of a whole text, which no tokenizer makes better or worse."""
    return nats / math.log(2) / num_bytes
