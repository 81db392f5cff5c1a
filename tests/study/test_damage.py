"""One damaged thing stays one: it is named, left out, and mended by the command that is named; and every kill is made up for."""

import json
import os
import shutil
import stat
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from conftest import write_text
from damage import COMMANDS, HARMS, RESOURCES, RUN_FILES, STUDY_FILES, Listener, losses, matrix

from nanostudy import api, atomic
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.study import grid
from nanostudy.study.check import check
from nanostudy.study.folder import rebuild
from nanostudy.study.listing import lost_lines, status_lines
from nanostudy.study.merge import merge
from nanostudy.study.store import FILE, Store
from nanostudy.training import run_folder

STUDY = """
settings: {{corpus: '{text}', n_layer: 1, n_head: 1, n_embd: 8, block_size: 16, batch_size: 2, max_iters: 4, warmup_iters: 1, eval_interval: 2, log_interval: 1}}
grid: {{dropout: [0.0, 0.1], learning_rate: [0.001, 0.002]}}
sample_tokens: 5
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study of four experiments. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    text = write_text(folder / "words.txt")
    (folder / "study.yaml").write_text(STUDY.format(text=text.as_posix()), encoding="utf-8")
    run(folder / "study.yaml", folder / "study")
    return folder / "study"


@pytest.fixture
def study(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "study"))


def run(source: Path, out: Path) -> list[str]:
    listener = Listener()
    api.run_study(source, out, executor="inline", resources=RESOURCES, listener=listener)
    return listener.lines


def names(study: Path) -> list[str]:
    return sorted(path.parent.name for path in study.glob("*/run.json"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 4
    path.write_bytes(content)


def last_digit(path: Path) -> None:
    """Another loss in the last row: the kind of error that only a comparison finds."""
    rows = path.read_text().splitlines()
    cells = rows[-1].split(",")
    cells[4] = cells[4][:2] + str((int(cells[4][2]) + 1) % 10) + cells[4][3:]
    path.write_text("\n".join([*rows[:-1], ",".join(cells)]) + "\n")


# --- wrong results do not come in

WRONG = {
    "evaluations cut": ("evaluations.csv", cut),
    "evaluations gone": ("evaluations.csv", os.unlink),
    "another loss": ("evaluations.csv", last_digit),
    "weights cut": ("last.safetensors", cut),
    "weights flipped": ("best.safetensors", flip),
    "run.json flipped": ("run.json", flip),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("checksums", [True, False])
def test_a_result_that_its_files_contradict_is_named_left_out_and_trained_again(case, checksums, study, tmp_path):
    """Without checksums, as older versions left folders: what they have tells as much, but for a bit in run.json."""
    file, harm = WRONG[case]
    if not checksums:
        for name in names(study):
            content = json.loads((study / name / "run.json").read_text())
            content = {key: value for key, value in content.items() if key not in ("sha256", "checksums")}
            (study / name / "run.json").write_text(json.dumps(content))
        if file == "run.json":
            pytest.skip("without a checksum of its own, run.json is what it says")
    before, bad = losses(study), names(study)[0]
    harm(study / bad / file)
    lines = merge([study], tmp_path / "all")
    assert [line for line in lines if line.startswith("not taken: ") and bad in line and file in line]
    assert lines[-1].endswith("3 of 4 experiments, 1 experiment still waiting")
    assert names(tmp_path / "all") == [name for name in names(study) if name != bad]
    run(tmp_path / "all", tmp_path / "all")
    assert losses(tmp_path / "all") == before

    (study / FILE).unlink()
    experiments, results, notes = rebuild(study)
    assert (experiments, results) == (4, 3)
    assert any(bad in note and file in note for note in notes)
    run(study, study)
    assert losses(study) == before


def test_checksums_are_recorded_and_check_passes(study):
    for name in names(study):
        metadata = run_folder.read_metadata(study / name)
        assert set(metadata["checksums"]) >= {"evaluations.csv", "training.csv", "best.safetensors", "last.safetensors"}
        assert run_folder.faults(study / name, metadata) == {}
    checked = check(study)
    assert (checked.experiments, checked.results, checked.whole, checked.findings) == (4, 4, 4, [])


# --- rebuild


def test_rebuild_keeps_what_the_old_store_knows_and_every_old_store(study):
    lost, failed, *_ = names(study)
    shutil.rmtree(study / lost)
    with Store.read(study / FILE) as store:
        row, curve = store.row(lost), store.evaluations(lost)
        finished_at = {one.name: one.finished_at for one in store.rows()}
    shutil.rmtree(study / failed)
    rebuild(study, [failed])
    with Store.open(study / FILE) as store:
        store.failed(failed, "lightning")
    old = (study / FILE).read_bytes()
    experiments, results, notes = rebuild(study)
    assert (experiments, results) == (4, 3)
    assert [note for note in notes if f"study retry {study} {lost} trains it again" in note]
    assert (study / f"{FILE}.old.2").read_bytes() == old
    assert (study / f"{FILE}.old").exists()
    with Store.read(study / FILE) as store:
        again = store.row(lost)
        assert (again.measures, again.machine, again.finished_at) == (row.measures, row.machine, row.finished_at)
        assert store.evaluations(lost) == curve
        assert (store.row(failed).status, store.row(failed).reason) == ("failed", "lightning")
        assert all(one.finished_at == finished_at[one.name] for one in store.rows() if one.status == "finished")


def test_a_rebuild_that_fails_leaves_the_store(study, monkeypatch):
    before = (study / FILE).read_bytes()
    for name in names(study):
        cut(study / name / "run.json")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nanostudy.study.folder._keep_old", killed)
        with pytest.raises(KeyboardInterrupt):
            rebuild(study)
    assert (study / FILE).read_bytes() == before
    assert rebuild(study)[:2] == (4, 4)  # each from the old store, since no run folder can be read
    assert (study / f"{FILE}.old").read_bytes() == before


@pytest.mark.parametrize("column", ["val_loss", "train_loss", "seconds", "settings", "machine", "curve"])
def test_a_flipped_bit_in_the_store_is_found(study, column):
    """SQLite has no checksums of its own; every result has one here."""
    import contextlib
    import sqlite3

    name = names(study)[0]
    with contextlib.closing(sqlite3.connect(study / FILE, isolation_level=None)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for trigger, _ in triggers:
            db.execute(f"DROP TRIGGER {trigger}")
        if column == "curve":
            db.execute("UPDATE evaluations SET val_loss = val_loss + 1e-9 WHERE experiment = 1 AND step = 2")
        elif column == "machine":
            db.execute("UPDATE environments SET machine = replace(machine, 'fp32', 'bf16')")
        elif column == "settings":
            db.execute("UPDATE experiments SET settings = replace(settings, '0.001', '0.003')")
        else:
            db.execute(f"UPDATE experiments SET {column} = {column} + 1e-9 WHERE name = ?", (name,))
        for _, sql in triggers:
            db.execute(sql)
    with pytest.raises(NanostudyError, match=r"damaged (row|curve).*nanostudy study rebuild"):
        api.analyze(study)
    assert any("damaged" in finding.problem for finding in check(study).findings)
    assert rebuild(study)[:2] == (4, 4)
    assert check(study).findings == []


# --- run folders that are lost or damaged


def test_a_lost_run_folder_is_noticed_and_trained_again(study):
    before, lost = losses(study), names(study)[1]
    shutil.rmtree(study / lost)
    with Store.read(study / FILE) as store:
        (line,) = [line for line in status_lines(store, study) if "Without a run folder" in line]
        assert lost_lines(store.statuses(), study)[1] == line
    assert line.endswith(f"{lost}. Train again with: nanostudy study retry {study} {lost}")
    assert any(lost in note for note in api.analyze(study).results.notes)
    api.retry_study(study, [lost], executor="inline", resources=RESOURCES, listener=Listener())
    assert names(study) == [*names(study)]
    assert losses(study) == before
    assert check(study).findings == []
    with pytest.raises(UsageError, match="has failed, and no result has lost"):
        api.retry_study(study, executor="inline", resources=RESOURCES, listener=Listener())


def test_a_damaged_waiting_one_is_set_aside_and_the_study_goes_on(study):
    before, (bad, foreign, *_) = losses(study), names(study)
    rebuild(study, [bad, foreign])  # both wait
    (study / bad).mkdir()
    (study / bad / "run.json").write_text('{"format_version": 1, "status')
    (study / foreign).mkdir()
    (study / foreign / "training.csv").write_text("of something else")
    lines = run(study, study)
    assert [line for line in lines if bad in line and "run.json.damaged" in line]
    assert [line for line in lines if foreign in line and "lost its run.json" in line]
    assert losses(study) == before
    assert (study / bad / "run.json.damaged").exists()
    assert (study / f"{foreign}.damaged.2" / "training.csv").read_text() == "of something else"


def test_one_damaged_table_costs_a_curve(study):
    bad = names(study)[0]
    (study / bad / "training.csv").write_bytes(b"\xff\xfe\0")
    results = api.analyze(study).results
    assert len(results.experiments) == 4
    assert bad not in set(results.training["name"])
    assert any("training.csv" in note and "study check" in note for note in results.notes)
    assert len(api.analyze(study / bad).results.experiments) == 1


def test_a_study_goes_on_where_its_text_has_another_place(study, finished, tmp_path):
    before, file = losses(study), study / "study.yaml"
    shutil.rmtree(study / names(study)[0])
    rebuild(study, [name for name in names(finished) if not (study / name).exists()])
    written = file.read_text().replace((finished.parent / "words.txt").as_posix(), "/gone/words.txt")
    file.write_text(written)

    def run_on(text: Path) -> None:
        settings = {"corpus": str(text)}
        api.run_study(study, study, settings=settings, executor="inline", resources=RESOURCES, listener=Listener())

    with pytest.raises(UsageError, match=rf"needs corpus=/gone/words.txt.*study run {study} corpus=PATH"):
        run(study, study)
    with pytest.raises(NanostudyError, match="no longer what they were"):
        run_on(write_text(tmp_path / "another.txt", 1400))
    assert file.read_text() == written
    shutil.copy(finished.parent / "words.txt", tmp_path / "renamed.txt")
    run_on(tmp_path / "renamed.txt")
    assert losses(study) == before
    run(study, study)  # the new place is known from now on
    run_on(finished.parent / "words.txt")  # and so is a copy
    assert len(file.read_text().split("---")) == 2
    assert check(study).findings == []


def test_a_study_that_an_older_version_named_goes_on_under_its_names(tmp_path, monkeypatch):
    """They left out the letters of other scripts: the stand-in names as they did."""
    texts = [write_text(tmp_path / f"{name}.txt", length) for name, length in (("море", 1500), ("sea-海", 1400))]
    study = STUDY.format(text="CORPUS").replace("corpus: 'CORPUS', ", "")
    axes = f"corpus: [{', '.join(json.dumps(str(text)) for text in texts)}]"
    (tmp_path / "s.yaml").write_text(study.replace("dropout: [0.0, 0.1]", axes), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(grid, "safe", partial(lambda safe, value, older: safe(value, older=True), grid.safe))
        run(tmp_path / "s.yaml", tmp_path / "study")
    before, there = losses(tmp_path / "study"), names(tmp_path / "study")
    assert all("_corpus=_" in name or "_corpus=sea-_" in name for name in there), there
    shutil.rmtree(tmp_path / "study" / there[0])
    assert any(finding.what == there[0] for finding in check(tmp_path / "study").findings)
    api.retry_study(tmp_path / "study", executor="inline", resources=RESOURCES, listener=Listener())
    assert (losses(tmp_path / "study"), names(tmp_path / "study")) == (before, there)
    assert merge([tmp_path / "study"], tmp_path / "all")[-1].endswith("4 of 4 experiments, complete")
    (tmp_path / "study" / FILE).unlink()
    assert rebuild(tmp_path / "study")[:2] == (4, 4)
    run(tmp_path / "s.yaml", tmp_path / "new")
    assert not set(names(tmp_path / "new")) & set(there)


# --- temporaries, modes, folders of output


def test_every_file_has_the_umasks_mode_and_nothing_is_left(study, finished):
    umask = os.umask(0)
    os.umask(umask)
    for path in finished.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
            assert not atomic.LEFTOVER.fullmatch(path.name), path


def test_what_killed_processes_left_is_removed_at_the_next_start(study):
    name = names(study)[0]
    left = [
        *(study / ".results.csv.4194305.tmp", study / ".locks.4194305.tmp", study / ".tmpAb12Cd"),
        *(study / name / ".sample.txt.4194305.tmp", study / name / ".tmpXyZ123"),
    ]
    for path in left:
        path.write_bytes(b"half")
    (study / ".report.4194305.tmp").mkdir()
    theirs = study / f".report.{os.getppid()}.tmp"  # of a process that runs
    theirs.mkdir()
    run(study, study)
    assert not [path for path in [*left, study / ".report.4194305.tmp"] if path.exists()]
    assert theirs.exists()


@pytest.mark.parametrize("left", [[".index.html.4194305.tmp"], [".writable"], [".results.csv.4194305.tmp", ".lock"]])
def test_a_killed_report_can_be_written_again(study, undrawn, left):
    (study / "report").mkdir()
    for name in left:
        (study / "report" / name).write_text("half")
    assert api.report(study).is_file()
    (study / "report" / "index.html").unlink()
    (study / "report" / "notes.txt").write_text("mine")
    with pytest.raises(NanostudyError, match=r"holds other files"):
        api.report(study)


def test_a_report_is_swapped_in_whole(study, undrawn, monkeypatch):
    page = api.report(study)
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    calls = []

    def full(path: Path, content: object) -> None:
        calls.append(path)
        raise NanostudyError("No space is left")

    monkeypatch.setattr("nanostudy.reporting.write.write_atomically", full)
    with pytest.raises(NanostudyError, match="No space"):
        api.report(study)
    assert calls
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before
    assert [path.name for path in study.iterdir() if path.name.endswith(".tmp")] == []


def test_the_files_of_a_run_folder_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    table = text[: text.index("`training.csv`:")]
    assert {name for name in run_folder.FILES if f"`{name}`" not in table} == set()


# --- the matrix


QUICK = {
    ("evaluations.csv", "another digit"),
    ("run.json", "cut in half"),
    ("last.safetensors", "flipped in the middle"),
}
QUICK |= {("training.csv", "garbage"), ("study.sqlite", "flipped in the middle"), ("samples.json", "another digit")}
QUICK |= {("run.json", "a link to itself"), ("evaluations.csv", "a pipe"), ("study.sqlite", "emptied")}


def matrix_of(finished: Path, work: Path, wanted) -> Counter:
    """The figures by outcome; nothing differs in silence, and nothing ends in a traceback or not at all."""
    figures, wrong = Counter(), []
    for file, harm, command, outcome in matrix(finished, work, wanted):
        figures[outcome.kind] += 1
        if outcome.kind not in ("same", "told", "noted"):
            wrong.append((outcome.kind, file, harm, command, outcome.words))
    print(dict(figures), *wrong, sep="\n", flush=True)
    assert wrong == []
    return figures


def test_damage_is_told(finished, tmp_path):
    figures = matrix_of(finished, tmp_path / "work", lambda file, harm, command: (file, harm) in QUICK)
    assert sum(figures.values()) == len(QUICK) * len(COMMANDS)


@pytest.mark.soak
@pytest.mark.parametrize("file", [*STUDY_FILES, *RUN_FILES])
def test_the_whole_matrix_of_damage(file, finished, tmp_path):
    figures = matrix_of(finished, tmp_path / "work", lambda harmed, *_: harmed == file)
    assert sum(figures.values()) == len(HARMS) * len(COMMANDS)
