"""Whatever a study file, a settings file, a configuration of nanoGPT's or a command line holds: accepted, or refused in words.

Anything else is a fault: a traceback, or more seconds than a refusal needs. Nothing is trained.
"""

import ast
import contextlib
import copy
import io
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import cache_in, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanostudy import api
from nanostudy.cli import main as cli
from nanostudy.data import texts
from nanostudy.errors import Interrupted, NanostudyError
from nanostudy.interop.nanogpt_config import DEFAULTS, read_config
from nanostudy.model.config import count_parameters
from nanostudy.settings import FIELDS, from_settings
from nanostudy.settings_files import experiment_and_resources, read_settings
from nanostudy.study.definition import parse_studies, read_study, study_yaml
from nanostudy.study.folder import design
from nanostudy.study.plan import Capacity, plan, shape_of
from nanostudy.training.inputs import Inputs
from nanostudy.training.run_folder import settings_yaml
from nanostudy.yaml_input import parse_yaml

SECONDS = 8  # beside other work on a slow core; most take milliseconds
LONGEST_MESSAGE = 5000  # characters
QUICK, WHOLE = 50, 1000  # cases of each kind
SIZES = [pytest.param(QUICK, id="quick"), pytest.param(WHOLE, id="whole", marks=pytest.mark.soak)]

NUMBERS = [
    -1, 0, 1, 2, 3, 1.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 10**6, 10**9, 10**12, 2**63,
    2**64,
]  # fmt: skip
NUMBER_TEXTS = [
    "\uff11\uff12", "1_000", " 7 ", "+5", "0x10", "1e3", "1e400", "-0", "nan", "inf", "٣", "4.0000000000000001", "1:30", "010",
]  # fmt: skip
TEXTS = [
    "", " ", "true", "True", "yes", "none", "null", "a\0b", "\ud800", "a\udcffb", "\u202e evil", "😀" * 50,
    "x" * 10000,
]  # fmt: skip
PATHS = [
    "../../../etc/passwd", "a/b", "..", ".", "~", "-", "--", "/dev/null", "/dev/zero", "/proc/self/environ", "con",
    "NUL",
]  # fmt: skip
CODE = [
    "'", '"', "`", "$(touch sprung)", "; rm", "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "%s%n",
    "{0.__class__}",
]  # fmt: skip
WORDS = [
    "auto", "shakespeare", "playhouse", "text.txt", "best 3", "best 0", "best 99999999999", "all",
    "one per experiment", "[1,2]",
]  # fmt: skip
NESTS = [
    [], {}, [[]], [1, [2]], [1, 1], [1, 1.0, True], [None], {"a": 1}, {"a": {"b": {"c": []}}}, {1: 2}, {None: None},
    [1, 2, 3],
]  # fmt: skip
LISTS = [list(range(50)), [1e-3, 1e-2], ["a", "b"], ["x", None], [0.1, 0.1000000000000000055], [2**62, 2**63 - 1]]
NASTY = [*NUMBERS, *NUMBER_TEXTS, *TEXTS, *PATHS, *CODE, *WORDS, True, False, None, *NESTS, *LISTS]
ODD_KEYS = [
    "<<", "", "x", "n_layers", "__class__", "name\n", "n_layer ", None, 1, "threads", "device", "precision", "track",
    "compile",
]  # fmt: skip
STUDY_KEYS = [
    "name", "description", "settings", "grid", "parts", "seeds", "prompts", "sample_tokens", "keep",
    "skip_impossible",
]  # fmt: skip
KEYS = [*FIELDS, *STUDY_KEYS, *ODD_KEYS]
STUDY = {
    "name": "t",
    "description": "d",
    "settings": {"corpus": "text.txt", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "max_iters": 10},
    "grid": {"learning_rate": [1e-3, 2e-3], "dropout": [0.0, 0.2]},
    "parts": {"a": {"batch_size": 2}, "b": {"batch_size": 4}},
    "seeds": [1, 2],
    "prompts": [None, "the"],
    "sample_tokens": 5,
    "keep": "best 3",
    "skip_impossible": False,
}
PIECES = [
    "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['touch sprung']", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]",
    "!!timestamp 2020-01-01", "!!int 'x'", "!!float", "!!str 5", "!!null", "!!bool x", "\n---\n", "\n...\n", "%YAML 9.9\n---\n",
    "%TAG ! tag:x\n", "\t", "\0", "\x85", "\ufeff", "[" * 2000, "{" * 500, "- " * 3000, "? ", ": ", "|\n", ">\n", "#", "'", '"',
    "@", "`", "\r", "\u2028", "0x" + "f" * 4000, "1" * 5000, "!!int 0b1", "1:30:00", "010", ".nan", "~", "=", "2020-01-01",
    "settings: {n_layer: 3}\n", "grid: {n_layer: [1, 2]}\n", "seeds: [5]\n", "learning_rate: 5\n", "  n_layer: 7\n", "- 5\n",
]  # fmt: skip


class Hangs(BaseException):
    """It took longer than SECONDS."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hangs

    since = time.monotonic()
    if hasattr(signal, "setitimer"):
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    else:
        yield
    assert time.monotonic() - since < SECONDS


@contextlib.contextmanager
def refused_in_words() -> Iterator[None]:
    with in_time():
        try:
            yield
        except NanostudyError as problem:
            if not 0 < len(str(problem)) < LONGEST_MESSAGE:
                pytest.fail(f"a message of {len(str(problem)):,} characters")
    assert not Path("sprung").exists()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A folder with a text, and no network."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    plays = texts.write_plays(characters=5000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "write_plays", lambda: plays)
    monkeypatch.setattr(texts.urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("NANOSTUDY_CORPORA", str(tmp_path))
    monkeypatch.setenv("NANOSTUDY_CACHE", str(cache_in(tmp_path)))  # with kernels, which take seconds to build
    write_text(Path("text.txt"))


def many(cases: int) -> Any:
    slow = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
        HealthCheck.large_base_example,
    ]
    return settings(max_examples=cases, deadline=None, suppress_health_check=slow)


# --- files of YAML


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """With one to three values replaced, added or taken away."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in places(value) if place] or [("x",)]))
        where = value
        for key in path:
            where = where[key]
        nasty = copy.deepcopy(draw(st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20)))
        match draw(st.sampled_from(["replace", "replace", "replace", "add", "remove"])):
            case "replace":
                where[last] = nasty
            case "add" if isinstance(where, dict):
                where[draw(st.sampled_from(KEYS))] = nasty
            case "add":
                where.append(nasty)
            case "remove" if len(where) > 1:
                del where[last]
    return value


@st.composite
def damaged(draw: st.DrawFn, text: str, pieces: list[str]) -> str:
    """Left as it is as often as not; else with pieces put in, cut out, replaced, or its lines in another order."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 4]))):
        start = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["in", "in", "in", "out", "character", "lines"])):
            case "in":
                text = text[:start] + draw(st.sampled_from(pieces)) + text[start:]
            case "out":
                text = text[:start] + text[start + draw(st.integers(0, 20)) :]
            case "character":
                text = text[:start] + draw(st.characters()) + text[start + 1 :]
            case "lines":
                text = "".join(draw(st.permutations(text.splitlines(keepends=True)[:20])))
    return text


def as_yaml(value: Any) -> str:
    try:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**9)
    except (yaml.YAMLError, UnicodeError):
        return f"settings: {value!r}"


STUDY_TEXTS = changed(STUDY).map(as_yaml).flatmap(lambda text: damaged(text, PIECES))
SETTINGS_TEXTS = (
    changed({**STUDY["settings"], "threads": 1}).map(as_yaml).flatmap(lambda text: damaged(text, PIECES))  # type: ignore[dict-item]
)


def written(text: str, name: str) -> str:
    Path(name).write_bytes(text.encode(errors="surrogatepass"))
    return name


@pytest.mark.parametrize("cases", SIZES)
def test_study_files(cases):
    accepted = 0

    @many(cases)
    @given(STUDY_TEXTS)
    def check(text: str) -> None:
        nonlocal accepted
        with refused_in_words():
            study = read_study(written(text, "s.yaml"))
            draft = design(Path("out"), study)
            plan(draft.entries, draft.inputs.corpora, Capacity("cpu", "fp32", 2, 2**30))
            assert parse_studies(study_yaml(study), "again") == [study]
            accepted += 1

    check()
    assert cases == QUICK or accepted > cases / 50, "hardly anything gets as far as a plan"


@pytest.mark.parametrize("cases", SIZES)
def test_settings_files(cases):
    accepted = 0

    @many(cases)
    @given(SETTINGS_TEXTS)
    def check(text: str) -> None:
        nonlocal accepted
        with refused_in_words():
            experiment, _ = experiment_and_resources(read_settings(written(text, "s.yaml")))
            assert from_settings(parse_yaml(settings_yaml(experiment.as_dict()), "again")) == experiment
            inputs = Inputs()
            inputs.identity(experiment)
            count_parameters(shape_of(experiment, inputs.corpus(experiment)))
            accepted += 1

    check()
    assert cases == QUICK or accepted > cases / 50


# --- configurations of nanoGPT's


NAMES = st.sampled_from([*DEFAULTS, "favourite", "time", "str", "_hidden"])
ATOMS = st.one_of(
    st.sampled_from(NASTY).map(repr),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=10).map(repr),
    NAMES,
)
OPERATORS = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<<", "and", "==", "@"])
CALLS = st.sampled_from(
    ["str", "int", "float", "round", "max", "open", "exec", "len", "time.time", "torch.cuda.is_available"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, OPERATORS, inner).map(lambda parts: "({} {} {})".format(*parts)),
        st.tuples(CALLS, inner).map(lambda parts: "{}({})".format(*parts)),
        st.tuples(inner, inner, inner).map(lambda parts: "({} if {} else {})".format(*parts)),
        inner.map(lambda text: f"-{text}"),
        inner.map(lambda text: "f'{" + text.replace("'", '"') + ":>9}'"),
        inner.map(lambda text: f"[{text}]"),
        inner.map(lambda text: f"(x := {text})"),
    ),
    max_leaves=8,
)
STATEMENTS = st.one_of(
    *[st.tuples(NAMES, EXPRESSIONS).map(lambda parts: "{} = {}".format(*parts))] * 4,
    st.tuples(NAMES, OPERATORS, EXPRESSIONS).map(lambda parts: "{} {}= {}".format(*parts)),
    EXPRESSIONS,
    EXPRESSIONS.map(lambda text: f"print({text})"),
    EXPRESSIONS.map(lambda text: f"exec(open({text}).read())"),
    EXPRESSIONS.map(lambda text: f"def f(x):\n    return {text}"),
    st.sampled_from(
        [
            "from base import *",
            "from other import *",
            "from os import *",
            "import torch",
            "from base import n_layer as n_head",
        ]
    ),
    st.sampled_from(
        [
            "exec(open('base.py').read())",
            "exec(open('c.py').read())",
            "from c import *",
            "if 1:\n    n_layer = 2",
            "pass",
        ]
    ),
)
CONFIGS = st.lists(STATEMENTS, max_size=8).map("\n".join)
PYTHON = [
    "(" * 300, "\0", "\t", "\ufeff", "'" * 3, "\\", "\r", "#", "-" * 3000, "1+" * 3000, "[" * 100, "9" * 5000, "é",
    "lambda: 0", "{n_layer}", "\n",
]  # fmt: skip


@pytest.mark.parametrize("cases", SIZES)
def test_configurations_of_nanogpt(cases):
    Path("base.py").write_text("n_layer = 3\nlearning_rate = 1e-3\n_hidden = 3\nimport os\n", encoding="utf-8")
    Path("other.py").write_text("from base import *\nbatch_size = n_layer * 2\n", encoding="utf-8")
    accepted = 0

    @many(cases)
    @given(CONFIGS.flatmap(lambda text: damaged(text, PYTHON)))
    def check(text: str) -> None:
        nonlocal accepted
        with refused_in_words():
            translation = read_config(Path(written(text, "c.py")), {"corpus": "text.txt"})
            accepted += 1
            experiment_and_resources(translation.settings)

    check()
    assert cases == QUICK or accepted > cases / 50


NUMBER = st.integers(-20, 20) | st.floats(-9, 9, allow_nan=False)
ARITHMETIC = st.recursive(
    NUMBER.map(str) | st.sampled_from(["n_layer", "'a'", "True"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner).map(
            lambda p: "({} {} {})".format(*p)
        ),
        st.tuples(st.sampled_from(["str", "int", "float", "round", "abs", "bool"]), inner).map(
            lambda p: "{}({})".format(*p)
        ),
        st.tuples(inner, inner).map(lambda parts: "max({}, {})".format(*parts)),
        inner.map(lambda text: f"(-{text})"),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(ARITHMETIC, st.sampled_from(["", ":>8", ":.3e", "!r", ":05"]))
def test_what_is_computed_is_what_python_computes(expression, form):
    """Or it is left as code; never another value."""
    text = f"favourite = {expression}\nother = f'{{n_layer{form}}}'\n"
    values = {
        unused.name: unused.value for unused in read_config(Path(written(text, "c.py")), {"corpus": "text.txt"}).unused
    }
    names = {"n_layer": DEFAULTS["n_layer"]}
    if "(code, not executed)" not in values["favourite"]:
        assert values["favourite"] == repr(eval(expression, names))
    assert ast.literal_eval(values["other"]) == eval(f"f'{{n_layer{form}}}'", names)


# --- command lines


VALUES = st.sampled_from(NASTY).map(str) | st.text(max_size=12) | st.integers().map(str)
ASSIGNMENTS = st.tuples(
    st.sampled_from(["", "--"]), st.sampled_from(KEYS).map(str), st.lists(VALUES, min_size=1, max_size=3)
).map(lambda parts: f"{parts[0]}{parts[1]}={','.join(parts[2])}")
FLAGS = [
    "--out", "--part", "--only", "--workers", "--device", "--threads", "--prompt", "--tokens", "-n", "--seed",
    "--top-k", "--format",
]  # fmt: skip
PLAIN = st.sampled_from(
    ["corpus=text.txt", "max_iters=5", "--n_layer=2", "dropout=0.1,0.2", "seed=1,2", "bias=true", "n_head=1"]
)
ARGUMENTS = st.lists(PLAIN, max_size=2, unique=True) | st.lists(
    st.one_of(ASSIGNMENTS, ASSIGNMENTS, ASSIGNMENTS, VALUES, st.sampled_from(FLAGS)), max_size=4
)
COMMANDS = st.sampled_from(
    [
        *[["train", "quickstart"], ["train", "s.yaml"], ["study", "run", "study.yaml"], ["study", "plan", "study.yaml"]]
        * 3,
        *[
            ["sample", "run"],
            ["sample"],
            ["train"],
            ["study", "status"],
            ["study", "export"],
            ["study", "retry"],
            ["study", "merge"],
        ],
        *[["corpus", "show"], ["corpus", "export"], ["convert"], ["report"], ["study"], ["settings"], ["presets"], []],
    ]
)
LINES = st.tuples(COMMANDS, ARGUMENTS).map(lambda parts: [*parts[0], *parts[1]])


class Recorded:
    """In place of a run folder or of workers: a training would begin here."""

    def __init__(self, *_: object) -> None:
        raise Interrupted("it would train")


@pytest.mark.parametrize("cases", SIZES)
def test_command_lines(cases, monkeypatch):
    written(as_yaml(STUDY), "study.yaml")
    written(as_yaml(STUDY["settings"]), "s.yaml")
    for name in ("Recorder", "make_pool", "forecast"):
        monkeypatch.setattr(api, name, Recorded)
    reached = 0

    @many(cases)
    @given(LINES)
    def check(arguments: list[str]) -> None:
        nonlocal reached
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="replace")
        monkeypatch.setattr(sys, "argv", ["nanostudy", *arguments])
        with (
            in_time(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
        out.flush()
        message = out.buffer.getvalue().decode()
        assert end.value.code in (0, 1, 2, 130, None)
        assert message.strip()
        assert "Traceback" not in message
        assert not Path("sprung").exists()
        reached += "it would train" in message

    check()
    assert cases == QUICK or reached > cases / 50
