"""Names of settings, ours to theirs, and of weights: patterns of theirs, without their trunk's prefix, to ours."""

CLASSIC_SETTINGS = {
    "norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True, "position_embedding_type": "learned",
}  # fmt: skip
_ENCODER_SETTINGS = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_hidden_layers", "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "hidden_act": "hidden_act", "norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob", "embedding_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob", "initializer_range": "initializer_range",
}  # fmt: skip
BERT_SETTINGS = {
    **_ENCODER_SETTINGS, "vocab_size": "vocab_size", "type_vocab_size": "type_vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
VIT_SETTINGS = {
    **_ENCODER_SETTINGS, "num_channels": "num_channels",
}  # fmt: skip
GPT2_SETTINGS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon",
    "hidden_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop", "attention_dropout": "attn_pdrop",
    "initializer_range": "initializer_range", "vocab_size": "vocab_size", "max_position_embeddings": "n_positions",
}  # fmt: skip
LLAMA_SETTINGS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_parameters",
    "intermediate_size", "max_position_embeddings", "attention_dropout", "initializer_range",
)  # fmt: skip
_IMAGE_SETTINGS = {name: name for name in ("num_channels", "hidden_sizes", "depths", "hidden_act")}
RESNET_SETTINGS = {
    **_IMAGE_SETTINGS, "stem_width": "embedding_size", "block_type": "layer_type", "out_features": "out_features",
    "downsample_in_bottleneck": "downsample_in_bottleneck",
}  # fmt: skip
CONVNEXT_SETTINGS = {
    **_IMAGE_SETTINGS, "drop_path_rate": "drop_path_rate", "layer_scale_init_value": "layer_scale_init_value",
    "initializer_range": "initializer_range",
}  # fmt: skip

BERT = {
    r"embeddings\.word_embeddings\.weight": "model.stem.embed_tokens.weight",
    r"embeddings\.position_embeddings\.weight": "model.stem.embed_positions.weight",
    r"embeddings\.token_type_embeddings\.weight": "model.stem.embed_types.weight",
    r"embeddings\.LayerNorm\.(\w+)": r"model.stem.norm.\1",
    r"encoder\.layer\.(\d+)\.attention\.self\.query\.(\w+)": r"model.layers.\1.self_attn.q_proj.\2",
    r"encoder\.layer\.(\d+)\.attention\.self\.key\.(\w+)": r"model.layers.\1.self_attn.k_proj.\2",
    r"encoder\.layer\.(\d+)\.attention\.self\.value\.(\w+)": r"model.layers.\1.self_attn.v_proj.\2",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"model.layers.\1.self_attn.o_proj.\2",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)": r"model.layers.\1.attention_norm.\2",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)": r"model.layers.\1.mlp.up_proj.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)": r"model.layers.\1.mlp.down_proj.\2",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(\w+)": r"model.layers.\1.mlp_norm.\2",
    r"pooler\.dense\.(\w+)": r"model.pooler.0.\1",
    r"cls\.predictions\.transform\.dense\.(\w+)": r"transform.0.\1",
    r"cls\.predictions\.transform\.LayerNorm\.(\w+)": r"transform.2.\1",
    r"cls\.predictions\.decoder\.(\w+)": r"lm_head.\1",
    r"cls\.predictions\.bias": "lm_head.bias",  # the decoder's, under its older name too
    r"classifier\.(\w+)": r"score.\1",
    r"qa_outputs\.(\w+)": r"qa_outputs.\1",
}
GPT2: dict[str, str | tuple[str, ...]] = {
    r"wte\.weight": "model.stem.embed_tokens.weight",
    r"wpe\.weight": "model.stem.embed_positions.weight",
    r"h\.(\d+)\.ln_1\.(\w+)": r"model.layers.\1.attention_norm.\2",
    r"h\.(\d+)\.attn\.c_attn\.(\w+)": tuple(rf"model.layers.\1.self_attn.{part}_proj.\2" for part in "qkv"),
    r"h\.(\d+)\.attn\.c_proj\.(\w+)": r"model.layers.\1.self_attn.o_proj.\2",
    r"h\.(\d+)\.ln_2\.(\w+)": r"model.layers.\1.mlp_norm.\2",
    r"h\.(\d+)\.mlp\.c_fc\.(\w+)": r"model.layers.\1.mlp.up_proj.\2",
    r"h\.(\d+)\.mlp\.c_proj\.(\w+)": r"model.layers.\1.mlp.down_proj.\2",
    r"ln_f\.(\w+)": r"model.norm.\1",
    r"lm_head\.weight": "lm_head.weight",
    r"score\.weight": "score.weight",
}
LLAMA = {
    r"embed_tokens\.weight": "model.stem.embed_tokens.weight",
    r"layers\.(\d+)\.self_attn\.(\w+)\.(\w+)": r"model.layers.\1.self_attn.\2.\3",
    r"layers\.(\d+)\.mlp\.(\w+)\.(\w+)": r"model.layers.\1.mlp.\2.\3",
    r"layers\.(\d+)\.input_layernorm\.weight": r"model.layers.\1.attention_norm.weight",
    r"layers\.(\d+)\.post_attention_layernorm\.weight": r"model.layers.\1.mlp_norm.weight",
    r"norm\.weight": "model.norm.weight",
    r"lm_head\.weight": "lm_head.weight",
    r"score\.weight": "score.weight",
}
VIT = {
    r"embeddings\.cls_token": "model.stem.embed_class.weight",
    r"embeddings\.position_embeddings": "model.stem.embed_positions.weight",
    r"embeddings\.patch_embeddings\.projection\.(\w+)": r"model.stem.embed_patches.\1",
    r"layers\.(\d+)\.attention\.([qkvo]_proj)\.(\w+)": r"model.layers.\1.self_attn.\2.\3",
    r"layers\.(\d+)\.layernorm_before\.(\w+)": r"model.layers.\1.attention_norm.\2",
    r"layers\.(\d+)\.layernorm_after\.(\w+)": r"model.layers.\1.mlp_norm.\2",
    r"layers\.(\d+)\.mlp\.fc1\.(\w+)": r"model.layers.\1.mlp.up_proj.\2",
    r"layers\.(\d+)\.mlp\.fc2\.(\w+)": r"model.layers.\1.mlp.down_proj.\2",
    r"layernorm\.(\w+)": r"model.norm.\1",
    r"pooler\.dense\.(\w+)": r"model.pooler.0.\1",
    r"classifier\.(\w+)": r"classifier.1.\1",
}
_BLOCK = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
RESNET = {  # with the running statistics of batch norms and the number of batches that they saw
    r"embedder\.embedder\.convolution\.(\w+)": r"model.stem.layers.0.0.\1",
    r"embedder\.embedder\.normalization\.(\w+)": r"model.stem.layers.0.1.\1",
    _BLOCK + r"layer\.(\d+)\.convolution\.(\w+)": r"model.stages.\1.blocks.\2.body.\3.0.\4",
    _BLOCK + r"layer\.(\d+)\.normalization\.(\w+)": r"model.stages.\1.blocks.\2.body.\3.1.\4",
    _BLOCK + r"shortcut\.convolution\.(\w+)": r"model.stages.\1.blocks.\2.shortcut.0.\3",
    _BLOCK + r"shortcut\.normalization\.(\w+)": r"model.stages.\1.blocks.\2.shortcut.1.\3",
    r"classifier\.1\.(\w+)": r"classifier.1.\1",
}
CONVNEXT = {
    r"embeddings\.patch_embeddings\.(\w+)": r"model.stem.layers.0.\1",
    r"embeddings\.layernorm\.(\w+)": r"model.stem.layers.1.\1",
    r"encoder\.stages\.(\d+)\.downsampling_layer\.([01])\.(\w+)": r"model.stages.\1.downsample.\2.\3",
    _BLOCK + r"dwconv\.(\w+)": r"model.stages.\1.blocks.\2.depthwise.\3",
    _BLOCK + r"layernorm\.(\w+)": r"model.stages.\1.blocks.\2.norm.\3",
    _BLOCK + r"pwconv1\.(\w+)": r"model.stages.\1.blocks.\2.up.\3",
    _BLOCK + r"pwconv2\.(\w+)": r"model.stages.\1.blocks.\2.down.\3",
    _BLOCK + r"layer_scale_parameter": r"model.stages.\1.blocks.\2.layer_scale",
    r"layernorm\.(\w+)": r"model.norm.\1",
    r"classifier\.(\w+)": r"classifier.1.\1",
}
