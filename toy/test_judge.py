"""toy/judge.py against a real server process on 127.0.0.1 that speaks the protocol and misbehaves on purpose.

Each docstring names the wrong version of judge.py that the test would catch.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from toy import judge  # noqa: E402

KEY = "sk-very-secret"
TEMPLATE = "{{Conversation}}\n<A>{{AssistantA}}</A>\n<B>{{AssistantB}}</B>\n"

# ------------------------------------------------------------------ the server: a process of its own
# POST /plan says how to answer from now on; GET /log tells what was asked since.
#   faults   one per question, in order ("" = none), then none; see `chat`
#   poison   [[text, fault]]: every question that contains the text meets that fault
#   replies  [[text, reply]]: what is said about a question that contains the text
#   prefer   otherwise the answer that contains this text wins; without it, the first one does
SERVER = r'''
import json, os, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

plan, log, released = {}, [], threading.Event()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, text, kind="application/json", headers=(), length=None):
        body = text.encode()
        self.send_response(status)
        for name, value in [("Content-Type", kind), ("Content-Length", str(length or len(body))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send(200, json.dumps(log))

    def do_POST(self):
        global plan, log, released
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/plan":
            released.set()
            plan, log, released = body, [], threading.Event()
            self.send(200, "{}")
        elif self.path == "/v1/chat/completions":
            log.append({"key": self.headers.get("Authorization", ""), "body": body})
            self.chat(body["messages"][-1]["content"])
        else:
            self.send(404, '{"error": "no such path"}')

    def chat(self, question):
        fault = plan["faults"].pop(0) if plan.get("faults") else ""
        for text, poison in plan.get("poison", []):
            fault = poison if text in question else fault
        if plan.get("key") and self.headers.get("Authorization") != "Bearer " + plan["key"]:
            return self.send(401, json.dumps({"error": "wrong key: " + self.headers.get("Authorization", "")}))
        if fault == "die":
            os._exit(1)
        if fault == "hang":
            if released.wait(20):
                return
            fault = ""
        if fault == "drop":
            return
        if fault == "html":
            return self.send(200, "<html>busy</html>", "text/html")
        if fault == "empty":
            return self.send(200, "{}")
        if fault == "error in 200":
            return self.send(200, '{"error": {"message": "overloaded"}}')
        if fault.startswith("429 "):
            return self.send(429, '{"error": "slow down"}', headers=[("Retry-After", fault[4:])])
        if fault:
            return self.send(int(fault), json.dumps({"error": "ill; you sent " + self.headers["Authorization"]}))
        reply = "[[A]]"
        if plan.get("prefer"):
            a, b = (plan["prefer"] in re.search(f"<{x}>(.*)</{x}>", question, re.S)[1] for x in "AB")
            reply = "[[A]]" if a and not b else "[[B]]" if b and not a else "[[C]]"
        for text, other in plan.get("replies", []):
            reply = other if text in question else reply
        answer = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}]})
        if fault == "" and plan.get("cut"):
            plan["cut"] -= 1
            return self.send(200, answer[:40], length=len(answer))
        self.send(200, answer)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
'''


class Server:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        self.home = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.url = self.home + "/v1"
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def plan(self, **plan):
        request = urllib.request.Request(self.home + "/plan", json.dumps(plan).encode(), method="POST")
        self.open(request).read()

    def log(self):
        return json.loads(self.open(self.home + "/log").read())

    def questions(self):
        return [asked["body"]["messages"][0]["content"] for asked in self.log()]

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def shared():
    server = Server()
    yield server
    server.end()


@pytest.fixture
def server(shared):
    shared.plan()
    return shared


# ------------------------------------------------------------------ runs, and the command under test
@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """No test sleeps; the pauses asked for are noted. All run as under HF_HUB_OFFLINE=1, with a token at hand."""
    from huggingface_hub import constants

    noted = []
    monkeypatch.setattr(judge, "sleep", noted.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_machine")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return noted


def write_run(path, rows):
    """rows: (prompt, output, reward) or (prompt, output, reward, gold, gold_reward)."""
    path.mkdir(parents=True, exist_ok=True)
    keys = ("prompt", "output", "reward", "gold", "gold_reward")
    lines = [json.dumps(dict(zip(keys, [*row, None, None]))) for row in rows]
    (path / "test_outputs.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    """Twelve prompts; run a's outputs hold "apple", run b's "berry"; rewards differ."""
    return [
        write_run(tmp_path / "a", [(f"prompt {i}", f" apple {i}", float(i)) for i in range(12)]),
        write_run(tmp_path / "b", [(f"prompt {i}", f" berry {i}", 6.0) for i in range(12)]),
    ]


@pytest.fixture
def run(capsys, tmp_path):
    """run(*arguments) -> (exit code, stdout, stderr)."""
    template = tmp_path / "instruction.txt"
    template.write_text(TEMPLATE)

    def run(*argv, url=None):
        more = ["--model", "m", "--url", url, "--prompt", str(template)] if url else []
        try:
            judge.main([*argv, *more])
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return run


def numbers(out, who="m"):
    """{'win': (per cent, half-width), ..., 'N': n} of the line that begins with 'by WHO:'."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"by {who}:")]
    found = re.findall(r"(win|tie|loss|half) ([\d.]+) ± ([\d.]+)", line)
    return {name: (float(mean), float(width)) for name, mean, width in found} | {"N": int(line.split("N ")[1])}


def verdicts(home):
    (path,) = Path(home).glob("judge-*.jsonl")
    return path


def records(home):
    return [json.loads(line) for line in verdicts(home).read_text().splitlines()]


# ------------------------------------------------------------------ by reward
def test_reward_numbers_equal_numpy(run, tmp_path):
    """Catches: ties as wins, A and B mixed up, a sample variance, a standard error for an interval, N or per
    cent left out; and for the last number p(1 - p), which is the variance only where there are no ties."""
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 6, 200).astype(float), generator.integers(0, 4, 200).astype(float)
    run_a = write_run(tmp_path / "a", [(f"p{i}", "x", r) for i, r in enumerate(a)])
    run_b = write_run(tmp_path / "b", [(f"p{i}", "y", r) for i, r in enumerate(b)])
    code, out, err = run(run_a, run_b)
    assert (code, err) == (0, "")
    scores = {"win": a > b, "tie": a == b, "loss": a < b, "half": (a > b) + 0.5 * (a == b)}
    found = numbers(out, "reward")
    assert found.pop("N") == 200
    for name, score in scores.items():
        expected = 100 * score.mean(), 100 * 1.96 * score.std() / np.sqrt(200)
        assert found[name] == pytest.approx(expected, abs=0.00501), name


def test_interval_equals_the_papers():
    """Table 1, Train RM: DPO on 5103 dialogues, RSO on 6553 posts. Catches 1.64 or 2 for 1.96."""
    assert judge.interval([True] * 2786 + [False] * 2317) == "54.60 ± 1.37"
    assert judge.interval([True] * 5979 + [False] * 574) == "91.24 ± 0.68"


def test_gold_stands_on_either_side(run, server, tmp_path):
    """Catches: the run's own output or reward read where gold is asked for, sides swapped for `gold RUN`,
    verdicts of `gold RUN` saved into a directory named gold."""
    rows = [(f"p{i}", "mine", float(i), "golden", 2.0) for i in range(8)]
    home = write_run(tmp_path / "a", rows)
    server.plan(prefer="golden")
    for sides, win, judged in (((home, "gold"), 62.5, 0.0), (("gold", home), 25.0, 100.0)):
        code, out, _ = run(*sides, url=server.url)
        assert code == 0
        assert (numbers(out, "reward")["win"][0], numbers(out)["win"][0]) == (win, judged)
    assert len(list(Path(home).glob("judge-*.jsonl"))) == 2
    assert not Path("gold").exists()


def test_pairs_are_matched_by_prompt(run, tmp_path):
    """Catches: matching line by line, and a dictionary of prompts that keeps the last of several equal ones."""
    run_a = write_run(tmp_path / "a", [("p", "x", 1.0), ("q", "x", 5.0), ("p", "x", 3.0)])
    run_b = write_run(tmp_path / "b", [("q", "y", 4.0), ("p", "y", 0.0), ("p", "y", 2.0)])
    found = numbers(run(run_a, run_b)[1], "reward")
    assert (found["win"][0], found["N"]) == (100.0, 3)
    messages = [{"role": "user", "content": "hi"}]
    other_order = [{"content": "hi", "role": "user"}]
    run_a = write_run(tmp_path / "c", [(messages, "x", 1.0)])
    assert run(run_a, write_run(tmp_path / "d", [(other_order, "y", 0.0)]))[0] == 0


@pytest.mark.parametrize(
    "prompts, place",
    [("pqr", "a/test_outputs.jsonl:3"), ("pq", "a/test_outputs.jsonl:3"), ("pqqx", "b/test_outputs.jsonl:4"),
     ("ppq", "a/test_outputs.jsonl:3"), ("xpqq", "b/test_outputs.jsonl:1")],
)  # fmt: skip
def test_other_prompts_are_refused(run, server, tmp_path, prompts, place):
    """Run a has the prompts p, q, q. Catches: a comparison of what both share, of sets, of lengths alone, of one
    direction alone."""
    run_a = write_run(tmp_path / "a", [(p, "x", 1.0) for p in "pqq"])
    run_b = write_run(tmp_path / "b", [(p, "y", 1.0) for p in prompts])
    code, out, err = run(run_a, run_b, url=server.url)
    assert (code, out) == (2, "")
    assert place in err and "same prompts" in err
    assert server.log() == [] and os.listdir(run_a) == ["test_outputs.jsonl"]


GOOD = '{"prompt": "p", "output": "x", "reward": 1.0, "gold": null, "gold_reward": null}\n'


@pytest.mark.parametrize(
    "text, argv, named",
    [(GOOD, ["a", "missing"], "missing/test_outputs.jsonl"),
     ("", ["a", "a"], "holds no examples"),
     (GOOD + GOOD[:30], ["a", "a"], "test_outputs.jsonl:2"),
     (GOOD + "\xff\n", ["a", "a"], "test_outputs.jsonl:2"),
     (GOOD + "[1]\n", ["a", "a"], "test_outputs.jsonl:2"),
     ("\n" + GOOD.replace("1.0", "NaN"), ["a", "a"], "test_outputs.jsonl:2: 'reward'"),
     (GOOD.replace("1.0", "true"), ["a", "a"], "'reward'"),
     (GOOD.replace('"x"', "null"), ["a", "a"], "'output'"),
     (GOOD.replace('"p"', '[{"role": "user"}]'), ["a", "a"], "'prompt'"),
     (GOOD.replace('"p"', "7"), ["a", "a"], "'prompt'"),
     (GOOD, ["a", "gold"], "test_outputs.jsonl:1: 'gold'"),
     (GOOD.replace('"gold": null', '"gold": "g"'), ["gold", "a"], "'gold_reward'"),
     (GOOD, ["gold", "gold"], "both gold"),
     (GOOD, ["a", "a", "--model", "m"], "--url"),
     (GOOD, ["a", "a", "--model", "m", "--url", "localhost:1"], "--url"),
     (GOOD, ["a", "a", "--url", "http://localhost:1"], "--model"),
     (GOOD, ["a", "a", "--prompt", "instruction.txt"], "--model"),
     (GOOD, ["a", "a", "--limit", "0"], "--limit"),
     (GOOD, ["a", "a", "--max-tokens", "-1"], "--max-tokens"),
     (GOOD, ["a", "a", "--lim", "3"], "--lim"),
     (GOOD, ["a"], "RUN_B"),
     (GOOD, ["a", "a", "--model", "m", "--url", "http://localhost:1", "--prompt", "nowhere"], "--prompt nowhere"),
     (GOOD, ["a", "a", "--model", "m", "--url", "http://localhost:1", "--prompt", "poor"], "{{AssistantB}}")],
)  # fmt: skip
def test_bad_input_ends_in_one_line(run, tmp_path, monkeypatch, text, argv, named):
    """Catches: tracebacks, argparse's paragraph of usage, lines counted without the blank ones, a missing check."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/test_outputs.jsonl").write_bytes(text.encode("latin-1"))
    Path("poor").write_text("{{Conversation}} {{AssistantA}}")
    code, _, err = run(*argv)
    assert code == 2 and named in err
    assert len(err.splitlines()) <= 2 and err.startswith("judge: ")


def test_unicode_line_separators_are_text(run, tmp_path):
    """Catches: str.splitlines(), which cuts a JSON line at a U+2028 inside an answer; open() without utf-8."""
    home = tmp_path / "a"
    home.mkdir()
    row = {"prompt": "p\u2028q", "output": "x\x85é", "reward": 1.0, "gold": None, "gold_reward": None}
    (home / "test_outputs.jsonl").write_bytes((json.dumps(row, ensure_ascii=False) + "\n\n").encode())
    assert run(str(home), str(home))[0] == 0


# ------------------------------------------------------------------ the question
@pytest.fixture
def many(tmp_path):
    return [write_run(tmp_path / x, [(f"prompt {i} ", f"{x}{i}", 0.0) for i in range(200)]) for x in ("apple", "berry")]


def test_order_is_drawn_per_example(run, server, many):
    """A judge that always says [[A]] ends near 50. Catches: a fixed order, one coin for all examples, turns
    instead of coins, and the verdict not mapped back (then 100)."""
    code, out, _ = run(*many, url=server.url)
    apple_first = np.array(["<A>apple" in question for question in server.questions()])
    win, n = numbers(out)["win"][0], numbers(out)["N"]
    assert (code, n) == (0, 200)
    assert win == pytest.approx(100 * apple_first.mean())
    assert 40 < win < 60  # no chance in it: the seed is fixed
    assert 60 < (apple_first[1:] == apple_first[:-1]).sum() < 140


def test_order_comes_from_the_seed(run, server, many):
    """Catches: coins from the clock or from hash() (salted per process), a seed that is not used, coins that
    depend on --limit or on what is still to be asked."""
    def order(*more):
        server.plan()
        assert run(*many, *more, url=server.url)[0] == 0
        return {q.split("\n")[0]: "<A>apple" in q for q in server.questions()}

    whole, other = order(), order("--seed", "1")
    assert sum(whole[prompt] != other[prompt] for prompt in whole) > 50
    files = {path: path.read_bytes() for path in Path(many[0]).glob("judge-*.jsonl")}
    for path in files:
        path.unlink()
    first = order("--limit", "20")
    assert len(first) == 20 and first.items() <= whole.items()
    rest = order()
    assert len(rest) == 180 and rest.items() <= whole.items()
    path = verdicts(many[0])
    assert path.read_bytes() == files[path]


def test_verdict_is_mapped_back(run, server, runs):
    """A judge that knows its favourite by its text gives it 100, wherever it is shown. Catches: no mapping, or a
    mapping that holds in one of the two orders alone."""
    for favourite, win, loss in (("apple", 100, 0), ("berry", 0, 100), ("nothing", 0, 0)):
        server.plan(prefer=favourite)
        _, out, _ = run(*runs, "--seed", str(win + loss * 2), url=server.url)
        found = numbers(out)
        assert (found["win"][0], found["loss"][0], found["tie"][0]) == (win, loss, 100 - win - loss)
        called = {"<A>apple" in question for question in server.questions()}
        assert called == {True, False}


def test_answers_stay_as_they_are(run, server, tmp_path):
    """Catches: chained str.replace or str.format (placeholders inside a text are filled), re.sub with a text as
    replacement (backslashes), a verdict read from the question, white space that tells the answers apart."""
    odd = r" {{AssistantB}} {x} \1 \g<0> [[B]] 100% "
    run_a = write_run(tmp_path / "a", [("see {{AssistantA}} [[A]]", odd, 1.0)])
    run_b = write_run(tmp_path / "b", [("see {{AssistantA}} [[A]]", "{{Conversation}}\n", 1.0)])
    server.plan(replies=[["see", "[[C]]"]])
    code, out, _ = run(run_a, run_b, url=server.url)
    assert code == 0 and numbers(out)["tie"][0] == 100
    shown = odd.strip(), "{{Conversation}}"
    if "<A>{{Con" in server.questions()[0]:
        shown = shown[::-1]
    assert server.questions() == ["see {{AssistantA}} [[A]]\n<A>%s</A>\n<B>%s</B>\n" % shown]


def test_messages_are_shown_with_their_roles(run, server, tmp_path):
    """Catches: str(list) in the question, the last message alone, roles left out."""
    chat = [{"role": "user", "content": "Hi {{AssistantA}}"}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"}]  # fmt: skip
    sides = [write_run(tmp_path / x, [(chat, x, 1.0)]) for x in "ab"]
    assert run(*sides, url=server.url)[0] == 0
    (question,) = server.questions()
    assert question.startswith("User: Hi {{AssistantA}}\n\nAssistant: Hello\n\nUser: Why?\n<A>")


@pytest.mark.parametrize("task", ["dialogue", "summary"])
def test_own_instructions(run, server, runs, task):
    """Catches: an unfilled or missing place, a missing mark, --task without effect, settings that are not sent,
    and the missing note that only the paper's wording compares with its tables."""
    more = ["--model", "m", "--url", server.url, "--task", task, "--limit", "1", "--max-tokens", "77"]
    code, out, _ = run(*runs, *more)
    assert code == 0
    (asked,) = server.log()
    body = asked["body"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 77, 0)
    (text,) = server.questions()
    assert "{{" not in text and all(part in text for part in ("prompt 0", "apple 0", "berry 0"))
    assert all(mark in text for mark in ("[[A]]", "[[B]]", "[[C]]"))
    assert ("post" in text) == (task == "summary") and ("conversation" in text) == (task == "dialogue")
    assert "length" in text or "long or short" in text
    assert "paper's wording" in out and "B.3" in out and "--prompt" in out


@pytest.mark.parametrize(
    "reply, verdict",
    [("[[A]]", "A"), ("B is right: [[B]].", "B"), ("I waver: [[A]] or [[B]]... [[C]]", "C"),
     ("You asked for [[A]], [[B]] or [[C]]. [[A]]if", "A"), ("[A]", None), ("[[D]]", None), ("[[a]]", None), ("", None)],
)  # fmt: skip
def test_the_last_verdict_counts(reply, verdict):
    """Catches: the first mark taken (models repeat the instruction), looser patterns that read a verdict into
    any bracket."""
    assert judge.read_verdict(reply) == verdict


def test_unparsable_replies_are_counted_and_left_out(run, server, runs):
    """Catches: no verdict taken for a tie or a loss, N of all examples, unparsable ones not saved (then they are
    asked and paid for again)."""
    server.plan(replies=[["apple 3", "Both have their merits."], ["apple 5", None], ["apple 7", ""]], prefer="apple")
    code, out, _ = run(*runs, url=server.url)
    assert code == 0 and numbers(out) == {"win": (100, 0), "tie": (0, 0), "loss": (0, 0), "half": (100, 0), "N": 9}
    assert "3 unparsable" in out and "0 without a reply" in out
    assert [record["winner"] for record in records(runs[0])].count(None) == 3
    assert [records(runs[0])[i]["reply"] for i in (3, 5, 7)] == ["Both have their merits.", "", ""]
    server.plan(prefer="berry")
    assert run(*runs, url=server.url)[1].replace("12 there", "0 there") == out and server.log() == []


def test_no_verdict_at_all(run, server, runs):
    """Catches: a division by zero when nothing could be read."""
    server.plan(replies=[["", "Hm."]])
    code, out, _ = run(*runs, url=server.url)
    assert code == 0 and "by m: no verdict" in out and "12 unparsable" in out


# ------------------------------------------------------------------ a server that misbehaves
@pytest.mark.parametrize("fault", ["500", "503", "408", "html", "empty", "error in 200", "drop", "cut", "hang"])
def test_one_failure_changes_nothing(run, server, runs, pauses, fault):
    """Catches: a failure that ends the run, is taken for a verdict, or skips its example; no timeout."""
    server.plan(prefer="apple")
    assert run(*runs, "--limit", "4", url=server.url)[0] == 0
    calm = verdicts(runs[0]).read_bytes()
    verdicts(runs[0]).unlink()
    server.plan(prefer="apple", **({"cut": 1} if fault == "cut" else {"faults": ["", fault]}))
    code, out, err = run(*runs, "--limit", "4", "--timeout", "1", url=server.url)
    assert (code, pauses, len(server.log())) == (0, [1], 5)
    assert err.count("again in 1 s") == 1 and "Traceback" not in err
    assert verdicts(runs[0]).read_bytes() == calm
    assert "0 unparsable" in out and "0 without a reply" in out


@pytest.mark.parametrize("asked_for, pause", [("7", 7), ("3600", 60), ("0", 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 1)])
def test_retry_after_is_heeded(run, server, runs, pauses, asked_for, pause):
    """Catches: the header not read, waits of an hour, a crash at a date."""
    server.plan(faults=["429 " + asked_for])
    assert run(*runs, "--limit", "1", url=server.url)[0] == 0
    assert pauses == [pause]


def test_pauses_grow(run, server, runs, pauses):
    """Catches: retries without back-off, a back-off that goes on from the question before."""
    server.plan(faults=["500"] * 5 + ["", "500"])
    code, out, _ = run(*runs, "--limit", "2", url=server.url)
    assert (code, pauses) == (0, [1, 2, 4, 8, 16, 1])
    assert numbers(out)["N"] == 2


@pytest.mark.parametrize("fault, tries", [("400", 1), ("413", 1), ("500", judge.RETRIES + 1)])
def test_a_question_without_a_reply_is_counted(run, server, runs, fault, tries):
    """Catches: one bad question that ends all, retries of what is refused for good, such questions lost from the
    count or out of order in the file, or asked again each time: five in a row would then end each restart."""
    server.plan(poison=[[f"apple {i}</", fault] for i in (2, 5)], prefer="apple")
    code, out, _ = run(*runs, url=server.url)
    assert code == 0 and numbers(out)["N"] == 10
    assert "0 unparsable" in out and "2 without a reply" in out
    assert len(server.log()) == 10 + 2 * tries
    assert [record["index"] for record in records(runs[0])] == list(range(12))
    assert [i for i, record in enumerate(records(runs[0])) if record["error"]] == [2, 5]
    server.plan(prefer="berry")
    assert run(*runs, url=server.url)[1].replace("12 there", "0 there") == out and server.log() == []


def test_questions_lost_at_the_end_are_asked_again(run, server, runs):
    """Nothing tells a bad question from a bad server there. Catches: saved as answered, or not counted."""
    server.plan(poison=[["apple 10", "500"], ["apple 11", "500"]], prefer="apple")
    code, out, _ = run(*runs, url=server.url)
    assert code == 0 and "2 without a reply" in out and "asks 2 of them again" in out
    server.plan(prefer="apple")
    code, out, _ = run(*runs, url=server.url)
    assert len(server.log()) == 2 and numbers(out)["N"] == 12 and "0 without a reply" in out


@pytest.mark.parametrize("limit, asked", [("12", 5), ("1", 1)])
def test_a_server_that_never_answers(run, server, runs, limit, asked):
    """Catches: hours of retries of a dead server, "no verdict" with exit code 0, an empty file left behind."""
    server.plan(poison=[["", "500"]])
    code, out, err = run(*runs, "--limit", limit, url=server.url)
    assert code == 2 and "by reward" in out and "by m" not in out
    assert len(server.log()) == asked * (judge.RETRIES + 1)
    assert server.url in err and "500" in err and "the same command" in err
    assert os.listdir(runs[0]) == ["test_outputs.jsonl"]


@pytest.mark.parametrize("status, mend", [("401", "OPENAI_API_KEY"), ("403", "--model"), ("404", "--url")])
def test_what_the_user_must_mend_ends_at_once(run, server, runs, pauses, status, mend):
    """Catches: retries of a wrong key, address or name."""
    server.plan(faults=[status] * 9)
    code, _, err = run(*runs, url=server.url)
    assert (code, pauses, len(server.log())) == (2, [], 1)
    assert len(err.splitlines()) == 1 and status in err and mend in err


# ------------------------------------------------------------------ interruptions
@pytest.fixture
def uninterrupted(run, server, tmp_path, runs):
    """The bytes of the verdict file that a run without interruption writes, made in copies of the runs."""
    server.plan(prefer="apple")
    copies = [str(tmp_path / "copies" / Path(home).name) for home in runs]
    for home, copy in zip(runs, copies):
        Path(copy).mkdir(parents=True)
        Path(copy, "test_outputs.jsonl").write_bytes(Path(home, "test_outputs.jsonl").read_bytes())
    assert run(*copies, url=server.url)[0] == 0
    return verdicts(copies[0])


def test_goes_on_after_a_kill(run, server, runs, tmp_path, uninterrupted):
    """SIGKILL while the sixth question is under way. Catches: verdicts written at the end or left in a buffer,
    answered questions asked again, and a half-written line that spoils or swallows the next one."""
    server.plan(prefer="apple", faults=[""] * 5 + ["hang"])
    command = [sys.executable, "-m", "toy.judge", *runs, "--model", "m", "--url", server.url]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, "--prompt", str(tmp_path / "instruction.txt")], cwd=ROOT, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while len(server.log()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = uninterrupted.read_bytes()
    saved = verdicts(runs[0]).read_bytes()
    assert saved.count(b"\n") == 5 and whole.startswith(saved)
    for half in (whole[len(saved) :][:30], b"\0\0\0", b""):
        verdicts(runs[0]).write_bytes(saved + half)
        server.plan(prefer="apple")
        code, out, _ = run(*runs, url=server.url)
        assert code == 0 and numbers(out) == numbers(out) | {"win": (100, 0), "N": 12}
        assert len(server.log()) == 7
        assert verdicts(runs[0]).name == uninterrupted.name and verdicts(runs[0]).read_bytes() == whole


def test_goes_on_after_the_server_died(run, runs, uninterrupted, shared):
    """Catches: a traceback when the server is gone, examples after its death marked as failed for good, verdicts
    bound to one address."""
    mortal = Server()
    mortal.plan(prefer="apple", faults=[""] * 4 + ["die"])
    code, _, err = run(*runs, url=mortal.url)
    mortal.end()
    assert code == 2 and "Traceback" not in err and "goes on where this one stopped" in err
    assert len(records(runs[0])) == 4
    shared.plan(prefer="apple")
    assert run(*runs, url=shared.url)[0] == 0
    assert len(shared.log()) == 8
    assert verdicts(runs[0]).read_bytes() == uninterrupted.read_bytes()


def test_an_interrupt_ends_in_one_line(run, server, runs, monkeypatch):
    """In a pause, and in a question. Catches: the traceback of Ctrl-C, or `except Exception` widened until Ctrl-C
    counts as a failed question."""
    from huggingface_hub import InferenceClient

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    server.plan(faults=["", "500"])
    with monkeypatch.context() as patch:
        patch.setattr(judge, "sleep", interrupt)
        code, _, err = run(*runs, url=server.url)
    assert code == 130 and "the same command goes on" in err and len(records(runs[0])) == 1
    monkeypatch.setattr(InferenceClient, "chat_completion", interrupt)
    code, _, err = run(*runs, url=server.url)
    assert code == 130 and len(err.splitlines()) == 1


def test_verdicts_of_two_kinds_never_mix(run, server, runs, tmp_path):
    """Catches: going on with the verdicts of another seed, judge, instruction, length or text."""
    assert run(*runs, url=server.url)[0] == 0
    before = verdicts(runs[0])
    text = before.read_bytes()
    template = tmp_path / "other.txt"
    template.write_text("Be brief. " + TEMPLATE)
    for more in (["--seed", "3"], ["--max-tokens", "9"], ["--model", "n"], ["--prompt", str(template)], []):
        server.plan()
        if not more:
            write_run(tmp_path / "b", [(f"prompt {i}", f" cherry {i}", 6.0) for i in range(12)])
        plain = ["--model", "m", "--url", server.url, "--prompt", str(tmp_path / "instruction.txt")]
        assert run(*runs, *plain, *more)[0] == 0
        assert len(server.log()) == 12, more
    assert len(list(Path(runs[0]).glob("judge-*.jsonl"))) == 6 and before.read_bytes() == text


@pytest.mark.parametrize("line", [b"nonsense\n", b"{}\n", b'["index"]\n'])
def test_a_spoilt_verdict_file_is_refused(run, server, runs, line):
    """Catches: a traceback, or verdicts dropped in silence, where a whole line is no verdict."""
    assert run(*runs, "--limit", "2", url=server.url)[0] == 0
    path = verdicts(runs[0])
    path.write_bytes(path.read_bytes() + line)
    before = path.read_bytes()
    code, _, err = run(*runs, url=server.url)
    assert code == 2 and f"{path.name}:3" in err and len(err.splitlines()) == 1
    assert path.read_bytes() == before


def test_a_verdict_file_that_cannot_be_read(run, server, runs):
    """Catches: the traceback of an OSError that the user can mend."""
    assert run(*runs, "--limit", "1", url=server.url)[0] == 0
    path = verdicts(runs[0])
    path.unlink()
    path.mkdir()
    code, _, err = run(*runs, "--limit", "1", url=server.url)
    assert code == 2 and str(path) in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------ the key
def test_the_key_is_sent_and_never_written(run, server, runs, monkeypatch, tmp_path):
    """The server demands the key, and sends it back in replies and errors. Catches: a key that is not sent, that
    stands in a record, a message or a file name, or is saved with a reply."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    replies = [["apple", f"You sent {KEY}. [[A]]"]]
    server.plan(key=KEY, replies=replies, poison=[["apple 3<", "400"]], faults=["500"])
    code, out, err = run(*runs, url=server.url)
    assert code == 0 and numbers(out)["N"] == 11
    assert {asked["key"] for asked in server.log()} == {"Bearer " + KEY}
    assert "You sent ***" in records(runs[0])[0]["reply"] and "***" in records(runs[0])[3]["error"]
    server.plan(poison=[["", "500"]])
    _, out_2, err_2 = run(*runs, "--seed", "1", url=server.url)
    assert KEY not in out + err + out_2 + err_2 and "***" in err and "***" in err_2
    for path in tmp_path.rglob("*"):
        assert KEY not in path.name and (path.is_dir() or KEY not in path.read_text())


def test_a_wrong_key_is_named_by_its_variable(run, server, runs, monkeypatch):
    """Catches: the server's message passed on (it holds the key), a wrong key tried six times."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    server.plan(key=KEY)
    code, out, err = run(*runs, url=server.url)
    assert code == 2 and len(server.log()) == 1
    assert "OPENAI_API_KEY" in err and "sk-wrong" not in out + err


def test_no_other_key_leaves_this_machine(run, server, runs):
    """Catches: InferenceClient's default, which sends the Hugging Face token to whatever --url is."""
    assert run(*runs, "--limit", "1", url=server.url)[0] == 0
    assert "hf_" not in server.log()[0]["key"]


@pytest.mark.parametrize("key", ["sk-a\nb-secret", "sk-ü-secret"])
def test_a_key_that_no_header_can_carry(run, server, runs, monkeypatch, key):
    """Catches: the error of the HTTP client, which quotes the header with the key in it."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    code, out, err = run(*runs, url=server.url)
    assert code == 2 and "OPENAI_API_KEY" in err and "secret" not in out + err and server.log() == []


# ------------------------------------------------------------------ alone
def test_stands_alone(runs):
    """`python -m toy.judge` itself. Catches: an import of brain, torch or transformers, and of huggingface_hub
    where rewards alone are compared."""
    code = ("import runpy, sys; sys.argv[1:] = %r; runpy.run_module('toy.judge', run_name='__main__');"
            "print([m for m in ('brain', 'torch', 'transformers', 'huggingface_hub') if m in sys.modules])" % (runs,))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[]\n") and "by reward: win 41.67" in done.stdout
