"""toy/variance.py compares every number with one that was not drawn, and its words follow the numbers."""

import functools

import pytest
import torch

import brain
from toy import variance

variance.exact = functools.cache(variance.exact)  # integrals, once for all tests


def test_all_numbers_agree(tmp_path, capsys):
    """Catches: a wrong weight, score, closed form or integral; a picture that nobody asked for."""
    assert variance.main(["--draws", "20000", "--figures", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "All numbers agree" in out and (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    spread = {name: variance.exact(1.0)[name]["variance"] for name in variance.ESTIMATORS}
    times = [spread[name] / spread["BRAIn"] for name in ("DPG", "GDC++")]
    assert f"DPG has {times[0]:.1f} times BRAIn's variance, and GDC++ {times[1]:.1f} times" in out
    assert "DPG has the least variance, and GDC++ has the most" in out


WRONG = {
    "alpha_hat without log p": ("posterior_weights", lambda p, q, g: torch.softmax(g - q, -1)),
    "alpha_hat without log q'": ("posterior_weights", lambda p, q, g: torch.softmax(p + g, -1)),
    "alpha_hat not normalised": ("posterior_weights", lambda p, q, g: (p - q + g).exp() / p.shape[-1]),
    "beta_hat of the policy alone": ("policy_weights", lambda q, proposal: torch.softmax(q, -1)),
    "no baseline": ("policy_weights", lambda q, proposal: torch.zeros_like(q)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_estimate_is_found(name, monkeypatch, capsys):
    """Catches: a table that prints whatever it is given."""
    monkeypatch.setattr(brain, *WRONG[name])
    assert variance.main(["--draws", "20000"]) == 1
    assert "DISAGREES" in capsys.readouterr().out
