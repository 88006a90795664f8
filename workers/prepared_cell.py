"""A cell made ready on one rank: plans, inputs, buffers, and how one trial of any variant runs in it.

A trial is a chain of layers: of one when drained, of several back to back when streaming.

Legend: T rows on this rank, S step tokens, H heads, D head dim, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from experiments.names import BASELINE_ARM, Control, Device, Execution, FabricKind, Payload, Regime, Scope
from experiments.spec.arms import ArmSpec
from experiments.spec.fabric import PRESETS
from workers.chain import carry
from workers.digest import digest
from workers.fabrics import Fabric, by_transport, make_fabric
from workers.fabrics.exchange import Exchange, ScheduleError, poison
from workers.fabrics.one_rank import OneRankFabric, PlayedGather
from workers.fabrics.simulated import SimulatedFabric
from workers.fabrics.transport import CollectiveTransport
from workers.filler import Filler
from workers.indexer.indexer import Indexer, KeyCache, Shard
from workers.indexer.rope import RotaryTable
from workers.indexer.stage_sets import StageSettings, make_indexer
from workers.indexer.weights import IndexerWeights, checkpoint_weights, seeded_weights
from workers.inputs import InputPool
from workers.key_caches import KeyCaches
from workers.lanes import Lanes, Mark
from workers.lanes.simulated import SimulatedLanes
from workers.messages import PrepareCell, Variant
from workers.outcome import Correct, LayersMade, Outcome, Selected, mean_times
from workers.prepared_step import PreparedStep, prepare_step
from workers.schedules import ScheduleFunction, resolve_schedule, serial
from workers.splits import plan

LAYER_SEEDS = 1_000_003
"""Between the seeds of two layers; no launch's seed (they lie 7,919 apart) falls on one."""


class Trial(NamedTuple):
    """One run of a variant, ready to be enqueued."""

    enqueue: Callable[[], LayersMade]
    exchanges: list[Exchange]


class PreparedCell:
    """See the module. One per rank and cell; it runs trials, it does not judge them."""

    def __init__(self, request: PrepareCell, rank: int, lanes: Lanes, transport: CollectiveTransport) -> None:
        """
        Raises:
            SpecError: A schedule does not import, or a checkpoint does not fit.
        """
        cell = request.cell
        self.cell, self.rank, self.lanes, self.transport = cell, rank, lanes, transport
        if cell.fabric.kind is FabricKind.ONE_RANK:
            self.rank = cell.fabric.played_rank(cell.cp_size)
        self.is_simulated, self.device = cell.device is Device.SIMULATED, lanes.device
        self.schedules: dict[str, ScheduleFunction] = {name: resolve_schedule(arm.schedule) for name, arm in request.arms.items()}
        self.arms: dict[str, ArmSpec] = request.arms
        self.payloads = {Payload.BF16, *(arm.payload for arm in request.arms.values())}
        self.settings_of = {name: StageSettings.of(arm, self.is_chain) for name, arm in request.arms.items()}
        self.all_settings = list(dict.fromkeys([self.settings_of[BASELINE_ARM], *self.settings_of.values()]))
        """The baseline's first."""
        weights = [self._load_weights(request, layer) for layer in range(cell.layers)]
        self.weights = weights[0]
        self.layers: dict[StageSettings, list[Indexer]] = {
            settings: [make_indexer(settings, cell.dims, layer, lanes) for layer in weights]
            for settings in {either for s in self.all_settings for either in (s, s.unchained)}
        }
        self.pool = InputPool(cell.dims, cell.steps, request.num_inputs, request.seed, self.device)
        self.one_rank: OneRankFabric | None = None
        if self.is_simulated:
            assert isinstance(lanes, SimulatedLanes)
            lanes.planted_us["filler"] = cell.filler_us
            self.fabric: Fabric = SimulatedFabric(request.simulation, lanes, transport)
            self._unpaced: Fabric = self.fabric
        else:
            self.fabric = make_fabric(cell.fabric, transport, lanes)
            self._unpaced = make_fabric(PRESETS["process_group"], transport, lanes)
        self.fabrics = by_transport(self.fabric, {arm.transport for arm in request.arms.values()})
        if isinstance(self.fabric, OneRankFabric):
            self.one_rank = self.fabric
        self._fill: Callable[[], None] | None = None
        if cell.filler_us:
            self._fill = (lambda: None) if self.is_simulated else Filler(cell.filler_us, lanes).run
        rope = RotaryTable(cell.dims)
        bytes_per_logit = self.layers[self.all_settings[0]][0].ops.bytes_per_logit(cell.dims.num_heads)
        self.steps = [
            prepare_step(cell, index, self.rank, rope, self.device, self.payloads, bytes_per_logit, request.verify.logits_mib)
            for index in range(len(cell.steps))
        ]
        self.rope = rope
        self._caches = KeyCaches(cell, self.steps, self.pool, rope, self.layers[self.all_settings[0]], self.device)
        self._correct: dict[tuple[StageSettings, int, int], Correct] = {}
        self.selected: dict[tuple[StageSettings, int, int], Selected] = {}
        self._next_input = 0
        self.graphs: dict[tuple[Variant, int, int, Scope], Trial] = {}

    def _load_weights(self, request: PrepareCell, layer: int) -> IndexerWeights:
        """Of the chain's layer: the checkpoint's layers from the stated one on, or seeds that no other layer has."""
        if request.weights.checkpoint:
            weights = checkpoint_weights(request.weights.checkpoint, request.weights.layer + layer, request.cell.dims)
        else:
            weights = seeded_weights(request.cell.dims, request.seed + LAYER_SEEDS * layer)
        return IndexerWeights(**{name: tensor.to(self.device) for name, tensor in vars(weights).items()})

    def next_input(self) -> int:
        """The input set of the next run; never the one of the run before. In step on all ranks, which run the same orders."""
        index = self._next_input
        self._next_input = (index + 1) % self.pool.num_inputs
        return index

    def shard(self, step: int, index: int) -> Shard:
        """What this rank brings to a step with input set `index`."""
        prepared = self.steps[step]
        return Shard(
            x_TX=self.pool.x_rows(prepared.rows_T, index),
            q_lora_TR=self.pool.q_lora_rows(prepared.rows_T, index),
            cos_TF=prepared.cos_TF,
            sin_TF=prepared.sin_TF,
            ks_T=prepared.ks_T,
            ke_T=prepared.ke_T,
            ranges=prepared.logits,
        )

    def _peer_shard(self, step: int, index: int, rank: int) -> Shard:
        """What another rank brings to a gather: its rows, without what only its own selection needs."""
        ranges = self.steps[step].ranges
        rows_T = plan(self.cell.split, self.cell.steps[step], self.cell.cp_size, rank).local_rows_T
        cos_TF, sin_TF = (table.to(self.device) for table in self.rope.cos_sin(ranges.positions_S[rows_T]))
        x_TX, q_lora_TR = self.pool.x_rows(rows_T, index), self.pool.q_lora_rows(rows_T, index)
        none = self.steps[step].ks_T[:0]
        return Shard(x_TX, q_lora_TR, cos_TF, sin_TF, none, none)

    def correct(self, step: int, index: int, settings: StageSettings | None = None) -> Correct:
        """`serial` on that step and input over the unpaced links, by the baseline's stages or others; made once. A collective: all ranks ask in the
        same order."""
        settings = settings or self.all_settings[0]
        key = (settings, step, index)
        if key not in self._correct:
            prepared = self.steps[step]
            if self.one_rank is not None:
                self._correct[key] = self._played(settings, step, index)
            else:
                outs_SD = tuple(torch.empty_like(out_SD) for out_SD in prepared.outs[settings.chained])
                exchanges = [
                    Exchange(
                        self._unpaced,
                        self.lanes,
                        prepared.plan,
                        out_SD,
                        Control.NONE,
                        None,
                        self._pack_of(settings.chained, layer),
                    )
                    for out_SD, layer in zip(outs_SD, self.layers[settings], strict=True)
                ]
                made = self._run_layers(
                    self.layers[settings], serial, prepared, self.shard(step, index), exchanges, None, Scope.QK
                )
                self.lanes.drain()
                self._correct[key] = Correct(self._digest(made.q), self._digest(made.k), self._in_payloads(settings, outs_SD))
        return self._correct[key]

    def _in_payloads(self, settings: StageSettings, keys_SD: tuple[torch.Tensor, ...]) -> dict[Payload, tuple[torch.Tensor, ...]]:
        """Keys, [S, D] a layer, as every payload that an arm has. Rows are quantised one by one, so it may be done on either side of a wire; in a
        chain it is done before."""
        if settings.chained is not Payload.BF16:
            return {settings.chained: keys_SD}
        pack = self.layers[settings][0].pack
        return {
            payload: keys_SD if payload is Payload.BF16 else tuple(pack(keys) for keys in keys_SD) for payload in self.payloads
        }

    def _played(self, settings: StageSettings, step: int, index: int) -> Correct:
        """What every rank brings to every layer's wire, made on this one: all ranks run `serial` here, one after the other."""
        mine, cp_size, head_dim = self.steps[step].plan, self.cell.cp_size, self.cell.dims.head_dim
        source_rows_S = mine.source_rows_S.to(self.device)
        shards = {rank: self._peer_shard(step, index, rank) for rank in range(cp_size)}
        keys, wires, queries = [], [], {}
        for layer in self.layers[settings]:
            wire = torch.zeros(cp_size, mine.max_rows, head_dim, dtype=torch.bfloat16, device=self.device)
            for rank, shard in shards.items():
                q, k = layer.project(shard)
                wire[rank, : k.shape[0]] = layer.rotate(k)
                if self.is_chain or rank == self.rank:
                    queries[rank] = layer.rotate(q)
            rows = wire.view(-1, head_dim)
            wires.append(rows if settings.chained is Payload.BF16 else layer.pack(rows))
            keys.append(wires[-1].index_select(0, source_rows_S))
            if self.is_chain:
                shards = {rank: carry(shard, queries[rank], keys[-1]) for rank, shard in shards.items()}
        digests = self._digest(queries[self.rank]), self._digest(keys[-1])
        return Correct(*digests, self._in_payloads(settings, tuple(keys)), self._in_payloads(settings, tuple(wires)))

    def finish_correct(
        self, step: int, index: int, num_layers: int | None = None, settings: StageSettings | None = None
    ) -> torch.Tensor:
        """`serial` on that input through top-k, into the step's caches: int32 [T, K] of the last layer, or of the last of `num_layers`."""
        prepared, settings = self.steps[step], settings or self.all_settings[0]
        correct = self.correct(step, index, settings)
        pairs = list(zip(prepared.outs[settings.chained], correct.keys[settings.chained], strict=True))[:num_layers]
        exchanges = [Exchange(self._unpaced, self.lanes, prepared.plan, out, Control.PREFILLED, keys) for out, keys in pairs]
        shard = self.shard(step, index)
        made = self._run_layers(self.layers[settings], serial, prepared, shard, exchanges, self._caches_of(step), Scope.INDEXER)
        assert made.topk is not None
        return made.topk

    def visible_keys(self, step: int) -> torch.Tensor:
        """int32 [T]: keys that each of the rank's rows sees, by its position in its request."""
        ranges = self.steps[step].ranges
        return (ranges.positions_S[self.steps[step].plan.local_rows_T] + 1).to(self.device, torch.int32)

    def stored_cache(self, step: int) -> KeyCache:
        """The last layer's cache of the step as the last run left it."""
        return self._caches.stored(step, self.cell.layers - 1)

    def problem(self, arm: str, outcome: Outcome, step: int, index: int) -> str | None:
        """Why a run of an arm is not right, if it is not: its contract, or the bits of q and k against `serial`'s; of the last layer of a chain."""
        if outcome.fault is not None or outcome.digests is None:
            return outcome.fault
        correct = self.correct(step, index, self.settings_of[arm])
        right = correct.k if self.arms[arm].payload is Payload.BF16 else self._digest(correct.keys[self.arms[arm].payload][-1])
        pairs = zip(("q", "k"), outcome.digests, (correct.q, right), strict=True)
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
        arm = self.arms[variant.arm]
        if variant.control is Control.GATHER_ALONE:
            return self._run_gathers(variant, step, index)
        is_graph = arm.execution is Execution.CUDA_GRAPH
        trial = (self._graphed if is_graph else self._trial)(variant, step, index, scope)
        self._poison(step, arm.payload, scope)
        start, host_us = self._start_together(), self.lanes.host_us()
        made = trial.enqueue()
        host_end_us, end = self.lanes.host_us(), self.lanes.mark()
        digests = (self._digest(made.q), self._digest(made.k))
        self.lanes.drain()
        num_layers, us = self.cell.layers, self.lanes.us
        return Outcome(
            elapsed_us=(us(end) - us(start)) / num_layers,
            start_us=us(start),
            window_us=fmean(exchange.window_us for exchange in trial.exchanges),
            times=mean_times(trial.exchanges),
            fault=made.fault,
            q=made.q,
            k=made.k,
            topk=made.topk,
            digests=digests,
            filler_us=fmean(us(done) - us(began) for began, done in made.fillers) if made.fillers else None,
            enqueue_us=(host_end_us - host_us) / num_layers if host_us is not None and host_end_us is not None else None,
        )

    def _poison(self, step: int, payload: Payload, scope: Scope) -> None:
        """Whatever a run has to write, whoever wrote it last."""
        if not self.is_simulated:
            for out in self.steps[step].outs[payload]:
                poison(out)
        if scope is not Scope.QK:
            self._caches_of(step)

    def _trial(self, variant: Variant, step: int, index: int, scope: Scope) -> Trial:
        """As a host enqueues it stage by stage."""
        arm, prepared, layers = self.arms[variant.arm], self.steps[step], self.layers[self.settings_of[variant.arm]]
        shard, exchanges = self.shard(step, index), self._exchanges(variant, step, index)
        caches = self._caches_of(step) if scope is not Scope.QK else None
        schedule = self.schedules[variant.arm]

        def enqueue() -> LayersMade:
            return self._run_layers(layers, schedule, prepared, shard, exchanges, caches, scope, arm.planted_wait_us, self._fill)

        return Trial(enqueue, exchanges)

    def _graphed(self, variant: Variant, step: int, index: int, scope: Scope) -> Trial:
        """The same as a CUDA graph: captured once for each input, since its tensors are part of it. A graph ends when both streams have, so a
        missing join fails here."""
        key = (variant, step, index, scope)
        if key not in self.graphs:
            self._trial(variant, step, index, scope).enqueue()  # what compiles does it here
            self.lanes.drain()
            trial = self._trial(variant, step, index, scope)
            replay, made = self.lanes.capture(trial.enqueue)

            def enqueue(keeps: Trial = trial) -> LayersMade:
                replay()
                return made

            self.graphs[key] = Trial(enqueue, trial.exchanges)
        return self.graphs[key]

    def _exchanges(self, variant: Variant, step: int, index: int) -> list[Exchange]:
        """One for each layer."""
        prepared, arm, settings = self.steps[step], self.arms[variant.arm], self.settings_of[variant.arm]
        payload, layers = arm.payload, self.layers[settings]
        needs_keys = variant.control in (Control.PREFILLED, Control.ZERO_BYTE)
        correct = self.correct(step, index, settings) if needs_keys or self.one_rank is not None else None
        exchanges = []
        for number, out in enumerate(prepared.outs[payload]):
            fabric = self.fabrics[arm.transport]
            if self.one_rank is not None:
                assert correct is not None
                fabric = PlayedGather(self.fabric, self.one_rank, correct.wire[payload][number])
            keys = correct.keys[payload][number] if needs_keys and correct is not None else None
            pack = self._pack_of(payload, layers[number])
            exchanges.append(Exchange(fabric, self.lanes, prepared.plan, out, variant.control, keys, pack))
        return exchanges

    @staticmethod
    def _pack_of(payload: Payload, layer: Indexer) -> Callable[[torch.Tensor], torch.Tensor] | None:
        return layer.pack if payload is Payload.FP8 else None

    def _caches_of(self, step: int) -> list[KeyCache]:
        return [self._caches.poisoned(step, layer) for layer in range(self.cell.layers)]

    def _start_together(self) -> Mark:
        """Both lanes idle, all ranks here, the last one late by the cell's skew."""
        self.lanes.drain()
        self.lanes.meet(self.transport)
        if self.cell.skew_us and self.rank == self.cell.cp_size - 1:
            self.lanes.busy_wait(self.cell.skew_us)
        return self.lanes.mark()

    def _run_gathers(self, variant: Variant, step: int, index: int) -> Outcome:
        """The gathers alone, back to back, each of its own layer's keys of the first layer's inputs; enqueued one by one, whatever the execution."""
        layers, shard = self.layers[self.settings_of[variant.arm]], self.shard(step, index)
        exchanges = self._exchanges(variant, step, index)
        self._poison(step, self.arms[variant.arm].payload, Scope.QK)
        keys = [layer.rotate(layer.project(shard)[1]) for layer in layers]
        start = self._start_together()
        for exchange, k in zip(exchanges, keys, strict=True):
            gathered = exchange.gather(k)
        end = self.lanes.mark()
        self.lanes.drain()
        us = self.lanes.us
        return Outcome((us(end) - us(start)) / len(keys), us(start), 0.0, mean_times(exchanges), None, k=gathered)

    def _run_layers(
        self,
        layers: Sequence[Indexer],
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
        fault, fillers = None, []
        for number, exchange in enumerate(exchanges):
            layer, cache = layers[number], caches[number] if caches is not None else None
            result = schedule(layer, shard, exchange)
            # Asked at once: a gather that the next layer joins was not joined in time.
            if fault is None and (undone := exchange.fault()) is not None:
                fault = f"layer {number}: {undone}" if self.is_chain else undone
            q, k, topk = self._finish(layer, result, prepared, shard, cache, scope)
            if wait_us:
                self.lanes.busy_wait(wait_us)
            if fill is not None:
                began = self.lanes.mark()
                self.lanes.stage("filler", fill)
                fillers.append((began, self.lanes.mark()))
            if self.is_chain:
                shard = self.lanes.stage("carry", carry, shard, q, k)
        return LayersMade(q, k, topk, fault, fillers)

    def _finish(
        self, layer: Indexer, result: object, prepared: PreparedStep, shard: Shard, cache: KeyCache | None, scope: Scope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What every schedule has in common after q and k."""
        if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(t, torch.Tensor) for t in result):
            raise ScheduleError(f"returns {type(result).__name__}; a schedule returns the tensors (q, k)")
        q, k = result
        expected_q = (shard.x_TX.shape[0], self.cell.dims.num_heads, self.cell.dims.head_dim)
        # A gather gives its destination, or a control's copy of what would be there: one of the payloads.
        expected_k = [tuple(outs[0].shape) for outs in prepared.outs.values()]
        if q.shape != expected_q or tuple(k.shape) not in expected_k:
            wanted = " or ".join(str(list(shape)) for shape in expected_k)
            raise ScheduleError(f"returns q {list(q.shape)} and k {list(k.shape)}; expected {list(expected_q)} and {wanted}")
        topk = None
        if cache is not None:
            layer.store_keys(k, cache)
            if scope is Scope.INDEXER:
                topk = layer.select(q, shard, cache)
        return q, k, topk

    def _digest(self, tensor: torch.Tensor) -> int:
        return 0 if self.is_simulated else digest(tensor)
