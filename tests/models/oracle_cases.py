"""What the comparisons with oracles share: small shapes whose every term counts, and rows with padding."""

import torch
from torch import nn

TOLERANCE = 1e-5
VOCAB = 61
# The default 0.02 leaves attention nearly uniform: larger weights make every term count.
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "initializer_range": 0.2}  # fmt: skip
SEQ2SEQ = {
    **TINY, "vocab_size": VOCAB, "decoder_layers": 3, "hidden_act": "relu", "norm_type": "layer_norm",
    "position_embedding_type": "sinusoidal", "attention_bias": True, "mlp_bias": True, "scale_embedding": True,
    "is_encoder_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def shake(model: nn.Module) -> nn.Module:
    """Move biases and norm weights away from the 0 and 1 they start at, so that an oracle sees them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def padded_rows(side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (3, 10) and the mask of rows of 10, 7 and 3 real tokens."""
    ids = torch.randint(3, VOCAB, (3, 10))
    lengths, steps = torch.tensor([10, 7, 3])[:, None], torch.arange(10)[None]
    return ids, ((steps < lengths) if side == "right" else (steps >= 10 - lengths)).long()
