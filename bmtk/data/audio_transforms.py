"""What is done to recordings in training, so that no two epochs hear the same.  N samples, T frames, F mel bands.

To the samples: speed (Ko et al. 2015, Interspeech, sec. 2: resampled, so that pitch goes with it), shift, noise, gain.
To the frames: SpecAugment (Park et al. 2019, arXiv:1904.08779, sec. 2, without its time warping).
"""

from dataclasses import dataclass

import numpy as np

from bmtk.data.media import resampled
from bmtk.errors import UserError
from bmtk.settings import setting

LONGEST_TIME_MASK = 0.5  # of a recording: p of the paper's policies is 0.2 to 1


@dataclass
class AudioAugmentationArguments:
    """Changes that are drawn anew for each training row and epoch; 0 is none."""

    speed_change: float = setting(0.0, "speed is a factor from 1 - this to 1 + this; pitch goes with it")
    time_shift: float = setting(0.0, "seconds, at most, that are cut from the beginning or put before it, as silence")
    noise_snr: list[float] | None = setting(None, "white noise: lowest and highest signal-to-noise ratio, dB")
    noise_probability: float = setting(0.5, "share of recordings that get noise, if noise_snr is given")
    gain: float = setting(0.0, "dB, at most, that a recording is made louder or softer")
    time_masks: int = setting(0, "SpecAugment: stretches of time that are blanked")
    time_mask_size: int = setting(20, "frames of such a stretch, at most; never more than half of a recording")
    frequency_masks: int = setting(0, "SpecAugment: ranges of mel bands that are blanked")
    frequency_mask_size: int = setting(8, "bands of such a range, at most")

    def check_augmentation(self) -> None:
        for name in ("speed_change", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1 or self.speed_change == 1:
                raise UserError(f"{name}={getattr(self, name)} is not a share; choose between 0 and 1")
        names = ("time_shift", "gain", "time_masks", "time_mask_size", "frequency_masks", "frequency_mask_size")
        for name in names:
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if self.noise_snr is not None and (len(self.noise_snr) != 2 or self.noise_snr[0] > self.noise_snr[1]):
            raise UserError(f"noise_snr={self.noise_snr} must be two numbers, the lowest and the highest ratio in dB")

    @property
    def changes_samples(self) -> bool:
        return bool(self.speed_change or self.time_shift or self.noise_snr or self.gain)

    @property
    def changes_frames(self) -> bool:
        return bool(self.time_masks or self.frequency_masks)


def changed_samples(
    samples: np.ndarray, rate: int, args: AudioAugmentationArguments, draw: np.random.Generator
) -> np.ndarray:
    """Samples (N,) of `rate` Hz -> (M,), float32."""
    if args.speed_change:
        samples = resampled(samples, rate * draw.uniform(1 - args.speed_change, 1 + args.speed_change), rate)
    if args.time_shift:
        samples = shifted(samples, round(draw.uniform(-args.time_shift, args.time_shift) * rate))
    if args.noise_snr and draw.random() < args.noise_probability:
        samples = with_noise(samples, draw.uniform(args.noise_snr[0], args.noise_snr[1]), draw)
    if args.gain:
        samples = samples * 10 ** (draw.uniform(-args.gain, args.gain) / 20)
    return samples.astype(np.float32)


def shifted(samples: np.ndarray, count: int) -> np.ndarray:
    """`count` samples of silence before the first, or -`count` of its samples cut, but never more than half."""
    return np.pad(samples, (count, 0)) if count >= 0 else samples[min(-count, len(samples) // 2) :]


def with_noise(samples: np.ndarray, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """White noise is added, whose power is that of the whole recording less `ratio` dB."""
    power = np.mean(np.square(samples, dtype=np.float64)) / 10 ** (ratio / 10)
    return samples + draw.standard_normal(len(samples)) * np.sqrt(power)


def masked_frames(frames: np.ndarray, args: AudioAugmentationArguments, draw: np.random.Generator) -> np.ndarray:
    """A copy of (T, F) with stretches of time and ranges of bands set to the mean of each band."""
    mean = np.add.reduce(frames, axis=0) / len(frames)  # without the detours of `mean`, which take as long again
    frames = frames.copy()
    longest = min(args.time_mask_size, int(len(frames) * LONGEST_TIME_MASK))
    for _ in range(args.time_masks):
        first, last = _stretch(len(frames), longest, draw)
        frames[first:last] = mean
    for _ in range(args.frequency_masks):
        first, last = _stretch(frames.shape[1], min(args.frequency_mask_size, frames.shape[1]), draw)
        frames[:, first:last] = mean[first:last]
    return frames


def _stretch(length: int, longest: int, draw: np.random.Generator) -> tuple[int, int]:
    size = draw.integers(longest + 1)
    first = draw.integers(length - size + 1)
    return first, first + size
