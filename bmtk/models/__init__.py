"""The model families and their registration with the transformers Auto classes.

A family names its heads once, in the `auto_map` of its configuration class: the same map registers the classes here
and travels with every saved model, so that an uploaded repository resolves each head without bmtk.
"""

import importlib

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as ZERO_SHOT_IMAGE_CLASSIFIERS,  # lacks the dual encoder
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from .configuration_bm_cnn import BmCnnConfig
from .configuration_bm_rnn import BmRnnConfig
from .configuration_bm_transformer import BmTransformerConfig
from .feature_extraction_bm import BmFeatureExtractor
from .image_processing_bm import BmImageProcessor

FAMILIES = (BmCnnConfig, BmRnnConfig, BmTransformerConfig)
IMAGE_FAMILIES = (BmCnnConfig, BmTransformerConfig)


def register() -> None:
    """Register every family and head with its Auto class; calling it again changes nothing."""
    for config_class in FAMILIES:
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for auto_name, reference in config_class.heads.items():
            module, class_name = reference.split(".")
            model_class = getattr(importlib.import_module(f".{module}", __name__), class_name)
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_name)
        transformers.AutoFeatureExtractor.register(config_class, BmFeatureExtractor, exist_ok=True)
    BmFeatureExtractor.register_for_auto_class()
    ZERO_SHOT_IMAGE_CLASSIFIERS.setdefault("vision-text-dual-encoder", "VisionTextDualEncoderModel")
    register_image_processor()


def register_image_processor() -> None:
    BmImageProcessor.register_for_auto_class()
    for config_class in IMAGE_FAMILIES:
        transformers.AutoImageProcessor.register(
            config_class, image_processor_classes={"pil": BmImageProcessor}, exist_ok=True
        )
        # pipeline() guesses a video processor from the AutoImageProcessor in auto_map and would ask whether to run its
        # code; an entry without a class says that there is none (transformers 5.23).
        VIDEO_PROCESSOR_MAPPING.register(config_class, {}, exist_ok=True)
