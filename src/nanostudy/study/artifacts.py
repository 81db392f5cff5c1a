"""What stays of trained models: the samples they write, and then the weights that the study keeps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.study.definition import kept_best
from nanostudy.study.folder import StudyFolder
from nanostudy.study.retry import Patience
from nanostudy.study.tasks import WriteSamples
from nanostudy.training.weights import load_weights

AT_ONCE = 2**28  # bytes of weights that write together: they travel to a worker
BYTES_A_PARAMETER = 4


def models_at_once(parameters: int) -> int:
    """That write together."""
    return max(1, AT_ONCE // (BYTES_A_PARAMETER * parameters))


class Keeping:
    """Models of one shape write together; their weights may go once their samples are on disk."""

    def __init__(self, folder: StudyFolder, patiently: Patience, say: Callable[[str, str], None]) -> None:
        self.folder, self.store, self.patiently, self.say = folder, folder.store, patiently, say
        self.waiting: deque[tuple[str, ...]] = deque()
        self.with_weights = set(self.store.results(sampled=True))

    def later(self, names: Iterable[str]) -> None:
        """Those of the names, all of one shape, that have not written yet will."""
        rows = self.patiently(lambda: self.store.rows(names=list(names)))
        left = [row.name for row in rows if not row.sampled]
        if left:
            at_once = models_at_once(rows[0].parameters)
            self.waiting.extend(tuple(left[i : i + at_once]) for i in range(0, len(left), at_once))

    def task(self, names: tuple[str, ...]) -> WriteSamples | None:
        """None where the weights cannot be read: these models do not write."""
        try:
            weights = self.patiently(lambda: tuple(load_weights(self.folder.run(name)) for name in names))
        except NanostudyError as problem:
            self.failed(names, str(problem))
            return None
        return WriteSamples(names, weights, self.folder.study.prompts, self.folder.study.sample_tokens)

    def keep(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            write_atomically(self.folder.run(name) / "sample.txt", text)
        self.store.sampled(texts)
        self.store.commit()
        self.with_weights.update(texts)
        self.drop_weights()

    def drop_weights(self) -> None:
        """Of the models that have written, leaves the weights that the study keeps."""
        keep = self.folder.study.keep
        dropped = {"all": (), "final": ("best",)}.get(keep, ("best", "last"))
        best = {row.name for row in self.store.best(kept_best(keep) or 0)}
        for name in self.with_weights - best:
            for which in dropped:
                (self.folder.run(name) / f"{which}.safetensors").unlink(missing_ok=True)
        self.with_weights &= best

    def failed(self, names: tuple[str, ...], reason: str) -> None:
        """Together: one after another. Alone: it is told, and the next sitting tries again."""
        if len(names) > 1:
            self.waiting.extend((name,) for name in names)
            return
        self.store.note("not sampled", reason, experiment=names[0])
        self.say(f"{names[0]} has no sample: {reason}", "yellow")
