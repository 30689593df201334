"""BRAIn: Bayesian Reward-conditioned Amortized Inference (Pandey et al., 2024), in one file.

A language model p (the prior) writes outputs y for a prompt x. Conditioned on being good, G = 1, its
outputs follow the posterior

    p(y|x, G=1)  =  p(y|x) p(G=1|y,x) / p(G=1|x)                                             (eq. 1)

which cannot be sampled directly. BRAIn trains a policy q_theta to be that posterior. It draws n outputs
from a proposal q', weighs each by how likely it is under the posterior (alpha_hat) and under the policy
(beta_hat), both divided by how likely it was drawn and normalised over the n, and follows

    sum_i (alpha_hat_i - beta_hat_i) grad log q_theta(y_i|x)                                 (eq. 12)

which moves probability to outputs that the posterior has more of than the policy, and away from those of
which it has less. On average over draws, that is the gradient of -D_n, where

    D_n(theta)  =  E_{y_1 .. y_n ~ q'}  D_KL(alpha_hat || beta_hat)                          (eq. 13)

is a self-normalised KL divergence. The draws and alpha_hat do not depend on theta (q' is a past policy, held
fixed), so the gradient goes through the expectation and reaches log beta_hat alone (Theorem 4.2; the two
lines of algebra are at `brain_loss`). Read term by term: sum alpha_hat grad log q is maximum likelihood on the
posterior by importance sampling, and sum beta_hat grad log q estimates E_q[grad log q] = 0 (eq. 8-10) from
the same draws: a baseline. At q_theta = posterior both cancel in every single draw. The estimate is unbiased
for D_n, and for KL(posterior || q_theta) only as n grows; yet D_n is zero only at the posterior (Theorem 4.3),
if n >= 2 and q' can draw every output. DPO is the case n = 2, q' = p, all posterior weight on the chosen output.

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

import argparse
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
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# ==========================================================================================
# Part I, the method.   1. Mathematics
#
# Pure functions of tensors (..., n): the n outputs of a prompt on the last axis, any axes before it.
# Everything stays a logarithm (nats) until the end: exp(reward) overflows above 88 in float32.


def log_goodness(reward, model="bradley-terry"):
    """log p(G=1|y,x) up to a constant of the prompt, from rewards (..., n). -> (..., n)

    "bradley-terry"  r (eq. 19): a reward model trained on preferences fixes differences alone, and the
                     unknown constant cancels in alpha_hat.
    "logistic"       log sigmoid(r) (eq. 15): a reward that is the logit of a good/bad classifier.
    The choice matters: under "logistic", two outputs with high rewards count as equally good.
    """
    if model == "bradley-terry":
        return reward
    if model == "logistic":
        return F.logsigmoid(reward)  # log(sigmoid(r)) is -inf from r = -89 down
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
    counts = alpha_hat > 0  # masked before the logarithms: 0 * -inf and its gradient are nan
    log_alpha, log_beta = (torch.where(counts, weights, 1.0).log() for weights in (alpha_hat, beta_hat))
    return (alpha_hat * (log_alpha - log_beta)).sum(-1)


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
    # log_softmax, not policy_weights().log(): a weight of e^-104 is 0 in float32.
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
                "policy"  the proposal q' = q_theta, renewed every round (line 21 of Algorithm 1)
                "prior"   q' = p throughout (section 9.5)
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

    def weights(self, log_p, log_q_proposal, log_good):
        """alpha_hat (n,), normalised within groups. Its arguments (n,)."""
        if self.source == "data":  # people chose: the first of each pair
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
    "dpo-sft+iw+n": Method("prior"),  # also section 9.5: BRAIn with a fixed proposal
    "dpo-sft+iw": Method("prior", group_size=2),
    "dpo-sft": Method("prior", group_size=2, argmax=True),
    "rso": Method("rso", group_size=2, argmax=True),
    "dpo": Method("data", group_size=2, argmax=True),
}
RSO_CANDIDATES = 4  # draws for each output that is kept; with 1 nothing is ever rejected


def rejection_sample(log_good, n, generator=None):
    """Statistical rejection sampling (Liu et al., 2023) of n among candidates drawn from the prior. -> (n,) indices

    log_good (N,), N >= n. A candidate is accepted with probability exp(g - g_max); accepted ones leave,
    and g_max is taken anew over the rest, until n are kept. An approximation: it is exact only with the
    maximum over all outputs in place of g_max, and with candidates that do not run out.
    """
    left, kept = torch.arange(len(log_good)), []
    while len(kept) < n:
        chance = (log_good[left] - log_good[left].max()).double().exp()
        accepted = torch.rand(len(left), generator=generator, dtype=torch.float64) < chance  # the best always is
        kept += left[accepted].tolist()
        left = left[~accepted]
    return torch.tensor(kept[:n])


# ------------------------------------------------------------------------------------------
# 3. The policy: one causal LM as the prior p, the proposal q' and the policy q_theta
#
# First how outputs share the cache of their prompt, which saves time alone: on a first reading, go on at Policy.


def shareable(cache):
    """Whether a prompt's cache can be handed to many outputs: keys and values, nothing recurrent, nothing besides."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def share(cache, rows, room=0):
    """A new cache that begins as copies of `cache`: its one row `rows` times, or the rows listed in a tensor.

    A forward grows the cache that it is given; the original stays as it was after the prompt. One row is seen `rows`
    times, not copied, and the gradients of all outputs meet in its keys and values. Listed rows have `room` for as
    many more tokens.
    """
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for i, layer in enumerate(cache.layers):
        if isinstance(rows, int):
            layer.keys, layer.values = (kept.expand(rows, -1, -1, -1) for kept in (layer.keys, layer.values))
        elif type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(layer, rows, room)
        else:
            layer.batch_select_indices(rows)
    return cache


class PreallocatedLayer(DynamicLayer):
    """The listed rows of a layer's keys and values, with room for more tokens, which are written in place.

    A DynamicLayer copies all that it holds at every token, and all that stays whenever a row leaves: sampling then takes
    half as much time again.
    """

    def __init__(self, layer, rows, room):
        super().__init__()
        self.is_initialized, self.filled = True, layer.keys.shape[2]
        self.buffers = [F.pad(kept, (0, 0, 0, room))[rows] for kept in (layer.keys, layer.values)]  # (R, H, T, D)
        self._view()

    def _view(self):
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        return self.keys, self.values

    def update(self, keys, values, *arguments, **settings):
        start, self.filled = self.filled, self.filled + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start : self.filled] = new
        return self._view()

    def batch_select_indices(self, indices):
        """Only rows that change their place are copied."""
        moved = (indices.cpu() != torch.arange(len(indices))).nonzero()[:, 0]
        for buffer in self.buffers:
            buffer[moved] = buffer[indices[moved]]
        self.buffers = [buffer[: len(indices)] for buffer in self.buffers]
        self._view()


class Policy:
    """A causal LM and its tokenizer as p, q' and q_theta. All three give probability to the same tokens.

    model                a transformers causal LM, or a PeftModel whose adapter belongs to the prior
    tokenizer            says which ids exist: GPT-J has 50400 logits and 50257 tokens, the rest is never drawn
    lora_rank            0: all weights of `model` are trained, and p is a frozen copy of it. Else q_theta is a
                         LoRA adapter, and p the same weights with the adapter off. If `model` has an adapter
                         already, p keeps it and q_theta is a second one, a copy of it: of its rank and alpha.
    lora_alpha           LoRA's scale is lora_alpha / lora_rank
    outputs_per_forward  how many outputs go through the model at once; None: all that are asked for. Bounds memory,
                         and changes results by rounding alone.

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
            self.model = self._second_adapter(model)
        else:
            self.model = add_adapter(model, lora_rank, lora_alpha)
        self.model.eval()
        base = self.model.get_base_model() if lora_rank else self.model
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions, self._takes_keep = "position_ids" in accepted, "logits_to_keep" in accepted
        self.device = base.device
        # A chat model may end with several tokens: the tokenizer's and those of the generation config, together.
        ends = np.atleast_1d(getattr(base.generation_config, "eos_token_id", None)).tolist() + [tokenizer.eos_token_id]
        self.ends = sorted(set(ends) - {None})
        self._known = torch.tensor(list(tokenizer.get_vocab().values()))
        self._unknown = None  # ids to leave out, once V is known: the logits', which no config is sure to name
        self._told = False

    def _second_adapter(self, model):
        """q_theta as a copy of the prior's adapter, so that q_theta = p at step 0."""
        self.prior_adapter, self.adapter = model.active_adapter, "policy"
        config = copy.deepcopy(model.peft_config[self.prior_adapter])
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
        if self._unknown is None:
            ids = torch.arange(logits.shape[-1])
            self._unknown = ids[~torch.isin(ids, self._known)].to(logits.device)
        return logits.index_fill(-1, self._unknown, -torch.inf) if len(self._unknown) else logits

    def _token_log_probs(self, logits, ids):
        """log-probability of ids (...) under logits (..., V). -> (...)"""
        scores = self._scores(logits)
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
        """Prompts (B, P) once. -> (logits (B, V) of the next token, their cache, or None if it cannot be shared)"""
        output = self._forward(model, ids, 1, mask)
        cache = getattr(output, "past_key_values", None)
        if shareable(cache):
            return output.logits[:, -1], cache
        if not self._told:
            self._told = True
            name = type(model).__name__
            print(f"brain: {name} keeps a state that outputs cannot share; each is computed whole", file=sys.stderr)
        return output.logits[:, -1], None

    # ---- scoring

    def log_prob(self, prompt_ids, outputs, prior=False):
        """log q_theta(y_i|x), or log p(y_i|x) with prior=True. -> (n,) nats, with gradient (none for the prior)

        prompt_ids (P,); outputs: n LongTensors (T_i,) as `sample` returns them. The end token counts, as a token
        like any other. Being cut has no token: a cut output has the probability of its prefix.

        The prompt is encoded once and its cache shared by the n outputs: the numbers of n whole sequences, to
        rounding, at a fraction of the cost. With `outputs_per_forward` the outputs go in chunks that are
        computed again in the backward, so that the activations of one chunk exist at a time; the gradients of
        all chunks meet in the prompt's cache, and go through the prompt once. Half precision is summed in float32.
        """
        prompt = prompt_ids.to(self.device)[None]  # (1, P)
        size = self.outputs_per_forward or len(outputs)
        chunks = [outputs[i : i + size] for i in range(0, len(outputs), size)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not prior), self._weights(prior) as model:
            # All but the last token, which predicts the first one of the output and goes along with it.
            cache = self._prefill(model, prompt[:, :-1])[1] if prompt.shape[1] > 1 else None
            score = functools.partial(self._score, model, prompt, cache)
            if len(chunks) > 1 and torch.is_grad_enabled():
                return torch.cat([checkpoint(score, c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
            return torch.cat([score(c) for c in chunks])

    def _score(self, model, prompt, cache, outputs):
        """Log-probabilities (c,) of c outputs of one prompt (1, P), from the cache of its first P-1 tokens, or from none."""
        ids, real = pad_right(outputs, self.device)  # (c, T), padding behind: attention is causal
        before = (prompt[:, -1:] if cache else prompt).expand(len(ids), -1)
        inputs = torch.cat([before, ids[:, :-1]], 1)  # its last T positions predict the output
        cache = cache and share(cache, len(ids))
        logits = self._forward(model, inputs, ids.shape[1], cache=cache, use_cache=bool(cache)).logits  # (c, T, V)
        return torch.where(real, self._token_log_probs(logits, ids), 0.0).sum(-1)

    # ---- sampling

    def sample(self, prompt_ids, n, max_new_tokens, prior=False, generator=None, greedy=False):
        """n outputs of one prompt (P,), from the plain softmax of q_theta (or p). -> list of n LongTensors (T_i,)

        Each ends with its end-of-sequence token, or is cut after max_new_tokens. Line 6 of Algorithm 1:
        sampling from the present q_theta *is* the proposal update of line 21, no copy of q' is kept.
        generator: a CPU torch.Generator; the same one gives the same outputs in whatever batches, but for rounding.
        """
        return self.sample_batch([prompt_ids], n, max_new_tokens, prior, [generator], greedy)[0][0]

    @torch.no_grad()
    def sample_batch(self, prompts, n, max_new_tokens, prior=False, generators=None, greedy=False):
        """As `sample`, for B prompts at once. -> (list of B lists of n outputs, their log-probabilities (B, n))

        The log-probabilities are the sampler's own sums: equal to log_prob's to rounding. Training takes
        log_prob's, so that beta_hat is 1/n at step 0 and not nearly so.
        """
        generators = generators or [None] * len(prompts)
        ids, mask = pad_left(prompts, self.device)
        with self._weights(prior) as model:
            logits, cache = self._prefill(model, ids, mask)
            # A recurrent state would run over the padding, and some attention code in float64 makes nan of a
            # row that is padding alone. Then prompts go one by one.
            if mask is not None and (cache is None or logits.isnan().any()):
                each = zip(prompts, generators)
                outputs, sums = zip(*[self.sample_batch([x], n, max_new_tokens, prior, [g], greedy) for x, g in each])
                return [some for (some,) in outputs], torch.cat(sums)
            refuse_if(logits.isnan().any(), "the policy's logits are nan: it has diverged; lower --learning-rate, or use --dtype float32")
            # One uniform number for each token to come, drawn beforehand: what a row draws does not depend on
            # the rows beside it, on chunks, or on which of them have ended.
            uniform = [torch.rand(n, max_new_tokens, dtype=torch.float64, generator=g) for g in generators]
            uniform, outputs, sums = torch.cat(uniform).to(self.device), [], []  # (B n, max_new_tokens)
            for rows in torch.arange(len(uniform), device=self.device).split(self.outputs_per_forward or len(uniform)):
                of = rows // n  # each output's prompt
                state = ids[of], logits[of], None if mask is None else mask[of], cache and share(cache, of, max_new_tokens)
                some, log_prob = self._continue(model, *state, uniform[rows], greedy)
                outputs += some
                sums.append(log_prob)
        return [outputs[i : i + n] for i in range(0, len(outputs), n)], torch.cat(sums).reshape(-1, n)

    def _continue(self, model, prompts, logits, mask, cache, uniform, greedy):
        """Draw R outputs token by token from next-token logits (R, V); rows that have ended leave the batch."""
        ends = torch.tensor(self.ends, device=self.device)
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
            going = ~torch.isin(token, ends)
            if not going.any() or t + 1 == drawn.shape[1]:
                break
            if not going.all():
                stay = torch.arange(int(going.sum()), device=self.device)
                stay[~going[: len(stay)]] = len(stay) + going[len(stay) :].nonzero()[:, 0]  # the last ones fill the gaps
                rows, token, mask = rows[stay], token[stay], None if mask is None else mask[stay]
                if cache:
                    cache.batch_select_indices(stay)
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
            new = token[:, None] if cache else torch.cat([prompts[rows], drawn[rows, : t + 1]], 1)
            logits = self._forward(model, new, 1, mask, cache, use_cache=bool(cache)).logits[:, -1]
        return [row[row >= 0].cpu() for row in drawn], log_prob

    # ---- outputs as text

    def ended(self, output):
        """Whether an output ended by itself, rather than being cut."""
        return int(output[-1]) in self.ends

    def text(self, prompt_ids, output):
        """What an output adds to its prompt, as text, without its end token.

        Decoded together with the prompt, and the prompt taken off: SentencePiece drops the first space of what
        is decoded alone.
        """
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        prompt, output = prompt_ids.tolist(), output[: len(output) - self.ended(output)].tolist()
        before, whole = decode(prompt), decode(prompt + output)
        return whole[len(before) :] if whole.startswith(before) else decode(output)


def add_adapter(model, rank, alpha, alike=None):
    """A fresh LoRA adapter (peft), on the layers that peft knows for this architecture, else on all linear ones; or of the
    shape of a saved one, `alike`."""
    from peft import LoraConfig, PeftConfig, get_peft_model

    # B starts at zero: q_theta = p at step 0. Dropout in the adapter would break that at the first update.
    config = PeftConfig.from_pretrained(alike) if alike else LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM")
    config.inference_mode, config.lora_dropout = False, 0.0
    try:
        return get_peft_model(model, config)
    except ValueError:  # "Please specify `target_modules`": peft has no map for it
        config.target_modules = "all-linear"
        return get_peft_model(model, config)


def pad_right(sequences, device):
    """n LongTensors (T_i,) -> ids (n, T) and which of them are real, (n, T) bool."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).to(device)
    return ids.clamp(min=0), ids >= 0


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


CACHED = ("reward", "log_p", "log_q_proposal", "alpha_hat")

# One stream of random numbers per purpose. All randomness of a run is drawn from (seed, purpose, indices):
# there is no state to save, and nothing depends on the number of processes or on where a run was resumed.
PROMPTS, OUTPUTS, BATCHES, HELD_OUT, EVALUATION = range(5)


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
    run       Run, started: keeps D_t, the metrics and checkpoints, so that a killed run goes on where it was
    """
    weights, betas = policy.parameters().values(), (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, betas, weight_decay=settings.weight_decay)  # departure 3
    step, buffer = run.restore(policy, optimizer, data)  # line 2: 0 and D_0 = {} in a new run
    k, last = settings.updates_per_iteration, settings.updates_per_iteration * settings.iterations
    for t in range(1, settings.iterations + 1):  # line 3
        rows = random_subset(len(data), settings.prompts_per_iteration, settings.seed, PROMPTS, t)  # line 4: S_t
        have = {samples.row for samples in buffer if samples.iteration == t}  # what a killed run had of them
        groups = [group for group in together(rows, settings) if not have.issuperset(group)]
        draw = functools.partial(collect, policy, reward, data, t, settings)
        for samples in itertools.chain.from_iterable(run.shared_out(groups, draw, f"round {t}, sampling")):  # lines 5 to 11
            if samples.row not in have:
                run.keep(samples, data[samples.row].prompt)
                buffer.append(samples)  # line 12: D_t keeps the samples of all rounds
        run.look_at([samples for samples in buffer if samples.iteration == t], policy)
        for step in run.progress(range(step + 1, t * k + 1), f"round {t}, updates"):  # line 13
            chosen = random_subset(len(buffer), settings.batch_size, settings.seed, BATCHES, step)
            metrics = update(policy, optimizer, [buffer[i] for i in chosen], METHODS[settings.method], run)  # 14 to 19
            run.log({"step": step} | metrics)
            if step % settings.eval_every == 0 or step == last:
                run.evaluate(policy, step)
            if step % settings.eval_every == 0 or step == t * k:
                run.save_checkpoint(policy, optimizer, step)
        # Line 21, q' <- q_theta, needs no line: `collect` samples from q_theta as it stands in the next round.


def together(rows, settings):
    """Rows in groups that are sampled for at once: several prompts where --outputs-per-forward has room for n outputs of each.

    Where a model is small for its machine, a step takes much less time for each row if there are many.
    """
    size = max(1, (settings.outputs_per_forward or 1) // settings.samples_per_prompt)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def collect(policy, reward, data, t, settings, rows):
    """Lines 6 to 10 for each prompt x: draw its outputs, cache log q', log p, r and alpha_hat. -> list of Samples"""
    method, n, examples = METHODS[settings.method], settings.samples_per_prompt, [data[row] for row in rows]
    generators = [seeded(settings.seed, OUTPUTS, t, row) for row in rows]
    fixed = method.source != "policy" or t == 1  # q' = p: line 1 for BRAIn, and throughout for the others
    if method.source == "data":
        drawn = [example.pair for example in examples]
    else:
        draws = n * RSO_CANDIDATES if method.source == "rso" else n
        prompts = [example.ids for example in examples]
        drawn, _ = policy.sample_batch(prompts, draws, settings.max_new_tokens, fixed, generators)  # line 6
    result = []
    for row, example, generator, outputs in zip(rows, examples, generators, drawn):
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
        result.append(Samples(t, row, example.ids, outputs, texts, rewards, log_p, log_q_proposal, alpha_hat))
    return result


def update(policy, optimizer, batch, method, run):
    """Lines 15 to 19: one step of theta on a batch of prompts. -> the line of metrics

    Diagnostics are means over the batch, of weights as they are: nothing is clipped anywhere. Watch
        ess_alpha    near 1: one output has all the weight; rewards spread too far, or n is too small
        ess_beta     starts at n (2 for pairs); falls as q_theta leaves the proposals that drew D_t. Near 1: renew sooner
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
    metrics = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
    metrics["max_weight"] = max(line["max_weight"] for line in lines)
    run.add_gradients(policy)
    run.stop_if_not_finite(metrics, batch, policy)
    optimizer.step()  # line 19
    return metrics


# ==========================================================================================
# Part II, running it.   5. Rewards


class UserError(Exception):
    """Something that the user can fix: printed in one line, exit code 2."""


def refuse_if(wrong, message):
    if wrong:
        raise UserError(message)


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def find(name, *files):
    """Path of the first of these files in a directory or hub repository, or None. Downloads no other."""
    for file in files:
        with contextlib.suppress(OSError):  # no such file, directory or repository: said by what loads it
            if path := transformers.utils.cached_file(name, file):
                return path


def load(kind, name, flag_name, **arguments):
    """kind.from_pretrained(name). What cannot be loaded ends in one line; code that a checkpoint brings never runs."""
    try:
        return kind.from_pretrained(None if "state_dict" in arguments else name, trust_remote_code=False, **arguments)
    except Exception as error:
        raise UserError(f"{flag_name} {name}: cannot be loaded ({first_line(error)}); give a directory or a hub name") from None


def load_model(kind, name, flag_name, **arguments):
    """As `load`, and every weight must be there: transformers fills what a checkpoint lacks with random numbers, and
    a reward model with a random head trains without complaint."""
    model, info = load(kind, name, flag_name, output_loading_info=True, ignore_mismatched_sizes=True, **arguments)
    for what in ("missing", "mismatched") + ("unexpected",) * ("state_dict" in arguments):
        keys = sorted(map(str, info[f"{what}_keys"]))
        told = f"{what} weights for {type(model).__name__}: {', '.join(keys[:2])}, {len(keys)} in all"
        refuse_if(keys, f"{flag_name} {name}: {told}; give a checkpoint (or --reward-base) of this vocabulary and size")
    return model


def load_tokenizer(name, fallback, flag_name):
    """The tokenizer of a model, or `fallback` where it has none: fine-tunes of GPT-J often come without."""
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    place = name if fallback is None or find(name, *files) else fallback
    flag_name = flag_name if place == name else "--tokenizer"
    refuse_if(not find(place, *files), f"{flag_name} {place}: no tokenizer found there; name one with --tokenizer")
    tokenizer = load(transformers.AutoTokenizer, place, flag_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode(tokenizer, texts):
    """Token ids of each text, with the beginning token that this tokenizer puts before texts, and no end token.

    A chat template writes the beginning token itself: it is not added twice. An end token behind a prompt would
    end it, and behind a text it would move "the last token", where a reward model is read.
    """
    bos = tokenizer("a").input_ids[:1]
    bos = bos if bos == [tokenizer.bos_token_id] else []
    return [ids if ids[:1] == bos else bos + ids for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def chat(tokenizer, messages, flag_name, **how):
    """Messages as text, by the tokenizer's chat template."""
    refuse_if(not tokenizer.chat_template, f"{flag_name}: has no chat template, and prompts are messages; use a chat model, or text")
    return tokenizer.apply_chat_template(messages, tokenize=False, **how)


def fill(template, prompt, output):
    """`{prompt}` and `{output}` of a template in one pass: .format would reach attributes ({prompt.__class__}), and
    one .replace after another would mangle a prompt that contains "{output}"."""
    return re.sub(r"\{(prompt|output)\}", lambda place: {"prompt": prompt, "output": output}[place[1]], template)


class RewardModel:
    """r(x, y) as the score of a sequence classifier with one label, at the last token of a filled template.

    model      a transformers *ForSequenceClassification
    template   text with {prompt} and {output}, by default one behind the other. Where the prompt is a list of
               messages, the chat template of this model's tokenizer takes its place, the output as a reply.
    outputs_per_forward  bounds memory: how many outputs go through the model at once; None: all n
    """

    def __init__(self, model, tokenizer, template=None, outputs_per_forward=None):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, template or "{prompt}{output}"
        self.outputs_per_forward = outputs_per_forward
        self.head = getattr(model, "score", None)  # decoders have it; encoders such as BERT pool in their own way

    @classmethod
    def from_pretrained(cls, name, base=None, template=None, tokenizer=None, dtype=torch.float32, device="cpu", **settings):
        """From a directory or hub name; or from a bare checkpoint, weights alone, with config and tokenizer of `base`.

        `tokenizer` is used where the model (or base) has none. UserError says what does not fit.
        """
        kind, bare = transformers.AutoModelForSequenceClassification, bare_checkpoint(name, base)
        if bare is None:
            model = load_model(kind, name, "--reward-model", dtype=dtype)
            labels = model.config.num_labels
            refuse_if(labels != 1, f"--reward-model {name}: has {labels} labels; give a reward model, which has one")
        else:
            config = load(transformers.AutoConfig, base, "--reward-base", num_labels=1)
            with torch.device("meta"):
                kind = type(kind.from_config(config))
            model = load_model(kind, bare, "--reward-model", config=config, state_dict=bare_weights(bare), dtype=dtype)
        tokenizer = load_tokenizer(base if bare else name, tokenizer, "--reward-model")
        return cls(model.to(device), tokenizer, template, **settings)

    @torch.no_grad()
    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt. -> (n,) float32"""
        size = self.outputs_per_forward or len(outputs)
        chunks = [self._scores([self._text(prompt, output) for output in outputs[i : i + size]]) for i in range(0, len(outputs), size)]
        rewards = torch.cat(chunks).float().cpu()
        refuse_if(not rewards.isfinite().all(), f"--reward-model: gave nan or inf for {outputs!r:.60}; try --dtype float32")
        return rewards

    def _text(self, prompt, output):
        if isinstance(prompt, str):
            return fill(self.template, prompt, output)
        return chat(self.tokenizer, prompt + [{"role": "assistant", "content": output}], "--reward-model")

    def _scores(self, texts):
        """Scores of texts that begin alike. -> (n,)

        Their common beginning is computed once: as tokens, since a tokenizer may join the last letters of the
        prompt with the first of an output. Not the model's own pooling: that takes the last token that is not
        padding, and misses an end token that the template asks for where pad = eos.
        """
        ids = self.tokenizer(texts).input_ids if self.head is None else encode(self.tokenizer, texts)
        longest, context, device = max(map(len, ids)), context_of(self.model.config), self.model.device
        refuse_if(longest > context, f"--reward-model: a text of {longest} tokens in a context of {context}; lower --max-prompt-tokens")
        if self.head is None:
            return self.model(**self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)).logits[:, 0]
        decoder, cache = self.model.base_model, None
        alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ids))
        common = min(sum(1 for _ in alike), min(map(len, ids)) - 1)  # each keeps one token of its own, where it is read
        if common and len(ids) > 1:
            cache = decoder(input_ids=torch.tensor([ids[0][:common]], device=device), use_cache=True).past_key_values
            cache = share(cache, len(ids)) if shareable(cache) else None
        rest, real = pad_right([torch.tensor(s[common:] if cache else s) for s in ids], device)  # (n, T), padding behind: no mask
        hidden = decoder(input_ids=rest, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        return self.head(hidden[torch.arange(len(ids)), real.sum(-1) - 1])[:, 0]


def context_of(config):
    """Longest sequence of a model, in tokens; infinite where its config names none."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def bare_checkpoint(name, base):
    """Path of a reward model that is one file of weights, without config, and so needs a base; None for any other."""
    bare = name if Path(name).is_file() else None if find(name, "config.json") else find(name, "pytorch_model.bin", "hf_ckpt.pt")
    needs = "is weights alone; name the model that it was trained from with --reward-base"
    refuse_if(bare and not base, f"--reward-model {name}: {needs}")
    return bare


def bare_weights(path):
    """{name: tensor} of a bare checkpoint: `v_head` is the score head of the model class, old attention buffers go."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # without it, unpickling runs what it is told
        weights = {re.sub(r"^v_head\.", "score.", key): w for key, w in weights.items()}
    except Exception:
        raise UserError(f"--reward-model {path}: is not weights alone, and a file that holds code is not opened; give another checkpoint") from None
    return {key: w for key, w in weights.items() if not re.search(r"\.attn\.(masked_)?bias$", key)}


class RewardFunction:
    """A user's f(prompts, completions, **columns) -> list of floats, called as TRL does: by keyword, lists of one length."""

    def __init__(self, function, name):
        self.function, self.name = function, f"--reward-function {name}"

    @classmethod
    def from_file(cls, spec):
        """From "file.py:name". UserError where there is none."""
        path, _, name = spec.rpartition(":")
        there = Path(path).is_file() and path.endswith(".py")
        refuse_if(not there, f"--reward-function {spec}: no such Python file; give file.py:name")
        source = importlib.util.spec_from_file_location("reward_function", path)
        sys.modules["reward_function"] = module = importlib.util.module_from_spec(source)
        sys.path.append(str(Path(path).resolve().parent))  # for what it imports from beside it
        with users_code(f"--reward-function {spec}"):
            source.loader.exec_module(module)
        function = getattr(module, name, None)
        refuse_if(not callable(function), f"--reward-function {spec}: {path} has no function {name}; give another name")
        return cls(function, spec)

    def __call__(self, prompt, outputs, columns=None):
        """Rewards of n texts for one prompt; each of the row's columns goes along, repeated. -> (n,) float64"""
        if not isinstance(prompt, str):  # messages in, messages out
            outputs = [[{"role": "assistant", "content": output}] for output in outputs]
        n, arguments = len(outputs), (columns or {}) | {"prompts": prompt}
        arguments = {name: [value] * n for name, value in arguments.items()} | {"completions": list(outputs)}
        takes = inspect.signature(self.function).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in takes.values()):  # columns that it does not ask for are left out
            arguments = {name: value for name, value in arguments.items() if name in takes}
        with users_code(self.name):
            rewards = returned = self.function(**arguments)
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            rewards = torch.tensor(list(returned), dtype=torch.float64)
        right = isinstance(rewards, torch.Tensor) and rewards.shape == (n,) and rewards.isfinite().all()
        text = f"it returned {' '.join(repr(returned).split()):.80} for {prompt!r:.60}"
        refuse_if(not right, f"{self.name}: must return {n} finite numbers, one for each completion; {text}")
        return rewards


@contextlib.contextmanager
def users_code(name):
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise UserError(f"{name}: raised the error above; fix it there") from None


# ------------------------------------------------------------------------------------------
# 6. Prompts

GOLD_COLUMNS = ("label", "completion", "chosen", "response")  # the first that the data has is the gold answer


@dataclass
class Example:
    row: int
    prompt: str | list  # text, or messages
    ids: torch.Tensor  # (P,)
    gold: str | None
    pair: list | None  # [chosen, rejected] as LongTensors, for --method dpo
    columns: dict  # the row's other columns, for a reward function


class Prompts:
    """The rows of a split whose prompt is at most --max-prompt-tokens long. prompts[i] -> Example"""

    def __init__(self, rows, tokenizer, settings, split):
        self.rows, self.tokenizer, self.settings = rows, tokenizer, settings
        self.gold = next((name for name in GOLD_COLUMNS if name in rows.column_names), None)
        self.pair = ("chosen", "rejected") if METHODS[settings.method].source == "data" and split == "train" else ()
        lengths = (len(ids) for batch in rows.iter(1000) for ids in encode(tokenizer, list(map(self.text, batch["prompt"]))))
        limit = settings.max_prompt_tokens
        self.kept = [i for i, length in enumerate(lengths) if length <= limit]
        none = f"none of {len(rows)} prompts fits into {limit} tokens; raise --max-prompt-tokens, or lower --max-new-tokens"
        refuse_if(not self.kept, f"--dataset {settings.dataset}: split {split}: {none}")
        self.summary = f"{split}: {len(self)} prompts" + ("" if self.gold else ", without gold answers, so without win-rate")
        if len(self) < len(rows):
            self.summary += f", {len(rows) - len(self)} longer than {limit} tokens left out"

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i):
        columns = dict(self.rows[self.kept[i]])
        prompt = columns.pop("prompt")
        (ids,) = encode(self.tokenizer, [self.text(prompt)])
        gold = None if columns.get(self.gold) is None else answer_text(prompt, columns[self.gold])
        pair = [self.answer_ids(prompt, ids, answer_text(prompt, columns[name])) for name in self.pair]
        return Example(i, prompt, torch.tensor(ids), gold, pair, columns)

    def text(self, prompt):
        """A prompt as the policy reads it."""
        return prompt if isinstance(prompt, str) else chat(self.tokenizer, prompt, f"--model {self.settings.model}", add_generation_prompt=True)

    def answer_ids(self, prompt, prompt_ids, answer):
        """An answer as if the policy had written it: what follows the prompt's ids, the end token, cut to length."""
        (ids,) = encode(self.tokenizer, [self.text(prompt) + answer])
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:  # the tokenizer joins letters over the boundary; the policy could not
            ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return torch.tensor((ids + [self.tokenizer.eos_token_id])[: self.settings.max_new_tokens])


def is_messages(prompt):
    """Whether a prompt or an answer is a list of {"role": text, "content": text}, at least one."""
    if not (isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt)):
        return False
    return all(isinstance(message.get(name), str) for message in prompt for name in ("role", "content"))


def answer_text(prompt, answer):
    """An answer of the data, joined to its prompt as an output is: by a space, where neither brings white space."""
    if is_messages(answer):  # the last of them is the reply
        answer = answer[-1]["content"]
    apart = isinstance(prompt, str) and answer and not prompt[-1].isspace() and not answer[0].isspace()
    return " " + answer if apart else answer


def load_splits(name, flag_name="--dataset"):
    """{"train", "validation", "test": rows or None} of a hub name, a directory, or a .jsonl, .parquet or .csv file."""
    import datasets
    import huggingface_hub

    path, kinds = Path(name), {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    datasets.disable_progress_bars()
    refuse_if(path.is_file() and path.suffix not in kinds, f"{flag_name} {name}: of unknown kind; give .jsonl, .parquet or .csv")
    refuse_if(path.is_file() and not path.stat().st_size, f"{flag_name} {name}: has no rows; add some")
    try:
        if path.is_file():
            found = datasets.load_dataset(kinds[path.suffix], data_files={"train": name})
        else:  # load_dataset(hub name) would need the network even where the cache holds the files
            download = huggingface_hub.snapshot_download
            found = datasets.load_dataset(name if path.is_dir() else download(name, repo_type="dataset"))
    except Exception as error:
        line = broken_line(path)
        refuse_if(line, f"{flag_name} {line}: not a JSON object; correct or remove this line")
        raise UserError(f"{flag_name} {name}: cannot be read ({first_line(error)}); give a hub name, a directory or a file") from None
    found["validation"] = next((found[split] for split in ("validation", "valid", "val") if split in found), None)
    return {split: found.get(split) for split in ("train", "validation", "test")}


def check_rows(rows, where, pair=()):
    """Refuses rows without prompts, and texts that are none. Before any are held out: row numbers are those of the file."""
    refuse_if(rows is None, f"{where} is missing; name its file train.jsonl (or .parquet, .csv)")
    names = rows.column_names
    for name in ("prompt", *pair):
        needs = " (--method dpo needs 'chosen' and 'rejected')" * bool(pair)
        refuse_if(name not in names, f"{where} has no column {name!r}{needs}, there are {', '.join(names)}; add or rename one")
    for name in ("prompt", *pair, *[name for name in GOLD_COLUMNS if name in names][:1]):
        for i, text in enumerate(rows[name]):
            valid = is_messages(text) or isinstance(text, str) and (text.strip() or name != "prompt")
            optional = text is None and name != "prompt" and name not in pair
            if not (valid or optional):
                told = f"{name!r} must be text, or messages with role and content, not {text!r:.60}"
                raise UserError(f"{where}, row {i + 1}: {told}; correct it, or rename or remove that column")


def broken_line(path):
    """"file:line" of the first line that is no JSON object in the .jsonl files at a path, or None."""
    for file in path.glob("*.jsonl") if path.is_dir() else [path]:
        for number, line in enumerate(file.read_bytes().splitlines() if file.suffix == ".jsonl" and file.exists() else [], 1):
            try:
                fine = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                fine = False
            if not fine:
                return f"{file}:{number}"


def load_data(settings, tokenizer, splits=None):
    """-> [train, validation, test] as Prompts. A split that the data lacks is held out from train: the same rows
    for every --seed, a tenth of it and at most 1000."""
    splits, where = splits or load_splits(settings.dataset), f"--dataset {settings.dataset}: split"
    for split, rows in splits.items():
        if rows is not None or split == "train":
            check_rows(rows, f"{where} {split}")
    pairs = own = splits["train"]
    if METHODS[settings.method].source == "data":
        if settings.pairs_dataset:
            pairs = load_splits(settings.pairs_dataset, "--pairs-dataset")["train"]
            pairs, where = pairs and pairs.map(move_cue), f"--pairs-dataset {settings.pairs_dataset}: split"
        check_rows(pairs, f"{where} train", ("chosen", "rejected"))
    for split in [split for split in splits if splits[split] is None]:
        train = splits["train"]
        refuse_if(len(train) < 2, f"--dataset {settings.dataset}: too few rows to hold any out as {split}; add some")
        size = min(1000, math.ceil(len(train) / 10))
        order = random_subset(len(train), len(train), HELD_OUT)
        splits[split], splits["train"] = train.select(order[:size]), train.select(order[size:])
        print(f"{split}: not in the data; {size} rows of train are held out for it")
    if pairs is not own:
        splits["train"] = pairs
    result = [Prompts(rows, tokenizer, settings, split) for split, rows in splits.items()]
    print("\n".join(prompts.summary for prompts in result))
    return result


def move_cue(row, cue="TL;DR:"):
    """openai_summarize_comparisons has the cue before each answer: to the end of the prompt, as in openai_summarize_tldr."""
    texts = all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected"))
    if not texts or not row["chosen"].startswith(cue):
        return row
    answers = {name: row[name].removeprefix(cue) for name in ("chosen", "rejected")}
    return row | {"prompt": row["prompt"].rstrip() + "\n" + cue} | answers


# ------------------------------------------------------------------------------------------
# 7. Evaluation

EVALUATION_BATCH = 32  # prompts at once, one output each
HELD_OUT_PROMPTS = 64  # validation prompts on which D_n is estimated


def evenly(size, count):
    """min(count, size) indices below size, evenly spaced."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def evaluate(policy, reward, data, settings, run):
    """One output for each of `--eval-prompts` prompts, against the gold answers. -> (metrics, a line for each prompt)

    The same prompts with the same random numbers each time, so that evaluations differ by the policy alone.
    kl_to_prior is the mean of log q_theta - log p over the outputs, in nats: KL(q_theta || p), as they are drawn
    from q_theta. Greedy outputs are not, so `--greedy` leaves it out.
    """
    rows = evenly(len(data), settings.eval_prompts or len(data))
    rows.sort(key=lambda i: len(data[i].ids))  # alike lengths together: less padding
    size = min(EVALUATION_BATCH, settings.outputs_per_forward or EVALUATION_BATCH)
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]

    def answer(batch):
        examples, lines = [data[i] for i in batch], []
        prompts = [example.ids for example in examples]
        generators = [seeded(settings.seed, EVALUATION, i) for i in batch]
        outputs, log_q = policy.sample_batch(prompts, 1, settings.max_new_tokens, False, generators, settings.greedy)
        for example, output, own in zip(examples, outputs, log_q.cpu()):
            line = {"prompt": example.prompt, "gold": example.gold, "output": policy.text(example.ids, output[0])}
            texts = [line["output"]] + [example.gold] * (example.gold is not None)  # together: they share the prompt
            line["reward"], line["gold_reward"] = (reward(example.prompt, texts, example.columns).tolist() + [None])[:2]
            ratio = own - policy.log_prob(example.ids, output, prior=True).cpu()
            lines.append((example.row, ratio.item(), line))
        return lines

    lines = sorted(itertools.chain(*run.shared_out(batches, answer, "evaluation")), key=lambda line: line[0])
    against = [(line["reward"], line["gold_reward"]) for _, _, line in lines if line["gold"] is not None]
    metrics = dict(zip(("win_rate", "win_rate_half_width"), win_rate(*zip(*against)))) if against else {}
    metrics["reward"] = float(np.mean([line["reward"] for _, _, line in lines]))
    if not settings.greedy:
        metrics["kl_to_prior"] = float(np.mean([ratio for _, ratio, _ in lines]))
    return metrics, [line for _, _, line in lines]


# ------------------------------------------------------------------------------------------
# 8. The run directory, and the processes that share a run

RUN_FILES = ("metrics.jsonl", "samples.jsonl", "test_outputs.jsonl", "model", "checkpoint", "report.png", "toy.png")
RUN_FILES += ("nonfinite.json", "unfinished", "unfinished.png", "unfinished.jsonl", "config.json")  # the last makes it a run: it goes last


def save_policy(policy, directory):
    """The policy and its tokenizer, for transformers (all weights) or peft (the adapter) to load."""
    if policy.prior_model is not None:
        policy.model.save_pretrained(directory)
    else:
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(policy.model, adapter_name=policy.adapter, save_embedding_layers=False)
        save_file({name: w.contiguous() for name, w in weights.items()}, directory / "adapter_model.safetensors")
        policy.model.peft_config[policy.adapter].save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)


def load_policy(policy, directory):
    """The weights of `save_policy` back into q_theta."""
    if policy.prior_model is not None:
        saved = type(policy.model).from_pretrained(directory, dtype=policy.model.dtype)
        policy.model.load_state_dict(saved.state_dict())
    else:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_file(directory / "adapter_model.safetensors"), policy.adapter)


class Run:
    """A run directory, written by the first process alone, and what the processes of a run exchange.

    It can be killed at any moment and resumed. Lines are written whole; `samples.jsonl` is D_t; a checkpoint
    is one file with the trained weights, AdamW's state and the number of updates, written beside and renamed. On
    resuming, lines behind the checkpoint are cut off; they come again, the same. With random numbers that depend
    on (seed, purpose, index) alone there is nothing else to restore.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.rank, self.processes = 0, 1
        if torch.distributed.is_initialized():
            self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.best = -math.inf  # validation win-rate of what is in model/
        self.warned, self.low = set(), 0

    # ---- processes

    def gather(self, mine):
        """The lists of all processes as one: item i of the whole was item i // W of process i % W. Also a barrier."""
        if self.processes == 1:
            return mine
        parts = [None] * self.processes
        torch.distributed.all_gather_object(parts, mine)
        return [x for turn in itertools.zip_longest(*parts) for x in turn if x is not None]

    def shared_out(self, items, function, label):
        """function(item) of all items in order, as they come; each process computes its share and gets all."""
        for start in self.progress(range(0, len(items), self.processes), label):
            mine = items[start + self.rank : start + self.rank + 1]
            yield from self.gather([function(item) for item in mine])

    def add_gradients(self, policy):
        """Each process has divided its share of the batch by the whole batch's size: the sum is the mean."""
        for p in policy.parameters().values() if self.processes > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)

    def progress(self, steps, label):
        """A bar with the time left, on a terminal."""
        return tqdm(steps, desc=label, leave=False, disable=True if self.rank else None)

    # ---- lines

    def lines(self, name):
        """The whole lines of a .jsonl file as dicts; what a killed run was writing has no newline, and is none."""
        path = self.path / name
        data = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line]

    def write(self, name, lines, anew=False):
        """Appends lines; or, anew, replaces the file by them, whole at any moment."""
        if self.rank == 0:
            file = self.path / ("unfinished.jsonl" if anew else name)
            with file.open("w" if anew else "a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            if anew:
                file.replace(self.path / name)

    def keep(self, samples, prompt):
        """The n outputs of one prompt to samples.jsonl, a line each."""
        same = {"iteration": samples.iteration, "row": samples.row, "prompt": prompt}
        each = {"output": samples.texts, "output_ids": [output.tolist() for output in samples.outputs]}
        each |= {name: getattr(samples, name).tolist() for name in CACHED}
        self.write("samples.jsonl", [same | dict(zip(each, values)) for values in zip(*each.values())])

    def kept(self, data):
        """D_t from samples.jsonl; a prompt whose n lines are not all there is cut off, to be drawn again."""
        lines, n = self.lines("samples.jsonl"), self.settings.samples_per_prompt
        groups = [lines[i : i + n] for i in range(0, len(lines) - n + 1, n)]
        self.write("samples.jsonl", itertools.chain(*groups), anew=True)
        result, dtype = [], torch.float64 if self.settings.dtype == "float64" else torch.float32
        for group in groups:
            columns = {name: [line[name] for line in group] for name in group[0]}
            numbers = [torch.tensor(columns[name], dtype=dtype) for name in CACHED]
            outputs = [torch.tensor(ids) for ids in columns["output_ids"]]
            ids = data[group[0]["row"]].ids
            result.append(Samples(group[0]["iteration"], group[0]["row"], ids, outputs, columns["output"], *numbers))
        return result

    # ---- warnings

    def warn_if(self, wrong, message):
        if wrong and self.rank == 0 and message not in self.warned:
            self.warned.add(message)
            print(f"brain: warning: {message}", file=sys.stderr)

    def look_at(self, samples, policy):
        """Warns of a round's samples from which nothing can be learned."""
        outputs = [output for group in samples for output in group.outputs]
        cut = "every output was cut at --max-new-tokens; raise it, or see whether the model knows its end token"
        self.warn_if(not any(map(policy.ended, outputs)), cut)
        flat = all(group.reward.max() - group.reward.min() < 1e-6 for group in samples)
        self.warn_if(flat, "the outputs of each prompt all have the same reward: nothing can be learned; look at the reward")
        few = len({tuple(output.tolist()) for output in outputs}) < len(outputs) / 10 and len(outputs) >= 20
        self.warn_if(few, "nearly all outputs are the same: the policy has collapsed; lower --learning-rate")

    def log(self, line):
        """An update's line of metrics, and a warning where few samples carry the gradient for long."""
        self.write("metrics.jsonl", [line | {"time": round(time.time(), 3)}])
        grouped = METHODS[self.settings.method].group_size is not None  # pairs: an argmax has a size of 1 by design
        self.low = self.low + 1 if min(line["ess_alpha"], line["ess_beta"]) < 1.25 and not grouped else 0
        near_1 = "the effective sample size was near 1 in 50 updates: one output has all the weight; lower --learning-rate, "
        self.warn_if(self.low == 50, near_1 + "or renew the proposal sooner (--updates-per-iteration)")

    def stop_if_not_finite(self, metrics, batch, policy):
        """Ends the run before an infinite or undefined gradient reaches the weights, with the batch written out."""
        gradients = (p.grad for p in policy.parameters().values() if p.grad is not None)
        if all(map(math.isfinite, metrics.values())) and all(gradient.isfinite().all() for gradient in gradients):
            return
        file = self.path / "nonfinite.json"
        if self.rank == 0:
            found = [{"row": s.row, "outputs": s.texts} | {name: repr(getattr(s, name).tolist()) for name in CACHED} for s in batch]
            file.write_text(json.dumps({"metrics": repr(metrics), "batch": found}, indent=1))
        unchanged = "the weights are as they were; lower --learning-rate, or use --dtype float32"
        raise UserError(f"the loss or its gradient is not finite (the batch: {file}); {unchanged}")

    # ---- evaluations, models, checkpoints

    def start(self, policy, reward, validation, test):
        """What evaluations need. The held-out samples are n outputs of the prior for some validation prompts, drawn once."""
        self.reward, self.splits = reward, {"validation": validation, "test": test}
        of_prior = dataclasses.replace(self.settings, method="dpo-sft+iw+n")  # q' = p, one group
        draw = functools.partial(collect, policy, reward, validation, 0, of_prior)
        groups = together(evenly(len(validation), HELD_OUT_PROMPTS), self.settings)
        self.held_out = list(itertools.chain(*self.shared_out(groups, draw, "held-out samples")))

    @torch.no_grad()
    def divergence(self, policy):
        """D_n (eq. 13) on the held-out samples, in nats: an estimate of the objective, where it was not trained.

        Comparable over a whole run; its expectation is zero only at the posterior. Where it rises while the loss on
        D_t falls, the policy is learning D_t by heart.
        """

        def d_n(samples):
            log_q = policy.log_prob(samples.prompt_ids, samples.outputs).cpu()
            return float(brain_loss(log_q, samples.log_q_proposal, samples.alpha_hat))

        return float(np.mean(list(self.shared_out(self.held_out, d_n, "held-out D_n"))))

    def evaluate(self, policy, step, split="validation"):
        """A line of metrics, and one on the screen. On validation, the best policy so far is saved as model/."""
        metrics, lines = evaluate(policy, self.reward, self.splits[split], self.settings, self)
        metrics["self_normalized_kl"] = self.divergence(policy)
        if split == "test":
            self.write("test_outputs.jsonl", lines, anew=True)
        elif metrics.get("win_rate", math.inf) > self.best:  # without win-rate nothing can be compared: the last
            self.best = metrics.get("win_rate", -math.inf)
            self.save_model(policy)  # before its line: a killed run comes here again
        self.write("metrics.jsonl", [{"step": step, "split": split} | metrics | {"time": round(time.time(), 3)}])
        text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"update {step:>6}  {split:<10}  {text}".replace("  win_rate_half_width", " ±"), flush=True)

    def save_model(self, policy):
        """model/, filled beside and then renamed: whole, or not there and coming again."""
        if self.rank == 0:
            shutil.rmtree(self.path / "unfinished", ignore_errors=True)
            (self.path / "unfinished").mkdir()
            save_policy(policy, self.path / "unfinished")
            shutil.rmtree(self.path / "model", ignore_errors=True)
            (self.path / "unfinished").rename(self.path / "model")
        self.gather([])  # nobody reads it before it is there

    def save_checkpoint(self, policy, optimizer, step):
        if self.rank == 0:
            state = {f"adamw.{key}/{name}": x for name, p in policy.parameters().items() for key, x in optimizer.state[p].items()}
            state |= {f"weights/{name}": p.detach() for name, p in policy.parameters().items()}
            beside = self.path / "checkpoint" / "unfinished"
            beside.parent.mkdir(exist_ok=True)
            save_file(state | {"step": torch.tensor(step)}, beside)
            beside.replace(beside.with_name("state.safetensors"))

    def restore(self, policy, optimizer, data):
        """(updates done, D_t) as the checkpoint has it; in a new run (0, []), after the first evaluation."""
        file = self.path / "checkpoint" / "state.safetensors"
        new = not file.exists()
        self.gather([])
        if new:
            self.write("metrics.jsonl", [], anew=True)
            self.write("samples.jsonl", [], anew=True)
            self.evaluate(policy, 0)
            self.save_checkpoint(policy, optimizer, 0)
            return 0, []
        state = load_file(file)
        step = int(state["step"])
        for name, p in policy.parameters().items():
            p.data.copy_(state[f"weights/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adamw.{key}/{name}" in state]
            optimizer.state[p] = {key: state[f"adamw.{key}/{name}"] for key in keys}  # none without a gradient so far
        optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to the device of the weights
        lines = [line for line in self.lines("metrics.jsonl") if line["step"] <= step and line.get("split") != "test"]
        self.write("metrics.jsonl", lines, anew=True)
        if (self.path / "model").exists():
            self.best = max((line["win_rate"] for line in lines if "win_rate" in line), default=-math.inf)
        return step, self.kept(data)

    def finished(self):
        return (self.path / "report.png").exists()  # the last thing that is written

    def report(self):
        """report.png: what to watch, over updates. Grey: on D_t. Black: evaluations on validation, with intervals."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        panels = {"win_rate": "win-rate against gold, %", "reward": "mean reward", "kl_to_prior": "KL to the prior, nats",
                  "self_normalized_kl": "held-out D_n, nats", "loss": "loss: D_n on D_t, nats", "ess_alpha": "ESS of alpha_hat",
                  "ess_beta": "ESS of beta_hat", "ended": "share of outputs that ended"}  # fmt: skip
        figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
        for axis, (name, title) in zip(axes.flat, panels.items()):
            axis.set(title=title, xlabel="updates")
            for kind, look in (("loss", {"color": "0.6"}), ("split", {"color": "black", "marker": "o", "capsize": 3})):
                lines = [line for line in self.lines("metrics.jsonl") if name in line and kind in line and line.get("split") != "test"]
                points = [(line["step"], line[name], line.get(f"{name}_half_width", 0)) for line in lines]
                if points:
                    axis.errorbar(*zip(*points), **look)
        figure.savefig(self.path / "unfinished.png", dpi=100)
        (self.path / "unfinished.png").replace(self.path / "report.png")
        plt.close(figure)


# ------------------------------------------------------------------------------------------
# 9. The command line

COMPANIONS = {  # what goes with a model; each entry is a default that its flag overrides, recorded in config.json
    "CarperAI/openai_summarize_tldr_sft": dict(  # the paper's summarisation (appendix B)
        tokenizer="EleutherAI/gpt-j-6B",  # the model comes without one
        reward_model="CarperAI/openai_summarize_tldr_rm_checkpoint",
        reward_base="CarperAI/openai_summarize_tldr_sft",
        # Its training texts ended in an end token, but the score was read before it: attention is causal, leave it out.
        reward_template="<|startoftext|>{prompt}{output}",
        dataset="CarperAI/openai_summarize_tldr",
        pairs_dataset="CarperAI/openai_summarize_comparisons",
        max_prompt_tokens=500, max_new_tokens=50, lora_rank=8, lora_alpha=32,
    ),
    "timdettmers/qlora-hh-rlhf-7b": dict(  # the paper's dialogue: the prior is an adapter on Llama-7B
        reward_model="Dahoas/gptj-rm-static",
        reward_base="EleutherAI/gpt-j-6B",
        reward_template="{prompt}{output}<|endoftext|>",  # this one was read at the end token
        dataset="Dahoas/rm-static",
        max_prompt_tokens=500, max_new_tokens=128, lora_rank=64, lora_alpha=16,
    ),
    "toy": dict(
        iterations=3, prompts_per_iteration=64, updates_per_iteration=50, eval_every=50, learning_rate=1e-3,
        weight_decay=0.0, lora_rank=0, max_prompt_tokens=2, max_new_tokens=4, eval_prompts=250, outputs_per_forward=256,
    ),
}  # fmt: skip


DTYPES = ("float32", "bfloat16", "float16", "float64")


def setting(default, text, least=None, below=math.inf, one_of=None):
    """A field of Settings. Its value is None until it is typed, so that companions override only what was not."""
    shown = "" if default is None else f" (default: {default})"
    rules = {"real": default, "least": least, "below": below, "one_of": one_of}
    return field(default=None, metadata={"help": text.replace("%", "%%") + shown} | rules)


@dataclass
class Settings:
    """Every setting, once; `parse` makes one. (paper): as in section 8 and appendix B.2; e, m, k and the batch size are
    ours (departure 5)."""

    model: str = setting("toy", "toy, or a causal LM or LoRA adapter: hub name or directory")
    base_model: str | None = setting(None, "for an adapter: its base, where the one that it names is not wanted")
    tokenizer: str | None = setting(None, "for a model that comes without one")
    reward_model: str | None = setting(None, "classifier with one label, or a bare checkpoint (with --reward-base)")
    reward_base: str | None = setting(None, "the model whose config and tokenizer a bare reward checkpoint has")
    reward_template: str | None = setting(None, "r is read at the last token of this (default: {prompt}{output})")
    reward_function: str | None = setting(None, "file.py:name in place of a model: f(prompts, completions, **columns)")
    goodness: str = setting("bradley-terry", "p(G=1|y,x) from r", one_of=("bradley-terry", "logistic"))
    dataset: str | None = setting(None, "hub name, directory, .jsonl, .parquet or .csv with a column prompt")
    pairs_dataset: str | None = setting(None, "for --method dpo: pairs to train on, where --dataset has none")
    method: str = setting("brain", "one of " + ", ".join(METHODS), one_of=tuple(METHODS))
    output_dir: str | None = setting(None, "where the run is written (default: a new directory under runs/)")
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output-dir"})
    overwrite: bool = field(default=False, metadata={"help": "replace the run in --output-dir"})
    seed: int = setting(0, "of all random numbers", 0, 2**63)
    device: str | None = setting(None, "cpu, cuda or cuda:1 (default: cuda where there is one)")
    dtype: str | None = setting(None, "of the models (default: bfloat16 for LoRA on a GPU, else float32)", one_of=DTYPES)
    iterations: int = setting(4, "e: rounds of sampling and updates; 0: evaluate only", 0)
    prompts_per_iteration: int = setting(1000, "m: prompts sampled for in a round", 1)
    samples_per_prompt: int = setting(32, "n: outputs per prompt (paper: 32)", 2)
    updates_per_iteration: int = setting(1000, "k: updates in a round", 1)
    batch_size: int = setting(8, "prompts in an update", 1)
    max_prompt_tokens: int | None = setting(None, "longer prompts are left out (default: what the context leaves)", 1)
    max_new_tokens: int = setting(64, "outputs are cut there", 1)
    learning_rate: float = setting(1e-5, "AdamW (paper: 1e-5)", 0)
    weight_decay: float = setting(0.1, "AdamW (paper: 0.1)", 0)
    adam_beta1: float = setting(0.9, "AdamW (paper: 0.9)", 0, 1)
    adam_beta2: float = setting(0.95, "AdamW (paper: 0.95)", 0, 1)
    lora_rank: int = setting(8, "0: train all weights (paper: 8 for summaries, 64 for dialogue)", 0)
    lora_alpha: int = setting(32, "LoRA's scale is alpha / rank (paper: 32 and 16)", 1)
    load_in_4bit: bool = field(default=False, metadata={"help": "base weights in 4 bits; needs a GPU and bitsandbytes"})
    outputs_per_forward: int | None = setting(None, "outputs in the model at once (default: all n): fewer bound memory; for more, prompts are sampled together", 1)
    eval_prompts: int = setting(500, "prompts per evaluation; 0: the whole split", 0)
    eval_every: int = setting(1000, "updates between evaluations (paper: 1000)", 1)
    greedy: bool = field(default=False, metadata={"help": "evaluate the most likely output, not a sampled one"})


def flag(name):
    return "--" + name.replace("_", "-")


def nearest(word, words):
    return "".join(f"did you mean {near}? " for near in difflib.get_close_matches(word, words, 1))


def parse(argv):
    """Command line -> Settings: what was typed, else the model's companion, else the default. UserError says how to fix it."""

    class Parser(transformers.HfArgumentParser):
        def add_argument(self, *names, real=None, least=None, below=None, one_of=None, **known):
            return super().add_argument(*names, **known)  # without our rules

        def error(self, message):
            raise UserError(message + "; see --help")

    about = "BRAIn: train a policy to be the posterior p(y|x, G=1)."
    parser = Parser(Settings, description=about, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    s, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    fields = dataclasses.fields(s)
    for word in unknown:
        raise UserError(f"{word}: no such flag; {nearest(word.partition('=')[0], [flag(f.name) for f in fields])}see --help")
    companions = {"samples_per_prompt": 2} if s.method == "dpo" else {}  # a pair is what the data has
    companions |= COMPANIONS.get(s.model or "toy", {})
    if s.reward_model or s.reward_function:  # another reward than the companion, so not with its base and template
        companions = {name: value for name, value in companions.items() if not name.startswith("reward_")}
    if s.dataset:
        companions.pop("pairs_dataset", None)
    s.typed = {f.name for f in fields if getattr(s, f.name) is not None}
    for f in fields:
        value, rules, name = getattr(s, f.name), f.metadata, flag(f.name)
        if value is None:
            setattr(s, f.name, companions.get(f.name, rules.get("real")))
        elif rules.get("one_of"):
            choices = rules["one_of"]
            refuse_if(value not in choices, f"{name} {value}: {nearest(value, choices)}give one of {', '.join(choices)}")
        elif rules.get("least") is not None:
            bounded, real = rules["below"] < math.inf, isinstance(value, float)
            limits = f"at least {rules['least']}" + (f" and below {rules['below']}" if bounded else " and finite" * real)
            why = "; D_1 is 0 for every policy, and Theorem 4.3 needs two outputs" if f.name == "samples_per_prompt" else ""
            refuse_if(not rules["least"] <= value < rules["below"], f"{name} {value}: must be {limits}{why}")
    check(s)
    return s


def check(s):
    """Refuses settings that are each in range but do not go together, and settles device and dtype."""
    method, n, template = METHODS[s.method], s.samples_per_prompt, s.reward_template or "{prompt}{output}"
    if s.model == "toy":
        refuse_if(s.max_new_tokens > 5, f"--max-new-tokens {s.max_new_tokens}: the toy world lists all outputs; give at most 5")
        own = ("base_model", "tokenizer", "reward_model", "reward_base", "reward_template", "reward_function", "dataset")
        for name in (*own, "pairs_dataset", "load_in_4bit", "lora_rank"):
            refuse_if(getattr(s, name), f"{flag(name)}: the toy world has its own; name a model with --model, or leave it out")
    else:
        refuse_if(s.dataset is None, "--dataset: missing; give prompts for --model (hub name, directory, .jsonl, .parquet or .csv)")
        refuse_if(bool(s.reward_model) == bool(s.reward_function), "--reward-model or --reward-function: give one of them, not both")
    refuse_if(method.source == "data" and n != 2, f"--samples-per-prompt {n}: --method {s.method} has the data's pairs; leave it out")
    refuse_if(method.group_size and n % method.group_size, f"--samples-per-prompt {n}: --method {s.method} makes pairs; give an even number")
    refuse_if(s.learning_rate == 0, "--learning-rate 0: must be above 0; to evaluate alone, give --iterations 0")
    unknown = set(re.findall(r"\{([^{}]*)\}", template)) - {"prompt", "output"}
    wrong = unknown or "{output}" not in template
    refuse_if(wrong, f"--reward-template {template}: needs {{output}}, may have {{prompt}}, and no other braces")
    for name in ("reward_base", "reward_template"):
        refuse_if(s.reward_function and getattr(s, name), f"{flag(name)}: is for a --reward-model; leave it out")
    refuse_if(s.resume and s.overwrite, "--resume: not with --overwrite; give one")
    refuse_if(s.resume and not s.output_dir, "--resume: which run? give its --output-dir")
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = s.device != "cpu"
    refuse_if(not re.fullmatch(r"cpu|cuda(:\d+)?", s.device), f"--device {s.device}: give cpu, cuda or cuda:1")
    refuse_if(gpu and int(s.device[5:] or 0) >= torch.cuda.device_count(), f"--device {s.device}: no such GPU; give --device cpu")
    able = gpu and importlib.util.find_spec("bitsandbytes") and s.lora_rank
    needs = "needs a GPU, `pip install bitsandbytes` and a --lora-rank above 0; leave it out"
    refuse_if(s.load_in_4bit and not able, f"--load-in-4bit: {needs}")
    s.dtype = s.dtype or ("bfloat16" if gpu and s.lora_rank else "float32")  # bfloat16 weights round 1e-5 away


def base_of(s):
    """(the model that has the weights, the adapter on it or None). An adapter's rank and alpha are the policy's."""
    config = find(s.model, "adapter_config.json")
    if config is None:
        refuse_if(s.base_model, f"--base-model: {s.model} is not an adapter; leave it out")
        return s.model, None
    config = json.loads(Path(config).read_text())
    base = s.base_model or config.get("base_model_name_or_path")
    refuse_if(not base, f"--model {s.model}: an adapter that does not name its base; give --base-model")
    refuse_if(config.get("peft_type") != "LORA", f"--model {s.model}: an adapter that is not LoRA; merge it into its base first")
    for name, own in (("lora_rank", config["r"]), ("lora_alpha", config["lora_alpha"])) if s.lora_rank else ():
        other = name in s.typed and getattr(s, name) != own
        refuse_if(other, f"{flag(name)} {getattr(s, name)}: the policy starts as a copy of {s.model}, which has {own}; leave it out")
        setattr(s, name, own)
    return base, s.model


def weigh(kind, config, rank=0, flag_name="--model", adapter=None):
    """(weights, trained weights, numbers in the cache of a token): exact, from a model without storage."""
    with torch.device("meta"):
        try:
            model, output = kind.from_config(config, dtype=torch.bfloat16), None
        except ValueError:
            raise UserError(f"{flag_name} {config.name_or_path}: a {config.model_type} model, which {kind.__name__} does not know") from None
        model.config.pad_token_id = None  # else transformers looks for it among ids that have no values
        with contextlib.suppress(Exception):  # the forward of some looks at values: their cache is not counted
            output = model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
        layers = getattr(getattr(output, "past_key_values", None), "layers", ())
        tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        weights, cache = sum(p.numel() for p in model.parameters()), sum(tensor.numel() for tensor in tensors if tensor is not None)
        if rank:
            model = add_adapter(model, rank, rank, adapter)
    return weights, sum(p.numel() for p in model.parameters() if p.requires_grad), cache


def plan(s, base, adapter=None):
    """Says what is about to happen, before anything large is downloaded or loaded. Settles --max-prompt-tokens."""
    flag_name = "--base-model" if s.base_model else "--model"
    config = load(transformers.AutoConfig, base, flag_name)
    room = context_of(config) - s.max_new_tokens
    none = f"no room for a prompt in a context of {context_of(config)}; lower it"
    refuse_if(room < 1, f"--max-new-tokens {s.max_new_tokens}: {none}")
    s.max_prompt_tokens = int(min(s.max_prompt_tokens or room, room, 2**20))
    length = s.max_prompt_tokens + s.max_new_tokens
    weights, trained, cache = weigh(transformers.AutoModelForCausalLM, config, s.lora_rank, flag_name, adapter)
    size = {"float64": 8, "float32": 4}.get(s.dtype, 2)  # bytes of a number
    n, bound = s.samples_per_prompt, s.outputs_per_forward or s.samples_per_prompt
    rows = min(n, bound) * max(1, bound // n)
    kind, each = ("4 bits", 0.5) if s.load_in_4bit else (s.dtype, size)
    parts = {f"policy and prior: {s.model}, {weights:,} weights in {kind}": weights * each}
    if s.lora_rank:  # peft keeps an adapter in float32 at least
        parts[f"adapter of rank {s.lora_rank}: {trained:,} weights, gradient, AdamW's two moments"] = 4 * max(size, 4) * trained
    else:
        parts["all weights are trained: the prior's copy, gradient, AdamW's two moments"] = 4 * size * trained
    if s.reward_model:
        bare = bare_checkpoint(s.reward_model, s.reward_base)
        source = (s.reward_base, "--reward-base") if bare else (s.reward_model, "--reward-model")
        config = load(transformers.AutoConfig, *source, num_labels=1)
        count, *_ = weigh(transformers.AutoModelForSequenceClassification, config, flag_name=source[1])
        parts[f"reward: {s.reward_model}, {count:,} weights in {s.dtype}"] = size * count
    parts[f"cache of {rows} outputs, {s.max_prompt_tokens} + {s.max_new_tokens} tokens each"] = cache * size * rows * length
    parts["together; activations come on top (--outputs-per-forward bounds them)"] = sum(parts.values())
    e, m, k = s.iterations, s.prompts_per_iteration, s.updates_per_iteration
    samples = f"{e} rounds of {m:,} prompts x {s.samples_per_prompt} outputs = {e * m * s.samples_per_prompt:,} samples"
    print(f"{s.method} on {s.dataset}: {samples}; {e} x {k:,} updates of {s.batch_size} prompts")
    for what, count in parts.items():
        print(f"{count / 1e9:9.3f} GB  {what}", flush=True)


def load_policy_and_reward(s, base, adapter, tokenizer):
    """-> (Policy, reward) of a real run."""
    dtype, bound = getattr(torch, s.dtype), s.outputs_per_forward
    if s.reward_function:
        reward = RewardFunction.from_file(s.reward_function)
    else:
        source = s.reward_model, s.reward_base, s.reward_template, s.tokenizer
        reward = RewardModel.from_pretrained(*source, dtype, s.device, outputs_per_forward=bound)
    arguments = {"dtype": dtype}
    if s.load_in_4bit:
        four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        arguments |= {"quantization_config": four, "device_map": {"": s.device}}
    model = load_model(transformers.AutoModelForCausalLM, base, "--base-model" if adapter else "--model", **arguments)
    model = model if s.load_in_4bit else model.to(s.device)
    try:
        if adapter:
            from peft import PeftModel

            with warnings.catch_warnings():  # weights that find no place: the prior would be the base without them
                warnings.filterwarnings("error", "Found missing adapter keys")
                model = PeftModel.from_pretrained(model, adapter)
        return Policy(model, tokenizer, s.lora_rank, s.lora_alpha, bound), reward
    except (OSError, ValueError, RuntimeError, UserWarning, pickle.UnpicklingError) as error:
        raise UserError(f"--model {s.model}: {first_line(error)}; see --base-model, --lora-rank and --lora-alpha") from None


def open_directory(s):
    """Where to write, and whether there is a run to go on with. Refuses what must not be touched; touches nothing."""
    path = Path(s.output_dir or "runs/" + re.sub(r"\W", "-", f"{s.model}-{s.method}-") + time.strftime("%Y%m%d-%H%M%S"))
    before, above = {}, next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    refuse_if(not above.is_dir(), f"--output-dir {path}: {above} is a file; name another")
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((path / "config.json").read_text())
    run = "samples_per_prompt" in before  # a model has a config.json too
    if s.resume:
        refuse_if(not run, f"--resume: {path} holds no run; start it without --resume")
        free = ("output_dir", "resume", "overwrite", "device")  # may be others than at the start
        now = {name: value for name, value in dataclasses.asdict(s).items() if name not in free}
        changed = [f"{flag(name)} was {before.get(name)}, not {now[name]}" for name in now if before.get(name) != now[name]]
        refuse_if(changed, f"--resume: {path} has other settings: {'; '.join(changed)}; give those, or another --output-dir")
    elif run:
        refuse_if(not s.overwrite, f"--output-dir {path}: holds a run; resume it (--resume), replace it (--overwrite), or name another")
    else:
        refuse_if(path.exists() and any(path.iterdir()), f"--output-dir {path}: holds other files; name another")
    return path


def prepare(path, s, argv):
    """The directory, empty but for config.json: settings, then what else a number depends on."""
    path.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
    here = Path(__file__).resolve().parent
    made = {"command": shlex.join(["python", "brain.py", *argv]), "commit": None, "python": platform.python_version()}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        made["commit"] = subprocess.check_output(["git", "-C", here, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
    made |= {library.__name__: library.__version__ for library in (torch, transformers, np)}
    made["machine"] = platform.machine() if s.device == "cpu" else torch.cuda.get_device_name()
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(s) | made, indent=1) + "\n")


def join_processes(s):
    """Under torchrun: one of several processes, on a GPU of its own where there are some. The first one speaks."""
    if "LOCAL_RANK" not in os.environ or torch.distributed.is_initialized():
        return
    if s.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if s.device == "cuda" else "gloo")
    if torch.distributed.get_rank():
        sys.stdout = open(os.devnull, "w")


def execute(s, argv):
    """From settings to a report."""
    toy = adapter = None
    if s.model == "toy":
        from toy.world import Toy

        toy = Toy(s.seed, s.dtype, s.goodness, length=s.max_new_tokens)
    else:
        base, adapter = base_of(s)
        plan(s, base, adapter)
    run = Run(open_directory(s), s)
    if s.resume and run.finished():
        print(f"{run.path}: this run is finished; its best model is {run.path / 'model'}")
        return
    place = (s.tokenizer, "--tokenizer") if "tokenizer" in s.typed else (base if adapter else s.model, "--model")
    tokenizer = toy.tokenizer if toy else load_tokenizer(place[0], s.tokenizer, place[1])
    refuse_if(tokenizer.eos_token_id is None, f"--model {s.model}: its tokenizer has no end token; set eos_token there")
    train_data, validation, test = load_data(s, tokenizer, toy and toy.splits())
    torch.manual_seed(s.seed)  # LoRA begins at random: alike in all processes
    if toy:
        policy = Policy(toy.model, tokenizer, outputs_per_forward=s.outputs_per_forward)
        reward = RewardFunction(toy.world.reward_of, "toy")
    else:
        policy, reward = load_policy_and_reward(s, base, adapter, tokenizer)
    if not s.resume:  # what a reward refuses, it refuses before anything is written or replaced
        reward(validation[0].prompt, [validation[0].gold or " "] * 2, validation[0].columns)
    run.path = Path(run.gather([str(run.path)])[0])  # the first process's: a default name has the time in it
    if run.rank == 0 and not s.resume:
        prepare(run.path, s, argv)
    run.gather([])
    print(f"run: {run.path}", flush=True)
    run.start(policy, reward, validation, test)
    train(policy, reward, train_data, s, run)
    load_policy(policy, run.path / "model")
    run.evaluate(policy, s.iterations * s.updates_per_iteration, "test")
    if run.rank == 0:
        if toy:
            toy.report(policy.model, run.path / "toy.png")
        run.report()
        print(f"{run.path}: the best model is in model/, its outputs in test_outputs.jsonl, what to watch in report.png")


def main(argv=None):
    """-> exit code: 0; 2 for what the user can fix, with one line on stderr; 130 when interrupted."""
    transformers.utils.logging.set_verbosity_error()  # what matters of its warnings, `load_model` refuses
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    try:
        settings = parse(argv)
        join_processes(settings)
        execute(settings, argv)
        return 0
    except UserError as error:
        print(f"brain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbrain: interrupted; with --resume and its --output-dir, the same command goes on", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
