"""Which kernels an arm's stages are: `STAGE_SETS` registers an indexer under every name of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch

from experiments.names import Logits, Payload, Stages
from experiments.spec.arms import ArmSpec
from experiments.spec.dims import DimsSpec
from workers.indexer.fused import FusedIndexer
from workers.indexer.indexer import Indexer
from workers.indexer.ops import StageOps, TorchOps
from workers.indexer.simulated import SimulatedOps
from workers.indexer.weights import IndexerWeights
from workers.lanes import Lanes

STAGE_SETS: dict[Stages, type[Indexer]] = {Stages.SEPARATE: Indexer, Stages.FUSED: FusedIndexer}


class StageSettings(NamedTuple):
    """What may change an arm's bits besides its device and split; arms that share it are held to one `serial`."""

    stages: Stages
    reserved_sms: int
    logits: Logits = Logits.CPLAB
    chained: Payload = Payload.BF16
    """As what keys reach the next layer of a chain. A payload changes no bit of a single layer's index keys: one `serial` serves them all."""

    @classmethod
    def of(cls, arm: ArmSpec, is_chain: bool) -> StageSettings:
        return cls(arm.stages, arm.reserved_sms, arm.logits, arm.payload if is_chain else Payload.BF16)

    @property
    def unchained(self) -> StageSettings:
        """The same stages with bf16 keys."""
        return self._replace(chained=Payload.BF16)

    def __str__(self) -> str:
        logits = "" if self.logits is Logits.CPLAB else f", {self.logits} logits"
        return f"{self.stages} stages{logits}" + (f", {self.reserved_sms} SMs reserved" if self.reserved_sms else "")


def ops_of(settings: StageSettings, device: torch.device) -> StageOps:
    """The kernels of a device; torch's own where there are none of ours.

    Raises:
        UserError: Others' kernels are asked for, and not installed.
    """
    if device.type == "meta":
        return SimulatedOps()
    if device.type == "cuda":
        from workers.kernels.ops import CudaOps, DeepGemmOps

        ops = DeepGemmOps if settings.logits is Logits.DEEPGEMM else CudaOps
        return ops(settings.reserved_sms, device)
    return TorchOps()


def make_indexer(settings: StageSettings, dims: DimsSpec, weights: IndexerWeights, lanes: Lanes) -> Indexer:
    """One layer's indexer."""
    return STAGE_SETS[settings.stages](dims, weights, lanes, ops_of(settings, lanes.device))
