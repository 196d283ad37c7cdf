"""Object detection: boxes, labels, augmentation, loss and average precision, against literal values and loops."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL.ImageEnhance import Brightness, Color, Contrast
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection, DetrConfig, pipeline

from bmtk.data.box_transforms import BoxAugmentation, clip_boxes, likely_format
from bmtk.data.media import decode_image
from bmtk.metrics import boxes as box_metrics
from bmtk.metrics.boxes import average_precisions
from bmtk.models.boxes_bm import pairwise_iou
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.tasks import causal_lm, images
from bmtk.tasks.box_figures import COLOURS, image_with_boxes
from bmtk.tasks.inference import PictureFolder
from bmtk.tasks.object_detection import TASK, ObjectDetectionArguments
from bmtk.training.finetuning_arguments import FineTuningArguments
from bmtk.training.starting_weights import load_for_task
from bmtk.training.trainer import build_trainer
from bmtk.training.updates import LossSum
from recipes import evaluate, finetune, predict

TINY = {
    "image_size": 32, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "strides": [2, 2, 2], "fpn_size": 16,
    "num_detection_layers": 1, "num_feature_levels": 3, "norm_type": "layer_norm",
}  # fmt: skip
OBJECTS = {"bbox": [[2, 4, 10, 8], [20, 10, 8, 16]], "category": ["cat", "dog"]}
NOTHING = {"bbox": [], "category": []}


def png(width=40, height=32, colour="white") -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(content, format="png")
    return content.getvalue()


def write_folder(folder, objects, *, start=0, **size):
    """A folder of pictures, all different, and the metadata.jsonl that holds their objects."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, value in enumerate(objects, start):
        (folder / f"{number}.png").write_bytes(png(colour=(number, 9, 9), **size))
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": value}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def read_data(tmp_path, train=(OBJECTS, OBJECTS), validation=(OBJECTS,), splits=("train", "validation"), **settings):
    for split, objects in {"train": train, "validation": validation}.items():
        write_folder(tmp_path / split, objects, start=100 * (split == "validation"))
    args = ObjectDetectionArguments(**{"dataset": str(tmp_path), "scale_jitter": 0, "colour_jitter": 0, **settings})
    return TASK.read(args, splits=splits)


def bound(data, **fields):
    return data.bind(BmCnnConfig(**{**data.config_fields, **TINY, **fields}))


# ---------------------------------------------------------------------------------------------------- rows


def parquet_rows(tmp_path, objects, kind):
    """The rows that are read of a Parquet file whose column `objects` is of this kind."""
    path = tmp_path / "rows.parquet"
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "objects": kind})
    Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "objects": [objects]}, features=features).to_parquet(
        path
    )
    (row,) = TASK.read(ObjectDetectionArguments(test_file=[str(path)]), splits=["test"]).rows["test"]
    return row["boxes"], row["names"]


def test_every_way_to_write_objects_gives_the_same_rows(tmp_path):
    names = ClassLabel(names=["dog", "cat"])
    of_lists = {"bbox": List(List(Value("float32"))), "category": List(names)}
    pairs = [{"bbox": box, "category": label} for box, label in zip(OBJECTS["bbox"], [1, 0], strict=True)]
    expected = ([[2.0, 4.0, 10.0, 8.0], [20.0, 10.0, 8.0, 16.0]], ["cat", "dog"])
    assert parquet_rows(tmp_path, {**OBJECTS, "category": [1, 0]}, of_lists) == expected
    assert parquet_rows(tmp_path, pairs, List({"bbox": List(Value("float32")), "category": names})) == expected
    named = {**OBJECTS, "category": [7, 3], "category_name": ["cat", "dog"]}
    data = read_data(tmp_path / "named", train=(named,), validation=(named,), label_names=["dog", "cat"])
    assert list(data.rows["train"]["names"]) == [["cat", "dog"]]
    numbers = {**OBJECTS, "category": [1, 0]}
    data = read_data(tmp_path / "numbers", train=(numbers,), validation=(numbers,), label_names=["dog", "cat"])
    assert list(data.rows["train"]["names"]) == [["cat", "dog"]]
    assert bound(data).config.id2label == {0: "dog", 1: "cat"}


def test_boxes_become_what_a_detector_reads(tmp_path):
    objective = bound(read_data(tmp_path, train=(OBJECTS, NOTHING, None)))
    assert (objective.config.id2label, objective.config.num_channels) == ({0: "cat", 1: "dog"}, 3)
    batch = objective.collator()([objective.rows["train"][row] for row in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)  # of 40 x 32
    first, second, third = batch["labels"]
    expected = torch.tensor([[7 / 40, 8 / 32, 10 / 40, 8 / 32], [24 / 40, 18 / 32, 8 / 40, 16 / 32]])
    torch.testing.assert_close(first["boxes"], expected)
    assert first["class_labels"].tolist() == [0, 1]
    assert first["orig_size"].tolist() == [32, 40]
    for label in (second, third):
        assert (label["boxes"].shape, label["class_labels"].shape) == ((0, 4), (0,))
    assert objective.sizes() == {"train": {"rows": 3, "boxes": 2}, "validation": {"rows": 1, "boxes": 2}}


CORNERS = {"bbox": [[2, 4, 12, 12], [20, 10, 28, 26]], "category": ["cat", "dog"]}
SHARES = {"bbox": [[7 / 40, 8 / 32, 10 / 40, 8 / 32], [24 / 40, 18 / 32, 8 / 40, 16 / 32]], "category": ["cat", "dog"]}


@pytest.mark.parametrize(("objects", "box_format"), [(CORNERS, "ltrb"), (SHARES, "yolo"), (OBJECTS, "ltwh")])
def test_boxes_of_every_format_become_the_same(tmp_path, objects, box_format):
    data = read_data(tmp_path, train=(objects,), validation=(objects,), box_format=box_format)
    boxes = np.array(data.rows["train"]["boxes"][0])
    assert boxes == pytest.approx(np.array(OBJECTS["bbox"], dtype=float))


def test_boxes_that_look_like_corners_or_shares_are_asked_about(tmp_path):
    beyond = {"bbox": [*CORNERS["bbox"], [22, 3, 40, 32]], "category": ["cat", "dog", "cat"]}
    with pytest.raises(ValueError, match=r"beyond their image .* set box_format=ltrb; if .* set box_format=ltwh"):
        read_data(tmp_path, train=(beyond,), validation=(OBJECTS,))
    with pytest.raises(ValueError, match=r"between 0 and 1 only.* set box_format=yolo"):
        read_data(tmp_path, train=(SHARES,), validation=(OBJECTS,))
    data = read_data(tmp_path, train=(beyond,), validation=(OBJECTS,), box_format="ltwh")
    assert "2 of 3 train boxes reach beyond their image: cut at its edge" in data.notes
    with pytest.raises(ValueError, match="box_format='xyxy' is unknown; choose one of ltwh, ltrb, yolo"):
        read_data(tmp_path, box_format="xyxy")


def test_boxes_of_objects_cut_by_the_edge_are_no_corners():
    draw = np.random.default_rng(0)
    centre, size = draw.uniform(0, 100, (500, 2)), draw.uniform(10, 60, (500, 2))
    boxes = np.concatenate((centre - size / 2, size), axis=1)  # half of them reach beyond some edge of 100 x 100
    assert likely_format(boxes, np.full((500, 2), 100)) == "ltwh"
    small = np.array([[2, 3, 10, 12], [5, 5, 20, 30]])  # that would fit as corners, but need not be any
    assert likely_format(small, np.full((2, 2), 100)) == "ltwh"
    inside = clip_boxes(boxes, 100, 100)
    corners = np.concatenate((inside[:, :2], inside[:, :2] + inside[:, 2:]), axis=1)
    assert likely_format(corners, np.full((500, 2), 100)) == "ltrb"
    assert likely_format(inside, np.full((500, 2), 100)) == "ltwh"


def test_boxes_without_area_in_their_image_are_left_out_counted_and_the_first_is_named(tmp_path):
    bad = {
        "bbox": [
            [3.3, 2.7, 1.1, 0.6],
            [3, 3, 0, 5],
            [50, 2, 4, 4],
            [-3, 28, 8, 8],
            [9, 9, -2, 4],
            [1, float("nan"), 4, 4],
            [1, 1, float("inf"), 4],
        ],
        "category": ["cat", "cat", "dog", "dog", "cat", "cat", "cat"],
    }
    data = read_data(tmp_path, train=(OBJECTS, bad))
    assert list(data.rows["train"]["boxes"])[1] == [pytest.approx([3.3, 2.7, 1.1, 0.6]), [0.0, 28.0, 5.0, 4.0]]
    assert list(data.rows["train"]["names"])[1] == ["cat", "dog"]
    assert data.notes == [
        "5 of 9 train boxes have no area within their image: left out (the first is [3.0, 3.0, 0.0, 5.0] in row 2)",
        "1 of 9 train boxes reach beyond their image: cut at its edge",
    ]


@pytest.mark.parametrize(
    ("objects", "settings", "message"),
    [
        (
            OBJECTS,
            {"objects_column": "boxes"},
            r"objects_column='boxes' is not in the train data; its columns are imag",
        ),
        (OBJECTS, {"image_column": "photo"}, r"image_column='photo' is not in the train data; its columns are image"),
        (
            {"bbox": [[1, 1, 2, 2]]},
            {},
            r"objects_column='objects' of train row 1 holds .* give bbox and category, a li",
        ),
        (
            {"bbox": [[1, 1, 2, 2]], "category": []},
            {},
            r"of train row 1 has 1 bbox and 0 category; give one for each object",
        ),
        (
            {"bbox": [[1, 1, 2]], "category": ["cat"]},
            {},
            r"of train row 1 has the bbox \[1, 1, 2\]; give \[left, top, width, height\] in pixels",
        ),
        (
            {"bbox": [["1", "1", "2", "wide"]], "category": ["cat"]},
            {},
            r"of train row 1 has the bbox \['1', '1', '2', 'wide'\]; give \[left, top, width, height\] in pixels",
        ),
        (
            {"bbox": [[1, 1, 2, 2]], "category": [""]},
            {},
            r"category of objects_column='objects' of train row 1 is empty",
        ),
        (
            {"bbox": [[1, 1, 2, 2]], "category": [2]},
            {"label_names": ["a", "b"]},
            r"train row 1 holds '2', which is neither one of label_names \('a', 'b'\) nor the number of one",
        ),
        (NOTHING, {}, r"objects_column='objects' of the train data holds no box at all"),
        (OBJECTS, {"flip": "vertical"}, r"flip='vertical' is unknown; choose one of none, horizontal, both"),
        (OBJECTS, {"scale_jitter": -0.1}, r"scale_jitter=-0\.1 must be at least 0"),
        (OBJECTS, {"colour_jitter": 1.5}, r"colour_jitter=1\.5 is not a share; choose between 0 and 1"),
        (OBJECTS, {"score_threshold": 0.01}, r"score_threshold=0\.01 must be from 0\.05 to 1"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, objects, settings, message):
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, train=(objects,), **settings)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    write_folder(tmp_path / "train", [OBJECTS, OBJECTS])
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"the image of train row 2 is not an image that can be read: .*1\.png"):
        TASK.read(ObjectDetectionArguments(dataset=str(tmp_path), validation_fraction=0.5), splits=["train"])


def test_labels_that_were_not_trained_are_refused(tmp_path):
    other = {"bbox": [[1, 1, 5, 5]], "category": ["cow"]}
    data = read_data(tmp_path, validation=(OBJECTS, other))
    with pytest.raises(
        ValueError, match=r"validation row 2 has an object labelled 'cow', which the training data do no"
    ):
        bound(data)
    data = read_data(tmp_path, splits=["validation"])
    known = {"id2label": {0: "sheep", 1: "cow"}, "architectures": ["BmCnnForObjectDetection"]}
    with pytest.raises(ValueError, match="the data has labels 'cat', 'dog', and the model knows others: 'sheep'"):
        bound(data, **known)
    data = read_data(tmp_path / "again", splits=["validation"])
    objective = bound(data, **{**known, "id2label": {0: "dog", 1: "sheep", 2: "cat"}})
    assert (objective.config.num_labels, objective.labels) == (3, ["dog", "sheep", "cat"])
    assert objective.collator()([objective.rows["validation"][0]])["labels"][0]["class_labels"].tolist() == [2, 0]


# ---------------------------------------------------------------------------------------------------- augmentation


def marked(side_x=60, side_y=48):
    """An image that is blue but for a red rectangle, and the box of that."""
    image = PIL.Image.new("RGB", (side_x, side_y), "blue")
    PIL.ImageDraw.Draw(image).rectangle((10, 6, 29, 35), fill="red")
    return image, np.array([[10.0, 6.0, 20.0, 30.0]])


def red_box(image):
    """[left, top, width, height] of what is red."""
    pixels = np.array(image).astype(int)
    y, x = np.nonzero((pixels[..., 0] > 128) & (pixels[..., 2] < 128))
    return [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1] if len(x) else None


def test_boxes_move_with_their_image():
    augment = BoxAugmentation(flip="both", scale=2.0, colour=0.1)
    image, boxes = marked()
    corners, sizes, num_hidden = set(), set(), 0
    for number in range(80):
        view, moved, visible = augment(image, boxes, np.random.default_rng(number))
        sizes.add(view.size)
        found = red_box(view)
        area = found[2] * found[3] if found else 0
        assert visible.tolist() == [area >= 0.3 * 20 * 30]
        if area:
            assert moved[0].tolist() == found
            corners.add(tuple((moved[0, :2] + moved[0, 2:] / 2 < np.array(view.size) / 2).tolist()))
        num_hidden += not visible[0]
    assert (len(corners), len(sizes) > 40, 2 < num_hidden < 40) == (4, True, True)
    assert min(width for width, _ in sizes) < 30 < 120 < max(width for width, _ in sizes)


@pytest.mark.parametrize("size", [(30, 24), (90, 33)])
def test_boxes_move_with_an_image_that_is_resized_in_its_view(size):
    augment = BoxAugmentation(flip="both", scale=0.5, colour=0.1, size=size)
    image = PIL.Image.new("RGB", (240, 192), "blue")
    image.paste("red", (40, 24, 120, 144))
    for number in range(40):
        view, moved, _ = augment(image, np.array([[40.0, 24.0, 80.0, 120.0]]), np.random.default_rng(number))
        assert view.size == size
        assert np.abs(moved[0] - red_box(view)).max() <= 1  # a pixel that is partly red counts as one or none


def test_images_that_are_measured_are_resized_once_and_keep_the_boxes_of_their_own_size(tmp_path):
    objective = bound(read_data(tmp_path))
    rows, whole = objective.rows["validation"], objective.rows["validation"].images([0])[0]["image"]
    first, again = rows[0], rows[0]
    assert first["image"] is again["image"]
    assert first["image"].size == (objective.config.image_size,) * 2 != whole.size
    boxes = [entry["bbox"] for entry in first["annotations"]["annotations"]]
    annotations = {"image_id": 0, "annotations": first["annotations"]["annotations"]}
    expected = objective.processor([whole], annotations=[annotations], return_tensors="pt")
    found = objective.collator()([first])
    assert boxes == OBJECTS["bbox"]
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    for name, value in expected["labels"][0].items():
        assert torch.equal(found["labels"][0][name], value)


def test_without_augmentation_nothing_changes():
    image, boxes = marked()
    view, moved, visible = BoxAugmentation("none", 0, 0)(image, boxes, np.random.default_rng(0))
    assert (np.array(view) == np.array(image)).all()
    assert (moved.tolist(), visible.tolist()) == (boxes.tolist(), [True])


def test_a_view_is_a_function_of_seed_epoch_and_row_and_only_training_sees_it(tmp_path):
    rows = bound(read_data(tmp_path, scale_jitter=0.5, colour_jitter=0.5)).rows["train"]

    def seen():
        return [(row["image"].tobytes(), json.dumps(row["annotations"])) for row in rows.__getitems__([0, 1])]

    plain = seen()
    assert json.loads(plain[0][1])["annotations"][0]["bbox"] == OBJECTS["bbox"][0]
    rows.set_epoch(3)
    third = seen()
    assert third == seen() != plain
    assert third[0][1].replace('"image_id": 0', "") != third[1][1].replace('"image_id": 1', "")
    rows.set_epoch(4)
    assert seen() != third
    rows.seed += 1
    rows.set_epoch(3)
    assert seen() != third


def test_training_sets_the_epoch_of_its_rows_and_evaluation_sees_them_as_they_are(tmp_path):
    objective = bound(read_data(tmp_path))
    run_trainer(tmp_path, objective, epochs=2)
    train, validation = objective.rows.values()
    assert (int(train.epoch), int(validation.epoch)) == (1, -1)


def test_workers_that_outlive_an_epoch_know_of_the_next(tmp_path):
    rows = bound(read_data(tmp_path, scale_jitter=0.5)).rows["train"]
    loader = DataLoader(rows, 2, collate_fn=list, num_workers=1, persistent_workers=True)
    loader = prepare_data_loader(loader, device=torch.device("cpu"), put_on_device=False, rng_types=[])
    seen = [[row["annotations"] for batch in loader for row in batch] for _ in range(2)]
    assert seen[0] != seen[1]
    rows.set_epoch(1)
    assert [row["annotations"] for row in rows.__getitems__([0, 1])] == seen[1]


# ---------------------------------------------------------------------------------------------------- loss


def run_trainer(tmp_path, objective, *, epochs=1, batch_size=4, accumulation=1, **settings):
    torch.manual_seed(0)
    model = AutoModelForObjectDetection.from_config(objective.config)
    args = FineTuningArguments(
        str(tmp_path / "run"), num_train_epochs=epochs, per_device_train_batch_size=batch_size, eval_strategy="no",
        gradient_accumulation_steps=accumulation, save_strategy="no", disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    trainer = build_trainer(model, objective, args, folder=tmp_path / "run")
    trainer.train()
    return trainer


def test_the_items_of_a_micro_batch_are_counted_once(tmp_path, monkeypatch):
    objective, counted = bound(read_data(tmp_path, train=(OBJECTS, NOTHING, OBJECTS))), []
    count = objective.num_items
    monkeypatch.setattr(objective, "num_items", lambda batch: counted.append(1) or count(batch))
    monkeypatch.setattr(objective, "num_units", lambda batch: 1)
    run_trainer(tmp_path, objective, batch_size=1, accumulation=2, epochs=2)
    assert len(counted) == 6


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path):
    one = {"bbox": [[5, 5, 12, 12]], "category": ["dog"]}
    crowd = {"bbox": [[x, y, 9, 9] for x in (0, 12, 24) for y in (0, 10, 20)], "category": ["cat"] * 9}
    train = (NOTHING, one, crowd, OBJECTS)
    step = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}
    step |= {"train_sampling_strategy": "sequential", "logging_steps": 1}
    trained, logs = [], []
    for accumulation in (1, 4):
        objective = bound(read_data(tmp_path / str(accumulation), train=train, flip="none"))
        trainer = run_trainer(tmp_path, objective, batch_size=4 // accumulation, accumulation=accumulation, **step)
        trained.append(trainer.model.state_dict())
        logs.append(trainer.state.log_history[0])
    assert trainer.state.global_step == 1
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
    torch.manual_seed(0)
    untrained = AutoModelForObjectDetection.from_config(trainer.model.config).train()
    batch = objective.collator()([objective.rows["train"][row] for row in range(4)])
    assert logs[1]["loss"] == pytest.approx(untrained(**batch).loss.item(), rel=1e-5)


def test_a_first_batch_without_objects_counts_too(tmp_path):
    objective = bound(read_data(tmp_path, train=(NOTHING, OBJECTS)))
    model = AutoModelForObjectDetection.from_config(objective.config).eval()
    batch = objective.collator()([objective.rows["train"][0]])
    assert objective.num_items(batch) == 0
    loss = LossSum(model, model, torch.device("cpu"))(batch, 0, torch.tensor(3))
    assert loss.item() == model(**batch, num_items_in_batch=3).loss.item() > 0


def test_items_are_the_positive_locations_and_for_other_detectors_the_images(tmp_path):
    objective = bound(read_data(tmp_path, train=(OBJECTS, NOTHING)))
    model = AutoModelForObjectDetection.from_config(objective.config)
    batch = objective.collator()([objective.rows["train"][row] for row in range(2)])
    assert objective.num_items(batch) == model.count_items(**batch) > 0
    kept = torch.stack([label["assigned"] for label in batch["labels"]])
    assert torch.equal(kept, model.assign_locations(**batch))
    assert {parameter.device.type for parameter in objective.counter.parameters()} == {"meta"}
    other = bound(read_data(tmp_path))
    other.config = DetrConfig(use_timm_backbone=False, backbone=None, encoder_layers=1, decoder_layers=1)
    assert other.num_items(batch) == 2


def test_a_batch_is_the_same_by_any_number_of_threads(tmp_path):
    objective = bound(read_data(tmp_path, train=(OBJECTS, NOTHING, OBJECTS)))
    rows, batches, before = objective.training_rows(), [], torch.get_num_threads()
    rows.set_epoch(1)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            batches.append(objective.collator()(rows.__getitems__([2, 0, 1])))
    finally:
        torch.set_num_threads(before)
    one, two = batches
    assert one["pixel_values"].shape[0] == 3
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert [label["boxes"].tolist() for label in one["labels"]] == [label["boxes"].tolist() for label in two["labels"]]
    assert [len(label["boxes"]) > 0 for label in two["labels"]] == [True, True, False]


def test_the_loss_that_is_reported_is_that_of_all_rows_at_once(tmp_path):
    train = (OBJECTS, NOTHING, {"bbox": [[5, 5, 12, 12]], "category": ["dog"]})
    objective = bound(read_data(tmp_path, train=train))
    model = AutoModelForObjectDetection.from_config(objective.config).eval()
    rows = objective.rows["train"]
    batch = objective.collator()([rows[row] for row in range(3)])
    with torch.no_grad():
        predictions = objective.scorer.predict(model, batch)
        assert objective.scorer.score(predictions, rows)["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert [prediction["items"] > 0 for prediction in predictions] == [True, False, True]


def test_the_predictions_of_a_batch_are_those_of_its_rows_one_by_one(tmp_path):
    train = (OBJECTS, NOTHING, {"bbox": [[5, 5, 12, 12]], "category": ["dog"]})
    objective = bound(read_data(tmp_path, train=train))
    model = AutoModelForObjectDetection.from_config(objective.config).eval()
    rows, collate = objective.rows["train"], objective.collator()
    with torch.no_grad():
        together = objective.scorer.predict(model, collate([rows[row] for row in range(3)]))
        for row, prediction in enumerate(together):
            batch = collate([rows[row]])
            outputs = model(**batch, num_items_in_batch=1)
            assert prediction["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
            assert prediction["items"] == int(model.count_items(**batch))
            (alone,) = objective.scorer.predict(model, batch)
            assert prediction["labels"] == alone["labels"]
            assert np.allclose(prediction["scores"], alone["scores"], atol=1e-5)
            assert np.allclose(prediction["boxes"], alone["boxes"], atol=1e-3)
    assert len({prediction["loss"] for prediction in together}) == 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_colours_change_as_pillow_changes_them(mode):
    pixels = np.random.default_rng(0).integers(256, size=(12, 9, 3), dtype=np.uint8)
    image, augment = PIL.Image.fromarray(pixels).convert(mode), BoxAugmentation("none", 0, 0.9)
    for seed in range(20):
        expected = image
        factors = np.random.default_rng(seed).uniform(0.1, 1.9, size=3)
        for kind, factor in zip((Brightness, Contrast, Color), factors, strict=True):
            expected = kind(expected).enhance(factor)
        found, _, _ = augment(image, np.zeros((0, 4)), np.random.default_rng(seed))
        assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_view_is_the_image_on_a_ground_of_its_mean_colour(scale):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8))
    within = 0
    for seed in range(20):
        view, _, _ = BoxAugmentation("none", scale, 0)(image, np.zeros((0, 4)), np.random.default_rng(seed))
        draw, limit = np.random.default_rng(seed), np.log1p(scale)
        width, height = (
            max(1, round(side / np.exp(size))) for size in [draw.uniform(-limit, limit)] for side in (40, 30)
        )
        low, high = np.minimum([40 - width, 30 - height], 0), np.maximum([40 - width, 30 - height], 0)
        left, top = np.round(draw.uniform(low, high)).astype(int)
        ground = np.tile(np.asarray(image.resize((1, 1), PIL.Image.Resampling.BOX)), (500, 500, 1))
        ground[200:230, 200:240] = np.asarray(image)
        expected = ground[200 + top : 200 + top + height, 200 + left : 200 + left + width]
        assert np.array_equal(np.asarray(view), expected)
        within += width <= 40
    assert 3 < within < 17


@pytest.mark.parametrize("megabytes", [0, 1])
def test_images_are_decoded_once_where_memory_allows_it(tmp_path, monkeypatch, megabytes):
    objective = bound(read_data(tmp_path, cache_megabytes=megabytes, flip="both", colour_jitter=0.5))
    rows, decoded = objective.rows["train"], []
    monkeypatch.setattr(images, "decode_image", lambda *what: decoded.append(what[1]) or decode_image(*what))
    fresh = bound(read_data(tmp_path, cache_megabytes=0, flip="both", colour_jitter=0.5)).rows["train"]
    decoded.clear()
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        seen = [np.asarray(rows[row]["image"]) for row in (0, 1, 0)]
    assert len(decoded) == (0 if megabytes else 6)  # both were looked at when the rows were encoded
    fresh.set_epoch(1)
    assert all(np.array_equal(one, np.asarray(fresh[row]["image"])) for one, row in zip(seen, (0, 1, 0), strict=True))


def test_a_classifier_becomes_a_detector_and_a_note_names_the_new_head(tmp_path):
    config = BmCnnConfig(**TINY, num_labels=7)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    config = bound(read_data(tmp_path / "data"), architectures=["BmCnnForImageClassification"]).config
    model, notes = load_for_task(AutoModelForObjectDetection, str(tmp_path / "classifier"), config)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert len(notes) == 1
    assert notes[0].startswith("NEWLY INITIALISED, to be learned from these data: pyramid.")


# ---------------------------------------------------------------------------------------------------- results


class Fixed(torch.nn.Module):
    """A detector that sees one box in every image, a (centre x, centre y, width, height) in parts of the image."""

    def __init__(self, box, scores):
        super().__init__()
        self.box, self.logits = torch.tensor([[box]]), torch.tensor([[scores]]).square().logit()

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits, pred_boxes=self.box, pred_centerness=torch.full((1, 1), 30.0))


def test_predictions_are_boxes_in_pixels_of_the_original_image(tmp_path):
    objective = bound(read_data(tmp_path))
    table = Dataset.from_list([{"image": {"bytes": png(width=80, height=40), "path": None}}] * 2)
    batch = objective.collator()([objective.encode_inputs(table)[row] for row in range(2)])
    assert batch["sizes"].tolist() == [[40, 80]] * 2
    predictions = objective.scorer.predict(Fixed([0.5, 0.25, 0.25, 0.5], [0.3, 0.8]), batch)
    assert len(predictions) == 2
    assert predictions[1]["boxes"][0] == pytest.approx([30, 0, 20, 20], abs=1e-4)
    assert objective.scorer.describe(predictions[1]) == {
        "prediction": [{"label": "dog", "score": pytest.approx(0.8, abs=1e-3), "box": [30.0, 0.0, 20.0, 20.0]}]
    }


def boxes(*corners):
    return [[left, top, right - left, bottom - top] for left, top, right, bottom in corners]


def test_average_precision_of_a_case_worked_out_by_hand():
    truth = [
        {"boxes": boxes((0, 0, 10, 10), (20, 0, 30, 10)), "labels": [0, 0]},
        {"boxes": boxes((0, 0, 10, 10)), "labels": [0]},
        {"boxes": [], "labels": []},
    ]
    found = [
        # a hit (IoU 1); one that misses half a box to the right: IoU 5 / 15, no hit
        {"boxes": boxes((0, 0, 10, 10), (25, 0, 35, 10)), "labels": [0, 0], "scores": [0.9, 0.8]},
        {"boxes": boxes((0, 0, 10, 8)), "labels": [0], "scores": [0.7]},  # IoU 0.8
        {"boxes": boxes((0, 0, 10, 10)), "labels": [1], "scores": [0.6]},  # a label that no image holds
    ]
    result = average_precisions(truth, found, 2)
    # By score: hit, miss, hit. Recalls 1/3, 1/3, 2/3 at precisions 1, 1/2, 2/3: of the recalls 0, 0.01, ..., 1 the
    # first 34 have a precision of 1, the next 33 of 2/3, the last 34 of 0.
    at_50 = (34 * 1 + 33 * 2 / 3) / 101
    at_85 = 34 * 1 / 101  # the third is no hit any more
    assert result[0, 0] == result[6, 0] == pytest.approx(at_50)
    assert result[7, 0] == result[9, 0] == pytest.approx(at_85)
    assert np.isnan(result[:, 1]).all()


def precision_by_loops(truth, found, label, threshold):
    """Average precision at 101 recalls: every prediction, by score, takes the best free box of its image."""
    ranked = sorted(
        (
            (score, image, box)
            for image, prediction in enumerate(found)
            for box, its, score in zip(*(prediction[key] for key in ("boxes", "labels", "scores")), strict=True)
            if its == label
        ),
        key=lambda entry: -entry[0],
    )
    free = {
        (image, number): box
        for image, objects in enumerate(truth)
        for number, (box, its) in enumerate(zip(objects["boxes"], objects["labels"], strict=True))
        if its == label
    }
    count, hits, curve = len(free), 0, []
    for rank, (_, image, box) in enumerate(ranked, 1):
        corners = torch.tensor([box[0], box[1], box[0] + box[2], box[1] + box[3]])[None]
        best, taken = threshold, None
        for (of_image, number), other in free.items():
            target = torch.tensor([other[0], other[1], other[0] + other[2], other[1] + other[3]])[None]
            if of_image == image and (overlap := float(pairwise_iou(corners, target))) >= best:
                best, taken = overlap, (of_image, number)
        if taken:
            del free[taken]
            hits += 1
        curve.append((hits / count, hits / rank))
    return np.mean([max((p for r, p in curve if r >= recall), default=0) for recall in np.linspace(0, 1, 101)])


def test_average_precision_equals_a_loop_over_ranked_predictions():
    draw = np.random.default_rng(0)
    truth, found = [], []
    for _ in range(12):
        count = int(draw.integers(0, 6))
        true = np.concatenate((draw.uniform(0, 80, (count, 2)), draw.uniform(10, 30, (count, 2))), axis=1)
        labels = draw.integers(0, 3, count)
        seen = np.concatenate((true, true, true + 40))
        seen = seen + draw.normal(0, 1.2, seen.shape)
        scores = draw.permutation(1000)[: len(seen)] / 1000
        truth.append({"boxes": true.tolist(), "labels": labels.tolist()})
        guesses = np.concatenate((labels, draw.permutation(labels), labels))
        found.append({"boxes": seen.tolist(), "labels": guesses.tolist(), "scores": scores.tolist()})
    result = average_precisions(truth, found, 3)
    for place, threshold in ((0, 0.5), (5, 0.75)):
        expected = [precision_by_loops(truth, found, label, threshold) for label in range(3)]
        assert result[place].tolist() == pytest.approx(expected, abs=1e-9)
        assert 0.05 < min(expected) < max(expected) < 0.95
    assert average_precisions(truth, [{"boxes": [], "labels": [], "scores": []}] * 12, 3).max() == 0


def test_average_precisions_are_the_very_ones_of_pycocotools(monkeypatch):
    draw = np.random.default_rng(1)
    truth, found = [], []
    for _ in range(40):
        true = draw.integers(1, 5, (int(draw.integers(0, 8)), 4))
        seen = np.concatenate([true + draw.integers(0, most, true.shape) for most in (1, 2, 2, 3)])  # ties all over
        labels = draw.integers(0, 2, len(true))
        truth.append({"boxes": true.tolist(), "labels": labels.tolist()})
        scores = draw.integers(1, 9, len(seen)).tolist()
        found.append({"boxes": seen.tolist(), "labels": np.tile(labels, 4).tolist(), "scores": scores})
    ours = average_precisions(truth, found, 2)
    monkeypatch.setattr(box_metrics, "Matching", COCOeval)
    assert np.array_equal(ours, average_precisions(truth, found, 2))
    assert 0.05 < ours.mean() < 0.95


def test_metrics_are_means_over_labels_and_nothing_is_printed(tmp_path, capsys):
    objective = bound(read_data(tmp_path, validation=(OBJECTS, OBJECTS)))
    scorer, rows = objective.scorer, objective.rows["validation"]
    right = {"boxes": OBJECTS["bbox"], "labels": [0, 1], "scores": [0.9, 0.8], "loss": 2.0, "items": 4}
    wrong = {"boxes": [[2, 4, 7.2, 8]], "labels": [0], "scores": [0.95], "loss": 1.0, "items": 2}  # IoU 0.72
    of_dog = 51 / 101  # half of the dogs are found: the recalls 0, 0.01, ..., 0.50
    at_75 = 51 / 101 / 2  # of cats: a miss, then a hit
    of_cat = (5 * 1 + 5 * at_75) / 10
    metrics = scorer.score([right, wrong], rows)
    assert metrics.pop("loss") == 0.5
    assert metrics == pytest.approx(
        {
            "map": (of_cat + of_dog) / 2,
            "map_50": (1 + of_dog) / 2,
            "map_75": (at_75 + of_dog) / 2,
            "ap_cat": of_cat,
            "ap_dog": of_dog,
        }
    )
    lines = scorer.table([right, wrong], rows).splitlines()
    assert lines[0].split() == ["label", "boxes", "AP", "AP@50", "AP@75"]
    assert lines[1].split() == ["cat", "2", f"{of_cat:.4f}", "1.0000", f"{at_75:.4f}"]
    assert lines[2].split() == ["dog", "2", "0.5050", "0.5050", "0.5050"]
    assert capsys.readouterr().out == ""
    assert scorer.samples([right, wrong], rows, count=1) == [
        {"prompt": "image 1", "text": " -> 1 cat, 1 dog"},
        {"prompt": "image 2", "text": " -> 1 cat (the data: 1 cat, 1 dog)"},
    ]
    (figure,) = scorer.figures([right, wrong], rows)
    picture = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(figure["png_base64"]))).convert("RGB"))
    for colour in ((0xE6, 0x19, 0x4B), (0x3C, 0xB4, 0x4B)):  # of a cat's and of a dog's box
        assert (picture == colour).all(-1).sum() > 100
    objective.args.score_threshold = 0.85
    assert [entry["label"] for entry in scorer.describe(right)["prediction"]] == ["cat"]


def test_clipped_boxes_keep_what_lies_in_the_image():
    whole = np.array([[-5.0, 2, 10, 4], [8, 8, 10, 10], [20, 20, 5, 5], [1, 1, 2, 2]])
    assert clip_boxes(whole, 10, 12).tolist() == [[0, 2, 5, 4], [8, 8, 2, 4], [10, 12, 0, 0], [1, 1, 2, 2]]


# ---------------------------------------------------------------------------------------------------- end to end


@pytest.mark.trains
def test_a_detector_is_trained_evaluated_and_used(tmp_path, capsys, seed_argv):
    folder = tmp_path / "run"
    smoke = ["--config", "recipes/configs/object_detection/smoke.yaml", "--num_train_epochs", "3"]
    finetune.main([*smoke, "--output_dir", str(folder), "--disable_tqdm", "true", *seed_argv])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["labels"] == ["circle", "square"]
    assert run["data"]["train"] == {"rows": 48, "boxes": 112}
    assert len(run["figures"]) == 1
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]

    evaluate.main(["--model", str(folder), "--batch_size", "5"])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    for name in ("loss", "map", "map_50", "map_75", "ap_circle", "ap_square"):
        assert metrics[f"test/{name}"] == pytest.approx(run["metrics"][f"test/{name}"], abs=1e-5)
    assert "AP@75" in capsys.readouterr().out

    output = tmp_path / "found.jsonl"
    images = "recipes/data/boxed_shapes/test"
    argv = ["--model", str(folder), "--input", images, "--output", str(output), "--score_threshold", "0.1"]
    predict.main([*argv, "--pictures", str(tmp_path / "drawn")])
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 12
    assert [Path(line["picture"]).name for line in lines][:1] == [f"00001_{Path(lines[0]['image']).stem}.png"]
    with PIL.Image.open(lines[0]["picture"]) as drawn, PIL.Image.open(lines[0]["image"]) as original:
        assert drawn.size == original.size
    with pytest.raises(ValueError, match=r"pictures='.*drawn' is not an empty folder; name another, or empty it"):
        predict.main([*argv, "--pictures", str(tmp_path / "drawn")])
    detector = pipeline("object-detection", model=str(folder))
    for line in lines[:3]:
        found = detector(line["image"], threshold=0.1)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in line["prediction"]]
        for entry, other in zip(found, line["prediction"], strict=True):
            assert entry["score"] == pytest.approx(other["score"], abs=1e-4)
            left, top, width, height = other["box"]
            corners = list(entry["box"].values())
            assert corners == pytest.approx([left, top, left + width, top + height], abs=1.2)
    assert sum(len(line["prediction"]) for line in lines) > 12


def test_boxes_are_drawn_in_the_colours_of_their_labels_where_they_are():
    image = PIL.Image.new("L", (300, 120), 128)
    found = {"boxes": [[100, 60, 60, 40], [2.0, 4.0, 0.3, 0.2]], "labels": [1, 0], "scores": [0.9, 0.6]}
    drawn = np.asarray(image_with_boxes(image, found, ["circle", "square"]))
    assert drawn.shape == (120, 300, 3)
    is_square = (drawn == tuple(bytes.fromhex(COLOURS[1][1:]))).all(-1)
    is_square = is_square[80:]  # below the name of the label
    rows, columns = np.nonzero(is_square)
    assert (rows.max(), columns.min(), columns.max()) == (19, 100, 159)
    assert is_square[19, 100:160].all()  # the lower edge
    assert is_square[:20, [100, 159]].all()
    assert not is_square[:18, 102:158].any()
    assert (np.asarray(image) == 128).all()  # a copy was drawn on


def test_a_task_that_draws_nothing_refuses_pictures(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to draw for causal_lm; leave pictures out"):
        PictureFolder(str(tmp_path / "drawn"), causal_lm.TASK)
    assert not (tmp_path / "drawn").exists()
