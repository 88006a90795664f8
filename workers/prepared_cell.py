"""A cell made ready on one rank: plans, inputs, buffers, and how one trial of any variant runs in it.

A trial is a chain of layers: of one when drained, of several back to back when streaming.

Legend: T rows on this rank, S step tokens, H heads, D head dim, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from experiments.names import Control, Device, Regime, Scope
from experiments.spec.arms import ArmSpec
from experiments.spec.fabric import PRESETS
from workers.chain import carry
from workers.digest import digest
from workers.fabrics import Fabric, GatherTimes, make_fabric
from workers.fabrics.exchange import Exchange, ScheduleError, poison
from workers.fabrics.simulated import SimulatedFabric
from workers.fabrics.transport import CollectiveTransport
from workers.filler import Filler
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
LAYER_SEEDS = 1_000_003
"""Between the seeds of two layers; no launch's seed (they lie 7,919 apart) falls on one."""


@dataclass(frozen=True)
class PreparedStep:
    """One step on one rank."""

    plan: GatherPlan
    ranges: CausalRanges
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    outs_SD: tuple[torch.Tensor, ...]
    """Destination of each layer's gather, poisoned before every run."""


@dataclass(frozen=True)
class Correct:
    """What `serial` makes of one (step, input): the digests of the last layer, and every layer's gathered keys for the controls."""

    q: int
    k: int
    keys_SD: tuple[torch.Tensor, ...]


@dataclass
class LayersMade:
    """What the last of some layers returned, and what the first that broke its contract left undone."""

    q: torch.Tensor
    k: torch.Tensor
    topk: torch.Tensor | None
    fault: str | None
    filler_us: float
    """Of all layers together."""


@dataclass(frozen=True)
class Selected:
    """Digests of the index keys and of the selections that `serial` makes of one (step, input)."""

    keys: int
    topk: int


@dataclass
class Outcome:
    """One run: what came out of its last layer, and when. Times are means over its layers, us.

    `q`, `k`, `topk` are None where the variant or the scope does not produce them. `digests` were taken when the last schedule had returned,
    before the side lane was drained: a gather that nobody waited for shows as poison.
    """

    elapsed_us: float
    start_us: float
    exchanges: Sequence[Exchange]
    fault: str | None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    topk: torch.Tensor | None = None
    digests: tuple[int, int] | None = None
    filler_us: float | None = None
    enqueue_us: float | None = None
    """Host time to enqueue a layer; None where the host runs it itself."""

    @property
    def window_us(self) -> float:
        return fmean(exchange.window_us for exchange in self.exchanges)

    @property
    def times(self) -> GatherTimes | None:
        """None where no gather ran."""
        times = [exchange.times for exchange in self.exchanges if exchange.times is not None]
        if not times:
            return None
        return GatherTimes(**{name: fmean(getattr(t, name) for t in times) for name in vars(times[0])})


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
        indexer = SimulatedIndexer if self.is_simulated else Indexer
        self.layers = [
            indexer(cell.dims, self._load_weights(request, layer), lanes, request.verify.logits_mib)
            for layer in range(cell.layers)
        ]
        self.indexer, self.weights = self.layers[0], self.layers[0].weights
        self.pool = InputPool(cell.dims, cell.steps, request.num_inputs, request.seed)
        if self.is_simulated:
            self.pool.x, self.pool.q_lora = self.pool.x.to("meta"), self.pool.q_lora.to("meta")
        self.fabric: Fabric = make_fabric(cell.fabric, transport)
        self._unpaced: Fabric = make_fabric(PRESETS["process_group"], transport)
        if self.is_simulated:
            assert isinstance(lanes, SimulatedLanes)
            lanes.planted_us["filler"] = cell.filler_us
            self.fabric = self._unpaced = SimulatedFabric(request.simulation, lanes, transport)
        self._fill: Callable[[], None] | None = None
        if cell.filler_us:
            self._fill = (lambda: None) if self.is_simulated else Filler(cell.filler_us).run
        rope = RotaryTable(cell.dims)
        self.steps = [self._prepare_step(index, rope) for index in range(len(cell.steps))]
        self.rope = rope
        self._caches: dict[tuple[int, int], KeyCache] = {}
        self._correct: dict[tuple[int, int], Correct] = {}
        self.selected: dict[tuple[int, int], Selected] = {}
        self._next_input = 0

    def _load_weights(self, request: PrepareCell, layer: int) -> IndexerWeights:
        """Of the chain's layer: the checkpoint's layers from the stated one on, or seeds that no other layer has."""
        if request.weights.checkpoint:
            return checkpoint_weights(request.weights.checkpoint, request.weights.layer + layer, request.cell.dims)
        weights = seeded_weights(request.cell.dims, request.seed + LAYER_SEEDS * layer)
        if self.is_simulated:
            return IndexerWeights(**{name: tensor.to("meta") for name, tensor in vars(weights).items()})
        return weights

    def _prepare_step(self, index: int, rope: RotaryTable) -> PreparedStep:
        step, dims = self.cell.steps[index], self.cell.dims
        gather_plan, ranges = plan(self.cell.split, step, self.cell.cp_size, self.rank), causal_ranges(step)
        cos_TF, sin_TF = rope.cos_sin(ranges.positions_S[gather_plan.local_rows_T])
        device = "meta" if self.is_simulated else "cpu"
        outs_SD = tuple(
            torch.empty(step.new_tokens, dims.head_dim, dtype=torch.bfloat16, device=device) for _ in range(self.cell.layers)
        )
        return PreparedStep(gather_plan, ranges, cos_TF.to(device), sin_TF.to(device), outs_SD)

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

    def cache(self, step: int, layer: int = 0) -> KeyCache:
        """A layer's key cache of the step with its prefixes filled in; the step's own rows are poisoned."""
        if (step, layer) not in self._caches:
            ranges, kv_tokens = self.steps[step].ranges, self.cell.steps[step].kv_tokens
            device = "meta" if self.is_simulated else "cpu"
            head_dim = self.cell.dims.head_dim
            values_ND = torch.zeros(kv_tokens, head_dim, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            cache = KeyCache(values_ND, torch.zeros(kv_tokens, device=device), ranges.packed_rows_S)
            if not self.is_simulated:
                self._fill_prefix(step, cache, self.layers[layer].weights)
            self._caches[step, layer] = cache
        cache = self._caches[step, layer]
        if not self.is_simulated:
            cache.values_ND.view(torch.uint8)[cache.new_rows_S] = POISON_BYTE
            cache.scale_N[cache.new_rows_S] = float("nan")
        return cache

    def _fill_prefix(self, step: int, cache: KeyCache, weights: IndexerWeights) -> None:
        rows, start = self.steps[step].ranges.prefix_rows, 0
        for positions, x in self.pool.prefix_chunks(self.cell.steps[step]):
            values, scale = stages.quantise_k(stages.hadamard(self._keys(x, positions, weights)))
            target = rows[start : start + len(positions)]
            cache.values_ND.view(torch.uint8)[target] = values.view(torch.uint8)
            cache.scale_N[target] = scale
            start += len(positions)

    def _keys(self, x: torch.Tensor, positions: torch.Tensor, w: IndexerWeights) -> torch.Tensor:
        k = stages.norm_k(stages.project(x, w.wk), w.k_norm_weight, w.k_norm_bias)
        return apply_rope(k, *self.rope.cos_sin(positions), self.cell.dims)

    def correct(self, step: int, index: int) -> Correct:
        """`serial` on that step and input over the unpaced links; made once. A collective: all ranks ask in the same order."""
        key = (step, index)
        if key not in self._correct:
            prepared = self.steps[step]
            outs_SD = tuple(torch.empty_like(out_SD) for out_SD in prepared.outs_SD)
            exchanges = [Exchange(self._unpaced, self.lanes, prepared.plan, out_SD, Control.NONE, None) for out_SD in outs_SD]
            made = self._run_layers(serial, prepared, self.shard(step, index), exchanges, None, Scope.QK)
            self.lanes.drain()
            self._correct[key] = Correct(self._digest(made.q), self._digest(made.k), outs_SD)
        return self._correct[key]

    def finish_correct(self, step: int, index: int, num_layers: int | None = None) -> torch.Tensor:
        """`serial` on that input through top-k, into the step's caches: int32 [T, K] of the last layer, or of the last of `num_layers`."""
        prepared = self.steps[step]
        exchanges = self._exchanges(self._unpaced, Control.PREFILLED, step, index)[:num_layers]
        made = self._run_layers(serial, prepared, self.shard(step, index), exchanges, self._caches_of(step), Scope.INDEXER)
        assert made.topk is not None
        return made.topk

    def visible_keys(self, step: int) -> torch.Tensor:
        """int32 [T]: keys that each of the rank's rows sees, by its position in its request."""
        ranges = self.steps[step].ranges
        return (ranges.positions_S[self.steps[step].plan.local_rows_T] + 1).to(torch.int32)

    def stored_cache(self, step: int) -> KeyCache:
        """The last layer's cache of the step as the last run left it."""
        return self._caches[step, self.cell.layers - 1]

    def problem(self, outcome: Outcome, step: int, index: int) -> str | None:
        """Why a run is not right, if it is not: its contract, or the bits of q and k against `serial`'s; of the last layer of a chain."""
        if outcome.fault is not None or outcome.digests is None:
            return outcome.fault
        correct = self.correct(step, index)
        pairs = zip(("q", "k"), outcome.digests, (correct.q, correct.k), strict=True)
        wrong = [name for name, got, want in pairs if got != want]
        where = f" (last of {self.cell.layers} layers)" if self.is_chain else ""
        return f"{' and '.join(wrong)} of step {step}, input {index}: not the bits of serial{where}" if wrong else None

    @property
    def is_chain(self) -> bool:
        return self.cell.regime is Regime.STREAMING

    def run(self, variant: Variant, step: int, index: int, scope: Scope) -> Outcome:
        """One trial of a variant: all ranks start together, and it is timed to the end of the last layer's scope.

        Raises:
            ScheduleError: The arm's schedule breaks the contract of a schedule.
        """
        prepared = self.steps[step]
        shard = self.shard(step, index)
        if not self.is_simulated:
            for out_SD in prepared.outs_SD:
                poison(out_SD)
        caches = self._caches_of(step) if scope is not Scope.QK else None
        exchanges = self._exchanges(self.fabric, variant.control, step, index)
        if variant.control is Control.GATHER_ALONE:
            return self._run_gathers(exchanges, shard)
        schedule, wait_us = self.schedules[variant.arm], self.arms[variant.arm].planted_wait_us
        start_us, host_us = self._start_together(), self.lanes.host_us()
        made = self._run_layers(schedule, prepared, shard, exchanges, caches, scope, wait_us, self._fill)
        host_end_us, end_us = self.lanes.host_us(), self.lanes.now_us()
        digests = (self._digest(made.q), self._digest(made.k))
        self.lanes.drain()
        layers = self.cell.layers
        return Outcome(
            elapsed_us=(end_us - start_us) / layers,
            start_us=start_us,
            exchanges=exchanges,
            fault=made.fault,
            q=made.q,
            k=made.k,
            topk=made.topk,
            digests=digests,
            filler_us=made.filler_us / layers if self._fill is not None else None,
            enqueue_us=(host_end_us - host_us) / layers if host_us is not None and host_end_us is not None else None,
        )

    def _exchanges(self, fabric: Fabric, control: Control, step: int, index: int) -> list[Exchange]:
        """One for each layer."""
        prepared = self.steps[step]
        needs_keys = control in (Control.PREFILLED, Control.ZERO_BYTE)
        keys = self.correct(step, index).keys_SD if needs_keys else [None] * self.cell.layers
        pairs = zip(prepared.outs_SD, keys, strict=True)
        return [Exchange(fabric, self.lanes, prepared.plan, out_SD, control, correct_SD) for out_SD, correct_SD in pairs]

    def _caches_of(self, step: int) -> list[KeyCache]:
        return [self.cache(step, layer) for layer in range(self.cell.layers)]

    def _start_together(self) -> float:
        """Both lanes idle, all ranks here, the last one late by the cell's skew; the time, us."""
        self.lanes.drain()
        self.lanes.meet(self.transport)
        if self.cell.skew_us and self.rank == self.cell.cp_size - 1:
            self.lanes.busy_wait(self.cell.skew_us)
        return self.lanes.now_us()

    def _run_gathers(self, exchanges: Sequence[Exchange], shard: Shard) -> Outcome:
        """The gathers alone, back to back, each of its own layer's keys of the first layer's inputs."""
        keys = [layer.rotate(layer.project(shard)[1]) for layer in self.layers]
        start_us = self._start_together()
        for exchange, k in zip(exchanges, keys, strict=True):
            gathered = exchange.gather(k)
        elapsed_us = (self.lanes.now_us() - start_us) / len(keys)
        return Outcome(elapsed_us, start_us, exchanges, None, k=gathered)

    def _run_layers(
        self,
        schedule: ScheduleFunction,
        prepared: PreparedStep,
        shard: Shard,
        exchanges: Sequence[Exchange],
        caches: Sequence[KeyCache] | None,
        scope: Scope,
        wait_us: float = 0.0,
        fill: Callable[[], None] | None = None,
    ) -> LayersMade:
        """As many layers as there are exchanges, each on what the one before it made; no rank waits between them but in its gathers."""
        fault, filler_us = None, 0.0
        for number, exchange in enumerate(exchanges):
            layer, cache = self.layers[number], caches[number] if caches is not None else None
            result = schedule(layer, shard, exchange)
            # Asked at once: a gather that the next layer joins was not joined in time.
            if fault is None and (undone := exchange.fault()) is not None:
                fault = f"layer {number}: {undone}" if self.is_chain else undone
            q, k, topk = self._finish(layer, result, prepared, shard, cache, scope)
            if wait_us:
                self.lanes.busy_wait(wait_us)
            if fill is not None:
                began_us = self.lanes.now_us()
                self.lanes.stage("filler", fill)
                filler_us += self.lanes.now_us() - began_us
            if self.is_chain:
                shard = self.lanes.stage("carry", carry, shard, q, k)
        return LayersMade(q, k, topk, fault, filler_us)

    def _finish(
        self, layer: Indexer, result: object, prepared: PreparedStep, shard: Shard, cache: KeyCache | None, scope: Scope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What every schedule has in common after q and k."""
        if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(t, torch.Tensor) for t in result):
            raise ScheduleError(f"returns {type(result).__name__}; a schedule returns the tensors (q, k)")
        q, k = result
        expected_q = (shard.x_TX.shape[0], self.cell.dims.num_heads, self.cell.dims.head_dim)
        if q.shape != expected_q or k.shape != prepared.outs_SD[0].shape:
            raise ScheduleError(
                f"returns q {list(q.shape)} and k {list(k.shape)}; expected {list(expected_q)} and {list(prepared.outs_SD[0].shape)}"
            )
        topk = None
        if cache is not None:
            layer.store_keys(k, cache)
            if scope is Scope.INDEXER:
                topk = layer.select(q, shard, cache)
        return q, k, topk

    def _digest(self, tensor: torch.Tensor) -> int:
        return 0 if self.is_simulated else digest(tensor)
