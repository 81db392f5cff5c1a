"""YAML is read as it looks, or refused with its line: nothing is lost, expanded, executed or read as another number."""

import os
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nanostudy.errors import UsageError
from nanostudy.settings_files import read_settings
from nanostudy.study.definition import read_study
from nanostudy.yaml_input import MOST_REPEATED, parse_documents, parse_yaml

NAMES = "abcdefghi"
LISTS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(NAMES)
)
MERGES = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in pairwise(NAMES))

REFUSED = {
    "a name twice": (
        "grid: {n_layer: [1, 2]}\nseeds: 1\ngrid: {n_head: [1, 2, 4]}",
        "line 3: grid is given twice.* line 1",
    ),
    "a name twice, deeper": ("grid:\n  n_layer: [1]\n  n_layer: [2]", "line 3: n_layer is given twice.* line 2"),
    "a name twice, in quotes": ("n_layer: 1\n'n_layer': 2", "line 2: n_layer is given twice"),
    "octal": ("n_layer: 1\nn_head: 010", "line 2: 010 is no plain number"),
    "hexadecimal": ("n_layer: [1, 0x10]", "line 1: 0x10 is no plain number"),
    "binary": ("n_layer: 0b11", "line 1: 0b11"),
    "a time": ("max_iters: 1:30:00", "line 1: 1:30:00 is no plain number"),
    "a time with a fraction": ("learning_rate: 1:30.5", "line 1: 1:30.5"),
    "a date": ("description: 2020-01-01", "line 1: 2020-01-01 is of the type timestamp.*quotes"),
    "a date by its tag": ("a: !!timestamp 2020-01-01", "line 1: .*timestamp"),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, r"line 1: 9{40}\.\.\. is no plain number"),
    "lists of lists": (LISTS, f"line 1: aliases .* more than {MOST_REPEATED:,}"),
    "merges of merges": (MERGES, f"line 1: aliases .* more than {MOST_REPEATED:,}"),
    "a list in itself": ("a: &a [*a]", "nested too deeply"),
    "a mapping in itself": ("a: &a {b: *a}", "nested too deeply"),
    "brackets": ("[" * 5000, "nested too deeply"),
    "NUL": ("n_layer: 1\ncorpus: a\0", r"line 2 holds the character U\+0000"),
    "NUL, escaped": ('n_layer: 1\ncorpus: "a\\0"', r"line 2: .*U\+0000"),
    "half a character": ('corpus: "\\ud800"', r"line 1: .*U\+D800"),
    "an object": ("a: !!python/object/apply:os.getcwd []", "line 1: .*python/object"),
    "bytes": ("a: !!binary aGk=", "line 1: .*binary"),
    "a set": ("a: !!set {a, b}", "line 1: .*set"),
    "no number": ("a: !!int x", "line 1: x is no plain number"),
    "nothing as a number": ("a: !!float ''", "line 1: .*no plain number"),
    "neither true nor false": ("a: !!bool x", "line 1: x is neither"),
    "a mapping as a name": ("? {a: 1}\n: 2", "line 1: a name must be one word"),
    "a tab": ("a: 1\n\tb: 2", "line 2 is not YAML"),
    "another version": ("%YAML 9.9\n---\na: 1", "line 1 is not YAML"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_reads_otherwise_than_it_looks_is_refused_with_its_line(kind):
    text, message = REFUSED[kind]
    with pytest.raises(
        UsageError, match=rf"^f\.yaml(, | is no ).*{message.removeprefix('line')}" if "line" in message else message
    ):
        parse_documents(text, "f.yaml")


def test_what_is_plain_stays():
    text = "a: &a {x: 1, y: [1_000, -7, +5, 0, .5, 5., 1.0e-3]}\nb: {<<: *a, x: 2}\nc: no\nd: ~\ne: '010'\nf: !!str 7\ng: *a\n"
    a = {"x": 1, "y": [1000, -7, 5, 0, 0.5, 5.0, 0.001]}
    assert parse_yaml(text, "f") == {"a": a, "b": {**a, "x": 2}, "c": False, "d": None, "e": "010", "f": "7", "g": a}


PLAIN = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | PLAIN
TREES = st.dictionaries(PLAIN.filter(bool), VALUES | st.lists(VALUES) | st.dictionaries(PLAIN, VALUES), min_size=1)


@settings(deadline=None)
@given(TREES)
def test_what_yaml_writes_is_read_back(tree):
    assert parse_yaml(yaml.safe_dump(tree), "f") == tree


@pytest.mark.parametrize("read", [read_settings, read_study])
def test_a_file_without_end_is_refused(tmp_path, read):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in ("/dev/zero", str(tmp_path / "pipe.yaml")):
        with pytest.raises(UsageError, match=f"{path} is no regular file"):
            read(path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UsageError, match=r"large\.yaml has 1,048,577 bytes"):
        read(str(tmp_path / "large.yaml"))
