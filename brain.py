"""BRAIn: Bayesian Reward-conditioned Amortized Inference (Pandey et al., 2024), in one file.

A language model p(y|x), the prior, writes outputs y for a prompt x. A reward model says how good an output
is. Let G = 1 be the event that the output is good. Bayes' rule gives the distribution of good outputs, the
posterior:

    p(y|x, G=1)  =  p(y|x) p(G=1|y,x) / p(G=1|x)                                             (eq. 1)

We can evaluate it up to its normaliser p(G=1|x), but we cannot sample from it. BRAIn trains a policy q_theta,
a second language model that starts as a copy of p, until it samples from the posterior. For a prompt it draws
n outputs from a proposal q' (an earlier state of the policy) and gives each output two weights:

    alpha_hat_i  proportional to  p(y_i|x) p(G=1|y_i,x) / q'(y_i|x)     the posterior's weight   (eq. 6)
    beta_hat_i   proportional to  q_theta(y_i|x) / q'(y_i|x)            the policy's weight      (eq. 11)

Each set of n weights is normalised to sum to 1. The gradient estimate of the paper is

    sum_i (alpha_hat_i - beta_hat_i) grad log q_theta(y_i|x)                                 (eq. 12)

It raises the outputs that the policy underweights relative to the posterior, and lowers those that it
overweights. At q_theta = posterior, alpha_hat equals beta_hat for every draw, so the estimate is exactly zero
there.

Which objective does eq. 12 descend? Self-normalised weights are biased, so it is not an unbiased gradient of
KL(posterior || q_theta); that bias vanishes as n grows. Minus eq. 12 is an unbiased gradient, for every n, of

    D_n(theta)  =  E_{y_1 .. y_n ~ q'}  D_KL(alpha_hat || beta_hat)                          (eq. 13)

the self-normalised KL divergence (Theorem 4.2; the algebra stands at `brain_loss`). D_n is zero
only at the posterior (Theorem 4.3), provided that n >= 2 and that q' can draw every output. With n = 1 both
weights are 1, so D_1 = 0 for every policy. Both divergences are forward: their first argument is the
posterior, so a policy pays for every good output that it misses.

    python brain.py                                                  a toy world with a known posterior
    python brain.py --model CarperAI/openai_summarize_tldr_sft       the paper's summarisation model
    pytest                                                           the mathematical claims, checked

Part I is the method. It can be read on its own. Part II runs it on real models, and nothing in it is needed
to understand Part I.

Map                                     paper                         here
    goodness from a reward              section 5, eq. 15 and 19      log_goodness
    posterior weights alpha_hat         eq. 6, 20, 21                 posterior_weights
    policy weights beta_hat             eq. 11                        policy_weights
    self-normalised KL divergence       eq. 13 and 14                 self_normalized_kl
    the loss whose gradient is eq. 12   eq. 12, Theorem 4.2           brain_loss
    DPO                                 section 6, Theorem 6.1        dpo_loss, METHODS
    the distance to the posterior       eq. 1, Theorem 7.1            elbo, log_evidence
    rows of Tables 1 and 3              section 9                     METHODS, rejection_sample
    the training loop                   Algorithm 1                   train, collect, update
    win-rate                            section 8                     win_rate

Departures from the paper. The code cites them by number.
 1. Line 9 of Algorithm 1 normalises alpha_hat inside the loop over y. We normalise once all n outputs are
    there.
 2. Line 19 sums the loss over the batch. We take the mean, so that the loss does not depend on the batch
    size. Adam is invariant to this factor, up to its epsilon.
 3. AdamW, where the paper says Adam with weight decay.
 4. A tie counts half in a win-rate. The paper counts strictly higher rewards: two equal models then score
    below 50.
 5. The paper does not give e, m, k, the batch size or how evaluation decodes. Those defaults are ours.
 6. An argmax over tied outputs shares the weight equally: the limit of a softmax as its temperature goes to
    0.
 7. The learning rate decays linearly to zero. The paper names no schedule. A constant rate leaves Adam's
    noise in the parameters: the default run ends at KL(posterior || policy) = 0.073 nats with the linear
    decay, and at 0.153 with `--lr-scheduler-type constant`.
 8. RSO draws 4n candidates and keeps n. Without extra candidates it would reject nothing.
 9. `beta` tempers the goodness. The paper has beta = 1.
Eq. 29 of the paper has a misprint: grad log beta_i is grad log q_theta(y_i|x), without the factor beta_i in
front.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from tqdm import tqdm
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# ==========================================================================================
# Part I: the method
# ==========================================================================================
#
# 1. The mathematics
#
# These are pure functions of tensors. The n outputs of one prompt lie on the last axis; any axes may stand
# before it. Everything stays a logarithm, in nats, until the last step: exp(reward) overflows float32 above
# 88.


def log_goodness(reward, model="bradley-terry", beta=1.0):
    """log p(G=1|y,x) up to a constant of the prompt, from rewards of any shape. -> the same shape

    "bradley-terry"  r itself (eq. 19). A reward model trained on preferences only knows differences of log
                     p(G=1), so the constant is unknown. It cancels in alpha_hat.
    "logistic"       log sigmoid(r) (eq. 15): r is the logit of a classifier that tells good outputs from bad
                     ones.
    The choice matters. Under "logistic" two outputs with high rewards count as equally good.

    beta: the strength of the KL term, as in PPO and DPO (departure 9). The result is divided by it, so the
    posterior becomes p(y|x) p(G=1|y,x)^(1/beta): above 1 it stays nearer the prior, below 1 it chases the
    reward. By Theorem 7.1 it is the policy that maximises E[log p(G=1|y,x)] - beta KL(policy || prior).
    """
    if model == "bradley-terry":
        return reward / beta
    if model == "logistic":
        return F.logsigmoid(reward) / beta  # stable; log(sigmoid(r)) underflows below about r = -89
    raise ValueError(f"unknown goodness model {model!r}: give 'bradley-terry' or 'logistic'")


def posterior_weights(log_p, log_q_proposal, log_good):
    """alpha_hat (eq. 6), the posterior's weights of n outputs. Arguments (..., n). -> (..., n), sums to 1

    alpha_i = p(y_i|x) p(G=1|y_i,x) / q'(y_i|x). The normaliser p(G=1|x) is the same for all i and cancels.
    Dividing by q' matters: without it, an output that a renewed proposal favours counts twice, once because
    it was drawn often and once because of its reward.

    For Bradley-Terry this is softmax(r + log p - log q') (eq. 20). Where q' = p it is softmax(r) (eq. 21). An
    argmax in place of this softmax throws away how large the gap between two rewards is, and so how sure we
    may be.
    """
    return torch.softmax(log_p - log_q_proposal + log_good, dim=-1)


def policy_weights(log_q, log_q_proposal):
    """beta_hat (eq. 11), the policy's weights of n outputs. Arguments (..., n). -> (..., n), sums to 1

    beta_i = q_theta(y_i|x) / q'(y_i|x). They all equal 1/n as long as q_theta is still the proposal.
    """
    return torch.softmax(log_q - log_q_proposal, dim=-1)


def self_normalized_kl(alpha_hat, beta_hat):
    """D_KL(alpha_hat || beta_hat) (eq. 14). Arguments (..., n). -> (...), nats. Its mean over draws estimates
    D_n.

    0 log 0 is 0: an output without posterior weight costs nothing, however unlikely the policy finds it. The
    result is infinite where beta_hat is 0 and alpha_hat is not. Training takes the same number from
    `brain_loss`, which works on log beta_hat, because beta_hat itself underflows.
    """
    log_beta = torch.where(alpha_hat > 0, beta_hat, 1.0).log()  # masked before the logarithm: 0 * -inf is nan
    return F.kl_div(log_beta, alpha_hat, reduction="none").sum(-1)


def brain_loss(log_q, log_q_proposal, alpha_hat, baseline=True):
    """The loss: D_KL(alpha_hat || beta_hat) (eq. 14), mean over the leading axes. -> scalar, nats

    log_q           (..., n) log q_theta(y_i|x), the only argument that receives a gradient
    log_q_proposal  (..., n) log q'(y_i|x), cached when y_i was drawn
    alpha_hat       (..., n) posterior weights, cached at the same time

    Its gradient is minus eq. 12. alpha_hat does not depend on theta, so only -sum_i alpha_hat_i log
    beta_hat_i has a gradient. Since log beta_hat_i = log q_i - log q'_i - logsumexp_j(log q_j - log q'_j),
    that is

        -sum_i alpha_hat_i grad log q_i  +  sum_j beta_hat_j grad log q_j

    The gradient of a logsumexp is the softmax-weighted mean of the gradients of its terms, here with weights
    beta_hat; it counts once, because the alpha_hat_i sum to 1. The paper introduces it as a baseline: it
    estimates E_q[grad log q] = 0 (eq. 8 to 10) from the same draws. This is Theorem 4.2. The outputs are
    drawn from q', which does not depend on theta, so the expectation over draws changes nothing in it.

    With n = 2, q' = p and alpha_hat = (1, 0) the loss is -log beta_hat_1: the DPO loss (Theorem 6.1).

    baseline=False gives -sum_i alpha_hat_i log q_i instead, whose gradient is minus eq. 7 (section 9.3). It
    pulls every output up, bad ones too. At the posterior it is noise, where eq. 12 is zero for every draw.
    """
    alpha_hat, log_q_proposal = alpha_hat.detach(), log_q_proposal.detach()
    if not baseline:
        return -(alpha_hat * log_q.where(alpha_hat > 0, 0.0)).sum(-1).mean()
    # log_softmax, not policy_weights(...).log(): a weight below e^-104 is 0 in float32.
    log_beta = torch.log_softmax(log_q - log_q_proposal, dim=-1).where(alpha_hat > 0, 0.0)
    return F.kl_div(log_beta, alpha_hat, reduction="none").sum(-1).mean()


def dpo_loss(log_q_chosen, log_q_rejected, log_p_chosen, log_p_rejected, beta=1.0):
    """The DPO loss (eq. 7 of Rafailov et al., 2023), all arguments (...). -> scalar, mean

    It stands here for comparison; training never calls it. Its value is that of `brain_loss` for n = 2, q' =
    p and alpha_hat = (1, 0), with beta times each log-probability (Theorem 6.1 has beta = 1; TRL's default is
    0.1).
    """
    return -F.logsigmoid(beta * ((log_q_chosen - log_p_chosen) - (log_q_rejected - log_p_rejected))).mean()


def effective_sample_size(weights):
    """1 / sum_i w_i^2 of weights (..., n) that sum to 1. -> (...): n if all are equal, 1 if one weight is
    1."""
    return 1 / weights.square().sum(-1)


# How far is a policy q from the posterior? On a real model nobody can enumerate the outputs, but with
# w(y) = p(y|x) p(G=1|y,x) / q(y|x) two averages over draws y ~ q tell a part of it:
#
#     E_q[log w]  =  log p(G=1|x) - KL(q || posterior)            the evidence lower bound, `elbo`
#     E_q[w]      =  p(G=1|x), so E[log mean_i w_i]  <=  log p(G=1|x), rising to it with n: `log_evidence`
#
# Hence log_evidence - elbo is, in expectation, at most the distance KL(q || posterior) that is left.
# Bradley-Terry leaves a constant of log p(G=1|x) unknown. It is the same in both, and cancels in their
# difference.


def elbo(log_p, log_q, log_good):
    """The evidence lower bound from n draws of q. Arguments (..., n). -> (...), nats

    It is mean log goodness minus the estimate of KL(q || p): the quantity that Theorem 7.1 maximises.
    """
    return (log_p + log_good - log_q).mean(-1)


def log_evidence(log_p, log_q, log_good):
    """A lower bound of log p(G=1|x), in expectation, from n draws of q. Arguments (..., n). -> (...), nats"""
    return (log_p + log_good - log_q).logsumexp(-1) - math.log(log_p.shape[-1])


def win_rate(rewards, gold_rewards):
    """(per cent of prompts whose output has the higher reward, half-width of the 95% interval).

    Takes two sequences of N rewards. Ties count half (departure 4). The interval is the normal one, as in
    Table 1. ValueError if N = 0 or the lengths differ.
    """
    ours, gold = np.asarray(rewards, dtype=float), np.asarray(gold_rewards, dtype=float)
    if ours.shape != gold.shape or ours.size == 0:
        raise ValueError(f"{ours.size} rewards and {gold.size} gold rewards: give one of each per prompt")
    won = float(np.where(ours == gold, 0.5, ours > gold).mean())
    return 100 * won, 196 * math.sqrt(won * (1 - won) / ours.size)


# ------------------------------------------------------------------------------------------
# 2. The methods of Tables 1 and 3
#
# Each is a row of settings for the same code: BRAIn, and what is left when one of its parts is taken away.


@dataclass(frozen=True)
class Method:
    """What distinguishes BRAIn from its baselines.

    source      where the n outputs of a prompt come from:
                "policy"  the proposal q' is the policy at the start of the round (line 21 of Algorithm 1)
                "prior"   q' = p in every round (section 9.5)
                "rso"     4n draws from p, of which `rejection_sample` keeps n
                "data"    the data's own pair (chosen, rejected), so n = 2
    group_size  how many outputs are normalised together. None: all n. With 2, 32 outputs are 16 pairs.
    argmax      give all weight to the best output of a group, instead of the softmax of eq. 6
    baseline    subtract the baseline of eq. 10. Without it the gradient is eq. 7 (section 9.3).
    """

    source: str = "policy"
    group_size: int | None = None
    argmax: bool = False
    baseline: bool = True

    def grouped(self, x):
        """(n,) -> (groups, group size)"""
        return x.reshape(-1, self.group_size or x.shape[-1])

    def alpha_hat(self, log_p, log_q_proposal, log_good):
        """Posterior weights, normalised within each group. Arguments (n,). -> (n,)"""
        if self.source == "data":  # people have chosen: the first output of each pair
            return torch.tensor([1.0, 0.0]).repeat(len(log_p) // 2).to(log_p)
        log_p, log_q_proposal, log_good = map(self.grouped, (log_p, log_q_proposal, log_good))
        if not self.argmax:
            return posterior_weights(log_p, log_q_proposal, log_good).reshape(-1)
        score = log_p - log_q_proposal + log_good
        best = (score == score.amax(-1, keepdim=True)).to(score)
        return (best / best.sum(-1, keepdim=True)).reshape(-1)  # departure 6


METHODS = {
    "brain": Method(),
    "brain-no-baseline": Method(baseline=False),
    "dpo-sft+iw+n": Method("prior"),  # all n outputs, and importance weights: BRAIn with a fixed proposal
    "dpo-sft+iw": Method("prior", group_size=2),  # pairs, with the softmax as importance weight
    "dpo-sft": Method("prior", group_size=2, argmax=True),
    "rso": Method("rso", group_size=2, argmax=True),
    "dpo": Method("data", group_size=2, argmax=True),
}
RSO_CANDIDATES = 4  # draws per output that is kept (departure 8)


def rejection_sample(log_good, n, generator=None):
    """n of N candidates drawn from the prior, by statistical rejection sampling (Liu et al., 2023). -> (n,)
    indices

    log_good (N,), N >= n. A candidate is accepted with probability exp(g - g_max). Accepted ones leave the
    pool and g_max is taken anew, until n are kept. It is an approximation: exact sampling from the posterior
    would need the maximum over all outputs, and candidates that never run out.
    """
    pool, kept = torch.arange(len(log_good)), []
    while len(kept) < n:
        chance = (log_good[pool] - log_good[pool].max()).double().exp()  # 1 for the best of the pool
        accepted = torch.rand(len(pool), generator=generator, dtype=torch.float64) < chance
        kept += pool[accepted].tolist()
        pool = pool[~accepted]
    return torch.tensor(kept[:n])


# ------------------------------------------------------------------------------------------
# 3. Algorithm 1
#
# The language model and its reward appear through three verbs:
#     policy.sample(prompt_ids, n, max_new_tokens, prior, generator)   n outputs, drawn from q_theta or from p
#     policy.log_prob(prompt_ids, outputs, prior)                      their log-probabilities, (n,)
#     reward(prompt, texts, columns)                                   their rewards, (n,)
# The policy also says the text of an output, whether it ended by itself, and what its parameters are.
# `run` does what surrounds an algorithm: it reads back what a killed run had done, divides work among
# processes, logs, evaluates and saves. The smallest run: `collect` is [draw(row) for row in rows], `steps(t)`
# is the numbers from (t - 1) k + 1 to t k, `share_of` returns its argument, `combine` averages, the rest does
# nothing.


@dataclass
class Samples:
    """One prompt of D_t with its n outputs and what Algorithm 1 caches about them (lines 8 and 9)."""

    iteration: int  # the round t that drew them
    row: int  # which row of the data the prompt is
    prompt_ids: torch.Tensor  # (P,)
    outputs: list  # n LongTensors (T_i,)
    texts: list  # n strings
    reward: torch.Tensor  # (n,)
    log_p: torch.Tensor  # (n,)
    log_q_proposal: torch.Tensor  # (n,) under the proposal that drew them; for rso and data, log p
    alpha_hat: torch.Tensor  # (n,)


# Each purpose has its own stream of random numbers. Every random number of a run follows from (seed, purpose,
# indices), so there is no state to save, and results do not depend on processes or on where a run was
# resumed.
PROMPTS, OUTPUTS, BATCHES, SPLITS, EVALUATION, HELD_OUT = range(6)


def seeded(*numbers):
    """A CPU generator whose stream depends on these numbers only."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def random_subset(size, count, *numbers):
    """min(count, size) distinct indices below size, in random order."""
    return torch.randperm(size, generator=seeded(*numbers))[:count].tolist()


def learning_rates(settings):
    """The learning rate of every update of the run, a list (departure 7). It depends on the settings only."""
    total = settings.iterations * settings.updates_per_iteration
    if total == 0:
        return []
    optimizer = torch.optim.SGD([torch.zeros(1)], settings.learning_rate)
    name, warmup = settings.lr_scheduler_type, settings.warmup_steps
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()  # it has no gradient; PyTorch warns if a scheduler steps before its optimiser
        scheduler.step()
    return rates


def train(policy, reward, data, settings, run):
    """Algorithm 1, with the paper's line numbers. Trains `policy` in place and returns it.

    policy    Policy: p, q' and q_theta. They are equal at first (line 1).
    reward    reward(prompt, texts, columns) -> (n,): r(x, y)
    data      Prompts: D
    settings  Settings: e is iterations, m prompts_per_iteration, n samples_per_prompt, k
              updates_per_iteration
    run       Run: see above
    """
    optimizer = torch.optim.AdamW(  # departure 3
        policy.parameters().values(),
        lr=settings.learning_rate,  # every update sets its own, see `learning_rates`
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    rates, seed = learning_rates(settings), settings.seed
    buffer = []  # line 2: D_0
    run.start(policy, optimizer)
    for t in range(1, settings.iterations + 1):  # line 3
        rows = random_subset(len(data), settings.prompts_per_iteration, seed, PROMPTS, t)  # line 4: S_t
        source = METHODS[settings.method].source
        if source == "policy" and t == 1:
            source = "prior"  # line 1: q' starts as p

        def draw(row):
            return collect(policy, reward, data[row], settings, source, seeded(seed, OUTPUTS, t, row), t)

        buffer += run.collect(t, rows, draw)  # lines 5 to 12: D_t keeps the samples of all rounds
        for step in run.steps(t):  # line 13
            chosen = random_subset(len(buffer), settings.batch_size, seed, BATCHES, step)  # line 14
            optimizer.param_groups[0]["lr"] = rates[step - 1]
            metrics = update(policy, optimizer, [buffer[i] for i in chosen], settings, run)  # lines 15 to 19
            run.after_update(policy, optimizer, step, metrics)
        # Line 21, q' <- q_theta, needs no code: the next round samples from q_theta as it is by then.
    return policy  # line 23


@torch.no_grad()
def collect(policy, reward, example, settings, source, generator, iteration=0):
    """Lines 6 to 10 for one prompt: draw n outputs, cache their log q', log p, reward and alpha_hat. ->
    Samples

    Old samples stay valid in later rounds. Each keeps the log q' of the proposal that drew it, and p is
    fixed, so alpha_hat does not change. The objective is then D_n averaged over the proposals, zero at the
    same policy.
    """
    if source == "data":
        outputs = example.pair
    else:
        draws = settings.samples_per_prompt * (RSO_CANDIDATES if source == "rso" else 1)
        from_prior = source != "policy"
        outputs = policy.sample(example.ids, draws, settings.max_new_tokens, from_prior, generator)  # line 6
    texts = [policy.text(example.ids, output) for output in outputs]
    rewards = reward(example.prompt, texts, example.columns)  # line 8
    if source == "rso":
        log_good = log_goodness(rewards, settings.goodness, settings.beta)
        kept = rejection_sample(log_good, settings.samples_per_prompt, generator)
        outputs, texts, rewards = [outputs[i] for i in kept], [texts[i] for i in kept], rewards[kept]
    # Line 8. The function that scores log q_theta in `update` also scores log q', so beta_hat is 1/n at
    # first. The sampler's own sums would differ by rounding.
    log_p = policy.log_prob(example.ids, outputs, prior=True).cpu()
    log_q_proposal = policy.log_prob(example.ids, outputs).cpu() if source == "policy" else log_p
    rewards = rewards.to(log_p)
    log_good = log_goodness(rewards, settings.goodness, settings.beta)
    alpha_hat = METHODS[settings.method].alpha_hat(log_p, log_q_proposal, log_good)  # line 9, departure 1
    numbers = (rewards, log_p, log_q_proposal, alpha_hat)
    return Samples(iteration, example.row, example.ids, outputs, texts, *numbers)


def update(policy, optimizer, batch, settings, run):
    """Lines 15 to 19: one step of theta on a batch of prompts. -> metrics, means over the batch"""
    method = METHODS[settings.method]
    # An argmax does not see the size of a reward, so beta would do nothing. As in DPO it scales log q - log
    # q'.
    scale = settings.beta if method.argmax else 1.0
    optimizer.zero_grad()
    lines = []
    for samples in run.share_of(batch):  # line 15: all of the batch, unless several processes divide it
        log_q = policy.log_prob(samples.prompt_ids, samples.outputs).cpu()  # (n,), with gradient
        log_q_proposal = method.grouped(scale * samples.log_q_proposal)  # (groups, group size)
        alpha_hat = method.grouped(samples.alpha_hat)
        loss = brain_loss(method.grouped(scale * log_q), log_q_proposal, alpha_hat, method.baseline)  # 16, 17
        (loss / len(batch)).backward()  # departure 2
        ended = np.mean([policy.ended(output) for output in samples.outputs])
        line = {"loss": loss.item(), "ended": float(ended)}
        lines.append(line | diagnostics(samples, log_q.detach(), method))
    metrics = run.combine(policy, lines)  # also sums the gradients of all processes
    optimizer.step()  # line 19
    return metrics


def diagnostics(samples, log_q, method):
    """What to watch in an update, from weights as they are: nothing is clipped anywhere. -> {name: float}

    ess_alpha    effective sample size of alpha_hat, of n (of 2 for pairs). Near 1, one output has all the
                 weight: the rewards are too far apart for this n. Raise n, or beta.
    ess_beta     that of beta_hat. It starts at n and falls as q_theta leaves the proposal that drew the
                 samples. Near 1 the policy has outrun its samples: renew the proposal sooner, or lower the
                 learning rate.
    max_weight   the largest alpha_hat or beta_hat
    reward       mean reward of the stored outputs. It says nothing about the present policy.
    kl_to_prior  sum_i beta_hat_i (log q_theta - log p): a self-normalised estimate of KL(q_theta || p), in
                 nats. It needs draws of the recorded proposal, so it is missing for "rso" and "data".
    """
    alpha_hat = method.grouped(samples.alpha_hat)
    beta_hat = policy_weights(method.grouped(log_q), method.grouped(samples.log_q_proposal))
    metrics = {
        "reward": samples.reward.mean(),
        "ess_alpha": effective_sample_size(alpha_hat).mean(),
        "ess_beta": effective_sample_size(beta_hat).mean(),
        "max_weight": torch.maximum(alpha_hat, beta_hat).max(),
    }
    if method.source in ("policy", "prior"):
        metrics["kl_to_prior"] = (beta_hat * method.grouped(log_q - samples.log_p)).sum(-1).mean()
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def held_out_divergence(policy, samples, settings):
    """D_n (eq. 13) from the n outputs of a prompt that is not trained on. -> float, nats

    Its mean over held-out prompts, with outputs that were drawn once from p, estimates the objective itself.
    It is comparable over a run and, in expectation, zero only at the posterior. If it rises while the
    training loss falls, the policy is memorising D_t.
    """
    log_good = log_goodness(samples.reward, settings.goodness, settings.beta)
    alpha_hat = posterior_weights(samples.log_p, samples.log_q_proposal, log_good)
    log_q = policy.log_prob(samples.prompt_ids, samples.outputs).cpu()
    return brain_loss(log_q, samples.log_q_proposal, alpha_hat).item()


def mean_evidence(drawn, settings):
    """elbo and log_evidence of the proposal that drew these Samples: means and standard errors."""
    bounds = {"elbo": elbo, "log_evidence": log_evidence}
    metrics = {}
    for name, bound in bounds.items():
        values = []
        for samples in drawn:
            log_good = log_goodness(samples.reward, settings.goodness, settings.beta)
            values.append(bound(samples.log_p, samples.log_q_proposal, log_good).item())
        metrics[name] = float(np.mean(values))
        if len(values) > 1:
            metrics[f"{name}_standard_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return metrics


# ==========================================================================================
# Part II: running it
# ==========================================================================================
#
# 4. The policy: one causal LM as the prior p, the proposal q' and the policy q_theta


class UserError(Exception):
    """Something that the user can fix. `main` prints it in one line and exits with code 2."""


def refuse_if(wrong, message):
    if wrong:
        raise UserError(message)


class Policy:
    """A causal LM and its tokenizer as p, q' and q_theta. All three give probability to the same tokens.

    model                a transformers causal LM, or a PeftModel whose adapter belongs to the prior
    tokenizer            says which ids exist. A model may have logits for more ids; those are never sampled.
    lora_rank            0 trains all parameters of `model`, and p is a frozen copy of it. Otherwise q_theta
                         is a LoRA adapter and p is the same model with the adapter off. If `model` comes with
                         an adapter, p keeps it, and q_theta is a second adapter that starts as a copy of it.
    lora_alpha           LoRA's scale is lora_alpha / lora_rank
    outputs_per_forward  how many outputs go through the model at once. None: all that are asked for.

    Dropout stays off. With dropout, beta_hat would be noise where it should be 1/n. Of a checkpoint's
    generation config only the end-of-sequence ids are used: with its top-k or temperature, log q' would not
    be the log-probability of what was sampled, and q' could not draw every output. UserError if the model
    does not pass `_check`.
    """

    def __init__(self, model, tokenizer, lora_rank=0, lora_alpha=32, outputs_per_forward=None):
        self.tokenizer, self.outputs_per_forward = tokenizer, outputs_per_forward
        has_adapter = hasattr(model, "peft_config")
        if has_adapter and not lora_rank:
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            adapted = any("lora_" in name for layer in ends for name, _ in layer.named_parameters())
            tied = adapted and ends[0].weight is ends[1].weight
            refuse_if(tied, "--model: its adapter changes tied embeddings; give a --lora-rank above 0")
            model = model.merge_and_unload()
            has_adapter = False
        self.model = model.eval()
        base = model.get_base_model() if has_adapter else model
        self.device = base.device
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions, self._takes_keep = "position_ids" in accepted, "logits_to_keep" in accepted
        self._cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"  # mamba
        self._known = torch.tensor(sorted(tokenizer.get_vocab().values()))
        self._unknown = None  # ids without a token; found at the first forward, from the width of the logits
        self.prior_model = self.prior_adapter = None
        self.adapter = "default"
        self.shares_prompt = self.keeps_cache = self.pads_prompts = True  # until `_check` finds otherwise
        rows = base.get_input_embeddings().weight.shape[0]
        many = f"the tokenizer has ids up to {self._known.max()}, the model embeds {rows}"
        refuse_if(self._known.max() >= rows, f"--model: {many}; give the tokenizer that it was trained with")
        before = self._probe(self.model)
        if not lora_rank:
            self.model.requires_grad_(True)
            self.prior_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        elif has_adapter:
            self._copy_adapter()
        else:
            self.model = add_adapter(model, lora_rank, lora_alpha).eval()
        self.ends = []  # during the check, so that its outputs have their full length
        self._check(before)
        # A chat model may end with several tokens: the tokenizer's, or those of the generation config.
        ends = np.atleast_1d(getattr(base.generation_config, "eos_token_id", None)).tolist()
        self.ends = sorted({*ends, tokenizer.eos_token_id} - {None})

    def _copy_adapter(self):
        """q_theta becomes a second adapter, a copy of the prior's."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        self.prior_adapter, self.adapter = self.model.active_adapter, "policy"
        config = copy.deepcopy(self.model.peft_config[self.prior_adapter])
        config.inference_mode, config.lora_dropout = False, 0.0
        self.model.add_adapter("policy", config)
        options = {"adapter_name": self.prior_adapter, "save_embedding_layers": False}
        parameters = get_peft_model_state_dict(self.model, **options)
        set_peft_model_state_dict(self.model, {name: p.clone() for name, p in parameters.items()}, "policy")
        self.model.requires_grad_(False).eval()
        self.model.set_adapter("policy")

    def parameters(self):
        """The parameters that are trained, {name: parameter}."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def _using(self, prior):
        """The model as q_theta, or as p."""
        if not prior:
            yield self.model
        elif self.prior_model is not None:
            yield self.prior_model
        elif self.prior_adapter is not None:
            self.model.set_adapter(self.prior_adapter, inference_mode=True)  # else it becomes trainable
            try:
                yield self.model
            finally:
                self.model.set_adapter(self.adapter)
        else:
            with self.model.disable_adapter():
                yield self.model

    # ---- one forward

    def _forward(self, model, ids, keep, mask=None, cache=None, use_cache=False):
        """One forward of ids (B, T). -> (logits (B, keep, V) of the last `keep` positions, cache or None)

        mask (B, past + T) marks real tokens where rows are padded on the left; positions then count from each
        row's first real token. The other logits are not computed: over a prompt of 500 tokens they are the
        largest tensor.
        """
        arguments = {"logits_to_keep": keep} if self._takes_keep else {}
        if mask is not None:
            arguments["attention_mask"] = mask
            if self._takes_positions:
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if cache is not None:
            arguments[self._cache_name] = cache
        output = model(input_ids=ids, use_cache=use_cache, **arguments)
        return output.logits[:, -keep:], getattr(output, self._cache_name, None)

    def _scores(self, logits):
        """Logits (..., V) in float32 or better, -inf for ids without a token."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._unknown is None:
            ids = torch.arange(logits.shape[-1])
            self._unknown = ids[~torch.isin(ids, self._known)].to(logits.device)
        return logits.index_fill(-1, self._unknown, -torch.inf) if len(self._unknown) else logits

    def _token_log_probs(self, logits, ids):
        """log-probability of ids (...) under logits (..., V). -> (...)"""
        scores = self._scores(logits)
        return scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)

    # ---- scoring

    def log_prob(self, prompt_ids, outputs, prior=False):
        """log q_theta(y_i|x), or log p(y_i|x) with prior=True. -> (n,) nats, with gradient (none for the
        prior)

        prompt_ids (P,); outputs: n LongTensors (T_i,) as `sample` returns them. An end token counts like any
        other token. A truncated output has no end token, so its log-probability is that of its tokens. With
        `outputs_per_forward` the outputs go in chunks, and the backward computes each chunk again, so that
        only one chunk's activations exist at a time. The activations of the prompt are not bounded by it.
        """
        prompt = prompt_ids.to(self.device)[None]  # (1, P)
        size = self.outputs_per_forward or len(outputs)
        chunks = [outputs[i : i + size] for i in range(0, len(outputs), size)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not prior), self._using(prior) as model:
            # Cache the first P-1 prompt tokens. The last one is fed with each output, because its logits
            # predict the output's first token.
            cache = None
            if self.shares_prompt and prompt.shape[1] > 1:
                cache = self._forward(model, prompt[:, :-1], 1, use_cache=True)[1]
            score = functools.partial(self._score, model, prompt, cache)
            if len(chunks) > 1 and torch.is_grad_enabled():
                again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
                return torch.cat([again(score, chunk, preserve_rng_state=False) for chunk in chunks])
            return torch.cat([score(chunk) for chunk in chunks])

    def _score(self, model, prompt, cache, outputs):
        """Log-probabilities (c,) of c outputs of one prompt (1, P), on top of the prompt's cache if there is
        one."""
        ids, real = pad_right(outputs, self.device)  # (c, T); padding behind needs no mask
        before = prompt if cache is None else prompt[:, -1:]
        inputs = torch.cat([before.expand(len(ids), -1), ids[:, :-1]], 1)  # its last T predict the output
        cache = None if cache is None else share(cache, len(ids))
        logits, _ = self._forward(model, inputs, ids.shape[1], None, cache, cache is not None)  # (c, T, V)
        return torch.where(real, self._token_log_probs(logits, ids), 0.0).sum(-1)

    # ---- sampling

    def sample(self, prompt_ids, n, max_new_tokens, prior=False, generator=None, greedy=False):
        """n outputs of one prompt (P,) from the plain softmax of q_theta, or of p. -> list of n LongTensors
        (T_i,)

        Each output ends with its end-of-sequence token, or is truncated after max_new_tokens. `generator` is
        a CPU torch.Generator. The same generator gives the same outputs in whatever batches, up to rounding.
        """
        return self.sample_batch([prompt_ids], n, max_new_tokens, prior, [generator], greedy)[0][0]

    @torch.no_grad()
    def sample_batch(self, prompts, n, max_new_tokens, prior=False, generators=None, greedy=False):
        """Like `sample`, for B prompts at once. -> (list of B lists of n outputs, their log-probabilities (B,
        n))

        The log-probabilities are the sampler's own sums. Training takes those of `log_prob`, which equal them
        up to rounding, so that beta_hat is 1/n at step 0 and not only nearly so.
        """
        ids, mask = pad_left(prompts, self.device)  # (B, P)
        # One uniform number per token, drawn in advance: a row's draws do not depend on the rows beside it.
        generators = generators or [None] * len(prompts)
        uniform = [torch.rand(n, max_new_tokens, dtype=torch.float64, generator=g) for g in generators]
        uniform = torch.cat(uniform).to(self.device)  # (B n, max_new_tokens)
        outputs, log_probs = [], []
        with self._using(prior) as model:
            first, start = self._forward(model, ids, 1, mask, use_cache=self.keeps_cache)
            size = self.outputs_per_forward or len(uniform)
            for rows in torch.arange(len(uniform), device=self.device).split(size):
                of = rows // n  # the prompt of each row
                cache = copy_rows(start, of, max_new_tokens) if self.keeps_cache else None
                row_mask = None if mask is None else mask[of]
                some = self._continue(model, ids[of], first[of, -1], row_mask, cache, uniform[rows], greedy)
                outputs += some[0]
                log_probs.append(some[1])
        return [outputs[i : i + n] for i in range(0, len(outputs), n)], torch.cat(log_probs).reshape(-1, n)

    def _continue(self, model, prompts, logits, mask, cache, uniform, greedy):
        """Draw R outputs token by token, from next-token logits (R, V). -> (R outputs, log-probabilities
        (R,))"""
        diverged = "the policy's logits are nan, so it has diverged; lower --learning-rate, or use float32"
        ends = torch.tensor(self.ends, device=self.device)
        rows = torch.arange(len(prompts), device=self.device)  # the outputs that are still being written
        drawn = torch.full(uniform.shape, -1, device=self.device)  # (R, T)
        log_prob = torch.zeros(len(rows), dtype=self._scores(logits).dtype, device=self.device)
        for t in range(drawn.shape[1]):
            refuse_if(logits.isnan().any(), diverged)
            scores = self._scores(logits)
            if greedy:
                token = scores.argmax(-1)
            else:
                # Invert the cumulative distribution. In float64, because a float32 sum of 50,000 terms rounds
                # the probability of rare tokens away.
                cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
                target = uniform[rows, t, None] * cumulative[:, -1:]
                token = torch.searchsorted(cumulative, target, right=True)[:, 0]
            drawn[rows, t] = token
            log_prob[rows] += self._token_log_probs(logits, token)
            going = (~torch.isin(token, ends)).nonzero()[:, 0]
            if len(going) == 0 or t + 1 == drawn.shape[1]:
                break
            if len(going) < len(rows):  # rows that have ended leave the batch
                rows, token = rows[going], token[going]
                mask = None if mask is None else mask[going]
                if cache is not None:
                    cache.reorder_cache(going)
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
            # Without a cache, the whole sequence is computed again for each token.
            new = torch.cat([prompts[rows], drawn[rows, : t + 1]], 1) if cache is None else token[:, None]
            logits = self._forward(model, new, 1, mask, cache, cache is not None)[0][:, -1]
        return [row[row >= 0].cpu() for row in drawn], log_prob

    # ---- outputs as text

    def ended(self, output):
        """Whether an output ended by itself and was not truncated."""
        return int(output[-1]) in self.ends

    def text(self, prompt_ids, output):
        """The text that an output adds to its prompt, without the end token.

        It is decoded together with the prompt, and the prompt is taken off: SentencePiece drops the first
        space of what is decoded on its own.
        """
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        decode = functools.partial(self.tokenizer.decode, **options)
        prompt, output = prompt_ids.tolist(), output[: len(output) - self.ended(output)].tolist()
        before, whole = decode(prompt), decode(prompt + output)
        return whole[len(before) :] if whole.startswith(before) else decode(output)

    # ---- the startup check

    def _probe_ids(self):
        """A prompt (5,), a longer one (8,) and two outputs (4,) and (3,), of ordinary tokens."""
        known = self._known.tolist()
        ordinary = sorted(set(known) - set(self.tokenizer.added_tokens_decoder)) or known
        ids = torch.tensor([ordinary[i * 7919 % len(ordinary)] for i in range(20)])
        return ids[:5], ids[5:13], [ids[13:17], ids[17:]]

    @torch.no_grad()
    def _probe(self, model):
        """Log-probabilities (2,) of two outputs, each by one plain forward: the reference of `_check`."""
        prompt, _, outputs = self._probe_ids()
        prompt = prompt.to(self.device)[None]
        return torch.cat([self._score(model, prompt, None, [output]) for output in outputs])

    @torch.no_grad()
    def _check(self, before):
        """A few short forwards find the models that would otherwise be silently wrong.

        before: `_probe` of the model as it came. If the sampler's cache or padded batches are wrong, the
        slower way is taken, and said. UserError if nothing mends it.
        """
        short, long, outputs = self._probe_ids()
        name = type(self.model.get_base_model() if self.prior_model is None else self.model).__name__
        finite = bool(before.isfinite().all())
        refuse_if(not finite, "--model: its logits are nan or inf; try --dtype float32")
        for prior in (False, True):
            with self._using(prior) as model:
                same = self._agree(self._probe(model), before, 1e-3)
            moved = f"its adapter changes {name} beyond what a second adapter can copy (PiSSA and OLoRA do)"
            refuse_if(not same, f"--model: {moved}; merge it into its base first")
        with self._using(False) as model:
            ids = torch.cat([short, *outputs]).to(self.device)[None]
            whole = self._forward(model, ids, ids.shape[1])[0][0, : len(short)]
            alone = self._forward(model, ids[:, : len(short)], len(short))[0][0]
            self.shares_prompt = shareable(self._forward(model, ids, 1, use_cache=True)[1])
        refuse_if(not self._agree(whole, alone), f"--model: {name} is not causal; give a causal LM")
        if self.shares_prompt:
            self.shares_prompt = self._agree(self.log_prob(short, outputs), before)
        if not self._samples_agree([short]):
            self.keeps_cache = False
            wrong = not self._samples_agree([short])
            refuse_if(wrong, f"--model: {name} samples with other probabilities than it scores")
            print(f"brain: the cache of {name} cannot be copied; sampling is slow", file=sys.stderr)
        if not self._samples_agree([short, long]):
            self.pads_prompts = False
            slow = "evaluation batches prompts of equal length only"
            print(f"brain: {name} reads padded prompts wrongly; {slow}", file=sys.stderr)

    def _agree(self, found, expected, tolerance=None):
        # Cached and plain forwards differ by a few units in the last place of each token's logits.
        tolerance = tolerance or max(3e-4, 128 * torch.finfo(self.model.dtype).eps)
        return torch.allclose(found.to(expected), expected, atol=tolerance, rtol=0)

    def _samples_agree(self, prompts):
        """Whether the sampler's log-probabilities are those of `log_prob`."""
        generators = [seeded(i) for i in range(len(prompts))]
        try:
            drawn, log_probs = self.sample_batch(prompts, 2, 4, False, generators)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # caches of other kinds fail in ways of their own
            return False
        expected = [self.log_prob(prompt, outputs) for prompt, outputs in zip(prompts, drawn)]
        return self._agree(log_probs, torch.stack(expected))


def add_adapter(model, rank, alpha):
    """A fresh LoRA adapter on the layers that peft knows for this architecture, else on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = None
    if model.config.model_type not in KNOWN:
        # Only true linear layers. Routers of mixtures of experts subclass Linear and return tuples, and a
        # mamba layer's out_proj is read by its kernel without the adapter. The output layer stays as it is.
        layers = dict(model.named_modules())
        linear = {name for name, layer in layers.items() if type(layer).__name__ in ("Linear", "Linear4bit")}
        head = {name for name, layer in layers.items() if layer is model.get_output_embeddings()}
        mamba = {name for name in linear if re.search(r"(mamba|mixer).*\.out_proj$", name)}
        targets = sorted(linear - head - mamba)
    # LoRA's B starts at zero, so q_theta = p at step 0. Dropout in the adapter would break that in the first
    # update.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def pad_right(sequences, device):
    """n LongTensors (T_i,) -> ids (n, T), and which of them are real, (n, T) bool."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).to(device)
    return ids.clamp(min=0), ids >= 0


def pad_left(sequences, device):
    """B LongTensors (P_i,) -> ids (B, P) and the attention mask (B, P), None if all have the same length."""
    ids, real = pad_right([sequence.flip(0) for sequence in sequences], device)
    return ids.flip(1), None if real.all() else real.flip(1).long()


# ---- Sharing the prompt. This only saves time and memory: scoring n outputs of one prompt computes it once
# instead of n times (14 times faster at 512 + 48 tokens and n = 32), and sampling writes its cache in place
# (1.8 times faster). Everything above is right if `shareable` is always False and `copy_rows` has no loop.


def shareable(cache):
    """Whether `share` can hand a prompt's cache to many outputs: keys and values, and no recurrent state."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    return type(cache) is DynamicCache and kinds <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}


def share(cache, n):
    """A new cache for n outputs, which sees the one row of `cache` n times without copying it.

    A forward grows the new cache and leaves `cache` as it was. Gradients of all outputs meet in the prompt's
    keys and values, so the backward goes through the prompt once.
    """
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys.expand(n, -1, -1, -1), layer.values.expand(n, -1, -1, -1)
    return cache


def copy_rows(cache, rows, room):
    """A copy of a prompt's cache, of any kind, with the listed rows of it, and room for as many more
    tokens."""
    cache = copy.deepcopy(cache)
    cache.reorder_cache(rows)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = PreallocatedLayer(layer, room)
    return cache


class PreallocatedLayer(DynamicLayer):
    """Keys and values with room for more tokens. A DynamicLayer copies all that it holds for every new
    token."""

    def __init__(self, layer, room):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[2]
        self.buffers = [F.pad(x, (0, 0, 0, room)) for x in (layer.keys, layer.values)]  # (R, H, T + room, D)
        self.keys, self.values = layer.keys, layer.values

    def update(self, keys, values, *arguments, **settings):
        start, self.length = self.length, self.length + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, rows):
        self.buffers = [buffer[rows] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


# ------------------------------------------------------------------------------------------
# 5. Rewards


def first_line(error):
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


def find(name, *files):
    """Path of the first of these files in a directory or hub repository, or None. Downloads no other file."""
    for file in files:
        with contextlib.suppress(OSError):
            if path := transformers.utils.cached_file(name, file):
                return path


def load(kind, name, flag_name, **arguments):
    """kind.from_pretrained(name). The library's own first line says why it failed: no such name, gated, no
    network."""
    missing = name.startswith(("/", ".")) and not Path(name).exists()
    refuse_if(missing, f"{flag_name} {name}: no such file or directory; correct the path, or give a hub name")
    source = None if "state_dict" in arguments else name
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **arguments)
    except pickle.UnpicklingError:  # nothing of it was run
        raise UserError(f"{flag_name} {name}: holds code; give a file of tensors") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag_name} {name}: {first_line(error)}") from None


def load_model(kind, name, flag_name, **arguments):
    """Like `load`, and refuses a checkpoint that lacks parameters: transformers would fill them with random
    numbers."""
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(kind, name, flag_name, **arguments)
    wrong = set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]}
    if "state_dict" in arguments:
        wrong |= set(info["unexpected_keys"])
    if wrong:
        problem = f"{len(wrong)} parameters of {type(model).__name__} do not fit, such as {min(wrong)}"
        raise UserError(f"{flag_name} {name}: {problem}; give one of this architecture")
    return model


def load_tokenizer(name, fallback, flag_name):
    """The tokenizer of a model, or `fallback` where the model comes without one, as fine-tunes of GPT-J often
    do."""
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    place = name if fallback is None or find(name, *files) else fallback
    refuse_if(not find(place, *files), f"{flag_name} {place}: has no tokenizer; name one with --tokenizer")
    return load(transformers.AutoTokenizer, place, flag_name)


def encode(tokenizer, texts):
    """Token ids of each text, with the beginning token that this tokenizer puts before texts, and no end
    token.

    A chat template writes the beginning token itself, so it is not added twice. An end token behind a text
    would move "the last token", where a reward is read.
    """
    begin = tokenizer("a").input_ids[:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    plain = tokenizer(texts, add_special_tokens=False).input_ids
    return [ids if ids[:1] == begin else begin + ids for ids in plain]


def chat(tokenizer, messages, flag_name, tools=None, reply=False):
    """Messages as text, by the tokenizer's chat template.

    A last message of the assistant is a prefill, which the policy continues; otherwise a generation prompt
    follows. reply: the messages end with the complete answer, and nothing follows.
    """
    refuse_if(not tokenizer.chat_template, f"{flag_name}: has no chat template, and the prompts are messages")
    prefill = not reply and messages[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not reply and not prefill, "continue_final_message": prefill}
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how)
    except (jinja2.TemplateError, ValueError) as error:
        shown = repr(messages)[:100]
        raise UserError(f"{flag_name}: its chat template refuses {shown}: {first_line(error)}") from None


def fill(template, prompt, output):
    """A template with {prompt} and {output} filled in, in one pass: the prompt may itself contain
    "{output}"."""
    parts = {"{prompt}": prompt, "{output}": output}
    return re.sub(r"\{prompt\}|\{output\}", lambda place: parts[place[0]], template)


class RewardModel:
    """r(x, y) from a sequence classifier, read at the last token of a filled template.

    model      a transformers *ForSequenceClassification. With one label, r is its score. With more, r is the
               log-odds of `label`: its logit minus the logsumexp of the others (section 5, eq. 15).
    template   text with {prompt} and {output}, by default one after the other. If the prompt is messages, the
               chat template of this model's tokenizer is used instead, unless `template` is given; {prompt}
               is then the prompt as the policy reads it, by `policy_tokenizer`.
    outputs_per_forward  how many outputs go through the model at once. None: all n
    """

    def __init__(
        self, model, tokenizer, template=None, outputs_per_forward=None, label=None, policy_tokenizer=None
    ):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template
        self.outputs_per_forward, self.label = outputs_per_forward, label
        self.policy_tokenizer = policy_tokenizer
        self.head = getattr(model, "score", None)  # decoders have it; encoders pool in their own way
        self.in_batches = True
        self.context = context_of(model.config)
        wrong = model.config.is_encoder_decoder
        refuse_if(wrong, "--reward-model: is an encoder-decoder; give a decoder or an encoder")
        self._check()

    @classmethod
    def from_pretrained(
        cls, name, base=None, template=None, tokenizer=None, dtype=torch.float32, device="cpu", label=None,
        **how,
    ):
        """From a directory or hub name, or from a bare checkpoint that takes config and tokenizer from
        `base`.

        `tokenizer` is the policy's. It is also used where the reward model has none. UserError says what is
        wrong.
        """
        kind, bare = transformers.AutoModelForSequenceClassification, bare_checkpoint(name, base)
        source, flag_name = (base, "--reward-base") if bare else (name, "--reward-model")
        if bare:
            config = load(transformers.AutoConfig, base, "--reward-base", num_labels=1)
            with torch.device("meta"):
                kind = type(kind.from_config(config))
            arguments = {"config": config, "state_dict": bare_parameters(bare), "dtype": dtype}
            model = load_model(kind, bare, "--reward-model", **arguments)
        elif adapter := find(name, "adapter_config.json"):
            from peft import AutoPeftModelForSequenceClassification

            base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
            labels = 1 if label is None else load(transformers.AutoConfig, base, "--reward-model").num_labels
            arguments = {"dtype": dtype, "num_labels": labels}
            model = load(AutoPeftModelForSequenceClassification, name, "--reward-model", **arguments)
            model = model.merge_and_unload()
        else:
            model = load_model(kind, name, "--reward-model", dtype=dtype)
        found = load_tokenizer(source, tokenizer and tokenizer.name_or_path, flag_name)
        index = label_index(model.config, label)
        return cls(model.to(device), found, template, label=index, policy_tokenizer=tokenizer, **how)

    def text(self, prompt, output, columns=None):
        """What the reward model reads for one output."""
        tools = (columns or {}).get("tools")
        if isinstance(prompt, str):
            return fill(self.template or "{prompt}{output}", prompt, output)
        if self.template:
            return fill(self.template, chat(self.policy_tokenizer, prompt, "--model", tools), output)
        if prompt[-1]["role"] == "assistant":  # a prefill and the output are one message
            prompt, output = prompt[:-1], prompt[-1]["content"] + output
        messages = prompt + [{"role": "assistant", "content": output}]
        return chat(self.tokenizer, messages, f"--reward-model {self.model.name_or_path}", tools, reply=True)

    def encode(self, texts):
        """Token ids of texts: an encoder keeps the special tokens around them."""
        return self.tokenizer(texts).input_ids if self.head is None else encode(self.tokenizer, texts)

    @torch.no_grad()
    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt. -> (n,) float32"""
        ids = self.encode([self.text(prompt, output, columns) for output in outputs])
        longest = max(map(len, ids))
        empty = min(map(len, ids)) == 0
        refuse_if(empty, "--reward-template: gives a text without tokens; let it contain {prompt}")
        too_long = longest > self.context
        refuse_if(too_long, f"--reward-model: {longest} tokens do not fit its context of {self.context}")
        size = self.outputs_per_forward or len(ids)
        if not self.in_batches:
            size = 1
        logits = torch.cat([self._logits(ids[i : i + size]) for i in range(0, len(ids), size)]).float().cpu()
        if self.label is None:
            rewards = logits[:, 0]
        else:
            others = [i for i in range(logits.shape[1]) if i != self.label]
            rewards = logits[:, self.label] - logits[:, others].logsumexp(-1)
        refuse_if(not rewards.isfinite().all(), "--reward-model: gave nan or inf; try --dtype float32")
        return rewards

    def _logits(self, ids):
        """Logits (n, labels) of n texts, as token ids. What they have in common at their beginning is
        computed once.

        The head is read at our own index. The model's own pooling takes the last token that is not padding,
        and misses an end token that the template asks for where pad = eos.
        """
        device, cache = self.model.device, None
        if self.head is None:
            batch = {"input_ids": ids}
            if len(ids) > 1:
                batch = self.tokenizer.pad(batch)
            return self.model(**{name: torch.tensor(x, device=device) for name, x in batch.items()}).logits
        alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ids))
        common = min(sum(1 for _ in alike), min(map(len, ids)) - 1)  # each keeps its last token
        if common > 0 and len(ids) > 1:
            beginning = torch.tensor([ids[0][:common]], device=device)
            output = self.model.base_model(input_ids=beginning, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            cache = share(cache, len(ids)) if shareable(cache) else None
        if cache is None:
            common = 0
        rest, real = pad_right([torch.tensor(text[common:]) for text in ids], device)  # (n, T)
        arguments = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        hidden = self.model.base_model(input_ids=rest, **arguments).last_hidden_state
        return self.head(hidden[torch.arange(len(ids)), real.sum(-1) - 1])

    @torch.no_grad()
    def _check(self):
        """Two texts of different lengths must score in a batch as they do one by one; otherwise they go one
        by one."""
        known = sorted(self.tokenizer.get_vocab().values())
        ordinary = sorted(set(known) - set(self.tokenizer.added_tokens_decoder)) or known
        rows = self.model.get_input_embeddings().weight.shape[0]
        many = f"the tokenizer has ids up to {known[-1]}, the model embeds {rows}"
        refuse_if(known[-1] >= rows, f"--reward-model: {many}; give the tokenizer that it was trained with")
        ids = [ordinary[i * 7919 % len(ordinary)] for i in range(12)]
        texts = [ids[:6], ids[:3] + ids[6:]]
        alone = torch.cat([self._logits([text]) for text in texts])
        tolerance = max(1e-3, 32 * torch.finfo(alone.dtype).eps)
        try:
            self.in_batches = torch.allclose(self._logits(texts), alone, atol=tolerance, rtol=tolerance)
        except Exception:  # batches of unusual models fail in ways of their own
            self.in_batches = False
        if not self.in_batches:
            name = type(self.model).__name__
            print(f"brain: {name} reads batches wrongly; texts are scored one by one", file=sys.stderr)


def label_index(config, label):
    """Index of the label that means good; None if the model has one label and its score is the reward."""
    names, count = list(config.id2label.values()), config.num_labels
    if count == 1:
        refuse_if(label is not None, f"--reward-label {label}: the model has one label; leave it out")
        return None
    if label is None and count == 2:
        return 1
    known = [str(i) for i in range(count)]
    wrong = label not in names + known
    refuse_if(wrong, f"--reward-label {label}: give one of {', '.join(names)}, or its index")
    return names.index(label) if label in names else int(label)


def context_of(config):
    """The longest sequence of a model, in tokens; infinite where its config names none."""
    config = config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or math.inf
    context = context if context > 0 else math.inf  # xlnet says -1
    if config.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"):
        context -= config.pad_token_id + 1  # positions count from the padding id
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):  # beyond it, frequencies depend on the length
        context = min(context, rope.get("original_max_position_embeddings") or context)
    return context


def bare_checkpoint(name, base):
    """Path of a reward model that is one file of parameters, without a config; None for any other."""
    bare = None
    if Path(name).is_file():
        bare = name
    elif not find(name, "config.json", "adapter_config.json"):
        bare = find(name, "pytorch_model.bin", "hf_ckpt.pt")
    needs = "has no config; name the model that it was trained from with --reward-base"
    refuse_if(bare and not base, f"--reward-model {name}: {needs}")
    return bare


def bare_parameters(path):
    """{name: tensor} of a bare checkpoint. Its `v_head` is the score head; old attention buffers are
    dropped."""
    try:
        parameters = torch.load(path, map_location="cpu", weights_only=True)  # a pickle may run code
    except pickle.UnpicklingError:
        raise UserError(f"--reward-model {path}: holds code; give a file of tensors") from None
    renamed = {re.sub(r"^v_head\.", "score.", key): tensor for key, tensor in parameters.items()}
    return {key: tensor for key, tensor in renamed.items() if not re.search(r"\.attn\.(masked_)?bias$", key)}


class RewardFunction:
    """A user's f(prompts, completions, **columns) -> list of floats, called as TRL does: by keyword, equal
    lengths."""

    def __init__(self, function, name):
        self.function, self.name = function, name

    @classmethod
    def from_file(cls, spec):
        """From "file.py:name". UserError if there is no such function."""
        path, _, name = spec.rpartition(":")
        found = Path(path).is_file() and path.endswith(".py")
        refuse_if(not found, f"--reward-function {spec}: no such Python file; give file.py:name")
        source = importlib.util.spec_from_file_location("reward_function", path)
        sys.modules["reward_function"] = module = importlib.util.module_from_spec(source)
        sys.path.append(str(Path(path).resolve().parent))  # for imports from beside it
        source.loader.exec_module(module)
        function = getattr(module, name, None)
        refuse_if(not callable(function), f"--reward-function {spec}: {path} has no function {name}")
        return cls(function, spec)

    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt; the row's columns go along, each repeated n times. -> (n,)
        float64"""
        if not isinstance(prompt, str):  # messages in, messages out
            outputs = [[{"role": "assistant", "content": output}] for output in outputs]
        n = len(outputs)
        arguments = {name: [value] * n for name, value in (columns or {}).items()}
        arguments |= {"prompts": [prompt] * n, "completions": list(outputs)}
        takes = inspect.signature(self.function).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in takes.values()):
            arguments = {name: value for name, value in arguments.items() if name in takes}
        returned = self.function(**arguments)
        try:
            rewards = torch.tensor([float(reward) for reward in returned], dtype=torch.float64)
        except (TypeError, ValueError):
            rewards = torch.tensor([])
        if rewards.shape != (n,) or not rewards.isfinite().all():
            shown = " ".join(repr(returned).split())[:80]
            message = f"must return {n} finite numbers, one per completion; it returned {shown}"
            raise UserError(f"--reward-function {self.name}: {message}")
        return rewards


# ------------------------------------------------------------------------------------------
# 6. Prompts

GOLD_COLUMNS = ("label", "completion", "chosen", "response")  # the first that holds text is the gold answer


@dataclass
class Example:
    row: int  # row of the split
    prompt: str | list  # text, or messages
    ids: torch.Tensor  # (P,)
    gold: str | None
    pair: list | None  # [chosen, rejected] as LongTensors, for --method dpo
    columns: dict  # the row's other columns, for a reward function


class Prompts:
    """The rows of a split whose prompt is at most --max-prompt-tokens long. prompts[i] -> Example"""

    def __init__(self, rows, tokenizer, settings, split):
        self.rows, self.tokenizer, self.settings, self.split = rows, tokenizer, settings, split
        self.gold = gold_column(rows)
        self.wants_pair = METHODS[settings.method].source == "data" and split == "train"
        lengths = []
        for start in range(0, len(rows), 1000):
            some = rows.select(range(start, min(start + 1000, len(rows))))
            texts = [self.text(self.prompt(row), row) for row in some]
            lengths += map(len, encode(tokenizer, texts))
        most = settings.max_prompt_tokens
        self.lengths = {i: length for i, length in enumerate(lengths) if 0 < length <= most}
        self.leave_out([], f"longer than {most} tokens, or empty", "--max-prompt-tokens")

    def leave_out(self, unfit, why, flag_name):
        """Drops rows, counts them, and refuses a split of which nothing is left."""
        self.lengths = {i: length for i, length in self.lengths.items() if i not in unfit}
        self.kept = list(self.lengths)
        where = f"--dataset {self.settings.dataset}: split {self.split}"
        refuse_if(not self.kept, f"{where}: every prompt is {why}; change {flag_name}")
        self.summary = f"{self.split}: {len(self.kept)} prompts"
        if len(self.kept) < len(self.rows):
            self.summary += f", {len(self.rows) - len(self.kept)} left out ({why})"

    def leave_out_unfit(self, reward):
        """Drops prompts whose outputs or gold answer would not fit the context of the reward model."""
        unfit = set()
        for i in range(len(self)):
            example = self[i]
            texts = [reward.text(example.prompt, " a", example.columns)]
            if example.gold is not None:
                texts.append(reward.text(example.prompt, example.gold, example.columns))
            lengths = [len(ids) for ids in reward.encode(texts)]
            lengths[0] += self.settings.max_new_tokens - 1  # " a" is the first token of the output
            if max(lengths) > reward.context:
                unfit.add(example.row)
        if unfit:
            why = f"too long for the policy, or for the reward model's context of {reward.context}"
            self.leave_out(unfit, why, "--reward-model")

    def __len__(self):
        return len(self.kept)

    def length(self, i):
        """Tokens of a prompt."""
        return self.lengths[self.kept[i]]

    def __getitem__(self, i):
        row = dict(self.rows[self.kept[i]])
        prompt = self.prompt(row)
        (ids,) = encode(self.tokenizer, [self.text(prompt, row)])
        gold = None
        if self.gold and row[self.gold] is not None:
            gold = answer_text(prompt, row[self.gold])
        pair = None
        if self.wants_pair:
            text = self.text(prompt, row)
            answers = [answer_text(prompt, row[name]) for name in ("chosen", "rejected")]
            pair = [self.answer_ids(text, ids, answer) for answer in answers]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        return Example(self.kept[i], prompt, torch.tensor(ids), gold, pair, columns)

    def prompt(self, row):
        """The prompt of a row: text, or messages without the keys that the table filled in with null."""
        prompt = row["prompt"]
        if isinstance(prompt, str) and self.gold and is_messages(row[self.gold]):
            prompt = [{"role": "user", "content": prompt}]  # answers are messages, so the prompt is one too
        if isinstance(prompt, str):
            return prompt
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]

    def text(self, prompt, row):
        """A prompt as the policy reads it."""
        if isinstance(prompt, str):
            return prompt
        return chat(self.tokenizer, prompt, f"--model {self.settings.model}", row.get("tools"))

    def answer_ids(self, text, prompt_ids, answer):
        """An answer as if the policy had written it: what follows the prompt's ids, the end token, cut to
        length."""
        (ids,) = encode(self.tokenizer, [text + answer])
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:  # the tokenizer joins letters across the boundary, which the policy could not do
            ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return torch.tensor((ids + [self.tokenizer.eos_token_id])[: self.settings.max_new_tokens])


def is_messages(value):
    """Whether a prompt or an answer is a list of messages, at least one, each with a role."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, dict) and message.get("role") for message in value)


def is_text(value):
    return isinstance(value, str) or is_messages(value)


def gold_column(rows):
    """The first of GOLD_COLUMNS that holds text or messages in some row, or None. A label may also be a
    number."""
    names = [name for name in GOLD_COLUMNS if name in rows.column_names]
    return next((name for name in names if any(is_text(value) for value in rows[name])), None)


def answer_text(prompt, answer):
    """An answer of the data, joined to its prompt as an output is: with one space, where neither brings white
    space."""
    if is_messages(answer):
        answer = answer[-1]["content"]  # the last message is the reply
    if isinstance(prompt, str) and answer and not prompt[-1:].isspace() and not answer[0].isspace():
        return " " + answer
    return answer


def split_pair(row):
    """A row of preferences without a prompt: the prompt is what `chosen` and `rejected` have in common."""
    chosen, rejected = row["chosen"], row["rejected"]
    alike = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected))
    same = sum(1 for _ in alike)
    if isinstance(chosen, str):
        cue = chosen.rfind("Assistant:", 0, same)
        same = cue + len("Assistant:") if cue >= 0 else 0
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def move_cue(row, cue="TL;DR:"):
    """openai_summarize_comparisons has the cue before each answer; openai_summarize_tldr, at the end of the
    prompt."""
    if not isinstance(row["chosen"], str) or not row["chosen"].startswith(cue):
        return row
    answers = {name: row[name].removeprefix(cue) for name in ("chosen", "rejected")}
    return row | answers | {"prompt": row["prompt"].rstrip() + "\n" + cue}


def load_splits(name, settings, flag_name="--dataset"):
    """{"train", "validation", "test": rows or None} of a hub name, a directory, or a .jsonl, .parquet or .csv
    file."""
    import datasets
    import huggingface_hub

    path, kinds = Path(name), {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    local = path.exists() or name.startswith(("/", ".")) or path.suffix in kinds
    refuse_if(local and not path.exists(), f"{flag_name} {name}: no such file or directory")
    wrong = path.is_file() and path.suffix not in kinds
    refuse_if(wrong, f"{flag_name} {name}: unknown kind of file; give .jsonl, .parquet or .csv")
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            found = datasets.load_dataset(kinds[path.suffix], data_files={"train": name})
        else:  # load_dataset(hub name) would need the network even where the cache holds the files
            where = name if local else huggingface_hub.snapshot_download(name, repo_type="dataset")
            found = datasets.load_dataset(where, settings.dataset_config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error  # the cause names the line of a file
        raise UserError(f"{flag_name} {name}: cannot be read: {first_line(cause)}") from None
    names = {
        "train": [settings.dataset_train_split or "train"],
        "validation": ["validation", "valid", "val"],
        "test": [settings.dataset_test_split or "test"],
    }
    splits = {}
    for split, options in names.items():
        splits[split] = next((found[name] for name in options if name in found), None)
    only = [n for n in found if n.startswith("train")]
    if splits["train"] is None and settings.dataset_train_split is None and len(only) == 1:
        print(f"train: the split {only[0]}")
        splits["train"] = found[only[0]]
    known = f"there are {', '.join(found)}; name one with --dataset-train-split"
    refuse_if(splits["train"] is None, f"{flag_name} {name}: no split {names['train'][0]}, {known}")
    wrong = settings.dataset_test_split and splits["test"] is None
    refuse_if(wrong, f"--dataset-test-split {settings.dataset_test_split}: there are {', '.join(found)}")
    return {split: with_prompts(rows, f"{flag_name} {name}: split {split}") for split, rows in splits.items()}


def with_prompts(rows, where, columns=()):
    """Rows with a column `prompt`, taken from a pair where there is none. UserError names the first row
    without text."""
    if rows is None:
        return None
    if "prompt" not in rows.column_names and {"chosen", "rejected"} <= set(rows.column_names):
        rows = rows.map(split_pair)
    for name in ("prompt", *columns):
        found = ", ".join(rows.column_names)
        missing = name not in rows.column_names
        refuse_if(missing, f"{where} has no column {name}, it has {found}; add or rename one")
        for i, value in enumerate(rows[name]):
            if not is_text(value) or name == "prompt" and isinstance(value, str) and not value.strip():
                shown = repr(value)[:60]
                raise UserError(f"{where}, row {i + 1}: {name} must be text or messages, not {shown}")
    return rows


def load_data(settings, tokenizer, splits=None):
    """-> [train, validation, test] as Prompts. A split that the data lacks is held out from train.

    The held-out rows are the same for every --seed: a tenth of train, and at most 1000.
    """
    splits = splits or load_splits(settings.dataset, settings)
    pairs = None
    if METHODS[settings.method].source == "data":
        where, pairs = f"--dataset {settings.dataset}: split train", splits["train"]
        if settings.pairs_dataset:
            where = f"--pairs-dataset {settings.pairs_dataset}: split train"
            names = {"dataset_config": None, "dataset_train_split": None, "dataset_test_split": None}
            own = dataclasses.replace(settings, **names)
            pairs = load_splits(settings.pairs_dataset, own, "--pairs-dataset")["train"]
        pairs = with_prompts(pairs, where, ("chosen", "rejected"))
    for split in ("validation", "test"):
        train = splits["train"]
        if splits[split] is None:
            few = len(train) < 2
            refuse_if(few, f"--dataset {settings.dataset}: too few rows to hold any out as {split}")
            size = min(1000, math.ceil(len(train) / 10))
            order = random_subset(len(train), len(train), SPLITS)
            splits[split], splits["train"] = train.select(order[:size]), train.select(order[size:])
            print(f"{split}: not in the data; {size} rows of train are held out for it")
    if settings.pairs_dataset and pairs is not None:
        splits["train"] = pairs.map(move_cue)
    return [Prompts(splits[split], tokenizer, settings, split) for split in ("train", "validation", "test")]


# ------------------------------------------------------------------------------------------
# 7. Evaluation

EVALUATION_BATCH = 32  # prompts at once, one output each
HELD_OUT_PROMPTS = 64  # prompts with n outputs each, for D_n and for the distance to the posterior


def evenly(size, count):
    """min(count, size) indices below size, evenly spaced."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def evaluation_batches(policy, data, settings):
    """Indices of the prompts to evaluate, in batches of similar length: they need little padding."""
    rows = evenly(len(data), settings.eval_prompts or len(data))
    rows.sort(key=data.length)
    size = min(EVALUATION_BATCH, settings.outputs_per_forward or EVALUATION_BATCH)
    groups = [rows]
    if not policy.pads_prompts:
        groups = [list(same_length) for _, same_length in itertools.groupby(rows, data.length)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@torch.no_grad()
def answer_batch(policy, reward, data, settings, batch):
    """One output per prompt of a batch, the rewards of it and of the gold answer. -> a line per prompt"""
    examples = [data[i] for i in batch]
    prompts = [example.ids for example in examples]
    generators = [seeded(settings.seed, EVALUATION, i) for i in batch]
    length, greedy = settings.max_new_tokens, settings.greedy
    drawn, log_q = policy.sample_batch(prompts, 1, length, False, generators, greedy)
    lines = []
    for example, outputs, own in zip(examples, drawn, log_q.cpu()):
        text = policy.text(example.ids, outputs[0])
        line = {"row": example.row, "prompt": example.prompt, "output": text, "gold": example.gold}
        texts = [text] if example.gold is None else [text, example.gold]  # together: they share the prompt
        rewards = reward(example.prompt, texts, example.columns).tolist()
        line["reward"] = rewards[0]
        line["gold_reward"] = None if example.gold is None else rewards[1]
        log_p = policy.log_prob(example.ids, outputs, prior=True).cpu()
        line["log_ratio"] = (own - log_p).item()
        lines.append(line)
    return lines


def evaluate(policy, reward, data, settings, run):
    """One output per prompt against the gold answers, and the distance to the posterior. -> (metrics, lines)

    Every evaluation has the same prompts and the same random numbers, so evaluations differ by the policy
    only. kl_to_prior is the mean of log q_theta - log p over the outputs, an estimate of KL(q_theta || p).
    elbo and log_evidence come from n outputs for each of at most 64 prompts. Both use the same draws, so that
    their difference has no noise from the choice of prompts. A greedy output is no draw, so --greedy leaves
    these out.
    """
    batches = evaluation_batches(policy, data, settings)
    answer = functools.partial(answer_batch, policy, reward, data, settings)
    answered = list(run.shared(batches, answer, "evaluation"))
    lines = sorted(itertools.chain.from_iterable(answered), key=lambda line: line["row"])
    ratios = [line.pop("log_ratio") for line in lines]
    against_gold = [line for line in lines if line["gold"] is not None]
    metrics = {}
    if against_gold:
        rewards, gold = zip(*[(line["reward"], line["gold_reward"]) for line in against_gold])
        metrics["win_rate"], metrics["win_rate_half_width"] = win_rate(rewards, gold)
    metrics["reward"] = float(np.mean([line["reward"] for line in lines]))
    if not settings.greedy:
        metrics["kl_to_prior"] = float(np.mean(ratios))
        metrics |= mean_evidence(run.held_out_samples(policy, data, "policy"), settings)
    return metrics, lines


# ------------------------------------------------------------------------------------------
# 8. The run directory, and the processes that share a run

RUN_DIRECTORIES = ("model", "checkpoint", "unfinished")
RUN_FILES = (
    "metrics.jsonl", "samples.jsonl", "validation_outputs.jsonl", "test_outputs.jsonl",
    "report.png", "toy.png",
)  # fmt: skip
CACHED = ("reward", "log_p", "log_q_proposal", "alpha_hat")  # the numbers of an output in samples.jsonl


def save_policy(policy, directory):
    """The policy and its tokenizer, for transformers (all parameters) or peft (the adapter) to load."""
    if policy.prior_model is not None:
        policy.model.save_pretrained(directory)
    else:
        import peft

        model, adapter = policy.model, policy.adapter
        tensors = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
        policy.model.peft_config[policy.adapter].save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)


def load_policy(policy, directory):
    """The parameters that `save_policy` wrote, back into q_theta."""
    if policy.prior_model is not None:
        saved = type(policy.model).from_pretrained(directory, dtype=policy.model.dtype)
        policy.model.load_state_dict(saved.state_dict())
    else:
        import peft

        tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(policy.model, tensors, policy.adapter)


class Run:
    """A run directory, which the first process writes, and what the processes of a run exchange.

    A run can be killed at any moment and resumed. Files are written beside and renamed, lines are written
    whole. `samples.jsonl` is D_t. A checkpoint has the trained parameters, AdamW's state and the number of
    updates. On resuming, lines of later updates are cut off. They come again, the same, because every random
    number follows from (seed, purpose, indices).
    """

    def __init__(self, path, settings, reward=None, train=None, validation=None, test=None):
        self.path, self.settings, self.reward = Path(path), settings, reward
        self.splits = {"train": train, "validation": validation, "test": test}
        self.rank, self.processes = 0, 1
        if torch.distributed.is_initialized():
            self.rank = torch.distributed.get_rank()
            self.processes = torch.distributed.get_world_size()
        self.done = 0  # updates that the checkpoint has
        self.samples = {}  # {(round, index of the prompt): Samples} that a killed run had drawn
        self.kept, self.best = 0, -math.inf  # the update whose policy is in model/, and its score
        self.warned = set()

    # ---- what `train` and `update` call

    def start(self, policy, optimizer):
        """Draws the held-out samples. Evaluates a new run; restores a killed run to its checkpoint."""
        self.policy = policy
        self.held_out = self.held_out_samples(policy, self.splits["validation"], "prior")
        file = self.path / "checkpoint" / "state.pt"
        new = not file.exists()
        self.gather([])  # no process looks after the first one has begun to write
        if new:
            for name in ("metrics.jsonl", "samples.jsonl", "validation_outputs.jsonl"):
                self.write(name, [], anew=True)
            self.evaluate(policy, 0)
            self.save_checkpoint(policy, optimizer, 0)
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, parameter in policy.parameters().items():
            parameter.data.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        self.done, self.kept, self.best = state["step"], state["kept"], state["best"]
        for name in ("metrics.jsonl", "validation_outputs.jsonl"):
            lines = [line for line in self.lines(name) if line["step"] <= self.done]
            # The round that follows the checkpoint is logged again, and so is the test split.
            again = self.done // self.settings.updates_per_iteration + 1
            lines = [line for line in lines if line.get("iteration") != again or line["step"] < self.done]
            self.write(name, [line for line in lines if line.get("split") != "test"], anew=True)
        self.read_samples()

    def collect(self, t, rows, draw):
        """The Samples of round t: those that a killed run had, then the rest by draw(row)."""
        drawn = [self.samples[t, row] for row in rows if (t, row) in self.samples]
        missing = [row for row in rows if (t, row) not in self.samples]
        fresh = self.shared(missing, draw, f"round {t}, sampling")
        for row, samples in zip(missing, fresh):
            line = {"iteration": t, "row": samples.row, "prompt": self.splits["train"][row].prompt}
            lines = []
            for i, output in enumerate(samples.outputs):
                numbers = {name: getattr(samples, name)[i].item() for name in CACHED}
                lines.append(line | {"output": samples.texts[i], "output_ids": output.tolist()} | numbers)
            self.write("samples.jsonl", lines)
            drawn.append(samples)
        step = (t - 1) * self.settings.updates_per_iteration
        if METHODS[self.settings.method].source in ("policy", "prior") and self.done <= step:
            self.log({"step": step, "iteration": t} | mean_evidence(drawn, self.settings))
        self.warn_of_useless(drawn)
        return drawn

    def steps(self, t):
        """The updates of round t that are still to do."""
        k = self.settings.updates_per_iteration
        return self.progress(range(max(self.done, (t - 1) * k) + 1, t * k + 1), f"round {t}, updates")

    def share_of(self, batch):
        return batch[self.rank :: self.processes]

    def combine(self, policy, lines):
        """Metrics over the lines of all processes. Sums their gradients, and refuses non-finite ones."""
        lines = self.gather(lines)
        metrics = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
        metrics["max_weight"] = max(line["max_weight"] for line in lines)
        finite = all(map(math.isfinite, metrics.values()))
        for parameter in policy.parameters().values():
            if self.processes > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
            if parameter.grad is not None:
                finite = finite and bool(parameter.grad.isfinite().all())
        if not finite:
            mend = "the parameters are unchanged; lower --learning-rate, or use --dtype float32"
            raise UserError(f"the loss or its gradient is not finite ({metrics}); {mend}")
        return metrics

    def after_update(self, policy, optimizer, step, metrics):
        """Logs an update. Evaluates every --eval-every updates and at the end. Checkpoints then, and every
        round."""
        self.log({"step": step} | metrics)
        k, e = self.settings.updates_per_iteration, self.settings.iterations
        due = step % self.settings.eval_every == 0
        if due or step == k * e:
            self.evaluate(policy, step)
        if due or step % k == 0:
            self.save_checkpoint(policy, optimizer, step)

    # ---- processes

    def gather(self, mine):
        """The lists of all processes as one: item i of it was item i // W of process i % W. A barrier."""
        if self.processes == 1:
            return mine
        parts = [None] * self.processes
        torch.distributed.all_gather_object(parts, mine)
        return [x for turn in itertools.zip_longest(*parts) for x in turn if x is not None]

    def shared(self, items, function, label):
        """function(item) of all items, in order. Each process computes its share and gets all."""
        for start in self.progress(range(0, len(items), self.processes), label):
            mine = items[start + self.rank : start + self.rank + 1]
            yield from self.gather([function(item) for item in mine])

    def progress(self, steps, label):
        return tqdm(steps, desc=label, leave=False, disable=None if self.rank == 0 else True)

    # ---- files

    def lines(self, name):
        """The whole lines of a .jsonl file as dicts. A killed run may have left half a line at the end."""
        path = self.path / name
        data = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line]

    def write(self, name, lines, anew=False):
        """Appends lines to a .jsonl file, or replaces the file by them."""
        if self.rank == 0:
            file = self.path / (f"unfinished-{name}" if anew else name)
            with file.open("w" if anew else "a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            if anew:
                file.replace(self.path / name)

    def log(self, line):
        self.write("metrics.jsonl", [line | {"time": round(time.time(), 3)}])

    def read_samples(self):
        """D_t from samples.jsonl. A prompt whose n lines are not all there is cut off, to be drawn again."""
        lines, n, data = self.lines("samples.jsonl"), self.settings.samples_per_prompt, self.splits["train"]
        groups = [lines[i : i + n] for i in range(0, len(lines) - n + 1, n)]
        self.write("samples.jsonl", itertools.chain.from_iterable(groups), anew=True)
        dtype = torch.float64 if self.settings.dtype == "float64" else torch.float32
        index = {row: i for i, row in enumerate(data.kept)}
        for group in groups:
            t, row = group[0]["iteration"], group[0]["row"]
            outputs = [torch.tensor(line["output_ids"]) for line in group]
            texts = [line["output"] for line in group]
            numbers = [torch.tensor([line[name] for line in group], dtype=dtype) for name in CACHED]
            self.samples[t, index[row]] = Samples(t, row, data[index[row]].ids, outputs, texts, *numbers)

    def save_checkpoint(self, policy, optimizer, step):
        if self.rank == 0:
            state = {"step": step, "kept": self.kept, "best": self.best, "optimizer": optimizer.state_dict()}
            state["parameters"] = {name: p.detach() for name, p in policy.parameters().items()}
            unfinished = self.path / "checkpoint" / "unfinished"
            unfinished.parent.mkdir(exist_ok=True)
            torch.save(state, unfinished)
            unfinished.replace(unfinished.with_name("state.pt"))

    def save_model(self, policy):
        """model/, written beside and renamed, so that it is whole or not there."""
        if self.rank == 0:
            shutil.rmtree(self.path / "unfinished", ignore_errors=True)
            (self.path / "unfinished").mkdir()
            save_policy(policy, self.path / "unfinished")
            shutil.rmtree(self.path / "model", ignore_errors=True)
            (self.path / "unfinished").rename(self.path / "model")
        self.gather([])  # no process reads it before it is there

    # ---- evaluation, warnings, report

    def held_out_samples(self, policy, data, source):
        """n outputs of p or of q_theta for held-out prompts: Samples that are never trained on."""

        def draw(i):
            generator = seeded(self.settings.seed, HELD_OUT, i)
            return collect(policy, self.reward, data[i], self.settings, source, generator)

        rows = evenly(len(data), min(HELD_OUT_PROMPTS, self.settings.eval_prompts or HELD_OUT_PROMPTS))
        return list(self.shared(rows, draw, "held-out samples"))

    def evaluate(self, policy, step, split="validation"):
        """A line of metrics, and one on the screen. On validation, the best policy is saved as model/."""
        metrics, lines = evaluate(policy, self.reward, self.splits[split], self.settings, self)
        if split == "test":
            self.write("test_outputs.jsonl", lines, anew=True)
        else:
            d_n = functools.partial(held_out_divergence, policy, settings=self.settings)
            divergences = list(self.shared(self.held_out, d_n, "held-out D_n"))
            metrics["self_normalized_kl"] = float(np.mean(divergences))
            self.write("validation_outputs.jsonl", [{"step": step} | line for line in lines])
            no_gold = "--select-by win_rate: no evaluated prompt has a gold answer; give --select-by elbo"
            refuse_if(self.settings.select_by not in metrics, no_gold)
            score = metrics[self.settings.select_by]
            if self.settings.select_by == "self_normalized_kl":
                score = -score
            if score >= self.best:  # of equal ones the later
                self.best, self.kept = score, step
                self.save_model(policy)
            metrics["kept"] = self.kept
        self.log({"step": step, "split": split} | metrics)
        text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "kept")
        text = re.sub(r"  \w+_(standard_error|half_width) ", " ± ", text)
        print(f"update {step:>6}  {split:<10}  {text}  kept: update {self.kept}", flush=True)
        for line in lines[:2]:
            gold = "" if line["gold"] is None else f"; gold {line['gold_reward']:.2f}: {line['gold'][:60]!r}"
            print(f"    reward {line['reward']:.2f}: {line['output'][:60]!r}{gold}", flush=True)
        return metrics

    def warn_if(self, wrong, message):
        if wrong and self.rank == 0 and message not in self.warned:
            self.warned.add(message)
            print(f"brain: warning: {message}", file=sys.stderr)

    def warn_of_useless(self, drawn):
        """Warns of samples from which nothing can be learned."""
        ended = any(self.policy.ended(output) for samples in drawn for output in samples.outputs)
        self.warn_if(not ended, "every output was truncated; raise --max-new-tokens, or check the end token")
        flat = all(samples.reward.max() - samples.reward.min() < 1e-6 for samples in drawn)
        self.warn_if(flat, "all outputs of a prompt have the same reward: nothing is learned")

    def report(self):
        """report.png: what to watch, over updates."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        group = METHODS[self.settings.method].group_size or self.settings.samples_per_prompt
        panels = {  # title: the metrics that it shows
            "Distance to the posterior: the gap, nats": ("elbo", "log_evidence"),
            "D_n on held-out prompts, and the loss on D_t, nats": ("self_normalized_kl", "loss"),
            "Win-rate against gold, %": ("win_rate",),
            "Mean reward of the policy": ("reward",),
            "KL(policy || prior), nats": ("kl_to_prior",),
            f"Effective sample sizes, of {group}": ("ess_alpha", "ess_beta"),
        }
        lines = self.lines("metrics.jsonl")
        evaluations = [line for line in lines if line.get("split") == "validation"]
        updates = [line for line in lines if "loss" in line]
        figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
        for axis, (title, names) in zip(axes.flat, panels.items()):
            for name in names:
                source = updates if name in ("loss", "ess_alpha", "ess_beta") else evaluations
                points = [(line["step"], line[name]) for line in source if name in line]
                look = "-" if source is updates else "--" if name == "log_evidence" else "o-"
                axis.plot([x for x, _ in points], [y for _, y in points], look, label=name)
            for t in range(1, self.settings.iterations):
                axis.axvline(t * self.settings.updates_per_iteration, color="0.85")
            axis.axvline(self.kept, color="green", linestyle=":", label=f"kept: update {self.kept}")
            axis.set(title=title, xlabel="updates")
            axis.legend()
        figure.savefig(self.path / "unfinished.png", dpi=100)
        (self.path / "unfinished.png").replace(self.path / "report.png")
        plt.close(figure)


# ------------------------------------------------------------------------------------------
# 9. The command line

COMPANIONS = {  # what goes with a model. Each entry is a default that its flag overrides.
    "CarperAI/openai_summarize_tldr_sft": dict(  # the paper's summarisation (appendix B)
        tokenizer="EleutherAI/gpt-j-6B",  # the model comes without one
        reward_model="CarperAI/openai_summarize_tldr_rm_checkpoint",
        reward_base="CarperAI/openai_summarize_tldr_sft",
        # It was trained on texts with an end token, but read before it. Attention is causal, so leave it out.
        reward_template="<|startoftext|>{prompt}{output}", dataset="CarperAI/openai_summarize_tldr",
        pairs_dataset="CarperAI/openai_summarize_comparisons", max_prompt_tokens=500, max_new_tokens=50,
    ),
    "timdettmers/qlora-hh-rlhf-7b": dict(  # the paper's dialogue: the prior is an adapter on Llama-7B
        reward_model="Dahoas/gptj-rm-static", reward_base="EleutherAI/gpt-j-6B",
        reward_template="{prompt}{output}<|endoftext|>",  # this one was read at the end token
        dataset="Dahoas/rm-static", max_prompt_tokens=500, max_new_tokens=128,
    ),
    "toy": dict(
        iterations=6, prompts_per_iteration=128, updates_per_iteration=60, learning_rate=1e-3,
        weight_decay=0.0, lora_rank=0, max_prompt_tokens=2, max_new_tokens=4, eval_prompts=256,
        select_by="self_normalized_kl",
    ),
}  # fmt: skip
GOODNESS = ("bradley-terry", "logistic")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SELECTIONS = ("win_rate", "elbo", "self_normalized_kl")
# Schedules that are a function of the step and need no settings of their own.
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
LOWEST = dict(
    seed=0, iterations=0, prompts_per_iteration=1, samples_per_prompt=2, updates_per_iteration=1,
    batch_size=1, max_prompt_tokens=1, max_new_tokens=1, weight_decay=0, adam_beta1=0, adam_beta2=0,
    lora_rank=0, lora_alpha=1, outputs_per_forward=1, eval_prompts=0, eval_every=1, warmup_steps=0,
)  # fmt: skip


def setting(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Settings:
    """Every setting, once. (paper) marks the values of section 8 and appendix B.2; the others are ours."""

    model: str = setting("toy", "toy, or a causal LM or LoRA adapter: hub name or directory")
    base_model: str | None = setting(None, "for an adapter: its base, if the one that it names is not wanted")
    tokenizer: str | None = setting(None, "for a model that comes without one")
    reward_model: str | None = setting(None, "sequence classifier, or a bare checkpoint (with --reward-base)")
    reward_base: str | None = setting(None, "the model that a bare checkpoint was trained from")
    reward_template: str | None = setting(None, "r is read at its last token; {prompt}{output} if not given")
    reward_function: str | None = setting(None, "file.py:name, f(prompts, completions, **columns)")
    reward_label: str | None = setting(None, "of a classifier of several labels: the good one, name or index")
    goodness: str | None = setting(None, "p(G=1|y,x) from r; logistic only for classifiers", GOODNESS)
    beta: float = setting(1.0, "strength of the KL term, see log_goodness (paper: 1)")
    dataset: str | None = setting(None, "hub name, directory, .jsonl, .parquet or .csv with a column prompt")
    dataset_config: str | None = setting(None, "configuration of a hub dataset")
    dataset_train_split: str | None = setting(None, "its name, if it is not train")
    dataset_test_split: str | None = setting(None, "its name, if it is not test")
    pairs_dataset: str | None = setting(None, "for --method dpo: pairs to train on, if --dataset has none")
    method: str = setting("brain", "BRAIn or a baseline of Tables 1 and 3", tuple(METHODS))
    output_dir: str | None = setting(None, "where to write; a new directory under runs/ if not given")
    resume: bool = setting(False, "continue the run in --output-dir")
    overwrite: bool = setting(False, "replace the run in --output-dir")
    seed: int = setting(0, "of all random numbers")
    device: str | None = setting(None, "cpu, cuda or cuda:1; a GPU if there is one")
    dtype: str | None = setting(None, "of the models; bfloat16 for LoRA on a GPU, else float32", DTYPES)
    iterations: int = setting(4, "e: rounds of sampling and updates; 0 only evaluates")
    prompts_per_iteration: int = setting(1000, "m: prompts sampled for in a round")
    samples_per_prompt: int = setting(32, "n: outputs per prompt (paper: 32)")
    updates_per_iteration: int = setting(250, "k: updates in a round")
    batch_size: int = setting(8, "prompts in an update")
    max_prompt_tokens: int | None = setting(None, "longer prompts are left out; all that fits if not given")
    max_new_tokens: int = setting(64, "outputs are truncated there")
    learning_rate: float = setting(1e-5, "AdamW (paper: 1e-5)")
    lr_scheduler_type: str = setting("linear", "as in transformers, over the whole run", SCHEDULES)
    warmup_steps: int = setting(0, "updates over which the learning rate rises to its value")
    weight_decay: float = setting(0.1, "AdamW (paper: 0.1)")
    adam_beta1: float = setting(0.9, "AdamW (paper: 0.9)")
    adam_beta2: float = setting(0.95, "AdamW (paper: 0.95)")
    lora_rank: int = setting(8, "0 trains all parameters (paper: 8 for summaries, 64 for dialogue)")
    lora_alpha: int = setting(32, "LoRA's scale is alpha / rank (paper: 32 and 16)")
    load_in_4bit: bool = setting(False, "base model in 4 bits; needs pip install bitsandbytes")
    outputs_per_forward: int | None = setting(None, "outputs in the model at once; all n if not given")
    eval_prompts: int = setting(500, "prompts per evaluation; 0: the whole split")
    eval_every: int | None = setting(None, "updates between evaluations; a round, at most 1000")
    greedy: bool = setting(False, "evaluate the most likely output instead of a sampled one")
    select_by: str | None = setting(None, "the model that is kept; win_rate (paper) if possible", SELECTIONS)


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(transformers.HfArgumentParser):
    def add_argument(self, *names, **arguments):
        return super().add_argument(*reversed(names), **arguments)  # hyphens first in --help

    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv):
    """Command line -> Settings: what was typed, else what goes with the model, else the default."""
    about = "BRAIn: train a policy to be the posterior p(y|x, G=1)."
    example = "example: python brain.py --model MODEL --reward-model REWARD_MODEL --dataset prompts.jsonl"
    parser = Parser(Settings, description=about, epilog=example, allow_abbrev=False)
    typed, _ = parser.parse_known_args(argv)
    known = dict(COMPANIONS.get(typed.model, {}))
    if typed.reward_model or typed.reward_function:  # so not with the companion's template
        known = {name: value for name, value in known.items() if not name.startswith("reward_")}
    if typed.dataset:
        known.pop("pairs_dataset", None)
    adapter = None if typed.model == "toy" else adapter_config(typed.model)
    if adapter:  # the policy starts as a copy of this adapter
        known |= {"lora_rank": adapter["r"], "lora_alpha": adapter["lora_alpha"]}
    parser.set_defaults(**known)
    s, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    refuse_if(unknown, f"{' '.join(unknown)}: no such flag; see --help")
    for name, lowest in LOWEST.items():
        value = getattr(s, name)
        fits = value is None or lowest <= value < math.inf
        refuse_if(not fits, f"{flag(name)} {value}: give a finite number, at least {lowest}")
    for name in ("learning_rate", "beta"):
        value = getattr(s, name)
        refuse_if(not 0 < value < math.inf, f"{flag(name)} {value}: give a finite number above 0")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(s, name)
        refuse_if(value >= 1, f"{flag(name)} {value}: give a number below 1")
    if adapter and s.lora_rank:
        for name in ("lora_rank", "lora_alpha"):
            same = getattr(s, name) == known[name]
            refuse_if(not same, f"{flag(name)}: is {known[name]} in the adapter {s.model}; leave it out")
    refuse_if(s.seed >= 2**64, f"--seed {s.seed}: give a number below 2^64")
    check(s)
    return s


def adapter_config(name):
    """The config of the LoRA adapter that --model names, or None if it is a whole model."""
    path = find(os.path.expanduser(name), "adapter_config.json")
    if path is None:
        return None
    config = json.loads(Path(path).read_text())
    is_lora = config.get("peft_type") == "LORA"
    refuse_if(not is_lora, f"--model {name}: an adapter that is not LoRA; merge it into its base")
    return config


def check(s):
    """Refuses settings that do not go together, and settles those that depend on others."""
    names = ("model", "base_model", "tokenizer", "reward_model", "reward_base", "reward_function")
    for name in (*names, "dataset", "pairs_dataset", "output_dir"):
        if getattr(s, name):
            setattr(s, name, os.path.expanduser(getattr(s, name)))
    if s.model == "toy":
        own = [f.name for f in dataclasses.fields(s) if f.name.startswith(("reward_", "dataset"))]
        for name in (*own, "pairs_dataset", "base_model", "tokenizer", "load_in_4bit", "lora_rank"):
            refuse_if(getattr(s, name), f"{flag(name)}: the toy world has its own; name a model with --model")
        refuse_if(s.device not in (None, "cpu"), "--device: the toy world runs on the CPU; leave it out")
        refuse_if(s.max_new_tokens > 5, "--max-new-tokens: the toy world lists all outputs; give at most 5")
        s.device = "cpu"
    else:
        refuse_if(not s.dataset, "--dataset: missing; give a hub name, directory, .jsonl, .parquet or .csv")
        check_reward(s)
    if METHODS[s.method].source == "data":
        s.samples_per_prompt = 2  # a pair is what the data has
    n = s.samples_per_prompt
    odd = METHODS[s.method].group_size and n % 2
    refuse_if(odd, f"--samples-per-prompt {n}: --method {s.method} makes pairs; give an even number")
    refuse_if(s.resume and s.overwrite, "--resume: not with --overwrite; give one of them")
    refuse_if(s.resume and not s.output_dir, "--resume: give the --output-dir of the run")
    no_draws = s.greedy and s.select_by == "elbo"
    refuse_if(no_draws, "--select-by elbo: needs sampled outputs; leave --greedy out")
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(:\d+)?", s.device)
    refuse_if(not known, f"--device {s.device}: give cpu, cuda or cuda:1")
    missing = s.device != "cpu" and int(s.device[5:] or 0) >= torch.cuda.device_count()
    refuse_if(missing, f"--device {s.device}: there is no such GPU; give --device cpu")
    if s.load_in_4bit:
        missing = importlib.util.find_spec("bitsandbytes") is None
        refuse_if(missing, "--load-in-4bit: needs bitsandbytes; pip install bitsandbytes")
        refuse_if(not s.lora_rank, "--load-in-4bit: trains an adapter; give a --lora-rank above 0")
    # A step of 1e-5 is below the precision of bfloat16, so training all parameters defaults to float32.
    s.dtype = s.dtype or ("bfloat16" if s.device != "cpu" and s.lora_rank else "float32")
    s.eval_every = s.eval_every or min(1000, s.updates_per_iteration)


def check_reward(s):
    """Refuses flags of the reward that do not go together."""
    given = [name for name in ("reward_model", "reward_function") if getattr(s, name)]
    refuse_if(not given, "--reward-model or --reward-function: missing; give one of them")
    refuse_if(len(given) == 2, "--reward-model or --reward-function: give one of them, not both")
    for name in ("reward_base", "reward_template", "reward_label"):
        both = s.reward_function and getattr(s, name)
        refuse_if(both, f"{flag(name)}: belongs to a --reward-model; leave it out")
    template = s.reward_template or "{prompt}{output}"
    wrong = set(re.findall(r"\{([^{}]*)\}", template)) - {"prompt", "output"} or "{output}" not in template
    refuse_if(wrong, f"--reward-template {template}: needs {{output}}, may have {{prompt}}, no other braces")


def plan(s, base):
    """Says what the models will take before any is loaded, and settles --max-prompt-tokens and --goodness."""
    flag_name = "--base-model" if s.base_model else "--model"
    config = load(transformers.AutoConfig, base, flag_name)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    refuse_if(not causal, f"{flag_name} {base}: a {config.model_type} model, which is not a causal LM")
    context = context_of(config)
    full = s.max_new_tokens >= context
    refuse_if(full, f"--max-new-tokens {s.max_new_tokens}: leaves no room in a context of {context}")
    s.max_prompt_tokens = int(min(s.max_prompt_tokens or math.inf, context - s.max_new_tokens, 2**20))
    sizes = {f"policy and prior: {s.model}": (transformers.AutoModelForCausalLM, config)}
    if s.reward_model:
        source, flag_name = s.reward_model, "--reward-model"
        bare = bare_checkpoint(s.reward_model, s.reward_base)
        adapter = find(s.reward_model, "adapter_config.json")
        if bare:
            source, flag_name = s.reward_base, "--reward-base"
        elif adapter:  # it has no config of its own
            source = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        config = load(transformers.AutoConfig, source, flag_name)
        if bare or adapter and s.reward_label is None:  # as in RewardModel.from_pretrained
            config.num_labels = 1
        if config.num_labels > 1:
            s.goodness = s.goodness or "logistic"  # section 5: the log-odds of a label are a logit
        sizes[f"reward: {s.reward_model}"] = (transformers.AutoModelForSequenceClassification, config)
    s.goodness = s.goodness or "bradley-terry"
    for name, (kind, config) in sizes.items():
        with torch.device("meta"):  # a model without storage
            count = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
        size = count * getattr(torch, s.dtype).itemsize
        print(f"{size / 1e9:9.3f} GB  {name}, {count:,} parameters")


def load_policy_and_reward(s, base, adapter, tokenizer):
    """-> (Policy, reward) of a real run"""
    dtype, bound = getattr(torch, s.dtype), s.outputs_per_forward
    if s.reward_function:
        reward = RewardFunction.from_file(s.reward_function)
    else:
        settings = {"dtype": dtype, "device": s.device, "label": s.reward_label, "outputs_per_forward": bound}
        names = (s.reward_model, s.reward_base, s.reward_template)
        reward = RewardModel.from_pretrained(*names, tokenizer, **settings)
    arguments = {"dtype": dtype, "device_map": {"": s.device}}
    if s.load_in_4bit:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    flag_name = "--base-model" if adapter else "--model"
    model = load_model(transformers.AutoModelForCausalLM, base, flag_name, **arguments)
    if adapter:
        import peft

        try:
            with warnings.catch_warnings():
                # Without this, an adapter for another architecture would load as no adapter at all.
                warnings.filterwarnings("error", "Found missing adapter keys")
                model = peft.PeftModel.from_pretrained(model, adapter)
        except pickle.UnpicklingError:
            raise UserError(f"--model {adapter}: holds code; give a file of tensors") from None
        except (ValueError, RuntimeError, UserWarning) as error:
            problem = f"does not fit {base}: {first_line(error)}"
            raise UserError(f"--model {adapter}: {problem}; give its base with --base-model") from None
    return Policy(model, tokenizer, s.lora_rank, s.lora_alpha, bound), reward


def open_directory(s):
    """Where to write. Refuses what must not be touched, and touches nothing."""
    name = re.sub(r"\W", "-", f"{s.model}-{s.method}-") + time.strftime("%Y%m%d-%H%M%S")
    path = Path(s.output_dir or f"runs/{name}")
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    writable = above.is_dir() and os.access(above, os.W_OK)
    refuse_if(not writable, f"--output-dir {path}: cannot be written; name another directory")
    config = path / "config.json"
    before = json.loads(config.read_text()) if config.is_file() else {}
    is_run = "samples_per_prompt" in before  # a saved model has a config.json, too
    if not is_run:
        refuse_if(s.resume, f"--resume: {path} holds no run; start it without --resume")
        others = path.exists() and any(path.iterdir())
        refuse_if(others, f"--output-dir {path}: holds other files; name another")
    elif not s.resume:
        refuse_if(not s.overwrite, f"--output-dir {path}: holds a run; give --resume or --overwrite")
    return path


def write_config(path, s):
    """config.json: the settings, and versions that numbers depend on.

    A run that is resumed must have the same settings, but for a few. More --iterations extend it: the
    learning rates of the updates that are added are those of the longer run.
    """
    versions = {library.__name__: library.__version__ for library in (torch, transformers, np)}
    now = dataclasses.asdict(s) | versions
    if s.resume:
        before = json.loads((path / "config.json").read_text())
        free = {"output_dir", "resume", "overwrite", "device", "outputs_per_forward", *versions}
        if s.iterations > before["iterations"]:
            free.add("iterations")
        changed = ", ".join(flag(name) for name in now if name not in free and before.get(name) != now[name])
        refuse_if(changed, f"--resume: the run in {path} has another {changed}; give that of the run")
        if "iterations" not in free:
            return
        print(f"extended from {before['iterations']} to {s.iterations} iterations")
        (path / "report.png").unlink(missing_ok=True)  # it marks a finished run
        now = before | {"iterations": s.iterations}
    path.mkdir(parents=True, exist_ok=True)
    if not s.resume:
        for name in RUN_DIRECTORIES:  # of a run that is replaced
            shutil.rmtree(path / name, ignore_errors=True)
        for name in RUN_FILES:
            (path / name).unlink(missing_ok=True)
    unfinished = path / "unfinished.json"
    unfinished.write_text(json.dumps(now, indent=1) + "\n")
    unfinished.replace(path / "config.json")


def join_processes(s):
    """Under torchrun: one of several processes, on a GPU of its own. Only the first one prints."""
    if "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():
        if s.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if s.device == "cuda" else "gloo")
        if torch.distributed.get_rank():
            sys.stdout = open(os.devnull, "w")


def prepare_toy(s):
    """-> (Toy, Policy, reward, data) of the default run"""
    from toy.world import Toy  # it lists all its outputs, so its posterior is known exactly

    torch.set_num_threads(1)  # its tensors are tiny: threads would only wait for each other
    s.goodness = s.goodness or "bradley-terry"
    toy = Toy(s.seed, s.dtype, s.goodness, length=s.max_new_tokens, beta=s.beta)
    data = load_data(s, toy.tokenizer, toy.splits())
    return toy, Policy(toy.model, toy.tokenizer), RewardFunction(toy.world.reward_of, "toy"), data


def prepare_models(s):
    """-> (Policy, reward, data) of a real run. Small things are checked before large ones are loaded."""
    config = adapter_config(s.model)
    adapter = s.model if config else None
    refuse_if(s.base_model and not config, f"--base-model: {s.model} is not an adapter; leave it out")
    base = s.base_model or (config.get("base_model_name_or_path") if config else s.model)
    refuse_if(not base, f"--model {s.model}: an adapter that does not name its base; give --base-model")
    plan(s, base)
    if s.tokenizer and s.tokenizer != COMPANIONS.get(s.model, {}).get("tokenizer"):
        tokenizer = load_tokenizer(s.tokenizer, None, "--tokenizer")
    else:
        tokenizer = load_tokenizer(s.model, base if adapter else s.tokenizer, "--model")
    endless = tokenizer.eos_token_id is None
    refuse_if(endless, f"--model {s.model}: its tokenizer has no end token; set eos_token there")
    data = load_data(s, tokenizer)
    torch.manual_seed(s.seed)  # LoRA starts at random, alike in all processes
    policy, reward = load_policy_and_reward(s, base, adapter, tokenizer)
    if s.reward_model:
        for prompts in data:
            prompts.leave_out_unfit(reward)
    return policy, reward, data


def execute(s):
    """From settings to a report."""
    path, toy = open_directory(s), None
    if s.model == "toy":
        toy, policy, reward, data = prepare_toy(s)
    else:
        policy, reward, data = prepare_models(s)
    best = "self_normalized_kl" if s.greedy else "elbo"
    s.select_by = s.select_by or ("win_rate" if data[1].gold else best)
    no_gold = s.select_by == "win_rate" and not data[1].gold
    refuse_if(no_gold, "--select-by win_rate: the data has no gold answers; give elbo")
    for prompts in data:
        print(prompts.summary)
    count = min(s.prompts_per_iteration, len(data[0]))
    print(f"{s.method}, beta {s.beta:g}, goodness {s.goodness}; the model is kept by {s.select_by}")
    print(f"{s.iterations} rounds of {count:,} prompts x {s.samples_per_prompt} outputs, then "
          f"{s.updates_per_iteration:,} updates of {s.batch_size} prompts")  # fmt: skip
    first = data[1][0]
    reward(first.prompt, [first.gold or " "] * 2, first.columns)  # what it refuses, it refuses now
    run = Run(path, s, reward, *data)
    run.path = Path(run.gather([str(path)])[0])  # that of the first process: a default name contains the time
    if run.rank == 0:
        write_config(run.path, s)
    run.gather([])
    if (run.path / "report.png").exists():  # the last file that is written
        print(f"{run.path}: this run is finished; its best model is {run.path / 'model'}")
        return
    print(f"run: {run.path}", flush=True)
    train(policy, reward, data[0], s, run)
    load_policy(policy, run.path / "model")
    metrics = run.evaluate(policy, run.kept, "test")
    unlearned = s.iterations and run.kept == 0
    run.warn_if(unlearned, "no evaluation beat the first one, so model/ is the untrained prior")
    if run.rank == 0:
        if toy:
            toy.report(policy.model, run.path / "toy.png", metrics)
        run.report()
        print(f"{run.path}: model/ is the policy of update {run.kept}, the best by {s.select_by}")


def main(argv=None):
    """-> exit code: 0; 2 for what the user can fix, with one line on stderr; 130 if interrupted."""
    transformers.utils.logging.set_verbosity_error()  # `load_model` refuses what matters of its warnings
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    try:
        settings = parse(sys.argv[1:] if argv is None else list(map(str, argv)))
        join_processes(settings)
        execute(settings)
        return 0
    except UserError as error:
        print(f"brain: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"brain: {first_line(error)}; lower --outputs-per-forward", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbrain: interrupted; --resume with its --output-dir continues", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
