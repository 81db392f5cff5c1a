"""Everything that can go wrong in a way that a person can mend. The command line prints these without a traceback."""


class NanostudyError(Exception):
    """Something failed; the message says what to do next. Exit code 1."""


class UsageError(NanostudyError):
    """The request itself is wrong: a setting, a name, a value. Exit code 2."""


class OutOfMemory(NanostudyError):
    """The device ran out of memory."""


class KernelsUnavailable(NanostudyError):
    """This machine cannot build compiled kernels. Training works without them, more slowly."""


class DamagedCheckpoint(NanostudyError):
    """A training has no undamaged checkpoint."""


class DamagedRun(NanostudyError):
    """A run folder's files are damaged or contradict each other; its result does not count."""


class Interrupted(NanostudyError):
    """A person asked to stop; everything is saved."""


class RankLost(NanostudyError):
    """Another process of the same training has ended or cannot be reached."""


class ReportedElsewhere(NanostudyError):
    """Another process of the same training reports what went wrong. This one ends silently."""


def error_line(problem: Exception) -> str:
    """The most telling line of a compiler's or a library's error: the first that says "error", else the last."""
    lines = (getattr(problem, "stderr", None) or str(problem)).strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else str(problem))
