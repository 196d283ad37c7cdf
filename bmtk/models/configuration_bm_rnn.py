"""Configuration of the bm_rnn family: recurrent networks."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .fields_bm import AudioTimes, check_ngrams, described
from .presets_bm import PresetMixin

PRESETS = {
    # Embedding, one LSTM, linear layer: the sentiment classifier of Keras' examples/imdb_lstm.py, 2,691,713 weights.
    # Ours has 641 more: torch's LSTM keeps a second bias (512), and there are two labels, not one (129).
    "lstm-classifier": {
        "vocab_size": 20000, "embedding_size": 128, "hidden_size": 128, "num_hidden_layers": 1, "cell_type": "lstm",
        "input_dropout": 0.2, "weight_drop": 0.2, "tie_word_embeddings": False, "classifier_pooling": "last",
    },
    # AWD-LSTM on Penn Treebank, Merity et al. 2017, arXiv:1708.02182, table 1: 24 M, by their layers 24,221,600.
    # Ours has 10,000 fewer: the output layer has no bias.
    "awd-lstm-ptb": {
        "vocab_size": 10000, "embedding_size": 400, "hidden_size": 400, "intermediate_size": 1150,
        "num_hidden_layers": 3, "cell_type": "lstm", "tie_word_embeddings": True, "embedding_dropout": 0.1,
        "input_dropout": 0.4, "hidden_dropout": 0.3, "output_dropout": 0.4, "weight_drop": 0.5,
        "activation_regularization": 2.0, "temporal_activation_regularization": 1.0, "initializer_range": 0.1,
    },
    # A minGRU language model of our own shape; Feng et al. 2024, arXiv:2410.01201, publish cells, not shapes.
    "minigru-small": {
        "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 384, "num_hidden_layers": 6,
        "cell_type": "mingru", "residual": True, "norm_type": "rms_norm", "tie_word_embeddings": True,
    },
}  # fmt: skip


@strict
class BmRnnConfig(AudioTimes, PresetMixin, PreTrainedConfig):
    """Architecture of a bm_rnn.

    There are `num_hidden_layers` recurrent layers.  All but the last have `intermediate_size` units, the last has
    `hidden_size`, the width of positions that heads read.  In a bidirectional network each direction has half of the
    units.  In an encoder-decoder both sides have `num_hidden_layers` layers, and the decoder starts from the last
    state of the encoder.
    """

    model_type = "bm_rnn"
    keys_to_ignore_at_inference = ["past_key_values", "undropped_hidden_state", "final_state"]
    # Auto class -> model class; read by bmtk.models.register and saved as `auto_map` with every model.
    heads: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_bm_rnn.BmRnnModel",
        "AutoModelForCausalLM": "modeling_bm_rnn.BmRnnForCausalLM",
        "AutoModelForSeq2SeqLM": "modeling_bm_rnn.BmRnnForSeq2SeqLM",
        "AutoModelForMaskedLM": "modeling_bm_rnn.BmRnnForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_bm_rnn.BmRnnForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_bm_rnn.BmRnnForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_bm_rnn.BmRnnForQuestionAnswering",
        "AutoModelForAudioClassification": "modeling_bm_rnn.BmRnnForAudioClassification",
        "AutoModelForCTC": "modeling_bm_rnn.BmRnnForCTC",
        "AutoModelForTimeSeriesPrediction": "modeling_bm_rnn.BmRnnForTimeSeriesPrediction",
    }

    presets: ClassVar[dict[str, dict]] = PRESETS

    input_type: Literal["tokens", "audio", "series"] = described("tokens", "what the model reads")
    vocab_size: int = described(4096, "tokens in the vocabulary, rows of the token embedding")
    embedding_size: int | None = described(
        None, "width of a token embedding; default: hidden_size, the only choice for inputs other than tokens"
    )
    hidden_size: int = described(256, "width of a position in the last layer, which heads read")
    intermediate_size: int | None = described(None, "units of every layer but the last; default: hidden_size")
    num_hidden_layers: int = described(2, "recurrent layers; of an encoder-decoder, of either side")
    cell_type: Literal["elman", "gru", "lstm", "mingru"] = described("lstm", "recurrent cell; elman: a tanh RNN")
    is_causal: bool | None = described(
        None,
        "false: half of the units read the row backwards (an encoder); default: true for tokens, else false",
    )
    residual: bool = described(False, "add the input of a layer to its output where the widths agree")
    norm_type: Literal["none", "rms_norm", "layer_norm"] = described(
        "none", "normalization before each layer and after the last"
    )
    output_projection: bool = described(
        False, "give the last layer intermediate_size units too, and project its output to hidden_size"
    )
    tie_word_embeddings: bool = described(
        True, "share the token embedding with the output layer, and between both sides of an encoder-decoder"
    )
    embedding_dropout: int | float = described(0.0, "probability that a word is dropped from the whole batch")
    input_dropout: int | float = described(
        0.0, "dropout probability, on embeddings; the same mask at all positions of a row"
    )
    hidden_dropout: int | float = described(
        0.0, "dropout probability, between layers; the same mask at all positions of a row"
    )
    output_dropout: int | float = described(
        0.0, "dropout probability, on the output that heads read; the same mask at all positions of a row"
    )
    weight_drop: int | float = described(
        0.0, "dropout probability, on recurrent weights; the same mask for the whole batch"
    )
    activation_regularization: int | float = described(
        0.0, "weight of the mean squared output that is added to a causal LM's training loss (AWD-LSTM: AR)"
    )
    temporal_activation_regularization: int | float = described(
        0.0, "the same for the squared change of the output from one position to the next (AWD-LSTM: TAR)"
    )
    attention_scoring: Literal["general", "dot"] = described(
        "general", "how a decoder's state is compared with source positions: by a learned matrix, or by dot product"
    )
    classifier_dropout: int | float = described(0.0, "dropout probability, on the input of a classification head")
    classifier_pooling: Literal["first", "last", "mean", "max"] | None = described(
        None, "how a classifier turns all positions into one vector; default: last if causal, else mean"
    )
    ngram_sizes: list[int] | tuple[int, ...] = described(
        (1, 2), "lengths of the n-grams of tokens that a text classifier reads beside the network"
    )
    ngram_skip: int = described(
        0, "tokens between those of further pairs that it reads, at most: 2 adds pairs with one and with two between"
    )
    ngram_buckets: int = described(
        0, "rows of the table in which these n-grams have their weights, found by a hash; 0: none are read"
    )
    ngram_spelling: int = described(
        0, "n-grams of characters of each token that are read beside those of tokens, at most; 0: none"
    )
    initializer_range: int | float = described(0.05, "standard deviation of initial embeddings and linear layers")
    use_cache: bool = described(True, "keep keys, values or states between steps of generation")
    is_encoder_decoder: bool = described(False, "an encoder for the source text and a causal decoder for the target")
    pad_token_id: int | None = described(None, "token id of padding; default: none")
    bos_token_id: int | None = described(None, "token id that begins a text; default: none")
    eos_token_id: int | list[int] | None = described(None, "token id, or ids, that end a text; default: none")
    decoder_start_token_id: int | None = described(
        None, "token id that a decoder reads first; default: none, tasks choose the padding token"
    )

    # Audio
    num_mel_bins: int = described(80, "mel bands of an audio frame; four frames make a position")
    hop_length: int = described(
        160, "samples from one audio frame to the next; recipes write that of the feature extractor (hop_ms)"
    )

    # Series
    context_length: int = described(96, "steps of a series that the model reads")
    prediction_length: int = described(24, "steps of a series that the model predicts")
    patch_size: int = described(1, "steps of a series per position")
    num_input_channels: int = described(1, "numbers per step of a series")
    num_time_features: int = described(
        0, "calendar covariates per step of a series, known for the past and for the future"
    )
    linear_forecast: bool = described(
        False, "add a linear map of the normalized past to a forecast, the same for every channel"
    )
    series_loss: Literal["mse", "mae", "huber", "quantile", "student_t"] = described(
        "mse", "loss of a forecast: squared, absolute or Huber error, pinball loss, or Student's t likelihood"
    )
    quantiles: list[int | float] | tuple[int | float, ...] = described(
        (0.1, 0.5, 0.9), "quantiles to predict, from 0 to 1, for series_loss=quantile; 0.5 must be among them"
    )

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size
        if self.is_causal is None:
            self.is_causal = self.input_type == "tokens"
        self.quantiles = list(self.quantiles)
        if self.classifier_pooling is None:
            self.classifier_pooling = "last" if self.is_causal else "mean"
        self.ngram_sizes = list(self.ngram_sizes)
        super().__post_init__(**kwargs)
        # The code is saved with every model, so an auto_map that points to another repository must be replaced.
        self.auto_map = {"AutoConfig": "configuration_bm_rnn.BmRnnConfig", **self.heads}

    @property
    def layer_sizes(self) -> list[int]:
        """Units of each layer, both directions together."""
        last = self.intermediate_size if self.output_projection else self.hidden_size
        return [self.intermediate_size] * (self.num_hidden_layers - 1) + [last]

    @property
    def layer_types(self) -> list[str]:
        """Cache type of each layer, for `DynamicCache(config=...)`; a property, so that it is not saved."""
        return ["bm_recurrent"] * self.num_hidden_layers

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What is gathered together when weights are spread over processes: a layer; all else with the whole model."""
        sides = ("encoder.", "decoder.") if self.is_encoder_decoder else ("",)
        return {f"{side}layers.*": "free_full_weight" for side in sides}

    def validate_layer_type(self):
        """Override the check of the base class, which allows only transformers' own layer types."""

    def validate_sizes(self):
        for name in ("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        odd = [size for size in self.layer_sizes if size % 2]
        if odd and not self.is_causal:
            raise ValueError(
                f"is_causal=False halves the units of a layer between two directions; hidden_size={self.hidden_size} "
                f"and intermediate_size={self.intermediate_size} make one of {odd[0]}, so choose even sizes"
            )

    def validate_inputs(self):
        if self.input_type != "tokens" and (self.embedding_size != self.hidden_size or self.is_encoder_decoder):
            raise ValueError(
                f"input_type={self.input_type!r} reads no tokens: embedding_size={self.embedding_size} must equal "
                f"hidden_size={self.hidden_size}, is_encoder_decoder={self.is_encoder_decoder} be False; omit both"
            )
        if self.input_type == "series" and self.context_length % self.patch_size:
            raise ValueError(
                f"context_length={self.context_length} is not a multiple of patch_size={self.patch_size}; change one "
                "of them (patch_size=1 makes a position of every step)"
            )

    def validate_ngrams(self):
        check_ngrams(self.ngram_sizes, self.ngram_skip, self.ngram_buckets, self.ngram_spelling)

    def validate_probabilities(self):
        names = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop")
        for name in (*names, "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; choose 0 <= {name} < 1")
        if self.weight_drop and self.cell_type == "mingru":
            raise ValueError(
                f"weight_drop={self.weight_drop} has nothing to act on: cell_type='mingru' has no recurrent weights; "
                "set it to 0"
            )


__all__ = ["PRESETS", "BmRnnConfig"]
