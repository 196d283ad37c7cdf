"""A frozen base in 4 or 8 bits, under an adapter that is trained in full precision (QLoRA), by bitsandbytes.

Source: Dettmers et al. 2023, arXiv:2305.14314 (4 bits: NF4, its scales quantised, too); Dettmers et al. 2022,
arXiv:2208.07339 (8 bits: LLM.int8).  Both run on CUDA devices and on CPUs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from bmtk.errors import UserError

QUANTIZATIONS = ("4bit", "8bit")


def quantization(kind: str, skeleton: PreTrainedModel) -> BitsAndBytesConfig:
    """How `from_pretrained` quantises the trunk of a model like `skeleton`, which may be on the meta device.

    Left as they are: the head, which is trained, and embeddings, whose dtype stems read.
    Raises: UserError without bitsandbytes, and for 8 bits in a trunk whose layers read maps (B, H, W, D).
    """
    if not is_bitsandbytes_available():
        raise UserError(
            f"quantize={kind} needs bitsandbytes 0.46.1 or newer (this project's extra `quantize`): "
            "pip install -U bitsandbytes"
        )
    depthwise = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in skeleton.modules())
    if kind == "8bit" and depthwise:
        raise UserError(f"quantize=8bit multiplies sequences, and a {type(skeleton).__name__} holds maps; choose 4bit")
    return BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        llm_int8_skip_modules=[name for name, _ in _linear(skeleton) if _is_kept(name, skeleton)],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )


def quantize_subclasses(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Quantise what `from_pretrained` (5.23) passes by: linear layers of classes of their own, ours among them.

    Raises: UserError if nothing in the trunk is quantised then.
    """
    import bitsandbytes  # not among the dependencies

    for name, layer in list(_linear(model)):
        if type(layer) is not nn.Linear and type(layer).forward is nn.Linear.forward and not _is_kept(name, model):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _quantized(layer, config, bitsandbytes.nn))
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    if not any(isinstance(module, kinds) for module in model.modules()):
        raise UserError(f"quantize: the trunk of a {type(model).__name__} has no linear layers; leave it out")


def _quantized(layer: nn.Linear, config: BitsAndBytesConfig, kinds: Any) -> nn.Linear:
    shape: dict[str, Any] = {
        "input_features": layer.in_features,
        "output_features": layer.out_features,
        "device": "meta",
    }
    weight, shape["bias"] = layer.weight.data, False
    if config.load_in_4bit:
        settings = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
        new = kinds.Linear4bit(**shape, compute_dtype=config.bnb_4bit_compute_dtype, **settings)
        new.weight = kinds.Params4bit(weight, requires_grad=False, **settings)
    else:
        new = kinds.Linear8bitLt(**shape, has_fp16_weights=False, threshold=config.llm_int8_threshold)
        new.weight = kinds.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    quantized: nn.Linear = new.to(weight.device).train(layer.training)  # where bitsandbytes does it
    return quantized


def _linear(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _is_kept(name: str, model: PreTrainedModel) -> bool:
    return not name.startswith(f"{model.base_model_prefix}.") or "embed" in name.rpartition(".")[2]
