"""toy/theorems.py: all claims hold for brain.py as it is, and a line fails for each way here of getting it wrong.

A check that nothing can fail shows nothing: so every mathematical function of brain.py, what a policy scores and
draws, and the settings of the methods are replaced by a plausible mistake, one at a time.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brain  # noqa: E402
from toy import theorems  # noqa: E402


def test_every_claim_holds(capsys):
    assert theorems.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines)
    assert last.startswith(f"all {len(lines)} hold") and len(lines) >= 50


def test_an_unknown_claim_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        theorems.main(["--only", "Theorem 9"])
    assert stop.value.code == 2 and "Theorem 4.2" in capsys.readouterr().err


brain_loss, log_goodness, rejection_sample = brain.brain_loss, brain.log_goodness, brain.rejection_sample
log_prob, sample, create = brain.Policy.log_prob, brain.Policy.sample, brain.Policy.__init__


def reversed_kl(log_q, log_q_proposal, alpha_hat, baseline=True):
    if not baseline:
        return brain_loss(log_q, log_q_proposal, alpha_hat, False)
    log_beta = (log_q - log_q_proposal).log_softmax(-1)
    return (log_beta.exp() * (log_beta - alpha_hat.log())).sum(-1).mean()


def without_end_tokens(policy, prompt, outputs, prior=False):
    return log_prob(policy, prompt, [o[:-1] if o[-1] == 0 and len(o) > 1 else o for o in outputs], prior)


def per_token(policy, prompt, outputs, prior=False):
    return log_prob(policy, prompt, outputs, prior) / torch.tensor([len(output) for output in outputs])


def with_dropout(policy, *arguments, **settings):
    create(policy, *arguments, **settings)
    policy.model.train()


def with_replacement(goodness, n, generator=None):
    chance = (goodness - goodness.max()).exp()
    return torch.multinomial(chance, n, True, generator=generator)


def strictly_higher(rewards, gold):
    won = (torch.as_tensor(rewards) > torch.as_tensor(gold)).double().mean().item()
    return 100 * won, 196 * (won * (1 - won) / len(rewards)) ** 0.5


def narrow(rewards, gold, right=brain.win_rate):
    rate, half = right(rewards, gold)
    return rate, half * 1.645 / 1.96


WRONG = {  # what is wrong: (name in brain, the wrong version, a claim that must fail)
    "brain_loss without its baseline": ("brain_loss", lambda q, q1, a, baseline=True: brain_loss(q, q1, a, False), "Theorem 4.2"),
    "brain_loss with baseline=False ignored": ("brain_loss", lambda q, q1, a, baseline=True: brain_loss(q, q1, a), "12-14"),
    "brain_loss the other way round": ("brain_loss", reversed_kl, "Theorem 4.2"),
    "brain_loss divided by n": ("brain_loss", lambda q, q1, a, baseline=True: brain_loss(q, q1, a, baseline) / a.shape[-1], "12-14"),
    "brain_loss without log q'": ("brain_loss", lambda q, q1, a, baseline=True: brain_loss(q, 0 * q1, a, baseline), "Theorem 4.2"),
    "brain_loss with log q' added": ("brain_loss", lambda q, q1, a, baseline=True: brain_loss(q, -q1, a, baseline), "Algorithm 1"),
    "alpha_hat without importance weights": ("posterior_weights", lambda p, q1, g: g.softmax(-1), "Proposition 5.1"),
    "alpha_hat without importance weights, in the theorem": ("posterior_weights", lambda p, q1, g: g.softmax(-1), "Theorem 4.2"),
    "alpha_hat with p and q' exchanged": ("posterior_weights", lambda p, q1, g: (q1 - p + g).softmax(-1), "Theorem 4.2"),
    "alpha_hat without the prior": ("posterior_weights", lambda p, q1, g: (g - q1).softmax(-1), "Theorem 7.1"),
    "alpha_hat not normalised": ("posterior_weights", lambda p, q1, g: (p - q1 + g).exp(), "Eq. 29, 33"),
    "alpha_hat that overflows": ("posterior_weights", lambda p, q1, g: (a := (p - q1 + g).exp()) / a.sum(-1, keepdim=True), "Proposition 5.1"),
    "beta_hat upside down": ("policy_weights", lambda q, q1: (q1 - q).softmax(-1), "12-14"),
    "beta_hat without q'": ("policy_weights", lambda q, q1: q.softmax(-1), "Algorithm 1"),
    "0 log 0 = nan": ("self_normalized_kl", lambda a, b: (a * (a / b).log()).sum(-1), "Theorem 6.1"),
    "self_normalized_kl the other way round": ("self_normalized_kl", lambda a, b: (b * (b / a).log()).sum(-1), "12-14"),
    "logistic goodness without its logarithm": ("log_goodness", lambda r, m="bradley-terry": r.sigmoid() if m == "logistic" else r, "Eq. 15"),
    "log of a sigmoid that underflows": ("log_goodness", lambda r, m="bradley-terry": r.sigmoid().log() if m == "logistic" else r, "Eq. 15"),
    "Bradley-Terry taken for logistic": ("log_goodness", lambda r, m="": log_goodness(r, "logistic"), "Theorem 7.1"),
    "half the reward": ("log_goodness", lambda r, m="bradley-terry": log_goodness(r / 2, m), "Theorem 4.2"),
    "DPO at beta = 0.1": ("dpo_loss", lambda w, l, pw, pl: -F.logsigmoid(0.1 * (w - pw - l + pl)).mean(), "Theorem 6.1"),
    "DPO at beta = 0.1 on human pairs": ("dpo_loss", lambda w, l, pw, pl: -F.logsigmoid(0.1 * (w - pw - l + pl)).mean(), "Section 6"),
    "DPO with the pair exchanged": ("dpo_loss", lambda w, l, pw, pl: -F.logsigmoid(l - pl - w + pw).mean(), "Theorem 6.1"),
    "DPO without its reference": ("dpo_loss", lambda w, l, pw, pl: -F.logsigmoid(w - l).mean(), "Theorem 6.1"),
    "end token not scored": ("Policy.log_prob", without_end_tokens, "Section 3"),
    "end token not scored, in the theorem": ("Policy.log_prob", without_end_tokens, "Theorem 4.2"),
    "mean over tokens": ("Policy.log_prob", per_token, "Eq. 8-9"),
    "the policy for the prior": ("Policy.log_prob", lambda policy, x, y, prior=False: log_prob(policy, x, y), "Theorem 4.2"),
    "dropout left on": ("Policy.__init__", with_dropout, "Algorithm 1"),
    "samples of the prior": ("Policy.sample", lambda *a, **k: sample(*a, **k | {"prior": True}), "Section 3"),
    "ESS of another definition": ("effective_sample_size", lambda w: 1 / w.amax(-1) ** 2, "Algorithm 1"),
    "pairs (i, i + n/2)": ("Method.grouped", lambda self, x: x.reshape(self.group_size, -1).T, "Theorem 6.1"),
    "ties lost": ("win_rate", strictly_higher, "Win-rate"),
    "90% intervals": ("win_rate", narrow, "Tables"),
    "the first n candidates": ("rejection_sample", lambda g, n, generator=None: torch.arange(n), "RSO"),
    "the best n candidates": ("rejection_sample", lambda g, n, generator=None: g.topk(n).indices, "RSO"),
    "candidates put back": ("rejection_sample", with_replacement, "RSO"),
    "half the candidates forgotten": ("rejection_sample", lambda g, n, generator=None: rejection_sample(g[: max(n, len(g) // 2)], n, generator), "RSO"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_version_fails(name, monkeypatch, capsys):
    where, wrong, only = WRONG[name]
    *owner, attribute = where.split(".")
    monkeypatch.setattr(getattr(brain, owner[0]) if owner else brain, attribute, wrong)
    assert theorems.main(["--only", only]) == 1
    assert "FAIL" in capsys.readouterr().out


SETTINGS = {  # method, what is set wrongly, a claim that must fail
    "dpo-sft over all n": ("dpo-sft", {"group_size": None}, "Theorem 6.1"),
    "dpo-sft with softmax": ("dpo-sft", {"argmax": False}, "Section 6"),
    "dpo-sft without baseline": ("dpo-sft", {"baseline": False}, "Theorem 6.1"),
    "dpo with rewards for labels": ("dpo", {"source": "prior"}, "Section 6"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting_fails(name, monkeypatch, capsys):
    method, change, only = SETTINGS[name]
    monkeypatch.setitem(brain.METHODS, method, dataclasses.replace(brain.METHODS[method], **change))
    assert theorems.main(["--only", only]) == 1
    assert "FAIL" in capsys.readouterr().out
