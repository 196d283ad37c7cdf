"""Waveforms to log-mel frames, with numpy only.  N samples, T frames, F mel bands.

Frames of `frame_length` samples every `hop_length`, a Hann window, power spectrum, mel bands (O'Shaughnessy 1987, the
scale of HTK), natural logarithm; then a recording is scaled to mean 0 and variance 1: all of it, so that its loudness
does not matter, or band by band, which removes its mean spectrum, too: that of the microphone, and of a short vowel.
"""

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function

FLOOR = 1e-10  # power below which a band counts as silent
VARIANCE_FLOOR = 1e-7


class BmFeatureExtractor(SequenceFeatureExtractor):
    """Recordings (N,) -> `input_features` (B, T, F) and `attention_mask` (B, T), padded with 0 on the right."""

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 80,  # mel bands
        sampling_rate: int = 16000,  # Hz
        frame_length: int = 400,  # samples: 25 ms
        hop_length: int = 160,  # samples: 10 ms
        do_normalize: bool = True,
        normalize_each_band: bool = True,  # over its frames; else all bands together
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        **kwargs,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.frame_length, self.hop_length = frame_length, hop_length
        self.do_normalize, self.normalize_each_band = do_normalize, normalize_each_band

    def __call__(
        self,
        raw_speech: np.ndarray | list,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """One recording (N,) or several; `kwargs` are those of `pad` (max_length, truncation, in frames).

        Raises: ValueError for another sampling rate than the model's, for two channels, and for an empty recording.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the recording has {sampling_rate} Hz, this model reads {self.sampling_rate} Hz; resample it first"
            )
        is_one = np.ndim(raw_speech[0]) == 0
        features = [self.frames(np.asarray(x, dtype=np.float32)) for x in ([raw_speech] if is_one else raw_speech)]
        return self.pad(
            BatchFeature({"input_features": features}), padding=padding, return_tensors=return_tensors, **kwargs
        )

    def frames(self, samples: np.ndarray) -> np.ndarray:
        """(N,) -> (T, F) with T = 1 + (N - frame_length) // hop_length; shorter recordings are padded with zeros."""
        if samples.ndim != 1 or not len(samples):
            raise ValueError(f"a recording has shape {samples.shape}; it must be (samples,), with one channel")
        samples = np.pad(samples, (0, max(0, self.frame_length - len(samples))))
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.frame_length)[:: self.hop_length]
        window, filters = self.tables()
        power = np.abs(np.fft.rfft(windows * window, n=self.num_bins, axis=1)) ** 2  # (T, num_bins / 2 + 1)
        features = np.log(np.maximum(power @ filters, FLOOR))
        if self.do_normalize:
            axis = 0 if self.normalize_each_band else None
            features = features - features.mean(axis)
            features = features / np.sqrt(features.var(axis) + VARIANCE_FLOOR)
        return features.astype(np.float32)

    @property
    def num_bins(self) -> int:
        """Length of the Fourier transform: the frame's, rounded up to a power of 2."""
        return 1 << (self.frame_length - 1).bit_length()

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Window (frame_length,) and mel filters (num_bins / 2 + 1, F); no attributes, so that they are not saved."""
        filters = mel_filter_bank(
            num_frequency_bins=self.num_bins // 2 + 1,
            num_mel_filters=self.feature_size,
            min_frequency=0.0,
            max_frequency=self.sampling_rate / 2,
            sampling_rate=self.sampling_rate,
            mel_scale="htk",
        )
        return window_function(self.frame_length, "hann"), filters


__all__ = ["BmFeatureExtractor"]
