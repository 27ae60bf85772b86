from __future__ import annotations

import logging

import pytest
import torch

from nanoworks.common import device as devices
from nanoworks.common.device import choose_device, choose_dtype, memory_bytes, peak_memory_bytes, supports_bfloat16
from nanoworks.common.errors import UserError

CPU = torch.device("cpu")


def test_auto_takes_an_accelerator_only_if_a_kernel_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_backend", lambda name: name in ("cuda", "xpu"))
    monkeypatch.setattr(devices, "_small_product", lambda name: name != "cuda")  # cuda is there, its kernels are not
    assert choose_device("auto").type == "xpu"
    monkeypatch.setattr(devices, "_small_product", lambda name: False)
    assert choose_device("auto") == CPU


def test_a_device_that_does_not_work_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> bool:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(devices, "_small_product", broken)
    with pytest.raises(UserError, match=r"'cuda' does not work here: .*no kernel image.*take auto or cpu"):
        choose_device("cuda")


def test_a_card_without_bfloat16_gets_float32_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "supports_bfloat16", lambda device: False)
    card = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, logger="nanoworks"):
        assert choose_dtype("auto", card) == torch.float32
    assert len(caplog.records) == 1
    with pytest.raises(UserError, match=r"hardware\.dtype=float32"):
        choose_dtype("bfloat16", card)


def test_dtypes_of_a_cpu() -> None:
    assert supports_bfloat16(CPU)
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_memory_is_counted_in_bytes() -> None:
    assert 2**28 < memory_bytes(CPU) < 2**50
    before = peak_memory_bytes(CPU)
    block = torch.ones(50_000_000)
    assert peak_memory_bytes(CPU) - before > 100_000_000
    del block
