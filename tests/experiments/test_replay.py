"""Replays: every prompt token is cached or computed exactly once, within the limits, in an engine's order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments.errors import SpecError
from experiments.workload.prefix_cache import PrefixCache
from experiments.workload.replay import Cap, Chunk, Prefill, Replay, TraceWorkload, hit_cache, pack
from experiments.workload.step import Sequence
from experiments.workload.trace import Request

# In the shape of Mooncake's conversation trace: a system prompt that all share (block 0), a conversation that comes back longer
# (the first and fifth line), partial last blocks, and one long prompt.
CONVERSATION: list[tuple[int, int, list[int]]] = [
    (0, 1300, [0, 1, 2]),
    (0, 700, [0, 3]),
    (3000, 20000, [0, *range(4, 43)]),
    (6000, 512, [0]),
    (9000, 2000, [0, 1, 43, 44]),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "conversation.jsonl"
    rows = [{"timestamp": t, "input_length": n, "output_length": 9, "hash_ids": ids} for t, n, ids in CONVERSATION]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def built(path: Path, **settings: Any) -> Replay:
    return TraceWorkload(trace=str(path), **settings).build()


def steps_of(replay: Replay) -> list[list[tuple[int, int]]]:
    return [[(s.prefix_tokens, s.new_tokens) for s in step.sequences] for step in replay.steps]


def test_requests_become_steps_with_their_hits_as_prefix(trace: Path) -> None:
    replay = built(trace)
    assert steps_of(replay) == [
        [(0, 1300)],
        [(512, 188)],
        [(512, 16384)],
        [(16896, 3104)],
        [(0, 512)],
        [(1024, 976)],
    ]
    assert (replay.num_requests, replay.prompt_tokens, replay.cached_tokens) == (5, 24512, 2048)
    assert replay.new_tokens == 22464 == sum(step.new_tokens for step in replay.steps)
    assert replay.scale == 1.0
    assert replay.source_sha256 == hashlib.sha256(trace.read_bytes()).hexdigest()


def test_a_step_is_filled_with_those_that_follow(trace: Path) -> None:
    replay = built(trace, max_sequences=4, chunk_tokens=8192, step_tokens=8192)
    assert steps_of(replay) == [
        [(0, 1300)],  # The next one hits block 0, which this step computes.
        [(512, 188), (512, 8004)],
        [(8516, 8192)],
        [(16708, 3292), (0, 512), (1024, 976)],
    ]


def test_several_prompts_run_at_once_when_a_chunk_is_less_than_the_budget(trace: Path) -> None:
    replay = built(trace, max_sequences=3, chunk_tokens=1000, step_tokens=2500, cache_blocks=0)
    assert steps_of(replay)[:3] == [
        [(0, 1000), (0, 700), (0, 800)],
        [(1000, 300), (800, 1000), (0, 512)],
        [(1800, 1000), (0, 1000)],
    ]


def test_the_first_requests_alone(trace: Path) -> None:
    assert built(trace, requests=2).num_requests == 2
    assert steps_of(built(trace, requests=2)) == [[(0, 1300)], [(512, 188)]]


def test_a_bounded_cache_hits_less(trace: Path) -> None:
    assert built(trace, cache_blocks=1).cached_tokens == 3 * 512
    assert built(trace, cache_blocks=0).cached_tokens == 0


def test_a_cap_scales_every_length_by_one_factor(trace: Path) -> None:
    replay = built(trace, max_prompt_tokens=1000)
    assert replay.scale == 1000 / 20000
    assert steps_of(replay) == [
        [(0, 65)],
        [(26, 9)],
        [(26, 819)],  # A chunk of 16384 is scaled too, so the long prompt still takes two steps.
        [(845, 155)],
        [(0, 26)],
        [(51, 49)],
    ]
    assert (replay.prompt_tokens, replay.cached_tokens, replay.new_tokens) == (1226, 103, 1123)


def test_a_cap_scales_chunk_and_budget_alike(trace: Path) -> None:
    replay = built(trace, chunk_tokens=4000, step_tokens=5600, max_sequences=2, cache_blocks=0, max_prompt_tokens=1000)
    assert steps_of(replay)[:3] == [
        [(0, 65), (0, 35)],
        [(0, 200), (0, 26)],  # The chunk binds.
        [(200, 200), (0, 80)],  # The budget binds: 280.
    ]


def test_a_cap_above_the_longest_prompt_changes_nothing(trace: Path) -> None:
    assert built(trace, max_prompt_tokens=20000) == built(trace)
    assert built(trace, max_prompt_tokens=10**6) == built(trace)
    assert built(trace, requests=2, max_prompt_tokens=1300).scale == 1.0, "only prompts that are replayed count"


def test_a_csv_has_no_ids_and_so_no_hits(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,20000,5\n2023-11-16 18:17:04.03,100,8\n")
    replay = built(path)
    assert steps_of(replay) == [[(0, 16384)], [(16384, 3616)], [(0, 100)]]
    assert replay.cached_tokens == 0


def test_arrival_gives_the_order_and_nothing_else(tmp_path: Path) -> None:
    rows = [(9e9, 30), (0, 10), (5, 20)]
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{t},{n},1\n" for t, n in rows))
    assert steps_of(built(path)) == [[(0, 10)], [(0, 20)], [(0, 30)]]


def test_a_relative_trace_starts_at_the_base(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = TraceWorkload(trace=trace.name)
    assert workload.build(base_dir=trace.parent).num_requests == 5
    monkeypatch.chdir(trace.parent)
    assert workload.build().num_requests == 5


def test_without_a_trace_the_key_to_set_is_named() -> None:
    with pytest.raises(SpecError, match=r"--set workload\.trace=PATH"):
        TraceWorkload().build()


def test_a_malformed_line_is_named(trace: Path) -> None:
    trace.write_text(trace.read_text() + '{"timestamp": 1}\n')
    with pytest.raises(SpecError, match=r"workload\.trace: .*conversation\.jsonl:6: input_length is missing"):
        built(trace)


def test_a_budget_below_a_chunk_is_refused() -> None:
    with pytest.raises(SpecError, match=r"workload\.step_tokens: 4096 is below workload\.chunk_tokens, 16384"):
        TraceWorkload(step_tokens=4096)
    assert TraceWorkload(step_tokens=4096, chunk_tokens=4096).step_tokens == 4096


@pytest.mark.parametrize(
    "field", ["requests", "chunk_tokens", "step_tokens", "max_sequences", "block_tokens", "max_prompt_tokens"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_settings_are_whole_numbers_from_1(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        TraceWorkload.model_validate({field: value})


@pytest.mark.parametrize("content", [{"cache_blocks": -1}, {"cache_blocks": True}, {"chunk": 1}, {"kind": "grid"}, {"trace": 7}])
def test_other_settings_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TraceWorkload.model_validate(content)


def test_a_hit_waits_for_the_one_that_computes_it() -> None:
    prefills = [Prefill(30, 0), Prefill(15, 10, waits_for=0), Prefill(5, 0)]
    steps = pack(prefills, chunk_tokens=20, step_tokens=100, max_sequences=8)
    assert steps == [[Chunk(0, 0, 20)], [Chunk(0, 20, 10)], [Chunk(1, 10, 5), Chunk(2, 0, 5)]]


def test_who_computes_a_block_is_known() -> None:
    chains = [(0, 1, 2), (0, 1, 3), (0, 1), (0, 1, 3, 4), (0, 1, 5)]
    requests = [Request(0, 4 * len(ids), 1, ids) for ids in chains]
    prefills = hit_cache(requests, PrefixCache(4))
    assert [p.cached_tokens for p in prefills] == [0, 8, 4, 12, 8]
    assert [p.waits_for for p in prefills] == [None, 0, 0, 1, 0], "the third computes block 1 again, but it is there already"


@st.composite
def prefill_lists(draw: st.DrawFn) -> list[Prefill]:
    prefills: list[Prefill] = []
    for index in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, 60))
        cached = draw(st.integers(0, prompt - 1)) if index else 0
        prefills.append(Prefill(prompt, cached, draw(st.integers(0, index - 1)) if cached else None))
    return prefills


@given(prefills=prefill_lists(), chunk=st.integers(1, 25), extra=st.integers(0, 25), max_sequences=st.integers(1, 5))
@example(prefills=[Prefill(1, 0)], chunk=1, extra=0, max_sequences=1)
def test_every_token_is_cached_or_computed_once_in_order_and_within_the_limits(
    prefills: list[Prefill], chunk: int, extra: int, max_sequences: int
) -> None:
    budget = chunk + extra
    computed = [prefill.cached_tokens for prefill in prefills]
    finished_in: dict[int, int] = {}
    started: list[int] = []
    steps = pack(prefills, chunk, budget, max_sequences)
    for number, chunks in enumerate(steps):
        assert 1 <= len(chunks) <= max_sequences
        assert sum(c.new_tokens for c in chunks) <= budget
        assert len({c.request for c in chunks}) == len(chunks)
        for c in chunks:
            if c.request not in started:
                started.append(c.request)
                owner = prefills[c.request].waits_for
                assert owner is None or finished_in[owner] < number, "a prefix is cached before the step that uses it"
            assert 1 <= c.new_tokens <= chunk
            assert c.prefix_tokens == computed[c.request], "a chunk goes on where the last one ended"
            computed[c.request] += c.new_tokens
            if computed[c.request] == prefills[c.request].prompt_tokens:
                finished_in[c.request] = number
    assert computed == [prefill.prompt_tokens for prefill in prefills]
    assert started == list(range(len(prefills))), "first come, first served"


@given(prefills=prefill_lists(), chunk=st.integers(1, 25))
def test_one_sequence_a_step_takes_each_request_whole_before_the_next(prefills: list[Prefill], chunk: int) -> None:
    steps = pack(prefills, chunk, chunk, max_sequences=1)
    assert len(steps) == sum(-(-(p.prompt_tokens - p.cached_tokens) // chunk) for p in prefills)
    order = [c.request for chunks in steps for c in chunks]
    assert order == sorted(order)


@given(
    lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    cap=st.integers(1, 2 * 10**6),
    part=st.floats(0, 1, exclude_max=True),
    chunk=st.integers(1, 10**6),
)
def test_scaling_keeps_the_cap_the_order_and_something_to_compute(lengths: list[int], cap: int, part: float, chunk: int) -> None:
    scaling = Cap.of([Request(0, n, 0, None) for n in lengths], cap)
    scaled = [scaling.scaled(Prefill(n, int(part * n))) for n in lengths]
    assert max(p.prompt_tokens for p in scaled) == min(cap, max(lengths))
    assert all(0 <= p.cached_tokens < p.prompt_tokens for p in scaled)
    assert sorted(p.prompt_tokens for p in scaled) == [scaling.length(n) for n in sorted(lengths)]
    assert 1 <= scaling.length(chunk) <= scaling.length(chunk + 1)
    for n, p in zip(lengths, scaled, strict=True):
        assert abs(p.prompt_tokens - n * scaling.scale) <= 1
        assert abs(p.cached_tokens - int(part * n) * scaling.scale) <= 1.5


@st.composite
def traces(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows in Mooncake's form with blocks of 4 tokens, whose ids name whole prefixes."""
    names: dict[tuple[int, ...], int] = {}
    rows = []
    for text in draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=8)):
        ids = [names.setdefault(tuple(text[: end + 1]), len(names)) for end in range(len(text))]
        tokens = draw(st.integers(4 * len(ids) - 3, 4 * len(ids)))
        rows.append({"timestamp": draw(st.integers(0, 9)), "input_length": tokens, "output_length": 1, "hash_ids": ids})
    return rows


@given(
    rows=traces(),
    chunk=st.integers(1, 30),
    extra=st.integers(0, 30),
    max_sequences=st.integers(1, 4),
    cache_blocks=st.none() | st.integers(0, 6),
    cap=st.none() | st.integers(1, 30),
)
def test_a_replay_adds_up(
    tmp_path_factory: pytest.TempPathFactory,
    rows: Seq[dict[str, Any]],
    chunk: int,
    extra: int,
    max_sequences: int,
    cache_blocks: int | None,
    cap: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "replay.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = built(
        path,
        chunk_tokens=chunk,
        step_tokens=chunk + extra,
        max_sequences=max_sequences,
        cache_blocks=cache_blocks,
        max_prompt_tokens=cap,
        block_tokens=4,
    )
    sequences: list[Sequence] = [s for step in replay.steps for s in step.sequences]
    longest = max(row["input_length"] for row in rows)
    assert replay.num_requests == len(rows)
    assert sum(s.new_tokens for s in sequences) == replay.new_tokens == replay.prompt_tokens - replay.cached_tokens
    assert all(s.new_tokens >= 1 and s.prefix_tokens >= 0 for s in sequences)
    assert max(s.prefix_tokens + s.new_tokens for s in sequences) == min(longest, cap or longest)
    assert replay.scale == min(longest, cap or longest) / longest
    if replay.scale == 1.0:
        assert replay.prompt_tokens == sum(row["input_length"] for row in rows)
        assert replay.cached_tokens % 4 == 0
        assert max(step.new_tokens for step in replay.steps) <= chunk + extra
