"""toy/methods.py: what it prints is what was measured, how samples are counted, and how numbers become verdicts."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from toy import methods  # noqa: E402
from toy.methods import KL_POSTERIOR, QUICK, WIN, Job  # noqa: E402
from toy.world import Toy  # noqa: E402


def pictures():
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (HERE / "figures").glob("*")}


@pytest.fixture(scope="module")
def quick():
    """(lines of --quick, whether the committed pictures are as they were)."""
    before = pictures()
    command = [sys.executable, "-m", "toy.methods", "--quick"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines(), pictures() == before


def test_quick_trains_in_the_small_world_and_leaves_the_pictures_alone(quick):
    """Wrong: --quick trains in the full world, or draws its meaningless numbers over the README's pictures."""
    lines, untouched = quick
    assert untouched
    assert any(f"n = {QUICK.sizes[-1]}, {QUICK.updates} updates of {QUICK.batch_size} prompts" in line for line in lines)


def test_tables_hold_the_exact_prior_and_posterior(quick):
    """Wrong: the posterior without its prior (softmax of r), KL the other way round, one seed's numbers for all."""
    for reward, spread in methods.REWARDS.items():
        rows = []
        for seed in QUICK.seeds:
            toy = Toy(seed, letters=QUICK.letters, length=QUICK.length, prompts=QUICK.prompts, spread=spread)
            p, r = np.exp(toy.log_p), toy.world.reward
            target = p * np.exp(r) / (p * np.exp(r)).sum(-1, keepdims=True)
            beats = (r[:, :, None] > r[:, None]) + (r[:, :, None] == r[:, None]) / 2
            wins = 100 * np.einsum("xy,xyz,xz->x", target, beats, p).mean()
            forward, backward = (target * np.log(target / p)).sum(-1).mean(), (p * np.log(p / target)).sum(-1).mean()
            rows.append([(backward * 0, forward, (target * r).sum(-1).mean(), wins), (forward, 0, 0, 50)])
        start = next(i for i, line in enumerate(quick[0]) if line.startswith(f"{reward} reward"))
        for name, means in zip(("posterior", "prior"), np.mean(rows, 0)):
            line = next(line for line in quick[0][start:] if line.startswith(name)).split()
            printed = [float(line[i]) for i in (1, 4, 7, 10)]
            np.testing.assert_allclose(printed, means, atol=0.0051, err_msg=f"{reward}, {name}")


def test_every_method_and_ordering_is_printed_with_the_papers_figures(quick):
    """Wrong: a row of METHODS that no run trains, an ordering of the paper that is left out because it fails here."""
    import brain

    text = "\n".join(quick[0])
    assert set(methods.PAPER) == set(brain.METHODS)
    assert all(figure in text for row in methods.PAPER.values() for figure in row)
    verdicts = [line for line in quick[0] if line.startswith("  ") and line.endswith("for A).")]
    assert len(verdicts) == len(methods.REWARDS) * len(list(methods.orderings(QUICK))) == 22


def test_intervals_are_students_over_seeds():
    """Wrong: the normal 1.96 (too narrow with 5 seeds), or a standard deviation that divides by S."""
    mean, half = methods.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and abs(half - 2.7764 * (10 / 4 / 5) ** 0.5) < 1e-3
    mean, half = methods.interval([[0.0, 1.0], [2.0, 1.0]])
    assert mean.tolist() == [1, 1] and abs(half - [12.706, 0]).max() < 1e-9


@pytest.mark.parametrize("method, each", [("rso", 4 * 4), ("brain", 4), ("dpo-sft", 4), ("dpo", 2)])
def test_outputs_are_counted_as_drawn(method, each):
    """Wrong: RSO counted by what it keeps, DPO's pairs as if they were n outputs."""
    _, drawn = methods.train_once(QUICK, Job("mild", method, 4, 1e-3, 0))
    assert drawn == QUICK.iterations * QUICK.prompts_per_iteration * each


def test_a_run_depends_on_its_job_alone():
    """Wrong: anything drawn from a global generator: numbers then change with the number of processes."""
    job = Job("sharp", "brain", 4, 1e-3, 1)
    first = methods.train_once(QUICK, job)
    torch.manual_seed(1)
    np.random.seed(1)
    assert methods.train_once(QUICK, job) == first
    assert methods.train_once(QUICK, job._replace(seed=2)) != first


def seeds_of(wins, kls):
    rows = np.zeros((len(wins), len(methods.NUMBERS)))
    rows[:, WIN], rows[:, KL_POSTERIOR] = wins, kls
    return rows


WORLDS = np.array([50.0, 60.0, 70.0, 80.0, 90.0])  # worlds differ by far more than methods do
NOISE = np.array([0.1, -0.1, 0.0, 0.1, -0.1])


def test_a_verdict_turns_round_with_the_numbers():
    """Wrong: hard-coded hopes; intervals of the two means in place of that of the difference, which hide a sure gain."""
    low, high, posterior = seeds_of(WORLDS, 0.5 + NOISE), seeds_of(WORLDS + 2 + NOISE, 0.1), seeds_of(WORLDS + 1, 0.0)
    up = methods.verdict(low, high, posterior, ("worse", "better"))
    down = methods.verdict(high, low, posterior, ("better", "worse"))
    assert up.startswith("holds, +2.0") and down.startswith("the opposite holds, -2.0")
    for told in (up, down):
        assert "better is the nearer" in told and "better runs 1.0 points past" in told and "worse runs" not in told
    same = methods.verdict(low, low + NOISE[:, None], posterior, ("A", "B"))
    assert same.startswith("undecided") and "neither is surely the nearer to the posterior" in same
    saturated = [methods.verdict(low, b, posterior, ("n = 8", "n = 32"), gains=False) for b in (low + NOISE[:, None], high)]
    assert saturated[0].startswith("holds") and saturated[1].startswith("does not hold")


def test_rates_are_chosen_by_win_rate_on_other_seeds(monkeypatch, capsys):
    """Wrong: by KL to the posterior, the answer key; by loss; or on the seeds that are reported."""
    seen = set()

    def work(arguments):
        job = arguments[1]
        seen.add(job.seed)
        return [job.rate, 0.0, 0.0, 50 + (job.rate == max(QUICK.rates))], 0  # the larger rate wins more, and is farther

    monkeypatch.setattr(methods, "work", work)
    pool = type("Pool", (), {"imap": staticmethod(map)})
    assert set(methods.choose_rates(QUICK, pool).values()) == {max(QUICK.rates)}
    for plan in (QUICK, methods.FULL):
        assert not set(plan.seeds) & set(plan.search_seeds) and len(methods.FULL.seeds) >= 5
    assert seen == set(QUICK.search_seeds)
