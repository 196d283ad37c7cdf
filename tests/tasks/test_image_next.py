"""What an image run prints as `next:` runs as it stands, and asks nothing."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from bmtk.tasks.figures import png_of_pixels

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path):
    for split, count in (("train", 8), ("test", 2)):
        for label, value in (("dark", 20), ("light", 220)):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                colour = (value + index, value, 2 * index + (split == "test"))
                PIL.Image.new("RGB", (20, 20), colour).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.mark.slow
def test_the_next_command_of_an_image_run_runs_and_asks_nothing(tmp_path, pictures, capsys, seed_argv):
    from recipes import finetune

    given = ["--task", "image_classification", "--preset", "smoke", "--dataset", str(pictures), "--max_steps", "2"]
    finetune.main([*given, "--validation_fraction", "0.25", "--output_dir", str(tmp_path / "run"), *seed_argv])
    command = capsys.readouterr().out.split("next: ")[-1].strip()
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    run = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "[y/N]" not in run.stdout + run.stderr
    assert "'label': '" in run.stdout


def test_an_image_is_a_png_of_its_own_pixels():
    import base64
    import io

    for channels in (1, 3):
        pixels = np.arange(channels * 6, dtype=np.uint8).reshape(channels, 2, 3)
        image = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(png_of_pixels(pixels)))))
        assert np.array_equal(image if channels == 1 else np.moveaxis(image, -1, 0), pixels.squeeze())
