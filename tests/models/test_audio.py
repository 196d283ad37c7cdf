"""Audio: log-mel frames against a Fourier sum and transformers, the stem's arithmetic, CTC against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from model_cases import AUDIO, CASES, padding
from transformers import AutoFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.models.feature_extraction_bm import FLOOR, BmFeatureExtractor
from bmtk.models.heads_audio_bm import ctc_loss
from bmtk.models.stems_audio_bm import AudioStem

TOLERANCE = 1e-5


def recording(num_samples: int, seed: int = 0) -> np.ndarray:
    """A tone over noise, float32 in about [-1, 1]."""
    random = np.random.default_rng(seed)
    return (0.5 * np.sin(np.arange(num_samples) / 7) + 0.1 * random.standard_normal(num_samples)).astype(np.float32)


# ------------------------------------------------------------------------------------ feature extraction


def test_features_equal_a_direct_fourier_sum():
    """One frame written out: window, sums of cosines and sines, triangles on the mel scale, logarithm."""
    extractor = BmFeatureExtractor(
        feature_size=6, sampling_rate=800, frame_length=20, hop_length=8, do_normalize=False
    )
    samples = recording(60).astype(np.float64)
    frame, num_bins = samples[16:36], 32
    windowed = [x * (0.5 - 0.5 * math.cos(2 * math.pi * n / 20)) for n, x in enumerate(frame)]
    power = []
    for k in range(num_bins // 2 + 1):
        angles = [2 * math.pi * k * n / num_bins for n in range(20)]
        real = sum(x * math.cos(a) for x, a in zip(windowed, angles, strict=True))
        imaginary = sum(x * math.sin(a) for x, a in zip(windowed, angles, strict=True))
        power.append(real**2 + imaginary**2)
    top = 2595 * math.log10(1 + 400 / 700)
    edges = [700 * (10 ** (top * i / 7 / 2595) - 1) for i in range(8)]  # Hz
    expected = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        hertz = [400 * k / (num_bins // 2) for k in range(num_bins // 2 + 1)]
        weights = [max(0.0, min((f - low) / (middle - low), (high - f) / (high - middle))) for f in hertz]
        expected.append(math.log(max(sum(w * p for w, p in zip(weights, power, strict=True)), FLOOR)))
    assert np.abs(extractor.frames(samples)[2] - expected).max() < 1e-4


def test_features_equal_transformers_spectrogram(record_property):
    extractor = BmFeatureExtractor(do_normalize=False)
    filters = mel_filter_bank(257, 80, 0.0, 8000.0, 16000, mel_scale="htk")
    samples = recording(16000)
    expected = spectrogram(
        samples, window_function(400, "hann"), 400, 160, fft_length=512, power=2.0, center=False, mel_filters=filters,
        mel_floor=FLOOR, log_mel="log",
    ).T  # fmt: skip
    found = extractor.frames(samples)
    assert found.shape == expected.shape == (98, 80)
    record_property("largest_oracle_difference", float(np.abs(found - expected).max()))
    assert np.abs(found - expected).max() < 1e-4


def test_normalised_features_ignore_padding_and_loudness():
    extractor = BmFeatureExtractor(feature_size=8)
    short, long = recording(4000, 1), recording(9000, 2)
    together = extractor([short, long], return_tensors="np")
    assert together["attention_mask"].sum(-1).tolist() == [23, 54]
    alone = extractor(short, return_tensors="np")["input_features"][0]
    assert np.array_equal(together["input_features"][0, :23], alone)
    assert not together["input_features"][0, 23:].any()
    assert np.abs(alone.mean(0)).max() < 1e-5
    assert np.abs(alone.std(0) - 1).max() < 1e-3
    assert np.abs(extractor.frames(3 * short) - alone).max() < 1e-3


def test_normalised_as_a_whole_features_ignore_loudness_and_keep_which_bands_are_loud():
    extractor = BmFeatureExtractor(feature_size=8, normalize_each_band=False)
    raw = BmFeatureExtractor(feature_size=8, do_normalize=False)
    samples = recording(4000)
    found, power = extractor.frames(samples), raw.frames(samples).astype(np.float64)
    assert np.abs(found - (power - power.mean()) / power.std()).max() < 1e-4
    assert np.abs(extractor.frames(3 * samples) - found).max() < 1e-3


def test_short_silent_and_wrong_recordings():
    extractor = BmFeatureExtractor(feature_size=8)
    assert extractor.frames(recording(10)).shape == (1, 8)
    assert np.isfinite(extractor.frames(np.zeros(4000))).all()
    whole = BmFeatureExtractor(feature_size=8, normalize_each_band=False)
    assert np.abs(whole.frames(np.zeros(4000))).max() < 1e-6
    with pytest.raises(ValueError, match="has 8000 Hz, this model reads 16000 Hz; resample it"):
        extractor(recording(4000), sampling_rate=8000)
    with pytest.raises(ValueError, match=r"shape \(2, 4000\); it must be \(samples,\)"):
        extractor([np.zeros((2, 4000))])
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        extractor([np.zeros(0)])


def test_the_extractor_is_loaded_as_it_was_saved(tmp_path):
    saved = BmFeatureExtractor(feature_size=8, sampling_rate=8000, frame_length=200, hop_length=80, do_normalize=False)
    saved.save_pretrained(tmp_path)
    BmTransformerConfig(**AUDIO).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    samples = recording(4000)
    assert np.array_equal(loaded(samples)["input_features"], saved(samples)["input_features"])
    assert (tmp_path / "feature_extraction_bm.py").is_file()
    assert loaded(samples, return_tensors="pt")["input_features"].dtype == torch.float32
    cut = loaded(samples, max_length=10, truncation=True, padding="max_length")
    assert cut["input_features"].shape == (1, 10, 8)


# ------------------------------------------------------------------------------------ stem


def test_lengths_are_what_the_convolutions_give():
    stem = AudioStem(BmTransformerConfig(**AUDIO))
    for num_frames in range(1, 41):
        positions, mask = stem.embed(torch.randn(1, num_frames, 8))
        assert mask is None
        assert positions.shape[1] == stem.output_lengths(num_frames) == -(-num_frames // 4)
    lengths = torch.tensor([1, 4, 5, 40])
    _, mask = stem.embed(torch.randn(4, 40, 8), padding(lengths.tolist(), 40))
    assert mask.sum(-1).tolist() == stem.output_lengths(lengths).tolist() == [1, 1, 2, 10]


def test_frames_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 9, 7\); num_mel_bins=8 wants \(rows, frames, 8\)"):
        CASES["transformer_audio-CTC"].model()(input_features=torch.randn(1, 9, 7))


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@torch.no_grad()
def test_position_embeddings_distinguish_equal_audio(positions):
    """Equal frames at different places of a recording get different logits."""
    model = CASES["transformer_audio-CTC"].model(position_embedding_type=positions)
    batch = {"input_features": torch.randn(1, 16, 8)}
    assert (
        model(**batch).logits[0] - model(input_features=batch["input_features"].flip(1)).logits[0].flip(0)
    ).std() > 1e-4


# ------------------------------------------------------------------------------------ CTC


def paths_of(labels: list[int], length: int, blank: int, num_tokens: int):
    """All sequences of `length` tokens that collapse to `labels`."""
    for path in itertools.product(range(num_tokens), repeat=length):
        merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
        if [token for token in merged if token != blank] == labels:
            yield path


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_loss_equals_the_sum_over_all_alignments(blank):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, requires_grad=True)
    lengths, labels = torch.tensor([5, 3, 4]), torch.tensor([[1, 1, 3], [3, -100, -100], [3, 1, -100]])
    log_probabilities = logits.log_softmax(-1)
    total = 0.0
    for row, length, row_labels in zip(log_probabilities, lengths.tolist(), labels.tolist(), strict=True):
        wanted = [label for label in row_labels if label != -100]
        scores = [sum(row[t, token] for t, token in enumerate(path)) for path in paths_of(wanted, length, blank, 4)]
        total = total - torch.stack(scores).logsumexp(0)
    found = ctc_loss(logits, lengths, labels, blank)
    assert abs(found - total / 6) <= TOLERANCE
    expected = torch.autograd.grad(total / 6, logits)[0]
    assert (torch.autograd.grad(found, logits)[0] - expected).abs().max() <= TOLERANCE


def test_labels_that_cannot_be_aligned_are_an_error():
    model = CASES["transformer_audio-CTC"].model()
    batch = {"input_features": torch.randn(2, 12, 8), "labels": torch.tensor([[3, 4, 5], [3, 3, 4]])}
    with pytest.raises(ValueError, match=r"rows \[1\] .* row 1 has 3 tokens, which need 4 positions, .* gives 3"):
        model(**batch)
    assert model(input_features=batch["input_features"][:1], labels=batch["labels"][:1]).loss.isfinite()
    with pytest.raises(ValueError, match=r"labels hold 0, the blank"):
        model(input_features=torch.randn(1, 40, 8), labels=torch.tensor([[3, 0]]))
    with pytest.raises(ValueError, match="stands on the right"):
        model(input_features=torch.randn(1, 40, 8), labels=torch.tensor([[-100, 3]]))
    with pytest.raises(ValueError, match="needs pad_token_id: it is the blank"):
        CASES["transformer_audio-CTC"].model(pad_token_id=None)


@torch.no_grad()
def test_padding_predicts_the_blank():
    """Greedy decoding of a batch needs no lengths, as pipelines rely on."""
    model, batch = CASES["transformer_audio-CTC"].model(), CASES["transformer_audio-CTC"].inputs()
    predicted = model(**batch).logits.argmax(-1)
    lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
    for row, length in zip(predicted, lengths, strict=True):
        assert not row[length:].any()
