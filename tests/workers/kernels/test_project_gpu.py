"""The projection of index keys against sums in float64, and the bits of a row under any company.

Legend: T rows, X hidden, D head dim.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the projection of keys needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("triton", reason="the projection needs Triton")

from workers.kernels.project import project_key

pytestmark = pytest.mark.gpu

SLACK = 2.0**-24
"""What a sum may err by before its one rounding to bf16, as a share of sum |x||w|: fp32's unit of roundoff. Seen on an H100 with X = 7168: 2^-26 (the
vendor's product of fp32 2^-25, of bf16 2^-20.5). For normal products sum |x||w| is some 2^6 times the result, so the bound is 2^-18 of it, far
below bf16's half step, 2^-9."""
FLIPS = 1 / 2000
"""Share of results that may differ from the exact sum's rounding. Seen: 1 in 8,000, and 1 in 240 where sums stay in the matrix unit."""
ROWS = (0, 1, 7, 16, 133, 255, 256, 257, 512, 777, 1024, 1500, 2048, 3000, 4096, 5001, 8192, 10_001)
"""Every way to lay out the work, at its ends and between."""


def inputs(rows: int, hidden: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    x_TX = torch.randn(rows, hidden, generator=g, device="cuda")
    weight_DX = torch.randn(128, hidden, generator=g, device="cuda") * hidden**-0.5
    return x_TX.bfloat16(), weight_DX.bfloat16()


def half_steps(exact: torch.Tensor) -> torch.Tensor:
    """Half of the distance between bf16 values, float64."""
    return torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126))) - 8)


@pytest.mark.parametrize("hidden", [7168, 6144])
def test_sums_are_as_good_as_fp32s(hidden):
    x, weight = inputs(1024, hidden)
    exact = x.double() @ weight.double().T
    got = project_key(x, weight)
    slack = SLACK * (x.double().abs() @ weight.double().abs().T)
    assert ((got.double() - exact).abs() <= half_steps(exact) + slack).all()
    assert (got != exact.bfloat16()).double().mean() <= FLIPS


@pytest.mark.parametrize("hidden", [7168, 6144, 1024, 200, 72, 129, 8])
@pytest.mark.parametrize("rows", [1, 7, 200, 1100])
def test_sums_of_integers_are_exact(rows, hidden):
    g = torch.Generator("cuda").manual_seed(hidden)
    x = torch.randint(-3, 4, (rows, hidden), generator=g, device="cuda").bfloat16()
    weight = torch.randint(-3, 4, (128, hidden), generator=g, device="cuda").bfloat16()
    assert torch.equal(project_key(x, weight), (x.double() @ weight.double().T).bfloat16())


@pytest.mark.parametrize("hidden", [7168, 200])
def test_a_rows_bits_depend_on_nothing_but_the_row(hidden):
    x, weight = inputs(20_000, hidden)
    expected = project_key(x, weight)
    order = torch.randperm(len(x), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    assert torch.equal(project_key(x[order], weight), expected[order])
    for rows in ROWS:
        for first in (0, 4099, len(x) - rows):
            got = project_key(x[first : first + rows], weight)
            assert torch.equal(got, expected[first : first + rows]), f"{rows} rows from {first}"


@pytest.mark.parametrize("rows", [3, 300, 2000, 4000, 9000])
def test_a_row_that_is_no_number_spoils_no_other(rows):
    x, weight = inputs(rows, 7168)
    expected = project_key(x, weight)
    x[rows // 2] = torch.nan
    got = project_key(x, weight)
    assert got[rows // 2].isnan().all()
    got[rows // 2] = expected[rows // 2]
    assert torch.equal(got, expected)


def test_every_element_is_written():
    """Whatever the memory held before."""
    for rows in ROWS:
        x, weight = inputs(rows, 7168)
        dirt = torch.full((32 * rows * 128 + 1,), torch.nan, device="cuda")
        del dirt
        assert project_key(x, weight).isfinite().all()


@pytest.mark.parametrize("rows", [100, 1000, 4000, 8000])
def test_a_graph_replays_the_same_bits(rows):
    x, weight = inputs(rows, 7168)
    expected = project_key(x, weight)
    stored = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stored.copy_(project_key(x, weight))
    for _ in range(3):
        stored.zero_()
        graph.replay()
        assert torch.equal(stored, expected)


def test_calls_on_two_streams_share_nothing():
    x, weight = inputs(1024, 7168)
    y, _ = inputs(1024, 7168, seed=1)
    expected = project_key(x, weight), project_key(y, weight)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    got: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for _ in range(20):
        for stream, z, results in zip(streams, (x, y), got, strict=True):
            with torch.cuda.stream(stream):
                results.append(project_key(z, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(k, right) for results, right in zip(got, expected, strict=True) for k in results)


def test_what_it_does_not_have_is_refused():
    x, weight = inputs(4, 256)
    for wrong in ((x.float(), weight), (x, weight[:64]), (x[:, :128], weight), (x.T.contiguous().T, weight), (x[0], weight)):
        with pytest.raises(ValueError, match="wants"):
            project_key(*wrong)
