"""The command line in a test's own process."""

import contextlib
import io
from typing import NamedTuple

import pytest

from nanostudy.cli import main as cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def call(*words: object) -> Outcome:
    """`nanostudy WORDS`. An exception that is no message fails the test, as its traceback would a person."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["nanostudy", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())
