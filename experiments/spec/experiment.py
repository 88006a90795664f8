"""An experiment: the whole of what a user asks to be measured, validated before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from experiments.errors import SpecError
from experiments.names import (
    BASELINE_ARM,
    Device,
    Execution,
    FabricKind,
    Logits,
    Payload,
    Regime,
    Scope,
    Split,
    Stages,
    Transport,
)
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.chain import ChainSpec
from experiments.spec.dims import DimsSpec, dims_by_name
from experiments.spec.eligibility import why_not
from experiments.spec.fabric import FabricSpec, fabrics_by_name
from experiments.spec.measurement import MeasurementSpec, VerifySpec
from experiments.spec.placement import PlacementSpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from experiments.workload.grid import GridWorkload
from experiments.workload.replay import Replay, TraceWorkload
from experiments.workload.step import Workload

_MODEL = ConfigDict(extra="forbid", frozen=True)


_Microseconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _preset_fabrics(value: Any) -> Any:
    return tuple(
        itertools.chain.from_iterable(fabrics_by_name(item) if isinstance(item, str) else (item,) for item in _listed(value))
    )


def _preset_dims(value: Any) -> Any:
    return dims_by_name(value) if isinstance(value, str) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("needs at least one value")
    if len({str(v) for v in values}) != len(values):
        raise ValueError(f"has a value twice: {', '.join(str(v) for v in values)}")
    return values


class CellsSpec(BaseModel):
    """The coordinates of the grid; each takes one value or a list."""

    model_config = _MODEL

    split: Annotated[tuple[Split, ...], BeforeValidator(_listed)] = (Split.INTERLEAVE,)
    cp_size: Annotated[tuple[Annotated[int, Field(ge=1, le=1024, strict=True)], ...], BeforeValidator(_listed)]
    fabric: Annotated[tuple[FabricSpec, ...], BeforeValidator(_preset_fabrics)]
    scope: Annotated[tuple[Scope, ...], BeforeValidator(_listed)] = (Scope.QK,)
    regime: Annotated[tuple[Regime, ...], BeforeValidator(_listed)] = (Regime.DRAINED,)
    skew_us: Annotated[tuple[_Microseconds, ...], BeforeValidator(_listed)] = (0.0,)
    """The last rank starts every trial of every arm that much after the others."""

    filler_us: Annotated[tuple[_Microseconds, ...], BeforeValidator(_listed)] = (0.0,)
    """Calibrated work after each layer of a streaming chain, in place of attention and MoE; a drained cell has none."""

    _no_repeats = field_validator("split", "cp_size", "fabric", "scope", "regime", "skew_us", "filler_us")(_distinct)

    @model_validator(mode="after")
    def _filler_lies_between_layers(self) -> Self:
        if any(self.filler_us) and Regime.STREAMING not in self.regime:
            raise ValueError(f"filler_us {max(self.filler_us):g} lies between the layers of a chain: add streaming to regime")
        return self

    @model_validator(mode="after")
    def _somebody_can_be_late(self) -> Self:
        if any(self.skew_us) and 1 in self.cp_size:
            raise ValueError(f"skew_us {max(self.skew_us):g} needs a rank to be late for: drop 1 from cp_size, or use skew_us 0")
        return self


class ExperimentSpec(BaseModel):
    """One YAML file of the catalogue, or of the user."""

    model_config = _MODEL

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    suite: str = Field("nsa-indexer", pattern=r"^[a-zA-Z0-9][\w./-]{0,63}$")
    about: str = ""
    dims: Annotated[DimsSpec, BeforeValidator(_preset_dims)]
    device: Device = Device.CPU
    seed: int = Field(0, ge=0, lt=2**31)
    weights: WeightsSpec = WeightsSpec()
    workload: Annotated[GridWorkload | TraceWorkload, Field(discriminator="kind")]
    cells: CellsSpec
    chain: ChainSpec = ChainSpec()
    arms: dict[str, ArmSpec]
    measurement: MeasurementSpec = MeasurementSpec()
    verify: VerifySpec = VerifySpec()
    placement: PlacementSpec = PlacementSpec()
    simulation: SimulationSpec = SimulationSpec()

    @field_validator("arms")
    @classmethod
    def _arms_can_be_compared(cls, arms: dict[str, ArmSpec]) -> dict[str, ArmSpec]:
        for name in arms:
            if not name.isidentifier() or len(name) > 32 or name.startswith("_"):
                raise ValueError(f"an arm's name is letters, digits and underscores, at most 32, not {name!r}")
        if BASELINE_ARM not in arms:
            raise ValueError(f"an arm named {BASELINE_ARM!r} must be there; found: {', '.join(arms) or 'none'}")
        if not 2 <= len(arms) <= 12:
            raise ValueError(f"2 to 12 arms can be compared, not {len(arms)}")
        return arms

    @model_validator(mode="after")
    def _checkpoint_fits_device(self) -> Self:
        if self.device is Device.SIMULATED and self.weights.checkpoint:
            raise ValueError("a simulated device reads no checkpoint: drop weights.checkpoint")
        return self

    @model_validator(mode="after")
    def _simulation_fits_device(self) -> Self:
        if self.device is not Device.SIMULATED and self.simulation != SimulationSpec():
            raise ValueError(
                f"simulation plants times on device 'simulated' only, not on {str(self.device)!r}: set device=simulated"
            )
        return self

    @model_validator(mode="after")
    def _fabrics_fit_device(self) -> Self:
        for fabric in self.cells.fabric:
            if fabric.kind is FabricKind.ONE_RANK and self.device is not Device.CUDA:
                raise ValueError(f"cells.fabric {fabric.name} is played on a GPU: set device=cuda, or use an emulated fabric")
            if fabric.nccl_ctas is not None and self.device is not Device.CUDA:
                raise ValueError(
                    f"cells.fabric {fabric.name}: nccl_ctas limits NCCL, on device cuda: drop it, or set device=cuda"
                )
            if fabric.kind is FabricKind.EMULATED and self.device is Device.CUDA:
                raise ValueError(
                    f"cells.fabric {fabric.name} holds ranks to a host's clock: on device cuda use a one_rank fabric, or process_group"
                )
        if any(self.cells.skew_us) and any(fabric.kind is FabricKind.ONE_RANK for fabric in self.cells.fabric):
            raise ValueError("cells.skew_us: a one_rank fabric has one real rank, which cannot be late for itself: use skew_us 0")
        return self

    @model_validator(mode="after")
    def _arms_fit_device_and_cells(self) -> Self:
        for name, arm in self.arms.items():
            needs = {
                "stages": arm.stages is Stages.FUSED,
                "logits": arm.logits is Logits.DEEPGEMM,
                "execution": arm.execution is Execution.CUDA_GRAPH,
                "reserved_sms": arm.reserved_sms > 0,
                "transport": arm.transport is Transport.SYMMETRIC_MEMORY,
            }
            wanted = [factor for factor, is_wanted in needs.items() if is_wanted]
            if wanted and self.device is not Device.CUDA:
                raise ValueError(f"arms.{name}.{wanted[0]} {getattr(arm, wanted[0])} needs device cuda, not {str(self.device)!r}")
            heads = self.dims.num_heads
            if arm.logits is Logits.DEEPGEMM and heads not in (32, 64):
                raise ValueError(
                    f"arms.{name}.logits {arm.logits} scores 32 or 64 heads, not {heads}: change dims.num_heads, or use logits cplab"
                )
            played = [fabric.name for fabric in self.cells.fabric if fabric.kind is not FabricKind.PROCESS_GROUP]
            if arm.transport is Transport.SYMMETRIC_MEMORY and played:
                raise ValueError(
                    f"arms.{name}.transport {arm.transport} needs real ranks, and in cells.fabric {played[0]} peers are played"
                )
            if arm.payload is Payload.FP8 and Scope.QK in self.cells.scope:
                raise ValueError(
                    f"arms.{name}.payload fp8: scope qk ends with bf16 keys, which never exist there: use key_ready or indexer"
                )
        return self

    @model_validator(mode="after")
    def _groups_fit_placement(self) -> Self:
        kinds = {fabric.kind for fabric in self.cells.fabric}
        sizes = set(self.cells.cp_size if kinds != {FabricKind.ONE_RANK} else ()) | (
            {1} if FabricKind.ONE_RANK in kinds else set()
        )
        for num_ranks in sorted(sizes):
            if reason := self.placement.why_not(num_ranks):
                raise ValueError(f"placement.{reason}: change it, or cells.cp_size")
        return self

    @property
    def spec_hash(self) -> str:
        """Sixteen hex digits over everything but the prose."""
        content = json.dumps(self.model_dump(mode="json", exclude={"about"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def expand(self) -> Expansion:
        """Every cell of the grid, in a stable order, with the workload built.

        Raises:
            SpecError: A trace cannot be read, or a grid's sequence is too short for its split.
        """
        replay: Replay | None = None
        if isinstance(self.workload, TraceWorkload):
            replay = self.workload.build()
            label = f"trace{replay.num_requests}r"
            workloads: list[tuple[str, Workload]] = [(label, replay.steps)]
        else:
            workloads = [(point.label, point.steps) for point in self.workload.points()]
        c = self.cells
        regimes = [(r, f) for r in c.regime for f in (c.filler_us if r is Regime.STREAMING else (0.0,))]
        axes: Iterable[tuple[Any, ...]] = itertools.product(c.cp_size, workloads, c.split, c.fabric, c.scope, regimes, c.skew_us)
        cells = []
        for cp_size, (label, steps), split, fabric, scope, (regime, filler_us), skew_us in axes:
            if replay is None and (reason := why_not(split, steps[0], cp_size)):
                raise SpecError(f"workload.new_tokens: {reason} (cell {label}); give longer sequences or change cells.cp_size")
            cells.append(
                Cell(
                    workload_label=label,
                    steps=steps,
                    is_replay=replay is not None,
                    split=split,
                    cp_size=cp_size,
                    fabric=fabric,
                    scope=scope,
                    regime=regime,
                    dims=self.dims,
                    device=self.device,
                    skew_us=skew_us,
                    layers=self.chain.layers if regime is Regime.STREAMING else 1,
                    filler_us=filler_us,
                )
            )
        return Expansion(cells=tuple(cells), replay=replay)


class Expansion(BaseModel):
    """The cells of a spec, and the replay they came from when there is one."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    cells: tuple[Cell, ...]
    replay: Replay | None
