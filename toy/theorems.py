"""Every claim of the paper that is a number, checked by exact enumeration in float64.

    python -m toy.theorems                       all claims, a sentence each; exit code 1 if one fails
    python -m toy.theorems --only 4.2 5.1        those whose names contain 4.2 or 5.1

Each sentence compares two sides that share no code. One side is brain.py: its functions, differentiated by
autograd and averaged over all draws of n outputs with their probabilities under q'. The other side is
`toy.world` (sums in numpy), finite differences, formulas as printed in the paper, and plain forwards of a
transformer. Prior p, proposal q' and policy q are three different distributions, so exchanging any two of
them shows.
"""

import argparse
import itertools
import math
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch.nn.utils import parameters_to_vector

import brain
from toy.world import World, d_n, d_n_coefficients, kl, log_normalize, posterior, tiny_gpt2

# What counts as equal. Counter-examples must be far outside; their bounds stand where they are checked.
ROUNDING = 1e-12  # of sums of at most 1e4 float64 terms of order 1, each off by 1e-16
DIFFERENCES = 1e-9  # of finite differences of fourth order with step 2e-3
OPTIMISER = 1e-5  # in log q: a loss that is quadratic around its minimum is flat to rounding within 1e-8
SIGMAS = 5  # standard deviations of what was drawn: more happens by chance once in a million times

CLAIMS = []  # (where in the paper, function that yields (sentence, whether it holds))


def claim(where):
    """Registers the function below as what checks a claim. The sentences that it yields are the claim."""
    return lambda check: CLAIMS.append((where, check)) or check


# ------------------------------------------------------------------------------- the two policies
def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def with_tensors(w):
    """Adds `t`: p, q' and rewards as tensors for brain.py. In numpy they are the answer key's."""
    w.t = SimpleNamespace(**{name: tensor(getattr(w, name)) for name in ("log_p", "log_proposal", "reward")})
    w.target = posterior(w.log_p, w.reward)
    return w


def tabular(seed=0, outcomes=5):
    """A policy is a vector of logits: three distributions over a few outcomes, and rewards, (Y,) each."""
    random = np.random.default_rng(seed)
    log_p, log_proposal, log_q = log_normalize(random.normal(size=(3, outcomes)))
    reward = 1.5 * random.normal(size=outcomes)
    w = SimpleNamespace(log_p=log_p, log_proposal=log_proposal, log_q=log_q, reward=reward, random=random)
    return with_tensors(w)


def transformer():
    """The same of three GPT-2s and all 7 outputs of one prompt. `log_q()` scores the outputs, with gradient.

    `t` comes from a Policy. Its q' was recorded before the parameters moved on, as in Algorithm 1.
    """
    world = World(letters=2, length=2, prompts=1)
    (model, tokenizer), *others = [tiny_gpt2(world, seed, width=16, dtype=torch.float64) for seed in range(3)]
    log_p = world.log_probs(model)[0]
    world.fit(log_p[None])
    policy = brain.Policy(model.train(), tokenizer)  # dropout is on, and Policy must turn it off
    prompt, outputs = torch.tensor(world.prompts[0]), [torch.tensor(output) for output in world.outputs]
    w = SimpleNamespace(world=world, policy=policy, prompt=prompt, outputs=outputs)
    w.log_p, w.reward = log_p, world.reward[0]
    w.log_q = lambda: policy.log_prob(prompt, outputs)
    policy.model.load_state_dict(others[0][0].state_dict())
    w.log_proposal, recorded = world.log_probs(policy.model)[0], w.log_q().detach()
    policy.model.load_state_dict(others[1][0].state_dict())
    with_tensors(w).t.log_proposal, w.t.log_p = recorded, policy.log_prob(prompt, outputs, prior=True)
    return w


def plain_log_q(w):
    """log q of all outputs (Y,) with gradient: whole sequences, one by one, through the model alone."""
    total = []
    for output in w.outputs:
        ids = torch.cat([w.prompt, output[:-1]])[None]
        steps = w.policy.model(input_ids=ids).logits[0, len(w.prompt) - 1 :].log_softmax(-1)  # (T, V)
        total.append(steps[range(len(output)), output].sum())
    return torch.stack(total)


def full_gradient(w, value):
    """Gradient of a number in all parameters of the transformer, one vector."""
    return parameters_to_vector(torch.autograd.grad(value, list(w.policy.model.parameters()))).numpy()


# -------------------------------------------------------------------------------- expectations
def multisets(log_drawn, n):
    """All draws of n outputs (T, n), and their probabilities (T,). A row stands for all its orders: n may be
    64."""
    ids = torch.tensor(list(itertools.combinations_with_replacement(range(len(log_drawn)), n)))
    counts = torch.nn.functional.one_hot(ids, len(log_drawn)).sum(-2).double()  # (T, Y)
    orders = math.lgamma(n + 1) - (counts + 1).lgamma().sum(-1)
    chance = (orders + counts.xlogy(log_drawn.exp()).sum(-1)).exp()
    return ids[chance > 0], chance[chance > 0]


def draws(w, n):
    """All draws of Algorithm 1: ids (T, n), chance (T,), log q' (T, n), alpha_hat (T, n)."""
    ids, chance = multisets(w.t.log_proposal, n)
    log_p, log_proposal, reward = (x[ids] for x in (w.t.log_p, w.t.log_proposal, w.t.reward))
    return ids, chance, log_proposal, brain.posterior_weights(log_p, log_proposal, brain.log_goodness(reward))


def losses(log_q, log_proposal, alpha_hat, baseline=True):
    """brain_loss of each draw: three (T, n) -> (T,)."""
    return torch.vmap(lambda *draw: brain.brain_loss(*draw, baseline))(log_q, log_proposal, alpha_hat)


def expected_loss(log_q, w, n, baseline=True):
    """What Algorithm 1 descends, without its noise."""
    ids, chance, log_proposal, alpha_hat = draws(w, n)
    return chance @ losses(log_q[ids], log_proposal, alpha_hat, baseline)


def logits_gradient(f, log_q):
    """Gradient of f(log_softmax(logits)) in the logits of a tabular policy (Y,), by autograd."""
    logits = tensor(log_q).requires_grad_()
    return torch.autograd.grad(f(logits.log_softmax(-1)), logits)[0].numpy()


def differences(f, x, step=2e-3):
    """Derivatives of f at x (K,), by central differences of fourth order."""
    units = step * np.eye(len(x))
    return np.array([8 * (f(x + u) - f(x - u)) - (f(x + 2 * u) - f(x - 2 * u)) for u in units]) / (12 * step)


def descend(f, parameters, steps=300):
    """L-BFGS, until rounding or the steps run out."""
    stop = dict(max_iter=steps, tolerance_grad=1e-13, tolerance_change=0)
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **stop)

    def closure():
        optimizer.zero_grad()
        value = f()
        value.backward()
        return value

    optimizer.step(closure)


def minimum(f, start):
    """log q (Y,) at the minimum of f(log_softmax(logits))."""
    logits = tensor(start).clone().requires_grad_()
    descend(lambda: f(logits.log_softmax(-1)), [logits])
    return logits.detach().log_softmax(-1).numpy()


def gap(a, b=0.0):
    """Largest absolute difference of two arrays or tensors; infinite where one is nan."""
    return float((tensor(a) - tensor(b)).detach().abs().nan_to_num(nan=math.inf).max())


def relative(a, b):
    """|a - b| / |b|, Euclidean; infinite for nan."""
    return float(np.nan_to_num(np.linalg.norm(a - b) / np.linalg.norm(b), nan=math.inf))


def listed(values, form="z.3f"):
    return ", ".join(format(float(value), form) for value in values)


def zero(text, off, bound=ROUNDING):
    """(sentence with a difference in brackets, whether that difference is 0 up to `bound`)"""
    return f"{text} ({off:.0e})", off < bound


# ------------------------------------------------------------------------- sections 3 and 4, eq. 5-14
@claim("Section 3")
def outcomes():
    w = transformer()
    log_q, exact = w.log_q().detach(), w.world.log_probs(w.policy.model)[0]
    off = max(gap(w.t.log_p, w.log_p), gap(w.t.log_proposal, w.log_proposal), gap(log_q, exact))
    yield zero("Policy.log_prob equals plain forwards on all outputs, under p, q' and q", off)
    off = max(gap(log.exp().sum(), 1) for log in (w.t.log_p, w.t.log_proposal, log_q))
    yield zero("The probabilities of ended and of truncated outputs sum to 1", off)
    drawn = w.policy.sample(w.prompt, 20_000, w.world.length, generator=torch.Generator().manual_seed(0))
    counts = np.bincount([w.world.index[tuple(y.tolist())] for y in drawn], minlength=len(exact))
    expected, freedom = len(drawn) * np.exp(exact), len(exact) - 1
    chi = ((counts - expected) ** 2 / expected).sum() / freedom
    fits = chi < 1 + SIGMAS * math.sqrt(2 / freedom)
    yield f"Policy.sample draws 20,000 outputs with these probabilities (chi square {chi:.2f})", fits


@claim("Eq. 10")
def self_normalised_is_biased():
    w, of_alpha, of_beta, off = tabular(), [], [], 0.0
    for n in (2, 3, 4):
        ids, chance, log_proposal, alpha_hat = draws(w, n)
        beta_hat = brain.policy_weights(tensor(w.log_q)[ids], log_proposal)
        # E[sum_i weight_i f(y_i)] = sum_y c_y f(y). Without bias, c would be the posterior, or q.
        both = (alpha_hat, beta_hat)
        alpha, beta = (np.bincount(ids.ravel(), (chance[:, None] * weights).ravel()) for weights in both)
        of_alpha.append(kl(w.target, np.log(alpha)))
        of_beta.append(kl(w.log_q, np.log(beta)))
        end = minimum(lambda log_q: expected_loss(log_q, w, n, baseline=False), w.log_p)
        off = max(off, gap(end, np.log(alpha)))
    falls = all(0 < c < b < a and a > 0.01 for a, b, c in (of_alpha, of_beta))
    text = f"Self-normalised weights are biased: KL {listed(of_alpha)} for alpha_hat"
    yield f"{text} and {listed(of_beta)} for beta_hat at n = 2, 3, 4", falls
    yield zero("Without the baseline the minimum is E[alpha_hat], not the posterior", off, OPTIMISER)


@claim("Eq. 7, 12-14")
def draw_by_draw():
    w, value, eq_12, eq_7, mean = tabular(), 0.0, 0.0, 0.0, 0.0
    for n in (2, 3, 4):
        ids, chance, log_proposal, alpha_hat = draws(w, n)
        ratios = w.log_p + w.reward - w.log_proposal, w.log_q - w.log_proposal
        alpha, beta = (np.exp(ratio)[ids] for ratio in ratios)
        alpha, beta = alpha / alpha.sum(-1, keepdims=True), beta / beta.sum(-1, keepdims=True)  # eq. 6 and 11
        log_q = tensor(w.log_q)[ids].requires_grad_()
        found = losses(log_q, log_proposal, alpha_hat)
        kls = brain.self_normalized_kl(alpha_hat, brain.policy_weights(log_q, log_proposal))
        value = max(value, *(gap(x, (alpha * np.log(alpha / beta)).sum(-1)) for x in (found, kls)))
        mean = max(mean, gap(chance @ found, d_n(w.target, w.log_q, w.log_proposal, n)))
        # The gradient is sum_i (d loss / d log q(y_i)) grad log q(y_i), so the factors are compared.
        eq_12 = max(eq_12, gap(torch.autograd.grad(found.sum(), log_q)[0], beta - alpha))
        without = losses(log_q, log_proposal, alpha_hat, False)
        eq_7 = max(eq_7, gap(torch.autograd.grad(without.sum(), log_q)[0], -alpha))
    yield zero("The gradient of brain_loss is minus eq. 12 in every draw of n = 2, 3, 4", eq_12)
    yield zero("brain_loss and self_normalized_kl are eq. 14 in every draw", value)
    yield zero("Their expectation is D_n of eq. 13", mean)
    yield zero("With baseline=False the gradient is minus eq. 7", eq_7)


# --------------------------------------------------------------------------------- Theorem 4.2
@claim("Theorem 4.2")
def unbiased_tabular():
    """The expected BRAIn gradient is that of -D_n. It is not that of -KL, but comes closer as n grows."""
    w, far = tabular(), []
    for n in (2, 3, 4):
        descent = logits_gradient(lambda log_q: expected_loss(log_q, w, n), w.log_q)
        by_sums = gap(descent, d_n_coefficients(w.target, w.log_q, w.log_proposal, n))
        slopes = differences(lambda z: d_n(w.target, log_normalize(z), w.log_proposal, n), w.log_q)
        by_steps = gap(descent, slopes)
        far.append(relative(descent, np.exp(w.log_q) - np.exp(w.target)))
        yield zero(f"n = {n}: the expected gradient is -grad D_n", by_sums)
        yield zero(f"n = {n}: finite differences of D_n agree", by_steps, DIFFERENCES)
    text = f"It is not the gradient of -KL(posterior || q): it is {listed(far, '.2f')} of its norm away"
    yield text, far[0] > far[1] > far[2] > 0.1
    w, sizes = tabular(seed=1, outcomes=3), (2, 4, 8, 16, 32, 64)
    far = []
    for n in sizes:
        descent = logits_gradient(lambda log_q: expected_loss(log_q, w, n), w.log_q)
        far.append(relative(descent, np.exp(w.log_q) - np.exp(w.target)))
    falls = all(np.diff(far) < 0) and 1.8 < far[-2] / far[-1] < 2.2
    yield f"That distance falls as 1/n: {listed(far, '.2f')} at n = {listed(sizes, '.0f')}", falls


@claim("Theorem 4.2")
def unbiased_transformer():
    """The same in all parameters of a transformer, log q and its gradient through Policy.log_prob."""
    w = transformer()
    log_q = w.world.log_probs(w.policy.model)[0]
    for n in (2, 3, 4):
        descent = full_gradient(w, expected_loss(w.log_q(), w, n))
        coefficients = tensor(d_n_coefficients(w.target, log_q, w.log_proposal, n))
        by_sums = relative(descent, full_gradient(w, coefficients @ plain_log_q(w)))
        yield zero(f"n = {n}: so it is in all {len(descent):,} parameters of a transformer", by_sums)


# --------------------------------------------------------------------------------- Theorem 4.3
@claim("Theorem 4.3")
def zero_at_the_posterior():
    w, off = tabular(), 0.0
    for n in (2, 3, 4):
        ids, chance, log_proposal, alpha_hat = draws(w, n)
        log_q = tensor(w.target)[ids].requires_grad_()
        values = losses(log_q, log_proposal, alpha_hat)
        off = max(off, gap(values), gap(torch.autograd.grad(values.sum(), log_q)[0]))
    one = ids[7], log_proposal[7], alpha_hat[7]
    noise = logits_gradient(lambda log_q: brain.brain_loss(log_q[one[0]], *one[1:], False), w.target)
    yield zero("At the posterior, loss and gradient of every single draw are 0", off)
    yield f"Without the baseline a draw has a gradient there (of size {gap(noise):.2f})", gap(noise) > 0.1


@claim("Theorem 4.3")
def minimum_is_the_posterior():
    w = tabular()
    for n in (2, 3):
        starts = 2 * w.random.normal(size=(5, 5))
        off = max(gap(minimum(lambda log_q: expected_loss(log_q, w, n), start), w.target) for start in starts)
        yield zero(f"n = {n}: minimising D_n from 5 random starts ends at the posterior", off, OPTIMISER)
    w = transformer()
    descend(lambda: expected_loss(w.log_q(), w, 2), list(w.policy.model.parameters()), steps=150)
    off = gap(w.world.log_probs(w.policy.model)[0], w.target)
    yield zero("Training a transformer on D_2 ends at the posterior", off, 1e-3)


@claim("Theorem 4.3")
def needs_two_outputs():
    """With n = 1 the only output has weight 1 under both, and D_1 = 0 for every policy."""
    w = tabular()
    policies, off = log_normalize(3 * w.random.normal(size=(20, 5))), 0.0
    for log_q in policies:
        slope = logits_gradient(lambda log_q: expected_loss(log_q, w, 1), log_q)
        off = max(off, gap(expected_loss(tensor(log_q), w, 1)), gap(slope))
    far = kl(w.target, policies).max()
    text = f"It needs n >= 2: D_1 is 0 ({off:.0e}) at 20 policies as far as KL {far:.1f} from the posterior"
    yield text, off < ROUNDING and far > 1


@claim("Theorem 4.3")
def needs_full_support():
    w = tabular()
    kept = w.log_proposal >= np.sort(w.log_proposal)[-3]
    w.log_proposal = log_normalize(np.where(kept, w.log_proposal, -np.inf))
    elsewhere = log_normalize(w.target + 3.0 * ~kept)  # right about what is drawn, wrong about the rest
    value, far = gap(expected_loss(tensor(elsewhere), with_tensors(w), 2)), kl(w.target, elsewhere)
    text = f"It needs a proposal that draws every output: with a top-3 proposal D_2 is 0 at KL {far:.2f}"
    yield text, value < ROUNDING and far > 0.1


@claim("Algorithm 1")
def old_proposals():
    w, old = tabular(), tabular()
    old.log_proposal = tabular(seed=3).log_proposal
    with_tensors(old)

    def mixed(log_q):  # half of the draws are of an older round (line 12)
        return (expected_loss(log_q, w, 2) + expected_loss(log_q, old, 2)) / 2

    off = max(gap(minimum(mixed, start), w.target) for start in 2 * w.random.normal(size=(3, 5)))
    text = "With each sample's own log q', samples of two rounds have the posterior as minimum"
    yield zero(text, off, OPTIMISER)


@claim("Algorithm 1")
@torch.no_grad()
def first_step():
    w = transformer()
    log_proposal, n = w.log_q(), len(w.outputs)
    beta_hat = brain.policy_weights(w.log_q(), log_proposal)
    off = max(gap(n * beta_hat, 1), gap(brain.effective_sample_size(beta_hat), n))
    yield zero("At step 0 every beta_hat is 1/n and their effective sample size is n", off, n * ROUNDING)


# ------------------------------------------------------------------------------- sections 5 to 7
GOODNESS = [(model, beta) for model in ("bradley-terry", "logistic") for beta in (1.0, 0.5, 2.0)]


def tempered(w, model, beta):
    """log p(G=1|y,x)^(1/beta) in numpy."""
    return (w.reward if model == "bradley-terry" else -np.log1p(np.exp(-w.reward))) / beta


@claim("Eq. 15, 19, 20")
def goodness():
    w, off = tabular(), 0.0
    for model, beta in GOODNESS:
        plain = np.exp(w.log_p - w.log_proposal + tempered(w, model, beta))
        log_good = brain.log_goodness(w.t.reward, model, beta)
        alpha_hat = brain.posterior_weights(w.t.log_p, w.t.log_proposal, log_good)
        off = max(off, gap(alpha_hat, plain / plain.sum()))
    yield zero("alpha_hat is p p(G=1)^(1/beta) / q', normalised (eq. 20), beta = 1, 0.5, 2", off)
    off = gap(brain.log_goodness(tensor([-1e4, 1e4]), "logistic"), [-1e4, 0.0])
    yield zero("log sigma(r) is exact at r = -10000 and 10000", off)


@claim("Proposition 5.1")
def bradley_terry_weights():
    """Preferences are enough: alpha_hat is a softmax of r + log p - log q', or of r where q' = p."""
    w = tabular()
    preference = 1 / (1 + np.exp(w.reward - w.reward[:, None]))  # eq. 18: P(y_i > y_j) at [i, j]
    ratio = np.exp(w.log_p - w.log_proposal)

    def weights(log_q, reward):
        return brain.posterior_weights(w.t.log_p, log_q, brain.log_goodness(reward))

    alpha_hat, shifted = weights(w.t.log_proposal, w.t.reward), weights(w.t.log_proposal, w.t.reward + 1e4)
    off = gap(alpha_hat, ratio / (ratio * (1 - preference) / preference).sum(-1))  # eq. 17 and 40
    yield zero("Preferences P(y_i > y_j) alone determine alpha_hat, by eq. 16-19 and 40", off)
    moved = gap(alpha_hat, shifted)
    yield zero("alpha_hat stays the same if all rewards are 10000 higher", moved, 1e4 * ROUNDING)
    on_prior, plain = weights(w.t.log_p, w.t.reward), np.exp(w.reward)
    off, far = gap(on_prior, plain / plain.sum()), gap(on_prior, alpha_hat)
    yield zero("Where q' = p, alpha_hat is eq. 21", off)
    yield f"Where q' is not p, eq. 21 is off by {far:.2f}", far > 0.01


def plain_dpo(log_q, log_p, chosen, rejected, beta=1.0):
    """Eq. 7 of Rafailov et al. for one pair, and its gradient in log q (Y,), written out: (1 + Y,)."""
    margin = beta * (log_q[chosen] - log_p[chosen] - log_q[rejected] + log_p[rejected])
    gradient = beta / (1 + np.exp(margin)) * (np.eye(len(log_q))[rejected] - np.eye(len(log_q))[chosen])
    return np.array([np.log1p(np.exp(-margin)), *gradient])


def value_and_gradient(f, log_q):
    """The same of brain.py's losses, by autograd."""
    log_q = tensor(log_q).requires_grad_()
    value = f(log_q)
    return np.array([value.item(), *torch.autograd.grad(value, log_q)[0].tolist()])


@claim("Theorem 6.1")
def dpo():
    w, method = tabular(), brain.METHODS["dpo-sft"]
    log_p, reward = w.t.log_p, w.t.reward
    by_brain, by_formula = 0.0, 0.0
    for beta, pair in itertools.product((1.0, 0.1, 2.0), itertools.permutations(range(5), 2)):
        (best, worst), y = sorted(pair, key=lambda i: -w.reward[i]), list(pair)
        plain = plain_dpo(w.log_q, w.log_p, best, worst, beta)
        alpha_hat = method.alpha_hat(log_p[y], log_p[y], reward[y])
        cached = beta * log_p[y], alpha_hat
        ours = value_and_gradient(lambda q: brain.brain_loss(beta * q[y], *cached), w.log_q)
        beta_hat = brain.policy_weights(beta * tensor(w.log_q)[y], beta * log_p[y])
        kl_of_pair = brain.self_normalized_kl(alpha_hat, beta_hat)  # 0 log 0 is in it
        by_brain = max(by_brain, gap(ours, plain), gap(kl_of_pair, plain[0]))
        arguments = log_p[best], log_p[worst], beta
        formula = value_and_gradient(lambda q: brain.dpo_loss(q[best], q[worst], *arguments), w.log_q)
        by_formula = max(by_formula, gap(formula, plain))
    yield zero("brain_loss of beta log q, with argmax weights, is the DPO loss at beta = 1, 0.1, 2", by_brain)
    yield zero("dpo_loss is the DPO loss at the same three beta", by_formula)
    y = np.array([0, 3, 1, 4, 2, 0, 4, 2])
    alpha_hat = method.alpha_hat(log_p[y], log_p[y], reward[y])
    cached = method.grouped(log_p[y]), method.grouped(alpha_hat), method.baseline
    found = value_and_gradient(lambda q: brain.brain_loss(method.grouped(q[y]), *cached), w.log_q)
    pairs = [sorted(pair, key=lambda i: -w.reward[i]) for pair in y.reshape(4, 2)]
    off = gap(found, np.mean([plain_dpo(w.log_q, w.log_p, *pair) for pair in pairs], 0))
    yield zero("dpo-sft on 8 outputs is the mean over its 4 pairs", off)


@claim("Section 6")
def argmax_overshoots():
    """With argmax for softmax the infimum lies at infinity, so nothing stops a policy at the posterior."""
    w, method = tabular(), brain.METHODS["dpo-sft"]
    w.log_proposal = w.log_p  # q' = p, as in DPO
    ids, chance, log_p, alpha_hat = draws(with_tensors(w), 2)
    one_hot = torch.stack([method.alpha_hat(log_p[i], log_p[i], w.t.reward[y]) for i, y in enumerate(ids)])
    for name, weights in (("softmax", alpha_hat), ("argmax", one_hot)):
        loss = lambda log_q: chance @ losses(log_q[ids], log_p, weights)  # noqa: B023, E731
        values = [float(loss(tensor(posterior(w.log_p, t * w.reward)))) for t in (0.5, 1, 2, 4, 8, 16)]
        slope = np.linalg.norm(logits_gradient(loss, w.target))
        text = f"Along q ~ p exp(t r), t = 0.5, 1, .. 16, the {name} loss is {listed(values)}"
        if name == "softmax":
            yield f"{text}: least at the posterior (t = 1)", np.argmin(values) == 1 and slope < ROUNDING
        else:
            falls = all(np.diff(values) < 0) and values[-1] < 0.01 and slope > 0.01
            yield f"{text}: falling beyond it, to 0", falls


@claim("Theorem 7.1")
def ppo_optimum():
    """The posterior is what maximises E_q[log p(G=1|y,x)] - beta KL(q || p), the objective of PPO."""
    w = tabular()
    starts = 2 * w.random.normal(size=(3, 5))
    for model, beta in GOODNESS:
        good = tensor(beta * tempered(w, model, beta))
        ppo = lambda log_q: log_q.exp() @ (beta * (log_q - tensor(w.log_p)) - good)  # noqa: B023, E731
        ends = [minimum(ppo, start) for start in starts]
        # With a constant for q', the weights of all outcomes together are the posterior itself.
        found = brain.posterior_weights(w.t.log_p, 0 * w.t.log_p, brain.log_goodness(w.t.reward, model, beta))
        off = max(gap(end, found.log()) for end in ends)
        yield zero(f"{model}, beta = {beta:g}: PPO's objective is largest at the posterior", off, OPTIMISER)


@claim("Evidence")
def evidence_bounds():
    w, sizes = tabular(), (1, 2, 4, 8, 16)
    log_q = tensor(w.log_q)
    for model, beta in GOODNESS:
        good, log_good = tempered(w, model, beta), brain.log_goodness(w.t.reward, model, beta)
        evidence, off, mean, bounds = np.log(np.exp(w.log_p + good).sum()), 0.0, 0.0, []
        for n in sizes:
            ids, chance = multisets(log_q, n)
            arguments = w.t.log_p[ids], log_q[ids], log_good[ids]
            exact = evidence - kl(w.log_q, posterior(w.log_p, good))
            off = max(off, gap(chance @ brain.elbo(*arguments), exact))
            values = brain.log_evidence(*arguments)
            mean = max(mean, gap(chance @ values.exp(), np.exp(evidence)) / np.exp(evidence))
            bounds.append(float(chance @ values))
        name = f"{model}, beta = {beta:g}"
        yield zero(f"{name}: the expected elbo is log p(G=1|x) - KL(q || posterior)", off)
        rises = all(np.diff(bounds) > 0) and abs(bounds[0] - exact) < ROUNDING and bounds[-1] < evidence
        text = f"{name}: the expected log_evidence rises with n = 1, 2, 4, 8, 16: {listed(bounds)}"
        yield f"{text}, and stays below log p(G=1|x) = {evidence:.3f}", rises and mean < ROUNDING
        target = tensor(posterior(w.log_p, good))
        apart = max(gap(f(w.t.log_p, target, log_good), evidence) for f in (brain.elbo, brain.log_evidence))
        yield zero(f"{name}: at the posterior both are log p(G=1|x) in every draw", apart)


# ------------------------------------------------------------------------------------- the program
def main(argv=None):
    """Checks the claims. Returns the exit code: 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m toy.theorems", description=__doc__.splitlines()[0])
    which = "only claims whose name contains one of these, such as 4.2"
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help=which)
    only = parser.parse_args(argv).only
    chosen = [claim for claim in CLAIMS if any(name.lower() in claim[0].lower() for name in only)]
    if not chosen:
        names = ", ".join(dict.fromkeys(where for where, _ in CLAIMS))
        parser.error(f"--only {' '.join(only)}: no such claim; there are {names}")
    transformers.utils.logging.set_verbosity_error()  # it asks for a mask, but padding stands on the right
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap runs kl_div in a loop
    print("Each line is a claim of the paper, or about it, that brain.py must satisfy.")
    print("Brackets hold the largest difference between brain.py and an independent computation.")
    started, held = time.perf_counter(), []
    torch.set_num_threads(1)  # tensors are tiny: a second thread only makes the first one wait
    for where, check in chosen:
        for text, holds in check():
            held.append(bool(holds))
            print(f"{'ok  ' if holds else 'FAIL'} {where:15}  {text}.", flush=True)
    if all(held):
        verdict = f"All {len(held)} claims hold: brain.py computes what the paper says, up to rounding"
    else:
        verdict = f"{held.count(False)} of {len(held)} claims FAIL: brain.py or a claim is wrong"
    print(f"{verdict} ({time.perf_counter() - started:.0f} s).")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
