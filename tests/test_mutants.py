"""The list of faults fits the code that they are planted in. mutants.py plants them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import ROOT
from mutants_list import LAYERS, MUTANTS, broken

LEAST = {"python": 8, "triton": 8, "bindings": 4, "cpu": 8, "cuda": 8}

SHARED = (
    "csrc/lane.h",
    "csrc/problem.h",
    "csrc/stats.h",
)  # tested as the CPU's, used by the emulated kernels, too

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="an installed copy")


def test_every_fault_finds_its_place() -> None:
    assert broken(MUTANTS, ROOT) == []


def test_no_fault_is_there_twice_or_none_at_all() -> None:
    names = [x.id for x in MUTANTS]
    assert len(set(names)) == len(names) == len({(x.file, x.old, x.new) for x in MUTANTS})
    assert all(x.old != x.new and x.why for x in MUTANTS)


def test_every_layer_has_its_faults() -> None:
    counts = {name: sum(x.layer == name for x in MUTANTS) for name in LAYERS}
    assert counts.keys() == LEAST.keys()
    assert all(counts[name] >= LEAST[name] for name in LAYERS), counts
    assert len(MUTANTS) >= 48


def test_the_faults_are_in_the_files_of_their_layer() -> None:
    folders = {"python": "kdkernels", "triton": "triton_kernels", "cuda": "csrc/cuda"}
    for x in MUTANTS:
        parent = Path(x.file).parent.as_posix()
        if x.layer in folders:
            assert f"{parent}/".startswith(f"{folders[x.layer]}/"), x.id
        elif x.layer == "bindings":
            assert x.file in ("csrc/ops.cpp", "csrc/binding.h"), x.id
        else:
            inside = parent in ("csrc/cpu", "csrc/losses") or x.file in SHARED
            assert x.layer == "cpu" and inside, x.id
