"""The table that the model contract runs over: one row per family, per shape and per kind of head.

A new head is a row of HEADS.  A new family is rows of SHAPES, and what starting_values.py and field_turns.py say of
it.  CASES is every shape with every head it names; no test names a family.  BatchNorm mixes the rows of a batch by its
definition, so contracts that cut a batch run in eval mode, where it uses its running statistics.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig

VOCAB, LABELS, LENGTH, ROWS, FRAMES = 67, 3, 12, 4, 40


# Inputs --------------------------------------------------------------------------------------------------------------


def padding(lengths: tuple[int, ...], width: int) -> torch.Tensor:
    """A mask of rows padded on the right: (B, width)."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def tokens(config=None) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.randint(3, VOCAB, (ROWS, LENGTH)), "attention_mask": padding((12, 9, 5, 12), LENGTH)}
    if config is not None and config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCAB, (ROWS, LENGTH))
    return batch


def pixels(config) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(ROWS, config.num_channels, config.image_size, config.image_size)}


def frames(config) -> dict[str, torch.Tensor]:
    features = torch.randn(ROWS, FRAMES, config.num_mel_bins)
    return {"input_features": features, "attention_mask": padding((40, 29, 22, 40), FRAMES)}


def steps(config) -> dict[str, torch.Tensor]:
    """Two channels have levels of 0 and 300 and spreads of 1 and 50, others like the first."""
    channels, features = config.num_input_channels, config.num_time_features
    spread = torch.tensor([1.0, 50.0, *[1.0] * channels])[:channels]
    level = torch.tensor([0.0, 300.0, *[0.0] * channels])[:channels]
    batch = {"past_values": torch.randn(ROWS, config.context_length, channels) * spread + level}
    if features:
        batch["past_time_features"] = torch.randn(ROWS, config.context_length, features)
        batch["future_time_features"] = torch.randn(ROWS, config.prediction_length, features)
    return batch


READ = {"tokens": tokens, "pixels": pixels, "audio": frames, "series": steps}


# Answers: what a head is to say of a batch ---------------------------------------------------------------------------


def every_token(batch: dict, config) -> dict:
    return {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def some_tokens(batch: dict, config) -> dict:
    chosen = (torch.rand(ROWS, LENGTH) < 0.5) & (batch["attention_mask"] == 1)
    return {"labels": torch.randint(1, VOCAB, (ROWS, LENGTH)).masked_fill(~chosen, -100)}


def label_of_tokens(batch: dict, config) -> dict:
    return {"labels": (batch["input_ids"] % LABELS).masked_fill(batch["attention_mask"] == 0, -100)}


def label_of_rows(batch: dict, config) -> dict:
    return {"labels": torch.tensor([0, 2, 1, 0])}


def several_labels_of_rows(batch: dict, config) -> dict:
    return {"labels": torch.randint(2, (ROWS, LABELS)).float()}


def numbers_of_rows(batch: dict, config) -> dict:
    return {"labels": torch.randn(ROWS)}


def spans(batch: dict, config) -> dict:
    return {"start_positions": torch.tensor([1, 8, 0, 3]), "end_positions": torch.tensor([1, 8, 4, 11])}


def hidden_cells(batch: dict, config) -> dict:
    return {"bool_masked_pos": torch.rand(ROWS, 16) < 0.5}


def boxes(batch: dict, config) -> dict:
    box = torch.tensor([[0.5, 0.5, 0.6, 0.6]])
    rows = [{"class_labels": torch.tensor([row % LABELS]), "boxes": box * (0.8 + row / 20)} for row in range(ROWS)]
    return {"labels": rows}


def transcripts(batch: dict, config) -> dict:
    return {"labels": torch.tensor([[3, 3, 4], [5, -100, -100], [6, 7, -100], [3, 4, 5]])}


def future(batch: dict, config) -> dict:
    truth = torch.randn(ROWS, config.prediction_length, config.num_input_channels)
    observed = (torch.rand(truth.shape) < 0.8).long()
    return {"future_values": truth * batch["past_values"].std(1, keepdim=True) + batch["past_values"].mean(1, True),
            "future_observed_mask": observed}  # fmt: skip


ANSWERS = ("labels", "start_positions", "end_positions", "future_values", "future_observed_mask")


def count_labels(batch: dict) -> int:
    return int((batch["labels"] != -100).sum())


def count_rows(batch: dict) -> int:
    return len(next(iter(batch.values())))


# Heads ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Head:
    """What the contract must know of a kind of head.

    `answers` and `num_items` are None for what has no loss; `num_items` alone, where the model counts (count_items).
    """

    auto_name: str
    answers: Callable[[dict, PreTrainedConfig], dict] | None = None
    num_items: Callable[[dict], int] | None = None
    chance_loss: Callable[[dict], float] | None = None  # of a model that knows nothing; None: no closed form
    per_position: bool = False  # its output is (B, L, ...), not (B, ...)
    loss_left: float = 0.1  # largest final loss after overfitting one batch, as a fraction of the first loss
    pipeline: str | None = None  # transformers' task that serves it
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def auto_class(self) -> type:
        return getattr(transformers, self.auto_name)


LABELLED = {"num_labels": LABELS}
HEADS = {
    "Model": Head("AutoModel", per_position=True),
    "Backbone": Head("AutoBackbone"),
    "CausalLM": Head(
        "AutoModelForCausalLM", every_token, lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
        lambda batch: math.log(VOCAB), per_position=True, pipeline="text-generation",
    ),
    "MaskedLM": Head(
        "AutoModelForMaskedLM", some_tokens, count_labels, lambda batch: math.log(VOCAB), per_position=True,
        pipeline="fill-mask",
    ),
    "Seq2SeqLM": Head("AutoModelForSeq2SeqLM", every_token, count_labels, lambda batch: math.log(VOCAB)),
    "TokenClassification": Head(
        "AutoModelForTokenClassification", label_of_tokens, count_labels, lambda batch: math.log(LABELS),
        per_position=True, pipeline="token-classification", config=LABELLED,
    ),
    "QuestionAnswering": Head(
        "AutoModelForQuestionAnswering", spans, count_rows,
        lambda batch: batch["attention_mask"].sum(-1).float().log().mean().item(), per_position=True,
    ),
    "SequenceClassification": Head(
        "AutoModelForSequenceClassification", label_of_rows, count_rows, lambda batch: math.log(LABELS),
        pipeline="text-classification", config=LABELLED,
    ),
    "MultiLabelClassification": Head(
        "AutoModelForSequenceClassification", several_labels_of_rows, lambda batch: batch["labels"].numel(),
        lambda batch: math.log(2), pipeline="text-classification",
        config={**LABELLED, "problem_type": "multi_label_classification"},
    ),
    "Regression": Head(
        "AutoModelForSequenceClassification", numbers_of_rows, count_rows,
        lambda batch: batch["labels"].square().mean().item(), pipeline="text-classification",
        config={"num_labels": 1},
    ),
    "ImageClassification": Head(
        "AutoModelForImageClassification", label_of_rows, count_rows, lambda batch: math.log(LABELS),
        pipeline="image-classification", config=LABELLED,
    ),
    "MaskedImageModeling": Head(
        "AutoModelForMaskedImageModeling", hidden_cells, lambda batch: int(batch["bool_masked_pos"].sum()),
        loss_left=0.7,
    ),
    "ObjectDetection": Head(
        "AutoModelForObjectDetection", boxes, loss_left=0.6, pipeline="object-detection", config=LABELLED
    ),
    "AudioClassification": Head(
        "AutoModelForAudioClassification", label_of_rows, count_rows, lambda batch: math.log(LABELS),
        pipeline="audio-classification", config=LABELLED,
    ),
    "CTC": Head("AutoModelForCTC", transcripts, count_labels, pipeline="automatic-speech-recognition"),
    "TimeSeriesPrediction": Head(
        "AutoModelForTimeSeriesPrediction", future, lambda batch: int(batch["future_observed_mask"].sum()),
        loss_left=0.3,
    ),
}  # fmt: skip


# Shapes --------------------------------------------------------------------------------------------------------------

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
AUDIO = {"input_type": "audio", "num_mel_bins": 8}
SERIES = {"input_type": "series", "context_length": 12, "prediction_length": 5, "patch_size": 3,
          "num_input_channels": 2, "num_time_features": 2}  # fmt: skip
DETECTION = {"fpn_size": 16, "num_detection_layers": 1, "num_feature_levels": 3}
TRANSLATION = {"is_encoder_decoder": True, "decoder_start_token_id": 1}

MODERN = {**SPECIAL, "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 40, "max_position_embeddings": 64}  # fmt: skip
CLASSIC = {**MODERN, "norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}
IMAGES = {**CLASSIC, **DETECTION, "fpn_size": 48, "input_type": "pixels", "image_size": 16, "patch_size": 4,
          "position_embedding_type": "learned"}  # fmt: skip
BERT = {**CLASSIC, "norm_position": "post", "position_embedding_type": "learned", "is_causal": False,
        "type_vocab_size": 2, "embedding_norm": True, "with_pooler": True, "classifier_pooling": "first"}  # fmt: skip
ORIGINAL = {**CLASSIC, "hidden_act": "relu", "position_embedding_type": "sinusoidal", "norm_position": "post",
            "scale_embedding": True}  # fmt: skip

RECURRENT = {**SPECIAL, "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}

CONVOLUTIONAL = {**SPECIAL, "input_type": "tokens", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3,
                 "dilation_cycle": 2, "filter_widths": [2, 4]}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2], "image_size": 16}
CONVNEXT = {**STAGES, **DETECTION, "block_type": "convnext", "stem_type": "patch", "patch_size": 2,
            "layer_scale_init_value": 0.5, "hidden_act": "gelu", "norm_type": "layer_norm"}  # fmt: skip

DECODER_HEADS = ("Model", "CausalLM", "SequenceClassification")
ENCODER_HEADS = ("Model", "MaskedLM", "TokenClassification", "QuestionAnswering", "SequenceClassification")
ROW_HEADS = ("MultiLabelClassification", "Regression")
IMAGE_HEADS = ("Model", "ImageClassification", "MaskedImageModeling", "ObjectDetection")
AUDIO_HEADS = ("Model", "AudioClassification", "CTC")
SERIES_HEADS = ("Model", "TimeSeriesPrediction")
# name -> (configuration class, its fields, the heads that stand on it)
SHAPES = {
    "transformer_modern": (BmTransformerConfig, {**MODERN, "num_key_value_heads": 2, "qk_norm": True}, DECODER_HEADS),
    "transformer_untied": (
        BmTransformerConfig,
        {**MODERN, "tie_word_embeddings": False, "hidden_act": "relu2", "head_dim": 6, "classifier_pooling": "mean"},
        (*DECODER_HEADS, "TokenClassification"),
    ),
    "transformer_gpt2": (
        BmTransformerConfig, {**CLASSIC, "hidden_act": "gelu_new", "position_embedding_type": "learned"},
        (*DECODER_HEADS, *ROW_HEADS),
    ),
    "transformer_2017": (BmTransformerConfig, ORIGINAL, DECODER_HEADS),
    "transformer_bert": (BmTransformerConfig, BERT, (*ENCODER_HEADS, *ROW_HEADS)),
    "transformer_rotary_encoder": (BmTransformerConfig, {**MODERN, "is_causal": False}, ("Model", "MaskedLM")),
    "transformer_translator": (BmTransformerConfig, {**ORIGINAL, **TRANSLATION}, ("Seq2SeqLM",)),
    "transformer_vit": (BmTransformerConfig, {**IMAGES, "classifier_pooling": "first"}, IMAGE_HEADS),
    "transformer_audio": (BmTransformerConfig, {**MODERN, **AUDIO}, AUDIO_HEADS),
    "transformer_series": (BmTransformerConfig, {**MODERN, **SERIES, "series_loss": "mae"}, SERIES_HEADS),
    "transformer_series_causal": (
        BmTransformerConfig, {**MODERN, **SERIES, "series_loss": "huber", "is_causal": True}, ("TimeSeriesPrediction",)
    ),
    "transformer_series_student_t": (
        BmTransformerConfig, {**MODERN, **SERIES, "series_loss": "student_t"}, ("TimeSeriesPrediction",)
    ),
    "rnn_lstm": (BmRnnConfig, RECURRENT, DECODER_HEADS),
    "rnn_gru": (
        BmRnnConfig, {**RECURRENT, "cell_type": "gru", "norm_type": "layer_norm", "output_projection": True},
        ("CausalLM", "TokenClassification"),
    ),
    "rnn_elman": (
        BmRnnConfig, {**RECURRENT, "cell_type": "elman", "embedding_size": 24, "tie_word_embeddings": False},
        ("CausalLM", "Regression"),
    ),
    "rnn_mingru": (
        BmRnnConfig, {**RECURRENT, "cell_type": "mingru", "residual": True, "norm_type": "rms_norm"}, DECODER_HEADS
    ),
    "rnn_lstm_encoder": (BmRnnConfig, {**RECURRENT, "is_causal": False, "embedding_size": 24}, ENCODER_HEADS),
    "rnn_mingru_encoder": (
        BmRnnConfig, {**RECURRENT, "is_causal": False, "cell_type": "mingru", "classifier_pooling": "max"},
        ("Model", "MultiLabelClassification"),
    ),
    "rnn_translator": (BmRnnConfig, {**RECURRENT, **TRANSLATION, "is_causal": False}, ("Seq2SeqLM",)),
    "rnn_audio": (BmRnnConfig, {**RECURRENT, **AUDIO, "cell_type": "gru"}, AUDIO_HEADS),
    "rnn_series": (BmRnnConfig, {**RECURRENT, **SERIES, "series_loss": "quantile"}, SERIES_HEADS),
    "cnn_residual": (BmCnnConfig, {**CONVOLUTIONAL, "kernel_size": 2}, (*DECODER_HEADS, "Regression")),
    "cnn_gated": (
        BmCnnConfig, {**CONVOLUTIONAL, "block_type": "gated", "tie_word_embeddings": False},
        ("CausalLM", "TokenClassification"),
    ),
    "cnn_multi_width": (
        BmCnnConfig, {**CONVOLUTIONAL, "block_type": "multi_width"}, (*ENCODER_HEADS, "MultiLabelClassification")
    ),
    "cnn_gated_encoder": (BmCnnConfig, {**CONVOLUTIONAL, "block_type": "gated", "is_causal": False}, ENCODER_HEADS),
    "cnn_plain": (
        BmCnnConfig, {**STAGES, "block_type": "plain", "pooled_grid": 2, "classifier_hidden_sizes": [12]},
        ("ImageClassification",),
    ),
    "cnn_basic_batch_norm": (
        BmCnnConfig, {**STAGES, **DETECTION, "stem_type": "conv", "stem_width": 8, "stem_pooling": False},
        (*IMAGE_HEADS, "Backbone"),
    ),
    "cnn_bottleneck": (
        BmCnnConfig, {**STAGES, "block_type": "bottleneck", "norm_type": "layer_norm"}, ("ImageClassification",)
    ),
    "cnn_convnext": (BmCnnConfig, CONVNEXT, (*IMAGE_HEADS, "Backbone")),
    "cnn_audio": (BmCnnConfig, {**CONVOLUTIONAL, **AUDIO}, AUDIO_HEADS),
    "cnn_series": (BmCnnConfig, {**CONVOLUTIONAL, **SERIES}, SERIES_HEADS),
}  # fmt: skip


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One (shape, head): everything a contract test needs, deterministic in `seed`."""

    shape: str
    head_name: str

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.head_name}"

    @property
    def head(self) -> Head:
        return HEADS[self.head_name]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return SHAPES[self.shape][0]

    @property
    def shape_fields(self) -> dict[str, Any]:
        return SHAPES[self.shape][1]

    @property
    def family(self) -> str:
        return self.config_class.model_type

    @property
    def pipeline(self) -> str | None:
        """transformers' task that serves it; the trunk's task depends on what it reads, and is none for audio."""
        if self.head_name != "Model":
            return self.head.pipeline
        return {"tokens": "feature-extraction", "pixels": "image-feature-extraction"}.get(self.config().input_type)

    def config(self, **changes) -> PreTrainedConfig:
        return self.config_class(**{**self.shape_fields, **self.head.config, **changes})

    def model(self, *, seed: int = 0, **changes) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self.head.auto_class.from_config(self.config(**changes)).eval()

    def load(self, folder, **settings) -> PreTrainedModel:
        if self.head_name == "Backbone":  # transformers 5.23 looks for a folder's name on the Hub
            return type(self.model()).from_pretrained(folder, **settings)
        return self.head.auto_class.from_pretrained(folder, **settings)

    def batch(self, *, seed: int = 1, **changes) -> dict[str, Any]:
        """Rows of several lengths, padded on the right, with the answers of this head."""
        torch.manual_seed(seed)
        config = self.config(**changes)
        inputs = READ[config.input_type](config)
        return inputs if self.head.answers is None else {**inputs, **self.head.answers(inputs, config)}

    def inputs(self, *, seed: int = 1) -> dict[str, torch.Tensor]:
        return without_answers(self.batch(seed=seed))

    def num_items(self, model: PreTrainedModel, batch: dict) -> int:
        """What the loss of a batch is divided by."""
        return int(model.count_items(**batch)) if self.head.num_items is None else self.head.num_items(batch)


def without_answers(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name not in ANSWERS}


def output_of(outputs):
    """What a head or a bare trunk says of a batch, in one tensor; a detector's boxes beside its classes."""
    if outputs.get("pred_boxes") is not None:
        return torch.cat((outputs.logits, outputs.pred_boxes), dim=-1)
    if outputs.get("start_logits") is not None:
        return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    if outputs.get("last_hidden_state") is None and outputs.get("feature_maps") is not None:
        return outputs.feature_maps[-1]
    names = ("logits", "reconstruction", "prediction", "last_hidden_state")
    return next(outputs[name] for name in names if outputs.get(name) is not None)


CASES = {case.name: case for shape, (_, _, heads) in SHAPES.items() for case in (Case(shape, head) for head in heads)}

_CONFIGS = {name: case.config() for name, case in CASES.items()}  # made once: ten tables look at all of them


def cases_where(holds: Callable[[Case, PreTrainedConfig], bool]) -> dict[str, Case]:
    return {name: case for name, case in CASES.items() if holds(case, _CONFIGS[name])}


LOSS_CASES = cases_where(lambda case, config: case.head.answers is not None)
CHANCE_CASES = cases_where(lambda case, config: case.head.chance_loss is not None)
TOKEN_CASES = cases_where(lambda case, config: config.input_type == "tokens")
PADDED_CASES = cases_where(lambda case, config: config.input_type in ("tokens", "audio"))
POSITION_CASES = cases_where(lambda case, config: config.input_type == "tokens" and case.head.per_position)
CAUSAL_CASES = {name: case for name, case in POSITION_CASES.items() if case.config().is_causal}
GENERATING_CASES = cases_where(lambda case, config: case.head_name in ("CausalLM", "Seq2SeqLM"))
CAUSAL_LM_CASES = cases_where(lambda case, config: case.head_name == "CausalLM")
WRITING_CASES = cases_where(lambda case, config: case.head_name in ("CausalLM", "MaskedLM", "Seq2SeqLM"))
PIPELINE_CASES = cases_where(lambda case, config: case.pipeline is not None)
TRANSLATING_CASES = cases_where(lambda case, config: config.is_encoder_decoder)
# One case for each pair of family and head that has a loss; of these one for each family and kind of input.
PAIRS = {(case.family, case.head.auto_name): case for case in LOSS_CASES.values()}
KINDS = {(case.family, case.config().input_type, case.name in TRANSLATING_CASES): case for case in PAIRS.values()}
OTHER_PAIRS = {pair: case for pair, case in PAIRS.items() if case not in KINDS.values()}


def over(cases: dict[Any, Case]):
    """One test per row, called by the row's name."""
    return pytest.mark.parametrize("case", cases.values(), ids=[case.name for case in cases.values()])
