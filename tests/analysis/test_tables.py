"""Tables that people, spreadsheets and other machines write: what is read, what is noted, what is refused."""

import gzip
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanostudy
from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.effects import effects
from nanostudy.analysis.results import read_results
from nanostudy.analysis.table_columns import Stated
from nanostudy.errors import UsageError
from nanostudy.reporting.write import publish
from nanostudy.text import counted

HEADER = "Experiment, Train Loss, Val Loss, Loss Gap, Total Params, Config Path"
ONE = "b128_L4_H4_E128_BS8_MI1000_D10_s1, 2.2018, 2.2313, 0.0295, 800000.0, there/one.py"
NAME, OTHER = "b64_L4_H4_E128_BS8_MI1000_D10_s1", "b64_L4_H4_E128_BS8_MI1000_D20_s2"


@pytest.fixture
def write(tmp_path):
    """Writes a table of these lines and returns its path."""

    def write(*lines, name="results.csv", end="\n", encoding="utf-8"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(end.join([*lines, ""]).encode(encoding))
        return path

    return write


def read_table(path, **stated):
    return read_results([path], Stated(**stated))


def only(results):
    (row,) = results.experiments.to_dict("records")
    return row


def notes(results):
    return " ".join(results.notes)


def refused(path):
    with pytest.raises(UsageError) as refusal:
        read_table(path)
    assert str(path) in str(refusal.value)
    return str(refusal.value)


# --- what is read


def test_the_published_row(write):
    results = read_table(write(HEADER, ONE, name="nanoGPT_results_shallow_large/results.csv"))
    row = only(results)
    assert list(results.experiments.index) == ["b128_L4_H4_E128_BS8_MI1000_D10_s1"]
    settings = {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8, "max_iters": 1000}
    assert {name: row[name] for name in settings} == settings
    assert (row["dropout"], row["seed"], row["part"]) == (0.1, 1, "shallow_large")
    assert (row["train_loss"], row["val_loss"], row["parameters"]) == (2.2018, 2.2313, 800_000)
    assert row["gap"] == pytest.approx(0.0295)
    assert (row["status"], row["source"], row["id"]) == ("finished", "nanoGPT_results_shallow_large", 1)
    assert row["learning_rate"] is None  # the table does not say
    assert math.isnan(row["seconds"])
    assert results.title == "nanoGPT_results_shallow_large"


@pytest.mark.parametrize(
    ("change", "end", "encoding"),
    [
        (lambda line: line, "\r\n", "utf-8-sig"),
        (lambda line: line, "\r", "utf-8"),
        (lambda line: line.replace("Experiment,", '"Experiment",'), "\n", "utf-8-sig"),
        (lambda line: line.replace(", ", ","), "\n", "utf-16"),
        (lambda line: line.replace("Experiment, Train Loss, Val Loss", "EXPERIMENT,train_loss, val loss"), "\n", "utf-8"),
        (lambda line: line.replace("800000.0", '"800,000"'), "\n", "utf-8"),
        (lambda line: line.replace("800000.0", "800 000"), "\n", "utf-8"),
        (lambda line: line.replace("800000.0", "8e5"), "\n", "utf-8"),
        (lambda line: line.replace(", ", ";"), "\r\n", "utf-8"),
        (lambda line: line.replace(", ", "; ").replace("2.", "2,").replace("0.0", "0,0"), "\n", "utf-8"),
        (lambda line: line.replace(", ", ";").replace("2.", "2,").replace("800000.0", "800.000,0").replace("0.0295", "0,0295"), "\n", "utf-8"),
        (lambda line: line.replace(", ", "\t"), "\n", "utf-8"),
        (lambda line: line + ",,", "\n", "utf-8"),
        (lambda line: f"{line}\n\n   \n", "\n", "utf-8"),
    ],
)  # fmt: skip
def test_the_same_table_written_otherwise(write, change, end, encoding):
    row = only(read_table(write(change(HEADER), change(ONE), end=end, encoding=encoding)))
    assert (row["train_loss"], row["val_loss"], row["parameters"]) == (2.2018, 2.2313, 800_000)
    assert row["gap"] == pytest.approx(0.0295)


def test_empty_cells_at_the_end_of_a_line(write):
    assert only(read_table(write("Experiment,Val Loss", f"{NAME},2.5,,")))["val_loss"] == 2.5


def test_a_line_for_spreadsheets_that_names_the_separator(write):
    assert only(read_table(write("sep=;", "Experiment;Val Loss", f"{NAME};2,5")))["val_loss"] == 2.5


def test_names_with_more_settings(write):
    name = f"{NAME}_bias=true_learning_rate=0.004_lr_decay_iters=none_corpus=my_text.v2"
    row = only(read_table(write("Experiment,Val Loss", f"{name},2.5")))
    assert (row["learning_rate"], row["bias"], row["lr_decay_iters"]) == (0.004, True, "none")
    assert (row["corpus"], row["seed"]) == ("my_text.v2", 1)


def test_names_as_files_have_them_and_names_with_a_hash(write):
    assert only(read_table(write("name,Val Loss", f"{NAME}_learning_rate-0.004,2")))["learning_rate"] == 0.004
    assert only(read_table(write("name,Val Loss", f"{NAME}_beta2=0.95_0123abcd,2")))["beta2"] == 0.95
    row = only(read_table(write("name,Val Loss", f"{NAME.replace('D10', 'D12.5')},2")))
    assert row["dropout"] == 0.125


def test_of_a_name_that_was_cut_the_last_setting_is_not_known(write):
    name = f"{NAME}_learning_rate=0.004_corpus={'x' * 200}"[:191] + "_0123abcd"
    results = read_table(write("name,Val Loss", f"{name},2"))
    assert only(results)["learning_rate"] == 0.004
    assert only(results)["corpus"] is None
    assert "cut short" in notes(results)


def test_this_projects_own_table(write):
    results = read_table(
        write(
            "id,name,part,status,n_head,seed,lr_decay_iters,step,train_loss,val_loss,loss_gap,best_step,best_val_loss,parameters,tokens,seconds,reason",
            f"3,{NAME},narrow,finished,4,1,,1000,2.36510174,2.37591249,0.01081075,800,2.3,804096,512000,139.5,",
            f"4,{OTHER},narrow,diverged,4,2,500,700,,,,400,2.9,804096,358400,90.5,loss became NaN",
            f"5,{OTHER.replace('s2', 's3')},narrow,running,4,3,500,200,3.1,3.2,0.1,200,3.2,804096,102400,30,",
        )
    )
    first, second, third = results.experiments.to_dict("records")
    assert [first["id"], second["id"], third["id"]] == [3, 4, 5]
    assert (first["source"], first["part"], first["updates"], first["tokens"]) == ("nanostudy", "narrow", 1000, 512_000)
    assert (first["best_step"], first["best_val_loss"], first["seconds"]) == (800, 2.3, 139.5)
    assert second["lr_decay_iters"] == 500
    assert (second["status"], second["reason"]) == ("diverged", "loss became NaN")
    assert third["status"] == "running"
    assert list(results.finished.index) == [NAME]
    assert "2 experiments of 3 without a result" in notes(results)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("nan", "diverged"),
        ("NaN", "diverged"),
        ("inf", "diverged"),
        ("1e999", "diverged"),
        ("", "waiting"),
        ("N/A", "waiting"),
    ],
)
def test_without_a_loss_there_is_no_result(write, text, status):
    results = read_table(write(HEADER, f"{NAME}, {text}, {text}, {text}, 800000.0, x", ONE))
    assert results.experiments.loc[NAME, "status"] == status
    assert math.isnan(results.experiments.loc[NAME, "val_loss"])
    assert len(results.finished) == 1
    assert f"1 experiment of 2 without a result (diverged, or not finished): {NAME}" in notes(results)


# --- what is noted


def test_missing_columns_are_named(write):
    results = read_table(write("Experiment,Val Loss", f"{NAME},2.5"))
    assert "no Train Loss and no Total Params" in notes(results)
    assert math.isnan(only(results)["train_loss"])
    assert math.isnan(only(results)["gap"])


def test_a_gap_alone_is_taken_as_it_is(write):
    assert only(read_table(write("Experiment,Val Loss,Loss Gap", f"{NAME},2.5,0.2")))["gap"] == 0.2


def test_more_columns_are_no_matter(write):
    lines = [f"{NAME.replace('s1', f's{seed}')},2.5,<script>alert({seed})</script>" for seed in range(1, 4)]
    results = read_table(write("Experiment,Val Loss,Mood", *lines))
    assert list(results.experiments["val_loss"]) == [2.5] * 3
    assert "not read: 'Mood' (another value in most rows)" in notes(results)
    assert "alert" not in f"{notes(results)} {results.experiments.to_csv()}"


def test_an_empty_table_is_a_table(write):
    results = read_table(write(HEADER))
    assert len(results.experiments) == 0
    assert "no experiments" in notes(results)


def test_a_gap_within_rounding_and_one_beyond(write):
    # 2.23 - 2.20 may be anything from 0.02 to 0.04
    assert "contradicts" not in notes(read_table(write(HEADER, f"{NAME}, 2.20, 2.23, 0.0395, 8e5, x")))
    results = read_table(write(HEADER, f"{NAME}, 2.20, 2.23, 0.0405, 8e5, x"))
    assert "line 2: Loss Gap 0.0405 contradicts its own losses, 2.23 - 2.20 = 0.0300" in notes(results)
    assert only(results)["gap"] == pytest.approx(0.03)


# --- several tables


def test_what_two_tables_agree_on_counts_once_with_all_digits(write):
    one = write("Experiment,Val Loss,Total Params", f"{NAME},2.3759,800000.0", name="a.csv")
    other = write("Experiment,Val Loss,Train Loss", f"{NAME},2.37591249,2.1", f"{OTHER},2.4,2.3", name="b.csv")
    for paths in ([one, other], [other, one]):
        results = read_results(paths)
        assert sorted(results.experiments.index) == [NAME, OTHER]
        assert results.experiments.loc[NAME, "val_loss"] == 2.37591249
        assert results.experiments.loc[NAME, "parameters"] == 800_000
        assert "rows that repeat another one: 1." in notes(results)


def test_tables_that_contradict_each_other_are_two_sources(write):
    one = write("Experiment,Val Loss", f"{NAME},2.3759", name="a.csv")
    other = write("Experiment,Val Loss", f"{NAME},2.3760", f"{OTHER},2.4", name="b.csv")
    results = read_results([one, other])
    assert "a and b.csv contradict each other on 1 experiment, such as" in notes(results)
    assert dict(results.experiments["val_loss"]) == {NAME: 2.3759}
    assert [dict(other.experiments["val_loss"]) for other in results.others] == [{NAME: 2.376, OTHER: 2.4}]


def test_a_result_and_its_absence_do_not_contradict(write):
    one = write("Experiment,Val Loss", f"{NAME},", name="a.csv")
    other = write("Experiment,Val Loss", f"{NAME},2.5", name="b.csv")
    assert only(read_results([one, other]))["val_loss"] == 2.5
    diverged = write("Experiment,Val Loss", f"{NAME},nan", name="c.csv")
    two = read_results([diverged, other])
    assert [only(one)["status"] for one in (two, *two.others)] == ["diverged", "finished"]


def test_ids_that_two_tables_share_are_given_anew(write):
    one = write("id,name,val_loss", f"1,{NAME},2.4", name="a.csv")
    other = write("id,name,val_loss", f"1,{OTHER},2.5", name="b.csv")
    results = read_results([one, other])
    assert list(results.experiments["id"]) == [1, 2]
    assert "ids are not unique" in notes(results)


# --- what is refused


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["Experiment,Val Accuracy", f"{NAME},2"], "no column that is a loss"),
        (["Experiment;Val Loss;Train Loss", f"{NAME};2;2", f"{OTHER},3,3"], "line 3: its cells are separated by ','"),
        (["Experiment,Val Loss", f"{NAME}_beta1=often,3"], "line 2: beta1='often' must be a number"),
        (["Experiment,Val Loss", f"{NAME},low"], "line 2: 'low' is no number"),
        (["Experiment,Val Loss", f"{NAME},2 231"], "line 2: '2 231' is no number"),
        (["Experiment,Val Loss", f"{NAME},٣"], "line 2: '٣' is no number"),
        (["Experiment,Total Params,Val Loss", f"{NAME},800,000,2"], "line 2: it has 4 cells under 3 column names"),
        (["Experiment,Val Loss,val_loss", f"{NAME},2,3"], "both hold val_loss"),
        (["name,n_embd,val_loss", f"{NAME},256,2"], "line 2: its name says n_embd=128, the column n_embd 256"),
        (["Experiment;Val Loss", f"{NAME};2,5", f"{OTHER};2.5"], "line 3: '2.5' is no number"),
        (["Experiment,Val Loss", f'"{NAME},2'], "line 2 is no line of a table"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_line(write, lines, words):
    assert words in refused(write(*lines))


HEADINGS = st.sampled_from(["Experiment", "Val Loss", "Train Loss", "Loss Gap", "Total Params", "id", "n_embd", "x"])
CELLS = st.sampled_from(
    [NAME, OTHER, "2.5", "2,5", '"2,5"', "", "nan", "-", "1e999", "1e-999999999", "9" * 400, '"', "\0", "\n"]
) | st.text(max_size=3)


@given(
    st.lists(HEADINGS, max_size=5),
    st.lists(st.lists(CELLS, max_size=6), max_size=4),
    st.sampled_from(",;\t"),
    st.binary(max_size=3),
)
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory, header, rows, separator, raw):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    lines = "\n".join(separator.join(row) for row in [header, *rows])
    path.write_bytes(lines.encode("utf-8", "replace") + raw)
    message, names = "any.csv", set()
    try:
        names = set(read_table(path).experiments.index)
    except UsageError as refusal:
        message = str(refusal)
    assert "any.csv" in message
    assert all(name.isprintable() for name in names)


def test_files_that_are_no_text(write, tmp_path):
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"PK\x03\x04\x00\x00\xff\xfe\x80")
    assert "binary.csv, line 1" in refused(binary)
    binary.write_bytes(b"Experiment\nabc\0")
    assert "line 2 holds a zero byte" in refused(binary)
    for nothing in (b"", b",,\n", b'""\n'):
        binary.write_bytes(nothing)
        assert "is empty" in refused(binary)
    assert "cannot be read" in refused(tmp_path / "nowhere.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder.csv")


def test_tables_beside_a_run_are_read_together(write):
    one = write("Experiment,Val Loss", f"{NAME},2.3759", name="a.csv")
    other = write("Experiment,Val Loss", f"{NAME},2.4000", name="B.CSV")
    results = read_results([one, other])
    assert [only(one)["val_loss"] for one in (results, *results.others)] == [2.3759, 2.4]


# --- other people's tables


def grid_lines(seed=0):
    """The lines of a table of 2^7 experiments as a class published them: settings as columns, names of their own."""
    random = np.random.default_rng(seed)
    axes = {"block_size": (64, 128), "n_layer": (4, 6), "n_head": (4, 8), "n_embd": (128, 256)}
    axes |= {"batch_size": (8, 16), "max_iters": (25, 50), "dropout": (0.1, 0.2)}
    lines = [f"member,exp_name,exp_num,{','.join(axes)},num_parameters,final_train_loss,final_val_loss,duration"]
    for i, cell in enumerate(itertools.product(*axes.values()), start=1):
        loss = 3.0 - 0.002 * cell[3] + 0.1 * cell[6] + 0.01 * random.standard_normal()
        values = ",".join(map(str, cell))
        lines.append(
            f"person{1 + (i - 1) // 32},try {i},{i},{values},{0.8 if cell[3] == 128 else 3.16},{loss - 0.1:.4f},{loss:.4f},7.5"
        )
    return lines


def test_a_grid_with_settings_as_columns_has_the_effects_of_its_means(write):
    path = write(*grid_lines(), name="grid.csv")
    results = read_table(path)
    assert len(results.finished) == 128
    assert set(results.factors) == {"block_size", "n_layer", "n_head", "n_embd", "batch_size", "max_iters", "dropout"}
    assert results.experiments["part"].nunique() == 4
    assert set(results.experiments["parameters"]) == {800_000, 3_160_000}
    assert "settings: block_size, n_layer, n_head, n_embd, batch_size, max_iters and dropout" in notes(results)
    check_effects(path, "final_val_loss", results)


def check_effects(path, loss, results):
    """Each main effect is the difference of two means that pandas computes."""
    raw, table = pd.read_csv(path), effects(results).table
    for row in table[table["order"] == 1].itertuples():
        means = raw.groupby(row.term)[loss].mean()
        assert row.effect == pytest.approx(means[row.level] - means[row.reference], abs=1e-4)


@pytest.mark.skipif("NANOSTUDY_TABLES" not in os.environ, reason="NANOSTUDY_TABLES names no folder of real tables")
def test_the_real_tables():
    folder = Path(os.environ["NANOSTUDY_TABLES"])
    results = read_table(folder / "grid_char_group.csv")
    assert len(results.finished) == 128
    check_effects(folder / "grid_char_group.csv", "final_val_loss", results)
    runs = read_table(folder / "wandb_ablations.csv")
    assert len(runs.finished) == 64
    assert runs.experiments["val_loss"].idxmin() == "G1_ternary_weights seed 3740"
    assert {"norm_type", "pos_encoding", "residual_type"} < set(runs.factors)


WANDB = (
    '"Name","State","Notes","Created","Runtime","norm_type","n_embd","run_name","seed","learning_rate","iter","lr","train/loss","val/loss"',
    '"base","finished","-","2026-01-01T10:00:00.000Z","732","layernorm","384","base","1","0.001","5000","0.0001","1.03","1.4786"',
    '"base","finished","-","2026-01-01T10:20:00.000Z","731","layernorm","384","base","2","0.001","5000","0.0001","1.04","1.4811"',
    '"rms","finished","-","2026-01-01T10:40:00.000Z","698","rmsnorm","384","rms","1","0.001","5000","0.0001","1.02","1.4702"',
    '"rms","finished","-","2026-01-01T11:00:00.000Z","697","rmsnorm","384","rms","2","0.001","5000","0.0001","1.02","1.4733"',
    '"rms","crashed","-","2026-01-01T11:20:00.000Z","97","rmsnorm","384","rms","3","0.001","500","0.001","2.02","2.1"',
)


def test_runs_of_one_name_and_several_seeds(write):
    results = read_table(write(*WANDB, name="wandb.csv"))
    assert list(results.finished.index) == ["base seed 1", "base seed 2", "rms seed 1", "rms seed 2"]
    assert results.factors == ("norm_type",)
    crashed = results.experiments.loc["rms seed 3"]
    assert (crashed["status"], crashed["reason"]) == ("failed", "the table says crashed")
    assert "'lr' (learning_rate holds learning_rate)" in notes(results)
    (row,) = effects(results).table.itertuples()
    assert (row.level, row.reference) == ("rmsnorm", "layernorm")
    assert row.effect == pytest.approx((1.4702 + 1.4733 - 1.4786 - 1.4811) / 2)
    assert row.low < row.effect < row.high


def test_what_weights_and_biases_counts_is_no_number_of_updates(write):
    results = read_table(write("Name,_step,_runtime,max_iters,val_loss", "one,20,60.5,5000,2.1", "two,20,61,5000,2.2"))
    assert list(results.experiments["status"]) == ["finished"] * 2
    assert results.experiments["updates"].isna().all()
    assert list(results.experiments["seconds"]) == [60.5, 61]


def test_a_second_try_counts_in_place_of_the_first(write):
    again = WANDB[-1].replace("crashed", "finished").replace('"500"', '"5000"').replace('"2.1"', '"1.4712"')
    for lines in ([*WANDB, again], [*WANDB[:-1], again, WANDB[-1]]):
        row = read_table(write(*lines, name="wandb.csv")).experiments.loc["rms seed 3"]
        assert (row["status"], row["reason"], row["val_loss"], row["updates"]) == ("finished", None, 1.4712, 5000)


def test_a_search_of_optuna(write):
    lines = ["number,value,datetime_start,duration,params_lr,params_hidden,user_attrs_r2,state"]
    lines += [
        f"{i},{0.5 + i / 100},2026-01-01 10:00:0{i},0 days 00:01:2{i}.5,0.00{i + 1},{8 * i},0.{i},COMPLETE"
        for i in range(8)
    ]
    results = read_table(
        write(*lines, "8,0.1,2026-01-01 10:00:09,0 days 00:00:01.0,0.5,7,0.3,PRUNED", name="trials.csv")
    )
    assert results.factors == ("learning_rate", "hidden")
    assert len(results.finished) == 8
    row = results.experiments.loc["experiment 3"]
    assert (row["val_loss"], row["seconds"], row["learning_rate"], row["hidden"]) == (0.53, 83.5, 0.004, 24)
    assert results.experiments.loc["experiment 8", "reason"] == "the table says PRUNED"


def test_a_search_of_ray_tune(write):
    lines = ["loss,time_total_s,training_iteration,trial_id,date,pid,config/lr,config/model/depth,logdir"]
    lines += [f"{2 - i / 10},{i}.5,10,a{i}_0000,2026-01-01,{i},0.{i + 1},{2 + i % 2},/tmp/{i}" for i in range(6)]
    results = read_table(write(*lines, name="tune.csv"))
    assert results.factors == ("learning_rate", "model_depth")
    assert list(results.experiments.index) == [f"a{i}_0000" for i in range(6)]
    assert list(results.experiments["seconds"]) == [i + 0.5 for i in range(6)]


@pytest.mark.parametrize("name", ["runs.json", "runs.jsonl", "runs.tsv", "runs.csv.gz"])
def test_other_kinds_of_file(tmp_path, name):
    rows = [
        {"name": f"try {i}", "config": {"lr": 0.1 * (i + 1), "act": "relu"}, "val_loss": 2 - i / 10, "ok": None}
        for i in range(4)
    ]
    flat = "\n".join(
        ["name\tconfig/lr\tval_loss", *(f"{r['name']}\t{r['config']['lr']}\t{r['val_loss']}" for r in rows)]
    )
    texts = {"runs.json": json.dumps({"about": "x", "runs": rows}), "runs.jsonl": "\n".join(map(json.dumps, rows))}
    text = texts.get(name, flat).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    results = read_table(tmp_path / name)
    assert list(results.experiments.index) == [f"try {i}" for i in range(4)]
    assert list(results.experiments["val_loss"]) == [2 - i / 10 for i in range(4)]
    assert results.factors == ("learning_rate",)


LOG = """Overriding config with config/train_shakespeare_char.py:
# train a small model
n_layer = 2 # few
dropout = {dropout}
max_iters = 500
Overriding: seed = 7
number of parameters: 0.80M
step 0: train loss 4.1676, val loss 4.1649
iter 0: loss 4.1712, time 30.12ms, mfu -100.00%
step 250: train loss 2.4012, val loss 2.4120
iter 250: loss 2.4, time 30.12ms, mfu 1.00%
step 500: train loss 2.1012, val loss {loss}
"""


def test_logs_of_nanogpts_training(write):
    paths = [
        write(*LOG.format(dropout=d, loss=2 + d).splitlines(), name=f"drop{i}/train.log")
        for i, d in enumerate((0.0, 0.2))
    ]
    results = read_results(paths)
    assert results.factors == ("dropout",)
    one = results.experiments.loc["drop1"]
    assert (one["val_loss"], one["train_loss"], one["parameters"], one["seed"], one["n_layer"]) == (
        2.2,
        2.1012,
        800_000,
        7,
        2,
    )
    curve = results.evaluations[results.evaluations["name"] == "drop1"]
    assert list(curve["step"]) == [0, 250, 500]
    assert list(curve["val_loss"]) == [4.1649, 2.412, 2.2]
    half = LOG.format(dropout=0.1, loss=2).replace("max_iters = 500", "max_iters = 900")
    unfinished = read_table(write(*half.splitlines(), name="half.log"))
    assert (only(unfinished)["status"], only(unfinished)["reason"]) == ("failed", "it stopped after 500 of 900 updates")
    last = read_table(write(*half.replace("= 900", "= 740").splitlines(), name="last.log"))
    assert only(last)["status"] == "finished"  # it ended between two evaluations


def test_trainings_of_logs_have_the_seed_of_train_py(write):
    """So trainings whose settings differ are no independent evidence of noise, and there are no intervals."""
    log = LOG.replace("Overriding: seed = 7\n", "")
    assert log != LOG
    paths = [
        write(
            *log.format(dropout=d, loss=2 + d + n / 1000).replace("n_layer = 2", f"n_layer = {n}").splitlines(),
            name=f"{n}_{d}.log",
        )
        for d in (0.0, 0.2)
        for n in (2, 4)
    ]
    results = read_results(paths)
    assert set(results.experiments["seed"]) == {1337}
    assert any("no log names a seed, so all trainings have that of train.py, 1337" in note for note in results.notes)
    found = effects(results)
    assert "All experiments have seed 1337" in found.explanation
    assert found.table["low"].isna().all()
    other = write(*log.format(dropout=0.0, loss=2.1).splitlines(), name="again.log")  # equal settings, another loss
    assert read_results([*paths, other]).experiments["seed"].isna().all()
    same = write(*log.format(dropout=0.0, loss=2.002).splitlines(), name="same.log")
    assert set(read_results([*paths, same]).experiments["seed"]) == {1337}


def test_a_log_of_several_trainings_has_a_row_for_each(write):
    """As a notebook prints them, its beginning cut off: the settings of each stand before its first evaluation."""
    cut_off = [
        "step 500: train loss 2.42, val loss 2.43",
        "saving checkpoint to out/first",
        "step 750: train loss 2.3, val loss 2.35",
    ]
    trainings = [
        line
        for i, d in enumerate((0.0, 0.2, 0.2))
        for line in (*LOG.format(dropout=d, loss=2 + d).splitlines(), f"saving checkpoint to out/drop{i}")
    ]
    results = read_table(write(*cut_off, *trainings, name="notebook.txt"))
    assert list(results.experiments.index) == ["first", "drop0", "drop1", "drop2"]
    assert list(results.experiments["val_loss"]) == [2.35, 2.0, 2.2, 2.2]
    assert list(results.experiments["dropout"].iloc[1:]) == [0.0, 0.2, 0.2]
    assert list(results.evaluations["name"]) == ["first"] * 2 + ["drop0"] * 3 + ["drop1"] * 3 + ["drop2"] * 3
    unnamed = read_table(write(*(line for line in trainings if "saving" not in line), name="all.log"))
    assert list(unnamed.experiments.index) == ["all 1", "all 2", "all 3"]
    again = [
        "Overriding: init_from = resume",
        "step 250: train loss 2.4, val loss 2.41",
        "step 500: train loss 2, val loss 2.05",
    ]
    resumed = read_table(write(*LOG.format(dropout=0.1, loss=2).splitlines(), *again, name="resumed.log"))
    assert (only(resumed)["val_loss"], only(resumed)["dropout"]) == (2.05, 0.1)
    assert list(resumed.evaluations["step"]) == [0, 250, 500]


def test_the_evaluations_of_one_training_are_a_curve(write):
    lines = ["iter,train_loss,val_loss,lr,elapsed_s", "0,4.2,4.3,0.1,1", "250,2.5,2.6,0.05,9", "500,2.1,2.3,0.01,18"]
    results = read_table(write(*lines, name="mine/loss_log.csv"))
    assert list(results.experiments.index) == ["mine"]
    assert only(results)["val_loss"] == 2.3
    assert list(results.evaluations["val_loss"]) == [4.3, 2.6, 2.3]


# of each table: its rows, and by name the losses and the number of points of the curves that are read from it
EVALUATED = {
    "by any word for a name": ("run,step,val_loss", "x,0,4 x,9,3 y,0,4 y,9,1", {"x": 3, "y": 1}, 4),
    "W&B's Name": ("Name,_step,val/loss", "x,0,4 x,9,3 y,0,4 y,9,1", {"x": 3, "y": 1}, 4),
    "two seeds of a name": (
        "name,seed,step,val_loss",
        "x,1,0,4 x,1,9,3 x,2,0,4 x,2,9,2",
        {"x seed 1": 3, "x seed 2": 2},
        4,
    ),
    "two settings of a name": (
        "name,dropout,step,val_loss",
        "x,0,0,4 x,0,9,3 x,0.1,0,4 x,0.1,9,2",
        {"x": 3, "x (2)": 2},
        4,
    ),
    "a factor of a name": (
        "name,optimizer,step,val_loss",
        "x,sgd,0,4 x,sgd,9,3 x,adam,0,4 x,adam,9,2",
        {"x": 3, "x (2)": 2},
        4,
    ),
    "settings without names, by step": (
        "dropout,step,val_loss",
        "0,0,4 0.1,0,4 0,9,3 0.1,9,2",
        {"t": 3, "t (2)": 2},
        4,
    ),
    "a schedule": ("name,step,lr,val_loss", "x,0,1e-3,4 x,9,5e-4,3 y,0,1e-3,4 y,9,5e-4,2", {"x": 3, "y": 2}, 4),
    "steps in no order": ("name,step,val_loss", "x,9,3 x,0,4 y,9,2 y,0,4", {"x": 3, "y": 2}, 4),
    "one evaluation of some": ("name,step,val_loss", "x,0,4 x,5,3.5 x,9,3 y,9,2", {"x": 3, "y": 2}, 4),
    "the training loss alone in between": (
        "name,step,train_loss,val_loss",
        "x,0,4,4.1 x,5,3,3.2 x,9,2,",
        {"x": 3.2},
        3,
    ),
    "perplexities": ("name,step,val_ppl", "x,0,50 x,9,20 y,0,50 y,9,30", {"x": math.log(20), "y": math.log(30)}, 4),
    "a run that was begun twice": ("name,step,val_loss", "x,0,4 x,9,3 x,0,4.1 x,9,2", None, 0),
    "a sweep over updates": ("n_embd,iter,val_loss", "64,1000,3 64,2000,2.5 128,1000,2.8 128,2000,2.2", None, 0),
    "a sweep over rates and updates": (
        "learning_rate,iter,val_loss",
        "1e-4,1000,3 3e-4,2000,2.5 1e-3,3000,2.2",
        None,
        0,
    ),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_which_evaluations_are_curves(write, case):
    header, rows, losses, points = EVALUATED[case]
    results = read_table(write(header, *rows.split(), name="t.csv"))
    assert len(results.evaluations) == points
    if losses is None:
        assert len(results.experiments) == len(rows.split())
        assert "curves" not in notes(results)
    else:
        assert dict(results.experiments["val_loss"]) == pytest.approx(losses)
        assert (
            f"t.csv: {len(rows.split())} evaluations of {counted(len(losses), 'training')}, read as curves."
            in notes(results)
        )


def test_what_is_stated_holds_for_curves_too(write):
    lines = ["model,step,my_loss,val_loss", "x,0,4,9", "y,0,4,9", "x,9,3,9", "y,9,2,9"]
    results = read_table(write(*lines, name="t.csv"), name="model", loss="my_loss")
    assert dict(results.experiments["val_loss"]) == {"x": 3, "y": 2}
    assert list(results.evaluations["val_loss"]) == [4, 3, 4, 2]
    commas = read_table(write("name;step;val_loss", "x;0;4,5", "x;9;3,5", "y;0;4,5", "y;9;2,5", name="commas.csv"))
    assert dict(commas.experiments["val_loss"]) == {"x": 3.5, "y": 2.5}
    assert list(commas.evaluations["val_loss"]) == [4.5, 3.5, 4.5, 2.5]


def test_a_curve_that_ends_early_or_holds_nothing_is_noted(write):
    results = read_table(
        write("name,step,val_loss", "x,0,4", "x,9,3", "y,0,4", "y,5,3.5", "z,0,", "z,9,", name="t.csv")
    )
    assert list(results.experiments.index) == ["x", "y"]
    assert "t.csv: 1 training without any loss left out." in notes(results)
    assert "t.csv: 1 training of 2 with fewer updates than 9." in notes(results)


def test_curves_join_the_experiments_that_they_are_of(write):
    curves = write("name,step,val_loss", "x,0,4", "x,9,3", "y,0,4", "y,9,2", name="curves.csv")
    table = write("name,dropout,val_loss", "x,0.1,3", "y,0.2,2", name="table.csv")
    results = read_results([curves, table])
    assert results.others == ()
    assert results.factors == ("dropout",)
    assert len(results.evaluations) == 4
    other = write("name,dropout,val_loss", "x,0.1,5.00", "y,0.2,6.00", name="other.csv")
    apart = read_results([curves, other])
    assert (apart.title, [one.title for one in apart.others]) == (
        "other",
        ["curves"],
    )  # the answer is of what has settings
    assert "contradict each other" in notes(apart)


def test_what_is_no_table_in_a_folder_is_left_out_by_name(write):
    table = write("name,dropout,val_loss", "x,0.1,3", "y,0.2,2", name="mine/table.csv")
    write("name,step,val_loss", name="mine/empty.csv")
    write("bought milk", "and bread", name="mine/notes.txt")
    write("name,age", "anna,3", name="mine/people.csv")
    write("not,a,table", name="mine/._table.csv")
    results = read_results([table.parent])
    assert (results.title, list(results.experiments.index)) == ("table", ["x", "y"])
    assert len([note for note in results.notes if note.startswith("Left out, for it is no table of results")]) == 2
    with pytest.raises(UsageError, match="people"):
        read_results([table.parent / "people.csv"])
    table.unlink()
    (table.parent / "empty.csv").unlink()
    with pytest.raises(UsageError, match=r"people\.csv"):
        read_results([table.parent])


def test_a_folder_of_tables_is_its_tables(write):
    names = [f"b64_L4_H4_E128_BS8_MI{iters}_D10_s{seed}" for iters in (1000, 2000) for seed in (1, 2)]
    parts = [
        write(
            "Experiment,Val Loss,Total Params",
            *(f"{name},{2 + i / 10:.4f},800000.0" for i, name in enumerate(own)),
            name=f"theirs/{part}.csv",
        )
        for part, own in (("one", names[:2]), ("two", names[2:]), ("three", names[:1]))
    ]
    steps = [
        f"{name},{step},{2 + i % 2 / 10 + (500 - step) / 1000}" for i, name in enumerate(names) for step in (0, 500)
    ]
    write("name,step,val_loss", *steps, name="theirs/curves.csv")
    (parts[0].parent / "README.md").write_text("not a table")
    results = read_results([parts[0].parent])
    assert results.title == "theirs"
    assert list(results.experiments.index) == names
    assert len(results.evaluations) == 8
    said = notes(results)
    assert "curves.csv: rows that repeat" not in said
    assert "three.csv: rows that repeat another one: 1." in said
    assert "one.csv, three.csv and two.csv: parameters are as the table says" in said


def test_another_programs_tokenizer_is_kept(write):
    cells = [(e, d, n) for e in (128, 256) for d in (0.0, 0.2) for n in (1, 2)]
    paths = [
        write(
            f"run,{width},dropout,tokenizer,val_loss",
            *(f"{i},{e},{d},{token},{base - e / 1000 + d / 10 + n / 100}" for i, (e, d, n) in enumerate(cells)),
            name=f"{token}s.csv",
        )
        for token, base, width in (("char", 2.0, "n_embd"), ("gpt2", 5.0, "d_model"))
    ]
    analysis = Analysis(read_results(paths))
    assert analysis.sources.settings.values.tolist() == [["tokenizer", "char", "gpt2"]]
    imported = nanostudy.import_study(paths[1], out=paths[1].parent / "theirs")
    assert imported.study is None
    assert "tokenizer" in imported.why
    assert set(read_results([imported.table]).experiments["tokenizer"]) == {"gpt2"}


def test_the_lines_of_a_chart_are_experiments_with_curves(write):
    lines = [
        '"Step","wide - val/loss","wide - val/loss__MIN","deep - val/loss"',
        '"0","4.2","4.2",""',
        '"250","2.5","2.5","2.4"',
    ]
    results = read_table(write(*lines, name="chart.csv"))
    assert dict(results.experiments["val_loss"]) == {"wide": 2.5, "deep": 2.4}
    assert list(results.evaluations[results.evaluations["name"] == "wide"]["val_loss"]) == [4.2, 2.5]


def test_whole_numbers_that_pandas_wrote_as_fractions_are_settings(write):
    lines = [f"{name},{iters},{2 - iters / 1e4}" for name, iters in zip("abcd", (100.0, 200.0) * 2, strict=True)]
    results = read_table(write("name,max_iters,val_loss", *lines, name="floats.csv"))
    assert results.factors == ("max_iters",)
    assert list(results.experiments["max_iters"]) == [100, 200, 100, 200]


def test_a_step_in_words_makes_no_curve(write):
    results = read_table(write("epoch,val_loss", "last,2.1", "best,2.0", name="words.csv"))
    assert list(results.experiments["val_loss"]) == [2.1, 2.0]
    assert results.evaluations.empty


def test_what_a_column_is_can_be_stated(write):
    lines = [
        "alpha,beta,quality,tag",
        *(f"{a},{b},{a + 2 * b},x{a}{b}" for a in (1, 2) for b in (1, 2) for _ in (1, 2)),
    ]
    path = write(*lines, name="odd.csv")
    assert "no column that is a loss" in refused(path)
    assert "--loss COLUMN" in refused(path)
    results = read_table(path, loss="quality", name="tag", factors=("alpha", "Beta"))
    assert results.factors == ("alpha", "beta") or results.factors == ("alpha", "beta_") or len(results.factors) == 2
    assert results.experiments.loc["x12", "val_loss"] == 5
    with pytest.raises(UsageError, match=r"no column 'gamma' \(--factors\)"):
        read_table(path, loss="quality", factors=("gamma",))


def test_bits_per_byte_are_told_in_nats(write):
    row = only(read_table(write("commit\tval_bpb\tstatus", "3087aeb\t2.0\tkeep", name="results.tsv")))
    assert row["val_loss"] == pytest.approx(2 * math.log(2))


def test_a_label_of_two_settings_takes_none_of_their_effects(write):
    cells = [(d, a, f"{d}-{a}") for d in (0.0, 0.2) for a in ("relu", "gelu")]
    lines = [f"{d},{a},{group},{2 + d}" for d, a, group in cells for _ in range(3)]
    results = read_table(write("dropout,activation,group_of_runs,val_loss", *lines, name="labels.csv"))
    assert results.factors == ("dropout", "activation")
    assert "a label: it says dropout and activation" in notes(results)


# --- hostile tables


HOSTILE = "<img src=x onerror=alert(1)>|[a](javascript:alert(1))"


def test_hostile_text_does_no_harm(write, tmp_path):
    lines = [
        f'"{HOSTILE}{i}","=cmd|calc",{"nan" if i == 3 else 2 + i / 10},"{kind}"'
        for i, kind in enumerate(["<b>", "=1+1"] * 4)
    ]
    path = write(f'"name","{HOSTILE}","val_loss","config/kind of <i>"', *lines, name="hostile.csv")
    written = publish(Analysis(read_table(path)), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page.replace(json.dumps("<img src=x"), "")
    assert "[a](javascript" not in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"^=|,=", (tmp_path / "report" / "results.csv").read_text(encoding="utf-8"), re.MULTILINE)
    assert "7 finished" in " ".join(written.document.notes) or written.document.answer


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("deep.json", "[" * 100_000, "is no JSON"),
        ("number.json", '{"val_loss": ' + "1" * 5000 + "}", "is no JSON"),
        ("list.json", "[1, 2]", "holds no experiment"),
        ("empty.jsonl", "", "is empty"),
        ("words.log", "nothing to see", "no line such as"),
        ("cut.csv.gz", gzip.compress(b"name,val_loss\na,2\n" * 99)[:30], "cannot be unpacked"),
        ("bomb.csv.gz", gzip.compress(b"\n" * (2**26 + 1)), "when it is unpacked"),
        ("wide.csv", ",".join(map(str, range(3000))), "3,000 columns"),
        ("book.csv", b"PK\x03\x04 a spreadsheet", "Save the table in it as CSV"),
    ],
    ids=range(9),  # packed bytes hold the time
)
def test_hostile_files_are_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(path)
