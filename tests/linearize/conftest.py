"""What tests of linear layers share."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from linearize.kernel_stand_ins import Package


@pytest.fixture
def package(monkeypatch):
    """The package as if it were installed, and its kernels as if they ran on a CPU."""
    from surgery.models import linear_fla, linear_kernels

    made = Package()
    for kernel in linear_fla.FLA.values():
        module = ModuleType(kernel.place)
        for name in (kernel.chunk, kernel.step):
            setattr(module, name, made.kernel(name))
        monkeypatch.setitem(sys.modules, kernel.place, module)
    monkeypatch.setattr(linear_fla, "_READY", {})
    monkeypatch.setattr(linear_kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(linear_kernels, "installed", lambda: True)
    return made
