"""toy/speed.py: it runs, its ways compute the same, and it counts operations right. No time is asserted."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy import speed  # noqa: E402

SHAPES = [speed.QUICK, speed.Shape(3, 48, 3, 100, 64, prompt=9, n=5, length=4)]


def test_quick_runs_and_the_ways_agree(capsys):
    """Wrong: a way that is faster because it computes something else."""
    assert speed.main(["--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("0 disagreements") and "DISAGREES" not in out
    for way in ("update_shared", "score_plain", "sample_shared", "rewards_plain", "evaluation_batch"):
        assert re.search(rf"{way} +\d+\.\d+ +\d+\.\d+", out), way
    assert len(re.findall(r"\d\.\d\d GB", out)) == 2  # an update with and without a bound


def test_a_way_that_computes_something_else_is_found(monkeypatch, capsys):
    """Wrong: a comparison that nothing can fail."""
    bench = speed.Bench(speed.QUICK)
    plain = bench.plain_log_prob
    monkeypatch.setattr(bench, "plain_log_prob", lambda: plain() * torch.tensor([1, 1, 1, 1.01]))
    assert len(speed.disagreements(bench, 1e-4)) == 2  # values and gradients


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape):
    """Wrong: the vocabulary matrix on the prompt, the last token of an output run through the model, keys forgotten."""
    bench = speed.Bench(shape)
    bench.model.set_attn_implementation("eager")  # torch counts no operations in its attention for CPUs
    with FlopCounterMode(display=False) as counter:
        bench.update(bench.shared_log_prob)
    assert counter.get_total_flops() == speed.flops(shape)


def test_lengths_of_samples_are_spread():
    """Wrong: samples that all end at once, or never."""
    bench = speed.Bench(speed.Shape(2, 32, 2, 64, 64, prompt=8, n=200, length=12))
    lengths = {len(output) for output in bench.sample_shared()}
    assert lengths == set(range(2, 13))
