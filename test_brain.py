"""The claims of brain.py, each a test, in the order of that file.

A docstring names the wrong version that its test catches. What can be enumerated is enumerated, in float64,
by code that shares nothing with what it checks: numpy, toy/world.py, plain Hugging Face forwards.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches out

import numpy as np
import pytest
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
