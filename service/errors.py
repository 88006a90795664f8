"""Failures that are nobody's mistake, and the exit codes of every command."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit code says. `ray job submit` flattens them to 0 and 1."""

    FINE = 0
    REGRESSION = 1
    USER_ERROR = 2
    INVALID = 3
    """An arm is wrong, or not enough was measured."""
    INFRASTRUCTURE = 4


class InfrastructureError(Exception):
    """A cluster, a rank or a store that failed. The command line prints it in one line and exits with 4."""


class SweepKilledError(BaseException):
    """SIGTERM or Ctrl-C: the sweep ends here and now. Not an Exception, so that nothing on the way takes it for a failure."""
