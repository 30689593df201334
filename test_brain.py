"""The claims of brain.py, each a test, in the order of that file.

A docstring names the wrong version that its test catches. What can be enumerated is enumerated, in float64,
by code that shares nothing with what it checks: numpy, toy/world.py, plain Hugging Face forwards.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches out

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import brain
from toy import world as toy_world

torch.set_num_threads(1)  # the models are tiny
transformers.utils.logging.set_verbosity_error()
HERE = Path(__file__).resolve().parent
DOUBLE = torch.float64


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------------
# Models made on the spot

LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
FAMILIES = {
    "gpt2": (transformers.GPT2Config, GPT),
    "gptj": (transformers.GPTJConfig, GPT | dict(rotary_dim=4)),
    "llama": (transformers.LlamaConfig, LLAMA),
    "qwen2": (transformers.Qwen2Config, LLAMA),
    "mistral": (transformers.MistralConfig, LLAMA | dict(sliding_window=5)),
    "opt": (transformers.OPTConfig, dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                         num_attention_heads=4, max_position_embeddings=64,
                                         word_embed_proj_dim=32)),
    "gemma2": (transformers.Gemma2Config, LLAMA | dict(head_dim=8, sliding_window=5)),
    "bloom": (transformers.BloomConfig, dict(hidden_size=32, n_layer=2, n_head=4)),
    "mamba": (transformers.MambaConfig, dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
}  # fmt: skip


def tiny(family="gpt2", seed=0, vocab=10, dtype=DOUBLE, scale=0.3, **changes):
    """A causal LM with random weights. They are large, so its distribution is far from uniform. Dropout is
    0.1."""
    kind, sizes = FAMILIES[family]
    config = kind(**sizes, vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **changes)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=scale)
    return model


def letters(count=6):
    """A tokenizer of `count` letters and the end token 0."""
    return toy_world.tiny_gpt2(toy_world.World(count, 2, 1), width=8, layers=1)[1]


def plain(model, prompt, output, known):
    """log-probability of one output by a plain forward of the whole sequence; ids from `known` on do not
    exist."""
    logits = model(input_ids=torch.cat([prompt, output])[None]).logits[0, len(prompt) - 1 : -1, :known]
    return logits.log_softmax(-1).gather(-1, output[:, None]).sum()


X, X2 = torch.tensor([1, 2, 3, 4, 5, 2, 1]), torch.tensor([3, 3, 1])  # prompts
KNOWN = 7  # ids of letters(): 0 .. 6; tiny() has logits for 10


# ------------------------------------------------------------------------------------------
# 1. The mathematics


def goodness_by_hand(r, goodness, beta):
    """p(G=1|y,x)^(1/beta), not its logarithm, in numpy."""
    good = np.exp(np.asarray(r)) if goodness == "bradley-terry" else 1 / (1 + np.exp(-np.asarray(r)))
    return good ** (1 / beta)


GOODNESSES = [("bradley-terry", 1.0), ("logistic", 1.0), ("bradley-terry", 0.5), ("logistic", 2.5)]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_goodness(dtype):
    """Eq. 15 and 19, divided by beta. Wrong: sigmoid(r) itself; its logarithm by way of it, -inf at -1e4; a
    factor beta; beta inside the sigmoid; another default than Bradley-Terry with beta 1."""
    r = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4], dtype=dtype)
    assert torch.equal(brain.log_goodness(r), r)
    assert torch.equal(brain.log_goodness(r, "bradley-terry", 4.0), r / 4)
    expected = np.array([-1e4, -math.log1p(math.exp(3)), -math.log(2), -math.log1p(math.exp(-2)), 0.0])
    np.testing.assert_allclose(brain.log_goodness(r, "logistic"), expected, rtol=1e-6)
    np.testing.assert_allclose(brain.log_goodness(r, "logistic", 0.5), 2 * expected, rtol=1e-6)
    with pytest.raises(ValueError, match="logistic"):
        brain.log_goodness(r, "bradley")


def test_weights_are_eq_6_and_11():
    """Against numpy, with leading axes. Wrong: the sign of log q', normalisation over prompts, p forgotten,
    the sum of squares for the effective sample size."""
    log_p, log_q, log_q_proposal, r = (random(2, 3, 5, seed=s) for s in range(4))
    alpha = (log_p + r).exp() / log_q_proposal.exp()  # alpha of eq. 6 with exp(r) for p(G=1|y,x)
    beta = log_q.exp() / log_q_proposal.exp()
    found = brain.posterior_weights(log_p, log_q_proposal, r), brain.policy_weights(log_q, log_q_proposal)
    for weights, raw in zip(found, (alpha.numpy(), beta.numpy())):
        np.testing.assert_allclose(weights, raw / raw.sum(-1, keepdims=True), rtol=1e-12)
    found = brain.posterior_weights(log_p, log_p, r)
    np.testing.assert_allclose(found, softmax(r.numpy()), rtol=1e-12)  # eq. 21
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert brain.effective_sample_size(weights).tolist() == [4, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_nothing_overflows(dtype):
    """Rewards of +-1e4, log-probabilities of -1e4. Wrong: exp before normalising; log of a beta_hat of 0."""
    r = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1e4, -1e4]], dtype=dtype)
    log_q = torch.tensor([[0.0, -1e4, -2e4], [-1e4, -5.0, -5.0]], dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(r)
    alpha_hat = brain.posterior_weights(zero, zero, r)
    assert alpha_hat.tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
    loss = brain.brain_loss(log_q, zero, alpha_hat)
    loss.backward()
    # Row 1: log beta_hat_3 = -2e4. Row 2: (log 1/2 + 9995 + log 2) / 2 + (log 1/2 + log 2) / 2 = 4997.5
    assert loss.item() == pytest.approx((2e4 + 4997.5) / 2, rel=1e-6)
    assert log_q.grad.tolist() == [[0.5, 0, -0.5], [-0.25, 0, 0.25]]  # (beta_hat - alpha_hat) / 2
    assert brain.log_evidence(zero[0], zero[0], r[0]).item() == pytest.approx(1e4 - math.log(3), rel=1e-6)


def test_self_normalized_kl():
    """Eq. 14 against numpy. Wrong: arguments swapped, 0 log 0 = nan, a sum over prompts."""
    a, b = softmax(random(4, 5, seed=1).numpy()), softmax(random(4, 5, seed=2).numpy())
    found = brain.self_normalized_kl(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(found, (a * np.log(a / b)).sum(-1), rtol=1e-12)
    one_hot = torch.tensor([1.0, 0.0, 0.0])
    assert brain.self_normalized_kl(one_hot, torch.tensor([0.0, 0.5, 0.5])) == math.inf
    beta = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    found = brain.self_normalized_kl(one_hot, beta)
    found.backward()
    assert found.item() == pytest.approx(math.log(2)) and beta.grad.tolist() == [-2, 0, 0]


@pytest.mark.parametrize("baseline", [True, False])
def test_value_and_gradient_of_the_loss(baseline):
    """Eq. 14 and minus eq. 12; without baseline minus eq. 7 (section 9.3). Mean over prompts. Wrong: the
    sign; a gradient through alpha_hat or log q'; a sum over prompts; another default; 0 times -inf."""
    log_q, log_q_proposal, log_p, r = (random(2, 4, 6, seed=s).requires_grad_() for s in range(4))
    alpha_hat = brain.posterior_weights(log_p, log_q_proposal, r)
    loss = brain.brain_loss(log_q, log_q_proposal, alpha_hat, *([] if baseline else [False]))
    gradients = torch.autograd.grad(loss, (log_q, log_q_proposal, log_p, r), allow_unused=True)
    a, b = alpha_hat.detach().numpy(), softmax((log_q - log_q_proposal).detach().numpy())
    value = a * np.log(a / b) if baseline else -a * log_q.detach().numpy()
    assert loss.item() == pytest.approx(value.sum(-1).mean(), rel=1e-12)
    np.testing.assert_allclose(gradients[0], ((b if baseline else 0) - a) / 8, atol=1e-14)
    assert gradients[1:] == (None, None, None)
    # The policy cannot write the first output; beta_hat is (0, 3/4, 1/4).
    logs = torch.tensor([0, 1 / 8, 1 / 8]).log(), torch.tensor([0.1, 0.2, 0.6]).log()
    loss = brain.brain_loss(*logs, torch.tensor([0.0, 0.0, 1.0]), baseline)
    assert loss.item() == pytest.approx(math.log(4 if baseline else 8), rel=1e-6)


def all_tuples(log_q_proposal, n):
    """Every n-tuple of outputs of a tabular proposal (Y,): its ids (Y^n, n), its probability (Y^n,)"""
    ids = torch.tensor(list(itertools.product(range(len(log_q_proposal)), repeat=n)))
    return ids, log_q_proposal[ids].sum(-1).exp()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_theorem_4_2(n):
    """E[eq. 12] = -grad D_n over all n-tuples of 5 outputs. Wrong: any other weights or loss."""
    log_p, log_q_proposal, logits = (random(5, seed=s).log_softmax(-1) for s in (1, 2, 3))
    r, logits = random(5, seed=4, scale=2.0), logits.clone().requires_grad_()
    tuples, chance = all_tuples(log_q_proposal, n)
    alpha_hat = brain.posterior_weights(log_p[tuples], log_q_proposal[tuples], brain.log_goodness(r)[tuples])
    log_q = logits.log_softmax(-1)
    losses = [brain.brain_loss(log_q[y], log_q_proposal[y], a) for y, a in zip(tuples, alpha_hat)]
    loss = chance @ torch.stack(losses)
    loss.backward()
    log_target = toy_world.posterior(log_p.numpy(), r.numpy())
    numbers = log_target, log_q.detach().numpy(), log_q_proposal.numpy(), n
    assert loss.item() == pytest.approx(toy_world.d_n(*numbers), rel=1e-12, abs=1e-15)
    np.testing.assert_allclose(logits.grad, toy_world.d_n_coefficients(*numbers), atol=1e-14)


def test_at_the_posterior_only_eq_12_is_zero():
    """For each triple of draws eq. 12 is zero. Eq. 7 is zero for none, nor on average: self-normalised
    weights are biased. Wrong: alpha_hat and beta_hat that are not relative to the same q'."""
    log_p, log_q_proposal, r = (random(4, seed=s).log_softmax(-1) for s in (1, 2, 3))
    posterior = torch.tensor(toy_world.posterior(log_p.numpy(), r.numpy()))
    y, chance = all_tuples(log_q_proposal, 3)
    alpha_hat, gradients = brain.posterior_weights(log_p[y], log_q_proposal[y], r[y]), {}
    for baseline in (True, False):
        logits = posterior.expand(len(y), 4).requires_grad_()
        log_q = logits.log_softmax(-1).gather(-1, y)
        loss = brain.brain_loss(log_q, log_q_proposal[y], alpha_hat, baseline) * len(y)
        gradients[baseline] = torch.autograd.grad(loss, logits)[0]
    assert gradients[True].abs().max() < 1e-12
    assert gradients[False].abs().amax(-1).min() > 0.01 and (chance @ gradients[False]).abs().max() > 0.01


@pytest.mark.parametrize("beta", [1.0, 0.1, 3.0])
def test_theorem_6_1(beta):
    """n = 2, argmax, q' = p: value and gradient of DPO, with beta as a factor of each log-probability. Wrong:
    another default than 1, a division by beta, chosen and rejected swapped, a sum over pairs."""
    log_q, log_p = random(7, 2, seed=1).requires_grad_(), random(7, 2, seed=2)
    margin = beta * ((log_q[:, 0] - log_p[:, 0]) - (log_q[:, 1] - log_p[:, 1]))
    by_hand = -torch.log(torch.sigmoid(margin)).mean()
    ours = brain.brain_loss(beta * log_q, beta * log_p, torch.tensor([1.0, 0.0], dtype=DOUBLE).expand(7, 2))
    named = {} if beta == 1 else {"beta": beta}
    dpo = brain.dpo_loss(log_q[:, 0], log_q[:, 1], log_p[:, 0], log_p[:, 1], **named)
    gradients = [torch.autograd.grad(loss, log_q, retain_graph=True)[0] for loss in (by_hand, ours, dpo)]
    for loss, gradient in zip((ours, dpo), gradients[1:]):
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("goodness, beta", GOODNESSES)
def test_the_bounds_on_the_evidence(goodness, beta):
    """Over all n-tuples: E_q[elbo] is log p(G=1|x) - KL(q || posterior) for every n. E_q[log_evidence] is the
    same at n = 1, rises with n, and stays below log p(G=1|x). Wrong: the other KL; log q or log p with
    another sign or forgotten; a sum over draws; log n forgotten; a bound from above."""
    log_p, log_q, r = random(5, seed=1).log_softmax(-1), random(5, seed=2).log_softmax(-1), random(5, seed=3)
    log_good = brain.log_goodness(r, goodness, beta)
    joint = log_p.exp().numpy() * goodness_by_hand(r, goodness, beta)
    evidence, posterior, bounds = math.log(joint.sum()), np.log(joint / joint.sum()), []
    exact = evidence - toy_world.kl(log_q.numpy(), posterior)
    for n in (1, 2, 3, 4):
        y, chance = all_tuples(log_q, n)
        found = brain.elbo(log_p[y], log_q[y], log_good[y])
        assert (chance * found).sum().item() == pytest.approx(exact, rel=1e-12)
        found = brain.log_evidence(log_p[y], log_q[y], log_good[y])
        by_hand = np.log((joint / log_q.exp().numpy())[y].mean(-1))
        np.testing.assert_allclose(found, by_hand, rtol=1e-10, atol=1e-12)
        bounds.append((chance * found).sum().item())
    assert bounds[0] == pytest.approx(exact, rel=1e-12)
    assert bounds[0] < bounds[1] < bounds[2] < bounds[3] < evidence
    for bound in (brain.elbo, brain.log_evidence):  # where q is the posterior, every draw tells the evidence
        found = bound(log_p[y], torch.tensor(posterior)[y], log_good[y])
        np.testing.assert_allclose(found, np.full(len(y), evidence), rtol=1e-12)


def test_win_rate():
    """Ties half (departure 4), per cent, Table 1's interval. Wrong: > for >=, swapped; float32."""
    found = brain.win_rate([1.0, 2.0, 3.0, 4.0], torch.tensor([0.0, 2.0, 9.0, 1.0]))
    assert found == pytest.approx((62.5, 196 * math.sqrt(0.625 * 0.375 / 4)))
    for lost, rate, half_width in ((870, 86.72, 0.82), (314, 95.21, 0.52)):  # Table 1, TL;DR
        found = brain.win_rate(torch.ones(6553), (torch.arange(6553) < lost) * 2.0)
        assert [round(x, 2) for x in found] == [rate, half_width]
    assert brain.win_rate([1 + 1e-9], [1.0])[0] == 100
    for bad in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            brain.win_rate(*bad)


# ------------------------------------------------------------------------------------------
# 2. The methods


def test_weights_of_methods():
    """Pairs are neighbours; argmax takes the better, ties share (departure 6). Wrong: argmin; other
    pairs; the argmax of the reward in place of that of eq. 6; a tie that gives all to one, or 1 to both."""
    zero, r = torch.zeros(6, dtype=DOUBLE), torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, -1.0], dtype=DOUBLE)
    assert set(brain.METHODS) == {run[0] for run in RUNS_BY_HAND}  # what each does, a whole run shows below
    weigh = lambda name, p=zero, q=zero: brain.METHODS[name].alpha_hat(p, q, r).tolist()  # noqa: E731
    assert weigh("dpo-sft") == [0, 1, 0.5, 0.5, 1, 0] == weigh("rso")
    assert weigh("dpo") == [1, 0, 1, 0, 1, 0]  # people chose, whatever the reward says
    log_p, log_q_proposal = random(6, seed=1), torch.tensor([0.0, 5, 0, 1, 0, -9], dtype=DOUBLE)
    assert weigh("dpo-sft", zero, log_q_proposal) == [1, 0, 1, 0, 0, 1] == weigh("dpo-sft", -log_q_proposal)
    score = (log_p - log_q_proposal + r).numpy()
    by_pair = softmax(score.reshape(3, 2)).reshape(-1)
    np.testing.assert_allclose(weigh("dpo-sft+iw", log_p, log_q_proposal), by_pair, rtol=1e-12)
    for name in ("brain", "brain-no-baseline", "dpo-sft+iw+n"):
        np.testing.assert_allclose(weigh(name, log_p, log_q_proposal), softmax(score), rtol=1e-12)


def test_rejection_sampling():
    """With n = 1 the first candidate that a pass accepts is kept; its law by hand. Wrong: always the best;
    exp(g) not relative to the maximum of its pass; a candidate kept twice; torch's own state."""
    g, draws, generator = torch.tensor([0.0, -1.0, -2.0, 1.0, 0.5]) + 100, 4000, brain.seeded(9)
    first = [brain.rejection_sample(g, 1, generator).item() for _ in range(draws)]
    accept = np.exp(g.double().numpy() - 101)
    law = accept * np.cumprod([1, *(1 - accept[:-1])])
    off = np.bincount(first, minlength=5) / draws - law
    assert abs(off).max() < 4 * math.sqrt(0.25 / draws)  # four standard errors
    second = [brain.rejection_sample(torch.tensor([0, -4, -4.5]), 2, generator)[1].item() for _ in range(200)]
    assert second.count(1) > 180  # the best of what is left is sure to be accepted; else 2 in two of five
    again = [brain.rejection_sample(g, 5, brain.seeded(2)).tolist() for _ in range(5)]
    assert again == again[:1] * 5 and sorted(again[0]) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------
# 3. Algorithm 1

LOOP_PROMPTS = [X, X2, *map(torch.tensor, ([5], [6, 2], [4, 4, 4, 1], [2], [1, 6, 3]))]
PAIRED, ARGMAX = ("dpo-sft+iw", "dpo-sft", "rso", "dpo"), ("dpo-sft", "rso", "dpo")
NUMBERS = ("reward", "log_p", "log_q_proposal", "alpha_hat")


def loop_reward(prompt, texts, columns):
    """A reward that depends on all that it is given."""
    liked = [1.5 * y.count("a") - 0.8 * y.count("c") + 0.3 * len(y) * columns["weight"] for y in texts]
    return torch.tensor(liked, dtype=DOUBLE) - 0.1 * len(prompt)


def loop_data():
    """Seven prompts of many lengths, with human pairs and a column for the reward."""
    pairs = [[torch.tensor([1, i % 6 + 1, 0]), torch.tensor([i % 5 + 1, 2, 3, 4])] for i in range(7)]
    more = [dict(prompt="p" * i, gold=None, pair=pairs[i], columns={"weight": i % 3}) for i in range(7)]
    return [brain.Example(row=i, ids=x, **more[i]) for i, x in enumerate(LOOP_PROMPTS)]


def loop_settings(**changes):
    """Settings of a short run, all numbers other than the defaults. D_1 is smaller than a batch."""
    sizes = dict(iterations=2, prompts_per_iteration=3, samples_per_prompt=4, updates_per_iteration=2)
    sizes |= dict(batch_size=5, max_new_tokens=4, seed=5)
    rates = dict(learning_rate=3e-3, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7)
    return brain.Settings(**dict(goodness="bradley-terry") | sizes | rates | changes)


def loop_policy(size=0.05):
    """A policy that is not its prior any more."""
    policy = brain.Policy(tiny(), letters(), outputs_per_forward=3)
    with torch.no_grad():
        for i, p in enumerate(policy.parameters().values()):
            p.add_(random(*p.shape, seed=i, scale=size))
    return policy


class MemoryRun:
    """What surrounds Algorithm 1, in memory: it only takes down what it is told."""

    def __init__(self, settings, share=slice(None)):
        self.k, self.share = settings.updates_per_iteration, share
        self.events, self.samples, self.batches, self.lines = [], [], [], []

    def start(self, policy, optimizer):
        self.events.append("start")

    def collect(self, t, rows, draw):
        drawn = [draw(row) for row in rows]
        self.events.append((t, rows))
        self.samples += drawn
        return drawn

    def steps(self, t):
        return range((t - 1) * self.k + 1, t * self.k + 1)

    def share_of(self, batch):
        self.batches.append([samples.row for samples in batch])
        return batch[self.share]

    def combine(self, policy, lines):
        self.before = [p.detach().clone() for p in policy.parameters().values()]
        return {"lines": lines}

    def after_update(self, policy, optimizer, step, metrics):
        same = map(torch.equal, self.before, policy.parameters().values())
        assert not all(same)  # AdamW's step follows `combine`
        self.events.append(step)
        self.lines.append(metrics["lines"])


def stream_by_hand(*numbers):
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) // 2)


def subset_by_hand(size, count, *numbers):
    return torch.randperm(size, generator=stream_by_hand(*numbers)).tolist()[:count]


def plain_log_probs(model, x, outputs):
    return torch.stack([plain(model, x, y, KNOWN) for y in outputs])


def outputs_by_hand(model, x, n, length, generator):
    """n outputs, token by token, each by a plain forward and the inverse of its distribution function."""
    outputs = []
    for uniform in torch.rand(n, length, dtype=DOUBLE, generator=generator):
        y = []
        while len(y) < length and 0 not in y:
            ids = torch.cat([x, torch.tensor(y, dtype=torch.long)])[None]
            below = model(input_ids=ids).logits[0, -1, :KNOWN].softmax(-1).cumsum(-1)
            y.append(int((below <= uniform[len(y)] * below[-1]).sum()))
        outputs.append(torch.tensor(y))
    return outputs


@torch.no_grad()
def samples_by_hand(model, prior, example, t, s):
    """Lines 6 to 10, by plain forwards and numpy: the fields of Samples."""
    method, x, n, outputs = s.method, example.ids, s.samples_per_prompt, example.pair
    generator = stream_by_hand(s.seed, brain.OUTPUTS, t, example.row)
    proposal = model if method.startswith("brain") and t > 1 else prior
    if method != "dpo":
        outputs = outputs_by_hand(proposal, x, 4 * n if method == "rso" else n, s.max_new_tokens, generator)
    texts = ["".join(" " + chr(96 + i) for i in y.tolist() if i) for y in outputs]
    r = loop_reward(example.prompt, texts, example.columns).numpy()
    log_good = np.log(goodness_by_hand(r, s.goodness, s.beta))
    if method == "rso":
        pool, kept = np.arange(4 * n), []
        while len(kept) < n:
            uniform = torch.rand(len(pool), generator=generator, dtype=DOUBLE).numpy()
            taken = uniform < np.exp(log_good[pool] - log_good[pool].max())
            kept, pool = (kept + pool[taken].tolist())[:n], pool[~taken]
        outputs, texts = ([x[i] for i in kept] for x in (outputs, texts))
        r, log_good = r[kept], log_good[kept]
    log_p, log_q = (plain_log_probs(m, x, outputs).numpy() for m in (prior, proposal))
    score = (log_p - log_q + log_good).reshape(-1, 2 if method in PAIRED else len(outputs))
    alpha = softmax(score)
    if method in ARGMAX:
        best = score == score.max(-1, keepdims=True)
        alpha = np.array([[1.0, 0.0]]) if method == "dpo" else best / best.sum(-1, keepdims=True)
    numbers = dict(zip(NUMBERS, (r, log_p, log_q, alpha.reshape(-1))))
    return dict(iteration=t, row=example.row, prompt_ids=x, outputs=outputs, texts=texts) | numbers


def gradient_by_hand(model, batch, s, share):
    """Leaves eq. 12 or eq. 7, averaged over prompts and pairs, in the model. -> a line for each prompt"""
    total, lines, eq_7 = 0.0, [], s.method == "brain-no-baseline"
    scale = s.beta if s.method in ARGMAX else 1.0
    for samples in batch[share]:
        log_q = plain_log_probs(model, samples["prompt_ids"], samples["outputs"])
        shape = (-1, 2 if s.method in PAIRED else len(log_q))
        q = log_q.detach().numpy().reshape(shape)
        p, proposal, alpha = (samples[name].reshape(shape) for name in NUMBERS[1:])
        beta, tempered = softmax(q - proposal), softmax(scale * (q - proposal))
        force = -alpha if eq_7 else scale * (tempered - alpha)  # minus eq. 7, minus eq. 12
        total = total + (torch.tensor(force.reshape(-1)) * log_q).sum() / len(alpha) / len(batch)
        logs = np.log(np.where(alpha > 0, alpha, 1)) - np.log(tempered)
        line = {"loss": (alpha * (-q if eq_7 else logs)).sum(-1).mean(), "reward": samples["reward"].mean()}
        line |= {"ess_alpha": (1 / (alpha**2).sum(-1)).mean(), "ess_beta": (1 / (beta**2).sum(-1)).mean()}
        line |= {"ended": np.mean([y[-1].item() == 0 for y in samples["outputs"]])}
        line |= {} if s.method in ("rso", "dpo") else {"kl_to_prior": (beta * (q - p)).sum(-1).mean()}
        lines.append(line | {"max_weight": max(alpha.max(), beta.max())})
    model.zero_grad()
    total.backward()
    return lines


def train_by_hand(model, prior, data, s, share):
    """Algorithm 1 with Loshchilov and Hutter's AdamW and a linear schedule. -> (samples, batches, lines)"""
    buffer, batches, lines, moments = [], [], [], {}
    k, b1, b2 = s.updates_per_iteration, s.adam_beta1, s.adam_beta2
    for step in range(1, s.iterations * k + 1):
        if step % k == 1:
            t = step // k + 1
            rows = subset_by_hand(len(data), s.prompts_per_iteration, s.seed, brain.PROMPTS, t)
            buffer += [samples_by_hand(model, prior, data[row], t, s) for row in rows]
        chosen = subset_by_hand(len(buffer), s.batch_size, s.seed, brain.BATCHES, step)
        batches.append([buffer[i]["row"] for i in chosen])
        lines.append(gradient_by_hand(model, [buffer[i] for i in chosen], s, share))
        rate = s.learning_rate * (1 - (step - 1) / (s.iterations * k))
        for name, p in model.named_parameters():
            m, v = moments.get(name, (0.0, 0.0))
            moments[name] = m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
            change = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + 1e-8)
            p.data = p.data * (1 - rate * s.weight_decay) - rate * change
    return buffer, batches, lines


RUNS_BY_HAND = [("brain", "bradley-terry", 1.0), ("brain", "logistic", 2.5), ("rso", "logistic", 0.5)]
RUNS_BY_HAND += [("brain-no-baseline", "logistic", 0.5), ("dpo-sft+iw+n", "logistic", 0.5)]
RUNS_BY_HAND += [("dpo-sft+iw", "bradley-terry", 2.0), ("dpo-sft", "bradley-terry", 2.0)]
RUNS_BY_HAND += [("dpo", "bradley-terry", 0.1)]


@pytest.mark.parametrize("method, goodness, beta", RUNS_BY_HAND)
def test_algorithm_1_by_hand(method, goodness, beta):
    """Two whole rounds again, from sampling to AdamW, by plain forwards and numpy: what is cached, what is
    told of each update, the parameters at the end. The policy starts away from p, so that p, q' and q_theta
    differ; a run with beta 0.5 has a share of each batch, as one of several processes. Wrong: a proposal that
    is never renewed, or renewed for a method with a fixed one; a first round that is not from p; log q' of
    old samples taken anew; D_t emptied; a seed without the round or the row; beta or the goodness ignored; a
    loss summed over prompts or pairs, or divided by --batch-size or by the share; eq. 7 for eq. 12; gradients
    kept between updates; decay in the gradient; Adam's betas swapped; the learning rate of the update before
    or after; a diagnostic of the wrong weights."""
    policy, data, share = loop_policy(), loop_data(), slice(1, None) if beta == 0.5 else slice(None)
    n = 2 if method == "dpo" else 4
    s = loop_settings(method=method, goodness=goodness, beta=beta, samples_per_prompt=n)
    model, prior, run = copy.deepcopy(policy.model), copy.deepcopy(policy.prior_model), MemoryRun(s, share)
    assert brain.train(policy, loop_reward, data, s, run) is policy
    samples, batches, lines = train_by_hand(model, prior, data, s, share)
    for got, expected in zip(run.samples, samples, strict=True):
        got = {field.name: getattr(got, field.name) for field in dataclasses.fields(got)}
        for name in NUMBERS:
            found = got.pop(name)
            assert not found.requires_grad
            np.testing.assert_allclose(found, expected.pop(name), rtol=0, atol=1e-8, err_msg=name)
        for found in (got, expected):
            found["tokens"] = [y.tolist() for y in (found.pop("prompt_ids"), *found.pop("outputs"))]
        assert got == expected
    assert run.batches == batches and [len(batch) for batch in batches] == [3, 3, 5, 5]
    for got, expected in zip(run.lines, lines, strict=True):
        assert got == [pytest.approx(line, rel=1e-7, abs=1e-7) for line in expected]
    for p, by_hand in zip(policy.parameters().values(), model.parameters(), strict=True):
        # Adam divides a gradient that is zero but for rounding by its epsilon, 1e-8.
        torch.testing.assert_close(p.data, by_hand.data, rtol=0, atol=1e-7)
    assert all(map(torch.equal, policy.prior_model.parameters(), prior.parameters()))
    rounds = [(t, subset_by_hand(7, 3, 5, brain.PROMPTS, t)) for t in (1, 2)]
    assert run.events == ["start", rounds[0], 1, 2, rounds[1], 3, 4]


def test_beta_hat_is_one_over_n_until_the_policy_moves():
    """For a drifted policy that is its own proposal, to the last bit. Wrong: other code for log q'."""
    policy, s = loop_policy(), loop_settings()
    samples = brain.collect(policy, loop_reward, loop_data()[4], s, "policy", brain.seeded(1), 3)
    assert torch.equal(policy.log_prob(LOOP_PROMPTS[4], samples.outputs), samples.log_q_proposal)
    assert (samples.log_q_proposal - samples.log_p).abs().max() > 0.1


SCHEDULED = [({}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])]
SCHEDULED += [(dict(lr_scheduler_type="linear", warmup_steps=4), [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])]
SCHEDULED += [(dict(lr_scheduler_type="cosine"), [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)])]


@pytest.mark.parametrize("named, by_hand", SCHEDULED)
def test_learning_rates(named, by_hand):
    """Over all rounds together, to zero at the update after the last. Wrong: a schedule for each round anew;
    one update early or late; no warmup; another default than linear without warmup."""
    s = loop_settings(iterations=2, updates_per_iteration=4, learning_rate=2e-3, **named)
    assert brain.learning_rates(s) == pytest.approx([2e-3 * x for x in by_hand], rel=1e-12)


def test_random_numbers_come_from_their_indices():
    """Same indices, same stream; any other, another. Wrong: one seed for two purposes, indices summed or
    joined, torch's own state used."""
    draw = lambda *numbers: tuple(torch.rand(3, generator=brain.seeded(*numbers)).tolist())  # noqa: E731
    first = draw(3, 1)
    torch.manual_seed(2)
    assert draw(3, 1) == first == tuple(torch.rand(3, generator=stream_by_hand(3, 1)).tolist())
    indices = [(3, 1), (1, 3), (31,), (4,), (3, 1, 1), (3, 2), (13, 1), (1, 31)]
    assert len({draw(*i) for i in indices}) == len(indices)
    purposes = "PROMPTS", "OUTPUTS", "BATCHES", "SPLITS", "EVALUATION", "HELD_OUT"
    assert len({getattr(brain, name) for name in purposes}) == 6


def test_a_random_subset_is_uniform_without_repetition():
    """Wrong: draws with replacement, the first ones, always the same, sorted, more than there are."""
    subsets = np.array([brain.random_subset(6, 3, 8, i) for i in range(1200)])
    assert all(len(set(subset)) == 3 for subset in subsets)
    for column in subsets.T:  # within four and a half standard errors
        share = np.bincount(column, minlength=6) / 1200
        assert len(share) == 6 and abs(share - 1 / 6).max() < 4.5 * math.sqrt(5 / 36 / 1200)
    assert sorted(brain.random_subset(4, 9, 0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["brain", "brain-no-baseline", "dpo-sft"])
def test_held_out_divergence_is_d_n_for_every_method(method):
    """D_KL(alpha_hat || beta_hat) over all n outputs, for the goodness and beta of the run. Wrong: pairs, an
    argmax or no baseline where the method has them; the cached alpha_hat; goodness or beta ignored; p for
    q_theta or for q'; a graph that is built and thrown away."""
    policy, moved, graphs = loop_policy(), loop_policy(0.1), []
    s = loop_settings(method=method, goodness="logistic", beta=0.5)
    samples = brain.collect(policy, loop_reward, loop_data()[6], s, "policy", brain.seeded(6))
    samples.alpha_hat, log_prob = torch.full((4,), math.nan), moved.log_prob
    moved.log_prob = lambda *a, **k: (graphs.append(torch.is_grad_enabled()), log_prob(*a, **k))[1]
    found = brain.held_out_divergence(moved, samples, s)
    x, y, good = samples.prompt_ids, samples.outputs, goodness_by_hand(samples.reward, "logistic", 0.5)
    models = policy.prior_model, policy.model, moved.model
    log_p, log_q_proposal, log_q = (plain_log_probs(model, x, y).detach().numpy() for model in models)
    alpha, beta = softmax(log_p - log_q_proposal + np.log(good)), softmax(log_q - log_q_proposal)
    assert isinstance(found, float) and graphs == [False]
    assert found == pytest.approx((alpha * np.log(alpha / beta)).sum(), rel=1e-9) and found > 0.01


def test_mean_evidence():
    """Means over prompts and their standard errors, for the goodness and beta of the run. Wrong: the two
    bounds exchanged; log p and log q' swapped; ddof 0; a deviation for an error; an error of one prompt."""
    s, data, policy = loop_settings(goodness="logistic", beta=0.5), loop_data(), loop_policy()
    drawn = [brain.collect(policy, loop_reward, data[i], s, "policy", brain.seeded(i)) for i in (1, 4, 6)]
    good = [goodness_by_hand(x.reward, "logistic", 0.5) for x in drawn]
    weights = [(x.log_p - x.log_q_proposal).exp().numpy() * g for x, g in zip(drawn, good)]
    elbos, evidences = [np.log(w).mean() for w in weights], [np.log(w.mean()) for w in weights]
    expected = {}
    for name, values in (("elbo", elbos), ("log_evidence", evidences)):
        error = np.std(values, ddof=1) / math.sqrt(3)
        expected |= {name: np.mean(values), f"{name}_standard_error": error}
    assert brain.mean_evidence(drawn, s) == pytest.approx(expected, rel=1e-9)
    one = {"elbo": elbos[1], "log_evidence": evidences[1]}
    assert brain.mean_evidence(drawn[1:2], s) == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("goodness, beta", [("bradley-terry", 1.0), ("logistic", 0.3)])
def test_training_approaches_the_exact_posterior(goodness, beta):
    """KL(posterior || q_theta) over all outputs falls to a tenth, in a world with every outcome enumerated.
    Wrong: any part of the loop that is consistent with itself but not with the posterior: a sign, weights
    without log p - log q', a stale proposal, another temperature."""
    world = toy_world.World(3, 2, 4, spread=2.0, seed=1)
    model, tokenizer = toy_world.tiny_gpt2(world, seed=1, width=16, layers=1)
    log_p = world.log_probs(model)
    world.fit(log_p)
    target = toy_world.posterior(log_p, np.log(goodness_by_hand(world.reward, goodness, beta)))
    more, ids = dict(gold=None, pair=None, columns={}), map(torch.tensor, world.prompts)
    data = [brain.Example(row=i, prompt=world.text(x.tolist()), ids=x, **more) for i, x in enumerate(ids)]
    sizes = dict(iterations=3, prompts_per_iteration=4, samples_per_prompt=16, updates_per_iteration=20)
    adam = dict(learning_rate=1.5e-2, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, max_new_tokens=2)
    s = loop_settings(**sizes, **adam, goodness=goodness, beta=beta)
    policy = brain.Policy(model, tokenizer)
    reward = lambda x, texts, columns: torch.tensor(world.reward_of([x] * len(texts), texts))  # noqa: E731
    brain.train(policy, reward, data, s, MemoryRun(s))
    distances = [toy_world.kl(target, log).mean() for log in (log_p, world.log_probs(policy.model))]
    assert distances[0] > 0.5 and distances[1] < 0.1 * distances[0], distances


def test_brain_py_stays_small():
    """Part I has at most 220 lines of code, and as many of prose. Lines and functions are short, and the
    whole file does not grow. Wrong: one more feature. A line of code has a token that is neither comment nor
    docstring; a line of prose has words of a comment or docstring; a function counts from def to its end."""
    import ast
    import tokenize

    text = (HERE / "brain.py").read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    strings = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    docstrings = {i for d in strings for i in range(d.lineno, d.end_lineno + 1)}
    lines, code = text.splitlines(), set()
    prose = {i for i in docstrings if re.search(r"\w", lines[i - 1])}
    blank = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            prose |= {token.start[0]} if re.search(r"\w", token.string) else set()
        elif token.type not in blank and token.start[0] not in docstrings:
            code |= set(range(token.start[0], token.end[0] + 1))
    assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []
    functions = [node for node in nodes if isinstance(node, documented[2:])]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 40] == []
    second = next(i for i, line in enumerate(lines, 1) if line == "# Part II: running it")
    method, explained = len([i for i in code if i < second]), len([i for i in prose if i < second])
    assert method <= 220 and explained >= method
    assert len(code) <= 1535


# ------------------------------------------------------------------------------------------
# 4. The policy

POLICY_OTHERS = {
    "hybrid": (transformers.Lfm2Config, LLAMA | dict(layer_types=["conv", "full_attention"])),
    "bert": (transformers.BertConfig, {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}),
    "bart": (transformers.BartConfig, dict(d_model=32, decoder_layers=2, encoder_layers=2)),
}
POLICY_FLAGS = {name: (True, True, True) for name in FAMILIES}  # shares_prompt, keeps_cache, pads_prompts
POLICY_FLAGS |= {"mamba": (False, True, False), "hybrid": (False, True, True), "bart": (True, True, False)}


def any_lm(family, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, (FAMILIES | POLICY_OTHERS)[family])
        return tiny(family, **changes)


def flags_of(policy):
    return policy.shares_prompt, policy.keeps_cache, policy.pads_prompts


def plain_all(model, prompt, outputs):
    return torch.stack([plain(model, prompt, y, KNOWN) for y in outputs])


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", POLICY_FLAGS)
def test_log_prob_and_its_gradients_are_those_of_whole_sequences(family):
    """In chunks too. Wrong: positions or padding shifted, a token left out, dropout, float32 sums, a cache
    changed by its first use or shared by chunks, gradients of the prompt lost."""
    policy = brain.Policy(any_lm(family), letters())
    more = [torch.tensor([0]), torch.tensor([1, 2, 3, 4, 5, 6, 1])]
    outputs = policy.sample(X, 6, 5, generator=brain.seeded(1)) + more
    exact = 1e-12 if family == "gpt2" else 5e-6  # the others have float32 islands in "float64"

    def gradients(log_prob):
        policy.model.zero_grad()
        (log_prob * random(8, seed=5)).sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in policy.model.parameters()]

    for prompt in (X, torch.tensor([5])):
        expected = plain_all(policy.model, prompt, outputs)
        expected_gradients = gradients(expected)
        largest = max(g.abs().max() for g in expected_gradients if g is not None)
        for chunk in (None, 1, 3):
            policy.outputs_per_forward = chunk
            found = policy.log_prob(prompt, outputs)
            close(found, expected, exact)
            for ours, theirs in zip(gradients(found), expected_gradients):
                assert theirs is None or (ours - theirs).abs().max() < 1e-5 * largest
        close(policy.log_prob(prompt, outputs, prior=True), expected.detach(), exact)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "hybrid"])
def test_samples_follow_the_plain_softmax(family, prior):
    """Frequencies of all outcomes against the enumeration, for q_theta and p. Wrong: the checkpoint's top-k
    or other settings, one random number for all tokens, unknown ids, samples of the other one."""
    model = any_lm(family, scale=0.2)
    model.generation_config.update(top_k=2, temperature=0.5, do_sample=True, repetition_penalty=2.0)
    policy = brain.Policy(model, letters(3), outputs_per_forward=700)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.5)
    world, count = toy_world.World(3, 2, 1), 3000
    models = (policy.prior_model, policy.model) if prior else (policy.model, policy.prior_model)
    (chance,), (other,) = (np.exp(world.log_probs(model)) for model in models)
    assert abs(chance - other).sum() > 0.1
    prompt = torch.tensor(world.prompts[0])
    with torch.no_grad():  # p and q_theta of all outcomes, which sum to one
        found = policy.log_prob(prompt, [torch.tensor(y) for y in world.outputs], prior).exp()
    np.testing.assert_allclose(found, chance, rtol=0, atol=1e-6)
    drawn = policy.sample(prompt, count, 2, prior, brain.seeded(3))
    seen = np.bincount([world.index[tuple(y.tolist())] for y in drawn], minlength=len(chance))
    chi_square = ((seen - count * chance) ** 2 / (count * chance)).sum()
    assert chi_square < 40  # 12 degrees of freedom: exceeded once in 10,000 times; the seed is fixed


def word_tokenizer(*ids):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"t{i}": i for i in ids}, "<end>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def test_rare_tokens_of_a_large_vocabulary_keep_their_probability(monkeypatch):
    """Behind a token of 99.95% stand 49,999 of 1e-8. A uniform number inside one's interval draws it. Wrong:
    float32 sums, whose steps near 1 are six rare tokens wide, or float32 uniforms; off by one."""
    count, policy = 50_000, brain.Policy(tiny("gpt2"), letters())
    logits = torch.full((count,), math.log(1e-8), dtype=torch.float32)
    logits[0] = math.log(1 - 1e-8 * (count - 1))
    exact = softmax(logits.double().numpy())
    rare = np.arange(1, count, 997)
    middle = torch.tensor((np.cumsum(exact.astype(np.longdouble))[rare] - exact[rare] / 2).astype(np.float64))
    monkeypatch.setattr(policy, "_scores", lambda given: logits.expand(*given.shape[:-1], count))
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: middle.to(dtype).reshape(shape))
    (drawn,), log_probs = policy.sample_batch([X], len(rare), 1)
    np.testing.assert_array_equal(torch.cat(drawn), rare)
    np.testing.assert_allclose(log_probs[0], np.log(exact[rare]), rtol=1e-6)


def test_ids_without_a_token_have_no_probability():
    """Also in a gap of the vocabulary, for p and q_theta. Wrong: masked in samples alone; the largest id
    taken for the tokenizer's size; an added token taken for an unknown id."""
    tokenizer = letters()
    tokenizer.add_tokens(["<|im_end|>"])
    assert brain.Policy(tiny("gptj"), tokenizer).log_prob(X, [torch.tensor([7, 0])]).isfinite()
    policy = brain.Policy(tiny("gptj"), word_tokenizer(1, 2, 9))
    for prior in (False, True):
        assert policy.log_prob(X, [torch.tensor([8, 0])], prior).item() == -math.inf
        assert set(torch.cat(policy.sample(X, 50, 8, prior, brain.seeded(1))).tolist()) == {0, 1, 2, 9}
        expected = policy.model(X[None]).logits[0, -1, [0, 1, 2, 9]].log_softmax(-1)[3]
        close(policy.log_prob(X, [torch.tensor([9])], prior)[0].detach(), expected.detach(), 5e-6)
    for start in range(10):  # nor has greedy decoding, which takes the most likely token
        logits = policy.model(torch.tensor([[start]])).logits[0, -1, [0, 1, 2, 9]]
        assert policy.sample(torch.tensor([start]), 1, 1, greedy=True)[0][0] == [0, 1, 2, 9][logits.argmax()]


def test_every_end_token_ends():
    """The end tokens are those of the tokenizer and of the generation config. Wrong: one of them alone."""
    model = tiny("llama", scale=0.1)
    model.generation_config.eos_token_id = [3, 5]
    policy = brain.Policy(model, letters())
    outputs = policy.sample(X, 200, 8, generator=brain.seeded(1))
    for y in outputs:
        assert not set(y[:-1].tolist()) & {0, 3, 5}
        assert policy.ended(y) == (int(y[-1]) in (0, 3, 5)) and (policy.ended(y) or len(y) == 8)
    assert {int(y[-1]) for y in outputs} >= {0, 3, 5}


@pytest.mark.parametrize("family", POLICY_FLAGS)
def test_a_prompt_in_a_batch_is_the_prompt_alone(family):
    """The check finds what a family can do. Draws and sums are those of the prompt alone. Wrong: positions
    that count padding, no mask, draws that depend on the batch, rows of a cache mixed up."""
    policy = brain.Policy(any_lm(family, dtype=torch.float32, scale=0.2), letters(), outputs_per_forward=5)
    assert flags_of(policy) == POLICY_FLAGS[family]
    prompts = [X, X2, torch.tensor([5])] if policy.pads_prompts else [X, X.flip(0) - 1, X + 1]
    outputs, sums = policy.sample_batch(prompts, 4, 5, generators=[brain.seeded(7, i) for i in range(3)])
    assert sums.shape == (3, 4) and len({len(y) for ys in outputs for y in ys}) > 1
    for i, (prompt, ys, own) in enumerate(zip(prompts, outputs, sums)):
        alone = policy.sample(prompt, 4, 5, generator=brain.seeded(7, i))
        assert all(torch.equal(a, b) for a, b in zip(alone, ys, strict=True))
        close(own, plain_all(policy.model, prompt, ys).detach(), 2e-4)  # float32


@pytest.mark.parametrize("fault", ["cache misread", "cache of an odd kind", "padding misread"])
def test_a_faulty_model_is_found_and_used_as_far_as_it_works(fault, capsys):
    """The check finds the fault and says so; log_prob and samples are right all the same. Wrong: a flag that
    nothing looks at, flags mixed up, an exception let through."""
    kind, pads = transformers.GPT2LMHeadModel, fault != "padding misread"

    @functools.wraps(kind.forward)
    def forward(self, attention_mask=None, position_ids=None, **given):
        read = dict(attention_mask=attention_mask, position_ids=position_ids) if pads else {}
        output = kind.forward(self, **read, **given)
        if fault == "cache misread" and given.get("past_key_values") is not None:
            output.logits = output.logits * 1.2
        if fault == "cache of an odd kind" and output.past_key_values is not None:
            kinds = transformers.DynamicCache, {"reorder_cache": None}
            output.past_key_values.__class__ = type("Odd", kinds[:1], kinds[1])
        return output

    model = tiny("gpt2")
    model.__class__ = type("Faulty", (kind,), {"forward": forward})
    policy, right = brain.Policy(model, letters()), tiny("gpt2").eval()
    told = capsys.readouterr().err
    assert flags_of(policy) == (not pads, not pads, pads)
    assert told.count("Faulty") == told.count("\n") == 1
    assert ("cache" in told, "padded" in told) == (pads, not pads)
    outputs, sums = policy.sample_batch([X, X + 1], 4, 5, generators=[brain.seeded(1), brain.seeded(2)])
    for prompt, ys, own in zip((X, X + 1), outputs, sums):
        expected = plain_all(right, prompt, ys).detach()
        close(policy.log_prob(prompt, ys).detach(), expected)
        close(own, expected)


def test_a_model_that_cannot_be_a_policy_is_refused():
    """Not causal; an id not embedded; an adapter on tied embeddings, which cannot be merged; nan. Wrong:
    numbers that mean nothing, >= for >, a prior that is not the model given."""
    brain.Policy(tiny("gpt2", vocab=7), letters(6))
    for model, size, told in ((any_lm("bert"), 6, "BertLMHeadModel is not causal"),
                              (tiny("gpt2", vocab=7), 7, "the tokenizer has ids up to 7, the model embeds 7"),
                              (with_adapter("embedding"), 6, ".*tied.*--lora-rank")):  # fmt: skip
        with pytest.raises(brain.UserError, match=f"--model: {told}"):
            brain.Policy(model, letters(size))
    policy = brain.Policy(tiny("gpt2"), letters())
    policy.model.transformer.ln_f.weight.data.fill_(math.nan)
    policy.sample(X, 2, 3, prior=True)
    with pytest.raises(brain.UserError, match="nan.*--learning-rate"):
        policy.sample(X, 2, 3)


def test_the_prompt_is_computed_once_and_memory_does_not_grow_with_n():
    """The prompt once, the outputs in chunks, and in the backward again. Wrong:
    the prompt n times, all activations kept until the backward."""
    policy = brain.Policy(tiny("gpt2"), letters())
    outputs = policy.sample(X, 7, 5, generator=brain.seeded(1)) + [torch.tensor([1, 2, 3, 4, 0])]
    shapes, saved = [], []
    note = lambda _, __, given: shapes.append(tuple(given["input_ids"].shape))  # noqa: E731
    policy.model.register_forward_pre_hook(note, with_kwargs=True)
    keep = lambda x: saved.append(x.dim() >= 3 and len(x) == 2) or x  # noqa: E731
    policy.log_prob(X, outputs)
    assert shapes == [(1, 6), (8, 5)]
    shapes.clear()
    policy.outputs_per_forward = 2
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        log_q = policy.log_prob(X, outputs)
    assert [shape[0] for shape in shapes] == [1, 2, 2, 2, 2] and saved and not any(saved)
    log_q.sum().backward()
    assert [shape[0] for shape in shapes[5:]] == [2] * 4


ADAPTERS = {
    "plain": dict(target_modules=["c_attn"]),
    "merged": dict(target_modules=["c_attn"]),
    "embedding": dict(target_modules=["wte", "c_attn"]),
    "saved modules": dict(modules_to_save=["ln_f"]),
    "rank-stabilised DoRA with dropout": dict(use_rslora=True, use_dora=True, lora_dropout=0.5),
}


def with_adapter(kind, base=None, task="CAUSAL_LM", **settings):
    """A model with an adapter, whose weights have been moved unless it has a start of its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=8, task_type=task, **ADAPTERS.get(kind, {}) | settings)
    model = get_peft_model(tiny("gpt2") if base is None else base, config)
    for i, p in enumerate(model.parameters()):
        if p.requires_grad and "init_lora_weights" not in settings:
            p.data.add_(random(*p.shape, seed=i, scale=0.3))
    return model


@pytest.mark.parametrize("kind", ["all weights", "lora", *ADAPTERS])
def test_the_prior_is_the_model_before_training(kind):
    """q_theta = p at step 0, and p stays. Wrong: p trained or without its adapter; an adapter half copied."""
    model = tiny("gpt2") if kind in ("all weights", "lora") else with_adapter(kind)
    fresh, whole = copy.deepcopy(model).eval(), kind in ("all weights", "merged")
    policy = brain.Policy(model, letters(), lora_rank=0 if whole else 2, lora_alpha=8)
    (outputs,), sums = policy.sample_batch([X], 4, 5, prior=True, generators=[brain.seeded(1)])
    before = plain_all(fresh, X, outputs).detach()
    log_q, log_p = policy.log_prob(X, outputs), policy.log_prob(X, outputs, prior=True)
    assert log_q.requires_grad and not log_p.requires_grad
    for found in (log_q.detach(), log_p, sums[0]):
        close(found, before)
    trained, part = policy.parameters().keys(), "" if whole else "lora" if kind == "lora" else "policy"
    assert trained and all(part in name for name in trained)
    assert not whole or trained == dict(tiny("gpt2").named_parameters()).keys()
    optimizer = torch.optim.SGD(policy.parameters().values(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        policy.log_prob(X, outputs)[0].backward()
        optimizer.step()
    close(policy.log_prob(X, outputs, prior=True), before)
    expected = policy.log_prob(X, outputs).detach()
    assert policy.parameters().keys() == trained and (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_refused(start):
    """A second one would change it again. Merged it is accepted. Wrong: a prior that is not the model
    given."""
    settings = dict(init_lora_weights=start, target_modules=["q_proj"])
    right = tiny("llama", dtype=torch.float32)
    adapted, again = (with_adapter(None, copy.deepcopy(right), **settings) for _ in range(2))
    with pytest.raises(brain.UserError, match="--model: its adapter changes LlamaForCausalLM .*PiSSA"):
        brain.Policy(adapted, letters(), lora_rank=2)
    close(brain.Policy(again, letters()).log_prob(X, [X2]), plain_all(right.eval(), X, [X2]), 1e-3)


def byte_pairs(*merges, specials=("<end>",), begins=False, ends=False):
    """A byte-level BPE tokenizer as GPT-2's, with merges of one's own; it may add a first and a last
    token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(models.BPE(vocab, list(merges)))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    single = "<begin> " * begins + "$A" + " <end>" * ends
    pairs = [(token, vocab[token]) for token in specials]
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    names = {"eos_token": "<end>"} | ({"bos_token": "<begin>"} if "<begin>" in specials else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


JOINING = (("a", "b"), ("b", "b"))  # "ca" and "bc" are c, a and b, c; "cabc" is c, ab, c
BOTH = ("<end>", "<begin>")


def test_the_text_of_an_output_is_what_it_adds():
    """As SentencePiece has spaces. Wrong: the output decoded alone, an end token as text, a cut shortened."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {token: i for i, token in enumerate(["<end>", "▁a", "▁b", "b", "▁", "a", "c"])}
    words = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")]))
    words.decoder = decoders.Metaspace("▁", "always")
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    policy = brain.Policy(tiny("gpt2"), words)
    assert words.decode([2]) == "b"
    for output, text in (([2, 0], " b"), ([3, 6, 0], "bc"), ([2, 1], " b a"), ([0], ""), ([4, 4, 0], "  ")):
        assert policy.text(torch.tensor([1, 2, 6]), torch.tensor(output)) == text


# ------------------------------------------------------------------------------------------
# 5. Rewards

HYBRID = dict(num_hidden_layers=4, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
              linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip
CLASSIFIERS = FAMILIES | POLICY_OTHERS | {"hybrid": (transformers.Qwen3_5TextConfig, LLAMA | HYBRID)}
PROMPT, OUTPUTS = "cca", ["bc", "b", "", "bbbbbbbbb", "ccab", "bc"]  # the last is there twice


def randomize(model):
    for i, p in enumerate(model.parameters()):
        p.data.copy_(random(*p.shape, seed=i, scale=0.3))
    return model.requires_grad_(False).eval()


def classifier(family, tokenizer, labels=1, **changes):
    kind, sizes = CLASSIFIERS[family]
    changes = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0) | changes
    config = kind(**sizes | changes, vocab_size=len(tokenizer), num_labels=labels)
    return randomize(AutoModelForSequenceClassification.from_config(config).double())


def scores_of(model, tokenizer, texts):
    """(texts, labels): the head at the last token of each text, by plain forwards."""
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        found = [model.base_model(input_ids=x, use_cache=False).last_hidden_state[0, -1] for x in ids]
        found = torch.stack(found) @ model.score.weight.T
    assert found.std() > 1e-2  # a thousand times the tolerance
    return found.numpy()


def equal_rewards(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, np.ravel(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("begins, ends", itertools.product([False, True], repeat=2))
def test_texts_get_one_beginning_and_no_end(begins, ends):
    """Wrong: a second beginning behind a chat template's, one that the tokenizer does not put, an end
    token."""
    tokenizer = byte_pairs(specials=BOTH, begins=begins, ends=ends)
    (a, b), first = tokenizer.convert_tokens_to_ids(["a", "b"]), [1] * begins
    found = brain.encode(tokenizer, ["ab", "<begin>ab", "", "b<end>"])
    assert found == [first + [a, b], [1, a, b], first, first + [b, 0]]
    assert brain.encode(letters(), [" a b"]) == [[1, 2]]  # no beginning token known at all


@pytest.mark.parametrize("template", ["{prompt}{output}", "<begin>{output}", "{prompt}, {output}<end>"])
@pytest.mark.parametrize("family", [name for name in POLICY_FLAGS if name not in ("mamba", "bart")])
def test_a_reward_is_the_head_at_the_last_token_of_the_whole_text(family, template):
    """Wrong: the pooling of the model class (it skips an end token where pad = eos), texts tokenized in
    parts, padding read as the last token, a shared cache that an output has changed."""
    tokenizer = byte_pairs(*JOINING, specials=BOTH)
    tokenizer.pad_token = tokenizer.eos_token
    given = None if template == "{prompt}{output}" else template
    reward = brain.RewardModel(classifier(family, tokenizer).train(), tokenizer, given)
    texts = [template.replace("{prompt}", PROMPT).replace("{output}", output) for output in OUTPUTS]
    expected, found = scores_of(reward.model, tokenizer, texts), reward(PROMPT, OUTPUTS)
    equal_rewards(found, expected)  # float32 out, and islands of it in some models
    equal_rewards([reward(PROMPT, [output]).item() for output in OUTPUTS], expected)


def test_with_several_labels_a_reward_is_the_log_odds_of_one():
    """Eq. 15, of a label by name or index, or of the second of two. Wrong: the logit alone, another label."""
    tokenizer = byte_pairs(*JOINING)
    model = classifier("llama", tokenizer, labels=3)
    chance = softmax(scores_of(model, tokenizer, [PROMPT + output for output in OUTPUTS]))
    for label in range(3):
        found = brain.RewardModel(model, tokenizer, label=label)(PROMPT, OUTPUTS)
        equal_rewards(found, np.log(chance[:, label] / (1 - chance[:, label])))
    cases = ("r", None, None), ("ab", None, 1), ("abc", "a", 0), ("abc", "2", 2), ("10", "1", 0)
    wrong = ("r", "r"), ("abc", None), ("ab", "2"), ("ab", "d")
    named = lambda names: transformers.LlamaConfig(id2label=dict(enumerate(names)))  # noqa: E731
    assert all(brain.label_index(named(names), label) == index for names, label, index in cases)
    for names, label in wrong:
        with pytest.raises(brain.UserError, match=f"--reward-label {label}: "):
            brain.label_index(named(names), label)


def test_a_classifier_that_reads_batches_wrongly_scores_one_by_one(capsys):
    """Wrong: rewards that depend on the texts beside; an exception of the model let through."""
    tokenizer = byte_pairs(*JOINING)
    model = classifier("gpt2", tokenizer)
    expected = scores_of(model, tokenizer, [PROMPT + output for output in OUTPUTS])
    for faulty in (False, True):
        reward = brain.RewardModel(model, tokenizer)
        equal_rewards(reward(PROMPT, OUTPUTS), expected)
        assert ("GPT2ForSequenceClassification reads batches wrongly" in capsys.readouterr().err) == faulty

        def mix(_, __, output):
            if len(output.last_hidden_state) > 1:
                output.last_hidden_state = output.last_hidden_state.flip(0)

        model.base_model.register_forward_hook(mix)


def save(place, model, tokenizer=None):
    for part in filter(None, (model, tokenizer)):
        part.save_pretrained(place)
    return str(place)


def test_an_encoder_is_a_reward_model_up_to_its_context(tmp_path):
    """As its class reads a text. Wrong: padding attended to, special tokens left out, >= for >, texts cut."""
    tokenizer = byte_pairs(specials=BOTH, begins=True, ends=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = classifier("bert", tokenizer, hidden_dropout_prob=0.5, max_position_embeddings=13)
    name, template = save(tmp_path, model, tokenizer), "{prompt}<end>{output}"
    reward = brain.RewardModel.from_pretrained(name, template=template, dtype=DOUBLE)
    outputs = ["a", "bcdefgh", "", "gg"]
    batch = [tokenizer("abc<end>" + output, return_tensors="pt") for output in outputs]
    equal_rewards(reward("abc", outputs), [model(**text).logits.item() for text in batch], 1e-6)
    assert reward("abc", outputs).std() > 0.005
    with pytest.raises(brain.UserError, match="--reward-model: 14 tokens .* 13$"):
        reward("abc", ["bcdefghh", ""])


def test_the_context_of_a_model():
    """Wrong: xlnet's -1, RoBERTa's padding, a length where frequencies change."""
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32)
    llama = transformers.LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    roberta = transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    configs = llama, roberta, transformers.BloomConfig(), transformers.XLNetConfig()
    assert [brain.context_of(config) for config in configs] == [32, 512, math.inf, math.inf]


def test_a_reward_model_that_cannot_score_is_refused(tmp_path):
    """Wrong: nan as a reward; a text without tokens; ids not embedded; an encoder-decoder; a random head."""
    tokenizer = byte_pairs()
    model = classifier("gpt2", tokenizer)
    naked, causal = save(tmp_path / "naked", model), save(tmp_path / "lm", tiny("gpt2", vocab=257), tokenizer)
    for name, told in ((f"{causal}/no", "no such"), (causal, "score.weight"), (naked, "has no tokenizer")):
        with pytest.raises(brain.UserError, match=f"--reward-model {name}: .*{told}"):
            brain.RewardModel.from_pretrained(name)
    reward = brain.RewardModel(model, tokenizer)
    with pytest.raises(brain.UserError, match="--reward-template: .*without tokens"):
        reward("", ["b", ""])
    for value in (math.nan, math.inf, -math.inf):
        reward.head = lambda hidden: torch.full((len(hidden), 1), value)
        with pytest.raises(brain.UserError, match="--reward-model.*nan or inf.*--dtype"):
            reward("a", ["b"])
    with pytest.raises(brain.UserError, match="--reward-model: .*encoder-decoder"):
        brain.RewardModel(classifier("bart", tokenizer), tokenizer)
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(brain.UserError, match="--reward-model: .*ids up to 257, the model embeds 257"):
        brain.RewardModel(model, tokenizer)


CHAT = (
    "<begin>{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "ca"}]
PREFILL = [*MESSAGES, {"role": "assistant", "content": "ca"}]


@pytest.mark.parametrize("template", [None, "{prompt}|{output}<end>"])
def test_messages_go_through_a_chat_template(template):
    """The reward model's; with a text template, the policy's. Wrong: the other tokenizer, a second beginning,
    messages changed, a prefill closed, tools left out, an exception of the template."""
    tokenizer, other = (byte_pairs(*JOINING, specials=BOTH, begins=True) for _ in range(2))
    with pytest.raises(brain.UserError, match="--flag: has no chat template"):
        brain.chat(tokenizer, MESSAGES, "--flag")
    tokenizer.chat_template, other.chat_template = CHAT, CHAT.replace("{{ m.role[0] }}:", "#")
    with pytest.raises(brain.UserError, match="--flag: its chat template refuses .*no tools here"):
        brain.chat(tokenizer, [{"role": "tool", "content": "x"}], "--flag")
    if template:
        tokenizer, other = other, tokenizer
    reward = brain.RewardModel(classifier("llama", tokenizer), tokenizer, template, policy_tokenizer=other)
    given, tools = copy.deepcopy([MESSAGES, PREFILL]), [{"type": "function", "function": {"name": "f"}}]
    for messages, prefill in zip(given, ("", "ca")):
        start = f"<begin>[f]s:be<end>u:ca<end>a:{prefill}" + "|" * bool(template)
        expected = scores_of(reward.model, tokenizer, [f"{start}{output}<end>" for output in OUTPUTS])
        equal_rewards(reward(messages, OUTPUTS, {"tools": tools}), expected)
    assert given == [MESSAGES, PREFILL]


@pytest.mark.parametrize("labels", [1, 3])
def test_an_adapter_is_a_reward_model(tmp_path, labels):
    """The head is its own, the tokenizer the policy's. Wrong: a random head, no adapter, one label of
    three."""
    tokenizer, names = byte_pairs(*JOINING), dict(enumerate("abc"[:labels]))
    base = classifier("llama", tokenizer, labels, id2label=names)
    base = type(base).from_pretrained(save(tmp_path / "base", base), dtype=DOUBLE)
    model = with_adapter(None, base, "SEQ_CLS", target_modules=["q_proj"])
    name, words = save(tmp_path / "adapter", model), save(tmp_path / "words", tokenizer)
    given = type(tokenizer).from_pretrained(words)
    scores = scores_of(model.merge_and_unload().eval(), tokenizer, [PROMPT + output for output in OUTPUTS])
    label, expected = (None, scores) if labels == 1 else ("b", scores[:, 1] - np.logaddexp(*scores[:, ::2].T))
    reward = brain.RewardModel.from_pretrained(name, tokenizer=given, dtype=DOUBLE, label=label)
    equal_rewards(reward(PROMPT, OUTPUTS), expected)


@pytest.fixture
def bare(tmp_path):
    """(a classifier, its weights as the paper's reward models have them, a base directory, the tokenizer)"""
    tokenizer = byte_pairs(*JOINING, specials=BOTH)
    model = classifier("gptj", tokenizer)
    model.load_state_dict({name: w.half() for name, w in model.state_dict().items()})
    weights = {name.replace("score.", "v_head."): w.half() for name, w in model.state_dict().items()}
    weights["transformer.h.1.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    weights["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e9).half()
    config = transformers.GPTJConfig(**GPT, rotary_dim=4, vocab_size=len(tokenizer), num_labels=2)
    return model, weights, save(tmp_path / "base", config, tokenizer), tokenizer


@pytest.mark.parametrize("file", ["bare/pytorch_model.bin", "bare/hf_ckpt.pt", "bare/rm.pt"])
def test_a_bare_checkpoint_scores_as_the_class_it_was_trained_with(bare, tmp_path, file):
    """Half precision, `v_head`, old buffers. Wrong: a random head, half precision kept, the base's labels."""
    trained, weights, base, tokenizer = bare
    (tmp_path / "bare").mkdir()
    torch.save(weights, tmp_path / file)
    place, template = str(tmp_path / (file if "rm" in file else "bare")), "<begin>{prompt}{output}<end>"
    with pytest.raises(brain.UserError, match="--reward-model .*has no config.*--reward-base"):
        brain.RewardModel.from_pretrained(place)
    expected = scores_of(trained, tokenizer, [f"<begin>{PROMPT}{output}<end>" for output in OUTPUTS])
    given = type(tokenizer).from_pretrained(save(tmp_path / "words", tokenizer))
    for settings, dtype, atol in (({}, torch.float32, 2e-4), (dict(dtype=DOUBLE), DOUBLE, 1e-6)):
        reward = brain.RewardModel.from_pretrained(place, base, template, given, **settings)
        assert {p.dtype for p in reward.model.parameters()} == {dtype}
        equal_rewards(reward(PROMPT, OUTPUTS), expected, atol)
        for part in Path(base).glob("tokenizer*"):
            part.unlink()  # the second time the base has no tokenizer: the policy's is used


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("name, weight, told", [
    ("v_head.weight", None, "score.weight"), ("v_head.bias", torch.zeros(1), "score.bias"),
    ("transformer.h.1.ln_1.weight", None, "h.1.ln_1.weight"), ("v_head.weight", Code(), "holds code"),
    ("transformer.h.2.ln_1.weight", torch.ones(32), "h.2.ln_1.weight"),
    ("transformer.wte.weight", torch.zeros(300, 32), "wte.weight"),
    ("v_head.weight", torch.zeros(2, 32), "score.weight"),
])  # fmt: skip
def test_a_bare_checkpoint_that_does_not_fit_is_refused(bare, tmp_path, capsys, name, weight, told):
    """Wrong: what is missing or of another size is random, what is left over is dropped, code runs."""
    _, weights, base, _ = bare
    weights.pop(name, None)
    torch.save(weights | ({} if weight is None else {name: weight}), tmp_path / "rm.pt")
    with pytest.raises(brain.UserError, match=f"--reward-model .*{told}"):
        brain.RewardModel.from_pretrained(str(tmp_path / "rm.pt"), base)
    assert "code ran" not in capsys.readouterr().out


def test_a_reward_function_is_called_as_trl_calls_it():
    """Wrong: columns once, columns that it does not take, a column as the prompts, messages as text,
    float32."""
    calls = []
    greedy = brain.RewardFunction(lambda **given: calls.append(given) or [0.0, 0.0], "f")
    modest = brain.RewardFunction(lambda completions, label: calls.append((label)) or (1, 2), "f")
    columns = {"label": "g", "source": 7, "completions": "of the data", "prompts": "of the data"}
    greedy("p", ["x", "y"], columns)
    twice = {"completions": ["x", "y"], "label": ["g", "g"]}
    assert calls.pop() == twice | {"prompts": ["p", "p"], "source": [7, 7]}
    assert modest("p", ["x", "y"], columns).tolist() == [1, 2] and calls.pop() == ["g", "g"]
    greedy(MESSAGES, ["x", "y"])
    replies = [[{"role": "assistant", "content": text}] for text in "xy"]
    assert calls.pop() == {"prompts": [MESSAGES, MESSAGES], "completions": replies}
    for kind in (list, tuple, np.array, iter, lambda x: torch.tensor(x, dtype=DOUBLE)):
        found = brain.RewardFunction(lambda prompts: kind([1 + 1e-12, -2.0]), "f")("p", ["x", "y"])
        assert found.dtype == DOUBLE and found.tolist() == [1 + 1e-12, -2.0]


RETURNS = [[1.0, 2.0], [1.0] * 4, [], [1.0, math.nan, 0.0], [1.0, math.inf, 0.0], None, 1.0, "abc"]
RETURNS += [[1.0, None, 2.0], [[1.0, 2.0, 3.0]], [[1.0], [2.0], [3.0]]]


@pytest.mark.parametrize("returned", RETURNS, ids=repr)
def test_a_reward_function_that_returns_something_else_is_refused(returned):
    """Wrong: nan as a reward, broadcasting, one number for all."""
    told = f"f.py:f: must return 3 finite numbers, one per completion; it returned {returned!r}"
    with pytest.raises(brain.UserError, match=re.escape(told)):
        brain.RewardFunction(lambda completions: returned, "f.py:f")("the prompt", ["x", "y", "z"])


def test_a_reward_function_comes_from_a_file(tmp_path):
    """And may import from beside it. Wrong: the first colon; a name that is no function."""
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "beside_the_reward.py").write_text("number = 3")
    file = tmp_path / "a:b" / "f.py"
    file.write_text("from beside_the_reward import number\ndef good(completions): return [number] * 2")
    assert brain.RewardFunction.from_file(f"{file}:good")("p", ["x", "yy"]).tolist() == [3, 3]
    for spec, told in ((f"{file}:number", "no function"), (f"{file}", "no such"), (f"{file}x:f", "no such")):
        with pytest.raises(brain.UserError, match=f"--reward-function {re.escape(spec)}: .*{told}"):
            brain.RewardFunction.from_file(spec)


# ------------------------------------------------------------------------------------------
# 6. Prompts

DATA = [{"prompt": f"q{i}:", "label": f" a{i}", "number": i} for i in range(5)]
TALK = [{"role": "system", "content": "be"}, {"role": "user", "content": "ca"}]
TALK_TEMPLATE = "<begin>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}"
TALK_TEMPLATE += "{% if add_generation_prompt %}a:{% endif %}"
MERGES = (("a", "b"), ("b", "b"))  # "ca" and "bc" are c, a and b, c; "cabc" is c, ab, c


def reply(text):
    return [{"role": "assistant", "content": text}]


def dataset_of(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def three_splits(rows):
    return {name: dataset_of(rows) for name in ("train", "validation", "test")}


def write_rows(path, rows=DATA):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_settings(method="brain", **changes):
    """Settings as `load_data` reads them; lengths as `plan` settles them."""
    s = brain.parse(["--model", "m", "--dataset", "d", "--reward-model", "r", "--method", method])
    return dataclasses.replace(s, **{"max_prompt_tokens": 50, "max_new_tokens": 8} | changes)


def bpe_tokenizer(*merges, begins=False):
    """A byte-level BPE tokenizer as GPT-2's, with merges of one's own, and perhaps a token before each
    text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<end>", "<begin>"] if begins else ["<end>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(models.BPE(vocab, list(merges)))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    ids = [(token, vocab[token]) for token in specials]
    words.post_processor = processors.TemplateProcessing("<begin> " * begins + "$A", special_tokens=ids)
    names = dict.fromkeys(["bos_token"] * begins, "<begin>") | {"eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def prompts_of(rows, tokenizer=None, split="train", **changes):
    rows = brain.with_prompts(dataset_of(rows), f"--dataset d: split {split}")
    return brain.Prompts(rows, tokenizer or bpe_tokenizer(*MERGES), data_settings(**changes), split)


@pytest.fixture
def small_hub(monkeypatch, tmp_path):
    """What was asked of the small_hub: all of it is answered with the directory "snapshot"."""
    import datasets
    import huggingface_hub

    asked = []
    answer = lambda *a, **k: asked.append((a, k)) or str(tmp_path / "snapshot")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return asked


def test_a_prompt_too_long_is_left_out_and_counted():
    """A prompt of --max-prompt-tokens stays. Wrong: < for <=; characters counted; a prompt cut; rows that
    shift; a prompt among the columns; rows beyond the first thousand not looked at."""
    rows = [{"prompt": "c" * size, "label": str(size), "number": size} for size in (3, 5, 4, 9, 1, 4)]
    prompts = prompts_of(rows, max_prompt_tokens=4)
    assert len(prompts) == 4 and [prompts.length(i) for i in range(4)] == [3, 4, 1, 4]
    for example, (row, size) in zip(prompts, [(0, 3), (2, 4), (4, 1), (5, 4)], strict=True):
        assert (example.row, example.prompt, example.gold) == (row, "c" * size, f" {size}")
        assert example.columns == {"label": str(size), "number": size} and example.pair is None
    assert prompts.summary == "train: 4 prompts, 2 left out (longer than 4 tokens, or empty)"
    assert prompts_of(rows, max_prompt_tokens=9).summary == "train: 6 prompts"
    joined = [{"prompt": "cab"}, {"prompt": "cbabb"}]  # c, ab and c, b, ab, b
    assert len(prompts_of(joined, max_prompt_tokens=2)) == 1
    for tokenizer, most in ((None, 0), (bpe_tokenizer(begins=True), 1)):  # the beginning token counts
        with pytest.raises(brain.UserError, match="d: split test: every prompt .*--max-prompt-tokens"):
            prompts_of(rows, tokenizer, "test", max_prompt_tokens=most)
    many = [{"prompt": "c" * (1 + (i == 1500))} for i in range(1501)]
    assert len(prompts_of(many, max_prompt_tokens=1)) == 1500


def test_pairs_without_a_prompt_are_split():
    """The prompt is what both have in common, up to the last cue. Wrong: up to a cue within one answer; up to
    the last common letter; the cue on the answer's side; an error for messages."""
    talk = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"
    texts = {"prompt": talk, "chosen": " ab", "rejected": " ac\n\nAssistant: z"}
    messages = {"prompt": TALK, "chosen": reply("ab"), "rejected": reply("ac")}
    for expected in (texts, messages):
        row = {name: expected["prompt"] + expected[name] for name in ("chosen", "rejected")}
        assert list(brain.with_prompts(dataset_of([row]), "d")) == [expected] == [brain.split_pair(row)]
    for row, told in (({"chosen": "a", "rejected": "b"}, "row 1: prompt"), ({"q": "x"}, "no column prompt")):
        with pytest.raises(brain.UserError, match=told):
            brain.with_prompts(dataset_of([row]), "d")


def held_out(capsys, method="brain", seed=0, **splits):
    splits = {name: rows and dataset_of(rows) for name, rows in splits.items()}
    splits = dict.fromkeys(("train", "validation", "test")) | splits
    prompts = brain.load_data(data_settings(method, seed=seed), bpe_tokenizer(), splits)
    return [[example.columns["number"] for example in some] for some in prompts], capsys.readouterr().out


@pytest.mark.parametrize("method", ["brain", "dpo"])
def test_missing_splits_are_held_out_of_train(method, capsys):
    """A tenth, rounded up, at most 1000; disjoint; the same for every --seed; said. Wrong: rows in two
    splits; the first rows; other rows with another seed; a split taken from test."""
    rows = [{"prompt": f"q{i}", "chosen": "b", "rejected": "c", "number": i} for i in range(35)]
    (train, validation, test), told = held_out(capsys, method, train=rows)
    assert [len(train), len(validation), len(test)] == [27, 4, 4]
    assert sorted(train + validation + test) == list(range(35))
    assert validation not in ([*range(4)], [*range(31, 35)], [*range(27, 31)])  # not the first or last
    assert "validation: not in the data; 4 rows of train are held out" in told and "test: not" in told
    assert held_out(capsys, method, 5, train=rows)[0] == [train, validation, test]
    (train, validation, test), told = held_out(capsys, method, train=rows[:30], test=rows[30:])
    assert sorted(train + validation) == [*range(30)] and len(validation) == 3 and test == [*range(30, 35)]
    assert "test: not" not in told
    found, told = held_out(capsys, method, train=rows[:3], validation=rows[3:5], test=rows[5:])
    assert found == [[0, 1, 2], [3, 4], list(range(5, 35))] and "held out" not in told
    with pytest.raises(brain.UserError, match="--dataset d: too few rows"):
        held_out(capsys, method, train=rows[:1], test=rows[1:])
    if method == "brain":
        large = held_out(capsys, train=[{"prompt": "q", "number": 0}] * 10_020, test=rows[:1])[0]
        assert list(map(len, large)) == [9020, 1000, 1]


def test_pairs_are_answers_as_the_policy_would_have_written_them():
    """What follows the prompt, then the end token, cut like an output; chosen first. Wrong: rejected first;
    no end token, or one behind a cut answer; the prompt's ids among the answer's; a token over the
    boundary."""
    tokenizer = bpe_tokenizer(*MERGES, begins=True)

    def pair_of(row, tokenizer=tokenizer, method="dpo", **changes):
        (example,) = prompts_of([row], tokenizer, method=method, **changes)
        texts = example.ids, *(example.pair or ())
        return ["|".join(tokenizer.convert_ids_to_tokens(ids)) for ids in texts]

    row = {"prompt": "ca ", "chosen": "bc", "rejected": "cccccccccc"}
    assert pair_of(row, max_new_tokens=4) == ["<begin>|c|a|Ġ", "b|c|<end>", "c|c|c|c"]
    more = row | {"chosen": "cccc", "rejected": "ccc"}
    assert pair_of(more, max_new_tokens=4)[1:] == ["c|c|c|c", "c|c|c|<end>"]
    assert pair_of(row | {"prompt": "ca", "rejected": ""})[1:] == ["Ġ|b|c|<end>", "<end>"]
    assert pair_of(row | {"rejected": "c"}, bpe_tokenizer(("Ġ", "b"))) == ["c|a|Ġ", "b|c|<end>", "c|<end>"]
    tokenizer.chat_template = TALK_TEMPLATE  # ends in "a:", so that nothing brings a space
    row = {"prompt": TALK, "chosen": reply("bc"), "rejected": reply("bb")}
    assert pair_of(row)[1:] == ["b|c|<end>", "bb|<end>"]
    assert len(pair_of(row, split="validation")) == len(pair_of(row, method="brain")) == 1


def test_pairs_of_another_data_set_are_trained_on(tmp_path, small_hub):
    """--pairs-dataset is for --method dpo, its cue moved. Evaluation stays on --dataset, whose flags do not
    bind it. Wrong: its rows evaluated; rows for a method that draws outputs; the cue twice; a traceback for
    messages."""
    pair = {"prompt": "POST: ca\n", "chosen": "TL;DR: good", "rejected": "TL;DR: bad"}
    other = {"prompt": "POST: cb\n\nTL;DR:", "chosen": " good", "rejected": " bad TL;DR: x"}
    flags = dict(dataset_config="en", dataset_train_split="train_sft", dataset_test_split="test_sft")

    def load(*rows, method="dpo"):
        s = data_settings(method, pairs_dataset=write_rows(tmp_path / "pairs.jsonl", rows), **flags)
        return brain.load_data(s, bpe_tokenizer(), three_splits(DATA))

    train, *others = load(pair, other)
    assert [example.prompt for example in train] == ["POST: ca\nTL;DR:", "POST: cb\n\nTL;DR:"]
    found = [[bpe_tokenizer().decode(ids) for ids in example.pair] for example in train]
    assert found == [[" good<end>", " bad<end>"], [" good<end>", " bad TL;"]]
    for some in (*others, load(pair, method="brain")[0]):
        assert [example.gold for example in some] == [f" a{i}" for i in range(5)]
    talk = {"prompt": "ca", "chosen": reply("b"), "rejected": reply("c")}
    none = pair | {"rejected": None}
    for row, told in ((none, "--pairs-dataset .*row 1: rejected"), (talk, "no chat template")):
        with pytest.raises(brain.UserError, match=told):
            load(row)
    with pytest.raises(brain.UserError, match="--dataset d: split train has no column chosen"):
        brain.load_data(data_settings("dpo"), bpe_tokenizer(), three_splits(DATA))


def test_prompts_that_leave_the_reward_model_no_room_are_left_out():
    """In a context of 10, with outputs of 3 tokens. Wrong: the room of the output, or the gold answer, not
    counted; one token too many; a run that dies at such a prompt in the middle."""
    words, rows = letters(), [(4, 1), (8, 1), (4, 9), (7, 3), (7, 4)]
    sizes = dict(n_embd=32, n_layer=1, n_head=2, n_positions=10, vocab_size=10, num_labels=1, pad_token_id=0)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes))
    settings = brain.parse(["--max-new-tokens", "3"])
    settings.max_prompt_tokens = 9
    data = dataset_of([{"prompt": " a" * prompt, "label": " b" * gold} for prompt, gold in rows])
    prompts = brain.Prompts(data, words, settings, "train")
    prompts.leave_out_unfit(brain.RewardModel(model, words))
    assert prompts.kept == [0, 3] and "2 prompts, 3 left out" in prompts.summary


# ------------------------------------------------------------------------------------------
# 7. Evaluation

PROMPTS = [X, X2, [5], [6, 2], [4, 4, 4, 1], [2], [1, 6, 3]]  # of many lengths, in no order of length
ANSWERS = (" a b", " c", " a", None, " b b", "", " c c a")


def spelled(ids):
    return "".join(" " + chr(96 + int(i)) for i in ids if i)


def liking(prompt, texts, columns):
    """A reward that depends on all that it is given."""
    w = columns["weight"]
    liked = [1.5 * text.count("a") - 0.8 * text.count("c") + 0.3 * len(text) * w for text in texts]
    return torch.tensor(liked, dtype=DOUBLE) - 0.1 * len(prompt)


def unit_settings(**changes):
    short = dict(iterations=2, prompts_per_iteration=3, samples_per_prompt=4, updates_per_iteration=3, seed=5)
    short |= dict(max_prompt_tokens=20, max_new_tokens=4, eval_prompts=0, eval_every=100, batch_size=2)
    short |= dict(goodness="logistic", beta=2.0, select_by="self_normalized_kl", dtype="float64")
    return dataclasses.replace(brain.parse([]), **short | changes)


def seven_prompts(s, gold=ANSWERS, split="validation"):
    rows = [{"prompt": spelled(x), "label": gold[i], "weight": float(i % 3)} for i, x in enumerate(PROMPTS)]
    return brain.Prompts(dataset_of(rows), letters(), s, split)


def moved_policy(size=0.15):
    """A policy that is not its prior any more."""
    policy = brain.Policy(tiny(), letters())
    with torch.no_grad():
        for i, p in enumerate(policy.parameters().values()):
            p.add_(random(*p.shape, seed=i, scale=size))
    return policy


def both_log_probs(policy, prompt, outputs):
    """(log q_theta, log p) of n outputs by plain forwards, in numpy."""
    models = policy.model, policy.prior_model
    return [np.array([plain(m, torch.as_tensor(prompt), y, KNOWN).item() for y in outputs]) for m in models]


def evaluated(policy, tmp_path, gold=ANSWERS, reward=liking, **changes):
    s = unit_settings(**changes)
    data = seven_prompts(s, gold)
    return brain.evaluate(policy, reward, data, s, brain.Run(tmp_path, s, reward, data, data, data))


@pytest.mark.parametrize("n", [4, 2])
def test_evaluation_by_hand(n, tmp_path, monkeypatch):
    """One draw of the policy per prompt, from its own stream; n draws for each of HELD_OUT_PROMPTS, evenly
    spaced, for the bounds. Wrong: outputs of the prior; output and gold swapped; prompts without gold counted
    as lost; KL turned around or per token; a stream shared with training; another row's columns; goodness or
    beta ignored."""
    monkeypatch.setattr(brain, "HELD_OUT_PROMPTS", 3)
    policy = moved_policy()
    metrics, lines = evaluated(policy, tmp_path, samples_per_prompt=n)
    ratios, ours, gold, bounds = [], [], [], []
    for i, (ids, line) in enumerate(zip(PROMPTS, lines, strict=True)):
        ids, columns = torch.as_tensor(ids), {"weight": float(i % 3)}
        (output,) = policy.sample(ids, 1, 4, generator=brain.seeded(5, brain.EVALUATION, i))
        log_q, log_p = both_log_probs(policy, ids, [output])
        ratios.append((log_q - log_p).item())
        ours.append(liking(spelled(ids), [spelled(output)], columns).item())
        gold.append(None if ANSWERS[i] is None else liking(spelled(ids), [ANSWERS[i]], columns).item())
        expected = {"row": i, "prompt": spelled(ids), "gold": ANSWERS[i], "output": spelled(output)}
        assert line == expected | {"reward": ours[-1], "gold_reward": gold[-1]}
        if i in (0, 2, 4):
            outputs = policy.sample(ids, n, 4, generator=brain.seeded(5, brain.HELD_OUT, i))
            log_q, log_p = both_log_probs(policy, ids, outputs)
            r = liking(spelled(ids), [spelled(y) for y in outputs], columns).numpy()
            log_weight = log_p - np.log1p(np.exp(-r)) / 2 - log_q
            bounds.append([log_weight.mean(), np.log(np.exp(log_weight).mean())])
    won = np.mean([(r > g) + (r == g) / 2 for r, g in zip(ours, gold) if g is not None])
    assert 0 < won < 1 and won != 0.5 and gold.count(None) == 1 and abs(np.mean(ratios)) > 0.05
    expected = {"win_rate": 100 * won, "win_rate_half_width": 196 * math.sqrt(won * (1 - won) / 6)}
    expected |= {"reward": np.mean(ours), "kl_to_prior": np.mean(ratios)}
    for name, values in zip(("elbo", "log_evidence"), np.transpose(bounds)):
        expected |= {name: values.mean(), f"{name}_standard_error": values.std(ddof=1) / math.sqrt(3)}
    assert metrics == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", ["brain-no-baseline", "dpo-sft", "dpo"])
def test_held_out_d_n(method, tmp_path, monkeypatch):
    """n outputs of the prior for evenly spaced validation prompts, drawn once; D_n of them by hand, for every
    method. Wrong: samples of the policy; other prompts; weights of pairs; an argmax; eq. 7; drawn anew."""
    monkeypatch.setattr(brain, "HELD_OUT_PROMPTS", 3)
    policy, n = moved_policy(0.05), 2 if method == "dpo" else 4
    s = unit_settings(method=method, samples_per_prompt=n)
    run = brain.Run(tmp_path, s, liking, None, seven_prompts(s), None)
    run.start(policy, torch.optim.AdamW(policy.parameters().values()))
    for step in (0, 1):
        divergences = []
        for i, samples in zip((0, 2, 4), run.held_out, strict=True):
            ids, stream = torch.as_tensor(PROMPTS[i]), brain.seeded(5, brain.HELD_OUT, i)
            outputs = policy.sample(ids, n, 4, prior=True, generator=stream)
            r = liking(spelled(ids), [spelled(y) for y in outputs], {"weight": float(i % 3)}).numpy()
            alpha = softmax(-np.log1p(np.exp(-r)) / 2)  # q' = p: eq. 21
            log_q, log_p = both_log_probs(policy, ids, outputs)
            divergences.append((alpha * np.log(alpha / softmax(log_q - log_p))).sum())
        if step:
            run.evaluate(policy, step)
        line, near = run.lines("metrics.jsonl")[-1], pytest.approx(np.mean(divergences), abs=1e-10)
        assert line["step"] == step and line["self_normalized_kl"] == near
        with torch.no_grad():
            for p in policy.parameters().values():
                p.mul_(0.9)


# ------------------------------------------------------------------------------------------
# 8. The run directory


class SmallToy(toy_world.Toy):
    """The default run's world, of 13 outputs, and with a GPT-2 of one layer."""

    gold = True

    def __init__(self, seed=0, dtype="float32", goodness="bradley-terry", length=2, beta=1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toy_world, "tiny_gpt2", functools.partial(toy_world.tiny_gpt2, width=16, layers=1))
            super().__init__(seed, dtype, goodness, letters=3, length=length, prompts=4, beta=beta)

    def splits(self):
        answers = [] if self.gold else ["label", "chosen", "rejected"]
        return {split: rows.remove_columns(answers) for split, rows in super().splits().items()}

    def report(self, model, path, estimates):
        """Drawing takes longer than the run."""


@pytest.fixture
def small_toy(monkeypatch):
    monkeypatch.setattr(toy_world, "Toy", SmallToy)
    monkeypatch.setattr(brain, "HELD_OUT_PROMPTS", 2)
    monkeypatch.setattr(brain.Run, "report", lambda run: (run.path / "report.png").touch())


SHORT = """--iterations 2 --prompts-per-iteration 2 --samples-per-prompt 3 --updates-per-iteration 4
    --batch-size 2 --max-new-tokens 2 --learning-rate 0.003 --weight-decay 0.1
    --eval-prompts 6 --eval-every 3
    --select-by win_rate""".split()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    """Every file of a run as something to compare: all bytes or numbers, but for times and the place."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    files["metrics.jsonl"] = [line | {"time": None} for line in read_lines(path / "metrics.jsonl")]
    files["config.json"] = json.loads(files["config.json"]) | dict.fromkeys(("output_dir", "resume"))
    state = torch.load(path / "checkpoint/state.pt")
    return files | {"checkpoint/state.pt": json.dumps(state, default=torch.Tensor.tolist)}


def same_files(one, other, what=None):
    assert one.keys() == other.keys(), what
    for name in one:
        assert one[name] == other[name], (what, name)


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


SCRIPT = [50.0, 70.0, 70.0, 60.0]  # scores of the four evaluations of SHORT on validation


@pytest.fixture
def scripted(monkeypatch):
    """Scores on validation as in SCRIPT. -> [(is it test, weights)] of each evaluation"""
    seen, evaluate = [], brain.evaluate

    def with_script(policy, reward, data, settings, run):
        metrics, lines = evaluate(policy, reward, data, settings, run)
        seen.append((data is run.splits["test"], copy.deepcopy(policy.model.state_dict())))
        if not seen[-1][0]:
            score = SCRIPT[sum(line.get("split") == "validation" for line in run.lines("metrics.jsonl"))]
            metrics |= {"win_rate": score, "elbo": score - 100}
            monkeypatch.setattr(brain, "held_out_divergence", lambda policy, samples, settings: 100 - score)
        return metrics, lines

    monkeypatch.setattr(brain, "evaluate", with_script)
    return seen


@pytest.mark.parametrize("select_by", brain.SELECTIONS)
def test_the_best_on_validation_is_kept_and_tested(select_by, small_toy, scripted, monkeypatch, tmp_path):
    """model/ is the later of the two best of four; test uses it, metrics name it, transformers loads it. Of
    D_n the least is best. Wrong: the last; the worst; the first of equals; another number; a test of the last
    weights."""
    monkeypatch.setattr(SmallToy, "gold", select_by != "elbo")
    assert brain.main([*SHORT, "--select-by", select_by, "--output-dir", tmp_path / "run"]) == 0
    assert [test for test, _ in scripted] == [False] * 4 + [True]
    weights = [w for _, w in scripted]
    assert [same_weights(weights[2], w) for w in weights] == [False, False, True, False, True]
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "split" in line]
    assert [line.get("kept") for line in lines] == [0, 3, 6, 6, None] and lines[-1]["step"] == 6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert same_weights(loaded.state_dict(), weights[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.get_vocab() == SmallToy().tokenizer.get_vocab() and tokenizer.eos_token_id == 0


class Killed(BaseException):
    """A SIGKILL, as far as the files can tell: nothing of the run catches it."""


def killed_at(owner, name, count, argv, error=Killed):
    """A run that the `count`-th call of owner.name kills."""
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments, **named):
        if next(calls) == count:
            raise error
        return real(*arguments, **named)

    raises = pytest.raises(error) if error is Killed else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, raises:
        patch.setattr(owner, name, call)
        return brain.main(argv)


def moments(monkeypatch, path, argv):
    """Runs to the end. -> {what was being done: [copies of the run directory]}: whatever a SIGKILL could
    leave, before and after each change, with lines or files written in part."""
    found = {}

    def look(what, **more):
        files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        files |= {name: files.get(name, b"") + text for name, text in more.items()}
        folders = [folder.relative_to(path) for folder in path.rglob("*") if folder.is_dir()]
        if "config.json" in files:
            found.setdefault(what, []).append((files, folders))

    def watch(owner, name, file_of=None):
        real = getattr(owner, name)

        def call(*arguments, **named):
            if file_of:
                Path(file_of(*arguments)).write_bytes(b"half of a file")
            look(f"before {name}")
            result = real(*arguments, **named)
            look(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, call)

    def write(run, name, lines, anew=False, real=brain.Run.write):
        lines = list(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        for part, size in (("half", len(text) // 2), ("no newline", -1), ("a line", text.find(b"\n") + 1)):
            if lines and not anew:
                look(f"{part} of {name}", **{name: text[:size]})
        real(run, name, lines, anew)
        look(f"all of {name}")

    monkeypatch.setattr(brain.Run, "write", write)
    watch(torch, "save", lambda state, file: file)
    watch(brain, "save_policy", lambda policy, directory: directory / "model.safetensors")
    for owner, name in ((Path, "replace"), (Path, "rename"), (brain.shutil, "rmtree"), (brain, "update")):
        watch(owner, name)
    watch(brain.Run, "report")
    assert brain.main(argv) == 0
    return found


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(small_toy, scripted, monkeypatch, tmp_path):
    """In each kind of moment: every file as in the run that was not killed. Wrong: lines behind the
    checkpoint kept, or a round's line twice; a half line read; half of a prompt's outputs kept; a checkpoint
    or model/ written in place; AdamW's state or the best score lost; samples drawn again; a number that
    torch's own generator gave."""
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        found = moments(patch, path, [*SHORT, "--output-dir", path])
    assert len(found) > 20 and sum(map(len, found.values())) > 100
    everything = itertools.chain(*found.values())
    assert not any(files.get("model/model.safetensors") == b"half of a file" for files, _ in everything)
    expected = timeless(path)
    kinds = [(what, states[len(states) * 2 // 3]) for what, states in found.items()]
    kinds.append(("first evaluation", found["all of metrics.jsonl"][1]))  # no checkpoint: it starts over
    kinds.append(("second round", found["half of samples.jsonl"][-1]))
    for i, (what, (files, folders)) in enumerate(kinds):
        again = tmp_path / f"{i}"
        for folder in (Path(), *folders):
            (again / folder).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (again / name).write_bytes(data)
        torch.manual_seed(i)
        assert brain.main([*SHORT, "--output-dir", again, "--resume"]) == 0, what
        same_files(timeless(again), expected, what)
    assert brain.main([*SHORT, "--output-dir", tmp_path / "other", "--seed", 1]) == 0
    for name in ("samples.jsonl", "test_outputs.jsonl", "model/model.safetensors"):
        assert timeless(tmp_path / "other")[name] != expected[name], name


def test_resume_in_a_finished_run_changes_nothing(small_toy, tmp_path, capsys):
    """Exit 0, every byte and time as it was; more --iterations extend it. Wrong: a second line of test; a new
    model; an error; a run that was killed at its report and counts as finished."""
    argv, path = [*SHORT, "--output-dir", tmp_path / "run"], tmp_path / "run"
    killed_at(brain.Run, "report", 1, argv)
    assert brain.main([*argv, "--resume"]) == 0 and (path / "report.png").exists()
    assert [line.get("split") for line in read_lines(path / "metrics.jsonl")].count("test") == 1
    def look():
        return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in path.rglob("*") if f.is_file()}

    before = look()
    capsys.readouterr()
    assert brain.main([*argv, "--resume"]) == 0
    assert look() == before and "finished" in capsys.readouterr().out
    longer = [*argv, "--iterations", 3]
    assert brain.main([*longer, "--resume"]) == 0 and "extended" in capsys.readouterr().out
    steps = [line["step"] for line in read_lines(path / "metrics.jsonl") if "loss" in line]
    settings = json.loads((path / "config.json").read_text())
    assert settings["iterations"] == 3 and steps == list(range(1, 3 * settings["updates_per_iteration"] + 1))
    assert brain.main([*argv, "--resume"]) == 2  # fewer than the run has


@pytest.mark.parametrize("what", ["loss", "gradient", "metric"])
def test_a_loss_that_is_not_finite_stops_before_the_weights(what, small_toy, monkeypatch, tmp_path, capsys):
    """Exit 2 and one line; weights and metrics without that update. Wrong: a check after the step, of the
    loss alone, of nan but not inf; a NaN in metrics.jsonl."""
    log_prob, calls, before, weights = brain.Policy.log_prob, itertools.count(), {}, {}

    def poisoned(policy, prompt_ids, outputs, prior=False):
        result = log_prob(policy, prompt_ids, outputs, prior)
        if not result.requires_grad or next(calls) < 6:  # two of a batch: in the fourth update
            return result
        if not before:
            weights.update(policy.parameters())
            before.update({name: p.detach().clone() for name, p in weights.items()})
            if what == "gradient":  # inf and no nan, in a single weight
                hook = lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.inf)  # noqa: E731
                weights["transformer.ln_f.bias"].register_hook(hook)
        return result * math.inf if what == "loss" else result

    def size(w, real=brain.effective_sample_size):  # the loss does not see it
        return real(w) / (0.0 if before and what == "metric" else 1.0)

    monkeypatch.setattr(brain.Policy, "log_prob", poisoned)
    monkeypatch.setattr(brain, "effective_sample_size", size)
    assert brain.main([*SHORT, "--output-dir", tmp_path / "run"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("brain: ") and "not finite" in last and "--learning-rate" in last
    assert before and same_weights(weights, before)
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


# ---- several processes


PAIR = f"""
import os, signal, sys
import {Path(__file__).stem} as tests
brain, place = tests.brain, sys.argv[1]
tests.toy_world.Toy, brain.HELD_OUT_PROMPTS, brain.EVALUATION_BATCH = tests.SmallToy, 2, 1
brain.Run.report = lambda run: (run.path / 'report.png').touch()
assert brain.main([*tests.SHORT, *tests.SHARED["three"], "--output-dir", os.path.join(place, "three")]) == 0
update, steps = brain.update, iter(range(9))
if os.environ["RANK"] == "0":
    brain.update = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == 4 else update(*a)
brain.main([*tests.SHORT, *tests.SHARED["one"], "--output-dir", os.path.join(place, "one")])
"""
SHARED = {"one": "--dtype float64 --batch-size 1".split()}
SHARED["three"] = "--dtype float64 --batch-size 3 --prompts-per-iteration 3".split()


def same_numbers(one, two):
    """Two runs in float64, to rounding: the gradient is a sum in another order, and Adam divides it by its
    size."""
    for name in ("samples.jsonl", "metrics.jsonl", "validation_outputs.jsonl", "test_outputs.jsonl"):
        for ours, theirs in zip(read_lines(one / name), read_lines(two / name), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"time"}:
                value = ours[key]
                near = pytest.approx(value, rel=1e-6, abs=1e-8) if isinstance(value, float) else value
                assert theirs[key] == near, (name, key)
    load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=DOUBLE)
    ours, theirs = (load(path / "model").state_dict() for path in (one, two))
    torch.testing.assert_close(dict(theirs), dict(ours), rtol=0, atol=1e-7)
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}


def test_two_processes_are_one(small_toy, monkeypatch, tmp_path):
    """Same samples, outputs and kept model, numbers to rounding; one of them writes and speaks. The batch is
    smaller than the number of processes, or not evenly shared. Where the writer gets a SIGKILL in its fifth
    update, the other ends with an error, four lines are on disk, and one process goes on. Wrong: gradients
    averaged, or not added; a share of the batch divided by its own size; both writing; metrics of one's
    share; a wait for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    children, how = [], dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for rank in "01":
        env = os.environ | shared | dict(OMP_NUM_THREADS="1", RANK=rank, LOCAL_RANK=rank)
        children.append(subprocess.Popen([sys.executable, "-c", PAIR, tmp_path / "two"], env=env, **how))
    try:
        (out, _), (out_of_1, told) = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert children[0].returncode == -signal.SIGKILL, told
    assert children[1].returncode not in (0, 2) and "Error" in told
    assert len(re.findall(r"update +\d+  test", out)) == 1 and out_of_1 == "" and "brain: warning" not in told
    lines = brain.Run(tmp_path / "two" / "one", None).lines("metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    monkeypatch.setattr(brain, "EVALUATION_BATCH", 1)
    assert brain.main([*SHORT, *SHARED["one"], "--output-dir", tmp_path / "two" / "one", "--resume"]) == 0
    for name, more in SHARED.items():
        assert brain.main([*SHORT, *more, "--output-dir", tmp_path / name]) == 0
        same_numbers(tmp_path / name, tmp_path / "two" / name)


# ------------------------------------------------------------------------------------------
# 9. The command line: settings

SFT, SFT_REWARD = "CarperAI/openai_summarize_tldr_sft", "CarperAI/openai_summarize_tldr_rm_checkpoint"
HH, HH_REWARD = "timdettmers/qlora-hh-rlhf-7b", "Dahoas/gptj-rm-static"
GPTJ, LLAMA_7B = "EleutherAI/gpt-j-6B", "huggyllama/llama-7b"
SFT_COMPANIONS = dict(
    tokenizer=GPTJ, reward_model=SFT_REWARD, reward_base=SFT, dataset="CarperAI/openai_summarize_tldr",
    reward_template="<|startoftext|>{prompt}{output}", pairs_dataset="CarperAI/openai_summarize_comparisons",
    max_prompt_tokens=500, max_new_tokens=50,
)  # fmt: skip
HH_COMPANIONS = dict(
    reward_model=HH_REWARD, reward_base=GPTJ, reward_template="{prompt}{output}<|endoftext|>",
    dataset="Dahoas/rm-static", max_prompt_tokens=500, max_new_tokens=128,
)  # fmt: skip
DEFAULTS = dict(
    model="toy", base_model=None, tokenizer=None, reward_model=None, reward_base=None, reward_template=None,
    reward_function=None, reward_label=None, goodness=None, beta=1.0, dataset=None, dataset_config=None,
    dataset_train_split=None, dataset_test_split=None, pairs_dataset=None, method="brain", output_dir=None,
    resume=False, overwrite=False, seed=0, device="cpu", dtype="float32", iterations=4, samples_per_prompt=32,
    prompts_per_iteration=1000, updates_per_iteration=250, batch_size=8, max_prompt_tokens=None,
    max_new_tokens=64, learning_rate=1e-5, lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.1,
    adam_beta1=0.9, adam_beta2=0.95, lora_rank=8, lora_alpha=32, load_in_4bit=False, outputs_per_forward=None,
    eval_prompts=500, eval_every=250, greedy=False, select_by=None,
)  # fmt: skip
TYPED = dict(
    base_model="b", tokenizer="t", reward_model="r", reward_base="rb", reward_template="<{output}>", beta=0.5,
    reward_label="good", goodness="logistic", dataset="d2", dataset_config="c", dataset_train_split="a",
    dataset_test_split="z", pairs_dataset="p", method="dpo-sft", output_dir="o", seed=7, device="cpu",
    dtype="float64", iterations=0, prompts_per_iteration=3, samples_per_prompt=64, updates_per_iteration=9,
    batch_size=2, max_prompt_tokens=77, max_new_tokens=64, learning_rate=1e-4, lr_scheduler_type="cosine",
    warmup_steps=3, weight_decay=0.0, adam_beta1=0.0, adam_beta2=0.999, lora_rank=0, lora_alpha=1,
    outputs_per_forward=4, eval_prompts=0, eval_every=5, select_by="elbo",
)  # fmt: skip
OWN = ["--model", "m", "--dataset", "d", "--reward-model", "r0"]


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("model, companions", [("m", {}), (SFT, SFT_COMPANIONS), (HH, HH_COMPANIONS)])
def test_what_is_typed_counts_before_companions_and_these_before_defaults(model, companions, without_gpu):
    """A flag, in both spellings, changes what it names and what belongs to it. Wrong: another default,
    `value or companion`, a companion's template or pairs with a user's reward or data."""
    start = OWN if model == "m" else ["--model", model]
    given = dict(model="m", dataset="d", reward_model="r0") if model == "m" else {"model": model}
    before = DEFAULTS | given | companions
    assert vars(brain.parse(start)) == before
    for name, value in TYPED.items():
        expected = before | {name: value}
        if name == "reward_model":
            expected |= {"reward_base": None, "reward_template": None}
        elif name == "dataset":
            expected["pairs_dataset"] = None
        elif name == "updates_per_iteration":
            expected["eval_every"] = 9  # an evaluation at the end of every round
        for spelling in ("--" + name, "--" + name.replace("_", "-")):
            found = vars(brain.parse([*start, spelling, str(value)]))
            assert found == expected and type(found[name]) is type(value), name
            assert vars(brain.parse([*start, f"{spelling}={value}"])) == expected
    for name in ("overwrite", "greedy"):
        assert vars(brain.parse([*start, "--" + name])) == before | {name: True}
    if model == SFT:
        none = dict.fromkeys(("reward_model", "reward_base", "reward_template"))
        found = vars(brain.parse([*start, "--reward-function", "f.py:f"]))
        assert found == before | none | {"reward_function": "f.py:f"}


def test_settings_that_follow_from_others(monkeypatch):
    """Wrong: bfloat16 where all parameters are trained, which rounds a step of 1e-5 away; n = 32 for pairs;
    evaluations more than 1000 updates apart; a toy that is not its own or not on the CPU."""
    own = dict(iterations=6, prompts_per_iteration=128, updates_per_iteration=60, eval_every=60, lora_rank=0)
    own |= dict(learning_rate=1e-3, weight_decay=0.0, max_prompt_tokens=2, max_new_tokens=5, eval_prompts=256)
    found = vars(brain.parse(["--max-new-tokens", "5"]))
    own["select_by"] = "self_normalized_kl"
    assert found == DEFAULTS | own and brain.parse([]).max_new_tokens == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settled = lambda *more: (lambda s: (s.device, s.dtype))(brain.parse([*OWN, *more]))  # noqa: E731
    assert settled() == ("cuda", "bfloat16") and settled("--lora-rank", "0") == ("cuda", "float32")
    assert settled("--device", "cpu") == ("cpu", "float32")
    assert settled("--device", "cuda:1", "--dtype", "float16") == ("cuda:1", "float16")
    with pytest.raises(brain.UserError, match="--device cuda:2: .*no such GPU"):
        brain.parse([*OWN, "--device", "cuda:2"])
    assert brain.parse([]).device == "cpu"
    assert brain.parse([*OWN, "--method", "dpo"]).samples_per_prompt == 2
    assert brain.parse([*OWN, "--updates-per-iteration", "1001"]).eval_every == 1000


def test_edges_of_ranges_are_allowed_and_what_is_below_is_not():
    """Wrong: > for >=, a number without a range."""
    zeros = "seed iterations weight_decay adam_beta1 adam_beta2 eval_prompts lora_rank warmup_steps"
    ones = "prompts_per_iteration updates_per_iteration batch_size max_prompt_tokens max_new_tokens"
    edges = dict.fromkeys(zeros.split(), 0) | dict.fromkeys(ones.split(), 1)
    edges |= dict(samples_per_prompt=2, outputs_per_forward=1, lora_alpha=1, eval_every=1)
    found = vars(brain.parse(OWN + [word for name in edges for word in (brain.flag(name), str(edges[name]))]))
    assert {name: found[name] for name in edges} == edges
    numbers = [f.name for f in dataclasses.fields(brain.Settings) if f.type in (int, float, int | None)]
    assert set(numbers) == set(edges) | {"learning_rate", "beta"}
    for name in numbers:
        below = str(edges.get(name, 0) - 1)
        with pytest.raises(brain.UserError, match=rf"^{brain.flag(name)} {below}(\.0)?: give"):
            brain.parse([*OWN, brain.flag(name), below])


def test_home_is_expanded_in_every_path(monkeypatch):
    """The shell does so for `--flag ~/x` and not for `--flag=~/x`. Wrong: a directory that is named `~`."""
    monkeypatch.setenv("HOME", "/home/of/mine")
    names = "model base_model tokenizer dataset pairs_dataset output_dir".split()
    for reward in ("reward_model", "reward_function"):
        found = vars(brain.parse([f"{brain.flag(name)}=~/x" for name in [*names, reward]]))
        assert {found[name] for name in [*names, reward]} == {"/home/of/mine/x"}


def test_help_shows_every_setting_with_its_default_and_the_papers_value(capsys):
    """Wrong: a field without a word about it, a default lost or said twice, a `%` that breaks argparse."""
    with pytest.raises(SystemExit) as stop:
        brain.main(["--help"])
    text = capsys.readouterr().out
    parts = re.split(r"\n  (?=--)", text)[1:]
    shown = {re.match(r"--[a-z0-9-]+", part)[0]: " ".join(part.split()) for part in parts}
    assert not stop.value.code
    for field in dataclasses.fields(brain.Settings):
        told = shown[brain.flag(field.name)]
        assert field.metadata["help"] in told and field.metadata["help"] and told.count("(default: ") <= 1
        assert field.default in (None, False) or f"(default: {field.default})" in told, told
    assert all(f"(paper: {value})" in " ".join(text.split()) for value in ("32", "1e-5", "0.1", "0.95"))


# What the runs below need: tokenizers trained on the spot, tiny models under any name
ANIMALS = "cat dog cow hen pig fox owl bee ant elk".split()
TRIPLES = list(zip(ANIMALS, ANIMALS[3:] * 2, ANIMALS[5:] * 2))
POSTS = [f"SUBREDDIT: r/{a}s\nPOST: my {a} ate the {b} of a {c}" for a, b, c in TRIPLES]
SUMMARIES = [f"{a} ate {b}" for a, b, _ in TRIPLES]
CHATS = [f"\n\nHuman: is the {a} a pet?\n\nAssistant:" for a in ANIMALS]
SMALL = "--iterations 1 --prompts-per-iteration 4 --updates-per-iteration 2 --batch-size 3".split()
SMALL += "--samples-per-prompt 5 --device cpu".split()
FINISHED = {"model", "checkpoint", "config.json", "metrics.jsonl", "samples.jsonl", "report.png"}
FINISHED |= {"validation_outputs.jsonl", "test_outputs.jsonl"}
ENDS = dict(bos_token_id=0, eos_token_id=0)


def bpe_of(texts, size=8, **more):
    """Byte-level BPE like GPT-2's, `<|endoftext|>` as id 0; with a small `size`, one token per letter."""
    import tokenizers

    bpe, end = tokenizers.Tokenizer(tokenizers.models.BPE()), "<|endoftext|>"
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[end], show_progress=False)
    bpe.train_from_iterator([*texts, "a"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, **more)


def loud(model, seed, scale=0.3):
    """Parameters large enough that outputs and scores differ by much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=scale, generator=generator) if p.dim() > 1 else None
    return model.float().eval()


def jsonl(path, rows=None):
    """Writes rows; without any, reads them."""
    if rows is None:
        return [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def snapshot(home, name, kind="model"):
    """The directory of a repository's only snapshot, in a hub cache that is laid out by hand."""
    place = home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    for part in ("refs", f"snapshots/{'0' * 40}"):
        (place / part).mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text("0" * 40)
    return place / f"snapshots/{'0' * 40}"


def save_bare_reward(config, path, seed):
    """A reward model as one file, in half precision: decoder, `v_head`, a buffer of older transformers."""
    decoder = loud(transformers.GPTJModel(config), seed)
    tensors = {f"transformer.{name}": w.half() for name, w in decoder.state_dict().items()}
    tensors |= {"v_head.weight": random(1, config.n_embd, seed=seed).half()}
    torch.save(tensors | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e9)}, path)


def score_by_hand(config, path, ids):
    """The score of a bare reward model at the last of these ids."""
    tensors = torch.load(path, weights_only=True)
    decoder = transformers.GPTJModel(config).float().eval()
    decoder.load_state_dict({name: tensors[f"transformer.{name}"].float() for name in decoder.state_dict()})
    head = tensors["v_head.weight"][0].float()
    with torch.no_grad():
        return [(decoder(torch.tensor([row])).last_hidden_state[0, -1] @ head).item() for row in ids]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """HF_HOME with the paper's models and data: the real names and files, tiny parameters."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("hub")
    words = bpe_of([*POSTS, *SUMMARIES, *CHATS, "TL;DR: <|startoftext|>"], 120)
    sizes = GPT | dict(n_positions=1000, rotary_dim=4)
    config = transformers.GPTJConfig(**sizes, vocab_size=len(words) + 9, **ENDS)
    config.save_pretrained(snapshot(home, SFT))  # no tokenizer here
    tensors = loud(transformers.GPTJForCausalLM(config), 1, 0.2).state_dict()
    torch.save(tensors, snapshot(home, SFT) / "pytorch_model.bin")
    save_bare_reward(config, snapshot(home, SFT_REWARD) / "pytorch_model.bin", 2)
    save_bare_reward(config, snapshot(home, HH_REWARD) / "hf_ckpt.pt", 3)
    config.save_pretrained(snapshot(home, GPTJ))  # and no parameters here
    sizes = LLAMA | dict(max_position_embeddings=200)
    config = transformers.LlamaConfig(**sizes, vocab_size=len(words), **ENDS)
    model = loud(transformers.LlamaForCausalLM(config), 4, 0.2)
    model.save_pretrained(snapshot(home, LLAMA_7B))
    for name in (GPTJ, LLAMA_7B):
        words.save_pretrained(snapshot(home, name))
    lora = dict(lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    lora = LoraConfig(r=64, lora_alpha=16, **lora)
    model = loud(get_peft_model(model, lora), 5, 0.2)
    lora.base_model_name_or_path = LLAMA_7B
    lora.save_pretrained(snapshot(home, HH))
    tensors = {name.replace(".default.", "."): w for name, w in model.state_dict().items() if "lora_" in name}
    torch.save(tensors, snapshot(home, HH) / "adapter_model.bin")
    posts = [{"prompt": post + "\nTL;DR:", "label": " " + text} for post, text in zip(POSTS, SUMMARIES)]
    chats = [{"prompt": chat, "response": " yes", "chosen": " yes", "rejected": " no"} for chat in CHATS]
    tldr, static = "CarperAI/openai_summarize_tldr", "Dahoas/rm-static"
    splits = {(tldr, "train"): posts[:6], (tldr, "valid"): posts[6:8], (tldr, "test"): posts[8:]}
    splits |= {(static, "train"): chats[:8], (static, "test"): chats[8:]}
    for (name, split), rows in splits.items():
        file = f"data/{split}-00000-of-00001-0123456789abcdef.parquet"
        Dataset.from_list(rows).to_parquet(snapshot(home, name, "dataset") / file)
    return home


COUNT = """
def letters(prompts, completions, **columns): return [2.0 * text.count("a") for text in completions]
def short(completions): return [1.0]
number = 3
"""


class Evil(str):  # a path that, unpickled, is written to
    def __reduce__(self):
        return open, (str(self), "w")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """What a user has: model/ (one token per letter), reward/, count.py, data.jsonl; and what is wrong."""
    place, words = tmp_path_factory.mktemp("mine"), bpe_of(["abcdef "])
    ids = dict(vocab_size=10, pad_token_id=0) | ENDS
    llama = lambda **changes: transformers.LlamaConfig(**LLAMA | ids | changes)  # noqa: E731
    model = loud(transformers.LlamaForCausalLM(llama()), 7, 0.15)
    for name in ("model", "no-words", "no-end"):
        model.save_pretrained(place / name)
    transformers.LlamaForCausalLM(llama(hidden_size=16)).save_pretrained(place / "narrow")
    adapted = brain.add_adapter(copy.deepcopy(model), 2, 4)
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(place / "adapter")
    for name, count in (("reward", 1), ("three", 3)):
        scorer = transformers.LlamaForSequenceClassification(llama(num_labels=count))
        loud(scorer, 8).save_pretrained(place / name)
    transformers.T5Config(d_model=16).save_pretrained(place / "t5")
    for name, file in (("model", "pytorch"), ("reward", "pytorch"), ("adapter", "adapter")):
        shutil.copytree(place / name, place / f"evil-{name}", ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save({"weight": Evil(place / "ran")}, place / f"evil-{name}" / f"{file}_model.bin")
    torch.save({"v_head.weight": Evil(place / "ran")}, place / "evil.bin")
    for name in ("model", "narrow", "reward", "three", "t5", "evil-model"):
        words.save_pretrained(place / name)
    words.eos_token = None
    words.save_pretrained(place / "no-end")
    for name in ("unknown", "other", "run", "empty"):
        (place / name).mkdir()
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Kind")
    (place / "unknown/config.json").write_text(json.dumps({"model_type": "of-its-own", "auto_map": names}))
    (place / "unknown/evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Kind: pass\n")
    draw = np.random.default_rng(0)
    text = lambda least, most: "".join(draw.choice(list("abcdef"), draw.integers(least, most)))  # noqa: E731
    jsonl(place / "data.jsonl", [{"prompt": text(2, 5), "label": text(1, 6)} for _ in range(300)])
    jsonl(place / "no-gold.jsonl", [{"prompt": text(2, 5)} for _ in range(40)])
    jsonl(place / "long.jsonl", [{"prompt": "a" * 99, "label": "a"}] * 6)
    (place / "count.py").write_text(COUNT)
    (place / "notes.txt").write_text("mine")
    (place / "other/notes.txt").write_text("mine")
    before = dict(goodness="bradley-terry", max_prompt_tokens=61, select_by="win_rate")
    (place / "run/config.json").write_text(json.dumps(vars(brain.parse(good(output_dir="run"))) | before))
    for name in ("metrics.jsonl", "report.png", "toy.png", "notes.txt"):
        (place / "run" / name).write_text("old")
    return place


GOOD = dict(
    model="model", dataset="data.jsonl", reward_function="count.py:letters", output_dir="new", device="cpu",
    iterations=0, samples_per_prompt=2, eval_prompts=2, max_new_tokens=3, lora_rank=0,
)  # fmt: skip
SCORED, ON = dict(reward_function=None), dict(model="adapter", base_model="model", lora_rank=None)


def good(*more, **changes):
    """A command that runs, with changes: None takes a flag out, True gives it without a value."""
    given = {brain.flag(name): value for name, value in (GOOD | changes).items() if value is not None}
    words = [(name,) if value is True else (name, str(value)) for name, value in given.items()]
    return [*itertools.chain(*words), *more]


def tree(path):
    files = [file for file in path.rglob("*") if "__pycache__" not in str(file)]
    return {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in files}


REFUSED = [  # arguments, then what the one line on stderr must name
    (good(samples_per_prompt=1), "--samples-per-prompt 1:", "at least 2"),
    (good(learning_rate=0), "--learning-rate 0.0:", "above 0"),
    (good(learning_rate="nan"), "--learning-rate nan:", "above 0"), (good(beta=0), "--beta 0.0:", "above 0"),
    (good(adam_beta1=1), "--adam-beta1 1.0:", "below 1"), (good(seed=2**64), f"--seed {2**64}:", "below"),
    (good(method="dpo-sft", samples_per_prompt=3), "--samples-per-prompt 3:", "dpo-sft", "even"),
    (good("--smaples", "4"), "--smaples 4:", "no such flag", "--help"),
    (good("--max-new", "3"), "--max-new 3:", "no such flag"),
    (good(method="ppo"), "--method", "ppo", "brain-no-baseline", "rso"),
    (good(lr_scheduler_type="cosin"), "--lr-scheduler-type", "cosin", "cosine"),
    (good(device="gpu"), "--device gpu:", "cuda:1"),
    (good(device="cuda"), "--device cuda:", "no such GPU", "--device cpu"),
    (good(dataset=None), "--dataset: missing"),
    (good(reward_function=None), "--reward-model or --reward-function"),
    (good(reward_model="reward"), "--reward-model or --reward-function", "not both"),
    (good(reward_template="{output}"), "--reward-template:", "--reward-model", "leave it out"),
    (good(**SCORED, reward_model="r", reward_template="{prompt}"), "--reward-template {prompt}:", "{output}"),
    (good(**SCORED, reward_model="r", reward_template="{x}{output}"), "--reward-template", "no other braces"),
    (good(resume=True, overwrite=True), "--resume", "--overwrite"),
    (good(resume=True, output_dir=None), "--resume:", "--output-dir"),
    (good(greedy=True, select_by="elbo"), "--select-by elbo:", "--greedy"),
    (good(load_in_4bit=True), "--load-in-4bit:"),
    (good(dataset="no-gold.jsonl", select_by="win_rate"), "--select-by win_rate:", "gold"),
    (good(model="nosuch"), "--model nosuch:"), (good(model="no-words"), "--model no-words:", "--tokenizer"),
    (good(tokenizer="nosuch"), "--tokenizer nosuch:"), (good(tokenizer="no-end"), "end token"),
    (good(model="no-end"), "--model no-end:", "end token"),
    (good(model="t5"), "--model t5:", "not a causal LM"), (good(model="unknown"), "--model unknown:"),
    (good(model="evil-model"), "--model evil-model:", "code"),
    (good(model="reward"), "--model reward:", "lm_head.weight"),
    (good(max_new_tokens=64), "--max-new-tokens 64:", "context of 64"),
    (good(base_model="model"), "--base-model:", "model is not an adapter"),
    (good(**ON | dict(base_model=None)), "--model adapter:", "--base-model"),
    (good(**ON | dict(lora_rank=8)), "--lora-rank:", "adapter", "leave it out"),
    (good(**ON, lora_alpha=8), "--lora-alpha:", "adapter"),
    (good(**ON | dict(base_model="nosuch")), "--base-model nosuch:"),
    (good(**ON | dict(base_model="narrow")), "--model adapter:", "does not fit narrow", "--base-model"),
    (good(**ON | dict(model="evil-adapter")), "--model evil-adapter:", "code"),
    (good(reward_function="nosuch.py:f"), "--reward-function nosuch.py:f:", "file.py:name"),
    (good(reward_function="count.py:number"), "--reward-function count.py:number:", "no function number"),
    (good(reward_function="count.py:short", output_dir="run", overwrite=True), "count.py:short:", "finite"),
    (good(**SCORED, reward_model="three"), "--reward-label", "LABEL_0"),
    (good(**SCORED, reward_model="model"), "--reward-model model:", "score.weight"),
    (good(**SCORED, reward_model="evil-reward"), "--reward-model evil-reward:", "code"),
    (good(**SCORED, reward_model="evil.bin"), "--reward-model evil.bin:", "--reward-base"),
    (good(**SCORED, reward_model="evil.bin", reward_base="model"), "--reward-model", "evil.bin:", "code"),
    (good(dataset="nosuch.jsonl"), "--dataset nosuch.jsonl:", "no such file"),
    (good(dataset="long.jsonl"), "--dataset long.jsonl:", "longer than 61 tokens", "--max-prompt-tokens"),
    (good(output_dir="run"), "--output-dir run:", "--resume", "--overwrite"),
    (good(output_dir="other", overwrite=True), "--output-dir other:", "other files"),
    (good(output_dir="model", overwrite=True), "--output-dir model:", "other files"),
    (good(output_dir="notes.txt/run"), "--output-dir notes.txt/run:"),
    (good(output_dir="other", resume=True), "--resume: other", "no run"),
    (good(output_dir="run", resume=True, seed=1, method="rso"), "--resume:", "--method, --seed"),
    (good(output_dir="run", resume=True, goodness="logistic"), "--resume:", "another --goodness;"),
    *[([brain.flag(name), TYPED[name]], f"{brain.flag(name)}: the toy world") for name in TYPED
      if re.match("base_model|tokenizer|reward|dataset|pairs", name)],
    *[(words.split(), words.split()[0], "the toy world") for words in (
        "--reward-function f.py:f", "--lora-rank 8", "--load-in-4bit", "--device cuda", "--max-new-tokens 6",
    )],
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1])
def test_bad_input(case, mine, without_gpu, monkeypatch, capsys):
    """Exit code 2, one line that names the flag and a mend, nothing written, and no code of a checkpoint run.
    Wrong: a traceback, another flag's name, a directory made too early, a pickle or a Python file opened."""
    words, *told = case
    monkeypatch.chdir(mine)
    before = tree(mine)
    assert brain.main(words) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("brain: ")]
    assert len(lines) == 1 and error.endswith(lines[0] + "\n") and "Traceback" not in error
    assert all(text in lines[0] for text in told), lines[0]
    assert tree(mine) == before


ENDINGS = [(brain.UserError("mend"), 2, "mend"), (torch.OutOfMemoryError("full"), 2, "--outputs-per-forward"),
           (KeyboardInterrupt(), 130, "--resume")]  # fmt: skip


@pytest.mark.parametrize("error, code, told", ENDINGS)
def test_every_error_has_its_exit_code(error, code, told, monkeypatch, capsys):
    """Wrong: a GPU that is full, or an interruption, as a traceback or with another code."""
    monkeypatch.setattr(brain, "execute", lambda settings: (_ for _ in ()).throw(error))
    assert brain.main([]) == code and told in capsys.readouterr().err


def test_a_run_is_overwritten_resumed_and_left_alone(mine, tmp_path, monkeypatch, capsys):
    """Wrong: old files beside new ones, a user's notes gone, a finished run begun again, `--resume` refused
    for settings that the first run settled by itself, or that are free."""
    monkeypatch.chdir(mine)
    shutil.copytree(mine / "run", tmp_path / "run")
    words = good(output_dir=tmp_path / "run", max_prompt_tokens=500)  # of which a context of 64 leaves 61
    assert brain.main([*words, "--overwrite"]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == FINISHED | {"notes.txt"} and (tmp_path / "run/report.png").read_bytes()[1:4] == b"PNG"
    config = json.loads((tmp_path / "run/config.json").read_text())
    settled = dict(max_prompt_tokens=61, goodness="bradley-terry", select_by="win_rate")
    expected = vars(brain.parse([*words, "--overwrite"])) | settled | dict(torch=torch.__version__)
    assert {name: config[name] for name in expected} == expected
    before = tree(tmp_path / "run")
    assert brain.main([*words, "--resume"]) == 0
    assert "this run is finished" in capsys.readouterr().out and tree(tmp_path / "run") == before
    (tmp_path / "run/report.png").unlink()
    (tmp_path / "run/test_outputs.jsonl").unlink()
    assert brain.main([*words, "--resume", "--outputs-per-forward", "1"]) == 0
    assert [line["split"] for line in jsonl(tmp_path / "run/metrics.jsonl")] == ["validation", "test"]
    file = tmp_path / "run/test_outputs.jsonl"
    assert before[file][1] == file.read_bytes()


def follows_from_its_samples(run, n):
    """alpha_hat follows from rewards (eq. 6); in round 1 q' = p exactly, and at first beta_hat = 1/n."""
    lines = jsonl(run / "samples.jsonl")
    for (t, _), some in itertools.groupby(lines, lambda line: (line["iteration"], line["row"])):
        names = ("reward", "log_p", "log_q_proposal", "alpha_hat")
        reward, log_p, log_q, alpha_hat = np.array([[line[name] for name in names] for line in some]).T
        assert alpha_hat == pytest.approx(softmax(log_p - log_q + reward), abs=1e-6) and len(reward) == n
        assert t > 1 or (log_p == log_q).all()
    first = next(line for line in jsonl(run / "metrics.jsonl") if line["step"] == 1)
    assert abs(first["kl_to_prior"]) < 1e-6 and first["ess_beta"] == pytest.approx(n, rel=1e-6)
    return lines


def log_p_by_hand(model, words, lines):
    """log p of the first lines by plain forwards, over the ids that the tokenizer has."""
    for line in lines[:10]:
        prompt, output = torch.tensor(words(line["prompt"]).input_ids), torch.tensor(line["output_ids"])
        assert output.max() < len(words)
        with torch.no_grad():
            assert line["log_p"] == pytest.approx(plain(model, prompt, output, len(words)).item(), abs=2e-3)


def model_with_adapter(base, adapter):
    """By peft alone."""
    import peft

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_the_papers_summarisation_command(hub, tmp_path):
    """In a process of its own, made small by flags. Wrong: a companion lost, 500 or 50 forgotten, a file
    lost or left elsewhere, another template, a reward at another token or in float16, a size of two labels,
    the 9 logits without a token, an adapter saved without its base."""
    run = tmp_path / "run"
    (tmp_path / "cwd").mkdir()
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    theirs |= dict(HF_HOME=str(hub), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    words = [sys.executable, HERE / "brain.py", "--model", SFT, *SMALL, "--output-dir", str(run)]
    process = subprocess.run(words, cwd=tmp_path / "cwd", env=theirs, capture_output=True, text=True)
    assert process.returncode == 0 and "brain:" not in process.stderr, process.stderr
    assert {path.name for path in run.iterdir()} == FINISHED and not list((tmp_path / "cwd").iterdir())
    config = json.loads((run / "config.json").read_text())
    expected = DEFAULTS | SFT_COMPANIONS | dict(model=SFT, goodness="bradley-terry", select_by="win_rate")
    expected |= dict(iterations=1, prompts_per_iteration=4, updates_per_iteration=2, eval_every=2)
    expected |= dict(batch_size=3, samples_per_prompt=5, output_dir=str(run))
    assert {name: config[name] for name in expected} == expected
    for what, name in (("policy and prior", SFT), ("reward", SFT_REWARD)):
        tensors = torch.load(snapshot(hub, name) / "pytorch_model.bin", weights_only=True)
        count = sum(w.numel() for name, w in tensors.items() if not re.search(r"attn\.(masked_)?bias", name))
        assert f"GB  {what}: {name}, {count:,} parameters\n" in process.stdout
    steps = [(line["step"], line.get("split")) for line in jsonl(run / "metrics.jsonl")]
    assert steps == [(0, "validation"), (0, None), (1, None), (2, None), (2, "validation"), (2, "test")]
    words = transformers.AutoTokenizer.from_pretrained(snapshot(hub, GPTJ))
    samples, tests = follows_from_its_samples(run, 5), jsonl(run / "test_outputs.jsonl")
    texts = [(line["prompt"] + line["output"], line["reward"]) for line in samples + tests]
    texts += [(line["prompt"] + line["gold"], line["gold_reward"]) for line in tests]
    ids = [words("<|startoftext|>" + text).input_ids for text, _ in texts]
    config = transformers.GPTJConfig.from_pretrained(snapshot(hub, SFT))
    rewards = score_by_hand(config, snapshot(hub, SFT_REWARD) / "pytorch_model.bin", ids)
    assert [reward for _, reward in texts] == pytest.approx(rewards, abs=1e-4) and np.std(rewards) > 0.1
    assert [line["prompt"] + line["gold"] for line in tests] == [
        f"{post}\nTL;DR: {text}" for post, text in zip(POSTS[8:], SUMMARIES[8:])]  # fmt: skip
    log_p_by_hand(AutoModelForCausalLM.from_pretrained(snapshot(hub, SFT)).eval(), words, samples)
    lora = model_with_adapter(snapshot(hub, SFT), run / "model").peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.base_model_name_or_path) == (8, 32, 0.0, SFT)


def test_the_papers_dialogue_command(hub, tmp_path, monkeypatch, capsys):
    """An adapter is the prior, a second one the policy; the reward is read at the end token. Wrong: p of the
    base alone, rank 8, both adapters together, the prior's saved, none trained, 500 not cut."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "datasets")
    with pytest.raises(brain.UserError, match="--lora-rank: .*leave it out"):
        brain.parse(["--model", HH, "--lora-rank", "8"])
    small, run = [*SMALL, "--learning-rate", "1e-3", "--max-new-tokens", "12", "--greedy"], tmp_path / "run"
    assert brain.main(["--model", HH, *small, "--output-dir", run]) == 0
    config = json.loads((run / "config.json").read_text())
    expected = HH_COMPANIONS | dict(lora_rank=64, lora_alpha=16, max_new_tokens=12, max_prompt_tokens=188)
    assert {name: config[name] for name in expected} == expected
    assert "validation: not in the data; 1 rows of train" in capsys.readouterr().out
    evaluations = [line for line in jsonl(run / "metrics.jsonl") if "split" in line]
    assert all("win_rate" in line and not {"kl_to_prior", "elbo"} & set(line) for line in evaluations)
    words = transformers.AutoTokenizer.from_pretrained(snapshot(hub, LLAMA_7B))
    lines = follows_from_its_samples(run, 5)
    gptj = transformers.GPTJConfig.from_pretrained(snapshot(hub, GPTJ))
    ids = [words(line["prompt"] + line["output"] + "<|endoftext|>").input_ids for line in lines]
    rewards = score_by_hand(gptj, snapshot(hub, HH_REWARD) / "hf_ckpt.pt", ids)
    assert [line["reward"] for line in lines] == pytest.approx(rewards, abs=1e-4) and np.std(rewards) > 0.1
    base = snapshot(hub, LLAMA_7B)
    prior, policy = model_with_adapter(base, snapshot(hub, HH)), model_with_adapter(base, run / "model")
    log_p_by_hand(prior, words, lines)
    lora = policy.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.base_model_name_or_path) == (64, 16, LLAMA_7B)
    for line in jsonl(run / "test_outputs.jsonl"):
        ids = words(line["prompt"], return_tensors="pt").input_ids
        output = policy.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert line["output"] == words.decode(output, skip_special_tokens=True)
    pairs = list(zip(prior.parameters(), policy.parameters()))
    assert evaluations[-1]["step"] == 2 and not all(torch.equal(*pair) for pair in pairs)


def test_ones_own_model_learns(mine, tmp_path, monkeypatch, capsys):
    """By a reward function, on a .jsonl without splits; model/ alone gives the test's outputs. Wrong: a
    loss of the wrong sign, prior and policy swapped, rewards of other outputs, an old proposal."""
    monkeypatch.chdir(mine)
    run = tmp_path / "run"
    more = dict(iterations=2, prompts_per_iteration=32, updates_per_iteration=20, output_dir=run)
    more |= dict(batch_size=4, samples_per_prompt=8, learning_rate=0.003, max_new_tokens=6, eval_prompts=0)
    assert brain.main(good(**more)) == 0
    metrics, tests = jsonl(run / "metrics.jsonl"), jsonl(run / "test_outputs.jsonl")
    (first, _, last), test = [line for line in metrics if line.get("split") == "validation"], metrics[-1]
    assert test["win_rate"] > first["win_rate"] + 20 and last["reward"] > first["reward"] + 2
    assert abs(first["kl_to_prior"]) < 1e-4 < 0.5 < last["kl_to_prior"]
    assert last["self_normalized_kl"] < first["self_normalized_kl"] / 2 and last["elbo"] > first["elbo"] + 0.5
    samples = follows_from_its_samples(run, 8)
    assert len(samples) == 2 * 32 * 8
    assert np.mean([line["log_q_proposal"] - line["log_p"] for line in samples[256:]]) > 0.2
    assert all(line["reward"] == 2 * line["output"].count("a") for line in samples + tests)
    assert all(line["gold_reward"] == 2 * line["gold"].count("a") for line in tests)
    again = dict(iterations=0, model=run / "model", output_dir=tmp_path / "again")
    assert brain.main(good(**more | again)) == 0
    assert jsonl(tmp_path / "again/test_outputs.jsonl") == tests and len(tests) == 27
    assert "0 rounds" in capsys.readouterr().out


def test_chat_models(tmp_path):
    """Messages go through the policy's chat template, and through the reward model's, the output as reply.
    Wrong: one template for both, no opening for a reply, the output outside of its turn."""
    opening = "{% if add_generation_prompt %}<assistant>{% endif %}"
    templates = {
        "policy": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + opening,
        "reward": "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}",
    }
    texts = [*ANIMALS, "is be kind big? yes no", "<system> <user>\n", "assistant:;"]
    words = {name: bpe_of(texts, 60, chat_template=template) for name, template in templates.items()}
    sizes = LLAMA | dict(max_position_embeddings=300, vocab_size=len(words["policy"]), pad_token_id=0) | ENDS
    model = loud(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), 1, 0.2)
    one = transformers.LlamaConfig(**sizes, num_labels=1)
    scorer = loud(transformers.LlamaForSequenceClassification(one), 2)
    for name, saved in (("policy", model), ("reward", scorer)):
        saved.save_pretrained(tmp_path / name)
        words[name].save_pretrained(tmp_path / name)
    message = lambda role, content: {"role": role, "content": content}  # noqa: E731
    asked = [[message("system", "be kind"), message("user", f"is {a} big?")] for a in ANIMALS]
    gold = [message("assistant", "yes")]
    jsonl(tmp_path / "data.jsonl", [{"prompt": question, "completion": gold} for question in asked])
    more = dict(reward_function=None, iterations=1, updates_per_iteration=1, prompts_per_iteration=4)
    places = dict(model="policy", reward_model="reward", dataset="data.jsonl", output_dir="run")
    assert brain.main(good(**more | {name: tmp_path / place for name, place in places.items()})) == 0
    samples, tests = follows_from_its_samples(tmp_path / "run", 2), jsonl(tmp_path / "run/test_outputs.jsonl")
    scores = [(line["prompt"], line["output"], line["reward"]) for line in samples + tests]
    scores += [(line["prompt"], "yes", line["gold_reward"]) for line in tests]
    for (system, user), reply, value in scores:
        text = f"system: {system['content']};user: {user['content']};assistant: {reply};"
        with torch.no_grad():
            hidden = scorer.model(torch.tensor([words["reward"](text).input_ids])).last_hidden_state[0, -1]
        assert value == pytest.approx((scorer.score.weight[0] @ hidden).item(), abs=1e-4)
    assert np.std([value for *_, value in scores]) > 0.1
    for line in samples:
        line["prompt"] = f"<system>be kind\n<user>{line['prompt'][1]['content']}\n<assistant>"
    log_p_by_hand(model, words["policy"], samples)


def test_the_default_run_lands_on_the_posterior(tmp_path, monkeypatch, capsys):
    """`python brain.py`. KL(posterior || policy) falls below 0.2, and the policy has the posterior's reward,
    win-rate and KL to the prior: an argmax goes past them. Wrong: weights, loss, sampler or loop with another
    optimum; estimates of another model or sign; a table that is not of model/."""
    monkeypatch.chdir(tmp_path)
    assert brain.main([]) == 0
    captured = capsys.readouterr()
    rows = re.findall(r"^  (\S.*?)  +(\S.*)$", captured.out, re.M)
    found = {name: [float(x) for x in re.findall(r"-?\d+\.\d+", numbers)] for name, numbers in rows}
    before, after, exact = found["KL(posterior || it), nats"]
    assert exact == 0 and after < 0.2 < before / 5 and "brain:" not in captured.err
    near = {"KL(it || prior), nats": 0.25, "E[r]": 0.3, "win-rate against the prior, %": 3}
    for name, within in near.items():
        prior, policy, posterior = found[name]
        assert abs(policy - posterior) < within < (posterior - prior) / 4
    (elbo, estimate, error), (evidence, bound) = found["elbo"], found["log evidence (estimate: bound)"]
    distance, gap = found["KL(policy || posterior)"]
    assert 0.02 < error < 0.2 and abs(estimate - elbo) < 2 * error and abs(bound - evidence) < 2 * error
    assert abs(gap - distance) < error and distance == pytest.approx(evidence - elbo, abs=2e-3)
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"toy-brain-\d{8}-\d{6}", run.name) and len(list(tmp_path.iterdir())) == 1
    assert {path.name for path in run.iterdir()} == FINISHED | {"toy.png"}
    world = toy_world.Toy()
    log_q = world.world.log_probs(AutoModelForCausalLM.from_pretrained(run / "model"))
    assert toy_world.kl(world.log_posterior, log_q).mean() == pytest.approx(after, abs=2e-3)
    assert len(jsonl(run / "samples.jsonl")) == 6 * 128 * 32 and len(jsonl(run / "test_outputs.jsonl")) == 256
