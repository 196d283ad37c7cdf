"""Write the made-up whistled language beside this file: python recipes/data/tones/make_tones.py

A letter is a tone of its own pitch, a word two letters, a saying one or two words with a pause between them.  It is
played on one of two instruments: a flute (pure tones) or a reed (four overtones).  Length, pitch and
loudness vary, and there is some noise.  8-bit WAV files of 8 kHz; metadata.csv has columns
transcription and label.
"""

import csv
import math
import random
import struct
import wave
from pathlib import Path

RATE = 8000  # samples per second
PITCHES = {"a": 400, "e": 600, "i": 880, "o": 1250, "u": 1750}  # Hz
WORDS = ("ae", "ia", "io", "eu", "oe", "ui")
OVERTONES = {"flute": (1.0,), "reed": (0.3, 0.2, 0.2, 0.15, 0.15)}
LETTER, PAUSE = 0.09, 0.1  # seconds
SIZES = {"train": 58, "validation": 12, "test": 12}


def saying(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.choice((1, 1, 2, 2, 2))))


def samples(text: str, instrument: str, draw: random.Random) -> list[float]:
    """The sound of a saying in [-1, 1], every letter faded in and out."""
    pitch, loudness = draw.uniform(0.96, 1.04), draw.uniform(0.3, 0.7)
    before, after = ([0.0] * round(RATE * draw.uniform(0.02, 0.05)) for _ in range(2))
    sound = before
    for character in text:
        length = round(RATE * (PAUSE if character == " " else LETTER) * draw.uniform(0.85, 1.15))
        step = 2 * math.pi * PITCHES.get(character, 0) * pitch / RATE
        shares = [share for k, share in enumerate(OVERTONES[instrument]) if step * (k + 1) < math.pi]  # below RATE / 2
        for n in range(length):
            fade = loudness * min(1.0, n / 80, (length - n) / 80)
            waves = (share * math.sin(step * (k + 1) * n) for k, share in enumerate(shares))
            sound.append(fade * sum(waves))
    return [sample + draw.gauss(0, 0.01) for sample in sound + after]


def write_wave(path: Path, sound: list[float]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(RATE)
        levels = (max(0, min(255, round(128 + 127 * sample))) for sample in sound)
        file.writeframes(struct.pack(f"{len(sound)}B", *levels))


def main(folder: Path) -> None:
    draw = random.Random(0)
    for split, size in SIZES.items():
        (folder / split).mkdir(exist_ok=True)
        with (folder / split / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file_name", "transcription", "label"])
            for number in range(size):
                text, label = saying(draw), draw.choice(list(OVERTONES))
                write_wave(folder / split / f"{number:02d}.wav", samples(text, label, draw))
                writer.writerow([f"{number:02d}.wav", text, label])


if __name__ == "__main__":
    main(Path(__file__).parent)
