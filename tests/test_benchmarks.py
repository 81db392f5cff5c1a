"""The benchmarks' time: every step has a limit, one that fails costs no other, and what was measured is kept."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks():
    """Its modules, which import each other by name as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import command
        import workloads

        yield command, workloads
        for name in ("command", "workloads", "ours", "rival"):
            sys.modules.pop(name, None)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_step_has_its_limit_and_no_more_than_is_left(benchmarks):
    command, workloads = benchmarks
    clock = Clock()
    budget = command.Budget(100, clock)
    left = []

    def step(seconds):
        def measure(bench):
            left.append(budget.left())
            clock.now += seconds
            if budget.left() < 0:
                raise command.Failed("stopped")
            yield workloads.Row(f"took {seconds}", "step", "")

        return measure

    steps = [workloads.Step(step(20), 30), workloads.Step(step(50), 40), workloads.Step(step(10), 90)]
    steps += [workloads.Step(step(40), 90), workloads.Step(step(1), 90)]
    rows = [row for each in steps for row in workloads.measured(each, None, budget)]
    assert left == [30, 40, 30, 20]  # the last did not begin
    assert [row.workload for row in rows] == ["took 20", "measure", "took 10", "measure", "measure"]
    assert [row.note for row in rows if row.workload == "measure"] == [
        "not measured (stopped)",
        "not measured (stopped)",
        "not measured (no time was left)",
    ]


def test_what_came_before_a_failure_is_kept(benchmarks):
    command, workloads = benchmarks

    def some(bench):
        yield workloads.Row("first", "step", "", ours=[1.0])
        raise command.Failed("no memory")

    first, then = workloads.measured(workloads.Step(some), None, command.Budget(float("inf")))
    assert first.ours == [1.0]
    assert then.note == "not measured (no memory)"


def test_a_command_is_stopped_at_its_limit_and_its_failure_says_why(benchmarks):
    command, _ = benchmarks
    with pytest.raises(command.Failed, match=r"stopped after 0 s: -c import time"):
        command.timed([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.3)
    with pytest.raises(command.Failed, match=r"exit code 3: .*why"):
        command.timed([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"], limit=60)
    with pytest.raises(command.Failed, match="no time was left"):
        command.timed([sys.executable, "-c", ""], limit=0)
