"""Experiments and settings: presets against the published tables, refusals that help, and what makes an identity."""

import dataclasses
import inspect
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanostudy import api
from nanostudy.cli import study
from nanostudy.errors import UsageError
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.settings import (
    FIELDS,
    IN_FILES,
    PLAN_OPTIONS,
    RUN_OPTIONS,
    TRAIN_OPTIONS,
    Experiment,
    Resources,
    Where,
    from_settings,
    names_of,
)
from nanostudy.settings import SETTINGS as DECLARED
from nanostudy.settings_files import (
    experiment_and_resources,
    parse_assignments,
    preset_names,
    preset_text,
    read_settings,
)
from nanostudy.study.definition import Study, parse_studies, study_yaml, with_assignments
from nanostudy.training.machine import resolve
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import settings_yaml
from nanostudy.validation import ALIASES, EPOCHS

# As published: the training report (A) and nanoGPT's README (C). Weight decay 0.01 and beta2 0.999 are PyTorch's defaults.
REPORT = {
    "batch_size": 64, "block_size": 256, "learning_rate": 3e-4, "dropout": 0.2, "decay_lr": False, "weight_decay": 0.01,
    "beta1": 0.9, "beta2": 0.999, "grad_clip": 0.0, "tie_embeddings": False, "bias": True, "corpus": "shakespeare",
}  # fmt: skip
README = {
    "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "beta2": 0.99, "weight_decay": 0.1, "grad_clip": 1.0,
    "decay_lr": True, "bias": False, "tie_embeddings": True, "gradient_accumulation_steps": 1, "corpus": "shakespeare",
}  # fmt: skip
PUBLISHED = {
    "shakespeare-cpu": {**REPORT, "n_layer": 4, "n_head": 4, "n_embd": 256, "max_iters": 2000, "eval_interval": 200},
    "shakespeare-gpu": {**REPORT, "n_layer": 6, "n_head": 6, "n_embd": 384, "max_iters": 6000, "eval_interval": 500},
    "nanogpt-cpu": {
        **README, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "max_iters": 2000, "dropout": 0.0,
    },
    "nanogpt-gpu": {
        **README, "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "max_iters": 5000, "dropout": 0.2,
    },
}  # fmt: skip


def preset(name: str) -> Experiment:
    return experiment_and_resources(read_settings(name))[0]


# --- presets


def test_the_presets_are_those_promised_and_all_are_experiments():
    assert {"quickstart", *PUBLISHED} <= set(preset_names())
    for name in preset_names():
        experiment, resources = experiment_and_resources(read_settings(name))
        assert isinstance(experiment, Experiment)
        assert resources == Resources()
        assert preset_text(name).startswith("# ")


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_as_published(name):
    assert {key: getattr(preset(name), key) for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "published"), [("shakespeare-cpu", 3.2e6), ("shakespeare-gpu", 10.8e6), ("nanogpt-gpu", 10.65e6)]
)
def test_preset_has_the_published_number_of_parameters(name, published):
    e, vocabulary = preset(name), 65
    # written out from the architecture: qkv, projection and MLP matrices, then biases, gains, embeddings, head
    width, bias = e.n_embd, int(e.bias)
    block = 12 * width**2 + bias * (3 + 1 + 4 + 1) * width + (1 + bias) * 2 * width
    outside = vocabulary * width * (1 if e.tie_embeddings else 2) + (1 + bias) * width
    count = count_parameters(GPTConfig.of(e, vocabulary))
    assert count.without_positions == e.n_layer * block + outside
    assert count.total == count.without_positions + e.block_size * width
    assert min(abs(count.total - published), abs(count.without_positions - published)) < 0.05e6


# --- reading


def write(tmp_path, text: str, name: str = "settings.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_numbers_may_be_text_and_scientific():
    assert yaml.safe_load("1e-3") == "1e-3", "the premise: YAML 1.1 takes 1e-3 for text"
    e = from_settings(
        {"learning_rate": "1e-3", "n_layer": "2", "bias": "True", "min_lr": "none", "dropout": 0, "max_iters": 20.0}
    )
    assert (e.learning_rate, e.n_layer, e.bias, e.min_lr, e.dropout, e.max_iters) == (1e-3, 2, True, None, 0.0, 20)
    assert [type(v) for v in (e.learning_rate, e.n_layer, e.bias, e.dropout, e.max_iters)] == [
        float,
        int,
        bool,
        float,
        int,
    ]


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "with the mark that Windows editors add"])
def test_a_settings_file_is_read(tmp_path, start):
    path = write(tmp_path, f"{start}learning_rate: 1e-3\r\nmin_lr: 2.5e-5\r\nthreads: 2\r\ncorpus: a.txt\r\n")
    experiment, resources = experiment_and_resources(read_settings(path))
    assert (experiment.learning_rate, experiment.min_lr, experiment.corpus) == (1e-3, 2.5e-5, "a.txt")
    assert resources == Resources(threads=2)


def test_assignments():
    assert parse_assignments(["max_iters=5", "sample_prompt=a=b", "corpus="]) == {
        "max_iters": "5",
        "sample_prompt": "a=b",
        "corpus": "",
    }
    for text in ("max_iters", "=5", ""):
        with pytest.raises(UsageError, match="setting=value"):
            parse_assignments([text])
    for again in ("n_layer=2", "--n_layer=3"):
        with pytest.raises(UsageError, match=r"n_layer is given twice, as '2' and '[23]'"):
            parse_assignments(["n_layer=2", "dropout=0.1", again])


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("n_laier", "n_layer"),
        ("Dropout", "dropout"),
        ("thread", "threads"),
        ("precison", "precision"),
    ],
)
def test_a_misspelt_setting_names_the_nearest(wrong, near):
    with pytest.raises(UsageError, match=rf"'{wrong}'.*Did you mean {near}\?"):
        experiment_and_resources({wrong: 1})


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("lr", "learning_rate"),
        ("batch", "batch_size"),
        ("layers", "n_layer"),
        ("heads", "n_head"),
        ("wd", "weight_decay"),
    ],
)
def test_what_people_type_is_taken_on_the_command_line_and_named_in_files(word, name):
    assert parse_assignments([f"{word}=1"]) == parse_assignments([f"--{name.replace('_', '-')}=1"]) == {name: "1"}
    with pytest.raises(UsageError, match=rf"'{word}': it is called {name}\."):
        experiment_and_resources({word: 1})


def test_no_alias_hides_a_setting():
    assert set(ALIASES.values()) <= set(FIELDS)
    assert not set(ALIASES) & set(IN_FILES)


def test_epochs_are_explained():
    for word in ("epochs", "epoch"):
        with pytest.raises(UsageError, match="counts updates, max_iters"):
            experiment_and_resources({word: 1})
    e = Experiment()
    assert f"{1_003_854 / e.tokens_per_update:,.0f} of shakespeare" in EPOCHS


def test_a_text_and_a_study_are_told_from_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text("First: line\n\nSecond; line", encoding="utf-8")
    with pytest.raises(UsageError, match=r"nanostudy train quickstart corpus='my text\.txt'"):
        read_settings("my text.txt")
    Path("s.yaml").write_text("grid: {n_embd: [64, 128]}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is a study file: nanostudy study run s\.yaml"):
        read_settings("s.yaml")
    Path("studies/s").mkdir(parents=True)
    Path("studies/s/study.yaml").write_text("grid: {n_embd: [64, 128]}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is a study's folder: nanostudy study run studies/s"):
        read_settings("studies/s")


def test_an_outlandish_setting_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'qqqqqqqq'.*n_layer.*device"):
        experiment_and_resources({"qqqqqqqq": 1})


BAD_VALUES = {
    "n_layer": [0, -1, 1.5, "two", None, True, [1], "1e3", 10**6],
    "seed": [-1, 2**63, 1.5, "x"],
    "dropout": [1, 1.0, -0.1, "half", float("nan"), None],
    "learning_rate": [-1, float("nan"), float("inf"), "fast", True, {}],
    "beta1": [1, -0.1],
    "bias": [1, "yes please", None],
    "max_iters": [-1, 2.5, 2**63],
    "min_lr": [-1e-9, "low"],
    "lr_decay_iters": [-5, 0.5],
    "eval_interval": [0],
    "log_interval": [0],
    "sample_tokens": [-1, 10**7],
    "corpus": [5, None, ""],
    "tokenizer": ["word", 8],
    "split": [[0.9], [0.5, 0.4], [0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [1.2, -0.2], "all", 0.9, True],
    "init_from": [7],
    "device": ["gpu", "cuda:x", "cuda:-1", "auto:1", "cuda:0:1", 5, None, ["cpu"]],
    "precision": ["fp8", 16, None, ["fp32"]],
    "threads": [0, -3, 2.5, "2.5", "many", True, [1]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_a_bad_value_is_refused_and_named(name, value):
    with pytest.raises(UsageError, match=name) as refusal:
        resolve(experiment_and_resources({name: value})[1])
    assert value in (None, "", True) or str(value) in str(refusal.value)


def test_a_refusal_tells_the_true_bound():
    with pytest.raises(UsageError) as refusal:
        Experiment(beta2=1.0)
    assert "to 1 (" not in str(refusal.value), "1.0 was just refused"


def test_a_split_is_one_setting_however_it_is_written():
    written = ([0.8, 0.1, 0.1], (0.8, 0.1, 0.1), "[0.8, 0.1, 0.1]", "0.8,0.1,0.1", "0.8/0.1/0.1", "0.80/.1/1e-1")
    assert {Experiment(split=split).split for split in written} == {"0.8/0.1/0.1"}
    assert Experiment(split="none").split is None
    study = Study("s", {"split": [0.8, 0.1, 0.1]}, {}, {"all": {}}, (1,))
    assert study.settings == with_assignments(replace(study, settings={}), {"split": "0.8,0.1,0.1"}).settings
    assert parse_studies(study_yaml(study), "s") == [study]
    axis = Study("s", {}, {"split": ([0.8, 0.2], "0.8/0.1/0.1")}, {"all": {}}, (1,))
    assert axis.grid == {"split": ("0.8/0.2", "0.8/0.1/0.1")}


@pytest.mark.parametrize("name", ["corpus", "sample_prompt", "init_from"])
@pytest.mark.parametrize("wrong", ["\0", "\ud800"])
def test_what_is_no_character_is_refused(name, wrong):
    with pytest.raises(UsageError, match=f"{name}=.*holds U\\+{ord(wrong):04X}, which is no character"):
        from_settings({name: f"a{wrong}b"})


def test_a_value_too_long_to_print_is_refused():
    for value in (10**5000, "9" * 5000, "x" * 5000, list(range(5000))):
        with pytest.raises(UsageError, match="n_layer=") as refusal:
            from_settings({"n_layer": value})
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 10_000, "n_embd": 4096}, "more than 2,013,266,182,144 parameters"),
        ({"n_embd": 10**9}, "parameters"),
        ({"block_size": 10**9}, "parameters"),
        ({"batch_size": 10**9}, "64,000,000,000 tokens"),
    ],
)
def test_sizes_that_no_machine_has_are_refused_before_anything_is_made(settings, message):
    with pytest.raises(UsageError, match=message):
        from_settings(settings)


def test_heads_must_divide_the_width():
    with pytest.raises(UsageError, match=r"n_embd=130.*n_head=4.*128 or 132"):
        Experiment(n_embd=130, n_head=4)
    with pytest.raises(UsageError, match=r"n_embd=2.*n_head=5.*5"):
        Experiment(n_embd=2, n_head=5)


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n", "just text", "", "1: 2\n", "corpus: [", "a: b: c", "corpus: \x07", "corpus: 2024-99-99\n",
    ],
    ids=["list", "text", "empty", "numbers as names", "open bracket", "two colons", "control character", "no date"],
)  # fmt: skip
def test_a_file_that_is_no_settings_is_refused(tmp_path, text):
    path = write(tmp_path, text, "mine.yaml")
    with pytest.raises(UsageError, match=r"mine\.yaml|seed|corpus"):
        experiment_and_resources(read_settings(path))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00n")
    with pytest.raises(UsageError, match=r"mine\.yaml"):
        read_settings(str(tmp_path / "mine.yaml"))


def test_a_source_that_is_nothing_lists_the_presets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for source in ("nothing", "", "empty", "x" * 5000):
        with pytest.raises(UsageError, match="quickstart"):
            read_settings(source)


# --- what a run folder keeps


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
OPTIONAL_TEXT = st.none() | TEXTS.filter(lambda text: text.lower() not in ("none", "null"))
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "dropout": st.floats(0, 0.99),
        "learning_rate": st.floats(0, 1e6),
        "min_lr": st.none() | st.floats(0, 1),
        "lr_decay_iters": st.none() | st.integers(0, 10**9),
        "bias": st.booleans(),
        "init_from": OPTIONAL_TEXT,
        "corpus": TEXTS,
        "sample_prompt": OPTIONAL_TEXT,
    },
)


@settings(deadline=None)
@given(SETTINGS)
@example({"sample_prompt": "\x7f"})
@example({"sample_prompt": "\x85"})
@example({"sample_prompt": "\uffff"})
@example({"corpus": "no"})
@example({"corpus": "a: b # c"})
@example({"learning_rate": 1e-05})
def test_settings_yaml_says_what_it_was_given(chosen):
    experiment = from_settings(chosen)
    assert from_settings(yaml.safe_load(settings_yaml(experiment.as_dict()))) == experiment


def test_a_run_folder_trains_the_same_run_again(tmp_path):
    from nanostudy.data.corpus import load_corpus

    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be.\n" * 50, encoding="utf-8")
    experiment = Experiment(
        corpus=str(text), n_embd=8, block_size=8, learning_rate=1e-5, dropout=0.1, min_lr=None, seed=2**63 - 1
    )
    resources = Resources(device="cpu", precision="fp32", threads=1)
    corpus = load_corpus(experiment.corpus)
    identity = experiment.identity(corpus.sha256, "char", None)
    folder = tmp_path / "run"
    folder.mkdir()
    recorder = Recorder(folder, experiment, identity, corpus, resolve(resources))
    assert recorder.claim(asdict(resources)) == "new"

    again, again_resources = experiment_and_resources(read_settings(str(folder)))
    assert (again, again_resources) == (experiment, resources)
    assert again.identity(corpus.sha256, "char", None) == identity
    assert Recorder(folder, again, identity, corpus, resolve(resources)).claim(asdict(resources)) == "unfinished"


# --- where and how


def test_options_are_declared_once_for_commands_and_python():
    for function, names in ((api.train, TRAIN_OPTIONS), (api.run_study, RUN_OPTIONS), (api.plan_study, PLAN_OPTIONS)):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in names} == {name: DECLARED[name].default for name in names}
    for command, names in ((study.run_command, PLAN_OPTIONS), (study.plan_command, PLAN_OPTIONS)):
        assert set(names) <= set(inspect.signature(command).parameters)


def test_options_are_checked_and_named_like_settings():
    where = Where.of(RUN_OPTIONS, Resources(device="cpu", threads=2), {"threads": "3", "workers": 4, "executor": "ray"})
    assert (where.resources, where.workers) == (Resources(device="cpu", threads=3), 4)
    with pytest.raises(UsageError, match=r"'worker'.*Did you mean workers\?"):
        Where.of(RUN_OPTIONS, None, {"worker": 4})
    with pytest.raises(UsageError, match="There is no setting 'workers'"):
        Where.of(TRAIN_OPTIONS, None, {"workers": 4})
    with pytest.raises(UsageError, match=r"save_every=-1.0 must be at least 0 \(seconds between checkpoints"):
        Where(save_every=-1)


# --- identity


BASE = Experiment()
TEXT, OTHER = "a" * 64, "b" * 64


def another(name: str):
    """A valid value other than the default one."""
    value = getattr(BASE, name)
    if value is None:
        return {"init_from": "elsewhere", "sample_prompt": "O", "split": "0.8/0.2"}.get(name, 7)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    return {"corpus": "elsewhere/same.txt", "tokenizer": "byte"}[name] if isinstance(value, str) else value / 2 + 0.01


@pytest.mark.parametrize("name", FIELDS)
def test_identity_changes_with_what_decides_the_result_alone(name):
    changed = replace(BASE, **{name: another(name)})
    assert changed != BASE
    differs = changed.identity(TEXT, "char", None) != BASE.identity(TEXT, "char", None)
    assert differs == (FIELDS[name].kind in ("shape", "number"))


def test_identity_follows_text_tokenizer_and_first_weights():
    identities = {BASE.identity(*parts) for parts in product((TEXT, OTHER), ("char", "byte"), (None, TEXT, OTHER))}
    assert len(identities) == 12
    assert all(len(identity) == 16 and int(identity, 16) >= 0 for identity in identities)


def test_equal_values_have_one_identity_however_they_were_written():
    written = from_settings({"learning_rate": "1e-3", "dropout": 0, "n_layer": "4", "max_iters": 2000.0})
    assert written.identity(TEXT, "char", None) == BASE.identity(TEXT, "char", None)


def test_every_setting_has_one_kind():
    kinds = [names_of(kind) for kind in ("data", "shape", "number", "record")]
    assert sorted(sum(kinds, ())) == sorted(FIELDS)


def test_experiments_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.n_layer = 2


# --- names


def test_names_follow_the_published_study():
    first = Experiment(
        block_size=64, n_layer=4, n_head=4, n_embd=128, batch_size=8, max_iters=1000, dropout=0.1, seed=1
    )
    assert first.name == "b64_L4_H4_E128_BS8_MI1000_D10_s1"
    assert replace(first, dropout=0.2, seed=2).name == "b64_L4_H4_E128_BS8_MI1000_D20_s2"
    assert replace(first, dropout=0.07).name.endswith("_D7_s1")
    assert replace(first, dropout=0.125).name.endswith("_D12.5_s1")


def test_the_published_grid_has_128_names():
    grid = product((64, 128), (4, 6), (4, 8), (128, 256), (8, 16), (1000, 2000), (0.1, 0.2))
    names = {
        Experiment(block_size=b, n_layer=layers, n_head=h, n_embd=e, batch_size=bs, max_iters=mi, dropout=d).name
        for b, layers, h, e, bs, mi, d in grid
    }
    assert len(names) == 128
