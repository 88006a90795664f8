"""`logits`: where DeepGEMM's may be asked for, and what it sets apart."""

from __future__ import annotations

import pytest

from experiments import catalogue
from experiments.errors import SpecError
from experiments.names import Logits
from experiments.spec.arms import ArmSpec
from workers.indexer.stage_sets import StageSettings

SIXTEEN = "dims={name: few, hidden: 256, q_lora_rank: 128, num_heads: 16, num_layers: 1}"
THEIRS = "arms.overlapped.logits=deepgemm"


@pytest.mark.parametrize(
    ("experiment", "overrides", "says"),
    [
        ("quickstart", [THEIRS], "arms.overlapped.logits deepgemm needs device cuda, not 'cpu'"),
        ("one_gpu", ["arms.fused.logits=deepgemm", SIXTEEN], "scores 32 or 64 heads, not 16: change dims.num_heads"),
        ("one_gpu", ["arms.fused.logits=deep_gemm"], "'cplab' or 'deepgemm'"),
    ],
)
def test_logits_that_cannot_be_are_refused_by_key(experiment, overrides, says):
    with pytest.raises(SpecError, match=says) as error:
        catalogue.load(experiment, overrides)
    assert "\n" not in str(error.value)


def test_logits_are_a_factor_with_a_serial_of_their_own():
    ours, theirs = ArmSpec(), ArmSpec(logits=Logits.DEEPGEMM)
    assert theirs.differs_from(ours) == {"logits": ("cplab", "deepgemm")}
    assert StageSettings.of(theirs, is_chain=False) != StageSettings.of(ours, is_chain=False)
    assert str(StageSettings.of(theirs, is_chain=False)) == "separate stages, deepgemm logits"
