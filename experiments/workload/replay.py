"""A request trace as prefill steps: prefix-cache hits, then chunked prefill under a token budget per step.

The replay is closed-loop: timestamps give the order of the requests and nothing else, and the steps run as fast as the ranks go.
Decode steps are left out, as context parallelism is for prefill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.errors import SpecError
from experiments.workload.prefix_cache import PrefixCache
from experiments.workload.step import Sequence, Step, Workload
from experiments.workload.trace import TRACE_BLOCK_TOKENS, Request, read_trace


@dataclass(frozen=True, slots=True)
class Replay:
    """The steps, and what they came from. Token counts are those that run: after scaling, when there is any."""

    steps: Workload
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that hit the prefix cache; `prompt_tokens` = `cached_tokens` + `new_tokens`."""
    new_tokens: int
    scale: float
    """The one factor on every length, 1.0 when nothing was scaled."""
    source_sha256: str
    """Of the trace file's bytes, all of them."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a request asks of the ranks."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, already cached when it starts; fewer than `prompt_tokens`."""
    waits_for: int | None = None
    """The latest request that computes a block which this one hits; it must have finished in an earlier step."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a request in one step: `prefix_tokens` before it (hits and earlier chunks), `new_tokens` in it."""

    request: int
    prefix_tokens: int
    new_tokens: int


class TraceWorkload(BaseModel):
    """A trace file, and the engine settings that turn its requests into steps. Lengths are in tokens before scaling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["trace"] = "trace"
    trace: str | None = None
    """Path of a JSONL or CSV trace. None describes a replay that cannot run yet: the user brings the trace."""
    requests: int | None = Field(default=None, ge=1, strict=True)
    """At most this many, from the file's start; None: all."""
    chunk_tokens: int = Field(default=16384, ge=1, strict=True)
    """Chunked prefill: the most new tokens of one sequence in a step."""
    step_tokens: int = Field(default=16384, ge=1, strict=True)
    """Budget: the most new tokens of a step, all its sequences together. At least `chunk_tokens`."""
    max_sequences: int = Field(default=1, ge=1, strict=True)
    """The most sequences in a step."""
    cache_blocks: int | None = Field(default=None, ge=0, strict=True)
    """Blocks that the prefix cache holds; None has no bound, 0 is no cache."""
    block_tokens: int = Field(default=TRACE_BLOCK_TOKENS, ge=1, strict=True)
    """Prompt tokens that one block id of the trace covers."""
    max_prompt_tokens: int | None = Field(default=None, ge=1, strict=True)
    """A stated cap: when the longest prompt replayed exceeds it, prompts, hits, chunk and budget are all scaled by cap / longest,
    so that the load keeps its shape."""

    @model_validator(mode="after")
    def _a_chunk_fits_a_step(self) -> Self:
        if self.step_tokens < self.chunk_tokens:
            raise SpecError(
                f"workload.step_tokens: {self.step_tokens} is below workload.chunk_tokens, {self.chunk_tokens}, so no chunk could"
                " be whole; raise step_tokens or lower chunk_tokens"
            )
        return self

    def build(self, base_dir: Path | str | None = None) -> Replay:
        """Reads the trace and lays out its steps.

        Args:
            base_dir: Where a relative path starts; None: the working directory.

        Raises:
            SpecError: No trace was given, or it cannot be read; names file and line.
        """
        if self.trace is None:
            raise SpecError(
                "workload.trace: a replay needs a request trace (JSONL or CSV); give it with --set workload.trace=PATH"
            )
        path = Path(base_dir or "", self.trace)
        requests = read_trace(path, self.requests, self.block_tokens)
        cap = Cap.of(requests, self.max_prompt_tokens)
        prefills = [cap.scaled(p) for p in hit_cache(requests, PrefixCache(self.block_tokens, self.cache_blocks))]
        packed = pack(prefills, cap.length(self.chunk_tokens), cap.length(self.step_tokens), self.max_sequences)
        prompt_tokens = sum(p.prompt_tokens for p in prefills)
        cached_tokens = sum(p.cached_tokens for p in prefills)
        return Replay(
            steps=tuple(Step(tuple(Sequence(chunk.prefix_tokens, chunk.new_tokens) for chunk in chunks)) for chunks in packed),
            num_requests=len(requests),
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            new_tokens=prompt_tokens - cached_tokens,
            scale=cap.scale,
            source_sha256=_sha256(path),
        )


@dataclass(frozen=True, slots=True)
class Cap:
    """The factor `kept_tokens` / `of_tokens` on every length of a replay, in whole numbers so that it rounds alike everywhere."""

    kept_tokens: int
    of_tokens: int

    @classmethod
    def of(cls, requests: Seq[Request], max_prompt_tokens: int | None) -> Self:
        """The factor that brings the longest prompt down to the cap; 1 when there is none or every prompt is within it."""
        longest = max(request.input_tokens for request in requests)
        return cls(min(longest, max_prompt_tokens or longest), longest)

    @property
    def scale(self) -> float:
        return self.kept_tokens / self.of_tokens

    def length(self, tokens: int) -> int:
        """That many tokens scaled, half rounded up, and never below 1."""
        return max(1, (2 * tokens * self.kept_tokens + self.of_tokens) // (2 * self.of_tokens))

    def scaled(self, prefill: Prefill) -> Prefill:
        """The prefill with both lengths scaled, and at least one token left to compute."""
        prompt = self.length(prefill.prompt_tokens)
        cached = min(self.length(prefill.cached_tokens), prompt - 1) if prefill.cached_tokens else 0
        return Prefill(prompt, cached, prefill.waits_for)


def hit_cache(requests: Seq[Request], cache: PrefixCache) -> list[Prefill]:
    """What the cache leaves of each request, in arrival order: a request sees what every earlier one left there."""
    prefills: list[Prefill] = []
    computed_by: dict[int, int] = {}
    for index, request in enumerate(requests):
        ids = request.block_ids or ()
        hits = cache.hit_blocks(request.input_tokens, ids)
        waits_for = max((computed_by[block_id] for block_id in ids[:hits]), default=None)
        # Not ids[hits:]: a block that is cached and computed again, for want of another token to compute, is there already.
        computed_by.update(dict.fromkeys(ids[cache.leading_blocks(ids) :], index))
        cache.insert(request.input_tokens, ids)
        prefills.append(Prefill(request.input_tokens, hits * cache.block_tokens, waits_for))
    return prefills


def pack(prefills: Seq[Prefill], chunk_tokens: int, step_tokens: int, max_sequences: int) -> list[list[Chunk]]:
    """The chunks of each step: first come, first served, as chunked-prefill engines do.

    A step goes on with the requests already started, in their order, then starts the next ones while it has budget and room for
    another sequence. The last chunk of a step is cut to what the budget leaves. A request that hits blocks of another waits until
    that one's keys are in the cache, and those behind it wait too.
    """
    steps: list[list[Chunk]] = []
    computed = [prefill.cached_tokens for prefill in prefills]
    running: list[int] = []
    upcoming = 0
    while running or upcoming < len(prefills):
        chunks: list[Chunk] = []
        budget = step_tokens
        in_flight = list(running)
        position = 0
        while budget and len(chunks) < max_sequences:
            if position == len(in_flight):
                # What is in flight as the step begins or starts in it is cached only after the step.
                if upcoming == len(prefills) or prefills[upcoming].waits_for in in_flight:
                    break
                in_flight.append(upcoming)
                upcoming += 1
            index = in_flight[position]
            position += 1
            new_tokens = min(chunk_tokens, budget, prefills[index].prompt_tokens - computed[index])
            chunks.append(Chunk(index, computed[index], new_tokens))
            computed[index] += new_tokens
            budget -= new_tokens
        running = [index for index in in_flight if computed[index] < prefills[index].prompt_tokens]
        steps.append(chunks)
    return steps


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
