"""One row per head of bm_transformer: its Auto class, a configuration, a batch with labels, how items are counted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from bmtk.models.configuration_bm_transformer import BmTransformerConfig

VOCAB, LABELS, ROWS = 31, 3, 4
TRUNK = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 40, "max_position_embeddings": 32, "initializer_range": 0.1, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "num_labels": LABELS}  # fmt: skip
CLASSIC = {**TRUNK, "norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}
BERT = {**CLASSIC, "norm_position": "post", "position_embedding_type": "learned", "is_causal": False,
        "type_vocab_size": 2, "embedding_norm": True, "with_pooler": True, "classifier_pooling": "first"}  # fmt: skip
SEQ2SEQ = {**CLASSIC, "norm_position": "post", "position_embedding_type": "sinusoidal", "hidden_act": "relu",
           "scale_embedding": True, "is_encoder_decoder": True, "decoder_start_token_id": 1}  # fmt: skip
IMAGES = {**CLASSIC, "input_type": "pixels", "image_size": 16, "patch_size": 4, "position_embedding_type": "learned",
          "classifier_pooling": "first", "fpn_size": 48, "num_detection_layers": 1,
          "num_feature_levels": 3}  # fmt: skip
AUDIO = {**TRUNK, "input_type": "audio", "num_mel_bins": 8}
SERIES = {**TRUNK, "input_type": "series", "context_length": 12, "prediction_length": 5, "patch_size": 3,
          "num_input_channels": 2, "num_time_features": 2}  # fmt: skip


def padding(lengths=(12, 9, 5, 12), width: int = 12) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (ROWS, 12)), "attention_mask": padding()}


def frames() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(ROWS, 40, 8), "attention_mask": padding((40, 29, 22, 40), 40)}


def steps() -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(ROWS, 12, 2) * torch.tensor([1.0, 50.0]) + torch.tensor([0.0, 300.0]),
        "past_time_features": torch.randn(ROWS, 12, 2),
        "future_time_features": torch.randn(ROWS, 5, 2),
        "future_values": torch.randn(ROWS, 5, 2) * torch.tensor([1.0, 50.0]) + torch.tensor([0.0, 300.0]),
        "future_observed_mask": (torch.rand(ROWS, 5, 2) < 0.8).long(),
    }


def token_labels(batch: dict) -> dict:
    chosen = (torch.rand(ROWS, 12) < 0.5) & (batch["attention_mask"] == 1)
    return {**batch, "labels": torch.randint(LABELS, (ROWS, 12)).masked_fill(~chosen, -100)}


def boxes() -> list[dict[str, torch.Tensor]]:
    box = torch.tensor([[0.5, 0.5, 0.6, 0.6]])
    return [{"class_labels": torch.tensor([row % LABELS]), "boxes": box * (0.8 + row / 20)} for row in range(ROWS)]


def count_labels(batch: dict) -> int:
    return int((batch["labels"] != -100).sum())


def count_rows(batch: dict) -> int:
    return len(next(iter(batch.values())))


@dataclass(frozen=True)
class HeadCase:
    """`count` says how many items the loss of a batch is divided by; None: the model says."""

    auto_class: str
    config: dict[str, Any]
    batch_of: Callable[[], dict[str, Any]]
    count: Callable[[dict], int] | None = count_labels
    padded_input: str | None = "input_ids"  # what `attention_mask` is about
    largest_loss: float = 0.02  # after overfitting one batch

    def model(self, *, seed: int = 0, **changes) -> nn.Module:
        torch.manual_seed(seed)
        config = BmTransformerConfig(**{**self.config, **changes})
        return getattr(transformers, self.auto_class).from_config(config).eval()

    def batch(self, *, seed: int = 1) -> dict[str, Any]:
        torch.manual_seed(seed)
        return self.batch_of()

    def num_items(self, model: nn.Module, batch: dict) -> int:
        return self.count(batch) if self.count else int(model.count_items(**batch))


def row_labels(batch: dict) -> dict:
    return {**batch, "labels": torch.tensor([0, 2, 1, 0])}


def positions(batch: dict) -> dict:
    return {**batch, "start_positions": torch.tensor([1, 8, 0, 3]), "end_positions": torch.tensor([1, 8, 4, 11])}


CASES = {
    "masked-lm": HeadCase("AutoModelForMaskedLM", BERT, lambda: token_labels(tokens())),
    "token-classification": HeadCase("AutoModelForTokenClassification", BERT, lambda: token_labels(tokens())),
    "token-classification-causal": HeadCase("AutoModelForTokenClassification", TRUNK, lambda: token_labels(tokens())),
    "question-answering": HeadCase(
        "AutoModelForQuestionAnswering", {**BERT, "num_labels": 2}, lambda: positions(tokens()), count_rows
    ),
    "sequence-classification": HeadCase(
        "AutoModelForSequenceClassification", BERT, lambda: row_labels(tokens()), count_rows
    ),
    "seq2seq-lm": HeadCase(
        "AutoModelForSeq2SeqLM", SEQ2SEQ,
        lambda: {**token_labels(tokens()), "decoder_input_ids": torch.randint(3, VOCAB, (ROWS, 12))},
    ),
    "image-classification": HeadCase(
        "AutoModelForImageClassification", IMAGES,
        lambda: row_labels({"pixel_values": torch.randn(ROWS, 3, 16, 16)}), count_rows, None,
    ),
    "masked-image-modeling": HeadCase(
        "AutoModelForMaskedImageModeling", IMAGES,
        lambda: {"pixel_values": torch.rand(ROWS, 3, 16, 16), "bool_masked_pos": torch.rand(ROWS, 16) < 0.5},
        lambda batch: int(batch["bool_masked_pos"].sum()), None, 0.1,
    ),
    "object-detection": HeadCase(
        "AutoModelForObjectDetection", IMAGES,
        lambda: {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": boxes()}, None, None, 1.0,
    ),
    "audio-classification": HeadCase(
        "AutoModelForAudioClassification", AUDIO, lambda: row_labels(frames()), count_rows, "input_features"
    ),
    "ctc": HeadCase(
        "AutoModelForCTC", AUDIO,
        lambda: {**frames(), "labels": torch.tensor([[3, 3, 4], [5, -100, -100], [6, 7, -100], [3, 4, 5]])},
        padded_input="input_features", largest_loss=0.1,
    ),
    "series-point": HeadCase(
        "AutoModelForTimeSeriesPrediction", {**SERIES, "series_loss": "mae"}, steps,
        lambda batch: int(batch["future_observed_mask"].sum()), None, 2.0,
    ),
    "series-causal": HeadCase(
        "AutoModelForTimeSeriesPrediction", {**SERIES, "is_causal": True, "series_loss": "huber"}, steps,
        lambda batch: int(batch["future_observed_mask"].sum()), None, 2.0,
    ),
    "series-student-t": HeadCase(
        "AutoModelForTimeSeriesPrediction", {**SERIES, "series_loss": "student_t"}, steps,
        lambda batch: int(batch["future_observed_mask"].sum()), None, 1.5,
    ),
}  # fmt: skip
PADDED = {name: case for name, case in CASES.items() if case.padded_input}


def output_of(outputs) -> torch.Tensor:
    """What a head returns besides its loss."""
    names = ("logits", "start_logits", "reconstruction", "prediction")
    return next(outputs[name] for name in names if outputs.get(name) is not None)


def without_labels(batch: dict) -> dict:
    answers = ("labels", "start_positions", "end_positions", "future_values", "future_observed_mask")
    return {name: value for name, value in batch.items() if name not in answers}


def rows_of(batch: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in batch.items()}
