"""toy/theorems.py: all claims hold for brain.py, and a claim fails for each mistake here.

A check that nothing can fail shows nothing. So each mathematical function of brain.py, what a policy scores
and draws, and the settings of the methods are replaced by a plausible mistake, one at a time.
"""

import pytest
import torch

import brain
from toy import theorems


def test_every_claim_holds(capsys):
    assert theorems.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines[2:])
    assert last.startswith(f"All {len(lines) - 2} claims hold") and len(lines) >= 60


def test_an_unknown_claim_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        theorems.main(["--only", "Theorem 9"])
    assert stop.value.code == 2 and "Theorem 4.2" in capsys.readouterr().err


loss, good, right_dpo = brain.brain_loss, brain.log_goodness, brain.dpo_loss
log_prob, sample, create = brain.Policy.log_prob, brain.Policy.sample, brain.Policy.__init__


def reversed_kl(log_q, log_q_proposal, alpha_hat, baseline=True):
    log_beta = (log_q - log_q_proposal).log_softmax(-1)
    return (log_beta.exp() * (log_beta - alpha_hat.log())).sum(-1).mean()


def overflows(log_p, log_q_proposal, log_good):
    alpha = (log_p - log_q_proposal + log_good).exp()
    return alpha / alpha.sum(-1, keepdim=True)


def without_end_tokens(policy, prompt, outputs, prior=False):
    return log_prob(policy, prompt, [o[:-1] if o[-1] == 0 and len(o) > 1 else o for o in outputs], prior)


def per_token(policy, prompt, outputs, prior=False):
    return log_prob(policy, prompt, outputs, prior) / torch.tensor([len(output) for output in outputs])


def with_dropout(policy, *arguments, **settings):
    create(policy, *arguments, **settings)
    policy.model.train()


def logistic(log_sigmoid):
    return lambda r, model="bradley-terry", beta=1.0: (log_sigmoid(r) if model == "logistic" else r) / beta


WRONG = {  # what is wrong: (name in brain, the wrong version, a claim that must fail)
    "no baseline": ("brain_loss", lambda q, q1, a, b=True: loss(q, q1, a, False), "Theorem 4.2"),
    "baseline=False ignored": ("brain_loss", lambda q, q1, a, b=True: loss(q, q1, a), "12-14"),
    "brain_loss the other way round": ("brain_loss", reversed_kl, "Theorem 4.2"),
    "no log q'": ("brain_loss", lambda q, q1, a, b=True: loss(q, 0 * q1, a, b), "Theorem 4.2"),
    "alpha_hat without importance weights": ("posterior_weights", lambda p, q1, g: g.softmax(-1), "5.1"),
    "p and q' exchanged": ("posterior_weights", lambda p, q1, g: (q1 - p + g).softmax(-1), "Theorem 4.2"),
    "no prior": ("posterior_weights", lambda p, q1, g: (g - q1).softmax(-1), "Theorem 7.1"),
    "alpha_hat not normalised": ("posterior_weights", lambda p, q1, g: (p - q1 + g).exp(), "Eq. 15"),
    "alpha_hat that overflows": ("posterior_weights", overflows, "Proposition 5.1"),
    "beta_hat upside down": ("policy_weights", lambda q, q1: (q1 - q).softmax(-1), "12-14"),
    "beta_hat without q'": ("policy_weights", lambda q, q1: q.softmax(-1), "Algorithm 1"),
    "0 log 0 = nan": ("self_normalized_kl", lambda a, b: (a * (a / b).log()).sum(-1), "Theorem 6.1"),
    "KL the other way round": ("self_normalized_kl", lambda a, b: (b * (b / a).log()).sum(-1), "12-14"),
    "log of a sigmoid that underflows": ("log_goodness", logistic(lambda r: r.sigmoid().log()), "Eq. 15"),
    "logistic always": ("log_goodness", lambda r, m="", b=1.0: good(r, "logistic", b), "7.1"),
    "beta ignored": ("log_goodness", lambda r, m="bradley-terry", b=1.0: good(r, m), "Theorem 7.1"),
    "beta upside down": ("log_goodness", lambda r, m="bradley-terry", b=1.0: good(r, m, 1 / b), "7.1"),
    "elbo without the goodness": ("elbo", lambda p, q, g: (p - q).mean(-1), "Evidence"),
    "elbo as a sum": ("elbo", lambda p, q, g: (p + g - q).sum(-1), "Evidence"),
    "log_evidence without log n": ("log_evidence", lambda p, q, g: (p + g - q).logsumexp(-1), "Evidence"),
    "DPO with beta ignored": ("dpo_loss", lambda w, l, pw, pl, beta=1.0: right_dpo(w, l, pw, pl), "6.1"),
    "DPO with the pair exchanged": ("dpo_loss", lambda w, l, p, q, beta: right_dpo(l, w, q, p, beta), "6.1"),
    "end token not scored": ("Policy.log_prob", without_end_tokens, "Section 3"),
    "mean over tokens": ("Policy.log_prob", per_token, "Section 3"),
    "policy for prior": ("Policy.log_prob", lambda self, x, y, prior=False: log_prob(self, x, y), "4.2"),
    "dropout left on": ("Policy.__init__", with_dropout, "Algorithm 1"),
    "samples of the prior": ("Policy.sample", lambda *a, **k: sample(*a, **k | {"prior": True}), "Section 3"),
    "ESS of another definition": ("effective_sample_size", lambda w: 1 / w.amax(-1) ** 2, "Algorithm 1"),
    "pairs (i, i + n/2)": ("Method.grouped", lambda self, x: x.reshape(self.group_size, -1).T, "Theorem 6.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_version_fails(name, monkeypatch, capsys):
    where, wrong, only = WRONG[name]
    *owner, attribute = where.split(".")
    monkeypatch.setattr(getattr(brain, owner[0]) if owner else brain, attribute, wrong)
    assert theorems.main(["--only", only]) == 1 and "FAIL" in capsys.readouterr().out
