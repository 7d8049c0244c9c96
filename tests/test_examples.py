"""The example runs to its end, in little."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from cases import needs_cpu

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


@pytest.mark.full
@needs_cpu
def test_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("digits", DIGITS)
    digits = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "digits", digits)
    threads = torch.get_num_threads()
    spec.loader.exec_module(digits)
    monkeypatch.setattr(digits, "EPOCHS", 10)
    monkeypatch.setattr(digits.providers, "BASELINES", ("eager",))  # compiling takes too long here
    monkeypatch.setattr(
        sys,
        "argv",
        ["digits", "--seeds", "2", "--rows", "8", "--classes", "50", "--out"] + [str(tmp_path)],
    )
    try:
        digits.main()
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for method in digits.METHODS:
        assert f"\n{method} " in shown
    assert "DKD, kdkernels" in shown and "KD, torch eager" in shown and "no result" not in shown
    assert {x.name for x in tmp_path.iterdir()} == {"digits.png", "digits.csv", "speed.txt"}
