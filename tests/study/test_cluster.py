"""Studies on a Ray cluster of several nodes on this machine: nodes that die, join or differ, drivers that are killed.

Every study that suffered is compared, file by file, with one that ran inline and undisturbed. Each experiment has a shape, and
so a stack, of its own: the plan is the same for any number of workers.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_execute import RESOURCES, Listener, assert_same_study, contents, experiments, metadata, write_study

import nanostudy
from nanostudy import api
from nanostudy.cli import main as cli
from nanostudy.errors import Interrupted, NanostudyError, UsageError
from nanostudy.study.cluster import actor, backend
from nanostudy.study.cluster.actor import WorkerActor
from nanostudy.study.cluster.backend import Cluster
from nanostudy.study.cluster.checkpoints import POINTER, AtAddress, CheckpointStore
from nanostudy.study.cluster.messages import Kept, Part, Wanted, append_part, parts
from nanostudy.study.cluster.nodes import NodeInfo, Nodes, Share, share_out
from nanostudy.study.store import FILE, Store
from nanostudy.study.tasks import Broken, Done, Prepared, TrainStack
from nanostudy.training.events import Event, Saving
from nanostudy.training.machine import resolve
from nanostudy.training.train import Job

SHAPES = (8, 9, 10)  # context lengths
GRID = {"block_size": list(SHAPES), "max_iters": [500]}  # long enough to be interrupted in their midst
SOURCES = str(Path(nanostudy.__file__).parents[1])
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'nanostudy'; from nanostudy.cli.main import main; main()"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    settings = {"eval_interval": 100, "log_interval": 10}
    return write_study(tmp_path_factory.mktemp("study"), GRID, seeds=(1,), settings=settings)


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    api.run_study(source, out, executor="inline", resources=RESOURCES, listener=Listener(), save_every=1e9)
    return out


@pytest.fixture(scope="module")
def machines():
    """A cluster whose head does no work, so that any node that does may die."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray import cluster_utils

    quick = {"health_check_period_ms": 300, "health_check_failure_threshold": 4, "health_check_timeout_ms": 5000}
    lean = {"prestart_worker_first_driver": False}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {**quick, **lean}}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@pytest.fixture
def nodes(machines):
    """nodes(n) adds n nodes of one core each to a cluster without any. This process is connected to the head, which outlives them."""
    import ray

    ray.init(machines.address, log_to_driver=False)  # while there is no other node to be connected to

    def nodes(count: int, wait: bool = True, **how) -> None:
        for _ in range(count):
            machines.add_node(wait=False, num_cpus=1, memory=2**30, **how)
        if wait:
            machines.wait_for_nodes()

    yield nodes
    for node in list(machines.worker_nodes):
        machines.remove_node(node, allow_graceful=True)
    ray.shutdown()


LONGEST = 240.0  # seconds after which a study hangs


def meddle(monkeypatch, *acts, meanwhile=lambda: None) -> list:
    """After a worker has saved, and so in the midst of an experiment, calls the next of the acts with the id of its node.

    Returns those that are still to come.
    """
    left, saving, since = list(acts), set(), time.monotonic()
    original = Cluster.next

    def next(self, timeout):
        assert time.monotonic() - since < LONGEST
        meanwhile()
        arrived = original(self, timeout)
        if arrived and isinstance(arrived[1], Saving):
            saving.add(arrived[0])
        elif arrived and arrived[0] in saving:
            saving.discard(arrived[0])
            if left and isinstance(arrived[1], Event):
                left.pop(0)(self.workers[arrived[0]].node)
        return arrived

    monkeypatch.setattr(Cluster, "next", next)
    return left


def run(source: Path, out: Path, address: str | None, listener: Listener, **how) -> list:
    how = {"executor": "ray", "address": address, "resources": RESOURCES, "save_every": 0.05, **how}
    return api.run_study(source, out, listener=listener, **how)


def other_version(folder: Path) -> dict[str, str]:
    """The environment of a node with another nanostudy."""
    shutil.copytree(Path(SOURCES, "nanostudy"), folder / "nanostudy", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "nanostudy" / "version.py"
    file.write_text(file.read_text().replace("NUMERICS = 1", "NUMERICS = 99"))
    return {"PYTHONPATH": str(folder)}


def test_nodes_die_and_join_and_the_study_is_as_inline(source, reference, machines, nodes, tmp_path, monkeypatch):
    """Two nodes die while their workers train, one at once and one gracefully; others join and finish the study.

    One that joins has another version: it is left alone, which is reported once.
    """
    import ray

    nodes(2)
    environment = other_version(tmp_path / "other")
    shared, started, listener = [], [], Listener()
    start = Cluster.start

    def kill(id: str, gracefully: bool, **joining) -> None:
        (node,) = (node for node in machines.worker_nodes if node.node_id == id)
        machines.remove_node(node, allow_graceful=gracefully)
        nodes(1, wait=False)
        if joining:
            nodes(1, wait=False, **joining)

    def unused() -> list[str]:
        return [text for text in listener.messages if text.startswith("not used")]

    def wait() -> None:  # the study lasts until the other version was noticed
        if not left and not unused():
            time.sleep(0.3)

    monkeypatch.setattr(ray, "put", lambda value, original=ray.put: shared.append(value) or original(value))
    monkeypatch.setattr(Cluster, "start", lambda *a: started.append(a[2]) or start(*a))
    monkeypatch.setattr(backend, "LOOK", 0.2)
    acts = (
        lambda id: kill(id, gracefully=False, env_vars=environment),
        lambda id: kill(id, gracefully=True),
    )
    left = meddle(monkeypatch, *acts, meanwhile=lambda: wait())
    run(source, tmp_path / "out", machines.address, listener)
    assert not left
    assert sum("is lost; it goes on from its last checkpoint" in text for text in listener.messages) == 2
    assert not any("failed" in text for text in listener.messages)
    assert len(unused()) == 1
    assert "numerics version 99 there, 1 here" in unused()[0]
    assert_same_study(tmp_path / "out", reference)
    # an experiment that a node's death interrupted went on from a checkpoint
    sessions = [metadata(tmp_path / "out" / name)["sittings"] for name in experiments(reference)]
    assert sum(len(one) for one in sessions) in (len(SHAPES) + 1, len(SHAPES) + 2)
    assert any(one[-1]["after_update"] > 0 for one in sessions)
    assert [type(value).__name__ for value in shared] == ["Corpus"], "the text is put into the cluster once"
    assert len(started) > len(SHAPES)


def test_a_driver_that_is_killed_is_started_again(source, reference, machines, nodes, tmp_path):
    """No finished experiment is run twice, and none is lost, whatever executor goes on."""
    nodes(1)
    out = tmp_path / "out"
    argv = [*COMMAND, "study", "run", "--no-report", str(source), "--out", str(out), "--executor", "ray", "--address"]
    argv += [machines.address, "--device", "cpu", "--precision", "fp32", "--threads", "1"]
    driver = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": SOURCES}, stdout=subprocess.PIPE, text=True)
    for line in driver.stdout:
        if line.startswith("[1/"):
            break
    driver.kill()
    driver.wait()
    with Store.read(out / FILE) as store:
        done = {row.name for row in store.rows() if row.status == "finished"}
    assert done
    assert len(done) < len(SHAPES)
    before = {name: checksum for name, checksum in contents(out).items() if Path(name).parts[0] in done}
    api.run_study(source, out, executor="inline", resources=RESOURCES, listener=Listener())
    assert_same_study(out, reference)
    after = contents(out)
    changed = {name for name, checksum in before.items() if after[name] != checksum}
    assert not changed
    assert all(len(metadata(out / name)["sittings"]) == 1 for name in done)


def test_checkpoints_where_the_folder_is_not_seen(source, reference, machines, nodes, tmp_path, monkeypatch):
    """They lie at an address, which the next session needs; without one they travel through the driver, in parts."""
    nodes(1)
    monkeypatch.setattr(backend, "TOKEN", ".elsewhere")  # workers look for another
    out, address = tmp_path / "out", f"file://{tmp_path}/shared/mine"
    meddle(monkeypatch, lambda id: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(source, out, machines.address, Listener(), checkpoints=address)
    (stack,) = (path for path in out.glob("stacks/*") if any(path.glob("checkpoint*")))
    assert {path.name for path in stack.glob("checkpoint*")} == {POINTER}
    with pytest.raises(NanostudyError, match=f"not below any --checkpoints.* go on with --checkpoints {address}"):
        run(source, out, machines.address, Listener())  # an address may be anybody's
    store = CheckpointStore(address)
    task = TrainStack((), None, stack, 1, 1.0)
    store.end(task, Broken("error", "as before a split"), False)
    assert {path.name for path in stack.glob("checkpoint*")} == {"checkpoint.safetensors"}
    messages, original = [], Cluster._reports

    def reports(self, worker, message):
        messages.append(type(message))
        return original(self, worker, message)

    monkeypatch.setattr(Cluster, "_reports", reports)
    run(source, out, machines.address, Listener())
    assert_same_study(out, reference)
    sessions = [metadata(out / name)["sittings"] for name in experiments(reference)]
    assert max(one[-1]["after_update"] for one in sessions) > 0
    assert messages.count(Wanted) == len(SHAPES)
    assert Part in messages
    assert Kept not in messages
    assert [path for path in tmp_path.glob("shared/mine/**/*") if path.is_file()] == []


@pytest.mark.parametrize("there", ["../mine/", "/etc/", "elsewhere/", ""])
def test_no_checkpoint_is_fetched_or_deleted_elsewhere(tmp_path, there):
    """A stack's folder may come from anybody, and with it the address of its checkpoint."""
    keep = tmp_path / "mine" / ("a" * 32) / "thesis.txt"
    keep.parent.mkdir(parents=True)
    keep.write_text("mine")
    (tmp_path / "stack").mkdir()
    task = TrainStack((), None, tmp_path / "stack", 1, 1.0)
    name = f"{'a' * 32}/{'b' * 32}.safetensors" if there else f"file://{keep}"
    address = f"file://{tmp_path}/allowed"
    (task.folder / POINTER).write_text(f"{address}/{there}{name}" if there else name)
    for store in (CheckpointStore(address), CheckpointStore(None)):
        for action in (
            lambda s: s.begin(task),
            lambda s: s.end(task, Done(), False),
            lambda s: s.end(task, Broken("error", ""), False),
        ):
            with pytest.raises(NanostudyError, match="not below"):
                action(store)
    (task.folder / POINTER).write_text(f"file://{tmp_path}/mine/{'a' * 32}/{'b' * 32}.safetensors")
    CheckpointStore(f"file://{tmp_path}/mine").end(task, Done(), False)  # ours: and only what we write is deleted
    assert keep.read_text() == "mine"


@linux_only
def test_ctrl_c_leaves_no_cluster_behind(source, tmp_path):
    """The one of this machine alone, which is started where no address is given."""
    pytest.importorskip("ray", reason="ray is not installed")
    argv = [*COMMAND, "study", "run", "--no-report", str(source), "--out", str(tmp_path / "out"), "--executor", "ray"]
    argv += ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--workers", "1"]
    mark = f"NANOSTUDY_TEST={tmp_path}"
    env = {**os.environ, "PYTHONPATH": SOURCES, "NANOSTUDY_TEST": str(tmp_path)}
    process = subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("[1/"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all its processes get it
    assert process.wait() == 130
    assert "Stopped. Everything is saved" in "".join(printed)
    assert not any(word in "".join(printed) for word in ("raylet", "Traceback", "WARNING")), printed

    def left() -> list[str]:
        processes = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (path / "environ").read_bytes():
                    processes.append((path / "cmdline").read_text())
            except OSError:
                continue
        return processes

    end = time.monotonic() + 60
    while left() and time.monotonic() < end:
        time.sleep(0.2)
    assert left() == []


# --- without a cluster


def test_without_ray_the_message_says_how_to_install_it(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["nanostudy", "study", "run", "--no-report", str(source), "--out", str(tmp_path / "o")]
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--executor", "ray"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "pip install 'nanostudy[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"executor": "workers", "address": "auto"}, "--address is for a cluster: add --executor ray"),
        ({"executor": "inline", "checkpoints": "s3://b"}, "--checkpoints is for a cluster: add --executor ray"),
        ({"executor": "ray", "checkpoints": "nowhere://b"}, "--checkpoints nowhere://b cannot be used"),
        ({"executor": "ray", "device": "cuda:1"}, "Ray chooses the devices"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(source, tmp_path, how, message):
    if how["executor"] == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    how = {"device": "cpu", **how}
    with pytest.raises(UsageError, match=message):
        api.run_study(source, tmp_path / "o", **how)
    assert not (tmp_path / "o").exists()


GIB = 2**30


@pytest.mark.parametrize(
    ("nodes", "requested", "share", "workers"),
    [
        ([{"CPU": 8}], {}, Share(1), 8),
        ([{"CPU": 8}], {"most": 3}, Share(2), 4),
        ([{"CPU": 8}], {"count": 2, "most": 1}, Share(4), 2),
        ([{"CPU": 8}, {"CPU": 2}], {"threads": 3}, Share(3), 2),
        ([{"CPU": 8}, {"CPU": 2}], {"most": 6}, Share(1), 10),
        (
            [{"CPU": 0}, {"CPU": 4, "memory": 8.0 * GIB}, {"CPU": 2, "memory": 3.0 * GIB}],
            {},
            Share(1, 0, int(1.2 * GIB)),
            6,
        ),
        (
            [{"CPU": 4, "memory": 4.0 * GIB}, {"CPU": 4, "memory": 1.0 * GIB}],
            {"threads": 2},
            Share(2, 0, int(0.4 * GIB)),
            4,
        ),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 64}], {"kind": "cuda"}, Share(1, 1), 4),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 8, "GPU": 1}], {"kind": "cuda", "count": 6, "threads": 2}, Share(2, 0.5), 6),
        ([{"CPU": 2, "GPU": 1}], {"kind": "cuda", "count": 3, "threads": 1}, Share(1, 1 / 3), 2),
        ([{"CPU": 1}], {"kind": "cuda"}, Share(1, 1), 0),
    ],
)
def test_the_share_of_a_node_that_a_worker_takes(nodes, requested, share, workers):
    requested = {"kind": "cpu", "threads": None, "count": None, "most": 100, **requested}
    assert share_out(nodes, **requested) == share
    assert sum(share.fit(node) for node in nodes) == workers


class OneNode:
    """A roster."""

    def alive(self) -> dict:
        return {"here": {"Resources": {"CPU": 1}}}

    def name(self, id: str | None) -> str:
        return f"node {id}"


def test_a_node_with_another_version_is_refused_at_the_start(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    nodes = Nodes(ray, OneNode(), Share(1), RESOURCES)
    inspected = {**nodes.expected, "numerics version": "99"}, None
    monkeypatch.setattr(Nodes, "_inspect", lambda self, id: self.inspections.update({"a look": id}))
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ray, "get", lambda ref: inspected)
    other = r"node here has other code or versions: numerics version 99 there, 1 here\. Install the same there"
    with pytest.raises(NanostudyError, match=other):
        nodes.inspect_all(None, 1)


def test_a_cluster_without_kernels_is_recorded_with_each_result(monkeypatch):
    """Workers are told to do without, so that none has other conditions: what they record says why."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    nodes = Nodes(ray, OneNode(), Share(1), replace(RESOURCES, compile="auto"))
    why = "kernels are not compiled, so this is slower than it could be: no C++ compiler is on the PATH"
    inspected = dict(nodes.expected), NodeInfo("a CPU", "fp32", None, False, (why,))
    monkeypatch.setattr(Nodes, "_inspect", lambda self, id: self.inspections.update({"a look": id}))
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ray, "get", lambda ref: inspected)
    _, notes = nodes.inspect_all(None, 1)
    assert why in notes
    assert nodes.each.compile == "no"
    made = Cluster(ray, False, nodes, None, 1, CheckpointStore(None))
    made.workers[0] = backend._Worker(None, None, "here", unread=1)
    machine = made._hand_on(0, Prepared(resolve(RESOURCES))).machine
    assert why in machine.as_dict()["notes"]


def test_why_a_worker_was_lost():
    ray = pytest.importorskip("ray", reason="ray is not installed")
    errors = ray.exceptions

    made = Cluster.__new__(Cluster)
    made.ray, made.nodes = ray, Nodes(ray, OneNode(), Share(1), RESOURCES)
    died = errors.ActorDiedError()
    for problem, node, cause in (
        (errors.OutOfMemoryError("Task was killed due to the node running low on memory."), "here", "died"),
        (died, "here", "died"),
        (died, "away", "lost"),
        (died, None, "died"),
        (errors.ActorUnavailableError("no way there", None), "here", "lost"),
        (errors.NodeDiedError("gone"), "here", "lost"),
        (errors.RayTaskError("pull", "", ValueError("a mistake of ours")), "here", "error"),
    ):
        assert made._broken(problem, node).cause == cause, problem
    assert "here" in made.nodes.avoided


def test_a_machine_is_described_where_it_is():
    """By a driver that has neither its GPU nor its compiler."""
    there = replace(resolve(RESOURCES), device=torch.device("cuda", 0), compiled=True, host="node7", system="Other-1.0")
    record = pickle.loads(pickle.dumps(there)).as_dict()
    assert (record["device"], record["host"], record["platform"], record["compiled"]) == (
        "cuda:0",
        "node7",
        "Other-1.0",
        True,
    )


# --- the far end, without Ray


@pytest.fixture
def task(source, tmp_path, corpus) -> TrainStack:
    from nanostudy.settings import Experiment

    settings = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "max_iters": 30}
    experiment = Experiment(**settings, eval_interval=30)
    return TrainStack((Job("a", experiment, "its identity"),), corpus, tmp_path, 1, 0.0)


def pulled(far: WorkerActor, until, stop: bool = False, most: int = 200) -> list:
    """The worker's messages, pulled as the driver pulls."""
    messages = []
    while not any(isinstance(one, until) for one in messages):
        messages += far.pull(stop)
        most -= 1
        assert most, "it never comes"
    return messages


def test_a_checkpoint_travels_in_parts_and_back(task, monkeypatch):
    monkeypatch.setattr("nanostudy.study.cluster.messages.PART", 10_000)
    far, driver = WorkerActor(1), task.path
    far.start(task, None, RESOURCES, "a token that is not there", None)
    assert isinstance(pulled(far, Wanted)[-1], Wanted)
    assert not list(task.folder.iterdir())
    far.take(Part(b"", 0, 0))
    keep, messages = CheckpointStore(None), []
    while not driver.exists():
        messages += (now := far.pull(False))
        for part in now:
            if isinstance(part, Part):
                assert len(part.data) <= 10_000
                keep.keep(task, part)
    assert sum(isinstance(one, Part) for one in messages) > 3
    pulled(far, Done, stop=True)  # saves and sends once more
    again = WorkerActor(1)
    again.start(task, None, RESOURCES, "a token that is not there", None)
    pulled(again, Wanted)
    for part in parts(driver):
        again.take(part)
    first = next(one for one in pulled(again, Done, stop=False) if hasattr(one, "evaluated_at"))
    assert first.step > 0
    cut = WorkerActor(1)
    cut.start(task, None, RESOURCES, "a token that is not there", None)
    pulled(cut, Wanted)
    one, _, third, *_ = parts(driver)
    cut.take(one)
    with pytest.raises(ValueError, match="is missing"):
        cut.take(third)
    assert cut.pull(False) == [], "what arrived in part is no reason to begin again"


def test_parts_of_two_checkpoints_are_not_put_together(tmp_path):
    path = tmp_path / "file"
    assert not append_part(path, Part(b"AAAA", 0, 8))
    assert not append_part(path, Part(b"BB", 0, 4))
    with pytest.raises(ValueError, match="before byte 4 is missing"):
        append_part(path, Part(b"BBBB", 4, 8))
    assert not path.exists()


def test_a_save_waits_for_the_pull_after_it_was_heard(task):
    """What was reported before a checkpoint is on the driver's disk before the checkpoint is."""
    far = WorkerActor(1)
    (task.folder / actor.TOKEN).write_text("the token")
    far.start(task, None, RESOURCES, "the token", None)
    assert isinstance(pulled(far, Saving)[-1], Saving)
    time.sleep(0.3)
    assert not task.path.exists()
    pulled(far, Done)
    assert task.path.exists()


def test_an_address_out_of_reach_is_reported_and_training_goes_on(task, tmp_path):
    (tmp_path / "file").write_text("no folder")
    far = WorkerActor(1)
    far.start(task, None, RESOURCES, "", AtAddress(f"file://{tmp_path}/file/home"))
    messages = pulled(far, Done)
    assert any("a checkpoint could not be kept at file://" in getattr(one, "text", "") for one in messages)
    folder = tmp_path / ("0" * 32)
    home = f"file://{folder}"
    far.start(task, None, RESOURCES, "", AtAddress(home, f"{home}/none.safetensors"))
    messages = pulled(far, Done)
    assert "training from the beginning" in messages[0].text
    kept = [one for one in messages if isinstance(one, Kept)]
    assert kept
    CheckpointStore(f"file://{tmp_path}").keep(task, kept[-1])
    assert [path.name for path in folder.iterdir()] == [kept[-1].address.rpartition("/")[2]], "the last alone"
    far.start(task, None, RESOURCES, "", AtAddress(home, kept[-1].address))
    first = next(one for one in pulled(far, Done) if hasattr(one, "evaluated_at"))
    assert first.step > 0
    keep = CheckpointStore(f"file://{tmp_path}")
    keep.end(task, Broken("memory", "too little"), False)
    assert task.path.exists(), "whoever takes the stack apart finds it in its folder"
    assert not folder.exists()


def test_a_text_is_no_part_of_a_task_that_travels(task):
    """It goes by reference: a node gets it once."""
    assert len(pickle.dumps(replace(task, corpus=None))) + len(task.corpus.train.tokens) < len(pickle.dumps(task))
