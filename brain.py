"""BRAIn: Bayesian Reward-conditioned Amortized Inference (Pandey et al., 2024), in one file.

A language model p (the prior) writes outputs y for a prompt x. Conditioned on being good, G = 1, its
outputs follow the posterior

    p(y|x, G=1)  =  p(y|x) p(G=1|y,x) / p(G=1|x)                                             (eq. 1)

from which nobody can sample. BRAIn trains a policy q_theta to be that posterior. It draws n outputs from
a proposal q', weighs each by how likely it is under the posterior (alpha_hat) and under the policy
(beta_hat), both normalised over the n, and follows

    sum_i (alpha_hat_i - beta_hat_i) grad log q_theta(y_i|x)                                 (eq. 12)

which moves probability to outputs that the posterior has more of than the policy, and away from those of
which it has less. That is an unbiased estimate of the gradient of -D_n, a self-normalised KL divergence
(eq. 13) that is zero at the posterior and nowhere else. DPO is its corner n = 2 with argmax weights.

    python brain.py                                                  a toy world with a known posterior
    python brain.py --model CarperAI/openai_summarize_tldr_sft       the paper's summarisation model
    pytest                                                           every claim below, checked

Map                                    paper                        here
    goodness from a reward             section 5, eq. 15, 19        log_goodness
    posterior weights alpha_hat        eq. 6, 20, 21                posterior_weights
    policy weights beta_hat            eq. 11                       policy_weights
    self-normalised KL divergence      eq. 13, 14                   self_normalized_kl
    the loss, with eq. 12 as gradient  eq. 12, Theorem 4.2          brain_loss
    DPO                                section 6, Theorem 6.1       dpo_loss
    rows of Tables 1 and 3             section 9                    METHODS, rejection_sample
    p, q_theta and sampling            section 3                    Policy
    the loop                           Algorithm 1                  train, collect, update
    win-rate                           section 8                    win_rate, evaluate

Departures from the paper, cited below by number
 1. Line 9 of Algorithm 1 stands inside the loop over y; alpha_hat is normalised once all n are there.
 2. Line 19 sums over the batch, here it is the mean: Adam's steps do not depend on that factor (but for
    its epsilon), and the loss printed does not depend on the batch size.
 3. AdamW (decay apart from the gradient), where the paper says Adam with weight decay.
 4. Ties count half in a win-rate. The paper counts strictly higher: two equal models then score below 50.
 5. e, m, k, the batch size and the decoding of evaluation are not in the paper; the defaults are ours.
 6. An argmax gives tied outputs equal weight: it is the limit of the softmax as its temperature falls.
 7. Eq. 29 of the paper should read: grad log beta = grad log q_theta. Nothing else depends on it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ==========================================================================================
# Part I, the method.   1. Mathematics
#
# Pure functions of tensors (..., n): the n outputs of a prompt on the last axis, any axes before it.
# Everything is a log-probability (nats) until the last moment: exp(reward) overflows at 89 in float32.


def log_goodness(reward, model="bradley-terry"):
    """log p(G=1|y,x) up to a constant of the prompt, from rewards (..., n). -> (..., n)

    "bradley-terry"  r (eq. 19): a reward model trained on preferences fixes differences alone, and the
                     unknown constant cancels in alpha_hat.
    "logistic"       log sigmoid(r) (eq. 15): a reward that is the logit of a good/bad classifier.
    Taking one for the other conditions on another event: good outputs stop mattering once sigmoid is 1.
    """
    if model == "bradley-terry":
        return reward
    if model == "logistic":
        return F.logsigmoid(reward)  # log(sigmoid(r)) is -inf from r = -104 on
    raise ValueError(f"unknown goodness model {model!r}: 'bradley-terry' or 'logistic'")


def posterior_weights(log_p, log_q_proposal, log_goodness):
    """alpha_hat of eq. 6 (20 and 21 for Bradley-Terry), all arguments (..., n). -> (..., n), sums to 1

    alpha_i = p(y_i|x) p(G=1|y_i,x) / q'(y_i|x). p(G=1|x) is the same for all i and cancels. Without
    log_p - log_q_proposal, outputs that a renewed proposal favours are counted twice: once for being
    drawn often, once for their reward.
    """
    return torch.softmax(log_p - log_q_proposal + log_goodness, dim=-1)


def policy_weights(log_q, log_q_proposal):
    """beta_hat of eq. 11, arguments (..., n). -> (..., n), sums to 1. All equal where q_theta = q'."""
    return torch.softmax(log_q - log_q_proposal, dim=-1)


def self_normalized_kl(alpha_hat, beta_hat):
    """D_KL(alpha_hat || beta_hat) of eq. 14 in nats, weights (..., n). -> (...). Its mean over draws is D_n.

    0 log 0 = 0: an output without posterior weight costs nothing, however unlikely the policy finds it.
    Infinite where beta_hat is 0 and alpha_hat is not.
    """
    counts = alpha_hat > 0  # masked before the logarithm: 0 * -inf and its gradient are nan
    return (alpha_hat * torch.where(counts, alpha_hat / beta_hat, 1.0).log()).sum(-1)


def brain_loss(log_q, log_q_proposal, alpha_hat, baseline=True):
    """The loss: D_KL(alpha_hat || beta_hat) (eq. 14), mean over the leading axes. -> scalar, nats

    log_q           (..., n) log q_theta(y_i|x), with gradient: the only argument that gets one
    log_q_proposal  (..., n) log q'(y_i|x), cached when y_i was drawn
    alpha_hat       (..., n) posterior weights, cached at the same time

    Its gradient is minus eq. 12. Since log beta_hat_i = log_q_i - log q'_i - logsumexp(log_q - log q'),
        grad -sum_i alpha_i log beta_hat_i  =  -sum_i alpha_i grad log_q_i + sum_j beta_hat_j grad log_q_j
    where the second sum, the gradient of the logsumexp, is the baseline (eq. 10). Theorem 4.2 is that line.
    With a one-hot alpha_hat and n = 2 it is the DPO loss (Theorem 6.1).

    baseline=False: -sum_i alpha_i log_q_i, whose gradient is minus eq. 7 (section 9.3). Every output is
    pulled up, the bad ones too, and the gradient at the posterior is noise that does not vanish.
    """
    alpha_hat, log_q_proposal = alpha_hat.detach(), log_q_proposal.detach()
    counts = alpha_hat > 0  # 0 * -inf is nan
    if not baseline:
        return -(alpha_hat * log_q.where(counts, 0.0)).sum(-1).mean()
    # log_softmax, not the logarithm of beta_hat, which is 0 once an output is e^-104 times as likely.
    log_beta = torch.log_softmax(log_q - log_q_proposal, dim=-1)
    log_alpha = torch.where(counts, alpha_hat, 1.0).log()
    return (alpha_hat * (log_alpha - log_beta.where(counts, 0.0))).sum(-1).mean()


def dpo_loss(log_q_chosen, log_q_rejected, log_p_chosen, log_p_rejected):
    """DPO (eq. 7 of Rafailov et al., 2023) at beta = 1, arguments (...). -> scalar, mean. For comparison.

    Training never calls it: `brain_loss` with two outputs and alpha_hat = (1, 0) is the same number
    (Theorem 6.1). beta = 1 is what the posterior of eq. 1 asks for; TRL's default is 0.1.
    """
    return -F.logsigmoid((log_q_chosen - log_p_chosen) - (log_q_rejected - log_p_rejected)).mean()


def effective_sample_size(weights):
    """1 / sum of squares of weights (..., n) that sum to 1. -> (...), from 1 (one counts) to n (all equal)."""
    return 1 / weights.square().sum(-1)


def win_rate(rewards, gold_rewards):
    """(per cent of prompts where the output beats the gold answer, half-width of its 95% interval).

    Two sequences or tensors of N rewards. Ties count half (departure 4). The interval is the normal one,
    196 sqrt(w (1 - w) / N), as in Table 1. ValueError for N = 0 or different lengths.
    """
    ours, gold = (torch.as_tensor(r, dtype=torch.float64).reshape(-1).cpu() for r in (rewards, gold_rewards))
    if len(ours) != len(gold) or not len(ours):
        raise ValueError(f"{len(ours)} rewards against {len(gold)} gold rewards: give one each, at least one")
    won = ((ours > gold).double() + (ours == gold).double() / 2).mean().item()
    return 100 * won, 196 * math.sqrt(won * (1 - won) / len(ours))


# ------------------------------------------------------------------------------------------
# 2. Methods: the rows of Tables 1 and 3, as settings of one code path


@dataclass(frozen=True)
class Method:
    """What distinguishes BRAIn from its baselines.

    source      where a prompt's n outputs come from:
                "policy"  the proposal q' = q_theta, renewed every round (line 21)
                "prior"   q' = p for good (section 9.5)
                "rso"     4n draws from p, n of which are kept by `rejection_sample`
                "data"    the data's own pair (chosen, rejected); n = 2
    group_size  over how many outputs weights are normalised; None: over all n
    argmax      all weight to the best output, in place of the softmax of eq. 6
    baseline    subtract eq. 10; without it, eq. 7 (section 9.3)
    """

    source: str = "policy"
    group_size: int | None = None
    argmax: bool = False
    baseline: bool = True

    def grouped(self, x):
        """(n,) -> (groups, group size): 32 outputs are 16 pairs, or one group of 32."""
        return x.reshape(-1, self.group_size or x.shape[-1])

    def weights(self, log_p, log_q_proposal, log_goodness):
        """alpha_hat (n,), normalised within groups. Its arguments (n,)."""
        log_p, log_q_proposal, log_goodness = map(self.grouped, (log_p, log_q_proposal, log_goodness))
        if self.source == "data":  # people chose: the first of each pair
            return F.one_hot(torch.zeros(len(log_p), dtype=torch.long), 2).to(log_p).reshape(-1)
        if not self.argmax:
            return posterior_weights(log_p, log_q_proposal, log_goodness).reshape(-1)
        score = log_p - log_q_proposal + log_goodness
        best = (score == score.amax(-1, keepdim=True)).to(score)
        return (best / best.sum(-1, keepdim=True)).reshape(-1)  # departure 6


METHODS = {
    "brain": Method(),
    "brain-no-baseline": Method(baseline=False),
    "dpo-sft+iw+n": Method("prior"),  # also section 9.5: BRAIn with a fixed proposal
    "dpo-sft+iw": Method("prior", group_size=2),
    "dpo-sft": Method("prior", group_size=2, argmax=True),
    "rso": Method("rso", group_size=2, argmax=True),
    "dpo": Method("data", group_size=2, argmax=True),
}
RSO_CANDIDATES = 4  # draws for each output that is kept; with 1 nothing is ever rejected


def rejection_sample(log_goodness, n, generator=None):
    """Statistical rejection sampling (Liu et al., 2023) of n among candidates drawn from the prior. -> (n,) indices

    log_goodness (N,), N >= n. A candidate is accepted with probability exp(g - g_max); accepted ones leave,
    and g_max is taken anew over the rest, until n are kept. An approximation: it is exact only with the
    maximum over all outputs in place of g_max, and with candidates that do not run out.
    """
    left, kept = torch.arange(len(log_goodness)), []
    while len(kept) < n:
        chance = (log_goodness[left] - log_goodness[left].max()).double().exp()
        accepted = torch.rand(len(left), generator=generator, dtype=torch.float64) < chance  # the best always is
        kept += left[accepted].tolist()
        left = left[~accepted]
    return torch.tensor(kept[:n])


# ------------------------------------------------------------------------------------------
# 3. The policy: one causal LM as the prior p, the proposal q' and the policy q_theta


def shareable(cache):
    """Whether a prompt's cache can be handed to many outputs: keys and values, nothing recurrent."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    layers = getattr(cache, "layers", None) or [None]
    return all(isinstance(k, DynamicLayer) and not isinstance(k, LinearAttentionCacheLayerMixin) for k in layers)


def share(cache, rows):
    """A new cache that begins as copies of `cache`: its one row `rows` times, or the rows listed in a tensor.

    A forward grows the cache that it is given. The layers are copied before they are repeated, so the
    original stays as it was after the prompt, and gradients of all copies meet in its keys and values.
    """
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    if isinstance(rows, int):
        cache.batch_repeat_interleave(rows)
    else:
        cache.batch_select_indices(rows)
    return cache


class Policy:
    """A causal LM and its tokenizer as p, q' and q_theta. All three agree on what can be drawn, and how likely.

    model                a transformers causal LM, or a PeftModel whose adapter belongs to the prior
    tokenizer            says which ids exist: GPT-J has 50400 logits and 50257 tokens, the rest is never drawn
    lora_rank            0: all weights of `model` are trained, and p is a frozen copy of it. Else q_theta is a
                         LoRA adapter, and p the same weights with the adapter off. If `model` has an adapter
                         already, p keeps it and q_theta is a second one of its shape, started from it.
    lora_alpha           LoRA's scale is lora_alpha / lora_rank
    outputs_per_forward  how many outputs go through the model at once; None: all n. Bounds memory, changes
                         no result.

    Dropout is off for good: with it, beta_hat is noise where it should be 1/n (q_theta = q'). A checkpoint's
    generation config is ignored but for its end-of-sequence ids: top-k or a temperature would make log q'
    something else than the log-probability of what was sampled, and break support(p) in support(q').
    """

    def __init__(self, model, tokenizer, lora_rank=0, lora_alpha=32, outputs_per_forward=None):
        self.tokenizer, self.outputs_per_forward = tokenizer, outputs_per_forward
        self.prior_model = self.prior_adapter = None
        self.adapter = "default"
        has_adapter = hasattr(model, "peft_config")
        if not lora_rank:
            self.model = (model.merge_and_unload() if has_adapter else model).requires_grad_(True)
            self.prior_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        elif has_adapter:
            self.model = self._second_adapter(model, lora_rank, lora_alpha)
        else:
            self.model = add_adapter(model, lora_rank, lora_alpha)
        self.model.eval()
        base = self.model.get_base_model() if lora_rank else self.model
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions, self._takes_keep = "position_ids" in accepted, "logits_to_keep" in accepted
        self.device, self.config = base.device, base.config.get_text_config(decoder=True)
        # A chat model may end with several tokens: the tokenizer's and those of the generation config, together.
        ends = {tokenizer.eos_token_id}.union(np.atleast_1d(getattr(base.generation_config, "eos_token_id", None)).tolist()) - {None}
        self.end_ids = torch.tensor(sorted(ends), dtype=torch.long, device=self.device)
        self._known = torch.tensor(sorted(set(tokenizer.get_vocab().values())), dtype=torch.long)
        self._told = False

    def _second_adapter(self, model, lora_rank, lora_alpha):
        """q_theta as a copy of the prior's adapter, so that q_theta = p at step 0."""
        self.prior_adapter, self.adapter = model.active_adapter, "policy"
        config = copy.deepcopy(model.peft_config[self.prior_adapter])
        if (config.r, config.lora_alpha) != (lora_rank, lora_alpha):
            raise ValueError(f"the prior's adapter has rank {config.r} and alpha {config.lora_alpha}: the policy starts as a copy of it, "
                             f"so it cannot have rank {lora_rank} and alpha {lora_alpha}")  # fmt: skip
        config.inference_mode, config.lora_dropout = False, 0.0
        model.add_adapter("policy", config)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if ".policy." in name:
                    weight.copy_(weights[name.replace(".policy.", f".{self.prior_adapter}.")])
        model.requires_grad_(False)
        model.set_adapter("policy")
        return model

    def parameters(self):
        """What is trained: {name: parameter}."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def _weights(self, prior):
        """The model with q_theta's weights, or with p's."""
        if not prior:
            yield self.model
        elif self.prior_model is not None:
            yield self.prior_model
        elif self.prior_adapter is not None:
            self.model.set_adapter(self.prior_adapter, inference_mode=True)  # without it, the prior gets gradients
            try:
                yield self.model
            finally:
                self.model.set_adapter(self.adapter)
        else:
            with self.model.disable_adapter():
                yield self.model

    # ---- forwards

    def _scores(self, logits):
        """Log-softmax numerators (..., V): float32 at least, -inf for ids that the tokenizer does not have."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if len(self._known) == logits.shape[-1]:
            return logits
        unknown = torch.ones(logits.shape[-1], dtype=torch.bool)
        unknown[self._known[self._known < logits.shape[-1]]] = False
        return logits.masked_fill(unknown.to(logits.device), -torch.inf)

    def _token_log_probs(self, logits, ids):
        """log-probability of ids (...) under logits (..., V). -> (...)"""
        scores = self._scores(logits)
        # gather - logsumexp, not log_softmax: that would hold a second tensor of the size of the logits
        return scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)

    def _forward(self, model, ids, keep, mask=None, cache=None, use_cache=True):
        """One forward: ids (B, T), mask (B, past + T) or None where nothing is padded on the left. -> output

        keep: logits of the last `keep` positions alone. The vocabulary matrix over a prompt of 500 tokens is
        the largest tensor of all, and of no use. Positions count from each row's first real token.
        """
        arguments = {"logits_to_keep": keep} if self._takes_keep else {}
        if mask is not None:
            arguments["attention_mask"] = mask
            if self._takes_positions:
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(input_ids=ids, past_key_values=cache, use_cache=use_cache, **arguments)
        output.logits = output.logits[:, -keep:]
        return output

    def _prefill(self, model, ids, mask=None):
        """Prompts (B, P) once. -> (logits (B, V) of the first output token, their cache, or None if it cannot be shared)"""
        output = self._forward(model, ids, 1, mask)
        cache = getattr(output, "past_key_values", None)
        if shareable(cache):
            return output.logits[:, -1], cache
        if not self._told:
            self._told = True
            print(f"brain: {type(model).__name__} keeps a state that outputs cannot share; each is computed whole: right, but slower", file=sys.stderr)
        return output.logits[:, -1], None

    # ---- scoring

    def log_prob(self, prompt_ids, outputs, prior=False):
        """log q_theta(y_i|x), or log p(y_i|x) with prior=True. -> (n,) nats, with gradient (none for the prior)

        prompt_ids (P,); outputs: n LongTensors (T_i,) as `sample` returns them, the end token included: it is
        an outcome like any other, and so is being cut, whose probability is that of the prefix.

        The prompt is encoded once and its cache shared by the n outputs: the same numbers as n whole
        sequences, at a fraction of the cost. With `outputs_per_forward` the outputs go in chunks that are
        computed again in the backward, so that the activations of one chunk exist at a time; the gradients of
        all chunks meet in the prompt's cache, and go through the prompt once. Half precision is summed in float32.
        """
        prompt = prompt_ids.to(self.device)[None]  # (1, P)
        size = self.outputs_per_forward or len(outputs)
        chunks = [outputs[i : i + size] for i in range(0, len(outputs), size)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not prior), self._weights(prior) as model:
            first, cache = self._prefill(model, prompt)

            def score(chunk):
                return self._score(model, prompt, chunk, first, cache)

            if len(chunks) > 1 and torch.is_grad_enabled():
                return torch.cat([checkpoint(score, c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
            return torch.cat([score(c) for c in chunks])

    def _score(self, model, prompt, outputs, first, cache):
        """Log-probabilities (c,) of c outputs that continue one prompt (1, P) with cache and next-token logits (1, V)."""
        ids, real = pad_right(outputs, self.device)  # (c, T), padding never looks back: attention is causal
        count, length = ids.shape
        if cache is None:  # whole sequences; their last T positions but one predict the output
            whole = torch.cat([prompt.expand(count, -1), ids[:, :-1]], 1)
            logits = self._forward(model, whole, length, use_cache=False).logits
            return torch.where(real, self._token_log_probs(logits, ids), 0.0).sum(-1)
        log_prob = self._token_log_probs(first.expand(count, -1), ids[:, 0])
        if length > 1:
            logits = self._forward(model, ids[:, :-1], length - 1, cache=share(cache, count)).logits  # (c, T-1, V)
            log_prob = log_prob + torch.where(real[:, 1:], self._token_log_probs(logits, ids[:, 1:]), 0.0).sum(-1)
        return log_prob

    @torch.no_grad()
    def log_prob_batch(self, prompts, outputs, prior=False):
        """Like log_prob without gradient, for B prompts with one output each. -> (B,). What evaluation needs."""
        ids, mask = pad_left(prompts, self.device)
        targets, real = pad_right(outputs, self.device)
        with self._weights(prior) as model:
            whole = torch.cat([ids, targets[:, :-1]], 1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(targets[:, :-1].shape)], 1)
            logits = self._forward(model, whole, targets.shape[1], mask, use_cache=False).logits
            return torch.where(real, self._token_log_probs(logits, targets), 0.0).sum(-1)

    # ---- sampling

    def sample(self, prompt_ids, n, max_new_tokens, prior=False, generator=None, greedy=False):
        """n outputs of one prompt (P,), from the plain softmax of q_theta (or p). -> list of n LongTensors (T_i,)

        Each ends with its end-of-sequence token, or is cut after max_new_tokens. Line 6 of Algorithm 1:
        sampling from the present q_theta *is* the proposal update of line 21, no copy of q' is kept.
        generator: a CPU torch.Generator; the same one gives the same outputs, in whatever batches.
        """
        return self.sample_batch([prompt_ids], n, max_new_tokens, prior, [generator], greedy)[0][0]

    @torch.no_grad()
    def sample_batch(self, prompts, n, max_new_tokens, prior=False, generators=None, greedy=False):
        """As `sample`, for B prompts at once. -> (list of B lists of n outputs, their log-probabilities (B, n))

        The log-probabilities are the sampler's own sums: equal to log_prob's to rounding. Training takes
        log_prob's, so that beta_hat is 1/n at step 0 and not nearly so.
        """
        # One uniform number for each token to come, drawn beforehand: what a row draws does not depend on
        # the rows beside it, on chunks, or on which of them have ended.
        uniform = [torch.rand(n, max_new_tokens, dtype=torch.float64, generator=g) for g in generators or [None] * len(prompts)]
        uniform = torch.cat(uniform).to(self.device)  # (B n, T)
        ids, mask = pad_left(prompts, self.device)
        outputs, log_prob = [], []
        with self._weights(prior) as model:
            logits, cache = self._prefill(model, ids, mask)
            if cache is None and mask is not None:  # a recurrent state would run over the padding
                alone = [self.sample_batch([p], n, max_new_tokens, prior, [g], greedy) for p, g in zip(prompts, generators or [None] * len(prompts))]
                return [o[0] for o, _ in alone], torch.cat([log_prob for _, log_prob in alone])
            for rows in torch.arange(len(uniform), device=self.device).split(self.outputs_per_forward or len(uniform)):
                state = (ids[rows // n], logits[rows // n], mask if mask is None else mask[rows // n], cache and share(cache, rows // n))
                some, sums = self._continue(model, *state, uniform[rows], greedy)
                outputs += some
                log_prob.append(sums)
        return [outputs[i : i + n] for i in range(0, len(outputs), n)], torch.cat(log_prob).reshape(-1, n)

    def _continue(self, model, prompts, logits, mask, cache, uniform, greedy):
        """Draw R outputs token by token from next-token logits (R, V); rows that have ended leave the batch."""
        rows = torch.arange(len(prompts), device=self.device)  # which outputs are still being written
        drawn = torch.full(uniform.shape, -1, device=self.device)  # (R, T)
        log_prob = torch.zeros(len(rows), dtype=self._scores(logits).dtype, device=self.device)
        for t in range(drawn.shape[1]):
            scores = self._scores(logits)
            if greedy:
                token = scores.argmax(-1)
            else:  # inverse of the cumulative distribution, in float64: 50,000 float32 terms lose the rare tokens
                cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
                token = torch.searchsorted(cumulative, uniform[rows, t, None] * cumulative[:, -1:], right=True)[:, 0]
            drawn[rows, t] = token
            log_prob[rows] += self._token_log_probs(logits, token)
            going = ~torch.isin(token, self.end_ids)
            if not going.any() or t + 1 == drawn.shape[1]:
                break
            if not going.all():
                rows, token = rows[going], token[going]
                mask = mask if mask is None else mask[going]
                cache = cache and share(cache, going.nonzero()[:, 0])
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
            if cache is None:
                logits = self._forward(model, torch.cat([prompts[rows], drawn[rows, : t + 1]], 1), 1, use_cache=False).logits[:, -1]
            else:
                logits = self._forward(model, token[:, None], 1, mask, cache).logits[:, -1]
        return [row[row >= 0].cpu() for row in drawn], log_prob

    # ---- outputs as text, weights as files

    def ended(self, output):
        """Whether an output ended by itself, rather than being cut."""
        return bool(torch.isin(output[-1].to(self.device), self.end_ids))

    def text(self, prompt_ids, output):
        """What an output adds to its prompt, as text, without its end token.

        Decoded together with the prompt, and the prompt taken off: SentencePiece drops the first space of what
        is decoded alone.
        """
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        prompt, output = prompt_ids.tolist(), output[: len(output) - self.ended(output)].tolist()
        before, whole = decode(prompt), decode(prompt + output)
        return whole[len(before) :] if whole.startswith(before) else decode(output)

    def save(self, directory):
        """The policy and its tokenizer, for transformers (all weights) or peft (the adapter) to load."""
        if self.prior_model is not None:
            self.model.save_pretrained(directory)
        else:
            from peft import get_peft_model_state_dict
            from safetensors.torch import save_file

            weights = get_peft_model_state_dict(self.model, adapter_name=self.adapter)
            save_file({name: w.contiguous() for name, w in weights.items()}, Path(directory, "adapter_model.safetensors"))
            self.model.peft_config[self.adapter].save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def load(self, directory):
        """The weights of `save` back into q_theta."""
        if self.prior_model is not None:
            saved = type(self.model).from_pretrained(directory, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
        else:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(self.model, load_file(Path(directory, "adapter_model.safetensors")), adapter_name=self.adapter)


def add_adapter(model, rank, alpha):
    """A fresh LoRA adapter (peft), on the layers that peft knows for this architecture, else on all linear ones."""
    from peft import LoraConfig, get_peft_model

    # B starts at zero: q_theta = p at step 0. Dropout in the adapter would break that at the first update.
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError:  # "Please specify `target_modules`": peft has no map for it
        config.target_modules = "all-linear"
        return get_peft_model(model, config)


def pad_right(sequences, device):
    """n LongTensors (T_i,) -> ids (n, T) and which of them are real, (n, T) bool."""
    ids = torch.nn.utils.rnn.pad_sequence([s.to(device) for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    return ids, torch.arange(ids.shape[1], device=device) < lengths[:, None]


def pad_left(sequences, device):
    """B LongTensors (P_i,) -> ids (B, P) and the attention mask (B, P), None where all are of one length."""
    ids, real = pad_right([s.flip(0) for s in sequences], device)
    return ids.flip(1), None if real.all() else real.flip(1).long()


# ------------------------------------------------------------------------------------------
# 4. Algorithm 1


@dataclass
class Samples:
    """One prompt of D_t with its n outputs and all that Algorithm 1 caches about them (lines 8 and 9)."""

    iteration: int  # the round that drew them; log_q_proposal is that round's (older rounds keep theirs)
    row: int  # of the training data
    prompt_ids: torch.Tensor  # (P,)
    outputs: list  # n LongTensors (T_i,)
    texts: list  # n strings
    reward: torch.Tensor  # (n,)
    log_p: torch.Tensor  # (n,)
    log_q_proposal: torch.Tensor  # (n,)
    alpha_hat: torch.Tensor  # (n,)


# One stream of random numbers per purpose. All randomness of a run is drawn from (seed, purpose, indices):
# there is no state to save, and nothing depends on the number of processes or on where a run was resumed.
PROMPTS, OUTPUTS, BATCHES, HELD_OUT, EVALUATION, SPLITS = range(6)


def seeded(*numbers):
    """A CPU generator that depends on these numbers alone."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def random_subset(size, count, *numbers):
    """min(count, size) different indices below size, in random order."""
    return torch.randperm(size, generator=seeded(*numbers))[:count].tolist()


def train(policy, reward, data, settings, run):
    """Algorithm 1, with the paper's line numbers. `policy` is trained in place.

    policy    Policy: p, q' and q_theta (line 1: all the same at first)
    reward    reward(prompt, texts, columns) -> (n,): r(x, y)
    data      Prompts: D
    settings  Settings: e, m, n, k in words
    run       Run: keeps D_t, the metrics and checkpoints, so that a killed run goes on where it was
    """
    method = METHODS[settings.method]
    optimizer = torch.optim.AdamW(  # departure 3
        policy.parameters().values(), lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2), weight_decay=settings.weight_decay
    )
    step, buffer = run.restore(policy, optimizer, data)  # line 2: nothing yet, in a new run
    last = settings.iterations * settings.updates_per_iteration
    for t in range(1, settings.iterations + 1):  # line 3
        rows = random_subset(len(data), settings.prompts_per_iteration, settings.seed, PROMPTS, t)  # line 4: S_t
        rows = rows[sum(samples.iteration == t for samples in buffer) :]  # those that a killed run has left
        for samples in run.shared_out(rows, lambda row: collect(policy, reward, data[row], t, settings), f"round {t}: sampling"):  # line 5
            run.keep(samples, data[samples.row].prompt)
            buffer.append(samples)  # line 12
        run.warn_about_samples([samples for samples in buffer if samples.iteration == t and rows], policy)
        for step in run.progress(range(step + 1, t * settings.updates_per_iteration + 1), f"round {t}: updates"):  # line 13
            batch = [buffer[i] for i in random_subset(len(buffer), settings.batch_size, settings.seed, BATCHES, step)]  # line 14
            metrics = update(policy, optimizer, batch, method, run)
            run.log({"step": step, **metrics})
            if step % settings.eval_every == 0 or step == last:
                run.evaluate(policy, step)
            if step % settings.eval_every == 0 or step == t * settings.updates_per_iteration:
                run.save_checkpoint(policy, optimizer, step)
        # Line 21, q' <- q_theta, is what collect does in the next round: it samples from the q_theta of that time.


def collect(policy, reward, example, t, settings):
    """Lines 6 to 10 for one prompt x: draw its outputs, cache log q', log p, r and alpha_hat. -> Samples"""
    method, n = METHODS[settings.method], settings.samples_per_prompt
    generator = seeded(settings.seed, OUTPUTS, t, example.row)
    fixed = method.source != "policy"  # q' = p, as the methods other than BRAIn have it
    if method.source == "data":
        outputs = example.pair
    else:
        draws = n * RSO_CANDIDATES if method.source == "rso" else n
        outputs = policy.sample(example.ids, draws, settings.max_new_tokens, prior=fixed, generator=generator)  # line 6
    texts = [policy.text(example.ids, output) for output in outputs]
    rewards = reward(example.prompt, texts, example.columns)  # line 8: r(x, y)
    if method.source == "rso":
        kept = rejection_sample(log_goodness(rewards, settings.goodness), n, generator).tolist()
        outputs, texts, rewards = [outputs[i] for i in kept], [texts[i] for i in kept], rewards[kept]
    with torch.no_grad():  # line 8, by the same function that scores log q_theta in `update`
        log_p = policy.log_prob(example.ids, outputs, prior=True).cpu()
        log_q_proposal = log_p if fixed else policy.log_prob(example.ids, outputs).cpu()
    rewards = rewards.to(log_p)
    alpha_hat = method.weights(log_p, log_q_proposal, log_goodness(rewards, settings.goodness))  # line 9, departure 1
    return Samples(t, example.row, example.ids, outputs, texts, rewards, log_p, log_q_proposal, alpha_hat)


def update(policy, optimizer, batch, method, run):
    """Lines 15 to 19: one step of theta on a batch of prompts. -> the line of metrics

    Diagnostics are means over the batch, of weights as they are: nothing is clipped anywhere. Watch
        ess_alpha    near 1: one output has all the weight; rewards spread too far, or n is too small
        ess_beta     starts at n; falls as q_theta leaves the proposals that drew D_t. Near 1: renew sooner
        max_weight   the largest alpha_hat or beta_hat of the batch
        kl_to_prior  sum beta_hat (log q_theta - log p): a self-normalised estimate of KL(q_theta || p), nats
        ended        share of outputs that ended by themselves
    """
    optimizer.zero_grad()
    lines = []
    for samples in batch[run.rank :: run.processes]:  # line 15
        weights = [w.to(policy.device) for w in (samples.log_p, samples.log_q_proposal, samples.alpha_hat)]
        log_p, log_q_proposal, alpha_hat = map(method.grouped, weights)
        log_q = method.grouped(policy.log_prob(samples.prompt_ids, samples.outputs))  # (groups, group size)
        loss = brain_loss(log_q, log_q_proposal, alpha_hat, method.baseline)  # lines 16 and 17
        (loss / len(batch)).backward()  # departure 2
        beta_hat = policy_weights(log_q.detach(), log_q_proposal)
        line = {
            "loss": loss.detach(),
            "reward": samples.reward.mean(),
            "kl_to_prior": (beta_hat * (log_q.detach() - log_p)).sum(-1).mean(),
            "ess_alpha": effective_sample_size(alpha_hat).mean(),
            "ess_beta": effective_sample_size(beta_hat).mean(),
            "max_weight": torch.maximum(alpha_hat, beta_hat).max(),
            "ended": np.mean([policy.ended(output) for output in samples.outputs]),
        }
        lines.append({name: float(value) for name, value in line.items()})
    lines = run.gather(lines)
    metrics = {name: float((np.max if name == "max_weight" else np.mean)([line[name] for line in lines])) for name in lines[0]}
    run.average_gradients(policy)
    if not all(map(math.isfinite, metrics.values())) or not all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters().values()):
        run.stop_on_nonfinite(metrics, batch)  # before the weights are touched
    optimizer.step()  # line 19
    return metrics


# ==========================================================================================
# Part II, running it.   5. Rewards


class UserError(Exception):
    """Something that the user can mend: printed in a line, exit code 2."""


def refuse(message):
    raise UserError(message)


def fill(template, prompt, output):
    """`{prompt}` and `{output}` of a template, in one pass: .format would reach attributes ({prompt.__class__}),
    and a chain of .replace would mangle a prompt that contains "{output}"."""
    pieces = re.split(r"\{(prompt|output)\}", template)  # text, name, text, name, .., text
    return "".join({"prompt": prompt, "output": output}[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def encode(tokenizer, text):
    """Token ids of a text, with the beginning-of-sequence token that this tokenizer is used to, and no end token.

    A chat template has written that token already: it is not doubled. An end token after a prompt ends the
    conversation, and after a text it moves "the last token", where a reward model is read.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[0] == bos and ids[:1] != [bos]:
        ids = [bos] + ids
    return ids


class RewardModel:
    """A sequence-classification model with one label: r(x, y) is its score at the last token of a filled template.

    model      a transformers *ForSequenceClassification
    template   text with {prompt} and {output}; the default joins them. A prompt that is a list of messages goes
               through the tokenizer's chat template instead, the output as the assistant's message.
    """

    def __init__(self, model, tokenizer, template=None):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template or "{prompt}{output}"
        config = model.config.get_text_config(decoder=True)
        self.context = getattr(config, "max_position_embeddings", None) or math.inf
        self.head = getattr(model, "score", None)  # decoders have it; encoders such as BERT read their own pooled token
        self._told = False

    @classmethod
    def from_pretrained(cls, name, base=None, template=None, tokenizer=None, dtype=torch.float32, device="cpu"):
        """A directory or hub name with config and tokenizer, or a bare checkpoint (one .bin or .pt file): then
        `base` names the model that gives both. `tokenizer` is for a model that has none. UserError if it does not fit."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        path = bare_checkpoint(name)
        if path is None:
            model = load(AutoModelForSequenceClassification, name, "--reward-model", dtype=dtype)
            if model.config.num_labels != 1:
                refuse(f"--reward-model {name}: has {model.config.num_labels} labels; a reward model has one")
        else:
            if base is None:
                refuse(f"--reward-model {name}: is weights alone, without config and tokenizer; name the model it was trained from with --reward-base")
            config = load(AutoConfig, base, "--reward-base", num_labels=1)
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
            fill_weights(model, path, dtype)
        model.config.pad_token_id = model.config.pad_token_id or 0
        return cls(model.to(device), load_tokenizer(name if path is None else base, tokenizer, "--reward-base"), template)

    @torch.no_grad()
    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt (text, or a list of messages). -> (n,) float32"""
        texts = [self._text(prompt, output) for output in outputs]
        if self.head is None:
            batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            self._check_length(batch.input_ids.shape[1])
            return self.model(**batch).logits[:, 0].float().cpu()
        ids = [torch.tensor(encode(self.tokenizer, text)) for text in texts]
        self._check_length(max(map(len, ids)))
        return self._scores(ids).float().cpu()

    def _text(self, prompt, output):
        if isinstance(prompt, str):
            return fill(self.template, prompt, output)
        if not self.tokenizer.chat_template:
            refuse("--reward-model: the prompts are messages, and its tokenizer has no chat template; use another reward model, or --reward-function")
        return self.tokenizer.apply_chat_template(prompt + [{"role": "assistant", "content": output}], tokenize=False)

    def _check_length(self, length):
        if length > self.context:
            refuse(f"--reward-model: a text of {length} tokens is longer than its context of {self.context}; lower --max-prompt-tokens or --max-new-tokens")

    def _scores(self, ids):
        """Score head at the last token of n sequences of ids. -> (n,)

        What they begin with in common, as tokens, is computed once (the same prompt, but a tokenizer may join
        its last letters with an output's first). Not the model's own pooling: it looks for the last token that
        is not padding, and so skips an end token that the template asks for where pad = eos.
        """
        decoder, device = self.model.base_model, self.model.device
        common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*(s.tolist() for s in ids))))
        common = min(common, min(map(len, ids)) - 1)  # at least one token of each is its own
        cache = None
        if common and len(ids) > 1:
            cache = decoder(input_ids=ids[0][None, :common].to(device), use_cache=True).past_key_values
            cache = share(cache, len(ids)) if shareable(cache) else None
        rest, real = pad_right([s[common:] if cache else s for s in ids], device)  # padding stands behind: no mask needed
        hidden = decoder(input_ids=rest, past_key_values=cache, use_cache=cache is not None).last_hidden_state  # (n, T, H)
        return self.head(hidden[torch.arange(len(ids)), real.sum(-1) - 1])[:, 0]


def bare_checkpoint(name):
    """The path of a reward model that is one file of weights without a config, or None."""
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        from transformers.utils import cached_file

        quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False)
        try:
            if cached_file(name, "config.json", _raise_exceptions_for_connection_errors=False, **quiet):
                return None
            found = [cached_file(name, file, _raise_exceptions_for_connection_errors=False, **quiet) for file in BARE_FILES]
        except (OSError, ValueError) as error:
            refuse(f"--reward-model {name}: {first_line(error)}")
        return next((Path(file) for file in found if file), None)
    if (path / "config.json").exists():
        return None
    return next((path / file for file in BARE_FILES if (path / file).exists()), None)


BARE_FILES = ("pytorch_model.bin", "hf_ckpt.pt")


def fill_weights(model, path, dtype):
    """A bare checkpoint into a model on the meta device: `v_head` is its score head, old attention buffers are dropped."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        refuse(f"--reward-model {path}: not a file of weights alone ({first_line(error)}); files that hold code are not opened")
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        refuse(f"--reward-model {path}: not a dictionary of weights")
    weights = {re.sub(r"^v_head\.", "score.", key): w for key, w in weights.items() if not re.search(r"\.attn\.(masked_)?bias$", key)}
    expected = {key: w.shape for key, w in model.state_dict().items()}
    for what, keys in (("lacks", expected.keys() - weights.keys()), ("has the unexpected", weights.keys() - expected.keys())):
        if keys:
            refuse(f"--reward-model {path}: {what} {len(keys)} weights that {type(model).__name__} of --reward-base has or has not, such as {min(keys)}")
    for key, shape in expected.items():
        if weights[key].shape != shape:
            refuse(f"--reward-model {path}: {key} is {tuple(weights[key].shape)}, in --reward-base {tuple(shape)}: another vocabulary or another size of model")
    model.load_state_dict({key: w.to(dtype) for key, w in weights.items()}, assign=True)


class RewardFunction:
    """A user's `f(prompts, completions, **columns) -> list of floats` (TRL's convention), called for one prompt."""

    def __init__(self, function, name):
        self.function, self.name = function, name
        parameters = inspect.signature(function).parameters.values()
        self.names = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}

    @classmethod
    def from_file(cls, spec):
        """From "file.py:name". UserError where there is no such function."""
        path, _, name = spec.rpartition(":")
        if not path or not Path(path).is_file():
            refuse(f"--reward-function {spec}: no such file; give file.py:name")
        source = importlib.util.spec_from_file_location("reward_function", path)
        if source is None:
            refuse(f"--reward-function {spec}: not a Python file; give file.py:name")
        module = importlib.util.module_from_spec(source)
        source.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            refuse(f"--reward-function {spec}: {path} has no function {name!r}")
        return cls(getattr(module, name), spec)

    def __call__(self, prompt, outputs, columns=None):
        """-> (n,) float64"""
        completions = list(outputs) if isinstance(prompt, str) else [[{"role": "assistant", "content": o}] for o in outputs]
        arguments = {name: [value] * len(outputs) for name, value in (columns or {}).items()}
        arguments |= {"prompts": [prompt] * len(outputs), "completions": completions}
        if self.names is not None:
            arguments = {name: value for name, value in arguments.items() if name in self.names}
        try:
            rewards = self.function(**arguments)
        except Exception:
            traceback.print_exc()
            refuse(f"--reward-function {self.name}: raised the error above")
        try:
            rewards = [float(r) for r in rewards]
        except (TypeError, ValueError):
            refuse(f"--reward-function {self.name}: returned {str(rewards)[:80]!r}; it must return a list of numbers")
        if len(rewards) != len(outputs):
            refuse(f"--reward-function {self.name}: returned {len(rewards)} rewards for {len(outputs)} completions")
        if not all(map(math.isfinite, rewards)):
            refuse(f"--reward-function {self.name}: returned {next(r for r in rewards if not math.isfinite(r))}; rewards must be finite")
        return torch.tensor(rewards, dtype=torch.float64)


# ------------------------------------------------------------------------------------------
# 6. Prompts

GOLD_COLUMNS = ("label", "completion", "chosen", "response")


@dataclass
class Example:
    row: int
    prompt: str | list  # text, or messages
    ids: torch.Tensor  # (P,)
    gold: str | None
    pair: list | None  # (chosen, rejected) as output ids, for --method dpo
    columns: dict  # the row's other columns, for a reward function


class Prompts:
    """A split of the data: the rows whose prompt fits. Encoded when asked for."""

    def __init__(self, rows, tokenizer, settings, split, pairs=False):
        self.rows, self.tokenizer, self.settings, self.split, self.pairs = rows, tokenizer, settings, split, pairs
        names = list(rows.column_names)
        if "prompt" not in names:
            refuse(f"--dataset {settings.dataset}: split {split} has no column 'prompt', only {', '.join(names)}")
        self.gold = next((name for name in GOLD_COLUMNS if name in names), None)
        if pairs and not {"chosen", "rejected"} <= set(names):
            refuse(f"--method dpo needs columns 'chosen' and 'rejected'; split {split} of {settings.dataset} has {', '.join(names)}")
        prompts = list(rows["prompt"])
        for i, prompt in enumerate(prompts):
            if not (is_messages(prompt) or isinstance(prompt, str)) or not prompt or isinstance(prompt, str) and not prompt.strip():
                refuse(f"--dataset {settings.dataset}: row {i + 1} of split {split}: the prompt must be text or a list of messages, not {prompt!r:.60}")
        self.kept = [i for i, prompt in enumerate(prompts) if len(encode(tokenizer, self.prompt_text(prompt))) <= settings.max_prompt_tokens]
        self.left_out = len(prompts) - len(self.kept)
        if not self.kept:
            refuse(f"--dataset {settings.dataset}: no prompt of split {split} fits into --max-prompt-tokens {settings.max_prompt_tokens}")

    def __len__(self):
        return len(self.kept)

    def prompt_text(self, prompt):
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            refuse(f"--dataset {self.settings.dataset}: prompts are messages, and the tokenizer of --model has no chat template")
        return self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)

    def __getitem__(self, i):
        columns = dict(self.rows[self.kept[i]])
        prompt = columns.pop("prompt")
        text = self.prompt_text(prompt)
        ids = encode(self.tokenizer, text)
        pair = [self.answer_ids(text, ids, answer_text(prompt, columns[name])) for name in ("chosen", "rejected")] if self.pairs else None
        gold = answer_text(prompt, columns[self.gold]) if self.gold and columns[self.gold] is not None else None
        return Example(i, prompt, torch.tensor(ids), gold, pair, columns)

    def answer_ids(self, text, prompt_ids, answer):
        """An answer as the policy would have had to write it: ids after the prompt's, the end token, cut to length."""
        ids = encode(self.tokenizer, text + answer)
        same = ids[: len(prompt_ids)] == prompt_ids  # else the tokenizer joins letters over the boundary
        ids = ids[len(prompt_ids) :] if same else self.tokenizer(answer, add_special_tokens=False).input_ids
        return torch.tensor((ids + [self.tokenizer.eos_token_id])[: self.settings.max_new_tokens])


def is_messages(prompt):
    return isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt)


def answer_text(prompt, answer):
    """A gold answer joined to its prompt as an output is: one space, where neither side brings white space."""
    if isinstance(answer, list):  # messages: the last is the answer
        answer = answer[-1]["content"]
    joined = isinstance(prompt, str) and answer and not prompt[-1:].isspace() and not answer[0].isspace()
    return " " + answer if joined else answer


def load_splits(name):
    """A hub name, directory, .jsonl, .parquet or .csv as {"train", "validation", "test": rows or None}."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    path, kinds = Path(name), {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                refuse(f"--dataset {name}: give a .jsonl, .parquet or .csv file, a directory, or a hub name")
            found = datasets.load_dataset(kinds[path.suffix], data_files={"train": str(path)})
        else:
            # load_dataset(hub name) needs the network even when the cache holds the files
            directory = name if path.is_dir() else huggingface_hub.snapshot_download(name, repo_type="dataset")
            found = datasets.load_dataset(directory)
    except UserError:
        raise
    except Exception as error:
        broken = broken_line(path)
        refuse(f"{broken} is not a JSON object; mend or remove this line" if broken else f"--dataset {name}: cannot be read ({first_line(error)})")
    splits = {"train": found.get("train"), "validation": found.get("validation", found.get("valid", found.get("val"))), "test": found.get("test")}
    if splits["train"] is None and splits["test"] is None:
        refuse(f"--dataset {name}: has no split 'train', only {', '.join(found)}")
    return splits


def broken_line(path):
    """The first line of the JSON-lines files at a path that is not a JSON object, as "file:line"."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path] * path.is_file():
        if file.suffix in (".jsonl", ".json"):
            for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
                try:
                    whole = not line.strip() or isinstance(json.loads(line), dict)
                except ValueError:
                    whole = False
                if not whole:
                    return f"{file}:{number}:"


def hold_out(splits, held=0.1, most=1000):
    """Missing validation and test splits as parts of train: the same rows for every --seed."""
    train, told = splits["train"], []
    for stream, name in enumerate(("validation", "test")):
        if splits[name] is None:
            size = min(most, math.ceil(held * len(train)))
            order = random_subset(len(train), len(train), HELD_OUT, stream)
            splits[name], train = train.select(sorted(order[:size])), train.select(sorted(order[size:]))
            told.append(f"{name}: {size} rows held out from train")
    splits["train"] = train
    return told


def load_data(settings, tokenizer, splits=None):
    """(train, validation, test) as Prompts, with a line for each split."""
    splits = splits or load_splits(settings.dataset)
    lines = hold_out(splits) if splits["train"] is not None else refuse(f"--dataset {settings.dataset}: has no split 'train'")
    pairs = settings.method == "dpo"
    if pairs and settings.pairs_dataset:
        splits["train"] = summaries_with_cue(load_splits(settings.pairs_dataset)["train"])
    result = []
    for name in ("train", "validation", "test"):
        result.append(Prompts(splits[name], tokenizer, settings, name, pairs and name == "train"))
        left_out = f", {result[-1].left_out} prompts of more than {settings.max_prompt_tokens} tokens left out" if result[-1].left_out else ""
        lines.append(f"{name}: {len(result[-1])} prompts{left_out}" + ("" if result[-1].gold else ", no gold answers: no win-rate"))
    return result, lines


def summaries_with_cue(rows, cue="TL;DR:"):
    """openai_summarize_comparisons keeps the cue in the answers, openai_summarize_tldr in the prompt: as the latter."""
    move = lambda row: {"prompt": row["prompt"].rstrip("\n") + "\n" + cue} | {k: row[k].removeprefix(cue) for k in ("chosen", "rejected")}  # noqa: E731
    return rows.map(move) if cue else rows


# ------------------------------------------------------------------------------------------
# 7. Evaluation

EVALUATION_BATCH = 32  # prompts at once, one output each
HELD_OUT_PROMPTS = 32  # validation prompts on which D_n is estimated


def evaluate(policy, reward, data, settings, run, split):
    """One output for each of `--eval-prompts` prompts, against the gold answers. -> (metrics, rows of test_outputs.jsonl)

    The same prompts with the same random numbers every time, so that two evaluations differ by the policy alone.
    kl_to_prior is the mean of log q_theta - log p over the outputs: E_q of it is KL(q_theta || p). Greedy outputs
    are not draws from q_theta, so with `--greedy` it is left out.
    """
    count = min(len(data), settings.eval_prompts or len(data))
    rows = [i * len(data) // count for i in range(count)]  # evenly spaced
    rows.sort(key=lambda i: len(data[i].ids))  # alike lengths together: less padding
    batches = [rows[i : i + EVALUATION_BATCH] for i in range(0, count, EVALUATION_BATCH)]

    def answer(batch):
        examples = [data[i] for i in batch]
        prompts = [example.ids for example in examples]
        generators = [seeded(settings.seed, EVALUATION, len(split), i) for i in batch]
        outputs, log_q = policy.sample_batch(prompts, 1, settings.max_new_tokens, generators=generators, greedy=settings.greedy)
        outputs = [output for (output,) in outputs]
        log_ratio = log_q[:, 0] - policy.log_prob_batch(prompts, outputs, prior=True)
        lines = []
        for example, output, ratio in zip(examples, outputs, log_ratio.tolist()):
            text = policy.text(example.ids, output)
            texts = [text] if example.gold is None else [text, example.gold]  # what they share of the prompt is computed once
            rewards = reward(example.prompt, texts, example.columns).tolist()
            line = {"prompt": example.prompt, "gold": example.gold, "output": text}
            line |= {"reward": rewards[0], "gold_reward": rewards[1] if example.gold is not None else None}
            lines.append((example.row, ratio, line))
        return lines

    lines = sorted(itertools.chain(*run.shared_out(batches, answer, f"evaluation on {split}")), key=lambda line: line[0])
    against = [line for _, _, line in lines if line["gold"] is not None]
    metrics = {"reward": float(np.mean([line["reward"] for _, _, line in lines]))}
    if against:
        won = win_rate([line["reward"] for line in against], [line["gold_reward"] for line in against])
        metrics = dict(zip(("win_rate", "win_rate_half_width"), won)) | metrics
    if not settings.greedy:
        metrics["kl_to_prior"] = float(np.mean([ratio for _, ratio, _ in lines]))
    return metrics, [line for _, _, line in lines]


class HeldOut:
    """D_n (eq. 13) on n outputs of the prior for some validation prompts, drawn once: the objective itself, where
    it was not trained. Comparable over a whole run, zero only at the posterior. Rises while the loss on D_t
    falls: the policy is learning D_t by heart."""

    def __init__(self, policy, reward, data, settings, run):
        def draw(i):
            example = data[i]
            generator = seeded(settings.seed, HELD_OUT, 2, i)
            outputs = policy.sample(example.ids, settings.samples_per_prompt, settings.max_new_tokens, prior=True, generator=generator)
            rewards = reward(example.prompt, [policy.text(example.ids, o) for o in outputs], example.columns)
            return example.ids, outputs, policy.log_prob(example.ids, outputs, prior=True).cpu(), log_goodness(rewards, settings.goodness)

        count = min(len(data), HELD_OUT_PROMPTS)
        self.draws = list(run.shared_out([i * len(data) // count for i in range(count)], draw, "held-out prompts"))

    @torch.no_grad()
    def divergence(self, policy, run):
        """-> D_n of the policy, nats."""

        def one(draw):
            prompt_ids, outputs, log_p, goodness = draw
            beta_hat = policy_weights(policy.log_prob(prompt_ids, outputs).cpu(), log_p)  # q' = p
            return float(self_normalized_kl(posterior_weights(log_p, log_p, goodness.to(log_p)), beta_hat))

        return float(np.mean(list(run.shared_out(self.draws, one, "held-out D_n"))))


# ------------------------------------------------------------------------------------------
# 8. The run directory, and the processes of a run

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "test_outputs.jsonl", "report.png", "toy.png", "nonfinite.json", "model", "checkpoint")


class Run:
    """A run directory, written by the first process alone.

    A run can be killed at any moment and gone on with: lines are written whole and flushed, `samples.jsonl` is
    D_t, and a checkpoint is trained weights, AdamW's state and the number of updates, written beside and then
    renamed. Lines behind the checkpoint are cut off on resuming; they come again, the same.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.rank, self.processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.best = -math.inf  # validation win-rate of model/
        self.low_ess, self.told = 0, set()

    # ---- processes

    def gather(self, mine):
        """Lists of all processes as one, taken in turn: item i of the whole was item i // W of process i % W."""
        if self.processes == 1:
            return mine
        parts = [None] * self.processes
        torch.distributed.all_gather_object(parts, mine)
        return [x for column in itertools.zip_longest(*parts, fillvalue=None) for x in column if x is not None]

    def shared_out(self, items, function, label):
        """function(item) for all items, in order; each process computes its share and gets all results."""
        with self.progress(range(0, len(items), self.processes), label, len(items)) as bar:
            for start in bar:
                mine = items[start : start + self.processes][self.rank : self.rank + 1]
                yield from self.gather([function(item) for item in mine])

    def average_gradients(self, policy):
        """Each process has the gradient of its share of the batch, already divided by the whole batch: the sum is the mean."""
        for p in policy.parameters().values() if self.processes > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)

    def progress(self, steps, label, total=None):
        from tqdm import tqdm

        return tqdm(steps, desc=label, leave=False, disable=True if self.rank else None, smoothing=0.05)

    # ---- files

    def lines(self, name):
        """The whole lines of a .jsonl file, as dicts; a line that was being written when the run was killed is not one."""
        path = self.path / name
        data = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def append(self, name, *lines):
        if self.rank == 0:
            with (self.path / name).open("a", encoding="utf-8") as file:  # one write, flushed on closing
                file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def rewrite(self, name, lines):
        if self.rank == 0:
            beside = self.path / (name + ".tmp")
            beside.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
            beside.replace(self.path / name)

    def log(self, line):
        self.append("metrics.jsonl", line | {"time": round(time.time(), 2)})
        if "loss" in line:
            self.low_ess = self.low_ess + 1 if min(line["ess_alpha"], line["ess_beta"]) < 1.2 else 0
            if self.low_ess == 50 and METHODS[self.settings.method].group_size is None:
                self.warn(f"the effective sample size has been below 1.2 of {self.settings.samples_per_prompt} for 50 updates: one output has all the weight. "
                          "Lower --learning-rate, or renew the proposal sooner (--updates-per-iteration)")  # fmt: skip

    def warn(self, message):
        """Each warning once."""
        if self.rank == 0 and message not in self.told:
            self.told.add(message)
            print(f"brain: warning: {message}", file=sys.stderr)

    def keep(self, samples, prompt):
        """The outputs of one prompt to samples.jsonl, a line each."""
        columns = {"output": samples.texts, "output_ids": [o.tolist() for o in samples.outputs]}
        columns |= {name: getattr(samples, name).tolist() for name in ("reward", "log_p", "log_q_proposal", "alpha_hat")}
        fixed = {"iteration": samples.iteration, "row": samples.row, "prompt": prompt}
        self.append("samples.jsonl", *(fixed | dict(zip(columns, values)) for values in zip(*columns.values())))

    def kept(self, data, dtype):
        """D_t of samples.jsonl, without a prompt whose lines are not all there."""
        lines, n = self.lines("samples.jsonl"), self.settings.samples_per_prompt
        lines = lines[: len(lines) // n * n]
        self.rewrite("samples.jsonl", lines)
        groups = [lines[i : i + n] for i in range(0, len(lines), n)]
        return [
            Samples(group[0]["iteration"], group[0]["row"], data[group[0]["row"]].ids, [torch.tensor(line["output_ids"]) for line in group],
                    [line["output"] for line in group], *(torch.tensor([line[name] for line in group], dtype=dtype)
                                                          for name in ("reward", "log_p", "log_q_proposal", "alpha_hat")))
            for group in groups
        ]  # fmt: skip

    def warn_about_samples(self, group, policy):
        """What in a round's samples leaves nothing to learn from."""
        if not group:
            return
        outputs = [tuple(o.tolist()) for samples in group for o in samples.outputs]
        if METHODS[self.settings.method].source != "data" and not any(policy.ended(o) for samples in group for o in samples.outputs):
            self.warn("every output was cut at --max-new-tokens: raise it, or see that the data's answers end with the tokenizer's end token")
        if all(samples.reward.max() - samples.reward.min() < 1e-6 for samples in group):
            self.warn("rewards are the same for all outputs of every prompt: there is nothing to learn; look at the reward and --reward-template")
        if len(set(outputs)) < 0.1 * len(outputs) and len(outputs) >= 20:
            self.warn("nearly all outputs are the same: the policy has collapsed, or writes what is too short to differ; lower --learning-rate")

    def stop_on_nonfinite(self, metrics, batch):
        lines = [{"iteration": s.iteration, "row": s.row, "outputs": s.texts} | {k: repr(getattr(s, k).tolist()) for k in ("reward", "log_p", "log_q_proposal")}
                 for s in batch]  # fmt: skip
        if self.rank == 0:
            (self.path / "nonfinite.json").write_text(json.dumps({"metrics": repr(metrics), "batch": lines}, indent=1))
        refuse(f"the loss or its gradient is not finite; the weights are as they were. The batch is in {self.path / 'nonfinite.json'}; "
               "lower --learning-rate, or use --dtype float32")  # fmt: skip

    # ---- evaluations and checkpoints

    def start(self, policy, reward, validation, test):
        """What evaluations need."""
        self.policy, self.reward, self.validation, self.test = policy, reward, validation, test
        self.held_out = HeldOut(policy, reward, validation, self.settings, self)

    def evaluate(self, policy, step, split="validation"):
        data = self.validation if split == "validation" else self.test
        metrics, rows = evaluate(policy, self.reward, data, self.settings, self, split)
        metrics["self_normalized_kl"] = self.held_out.divergence(policy, self)
        if split == "test":
            self.rewrite("test_outputs.jsonl", rows)
        elif metrics.get("win_rate", math.inf) > self.best or "win_rate" not in metrics:  # nothing to compare: the last
            self.best = metrics.get("win_rate", -math.inf)
            self.save_model(policy)  # before the line that says so: a killed run comes here again
        self.log({"step": step, "split": split} | metrics)
        self.say(step, split, metrics)

    def say(self, step, split, metrics):
        if self.rank == 0:
            won = f"win-rate {metrics['win_rate']:.1f} ± {metrics['win_rate_half_width']:.1f}   " if "win_rate" in metrics else ""
            far = f"   KL to prior {metrics['kl_to_prior']:.3f}" if "kl_to_prior" in metrics else ""
            print(f"update {step:>6}  {split:<10}  {won}reward {metrics['reward']:+.3f}{far}   held-out D_n {metrics['self_normalized_kl']:.4f}", flush=True)

    def save_model(self, policy):
        """model/, beside and then renamed: loadable by transformers or peft alone."""
        if self.rank == 0:
            with self.beside("model") as directory:
                policy.save(directory)

    @contextlib.contextmanager
    def beside(self, name):
        """A directory to fill, which takes its name when it is whole."""
        directory, target = self.path / (name.replace("/", "-") + ".tmp"), self.path / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        yield directory
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)

    def save_checkpoint(self, policy, optimizer, step):
        from safetensors.torch import save_file

        if self.rank:
            return
        names = list(policy.parameters())
        state = {f"{names[i]}/{key}": value.contiguous() for i, s in optimizer.state_dict()["state"].items() for key, value in s.items()}
        with self.beside(f"checkpoint/{step}") as directory:
            save_file({name: p.detach().contiguous() for name, p in policy.parameters().items()}, directory / "policy.safetensors")
            save_file(state, directory / "optimizer.safetensors")
        for older in self.checkpoints()[:-1]:
            shutil.rmtree(self.path / "checkpoint" / str(older))

    def checkpoints(self):
        return sorted(int(d.name) for d in (self.path / "checkpoint").glob("*") if d.name.isdecimal())

    def restore(self, policy, optimizer, data):
        """(number of updates done, D_t): from the newest checkpoint, or (0, []) after the first evaluation of a new run."""
        from safetensors.torch import load_file

        if not self.checkpoints():
            self.rewrite("metrics.jsonl", [])
            self.rewrite("samples.jsonl", [])
            self.evaluate(policy, 0)
            self.save_checkpoint(policy, optimizer, 0)
            return 0, []
        step = self.checkpoints()[-1]
        directory = self.path / "checkpoint" / str(step)
        weights, state = load_file(directory / "policy.safetensors"), {}
        with torch.no_grad():
            for i, (name, p) in enumerate(policy.parameters().items()):
                p.copy_(weights[name])
        flat = load_file(directory / "optimizer.safetensors")
        for i, name in enumerate(policy.parameters()):
            entries = {key.rpartition("/")[2]: value for key, value in flat.items() if key.rpartition("/")[0] == name}
            state |= {i: entries} if entries else {}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        lines = [line for line in self.lines("metrics.jsonl") if line["step"] <= step and line.get("split") != "test"]
        self.rewrite("metrics.jsonl", lines)
        self.best = max([line["win_rate"] for line in lines if "win_rate" in line], default=-math.inf)
        return step, self.kept(data, torch.float64 if self.settings.dtype == "float64" else torch.float32)

    def finished(self):
        return any(line.get("split") == "test" for line in self.lines("metrics.jsonl"))

    def report(self):
        """report.png: what is to be watched, over updates."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        lines = self.lines("metrics.jsonl")
        updates, evaluations = [line for line in lines if "loss" in line], [line for line in lines if line.get("split") == "validation"]
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        panels = (
            ("win-rate against gold, per cent", [], ["win_rate"]), ("mean reward", ["reward"], ["reward"]), ("KL to the prior, nats", ["kl_to_prior"], ["kl_to_prior"]),
            ("loss on D_t and held-out D_n, nats", ["loss"], ["self_normalized_kl"]), ("effective sample size", ["ess_alpha", "ess_beta"], []),
            ("share of outputs that ended", ["ended"], []),
        )  # fmt: skip
        for axis, (title, of_updates, of_evaluations) in zip(axes.flat, panels):
            for name, style in zip(of_updates, ("-", "--")):
                steps, values = [line["step"] for line in updates], np.array([line[name] for line in updates])
                window = max(1, len(values) // 50)
                if len(values):
                    axis.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid"), style, color="0.55", label=f"{name}, D_t, mean of {window}")
            for name in of_evaluations:
                there = [line for line in evaluations if name in line]
                error = [line["win_rate_half_width"] for line in there] if name == "win_rate" else None
                if there:
                    axis.errorbar([line["step"] for line in there], [line[name] for line in there], yerr=error, fmt="o-", color="black", capsize=3, label=f"{name}, validation")
            axis.set(title=title, xlabel="update")
            if axis.has_data():
                axis.legend(fontsize=8)
            else:
                axis.text(0.5, 0.5, "no gold answers" if "win" in title else "no updates", ha="center", transform=axis.transAxes)
        figure.savefig(self.path / "report.png", dpi=100)
        plt.close(figure)


# ------------------------------------------------------------------------------------------
# 9. The command line

COMPANIONS = {  # what the paper used with a model (appendix B); every entry is a default that its flag overrides
    "CarperAI/openai_summarize_tldr_sft": dict(
        tokenizer="EleutherAI/gpt-j-6B",
        reward_model="CarperAI/openai_summarize_tldr_rm_checkpoint",
        reward_base="CarperAI/openai_summarize_tldr_sft",
        # Trained on text with an end token behind, read before it; a causal score there does not see what follows.
        reward_template="<|startoftext|>{prompt}{output}",
        dataset="CarperAI/openai_summarize_tldr",
        pairs_dataset="CarperAI/openai_summarize_comparisons",
        max_prompt_tokens=500,
        max_new_tokens=50,
        lora_rank=8,
        lora_alpha=32,
    ),
    "timdettmers/qlora-hh-rlhf-7b": dict(
        reward_model="Dahoas/gptj-rm-static",
        reward_base="EleutherAI/gpt-j-6B",
        reward_template="{prompt}{output}<|endoftext|>",  # this one was read at the end token
        dataset="Dahoas/rm-static",
        max_prompt_tokens=500,
        max_new_tokens=128,
        lora_rank=64,
        lora_alpha=16,
    ),
    "toy": dict(
        iterations=4,
        prompts_per_iteration=64,
        updates_per_iteration=75,
        learning_rate=1e-3,
        lora_rank=0,
        eval_every=75,
        weight_decay=0.0,
    ),
}


def setting(default, text, least=None, most=None, one_of=None):
    """A field of Settings; None as default of the dataclass marks "not given" (its real default stands in the help)."""
    shown = "" if default is None else f" (default: {default})"
    return field(default=None, metadata={"help": text + shown, "real": default, "least": least, "most": most, "one_of": one_of})


@dataclass
class Settings:
    """Every setting once. What the paper fixes is marked (paper)."""

    model: str = setting("toy", "toy, or a causal LM (or LoRA adapter): hub name or directory")
    base_model: str | None = setting(None, "for an adapter whose own base is not wanted: the base to put it on")
    tokenizer: str | None = setting(None, "for a model that comes without one")
    reward_model: str | None = setting(None, "sequence classifier with one label, or a bare checkpoint with --reward-base")
    reward_base: str | None = setting(None, "model that gives config and tokenizer to a bare reward checkpoint")
    reward_template: str | None = setting(None, "text with {prompt} and {output}; r is read at its last token (default: {prompt}{output})")
    reward_function: str | None = setting(None, "file.py:name, f(prompts, completions, **columns) -> list of floats, in place of a reward model")
    goodness: str = setting("bradley-terry", "p(G=1|y,x) from the reward: bradley-terry or logistic", one_of=("bradley-terry", "logistic"))
    dataset: str | None = setting(None, "hub name, directory, .jsonl, .parquet or .csv with a column prompt")
    pairs_dataset: str | None = setting(None, "for --method dpo: preference pairs, where --dataset has none")
    method: str = setting("brain", "one of " + ", ".join(METHODS), one_of=tuple(METHODS))
    output_dir: str | None = setting(None, "where the run is written (default: a new directory under runs/)")
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output-dir"})
    overwrite: bool = field(default=False, metadata={"help": "replace the run in --output-dir"})
    seed: int = setting(0, "of everything random", 0)
    device: str | None = setting(None, "cpu, cuda, cuda:1 (default: cuda where there is one)")
    dtype: str | None = setting(None, "float32, bfloat16, float16, float64 (default: bfloat16 for LoRA on a GPU, else float32)", one_of=("float32", "bfloat16", "float16", "float64"))  # fmt: skip
    iterations: int = setting(4, "e, rounds of sampling and updates; 0: evaluate only", 0)
    prompts_per_iteration: int = setting(1000, "m, prompts sampled in a round", 1)
    samples_per_prompt: int = setting(32, "n, outputs per prompt (paper: 32)", 2)
    updates_per_iteration: int = setting(1000, "k, updates in a round", 1)
    batch_size: int = setting(8, "prompts per update", 1)
    max_prompt_tokens: int | None = setting(None, "longer prompts are left out (default: what the context leaves)", 1)
    max_new_tokens: int = setting(64, "outputs are cut there", 1)
    learning_rate: float = setting(1e-5, "AdamW (paper: 1e-5)", 0)
    weight_decay: float = setting(0.1, "AdamW (paper: 0.1)", 0)
    adam_beta1: float = setting(0.9, "AdamW (paper: 0.9)", 0, 1)
    adam_beta2: float = setting(0.95, "AdamW (paper: 0.95)", 0, 1)
    lora_rank: int = setting(8, "LoRA (paper: 8 for summaries, 64 for dialogue); 0: train all weights", 0)
    lora_alpha: int = setting(32, "LoRA's scale is alpha / rank (paper: 32 and 16)", 1)
    load_in_4bit: bool = field(default=False, metadata={"help": "base weights in 4 bits (QLoRA); needs a GPU and bitsandbytes"})
    outputs_per_forward: int | None = setting(None, "bounds memory: outputs that go through the model at once (default: all n)", 1)
    eval_prompts: int = setting(500, "prompts per evaluation; 0: all of the split", 0)
    eval_every: int = setting(1000, "updates between evaluations (paper: 1000)", 1)
    greedy: bool = field(default=False, metadata={"help": "evaluate the most likely output, not a sampled one"})


NOT_COMPARED = ("output_dir", "resume", "overwrite", "device")  # may differ between a run and its --resume


def parse(argv):
    """Command line -> Settings: what was typed, else the model's companion, else the default. UserError with a mend."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def add_argument(self, *names, real=None, least=None, most=None, one_of=None, **known):  # ours, not argparse's
            return super().add_argument(*names, **known)

        def error(self, message):
            refuse(message + "; see --help")

    parser = Parser(Settings, description="BRAIn: train a policy to be the posterior p(y|x, G=1).", allow_abbrev=False)
    settings, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), [o for o in parser._option_string_actions if "_" not in o], 1)
        refuse(f"{unknown[0]}: no such flag" + (f"; did you mean {close[0]}?" if close else "; see --help"))
    companions = dict(COMPANIONS.get(settings.model or "toy", {}))
    if settings.reward_model or settings.reward_function:  # another reward: its companions' template says nothing about it
        companions = {name: value for name, value in companions.items() if not name.startswith("reward_")}
    if settings.dataset:
        companions.pop("pairs_dataset", None)
    for f in dataclasses.fields(Settings):
        value = getattr(settings, f.name)
        if value is None:
            setattr(settings, f.name, companions.get(f.name, f.metadata.get("real")))
        elif f.metadata.get("one_of") and value not in f.metadata["one_of"]:
            close = difflib.get_close_matches(value, f.metadata["one_of"], 1)
            refuse(f"{flag(f.name)} {value}: " + (f"did you mean {close[0]}? " if close else "") + f"one of {', '.join(f.metadata['choices_'])}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            least, most = f.metadata["least"], f.metadata["most"]
            if not math.isfinite(value) or value < least or most is not None and value >= most:
                why = ": with one output alpha_hat = beta_hat = 1 and D_1 is 0 for every policy (Theorem 4.3 needs n >= 2)" if f.name == "samples_per_prompt" else ""
                refuse(f"{flag(f.name)} {value}: must be at least {least}" + (f" and below {most}" if most is not None else "") + why)
    check_together(settings)
    return settings


def flag(name):
    return "--" + name.replace("_", "-")


def check_together(s):
    """Settings that are each in range but do not go together."""
    method = METHODS[s.method]
    if method.source == "data":
        s.samples_per_prompt = 2  # the data's pair
    if method.group_size and s.samples_per_prompt % method.group_size:
        refuse(f"--samples-per-prompt {s.samples_per_prompt}: --method {s.method} needs pairs, so an even number")
    if s.learning_rate == 0:
        refuse("--learning-rate 0: nothing would be learned; to evaluate only, use --iterations 0")
    if s.model == "toy":
        given = [name for name in ("base_model", "tokenizer", "reward_model", "reward_base", "reward_template", "reward_function", "dataset", "pairs_dataset")
                 if getattr(s, name) is not None]  # fmt: skip
        if given or s.load_in_4bit or s.lora_rank:
            refuse(f"{flag((given or ['load_in_4bit' if s.load_in_4bit else 'lora_rank'])[0])}: the toy world has its own; name a model with --model")
    else:
        if s.dataset is None:
            refuse(f"--dataset: name the prompts for --model {s.model} (hub name, directory, .jsonl, .parquet or .csv)")
        if (s.reward_model is None) == (s.reward_function is None):
            refuse("--reward-model and --reward-function: give one of them" + (", not both" if s.reward_model else ""))
    if s.reward_template is not None:
        names = set(re.findall(r"\{([^{}]*)\}", s.reward_template))
        if "output" not in names:
            refuse(f"--reward-template {s.reward_template}: must contain {{output}}, and {{prompt}} where the prompt belongs")
        if names - {"prompt", "output"}:
            refuse(f"--reward-template {s.reward_template}: {{{min(names - {'prompt', 'output'})}}} is unknown; only {{prompt}} and {{output}} are filled in")
    if s.resume and s.overwrite:
        refuse("--resume and --overwrite: one goes on with a run, the other replaces it; give one of them")
    if s.resume and s.output_dir is None:
        refuse("--resume: name the run to go on with, --output-dir DIRECTORY")
    if s.device is None:
        s.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cuda = torch.device(s.device).type == "cuda"
    except RuntimeError:
        refuse(f"--device {s.device}: no such device; cpu, cuda or cuda:1")
    if cuda and not torch.cuda.is_available():
        refuse(f"--device {s.device}: there is no GPU here; use --device cpu")
    if s.load_in_4bit and (not cuda or importlib.util.find_spec("bitsandbytes") is None):
        refuse("--load-in-4bit: needs a GPU and `pip install bitsandbytes`; leave it out")
    if s.load_in_4bit and not s.lora_rank:
        refuse("--load-in-4bit: 4-bit weights cannot be trained; use --lora-rank 1 or more")
    if s.dtype is None:  # all weights in bfloat16 at 1e-5 round most updates away
        s.dtype = "bfloat16" if cuda and s.lora_rank else "float32"


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def load(kind, name, flag_name, **arguments):
    """kind.from_pretrained(name); what is missing or does not fit ends in one line. Never runs code that comes with a model."""
    model = hasattr(kind, "_model_mapping") and "config" not in kind.__name__.lower()
    if model:
        arguments["output_loading_info"] = True
    try:
        loaded = kind.from_pretrained(name, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        refuse(f"{flag_name} {name}: cannot be loaded ({first_line(error)})")
    if not model:
        return loaded
    loaded, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:  # transformers fills them with random numbers
        refuse(f"{flag_name} {name}: lacks weights of {type(loaded).__name__}, such as {min(map(str, info['missing_keys'] or info['mismatched_keys']))}")
    return loaded


def load_tokenizer(name, fallback, flag_name):
    """The tokenizer of a model, or `fallback` where it has none (GPT-J's fine-tunes often come without)."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    def has_one(place):
        quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False)
        return any(cached_file(place, file, **quiet) for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"))

    try:
        place = name if fallback is None or has_one(name) else fallback
        if not has_one(place):
            refuse(f"{flag_name} {place}: has no tokenizer; name one with --tokenizer")
    except OSError as error:
        refuse(f"{flag_name} {name}: cannot be loaded ({first_line(error)})")
    tokenizer = load(AutoTokenizer, place, flag_name)
    if tokenizer.eos_token_id is None:
        refuse(f"{flag_name} {place}: its tokenizer has no end token, so no output could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass
class Sizes:
    """What a model takes, from its config: exact, and computed without weights (torch's meta device)."""

    weights: int
    trained: int  # of the adapter, or all
    cache_per_token: int  # numbers in keys and values of all layers
    context: float


def sizes_of(kind, config, lora_rank=None, **arguments):
    with torch.device("meta"):
        model = kind.from_config(config, **arguments)
        weights = sum(p.numel() for p in model.parameters())
        output = model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None) or []
    cache = sum(k.keys.numel() + k.values.numel() for k in layers if getattr(k, "keys", None) is not None)
    if lora_rank:
        model = add_adapter(model, lora_rank, lora_rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(weights, trained, cache, getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf)


def plan(settings, base):
    """Prints what is about to happen, before anything large is downloaded or loaded; sets the prompt's length."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    s, bytes_each = settings, {"float64": 8, "float32": 4}.get(settings.dtype, 2)
    config = load(AutoConfig, base, "--model")
    policy = sizes_of(AutoModelForCausalLM, config, s.lora_rank)
    room = policy.context - s.max_new_tokens
    if room < 1:
        refuse(f"--max-new-tokens {s.max_new_tokens}: leaves no room for a prompt in the context of {policy.context}; lower it")
    s.max_prompt_tokens = int(min(s.max_prompt_tokens or room, room, 2**20))
    gb = lambda count: f"{count / 1e9:.2f} GB" if count > 5e7 else f"{count / 1e6:.2f} MB"  # noqa: E731
    n, e, m, k = s.samples_per_prompt, s.iterations, s.prompts_per_iteration, s.updates_per_iteration
    length = s.max_prompt_tokens + s.max_new_tokens
    at_once = min(n, s.outputs_per_forward or n)
    rows = [(f"p and q_theta: {s.model}, {policy.weights:,} weights, {'4 bits' if s.load_in_4bit else s.dtype}",
             policy.weights * (0.5 if s.load_in_4bit else bytes_each))]  # fmt: skip
    each = 4 if s.lora_rank and bytes_each == 2 else bytes_each  # peft keeps an adapter in float32
    if s.lora_rank:
        rows.append((f"adapter of rank {s.lora_rank}: {policy.trained:,} weights, with gradient and AdamW's two moments", 4 * each * policy.trained))
    else:
        rows.append(("all weights are trained: the prior's copy, gradient and AdamW's two moments", 4 * each * policy.trained))
    if s.reward_model:
        if bare_checkpoint(s.reward_model) is not None and s.reward_base is None:
            refuse(f"--reward-model {s.reward_model}: is weights alone, without config and tokenizer; name the model it was trained from with --reward-base")
        source = s.reward_model if bare_checkpoint(s.reward_model) is None else s.reward_base
        reward_config = load(AutoConfig, source, "--reward-model" if source == s.reward_model else "--reward-base", num_labels=1)
        reward = sizes_of(AutoModelForSequenceClassification, reward_config)
        rows.append((f"r: {s.reward_model}, {reward.weights:,} weights", reward.weights * bytes_each))
    else:
        rows.append((f"r: {s.reward_function}", 0))
    rows.append((f"cache of {at_once} outputs of {s.max_prompt_tokens} + {s.max_new_tokens} tokens", policy.cache_per_token * bytes_each * at_once * length))
    print(f"data: {s.dataset}" + (f", pairs of {s.pairs_dataset}" if s.pairs_dataset and s.method == "dpo" else ""))
    print(f"{s.method}: {e} rounds of {m} prompts with {n} outputs each = {e * m * n:,} samples; {e} x {k} updates of {s.batch_size} prompts")
    for what, count in rows:
        print(f"  {what}" + (f": {gb(count)}" if count else ""))
    print(f"  together {gb(sum(count for _, count in rows))}; activations come on top (--outputs-per-forward bounds them)", flush=True)


def load_policy(settings, base, adapter, tokenizer):
    """The causal LM of --model, an adapter on its base where it is one, as Policy."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments = {"dtype": getattr(torch, settings.dtype)}
    if settings.load_in_4bit:
        arguments |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arguments["dtype"]),
                      "device_map": {"": settings.device}}  # fmt: skip
    model = load(AutoModelForCausalLM, base, "--model" if not adapter else "--base-model", **arguments)
    if not settings.load_in_4bit:
        model = model.to(settings.device)
    if adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError, RuntimeError) as error:
            refuse(f"--model {adapter}: this adapter does not go on {base} ({first_line(error)})")
    try:
        return Policy(model, tokenizer, settings.lora_rank, settings.lora_alpha, settings.outputs_per_forward)
    except ValueError as error:
        refuse(f"--lora-rank: {error}")


def base_of(settings):
    """(name of the model with the weights, name of the adapter on it or None)."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(settings.model)
    except (OSError, ValueError):
        found = None
    if not found:
        if settings.base_model:
            refuse(f"--base-model: {settings.model} is not an adapter, it has no base")
        return settings.model, None
    named = json.loads(Path(found).read_text()).get("base_model_name_or_path")
    return settings.base_model or named or refuse(f"--model {settings.model}: this adapter names no base; give --base-model"), settings.model


def versions():
    """What a number depends on beside the settings."""
    import transformers

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    git = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found | {"commit": git.stdout.strip() or None, "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()}


def open_directory(settings):
    """Checks --output-dir; nothing is touched yet. -> (path, whether it holds a run to go on with)"""
    if settings.output_dir is None:
        name = f"{Path(settings.model).name}-{settings.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Path("runs", re.sub(r"[^\w.+-]", "_", name)), False
    path = Path(settings.output_dir)
    config = path / "config.json"
    if settings.resume:
        if not config.exists():
            refuse(f"--resume: {path} holds no run (no config.json); start it without --resume")
        before, now = json.loads(config.read_text()), dataclasses.asdict(settings)
        changed = [name for name in now if name not in NOT_COMPARED and before.get(name) != now[name]]
        if changed:
            told = "; ".join(f"{flag(name)} was {before.get(name)}, now {now[name]}" for name in changed)
            refuse(f"--resume: other settings than in {config}: {told}")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (settings.overwrite and config.exists()):
            why = "give --resume to go on with it, --overwrite to replace it, or another directory" if config.exists() else "is not a run; give another directory"
            refuse(f"--output-dir {path}: is in use; {why}" if config.exists() else f"--output-dir {path}: {why}")
    return path, settings.resume


def prepare(path, resumed, settings, argv):
    """The directory itself, at the first moment when nothing can be refused any more."""
    path.mkdir(parents=True, exist_ok=True)
    if not resumed:
        for name in RUN_FILES:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
        command = "python brain.py " + " ".join(argv)
        (path / "config.json").write_text(json.dumps(dataclasses.asdict(settings) | versions() | {"command": command.strip()}, indent=1) + "\n")


def start_processes(settings):
    """Under torchrun: joins the other processes, each on a GPU of its own where there are some."""
    if "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():
        if settings.device == "cuda":
            settings.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(settings.device)
        torch.distributed.init_process_group("nccl" if settings.device.startswith("cuda") else "gloo")


def run(settings, argv):
    """Everything between the command line and the report."""
    path, resumed = open_directory(settings)
    start_processes(settings)
    if torch.distributed.is_initialized():  # one clock, one name
        name = [str(path)]
        torch.distributed.broadcast_object_list(name)
        path = Path(name[0])
    state = Run(path, settings)
    finished = resumed and state.finished()
    if finished:
        state.report()
        print(f"{path}: this run is finished; its best model is in {path / 'model'}")
        return
    toy = None
    if settings.model == "toy":
        from toy.world import Toy

        toy = Toy(settings.seed, settings.dtype)
        settings.max_new_tokens = settings.max_prompt_tokens = toy.world.length
        policy, reward = Policy(toy.model, toy.tokenizer, outputs_per_forward=settings.outputs_per_forward), RewardFunction(toy.world.reward_of, "toy")
        (train_data, validation, test), lines = load_data(settings, toy.tokenizer, toy.splits())
    else:
        base, adapter = base_of(settings)
        plan(settings, base)
        tokenizer = load_tokenizer(settings.model if not adapter else base, settings.tokenizer, "--model")
        (train_data, validation, test), lines = load_data(settings, tokenizer)
        reward = RewardFunction.from_file(settings.reward_function) if settings.reward_function else RewardModel.from_pretrained(
            settings.reward_model, settings.reward_base, settings.reward_template, settings.tokenizer, getattr(torch, settings.dtype), settings.device)  # fmt: skip
        policy = load_policy(settings, base, adapter, tokenizer)
    if state.rank == 0:
        print("\n".join(lines))
        prepare(path, resumed, settings, argv)
        print(f"run: {path}", flush=True)
    state.start(policy, reward, validation, test)
    train(policy, reward, train_data, settings, state)
    if math.isinf(state.best):
        state.save_model(policy)  # nothing to compare by: the last
    else:
        policy.load(path / "model")
    state.evaluate(policy, settings.iterations * settings.updates_per_iteration, "test")
    if state.rank == 0:
        state.report()
        if toy:
            toy.report(policy.model, path / "toy.png")
        print(f"best model: {path / 'model'}   outputs: {path / 'test_outputs.jsonl'}   curves: {path / 'report.png'}")


def main(argv=None):
    """Exit code: 0, 2 for what the user can mend (one line on stderr), 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    import transformers

    transformers.utils.logging.set_verbosity_error()  # what matters of its warnings, such as missing weights, ends the run here
    transformers.utils.logging.disable_progress_bar()
    try:
        settings = parse(argv)
        run(settings, argv)
    except UserError as error:
        print(f"brain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbrain: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
