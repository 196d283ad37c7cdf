"""Masked image modelling: which cells are hidden, what is measured of them, and what comes of the weights."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, ViTConfig, pipeline

import bmtk  # noqa: F401
from bmtk.tasks.masked_image_modeling import TASK, MaskedImageModelingArguments
from bmtk.training.starting_weights import load_for_task, read_config
from recipes import evaluate, finetune, predict, pretrain

SHAPES = finetune.CONFIGS.parent / "data" / "captioned_shapes"
TRANSFORMER = {"image_size": 24, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CNN = {"image_size": 24, "hidden_sizes": [8, 16], "depths": [1, 1]}


def bound(model_type="bm_transformer", fields=TRANSFORMER, *, seed=42, **settings):
    data = TASK.read(MaskedImageModelingArguments(dataset=str(SHAPES), **settings), seed=seed)
    return data.bind(data.new_config(model_type, fields))


def predicted(objective, model, rows, batch_size):
    with torch.no_grad():
        batches = objective.batches_in_order(rows, batch_size=batch_size)
        return [prediction for batch in batches for prediction in objective.scorer.predict(model, batch)]


def test_a_mask_hides_the_share_that_was_asked_for_and_depends_on_seed_epoch_and_row_alone():
    objective = bound(mask_ratio=0.75)
    rows = objective.batch_rows(objective.rows["train"], is_training=True)
    batch = rows.batch([3, 5], [0, 2])
    assert batch["bool_masked_pos"].shape == (2, 36)
    assert batch["bool_masked_pos"].sum(1).tolist() == [27, 27]
    assert int(objective.num_items(batch)) == 54
    assert objective.num_units(batch) == 2
    assert torch.equal(rows.batch([5], [2])["bool_masked_pos"][0], batch["bool_masked_pos"][1])
    assert not torch.equal(rows.batch([5], [3])["bool_masked_pos"][0], batch["bool_masked_pos"][1])
    other = bound(mask_ratio=0.75, seed=1)
    again = other.batch_rows(other.rows["train"], is_training=True).batch([5], [2])
    assert not torch.equal(again["bool_masked_pos"][0], batch["bool_masked_pos"][1])
    measured = [next(o.batches_in_order(o.rows["test"], batch_size=3)) for o in (objective, other)]
    assert torch.equal(*(batch["bool_masked_pos"] for batch in measured))


def test_training_images_move_and_flip_anew_in_every_epoch_and_hidden_cells_do_not_follow():
    objective, plain = bound(random_crop=4, horizontal_flip=True), bound()
    rows, fixed = (o.batch_rows(o.rows["train"], is_training=True) for o in (objective, plain))
    first, second = (rows.batch([3, 5], [epoch] * 2) for epoch in (0, 1))
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["pixel_values"], rows.batch([3, 5], [0, 0])["pixel_values"])
    for epoch, batch in enumerate((first, second)):
        assert torch.equal(batch["bool_masked_pos"], fixed.batch([3, 5], [epoch] * 2)["bool_masked_pos"])
    assert torch.equal(fixed.batch([3], [0])["pixel_values"], fixed.batch([3], [1])["pixel_values"])
    measured = [next(o.batches_in_order(o.rows["test"], batch_size=3)) for o in (objective, plain)]
    assert torch.equal(*(batch["pixel_values"] for batch in measured))


@pytest.mark.parametrize(("model_type", "fields"), [("bm_transformer", TRANSFORMER), ("bm_cnn", CNN)])
def test_metrics_are_errors_of_hidden_pixels_whatever_the_batches(model_type, fields):
    objective = bound(model_type, fields, mask_cell_size=8)
    model, rows = objective.auto_class.from_config(objective.config).eval(), objective.rows["validation"]
    scores = [objective.scorer.score(predicted(objective, model, rows, size), rows) for size in (7, len(rows))]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    errors, baselines = [], []
    for row in range(len(rows)):
        batch = objective.batch_rows(rows).batch([row], [0])
        pixels, cells = batch["pixel_values"], batch["bool_masked_pos"]
        with torch.no_grad():
            outputs = model(pixel_values=pixels, bool_masked_pos=cells)
        hidden = np.kron(cells.view(3, 3).numpy(), np.ones((8, 8))).astype(bool)
        truth, painted = (x[0].numpy() / 2 + 0.5 for x in (pixels, outputs.reconstruction))
        errors.append(abs(painted - truth)[:, hidden].mean())
        mean = truth[:, ~hidden].mean(1, keepdims=True)
        baselines.append(abs(mean - truth[:, hidden]).mean())
        assert outputs.loss.item() == pytest.approx(2 * errors[-1], rel=1e-4)
    assert scores[0]["mae"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert scores[0]["loss"] == pytest.approx(2 * np.mean(errors), rel=1e-4)
    assert scores[0]["mean_colour_mae"] == pytest.approx(np.mean(baselines), rel=1e-4)


def test_the_figure_shows_images_as_they_are_with_hidden_cells_grey():
    objective = bound(mask_cell_size=8)
    model, rows = objective.auto_class.from_config(objective.config).eval(), objective.rows["validation"]
    predictions = predicted(objective, model, rows, 9)
    shown = [row for row, prediction in enumerate(predictions) if "picture" in prediction]
    assert shown == [0, 7, 15, 23, 31, 39]
    image, seen, painted = predictions[7]["picture"]
    original = np.moveaxis(rows.images[7]["pixels"], 0, -1)
    assert abs(image.astype(int) - original).max() <= 1
    cells = objective.batch_rows(rows).batch([7], [0])["bool_masked_pos"].view(3, 3).numpy()
    hidden = np.kron(cells, np.ones((8, 8))).astype(bool)
    assert (seen[hidden] == 128).all()
    assert abs(seen[~hidden].astype(int) - original[~hidden]).max() <= 1
    assert abs(painted[~hidden].astype(int) - original[~hidden]).max() <= 1
    (figure,) = objective.scorer.figures(predictions, rows)
    assert PIL.Image.open(io.BytesIO(base64.b64decode(figure["png_base64"]))).width > 300


def test_bad_settings_and_images_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"mask_ratio=0\.0 is not a share; choose between 0 and 1"):
        bound(mask_ratio=0.0)
    for cell in (5, 24):
        with pytest.raises(ValueError, match=f"mask_cell_size={cell} does not cut images of 24 x 24 pixels into"):
            bound(mask_cell_size=cell)
    with pytest.raises(ValueError, match="image_column='photo' is not in the train data; its columns are image"):
        bound(image_column="photo")
    broken = [{"bytes": b"no image", "path": None}]
    Dataset.from_dict({"image": broken}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="the image of train row 1 is not an image that can be read"):
        bound(train_file=[str(tmp_path / "bad.parquet")])


def test_a_model_of_transformers_is_measured_alike():
    fields = {"image_size": 24, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**fields, intermediate_size=32, encoder_stride=4)
    objective = TASK.read(MaskedImageModelingArguments(dataset=str(SHAPES))).bind(config)
    model = objective.auto_class.from_config(config).eval()
    batch = next(objective.batches_in_order(objective.rows["test"], batch_size=4))
    del batch["is_shown"]
    with torch.no_grad():
        own, loss = objective.scorer.predict(model, batch), model(**batch).loss.item()
    assert objective.scorer.score(own, None)["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.trains
def test_from_pretraining_to_a_classifier(tmp_path, monkeypatch, seed_argv):
    monkeypatch.chdir(finetune.CONFIGS.parents[1])
    folder, short = tmp_path / "run", ["--num_train_steps", "25", "--eval_steps", "0", *seed_argv]
    pretrain.main(["--task", "masked_image_modeling", "--preset", "smoke", "--output_dir", str(folder), *short])
    facts = json.loads((folder / "run.json").read_text())
    metrics = facts["metrics"]
    assert facts["about"]["main_metric"] == "loss"  # what the report leads with
    assert metrics["validation/mae"] < 0.3
    assert facts["figures"][0]["title"].startswith("Hidden cells")
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert history[-2]["images"] == 25 * 32
    evaluate.main(["--model", str(folder), "--batch_size", "7"])
    measured = json.loads((folder / "metrics.json").read_text())["metrics"]
    for name in ("loss", "mae", "mean_colour_mae"):
        assert measured[f"test/{name}"] == pytest.approx(metrics[f"test/{name}"], rel=1e-5)

    image = tmp_path / "images" / "one.png"
    image.parent.mkdir()
    PIL.Image.new("RGB", (30, 30), "red").save(image)
    output = tmp_path / "out.jsonl"
    predict.main(["--model", str(folder), "--input", str(image.parent), "--output", str(output)])
    assert 0 < json.loads(output.read_text())["prediction"] < 1
    features = pipeline("image-feature-extraction", model=str(folder))(str(image))
    assert np.array(features).shape == (1, 36, 48)
    config, _ = read_config(str(folder), {})
    _, notes = load_for_task(AutoModelForImageClassification, str(folder), config)
    assert notes == [
        f"NEWLY INITIALISED, to be learned from these data: classifier.1.bias, classifier.1.weight (not in {folder})"
    ]


@pytest.mark.trains
def test_the_trainer_hides_other_cells_in_every_epoch(tmp_path, monkeypatch, training_seed, seed_argv):
    seen = set()
    monkeypatch.setattr(
        "bmtk.tasks.masked_image_modeling.row_draws",
        lambda seed, epoch, row: (seen.add((seed, epoch)), np.random.default_rng((seed, epoch, row)))[1],
    )
    files = ["--task", "masked_image_modeling", "--dataset", str(SHAPES), "--model_type", "bm_cnn"]
    fields = ["--image_size", "24", "--hidden_sizes", "8", "16", "--depths", "1", "1", "--mask_cell_size", "4"]
    run = ["--output_dir", str(tmp_path), "--num_train_epochs", "2", "--per_device_train_batch_size", "60"]
    quiet = ["--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"]
    finetune.main([*files, *fields, *run, *quiet, *seed_argv])
    assert seen == {(42 + training_seed, 0), (42 + training_seed, 1), (0, 0)}
    assert json.loads((tmp_path / "run.json").read_text())["metrics"]["test/mae"] < 0.5
