"""Tasks: how rows become batches and outputs become metrics.  One file each; recipes know them only through TASKS."""

from .audio_classification import AudioClassification
from .causal_lm import CausalLM
from .denoising import Denoising
from .image_classification import ImageClassification
from .image_text_contrastive import ImageTextContrastive
from .masked_image_modeling import MaskedImageModeling
from .masked_lm import MaskedLM
from .object_detection import ObjectDetection
from .question_answering import QuestionAnswering
from .sequence_classification import SequenceClassification
from .speech_recognition import SpeechRecognition
from .time_series_forecasting import TimeSeriesForecasting
from .token_classification import TokenClassification
from .translation import Translation

TASKS = {
    "audio_classification": AudioClassification,
    "causal_lm": CausalLM,
    "denoising": Denoising,
    "image_classification": ImageClassification,
    "image_text_contrastive": ImageTextContrastive,
    "masked_image_modeling": MaskedImageModeling,
    "masked_lm": MaskedLM,
    "object_detection": ObjectDetection,
    "question_answering": QuestionAnswering,
    "sequence_classification": SequenceClassification,
    "speech_recognition": SpeechRecognition,
    "time_series_forecasting": TimeSeriesForecasting,
    "token_classification": TokenClassification,
    "translation": Translation,
}


def task_named(name: object) -> type:
    """The class of a task.  Raises: ValueError that lists the tasks there are."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]
