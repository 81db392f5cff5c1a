"""What can go wrong in a way that a person can mend. The command line prints these without a traceback."""


class NanostudyError(Exception):
    """Something failed; the message says what to do next. Exit code 1."""


class UsageError(NanostudyError):
    """The request itself is wrong: a setting, a name, a value. Exit code 2."""


class OutOfMemory(NanostudyError):
    """The device's memory did not suffice."""


class DamagedCheckpoint(NanostudyError):
    """No checkpoint of a training is whole."""


class Interrupted(NanostudyError):
    """A person asked to stop; everything is saved."""


class RankLost(NanostudyError):
    """Another process of the same training has ended, or cannot be reached."""


class ToldElsewhere(NanostudyError):
    """Another process of the same training says what went wrong. This one ends without a word."""
