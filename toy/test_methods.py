"""toy/methods.py: what it prints was measured, and its words follow the numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import brain
from toy import methods
from toy.methods import KL_POSTERIOR, QUICK, WIN, Job
from toy.world import Toy


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(lines of --quick, names of its pictures)."""
    folder = tmp_path_factory.mktemp("figures")
    command = [sys.executable, "-m", "toy.methods", "--quick", "--figures", str(folder)]
    root = Path(methods.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines(), sorted(path.name for path in folder.iterdir())


def test_quick_says_that_its_numbers_mean_nothing(quick):
    """Catches: --quick trains in the full world, or its numbers are taken for real ones."""
    lines, pictures = quick
    assert pictures == ["methods.json", "methods.png"]
    assert "mean nothing" in lines[0] and "mean nothing" in lines[-2]
    size = f"n = {QUICK.sizes[-1]}, {QUICK.updates} updates of {QUICK.batch_size} prompts"
    assert any(size in line for line in lines)


def test_tables_hold_the_exact_prior_and_posterior(quick):
    """Catches: the posterior without its prior, KL the other way round, one seed's numbers for all."""
    for reward, spread in methods.REWARDS.items():
        rows = []
        for seed in QUICK.seeds:
            toy = Toy(seed, letters=QUICK.letters, length=QUICK.length, prompts=QUICK.prompts, spread=spread)
            p, r = np.exp(toy.log_p), toy.world.reward
            target = p * np.exp(r) / (p * np.exp(r)).sum(-1, keepdims=True)
            beats = (r[:, :, None] > r[:, None]) + (r[:, :, None] == r[:, None]) / 2
            wins = 100 * np.einsum("xy,xyz,xz->x", target, beats, p).mean()
            forward, backward = ((a * np.log(a / b)).sum(-1).mean() for a, b in ((target, p), (p, target)))
            assert forward != pytest.approx(backward, abs=0.01)
            rows.append([(0, 0, forward, (target * r).sum(-1).mean(), wins), (forward, backward, 0, 0, 50)])
        start = next(i for i, line in enumerate(quick[0]) if line.startswith(f"{reward} reward"))
        for name, means in zip(("posterior", "prior"), np.mean(rows, 0)):
            line = next(line for line in quick[0][start:] if line.startswith(name)).split()
            printed = [float(line[i]) for i in (1, 4, 10, 13, 16)]
            np.testing.assert_allclose(printed, means, atol=0.0051, err_msg=f"{reward}, {name}")
            assert 0 <= float(line[7]) <= means[1] + 0.0051  # the estimated gap is a lower bound


def test_every_method_and_ordering_is_printed_with_the_papers_figures(quick):
    """Catches: a row of METHODS that no run trains, an ordering that is left out because it fails here."""
    text = "\n".join(quick[0])
    assert set(methods.PAPER) == set(brain.METHODS)
    assert all(figure in text for row in methods.PAPER.values() for figure in row)
    verdicts = [line for line in quick[0] if line.startswith("  ") and line.endswith("for A).")]
    assert len(verdicts) == len(methods.REWARDS) * len(list(methods.orderings(QUICK))) == 22


@pytest.mark.parametrize("method, each", [("rso", 4 * 4), ("brain", 4), ("dpo", 2)])
def test_outputs_are_counted_as_drawn(method, each):
    """Catches: RSO counted by what it keeps, DPO's pairs as if they were n outputs."""
    _, drawn = methods.train_once(QUICK, Job("mild", method, 4, 1e-3, 0))
    assert drawn == QUICK.iterations * QUICK.prompts_per_iteration * each


def seeds_of(wins, kls):
    rows = np.zeros((len(wins), len(methods.NUMBERS)))
    rows[:, WIN], rows[:, KL_POSTERIOR] = wins, kls
    return rows


WORLDS = np.array([50.0, 60.0, 70.0, 80.0, 90.0])  # worlds differ by far more than methods do
NOISE = np.array([0.1, -0.1, 0.0, 0.1, -0.1])


def test_verdicts_and_conclusion_follow_the_numbers(capsys):
    """Catches: words written in advance, intervals of two means in place of that of the difference."""
    low, high = seeds_of(WORLDS, 0.5 + NOISE), seeds_of(WORLDS + 2 + NOISE, 0.1)
    posterior = seeds_of(WORLDS + 1, 0.0)
    up = methods.verdict(low, high, posterior, ("worse", "better"))
    down = methods.verdict(high, low, posterior, ("better", "worse"))
    assert up.startswith("holds, +2.0") and down.startswith("the opposite holds, -2.0")
    for told in (up, down):
        assert "better is the nearer" in told and "better runs 1.0 points past" in told
    same = methods.verdict(low, low + NOISE[:, None], posterior, ("A", "B"))
    assert same.startswith("undecided") and "neither is surely the nearer to the posterior" in same
    assert methods.verdict(low, high, posterior, ("A", "B"), gains=False).startswith("does not hold")
    results = {(reward, method, 8): low for reward in methods.REWARDS for method in methods.ROWS}
    results |= {(reward, "posterior", 8): posterior for reward in methods.REWARDS}
    results |= {("sharp", "rso", 8): high}
    methods.print_conclusion(QUICK, results)
    mild, sharp = capsys.readouterr().out.split("Under the sharp")
    assert "more wins than the posterior have: none" in mild
    assert "rso is nearest to the posterior (KL 0.10)" in sharp and "have: rso." in sharp
