"""What a user can get wrong, as exceptions: each names the value, the allowed ones and the key to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake the user can mend. The command line prints it in one line and exits with 2."""


class SpecError(UserError):
    """An experiment, a workload or an override that does not say what can be run."""


def unknown_name(kind: str, value: object, allowed: Iterable[object]) -> str:
    """What to say of a name outside a vocabulary.

    Args:
        kind: What the name stands for ("split", "schedule").
        value: What the user wrote.
        allowed: Every name that would have been understood.
    """
    names = sorted(str(name) for name in allowed)
    near = get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {value!r}{hint}; allowed: {', '.join(names)}"
