"""Reads a recipe: file (with `extends`) < profile < environment < `path=value` overrides, then validation.

Precedence grows to the right. Mappings merge key by key; anything else is replaced. When a layer changes a
mapping's `name` or `model_type`, the options of the former choice are dropped with it.
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
from nanoworks.config.recipe import Recipe

ENV_PREFIX = "NANOWORKS__"
PROFILES = ("dev", "test", "prod")
_TAGS = ("name", "model_type")


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    profile: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the validated recipe; every fault is a UserError that names its place and the nearest key."""
    values = read_file(find_recipe(path))
    own_profiles = values.pop("profiles", {}) or {}
    if profile is not None:
        values = merge(values, _profile(profile, own_profiles))
    values = merge(values, from_environment(os.environ if environ is None else environ))
    for override in overrides:
        apply_override(values, override)
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


def find_recipe(path: str | Path) -> Path:
    """Resolve a path, or a name like `pretrain/nanochat` among the recipes that come with nanoworks."""
    given = Path(path)
    if given.is_file():
        return given
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    home = recipes_dir()
    if (home / f"{name}.yaml").is_file():
        return home / f"{name}.yaml"
    known = sorted(str(p.relative_to(home).with_suffix("")) for p in home.rglob("*.yaml"))
    raise UserError(f"no recipe at {path}{nearest(name, known)}; those that come with nanoworks: {', '.join(known)}")


def read_file(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML or JSON mapping and whatever it extends, relative to itself."""
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
        values = merge(read_file(path.parent / str(parent), (*_seen, path)), values)
    return values


def merge(base: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `layer` on top; neither is changed."""
    merged = dict(base)
    for key, value in layer.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, str) and "name" not in value:
            old = {"name": old}  # `stage: rl` below `stage: {group_size: 8}`
        if isinstance(value, Mapping) and isinstance(old, dict):
            other_choice = any(tag in value and tag in old and value[tag] != old[tag] for tag in _TAGS)
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


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `path=value` in place; a path may go through lists by index (`data.train.0.weight=2`)."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"override {override!r} is not of the form path=value, e.g. optim.lr_matrix=0.01")
    parts = path.split(".")
    node: Any = values
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                raise UserError(f"override {override!r}: {where} is a list of {len(node)}; give an index below that")
            if depth == len(parts) - 1:
                node[int(part)] = _parse(text, override)
                return
            node = node[int(part)]
        else:
            # the rest of the path up to the next list is a plain merge
            child = node.get(part) if isinstance(node, dict) else None
            if depth < len(parts) - 1 and isinstance(child, list):
                node[part] = node = [dict(c) if isinstance(c, dict) else c for c in child]
            else:
                rest = parts[depth:]
                if len(rest) > 1 and isinstance(child, dict):
                    node[part] = node = dict(child)
                    continue
                merged = merge(node, _nest(rest, _parse(text, override)))
                node.clear()
                node.update(merged)
                return


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
    return value  # type: ignore[no-any-return]


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {error}") from None
