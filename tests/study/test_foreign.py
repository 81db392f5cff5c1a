"""Folders that came from elsewhere: whatever they hold, commands end, leave nothing outside, and say what they did not take."""

import os
import re
import shutil
from pathlib import Path

import pytest
from damage import COMMANDS, attempt
from hostile import ESCAPE, FOLDERS
from test_damage import finished, names  # noqa: F401 (a fixture)

from nanostudy.cli import main as cli
from nanostudy.result import Result, Status
from nanostudy.settings import Experiment
from nanostudy.study.listing import as_csv
from nanostudy.text import csv_cell

SECRET = "what nobody else may read"


@pytest.fixture
def place(finished, tmp_path) -> Path:  # noqa: F811
    (tmp_path / "secret.txt").write_text(SECRET)
    return Path(shutil.copytree(finished, tmp_path / "study")).parent


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("harm", FOLDERS)
def test_a_foreign_folder_can_do_nothing(harm, place):
    study = place / "study"
    FOLDERS[harm](study, study / names(study)[0])
    before = everything(place)
    outside = set(os.listdir("/tmp"))
    for command in COMMANDS:
        if command in ("run", "rebuild"):  # they write in the folder itself, as asked
            copy = Path(shutil.copytree(study, place / "copy" / "study", symlinks=True, copy_function=copy_file))
            kind, words, _ = attempt(command, copy)
            shutil.rmtree(place / "copy")
        else:
            kind, words, _ = attempt(command, study)
        assert kind in ("done", "told"), (command, words)
    for made in ("into", "to"):
        for path in (place / made).rglob("*"):
            assert not path.is_symlink(), path
            assert path.is_dir() or path.is_file(), path
            assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
            assert (
                path.is_dir()
                or path.suffix == ".safetensors"
                or "import os; os" not in path.read_bytes().decode("latin1")
            )
            assert path.name != "run.sh"
        shutil.rmtree(place / made, ignore_errors=True)
    assert everything(place) - before <= {f"study/{new}" for new in everything(study)}
    assert not (set(os.listdir("/tmp")) - outside) & {"outside"}
    assert (place / "secret.txt").read_text() == SECRET


def copy_file(source: str, target: str) -> None:
    """A terabyte stays a terabyte of nothing, and a pipe a pipe."""
    if not os.path.isfile(source):
        os.mkfifo(target)
    elif os.stat(source).st_size > 2**30:
        with open(target, "wb") as file:
            file.truncate(2**40)
    else:
        shutil.copyfile(source, target)


SHOWN = [harm for harm in FOLDERS if "escape" in harm]


@pytest.mark.parametrize("harm", SHOWN)
def test_no_escape_sequence_reaches_the_terminal(harm, place, monkeypatch, capsys):
    study = place / "study"
    FOLDERS[harm](study, study / names(study)[0])
    commands = (
        *(["study", "status", str(study), "--all"], ["study", "check", str(study)]),
        *(
            ["study", "merge", str(study), "--into", str(place / "into")],
            ["study", "export", str(study), "--to", str(place / "to")],
        ),
        ["study", "rebuild", str(study)],
    )
    for argv in commands:
        monkeypatch.setattr("sys.argv", ["nanostudy", *argv])
        with pytest.raises(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out + err), (argv, out, err)
        assert ESCAPE not in out + err


def test_a_formula_is_a_text_in_a_table():
    """A spreadsheet would compute it, and may send what it reads anywhere."""
    cells = ("=1+1.txt", "+1", "-1", "@SUM(A1)", "\t=1", "words", 2.5, -1.5, None)
    assert [csv_cell(cell) for cell in cells] == [*(f"'{cell}" for cell in cells[:5]), *cells[5:]]
    settings = Experiment(corpus="=1+1.txt").as_dict()
    result = Result("a", "", str(settings), Status.FAILED, {}, reason="=cmd|' /C calc'!A0")
    rows = [{"corpus": settings["corpus"], "reason": result.reason, "gap": -0.5}]
    assert as_csv(rows).splitlines()[1] == "'=1+1.txt,'=cmd|' /C calc'!A0,-0.5"
