"""What do updates, scoring and sampling cost in brain.py, against the usual ways?

    python -m toy.speed            a table and a conclusion, on a machine that does nothing else
    python -m toy.speed --quick    the same at toy sizes, in seconds, to see that it runs

The model is a GPT-2 with random parameters: 6 layers, width 256, 8192 tokens, 7.1 million parameters. One
prompt has 512 tokens and 32 outputs of 48 tokens. Numbers are float32 on a CPU and bfloat16 on a GPU.

    update      the prompt once, its cache shared, against 32 whole sequences with logits at all positions
    scoring     the first log p of a prompt's outputs, the same two ways without gradient
    sampling    Policy.sample, against generate(num_return_sequences=32)
    kinds       the same for small models whose caches are of other kinds: recurrent states, convolutions
    threads     an update of a tiny model with all threads, against one

The ways of a row take turns in one process, and a ratio is that of their medians. Peak memory is what a fresh
process needs on top of model and optimizer. If the ways' numbers disagree, the exit code is 1.
"""

import argparse
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch


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


KIND = Shape(layers=4, width=64, prompt=256, n=16, length=32)
KINDS = {  # transformers' name of a kind of model: what its config needs beside the sizes
    "Llama": {},
    "Mamba2": dict(num_heads=8, head_dim=16, n_groups=2, state_size=16),
    "Qwen3Next": dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, num_experts=16),
    "Lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
    "Jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False),
    "GraniteMoeHybrid": dict(layer_types=["mamba", "attention"] * 2, mamba_n_heads=8, mamba_d_head=16),
}  # fmt: skip
QUICK = Shape(layers=2, width=32, heads=2, vocabulary=64, positions=64, prompt=24, n=4, length=6)


# --------------------------------------------------------------------- the ways
class Bench:
    """A model with random parameters, a prompt and its outputs, and the ways to go about them."""

    def __init__(self, shape, device="cpu", dtype=torch.float32, kind="GPT2"):
        import transformers

        import brain

        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.brain, self.shape, self.device = brain, shape, device
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=shape.vocabulary, max_position_embeddings=shape.positions, hidden_size=shape.width,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, bos_token_id=0, eos_token_id=0,
            num_key_value_heads=shape.heads, intermediate_size=4 * shape.width, pad_token_id=0,
            **KINDS.get(kind, {}),
        )  # fmt: skip
        self.model = transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
        self.tokenizer = words(shape.vocabulary)
        self.policy = brain.Policy(self.model, self.tokenizer)
        self.optimizer = torch.optim.AdamW(self.policy.parameters().values(), lr=1e-5)
        self.prompt = torch.randint(1, shape.vocabulary, (shape.prompt,))
        self.outputs = list(torch.randint(1, shape.vocabulary, (shape.n, shape.length)))
        self.log_p = torch.no_grad()(self.shared_log_prob)().cpu()
        self.alpha_hat = torch.randn(shape.n).softmax(-1)

    # ---- updates and scoring
    def shared_log_prob(self):
        return self.policy.log_prob(self.prompt, self.outputs)

    def plain_log_prob(self):
        """(n,): whole sequences, log-softmax at all positions, as it is usually written."""
        whole = torch.stack([torch.cat([self.prompt, output]) for output in self.outputs]).to(self.device)
        logits = self.model(input_ids=whole, use_cache=False).logits[:, :-1].float()
        found = logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
        return found[:, self.shape.prompt - 1 :].sum(-1)

    def gradient(self, log_prob):
        self.optimizer.zero_grad()
        cached = [x.to(self.device) for x in (self.log_p, self.alpha_hat)]
        self.brain.brain_loss(log_prob().float(), *cached).backward()
        return torch.cat([p.grad.flatten() for p in self.policy.parameters().values()])

    def update(self, log_prob):
        self.gradient(log_prob)
        self.optimizer.step()

    # ---- sampling; random parameters hardly ever end, so all outputs are of the same length
    def sample_shared(self, seed=0):
        seeded = self.brain.seeded(seed)
        return self.policy.sample(self.prompt, self.shape.n, self.shape.length, generator=seeded)

    @torch.no_grad()
    def sample_generate(self, seed=0):
        """generate() without the cut to 50 tokens that its defaults make."""
        torch.manual_seed(seed)
        ids = self.prompt[None].to(self.device)
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=self.shape.n, pad_token_id=0,
            max_new_tokens=self.shape.length, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        )  # fmt: skip

    def ways(self):
        """row of the table -> way -> function. The first way is brain.py's."""
        shared, plain, score = self.shared_log_prob, self.plain_log_prob, torch.no_grad()
        ways = {
            "update": {"shared": lambda: self.update(shared), "plain": lambda: self.update(plain)},
            "scoring": {"shared": score(shared), "plain": score(plain)},
            "sampling": {"shared": self.sample_shared, "generate": self.sample_generate},
        }
        return {row: {f"{row} {way}": f for way, f in some.items()} for row, some in ways.items()}


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
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def take_turns(ways, repeats, device):
    """name -> median seconds of functions, called in turn."""
    rounds = [[clock(work, device) for work in ways.values()] for _ in range(repeats)]
    return dict(zip(ways, map(statistics.median, zip(*rounds))))


def resident(line):
    """Bytes of this process: now (VmRSS), or at most so far (VmHWM)."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(text.split()[1]) for text in status if text.startswith(line))


def memory_in_here(shape, way, device, dtype, threads, answer):
    torch.set_num_threads(threads)
    bench = Bench(shape, device, dtype)
    functions = {name: function for row in bench.ways().values() for name, function in row.items()}
    work = functions[way]
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
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc then gives back at once what is freed
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    arguments = (shape, way, device, dtype, torch.get_num_threads(), answer)
    process = context.Process(target=memory_in_here, args=arguments)
    process.start()
    process.join()
    return answer.get(timeout=10) if process.exitcode == 0 else math.nan


def disagreements(bench, tolerance):
    """Prints how far the ways are apart. -> list of those that are further than rounding"""
    policy, shape = bench.policy, bench.shape
    uniform = torch.rand(shape.n, shape.length, dtype=torch.float64).to(bench.device)
    outputs, own = policy._draw([bench.prompt], uniform[None])
    scored = policy.log_prob(bench.prompt, outputs).detach()
    two = bench.shared_log_prob, bench.plain_log_prob
    pairs = {
        "log-probabilities, shared and plain": [log_prob().detach() for log_prob in two],
        "gradients, shared and plain": [bench.gradient(log_prob) for log_prob in two],
        "the sampler's own sum and the score of its outputs": (own, scored),
    }
    wrong = []
    for name, (a, b) in pairs.items():
        apart = float((a.double() - b.double()).norm() / b.double().norm())
        print(f"  {apart:8.1e}  {name}" + ("" if apart < tolerance else "   DISAGREES"))
        wrong += [] if apart < tolerance else [name]
    return wrong


# --------------------------------------------------------------------- tables and picture
def row_table(bench, repeats, dtype, weighed):
    """Prints the cost of everything. -> row -> ratio of the usual way's seconds to ours"""
    print(f"\n{'':12}{'way':20}{'seconds':>9}{'ratio':>8}{'peak memory':>14}")
    ratios = {}
    for name, ways in bench.ways().items():
        seconds = take_turns(ways, repeats, bench.device)
        ours, usual = seconds.values()
        ratios[name] = usual / ours
        for way, taken in seconds.items():
            size = peak_memory(bench.shape, way, bench.device, dtype) if name in weighed else math.nan
            memory = f"{size / 1e9:11.2f} GB" if name in weighed else ""
            print(f"{name:12}{way:20}{taken:9.3f}{taken / ours:8.2f}{memory}", flush=True)
    return ratios


def prompts_together(quick):
    """Sampling 8 outputs of each of 8 prompts of different lengths. -> ratios, as `row_table`"""
    shape = Shape(layers=12, width=768, heads=12, vocabulary=32_000, n=8, length=16)  # 137M parameters
    bench = Bench(dataclasses.replace(QUICK, n=2) if quick else shape, kind="Llama")
    n, length, vocabulary = bench.shape.n, bench.shape.length, bench.shape.vocabulary
    sizes = range(5, 13) if quick else range(33, 41)
    prompts = [torch.randint(1, vocabulary, (size,)) for size in sizes]
    ids, real = bench.brain.pad_right(prompts, "cpu", "left")
    plain = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, max_new_tokens=length)
    ways = {
        "together": lambda: bench.policy.sample_together(prompts, n, length),
        "prompt by prompt": lambda: [bench.policy.sample(prompt, n, length) for prompt in prompts],
        "generate on the padded batch": torch.no_grad()(
            lambda: bench.model.generate(ids, attention_mask=real.long(), num_return_sequences=n, **plain)
        ),
    }
    ours, *others = take_turns(ways, 1 if quick else 3, "cpu").values()
    return {f"sampling 8 prompts, against {way}": other / ours for way, other in zip(list(ways)[1:], others)}


def more_rows(quick):
    """Sampling from other kinds of models, and what threads cost a tiny one. -> ratios, as `row_table`"""
    ratios = {}
    shape = dataclasses.replace(KIND, prompt=16, n=2) if quick else KIND
    for kind in KINDS:
        ways = Bench(shape, kind=kind).ways()["sampling"]
        ours, usual = take_turns(ways, 1 if quick else 3, "cpu").values()
        ratios[f"sampling from a {kind}"] = usual / ours
    ratios |= prompts_together(quick)
    tiny, seconds = Bench(QUICK), []
    for threads in (1, os.cpu_count()):
        torch.set_num_threads(threads)
        seconds.append(clock(lambda: [tiny.update(tiny.shared_log_prob) for _ in range(30)], "cpu"))
    return ratios | {"updates of a tiny model with one thread": seconds[1] / seconds[0]}


def conclusion(ratios, wrong):
    """What the numbers say, in words."""
    print()
    for name, ratio in ratios.items():
        told = f"{ratio:.1f} times as fast as" if ratio >= 1 else f"{1 / ratio:.1f} times as slow as"
        print(f"In {name}, brain.py is {told} the usual way.")
    print(f"The ways DISAGREE in {', '.join(wrong)}." if wrong else "All ways compute the same numbers.")


def main(argv=None):
    """-> 0, or 1 if two ways disagree."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy.speed", description=__doc__, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="toy sizes; the numbers mean nothing")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    arguments = parser.parse_args(argv)
    started, device, quick = time.perf_counter(), arguments.device, arguments.quick
    nothing = "--quick: the sizes are tiny, so these numbers mean nothing. They show that the program runs.\n"
    if quick:
        torch.set_num_threads(1)  # two would wait for each other most of the time
    shape, dtype = QUICK if quick else Shape(), torch.float32 if device == "cpu" else torch.bfloat16
    print(nothing * quick + "This shows what brain.py costs, against the usual ways to compute the same.")
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    bench = Bench(shape, device, dtype)
    size = sum(p.numel() for p in bench.model.parameters())
    print(f"GPT-2 of {size:,} parameters, {dtype}, {where}, torch {torch.__version__};")
    print(f"prompt {shape.prompt} tokens, {shape.n} outputs of {shape.length}. The ways differ by")
    wrong = disagreements(bench, 1e-4 if device == "cpu" else 5e-2)
    ratios = row_table(bench, 1 if quick else 3, dtype, ("update",) if quick else bench.ways())
    conclusion(ratios | (more_rows(quick) if device == "cpu" else {}), wrong)
    print(nothing * quick + f"{time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
