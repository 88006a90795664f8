"""Groups of CUDA ranks that share one GPU under MPS: NCCL and copies into symmetric memory as they really run, in everything but speed.

Run with an NCCL that lets ranks share a GPU, by LD_PRELOAD where torch brings an older one, on a GPU that nothing else uses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest

from experiments.names import Device, Execution, Payload, Schedule, Scope, Split, Transport
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.dims import PRESETS as DIMS
from experiments.spec.fabric import FabricSpec
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from service.run.local_ranks import local_group
from service.run.rank_group import GroupLostError, RankGroup
from service.run.resources import mps_folder
from tests.conftest import make_cell, make_step
from tests.workers.asking import prepare, run_block, verify
from tests.workers.one_gpu import CHAIN, HAS_CUDA, shipped_arms
from workers.fabrics import nccl
from workers.messages import PrepareCell

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]

STEP = make_step((300, 511), (2100, 77))
"""Shards of unequal length, so that ranks pad; prefixes, and more keys than the smallest top-k."""
DAEMON = "nvidia-cuda-mps-control"


@pytest.fixture(scope="module", autouse=True)
def shared_gpu() -> Iterator[None]:
    """One GPU, an MPS daemon, and rank processes that start with both in their environment."""
    if nccl.version() < nccl.SHARES_GPUS_FROM:
        pytest.skip(f"NCCL {nccl.version_words()} takes one rank a GPU: preload 2.30 or newer")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        patch.setenv("CUDA_VISIBLE_DEVICES", first)
        if not (mps_folder() / "control").exists():
            control = shutil.which(DAEMON)
            if control is None:
                pytest.skip(f"{DAEMON} is not on PATH")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True)))
            for name in ("PIPE", "LOG"):
                (folder / name).mkdir()
                patch.setenv(f"CUDA_MPS_{name}_DIRECTORY", str(folder / name))
            subprocess.run([control, "-d"], check=True, timeout=30)
            stack.callback(subprocess.run, [control], input="quit\n", text=True, check=False, timeout=60)
        forkserver._forkserver._stop()  # one that started earlier has not heard of the daemon
        stack.callback(forkserver._forkserver._stop)
        yield


class OneGroup:
    """The one group that is alive: an MPS server that lost a client at work waits until all others are gone."""

    def __init__(self) -> None:
        self._group: RankGroup | None = None

    def launch(self, cp_size: int, gather_timeout_s: float = 30.0) -> RankGroup:
        """A fresh one."""
        self.close()
        self._group = local_group(cp_size, Device.CUDA, gpus_per_rank=1 / cp_size)
        self._group.launch(120, gather_timeout_s, Device.CUDA, [os.getcwd()])
        return self._group

    def of(self, cp_size: int) -> RankGroup:
        """The living one, if it has that many ranks."""
        group = self._group
        return group if group is not None and len(group.joined) == cp_size else self.launch(cp_size)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


@pytest.fixture(scope="module")
def groups(shared_gpu: None) -> Iterator[OneGroup]:
    one = OneGroup()
    yield one
    one.close()


@pytest.fixture
def four(groups: OneGroup) -> RankGroup:
    return groups.of(4)


def cuda_cell(
    cp_size: int, split: Split = Split.ZIGZAG, layers: int = 1, scope: Scope = Scope.INDEXER, **changes: object
) -> Cell:
    return make_cell(
        STEP, split=split, cp_size=cp_size, scope=scope, dims=DIMS["mini"], device=Device.CUDA, layers=layers, **changes
    )


def over_symmetric_memory(arms: Mapping[str, ArmSpec]) -> dict[str, ArmSpec]:
    """The same arms, but for the baseline."""
    return {
        name: arm if name == "baseline" else arm.model_copy(update={"transport": Transport.SYMMETRIC_MEMORY})
        for name, arm in arms.items()
    }


def check_all(group: RankGroup, cell: Cell, arms: Mapping[str, ArmSpec], deep: bool = True) -> None:
    """Every check of every arm, then a block of them all, timed."""
    prepare(group, cell, arms)
    reports = verify(group, deep)
    assert [report.faults for report in reports] == [()] * cell.cp_size
    assert len({report.key_digests for report in reports}) == 1, "all ranks hold the same index keys"
    timed = [name for name, arm in arms.items() if cell.scope is not Scope.QK or arm.payload is Payload.BF16]
    blocks = run_block(group, [*timed, "baseline/gather_alone"], trials=2)
    assert [block.faults for block in blocks] == [()] * cell.cp_size
    assert all(row.elapsed_us > 0 and row.gather_us > 0 for block in blocks for row in block.rows)


@pytest.mark.parametrize("cp_size", [8, 2, 4])
@pytest.mark.parametrize("split", list(Split))
def test_ranks_on_one_gpu_gather_by_nccl_with_the_bits_of_serial(groups, split, cp_size):
    some = groups.of(cp_size)
    check_all(some, cuda_cell(cp_size, split), shipped_arms(), deep=split is Split.ZIGZAG)
    path = some.joined[0].path
    assert f"{cp_size} ranks sharing 1 GPU" in path
    assert f"nccl {nccl.version_words()}" in path
    assert len({joined.gpu_uuid for joined in some.joined}) == 1


@pytest.mark.parametrize("split", list(Split))
def test_copies_into_symmetric_memory_have_the_bits_of_serial(four, split):
    check_all(four, cuda_cell(4, split), over_symmetric_memory(shipped_arms()), deep=split is Split.ZIGZAG)


@pytest.mark.parametrize("transport", list(Transport))
def test_chains_and_graphs(four, transport):
    arms = {
        "baseline": ArmSpec(),
        **{
            f"{schedule}_{execution}": ArmSpec(schedule=schedule, execution=execution, transport=transport)
            for schedule in Schedule
            for execution in Execution
        },
    }
    check_all(four, cuda_cell(4, layers=CHAIN, scope=Scope.QK), arms, deep=False)


def test_a_real_model_and_a_late_rank(four):
    arms = {name: ArmSpec(schedule="overlap_rotate", transport=name) for name in Transport}
    cell = make_cell(
        make_step((0, 4096)), cp_size=4, scope=Scope.QK, dims=DIMS["deepseek_v32"], device=Device.CUDA, skew_us=1500.0
    )
    check_all(four, cell, {"baseline": ArmSpec(), **arms})


def test_paths_say_what_ran(four):
    arms = {"baseline": ArmSpec(), "copies": ArmSpec(transport=Transport.SYMMETRIC_MEMORY)}
    own = cuda_cell(4)
    held = replace(own, fabric=FabricSpec(kind="process_group", nccl_ctas=1))
    paths = []
    for cell in (own, held, own):
        request = PrepareCell(cell, arms, WeightsSpec(), 0, 3, VerifySpec(), SimulationSpec())
        paths.append(four.ask(request, 60)[0].path)
        assert verify(four, deep=False)[0].faults == ()
    assert "B a rank), 4 ranks sharing 1 GPU; symmetric memory" in paths[0]
    assert "held to 1 CTAs" in paths[1] and "on 1 CTA " in paths[1]
    assert paths[2] == paths[0], "a cell's path is its own"


def test_who_reads_slowly_still_finds_its_own_keys(four):
    """That the protocol of two buffers and one barrier is enough, and not more than is needed."""
    arms = {
        name: ArmSpec(schedule=f"tests.workers.mutants_of_wires:{name}", transport=Transport.SYMMETRIC_MEMORY)
        for name in ("slow_reader", "slow_reader_of_one_buffer", "without_barrier")
    }
    cell = cuda_cell(4, layers=CHAIN, scope=Scope.QK, skew_us=2000.0)
    prepare(four, cell, {"baseline": ArmSpec(), **arms})
    reports = verify(four, deep=False)
    found = {fault.arm for report in reports for fault in report.faults}
    assert found == {"slow_reader_of_one_buffer", "without_barrier"}


def test_a_rank_that_dies_is_named_and_the_next_launch_works(groups):
    cell, arms = cuda_cell(4, scope=Scope.QK), {"baseline": ArmSpec(), "copies": ArmSpec(transport=Transport.SYMMETRIC_MEMORY)}
    for arm in arms:
        group = groups.launch(4)
        prepare(group, cell, arms)
        verify(group, deep=False)
        victim = group.joined[2].pid
        killing = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
        killing.start()
        began_s = time.monotonic()
        with pytest.raises(GroupLostError, match=f"rank 2 .* {victim} was killed by SIGKILL"):
            run_block(group, [arm], trials=20_000)
        killing.join()
        assert time.monotonic() - began_s < 40
        group.launch(120, 30, Device.CUDA, [os.getcwd()])
    check_all(group, cell, arms, deep=False)


def test_a_rank_that_stops_ends_the_block_in_time(groups):
    group = groups.launch(2, gather_timeout_s=3)
    prepare(group, cuda_cell(2, scope=Scope.QK))
    verify(group, deep=False)  # a kernel's first use may wait for those that run, and is bounded by the rank's owner alone
    stopped = group.joined[1].pid
    os.kill(stopped, signal.SIGSTOP)
    began_s = time.monotonic()
    with pytest.raises(GroupLostError, match=f"rank 1 .* {stopped} is stopped"):
        run_block(group, ["baseline"])
    assert time.monotonic() - began_s < 60
