"""Every method of the paper's tables, in worlds whose posterior is known: which one is nearest to it?

    python -m toy.methods --figures DIR    tables, a verdict on each ordering of the paper, a picture, and
                                           methods.json: the numbers of each reward, method, n and seed
    python -m toy.methods --quick          the same in a tiny world, to see that it runs

At toy scale these are Tables 1 and 3, Figure 2 (n = 2 to 32 outputs per prompt), section 9.3 (no baseline)
and 9.5 (fixed proposal), for a mild and a sharp reward. They go through `brain.train`. RLOO and GRPO, which
users of TRL train with today, stand beside them. Intervals are Student's t at 95% over seeds.
All numbers but these two are sums over every output:

    elbo gap   log_evidence - elbo of n = 32 draws per prompt: what a run on a real model could measure.
               In expectation it is a lower bound of KL(it || posterior).
    drawn      outputs that the run sampled in all

    equal      for all methods: prompts sampled for, updates, prompts per update, n outputs per prompt, the
               linear decay of the learning rate. RSO draws 4n to keep n, and DPO has one human pair per
               prompt, as in the paper: two draws of the prior, labelled by Bradley-Terry. RLOO and GRPO
               have the KL term at beta = 1, the strength whose optimum is the posterior (Theorem 7.1), and
               train on the samples of the present round only.
    a seed     changes everything: prompts, rewards, prior, human pairs, and all that is drawn in training
    rate       of each method and reward: among three, the one with the highest win-rate on seeds that are not
               reported. The paper selects its models by win-rate, too, and it needs no answer key.

A win-rate does not say which method is near the posterior. KL(posterior || policy) does.
"""

import argparse
import functools
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers

import brain
from toy.world import Toy, chance_to_win, kl

REWARDS = {"mild": 2.0, "sharp": 4.5}  # standard deviation of the reward under the prior
NUMBERS = ("KL(posterior || it)", "KL(it || posterior)", "elbo gap", "KL(it || prior)", "E[r]", "win-rate %")
KL_POSTERIOR, KL_BACK, GAP, KL_PRIOR, REWARD, WIN = range(6)
PAPER = {  # method: (where, Train RM win-rates of AnthropicHH and TL;DR as printed)
    "dpo": ("Table 1", "54.60", "86.72"),
    "rso": ("Table 1", "84.59", "91.24"),
    "dpo-sft": ("Tables 1, 3", "87.37", "90.86"),
    "dpo-sft+iw": ("Table 3", "89.21", ""),
    "dpo-sft+iw+n": ("Table 3, 9.5", "93.30", "93.48"),
    "brain": ("Tables 1, 3", "95.40", "95.21"),
    "brain-no-baseline": ("9.3", "58.3", "61.1"),
}
ONLINE = ("rloo", "grpo")  # not in the paper
ROWS = (*PAPER, *ONLINE)
SWEPT = ("brain", "dpo-sft")  # Figure 2
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # by seeds


@dataclass(frozen=True)
class Plan:
    """World and budget, the same for all methods."""

    letters: int = 6
    length: int = 4
    prompts: int = 4
    iterations: int = 10  # e
    prompts_per_iteration: int = 16  # m: each of the prompts about 4 times
    updates_per_iteration: int = 10  # k
    batch_size: int = 4
    sizes: tuple = (2, 4, 8, 16, 32)  # n; the last one is that of the tables
    rates: tuple = (1e-4, 4e-4, 1.6e-3)
    seeds: tuple = (0, 1, 2, 3, 4)
    search_seeds: tuple = (100, 101)

    @property
    def updates(self):
        return self.iterations * self.updates_per_iteration


QUICK = Plan(
    letters=3, length=2, prompts=4, iterations=2, prompts_per_iteration=4, updates_per_iteration=2,
    batch_size=2, sizes=(2, 8), rates=(1e-3, 3e-3), seeds=(0, 1), search_seeds=(100,),
)  # fmt: skip


class Job(NamedTuple):
    """One run: what is trained with what. `method` may be "prior" or "posterior": nothing to train."""

    reward: str
    method: str
    n: int
    rate: float
    seed: int


# --------------------------------------------------------------------------------- one run
class InMemory:
    """What `brain.train` asks of a run. Nothing is written to disk."""

    def __init__(self, settings):
        self.k = settings.updates_per_iteration

    def start(self, policy, optimizer):
        pass

    def collect(self, t, rows, draw):
        return draw(rows)

    def steps(self, t):
        return range((t - 1) * self.k + 1, t * self.k + 1)

    def after_update(self, step, metrics):
        pass


def token_log_probs(model, samples):
    """log-probability of each token of n outputs, and which of them are real. -> (n, T), (n, T)"""
    outputs, real = brain.pad_right(samples.outputs, "cpu")
    whole = torch.cat([samples.example.ids.expand(len(outputs), -1), outputs], 1)
    logits = model(input_ids=whole[:, :-1]).logits[:, -outputs.shape[1] :]
    found = logits.log_softmax(-1).gather(-1, outputs[..., None])[..., 0]
    return found.where(real, 0.0), real


def online_loss(method, rewards, real, log_q, old, log_p, beta=1.0, clip=0.2):
    """TRL's loss of RLOO and of GRPO for n outputs of one prompt, from rewards (n,) and the log-probabilities
    (n, T) of their tokens: of the policy, of the policy that drew them, of the prior."""
    n = len(log_q)
    if method == "rloo":  # the KL is in the reward; the ratio is that of whole outputs
        rewards = rewards - beta * (old - log_p).sum(-1)
        advantage = rewards - (rewards.sum() - rewards) / (n - 1)
        ratio, penalty, real = (log_q - old).sum(-1).exp(), 0.0, torch.ones(n)
    else:  # the KL is in the loss, by the k3 estimate; the ratio is that of each token
        advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
        apart = log_p - log_q
        ratio, penalty = (log_q - old).exp(), beta * (apart.exp() - apart - 1)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return ((penalty - surrogate) * real).sum() / real.sum()


def train_online(method, policy, reward, data, settings):
    """RLOO or GRPO with as many rounds, samples and updates as `brain.train` makes of the same settings."""
    k, total = settings.updates_per_iteration, settings.iterations * settings.updates_per_iteration
    optimizer = torch.optim.AdamW(policy.parameters().values(), settings.learning_rate, weight_decay=0.0)
    scheduler = transformers.get_scheduler("linear", optimizer, 0, total)
    for t in range(1, settings.iterations + 1):
        rows = brain.random_subset(len(data), settings.prompts_per_iteration, settings.seed, brain.PROMPTS, t)
        generators = [brain.seeded(settings.seed, brain.OUTPUTS, t, row) for row in rows]
        drawn = []
        examples = [data[i] for i in rows]
        for samples in brain.collect(policy, reward, examples, settings, "policy", generators, t):
            with torch.no_grad():
                scored = [token_log_probs(model, samples)[0] for model in (policy.model, policy.prior_model)]
            drawn.append((samples, *scored))
        for step in range((t - 1) * k + 1, t * k + 1):
            chosen = brain.random_subset(len(drawn), settings.batch_size, settings.seed, brain.BATCHES, step)
            optimizer.zero_grad()
            for samples, old, log_p in (drawn[i] for i in chosen):
                log_q, real = token_log_probs(policy.model, samples)
                (online_loss(method, samples.reward, real, log_q, old, log_p) / len(chosen)).backward()
            optimizer.step()
            scheduler.step()


def elbo_gap(toy, log, seed, n=32, repeats=64):
    """log_evidence - elbo of n draws, (X,): the mean of many such estimates."""
    generator, gaps = np.random.default_rng(seed), []
    for log_q, log_w in zip(log, toy.log_p + toy.world.reward - log):
        drawn = log_w[generator.choice(len(log_q), (repeats, n), p=np.exp(log_q) / np.exp(log_q).sum())]
        gaps.append((np.log(np.exp(drawn).mean(-1)) - drawn.mean(-1)).mean())
    return np.array(gaps)


def numbers(toy, log, seed=0):
    """The NUMBERS of a distribution (X, Y), mean over prompts. All but the gap are by enumeration."""
    near, back = kl(toy.log_posterior, log), kl(log, toy.log_posterior)
    wins = 100 * chance_to_win(log, toy.log_p, toy.world.reward)
    reward = (np.exp(log) * toy.world.reward).sum(-1)
    found = near, back, elbo_gap(toy, log, seed), kl(log, toy.log_p), reward, wins
    return [float(number.mean()) for number in found]


def train_once(plan, job):
    """-> (NUMBERS of the end, outputs drawn). Everything random comes from job.seed."""
    torch.set_num_threads(1)  # tensors are tiny, and sums in another order are other numbers
    transformers.utils.logging.set_verbosity_error()
    size = dict(letters=plan.letters, length=plan.length, prompts=plan.prompts)
    toy = Toy(job.seed, spread=REWARDS[job.reward], **size)
    if job.method in ("prior", "posterior"):
        return numbers(toy, toy.log_p if job.method == "prior" else toy.log_posterior), 0
    names = ("iterations", "prompts_per_iteration", "updates_per_iteration", "batch_size")
    typed = {name: getattr(plan, name) for name in names}
    typed |= {"samples_per_prompt": job.n, "max_new_tokens": plan.length, "max_prompt_tokens": 2}
    method = "brain" if job.method in ONLINE else job.method  # for the online ones it decides nothing
    typed |= {"method": method, "learning_rate": job.rate, "seed": job.seed, "goodness": "bradley-terry"}
    settings = brain.parse([word for name, value in typed.items() for word in (brain.flag(name), str(value))])
    # As many rows as a run samples for in all: DPO's human pairs need not come twice.
    rows = toy.world.rows(toy.log_p, plan.iterations * plan.prompts_per_iteration // plan.prompts, job.seed)
    pairs = job.method == "dpo"
    data = [brain.make_example(i, row, None, pairs, toy.tokenizer, settings) for i, row in enumerate(rows)]
    policy, drawn = brain.Policy(toy.model, toy.tokenizer), 0

    def reward(prompt, texts, columns):
        nonlocal drawn
        drawn += len(texts)  # every candidate is scored, RSO's 4n too, before any is rejected
        return torch.tensor(toy.world.reward_of([prompt] * len(texts), texts))

    if job.method in ONLINE:
        train_online(job.method, policy, reward, data, settings)
    else:
        brain.train(policy, reward, data, settings, InMemory(settings))
    found = numbers(toy, toy.world.log_probs(policy.model), job.seed)
    assert np.isfinite(found).all(), f"{job} diverged"
    return found, drawn


# --------------------------------------------------------------------------------- all runs
def run_all(plan, jobs, pool):
    """{key: [Job]} -> {key: NUMBERS (seeds, 6)}, {key: outputs drawn}. A run depends on its job alone."""
    once = list(dict.fromkeys(job for some in jobs.values() for job in some))
    found = dict(zip(once, pool.imap(functools.partial(train_once, plan), once)))
    results = {key: np.array([found[job][0] for job in some]) for key, some in jobs.items()}
    return results, {key: found[some[0]][1] for key, some in jobs.items()}


def choose_rates(plan, pool):
    """{(reward, method): rate} by win-rate on the search seeds, printed with what it was chosen from."""
    n = plan.sizes[-1]
    grid = [(reward, method, rate) for reward in REWARDS for method in ROWS for rate in plan.rates]
    jobs = {g: [Job(*g[:2], n, g[2], seed) for seed in plan.search_seeds] for g in grid}
    means = {g: found.mean(0) for g, found in run_all(plan, jobs, pool)[0].items()}
    seeds = ", ".join(map(str, plan.search_seeds))
    print("Learning rates: of each method and reward the one (*) with the highest win-rate, on seeds not")
    print(f"reported below ({seeds}). Cells: win-rate (KL(posterior || it), which is not looked at)")
    print(f"{'':25}" + "".join(f"{rate:>18g}" for rate in plan.rates))
    chosen = {}
    for reward, method in dict.fromkeys(g[:2] for g in grid):
        row = {rate: means[reward, method, rate] for rate in plan.rates}
        best = chosen[reward, method] = max(row, key=lambda rate: row[rate][WIN])
        told = {rate: f"{x[WIN]:.1f} ({x[KL_POSTERIOR]:.2f})" for rate, x in row.items()}
        cells = [f"{cell} {'*' if rate == best else ' '}" for rate, cell in told.items()]
        print(f"{reward:7}{method:18}" + "".join(f"{cell:>18}" for cell in cells))
    return chosen


def measure(plan, rates, pool):
    """What `run_all` returns, by (reward, method, n), for tables and pictures."""
    n = plan.sizes[-1]
    wanted = [(reward, method, n) for reward in REWARDS for method in ("prior", *ROWS, "posterior")]
    wanted += [(reward, method, size) for reward in REWARDS for method in SWEPT for size in plan.sizes]
    jobs = {w: [Job(*w, rates.get(w[:2], 0.0), seed) for seed in plan.seeds] for w in wanted}
    return run_all(plan, jobs, pool)


# --------------------------------------------------------------------------------- what is printed
def interval(values):
    """(mean, half-width of the 95% interval) over seeds, (S,) or (S, ...): Student's t."""
    values = np.asarray(values)
    return values.mean(0), STUDENT[len(values)] * values.std(0, ddof=1) / np.sqrt(len(values))


def print_tables(plan, results, drawn):
    n = plan.sizes[-1]
    for reward, spread in REWARDS.items():
        print(f"\n{reward} reward (standard deviation {spread} under the prior), n = {n}, ", end="")
        print(f"{plan.updates} updates of {plan.batch_size} prompts, mean ± 95% over {len(plan.seeds)} seeds")
        columns = "".join(f"{name:>21}" for name in NUMBERS)
        print(f"{'':18}{columns}{'drawn':>8}   paper: HH  TL;DR  where")
        for method in ("prior", *ROWS, "posterior"):
            cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in zip(*interval(results[reward, method, n]))]
            where, hh, tldr = PAPER.get(method, ("", "", ""))
            line = f"{method:18}" + "".join(f"{cell:>21}" for cell in cells)
            print(f"{line}{drawn[reward, method, n]:>8}{hh:>12}{tldr:>7}  {where}".rstrip())
    print("\nFigure 2")
    columns = [(method, i) for method in SWEPT for i in (WIN, KL_POSTERIOR)]
    print(f"{'':7}{'n':>3}" + "".join(f"{method + ': ' + NUMBERS[i]:>30}" for method, i in columns))
    for reward in REWARDS:
        for size in plan.sizes:
            cells = [interval(results[reward, method, size][:, i]) for method, i in columns]
            told = [f"{mean:.2f} ± {half:.2f}" for mean, half in cells]
            print(f"{reward:7}{size:>3}" + "".join(f"{cell:>30}" for cell in told))


# --------------------------------------------------------------------------------- the paper's orderings
def orderings(plan):
    """(where, (method, n) of A, of B, the paper's figures, whether B wins more often there) of each claim."""
    n, few, middle = plan.sizes[-1], plan.sizes[0], plan.sizes[len(plan.sizes) // 2]
    pairs = [("Table 1", "dpo", "dpo-sft")]
    pairs += [("Table 1", other, "brain") for other in ("dpo", "dpo-sft", "rso")]
    pairs += [("Table 3", "dpo-sft", "dpo-sft+iw"), ("Table 3", "dpo-sft+iw", "dpo-sft+iw+n")]
    pairs += [("Section 9.3", "brain-no-baseline", "brain")]
    pairs += [("Table 3, section 9.5", "dpo-sft+iw+n", "brain")]
    for where, a, b in pairs:
        printed = [f"{PAPER[a][i]} < {PAPER[b][i]}" for i in (1, 2) if PAPER[a][i] and PAPER[b][i]]
        yield where, (a, n), (b, n), ", ".join(printed), True
    yield "Figure 2", ("brain", few), ("brain", middle), "improves until n = 8", True
    yield "Figure 2", ("brain", middle), ("brain", n), "saturates after n = 8", False
    yield "Figure 2", ("dpo-sft", few), ("dpo-sft", n), "improves slowly, to n = 32", True


def verdict(a, b, posterior, names, gains=True):
    """What NUMBERS (seeds, 4) of A, B and the posterior say about "B wins more often", or not more."""
    gain, half = interval(b[:, WIN] - a[:, WIN])  # within each seed: worlds differ more than methods do
    sure = abs(gain) > half
    if gains:
        told = ("holds" if gain > 0 else "the opposite holds") if sure else "undecided"
    else:
        told = "does not hold" if sure else "holds as far as the interval tells"
    past = [(name, *interval(x[:, WIN] - posterior[:, WIN])) for name, x in zip(names, (a, b))]
    why = [f"{name} runs {mean:.1f} points past the posterior" for name, mean, error in past if mean > error]
    far, error = interval(a[:, KL_POSTERIOR] - b[:, KL_POSTERIOR])
    nearer = "neither is surely the nearer" if abs(far) <= error else f"{names[int(far > 0)]} is the nearer"
    why.append(f"{nearer} to it" if why else f"{nearer} to the posterior")
    kls = [x[:, KL_POSTERIOR].mean() for x in (b, a)]
    return f"{told}, {gain:+.1f} ± {half:.1f}: {', '.join(why)} (KL {kls[0]:.2f} for B, {kls[1]:.2f} for A)."


def print_orderings(plan, results):
    print("\nThe paper's orderings, A < B by win-rate, and whether they hold here (B minus A, points)")
    for where, a, b, printed, gains in orderings(plan):
        same = a[0] == b[0]
        names = [f"n = {n}" if same else method for method, n in (a, b)]
        print(f"{where}: {a[0] + ', ' if same else ''}{' < '.join(names)} (paper: {printed})")
        for reward in REWARDS:
            posterior = results[reward, "posterior", plan.sizes[-1]]
            told = verdict(results[(reward, *a)], results[(reward, *b)], posterior, names, gains)
            print(f"  {reward:6} {told}")


def print_conclusion(plan, results):
    """Which method is nearest to the posterior, and which ones win more often than it."""
    n = plan.sizes[-1]
    print()
    for reward in REWARDS:
        far = {method: results[reward, method, n][:, KL_POSTERIOR].mean() for method in ROWS}
        posterior, near = results[reward, "posterior", n][:, WIN], sorted(far, key=far.get)
        gains = {method: interval(results[reward, method, n][:, WIN] - posterior) for method in ROWS}
        past = [method for method, (gain, half) in gains.items() if gain > half]
        nearest = f"{near[0]} is nearest to the posterior (KL {far[near[0]]:.2f})"
        print(f"Under the {reward} reward, {nearest}, then {near[1]} ({far[near[1]]:.2f}).")
        print(f"Surely more wins than the posterior have: {', '.join(past) or 'none'}.")


# --------------------------------------------------------------------------------- pictures
def draw_methods(plan, results, path):
    """Win-rate and KL(posterior || it) of each method, both rewards; vertical lines: prior and posterior.
    `brain` stands out by color and size."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    n, names = plan.sizes[-1], list(ROWS)[::-1]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex="col", sharey=True, layout="constrained")
    for row, (reward, spread) in zip(axes, REWARDS.items()):
        for axis, number in zip(row, (WIN, KL_POSTERIOR)):
            mean, half = np.array([interval(results[reward, name, n][:, number]) for name in names]).T
            for i, name in enumerate(names):
                plain, bold = {"color": "0.35", "ms": 5}, {"color": "tab:red", "ms": 9, "lw": 2.5}
                look = bold if name == "brain" else plain
                axis.errorbar(mean[i], i, xerr=half[i], fmt="o", capsize=3, **look)
            for reference, line in (("prior", ":"), ("posterior", "--")):
                value = results[reward, reference, n][:, number].mean()
                axis.axvline(value, color="0.4", ls=line, label=reference)
            axis.grid(axis="y", color="0.9")
            axis.set(yticks=range(len(names)), yticklabels=names)
            for label in axis.get_yticklabels():
                if label.get_text() == "brain":
                    label.set(color="tab:red", weight="bold")
            axis.set_title(f"{reward} reward (spread {spread:g}), n = {n}")
    axes[0, 0].legend(loc="lower left")
    axes[1, 0].set_xlabel("win-rate against the prior, %")
    axes[1, 1].set_xlabel("KL(posterior || policy), nats")
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------- command line
def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy.methods", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny world; the numbers mean nothing")
    add("--workers", type=int, default=2, metavar="N", help="processes; changes no number (default 2)")
    add("--figures", type=Path, metavar="DIR", help="where the pictures go; without it, nowhere")
    arguments = parser.parse_args(argv)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
    started, plan = time.perf_counter(), QUICK if arguments.quick else Plan()
    nothing = "--quick: the world is tiny, so these numbers mean nothing. They show that the program runs.\n"
    nothing *= arguments.quick
    print(nothing + "This shows how near each method comes to the exact posterior, and how often it wins.\n")
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        rates = choose_rates(plan, pool)
        results, drawn = measure(plan, rates, pool)
    print_tables(plan, results, drawn)
    print_orderings(plan, results)
    if arguments.figures:
        draw_methods(plan, results, arguments.figures / "methods.png")
        kept = {", ".join(map(str, key)): dict(zip(NUMBERS, x.T.tolist())) for key, x in results.items()}
        (arguments.figures / "methods.json").write_text(json.dumps(kept, indent=1) + "\n")
    print_conclusion(plan, results)
    print(nothing + f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
