"""Whatever a spec says, it is one clear mistake or a plan: never another exception, and never anything started.

CPLAB_FUZZ_CASES=10000 runs that many cases of each kind instead of 100.
"""

from __future__ import annotations

import copy
import os
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import catalogue
from experiments.errors import SpecError, UserError
from experiments.spec.experiment import ExperimentSpec
from service.run.preview import preview

CASES = int(os.environ.get("CPLAB_FUZZ_CASES", "100"))
FUZZED = settings(max_examples=CASES, suppress_health_check=list(HealthCheck), derandomize=CASES <= 100)
BASES = {
    name: yaml.safe_load((catalogue.FOLDER / f"{name}.yaml").read_text())
    for name in ("quickstart", "overlap_vs_baseline", "one_gpu_layer", "nightly")
}
WORDS = st.sampled_from(
    [
        "baseline",
        "serial",
        "overlap_rotate",
        "zigzag",
        "interleave",
        "process_group",
        "emulated",
        "cpu",
        "cuda",
        "simulated",
        "qk",
        "indexer",
        "key_ready",
        "drained",
        "streaming",
        "mini",
        "deepseek_v32",
        "grid",
        "trace",
        "bf16",
        "fp8",
        "collective",
        "copy_engine",
        "symmetric_memory",
        "fused",
        "cuda_graph",
        "PACK",
        "SPREAD",
        "../x",
        "/etc/passwd",
        "~",
        "no:such",
        "os:getcwd",
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, float("inf"), float("-inf"), float("nan"), 0.5, 1e-300]),
    st.floats(),
    st.text(max_size=12),
    WORDS,
)
KEYS = st.one_of(
    st.sampled_from(
        [
            "kind",
            "new_tokens",
            "cp_size",
            "split",
            "fabric",
            "schedule",
            "launches",
            "blocks",
            "name",
            "dims",
            "device",
            "arms",
            "weights",
            "trace",
            "seed",
        ]
    ),
    st.text(string.printable, max_size=8),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)


def places(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index of a document, as paths."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path for key, child in children for path in [(*here, key), *places(child, (*here, key))]]


@st.composite
def broken(draw: st.DrawFn) -> dict[str, Any]:
    """A catalogue entry in which up to three things were changed, dropped or added."""
    content = copy.deepcopy(BASES[draw(st.sampled_from(sorted(BASES)))])
    for _ in range(draw(st.integers(1, 3))):
        if not (paths := places(content)):
            break
        path = draw(st.sampled_from(paths))
        node = content
        for part in path[:-1]:
            node = node[part]
        match draw(st.sampled_from(["change", "drop", "add"])):
            case "change":
                node[path[-1]] = draw(VALUES)
            case "drop":
                del node[path[-1]]
            case "add" if isinstance(node, dict):
                node[draw(KEYS)] = draw(VALUES)
    return content


def one_mistake_or_a_plan(make: Any) -> ExperimentSpec | None:
    """Runs everything that comes before anything starts."""
    try:
        spec = make()
        expansion = spec.expand()
    except UserError as error:
        assert str(error).strip(), "a mistake has words"
        assert "Traceback" not in str(error)
        return None
    assert expansion.cells
    assert len({cell.cell_id for cell in expansion.cells}) == len(expansion.cells)
    assert all(line.minutes >= 0 for line in preview(spec, expansion.cells[:20]))
    return spec


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_started():
    """No actor, no rank process, no cluster: whatever would start one fails the test."""
    from service.run import cluster, ray_ranks
    from workers.host import RankHost

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("something was started")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster, "connect", started)
        patched.setattr(ray_ranks, "ray_group", started)
        patched.setattr(RankHost, "launch", started)
        yield


@FUZZED
@given(content=broken())
def test_a_spec_with_anything_in_it_is_one_mistake_or_a_plan(content):
    spec = one_mistake_or_a_plan(lambda: catalogue.validate(content, "mine.yaml"))
    if spec is not None:
        assert ExperimentSpec.model_validate_json(spec.model_dump_json()).spec_hash == spec.spec_hash, "the records give it back"


@FUZZED
@given(base=st.sampled_from(sorted(BASES)), path=st.data(), text=VALUES)
def test_an_override_of_anything_is_one_mistake_or_a_plan(base, path, text):
    keys = path.draw(st.sampled_from([".".join(map(str, p)) for p in places(BASES[base])]) | st.text(max_size=20), "key")
    value = path.draw(st.just(yaml.safe_dump(text, default_flow_style=True)) | st.text(max_size=30), "value")
    one_mistake_or_a_plan(lambda: catalogue.load(base, [f"{keys}={value}"]))


@FUZZED
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | broken().map(lambda c: yaml.safe_dump(c).encode())
)
def test_a_file_with_any_bytes_is_one_mistake_or_a_plan(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content)
    one_mistake_or_a_plan(lambda: catalogue.load(str(file)))


@pytest.mark.parametrize("section", ["workload.trace", "weights.checkpoint"])
@pytest.mark.parametrize("leaves", ["/etc/passwd", "../secret", "a/../../secret", "link/secret", "./../x"])
def test_a_path_in_a_file_cannot_leave_its_folder(section, leaves, tmp_path):
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    content = copy.deepcopy(BASES["quickstart"])
    part, key = section.split(".")
    content[part] = {"kind": "trace", key: leaves} if part == "workload" else {key: leaves}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=r"leaves the file's folder"):
        catalogue.load(str(folder / "mine.yaml"))


def test_yaml_tags_make_no_objects(tmp_path: Path):
    file, mark = tmp_path / "mine.yaml", tmp_path / "was here"
    file.write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(SpecError, match="not YAML"):
        catalogue.load(str(file))
    assert not mark.exists()
