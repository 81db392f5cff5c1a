"""Real processes for tests, forked from one that has imported nanostudy: they start in milliseconds."""

import multiprocessing
import os
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    CONTEXT.set_forkserver_preload(["__main__", "nanostudy.api", "nanostudy.cli.main", "altair", "pandas"])


WITHOUT_REPORT = """
from nanostudy.reporting import write
write.publish_run = lambda folder: (folder / "report.md").write_text("left out")
"""


def run_training(settings, out: str, resources, save_every: float) -> None:
    """`train` in Python, without the report, whose drawing takes longer than a small training."""
    from nanostudy import api
    from nanostudy.settings import Experiment, Resources

    exec(WITHOUT_REPORT, {})
    api.train(Experiment(**settings), out, resources=Resources(**resources), save_every=save_every)


def run_command(*arguments: str, before: str = "") -> None:
    """The command line, after the Python code `before`."""
    from nanostudy.cli import main as cli

    exec(before, {})
    sys.argv = ["nanostudy", *arguments]
    cli.main()


class Child:
    """`function(*arguments)` in a process of its own, in `folder`. Much like subprocess.Popen, with one output for both streams."""

    count = 0

    def __init__(self, folder: Path, function, *arguments, environment=None, **options) -> None:
        Child.count += 1
        self.output = Path(folder) / f".output-{os.getpid()}-{Child.count}"
        environment = {**os.environ, **(environment or {})}
        work = (Path(folder).resolve(), self.output, environment, function, arguments, options)
        self.process = CONTEXT.Process(target=_run, args=work)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 120) -> str:
        """Waits for its end and returns its output."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.kill()
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""
        assert not late, f"still running after {timeout} seconds:\n{text}"
        return text


def _run(folder, output, environment, function, arguments, options) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    function(*arguments, **options)
