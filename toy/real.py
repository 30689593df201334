"""A real chat model, measured against its exact posterior: does BRAIn work, and how does it compare with TRL?

    python -m toy.real                        every method, one run after the other: many hours of a CPU
    python -m toy.real --methods brain        some of them
    python -m toy.real --quick                tiny budgets, to see that it runs; the numbers mean nothing

It needs two more packages: pip install trl vaderSentiment

The reward is VADER's sentiment score of an output, at most 1. With a largest reward the goodness
g(y) = exp((r(y) - 1) / beta) is a probability, and the posterior p(y|x) g(y) / p(G=1|x) can be sampled
exactly: draw y from the prior and accept it with probability g(y). This is the rejection sampling of section
4 of the paper. It is too dear to serve, as about one draw in eleven is accepted. It is all that is needed to
know the truth about a few prompts that are not trained on. For any policy q

    KL(posterior || q)  =  KL(posterior || prior)  +  E_posterior[log p(y|x) - log q(y|x)]
    KL(posterior || prior)  =  E_posterior[log g(y)]  -  log p(G=1|x)

A mean under the posterior is taken in two ways: over draws of p that are weighted by g, and over the draws
that are accepted. Both are printed, and they differ by chance only. All policies are measured on the same
draws.

Methods: rows of `brain.METHODS` by `brain.train`, and the RLOOTrainer and GRPOTrainer of the package trl.
All have the same model, adapter, prompts, lengths, n, KL coefficient, optimiser, linear decay of the learning
rate, and number of prompts in an update. They are compared at equal numbers of scored outputs. TRL's trainers
use each output once, their default; the methods of brain.py visit each `Plan.visits` times. `rso` scores 4n
outputs to keep n. The learning rate of each method is the best one of a grid that all share, by
KL(posterior || policy) on validation topics after a shorter run. Results are those of test topics, which
choose nothing.

All results go into DIR/real.json as soon as they are known. A run that stands there is not run again, so the
comparison can be stopped and continued, on another machine, too. DIR/draws-*.pt keep the draws behind the
truth; where one is missing they are drawn again. Seconds are seconds of one processor core, without those of
evaluation.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import brain

R_MAX = 1.0  # of VADER's compound score
BETA = 0.25
TOPICS = """
a rainy Monday morning|my neighbour's dog|the city bus|a long airport queue|homework|the dentist
an old bicycle|winter nights|the office kitchen|a family dinner|the local library|a broken phone
spring in the park|moving to a new flat|school lunches|the night shift|a football match
learning to swim|traffic in the city|a walk in the forest|the new boss|a cup of coffee
an exam next week|the hospital waiting room|a surprise party|cooking for friends|the village school
a lost wallet|the first day at work|a crowded train|an empty beach|the corner shop|a leaking roof
online shopping|a summer job|growing tomatoes|a visit from my aunt|the tax office
a night at the opera|driving in snow|a spider in the bathroom|the school bus driver
a second-hand car|a power cut|a camping trip|my first guitar|the garbage truck
an argument with a friend|the last day of summer|a delayed flight|the town market|a cold shower
a big storm|the new neighbours|a walk to school|the football coach|a birthday without cake
the old cinema|a trip to the mountains|a hot afternoon|doing the dishes|a letter from the bank
the swimming pool|a quiet Sunday|a street musician|the morning news|a job interview
an old photograph|the weekly shopping|a flat tyre|the school play|a museum on a weekday
a long phone call|the family cat|a late dinner|the science teacher|a week without internet
the harbour at night|a wedding speech|a new haircut
""".strip().replace("\n", "|").split("|")
FORMS = (
    "Write one sentence about {}.",
    "Describe {} in one sentence.",
    "Tell me something about {}.",
    "What do people think of {}?",
    "Give your opinion of {}.",
)
BRAIN = ("brain", "brain-no-baseline", "dpo-sft+iw+n", "dpo-sft", "rso")  # names in brain.METHODS
TRL = {  # name: (trainer, config, what differs from that config's defaults)
    "trl-rloo": ("RLOOTrainer", "RLOOConfig", {}),
    "trl-grpo": ("GRPOTrainer", "GRPOConfig", {}),
    "trl-grpo-unscaled": ("GRPOTrainer", "GRPOConfig", {"scale_rewards": "none"}),
}
WAYS = ("weighting", "rejection")  # two ways to take a mean under the posterior
NAMES = {  # of the numbers of a distribution, as printed
    "kl_posterior": "KL(posterior||it)",
    "kl_back": "KL(it||posterior)",
    "reward": "E[r]",
    "kl_to_prior": "KL(it||prior)",
    "elbo": "elbo",
    "win_rate": "win-rate %",
    "gap": "gap",
    "d_16": "D_16",
    "d_32": "D_32",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Budgets, the same for all methods. What stands first is fixed for all that is in one real.json."""

    topics: tuple = (48, 8, 16)  # for training, validation and test
    tokens: int = 20  # outputs are truncated there
    n: int = 16  # outputs per prompt
    batch_size: int = 4  # prompts in an update
    visits: int = 1  # of each sample, for the methods of brain.py
    round_outputs: int = 512  # scored in a round of brain.py
    prompts_per_forward: int = 8  # sampled at once by brain.py
    lora_rank: int = 8
    lora_alpha: int = 32
    draws: int = 128  # of the prior for each held-out prompt, for the truth
    own_draws: int = 16  # of a policy for each held-out prompt
    # Which runs there are. More can be added to a real.json.
    checkpoints: tuple = (512, 1024, 2048, 4096)  # scored outputs; the last one ends a run
    search_outputs: int = 1024  # of the runs that choose the learning rate
    rates: tuple = (5e-4, 1e-3, 2e-3)  # with a single one there is nothing to choose
    seeds: tuple = (0, 1)
    search_seed: int = 100


QUICK = Plan(
    topics=(4, 2, 3), tokens=4, n=4, batch_size=2, visits=1, round_outputs=16, checkpoints=(16, 32),
    search_outputs=16, rates=(1e-3, 2e-3), draws=64, own_draws=4,
)  # fmt: skip


# ------------------------------------------------------------------------------- reward and prompts
def sentiment(prompts, completions, **columns):
    """VADER's compound score of each completion, between -1 and 1. One function for brain.py and for TRL."""
    scores = [analyzer().polarity_scores(completion[0]["content"])["compound"] for completion in completions]
    brain.refuse_if(max(scores) > R_MAX, f"a reward of {max(scores)} is above R_MAX {R_MAX}: mend R_MAX")
    return scores


def analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    if not hasattr(analyzer, "made"):
        analyzer.made = SentimentIntensityAnalyzer()
    return analyzer.made


def prompts_of(plan):
    """{split: prompts}, each a list of messages. The splits share no topic. For training every topic has all
    forms, held out it has one."""
    train, validation, test = plan.topics
    assert train + validation + test <= len(set(TOPICS))
    texts = {"train": [form.format(topic) for topic in TOPICS[:train] for form in FORMS]}
    held_out = {"validation": TOPICS[train : train + validation], "test": TOPICS[-test:]}
    for split, topics in held_out.items():
        texts[split] = [FORMS[i % len(FORMS)].format(topic) for i, topic in enumerate(topics)]
    return {split: [[{"role": "user", "content": x}] for x in found] for split, found in texts.items()}


# ------------------------------------------------------------------------------- the truth
@dataclasses.dataclass
class Truth:
    """What is known of one held-out prompt: N draws of the prior, and which are accepted."""

    example: object  # a brain.Example
    outputs: list  # N LongTensors
    texts: list
    reward: np.ndarray  # (N,)
    log_p: np.ndarray  # (N,)
    accepted: np.ndarray  # (N,) bool

    @property
    def log_good(self):
        """log g(y) = (r - R_MAX) / beta of each draw, at most 0."""
        return (self.reward - R_MAX) / BETA

    @property
    def log_z(self):
        """log p(G=1|x): the log of the mean goodness, the chance to be accepted."""
        return log_mean_exp(self.log_good)

    @property
    def weights(self):
        """The posterior's weights of the draws. They sum to 1."""
        return np.exp(self.log_good - self.log_z) / len(self.log_good)

    def mean(self, values, way):
        """The posterior's mean of values (N,), by "weighting" or by "rejection" (nan if none is accepted)."""
        if way == "weighting":
            return float((self.weights * values).sum())
        return float(values[self.accepted].mean()) if self.accepted.any() else math.nan

    def kl_prior(self, way):
        """KL(posterior || prior): the posterior's mean of log g(y) - log p(G=1|x)."""
        chance = math.exp(self.log_z) if way == "weighting" else self.accepted.mean()
        return self.mean(self.log_good, way) - math.log(chance) if chance else math.nan

    def resampled(self, count=16):
        """Indices of `count` draws that stand for the weighted ones: systematic resampling, the same each
        time. Scoring a policy on all N would cost ten times as much, and most weights are nearly zero."""
        steps = (np.arange(count) + 0.5) / count
        return np.minimum(np.searchsorted(self.weights.cumsum(), steps), len(self.weights) - 1)


def log_mean_exp(x):
    return float(np.log(np.exp(x - x.max()).mean()) + x.max())


def draw_truth(policy, reward, examples, plan, split):
    """The Truth of every example. All that is drawn follows from the split and the index of the prompt."""
    found = []
    for i, example in enumerate(examples):
        generator = brain.seeded(0, len(split), i)
        outputs = policy.sample(example.ids, plan.draws, plan.tokens, True, generator)
        texts = [policy.text(example.ids, output) for output in outputs]
        rewards = reward(example.prompt, texts, example.columns).numpy()
        with torch.no_grad():
            log_p = policy.log_prob(example.ids, outputs, prior=True).double().numpy()
        chance = torch.rand(plan.draws, generator=generator, dtype=torch.float64).numpy()
        accepted = chance < np.exp((rewards - R_MAX) / BETA)
        found.append(Truth(example, outputs, texts, rewards, log_p, accepted))
        done = f"{i + 1}/{len(examples)}: {accepted.sum()} of {plan.draws} accepted"
        print(f"truth, {split} {done}", flush=True)
    return found


def describe_truth(truth):
    """log p(G=1|x), acceptance, E_posterior[r] and KL(posterior || prior), by both ways: [mean, error]."""
    numbers = {"draws": len(truth[0].reward), "prompts": len(truth)}
    for way in WAYS:
        chances = [math.exp(x.log_z) if way == "weighting" else x.accepted.mean() for x in truth]
        numbers[f"acceptance_{way}"] = mean_and_error(chances)
        numbers[f"reward_{way}"] = mean_and_error([x.mean(x.reward, way) for x in truth])
        numbers[f"kl_prior_{way}"] = mean_and_error([x.kl_prior(way) for x in truth])
    numbers["log_z"] = mean_and_error([x.log_z for x in truth])
    numbers["ess"] = mean_and_error([1 / (x.weights**2).sum() for x in truth])
    return numbers


def mean_and_error(values):
    """[mean, standard error] over prompts. A prompt of which no draw was accepted counts for neither."""
    values = np.asarray(values, dtype=float)
    return list(brain.mean_and_error(values[~np.isnan(values)]))


# ------------------------------------------------------------------------------- measuring a policy
@torch.no_grad()
def distance(policy, truth):
    """KL(posterior || policy) over prompts, by weighting (`kl_posterior`) and by rejection: [mean, error].

    It is KL(posterior || prior), from all draws, plus the posterior's mean of log p - log q. For that mean
    the policy scores the resampled draws and the accepted ones only.
    """
    found = {"kl_posterior": [], "kl_posterior_rejection": []}
    for known in truth:
        picked = known.resampled()
        scored = sorted({*picked.tolist(), *np.flatnonzero(known.accepted).tolist()})
        log_q = policy.log_prob(known.example.ids, [known.outputs[i] for i in scored]).double().numpy()
        ratio = np.full(len(known.reward), np.nan)
        ratio[scored] = known.log_p[scored] - log_q
        found["kl_posterior"].append(known.kl_prior("weighting") + ratio[picked].mean())
        found["kl_posterior_rejection"].append(known.kl_prior("rejection") + known.mean(ratio, "rejection"))
    return {name: mean_and_error(values) for name, values in found.items()}


@torch.no_grad()
def own_numbers(policy, reward, truth, plan):
    """What draws of the policy itself show, and D_n. -> (numbers, the first output of each prompt)"""
    values, firsts = {name: [] for name in NAMES if name != "kl_posterior"}, []
    settings = settings_of(plan, "brain", 0.0, 0)
    settings.samples_per_prompt = plan.own_draws
    for i, known in enumerate(truth):
        example = known.example
        (drawn,) = brain.collect(policy, reward, [example], settings, "policy", [brain.seeded(1, i)])
        log_p, log_q, r = (x.double().numpy() for x in (drawn.log_p, drawn.log_q_proposal, drawn.reward))
        log_w = log_p + (r - R_MAX) / BETA - log_q
        values["elbo"].append(log_w.mean())
        values["gap"].append(log_mean_exp(log_w) - log_w.mean())
        values["kl_back"].append(known.log_z - log_w.mean())
        values["reward"].append(r.mean())
        values["kl_to_prior"].append((log_q - log_p).mean())
        values["win_rate"].append(win_rate(r, np.full(len(r), 1 / len(r)), known.reward))
        log_q = policy.log_prob(example.ids, known.outputs[:32]).double().numpy()
        for n in (16, 32):
            values[f"d_{n}"].append(divergence(known.log_good[:32], log_q - known.log_p[:32], n))
        firsts.append([drawn.texts[0], float(r[0])])
    return {name: mean_and_error(found) for name, found in values.items()}, firsts


def divergence(log_good, log_beta, n):
    """D_n with q' = p (eq. 13) over groups of n draws of the prior, from log alpha and log beta (N,)."""
    alpha, beta = (x[: len(x) // n * n].reshape(-1, n) for x in (log_good, log_beta))
    alpha, beta = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (alpha, beta))
    return float((np.exp(alpha) * (alpha - beta)).sum(-1).mean()) if alpha.size else math.nan


def win_rate(reward, weights, other):
    """Per cent of pairs that a weighted draw of reward (N,) wins against `other` (M,). Ties count half."""
    reward, other = np.float32(reward), np.float32(other)  # else a tie is lost in the rounding of one of them
    wins = (reward[:, None] > other).mean(-1) + (reward[:, None] == other).mean(-1) / 2
    return float(100 * (weights * wins).sum())


def references(truth):
    """The rows of the prior and of the exact posterior in the table, from the weighted draws."""
    prior = {name: [] for name in NAMES}
    exact = {name: [] for name in NAMES}
    for x in truth:
        equal = np.full(len(x.reward), 1 / len(x.reward))
        divergence_to_prior = x.kl_prior("weighting")
        same = dict.fromkeys(("kl_posterior", "kl_back", "gap", "d_16", "d_32"), 0.0)
        own = {"kl_to_prior": divergence_to_prior, "elbo": x.log_z, "reward": x.mean(x.reward, "weighting")}
        own |= same | {"win_rate": win_rate(x.reward, x.weights, x.reward)}
        groups = x.log_good[: len(x.reward) // 16 * 16].reshape(-1, 16)
        first = {"kl_posterior": divergence_to_prior, "kl_to_prior": 0.0, "reward": x.reward.mean()}
        first |= {"elbo": x.log_good.mean(), "kl_back": x.log_z - x.log_good.mean()}
        first |= {"gap": np.mean([log_mean_exp(group) - group.mean() for group in groups])}
        first |= {"win_rate": win_rate(x.reward, equal, x.reward)}
        first |= {f"d_{n}": divergence(x.log_good[:32], np.zeros(len(x.reward[:32])), n) for n in (16, 32)}
        for name in NAMES:
            prior[name].append(first[name])
            exact[name].append(own[name])
    return [{name: mean_and_error(x) for name, x in found.items()} for found in (prior, exact)]


# ------------------------------------------------------------------------------- training
class Clock:
    """Seconds that training takes, of the processor and of the wall. Evaluation stops it."""

    def __init__(self):
        self.total = np.zeros(2)
        self.start()

    def start(self):
        self.since = np.array([time.process_time(), time.perf_counter()])

    def stop(self):
        self.total += np.array([time.process_time(), time.perf_counter()]) - self.since


class Watch:
    """Measures a run at its checkpoints, and is what `brain.train` asks of a run."""

    def __init__(self, policy, truth, plan, checkpoints, k):
        self.policy, self.truth, self.plan, self.k = policy, truth, plan, k
        self.checkpoints, self.points, self.clock = checkpoints, [], Clock()

    def start(self, policy, optimizer):
        self.clock = Clock()

    def collect(self, t, rows, draw):
        groups = brain.in_groups(rows, self.plan.prompts_per_forward)
        return sum((draw(group) for group in groups), [])

    def steps(self, t):
        return range((t - 1) * self.k + 1, t * self.k + 1)

    def after_update(self, step, metrics):
        if step % self.k == 0:
            self.look(step // self.k * self.plan.round_outputs)

    def look(self, outputs):
        """Measures the policy, if `outputs` is one of the checkpoints."""
        if outputs not in self.checkpoints:
            return
        self.clock.stop()
        processor, wall = self.clock.total.tolist()
        point = {"outputs": outputs, "seconds": processor, "wall_seconds": wall}
        self.points.append(point | distance(self.policy, self.truth))
        mean, error = self.points[-1]["kl_posterior"]
        done = f"{outputs} outputs, {processor:.0f} s"
        print(f"    {done}: KL(posterior||policy) {mean:.3f} ± {error:.3f}", flush=True)
        self.clock.start()


def settings_of(plan, method, rate, seed, outputs=None):
    """The brain.Settings of a run that scores `outputs` outputs."""
    candidates = plan.n * (4 if method == "rso" else 1)
    prompts = plan.round_outputs // candidates
    return brain.Settings(
        method=method, goodness="bradley-terry", beta=BETA, seed=seed, learning_rate=rate,
        samples_per_prompt=plan.n, max_new_tokens=plan.tokens, batch_size=min(plan.batch_size, prompts),
        iterations=(outputs or 0) // plan.round_outputs, prompts_per_iteration=prompts,
        updates_per_iteration=plan.visits * prompts // min(plan.batch_size, prompts),
    )  # fmt: skip


def new_policy(arguments, plan, seed):
    """A policy whose adapter is on the value projections of the upper half of the layers.

    There the gradient stands out of its noise. Over 33 prompts with 16 draws of p, the squared mean of a
    prompt's gradient over its variance was 0.02 for the value projections of layers 15 to 24, below 0.01 in
    layers 0 to 9, and 0.003 for all query projections.

    The adapter of a model that is given to `Policy` belongs to the prior, and the policy's is a copy of it.
    Here it is new and changes nothing, so the prior is the model itself.
    """
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    layers = model.config.num_hidden_layers
    torch.manual_seed(seed)  # LoRA starts at random
    config = peft.LoraConfig(
        r=plan.lora_rank, lora_alpha=plan.lora_alpha, target_modules=["v_proj"], task_type="CAUSAL_LM",
        layers_to_transform=list(range(layers // 2, layers)),
    )  # fmt: skip
    return brain.Policy(peft.get_peft_model(model, config), arguments.tokenizer, plan.lora_rank)


def train_brain(policy, reward, data, job, plan, truth):
    settings = settings_of(plan, job["method"], job["rate"], job["seed"], job["outputs"])
    watch = Watch(policy, truth, plan, job["checkpoints"], settings.updates_per_iteration)
    brain.train(policy, reward, data, settings, watch)
    return watch.points


def train_trl(policy, prompts, job, plan, truth, arguments):
    """A trainer of the package trl trains a model of its own, which starts as a copy of `policy`. `policy`
    receives its adapter to be measured."""
    import datasets
    import trl

    trainer_name, config_name, options = TRL[job["method"]]
    together = plan.batch_size * plan.n
    watch = Watch(policy, truth, plan, job["checkpoints"], None)

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            watch.clock.start()

        def on_step_end(self, args, state, control, **_):
            if state.global_step * together in job["checkpoints"]:
                copy_adapter(trainer.model, "default", policy.model, "policy")
            watch.look(state.global_step * together)

    defaults = brain.Settings()
    with tempfile.TemporaryDirectory() as place:
        config = getattr(trl, config_name)(
            output_dir=place, seed=job["seed"], beta=BETA, max_steps=job["outputs"] // together,
            num_generations=plan.n, max_completion_length=plan.tokens, per_device_train_batch_size=together,
            learning_rate=job["rate"], lr_scheduler_type="linear", weight_decay=defaults.weight_decay,
            adam_beta1=defaults.adam_beta1, adam_beta2=defaults.adam_beta2, temperature=1.0, top_p=1.0,
            top_k=0, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = getattr(trl, trainer_name)(
            model=transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
            reward_funcs=sentiment, args=config, callbacks=[Look()], processing_class=arguments.tokenizer,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            peft_config=policy.model.peft_config["policy"],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        copy_adapter(policy.model, "policy", trainer.model, "default")
        trainer.train()
    return watch.points


def copy_adapter(source, source_name, target, target_name):
    """The parameters of an adapter of one peft model into that of another one of the same shape."""
    found = dict(source.named_parameters())
    names = [name for name, _ in target.named_parameters() if f".{target_name}." in name]
    assert names
    for name in names:
        parameter = found[name.replace(f".{target_name}.", f".{source_name}.")]
        target.get_parameter(name).data.copy_(parameter.data)


def run_job(job, arguments, plan, data, prompts, known):
    """Trains and measures one run. -> what real.json keeps of it"""
    print(f"{job['method']}, rate {job['rate']:g}, seed {job['seed']}, {job['outputs']} outputs", flush=True)
    truth, reward = known[job["split"]], brain.RewardFunction(sentiment, "sentiment")
    policy = new_policy(arguments, plan, job["seed"])
    if job["method"] in TRL:
        points = train_trl(policy, prompts, job, plan, truth, arguments)
    else:
        points = train_brain(policy, reward, data, job, plan, truth)
    end, firsts = {}, []
    if job["split"] == "test":
        numbers, firsts = own_numbers(policy, reward, truth, plan)
        end = {name: points[-1].get(name, numbers.get(name)) for name in NAMES}
    return job | {"points": points, "end": end, "first_outputs": firsts[:3]}


# ------------------------------------------------------------------------------- all runs
def search_jobs(method, plan):
    """The runs that choose a method's learning rate."""
    outputs = {"outputs": plan.search_outputs, "checkpoints": [plan.search_outputs]}
    job = {"method": method, "seed": plan.search_seed, "split": "validation", **outputs}
    return [job | {"rate": rate} for rate in plan.rates if len(plan.rates) > 1]


def best_rate(method, plan, results):
    """The rate of the lowest KL(posterior || policy) on validation topics."""
    found = {job["rate"]: finished(results, job) for job in search_jobs(method, plan)}
    if not found:
        return plan.rates[0]
    return min(found, key=lambda rate: found[rate]["points"][-1]["kl_posterior"][0])


def finished(results, job):
    """The run in the results that is this job, or None."""
    return next((run for run in results["runs"] if all(run[name] == job[name] for name in job)), None)


def compare(arguments, plan, path, do):
    """Does every job that does not stand in the results: first those that choose the rates, then seed by
    seed."""
    for method in arguments.methods:
        for job in search_jobs(method, plan):
            do(job)
    outputs = {"outputs": plan.checkpoints[-1], "checkpoints": list(plan.checkpoints)}
    for seed in plan.seeds:
        for method in arguments.methods:
            rate = best_rate(method, plan, read(path))
            do({"method": method, "rate": rate, "seed": seed, "split": "test", **outputs})


def read(path):
    return json.loads(path.read_text())


def write(path, results):
    """Whole or not at all."""
    text = json.dumps(results, indent=1)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)


# ------------------------------------------------------------------------------- what is printed
def print_truth(truths):
    print("\nThe truth, means over prompts ± standard error, from weighted draws and from accepted ones:")
    for split, numbers in truths.items():
        print(f"  {split}: {numbers['prompts']} prompts, {numbers['draws']} draws of the prior each")
        print(f"    log p(G=1|x) {told(numbers['log_z'])}; effective sample size {numbers['ess'][0]:.0f}")
        texts = {"acceptance": "acceptance", "reward": "E[r]", "kl_prior": "KL(posterior||prior)"}
        for name, text in texts.items():
            both = [told(numbers[f"{name}_{way}"]) for way in WAYS]
            print(f"    {text:22} weighting {both[0]}   rejection {both[1]}")


def told(pair):
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def print_rates(plan, results):
    print("\nLearning rates: KL(posterior||policy) on validation topics; the lowest (*) is taken")
    print(f"  {'':20}" + "".join(f"{rate:>12g}" for rate in plan.rates))
    for method in (*BRAIN, *TRL):
        runs = [finished(results, job) for job in search_jobs(method, plan)]
        if runs and all(runs):
            values = [run["points"][-1]["kl_posterior"][0] for run in runs]
            stars = ["*" if value == min(values) else " " for value in values]
            cells = "".join(f"{value:>11.3f}{star}" for value, star in zip(values, stars))
            print(f"  {method:20}{cells}")


def of_test(results):
    """{(method, learning rate, scored outputs): the runs on test topics, one for each seed}, in the order of
    the methods and then of the outputs."""
    found = {}
    for run in sorted(results["runs"], key=lambda run: ((*BRAIN, *TRL).index(run["method"]), run["outputs"])):
        if run["split"] == "test":
            found.setdefault((run["method"], run["rate"], run["outputs"]), []).append(run)
    return found


def longest(results):
    """{method: its runs of most outputs on test topics}. A later one of as many replaces an earlier one."""
    return {method: runs for (method, _, _), runs in of_test(results).items()}


def print_table(results):
    """Numbers of test topics at the end of the runs, mean over seeds."""
    rows = {"prior": [results["prior"]]}
    for (method, rate, outputs), runs in of_test(results).items():
        rows[f"{method}, {outputs} outputs, rate {rate:g}"] = [run["end"] for run in runs]
    rows |= {"exact posterior": [results["posterior"]]}
    print("\nTest topics at the end of the runs, means over seeds and prompts, nats")
    print(f"  {'':48}{'seeds':>6}" + "".join(f"{name:>19}" for name in NAMES.values()))
    for row, ends in rows.items():
        cells = [f"{np.mean([end[name][0] for end in ends]):.3f}" for name in NAMES]
        print(f"  {row:48}{len(ends):>6}" + "".join(f"{cell:>19}" for cell in cells))
    print("\nKL(posterior||policy), mean over seeds ± standard error over prompts; the same by rejection")
    for (method, rate, outputs), runs in of_test(results).items():
        print(f"  {method}, run of {outputs} outputs, rate {rate:g}")
        for points in zip(*(run["points"] for run in runs)):
            mean = {x: np.mean([p[x] for p in points], 0) for x in ("kl_posterior", "kl_posterior_rejection")}
            cells = "   ".join(told(pair) for pair in mean.values())
            seconds = np.mean([point["seconds"] for point in points])
            print(f"  {points[0]['outputs']:>7} outputs {seconds:>7.0f} s   {cells}")


def print_examples(results):
    print("\nThe first three test prompts: first output of the prior, of each method, of the exact posterior")
    for i, prompt in enumerate(results["examples"]):
        print(f"  {prompt['prompt']}")
        lines = {"prior": prompt["prior"]}
        lines |= {method: runs[0]["first_outputs"][i] for method, runs in longest(results).items()}
        for name, (text, reward) in (lines | {"exact posterior": prompt["posterior"]}).items():
            print(f"    {name:18}{reward:>6.2f}  {text!r}")


def examples(truth):
    found = []
    for x in truth[:3]:
        i = int(np.flatnonzero(x.accepted)[0]) if x.accepted.any() else int(x.resampled()[0])
        pairs = {"prior": [x.texts[0], float(x.reward[0])], "posterior": [x.texts[i], float(x.reward[i])]}
        found.append({"prompt": x.example.prompt[-1]["content"], **pairs})
    return found


def draw_picture(results, path):
    """KL(posterior || policy) over scored outputs and over seconds, in the longest runs of each method: means
    over seeds, `brain` in front."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    start = results["prior"]["kl_posterior"][0]
    colors = dict(zip((*BRAIN, *TRL), plt.get_cmap("tab10").colors))
    for method, runs in longest(results).items():
        points = list(zip(*(run["points"] for run in runs)))
        mean = [start] + [np.mean([point["kl_posterior"][0] for point in at]) for at in points]
        look = {"color": colors[method], "marker": "o", "ms": 4, "lw": 1.2, "label": method}
        if method == "brain":
            look |= {"color": "black", "lw": 3, "ms": 7, "zorder": 9}
        for axis, name in zip(axes, ("outputs", "seconds")):
            axis.plot([0] + [np.mean([point[name] for point in at]) for at in points], mean, **look)
    for axis, name in zip(axes, ("scored outputs", "seconds of one processor core")):
        axis.axhline(start, color="0.4", ls=":")
        axis.text(0, start, " prior", va="bottom", color="0.4")
        axis.axhline(0, color="0.4", ls="--")
        axis.text(0, 0, " exact posterior", va="bottom", color="0.4")
        axis.set(xlabel=name)
        axis.grid(color="0.9")
    axes[0].set(ylabel="KL(posterior || policy), nats, test topics")
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------- command line
ARRAYS = ("reward", "log_p", "accepted")  # of a Truth


def open_results(arguments, plan):
    """The results in the directory, or new ones. Refuses those of another comparison."""
    path = arguments.figures / "real.json"
    chosen = ("checkpoints", "search_outputs", "rates", "seeds", "search_seed")
    settings = {"model": arguments.model, "r_max": R_MAX, "beta": BETA} | dataclasses.asdict(plan)
    settings = {name: value for name, value in settings.items() if name not in chosen}
    settings = json.loads(json.dumps(settings))  # tuples become lists
    if not path.exists():
        arguments.figures.mkdir(parents=True, exist_ok=True)
        write(path, {"settings": settings, "versions": {}, "truth": {}, "runs": []})
    found = read(path)["settings"]
    odd = [name for name in settings if found.get(name) != settings[name]]
    message = f"--figures {arguments.figures}: has a comparison with another {', '.join(odd)}"
    brain.refuse_if(odd, f"{message}; name another directory")
    return path


def versions():
    """{package: version} of what numbers depend on and is installed."""
    found = {}
    for name in ("torch", "transformers", "peft", "numpy", "trl", "vaderSentiment"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def load_truth(arguments, plan, split, examples, reward):
    """[Truth] of a split from its file of draws, else drawn and kept there."""
    kept = arguments.figures / f"draws-{split}.pt"
    if kept.exists():
        stored = torch.load(kept, weights_only=True)
        arrays = [[line[name].numpy() for name in ARRAYS] for line in stored]
        return [Truth(x, y["outputs"], y["texts"], *some) for x, y, some in zip(examples, stored, arrays)]
    known = draw_truth(new_policy(arguments, plan, 0), reward, examples, plan, split)
    stored = [{name: torch.from_numpy(getattr(x, name)) for name in ARRAYS} for x in known]
    torch.save([line | {"outputs": x.outputs, "texts": x.texts} for line, x in zip(stored, known)], kept)
    return known


def check_packages(methods):
    """UserError says what to install."""
    needed = ["vaderSentiment", "trl"] if {*methods} & {*TRL} else ["vaderSentiment"]
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError:
            raise brain.UserError(f"needs a package: pip install {' '.join(needed)}") from None


def execute(arguments, plan):
    check_packages(arguments.methods)
    with brain.library_errors("--model", arguments.model):
        arguments.tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    brain.refuse_if(not arguments.tokenizer.chat_template, f"--model {arguments.model}: has no chat template")
    path = open_results(arguments, plan)
    prompts, settings = prompts_of(plan), settings_of(plan, "brain", 0.0, 0)
    data = {
        split: [
            brain.make_example(i, {"prompt": prompt}, None, False, arguments.tokenizer, settings)
            for i, prompt in enumerate(found)
        ]
        for split, found in prompts.items()
    }
    reward, known = brain.RewardFunction(sentiment, "sentiment"), {}
    for split in ("test", "validation"):
        if split == "test" or len(plan.rates) > 1:  # the validation topics only choose a learning rate
            known[split] = load_truth(arguments, plan, split, data[split], reward)
    prior, posterior = references(known["test"])
    truths = {split: describe_truth(truth) for split, truth in known.items()}
    found = {"truth": truths, "prior": prior, "posterior": posterior, "examples": examples(known["test"])}
    found["versions"] = read(path)["versions"] | versions()
    write(path, read(path) | found)
    print_truth(truths)

    def do(job):
        if not finished(read(path), job):
            run = run_job(job, arguments, plan, data["train"], prompts["train"], known)
            results = read(path)  # again, as another process may have written meanwhile
            write(path, results | {"runs": results["runs"] + [run]})

    compare(arguments, plan, path, do)
    results = read(path)
    print_rates(plan, results)
    print_table(results)
    print_examples(results)
    draw_picture(results, arguments.figures / "real.png")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy.real", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    every = [*BRAIN, *TRL]
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a chat model (default %(default)s)")
    add("--methods", nargs="+", choices=every, default=every, metavar="METHOD", help=f"of {', '.join(every)}")
    add("--figures", type=Path, default=Path("runs/real"), metavar="DIR", help="of results (%(default)s)")
    add("--outputs", type=int, nargs="+", metavar="N", help="checkpoints of a run, in scored outputs")
    add("--rates", type=float, nargs="+", metavar="RATE", help="a grid; a single one is taken as it is")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="of the runs that are reported")
    add("--quick", action="store_true", help="tiny budgets; the numbers mean nothing")
    arguments = parser.parse_args(argv)
    try:
        typed = {"checkpoints": arguments.outputs, "rates": arguments.rates, "seeds": arguments.seeds}
        typed = {name: tuple(values) for name, values in typed.items() if values}
        execute(arguments, dataclasses.replace(QUICK if arguments.quick else Plan(), **typed))
        return 0
    except brain.UserError as error:
        print(f"toy.real: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
