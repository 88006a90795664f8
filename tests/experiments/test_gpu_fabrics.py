"""What a spec may ask of NCCL and of symmetric memory, and what it is refused without a GPU."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from experiments.spec.experiment import ExperimentSpec
from experiments.spec.fabric import PRESETS, FabricSpec
from tests.conftest import make_cell

COPIES = {"copies": {"schedule": "overlap_rotate", "transport": "symmetric_memory"}}


def spec_of(device: str, fabric: object = "process_group", arms: dict | None = None) -> ExperimentSpec:
    return ExperimentSpec.model_validate(
        {
            "name": "asked",
            "dims": "mini",
            "device": device,
            "workload": {"kind": "grid", "new_tokens": [64]},
            "cells": {"cp_size": 2, "fabric": fabric},
            "arms": {"baseline": {}, "overlapped": {"schedule": "overlap_rotate"}, **(arms or {})},
        }
    )


@pytest.mark.parametrize(
    ("device", "fabric", "arms", "words"),
    [
        ("cpu", "process_group", COPIES, r"arms.copies.transport symmetric_memory needs device cuda, not 'cpu'"),
        ("simulated", "process_group", COPIES, r"arms.copies.transport symmetric_memory needs device cuda, not 'simulated'"),
        ("cuda", "nvlink4_hgx_h200_first", COPIES, r"needs real ranks, and in cells.fabric one_rank_nvlink4_hgx_h200_first"),
        ("cpu", {"kind": "process_group", "nccl_ctas": 4}, None, r"process_group_4ctas: nccl_ctas limits NCCL, on device cuda"),
        ("cpu", {"kind": "emulated", "bandwidth_mbps": 9, "nccl_ctas": 4}, None, r"only a process_group fabric has nccl_ctas"),
        ("cuda", {"kind": "process_group", "nccl_ctas": 0}, None, r"greater than or equal to 1"),
        ("cuda", {"kind": "process_group", "nccl_ctas": 65}, None, r"less than or equal to 64"),
    ],
)
def test_refusals_say_what_to_change(device, fabric, arms, words):
    with pytest.raises(ValidationError, match=words):
        spec_of(device, fabric, arms)


def test_on_gpus_both_can_be_asked_for():
    spec = spec_of("cuda", ["process_group", {"kind": "process_group", "nccl_ctas": 4}], COPIES)
    own, held = spec.expand().cells
    assert [own.fabric.name, held.fabric.name] == ["process_group", "process_group_4ctas"]
    assert own.cell_id != held.cell_id
    assert spec.arms["copies"].differs_from(spec.arms["overlapped"]) == {"transport": ("collective", "symmetric_memory")}


def test_a_fabric_without_a_limit_keeps_its_identity():
    assert "nccl_ctas" not in PRESETS["process_group"].identity
    assert FabricSpec(kind="process_group", nccl_ctas=4).identity["nccl_ctas"] == 4
    assert make_cell().content["fabric"] == {"kind": "process_group", "bandwidth_mbps": None, "latency_us": None}
