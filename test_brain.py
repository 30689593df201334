"""The claims of brain.py, each a test, in the order of that file.

A docstring names the wrong version that its test catches. What can be enumerated is enumerated, in float64,
by code that shares nothing with what it checks: numpy, toy/world.py, plain Hugging Face forwards.
"""

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
import subprocess
import sys
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches out

import datasets
import huggingface_hub
import numpy as np
import peft
import pytest
import safetensors.torch
import tokenizers
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
    "llama, made of a mistral": (transformers.LlamaConfig, LLAMA | dict(sliding_window=12)),  # not used
    "opt": (transformers.OPTConfig, dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                         num_attention_heads=4, max_position_embeddings=64,
                                         word_embed_proj_dim=32)),
    "gemma2": (transformers.Gemma2Config, LLAMA | dict(head_dim=8, sliding_window=5)),
    "bloom": (transformers.BloomConfig, dict(hidden_size=32, n_layer=2, n_head=4)),
    "mamba": (transformers.MambaConfig, dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
}  # fmt: skip


def tiny(family="gpt2", seed=0, vocab=10, dtype=DOUBLE, scale=0.3, **changes):
    """A causal LM with random weights. They are large, so it is far from uniform. Dropout is 0.1."""
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
    """log-probability of one output by a plain forward of the whole sequence, without ids from `known` on."""
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


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_goodness(dtype):
    """Eq. 15 and 19, divided by beta. Wrong: sigmoid(r) itself; its logarithm by way of it, -inf at -1e4; a
    factor beta; beta inside the sigmoid; another default than Bradley-Terry with beta 1."""
    r = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4], dtype=dtype)
    assert torch.equal(brain.log_goodness(r), r) and torch.equal(brain.log_goodness(r, beta=4.0), r / 4)
    expected = np.array([-1e4, -math.log1p(math.exp(3)), -math.log(2), -math.log1p(math.exp(-2)), 0.0])
    np.testing.assert_allclose(brain.log_goodness(r, "logistic"), expected, rtol=1e-6)
    np.testing.assert_allclose(brain.log_goodness(r, "logistic", 0.5), 2 * expected, rtol=1e-6)
    with pytest.raises(ValueError, match="logistic"):
        brain.log_goodness(r, "bradley")


def test_weights_are_eq_6_and_11():
    """Against numpy, with leading axes. Wrong: the sign of log q', normalisation over prompts, p forgotten,
    the sum of squares for the effective sample size."""
    log_p, log_q, log_q_proposal, r = (random(2, 3, 5, seed=s) for s in range(4))
    raw = (log_p + r).exp() / log_q_proposal.exp(), log_q.exp() / log_q_proposal.exp(), r.exp()
    found = brain.posterior_weights(log_p, log_q_proposal, r), brain.policy_weights(log_q, log_q_proposal)
    for weights, by_hand in zip((*found, brain.posterior_weights(log_p, log_p, r)), raw):  # last: eq. 21
        np.testing.assert_allclose(weights, by_hand / by_hand.sum(-1, keepdim=True), rtol=1e-12)
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
    """Eq. 14 by hand. Wrong: arguments swapped, 0 log 0 = nan, a sum over prompts."""
    a, b = (random(4, 5, seed=s).softmax(-1) for s in (1, 2))
    np.testing.assert_allclose(brain.self_normalized_kl(a, b), (a * (a / b).log()).sum(-1), rtol=1e-12)
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
    each = [brain.brain_loss(log_q[y], log_q_proposal[y], a) for y, a in zip(tuples, alpha_hat)]
    loss = chance @ torch.stack(each)
    loss.backward()
    posterior = toy_world.posterior(log_p.numpy(), r.numpy())
    numbers = posterior, log_q.detach().numpy(), log_q_proposal.numpy(), n
    assert loss.item() == pytest.approx(toy_world.d_n(*numbers), rel=1e-12, abs=1e-15)
    np.testing.assert_allclose(logits.grad, toy_world.d_n_coefficients(*numbers), atol=1e-14)


def test_at_the_posterior_only_eq_12_is_zero():
    """For each triple of draws eq. 12 is zero. Eq. 7 is zero for none, nor on average: self-normalised
    weights are biased. Wrong: alpha_hat and beta_hat that are not relative to the same q'."""
    log_p, log_q_proposal, r = (random(4, seed=s).log_softmax(-1) for s in (1, 2, 3))
    posterior = torch.tensor(toy_world.posterior(log_p.numpy(), r.numpy()))
    y, chance = all_tuples(log_q_proposal, 3)
    alpha_hat, gradients = brain.posterior_weights(log_p[y], log_q_proposal[y], r[y]), []
    for baseline in (True, False):
        logits = posterior.expand(len(y), 4).requires_grad_()
        loss = brain.brain_loss(logits.log_softmax(-1).gather(-1, y), log_q_proposal[y], alpha_hat, baseline)
        gradients += torch.autograd.grad(loss * len(y), logits)
    assert gradients[0].abs().max() < 1e-12
    assert gradients[1].abs().amax(-1).min() > 0.01 and (chance @ gradients[1]).abs().max() > 0.01


@pytest.mark.parametrize("beta", [1.0, 0.1, 3.0])
def test_theorem_6_1(beta):
    """n = 2, argmax, q' = p: value and gradient of DPO, with beta as a factor of each log-probability. Wrong:
    another default than 1, a division by beta, chosen and rejected swapped, a sum over pairs."""
    log_q, log_p = random(7, 2, seed=1).requires_grad_(), random(7, 2, seed=2)
    by_hand = -torch.sigmoid(beta * (log_q - log_p) @ torch.tensor([1.0, -1.0], dtype=DOUBLE)).log().mean()
    ours = brain.brain_loss(beta * log_q, beta * log_p, torch.tensor([1.0, 0.0], dtype=DOUBLE).expand(7, 2))
    dpo = brain.dpo_loss(*log_q.unbind(1), *log_p.unbind(1), *([] if beta == 1 else [beta]))
    expected = by_hand, *torch.autograd.grad(by_hand, log_q, retain_graph=True)
    for loss in (ours, dpo):
        found = loss, *torch.autograd.grad(loss, log_q, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("goodness, beta", [("bradley-terry", 0.5), ("logistic", 2.5)])
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
        found = chance @ brain.elbo(log_p[y], log_q[y], log_good[y])
        assert found.item() == pytest.approx(exact, rel=1e-12)
        found = brain.log_evidence(log_p[y], log_q[y], log_good[y])
        by_hand = np.log((joint / log_q.exp().numpy())[y].mean(-1))
        np.testing.assert_allclose(found, by_hand, rtol=1e-10, atol=1e-12)
        bounds.append((chance * found).sum().item())
    assert pytest.approx(exact, rel=1e-12) == bounds[0] < bounds[1] < bounds[2] < bounds[3] < evidence
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
    by_pair = softmax((log_p - log_q_proposal + r).numpy().reshape(3, 2)).reshape(-1)
    np.testing.assert_allclose(weigh("dpo-sft+iw", log_p, log_q_proposal), by_pair, rtol=1e-12)


def test_rejection_sampling():
    """With n = 1 the first candidate that a pass accepts is kept; its law by hand. Wrong: always the best;
    exp(g) not relative to the maximum of its pass; a candidate kept twice; torch's own state."""
    g, draws, generator = torch.tensor([0.0, -1.0, -2.0, 1.0, 0.5]) + 100, 4000, brain.seeded(9)
    first = [brain.rejection_sample(g, 1, generator).item() for _ in range(draws)]
    accept = np.exp(g.double().numpy() - 101)
    law = accept * np.cumprod([1, *(1 - accept[:-1])])
    assert abs(np.bincount(first, minlength=5) / draws - law).max() < 4 * math.sqrt(0.25 / draws)  # 4 errors
    second = [brain.rejection_sample(torch.tensor([0, -4, -4.5]), 2, generator)[1].item() for _ in range(200)]
    assert second.count(1) > 180  # the best of what is left is sure to be accepted; else 2 in two of five
    again = [brain.rejection_sample(g, 5, brain.seeded(2)).tolist() for _ in range(5)]
    assert again == again[:1] * 5 and sorted(again[0]) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------
# 3. Algorithm 1

LOOP_PROMPTS = [X, X2, *map(torch.tensor, ([5], [6, 2], [4, 4, 4, 1], [2], [1, 6, 3]))]
PAIRED, ARGMAX = ("dpo-sft+iw", "dpo-sft", "rso", "dpo"), ("dpo-sft", "rso", "dpo")
NUMBERS = ("reward", "log_p", "log_q_proposal", "alpha_hat")
flat = torch.nn.utils.parameters_to_vector


def loop_reward(prompt, texts, columns):
    """A reward that depends on all that it is given."""
    liked = [1.5 * y.count("a") - 0.8 * y.count("c") + 0.3 * len(y) * columns["weight"] for y in texts]
    return torch.tensor(liked, dtype=DOUBLE) - 0.1 * len(prompt)


def loop_data():
    """Seven prompts, human pairs, a column for the reward. An index is no row: other rows were left out."""
    pairs = [[torch.tensor([1, i % 6 + 1, 0]), torch.tensor([i % 5 + 1, 2, 3, 4])] for i in range(7)]
    more = [dict(prompt="p" * i, gold=None, pair=pairs[i], columns={"weight": i % 3}) for i in range(7)]
    return [brain.Example(row=3 * i + 1, ids=x, **more[i]) for i, x in enumerate(LOOP_PROMPTS)]


def loop_settings(**changes):
    """Settings of a short run, all numbers other than the defaults. D_1 is smaller than a batch."""
    sizes = dict(iterations=2, prompts_per_iteration=3, samples_per_prompt=4, updates_per_iteration=2, seed=5)
    rest = dict(batch_size=5, max_new_tokens=4, learning_rate=3e-3, weight_decay=0.3, adam_beta1=0.8)
    return brain.Settings(**dict(goodness="bradley-terry", adam_beta2=0.7) | sizes | rest | changes)


def loop_policy(size=0.05):
    """A policy that is not its prior any more."""
    policy = brain.Policy(tiny(), letters(), outputs_per_forward=3)
    for i, p in enumerate(policy.parameters().values()):
        p.data += random(*p.shape, seed=i, scale=size)
    return policy


class MemoryRun:
    """The smallest run around Algorithm 1. It takes down what it is told, and the parameters at that time."""

    def __init__(self, settings):
        self.k, self.samples, self.updates = settings.updates_per_iteration, [], []

    def start(self, policy, optimizer):
        self.policy, self.events = policy, ["start"]

    def collect(self, t, rows, draw):
        self.events.append((t, rows))
        self.samples += draw(rows)
        return self.samples[-len(rows) :]

    def steps(self, t):
        return range((t - 1) * self.k + 1, t * self.k + 1)

    def after_update(self, step, metrics):
        self.events.append(step)
        self.updates.append((metrics, flat(self.policy.parameters().values()).detach()))


def plain_log_probs(model, x, outputs):
    return torch.stack([plain(model, x, y, KNOWN) for y in outputs])


def outputs_by_hand(model, x, n, length, generator):
    """n outputs, token by token, each by a plain forward and the inverse of its distribution function."""
    outputs = []
    for uniform in torch.rand(n, length, dtype=DOUBLE, generator=generator):
        y = []
        while len(y) < length and 0 not in y:
            logits = model(input_ids=torch.tensor([x.tolist() + y])).logits[0, -1, :KNOWN]
            below = logits.softmax(-1).cumsum(-1)
            y.append(int((below <= uniform[len(y)] * below[-1]).sum()))
        outputs.append(torch.tensor(y))
    return outputs


@torch.no_grad()
def samples_by_hand(model, prior, data, i, t, s):
    """Lines 6 to 10 for prompt i, by plain forwards and numpy: the fields of Samples."""
    method, example, n = s.method, data[i], s.samples_per_prompt
    x, outputs, generator = example.ids, example.pair, brain.seeded(s.seed, brain.OUTPUTS, t, i)
    proposal = model if method.startswith("brain") else prior
    if method != "dpo":
        outputs = outputs_by_hand(proposal, x, 4 * n if method == "rso" else n, s.max_new_tokens, generator)
    texts = ["".join(" " + chr(96 + i) for i in y.tolist() if i) for y in outputs]
    r = loop_reward(example.prompt, texts, example.columns).numpy()
    log_good = np.log(goodness_by_hand(r, s.goodness, s.beta))
    if method == "rso":
        kept = brain.rejection_sample(torch.tensor(log_good), n, generator).tolist()
        outputs, texts = ([x[i] for i in kept] for x in (outputs, texts))
        r, log_good = r[kept], log_good[kept]
    log_p, log_q = (plain_log_probs(m, x, outputs).numpy() for m in (prior, proposal))
    score = (log_p - log_q + log_good).reshape(-1, 2 if method in PAIRED else len(outputs))
    alpha = softmax(score)
    if method in ARGMAX:
        best = score == score.max(-1, keepdims=True)
        alpha = np.array([[1.0, 0.0]]) if method == "dpo" else best / best.sum(-1, keepdims=True)
    numbers = dict(zip(NUMBERS, (r, log_p, log_q, alpha.reshape(-1))))
    return dict(iteration=t, example=example, outputs=outputs, texts=texts) | numbers


def gradient_by_hand(model, batch, s):
    """Leaves minus eq. 12 or 7, averaged over prompts and pairs, in the model. -> metrics of the batch"""
    lines, eq_7, scale = [], s.method == "brain-no-baseline", s.beta if s.method in ARGMAX else 1.0
    model.zero_grad()
    for samples in batch:
        log_q = plain_log_probs(model, samples["example"].ids, samples["outputs"])
        shape = (-1, 2 if s.method in PAIRED else len(log_q))
        q = log_q.detach().numpy().reshape(shape)
        p, proposal, alpha = (samples[name].reshape(shape) for name in NUMBERS[1:])
        beta, tempered = softmax(q - proposal), softmax(scale * (q - proposal))
        force = -alpha if eq_7 else scale * (tempered - alpha)  # minus eq. 7, minus eq. 12
        (torch.tensor(force.reshape(-1)) @ log_q / len(alpha) / len(batch)).backward()
        logs = np.log(np.where(alpha > 0, alpha, 1)) - np.log(tempered)
        line = {"loss": (alpha * (-q if eq_7 else logs)).sum(-1).mean(), "reward": samples["reward"].mean()}
        line |= {"ess_alpha": (1 / (alpha**2).sum(-1)).mean(), "ess_beta": (1 / (beta**2).sum(-1)).mean()}
        line |= {"ended": np.mean([y[-1].item() == 0 for y in samples["outputs"]])}
        line |= {} if s.method in ("rso", "dpo") else {"kl_to_prior": (beta * (q - p)).sum(-1).mean()}
        lines.append(line | {"max_weight": max(alpha.max(), beta.max())})
    metrics = {name: np.mean([line[name] for line in lines]) for name in lines[0]}
    norm = math.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    return metrics | {"max_weight": max(line["max_weight"] for line in lines), "grad_norm": norm}


def train_by_hand(model, prior, data, s):
    """Algorithm 1 with Loshchilov and Hutter's AdamW and a linear schedule. -> samples, and for each update
    its metrics and the parameters after it"""
    buffer, updates, moments = [], [], {}
    k, b1, b2 = s.updates_per_iteration, s.adam_beta1, s.adam_beta2
    for t in range(1, s.iterations + 1):
        rows = brain.random_subset(len(data), s.prompts_per_iteration, s.seed, brain.PROMPTS, t)
        buffer += [samples_by_hand(model, prior, data, i, t, s) for i in rows]
        for step in range((t - 1) * k + 1, t * k + 1):
            chosen = brain.random_subset(len(buffer), s.batch_size, s.seed, brain.BATCHES, step)
            metrics = gradient_by_hand(model, [buffer[i] for i in chosen], s)
            rate = s.learning_rate * (1 - (step - 1) / (s.iterations * k))
            for name, p in model.named_parameters():
                m, v = moments.get(name, (0.0, 0.0))
                moments[name] = m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
                change = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + 1e-8)
                p.data = p.data * (1 - rate * s.weight_decay) - rate * change
            updates.append((metrics, flat(model.parameters()).detach()))
    return buffer, updates


RUNS_BY_HAND = [
    ("brain", "bradley-terry", 1.0), ("brain", "logistic", 2.5), ("brain-no-baseline", "logistic", 0.5),
    ("dpo-sft+iw+n", "logistic", 0.5), ("dpo-sft+iw", "bradley-terry", 2.0), ("rso", "logistic", 0.5),
    ("dpo-sft", "bradley-terry", 2.0), ("dpo", "bradley-terry", 0.1),
]  # fmt: skip


@pytest.mark.parametrize("method, goodness, beta", RUNS_BY_HAND)
def test_algorithm_1_by_hand(method, goodness, beta):
    """Two whole rounds again by plain forwards and numpy: what is cached, what is told of each update, the
    parameters then. The policy starts away from p. Wrong: a first proposal that is p; one that is never
    renewed, or not p where a method fixes it; log q' of old samples taken anew; D_t emptied; a seed without
    the round or the prompt; beta or goodness ignored; a loss summed over prompts or pairs, or divided by
    --batch-size; eq. 7 for eq. 12; gradients clipped, or kept between updates; decay in the gradient; Adam's
    betas swapped; a diagnostic of the wrong weights; an update that is told before it is done."""
    policy, data, n = loop_policy(), loop_data(), 2 if method == "dpo" else 4
    s = loop_settings(method=method, goodness=goodness, beta=beta, samples_per_prompt=n)
    model, prior, run = copy.deepcopy(policy.model), copy.deepcopy(policy.prior_model), MemoryRun(s)
    assert brain.train(policy, loop_reward, data, s, run) is policy
    samples, updates = train_by_hand(model, prior, data, s)
    for got, expected in zip(map(vars, run.samples), samples, strict=True):
        assert got.keys() == expected.keys() and got.pop("example") is expected.pop("example")
        for name in NUMBERS:
            assert not got[name].requires_grad
            np.testing.assert_allclose(got.pop(name), expected.pop(name), rtol=0, atol=1e-8, err_msg=name)
        assert all(map(torch.equal, got.pop("outputs"), expected.pop("outputs"))) and got == expected
    for (got, moved), (expected, by_hand) in zip(run.updates, updates, strict=True):
        assert got == pytest.approx(expected, rel=1e-7, abs=1e-7)
        # Adam divides a gradient that is zero but for rounding by its epsilon, 1e-8.
        torch.testing.assert_close(moved, by_hand, rtol=0, atol=1e-7)
    assert torch.equal(flat(policy.prior_model.parameters()), flat(prior.parameters()))
    rounds = [(t, brain.random_subset(7, 3, 5, brain.PROMPTS, t)) for t in (1, 2)]
    assert run.events == ["start", rounds[0], 1, 2, rounds[1], 3, 4]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing(where):
    """It raises and names the rows of its batch. Wrong: a check after the step, of the loss alone, or of the
    last prompt; AdamW's moments spoiled; indices for rows."""
    policy, data, s = loop_policy(), loop_data(), loop_settings()
    batch = [brain.collect(policy, loop_reward, [data[i]], s, "policy", [brain.seeded(i)])[0] for i in (4, 1)]
    optimizer, before = torch.optim.AdamW(policy.parameters().values()), flat(policy.parameters().values())
    if where == "loss":
        batch[0].log_q_proposal[0] = math.nan
    else:
        list(policy.parameters().values())[-1].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"not finite for rows \[13, 4\]"):
        brain.update(policy, optimizer, batch, s)
    assert torch.equal(flat(policy.parameters().values()), before) and not optimizer.state


def test_beta_hat_is_one_over_n_until_the_policy_moves():
    """For a drifted policy that is its own proposal, to the last bit. Wrong: other code for log q'."""
    policy, s = loop_policy(), loop_settings()
    samples = brain.collect(policy, loop_reward, [loop_data()[4]], s, "policy", [brain.seeded(1)])[0]
    assert torch.equal(policy.log_prob(LOOP_PROMPTS[4], samples.outputs), samples.log_q_proposal)
    assert (samples.log_q_proposal - samples.log_p).abs().max() > 0.1


RATES_BY_HAND = [  # schedule, updates of warm-up, share of the learning rate at each of 8 updates
    (None, 0, [1 - i / 8 for i in range(8)]), ("linear", 4, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ("cosine", 0, [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)]),
    ("constant", 0, [1] * 8), ("constant_with_warmup", 2, [0, 0.5, 1, 1, 1, 1, 1, 1]),
    ("inverse_sqrt", 2, [0, 0.5, *(math.sqrt(2 / i) for i in range(2, 8))]),
]  # fmt: skip


@pytest.mark.parametrize("name, warmup, by_hand", RATES_BY_HAND)
def test_learning_rates(name, warmup, by_hand, monkeypatch):
    """What AdamW has at each update, over all rounds together, to zero at the update after the last. Wrong: a
    schedule for each round anew; one update early or late; no warmup; another default than linear."""
    named, rates = dict(lr_scheduler_type=name, warmup_steps=warmup) if name else {}, []
    s = loop_settings(iterations=2, updates_per_iteration=4, learning_rate=2e-3, **named)
    monkeypatch.setattr(brain, "collect", lambda _, __, examples, *___: examples)
    monkeypatch.setattr(brain, "update", lambda _, adam, *__: rates.append(adam.param_groups[0]["lr"]))
    brain.train(loop_policy(), loop_reward, loop_data(), s, MemoryRun(s))
    assert rates == pytest.approx([2e-3 * x for x in by_hand], rel=1e-12)
    assert {x for x, *_ in RATES_BY_HAND if x} == set(brain.SCHEDULES)


def test_random_numbers_come_from_their_indices():
    """Same indices, same numbers; any other, others. Subsets are uniform, without repetition. Wrong: one seed
    for two purposes; indices summed or joined; torch's own state; draws with replacement; a sorted subset."""
    draw = lambda *numbers: tuple(torch.rand(3, generator=brain.seeded(*numbers)).tolist())  # noqa: E731
    indices = [(3, 1), (1, 3), (31,), (4,), (3, 1, 1), (3, 2), (13, 1), (1, 31)]
    first = [draw(*i) for i in indices]
    torch.manual_seed(2)
    assert [draw(*i) for i in indices] == first and len(set(first)) == len(indices)
    assert len({brain.PROMPTS, brain.OUTPUTS, brain.BATCHES, brain.HELD_OUT}) == 4
    subsets = np.array([brain.random_subset(6, 3, 8, i) for i in range(1200)])
    assert all(len(set(subset)) == 3 for subset in subsets) and subsets.max() == 5
    shares = np.stack([np.bincount(column, minlength=6) / 1200 for column in subsets.T])
    assert abs(shares - 1 / 6).max() < 4.5 * math.sqrt(5 / 36 / 1200)  # four and a half standard errors
    assert sorted(brain.random_subset(4, 9, 0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["brain", "brain-no-baseline", "dpo-sft"])
def test_held_out_divergence_is_d_n_for_every_method(method):
    """D_KL(alpha_hat || beta_hat) over all n outputs. Wrong: pairs, an argmax or no baseline where the method
    has them; the cached alpha_hat; goodness or beta of the run ignored; p for q_theta or for q'; a graph."""
    policy, moved, graphs = loop_policy(), loop_policy(0.1), []
    s = loop_settings(method=method, goodness="logistic", beta=0.5)
    samples = brain.collect(policy, loop_reward, [loop_data()[6]], s, "policy", [brain.seeded(6)])[0]
    samples.alpha_hat, log_prob = torch.full((4,), math.nan), moved.log_prob
    moved.log_prob = lambda *a, **k: (graphs.append(torch.is_grad_enabled()), log_prob(*a, **k))[1]
    found = brain.held_out_divergence(moved, samples, s)
    x, y, good = samples.example.ids, samples.outputs, goodness_by_hand(samples.reward, "logistic", 0.5)
    models = policy.prior_model, policy.model, moved.model
    log_p, log_q_proposal, log_q = (plain_log_probs(model, x, y).detach().numpy() for model in models)
    alpha, beta = softmax(log_p - log_q_proposal + np.log(good)), softmax(log_q - log_q_proposal)
    assert isinstance(found, float) and graphs == [False]
    assert found == pytest.approx((alpha * np.log(alpha / beta)).sum(), rel=1e-9) and found > 0.01


def test_mean_evidence():
    """Means over prompts, and standard errors, for the run's goodness and beta. Wrong: the bounds exchanged;
    log p and log q' swapped; ddof 0; a deviation for an error; nan as the error of one prompt."""
    s, data, policy = loop_settings(goodness="logistic", beta=0.5), loop_data(), loop_policy()
    drawn = brain.collect(policy, loop_reward, data[1:7:2], s, "policy", [brain.seeded(i) for i in range(3)])
    good = [goodness_by_hand(x.reward, "logistic", 0.5) for x in drawn]
    weights = [(x.log_p - x.log_q_proposal).exp().numpy() * g for x, g in zip(drawn, good)]
    elbos, evidences = [np.log(w).mean() for w in weights], [np.log(w.mean()) for w in weights]
    one, expected = {}, {}
    for name, x in (("elbo", elbos), ("log_evidence", evidences)):
        one |= {name: x[1], f"{name}_standard_error": 0.0}
        expected |= {name: np.mean(x), f"{name}_standard_error": np.std(x, ddof=1) / math.sqrt(3)}
    assert brain.mean_evidence(drawn, s) == pytest.approx(expected, rel=1e-9)
    assert brain.mean_evidence(drawn[1:2], s) == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("goodness, beta", [("bradley-terry", 1.0), ("logistic", 0.3)])
def test_training_approaches_the_exact_posterior(goodness, beta):
    """KL(posterior || q_theta) over all outputs falls to a tenth, in a world with every outcome enumerated.
    Wrong: what agrees with itself but not with the posterior: a sign, a stale proposal, a temperature."""
    world = toy_world.World(3, 2, 4, spread=2.0, seed=1)
    model, tokenizer = toy_world.tiny_gpt2(world, seed=1, width=16, layers=1)
    log_p = world.log_probs(model)
    good = goodness_by_hand(world.fit(log_p).reward, goodness, beta)
    target = toy_world.posterior(log_p, np.log(good))
    more, ids = dict(gold=None, pair=None, columns={}), map(torch.tensor, world.prompts)
    data = [brain.Example(row=i, prompt=world.text(x.tolist()), ids=x, **more) for i, x in enumerate(ids)]
    sizes = dict(iterations=3, prompts_per_iteration=4, samples_per_prompt=16, updates_per_iteration=20)
    more = dict(batch_size=5, max_new_tokens=2, learning_rate=1.5e-2, weight_decay=0.0)
    s = brain.Settings(**sizes, **more, goodness=goodness, beta=beta)
    reward = lambda x, texts, columns: torch.tensor(world.reward_of([x] * len(texts), texts))  # noqa: E731
    policy = brain.train(brain.Policy(model, tokenizer), reward, data, s, MemoryRun(s))
    before, after = (toy_world.kl(target, log).mean() for log in (log_p, world.log_probs(policy.model)))
    assert before > 0.5 and after < 0.1 * before


def test_brain_py_stays_small():
    """At most 1,050 lines of code, and half as many of words; in Part I at most 220, and as many of words.
    Lines and functions are short. Wrong: one more feature; a feature without a word. A line of code holds a
    token other than a comment or docstring; a line of words is all comment or docstring."""
    import ast
    import tokenize

    text = (HERE / "brain.py").read_text()
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines, tree = text.splitlines(), list(ast.walk(ast.parse(text)))
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    strings = [x.body[0] for x in tree if isinstance(x, kinds) and ast.get_docstring(x) is not None]
    words = {i for string in strings for i in range(string.lineno, string.end_lineno + 1)}
    blank = ("NEWLINE", "NL", "INDENT", "DEDENT", "ENDMARKER", "COMMENT")
    kept = [x for x in tokens if tokenize.tok_name[x.type] not in blank and x.start[0] not in words]
    code = {i for x in kept for i in range(x.start[0], x.end[0] + 1)}
    words |= {x.start[0] for x in tokens if x.type == tokenize.COMMENT} - code
    assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []
    assert [x.name for x in tree if isinstance(x, ast.FunctionDef) and x.end_lineno - x.lineno >= 40] == []
    second = next(i for i, line in enumerate(lines, 1) if line.startswith("# Part II"))
    assert sum(i < second for i in code) <= min(220, sum(i < second for i in words))
    assert len(code) <= 1050 and len(words) >= len(code) / 2


# ------------------------------------------------------------------------------------------
# 4. The policy

POLICY_OTHERS = {
    "hybrid": (transformers.Lfm2Config, LLAMA | dict(layer_types=["conv", "full_attention"])),
    "bert": (transformers.BertConfig, {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}),
    "bart": (transformers.BartConfig, dict(d_model=32, decoder_layers=2, encoder_layers=2)),
    "phimoe": (transformers.PhimoeConfig, LLAMA | dict(num_local_experts=4)),
}
NO_PADDING = ("bart", "mamba", "gemma2", "bloom")  # misread padding; the last two in float64 only
POLICY_FLAGS = {name: name != "mamba" for name in [*FAMILIES, "bart"]} | {"hybrid": False}  # shares_prompt


def any_lm(family, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, (FAMILIES | POLICY_OTHERS)[family])
        return tiny(family, **changes)


def plain_all(model, prompt, outputs):
    return torch.stack([plain(model, prompt, y, KNOWN) for y in outputs]).detach()


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=atol)


ADAPTERS = {
    "plain": dict(target_modules=["c_attn"]),
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
    model, whole = with_adapter(kind) if kind in ADAPTERS else tiny("gpt2"), kind == "all weights"
    fresh = copy.deepcopy(model).eval()
    policy = brain.Policy(model, letters(), lora_rank=0 if whole else 2, lora_alpha=8)
    outputs, sums = policy._draw([X], random(1, 4, 5).sigmoid(), prior=True)
    before = plain_all(fresh, X, outputs)
    log_q, log_p = policy.log_prob(X, outputs), policy.log_prob(X, outputs, prior=True)
    assert log_q.requires_grad and not log_p.requires_grad
    close(torch.stack([log_q, log_p, sums]), before.expand(3, -1))
    trained = policy.parameters().keys()
    assert trained and all(whole or ".policy" in name for name in trained)
    assert not whole or trained == dict(tiny("gpt2").named_parameters()).keys()
    assert kind != "lora" or policy.model.peft_config["policy"].lora_alpha == 8
    log_q[0].backward()
    torch.optim.SGD(policy.parameters().values(), lr=0.5).step()
    moved = plain_all(policy.model, X, outputs)
    assert (moved - before).abs().max() > 1e-2
    for prior, expected in ((True, before), (False, moved)):
        close(policy.log_prob(X, outputs, prior), expected)
    assert policy.parameters().keys() == trained


def test_ids_without_a_token_have_no_probability():
    """Also in a gap of the vocabulary, for p and q_theta. Wrong: masked in samples alone; the largest id
    taken for the tokenizer's size; an added token taken for an unknown id; logits of 16 bits summed so."""
    from tokenizers import Tokenizer, models

    tokenizer = letters()
    tokenizer.add_tokens(["<|im_end|>"])
    assert brain.Policy(tiny("gptj"), tokenizer).log_prob(X, [torch.tensor([7, 0])]).isfinite()
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 9}, "<end>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    policy, known = brain.Policy(tiny("gptj"), words), [0, 1, 2, 9]
    for prior in (False, True):
        assert policy.log_prob(X, [torch.tensor([8, 0])], prior).item() == -math.inf
        assert set(torch.cat(policy.sample(X, 50, 8, prior, brain.seeded(1))).tolist()) == set(known)
        expected = policy.model(X[None]).logits[0, -1, known].log_softmax(-1)[3:]
        close(policy.log_prob(X, [torch.tensor([9])], prior), expected, 5e-6)
    logits = random(10).bfloat16()
    close(policy._scores(logits).log_softmax(-1)[9], logits.float()[known].log_softmax(-1)[3], 1e-6)


@pytest.mark.parametrize("family", POLICY_FLAGS)
def test_log_prob_and_its_gradients_are_those_of_whole_sequences(family):
    """Through the shared prompt, in chunks too. Wrong: positions shifted, padding counted, a token left out,
    dropout, float32 sums, a recurrent state shared, gradients of the prompt lost."""
    policy = brain.Policy(any_lm(family), letters())
    assert policy.shares_prompt == POLICY_FLAGS[family] and policy.keeps_cache
    outputs = [*policy.sample(X, 6, 5, generator=brain.seeded(1)), torch.tensor([0]), torch.arange(1, 7)]
    exact = 5e-6 if family in ("gptj", "gemma2", "bloom", "mamba") else 1e-12  # float32 islands in "float64"

    def gradients(log_prob):
        total = log_prob.double() @ random(8, seed=5)
        parts = torch.autograd.grad(total, list(policy.parameters().values()), materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    for prompt in (torch.cat([X, X]), X[:4], X2, X[:1]):
        expected = torch.stack([plain(policy.model, prompt, y, KNOWN) for y in outputs])
        slope = gradients(expected)
        for policy.outputs_per_forward in (None, 1, 3):
            found = policy.log_prob(prompt, outputs)
            close(found, expected, exact)
            close(gradients(found), slope, 1e-6 * slope.abs().max().item())
        close(policy.log_prob(prompt, outputs, prior=True), expected, exact)


def test_the_prompt_is_computed_once_and_memory_does_not_grow_with_n():
    """The prompt once in a chunk, the outputs in chunks, and in the backward again. Wrong: the prompt n
    times, the logits of the prompt, all activations kept until the backward."""
    policy, outputs = brain.Policy(tiny("gpt2"), letters()), list(torch.arange(40).reshape(8, 5) % KNOWN)
    shapes, read, saved = [], [], []
    note = lambda _, __, given: shapes.append(tuple(given["input_ids"].shape))  # noqa: E731
    policy.model.register_forward_pre_hook(note, with_kwargs=True)
    policy.model.lm_head.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    keep = lambda x: saved.append(x.dim() >= 3) or x  # noqa: E731
    for policy.outputs_per_forward, expected in ((None, [(1, 6), (8, 5)]), (2, [(1, 6), (2, 5)] * 4)):
        del shapes[:], read[:], saved[:]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            log_q = policy.log_prob(X, outputs)
        assert shapes == expected and read == [1, 5] * (len(expected) // 2)
        assert any(saved) == (policy.outputs_per_forward is None)
        log_q.sum().backward()
        assert shapes == expected * (1 if any(saved) else 2)
    policy.sample(X, 6, 3, generator=brain.seeded(1))
    assert max(rows for rows, _ in shapes) == 2  # the sampler's, too


@pytest.mark.parametrize("family", POLICY_FLAGS)
def test_draws_are_those_of_whole_sequences(family):
    """Their sums are those of plain forwards, in chunks too. Wrong: rows of a cache mixed up, shifts."""
    policy = brain.Policy(any_lm(family, scale=0.2), letters())
    outputs, sums = policy._draw([X], torch.rand(1, 6, 5, dtype=DOUBLE, generator=brain.seeded(1)))
    assert len({len(y) for y in outputs}) > 1
    close(sums, plain_all(policy.model, X, outputs), 5e-6)
    for policy.outputs_per_forward in (None, 1, 4):
        assert all(map(torch.equal, policy.sample(X, 6, 5, generator=brain.seeded(1)), outputs))


@pytest.mark.parametrize("family", POLICY_FLAGS)
def test_outputs_do_not_depend_on_the_prompts_drawn_beside_them(family, capsys):
    """The same tokens one by one and together, where prompts are padded on the left, and after rows that have
    ended are taken out. Where padding is misread, one line says so. Wrong: no mask, positions from the left
    edge, random numbers shared by prompts, a row that has ended beside another's cache, outputs in a mix."""
    policy = brain.Policy(any_lm(family, scale=0.2), letters())
    assert policy.pads_prompts == (family not in NO_PADDING)
    assert ("misreads padding" in capsys.readouterr().err) != policy.pads_prompts
    prompts = [X, X[:3], torch.cat([X, X]), X2]
    draw = lambda size: [brain.seeded(4, i) for i in range(size)]  # noqa: E731
    alone = [policy.sample(x, 9, 12, generator=g) for x, g in zip(prompts, draw(4))]
    assert len({len(y) for some in alone for y in some}) > 3
    for policy.outputs_per_forward in (None, 36, 35):
        together = policy.sample_together(prompts, 9, 12, generators=draw(4))
        for one, other in zip(alone, together, strict=True):
            assert all(map(torch.equal, one, other)) and len(other) == 9
    greedy = policy.sample_together(prompts, 1, 5, greedy=True)
    assert all(map(torch.equal, greedy[1], policy.sample(prompts[1], 1, 5, greedy=True)))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "hybrid"])
def test_samples_follow_the_plain_softmax(family, prior):
    """Frequencies of all outcomes against the enumeration, for q_theta and p. Wrong: the checkpoint's top-k
    or other settings, one random number for all tokens, unknown ids, samples of the other one."""
    model = any_lm(family, scale=0.2)
    model.generation_config.update(top_k=2, temperature=0.5, do_sample=True, repetition_penalty=2.0)
    policy = brain.Policy(model, letters(3), outputs_per_forward=700)
    policy.model.load_state_dict({name: 1.5 * p for name, p in policy.model.state_dict().items()})
    world, count = toy_world.World(3, 2, 1), 3000
    models = (policy.prior_model, policy.model) if prior else (policy.model, policy.prior_model)
    (chance,), (other,) = (np.exp(world.log_probs(model)) for model in models)
    assert abs(chance - other).sum() > 0.1
    drawn = policy.sample(torch.tensor(world.prompts[0]), count, 2, prior, brain.seeded(3))
    seen = np.bincount([world.index[tuple(y.tolist())] for y in drawn], minlength=len(chance))
    chi_square = ((seen - count * chance) ** 2 / (count * chance)).sum()
    assert chi_square < 40  # 12 degrees of freedom: exceeded once in 10,000 times; the seed is fixed


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
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: middle.to(dtype).reshape(shape))
    np.testing.assert_array_equal(torch.cat(policy.sample(X, len(rare), 1)), rare)
    np.testing.assert_allclose(policy._draw([X], middle[None, :, None])[1], np.log(exact[rare]), rtol=1e-6)


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


def byte_pairs(*merges, specials=("<end>",), begins=False, ends=False):
    """A byte-level BPE tokenizer as GPT-2's, with merges of one's own, perhaps a first and a last token."""
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


@pytest.mark.parametrize("fault, flags", [
    ("tokens misread", (False, True)),
    *[(fault, (False, False)) for fault in ("copies misread", "not copied", "raises")],
])  # fmt: skip
def test_a_faulty_model_is_found_and_used_as_far_as_it_works(fault, flags, capsys):
    """The check finds the fault. If sampling is slow it says so; log_prob and samples are right all the same.
    Wrong: a flag that nothing looks at, flags mixed up, an exception let through."""
    odd = type("Odd", (transformers.DynamicCache,), {"reorder_cache": None})

    def spoil(_, __, given, output):
        rows, new = given["input_ids"].shape
        wrong = {"tokens misread": new > 1, "copies misread": new == 1 and rows > 1}.get(fault)
        wrong = wrong and given.get("past_key_values") is not None
        output.logits = output.logits * (1.2 if wrong else 1.0)
        if fault in ("not copied", "raises") and output.past_key_values is not None:
            output.past_key_values.__class__ = {"not copied": odd}[fault]  # or KeyError

    model = tiny("gpt2")
    model.register_forward_hook(spoil, with_kwargs=True)
    policy, right = brain.Policy(model, letters()), tiny("gpt2").eval()
    slow = "brain: GPT2LMHeadModel misreads padding or has no cache; it samples slowly\n"
    assert capsys.readouterr().err == ("" if flags[1] else slow)
    assert (policy.shares_prompt, policy.keeps_cache) == flags
    outputs, sums = policy._draw([X], random(1, 4, 5).sigmoid())
    for found in (policy.log_prob(X, outputs), sums):
        close(found, plain_all(right, X, outputs))


def test_a_model_that_cannot_be_a_policy_is_refused():
    """An adapter that changes its base would change it again as a second one; merged it is accepted. Wrong:
    numbers that mean nothing, >= for >, a prior that is not the model given."""
    broken, right = tiny("gpt2"), tiny("llama", dtype=torch.float32).eval()
    broken.transformer.ln_f.weight.data.fill_(math.nan)
    raising = tiny("gpt2")
    raising.transformer.ln_f.register_forward_hook(lambda *_: torch.ones(2) + torch.ones(3))
    cases = [
        (any_lm("bert"), 6, 0, "--model: BertLMHeadModel is not causal; give a causal LM"),
        (any_lm("bert", dtype=torch.bfloat16, scale=0.02), 6, 2, "--model: BertLMHeadModel is not causal"),
        (raising, 6, 0, "--model GPT2LMHeadModel: The size of tensor a"),
        (tiny("gpt2", vocab=7), 7, 0, "--model: has 7 embeddings, its tokenizer ids up to 7"),
        (broken, 6, 0, "--model: its logits are nan or inf; try --dtype float32"),
        (with_adapter("plain"), 6, 0, "--lora-rank 0: --model is an adapter; merge it first"),
    ]
    for start in ("pissa", "olora"):
        adapted = with_adapter(None, copy.deepcopy(right), target_modules=["q_proj"], init_lora_weights=start)
        merged = brain.Policy(copy.deepcopy(adapted).merge_and_unload(), letters())
        close(merged.log_prob(X, [X2]), plain_all(right, X, [X2]), 1e-3)
        cases += [(adapted, 6, 2, "--model: its adapter changes LlamaForCausalLM itself; merge it")]
    for model, size, rank, told in cases:
        with pytest.raises(brain.UserError, match=f"^{told}"):
            brain.Policy(model, letters(size), lora_rank=rank)
    brain.Policy(tiny("gpt2", vocab=7), letters(6))
    brain.Policy(any_lm("bert", is_decoder=True), letters())


@pytest.mark.parametrize("family, names", [("phimoe", "qkvo"), ("mamba", ["in", "x"])])
def test_lora_on_an_architecture_that_peft_does_not_know_takes_true_linear_layers(family, names):
    """Wrong: a router, which returns a tuple; a mamba layer's out_proj and dt_proj; the output layer."""
    model = any_lm(family, dtype=torch.float32)  # phimoe has no float64
    before = plain_all(copy.deepcopy(model).eval(), X2, [X])
    policy = brain.Policy(model, letters(), lora_rank=2)
    found = {re.search(r"\.(\d)\.\w+\.(\w+)_proj\.lora_", name).groups() for name in policy.parameters()}
    assert found == set(itertools.product("01", names))
    close(policy.log_prob(X2, [X]), before, 1e-4)


# ------------------------------------------------------------------------------------------
# 5. Rewards

CLASSIFIERS = FAMILIES | {
    "hybrid": (transformers.Qwen3_5TextConfig, LLAMA | dict(num_hidden_layers=4, head_dim=8,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)),
    "bert": (transformers.BertConfig, {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}),
    "bart": (transformers.BartConfig, dict(d_model=32, decoder_layers=2, encoder_layers=2)),
}  # fmt: skip
DECODERS = [name for name in CLASSIFIERS if name not in ("mamba", "bert", "bart")]  # mamba has no classifier
PROMPT, OUTPUTS = "cca", ["bc", "b", "", "bbbbbbbbb", "ccab", "bc"]  # the last is there twice


def classifier(family, tokenizer, labels="r", **changes):
    (kind, sizes), ids = CLASSIFIERS[family], dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = kind(**sizes | ids | changes, vocab_size=len(tokenizer), id2label=dict(enumerate(labels)))
    model = AutoModelForSequenceClassification.from_config(config).double()
    for i, p in enumerate(model.parameters()):
        p.data.copy_(random(*p.shape, seed=i, scale=0.3))
    return model.requires_grad_(False).eval()


def scores_of(model, tokenizer, texts):
    """(texts, labels): the head at the last token of each text, by plain forwards."""
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    hidden = [model.base_model(input_ids=x, use_cache=False).last_hidden_state[0, -1] for x in ids]
    found = (torch.stack(hidden) @ model.score.weight.T).detach()
    assert found.std() > 1e-2  # a thousand times the tolerance
    return found.numpy()


def equal_rewards(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, np.ravel(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("begins, ends", [*itertools.product([False, True], repeat=2)])
def test_texts_get_one_beginning_and_no_end(begins, ends):
    """Wrong: a second beginning behind a template's, one that the tokenizer does not put, an end token."""
    tokenizer = byte_pairs(specials=BOTH, begins=begins, ends=ends)
    (a, b), first = tokenizer.convert_tokens_to_ids(["a", "b"]), [1] * begins
    found = [brain.encode(tokenizer, text) for text in ("ab", "<begin>ab", "", "b<end>")]
    assert found == [first + [a, b], [1, a, b], first, first + [b, 0]]
    assert brain.encode(letters(), " a b") == [1, 2]  # no beginning token known at all


@pytest.mark.parametrize("template", [None, "<begin>{output}", "{prompt}, {output}<end>"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_reward_is_the_head_at_the_last_token_of_the_whole_text(family, template):
    """Wrong: the pooling of the model class (it skips an end token where pad = eos), texts tokenized in
    parts, rewards that depend on the texts beside, a template filled in twice."""
    tokenizer = byte_pairs(*JOINING, specials=BOTH)
    tokenizer.pad_token = tokenizer.eos_token
    reward = brain.RewardModel(classifier(family, tokenizer).train(), tokenizer, template)
    filled = (template or "{prompt}{output}").replace("{prompt}", PROMPT)
    texts = [filled.replace("{output}", output) for output in OUTPUTS]
    expected, found = scores_of(reward.model, tokenizer, texts), reward(PROMPT, OUTPUTS)
    equal_rewards(found, expected)  # float32 out, and islands of it in some models
    assert found.dtype == torch.float32 and reward(PROMPT, OUTPUTS[::-1]).tolist() == found.tolist()[::-1]
    assert brain.fill("{output}{prompt}", "{output}", "{prompt}") == "{prompt}{output}"


def test_with_several_labels_a_reward_is_the_log_odds_of_one():
    """Eq. 15, of a label by name or index, or of the second of two; of labels that do not exclude each other,
    the logit. Wrong: the logit alone, another label, one by its place in config.json."""
    tokenizer = byte_pairs(*JOINING)
    kinds = {names: classifier("llama", tokenizer, names) for names in ("r", "ab", "abc", "10")}
    made = lambda names, label: brain.RewardModel(kinds[names], tokenizer, label=label)  # noqa: E731
    chance = softmax(scores_of(kinds["abc"], tokenizer, [PROMPT + output for output in OUTPUTS]))
    for label, name in enumerate("abc"):
        equal_rewards(made("abc", name)(PROMPT, OUTPUTS), np.log(chance[:, label] / (1 - chance[:, label])))
    cases = ("r", None, None), ("ab", None, 1), ("abc", "a", 0), ("abc", "2", 2), ("10", "1", 0)
    assert all(made(names, label).label == index for names, label, index in cases)
    for names, label in (("r", "x"), ("abc", None), ("ab", "2"), ("ab", "d"), ("r", "r")):
        with pytest.raises(brain.UserError, match=f"--reward-label {label}: "):
            made(names, label)
    multi = classifier("llama", tokenizer, "abc", problem_type="multi_label_classification")
    multi.config.id2label = {2: "c", 1: "b", 0: "a"}
    rewards = brain.RewardModel(multi, tokenizer, label="c")(PROMPT, OUTPUTS)
    equal_rewards(rewards, scores_of(multi, tokenizer, [PROMPT + output for output in OUTPUTS])[:, 2])


def save(place, *parts):
    for part in parts:
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
    with pytest.raises(brain.UserError, match="--reward-model: cannot read 14 tokens"):
        reward("abc", ["bcdefghh", ""])


def test_the_context_of_a_model():
    """Wrong: xlnet's -1, RoBERTa's padding, a length where frequencies change."""
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32)
    llama = transformers.LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    roberta = transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    others = transformers.MptConfig(max_seq_len=7), transformers.XLNetConfig(), transformers.BloomConfig()
    assert [*map(brain.context_of, (llama, roberta, *others))] == [32, 512, 7, math.inf, math.inf]
    llama.rope_parameters["rope_type"] = "longrope"
    assert brain.context_of(llama) == 32
    assert brain.context_of(transformers.Gemma3Config(text_config=dict(max_position_embeddings=77))) == 77


def test_a_reward_model_that_cannot_score_is_refused(tmp_path):
    """Wrong: nan as a reward; a text without tokens; ids not embedded; an encoder-decoder; a random head."""
    tokenizer = byte_pairs()
    model = classifier("gpt2", tokenizer)
    naked, causal = save(tmp_path / "naked", model), save(tmp_path / "lm", tiny("gpt2", vocab=257), tokenizer)
    for name, told in ((f"{causal}/no", "no such"), (causal, "score.weight"), (naked, "has no tokenizer")):
        with pytest.raises(brain.UserError, match=f"--reward-model {name}: .*{told}"):
            brain.RewardModel.from_pretrained(name)
    with pytest.raises(brain.UserError, match="--reward-model: cannot read 0 tokens"):
        brain.RewardModel(model, tokenizer)("", ["b", ""])
    for value in (math.nan, math.inf, -math.inf):
        model.score.register_forward_hook(lambda _, __, out: torch.full_like(out, value))
        with pytest.raises(brain.UserError, match="--reward-model.*nan or inf.*--dtype"):
            brain.RewardModel(model, tokenizer)("a", ["b"])
    with pytest.raises(brain.UserError, match="--reward-model: .*encoder-decoder"):
        brain.RewardModel(classifier("bart", tokenizer), tokenizer)
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(brain.UserError, match="--reward-model: has 257 embeddings, .*ids up to 257"):
        brain.RewardModel(model, tokenizer)


CHAT = (
    "<begin>{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "ca"}]
PREFILL = [*MESSAGES, {"role": "assistant", "content": "ca"}]
Code = type("Code", (), {"__reduce__": lambda self: (print, ("code ran",))})  # when it is unpickled


@pytest.mark.parametrize("template", [None, "{prompt}|{output}<end>"])
def test_messages_go_through_a_chat_template(template, tmp_path):
    """The reward model's; with a text template, the policy's. Wrong: a closed prefill, no tools."""
    tokenizer, other = (byte_pairs(*JOINING, specials=BOTH, begins=True) for _ in range(2))
    with pytest.raises(brain.UserError, match="--flag .*chat_template is not set"):
        brain.chat(tokenizer, MESSAGES, "--flag")
    tokenizer.chat_template, other.chat_template = CHAT, CHAT.replace("{{ m.role[0] }}:", "#")
    with pytest.raises(brain.UserError, match="--flag .*no tools here"):
        brain.chat(tokenizer, [{"role": "tool", "content": "x"}], "--flag")
    if template:
        tokenizer, other = other, tokenizer
    name = save(tmp_path / "reward", classifier("llama", tokenizer), tokenizer)
    reward = brain.RewardModel.from_pretrained(name, None, template, other, dtype=DOUBLE)
    given, tools = copy.deepcopy([MESSAGES, PREFILL]), [{"type": "function", "function": {"name": "f"}}]
    for messages, prefill in zip(given, ("", "ca")):
        start = f"<begin>[f]s:be<end>u:ca<end>a:{prefill}" + "|" * bool(template)
        expected = scores_of(reward.model, tokenizer, [f"{start}{output}<end>" for output in OUTPUTS])
        equal_rewards(reward(messages, OUTPUTS, {"tools": tools}), expected)
    assert given == [MESSAGES, PREFILL]
    kept = type(other).from_pretrained(save(tmp_path, other))
    assert brain.chat(kept, PREFILL, "--flag") == brain.chat(other, PREFILL, "--flag")


def test_an_adapter_on_a_classifier_is_right_and_on_an_lm_refused(tmp_path):
    """The head is its own, the tokenizer too, or else its base's. Wrong: another head or tokenizer."""
    tokenizer = byte_pairs(*JOINING)
    for base in (tiny("llama", vocab=len(tokenizer)), classifier("llama", tokenizer)):
        place = save(tmp_path / type(base).__name__, base, tokenizer)
        base = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=DOUBLE)
        model = with_adapter(None, base, "SEQ_CLS", target_modules=["q_proj"])
        name = save(f"{place}+", model, tokenizer)
        if "CausalLM" in name:
            with pytest.raises(brain.UserError, match=f"--reward-model {re.escape(name)}: "):
                brain.RewardModel.from_pretrained(name)
    expected = scores_of(model.merge_and_unload().eval(), tokenizer, [PROMPT + y for y in OUTPUTS])
    for _ in range(2):
        found = brain.RewardModel.from_pretrained(name, tokenizer=letters(), dtype=DOUBLE)
        equal_rewards(found(PROMPT, OUTPUTS), expected)
        for file in Path(name).glob("tokenizer*"):
            file.unlink()


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


@pytest.mark.parametrize("name, weight, told", [
    ("v_head.weight", None, "score.weight"), ("v_head.bias", torch.zeros(1), "score.bias"),
    ("transformer.h.1.ln_1.weight", None, "h.1.ln_1.weight"), ("v_head.weight", Code(), "Weights only load"),
    ("transformer.h.2.ln_1.weight", torch.ones(32), "h.2.ln_1.weight"),
    ("transformer.wte.weight", torch.zeros(300, 32), "wte.weight.*300"),
    ("v_head.weight", torch.zeros(2, 32), "score.weight.*2, 32"),
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
    """Wrong: columns once, left out, or as the prompts; messages as text; float32."""
    calls = []
    function = brain.RewardFunction(lambda **given: calls.append(given) or (1, 2), "f")
    columns = {"label": "g", "source": 7, "completions": "of the data", "prompts": "of the data"}
    assert function("p", ["x", "y"], columns).tolist() == [1, 2]
    assert calls.pop() == dict(completions=["x", "y"], label=["g", "g"], prompts=["p", "p"], source=[7, 7])
    function(MESSAGES, ["x", "y"])
    assert calls.pop() == {"prompts": [MESSAGES, MESSAGES], "completions": [reply("x"), reply("y")]}
    for kind in (list, tuple, np.array, iter, lambda x: torch.tensor(x, dtype=DOUBLE)):
        found = brain.RewardFunction(lambda **_: kind([1 + 1e-12, -2.0]), "f")("p", ["x", "y"])
        assert found.dtype == DOUBLE and found.tolist() == [1 + 1e-12, -2.0]


@pytest.mark.parametrize("returned", [
    [1.0, 2.0], [1.0] * 4, [], [1.0, math.nan, 0.0], [1.0, math.inf, 0.0], [1.0, None, 2.0], None, 1.0, "abc",
    [[1.0, 2.0, 3.0]], [[1.0], [2.0], [3.0]],
    [1.0, None, 2.0, 3.0], "123", {1: 0.0, 2: 0.0, 3: 0.0}, [1.0, 2.0, -1e300], ((1.0,), (2.0,), (3.0,)),
], ids=repr)  # fmt: skip
def test_a_reward_function_that_returns_something_else_is_refused(returned):
    """Wrong: nan as a reward, broadcasting, one number for all, rewards of other outputs."""
    with pytest.raises(brain.UserError) as caught:
        brain.RewardFunction(lambda **_: returned, "f.py:f")("the prompt", ["x", "y", "z"])
    told = f"--reward-function f.py:f: must return 3 finite numbers, not {returned!r}"
    assert str(caught.value) == told


def test_a_checkpoint_with_parameters_of_another_model_is_refused(tmp_path):
    """Also on loading by name; buffers of old versions are no parameters. Wrong: another model is trained."""
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    load = functools.partial(brain.load_model, AutoModelForCausalLM, str(tmp_path), "--model")
    saved = safetensors.torch.load_file(file) | {"transformer.h.0.attn.bias": torch.ones(2)}
    safetensors.torch.save_file(saved, file, {"format": "pt"})
    load()
    safetensors.torch.save_file(saved | {"transformer.extra": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(brain.UserError, match="1 parameters do not fit, such as .*transformer.extra"):
        load()


def test_a_reward_function_is_a_module_of_its_own(tmp_path):
    """A pool of processes finds it by its name. Wrong: run as a script, which cannot be imported."""
    import pickle

    (tmp_path / "my_rewards.py").write_text("import beside\ndef f(**_): return beside.one()")
    (tmp_path / "beside.py").write_text("def one(): return [1.0]")
    found = brain.RewardFunction.from_file(f"{tmp_path}/my_rewards.py:f")
    assert pickle.loads(pickle.dumps(found.function)) is found.function and found("p", ["x"]).tolist() == [1]


def test_a_reward_function_comes_from_a_file(tmp_path):
    """And may import from beside it. Wrong: the first colon; a name that is no function."""
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "beside_the_reward.py").write_text("number = 3")
    file = tmp_path / "a:b" / "f.py"
    file.write_text("from beside_the_reward import number\ndef good(**_): return [number] * 2")
    assert brain.RewardFunction.from_file(f"{file}:good")("p", ["x", "yy"]).tolist() == [3, 3]
    for spec, told in ((f"{file}:number", "no function"), (f"{file}", "no such"), (f"{file}x:f", "no such")):
        with pytest.raises(brain.UserError, match=f"--reward-function {re.escape(spec)}: .*{told}"):
            brain.RewardFunction.from_file(spec)


# ------------------------------------------------------------------------------------------
# 6. Prompts

DATA = [{"prompt": f"q{i}:", "label": f" a{i}", "number": i} for i in range(5)]
reply = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731


def dataset_of(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def data_settings(method="brain", **changes):
    s = brain.parse(["--model", "m", "--dataset", "d", "--reward-model", "r", "--method", method])
    return dataclasses.replace(s, **{"max_prompt_tokens": 50, "max_new_tokens": 8} | changes)


def prompts_of(rows, tokenizer=byte_pairs(*JOINING), split="train", reward=None, **changes):
    model = types.SimpleNamespace(config=transformers.GPT2Config(n_positions=1024))
    policy = types.SimpleNamespace(tokenizer=tokenizer, model=model)
    return brain.load_prompts(dataset_of(rows), policy, data_settings(**changes), split, reward)


def test_prompts_that_do_not_fit_are_left_out_and_counted(capsys):
    """A prompt of --max-prompt-tokens stays. Wrong: < for <=; characters counted; a prompt cut; rows that
    shift; a prompt among the columns; the room of the output, or the gold answer, not counted."""
    rows = [{"prompt": "ab" * size, "label": str(size), "number": size} for size in (3, 5, 4, 0, 1, 4)]
    prompts = prompts_of(rows, max_prompt_tokens=4)
    for example, (row, size) in zip(prompts, [(0, 3), (2, 4), (4, 1), (5, 4)], strict=True):
        assert (example.row, example.prompt, example.gold) == (row, "ab" * size, f" {size}")
        assert example.columns == {"label": str(size), "number": size} and example.pair is None
        assert example.ids.dtype == torch.long and len(example.ids) == size
    assert "train: 4 prompts; 2 left out, empty or too long" in capsys.readouterr().out
    with pytest.raises(brain.UserError, match="--dataset d: every prompt of test"):  # the beginning counts
        prompts_of(rows[4:5], byte_pairs(*JOINING, specials=BOTH, begins=True), "test", max_prompt_tokens=1)
    begins = byte_pairs(*JOINING, specials=BOTH, begins=True)
    assert [x.row for x in prompts_of(rows[2:4], begins)] == [0]  # an empty text, though it has a beginning
    assert len(prompts_of([{"prompt": "c" * size} for size in (1016, 1017)], max_prompt_tokens=None)) == 1
    # in a reward model's context of 13, with outputs of 3 tokens, which may be 6 there
    reward = brain.RewardModel(classifier("gpt2", letters(), n_positions=13), letters())
    sizes = (4, 1), (8, 1), (4, 10), (7, 6), (7, 7)
    rows = [{"prompt": " a" * prompt, "label": " b" * gold} for prompt, gold in sizes]
    prompts = prompts_of(rows, letters(), reward=reward, max_prompt_tokens=9, max_new_tokens=3)
    assert [example.row for example in prompts] == [0, 3]


def test_messages_become_prompts_by_the_policys_chat_template():
    """Wrong: a text prompt beside answers of messages left as text; the nulls of a table kept; tools left
    out; a space before the answer; an error that does not name the row."""
    tokenizer = byte_pairs(specials=BOTH)
    tokenizer.chat_template = CHAT.replace("m.content }}", "m.content }}{{ m }}")
    named, tools = [MESSAGES[0], MESSAGES[1] | {"name": "z"}], [{"function": {"name": "f"}}]
    read = functools.partial(prompts_of, tokenizer=tokenizer, max_prompt_tokens=500)
    (one,) = read([{"prompt": named, "chosen": reply("x"), "tools": tools}])
    assert one.prompt == named and one.gold == "x" and one.columns["tools"] == tools
    text = "".join(f"{m['role'][0]}:{m['content']}{m}<end>" for m in named)
    assert tokenizer.decode(one.ids) == f"<begin>[f]{text}a:"
    (two,) = read([{"prompt": "q", "chosen": [*MESSAGES, *reply("x")]}])
    assert two.prompt == [{"role": "user", "content": "q"}] and two.gold == "x"
    with pytest.raises(brain.UserError, match="--dataset row 2, --model .*no tools here"):
        read([{"prompt": MESSAGES}, {"prompt": [{"role": "tool", "content": "x"}]}])


@pytest.mark.parametrize("own, beginning, before, chosen, rejected", [
    ("", "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:", "", " ab", " ac\n\nAssistant: z"),
    ("POST: ca\n\n", "TL;DR:", "POST: ca\n", " a", " ab"), ("q", "", "q", "TL;DR: a", "ab TL;DR: b"),
    ("", MESSAGES, [], reply("ab"), reply("ac")), (MESSAGES, [], MESSAGES, reply("a"), reply("a")),
    ("", "", "", "ab", "ac"), ("", [], [], MESSAGES, reply("b")),
])  # fmt: skip
def test_what_both_answers_begin_with_belongs_to_the_prompt(own, beginning, before, chosen, rejected):
    """Wrong: up to a cue within one answer; up to the last common letter; the cue left; a prompt lost."""
    row = {"chosen": beginning + chosen, "rejected": beginning + rejected} | ({"prompt": own} if own else {})
    expected = {"prompt": before + beginning, "chosen": chosen, "rejected": rejected}
    assert list(brain.check_rows(dataset_of([row]), "d", "dpo", "test")) == [expected]
    assert list(brain.check_rows(dataset_of([row]), "d", "brain", "train")) == [row if own else expected]


@pytest.mark.parametrize("rows, pairs, told", [
    ([{"q": "x"}], False, "has no column prompt, only .*q"), ([{"prompt": 7}], False, "row 1: prompt .*: 7"),
    ([{"prompt": "a", "chosen": "b"}], True, "has no column rejected"), ([{"prompt": []}], False, "row 1: p"),
    ([{"prompt": "a"}, {"prompt": None}], False, "row 2: prompt is not text or messages: None"),
    ([{"prompt": MESSAGES}, {"prompt": [{"content": "x"}]}], False, "row 2: prompt is not"),
    ([{"prompt": "a", "chosen": "b", "rejected": None}], True, "row 1: rejected"),
    ([{"chosen": None, "rejected": "b"}], False, "row 1: chosen"),
], ids=repr)  # fmt: skip
def test_rows_without_text_are_refused(rows, pairs, told):
    """Wrong: only the first row looked at, a number as text, messages without roles, a traceback."""
    with pytest.raises(brain.UserError, match=f"^--dataset d.*{told}"):
        brain.check_rows(dataset_of(rows), "--dataset d", "dpo" if pairs else "brain", "train")


def splits_of(monkeypatch, method, found, **changes):
    found = {name: dataset_of(rows) for name, rows in found.items()}
    monkeypatch.setattr(brain, "read_dataset", lambda s: found)
    splits = brain.load_splits(data_settings(method, **changes))
    return [splits[name].to_list() for name in ("train", "validation", "test")]


@pytest.mark.parametrize("method", ["brain", "dpo"])
def test_missing_splits_are_held_out_of_train(method, monkeypatch, capsys):
    """A tenth, rounded up, at most 1000; disjoint; the same for every --seed; said. Wrong: rows in two
    splits; the first rows; other rows with another seed; a split taken from test."""
    load, said = functools.partial(splits_of, monkeypatch, method), lambda: capsys.readouterr().out
    rows = [{"prompt": f"q{i:02}", "chosen": "b", "rejected": "c"} for i in range(35)]
    ordered = functools.partial(sorted, key=lambda row: row["prompt"])
    train, validation, test = load(dict(train=rows))
    assert ordered(train + validation + test) == rows and [len(validation), len(test)] == [4, 4]
    assert ordered(validation) not in (rows[:4], rows[31:], rows[27:31])
    assert re.search("validation: not in the data; 4 prompts of train are held out.*\ntest: not", said())
    assert load(dict(train=rows), seed=5) == [train, validation, test] and said()
    train, validation, test = load(dict(train=rows[:30], test=rows[30:]))
    assert ordered(train + validation) == rows[:30] and len(validation) == 3 and test == rows[30:]
    assert "test: not" not in said()
    found = load(dict(train=rows[:3], validation=rows[3:5], test=rows[5:]))
    assert found == [rows[:3], rows[3:5], rows[5:]] and said() == ""
    with pytest.raises(brain.UserError, match="--dataset d: has 2 prompts; it takes 3"):
        load(dict(train=rows[:2] * 5, test=rows[2:]))
    many = [{"prompt": f"q{i}", "chosen": "b", "rejected": "c"} for i in range(10_020)]
    assert list(map(len, load(dict(train=many, test=rows[:1])))) == [9020, 1000, 1]
    # Prompts are held out, not rows. Wrong: rows drawn at random, so that each prompt is in every split.
    several = [{"prompt": f"q{i % 20}", "chosen": f"b{i}", "rejected": "c"} for i in range(60)]
    parts = load(dict(train=several))
    names = [{row["prompt"] for row in part} for part in parts]
    assert list(map(len, names)) == [16, 2, 2] and len(set.union(*names)) == 20


def test_splits_have_names_of_many_kinds(monkeypatch):
    """Wrong: one of two train splits; a flag not heeded; a cue moved into the prompts of train only."""
    load, rows = functools.partial(splits_of, monkeypatch), [[row] for row in DATA]
    for name in ("validation", "valid", "val"):
        assert load("brain", dict(zip(("train_sft", name, "test"), rows))) == rows[:3]
    found = dict(zip(("train_b", "val", "other", "train_a", "test"), rows))
    assert load("brain", found, dataset_train_split="train_b", dataset_test_split="other") == rows[:3]
    for told, flags in (("train", {}), ("no", dict(dataset_train_split="train_a", dataset_test_split="no"))):
        with pytest.raises(brain.UserError, match=f"--dataset d: has no split {told}, but train_b, val"):
            load("brain", found, **flags)
    row = [{"prompt": "POST: ca\n", "chosen": "TL;DR: good", "rejected": "TL;DR: bad"}]
    moved = [{"prompt": "POST: ca\nTL;DR:", "chosen": " good", "rejected": " bad"}]
    assert load("dpo", dict(train=row, validation=row, test=row)) == [moved] * 3


def test_data_comes_from_a_file_a_directory_or_the_hubs_cache(tmp_path, monkeypatch):
    """Wrong: files beside read along, one format only, a config not heeded, a library's error let through."""
    import datasets
    import huggingface_hub

    shared, places = tmp_path / "snapshot", {"dataset": str(tmp_path / "snapshot")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, repo_type: places[repo_type])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(place, config=None):
        found = brain.read_dataset(data_settings(dataset=str(place), dataset_config=config))
        return {name: rows.to_list() for name, rows in found.items()}

    for i, (kind, name) in enumerate((("json", "a.jsonl"), ("csv", "a.csv"), ("parquet", "a.parquet"))):
        getattr(dataset_of(DATA[i:]), f"to_{kind}")(tmp_path / name)
        assert read(tmp_path / name) == {"train": DATA[i:]}
    dataset_of(DATA).to_json(shared / "train.jsonl")
    dataset_of(DATA[:2]).to_json(shared / "test.jsonl")
    assert read(shared) == read("some/name") == {"train": DATA, "test": DATA[:2]}
    configs = "- config_name: b\n  data_files: train.jsonl\n- config_name: a\n  data_files: test.jsonl\n"
    (shared / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read("some/name", "a") == {"train": DATA[:2]}
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"')
    for place in (tmp_path / "no.jsonl", tmp_path / "broken.jsonl"):
        with pytest.raises(brain.UserError, match=f"^--dataset {re.escape(str(place))}: "):
            read(place)


def test_what_is_read_is_what_was_written():
    """All tokens that a tokenizer puts before a text; no key that is null, at any depth; no special token in
    a gold answer, as in the text of an output. Wrong: the first token alone, the outermost nulls alone."""
    from tokenizers.processors import TemplateProcessing

    two = byte_pairs(*JOINING, specials=("<end>", "[gMASK]", "<sop>"))
    begin = two.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokens = list(zip(["[gMASK]", "<sop>"], begin))
    form = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=tokens)
    two.backend_tokenizer.post_processor = form
    assert brain.encode(two, "ab") == begin + two("ab", add_special_tokens=False).input_ids
    call, bare = {"f": {"x": 1, "y": None}, "id": None}, {"f": {"x": 1}}
    messages = [{"role": "user", "content": "q", "name": None, "tool_calls": [call, None]}]
    assert brain.plain_messages(messages) == [{"role": "user", "content": "q", "tool_calls": [bare, None]}]
    (example,) = prompts_of([{"prompt": "a", "label": " b<end>"}])
    assert example.gold == " b"


def test_gold_answers_and_pairs_are_as_the_policy_would_have_written_them():
    """Wrong: gold that is a number, or of another column in each row; rejected first; no end token, or one
    behind a cut answer; the prompt's ids among the answer's; a token over the boundary."""
    row = {"prompt": "a", "label": 1, "rejected": "z", "chosen": "b"}
    rows = prompts_of([row | {"completion": x} for x in (None, "c", " d")])
    assert [example.gold for example in rows] == [None, " c", " d"]
    tokenizer = byte_pairs(*JOINING, specials=BOTH, begins=True)

    def pair_of(row, tokenizer=tokenizer, method="dpo", **changes):
        (example,) = prompts_of([row], tokenizer, method=method, **changes)
        return ["|".join(tokenizer.convert_ids_to_tokens(x)) for x in (example.ids, *(example.pair or ()))]

    row = {"prompt": "ca ", "chosen": "bc", "rejected": "cccc"}
    assert pair_of(row, max_new_tokens=4) == ["<begin>|c|a|Ġ", "b|c|<end>", "c|c|c|c"]
    assert pair_of(row | {"rejected": "ccc"}, max_new_tokens=4)[1:] == ["b|c|<end>", "c|c|c|<end>"]
    assert pair_of(row | {"prompt": "ca", "rejected": ""})[1:] == ["Ġ|b|c|<end>", "<end>"]
    assert pair_of(row | {"rejected": "c"}, byte_pairs(("Ġ", "b"))) == ["c|a|Ġ", "b|c|<end>", "c|<end>"]
    tokenizer.chat_template = CHAT  # ends in "a:", so that nothing brings a space
    row = {"prompt": MESSAGES, "chosen": reply("bc"), "rejected": reply("bb")}
    assert pair_of(row)[1:] == ["b|c|<end>", "bb|<end>"]
    assert pair_of(row | {"rejected": reply(None)})[1:] == ["b|c|<end>", "<end>"]  # a call of a tool
    assert len(pair_of(row, split="validation")) == len(pair_of(row, method="brain")) == 1


# ------------------------------------------------------------------------------------------
# 7. Evaluation

PROMPTS = [X, X2, *map(torch.tensor, ([5], [6, 2], [4, 4, 4, 1], [2], [1, 6, 3]))]
ANSWERS = (" a b", " c", " a", None, " b b", "", " c c a")


def spelled(ids):
    return "".join(" " + chr(96 + int(i)) for i in ids if i)


def liking(prompt, texts, columns):
    """A reward that depends on all that it is given."""
    liked = [1.5 * y.count("a") - 0.8 * y.count("c") + 0.3 * len(y) * columns["weight"] for y in texts]
    return torch.tensor(liked, dtype=DOUBLE) - 0.1 * len(prompt)


def seven_prompts():
    """Examples whose row in the data is not their index, as where prompts before them were left out."""
    texts, weights = map(spelled, PROMPTS), [{"weight": float(i % 3)} for i in range(7)]
    return list(map(brain.Example, range(10, 17), texts, PROMPTS, ANSWERS, [None] * 7, weights))


def moved_policy(size=0.15):
    """A policy that is not its prior any more."""
    policy = brain.Policy(tiny(), letters())
    for i, p in enumerate(policy.parameters().values()):
        p.data += random(*p.shape, seed=i, scale=size)
    return policy


def drawn_by_hand(policy, i, prior=False):
    """4 outputs for prompt i, as an evaluation draws them -> (outputs, rewards, log q_theta, log p)"""
    outputs = policy.sample(PROMPTS[i], 4, 4, prior, brain.seeded(5, brain.HELD_OUT, i))
    r = liking(spelled(PROMPTS[i]), map(spelled, outputs), {"weight": float(i % 3)}).numpy()
    models = policy.model, policy.prior_model
    return outputs, r, *([plain(m, PROMPTS[i], y, KNOWN).item() for y in outputs] for m in models)


settings_by_hand = functools.partial(brain.Settings, samples_per_prompt=4, max_new_tokens=4, seed=5)


@pytest.mark.parametrize("goodness, beta, rows", [("bradley-terry", 1, range(7)), ("logistic", 2, (0, 2, 4))])
def test_evaluation_by_hand(goodness, beta, rows):
    """n outputs of the policy for evenly spaced prompts, from their own streams; all numbers in numpy. Wrong:
    outputs of the prior; the first prompts; one output per prompt in a win-rate; an interval that takes the
    outputs of a prompt for independent; ties lost; output and gold swapped; prompts without gold counted as
    lost; KL turned around or per token; another row's columns; goodness or beta ignored."""
    s = settings_by_hand(goodness=goodness, beta=beta, eval_prompts=len(rows) % 7)
    policy, wins, numbers, expected_lines = moved_policy(), [], [], []
    drawn = brain.draw_held_out(policy, liking, seven_prompts(), s, "policy")
    metrics, lines = brain.evaluate(drawn, liking, s)
    for i in rows:
        prompt, gold, to_beat = spelled(PROMPTS[i]), ANSWERS[i], None
        outputs, r, log_q, log_p = drawn_by_hand(policy, i)
        if gold is not None:
            to_beat = liking(prompt, [gold], {"weight": float(i % 3)}).item()
            wins.append(100 * ((r > to_beat).mean() + (r == to_beat).mean() / 2))
        line = {"row": 10 + i, "prompt": prompt, "gold": gold, "gold_reward": to_beat}
        expected_lines += [line | {"output": spelled(y), "reward": own} for y, own in zip(outputs, r)]
        log_kl = np.subtract(log_q, log_p)
        log_weight = (r if goodness == "bradley-terry" else -np.log1p(np.exp(-r))) / beta - log_kl
        numbers.append([r.mean(), log_kl.mean(), log_weight.mean(), np.log(np.exp(log_weight).mean())])
    assert lines == expected_lines and len(wins) == min(len(rows), 6) and 0 < np.mean(wins) < 100
    names = "reward", "kl_to_prior", "elbo", "log_evidence"
    expected = dict(zip(names, np.mean(numbers, 0))) | {"win_rate": np.mean(wins)}
    for name, error in zip(names[2:], np.std(numbers, 0, ddof=1)[2:]):
        expected[f"{name}_standard_error"] = error / math.sqrt(len(rows))
    expected["win_rate_half_width"] = 1.96 * np.std(wins, ddof=1) / math.sqrt(len(wins))
    assert metrics == pytest.approx(expected, abs=1e-9) and metrics["kl_to_prior"] > 0.05
    if goodness == "bradley-terry":
        assert metrics["elbo"] == pytest.approx(metrics["reward"] - metrics["kl_to_prior"], abs=1e-12)


@pytest.mark.parametrize("method", ["brain", "rso", "dpo"])
def test_a_greedy_evaluation_takes_the_most_likely_tokens(method, tmp_path):
    """The argmax over known ids of plain forwards of q_theta; elbo and KL still come from draws. Wrong: those
    of the prior; ids without a token; sums over one output; outputs that go past their end."""
    s = settings_by_hand(goodness="bradley-terry", greedy=True, eval_prompts=0, method=method)
    s.select_by, s.output_dir, policy, answers = "elbo", tmp_path.as_posix(), moved_policy(), []
    run = brain.Run(s, liking, {"train": [], "validation": seven_prompts(), "test": []})
    run.start(policy, torch.optim.AdamW(policy.parameters().values()))
    metrics = read_lines(tmp_path / "metrics.jsonl")[0]
    draws, _ = brain.evaluate(brain.draw_held_out(policy, liking, seven_prompts(), s, "policy"), liking, s)
    for prompt in PROMPTS:
        ids = prompt
        while len(ids) < len(prompt) + 4 and (len(ids) == len(prompt) or ids[-1] != 0):
            logits = policy.model(input_ids=ids[None]).logits[0, -1, :KNOWN]
            ids = torch.cat([ids, logits.argmax()[None]])
        answers.append(spelled(ids[len(prompt) :]))
    lines = read_lines(tmp_path / "validation_outputs.jsonl")
    assert [line["output"] for line in lines] == answers and len(set(answers)) > 3
    reward = np.mean([line["reward"] for line in lines])
    assert metrics["reward"] == pytest.approx(reward) and reward != pytest.approx(draws["reward"])
    assert all(metrics[name] == draws[name] for name in ("elbo", "log_evidence", "kl_to_prior"))


@pytest.mark.parametrize("method", ["brain-no-baseline", "dpo-sft"])
def test_held_out_d_n(method, tmp_path):
    """n outputs of the prior for evenly spaced validation prompts, drawn once; D_n of them by hand, for every
    method. Wrong: samples of the policy; other prompts; weights of pairs; an argmax; eq. 7; drawn anew."""
    policy, s = moved_policy(0.05), settings_by_hand(method=method, goodness="logistic", beta=2.0)
    s.eval_prompts, s.select_by, s.output_dir = 3, "self_normalized_kl", tmp_path.as_posix()
    run = brain.Run(s, liking, {"train": [], "validation": seven_prompts(), "test": []})
    run.start(policy, torch.optim.AdamW(policy.parameters().values()))
    for step in (0, 1):
        if step:
            for p in policy.parameters().values():
                p.data *= 0.9
            run.evaluate(step)
        d_n = []
        for i in (0, 2, 4):
            _, r, log_q, log_p = drawn_by_hand(policy, i, prior=True)
            alpha = softmax(-np.log1p(np.exp(-r)) / 2)  # q' = p: eq. 21
            d_n.append((alpha * np.log(alpha / softmax(np.subtract(log_q, log_p)))).sum())
        line = read_lines(tmp_path / "metrics.jsonl")[-1]
        assert line["step"] == step and line["self_normalized_kl"] == pytest.approx(np.mean(d_n), abs=1e-10)
    # A prompt without gold is selected by elbo. A resumed run finds its prompts by row, not by place.
    s.select_by, run.data["validation"], run.data["train"] = "win_rate", seven_prompts()[3:4], seven_prompts()
    run.evaluate(2)
    run.collect(1, [3], lambda i: brain.collect(policy, liking, seven_prompts()[3:4], s, "prior", [None]))
    again = brain.Run(s, liking, run.data)
    again.start(policy, torch.optim.AdamW(policy.parameters().values()))
    assert [x.example.row for x in again.buffer] == [13]


@pytest.mark.parametrize("value", [0.1, 0.7])
def test_equal_rewards_tie_in_float32_too(value):
    """Wrong: the gold answer's reward in float64 beside rewards that were rounded to float32."""
    ones = torch.ones(2, dtype=torch.float32)
    example = brain.Example(0, "x", torch.tensor([1]), "gold", None, {})
    samples = brain.Samples(0, example, [X, X], ["a", "b"], value * ones, ones, ones, ones / 2)
    reward = brain.RewardFunction(lambda completions, **columns: [value] * len(completions), "f")
    settings = types.SimpleNamespace(goodness="bradley-terry", beta=1.0)
    assert brain.evaluate([samples], reward, settings)[0]["win_rate"] == 50


# ------------------------------------------------------------------------------------------
# 8. The run directory


class SmallToy(toy_world.Toy):
    """The default run's world, of 13 outputs, and with a GPT-2 of one layer."""

    gold = True

    def __init__(self, seed, dtype, goodness, length, beta):
        super().__init__(seed, dtype, goodness, letters=3, length=length, prompts=4, beta=beta)

    def splits(self):
        answers = [] if self.gold else ["label", "chosen", "rejected"]
        return {split: rows.remove_columns(answers) for split, rows in super().splits().items()}

    def report(self, model, path, estimates):
        """Drawing takes longer than the run."""


@pytest.fixture
def small_toy(monkeypatch):
    monkeypatch.setattr(toy_world, "tiny_gpt2", functools.partial(toy_world.tiny_gpt2, width=16, layers=1))
    monkeypatch.setattr(toy_world, "Toy", SmallToy)
    monkeypatch.setattr(brain.Run, "report", lambda run: (run.path / "report.png").touch())


SHORT = """--iterations 2 --prompts-per-iteration 2 --samples-per-prompt 3 --updates-per-iteration 4
    --batch-size 2 --max-new-tokens 2 --learning-rate 0.003 --weight-decay 0.1 --eval-prompts 6 --eval-every 3
    --select-by win_rate""".split()
SCRIPT = {0: 50.0, 3: 70.0, 6: 70.0, 8: 60.0}  # scores of its evaluations, where they are scripted
draw_report = brain.Run.report


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    """Every file of a run as something to compare: all bytes or numbers, but for times and the place."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    files["metrics.jsonl"] = [line | {"time": None} for line in read_lines(path / "metrics.jsonl")]
    hidden = dict.fromkeys(("output_dir", "resume", "overwrite"))
    files["config.json"] = json.loads(files["config.json"]) | hidden
    for name in ("checkpoint/state.pt", "checkpoint/best.pt"):
        state = torch.load(path / name)
        state.get("sizes", {}).pop("metrics.jsonl", None)  # a time may be a digit shorter
        files[name] = json.dumps(state, default=torch.Tensor.tolist)
    return files


def same_files(one, other, what=None):
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set(), what


@pytest.fixture
def scripted(monkeypatch):
    """Scores on validation as in SCRIPT. -> [(split, step, weights)] of each evaluation"""
    seen, evaluate, of_run = [], brain.evaluate, brain.Run.evaluate

    def watched(run, step, split="validation"):
        seen.append((split, step, copy.deepcopy(run.policy.model.state_dict())))
        return of_run(run, step, split)

    def with_script(*arguments):
        metrics, lines = evaluate(*arguments)
        score = SCRIPT[seen[-1][1]]
        return metrics | {"win_rate": score, "elbo": score - 100}, lines

    monkeypatch.setattr(brain.Run, "evaluate", watched)
    monkeypatch.setattr(brain, "evaluate", with_script)
    monkeypatch.setattr(brain, "held_out_divergence", lambda *a: 100 - SCRIPT[seen[-1][1]])
    return seen


@pytest.mark.parametrize("select_by", ("win_rate", "elbo", "self_normalized_kl"))
def test_the_best_on_validation_is_kept_and_tested(select_by, small_toy, scripted, monkeypatch, tmp_path):
    """model/ is the later of the two best of four; test uses it, metrics name it, transformers loads it. Of
    D_n the least is best. Wrong: the last, the worst, the first of equals; a test of the last weights."""
    monkeypatch.setattr(SmallToy, "gold", select_by != "elbo")
    assert brain.main([*SHORT, "--select-by", select_by, "--output-dir", tmp_path / "run"]) == 0
    splits, steps, weights = zip(*scripted)
    assert splits == ("validation",) * 4 + ("test",) and steps == (*SCRIPT, 6)
    same = lambda w: all(torch.equal(w[name], tensor) for name, tensor in weights[2].items())  # noqa: E731
    assert list(map(same, weights)) == [False, False, True, False, True]
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "split" in line]
    assert [line.get("kept") for line in lines] == [0, 3, 6, 6, None] and lines[-1]["step"] == 6
    outputs = read_lines(tmp_path / "run/validation_outputs.jsonl")
    assert [line["step"] for line in outputs] == [step for step in SCRIPT for _ in range(6 * 3)]
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.get_vocab() == {"<end>": 0, " a": 1, " b": 2, " c": 3} and tokenizer.eos_token_id == 0


def killed_at(owner, name, count, argv):
    """A run that ends at the `count`-th call of owner.name, with an exception that nothing in it catches."""
    real, calls = getattr(owner, name), itertools.count(1)
    call = lambda *a: real(*a) if next(calls) < count else sys.exit("killed")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(owner, name, call)
        brain.main(argv)


def moments(path, argv):
    """Runs to the end. -> [{file: bytes}]: all that a SIGKILL could leave in the run directory. It is each
    state in which a line of brain.py finds it, and the same with half of what was written last."""
    states = [{}]

    def look(frame, event, argument):
        code = frame.f_code
        if code.co_filename == brain.__file__ and code.co_qualname.startswith(("Run.", "save_pol", "exec")):
            files = {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()}
            if files != (before := states[-1]):
                new = {f: data for f, data in files.items() if data not in before.values()}  # no renames
                whole = {f: len(before.get(f, b"")) if f.suffix == ".jsonl" else 0 for f in new}
                half = {f: data[: (whole[f] + len(data)) // 2] for f, data in new.items()}
                states.extend([files | half, files])
            return look

    sys.settrace(look)
    try:
        assert brain.main(argv) == 0
    finally:
        sys.settrace(None)
    return [files for files in states if Path("config.json") in files]


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(small_toy, scripted, tmp_path):
    """From every third state of its files: all as in the run that was not killed. Wrong: lines behind the
    checkpoint kept, or a round's line twice; half of a line or of a prompt's outputs kept; a checkpoint
    written in place; AdamW's state, D_t or the best score lost; a number that torch's own generator gave."""
    path = tmp_path / "run"
    states = moments(path, [*SHORT, "--output-dir", path])
    expected = timeless(path)
    assert len(states) > 80
    for i, files in enumerate(states[::3]):
        again = tmp_path / f"{i}"
        for name, data in files.items():
            (again / name).parent.mkdir(parents=True, exist_ok=True)
            (again / name).write_bytes(data)
        torch.manual_seed(i)
        resume = ["--output-dir", again, "--resume"]
        if i == 15:  # and killed while it is resumed
            killed_at(os, "truncate", 2, resume)
            killed_at(brain, "update", 1, resume)
        assert brain.main(resume) == 0, i
        same_files(timeless(again), expected, (i, list(files)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_can_be_resumed_and_extended(overwrite, small_toy, monkeypatch, tmp_path):
    """Killed in update 6, it makes the updates behind the checkpoint of update 4. When it has finished it
    makes none, and its files stay the same. With more --iterations, under a constant learning rate, it ends
    like a run that was as long from the start; also where it has replaced another run. Wrong: a checkpoint
    that is never read; a second line of test; a round drawn again; the best score forgotten; AdamW started
    anew; files of the run that was replaced; an --overwrite in config.json that deletes the checkpoint."""
    argv = [*SHORT, "--eval-every", 4, "--lr-scheduler-type", "constant", "--output-dir", tmp_path / "run"]
    if overwrite:
        assert brain.main([*argv, "--seed", 1]) == 0
    killed_at(brain, "update", 6, [*argv, "--overwrite"] if overwrite else argv)
    steps, ends, update, collect = [], [], brain.update, brain.collect
    monkeypatch.setattr(brain, "update", lambda *a: (steps.append(1), update(*a))[1])
    monkeypatch.setattr(brain, "collect", lambda *a: (steps.extend(len(a[2]) * [*a[6:]]), collect(*a))[1])
    for more in ([], [], ["--iterations", 3]):
        assert brain.main(["--output-dir", tmp_path / "run", "--resume", *more]) == 0
        ends.append((len(steps), timeless(tmp_path / "run")))
    assert [count for count, _ in ends] == [4, 4, 10]  # updates, and the prompts of round 3
    same_files(ends[0][1], ends[1][1])
    assert brain.main([*argv, "--iterations", 3, "--output-dir", tmp_path / "long"]) == 0
    same_files(ends[2][1], timeless(tmp_path / "long"))


def test_a_run_is_not_resumed_on_other_prompts(tmp_path, monkeypatch, capsys):
    """After an edit of the data a line says so, and nothing is touched; with the old data it goes on. Wrong:
    samples trained as outputs of other prompts, a KeyError, config.json written before the check."""
    tiny().save_pretrained(tmp_path / "m")
    letters().save_pretrained(tmp_path / "m")
    data, before = tmp_path / "d.jsonl", [{"prompt": spelled(x), "label": " b"} for x in PROMPTS]
    (tmp_path / "r.py").write_text("def r(completions, **_): return [y.count('a') for y in completions]")
    argv = ["--model", tmp_path / "m", "--dataset", data, "--reward-function", f"{tmp_path}/r.py:r", *SHORT]
    argv += ["--output-dir", tmp_path / "run"]
    jsonl(data, before)
    killed_at(brain, "update", 2, argv)
    left = tree(tmp_path / "run")
    edited = before[:-1] + [{"prompt": spelled(PROMPTS[0]) + " a", "label": " b"}]
    for rows in (before + edited[-1:], edited, before[:-1], [x | {"label": " c"} for x in before]):
        jsonl(data, rows)
        assert brain.main(["--resume", "--output-dir", tmp_path / "run"]) == 2
        assert "--resume: the prompts have changed" in capsys.readouterr().err
        assert tree(tmp_path / "run") == left
    jsonl(data, before)
    assert brain.main(["--resume", "--output-dir", tmp_path / "run"]) == 0


def test_an_interrupt_ends_a_run_in_one_line(small_toy, monkeypatch, tmp_path, capsys):
    """Exit code 130, and the flags that resume the run. Wrong: a traceback; a run that cannot go on."""
    with monkeypatch.context() as patch:
        patch.setattr(brain, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert brain.main([*SHORT, "--output-dir", tmp_path / "run"]) == 130
    told = f"brain: interrupted; to go on: --resume --output-dir {tmp_path}/run\n"
    assert capsys.readouterr().err.endswith(told)
    assert brain.main(["--resume", "--output-dir", tmp_path / "run"]) == 0


@pytest.mark.parametrize("kind", ["a base model", "an adapter"])
def test_an_adapter_of_a_killed_run_loads_without_brain(kind, monkeypatch, tmp_path):
    """The KL of the test outputs by plain forwards of model/, as peft loads it. Wrong: LoRA's start anew."""
    import peft

    base = start = tmp_path / "base"
    load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=DOUBLE)
    tiny().save_pretrained(base)
    letters().save_pretrained(base)
    prior = load(base)
    if kind == "an adapter":
        start = tmp_path / "start"
        prior = peft.get_peft_model(prior, peft.LoraConfig(r=2, init_lora_weights=False)).eval()
        prior.save_pretrained(start)
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"prompt": spelled(x)}) for x in PROMPTS * 2))
    (tmp_path / "r.py").write_text("def r(prompts, completions): return [y.count('a') for y in completions]")
    argv = ["--model", start, "--dataset", tmp_path / "d.jsonl", "--reward-function", f"{tmp_path}/r.py:r"]
    argv += ["--lora-rank", 2, "--output-dir", tmp_path / "run", "--dtype", "float64", "--lora-alpha", 6]
    argv += [*SHORT, "--max-new-tokens", 4, "--learning-rate", 0.005, "--beta", 0.3]
    argv += ["--select-by", "self_normalized_kl"]
    killed_at(brain, "update", 6, argv)
    monkeypatch.setattr(torch, "manual_seed", lambda seed, real=torch.manual_seed: real(seed + 1))
    assert brain.main(["--output-dir", tmp_path / "run", "--resume"]) == 0
    model, ratios = peft.PeftModel.from_pretrained(load(base), tmp_path / "run/model"), []
    for line in read_lines(tmp_path / "run/test_outputs.jsonl"):
        x, y = ([ord(letter) - 96 for letter in line[name].split()] for name in ("prompt", "output"))
        x, y = torch.tensor(x), torch.tensor(y + [0] * (len(y) < 4))
        ratios.append((plain(model, x, y, KNOWN) - plain(prior, x, y, KNOWN)).item())
    assert kind == "an adapter" or model.peft_config["default"].lora_alpha == 6
    last, test = read_lines(tmp_path / "run/metrics.jsonl")[-2:]
    assert test["split"] == "test" and test["step"] == last["kept"] > 0 and np.std(ratios) > 0.01
    assert test["kl_to_prior"] == pytest.approx(np.mean(ratios), abs=1e-9)


@pytest.mark.parametrize("gold", [True, False])
def test_report(gold, small_toy, monkeypatch, tmp_path):
    """report.png is a picture, and its lines are the numbers of metrics.jsonl. Wrong: the reward of the
    updates' old outputs for the policy's; the line of test; a dot where nothing was measured; a crash without
    gold answers or updates."""
    from matplotlib import figure, image

    figures, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda *a, **k: (figures.append(a[0]), savefig(*a, **k)))
    monkeypatch.setattr(brain.Run, "report", draw_report)
    monkeypatch.setattr(SmallToy, "gold", gold)
    sizes = [] if gold else ["--select-by", "elbo", "--iterations", 0]
    assert brain.main([*SHORT, *sizes, "--output-dir", tmp_path / "run"]) == 0
    assert image.imread(tmp_path / "run/report.png").std() > 0.01
    metrics, shown = read_lines(tmp_path / "run/metrics.jsonl"), {}
    for line in itertools.chain(*(axis.get_lines() for axis in figures[0].axes)):
        points = np.ma.filled(np.ma.array(line.get_xydata(), dtype=float), np.nan)
        shown[line.get_label()] = points[np.isfinite(points).all(1)]
    kept = metrics[-1]["step"]  # test
    assert shown.pop(f"kept: update {kept}")[:, 0].tolist() == [kept, kept]
    for name, points in shown.items():
        # Of updates, or of the evaluations on validation prompts.
        of = "loss" if name in ("loss", "ess_alpha", "ess_beta", "ended") else "kept"
        expected = [[line["step"], line[name]] for line in metrics if of in line and name in line]
        np.testing.assert_allclose(points, np.reshape(expected, (-1, 2)), rtol=1e-9, err_msg=name)
    assert len(shown) == 10 and (not gold or all(map(len, shown.values())))


@pytest.mark.parametrize("place, full", [
    ((torch, "save"), lambda *_, save=torch.save: save(torch.ones(99), "/dev/full")),
    ((brain.Run, "write"), lambda *_: open("/dev/full", "wb", 0).write(b"x")),
])  # fmt: skip
def test_a_full_disk_ends_the_run_in_one_line(place, full, small_toy, monkeypatch, tmp_path, capsys):
    """At its fourth writing, after which the run goes on. Wrong: a traceback; a checkpoint cut in writing."""
    command, ways = [*SHORT, "--output-dir", tmp_path / "run"], iter([getattr(*place)] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(*place, lambda *arguments: next(ways, full)(*arguments))
        assert brain.main(command) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("brain")]
    assert ("No space left" in line or "once the disk has room" in line) and "--resume" in line
    assert brain.main([*command, "--resume"]) == 0


def test_a_loss_that_is_not_finite_ends_the_run(small_toy, monkeypatch, tmp_path, capsys):
    """Exit 2 and one line; metrics and checkpoint without that update. Wrong: a traceback; NaN in a line."""
    real, calls = brain.brain_loss, itertools.count(1)
    # Two of a batch: infinite in the fourth update.
    factor = lambda log_q: math.inf if log_q.requires_grad and next(calls) > 6 else 1  # noqa: E731
    monkeypatch.setattr(brain, "brain_loss", lambda log_q, *a: real(log_q, *a) * factor(log_q))
    made, toy = [], toy_world.Toy
    monkeypatch.setattr(toy_world, "Toy", lambda *a, **more: made.append((a, more)) or toy(*a, **more))
    own = "--seed 3 --dtype float64 --goodness logistic --beta 2".split()
    assert brain.main([*SHORT, *own, "--output-dir", tmp_path / "run"]) == 2
    assert made == [((3, "float64", "logistic"), dict(length=2, beta=2.0))]  # the world has the settings
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("brain: ") and "not finite" in last and "--learning-rate" in last
    steps = [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3] and torch.load(tmp_path / "run/checkpoint/state.pt")["step"] == 3


# ------------------------------------------------------------------------------------------
# 9. The command line: settings

SFT, SFT_REWARD = "CarperAI/openai_summarize_tldr_sft", "CarperAI/openai_summarize_tldr_rm_checkpoint"
HH, HH_REWARD = "timdettmers/qlora-hh-rlhf-7b", "Dahoas/gptj-rm-static"
GPTJ, LLAMA_7B = "EleutherAI/gpt-j-6B", "huggyllama/llama-7b"
SFT_COMPANIONS = dict(
    tokenizer=GPTJ, reward_model=SFT_REWARD, reward_base=SFT, dataset="CarperAI/openai_summarize_tldr",
    reward_template="<|startoftext|>{prompt}{output}", max_prompt_tokens=500, max_new_tokens=50,
)  # fmt: skip
HH_COMPANIONS = dict(
    reward_model=HH_REWARD, reward_base=GPTJ, reward_template="{prompt}{output}<|endoftext|>",
    dataset="Dahoas/rm-static", max_prompt_tokens=500, max_new_tokens=128,
)  # fmt: skip
TEXTS = "base_model tokenizer reward_model reward_base reward_template reward_function reward_label goodness "
TEXTS += "dataset dataset_config dataset_train_split dataset_test_split output_dir select_by"
DEFAULTS = dict.fromkeys((TEXTS + " max_prompt_tokens outputs_per_forward").split()) | dict(
    model="toy", method="brain", beta=1.0, resume=False, overwrite=False, seed=0, device="cpu",
    dtype="float32", iterations=4, trust_remote_code=False, samples_per_prompt=32, prompts_per_iteration=1000,
    updates_per_iteration=400, max_new_tokens=64, learning_rate=1e-5, lr_scheduler_type="linear",
    warmup_steps=0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, lora_rank=8, lora_alpha=32,
    batch_size=8, load_in_4bit=False, eval_prompts=128, eval_every=400, greedy=False, prompts_per_forward=4,
)  # fmt: skip
EDGES = dict.fromkeys("seed iterations eval_prompts lora_rank warmup_steps".split(), 0) | dict.fromkeys((
    "prompts_per_iteration updates_per_iteration batch_size max_prompt_tokens max_new_tokens lora_alpha "
    "outputs_per_forward prompts_per_forward eval_every").split(), 1) | dict(
    samples_per_prompt=2, weight_decay=0.0, adam_beta1=0.0, adam_beta2=0.0, learning_rate=0.0, beta=1e-6,
)  # fmt: skip
TYPED = {name: name[-4:] for name in TEXTS.split()} | EDGES | dict(
    seed=7, warmup_steps=3, reward_template="<{output}>", goodness="logistic", method="dpo-sft",
    dtype="float64", lr_scheduler_type="cosine", select_by="elbo", device="cpu",
)  # fmt: skip
del TYPED["reward_function"]  # which goes with no --reward-model
OWN = ["--model", "m", "--dataset", "d", "--reward-model", "r0"]


@pytest.mark.parametrize("model, companions", [
    ("m", dict(dataset="d", reward_model="r0")), (SFT, SFT_COMPANIONS), (HH, HH_COMPANIONS)])  # fmt: skip
def test_what_is_typed_counts_before_companions_and_these_before_defaults(model, companions, monkeypatch):
    """A flag, in both spellings, changes what it names and what belongs to it; the lowest values are allowed.
    Wrong: another default, `value or companion`, > for >=, a companion's template with a user's reward."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start = OWN if model == "m" else ["--model", model]
    before = DEFAULTS | companions | {"model": model}
    assert vars(brain.parse(start)) == before
    for name, value in TYPED.items():
        expected = before | {name: value}
        if name == "reward_model":
            expected |= {"reward_base": None, "reward_template": None}
        elif name == "updates_per_iteration":
            expected["eval_every"] = 1  # an evaluation at the end of every round
        hyphens = "--" + name.replace("_", "-")
        for words in ([f"--{name}", str(value)], [hyphens, str(value)], [f"{hyphens}={value}"]):
            found = vars(brain.parse([*start, *words]))
            assert found == expected and type(found[name]) is type(value), name
    for name in ("overwrite", "load_in_4bit", "greedy", "trust_remote_code"):
        assert vars(brain.parse([*start, brain.flag(name)])) == before | {name: True}
    own = dict.fromkeys(("reward_model", "reward_base", "reward_template")) | dict(reward_function="f.py:f")
    if model == SFT:
        assert vars(brain.parse([*start, "--reward-function", "f.py:f"])) == before | own


def test_settings_that_follow_from_others(monkeypatch):
    """Wrong: bfloat16 where all parameters are trained, which rounds a step of 1e-5 away; n = 32 for pairs;
    evaluations more than 1000 updates apart; a toy that is not its own or not on the CPU."""
    own = dict(iterations=6, prompts_per_iteration=128, updates_per_iteration=60, eval_every=60, lora_rank=0)
    own |= dict(learning_rate=1e-3, weight_decay=0.0, max_prompt_tokens=2, max_new_tokens=5, eval_prompts=64)
    tried, own["select_by"] = [], "self_normalized_kl"
    monkeypatch.setattr(torch, "zeros", lambda size, device: tried.append(device) or torch.ones(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = vars(brain.parse(["--max-new-tokens", "5"]))
    assert found == DEFAULTS | own and brain.parse([]).max_new_tokens == 4 and set(tried) == {"cpu"}
    settled = lambda *more: (lambda s: (s.device, s.dtype))(brain.parse([*OWN, *more]))  # noqa: E731
    assert settled() == ("cuda", "bfloat16") and settled("--lora-rank", "0") == ("cuda", "float32")
    assert settled("--device", "cpu") == ("cpu", "float32")
    assert settled("--device", "cuda:1", "--dtype", "float16") == ("cuda:1", "float16")
    assert tried[-2:] == ["cpu", "cuda:1"]  # a device that does not exist fails here
    assert brain.parse([*OWN, "--method", "dpo"]).samples_per_prompt == 2
    assert brain.parse([*OWN, "--updates-per-iteration", "1001"]).eval_every == 1000


def test_what_is_outside_of_a_range_is_refused():
    """Wrong: a number without a range, a bound that nan or its own value passes."""
    fields = dataclasses.fields(brain.Settings)
    assert set(EDGES) == {f.name for f in fields if f.type in (int, float, int | None)}
    outside = [(name, edge - 1) for name, edge in EDGES.items()] + [("seed", 2**64), ("adam_beta1", 1.0)]
    outside += [("adam_beta2", 1.0), ("learning_rate", math.nan), ("beta", math.inf)]
    for name, value in outside:
        with pytest.raises(brain.UserError, match=f"^{brain.flag(name)} {value}: must be at least"):
            brain.parse([*OWN, brain.flag(name), str(value)])


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    """The shell does so for `--flag ~/x` and not for `--flag=~/x`. Wrong: a directory that is named `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["model", "base_model", "tokenizer", "dataset", "output_dir", "reward_function"]
    found = vars(brain.parse([f"{brain.flag(name)}=~/x" for name in names]))
    assert {found[name] for name in names} == {f"{tmp_path}/x"}


def test_help_shows_every_setting_with_its_default_and_the_papers_value(capsys):
    """Wrong: a field without a word about it, a default lost or said twice, a `%` that breaks argparse."""
    with pytest.raises(SystemExit) as stop:
        brain.main(["--help"])
    text = capsys.readouterr().out
    parts = re.split(r"\n  (?=--)", text)[1:]
    shown = {re.match(r"--[a-z0-9-]+", part)[0]: " ".join(part.split()) for part in parts}
    for field in dataclasses.fields(brain.Settings):
        told, default = shown[brain.flag(field.name)], f"(default: {field.default})"
        word = field.metadata["help"].removesuffix("%(default).0s")
        assert word and word in told and told.count("(default: ") <= 1 and "None" not in told
        assert field.default in (None, False) or default in told, told
    paper = [f"(paper: {value})" in " ".join(text.split()) for value in ("32", "1e-5", "0.1", "0.95")]
    assert all(paper) and not stop.value.code


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


def bpe_of(texts, size=8, **more):
    """Byte-level BPE like GPT-2's, `<|endoftext|>` as id 0; with a small `size`, one token per letter."""
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


def scored_by_hand(base, path, words, scores):
    """Each of these (text, reward) has the score of a bare reward model, read at the text's last token."""
    tensors = torch.load(path, weights_only=True)
    decoder = transformers.GPTJModel(transformers.GPTJConfig.from_pretrained(base)).float().eval()
    decoder.load_state_dict({name: tensors[f"transformer.{name}"].float() for name in decoder.state_dict()})
    for text, reward in scores:
        with torch.no_grad():
            hidden = decoder(torch.tensor([words(text).input_ids])).last_hidden_state[0, -1]
        assert reward == pytest.approx((tensors["v_head.weight"][0].float() @ hidden).item(), abs=1e-4)
    assert np.std([reward for _, reward in scores]) > 0.1


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """HF_HOME with the paper's models and data: the real names and files, tiny parameters."""
    home, ids = tmp_path_factory.mktemp("hub"), dict(bos_token_id=0, eos_token_id=0)
    words = bpe_of([*POSTS, *SUMMARIES, *CHATS, "TL;DR: <|startoftext|>"], 120)
    sizes = GPT | ids | dict(n_positions=1000, rotary_dim=4, vocab_size=len(words) + 9)
    config = transformers.GPTJConfig(**sizes)
    for name in (SFT, GPTJ):  # the one without a tokenizer, the other without parameters
        config.save_pretrained(snapshot(home, name))
    tensors = loud(transformers.GPTJForCausalLM(config), 1, 0.2).state_dict()
    torch.save(tensors, snapshot(home, SFT) / "pytorch_model.bin")
    for name, file, seed in ((SFT_REWARD, "pytorch_model.bin", 2), (HH_REWARD, "hf_ckpt.pt", 3)):
        states = loud(transformers.GPTJModel(config), seed).state_dict()  # one file, in half precision
        tensors = {f"transformer.{name}": w.half() for name, w in states.items()}
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)  # of an older transformers
        tensors["v_head.weight"] = random(1, 32, seed=seed).half()
        torch.save(tensors, snapshot(home, name) / file)
    sizes = LLAMA | ids | dict(max_position_embeddings=700, vocab_size=len(words))
    model = loud(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), 4, 0.2)
    for name, saved in ((LLAMA_7B, model), (LLAMA_7B, words), (GPTJ, words)):
        saved.save_pretrained(snapshot(home, name))
    lora = dict(lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    lora = peft.LoraConfig(r=64, lora_alpha=16, **lora)
    model = loud(peft.get_peft_model(model, lora), 5, 0.2)
    lora.base_model_name_or_path = LLAMA_7B
    lora.save_pretrained(snapshot(home, HH))
    tensors = {name.replace(".default.", "."): w for name, w in model.state_dict().items() if "lora_" in name}
    torch.save(tensors, snapshot(home, HH) / "adapter_model.bin")
    posts = [{"prompt": post + "\nTL;DR:", "label": " " + text} for post, text in zip(POSTS, SUMMARIES)]
    chats = [{"prompt": chat, "response": " yes", "chosen": " yes", "rejected": " no"} for chat in CHATS]
    places = {SFT_COMPANIONS["dataset"]: dict(train=posts[:6], valid=posts[6:8], test=posts[8:]),
              HH_COMPANIONS["dataset"]: dict(train=chats[:8], test=chats[8:])}  # fmt: skip
    for name, splits in places.items():
        for split, rows in splits.items():
            file = f"data/{split}-00000-of-00001-0123456789abcdef.parquet"
            datasets.Dataset.from_list(rows).to_parquet(snapshot(home, name, "dataset") / file)
    return home


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """What a user has: model/ (one token per letter), reward/, count.py, data.jsonl; and what is wrong."""
    place, words = tmp_path_factory.mktemp("mine"), bpe_of(["abcdef "])

    def save(name, kind=transformers.LlamaForCausalLM, **changes):
        sizes = LLAMA | dict(vocab_size=10, pad_token_id=0, bos_token_id=0, eos_token_id=0) | changes
        model = loud(kind(transformers.LlamaConfig(**sizes)), 7, 0.15)
        model.save_pretrained(place / name)
        return model

    adapted = peft.get_peft_model(save("model"), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.save_pretrained(place / "adapter")  # it names no base
    save("narrow", hidden_size=16), save("deep", num_hidden_layers=3), save("no-words"), save("no-end")
    for name, count in (("reward", 1), ("three", 3)):
        save(name, transformers.LlamaForSequenceClassification, num_labels=count)
    transformers.T5Config(d_model=16).save_pretrained(place / "t5")
    evil = type("Evil", (str,), {"__reduce__": lambda self: (open, (self[:], "w"))})  # writes, unpickled
    torch.save({"v_head.weight": evil(place / "ran")}, place / "evil.bin")
    for name, file in (("model", "pytorch"), ("reward", "pytorch"), ("adapter", "adapter")):
        shutil.copytree(place / name, place / f"evil-{name}", ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copy(place / "evil.bin", place / f"evil-{name}" / f"{file}_model.bin")
    for name in ("model", "narrow", "deep", "reward", "three", "t5", "evil-model"):
        words.save_pretrained(place / name)
    words.eos_token = None
    words.save_pretrained(place / "no-end")
    draw = np.random.default_rng(0)
    text = lambda least, most: "".join(draw.choice(list("abcdef"), draw.integers(least, most)))  # noqa: E731
    settled = dict(goodness="bradley-terry", select_by="win_rate")
    before = json.dumps(vars(brain.parse(good(output_dir="run"))) | settled)
    letters = "def letters(completions, **columns): return [2.0 * y.count('a') for y in completions]\nno = 3"
    old = "notes.txt other/notes.txt run/notes.txt run/metrics.jsonl run/checkpoint/state.pt run/model/old"
    files = dict.fromkeys(old.split(), "old") | {
        "unknown/config.json": json.dumps({"model_type": "its-own", "auto_map": {"AutoConfig": "evil.Kind"}}),
        "unknown/evil.py": f"open({str(place / 'ran')!r}, 'w')\nclass Kind: pass\n",
        "broken.jsonl": '{"prompt": "a"}\n{"prompt"', "count.py": letters, "run/config.json": before,
    }  # fmt: skip
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    (place / "empty").mkdir()
    (place / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n{"prompt": "a"}\n')
    jsonl(place / "data.jsonl", [{"prompt": text(2, 5), "label": text(1, 6)} for _ in range(300)])
    jsonl(place / "pairs.jsonl", [{"prompt": text(2, 5), "chosen": "a", "rejected": "b"} for _ in range(40)])
    jsonl(place / "no-gold.jsonl", [{"prompt": text(2, 5)} for _ in range(40)])
    jsonl(place / "long.jsonl", [{"prompt": "a" * (99 + i), "label": "a"} for i in range(6)])
    jsonl(place / "one.jsonl", [{"prompt": "a", "label": "a"}])
    return place


GOOD = dict(
    model="model", dataset="data.jsonl", reward_function="count.py:letters", output_dir="new", device="cpu",
    iterations=0, samples_per_prompt=2, eval_prompts=2, max_new_tokens=3, lora_rank=0,
)  # fmt: skip
BY_MODEL = dict(reward_function=None, reward_model="three")


def good(*more, **changes):
    """A command that runs, with changes: None takes a flag out, True gives it without a value."""
    given = {brain.flag(name): value for name, value in (GOOD | changes).items() if value is not None}
    words = [(name,) if value is True else (name, str(value)) for name, value in given.items()]
    return [*itertools.chain(*words), *more]


def tree(path):
    files = [file for file in path.rglob("*") if "__pycache__" not in str(file)]
    return {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in files}


def each(name, values, **more):
    """A row for each value of one flag: {value: what is told beside `--flag value:`}."""
    return [(good(**more | {name: x}), f"{brain.flag(name)} {x}:", told) for x, told in values.items()]


REFUSED = [  # arguments, then what the one line on stderr must name
    *each("samples_per_prompt", {1: "at least 2"}), *each("seed", {2**64: "below"}),
    *each("adam_beta1", {1.0: "below 1"}), *each("beta", {0.0: "at least 1e-06"}),
    *each("device", {"gpu": "", "cuda:99": ""}), *each("output_dir", {"notes.txt/run": ""}),
    (good(method="dpo-sft", samples_per_prompt=3), "--samples-per-prompt:", "dpo-sft", "even"),
    (good("--smaples", "4"), "--smaples 4", "--help"), (good("--max-new", "3"), "--max-new 3"),
    (good(batch_size="many"), "--batch-size", "'many'"), (good(method="ppo"), "--method", "'ppo'", "rso"),
    (good(lr_scheduler_type="cosin"), "--lr-scheduler-type", "'cosin'", "cosine"),
    (good(dataset=None), "--dataset: missing"), (good(load_in_4bit=True), "--load-in-4bit:", "--lora-rank"),
    (good(reward_function=None), "--reward-model or --reward-function"),
    (good(reward_model="reward"), "--reward-model or --reward-function"),
    *[(good(**{f"reward_{name}": "{output}"}), f"--reward-{name}:", "a --reward-model")
      for name in ("template", "base", "label")],
    (good(reward_template="{prompt}", **BY_MODEL), "--reward-template:", "{output}"),
    *each("select_by", {"win_rate": "gold"}, dataset="no-gold.jsonl"),
    *each("model", {"nosuch": "", "./nosuch": "no such file", "no-words": "--tokenizer", "t5": "T5Config",
                    "no-end": "eos_token", "unknown": "", "evil-model": "", "reward": "lm_head.weight"}),
    (good(model="no-words", tokenizer="nosuch"), "nosuch:", "--tokenizer"),
    (good(max_new_tokens=64), "--max-new-tokens:", "context of 64"),
    (good(base_model="model"), "--base-model:", "model is not an adapter"),
    *each("lora_rank", {0: "adapter"}, model="adapter", base_model="model"),
    *[(good(model="adapter", lora_rank=8, base_model=name), told) for name, told in (
        (None, "--base-model"),
        ("nosuch", "nosuch:"), ("narrow", "size mismatch"), ("deep", "missing adapter keys"))],
    *each("model", {"evil-adapter": ""}, base_model="model", lora_rank=8),
    *each("reward_function", {"no.py:f": "file.py:", "count.py": "file.py:", "count.py:no": "no function"}),
    *each("reward_label", {None: "LABEL_0", 3: "LABEL_2"}, **BY_MODEL),
    *each("reward_model", {"model": "score.", "evil-reward": "", "evil.bin": "--reward-base"}, **BY_MODEL),
    *each("reward_model", {"evil.bin": ""}, **BY_MODEL, reward_base="model"),
    *each("dataset", {"no.jsonl": "no such file", "no.json": "no such file", "empty": "", "broken.jsonl": "",
                      "latin.jsonl": "utf-8", "one.jsonl": "it takes 3", "set[12].jsonl": "rename it"}),
    *each("dataset", {"long.jsonl": "every prompt of train is empty or too long"}, max_prompt_tokens=500),
    *[row for both in (None, True) for row in each(
        "output_dir", {"run": "--resume or --overwrite"}, resume=both, overwrite=both)],
    *each("output_dir", {"other": "other files", "model": "other files"}, overwrite=True),
    *[(good(output_dir=name, resume=True), "--resume:", "holds no run") for name in (None, "other")],
    (good(output_dir="run", resume=True, dtype="float64", beta=2.0), "run has --beta 1.0, --dtype float32;"),
    (good(output_dir="run", resume=True, seed=1, goodness="logistic"), "--resume: the run has",
     "--goodness bradley-terry, --seed 0;"),
    *[([f"--{name}", "8"], f"--{name}: the toy world has its own") for name in (
        "reward-model", "reward-function", "dataset", "base-model", "tokenizer", "lora-rank")],
    *[(["--max-new-tokens", size], "--max-new-tokens: the toy world") for size in "16"],
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1])
def test_bad_input(case, mine, monkeypatch, capsys):
    """Exit code 2, one line that names the flag, nothing written, no code of a checkpoint run. Wrong: a
    traceback, another flag's name, a directory made too early, a pickle or a Python file opened."""
    words, *told = case
    monkeypatch.chdir(mine)
    before = tree(mine)
    assert brain.main(words) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("brain: ")]
    assert len(lines) == 1 and error.endswith(lines[0] + "\n") and "Traceback" not in error
    assert all(text in lines[0] for text in told) and tree(mine) == before, lines[0]


@pytest.mark.parametrize("kind", [brain.UserError, FloatingPointError, OSError, torch.OutOfMemoryError])
def test_what_the_user_can_fix_is_one_line(kind, monkeypatch, capsys):
    """Wrong: a GPU that is full, or an update that is not finite, as a traceback or with another code."""
    monkeypatch.setattr(brain, "execute", lambda settings: (_ for _ in ()).throw(kind("mend it")))
    assert brain.main([]) == 2 and capsys.readouterr().err.startswith("brain: mend it")


def test_a_run_is_overwritten_and_resumed(mine, tmp_path, monkeypatch):
    """Wrong: old files beside new ones, a user's notes gone, a finished run begun anew, a flag refused."""
    monkeypatch.chdir(mine)
    run = tmp_path / "run"  # of 500 tokens a context of 64 leaves 61, and a pair is two outputs:
    more = dict(max_prompt_tokens=500, method="dpo", samples_per_prompt=32, dataset="pairs.jsonl")
    shutil.copytree(mine / "run", run)
    words = good(output_dir=run, **more)
    assert brain.main([*words, "--overwrite"]) == 0
    names, config = {path.name for path in run.iterdir()}, json.loads((run / "config.json").read_text())
    assert names == FINISHED | {"notes.txt"} and not (run / "model/old").exists()
    expected = vars(brain.parse([*words, "--overwrite"])) | dict(torch=torch.__version__)
    expected |= dict(goodness="bradley-terry", select_by="win_rate")
    del expected["max_prompt_tokens"]
    assert config | expected == config and config["samples_per_prompt"] == 2
    before, old = tree(run), jsonl(run / "metrics.jsonl")
    (run / "report.png").unlink(), (run / "test_outputs.jsonl").write_text("")
    assert brain.main([*words, "--resume", "--outputs-per-forward", "1", "--learning-rate", "1e-6"]) == 0
    new = jsonl(run / "metrics.jsonl")
    assert new[0] == old[0] and [x | {"time": 0} for x in new] == [x | {"time": 0} for x in old]
    for name in ("test_outputs.jsonl", "validation_outputs.jsonl", "report.png", "model/model.safetensors"):
        assert (run / name).read_bytes() == before[run / name][1]


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


def test_the_papers_summarisation_command(hub, tmp_path):
    """In a process of its own, made small by flags. Wrong: a companion lost, a file lost or left elsewhere, a
    reward at another token or in float16, the 9 logits without a token, an adapter without its base."""
    run, cwd = tmp_path / "run", tmp_path / "cwd"
    cwd.mkdir()
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    theirs |= dict(HF_HOME=str(hub), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    words = [sys.executable, HERE / "brain.py", "--model", SFT, *SMALL, "--output-dir", str(run)]
    process = subprocess.run(words, cwd=cwd, env=theirs, capture_output=True, text=True)
    assert process.returncode == 0 and "brain:" not in process.stderr, process.stderr
    assert {path.name for path in run.iterdir()} == FINISHED and not list(cwd.iterdir())
    config = json.loads((run / "config.json").read_text())
    expected = DEFAULTS | SFT_COMPANIONS | dict(
        model=SFT, goodness="bradley-terry", select_by="win_rate", output_dir=str(run), samples_per_prompt=5,
        iterations=1, prompts_per_iteration=4, updates_per_iteration=2, eval_every=2, batch_size=3,
    )  # fmt: skip
    assert config | expected == config
    tensors = torch.load(snapshot(hub, SFT) / "pytorch_model.bin", weights_only=True)
    count = sum(w.numel() for w in tensors.values())
    assert f"{SFT}, {count:,} parameters, torch.float32, on cpu\n" in process.stdout
    steps = [(line["step"], line.get("split")) for line in jsonl(run / "metrics.jsonl")]
    assert steps == [(0, "validation"), (0, None), (1, None), (2, None), (2, "validation"), (2, "test")]
    words = transformers.AutoTokenizer.from_pretrained(snapshot(hub, GPTJ))
    samples, tests = follows_from_its_samples(run, 5), jsonl(run / "test_outputs.jsonl")
    scores = [(line["prompt"] + line["output"], line["reward"]) for line in samples + tests]
    scores += [(line["prompt"] + line["gold"], line["gold_reward"]) for line in tests]
    scores = [("<|startoftext|>" + text, reward) for text, reward in scores]
    scored_by_hand(snapshot(hub, SFT), snapshot(hub, SFT_REWARD) / "pytorch_model.bin", words, scores)
    asked = [f"{post}\nTL;DR: {text}" for post, text in zip(POSTS[8:], SUMMARIES[8:]) for _ in range(5)]
    assert [line["prompt"] + line["gold"] for line in tests] == asked
    model = AutoModelForCausalLM.from_pretrained(snapshot(hub, SFT)).eval()
    log_p_by_hand(model, words, samples)
    lora = peft.PeftModel.from_pretrained(model, run / "model").peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.base_model_name_or_path) == (8, 32, 0.0, SFT)


def test_the_papers_dialogue_command(hub, tmp_path, monkeypatch, capsys):
    """An adapter is the prior, a second one the policy; the reward is read at the end token. Wrong: p of the
    base alone, rank 8, both adapters together, the prior's saved, none trained."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "datasets")
    drawn, draw = [], brain.draw_held_out
    monkeypatch.setattr(brain, "draw_held_out", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    run = tmp_path / "run"
    words = ["--model", HH, *SMALL, "--learning-rate", "1e-3", "--max-new-tokens", "12", "--output-dir", run]
    assert brain.main(words) == 0
    config = json.loads((run / "config.json").read_text())
    assert config | HH_COMPANIONS | dict(max_new_tokens=12) == config
    assert "validation: not in the data; 1 prompts of train" in capsys.readouterr().out
    words = transformers.AutoTokenizer.from_pretrained(snapshot(hub, LLAMA_7B))
    lines = follows_from_its_samples(run, 5)
    scores = [(line["prompt"] + line["output"] + "<|endoftext|>", line["reward"]) for line in lines]
    scored_by_hand(snapshot(hub, GPTJ), snapshot(hub, HH_REWARD) / "hf_ckpt.pt", words, scores)
    bases = [AutoModelForCausalLM.from_pretrained(snapshot(hub, LLAMA_7B)).eval() for _ in range(2)]
    prior, policy = map(peft.PeftModel.from_pretrained, bases, (snapshot(hub, HH), run / "model"))
    log_p_by_hand(prior, words, lines)
    lora = policy.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.base_model_name_or_path) == (64, 16, LLAMA_7B)
    for x in drawn[-1]:  # the test, by the policy of update 2
        for model, found in ((prior, x.log_p), (policy, x.log_q_proposal)):
            with torch.no_grad():
                by_hand = [plain(model, x.example.ids, y, len(words)).item() for y in x.outputs]
            assert found.tolist() == pytest.approx(by_hand, abs=2e-3)
    assert jsonl(run / "metrics.jsonl")[-1]["step"] == 2 and len(drawn[-1]) == 2
    assert max((x.log_p - x.log_q_proposal).abs().max() for x in drawn[-1]) > 0.02


def test_an_adapter_on_a_base_in_4_bits(mine, tmp_path, monkeypatch):
    """Wrong: the base in full precision; a forward of a single token, which has no gradient there; an adapter
    that names the base that its prior named, not the one that was used."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(mine)
    sizes = LLAMA | dict(hidden_size=64, intermediate_size=128, vocab_size=10, eos_token_id=0)
    base = loud(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), 3, 0.15)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(mine / "model").save_pretrained(tmp_path / "adapter")
    jsonl(tmp_path / "short.jsonl", [{"prompt": text} for text in ("a", "ab", "abc", "abcd", "abcde") * 4])
    moved = {}
    update = brain.update

    def seen(policy, *arguments):
        metrics = update(policy, *arguments)
        gradients = {name: p.grad.abs().sum().item() for name, p in policy.parameters().items()}
        moved.update({name: moved.get(name, 0) + size for name, size in gradients.items()})
        bases = [x for name, x in policy.model.named_modules() if name.endswith("base_layer")]
        assert bases and all(type(x).__name__ == "Linear4bit" for x in bases)
        return metrics

    monkeypatch.setattr(brain, "update", seen)
    names = {name: str(tmp_path / name) for name in ("adapter", "base", "short.jsonl", "run")}
    words = good(
        model=names["adapter"], base_model=names["base"], dataset=names["short.jsonl"],
        output_dir=names["run"], load_in_4bit=True, outputs_per_forward=1, max_new_tokens=2, lora_rank=2,
        iterations=1, batch_size=4, updates_per_iteration=4, learning_rate=1e-3,
    )  # fmt: skip
    assert brain.main(words) == 0
    assert moved and min(moved.values()) > 0
    saved = peft.PeftConfig.from_pretrained(tmp_path / "run" / "model")
    assert saved.base_model_name_or_path == str(tmp_path / "base")


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
    assert len(samples) == 2 * 32 * 8 and len(tests) == 25 * 8
    assert np.mean([line["log_q_proposal"] - line["log_p"] for line in samples[256:]]) > 0.2
    assert all(line["reward"] == 2 * line["output"].count("a") for line in samples + tests)
    assert all(line["gold_reward"] == 2 * line["gold"].count("a") for line in tests)
    again = more | dict(iterations=0, model=run / "model", output_dir=tmp_path / "again")
    assert brain.main(good(**again)) == 0
    same = [line | {"step": test["step"]} for line in jsonl(tmp_path / "again/test_outputs.jsonl")]
    assert same == tests and "0 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("asked, goodness", [(None, "logistic"), ("bradley-terry", "bradley-terry")])
def test_the_goodness_of_a_classifier(asked, goodness, mine, tmp_path, monkeypatch):
    """Of three labels: logistic unless asked otherwise, in what is recorded and in the elbo."""
    monkeypatch.chdir(mine)
    words = good(**BY_MODEL, reward_label="LABEL_1", goodness=asked, eval_prompts=9, output_dir=tmp_path)
    assert brain.main(words) == 0
    assert json.loads((tmp_path / "config.json").read_text())["goodness"] == goodness
    first, r = jsonl(tmp_path / "metrics.jsonl")[0], jsonl(tmp_path / "validation_outputs.jsonl")
    by_hand = np.mean(np.log(goodness_by_hand([line["reward"] for line in r], goodness, 1)))
    assert first["elbo"] == pytest.approx(by_hand, abs=1e-5) and abs(by_hand) > 0.1


TALK = """
def talk(prompts, completions, mood, completion):
    asked, replies = [x[1]["content"] for x in prompts], [y["role"] + y["content"] for (y,) in completions]
    return [len(x + y) + m for x, y, m in zip(asked, replies, mood)]
"""


def test_chat_models(tmp_path):
    """Messages go through the policy's chat template, and through the reward model's, the output as reply; a
    reward function has messages and columns. Wrong: one template for both, no opening for a reply, the output
    outside of its turn, completions as text, another row's column, a local model's path not found."""
    texts = [*ANIMALS, "is be kind big? yes no", "<system> <user>\n", "assistant:;"]
    policy = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    policy = bpe_of(texts, 60, chat_template=policy + "{% if add_generation_prompt %}<assistant>{% endif %}")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    words = {"policy": policy, "reward": bpe_of(texts, 60, chat_template=template)}
    sizes = LLAMA | dict(max_position_embeddings=300, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    config = transformers.LlamaConfig(**sizes, vocab_size=len(words["policy"]), num_labels=1)
    model = loud(transformers.LlamaForCausalLM(config), 1, 0.2)
    scorer = loud(transformers.LlamaForSequenceClassification(config), 2)
    for name, saved in (("policy", model), ("reward", scorer)):
        saved.save_pretrained(tmp_path / name)
        words[name].save_pretrained(tmp_path / name)
    system, yes = dict(role="system", content="be kind"), dict(role="assistant", content="yes")
    ask = [[system, dict(role="user", content=f"is {a} big?")] for a in ANIMALS]
    jsonl(tmp_path / "data.jsonl", [dict(prompt=x, completion=[yes], mood=90 * i) for i, x in enumerate(ask)])
    (tmp_path / "talk.py").write_text(TALK)
    more = dict(model=tmp_path / "policy", dataset=tmp_path / "data.jsonl")
    more |= dict(iterations=1, updates_per_iteration=1, prompts_per_iteration=4)
    by = dict(reward_model=tmp_path / "reward", reward_function=f"{tmp_path}/talk.py:talk")
    for other, name in zip(reversed(by), by):
        run = tmp_path / name
        assert brain.main(good(**more | {name: by[name], other: None, "output_dir": run})) == 0
        samples, tests = follows_from_its_samples(run, 2), jsonl(run / "test_outputs.jsonl")
        scores = [(line["prompt"][1]["content"], line["output"], line["reward"]) for line in samples + tests]
        scores += [(line["prompt"][1]["content"], "yes", line["gold_reward"]) for line in tests]
        assert len(scores) == 4 * 2 + 2 + 2 and np.std([value for *_, value in scores]) > 0.1
        for user, reply, value in scores:
            ids = words["reward"](f"system: be kind;user: {user};assistant: {reply};").input_ids
            with torch.no_grad():
                score = scorer.score.weight[0] @ scorer.model(torch.tensor([ids])).last_hidden_state[0, -1]
            by_hand = 90 * ANIMALS.index(user.split()[1]) + len(user + "assistant" + reply)
            assert value == pytest.approx(score.item() if name == "reward_model" else by_hand, abs=1e-4)
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
    assert re.fullmatch(r"brain-\d{8}-\d{6}-\d+", run.name) and len(list(tmp_path.iterdir())) == 1
    assert {path.name for path in run.iterdir()} == FINISHED | {"toy.png"}
    world = toy_world.Toy()
    log_q = world.world.log_probs(AutoModelForCausalLM.from_pretrained(run / "model"))
    assert toy_world.kl(world.log_posterior, log_q).mean() == pytest.approx(after, abs=2e-3)
    assert len(jsonl(run / "samples.jsonl")) == 6 * 128 * 32 == 12 * len(jsonl(run / "test_outputs.jsonl"))
