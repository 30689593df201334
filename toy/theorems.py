"""Every claim of the paper that is a number, checked by exact enumeration in float64: one line each.

    python -m toy.theorems                       all of them; exit code 1 if one fails
    python -m toy.theorems --only 4.2 5.1        those whose names contain 4.2 or 5.1

Two sides that share no code meet in each line. On one stand brain.py's functions, differentiated by autograd
and averaged over all n-tuples of outputs with their probabilities under q'. On the other: `toy.world`
(numpy sums over the same tuples), finite differences of its D_n, formulas written out as printed, and plain
forwards of the transformer. Prior, proposal and policy are three different distributions throughout, so
exchanging any two of them shows.

Two kinds of policy: a tabular one, the softmax of a vector of logits over five outcomes, and a tiny GPT-2
with all its weights, whose outputs (at most two letters, ended or cut) are enumerated.

Beside the theorems stand the things that the paper leaves to its reader: for which n and which proposals they
hold, what is biased and by how much, which misprints do not matter, and which shortcuts do.
"""

import argparse
import itertools
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import brain
from toy.world import World, chance_to_win, d_n, d_n_coefficients, kl, log_normalize, posterior, tiny_gpt2

# What counts as equal, and why. Counter-examples must be far outside; their bounds stand where they are checked.
ROUNDING = 1e-12  # sums of at most 1e4 float64 terms of order 1, each wrong by 1e-16
DIFFERENCES = 1e-9  # finite differences of fourth order, step 2e-3: 1e-11 is cut off, 1e-13 is rounding
OPTIMISER = 1e-5  # in log q: a loss that is quadratic around its minimum is flat to rounding within 1e-8
SIGMAS = 5  # standard deviations of what was drawn: more happens by chance once in a million times

CLAIMS = []  # (where in the paper, function that yields (text, whether it holds) for each line)


def claim(where):
    """Registers the function below as what checks the claim of its docstring."""
    return lambda check: CLAIMS.append((where, check)) or check


# ------------------------------------------------------------------------------- the two policies
def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def with_tensors(w):
    """Adds `t`: p, q' and rewards as tensors, brain.py's side. In numpy they are the answer key's."""
    w.t = SimpleNamespace(**{name: tensor(getattr(w, name)) for name in ("log_p", "log_proposal", "reward")})
    w.target = posterior(w.log_p, w.reward)
    return w


def tabular(seed=0, outcomes=5):
    """Three different distributions over a few outcomes, and rewards, (Y,) each; `random` for starting points."""
    random = np.random.default_rng(seed)
    log_p, log_proposal, log_q = log_normalize(random.normal(size=(3, outcomes)))
    reward = 1.5 * random.normal(size=outcomes)
    return with_tensors(SimpleNamespace(log_p=log_p, log_proposal=log_proposal, log_q=log_q, reward=reward, random=random))


def transformer():
    """The same of three GPT-2s and all 7 outputs of one prompt; `log_q()` scores them, with gradient.

    `t` comes through a Policy, q' recorded before its weights move on, as in Algorithm 1; numpy from plain forwards.
    """
    world = World(letters=2, length=2, prompts=1)
    (model, tokenizer), *others = [tiny_gpt2(world, seed, width=16, dtype=torch.float64) for seed in range(3)]
    log_p = world.log_probs(model)[0]
    world.fit(log_p[None])
    policy = brain.Policy(model.train(), tokenizer)  # dropout on, as a trainer leaves a model: Policy's to turn off
    prompt, outputs = torch.tensor(world.prompts[0]), [torch.tensor(output) for output in world.outputs]
    w = SimpleNamespace(world=world, policy=policy, prompt=prompt, outputs=outputs, log_p=log_p, reward=world.reward[0])
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


def weights_gradient(w, value):
    """Gradient of a number in all weights of the transformer, one vector."""
    return parameters_to_vector(torch.autograd.grad(value, list(w.policy.model.parameters()))).numpy()


# -------------------------------------------------------------------------------- expectations
def all_tuples(log_drawn, n):
    """Every n-tuple that is drawn at all, (T, n), and its probability (T,)."""
    ids = torch.cartesian_prod(*[torch.arange(len(log_drawn))] * n).reshape(-1, n)
    chance = log_drawn[ids].sum(-1).exp()
    return ids[chance > 0], chance[chance > 0]


def multisets(log_drawn, n):
    """As all_tuples, but all orders of the same outputs taken together, so that n may be 64."""
    ids = torch.tensor(list(itertools.combinations_with_replacement(range(len(log_drawn)), n)))
    counts = torch.nn.functional.one_hot(ids, len(log_drawn)).sum(-2).double()  # (T, Y)
    return ids, (math.lgamma(n + 1) - (counts + 1).lgamma().sum(-1) + counts @ log_drawn).exp()


def draws(w, n, drawn=None, enumerate=all_tuples):
    """All draws of Algorithm 1 and what it caches: (ids (T, n), chance (T,), log q' (T, n), alpha_hat (T, n)).

    drawn: log-probabilities that outputs are drawn with, if these are not the recorded log q'
    """
    ids, chance = enumerate(w.t.log_proposal if drawn is None else tensor(drawn), n)
    log_p, log_proposal, reward = (x[ids] for x in (w.t.log_p, w.t.log_proposal, w.t.reward))
    return ids, chance, log_proposal, brain.posterior_weights(log_p, log_proposal, brain.log_goodness(reward))


def losses(log_q, log_proposal, alpha_hat, baseline=True):
    """brain_loss of each draw: three (T, n) -> (T,)."""
    return torch.vmap(lambda *draw: brain.brain_loss(*draw, baseline))(log_q, log_proposal, alpha_hat)


def expected_loss(log_q, w, n, beta_proposal=None, baseline=True, **how):
    """What Algorithm 1 descends, without its noise; log_q (Y,) with gradient. beta_proposal: another q' for beta_hat alone."""
    ids, chance, log_proposal, alpha_hat = draws(w, n, **how)
    return chance @ losses(log_q[ids], log_proposal if beta_proposal is None else tensor(beta_proposal)[ids], alpha_hat, baseline)


def logits_gradient(f, log_q):
    """Gradient of f(log_softmax(logits)) in the logits of a tabular policy (Y,), by autograd."""
    logits = tensor(log_q).requires_grad_()
    return torch.autograd.grad(f(logits.log_softmax(-1)), logits)[0].numpy()


def differences(f, x, step=2e-3):
    """Derivatives of f at x (K,), by central differences of fourth order: nobody's gradients enter."""
    units = step * np.eye(len(x))
    return np.array([8 * (f(x + u) - f(x - u)) - (f(x + 2 * u) - f(x - 2 * u)) for u in units]) / (12 * step)


def descend(f, parameters, steps=300):
    """L-BFGS, until rounding or the steps run out."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")

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
    """Largest absolute difference of two arrays or tensors; infinite where one is nan, which max() would pass over."""
    return float((tensor(a) - tensor(b)).detach().abs().nan_to_num(nan=math.inf).max())


def relative(a, b):
    """|a - b| / |b|, Euclidean; infinite for nan."""
    return float(np.nan_to_num(np.linalg.norm(a - b) / np.linalg.norm(b), nan=math.inf))


def chi_square(drawn, chance):
    """(chi square per degree of freedom, whether it is within SIGMAS of 1) of ids drawn against probabilities (Y,)."""
    expected, freedom = len(drawn) * chance, len(chance) - 1
    value = ((np.bincount(drawn, minlength=len(chance)) - expected) ** 2 / expected).sum() / freedom
    return value, value < 1 + SIGMAS * math.sqrt(2 / freedom)


def listed(values, form="z.3f"):
    return ", ".join(format(float(value), form) for value in values)


# ------------------------------------------------------------------------- sections 3 and 4, eq. 5-14
@claim("Section 3")
def outcomes():
    """Outputs that ended and outputs that were cut are all there is: Policy gives each its probability, and draws it so."""
    w = transformer()
    log_q, exact = w.log_q().detach(), w.world.log_probs(w.policy.model)[0]
    off = max(gap(w.t.log_p, w.log_p), gap(w.t.log_proposal, w.log_proposal), gap(log_q, exact))
    yield f"Policy.log_prob of all {len(w.outputs)} outputs under p, q' and q, against plain forwards: {off:.0e}", off < ROUNDING
    off, ended = max(gap(log.exp().sum(), 1) for log in (w.t.log_p, w.t.log_proposal, log_q)), float(log_q[:3].exp().sum())
    yield f"ended and cut outputs sum to one within {off:.0e}; those that ended, alone, to {ended:.2f}", off < ROUNDING and ended < 0.9
    drawn = w.policy.sample(w.prompt, 20_000, w.world.length, generator=torch.Generator().manual_seed(0))
    value, fits = chi_square([w.world.index[tuple(output.tolist())] for output in drawn], np.exp(exact))
    yield f"20,000 outputs of Policy.sample have these probabilities: chi square {value:.2f} per degree of freedom", fits


@claim("Eq. 8-9")
def score_has_mean_zero():
    """E_q[grad log q] = 0: why any multiple of it is a baseline without bias."""
    w = transformer()
    mean = np.linalg.norm(weights_gradient(w, w.log_q().detach().exp() @ w.log_q()))
    one = np.linalg.norm(weights_gradient(w, w.log_q()[0]))
    yield f"|E_q[grad log q]| = {mean:.0e} over all weights of a transformer, beside {one:.0f} for one output", mean < ROUNDING * one


@claim("Eq. 10")
def self_normalised_is_biased():
    """Eq. 9 holds for the baseline, not for its estimate, nor is the estimate of eq. 7 unbiased: alone, it has another optimum."""
    w, of_alpha, of_beta, off = tabular(), [], [], 0.0
    for n in (2, 3, 4):
        ids, chance, log_proposal, alpha_hat = draws(w, n)
        beta_hat = brain.policy_weights(tensor(w.log_q)[ids], log_proposal)
        # E[sum_i weight_i f(y_i)] = sum_y c_y f(y): without bias, c would be the posterior, or q
        alpha, beta = (np.bincount(ids.ravel(), (chance[:, None] * weights).ravel()) for weights in (alpha_hat, beta_hat))
        of_alpha.append(kl(w.target, np.log(alpha)))
        of_beta.append(kl(w.log_q, np.log(beta)))
        off = max(off, gap(minimum(lambda log_q: expected_loss(log_q, w, n, baseline=False), w.log_p), np.log(alpha)))
    text = f"self-normalised weights are biased: KL(posterior || E[alpha_hat]) {listed(of_alpha)}, KL(q || E[beta_hat]) {listed(of_beta)} at n = 2, 3, 4"
    yield text, all(0 < c < b < a and a > 0.01 for a, b, c in (of_alpha, of_beta))
    yield f"eq. 5, without baseline, is least at E[alpha_hat] ({off:.0e}) and not at the posterior", off < OPTIMISER


@claim("Eq. 7, 12-14")
def draw_by_draw():
    """Of each draw, brain_loss has the value of eq. 14 and minus the gradient of eq. 12, or of eq. 7 without the baseline."""
    w, value, eq_12, eq_7, mean = tabular(), 0.0, 0.0, 0.0, 0.0
    for n in (2, 3, 4):
        ids, chance, log_proposal, alpha_hat = draws(w, n)
        alpha, beta = (np.exp(log_weights)[ids] for log_weights in (w.log_p + w.reward - w.log_proposal, w.log_q - w.log_proposal))
        alpha, beta = alpha / alpha.sum(-1, keepdims=True), beta / beta.sum(-1, keepdims=True)  # eq. 6 and 11
        log_q = tensor(w.log_q)[ids].requires_grad_()
        found = losses(log_q, log_proposal, alpha_hat)
        kls = brain.self_normalized_kl(alpha_hat, brain.policy_weights(log_q, log_proposal))
        value = max(value, *(gap(x, (alpha * np.log(alpha / beta)).sum(-1)) for x in (found, kls)))
        mean = max(mean, gap(chance @ found, d_n(w.target, w.log_q, w.log_proposal, n)))
        # The gradient is sum_i (d loss / d log q(y_i)) grad log q(y_i), so the factors are compared.
        eq_12 = max(eq_12, gap(torch.autograd.grad(found.sum(), log_q)[0], beta - alpha))
        eq_7 = max(eq_7, gap(torch.autograd.grad(losses(log_q, log_proposal, alpha_hat, False).sum(), log_q)[0], -alpha))
    yield f"grad brain_loss + sum (alpha_hat - beta_hat) grad log q = {eq_12:.0e} in every draw of 2, 3 or 4", eq_12 < ROUNDING
    yield f"brain_loss and self_normalized_kl are eq. 14 in every draw: {value:.0e}; on average D_n (eq. 13): {mean:.0e}", max(value, mean) < ROUNDING
    yield f"baseline=False: gradient + eq. 7 = {eq_7:.0e}", eq_7 < ROUNDING


@claim("Eq. 12")
def fixed_weights():
    """Line 17 of Algorithm 1 with its weights held fixed has the gradient of the divergence: outputs may go in chunks."""
    w, y = transformer(), [0, 3, 3, 5, 6, 1]  # six outputs, one of them drawn twice
    log_proposal = w.t.log_proposal[y]
    alpha_hat = brain.posterior_weights(w.t.log_p[y], log_proposal, w.t.reward[y])

    def log_q():
        return w.policy.log_prob(w.prompt, [w.outputs[i] for i in y])

    fixed = (alpha_hat - brain.policy_weights(log_q(), log_proposal)).detach()
    descent = weights_gradient(w, brain.brain_loss(log_q(), log_proposal, alpha_hat))
    off = [relative(-weights_gradient(w, fixed @ scores), descent) for scores in (log_q(), plain_log_q(w)[y])]
    w.policy.outputs_per_forward = 2
    off.append(relative(weights_gradient(w, brain.brain_loss(log_q(), log_proposal, alpha_hat)), descent))
    yield f"transformer, line 17 with fixed weights {off[0]:.0e} from grad brain_loss, by plain forwards {off[1]:.0e}, in chunks {off[2]:.0e}", max(off) < ROUNDING


# --------------------------------------------------------------------------------- Theorem 4.2
@claim("Theorem 4.2")
def unbiased_tabular():
    """The expected BRAIn gradient is that of -D_n. It is not that of the KL divergence, but comes closer with n."""
    w, far = tabular(), []
    for n in (2, 3, 4):
        descent = logits_gradient(lambda log_q: expected_loss(log_q, w, n), w.log_q)  # minus the expected eq. 12
        by_sums = gap(descent, d_n_coefficients(w.target, w.log_q, w.log_proposal, n))
        by_steps = gap(descent, differences(lambda z: d_n(w.target, log_normalize(z), w.log_proposal, n), w.log_q))
        far.append(relative(descent, np.exp(w.log_q) - np.exp(w.target)))
        text = f"n = {n}, tabular: |expected gradient + grad D_n| = {by_sums:.0e} ({by_steps:.0e} by differences), from the KL's gradient {far[-1]:.2f} of its norm"
        yield text, by_sums < ROUNDING and by_steps < DIFFERENCES and far[-1] > 0.1
    yield f"that distance falls with n: {listed(far, '.2f')}", far[0] > far[1] > far[2]
    w, sizes = tabular(seed=1, outcomes=3), (2, 4, 8, 16, 32, 64)
    descents = [logits_gradient(lambda log_q: expected_loss(log_q, w, n, enumerate=multisets), w.log_q) for n in sizes]
    far = [relative(descent, np.exp(w.log_q) - np.exp(w.target)) for descent in descents]
    falls = all(np.diff(far) < 0) and 1.8 < far[-2] / far[-1] < 2.2
    yield f"towards 0, as 1/n: {listed(far, '.2f')} at n = {listed(sizes, '.0f')} (3 outcomes)", falls


@claim("Theorem 4.2")
def unbiased_transformer():
    """The same in all weights of a transformer, log q and its gradient through Policy.log_prob."""
    w, far = transformer(), []
    model, weights = w.policy.model, parameters_to_vector(w.policy.model.parameters()).detach()
    log_q = w.world.log_probs(model)[0]
    true = weights_gradient(w, -tensor(np.exp(w.target)) @ plain_log_q(w))
    direction = tensor(np.random.default_rng(0).normal(size=len(weights)) / math.sqrt(len(weights)))

    def d_n_at(t, n):  # numpy and forwards alone, the weights moved by t
        vector_to_parameters(weights + t[0] * direction, model.parameters())
        return d_n(w.target, w.world.log_probs(model)[0], w.log_proposal, n)

    for n in (2, 3, 4):
        slope = differences(lambda t: d_n_at(t, n), np.zeros(1))[0]
        vector_to_parameters(weights, model.parameters())
        descent = weights_gradient(w, expected_loss(w.log_q(), w, n))
        sums = weights_gradient(w, tensor(d_n_coefficients(w.target, log_q, w.log_proposal, n)) @ plain_log_q(w))
        by_sums, by_steps = relative(descent, sums), abs(descent @ direction.numpy() - slope) / np.linalg.norm(descent)
        far.append(relative(descent, true))
        text = f"n = {n}, {len(weights):,} weights: |expected gradient + grad D_n| = {by_sums:.0e} of it ({by_steps:.0e} by differences), "
        yield text + f"from the KL's {far[-1]:.2f}", by_sums < ROUNDING and by_steps < DIFFERENCES and far[-1] > 0.1
    yield f"that distance falls with n: {listed(far, '.2f')}", far[0] > far[1] > far[2]


@claim("Theorem 4.2")
def unbiased_one_by_one():
    """As a run does it: each draw scored by itself, with its own loss and backward."""
    w = transformer()
    for pair, chance in zip(*all_tuples(w.t.log_proposal, 2)):
        log_q = w.policy.log_prob(w.prompt, [w.outputs[i] for i in pair])
        alpha_hat = brain.posterior_weights(w.t.log_p[pair], w.t.log_proposal[pair], brain.log_goodness(w.t.reward[pair]))
        (chance * brain.brain_loss(log_q, w.t.log_proposal[pair], alpha_hat)).backward()
    summed = parameters_to_vector([p.grad for p in w.policy.model.parameters()]).numpy()
    coefficients = tensor(d_n_coefficients(w.target, w.world.log_probs(w.policy.model)[0], w.log_proposal, 2))
    off = relative(summed, weights_gradient(w, coefficients @ plain_log_q(w)))
    yield f"n = 2, each of the {len(w.outputs) ** 2} draws with its own brain_loss(...).backward(): {off:.0e} of it", off < ROUNDING


# --------------------------------------------------------------------------------- Theorem 4.3
@claim("Theorem 4.3")
def zero_at_the_posterior():
    """At the posterior loss and gradient are 0 for every single draw: no noise is left there. Without the baseline it is."""
    w, off = tabular(), 0.0
    for n in (2, 3, 4):
        ids, chance, log_proposal, alpha_hat = draws(w, n)
        log_q = tensor(w.target)[ids].requires_grad_()
        values = losses(log_q, log_proposal, alpha_hat)
        off = max(off, gap(values), gap(torch.autograd.grad(values.sum(), log_q)[0]))
    noise = logits_gradient(lambda log_q: brain.brain_loss(log_q[ids[7]], log_proposal[7], alpha_hat[7], baseline=False), w.target)
    yield f"D_n = 0 at the posterior, value and gradient of every draw: {off:.0e}; of a draw without baseline {gap(noise):.2f}", off < ROUNDING and gap(noise) > 0.1


@claim("Theorem 4.3")
def positive_elsewhere():
    """Away from the posterior D_n is positive and grows with the KL divergence."""
    w = tabular()
    for n in (2, 3):
        rays = log_normalize(w.target + np.array([0.1, 0.3, 1, 3])[:, None] * w.random.normal(size=(100, 1, 5)))
        pairs = np.array([[(float(expected_loss(tensor(log_q), w, n)), kl(w.target, log_q)) for log_q in ray] for ray in rays])  # (100, 4, 2)
        together = np.corrcoef(pairs.reshape(-1, 2).argsort(0).argsort(0).T)[0, 1]
        text = f"n = {n}: D_n >= {pairs.min():.0e} at 400 policies, rising with the KL on each of 100 rays from the posterior; their rank correlation {together:.2f}"
        yield text, pairs.min() > 0 and (np.diff(pairs, axis=1) > 0).all() and together > 0.9


@claim("Theorem 4.3")
def convex_in_logits():
    """In a tabular policy's logits D_n is convex with one flat direction, all logits alike: why it has one minimum."""
    w = tabular()
    for n in (2, 3):
        flat, curved, off = 0.0, math.inf, 0.0
        for logits in 2 * w.random.normal(size=(10, 5)):
            hessian = torch.autograd.functional.hessian(lambda z: expected_loss(z.log_softmax(-1), w, n), tensor(logits)).numpy()
            eigenvalues = np.linalg.eigvalsh(hessian)
            flat, curved = max(flat, abs(eigenvalues[0]), gap(hessian.sum(0))), min(curved, eigenvalues[1] / eigenvalues[-1])
            off = max(off, gap(hessian, differences(lambda z: d_n_coefficients(w.target, log_normalize(z), w.log_proposal, n), logits)))
        text = f"n = {n}: Hessian at 10 random logits: least eigenvalue {flat:.0e}, the second {curved:.2f} of the largest or more; {off:.0e} from differences"
        yield text, flat < ROUNDING and curved > 1e-4 and off < DIFFERENCES


@claim("Theorem 4.3")
def minimum_is_the_posterior():
    """Minimising D_n itself ends at the posterior, wherever it starts; with a transformer too, though it is not convex in its weights."""
    w = tabular()
    for n in (2, 3):
        starts = 2 * w.random.normal(size=(5, 5))
        off = max(gap(minimum(lambda log_q: expected_loss(log_q, w, n), start), w.target) for start in starts)
        before = max(gap(log_normalize(start), w.target) for start in starts)
        yield f"n = {n}: minimised from 5 random starts, |log q - log posterior| {before:.1f} -> {off:.0e}", off < OPTIMISER
    w = transformer()
    model, before = w.policy.model, gap(w.log_q(), w.target)
    descend(lambda: expected_loss(w.log_q(), w, 2), list(model.parameters()), steps=150)
    off = gap(w.world.log_probs(model)[0], w.target)
    yield f"n = 2, all weights of a transformer: {before:.1f} -> {off:.0e}", off < 1e-3  # stopped after 150 steps, wherever it is
    trained = parameters_to_vector(model.parameters()).detach().clone()
    for block in model.transformer.h:  # hidden units in reverse order: another point of the weights, the same policy
        for weight, axis in ((block.mlp.c_fc.weight, 1), (block.mlp.c_fc.bias, 0), (block.mlp.c_proj.weight, 0)):
            weight.data = weight.data.flip(axis)
    twin = gap(expected_loss(w.log_q(), w, 2))
    vector_to_parameters((trained + parameters_to_vector(model.parameters()).detach()) / 2, model.parameters())
    halfway = expected_loss(w.log_q(), w, 2).item()
    yield f"not convex in its weights: with hidden units reordered D_2 is {twin:.0e} again, halfway between {halfway:.2f}", twin < 1e-5 and halfway > 0.01


@claim("Theorem 4.3")
def needs_two_outputs():
    """It needs n >= 2: a single output has weight 1 under both, and D_1 = 0 for every policy."""
    w = tabular()
    policies = log_normalize(3 * w.random.normal(size=(20, 5)))
    off = max(gap(expected_loss(tensor(log_q), w, 1)) + gap(logits_gradient(lambda log_q: expected_loss(log_q, w, 1), log_q)) for log_q in policies)
    far = kl(w.target, policies).max()
    yield f"n = 1 fails: D_1 and its gradient are {off:.0e} at 20 policies with KL up to {far:.1f}", off < ROUNDING and far > 1


@claim("Theorem 4.3")
def needs_full_support():
    """It needs a proposal that can draw every output. Top-k sampling cannot, and what it leaves out is not learned."""
    w = tabular()
    kept = w.log_proposal >= np.sort(w.log_proposal)[-3]
    w.log_proposal = log_normalize(np.where(kept, w.log_proposal, -np.inf))
    elsewhere = log_normalize(w.target + 3.0 * ~kept)  # right about what is drawn, wrong about the rest
    value, far = gap(expected_loss(tensor(elsewhere), with_tensors(w), 2)), kl(w.target, elsewhere)
    yield f"a top-3 proposal fails: D_2 = {value:.0e} at a policy with KL(posterior || it) = {far:.2f}", value < ROUNDING and far > 0.1
    end = minimum(lambda log_q: expected_loss(log_q, w, 2), w.log_q)
    off, far = gap(log_normalize(end[kept]), log_normalize(w.target[kept])), kl(w.target, end)
    yield f"and training with it ends at KL {far:.2f}, right (within {off:.0e}) only among what is drawn", off < OPTIMISER and far > 0.01


@claim("Theorem 4.3")
def needs_one_record():
    """alpha_hat and beta_hat must use one log q'. Then even a wrong one leaves the minimum where it is; eq. 7 it leads astray."""
    w = tabular()
    drawn = log_normalize(2 * w.log_proposal)  # drawn at temperature 0.5, recorded at 1
    off = gap(minimum(lambda log_q: expected_loss(log_q, w, 4, drawn=drawn), w.log_q), w.target)
    right, wrong = (kl(w.target, minimum(lambda log_q: expected_loss(log_q, w, 4, drawn=d, baseline=False), w.log_q)) for d in (None, drawn))
    text = f"drawn at temperature 0.5, recorded at 1: the minimum stays at the posterior ({off:.0e}); without the baseline KL {right:.2f} becomes {wrong:.2f}"
    yield text, off < OPTIMISER and wrong > 1.5 * right


@claim("Algorithm 1")
def old_proposals():
    """D_t mixes rounds (line 12). With each sample's own log q' the posterior stays the minimum."""
    w, old = tabular(), tabular()
    old.log_proposal = tabular(seed=3).log_proposal
    with_tensors(old)

    def mixed(log_q, **beta):  # half of the draws are of an older round
        return (expected_loss(log_q, w, 2) + expected_loss(log_q, old, 2, **beta)) / 2

    off = max(gap(minimum(mixed, start), w.target) for start in 2 * w.random.normal(size=(3, 5)))
    yield f"two rounds' samples, each with its own log q': minimum within {off:.0e} of the posterior, 3 starts", off < OPTIMISER
    far = kl(w.target, minimum(lambda log_q: mixed(log_q, beta_proposal=w.log_proposal), w.log_q))
    yield f"beta_hat of old samples with the newest log q', their alpha_hat cached with the old: KL(posterior || minimum) = {far:.2f}", far > 0.01


@claim("Algorithm 1")
@torch.no_grad()
def first_step():
    """At step 0 q_theta is the proposal and beta_hat is 1/n. Dropout would make it noise."""
    w = transformer()
    log_proposal, n = w.log_q(), len(w.outputs)
    beta_hat = brain.policy_weights(w.log_q(), log_proposal)
    off = max(gap(n * beta_hat, 1), gap(brain.effective_sample_size(beta_hat), n))
    w.policy.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = gap(n * brain.policy_weights(w.log_q(), log_proposal), 1)
    yield f"step 0: n beta_hat - 1 and effective sample size - n are {off:.0e}; with dropout n beta_hat is off by {noise:.1f}", off < n * ROUNDING and noise > 0.1


# ------------------------------------------------------------------------------- misprints of the proofs
@claim("Eq. 29, 33")
def misprints():
    """Eq. 29 is grad log beta = grad log q, without the factor beta. Eq. 33 holds up to the constant p(G=1|x)."""
    w = tabular()
    steps = np.stack([differences(lambda z: (log_normalize(z) - w.log_proposal)[y], w.log_q) for y in range(5)])
    scores = np.eye(5) - np.exp(w.log_q)  # grad log q(y), a row for each y
    off, printed = gap(steps, scores), gap(steps, np.exp(w.log_q - w.log_proposal)[:, None] * scores)
    yield f"eq. 29: grad log beta - grad log q = {off:.0e}, - beta grad log q (as printed) = {printed:.2f}", off < DIFFERENCES and printed > 0.1
    ratio, constant = np.exp(w.log_p + w.reward - w.target), np.exp(w.log_p + w.reward).sum()  # alpha / beta, and p(G=1|x) of eq. 1
    alpha_hat = brain.posterior_weights(w.t.log_p, w.t.log_proposal, w.t.reward)
    off = max(gap(ratio, constant), gap(alpha_hat, brain.policy_weights(tensor(w.target), w.t.log_proposal)))
    text = f"eq. 33: at the posterior alpha / beta = {ratio.mean():.3f} = sum p exp(r), not 1; alpha_hat = beta_hat: {off:.0e}"
    yield text, off < ROUNDING and abs(constant - 1) > 0.1


# ------------------------------------------------------------------------------- sections 5 to 7
@claim("Eq. 15")
def logistic_goodness():
    """A logistic reward model: goodness sigma(r), another posterior than that of exp(r)."""
    w = tabular()
    plain = np.exp(w.log_p - w.log_proposal) / (1 + np.exp(-w.reward))
    found, other = (brain.posterior_weights(w.t.log_p, w.t.log_proposal, brain.log_goodness(w.t.reward, m)) for m in ("logistic", "bradley-terry"))
    off, far, ends = gap(found, plain / plain.sum()), gap(found, other), brain.log_goodness(tensor([-1e4, 1e4]), "logistic")
    text = f"logistic: alpha_hat - p sigma(r)/q' / sum = {off:.0e}, Bradley-Terry's is {far:.2f} away; log sigma(±10000) = {listed(ends, '.0f')}"
    yield text, max(off, gap(ends, [-1e4, 0.0])) < ROUNDING and far > 0.01


@claim("Proposition 5.1")
def bradley_terry_weights():
    """Preferences P(y_i > y_j) are enough: alpha_hat is a softmax of r + log p - log q' (eq. 20), of r where q' = p (eq. 21)."""
    w = tabular()
    preference = 1 / (1 + np.exp(w.reward - w.reward[:, None]))  # eq. 18: P(y_i > y_j) at [i, j]
    ratio = np.exp(w.log_p - w.log_proposal)
    alpha_hat, shifted = (brain.posterior_weights(w.t.log_p, w.t.log_proposal, brain.log_goodness(r)) for r in (w.t.reward, w.t.reward + 1e4))
    off = gap(alpha_hat, ratio / (ratio * (1 - preference) / preference).sum(-1))  # eq. 17 and 40
    yield f"alpha_hat, against preferences alone (eq. 16-19, 40): {off:.0e}", off < ROUNDING
    plain = np.exp(w.reward + w.log_p - w.log_proposal)
    off, moved = gap(alpha_hat, plain / plain.sum()), gap(alpha_hat, shifted)
    yield f"eq. 20: {off:.0e}; with all rewards 10000 higher (4 digits less): {moved:.0e}", off < ROUNDING and moved < 1e4 * ROUNDING
    on_prior, plain = brain.posterior_weights(w.t.log_p, w.t.log_p, brain.log_goodness(w.t.reward)), np.exp(w.reward)
    off, far = gap(on_prior, plain / plain.sum()), gap(on_prior, alpha_hat)
    yield f"eq. 21 (q' = p): {off:.0e}; where q' is not p it is off by {far:.2f}", off < ROUNDING and far > 0.01


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
    """n = 2, q' = p, argmax for softmax: the BRAIn objective is the DPO loss at beta = 1. On n outputs, the mean over n/2 pairs."""
    w, method = tabular(), brain.METHODS["dpo-sft"]
    log_p, reward, by_brain, by_formula, tenth = w.t.log_p, w.t.reward, 0.0, 0.0, []
    for y in itertools.permutations(range(5), 2):
        best, worst = sorted(y, key=lambda i: -w.reward[i])
        plain, y = plain_dpo(w.log_q, w.log_p, best, worst), list(y)
        alpha_hat = method.weights(log_p[y], log_p[y], reward[y])
        by_brain = max(by_brain, gap(value_and_gradient(lambda log_q: brain.brain_loss(log_q[y], log_p[y], alpha_hat), w.log_q), plain))
        kl_of_pair = brain.self_normalized_kl(alpha_hat, brain.policy_weights(tensor(w.log_q)[y], log_p[y]))  # 0 log 0 in it
        by_brain = max(by_brain, gap(kl_of_pair, plain[0]))
        formula = value_and_gradient(lambda log_q: brain.dpo_loss(log_q[best], log_q[worst], log_p[best], log_p[worst]), w.log_q)
        by_formula = max(by_formula, gap(formula, plain))
        tenth.append(abs(plain_dpo(w.log_q, w.log_p, best, worst, 0.1)[0] - plain[0]))
    yield f"brain_loss with argmax weights, value and gradient on all 20 pairs, against DPO's formula: {by_brain:.0e}", by_brain < ROUNDING
    yield f"dpo_loss against it: {by_formula:.0e}; beta = 0.1, a common default, is another loss, {np.mean(tenth):.2f} away", by_formula < ROUNDING and np.mean(tenth) > 0.1
    y = np.array([0, 3, 1, 4, 2, 0, 4, 2])
    alpha_hat = method.weights(log_p[y], log_p[y], reward[y])
    found = value_and_gradient(lambda log_q: brain.brain_loss(*map(method.grouped, (log_q[y], log_p[y], alpha_hat)), method.baseline), w.log_q)
    off = gap(found, np.mean([plain_dpo(w.log_q, w.log_p, *sorted(pair, key=lambda i: -w.reward[i])) for pair in y.reshape(4, 2)], 0))
    yield f"dpo-sft on 8 outputs, against the mean over its 4 pairs: {off:.0e}", off < ROUNDING


def along_the_reward(w, loss):
    """Losses at q = p exp(t r) / Z, the posterior at t = 1, for t = 1/2, 1, 2, 4, 8, 16; and |gradient| at the posterior."""
    values = [loss(tensor(posterior(w.log_p, t * w.reward))).item() for t in (0.5, 1, 2, 4, 8, 16)]
    return values, np.linalg.norm(logits_gradient(loss, w.target))


@claim("Section 6")
def argmax_overshoots():
    """With argmax for softmax the infimum lies at infinity: nothing stops a policy at the posterior."""
    w = tabular()
    w.log_proposal = w.log_p  # q' = p, as in DPO
    ids, chance, log_p, alpha_hat = draws(with_tensors(w), 2)
    one_hot = torch.stack([brain.METHODS["dpo-sft"].weights(log_p[i], log_p[i], w.t.reward[ids[i]]) for i in range(len(ids))])
    for name, weights in (("softmax", alpha_hat), ("argmax", one_hot)):
        values, slope = along_the_reward(w, lambda log_q: chance @ losses(log_q[ids], log_p, weights))
        stops = np.argmin(values) == 1 and slope < ROUNDING
        falls = all(np.diff(values) < 0) and values[-1] < 0.01 and slope > 0.01
        text = f"{name}, q ~ p exp(t r): loss {listed(values)} at t = 0.5, 1, 2, 4, 8, 16; gradient at the posterior (t = 1) {slope:.0e}"
        yield text, stops if name == "softmax" else falls


@claim("Section 6")
def human_pairs():
    """Pairs of the prior labelled by Bradley-Terry (eq. 16) have the posterior as DPO's optimum; labelled by argmax they have not."""
    w = tabular()
    ids, chance = all_tuples(w.t.log_p, 2)  # (chosen, rejected)
    margin, log_p = w.t.reward[ids[:, 0]] - w.t.reward[ids[:, 1]], w.t.log_p[ids]
    human, argmax = 2 * chance * margin.sigmoid(), 2 * chance * torch.heaviside(margin, tensor(0.5))
    first = brain.METHODS["dpo"].weights(log_p[0], log_p[0], log_p[0]).expand(len(ids), 2)  # rewards play no part

    def pairs(log_q):
        return torch.vmap(brain.dpo_loss)(*log_q[ids].T, *log_p.T)

    off = max(gap(minimum(lambda log_q: human @ pairs(log_q), start), w.target) for start in 2 * w.random.normal(size=(3, 5)))
    off = max(off, gap(minimum(lambda log_q: human @ losses(log_q[ids], log_p, first), w.log_q), w.target))
    yield f"human pairs, p x p with Bradley-Terry labels: DPO's minimum within {off:.0e} of the posterior, 4 starts", off < OPTIMISER
    values, slope = along_the_reward(w, lambda log_q: argmax @ pairs(log_q))
    yield f"argmax labels: loss {listed(values)}, falling beyond it; gradient there {slope:.2f}", all(np.diff(values) < 0) and slope > 0.01


@claim("Theorem 7.1")
def ppo_optimum():
    """The posterior of a Bradley-Terry reward is what maximises E_q[r] - KL(q || p)."""
    w = tabular()
    starts = 2 * w.random.normal(size=(5, 5))
    ends = [minimum(lambda log_q: (log_q.exp() * (log_q - tensor(w.log_p) - tensor(w.reward))).sum(), start) for start in starts]
    # With a constant for q', the weights of all outcomes together are the posterior itself.
    found = brain.posterior_weights(w.t.log_p, torch.zeros(5).double(), brain.log_goodness(w.t.reward)).log()
    off, value = max(gap(end, found) for end in ends), np.exp(ends[0]) @ w.reward - kl(ends[0], w.log_p)
    rest = abs(value - np.log(np.exp(w.log_p + w.reward).sum()))
    text = f"E[r] - KL(q || p) maximised from 5 starts: |log q - log posterior| = {off:.0e}; maximum - log E_p[exp r] = {rest:.0e}"
    yield text, off < OPTIMISER and rest < 1e-10  # the square of what L-BFGS leaves


# ------------------------------------------------------------------------------- sections 8 and 9
@claim("RSO")
def rejection():
    """Acceptance with probability exp(r - r_max) gives the posterior with the true maximum and fresh draws; from few candidates not."""
    w, generator, kept = tabular(), torch.Generator().manual_seed(0), {}
    accepted = np.exp(w.log_p + w.reward - w.reward.max())
    exact = gap(accepted / accepted.sum(), np.exp(w.target))
    for size in (1, 2, 4, 6):  # one output of `size` candidates: the first that is accepted, and the best always is
        ids, chance = (x.numpy() for x in all_tuples(w.t.log_p, size))
        accept = np.exp(w.reward[ids] - w.reward[ids].max(-1, keepdims=True))
        none_before = np.cumprod(np.hstack([np.ones((len(ids), 1)), 1 - accept[:, :-1]]), -1)
        kept[size] = np.bincount(ids.ravel(), (chance[:, None] * none_before * accept).ravel())
    far = [kl(w.target, np.log(chance)) for chance in kept.values()]
    text = f"KL(posterior || kept) {listed(far)} with 1, 2, 4, 6 candidates for an output; true maximum, fresh draws: {exact:.0e}"
    yield text, all(np.diff(far) < 0) and far[-1] > 1e-3 and exact < ROUNDING
    pool = torch.multinomial(w.t.log_p.exp(), 200_000, True, generator=generator)
    four = pool[:40_000].reshape(-1, 4)
    value, fits = chi_square([int(row[brain.rejection_sample(w.t.reward[row], 1, generator)]) for row in four], kept[4])
    yield f"1 kept of 4 candidates, 10,000 times, against that enumeration: chi square {value:.2f} per degree of freedom", fits
    value, fits = chi_square(pool[brain.rejection_sample(w.t.reward[pool], 10_000, generator)], np.exp(w.target))
    yield f"10,000 kept of 200,000 (the true maximum among them, none run out), against the posterior: chi square {value:.2f}", fits
    everything = brain.rejection_sample(w.t.reward[pool[:32]], 32, generator)
    yield "without extra candidates nothing is rejected: 32 of 32 kept", everything.sort().values.tolist() == list(range(32))


@claim("Win-rate")
def ties():
    """Ties count half: then a model has 50 per cent against itself, whatever its rewards."""
    rewards, nearly_0 = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 2.0]), 1e-300
    ours, gold = np.log([[0.25] * 4 + [nearly_0] * 2]), np.log([[nearly_0] + [0.2] * 5])  # the first four, the last five
    found = brain.win_rate(*map(np.ravel, np.meshgrid(rewards[:4], rewards[1:])))[0]
    itself = brain.win_rate(*map(np.ravel, np.meshgrid(rewards, rewards)))[0]
    off, strictly = abs(found - 100 * chance_to_win(ours, gold, rewards[None])[0]), 100 * np.mean(rewards[:, None] > rewards)
    text = f"ties count half: {off:.0e} from enumeration; a model against itself {itself:.0f} per cent, strictly higher only {strictly:.1f}"
    yield text, off < 100 * ROUNDING and abs(itself - 50) < 100 * ROUNDING


# test prompts, then (win-rate, half-width) of each method as printed
PRINTED = {
    "Table 1, AnthropicHH, Train RM": (5103, (54.60, 1.37), (87.37, 0.91), (84.59, 0.99), (95.40, 0.57)),
    "Table 1, AnthropicHH, LLM eval": (5103, (67.02, 1.29), (66.68, 1.29), (67.22, 1.29), (74.36, 1.20)),
    "Table 1, TL;DR, Train RM": (6553, (86.72, 0.82), (90.86, 0.70), (91.24, 0.68), (95.21, 0.52)),
    "Table 1, TL;DR, LLM eval": (6553, (60.26, 1.18), (60.55, 1.18), (60.41, 1.18), (64.74, 1.16)),
    "Table 3, Train RM": (5103, (87.37, 0.91), (89.21, 0.85), (93.30, 0.69), (95.40, 0.57)),
}


@claim("Tables 1, 3")
def intervals():
    """Normal intervals over the prompts of the test sets give every ± as printed (in Table 3's LLM eval all but BRAIn's: 1.17 for 1.20)."""
    for table, (size, *row) in PRINTED.items():
        halves = [round(rate / 50 * size) for rate, _ in row]  # wins and half wins
        found = [brain.win_rate((np.arange(size) < h // 2) + 0.5 * (np.arange(size) < (h + 1) // 2), np.full(size, 0.5)) for h in halves]
        same = [f"{half:.2f}" == f"{printed:.2f}" and abs(rate - at) < 0.01 for (rate, half), (at, printed) in zip(found, row)]
        yield f"{table}, N = {size}: ± {listed([half for _, half in found], '.2f')}, {sum(same)} of {len(row)} as printed", all(same)


# ------------------------------------------------------------------------------------- the program
def main(argv=None):
    """Checks the claims, a line each. Returns the exit code: 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m toy.theorems", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help='only claims whose name contains one of these, as "4.2"')
    only = parser.parse_args(argv).only
    chosen = [(where, check) for where, check in CLAIMS if any(name.lower() in where.lower() for name in only)]
    if not chosen:
        parser.error(f"--only {' '.join(only)}: no such claim; there are {', '.join(dict.fromkeys(where for where, _ in CLAIMS))}")
    transformers.utils.logging.set_verbosity_error()  # it asks for a mask: the end token pads, on the right, where nobody looks
    started, held, threads = time.perf_counter(), [], torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: a second thread only makes the first one wait
    for where, check in chosen:
        for text, holds in check():
            held.append(bool(holds))
            print(f"{'ok  ' if holds else 'FAIL'} {where:15}  {text}", flush=True)
    torch.set_num_threads(threads)
    verdict = f"all {len(held)} hold" if all(held) else f"{held.count(False)} of {len(held)} fail"
    print(f"{verdict}; {time.perf_counter() - started:.0f} s")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
