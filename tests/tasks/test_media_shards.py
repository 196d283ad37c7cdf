"""Images and recordings in shards: the same batches from each container and number of workers, and little memory."""

import io
import json
import signal
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from bmtk.data.image_transforms import Augmentation
from bmtk.data.tables import read_splits
from bmtk.errors import UserError
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.tasks import audio_classification, image_classification
from bmtk.training import callbacks
from recipes import finetune

SIDE, RATE = 8, 8000
CHANGES = {"random_crop": 2, "horizontal_flip": True, "rand_augment": 1, "colour_jitter": 0.2, "random_erasing": 0.5}
CONTAINERS = ("parquet", "tar", "folder")
SHARDS = 3


def png(draw: np.random.Generator, side: int = SIDE) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(draw.integers(256, size=(side, side, 3), dtype=np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def wav(draw: np.random.Generator) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, draw.uniform(-0.5, 0.5, int(draw.integers(800, 1600))), RATE, format="WAV")
    return file.getvalue()


def write_shards(folder: Path, split: str, contents: list[bytes], container: str, kind: str = "image") -> None:
    """Rows of `contents`, labelled by turns, in three files, or in a folder with metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = {"image": "png", "audio": "wav"}[kind]
    for number, rows in enumerate(np.array_split(np.arange(len(contents)), SHARDS)):
        if container == "parquet":
            values = [{"bytes": contents[row], "path": f"{row}.{suffix}"} for row in rows]
            table = pyarrow.table({kind: values, "label": ["ab"[row % 2] for row in rows]})
            pyarrow.parquet.write_table(table, folder / f"{split}-{number:03}.parquet", row_group_size=50)
        elif container == "tar":
            with tarfile.open(folder / f"{split}-{number:03}.tar", "w") as archive:
                for row in rows:
                    for name, content in ((suffix, contents[row]), ("cls", "ab"[row % 2].encode())):
                        member = tarfile.TarInfo(f"{row:05}.{name}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        else:
            place = folder / split
            place.mkdir(exist_ok=True)
            with (place / "metadata.jsonl").open("a") as file:
                for row in rows:
                    (place / f"{row}.{suffix}").write_bytes(contents[row])
                    file.write(json.dumps({"file_name": f"{row}.{suffix}", "label": "ab"[row % 2]}) + "\n")


def images(folder: Path, **settings):
    args = image_classification.ImageClassificationArguments(dataset=str(folder), cache_megabytes=0, **settings)
    data = image_classification.TASK.read(args, splits=("train", "validation"))
    return data.bind(BmCnnConfig(image_size=SIDE, hidden_sizes=[4], depths=[1], **data.config_fields))


def recordings(folder: Path, **settings):
    args = audio_classification.AudioClassificationArguments(dataset=str(folder), sampling_rate=RATE, **settings)
    data = audio_classification.TASK.read(args, splits=("train", "validation"))
    return data.bind(
        BmCnnConfig(**{**data.config_fields, "hidden_size": 8, "num_hidden_layers": 1, "num_mel_bins": 12})
    )


@pytest.mark.parametrize("container", CONTAINERS)
def test_training_images_are_those_of_their_shards_whoever_decodes_them(tmp_path, container):
    contents = [png(np.random.default_rng(row)) for row in range(14)]
    write_shards(tmp_path, "train", contents[:10], container)
    write_shards(tmp_path, "validation", contents[10:], container)
    rows, order = images(tmp_path, **CHANGES).rows["train"], [3, 9, 0, 7, 1, 4]
    plain = [np.moveaxis(np.asarray(PIL.Image.open(io.BytesIO(content))), -1, 0) for content in contents]
    for epoch in (0, 4):
        draws = [np.random.default_rng((42, epoch, row)) for row in order]
        expected = [Augmentation(**CHANGES)(plain[row], draw) for row, draw in zip(order, draws, strict=True)]
        rows.set_epoch(epoch)
        for workers in (0, 1, 2):
            loader = DataLoader(rows, 2, sampler=order, collate_fn=list, num_workers=workers)
            found = [row for batch in loader for row in batch]
            assert all(np.array_equal(row["pixels"], one) for row, one in zip(found, expected, strict=True))
            assert [row["labels"] for row in found] == [row % 2 for row in order]


@pytest.mark.parametrize("container", CONTAINERS)
def test_held_out_rows_and_the_rest_keep_their_images(tmp_path, container):
    contents = [png(np.random.default_rng(row)) for row in range(20)]
    write_shards(tmp_path, "train", contents, container)
    objective = images(tmp_path, validation_fraction=0.3)
    plain = {np.asarray(PIL.Image.open(io.BytesIO(content))).tobytes(): row for row, content in enumerate(contents)}
    seen = []
    for split in ("train", "validation"):
        rows = objective.rows[split]
        found = [plain[np.moveaxis(row["pixels"], 0, -1).tobytes()] for row in rows.__getitems__(range(len(rows)))]
        assert [row["labels"] for row in rows.__getitems__(range(len(rows)))] == [row % 2 for row in found]
        seen += found
    assert len(objective.rows["validation"]) == 6
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("container", CONTAINERS)
def test_recordings_are_those_of_their_shards_whoever_decodes_them(tmp_path, container):
    contents = [wav(np.random.default_rng(row)) for row in range(10)]
    write_shards(tmp_path, "train", contents[:7], container, "audio")
    write_shards(tmp_path, "validation", contents[7:], container, "audio")
    plain, order = recordings(tmp_path), [3, 0, 6, 5]
    samples = [soundfile.read(io.BytesIO(content), dtype="float32")[0] for content in contents]
    assert all(np.array_equal(plain.rows["train"].recording(row), samples[row]) for row in order)
    assert all(np.array_equal(plain.rows["validation"].recording(row), samples[7 + row]) for row in range(3))
    rows = recordings(tmp_path, speed_change=0.2, noise_snr=[10, 20], frequency_masks=1).rows["train"]
    rows.set_epoch(3)
    expected = [rows[row]["input_features"] for row in order]
    unchanged = [plain.rows["train"][row]["input_features"] for row in order]
    assert not any(map(np.array_equal, expected, unchanged))
    for workers in (1, 2):
        loader = DataLoader(rows, 2, sampler=order, collate_fn=list, num_workers=workers)
        found = [row for batch in loader for row in batch]
        assert all(np.array_equal(row["input_features"], one) for row, one in zip(found, expected, strict=True))
        assert [row["labels"] for row in found] == [row % 2 for row in order]


@pytest.mark.parametrize("container", ["parquet", "tar"])
def test_memory_does_not_grow_with_the_images(tmp_path, container):
    """Of 10 MB of images, of which a selection is trained on, Arrow holds none, and Python those of one batch."""
    draw = np.random.default_rng(0)
    write_shards(tmp_path, "train", [png(draw, side=128) for _ in range(200)], container)
    read_splits(str(tmp_path), files={})  # Parquet is copied to the cache of `datasets`, a group of rows at a time
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    objective = images(tmp_path, validation_fraction=0.2)
    rows = objective.rows["train"]
    held = pyarrow.total_allocated_bytes() - before
    for start in range(0, len(rows), 8):
        rows.__getitems__(range(start, start + 8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 160
    assert held < 1e6
    assert peak < 5e6


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_what_is_no_image_is_named(tmp_path, kind):
    content, read = {"image": (png, images), "audio": (wav, recordings)}[kind]
    values = [{"bytes": content(np.random.default_rng(row)), "path": None} for row in range(3)]
    for split, rows in (("train", [values[0], values[1], None]), ("validation", values[2:])):
        table = pyarrow.table({kind: rows, "label": ["a", "b", "a"][: len(rows)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    noun = {"image": "image", "audio": "recording"}[kind]
    with pytest.raises(UserError, match=rf"{kind}_column='{kind}' of train row 3 holds a NoneType, no {noun}"):
        read(tmp_path)
    with pytest.raises(UserError, match=rf"{kind}_column='label' of train row 1 holds a str, no {noun}"):
        read(tmp_path, **{f"{kind}_column": "label"})


@pytest.mark.slow
def test_a_stopped_run_over_archives_goes_on_to_the_very_same_weights(tmp_path, monkeypatch):
    draw = np.random.default_rng(1)
    write_shards(tmp_path / "data", "train", [png(draw) for _ in range(20)], "tar")
    write_shards(tmp_path / "data", "validation", [png(draw) for _ in range(4)], "tar")
    shards = str(tmp_path / "data" / "{train,validation}-{000..002}.tar")
    argv = ["--preset", "smoke", "--task", "image_classification", "--dataset", shards]
    argv += ["--image_size", "8", "--cache_megabytes", "0", "--max_steps", "7", "--batch_size", "8", "--mixup", "0.3"]
    argv += ["--logging_steps", "1", "--eval_strategy", "no", "--disable_tqdm", "true"]

    def run(name, workers):
        finetune.main([*argv, "--output_dir", str(tmp_path / name), "--dataloader_num_workers", str(workers)])
        return load_file(tmp_path / name / "model.safetensors")

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 4:  # in the second epoch of three steps each
            signal.raise_signal(signal.SIGTERM)

    whole = run("whole", 0)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RecordHistory, "on_step_end", stop, raising=False)
        with pytest.raises(SystemExit):
            run("stopped", 2)
    resumed = run("stopped", 1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
