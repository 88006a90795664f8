"""A cell made ready on one rank: plans, inputs, buffers, and how one trial of any variant runs in it.

Legend: T rows on this rank, S step tokens, H heads, D head dim, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.names import Control, Device, Scope
from experiments.spec.arms import ArmSpec
from experiments.spec.fabric import PRESETS
from workers.digest import digest
from workers.fabrics import Fabric, make_fabric
from workers.fabrics.exchange import Exchange, ScheduleError, poison
from workers.fabrics.simulated import SimulatedFabric
from workers.fabrics.transport import CollectiveTransport
from workers.indexer import stages
from workers.indexer.indexer import Indexer, KeyCache, Shard
from workers.indexer.rope import RotaryTable, apply_rope
from workers.indexer.simulated import SimulatedIndexer
from workers.indexer.weights import IndexerWeights, checkpoint_weights, seeded_weights
from workers.inputs import InputPool
from workers.lanes import Lanes
from workers.lanes.simulated import SimulatedLanes
from workers.messages import PrepareCell, Variant
from workers.schedules import ScheduleFunction, resolve_schedule, serial
from workers.splits import plan
from workers.splits.plan import CausalRanges, GatherPlan, causal_ranges

POISON_BYTE = 0x7F
"""e4m3fn's NaN."""


@dataclass(frozen=True)
class PreparedStep:
    """One step on one rank."""

    plan: GatherPlan
    ranges: CausalRanges
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    out_SD: torch.Tensor
    """Destination of the gather, poisoned before every run."""


@dataclass(frozen=True)
class Correct:
    """What `serial` makes of one (step, input): its digests, and the gathered keys for the controls."""

    q: int
    k: int
    k_SD: torch.Tensor


@dataclass(frozen=True)
class Selected:
    """Digests of the index keys and of the selections that `serial` makes of one (step, input)."""

    keys: int
    topk: int


@dataclass
class Outcome:
    """One run: what came out, and when.

    `q`, `k`, `topk` are None where the variant or the scope does not produce them. `digests` were taken when the schedule had returned,
    before the side lane was drained: a gather that nobody waited for shows as poison.
    """

    elapsed_us: float
    start_us: float
    exchange: Exchange
    fault: str | None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    topk: torch.Tensor | None = None
    digests: tuple[int, int] | None = None


class PreparedCell:
    """See the module. One per rank and cell; it runs trials, it does not judge them."""

    def __init__(self, request: PrepareCell, rank: int, lanes: Lanes, transport: CollectiveTransport) -> None:
        """
        Raises:
            SpecError: A schedule does not import, or a checkpoint does not fit.
        """
        cell = request.cell
        self.cell, self.rank, self.lanes, self.transport = cell, rank, lanes, transport
        self.is_simulated = cell.device is Device.SIMULATED
        self.schedules: dict[str, ScheduleFunction] = {name: resolve_schedule(arm.schedule) for name, arm in request.arms.items()}
        self.arms: dict[str, ArmSpec] = request.arms
        self.weights = self._load_weights(request)
        indexer = SimulatedIndexer if self.is_simulated else Indexer
        self.indexer = indexer(cell.dims, self.weights, lanes, request.verify.logits_mib)
        self.pool = InputPool(cell.dims, cell.steps, request.num_inputs, request.seed)
        if self.is_simulated:
            self.pool.x, self.pool.q_lora = self.pool.x.to("meta"), self.pool.q_lora.to("meta")
        self.fabric: Fabric = make_fabric(cell.fabric, transport)
        self._unpaced: Fabric = make_fabric(PRESETS["process_group"], transport)
        if self.is_simulated:
            assert isinstance(lanes, SimulatedLanes)
            self.fabric = self._unpaced = SimulatedFabric(request.simulation, lanes, transport)
        rope = RotaryTable(cell.dims)
        self.steps = [self._prepare_step(index, rope) for index in range(len(cell.steps))]
        self.rope = rope
        self._caches: dict[int, KeyCache] = {}
        self._correct: dict[tuple[int, int], Correct] = {}
        self.selected: dict[tuple[int, int], Selected] = {}
        self._next_input = 0

    def _load_weights(self, request: PrepareCell) -> IndexerWeights:
        if request.weights.checkpoint:
            return checkpoint_weights(request.weights.checkpoint, request.weights.layer, request.cell.dims)
        weights = seeded_weights(request.cell.dims, request.seed)
        if self.is_simulated:
            return IndexerWeights(**{name: tensor.to("meta") for name, tensor in vars(weights).items()})
        return weights

    def _prepare_step(self, index: int, rope: RotaryTable) -> PreparedStep:
        step, dims = self.cell.steps[index], self.cell.dims
        gather_plan, ranges = plan(self.cell.split, step, self.cell.cp_size, self.rank), causal_ranges(step)
        cos_TF, sin_TF = rope.cos_sin(ranges.positions_S[gather_plan.local_rows_T])
        device = "meta" if self.is_simulated else "cpu"
        out_SD = torch.empty(step.new_tokens, dims.head_dim, dtype=torch.bfloat16, device=device)
        return PreparedStep(gather_plan, ranges, cos_TF.to(device), sin_TF.to(device), out_SD)

    def next_input(self) -> int:
        """The input set of the next run; never the one of the run before. In step on all ranks, which run the same orders."""
        index = self._next_input
        self._next_input = (index + 1) % self.pool.num_inputs
        return index

    def shard(self, step: int, index: int) -> Shard:
        """What this rank brings to a step with input set `index`."""
        prepared = self.steps[step]
        rows = prepared.plan.local_rows_T
        return Shard(
            x_TX=self.pool.x_rows(rows, index),
            q_lora_TR=self.pool.q_lora_rows(rows, index),
            cos_TF=prepared.cos_TF,
            sin_TF=prepared.sin_TF,
            ks_T=prepared.ranges.ks_S[rows],
            ke_T=prepared.ranges.ke_S[rows],
        )

    def cache(self, step: int) -> KeyCache:
        """The step's key cache with its prefixes filled in; the step's own rows are poisoned."""
        if step not in self._caches:
            ranges, kv_tokens = self.steps[step].ranges, self.cell.steps[step].kv_tokens
            device = "meta" if self.is_simulated else "cpu"
            head_dim = self.cell.dims.head_dim
            values_ND = torch.zeros(kv_tokens, head_dim, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            cache = KeyCache(values_ND, torch.zeros(kv_tokens, device=device), ranges.packed_rows_S)
            if not self.is_simulated:
                self._fill_prefix(step, cache)
            self._caches[step] = cache
        cache = self._caches[step]
        if not self.is_simulated:
            cache.values_ND.view(torch.uint8)[cache.new_rows_S] = POISON_BYTE
            cache.scale_N[cache.new_rows_S] = float("nan")
        return cache

    def _fill_prefix(self, step: int, cache: KeyCache) -> None:
        rows, start = self.steps[step].ranges.prefix_rows, 0
        for positions, x in self.pool.prefix_chunks(self.cell.steps[step]):
            values, scale = stages.quantise_k(stages.hadamard(self._keys(x, positions)))
            target = rows[start : start + len(positions)]
            cache.values_ND.view(torch.uint8)[target] = values.view(torch.uint8)
            cache.scale_N[target] = scale
            start += len(positions)

    def _keys(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        w = self.weights
        k = stages.norm_k(stages.project(x, w.wk), w.k_norm_weight, w.k_norm_bias)
        return apply_rope(k, *self.rope.cos_sin(positions), self.cell.dims)

    def correct(self, step: int, index: int) -> Correct:
        """`serial` on that step and input over the unpaced links; made once. A collective: all ranks ask in the same order."""
        key = (step, index)
        if key not in self._correct:
            out_SD = torch.empty_like(self.steps[step].out_SD)
            exchange = Exchange(self._unpaced, self.lanes, self.steps[step].plan, out_SD, Control.NONE, None)
            q, k = serial(self.indexer, self.shard(step, index), exchange)
            self.lanes.drain()
            self._correct[key] = Correct(self._digest(q), self._digest(k), k)
        return self._correct[key]

    def finish_correct(self, step: int, index: int) -> torch.Tensor:
        """`serial`'s q and k of that input through top-k, into the step's cache: int32 [T, K]."""
        shard = self.shard(step, index)
        q, _ = self.indexer.project(shard)
        q = self.indexer.rotate(q)
        cache = self.cache(step)
        self.indexer.store_keys(self.correct(step, index).k_SD, cache)
        return self.indexer.select(q, shard, cache)

    def visible_keys(self, step: int) -> torch.Tensor:
        """int32 [T]: keys that each of the rank's rows sees, by its position in its request."""
        ranges = self.steps[step].ranges
        return (ranges.positions_S[self.steps[step].plan.local_rows_T] + 1).to(torch.int32)

    def stored_cache(self, step: int) -> KeyCache:
        """The step's cache as the last run left it."""
        return self._caches[step]

    def problem(self, outcome: Outcome, step: int, index: int) -> str | None:
        """Why a run is not right, if it is not: its contract, or the bits of q and k against `serial`'s."""
        if outcome.fault is not None or outcome.digests is None:
            return outcome.fault
        correct = self.correct(step, index)
        pairs = zip(("q", "k"), outcome.digests, (correct.q, correct.k), strict=True)
        wrong = [name for name, got, want in pairs if got != want]
        return f"{' and '.join(wrong)} of step {step}, input {index}: not the bits of serial" if wrong else None

    def run(self, variant: Variant, step: int, index: int, scope: Scope) -> Outcome:
        """One aligned run of a variant, timed from the barrier to the end of the scope.

        Raises:
            ScheduleError: The arm's schedule breaks the contract of a schedule.
        """
        prepared, control = self.steps[step], variant.control
        shard = self.shard(step, index)
        if not self.is_simulated:
            poison(prepared.out_SD)
        cache = self.cache(step) if scope is not Scope.QK else None
        needs_keys = control in (Control.PREFILLED, Control.ZERO_BYTE)
        correct_SD = self.correct(step, index).k_SD if needs_keys else None
        exchange = Exchange(self.fabric, self.lanes, prepared.plan, prepared.out_SD, control, correct_SD)
        if control is Control.GATHER_ALONE:
            return self._run_gather(exchange, shard)
        schedule = self.schedules[variant.arm]
        start_us = self._start_together()
        result = schedule(self.indexer, shard, exchange)
        q, k, topk = self._finish(result, prepared, shard, cache, scope)
        if wait_us := self.arms[variant.arm].planted_wait_us:
            self.lanes.busy_wait(wait_us)
        elapsed_us = self.lanes.now_us() - start_us
        digests = (self._digest(q), self._digest(k))
        self.lanes.drain()
        return Outcome(elapsed_us, start_us, exchange, exchange.fault(), q, k, topk, digests)

    def _start_together(self) -> float:
        """Both lanes idle, all ranks here, the last one late by the cell's skew; the time, us."""
        self.lanes.drain()
        if isinstance(self.lanes, SimulatedLanes):
            self.lanes.pass_until(max(self.transport.all_gather_us(self.lanes.now_us())))
        else:
            self.transport.barrier()
        if self.cell.skew_us and self.rank == self.cell.cp_size - 1:
            self.lanes.busy_wait(self.cell.skew_us)
        return self.lanes.now_us()

    def _run_gather(self, exchange: Exchange, shard: Shard) -> Outcome:
        _, k = self.indexer.project(shard)
        k = self.indexer.rotate(k)
        start_us = self._start_together()
        k = exchange.gather(k)
        return Outcome(self.lanes.now_us() - start_us, start_us, exchange, None, k=k)

    def _finish(
        self, result: object, prepared: PreparedStep, shard: Shard, cache: KeyCache | None, scope: Scope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What every schedule has in common after q and k."""
        if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(t, torch.Tensor) for t in result):
            raise ScheduleError(f"returns {type(result).__name__}; a schedule returns the tensors (q, k)")
        q, k = result
        expected_q = (shard.x_TX.shape[0], self.cell.dims.num_heads, self.cell.dims.head_dim)
        if q.shape != expected_q or k.shape != prepared.out_SD.shape:
            raise ScheduleError(
                f"returns q {list(q.shape)} and k {list(k.shape)}; expected {list(expected_q)} and {list(prepared.out_SD.shape)}"
            )
        topk = None
        if cache is not None:
            self.indexer.store_keys(k, cache)
            if scope is Scope.INDEXER:
                topk = self.indexer.select(q, shard, cache)
        return q, k, topk

    def _digest(self, tensor: torch.Tensor) -> int:
        return 0 if self.is_simulated else digest(tensor)
