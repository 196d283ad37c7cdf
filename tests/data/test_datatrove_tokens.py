"""Token files of datatrove read as a token store: the same tokens and documents, nothing copied."""

import numpy as np
import pytest

from bmtk.data.datatrove_tokens import store_of_datatrove
from bmtk.data.token_store import TokenStore
from bmtk.data.tokenizers import tokenizer_fingerprint, train_tokenizer
from bmtk.errors import UserError

TEXTS = ["ab", "ba a", "中b\nab\n"]  # characters: newline 2, space 3, a 4, b 5, 中 6
TOKENIZER = train_tokenizer(TEXTS, kind="char", vocab_size=100)
DOCUMENTS = [[4, 5, 0], [5, 4, 3, 4, 0], [6, 5, 2, 4, 5, 2, 0]]  # with an eos token, as datatrove writes it


def write_ds(path, documents, dtype="<u2"):
    np.concatenate([np.empty(0, dtype), *documents]).astype(dtype).tofile(path)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(f"{path}.index")
    return path


def test_a_file_opens_as_a_store(tmp_path):
    path = write_ds(tmp_path / "00000_unshuffled.ds", DOCUMENTS)
    store = store_of_datatrove(path, tmp_path / "store", TOKENIZER)
    assert store.tokens.tolist() == [4, 5, 0, 5, 4, 3, 4, 0, 6, 5, 2, 4, 5, 2, 0]
    assert store.offsets.tolist() == [0, 3, 8, 15]
    assert [store.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (3, 15, 2 + 4 + 8)
    assert store.tokenizer_fingerprint == tokenizer_fingerprint(TOKENIZER)
    assert (tmp_path / "store" / "tokens.bin").samefile(path)
    store.verify()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_files_of_a_folder_are_its_shards_in_order(tmp_path, dtype):
    (tmp_path / "ds").mkdir()
    write_ds(tmp_path / "ds" / "00001.ds", DOCUMENTS[1:], dtype)
    write_ds(tmp_path / "ds" / "00000.ds", DOCUMENTS[:1], dtype)
    write_ds(tmp_path / "ds" / "00002.ds", [], dtype)
    store = store_of_datatrove(tmp_path / "ds", tmp_path / "store", TOKENIZER)
    assert store.num_shards == 3
    assert [TokenStore(tmp_path / "store").document(i).tolist() for i in range(3)] == DOCUMENTS
    assert store.starts(0, 15).tolist() == [0, 3, 8]
    assert [source["documents"] for source in store.sources] == [1, 2, 0]


def test_what_is_damaged_or_of_another_tokenizer_is_refused(tmp_path):
    path = write_ds(tmp_path / "a.ds", DOCUMENTS)
    other = train_tokenizer(["ab"], kind="char", vocab_size=100)
    with pytest.raises(UserError, match=r"a\.ds has the id 6, and the tokenizer \d: it is another one"):
        store_of_datatrove(path, tmp_path / "store", other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"a\.ds has 29 bytes, and a\.ds\.index speaks of 15 tokens: one is damaged"):
        store_of_datatrove(path, tmp_path / "store", TOKENIZER)
    (tmp_path / "a.ds.index").unlink()
    with pytest.raises(UserError, match=r"a\.ds\.index is missing: .* save_index=True"):
        store_of_datatrove(path, tmp_path / "store", TOKENIZER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.ds file"):
        store_of_datatrove(tmp_path / "empty", tmp_path / "store", TOKENIZER)
    assert not (tmp_path / "store").exists()


def test_what_datatrove_itself_has_written_is_read(tmp_path):
    tokens = pytest.importorskip("datatrove.pipeline.tokens", reason="needs the extra clean")
    from datatrove.data import Document

    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    eos = TOKENIZER.eos_token
    step = tokens.DocumentTokenizer(
        str(tmp_path / "ds"), str(tmp_path / "tokenizer" / "tokenizer.json"), eos_token=eos, shuffle_documents=False
    )
    step.run([Document(text, str(i)) for i, text in enumerate(TEXTS)])
    store = store_of_datatrove(tmp_path / "ds", tmp_path / "store", TOKENIZER)
    assert [store.document(i).tolist() for i in range(3)] == DOCUMENTS
