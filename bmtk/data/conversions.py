"""Published files into the layout that the configs name: one small function a data set.

Each gets the downloaded files in the order of their sources, an empty folder to fill, and, where the splits are not
those of the publication, the places of the rows: an array for each split.
"""

import csv
import gzip
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

Places = Mapping[str, np.ndarray]
Convert = Callable[[Sequence[Path], Path, Places], None]
SPLITS = ("train", "validation", "test")
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = ("RBC", "WBC", "Platelets")
# Articles of the development set of SQuAD that are validation and test rows here; all others are training rows.
VALIDATION_ARTICLES = {"Super_Bowl_50", "Oxygen", "Newcastle_upon_Tyne", "Economic_inequality"}
TEST_ARTICLES = {
    *("Normans", "1973_oil_crisis", "Packet_switching"),
    *("Black_Death", "American_Broadcasting_Company", "Islamism"),
}
EDGES = ("xmin", "ymin", "xmax", "ymax")
ROWS_PER_GROUP = 1000  # of Parquet
FIRST_IMAGES = {"train": 500, "test": 100}  # of each class of CIFAR-10


def copies(*names: str) -> Convert:
    """Files that stay as they are, under other names."""

    def convert(files: Sequence[Path], folder: Path, places: Places) -> None:
        for path, name in zip(files, names, strict=True):
            shutil.copyfile(path, folder / name)

    return convert


def sst2(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Lines "label TAB sentence"."""
    for path, split in zip(files, SPLITS, strict=True):
        rows = (line.split("\t", 1) for line in _lines(path))
        _write_csv(folder / f"{split}.csv", ("sentence", "label"), ((text, label) for label, text in rows))


def trec(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Lines "COARSE:fine question" in Latin-1."""
    for path, split in zip(files, ("train", "test"), strict=True):
        rows = (line.split(" ", 1) for line in _lines(path, "latin-1"))
        found = ({"text": text, "label": fine.split(":")[0], "fine_label": fine} for fine, text in rows)
        _write_jsonl(folder / f"{split}.jsonl", found)


def hotel_reviews(files: Sequence[Path], folder: Path, places: Places) -> None:
    """A CSV file with columns label and review."""
    with files[0].open(encoding="utf-8-sig", newline="") as file:
        rows = [(row["review"], row["label"]) for row in csv.DictReader(file)]
    for split, chosen in places.items():
        _write_csv(folder / f"{split}.csv", ("text", "label"), (rows[place] for place in chosen))


def wnut17(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Lines "token TAB tag"; a blank line ends a sentence."""
    for path, split in zip(files, SPLITS, strict=True):
        sentences = enumerate(_sentences(path))
        found = ({"id": str(i), "tokens": tokens, "ner_tags": tags} for i, (tokens, tags) in sentences)
        _write_jsonl(folder / f"{split}.jsonl", found)


def multi30k(files: Sequence[Path], folder: Path, places: Places) -> None:
    """For each split a file of German sentences and one of their English translations, line by line."""
    for split, german, english in zip(SPLITS, files[::2], files[1::2], strict=True):
        with gzip.open(german, "rt", encoding="utf-8") as left, gzip.open(english, "rt", encoding="utf-8") as right:
            pairs = zip(left, right, strict=True)
            found = ({"translation": {"de": de.rstrip("\n"), "en": en.rstrip("\n")}} for de, en in pairs)
            _write_jsonl(folder / f"{split}.jsonl", found)


def tatoeba(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Lines "English TAB Chinese"."""
    rows = [line.split("\t") for line in _lines(files[0])]
    for split, chosen in places.items():
        found = ({"translation": {"en": rows[place][0], "zh": rows[place][1]}} for place in chosen)
        _write_jsonl(folder / f"{split}.jsonl", found)


def song_ci(files: Sequence[Path], folder: Path, places: Places) -> None:
    """JSON lists of poems with author, rhythmic (the tune) and paragraphs."""
    poems = [(f"{path.stem}-{i}", poem) for path in files for i, poem in enumerate(json.loads(path.read_bytes()))]
    for split, chosen in places.items():
        found = ((name, poem) for name, poem in (poems[place] for place in chosen))
        rows = (
            {"id": name, "tune": poem["rhythmic"], "author": poem["author"], "text": "\n".join(poem["paragraphs"])}
            for name, poem in found
        )
        _write_jsonl(folder / f"{split}.jsonl", rows)


def squad_v1_dev(files: Sequence[Path], folder: Path, places: Places) -> None:
    """A zip archive of the development set, divided by article."""
    with zipfile.ZipFile(files[0]) as archive:
        content = json.loads(archive.read("dev-v1.1.json"))
    rows = list(_questions(content))
    parts = {"validation": VALIDATION_ARTICLES, "test": TEST_ARTICLES}
    named = VALIDATION_ARTICLES | TEST_ARTICLES
    _write_questions(folder / "train.parquet", [row for row in rows if row["title"] not in named])
    for split, titles in parts.items():
        _write_questions(folder / f"{split}.parquet", [row for row in rows if row["title"] in titles])


def cmrc2018(files: Sequence[Path], folder: Path, places: Places) -> None:
    """The official development and trial sets, nested as SQuAD is."""
    for path, split in zip(files, ("train", "validation"), strict=True):
        _write_questions(folder / f"{split}.parquet", list(_questions(json.loads(path.read_bytes()))))


def fashion_mnist(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Images and labels of IDX files, stored as PNG."""
    from datasets import ClassLabel, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=list(CLOTHES))})
    for split, images, labels in zip(("train", "test"), files[::2], files[1::2], strict=True):
        pixels, classes = _idx(images), _idx(labels)
        rows = [
            {"image": {"bytes": _png(image), "path": None}, "label": int(label)}
            for image, label in zip(pixels, classes, strict=True)
        ]
        _write_parquet(folder / f"{split}.parquet", rows, features)


def cifar10_mini(files: Sequence[Path], folder: Path, places: Places) -> None:
    """The first images of each class, by name."""
    counts: dict[tuple[str, str], int] = {}
    with _members(files[0]) as members:
        names = sorted(name for name in members if re.fullmatch(r"(train|test)/\w+/\d+\.jpg", name))
        for name in names:
            split, label, _ = name.split("/")
            counts[split, label] = counts.get((split, label), 0) + 1
            if counts[split, label] <= FIRST_IMAGES[split]:
                _write(folder / name, members[name]())


def bccd(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Images, boxes in the XML of Pascal VOC, and lists of names."""
    with _members(files[0]) as members:
        for split, listed in zip(SPLITS, ("train", "val", "test"), strict=True):
            rows = []
            for name in members[f"BCCD/ImageSets/Main/{listed}.txt"]().decode().split():
                _write(folder / split / f"{name}.jpg", members[f"BCCD/JPEGImages/{name}.jpg"]())
                rows.append(_boxes_of(name, members[f"BCCD/Annotations/{name}.xml"]()))
            _write_jsonl(folder / split / "metadata.jsonl", rows)


def _boxes_of(name: str, content: bytes) -> dict[str, Any]:
    tree = ElementTree.fromstring(content)
    boxes: list[list[float]] = []
    labels = []
    for item in tree.iter("object"):
        left, top, right, bottom = (float(item.findtext(f"bndbox/{edge}") or 0) for edge in EDGES)
        if right > left and bottom > top:
            boxes.append([left, top, right - left, bottom - top])
            labels.append(item.findtext("name") or "")
    width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    objects = {"bbox": boxes, "category": [CELLS.index(label) for label in labels], "category_name": labels}
    number = int(name.rpartition("_")[2])
    return {"file_name": f"{name}.jpg", "image_id": number, "width": width, "height": height, "objects": objects}


def fsdd(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Recordings named DIGIT_SPEAKER_TAKE.wav; takes 0 to 4 are the test set."""
    from datasets import Audio, ClassLabel, Features, Value

    features = Features(
        {
            "audio": Audio(),
            "label": ClassLabel(names=list(DIGITS)),
            "transcription": Value("string"),
            "speaker": Value("string"),
            "take": Value("int32"),
        }
    )
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for name, content in _recordings(files[0], "recordings/"):
        digit, speaker, take = name.removesuffix(".wav").split("_")
        row = {"audio": {"bytes": content, "path": name}, "label": int(digit), "transcription": DIGITS[int(digit)]}
        rows["test" if int(take) < 5 else "train"].append({**row, "speaker": speaker, "take": int(take)})
    for split, found in rows.items():
        _write_parquet(folder / f"{split}.parquet", found, features)


def yesno(files: Sequence[Path], folder: Path, places: Places) -> None:
    """Recordings of eight words, whose names say which: 1 is yes; the first 31 are training rows."""
    from datasets import Audio, Features, Value

    features = Features({"audio": Audio(), "transcription": Value("string")})
    rows = []
    for name, content in _recordings(files[0], "waves_yesno/"):
        words = " ".join("yes" if mark == "1" else "no" for mark in name.removesuffix(".wav").split("_"))
        rows.append({"audio": {"bytes": content, "path": name}, "transcription": words})
    for split, found in (("train", rows[:31]), ("test", rows[31:])):
        _write_parquet(folder / f"{split}.parquet", found, features)


# ------------------------------------------------------------------------------------------------ reading and writing


def _lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    with path.open(encoding=encoding, newline="\n") as file:
        yield from (line.rstrip("\r\n") for line in file)


def _sentences(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    tokens: list[str] = []
    tags: list[str] = []
    for line in (*_lines(path), ""):
        if line.strip():
            token, tag = line.rstrip("\t").split("\t")
            tokens.append(token)
            tags.append(tag)
        elif tokens:
            yield tokens, tags
            tokens, tags = [], []


def _questions(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question["answers"]
                yield {
                    "id": question["id"],
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                }


def _idx(path: Path) -> np.ndarray:
    """The array of bytes of an IDX file: its third byte of the head is the type, the fourth the number of axes."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _members(path: Path) -> Iterator[dict[str, Callable[[], bytes]]]:
    """The files of an archive of a repository, without the folder that it puts around them."""
    with tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]

        def reader(member: tarfile.TarInfo) -> Callable[[], bytes]:
            def read() -> bytes:
                content = archive.extractfile(member)
                assert content is not None
                return content.read()

            return read

        yield {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])): reader(member) for member in files}


def _recordings(path: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    with _members(path) as members:
        for name in sorted(name for name in members if name.startswith(folder) and name.endswith(".wav")):
            yield name.removeprefix(folder), members[name]()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_questions(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Features, List, Value

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    texts = {name: Value("string") for name in ("id", "title", "context", "question")}
    _write_parquet(path, rows, Features({**texts, "answers": answers}))


def _write_parquet(path: Path, rows: list[dict[str, Any]], features: Any) -> None:
    import pyarrow.parquet

    # Not by datasets: it would encode recordings anew, for which it needs torchcodec.
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS_PER_GROUP)
