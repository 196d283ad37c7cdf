"""What every model serves, row by row of model_cases.py: generation, pipelines, code that travels without bmtk."""

import inspect
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from model_cases import (
    CASES,
    CAUSAL_LM_CASES,
    GENERATING_CASES,
    PIPELINE_CASES,
    VOCAB,
    Case,
    output_of,
    over,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Wav2Vec2CTCTokenizer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from bmtk.models import FAMILIES as REGISTERED
from bmtk.models.feature_extraction_bm import BmFeatureExtractor
from bmtk.models.image_processing_bm import BmImageProcessor

# Generation ----------------------------------------------------------------------------------------------------------

STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beam": {"do_sample": False, "num_beams": 3},
}
NEW_TOKENS = 10


def prompts() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompts of 8, 5 and 2 tokens: alone, and together with padding on the left (3, 8)."""
    alone = [torch.randint(3, VOCAB, (1, length)) for length in (8, 5, 2)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(alone):
        ids[row, 8 - prompt.shape[1] :], mask[row, 8 - prompt.shape[1] :] = prompt, 1
    return alone, ids, mask


def writer(case: Case):
    """A model whose weights are wide enough that what it writes depends on what it has read."""
    return case.model(seed=4, initializer_range=0.5 if case.family == "bm_rnn" else 0.3)


def written(model, ids: torch.Tensor, mask: torch.Tensor, **settings) -> list[list[int]]:
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)[:, -NEW_TOKENS:].tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
@over(GENERATING_CASES)
def test_the_cache_changes_no_generated_token(case, strategy):
    model = writer(case)
    _, ids, mask = prompts()
    found = [written(model, ids, mask, use_cache=cached, **STRATEGIES[strategy]) for cached in (False, True)]
    for settings in ({"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        found.append(written(model, ids, mask, **settings, **STRATEGIES[strategy]))
    assert all(one == found[0] for one in found)
    assert len({tuple(row) for row in found[0]}) == 3, "all prompts continue alike: the comparison says little"


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@over(GENERATING_CASES)
def test_generation_under_left_padding_equals_one_row_at_a_time(case, strategy):
    model = writer(case)
    alone, ids, mask = prompts()
    together = written(model, ids, mask, **STRATEGIES[strategy])
    for row, prompt in zip(together, alone, strict=True):
        assert [row] == written(model, prompt, torch.ones_like(prompt), **STRATEGIES[strategy])


@over(CAUSAL_LM_CASES)
@torch.no_grad()
def test_greedy_generation_is_the_likeliest_token_over_and_over(case):
    model = writer(case)
    for prompt in prompts()[0]:
        expected = prompt
        for _ in range(NEW_TOKENS):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert written(model, prompt, torch.ones_like(prompt), do_sample=False) == expected[:, -NEW_TOKENS:].tolist()


# Pipelines -----------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<bos>", "<mask>", *(f"w{i}" for i in range(3, VOCAB))]
TEXTS = ["w3 w4 <mask> w6", "w9 <mask>"]
LETTERS = "_abcdefghijklmnopqrstuvwxyz'^$|"


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def speller(folder) -> Wav2Vec2CTCTokenizer:
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="_", unk_token="'", bos_token="^", eos_token="$")


def pictures() -> list[Image.Image]:
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(256, size=(20, width, 3), dtype=np.uint8)) for width in (20, 30)]


def recordings() -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    return [numbers.standard_normal(length).astype(np.float32) for length in (8000, 5000)]


def served(case: Case, folder):
    """A model, saved in a folder with what prepares its inputs: (model, that, two inputs of the pipeline)."""
    model = case.model(initializer_range=0.5, **({"vocab_size": len(LETTERS)} if case.head_name == "CTC" else {}))
    model.save_pretrained(folder)
    if model.config.input_type == "tokens":
        processor, given = tokenizer(), TEXTS
    elif model.config.input_type == "audio":
        processor, given = BmFeatureExtractor(feature_size=model.config.num_mel_bins), recordings()
    else:
        processor, given = BmImageProcessor.for_config(model.config), pictures()
    processor.save_pretrained(folder)
    if case.head_name == "CTC":
        speller(folder).save_pretrained(folder)
    return model, processor, given


@torch.no_grad()
def outputs_alone(model, processor, given) -> list:
    """What the model says of each input, without a pipeline."""
    return [model(**processor(one, return_tensors="pt")) for one in given]


def continues(pipe, model, processor, given) -> None:
    for text, answer in zip(given, pipe(given, max_new_tokens=4, do_sample=False), strict=True):
        inputs = processor(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:]
        expected = text + processor.decode(new, skip_special_tokens=True)
        assert answer[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")


def fills_in(pipe, model, processor, given) -> None:
    for text, answer, outputs in zip(given, pipe(given), outputs_alone(model, processor, given), strict=True):
        place = text.split().index("<mask>")
        assert answer[0]["token"] == outputs.logits[0, place].argmax().item()
        assert answer[0]["score"] == pytest.approx(outputs.logits[0, place].softmax(-1).max().item(), abs=1e-5)


def scores_labels(pipe, model, processor, given) -> None:
    answers = pipe(given, function_to_apply="none", top_k=3)
    for answer, outputs in zip(answers, outputs_alone(model, processor, given), strict=True):
        assert sorted(one["score"] for one in answer) == pytest.approx(sorted(outputs.logits[0].tolist()), abs=1e-5)


def labels_words(pipe, model, processor, given) -> None:
    for answer, outputs in zip(pipe(given), outputs_alone(model, processor, given), strict=True):
        best = outputs.logits[0].argmax(-1).tolist()
        assert [one["entity"] for one in answer] == [model.config.id2label[label] for label in best]


def finds_boxes(pipe, model, processor, given) -> None:
    for picture, outputs in zip(given, outputs_alone(model, processor, given), strict=True):
        sizes = [(picture.height, picture.width)]
        expected = processor.post_process_object_detection(outputs, threshold=0.01, target_sizes=sizes)[0]
        answer = pipe(picture, threshold=0.01)
        assert [one["score"] for one in answer] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
        assert answer


def spells(pipe, model, processor, given) -> None:
    for recording, outputs in zip(given, outputs_alone(model, processor, given), strict=True):
        best = outputs.logits[0].argmax(-1).tolist()
        merged = [token for i, token in enumerate(best) if i == 0 or token != best[i - 1]]
        expected = "".join(LETTERS[token] for token in merged if token).replace("|", " ").strip()
        assert pipe(recording)["text"] == expected != ""


@over({name: case for name, case in PIPELINE_CASES.items() if case.head_name == "CTC"})
def test_a_transcription_knows_when_letters_were_spoken_and_loses_none_in_chunks(case, tmp_path):
    """A position is four frames of 10 ms long, so letters begin at multiples of 40 ms."""
    model, processor, given = served(case, tmp_path)
    pipe, (outputs, *_) = pipeline(case.pipeline, model=str(tmp_path)), outputs_alone(model, processor, given)
    best = outputs.logits[0].argmax(-1).tolist()
    starts = [i for i, token in enumerate(best) if token and (i == 0 or token != best[i - 1])]
    found = pipe(given[0], return_timestamps="char")["chunks"]
    assert [chunk["timestamp"][0] for chunk in found] == pytest.approx([0.04 * start for start in starts])
    recording, counts = np.tile(given[0], 40)[: 4 * 16000], []
    decode = pipe.tokenizer.decode
    pipe.tokenizer.decode = lambda ids, **settings: counts.append(len(ids)) or decode(ids, **settings)
    pipe(recording, chunk_length_s=1.0)
    assert 4 / 0.04 - 6 <= counts[0] <= 4 / 0.04  # a chunk ends up to a position early


def gives_positions(pipe, model, processor, given) -> None:
    for one, outputs in zip(given, outputs_alone(model, processor, given), strict=True):
        answer = torch.tensor(pipe(one))
        assert (answer - outputs.last_hidden_state).abs().max() <= 1e-5


SERVES = {
    "text-generation": continues,
    "fill-mask": fills_in,
    "text-classification": scores_labels,
    "token-classification": labels_words,
    "image-classification": scores_labels,
    "audio-classification": scores_labels,
    "object-detection": finds_boxes,
    "automatic-speech-recognition": spells,
    "feature-extraction": gives_positions,
    "image-feature-extraction": gives_positions,
}


@over(PIPELINE_CASES)
def test_the_pipeline_gives_the_output_of_the_model(case, tmp_path):
    task = case.pipeline
    model, processor, given = served(case, tmp_path)
    settings = {"ignore_labels": []} if task == "token-classification" else {}
    SERVES[task](pipeline(task, model=str(tmp_path), **settings), model, processor, given)


def test_every_head_that_a_pipeline_serves_is_served():
    """Zero-shot tasks stand on classifiers of statements; they and "decision" are no task of a head of their own."""
    served_here = {case.head.auto_name for case in PIPELINE_CASES.values()}
    pipelines = {auto.__name__ for task in PIPELINE_REGISTRY.supported_tasks.values() for auto in task["pt"]}
    registered = {name for config_class in REGISTERED for name in config_class.heads}
    assert served_here == registered & pipelines


# Uploaded code, in a process that has no bmtk ------------------------------------------------------------------------

WITHOUT_BMTK = """
import importlib.abc, json, sys
from pathlib import Path

class NoBmtk(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bmtk":
            raise ModuleNotFoundError("bmtk is not installed here")

sys.meta_path.insert(0, NoBmtk())
import torch, transformers

OUTPUT_OF

def load(auto_name, folder):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto_class = getattr(transformers, auto_name)
    if auto_name == "AutoBackbone":  # transformers 5.23 looks for a folder's name on the Hub
        return type(auto_class.from_config(config, trust_remote_code=True)).from_pretrained(folder).eval()
    return auto_class.from_pretrained(folder, trust_remote_code=True)

found, tried = {}, set()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto_name = json.loads((folder / "case.json").read_text())
    saved = torch.load(folder / "expected.pt")
    again = Path(sys.argv[2]) / folder.name
    with torch.no_grad():
        model = load(auto_name, folder)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        equal = torch.equal(output_of(model(**saved["inputs"])), saved["output"])
        model.save_pretrained(again)
        equal_again = torch.equal(output_of(load(auto_name, again)(**saved["inputs"])), saved["output"])
    found[folder.name] = {"equal": equal, "equal_again": equal_again}
    shape = folder.name.rpartition("-")[0]
    if shape in tried:
        continue
    tried.add(shape)
    heads = found[folder.name]["heads"] = {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name in config.auto_map:
        try:
            if name != "AutoConfig":
                heads[name] = type(getattr(transformers, name).from_config(config, trust_remote_code=True)).__name__
        except ValueError as error:
            heads[name] = str(error)
assert not [name for name in sys.modules if name.split(".")[0] == "bmtk"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """Of a family: every case saved, loaded without bmtk and saved again there; (folders, folders again, reports)."""
    done = {}

    def of(family: str):
        if family not in done:
            done[family] = load_elsewhere(family, tmp_path_factory.mktemp(family))
        return done[family]

    return of


def load_elsewhere(family: str, root):
    saved, again, elsewhere = root / "saved", root / "again", root / "elsewhere"
    elsewhere.mkdir()
    for name, case in CASES.items():
        if case.family == family:
            model, inputs = case.model(initializer_range=0.2), case.inputs()
            model.save_pretrained(saved / name)
            (saved / name / "case.json").write_text(json.dumps(case.head.auto_name))
            with torch.no_grad():
                torch.save({"inputs": inputs, "output": output_of(model(**inputs))}, saved / name / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = WITHOUT_BMTK.replace("OUTPUT_OF", inspect.getsource(output_of))
    child = subprocess.run(
        [sys.executable, "-c", program, str(saved), str(again)],
        cwd=elsewhere, env={**environment, "HF_MODULES_CACHE": str(root / "modules")}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return saved, again, json.loads(child.stdout.splitlines()[-1])


@over(CASES)
def test_uploaded_code_gives_equal_outputs_without_bmtk(case, uploaded):
    assert uploaded(case.family)[2][case.name]["equal"]


@over({case.shape: case for case in CASES.values()})
def test_every_head_resolves_from_the_uploaded_map_without_bmtk(case, uploaded):
    reports = uploaded(case.family)[2]
    (name,) = (name for name, report in reports.items() if CASES[name].shape == case.shape and "heads" in report)
    config = CASES[name].config()
    classes = {auto_name: reference.split(".")[1] for auto_name, reference in config.heads.items()}
    assert reports[name]["heads"].keys() == classes.keys()
    for auto_name, found in reports[name]["heads"].items():
        if config.is_encoder_decoder and auto_name == "AutoModel":
            assert found == classes[auto_name].replace("Model", "EncoderDecoderModel")
        elif found != classes[auto_name]:  # a refusal names a field that does not fit
            asked = re.match(rf"{classes[auto_name]} needs (\w+)=('?\w+'?)", found)
            has_two_stacks = config.is_encoder_decoder and "makes two stacks" in found
            assert asked or has_two_stacks or "tie_word_embeddings" in found, found
            assert not asked or repr(getattr(config, asked[1])) != asked[2], found


@over(CASES)
def test_a_model_saved_again_keeps_its_code_and_its_map(case, uploaded):
    saved, again, report = uploaded(case.family)
    assert report[case.name]["equal_again"]
    codes = {path.name: path.read_text() for path in (saved / case.name).glob("*.py")}
    assert len(codes) >= 4
    assert {path.name: path.read_text() for path in (again / case.name).glob("*.py")} == codes
    maps = [json.loads((folder / case.name / "config.json").read_text())["auto_map"] for folder in (saved, again)]
    assert maps[0] == maps[1] == case.config().auto_map


@over(CASES)
def test_a_map_that_points_to_another_repository_does_not_survive(case, tmp_path):
    """transformers would run that repository's newest code, whatever revision of ours was asked for."""
    case.model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["auto_map"] = {name: f"other/repository--{value}" for name, value in content["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert case.load(tmp_path).config.auto_map == case.config().auto_map
