import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from bmtk.data import token_store, tokenizers
from bmtk.data.sources import Texts, read_texts
from bmtk.data.token_store import TokenStore, build_token_store
from bmtk.data.tokenizers import tokenizer_fingerprint, train_tokenizer

TEXTS = ["ab", "ba a", "中b\nab\n"]  # characters: newline 2, space 3, a 4, b 5, 中 6
TOKENIZER = train_tokenizer(TEXTS, kind="char", vocab_size=100)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}


def interrupted(texts, after):
    """The texts, but the first reading of them is stopped by Ctrl-C after so many."""
    readings = []

    def read():
        readings.append(None)
        for i, text in enumerate(texts):
            if i == after and len(readings) == 1:
                raise KeyboardInterrupt
            yield text

    return Texts("texts", "mark", (read,))


def test_documents_are_stored_end_to_end_between_bos_and_eos(tmp_path):
    store = build_token_store(TEXTS, TOKENIZER, tmp_path / "store")
    assert store.tokens.tolist() == [0, 4, 5, 0, 0, 5, 4, 3, 4, 0, 0, 6, 5, 2, 4, 5, 2, 0]
    assert store.offsets.tolist() == [0, 4, 10, 18]
    assert store.document(1).tolist() == [0, 5, 4, 3, 4, 0]
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (3, 18, 2 + 4 + 8)
    assert store.pad_token_id == 0
    assert store.tokenizer_fingerprint == tokenizer_fingerprint(TOKENIZER)
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)
    assert isinstance(store.offsets, np.memmap)
    assert names(tmp_path / "store") == ["manifest.json", "offsets.bin", "tokens.bin"]
    store.verify()


def test_bos_and_eos_may_differ_or_stand_for_each_other(tmp_path):
    def backend():
        return Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2, "<p>": 3}, merges=[]))

    both = PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", pad_token="<p>")
    one = PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="</s>")
    assert build_token_store(["a"], both, tmp_path / "both").tokens.tolist() == [1, 0, 2]
    assert build_token_store(["a"], both, tmp_path / "both").pad_token_id == 3
    assert build_token_store(["a"], one, tmp_path / "one").tokens.tolist() == [2, 0, 2]
    assert build_token_store(["a"], one, tmp_path / "one").pad_token_id == 2
    none = PreTrainedTokenizerFast(tokenizer_object=backend())
    with pytest.raises(ValueError, match="the tokenizer has neither bos nor eos token"):
        build_token_store(["a"], none, tmp_path / "none")


def test_a_text_that_spells_a_special_token_does_not_end_the_document(tmp_path):
    text = "a<|endoftext|>b"
    tokenizer = train_tokenizer([text], kind="byte_bpe", vocab_size=257)
    ids = build_token_store([text], tokenizer, tmp_path / "store").document(0).tolist()
    assert ids.count(0) == 2
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.backend_tokenizer.encode(text).ids.count(0) == 1  # the tokenizer itself is left as it was


def test_truncation_and_padding_of_the_tokenizer_do_not_touch_the_store(tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind="char", vocab_size=100)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=2)
    store = build_token_store(TEXTS, tokenizer, tmp_path / "store")
    assert store.num_tokens == 18


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    words = {f"w{i}": i for i in range((1 << 16) + 1)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w65536"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0")
    store = build_token_store(["stranger"], tokenizer, tmp_path / "store")
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [0, 65536, 0]


def test_a_tokenizer_written_in_python_can_be_stored(tmp_path):
    store = build_token_store(["ab"], ByT5Tokenizer(), tmp_path / "store")
    assert store.tokens.tolist() == [1, 100, 101, 1]


def test_a_long_document_has_the_ids_of_encoding_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 100)
    texts = ["To be,\nor not to be:\n\nthat is\n the question.\n" * 20, "short", "the rest\nis silence\n" * 9]
    tokenizer = train_tokenizer(texts, kind="byte_bpe", vocab_size=300)
    store = build_token_store(texts, tokenizer, tmp_path / "store")
    for i, text in enumerate(texts):
        assert store.document(i).tolist() == [0, *tokenizer(text)["input_ids"], 0]


def test_the_same_texts_and_tokenizer_open_the_store_without_reading_anything(tmp_path):
    def read():
        yield from TEXTS

    first = build_token_store(Texts("x", "mark", (read,)), TOKENIZER, tmp_path / "store")
    again = build_token_store(Texts("x", "mark", ()), TOKENIZER, tmp_path / "store")  # reading this would fail
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.source_fingerprint == "mark"


def test_other_texts_or_another_tokenizer_replace_the_store(tmp_path):
    other = train_tokenizer(["abc 中\n"], kind="char", vocab_size=100)
    build_token_store(TEXTS, TOKENIZER, tmp_path / "store")
    assert build_token_store(["ab"], TOKENIZER, tmp_path / "store").num_tokens == 4
    assert build_token_store(["ab"], other, tmp_path / "store").tokenizer_fingerprint == tokenizer_fingerprint(other)
    assert names(tmp_path) == ["store"]


def test_files_on_disk_are_tokenised_again_when_they_change(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("ab", encoding="utf-8")
    assert build_token_store(read_texts(file), TOKENIZER, tmp_path / "store").num_tokens == 4
    file.write_text("abba", encoding="utf-8")
    assert build_token_store(read_texts(file), TOKENIZER, tmp_path / "store").num_tokens == 6


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_store_is_taken_up_where_it_stopped(tmp_path, monkeypatch, caplog, after):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 1)
    whole = build_token_store(TEXTS, TOKENIZER, tmp_path / "whole")
    texts = interrupted(TEXTS, after)
    with pytest.raises(KeyboardInterrupt):
        build_token_store(texts, TOKENIZER, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    for name in ("tokens.bin", "offsets.bin"):  # what was being written when the power failed
        with (tmp_path / "store.partial" / name).open("ab") as file:
            file.write(b"half")
    store = build_token_store(texts, TOKENIZER, tmp_path / "store")
    assert f"resuming after {after} documents" in caplog.text or after == 0
    assert files(store.directory) == files(whole.directory)
    assert store.num_bytes == whole.num_bytes
    store.verify()


def test_an_interrupted_store_of_other_texts_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 1)
    with pytest.raises(KeyboardInterrupt):
        build_token_store(interrupted(["b", "b", "b"], 2), TOKENIZER, tmp_path / "store")
    assert build_token_store(["a"], TOKENIZER, tmp_path / "store").tokens.tolist() == [0, 4, 0]


def test_bad_texts_leave_nothing_half_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"text_column='text' is not in .*line 2"):
        build_token_store(read_texts(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "store")
    with pytest.raises(ValueError, match="cannot store an empty corpus"):
        build_token_store([], TOKENIZER, tmp_path / "store")
    assert names(tmp_path) == ["a.jsonl"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds something that is not a token store; name another folder"):
        build_token_store(TEXTS, TOKENIZER, tmp_path)
    (tmp_path / "empty").mkdir()
    assert build_token_store(TEXTS, TOKENIZER, tmp_path / "empty").num_documents == 3


def test_processes_that_build_at_once_share_one_build(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: build_token_store(TEXTS, TOKENIZER, tmp_path / "store"), range(4)))
    assert caplog.text.count("tokenised 3 documents") == 1
    assert all(store.tokens.tolist() == stores[0].tokens.tolist() for store in stores)


def test_a_damaged_store_says_so_and_is_built_again_on_request(tmp_path, caplog):
    store = build_token_store(TEXTS, TOKENIZER, tmp_path / "store")
    whole = files(store.directory)
    (store.directory / "tokens.bin").write_bytes(whole["tokens.bin"][:-2])
    with pytest.raises(ValueError, match=r"tokens.bin is damaged: it has 34 bytes, the manifest says 36; delete the"):
        TokenStore(store.directory)
    build_token_store(TEXTS, TOKENIZER, tmp_path / "store")
    assert "tokens.bin is damaged" in caplog.text
    assert files(store.directory) == whole
    (store.directory / "offsets.bin").unlink()
    with pytest.raises(ValueError, match=r"offsets.bin is damaged: it has None bytes"):
        TokenStore(store.directory)
    (store.directory / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json is damaged: it is not the manifest"):
        TokenStore(store.directory)


def test_verify_finds_a_changed_byte_that_opening_does_not_look_for(tmp_path):
    store = build_token_store(TEXTS, TOKENIZER, tmp_path / "store")
    content = files(store.directory)["tokens.bin"]
    (store.directory / "tokens.bin").write_bytes(content[:-2] + b"\x01\x00")
    with pytest.raises(ValueError, match=r"tokens.bin is damaged: its sha256 is not the manifest's"):
        TokenStore(store.directory).verify()


def test_a_folder_without_a_store_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no token store: there is no manifest.json; build it first"):
        TokenStore(tmp_path)


def test_a_store_travels_to_another_process_as_its_path(tmp_path):
    store = build_token_store(TEXTS * 1000, TOKENIZER, tmp_path / "store")
    message = pickle.dumps(store)
    assert len(message) < 1000
    assert np.array_equal(pickle.loads(message).tokens, store.tokens)


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    store = build_token_store(TEXTS, TOKENIZER, tmp_path / "store")
    manifest = json.loads((store.directory / "manifest.json").read_text(encoding="utf-8"))
    assert {name: facts["size"] for name, facts in manifest["files"].items()} == {"tokens.bin": 36, "offsets.bin": 32}
    assert all(len(facts["sha256"]) == 64 for facts in manifest["files"].values())
