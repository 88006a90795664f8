"""A cell: one point of the grid, all that its arms share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from experiments.names import Device, FabricKind, Regime, Scope, Split
from experiments.spec.dims import CACHE_BYTES_PER_TOKEN, DimsSpec
from experiments.spec.eligibility import is_beyond_upstream, why_not
from experiments.spec.fabric import FabricSpec
from experiments.workload.step import Workload

KEY_BYTES = 256
"""One bf16 index key on the wire."""
FILLER_BYTES = 1 << 24
"""What the copies of a filler go through: more than a core's caches keep."""


@dataclass(frozen=True)
class Cell:
    """Workload x split x cp_size x fabric x scope x regime x dims (x injected skew x filler), on one device.

    Attributes:
        skew_us: The last rank starts every trial that much after the others.
        layers: Of a streaming chain; 1 when drained.
        filler_us: Work after each layer of a chain, in place of attention and MoE.
    """

    workload_label: str
    steps: Workload
    is_replay: bool
    split: Split
    cp_size: int
    fabric: FabricSpec
    scope: Scope
    regime: Regime
    dims: DimsSpec
    device: Device
    skew_us: float = 0.0
    layers: int = 1
    filler_us: float = 0.0

    @cached_property
    def content(self) -> dict[str, Any]:
        """What the identity is made of, as JSON values; the workload by its steps, so that a label can be renamed.

        A coordinate that came later is left out where it is at rest, so that an older cell keeps its identity.
        """
        at_rest = {"skew_us": 0.0, "layers": 1, "filler_us": 0.0}
        later = {name: getattr(self, name) for name, rest in at_rest.items() if getattr(self, name) != rest}
        return {
            "steps": [[[s.prefix_tokens, s.new_tokens] for s in step.sequences] for step in self.steps],
            "split": self.split.value,
            "cp_size": self.cp_size,
            "fabric": self.fabric.identity,
            "scope": self.scope.value,
            "regime": self.regime.value,
            "dims": self.dims.model_dump(mode="json"),
            "device": self.device.value,
            **later,
        }

    @cached_property
    def cell_id(self) -> str:
        """Twelve hex digits that hash the content."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Readable, and unique inside a sweep; the usual scope and regime, and what is at rest, are left out."""
        device = f"{self.device}-" if self.device is not Device.CPU else ""
        scope = f"-{self.scope}" if self.scope is not Scope.QK else ""
        regime = f"-{self.regime}" if self.regime is not Regime.DRAINED else ""
        filler = f"-filler{self.filler_us:g}us" if self.filler_us else ""
        skew = f"-skew{self.skew_us:g}us" if self.skew_us else ""
        return f"{device}{self.workload_label}-cp{self.cp_size}-{self.split}-{self.fabric.name}{scope}{regime}{filler}{skew}"

    @property
    def new_tokens(self) -> int:
        return sum(step.new_tokens for step in self.steps)

    @property
    def prefix_tokens(self) -> int:
        return sum(s.prefix_tokens for step in self.steps for s in step.sequences)

    @property
    def steps_without_cp(self) -> int:
        """Steps of a replay that the split cannot take; they run unsplit in every arm."""
        return sum(why_not(self.split, step, self.cp_size) is not None for step in self.steps)

    @property
    def beyond_upstream(self) -> bool:
        return any(is_beyond_upstream(self.split, step) for step in self.steps)

    @property
    def is_emulated(self) -> bool:
        return self.fabric.kind is not FabricKind.PROCESS_GROUP

    @property
    def num_ranks(self) -> int:
        """Rank processes that run it: cp_size, or the one of a one_rank fabric."""
        return self.fabric.num_processes(self.cp_size)

    def bytes_per_rank(self, num_inputs: int) -> int:
        """Estimate of a rank's tensors for the largest step: every layer's weights, keys and cache, inputs, q in its stages, a filler's copies."""
        dims = self.dims
        widest = max(self.steps, key=lambda step: step.new_tokens)
        local = -(-widest.new_tokens // self.cp_size)
        heads = dims.num_heads * dims.head_dim
        weights = 2 * (heads * dims.q_lora_rank + dims.head_dim * dims.hidden + dims.num_heads * dims.hidden)
        inputs = 2 * (widest.new_tokens + num_inputs * 64) * (dims.hidden + dims.q_lora_rank)
        queries = local * heads * (2 + 2 + 4 + 4)
        # Of each layer: the packed cache, the destination, and the right keys of every input set; one buffer of the wire for all.
        keys = widest.kv_tokens * CACHE_BYTES_PER_TOKEN + (num_inputs + 1) * widest.new_tokens * KEY_BYTES
        filler = FILLER_BYTES if self.filler_us else 0
        return self.layers * (weights + keys) + inputs + queries + widest.new_tokens * KEY_BYTES + filler

    def as_json(self) -> dict[str, Any]:
        return {
            "cell_id": self.cell_id,
            "label": self.label,
            "workload": self.workload_label,
            "is_replay": self.is_replay,
            "num_steps": len(self.steps),
            "new_tokens": self.new_tokens,
            "prefix_tokens": self.prefix_tokens,
            "steps_without_cp": self.steps_without_cp,
            "beyond_upstream": self.beyond_upstream,
            "fabric_name": self.fabric.name,
            "dims_name": self.dims.name,
            "skew_us": self.skew_us,
            "layers": self.layers,
            "filler_us": self.filler_us,
            **{key: value for key, value in self.content.items() if key != "steps"},
        }


def steps_as_json(steps: Workload) -> list[Any]:
    """The steps with their sequences, for records."""
    return [asdict(step) for step in steps]
