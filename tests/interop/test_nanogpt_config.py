"""nanoGPT's configurations train as they are: read as literals, never executed, and nothing dropped without a word."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_text

from nanostudy.cli import main as cli
from nanostudy.errors import UsageError
from nanostudy.interop.literals import Code, read_assignments
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


def settings_of(text: str, **overrides: str) -> dict:
    return read_config(put(text), {"corpus": "playhouse", **overrides}).settings


def main(*args: str, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["nanostudy", *map(str, args)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


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
    with pytest.raises(UsageError, match="Did you mean max_iters"):
        settings_of(SMALL, max_iter="7")


def test_what_has_no_counterpart_is_listed(here):
    result = read_config(put(SMALL + "favourite = 3\n"), {"corpus": "playhouse", "compile": "False"})
    assert result.settings["compile"] == "no"
    assert result.out == Path("out-small")
    message = {unused.name: unused.value for unused in result.unused}
    assert message == {
        **{"eval_iters": "20", "wandb_log": "False", "favourite": "3"},
        **{"wandb_run_name": "'small' + str(time.time()) (code, not executed)"},
        **{"time": "import time (code, not executed)"},
    }
    assert all(unused.reason for unused in result.unused)


def test_eval_only_is_a_training_without_updates(here):
    assert settings_of("eval_only = True\nmax_iters = 9\n")["max_iters"] == 0
    assert settings_of("eval_only = False\nmax_iters = 9\n")["max_iters"] == 9


CODE = [
    "import os\nos.system('echo harm > sprung')",
    "print('hello')",
    "if True:\n    max_iters = 3",
    "for max_iters in range(3): pass",
    "while True: pass",
    "def f(): pass",
    "class A: pass",
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
        "f'{3}'",
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
    assert isinstance(read_assignments(put("import os.path as batch_size"), {})["batch_size"], Code)


@pytest.mark.parametrize("text", ["max_iters = (", "max_iters = 3\0", "(" * 5000, "é" * 2**21, "max_iters =\t= 3"])
def test_files_that_are_no_configuration(here, text):
    with pytest.raises(UsageError, match=r"small\.py"):
        settings_of(text)


def test_more_than_a_name_may_be_assigned(here):
    result = read_assignments(put("'a text'\na = b = 3\na += 2\nc: float = a / 2\na = 'x' + 'y'\nd = None\n"), {})
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


def test_a_configuration_trains(here, monkeypatch, capsys):
    write_text(Path("words.txt"))
    assert main("corpus", "export", "words.txt", "--out", "data/tiny", monkeypatch=monkeypatch) == 0
    put(SMALL)
    command = (
        "train",
        "small.py",
        "--max_iters=6",
        "eval_interval=3",
        "--compile=True",
        "threads=1",
        "sample_tokens=5",
    )
    assert main(*command, monkeypatch=monkeypatch) == 0
    message = capsys.readouterr().out
    assert "small.py, read and not executed" in message
    for name in ("eval_iters = 20", "wandb_log = False", "wandb_run_name = 'small' + "):
        assert f"unused   {name}" in message
    metadata = read_metadata(Path("out-small"))
    assert (metadata["status"], metadata["settings"]["max_iters"]) == ("finished", 6)
    assert (metadata["settings"]["seed"], metadata["machine"]["precision"]) == (1337, "fp32")
    assert main("train", "out-small", monkeypatch=monkeypatch) == 0
    assert main(*command, "--out", "mine", monkeypatch=monkeypatch) == 0
    assert read_metadata(Path("mine"))["identity"] == metadata["identity"]
    assert main("train", "small.py", "--max_iters=7", monkeypatch=monkeypatch) == 1  # out-small holds another run
    assert "another run" in capsys.readouterr().err


def test_dashes_are_allowed_for_presets_too(here, monkeypatch, capsys):
    write_text(Path("words.txt"))
    shape = ("--n_layer=1", "--n_embd=8", "--block_size=8", "--batch_size=2", "--sample_tokens=3", "--threads=1")
    assert main("train", "quickstart", "--corpus=words.txt", *shape, "--max_iters=1", monkeypatch=monkeypatch) == 0
    assert main("train", "quickstart", "--max_itres=1", monkeypatch=monkeypatch) == 2
    assert "max_iters" in capsys.readouterr().err
    assert main("train", "quickstart", "--what", monkeypatch=monkeypatch) == 2
    assert main("train", "missing.py", monkeypatch=monkeypatch) == 2
    assert "missing.py" in capsys.readouterr().err
