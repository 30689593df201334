"""A world small enough to know everything about it: the answer key, in numpy float64.

Prompts are short words, outputs are words of at most `length` letters. An output ends with the end token, or
is cut after `length` letters. Both are outcomes, and there are finitely many. So prior, posterior, D_n and
their gradients are sums over a list. Nothing is imported from `brain`: the two share no code.
"""

import itertools

import numpy as np

END = 0  # id of the end token; letters are 1 .. A


# ------------------------------------------------------------------ exact quantities of a list
def log_normalize(x):
    """x - log sum exp x along the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def posterior(log_p, log_goodness):
    """log p(y|x, G=1) of every output (eq. 1): prior times goodness over its sum. (..., Y)."""
    return log_normalize(log_p + log_goodness)


def kl(log_a, log_b):
    """D_KL(a || b) in nats, along the last axis."""
    a = np.exp(log_a)
    return np.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)


def chance_to_win(log_q, log_gold, reward):
    """P(r(y) > r(gold)) + P(r(y) = r(gold)) / 2 for y ~ q and gold ~ gold, both (X, Y). -> (X,)."""
    wins = np.empty(len(log_q))
    for x, r in enumerate(reward):
        order = np.argsort(r)
        below = np.concatenate([[0.0], np.cumsum(np.exp(log_gold[x])[order])])
        lower = below[np.searchsorted(r[order], r, "left")]
        upper = below[np.searchsorted(r[order], r, "right")]
        wins[x] = (np.exp(log_q[x]) * (lower + upper) / 2).sum()
    return wins


def _tuples(log_target, log_q, log_proposal, n):
    """Every n-tuple of outputs: ids (T, n), probability under q' (T,), alpha_hat (T, n), beta_hat (T, n)."""
    ids = np.array(list(itertools.product(range(len(log_target)), repeat=n)))
    chance = np.exp(log_proposal[ids].sum(-1))
    ids, chance = ids[chance > 0], chance[chance > 0]  # tuples that q' never draws
    alpha = np.exp(log_normalize(log_target[ids] - log_proposal[ids]))  # eq. 6
    beta = np.exp(log_normalize(log_q[ids] - log_proposal[ids]))  # eq. 11
    return ids, chance, alpha, beta


def d_n(log_target, log_q, log_proposal, n):
    """D_n of Definition 4.1 (eq. 13-14) in nats. Each argument is (Y,). q' must draw all that target has."""
    _, chance, alpha, beta = _tuples(log_target, log_q, log_proposal, n)
    return float((chance * (alpha * (np.log(alpha) - np.log(beta))).sum(-1)).sum())


def d_n_coefficients(log_target, log_q, log_proposal, n):
    """c (Y,) with grad D_n = sum_y c_y grad log q(y): minus the expectation of eq. 12, summed by output.

    The c sum to zero, so for a tabular policy q = softmax(logits) c itself is the gradient in its logits.
    """
    ids, chance, alpha, beta = _tuples(log_target, log_q, log_proposal, n)
    c = np.zeros(len(log_target))
    np.add.at(c, ids, chance[:, None] * (beta - alpha))
    return c


# ------------------------------------------------------------------------------- the world
class World:
    """Prompts, all outputs and their rewards.

    letters  A, the size of the alphabet (at most 25)
    length   L: an output holds at most L letters; it is the run's --max-new-tokens
    prompts  X, how many two-letter prompts (at most A * A)
    spread   standard deviation of the reward under a prior, mean over prompts, set by `fit`
    """

    def __init__(self, letters=8, length=4, prompts=16, spread=2.0, seed=0):
        random = np.random.default_rng(seed)
        self.letters, self.length, self.spread, self.seed = letters, length, spread, seed
        pairs = np.array(list(itertools.product(range(1, letters + 1), repeat=2)))
        self.prompts = pairs[random.permutation(len(pairs))[:prompts]]  # (X, 2) ids
        # All outputs, in the order of `log_probs`: those of 0, 1, .. L-1 letters that ended, then the rest.
        words = [list(itertools.product(range(1, letters + 1), repeat=size)) for size in range(length + 1)]
        self.outputs = [word + (END,) for size in words[:-1] for word in size] + words[-1]  # Y tuples of ids
        self.index = {output: i for i, output in enumerate(self.outputs)}
        self.reward = self._rewards(random)  # (X, Y)

    def _rewards(self, random):
        """A taste for pairs of neighbouring letters, some of it the prompt's own: (X, Y)."""
        taste = random.normal(size=(self.letters + 1,) * 2)
        own = random.normal(size=(len(self.prompts), self.letters + 1))
        padded = np.array([output + (-1,) * (self.length - len(output)) for output in self.outputs])
        reward, before = 0.0, np.repeat(self.prompts[:, -1:], len(padded), 1)  # (X, Y): the letter before
        for letter in padded.T:
            reward = reward + np.where(letter >= 0, taste[before, letter] + own[:, letter], 0.0)
            before = np.repeat(letter[None], len(own), 0)
        return reward

    def fit(self, log_p):
        """Shift and scale the rewards to mean 0 and standard deviation `spread` under the prior (X, Y)."""
        p = np.exp(log_p)
        self.reward = self.reward - (p * self.reward).sum(-1, keepdims=True)
        self.reward *= self.spread / np.sqrt((p * self.reward**2).sum(-1).mean())
        return self

    # ---------------------------------------------------------------- from a model to its distribution
    def log_probs(self, model):
        """(X, Y) log-probability of every output under a causal LM, in float64.

        These are plain forwards of whole sequences. Every word of L - 1 letters is one row, and its positions
        hold the next-token distributions after all of its beginnings.
        """
        import torch

        A, L = self.letters, self.length
        words = np.array(list(itertools.product(range(1, A + 1), repeat=L - 1))).reshape(A ** (L - 1), L - 1)
        result = []
        with torch.no_grad():
            for prompt in self.prompts:
                rows = np.concatenate([np.tile(prompt, (len(words), 1)), words], 1)
                logits = model(input_ids=torch.tensor(rows, device=model.device)).logits[:, len(prompt) - 1 :]
                steps = log_normalize(logits.double().cpu().numpy()[..., : A + 1])  # (A^(L-1), L, 1 + A)
                prefix, ended = np.zeros(1), []  # log-probability of each word of t letters
                for t in range(L):
                    step = steps[:: A ** (L - 1 - t), t]  # (A^t, 1 + A): one row for each such word
                    ended.append(prefix + step[:, END])
                    prefix = (prefix[:, None] + step[:, 1:]).reshape(-1)
                result.append(np.concatenate(ended + [prefix]))
        return np.stack(result)

    # ------------------------------------------------------------------------- data for a run
    def text(self, ids):
        """Ids to text, " a b c", the end token left out."""
        return "".join(" " + chr(ord("a") + i - 1) for i in ids if i != END)

    def reward_of(self, prompts, completions, **columns):
        """The reward in the form of a user's function: texts in, list of floats out.

        An output of L letters was cut, a shorter one ended: the text tells which outcome it is.
        """
        names = {self.text(prompt): x for x, prompt in enumerate(self.prompts)}
        rewards = []
        for prompt, text in zip(prompts, completions):
            ids = tuple(ord(letter) - ord("a") + 1 for letter in text.replace(" ", ""))
            output = ids if len(ids) == self.length else ids + (END,)
            rewards.append(float(self.reward[names[prompt], self.index[output]]))
        return rewards

    def rows(self, log_p, per_prompt, seed):
        """`per_prompt` rows of each prompt: a gold answer `label`, and a human pair `chosen`, `rejected`.

        All answers are draws from the prior (X, Y). A pair is two draws, its label drawn from
        Bradley-Terry (eq. 16): with an argmax in place of that draw the posterior is not DPO's optimum.
        """
        random = np.random.default_rng([seed, self.seed])
        rows = []
        for x, prompt in enumerate(self.prompts):
            draws = random.choice(len(self.outputs), size=(per_prompt, 3), p=np.exp(log_p[x]))
            for gold, first, second in draws:
                margin = self.reward[x, first] - self.reward[x, second]
                if random.random() > 1 / (1 + np.exp(-margin)):
                    first, second = second, first
                names = dict(label=gold, chosen=first, rejected=second)
                texts = {name: self.text(self.outputs[y]) for name, y in names.items()}
                rows.append({"prompt": self.text(prompt), **texts})
        return rows


def tiny_gpt2(world, seed=0, width=64, layers=2, dtype=None):
    """(model, tokenizer): a GPT-2 with random weights and one token per letter, made in memory.

    Its weights are large (standard deviation 0.3), so that as a prior it prefers some words by far.
    """
    import tokenizers
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocab = {"<end>": END} | {" " + chr(ord("a") + i): i + 1 for i in range(world.letters)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<end>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" [a-y]"), "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    config = GPT2Config(
        vocab_size=len(vocab), n_positions=32, n_embd=width, n_layer=layers, n_head=4,
        initializer_range=0.3, bos_token_id=END, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return model.to(dtype or torch.float32).eval(), tokenizer


# ------------------------------------------------------------------------------- the default run
class Toy:
    """What `python brain.py` trains in: a world (`size` is for it), its prior, data, and the answer key."""

    def __init__(self, seed=0, dtype="float32", goodness="bradley-terry", beta=1.0, **size):
        import torch

        torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
        self.world = World(seed=seed, **size)
        self.model, self.tokenizer = tiny_gpt2(self.world, seed, dtype=getattr(torch, dtype))
        self.log_p = self.world.log_probs(self.model)
        self.world.fit(self.log_p)
        r = self.world.reward
        self.log_goodness = (-np.logaddexp(0, -r) if goodness == "logistic" else r) / beta  # eq. 15, 19
        self.log_posterior = posterior(self.log_p, self.log_goodness)

    def splits(self):
        """Rows for training (8 of each prompt), validation (16) and test (32)."""
        import datasets

        sizes = {"train": 8, "validation": 16, "test": 32}
        rows = {split: self.world.rows(self.log_p, size, i) for i, (split, size) in enumerate(sizes.items())}
        return {split: datasets.Dataset.from_list(r) for split, r in rows.items()}

    def report(self, model, path, estimates):
        """Prints a trained model beside prior and posterior, and the run's estimates beside exact numbers."""
        log_q = self.world.log_probs(model)
        columns = {"prior": self.log_p, "policy": log_q, "posterior": self.log_posterior}
        reward = self.world.reward
        lines = {
            "KL(posterior || it), nats": lambda log: kl(self.log_posterior, log),
            "KL(it || prior), nats": lambda log: kl(log, self.log_p),
            "E[r]": lambda log: (np.exp(log) * reward).sum(-1),
            "win-rate against the prior, %": lambda log: 100 * chance_to_win(log, self.log_p, reward),
        }
        print(f"exact, over all {len(self.world.outputs):,} outputs of {len(self.world.prompts)} prompts:")
        print(f"  {'':30}" + "".join(f"{name:>12}" for name in columns))
        for name, number in lines.items():
            print(f"  {name:30}" + "".join(f"{number(log).mean():12.3f}" for log in columns.values()))
        exact = (np.exp(log_q) * (self.log_p + self.log_goodness - log_q)).sum(-1).mean()
        evidence = np.log(np.exp(self.log_p + self.log_goodness).sum(-1)).mean()
        elbo, bound, error = (estimates[name] for name in ("elbo", "log_evidence", "elbo_standard_error"))
        print("The policy's distance to the posterior, exact and as any run can estimate it, nats:")
        print(f"  {'':30}{'exact':>12}{'estimate':>12}")
        print(f"  {'elbo':30}{exact:12.3f}{elbo:12.3f} ± {error:.3f}")
        print(f"  {'log evidence (estimate: bound)':30}{evidence:12.3f}{bound:12.3f}")
        print(f"  {'KL(policy || posterior)':30}{evidence - exact:12.3f}{bound - elbo:12.3f}")
        self.draw(log_q, path)
        print(f"policy against posterior: {path}")

    def draw(self, log_q, path):
        """Probability of every output: before training against the posterior, and after."""
        import matplotlib.pyplot as plt

        plt.switch_backend("agg")
        figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
        exact = np.exp(self.log_posterior).ravel()
        shown = exact > 1e-6
        titles = "before training: the prior", "after: the policy"
        for axis, log, title in zip(axes, (self.log_p, log_q), titles):
            found = np.exp(log).ravel()[shown]
            # The area of a dot grows with its posterior probability, so that the eye goes to what matters.
            axis.scatter(exact[shown], found, s=1 + 400 * exact[shown], alpha=0.3, color="tab:blue", lw=0)
            axis.plot([1e-6, 1], [1e-6, 1], color="0.6", linewidth=1)
            axis.set(xscale="log", yscale="log", xlim=(1e-6, 1), ylim=(1e-6, 1))
            axis.set(xlabel="posterior probability of an output", ylabel="the model's probability of it")
            axis.set_title(f"{title}\nKL(posterior || it) = {kl(self.log_posterior, log).mean():.3f} nats")
        figure.savefig(path, dpi=110)
