"""The claims of brain.py, each a test, in the order of that file.

A docstring names the wrong version that its test catches. What can be enumerated is enumerated, in float64,
by code that shares nothing with what it checks: numpy, toy/world.py, plain Hugging Face forwards.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
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

LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
FAMILIES = {
    "gpt2": (transformers.GPT2Config, GPT),
    "gptj": (transformers.GPTJConfig, GPT | dict(rotary_dim=4)),
    "llama": (transformers.LlamaConfig, LLAMA),
    "qwen2": (transformers.Qwen2Config, LLAMA),
    "mistral": (transformers.MistralConfig, LLAMA | dict(sliding_window=5)),
    "opt": (transformers.OPTConfig, dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)),
    "gemma2": (transformers.Gemma2Config, LLAMA | dict(head_dim=8, sliding_window=5)),
    "bloom": (transformers.BloomConfig, dict(hidden_size=32, n_layer=2, n_head=4)),
    "mamba": (transformers.MambaConfig, dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
}  # fmt: skip


def tiny(family="gpt2", seed=0, vocab=10, dtype=DOUBLE, scale=0.3, **changes):
    """A causal LM with random weights, large enough that its distribution is far from uniform; dropout 0.1 in its config."""
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
    """log-probability of one output by a plain forward of the whole sequence; ids from `known` on do not exist."""
    logits = model(input_ids=torch.cat([prompt, output])[None]).logits[0, len(prompt) - 1 : -1, :known]
    return logits.log_softmax(-1).gather(-1, output[:, None]).sum()


X, X2 = torch.tensor([1, 2, 3, 4, 5, 2, 1]), torch.tensor([3, 3, 1])  # prompts
KNOWN = 7  # ids of letters(): 0 .. 6; tiny() has logits for 10


# ------------------------------------------------------------------------------------------
# 1. Mathematics


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_goodness(dtype):
    """Eq. 15 and 19. Wrong: sigmoid(r) in place of its logarithm; log(sigmoid(r)), which is -inf at -1e4."""
    r = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4], dtype=dtype)
    assert torch.equal(brain.log_goodness(r), r)
    assert torch.equal(brain.log_goodness(r, "bradley-terry"), r)
    expected = [-1e4, -math.log1p(math.exp(3)), -math.log(2), -math.log1p(math.exp(-2)), 0.0]
    assert brain.log_goodness(r, "logistic").tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="logistic"):
        brain.log_goodness(r, "bradley")


def test_weights_are_eq_6_and_11():
    """Against numpy, with leading axes. Wrong: the sign of log q', normalisation over prompts, p forgotten."""
    log_p, log_q, log_q_proposal, r = (random(2, 3, 5, seed=s) for s in range(4))
    alpha = (log_p + r).exp() / log_q_proposal.exp()  # alpha of eq. 6 with exp(r) for p(G=1|y,x)
    beta = log_q.exp() / log_q_proposal.exp()
    found = brain.posterior_weights(log_p, log_q_proposal, r), brain.policy_weights(log_q, log_q_proposal)
    for weights, raw in zip(found, (alpha.numpy(), beta.numpy())):
        np.testing.assert_allclose(weights, raw / raw.sum(-1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(brain.posterior_weights(log_p, log_p, r), softmax(r.numpy()), rtol=1e-12)  # eq. 21
    torch.testing.assert_close(brain.policy_weights(log_p, log_p), torch.full((2, 3, 5), 0.2, dtype=DOUBLE))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_nothing_overflows(dtype):
    """Rewards of +-1e4 and log-probabilities of -1e4. Wrong: exp before normalising; log of a beta_hat that is 0."""
    r = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1e4, -1e4]], dtype=dtype)
    log_q = torch.tensor([[0.0, -1e4, -2e4], [-1e4, -5.0, -5.0]], dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(r)
    alpha_hat = brain.posterior_weights(zero, zero, r)
    assert alpha_hat.tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
    loss = brain.brain_loss(log_q, zero, alpha_hat)
    loss.backward()
    # Row 1: log beta_hat_3 = -2e4. Row 2: (log 1/2 + 9995 + log 2) / 2 + (log 1/2 + log 2) / 2 = 4997.5
    assert loss.item() == pytest.approx((2e4 + 4997.5) / 2, rel=1e-6)
    assert log_q.grad.isfinite().all()
    assert brain.brain_loss(log_q, zero, alpha_hat, baseline=False).isfinite()


def test_self_normalized_kl():
    """Eq. 14 against numpy. Wrong: arguments swapped, 0 log 0 = nan, a sum over prompts."""
    a, b = softmax(random(4, 5, seed=1).numpy()), softmax(random(4, 5, seed=2).numpy())
    found = brain.self_normalized_kl(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(found, (a * np.log(a / b)).sum(-1), rtol=1e-12)
    one_hot = torch.tensor([1.0, 0.0, 0.0])
    assert brain.self_normalized_kl(one_hot, torch.tensor([0.5, 0.5, 0.0])).item() == pytest.approx(math.log(2))
    assert brain.self_normalized_kl(one_hot, one_hot) == 0
    assert brain.self_normalized_kl(one_hot, torch.tensor([0.0, 0.5, 0.5])) == math.inf
    beta = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    brain.self_normalized_kl(one_hot, beta).backward()
    assert beta.grad.tolist() == [-2, 0, 0]


def test_loss_by_hand_on_three_outputs():
    """Eq. 14 and minus eq. 12, every number by hand. Wrong: the sign, beta_hat detached, alpha_hat for beta_hat."""
    # posterior (1/2, 1/3, 1/6), policy (1/6, 1/3, 1/2), proposal uniform: alpha_hat and beta_hat are the same numbers
    alpha_hat = torch.tensor([1 / 2, 1 / 3, 1 / 6], dtype=DOUBLE)
    log_q = torch.tensor([1 / 6, 1 / 3, 1 / 2], dtype=DOUBLE).log().requires_grad_()
    log_q_proposal = torch.full((3,), 1 / 3, dtype=DOUBLE).log()
    loss = brain.brain_loss(log_q, log_q_proposal, alpha_hat)
    assert loss.item() == pytest.approx(math.log(3) / 2 - math.log(3) / 6, rel=1e-12)  # sum a log(a/b)
    loss.backward()
    assert log_q.grad.tolist() == pytest.approx([-1 / 3, 0, 1 / 3], abs=1e-12)  # beta_hat - alpha_hat


def test_gradient_of_the_loss_is_minus_eq_12():
    """On random weights, mean over prompts. Wrong: gradient through alpha_hat or log q'; a sum over prompts."""
    log_q, log_q_proposal, log_p, r = (random(2, 4, 6, seed=s).requires_grad_() for s in range(4))
    alpha_hat = brain.posterior_weights(log_p, log_q_proposal, r)
    loss = brain.brain_loss(log_q, log_q_proposal, alpha_hat)
    gradients = torch.autograd.grad(loss, (log_q, log_q_proposal, log_p, r), allow_unused=True)
    beta_hat = softmax((log_q - log_q_proposal).detach().numpy())
    np.testing.assert_allclose(gradients[0], (beta_hat - alpha_hat.detach().numpy()) / 8, atol=1e-14)
    assert gradients[1:] == (None, None, None)
    assert loss.item() == pytest.approx(brain.self_normalized_kl(alpha_hat, torch.tensor(beta_hat)).mean().item(), rel=1e-12)


def test_loss_without_baseline_is_eq_7():
    """Section 9.3: the gradient is minus alpha_hat, whatever the policy. Wrong: the baseline left in, or an entropy added."""
    log_q, log_q_proposal, r = random(3, 4, seed=1).requires_grad_(), random(3, 4, seed=2), random(3, 4, seed=3)
    alpha_hat = brain.posterior_weights(log_q_proposal, log_q_proposal, r)
    loss = brain.brain_loss(log_q, log_q_proposal, alpha_hat, baseline=False)
    loss.backward()
    np.testing.assert_allclose(log_q.grad, -alpha_hat / 3, atol=1e-15)
    assert loss.item() == pytest.approx(-(alpha_hat * log_q).sum(-1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_theorem_4_2(n):
    """E[eq. 12] = -grad D_n over all n-tuples of 5 outputs, tabular policy. Wrong: any change of weights or loss."""
    log_p, log_q_proposal, logits = (random(5, seed=s).log_softmax(-1) for s in (1, 2, 3))
    r, logits = random(5, seed=4, scale=2.0), logits.clone().requires_grad_()
    tuples = torch.tensor(list(itertools.product(range(5), repeat=n)))
    chance = log_q_proposal[tuples].sum(-1).exp()
    alpha_hat = brain.posterior_weights(log_p[tuples], log_q_proposal[tuples], brain.log_goodness(r)[tuples])
    log_q = logits.log_softmax(-1)
    losses = torch.stack([brain.brain_loss(log_q[y], log_q_proposal[y], a) for y, a in zip(tuples, alpha_hat)])
    (chance * losses).sum().backward()
    log_target = toy_world.posterior(log_p.numpy(), r.numpy())
    numbers = log_target, log_q.detach().numpy(), log_q_proposal.numpy(), n
    assert (chance * losses).sum().item() == pytest.approx(toy_world.d_n(*numbers), rel=1e-12)
    np.testing.assert_allclose(logits.grad, toy_world.d_n_coefficients(*numbers), atol=1e-14)


def test_theorem_4_3():
    """Descending the loss over all pairs ends at the posterior, where it is 0. Wrong: an optimum at q' or at the best output."""
    log_p, log_q_proposal, r = random(4, seed=1).log_softmax(-1), random(4, seed=2).log_softmax(-1), random(4, seed=3, scale=2.0)
    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))
    chance = log_q_proposal[pairs].sum(-1).exp()
    alpha_hat = brain.posterior_weights(log_p[pairs], log_q_proposal[pairs], r[pairs])
    logits = torch.zeros(4, dtype=DOUBLE, requires_grad=True)

    def d_2():
        beta_hat = brain.policy_weights(logits.log_softmax(-1)[pairs], log_q_proposal[pairs])
        return (chance * brain.self_normalized_kl(alpha_hat, beta_hat)).sum()

    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    optimizer.step(lambda: (optimizer.zero_grad(), loss := d_2(), loss.backward())[1])
    assert d_2().item() < 1e-12
    np.testing.assert_allclose(logits.softmax(-1).detach(), np.exp(toy_world.posterior(log_p.numpy(), r.numpy())), atol=1e-6)


def test_theorem_6_1():
    """n = 2, argmax, q' = p: value and gradient of DPO at beta = 1. Wrong: beta = 0.1, chosen and rejected swapped."""
    log_q, log_p = random(7, 2, seed=1).requires_grad_(), random(7, 2, seed=2)
    by_hand = -torch.log(torch.sigmoid((log_q[:, 0] - log_p[:, 0]) - (log_q[:, 1] - log_p[:, 1]))).mean()
    ours = brain.brain_loss(log_q, log_p, torch.tensor([1.0, 0.0], dtype=DOUBLE).expand(7, 2))
    dpo = brain.dpo_loss(log_q[:, 0], log_q[:, 1], log_p[:, 0], log_p[:, 1])
    gradients = [torch.autograd.grad(loss, log_q)[0] for loss in (by_hand, ours, dpo)]
    for loss, gradient in zip((ours, dpo), gradients[1:]):
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=1e-15)


def test_effective_sample_size():
    """Wrong: the sum of squares itself; a mean over prompts."""
    assert brain.effective_sample_size(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])).tolist() == [4, 1, 2]


def test_win_rate():
    """Ties half (departure 4), per cent, Table 1's interval. Wrong: > for >=, ours and gold swapped, a factor of 100."""
    assert brain.win_rate([1.0, 2.0, 3.0, 4.0], torch.tensor([0.0, 2.0, 9.0, 1.0])) == pytest.approx((62.5, 196 * math.sqrt(0.625 * 0.375 / 4)))
    for lost, rate, half_width in ((870, 86.72, 0.82), (599, 90.86, 0.70), (314, 95.21, 0.52)):  # Table 1, Reddit TL;DR, N = 6553
        found = brain.win_rate(torch.ones(6553), (torch.arange(6553) < lost) * 2.0)
        assert [round(x, 2) for x in found] == [rate, half_width]
    assert brain.win_rate([1.0], [1.0]) == (50.0, pytest.approx(98.0))
    for bad in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            brain.win_rate(*bad)
    assert brain.win_rate([1 + 1e-9], [1.0])[0] == 100  # float64, not float32


# ------------------------------------------------------------------------------------------
# 2. Methods


def test_methods_are_the_rows_of_tables_1_and_3():
    """Wrong: a method with another's settings."""
    rows = {name: (m.source, m.group_size, m.argmax, m.baseline) for name, m in brain.METHODS.items()}
    assert rows == {
        "brain": ("policy", None, False, True),
        "brain-no-baseline": ("policy", None, False, False),
        "dpo-sft+iw+n": ("prior", None, False, True),
        "dpo-sft+iw": ("prior", 2, False, True),
        "dpo-sft": ("prior", 2, True, True),
        "rso": ("rso", 2, True, True),
        "dpo": ("data", 2, True, True),
    }


def test_weights_of_methods():
    """Pairs are neighbours; argmax takes the better, ties are shared (departure 6). Wrong: argmin; pairs (i, i + n/2)."""
    zero, r = torch.zeros(6, dtype=DOUBLE), torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, -1.0], dtype=DOUBLE)
    weigh = lambda name: brain.METHODS[name].weights(zero, zero, r).tolist()  # noqa: E731
    assert weigh("dpo-sft") == [0, 1, 0.5, 0.5, 1, 0] == weigh("rso")
    assert weigh("dpo") == [1, 0, 1, 0, 1, 0]  # people chose, whatever the reward says
    assert weigh("dpo-sft+iw") == pytest.approx(softmax(r.reshape(3, 2).numpy()).reshape(-1).tolist())
    assert weigh("brain") == pytest.approx(softmax(r.numpy()).tolist())
    assert weigh("dpo-sft+iw+n") == weigh("brain")


def test_dpo_sft_on_n_outputs_is_the_mean_dpo_loss_of_its_pairs():
    """Wrong: a softmax over all 8 in place of 4 pairs; a sum of pairs."""
    method, log_q, log_p, r = brain.METHODS["dpo-sft"], random(8, seed=1), random(8, seed=2), random(8, seed=3)
    alpha_hat = method.weights(log_p, log_p, r)
    ours = brain.brain_loss(*(method.grouped(x) for x in (log_q, log_p, alpha_hat)))
    pairs = [(i, i + 1) if r[i] > r[i + 1] else (i + 1, i) for i in range(0, 8, 2)]
    margins = [(log_q[w] - log_p[w]) - (log_q[i] - log_p[i]) for w, i in pairs]
    assert ours.item() == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]), rel=1e-12)


def test_rejection_sampling():
    """Toward the posterior, n different candidates, the best always. Wrong: the first n; exp(r) not relative to the maximum."""
    r = torch.tensor([0.0, -1.0, -2.0, 1.0], dtype=DOUBLE)
    first = np.zeros(4)
    draws = 4000
    for i in range(draws):
        kept = brain.rejection_sample(r, 1, brain.seeded(9, i)).tolist()
        first[kept[0]] += 1
    # With n = 1 the one kept is the first accepted of a pass in order; its law by hand from the acceptance chances:
    accept, left, law = np.exp(r.numpy() - 1.0), 1.0, []
    for a in accept:
        law.append(left * a)
        left *= 1 - a
    assert abs(first / draws - np.array(law)).max() < 4 * math.sqrt(0.25 / draws)  # four standard errors
    kept = brain.rejection_sample(r + 1e4, 3, brain.seeded(1)).tolist()
    assert len(set(kept)) == 3
    assert sorted(brain.rejection_sample(r, 4, brain.seeded(2)).tolist()) == [0, 1, 2, 3]  # nothing is rejected without extra


# ------------------------------------------------------------------------------------------
# 3. The policy


@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_is_that_of_whole_sequences(family):
    """Values and all gradients against plain forwards; chunks too. Wrong: positions or padding shifted, the first token or the
    end token left out, a cache changed by its first use, gradients of the prompt lost, chunks that share one cache."""
    policy = brain.Policy(tiny(family), letters())
    outputs = policy.sample(X, 6, 5, generator=brain.seeded(1)) + [torch.tensor([0]), torch.tensor([1, 2, 3, 4, 5, 6, 1])]
    weights = random(8, seed=5)

    def gradients(log_prob):
        (log_prob * weights).sum().backward()
        found = [None if p.grad is None else p.grad.clone() for p in policy.model.parameters()]
        policy.model.zero_grad()
        return found

    expected = torch.stack([plain(policy.model, X, y, KNOWN) for y in outputs])
    expected_gradients = gradients(expected)
    largest = max(g.abs().max() for g in expected_gradients if g is not None)
    for chunk in (None, 1, 3, 8):
        policy.outputs_per_forward = chunk
        found = policy.log_prob(X, outputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)  # some models have float32 islands in "float64"
        for ours, theirs in zip(gradients(found), expected_gradients):
            assert theirs is None or (ours - theirs).abs().max() < 1e-5 * largest
    torch.testing.assert_close(policy.log_prob(X, outputs, prior=True), expected, rtol=0, atol=5e-6)


def test_log_prob_is_exact_in_float64():
    """gpt2 has no float32 islands. Wrong: a sum in float32."""
    policy = brain.Policy(tiny("gpt2"), letters())
    outputs = policy.sample(X, 6, 5, generator=brain.seeded(1))
    expected = torch.stack([plain(policy.model, X, y, KNOWN) for y in outputs])
    torch.testing.assert_close(policy.log_prob(X, outputs), expected, rtol=0, atol=1e-12)


def test_probabilities_of_all_outcomes_sum_to_one():
    """Ended and cut outputs together are everything. Wrong: the end token dropped, unknown ids kept, a cut renormalised."""
    policy = brain.Policy(tiny("llama"), letters(3), outputs_per_forward=50)
    words = [list(itertools.product((1, 2, 3), repeat=size)) for size in range(4)]
    outputs = [torch.tensor(word + (0,)) for size in range(3) for word in words[size]] + [torch.tensor(word) for word in words[3]]
    with torch.no_grad():
        assert policy.log_prob(X2, outputs).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_samples_follow_the_plain_softmax(family):
    """Frequencies of all outcomes against exact probabilities. Wrong: top-k (generate()'s default, or the checkpoint's), a
    temperature, a repetition penalty, the same random number for every token, ids that do not exist."""
    model = tiny(family, scale=0.2)
    model.generation_config.update(top_k=2, temperature=0.5, do_sample=True, repetition_penalty=2.0)
    policy = brain.Policy(model, letters(3), outputs_per_forward=700)
    count = 3000
    drawn = [tuple(y.tolist()) for y in policy.sample(X2, count, 2, generator=brain.seeded(3))]
    outcomes = [(0,)] + [(a, b) for a in (1, 2, 3) for b in (0, 1, 2, 3)]
    assert set(drawn) <= set(outcomes)
    with torch.no_grad():
        chance = policy.log_prob(X2, [torch.tensor(y) for y in outcomes]).exp().numpy()
    assert chance.sum() == pytest.approx(1, abs=1e-5)
    seen = np.array([drawn.count(y) for y in outcomes])
    chi_square = ((seen - count * chance) ** 2 / (count * chance)).sum()
    assert chi_square < 40  # 12 degrees of freedom: exceeded once in 10,000 times; the seed is fixed
    again = policy.sample(X2, count, 2, generator=brain.seeded(3))
    assert drawn == [tuple(y.tolist()) for y in again]


def test_unknown_ids_have_no_probability():
    """Logits beyond the tokenizer are -inf for p, q' and q_theta alike. Wrong: masked while sampling, but scored with them."""
    policy = brain.Policy(tiny("gptj"), letters())
    assert policy.log_prob(X, [torch.tensor([8, 0])]).item() == -math.inf == policy.log_prob(X, [torch.tensor([8, 0])], prior=True).item()
    letters_and_end = letters()
    letters_and_end.add_tokens(["<|im_end|>"])  # an added token is a known one
    assert brain.Policy(tiny("gptj"), letters_and_end).log_prob(X, [torch.tensor([7, 0])]).isfinite()


def test_every_end_token_ends():
    """The union of the tokenizer's and the generation config's. Wrong: one of them alone."""
    model = tiny("llama", scale=0.1)
    model.generation_config.eos_token_id = [3, 5]
    policy = brain.Policy(model, letters())
    outputs = policy.sample(X, 200, 8, generator=brain.seeded(1))
    for y in outputs:
        assert not set(y[:-1].tolist()) & {0, 3, 5}
        assert policy.ended(y) == (int(y[-1]) in (0, 3, 5))
        assert policy.ended(y) or len(y) == 8
    assert {int(y[-1]) for y in outputs} >= {0, 3, 5}


def test_greedy_takes_the_most_likely_token():
    """Wrong: a sample; an unknown id, though its logit may be the largest."""
    policy = brain.Policy(tiny("qwen2"), letters())
    (output,) = policy.sample(X, 1, 6, greedy=True)
    ids = X
    for token in output:
        assert token == policy.model(ids[None]).logits[0, -1, :KNOWN].argmax()
        ids = torch.cat([ids, token[None]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_a_batch_is_the_prompt_alone(family):
    """The same draws and numbers among longer prompts. Wrong: positions counted from the padding, no attention mask, random
    numbers that depend on the batch, the sampler's own sum without the end token."""
    policy = brain.Policy(tiny(family), letters(), outputs_per_forward=5)
    prompts = [X, X2, torch.tensor([5])]
    generators = lambda: [brain.seeded(7, i) for i in range(3)]  # noqa: E731
    outputs, sums = policy.sample_batch(prompts, 4, 5, generators=generators())
    for prompt, ys, own, generator in zip(prompts, outputs, sums, generators()):
        alone = policy.sample(prompt, 4, 5, generator=generator)
        assert all(torch.equal(a, b) for a, b in zip(alone, ys))
        expected = policy.log_prob(prompt, ys).detach()
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_dropout_is_off():
    """beta_hat is 1/n at step 0. Wrong: a model left in training mode (its config has dropout 0.1)."""
    model = tiny("gpt2").train()
    policy = brain.Policy(model, letters())
    outputs = policy.sample(X, 4, 5, generator=brain.seeded(1))
    log_q = policy.log_prob(X, outputs)
    torch.testing.assert_close(brain.policy_weights(log_q, policy.log_prob(X, outputs, prior=True)), torch.full((4,), 0.25, dtype=DOUBLE))


def train_a_little(policy, steps=3):
    optimizer = torch.optim.SGD(policy.parameters().values(), lr=0.5)
    outputs = policy.sample(X, 4, 5, generator=brain.seeded(1))
    for _ in range(steps):
        optimizer.zero_grad()
        policy.log_prob(X, outputs)[0].backward()
        optimizer.step()
    return outputs


def adapted(family="gpt2", rank=2):
    """A PeftModel whose adapter is not zero, as a prior."""
    model = brain.add_adapter(tiny(family), rank, 8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return model


@pytest.mark.parametrize("kind", ["all weights", "lora", "adapter as prior"])
def test_the_prior_is_the_model_before_training(kind):
    """q_theta = p exactly at step 0; afterwards p is what it was and q_theta is not; p gives no gradient. Wrong: the prior
    from trained weights, the base without its adapter as the prior, gradients into the prior's adapter."""
    model = adapted() if kind == "adapter as prior" else tiny("gpt2")
    fresh = adapted() if kind == "adapter as prior" else tiny("gpt2")
    fresh.eval()
    policy = brain.Policy(model, letters(), lora_rank=0 if kind == "all weights" else 2, lora_alpha=8)
    outputs = policy.sample(X, 4, 5, generator=brain.seeded(1))
    before = torch.stack([plain(fresh, X, y, KNOWN) for y in outputs]).detach()
    log_q, log_p = policy.log_prob(X, outputs), policy.log_prob(X, outputs, prior=True)
    assert torch.equal(log_q, log_p) and log_q.requires_grad and not log_p.requires_grad
    torch.testing.assert_close(log_p, before, rtol=0, atol=1e-10)
    trained = set(policy.parameters())
    train_a_little(policy)
    assert set(policy.parameters()) == trained
    torch.testing.assert_close(policy.log_prob(X, outputs, prior=True), before, rtol=0, atol=1e-10)
    assert (policy.log_prob(X, outputs) - before).abs().max() > 1e-2
    if kind != "all weights":
        assert all("lora" in name for name in trained)
    if kind == "adapter as prior":
        assert all(".policy." in name for name in trained)
    greedy = policy.sample(X, 1, 5, prior=True, greedy=True)[0]
    assert torch.equal(greedy, brain.Policy(fresh, letters()).sample(X, 1, 5, greedy=True)[0])


@pytest.mark.parametrize("kind", ["all weights", "lora", "adapter as prior"])
def test_a_saved_model_is_the_policy(kind, tmp_path):
    """model/ by transformers or peft alone, and back by `load_policy`. Wrong: the prior saved; the adapter under another name."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = adapted("llama") if kind == "adapter as prior" else base
    policy = brain.Policy(model, letters(), lora_rank=0 if kind == "all weights" else 2, lora_alpha=8)
    outputs = train_a_little(policy)
    (tmp_path / "model").mkdir()
    brain.save_policy(policy, tmp_path / "model")
    expected = policy.log_prob(X, outputs).detach()
    if kind == "all weights":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=DOUBLE)
    else:
        from peft import PeftModel

        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=DOUBLE)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "model")
    found = torch.stack([plain(loaded.eval(), X, y, KNOWN) for y in outputs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == letters().get_vocab()
    for p in policy.parameters().values():
        p.data.mul_(0.5)
    assert (policy.log_prob(X, outputs) - expected).abs().max() > 1e-2
    brain.load_policy(policy, tmp_path / "model")
    torch.testing.assert_close(policy.log_prob(X, outputs).detach(), expected, rtol=0, atol=1e-10)


def test_half_precision_is_summed_in_float32():
    """bfloat16 weights, float32 sums; a float32 adapter on them; float64 stays. Wrong: log-probabilities summed in bfloat16."""
    policy = brain.Policy(tiny("llama", dtype=torch.bfloat16), letters(), lora_rank=2)
    outputs = policy.sample(X, 4, 12, generator=brain.seeded(1))
    log_q = policy.log_prob(X, outputs)
    assert log_q.dtype == torch.float32 and all(p.dtype == torch.float32 for p in policy.parameters().values())
    assert brain.Policy(tiny("llama"), letters()).log_prob(X, outputs).dtype == DOUBLE
    logits = policy.model(torch.cat([X, outputs[0]])[None]).logits[0, len(X) - 1 : -1, :KNOWN].float()
    expected = logits.log_softmax(-1).gather(-1, outputs[0][:, None]).sum()
    assert log_q[0].item() == pytest.approx(expected.item(), abs=0.1)  # bfloat16 forwards of other shapes
    torch.testing.assert_close(brain.policy_weights(log_q, policy.log_prob(X, outputs)), torch.full((4,), 0.25), rtol=1e-6, atol=0)


def test_an_architecture_unknown_to_peft_gets_an_adapter():
    """Wrong: peft's map of target modules alone."""
    model = tiny("gpt2")
    model.config.model_type = "nobody-knows"
    assert sum(p.requires_grad for p in brain.add_adapter(model, 2, 4).parameters()) > 0


def test_memory_does_not_grow_with_n(monkeypatch):
    """With --outputs-per-forward 2, no forward of the policy sees more than 2 outputs at a time, whatever n; in the backward
    neither. Wrong: chunks whose activations are all kept until the backward."""
    policy = brain.Policy(tiny("gpt2"), letters(), outputs_per_forward=2)
    outputs = policy.sample(X, 8, 5, generator=brain.seeded(1))
    rows, saved = [], [0]
    forward = policy.model.forward
    monkeypatch.setattr(policy.model, "forward", lambda *a, **k: (rows.append(k["input_ids"].shape[0]), forward(*a, **k))[1])

    def count(tensor):
        saved[0] += tensor.numel() if tensor.dim() >= 3 and tensor.shape[0] == 2 else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        log_q = policy.log_prob(X, outputs)
    assert max(rows) == 2 and rows.count(2) == 4
    assert saved[0] == 0  # nothing of a chunk is kept by the forward
    log_q.sum().backward()
    assert rows.count(2) == 8  # each chunk once more


# ------------------------------------------------------------------------------------------
# 4. Algorithm 1

ROWS = [X, X2, torch.tensor([5]), torch.tensor([6, 2]), torch.tensor([4, 4, 4, 1]), torch.tensor([2]), torch.tensor([1, 6, 3])]


def taste(prompt, texts, columns):
    """A reward that depends on all that it is given."""
    liked = [1.5 * text.count("a") - 0.8 * text.count("c") + 0.3 * len(text) * columns["weight"] for text in texts]
    return torch.tensor(liked, dtype=DOUBLE) - 0.1 * len(prompt)


def seven_examples(gold=(" a b", " c", " a", None, " b b", "", " c c a")):
    """Prompts of many lengths, in no order of length; a gold answer for some, a human pair for all."""
    decode, pairs = letters().decode, [[torch.tensor([1, i % 6 + 1, 0]), torch.tensor([i % 5 + 1, 2, 3, 4])] for i in range(7)]
    return [brain.Example(i, decode(ids), ids, gold[i], pairs[i], {"weight": float(i % 3)}) for i, ids in enumerate(ROWS)]


def short_run(**changes):
    """Settings of a run of a second, every number of which differs from its default."""
    short = dict(
        iterations=2, prompts_per_iteration=3, samples_per_prompt=4, updates_per_iteration=3, batch_size=2, max_new_tokens=4
    )
    short |= dict(
        learning_rate=3e-3,
        weight_decay=0.3,
        adam_beta1=0.8,
        adam_beta2=0.7,
        eval_prompts=1,
        eval_every=100,
        seed=5,
        dtype="float64",
    )
    return dataclasses.replace(brain.parse([]), **short | changes)


def drifted(size=0.05, **arguments):
    """A policy that is not its prior any more."""
    policy = brain.Policy(tiny(), letters(), **arguments)
    with torch.no_grad():
        for i, p in enumerate(policy.parameters().values()):
            p.add_(random(*p.shape, seed=i, scale=size))
    return policy


def plain_all(model, prompt, outputs):
    return torch.stack([plain(model, prompt, y, KNOWN) for y in outputs])


def by_hand_alpha(method, log_p, log_q_proposal, goodness):
    """alpha_hat (n,) of a named method, in numpy."""
    size = 2 if method in ("dpo-sft+iw", "dpo-sft", "rso", "dpo") else len(log_p)
    score = np.asarray(log_p - log_q_proposal + goodness).reshape(-1, size)
    if method == "dpo":
        return np.array([1.0, 0.0])
    if method in ("dpo-sft", "rso"):
        best = score >= score.max(-1, keepdims=True) - 1e-9  # here log q' is log p, so equal outputs tie up to rounding
        return (best / best.sum(-1, keepdims=True)).reshape(-1)
    return softmax(score).reshape(-1)


@pytest.mark.parametrize("goodness", ["bradley-terry", "logistic"])
@pytest.mark.parametrize("method", brain.METHODS)
def test_what_collect_caches(method, goodness):
    """Lines 6 to 10, each number from plain forwards of the frozen prior and of the drifted policy. Wrong: draws of the prior
    for brain, or of the policy for the others; log q' of the prior for brain, or of the policy for the others; log p and log q'
    swapped; --goodness ignored; rso that draws n; rewards of the candidates beside the kept outputs; the data's pair in the
    other order; random numbers without the seed, the round or the row; a reward without its columns."""
    policy, data, calls = drifted(), seven_examples(), []
    s = short_run(method=method, samples_per_prompt=2 if method == "dpo" else 4, goodness=goodness)

    def reward(*arguments):
        calls.append(arguments)
        return taste(*arguments)

    for row in (1, 4, 6):
        (got,), x = brain.collect(policy, reward, data, 3, s, [row]), ROWS[row]
        state = np.random.SeedSequence((5, brain.OUTPUTS, 3, row)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) // 2)
        if method == "dpo":
            outputs = data[row].pair
        else:
            of_prior = not method.startswith("brain")
            outputs = policy.sample(x, 16 if method == "rso" else 4, 4, prior=of_prior, generator=generator)
        texts = ["".join(" " + chr(96 + i) for i in y.tolist() if i) for y in outputs]
        assert calls.pop() == (data[row].prompt, texts, data[row].columns) and not calls
        r = taste(data[row].prompt, texts, data[row].columns)
        log_goodness = r if goodness == "bradley-terry" else -torch.log1p(torch.exp(-r))
        if method == "rso":
            kept = brain.rejection_sample(log_goodness, 4, generator).tolist()
            outputs, texts, r, log_goodness = [outputs[i] for i in kept], [texts[i] for i in kept], r[kept], log_goodness[kept]
        log_p, log_q = (plain_all(model, x, outputs).detach() for model in (policy.prior_model, policy.model))
        assert (log_p - log_q).abs().max() > 0.1
        log_q = log_q if method.startswith("brain") else log_p
        assert (got.iteration, got.row, got.texts) == (3, row, texts)
        assert torch.equal(got.prompt_ids, x) and all(torch.equal(a, b) for a, b in zip(got.outputs, outputs, strict=True))
        alpha_hat = torch.tensor(by_hand_alpha(method, log_p, log_q, log_goodness))
        expected = dict(reward=r, log_p=log_p, log_q_proposal=log_q, alpha_hat=alpha_hat)
        assert set(brain.CACHED) == set(expected)
        for name, numbers in expected.items():
            found = getattr(got, name)
            assert not found.requires_grad, name
            torch.testing.assert_close(found, numbers, rtol=0, atol=1e-10, msg=lambda told, name=name: f"{name}: {told}")


def test_outputs_depend_on_seed_round_and_row():
    """Wrong: the same draws in every round, for every row, or whatever the seed."""
    policy, data = drifted(), [seven_examples()[0]] * 3
    drawn = {}
    for seed, t, row in ((0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)):
        texts = brain.collect(policy, taste, data, t, short_run(seed=seed, samples_per_prompt=8), [row])[0].texts
        assert drawn.setdefault((seed, t, row), texts) == texts
    assert len({tuple(texts) for texts in drawn.values()}) == 4


@pytest.mark.parametrize("method", brain.METHODS)
def test_prompts_sampled_together_are_prompts_sampled_alone(method, monkeypatch):
    """With room for the outputs of two prompts and a half, two at a time; what each caches is what it caches alone. Wrong: rows,
    generators or outputs of a group mixed up, one generator for a group, more prompts at once than there is room for."""
    policy, data, seen, real = drifted(), seven_examples(), [], brain.Policy.sample_batch
    n = 2 if method == "dpo" else 4
    s = short_run(method=method, samples_per_prompt=n, outputs_per_forward=5 * n // 2)
    assert brain.together([3, 1, 6, 0, 2], s) == [[3, 1], [6, 0], [2]]
    for bound in (None, 1, n, 2 * n - 1):
        assert brain.together([3, 1], dataclasses.replace(s, outputs_per_forward=bound)) == [[3], [1]]
    alone = [brain.collect(policy, taste, data, 2, s, [row])[0] for row in range(7)]
    monkeypatch.setattr(brain.Policy, "sample_batch", lambda self, prompts, *more: (seen.append(len(prompts)), real(self, prompts, *more))[1])
    found = [samples for rows in brain.together(list(range(7)), s) for samples in brain.collect(policy, taste, data, 2, s, rows)]
    assert seen == ([] if method == "dpo" else [2, 2, 2, 1])
    for one, other in zip(alone, found, strict=True):
        assert (one.row, one.iteration, one.texts) == (other.row, other.iteration, other.texts)
        assert [y.tolist() for y in one.outputs] == [y.tolist() for y in other.outputs]
        for name in brain.CACHED:
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=1e-10)
    assert [x.row for x in found] == list(range(7))


def test_random_numbers_come_from_their_indices():
    """Same indices, same stream; any other, another. Wrong: one seed for two purposes, indices summed or joined, torch's own
    state used."""
    draw = lambda *numbers: tuple(torch.rand(3, generator=brain.seeded(*numbers)).tolist())  # noqa: E731
    torch.manual_seed(1)
    first = draw(3, 1)
    torch.manual_seed(2)
    assert draw(3, 1) == first
    indices = [(3, 1), (1, 3), (31,), (4,), (3, 1, 1), (3, 2), (13, 1), (1, 31)]
    assert len({draw(*i) for i in indices}) == len(indices)
    purposes = brain.PROMPTS, brain.OUTPUTS, brain.BATCHES, brain.HELD_OUT, brain.EVALUATION
    assert len(set(purposes)) == 5


def test_a_random_subset_is_uniform_without_repetition():
    """Wrong: draws with replacement, the first ones, always the same, sorted, more than there are."""
    seen, firsts = np.zeros(6), np.zeros(6)
    for i in range(1200):
        subset = brain.random_subset(6, 3, 8, i)
        assert len(set(subset)) == 3 and set(subset) <= set(range(6))
        assert subset == brain.random_subset(6, 3, 8, i)
        seen[subset] += 1
        firsts[subset[0]] += 1
    assert abs(seen / 1200 - 1 / 2).max() < 4 * math.sqrt(0.25 / 1200)  # four standard errors
    assert abs(firsts / 1200 - 1 / 6).max() < 4 * math.sqrt(5 / 36 / 1200)
    assert sorted(brain.random_subset(4, 9, 0)) == [0, 1, 2, 3]
    assert brain.random_subset(5, 0, 0) == []


def trained(tmp_path, monkeypatch, policy, settings, data=None, reward=taste, update=None):
    """A real Run through `train`. -> (run, the calls of collect and update in order)"""
    calls, collect, real_update = [], brain.collect, update or brain.update

    def record_collect(policy, reward, data, t, settings, rows):
        group = collect(policy, reward, data, t, settings, rows)
        if t:  # 0: held-out samples
            calls.extend(("collect", t, samples.row, copy.deepcopy(policy.model), samples) for samples in group)
        return group

    def record_update(policy, optimizer, batch, method, run):
        calls.append(("update", batch))
        return real_update(policy, optimizer, batch, method, run)

    monkeypatch.setattr(brain, "collect", record_collect)
    monkeypatch.setattr(brain, "update", record_update)
    monkeypatch.setattr(brain, "HELD_OUT_PROMPTS", 1)  # evaluations are checked below
    data = seven_examples() if data is None else data
    run = brain.Run(tmp_path, settings)
    run.start(policy, reward, data, data)
    brain.train(policy, reward, data, settings, run)
    return run, calls


def adamw_by_hand(weights, gradients, state, t, s):
    """Loshchilov and Hutter's AdamW, epsilon 1e-8: decay apart from the gradient."""
    for name, g in gradients.items():
        m, v = state.get(name, (0.0, 0.0))
        state[name] = m, v = s.adam_beta1 * m + (1 - s.adam_beta1) * g, s.adam_beta2 * v + (1 - s.adam_beta2) * g * g
        m_hat, v_hat = m / (1 - s.adam_beta1**t), v / (1 - s.adam_beta2**t)
        weights[name] = weights[name] * (1 - s.learning_rate * s.weight_decay) - s.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8)


def eq_12_by_hand(model, batch, method):
    """(gradients by name, metrics) of a batch: eq. 12 averaged over prompts (and pairs), from plain forwards and numpy."""
    size = 2 if method in ("dpo-sft+iw", "dpo-sft", "rso", "dpo") else None
    total, lines = 0.0, []
    for s in batch:
        log_q = plain_all(model, s.prompt_ids, s.outputs)
        group = lambda x: np.asarray(x).reshape(-1, size or len(x))  # noqa: E731
        q, p, proposal, alpha = map(group, (log_q.detach().numpy(), s.log_p, s.log_q_proposal, s.alpha_hat))
        beta = softmax(q - proposal)
        force = -alpha if method == "brain-no-baseline" else beta - alpha  # minus eq. 7, minus eq. 12
        total = total + (torch.tensor(force.reshape(-1)) * log_q).sum() / len(alpha) / len(batch)
        kl = (alpha * (np.log(np.where(alpha > 0, alpha, 1)) - np.log(beta))).sum(-1).mean()
        line = {
            "loss": -(alpha * q).sum(-1).mean() if method == "brain-no-baseline" else kl,
            "reward": s.reward.numpy().mean(),
            "kl_to_prior": (beta * (q - p)).sum(-1).mean(),
            "ess_alpha": (1 / (alpha**2).sum(-1)).mean(),
            "ess_beta": (1 / (beta**2).sum(-1)).mean(),
            "ended": np.mean([y.tolist()[-1] == 0 for y in s.outputs]),
        }
        lines.append(line | {"max_weight": max(alpha.max(), beta.max())})
    model.zero_grad()
    total.backward()
    metrics = {name: np.mean([line[name] for line in lines]) for name in lines[0]} | {
        "max_weight": max(line["max_weight"] for line in lines)
    }
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}, metrics


@pytest.mark.parametrize("method", ["brain", "brain-no-baseline", "dpo-sft+iw", "dpo-sft", "dpo"])
def test_algorithm_1_by_hand(method, tmp_path, monkeypatch):
    """A whole `train`, every update again by plain forwards, eq. 12 in numpy and AdamW by hand: metrics and weights after 6
    updates in float64. Wrong: a sum over the batch or over pairs, the batch size of the settings for that of the batch, eq. 12
    for eq. 7, gradients kept between updates, plain Adam or decay in the gradient, betas swapped or the default ones, another
    learning rate, a diagnostic with alpha and beta, q and p, or mean and maximum exchanged, log q' taken anew in each
    update."""
    policy = brain.Policy(tiny(), letters(), outputs_per_forward=3)
    s = short_run(method=method, samples_per_prompt=2 if method == "dpo" else 4)
    by_hand = copy.deepcopy(policy.model)
    run, calls = trained(tmp_path, monkeypatch, policy, s)
    weights, state = {name: p.detach().numpy().copy() for name, p in by_hand.named_parameters()}, {}
    lines = [line for line in run.lines("metrics.jsonl") if "loss" in line]
    batches = [call[1] for call in calls if call[0] == "update"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and len(batches) == 6
    for t, (batch, line) in enumerate(zip(batches, lines), 1):
        assert len(batch) == 2
        gradients, metrics = eq_12_by_hand(by_hand, batch, method)
        assert set(line) == {"step", "time", *metrics}
        for name, value in metrics.items():
            assert line[name] == pytest.approx(value, rel=1e-9, abs=1e-9), (t, name)
        adamw_by_hand(weights, gradients, state, t, s)
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                p.copy_(torch.tensor(weights[name]))
    for name, p in policy.parameters().items():
        # Adam divides a gradient that is zero but for rounding (1e-17) by its epsilon (1e-8): steps to 1e-9 of themselves
        np.testing.assert_allclose(p.detach(), weights[name], rtol=0, atol=1e-9, err_msg=name)
    assert lines[0]["ess_beta"] == pytest.approx(
        2 if method in ("dpo-sft+iw", "dpo-sft", "dpo") else 4, rel=1e-12
    )  # beta_hat = 1/n
    assert lines[0]["kl_to_prior"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", ["brain", "rso"])
def test_rounds_of_algorithm_1(method, tmp_path, monkeypatch):
    """m prompts, k updates, then again; D_t keeps what older rounds drew, with the log q' of their round. Wrong: a proposal
    that is never renewed, or renewed for the methods with a fixed one; log q' of old samples refreshed; D_t emptied between
    rounds; the same prompts each round; k updates in all; updates before all m prompts are there."""
    policy = brain.Policy(tiny(), letters())
    s = short_run(method=method, learning_rate=1e-2, iterations=3)
    run, calls = trained(tmp_path, monkeypatch, policy, s)
    assert [call[0] for call in calls] == (["collect"] * 3 + ["update"] * 3) * 3
    collected = [call for call in calls if call[0] == "collect"]
    assert [t for _, t, *_ in collected] == [1] * 3 + [2] * 3 + [3] * 3
    rounds = [tuple(row for _, t, row, *_ in collected if t == number) for number in (1, 2, 3)]
    assert all(len(set(rows)) == 3 for rows in rounds) and len(set(map(frozenset, rounds))) > 1
    assert rounds == [tuple(brain.random_subset(7, 3, 5, brain.PROMPTS, t)) for t in (1, 2, 3)]
    stored = run.lines("samples.jsonl")
    assert len(stored) == 3 * 3 * 4
    drift = []
    for number, (_, t, row, model, samples) in enumerate(collected):
        lines = stored[4 * number : 4 * number + 4]
        assert [line["output_ids"] for line in lines] == [y.tolist() for y in samples.outputs]
        assert {line["iteration"] for line in lines} == {t}
        log_q = plain_all(model, ROWS[row], samples.outputs).detach()  # the model as it was when it drew them
        log_p = plain_all(policy.prior_model, ROWS[row], samples.outputs).detach()
        proposal = log_q if method.startswith("brain") else log_p
        np.testing.assert_allclose([line["log_q_proposal"] for line in lines], proposal, atol=1e-10)
        np.testing.assert_allclose([line["log_p"] for line in lines], log_p, atol=1e-10)
        torch.testing.assert_close(samples.log_q_proposal, proposal, rtol=0, atol=1e-10)  # after the run: as when it was drawn
        drift.append((log_q - log_p).abs().max())
    assert max(drift[:3]) < 1e-10 and min(drift[3:]) > 0.05


def no_update(policy, optimizer, batch, method, run):
    names = ("loss", "reward", "kl_to_prior", "ess_alpha", "ess_beta", "max_weight", "ended")
    return dict.fromkeys(names, 2.0)


def test_batches_are_drawn_from_all_rounds(tmp_path, monkeypatch):
    """Line 14: uniformly from D_t, without repetition inside a batch, another batch at each update and for each seed. Wrong:
    this round's samples alone, the newest or the first ones, draws with replacement, one stream for all rounds."""
    s = short_run(updates_per_iteration=150, batch_size=3, prompts_per_iteration=4)
    _, calls = trained(tmp_path, monkeypatch, brain.Policy(tiny(), letters()), s, update=no_update)
    buffer = [id(call[4]) for call in calls if call[0] == "collect"]
    batches = [[buffer.index(id(samples)) for samples in call[1]] for call in calls if call[0] == "update"]
    assert len(batches) == 300 and all(len(set(batch)) == 3 for batch in batches)
    for part, size in ((batches[:150], 4), (batches[150:], 8)):
        seen = np.bincount(np.concatenate(part), minlength=size)
        assert len(seen) == size
        share = 3 / size
        assert abs(seen / 150 - share).max() < 4 * math.sqrt(share * (1 - share) / 150)  # four standard errors
    assert batches == [brain.random_subset(4 if step <= 150 else 8, 3, 5, brain.BATCHES, step) for step in range(1, 301)]


def test_a_batch_larger_than_d_t_is_all_of_it(tmp_path, monkeypatch):
    """And its gradient still the mean over the prompts that are there. Wrong: an error; a division by --batch-size."""
    policy = brain.Policy(tiny(), letters())
    by_hand = copy.deepcopy(policy.model)
    s = short_run(iterations=1, updates_per_iteration=1, batch_size=50)
    update, gradients = brain.update, {}

    def keep_gradients(policy, *arguments):
        metrics = update(policy, *arguments)
        gradients.update({name: p.grad.clone() for name, p in policy.parameters().items()})
        return metrics

    _, calls = trained(tmp_path, monkeypatch, policy, s, update=keep_gradients)
    (batch,) = (call[1] for call in calls if call[0] == "update")
    assert len(batch) == 3
    for name, g in eq_12_by_hand(by_hand, batch, "brain")[0].items():
        np.testing.assert_allclose(gradients[name], g, rtol=0, atol=1e-12, err_msg=name)


def test_training_approaches_the_exact_posterior(tmp_path):
    """KL(posterior || q_theta) over all outputs falls to a fraction, in a world with every outcome enumerated. Wrong: any part
    of the loop that is consistent with itself but not with the posterior: a sign, weights without log p - log q', a stale
    proposal."""
    world = toy_world.World(3, 2, 4, spread=2.0, seed=1)
    model, tokenizer = toy_world.tiny_gpt2(world, seed=1, width=16, layers=1)
    log_p = world.log_probs(model)
    world.fit(log_p)
    target = toy_world.posterior(log_p, world.reward)
    prompts = [brain.Example(x, world.text(ids), torch.tensor(ids), None, None, {}) for x, ids in enumerate(world.prompts)]
    sizes = dict(
        iterations=3, prompts_per_iteration=4, samples_per_prompt=16, updates_per_iteration=20, batch_size=4, max_new_tokens=2
    )
    s = short_run(**sizes, learning_rate=8e-3, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, dtype="float32")
    policy = brain.Policy(model, tokenizer)
    run = brain.Run(tmp_path, s)
    reward = brain.RewardFunction(world.reward_of, "toy")
    run.start(policy, reward, prompts, prompts)
    brain.train(policy, reward, prompts, s, run)
    distances = [toy_world.kl(target, log).mean() for log in (log_p, world.log_probs(policy.model))]
    assert distances[0] > 0.5 and distances[1] < 0.1 * distances[0]


# ------------------------------------------------------------------------------------------
# 5. Rewards


def byte_pairs(*merges, specials=("<end>",), begins=False, ends=False):
    """A byte-level BPE tokenizer as GPT-2's, with merges of one's own; with or without a first and a last token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(models.BPE(vocab, list(merges)))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    single = "<begin> " * begins + "$A" + " <end>" * ends
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(token, vocab[token]) for token in specials])
    names = {"eos_token": "<end>"} | ({"bos_token": "<begin>"} if "<begin>" in specials else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


JOINING = (("a", "b"), ("b", "b"))  # "ca" and "bc" are c, a and b, c; "cabc" is c, ab, c
BOTH = ("<end>", "<begin>")


def randomize(model, scale=0.3, seed=0):
    """Weights large enough that every token matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=DOUBLE) * scale)
    return model.eval()


def classifier(family, tokenizer, labels=1, **changes):
    kind, sizes = (FAMILIES | CLASSIFIERS)[family]
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = kind(**sizes | changes, vocab_size=len(tokenizer), num_labels=labels, **ids)
    return randomize(AutoModelForSequenceClassification.from_config(config).double())


HYBRID = LLAMA | dict(num_hidden_layers=4, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
CLASSIFIERS = {
    "hybrid": (transformers.Qwen3_5TextConfig, HYBRID),  # a state in three of four layers
    "bert": (transformers.BertConfig, dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)),
}  # fmt: skip


def test_a_template_is_filled_in_one_pass():
    """Wrong: .format (attributes, braces), one replace after the other in either order, a replacement with its escapes read."""
    assert brain.fill("{prompt}|{output}", "p", "o") == "p|o"
    assert brain.fill("{output}{prompt}{output}", "p", "o") == "opo"
    assert brain.fill("{prompt}|{output}", "say {output} {prompt} {", r"{prompt.__class__} {0} } \1 \g<0> {prompt}") == (
        r"say {output} {prompt} {|{prompt.__class__} {0} } \1 \g<0> {prompt}"
    )
    assert brain.fill("{{x}} {prompt.__class__}{output}", "p", "") == "{{x}} {prompt.__class__}"


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_texts_get_one_beginning_and_no_end(begins, ends):
    """Wrong: a second beginning before a chat template's own, none at all, one that the tokenizer does not put, an end token."""
    tokenizer = byte_pairs(specials=BOTH, begins=begins, ends=ends)
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    first = [1] * begins
    assert brain.encode(tokenizer, ["ab", "<begin>ab", "", "b<end>"]) == [first + [a, b], [1, a, b], first, first + [b, 0]]
    assert brain.encode(letters(), [" a b"]) == [[1, 2]]  # no beginning token known at all


PROMPT, OUTPUTS = "cca", ["bc", "b", "", "bbbbbbbbb", "ccab", "bc"]  # of 2 to 7 tokens; the last is there twice


@pytest.mark.parametrize("template", [None, "<begin>{prompt}{output}", "x {prompt}{output}<end>"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen2", "mistral", "opt", "gemma2", "bloom", "hybrid"])
def test_a_reward_is_the_head_at_the_last_token_of_the_whole_text(family, template):
    """Against whole texts, one by one. Wrong: the pooling of the model class (skips an end token where pad = eos), prompt and output
    tokenized apart, padding read as the last token, positions counted anew, a shared cache that one output has changed."""
    tokenizer = byte_pairs(*JOINING, specials=BOTH)
    tokenizer.pad_token = tokenizer.eos_token
    reward = brain.RewardModel(classifier(family, tokenizer).train(), tokenizer, template)
    join = {None: PROMPT + "%s", "<begin>{prompt}{output}": f"<begin>{PROMPT}%s", "x {prompt}{output}<end>": f"x {PROMPT}%s<end>"}[template]
    expected = []
    for output in OUTPUTS:
        ids = tokenizer(join % output, return_tensors="pt").input_ids
        hidden = reward.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected.append((hidden[0, -1] @ reward.model.score.weight[0]).item())
    assert np.std(expected) > 1e-2  # a thousand times the tolerance
    found = reward(PROMPT, OUTPUTS)
    assert found.shape == (6,) and found.dtype == torch.float32 and not found.requires_grad
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32 out, and islands of it in some models
    np.testing.assert_allclose([reward(PROMPT, [output]).item() for output in OUTPUTS], expected, rtol=0, atol=1e-5)


def test_what_texts_have_in_common_is_computed_once():
    """The tokens in common once, then the rest of each, padded to the longest rest. Wrong: whole texts n times; the common part n times."""
    tokenizer = byte_pairs(*JOINING)
    reward = brain.RewardModel(classifier("gpt2", tokenizer), tokenizer)
    seen = []
    reward.model.base_model.register_forward_pre_hook(lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    reward("ccccccccca", ["bc", "bcc", "c"])  # c * 9, then "ab", c / "ab", c, c / a, c
    assert seen == [(1, 9), (3, 3)]
    seen.clear()
    reward("ccc", ["", ""])  # the last token stays, to be read
    assert seen == [(1, 2), (2, 1)]
    seen.clear()
    reward("ccc", ["bc"])
    assert seen == [(1, 5)]


def bert_tokenizer():
    """As BERT's: [CLS] before, [SEP] behind, neither a beginning nor an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


def test_an_encoder_is_a_reward_model(tmp_path):
    """Read as its class reads it, by itself. Wrong: padding attended to, [CLS] and [SEP] left out, the last token, another label."""
    tokenizer = bert_tokenizer()
    assert tokenizer.eos_token is None
    model = classifier("bert", tokenizer, hidden_dropout_prob=0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = brain.RewardModel.from_pretrained(str(tmp_path), template="{prompt}[SEP]{output}", dtype=DOUBLE)
    outputs = ["a", "bcdefgh", "", "gg"]
    texts = ["abc[SEP]" + output for output in outputs]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(reward("abc", outputs), expected, atol=1e-6)


class Trained(torch.nn.Module):
    """As the paper's reward models were trained: a GPT-J and a head without bias, read before or at the first end token."""

    def __init__(self, config):
        super().__init__()
        self.transformer, self.v_head = transformers.GPTJModel(config), torch.nn.Linear(config.n_embd, 1, bias=False)

    def read(self, ids, at_end):
        scores = self.v_head(self.transformer(input_ids=torch.tensor([ids])).last_hidden_state)[0, :, 0]
        return scores[ids.index(0) - (not at_end)].item()


@pytest.fixture
def checkpoint(tmp_path):
    """(the trained class in float32, its half-precision weights under their old names, a base directory, the tokenizer)"""
    tokenizer = byte_pairs(*JOINING, specials=BOTH)
    config = transformers.GPTJConfig(**GPT, rotary_dim=4, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    model = randomize(Trained(config))
    weights = {name: w.half() for name, w in model.state_dict().items()}
    model.load_state_dict(weights)
    for i in range(2):
        weights[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(64, 64, dtype=torch.bool))[None, None]
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9).half()
    config.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return model, weights, str(tmp_path / "base"), tokenizer


@pytest.mark.parametrize("at_end", [False, True], ids=["read before the end token", "read at the end token"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "hf_ckpt.pt", "the file itself"])
def test_a_bare_checkpoint_scores_as_the_class_it_was_trained_with(checkpoint, tmp_path, name, at_end):
    """No config, no tokenizer, half precision, `v_head`, old buffers. Wrong: a random head, buffers refused, the other reading
    position, half precision kept, labels of the base's config."""
    trained, weights, base, tokenizer = checkpoint
    trained.double()
    (tmp_path / "bare").mkdir()
    file = tmp_path / "bare" / ("rm.pt" if name == "the file itself" else name)
    torch.save(weights, file)
    place = file if name == "the file itself" else file.parent
    template = "<begin>{prompt}{output}" + "<end>" * at_end
    reward = brain.RewardModel.from_pretrained(str(place), base, template)
    assert {p.dtype for p in reward.model.parameters()} == {torch.float32} and not reward.model.training
    texts = [f"<begin>{PROMPT}{output}<end>" for output in OUTPUTS]
    expected = [trained.read(tokenizer(text).input_ids, at_end) for text in texts]
    np.testing.assert_allclose(reward(PROMPT, OUTPUTS), expected, rtol=0, atol=2e-4)  # float32
    exact = brain.RewardModel.from_pretrained(str(place), base, template, dtype=DOUBLE)
    np.testing.assert_allclose(exact(PROMPT, OUTPUTS), expected, rtol=0, atol=1e-6)
    half = brain.RewardModel.from_pretrained(str(place), base, template, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    np.testing.assert_allclose(half(PROMPT, OUTPUTS), expected, atol=0.05)  # 8 bits of mantissa
    brain.RewardModel.from_pretrained(str(place), base, template, "nosuch")  # not needed: the base has a tokenizer
    for part in ("tokenizer.json", "tokenizer_config.json"):
        (Path(base) / part).unlink()
    tokenizer.save_pretrained(tmp_path / "elsewhere")  # the base has no tokenizer now: the given one
    again = brain.RewardModel.from_pretrained(str(place), base, template, str(tmp_path / "elsewhere"))
    assert torch.equal(again(PROMPT, OUTPUTS), reward(PROMPT, OUTPUTS))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda w: w.pop("v_head.weight"), "missing weights.*score.weight"),
        (lambda w: w.pop("transformer.h.1.ln_1.weight"), "missing weights.*transformer.h.1.ln_1.weight"),
        (lambda w: w.update({"v_head.bias": torch.zeros(1)}), "unexpected weights.*score.bias"),
        (lambda w: w.update({"transformer.h.2.ln_1.weight": torch.ones(32)}), "unexpected weights.*transformer.h.2.ln_1.weight"),
        (lambda w: w.update({"transformer.wte.weight": torch.zeros(300, 32)}), "mismatched weights.*transformer.wte.weight"),
        (lambda w: w.update({"v_head.weight": torch.zeros(2, 32)}), "mismatched weights.*score.weight"),
    ],
    ids=["no head", "a layer's weight missing", "a bias of the head", "a layer too many", "another vocabulary", "a head of two"],
)
def test_a_bare_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path, change, told):
    """Wrong: what is missing or of another size filled with random numbers, what is left over dropped without a word."""
    _, weights, base, _ = checkpoint
    change(weights)
    torch.save(weights, tmp_path / "rm.pt")
    with pytest.raises(brain.UserError, match=f"--reward-model .*{told}"):
        brain.RewardModel.from_pretrained(str(tmp_path / "rm.pt"), base)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_does_not_run(checkpoint, tmp_path):
    """Wrong: weights_only=False, as older versions of torch had it."""
    _, weights, base, _ = checkpoint
    torch.save(weights | {"v_head.weight": Code(str(tmp_path / "ran"))}, tmp_path / "rm.pt")
    with pytest.raises(brain.UserError, match="--reward-model .*rm.pt.* code"):
        brain.RewardModel.from_pretrained(str(tmp_path / "rm.pt"), base)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "rm.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_bare_checkpoint_needs_a_base(checkpoint, tmp_path):
    """By itself, and in a directory. Wrong: an error of whatever is tried with no config; a base asked for where there is a config."""
    _, weights, base, tokenizer = checkpoint
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(brain.UserError, match="--reward-model .*weights alone.*--reward-base"):
            brain.RewardModel.from_pretrained(str(place))
    whole = tmp_path / "whole"
    classifier("gpt2", tokenizer).save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    torch.save(weights, whole / "pytorch_model.bin")
    assert brain.bare_checkpoint(str(whole), None) is None
    reward = brain.RewardModel.from_pretrained(str(whole), base=base)  # its own config counts
    assert type(reward.model).__name__ == "GPT2ForSequenceClassification"


def test_a_classifier_of_two_or_without_head_is_refused(tmp_path):
    """Wrong: the first of two logits taken for a reward; a causal LM given a random head."""
    tokenizer = byte_pairs()
    classifier("gpt2", tokenizer, labels=2).save_pretrained(tmp_path / "two")
    tiny("gpt2", vocab=len(tokenizer)).save_pretrained(tmp_path / "causal")
    for name, told in (("two", "2 labels"), ("causal", "missing weights.*score.weight")):
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(brain.UserError, match=f"--reward-model .*{told}"):
            brain.RewardModel.from_pretrained(str(tmp_path / name))


CHAT = "<begin>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "ca"}]


def test_messages_go_through_the_reward_models_chat_template():
    """The output as a reply, one beginning token, read at the template's last token. Wrong: the text template, a second beginning,
    a generation prompt behind the reply, the list of messages changed."""
    tokenizer = byte_pairs(*JOINING, specials=BOTH, begins=True)
    reward = brain.RewardModel(classifier("llama", tokenizer), tokenizer, "never {output}")
    given = copy.deepcopy(MESSAGES)
    with pytest.raises(brain.UserError, match="--reward-model: has no chat template"):
        reward(given, ["bc"])
    tokenizer.chat_template = CHAT
    expected = []
    for output in OUTPUTS:
        ids = tokenizer(f"<begin>s:be<end>u:ca<end>a:{output}<end>", add_special_tokens=False, return_tensors="pt").input_ids
        assert ids[0].tolist().count(1) == 1
        expected.append((reward.model.base_model(ids).last_hidden_state[0, -1] @ reward.model.score.weight[0]).item())
    np.testing.assert_allclose(reward(given, OUTPUTS), expected, rtol=0, atol=1e-5)
    assert given == MESSAGES


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_text_fills_the_context_and_no_more(family):
    """Wrong: >= for >, tokens cut off in silence, the error of an index out of range."""
    tokenizer = bert_tokenizer() if family == "bert" else byte_pairs()
    own = 2 * (family == "bert")  # [CLS] and [SEP]
    reward = brain.RewardModel(classifier(family, tokenizer, max_position_embeddings=16), tokenizer)
    assert reward("a" * 10, ["a" * (6 - own), ""]).isfinite().all()
    with pytest.raises(brain.UserError, match="--reward-model.* 17 tokens .* 16.*--max-prompt-tokens"):
        reward("a" * 10, ["a" * (7 - own), ""])


def test_a_score_that_is_not_finite_is_refused():
    """Wrong: nan as a reward, which makes every weight of its prompt nan."""
    tokenizer = byte_pairs()
    reward = brain.RewardModel(classifier("gpt2", tokenizer), tokenizer)
    for value in (math.nan, math.inf, -math.inf):
        reward.head = lambda hidden: torch.full((len(hidden), 1), value)
        with pytest.raises(brain.UserError, match="--reward-model.*nan or inf.*--dtype"):
            reward("a", ["b"])


def test_a_reward_function_is_called_as_trl_calls_it():
    """By keyword, every column as a list as long as the completions. Wrong: by position, columns once, a prompt column twice,
    columns for a function that takes none, messages as text."""
    calls = []

    def greedy(**given):
        calls.append(given)
        return [0.0] * len(given["completions"])

    def modest(completions, label, prompts):
        calls.append((prompts, completions, label))
        return [1, 2]

    columns = {"label": "g", "source": 7}
    brain.RewardFunction(greedy, "f")("p", ["x", "y"], columns)
    assert calls.pop() == {"prompts": ["p", "p"], "completions": ["x", "y"], "label": ["g", "g"], "source": [7, 7]}
    assert brain.RewardFunction(modest, "f")("p", ["x", "y"], columns).tolist() == [1, 2]
    assert calls.pop() == (["p", "p"], ["x", "y"], ["g", "g"])
    brain.RewardFunction(greedy, "f")("p", ["x"])
    assert calls.pop() == {"prompts": ["p"], "completions": ["x"]}
    brain.RewardFunction(greedy, "f")(MESSAGES, ["x", "y"])
    replies = [[{"role": "assistant", "content": text}] for text in "xy"]
    assert calls.pop() == {"prompts": [MESSAGES, MESSAGES], "completions": replies}
    brain.RewardFunction(greedy, "f")("p", ["x"], {"completions": "of the data", "prompts": "of the data"})
    assert calls.pop() == {"prompts": ["p"], "completions": ["x"]}
    assert columns == {"label": "g", "source": 7}


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda r: np.array(r, np.float32), torch.tensor, iter])
def test_a_reward_function_may_return_what_holds_numbers(kind):
    """float64, no gradient. Wrong: lists alone; float32."""
    found = brain.RewardFunction(lambda completions: kind([0.5, -2.0, 3.0]), "f")("p", ["x", "y", "z"])
    assert found.dtype == DOUBLE and found.tolist() == [0.5, -2, 3]
    exact = 1 + 1e-12
    assert brain.RewardFunction(lambda completions: [exact], "f")("p", ["x"]).item() == exact
    assert brain.RewardFunction(lambda completions: [True, False, 2], "f")("p", ["x", "y", "z"]).tolist() == [1, 0, 2]


RETURNS = [[1.0, 2.0], [1.0] * 4, [], [1.0, math.nan, 0.0], [1.0, math.inf, 0.0], None, 1.0, "abc", ["a", "b", "c"]]
RETURNS += [[1.0, None, 2.0], [[1.0, 2.0, 3.0]], [[1.0], [2.0], [3.0]], np.zeros((3, 2))[:0]]


@pytest.mark.parametrize("returned", RETURNS, ids=repr)
def test_a_reward_function_that_returns_something_else_is_refused(returned):
    """Named with what it returned and for which prompt. Wrong: nan as a reward, broadcasting, one number for all."""
    with pytest.raises(brain.UserError, match=r"--reward-function file\.py:f: must return 3 .*'the prompt'"):
        brain.RewardFunction(lambda completions: returned, "file.py:f")("the prompt", ["x", "y", "z"])


def test_a_reward_function_that_raises_shows_where(capsys):
    """Its own traceback, then one line. Wrong: only that it failed."""

    def f(completions, **columns):
        return [columns["nowhere"]]

    with pytest.raises(brain.UserError, match="--reward-function file.py:f: raised"):
        brain.RewardFunction(f, "file.py:f")("p", ["x"])
    shown = capsys.readouterr().err
    assert "Traceback" in shown and 'columns["nowhere"]' in shown and "KeyError" in shown


def test_a_reward_function_comes_from_a_file(tmp_path):
    """file.py:name; the file's last colon counts. Wrong: the first colon; a name that is no function; a message without the mend."""
    (tmp_path / "a:b").mkdir()
    for file in (tmp_path / "f.py", tmp_path / "a:b" / "f.py"):
        file.write_text("number = 3\ndef good(completions):\n    return [len(c) + number for c in completions]\n")
        assert brain.RewardFunction.from_file(f"{file}:good")("p", ["x", "yy"]).tolist() == [4, 5]
    for spec, told in (("f.py:nosuch", "no function nosuch"), ("f.py:number", "no function number"), ("g.py:good", "file.py:name"), ("f.py", "file.py:name")):
        with pytest.raises(brain.UserError, match=f"--reward-function .*{re.escape(spec)}: .*{told}"):
            brain.RewardFunction.from_file(f"{tmp_path}/{spec}")


# ------------------------------------------------------------------------------------------
# 6. Prompts


DATA = [{"prompt": f"q{i}:", "label": f" a{i}", "number": i} for i in range(5)]


def write_rows(path, rows=DATA):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dataset_of(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def settings_of(**changes):
    """Settings as `load_data` reads them; lengths as `plan` settles them."""
    s = brain.parse(["--model", "m", "--dataset", "d", "--reward-model", "r", "--method", changes.pop("method", "brain")])
    return dataclasses.replace(s, **{"max_prompt_tokens": 50, "max_new_tokens": 8} | changes)


def prompts_of(rows, tokenizer=None, split="train", **changes):
    rows, settings = dataset_of(rows), settings_of(**changes)
    pair = ("chosen", "rejected") if settings.method == "dpo" and split == "train" else ()
    brain.check_rows(rows, f"--dataset {settings.dataset}: split {split}", pair)
    return brain.Prompts(rows, tokenizer or byte_pairs(*JOINING), settings, split)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    def refuse(*given, **more):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".csv"])
def test_rows_of_a_file(kind, tmp_path, no_hub):
    """A file is the train split, whatever its kind. Wrong: another reader, rows in another order, a split by its name, the hub asked."""
    file, rows = tmp_path / f"test{kind}", dataset_of(DATA)
    if kind == ".json":
        file.write_text(json.dumps(DATA))
    else:
        {".jsonl": rows.to_json, ".parquet": rows.to_parquet, ".csv": rows.to_csv}[kind](file)
    found = brain.load_splits(str(file))
    assert list(found) == ["train", "validation", "test"] and found["validation"] is None and found["test"] is None
    assert list(found["train"]) == DATA


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_splits_of_a_directory(name, tmp_path, no_hub):
    """Wrong: valid and validation taken for different splits; test rows among others; the hub asked."""
    for split, some in (("train", DATA[:3]), (name, DATA[3:4]), ("test", DATA[4:])):
        write_rows(tmp_path / f"{split}.jsonl", some)
    found = brain.load_splits(str(tmp_path))
    assert {split: list(rows) for split, rows in found.items()} == {"train": DATA[:3], "validation": DATA[3:4], "test": DATA[4:]}


def test_a_hub_name_is_read_from_its_snapshot(tmp_path, no_hub, monkeypatch):
    """Works without a network where the cache has it. Wrong: load_dataset(name), which asks the network; a snapshot of a model."""
    import huggingface_hub

    write_rows(tmp_path / "train.jsonl")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (asked.append((a, k)), str(tmp_path))[1])
    assert list(brain.load_splits("owner/name")["train"]) == DATA
    assert asked == [(("owner/name",), {"repo_type": "dataset"})]


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_splits_by_name(name, tmp_path, no_hub, monkeypatch):
    """As a card on the hub names them. Wrong: one of the three names forgotten, so that others are held out."""
    import datasets

    given = {"train": dataset_of(DATA[:3]), name: dataset_of(DATA[3:4])}
    monkeypatch.setattr(datasets, "load_dataset", lambda path: datasets.DatasetDict(given))
    assert list(brain.load_splits(str(tmp_path))["validation"]) == DATA[3:4]


def test_the_gold_answer_is_the_first_column_there_is():
    """label, completion, chosen, response. Wrong: another order; the data's own order of columns; `rejected`."""
    order = ("label", "completion", "chosen", "response")
    row = {name: f" {name}" for name in ("rejected", *reversed(order))} | {"prompt": "q"}
    for name in order:
        assert prompts_of([row])[0].gold == f" {name}"
        del row[name]
    none = prompts_of([row])
    assert none[0].gold is None and "win-rate" in none.summary
    some = prompts_of([{"prompt": "q", "label": None, "chosen": " c"}, {"prompt": "q", "label": " x", "chosen": " c"}])
    assert [example.gold for example in some] == [None, " x"] and "win-rate" not in some.summary


def test_an_answer_is_joined_by_one_space_where_neither_brings_any():
    """All four cases. Wrong: always a space, never one, two; white space that is no space forgotten; a space before an empty answer."""
    assert brain.answer_text("q:", "a") == " a"
    assert brain.answer_text("q: ", "a") == brain.answer_text("q:\n", "a") == "a"
    assert brain.answer_text("q:", " a") == " a" and brain.answer_text("q:", "\na") == "\na"
    assert brain.answer_text("q: ", " a") == " a"
    assert brain.answer_text("q:", "") == ""
    assert brain.answer_text(MESSAGES, "a") == "a"  # the chat template ends as it ends
    assert brain.answer_text(MESSAGES, MESSAGES + [{"role": "assistant", "content": "a"}]) == "a"
    assert brain.answer_text("q:", [{"role": "assistant", "content": "a"}]) == " a"
    (example,) = prompts_of([{"prompt": "q:", "label": "a"}])
    assert example.gold == " a"


def test_messages_are_prompts():
    """The policy's chat template with its generation prompt, one beginning token. Wrong: no generation prompt, two beginnings,
    the gold's whole list of messages as text."""
    tokenizer = byte_pairs(*JOINING, specials=BOTH, begins=True)
    rows = [{"prompt": MESSAGES, "chosen": MESSAGES + [{"role": "assistant", "content": "bc"}]}]
    with pytest.raises(brain.UserError, match="--model.*no chat template"):
        prompts_of(rows, tokenizer)
    tokenizer.chat_template = CHAT
    (example,) = prompts_of(rows, tokenizer)
    expected = tokenizer("<begin>s:be<end>u:ca<end>a:", add_special_tokens=False).input_ids
    assert example.ids.tolist() == expected and expected.count(1) == 1
    assert example.prompt == MESSAGES and example.gold == "bc"
    assert prompts_of([{"prompt": "ca"}], tokenizer)[0].ids.tolist() == tokenizer("ca").input_ids  # text: begun as well


def test_a_prompt_too_long_is_left_out_and_counted():
    """What is as long as --max-prompt-tokens stays. Wrong: < for <=, characters counted, cut to length, rows that shift, the count hidden."""
    rows = [{"prompt": "c" * size, "label": str(size), "number": size} for size in (3, 5, 4, 9, 1, 4)]
    prompts = prompts_of(rows, max_prompt_tokens=4)
    assert len(prompts) == 4 and [len(example.ids) for example in prompts] == [3, 4, 1, 4]
    assert [(example.row, example.prompt, example.gold, example.columns) for example in prompts] == [
        (i, "c" * size, f" {size}", {"label": str(size), "number": size}) for i, size in enumerate((3, 4, 1, 4))
    ]
    assert re.search(r"train: 4 prompts.* 2 longer than 4 tokens left out", prompts.summary)
    assert "left out" not in prompts_of(rows, max_prompt_tokens=9).summary
    joined = [{"prompt": "cab"}, {"prompt": "cbabb"}]  # 2 and 4 tokens: c, ab / c, b, ab, b
    assert len(prompts_of(joined, max_prompt_tokens=2)) == 1
    with pytest.raises(brain.UserError, match="none of 6 prompts.*--max-prompt-tokens.*--max-new-tokens"):
        prompts_of(rows, max_prompt_tokens=0)
    with pytest.raises(brain.UserError, match="none of 1 prompts"):
        prompts_of([{"prompt": "<begin>abc"}], byte_pairs(specials=BOTH, begins=True), max_prompt_tokens=3)  # the beginning counts


@pytest.mark.parametrize("prompt", ["", " \n", None, 3, [], ["text"], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}]], ids=repr)
def test_a_prompt_that_is_none_is_refused_by_row(prompt):
    """Wrong: an empty prompt, from which the first token has no distribution; a row left out in silence; rows counted from 0."""
    with pytest.raises(brain.UserError, match="--dataset d: split valid.*row 1: 'prompt' must be text"):
        prompts_of([{"prompt": prompt}], split="valid")
    if isinstance(prompt, str | None):
        with pytest.raises(brain.UserError, match="row 3: 'prompt' must be text"):
            prompts_of([{"prompt": "q"}, {"prompt": "q"}, {"prompt": prompt}])


def test_an_answer_that_is_no_text_is_refused():
    """Wrong: a label of numbers, as classification data has, written out as an answer."""
    with pytest.raises(brain.UserError, match="row 2: 'label' must be text.* not 7"):
        prompts_of([{"prompt": "q", "label": None}, {"prompt": "q", "label": 7}])
    with pytest.raises(brain.UserError, match="row 1: 'rejected' must be text"):
        prompts_of([{"prompt": "q", "chosen": "a", "rejected": None}], method="dpo")
    assert prompts_of([{"prompt": "q", "label": ""}])[0].gold == ""  # an empty answer is one


def held_out(splits, capsys, **changes):
    splits = {"train": None, "validation": None, "test": None} | {name: dataset_of(rows) for name, rows in splits.items()}
    prompts = brain.load_data(settings_of(**changes), byte_pairs(), splits)
    return [[example.columns["number"] for example in some] for some in prompts], capsys.readouterr().out


def test_missing_splits_are_held_out_of_train(capsys):
    """A tenth, rounded up; disjoint; the same for every --seed; said. Wrong: rows in two splits, the first rows, other rows with
    another seed, a validation split taken from test, or held out in silence."""
    rows = [{"prompt": f"q{i}", "label": "a", "number": i} for i in range(35)]
    (train, validation, test), told = held_out({"train": rows}, capsys)
    assert [len(train), len(validation), len(test)] == [27, 4, 4]
    assert sorted(train + validation + test) == list(range(35))
    assert validation != list(range(4)) and validation != list(range(31, 35))  # drawn, not the first or last
    assert re.search(r"validation: .*4 rows of train are held out", told) and re.search(r"test: .*4 rows of train are held out", told)
    assert "train: 27 prompts" in told and "validation: 4 prompts" in told and "test: 4 prompts" in told
    assert held_out({"train": rows}, capsys, seed=5)[0] == [train, validation, test]
    (train, validation, test), told = held_out({"train": rows[:30], "test": rows[30:]}, capsys)
    assert sorted(train + validation) == list(range(30)) and len(validation) == 3 and test == [30, 31, 32, 33, 34]
    assert "test: not" not in told
    (train, validation, test), told = held_out({"train": rows[:3], "validation": rows[3:5], "test": rows[5:]}, capsys)
    assert [train, validation, test] == [[0, 1, 2], [3, 4], list(range(5, 35))] and "held out" not in told
    with pytest.raises(brain.UserError, match="--dataset.*too few rows"):
        held_out({"train": rows[:1], "test": rows[1:]}, capsys)
    with pytest.raises(brain.UserError, match="--dataset.*split train is missing"):
        held_out({"test": rows}, capsys)


def test_at_most_a_thousand_rows_are_held_out():
    """Wrong: a tenth of a large data set, whose evaluation takes hours."""
    rows = dataset_of([{"prompt": "q"}] * 10_020)
    splits = {"train": rows, "validation": None, "test": rows.select([0])}
    assert list(map(len, brain.load_data(settings_of(), byte_pairs(), splits))) == [9020, 1000, 1]


def test_pairs_are_answers_as_the_policy_would_have_written_them():
    """What follows the prompt, then the end token, cut like an output; chosen first. Wrong: rejected first, no end token, an end
    token behind a cut answer, the prompt's ids among the answer's, a token over the boundary, a space too many or too few."""
    tokenizer = byte_pairs(*JOINING, specials=BOTH, begins=True)
    ids = lambda *tokens: tokenizer.convert_tokens_to_ids(list(tokens))  # noqa: E731
    row = {"prompt": "ca ", "chosen": "bc", "rejected": "cccccccccc"}  # 4 tokens of prompt with its beginning
    (example,) = prompts_of([row], tokenizer, method="dpo", max_new_tokens=4)
    assert [pair.tolist() for pair in example.pair] == [ids("b", "c", "<end>"), ids("c", "c", "c", "c")]
    assert example.ids.tolist() == ids("<begin>", "c", "a", "Ġ")
    (example,) = prompts_of([row | {"chosen": "cccc", "rejected": "ccc"}], tokenizer, method="dpo", max_new_tokens=4)
    assert [pair.tolist() for pair in example.pair] == [ids("c", "c", "c", "c"), ids("c", "c", "c", "<end>")]
    (example,) = prompts_of([row | {"prompt": "ca", "rejected": ""}], tokenizer, method="dpo")
    assert [pair.tolist() for pair in example.pair] == [ids("Ġ", "b", "c", "<end>"), ids("<end>")]
    tokenizer.chat_template = CHAT  # ends in "a:", so that nothing brings a space
    (example,) = prompts_of([{"prompt": MESSAGES, "chosen": "bc", "rejected": [{"role": "assistant", "content": "bb"}]}], tokenizer, method="dpo")
    assert [pair.tolist() for pair in example.pair] == [ids("b", "c", "<end>"), ids("bb", "<end>")]
    joining = byte_pairs(("Ġ", "b"), *JOINING)
    (example,) = prompts_of([{"prompt": "ca ", "chosen": "bc", "rejected": "c"}], joining, method="dpo")
    assert joining("ca bc").input_ids[: len(example.ids)] != example.ids.tolist()  # c, a, " b", c: the space of the prompt is gone
    assert example.pair[0].tolist() == joining.convert_tokens_to_ids(["b", "c", "<end>"])
    for split, method in (("validation", "dpo"), ("train", "brain")):
        assert not prompts_of([row], tokenizer, split, method=method)[0].pair
    with pytest.raises(brain.UserError, match="--method dpo needs 'chosen' and 'rejected'"):
        prompts_of([{"prompt": "q", "chosen": "a"}], method="dpo")


def test_pairs_of_another_data_set_are_trained_on(tmp_path, no_hub, capsys):
    """--pairs-dataset for --method dpo, its cue moved; evaluated on --dataset. Wrong: its rows among the evaluated ones, for a
    method that draws its own outputs, the cue twice, prompts without it."""
    pair = {"prompt": "POST: ca\n", "chosen": "TL;DR: good", "rejected": "TL;DR: bad"}
    plain_pair = {"prompt": "POST: cb\n\nTL;DR:", "chosen": " good", "rejected": " bad TL;DR: x"}
    assert brain.move_cue(pair) == {"prompt": "POST: ca\nTL;DR:", "chosen": " good", "rejected": " bad"}
    assert brain.move_cue(plain_pair) == plain_pair
    file = write_rows(tmp_path / "pairs.jsonl", [pair, plain_pair])
    splits = lambda: {name: dataset_of(DATA) for name in ("train", "validation", "test")}  # noqa: E731
    tokenizer = byte_pairs()
    train, validation, test = brain.load_data(settings_of(method="dpo", pairs_dataset=file), tokenizer, splits())
    assert [example.prompt for example in train] == ["POST: ca\nTL;DR:", "POST: cb\n\nTL;DR:"]
    assert [[tokenizer.decode(ids) for ids in example.pair] for example in train] == [[" good<end>", " bad<end>"], [" good<end>", " bad TL;"]]
    assert [example.gold for example in validation] == [f" a{i}" for i in range(5)] == [example.gold for example in test]
    train, *_ = brain.load_data(settings_of(pairs_dataset=file), tokenizer, splits())
    assert [example.prompt for example in train] == [row["prompt"] for row in DATA]


def test_columns_reach_the_reward_function():
    """All but the prompt, from `collect` too. Wrong: the columns of another row, none, the prompt among them."""
    seen = []

    def f(prompts, completions, **columns):
        seen.append((prompts, columns))
        return [0.0] * len(completions)

    rows = [{"prompt": "c" * 60, "number": -1, "label": ""}] + [{"prompt": f"c{i}", "number": i, "label": f"{i}"} for i in range(3)]
    prompts = prompts_of(rows, max_new_tokens=2, samples_per_prompt=3, max_prompt_tokens=50)
    policy = brain.Policy(tiny("gpt2", vocab=260), byte_pairs(*JOINING))
    (samples,) = brain.collect(policy, brain.RewardFunction(f, "f"), prompts, 1, prompts.settings, [1])
    assert seen == [(["c1"] * 3, {"number": [1] * 3, "label": ["1"] * 3})]
    assert samples.row == 1 and samples.prompt_ids.tolist() == prompts[1].ids.tolist()


def sentence_pieces(scheme="always"):
    """As SentencePiece: a space is part of the word behind it, and the first one of what is decoded is dropped."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["<end>", "▁a", "▁b", "b", "▁", "a", "c"])}
    words = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")]))
    words.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    words.decoder = decoders.Metaspace("▁", scheme)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_the_text_of_an_output_is_what_it_adds(scheme):
    """With a tokenizer that drops the first space of what it decodes. Wrong: the output decoded alone, " b" then being "b"; the end
    token as text; the last token dropped from an output that was cut."""
    tokenizer = sentence_pieces(scheme)
    policy = brain.Policy(tiny("gpt2", vocab=7), tokenizer)
    ids = torch.tensor(tokenizer("a bc").input_ids)
    assert tokenizer.decode([2]) == "b" != policy.text(ids, torch.tensor([2]))
    for output, text in (([2, 0], " b"), ([3, 6, 0], "bc"), ([2, 1, 5], " b aa"), ([0], ""), ([4, 4, 0], "  "), ([4, 2], "  b")):
        assert policy.text(ids, torch.tensor(output)) == text
        whole = tokenizer("a bc" + text).input_ids  # the text joined to the prompt decodes to the same whole
        assert tokenizer.decode(whole) == tokenizer.decode(ids.tolist() + output, skip_special_tokens=True)


def test_the_text_of_an_output_of_bytes():
    """Byte-level: letters of several tokens, spaces kept as they are, any of the end tokens taken off. Wrong: clean_up_tokenization_spaces
    (" ." becomes "."), an end token that is no special one left in the text."""
    tokenizer = byte_pairs(*JOINING)
    model = tiny("gpt2", vocab=260)
    model.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids("!")]
    policy = brain.Policy(model, tokenizer)
    prompt = torch.tensor(tokenizer("é,").input_ids)
    for text in (" é . n't", "", "\n\n b ", "ab"):
        ids = tokenizer(text).input_ids
        for output in (ids + [0], tokenizer(text + "!").input_ids) + (ids,) * bool(ids):
            assert policy.text(prompt, torch.tensor(output)) == text
    special = byte_pairs(specials=BOTH)
    b, c = special.convert_tokens_to_ids(["b", "c"])
    assert brain.Policy(tiny("gpt2", vocab=260), special).text(torch.tensor([1, b]), torch.tensor([c, 1, b, 0])) == "cb"  # no <begin>


@pytest.mark.parametrize("bad, number", [("{", 2), ("[1]", 2), ('"text"', 2), ("", None), ('{"prompt": "x"} {', 2)])
def test_the_broken_line_of_a_file_is_found(tmp_path, bad, number):
    """Wrong: counted from 0, an empty line called broken, a JSON value that is no object taken for a row, the wrong file of a directory."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n' + bad + '\n{"prompt": "x"}\n')
    expected = number and f"{tmp_path / 'b.jsonl'}:{number}"
    assert brain.broken_line(tmp_path / "b.jsonl") == expected == brain.broken_line(tmp_path)
    assert brain.broken_line(tmp_path / "a.jsonl") is None


# ------------------------------------------------------------------------------------------
# 7. Evaluation


def evaluated(tmp_path, policy, data=None, reward=taste, **changes):
    s = short_run(**{"eval_prompts": 0} | changes)
    return brain.evaluate(policy, reward, seven_examples() if data is None else data, s, brain.Run(tmp_path, s))


def test_evaluation_by_hand(tmp_path):
    """One draw of the policy for each prompt, from its own stream, in the data's order; win-rate, reward and KL from plain
    forwards and numpy. Wrong: outputs of the prior, output and gold swapped, ties lost, prompts without gold counted as lost,
    lines in the order of length, KL with its sign turned or per token, a stream shared by the prompts or with training, rewards
    of another row's columns."""
    policy, data = drifted(0.15), seven_examples()
    metrics, lines = evaluated(tmp_path, policy)
    ratios, ours, gold = [], [], []
    for i, (example, line) in enumerate(zip(data, lines, strict=True)):
        (output,) = policy.sample(example.ids, 1, 4, generator=brain.seeded(5, brain.EVALUATION, i))
        log_q, log_p = (plain(model, example.ids, output, KNOWN).item() for model in (policy.model, policy.prior_model))
        ratios.append(log_q - log_p)
        text = "".join(" " + chr(96 + id) for id in output.tolist() if id)
        ours += taste(example.prompt, [text], example.columns).tolist()
        gold.append(None if example.gold is None else taste(example.prompt, [example.gold], example.columns).item())
        assert line == {"prompt": example.prompt, "gold": example.gold, "output": text, "reward": ours[-1], "gold_reward": gold[-1]}
    won = np.mean([(r > g) + (r == g) / 2 for r, g in zip(ours, gold) if g is not None])
    assert 0 < won < 1 and won != 0.5 and len(gold) == 7 and gold.count(None) == 1
    expected = {"win_rate": 100 * won, "win_rate_half_width": 196 * math.sqrt(won * (1 - won) / 6), "reward": np.mean(ours)}
    assert metrics == pytest.approx(expected | {"kl_to_prior": np.mean(ratios)}, abs=1e-9)
    assert abs(np.mean(ratios)) > 0.05


def test_ties_of_an_evaluation_count_half(tmp_path):
    """Departure 4. Wrong: a tie lost, or won."""
    same = lambda prompt, texts, columns: torch.zeros(len(texts), dtype=DOUBLE)  # noqa: E731
    metrics, _ = evaluated(tmp_path, drifted(), reward=same)
    assert metrics["win_rate"] == 50


def test_kl_to_prior_is_that_of_all_outputs(tmp_path):
    """The evaluation's estimate against KL(q_theta || p) by enumeration, and not KL(p || q_theta). Wrong: the divergence the
    other way round, an average over tokens, draws that are not of the policy."""
    policy, (example, *_) = drifted(0.3), seven_examples()
    words = [list(itertools.product(range(1, 7), repeat=size)) for size in range(3)]
    outputs = [torch.tensor(word + (0,)) for size in (0, 1) for word in words[size]] + [torch.tensor(word) for word in words[2]]
    with torch.no_grad():
        log_q, log_p = (policy.log_prob(example.ids, outputs, prior=prior).numpy() for prior in (False, True))
    exact, ratio = toy_world.kl(log_q, log_p), log_q - log_p
    error = math.sqrt((np.exp(log_q) * (ratio - exact) ** 2).sum() / 600)
    metrics, _ = evaluated(tmp_path, policy, [example] * 600, max_new_tokens=2)
    assert abs(metrics["kl_to_prior"] - exact) < 4 * error < exact / 2  # four standard errors


@pytest.mark.parametrize("size", [1, 3, 100])
def test_an_evaluation_does_not_depend_on_its_batches(size, tmp_path, monkeypatch):
    """Same outputs and numbers for any size, and again. Wrong: a stream of random numbers for each batch, padding that is seen, an
    evaluation that draws anew each time."""
    policy = drifted()
    expected, expected_lines = evaluated(tmp_path, policy)
    monkeypatch.setattr(brain, "EVALUATION_BATCH", size)
    for _ in range(2):
        metrics, lines = evaluated(tmp_path, policy)
        assert lines == expected_lines and metrics == pytest.approx(expected, abs=1e-10)
    assert evaluated(tmp_path, policy, seed=6)[1] != expected_lines


def test_greedy_evaluation(tmp_path):
    """The most likely token each time, and no KL, which greedy outputs do not estimate. Wrong: --greedy ignored, or KL left in."""
    policy = drifted(0.15)
    metrics, lines = evaluated(tmp_path, policy, greedy=True)
    assert set(metrics) == {"win_rate", "win_rate_half_width", "reward"}
    for example, line in zip(seven_examples(), lines, strict=True):
        ids, text = example.ids, ""
        for _ in range(4):
            token = policy.model(ids[None]).logits[0, -1, :KNOWN].argmax()
            if token == 0:
                break
            ids, text = torch.cat([ids, token[None]]), text + " " + chr(96 + int(token))
        assert line["output"] == text
    assert lines == evaluated(tmp_path, policy, greedy=True, seed=6)[1]
    assert lines != evaluated(tmp_path, policy)[1]


def test_evaluated_prompts_are_evenly_spaced(tmp_path):
    """--eval-prompts of them; 0, or more than there are: all. Wrong: the first ones, 0 as none, a prompt twice."""
    policy, prompts = drifted(), [example.prompt for example in seven_examples()]
    for count, rows in ((3, [0, 2, 4]), (4, [0, 1, 3, 5]), (1, [0]), (0, range(7)), (7, range(7)), (70, range(7))):
        assert [line["prompt"] for line in evaluated(tmp_path, policy, eval_prompts=count)[1]] == [prompts[i] for i in rows], count
    assert brain.evenly(1000, 3) == [0, 333, 666]
    assert brain.evenly(5, 0) == []


def test_an_evaluation_without_gold_answers(tmp_path):
    """Reward and KL alone. Wrong: a win-rate of 0 or 100, an error."""
    metrics, lines = evaluated(tmp_path, drifted(), seven_examples([None] * 7))
    assert set(metrics) == {"reward", "kl_to_prior"}
    assert all(line["gold"] is None and line["gold_reward"] is None for line in lines)


@pytest.mark.parametrize("method", ["brain-no-baseline", "dpo-sft", "dpo"])
def test_held_out_d_n(method, tmp_path):
    """n outputs of the prior for evenly spaced validation prompts, drawn once; D_n of them by plain forwards and numpy, for
    every method. Wrong: samples of the policy, prompts of train or test, weights of pairs, an argmax, the data's pair, eq. 7 as
    the objective, a sum over prompts, samples drawn anew at each evaluation, alpha_hat taken anew."""
    policy, data, other = drifted(), seven_examples(), [seven_examples()[5]]
    s = short_run(method=method, samples_per_prompt=2 if method == "dpo" else 4, goodness="logistic")
    run = brain.Run(tmp_path, s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, "HELD_OUT_PROMPTS", 3)
        run.start(policy, taste, data, other)
    assert run.splits == {"validation": data, "test": other} and run.reward is taste
    alphas = []
    for i, samples in zip((0, 2, 4), run.held_out, strict=True):
        drawn = policy.sample(ROWS[i], s.samples_per_prompt, 4, prior=True, generator=brain.seeded(5, brain.OUTPUTS, 0, i))
        assert [y.tolist() for y in samples.outputs] == [y.tolist() for y in drawn]
        r = taste(data[i].prompt, samples.texts, data[i].columns)
        alphas.append(softmax(-np.log1p(np.exp(-r.numpy()))))  # q' = p: eq. 21
        np.testing.assert_allclose(samples.alpha_hat, alphas[-1], atol=1e-10)
    for _ in range(2):
        divergences = []
        for samples, alpha in zip(run.held_out, alphas):
            q, p = (
                plain_all(model, samples.prompt_ids, samples.outputs).detach().numpy()
                for model in (policy.model, policy.prior_model)
            )
            divergences.append((alpha * np.log(alpha / softmax(q - p))).sum())
        found = run.divergence(policy)
        assert isinstance(found, float) and found == pytest.approx(np.mean(divergences), abs=1e-10)
        with torch.no_grad():
            for p in policy.parameters().values():
                p.mul_(0.9)


def test_held_out_prompts_are_64():
    """Wrong: fewer, which makes D_n a number of chance."""
    assert brain.HELD_OUT_PROMPTS == 64


# ------------------------------------------------------------------------------------------
# 8. The run directory


class SmallToy(toy_world.Toy):
    """The default run's world, of 13 outputs: a run takes half a second."""

    def __init__(self, seed=0, dtype="float32", goodness="bradley-terry", length=2):
        super().__init__(seed, dtype, goodness, letters=3, length=length, prompts=4)

    gold = True

    def splits(self):
        return {
            split: rows if self.gold else rows.remove_columns(["label", "chosen", "rejected"])
            for split, rows in super().splits().items()
        }

    def report(self, model, path):
        """Drawing takes longer than the run."""


@pytest.fixture
def small_toy(monkeypatch):
    monkeypatch.setattr(toy_world, "Toy", SmallToy)
    monkeypatch.setattr(brain, "HELD_OUT_PROMPTS", 2)
    monkeypatch.setattr(brain.Run, "report", lambda run: (run.path / "report.png").touch())


SHORT = """--iterations 2 --prompts-per-iteration 2 --samples-per-prompt 3 --updates-per-iteration 4 --batch-size 2 --max-new-tokens 2
    --learning-rate 0.003 --weight-decay 0.1 --eval-prompts 6 --eval-every 3""".split()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    """Every file of a run as something to compare: bytes, but for the times in metrics.jsonl and the place in config.json."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    files["metrics.jsonl"] = [
        {k: v for k, v in line.items() if "time" not in k and "seconds" not in k} for line in read_lines(path / "metrics.jsonl")
    ]
    config = json.loads(files["config.json"])
    files["config.json"] = {
        name: value for name, value in config.items() if name not in ("output_dir", "command", "resume", "overwrite")
    }
    return files


def same_files(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name


@pytest.mark.parametrize("method", ["brain", "dpo-sft"])
def test_files_of_a_run(method, small_toy, monkeypatch, tmp_path, capsys):
    """Keys, steps and numbers of every file, and their agreement. Wrong: a key lost or renamed, an evaluation missed at a
    multiple of --eval-every, at the end, before training or on test; a step counted from 0; samples of one round alone; log p
    and log q' swapped in the file; ids without the end token; a config that is nested or lacks a setting."""
    path, checkpoints, save = tmp_path / "run", [], brain.Run.save_checkpoint
    monkeypatch.setattr(brain.Run, "save_checkpoint", lambda run, *state: (checkpoints.append(state[-1]), save(run, *state)))
    assert brain.main([*SHORT, "--method", method, "--samples-per-prompt", 4, "--output-dir", path]) == 0
    config = json.loads((path / "config.json").read_text())
    names = [field.name for field in dataclasses.fields(brain.Settings)]
    assert list(config)[: len(names)] == names and {"python", "torch", "transformers", "numpy", "commit", "command"} <= set(config)
    assert not any(isinstance(value, (dict, list)) for value in config.values())
    assert (config["method"], config["iterations"], config["learning_rate"], config["seed"]) == (method, 2, 0.003, 0)
    assert (config["torch"], config["numpy"], config["transformers"]) == (
        torch.__version__,
        np.__version__,
        transformers.__version__,
    )

    metrics = read_lines(path / "metrics.jsonl")
    order = [(line["step"], line.get("split")) for line in metrics]
    v, at = "validation", lambda *steps: [(step, None) for step in steps]
    assert order == [(0, v), *at(1, 2, 3), (3, v), *at(4, 5, 6), (6, v), *at(7, 8), (8, v), (8, "test")]
    update = ["step", "loss", "reward", "kl_to_prior", "ess_alpha", "ess_beta", "max_weight", "ended", "time"]
    evaluation = ["step", "split", "win_rate", "win_rate_half_width", "reward", "kl_to_prior", "self_normalized_kl", "time"]
    for line in metrics:
        assert list(line) == (evaluation if "split" in line else update)
        assert all(math.isfinite(value) for name, value in line.items() if name != "split")
    assert checkpoints == [0, 3, 4, 6, 8]  # with each evaluation, and before each round
    told = capsys.readouterr().out
    for line in metrics:
        shown = [row for row in told.splitlines() if row.split()[:3] == ["update", str(line["step"]), line.get("split")]]
        assert len(shown) == ("split" in line)
        words = {
            "win_rate": "win_rate",
            "win_rate_half_width": "±",
            "reward": "reward",
            "kl_to_prior": "kl_to_prior",
            "self_normalized_kl": "self_normalized_kl",
        }
        for name, word in words.items() if shown else ():
            assert f"{word} {line[name]:.3f}" in shown[0]

    toy, samples = SmallToy(), read_lines(path / "samples.jsonl")
    assert [line["iteration"] for line in samples] == [1] * 8 + [2] * 8
    for line in samples:
        assert set(line) == {"iteration", "row", "prompt", "output", "output_ids", "reward", "log_p", "log_q_proposal", "alpha_hat"}
        assert line["output"] == toy.world.text(line["output_ids"]) and tuple(line["output_ids"]) in toy.world.index
        x = [toy.world.text(prompt) for prompt in toy.world.prompts].index(line["prompt"])
        y = toy.world.index[tuple(line["output_ids"])]
        assert line["reward"] == pytest.approx(toy.world.reward[x, y], abs=1e-5)
        assert line["log_p"] == pytest.approx(toy.log_p[x, y], abs=1e-4)  # float32 forwards
        fixed = line["iteration"] == 1 or method == "dpo-sft"
        assert (abs(line["log_q_proposal"] - line["log_p"]) < 1e-5) == fixed
    for i in range(0, 16, 4):
        group = samples[i : i + 4]
        assert len({(line["row"], line["prompt"], line["iteration"]) for line in group}) == 1
        log_p, proposal, r, alpha = (
            np.array([line[name] for line in group]) for name in ("log_p", "log_q_proposal", "reward", "alpha_hat")
        )
        np.testing.assert_allclose(alpha, by_hand_alpha(method, log_p, proposal, r), atol=1e-5)
    for line in metrics[1:3]:  # the batch is the two prompts of round 1
        assert line["reward"] == pytest.approx(np.mean([s["reward"] for s in samples[:8]]), abs=1e-5)
        assert line["ended"] == np.mean([s["output_ids"][-1] == 0 for s in samples[:8]])

    outputs = read_lines(path / "test_outputs.jsonl")
    assert len(outputs) == 6
    for line in outputs:
        assert list(line) == ["prompt", "gold", "output", "reward", "gold_reward"]
        for text, r in (("output", "reward"), ("gold", "gold_reward")):
            assert line[r] == pytest.approx(toy.world.reward_of([line["prompt"]], [line[text]])[0], abs=1e-9)
    expected = brain.win_rate([line["reward"] for line in outputs], [line["gold_reward"] for line in outputs])
    assert (metrics[-1]["win_rate"], metrics[-1]["win_rate_half_width"]) == pytest.approx(expected)
    assert metrics[-1]["reward"] == pytest.approx(np.mean([line["reward"] for line in outputs]))
    assert {file.name for file in path.iterdir()} == {
        "report.png",
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "test_outputs.jsonl",
        "model",
        "checkpoint",
    }


def test_the_same_seed_gives_the_same_run(small_toy, tmp_path):
    """All files but for times, byte by byte; another seed, another run. Wrong: a random number that is not drawn from the seed."""
    for name in ("one", "two"):
        torch.manual_seed(len(os.listdir(tmp_path)))  # torch's own state plays no part
        assert brain.main([*SHORT, "--output-dir", tmp_path / name]) == 0
    same_files(timeless(tmp_path / "one"), timeless(tmp_path / "two"))
    assert brain.main([*SHORT, "--output-dir", tmp_path / "three", "--seed", 1]) == 0
    one, three = timeless(tmp_path / "one"), timeless(tmp_path / "three")
    for name in ("metrics.jsonl", "samples.jsonl", "test_outputs.jsonl", "model/model.safetensors"):
        assert one[name] != three[name], name


def test_iterations_0_evaluates_alone(small_toy, tmp_path):
    """The prior on validation and test, saved as model/. Wrong: an update, an error for want of samples."""
    assert brain.main([*SHORT, "--iterations", 0, "--output-dir", tmp_path / "run"]) == 0
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [(0, "validation"), (0, "test")]
    assert [line["kl_to_prior"] for line in lines] == pytest.approx([0, 0], abs=1e-5)
    assert (tmp_path / "run/samples.jsonl").read_bytes() == b""
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict(), SmallToy().model.state_dict())


SCRIPT = [50.0, 70.0, 60.0, 70.0]  # win-rates of the four evaluations of SHORT on validation


@pytest.fixture
def scripted(monkeypatch):
    """Validation win-rates as in SCRIPT, read off what metrics.jsonl holds. -> [(split of the data, weights)] of each evaluation"""
    seen, evaluate = [], brain.evaluate

    def with_script(policy, reward, data, settings, run):
        metrics, lines = evaluate(policy, reward, data, settings, run)
        seen.append((data is run.splits["test"], copy.deepcopy(policy.model.state_dict())))
        if not seen[-1][0]:
            metrics["win_rate"] = SCRIPT[sum("split" in line for line in run.lines("metrics.jsonl"))]
        return metrics, lines

    monkeypatch.setattr(brain, "evaluate", with_script)
    return seen


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_model_by_validation_win_rate_is_kept_and_tested(small_toy, scripted, tmp_path):
    """model/ is the first best of four, test uses it, and transformers alone loads it. Wrong: the last, the worst, the last of
    equals, the best by reward, a test of the last weights, the prior saved."""
    assert brain.main([*SHORT, "--output-dir", tmp_path / "run"]) == 0
    assert [test for test, _ in scripted] == [False] * 4 + [True]
    weights = [w for _, w in scripted]
    assert same_weights(weights[4], weights[1]) and not any(same_weights(weights[1], weights[i]) for i in (0, 2, 3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert same_weights(loaded.state_dict(), weights[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.get_vocab() == SmallToy().tokenizer.get_vocab() and tokenizer.eos_token_id == 0


def test_without_gold_answers_the_last_model_is_kept(small_toy, monkeypatch, tmp_path):
    """And there is a model/ at every moment after the first evaluation. Wrong: the first model kept, none at all, an error."""
    monkeypatch.setattr(SmallToy, "gold", False)
    saved, save_model = [], brain.Run.save_model
    monkeypatch.setattr(
        brain.Run,
        "save_model",
        lambda run, policy: (save_model(run, policy), saved.append(copy.deepcopy(policy.model.state_dict()))),
    )
    weights, evaluate = [], brain.evaluate
    monkeypatch.setattr(
        brain, "evaluate", lambda policy, *a: (weights.append(copy.deepcopy(policy.model.state_dict())), evaluate(policy, *a))[1]
    )
    assert brain.main([*SHORT, "--output-dir", tmp_path / "run"]) == 0
    assert len(saved) == 4 and all(map(same_weights, saved, weights))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    assert same_weights(loaded, weights[3]) and same_weights(weights[4], weights[3]) and not same_weights(weights[0], weights[3])
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "split" in line]
    assert len(lines) == 5 and not any("win_rate" in line for line in lines)
    assert [line["gold"] for line in read_lines(tmp_path / "run/test_outputs.jsonl")] == [None] * 6


def real_run(path, *more):
    """Arguments of a short run on a tiny llama on disk, LoRA, data without gold answers and reward function from files."""
    if not (path / "base").exists():
        tiny("llama", vocab=7, dtype=torch.float32).save_pretrained(path / "base")
        letters().save_pretrained(path / "base")
        (path / "data").mkdir()
        for split, size in (("train", 6), ("valid", 4), ("test", 4)):
            rows = [{"prompt": "".join(" " + "abcdef"[(i * j + size) % 6] for j in range(2 + i % 3))} for i in range(size)]
            (path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        body = "    return [float(text.count('a')) - 0.1 * len(text) for text in completions]\n"
        (path / "reward.py").write_text("def liking(prompts, completions, **columns):\n" + body)
    places = ["--model", path / "base", "--dataset", path / "data", "--reward-function", f"{path / 'reward.py'}:liking"]
    return [*places, *SHORT, "--lora-rank", 2, "--lora-alpha", 8, *more]


def test_an_adapter_run_is_loaded_by_peft_alone_and_gone_on_with(small_toy, monkeypatch, tmp_path):
    """The LoRA of a finished run on its base gives the greedy outputs of test_outputs.jsonl; killed at an update and resumed,
    it gives the same files. Wrong: the adapter saved under a name that peft does not know, an untrained adapter, AdamW's state
    lost on resuming."""
    from peft import PeftModel

    arguments = real_run(tmp_path, "--greedy", "--learning-rate", 0.05)
    torch.manual_seed(0)
    assert brain.main([*arguments, "--output-dir", tmp_path / "run"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, tokenizer = (
        PeftModel.from_pretrained(base, tmp_path / "run/model").eval(),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model"),
    )
    lines, changed = read_lines(tmp_path / "run/test_outputs.jsonl"), 0
    for line in lines:
        texts = []
        for adapter in (contextlib.nullcontext(), model.disable_adapter()):
            ids, text = torch.tensor(tokenizer(line["prompt"]).input_ids), ""
            with adapter:
                for _ in range(2):
                    token = model(input_ids=ids[None]).logits[0, -1].argmax()
                    if token == 0:
                        break
                    ids, text = torch.cat([ids, token[None]]), text + tokenizer.decode(token)
            texts.append(text)
        assert line["output"] == texts[0]
        changed += texts[0] != texts[1]
    assert len(lines) == 4 and changed
    killed_at(monkeypatch, brain, "update", 5)
    torch.manual_seed(0)
    with pytest.raises(Killed):
        brain.main([*arguments, "--output-dir", tmp_path / "killed"])
    torch.manual_seed(1)
    assert brain.main([*arguments, "--output-dir", tmp_path / "killed", "--resume"]) == 0
    same_files(timeless(tmp_path / "run"), timeless(tmp_path / "killed"))


def test_report_shows_the_metrics(monkeypatch, tmp_path):
    """report.png: a panel for each of eight numbers, updates grey, evaluations on validation black. Wrong: test among them,
    steps and values swapped, a number lost, no picture."""
    import matplotlib.figure

    figures, savefig = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path, **how: (figures.append(figure), savefig(figure, path, dpi=20))
    )
    run = brain.Run(tmp_path, short_run())
    update = {"loss": 0.5, "reward": 0.25, "kl_to_prior": 0.1, "ess_alpha": 3.0, "ess_beta": 4.0, "max_weight": 0.7, "ended": 0.9}
    evaluation = {"win_rate": 60.0, "win_rate_half_width": 9.0, "reward": 0.5, "kl_to_prior": 0.2, "self_normalized_kl": 0.8}
    run.write("metrics.jsonl", [{"step": 0, "split": "validation"} | evaluation, {"step": 1} | update, {"step": 2} | update])
    run.write(
        "metrics.jsonl",
        [{"step": 2, "split": "validation"} | evaluation, {"step": 2, "split": "test"} | evaluation | {"reward": 99.0}],
    )
    run.report()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    drawn = [[line.get_xydata().tolist() for line in axis.lines if line.get_marker() in ("o", "None")] for axis in figures[0].axes]
    drawn = {tuple(map(tuple, points)) for lines in drawn for points in lines if len(points)}
    expected = [
        ((1, update[name]), (2, update[name])) for name in ("loss", "reward", "kl_to_prior", "ess_alpha", "ess_beta", "ended")
    ]
    expected += [
        ((0, evaluation[name]), (2, evaluation[name])) for name in ("win_rate", "reward", "kl_to_prior", "self_normalized_kl")
    ]
    assert drawn == set(expected) and len(figures[0].axes) == 8


# ---- killed and gone on with


HALF = b"half of a file"


class Killed(BaseException):
    """A SIGKILL, as far as the files can tell: nothing of the run catches it."""


def killed_at(monkeypatch, owner, name, count):
    """The `count`-th call of owner.name kills."""
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments, **named):
        if next(calls) == count:
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, call)


def moments(monkeypatch, path, argv):
    """Runs to the end. -> {what was being done: [copies of the run directory]}: whatever a SIGKILL could leave, before and
    after each change, with lines or a file of weights written in part."""
    found = {}

    def look(what, **more):
        files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        files |= {name: files.get(name, b"") + text for name, text in more.items()}
        folders = [folder.relative_to(path) for folder in path.rglob("*") if folder.is_dir()]
        if "config.json" in files:
            found.setdefault(what, []).append((files, folders))

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*arguments, **named):
            look(f"before {name}")
            result = real(*arguments, **named)
            look(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, call)

    def half_first(owner, name, file_of):
        real = getattr(owner, name)

        def call(*arguments, **named):
            Path(file_of(*arguments)).write_bytes(HALF)
            look(f"half of {name}")
            real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    def write(run, name, lines, anew=False, real=brain.Run.write):
        lines = list(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        for part, size in {"half": len(text) // 2, "no newline": len(text) - 1, "a line": text.find(b"\n") + 1}.items():
            if lines and not anew:
                look(f"{part} of {name}", **{name: text[:size]})
        real(run, name, lines, anew)
        look(f"all of {name}")

    monkeypatch.setattr(brain.Run, "write", write)
    half_first(safetensors.torch, "save_file", lambda weights, file: file)
    half_first(brain, "save_policy", lambda policy, directory: directory / "model.safetensors")
    for owner, name in ((Path, "replace"), (Path, "rename"), (Path, "mkdir"), (brain.shutil, "rmtree"), (brain, "update")):
        watch(owner, name)
    assert brain.main(argv) == 0
    return found


def lay_out(path, moment):
    files, folders = moment
    for folder in (Path(), *folders):
        (path / folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(small_toy, scripted, monkeypatch, tmp_path, capsys):
    """In each kind of moment, well into the run: weights, metrics but for times, samples, outputs and
    checkpoint as in the run that was not killed. Wrong: lines behind the checkpoint kept, or the whole file; a half line read
    or gone on with; half of a prompt's outputs kept; a checkpoint or model/ written in place; AdamW's moments or its count of
    steps lost; the best win-rate forgotten; the samples of a round drawn again, or with the policy of a later moment."""
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        found = moments(patch, path, [*SHORT, "--output-dir", path])
    assert len(found) > 16 and sum(map(len, found.values())) > 100
    assert not any(files.get("model/model.safetensors") == HALF for files, _ in itertools.chain(*found.values()))
    expected = timeless(path)
    best = max(read_lines(path / "metrics.jsonl"), key=lambda line: line.get("win_rate", 0) * (line.get("split") == "validation"))
    assert best["step"] == 3  # in the middle: a run that forgets it keeps a later one
    first_evaluation = found["all of metrics.jsonl"][1:2]  # without a checkpoint: the run starts over
    assert "checkpoint/state.safetensors" not in first_evaluation[0][0]
    kinds = [("first evaluation", first_evaluation), *found.items()]
    for i, (what, states) in enumerate(kinds):
        again = tmp_path / f"{i}"
        lay_out(again, states[len(states) * 2 // 3])
        assert brain.main([*SHORT, "--output-dir", again, "--resume"]) == 0, (what, capsys.readouterr().err)
        same_files(timeless(again), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_killed_again_while_it_resumes(count, small_toy, monkeypatch, tmp_path):
    """Just as it has opened a file to write it anew: metrics.jsonl and samples.jsonl, cut to the checkpoint, then the first
    line. Wrong: a file that is cut in place, and is empty then."""
    assert brain.main([*SHORT, "--output-dir", tmp_path / "whole"]) == 0
    argv, opens = [*SHORT, "--output-dir", tmp_path / "run"], itertools.count(1)
    with monkeypatch.context() as patch:
        killed_at(patch, brain.Run, "log", 7)
        with pytest.raises(Killed):
            brain.main(argv)

    def open_and_die(path, mode="r", *arguments, real=Path.open, **named):
        file = real(path, mode, *arguments, **named)
        if mode in ("w", "a") and next(opens) == count:
            file.close()
            raise Killed
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_and_die)
        with pytest.raises(Killed):
            brain.main([*argv, "--resume"])
    assert brain.main([*argv, "--resume"]) == 0
    same_files(timeless(tmp_path / "run"), timeless(tmp_path / "whole"))


@pytest.mark.parametrize("count", [2, 4, 7])
def test_a_run_killed_amid_prompts_that_were_sampled_together(count, small_toy, monkeypatch, tmp_path):
    """Groups of 3 prompts, the last one smaller; killed within the first, between two, and in the second round. Wrong: a prompt twice,
    one left out, or other groups than before, whose rounding differs."""
    together = [*SHORT, "--prompts-per-iteration", "5", "--outputs-per-forward", "10"]
    assert brain.main([*together, "--output-dir", tmp_path / "whole"]) == 0
    with monkeypatch.context() as patch:
        killed_at(patch, brain.Run, "keep", count)
        with pytest.raises(Killed):
            brain.main([*together, "--output-dir", tmp_path / "run"])
    seen, real = [], brain.collect
    monkeypatch.setattr(brain, "collect", lambda *arguments: (seen.append(arguments[3:6:2]), real(*arguments))[1])
    assert brain.main([*together, "--output-dir", tmp_path / "run", "--resume"]) == 0
    same_files(timeless(tmp_path / "run"), timeless(tmp_path / "whole"))
    sizes = {t: [len(rows) for round_of, rows in seen if round_of == t] for t in (1, 2)}
    assert sizes == {1: {2: [3, 2], 4: [2], 7: []}[count], 2: [3, 2]}


def test_resume_in_a_finished_run_changes_nothing(small_toy, tmp_path, capsys):
    """Exit 0, every byte and time as it was. Wrong: a second line of test, a new model, an error."""
    argv = [*SHORT, "--output-dir", tmp_path / "run"]
    assert brain.main(argv) == 0
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("*") if file.is_file()}
    capsys.readouterr()
    assert brain.main([*argv, "--resume"]) == 0
    assert {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("*") if file.is_file()
    } == before
    assert "finished" in capsys.readouterr().out


def test_what_resume_refuses(small_toy, tmp_path, capsys):
    """Exit 2 and one line: no run there; settings that differ, by name and both values, all of them. What does not change
    numbers may differ. Wrong: a resume with other settings; a new run in a mistyped directory; a refusal because of the
    directory's own name."""
    assert brain.main([*SHORT, "--output-dir", tmp_path / "none", "--resume"]) == 2
    told = capsys.readouterr().err
    assert "--resume" in told and str(tmp_path / "none") in told and told.count("\n") == 1 and not (tmp_path / "none").exists()
    argv = [*SHORT, "--output-dir", tmp_path / "run"]
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, brain, "update", 2)
        with pytest.raises(Killed):
            brain.main(argv)
    before = timeless(tmp_path / "run")
    capsys.readouterr()
    assert brain.main([*argv, "--resume", "--learning-rate", 0.004, "--seed", 7, "--greedy"]) == 2
    told = capsys.readouterr().err
    for words in ("--learning-rate was 0.003, not 0.004", "--seed was 0, not 7", "--greedy was False, not True"):
        assert words in told
    assert "--batch-size" not in told and "--output-dir was" not in told and told.count("\n") == 1
    same_files(timeless(tmp_path / "run"), before)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert brain.main([*SHORT, "--output-dir", tmp_path / "moved", "--resume", "--device", "cpu"]) == 0


def test_ctrl_c(small_toy, monkeypatch, tmp_path, capsys):
    """Exit 130, a line on how to go on, no traceback; and it goes on. Wrong: a traceback, exit 0 or 2."""
    argv = [*SHORT, "--output-dir", tmp_path / "run"]
    update, calls = brain.update, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(brain, "update", interrupted)
    assert brain.main(argv) == 130
    told = capsys.readouterr().err
    assert "--resume" in told and "--output-dir" in told and "Traceback" not in told
    assert brain.main([*argv, "--resume"]) == 0


# ---- warnings, and what is not finite


def drawn(outputs, reward):
    """Samples of one prompt that `look_at` can look at."""
    none = torch.zeros(len(outputs))
    return brain.Samples(1, 0, X, [torch.tensor(y) for y in outputs], [""] * len(outputs), torch.tensor(reward), none, none, none)


VARIED = [[1 + i % 6, 1 + i // 6, 0] for i in range(30)]


@pytest.mark.parametrize(
    "word, samples, silent",
    [
        (
            "--max-new-tokens",
            [drawn([[1, 2], [2, 2]], [0.0, 1.0])] * 2,
            [drawn([[1, 2], [2, 2]], [0.0, 1.0]), drawn([[1, 2], [2, 0]], [0.0, 1.0])],
        ),
        (
            "same reward",
            [drawn(VARIED, [2.0] * 30), drawn(VARIED, [1.0] * 30)],
            [drawn(VARIED, [2.0] * 30), drawn(VARIED, [1.0] * 29 + [1.1])],
        ),
        (
            "outputs are the same",
            [drawn([[1, 0]] * 20, [0.0] * 10 + [1.0] * 10)],
            [drawn([[1, 0]] * 18 + [[2, 0]] * 2, [0.0] * 10 + [1.0] * 10)],
        ),
        (
            "outputs are the same",
            [drawn([[1, 0]] * 18 + [[2, 0]] * 3, [0.0] * 10 + [1.0] * 11)],
            [drawn([[1, 0]] * 19, [0.0] * 10 + [1.0] * 9)],
        ),
    ],
)
def test_warnings_of_a_round(word, samples, silent, tmp_path, capsys):
    """Each when it should, once, alone, on stderr; and not just short of it: one output that ended, one prompt with two
    rewards, a tenth of the outputs different, fewer than 20 outputs. Wrong: any for all, messages swapped, a warning each
    round."""
    run, policy = brain.Run(tmp_path, short_run()), drifted()
    run.look_at(silent, policy)
    assert capsys.readouterr() == ("", "")
    run.look_at(samples, policy)
    run.look_at(samples, policy)
    out, told = capsys.readouterr()
    assert out == "" and told.count("warning") == 1 and word in told and told.count("\n") == 1


def test_warning_of_a_small_effective_sample_size(tmp_path, capsys):
    """After 50 updates on end with alpha's or beta's below 1.25, once; never for pairs. Wrong: the count not set back, a single
    update, the larger of the two, the argmax methods warned of their design."""
    line = dict(step=1, ess_alpha=8.0, ess_beta=8.0)
    low = [dict(step=1, ess_alpha=1.2, ess_beta=8.0), dict(step=1, ess_alpha=8.0, ess_beta=1.2)]
    run = brain.Run(tmp_path, short_run())
    for i in [0] * 49 + [None] + [1] * 49 + [None]:
        run.log(line if i is None else low[i])
    for _ in range(60):
        run.log(dict(step=1, ess_alpha=1.3, ess_beta=1.3))
    assert capsys.readouterr().err == ""
    for i in range(120):
        run.log(low[i % 2])
        assert ("effective sample size" in capsys.readouterr().err) == (i == 49)
    pairs = brain.Run(tmp_path, short_run(method="dpo-sft"))
    for _ in range(60):
        pairs.log(low[0])
    assert capsys.readouterr().err == ""


def test_each_round_is_looked_at(tmp_path, monkeypatch):
    """`train` shows the samples of the round, and only those, before it updates on them. Wrong: D_t, in which old samples hide
    a collapse."""
    seen = []
    monkeypatch.setattr(brain.Run, "look_at", lambda run, samples, policy: seen.append([s.iteration for s in samples]))
    trained(tmp_path, monkeypatch, brain.Policy(tiny(), letters()), short_run(), update=no_update)
    assert seen == [[1] * 3, [2] * 3]


@pytest.mark.parametrize("what", ["loss", "gradient", "metric"])
def test_a_loss_that_is_not_finite_stops_before_the_weights(what, small_toy, monkeypatch, tmp_path, capsys):
    """Exit 2 and one line that names the file with the batch; weights, metrics and checkpoint without that update. Wrong: a
    check after the step, of the loss alone, of nan but not inf, no batch on disk, a NaN in metrics.jsonl."""
    log_prob, policies, calls, before = brain.Policy.log_prob, [], itertools.count(), []

    def poisoned(policy, prompt_ids, outputs, prior=False):
        result = log_prob(policy, prompt_ids, outputs, prior)
        if not result.requires_grad or next(calls) < 6:  # two of a batch: in the fourth update
            return result
        before[:] = before or [{name: p.detach().clone() for name, p in policy.parameters().items()}]
        policies.append(policy)
        if what == "loss":
            return result * math.inf
        if what == "metric":  # the loss does not see it: alpha_hat is 0 there, but the policy's weight of it is nan
            return result
        if len(policies) == 1:  # inf and no nan, in a single weight
            bias = policy.parameters()["transformer.ln_f.bias"]
            bias.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.inf))
        return result

    monkeypatch.setattr(brain.Policy, "log_prob", poisoned)
    if what == "metric":
        monkeypatch.setattr(
            brain, "effective_sample_size", lambda w, real=brain.effective_sample_size: real(w) / (0.0 if policies else 1.0)
        )
    assert brain.main([*SHORT, "--output-dir", tmp_path / "run"]) == 2
    out, told = capsys.readouterr()
    path = tmp_path / "run" / "nonfinite.json"
    last = told.splitlines()[-1]
    assert last.startswith("brain: ") and str(path) in last and "finite" in last and "Traceback" not in told
    assert all(torch.equal(p, before[0][name]) for name, p in policies[0].parameters().items())
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line] == [1, 2, 3]
    written = json.loads(path.read_text())
    assert len(written["batch"]) == 2 and "loss" in written["metrics"]
    stored = read_lines(tmp_path / "run/samples.jsonl")
    for samples in written["batch"]:
        lines = [line for line in stored if line["row"] == samples["row"] and line["output"] in samples["outputs"]]
        assert lines and all(repr(line[name]) in samples[name] for line in lines[:3] for name in brain.CACHED)


# ---- several processes


def test_items_are_shared_out_in_turn(tmp_path, monkeypatch):
    """Item i to process i % W, and all of them to all in order, whatever their number. Wrong: blocks, an item lost at the end
    or done twice."""
    W = 3
    for items in ([], [0], [0, 1, 2], list(range(8))):
        calls = {rank: [] for rank in range(W)}
        runs = [brain.Run(tmp_path, None) for _ in range(W)]

        def gather_object(parts, mine):
            parts[:] = box.pop(0)

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather_object)
        for rank, run in enumerate(runs):
            run.rank, run.processes = rank, W
            box = [[[10 * i] if i < len(items) else [] for i in range(start, start + W)] for start in range(0, len(items), W)]
            shared = run.shared_out(items, lambda i: (calls[rank].append(i), 10 * i)[1], "")
            assert list(shared) == [10 * i for i in items]
        assert calls == {rank: items[rank::W] for rank in range(W)}
    box = [[["a", "d", "f"], ["b", "e"], ["c"]]]
    assert runs[0].gather([]) == ["a", "b", "c", "d", "e", "f"]


PAIR = """
import os, signal, sys
import test_brain, brain
test_brain.toy_world.Toy, brain.HELD_OUT_PROMPTS, brain.EVALUATION_BATCH = test_brain.SmallToy, 2, 1
brain.Run.report = lambda run: (run.path / 'report.png').touch()
place = sys.argv[1]
assert brain.main([*test_brain.SHORT, *test_brain.SHARED["three"], "--output-dir", os.path.join(place, "three")]) == 0
update, steps = brain.update, iter(range(9))
if os.environ["RANK"] == "0":
    brain.update = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == 4 else update(*a)
brain.main([*test_brain.SHORT, *test_brain.SHARED["one"], "--output-dir", os.path.join(place, "one")])
"""
SHARED = {
    "one": ["--batch-size", "1", "--dtype", "float64"],
    "three": ["--batch-size", "3", "--prompts-per-iteration", "3", "--dtype", "float64"],
}


def same_numbers(one, two):
    """Two runs in float64, to rounding: the gradient is a sum in another order, and Adam divides it by its own size."""
    for name in ("samples.jsonl", "metrics.jsonl", "test_outputs.jsonl"):
        for ours, theirs in zip(read_lines(one / name), read_lines(two / name), strict=True):
            ours.pop("time", None), theirs.pop("time", None)
            for key, value in ours.items():
                assert theirs[key] == (pytest.approx(value, rel=1e-6, abs=1e-8) if isinstance(value, float) else value), (name, key)
            assert ours.keys() == theirs.keys()
    weights = [AutoModelForCausalLM.from_pretrained(path / "model", dtype=DOUBLE).state_dict() for path in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-7)
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}


def test_two_processes_are_one(small_toy, monkeypatch, tmp_path):
    """Same samples, outputs and best model, numbers to rounding, one of them writing and speaking; with a batch smaller than
    the number of processes, and one that they cannot share evenly. Where the writer gets a SIGKILL in its fifth update the
    other ends with an error, four lines are on disk, and one process goes on. Wrong: gradients averaged, or not added; a share
    of the batch divided by its own size; both writing; metrics of one's share alone; a wait for ever; lines that wait in a
    buffer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in "01":
        shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1", RANK=rank, LOCAL_RANK=rank)
        argv = [sys.executable, "-c", PAIR, tmp_path / "two"]
        children.append(
            subprocess.Popen(argv, cwd=HERE, env=os.environ | shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        (out, _), (out_of_1, told) = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert children[0].returncode == -signal.SIGKILL, told
    assert children[1].returncode not in (0, 2) and "Error" in told
    assert out.count("update      8  test") == 1 and out_of_1 == "" and "brain: warning" not in told
    lines = brain.Run(tmp_path / "two" / "one", None).lines("metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    monkeypatch.setattr(brain, "EVALUATION_BATCH", 1)
    assert brain.main([*SHORT, *SHARED["one"], "--output-dir", tmp_path / "two" / "one", "--resume"]) == 0
    for name, more in SHARED.items():
        assert brain.main([*SHORT, *more, "--output-dir", tmp_path / name]) == 0
        same_numbers(tmp_path / name, tmp_path / "two" / name)


def test_an_adapter_begins_as_the_seed_says(small_toy, tmp_path):
    """LoRA's A is random: the same for a seed in whatever process, another for another. Wrong: torch's own state, which depends
    on what was loaded or imported before."""
    states = []
    for seed, torch_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(torch_seed)
        arguments = real_run(tmp_path, "--iterations", 0, "--seed", seed, "--output-dir", tmp_path / str(len(states)))
        assert brain.main(arguments) == 0
        states.append((tmp_path / str(len(states)) / "checkpoint/state.safetensors").read_bytes())
    assert states[0] == states[1] != states[2]


def test_a_run_killed_while_it_draws_its_report(monkeypatch, tmp_path):
    """Resuming makes up for it. Wrong: a run that counts as finished without its picture."""
    monkeypatch.setattr(toy_world, "Toy", SmallToy)
    with monkeypatch.context() as patch:
        killed_at(patch, brain.Run, "report", 1)
        with pytest.raises(Killed):
            brain.main([*SHORT, "--output-dir", tmp_path / "run"])
    monkeypatch.setattr(brain.Run, "report", lambda run: (run.path / "report.png").write_bytes(b"drawn"))
    assert brain.main([*SHORT, "--output-dir", tmp_path / "run", "--resume"]) == 0
    assert (tmp_path / "run/report.png").exists()


@pytest.mark.parametrize("more", [["--eval-every", 1], ["--updates-per-iteration", 1], ["--eval-every", 1, "--greedy"]])
def test_diverged_weights_end_in_one_line_where_they_are_first_used(more, small_toy, tmp_path, capsys):
    """A step to weights whose logits are nan, then an evaluation or the next round's sampling before any loss sees it: exit 2,
    no traceback. Wrong: an index out of range from the sampler, or a NaN in metrics.jsonl."""
    assert brain.main([*SHORT, "--learning-rate", 1e30, *more, "--output-dir", tmp_path / "run"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("brain: ") and "--learning-rate" in told


# ------------------------------------------------------------------------------------------
# 9. The command line: what users mistype


def test_what_is_typed_counts_before_companions_and_companions_before_defaults():
    """Wrong: a companion over what was typed; its base and template with another reward model; its pairs with other data."""
    paper = "CarperAI/openai_summarize_tldr_sft"
    s = brain.parse(["--model", paper, "--device", "cpu"])
    assert (s.tokenizer, s.dataset) == ("EleutherAI/gpt-j-6B", "CarperAI/openai_summarize_tldr")
    assert (s.reward_model, s.reward_base) == ("CarperAI/openai_summarize_tldr_rm_checkpoint", paper)
    assert s.reward_template == "<|startoftext|>{prompt}{output}" and s.pairs_dataset == "CarperAI/openai_summarize_comparisons"
    assert (s.max_prompt_tokens, s.max_new_tokens, s.lora_rank, s.lora_alpha, s.samples_per_prompt) == (500, 50, 8, 32, 32)
    s = brain.parse(["--model", paper, "--max_new_tokens", "9", "--lora-rank=0", "--dataset", "d", "--reward-model", "r", "--tokenizer", "t"])
    assert (s.max_new_tokens, s.lora_rank, s.dataset, s.pairs_dataset, s.tokenizer) == (9, 0, "d", None, "t")
    assert (s.reward_model, s.reward_base, s.reward_template) == ("r", None, None)
    s = brain.parse(["--model", paper, "--reward-function", "f.py:f"])
    assert (s.reward_model, s.reward_base, s.reward_template) == (None, None, None)
    assert brain.parse(["--model", paper, "--reward-template", "{output}"]).reward_base == paper
    s = brain.parse(["--model", "timdettmers/qlora-hh-rlhf-7b"])
    assert (s.reward_model, s.reward_base, s.dataset) == ("Dahoas/gptj-rm-static", "EleutherAI/gpt-j-6B", "Dahoas/rm-static")
    assert s.reward_template == "{prompt}{output}<|endoftext|>"
    assert (s.max_prompt_tokens, s.max_new_tokens, s.lora_rank, s.lora_alpha) == (500, 128, 64, 16)


def test_defaults_are_the_papers_where_it_has_them():
    """n = 32, AdamW's settings, LoRA 8 and 32, evaluation each 1000. Wrong: any other."""
    s = brain.parse(["--model", "m", "--dataset", "d", "--reward-model", "r", "--device", "cpu"])
    assert (s.samples_per_prompt, s.learning_rate, s.weight_decay, s.adam_beta1, s.adam_beta2) == (32, 1e-5, 0.1, 0.9, 0.95)
    assert (s.lora_rank, s.lora_alpha, s.eval_every, s.method, s.goodness, s.seed) == (8, 32, 1000, "brain", "bradley-terry", 0)
    assert (s.resume, s.overwrite, s.greedy, s.load_in_4bit, s.dtype, s.device) == (False, False, False, False, "float32", "cpu")
    assert (s.max_prompt_tokens, s.outputs_per_forward, s.output_dir, s.reward_template, s.base_model) == (None,) * 5
    assert s.iterations > 0 and s.prompts_per_iteration > 0 and s.updates_per_iteration > 0 and s.batch_size > 0
    assert brain.parse(["--model", "m", "--dataset", "d", "--reward-model", "r", "--method", "dpo"]).samples_per_prompt == 2
    toy = brain.parse([])
    assert (toy.model, toy.lora_rank, toy.samples_per_prompt, toy.reward_model, toy.dataset) == ("toy", 0, 32, None, None)


def test_every_setting_has_a_flag_with_help(capsys):
    """Both spellings, --flag value and --flag=value. Wrong: a flag that is not in --help, or without a word about it."""
    for field in dataclasses.fields(brain.Settings):
        assert field.metadata["help"]
    with pytest.raises(SystemExit) as stopped:
        brain.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(brain.flag(field.name) in shown for field in dataclasses.fields(brain.Settings))
    for spelled in (["--batch-size", "3"], ["--batch_size", "3"], ["--batch-size=3"], ["--batch_size=3"]):
        assert brain.parse(spelled).batch_size == 3


FUNCTIONS = """
def length(prompts, completions, **columns): return [float(len(text)) for text in completions]
def short(prompts, completions, **columns): return [1.0]
def undefined(prompts, completions, **columns): return [float("nan")] * len(completions)
def failing(prompts, completions, **columns): raise RuntimeError("no such thing")
number = 3
"""
PAIRS = [{"prompt": f"q{i}:", "chosen": "a", "rejected": "b"} for i in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with all that a user has, the good and the bad, and a finished run in it."""
    import datasets

    path = tmp_path_factory.mktemp("place")
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    tokenizer = byte_pairs(*JOINING)
    small = dict(n_embd=16, n_layer=1, n_head=2)
    config = transformers.GPT2Config(**GPT | small, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    causal = randomize(AutoModelForCausalLM.from_config(config))
    for name in ("model", "no-tokenizer", "no-end"):
        causal.save_pretrained(path / name)
    brain.add_adapter(copy.deepcopy(causal), 2, 4).save_pretrained(path / "adapter")
    for name, changes in (("reward", {}), ("two", {"labels": 2}), ("short-reward", {"n_positions": 8})):
        model = classifier("gpt2", tokenizer, **small | changes)
        model.config.pad_token_id = None
        model.float().save_pretrained(path / name)
    for name in ("model", "adapter", "reward", "two", "short-reward"):
        tokenizer.save_pretrained(path / name)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path / "no-end")
    torch.save(model.state_dict(), path / "bare.bin")
    torch.save({"v_head.weight": Code(str(path / "ran"))}, path / "code.bin")
    write_rows(path / "data.jsonl", [{"prompt": f"q{i}:", "label": f"a{i}"} for i in range(6)])
    write_rows(path / "pairs.jsonl", PAIRS)
    write_rows(path / "no-rejected.jsonl", [{"prompt": "q:", "chosen": "a"}] * 6)
    write_rows(path / "no-prompt.jsonl", [{"question": "q:", "label": "a"}] * 6)
    write_rows(path / "numbers.jsonl", [{"prompt": "q:", "label": 1}] * 6)
    write_rows(path / "empty-prompts.jsonl", [{"prompt": " ", "label": "a"}] * 6)
    write_rows(path / "long.jsonl", [{"prompt": "c" * 99, "label": "a"}] * 6)
    write_rows(path / "messages.jsonl", [{"prompt": MESSAGES, "label": "a"}] * 6)
    write_rows(path / "one.jsonl", [{"prompt": "q:", "label": "a"}])
    (path / "broken.jsonl").write_text('{"prompt": "q:", "label": "a"}\n{"prompt": "q:", "label": "a"\n')
    (path / "notes.txt").write_text("notes")
    for name in ("empty", "used", "broken", "no-train"):
        (path / name).mkdir()
    (path / "used" / "notes.txt").write_text("notes")
    write_rows(path / "broken" / "train.jsonl")
    (path / "broken" / "valid.jsonl").write_text("{}\n\n[]\n")
    write_rows(path / "no-train" / "test.jsonl")
    (path / "f.py").write_text(FUNCTIONS)
    here = os.getcwd()
    os.chdir(path)
    try:
        assert brain.main(typed(output_dir="run")) == 0  # so what follows fails for the one thing that is wrong in it
    finally:
        os.chdir(here)
    return path


GOOD = dict(
    model="model", dataset="data.jsonl", reward_model="reward", output_dir="new", iterations=1, prompts_per_iteration=2, batch_size=1,
    samples_per_prompt=4, updates_per_iteration=1, max_new_tokens=4, lora_rank=0, device="cpu",
)  # fmt: skip
FUNCTION = dict(reward_model=None)  # in place of the model
TOY = dict.fromkeys(GOOD)


def typed(*more, **changes):
    """The good command with changes: None takes a flag out, True gives it without a value."""
    return [str(word) for name, value in (GOOD | changes).items() if value is not None
            for word in ([brain.flag(name)] if value is True else [brain.flag(name), value])] + list(more)  # fmt: skip


def tree(path):
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in path.rglob("*") if "__pycache__" not in str(file)}


def refused(place, monkeypatch, capsys, argv, told, own_traceback=False):
    """main(argv) ends in 2 with one or two lines on stderr that hold the texts `told`, and nothing is touched."""
    monkeypatch.chdir(place)
    before = tree(place)
    try:
        code, error = brain.main(argv), capsys.readouterr().err
    finally:
        after = tree(place)
        put_back(place, before, after)  # so that one failure is not followed by others
    assert code == 2
    if own_traceback:  # the user's, before our line
        assert error.startswith("Traceback")
        error = error[error.rindex("brain: ") :]
    assert "Traceback" not in error and error.startswith("brain: ") and error.endswith("\n") and error.count("\n") <= 2
    for text in told:
        assert text in error, error
    assert set(after) == set(before), "something new appeared, or is gone"
    assert after == before


def put_back(place, before, after):
    for file in sorted(set(after) - set(before), reverse=True):
        (place / file).rmdir() if after[file] is None else (place / file).unlink()
    for file in sorted(before):
        if before[file] is None:
            (place / file).mkdir(exist_ok=True)
        elif before[file] != after.get(file):
            (place / file).write_bytes(before[file])


BAD = {
    # numbers out of range
    "one output": (typed(samples_per_prompt=1), "--samples-per-prompt 1:", "at least 2", "D_1", "Theorem 4.3"),
    "one output in the toy": (["--samples-per-prompt", "1"], "--samples-per-prompt 1:", "at least 2", "Theorem 4.3"),
    "no outputs": (typed(samples_per_prompt=0), "--samples-per-prompt 0:", "at least 2"),
    "half an output": (typed(samples_per_prompt=2.5), "--samples-per-prompt", "2.5", "--help"),
    "negative seed": (typed(seed=-1), "--seed -1:", "at least 0"),
    "negative rounds": (typed(iterations=-1), "--iterations -1:", "at least 0"),
    "no prompts": (typed(prompts_per_iteration=0), "--prompts-per-iteration 0:", "at least 1"),
    "no updates": (typed(updates_per_iteration=0), "--updates-per-iteration 0:", "at least 1", ),
    "no batch": (typed(batch_size=0), "--batch-size 0:", "at least 1"),
    "no prompt tokens": (typed(max_prompt_tokens=0), "--max-prompt-tokens 0:", "at least 1"),
    "no new tokens": (typed(max_new_tokens=0), "--max-new-tokens 0:", "at least 1"),
    "rate 0": (typed(learning_rate=0), "--learning-rate", "above 0", "--iterations 0"),
    "rate nan": (typed(learning_rate="nan"), "--learning-rate nan:", "must be"),
    "rate inf": (typed(learning_rate="inf"), "--learning-rate inf:", "must be"),
    "rate negative": (typed(learning_rate=-1), "--learning-rate -1", "at least 0"),
    "rate text": (typed(learning_rate="1e-5x"), "--learning-rate", "1e-5x", "--help"),
    "decay negative": (typed(weight_decay=-0.1), "--weight-decay -0.1:", "at least 0"),
    "decay nan": (typed(weight_decay="nan"), "--weight-decay nan:", "must be"),
    "beta1 of 1": (typed(adam_beta1=1), "--adam-beta1 1", "at least 0 and below 1"),
    "beta2 above 1": (typed(adam_beta2=95), "--adam-beta2 95", "at least 0 and below 1"),
    "beta2 nan": (typed(adam_beta2="nan"), "--adam-beta2 nan:", "below 1"),
    "rank negative": (typed(lora_rank=-1), "--lora-rank -1:", "at least 0"),
    "alpha 0": (typed(lora_alpha=0), "--lora-alpha 0:", "at least 1"),
    "no outputs per forward": (typed(outputs_per_forward=0), "--outputs-per-forward 0:", "at least 1"),
    "negative evaluation": (typed(eval_prompts=-1), "--eval-prompts -1:", "at least 0"),
    "evaluation each 0": (typed(eval_every=0), "--eval-every 0:", "at least 1"),
    "odd pairs": (typed(method="dpo-sft", samples_per_prompt=3), "--samples-per-prompt 3:", "dpo-sft", "even"),
    "odd pairs of rso": (typed(method="rso", samples_per_prompt=5), "--samples-per-prompt 5:", "rso", "even"),
    "n for human pairs": (typed(method="dpo", dataset="pairs.jsonl"), "--samples-per-prompt 4:", "dpo", "leave it out"),
    # words
    "flag mistyped": (typed("--smaples-per-prompt", "4"), "--smaples-per-prompt:", "--samples-per-prompt?"),
    "flag mistyped, with =": (typed("--learning_rat=3"), "--learning_rat=3:", "--learning-rate?"),
    "flag cut short": (typed("--max-new", "3"), "--max-new:", "--help"),
    "flag unknown": (typed("--zzz"), "--zzz:", "--help"),
    "a word too many": (typed("model"), "model:", "--help"),
    "value missing": (typed("--seed"), "--seed", "argument", "--help"),
    "method mistyped": (typed(method="brian"), "--method brian:", "brain?", "dpo-sft+iw+n"),
    "method unknown": (typed(method="ppo"), "--method ppo:", "brain-no-baseline", "rso"),
    "goodness unknown": (typed(goodness="sigmoid"), "--goodness sigmoid:", "bradley-terry", "logistic"),
    "dtype unknown": (typed(dtype="fp16"), "--dtype fp16:", "bfloat16", "float32"),
    "device unknown": (typed(device="gpu"), "--device gpu:", "cpu", "cuda"),
    "device mistyped": (typed(device="cuda:x"), "--device cuda:x:", "cpu"),
    # models
    "no such model": (typed(model="nosuch"), "--model nosuch:", "hub name"),
    "no such directory": (typed(model="./no/such/model"), "--model ./no/such/model:", "directory"),
    "no such hub name": (typed(model="owner/nosuch"), "--model owner/nosuch:", "hub name"),
    "empty directory": (typed(model="empty"), "--model empty:"),
    "no tokenizer": (typed(model="no-tokenizer"), "--model no-tokenizer:", "--tokenizer"),
    "no end token": (typed(model="no-end"), "--model no-end:", "end token"),
    "no room": (typed(max_new_tokens=64), "--max-new-tokens 64:", "64", "lower it"),
    "far too long": (typed(max_new_tokens=9999), "--max-new-tokens 9999:", "64", "lower it"),
    "base of no adapter": (typed(base_model="model"), "--base-model:", "model is not an adapter"),
    "no such base": (typed(model="adapter", base_model="nosuch"), "--base-model nosuch:", "hub name"),
    "adapter without base": (typed(model="adapter"), "--model adapter:", "--base-model"),
    "rank not the adapter's": (typed(model="adapter", base_model="model", lora_rank=8), "--lora-rank 8:", "adapter", "has 2", "leave it out"),
    "alpha not the adapter's": (typed(model="adapter", base_model="model", lora_rank=2, lora_alpha=8), "--lora-alpha 8:", "has 4"),
    "4 bits on a CPU": (typed(load_in_4bit=True, lora_rank=8), "--load-in-4bit:", "GPU", "leave it out"),
    # rewards
    "no reward": (typed(reward_model=None), "--reward-model", "--reward-function"),
    "two rewards": (typed(reward_function="f.py:length"), "--reward-model", "--reward-function", "not both"),
    "no such reward model": (typed(reward_model="nosuch"), "--reward-model nosuch:", "hub name"),
    "two labels": (typed(reward_model="two"), "--reward-model two:", "2 labels"),
    "a causal model as reward": (typed(reward_model="model"), "--reward-model model:", "score.weight"),
    "no base for weights alone": (typed(reward_model="bare.bin"), "--reward-model bare.bin:", "--reward-base"),
    "another base": (typed(reward_model="bare.bin", reward_base="model"), "--reward-model bare.bin:", "mismatched", "--reward-base"),
    "no such reward base": (typed(reward_model="bare.bin", reward_base="nosuch"), "--reward-base nosuch:"),
    "code in weights": (typed(reward_model="code.bin", reward_base="model"), "--reward-model code.bin:", "code", "another checkpoint"),
    "template without output": (typed(reward_template="{prompt}"), "--reward-template {prompt}:", "{output}"),
    "template with attributes": (typed(reward_template="{prompt.__class__}{output}"), "--reward-template", "{output}", "no other braces"),
    "template with empty braces": (typed(reward_template="{}{output}"), "--reward-template", "no other braces"),
    "no such file": (typed(reward_function="g.py:f", **FUNCTION), "--reward-function g.py:f:", "file.py:name"),
    "no such function": (typed(reward_function="f.py:lenght", **FUNCTION), "--reward-function f.py:lenght:", "no function lenght"),
    "no function at all": (typed(reward_function="f.py:number", **FUNCTION), "--reward-function f.py:number:", "no function number"),
    "file without function": (typed(reward_function="f.py", **FUNCTION), "--reward-function f.py:", "file.py:name"),
    # data
    "no data": (typed(dataset=None), "--dataset:", ".jsonl", ".csv"),
    "no such data": (typed(dataset="nosuch.jsonl"), "--dataset nosuch.jsonl:", "file"),
    "no such data directory": (typed(dataset="/no/such/place"), "--dataset /no/such/place:", "directory"),
    "no such data on the hub": (typed(dataset="owner/nosuch"), "--dataset owner/nosuch:", "hub name"),
    "empty data directory": (typed(dataset="empty"), "--dataset empty:"),
    "data of unknown kind": (typed(dataset="notes.txt"), "--dataset notes.txt:", ".jsonl", ".parquet", ".csv"),
    "no train split": (typed(dataset="no-train"), "--dataset no-train:", "split train is missing", "train.jsonl"),
    "one row": (typed(dataset="one.jsonl"), "--dataset one.jsonl:", "too few rows"),
    "broken line": (typed(dataset="broken.jsonl"), "broken.jsonl:2:", "JSON", "remove"),
    "broken line of a directory": (typed(dataset="broken"), "broken/valid.jsonl:3:", "JSON"),
    "no column prompt": (typed(dataset="no-prompt.jsonl"), "--dataset no-prompt.jsonl:", "'prompt'", "question, label", "rename"),
    "label of integers": (typed(dataset="numbers.jsonl"), "--dataset numbers.jsonl:", "row ", "'label'", "text", "not 1"),
    "empty prompts": (typed(dataset="empty-prompts.jsonl"), "--dataset empty-prompts.jsonl:", "row ", "'prompt'", "text", "' '"),
    "prompts too long": (typed(dataset="long.jsonl"), "--dataset long.jsonl:", "60 tokens", "--max-prompt-tokens", "--max-new-tokens"),
    "messages without chat template": (typed(dataset="messages.jsonl"), "--model model:", "chat template"),
    "pairs without rejected": (typed(method="dpo", dataset="no-rejected.jsonl", samples_per_prompt=None), "--dataset no-rejected.jsonl:", "'rejected'", "prompt, chosen"),
    # directories
    "a run is there": (typed(output_dir="run"), "--output-dir run:", "--resume", "--overwrite"),
    "other files are there": (typed(output_dir="used"), "--output-dir used:", "other files"),
    "other files, though --overwrite": (typed(output_dir="used", overwrite=True), "--output-dir used:", "other files"),
    "a file is there": (typed(output_dir="notes.txt"), "--output-dir notes.txt:"),
    "resume and overwrite": (typed(output_dir="run", resume=True, overwrite=True), "--resume", "--overwrite"),
    "resume what": (typed(output_dir=None, resume=True), "--resume:", "--output-dir"),
    "resume nothing": (typed(output_dir="nosuch", resume=True), "--resume:", "nosuch"),
    "resume other files": (typed(output_dir="used", resume=True), "--resume:", "used"),
    "resume with another seed": (typed(output_dir="run", resume=True, seed=1), "--resume:", "--seed was 0, not 1", "--output-dir"),
    "resume with two changes": (typed(output_dir="run", resume=True, batch_size=2, method="rso"), "--batch-size was 1, not 2", "--method was brain, not rso"),
    # the toy world
    "data in the toy": (["--dataset", "data.jsonl"], "--dataset:", "toy", "--model"),
    "reward in the toy": (["--reward-model", "reward"], "--reward-model:", "toy", "--model"),
    "adapter in the toy": (["--lora-rank", "8"], "--lora-rank:", "toy", "--model"),
    "4 bits in the toy": (["--load-in-4bit"], "--load-in-4bit:", "leave it out"),
    "template in the toy": (["--reward-template", "{output}"], "--reward-template:", "toy"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, place, monkeypatch, capsys):
    """Exit code 2, one or two lines that name the flag (or file and line) and a mend, no traceback, nothing touched. Wrong: a check left
    out or after the directory is made, another flag's name, --overwrite of what is no run, settings changed under a run."""
    argv, *told = BAD[name]
    refused(place, monkeypatch, capsys, argv, told)
    assert not (place / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(place, monkeypatch, capsys):
    """Wrong: torch's own error, once everything is loaded."""
    refused(place, monkeypatch, capsys, typed(device="cuda"), ["--device cuda:", "no such GPU", "--device cpu"])


def test_every_number_has_its_range():
    """Wrong: a new setting that takes any number at all."""
    for field in dataclasses.fields(brain.Settings):
        if field.type in ("int", "float", "int | None", "float | None"):
            with pytest.raises(brain.UserError, match=f"{brain.flag(field.name)} -1"):
                brain.parse([brain.flag(field.name), "-1"])


def test_what_a_users_function_prints_comes_before_our_line(place, monkeypatch, capsys):
    """Exit code 2; its traceback where it raised. Wrong: exit code 1; our own frames behind its message."""
    monkeypatch.chdir(place)
    for name, told in (("failing", "raised"), ("undefined", "finite numbers"), ("short", "finite numbers")):
        shutil.rmtree("failed", ignore_errors=True)
        assert brain.main(typed(reward_function=f"f.py:{name}", output_dir="failed", **FUNCTION)) == 2
        shown = capsys.readouterr().err
        assert shown.splitlines()[-1].startswith(f"brain: --reward-function f.py:{name}: ") and told in shown.splitlines()[-1]
        assert ("Traceback" in shown and "no such thing" in shown) == (name == "failing")
    shutil.rmtree("failed", ignore_errors=True)


def test_a_reward_model_of_another_context_says_so(place, monkeypatch, capsys):
    """Wrong: an index out of range in an embedding."""
    monkeypatch.chdir(place)
    assert brain.main(typed(reward_model="short-reward", output_dir="failed", dataset="pairs.jsonl", max_new_tokens=9)) == 2
    assert re.search(r"^brain: --reward-model: .* in a context of 8; lower --max-prompt-tokens", capsys.readouterr().err)
    shutil.rmtree("failed", ignore_errors=True)


def test_a_run_directory_may_be_empty_resumed_or_overwritten(place, monkeypatch, capsys):
    """What must not be refused. Wrong: an empty directory refused; a device or the directory's own name that keeps from resuming;
    files of the user gone with --overwrite; a run that is finished started again."""
    monkeypatch.chdir(place)
    before = tree(place / "run")
    assert brain.main(typed(output_dir=str(place / "run"), resume=True)) == 0
    assert "finished" in capsys.readouterr().out and tree(place / "run") == before
    monkeypatch.setattr(brain, "train", lambda *given: (_ for _ in ()).throw(brain.UserError("far enough")))
    (place / "empty-run").mkdir()
    (place / "old").mkdir()
    (place / "old" / "notes.txt").write_text("notes")
    for file in before:
        if before[file] is not None:
            (place / "old" / file).parent.mkdir(exist_ok=True, parents=True)
            (place / "old" / file).write_bytes(before[file])
    for argv in (typed(output_dir="empty-run"), typed(output_dir="old", overwrite=True)):
        assert brain.main(argv) == 2 and capsys.readouterr().err == "brain: far enough\n"
    assert {file for file in tree(place / "empty-run")} == {"config.json"}
    assert set(tree(place / "old")) == {"config.json", "notes.txt"}
    assert json.loads((place / "old" / "config.json").read_text())["command"].startswith("python brain.py --model model")
    for name in ("empty-run", "old"):
        shutil.rmtree(place / name)


# ------------------------------------------------------------------------------------------
# 9. The command line. First what its tests run on: tokenizers trained on the spot, tiny models under any name


def trained_tokenizer(texts, size=8, **more):
    """Byte-level BPE like GPT-2's, with `<|endoftext|>` as id 0; with a small `size`, one token per letter of the texts."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.train_from_iterator([*texts, "a"], trainer)
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, **more)


def loud(model, seed, scale=0.3):
    """Weights large enough that outputs and scores differ by much."""
    random_numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=scale, generator=random_numbers) if p.dim() > 1 else None
    return model.float().eval()


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_hub(home, kind, name):
    """The directory of a repository's only snapshot, in a hub cache laid out by hand."""
    place = home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    for part in ("refs", f"snapshots/{'0' * 40}"):
        (place / part).mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    return place / f"snapshots/{'0' * 40}"


def old_buffers(layers, size):
    """What checkpoints of older transformers hold beside the weights."""
    causal = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
    return {f"transformer.h.{i}.attn.{name}": value for i in range(layers) for name, value in (("bias", causal), ("masked_bias", torch.tensor(-1e9)))}


def bare_reward(config, path, seed):
    """A reward model as one file, in half precision: decoder, `v_head`, old buffers."""
    decoder = loud(transformers.GPTJModel(config), seed)
    weights = {f"transformer.{name}": w.half() for name, w in decoder.state_dict().items()} | old_buffers(config.n_layer, 8)
    torch.save(weights | {"v_head.weight": random(1, config.n_embd, seed=seed).half()}, path)


def score_by_hand(config, path, ids):
    """The score of a bare reward model at the last of these ids, sharing no code with brain.py."""
    weights = torch.load(path, weights_only=True)
    decoder = transformers.GPTJModel(config).float().eval()
    decoder.load_state_dict({name: weights[f"transformer.{name}"].float() for name in decoder.state_dict()})
    with torch.no_grad():
        return [(decoder(torch.tensor([row])).last_hidden_state[0, -1] @ weights["v_head.weight"][0].float()).item() for row in ids]


SFT, SFT_REWARD, GPTJ = "CarperAI/openai_summarize_tldr_sft", "CarperAI/openai_summarize_tldr_rm_checkpoint", "EleutherAI/gpt-j-6B"
HH, HH_REWARD, LLAMA_7B = "timdettmers/qlora-hh-rlhf-7b", "Dahoas/gptj-rm-static", "huggyllama/llama-7b"
ANIMALS = "cat dog cow hen pig fox owl bee ant elk".split()
POSTS = [f"SUBREDDIT: r/{a}s\nPOST: my {a} ate the {b} of a {c}" for a, b, c in zip(ANIMALS, ANIMALS[3:] * 2, ANIMALS[5:] * 2)]
SUMMARIES = [f"{a} ate {b}" for a, b in zip(ANIMALS, ANIMALS[3:] * 2)]
CHATS = [f"\n\nHuman: is the {a} a pet?\n\nAssistant:" for a in ANIMALS]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """HF_HOME with the paper's artifacts: the real names and files, tiny weights."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("hub")
    words = trained_tokenizer([*POSTS, *SUMMARIES, *CHATS, "TL;DR: <|startoftext|>"], 120)
    end, known = words.eos_token_id, len(words)
    config = transformers.GPTJConfig(**GPT | dict(n_positions=1000, rotary_dim=4), vocab_size=known + 9, bos_token_id=end, eos_token_id=end)
    assert config.n_layer == 2 and known > 80

    sft = in_hub(home, "model", SFT)  # no tokenizer here
    config.save_pretrained(sft)
    torch.save(loud(transformers.GPTJForCausalLM(config), 1, 0.2).state_dict() | old_buffers(2, 8), sft / "pytorch_model.bin")
    bare_reward(config, in_hub(home, "model", SFT_REWARD) / "pytorch_model.bin", 2)
    gptj = in_hub(home, "model", GPTJ)  # config and tokenizer, no weights: those of 6B are not wanted
    config.save_pretrained(gptj)
    words.save_pretrained(gptj)
    bare_reward(config, in_hub(home, "model", HH_REWARD) / "hf_ckpt.pt", 3)

    llama = in_hub(home, "model", LLAMA_7B)
    llama_config = transformers.LlamaConfig(**LLAMA | dict(max_position_embeddings=200), vocab_size=known, bos_token_id=end, eos_token_id=end)
    model = loud(transformers.LlamaForCausalLM(llama_config), 4, 0.2)
    model.save_pretrained(llama)
    words.save_pretrained(llama)
    adapter = in_hub(home, "model", HH)
    lora = LoraConfig(r=64, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    model = loud(get_peft_model(model, lora), 5, 0.2)
    lora.base_model_name_or_path = LLAMA_7B
    lora.save_pretrained(adapter)
    names = {name: w for name, w in model.state_dict().items() if "lora_" in name}
    torch.save({name.replace(".default.", "."): w for name, w in names.items()}, adapter / "adapter_model.bin")

    def parquet(name, **splits):
        data = in_hub(home, "dataset", name) / "data"
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(data / f"{split}-00000-of-00001-0123456789abcdef.parquet")

    tldr = [{"prompt": post + "\nTL;DR:", "label": " " + text} for post, text in zip(POSTS, SUMMARIES)]
    parquet("CarperAI/openai_summarize_tldr", train=tldr[:6], valid=tldr[6:8], test=tldr[8:])
    pairs = zip(POSTS, SUMMARIES, SUMMARIES[::-1])
    pairs = [{"prompt": post, "chosen": f"TL;DR: {good}", "rejected": f"TL;DR: {bad}"} for post, good, bad in pairs]
    parquet("CarperAI/openai_summarize_comparisons", train=pairs[:6], test=pairs[6:8], valid1=pairs[8:9], valid2=pairs[9:])
    chats = [{"prompt": chat, "response": " yes", "chosen": " yes", "rejected": " no"} for chat in CHATS]
    parquet("Dahoas/rm-static", train=chats[:8], test=chats[8:])
    return home


@contextlib.contextmanager
def at_hub(home):
    """This process, with that hub cache."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield


def repository(home, name):
    return home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)


def command(arguments, place, home, program=HERE / "brain.py"):
    """The command line in a process of its own: in the empty directory place/cwd, with its own home and temporary directory."""
    for name in ("cwd", "home", "tmp"):
        (place / name).mkdir()
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "MPL", "XDG_"))}
    mine |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
    mine |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, program, *map(str, arguments)]
    return subprocess.run(words, cwd=place / "cwd", env=mine, capture_output=True, text=True, timeout=500)


SMALL = "--iterations 1 --prompts-per-iteration 4 --updates-per-iteration 2 --batch-size 3 --samples-per-prompt 5".split()
RUN_DIRECTORY = {"config.json", "metrics.jsonl", "samples.jsonl", "model", "test_outputs.jsonl", "report.png", "checkpoint"}


def by_prompt(samples):
    """The lines of samples.jsonl as lists of one prompt each, and alpha_hat recomputed for each."""
    groups = [list(lines) for _, lines in itertools.groupby(samples, lambda line: (line["iteration"], line["row"]))]
    return [(lines, softmax([line["log_p"] - line["log_q_proposal"] + line["reward"] for line in lines])) for lines in groups]


def starts_at_the_prior(run, n):
    """In round 1 q' = p, to the last digit, and at update 1 q_theta = p: beta_hat = 1/n."""
    lines = json_lines(run / "samples.jsonl")
    assert all(line["log_q_proposal"] == line["log_p"] for line in lines if line["iteration"] == 1) and lines
    first = next(line for line in json_lines(run / "metrics.jsonl") if line["step"] == 1)
    assert first["kl_to_prior"] == pytest.approx(0, abs=1e-6) and first["ess_beta"] == pytest.approx(n, rel=1e-6)
    before = next(line for line in json_lines(run / "metrics.jsonl") if line["step"] == 0)
    assert before["kl_to_prior"] == pytest.approx(0, abs=1e-4)  # the sampler's own sum against a padded forward, in float32


# ---- the paper's summarisation, by its own command


@pytest.fixture(scope="module")
def summarisation(hub, tmp_path_factory):
    """`python brain.py --model CarperAI/openai_summarize_tldr_sft`, with flags that make it small. -> (process, place, before)"""
    place = tmp_path_factory.mktemp("summarisation")
    before = {path for path in hub.rglob("*")}
    return command(["--model", SFT, *SMALL, "--output-dir", place / "run"], place, hub), place, before


def test_the_papers_summarisation_command(summarisation):
    """Every companion is found, used and recorded; what was not typed is the paper's. Wrong: a companion lost or another's, 500
    or 50 forgotten, a default for a companion, a file of the run directory missing, the plan after the loading."""
    process, place, _ = summarisation
    assert process.returncode == 0, process.stderr
    assert "brain:" not in process.stderr and "Traceback" not in process.stderr
    assert {path.name for path in (place / "run").iterdir()} == RUN_DIRECTORY
    config = json.loads((place / "run/config.json").read_text())
    settings = DEFAULTS | {
        "model": SFT, "tokenizer": GPTJ, "reward_model": SFT_REWARD, "reward_base": SFT, "dataset": "CarperAI/openai_summarize_tldr",
        "reward_template": "<|startoftext|>{prompt}{output}", "pairs_dataset": "CarperAI/openai_summarize_comparisons",
        "max_prompt_tokens": 500, "max_new_tokens": 50, "lora_rank": 8, "lora_alpha": 32, "output_dir": str(place / "run"),
        "iterations": 1, "prompts_per_iteration": 4, "updates_per_iteration": 2, "batch_size": 3, "samples_per_prompt": 5,
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    if not torch.cuda.is_available():
        assert {name: config[name] for name in settings} == settings
    made = {name: value for name, value in config.items() if name not in settings}
    assert set(made) == {"command", "commit", "python", "torch", "transformers", "numpy", "machine"}
    assert made["command"] == " ".join(["python brain.py --model", SFT, *SMALL, "--output-dir", str(place / "run")])
    assert made["torch"] == torch.__version__ and made["transformers"] == transformers.__version__ and made["numpy"] == np.__version__
    assert made["python"] == platform.python_version() and made["machine"]
    assert made["commit"] is None or re.fullmatch("[0-9a-f]{40}", made["commit"])
    lines = process.stdout.splitlines()
    assert lines[0] == "brain on CarperAI/openai_summarize_tldr: 1 rounds of 4 prompts x 5 outputs = 20 samples; 1 x 2 updates of 3 prompts"
    assert [line for line in lines if line.endswith("prompts")][-3:] == ["train: 6 prompts", "validation: 2 prompts", "test: 2 prompts"]
    steps = [(line["step"], line.get("split")) for line in json_lines(place / "run/metrics.jsonl")]
    assert steps == [(0, "validation"), (1, None), (2, None), (2, "validation"), (2, "test")]
    told = [line for line in lines if line.startswith("update ")]
    assert [line.split()[1:3] for line in told] == [["0", "validation"], ["2", "validation"], ["2", "test"]]
    for path in (place / "run/report.png",):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_rewards_of_the_papers_reward_model(summarisation, hub):
    """`<|startoftext|>` in front, no end token, the score at the last token; gold answers alike. Wrong: another template, another
    token, the head's name, half precision, alpha_hat of other rewards."""
    _, place, _ = summarisation
    words = transformers.AutoTokenizer.from_pretrained(repository(hub, GPTJ))
    config = transformers.GPTJConfig.from_pretrained(repository(hub, SFT))
    samples, tests = json_lines(place / "run/samples.jsonl"), json_lines(place / "run/test_outputs.jsonl")
    texts = [(line["prompt"] + line["output"], line["reward"]) for line in samples + tests]
    texts += [(line["prompt"] + line["gold"], line["gold_reward"]) for line in tests]
    ids = [words("<|startoftext|>" + text).input_ids for text, _ in texts]
    expected = score_by_hand(config, repository(hub, SFT_REWARD) / "pytorch_model.bin", ids)
    assert [reward for _, reward in texts] == pytest.approx(expected, abs=1e-4)  # float32, prompts encoded once
    assert np.std(expected) > 0.1
    groups = by_prompt(samples)
    assert [len(lines) for lines, _ in groups] == [5] * 4 and len({lines[0]["row"] for lines, _ in groups}) == 4
    for lines, alpha_hat in groups:
        assert [line["alpha_hat"] for line in lines] == pytest.approx(alpha_hat.tolist(), abs=1e-6)
    assert [line["gold"] for line in tests] == [" " + text for text in SUMMARIES[8:]]
    assert [line["prompt"] for line in tests] == [post + "\nTL;DR:" for post in POSTS[8:]]


def test_the_papers_policy_starts_at_its_prior(summarisation, hub):
    """log p is that of the SFT model over the tokenizer's ids; q' = q_theta = p at first. Wrong: p or q' over all 9 logits more than
    tokens, an id drawn that no token has, an adapter that is not zero at first."""
    _, place, _ = summarisation
    starts_at_the_prior(place / "run", 5)
    words = transformers.AutoTokenizer.from_pretrained(repository(hub, GPTJ))
    model = AutoModelForCausalLM.from_pretrained(repository(hub, SFT)).eval()
    assert model.config.vocab_size == len(words) + 9
    for line in json_lines(place / "run/samples.jsonl"):
        prompt, output = torch.tensor(words(line["prompt"]).input_ids), torch.tensor(line["output_ids"])
        assert output.max() < len(words) and len(output) <= 50
        assert line["output"] == words.decode(output[: len(output) - int(output[-1] == 0)])
        with torch.no_grad():
            assert line["log_p"] == pytest.approx(plain(model, prompt, output, len(words)).item(), abs=2e-3)  # 50 tokens, float32


def test_nothing_is_written_elsewhere(summarisation, hub):
    """Beside the output directory: the data library's cache in HF_HOME and matplotlib's list of fonts, nothing more. Wrong: a log, a
    model cache or a temporary file left in the working directory, the home or the temporary directory."""
    process, place, before = summarisation
    assert process.returncode == 0
    assert {path.name for path in place.iterdir()} == {"cwd", "home", "tmp", "run"}
    assert list((place / "cwd").iterdir()) == []
    own = [path for path in (place / "home").rglob("*") if path.is_file()] + list((place / "tmp").rglob("*"))
    assert [path for path in own if "matplotlib" not in str(path)] == []
    new = {path.relative_to(hub).parts[0] for path in hub.rglob("*") if path not in before}
    assert new <= {"datasets", "modules", "xet"}, new
    assert not [path for path in hub.rglob("*.py")]


def test_an_adapter_is_loaded_by_peft_alone(summarisation, hub):
    """Wrong: an adapter saved without its config or under other names, another rank, alpha or base."""
    from peft import PeftModel

    _, place, _ = summarisation
    base = AutoModelForCausalLM.from_pretrained(repository(hub, SFT))
    config = json.loads((place / "run/model/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["task_type"]) == (8, 32, 0.0, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == SFT
    loaded = PeftModel.from_pretrained(base, place / "run/model")
    saved = safetensors.torch.load_file(place / "run/model/adapter_model.safetensors")
    theirs = {name.replace(".default.", "."): w for name, w in loaded.state_dict().items() if "lora_" in name}
    assert theirs.keys() == saved.keys() and all(torch.equal(w, saved[name]) for name, w in theirs.items())
    assert transformers.AutoTokenizer.from_pretrained(place / "run/model").eos_token == "<|endoftext|>"


# ---- human pairs


@pytest.fixture(scope="module")
def human_pairs(hub, tmp_path_factory):
    run = tmp_path_factory.mktemp("dpo") / "run"
    with at_hub(hub):
        small = SMALL[: SMALL.index("--samples-per-prompt")]
        assert brain.main(["--model", SFT, "--method", "dpo", *small, "--max-new-tokens", "9", "--output-dir", run]) == 0
    return run


def test_human_pairs(human_pairs, hub):
    """`--method dpo` on openai_summarize_comparisons: the cue ends the prompt and leaves the answers, the chosen one comes first,
    an end token behind each. Wrong: the cue twice or lost, rejected before chosen, no end token, n = 32, pairs for the evaluation."""
    words = transformers.AutoTokenizer.from_pretrained(repository(hub, GPTJ))
    config, metrics = json.loads((human_pairs / "config.json").read_text()), json_lines(human_pairs / "metrics.jsonl")
    assert (config["samples_per_prompt"], config["method"]) == (2, "dpo") and config["pairs_dataset"] == "CarperAI/openai_summarize_comparisons"
    for lines, _ in by_prompt(json_lines(human_pairs / "samples.jsonl")):
        row = lines[0]["row"]
        assert lines[0]["prompt"] == lines[1]["prompt"] == POSTS[row] + "\nTL;DR:"
        for line, text in zip(lines, (SUMMARIES[row], SUMMARIES[::-1][row])):
            ids = words(" " + text).input_ids
            assert line["output_ids"] == (ids + [0])[:9] and (" " + text).startswith(line["output"]) and line["output"]
        assert [line["alpha_hat"] for line in lines] == [1, 0]
    starts_at_the_prior(human_pairs, 2)
    first = next(line for line in metrics if line["step"] == 1)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["ess_alpha"] == 1 and first["max_weight"] == 1
    assert [line["prompt"] for line in json_lines(human_pairs / "test_outputs.jsonl")] == [post + "\nTL;DR:" for post in POSTS[8:]]


# ---- the paper's dialogue


@pytest.fixture(scope="module")
def dialogue(hub, tmp_path_factory):
    """The command for dialogue on a machine without a GPU. -> (run, output)"""
    run, told = tmp_path_factory.mktemp("dialogue") / "run", io.StringIO()
    with at_hub(hub), contextlib.redirect_stdout(told):
        arguments = ["--model", HH, *SMALL, "--learning-rate", "0.003", "--max-new-tokens", "12", "--greedy", "--output-dir", run]
        assert brain.main(arguments) == 0
    return run, told.getvalue()


def test_the_papers_dialogue_command(dialogue, hub):
    """The prior is the base with the adapter, the policy a second one of its rank and alpha; 500 is cut to what the context leaves; the
    reward is read at the end token. Wrong: p from the base alone, rank 8, dropout, the first end token's place, the base's name."""
    run, told = dialogue
    config = json.loads((run / "config.json").read_text())
    expected = {
        "reward_model": HH_REWARD, "reward_base": GPTJ, "reward_template": "{prompt}{output}<|endoftext|>", "dataset": "Dahoas/rm-static",
        "lora_rank": 64, "lora_alpha": 16, "max_new_tokens": 12, "max_prompt_tokens": 200 - 12, "tokenizer": None, "pairs_dataset": None,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "validation: not in the data; 1 rows of train are held out for it" in told and "test: 2 prompts" in told
    lines = json_lines(run / "samples.jsonl")
    assert all(line["log_q_proposal"] == line["log_p"] for line in lines)
    first = next(line for line in json_lines(run / "metrics.jsonl") if line["step"] == 1)
    assert first["kl_to_prior"] == pytest.approx(0, abs=1e-6) and first["ess_beta"] == pytest.approx(5, rel=1e-6)
    assert not any("kl_to_prior" in line for line in json_lines(run / "metrics.jsonl") if "split" in line)  # greedy
    words = transformers.AutoTokenizer.from_pretrained(repository(hub, LLAMA_7B))
    gptj = transformers.GPTJConfig.from_pretrained(repository(hub, GPTJ))
    ids = [words(line["prompt"] + line["output"] + "<|endoftext|>").input_ids for line in lines]
    assert all(row[-1] == 0 for row in ids)
    rewards = score_by_hand(gptj, repository(hub, HH_REWARD) / "hf_ckpt.pt", ids)
    assert [line["reward"] for line in lines] == pytest.approx(rewards, abs=1e-4) and np.std(rewards) > 0.1


def with_adapter(base, adapter):
    """A base and an adapter, both directories, added up by hand: W + alpha/r B A. No peft."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    bare = adapter / "adapter_model.bin"
    weights = torch.load(bare, weights_only=True) if bare.exists() else safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    for name, b in weights.items():
        if "lora_B" in name:
            target = model.get_parameter(name.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight"))
            target.data += config["lora_alpha"] / config["r"] * b @ weights[name.replace("lora_B", "lora_A")]
    return model


def test_an_adapter_is_the_prior_and_a_second_one_the_policy(dialogue, hub):
    """log p by hand, from base plus adapter; greedy outputs by hand, from base plus model/. Wrong: the base alone, both adapters
    together, the prior's adapter in model/."""
    run, _ = dialogue
    words = transformers.AutoTokenizer.from_pretrained(repository(hub, LLAMA_7B))
    prior = with_adapter(repository(hub, LLAMA_7B), repository(hub, HH))
    for line in json_lines(run / "samples.jsonl"):
        with torch.no_grad():
            expected = plain(prior, torch.tensor(words(line["prompt"]).input_ids), torch.tensor(line["output_ids"]), len(words))
        assert line["log_p"] == pytest.approx(expected.item(), abs=1e-3)
    config = json.loads((run / "model/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (64, 16, LLAMA_7B)
    policy = with_adapter(repository(hub, LLAMA_7B), run / "model")
    for line in json_lines(run / "test_outputs.jsonl"):
        assert line["output"] == greedy_text(policy, words, line["prompt"], 12)


def greedy_text(model, words, prompt, length):
    """The most likely output by plain forwards."""
    ids = words(prompt).input_ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + length and (len(ids) == start or ids[-1] != words.eos_token_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, : len(words)].argmax()))
    return words.decode([i for i in ids[start:] if i != words.eos_token_id])


def test_a_trained_second_adapter_is_saved(hub, mine, no_report, tmp_path):
    """model/ holds the policy's adapter after training, for the base alone. Wrong: the prior's adapter saved, or one that expects both."""
    write_lines(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in CHATS])
    with at_hub(hub):
        names = ["--model", HH, "--dataset", tmp_path / "chats.jsonl", "--reward-function", f"{mine / 'count.py'}:letters"]
        assert brain.main([*names, *SMALL, "--learning-rate", "0.05", "--max-new-tokens", "8", "--greedy", "--output-dir", tmp_path / "run"]) == 0
    words = transformers.AutoTokenizer.from_pretrained(repository(hub, LLAMA_7B))
    prior, policy = (with_adapter(repository(hub, LLAMA_7B), place) for place in (repository(hub, HH), tmp_path / "run/model"))
    lines = json_lines(tmp_path / "run/test_outputs.jsonl")
    assert [line["output"] for line in lines] == [greedy_text(policy, words, line["prompt"], 8) for line in lines]
    assert any(not torch.equal(w, policy.get_parameter(name)) for name, w in prior.named_parameters())


needs_four_bits = pytest.mark.skipif(
    not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")), reason="--load-in-4bit needs a GPU and bitsandbytes"
)


@needs_four_bits
def test_four_bits_on_a_gpu(hub, tmp_path):
    """The dialogue command as the paper ran it. Wrong: a quantised base that is moved or copied, q_theta other than p at step 0."""
    with at_hub(hub):
        assert brain.main(["--model", HH, *SMALL, "--max-new-tokens", "12", "--load-in-4bit", "--output-dir", tmp_path / "run"]) == 0
    first = next(line for line in json_lines(tmp_path / "run/metrics.jsonl") if line["step"] == 1)
    assert first["ess_beta"] == pytest.approx(5, rel=1e-3)


# ---- settings

DEFAULTS = dict(
    model="toy", base_model=None, tokenizer=None, reward_model=None, reward_base=None, reward_template=None, reward_function=None,
    goodness="bradley-terry", dataset=None, pairs_dataset=None, method="brain", output_dir=None, resume=False, overwrite=False, seed=0,
    device=None, dtype=None, iterations=4, prompts_per_iteration=1000, samples_per_prompt=32, updates_per_iteration=1000, batch_size=8,
    max_prompt_tokens=None, max_new_tokens=64, learning_rate=1e-5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, lora_rank=8,
    lora_alpha=32, load_in_4bit=False, outputs_per_forward=None, eval_prompts=500, eval_every=1000, greedy=False,
)  # fmt: skip
OWN = ["--model", "m", "--dataset", "d", "--reward-function", "f.py:f"]


def test_defaults():
    """The paper's where it gives them, and no setting more (none takes a key). Wrong: any other default."""
    found = vars(brain.parse(OWN))
    assert {f.name for f in dataclasses.fields(brain.Settings)} == DEFAULTS.keys()
    mine = {"model": "m", "dataset": "d", "reward_function": "f.py:f"}
    if not torch.cuda.is_available():
        assert {name: found[name] for name in DEFAULTS} == DEFAULTS | mine | {"device": "cpu", "dtype": "float32"}
    toy = brain.parse([])
    assert toy.model == "toy" and toy.samples_per_prompt == 32 and toy.method == "brain" and toy.lora_rank == 0


VALUES = dict(
    base_model="b", tokenizer="t", reward_model="r", reward_base="rb", reward_template="<{output}>", goodness="logistic", dataset="d2",
    pairs_dataset="p", method="dpo-sft", output_dir="o", seed=7, device="cpu", dtype="float64", iterations=0, prompts_per_iteration=3,
    samples_per_prompt=64, updates_per_iteration=9, batch_size=2, max_prompt_tokens=77, max_new_tokens=64, learning_rate=1e-4,
    weight_decay=0.0, adam_beta1=0.0, adam_beta2=0.999, lora_rank=0, lora_alpha=1, outputs_per_forward=4, eval_prompts=0, eval_every=5,
)  # fmt: skip


@pytest.mark.parametrize("model", ["m", SFT, HH])
@pytest.mark.parametrize("name", VALUES)
def test_what_is_typed_is_what_runs(model, name):
    """In both spellings, though it equal a default or be 0; a companion never overrides it, and another flag changes nothing else but
    what belongs together. Wrong: `value or companion`, a companion applied last, one spelling alone, a flag of another type."""
    own = [] if model in (SFT, HH) else ["--dataset", "d"] + ["--reward-model", "r0"] * (name != "reward_model")
    own = [] if name == "dataset" and model == "m" else own
    own += ["--reward-model", "r0"] * (name == "dataset" and model == "m")
    before = vars(brain.parse(["--model", model, "--dataset", "d", "--reward-model", "r0"] if model == "m" else ["--model", model]))
    for spelling in ("--" + name, "--" + name.replace("_", "-")):
        found = vars(brain.parse(["--model", model, *own, spelling, str(VALUES[name])]))
        assert found[name] == VALUES[name] and type(found[name]) is type(VALUES[name])
        belongs = {"reward_model": {"reward_base", "reward_template"}, "dataset": {"pairs_dataset"}}.get(name, set())
        for other in DEFAULTS.keys() - {name}:
            assert found[other] == (None if other in belongs and model != "m" else before[other]), other


@pytest.mark.parametrize("model", brain.COMPANIONS)
def test_companions(model):
    """Each entry is a setting and is applied where nothing was typed. Wrong: a misspelt entry, which would be ignored."""
    for name, value in brain.COMPANIONS[model].items():
        assert name in DEFAULTS and getattr(brain.parse(["--model", model]), name) == value


def test_another_reward_leaves_the_companions_base_and_template():
    """Wrong: a user's reward model read at the companion's template, or beside the companion's model."""
    for typed in (["--reward-function", "f.py:f"], ["--reward-model", "mine"]):
        found = brain.parse(["--model", SFT, *typed])
        assert (found.reward_base, found.reward_template) == (None, None) and found.dataset == "CarperAI/openai_summarize_tldr"
    assert brain.parse(["--model", SFT, "--reward-function", "f.py:f"]).reward_model is None
    assert brain.parse(["--model", SFT, "--dataset", "mine.jsonl"]).pairs_dataset is None


def test_switches_and_spellings():
    """Wrong: a switch that needs a value, an abbreviation that is taken for a flag."""
    for name in ("resume", "overwrite", "greedy"):
        for spelling in (name, name.replace("_", "-")):
            assert getattr(brain.parse([*OWN, "--output-dir", "o", "--" + spelling]), name) is True
    with pytest.raises(brain.UserError, match="--iter: no such flag"):
        brain.parse([*OWN, "--iter", "3"])
    assert brain.parse([*OWN, "--method", "dpo"]).samples_per_prompt == 2  # a pair is what the data has


def test_dtype_and_device(monkeypatch):
    """bfloat16 for an adapter on a GPU, float32 wherever all weights are trained. Wrong: bfloat16 for all weights: it rounds steps of
    1e-5 away; float32 for 6B on a GPU."""
    assert brain.parse([*OWN, "--device", "cpu"]).dtype == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(brain.UserError, match="--device cuda:2: no such GPU"):
        brain.parse([*OWN, "--device", "cuda:2"])
    found = brain.parse(OWN)
    assert (found.device, found.dtype) == ("cuda", "bfloat16")
    assert brain.parse([*OWN, "--lora-rank", "0"]).dtype == "float32"
    assert brain.parse([*OWN, "--device", "cpu"]).dtype == "float32"
    assert brain.parse([*OWN, "--dtype", "float16", "--device", "cuda:1"]).dtype == "float16"


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    """No data, no reward; settings that the toy has of its own; a GPU that is not there. Wrong: any of them ignored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(brain, "execute", lambda *_: pytest.fail("not refused"))
    refused = {
        "--dataset: missing": ["--model", "m", "--reward-model", "r"],
        "--reward-model or --reward-function: give one of them": ["--model", "m", "--dataset", "d"],
        "--device cuda: no such GPU": [*OWN, "--device", "cuda"],
        "--load-in-4bit: needs a GPU": [*OWN, "--load-in-4bit"],
    }
    for name, value in VALUES.items():
        if name in ("base_model", "tokenizer", "reward_model", "reward_base", "reward_template", "dataset", "pairs_dataset"):
            refused[f"{brain.flag(name)}: the toy world has its own"] = [brain.flag(name), value]
    refused["--lora-rank: the toy world"] = ["--lora-rank", "8"]
    refused["--reward-function: the toy world"] = ["--reward-function", "f.py:f"]
    for told, arguments in refused.items():
        assert brain.main(arguments) == 2
        error = capsys.readouterr().err
        assert told in error and error.startswith("brain: --") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_edges_of_ranges_are_allowed():
    """Wrong: > for >=."""
    edges = {"seed": 0, "iterations": 0, "samples_per_prompt": 2, "weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0, "eval_prompts": 0}
    edges |= {name: 1 for name in ("prompts_per_iteration", "updates_per_iteration", "batch_size", "max_prompt_tokens", "max_new_tokens")}
    edges |= {name: 1 for name in ("lora_alpha", "outputs_per_forward", "eval_every")} | {"lora_rank": 0}
    found = brain.parse(OWN + [word for name, value in edges.items() for word in (brain.flag(name), str(value))])
    assert {name: getattr(found, name) for name in edges} == edges


def test_help_shows_every_setting(capsys):
    """Wrong: a field without help or default; a `%` that breaks argparse."""
    with pytest.raises(SystemExit) as stop:
        brain.main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    shown = {part.split(maxsplit=1)[0].strip(","): " ".join(part.split()) for part in re.split(r"\n  (?=--)", text)[1:]}
    for name, value in DEFAULTS.items():
        told = shown["--" + name]
        assert name.count("_") == told.count(brain.flag(name)) * name.count("_") and len(told) > len(name) + 20, told
        if value is not None and value is not False:
            assert f"(default: {value})" in told, told
    assert "paper: 1e-5" in text and "paper: 32" in text and "paper: 1000" in text


def test_import_is_cheap(tmp_path, hub):
    """`import brain` is for readers who want the mathematics. Wrong: peft, datasets, matplotlib or the toy at the top of the file; a
    model class that pulls in all of transformers."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import brain; print([m for m in sys.modules if m.split('.')[0] in "
    code += "('peft', 'datasets', 'toy', 'matplotlib') or m == 'transformers.modeling_utils'])"
    found = command(["-c", code], tmp_path, hub, "-I")
    assert found.stdout == "[]\n" and found.stderr == ""


# ---- one's own model


@pytest.fixture
def no_report(monkeypatch):
    """report.png takes longest in a small run, and is looked at elsewhere."""
    monkeypatch.setattr(brain.Run, "report", lambda self: (self.path / "report.png").touch())


COUNT = "def letters(prompts, completions, **columns):\n    return [2.0 * text.count('a') for text in completions]\n"
LETTERS = "abcdef "


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A directory with model/ (a Llama, one token per letter), count.py, and data.jsonl without splits."""
    place = tmp_path_factory.mktemp("mine")
    words = trained_tokenizer([LETTERS])
    assert len(words) == 8
    config = transformers.LlamaConfig(**LLAMA, vocab_size=10, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    loud(transformers.LlamaForCausalLM(config), 7, 0.15).save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    (place / "count.py").write_text(COUNT)
    draw = np.random.default_rng(0)
    text = lambda least, most: "".join(draw.choice(list("abcdef"), draw.integers(least, most)))  # noqa: E731
    write_lines(place / "data.jsonl", [{"prompt": text(2, 5), "label": text(1, 6)} for _ in range(300)])
    return place


def of_mine(place, *more):
    """Arguments: the model, data and reward function of `mine`."""
    return ["--model", place / "model", "--dataset", place / "data.jsonl", "--reward-function", f"{place / 'count.py'}:letters", *more]


@pytest.fixture(scope="module")
def own_run(mine, tmp_path_factory):
    """All weights trained by the reward function, in a process of its own. -> (process, run)"""
    place = tmp_path_factory.mktemp("own")
    numbers = "--lora-rank 0 --iterations 2 --prompts-per-iteration 32 --updates-per-iteration 25 --batch-size 4 --samples-per-prompt 8"
    more = f"{numbers} --learning-rate 0.003 --weight-decay 0 --max-new-tokens 6 --eval-every 25".split()
    return command([*of_mine(mine), *more, "--output-dir", place / "run"], place, place / "hf"), place / "run"


def test_a_run_on_ones_own_model_learns(own_run, mine):
    """From a local directory and a .jsonl without splits, win-rate, reward and KL to the prior rise and D_n falls. Wrong: a loss of the
    wrong sign, a policy that is not trained, prior and policy swapped in the evaluation, a split held out of the test rows."""
    process, run = own_run
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert {path.name for path in run.iterdir()} == RUN_DIRECTORY
    for split, size in (("validation", 30), ("test", 27)):  # a tenth of 300, a tenth of the rest
        assert f"{split}: not in the data; {size} rows of train are held out for it" in process.stdout
    metrics = json_lines(run / "metrics.jsonl")
    evaluations = [line for line in metrics if line.get("split") == "validation"]
    assert [line["step"] for line in evaluations] == [0, 25, 50]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 51))
    first, last, test = evaluations[0], evaluations[-1], metrics[-1]
    assert (test["split"], test["step"]) == ("test", 50)
    assert test["win_rate"] > first["win_rate"] + 20 and last["reward"] > first["reward"] + 2
    assert abs(first["kl_to_prior"]) < 1e-4 < 0.5 < last["kl_to_prior"]
    assert last["self_normalized_kl"] < first["self_normalized_kl"] / 2
    samples = json_lines(run / "samples.jsonl")
    assert len(samples) == 2 * 32 * 8 and {line["iteration"] for line in samples} == {1, 2}
    assert all(line["reward"] == 2 * line["output"].count("a") for line in samples)
    second = [line for line in samples if line["iteration"] == 2]  # of the renewed proposal: better, and recorded as its own
    assert np.mean([line["reward"] for line in second]) > np.mean([line["reward"] for line in samples[:256]]) + 0.5
    assert np.mean([line["log_q_proposal"] - line["log_p"] for line in second]) > 0.2
    for lines, alpha_hat in by_prompt(samples):
        assert [line["alpha_hat"] for line in lines] == pytest.approx(alpha_hat.tolist(), abs=1e-6)
    rows = json_lines(mine / "data.jsonl")
    held_out = [line["prompt"] for line in json_lines(run / "test_outputs.jsonl")]
    assert len(held_out) == 27 and set(held_out) <= {row["prompt"] for row in rows}


def test_test_outputs_agree_with_metrics(own_run, mine):
    """Every number of the test's line from the outputs' text. Wrong: rewards of other outputs or without the joining space, win-rate with
    its sides swapped, a KL without its end token or with its sign turned, the last model tested and not the best."""
    _, run = own_run
    lines, metrics = json_lines(run / "test_outputs.jsonl"), json_lines(run / "metrics.jsonl")
    assert all(set(line) == {"prompt", "gold", "output", "reward", "gold_reward"} for line in lines)
    rewards, gold = (np.array([line[name] for line in lines]) for name in ("reward", "gold_reward"))
    assert rewards.tolist() == [2 * line["output"].count("a") for line in lines]
    assert gold.tolist() == [2 * line["gold"].count("a") for line in lines]
    assert all(line["gold"].startswith(" ") for line in lines)  # neither prompt nor answer brought white space
    won = np.mean((rewards > gold) + (rewards == gold) / 2)
    assert metrics[-1]["win_rate"] == pytest.approx(100 * won) and metrics[-1]["reward"] == pytest.approx(rewards.mean())
    assert metrics[-1]["win_rate_half_width"] == pytest.approx(196 * math.sqrt(won * (1 - won) / len(lines)))
    words = transformers.AutoTokenizer.from_pretrained(run / "model")
    policy, prior = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (run / "model", mine / "model"))
    ratios = []
    for line in lines:
        prompt, output = words(line["prompt"]).input_ids, words(line["output"]).input_ids
        output = torch.tensor(output if len(output) == 6 else output + [0])  # a token per letter: shorter ones ended
        with torch.no_grad():
            ratios.append((plain(policy, torch.tensor(prompt), output, 8) - plain(prior, torch.tensor(prompt), output, 8)).item())
    assert metrics[-1]["kl_to_prior"] == pytest.approx(np.mean(ratios), abs=1e-4)  # float32
    best = max((line for line in metrics if line.get("split") == "validation"), key=lambda line: line["win_rate"])
    assert best["step"] > 0


def test_an_untrained_model_is_evaluated(own_run, mine, tmp_path, capsys):
    """`--iterations 0`: one evaluation of each split, and on model/ of a run, by transformers alone, the outputs of that run's test. Wrong: an
    update, a missing file, an evaluation that depends on what was trained before."""
    _, run = own_run
    arguments = ["--lora-rank", "0", "--iterations", "0", "--samples-per-prompt", "8", "--max-new-tokens", "6", "--output-dir", tmp_path / "run"]
    assert brain.main([*of_mine(mine), *arguments, "--model", run / "model"]) == 0
    assert (tmp_path / "run/test_outputs.jsonl").read_text() == (run / "test_outputs.jsonl").read_text()
    metrics = json_lines(tmp_path / "run/metrics.jsonl")
    assert [(line["step"], line["split"]) for line in metrics] == [(0, "validation"), (0, "test")]
    assert metrics[1]["win_rate"] == json_lines(run / "metrics.jsonl")[-1]["win_rate"] and abs(metrics[1]["kl_to_prior"]) < 1e-4
    assert (tmp_path / "run/samples.jsonl").read_text() == ""
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_DIRECTORY
    weights = [safetensors.torch.load_file(place / "model/model.safetensors") for place in (run, tmp_path / "run")]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert "0 rounds" in capsys.readouterr().out


def test_where_nothing_can_be_compared_the_last_adapter_is_saved(mine, no_report, tmp_path, capsys):
    """Prompts without gold answers: no win-rate anywhere, model/ is the last policy, and base plus adapter by hand writes its outputs. Wrong:
    the first model kept, a win-rate against nothing, a greedy evaluation that samples."""
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in json_lines(mine / "data.jsonl")[:60]])
    numbers = "--iterations 1 --prompts-per-iteration 8 --updates-per-iteration 20 --batch-size 4 --samples-per-prompt 8 --eval-every 10"
    more = f"{numbers} --learning-rate 0.02 --max-new-tokens 6 --greedy --lora-rank 4 --lora-alpha 16".split()
    assert brain.main([*of_mine(mine), *more, "--dataset", tmp_path / "prompts.jsonl", "--output-dir", tmp_path / "run"]) == 0
    assert "train: 48 prompts, without gold answers, so without win-rate" in capsys.readouterr().out
    metrics, lines = json_lines(tmp_path / "run/metrics.jsonl"), json_lines(tmp_path / "run/test_outputs.jsonl")
    assert not any("win_rate" in line or "win_rate_half_width" in line for line in metrics)
    assert all(line["gold"] is None and line["gold_reward"] is None for line in lines) and len(lines) == 6
    saved = safetensors.torch.load_file(tmp_path / "run/model/adapter_model.safetensors")
    last = safetensors.torch.load_file(tmp_path / "run/checkpoint/state.safetensors")
    trained = {name.removeprefix("weights/").replace(".default.", "."): w for name, w in last.items() if name.startswith("weights/")}
    assert saved.keys() == trained.keys() and all(torch.equal(w, trained[name]) for name, w in saved.items())
    assert last["step"] == 20
    words = transformers.AutoTokenizer.from_pretrained(mine / "model")
    policy = with_adapter(mine / "model", tmp_path / "run/model")
    prior = AutoModelForCausalLM.from_pretrained(mine / "model").eval()
    assert [line["output"] for line in lines] == [greedy_text(policy, words, line["prompt"], 6) for line in lines]
    assert [line["output"] for line in lines] != [greedy_text(prior, words, line["prompt"], 6) for line in lines]


POLICY_CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
REWARD_CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"


def test_chat_models(no_report, tmp_path):
    """Messages go through the policy's chat template, with its opening for a reply, and through the reward model's own, with the output as
    the reply. Wrong: one template for both, no opening, the output outside of its turn, messages as their repr."""
    questions = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": f"is {a} big?"}] for a in ANIMALS]
    texts = [*ANIMALS, "is be kind big? yes no", "<system> <user>\n", "assistant:;"]
    chat, reward = (trained_tokenizer(texts, 60, chat_template=template) for template in (POLICY_CHAT, REWARD_CHAT))
    sizes = LLAMA | dict(max_position_embeddings=300)
    model = loud(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=len(chat), bos_token_id=0, eos_token_id=0)), 1, 0.2)
    scorer = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, vocab_size=len(chat), num_labels=1, pad_token_id=0))
    loud(scorer, 2)
    for place, directory, words in (("policy", model, chat), ("reward", scorer, reward)):
        directory.save_pretrained(tmp_path / place)
        words.save_pretrained(tmp_path / place)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"data/{split}.jsonl", [{"prompt": question, "completion": [{"role": "assistant", "content": "yes"}]} for question in questions])
    names = ["--model", tmp_path / "policy", "--reward-model", tmp_path / "reward", "--dataset", tmp_path / "data"]
    assert brain.main([*names, *SMALL, "--max-new-tokens", "8", "--eval-prompts", "3", "--output-dir", tmp_path / "run"]) == 0
    samples, tests = json_lines(tmp_path / "run/samples.jsonl"), json_lines(tmp_path / "run/test_outputs.jsonl")
    assert all(line["prompt"] in questions for line in samples + tests) and len(tests) == 3 and len(samples) == 20
    assert all(line["gold"] == "yes" for line in tests)
    by_rows = lambda messages, reply: f"system: {messages[0]['content']};user: {messages[1]['content']};assistant: {reply};"  # noqa: E731
    scored = [(by_rows(line["prompt"], line["output"]), line["reward"]) for line in samples + tests]
    scored += [(by_rows(line["prompt"], "yes"), line["gold_reward"]) for line in tests]
    for text, value in scored:
        with torch.no_grad():
            hidden = scorer.model(torch.tensor([reward(text).input_ids])).last_hidden_state[0, -1]
        assert value == pytest.approx((scorer.score.weight[0] @ hidden).item(), abs=1e-4)
    assert np.std([value for _, value in scored]) > 0.1
    for line in samples:
        text = f"<system>be kind\n<user>{line['prompt'][1]['content']}\n<assistant>"
        with torch.no_grad():
            log_p = plain(model, torch.tensor(chat(text).input_ids), torch.tensor(line["output_ids"]), len(chat)).item()
        assert line["log_p"] == pytest.approx(log_p, abs=1e-3)
    starts_at_the_prior(tmp_path / "run", 5)


# ---- the plan

README = (HERE / "README.md").read_text()


def gpt_j(vocab, width, layers, **_):
    """Weights of GPT-J by arithmetic: (causal LM, with one score in place of the logits, numbers in the cache of a token)."""
    layer = 2 * width + 4 * width**2 + (width * 4 * width + 4 * width) + (4 * width * width + width)  # norm, attention, two linear
    decoder = vocab * width + layers * layer + 2 * width
    return decoder + vocab * width + vocab, decoder + width, 2 * layers * width


def planned(text):
    """{what a line of the plan says: gigabytes}, in order."""
    return {what: float(size) for size, what in re.findall(r"^ *(\d+\.\d{3}) GB  (.*)$", text, re.M)}


@pytest.fixture(scope="module")
def six_billion(tmp_path_factory):
    """A hub cache with the real configs, whose defaults are those of 6B, and files of weights that cannot be read."""
    home = tmp_path_factory.mktemp("large")
    for name in (SFT, GPTJ):
        transformers.GPTJConfig().save_pretrained(in_hub(home, "model", name))
    (in_hub(home, "model", SFT_REWARD) / "pytorch_model.bin").write_bytes(b"")
    (repository(home, SFT) / "pytorch_model.bin").write_bytes(b"")
    return home


def plan_of(six_billion, capsys, tmp_path, *arguments):
    with at_hub(six_billion):
        assert brain.main(["--model", SFT, "--output-dir", tmp_path / "run", "--device", "cpu", *arguments]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().out


def test_the_plan_of_6b_in_the_readme(six_billion, capsys, tmp_path):
    """The README's block, number by number, from the config alone. Wrong: the README, GB of 2^30, a prior's copy for LoRA, the logits of the
    reward model, a cache of prompts alone."""
    (block,) = re.findall(r"```\n(brain on CarperAI.*?)```", README, re.S)
    told = plan_of(six_billion, capsys, tmp_path, "--dtype", "bfloat16")
    assert told == block
    weights, reward, cache = gpt_j(50400, 4096, 28)
    assert f"{weights:,} weights" in block and f"{reward:,} weights" in block and (weights, reward) == (6_050_882_784, 5_844_398_080)
    adapter = 28 * 2 * (4096 + 4096) * 8  # A and B of rank 8 beside the queries and the values of each layer
    sizes = [2 * weights, 16 * adapter, 2 * reward, 2 * cache * 32 * 550]
    assert list(planned(block).values()) == [round(x / 1e9, 3) for x in [*sizes, sum(sizes)]]
    assert "`--outputs-per-forward 8` the cache\ntakes 2 GB" in README and round(sizes[-1] / 4e9, 1) == 2.0


def test_the_plan_counts_what_will_be_there(six_billion, capsys, tmp_path):
    """LoRA: an adapter in float32 at least, four numbers for each of its weights. All weights: weight once, then prior, gradient and two
    moments. Wrong: bytes of another dtype, rank ignored, the prior forgotten, a total that is no sum."""
    weights, reward, cache = gpt_j(50400, 4096, 28)
    lora = plan_of(six_billion, capsys, tmp_path, *"--dtype float64 --lora-rank 16 --samples-per-prompt 6 --max-new-tokens 100".split())
    adapter = 28 * 2 * (4096 + 4096) * 16
    sizes = [8 * weights, 32 * adapter, 8 * reward, 8 * cache * 6 * 600]
    assert list(planned(lora).values()) == [round(x / 1e9, 3) for x in [*sizes, sum(sizes)]]
    assert f"adapter of rank 16: {adapter:,} weights" in lora and f"{weights:,} weights in float64" in lora and f"{reward:,} weights in float64" in lora
    assert "cache of 6 outputs, 500 + 100 tokens each" in lora
    assert "4 rounds of 1,000 prompts x 6 outputs = 24,000 samples; 4 x 1,000 updates of 8 prompts" in lora
    for bound, rows in ((4, 4), (6, 6), (11, 6), (20, 18)):  # 20 are three prompts sampled together
        told = plan_of(six_billion, capsys, tmp_path, "--samples-per-prompt", "6", "--outputs-per-forward", f"{bound}")
        assert f"cache of {rows} outputs, 500 + 50 tokens each" in told
    whole = plan_of(six_billion, capsys, tmp_path, *"--dtype float32 --lora-rank 0 --reward-function f.py:f --outputs-per-forward 8".split())
    sizes = [4 * weights, 16 * weights, 4 * cache * 8 * 550]
    assert list(planned(whole).values()) == [round(x / 1e9, 3) for x in [*sizes, sum(sizes)]] and "cache of 8 outputs" in whole


def test_the_plan_of_a_small_model_is_its_state_dict(hub, summarisation, dialogue, tmp_path):
    """Counts against the weights in the files. Wrong: buffers counted, the adapter's two halves taken for one, another model's config."""
    process, place, _ = summarisation
    size = lambda weights: sum(w.numel() for name, w in weights.items() if not re.search(r"attn\.(masked_)?bias", name))  # noqa: E731
    policy = torch.load(repository(hub, SFT) / "pytorch_model.bin", weights_only=True)
    reward = torch.load(repository(hub, SFT_REWARD) / "pytorch_model.bin", weights_only=True)
    adapter = safetensors.torch.load_file(place / "run/model/adapter_model.safetensors")
    assert f"policy and prior: {SFT}, {size(policy):,} weights in float32" in process.stdout
    assert f"reward: {SFT_REWARD}, {size(reward):,} weights in float32" in process.stdout
    assert f"adapter of rank 8: {size(adapter):,} weights" in process.stdout
    run, told = dialogue
    base = safetensors.torch.load_file(repository(hub, LLAMA_7B) / "model.safetensors")
    assert f"{HH}, {size(base):,} weights in float32" in told
    assert f"adapter of rank 64: {size(safetensors.torch.load_file(run / 'model/adapter_model.safetensors')):,} weights" in told


def test_the_plan_comes_before_the_weights(mine, tmp_path, capsys):
    """A model whose weights are missing: the plan, then one line. Wrong: the plan after the loading, a traceback, a run directory."""
    shutil.copytree(mine / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    assert brain.main([*of_mine(mine), "--model", tmp_path / "model", "--max-new-tokens", "3", "--output-dir", tmp_path / "run"]) == 2
    captured = capsys.readouterr()
    assert "GB  policy and prior" in captured.out and "GB  together" in captured.out
    assert captured.err.startswith(f"brain: --model {tmp_path / 'model'}: cannot be loaded") and captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_lengths_fit_the_context(mine, tmp_path, capsys):
    """Of a context of 64. Wrong: no default, a limit that leaves no room for the output, an impossible length taken."""
    told = lambda *more: (brain.main([*of_mine(mine), "--output-dir", tmp_path / "run", "--iterations", "0", "--reward-function", "no.py:f", *more]), capsys.readouterr())  # noqa: E731, E501
    for more, limit in ((("--max-new-tokens", "50"), "14 + 50"), (("--max-new-tokens", "50", "--max-prompt-tokens", "500"), "14 + 50"),
                        (("--max-new-tokens", "50", "--max-prompt-tokens", "9"), "9 + 50"), (("--max-new-tokens", "63"), "1 + 63")):  # fmt: skip
        assert f"cache of 32 outputs, {limit} tokens each" in told(*more)[1].out
    code, captured = told("--max-new-tokens", "64")
    assert code == 2 and captured.err.startswith("brain: --max-new-tokens 64: no room") and "64" in captured.err and captured.err.count("\n") == 1


# ---- the output directory


def finished_run(path):
    path.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        (path / name).write_text("an earlier run\n")
    (path / "config.json").write_text('{"samples_per_prompt": 2}')
    return {file: file.read_text() for file in path.iterdir()}


def test_an_earlier_run_is_not_touched(mine, tmp_path, monkeypatch, capsys):
    """A directory that holds a run, or anything else, is refused before anything is written. Wrong: an overwritten run."""
    monkeypatch.setattr(brain, "load_data", lambda *_: pytest.fail("not refused"))
    before = finished_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, told in (("run", "holds a run; resume it (--resume)"), ("other", "holds other files"), ("file", "is a file; name another")):
        assert brain.main([*of_mine(mine), "--max-new-tokens", "3", "--output-dir", tmp_path / name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"brain: --output-dir {tmp_path / name}: ") and told in error and error.count("\n") == 1
    assert {file: file.read_text() for file in (tmp_path / "run").iterdir()} == before
    assert [file.read_text() for file in (tmp_path / "other").iterdir()] == ["mine"] and (tmp_path / "file").read_text() == "mine"
    assert brain.main([*of_mine(mine), "--max-new-tokens", "3", "--resume", "--output-dir", tmp_path / "none"]) == 2
    assert capsys.readouterr().err == f"brain: --resume: {tmp_path / 'none'} holds no run; start it without --resume\n"


def test_overwrite_replaces_a_run_once_all_is_loaded(mine, tmp_path, capsys):
    """Wrong: the old run deleted before the new one is known to load; old files beside the new ones; the user's notes deleted."""
    before = finished_run(tmp_path / "run")
    for name in ("report.png", "nonfinite.json", "toy.png"):
        (tmp_path / "run" / name).write_text("old")
    (tmp_path / "run/notes.txt").write_text("mine")
    small = ["--iterations", "0", "--eval-prompts", "2", "--samples-per-prompt", "2", "--max-new-tokens", "3", "--output-dir", tmp_path / "run"]
    assert brain.main([*of_mine(mine), *small, "--overwrite", "--reward-function", f"{mine / 'count.py'}:absent"]) == 2
    assert all(file.read_text() == text for file, text in before.items())
    assert brain.main([*of_mine(mine), *small, "--overwrite"]) == 0
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_DIRECTORY | {"notes.txt"}
    assert json_lines(tmp_path / "run/metrics.jsonl")[0]["step"] == 0 and (tmp_path / "run/report.png").read_bytes() != b"old"
    capsys.readouterr()
    again = [*of_mine(mine), *small, "--resume"]
    assert brain.main(again) == 0
    assert f"{tmp_path / 'run'}: this run is finished" in capsys.readouterr().out
    assert brain.main([*again, "--seed", "1", "--learning-rate", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--seed was 0, not 1; --learning-rate was 1e-05, not 0.5" in error and error.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, capsys):
    """And an interruption says how to go on. Wrong: every error in one line, or an exit code of 0."""

    def fail(error):
        raise error

    monkeypatch.setattr(brain, "execute", lambda *_: fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        brain.main([])
    monkeypatch.setattr(brain, "execute", lambda *_: fail(KeyboardInterrupt()))
    assert brain.main([]) == 130
    assert "--resume" in capsys.readouterr().err


# ---- adapters


def test_base_of_an_adapter(hub, mine, tmp_path, capsys):
    """Its own base, another with --base-model; its rank and alpha are the policy's; all weights on request. Wrong: a rank that the copy
    cannot have, taken or silently dropped."""
    with at_hub(hub):
        parse = lambda *more: brain.parse(["--model", HH, *more])  # noqa: E731
        assert brain.base_of(parse()) == (LLAMA_7B, HH) and brain.base_of(parse("--base-model", "b")) == ("b", HH)
        assert brain.base_of(parse("--lora-rank", "64", "--lora-alpha", "16")) == (LLAMA_7B, HH)
        whole = parse("--lora-rank", "0")
        assert brain.base_of(whole) == (LLAMA_7B, HH) and whole.lora_rank == 0
        for name, value in (("--lora-rank", "8"), ("--lora-alpha", "32")):
            with pytest.raises(brain.UserError, match=rf"^{name} {value}: .*which has (64|16); leave it out$"):
                brain.base_of(parse(name, value))
    shutil.copytree(repository(hub, HH), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None, "r": 4, "lora_alpha": 2}))
    own = brain.parse([*OWN, "--model", str(tmp_path / "adapter"), "--base-model", "b"])
    assert brain.base_of(own) == ("b", str(tmp_path / "adapter")) and (own.lora_rank, own.lora_alpha) == (4, 2)
    for model, more, told in ((tmp_path / "adapter", [], "give --base-model"), (mine / "model", ["--base-model", "b"], "is not an adapter; leave it out")):
        with pytest.raises(brain.UserError, match=told):
            brain.base_of(brain.parse([*OWN, "--model", str(model), *more]))


def test_an_adapter_on_the_wrong_base_is_refused(hub, mine, tmp_path, capsys):
    """One line, where its shapes do not fit. Wrong: a traceback; an adapter of another shape ignored."""
    narrow = transformers.LlamaConfig(**LLAMA | dict(hidden_size=16), vocab_size=10, bos_token_id=0, eos_token_id=0)
    transformers.LlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    transformers.AutoTokenizer.from_pretrained(mine / "model").save_pretrained(tmp_path / "narrow")
    assert brain.main([*of_mine(mine), "--model", repository(hub, HH), "--base-model", tmp_path / "narrow", *SMALL, "--max-new-tokens", "3", "--output-dir", tmp_path / "run"]) == 2
    error = capsys.readouterr().err
    assert "brain: --model" in error and "see --base-model" in error and error.count("\nbrain:") + error.startswith("brain:") == 1
    assert "Traceback" not in error and not (tmp_path / "run").exists()


# ---- no way in


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("which", ["policy", "reward"])
def test_code_of_a_checkpoint_does_not_run(which, known, mine, no_report, tmp_path, capsys):
    """`auto_map` in a config names a Python file beside it. Of a known architecture it is left alone, an unknown one is refused in a line.
    Wrong: trust_remote_code anywhere."""
    if which == "policy":
        shutil.copytree(mine / "model", tmp_path / "evil")
        arguments = [*of_mine(mine), "--model", tmp_path / "evil"]
    else:
        config = transformers.LlamaConfig(**LLAMA, vocab_size=10, num_labels=1, pad_token_id=0)
        transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "evil")
        transformers.AutoTokenizer.from_pretrained(mine / "model").save_pretrained(tmp_path / "evil")
        arguments = ["--model", mine / "model", "--dataset", mine / "data.jsonl", "--reward-model", tmp_path / "evil"]
    names = {"AutoConfig": "evil.Kind", "AutoModelForCausalLM": "evil.Kind", "AutoModelForSequenceClassification": "evil.Kind"}
    config = json.loads((tmp_path / "evil/config.json").read_text()) | {"auto_map": names}
    (tmp_path / "evil/config.json").write_text(json.dumps(config if known else config | {"model_type": "of-its-own"}))
    words = json.loads((tmp_path / "evil/tokenizer_config.json").read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Kind", "evil.Kind"]}}
    (tmp_path / "evil/tokenizer_config.json").write_text(json.dumps(words))
    (tmp_path / "evil/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Kind: pass\n")
    small = "--iterations 0 --samples-per-prompt 2 --max-new-tokens 3 --eval-prompts 2".split()
    assert brain.main([*arguments, *small, "--output-dir", tmp_path / "run"]) == (0 if known else 2)
    assert not (tmp_path / "ran").exists()
    error = capsys.readouterr().err
    if not known:
        assert error.startswith(f"brain: --{'model' if which == 'policy' else 'reward-model'} {tmp_path / 'evil'}: ") and error.count("\n") == 1


@pytest.mark.parametrize("which", ["policy", "bare reward", "reward"])
def test_pickled_code_does_not_run(which, mine, tmp_path, capsys):
    """Weights that hold code end in one line. Wrong: weights_only=False."""
    path, arguments = tmp_path / "evil", of_mine(mine)
    if which == "policy":
        shutil.copytree(mine / "model", path)
        (path / "model.safetensors").unlink()
        file, arguments = path / "pytorch_model.bin", [*arguments, "--model", path]
    else:
        path.mkdir()
        file = path / "pytorch_model.bin"
        arguments = ["--model", mine / "model", "--dataset", mine / "data.jsonl", "--reward-model", path]
        arguments += ["--reward-base", mine / "model"] if which == "bare reward" else []
        if which == "reward":
            config = transformers.LlamaConfig(**LLAMA, vocab_size=10, num_labels=1, architectures=["LlamaForSequenceClassification"])
            config.save_pretrained(path)
    torch.save({"weight": Payload(tmp_path / "ran")}, file)
    assert brain.main([*arguments, "--max-new-tokens", "3", "--output-dir", tmp_path / "run"]) == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    assert error.startswith("brain: --") and str(path) in error and error.count("\n") == 1


# ---- the default run and the README

@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """`python brain.py`, as the README says it, in an empty directory. -> (process, place)"""
    place = tmp_path_factory.mktemp("toy")
    return command([], place, place / "hf"), place


LINES = ("KL(posterior || it), nats", "KL(it || prior), nats", "E[r]", "win-rate against the prior, %")


def table(text):
    """{row: (prior, policy, posterior)} of the printed toy table."""
    lines = {row: re.search(rf"^ *{re.escape(row)} +([-\d.]+) +([-\d.]+) +([-\d.]+)$", text, re.M) for row in LINES}
    return {row: tuple(map(float, found.groups())) for row, found in lines.items() if found}


def test_the_default_run_lands_on_the_posterior(toy_run):
    """KL(posterior || policy) falls at least fourfold, and the policy has the posterior's KL to the prior, mean reward and win-rate, no
    more: an argmax goes past it. Wrong: any change of weights, loss, sampler or loop that has another optimum."""
    process, _ = toy_run
    assert process.returncode == 0 and process.stderr == "", process.stderr
    found = table(process.stdout)
    assert found.keys() == set(LINES)
    (before, after, exact), (none, moved, far), (low, reward, high), (even, rate, best) = (found[row] for row in LINES)
    assert exact == 0 and after < before / 4
    assert none == 0 and moved == pytest.approx(far, rel=0.25)
    assert low == pytest.approx(0, abs=1e-3) and reward == pytest.approx(high, rel=0.15) and high > 1
    assert even == pytest.approx(50, abs=2) and rate == pytest.approx(best, abs=4) and best > 75
    assert re.search(r"exact, over all 4,681 outputs of 16 prompts:\n +prior +policy +posterior\n", process.stdout)


def test_the_default_run_writes_a_new_directory(toy_run):
    """runs/, a directory of its own, all files and toy.png. Wrong: files elsewhere, a picture missing, settings other than those of the run."""
    process, place = toy_run
    assert [path.name for path in (place / "cwd").iterdir()] == ["runs"]
    (run,) = (place / "cwd/runs").iterdir()
    assert re.fullmatch(r"toy-brain-\d{8}-\d{6}", run.name) and f"run: runs/{run.name}\n" in process.stdout
    assert {path.name for path in run.iterdir()} == RUN_DIRECTORY | {"toy.png"}
    assert (run / "toy.png").read_bytes().startswith(b"\x89PNG") and f"policy against posterior: runs/{run.name}/toy.png" in process.stdout
    config = json.loads((run / "config.json").read_text())
    companions = brain.COMPANIONS["toy"]
    assert {name: config[name] for name in companions} == companions and config["model"] == "toy" and config["command"].split() == ["python", "brain.py"]
    metrics = json_lines(run / "metrics.jsonl")
    e, k = config["iterations"], config["updates_per_iteration"]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, e * k + 1))
    assert len(json_lines(run / "samples.jsonl")) == e * config["prompts_per_iteration"] * config["samples_per_prompt"]
    policy = AutoModelForCausalLM.from_pretrained(run / "model")
    world = toy_world.Toy()
    distance = toy_world.kl(world.log_posterior, world.world.log_probs(policy)).mean()
    assert distance == pytest.approx(table(process.stdout)[LINES[0]][1], abs=2e-3)  # model/ is what was reported
    assert len(json_lines(run / "test_outputs.jsonl")) == 250  # --eval-prompts of 512


def flags_of(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def readme_commands():
    """Every `python ...` and `pip ...` of the README, in blocks, tables and lines, as lists of words."""
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", README, flags=re.S))]
    lines = [part.strip() for text in [*"\n".join(blocks).splitlines(), *inline] for part in text.split("&&")]
    return [line.split() for line in lines if line.split()[:1] and line.split()[0] in ("python", "pip", "pytest", "torchrun")]


def test_commands_of_the_readme():
    """Each of brain.py's is understood, with every flag. Wrong: a flag renamed in one place."""
    commands = readme_commands()
    assert ["python", "brain.py"] in commands and ["pytest"] in commands and ["pip", "install", "-r", "requirements.txt"] in commands
    ours = [words[2:] for words in commands if words[:2] == ["python", "brain.py"]]
    assert len(ours) >= 4
    for words in ours:
        if "--help" not in words:
            assert isinstance(brain.parse(words), brain.Settings)
    for words in commands:
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            assert get_args_parser().parse_args(words[1:]).training_script == "brain.py"
    assert (HERE / "requirements.txt").is_file()


def test_flags_of_the_readme():
    """Every flag named anywhere is a setting, or one of the program it is named for. Wrong: a flag renamed in one place."""
    known = {brain.flag(f.name) for f in dataclasses.fields(brain.Settings)} | {"--help", "--nproc-per-node"}
    judge = flags_of((HERE / "toy/judge.py").read_text())
    for line in README.splitlines():
        unknown = flags_of(line) - known - (judge if "toy.judge" in line else set())
        assert not unknown, (line, unknown)
    brought = flags_of(README[README.index("## Your own model") : README.index("## A run")])
    assert {"--model", "--reward-model", "--reward-base", "--reward-template", "--reward-function", "--goodness", "--dataset", "--method"} <= brought


def test_methods_and_models_of_the_readme():
    """Wrong: a method or a companion that the README does not know, or one that is no more."""
    (line,) = [line for line in README.splitlines() if line.startswith("* `--method`")]
    assert set(re.findall(r"`([a-z][^`]*)`", line)) == set(brain.METHODS)
    assert all(f"`{name}`" in README for name in brain.COMPANIONS if name != "toy")
    (line,) = [line for line in README.splitlines() if "Gold answer: the first of" in line] or [""]
    assert tuple(re.findall(r"`(\w+)`", line.split("first of")[1])) == brain.GOLD_COLUMNS


def test_files_of_the_readme(toy_run, summarisation):
    """The table of a run's files is what a run has. Wrong: a file renamed in one place, or forgotten."""
    rows = re.findall(r"^\| `([\w./]+)` \|", README[README.index("## A run") :], re.M)
    assert {row.rstrip("/") for row in rows} == RUN_DIRECTORY
    for run in (*(toy_run[1] / "cwd/runs").iterdir(), summarisation[1] / "run"):
        assert all((run / row).is_dir() == row.endswith("/") and (run / row).exists() for row in rows)


def test_metrics_of_the_readme(summarisation):
    """Wrong: a metric renamed in one place."""
    _, place, _ = summarisation
    written = {name for line in json_lines(place / "run/metrics.jsonl") for name in line}
    assert written == {
        "step", "loss", "reward", "kl_to_prior", "ess_alpha", "ess_beta", "max_weight", "ended", "time",
        "split", "win_rate", "win_rate_half_width", "self_normalized_kl",
    }  # fmt: skip
    watch = README[README.index("What to watch") :]
    assert {name for name in re.findall(r"`([a-z_]+)`", watch) if name != "dpo"} <= written
    samples = {name for line in json_lines(place / "run/samples.jsonl") for name in line}
    assert samples == {"iteration", "row", "prompt", "output", "output_ids", "reward", "log_p", "log_q_proposal", "alpha_hat"}


# ------------------------------------------------------------------------------------------
# What a real checkpoint or a real user brings


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "deberta-v2"])
def test_any_model_can_be_weighed(kind):
    """Before anything is loaded: exact counts, from a model without storage. Wrong: a forward that needs numbers (a pad token in the
    config, experts chosen by value, relative positions) and ends the run."""
    bert = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = {
        "gpt2": lambda: transformers.GPT2Config(**GPT, vocab_size=40, pad_token_id=0),
        "mixtral": lambda: transformers.MixtralConfig(**LLAMA, vocab_size=40, num_local_experts=4),
        "deberta-v2": lambda: transformers.DebertaV2Config(**bert, vocab_size=40, relative_attention=True, pos_att_type=["p2c"]),
    }[kind]()
    config.num_labels = 1
    kinds = (AutoModelForSequenceClassification,) if kind == "deberta-v2" else (AutoModelForCausalLM, AutoModelForSequenceClassification)
    for auto in kinds:
        weights, trained, cache = brain.weigh(auto, config)
        assert weights == trained == sum(p.numel() for p in auto.from_config(config).parameters())
    assert cache == {"gpt2": 2 * 2 * 32, "mixtral": 2 * 2 * 2 * 8, "deberta-v2": 0}[kind] or kind == "mixtral" and cache == 0


def later(place):
    """What the cases below need beside `place`."""
    (place / "syntax.py").write_text("def f(:\n")
    (place / "imports.py").write_text("import nosuchmodule\n\ndef f(completions): return [0.0] * len(completions)\n")
    transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(place / "t5")
    write_rows(place / "sixth.jsonl", [{"prompt": f"q{i}:", "label": "a"} for i in range(5)] + [{"prompt": None, "label": "a"}] + [{"prompt": "q", "label": "b"}] * 9)
    (place / "nothing.jsonl").write_text("")
    write_rows(place / "pairs-of-messages.jsonl", [{"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}] * 3)
    (place / "cut").mkdir(exist_ok=True)
    (place / "cut" / "config.json").write_text('{"model": "mo')


HUMAN = dict(method="dpo", samples_per_prompt=None)
LATER = {
    "a model of another kind": (typed(model="t5"), "--model t5:"),
    "a function's file with a wrong syntax": (typed(reward_function="syntax.py:f", **FUNCTION), "--reward-function syntax.py:f:"),
    "a function's file that imports what is not there": (typed(reward_function="imports.py:f", **FUNCTION), "--reward-function imports.py:f:"),
    "a function that fails": (typed(reward_function="f.py:failing", **FUNCTION), "--reward-function f.py:failing:"),
    "a function that fails, over an older run": (typed(reward_function="f.py:short", output_dir="run", overwrite=True, **FUNCTION), "--reward-function f.py:short:"),
    "a directory below a file": (typed(output_dir="notes.txt/run"), "--output-dir notes.txt/run:"),
    "a model's directory": (typed(output_dir="model"), "--output-dir model:", "other files"),
    "a model's directory, though --overwrite": (typed(output_dir="model", overwrite=True), "--output-dir model:", "other files"),
    "resume what was cut": (typed(output_dir="cut", resume=True), "--resume:", "cut"),
    "no such pairs": (typed(pairs_dataset="nosuch.jsonl", **HUMAN), "--pairs-dataset nosuch.jsonl:"),
    "pairs without train": (typed(pairs_dataset="no-train", **HUMAN), "--pairs-dataset no-train:", "split train is missing"),
    "pairs that are none": (typed(pairs_dataset="data.jsonl", **HUMAN), "--pairs-dataset data.jsonl:", "'chosen'"),
    "pairs that lack the rejected": (typed(pairs_dataset="no-rejected.jsonl", **HUMAN), "--pairs-dataset no-rejected.jsonl:", "'rejected'"),
    "pairs of messages": (typed(pairs_dataset="pairs-of-messages.jsonl", **HUMAN), "chat template"),
    "the row of the file": (typed(dataset="sixth.jsonl"), "--dataset sixth.jsonl:", "row 6:", "'prompt'"),
    "no rows": (typed(dataset="nothing.jsonl"), "--dataset nothing.jsonl:", "no rows"),
    "no such tokenizer": (typed(model="no-tokenizer", tokenizer="nosuch"), "--tokenizer nosuch:"),
    "a seed too large for the toy": (["--seed", str(2**64), "--output-dir", "new"], "--seed"),
    "a long word in the toy": (["--max-new-tokens", "6", "--iterations", "0", "--output-dir", "new"], "--max-new-tokens 6:", "toy"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_more_bad_input(name, place, monkeypatch, capsys):
    """As `test_bad_input`. Wrong: a traceback, another flag's name, the row of a shuffled split, a directory made, or an older run
    replaced, before the user's function was tried once."""
    later(place)
    argv, *told = LATER[name]
    own = name in ("a function that fails", "a function's file with a wrong syntax", "a function's file that imports what is not there")
    refused(place, monkeypatch, capsys, argv, told, own_traceback=own)


def test_what_was_returned_is_shown_on_one_line():
    """Wrong: a tensor written out over many lines, or one column of rewards taken for another."""
    with pytest.raises(brain.UserError) as refusal:
        brain.RewardFunction(lambda completions: torch.zeros(3, 2), "f")("p", ["x", "y", "z"])
    assert "\n" not in str(refusal.value)


def test_names_in_the_readme():
    """The table of equations names what is in brain.py. Wrong: a function renamed in one place."""
    section = README[README.index("## Where the paper is") : README.index("`brain.py` numbers its departures")]
    names = {name for row in re.findall(r"^\|[^|]*\|[^|]*\|([^|]*)\|$", section, re.M)[2:] for name in re.findall(r"`([\w.]+)`", row)}
    assert {"brain_loss", "posterior_weights", "policy_weights", "train", "METHODS"} <= names
    for name in names:
        assert functools.reduce(getattr, name.split("."), brain) is not None


@pytest.mark.parametrize("module", sorted({words[2] for words in readme_commands() if words[:2] == ["python", "-m"]}))
def test_modules_of_the_readme(module):
    """Each takes --help. Wrong: a module renamed or missing."""
    found = subprocess.run([sys.executable, "-m", module, "--help"], cwd=HERE, capture_output=True, text=True)
    assert found.returncode == 0 and "usage" in found.stdout and module in found.stdout


def test_ones_own_model_reward_and_data_by_the_readmes_command(mine, tmp_path):
    """The README's line under its `torchrun`, as they stand, with directories for MODEL, REWARD_MODEL and DATA, and SMALL. Wrong: a flag renamed, a
    torchrun that ends, speaks twice or writes twice."""
    told = {" ".join(words[:2]): words for words in readme_commands() if words[-1] == "DATA"}
    words = told["python brain.py"][2:]
    scorer = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, vocab_size=10, num_labels=1, pad_token_id=0))
    loud(scorer, 8, 0.3).save_pretrained(tmp_path / "reward")
    transformers.AutoTokenizer.from_pretrained(mine / "model").save_pretrained(tmp_path / "reward")
    places = {"MODEL": mine / "model", "REWARD_MODEL": tmp_path / "reward", "DATA": mine / "data.jsonl"}
    arguments = [places.get(word, word) for word in words] + [*SMALL, "--max-new-tokens", "5", "--eval-prompts", "6", "--output-dir", tmp_path / "run"]
    (line,) = [words for words in readme_commands() if words[0] == "torchrun"]
    assert line[:2] == ["torchrun", "--nproc-per-node"] and line[3:] == ["brain.py", "..."]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", HERE / "brain.py"]
    process = command([*launcher, *arguments], tmp_path, tmp_path / "hf", "-m")
    assert process.returncode == 0, process.stderr
    assert len(re.findall("^run: ", process.stdout, re.M)) == 1 and process.stdout.count("  test  ") == 1
    metrics = json_lines(tmp_path / "run/metrics.jsonl")
    assert [(line["step"], line.get("split")) for line in metrics] == [(0, "validation"), (1, None), (2, None), (2, "validation"), (2, "test")]
    assert len(json_lines(tmp_path / "run/samples.jsonl")) == 4 * 5 and len(json_lines(tmp_path / "run/test_outputs.jsonl")) == 6


def test_the_toy_table_of_the_readme(toy_run):
    """The printed table. Prior and posterior are exact, so to the printed digits; the policy is trained in float32, whose last bits differ
    between machines and numbers of threads and, over 150 updates, decide some draws: within what seeds differ by. Wrong: an old table."""
    found, printed = table(toy_run[0].stdout), table(README)
    assert printed.keys() == set(LINES)
    for row, width in zip(LINES, (0.03, 0.15, 0.15, 2)):
        for place in (0, 2):
            assert printed[row][place] == pytest.approx(found[row][place], abs=2e-3)
        assert printed[row][1] == pytest.approx(found[row][1], abs=width)


def test_pictures_and_links_of_the_readme():
    """Wrong: a picture or a file that is not there; a placeholder."""
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (HERE / target).is_file(), target
    assert not re.findall(r"\b(?:TOYTIME|TOYTABLE|PICTURES|TIME_[A-Z]+)\b", README)


def test_help_says_each_default_once(capsys):
    """Wrong: argparse's own "(default: None)" behind ours: settings are None until they are typed."""
    with pytest.raises(SystemExit):
        brain.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text and not re.search(r"\(default: [^()]*\) \(default", text)


def test_pickled_code_in_an_adapter_does_not_run(hub, mine, tmp_path, capsys):
    """One line, as for any other checkpoint. Wrong: a traceback."""
    shutil.copytree(repository(hub, HH), tmp_path / "evil")
    torch.save({"weight": Payload(tmp_path / "ran")}, tmp_path / "evil/adapter_model.bin")
    evil = [*of_mine(mine), "--model", tmp_path / "evil", "--base-model", mine / "model", *SMALL, "--max-new-tokens", "3"]
    assert brain.main([*evil, "--output-dir", tmp_path / "run"]) == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists() and "Traceback" not in error
    assert f"brain: --model {tmp_path / 'evil'}: " in error


def test_an_adapter_of_another_architecture_is_refused(hub, tmp_path, capsys):
    """Its weights find no place in this base; peft leaves them out with a warning, and the prior would be the base alone. Wrong: that."""
    with at_hub(hub):
        gptj = ["--model", HH, "--base-model", SFT, "--tokenizer", GPTJ, "--max-new-tokens", "12", *SMALL]
        assert brain.main([*gptj, "--output-dir", tmp_path / "run"]) == 2
    assert f"brain: --model {HH}: " in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_plan_counts_the_adapter_that_is_copied(hub, mine, no_report, tmp_path, capsys):
    """The policy's adapter is on the layers of the prior's, of which QLoRA takes all. Wrong: peft's own choice of layers counted."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=2, target_modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(mine / "model"), lora)
    model.save_pretrained(tmp_path / "adapter")
    adapter = ["--model", tmp_path / "adapter", "--base-model", mine / "model", "--iterations", "0", "--eval-prompts", "2"]
    assert brain.main([*of_mine(mine), *adapter, "--max-new-tokens", "3", "--output-dir", tmp_path / "run"]) == 0
    saved = safetensors.torch.load_file(tmp_path / "run/model/adapter_model.safetensors")
    assert f"adapter of rank 4: {sum(w.numel() for w in saved.values()):,} weights" in capsys.readouterr().out


def test_a_sound_run_is_silent(summarisation):
    """Wrong: a library's warning on stderr each time a model is saved, or a look for a config on the network."""
    assert summarisation[0].stderr == ""
