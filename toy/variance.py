"""How noisy, and how wrong, is the gradient? DPG, GDC++ and BRAIn as the proposal leaves the posterior.

    python -m toy.variance                  a table and a conclusion; exit code 1 if a number is wrong
    python -m toy.variance --figures DIR    the same, and DIR/variance.png

These are three estimates of one gradient, that of -D_KL(posterior || policy) (eq. 2), from n draws of a
proposal. Each is a weighted sum of the scores s(y) = grad log q(y). Here p is the posterior and q the policy:

    DPG      1/n sum_i  p(y_i)/q'(y_i)            s(y_i)    importance sampling of eq. 4
    GDC++    1/n sum_i (p(y_i) - q(y_i))/q'(y_i)  s(y_i)    the same, minus importance sampling of eq. 8
    BRAIn        sum_i (alpha_hat_i - beta_hat_i) s(y_i)    both self-normalised (eq. 12), by brain.py

Posterior, policy and proposal are N(0,1), N(1,1) and N(m,1), and n = 8. The gradient is that in the policy's
mean. Training begins at m = 1, where q' is the policy, and ends at m = 0. BRAIn is unbiased for -grad D_n
(Theorem 4.2) and not for -grad KL, so a plot of its variance alone says too little.

Every number that is drawn is compared with one that is not: closed forms for DPG and GDC++, and integrals for
BRAIn, whose mean comes from differentiating D_n (eq. 13) and never from eq. 12.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

import brain

ESTIMATORS = ("DPG", "GDC++", "BRAIn")
NUMBERS = ("variance", "bias", "mean squared error")
POSTERIOR, POLICY = 0.0, 1.0  # means of two Gaussians of variance 1, the proposal's lies between them
TRUE = POSTERIOR - POLICY  # -d KL / d POLICY = E_p[y] - POLICY
N = 8
PUBLISHED = dict(zip(ESTIMATORS, (2.0, 1.3, 0.17)))  # read off the published plot, m = 1, 2000 draws


# --------------------------------------------------------------------- the Gaussian world, drawn
def log_normal(y, mean):
    """log N(y; mean, 1) without its constant, which every ratio cancels."""
    return -((y - mean) ** 2) / 2


def draw(m, draws, generator, n=N):
    """name -> (draws,) estimates of the gradient in the policy's mean."""
    y = m + torch.randn((draws, n), generator=generator, dtype=torch.float64)
    log_posterior, log_q, log_proposal = (log_normal(y, mean) for mean in (POSTERIOR, POLICY, m))
    # DPG and GDC++ need the normalised posterior, which no language model has.
    p_ratio, q_ratio = (log_posterior - log_proposal).exp(), (log_q - log_proposal).exp()
    # The prior is the policy, as when training begins. The reward -y then makes the posterior N(0,1).
    alpha_hat = brain.posterior_weights(log_q, log_proposal, -y)  # eq. 6
    beta_hat = brain.policy_weights(log_q, log_proposal)  # eq. 11
    weights = {"DPG": p_ratio / n, "GDC++": (p_ratio - q_ratio) / n, "BRAIn": alpha_hat - beta_hat}
    return {name: (w * (y - POLICY)).sum(-1) for name, w in weights.items()}  # s(y) = y - POLICY


def measure(g):
    """number -> (value, standard error) of estimates g (draws,)."""
    mean, variance, error = g.mean(), g.var(), (g - TRUE) ** 2
    fourth = ((g - mean) ** 4).mean()  # Var[sample variance] = (fourth moment - variance^2) / draws, nearly
    values = variance, mean - TRUE, error.mean()
    spreads = fourth - variance**2, variance, error.var()
    errors = [math.sqrt(spread / len(g)) for spread in spreads]
    return {name: (float(value), error) for name, value, error in zip(NUMBERS, values, errors)}


# --------------------------------------------------------------------- the Gaussian world, exactly
def importance_variance(m, n=N):
    """(DPG, GDC++): closed form. Both have mean TRUE, and 1/n of the variance of one sample.

    N(y;a) N(y;b) / N(y;m) = exp((a-m)(b-m)) N(y; a+b-m), hence
    E_q'[a/q' b/q' s^2] = exp((a-m)(b-m)) (1 + (a+b-m-POLICY)^2).
    """

    def second(a, b):
        return math.exp((a - m) * (b - m)) * (1 + (a + b - m - POLICY) ** 2)

    pp, pq, qq = second(POSTERIOR, POSTERIOR), second(POSTERIOR, POLICY), second(POLICY, POLICY)
    return (pp - TRUE**2) / n, (pp - 2 * pq + qq - TRUE**2) / n


def _grid(m, policy=POLICY):
    """(y, q' on y, log p/q', log q/q', t, step of log t): trapezoid rules, good to 1e-9."""
    y = m + torch.linspace(-12, 12, 481, dtype=torch.float64)
    proposal = log_normal(y, m).softmax(-1)
    t = torch.arange(-32, 20, 0.2, dtype=torch.float64).exp()
    log_w, log_v = (log_normal(y, mean) - log_normal(y, m) for mean in (POSTERIOR, policy))
    return y, proposal, log_w, log_v, t, 0.2


def d_n_integral(policy, m, n=N):
    """D_n of eq. 13 for a policy N(policy,1), as integrals over one output, not n.

    With S = sum_i w_i:  1/S = int exp(-tS) dt  and  log S = int (exp(-t) - exp(-tS)) dt/t,  and the
    expectation of exp(-tS) is the n-th power of that of exp(-tw), as outputs are independent.
    """
    _, proposal, log_w, log_v, t, step = _grid(m, policy)  # w for alpha (eq. 6), v for beta (eq. 11)

    def laplace(log_weight, factor=1.0):  # E_q'[factor exp(-t weight)], one number for each t
        return torch.exp(-t[:, None] * log_weight.exp()) @ (proposal * factor)

    def log_sum(log_weight):  # E[log sum_i weight_i]
        return ((torch.exp(-t) - laplace(log_weight) ** n) * step).sum()

    # D_KL(alpha_hat || beta_hat) = sum_i w_i (log w_i - log v_i) / sum_i w_i - log sum_i w_i + log sum_i v_i
    ratio = n * laplace(log_w, log_w.exp() * (log_w - log_v)) * laplace(log_w) ** (n - 1)
    return (ratio * t * step).sum() - log_sum(log_w) + log_sum(log_v)


def brain_moments(m, n=N):
    """(mean, variance) of the BRAIn estimate: minus the slope of D_n, and integrals like those of D_n."""
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    mean = -float(torch.autograd.grad(d_n_integral(policy, m, n), policy)[0])
    y, proposal, log_w, log_v, t, step = _grid(m)
    score = y - POLICY

    def product(v, w):  # E[(sum_i v_i s_i / sum_i v_i) (sum_i w_i s_i / sum_i w_i)], 1/sums as integrals
        v_decay, w_decay = torch.exp(-t[:, None] * v), torch.exp(-t[:, None] * w)

        def laplace(factor):  # E_q'[factor exp(-t v - u w)] for all t and u
            return (v_decay * (proposal * factor)) @ w_decay.T

        one = laplace(torch.ones_like(y))
        same = n * laplace(v * w * score**2) * one ** (n - 1)  # the n terms of one output with itself ...
        other = n * (n - 1) * laplace(v * score) * laplace(w * score) * one ** (n - 2)  # ... and the rest
        return float(((same + other) * t[:, None] * t).sum() * step**2)

    w, v = log_w.exp(), log_v.exp()
    return mean, product(w, w) - 2 * product(w, v) + product(v, v) - mean**2


def exact(m, n=N):
    """name -> number -> exact value."""
    dpg, gdc = importance_variance(m, n)
    mean, variance = brain_moments(m, n)
    moments = zip(ESTIMATORS, ((TRUE, dpg), (TRUE, gdc), (mean, variance)))
    return {name: dict(zip(NUMBERS, (v, mu - TRUE, v + (mu - TRUE) ** 2))) for name, (mu, v) in moments}


# --------------------------------------------------------------------- tables and picture
def table(draws):
    """-> (m -> name -> number -> (value, standard error), exact values, disagreements)"""
    generator = torch.Generator().manual_seed(0)
    print(f"n = {N}, {draws} draws, 95% intervals, [exact value]; the gradient itself is {TRUE:g}")
    print(f"{'m':>4}  {'':7}" + "".join(f"{name:<31}" for name in NUMBERS))
    measured, exactly, wrong = {}, {}, []
    for m in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        measured[m] = {name: measure(g) for name, g in draw(m, draws, generator).items()}
        truth = exactly[m] = exact(m)
        for name in ESTIMATORS:
            cells = []
            for number in NUMBERS:
                (value, error), right = measured[m][name][number], truth[name][number]
                cells.append(f"{value:8.4f} ± {1.96 * error:.4f} [{right:.4f}]")
                # 54 numbers are checked at once and some have heavy tails: 5 standard errors, not 1.96.
                if not abs(value - right) <= 5 * error:
                    wrong.append(f"m = {m}, {name}: {number} {value:.4f}, exact {right:.4f}")
            print(f"{m:4.1f}  {name:7}" + "".join(f"{cell:<31}" for cell in cells))
    return measured, exactly, wrong


def plot(measured, path):
    """Lines are exact, and markers drawn."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    looks = dict(zip(ESTIMATORS, (("C1", "s", "--"), ("C2", "^", ":"), ("C0", "o", "-"))))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    fine = np.linspace(0, 1, 21)
    truth = {m: exact(float(m)) for m in fine}
    for axis, number in zip(axes, NUMBERS):
        for name, (color, marker, line) in looks.items():
            value, error = np.array([measured[m][name][number] for m in measured]).T
            axis.plot(fine, [truth[m][name][number] for m in fine], color=color, ls=line)
            axis.errorbar(list(measured), value, 1.96 * error, color=color, marker=marker, ls="", capsize=3)
            axis.plot([], [], color=color, marker=marker, ls=line, label=name)
            if number == "variance":
                axis.plot(1.0, PUBLISHED[name], marker="x", color=color, ms=8, mew=2, ls="")
        axis.set(xlabel="proposal mean m  (0: posterior, 1: policy)", ylabel=f"{number} of the gradient")
    axes[0].plot([], [], "kx", ms=8, mew=2, label="read off the authors' plot")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------- command line
def conclusion(truth, wrong):
    """What the exact numbers say, in words. truth: m -> estimator -> number -> value."""
    start, end = truth[1.0], truth[0.0]
    times = [start[name]["variance"] / start["BRAIn"]["variance"] for name in ("DPG", "GDC++")]
    short = [-100 * truth[m]["BRAIn"]["bias"] / TRUE for m in truth]
    best = {m: min(ESTIMATORS, key=lambda name: truth[m][name]["mean squared error"]) for m in truth}
    won = ", ".join(f"{m:g}" for m in truth if best[m] == "BRAIn")
    by_noise = sorted(ESTIMATORS, key=lambda name: end[name]["variance"])
    print(f"""
Where training begins (m = 1), DPG has {times[0]:.1f} times BRAIn's variance, and GDC++ {times[1]:.1f} times.
Where it ends (m = 0), {by_noise[0]} has the least variance, and {by_noise[-1]} has the most.
BRAIn pays with bias: its mean is {min(short):.0f} to {max(short):.0f} per cent short of the gradient.
By mean squared error, BRAIn is the best of the three at m = {won or "none of these"}.""")
    for line in wrong:
        print(f"DISAGREES: {line}")
    agree = f"{len(wrong)} numbers DISAGREE with" if wrong else "All numbers agree with"
    print(f"{agree} what they were compared with.")


def main(argv=None):
    """-> 0, or 1 if a number disagrees with its exact counterpart."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy.variance", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--draws", type=int, default=400_000, help="for each proposal mean (default %(default)s)")
    add("--figures", type=Path, metavar="DIR", help="where variance.png goes; without it, nowhere")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    print("This shows variance and bias of three gradient estimates, as the proposal mean m moves.\n")
    measured, truth, wrong = table(arguments.draws)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        plot(measured, arguments.figures / "variance.png")
    conclusion(truth, wrong)
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
