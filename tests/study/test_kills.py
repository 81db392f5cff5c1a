"""run, merge, rebuild, report and export killed once at every operation on a file, and completed by the same command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_damage import finished  # noqa: F401 (a fixture)

TESTS = Path(__file__).parent.parent
SHARES = 3  # of the operations: each takes minutes
COMMANDS = ("run", "merge", "rebuild", "report", "export")


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """The library that counts and kills."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(TESTS / "shim.c"), "-o", str(library), "-ldl"], check=True)
    return library


def killed(command: str, source: Path, work: Path, library: Path, stride: int, first: int = 0) -> dict:
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [sys.executable, str(TESTS / "kills.py"), command, str(source), str(work), str(stride), str(first)]
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_some_kills_of_a_rebuild(shim, finished, tmp_path):  # noqa: F811
    figures = killed("rebuild", finished.parent, tmp_path / "work", shim, 9)
    assert figures["wrong"] == []
    assert figures["tried"] >= 5


@pytest.mark.soak
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_every_operation(command, share, shim, finished, tmp_path):  # noqa: F811
    figures = killed(command, finished.parent, tmp_path / "work", shim, SHARES, share)
    print(command, figures["operations"], figures["tried"])
    assert figures["wrong"] == []
