"""Image-text contrastive learning: the loss of a batch, retrieval over a split, two towers saved and loaded."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor, pipeline

import bmtk  # noqa: F401
from bmtk.data.image_transforms import BatchTransform, apply_batch_transform, draw_batch_transform
from bmtk.models.image_processing_bm import BmImageProcessor
from bmtk.tasks.image_text_contrastive import TASK, ImageTextContrastiveArguments, ranks
from bmtk.training.arguments import LoopArguments
from bmtk.training.finetuning_arguments import FineTuningArguments, resolve_defaults
from recipes import evaluate, finetune, predict, pretrain

SHAPES = finetune.CONFIGS.parent / "data" / "captioned_shapes"
VISION = {
    "bm_cnn": "{image_size: 24, hidden_sizes: [8, 16], depths: [1, 1]}",
    "bm_transformer": "{image_size: 24, patch_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
}
TEXT = {
    "bm_cnn": "{hidden_size: 16, num_hidden_layers: 1}",
    "bm_rnn": "{hidden_size: 16, num_hidden_layers: 1}",
    "bm_transformer": "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}",
}


def bound(vision="bm_cnn", text="bm_rnn", *, seed=42, **settings):
    towers = {"vision_model_type": vision, "vision_config": VISION.get(vision)}
    towers |= {"text_model_type": text, "text_config": TEXT.get(text)}
    sizes = {"tokenizer": "char", "projection_dim": 8, "dataset": str(SHAPES)}
    args = ImageTextContrastiveArguments(**{**sizes, **towers, **settings})
    data = TASK.read(args, seed=seed)
    return data.bind(data.new_config("vision-text-dual-encoder", {}))


@pytest.mark.parametrize(
    ("vision", "text"), [("bm_cnn", "bm_rnn"), ("bm_transformer", "bm_cnn"), ("bm_cnn", "bm_transformer")]
)
def test_two_towers_of_any_family_are_saved_and_loaded(tmp_path, vision, text):
    objective = bound(vision, text)
    assert objective.config.text_config.vocab_size == len(objective.tokenizer)
    assert objective.config.text_config.is_causal is False
    model = objective.auto_class.from_config(objective.config).eval()
    batch = objective.batch_rows(objective.rows["test"]).batch([0, 1, 2], [0] * 3)
    model.save_pretrained(tmp_path)
    objective.processor.save_pretrained(tmp_path)
    loaded, info = VisionTextDualEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits_per_text, model(**inputs).logits_per_text)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, VisionTextDualEncoderProcessor)
    again = processor(
        images=[objective.rows["test"].images[row]["image"] for row in range(3)],
        text=objective.rows["test"].captions[:3],
        padding=True,
        return_tensors="pt",
    )
    for name, value in inputs.items():
        assert torch.equal(again[name], value), name


def test_the_loss_is_clip_s_without_equal_captions_as_negatives():
    objective = bound()
    logits, labels = torch.randn(4, 4), torch.tensor([0, 1, 0, 2])
    total = 0.0
    for matrix in (logits, logits.T):
        for row in range(4):
            others = [column for column in range(4) if column == row or labels[column] != labels[row]]
            total += math.log(sum(math.exp(matrix[row, column]) for column in others)) - matrix[row, row].item()
    loss = objective.criterion({"logits_per_image": logits}, {"labels": labels})
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)
    distinct = objective.criterion({"logits_per_image": logits}, {"labels": torch.arange(4)})
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert distinct.item() == pytest.approx(4 * expected.item(), rel=1e-5)


def test_a_step_is_not_cut_into_parts():
    objective = bound()
    message = (
        "image_text_contrastive compares every row with all others of its optimizer step, which would be cut into"
    )
    for sizes in ({"micro_batch_size": 8}, {"world_size": 2, "rank": 1}):
        with pytest.raises(ValueError, match=f"{message} 2 parts; use one process"):
            objective.train_batches(batch_size=16, seed=0, **sizes)
    (batch,) = objective.train_batches(batch_size=16, micro_batch_size=16, seed=0)[0]
    assert len(batch["labels"]) == objective.num_items(batch) == 16
    args = FineTuningArguments(gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=f"{message} 3 parts"):
        resolve_defaults(args, objective)
    assert LoopArguments().micro_batch_size == 0


def test_ranks_are_places_among_all_rows_and_equal_captions_do_not_compete():
    draw = np.random.default_rng(0)
    queries, found = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in draw.normal(size=(2, 9, 4)))
    names = np.array([0, 1, 2, 3, 0, 5, 6, 1, 8])
    places, losses = ranks(queries, found, names, 7.0, block=4)
    for row in range(9):
        others = [column for column in range(9) if names[column] != names[row]]
        cosines = queries[row] @ found.T
        assert places[row] == 1 + sum(cosines[column] >= cosines[row] for column in others)
        logits = 7.0 * torch.tensor(cosines[[row, *others]])
        assert losses[row] == pytest.approx(-logits.log_softmax(0)[0].item(), rel=1e-9)
    assert ranks(np.ones((3, 1)), np.ones((3, 1)), np.arange(3), 1.0)[0].tolist() == [3, 3, 3], "ties are no hits"


def test_metrics_do_not_depend_on_the_batches():
    objective = bound()
    model, scorer = objective.auto_class.from_config(objective.config).eval(), objective.scorer
    rows, scores = objective.rows["validation"], []
    for size in (7, 40):
        with torch.no_grad():
            batches = objective.batches_in_order(rows, batch_size=size)
            predictions = [p for batch in batches for p in scorer.predict(model, batch)]
        scores.append(scorer.score(predictions, rows))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    names = {f"{way}_{name}" for way in ("image_to_text", "text_to_image") for name in ("recall_at_1", "recall_at_5")}
    assert names | {"loss", "image_to_text_mean_rank", "text_to_image_mean_rank"} == scores[0].keys()
    whole = objective.batch_rows(rows).batch(range(40), [0] * 40)
    with torch.no_grad():
        outputs = model(**{name: value for name, value in whole.items() if name != "labels"})
    assert scores[0]["loss"] == pytest.approx(objective.criterion(outputs, whole).item() / 40, rel=1e-4)
    (figure,) = scorer.figures(predictions, rows)
    assert figure["title"].startswith("Captions and the images")
    assert scorer.samples(predictions, rows)[0]["prompt"] == f"[{rows.captions[0]}]"


def test_training_rows_are_changed_as_seed_epoch_and_row_say(tmp_path):
    objective = bound(image_augmentation=1.0)
    rows = objective.batch_rows(objective.rows["train"], is_training=True)
    both = rows.batch([3, 5], [1, 2])
    assert torch.equal(rows.batch([5], [2])["pixel_values"][0], both["pixel_values"][1])
    assert not torch.equal(rows.batch([5], [3])["pixel_values"][0], both["pixel_values"][1])
    plain = bound()
    assert torch.equal(
        plain.batch_rows(plain.rows["test"]).batch([5], [2])["pixel_values"],
        objective.batch_rows(objective.rows["test"]).batch([5], [1])["pixel_values"],
    )
    others = {"caption": ["a b"] * 40, "more": ["c d"] * 40, "none": [None] * 40}
    images = objective.rows["test"].images.rows["image"][:40]
    Dataset.from_dict({"image": list(images), **others}).to_parquet(tmp_path / "train.parquet")
    files = {"train_file": [str(tmp_path / "train.parquet")], "dataset": None, "validation_fraction": 0.5}
    objective = bound(**files, other_caption_columns=["more", "none"])
    batch = objective.batch_rows(objective.rows["train"], is_training=True).batch(range(20), [0] * 20)
    first = {objective.tokenizer.decode(ids) for ids in batch["input_ids"]}
    assert first == {"a b", "c d"}, "texts that are missing are not drawn"
    assert set(batch["labels"].tolist()) == {0}
    measured = objective.batch_rows(objective.rows["validation"]).batch(range(20), [0] * 20)
    assert {tuple(ids) for ids in measured["input_ids"].tolist()} == {tuple(objective.tokenizer("a b")["input_ids"])}


def test_changes_turn_shift_and_colour_an_image():
    image = torch.zeros(1, 3, 8, 8)
    image[:, :, 2, 5] = 1.0
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    turned = apply_batch_transform(
        image, BatchTransform(quarter, torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 0.0, 0.25]]))
    )
    expected = torch.rot90(image[0, 0])
    assert torch.allclose(turned[0, 0], expected, atol=1e-5)
    assert torch.allclose(turned[0, 1], 2 * expected, atol=1e-5)
    assert torch.allclose(turned[0, 2], expected / 2 + 0.25, atol=1e-5)
    moved = apply_batch_transform(
        image, BatchTransform(torch.tensor([[[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]]]), torch.ones(1, 3), torch.zeros(1, 3))
    )
    assert torch.allclose(moved[0, 0], image[0, 0].roll(-1, 1), atol=1e-5), "a quarter of half of 8 pixels"
    none = draw_batch_transform(0.0, np.random.default_rng(0))
    assert torch.equal(none.matrix, torch.eye(2, 3))
    assert none.gain.tolist() == [1.0] * 3


def test_transparent_images_are_put_on_white():
    picture = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 1), (255, 0, 0, 255))
    palette = picture.quantize(4)
    for image in (picture, palette):
        pixels = BmImageProcessor(size={"height": 4, "width": 4})(image, return_tensors="pt")["pixel_values"][0]
        assert pixels[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
        assert pixels[:, 1, 1].tolist() == [1.0, -1.0, -1.0]
    grey = BmImageProcessor(
        size={"height": 4, "width": 4}, do_convert_grayscale=True, image_mean=[0.5], image_std=[0.5]
    )
    assert grey(picture, return_tensors="pt")["pixel_values"][0, 0, 0, 0].item() == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"caption_column": "text"},
            r"caption_column='text' is not in the train data; its columns are image,",
        ),
        ({"other_caption_columns": ["x"]}, r"other_caption_columns='x' is not in the train data"),
        ({"image_augmentation": -1.0}, r"image_augmentation=-1\.0 must be at least 0"),
        ({"vision": "bm_nothing"}, r"vision_model_type='bm_nothing' is unknown"),
        (
            {"text_config": "{hiden_size: 3}"},
            r"text_config: a bm_rnn has no field 'hiden_size'; did you mean 'hidden_size'",
        ),
        ({"text_config": "just words"}, r"text_config='just words' must be a mapping"),
        ({"text_config": "{a: "}, r"text_config is not YAML"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        bound(**settings)


def test_fields_of_one_tower_are_refused_outside_of_its_config():
    data = bound().data
    with pytest.raises(ValueError, match="hidden_size: there are two towers; put what is meant for one of them into"):
        data.new_config("bm_cnn", {"hidden_size": 3})


@pytest.mark.trains
def test_from_pretraining_to_naming_images(tmp_path, monkeypatch, seed_argv):
    monkeypatch.chdir(finetune.CONFIGS.parents[1])
    folder, short = tmp_path / "run", ["--num_train_steps", "80", "--eval_steps", "0", *seed_argv]
    pretrain.main(["--task", "image_text_contrastive", "--preset", "smoke", "--output_dir", str(folder), *short])
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    assert metrics["test/image_to_text_recall_at_1"] > 0.2, "chance is 0.05 to 0.1"
    evaluate.main(["--model", str(folder), "--batch_size", "7"])
    measured = json.loads((folder / "metrics.json").read_text())["metrics"]
    for name in ("loss", "image_to_text_recall_at_1", "text_to_image_mean_rank"):
        assert measured[f"test/{name}"] == pytest.approx(metrics[f"test/{name}"], rel=1e-4)
    output = tmp_path / "out.jsonl"
    predict.main(["--model", str(folder), "--input", str(SHAPES / "test.parquet"), "--output", str(output)])
    assert len(output.read_text().splitlines()) == 40
    rows = Dataset.from_parquet(str(SHAPES / "test.parquet"))
    labels = sorted(set(rows["caption"]))
    name = pipeline("zero-shot-image-classification", model=str(folder))
    best = name(rows[0]["image"].convert("RGB"), candidate_labels=labels, hypothesis_template="{}")[0]["label"]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=rows[0]["image"], text=labels, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert best == labels[model(**inputs).logits_per_image.argmax()]


@pytest.mark.trains
def test_the_trainer_trains_it_as_well(tmp_path, monkeypatch, seed_argv):
    monkeypatch.chdir(finetune.CONFIGS.parents[1])
    smoke = finetune.arguments.read_yaml(finetune.CONFIGS / "image_text_contrastive" / "smoke.yaml")
    of_the_loop = ("num_train_steps", "batch_size", "eval_steps", "save_steps", "precision", "output_dir")
    argv = [f"--{name}={value}" for name, value in smoke.items() if name not in of_the_loop]
    run = ["--output_dir", str(tmp_path), "--max_steps", "3", "--per_device_train_batch_size", "60", *seed_argv]
    finetune.main([*argv, *run, "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"])
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["metrics"]["test/loss"] < math.log(40) + 0.5
    assert AutoModel.from_pretrained(tmp_path).config.vision_config.model_type == "bm_cnn"


def test_a_cell_of_several_captions_gives_one_that_is_drawn_in_each_epoch(tmp_path):
    captions = [[f"{name} {number}" for number in range(5)] for name in ("red", "blue", "green")]
    images = [PIL.Image.new("RGB", (8, 8), name) for name in ("red", "blue", "green")]
    rows = Dataset.from_dict({"image": images, "caption": [*captions[:2], ["", " ", captions[2][0]]]})
    rows = rows.cast_column("image", Image())
    rows.to_parquet(tmp_path / "train.parquet")
    rows.to_parquet(tmp_path / "validation.parquet")
    towers = {"vision_config": VISION["bm_cnn"], "text_model_type": "bm_rnn", "text_config": TEXT["bm_rnn"]}
    args = ImageTextContrastiveArguments(dataset=str(tmp_path), tokenizer="char", leakage="allow", **towers)
    data = TASK.read(args)
    assert list(data.rows["train"]["captions"]) == [*captions[:2], ["green 0"]]
    assert "caption_column='caption' holds lists of 3 to 5 train captions: one of a row's is drawn in each epoch" in (
        data.notes
    )
    found, tokenizer = data.bind(data.new_config("vision-text-dual-encoder", {})).rows["train"], data.tokenizer
    seen = []
    for epoch in range(8):
        found.set_epoch(epoch)
        expected = np.random.default_rng((data.seed, epoch, 0)).integers(5)
        text = tokenizer.decode(found[0]["input_ids"], skip_special_tokens=True)
        assert text == captions[0][expected]
        seen.append(text)
    assert len(set(seen)) > 2
    rows = Dataset.from_dict({"image": images, "caption": [[{"raw": "a"}]] * 3}).cast_column("image", Image())
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="caption_column='caption' of train row 1 holds raw together"):
        TASK.read(args)
