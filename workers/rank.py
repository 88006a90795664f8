"""One CP rank: answers messages, one after the other. It lives in a process of its own and knows neither Ray nor MLflow."""

from __future__ import annotations

import gc
import os
import time
import traceback

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from experiments.errors import UserError
from experiments.names import Device
from experiments.spec.cell import KEY_BYTES
from workers import collective_log
from workers.affinity import settle_on, share_of_cores
from workers.device_monitor import DeviceMonitor
from workers.event_loop import event_loop_since, threads_now
from workers.fabrics.gpus import boot_id, gpu_uuid, refuse_what_this_gpu_cannot_hold, take_gpu, wait_for_mps
from workers.fabrics.transport import CollectiveTransport, open_transport, rendezvous
from workers.lanes import Lanes, make_lanes
from workers.messages import (
    Answer,
    BlockReport,
    Fault,
    Joined,
    JoinGroup,
    OpenStore,
    Ping,
    Pong,
    PrepareCell,
    Prepared,
    RankFault,
    Request,
    RunBlock,
    StoreOpen,
    TraceCell,
    TraceReport,
    TrialOrder,
    TrialRow,
    Variant,
    VerifyCell,
    VerifyReport,
)
from workers.prepared_cell import PreparedCell
from workers.traced_trial import trace_arms
from workers.verify import ArmError, run_arm, verify_cell

GLOO_ADVICE = " This is typically caused by"
"""Where an error of gloo's has said what happened."""


class CPRank:
    """See the module. `answer` never raises: what goes wrong is an answer too."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._joined: JoinGroup | None = None
        self._transport: CollectiveTransport | None = None
        self._lanes: Lanes | None = None
        self._request: PrepareCell | None = None
        self._cell: PreparedCell | None = None
        self._monitor: DeviceMonitor | None = None

    def answer(self, request: Request) -> Answer:
        """Does what is asked."""
        collective_log.log.doing(type(request).__name__)
        try:
            match request:
                case OpenStore():
                    return self._open_store(request)
                case JoinGroup():
                    return self._join(request)
                case PrepareCell():
                    return self._prepare(request)
                case VerifyCell():
                    return self._verify(request)
                case RunBlock():
                    return self._run_block(request)
                case TraceCell():
                    return self._trace(request)
                case Ping():
                    return Pong(os.getpid())
        except ArmError as error:
            return RankFault("schedule", str(error), traceback.format_exc(), error.arm)
        except UserError as error:
            return RankFault("user", str(error), "")
        except Exception as error:  # the rank outlives its errors; the controller decides what they mean
            first_line = str(error).partition("\n")[0].partition(GLOO_ADVICE)[0]  # CUDA's advice begins on the next line
            return RankFault("rank", f"{type(error).__name__}: {first_line}", traceback.format_exc())
        raise AssertionError(f"a rank is not asked {type(request).__name__}")

    def _open_store(self, request: OpenStore) -> StoreOpen:
        self._store, port = rendezvous(0, request.world_size, request.host, 0, request.timeout_s)
        return StoreOpen(request.host, port)

    def _join(self, request: JoinGroup) -> Joined:
        torch.set_num_threads(request.num_threads)
        cores = settle_on(share_of_cores(list(os.sched_getaffinity(0)), request.node_index, request.node_ranks))
        # gloo and NCCL pick an interface by host name otherwise, which on many hosts is loopback.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = request.interface
        is_cuda = request.device is Device.CUDA
        if is_cuda:
            wait_for_mps(request.timeout_s)
            take_gpu(request.gpus, request.node_index)
        if self._store is None:
            self._store, _ = rendezvous(
                request.rank, request.world_size, request.store.host, request.store.port, request.timeout_s
            )
        before = threads_now()
        self._transport = open_transport(
            self._store, request.rank, request.world_size, request.backend, request.interface, request.timeout_s
        )
        self._transport.barrier()
        if not is_cuda:
            self._transport.event_loop = event_loop_since(before)
        self._joined = request
        gpu, uuid = (torch.cuda.get_device_name(), gpu_uuid()) if is_cuda else ("", "")
        return Joined(request.rank, os.getpid(), boot_id(), self._transport.path, cores, gpu, uuid)

    def _prepare(self, request: PrepareCell) -> Prepared:
        assert self._joined is not None and self._transport is not None, "a cell is prepared in a group"
        if self._lanes is not None:
            self._lanes.close()
        self._cell = None  # its buffers go before the next cell's come
        gc.unfreeze()
        gc.collect()
        # A join outlasts the gather under it: the group's own time-out, which names the missing rank, comes first.
        self._lanes = make_lanes(request.cell.device, request.simulation, 2 * self._joined.timeout_s)
        if request.cell.device is Device.CUDA:
            refuse_what_this_gpu_cannot_hold(request.cell, request.num_inputs)
            self._monitor = self._monitor or DeviceMonitor()
        self._request = request
        transport = self._transport.limited_to(request.cell.fabric.nccl_ctas)
        self._cell = PreparedCell(request, self._joined.rank, self._lanes, transport)
        split = [step for step in self._cell.steps if step.plan.is_split]
        transport.learn(step.plan.max_rows * outs[0][0].nbytes for step in split for outs in step.outs.values())
        # What lives now (torch's own objects, most of it) lives to the end of the cell: a collection before each block need not walk it.
        gc.freeze()
        rank, path = self._joined.rank, "; ".join(fabric.path for fabric in self._cell.fabrics.values())
        plans = [step.plan for step in self._cell.steps]
        return Prepared(rank, plans[0].local_tokens, tuple(plan.received_bytes(KEY_BYTES) for plan in plans), path)

    def _verify(self, request: VerifyCell) -> VerifyReport:
        assert self._cell is not None and self._request is not None and self._joined is not None
        return verify_cell(self._cell, self._request.verify, self._joined.rank, request.deep, request.late)

    def _run_block(self, request: RunBlock) -> BlockReport:
        assert self._cell is not None and self._joined is not None
        began_ns = time.monotonic_ns()
        rows, faults = [], []
        gc.collect()
        gc.disable()  # a collection inside a trial would be timed
        try:
            for order in request.orders:
                row, fault = self._trial(self._cell, order)
                rows.append(row)
                if fault is not None:
                    faults.append(fault)
        finally:
            gc.enable()
        state = self._monitor.read() if self._monitor is not None else None
        return BlockReport(self._joined.rank, tuple(rows), tuple(faults), (time.monotonic_ns() - began_ns) / 1e3, state)

    def _trace(self, request: TraceCell) -> TraceReport:
        assert self._cell is not None
        gc.collect()
        gc.disable()  # as in a block: a trace shows what the timed trials did
        try:
            return trace_arms(self._cell, request)
        finally:
            gc.enable()

    def _trial(self, cell: PreparedCell, order: TrialOrder) -> tuple[TrialRow, Fault | None]:
        variant = Variant.parse(order.variant)
        collective_log.log.doing(f"RunBlock, arm {order.variant}")
        index = cell.next_input()
        cell.correct(order.step, index, cell.settings_of[variant.arm])  # made on first use, and not inside what is timed
        outcome = run_arm(cell, variant, order.step, index, cell.cell.scope)
        fault = cell.problem(variant.arm, outcome, order.step, index)
        times = outcome.times
        row = TrialRow(
            variant=order.variant,
            row=order.row,
            step=order.step,
            elapsed_us=outcome.elapsed_us,
            start_us=outcome.start_us,
            window_us=outcome.window_us,
            gather_us=times.gather_us if times else None,
            wire_us=times.wire_us if times else None,
            arrival_us=times.arrival_us if times else None,
            late_us=times.late_us if times else None,
            filler_us=outcome.filler_us,
            enqueue_us=outcome.enqueue_us,
        )
        return row, Fault(variant.arm, "timed trial", fault) if fault else None
