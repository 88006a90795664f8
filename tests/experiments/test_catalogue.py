"""A spec is whole and right, or it is refused in one clear line that names the key."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments import catalogue
from experiments.errors import SpecError
from experiments.names import BASELINE_ARM, Split


@pytest.mark.parametrize("name", catalogue.names())
def test_every_catalogue_entry_loads_and_compares_the_two_arms(name):
    spec = catalogue.load(name)
    assert spec.name == name
    assert {BASELINE_ARM, "overlapped"} <= set(spec.arms)
    assert spec.arms["overlapped"].differs_from(spec.arms[BASELINE_ARM]) == {"schedule": ("serial", "overlap_rotate")}
    assert catalogue.about(name)


def test_quickstart_has_both_links_and_both_splits():
    cells = catalogue.load("quickstart").expand().cells
    assert len(cells) == 4
    assert {c.split for c in cells} == set(Split)
    assert {c.is_emulated for c in cells} == {True, False}
    assert len({c.cell_id for c in cells}) == 4


def test_overrides_reach_every_depth():
    spec = catalogue.load(
        "quickstart",
        [
            "measurement.launches=7",
            "cells.cp_size=[1,2]",
            "arms.third.schedule=serial",
            "dims=glm_5",
            "cells.fabric=process_group",
        ],
    )
    assert spec.measurement.launches == 7
    assert spec.cells.cp_size == (1, 2)
    assert spec.arms["third"].schedule == "serial"
    assert spec.dims.name == "glm_5"
    assert len(spec.expand().cells) == 4


def test_identity_is_content():
    base, same = catalogue.load("quickstart"), catalogue.load("quickstart", ["about=other words"])
    other = catalogue.load("quickstart", ["measurement.launches=6"])
    assert base.spec_hash == same.spec_hash != other.spec_hash
    assert [c.cell_id for c in base.expand().cells] == [c.cell_id for c in other.expand().cells]
    assert base.expand().cells[0].cell_id != catalogue.load("quickstart", ["workload.new_tokens=513"]).expand().cells[0].cell_id


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("measurement.lunches=5", "unknown key 'lunches' (did you mean 'launches'?)"),
        ("workload.tokens=5", "unknown key 'tokens'"),
        ("cells.split=zigzga", "cells.split"),
        ("dims=deepseek", "unknown dims preset 'deepseek' (did you mean 'deepseek_v32'?)"),
        ("arms.overlapped.schedule=overlap_rotat", "unknown schedule 'overlap_rotat' (did you mean 'overlap_rotate'?)"),
        (
            "arms.overlapped.sched=serial",
            "unknown key 'sched' (did you mean 'schedule'?); allowed: execution, logits, payload, planted_wait_us, reserved_sms, schedule, "
            "stages, transport",
        ),
        ("cells.fabric=ethernet", "unknown fabric 'ethernet'"),
        ("cells.fabric={kind: emulated, bandwidth_gbps: 1}", "unknown key 'bandwidth_gbps' (did you mean 'bandwidth_mbps'?)"),
        ("cells.fabric={kind: emulated}", "needs bandwidth_mbps"),
        ("cells.fabric={kind: process_group, latency_us: 3}", "takes its pace from the real links"),
        ("measurement.gather_timeout_s=10ms", "measurement.gather_timeout_s"),
        ("measurement.launches=4", "greater than or equal to 5"),
        ("measurement.launches=many", "measurement.launches"),
        ("workload.new_tokens=[]", "at least one"),
        ("workload.new_tokens=3", "4 new tokens in every sequence; the shortest has 3"),
        ("workload.new_tokens=-3", "workload.new_tokens"),
        ("cells.cp_size=0", "cells.cp_size"),
        ("cells.cp_size=2.5", "cells.cp_size"),
        ("cells.cp_size=[2,2]", "a value twice"),
        ("workload.kind=mesh", "workload"),
        ("arms=3", "arms"),
        ("arms={overlapped: {schedule: serial}}", "'baseline' must be there"),
        ("arms={baseline: {schedule: serial}}", "2 to 12 arms"),
        ("arms._x.schedule=serial", "an arm's name"),
        ("nonsense", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("a..b=3", "expected key.path=value"),
        ("name.x=3", "has no keys"),
        ("cells.split=[", "not YAML"),
        ("device=tpu", "'cpu', 'cuda' or 'simulated'"),
        ("weights.checkpoint=7", "weights.checkpoint"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, says):
    with pytest.raises(SpecError) as caught:
        catalogue.load("quickstart", [override]).expand()
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 400


def test_keys_of_a_trace_are_named_without_the_kind():
    with pytest.raises(SpecError, match=r"mooncake: workload\.requests: "):
        catalogue.load("mooncake", ["workload.trace=x.jsonl", "workload.requests=-1"])


@pytest.mark.parametrize("name", ["quickstrat", "no/such.yaml", "../etc/passwd"])
def test_an_unknown_spec_is_refused(name):
    with pytest.raises(SpecError, match="SPEC"):
        catalogue.load(name)


@pytest.mark.parametrize("text", ["[1, 2]", "{", "just words", "!!python/object/apply:os.system ['true']", "\x00"])
def test_what_is_no_spec_is_refused(tmp_path, text):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError):
        catalogue.load(str(path))


@pytest.mark.parametrize("trace", ["../outside.jsonl", "/etc/passwd", "a/../../b"])
def test_paths_in_a_file_stay_in_its_folder(tmp_path, trace):
    content = yaml.safe_load((catalogue.FOLDER / "mooncake.yaml").read_text())
    content["workload"]["trace"] = trace
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match="leaves the file's folder"):
        catalogue.load(str(path))
    elsewhere = tmp_path.parent / "outside.jsonl"
    assert catalogue.load("mooncake", [f"workload.trace={elsewhere}"]).workload.trace == str(elsewhere)


keys = st.sampled_from(
    [
        "dims",
        "cells.split",
        "cells.cp_size",
        "cells.fabric",
        "workload.new_tokens",
        "workload",
        "arms",
        "arms.x",
        "arms.x.schedule",
        "measurement",
        "measurement.launches",
        "verify",
        "placement.strategy",
        "seed",
        "weights.checkpoint",
        "device",
        "name",
        "simulation",
    ]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["zigzag", "mini", "serial"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@example([("simulation", {"\n": None})])
@given(st.lists(st.tuples(keys, values), min_size=1, max_size=3))
def test_whatever_is_set_is_a_spec_or_a_users_error(changes):
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10))}" for key, value in changes
    ]
    try:
        spec = catalogue.load("quickstart", overrides)
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert spec.spec_hash


def test_a_merge_key_may_be_overridden_and_a_key_may_not_be_written_twice(tmp_path):
    content = (catalogue.FOLDER / "quickstart.yaml").read_text().replace("name: quickstart", "name: mine")
    path = tmp_path / "mine.yaml"
    path.write_text(content + "verify: {<<: {delay_ms: 9}, delay_ms: 7}\n")
    assert catalogue.load(str(path)).verify.delay_ms == 7
    path.write_text(content + "name: again\n")
    with pytest.raises(SpecError, match="the key 'name' is there twice"):
        catalogue.load(str(path))
    with pytest.raises(SpecError, match="the key 'seed' is there twice"):
        catalogue.load("quickstart", ["weights={seed: 1, seed: 2}"])
