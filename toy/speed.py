"""What do updates, sampling, rewards and evaluation cost, against the usual ways?

    python -m toy.speed              a table and toy/figures/speed.png, on a machine that does nothing else
    python -m toy.speed --quick      the same on toy sizes, without a picture; seconds

One model for everything, with random weights: a GPT-2 of 6 layers, width 256, 4 heads, 8192 tokens and 1024
positions, 7,098,368 weights. One prompt of 512 tokens, 32 outputs of 48; float32 on a CPU, bfloat16 on a GPU.

    update      brain.py: the prompt once, its cache shared, the vocabulary matrix on the outputs alone
                plain:    32 whole sequences, logits at all positions
                TRL:      DPOTrainer on the same outputs as 16 pairs (if `pip install trl` was run), without
                          the gradient checkpointing that it turns on by default: faster, with more memory
    scoring     log p of the first scoring, the same two ways without gradient
    sampling    Policy.sample against generate(num_return_sequences=32), lengths spread evenly from 8 to 48
    rewards     32 texts of one prompt, which share their beginning, against one by one
    evaluation  one output for each of 32 prompts of 256 to 512 tokens, in one left-padded batch, against prompt by prompt

All ways of a row take turns in one process (A B A B), and a ratio is that of their medians: what else a machine
does falls on all alike. Peak memory is what a fresh process needs on top of model and optimizer. The ways of a
row must agree in their numbers; if they do not, the exit code is 1.

Of the time of an update, arithmetic alone would take `flops() / matmul_rate()`. The rest goes to attention (small
matrices), to what is bound by memory (the GELU of GPT-2 in eight passes, the softmax over the vocabulary, copies of
the cache), and to the pages that the system hands out and takes back for large tensors.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

FIGURE = Path(__file__).parent / "figures" / "speed.png"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model, and of what goes through it."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    positions: int = 1024
    prompt: int = 512
    n: int = 32
    length: int = 48  # of each output
    chunk: int | None = None  # --outputs-per-forward


QUICK = Shape(layers=2, width=32, heads=2, vocabulary=64, positions=64, prompt=24, n=4, length=6)


def flops(shape):
    """Floating-point operations of an update of n outputs with the prompt shared: matrix products alone.

    Forward, per token and layer: 12 width^2 weights (4 in attention, 8 in the MLP), a multiplication and an
    addition each; and two products of attention, width x (keys that there are) each, masked ones included. The
    vocabulary matrix: on each position that predicts a token of an output, and once for the prompt, which nobody
    asks for and so has no backward. Backward: every product twice, for the gradients of its two factors; of the last
    layer of the prompt only that of the keys, values and queries, in one matrix: nothing else of it is used.
    """
    alone = shape.prompt - 1  # the last token of the prompt goes along with each output, in place of the output's last
    own = shape.n * shape.length
    weights = 2 * 12 * shape.width**2 * (alone + own)
    attention = 2 * 2 * shape.width * (alone**2 + own * (alone + shape.length))
    vocabulary = 2 * shape.width * shape.vocabulary
    unused = 2 * 9 * shape.width**2 * alone + 2 * 2 * shape.width * alone**2
    return 3 * (shape.layers * (weights + attention) + vocabulary * own) + vocabulary - 2 * unused


def matmul_rate(shape, device, dtype):
    """Floating-point operations per second, the best of the products that the model consists of."""
    rows, best = shape.n * shape.length, 0
    for inner, outer in ((1, 4), (4, 1), (1, shape.vocabulary / shape.width)):
        a = torch.randn(rows, int(inner * shape.width), device=device, dtype=dtype)
        b = torch.randn(a.shape[1], int(outer * shape.width), device=device, dtype=dtype)
        for _ in range(10):
            best = max(best, 2 * a.numel() * b.shape[1] / clock(lambda: a @ b, device))  # noqa: B023
    return best


# --------------------------------------------------------------------- the ways
class Bench:
    """A model with random weights, a prompt and its outputs, and the ways to go about them."""

    def __init__(self, shape, device="cpu", dtype=torch.float32):
        import transformers

        import brain

        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.brain, self.shape, self.device = brain, shape, device
        self.config = transformers.GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.positions, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=1,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(self.config).to(device, dtype).eval()
        self.tokenizer = words(shape.vocabulary)
        self.policy = brain.Policy(self.model, self.tokenizer, outputs_per_forward=shape.chunk)
        self.optimizer = torch.optim.AdamW(self.policy.parameters().values(), lr=1e-5)
        scorer = transformers.GPT2ForSequenceClassification(self.config).to(device, dtype)
        torch.nn.init.normal_(scorer.score.weight, std=1.0)  # so that rewards differ by more than rounding
        self.reward = brain.RewardModel(scorer, self.tokenizer)
        self.prompt = torch.randint(1, shape.vocabulary, (shape.prompt,))
        self.outputs = list(torch.randint(1, shape.vocabulary, (shape.n, shape.length)))
        self.log_p = torch.no_grad()(self.shared_log_prob)().cpu()
        self.alpha_hat = torch.randn(shape.n).softmax(-1)

    # ---- updates and scoring
    def plain_log_prob(self):
        """(n,): whole sequences, log-softmax at all positions, as it is usually written."""
        whole = torch.stack([torch.cat([self.prompt, output]) for output in self.outputs]).to(self.device)
        logits = self.model(input_ids=whole, use_cache=False).logits[:, :-1].float()
        found = logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
        return found[:, self.shape.prompt - 1 :].sum(-1)

    def gradient(self, log_prob):
        self.optimizer.zero_grad()
        weights = [w.to(self.device) for w in (self.log_p, self.alpha_hat)]
        self.brain.brain_loss(log_prob().float(), *weights).backward()
        return torch.cat([p.grad.flatten() for p in self.policy.parameters().values()])

    def shared_log_prob(self):
        return self.policy.log_prob(self.prompt, self.outputs)

    def update(self, log_prob):
        self.gradient(log_prob)
        self.optimizer.step()

    # ---- TRL
    def trl(self, precomputed=False):
        """A function that does one step of DPOTrainer; loading, tokenising and reference scores are done before."""
        import tempfile

        import datasets
        from trl import DPOConfig, DPOTrainer

        datasets.disable_progress_bars()
        warnings.simplefilter("ignore", FutureWarning)
        prompt, texts = self.texts(-1)  # DPOTrainer adds the end token itself
        rows = {"prompt": [prompt] * (len(texts) // 2), "chosen": texts[::2], "rejected": texts[1::2]}
        half = next(self.model.parameters()).dtype == torch.bfloat16
        settings = DPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(texts) // 2, learning_rate=1e-5, beta=1.0,
            max_length=None, precompute_ref_log_probs=precomputed, gradient_checkpointing=False, bf16=half,
            use_cpu=self.device == "cpu", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        model, reference = copy.deepcopy(self.model), None if precomputed else copy.deepcopy(self.model)
        data = datasets.Dataset.from_dict(rows)
        trainer = DPOTrainer(model, reference, settings, train_dataset=data, processing_class=self.tokenizer)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # train() would set it
        batch = next(iter(trainer.get_train_dataloader()))

        def step():
            trainer.optimizer.zero_grad()
            loss = trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.step()
            return loss

        return step

    # ---- sampling
    @contextlib.contextmanager
    def ending(self):
        """While it lasts, lengths of samples are spread evenly from a sixth of the longest to the longest.

        Random weights end hardly ever. Token t is the last one with probability 1 / (longest - t + 1), whatever came
        before; the other tokens share the rest evenly, but for what the weights say.
        """
        longest = self.shape.length

        def set_end(model, args, settings, output):
            t = output.past_key_values.get_seq_length() - self.shape.prompt + 1
            chance = 1 / (longest - t + 1) if longest // 6 <= t < longest else 1e-6
            output.logits[:, -1, 0] = math.log(self.shape.vocabulary * chance / (1 - chance))
            return output

        handle = self.model.register_forward_hook(set_end, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def sample_shared(self, seed=0):
        with self.ending():
            return self.policy.sample(self.prompt, self.shape.n, self.shape.length, generator=self.brain.seeded(seed))

    def sample_generate(self, seed=0):
        """generate() at its best: its defaults alone would cut the distribution to 50 tokens."""
        torch.manual_seed(seed)
        ids = self.prompt[None].to(self.device)
        with self.ending(), torch.no_grad():
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), num_return_sequences=self.shape.n, pad_token_id=0,
                max_new_tokens=self.shape.length, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            )  # fmt: skip

    # ---- rewards
    def texts(self, end=None):
        decode = self.tokenizer.decode
        return decode(self.prompt), [decode(output[:end]) for output in self.outputs]

    def rewards_shared(self):
        return self.reward(*self.texts())

    @torch.no_grad()
    def rewards_plain(self):
        prompt, outputs = self.texts()
        scores = []
        for output in outputs:
            ids = self.tokenizer(prompt + output, return_tensors="pt").input_ids.to(self.device)
            scores.append(self.reward.model(input_ids=ids, use_cache=False).logits[0, 0])
        return torch.stack(scores).float().cpu()

    # ---- evaluation
    def prompts(self):
        shortest = self.shape.prompt // 2
        return [self.prompt[: shortest + shortest * i // self.shape.n] for i in range(self.shape.n)]

    def evaluation(self, batch):
        """The sampler's log q (n,) of one output for each prompt, so many prompts at a time."""
        prompts, sums = self.prompts(), []
        for i in range(0, len(prompts), batch):
            some = prompts[i : i + batch]
            generators = [self.brain.seeded(i + j) for j in range(len(some))]
            sums.append(self.policy.sample_batch(some, 1, self.shape.length, generators=generators)[1][:, 0])
        return torch.cat(sums)

    def ways(self):
        """row of the table -> way -> function; the first way is brain.py's, to which the others are compared."""
        shared, plain, score = self.shared_log_prob, self.plain_log_prob, torch.no_grad()
        return {
            "update": {"update_shared": lambda: self.update(shared), "update_plain": lambda: self.update(plain)},
            "scoring": {"score_shared": score(shared), "score_plain": score(plain)},
            "sampling": {"sample_shared": self.sample_shared, "sample_generate": self.sample_generate},
            "rewards": {"rewards_shared": self.rewards_shared, "rewards_plain": self.rewards_plain},
            "evaluation": {
                "evaluation_batch": lambda: self.evaluation(self.shape.n),
                "evaluation_plain": lambda: self.evaluation(1),
            },
        }


def words(vocabulary):
    """A tokenizer of the words w1, w2, ... and the end token 0."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<end>": 0} | {f"w{i} ": i for i in range(1, vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<end>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("w[0-9]+ |<end>"), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>")


# --------------------------------------------------------------------- measuring
def clock(work, device):
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(ways, repeats, device):
    """name -> median seconds of functions, called in turn."""
    rounds = [[clock(work, device) for work in ways.values()] for _ in range(repeats)]
    return dict(zip(ways, map(statistics.median, zip(*rounds))))


def resident(line):
    """Bytes of this process: now (VmRSS), or at most so far (VmHWM); getrusage would count the parent's too."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(text.split()[1]) for text in status if text.startswith(line))


def memory_in_here(shape, way, device, dtype, threads, answer):
    torch.set_num_threads(threads)
    bench = Bench(shape, device, dtype)
    functions = {name: function for row in bench.ways().values() for name, function in row.items()}
    work = bench.trl() if way == "trl" else functions[way]
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before, peak = resident("VmRSS"), lambda: resident("VmHWM")
    else:
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    work()
    answer.put(peak() - before)


def peak_memory(shape, way, device, dtype):
    """Bytes that one call of a way takes at most, beyond what was there before, in a fresh process."""
    # glibc reads it at the start: what is freed goes back at once. Without it holes in its heap count as memory in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=memory_in_here, args=(shape, way, device, dtype, torch.get_num_threads(), answer))
    process.start()
    process.join()
    return answer.get(timeout=10) if process.exitcode == 0 else math.nan


def disagreements(bench, tolerance):
    """Prints how far the ways are apart. -> list of those that are further than rounding"""
    shared, plain = bench.gradient(bench.shared_log_prob), bench.gradient(bench.plain_log_prob)
    policy, n = bench.policy, bench.shape.n
    outputs, own = policy.sample_batch([bench.prompt], n, bench.shape.length, generators=[bench.brain.seeded(0)])
    scored = policy.log_prob(bench.prompt, outputs[0]).detach()
    pairs = {
        "log-probabilities, shared and plain": (bench.shared_log_prob().detach(), bench.plain_log_prob().detach()),
        "gradients, shared and plain": (shared, plain),
        "the sampler's own sum and the score of its outputs": (own[0], scored),
        "rewards, shared and one by one": (bench.rewards_shared(), bench.rewards_plain()),
        "log q of evaluation, in a batch and one by one": (bench.evaluation(n), bench.evaluation(1)),
    }
    wrong = []
    for name, (a, b) in pairs.items():
        apart = float((a.double() - b.double()).norm() / b.double().norm())
        print(f"  {apart:8.1e}  {name}" + ("" if apart < tolerance else "   DISAGREES"))
        wrong += [] if apart < tolerance else [name]
    return wrong


# --------------------------------------------------------------------- tables and picture

def has_trl():
    with contextlib.suppress(ImportError):
        import trl

        return trl.__version__
    return None


def row_table(bench, repeats, dtype, weighed):
    """Prints the cost of everything; peak memory of the rows `weighed`, as each takes a process of its own."""
    shape, device = bench.shape, bench.device
    print(f"\n{'':12}{'way':20}{'seconds':>9}{'ratio':>8}{'peak memory':>14}")
    for name, ways in bench.ways().items():
        if name == "update" and has_trl():
            ways |= {"trl": bench.trl(), "trl, precomputed": bench.trl(precomputed=True)}
        seconds = take_turns(ways, repeats, device)
        ours = next(iter(seconds.values()))
        for way, taken in seconds.items():
            known = name in weighed and "," not in way
            memory = f"{peak_memory(shape, way, device, dtype) / 1e9:11.2f} GB" if known else ""
            print(f"{name:12}{way:20}{taken:9.3f}{taken / ours:8.2f}{memory}", flush=True)
        if name == "update":
            rate, work = matmul_rate(shape, device, dtype), flops(shape)
            print(f"{'':12}arithmetic: {work / 1e9:.0f} GFLOP, at {rate / 1e9:.0f} GFLOP/s {work / rate:.3f} s", end="")
            print(f": {work / rate / ours:.0%} of update_shared", flush=True)
    if not has_trl():
        print("TRL: not installed (pip install trl accelerate); its step was not measured")


def sweep(shape, prompts, sizes, repeats, device, dtype):
    """Prints an update over prompt lengths and over n. -> {(prompt, n): (seconds shared, plain)}"""
    print(f"\n{'prompt':>8}{'n':>6}{'shared':>10}{'plain':>10}{'ratio':>8}")
    corner = (min(prompts), min(sizes))
    measured = {}
    for prompt, n in sorted({(p, shape.n) for p in prompts} | {(shape.prompt, n) for n in sizes} | {corner}):
        bench = Bench(dataclasses.replace(shape, prompt=prompt, n=n), device, dtype)
        seconds = take_turns(bench.ways()["update"], repeats, device)
        measured[prompt, n] = tuple(seconds.values())
        shared, plain = measured[prompt, n]
        ratio = plain / shared
        note = "   sharing does not pay" if ratio < 1 else ""
        print(f"{prompt:8}{n:6}{shared:10.3f}{plain:10.3f}{ratio:8.2f}{note}", flush=True)
    return measured


def memory_curve(shape, chunk, sizes, device, dtype):
    """Prints peak memory of an update over n. -> {chunk or None: [bytes for each n]}"""
    print(f"\npeak memory of an update{'':8}" + "".join(f"{f'n = {n}':>12}" for n in sizes))
    curves = {}
    for bound in (None, chunk):
        shapes = [dataclasses.replace(shape, n=n, chunk=bound) for n in sizes]
        curves[bound] = [peak_memory(s, "update_shared", device, dtype) for s in shapes]
        name = f"  outputs per forward: {bound or 'all'}"
        print(f"{name:32}" + "".join(f"{size / 1e9:9.2f} GB" for size in curves[bound]), flush=True)
    return curves


def plot(shape, measured, curves, sizes, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    looks = (("prompt shared", "0.0", "o", "-"), ("whole sequences", "0.5", "s", "--"))
    lines = [p for p, n in measured if n == shape.n], [n for p, n in measured if p == shape.prompt]
    for axis, xs, key in zip(axes, lines, (lambda p: (p, shape.n), lambda n: (shape.prompt, n))):
        for i, (label, color, marker, style) in enumerate(looks):
            axis.plot(xs, [measured[key(x)][i] for x in xs], color=color, marker=marker, ls=style, label=label)
        axis.set(xscale="log", yscale="log", xticks=xs, xticklabels=xs, ylabel="seconds of an update")
        axis.minorticks_off()
    axes[0].set(xlabel="tokens of the prompt", title=f"{shape.n} outputs of {shape.length} tokens")
    axes[1].set(xlabel="outputs n", title=f"prompt of {shape.prompt} tokens")
    axes[0].legend()
    for (bound, sizes_of), (color, marker, style) in zip(curves.items(), (("0.5", "s", "--"), ("0.0", "o", "-"))):
        label = f"--outputs-per-forward {bound}" if bound else "all outputs at once"
        axes[2].plot(sizes, [size / 1e9 for size in sizes_of], color=color, marker=marker, ls=style, label=label)
    axes[2].set(xlabel="outputs n", ylabel="peak memory of an update, GB", ylim=(0, None), xticks=sizes)
    axes[2].set(title="memory, prompt shared")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """-> 0, or 1 if two ways disagree."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy.speed", description=__doc__, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="toy sizes, no picture")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    started, device, quick = time.perf_counter(), arguments.device, arguments.quick
    if quick:
        torch.set_num_threads(1)  # two would wait for each other most of the time
    shape, dtype = QUICK if quick else Shape(), torch.float32 if device == "cpu" else torch.bfloat16
    where = f"{torch.get_num_threads()} threads (load before: {os.getloadavg()[0]:.1f})"
    where = where if device == "cpu" else torch.cuda.get_device_name()
    bench = Bench(shape, device, dtype)
    weights = sum(p.numel() for p in bench.model.parameters())
    print(f"GPT-2 of {weights:,} weights, {dtype}, {where}, torch {torch.__version__}, TRL {has_trl()}")
    print(f"prompt {shape.prompt} tokens, {shape.n} outputs of {shape.length}\nthe ways agree to (relative distance)")
    wrong = disagreements(bench, 1e-4 if device == "cpu" else 5e-2)
    row_table(bench, 1 if quick else 3, dtype, () if quick else bench.ways())
    del bench
    prompts, sizes, chunk = ((4, 24), (2, 4), 2) if quick else ((8, 32, 128, 512), (2, 8, 32), 8)
    measured = sweep(shape, prompts, sizes, 1 if quick else 2, device, dtype)
    sizes = (4,) if quick else (8, 32, 128)
    curves = memory_curve(shape, chunk, sizes, device, dtype)
    if not quick:
        FIGURE.parent.mkdir(exist_ok=True)
        plot(shape, measured, curves, sizes, FIGURE)
    print(f"\n{len(wrong)} disagreements{'' if quick else f'; {FIGURE}'}; {time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
