"""How a command ends: results and failures as exit codes, and one line on stderr."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from experiments.errors import UserError
from service.errors import ExitCode, InfrastructureError, SweepKilledError

P = ParamSpec("P")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def exits(command: Callable[P, ExitCode]) -> Callable[P, None]:
    """Turns results and failures into exit codes: one line on stderr, never a traceback for what a user can mend."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except UserError as error:
            complain("error", error)
            code = ExitCode.USER_ERROR
        except InfrastructureError as error:
            complain("failed", error)
            code = ExitCode.INFRASTRUCTURE
        except SweepKilledError as error:
            complain("killed", error)
            code = ExitCode.INFRASTRUCTURE
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
            complain("failed", "nobody reads its output any more")
            code = ExitCode.INFRASTRUCTURE
        except Exception as error:  # a bug of ours: never exit code 1, which says "regression"
            if not (isinstance(error, OSError) and error.errno in NO_ROOM):  # a full disk is no bug
                traceback.print_exc()
            complain("failed", error)
            code = ExitCode.INFRASTRUCTURE
        raise typer.Exit(int(code))

    return run


def complain(word: str, error: BaseException | str) -> None:
    print(f"cplab: {word}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
