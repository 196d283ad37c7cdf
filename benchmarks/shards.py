"""Memory of fine-tuning data: images in Parquet and tar archives, texts, words and pairs in JSON; 400 MB beside 100.

    python benchmarks/run.py shard_memory

The images are noise, so that no format packs them.  Each measurement has a process of its own, which reads the rows,
holds some of them out for validation and makes the batches of an epoch, without keeping decoded images; texts are
read, and not tokenised.  Counted is the largest anonymous memory (RssAnon of Linux) beyond imports: pages of files
that are mapped, which the system takes back when it needs them, are not in it.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.rows import ROOT, Line, Settings, at_most, not_run, row

MEGABYTES = (100, 400)
STATUS = Path("/proc/self/status")
SIDE = 128  # pixels of an image, which takes 49 kB
SHARDS = 8


@row
def shard_memory(settings: Settings) -> list[Line]:
    """Peak memory of fine-tuning data: 400 MB beside 100 MB (images in Parquet and tar; texts and words in JSON)."""
    if not STATUS.is_file():
        return [not_run("shard_memory", "needs /proc/self/status of Linux")]
    lines = []
    for kind, (write, _) in KINDS.items():
        peaks = []
        for megabytes in MEGABYTES:
            folder = settings.folder / "shards" / f"{kind}-{megabytes}"
            folder.mkdir(parents=True)
            write(folder, megabytes // 10 if settings.quick else megabytes)
            peaks.append([measured(folder, kind) for _ in range(min(settings.turns, 2))])
        smaller, larger = peaks
        target = at_most(1.5)
        lines.append(Line(f"peak memory, 400 MB of {kind}", "MB", larger, smaller, "100 MB of them", target))
    return lines


def measured(folder: Path, kind: str) -> float:
    """MB beyond imports, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.shards", str(folder), kind]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- shards


def noise_images(count: int) -> list[bytes]:
    import PIL.Image

    draw, found = np.random.default_rng(), []
    for _ in range(count):
        file = io.BytesIO()
        pixels = draw.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        found.append(file.getvalue())
    return found


def images_of_a_shard(megabytes: int) -> list[bytes]:
    return noise_images(megabytes * 1_000_000 // SHARDS // (3 * SIDE**2))


def write_parquet(folder: Path, megabytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    for number in range(SHARDS):
        images = images_of_a_shard(megabytes)
        values = [{"bytes": image, "path": f"{number}-{row}.png"} for row, image in enumerate(images)]
        table = pyarrow.table({"image": values, "label": ["ab"[row % 2] for row in range(len(images))]})
        pyarrow.parquet.write_table(table, folder / f"train-{number:03}.parquet", row_group_size=100)


def write_tar(folder: Path, megabytes: int) -> None:
    for number in range(SHARDS):
        with tarfile.open(folder / f"train-{number:03}.tar", "w") as archive:
            for row_number, image in enumerate(images_of_a_shard(megabytes)):
                for suffix, content in (("png", image), ("cls", b"ab"[row_number % 2 : row_number % 2 + 1])):
                    member = tarfile.TarInfo(f"{row_number:05}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_json_lines(folder: Path, megabytes: int, kind: str) -> None:
    """Rows of about 2,000 bytes."""
    draw, written = np.random.default_rng(), 0
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            letters = draw.integers(97, 123, 1_950, dtype=np.uint8).tobytes().decode()
            words = [letters[start : start + 5] for start in range(0, 700, 5)]
            row: dict[str, object] = {"text": letters, "label": "ab"[written // 2_000 % 2]}
            if kind == "tagged words":
                row = {"tokens": words, "tags": ["OB"[word < "d"] for word in words]}
            elif kind == "pairs of texts":
                row = {"translation": {"de": letters[:975], "en": letters[975:]}}
            elif kind == "questions":
                answers = {"text": [letters[950:960]], "answer_start": [900]}
                row = {"question": letters[:50], "context": letters[50:], "answers": answers}
            written += file.write(json.dumps(row) + "\n")


KINDS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "images in Parquet": (write_parquet, "image_classification"),
    "images in tar": (write_tar, "image_classification"),
    "texts in JSON lines": (partial(write_json_lines, kind="texts"), "sequence_classification"),
    "tagged words in JSON lines": (partial(write_json_lines, kind="tagged words"), "token_classification"),
    "questions in JSON lines": (partial(write_json_lines, kind="questions"), "question_answering"),
    "pairs of texts in JSON lines": (partial(write_json_lines, kind="pairs of texts"), "translation"),
}


# ---------------------------------------------------------------------------------------- measured in its own process


def anonymous_memory() -> float:
    """MB of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) / 1000


def make_batches(folder: Path, kind: str) -> None:
    import bmtk  # noqa: F401  (registers the families)
    from bmtk.models.configuration_bm_cnn import BmCnnConfig

    name = KINDS[kind][1]
    task, is_text = import_module(f"bmtk.tasks.{name}").TASK, name != "image_classification"
    given: dict[str, object] = {"tokenizer": "bytes"} if is_text else {"cache_megabytes": 0}
    given |= {"source_language": "de", "target_language": "en"} if name == "translation" else {}
    args = task.arguments(dataset=str(folder), **given)
    beginning, stop, peak = anonymous_memory(), threading.Event(), [0.0]

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous_memory() - beginning)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    data = task.read(args, splits=("train", "validation"))
    if not is_text:
        sizes = {"image_size": 32, "hidden_sizes": [8], "depths": [1]}
        objective = data.bind(BmCnnConfig(**{**data.config_fields, **sizes}))
        batches = objective.train_batches(batch_size=32, seed=0)
        for step in range(int(batches.steps_per_epoch)):
            batches[step]
    stop.set()
    watcher.join()
    print(peak[0])


if __name__ == "__main__":
    make_batches(Path(sys.argv[1]), sys.argv[2])
