"""The model families and their registration with the transformers Auto classes.

A family names its heads once, in the `auto_map` of its configuration class: the same map registers the classes here
and travels with every saved model, so that an uploaded repository resolves each head without bmtk.

`bmtk.registration` calls what is in `AFTER_IMPORT_OF` when the module of that name has been imported, which may be in
the middle of another import: what a function needs, it imports itself, and a head is imported when it is asked for.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import transformers

from .configuration_bm_cnn import BmCnnConfig
from .configuration_bm_rnn import BmRnnConfig
from .configuration_bm_transformer import BmTransformerConfig

FAMILIES = (BmCnnConfig, BmRnnConfig, BmTransformerConfig)
IMAGE_FAMILIES = (BmCnnConfig, BmTransformerConfig)


class HeadClasses(dict[type, Any]):
    """Configuration class -> class of one Auto class.  A reference, "module.Class", is imported when it is read."""

    def __getitem__(self, config_class: type) -> Any:
        found = super().__getitem__(config_class)
        if isinstance(found, str):
            found = self[config_class] = _head_class(found)
        return found

    def values(self) -> Any:
        return [self[config_class] for config_class in self]

    def items(self) -> Any:
        return [(config_class, self[config_class]) for config_class in self]


def _head_class(reference: str) -> Any:
    module, class_name = reference.split(".")
    return getattr(importlib.import_module(f".{module}", __name__), class_name)


def register_configurations() -> None:
    for config_class in FAMILIES:
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()


def register_models() -> None:
    from transformers.models.auto import modeling_auto

    for config_class in FAMILIES:
        for auto_name, reference in config_class.heads.items():
            # `register` of an Auto class takes a class, not its name (transformers 5.23).  The modules of the heads
            # import others that may be asking for the Auto classes at this moment.
            mapping = getattr(modeling_auto, auto_name)._model_mapping
            if not isinstance(mapping._extra_content, HeadClasses):
                mapping._extra_content = HeadClasses(mapping._extra_content)
            mapping._extra_content.setdefault(config_class, reference)
    # The dual encoder is missing there.
    missing = modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    missing.setdefault("vision-text-dual-encoder", "VisionTextDualEncoderModel")


def mark_heads(config_class: Any) -> None:
    """Have the heads of a family saved with their code and the Auto class that loads them."""
    for auto_name, reference in config_class.heads.items():
        _head_class(reference).register_for_auto_class(auto_name)


def register_feature_extractors() -> None:
    from .feature_extraction_bm import BmFeatureExtractor

    BmFeatureExtractor.register_for_auto_class()
    for config_class in FAMILIES:
        transformers.AutoFeatureExtractor.register(config_class, BmFeatureExtractor, exist_ok=True)


def register_image_processors() -> None:
    from .image_processing_bm import BmImageProcessor

    BmImageProcessor.register_for_auto_class()
    for config_class in IMAGE_FAMILIES:
        transformers.AutoImageProcessor.register(
            config_class, image_processor_classes={"pil": BmImageProcessor}, exist_ok=True
        )


def register_video_processors() -> None:
    """An entry without a class: there is none.

    pipeline() guesses a video processor from the AutoImageProcessor in auto_map, and would ask whether to run its code
    (transformers 5.23).
    """
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    for config_class in IMAGE_FAMILIES:
        VIDEO_PROCESSOR_MAPPING.register(config_class, {}, exist_ok=True)


AFTER_IMPORT_OF: dict[str, Callable[[], None]] = {
    **{f"modeling_{config_class.model_type}": partial(mark_heads, config_class) for config_class in FAMILIES},
    "configuration_auto": register_configurations,
    "modeling_auto": register_models,
    "feature_extraction_auto": register_feature_extractors,
    "image_processing_auto": register_image_processors,
    "video_processing_auto": register_video_processors,
}
