"""toy/speed.py: it runs, and its ways compute the same. No time is asserted."""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy import speed  # noqa: E402


def test_quick_runs_and_the_ways_agree(capsys):
    """Catches: a way that is faster because it computes something else."""
    assert speed.main(["--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "All ways compute the same numbers." in out and "DISAGREE" not in out
    for way in ("update shared", "scoring plain", "sampling generate"):
        assert re.search(rf"{way} +\d+\.\d+ +\d+\.\d+", out), way
    assert len(re.findall(r"\d\.\d\d GB", out)) == 2  # of the two ways of an update
    assert out.startswith("--quick") and out.count("mean nothing") == 2
    assert "In sampling from a Qwen3Next, brain.py" in out and "a tiny model with one thread" in out


def test_a_way_that_computes_something_else_is_found(monkeypatch):
    """Catches: a comparison that nothing can fail."""
    bench = speed.Bench(speed.QUICK)
    plain = bench.plain_log_prob
    monkeypatch.setattr(bench, "plain_log_prob", lambda: plain() * torch.tensor([1, 1, 1, 1.01]))
    assert len(speed.disagreements(bench, 1e-4)) == 2  # values and gradients
