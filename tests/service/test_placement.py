"""From nodes and a spec to bundles, ranks in order, and refusals; no cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.names import Device
from experiments.spec.placement import PlacementSpec
from service.run.placement import (
    Node,
    PlacementError,
    bundles_of,
    matches,
    rank_order,
    refuse_other_than_asked,
    refuse_unplaceable,
)
from service.run.rank_group import Whereabouts, gpus_to_see

NODES = tuple(Node(f"id{i}", f"h{i}", f"10.0.0.{9 + i}", 8, 8, {"pool": "ab"[i % 2]}) for i in range(3))


def lie(node: int, pid: int = 1, gpus: tuple[str, ...] = (), interface: str = "eth0") -> Whereabouts:
    return Whereabouts(f"id{node}", f"h{node}", f"10.0.0.{9 + node}", interface, 8, pid, 0, gpus)


def test_without_a_topology_every_rank_has_a_bundle():
    bundles = bundles_of(4, PlacementSpec(strategy="SPREAD", cpus_per_rank=0.5), Device.CPU)
    assert bundles.resources == ({"CPU": 0.5},) * 4
    assert (bundles.strategy, bundles.ranks, bundles.labels) == ("SPREAD", (1, 1, 1, 1), {})


def test_a_topology_has_a_bundle_for_each_node():
    bundles = bundles_of(16, PlacementSpec(ranks_per_node=8, cpus_per_rank=2, node_labels={"pool": "a"}), Device.CUDA)
    assert bundles.resources == ({"CPU": 16, "GPU": 8},) * 2
    assert (bundles.strategy, bundles.ranks, bundles.labels) == ("STRICT_SPREAD", (8, 8), {"pool": "a"})


@pytest.mark.parametrize(("share", "gpus"), [(0.25, 0.75), (0.5, 2), (1.0, 3)])
def test_a_bundle_has_part_of_one_gpu_or_whole_ones(share, gpus):
    assert bundles_of(3, PlacementSpec(nodes=1, gpus_per_rank=share), Device.CUDA).resources[0]["GPU"] == gpus


@pytest.mark.parametrize(
    ("selector", "labels", "is_match"),
    [
        ("a", {"pool": "a"}, True),
        ("a", {"pool": "b"}, False),
        ("a", {}, False),
        ("!a", {"pool": "b"}, True),
        ("!a", {}, True),
        ("in(a,c)", {"pool": "c"}, True),
        ("in(a,c)", {"pool": "b"}, False),
        ("!in(a,c)", {"pool": "b"}, True),
        ("!in(a,c)", {"pool": "a"}, False),
    ],
)
def test_label_selectors_mean_what_ray_says(selector, labels, is_match):
    assert matches(labels, {"pool": selector}) is is_match


def test_ranks_of_a_node_are_consecutive_and_follow_its_gpus():
    places = [lie(1, 5, ("10",)), lie(0, 9, ("1",)), lie(1, 6, ("2",)), lie(0, 8, ("1",))]
    assert rank_order(places) == [3, 1, 2, 0]
    assert rank_order([replace(lie(0), address="10.0.0.10"), lie(0)]) == [1, 0]  # numbers, not letters


@pytest.mark.parametrize(
    ("node", "seen"),
    [
        ([("0",), ("1",), ("3",)], [("0", "1", "3"), ("1", "0", "3"), ("3", "0", "1")]),
        ([("1",), ("1",), ("0",), ("0",)], [("1", "0"), ("1", "0"), ("0", "1"), ("0", "1")]),  # two ranks a GPU
        ([(), ()], [(), ()]),  # nobody has said which is whose
    ],
)
def test_a_rank_sees_its_own_gpu_first_and_those_of_its_node(node, seen):
    places = [lie(0, gpus=gpus) for gpus in node]
    assert [gpus_to_see(places, own) for own in places] == seen


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            {"ranks_per_node": 2},
            "placement.ranks_per_node 2: 2 ranks on each of 4 nodes: needs 2 CPUs and 2 GPUs on each; 3 of the cluster's 3",
        ),
        (
            {"ranks_per_node": 4, "node_labels": {"pool": "b"}},
            "pool=b; 1 of the cluster's 3 nodes will do: h0 (10.0.0.9; 8 CPUs, 8 GPUs), h1",
        ),
        ({"nodes": 1, "cpus_per_rank": 2}, "placement.nodes 1: 8 ranks inside one node: needs 16 CPUs"),
        ({"strategy": "STRICT_SPREAD"}, "placement.strategy STRICT_SPREAD: 1 rank on each of 8 nodes"),
        ({"strategy": "STRICT_PACK", "cpus_per_rank": 2}, "placement.strategy STRICT_PACK: 8 ranks inside one node"),
        ({"node_labels": {"pool": "c", "rack": "1"}}, "no node has pool=c, rack=1; the cluster has pool: a, b; rack: on no node"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_before_it_is_asked(asked, says):
    with pytest.raises(PlacementError) as caught:
        refuse_unplaceable(NODES, [2, 8], PlacementSpec(**asked), Device.CUDA)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "asked", [{}, {"ranks_per_node": 4}, {"nodes": 2}, {"strategy": "SPREAD"}, {"node_labels": {"pool": "a"}}]
)
def test_what_it_can_give_is_not_refused(asked):
    refuse_unplaceable(NODES, [2, 8], PlacementSpec(**asked), Device.CUDA)


@pytest.mark.parametrize(
    ("asked", "nodes_of_ranks", "says"),
    [
        (
            {"ranks_per_node": 2},
            (0, 0, 0, 1),
            "asked for 2 ranks on each of 2 nodes, and the ranks came to lie: 3 on h0 (10.0.0.9), 1 on h1",
        ),
        ({"nodes": 1}, (0, 1), "asked for 2 ranks inside one node, and the ranks came to lie: 1 on h0 (10.0.0.9), 1 on h1"),
        ({"strategy": "STRICT_SPREAD"}, (0, 0), "asked for 1 rank on each of 2 nodes, and the ranks came to lie: 2 on h0"),
        (
            {"node_labels": {"pool": "a"}},
            (0, 1),
            "asked for nodes with pool=a, and a rank came to lie on h1 (10.0.0.10), which has pool=b",
        ),
        ({"interfaces": ("ib0", "ib1")}, (0, 1), "asked for ib0 or ib1, and h0 (10.0.0.9) has none of them"),
    ],
)
def test_a_map_that_was_not_asked_for_is_refused_naming_both(asked, nodes_of_ranks, says):
    places = [lie(node, pid, interface="" if "interfaces" in asked else "eth0") for pid, node in enumerate(nodes_of_ranks)]
    with pytest.raises(PlacementError) as caught:
        refuse_other_than_asked(places, NODES, PlacementSpec(**asked), Device.CPU)
    assert says in str(caught.value)


@pytest.mark.parametrize(("gpus", "what"), [((("0",), ("0",)), "GPU 0 of h0"), ((("0",), ()), "no GPU")])
def test_ranks_that_share_a_gpu_unasked_are_refused(gpus, what):
    places = [lie(0, pid, names) for pid, names in enumerate(gpus)]
    with pytest.raises(PlacementError, match=what):
        refuse_other_than_asked(places, NODES, PlacementSpec(), Device.CUDA)
    refuse_other_than_asked(places, NODES, PlacementSpec(gpus_per_rank=0.5), Device.CUDA)


def test_the_map_that_was_asked_for_is_not_refused():
    places = [lie(node, pid, (str(pid),), "ib0") for pid, node in enumerate((0, 2, 2, 0))]
    asked = PlacementSpec(nodes=2, node_labels={"pool": "in(a)"}, interfaces=("ib1", "ib0"))
    refuse_other_than_asked(places, NODES, asked, Device.CUDA)
