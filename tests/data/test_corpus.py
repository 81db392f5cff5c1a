"""Texts, tokenizers and splits; and that no text is ever trained on in place of another without a word."""

import codecs
import hashlib
import http.client
import io
import math
import os
import urllib.error
import urllib.request

import numpy as np
import pytest
from commands import call
from hypothesis import given, settings
from hypothesis import strategies as st

from nanostudy.data import texts
from nanostudy.data.corpus import load_corpus
from nanostudy.data.nanogpt_dataset import write_dataset
from nanostudy.data.texts import SHAKESPEARE_FILE, SHAKESPEARE_SHA256, fetch_shakespeare, find_text, locate_shakespeare
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError

ASTRAL = st.characters(min_codepoint=0x10000)
TEXTS = st.text(min_size=1) | st.text(ASTRAL | st.characters(codec="utf-8"), min_size=1)


def write(path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# --- tokenizers


@settings(deadline=None)
@given(TEXTS)
def test_char_tokens_are_places_in_the_sorted_alphabet(text):
    tokenizer = Tokenizer.of("char", text)
    alphabet = sorted(set(text))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == [alphabet.index(character) for character in text]
    assert tokenizer.vocab_size == len(alphabet)
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(TEXTS)
def test_byte_tokens_are_the_bytes_of_utf_8(text):
    tokenizer = Tokenizer.of("byte", text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(text.encode())
    assert tokenizer.vocab_size == 256
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(TEXTS)
def test_a_tokenizer_survives_being_written_down(text):
    for kind in ("char", "byte"):
        tokenizer = Tokenizer.of(kind, text)
        assert Tokenizer(**tokenizer.as_dict()) == tokenizer


def test_bytes_that_are_no_text_are_shown_and_do_not_fail():
    assert Tokenizer("byte").decode(np.array([65, 0xFF, 0xE2, 0x98])) == "A\ufffd\ufffd"


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_an_unknown_character_is_named(known, asked):
    tokenizer = Tokenizer.of("char", known)
    unknown = [(place, character) for place, character in enumerate(asked) if character not in known]
    if unknown:
        with pytest.raises(UsageError) as refusal:
            tokenizer.encode(asked)
        assert repr(unknown[0][1]) in str(refusal.value)
        assert f"position {unknown[0][0]}" in str(refusal.value)
    else:
        assert tokenizer.decode(tokenizer.encode(asked)) == asked


def test_half_a_character_from_the_command_line():
    """Python hands on bytes that are no UTF-8 as lone surrogates: no characters, but bytes."""
    with pytest.raises(UsageError, match="udcff"):
        Tokenizer.of("char", "abc").encode("a\udcff")
    assert Tokenizer("byte").encode("a\udcff").tolist() == [ord("a"), 0xFF]


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"word.*char.*byte"):
        load_corpus(write(tmp_path / "a.txt", "abc " * 50), "word")


# --- any text


def test_the_first_nine_tenths_of_the_characters_train(tmp_path):
    text = "".join(f"{i:03d}" for i in range(334))[:1001]
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    assert (corpus.train.characters, corpus.val.characters) == (900, 101)
    decode = corpus.tokenizer.decode
    assert decode(corpus.train.tokens) + decode(corpus.val.tokens) == text
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (corpus.name, corpus.requested, corpus.note) == ("a.txt", str(tmp_path / "a.txt"), None)


def test_a_split_in_three_holds_out_the_end(tmp_path):
    text = "".join(f"{i:03d}" for i in range(334))[:1001]
    path = write(tmp_path / "a.txt", text)
    corpus = load_corpus(path, split="0.8/0.1/0.1")
    decode = corpus.tokenizer.decode
    assert [split.characters for split in corpus.splits.values()] == [800, 100, 101]
    assert "".join(decode(split.tokens) for split in corpus.splits.values()) == text
    corpus.check_window(99)
    with pytest.raises(UsageError, match="The validation split"):
        corpus.check_window(100)
    with pytest.raises(UsageError, match=r"too short.*validation 0"):
        load_corpus(path, split="0.5/0.0001/0.4999")


def test_another_split_is_another_text_and_nanogpts_own_is_none(tmp_path):
    path = write(tmp_path / "a.txt", "To be, or not to be. " * 50)
    plain = load_corpus(path)
    assert load_corpus(path, split="0.9/0.1").sha256 == plain.sha256
    others = {load_corpus(path, split=split).sha256 for split in ("0.8/0.2", "0.8/0.1/0.1", "0.8/0.15/0.05")}
    assert len(others | {plain.sha256}) == 4
    assert plain.test is None
    assert "test" not in plain.as_dict()


def test_a_dataset_of_nanogpts_has_no_test_part(tmp_path):
    corpus = load_corpus(write(tmp_path / "a.txt", "To be, or not to be. " * 50))
    (tmp_path / "set").mkdir()
    write_dataset(tmp_path / "set", corpus.train.tokens, corpus.val.tokens, corpus.tokenizer)
    assert load_corpus(str(tmp_path / "set")).sha256 == corpus.sha256
    with pytest.raises(UsageError, match=r"split=0\.8/0\.1/0\.1: set is a dataset .* no test part"):
        load_corpus(str(tmp_path / "set"), split="0.8/0.1/0.1")


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_bits_per_character(tmp_path, kind):
    text = "a☃é\U0001f600" * 100  # 1 + 3 + 2 + 4 bytes
    corpus = load_corpus(write(tmp_path / "a.txt", text), kind)
    tokens = {"char": 40, "byte": 100}[kind]
    assert len(corpus.val.tokens) == tokens
    # a model that finds each of 2**b tokens equally likely needs b bits per token
    assert corpus.val.bits_per_character(3 * math.log(2)) == pytest.approx(3 * tokens / 40)


PLAIN = "To be,\nor not\nto be\n" * 40


@pytest.mark.parametrize(
    ("raw", "note"),
    [
        (PLAIN.replace("\n", "\r\n").encode(), "120 line ends"),
        (PLAIN.replace("\n", "\r").encode(), "120 line ends"),
        (codecs.BOM_UTF8 + PLAIN.encode(), "byte order mark is left out; tokenizer=byte"),
        (codecs.BOM_UTF8 + PLAIN.replace("be\n", "be\r\n").encode(), "byte order mark is left out and 40 line ends"),
    ],
    ids=["Windows", "old Mac", "a mark", "both"],
)
def test_a_text_is_read_as_python_reads_text(tmp_path, raw, note):
    """As nanoGPT's prepare.py reads it; so it is the same corpus as the text that was saved without them."""
    plain = load_corpus(write(tmp_path / "plain.txt", PLAIN))
    path = write(tmp_path / "a.txt", raw)
    corpus = load_corpus(path)
    with open(path, encoding="utf-8-sig") as file:
        assert corpus.tokenizer.decode([*corpus.train.tokens, *corpus.val.tokens]) == file.read()
    assert (corpus.sha256, corpus.tokenizer) == (plain.sha256, plain.tokenizer)
    assert plain.note is None
    assert f"a.txt: {'its ' if 'mark' in note else ''}{note}" in corpus.note


@pytest.mark.parametrize(
    "raw", [b"\xef\xbb\xbfTo be,\r\nor not\rto be\n" * 40, bytes(range(256)) * 4], ids=["text", "no text"]
)
def test_a_byte_tokenizer_keeps_every_byte(tmp_path, raw):
    corpus = load_corpus(write(tmp_path / "a.txt", raw), "byte")
    assert bytes([*corpus.train.tokens, *corpus.val.tokens]) == raw
    assert (corpus.sha256, corpus.note) == (hashlib.sha256(raw).hexdigest(), None)


def test_what_has_no_end_is_no_corpus(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(UsageError, match=f"{path} is no regular file"):
            load_corpus(path)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"no train\.bin"):
        load_corpus(str(tmp_path))
    (tmp_path / "train.bin").unlink()
    (tmp_path / "val.bin").unlink()
    write(tmp_path / "train.bin", b"")
    write(tmp_path / "val.bin", b"")
    with pytest.raises(UsageError, match=r"meta\.pkl"):
        load_corpus(str(tmp_path))


def test_a_text_larger_than_the_memory_is_refused(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(texts.LARGEST_TEXT + 1)  # takes no space
    with pytest.raises(UsageError, match=r"large\.txt has 1,073,741,825 bytes.*1,073,741,824 at most"):
        load_corpus(str(tmp_path / "large.txt"))


def test_one_text_under_two_names_is_one_corpus(tmp_path):
    one, two = (load_corpus(write(tmp_path / name, "abc " * 50)) for name in ("one.txt", "two.txt"))
    assert one.sha256 == two.sha256
    assert one.name != two.name


def test_a_text_of_another_models_characters(tmp_path):
    tokenizer = Tokenizer.of("char", "abc \n")
    corpus = load_corpus(write(tmp_path / "a.txt", "cab " * 50), tokenizer)
    assert corpus.tokenizer is tokenizer
    assert set(corpus.train.tokens.tolist()) == {1, 2, 3, 4}

    path = write(tmp_path / "b.txt", "cab " * 50 + "é")  # the text's last character, so in the validation split
    with pytest.raises(UsageError, match=r"'é'.*200"):
        load_corpus(path, tokenizer)


BAD_TEXTS = {
    "empty": (b"", "empty"),
    "one character": (b"a", "too short"),
    "one word": (b"abc", "training split.*2 tokens"),
    "shorter than a window": (b"abcdefghij" * 10, r"validation split.*10 tokens.*block_size=16.*17"),
    "Latin-1": ("é".encode("latin-1") * 500, "UTF-8"),
    "UTF-16": ("abc".encode("utf-16") * 500, "UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text_is_refused_by_its_name(tmp_path, kind):
    raw, reason = BAD_TEXTS[kind]
    path = write(tmp_path / "mine.txt", raw)
    with pytest.raises(UsageError, match=r"mine\.txt") as refusal:
        load_corpus(path).check_window(16)
    refusal.match(reason)


def test_a_text_of_exactly_one_window_will_do(tmp_path):
    corpus = load_corpus(write(tmp_path / "a.txt", "abcde" * 34))
    assert len(corpus.val.tokens) == 17
    corpus.check_window(16)
    with pytest.raises(UsageError):
        corpus.check_window(17)


@pytest.mark.parametrize("path", ["nowhere.txt", ".", "Shakespeare", "long text " * 60])
def test_a_text_that_is_not_there_lists_the_corpora(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="shakespeare, playhouse"):
        load_corpus(path)


# --- tiny Shakespeare


@pytest.fixture(scope="module")
def shakespeare() -> bytes:
    path = locate_shakespeare()
    if path is None:
        pytest.skip("tiny Shakespeare is neither in NANOSTUDY_CORPORA nor in the cache")
    return path.read_bytes()


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine that has no text and no network: its empty corpora and cache folders."""
    folders = tmp_path / "corpora", tmp_path / "cache"
    folders[0].mkdir()
    for variable, folder in zip(("NANOSTUDY_CORPORA", "NANOSTUDY_CACHE"), folders, strict=True):
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.chdir(tmp_path)
    network_says(monkeypatch, urllib.error.URLError("no network"))
    return folders


def network_says(monkeypatch, answer: bytes | Exception) -> list[str]:
    """What every download gets from now on. Returns the list that addresses asked for will be in."""
    asked = []

    def urlopen(address, *args, **kwargs):
        asked.append(address)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_shakespeare_is_as_published(shakespeare):
    assert hashlib.sha256(shakespeare).hexdigest() == SHAKESPEARE_SHA256
    corpus = load_corpus("shakespeare")
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert corpus.tokenizer.vocab_size == 65
    assert (corpus.train.characters, corpus.val.characters) == (1_003_854, 111_540)
    assert (len(corpus.train.tokens), len(corpus.val.tokens)) == (1_003_854, 111_540)
    assert corpus.train.tokens.dtype == np.uint8
    decoded = corpus.tokenizer.decode(corpus.train.tokens) + corpus.tokenizer.decode(corpus.val.tokens)
    assert decoded.encode() == shakespeare
    assert len(decoded) == 1_115_394
    assert corpus.note is None


def test_without_text_and_network_both_ways_out_are_named(bare):
    with pytest.raises(NanostudyError, match="no network") as failure:
        load_corpus("shakespeare")
    assert str(bare[1] / SHAKESPEARE_FILE) in str(failure.value)
    failure.match("NANOSTUDY_CORPORA")
    assert not bare[1].exists()


@pytest.mark.parametrize(
    "problem", [TimeoutError("slow"), ConnectionResetError(), http.client.IncompleteRead(b"First")]
)
def test_a_download_that_breaks_off_is_told(bare, monkeypatch, problem):
    network_says(monkeypatch, problem)
    with pytest.raises(NanostudyError, match="NANOSTUDY_CORPORA"):
        load_corpus("shakespeare")


def test_what_is_not_shakespeare_is_not_kept(bare, monkeypatch):
    asked = network_says(monkeypatch, b"<html>Sign in to this network</html>")
    with pytest.raises(NanostudyError, match="checksum"):
        load_corpus("shakespeare")
    assert asked == [texts.SHAKESPEARE_URL]
    assert locate_shakespeare() is None
    assert not bare[1].exists() or not list(bare[1].iterdir())


def test_a_download_is_kept_and_not_repeated(shakespeare, bare, monkeypatch):
    asked = network_says(monkeypatch, shakespeare)
    assert find_text("shakespeare").content.encode() == shakespeare
    assert [path.name for path in bare[1].iterdir()] == [SHAKESPEARE_FILE]
    assert (bare[1] / SHAKESPEARE_FILE).read_bytes() == shakespeare
    assert fetch_shakespeare() == bare[1] / SHAKESPEARE_FILE
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_is_told(shakespeare, bare, monkeypatch):
    network_says(monkeypatch, shakespeare)
    bare[1].write_text("a file where a folder should be")
    with pytest.raises(NanostudyError, match="cache"):
        load_corpus("shakespeare")


@pytest.mark.parametrize("place", [0, 1], ids=["corpora", "cache"])
def test_another_text_under_shakespeares_name_is_refused_and_nothing_else_is_used(bare, monkeypatch, place):
    asked = network_says(monkeypatch, b"never asked for")
    bare[place].mkdir(exist_ok=True)
    path = bare[place] / SHAKESPEARE_FILE
    path.write_bytes(b"To be, or not to be?\r\n" * 100)
    with pytest.raises(NanostudyError) as failure:
        load_corpus("shakespeare")
    assert str(path) in str(failure.value)
    assert not asked
    assert path.stat().st_size == 2200


@pytest.fixture
def short_plays(monkeypatch):
    plays = texts.write_plays(characters=5000)
    monkeypatch.setattr(texts, "write_plays", lambda: plays)


@pytest.mark.usefixtures("short_plays")
def test_auto_says_when_it_takes_another_text(bare):
    corpus = load_corpus("auto")
    assert (corpus.name, corpus.requested) == ("playhouse", "auto")
    assert "playhouse" in corpus.note
    assert "no network" in corpus.note
    assert corpus.train.entropy > 0
    assert load_corpus("playhouse").note is None


@pytest.mark.usefixtures("bare")
def test_auto_takes_shakespeare_where_it_can(shakespeare, monkeypatch):
    network_says(monkeypatch, shakespeare)
    corpus = load_corpus("auto")
    assert (corpus.name, corpus.note, corpus.train.entropy) == ("shakespeare", None, None)


@pytest.mark.parametrize("preset", ["shakespeare-cpu", "nanogpt-cpu"])
def test_a_preset_named_for_shakespeare_takes_no_other_text(bare, preset):
    told = call("train", preset, "max_iters=1", "--out", "run")
    assert told.code == 1
    assert "NANOSTUDY_CORPORA" in told.err
    assert not (bare[0].parent / "run").exists()
