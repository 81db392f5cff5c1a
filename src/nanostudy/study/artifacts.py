"""What a study keeps of its trained models: the samples that they write, and then the weights that `keep` names."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from nanostudy.errors import NanostudyError
from nanostudy.result import Result
from nanostudy.study.definition import kept_best
from nanostudy.study.folder import StudyFolder
from nanostudy.study.retry import Retry
from nanostudy.study.tasks import WriteSamples
from nanostudy.training.inputs import corpus_key
from nanostudy.training.samples import Sample, write_samples
from nanostudy.training.weights import load_weights

BYTES_AT_ONCE = 2**28  # the most weights that travel to a worker together
BYTES_PER_PARAMETER = 4


def models_at_once(parameters: int) -> int:
    """How many models of this size write together."""
    return max(1, BYTES_AT_ONCE // (BYTES_PER_PARAMETER * parameters))


class Artifacts:
    """Models of one shape write their samples together. Weights may be deleted once the samples are on disk."""

    def __init__(self, folder: StudyFolder, retry: Retry, say: Callable[[str, str], None]) -> None:
        self.folder, self.store, self.retry, self.say = folder, folder.store, retry, say
        self.study = folder.design.study
        self.waiting: deque[tuple[str, ...]] = deque()
        self.with_weights = set(self.store.results(sampled=True))

    def queue(self, names: Sequence[str]) -> None:
        """Queues the models that have a result and no samples yet."""
        alike: dict[object, list[Result]] = {}
        for row in self.retry(lambda: self.store.rows(names=names)):
            if row.status.has_result and not row.sampled:
                alike.setdefault((corpus_key(row.experiment), row.experiment.shape), []).append(row)
        for rows in alike.values():
            at_once = models_at_once(rows[0].parameters)
            same = [row.name for row in rows]
            self.waiting.extend(tuple(same[i : i + at_once]) for i in range(0, len(same), at_once))

    def task(self, names: tuple[str, ...]) -> WriteSamples | None:
        """None where the weights cannot be read, and so there will be no samples."""
        try:
            weights = self.retry(lambda: tuple(load_weights(self.folder.run(name)) for name in names))
        except NanostudyError as problem:
            self.failed(names, str(problem))
            return None
        return WriteSamples(names, weights, self.study.prompts, self.study.sample_tokens)

    def save(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        for name, written in samples.items():
            write_samples(self.folder.run(name), written, headings=True)
        self.store.sampled(samples)
        self.store.commit()
        self.with_weights.update(samples)
        self.delete_weights()

    def delete_weights(self) -> None:
        """Those of models with samples that the study does not keep."""
        keep = self.study.keep
        deleted = {"all": (), "final": ("best",)}.get(keep, ("best", "last"))
        best = {row.name for row in self.store.best(kept_best(keep) or 0)}
        for name in self.with_weights - best:
            for which in deleted:
                (self.folder.run(name) / f"{which}.safetensors").unlink(missing_ok=True)
        self.with_weights &= best

    def failed(self, names: tuple[str, ...], reason: str) -> None:
        """Models that failed together write one by one. One that fails alone has no samples until the next session."""
        if len(names) > 1:
            self.waiting.extend((name,) for name in names)
            return
        self.store.note("not sampled", reason, experiment=names[0])
        self.say(f"{names[0]} has no sample: {reason}", "yellow")
