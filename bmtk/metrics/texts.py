"""Error rates of transcripts, BLEU and chrF of translations, perplexity and bits per byte of language models."""

import math
from collections.abc import Sequence

# Language models need the last two functions alone: jiwer and sacrebleu are imported by those that call them.


def error_rates(references: Sequence[str], transcripts: Sequence[str]) -> dict[str, float]:
    """Word and character error rates, over the total length of the references; share of transcripts without error."""
    import jiwer

    truth, found = list(references), list(transcripts)
    exact = sum(one == other for one, other in zip(truth, found, strict=True)) / len(truth)
    return {"wer": jiwer.wer(truth, found), "cer": jiwer.cer(truth, found), "exact_match": exact}


def translation_scores(
    texts: Sequence[str], references: Sequence[str], *, tokenizer: str = "13a", lower_case: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU and chrF of a corpus, and their signatures; scores with different signatures are not comparable."""
    from sacrebleu.metrics import BLEU, CHRF

    metrics = {"bleu": BLEU(tokenize=tokenizer, lowercase=lower_case), "chrf": CHRF(lowercase=lower_case)}
    scores = {name: metric.corpus_score(list(texts), [list(references)]).score for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}


def sentence_chrf(texts: Sequence[str], references: Sequence[str], *, lower_case: bool = False) -> list[float]:
    """chrF of each text."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(lowercase=lower_case)
    return [metric.sentence_score(text, [other]).score for text, other in zip(texts, references, strict=True)]


def perplexity(loss: float) -> float:
    """exp(`loss`), of a loss in nats per token; the loss is capped where a float would overflow."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte from the summed loss of a whole text: comparable between tokenizers, unlike perplexity."""
    return nats / math.log(2) / num_bytes
