"""Text heads: from hidden states to an output and its loss.  B rows, L positions, D width, V tokens, K labels.

Each head is a mixin; a family derives its class from the head and the family's root, and sets `trunk_class`.
A trunk returns `last_hidden_state` (B, L, D) and, as its second output, `pooler_output` (B, D) from pooling_bm.py,
which transformers' VisionTextDualEncoderModel reads too.
Every loss is a sum over predicted elements divided by `num_items_in_batch` (or by their number, if it is not given),
so that it does not depend on micro-batches, accumulation and the number of processes.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .ngrams_bm import NgramReader
from .pooling_bm import last_position, mask_of_positions, mean_position
from .token_loss_bm import label_loss, token_loss, token_losses


def check_input(config, head: str, input_type: str) -> None:
    """Raise ValueError if the configuration has another input type than the head needs."""
    if config.input_type != input_type:
        raise ValueError(f"{head} needs input_type={input_type!r}, and this configuration has {config.input_type!r}")


class CausalLMHead:
    """Predicts the next token.  The family's trunk must be causal."""

    _tied_weights_keys = {"lm_head.weight": "model.stem.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    output_class = CausalLMOutputWithPast
    passed_on: tuple[str, ...] = ()  # further outputs of the trunk that the head returns

    def __init__(self, config):
        check_input(config, type(self).__name__, "tokens")
        if not config.is_causal:
            raise ValueError(
                f"{type(self).__name__} needs is_causal=True: a bidirectional trunk sees the token it should predict"
            )
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def penalty(self, outputs, labels, attention_mask, position_ids, **kwargs) -> torch.Tensor | float:
        """A term that a family adds to the training loss, divided by the same count; none by default."""
        return 0.0

    def loss_without_logits(self, hidden, labels, shift_labels=None, num_items_in_batch=None, **kwargs):
        """What `loss_function` computes from the logits of hidden (B, L, D)."""
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        return token_loss(hidden, shifted, self.lm_head, num_items_in_batch)

    @torch.no_grad()
    def token_losses(self, shift_labels: torch.Tensor, **inputs) -> torch.Tensor:
        """Cross-entropies (B, L) of the logits and `shift_labels` (B, L), without keeping the logits."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return token_losses(hidden, shift_labels, self.lm_head, self.config.vocab_size)

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
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V); `labels` (B, L) are token ids, shifted inside, -100 where nothing is predicted.

        With `skip_logits` and labels, the same loss takes less time and memory, and `logits` is None.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = loss = None
        if labels is None or not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, kept, V)
        if labels is not None and skip_logits:
            loss = self.loss_without_logits(outputs.last_hidden_state, labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if labels is not None and self.training:
            loss = loss + self.penalty(outputs, labels, attention_mask, position_ids, **kwargs)
        return self.output_class(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: outputs[name] for name in self.passed_on if name in outputs},
        )


# Every head writes out its arguments and names the class of its output: Trainer, pipelines and sentence-transformers
# read both from the signature of `forward`.


class MaskedLMHead:
    """Predicts tokens from both sides: dense layer, GELU, LayerNorm, output matrix (BERT: Devlin et al. 2018)."""

    _tied_weights_keys = {"lm_head.weight": "model.stem.embed_tokens.weight"}

    def __init__(self, config):
        check_input(config, type(self).__name__, "tokens")
        if config.is_causal:
            raise ValueError(
                f"{type(self).__name__} needs is_causal=False: a causal trunk does not see what follows a masked token"
            )
        super().__init__(config)
        self.model = self.trunk_class(config)
        width = self.get_input_embeddings().embedding_dim  # the output layer may share the embedding matrix
        self.transform = nn.Sequential(nn.Linear(config.hidden_size, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Logits (B, L, V); `labels` (B, L) are the tokens at masked positions, else -100; an item is a masked token.

        With `skip_logits` and labels, only masked positions go through the output layer: the same loss in less
        time and memory.  `logits` is then None.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = loss = None
        if labels is not None and skip_logits:
            is_masked = labels != -100
            transformed = self.transform(outputs.last_hidden_state[is_masked])  # (N, D)
            loss = token_loss(transformed, labels[is_masked], self.lm_head, num_items_in_batch)
        else:
            logits = self.lm_head(self.transform(outputs.last_hidden_state))
            loss = None if labels is None else label_loss(logits, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class SequenceClassificationOutput(SequenceClassifierOutputWithPast):
    """`reader_logits`: in training, what each of two readers gives (B, K), the network and its n-grams."""

    reader_logits: tuple[torch.FloatTensor, ...] | None = None


class SequenceClassificationHead:
    """One label, several labels or numbers for a whole row, read from the trunk's `pooler_output`.

    With `ngram_buckets`, hashed n-grams of the tokens are read beside the trunk (ngrams_bm.py).
    """

    def __init__(self, config):
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        shape = config.ngram_sizes, config.ngram_buckets, config.num_labels
        more = {"skip": config.ngram_skip, "tokens": config.vocab_size, "spelling": config.ngram_spelling}
        self.ngrams = NgramReader(*shape, **more) if config.ngram_buckets else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassificationOutput:
        """Logits (B, K), the mean of the readers; for `labels` see `classification_loss`.

        The loss is, in training, the mean of each reader's loss, and otherwise that of the logits.
        Without `attention_mask` no position is padding; batches of rows of different lengths need one.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        readers = [self.score(self.dropout(outputs.pooler_output))]  # of logits (B, K)
        if self.ngrams is not None:
            readers.append(self.read_ngrams(input_ids, attention_mask))
        logits = torch.stack(readers).mean(0)
        # If both learned from their mean, the n-grams, which learn faster, would leave the network nothing to learn.
        scored = readers if self.training else [logits]
        loss = None
        if labels is not None:
            losses = [classification_loss(one, labels, self.config, num_items_in_batch) for one in scored]
            loss = sum(losses) / len(losses)
        return SequenceClassificationOutput(
            loss=loss,
            logits=logits,
            reader_logits=tuple(readers) if self.training and len(readers) > 1 else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """New tokens have no n-grams of characters."""
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.ngrams is not None and self.ngrams.spelling is not None:
            rows = embeddings.num_embeddings - len(self.ngrams.spelling)
            self.ngrams.spelling = F.pad(self.ngrams.spelling, (0, 0, 0, rows))  # fewer than 0 are cut off
        return embeddings

    def read_ngrams(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("pass input_ids, not inputs_embeds: this model has ngram_buckets, and n-grams are of ids")
        return self.ngrams(input_ids, mask_of_positions(attention_mask, input_ids.shape[1]))


class TokenClassificationHead:
    """One label for every position."""

    def __init__(self, config):
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Logits (B, L, K); `labels` (B, L) hold -100 where nothing is predicted; an item is a labelled position.

        Without `attention_mask` no position is padding; batches of rows of different lengths need one.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else label_loss(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class QuestionAnsweringHead:
    """Start and end of the answer in a row.  Padding gets the lowest logits, so it is never part of an answer."""

    def __init__(self, config):
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits (B, L); positions (B,) outside the row are ignored; an item is a row.

        The loss is the mean of the cross-entropies of start and end.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))  # (B, L, 2)
        mask = mask_of_positions(attention_mask, logits.shape[1])
        if mask is not None:
            logits = logits.masked_fill(mask[..., None] == 0, torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = position_loss(start_logits, start_positions, num_items_in_batch)
            loss = (start_loss + position_loss(end_logits, end_positions, num_items_in_batch)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def position_loss(logits: torch.Tensor, positions: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy of logits (B, L) and positions (B,) or (B, 1); those outside [0, L) are ignored."""
    positions = positions.view(logits.shape[0])
    is_inside = (positions >= 0) & (positions < logits.shape[1])
    return label_loss(logits, positions.masked_fill(~is_inside, -100), num_items_in_batch)


def classification_loss(logits, labels, config, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy, binary cross-entropy or squared error, by `config.problem_type` (inferred like transformers).

    logits (B, K); labels (B,) integers, (B, K) of 0 and 1, or (B,) or (B, K) numbers.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        else:
            config.problem_type = "single_label_classification"
    if config.problem_type == "single_label_classification":
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        count = (labels != -100).sum().clamp(min=1)
    elif config.problem_type == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        count = labels.numel()
    else:
        total = F.mse_loss(logits.float().view(labels.shape), labels.float(), reduction="sum")
        count = labels.numel()
    return total / (count if num_items_in_batch is None else num_items_in_batch)


__all__ = [
    "CausalLMHead",
    "MaskedLMHead",
    "QuestionAnsweringHead",
    "SequenceClassificationHead",
    "SequenceClassificationOutput",
    "TokenClassificationHead",
    "check_input",
    "classification_loss",
    "label_loss",
    "last_position",
    "mean_position",
    "position_loss",
]
