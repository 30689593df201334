"""toy/judge.py: what is compared, what the judge reads, and what a bad server or an interruption may cost.

A stand-in for an endpoint's client answers. Each docstring names the wrong version that the test catches.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace as Name

import numpy as np
import pytest

from toy import judge

TEMPLATE = "{{Conversation}}\n<A>{{AssistantA}}</A>\n<B>{{AssistantB}}</B>\n"
KEY, MAKE_CLIENT = "sk-very-secret", judge.make_client


class Server:
    """faults: one per question, a status, "status retry-after" or an exception. poison: {text in a question:
    fault}. replies: {text in a question: reply}. prefer: the answer with this text wins, else the first."""

    def plan(self, faults=(), poison=(), replies=(), prefer=None):
        self.faults, self.poison, self.replies = list(faults), dict(poison), dict(replies)
        self.prefer = prefer
        self.asked, self.settings = [], {}

    def chat_completion(self, messages, **settings):
        ((_, question),) = [message.values() for message in messages]
        self.asked.append(question)
        self.settings = settings
        fault = self.faults.pop(0) if self.faults else ""
        fault = next((other for text, other in self.poison.items() if text in question), fault)
        if isinstance(fault, BaseException):
            raise fault
        if fault:
            status, *after = fault.split(" ", 1)
            error, headers = RuntimeError(fault), {"retry-after": after[0]} if after else {}
            error.response = Name(status_code=int(status), text=f"ill; you sent {KEY}", headers=headers)
            raise error
        said = "[[A]]"
        if self.prefer:
            a, b = (self.prefer in re.search(f"<{x}>(.*)</{x}>", question, re.S)[1] for x in "AB")
            said = "[[A]]" if a and not b else "[[B]]" if b and not a else "[[C]]"
        said = next((other for text, other in self.replies.items() if text in question), said)
        return Name(choices=[Name(message=Name(content=said))])


@pytest.fixture
def server(monkeypatch):
    server = Server()
    server.plan()
    server.pauses = []
    monkeypatch.setattr(judge, "sleep", server.pauses.append)  # no test waits
    monkeypatch.setattr(judge, "make_client", lambda url: (server, KEY))
    return server


def write_run(path, outputs, n=1):
    """outputs: (prompt, output, reward) or (prompt, output, reward, gold, gold_reward). A row has n."""
    path.mkdir(parents=True, exist_ok=True)
    keys = ("row", "prompt", "output", "reward", "gold", "gold_reward")
    lines = [json.dumps(dict(zip(keys, [i // n, *line, None, None]))) for i, line in enumerate(outputs)]
    (path / "test_outputs.jsonl").write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    """Run a's outputs hold "apple" and have rewards 0 to 11; run b's hold "berry" and have the reward 6."""
    a = [(f"prompt {i} ", f" apple {i}", float(i), "golden", 6.0) for i in range(12)]
    b = [(f"prompt {i} ", f" berry {i}", 6.0) for i in range(12)]
    return write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)


@pytest.fixture
def run(capsys, tmp_path, server):
    """run(*arguments) -> (exit code, stdout, stderr); judged=False compares rewards alone."""
    (tmp_path / "own.txt").write_text(TEMPLATE)

    def run(*argv, judged=True, url="http://nowhere/v1"):
        more = ["--model", "m", "--url", url, "--prompt", str(tmp_path / "own.txt")] if judged else []
        try:
            judge.main([*argv[:2], *more, *argv[2:]])
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return run


def numbers(out, who="m"):
    """{'win': (per cent, half-width), ..., 'N': n} of the line that begins with 'by WHO:'."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"by {who}:")]
    found = re.findall(r"(win|tie|loss|half) ([\d.]+) ± ([\d.]+)", line)
    values = {name: (float(mean), float(width)) for name, mean, width in found}
    return values | {"N": int(line.split("N ")[1])}


def verdicts(home):
    (path,) = Path(home).glob("judge-*.jsonl")
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def test_reward_numbers_equal_numpy(run, tmp_path):
    """Catches: ties as wins, sides exchanged, p(1 - p) for a variance with ties, 1.64 for 1.96."""
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, 200).astype(float), random.integers(0, 4, 200).astype(float)
    sides = [[(f"p{i}", "x", reward) for i, reward in enumerate(rewards)] for rewards in (a, b)]
    code, out, err = run(*[write_run(tmp_path / x, side) for x, side in zip("ab", sides)], judged=False)
    found = numbers(out, "reward")
    assert (code, err, found.pop("N")) == (0, "", 200)
    for name, x in {"win": a > b, "tie": a == b, "loss": a < b, "half": (a > b) + 0.5 * (a == b)}.items():
        assert found[name] == pytest.approx((100 * x.mean(), 196 * x.std() / np.sqrt(200)), abs=0.00501), name


def test_pairs_are_matched_by_prompt(run, server, tmp_path):
    """Catches: matching line by line, the last of equal prompts for all, the run's own output for gold."""
    run_a = write_run(tmp_path / "a", [("p", "x", 1.0), ("q", "x", 5.0), ("p", "x", 3.0)])
    run_b = write_run(tmp_path / "b", [("q", "y", 4.0), ("p", "y", 0.0), ("p", "y", 2.0)])
    found = numbers(run(run_a, run_b, judged=False)[1], "reward")
    assert (found["win"][0], found["N"]) == (100.0, 3)
    golden = write_run(tmp_path / "g", [(f"p{i}", "mine", float(i), "golden", 2.0) for i in range(8)])
    for sides, win in (((golden, "gold"), 62.5), (("gold", golden), 25.0)):
        assert numbers(run(*sides, judged=False)[1], "reward")["win"][0] == win
    for prompts in ("pqr", "pq", "ppqx", "qqp"):
        code, out, err = run(run_a, write_run(tmp_path / "c", [(p, "y", 1.0) for p in prompts]))
        assert (code, out, server.asked) == (2, "", []) and "test_outputs.jsonl:" in err


def test_the_first_output_of_each_row_is_compared(run, server, tmp_path):
    """Catches: all outputs of a row, its last or best one, one row of equal prompts, another text shown."""
    rows = {
        "a": [("p", (1.0, 6.0, -1.0)), ("q", (5.0, 6.0, -1.0)), ("p", (3.0, 6.0, -1.0))],
        "b": [("q", (4.0, 7.0)), ("p", (0.0, 7.0)), ("p", (2.0, 7.0))],
    }
    for x, n in (("a", 3), ("b", 2)):
        outputs = [(prompt, f"{i}th", reward) for prompt, own in rows[x] for i, reward in enumerate(own)]
        write_run(tmp_path / x, outputs, n)
    out = run(str(tmp_path / "a"), str(tmp_path / "b"))[1]
    assert (numbers(out, "reward")["win"][0], numbers(out, "reward")["N"]) == (100.0, 3)
    assert sorted(server.asked) == [f"{prompt}\n<A>0th</A>\n<B>0th</B>\n" for prompt in "ppq"]


def test_the_evidence_of_two_runs(run, runs):
    """Catches: another split or an older test, an error in the wrong place, the gap's sign, one run alone."""
    keys = ("split", "elbo", "elbo_standard_error", "log_evidence", "log_evidence_standard_error")
    for home, elbo in zip(runs, (1.25, -0.5)):
        tests = [("test", 9, 9, 9, 9), ("test", elbo, 0.12, 1.75, 0.11), ("validation", 7, 7, 7, 7)]
        lines = [json.dumps(dict(zip(keys, line))) for line in tests]
        Path(home, "metrics.jsonl").write_text("\n".join(lines))
    same = "(standard error 0.120), log_evidence 1.750 (standard error 0.110), gap"
    a, b = f"{runs[0]}: elbo 1.250 {same} 0.500\n", f"{runs[1]}: elbo -0.500 {same} 2.250\n"
    assert a + b + "The gap is a lower bound of KL(policy || posterior)" in run(*runs, judged=False)[1]
    assert "gap" not in run(runs[0], "gold", judged=False)[1]
    for left_out in ('{"split": "test", "elbo": 1, "log_evidence": 2}', '{"split": "train"}', ""):
        Path(runs[1], "metrics.jsonl").write_text(left_out)
        code, out, _ = run(*runs, judged=False)
        assert code == 0 and "gap" not in out


GOOD = '{"row": 0, "prompt": "p", "output": "x\u2028", "reward": 1.0, "gold": null, "gold_reward": null}\n'
BAD = [  # text of the outputs, command, what the message names
    (GOOD.replace("1.0", "NaN"), "a a", "test_outputs.jsonl:1: 'reward'"),
    (GOOD + GOOD[:30], "a gold", "test_outputs.jsonl:2"),
    (GOOD.replace("row", "line"), "a a", "test_outputs.jsonl:1: 'row'"),
    (GOOD, "a a --model m --url http://x --prompt poor", "{{AssistantB}}"),
]


@pytest.mark.parametrize("text, argv, named", BAD)
def test_bad_input_ends_in_one_line(run, tmp_path, monkeypatch, text, argv, named):
    """Catches: a traceback, a missing check, lines cut at a U+2028 inside a text."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/test_outputs.jsonl").write_text(text, encoding="utf-8")
    Path("poor").write_text("{{Conversation}} {{AssistantA}}")
    code, _, err = run(*argv.split(), judged=False)
    assert code == 2 and named in err and err.startswith("judge: ") and err.count("\n") == 1


def test_the_order_is_drawn_per_example_from_the_seed(run, server, tmp_path):
    """A judge that always says [[A]] ends near 50. Catches: a fixed order, turns, coins that ignore the seed
    or depend on --limit or on what is still to be asked, a verdict that is not mapped back."""
    sides = (("a", " apple"), ("b", " berry"))
    runs = [write_run(tmp_path / x, [(f"p{i} ", text, 1.0) for i in range(200)]) for x, text in sides]

    def order(*more):
        server.plan()
        out = run(*runs, *more)[1]
        return {question.split("\n")[0]: "<A>apple" in question for question in server.asked}, numbers(out)

    first, _ = order("--limit", "20")
    rest, found = order()
    whole, (other, _) = first | rest, order("--seed", "1")
    coins = np.array(list(whole.values()))
    assert (len(first), len(rest), found["N"]) == (20, 180, 200)
    assert found["win"][0] == pytest.approx(100 * coins.mean()) and 40 < found["win"][0] < 60
    assert 60 < (coins[1:] == coins[:-1]).sum() < 140 and sum(whole[x] != other[x] for x in whole) > 50


def test_what_the_judge_reads(run, server, tmp_path):
    """Catches: placeholders or backslashes in a text replaced, white space that tells, roles left out."""
    chat = [{"role": "user", "content": "Hi {{AssistantA}}"}, {"role": "assistant", "content": "Yes [[A]]"}]
    odd = r"{{AssistantB}} {x} \1 \g<0> [[B]] 100%"
    sides = [write_run(tmp_path / x, [(chat, text, 1.0)]) for x, text in (("a", f" {odd} "), ("b", "b\n"))]
    server.plan(replies={"Hi": "[[C]]"})
    assert numbers(run(*sides, "--max-tokens", "77")[1])["tie"][0] == 100
    shown = "User: Hi {{AssistantA}}\n\nAssistant: Yes [[A]]\n<A>%s</A>\n<B>%s</B>\n"
    assert server.asked[0] in (shown % (odd, "b"), shown % ("b", odd))
    assert server.settings == {"model": "m", "max_tokens": 77, "temperature": 0}
    for text in judge.INSTRUCTIONS.values():
        assert all(text.count("{{%s}}" % place) == 1 for place in judge.PLACES)


def test_verdicts_are_read_from_the_end_and_counted(run, server, runs):
    """Catches: the first mark taken (models repeat the instruction), no verdict taken for a tie or a loss."""
    replies = {"[[A]] or [[B]]... [[C]]": "C", "so [[B]].": "B", "[A]": None, "[[D]]": None, "": None}
    assert {reply: judge.read_verdict(reply) for reply in replies} == replies
    server.plan(replies={"apple 3": "Both.", "apple 5": None}, prefer="apple")
    out = run(*runs)[1]
    assert (numbers(out)["win"], numbers(out)["N"]) == ((100, 0), 10) and "2 unparsable" in out
    server.plan(replies={"": "Hm."})
    assert run(*runs)[1].replace("12 there", "0 there") == out and server.asked == []  # not asked again
    assert "by m: no verdict" in run(*runs, "--seed", "1")[1]


@pytest.mark.parametrize("fault", ["500", "408", "429 7", "429 3600", "429 soon", TimeoutError()])
def test_one_failure_changes_nothing(run, server, runs, fault):
    """Catches: a failure that ends the run, is taken for a verdict, or skips its example; a wrong pause."""
    server.plan(prefer="apple", faults=["", fault])
    code, out, _ = run(*runs)
    pause = {"429 7": 7, "429 3600": 60}.get(fault, 1)
    assert (code, server.pauses, len(server.asked)) == (0, [pause], 13)
    assert [record["winner"] for record in verdicts(runs[0])[1]] == ["RUN_A"] * 12
    assert "0 unparsable" in out and "0 without a reply" in out


@pytest.mark.parametrize("fault, tries", [("400", 1), ("500", judge.RETRIES + 1)])
def test_a_question_without_a_reply_is_counted(run, server, runs, fault, tries):
    """Catches: one bad question that ends all, retries of what is refused for good, no back-off."""
    server.plan(poison={"apple 2<": fault, "apple 5<": fault}, prefer="apple")
    code, out, _ = run(*runs)
    assert code == 0 and numbers(out)["N"] == 10 and "2 without a reply" in out
    assert len(server.asked) == 10 + 2 * tries and server.pauses == [1, 2, 4, 8, 16][: tries - 1] * 2
    assert [i for i, record in enumerate(verdicts(runs[0])[1]) if record["error"]] == [2, 5]


@pytest.mark.parametrize("fault, asked", [("500", 5 * (judge.RETRIES + 1)), ("401", 1), ("404", 1)])
def test_a_server_that_never_answers(run, server, runs, fault, asked):
    """Catches: hours of retries, "no verdict" with exit code 0, an empty file left, the key in a message."""
    server.plan(poison={"": fault})
    code, out, err = run(*runs)
    assert code == 2 and "by m" not in out and fault in err and KEY not in err
    assert len(server.asked) == asked and not list(Path(runs[0]).glob("judge-*"))


def test_goes_on_after_an_interruption(run, server, runs):
    """Catches: verdicts written at the end, answered questions asked again, a half-written line that spoils
    the next one, a spoilt whole line dropped in silence."""
    server.plan(prefer="apple", faults=[""] * 5 + [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        run(*runs)
    path, saved = verdicts(runs[0])
    assert len(saved) == 5
    path.write_text(path.read_text() + '{"index": 5, "ca')
    server.plan(prefer="apple")
    out = run(*runs)[1]
    assert (numbers(out)["win"], numbers(out)["N"], len(server.asked)) == ((100, 0), 12, 7)
    assert verdicts(runs[0])[1][:5] == saved and len(verdicts(runs[0])[1]) == 12
    path.write_text(path.read_text() + "nonsense\n")
    code, _, err = run(*runs)
    assert code == 2 and f"{path.name}:13" in err


def test_verdicts_of_two_kinds_never_mix(run, server, runs, tmp_path):
    """Catches: going on with the verdicts of another seed, judge, instruction, length or text."""
    (tmp_path / "other.txt").write_text("Be brief. " + TEMPLATE)
    other = f"--prompt {tmp_path / 'other.txt'}"
    for more in ("", "--seed 3", "--max-tokens 9", "--model n", other, "new text"):
        server.plan()
        if more == "new text":
            write_run(tmp_path / "b", [(f"prompt {i} ", f" cherry {i}", 6.0) for i in range(12)])
        assert run(*runs, *more.replace("new text", "").split())[0] == 0 and len(server.asked) == 12, more


@pytest.mark.parametrize("key", [KEY, ""])
def test_only_the_key_is_sent(monkeypatch, key):
    """Catches: the Hugging Face token sent."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_machine")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert MAKE_CLIENT("http://nowhere/v1")[0].token == (key or "none")
