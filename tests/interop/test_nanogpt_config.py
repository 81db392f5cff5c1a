"""nanoGPT's configurations train as they are: read as literals, never executed, and nothing dropped without a word."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import call
from conftest import write_text

from nanostudy.errors import UsageError
from nanostudy.interop.assignments import MOST_FILES, Assignments
from nanostudy.interop.literals import Code
from nanostudy.interop.nanogpt_config import DEFAULTS, NO_COUNTERPART, SHARED, TRANSLATED, find_corpus, read_config
from nanostudy.settings_files import experiment_and_resources
from nanostudy.training.run_folder import read_metadata

# What nanoGPT's train.py (3adf61e) sets before it runs a configuration; its dtype is bfloat16 where the GPU has it.
TRAIN_PY = {
    **{"out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False},
    **{"always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt"},
    **{"wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12},
    **{"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False},
    **{
        "learning_rate": 0.0006,
        "max_iters": 600000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
    },
    **{"decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 0.00006, "backend": "nccl"},
    **{"device": "cuda", "dtype": "bfloat16", "compile": True},
}

SMALL = """
# a small model
import time

out_dir = 'out-small'
eval_interval = 5 # often
eval_iters = 20
wandb_log = False
wandb_run_name = 'small' + str(time.time())
dataset = 'tiny'
gradient_accumulation_steps = 2 * 1
batch_size = 4
block_size = n_head + 4 # of train.py's
n_layer = 1
n_head = 2
n_embd = 8 * n_head
max_iters = lr_decay_iters = 10
learning_rate = 1e-3
min_lr = learning_rate / 10
warmup_iters = -(-3) // 2
device = 'cpu'
dtype = 'float32'
compile = False
"""


@pytest.fixture
def here(tmp_path, monkeypatch, no_report) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(text: str, name: str = "small.py") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def assignments(path: Path, known: dict) -> dict:
    return Assignments([Path()]).read(path, known)


def settings_of(text: str, **overrides: str) -> dict:
    return read_config(put(text), {"corpus": "playhouse", **overrides}).settings


def test_the_defaults_are_those_of_train_py():
    assert DEFAULTS == TRAIN_PY
    assert len(SHARED) + len(TRANSLATED) + len(NO_COUNTERPART) == len(TRAIN_PY)


def test_what_nothing_says_is_as_in_train_py(here):
    experiment, resources = experiment_and_resources(settings_of(""))
    assert {name: getattr(experiment, name) for name in SHARED} == {name: TRAIN_PY[name] for name in SHARED}
    assert (experiment.seed, experiment.tie_embeddings, experiment.init_from) == (1337, True, None)
    assert (resources.device, resources.precision) == ("auto", "auto")


def test_literals_and_arithmetic_of_them(here):
    experiment, resources = experiment_and_resources(settings_of(SMALL))
    result = {name: getattr(experiment, name) for name in ("gradient_accumulation_steps", "block_size", "n_embd")}
    assert result == {"gradient_accumulation_steps": 2, "block_size": 16, "n_embd": 16}  # n_head is 12 in that line
    assert (experiment.max_iters, experiment.lr_decay_iters, experiment.warmup_iters) == (10, 10, 1)
    assert experiment.min_lr == 1e-4
    assert (resources.device, resources.precision) == ("cpu", "fp32")


def test_the_command_line_is_as_in_nanogpt(here):
    """Its values are of their types, come after the file's, and change nothing that was computed there."""
    asked = {"max_iters": "7", "learning_rate": "2e-3", "bias": "True", "dtype": "bfloat16", "seed": "5", "n_head": "4"}
    experiment, resources = experiment_and_resources(settings_of(SMALL, **asked))
    assert (experiment.max_iters, experiment.lr_decay_iters, experiment.min_lr) == (7, 10, 1e-4)
    assert (experiment.learning_rate, experiment.bias, experiment.seed) == (2e-3, True, 5)
    assert (experiment.n_head, experiment.n_embd, resources.precision) == (4, 16, "bf16")
    with pytest.raises(UsageError, match="it is called max_iters"):
        settings_of(SMALL, max_iter="7")


def test_what_has_no_counterpart_is_listed(here):
    result = read_config(put(SMALL + "favourite = 3\n"), {"corpus": "playhouse", "compile": "False"})
    assert result.settings["compile"] == "no"
    assert result.out == Path("out-small")
    message = {unused.name: unused.value for unused in result.unused}
    assert message == {
        **{"eval_iters": "20", "wandb_log": "False", "favourite": "3"},
        **{"wandb_run_name": "'small' + str(time.time()) (code, not executed)"},
    }
    assert all(unused.reason for unused in result.unused)


def test_eval_only_is_a_training_without_updates(here):
    assert settings_of("eval_only = True\nmax_iters = 9\n")["max_iters"] == 0
    assert settings_of("eval_only = False\nmax_iters = 9\n")["max_iters"] == 9


CODE = [
    "import os\nos.system('echo harm > sprung')",
    "print(max_iters := 3)",
    "print(globals().update(max_iters=3))",
    "favourite = exec('max_iters = 3')",
    "favourite = (max_iters := 3)",
    "def f():\n    global max_iters\n    max_iters = 3",
    "if True:\n    max_iters = 3",
    "for max_iters in range(3): pass",
    "while True: pass",
    "with open('sprung', 'w') as f: pass",
    "globals()['max_iters'] = 3",
    "a, b = 1, 2",
    "a.b = 3",
    "a[0] = 3",
    "del max_iters",
    'exec(\'open("sprung", "w")\')',
    "max_iters: int",
    "assert False",
    "(x := 3)",
]


@pytest.mark.parametrize("text", CODE)
def test_a_file_with_code_in_it_is_refused_and_not_executed(here, text):
    line = len(re.findall("\n(?! )", text)) + 1
    with pytest.raises(UsageError, match=rf"small\.py, line {line}: .* is code"):
        settings_of(text)
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    "value",
    [
        "open('sprung', 'w')",
        "__import__('os').system('echo harm > sprung')",
        "len('abc')",
        "[3][0]",
        "3 if True else 4",
        "lambda: 3",
        "f'{3:999999999}'",
        "f'{open(3)}'",
        "str(open(3))",
        "max(time)",
        "round('3')",
        "nobody",
        "math.pi",
        "1 / 0",
        "10 ** 10 ** 10",
        "2 ** 100",
        "9 ** 9 ** 9 ** 9",
        "'3' * 3",
        "True + 1",
        "(-8) ** 0.5",
        "3j",
        "1e308 * 10",
        "b'3'",
        "...",
        "1 << 3",
        "not 3",
    ],
)
def test_a_setting_whose_value_is_code_is_refused(here, value):
    with pytest.raises(UsageError, match=r"small\.py, line 2: max_iters = .* is code"):
        settings_of(f"n_layer = 2\nmax_iters = {value}\n")
    assert settings_of(f"unknown = {value}\n")["max_iters"] == 600000
    assert not Path("sprung").exists()


def test_what_an_import_may_have_set_is_not_known(here):
    with pytest.raises(UsageError, match="line 1: learning_rate = from secrets import"):
        settings_of("from secrets import learning_rate\n")
    assert isinstance(assignments(put("import os.path as batch_size"), {})["batch_size"], Code)


def test_what_sets_nothing_does_not_stand_in_the_way(here):
    """print, functions, classes and imports; and none of them is listed as a setting."""
    text = "import time, os.path as place\nfrom sys import argv\ndef schedule(it):\n    return 3\n@f\nclass A:\n    n_layer = 7\n"
    translation = read_config(
        put(f"{text}print('hello', f'{{n_layer}}', time.time())\npass\nn_head = 3\n"), {"corpus": "playhouse"}
    )
    assert (translation.settings["n_head"], translation.settings["n_layer"]) == (3, TRAIN_PY["n_layer"])
    assert translation.unused == translation.notes == ()
    with pytest.raises(UsageError, match=r"line 1: learning_rate = def learning_rate\(it\): is code"):
        settings_of("def learning_rate(it):\n    return 3\n")


def test_fstrings_and_calls_of_literals_are_computed(here):
    text = (
        "out_dir = f'out-{n_layer}x{n_embd:04d}-{2e-3:.1e}-{\"a\"!r:>5}'\nn_head = int('3')\nbatch_size = round(10 * 0.35)\n"
        "learning_rate = float('1e-3')\nmax_iters = max(min(5, 7), 3)\nwandb_run_name = 'r' + str(n_head)\n"
    )
    translation = read_config(put(text), {"corpus": "playhouse"})
    assert translation.out == Path(eval("f'out-{12}x{768:04d}-{2e-3:.1e}-{\"a\"!r:>5}'"))
    expected = {"n_head": 3, "batch_size": 4, "learning_rate": 1e-3, "max_iters": 5}
    assert {name: translation.settings[name] for name in expected} == expected
    assert [unused.value for unused in translation.unused] == ["'r3'"]
    with pytest.raises(UsageError, match="is code"):
        settings_of("def str(x):\n    return 7\nmax_iters = str(3)\n")


@pytest.mark.parametrize(
    "dtype",
    [
        "'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16'",
        "'float32' if not torch.cuda.is_available() else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'",
    ],
)
def test_what_the_machine_decides_is_auto(here, dtype):
    """The first line is nanoGPT's own."""
    text = f"import torch\ndtype = {dtype}\ndevice = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
    translation = read_config(put(text), {"corpus": "playhouse"})
    _, resources = experiment_and_resources(translation.settings)
    assert (resources.precision, resources.device) == ("auto", "auto")
    assert [note.split(" = ")[0] for note in translation.notes] == ["dtype", "device"]
    with pytest.raises(UsageError, match=r"dtype = .* is code"):
        settings_of("dtype = 'float32' if mine else 'bfloat16'\n")


# --- the files that a file takes in


BASE = "import math\nbatch_size = 32\ngradient_accumulation_steps = 2 * 2\nn_layer = 6\n_private = 1\nlr = learning_rate = 2e-3\n"


@pytest.mark.parametrize(
    "line",
    [
        "from config.base import *",
        "exec(open('config/base.py').read())",
        "exec(open('config/' + 'base.py', encoding='utf-8').read())",
        "from config.base import batch_size, gradient_accumulation_steps, n_layer, learning_rate",
        "from config.base import lr as learning_rate, batch_size, gradient_accumulation_steps, n_layer as n_layer",
    ],
)
@pytest.mark.parametrize("folder", [".", "checkout"])
def test_a_configuration_on_top_of_another_is_the_experiment_that_nanogpt_trains(here, line, folder):
    """Python itself says what that is."""
    config = Path(folder, "config")
    config.mkdir(parents=True)
    put(BASE, str(config / "base.py"))
    text = f"n_layer = 5\n{line}\nbatch_size = batch_size * 2\n"
    translation = read_config(put(text, str(config / "small.py")), {"corpus": "playhouse"})
    script = "import json, sys; names = dict(n_layer=12, batch_size=12); exec(sys.stdin.read(), names); print(json.dumps([names[n] for n in sys.argv[1:]]))"
    names = ("batch_size", "gradient_accumulation_steps", "n_layer", "learning_rate")
    run = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=folder, input=text, capture_output=True, text=True, check=True
    )
    assert [translation.settings[name] for name in names] == json.loads(run.stdout) == [64, 4, 6, 2e-3]
    assert translation.notes == (f"{config / 'base.py'}, as {config / 'small.py'} says",)


def test_a_module_does_not_see_its_reader_and_exec_does(here):
    put("n_embd = 8 * n_head\n", "base.py")
    assert settings_of("n_head = 2\nexec(open('base.py').read())\n")["n_embd"] == 16
    with pytest.raises(UsageError, match=r"n_embd = 8 \* n_head is code"):
        settings_of("n_head = 2\nfrom base import *\n")


REFUSED_FILES = {
    "from config.nowhere import *": r"line 1: `from config.nowhere import \*` may set anything",
    "from math import *": r"line 1: `from math import \*` may set anything",
    "from . import *": "may set anything",
    "from .base import *": "may set anything",
    "exec(open('nowhere.py').read())": r"line 1: .* is code \(there is no file nowhere.py",
    "exec(open(path).read())": "is code",
    "exec(open('base.py').read().replace('3', '4'))": "is code",
    "exec('max_iters = 3')": "is code",
    "from base import absent": r"base\.py does not say what absent is",
    "from code import *": r"code\.py, line 2: `os.system",
    "from round import *": r"takes in itself, by way of small\.py, round\.py, other\.py",
    "from chosen import *": "is code",
}


@pytest.mark.parametrize("text", REFUSED_FILES)
def test_what_cannot_be_taken_in_is_refused_by_name(here, text):
    put("max_iters = 3\n", "base.py")
    put("import os\nos.system('echo harm > sprung')\n", "code.py")
    put("from other import *\n", "round.py")
    put("exec(open('round.py').read())\n", "other.py")
    put("__all__ = ['max_iters']\nmax_iters = 3\n", "chosen.py")
    with pytest.raises(UsageError, match=REFUSED_FILES[text]):
        settings_of(text)
    assert not Path("sprung").exists()


def test_files_without_number_are_refused(here):
    """Each takes in the next one ten times."""
    for i in range(10):
        put(f"exec(open('f{i + 1}.py').read())\n" * 10, f"f{i}.py")
    put("max_iters = 3\n", "f10.py")
    with pytest.raises(UsageError, match=f"more than {MOST_FILES} files"):
        settings_of("exec(open('f0.py').read())\n")


def test_a_configuration_without_end_is_refused(here):
    with pytest.raises(UsageError, match="no regular file"):
        read_config(Path("/dev/zero"), {"corpus": "playhouse"})


@pytest.mark.parametrize(
    "text",
    [
        "max_iters = (",
        "max_iters = 3\0",
        "(" * 5000,
        "é" * 2**21,
        "max_iters =\t= 3",
        "max_iters = f(1" + " + 1" * 9000 + ")",
    ],
)
def test_files_that_are_no_configuration(here, text):
    with pytest.raises(UsageError, match=r"small\.py"):
        settings_of(text)


def test_more_than_a_name_may_be_assigned(here):
    result = assignments(put("'a text'\na = b = 3\na += 2\nc: float = a / 2\na = 'x' + 'y'\nd = None\n"), {})
    assert result == {"a": "xy", "b": 3, "c": 2.5, "d": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("init_from = 'resume'", "nanostudy convert"),
        ("init_from = 'gpt2-xl'", "GPT-2's tokens"),
        ("dtype = 'float64'", "dtype"),
        ("device = 'tpu'", "device"),
        ("dropout = 2.0", "dropout"),
        ("n_embd = 10\nn_head = 3", "not divisible"),
        ("batch_size = 'many'", "batch_size"),
    ],
)
def test_values_that_do_not_do(here, text, message):
    with pytest.raises(UsageError, match=message):
        experiment_and_resources(settings_of(text))


# --- the dataset


def prepare(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("train", "val"):
        np.array([0, 1] * 40, dtype=np.uint16).tofile(folder / f"{name}.bin")
    return folder


def test_the_dataset_is_looked_for_where_nanogpt_has_it(here):
    config = put(SMALL, "small.py")
    Path("checkout/config").mkdir(parents=True)
    inner = put(SMALL, "checkout/config/small.py")
    with pytest.raises(UsageError, match=r"'tiny'.*data.tiny.*corpus="):
        read_config(config)
    prepare(Path("checkout/data/tiny"))
    assert Path(read_config(inner).settings["corpus"]) == Path("checkout/data/tiny")
    prepare(Path("data/tiny"))
    assert Path(read_config(inner).settings["corpus"]) == Path("data/tiny"), "the working directory comes first"
    assert read_config(config, {"corpus": "playhouse"}).settings["corpus"] == "playhouse"


def test_shakespeare_char_is_shakespeare_until_it_is_prepared(here):
    near = Path("other/config/small.py")
    assert find_corpus("shakespeare_char", near) == "shakespeare"
    Path("data/shakespeare_char").mkdir(parents=True)  # nanoGPT's prepare.py lies there
    assert find_corpus("shakespeare_char", near) == "shakespeare"
    prepare(Path("other/data/shakespeare_char"))
    assert Path(str(find_corpus("shakespeare_char", near))) == Path("other/data/shakespeare_char")


# --- the command


def test_a_configuration_trains(here):
    write_text(Path("words.txt"))
    assert call("corpus", "export", "words.txt", "--out", "data/tiny").code == 0
    put(SMALL)
    settings = "--max_iters=6 eval_interval=3 --compile=True threads=1 sample_tokens=5"
    command = ("train", "small.py", *settings.split())
    told = call(*command)
    assert told.code == 0
    assert "small.py, read and not executed" in told.out
    for name in ("eval_iters = 20", "wandb_log = False", "wandb_run_name = 'small' + "):
        assert f"unused   {name}" in told.out
    metadata = read_metadata(Path("out-small"))
    assert (metadata["status"], metadata["settings"]["max_iters"]) == ("finished", 6)
    assert (metadata["settings"]["seed"], metadata["machine"]["precision"]) == (1337, "fp32")
    assert call("train", "out-small").code == 0
    assert call(*command, "--out", "mine").code == 0
    assert read_metadata(Path("mine"))["identity"] == metadata["identity"]
    told = call("train", "small.py", "--max_iters=7")
    assert told.code == 1
    assert "out-small holds another run" in told.err


def test_dashes_are_allowed_for_presets_too(here):
    write_text(Path("words.txt"))
    shape = ("--n_layer=1", "--n_embd=8", "--block_size=8", "--batch_size=2", "--sample_tokens=3", "--threads=1")
    assert call("train", "quickstart", "--corpus=words.txt", *shape, "--max_iters=1").code == 0
    for words, message in (
        (("quickstart", "--max_itres=1"), "max_iters"),
        (("quickstart", "--what"), "--what"),
        (("missing.py",), "missing.py"),
    ):
        told = call("train", *words)
        assert told.code == 2
        assert message in told.err
