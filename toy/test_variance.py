"""toy.variance holds every number against one that was not drawn: that it does, and that the words about it are true."""

import functools
import re
from pathlib import Path

import pytest
import torch

import brain
from toy import variance

variance.exact = functools.cache(variance.exact)  # integrals that do not depend on brain.py: once for all tests
README = (Path(__file__).parent.parent / "README.md").read_text()


def test_all_numbers_agree(tmp_path, capsys):
    """With a twentieth of the draws, which widens the intervals alike. Wrong: a weight, a score, a closed form or an integral."""
    assert variance.main(["--draws", "20000", "--figure", str(tmp_path / "v.png")]) == 0
    assert "all numbers agree" in capsys.readouterr().out
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


def not_normalised(log_p, log_q_proposal, log_good):
    return (log_p - log_q_proposal + log_good).exp() / log_p.shape[-1]


WRONG = {
    "alpha_hat without log p": ("posterior_weights", lambda p, q, g: torch.softmax(g - q, -1)),
    "alpha_hat without log q'": ("posterior_weights", lambda p, q, g: torch.softmax(p + g, -1)),
    "alpha_hat not normalised": ("posterior_weights", not_normalised),
    "beta_hat of the policy alone": ("policy_weights", lambda q, proposal: torch.softmax(q, -1)),
    "no baseline": ("policy_weights", lambda q, proposal: torch.zeros_like(q)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_estimate_is_found(name, tmp_path, monkeypatch, capsys):
    """Wrong: a table that prints whatever it is given."""
    monkeypatch.setattr(brain, *WRONG[name])
    monkeypatch.setattr(variance, "plot", lambda *arguments: None)
    assert variance.main(["--draws", "20000", "--figure", str(tmp_path / "v.png")]) == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_what_the_text_says_is_exact():
    """The numbers in the docstring and in the README, from the exact values. Wrong: an old number."""
    start, end = variance.exact(1.0), variance.exact(0.0)
    spread = {name: start[name]["variance"] for name in variance.ESTIMATORS}
    told = re.search(r"begins \(q' = prior = policy\), ([\d.]+) and ([\d.]+) against (\d\.\d+)", variance.__doc__)
    assert [f"{x:.2f}" for x in spread.values()] == list(told.groups())
    assert "a ninth of DPG's variance and a seventh of GDC++'s" in README
    assert [round(spread[name] / spread["BRAIn"]) for name in ("DPG", "GDC++")] == [9, 7]
    assert min(end, key=lambda name: end[name]["variance"]) == "DPG"  # "DPG is the quietest"
    assert max(end, key=lambda name: end[name]["variance"]) == "GDC++"
    steps = [i / 20 for i in range(21)]
    short = [variance.exact(m)["BRAIn"]["bias"] / -variance.TRUE for m in steps]
    assert "15 to 23 per cent, always towards zero" in variance.__doc__
    assert (round(100 * min(short)), round(100 * max(short))) == (15, 23)


@pytest.mark.parametrize("argv", (["--draws", "10"], ["--draws", "x"], ["--seed", "-1"], ["--figure", "nosuch/v.png"], ["--figure", "v.txt"]))
def test_bad_input_ends_in_one_line(argv, capsys):
    """Wrong: a traceback, or the wait for a table before it."""
    with pytest.raises(SystemExit) as exit:
        variance.main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("variance: ") and argv[0] in error and error.count("\n") == 1
