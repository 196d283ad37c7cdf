"""Heads: how positions become a task's output and its loss.  B rows, L positions, D width, V tokens, K labels.

Each head is written once; a family adds it in two lines: the head, the family's root, and `trunk_class`.
Every loss is a sum over predicted elements divided by `num_items_in_batch` (or by their number, if none is given), so
that micro-batches, accumulation and processes change nothing.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple


class CausalLMHead:
    """Predicts the next token.  The family's trunk must be causal."""

    _tied_weights_keys = {"lm_head.weight": "model.stem.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        if not config.is_causal:
            raise ValueError(
                f"{type(self).__name__} needs is_causal=True: a bidirectional trunk sees the token it should predict"
            )
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V); `labels` (B, L) are token ids, shifted inside, -100 where nothing is predicted."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, kept, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SequenceClassificationHead:
    """One label, several labels or numbers for a whole row, read from its last or from the mean of its positions."""

    def __init__(self, config):
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.pool = {"last": last_position, "mean": mean_position}[config.classifier_pooling]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, K).  Without `attention_mask` every position counts as real; rows of several lengths need it."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        pooled = self.pool(outputs.last_hidden_state, attention_mask)  # (B, D)
        logits = self.score(self.dropout(pooled))  # (B, K)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def last_position(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) -> (B, D): the last real position of each row, padding on either side."""
    if attention_mask is None:
        return hidden_states[:, -1]
    steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    last = (steps * attention_mask).argmax(-1)
    return hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), last]


def mean_position(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) -> (B, D): the mean over the real positions of each row."""
    if attention_mask is None:
        return hidden_states.mean(1)
    weights = attention_mask[..., None].to(hidden_states.dtype)
    return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)


def classification_loss(logits, labels, config, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy, binary cross-entropy or squared error by `config.problem_type` (guessed once, like transformers).

    logits (B, K); labels (B,) integers, (B, K) of 0 and 1, or (B,) or (B, K) numbers.
    """
    if config.problem_type is None:
        config.problem_type = (
            "regression"
            if config.num_labels == 1
            else "multi_label_classification"
            if labels.is_floating_point()
            else "single_label_classification"
        )
    if config.problem_type == "single_label_classification":
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        count = (labels != -100).sum()
    elif config.problem_type == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        count = labels.numel()
    else:
        total = F.mse_loss(logits.float().view(labels.shape), labels.float(), reduction="sum")
        count = labels.numel()
    return total / (count if num_items_in_batch is None else num_items_in_batch)


__all__ = [
    "CausalLMHead",
    "SequenceClassificationHead",
    "classification_loss",
    "last_position",
    "mean_position",
]
