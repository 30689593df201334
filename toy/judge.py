"""Which of two runs of brain.py answers better: by their rewards, and by a language model that reads both
answers.

    python -m toy.judge RUN_A RUN_B      win, tie and loss of RUN_A by reward
    python -m toy.judge RUN gold         the same against the gold answers
    python -m toy.judge RUN_A RUN_B --model NAME --url http://localhost:8000/v1 --task summary --limit 500

A run is an output directory of brain.py. Of each row of its test_outputs.jsonl, the first output is compared.
A policy can win by the reward that it was trained on without being better. So the paper also asks
Mixtral-8x7B (Table 1) and GPT-4 (Table 2). Here the judge is any model behind an OpenAI-compatible endpoint.
The environment variable OPENAI_API_KEY is sent to --url alone.

Each verdict is saved at once, in RUN_A/judge-*.jsonl. The same command continues after an interruption. The
file's name depends on all that could change a verdict, so verdicts of two kinds never mix. Departures from
the paper:
1. The instructions paraphrase appendix B.3. Give the paper's wording with --prompt FILE.
2. The seed decides for each example which answer is called A, because judges favour a place.
3. The last verdict in a reply counts, because judges repeat the instruction.
4. Replies without a verdict, and questions without a reply, are counted and left out of N.
5. The win-rate counts a tie as half a win.
6. White space around an answer is not shown to the judge.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import defaultdict, deque
from pathlib import Path
from time import sleep

from huggingface_hub import InferenceClient, constants
from tqdm import tqdm

INSTRUCTION = """\
Two assistants, A and B, have each written %s. Be a neutral referee and say which one is better%s.

- First hold each of the two against the %s and against the other one.
- Neither the place of an answer nor its length may tip the scales.
- Give your reasons, and only then decide. Close with exactly one of these marks: [[A]] when A is better,
  [[B]] when B is better, [[C]] when they are equally good.

=== %s ===
{{Conversation}}

=== A ===
{{AssistantA}}

=== B ===
{{AssistantB}}
"""
TALK = "conversation", "Conversation"
INSTRUCTIONS = {
    "dialogue": INSTRUCTION % ("the next reply of the conversation below", " for the user", *TALK),
    "summary": INSTRUCTION % ('a short summary (a "tl;dr") of the post below', "", "post", "Post"),
}
PLACES = ("Conversation", "AssistantA", "AssistantB")
RETRIES = 5  # after pauses of 1, 2, 4, 8, 16 seconds, or of what the server asks for (a minute at most)
GIVE_UP = 5  # questions in a row without a reply: it is the server that is ill, not the question
MEND = {
    401: "set the environment variable OPENAI_API_KEY to a key that it accepts",
    403: "set OPENAI_API_KEY to a key that may use this model, or change --model",
    404: "--url should end in /v1, and --model must be a name that the server knows",
}


def stop(message):
    """Something that the user can mend: say it in a line and leave."""
    print(f"judge: {message}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------ what is compared
def json_lines(path, data):
    """[(place, dict)] of JSON lines; a place is "file:line"."""
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is another kind of value")
        except ValueError as error:
            stop(f"{path}:{number}: not a JSON object ({error}); mend or remove this line")
        rows.append((f"{path}:{number}", row))
    return rows


def is_prompt(value):
    """Text, or a list of {"role", "content"} messages."""
    messages = value if isinstance(value, list) else [{"role": "", "content": value}]
    return all(isinstance(m, dict) and type(m.get("role")) is type(m.get("content")) is str for m in messages)


def is_number(value):
    return type(value) in (int, float) and abs(value) < math.inf


def read_run(name, gold):
    """[(place, prompt, output, reward)] of the first output of each row; with `gold`, of its gold answer."""
    path = Path(name, "test_outputs.jsonl")
    if not path.is_file():
        stop(f"{path}: no such file; give the output directory of a finished run, or the word gold")
    answer, reward = ("gold", "gold_reward") if gold else ("output", "reward")
    rows = {}
    for place, row in json_lines(path, path.read_bytes()):
        right = {"row": type(row.get("row")) is int, "prompt": is_prompt(row.get("prompt"))}
        right |= {answer: type(row.get(answer)) is str, reward: is_number(row.get(reward))}
        for key in (key for key in right if not right[key]):
            stop(f"{place}: {key!r} is missing or not of its kind; evaluate that run again")
        rows.setdefault(row["row"], (place, row["prompt"], row[answer], row[reward]))
    return list(rows.values()) or stop(f"{path}: holds no examples; evaluate that run first")


def pair_up(rows_a, rows_b):
    """[(row of A, row of B)] in A's order. A prompt that comes k times: first with first, and so on."""
    waiting = defaultdict(deque)
    for row in rows_b:
        waiting[json.dumps(row[1], sort_keys=True)].append(row)
    pairs, alone = [], []
    for row in rows_a:
        same = waiting[json.dumps(row[1], sort_keys=True)]
        pairs.append((row, same.popleft())) if same else alone.append(row)
    alone += [row for rest in waiting.values() for row in rest]
    if alone:
        stop(f"{alone[0][0]}: the other run lacks this prompt; evaluate both on the same prompts")
    return pairs


def read_evidence(run):
    """A line about the last test in RUN/metrics.jsonl, or None if the numbers for it are not there."""
    path = Path(run, "metrics.jsonl")
    lines = json_lines(path, path.read_bytes()) if path.is_file() else []
    tests = [line for _, line in lines if line.get("split") == "test"]
    keys = ("elbo", "elbo_standard_error", "log_evidence", "log_evidence_standard_error")
    if not tests or not all(is_number(tests[-1].get(key)) for key in keys):
        return None
    elbo, elbo_error, evidence, evidence_error = (tests[-1][key] for key in keys)
    told = f"elbo {elbo:.3f} (standard error {elbo_error:.3f}), log_evidence {evidence:.3f}"
    return f"{run}: {told} (standard error {evidence_error:.3f}), gap {evidence - elbo:.3f}"


# ------------------------------------------------------------------ the numbers
def interval(values):
    """'95.40 ± 0.57': mean in per cent and half-width of its normal 95% interval, as in Table 1."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return f"{100 * mean:.2f} ± {196 * math.sqrt(variance / len(values)):.2f}"


def report(judge, winners):
    """A line: win, tie and loss of RUN_A, and the win-rate with a tie as half a win (departure 5)."""
    if not winners:
        return f"by {judge}: no verdict"
    score = {"RUN_A": 1.0, "tie": 0.5, "RUN_B": 0.0}
    win, tie, loss = (interval([winner == name for winner in winners]) for name in score)
    half = interval([score[winner] for winner in winners])
    counts = f"win {win}, tie {tie}, loss {loss}, win-rate with ties as half {half}"
    return f"by {judge}: {counts}, N {len(winners)}"


def better(reward_a, reward_b):
    return "tie" if reward_a == reward_b else "RUN_A" if reward_a > reward_b else "RUN_B"


# ------------------------------------------------------------------ one question and its verdict
def question(template, prompt, answer_a, answer_b):
    """The template, filled in one pass: an answer that itself contains {{AssistantA}} stays as it is."""
    if isinstance(prompt, list):
        prompt = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
    values = dict(zip(PLACES, (prompt, answer_a.strip(), answer_b.strip())))
    return re.sub(r"\{\{(%s)\}\}" % "|".join(PLACES), lambda place: values[place[1]], template)


def read_verdict(reply):
    """The last of [[A]], [[B]], [[C]] in a reply (departure 3), or None."""
    return ([None] + re.findall(r"\[\[([ABC])\]\]", reply))[-1]


def make_client(url):
    """(client, key)"""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    constants.HF_HUB_OFFLINE = False  # meant for the hub, which is not asked; it would keep us from --url too
    # Without any key the client would send this machine's Hugging Face token to whatever --url is.
    return InferenceClient(base_url=url, api_key=key or "none", timeout=120), key


def ask(client, key, text, args):
    """(reply, None), or (None, what went wrong) when all tries are used up."""

    def hide(text):  # a server may send the key back, in a reply or in an error
        return text.replace(key, "***") if key else text

    messages = [{"role": "user", "content": text}]
    settings = {"model": args.model, "max_tokens": args.max_tokens, "temperature": 0}
    for attempt in range(RETRIES + 1):
        try:
            answer = client.chat_completion(messages, **settings)
            return hide(str(answer.choices[0].message.content or "")), None
        except Exception as error:  # whatever a server can do: refuse, hang, die, send no JSON or no reply
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            said = f"{status}: {response.text}" if status else f"{type(error).__name__}: {error}"
            wrong = hide(" ".join(said.split()))[:300]
        if status in MEND:
            stop(f"{args.url} answered {status}: {MEND[status]}")
        if status and 400 <= status < 500 and status not in (408, 429):
            break  # it refuses this very question (too long, say), and would again
        if attempt < RETRIES:
            asked_for = response.headers.get("retry-after", "") if status else ""
            pause = min(60, max(2**attempt, int(asked_for) if asked_for.isdecimal() else 0))
            print(f"judge: {wrong}; again in {pause} s", file=sys.stderr)
            sleep(pause)
    return None, wrong


# ------------------------------------------------------------------ all questions, saved as they are answered
def verdict_file(args, pairs):
    """RUN_A/judge-<other run>-<digest>.jsonl: a file of its own for each set of texts, judge and settings."""
    home, other = (args.run_b, "gold") if args.run_a == "gold" else (args.run_a, args.run_b)
    other = Path(other).resolve().name
    texts = [[prompt, output_a, output_b] for (_, prompt, output_a, _), (_, _, output_b, _) in pairs]
    decisive = json.dumps([args.model, args.template, args.seed, args.max_tokens, texts])
    return Path(home, f"judge-{other}-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}.jsonl")


def read_verdicts(path):
    """{index: record} of an interrupted judgement; a last line cut in writing is taken off the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return {record["index"]: record for _, record in json_lines(path, data[:whole])}


def judge(args, pairs, path):
    """Ask about each pair that is not in the file yet. -> ({index: record}, number still without a reply)"""
    client, key = make_client(args.url)
    coins = random.Random(args.seed)
    swaps = [coins.random() < 0.5 for _ in pairs]  # drawn for all: --limit and a restart change none of them
    done, lost = read_verdicts(path), []
    print(f"verdicts: {path} ({len(done)} there already)", flush=True)
    for i in tqdm([i for i in range(len(pairs[: args.limit])) if i not in done], desc="judged", disable=None):
        (_, prompt, output_a, _), (_, _, output_b, _) = pairs[i]
        sides = [("RUN_A", output_a), ("RUN_B", output_b)]
        (run_a, answer_a), (run_b, answer_b) = sides[::-1] if swaps[i] else sides  # as the judge sees them
        reply, error = ask(client, key, question(args.template, prompt, answer_a, answer_b), args)
        verdict = read_verdict(reply or "")
        winner = {"A": run_a, "B": run_b, "C": "tie"}.get(verdict)
        record = {"index": i, "called_A": run_a, "verdict": verdict, "winner": winner}
        lost.append(record | {"reply": reply, "error": error})
        if error is None:  # the server is well: a question just before that got no reply is itself at fault
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in lost)
            done |= {record["index"]: record for record in lost}
            lost = []
        elif len(lost) == GIVE_UP:
            break
    if len(lost) == GIVE_UP or not done:
        stop(f"{args.url}: no reply to {len(lost)} questions in a row; {lost[-1]['error']}\n"
             "judge: see to the server, --url or --model; the same command goes on where this one stopped")
    return done, len(lost)


# ------------------------------------------------------------------ the command line
def arguments(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy.judge", description=__doc__, formatter_class=raw)
    parser.error = lambda message: stop(f"{message}; see --help")
    add = parser.add_argument
    add("run_a", metavar="RUN_A", help="output directory of a run, or the word gold")
    add("run_b", metavar="RUN_B", help="output directory of a run, or the word gold")
    add("--limit", type=int, help="compare the first LIMIT examples alone (the paper: 500 for GPT-4)")
    add("--model", help="the judge's name at the endpoint; without it, rewards alone are compared")
    add("--url", help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    add("--task", choices=INSTRUCTIONS, default="dialogue", help="which instruction (default: dialogue)")
    add("--prompt", metavar="FILE", help="another one, which holds {{Conversation}} and so on")
    add("--seed", type=int, default=0, help="draws which answer is called A (default: 0)")
    add("--max-tokens", type=int, default=1024, help="longest reply of the judge (default: 1024)")
    args = parser.parse_args(argv)
    if args.run_a == args.run_b == "gold":
        stop("RUN_A and RUN_B are both gold; give at least one run")
    if args.limit is not None and args.limit < 1:
        stop(f"--limit {args.limit}: must be at least 1")
    if args.model is None and (args.url or args.prompt):
        stop("--url and --prompt are for a judge; add --model NAME, or leave them out")
    if args.model is not None and not (args.url or "").startswith(("http://", "https://")):
        stop("--model needs --url, an address such as http://localhost:8000/v1")
    args.template = INSTRUCTIONS[args.task]
    if args.prompt is not None:
        args.template = Path(args.prompt).read_text(encoding="utf-8")
    for name in PLACES:
        if f"{{{{{name}}}}}" not in args.template:
            stop(f"--prompt {args.prompt}: lacks {{{{{name}}}}}; put it where that text belongs")
    return args


def compare(args):
    """Both runs by reward, then by the judge, then by their distance to the posterior."""
    sides = (args.run_a, args.run_b), (args.run_b, args.run_a)
    pairs = pair_up(*[read_run(other if run == "gold" else run, run == "gold") for run, other in sides])
    few = pairs[: args.limit]
    print(f"This compares {len(few)} of {len(pairs)} answers of {args.run_a} (A) and {args.run_b} (B).")
    by_reward = [better(a[-1], b[-1]) for a, b in few]
    print(report("reward", by_reward))
    winners = {"reward": by_reward}
    if args.model is not None:
        done, again = judge(args, pairs, verdict_file(args, pairs))
        records = [done[i] for i in sorted(done) if i < len(few)]
        winners[args.model] = [record["winner"] for record in records if record["winner"]]
        print(report(args.model, winners[args.model]))
        failed = sum(record["error"] is not None for record in records)
        unparsable = sum(record["winner"] is None for record in records) - failed
        print(f"not in N: {unparsable} unparsable replies, {failed + again} without a reply")
        print("Only the paper's wording (appendix B.3, with --prompt FILE) compares with the paper's tables.")
    for judge_name, names in winners.items():
        ahead, behind = names.count("RUN_A"), names.count("RUN_B")
        # Of the examples that are not ties, the share of A's wins: a sign test at two standard deviations.
        sure = abs(ahead - behind) > 1.96 * math.sqrt(ahead + behind)
        told = "neither surely wins" if not sure else f"{args.run_a if ahead > behind else args.run_b} wins"
        print(f"By {judge_name}, {told}: {ahead} wins against {behind}.")
    evidence = [read_evidence(run) for run in (args.run_a, args.run_b) if run != "gold"]
    if len(evidence) == 2 and all(evidence):
        print(*evidence, sep="\n")
        print("The gap is a lower bound of KL(policy || posterior); ", end="")
        print("only runs with the same reward, beta and data can be compared.")


def main(argv=None):
    try:
        compare(arguments(argv))
    except (OSError, UnicodeDecodeError) as error:  # a file or directory that cannot be read or written
        stop(error)


if __name__ == "__main__":
    main()
