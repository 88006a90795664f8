"""GPUs that are not there, and GPUs that are shared: refused before anything starts, or said with every result."""

from __future__ import annotations

import pytest
import torch

from experiments.errors import UserError
from experiments.names import Device, Verdict
from experiments.spec.placement import PlacementSpec
from service.judge.judging import is_decided
from service.report.caveats import caveats
from service.report.provenance import natures
from service.report.table import hardware
from service.run import resources
from service.run.local_ranks import local_group
from service.run.resources import refuse_what_this_machine_cannot_hold
from service.store.judged import load_result
from service.store.records import Records
from tests.conftest import make_cell
from tests.service.synthetic import ENVIRONMENT, home_in, make_spec, make_sweep
from workers.fabrics.gpus import refuse_what_this_gpu_cannot_hold


@pytest.fixture
def one_gpu(monkeypatch, tmp_path):
    """A machine with one GPU, and no MPS daemon; gives where one would be."""
    monkeypatch.setattr(resources, "count_gpus", lambda: 1)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def refuse(cp_size: int, gpus_per_rank: float) -> None:
    cells = [make_cell(cp_size=cp_size, device=Device.CUDA)]
    refuse_what_this_machine_cannot_hold(cells, PlacementSpec(gpus_per_rank=gpus_per_rank), 3)


def test_more_ranks_than_gpus(one_gpu):
    with pytest.raises(UserError, match=r"2 ranks x 1 GPU need 2 GPUs, the cluster has 1: .*gpus_per_rank below 1"):
        refuse(2, 1.0)
    with pytest.raises(UserError, match=r"2 ranks x 1 GPU need 2 GPUs, this machine has 1: .*gpus_per_rank below 1"):
        local_group(2, Device.CUDA)


def test_sharing_needs_mps(one_gpu):
    for ask in (lambda: refuse(4, 0.25), lambda: local_group(4, Device.CUDA, 0.25)):
        with pytest.raises(UserError, match=rf"gpus_per_rank 0.25: .* need CUDA MPS, and no daemon is at {one_gpu}"):
            ask()
    refuse(1, 0.25)
    (one_gpu / "control").touch()
    refuse(4, 0.25)
    local_group(4, Device.CUDA, 0.25).close()


def test_a_cell_larger_than_its_gpu(monkeypatch):
    cell = make_cell(cp_size=2, device=Device.CUDA)
    needed = cell.bytes_per_rank(3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, needed))
    refuse_what_this_gpu_cannot_hold(cell, 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, needed - 1))
    with pytest.raises(
        UserError, match=r"workload: a rank of cell .* needs about .* GiB, and its NVIDIA H100 has .* GiB: shorter prompts"
    ):
        refuse_what_this_gpu_cannot_hold(cell, 3)


def test_cpu_ranks_need_no_gpu(one_gpu):
    refuse_what_this_machine_cannot_hold([make_cell(cp_size=2)], PlacementSpec(), 3)
    local_group(2).close()


def test_a_shared_gpu_is_said_with_every_result(tmp_path):
    records, spec = Records(tmp_path / "records.db"), make_spec()
    records.start_sweep("s1", spec, spec.expand().cells, ENVIRONMENT, None)
    for launch, uuids in enumerate((["a", "b"], ["a", "a"])):
        ranks = [
            {"rank": rank, "node_id": "n", "hostname": "h", "cores": 64, "gpu": "NVIDIA H100", "gpu_uuid": uuid}
            for rank, uuid in enumerate(uuids)
        ]
        records.add_launch("s1", 2, launch, ranks, 1.0)
        result = load_result(records, "s1")
        lines = [line for line in caveats(result) if line.startswith("SHARED GPU")]
        if launch == 0:
            assert lines == []
            assert "2 x NVIDIA H100" in hardware(result)
    assert lines == [
        "SHARED GPU, cp_size 2: 2 ranks on 1 GPU: right for behaviour; its times are nobody's speed, and are withheld"
    ]
    assert "SHARED GPU: behaviour, not speed" in natures(result)
    records.close()


def test_a_shared_gpu_has_no_times_and_no_verdict(tmp_path):
    """What was measured stays in the records; it is counted, and not read."""
    home, spec = home_in(tmp_path), make_spec()
    make_sweep(home, spec, "s1")
    records = Records(home.records)
    own = load_result(records, "s1")
    ranks = [
        {"rank": rank, "node_id": "n", "hostname": "h", "cores": 64, "gpu": "NVIDIA H100", "gpu_uuid": "a"} for rank in range(2)
    ]
    records.add_launch("s1", 2, 9, ranks, 1.0)
    shared = load_result(records, "s1")
    for before, cell in zip(own.cells, shared.cells, strict=True):
        assert before.arms[1].verdict is Verdict.FASTER
        assert not before.shares_gpus
        assert cell.shares_gpus
        assert cell.is_measured
        assert cell.aa is None
        for arm in cell.arms:
            assert (arm.comparison, arm.latency, arm.tokens_per_s, arm.gather_p50_us, arm.account) == (None,) * 5
        assert cell.arms[1].verdict is Verdict.UNRESOLVED
        assert "shared a GPU" in cell.arms[1].reason
    assert shared.aa.cells == 0
    assert all(is_decided(record, spec, 2) for record in records.cells("s1"))
    records.close()
