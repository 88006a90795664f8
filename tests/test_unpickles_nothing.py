"""Our code makes no objects from bytes of a file or the network: no pickle, no YAML but the safe kind, no eval, no weights but tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["experiments", "workers", "service"]
LOADERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "unsafe_load",
    "full_load",
    "read_pickle",
    "allow_pickle",
    "_dump_nccl_trace",
    "_dump_fr_trace",
}


def offences(tree: ast.AST) -> Iterator[str]:
    """What a module does that could make any object of what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in LOADERS)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LOADERS:
            yield node.module
        elif isinstance(node, ast.Call):
            yield from _in_call(node)


def _in_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if (last in CALLS and name != "re.compile" and not name.startswith("torch.")) or given.get("allow_pickle") == "True":
        yield name
    if name == "torch.load" and given.get("weights_only") != "True":
        yield name
    if name.startswith("yaml.") and last in ("load", "load_all") and not any("Loader" in ast.unparse(a) for a in node.args):
        yield name


@pytest.mark.parametrize("floor", FLOORS)
def test_no_module_unpickles(floor):
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): list(offences(ast.parse(path.read_text()))) for path in files}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "np.load(f, allow_pickle=True)",
        "c10d._dump_nccl_trace()",
    ],
)
def test_the_test_would_see_it(code):
    assert list(offences(ast.parse(code)))


def test_the_yaml_loader_of_ours_is_a_safe_one():
    import yaml

    from experiments.catalogue import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
