"""A grid of synthetic steps: every combination of prefix length, new tokens and number of sequences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from experiments.workload.step import Sequence, Step, Workload

# Bounds against a typo that would fill the memory while the steps are being listed; no real step comes near.
_MAX_TOKENS = 1 << 30
_MAX_SEQUENCES = 4096


_Tokens = Annotated[int, Field(le=_MAX_TOKENS, strict=True)]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One combination: `sequences` equal sequences of `prefix_tokens` cached and `new_tokens` to extend, each."""

    prefix_tokens: int
    new_tokens: int
    sequences: int

    @property
    def steps(self) -> Workload:
        """The one step that this point is."""
        return (Step((Sequence(self.prefix_tokens, self.new_tokens),) * self.sequences),)

    @property
    def label(self) -> str:
        """Readable and unique inside a grid: new4096, new4096x2 (two sequences), new4096-prefix8192."""
        times = f"x{self.sequences}" if self.sequences != 1 else ""
        prefix = f"-prefix{self.prefix_tokens}" if self.prefix_tokens else ""
        return f"new{self.new_tokens}{times}{prefix}"


class GridWorkload(BaseModel):
    """The axes of the grid; each takes one value or a list. Lengths are tokens of EACH sequence, not of the step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["grid"] = "grid"
    prefix_tokens: Annotated[tuple[Annotated[_Tokens, Field(ge=0)], ...], BeforeValidator(_listed)] = (0,)
    new_tokens: Annotated[tuple[Annotated[_Tokens, Field(ge=1)], ...], BeforeValidator(_listed)]
    sequences: Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_SEQUENCES, strict=True)], ...], BeforeValidator(_listed)] = (1,)

    @field_validator("prefix_tokens", "new_tokens", "sequences")
    @classmethod
    def _values_are_distinct(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values:
            raise ValueError("needs at least one value")
        if len(set(values)) != len(values):
            # A repeated value would be the same cell twice, and one's results would hide the other's.
            raise ValueError(f"has a value twice: {', '.join(map(str, values))}")
        return values

    def points(self) -> list[GridPoint]:
        """Every combination, in the order the values were written: new tokens slowest, then prefix, then sequences."""
        axes = itertools.product(self.new_tokens, self.prefix_tokens, self.sequences)
        return [GridPoint(prefix, new, sequences) for new, prefix, sequences in axes]
