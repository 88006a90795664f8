"""Planted truth for the `simulated` device: how long each stage takes on a virtual clock."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SimulationSpec(BaseModel):
    """Stage times in microseconds of virtual time, and what overlap costs.

    While the side lane's gather is in flight, main-lane work advances at rate 1 / (1 + main_slowdown) and the gather takes
    gather_us in any case: the contention that accounting has to find is exactly the main lane's loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    wq_b_us: float = Field(45, ge=0)
    wk_us: float = Field(14, ge=0)
    norm_k_us: float = Field(3, ge=0)
    rope_us: float = Field(6, ge=0)
    rope_q_us: float = Field(5, ge=0)
    rope_k_us: float = Field(2, ge=0)
    """Apart from each other, where a schedule launches before wq_b."""
    copy_us: float = Field(2, ge=0)
    rotate_q_us: float = Field(14, ge=0)
    rotate_k_us: float = Field(5, ge=0)
    gather_us: float = Field(24, ge=0)
    quantise_us: float = Field(8, ge=0)
    head_gates_us: float = Field(13, ge=0)
    logits_us: float = Field(250, ge=0)
    topk_us: float = Field(100, ge=0)
    carry_us: float = Field(2, ge=0)
    """Between the layers of a chain: what makes a layer's inputs depend on the layer before."""
    fork_us: float = Field(1, ge=0)
    join_us: float = Field(1, ge=0)
    main_slowdown: float = Field(0.1, ge=0)
    """Share by which main-lane work slows under a gather in flight."""
