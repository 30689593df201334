"""BRAIn: Bayesian Reward-conditioned Amortized Inference (Pandey et al., 2024), in one file.

A language model p(y|x), the prior, writes outputs y for a prompt x. A reward model says how good an output
is. Let G = 1 be the event that the output is good. Bayes' rule gives the distribution of good outputs, the
posterior:

    p(y|x, G=1)  =  p(y|x) p(G=1|y,x) / p(G=1|x)                                             (eq. 1)

We can evaluate it up to its normaliser p(G=1|x), but we cannot sample from it token by token: the probability
of a next token would need a sum over all its continuations. BRAIn trains a policy q_theta, a second language
model that starts as a copy of p, until it samples from the posterior. For a prompt it draws n outputs from a
proposal q' (an earlier state of the policy) and gives each output two weights:

    alpha_hat_i  proportional to  p(y_i|x) p(G=1|y_i,x) / q'(y_i|x)     the posterior's weight   (eq. 6)
    beta_hat_i   proportional to  q_theta(y_i|x) / q'(y_i|x)            the policy's weight      (eq. 11)

Each set of n weights is normalised to sum to 1. The gradient estimate of the paper is

    sum_i (alpha_hat_i - beta_hat_i) grad log q_theta(y_i|x)                                 (eq. 12)

It raises the outputs that the policy underweights relative to the posterior, and lowers those that it
overweights. At q_theta = posterior, alpha_hat equals beta_hat for every draw, so the estimate is exactly zero
there.

Which objective does a step along eq. 12 lower? The gradient of KL(posterior || q_theta) is minus the mean of
grad log q_theta under the posterior. The mean under q_theta itself is zero, so it can be added. Minus eq. 12
estimates both means by weighted draws of q'. As an estimate of this gradient it is biased, because the
weights are normalised by sums over the same n draws; the bias vanishes as n grows. Of another gradient it is
an unbiased estimate for every n, that of

    D_n(theta)  =  E_{y_1 .. y_n ~ q'}  D_KL(alpha_hat || beta_hat)                          (eq. 13)

the self-normalised KL divergence between posterior and policy for a fixed proposal q' (Theorem 4.2, derived
in the docstring of `brain_loss`). D_n is zero only at the posterior (Theorem 4.3), provided that n >= 2 and
that q' can draw every output. If D_n is zero, the weights agree on every draw, so any two outputs have the
same ratio of posterior to policy. This ratio is 1, as both sum to 1. With n = 1 both weights are 1, so
D_1 = 0 for every policy. Both divergences are forward: the posterior, or its weights, come first, so a policy
pays for every good output that it misses.

    python brain.py                                                  a toy world (toy/) with a known posterior
    python brain.py --model CarperAI/openai_summarize_tldr_sft       the paper's summarisation model
    pytest                                                           the mathematical claims, checked

Part I is the method. It can be read on its own. Part II runs it on real models, and nothing in it is needed
to understand Part I.

Map                                     paper                         here
    goodness from a reward              section 5, eq. 15 and 19      log_goodness
    posterior weights alpha_hat         eq. 6, 20, 21                 posterior_weights
    policy weights beta_hat             eq. 11                        policy_weights
    self-normalised KL divergence       eq. 13 and 14                 self_normalized_kl
    loss of gradient minus eq. 12       eq. 12, Theorem 4.2           brain_loss
    DPO                                 section 6, Theorem 6.1        dpo_loss, METHODS
    how far from the posterior          eq. 1, Theorem 7.1            elbo, log_evidence, and their gap
    rows of Tables 1 and 3              section 9                     METHODS, rejection_sample
    the training loop                   Algorithm 1                   train, collect, update
    win-rate                            section 8                     win_rate

Departures from the paper, cited in the code by number.
 1. Line 9 of Algorithm 1 normalises alpha_hat inside the loop over y. We normalise once all n outputs are
    there.
 2. Line 19 sums the loss over the batch. We take the mean, so that the loss does not depend on the batch
    size. Adam is invariant to this factor, up to its epsilon.
 3. AdamW, where the paper says Adam with weight decay.
 4. A tie counts half in a win-rate. The paper counts strictly higher rewards, so that two equal models score
    below 50.
 5. The paper does not give the numbers of rounds, prompts and updates (e, m, k), the batch size or how
    evaluation decodes. Those defaults are ours.
 6. An argmax over tied outputs shares the weight equally: the limit of a softmax as its temperature goes to
    0.
 7. The learning rate decays linearly to zero. The paper names no schedule. A constant rate leaves Adam's
    noise in the parameters: the default run, on the toy world, ends at KL(posterior || policy) = 0.073 nats
    with the linear decay, and at 0.153 with `--lr-scheduler-type constant`.
 8. RSO draws 4n candidates and keeps n. Without extra candidates it would reject nothing.
 9. `beta` tempers the goodness. The paper has beta = 1.
Eq. 29 of the paper has a misprint: grad log beta_i is grad log q_theta(y_i|x), without the factor beta_i in
front.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import filelock
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

# ==========================================================================================
# Part I: the method
# ==========================================================================================
#
# 1. The mathematics
#
# These are pure functions; all but the last take tensors. The n outputs of one prompt lie on the last axis;
# any axes may stand before it. Everything stays a logarithm, in nats, until the last step: exp(reward)
# overflows float32 above 88.


def log_goodness(reward, model="bradley-terry", beta=1.0):
    """log p(G=1|y,x) / beta, up to a constant that depends only on x. Rewards of any shape -> the same shape

    "bradley-terry"  r itself (eq. 19). A reward model trained on preferences only knows differences of log
                     p(G=1), so the constant is unknown. It cancels in alpha_hat.
    "logistic"       log sigmoid(r) (eq. 15): r is the logit of a classifier that tells good outputs from bad
                     ones.
    The choice matters. Under "logistic" two outputs with high rewards count as equally good.

    With beta (departure 9; not the beta_i of eq. 11) the posterior is proportional to p(y|x)
    p(G=1|y,x)^(1/beta). By Theorem 7.1 that is the policy that maximises E[log p(G=1|y,x)] - beta
    KL(policy || prior), for Bradley-Terry the objective of PPO and DPO. With beta above 1 the policy stays
    nearer the prior, with beta below 1 it chases the reward.
    """
    if model == "bradley-terry":
        return reward / beta
    if model == "logistic":
        return F.logsigmoid(reward) / beta  # stable; sigmoid(r) is 0 below about r = -89
    raise ValueError(f"unknown goodness model {model!r}: give 'bradley-terry' or 'logistic'")


def posterior_weights(log_p, log_q_proposal, log_good):
    """alpha_hat (eq. 6), the posterior's weights of n outputs. Arguments (..., n). -> (..., n), sums to 1

    alpha_i = p(y_i|x) p(G=1|y_i,x) / q'(y_i|x). The normaliser p(G=1|x) is the same for all i and cancels.
    Dividing by q' matters: without it, an output that a renewed proposal favours counts twice, once because
    it was drawn often and once because of its reward.

    For Bradley-Terry this is softmax(r + log p - log q') (eq. 20). Where q' = p it is softmax(r) (eq. 21). An
    argmax in place of this softmax throws away the size of the gap between two rewards, and with it how
    confident we are that one output is better.
    """
    return torch.softmax(log_p - log_q_proposal + log_good, dim=-1)


def policy_weights(log_q, log_q_proposal):
    """beta_hat (eq. 11), the policy's weights of n outputs. Arguments (..., n). -> (..., n), sums to 1

    beta_i = q_theta(y_i|x) / q'(y_i|x). At the start of a round, before its first update, q_theta is the
    proposal that drew the samples of this round. For those, every beta_i is 1, and every beta_hat_i is 1/n.
    (For methods with q' = p, this holds only before the first update of the run.)
    """
    return torch.softmax(log_q - log_q_proposal, dim=-1)


def self_normalized_kl(alpha_hat, beta_hat):
    """D_KL(alpha_hat || beta_hat) (eq. 14). Arguments (..., n). -> (...), nats. Its mean over draws estimates
    D_n.

    0 log 0 is 0: an output without posterior weight costs nothing, however unlikely the policy finds it. The
    result is infinite where beta_hat is 0 and alpha_hat is not. For reading and for tests: a run takes the
    same number from `brain_loss`, which works on log beta_hat, because beta_hat itself underflows.
    """
    log_beta = torch.where(alpha_hat > 0, beta_hat, 1.0).log()  # masked before the logarithm: 0 * -inf is nan
    # kl_div(b, a) is a (log a - b): it takes the second distribution first, as a logarithm.
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
    beta_hat. The logsumexp counts once, because the alpha_hat_i sum to 1. So the gradient of this loss is
    minus eq. 12 for every draw. For outputs drawn from a fixed q' the gradient passes inside the expectation
    of eq. 13, which proves Theorem 4.2.

    The paper introduces the beta_hat term as a baseline: it estimates E_q[grad log q] = 0 (eq. 8 to 10) from
    the same draws. baseline=False leaves it out and gives -sum_i alpha_hat_i log q_i. Its gradient is minus
    eq. 7, that is -sum_i alpha_hat_i grad log q_i (section 9.3). A step along it raises every output, bad
    ones a little too. At the posterior it still has noise, and a bias from the normalised weights, whereas
    eq. 12 is zero for every draw.

    With n = 2, q' = p and alpha_hat = (1, 0) the loss is -log beta_hat_1. A softmax of two is the sigmoid of
    their difference, so this is the DPO loss (Theorem 6.1).
    """
    alpha_hat, log_q_proposal = alpha_hat.detach(), log_q_proposal.detach()
    if not baseline:
        return -(alpha_hat * log_q.where(alpha_hat > 0, 0.0)).sum(-1).mean()
    # log_softmax, not policy_weights(...).log(): a weight below e^-104 is 0 in float32. The mask is that of
    # `self_normalized_kl`; the normaliser still contains every output.
    log_beta = torch.log_softmax(log_q - log_q_proposal, dim=-1).where(alpha_hat > 0, 0.0)
    return F.kl_div(log_beta, alpha_hat, reduction="none").sum(-1).mean()


def dpo_loss(log_q_chosen, log_q_rejected, log_p_chosen, log_p_rejected, beta=1.0):
    """The DPO loss (eq. 7 of Rafailov et al., 2023), all arguments (...). -> scalar, mean

    For comparison only; training never calls it. Its value is that of `brain_loss` for n = 2, q' =
    p and alpha_hat = (1, 0), with beta times each log-probability (Theorem 6.1 has beta = 1; TRL's default is
    0.1).
    """
    return -F.logsigmoid(beta * ((log_q_chosen - log_p_chosen) - (log_q_rejected - log_p_rejected))).mean()


def effective_sample_size(weights):
    """1 / sum_i w_i^2 of weights (..., n) that sum to 1. -> (...): n if all are equal, 1 if one weight is
    1."""
    return 1 / weights.square().sum(-1)


# How far is a policy q from the posterior? On a real model nobody can enumerate the outputs, but with
# w(y) = p(y|x) p(G=1|y,x) / q(y|x) two averages over draws y ~ q give a partial answer:
#
#     E_q[log w]           =   log p(G=1|x) - KL(q || posterior)    the evidence lower bound, `elbo`
#     E[log mean_i w_i]    <=  log p(G=1|x)                         the n-draw bound, `log_evidence`
#
# The first holds because w(y) = p(G=1|x) p(y|x, G=1) / q(y|x), by eq. 1. The second is Jensen's inequality,
# with E_q[w] = p(G=1|x). It rises to log p(G=1|x) with n.
#
# Hence the gap log_evidence - elbo is, in expectation, a lower bound of KL(q || posterior). This is the
# reverse of the divergence that training lowers. A large gap shows that q is far. A small gap does not prove
# that q is near: it cannot show good outputs that q never draws. D_n on draws of the prior shows those, see
# `held_out_divergence`. Bradley-Terry leaves a constant of log p(G=1|x) unknown, which cancels in the gap.
# With beta, p(G=1|y,x)^(1/beta) and its mean under p stand for p(G=1|y,x) and p(G=1|x).


def elbo(log_p, log_q, log_good):
    """The evidence lower bound from n draws of q. Arguments (..., n). -> (...), nats

    Mean log goodness minus an estimate of KL(q || p): what Theorem 7.1 maximises, divided by beta.
    """
    return (log_p + log_good - log_q).mean(-1)


def log_evidence(log_p, log_q, log_good):
    """A lower bound of log p(G=1|x), in expectation, from n draws of q. Arguments (..., n). -> (...), nats"""
    return (log_p + log_good - log_q).logsumexp(-1) - math.log(log_p.shape[-1])


def win_rate(rewards, gold_rewards):
    """(per cent of prompts whose output has the higher reward, half-width of the 95% interval).

    Takes two sequences of N rewards. Ties count half (departure 4). The interval is the normal one, as in
    Table 1, for one output per prompt. `evaluate` has n, so its interval comes from the spread between
    prompts. ValueError if N = 0 or the lengths differ.
    """
    ours, gold = np.asarray(rewards, dtype=float), np.asarray(gold_rewards, dtype=float)
    if ours.shape != gold.shape or ours.size == 0:
        raise ValueError(f"{ours.size} rewards and {gold.size} gold rewards: give one of each per prompt")
    won = float(np.where(ours == gold, 0.5, ours > gold).mean())
    return 100 * won, 196 * math.sqrt(won * (1 - won) / ours.size)


# ------------------------------------------------------------------------------------------
# 2. The methods of Tables 1 and 3
#
# Each is a row of settings for the same code: BRAIn, and BRAIn with some of its parts replaced.


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes BRAIn from its baselines.

    source      where the n outputs of a prompt come from:
                "policy"  the proposal q' is the policy at the start of the round (line 21 of Algorithm 1)
                "prior"   q' = p in every round (section 9.5)
                "rso"     4n draws from p, of which `rejection_sample` keeps n
                "data"    the data's own pair (chosen, rejected), so n = 2
    group_size  how many outputs are normalised together. None: all n. With 2, 32 outputs are 16 pairs.
    argmax      give all weight to the best output of a group (for "data", to the human choice), instead of
                the softmax of eq. 6. These methods record q' = p, so the best output is the one with the
                highest reward. beta would do nothing in an argmax, so `--beta` scales log q - log q' in the
                loss instead, as in DPO.
    baseline    subtract the baseline of eq. 10. Without it the loss has the gradient minus eq. 7 (9.3).
    """

    source: str = "policy"
    group_size: int | None = None
    argmax: bool = False
    baseline: bool = True

    def grouped(self, x):
        """(n,) -> (groups, group size). A single output, as with `--greedy`, is one group."""
        return x.reshape(-1, min(self.group_size or len(x), len(x)))

    def alpha_hat(self, log_p, log_q_proposal, log_good):
        """Posterior weights, normalised within each group. Arguments (n,). -> (n,)

        For "data" the arguments are human pairs. Evaluations do not use the result (for the one output of
        `--greedy` it is empty).
        """
        if self.source == "data":  # the human choice is the first output of a pair
            return torch.tensor([1.0, 0.0]).repeat(len(log_p) // 2).to(log_p)
        log_p, log_q_proposal, log_good = map(self.grouped, (log_p, log_q_proposal, log_good))
        if not self.argmax:
            return posterior_weights(log_p, log_q_proposal, log_good).reshape(-1)
        score = log_p - log_q_proposal + log_good
        best = (score == score.amax(-1, keepdim=True)).to(score)
        return (best / best.sum(-1, keepdim=True)).reshape(-1)  # departure 6


# Names as in Table 3: iw for importance weights, the softmax in place of the argmax; n for groups of all n.
METHODS = {
    "brain": Method(),
    "brain-no-baseline": Method(baseline=False),
    "dpo-sft+iw+n": Method("prior"),  # all n outputs, weighted by softmax(r): BRAIn with a fixed proposal
    "dpo-sft+iw": Method("prior", group_size=2),  # pairs, weighted by the softmax instead of the argmax
    "dpo-sft": Method("prior", group_size=2, argmax=True),  # DPO on pairs of the prior, the SFT model
    "rso": Method("rso", group_size=2, argmax=True),  # DPO on pairs of draws nearer to the posterior
    "dpo": Method("data", group_size=2, argmax=True),  # DPO on human pairs
}


def rejection_sample(log_good, n, generator=None):
    """n of N candidates drawn from the prior, by statistical rejection sampling (Liu et al., 2023). -> (n,)
    indices

    log_good (N,), N >= n. A candidate of log goodness g is accepted with probability exp(g - g_max). Accepted
    ones leave the pool and g_max is recomputed over the rest, until n are kept. It is an approximation: exact
    sampling from the posterior would need an upper bound over all outputs, and candidates that never run out.
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
# The language model and its reward are used through three calls:
#     policy.sample_together(prompts, n, max_new_tokens, prior, generators)
#                                                   n outputs of each prompt, drawn from q_theta or p
#     policy.log_prob(prompt_ids, outputs, prior)   the log-probabilities of a prompt's outputs, (n,)
#     reward(prompt, texts, columns)                their rewards, (n,); columns: the other columns of the
#                                                   prompt's row
# With `--greedy`, an evaluation also calls sample_together(prompts, 1, max_new_tokens, greedy=True).
# The policy also gives the text of an output, whether it ended by itself, and its trained parameters,
# {name: parameter}.
#
# `train` also calls `run`, which logs, evaluates, saves and resumes. To follow the method, read
#     run.start(...)               as nothing
#     run.collect(t, rows, draw)   as draw(rows)
#     run.steps(t)                 as range((t - 1) k + 1, t k + 1), the k updates of round t
#     run.after_update(...)        as nothing
# A resumed run passes through its finished rounds again: collect then returns what was stored, and steps is
# empty.


@dataclasses.dataclass
class Samples:
    """One prompt of D_t with its n outputs and what Algorithm 1 caches about them (lines 8 and 9)."""

    iteration: int  # the round t that drew them
    example: object  # the prompt x: its text, ids (P,), gold answer, human pair, row and other columns
    outputs: list  # n LongTensors (T_i,)
    texts: list  # n strings
    reward: torch.Tensor  # (n,)
    log_p: torch.Tensor  # (n,)
    log_q_proposal: torch.Tensor  # (n,); log p for every source but "policy"
    alpha_hat: torch.Tensor  # (n,)


# Each purpose has its own stream of random numbers. Every random number of training and evaluation follows
# from (seed, purpose, indices), so there is no random state to save, and a killed run continues with the same
# numbers.
PROMPTS, OUTPUTS, BATCHES, HELD_OUT = range(4)


def seeded(*numbers):
    """A CPU generator whose stream depends on these numbers only."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))  # 63 bits are enough


def random_subset(size, count, *numbers):
    """min(count, size) distinct indices below size, in random order."""
    return torch.randperm(size, generator=seeded(*numbers))[:count].tolist()


def train(policy, reward, data, settings, run):
    """Algorithm 1, with the paper's line numbers. Trains `policy` in place and returns it.

    policy    Policy: p, q' and q_theta. They are equal at first (line 1).
    reward    reward(prompt, texts, columns) -> (n,): r(x, y)
    data      list of Example: D
    settings  Settings: e is iterations, m prompts_per_iteration, n samples_per_prompt, k
              updates_per_iteration
    run       Run: see above
    """
    options = {"betas": (settings.adam_beta1, settings.adam_beta2), "weight_decay": settings.weight_decay}
    # Departures 3 and 7. Every update sets its own learning rate. Of the scheduler only its function is used,
    # which maps a step to a factor (lr_lambdas), so it has no state to save.
    optimizer = torch.optim.AdamW(policy.parameters().values(), **options)
    total = settings.iterations * settings.updates_per_iteration
    schedule = transformers.get_scheduler(settings.lr_scheduler_type, optimizer, settings.warmup_steps, total)
    buffer = []  # line 2: D_0
    source = METHODS[settings.method].source
    run.start(policy, optimizer)
    for t in range(1, settings.iterations + 1):  # line 3
        # line 4: S_t
        prompts = random_subset(len(data), settings.prompts_per_iteration, settings.seed, PROMPTS, t)

        def draw(rows):
            generators = [seeded(settings.seed, OUTPUTS, t, i) for i in rows]
            return collect(policy, reward, [data[i] for i in rows], settings, source, generators, t)

        buffer += run.collect(t, prompts, draw)  # lines 5 to 12: D_t keeps the samples of all rounds
        for step in run.steps(t):  # line 13
            chosen = random_subset(len(buffer), settings.batch_size, settings.seed, BATCHES, step)  # line 14
            optimizer.param_groups[0]["lr"] = settings.learning_rate * schedule.lr_lambdas[0](step - 1)
            metrics = update(policy, optimizer, [buffer[i] for i in chosen], settings)  # lines 15 to 19
            run.after_update(step, metrics)
        # Line 21, q' <- q_theta, needs no code: the next round samples from the current q_theta.
    return policy  # line 23


@torch.no_grad()
def collect(policy, reward, examples, settings, source, generators, iteration=0):
    """Lines 6 to 10 for some prompts: draw n outputs of each, and cache their log q', log p, reward and
    alpha_hat. -> a list of Samples

    Old samples can be used in later rounds. Each keeps the log q' of the proposal that drew it, and p is
    fixed, so alpha_hat does not change. The objective is then D_n averaged over the proposals of all rounds,
    which is still zero only at the posterior.

    source is that of the method in training. Evaluation passes "prior", "policy" or "greedy" for every
    method, and does not use alpha_hat. Every prompt has a generator of its own, so its outputs do not depend
    on the prompts that are drawn with it.
    """
    ids = [example.ids for example in examples]
    if source == "data":
        outputs = [example.pair for example in examples]
    elif source == "greedy":
        outputs = policy.sample_together(ids, 1, settings.max_new_tokens, greedy=True)
    else:
        draws = settings.samples_per_prompt * (4 if source == "rso" else 1)  # line 6, departure 8
        outputs = policy.sample_together(ids, draws, settings.max_new_tokens, source != "policy", generators)
    texts = [[policy.text(x.ids, output) for output in some] for x, some in zip(examples, outputs)]
    rewards = [reward(x.prompt, some, x.columns) for x, some in zip(examples, texts)]  # line 8
    drawn = zip(examples, outputs, texts, rewards, generators)
    return [cache_weights(policy, *one, settings, source, iteration) for one in drawn]


def cache_weights(policy, example, outputs, texts, rewards, generator, settings, source, iteration):
    """Lines 8 and 9 for the outputs of one prompt. -> Samples"""
    if source == "rso":
        log_good = log_goodness(rewards, settings.goodness, settings.beta)
        kept = rejection_sample(log_good, settings.samples_per_prompt, generator)
        outputs, texts, rewards = [outputs[i] for i in kept], [texts[i] for i in kept], rewards[kept]
    # Line 8. The function that scores log q_theta in `update` also scores log q', so beta_hat is exactly 1/n
    # before the first update. The sampler's own sums would differ by rounding.
    log_p = policy.log_prob(example.ids, outputs, prior=True).cpu()
    log_q_proposal = policy.log_prob(example.ids, outputs).cpu() if source == "policy" else log_p
    rewards = rewards.to(log_p)
    log_good = log_goodness(rewards, settings.goodness, settings.beta)
    alpha_hat = METHODS[settings.method].alpha_hat(log_p, log_q_proposal, log_good)  # line 9, departure 1
    return Samples(iteration, example, outputs, texts, rewards, log_p, log_q_proposal, alpha_hat)


def update(policy, optimizer, batch, settings):
    """Lines 15 to 19: one step of theta on a batch of prompts. -> metrics, averaged over the batch, except
    max_weight and grad_norm

    FloatingPointError if the loss, its gradient or a metric is not finite. The parameters are then unchanged.
    """
    method = METHODS[settings.method]
    # See `Method`, argmax. (For rso, beta also decides which draws are kept.)
    scale = settings.beta if method.argmax else 1.0
    optimizer.zero_grad()
    lines = []
    for samples in batch:  # line 15
        log_q = policy.log_prob(samples.example.ids, samples.outputs).cpu()  # (n,), with gradient
        log_q_proposal = method.grouped(scale * samples.log_q_proposal)  # (groups, group size)
        alpha_hat = method.grouped(samples.alpha_hat)
        loss = brain_loss(method.grouped(scale * log_q), log_q_proposal, alpha_hat, method.baseline)  # 16, 17
        (loss / len(batch)).backward()  # line 19's sum, as a mean: departure 2
        ended = float(np.mean([policy.ended(output) for output in samples.outputs]))
        lines.append({"loss": loss.item(), "ended": ended} | diagnostics(samples, log_q.detach(), method))
    metrics = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
    metrics["max_weight"] = max(line["max_weight"] for line in lines)
    # The norm of the whole gradient. With an infinite limit nothing is clipped.
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters().values(), math.inf).item()
    if not all(map(math.isfinite, metrics.values())):
        rows = [samples.example.row for samples in batch]
        raise FloatingPointError(f"loss or gradient not finite for rows {rows}; lower --learning-rate")
    optimizer.step()  # line 19
    return metrics


def diagnostics(samples, log_q, method):
    """What to watch in an update. Weights are never clipped. beta_hat is that of eq. 11, without the scale of
    the argmax methods. -> {name: float}

    `update` adds the loss, `ended` (the share of outputs that were not truncated) and `grad_norm`.

    ess_alpha    effective sample size of alpha_hat, of n (of 2 for pairs; an argmax gives 1, unless there are
                 ties). It rises as q' nears the posterior. Near 1, one output has all the weight: for this n
                 the rewards, or in later rounds r + log p - log q', are too far apart. Raise
                 --samples-per-prompt or --beta, which also moves the posterior.
    ess_beta     effective sample size of beta_hat. It is n (or 2) where q_theta is still the proposal and
                 falls as q_theta leaves the proposals that drew the samples, for those of old rounds most. If
                 it is near 1 in round 1, the policy has moved too far from its samples: lower
                 --updates-per-iteration or --learning-rate. Later, old rounds alone may make it low.
    max_weight   the largest alpha_hat or beta_hat
    reward       mean reward of the stored outputs, not of the present policy
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
    """D_n with q' = p (eq. 13) from n outputs of a prompt that is not trained on. -> float, nats

    Its mean over held-out prompts, with outputs that were drawn once from p, is comparable over a run. Its
    expectation is zero only at the posterior. The loss has other proposals, and for some methods other
    weights, so compare how the two move, not how large they are. If this rises while the loss falls, the
    policy is memorising D_t.
    """
    log_good = log_goodness(samples.reward, settings.goodness, settings.beta)
    alpha_hat = posterior_weights(samples.log_p, samples.log_q_proposal, log_good)
    log_q = policy.log_prob(samples.example.ids, samples.outputs).cpu()
    return brain_loss(log_q, samples.log_q_proposal, alpha_hat).item()


def mean_and_error(values):
    """The mean of values, and its standard error: 0 for a single value, where it is unknown."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def mean_evidence(drawn, settings):
    """elbo and log_evidence of the proposal that drew these Samples: means and standard errors.

    The errors include the spread between prompts. elbo and log_evidence share it, so it cancels in their gap.
    """
    log_good = functools.partial(log_goodness, model=settings.goodness, beta=settings.beta)
    metrics = {}
    for name, bound in {"elbo": elbo, "log_evidence": log_evidence}.items():
        values = [bound(x.log_p, x.log_q_proposal, log_good(x.reward)).item() for x in drawn]
        metrics[name], metrics[f"{name}_standard_error"] = mean_and_error(values)
    return metrics


# ==========================================================================================
# Part II: running it
# ==========================================================================================
#
# What Part I leaves open, in the order in which it is needed: the language model behind `sample` and
# `log_prob` (4), the rewards (5), the data D (6), what an evaluation measures (7), what a run writes and
# reads back (8), and the settings (9). Messages to the user name the flag that fixes the problem.
#
# A run is one process on one device. With LoRA it holds the policy once, since p shares its parameters.
# Without, it holds the policy, a frozen copy of it, the gradients and AdamW's two moments. The reward model
# comes on top.
#
# 4. The policy: one causal LM as the prior p, the proposal q' and the policy q_theta


class UserError(Exception):
    """Something that the user can fix. `main` prints it in one line and exits with code 2."""


def refuse_if(wrong, message):
    if wrong:
        raise UserError(message)


def in_groups(items, size):
    """Consecutive parts of a list, each of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Policy:
    """A causal LM and its tokenizer as p, q' and q_theta. All three have the same support.

    model                a transformers causal LM, or a PeftModel whose adapter belongs to the prior
    tokenizer            says which ids exist. A model may have logits for more ids; those are never sampled.
    lora_rank            0 trains all parameters of `model`, and p is a frozen copy of it. Otherwise q_theta
                         is a LoRA adapter and p is the same model with the adapter off. If `model` comes with
                         an adapter, p keeps it, and q_theta is a second adapter that starts as a copy of it.
    lora_alpha           LoRA's scale is lora_alpha / lora_rank
    outputs_per_forward  how many outputs go through the model at once. None: all that are asked for.

    The model is scored by plain forwards first. Then q_theta and p are made from it, and `_check` compares
    them with these scores, tests whether the model is causal, and whether three ways to save time give the
    same numbers: a cache in sampling (keeps_cache), prompts that are padded to be sampled together
    (pads_prompts) and a shared prompt in scoring (shares_prompt). Until then every forward is plain.

    Dropout stays off. With dropout, beta_hat would be noise where it should be 1/n. Of a checkpoint's
    generation config only the end-of-sequence ids are used: with its top-k or temperature, log q' would not
    be the log-probability of what was sampled, and q' could not draw every output. UserError if the model
    does not pass `_check`.
    """

    def __init__(self, model, tokenizer, lora_rank=0, lora_alpha=32, outputs_per_forward=None):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.outputs_per_forward = outputs_per_forward
        has_adapter = hasattr(model, "peft_config")
        refuse_if(has_adapter and not lora_rank, "--lora-rank 0: --model is an adapter; merge it first")
        base = model.get_base_model() if has_adapter else model
        self.name = type(base).__name__
        self.device = base.device
        # Recurrent models call their state cache_params. Not every model takes logits_to_keep.
        self._accepted = inspect.signature(base.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in self._accepted else "cache_params"
        self._known = check_ids(base, tokenizer, "--model")
        # _unknown: the ids without a token. They are found at the first forward, from the width of the
        # logits, because config.vocab_size may differ from it.
        self._unknown = self.prior_model = self.prior_adapter = None
        self.shares_prompt = self.keeps_cache = self.pads_prompts = False  # until `_check` has tried them
        self.ends = []  # set after the check, so that no draw of the check ends early
        # A prompt of 5 tokens and outputs of 6 and 1, scattered over the vocabulary, without special tokens.
        # `_check` compares with their log-probabilities by plain forwards of the model as it comes.
        ordinary = sorted(set(self._known.tolist()) - set(tokenizer.added_tokens_decoder)) or self._known
        ids = torch.tensor([ordinary[i * 7919 % len(ordinary)] for i in range(12)])
        prompt, outputs = ids[:5], [ids[5:11], ids[11:]]
        with torch.no_grad(), library_errors("--model", self.name):
            before = torch.cat([self.log_prob(prompt, [output]) for output in outputs])
        if not lora_rank:
            self.model.requires_grad_(True)
            self.prior_model = copy.deepcopy(self.model).requires_grad_(False)
        elif has_adapter:
            self._copy_adapter()
        else:
            self.model = add_adapter(model, lora_rank, lora_alpha).eval()
        self._check(prompt, outputs, before)
        # A chat model may end with several tokens: the tokenizer's, or those of the generation config.
        ends = np.atleast_1d(getattr(base.generation_config, "eos_token_id", None)).tolist()
        self.ends = sorted({*ends, tokenizer.eos_token_id} - {None})

    def _copy_adapter(self):
        """q_theta becomes a second adapter, a copy of the prior's."""
        import peft

        self.prior_adapter = self.model.active_adapter
        config = copy.deepcopy(self.model.peft_config[self.prior_adapter])
        config.base_model_name_or_path = self.model.name_or_path
        self.model.add_adapter("policy", config)
        peft.set_peft_model_state_dict(self.model, adapter_tensors(self.model, self.prior_adapter), "policy")
        self.model.requires_grad_(False).eval()
        self.model.set_adapter("policy")

    def parameters(self):
        """The parameters that are trained, {name: parameter}."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def _using(self, prior):
        """The model as q_theta, or as p.

        With LoRA both share their parameters, so p costs no memory. Setting the policy's adapter again also
        makes it trainable again.
        """
        if not prior:
            yield self.model
        elif self.prior_model is not None:
            yield self.prior_model
        elif self.prior_adapter is not None:
            self.model.set_adapter(self.prior_adapter, inference_mode=True)  # else it becomes trainable
            yield self.model
            self.model.set_adapter("policy")
        else:
            with self.model.disable_adapter():
                yield self.model

    # ---- one forward

    def _forward(self, model, ids, keep, cache=None, use_cache=False, mask=None):
        """One forward of ids (B, T). -> (logits (B, keep, V) of the last `keep` positions, cache or None)

        mask (B, S) has a 0 for each padding of the S tokens of cache and ids. Padding is on the left, so
        positions are counted from the first real token.

        Where the model allows it, the other logits are not computed: over a prompt of 500 tokens they are the
        largest tensor. A cache that is passed in grows by T tokens. With use_cache and none passed in, the
        forward starts one: the model's own while shares_prompt is False, else a plain DynamicCache, which
        keeps every key. A model's own drops those outside of config.sliding_window, which is wrong for models
        that have this setting and do not use it.
        """
        arguments = {"logits_to_keep": keep} if "logits_to_keep" in self._accepted else {}
        if cache is not None or (use_cache and self.shares_prompt):
            arguments[self._cache_name] = DynamicCache() if cache is None else cache
        if mask is not None and not mask.all():
            arguments["attention_mask"] = mask
            if "position_ids" in self._accepted:  # the others count them from the mask
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(input_ids=ids, use_cache=use_cache, **arguments)
        return output.logits[:, -keep:], getattr(output, self._cache_name, None)

    def _scores(self, logits):
        """Logits (..., V) in float32 or better, -inf for ids without a token.

        The sampler and the scorer both go through here, so p, q' and q_theta agree on what can be sampled.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._unknown is None:
            ids = torch.arange(logits.shape[-1])
            self._unknown = ids[~torch.isin(ids, self._known)].to(logits.device)
        return logits.index_fill(-1, self._unknown, -torch.inf) if len(self._unknown) else logits

    # ---- scoring

    def log_prob(self, prompt_ids, outputs, prior=False):
        """log q_theta(y_i|x), or log p(y_i|x) with prior=True. -> (n,) nats, with gradient (none for the
        prior)

        prompt_ids (P,); outputs: n LongTensors (T_i,) as `sample` returns them. An end token counts like any
        other token. A truncated output has none, but is an outcome like any other: it has the probability of
        its tokens and the reward of its text. With `outputs_per_forward` the outputs go in chunks, and the
        backward computes each chunk again, so that only one chunk's activations exist at a time.
        """
        chunks = in_groups(outputs, self.outputs_per_forward or len(outputs))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not prior), self._using(prior) as model:
            score = functools.partial(self._score, model, prompt_ids.to(self.device)[None])
            if len(chunks) > 1 and torch.is_grad_enabled():  # the backward, outside `_using`, runs it again
                score = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([score(chunk) for chunk in chunks])

    def _score(self, model, prompt, outputs):
        """Log-probabilities (c,) of c outputs of one prompt (1, P)."""
        ids, real = pad_right(outputs, self.device)  # (c, T); a causal model needs no mask for right padding
        cache = None
        before = prompt
        if self.shares_prompt and prompt.shape[1] > 3:  # a shorter one is not worth a forward of its own
            # Only to save time: the prompt is computed once for all outputs of the chunk, and its keys and
            # values are repeated. At 512 + 48 tokens and n = 32 an update was 11 times as fast on two CPU
            # cores as with whole sequences and all their logits. The last prompt token is fed with each
            # output, because its logits predict the output's first token. Gradients flow through the cache.
            _, cache = self._forward(model, prompt[:, :-1], 1, use_cache=True)
            cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long))  # its one row, c times
            before = prompt[:, -1:]
        inputs = torch.cat([before.expand(len(ids), -1), ids[:, :-1]], 1)  # its last T predict the output
        logits, _ = self._forward(model, inputs, ids.shape[1], cache, cache is not None)  # (c, T, V)
        scores = self._scores(logits)
        log_probs = scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)  # (c, T)
        return torch.where(real, log_probs, 0.0).sum(-1)

    # ---- sampling

    def sample(self, prompt_ids, n, max_new_tokens, prior=False, generator=None, greedy=False):
        """n outputs of one prompt (P,) from the plain softmax of q_theta, or of p. -> list of n LongTensors
        (T_i,)

        Each output ends with its end-of-sequence token, or is truncated after max_new_tokens. `generator` is
        a CPU torch.Generator. The same generator gives the same outputs for any `outputs_per_forward`, up to
        rounding. greedy, for evaluation only, takes the most likely token each time.
        """
        return self.sample_together([prompt_ids], n, max_new_tokens, prior, [generator], greedy)[0]

    def sample_together(self, prompts, n, max_new_tokens, prior=False, generators=None, greedy=False):
        """`sample` for several prompts, each with its own generator. -> for each prompt a list of n outputs

        They are drawn in one batch, since a step of a GPU takes about as long for one row as for hundreds. If
        the model misreads padding, or `outputs_per_forward` allows fewer rows, they are drawn one by one.
        """
        # One uniform number for each token, drawn in advance. So neither chunks nor other prompts change it.
        draw = functools.partial(torch.rand, n, max_new_tokens, dtype=torch.float64)
        uniform = [draw(generator=x).to(self.device) for x in generators or [None] * len(prompts)]
        size = self.outputs_per_forward or n * len(prompts)
        if self.pads_prompts and size >= n * len(prompts):
            return in_groups(self._draw(prompts, torch.stack(uniform), prior, greedy)[0], n)
        chunks = [[(x, chunk[None]) for chunk in own.split(size)] for x, own in zip(prompts, uniform)]
        return [sum((self._draw([x], chunk, prior, greedy)[0] for x, chunk in some), []) for some in chunks]

    @torch.no_grad()
    def _draw(self, prompts, uniform, prior=False, greedy=False):
        """Draws outputs token by token. uniform (P, c, T) decides the tokens of c outputs of each of P
        prompts. -> (R = P c LongTensors, their log-probabilities (R,))

        The log-probabilities are the sampler's own sums. Only the startup check reads them. Training takes
        those of `log_prob`, so that beta_hat is 1/n for new samples and not only nearly so.
        """
        ids, real = pad_right(prompts, self.device, "left")  # (P, L)
        (P, L), (_, c, T) = ids.shape, uniform.shape
        of = torch.arange(P, device=self.device).repeat_interleave(c)  # (R,): the prompt of each output
        uniform, sequence = uniform.flatten(0, 1), F.pad(ids, (0, T))[of]  # (R, T), (R, L + T)
        mask = F.pad(real.long(), (0, T), value=1)  # (P, L + T)
        rows = torch.arange(len(of), device=self.device)  # the outputs in the batch, and which of them go on
        going = rows >= 0
        length = torch.zeros_like(rows)
        with self._using(prior) as model:
            logits, cache = self._forward(model, ids, 1, use_cache=self.keeps_cache, mask=mask[:, :L])
            logits, mask = logits[of], mask[of]  # each prompt is computed once
            total = torch.zeros_like(self._scores(logits)[:, 0, 0])  # (R,)
            if cache is not None:
                cache.reorder_cache(of)  # a copy for each output
            for t in range(T):
                if t > 0:  # without a cache, the whole sequence is computed again for each token
                    start = 0 if cache is None else L + t - 1
                    new, seen = sequence[rows, start : L + t], mask[rows, : L + t]
                    logits, _ = self._forward(model, new, 1, cache, cache is not None, seen)
                token, log_prob = self._token(logits[:, 0], uniform[rows, t, None], greedy)
                sequence[rows, L + t] = token
                total[rows] += log_prob.where(going, 0.0)
                length[rows] += going
                going = going & ~torch.isin(token, torch.tensor(self.ends, device=self.device))
                if not going.any():
                    break
                if 4 * going.sum() < 3 * len(rows):  # take out what has ended; not each time, as this copies
                    if cache is not None:
                        cache.reorder_cache(going.nonzero()[:, 0])
                    rows, going = rows[going], going[going]
        return [row[:size].cpu() for row, size in zip(sequence[:, L:], length)], total

    def _token(self, logits, uniform, greedy):
        """Logits (B, V) and uniform numbers (B, 1) -> tokens (B,) and their log-probabilities (B,)"""
        scores = self._scores(logits)
        # Invert the cumulative distribution. In float64, because a float32 sum of 50,000 terms rounds the
        # probability of rare tokens away.
        cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = scores.argmax(-1, keepdim=True) if greedy else drawn
        return token[:, 0], scores.gather(-1, token)[:, 0] - scores.logsumexp(-1)

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

    # ---- the startup check: a few short forwards find the models that would otherwise be silently wrong

    @torch.no_grad()
    def _check(self, prompt, outputs, before):
        """UserError if the model is not causal, or if p or q_theta is not the model as it came.

        before (2,): the log-probabilities of the two outputs before the policy's adapter was added. If a
        shared or copied cache gives other numbers, the slower path is used.
        """
        refuse_if(not before.isfinite().all(), "--model: its logits are nan or inf; try --dtype float32")
        for prior in (False, True):
            # PiSSA, OLoRA and similar initialisations change the base when an adapter is added.
            same = self._agree(self.log_prob(prompt, outputs[:1], prior), before[:1], 1e-3)
            refuse_if(not same, f"--model: its adapter changes {self.name} itself; merge it into its base")
        # Rows 1 and 2 are the prompt. Row 3 differs from it in the last token only. In a causal model the
        # logits at the token before are the same, up to the noise that rows 1 and 2 show.
        rows = torch.stack([prompt, prompt, torch.cat([prompt[:-1], outputs[1]])]).to(self.device)
        first, again, other = self._forward(self.model, rows, 2)[0][:, 0]
        same = self._agree(first, other, 1e-4 + 10 * (first - again).abs().max().item())
        # Here the short output is padded on the right. In `before` it was not.
        causal = same and self._agree(self.log_prob(prompt, outputs), before)
        refuse_if(not causal, f"--model: {self.name} is not causal; give a causal LM")
        for self.keeps_cache, self.pads_prompts in ((True, True), (True, False), (False, False)):
            if self._cache_works(prompt, outputs, before):
                break
        if not self.pads_prompts:
            print(f"brain: {self.name} misreads padding or has no cache; it samples slowly", file=sys.stderr)
        # Keys and values can be shared, recurrent states cannot. It is tried, and kept if the numbers agree.
        self.shares_prompt = self.keeps_cache
        self.shares_prompt = self.keeps_cache and self._cache_works(prompt, outputs, before)

    def _cache_works(self, prompt, outputs, before):
        """Whether the sampler's log-probabilities agree with `log_prob`, and `log_prob` with plain
        forwards."""
        try:
            prompts = [prompt[:2], prompt] if self.pads_prompts else [prompt]
            uniform = torch.rand(len(prompts), 2, 4, dtype=torch.float64, generator=seeded(0)).to(self.device)
            drawn, log_probs = self._draw(prompts, uniform)
            scored = [self.log_prob(x, some) for x, some in zip(prompts, in_groups(drawn, 2))]
            agree = self._agree(log_probs, torch.cat(scored))
            return agree and self._agree(self.log_prob(prompt, outputs), before)
        except Exception:  # caches of unusual kinds fail in ways of their own
            return False

    def _agree(self, found, expected, tolerance=None):
        # Cached and plain forwards differ by a few units in the last place of each token's logits. Models in
        # float64 may still compute parts in float32, hence the floor of 1e-5.
        tolerance = tolerance or max(1e-5, 4 * torch.finfo(self.model.dtype).eps)
        return torch.allclose(found.to(expected), expected, atol=tolerance, rtol=tolerance)


def add_adapter(model, rank, alpha):
    """A fresh LoRA adapter on the layers that peft knows for this architecture, else on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = KNOWN.get(model.config.model_type)
    if targets is None:
        # Only true linear layers: routers of mixtures of experts subclass Linear but return tuples. The
        # kernels of a mamba layer use the weights of its out_proj and dt_proj, not the adapter's. The output
        # layer stays as it is.
        head = {model.get_output_embeddings()}
        layers = {name: type(x).__name__ for name, x in model.named_modules() if x not in head}
        linear = [name for name, kind in layers.items() if kind in ("Linear", "Linear4bit", "Conv1D")]
        targets = [name for name in linear if not re.search(r"(mamba|mixer).*\.(out|dt)_proj$", name)]
    # LoRA's B starts at zero, so q_theta = p at step 0. The adapter's dropout stays at its default, 0: with
    # dropout, beta_hat would be noisy once B is not zero.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config, "policy")


def adapter_tensors(model, adapter):
    """{name: tensor} of an adapter, as peft saves it."""
    import peft

    tensors = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def check_ids(model, tokenizer, flag_name):
    """The ids that a tokenizer knows, sorted. UserError if the model has no embedding for one of them."""
    known = torch.tensor(sorted(tokenizer.get_vocab().values()))
    rows = model.get_input_embeddings().weight.shape[0]
    refuse_if(known[-1] >= rows, f"{flag_name}: has {rows} embeddings, its tokenizer ids up to {known[-1]}")
    return known


def pad_right(sequences, device, side="right"):
    """n LongTensors (T_i,) -> ids (n, T), and which of them are real, (n, T) bool."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, True, padding_value=-1, padding_side=side).to(device)
    return ids.clamp(min=0), ids >= 0


# ------------------------------------------------------------------------------------------
# 5. Loading, texts and rewards


@contextlib.contextmanager
def library_errors(flag_name, name):
    """What a library says about a missing, gated or broken file, as one line that names the flag."""
    is_path = re.match(r"[/.]|.*\.(jsonl?|csv|parquet)$", name)
    refuse_if(is_path and not Path(name).exists(), f"{flag_name} {name}: no such file")
    try:
        yield
    except Exception as error:  # libraries raise errors of many kinds
        message = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError(f"{flag_name} {name}: {message[:400]}") from error


def find(name, *files):
    """Path of the first of these files in a directory or hub repository, or None. Downloads no other file."""
    for file in files:
        with contextlib.suppress(OSError):
            if path := transformers.utils.cached_file(name, file):
                return path


def load_model(kind, name, flag_name, trust_remote_code=False, **options):
    """kind.from_pretrained(name). A checkpoint that lacks parameters is refused, because transformers would
    fill them with random numbers. So is one that brings code of its own that is not trusted, because
    transformers would take its own class instead, if it has one of the same name."""
    config = find(name, "config.json")
    own = config and '"auto_map"' in Path(config).read_text()
    refuse_if(own and not trust_remote_code, f"{flag_name} {name}: brings code; --trust-remote-code runs it")
    source = None if "state_dict" in options else name
    # Parameters of another size are listed in `info`, and refused below.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with library_errors(flag_name, name):
        model, info = kind.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    # Buffers that old versions of transformers saved are no parameters.
    old = r"\.attn\.(masked_)?bias$|\.(inv_freq|position_ids)$"
    wrong = [x for names in info.values() for x in sorted(map(str, names)) if not re.search(old, x)]
    refuse_if(wrong, f"{flag_name} {name}: {len(wrong)} parameters do not fit, such as {wrong[:1]}")
    return model


def load_tokenizer(name, fallback, flag_name, trusted=False):
    """The tokenizer of a model, or that of `fallback` where the model comes without one, as fine-tunes of
    GPT-J often do."""
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    place = name if fallback is None or find(name, *files) else fallback
    refuse_if(not find(place, *files), f"{flag_name} {place}: has no tokenizer; name one with --tokenizer")
    with library_errors(flag_name, place):
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trusted)


def encode(tokenizer, text):
    """Token ids of a text, with what this tokenizer puts before texts, such as a beginning token, and no end
    token.

    A chat template writes the beginning itself, so it is not added twice. An end token after a text would
    move "the last token", where a reward is read.
    """
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    begin = whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids if ids[: len(begin)] == begin else begin + ids


def chat(tokenizer, messages, flag_name, tools=None, reply=False):
    """Messages as text, by the tokenizer's chat template.

    A last message of the assistant is a prefill, which the policy continues; otherwise a generation prompt
    follows. reply: the messages end with the complete answer, and nothing follows.
    """
    prefill = not reply and messages[-1:] != [] and messages[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not reply and not prefill, "continue_final_message": prefill}
    with library_errors(flag_name, f"{str(messages)[:100]} for {tokenizer.name_or_path}"):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how)


def fill(template, prompt, output):
    """A template with {prompt} and {output} filled in, in one pass: the prompt may itself contain
    "{output}"."""
    return re.sub(r"\{prompt\}|\{output\}", lambda x: prompt if x[0] == "{prompt}" else output, template)


class RewardModel:
    """r(x, y) from a sequence classifier that reads a filled template.

    A decoder is read at the last token of that text, an encoder by its own head. A truncated output is read
    as if it were complete; `ended` in the metrics is the share of outputs that are complete.

    model      a transformers *ForSequenceClassification. With one label, r is its score. With more, r is the
               log-odds of `label`: its logit minus the logsumexp of the others (section 5, eq. 15), or its
               logit itself where the labels do not exclude each other (multi_label_classification).
    template   text with {prompt} and {output}, by default one after the other. If the prompt is messages, the
               chat template of this model's tokenizer is used instead, unless `template` is given; {prompt}
               is then the prompt as the policy reads it, by `policy_tokenizer`.

    Texts are scored one by one, because some classifiers misread padding.
    """

    def __init__(self, model, tokenizer, template=None, label=None, policy_tokenizer=None):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template
        self.policy_tokenizer = policy_tokenizer
        names = [name for _, name in sorted(model.config.id2label.items())]
        # The index of the good label. With one there is no choice, with two it is the second, with more it
        # must be named.
        self.label = 1 if len(names) == 2 else None
        if label is not None or len(names) > 2:
            known = names + [str(i) for i in range(len(names))]
            refuse_if(label not in known or len(names) == 1, f"--reward-label {label}: labels are {names}")
            self.label = known.index(label) % len(names)  # a name, or an index as text
        print(f"reward: {type(model).__name__}, label {names[self.label or 0]!r} of {names}")
        self.is_encoder = not hasattr(model, "score")  # `score` is the head of decoder classifiers
        self.context = context_of(model.config)
        check_ids(model, tokenizer, "--reward-model")
        refuse_if(model.config.is_encoder_decoder, "--reward-model: is an encoder-decoder; give another kind")
        if not self.is_encoder:
            # Else the model reads the last token that is not padding, and misses an end token of the template
            # where pad = eos.
            model.config.get_text_config().pad_token_id = None

    @classmethod
    def from_pretrained(cls, name, base=None, template=None, tokenizer=None, label=None, **options):
        """From a directory or hub name, or from a bare checkpoint: one file of parameters, which takes config
        and tokenizer from `base`.

        `tokenizer` is the policy's. It is also used where the reward model has none. `options` are dtype, by
        default float32, and trust_remote_code. The model is on the CPU; `model.to` moves it. UserError says
        what is wrong.
        """
        kind, source, flag_name = transformers.AutoModelForSequenceClassification, name, "--reward-model"
        options = {"dtype": torch.float32, "trust_remote_code": False} | options
        bare = name if Path(name).is_file() else None
        if not bare and not find(name, "config.json", "adapter_config.json"):
            bare = find(name, "pytorch_model.bin", "hf_ckpt.pt")
        if bare:
            refuse_if(not base, f"{flag_name} {name}: has no config; name its base with --reward-base")
            source, flag_name = base, "--reward-base"
            with library_errors(flag_name, base):
                config = transformers.AutoConfig.from_pretrained(base, num_labels=1)
                kind = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
            with library_errors("--reward-model", bare):
                saved = torch.load(bare, map_location="cpu", weights_only=True)  # a pickle may run code
            saved = {re.sub(r"^v_head\.", "score.", name): tensor for name, tensor in saved.items()}
            model = load_model(kind, bare, "--reward-model", config=config, state_dict=saved, **options)
        else:
            model = load_model(kind, name, flag_name, **options)
            source = name if find(name, "tokenizer_config.json") else model.name_or_path  # an adapter's base
        names = source, tokenizer and tokenizer.name_or_path, flag_name
        return cls(model, load_tokenizer(*names, options["trust_remote_code"]), template, label, tokenizer)

    def read(self, prompt, output, columns=None):
        """What the reward model reads for one output: input_ids (1, T), and what else its tokenizer gives."""
        tools = (columns or {}).get("tools")
        if self.is_encoder and isinstance(prompt, str) and not self.template:
            return self.tokenizer(prompt, output, return_tensors="pt")  # a pair of segments
        if isinstance(prompt, str) or self.template:
            if not isinstance(prompt, str):
                prompt = chat(self.policy_tokenizer, prompt, "--model", tools)
            text = fill(self.template or "{prompt}{output}", prompt, output)
        else:
            if prompt[-1]["role"] == "assistant":  # a prefill and the output are one message
                prompt, output = prompt[:-1], prompt[-1]["content"] + output
            messages = prompt + [{"role": "assistant", "content": output}]
            text = chat(self.tokenizer, messages, "--reward-model", tools, reply=True)
        if self.is_encoder:
            return self.tokenizer(text, return_tensors="pt")  # with the special tokens around a text
        return transformers.BatchEncoding({"input_ids": torch.tensor([encode(self.tokenizer, text)])})

    def fits(self, example, max_new_tokens):
        """Whether the outputs and the gold answer of an Example fit the context of this model.

        Prompts that do not fit are left out before training. Otherwise a run would die on its test split.
        This model reads the text of an output, which may have more tokens here, so there is room for twice as
        many.
        """
        inputs = [self.read(example.prompt, x, example.columns) for x in (" a", example.gold or "")]
        used, gold = (x.input_ids.shape[1] for x in inputs)  # " a" is an output of one token
        return max(used - 1 + 2 * max_new_tokens, gold) <= self.context

    @torch.no_grad()
    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt. -> (n,) float32"""
        logits = []
        for output in outputs:
            inputs = self.read(prompt, output, columns).to(self.model.device)
            size = inputs.input_ids.shape[1]
            refuse_if(not 0 < size <= self.context, f"--reward-model: cannot read {size} tokens")
            logits.append(self.model(**inputs).logits)
        logits = torch.cat(logits).float().cpu()  # (n, labels)
        rewards = logits[:, self.label or 0]
        if self.label is not None and self.model.config.problem_type != "multi_label_classification":
            rewards = rewards - logits[:, torch.arange(logits.shape[1]) != self.label].logsumexp(-1)
        refuse_if(not rewards.isfinite().all(), "--reward-model: gave nan or inf; try --dtype float32")
        return rewards


def context_of(config):
    """The longest sequence of a model, in tokens; infinite where its config names none."""
    config = config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", math.inf)
    if re.fullmatch("(xlm-)?roberta.*|camembert|data2vec-text|xmod|mpnet|longformer", config.model_type):
        context -= config.pad_token_id + 1  # positions count from the padding id
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):  # beyond it, frequencies depend on the length
        context = min(context, rope.get("original_max_position_embeddings") or context)
    return context if context > 0 else math.inf  # xlnet says -1


class RewardFunction:
    """A user's f(prompts, completions, **columns) -> list of floats, called as in TRL: by keyword, with lists
    of equal length."""

    def __init__(self, function, name):
        self.function, self.name = function, f"--reward-function {name}"

    @classmethod
    def from_file(cls, spec):
        """From "file.py:name". UserError if there is no such function."""
        path, _, name = spec.rpartition(":")
        refuse_if(not Path(path).is_file(), f"--reward-function {spec}: no such file; give file.py:name")
        sys.path.insert(0, str(Path(path).resolve().parent))  # for imports from beside it
        source = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(source)
        sys.modules[source.name] = module  # so that a pool of processes finds its functions
        source.loader.exec_module(module)
        function = getattr(module, name, None)
        refuse_if(not callable(function), f"--reward-function {spec}: {path} has no function {name}")
        return cls(function, spec)

    def fits(self, example, max_new_tokens):
        """True. UserError if the function has arguments that are not passed here, or lacks **kwargs."""
        passed = example.columns | {"prompts": None, "completions": None}
        with library_errors(self.name, f"gets {', '.join(passed)}; **kwargs takes what it does not need"):
            return bool(inspect.signature(self.function).bind(**passed))

    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt; the row's columns go along, each repeated n times. -> (n,)
        float64"""
        n = len(outputs)
        if not isinstance(prompt, str):  # messages in, messages out
            outputs = [[{"role": "assistant", "content": output}] for output in outputs]
        arguments = {name: [value] * n for name, value in (columns or {}).items()}
        arguments |= {"prompts": [prompt] * n, "completions": list(outputs)}
        try:
            returned = self.function(**arguments)
        except OSError as error:  # `main` takes one for a full disk, and would hide where it was raised
            raise RuntimeError(self.name) from error
        rewards = []
        with contextlib.suppress(TypeError, ValueError):  # None, nested lists, a coroutine
            rewards = list(map(float, () if isinstance(returned, (str, dict)) else returned))
        good = len(rewards) == n and all(abs(x) < 1e38 for x in rewards)  # 1e39 is infinite in float32
        refuse_if(not good, f"{self.name}: must return {n} finite numbers, not {returned!r:.80}")
        return torch.tensor(rewards, dtype=torch.float64)


# ------------------------------------------------------------------------------------------
# 6. Prompts

GOLD_COLUMNS = ("label", "completion", "chosen", "response")  # the first that holds text is the gold answer


@dataclasses.dataclass
class Example:
    """One prompt of D."""

    row: int  # of the split
    prompt: str | list  # text, or messages
    ids: torch.Tensor  # (P,)
    gold: str | None  # the data's own answer, for win-rates
    pair: list | None  # [chosen, rejected] as LongTensors, for --method dpo
    columns: dict  # the row's other columns, for a reward function


def load_prompts(rows, policy, settings, split, reward):
    """-> the Examples of a split. Prompts that are empty, or too long for the policy or the reward model, are
    left out and counted. UserError if none is left."""
    room = context_of(policy.model.config) - settings.max_new_tokens
    gold = next((x for x in GOLD_COLUMNS if x in rows.column_names and any(map(is_text, rows[x]))), None)
    pairs = split == "train" and METHODS[settings.method].source == "data"
    examples = []
    for number in tqdm(range(len(rows)), desc=f"{split}: reading", leave=False):
        example = make_example(number, rows[number], gold, pairs, policy.tokenizer, settings)
        if example.prompt and 0 < len(example.ids) <= min(settings.max_prompt_tokens or room, room):
            if not hasattr(reward, "fits") or reward.fits(example, settings.max_new_tokens):
                examples.append(example)
    print(f"{split}: {len(examples)} prompts; {len(rows) - len(examples)} left out, empty or too long")
    refuse_if(not examples, f"--dataset {settings.dataset}: every prompt of {split} is empty or too long")
    return examples


def make_example(number, row, gold_column, needs_pair, tokenizer, settings):
    """A row of the data as an Example.

    The policy reads text as it is, and messages through its tokenizer's chat template.
    """
    prompt = plain_messages(row.pop("prompt"))
    row |= {name: plain_messages(row[name]) for name in ("tools",) if name in row}
    gold = pair = None
    if isinstance(prompt, str) and gold_column and is_messages(row[gold_column]):
        prompt = [{"role": "user", "content": prompt}]  # answers are messages, so the prompt is one too
    at = f"--dataset row {number + 1}, --model"
    text = prompt if isinstance(prompt, str) else chat(tokenizer, prompt, at, row.get("tools"))
    ids = encode(tokenizer, text)
    if gold_column and row[gold_column] is not None:
        # Special tokens are taken off the text of an output, too.
        special = "|".join(map(re.escape, tokenizer.all_special_tokens))
        gold = re.sub(special, "", answer_text(prompt, row[gold_column]))
    if needs_pair:
        pair = []
        # The ids of an answer as if the policy had written it: what follows the prompt's own ids, then the
        # end token, cut to length.
        for name in ("chosen", "rejected"):
            answer = answer_text(prompt, row[name])
            own = encode(tokenizer, text + answer)
            alone = tokenizer(answer, add_special_tokens=False).input_ids
            # Unless the tokenizer joins letters across the boundary, which the policy could not do.
            own = own[len(ids) :] if own[: len(ids)] == ids else alone
            pair.append(torch.tensor((own + [tokenizer.eos_token_id])[: settings.max_new_tokens]))
    return Example(number, prompt, torch.tensor(ids), gold, pair, columns=row)


def plain_messages(x):
    """Messages or tools without the keys that are null: `datasets` fills in those that a message lacks.
    Content that is a list of text parts becomes their text."""
    if isinstance(x, dict):
        return {key: plain_messages(value) for key, value in x.items() if value is not None}
    if x and isinstance(x, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in x):
        return "".join(part["text"] for part in x)
    return list(map(plain_messages, x)) if isinstance(x, list) else x


def is_messages(value):
    """Whether a prompt or an answer is a list of messages, at least one, each with a role."""
    return isinstance(value, list) and value and all(isinstance(x, dict) and x.get("role") for x in value)


def is_text(value):
    """Whether a prompt or an answer is text or messages. A label, for example, may be a number."""
    return isinstance(value, str) or is_messages(value)


def answer_text(prompt, answer):
    """An answer of the data as an output would continue its prompt: a space goes before it, unless the
    prompt ends or the answer begins with white space."""
    if is_messages(answer):
        answer = plain_messages(answer)[-1].get("content", "")  # the last message is the reply
    apart = not isinstance(prompt, str) or prompt[-1:].isspace() or answer[:1].isspace()
    return answer if apart or not answer else " " + answer


def split_pair(row):
    r"""A row of preferences whose `chosen` and `rejected` begin alike: their beginning belongs to the prompt.

    Messages: chosen [u, a, v, b] and rejected [u, a, v, c] become prompt [u, a, v], chosen [b], rejected [c].
    Here `chosen` repeats the prompt, so the common beginning replaces a prompt column.
    Text: prompt "post", chosen "TL;DR: b" and rejected "TL;DR: c" become prompt "post\nTL;DR:", chosen " b",
    rejected " c". Here `chosen` continues the prompt, so the common beginning is appended to it, up to its
    last cue, "Assistant:" or "TL;DR:". Neither answer is ever left empty.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    # same: the index of the first difference, in letters or in messages
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    same = next(differ, min(len(chosen), len(rejected)) - 1)
    if isinstance(chosen, str):
        same = max([cue.end() for cue in re.finditer("Assistant:|TL;DR:", chosen[:same])], default=0)
        if same and isinstance(prompt, str):
            prompt = f"{prompt.rstrip()}\n{chosen[:same]}"
        prompt = prompt or chosen[:same]
    elif same or not prompt:
        prompt = chosen[:same]
    return row | {"prompt": prompt, "chosen": chosen[same:], "rejected": rejected[same:]}


def read_dataset(s):
    """{split: rows} of a hub name, a directory, or a .jsonl, .parquet or .csv file."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    path, files = Path(s.dataset).absolute(), None
    # `datasets` would take these as patterns of other names.
    refuse_if(re.search(r"[][*?]", str(path)), f"--dataset {s.dataset}: rename it, without [, ], * and ?")
    with library_errors("--dataset", s.dataset):
        if path.is_file():
            path, files = path.parent, {"train": path.name}
        elif not path.exists():
            # load_dataset(hub name) would need the network even where the cache holds the files.
            path = huggingface_hub.snapshot_download(s.dataset, repo_type="dataset")
        return datasets.load_dataset(str(path), s.dataset_config, data_files=files)


def load_splits(s):
    """{"train", "validation", "test": rows}, each with a column `prompt`.

    A tenth of the prompts of train, at most 1000, are held out for each split that the data lacks, with all
    their rows: preferences often have several for one prompt. They are the same for every --seed.
    """
    found = read_dataset(s)
    trains = [split for split in found if split.startswith("train")]
    names = {
        "train": s.dataset_train_split or (trains[0] if len(trains) == 1 else "train"),
        "validation": next((split for split in ("validation", "valid", "val") if split in found), None),
        "test": s.dataset_test_split or ("test" if "test" in found else None),
    }
    splits = {}
    for split, own in names.items():
        if own is None:
            known = sorted(set(map(str, splits["train"]["prompt"])))
            refuse_if(len(known) < 3, f"--dataset {s.dataset}: has {len(known)} prompts; it takes 3")
            held = {known[i] for i in random_subset(len(known), min(1000, math.ceil(len(known) / 10)), 0)}
            splits[split] = splits["train"].filter(lambda row: str(row["prompt"]) in held)
            splits["train"] = splits["train"].filter(lambda row: str(row["prompt"]) not in held)
            print(f"{split}: not in the data; {len(held)} prompts of train are held out for it")
        else:
            refuse_if(own not in found, f"--dataset {s.dataset}: has no split {own}, but {', '.join(found)}")
            splits[split] = check_rows(found[own], f"--dataset {s.dataset}: split {own}", s.method, split)
    return splits


def check_rows(rows, at, method, split):
    """Rows with a column `prompt`, taken from a pair where there is none. For --method dpo, what the answers
    of a pair have in common is also moved to the prompt. UserError names the first row without text."""
    columns, pairs = set(rows.column_names), METHODS[method].source == "data"
    split_them = {"chosen", "rejected"} <= columns and (pairs or "prompt" not in columns)
    names = [] if split_them and "prompt" not in columns else ["prompt"]
    names += ["chosen", "rejected"] if split_them or (pairs and split == "train") else []
    for name in names:
        refuse_if(name not in columns, f"{at} has no column {name}, only {rows.column_names}")
        with library_errors(at, name):  # text that is not UTF-8; dates, bytes or nan, which no log could hold
            values = json.loads(json.dumps(list(rows[name]), allow_nan=False))
        for i, value in enumerate(values):
            refuse_if(not is_text(value), f"{at}, row {i + 1}: {name} is not text or messages: {value!s:.40}")
    return rows.map(split_pair) if split_them else rows


# ------------------------------------------------------------------------------------------
# 7. Evaluation


def draw_held_out(policy, reward, data, settings, source):
    """Samples for evenly spaced prompts of a split: n outputs of p or of q_theta for each, drawn as in
    training.

    Every evaluation has the same prompts and the same random numbers, so evaluations differ by the policy
    only.
    """
    count = min(len(data), settings.eval_prompts or len(data))

    def draw(rows):
        generators = [seeded(settings.seed, HELD_OUT, i) for i in rows]
        return collect(policy, reward, [data[i] for i in rows], settings, source, generators)

    rows = [j * len(data) // count for j in range(count)]
    groups = tqdm(in_groups(rows, settings.prompts_per_forward), desc="evaluation", leave=False)
    return sum(map(draw, groups), [])


@torch.no_grad()
def evaluate(drawn, reward, settings, answers=None):
    """Metrics of the policy that drew these Samples, and a line for each output. -> (metrics, lines)

    answers      Samples of other outputs (`--greedy`) for win_rate, reward and the lines. The other metrics
                 need draws.
    win_rate     of the outputs against the gold answer of their prompt. Outputs of one prompt are not
                 independent, so the interval comes from the spread between prompts.
    kl_to_prior  mean of log q_theta - log p, an estimate of KL(q_theta || p), in nats. The policy is the
                 proposal of these Samples.
    """
    lines, wins, metrics = [], [], {}
    for samples in answers or drawn:
        example, gold = samples.example, None
        if example.gold is not None:
            gold = reward(example.prompt, [example.gold], example.columns).to(samples.reward).item()
            wins.append(win_rate(samples.reward, [gold] * len(samples.reward))[0])
        for text, own in zip(samples.texts, samples.reward.tolist()):
            line = {"row": example.row, "prompt": example.prompt, "output": text, "reward": own}
            lines.append(line | {"gold": example.gold, "gold_reward": gold})
    if wins:
        metrics["win_rate"], error = mean_and_error(wins)
        metrics["win_rate_half_width"] = 1.96 * error
    metrics["reward"] = float(np.mean([line["reward"] for line in lines]))
    metrics["kl_to_prior"] = float(np.mean([(x.log_q_proposal - x.log_p).mean().item() for x in drawn]))
    return metrics | mean_evidence(drawn, settings), lines


# ------------------------------------------------------------------------------------------
# 8. The run directory
#
#     config.json               the settings, and versions of the libraries
#     metrics.jsonl             a line for each update, each evaluation, and each round's draws of q', if any
#     samples.jsonl             D_t, a line for each output
#     validation_outputs.jsonl  the outputs of every evaluation
#     test_outputs.jsonl        those of the final evaluation on the test split
#     checkpoint/               what --resume needs, and the parameters of the policy that is kept
#     model/                    that policy at the end, for transformers or peft to load
#     report.png                what to watch

CACHED = ("reward", "log_p", "log_q_proposal", "alpha_hat")  # the numbers of an output in samples.jsonl
LOGS = ("metrics.jsonl", "samples.jsonl", "validation_outputs.jsonl", "test_outputs.jsonl")
# The metrics in each panel of report.png. The first two are bounds, whose gap is at most KL(policy ||
# posterior), in expectation.
PANELS = "elbo log_evidence,self_normalized_kl loss,win_rate,reward kl_to_prior,ess_alpha ess_beta,ended"


def save_policy(policy, directory):
    """The policy and its tokenizer, for transformers (all parameters) or peft (the adapter) to load."""
    policy.tokenizer.save_pretrained(directory)
    if policy.prior_model is not None:
        policy.model.save_pretrained(directory)
    else:
        tensors = adapter_tensors(policy.model, "policy")
        safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
        policy.model.peft_config["policy"].save_pretrained(directory)


class Run:
    """A run directory. `train` calls start, collect, steps and after_update.

    A run can be killed at any moment and resumed. The last checkpoint has the trained parameters, AdamW's
    state, the number of updates, D_t, and how long the logs were. It is written after each validation and
    after the sampling of each round. On resuming, the logs are cut to that length. What came after it is
    computed again, and on a CPU it is the same, because every random number follows from (seed, purpose,
    indices).

    The policy with the best validation score by --select-by is kept. The untrained policy of update 0
    competes, too, and the later one wins a tie. At the end the kept policy is tested and saved.
    """

    def __init__(self, settings, reward, data):
        """Creates the directory, with config.json: the settings, and versions that numbers depend on."""
        self.settings, self.reward, self.data = settings, reward, data
        # The process id keeps apart runs that start in the same second.
        name = time.strftime(f"runs/{settings.method}-%Y%m%d-%H%M%S-{os.getpid()}")
        settings.output_dir = str(settings.output_dir or name)
        self.path = Path(settings.output_dir)
        # What stored samples belong to. A resumed run must find the same.
        known = [(split, x.row, x.ids.tolist(), x.gold) for split, some in data.items() for x in some]
        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        before = json.loads((self.path / "config.json").read_text()) if settings.resume else {}
        refuse_if(before.get("data", digest) != digest, "--resume: the prompts have changed; restore them")
        (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
        # Two runs must not write here at once. The lock ends with its process, also if that is killed.
        self.lock = filelock.FileLock(self.path / "checkpoint" / "lock", is_singleton=True)
        with library_errors(f"--output-dir {self.path}: another run writes to it", ""):
            self.lock.acquire(blocking=False)
        if settings.overwrite:
            (self.path / "checkpoint" / "state.pt").unlink(missing_ok=True)
            shutil.rmtree(self.path / "model", ignore_errors=True)
        config = dataclasses.asdict(settings) | {x.__name__: x.__version__ for x in (torch, transformers, np)}
        config["data"] = digest
        (self.path / "unfinished.json").write_text(json.dumps(config, indent=1) + "\n")
        (self.path / "unfinished.json").replace(self.path / "config.json")
        self.k = settings.updates_per_iteration
        self.buffer = []  # D_t, for the checkpoint; `train` has its own list of the same Samples
        # Updates that the checkpoint has; the update whose policy is kept, and its score.
        self.done, self.kept, self.best = 0, 0, -math.inf

    # ---- what `train` calls

    def start(self, policy, optimizer):
        """Draws the held-out samples. Evaluates a new run; restores a killed run to its checkpoint."""
        self.policy, self.optimizer = policy, optimizer
        self.held_out = draw_held_out(policy, self.reward, self.data["validation"], self.settings, "prior")
        if not (self.path / "checkpoint" / "state.pt").exists():
            for name in LOGS:
                (self.path / name).write_text("")
            self.evaluate(0)
            self.save_checkpoint(0)
            return
        state = self.load("state.pt")
        optimizer.load_state_dict(state["optimizer"])
        self.done, self.kept, self.best = state["step"], state["kept"], state["best"]
        examples = {example.row: example for example in self.data["train"]}
        self.buffer = [Samples(**x | {"example": examples[x["example"]]}) for x in state["samples"]]
        left = {path.name: path.stat().st_size for path in self.path.iterdir()}
        cut = [name for name, size in state["sizes"].items() if left.get(name, -1) < size]
        refuse_if(cut, f"--resume: {', '.join(cut)} in {self.path} cut or missing; restore, or --overwrite")
        for name, size in state["sizes"].items():
            os.truncate(self.path / name, size)

    def collect(self, t, rows, draw):
        """The Samples of round t, by draw(rows) for some indices of prompts at a time, or those of the
        checkpoint."""
        drawn = [samples for samples in self.buffer if samples.iteration == t]
        if drawn:
            return drawn
        bar = tqdm(in_groups(rows, self.settings.prompts_per_forward), f"round {t}, sampling", leave=False)
        for samples in (x for group in bar for x in draw(group)):  # each is written when it is drawn
            texts = {"output": samples.texts, "output_ids": [ids.tolist() for ids in samples.outputs]}
            columns = texts | {name: getattr(samples, name).tolist() for name in CACHED}
            line = {"iteration": t, "row": samples.example.row, "prompt": samples.example.prompt}
            self.write("samples.jsonl", [line | dict(zip(columns, x)) for x in zip(*columns.values())])
            drawn.append(samples)
        self.buffer += drawn
        if METHODS[self.settings.method].source in ("policy", "prior"):
            self.log({"step": (t - 1) * self.k, "iteration": t} | mean_evidence(drawn, self.settings))
        self.save_checkpoint((t - 1) * self.k)
        return drawn

    def steps(self, t):
        """The updates of round t that are still to do."""
        return tqdm(range(max(self.done, (t - 1) * self.k) + 1, t * self.k + 1), f"round {t}", leave=False)

    def after_update(self, step, metrics):
        """Logs an update. Evaluates every --eval-every updates and at the end, and then checkpoints."""
        self.log({"step": step} | metrics)
        if step % self.settings.eval_every == 0 or step == self.k * self.settings.iterations:
            self.evaluate(step)
            self.save_checkpoint(step)

    # ---- files

    def write(self, name, lines):
        """Appends dicts to a .jsonl file, one a line."""
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def log(self, line):
        self.write("metrics.jsonl", [line | {"time": round(time.time(), 3)}])

    def save(self, name, **state):
        """The trained parameters and `state` as checkpoint/name, written to another file and renamed, so that
        the file is whole or not there."""
        directory = self.path / "checkpoint"
        state["parameters"] = {name: p.detach() for name, p in self.policy.parameters().items()}
        # If the disk is full: "--resume once the disk has room: DIRECTORY: what PyTorch says".
        with library_errors("--resume once the disk has room:", str(directory)):
            torch.save(state, directory / "unfinished")
        (directory / "unfinished").replace(directory / name)

    def load(self, name):
        """The state that `save` wrote. Puts its parameters into the policy."""
        state = torch.load(self.path / "checkpoint" / name, map_location="cpu", weights_only=True)
        for name, parameter in self.policy.parameters().items():
            parameter.data.copy_(state["parameters"][name])
        return state

    def save_checkpoint(self, step):
        """What `start` needs to continue after this update."""
        sizes = {name: (self.path / name).stat().st_size for name in LOGS}
        samples = [vars(x) | {"example": x.example.row} for x in self.buffer]
        state = {"step": step, "kept": self.kept, "best": self.best, "sizes": sizes, "samples": samples}
        self.save("state.pt", optimizer=self.optimizer.state_dict(), **state)

    # ---- evaluation and report

    def evaluate(self, step, split="validation"):
        """A line of metrics, and one on the screen. On validation, the best policy is kept."""
        s, data = self.settings, self.data[split]
        drawn = draw_held_out(self.policy, self.reward, data, s, "policy")
        answers = draw_held_out(self.policy, self.reward, data, s, "greedy") if s.greedy else None
        metrics, lines = evaluate(drawn, self.reward, s, answers)
        if split == "validation":
            divergences = [held_out_divergence(self.policy, samples, s) for samples in self.held_out]
            metrics["self_normalized_kl"] = float(np.mean(divergences))
            score = metrics.get(s.select_by, metrics["elbo"])  # elbo if no prompt evaluated has gold
            score = -score if s.select_by == "self_normalized_kl" else score
            if score >= self.best:  # on a tie the later one wins
                self.best, self.kept = score, step
                self.save("best.pt", step=step)
            metrics["kept"] = self.kept
        self.write(f"{split}_outputs.jsonl", [{"step": step} | line for line in lines])
        self.log({"step": step, "split": split} | metrics)
        text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "kept")
        text = re.sub(r"  \w+_(standard_error|half_width) ", " ± ", text)
        print(f"update {step:>6}  {split:<10}  {text}  kept: update {self.kept}", flush=True)
        return metrics

    def report(self):
        """report.png: what to watch, over updates. It is the last file of a run that is written. Prints how
        far the policy that is kept has come since update 0."""
        import matplotlib.pyplot as plt
        import pandas

        lines = pandas.read_json(self.path / "metrics.jsonl", lines=True).set_index("step")
        evaluations = lines[lines["split"] == "validation"].copy()
        figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
        for axis, title in zip(axes.flat, PANELS.split(",")):
            # These are known at each update, the others at each evaluation: there, the reward and kl_to_prior
            # of an update are those of stored outputs. A dot is a measurement.
            shown = lines if title.endswith(("loss", "ess_beta", "ended")) else evaluations
            for name in title.split():
                shown.reindex(columns=[name]).dropna().plot(ax=axis, title=title, grid=True, marker=".")
            axis.axvline(self.kept, color="black", linestyle=":", label=f"kept: update {self.kept}")
            axis.legend()
        figure.savefig(self.path / "report.png", dpi=100)
        evaluations["the gap log_evidence - elbo"] = evaluations["log_evidence"] - evaluations["elbo"]
        for name in ("the gap log_evidence - elbo", "self_normalized_kl"):
            first, kept = evaluations[name][[0, self.kept]]
            share = f": {1 - kept / first:.0%} closed" if first > 0.001 else ""
            print(f"{name} on validation went from {first:.3f} to {kept:.3f} nats{share}")


# ------------------------------------------------------------------------------------------
# 9. The command line

COMPANIONS = {  # what goes with a model. Each entry is a default that its flag overrides.
    "CarperAI/openai_summarize_tldr_sft": dict(  # the paper's summarisation (appendix B)
        # The model comes without a tokenizer, and its reward model without a config.
        tokenizer="EleutherAI/gpt-j-6B", reward_base="CarperAI/openai_summarize_tldr_sft",
        reward_model="CarperAI/openai_summarize_tldr_rm_checkpoint", dataset="CarperAI/openai_summarize_tldr",
        # In its training r was read before the end token. Attention is causal, so the template leaves it out.
        reward_template="<|startoftext|>{prompt}{output}", max_prompt_tokens=500, max_new_tokens=50,
    ),
    "timdettmers/qlora-hh-rlhf-7b": dict(  # the paper's dialogue: the prior is an adapter on Llama-7B
        dataset="Dahoas/rm-static", reward_model="Dahoas/gptj-rm-static", reward_base="EleutherAI/gpt-j-6B",
        # This reward was read at the end token.
        reward_template="{prompt}{output}<|endoftext|>", max_prompt_tokens=500, max_new_tokens=128,
    ),
    "toy": dict(
        iterations=6, prompts_per_iteration=128, updates_per_iteration=60, learning_rate=1e-3, lora_rank=0,
        weight_decay=0, max_prompt_tokens=2, max_new_tokens=4, select_by="self_normalized_kl", eval_prompts=64
    ),
}  # fmt: skip
# Schedules that are a function of the step and need no settings but --warmup-steps.
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
# What may change when a run is resumed. More iterations extend a run; the learning rate of what is left then
# follows the longer schedule.
FREE = "output_dir resume device iterations outputs_per_forward prompts_per_forward learning_rate".split()


def setting(default, text, choices=None, lowest=-math.inf, below=math.inf):
    # --help would print a default of None. "%(default).0s" prints nothing in its place.
    shown = "" if default is not None else "%(default).0s"
    metadata = {"help": text + shown, "choices": choices, "lowest": lowest, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """Every setting, once. (paper) marks the values of section 8 and appendix B.2; the others are ours
    (departure 5)."""

    # the policy and its prior
    model: str = setting("toy", "toy, or a causal LM or LoRA adapter: hub name or directory")
    base_model: str | None = setting(None, "for an adapter: its base, if the one that it names is not wanted")
    tokenizer: str | None = setting(None, "if the model comes without one; else it is not used")
    trust_remote_code: bool = setting(False, "run the code that a model or reward model brings")
    # the reward
    reward_model: str | None = setting(None, "sequence classifier, or a bare checkpoint (with --reward-base)")
    reward_base: str | None = setting(None, "the model that a bare checkpoint was trained from")
    reward_template: str | None = setting(None, "default: {prompt}{output}; for messages, the chat template")
    reward_function: str | None = setting(None, "file.py:name, f(prompts, completions, **columns)")
    reward_label: str | None = setting(None, "name or index of the good label; of two, the second one")
    # Default: logistic for a classifier of several labels, else bradley-terry.
    goodness: str | None = setting(None, "default: by the number of labels", ("bradley-terry", "logistic"))
    beta: float = setting(1.0, "strength of the KL term, see log_goodness (paper: 1)", lowest=1e-6)
    # the data
    dataset: str | None = setting(None, "hub name, directory or file; column prompt: text, or messages")
    dataset_config: str | None = setting(None, "configuration of a hub dataset")
    dataset_train_split: str | None = setting(None, "its name, if it is not train")
    dataset_test_split: str | None = setting(None, "its name, if it is not test")
    # the run
    method: str = setting("brain", "BRAIn or a baseline of Tables 1 and 3", tuple(METHODS))
    output_dir: str | None = setting(None, "where to write; a new directory under runs/ if not given")
    resume: bool = setting(False, "continue the run in --output-dir, with its settings")
    overwrite: bool = setting(False, "replace the run in --output-dir")
    seed: int = setting(0, "of all random numbers", lowest=0, below=2**64)
    device: str | None = setting(None, "cpu, cuda or cuda:1; a GPU if there is one")
    # By default bfloat16 for LoRA on a GPU, where peft keeps the adapter in float32. Else float32, because
    # a step of 1e-5 is below the precision of bfloat16. The reward model has the same dtype.
    dtype: str | None = setting(None, "default: by the device", ("float32", "bfloat16", "float16", "float64"))
    # Algorithm 1. Over a run, each sample is visited k x batch size / m = 3.2 times on average. On a chat
    # model of 135M parameters (toy/real.py; one seed) noise was the limit. In the gradient of one prompt it
    # had 120 times the power of the signal, with 16 outputs as with 8. So what counts is the number of
    # prompts. With 64 prompts one visit closed 12% of KL(posterior || policy), and a second one memorised
    # them and left 5%. 2 or 4 prompts in an update, and LoRA of rank 1 or 8, did not differ.
    iterations: int = setting(4, "e: rounds of sampling and updates; 0 only evaluates", lowest=0)
    prompts_per_iteration: int = setting(1000, "m: prompts in a round", lowest=1)
    samples_per_prompt: int = setting(32, "n: outputs per prompt (paper: 32)", lowest=2)
    updates_per_iteration: int = setting(400, "k: updates in a round", lowest=1)
    batch_size: int = setting(8, "prompts in an update", lowest=1)
    max_prompt_tokens: int | None = setting(None, "longer ones are left out; default: what fits", lowest=1)
    max_new_tokens: int = setting(64, "outputs are truncated there", lowest=1)
    # the optimiser
    # The paper's rate is for 6B parameters. That chat model learned most with LoRA at 2e-3, and lost at 5e-3.
    learning_rate: float = setting(1e-5, "AdamW (paper: 1e-5)", lowest=0)
    lr_scheduler_type: str = setting("linear", "as in transformers, over the whole run", SCHEDULES)
    warmup_steps: int = setting(0, "updates over which the learning rate rises to its value", lowest=0)
    weight_decay: float = setting(0.1, "AdamW (paper: 0.1)", lowest=0)
    adam_beta1: float = setting(0.9, "AdamW (paper: 0.9)", lowest=0, below=1)
    adam_beta2: float = setting(0.95, "AdamW (paper: 0.95)", lowest=0, below=1)
    # what is trained, and how much memory it may use
    lora_rank: int = setting(8, "of a new adapter; 0: no adapter (paper: 8 for TL;DR, 64 for HH)", lowest=0)
    lora_alpha: int = setting(32, "a new adapter has scale alpha / rank (paper: 32; 16 for HH)", lowest=1)
    load_in_4bit: bool = setting(False, "base model in 4 bits; needs pip install bitsandbytes")
    outputs_per_forward: int | None = setting(None, "outputs in the model at once; default: all", lowest=1)
    # 4 prompts of 32 outputs keep most devices busy. Their keys and values must fit: of GPT-J they take
    # 32 GB, for 128 outputs of 550 tokens in 16 bits.
    prompts_per_forward: int = setting(4, "prompts that are sampled at once", lowest=1)
    # evaluation
    eval_prompts: int = setting(128, "prompts per evaluation; 0: the whole split", lowest=0)
    greedy: bool = setting(False, "win_rate and reward of greedy outputs, not of draws")
    eval_every: int | None = setting(None, "updates between evaluations; a round, at most 1000", lowest=1)
    # Which model is kept. By default the best by win_rate where there are gold answers, else by elbo.
    select_by: str | None = setting(None, "default: by the data", ("win_rate", "elbo", "self_normalized_kl"))


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(transformers.HfArgumentParser):
    # HfArgumentParser passes the metadata of a field on as arguments; two of them are ours.
    def add_argument(self, *names, lowest=None, below=None, **arguments):
        return super().add_argument(*reversed(names), **arguments)  # hyphens first in --help

    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv):
    """Command line -> Settings: what was typed, else what a resumed run had, else what goes with the model,
    else the default."""
    parser = Parser(Settings, epilog=f"toy's own: {COMPANIONS['toy']}", allow_abbrev=False)
    argv = [re.sub("^(--[a-z_-]+=)?~/", lambda x: f"{x[1] or ''}{Path.home()}/", word) for word in argv]
    typed = parser.parse_args(argv)
    before = settings_of_run(typed)
    known = COMPANIONS.get(typed.model, {})
    if typed.reward_model or typed.reward_function:  # so not with the companion's template
        known = {name: value for name, value in known.items() if not name.startswith("reward_")}
    parser.set_defaults(**(before if typed.resume else known))
    s = Settings(**vars(parser.parse_args(argv)))  # what was typed wins over these defaults
    for field in dataclasses.fields(s):
        value, lowest, below = getattr(s, field.name), field.metadata["lowest"], field.metadata["below"]
        wrong = isinstance(value, (int, float)) and not lowest <= value < below
        refuse_if(wrong, f"{flag(field.name)} {value}: must be at least {lowest} and below {below}")
    settle(s)
    odd = [x for x in before if s.resume and x not in FREE and getattr(s, x) != before[x]]
    refuse_if(odd, f"--resume: the run has {', '.join(f'{flag(x)} {before[x]}' for x in odd)}; leave it so")
    return s


def settings_of_run(typed):
    """The settings of the run in --output-dir, or None for each. Refuses a directory that must be left
    alone."""
    path = Path(typed.output_dir or "runs")
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    # A file in its place lacks X_OK.
    refuse_if(not os.access(above, os.W_OK | os.X_OK), f"--output-dir {path}: cannot be written to")
    before = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
    is_run = "samples_per_prompt" in before  # a saved model has a config.json, too
    refuse_if(typed.resume and not is_run, f"--resume: {path} holds no run; give the --output-dir of one")
    if typed.output_dir and path.exists() and any(path.iterdir()):
        refuse_if(not is_run, f"--output-dir {path}: holds other files; name another directory")
        refuse_if(typed.resume == typed.overwrite, f"--output-dir {path}: is a run; --resume or --overwrite?")
    return {name: before.get(name) for name in vars(typed)} | {"overwrite": False}  # a resumed run is kept


def settle(s):
    """Refuses settings that do not go together, and settles those that depend on others.

    Nothing has been loaded or written at this point.
    """
    if s.model == "toy":
        for name in ("reward_model", "reward_function", "dataset", "base_model", "tokenizer", "lora_rank"):
            refuse_if(getattr(s, name), f"{flag(name)}: the toy world has its own; name a model with --model")
        refuse_if(not 2 <= s.max_new_tokens <= 5, "--max-new-tokens: the toy world has outputs of 2 to 5")
        s.device = "cpu"
    else:
        refuse_if(not s.dataset, "--dataset: missing; give a hub name, directory, .jsonl, .parquet or .csv")
        refuse_if(bool(s.reward_model) == bool(s.reward_function), "give --reward-model or --reward-function")
    for name in ("reward_base", "reward_template", "reward_label"):
        refuse_if(getattr(s, name) and not s.reward_model, f"{flag(name)}: belongs to a --reward-model")
    refuse_if("{output}" not in (s.reward_template or "{output}"), "--reward-template: must contain {output}")
    if METHODS[s.method].source == "data":
        s.samples_per_prompt = 2  # a pair is what the data has; evaluation then draws 2 as well
    odd = METHODS[s.method].group_size and s.samples_per_prompt % 2
    refuse_if(odd, f"--samples-per-prompt: --method {s.method} makes pairs; give an even number")
    refuse_if(s.load_in_4bit and not s.lora_rank, "--load-in-4bit: trains an adapter; give a --lora-rank")
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with library_errors("--device", s.device):
        torch.zeros(1, device=s.device).item()
    s.dtype = s.dtype or ("bfloat16" if s.device != "cpu" and s.lora_rank else "float32")
    s.eval_every = s.eval_every or min(1000, s.updates_per_iteration)


def load_model_and_reward(s):
    """-> (Policy, reward, {split: rows}) of a real run. Small things are checked before large ones load."""
    base, adapter = s.model, find(s.model, "adapter_config.json")
    refuse_if(s.base_model and not adapter, f"--base-model: {s.model} is not an adapter; leave it out")
    if adapter:
        config = json.loads(Path(adapter).read_text())
        base = s.base_model or config["base_model_name_or_path"]
        refuse_if(not base, f"--base-model: missing; the adapter {s.model} does not name its base")
        # q_theta becomes a copy of it. peft cannot hold two that have virtual tokens or change biases.
        odd = {"num_virtual_tokens", "adapter_len"} & {*config} or config.get("bias", "none") != "none"
        refuse_if(odd, f"--model {s.model}: has virtual tokens or trained biases; give a LoRA without them")
    options = {"dtype": getattr(torch, s.dtype), "trust_remote_code": s.trust_remote_code}
    with library_errors("--base-model" if adapter else "--model", base):
        context = context_of(transformers.AutoConfig.from_pretrained(base, **options))
    refuse_if(s.max_new_tokens >= context, f"--max-new-tokens: leaves no room in a context of {context}")
    tokenizer = load_tokenizer(s.model, s.tokenizer or base, "--model", s.trust_remote_code)
    refuse_if(tokenizer.eos_token_id is None, f"--model {s.model}: its tokenizer has no eos_token")
    splits = load_splits(s)
    if s.reward_function:
        reward = RewardFunction.from_file(s.reward_function)
    else:
        names = (s.reward_model, s.reward_base, s.reward_template)
        reward = RewardModel.from_pretrained(*names, tokenizer, s.reward_label, **options)
        reward.model.to(s.device)
    options["device_map"] = {"": s.device}
    if s.load_in_4bit:
        bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": options["dtype"]}
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **bits)
    model = load_model(transformers.AutoModelForCausalLM, base, "--model", **options)
    print(f"model: {base}, {model.num_parameters():,} parameters, {options['dtype']}, on {s.device}")
    if adapter:
        import peft

        with warnings.catch_warnings(), library_errors("--model", s.model):
            # Without this, an adapter for another architecture would load as no adapter at all.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(model, s.model)
    torch.manual_seed(s.seed)  # LoRA starts at random
    return Policy(model, tokenizer, s.lora_rank, s.lora_alpha, s.outputs_per_forward), reward, splits


def execute(s):
    """From settings to a report. The toy world and real models differ in where the policy, the reward and the
    data come from, and in nothing else."""
    if s.model == "toy":
        from toy.world import Toy  # it lists all its outputs, so its posterior is known exactly

        toy = Toy(s.seed, s.dtype, s.goodness or "bradley-terry", length=s.max_new_tokens, beta=s.beta)
        policy, reward = Policy(toy.model, toy.tokenizer), RewardFunction(toy.world.reward_of, "toy")
        splits = toy.splits()
    else:
        policy, reward, splits = load_model_and_reward(s)
    # Section 5: the log-odds of a label are a logit.
    s.goodness = s.goodness or ("bradley-terry" if getattr(reward, "label", None) is None else "logistic")
    data = {name: load_prompts(rows, policy, s, name, reward) for name, rows in splits.items()}
    has_gold = any(example.gold is not None for example in data["validation"])
    s.select_by = s.select_by or ("win_rate" if has_gold else "elbo")
    refuse_if(s.select_by == "win_rate" and not has_gold, "--select-by win_rate: there are no gold answers")
    run = Run(s, reward, data)
    print(f"{run.path}: {s.method}, {s.iterations} rounds, beta {s.beta:g}, {s.goodness}, best {s.select_by}")
    train(policy, reward, data["train"], s, run)
    run.kept = run.load("best.pt")["step"]
    metrics = run.evaluate(run.kept, "test")
    save_policy(policy, run.path / "model")
    if s.model == "toy":
        toy.report(policy.model, run.path / "toy.png", metrics)
    run.report()
    kept = f"the policy of update {run.kept}" if run.kept else "the untrained prior, which no update beat"
    print(f"{run.path}: model/ is {kept}, by {s.select_by}")
    print(f"to generate: transformers.pipeline('text-generation', '{run.path / 'model'}')('A prompt')")


def main(argv=None):
    """-> exit code: 0; 2 for what the user can fix, with one line on stderr; 130 after an interrupt"""
    logging.disable(logging.ERROR)  # of other libraries. `load_model` refuses what matters in their warnings.
    warnings.simplefilter("ignore", FutureWarning)  # libraries warn about each other's future
    s = Settings()
    try:
        s = parse(sys.argv[1:] if argv is None else list(map(str, argv)))
        execute(s)
        return 0
    except KeyboardInterrupt:
        print(f"brain: interrupted; to go on: --resume --output-dir {s.output_dir or 'RUN'}", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"brain: {error}", file=sys.stderr)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        print(f"brain: {error}; then --resume (out of memory: lower --outputs-per-forward)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
