"""How noisy, and how wrong, is the gradient? DPG, GDC++ and BRAIn as the proposal moves off the posterior.

    python -m toy.variance              a table and toy/figures/variance.png

Three estimates of one gradient, that of -D_KL(posterior || policy) (eq. 2), from n draws of a proposal q'.
Each is a weighted sum of the scores s(y) = grad log q(y); p stands for the posterior, q for the policy:

    DPG      1/n sum_i  p(y_i)/q'(y_i)            s(y_i)    importance sampling of eq. 4
    GDC++    1/n sum_i (p(y_i) - q(y_i))/q'(y_i)  s(y_i)    the same, minus importance sampling of eq. 8
    BRAIn        sum_i (alpha_hat_i - beta_hat_i) s(y_i)    both self-normalised (eq. 12), by brain.py

Two worlds: a Gaussian one (posterior N(0,1), policy N(1,1), q' = N(m,1) with m from 0 to 1, n = 8, gradient
in the policy's mean), and seven words, where every tuple of n is enumerated (gradient in the logits).

What to see:
1. Off the posterior the variance of DPG and GDC++ grows and BRAIn's stays where it is: at m = 1, where
   training begins (q' = prior = policy), 1.57 and 1.20 against 0.17.
2. At m = 0, where training should end, it is another matter: DPG's weights are all 1 and it is the quietest,
   while GDC++'s baseline, meant to take noise away, is the noisiest part of all.
3. BRAIn pays with bias, and a plot of variance alone does not show it. It is unbiased for -grad D_n
   (Theorem 4.2), not for -grad KL: at n = 8 it is short by 15 to 23 per cent, always towards zero. Bias
   and variance together (mean squared error) it still wins, except with q' close to the posterior.

Every number drawn is held against one that was not: closed forms for DPG and GDC++, integrals for BRAIn
(whose mean comes from differentiating D_n itself, eq. 13, and never from eq. 12), `toy.world` for the
words. Exit code 1 if one of them disagrees.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from toy.world import World, d_n_coefficients, log_normalize, posterior, tiny_gpt2

ESTIMATORS = ("DPG", "GDC++", "BRAIn")
NUMBERS = ("variance", "bias", "mean squared error")
POSTERIOR, POLICY = 0.0, 1.0  # means of two Gaussians of variance 1, the proposal's lies between them
TRUE = POSTERIOR - POLICY  # -d KL / d POLICY = E_p[y] - POLICY
N = 8
PUBLISHED = dict(zip(ESTIMATORS, (2.0, 1.3, 0.17)))  # read off the published plot, m = 1, 2000 draws


def sample_weights(log_p, log_goodness, log_posterior, log_q, log_q_proposal):
    """name -> (..., n) weights, so that an estimate is sum_i weight_i s(y_i).

    DPG and GDC++ need the normalised posterior, which no language model has; BRAIn needs p times goodness.
    """
    from brain import policy_weights, posterior_weights  # here: --help need not wait for transformers

    n = log_q.shape[-1]
    p_ratio, q_ratio = (log_posterior - log_q_proposal).exp(), (log_q - log_q_proposal).exp()
    alpha_hat = posterior_weights(log_p, log_q_proposal, log_goodness)  # eq. 6
    beta_hat = policy_weights(log_q, log_q_proposal)  # eq. 11
    return {"DPG": p_ratio / n, "GDC++": (p_ratio - q_ratio) / n, "BRAIn": alpha_hat - beta_hat}


# --------------------------------------------------------------------- the Gaussian world, drawn
def log_normal(y, mean):
    """log N(y; mean, 1) without its constant, which every ratio cancels."""
    return -((y - mean) ** 2) / 2


def draw(m, draws, generator, n=N):
    """name -> (draws,) estimates of the gradient in the policy's mean."""
    parts = []
    for start in range(0, draws, 50_000):  # blocks that fit a processor's cache
        shape = (min(50_000, draws - start), n)
        y = m + torch.randn(shape, generator=generator, dtype=torch.float64)
        log_q = log_normal(y, POLICY)
        # The prior is the policy, as when training begins; the reward -y then makes the posterior N(0,1).
        weights = sample_weights(log_q, -y, log_normal(y, POSTERIOR), log_q, log_normal(y, m))
        parts.append({name: (w * (y - POLICY)).sum(-1) for name, w in weights.items()})  # s(y) = y - POLICY
    return {name: torch.cat([part[name] for part in parts]) for name in ESTIMATORS}


def measure(g):
    """number -> (value, standard error) of estimates g (draws,)."""
    mean, variance, error = g.mean(), g.var(), (g - TRUE) ** 2
    fourth = ((g - mean) ** 4).mean()  # Var[sample variance] = (fourth moment - variance^2) / draws, nearly
    pairs = (
        (variance, fourth - variance**2),
        (mean - TRUE, variance),
        (error.mean(), error.var()),
    )
    return {name: (float(value), math.sqrt(spread / len(g))) for name, (value, spread) in zip(NUMBERS, pairs)}


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
    return y, proposal, log_normal(y, POSTERIOR) - log_normal(y, m), log_normal(y, policy) - log_normal(y, m), t, 0.2


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
    """(mean, variance) of the BRAIn estimate: mean = -d D_n, second moment by the integrals of d_n_integral."""
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


# --------------------------------------------------------------------- seven words, enumerated
def words():
    """(log prior, rewards) of the 7 outputs of one prompt: words of at most 2 of 2 letters. Each (Y,)."""
    world = World(letters=2, length=2, prompts=1)
    log_p = world.log_probs(tiny_gpt2(world)[0])
    return log_p[0], world.fit(log_p).reward[0]


def enumerated(log_p, reward, log_q_proposal, n):
    """name -> (mean (Y,), total variance) of the gradient in the logits of a tabular policy that equals the prior."""
    ids = torch.cartesian_prod(*[torch.arange(len(log_p))] * n).reshape(-1, n)  # (Y^n, n)
    tables = (log_p, reward, posterior(log_p, reward), log_p, log_q_proposal)
    looked_up = [torch.as_tensor(table)[ids] for table in tables]
    chance = looked_up[-1].sum(-1).exp()  # (Y^n,) probability of the tuple under q'
    scores = torch.eye(len(log_p), dtype=torch.float64) - torch.as_tensor(log_p).exp()  # s(y) = one-hot(y) - q
    result = {}
    for name, weights in sample_weights(*looked_up).items():
        g = (weights[..., None] * scores[ids]).sum(1)  # (Y^n, Y)
        mean = chance @ g
        result[name] = mean.numpy(), float(chance @ (g - mean).square().sum(-1))  # trace of the covariance
    return result


def answers(log_p, reward, log_q_proposal, n):
    """The same two numbers without a tuple, and with no use of brain.py; BRAIn's variance (None) has no such form."""
    p, q, proposal = np.exp(posterior(log_p, reward)), np.exp(log_p), np.exp(log_q_proposal)
    gradient = p - q  # of -KL(posterior || softmax(logits)) in the logits
    score_square = 1 - 2 * q + (q**2).sum()  # |one-hot(y) - q|^2

    def one_sample(numerator):
        return (numerator**2 / proposal * score_square).sum() - (gradient**2).sum()

    minus_grad_d_n = -d_n_coefficients(posterior(log_p, reward), log_p, log_q_proposal, n)
    moments = ((gradient, one_sample(p) / n), (gradient, one_sample(p - q) / n), (minus_grad_d_n, None))
    return dict(zip(ESTIMATORS, moments))


# --------------------------------------------------------------------- tables and picture
def gaussian_table(draws, seed):
    """Print the Gaussian world. -> (m -> name -> number -> (value, standard error), list of disagreements)."""
    generator = torch.Generator().manual_seed(seed)
    print(f"Gaussian world: n = {N}, {draws} draws, 95% intervals, [exact value]; the gradient itself is {TRUE:g}")
    print(f"{'m':>4}  {'':7}" + "".join(f"{name:<31}" for name in NUMBERS))
    measured, wrong = {}, []
    for m in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        measured[m] = {name: measure(g) for name, g in draw(m, draws, generator).items()}
        truth = exact(m)
        for name in ESTIMATORS:
            cells = []
            for number in NUMBERS:
                (value, error), right = measured[m][name][number], truth[name][number]
                cells.append(f"{value:8.4f} ± {1.96 * error:.4f} [{right:.4f}]")
                # 54 numbers are checked at once and some have heavy tails: 5 standard errors, not 1.96.
                if not abs(value - right) <= 5 * error:
                    wrong.append(f"m = {m}, {name}: {number} {value:.4f}, exact {right:.4f}")
            print(f"{m:4.1f}  {name:7}" + "".join(f"{cell:<31}" for cell in cells))
    return measured, wrong


def words_table(sizes=(2, 3, 4)):
    """Print the seven words. -> (share of the prior in q' -> name -> number -> value, for the last n; disagreements)."""
    log_p, reward = words()
    log_target = posterior(log_p, reward)
    true = np.exp(log_target) - np.exp(log_p)
    length = np.linalg.norm(true)
    print(f"\nSeven words, all tuples: q' = posterior^(1-b) prior^b, policy = prior; the gradient's length is {length:.4f}")
    print(f" n     b  {'':7}{'total variance':<18}{'length of bias':<18}mean squared error")
    curves, wrong = {}, []
    for n in sizes:
        for b in (0.0, 0.25, 0.5, 0.75, 1.0):
            log_q_proposal = log_normalize((1 - b) * log_target + b * log_p)
            found, right = enumerated(log_p, reward, log_q_proposal, n), answers(log_p, reward, log_q_proposal, n)
            curves[b] = {}
            for name, (mean, variance) in found.items():
                bias = np.linalg.norm(mean - true)
                curves[b][name] = dict(zip(NUMBERS, (variance, bias, variance + bias**2)))
                print(f"{n:2}  {b:4.2f}  {name:7}" + "".join(f"{value:<18.4f}" for value in curves[b][name].values()))
                off = np.abs(mean - right[name][0]).max()
                if right[name][1] is not None:  # to rounding, of variances from 0.01 to 1e9
                    off = max(off, abs(variance - right[name][1]) / max(1, right[name][1]))
                if not off <= 1e-9:
                    wrong.append(f"words, n = {n}, b = {b}, {name}: {off:.1e} off its exact value")
    return curves, wrong


def plot(measured, draws, curves, path):
    """Above, the Gaussian world: lines exact, markers drawn. Below, the words: all exact."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = dict(zip(ESTIMATORS, (("0.45", "s", "--"), ("0.6", "^", ":"), ("0.0", "o", "-"))))
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), constrained_layout=True)
    fine = np.linspace(0, 1, 21)
    truth = {m: exact(float(m)) for m in fine}
    for column, number in enumerate(NUMBERS):
        above, below = axes[:, column]
        short = "MSE" if number == NUMBERS[2] else number
        for name, (grey, marker, line) in looks.items():
            value, error = np.array([measured[m][name][number] for m in measured]).T
            above.plot(fine, [truth[m][name][number] for m in fine], color=grey, ls=line)
            above.errorbar(list(measured), value, 1.96 * error, color=grey, marker=marker, ms=5, ls="", capsize=3)
            if number == "variance":
                # Where 95% of plots with as few draws as the published one would lie.
                half, middle = 1.96 * error * math.sqrt(draws / 2000), [truth[m][name][number] for m in fine]
                half = np.interp(fine, list(measured), half)
                above.fill_between(fine, middle - half, middle + half, color=grey, alpha=0.18, lw=0)
                above.plot(1.0, PUBLISHED[name], marker="x", color=grey, ms=8, mew=2, ls="")
            below.plot(list(curves), [curves[b][name][number] for b in curves], color=grey, marker=marker, ms=5, ls=line)
            above.plot([], [], color=grey, marker=marker, ls=line, label=name)
        above.set(xlabel="proposal mean m  (0: posterior, 1: policy)", title=f"Gaussian, n = {N}: {short}")
        below.set(xlabel="share b of the prior in the proposal", title=f"seven words, n = 4: {short}")
        if number != "bias":
            below.set_yscale("log")
    for row in axes:
        for axis, label in zip(row, ("variance of the gradient", "bias of the gradient", "variance + bias$^2$")):
            axis.set_ylabel(label)
    axes[0, 0].plot([], [], "kx", ms=8, mew=2, label="published plot")
    axes[0, 0].fill_between([], [], [], color="0.5", alpha=0.3, label="95% of 2000-draw runs")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"variance: {message}\n")


def whole(least, most):
    def read(text):
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return read


def main(argv=None):
    """-> 0, or 1 if a number disagrees with its exact counterpart."""
    parser = Parser("python -m toy.variance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=whole(2000, 10**8), default=400_000, help="per proposal mean (default %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of the draws (default %(default)s)")
    default = Path(__file__).parent / "figures" / "variance.png"
    parser.add_argument("--figure", type=Path, default=default, help="where the picture goes (default toy/figures/variance.png)")
    arguments = parser.parse_args(argv)
    folder = arguments.figure.parent
    if arguments.figure.suffix != ".png" or arguments.figure.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"--figure {arguments.figure}: must be a .png in a directory that can be written to")

    started = time.perf_counter()
    measured, wrong = gaussian_table(arguments.draws, arguments.seed)
    curves, wrong_words = words_table()
    plot(measured, arguments.draws, curves, arguments.figure)
    wrong += wrong_words
    print("\n".join(["", *(f"DISAGREES: {line}" for line in wrong)]))
    verdict = f"{len(wrong)} numbers disagree with" if wrong else "all numbers agree with"
    print(f"{verdict} their exact values; {arguments.figure}; {time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
