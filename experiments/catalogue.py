"""Finds, reads and overrides specs: a catalogue name or a YAML path in, an ExperimentSpec out, or one clear error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from experiments.errors import SpecError, unknown_name
from experiments.spec.experiment import ExperimentSpec

FOLDER = Path(__file__).parent
PATH_KEYS = (("workload", "trace"), ("weights", "checkpoint"))
"""Keys that hold paths. In a file they stay inside the file's folder; given with --set they are the user's."""


def names() -> list[str]:
    """The catalogue: names that `load` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """The first sentence of what a catalogue entry says of itself."""
    text = " ".join(str(_read(FOLDER / f"{name}.yaml").get("about", "")).split())
    return text.split(". ")[0].rstrip(".")


def load(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentSpec:
    """The spec of that catalogue name or YAML path, with `key.path=value` overrides applied.

    Raises:
        SpecError: No such spec, not YAML, or anything in it that cannot be run; names the key, the value and what is allowed.
    """
    path = _find(name_or_path)
    content = _read(path)
    _confine_paths(content, path)
    for override in overrides:
        _apply(content, override)
    return validate(content, source=name_or_path)


def validate(content: Mapping[str, Any], source: str) -> ExperimentSpec:
    """The spec that this mapping states.

    Raises:
        SpecError: The first thing in it that is wrong.
    """
    try:
        return ExperimentSpec.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{source}: {_first_problem(error)}") from None
    except RecursionError:
        raise SpecError(f"{source}: nested too deeply") from None


def _find(name_or_path: str) -> Path:
    if name_or_path in names():
        return FOLDER / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if path.is_dir():
            raise SpecError(
                f"SPEC: {name_or_path!r} is a folder; give a YAML file or a name of the catalogue: {', '.join(names())}"
            )
        if not path.is_file():
            hint = f" (did you mean {path.stem!r}?)" if path.stem in names() else ""
            raise SpecError(f"SPEC: no file at {name_or_path!r}{hint}; the catalogue has: {', '.join(names())}")
        return path
    raise SpecError(f"SPEC: {unknown_name('experiment', name_or_path, names())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path.name}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{path.name}: not YAML: {_yaml_problem(error)}") from None
    if content is None:
        raise SpecError(f"{path.name}: is empty; an experiment is a mapping of keys")
    if not isinstance(content, dict):
        raise SpecError(f"{path.name}: an experiment is a mapping of keys, not {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Safe loading that takes a key written twice for the mistake it is."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def _yaml_problem(error: Exception) -> str:
    """Where and what, without the parser's excerpt."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _confine_paths(content: dict[str, Any], path: Path) -> None:
    folder = path.parent.resolve()
    for section, key in PATH_KEYS:
        part = content.get(section)
        if not isinstance(part, dict) or not isinstance(value := part.get(key), str):
            continue
        target = (folder / value).resolve()
        if not target.is_relative_to(folder):
            raise SpecError(
                f"{path.name}: {section}.{key}: {value!r} leaves the file's folder; give it with --set {section}.{key}=PATH"
            )
        part[key] = str(target)


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise SpecError(f"--set {override!r}: expected key.path=value, as in measurement.launches=5")
    try:
        value = _parse(text) if text.strip() else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"--set {key}: not YAML: {_yaml_problem(error)}") from None
    if tuple(parts) in PATH_KEYS and isinstance(value, str):
        value = str(Path(value).expanduser().resolve())
    node: Any = content
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise SpecError(f"--set {key}: {part!r} holds {child!r}, which has no keys; replace it whole, as in --set {part}=...")
        node = child
    node[parts[-1]] = value


def _first_problem(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    first, more = details[0], len(details) - 1
    key = ".".join(_printable(part) for part in _spec_keys(first["loc"])) or "the spec"
    rest = f" (and {more} more)" if more else ""
    return f"{key}: {_explain(first)}{rest}"


def _printable(part: int | str) -> str:
    """A key as it is, or, where a user wrote one that would break the line, as a string of Python's."""
    text = str(part)
    return text if text.isprintable() else repr(text)


def _spec_keys(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The location as the user knows it: pydantic puts the kind of workload in, a variant of a union."""
    return loc[:1] + loc[2:] if loc[:1] == ("workload",) else loc


def _explain(problem: ErrorDetails) -> str:
    value = repr(problem["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    match problem["type"]:
        case "extra_forbidden":
            allowed = _fields_at(problem["loc"][:-1])
            return unknown_name("key", problem["loc"][-1], allowed)
        case "missing":
            return "this key is needed"
        case "value_error":
            return str(problem.get("ctx", {}).get("error", problem["msg"]))
        case "string_pattern_mismatch":
            slug = re.sub(r"[^a-z0-9]+", "-", str(problem["input"]).lower()).strip("-") or "mine"
            return f"takes a short name without spaces, as in {slug[:40]}, not {value} (pattern {problem['ctx']['pattern']})"
        case "model_type" | "model_attributes_type" | "dict_type":
            allowed = _fields_at(problem["loc"])
            return f"takes keys of its own, not {value}; allowed: {', '.join(allowed)}"
        case "int_type" | "int_parsing" | "enum" if isinstance(problem["input"], str) and "," in problem["input"]:
            return f"{problem['msg']}, not {value}; write a list as [{problem['input']}]"
        case _:
            return f"{problem['msg']}, not {value}"


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at `loc` has."""
    candidates: list[type[BaseModel]] = [ExperimentSpec]
    for part in loc:
        following: list[type[BaseModel]] = []
        for model in candidates:
            if part in model.model_fields:
                following += _models_in(model.model_fields[str(part)].annotation)
        if following:
            chosen = [m for m in following if "kind" in m.model_fields and m.model_fields["kind"].default == part]
            candidates = chosen or following
        else:
            candidates = [m for m in candidates if getattr(m.model_fields.get("kind"), "default", part) == part] or candidates
    return sorted({field for model in candidates for field in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]
