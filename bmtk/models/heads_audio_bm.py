"""Audio heads.  B rows, T frames, F mel bands, L positions (a quarter of the frames), D width, K labels, V tokens.

They read `input_features` (B, T, F) and `attention_mask` (B, T) as feature_extraction_bm.py makes them, and expect an
AudioStem at `model.stem`.  Every loss is a sum over predicted elements / `num_items_in_batch`, as in heads_bm.py.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .heads_bm import check_input, classification_loss


class AudioClassificationHead:
    """One label, several labels (`problem_type`) or numbers for a whole recording."""

    main_input_name = "input_features"

    def __init__(self, config):
        check_input(config, type(self).__name__, "audio")
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits (B, K); an item of the loss is a recording."""
        kwargs.setdefault("use_cache", False)
        outputs = self.model(input_features=input_features, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CTCHead:
    """Transcribes without an alignment: connectionist temporal classification (Graves et al. 2006).

    The blank is `pad_token_id`.  A row with too few positions for its labels has probability 0; that is an error here,
    not an infinite loss set to 0.  `_get_feat_extract_output_lengths` computes the number of positions beforehand.
    """

    main_input_name = "input_features"

    def __init__(self, config):
        check_input(config, type(self).__name__, "audio")
        if config.pad_token_id is None:
            raise ValueError(f"{type(self).__name__} needs pad_token_id: it is the blank; set it in the configuration")
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _get_feat_extract_output_lengths(self, input_lengths):
        """Number of positions for a number of frames; the name is that of transformers."""
        return self.model.stem.output_lengths(input_lengths)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """Logits (B, L, V); `labels` (B, S) are tokens, padded with -100 on the right; an item of the loss is a token.

        Positions are on the left whichever side the frames are padded on.  Those after the end of a row predict the
        blank, so that logits can be decoded without lengths.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(input_features=input_features, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        lengths = self.lengths(logits, attention_mask)
        if attention_mask is not None:
            is_padding = torch.arange(logits.shape[1], device=logits.device)[None] >= lengths[:, None]
            blank = F.one_hot(lengths.new_tensor(self.config.pad_token_id), logits.shape[-1]).bool()
            # Filled in the logits' own type: the smallest float64 does not fit a default float32 tensor.
            silence = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min).masked_fill(blank, 0.0)
            logits = torch.where(is_padding[..., None], silence, logits)
        loss = None
        if labels is not None:
            loss = ctc_loss(logits, lengths, labels, self.config.pad_token_id, num_items_in_batch)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def lengths(self, logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Number of positions (B,) of each row."""
        if attention_mask is None:
            return torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
        return self._get_feat_extract_output_lengths(attention_mask.long().sum(-1))


def ctc_loss(logits, lengths, labels, blank: int, num_items_in_batch=None) -> torch.Tensor:
    """Negative log-likelihood of labels (B, S) given logits (B, L, V) of `lengths` (B,) positions, summed.

    Raises: ValueError naming the rows whose labels do not fit, or hold the blank.
    """
    is_label = labels != -100
    sizes = is_label.sum(-1)
    if not torch.equal(is_label, torch.arange(labels.shape[1], device=labels.device)[None] < sizes[:, None]):
        raise ValueError("labels hold -100 before a token; -100 is padding, and stands on the right")
    if (labels == blank).any():
        raise ValueError(f"labels hold {blank}, the blank (pad_token_id), which is not a token; pad labels with -100")
    repeats = ((labels[:, 1:] == labels[:, :-1]) & is_label[:, 1:]).sum(-1)  # CTC needs a blank between equal tokens
    too_long = torch.nonzero(sizes + repeats > lengths).flatten().tolist()
    if too_long:
        row = too_long[0]
        raise ValueError(
            f"rows {too_long} of this batch have labels that do not fit: row {row} has {int(sizes[row])} tokens, "
            f"which need {int(sizes[row] + repeats[row])} positions, and its audio gives {int(lengths[row])}; leave "
            "such rows out"
        )
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)  # (L, B, V)
    total = F.ctc_loss(log_probabilities, labels[is_label], lengths, sizes, blank=blank, reduction="sum")
    return total / (sizes.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


__all__ = ["AudioClassificationHead", "CTCHead", "ctc_loss"]
