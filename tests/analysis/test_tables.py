"""Tables that people, spreadsheets and other machines write: what is read, what is noted, what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanostudy.analysis.results import read_results
from nanostudy.analysis.tables import read_tables
from nanostudy.errors import UsageError

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


def read_table(path):
    return read_tables([path])


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
    assert (row["status"], row["source"], row["id"]) == ("finished", "table", 1)
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
    assert "no column Train Loss and no Loss Gap and no Total Params" in notes(results)
    assert math.isnan(only(results)["train_loss"])
    assert math.isnan(only(results)["gap"])


def test_a_gap_alone_is_taken_as_it_is(write):
    assert only(read_table(write("Experiment,Val Loss,Loss Gap", f"{NAME},2.5,0.2")))["gap"] == 0.2


def test_more_columns_are_no_matter(write):
    results = read_table(write("Experiment,Val Loss,Mood", f"{NAME},2.5,<script>alert(1)</script>"))
    assert only(results)["val_loss"] == 2.5
    assert "not read: 'Mood'" in notes(results)
    assert "alert" not in f"{notes(results)} {results.experiments.to_csv()}"


def test_an_empty_table_is_a_table(write):
    results = read_table(write(HEADER))
    assert len(results.experiments) == 0
    assert "holds no experiments" in notes(results)


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
        results = read_tables(paths)
        assert sorted(results.experiments.index) == [NAME, OTHER]
        assert results.experiments.loc[NAME, "val_loss"] == 2.37591249
        assert results.experiments.loc[NAME, "parameters"] == 800_000
        assert "Rows that repeat another one: 1." in notes(results)


def test_what_they_contradict_each_other_on_does_not_count(write):
    one = write("Experiment,Val Loss", f"{NAME},2.3759", name="a.csv")
    other = write("Experiment,Val Loss", f"{NAME},2.3760", f"{OTHER},2.4", name="b.csv")
    results = read_tables([one, other])
    row = results.experiments.loc[NAME]
    assert row["status"] == "failed"
    assert math.isnan(row["val_loss"])
    assert row["n_embd"] == 128
    assert list(results.finished.index) == [OTHER]
    for note in (notes(results), row["reason"]):
        assert "2.3759 (a.csv, line 2)" in note
        assert "2.376 (b.csv, line 2)" in note


def test_a_result_and_its_absence_do_not_contradict(write):
    one = write("Experiment,Val Loss", f"{NAME},", name="a.csv")
    other = write("Experiment,Val Loss", f"{NAME},2.5", name="b.csv")
    assert only(read_tables([one, other]))["val_loss"] == 2.5
    diverged = write("Experiment,Val Loss", f"{NAME},nan", name="c.csv")
    assert only(read_tables([diverged, other]))["status"] == "failed"


def test_ids_that_two_tables_share_are_given_anew(write):
    one = write("id,name,val_loss", f"1,{NAME},2.4", name="a.csv")
    other = write("id,name,val_loss", f"1,{OTHER},2.5", name="b.csv")
    results = read_tables([one, other])
    assert list(results.experiments["id"]) == [1, 2]
    assert "ids are not unique" in notes(results)


# --- what is refused


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["Name of it,Val Loss", f"{NAME},2"], "no column Experiment"),
        (["Experiment,Val Loss", f"{NAME},2", "baseline,3"], "line 3: 'baseline' is not the name"),
        (["Experiment,Val Loss", "=HYPERLINK(1),3"], "line 2: '=HYPERLINK(1)' is not the name"),
        (["Experiment,Val Loss", f"{NAME}<b>,3"], "line 2"),
        (["Experiment,Val Loss", f"{NAME}_colour=red,3"], "line 2"),
        (["Experiment,Val Loss", "b64_L4_H3_E128_BS8_MI1000_D10_s1,3"], "line 2: n_embd=128 is not divisible"),
        (["Experiment,Val Loss", f"{NAME}_beta1=often,3"], "line 2: beta1='often' must be a number"),
        (["Experiment,Val Loss", f"{NAME},low"], "line 2: 'low' is no number"),
        (["Experiment,Val Loss", f"{NAME},2 231"], "line 2: '2 231' is no number"),
        (["Experiment,Val Loss", f"{NAME},٣"], "line 2: '٣' is no number"),
        (["Experiment,Total Params,Val Loss", f"{NAME},800,000,2"], "line 2: it has 4 cells under 3 column names"),
        (["Experiment,Val Loss,val_loss", f"{NAME},2,2"], "both hold val_loss"),
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
    assert names <= {NAME, OTHER}


def test_files_that_are_no_text(write, tmp_path):
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"PK\x03\x04\x00\x00\xff\xfe\x80")
    assert "binary.csv, line 1" in refused(binary)
    binary.write_bytes(b"Experiment\nabc\0")
    assert "line 2 holds a zero byte" in refused(binary)
    for nothing in (b"", b",,\n", b'""\n'):
        binary.write_bytes(nothing)
        assert "is empty" in refused(binary)
    assert "cannot be read" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "nowhere.csv")


def test_tables_beside_a_run_are_read_together(write):
    one = write("Experiment,Val Loss", f"{NAME},2.3759", name="a.csv")
    other = write("Experiment,Val Loss", f"{NAME},2.4000", name="B.CSV")
    results = read_results([one, other])
    assert list(results.experiments["status"]) == ["failed"]
