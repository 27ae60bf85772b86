from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import nanoworks
from nanoworks.common import environment


def test_the_facts_are_there_and_are_json() -> None:
    info = environment.environment_info()
    assert json.loads(json.dumps(info)) == info
    assert info["cores"] >= 1
    assert info["device"] in ("cpu", "cuda", "xpu", "mps")
    assert info["cpu"]
    assert info["memory_gib"] is None or info["memory_gib"] > 0.1


def _repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, tracked: bool) -> Path:
    package = tmp_path / "nanoworks" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    if tracked:
        git("add", ".")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(nanoworks, "__file__", str(package))
    return package


def test_a_checkout_names_its_commit_and_says_when_it_is_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _repository(tmp_path, monkeypatch, tracked=True)
    clean = environment.git_commit()
    assert clean is not None
    assert len(clean) == 12
    package.write_text("changed = True\n")
    assert environment.git_commit() == f"{clean}-dirty"


def test_a_package_installed_inside_another_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _repository(tmp_path, monkeypatch, tracked=False)
    assert environment.git_commit() is None


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit() is None
