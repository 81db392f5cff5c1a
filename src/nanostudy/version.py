"""What is counted when nanostudy changes."""

VERSION = "0.1.0"
NUMERICS = 1  # the same settings would train to other numbers than before; part of every identity
FORMAT = 1  # of every file that a run folder holds
