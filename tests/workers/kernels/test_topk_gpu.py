"""The top-k kernel against a stable sort, index for index, and the selection of a whole step against the stages'.

Legend: T query rows, N keys, K top-k.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("the top-k kernel needs a CUDA device", allow_module_level=True)

from tests.workers.kernels.test_logits_gpu import HEADS, integers, ranges
from workers.indexer import stages
from workers.kernels.select import BYTES_PER_LOGIT, select
from workers.kernels.topk import topk_positions, topk_positions_into

pytestmark = pytest.mark.gpu

SIZES = [
    (3, 1, 64),
    (9, 64, 64),
    (9, 65, 64),
    (50, 5003, 64),
    (40, 2048, 2048),
    (40, 2049, 2048),
    (40, 6001, 2048),
    (9, 131075, 2048),
    (7, 300, 1),
]


def normal(rows: int, keys: int) -> torch.Tensor:
    return torch.randn(rows, keys, generator=torch.Generator("cuda").manual_seed(rows + keys), device="cuda")


SCORES = {
    "normal": lambda x: x,
    "ties by the thousand": lambda x: (2 * x).round(),
    "all equal": lambda x: torch.full_like(x, -1.5),
    "denormal": lambda x: x * 1e-40,
    "both zeros": lambda x: torch.where(x > 1.9, x, torch.where(x > 0, 0.0, -0.0)),
    "one far out": lambda x: torch.where(x == x.max(), 1e38, x) - torch.where(x == x.min(), 3e38, 0.0),
    "all positive": lambda x: x.abs() + 3,
    "all negative": lambda x: -x.abs() - 1e-3,
    "many scales": lambda x: x * torch.exp2(20 * x.roll(1, 1)),
    "ascending": lambda x: x.sort(1).values,
    "two values next to each other": lambda x: torch.where(x > 0, 1.0, 1.0 + 2**-23),
}


def expected(scores: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, topk: int) -> torch.Tensor:
    n = torch.arange(scores.shape[1], device="cuda")
    masked = scores.masked_fill((n < ks[:, None]) | (n >= ke[:, None]), float("-inf"))
    order = masked.sort(dim=1, descending=True, stable=True).indices[:, :topk] - ks[:, None]
    out = torch.full((scores.shape[0], topk), -1, device="cuda")
    is_there = torch.arange(order.shape[1], device="cuda") < (ke - ks)[:, None]
    out[:, : order.shape[1]] = torch.where(is_there, order, -1)
    return out.int()


def row_ends(rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ks <= ke, one row that sees nothing and one that sees all."""
    g = torch.Generator("cuda").manual_seed(keys)
    ke = torch.randint(0, keys + 1, (rows,), generator=g, device="cuda")
    ks = (ke * torch.rand(rows, generator=g, device="cuda") * 0.3).long()
    ks[0], ke[0], ks[-1], ke[-1] = min(1, keys), min(1, keys), 0, keys
    return ks.int(), ke.int()


@pytest.mark.parametrize("scores", list(SCORES))
@pytest.mark.parametrize(("rows", "keys", "topk"), SIZES)
def test_index_for_index(rows, keys, topk, scores):
    x, (ks, ke) = SCORES[scores](normal(rows, keys)), row_ends(rows, keys)
    assert torch.equal(topk_positions(x, ks, ke, topk), expected(x, ks, ke, topk))


def test_nothing_outside_is_read():
    x, (ks, ke) = normal(40, 6001), row_ends(40, 6001)
    want = topk_positions(x, ks, ke, 64)
    n = torch.arange(6001, device="cuda")
    x[(n < ks[:, None]) | (n >= ke[:, None])] = float("nan")
    assert torch.equal(topk_positions(x, ks, ke, 64), want)


@pytest.mark.parametrize("sms", [1, 7, 1000])
def test_on_a_few_sms_and_from_rows_at_a_stride(sms):
    x, (ks, ke) = normal(60, 5003), row_ends(60, 5000)
    part = x[:, 3:]
    assert torch.equal(topk_positions(part, ks, ke, 2048, sms), expected(part, ks, ke, 2048))


def test_without_order_the_set_is_the_same():
    x, (ks, ke) = normal(60, 5003).round(), row_ends(60, 5003)
    out = torch.empty(60, 2048, dtype=torch.int32, device="cuda")
    topk_positions_into(x, ks, ke, out, 0, False)
    assert torch.equal(out.sort(1).values, topk_positions(x, ks, ke, 2048).sort(1).values)


def test_more_than_the_kernel_selects_is_refused():
    x, (ks, ke) = normal(2, 10), row_ends(2, 10)
    with pytest.raises(ValueError, match="topk 2049"):
        topk_positions(x, ks, ke, 2049)


def plan(ke: torch.Tensor, keys: int, mib: int = 1) -> tuple[stages.RowRange, ...]:
    return stages.row_ranges(ke.cpu(), keys, BYTES_PER_LOGIT, mib)


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="the logits kernel needs a Hopper GPU")
class TestSelect:
    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("topk", [64, 2048])
    def test_as_the_stages_do(self, heads, topk):
        """Integers: equal scores by the thousand, and every sum exact in any order."""
        rows, keys = 700, 2900
        inputs, (ks, ke) = integers(rows, keys, heads), ranges(rows, keys, is_causal=True)
        ks[300:] = 1000
        several = plan(ke, keys)
        assert len(several) > 3
        # Not the stages' own top-k: torch.topk takes any of the scores that tie at the cut.
        want = expected(stages.mqa_logits(*inputs, ks, ke), ks, ke, topk)
        for ranges_, sms in ((several, 0), (several, 9), (plan(ke, keys, 64), 0)):
            assert torch.equal(select(*inputs, ks, ke, topk, ranges_, sms), want)

    def test_rows_in_no_range_are_padding(self):
        inputs, (ks, ke) = integers(20, 100, 64), ranges(20, 100, is_causal=True)
        out = select(*inputs, ks, ke, 64, (stages.RowRange(5, 15, 100),))
        assert bool((out[:5] == -1).all()) and bool((out[15:] == -1).all()) and bool((out[5:15] >= 0).all())

    def test_in_a_cuda_graph(self):
        inputs, (ks, ke) = integers(300, 2900, 64), ranges(300, 2900, is_causal=True)
        several = plan(ke, 2900)
        want = select(*inputs, ks, ke, 2048, several)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = select(*inputs, ks, ke, 2048, several)
        out.fill_(0)
        graph.replay()
        assert torch.equal(out, want)
