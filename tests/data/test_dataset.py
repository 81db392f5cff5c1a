"""nanoGPT's dataset folders, read and written: the text, its split and its identity survive."""

import hashlib
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from conftest import needs_shakespeare, small, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

import nanostudy
from nanostudy.data.corpus import load_corpus
from nanostudy.data.nanogpt_dataset import read_dataset, write_dataset
from nanostudy.data.texts import SHAKESPEARE_SHA256
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import Experiment, Resources
from nanostudy.settings_files import read_settings
from nanostudy.training.run_folder import read_metadata

CPU = Resources(device="cpu", precision="fp32", threads=1)


def put(folder: Path, train: list[int], val: list[int], meta: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def meta_of(characters: str) -> dict:
    """As nanoGPT's data/shakespeare_char/prepare.py writes it."""
    itos = dict(enumerate(characters))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


def exported(text: Path, tokenizer: str, folder: Path) -> Path:
    corpus = load_corpus(str(text), tokenizer)
    folder.mkdir()
    write_dataset(folder, corpus.train.tokens, corpus.val.tokens, corpus.tokenizer)
    return folder


def test_files_are_those_of_prepare_py(tmp_path):
    """Its arithmetic, done here by hand: sorted characters, nine tenths, two bytes per token, lowest first."""
    data = write_text(tmp_path / "words.txt", 1003).read_text()
    folder = exported(tmp_path / "words.txt", "char", tmp_path / "out")
    chars = sorted(set(data))
    stoi = {c: i for i, c in enumerate(chars)}
    n = int(len(data) * 0.9)
    for name, part in (("train", data[:n]), ("val", data[n:])):
        assert (folder / f"{name}.bin").read_bytes() == b"".join(stoi[c].to_bytes(2, "little") for c in part)
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    assert {key: meta[key] for key in ("vocab_size", "stoi", "itos")} == meta_of("".join(chars))


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_text_that_was_exported_is_the_same_experiment(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("Schöne neue Welt, 世界 \U0001f30d!\r\n" * 40, encoding="utf-8", newline="")
    folder = exported(tmp_path / "text.txt", tokenizer, tmp_path / "out")
    one, other = load_corpus(str(tmp_path / "text.txt"), tokenizer), load_corpus(str(folder), tokenizer)
    assert one.sha256 == other.sha256
    assert one.tokenizer == other.tokenizer
    for split in ("train", "val"):
        assert np.array_equal(getattr(one, split).tokens, getattr(other, split).tokens)
        assert getattr(one, split).characters == getattr(other, split).characters


@needs_shakespeare
def test_shakespeare_from_nanogpt_is_shakespeare(tmp_path):
    corpus = load_corpus("shakespeare")
    write_dataset(tmp_path, corpus.train.tokens, corpus.val.tokens, corpus.tokenizer)
    found = load_corpus(str(tmp_path))
    assert found.sha256 == SHAKESPEARE_SHA256
    assert (len(found.train.tokens), len(found.val.tokens)) == (1003854, 111540)  # as prepare.py says


@settings(deadline=None, max_examples=60)
@given(
    texts=st.tuples(*[st.text(st.characters(codec="utf-8"), min_size=1)] * 2),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_split_and_any_table_survive(tmp_path_factory, texts, shuffle):
    characters = list(set("".join(texts)))
    shuffle.shuffle(characters)
    train, val = ([characters.index(c) for c in text] for text in texts)
    folder = put(tmp_path_factory.mktemp("data") / "d", train, val, meta_of("".join(characters)))
    corpus = load_corpus(str(folder))
    assert corpus.train.tokens.tolist() == train
    assert corpus.val.tokens.tolist() == val
    assert corpus.tokenizer.decode(corpus.val.tokens) == texts[1]
    assert corpus.tokenizer.encode(texts[0]).tolist() == train


def test_another_split_or_table_is_another_experiment(tmp_path):
    sums = [
        load_corpus(str(put(tmp_path / name, train, val, meta_of(characters)))).sha256
        for name, train, val, characters in (
            ("usual", [0, 1, 0, 1, 1, 1, 0, 1, 0], [1], "ab"),
            ("earlier", [0, 1, 0, 1, 1, 1, 0, 1], [0, 1], "ab"),
            ("turned", [1, 0, 1, 0, 0, 0, 1, 0, 1], [0], "ba"),
            ("roomy", [0, 1, 0, 1, 1, 1, 0, 1, 0], [1], "abc"),
        )
    ]
    assert len(set(sums)) == 4
    assert sums[0] == hashlib.sha256(b"ababbbabab").hexdigest()


def test_bytes_cut_inside_a_character(tmp_path):
    folder = put(
        tmp_path / "d", [0x41, 0xC3], [0xA9, 0xFF], {**meta_of("".join(map(chr, range(256)))), "tokenizer": "byte"}
    )
    corpus = load_corpus(str(folder), "byte")
    assert (corpus.train.tokens.tolist(), corpus.val.tokens.tolist()) == ([0x41, 0xC3], [0xA9, 0xFF])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: (d / "val.bin").unlink(), "no val.bin"),
        (lambda d: [p.unlink() for p in d.glob("*.bin")], r"no train\.bin\. Corpora"),
        (lambda d: (d / "meta.pkl").unlink(), r"no meta\.pkl.*GPT-2's tokens.*corpus="),
        (lambda d: (d / "train.bin").write_bytes(b"\0\0\1"), "cut short"),
        (lambda d: (d / "train.bin").write_bytes(b"\7\0"), "token 7, and meta.pkl beside it has 2 tokens"),
        (lambda d: (d / "val.bin").write_bytes(b""), "too short"),
        (lambda d: (d / "meta.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR."), "names os.system"),
        (lambda d: [p.write_bytes(b"") for p in d.glob("*.bin")], "empty"),
    ],
)
def test_folders_that_are_no_corpus(tmp_path, change, told):
    folder = put(tmp_path / "d", [0, 1] * 20, [1, 0] * 20, meta_of("ab"))
    change(folder)
    with pytest.raises(NanostudyError, match=told):
        load_corpus(str(folder))


def test_the_tokenizer_is_the_folders(tmp_path):
    folder = put(tmp_path / "d", [0, 1] * 20, [1, 0] * 20, meta_of("ab"))
    with pytest.raises(UsageError, match="tokenizer=char, not byte"):
        load_corpus(str(folder), "byte")
    assert load_corpus(str(folder), Tokenizer("char", "abc")).train.tokens.tolist() == [0, 1] * 20
    with pytest.raises(UsageError, match="characters that the model does not know"):
        load_corpus(str(folder), Tokenizer("char", "bc"))


def test_too_many_characters_for_two_bytes(tmp_path):
    tokenizer = Tokenizer("char", "".join(map(chr, range(0x20000, 0x20000 + 2**16 + 1))))
    with pytest.raises(UsageError, match=r"65,537.*two bytes"):
        write_dataset(tmp_path, np.zeros(3), np.zeros(3), tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_report")
def test_a_folder_trains_like_its_text(tmp_path, monkeypatch):
    """The same identity, and the same weights to the bit; the run goes on from any folder."""
    monkeypatch.chdir(tmp_path)
    folder = exported(write_text(tmp_path / "words.txt"), "char", tmp_path / "data")
    e = {**small(max_iters=4, sample_tokens=3).as_dict()}
    runs = [
        nanostudy.train(Experiment(**{**e, "corpus": corpus}), out, resources=CPU, listen=lambda event: None)
        for corpus, out in (("words.txt", "one"), ("data", "other"))
    ]
    assert torch.equal(*(run.weights.params for run in runs))
    assert read_metadata(Path("one"))["identity"] == read_metadata(Path("other"))["identity"]
    assert Path(read_settings("other")["corpus"]) == folder.resolve()


# --- the commands


def test_export_and_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "words.txt")
    Path("data").mkdir()
    Path("data/prepare.py").write_text("mine")
    assert call("corpus", "export", "words.txt", "--out", "data").code == 0
    assert call("corpus", "export", "words.txt", "--out", "new/data", "--tokenizer", "byte").code == 0
    assert {path.name for path in Path("data").iterdir()} == {"prepare.py", "train.bin", "val.bin", "meta.pkl"}
    assert read_dataset(Path("new/data")).tokenizer == Tokenizer("byte")
    assert "1,350 characters" in call("corpus", "show", "data").out
    Path("data/val.bin").write_bytes(b"\0\0")
    told = call("corpus", "export", "words.txt", "--out", "data")
    assert told.code == 2
    assert "--overwrite" in told.err
    assert Path("data/val.bin").read_bytes() == b"\0\0"
    assert call("corpus", "export", "words.txt", "--out", "data", "--overwrite").code == 0
    assert len(Path("data/val.bin").read_bytes()) == 300
    assert call("corpus", "export", "words.txt", "--out", "words.txt").code == 2
    assert call("corpus", "export", "missing", "--out", "there").code == 2
    assert not Path("there").exists()
    assert not list(tmp_path.rglob(".*.tmp"))


def nested(twice: bool, depth: int) -> bytes:
    """A dictionary whose key is a tuple of tuples of ...: of one each, or of two that are the same one."""
    step = b"q\x00h\x00\x86" if twice else b"\x85"
    return b"\x80\x02}U\x04itos}(" + b")" + step * depth + b"U\x01au" + b"s."


@pytest.mark.parametrize(
    "meta",
    [
        nested(True, 60),
        nested(False, 500_000),
        pickle.dumps({"itos": {number * (2**61 - 1): "a" for number in range(100_000)}}),
        pickle.dumps({"itos": {frozenset({frozenset()}): "a"}}),
    ],
    ids=["keys that double", "keys within keys", "numbers that are alike", "sets"],
)
def test_a_table_that_would_take_without_end_is_refused_at_once(tmp_path, meta):
    """Hashing takes 2^60 steps, the stack of the process, and a fifth of an hour."""
    put(tmp_path / "d", [0], [0], {})
    (tmp_path / "d" / "meta.pkl").write_bytes(meta)
    since = time.monotonic()
    with pytest.raises(UsageError, match=r"meta.pkl holds (tuples or sets|numbers that are no ids)"):
        load_corpus(str(tmp_path / "d"))
    assert time.monotonic() - since < 5
