"""What a placement may say, and that what it does not say changes nothing."""

from __future__ import annotations

import pytest

from experiments import catalogue
from experiments.errors import SpecError
from experiments.spec.placement import PlacementSpec


def spec(*settings):
    return catalogue.load("overlap_vs_baseline", [f"placement.{setting}" for setting in settings])


def test_what_is_not_asked_for_is_in_no_hash():
    assert set(PlacementSpec().model_dump()) == {"strategy", "cpus_per_rank", "gpus_per_rank"}
    assert spec().spec_hash == spec("nodes=null", "node_labels={}", "interfaces=[]").spec_hash
    assert len({spec().spec_hash, spec("nodes=2").spec_hash, spec("interfaces=eth1").spec_hash}) == 3


def test_what_is_asked_for_is_stored():
    asked = PlacementSpec(ranks_per_node=8, node_labels={"pool": "h100"}, interfaces=("ib0", "eth0"))
    assert PlacementSpec.model_validate(asked.model_dump(mode="json")) == asked


@pytest.mark.parametrize(
    ("asked", "num_ranks", "topology"),
    [
        ({}, 8, None),
        ({"ranks_per_node": 8}, 2, (2,)),
        ({"ranks_per_node": 8}, 8, (8,)),
        ({"ranks_per_node": 8}, 16, (8, 8)),
        ({"nodes": 1}, 8, (8,)),
        ({"nodes": 2}, 16, (8, 8)),
    ],
)
def test_a_topology_says_how_many_ranks_each_node_has(asked, num_ranks, topology):
    placement = PlacementSpec(**asked)
    assert placement.why_not(num_ranks) is None
    assert placement.topology(num_ranks) == topology


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["ranks_per_node=3"], "placement.ranks_per_node 3: 4 ranks do not fill nodes of 3"),
        (["nodes=4"], "placement.nodes 4: 2 ranks do not lie evenly on 4 nodes"),
        (["nodes=2", "ranks_per_node=4"], "both state a topology"),
        (["nodes=2", "strategy=STRICT_SPREAD"], "strategy STRICT_SPREAD"),
        (["interfaces=eth0 up"], "placement.interfaces"),
        (["node_labels={pool: a b}"], "placement.node_labels"),
        (["node_labels={pool: 'in()'}"], "placement.node_labels"),
    ],
)
def test_what_no_cluster_can_give_is_refused(settings, says):
    with pytest.raises(SpecError) as caught:
        spec(*settings)
    assert says in str(caught.value)


def test_a_played_fabric_has_one_real_rank():
    with pytest.raises(SpecError, match="1 ranks do not lie evenly on 2 nodes"):
        catalogue.load("one_gpu", ["placement.nodes=2"])
    assert catalogue.load("one_gpu", ["placement.ranks_per_node=3"]).placement.topology(1) == (1,)
