"""Reads a recipe: file (with `extends`) < profile < environment < `path=value` overrides, then validation.

Precedence grows to the right. Mappings merge key by key; anything else is replaced. When a layer makes
another choice of method (`optim.name`, `model.model_type`, ...), the options of the former choice go with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nanoworks.common.errors import UserError, nearest
from nanoworks.common.validation import explain
from nanoworks.config.base import Method
from nanoworks.config.recipe import Recipe

ENV_PREFIX = "NANOWORKS__"
PROFILES = ("dev", "test", "prod")
# The sections that are a choice among methods, and the key that says which.
_CHOICES = {"stage": "name", "optim": "name", "schedule": "name", "model": "model_type"}


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    profile: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the validated recipe; every fault is a UserError that names its place and the nearest key."""
    values = merge(_default_methods(), read_file(find_recipe(path)))
    own_profiles = values.pop("profiles", {}) or {}
    if profile is not None:
        values = merge(values, _profile(profile, own_profiles))
    values = merge(values, from_environment(os.environ if environ is None else environ))
    for override in overrides:
        values = apply_override(values, override)
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{path}:\n{explain(error, Recipe)}") from None


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def recipes_dir() -> Path:
    """Directory of the recipes that come with nanoworks, in a wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parents[1] / "recipes"


def find_recipe(path: str | Path, beside: Path = Path()) -> Path:
    """Resolve a path, or a name like `pretrain/nanochat` among the recipes that come with nanoworks.

    A relative path starts at the folder `beside`.
    """
    given = beside / path
    if given.is_file():
        return given
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    home = recipes_dir()
    if (home / f"{name}.yaml").is_file():
        return home / f"{name}.yaml"
    known = sorted(str(p.relative_to(home).with_suffix("")) for p in home.rglob("*.yaml"))
    raise UserError(f"no recipe at {path}{nearest(name, known)}; those that come with nanoworks: {', '.join(known)}")


def read_file(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML or JSON mapping and whatever it extends: a file, from its own folder, or a recipe by name."""
    path = path.resolve()
    if path in _seen:
        raise UserError(f"{path}: extends itself by way of {' -> '.join(p.name for p in (*_seen, path))}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is a {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is not None:
        values = merge(read_file(find_recipe(str(parent), path.parent), (*_seen, path)), values)
    return values


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `layer` on top; neither is changed."""
    merged = dict(base)
    for key, value in layer.items():
        old, tag = merged.get(key), _CHOICES.get(key)
        if tag is not None:  # `stage: rl` is short for `stage: {name: rl}`
            old = {tag: old} if isinstance(old, str) else old
            value = {tag: value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            other_choice = tag is not None and old.get(tag) != value.get(tag, old.get(tag))
            merged[key] = dict(value) if other_choice else merge(old, value)
        else:
            merged[key] = value
    return merged


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """`NANOWORKS__OPTIM__LR=2e-4` -> `{"optim": {"lr": "2e-4"}}`, values read as YAML."""
    values: dict[str, Any] = {}
    for key in sorted(environ):
        if key.startswith(ENV_PREFIX):
            path = key[len(ENV_PREFIX) :].lower().split("__")
            values = merge(values, _nest(path, _parse(environ[key], key)))
    return values


def apply_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """Return `values` with one `path=value`; a path may go through lists by index (`data.train.0.weight=2`)."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"override {override!r} is not of the form path=value, e.g. optim.lr_matrix=0.01")
    return _set(values, path.split("."), _parse(text, override), override)


def _set(node: Any, path: Sequence[str], value: Any, override: str) -> Any:
    """Return `node` with the value at `path` replaced; merging does it, but for lists on the way."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise UserError(f"override {override!r}: {head} is no index into a list of {len(node)}")
        return [_set(item, rest, value, override) if i == int(head) else item for i, item in enumerate(node)]
    node = {"name": node} if isinstance(node, str) else node if isinstance(node, dict) else {}
    if _meets_list(node, path):
        return {**node, head: _set(node[head], rest, value, override)}
    return merge(node, _nest(path, value))


def _meets_list(node: Any, path: Sequence[str]) -> bool:
    """Whether following `path` from `node` enters a list."""
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, list):
            return True
    return False


def _default_methods() -> dict[str, Any]:
    """The default choices, so that a layer may set an option (optim.lr_matrix) without naming the choice."""
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    return {name: {"name": value.name} for name, value in defaults.items() if isinstance(value, Method)}


def _profile(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The built-in overlay of a profile with the recipe's own `profiles.<name>` on top."""
    if name not in PROFILES and name not in own:
        known = sorted({*PROFILES, *own})
        raise UserError(f"unknown profile {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    builtin = Path(__file__).parent / "profiles" / f"{name}.yaml"
    values = read_file(builtin) if builtin.is_file() else {}
    return merge(values, own.get(name) or {})


def _nest(path: Sequence[str], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return value


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {error}") from None
