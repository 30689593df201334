"""Situations that public bug reports of comparable tools describe, as users meet them.

Each test names the wrong version that it catches.
"""

import functools
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import brain
from test_brain import (
    BOTH, DATA, OUTPUTS, PROMPT, SHORT, byte_pairs, classifier, data_settings, dataset_of, jsonl, letters,
    reply, tiny, tree,
)  # fmt: skip

TURNS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory with a model, prompts and a reward function, as the flags of a run."""
    tiny().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    jsonl(tmp_path / "d.jsonl", [{"prompt": f" a{' b' * i}", "label": " c"} for i in range(6)])
    (tmp_path / "r.py").write_text("def r(completions, **_): return [float(len(y)) for y in completions]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(model="model", reward=("--reward-function", "r.py:r"), run="run"):
    return ["--model", model, "--dataset", "d.jsonl", *reward, "--output-dir", run, *SHORT]


def refused(argv, capsys, *told):
    """Exit code 2, and one line on stderr that says these words."""
    assert brain.main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("brain: ")]
    assert all(word in line for word in told), line


@pytest.mark.parametrize("kind", ["prompt tuning", "trained biases"])
def test_an_adapter_that_cannot_be_copied_is_refused_early(kind, home, monkeypatch, capsys):
    """Wrong: an optimizer without parameters, or peft's ValueError, after everything was loaded."""
    if kind == "prompt tuning":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    else:
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all", task_type="CAUSAL_LM")
    peft.get_peft_model(tiny(), config).save_pretrained(home / "adapter")
    letters().save_pretrained(home / "adapter")
    load = lambda *_, **__: pytest.fail("a reward model was loaded")  # noqa: E731
    monkeypatch.setattr(brain.RewardModel, "from_pretrained", load)
    argv = [*flags("adapter", ("--reward-model", "reward")), "--base-model", "model"]
    refused(argv, capsys, "--model adapter: has virtual tokens or trained biases; give")
    assert not (home / "run").exists()


@pytest.mark.parametrize("function, told", [
    (lambda completions: [0.0], "got an unexpected keyword argument"),
    (lambda prompts, completions, completion_ids, **_: [0.0], "required argument: 'completion_ids'"),
    (lambda completions, answer, **_: [0.0], "required argument: 'answer'"),
    (lambda completions, number, log_metric=None, **_: [0.0], None),
    (lambda **_: [0.0], None),
])  # fmt: skip
def test_what_a_reward_function_asks_for_is_checked_before_sampling(function, told):
    """Also where a column has the name of an argument. Wrong: a TypeError at the first reward; a function
    refused that has a default, or takes a column."""
    reward = brain.RewardFunction(function, "f.py:f")
    rows = dataset_of([row | {"completions": "of the data"} for row in DATA])

    def load():
        policy = type("", (), {"tokenizer": byte_pairs(), "model": tiny()})
        return brain.load_prompts(rows, policy, data_settings(), "train", reward)

    if told is None:
        assert len(load()) == len(DATA)
    else:
        with pytest.raises(brain.UserError, match=f"--reward-function f.py:f gets .*completions.*: .*{told}"):
            load()


def test_an_error_of_a_reward_function_keeps_its_traceback(home):
    """An OSError, too: `main` prints its own in a line. Wrong: a service that is down read as a full disk."""
    code = "def r(**_): return ask_the_service()\ndef ask_the_service(): raise TimeoutError(7)"
    (home / "r.py").write_text(code)
    with pytest.raises(RuntimeError) as caught:
        brain.main(flags())
    assert "in ask_the_service" in "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_text_parts_are_text():
    """In prompts and answers. Wrong: a list in the place of text; the types of a schema read as parts."""
    tokenizer = byte_pairs(specials=BOTH)
    tokenizer.chat_template = TURNS
    parts = lambda *texts: [{"type": "text", "text": text} for text in texts]  # noqa: E731
    made = lambda prompt, answer: brain.make_example(  # noqa: E731
        0, {"prompt": prompt, "label": answer}, "label", False, tokenizer, data_settings()
    )
    spoken = made([{"role": "user", "content": "abc"}], reply("de"))
    answer = [{"role": "assistant", "content": parts("de")}]
    found = made([{"role": "user", "content": parts("ab", "c")}], answer)
    assert found.prompt == spoken.prompt and found.gold == spoken.gold == "de"
    assert found.ids.tolist() == spoken.ids.tolist() and json.dumps(found.prompt)
    schema = {"anyOf": [{"type": ["a", "b"]}, {"type": "text"}], "list": [], "name": "text"}
    assert brain.plain_messages([schema, {"role": "user"}]) == [schema, {"role": "user"}]


def test_an_encoder_reads_a_prompt_and_an_output_as_a_pair():
    """With the segments of its tokenizer, and no template. Wrong: one text; token_type_ids left out."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{x}" for x in "abcdefgh")]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    model = classifier("bert", tokenizer)
    reward = brain.RewardModel(model, tokenizer)
    pair = [tokenizer(PROMPT, output, return_tensors="pt") for output in OUTPUTS]
    segments = {tuple(x["token_type_ids"].unique().tolist()) for x in pair}
    assert segments == {(0, 1), (0,)}  # an output may be empty
    by_hand = [model(**x).logits.item() for x in pair]
    np.testing.assert_allclose(reward(PROMPT, OUTPUTS), by_hand, atol=1e-6)
    one_text = [tokenizer(PROMPT + y, return_tensors="pt") for y in OUTPUTS]
    for wrong in (one_text, [dict(input_ids=x.input_ids) for x in pair]):
        assert np.abs(np.subtract([model(**x).logits.item() for x in wrong], by_hand)).max() > 1e-3
    reward.template = "{prompt} {output}"
    joined = [model(**tokenizer(f"{PROMPT} {y}", return_tensors="pt")).logits.item() for y in OUTPUTS]
    np.testing.assert_allclose(reward(PROMPT, OUTPUTS), joined, atol=1e-6)
    example = brain.Example(0, PROMPT, torch.tensor([4]), None, None, {})
    reward.template, size = None, len(tokenizer(PROMPT, "a").input_ids) - 1
    fitting = []
    for reward.context in (size + 2 * 3 - 1, size + 2 * 3):
        fitting.append(reward.fits(example, 3))
    assert fitting == [False, True]


def test_a_directory_belongs_to_one_run_at_a_time(home, capsys):
    """A second process is refused in one line and touches nothing, also with --overwrite. When the first one
    is gone, killed even, the directory is free. Wrong: two that resume write into each other's files."""
    assert brain.main(flags()) == 0
    program = "import sys, filelock; held = filelock.FileLock(sys.argv[1]).acquire()"
    program += "; print(1, flush=True); input()"
    lock = home / "run/checkpoint/lock"
    other = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "1\n"
        before = tree(home / "run")
        for more in (["--resume"], ["--overwrite"]):
            refused([*flags(), *more], capsys, "--output-dir run: another run writes to it")
        assert tree(home / "run") == before
    finally:
        other.kill(), other.wait()
    assert brain.main([*flags(), "--resume"]) == 0


def test_a_damaged_run_is_refused(home, capsys):
    """A log that is shorter than the checkpoint remembers, or missing; no log is touched. Wrong: a log filled
    up with zeros, a JSON error at the end, another log cut before this one is refused."""
    logs = lambda: {x.name: x.read_bytes() for x in (home / "run").glob("*.jsonl")}  # noqa: E731
    assert brain.main(flags()) == 0
    for name, left in (("validation_outputs.jsonl", 5), ("samples.jsonl", 0), ("metrics.jsonl", None)):
        text = (home / "run" / name).read_text()
        (home / "run" / name).unlink() if left is None else (home / "run" / name).write_text(text[:left])
        before = logs()
        refused([*flags(), "--resume"], capsys, f"--resume: {name} in run cut or missing", "--overwrite")
        assert logs() == before
        (home / "run" / name).write_text(text)
    assert brain.main([*flags(), "--resume"]) == 0


def test_messages_that_no_log_could_hold_are_refused(home, capsys):
    """Before anything is loaded or sampled. Wrong: a TypeError of json when the first samples are written."""
    import datetime

    for odd in (datetime.date(2024, 1, 1), b"x", float("nan")):
        prompts = [[{"role": "user", "content": " a", "extra": odd}]] * 4
        dataset_of([{"prompt": prompt, "label": " b"} for prompt in prompts]).to_parquet(home / "d.parquet")
        argv = ["d.parquet" if word == "d.jsonl" else word for word in flags()]
        refused(argv, capsys, "--dataset d.parquet: split train prompt: ", "JSON")
    assert not (home / "run").exists()


def test_a_run_ends_with_words(home, capsys):
    """How far the kept policy has come since update 0, and code that generates from it. Wrong: the last
    policy for the kept one; the line of test."""
    capsys.readouterr()
    assert brain.main([*flags(), "--learning-rate", "0.05"]) == 0
    *_, gap, divergence, kept, code = capsys.readouterr().out.splitlines()
    lines = [line for line in jsonl(home / "run/metrics.jsonl") if line.get("split") == "validation"]
    update = lines[-1]["kept"]
    first, last = lines[0], next(line for line in lines if line["step"] == update)
    pairs = [re.search(r"from (\S+) to (\S+) nats", text).groups() for text in (gap, divergence)]
    found = [list(map(float, pair)) for pair in pairs]
    expected = [[x["log_evidence"] - x["elbo"] for x in (first, last)]]
    expected.append([x["self_normalized_kl"] for x in (first, last)])
    np.testing.assert_allclose(found, expected, atol=6e-4)
    assert f"model/ is the policy of update {update}" in kept or update == 0
    generate = transformers.pipeline("text-generation", re.search("'(run/model)'", code)[1])
    assert generate(" a", max_new_tokens=3)[0]["generated_text"].startswith(" a")


OWN_CODE = """
import transformers
class Own(transformers.GPT2LMHeadModel):
    pass
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(home, capsys):
    """Of the policy and of the reward model. Wrong: the class of that name in transformers, silently; the
    flag not in config.json."""
    (home / "model/own.py").write_text(OWN_CODE)
    config = json.loads((home / "model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (home / "model/config.json").write_text(json.dumps(config))
    refused(flags(), capsys, "--model model: brings code; --trust-remote-code runs it")
    assert not (home / "run").exists()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        build = brain.Policy.__init__

        def note(self, model, *more):
            seen.append(type(model).__name__)
            build(self, model, *more)

        patch.setattr(brain.Policy, "__init__", note)
        assert brain.main([*flags(), "--lora-rank", "0", "--trust-remote-code"]) == 0
    assert seen == ["Own"] and json.loads((home / "run/config.json").read_text())["trust_remote_code"]
    classifier("gpt2", byte_pairs()).save_pretrained(home / "reward")
    byte_pairs().save_pretrained(home / "reward")
    config = json.loads((home / "reward/config.json").read_text()) | {"auto_map": {"AutoModel": "own.Own"}}
    (home / "reward/config.json").write_text(json.dumps(config))
    with pytest.raises(brain.UserError, match="--reward-model .*reward: brings code; --trust-remote-code"):
        brain.RewardModel.from_pretrained(str(home / "reward"))


def test_the_columns_of_a_prompt_count_for_what_fits():
    """A reward model that also reads the tools of a row. Wrong: a row that fits only without them is kept,
    and the run dies when it is scored."""
    tokenizer = byte_pairs(specials=BOTH)
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + TURNS
    reward = brain.RewardModel(classifier("llama", tokenizer, max_position_embeddings=64), tokenizer)
    columns = {"tools": [{"type": "function", "function": {"name": "a" * 50}}]}
    bare, full = (
        brain.Example(0, [{"role": "user", "content": "abc"}], torch.tensor([4]), None, None, more)
        for more in ({}, columns)
    )
    assert reward.fits(bare, 3) and not reward.fits(full, 3)


def test_an_adapter_of_an_unknown_architecture_is_on_layers_of_every_linear_kind(monkeypatch):
    """Also on the Conv1D of a GPT-2. Wrong: only torch's Linear; the output layer."""
    import peft.utils

    monkeypatch.delitem(peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "gpt2")
    names = brain.Policy(tiny(), letters(), 2).parameters()
    found = {name.split(".lora_")[0].split(".")[-1] for name in names}
    assert found == {"c_attn", "c_proj", "c_fc"}


def test_an_untrained_policy_that_nothing_beat_is_said_to_be_one(home, capsys):
    """Wrong: "the policy of update 0", which reads like a trained one."""
    assert brain.main([*flags(), "--learning-rate", "30", "--select-by", "elbo"]) == 0
    assert "model/ is the untrained prior, which no update beat, by elbo" in capsys.readouterr().out
    assert jsonl(home / "run/metrics.jsonl")[-1]["step"] == 0  # the one that is tested


def test_what_a_library_says_is_its_cause_in_one_line():
    """Wrong: "error in loading", without the reason that was raised first; lines of a traceback."""
    with pytest.raises(brain.UserError) as caught:
        with brain.library_errors("--model", "m"):
            try:
                raise OSError("the disk\n  is gone")
            except OSError as error:
                raise ValueError("could not load") from error
    assert str(caught.value) == "--model m: the disk is gone"


def test_the_lines_from_python_in_the_readme_run(home, monkeypatch):
    """As they stand there, on a model in memory, with less to do; then peft loads what they saved. Wrong: a
    name that has changed since they were written; the last policy saved, not the one that was kept."""
    readme = (Path(brain.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    small = dict(iterations=1, prompts_per_iteration=2, samples_per_prompt=3, updates_per_iteration=2)
    small |= dict(max_new_tokens=4, batch_size=2, learning_rate=0.05)
    monkeypatch.setattr(brain, "Settings", functools.partial(brain.Settings, **small))
    rows = {"train": dataset_of([{"prompt": " a"}, {"prompt": " b"}])}
    rows["validation"] = dataset_of([{"prompt": " c"}])
    names = {"brain": brain, "f": lambda completions, **_: [float(len(y)) for y in completions], "rows": rows}
    exec(code, names | {"model": tiny(), "tokenizer": letters()})
    best = torch.load(home / "runs/mine/checkpoint/best.pt")["parameters"]
    saved = peft.PeftModel.from_pretrained(tiny(), home / "runs/mine/model").state_dict()
    for name, parameter in best.items():
        np.testing.assert_array_equal(saved[name.replace(".policy.", ".default.")], parameter)
    assert best
