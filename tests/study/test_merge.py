"""Folders of one study put together: against one run of the whole, through refusals, kills and full disks."""

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Silent, record_again, write_text

from nanostudy import atomic
from nanostudy.api import run_study
from nanostudy.atomic import sole_owner
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import Resources
from nanostudy.study import merge as module
from nanostudy.study.folder import design, open_study
from nanostudy.study.merge import merge
from nanostudy.study.notes import Note
from nanostudy.study.store import FILE, Store
from nanostudy.training import run_folder

# b and d have the same shapes: run as a whole they share a stack, run apart they do not.
STUDY = """
settings: {{corpus: '{text}', n_layer: 1, n_head: 1, batch_size: 4, max_iters: 4, warmup_iters: 1, eval_interval: 2, log_interval: 1}}
parts:
  a: {{n_embd: 8, block_size: 32}}
  b: {{n_embd: 16, block_size: 32}}
  c: {{n_embd: 16, block_size: 16}}
  d: {{n_embd: 16, block_size: 32, learning_rate: 0.01}}
grid: {{dropout: [0.0, 0.1]}}
seeds: one per experiment
sample_tokens: 5
"""
BOUND = 1e-3  # on losses, where stacks differ


def run(source: Path, out: Path, **options) -> Path:
    resources = Resources(device="cpu", precision="fp32", threads=1)
    run_study(str(source), out, executor="inline", resources=resources, listener=Silent(), **options)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A study as a whole, and each of its parts in a folder of its own. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "words.txt")
    (folder / "study.yaml").write_text(STUDY.format(text=text.as_posix()), encoding="utf-8")
    run(folder / "study.yaml", folder / "whole")
    for part in "abcd":
        run(folder / "study.yaml", folder / part, parts=[part])
    return folder


@pytest.fixture
def parts(made, tmp_path) -> dict[str, Path]:
    """Copies of the parts' folders, to change."""
    return {part: Path(shutil.copytree(made / part, tmp_path / part)) for part in "abcd"}


def rows(folder: Path) -> dict:
    with Store.read(folder / FILE) as store:
        return {row.name: row for row in store.rows()}


def done(folder: Path) -> set[str]:
    return {name for name, row in rows(folder).items() if row.status in ("finished", "diverged")}


def of_part(folder: Path, part: str) -> list[str]:
    return [name for name, row in rows(folder).items() if row.part == part]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def change(run: Path, **changes) -> None:
    """Other values in a run.json; a value's keys joined by __."""
    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for keys, value in changes.items():
        *outer, last = keys.split("__")
        inner = metadata
        for key in outer:
            inner = inner[key]
        inner[last] = value
    record_again(run, metadata)


def change_last(run: Path, **by: float) -> None:
    """Other losses at the last evaluation, in evaluations.csv and in run.json."""
    final = json.loads((run / "run.json").read_text(encoding="utf-8"))["final"]
    lines = (run / "evaluations.csv").read_text(encoding="utf-8").splitlines()
    row = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    for key, difference in by.items():
        bits = key.replace("loss", "bits_per_character")
        row[bits] = repr(float(row[bits]) * (final[key] + difference) / final[key])
        row[key] = repr(final[key] + difference)
    lines[-1] = ",".join(row.values())
    (run / "evaluations.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = run_folder.read_rows(run / "evaluations.csv")
    change(run, final=rows[-1], best=min(rows, key=lambda row: row["val_loss"]))


def redefine(folder: Path, old: str, new: str) -> None:
    text = (folder / "study.yaml").read_text(encoding="utf-8")
    assert old in text
    (folder / "study.yaml").write_text(text.replace(old, new), encoding="utf-8")


# --- what merging is for


def test_four_parts_are_the_whole(made, tmp_path):
    into = tmp_path / "all"
    lines = merge([made / part for part in "dcba"], into)
    whole, merged = rows(made / "whole"), rows(into)
    assert len(whole) == 8
    assert list(merged) == list(whole)  # by ids
    with Store.read(into / FILE) as store, Store.read(made / "whole" / FILE) as other:
        curves = {name: (store.evaluations(name), other.evaluations(name)) for name in whole}
    for name, row in merged.items():
        one = whole[name]
        assert (row.id, row.part, row.identity, row.settings) == (one.id, one.part, one.identity, one.settings)
        assert (row.status, row.updates, row.tokens, row.sampled) == ("finished", 4, one.tokens, True)
        weights = [(folder / name / "last.safetensors").read_bytes() for folder in (into, made / "whole")]
        if row.part in "ac":  # the same stacks
            assert (row.train_loss, row.val_loss, row.context_losses) == (
                one.train_loss,
                one.val_loss,
                one.context_losses,
            )
            assert weights[0] == weights[1]
        assert row.val_loss == pytest.approx(one.val_loss, abs=BOUND)
        assert row.train_loss == pytest.approx(one.train_loss, abs=BOUND)
        mine, theirs = curves[name]
        assert [point["step"] for point in mine] == [0, 2, 4]
        assert [point["val_loss"] for point in mine] == pytest.approx([p["val_loss"] for p in theirs], abs=BOUND)

    with open(into / "results.csv", newline="") as a, open(made / "whole" / "results.csv", newline="") as b:
        for mine, theirs in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            mine.pop("seconds"), theirs.pop("seconds")
            losses = [key for key in mine if key.endswith("loss") or key == "loss_gap"]
            for key in losses:
                assert float(mine.pop(key)) == pytest.approx(float(theirs.pop(key)), abs=2 * BOUND)
            assert mine == theirs
    assert [f"{made / part}: 2 results taken" for part in "dcba"] == lines[:4]
    assert lines[-1] == f"{into}: 8 of 8 experiments, complete"


def test_what_is_missing_is_said_and_a_later_merge_completes_it(parts, tmp_path):
    into = tmp_path / "all"
    lines = merge([parts["a"], parts["c"]], into)
    names = of_part(into, "b")
    assert [line for line in lines if line.startswith("part ")] == [
        "part a: 2 of 2",
        f"part b: 0 of 2; missing {' and '.join(names)}",
        "part c: 2 of 2",
        f"part d: 0 of 2; missing {' and '.join(of_part(into, 'd'))}",
    ]
    assert lines[-1] == f"{into}: 4 of 8 experiments, 4 experiments still waiting"
    before = {name: contents(into / name) for name in done(into)}
    assert len(before) == 4
    written = {path: path.stat().st_mtime_ns for name in before for path in (into / name).iterdir()}

    lines = merge([parts["b"], parts["d"], parts["a"]], into)
    assert f"{into}: 4 results there already, kept" in lines
    assert f"{parts['a']}: 0 results taken, 2 had from elsewhere" in lines
    assert len(done(into)) == 8
    assert {name: contents(into / name) for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert run(into, into) == into  # nothing is left to do
    assert {name: contents(into / name) for name in before} == before


def test_into_a_source_only_adds_to_it(parts):
    names = of_part(parts["a"], "a")
    before = {name: contents(parts["a"] / name) for name in names}
    merge([parts["a"], parts["b"]], parts["a"])
    assert done(parts["a"]) == {*names, *of_part(parts["a"], "b")}
    assert {name: contents(parts["a"] / name) for name in names} == before


def test_sources_need_no_store(parts, tmp_path):
    (parts["a"] / FILE).unlink()
    (parts["b"] / FILE).write_bytes(b"no database at all")
    before = [contents(parts[part]) for part in "ab"]
    merge([parts["a"], parts["b"]], tmp_path / "all")
    assert len(done(tmp_path / "all")) == 4
    assert [contents(parts[part]) for part in "ab"] == before  # sources are only read


def test_the_merged_study_can_be_run_to_its_end(parts, tmp_path, made):
    into = tmp_path / "all"
    merge([parts["a"], parts["b"], parts["c"]], into)
    run(into, into)
    merged, whole = rows(into), rows(made / "whole")
    assert {row.status for row in merged.values()} == {"finished"}
    for name in of_part(into, "d"):
        assert merged[name].val_loss == pytest.approx(whole[name].val_loss, abs=BOUND)


# --- refusals, before anything is written

REFUSED = {
    "another fixed setting": ("beta1: 0.8\n", "beta1 0.8 in {b}, 0.9 in {a}"),
    "another grid": ("grid:\n  dropout: [0.0, 0.2]\n", "axis dropout (0, 0.2) in {b}, (0, 0.1) in {a}"),
    "another order": ("parts", "order of parts"),
    "other seeds": ("seeds: [1, 2]\n", "seeds (1, 2) in {b}, one per experiment in {a}"),
    "impossible ones skipped": ("skip_impossible: true\n", "skip_impossible true in {b}, false in {a}"),
    "another named text": ("corpus: playhouse\n", "corpus playhouse in {b}, by a path in {a}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_study_is_refused(case, parts, tmp_path):
    new, message = REFUSED[case]
    file = parts["b"] / "study.yaml"
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    if new == "parts":
        document["parts"] = dict(reversed(document["parts"].items()))
    else:
        target = document["settings"] if new.startswith(("beta1", "corpus")) else document
        target.update(yaml.safe_load(new))
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    for order in ("ab", "ba"):
        with pytest.raises(NanostudyError, match="not parts of one study") as problem:
            merge([parts[part] for part in order], tmp_path / "all")
        if order == "ab":
            assert message.format(**parts) in str(problem.value)
        assert not (tmp_path / "all").exists()
    before = contents(parts["a"])
    with pytest.raises(NanostudyError, match="not parts of one study"):
        merge([parts["b"]], parts["a"])
    assert contents(parts["a"]) == before


def test_what_decides_no_result_may_differ(parts, tmp_path, made):
    """Prompts, what is kept, the description, the log's interval, and where the text lies."""
    shutil.copy(made / "words.txt", tmp_path / "elsewhere.txt")
    old = (made / "words.txt").as_posix()
    redefine(parts["b"], old, (tmp_path / "elsewhere.txt").as_posix())
    redefine(parts["b"], "sample_tokens: 5", "sample_tokens: 7")
    redefine(parts["b"], "keep: all", "keep: final")
    redefine(parts["b"], "log_interval: 1", "log_interval: 3")
    merge([parts["a"], parts["b"]], tmp_path / "all")
    assert len(done(tmp_path / "all")) == 4
    assert contents(tmp_path / "all")["study.yaml"] == contents(parts["a"])["study.yaml"]  # the first one's


def test_places_that_do_not_do(parts, tmp_path):
    a, b = parts["a"], parts["b"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    for sources, into, message in (
        ([a, tmp_path / "empty"], tmp_path / "all", "There is no study in .*empty"),
        ([a, tmp_path / "nowhere"], tmp_path / "all", "There is no study in .*nowhere"),
        ([a, b], a / "all", "one inside the other"),
        ([a, b], tmp_path, "one inside the other"),
        ([a], a, "nothing to merge"),
        ([a, b], tmp_path / "full", "thesis.txt.* and no study"),
        ([a, b], tmp_path / "full" / "thesis.txt", "cannot be used"),
    ):
        with pytest.raises(NanostudyError, match=message):
            merge(sources, into)
        assert contents(tmp_path) == before
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus__sha256": "f" * 64}, "the text's SHA-256 .* and f{64}"),
        ({"numerics_version": 99}, "the numerics version 1 and 99"),
        ({"settings__beta2": 0.5}, "beta2 0.99 and 0.5"),
        ({}, "the first weights"),
    ],
)
def test_two_that_are_not_the_same_experiment(parts, tmp_path, changes, message):
    names = of_part(parts["a"], "a")
    other = Path(shutil.copytree(parts["a"], tmp_path / "other"))
    change(other / names[1], identity="0" * 16, **changes)
    with pytest.raises(NanostudyError, match=f"(?s){names[1]}.*{names[1]} are not the same experiment: {message}"):
        merge([parts["a"], parts["b"], other], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    before = contents(parts["a"])
    with pytest.raises(NanostudyError, match=f"not the same experiment: {message}"):
        merge([other], parts["a"])
    assert contents(parts["a"]) == before


def test_a_text_that_is_another_here(parts, tmp_path, made):
    other = tmp_path / "other.txt"
    other.write_bytes((made / "words.txt").read_bytes().replace(b"sea", b"ear"))
    for part in "ab":
        redefine(parts[part], (made / "words.txt").as_posix(), other.as_posix())
    with pytest.raises(NanostudyError, match=r"is not what b.* is here: the text's SHA-256 .* and "):
        merge([parts["a"], parts["b"]], tmp_path / "all")
    other.unlink()
    with pytest.raises(UsageError, match=r"no corpus and no file .*other\.txt"):
        merge([parts["a"], parts["b"]], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_folder_in_use(parts, tmp_path):
    (tmp_path / "all").mkdir()
    with sole_owner(tmp_path / "all"), pytest.raises(NanostudyError, match="Another process"):
        merge([parts["a"]], tmp_path / "all")
    assert [path.name for path in (tmp_path / "all").iterdir()] == [".lock"]


# --- extensions


def extended(folder: Path, grid: str) -> None:
    """A further definition, as `study run FOLDER setting=a,b` writes it."""
    text = (folder / "study.yaml").read_text(encoding="utf-8").split("---\n")[1]
    further = text.replace("dropout: [0.0, 0.1]", grid)
    assert further != text
    with open(folder / "study.yaml", "a", encoding="utf-8") as file:
        file.write(f"---\n{further}")


def test_the_longer_definition_is_taken(parts, tmp_path, made):
    extended(parts["b"], "dropout: [0.0, 0.1, 0.2]")
    for sources in ([parts["a"], parts["b"]], [parts["b"], parts["a"]]):
        into = tmp_path / sources[0].name / ".." / f"all_{sources[0].name}"
        merge(sources, into)
        assert len(rows(into)) == 12
        assert (into / "study.yaml").read_bytes() == (parts["b"] / "study.yaml").read_bytes()
    merge([parts["b"]], parts["a"])  # one that has fewer is extended
    assert {name: row.id for name, row in rows(parts["a"]).items()} == {n: r.id for n, r in rows(into).items()}
    merge([parts["c"]], parts["a"])  # one that has more stays
    assert len(rows(parts["a"])) == 12
    assert len(done(parts["a"])) == 6


def test_an_extension_by_somebody_whose_text_lies_elsewhere(parts, tmp_path, made):
    shutil.copy(made / "words.txt", tmp_path / "elsewhere.txt")
    redefine(parts["b"], (made / "words.txt").as_posix(), (tmp_path / "elsewhere.txt").as_posix())
    extended(parts["b"], "dropout: [0.0, 0.1, 0.2]")
    merge([parts["b"]], parts["a"])
    merge([parts["b"], parts["a"]], tmp_path / "all")
    ids = [{name: row.id for name, row in rows(folder).items()} for folder in (parts["a"], tmp_path / "all")]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 12
    assert len(done(parts["a"])) == len(done(tmp_path / "all")) == 4


def test_different_extensions_are_refused(parts, tmp_path):
    extended(parts["a"], "dropout: [0.0, 0.1, 0.2]")
    extended(parts["b"], "dropout: [0.0, 0.1, 0.3]")
    with pytest.raises(NanostudyError, match=r"axis dropout \(0, 0\.1, 0\.3\) in .*b, \(0, 0\.1, 0\.2\) in .*a"):
        merge([parts["a"], parts["b"]], tmp_path / "all")


def test_definitions_that_add_nothing_do_not_count(parts, tmp_path):
    extended(parts["a"], "dropout: [0.1]")  # fewer than there are
    extended(parts["b"], "dropout: [0.0, 0.1, 0.3]")
    merge([parts["a"], parts["b"]], tmp_path / "all")
    assert len(rows(tmp_path / "all")) == 12
    merge([parts["b"]], parts["a"])
    assert {name: row.id for name, row in rows(parts["a"]).items()} == {
        name: row.id for name, row in rows(tmp_path / "all").items()
    }


# --- the same experiment twice


def test_finished_twice(parts, tmp_path):
    equal, val, train = (Path(shutil.copytree(parts["a"], tmp_path / each)) for each in ("equal", "val", "train"))
    name = of_part(parts["a"], "a")[0]
    final = json.loads((parts["a"] / name / "run.json").read_text(encoding="utf-8"))["final"]
    change_last(val / name, val_loss=0.25)
    change_last(train / name, train_loss=-1e-6)
    lines = merge([parts["a"], equal, val, train], tmp_path / "all")
    shown = f"{final['val_loss']:.4f}"
    assert [line for line in lines if "finished twice" in line] == [
        f"{name}: finished twice, val {shown} kept, {final['val_loss'] + 0.25:.4f} (+2.5e-01) in {val}",
        f"{name}: finished twice, train {final['train_loss']:.4f} kept, {final['train_loss'] - 1e-6:.4f} (-1.0e-06) "
        f"in {train}",
    ]
    assert rows(tmp_path / "all")[name].val_loss == final["val_loss"]
    assert f"{equal}: 0 results taken, 2 had from elsewhere" in lines
    merge([parts["a"]], val)  # and what a folder has, it keeps
    assert json.loads((val / name / "run.json").read_text())["final"]["val_loss"] == final["val_loss"] + 0.25


def test_equal_losses_and_other_weights(parts, tmp_path):
    other = Path(shutil.copytree(parts["a"], tmp_path / "other"))
    first, second = of_part(parts["a"], "a")
    shutil.copy(other / second / "last.safetensors", other / first / "last.safetensors")
    (other / second / "last.safetensors").unlink()  # not kept there: nothing to compare
    record_again(other / first)
    lines = merge([parts["a"], other], tmp_path / "all")
    (line,) = [line for line in lines if "finished twice" in line]
    assert line.startswith(f"{first}: finished twice, val ")
    assert line.endswith(f" in both, other weights in {other}")


def test_diverged_elsewhere(parts, tmp_path):
    name = of_part(parts["a"], "a")[0]
    other = Path(shutil.copytree(parts["a"], tmp_path / "other"))
    change(other / name, status="diverged", diverged="the loss is nan", final=None)
    lines = merge([other, parts["a"]], tmp_path / "all")
    assert f"{name}: finished twice, diverged kept, finished in {parts['a']}" in lines
    row = rows(tmp_path / "all")[name]
    assert (row.status, row.reason) == ("diverged", "the loss is nan")


def test_a_note_within_another_is_kept():
    both = Note("not good").joined(Note("good", star=True))
    assert both == Note("not good; good", star=True)
    assert both.joined(Note("good")) == both.joined(both) == both
    assert Note().joined(Note("good")) == Note("good")


# --- what is no result


def test_unfinished_ones_are_left(parts, tmp_path):
    first, second = of_part(parts["a"], "a")
    change(parts["a"] / first, status="unfinished")
    (parts["a"] / "stacks" / "9").mkdir(parents=True)
    (parts["a"] / "stacks" / "9" / "checkpoint.safetensors").write_bytes(b"...")
    (parts["a"] / second / ".sample.txt.123.tmp").write_bytes(b"half")
    lines = merge([parts["a"]], tmp_path / "all")
    assert done(tmp_path / "all") == {second}
    assert lines[-1] == f"{tmp_path / 'all'}: 1 of 8 experiments, 7 experiments still waiting"
    there = contents(tmp_path / "all")
    assert not [path for path in there if path.startswith(("stacks", first)) or path.endswith(".tmp")]
    assert {path.split("/")[1] for path in there if "/" in path} == {
        path.name for path in (parts["a"] / second).iterdir() if not path.name.startswith(".")
    }


def test_a_result_takes_the_place_of_an_unfinished_or_failed_one(parts, tmp_path):
    """In the folder that gets results, one waits with a run folder that was begun, and one has failed."""
    begun, failed = of_part(parts["b"], "b")
    into = parts["a"]
    shutil.copytree(parts["b"] / begun, into / begun)
    change(into / begun, status="unfinished")
    (into / begun / "stale.txt").write_text("of the half-done one")
    with Store.open(into / FILE) as store:
        store.failed(failed, "no luck")
    merge([parts["b"]], into)
    assert {begun, failed} < done(into)
    assert rows(into)[failed].reason is None
    for name in (begun, failed):
        assert contents(into / name) == contents(parts["b"] / name)


def test_strangers_in_the_way_stay(parts):
    name = of_part(parts["b"], "b")[0]
    (parts["a"] / name).mkdir()
    (parts["a"] / name / "thesis.txt").write_text("mine")
    with pytest.raises(NanostudyError, match=r"thesis\.txt\) and no run"):
        merge([parts["b"]], parts["a"])
    assert contents(parts["a"] / name) == {"thesis.txt": b"mine"}


def test_damaged_run_folders(parts, tmp_path):
    bad, good = of_part(parts["a"], "a")
    (parts["a"] / bad / "run.json").write_text("{")
    lines = merge([parts["a"]], tmp_path / "all")
    assert [line for line in lines if line.startswith("not taken: ") and bad in line and "damaged" in line]
    assert done(tmp_path / "all") == {good}
    lines = merge([parts["b"]], parts["a"])  # the store's result is kept, and what is damaged is said
    assert [line for line in lines if line.startswith("damaged: ") and bad in line]
    assert {bad, good} < done(parts["a"])


# --- faults on the way


def whole_folders(into: Path, sources: list[Path]) -> bool:
    """Every run folder of `into` is one of a source's, byte for byte, and nothing lies between them."""
    existing = {path.name: path for source in sources for path in source.iterdir() if (path / "run.json").exists()}
    folders = [path for path in into.iterdir() if path.is_dir()]
    return all(path.name in existing and contents(path) == contents(existing[path.name]) for path in folders)


@pytest.mark.parametrize("at", [1, 9])
def test_disk_full(parts, tmp_path, monkeypatch, at):
    into, calls, copy = tmp_path / "all", [], run_folder.copy_bounded

    def full(source, target, most):
        calls.append(target)
        if len(calls) > at:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, target, most)

    monkeypatch.setattr(run_folder, "copy_bounded", full)
    with pytest.raises(NanostudyError, match="No space is left"):
        merge([parts["a"], parts["b"]], into)
    assert len(calls) == at + 1  # nothing is tried after that
    assert whole_folders(into, [parts["a"], parts["b"]])
    assert len(done(into)) == (0 if at == 1 else 1)
    monkeypatch.setattr(run_folder, "copy_bounded", copy)
    merge([parts["a"], parts["b"]], into)
    assert len(done(into)) == 4
    assert whole_folders(into, [parts["a"], parts["b"]])


@pytest.mark.parametrize("killed_in", ["copying", "replace", "adopt"])
def test_a_killed_merge_is_completed(parts, tmp_path, monkeypatch, killed_in):
    """As a kill would: nothing is tidied up."""
    into = tmp_path / "all"
    move = atomic._move

    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        if killed_in == "copying":
            Path(arguments[1]).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)
        if killed_in == "copying":
            patch.setattr(run_folder, "copy_bounded", kill)
        elif killed_in == "adopt":
            patch.setattr(module, "adopt", kill)
        else:
            patch.setattr(atomic, "_move", lambda path, target: kill() if path.is_dir() else move(path, target))
        with pytest.raises(Killed):
            merge([parts["a"], parts["b"]], into)
    if killed_in == "adopt":
        with open_study(design(into)) as folder:  # any later command finds what was copied
            assert folder.store.counts()["finished"] == 1
    else:
        assert [path for path in into.iterdir() if path.is_dir() and path.name.endswith(".tmp")]
    merge([parts["a"], parts["b"]], into)
    assert len(done(into)) == 4
    assert whole_folders(into, [parts["a"], parts["b"]])


def test_weights_that_a_running_study_drops_meanwhile(parts, tmp_path, monkeypatch):
    copy = run_folder.copy_bounded

    def dropped(source, target, most):
        if source.name == "best.safetensors":
            source.unlink()
        return copy(source, target, most)

    monkeypatch.setattr(run_folder, "copy_bounded", dropped)
    merge([parts["a"]], tmp_path / "all")
    assert len(done(tmp_path / "all")) == 2
    assert not list((tmp_path / "all").rglob("best.safetensors"))
    assert len(list((tmp_path / "all").rglob("last.safetensors"))) == 2
