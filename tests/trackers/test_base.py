from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from nanoworks.common.errors import UserError
from nanoworks.config.base import Method
from nanoworks.trackers import TRACKERS, TrackedRun, Trackers, open_trackers


class Recorder:
    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise OSError("no space left\non device")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._call("log")

    def artifact(self, path: Path) -> None:
        self._call("artifact")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("failing", ["log", "artifact", "close"])
def test_a_failing_tracker_is_dropped_with_one_warning_and_the_others_go_on(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = Recorder(), Recorder(failing)
    trackers = Trackers({"bad": bad, "good": good})
    for step in (1, 2):
        trackers.log({"train/loss": 1.0}, step)
    trackers.artifact(Path("x"))
    trackers.close()
    assert good.calls == ["log", "log", "artifact", "close"]
    assert bad.calls[-1] == failing
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    message = caplog.messages[0]
    assert "bad" in message
    assert "no space left on device" in message
    assert "\n" not in message


def test_a_tracker_that_cannot_start_is_left_out(run: TrackedRun, caplog: pytest.LogCaptureFixture) -> None:
    gone = replace(run, directory=run.directory / "gone")
    trackers = open_trackers([Method(name="jsonl"), Method(name="console")], gone)
    assert trackers.names == ("console",)
    assert "jsonl" in caplog.messages[0]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_said_before_the_start(
    name: str, module: str, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"nanoworks\[{name}\]"):
        open_trackers([Method(name=name)], run)


def test_an_unknown_tracker_names_the_nearest(run: TrackedRun) -> None:
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        open_trackers([Method(name="wandd")], run)


def test_every_tracker_declares_options_with_defaults() -> None:
    for name in TRACKERS:
        TRACKERS.options(name)()


def test_a_wrong_option_is_said_before_the_start(run: TrackedRun) -> None:
    with pytest.raises(UserError, match=r"trackers\.console\.evry: unknown key \(did you mean 'every'"):
        open_trackers([Method(name="console", evry=3)], run)
