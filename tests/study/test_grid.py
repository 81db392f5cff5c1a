"""Studies: ids, order, parts, seeds and names against the published rules, extension, and refusals that help."""

import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanostudy.errors import UsageError
from nanostudy.settings_files import experiment_and_resources, read_settings
from nanostudy.study.definition import (
    Study,
    kept_best,
    parse_studies,
    read_study,
    study_names,
    study_text,
    study_yaml,
)
from nanostudy.study.grid import changed_settings, extend, options_for, requested, select


def study(grid=None, *, parts=None, seeds=(1,), fixed=None, **more) -> Study:
    return Study("small", fixed or {}, grid or {}, parts or {"all": {}}, seeds, **more)


def entries_of(*definitions: Study):
    entries = []
    for definition in definitions:
        entries = extend(entries, definition)[0]
    return entries


def names(entries) -> list[str]:
    return [entry.name for entry in entries]


def write(tmp_path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the published grid


def published():
    """Ids, names and parts by the published rules, written out."""
    rows = []
    for part, b, layers in [
        ("shallow_small", 64, 4), ("deep_small", 64, 6), ("shallow_large", 128, 4), ("deep_large", 128, 6),
    ]:  # fmt: skip
        seed = 0
        for h in (4, 8):
            for e in (128, 256):
                for bs in (8, 16):
                    for mi in (1000, 2000):
                        for d in (10, 20):
                            seed += 1
                            rows.append((len(rows) + 1, f"b{b}_L{layers}_H{h}_E{e}_BS{bs}_MI{mi}_D{d}_s{seed}", part))
    return rows


@pytest.mark.parametrize("name", ["shakespeare-grid", "shakespeare-grid-as-published"])
def test_the_128_ids_names_and_parts_are_the_published_ones(name):
    entries = entries_of(read_study(name))
    assert [(entry.id, entry.name, entry.part) for entry in entries] == published()
    assert [entry.experiment.seed for entry in entries] == [*range(1, 33)] * 4
    for entry in entries:
        assert entry.name == entry.experiment.name
        assert entry.experiment.dropout in (0.1, 0.2)


def test_the_published_grid_at_spots_read_off_the_source():
    by_id = {entry.id: entry for entry in entries_of(read_study("shakespeare-grid"))}
    assert by_id[1].name == "b64_L4_H4_E128_BS8_MI1000_D10_s1"
    assert by_id[2].name == "b64_L4_H4_E128_BS8_MI1000_D20_s2"
    assert by_id[65].name == "b128_L4_H4_E128_BS8_MI1000_D10_s1", "the one published row"
    assert by_id[128].name == "b128_L6_H8_E256_BS16_MI2000_D20_s32"
    for part, first, last in [("shallow_small", 1, 32), ("deep_small", 33, 64), ("shallow_large", 65, 96)]:
        assert {by_id[i].part for i in range(first, last + 1)} == {part}
    assert {by_id[i].part for i in range(97, 129)} == {"deep_large"}
    assert {by_id[i].experiment.block_size for i in (1, 33)} == {64}


def test_both_readings_hold_what_was_published_and_differ_where_they_should():
    described, done = read_study("shakespeare-grid"), read_study("shakespeare-grid-as-published")
    common = {
        "corpus": "shakespeare", "learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1,
        "grad_clip": 1.0, "bias": False, "eval_interval": 200, "log_interval": 10, "decay_lr": True, "lr_decay_iters": None,
    }  # fmt: skip
    for definition, own in [
        (described, {"gradient_accumulation_steps": 1, "warmup_iters": 100, "min_lr": None}),
        (done, {"gradient_accumulation_steps": 40, "warmup_iters": 2000, "min_lr": 6e-5}),
    ]:
        for entry in entries_of(definition):
            assert {key: getattr(entry.experiment, key) for key in {**common, **own}} == {**common, **own}
        assert (definition.prompts, definition.sample_tokens, definition.seeds) == ((None, "ROMEO:"), 300, None)
    assert (described.grid, described.parts) == (done.grid, done.parts)


def test_the_training_report_has_the_settings_of_its_presets():
    entries = entries_of(read_study("shakespeare-report"))
    assert [(entry.part, entry.experiment.seed) for entry in entries] == [
        (p, s) for p in ("cpu", "gpu") for s in (1, 2, 3)
    ]
    for entry in entries:
        preset, _ = experiment_and_resources(read_settings(f"shakespeare-{entry.part}"))
        assert entry.experiment == replace(preset, seed=entry.experiment.seed)


def test_the_studies_are_those_promised_and_explain_themselves():
    assert study_names() == ["quickstart", "shakespeare-grid", "shakespeare-grid-as-published", "shakespeare-report"]
    for name in study_names():
        assert study_text(name).startswith("# ")
        assert read_study(name).description
        assert read_study(name).name == name
    quick = entries_of(read_study("quickstart"))
    assert len(quick) == 32
    assert len({(entry.experiment.learning_rate, entry.experiment.seed) for entry in quick}) == 8


def test_a_study_is_read_without_torch():
    code = "import sys, nanostudy.study.grid as g, nanostudy.study.definition as d; g.extend([], d.read_study('quickstart')); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- order, parts, seeds


def test_a_parts_axes_come_first_and_take_the_place_of_the_grids():
    parts = {"a": {"n_layer": (2, 3)}, "b": {"dropout": (0.5,), "n_layer": (1,)}}
    entries = entries_of(study({"dropout": (0.0, 0.1), "max_iters": (5, 6)}, parts=parts))
    seen = [(e.part, e.experiment.n_layer, e.experiment.dropout, e.experiment.max_iters) for e in entries]
    assert seen == [
        ("a", 2, 0.0, 5), ("a", 2, 0.0, 6), ("a", 2, 0.1, 5), ("a", 2, 0.1, 6),
        ("a", 3, 0.0, 5), ("a", 3, 0.0, 6), ("a", 3, 0.1, 5), ("a", 3, 0.1, 6),
        ("b", 1, 0.5, 5), ("b", 1, 0.5, 6),
    ]  # fmt: skip


def test_a_part_may_depart_from_a_fixed_setting():
    entries = entries_of(study({"dropout": (0.0,)}, fixed={"n_layer": 2}, parts={"a": {}, "b": {"n_layer": (3,)}}))
    assert [entry.experiment.n_layer for entry in entries] == [2, 3]


def test_listed_seeds_vary_fastest():
    entries = entries_of(study({"dropout": (0.0, 0.1)}, seeds=(7, 3)))
    assert [(e.experiment.dropout, e.experiment.seed) for e in entries] == [(0.0, 7), (0.0, 3), (0.1, 7), (0.1, 3)]


@pytest.mark.parametrize(
    ("line", "seeds"),
    [("", (1,)), ("seeds: 4", (4,)), ("seeds: [2, 1]", (2, 1)), ("seeds: one per experiment", None)],
)
def test_seeds_of_a_file(tmp_path, line, seeds):
    assert read_study(write(tmp_path, f"grid: {{dropout: [0.0]}}\n{line}\n")).seeds == seeds


def test_values_are_read_as_their_settings_types(tmp_path):
    path = write(tmp_path, "grid: {learning_rate: [1e-3, 2e-3], min_lr: [none, 1e-4]}\nsettings: {dropout: '0.10'}\n")
    read = read_study(path)
    assert read.grid == {"learning_rate": (0.001, 0.002), "min_lr": (None, 0.0001)}
    assert read.settings == {"dropout": 0.1}
    assert read.name == "mine"


# --- names


def test_a_name_carries_what_varies_after_the_published_pattern():
    grid = {
        "learning_rate": (1e-3, 3e-4),
        "n_layer": (2, 4),
        "bias": (True, False),
        "min_lr": (None, 1e-5),
        "beta1": (0.5,),
    }
    name = names(entries_of(study(grid)))
    assert name[0] == "b64_L2_H4_E128_BS12_MI2000_D0_s1_bias=true_learning_rate=0.001_min_lr=none"
    assert name[-1] == "b64_L4_H4_E128_BS12_MI2000_D0_s1_bias=false_learning_rate=0.0003_min_lr=1e-05"


def test_a_name_carries_what_differs_between_parts_and_from_before():
    parted = entries_of(study(parts={"a": {"weight_decay": (0.0,)}, "b": {"weight_decay": (0.5,)}}))
    assert [name.partition("_s1")[2] for name in names(parted)] == ["_weight_decay=0", "_weight_decay=0.5"]
    first = study({"n_layer": (2,)})
    grown = names(entries_of(first, replace(first, grid={"n_layer": (2,), "beta1": (0.9, 0.8)})))
    assert [name.partition("_s1")[2] for name in grown] == ["", "_beta1=0.8"]
    moved = names(entries_of(replace(first, grid={"beta1": (0.9,)}), replace(first, grid={"beta1": (0.8,)})))
    assert [name.partition("_s1")[2] for name in moved] == ["", "_beta1=0.8"]


def test_a_corpus_is_named_by_its_stem_alone():
    corpora = ("/a b/Hamlet*.txt", "C:\\texts\\my play?.v2.txt", "..", "hamlet.md")
    name = names(entries_of(study({"corpus": corpora})))
    assert [n.partition("corpus=")[2] for n in name[:2]] == ["Hamlet", "myplay.v2"]
    assert re.fullmatch(r".*corpus=[0-9a-f]{8}", name[2]), (
        "letters that a folder's name leaves out still make a difference"
    )
    assert re.fullmatch(r".*corpus=hamlet_[0-9a-f]{8}", name[3]), "on some machines Hamlet and hamlet are one folder"


def test_letters_that_a_folders_name_leaves_out_still_make_a_difference():
    name = names(entries_of(study({"corpus": ("война.txt", "мир.txt", "café.txt")})))
    ends = [n.partition("corpus=")[2] for n in name]
    assert all(re.fullmatch(r"(caf)?[0-9a-f]{8}", end) for end in ends)
    assert len(set(ends)) == 3
    assert ends[2].startswith("caf")


def test_equal_names_are_told_apart_the_same_way_each_time():
    near = study({"dropout": (0.1, 0.1 + 1e-12, 0.1 + 2e-12)})
    name = names(entries_of(near))
    assert name[0].endswith("_D10_s1")
    assert all(re.fullmatch(re.escape(name[0]) + "_[0-9a-f]{8}", other) for other in name[1:])
    assert len(set(name)) == 3
    assert names(entries_of(near)) == name
    one_by_one = [replace(near, grid={"dropout": near.grid["dropout"][:n]}) for n in (1, 2, 3)]
    assert names(entries_of(*one_by_one)) == name


def test_names_are_never_longer_than_file_systems_allow():
    long = entries_of(study({"corpus": tuple("x" * 300 + end for end in ("a.txt", "b.txt")), "beta1": (0.1, 0.2)}))
    assert all(len(name) <= 200 for name in names(long))
    assert len(set(names(long))) == 4


# --- extension


def test_an_extension_renumbers_nothing_and_goes_on_with_each_parts_seeds():
    parts = {"a": {"n_layer": (2,)}, "b": {"n_layer": (3,)}}
    first = study({"dropout": (0.1, 0.2)}, parts=parts, seeds=None)
    before = entries_of(first)
    after, _ = extend(before, replace(first, grid={"dropout": (0.0, 0.2, 0.1)}))
    assert after[:4] == before
    seen = [(e.id, e.part, e.experiment.dropout, e.experiment.seed) for e in after]
    assert seen == [
        (1, "a", 0.1, 1), (2, "a", 0.2, 2), (3, "b", 0.1, 1), (4, "b", 0.2, 2), (5, "a", 0.0, 3), (6, "b", 0.0, 3),
    ]  # fmt: skip


def test_a_fixed_setting_that_becomes_an_axis_keeps_its_experiments():
    first = study({"dropout": (0.1, 0.2)}, fixed={"n_layer": 2}, seeds=None)
    after = entries_of(first, study({"dropout": (0.1, 0.2), "n_layer": (3, 2)}, seeds=None))
    assert [(e.experiment.n_layer, e.experiment.dropout, e.experiment.seed) for e in after] == [
        (2, 0.1, 1), (2, 0.2, 2), (3, 0.1, 3), (3, 0.2, 4),
    ]  # fmt: skip
    assert [entry.id for entry in requested(after, first)] == [1, 2]


def test_one_per_experiment_goes_on_from_the_largest_seed():
    after = entries_of(study({"dropout": (0.1,)}, seeds=(5, 3)), study({"dropout": (0.1, 0.2)}, seeds=None))
    assert [entry.experiment.seed for entry in after] == [5, 3, 6]


def test_more_seeds_are_appended():
    first = study({"dropout": (0.1, 0.2)}, seeds=(1,))
    after = entries_of(first, replace(first, seeds=(2, 1)))
    assert [(e.id, e.experiment.dropout, e.experiment.seed) for e in after] == [
        (1, 0.1, 1), (2, 0.2, 1), (3, 0.1, 2), (4, 0.2, 2),
    ]  # fmt: skip


def test_ids_are_not_given_again_to_what_is_missing():
    entries = entries_of(study({"dropout": (0.1, 0.2)}))
    after, _ = extend(entries[1:], study({"dropout": (0.2, 0.3)}))
    assert [entry.id for entry in after] == [2, 3]


def test_a_record_setting_makes_no_new_experiment():
    first = study({"dropout": (0.1,)})
    before = entries_of(first)
    assert extend(before, replace(first, settings={"log_interval": 3}))[0] == before


def test_asked_leaves_out_what_this_definition_does_not_contain():
    first = study({"dropout": (0.1, 0.2)}, seeds=None)
    entries = entries_of(first, study({"dropout": (0.2, 0.3)}, seeds=(2, 5)))
    assert [(e.id, e.experiment.dropout, e.experiment.seed) for e in entries] == [
        (1, 0.1, 1), (2, 0.2, 2), (3, 0.2, 5), (4, 0.3, 2), (5, 0.3, 5),
    ]  # fmt: skip
    assert [e.id for e in requested(entries[::-1], first)] == [1, 2], "one per experiment: the first of each cell"
    assert [e.id for e in requested(entries, study({"dropout": (0.2, 0.3)}, seeds=(5,)))] == [3, 5]


def test_changed_settings():
    first = study({"dropout": (0.1,)}, fixed={"learning_rate": 3e-4, "corpus": "shakespeare"})
    same = replace(first, keep="none", prompts=("O",), description="x", seeds=(9,), grid={"n_layer": (1, 2)})
    assert changed_settings([first], first) is None
    assert changed_settings([first], same) is None
    assert changed_settings([], first) is None
    faster = replace(first, settings={"learning_rate": 1e-3, "corpus": "playhouse", "bias": True, "log_interval": 1})
    message = "corpus shakespeare there, playhouse requested, bias false there, true requested, learning_rate 0.0003 there, 0.001 requested"
    assert changed_settings([first], faster) == message
    assert changed_settings([first], study(fixed={})) == "learning_rate 0.0003 there, 0.001 requested", "a default, too"
    axis = replace(first, settings={"corpus": "shakespeare"}, grid={"learning_rate": (1e-3, 2e-3)})
    assert changed_settings([first], axis) is None
    assert changed_settings([first, axis], replace(first, settings={"learning_rate": 1e-3})) is None
    parted = replace(first, parts={"a": {"bias": (True,)}})
    assert changed_settings([parted], replace(first, settings={**first.settings, "bias": True})) is None


# --- the command line's axes


def test_assignments_replace_in_place_add_as_the_fastest_or_fix(tmp_path):
    path = write(tmp_path, "settings: {bias: false, beta1: 0.9}\ngrid: {dropout: [0.1, 0.2], n_layer: [1, 2]}\n")
    read = read_study(
        path, {"dropout": "0.3, 0.10", "bias": "true,false", "n_layer": "4", "beta1": "0.8", "corpus": "a"}
    )
    assert list(read.grid.items()) == [("dropout", (0.3, 0.1)), ("n_layer", (4,)), ("bias", (True, False))]
    assert read.settings == {"beta1": 0.8, "corpus": "a"}
    own = {"keep": "best  3", "sample_tokens": "7", "skip_impossible": "True", "seed": "4,5"}
    read = read_study(path, own)
    assert (read.keep, read.sample_tokens, read.skip_impossible, read.seeds) == ("best 3", 7, True, (4, 5))
    assert kept_best(read.keep) == 3
    assert read_study(path, {"seeds": "one per experiment"}).seeds is None
    assert read_study(path, {"seeds": "6"}).seeds == (6,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": "32"}, r"block_size is set by the parts of this study; choose with --part: shallow_small"),
        ({"droput": "0.1"}, r"'droput'.*Did you mean dropout\?"),
        ({"dropout": "0.1,0.10"}, r"dropout lists 0\.1 twice"),
        ({"dropout": "0.1,"}, r"dropout='' must be a number"),
        ({"log_interval": "1,2"}, r"log_interval changes no result"),
        ({"prompts": "O"}, r"prompts cannot be given on the command line"),
        ({"sample_prompt": "O"}, r"sample_prompt cannot be given on the command line"),
        ({"keep": "best"}, r"keep='best'.*best N"),
        ({"skip_impossible": "perhaps"}, r"skip_impossible='perhaps' must be true or false"),
        ({"seeds": ""}, r"seeds=''.*one per experiment"),
        ({"seeds": "1,1"}, r"seed lists 1 twice"),
    ],
)
def test_a_bad_assignment_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        read_study("shakespeare-grid", given)


# --- bad files


BAD_FILES = {
    "grid: {n_layerz: [1]}": r"'n_layerz'.*Did you mean n_layer\?",
    "gird: {n_layer: [1]}": r"'gird'.*Did you mean grid\?",
    "dropout: 0.1": r"dropout is no key of a study: put it under `settings:`",
    "seed: 3": r"seed is no key.*`seeds: \[1, 2, 3\]`",
    "settings: {seed: 3}": r"settings cannot hold seed: use `seeds:",
    "grid: {seed: [1, 2]}": r"grid cannot hold seed: use `seeds:",
    "parts: {a: {seed: 3}}": r"part a cannot hold seed: use `seeds:",
    "settings: {sample_prompt: O}": r"sample_prompt: use `prompts",
    "settings: {sample_tokens: 3}": r"settings cannot hold sample_tokens",
    "settings: {dropout: [0.1, 0.2]}": r"several values of dropout.*`grid:`",
    "settings: {dropout: 0.1}\ngrid: {dropout: [0.1, 0.2]}": r"dropout is both fixed",
    "grid: {dropout: []}": r"grid: dropout has no values",
    "grid: {}": r"grid must hold lines.*leave it out",
    "grid: []": r"grid must hold lines.*leave it out",
    "grid:": r"grid must hold lines.*leave it out",
    "settings: 5": r"settings must hold lines",
    "parts: [a, b]": r"parts must hold lines",
    "parts: {a: 5}": r"part a must hold lines",
    "parts: {no: {n_layer: 3}}": r"part False: a part's name is text",
    "parts: {a/b: {n_layer: 3}}": r"part 'a/b'",
    "parts: {a: {n_layer: 3}, A: {n_layer: 4}}": r"differ only in letter case.*a, A",
    "grid: {log_interval: [1, 2]}": r"log_interval changes no result",
    "parts: {a: {log_interval: 1}, b: {log_interval: 2}}": r"part a: log_interval changes no result",
    "grid: {dropout: [0.1, .nan]}": r"dropout=nan must be a number",
    "grid: {learning_rate: [.inf]}": r"learning_rate=inf must be a number",
    "grid: {n_head: [two]}": r"n_head='two' must be a whole number",
    "grid: {n_embd: [0]}": r"n_embd=0 must be at least 1",
    "grid: {n_layer: [[1, 2]]}": r"n_layer=\[1, 2\] must be a whole number",
    "grid: {dropout: [0.1, '0.10', 0.1]}": r"dropout lists 0\.1 3 times",
    "seeds: []": r"seeds: seed has no values",
    "seeds:": r"seeds=None must be whole numbers.*`one per experiment`",
    "seeds: one each": r"seeds='one each' must be.*`one per experiment`",
    "seeds: [1, 1]": r"seed lists 1 twice",
    "seeds: [-1]": r"seed=-1 must be",
    "prompts: []": r"prompts: sample_prompt has no values",
    "prompts: [5]": r"sample_prompt=5 must be text",
    "sample_tokens: -1": r"sample_tokens=-1 must be from 0 to 1000000",
    "keep: best 0": r"keep='best 0'.*best N",
    "keep: no": r"keep=False.*best N",
    "skip_impossible: often": r"skip_impossible='often' must be true or false",
    "description: 5": r"description=5 must be text .in quotes",
    "- a": r"must hold lines",
    "grid: {dropout: [0.1]": r"is not YAML",
    "keep: all\n---\nkeep: none": r"one document",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, text):
    with pytest.raises(UsageError, match=rf"(?s)mine\.yaml.*{BAD_FILES[text]}"):
        read_study(write(tmp_path, text))


def test_what_is_no_study_lists_the_studies(tmp_path):
    for source in ("nothing", "", str(tmp_path), "x" * 5000, "a\0b"):
        with pytest.raises(UsageError, match=r"no study.*quickstart, shakespeare-grid"):
            read_study(source)
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00n")
    with pytest.raises(UsageError, match=r"mine\.yaml is not UTF-8"):
        read_study(str(tmp_path / "mine.yaml"))


def test_a_grid_that_nobody_can_train_is_refused_before_it_is_expanded():
    many = tuple(range(1, 60))
    grid = dict.fromkeys(("n_layer", "n_embd", "batch_size", "max_iters", "block_size"), many)
    with pytest.raises(
        UsageError, match=r"1,429,848,598 experiments or more \(59 n_layer × 59 n_embd .*2 seeds\).*2,000,000"
    ):
        study(grid, seeds=(1, 2))
    parts = {f"p{i}": {"warmup_iters": (i,)} for i in range(20)}
    with pytest.raises(UsageError, match=r"2,053,790 experiments"):
        study({"n_layer": many, "max_iters": many, "batch_size": many}, parts=parts)


def test_duplicate_experiments_are_named():
    parts = {"p": {"n_layer": (2, 3)}, "q": {"n_layer": (3,)}}
    message = r"duplicate experiments: n_layer=3, bias=true \(part p\) and n_layer=3, bias=true \(part q\)"
    with pytest.raises(UsageError, match=message):
        extend([], study({"bias": (True,)}, parts=parts, seeds=None))


def test_an_impossible_combination_is_named_or_skipped():
    grid = {"n_head": (4, 5), "n_embd": (128, 130)}
    with pytest.raises(
        UsageError, match=r"small: n_head=4, n_embd=130 \(part all\):.*divisible.*`skip_impossible: true`"
    ):
        extend([], study(grid))
    entries, skipped = extend([], study(grid, seeds=None, skip_impossible=True))
    assert [(e.id, e.experiment.n_head, e.experiment.n_embd, e.experiment.seed) for e in entries] == [
        (1, 4, 128, 1), (2, 5, 130, 2),
    ]  # fmt: skip
    assert [text.partition(":")[0] for text in skipped] == [
        "n_head=4, n_embd=130 (part all)",
        "n_head=5, n_embd=128 (part all)",
    ]
    with pytest.raises(UsageError, match="every combination is impossible"):
        extend([], study({"n_head": (3, 5)}, skip_impossible=True))


@pytest.mark.parametrize("keep", ["all", "final", "none", "best 1", "best 12"])
def test_keep(keep):
    assert kept_best(keep) == (int(keep[5:]) if keep.startswith("best") else None)


# --- selection


GRID = entries_of(read_study("shakespeare-grid"))


@pytest.mark.parametrize(
    ("parts", "only", "ids"),
    [
        ((), None, [*range(1, 129)]),
        (("deep_small",), None, [*range(33, 65)]),
        (("deep_large", "shallow_small"), None, [*range(1, 33), *range(97, 129)]),
        ((), "id=3", [3]),
        ((), "id=3, id=5", [3, 5]),
        ((), "part=deep_small,seed=2", [34]),
        (("deep_small", "deep_large"), "part=deep_large,seed=2", [98]),
        ((), "name=b128_L4_H4_E128_BS8_MI1000_D10_s1", [65]),
        (("shallow_small",), "n_embd=256,dropout=0.10,n_head=4", [9, 11, 13, 15]),
        (("shallow_small",), "seed=1,seed=2,dropout=2e-1", [2]),
        ((), "block_size=128,n_layer=6,seed=32", [128]),
    ],
)
def test_selection(parts, only, ids):
    assert [entry.id for entry in select(GRID, parts, only)] == ids


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([*range(1, 129)], []),
        ([*range(33, 65)], ["--part", "deep_small"]),
        ([*range(1, 33), *range(97, 129)], ["--part", "shallow_small", "--part", "deep_large"]),
        ([entry.id for entry in GRID if entry.experiment.n_head == 4 and entry.experiment.dropout == 0.1],
         ["--only", "n_head=4,dropout=0.1"]),
        ([3, 40], ["--only", "id=3,id=40"]),
        ([9, 11, 13, 15], ["--part", "shallow_small", "--only", "n_head=4,n_embd=256,dropout=0.1"]),
    ],
)  # fmt: skip
def test_options_choose_what_they_were_made_of(ids, options):
    made = options_for(ids, GRID)
    assert sorted(made) == sorted(options)
    parts = [word for flag, word in itertools.pairwise(made) if flag == "--part"]
    only = next((word for flag, word in itertools.pairwise(made) if flag == "--only"), None)
    assert [entry.id for entry in select(GRID, parts, only)] == ids


def test_seeds_and_values_with_commas():
    entries = entries_of(read_study("quickstart"))
    assert options_for([entry.id for entry in entries if entry.experiment.seed == 1], entries) == ["--only", "seed=1"]
    odd = [replace(one, experiment=replace(one.experiment, corpus=f"{one.id % 2},b.txt")) for one in entries]
    assert options_for([1, 3], odd) == ["--only", "id=1,id=3"]


def test_many_without_a_pattern_are_described_by_their_parts():
    odd = [entry.id for entry in GRID if entry.part != "deep_large" and (entry.id % 2 or entry.id % 3)]
    parts = [word for word in options_for(odd, GRID) if word != "--part"]
    assert parts == ["shallow_small", "deep_small", "shallow_large"]


@pytest.mark.parametrize(
    ("parts", "only", "message"),
    [
        (("shalow_small",), None, r"'shalow_small'. Did you mean shallow_small\? Parts: shallow_small, deep_small"),
        (("deep_small", "zzz"), None, r"no part 'zzz'\. Parts: shallow_small"),
        ((), "part=deep", r"no part 'deep'"),
        ((), "n_layerz=4", r"'n_layerz'.*Did you mean n_layer\?"),
        ((), "dropout", r"--only: 'dropout' is not of the form setting=value"),
        ((), "", r"--only: '' is not of the form"),
        ((), "dropout=high", r"dropout='high' must be a number"),
        ((), "dropout=0.3,dropout=0", r"No experiment has dropout=0\.3 or dropout=0\. dropout is 0\.1 or 0\.2\."),
        (("deep_small",), "n_layer=4", r"has part=deep_small and n_layer=4\. n_layer is 6 there\."),
        ((), "n_layer=4,id=40", r"n_layer=4 and id=40\. id is 1, 2, 3, \.\.\., 96 \(64 values\) there\."),
        ((), "id=x", r"id=x\. id is 1, 2, 3, \.\.\., 128 \(128 values\)\."),
    ],
)
def test_a_selection_of_nothing_says_what_there_is(parts, only, message):
    with pytest.raises(UsageError, match=message):
        select(GRID, parts, only)


# --- properties


AXES = {
    "n_layer": st.integers(1, 4),
    "n_head": st.sampled_from([1, 2, 3]),
    "n_embd": st.sampled_from([4, 6, 12]),
    "dropout": st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.3]),
    "learning_rate": st.floats(0, 1),
    "min_lr": st.none() | st.floats(0, 1),
    "bias": st.booleans(),
    "corpus": st.sampled_from(["a", "A", "a.txt", "dir/a", "ä", "b" * 250]),
}
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
WORDS = st.text(CHARACTERS, min_size=1)
PROMPTS = st.none() | WORDS.filter(lambda text: text.lower() not in ("none", "null"))


@st.composite
def studies(draw, max_axes: int = 3, seeds=None) -> Study:
    chosen = draw(st.lists(st.sampled_from([*AXES]), unique=True, max_size=max_axes))
    grid = {n: tuple(draw(st.lists(AXES[n], unique=True, min_size=1, max_size=3))) for n in chosen}
    part_axis = draw(st.sampled_from(["weight_decay", *AXES]))
    values = {"weight_decay": (0.0, 0.5), "bias": (True, False), "corpus": ("x", "X")}.get(part_axis, (1, 2))
    values = (0.25, 0.5) if part_axis in ("dropout", "learning_rate", "min_lr") else values
    parts = draw(st.sampled_from([{"all": {}}, {"p": {part_axis: values[:1]}, "q": {part_axis: values[1:]}}]))
    seeds = draw(st.none() | st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=3).map(tuple))
    return Study("small", {}, grid, parts, seeds, skip_impossible=True)


def contents(definition: Study) -> int:
    """How many experiments a definition has, counted without making them in order."""
    count = 0
    for own in definition.parts.values():
        axes = {**definition.grid, **own}
        heads, widths = axes.get("n_head", (4,)), axes.get("n_embd", (128,))
        possible = sum(width % head == 0 for head in heads for width in widths)
        others = [len(values) for name, values in axes.items() if name not in ("n_head", "n_embd")]
        for length in others:
            possible *= length
        count += possible * len(definition.seeds or (0,))
    return count


def impossible(definition: Study) -> bool:
    return contents(definition) == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(studies().filter(lambda s: not impossible(s)), min_size=1, max_size=3))
def test_every_experiment_once_whatever_the_definitions(definitions):
    entries = []
    for definition in definitions:
        before = entries
        entries, _ = extend(before, definition)
        assert entries[: len(before)] == before
        assert len(requested(entries, definition)) == contents(definition)
        assert extend(entries, definition)[0] == entries, "the same again adds nothing"
    assert [entry.id for entry in entries] == [*range(1, len(entries) + 1)]
    assert len({entry.experiment for entry in entries}) == len(entries)
    assert len({entry.name.casefold() for entry in entries}) == len(entries)
    assert all(re.fullmatch(r"[A-Za-z0-9._=+-]{1,200}", entry.name) for entry in entries)
    assert entries_of(*definitions) == entries
    folder = "".join(study_yaml(definition) for definition in definitions)
    assert entries_of(*parse_studies(folder, "study.yaml")) == entries


@settings(deadline=None, max_examples=150)
@given(
    WORDS, st.text(CHARACTERS), st.lists(PROMPTS, unique=True, min_size=1), studies(),
    st.sampled_from(["all", "best 3", "none"]), st.integers(0, 9), st.booleans(),
    st.dictionaries(st.sampled_from(["corpus", "init_from"]), WORDS.filter(lambda t: t.lower() not in ("none", "null"))),
)  # fmt: skip
@example(
    "x", "\x85 \ufeff\u2028", ["---\nname: y", " \n a", "\x7f", "\U0001f600", "no", "1e3"], study(), "all", 0, True, {}
)
def test_study_yaml_is_read_back_as_the_same_study(name, description, prompts, made, keep, tokens, skip, fixed):
    fixed = {key: value for key, value in fixed.items() if key not in made.grid}
    more = {"prompts": tuple(prompts), "keep": keep, "sample_tokens": tokens, "skip_impossible": skip}
    full = replace(made, name=name, description=description, settings={**fixed, "beta1": 1e-5}, **more)
    back = parse_studies(study_yaml(full) + study_yaml(made), "elsewhere/study.yaml")
    assert back == [full, made]
    assert [[*s.grid] for s in back] == [[*full.grid], [*made.grid]], "the order of axes is part of a study"


def test_study_yaml_is_for_people():
    assert study_yaml(replace(study({"n_head": (2, 4)}, parts={"a": {"n_layer": (2,)}}), prompts=(None, "Где"))) == (
        "---\nname: small\ngrid:\n  n_head: [2, 4]\nparts:\n  a: {n_layer: 2}\nseeds: [1]\nprompts: [null, Где]\n"
        "sample_tokens: 300\nkeep: all\nskip_impossible: false\n"
    )
