"""Image classification: what becomes of pixels, labels and losses, and one run from a config file to a pipeline."""

import base64
import csv
import io
import json
import runpy
import shutil
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ResNetConfig,
    ViTConfig,
    pipeline,
)

from bmtk.data.media import in_colour
from bmtk.data.tables import read_all
from bmtk.errors import UserError
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.tasks.image_classification import TASK, ImageClassificationArguments, mixed_labels
from bmtk.training import callbacks
from bmtk.training.finetuning_arguments import FineTuningArguments
from bmtk.training.trainer import build_trainer, lay_out_channels_last
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "recipes" / "data" / "shapes"
ALL = {"random_crop": 2, "horizontal_flip": True, "rand_augment": 1, "colour_jitter": 0.2, "random_erasing": 0.5}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def noise(mode="RGB", size=(12, 10), seed=0):
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(256, size=(size[1], size[0], channels), dtype=np.uint8)
    return PIL.Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


def write_images(folder, images, labels=("cat", "dog")):
    """`folder`/label/number.png, the labels by turns."""
    for number, image in enumerate(images):
        path = folder / labels[number % len(labels)] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def bound(tmp_path, images=None, *, config=None, splits=("train", "validation"), **settings):
    """A folder of images, for a small bm_cnn (or `config`) to read."""
    images = images or [noise(seed=seed) for seed in range(8)]
    if not (tmp_path / "train").exists():
        write_images(tmp_path / "train", images)
        write_images(tmp_path / "validation", [noise(seed=seed) for seed in (100, 101)])
    data = TASK.read(ImageClassificationArguments(dataset=str(tmp_path), **settings), splits=splits)
    return data.bind(config or BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1]))


def batches(objective, size=4, workers=0, order=None, epoch=None):
    rows = objective.rows["train"]
    if epoch is not None:
        rows.set_epoch(epoch)
    loader = DataLoader(rows, size, sampler=order, collate_fn=objective.collator(), num_workers=workers)
    return list(loader)


def pixels_by_row(objective, order, **options):
    """Row -> its pixels, whatever order the rows came in."""
    pixels = torch.cat([batch["pixel_values"] for batch in batches(objective, order=order, **options)])
    return dict(zip(order, pixels, strict=True))


# Pixels --------------------------------------------------------------------------------------------------------------

KINDS = [noise("L"), noise("RGB"), noise("RGBA"), noise("RGB").convert("P"), noise("LA"), noise("RGB", (8, 8))]


@pytest.mark.parametrize("megabytes", [1024, 0], ids=["kept", "decoded every time"])
@pytest.mark.parametrize(
    "config",
    [
        BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1]),
        BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1], num_channels=1),
        ViTConfig(),
        ResNetConfig(),
    ],
    ids=["colour", "greyscale", "vit", "centre crop"],
)
def test_pixels_are_the_very_ones_of_the_processor(tmp_path, config, megabytes):
    objective = bound(tmp_path, KINDS, config=config, cache_megabytes=megabytes)
    images = [PIL.Image.open(path) for path, _ in sorted_files(tmp_path / "train")]
    if config.model_type != "bm_cnn":  # their processors know no other images
        images = [in_colour(image) for image in images]
    theirs = objective.processor(images, return_tensors="pt")["pixel_values"]
    ours = torch.cat([batch["pixel_values"] for batch in batches(objective)])
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert (objective.rows["train"].kept is None) == (megabytes == 0)


def sorted_files(folder):
    return [(path, path.parent.name) for path in sorted(folder.rglob("*.png"))]


def test_transparent_pixels_are_white_in_colour_and_in_grey(tmp_path):
    clear = PIL.Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    for channels in (1, 3):
        config = BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1], num_channels=channels)
        objective = bound(tmp_path, [clear, noise()], config=config)
        assert (objective.rows["train"][0]["pixels"] == 255).all()
    assert "50.0% partly transparent, put on white" in "; ".join(objective.notes)


def test_images_of_12_bits_are_what_8_bit_copies_are_from_training_to_prediction(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (8, 10, 12))
    values[0, 0, :2] = 0, 4095
    deep = [PIL.Image.fromarray(one.astype(np.uint16)) for one in values]
    shallow = [PIL.Image.fromarray(np.rint(one / 4095 * 255).astype(np.uint8)) for one in values]
    found = {}
    for name, images in (("deep", deep), ("shallow", shallow)):
        for split in ("train", "validation"):
            write_images(tmp_path / name / split, images if split == "train" else images[:2])
        found[name] = bound(tmp_path / name, leakage="allow")
    assert np.array_equal(found["deep"].rows["train"].kept, found["shallow"].rows["train"].kept)
    notes = " ".join(found["deep"].notes)
    assert "hold whole numbers from 0 to 4095: 0 is read as black and 4095 as white" in notes
    assert "16-bit greyscale" in notes
    # a saved processor and the model's own folder make the same of an image whose own values are few
    dark = PIL.Image.fromarray((values[1] // 16).astype(np.uint16))
    grey = PIL.Image.fromarray(np.rint((values[1] // 16) / 4095 * 255).astype(np.uint8))
    model = tmp_path / "model"
    found["deep"].processor.save_pretrained(model)
    found["deep"].config.save_pretrained(model)
    data = TASK.read(ImageClassificationArguments(), splits=(), model=str(model))
    objective = data.bind(found["deep"].config)
    assert objective.processor.image_range == [0, 4095]
    dark.save(tmp_path / "dark.png")
    rows = objective.encode_inputs(read_all(str(tmp_path / "dark.png"), option="input"))
    batch = objective.collator()([rows[0]])["pixel_values"]
    for image in (dark, grey):
        expected = objective.processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(batch, expected)


def test_images_that_show_nothing_are_warned_of(tmp_path):
    flat = [PIL.Image.new("RGB", (12, 10), (number, 9, 9)) for number in range(5)]
    objective = bound(tmp_path, images=[*flat, *(noise(seed=seed) for seed in range(3))])
    (note,) = (note for note in objective.notes if "nearly of one colour" in note)
    assert note.startswith("62% of the train images looked at are nearly of one colour")
    assert not any("nearly of one colour" in note for note in bound(tmp_path / "other").notes)
    with pytest.raises(UserError, match=r"image_range=\[9\.0, 1\.0\] must be two numbers, black and white"):
        ImageClassificationArguments(image_range=[9.0, 1.0])


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    upright = PIL.Image.new("L", (8, 8))
    upright.paste(255, (0, 0, 8, 4))
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "turned.png")}] * 2, "label": ["a", "b"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    args = ImageClassificationArguments(train_file=[str(tmp_path / "train.parquet")], leakage="allow")
    config = BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1], num_channels=1)
    objective = TASK.read(args, splits=["train"]).bind(config)
    assert np.array_equal(objective.rows["train"][0]["pixels"][0], np.asarray(upright))


def test_a_new_processor_normalises_by_the_training_images(tmp_path):
    for megabytes in (1024, 0):
        objective = bound(tmp_path, cache_megabytes=megabytes)
        paths = [path for path, _ in sorted_files(tmp_path / "train")]
        raw = objective.processor([PIL.Image.open(path) for path in paths], do_normalize=False, return_tensors="np")
        values = raw["pixel_values"].astype(np.float64)
        assert objective.processor.image_mean == pytest.approx(values.mean((0, 2, 3)), abs=6e-5)
        assert objective.processor.image_std == pytest.approx(values.std((0, 2, 3)), abs=6e-5)
        pixels = torch.cat([batch["pixel_values"] for batch in batches(objective)])
        assert pixels.mean((0, 2, 3)).abs().max() < 1e-3
        assert torch.allclose(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-3)


def test_images_of_one_colour_do_not_divide_by_zero(tmp_path):
    images = [PIL.Image.new("RGB", (8, 8), (10 + i // 4, 20, 30)) for i in range(8)]
    write_images(
        tmp_path / "train", [PIL.Image.new("RGB", (8, 8), (10, 20, 30)), PIL.Image.new("RGB", (9, 9), (10, 20, 30))]
    )
    write_images(tmp_path / "validation", images[4:6])
    pixels = batches(bound(tmp_path))[0]["pixel_values"]
    assert torch.isfinite(pixels).all()


def test_a_model_keeps_its_own_processor(tmp_path):
    first = bound(tmp_path)
    first.processor.save_pretrained(tmp_path / "model")
    args = ImageClassificationArguments(dataset=str(tmp_path))
    (tmp_path / "train" / "cat" / "000.png").unlink()
    data = TASK.read(args, model=str(tmp_path / "model"))
    second = data.bind(BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1]))
    assert list(second.processor.image_mean) == first.processor.image_mean
    assert not any("are normalised by" in note for note in second.notes)


def test_the_notes_say_what_the_images_are(tmp_path):
    notes = bound(tmp_path, [noise("L", (6, 6)), *[noise("RGB", (20, 8 + i), seed=i) for i in range(3)]]).notes
    assert (
        "training images: 75.0% colour, 25.0% greyscale; 6 to 20 pixels wide, mostly about 20 x 8; the model reads "
        "8 x 8: 75.0% are made smaller and 25.0% larger"
    ) in notes
    assert "the 4 train images are decoded once and kept in memory (0.0 MB)" in notes
    assert (
        "the train images would take 0.0 MB: they are decoded every time (cache_megabytes)"
        in bound(tmp_path, cache_megabytes=0).notes
    )


# Augmentation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [ALL, {**ALL, "mixup": 0.5, "cutmix": 1.0}], ids=["changed", "mixed"])
def test_what_a_row_becomes_depends_on_seed_epoch_and_row_alone(tmp_path, settings):
    objective, order = bound(tmp_path, **settings), [3, 0, 7, 1, 2, 6, 5, 4]
    once = pixels_by_row(objective, range(8), epoch=2)
    other = pixels_by_row(objective, order, epoch=2, size=3, workers=2)
    uncached = pixels_by_row(bound(tmp_path, **settings, cache_megabytes=0), order, epoch=2, size=5)
    assert all(torch.equal(once[row], other[row]) and torch.equal(once[row], uncached[row]) for row in range(8))
    next_epoch = pixels_by_row(objective, range(8), epoch=3)
    assert sum(torch.equal(once[row], next_epoch[row]) for row in range(8)) <= 1
    args = ImageClassificationArguments(dataset=str(tmp_path), **settings)
    data = TASK.read(args, seed=1, splits=["train", "validation"])
    other_seed = data.bind(BmCnnConfig(image_size=8, hidden_sizes=[4], depths=[1]))
    assert not torch.equal(once[0], pixels_by_row(other_seed, range(8), epoch=2)[0])


def test_workers_that_outlive_an_epoch_know_the_next_one(tmp_path):
    objective = bound(tmp_path, **ALL)
    rows = objective.rows["train"]
    loader = DataLoader(rows, 8, collate_fn=objective.collator(), num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        (batch,) = list(loader)
        assert torch.equal(batch["pixel_values"], batches(objective, 8, epoch=epoch)[0]["pixel_values"])


def test_nothing_is_augmented_but_training(tmp_path):
    objective, plain = bound(tmp_path, **ALL, mixup=1.0), bound(tmp_path)
    assert torch.equal(batches(objective)[0]["pixel_values"], batches(plain)[0]["pixel_values"])
    assert batches(objective)[0]["labels"].ndim == 1
    assert objective.rows["validation"].augmentation is None
    assert plain.rows["train"].augmentation is None
    assert not torch.equal(batches(objective, epoch=0)[0]["pixel_values"], batches(plain, epoch=0)[0]["pixel_values"])


def test_a_mixed_row_holds_both_images_and_labels_in_its_share(tmp_path):
    objective = bound(tmp_path, mixup=1.0)
    plain = torch.cat([batch["pixel_values"] for batch in batches(bound(tmp_path))])
    rows = objective.rows["train"]
    rows.set_epoch(0)
    found = [rows[row] for row in range(8)]
    batch = objective.collator()(found)
    step = 1 / 255 / min(objective.processor.image_std)  # pixels stay whole numbers
    for row, mixed in enumerate(found):
        other = next(i for i in range(8) if np.array_equal(rows.pixels([i])[0], mixed["other"]["pixels"]))
        expected = mixed["share"] * plain[row] + (1 - mixed["share"]) * plain[other]
        assert (batch["pixel_values"][row] - expected).abs().max() < 0.51 * step
        shares = torch.zeros(2)
        shares[mixed["labels"]] += mixed["share"]
        shares[mixed["other"]["labels"]] += 1 - mixed["share"]
        assert torch.allclose(batch["labels"][row], shares, atol=1e-6)
    assert len({row["other"]["labels"] for row in found}) == 2


@pytest.mark.parametrize("weights", [None, ["1", "3"]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_labels_is_the_mixture_of_the_losses(tmp_path, weights, smoothing):
    objective = bound(tmp_path, class_weights=weights)
    logits, one, other = torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1, 0, 0, 1, 0])
    shares = torch.tensor([0.2, 0.5, 0.7, 1.0, 0.0])
    soft = mixed_labels(one, other, shares, 2)
    losses = [
        F.cross_entropy(logits, labels, objective.labels.kind.weights, reduction="none", label_smoothing=smoothing)
        for labels in (one, other)
    ]
    expected = (shares * losses[0] + (1 - shares) * losses[1]).sum()
    ours = objective.criterion({"logits": logits}, {"labels": soft}, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [
        objective.criterion({"logits": logits[part]}, {"labels": soft[part]}, label_smoothing=smoothing)
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert sum(parts).item() == pytest.approx(ours.item(), rel=1e-5)
    assert objective.num_items({"labels": soft}) == 5


# Rows ----------------------------------------------------------------------------------------------------------------


def test_a_broken_image_stops_the_run_or_is_left_out_and_noted(tmp_path):
    write_images(tmp_path / "train", [noise(seed=seed) for seed in range(5)])
    write_images(tmp_path / "validation", [noise(seed=seed) for seed in (100, 101)])
    broken = tmp_path / "train" / "dog" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for megabytes in (1024, 0):
        with pytest.raises(ValueError, match=r"the image of train row 4 is not an image that can be read: .*001\.png"):
            batches(bound(tmp_path, cache_megabytes=megabytes))
    objective = bound(tmp_path, on_corrupt="skip")
    assert len(objective.rows["train"]) == 4
    (note,) = [note for note in objective.notes if "left out" in note]
    assert note.startswith(f"1 of 5 rows left out: train row 4 is not an image that can be read: {broken}: ")
    (broken.parent / "003.png").write_bytes(b"no image")
    for path in (tmp_path / "train" / "cat").iterdir():
        path.write_bytes(b"none either")
    with pytest.raises(ValueError, match=r"no image of the train data can be read: train row 1 is not an image"):
        bound(tmp_path, on_corrupt="skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "photo"}, r"image_column='photo' is not in the train data; its columns are image, label"),
        ({"image_column": "label"}, r"image_column='label' of train row 1 holds a str, no image"),
        ({"label_column": "y"}, r"label_column='y' is not in the train data"),
        ({"on_corrupt": "ignore"}, r"on_corrupt='ignore' is unknown; choose one of stop, skip"),
        ({"mixup": 0.2, "loss": "focal"}, r"loss=focal is not defined for mixed labels; leave mixup and cutmix out"),
        ({"random_crop": -1}, r"random_crop=-1 must be at least 0"),
        ({"colour_jitter": 2.0}, r"colour_jitter=2\.0 is out of range; choose 0 <= colour_jitter <= 1"),
    ],
)
def test_bad_settings_are_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        bound(tmp_path, **settings)


def test_a_label_that_training_does_not_know_is_refused(tmp_path):
    write_images(tmp_path / "validation", [noise(seed=200)], labels=["bird"])
    write_images(tmp_path / "train", [noise(seed=seed) for seed in range(4)])
    with pytest.raises(
        ValueError, match=r"the validation data has labels .* does not have: 'bird' \(first in row 1\)"
    ):
        bound(tmp_path)


def test_a_model_of_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image processor belongs to a bert; is it a model of images"):
        bound(tmp_path, config=AutoConfig.for_model("bert"))


# Pictures ------------------------------------------------------------------------------------------------------------


def test_the_report_shows_the_most_wrong_images(tmp_path, monkeypatch):
    objective, shown = bound(tmp_path), {}
    monkeypatch.setattr(
        "bmtk.tasks.image_classification.image_grid",
        lambda images, captions, title: (
            shown.update(images=images, captions=captions, title=title) or {"title": title}
        ),
    )
    losses = [0.1, 2.0, 0.9, 3.0]
    wrong = [False, True, True, True]
    predictions = [
        {"label": int(is_wrong), "truth": 0, "score": 0.75, "loss": loss, "items": 1, "top": [0, 1]}
        for is_wrong, loss in zip(wrong, losses, strict=True)
    ]
    figures = objective.scorer.figures(predictions, objective.rows["train"])
    assert [figure["title"] for figure in figures] == [
        "Confusion matrix",
        "The 3 most wrong of 3 mistakes among 4 images",
    ]
    assert shown["captions"] == ["dog 75.0%\nis cat 5.0%", "dog 75.0%\nis cat 13.5%", "dog 75.0%\nis cat 40.7%"]
    assert np.array_equal(shown["images"], objective.rows["train"].pixels([3, 1, 2]))
    assert len(objective.scorer.figures(predictions[:1], objective.rows["train"])) == 1


# Runs ----------------------------------------------------------------------------------------------------------------


def run(folder, *argv):
    config = ["--config", "recipes/configs/image_classification/smoke.yaml", "--disable_tqdm", "true"]
    finetune.main([*config, "--output_dir", str(folder), *map(str, argv)])
    return folder


def facts(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, seed_argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run(tmp_path_factory.mktemp("shapes") / "run", *seed_argv)


@pytest.mark.trains
def test_from_a_config_file_to_a_pipeline(trained, tmp_path, capsys):
    metrics = facts(trained)["metrics"]
    assert metrics["test/accuracy"] > 0.9
    assert facts(trained)["throughput"]["images_per_second"] > 0
    pictures = [figure for figure in facts(trained)["figures"] if "png_base64" in figure]
    assert all(PIL.Image.open(io.BytesIO(base64.b64decode(figure["png_base64"]))).width > 100 for figure in pictures)

    evaluate.main(["--model", str(trained), "--batch_size", "7"])
    again = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert again == pytest.approx({name: value for name, value in metrics.items() if "test" in name}, abs=1e-6)
    assert "circle         15" in capsys.readouterr().out

    photographs = tmp_path / "photographs"
    photographs.mkdir()
    rows = Dataset.from_parquet(str(SHAPES / "test.parquet"))
    for number in range(6):
        rows[number]["image"].save(photographs / f"{number}.png")
    (photographs / "3b.png").write_bytes(b"no image")
    output = tmp_path / "labels.csv"
    with pytest.raises(ValueError, match=r"3b\.png"):
        predict.main(["--model", str(trained), "--input", str(photographs), "--output", str(output)])
    assert not output.exists()
    argv = ["--model", str(trained), "--input", str(photographs), "--output", str(output), "--on_corrupt", "skip"]
    predict.main(argv)
    with output.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [Path(line["image"]).name for line in lines] == [f"{number}.png" for number in range(6)]
    classify = pipeline("image-classification", model=str(trained))
    for line in lines:
        best = classify(line["image"])[0]
        assert line["prediction"] == best["label"]
        assert float(line["score"]) == pytest.approx(best["score"], abs=2e-6)


SHORT = ["--num_train_epochs", 3, "--per_device_train_batch_size", 64, "--logging_steps", 1, "--mixup", "0.3"]


def test_a_stopped_run_goes_on_to_the_very_same_weights(tmp_path, monkeypatch):
    """The epoch that a resumed run starts in the middle of is the one that its rows are drawn for."""
    whole = run(tmp_path / "whole", *SHORT)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 7:  # of 15, 5 an epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RecordHistory, "on_step_begin", lambda *args, **kwargs: None, raising=False)
        patch.setattr(callbacks.RecordHistory, "on_step_end", stop, raising=False)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", *SHORT)
    run(tmp_path / "stopped", *SHORT, "--dataloader_num_workers", 1)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.trains
def test_a_frozen_backbone_rests_and_its_head_learns(trained, tmp_path, capsys, seed_argv):
    folder = run(tmp_path / "probe", "--model", trained, "--freeze_backbone", "--max_steps", 4, *seed_argv)
    before, after = load_file(trained / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("classifier.")}
    assert any("running_mean" in name for name in before)
    with pytest.raises(ValueError, match="freeze_backbone trains the head of a pretrained model; name one with model"):
        run(tmp_path / "other", "--freeze_backbone")
    with pytest.raises(ValueError, match="freeze_backbone trains the head alone, adapter more than that"):
        run(tmp_path / "other", "--model", trained, "--freeze_backbone", "--adapter", "lora")


def test_a_checkpoint_of_another_task_is_reported_loudly(trained, tmp_path, capsys):
    config = AutoConfig.from_pretrained(trained)
    AutoModelForMaskedImageModeling.from_config(config).save_pretrained(tmp_path / "masked")
    shutil.copy(trained / "preprocessor_config.json", tmp_path / "masked")
    run(tmp_path / "run", "--model", tmp_path / "masked", "--max_steps", 1)
    assert "NEWLY INITIALISED, to be learned from these data: classifier." in capsys.readouterr().out
    with pytest.raises(ValueError, match="was not trained for this task: NEWLY INITIALISED"):
        evaluate.main(
            ["--model", str(tmp_path / "masked"), "--dataset", str(SHAPES), "--task", "image_classification"]
        )


def test_channels_last_changes_nothing_but_the_layout(tmp_path):
    objective = bound(tmp_path)
    model = AutoModelForImageClassification.from_config(BmCnnConfig(image_size=8, hidden_sizes=[4, 8], depths=[1, 1]))
    images, weight = (
        objective.scaled(objective.rows["train"].pixels(range(8))),
        model.model.stages[1].blocks[0].body[0][0].weight,
    )
    results = []
    for is_last in (False, True):
        args = FineTuningArguments(str(tmp_path / "run"), channels_last=is_last, use_cpu=True)
        build_trainer(model, objective, args, folder=tmp_path / "run")
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_last
        model.zero_grad()
        loss = model(pixel_values=images, labels=torch.arange(8) % 2).loss
        loss.backward()
        results.append((loss.item(), weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)
    strided = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1, stride=2))
    with pytest.raises(ValueError, match=r"channels_last is not safe on a CPU for a strided 1x1 convolution \(1\)"):
        lay_out_channels_last(strided, torch.device("cpu"))


def test_the_shapes_are_what_their_script_makes(tmp_path):
    script = runpy.run_path(str(SHAPES / "make_shapes.py"))
    script["main"](tmp_path)
    for split in ("train", "validation", "test"):
        made, kept = (Dataset.from_parquet(str(folder / f"{split}.parquet")) for folder in (tmp_path, SHAPES))
        assert made["label"] == kept["label"]
        assert all(
            np.array_equal(np.asarray(one), np.asarray(other))
            for one, other in zip(made["image"], kept["image"], strict=True)
        )
