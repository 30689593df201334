"""toy/real.py: it estimates the truth of an enumerated world, and its table is what was measured."""

import dataclasses
import importlib.util
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import transformers

import brain
from toy import real
from toy.real import BETA, QUICK, R_MAX, Truth
from toy.world import Toy, chance_to_win, kl, posterior


# ------------------------------------------------------------------------------- against enumeration
@pytest.fixture(scope="module")
def known():
    """A world in which all is known: (toy, rewards, log g, the Truth of its prompts from 6,000 draws each).
    Rewards are moved and scaled so that the largest one of a prompt is R_MAX."""
    toy = Toy(3, letters=3, length=3, prompts=6, spread=2.0)
    reward = R_MAX + BETA * (toy.world.reward - toy.world.reward.max(-1, keepdims=True))
    random, truths = np.random.default_rng(0), []
    for x, prompt in enumerate(toy.world.prompts):
        drawn = random.choice(reward.shape[1], 6000, p=np.exp(toy.log_p[x]))
        outputs = [torch.tensor(toy.world.outputs[i]) for i in drawn]
        accepted = random.random(6000) < np.exp((reward[x, drawn] - R_MAX) / BETA)
        example = brain.Example(x, toy.world.text(prompt), torch.tensor(prompt), None, None, {})
        texts = [toy.world.text(output.tolist()) for output in outputs]
        truths.append(Truth(example, outputs, texts, reward[x, drawn], toy.log_p[x, drawn], accepted))
    return toy, reward, (reward - R_MAX) / BETA, truths


def test_truth_is_that_of_an_enumerated_world(known):
    """Catches: log p(G=1|x) left out or not a mean, weights that forget g, draws accepted that should not be,
    the reverse KL. Tolerance: four standard errors of 6 x 6,000 draws, which repeated draws show."""
    toy, reward, log_good, truths = known
    exact = posterior(toy.log_p, log_good)
    for x, truth in enumerate(truths):
        z = (np.exp(toy.log_p[x]) * np.exp(log_good[x])).sum()
        error = np.exp(truth.log_good).std() / np.sqrt(6000)
        assert abs(np.exp(truth.log_z) - z) < 4 * error
        assert abs(truth.accepted.mean() - z) < 4 * np.sqrt(z * (1 - z) / 6000)
        divergence, mean = kl(exact[x], toy.log_p[x]), (np.exp(exact[x]) * reward[x]).sum()
        apart = np.exp(exact[x]) * (reward[x] - mean) ** 2
        # A weighted mean has the variance E_p[(weight (r - mean))^2] / N, one of accepted draws the usual.
        errors = {"weighting": (apart * np.exp(log_good[x]) / z).sum() / 6000}
        errors |= {"rejection": apart.sum() / truth.accepted.sum()}
        for way, variance in errors.items():
            assert abs(truth.mean(truth.reward, way) - mean) < 4 * np.sqrt(variance)
            # The errors of the mean of log g, and of log p(G=1|x).
            spread = np.sqrt(variance) / BETA + np.sqrt((1 - z) / z / 6000)
            assert abs(truth.kl_prior(way) - divergence) < 4 * spread
        assert divergence > 0.2 and abs(divergence - kl(toy.log_p[x], exact[x])) > 0.05
    assert truths[0].weights.sum() == pytest.approx(1)


@dataclasses.dataclass
class Known:
    """A policy whose log-probabilities are a table: no network stands between the two computations."""

    toy: Toy
    log_q: np.ndarray  # (X, Y)

    def log_prob(self, prompt_ids, outputs):
        x = next(i for i, prompt in enumerate(self.toy.world.prompts) if (prompt == prompt_ids.numpy()).all())
        columns = [self.toy.world.index[tuple(output.tolist())] for output in outputs]
        return torch.tensor(self.log_q[x, columns])


def test_distance_of_a_policy_is_that_of_an_enumerated_world(known):
    """Catches: KL(policy || posterior), log q of the wrong draws, the prior's KL left out. For the posterior
    itself it is zero."""
    toy, _, log_good, truths = known
    exact = posterior(toy.log_p, log_good)
    other = posterior(toy.log_p, log_good[:, ::-1])  # a policy that is far from both
    for log_q in (exact, posterior(toy.log_p, 0.5 * log_good), other):
        found = real.distance(Known(toy, log_q), truths)
        expected = kl(exact, log_q).mean()
        # 16 resampled draws of 6 prompts, and about 6 x 6,000 x acceptance of them.
        ratio = (np.exp(exact) * (toy.log_p - log_q - kl(exact, log_q)[:, None]) ** 2).sum(-1).mean() ** 0.5
        assert abs(found["kl_posterior"][0] - expected) < 0.05 + 3 * ratio / np.sqrt(16 * 6)
        count = sum(truth.accepted.sum() for truth in truths)
        assert abs(found["kl_posterior_rejection"][0] - expected) < 0.05 + 4 * ratio / np.sqrt(count)
    assert abs(kl(other, exact).mean() - kl(exact, other).mean()) > 0.3


def test_resampled_draws_stand_for_the_weighted_ones(known):
    """Catches: draws resampled without their weights, which here moves the mean by 0.1 and more."""
    for truth in known[3]:
        picked = truth.resampled(4000)
        assert truth.reward[picked].mean() == pytest.approx(truth.mean(truth.reward, "weighting"), abs=0.01)
        assert abs(truth.reward.mean() - truth.mean(truth.reward, "weighting")) > 0.1


def test_own_numbers_are_those_of_an_enumerated_world(known):
    """Catches: elbo without beta, KL(it || posterior) from the wrong normaliser, ties that rounding loses."""
    toy, reward, log_good, truths = known
    policy = brain.Policy(toy.model, toy.tokenizer)
    log_q = toy.log_p  # untrained
    index = {toy.world.text(output): i for i, output in enumerate(toy.world.outputs)}
    rows = {truth.example.prompt: truth.example.row for truth in truths}

    def score(prompt, outputs, columns):
        return torch.tensor([reward[rows[prompt], index[text]] for text in outputs])

    plan = dataclasses.replace(QUICK, own_draws=400, tokens=3)
    numbers, firsts = real.own_numbers(policy, score, truths, plan)
    exact = {
        "elbo": (np.exp(log_q) * log_good).sum(-1),
        "reward": (np.exp(log_q) * reward).sum(-1),
        "kl_back": kl(log_q, posterior(toy.log_p, log_good)),
        "kl_to_prior": np.zeros(6),
        "win_rate": 100 * chance_to_win(log_q, toy.log_p, reward),
    }
    spread = np.sqrt((np.exp(log_q) * (log_good - exact["elbo"][:, None]) ** 2).sum(-1).mean() / (400 * 6))
    allowed = {"elbo": 4 * spread, "kl_back": 4 * spread, "reward": 4 * spread * BETA}
    allowed |= {"kl_to_prior": 1e-4, "win_rate": 5}
    for name, values in exact.items():
        assert abs(numbers[name][0] - values.mean()) < allowed[name], name
    assert 0 < numbers["gap"][0] < numbers["kl_back"][0] + 4 * spread  # a lower bound
    assert len(firsts) == 6


def test_divergence_and_win_rate_by_hand():
    """Catches: groups that are not normalised, KL the other way round, ties that count whole."""
    log_good, log_beta = np.log([0.1, 0.3, 0.5, 0.5]), np.log([2.0, 2.0, 1.0, 3.0])
    by_hand = (0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)) / 2
    by_hand += (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert real.divergence(log_good, log_beta, 2) == pytest.approx(by_hand)
    alpha, beta = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    first = brain.self_normalized_kl(alpha, beta).item()
    assert real.divergence(log_good[:2], log_beta[:2], 2) == pytest.approx(first)
    weights = np.array([0.25, 0.75])
    # 1 wins against 0, ties with 1, loses against 2: 1.5 of 3. 2 wins twice and ties: 2.5 of 3.
    won = real.win_rate(np.array([1.0, 2.0]), weights, np.array([0.0, 1.0, 2.0]))
    assert won == pytest.approx(100 * (0.25 * 1.5 + 0.75 * 2.5) / 3)


def test_held_out_topics_are_not_trained_on():
    """Catches: prompts held out, but their topics trained on in another form."""
    prompts = real.prompts_of(real.Plan())
    assert [len(prompts[split]) for split in ("train", "validation", "test")] == [240, 8, 16]
    topics = []
    for found in prompts.values():
        topics.append({topic for topic in real.TOPICS if any(topic in x[0]["content"] for x in found)})
    assert sum(map(len, topics)) == len(set.union(*topics)) == 72


# ------------------------------------------------------------------------------- the whole, small
class StandIn:
    """For a trainer of trl, where trl is not installed: plain REINFORCE on the same arguments."""

    def __init__(self, model, reward_funcs, args, callbacks, processing_class, train_dataset, peft_config):
        import peft

        self.model = peft.get_peft_model(model, peft_config)
        self.f, self.args, self.callbacks, self.tokenizer = reward_funcs, args, callbacks, processing_class
        self.prompts = list(train_dataset["prompt"])

    def remove_callback(self, kind):
        assert kind is transformers.PrinterCallback

    def train(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.args.learning_rate)
        state = types.SimpleNamespace(global_step=0)
        self.callbacks[0].on_train_begin()
        for step in range(self.args.max_steps):
            prompt = self.prompts[step % len(self.prompts)]
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])
            rewards = self.f(prompts=[prompt], completions=[[{"role": "assistant", "content": " good"}]])
            (-self.model(input_ids=ids).logits.log_softmax(-1)[0, -1, 5] * (1 + rewards[0])).backward()
            optimizer.step()
            state.global_step += 1
            self.callbacks[0].on_step_end(self.args, state, None)


@pytest.fixture
def packages(monkeypatch):
    """A stand-in for vaderSentiment, which finds no word in random letters, and for trl where it is missing.
    """
    score = lambda text: {"compound": math.cos(sum(map(ord, text)))}  # noqa: E731
    inner = types.SimpleNamespace(
        SentimentIntensityAnalyzer=lambda: types.SimpleNamespace(polarity_scores=score)
    )
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.SimpleNamespace(vaderSentiment=inner))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", inner)
    monkeypatch.delattr(real.analyzer, "made", raising=False)
    if importlib.util.find_spec("trl") is None:
        kinds = {name: StandIn for name in ("RLOOTrainer", "GRPOTrainer")}
        kinds |= {name: types.SimpleNamespace for name in ("RLOOConfig", "GRPOConfig")}
        monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(**kinds))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama whose words are letters, with a chat template."""
    import tokenizers

    path = tmp_path_factory.mktemp("model")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .?-'"
    vocab = {"<end>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<end>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    ends = dict(eos_token="<end>", pad_token="<end>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(vocab), eos_token_id=0, initializer_range=0.2, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(model, folder, *more):
    return real.main(["--quick", "--model", str(model), "--figures", str(folder), *more])


def test_the_whole_comparison_is_what_was_measured(packages, model, tmp_path, capsys, monkeypatch):
    """Catches: a table of other runs, another seed's mean, a rate that is not the best one, numbers of
    validation topics in the table of the test topics, a finished run that is run again."""
    methods = ["brain", "rso", "trl-rloo", "trl-grpo-unscaled"]
    assert run(model, tmp_path, "--methods", *methods) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "real.json").read_text())
    assert (tmp_path / "real.png").stat().st_size > 10_000
    runs = found["runs"]
    assert len(runs) == len(methods) * (len(QUICK.rates) + len(QUICK.seeds))
    table = printed[printed.index("Test topics") :].splitlines()
    for method in methods:
        search = [run for run in runs if run["method"] == method and run["split"] == "validation"]
        assert len({run["points"][-1]["kl_posterior"][0] for run in search}) == len(QUICK.rates)
        best = min(search, key=lambda run: run["points"][-1]["kl_posterior"][0])["rate"]
        final = [run for run in runs if run["method"] == method and run["split"] == "test"]
        assert [(run["rate"], run["seed"]) for run in final] == [(best, seed) for seed in QUICK.seeds]
        assert [point["outputs"] for point in final[0]["points"]] == list(QUICK.checkpoints)
        row = f"  {method}, {QUICK.checkpoints[-1]} outputs, rate {best:g} "
        cells = next(line for line in table if line.startswith(row)).removeprefix(row).split()
        assert int(cells[0]) == len(QUICK.seeds)
        for name, cell in zip(real.NAMES, cells[1:], strict=True):
            mean = np.mean([run["end"][name][0] for run in final])
            assert float(cell) == pytest.approx(mean, abs=0.0006, nan_ok=True), (method, name)
    stored = torch.load(tmp_path / "draws-test.pt", weights_only=True)
    good = [np.exp((x["reward"].numpy() - R_MAX) / BETA) for x in stored]
    acceptance = np.mean([x.mean() for x in good])
    assert found["truth"]["test"]["acceptance_weighting"][0] == pytest.approx(acceptance)
    by_hand = [(g / g.sum() * np.log(g)).sum() - np.log(g.mean()) for g in good]
    assert found["prior"]["kl_posterior"][0] == pytest.approx(np.mean(by_hand))
    assert found["posterior"]["kl_to_prior"][0] == pytest.approx(np.mean(by_hand))
    first = found["examples"][0]
    assert first["prior"] == [stored[0]["texts"][0], pytest.approx(float(stored[0]["reward"][0]))]
    monkeypatch.setattr(real, "run_job", None)  # nothing is left to run
    assert run(model, tmp_path, "--methods", *methods) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == printed.splitlines()[-5:]


def test_prior_and_trained_policy_are_told_apart(packages, model, tmp_path):
    """Catches: a trainer's adapter that never reaches the policy that is measured, or reaches it at the wrong
    checkpoint: the copy must give the trainer's own log-probabilities."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    arguments = types.SimpleNamespace(model=model, tokenizer=tokenizer)
    source, target = (real.new_policy(arguments, QUICK, seed) for seed in (0, 1))
    for parameter in source.parameters().values():
        parameter.data.normal_()
    ids, outputs = torch.tensor([1, 2, 3]), [torch.tensor([4, 5]), torch.tensor([6, 0])]
    before = target.log_prob(ids, outputs)
    real.copy_adapter(source.model, "policy", target.model, "policy")
    torch.testing.assert_close(target.log_prob(ids, outputs), source.log_prob(ids, outputs))
    assert (target.log_prob(ids, outputs) - before).abs().max() > 1e-3


# ------------------------------------------------------------------------------- bad input
def test_bad_input_ends_in_one_line(packages, model, tmp_path, capsys, monkeypatch):
    """Catches: results of two comparisons in one file, a model that cannot chat, a rejection that is wrong
    because a reward is above the maximum, a traceback for a package that is missing."""
    folder = tmp_path / "done"
    assert run(model, folder, "--methods", "dpo-sft") == 0
    before = (folder / "real.json").read_bytes()
    capsys.readouterr()
    other = tmp_path / "other"
    bare = transformers.AutoTokenizer.from_pretrained(model)
    bare.chat_template = None
    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(other)
    bare.save_pretrained(other)
    assert run(other, tmp_path / "x") == 2
    assert "has no chat template" in capsys.readouterr().err
    assert real.main(["--model", str(model), "--figures", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "another topics, tokens" in error and "name another directory" in error and error.count("\n") == 1
    assert (folder / "real.json").read_bytes() == before
    assert run(tmp_path / "nowhere", tmp_path / "x") == 2
    assert "--model" in capsys.readouterr().err
    monkeypatch.setattr(real, "R_MAX", -2.0)
    assert run(model, tmp_path / "x") == 2
    assert "R_MAX" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    assert run(model, tmp_path / "y") == 2
    assert "pip install vaderSentiment trl" in capsys.readouterr().err
