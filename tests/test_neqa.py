"""neqa.py: composition, negator, prompts, scores, laboratory; and the model client that it shares with lost_in_middle.py."""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import neqa
from neqa import GPT, GPTConfig, Local, Negator, Server, ask, build_prompt, build_task2, builtin_rows, compose, shape, train_models

HOUSE = Path(neqa.__file__).parent
DATA = Path(os.environ.get("NANOPAPERS_TEST_DATA", "")) / "neqa"
needs_data = pytest.mark.skipif("NANOPAPERS_TEST_DATA" not in os.environ, reason="NANOPAPERS_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and on a busy machine lose much by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ 1. the mathematics


def test_composition():
    t1 = np.linspace(0, 1, 11)
    assert np.allclose(compose(t1, 0), 1 - t1) and np.allclose(compose(t1, 1), t1) and np.allclose(compose(t1, 0.5), 0.5)
    assert np.allclose(compose(t1, 0.3), compose(0.3, t1))
    x = np.linspace(-10, 10, 100)  # the paper's simulation
    y = compose(0.75 + 0.025 * x, neqa.sigmoid(x))
    assert round(y.min(), 5) == 0.34050 and round(x[y.argmin()], 4) == -2.7273 and round(y[-1], 5) == 0.99995
    assert neqa.understanding(0.5) == 0 and neqa.understanding(1.0) == 1
    with_a2 = compose(0.75 + 0.025 * x, 0.5 + 0.5 * neqa.sigmoid(x))
    assert with_a2.min() >= 0.5  # the mistake of putting a2 itself in never falls below chance


def test_covariance_term_closes_the_gap():
    rng = np.random.default_rng(0)
    right = rng.random(500) < 0.7
    turned = np.where(rng.random(500) < 0.8, right, rng.random(500) < 0.4)
    measured = np.mean(right == turned)
    assert abs(measured - compose(right.mean(), turned.mean()) - neqa.covariance_term(right, turned)) < 1e-12
    assert abs(measured - compose(right.mean(), turned.mean())) > 0.1  # without the term it is not so


@pytest.mark.parametrize("y, error, name", [
    ([0.46, 0.38, 0.12, 0.04, 0.01], 0, "inverse"), ([0.45, 0.39, 0.39, 0.52, 0.84], 0, "U"), ([0.52, 0.62, 0.68, 0.99], 0, "positive"),
    ([0.5, 0.52, 0.5], 0, "flat"), ([0.5, 0.8, 0.55], 0, "inverted U"), ([0.45, 0.39, 0.84], 0.03, "positive"),
    ([0.45, 0.39, 0.84], 0.01, "U"), ([0.40, 0.06, 0.10, 0.01], 0, "inverse"), ([0.5, 0.56], 0.03, "flat"),
    ([0.4, 0.5, 0.1], 0, "inverted U"),
])
def test_shape(y, error, name):
    assert shape(y, error) == name


def test_fit_finds_what_made_the_data():
    x = np.array([8.0, 8.5, 9.0, 9.5, 10.0, 10.5])
    t1, s, n, rng = 0.55 + 0.15 * (x - 8), neqa.sigmoid(4 * (x - 9.4)), np.full(6, 4000), np.random.default_rng(1)
    counts = {"task1": rng.binomial(n, t1), "task2": rng.binomial(n, 0.5 + 0.5 * s), "neqa": rng.binomial(n, compose(t1, s))}
    found = neqa.fit_curves(x, counts, n, draws=200)
    low, high = found["x0_interval"]
    assert low <= 9.4 <= high and high - low < 0.3 and abs(found["x0"] - 9.4) < 0.1 and found["rmse"] < 0.03
    assert np.abs(found["t1"](x) - t1).max() < 0.03 and np.abs(found["s"](x) - s).max() < 0.06
    falling = {**counts, "task2": counts["task2"][::-1]}  # no logistic rises like this: the misfit must say so
    assert neqa.fit_curves(x, falling, n, draws=100)["misfit_s"] > 0.3


def test_wilson():
    assert np.allclose(neqa.wilson(0, 10), (0, 0.2775), atol=1e-4) and np.allclose(neqa.wilson(5, 10), (0.2366, 0.7634), atol=1e-4)


HEAD = "The following are multiple choice questions (with answers) about common sense."
END = "Question: Birds cannot\nA. fly\nB. bark\nAnswer:"
SHOTS = ("Question: If a cat has a body temp that is below average, it isn't in\nA. danger\nB. safe ranges\nAnswer: B\n\n"
         "Question: As the barometer reading goes lower there is not a greater chance of\nA. sunshine\nB. getting wet\nAnswer: A\n\n"
         "Question: Coral is a type of living organism which cannot be identified in\nA. saltwater locations that are open\n"
         "B. any where with liquid\nAnswer: B\n\n")


def chain(plain, x, y):
    return (f"Let's think step-by-step.\nFirst, let's answer non-negated question: \"{plain}?\"\n"
            f"For this non-negated question, we have {x}.\n"
            f"Then, to answer the negated question, take the other answer, which would be {y}.\nSo the answer is {y}.")


CHAINS = SHOTS.replace("Answer: B", "Answer: " + chain("If a cat has a body temp that is below average, it is in", "A", "B"), 1).replace(
    "Answer: A", "Answer: " + chain("As the barometer reading goes lower there is a greater chance of", "B", "A")).replace(
    "Answer: B", "Answer: " + chain("Coral is a type of living organism which can be identified in", "A", "B"))


@pytest.mark.parametrize("kind, expected", [
    ("zeroshot", f"{HEAD}\n\n{END}"),
    ("hint", f"{HEAD} Note that if there is a negation in the question, we should choose the wrong answer to the original question.\n\n"
     + END),
    ("fewshot", f"{HEAD}\n\n{SHOTS}{END}"),
    ("fewshot_hint", f"{HEAD} Note that if there is a negation in the question, we should choose the wrong answer to the non-negated "
     f"question.\n\n{SHOTS}{END}"),
    ("cot", f"{HEAD}\n\n{CHAINS}{END}"),
])
def test_prompts_to_the_byte(kind, expected):
    assert build_prompt(kind, "Birds cannot", ("fly", "bark")) == expected


def test_task2_prompt_to_the_byte():
    body = 'Sentence 1: "Birds can fly."\nSentence 2: "Birds cannot fly."\nQuestion: The above two sentences are?\nA. {}\nB. {}\nAnswer:'
    assert build_task2("Birds can", "Birds cannot", "fly", False) == body.format("the same", "different")
    assert build_task2("Birds can", "Birds cannot", "fly", True, hint=True) == (
        "Negated sentences are different from original sentences.\n\n" + body.format("different", "the same"))
    with pytest.raises(ValueError, match="zeroshot"):
        build_prompt("oneshot", "?", ("a", "b"))


def test_letters_from_log_probabilities():
    assert neqa.letter_margin({" A": -1.0, " B": -0.5}) == pytest.approx(-0.5)
    assert neqa.letter_margin({" A": -1.0, "A": -1.0, "▁B": -1.0}) == pytest.approx(math.log(2))  # a letter's tokens add up
    assert neqa.letter_margin({" A": -1.0, "x": -3.0}) == pytest.approx(3.0)  # B counts as one nat below the last
    assert neqa.letter_margin({"x": -0.1}) == 0 and neqa.letter_margin({}) == 0
    assert neqa.letter_margin({" A.": -0.1, " B": -2.0}) < 0 < neqa.letter_margin({" A.": -0.1, " B": -2.0}, surface=True)
    assert [neqa.read_letter(text) for text in (" B", "Answer: A.", "An A", "I can't", "", "(B)")] == [1, 0, 0, None, None, 1]
    for text, pick, both in ((" So the answer is A.", 0, False), ("So the answer is B.\n\nSo the answer is A.", 1, False),
                             ("C", None, False), ("So the answer is A. No. So the answer is B.", 1, True)):
        assert neqa.read_chain(text) == (pick, both)


@pytest.mark.parametrize("text, expected, rule", [
    ("A candle is", "A candle isn't", "not/be"), ("The waste of plants contains", "The waste of plants doesn't contain", "not/do"),
    ("An area of forest can", "An area of forest can't", "not/modal"), ("The willow was", "The willow wasn't", "not/be"),
    ("Canada may", "Canada may not", "not/modal"), ("Is the sun", "Isn't the sun", "not/be"),
    ("Birds fly because", "Birds fly not because", "not/because"),
    ("Birds cannot", "Birds cannot", "gold/not"), ("Rain isn't", "Rain isn't", "gold/not"),
    ("It is unlikely that", "It is unlikely that", "gold/un-in-"),
    ("What do plants need?", "What don't plants need?", "not/do"), ("Which bird eats fish?", "Which bird doesn't eat fish?", "not/do"),
    ("When it rains, plants grow", "When it rains, plants don't grow", "not/do"),
    ("If it is wet, cars would", "If it is wet, cars wouldn't", "not/modal"),
    ("A can of soda", "Which of the following is not true? A can of soda", "prompt"), ("Wet things that are warm are", None, "prompt"),
    ("The Sun Is", "The Sun Isn't", "not/be"), ("The boat was made of", "The boat wasn't made of", "not/be"),
    ("Dogs have", "Dogs don't have", "not/do"),
    ("A dog has eaten", None, "prompt"), ("The animals’ need", None, "prompt"), ("Wolves hunted", "Wolves didn't hunt", "not/do"),
    ("He ate", "He didn't eat", "not/do"), ("She carries", "She doesn't carry", "not/do"), ("Water will", "Water won't", "not/modal"),
    ("Nobody is", "Nobody is", "gold/not"), ("A scarcely lit room is", "A scarcely lit room is", "gold/un-in-"),
    ("They could", "They couldn't", "not/modal"),
    ("Sand might", "Sand might not", "not/modal"), ("Cats were", "Cats weren't", "not/be"),
    ("A knife cuts", "A knife doesn't cut", "not/do"),
])
def test_negator(text, expected, rule):
    negated, found, turned = Negator()(text)
    assert found == rule and turned == (not rule.startswith("gold"))
    assert negated == (neqa.PREFIXES[0] + text if expected is None else expected)
    again = Negator()(negated)
    assert again == (negated, "gold/not", False) or rule == "gold/un-in-"  # never a second negation


def test_negator_takes_turns_and_leaves_out():
    negator = Negator()
    assert [negator(text)[0] for text in ("It is", "It was", "It can", "It can", "It is")] == \
        ["It isn't", "It was not", "It can't", "It can not", "It isn't"]
    assert [negator(text)[0] for text in ("Wet stones", "Wet wood")] == [neqa.PREFIXES[0] + "Wet stones", neqa.PREFIXES[1] + "Wet wood"]
    for text in ("Which stones?", "Why so wet?", " . ", "Which of the stones"):
        assert negator(text)[0] is None and negator(text)[2] is False


def test_builtin_questions():
    rows = builtin_rows()
    assert len(rows) >= 200 and len({row["question"] for row in rows}) == len(rows)
    assert abs(sum(row["answer"] for row in rows) * 2 - len(rows)) <= 1  # as many A as B
    assert {row["rule"] for row in rows} == {"not/be", "not/do", "not/modal", "not/because", "prompt", "gold/not", "gold/un-in-"}
    for row in rows:
        assert row["plain"] != row["question"] and len(set(row["choices"])) == 2, row
    france = next(row for row in rows if "France" in row["plain"])
    assert france["choices"][1 - france["answer"]] == "Paris"  # the plain answer is wrong for the negated question


@needs_data
def test_the_real_files():
    rows = neqa.read_rows(str(DATA / "neqa.jsonl"))
    assert len(rows) == 1718 and sum(row["answer"] for row in rows) == 859 and len({row["question"] for row in rows}) == 1718 - 278
    counts = {rule: sum(row["rule"] == rule for row in rows) for rule in dict.fromkeys(row["rule"] for row in rows)}
    assert counts.items() >= {"not/be": 100, "not/because": 100, "ConceptNet": 150, "TREx": 594, "SQUAD": 100, "GoogleRE": 374}.items()
    twins = neqa.read_rows(str(DATA))
    assert len(twins) == 100 and sum(row["answer"] == 0 for row in twins) == 52
    found = 0
    for row in twins:  # both forms of the negator: the paper's twins come out, but for "cannot", "has not", and one left as it was
        forms = []
        for used in (0, 1):
            negator = Negator()
            negator.used.update({rule: used for rule in ("not/be", "not/do", "not/modal")})
            forms.append(negator(row["plain"])[0])
        found += row["question"] in forms
    assert found == 93
    assert len(neqa.read_rows(str(DATA / "sample_not_be_300.csv"))) == 300


# --------------------------------------------------------------------------------------------------------- the laboratory


def test_parameter_counts():
    sizes = {2: (642, 1794, 5634, 19458, 71682), 3: (798, 2362, 7794, 27874, 104898, 406402)}
    for layers, counts in sizes.items():
        for d, count in zip((4, 8, 16, 32, 64, 128), counts):
            assert neqa.n_parameters(d, layers) == count
    assert sum(weight.numel() for weight in neqa.init_models([5], 8, 3).values()) == 2362


def naive_forward(weights, k, sentence, layers):
    """One model, one sentence, by loops over tokens and heads, in float64."""
    w = {name: weight[k].double() for name, weight in weights.items()}
    norm = lambda v: (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()  # noqa: E731
    x = [w["tokens"][token] + w["positions"][i] for i, token in enumerate(sentence)]
    d = len(x[0])
    for i in range(layers):
        qkv = [norm(v) @ w[f"{i}.qkv"] + w[f"{i}.qkv.bias"][0] for v in x]
        mixed = [torch.zeros(d, dtype=torch.float64) for _ in x]
        for h in range(neqa.HEADS):
            part = [slice(n * d + h * d // neqa.HEADS, n * d + (h + 1) * d // neqa.HEADS) for n in range(3)]
            for t in range(3):
                scores = torch.stack([qkv[t][part[0]] @ qkv[j][part[1]] for j in range(t + 1)]) / math.sqrt(d / neqa.HEADS)
                mixed[t][part[0]] = sum(p * qkv[j][part[2]] for j, p in enumerate(scores.softmax(0)))
        x = [v + m @ w[f"{i}.out"] + w[f"{i}.out.bias"][0] for v, m in zip(x, mixed)]
        x = [v + torch.nn.functional.gelu(norm(v) @ w[f"{i}.up"] + w[f"{i}.up.bias"][0], approximate="tanh") @ w[f"{i}.down"]
             + w[f"{i}.down.bias"][0] for v in x]
    return norm(x[2]) @ w["head"] + w["head.bias"][0]


def test_forward_against_loops():
    weights = neqa.init_models([1, 2], 8, 2)
    for name, weight in weights.items():
        if name.endswith("bias"):
            weight.data.normal_(std=0.3)
    sentences = torch.randint(neqa.NOT + 1, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    got = neqa.forward_models(weights, sentences, 2)
    for k in range(2):
        for b in range(3):
            assert torch.allclose(got[k, b].double(), naive_forward(weights, k, sentences[k, b], 2), atol=1e-5)


def test_models_side_by_side_are_models_alone():
    models = [(0.3, 0), (0.01, 1)]
    job = dict(d=8, layers=2, steps=20, batch=32)
    together = train_models(job | {"models": models})["results"]
    alone = [result for model in models for result in train_models(job | {"models": [model]})["results"]]
    key = lambda row: (row["share"], row["step"])  # noqa: E731
    for a, b in zip(sorted(together, key=key), sorted(alone, key=key)):
        assert key(a) == key(b) and all(abs(a[name] - b[name]) < 1e-9 for name in ("t1", "s", "neqa"))
    for row in together:
        assert abs(row["neqa"] - row["composed"] - row["covariance"]) < 1e-9
        assert row["composed"] == pytest.approx(compose(row["t1"], row["s"]))


def test_the_world_is_as_described():
    sentences, labels = neqa.draw_sentences(7, 11, 0.3, 50, 200)
    table, negated = neqa.truth_table(7), sentences[..., 2] == neqa.NOT
    assert ((table[sentences[..., 0], sentences[..., 1] - neqa.SUBJECTS] ^ negated) == labels).all()
    assert abs(negated.double().mean() - 0.3) < 4 * math.sqrt(0.21 / 1e4)
    assert sentences[..., 2].min() == neqa.SUBJECTS + neqa.ATTRIBUTES and abs(table.double().mean() - 0.5) < 4 / math.sqrt(4 * 800)


# ------------------------------------------------------------------------------------------------------------ the client


def client_args(**changes):
    parser = argparse.ArgumentParser()
    neqa.client_flags(parser.add_argument)
    args = parser.parse_args([])
    vars(args).update({**dict(quiet=True, model="http", api_key_env="TEST_KEY", concurrency=4, timeout=2.0), **changes})
    return args


class Fake(ThreadingHTTPServer):
    """An OpenAI-compatible server that follows a script: a list of functions of (body, headers) → (status, reply, headers)."""

    daemon_threads = True

    def __init__(self, script=()):
        fake, self.script, self.bodies, self.keys, self.under_way, self.most = self, list(script), [], [], 0, 0
        self.lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                """Say nothing."""

            def do_GET(self):
                self.reply(200, {"data": [{"id": "m"}]}, {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append((self.path, body))
                    fake.keys.append(self.headers.get("Authorization"))
                    fake.under_way += 1
                    fake.most = max(fake.most, fake.under_way)
                    step = fake.script.pop(0) if fake.script else good
                answer = step(body)
                with fake.lock:
                    fake.under_way -= 1  # before the client hears of it
                self.reply(*answer)

            def reply(self, status, content, headers):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


def good(body):
    """Answers A, in the shape of /completions, and echoes where it is asked to."""
    prompt = body.get("prompt") or body["messages"][0]["content"]
    choice = {"text": " A", "finish_reason": "length"}
    if body.get("echo"):  # a token a character, each of log-probability −1 but for "B", −5
        choice = {"text": prompt + "!", "logprobs": {"tokens": [*prompt, "!"], "text_offset": list(range(len(prompt) + 1)),
                                                     "token_logprobs": [None, *(-5.0 if c == "B" else -1.0 for c in prompt[1:]), -1.0]}}
    elif body.get("top_logprobs") or body.get("logprobs"):
        choice["logprobs"] = {"tokens": [" A"], "token_logprobs": [-0.1], "top_logprobs": [{" A": -0.1, " B": -2.4}]}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}, {}


def chat_shape(body):
    top = [{"token": "A", "logprob": -2.0}, {"token": "B", "logprob": -0.2}]
    return 200, {"choices": [{"message": {"content": "B"}, "logprobs": {"content": [{**top[1], "top_logprobs": top}]}}]}, {}


def refuse(status, message="no", **headers):
    return lambda body: (status, {"error": {"message": message}}, headers)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(neqa, "BACKOFF", 0.001)
    monkeypatch.setenv("TEST_KEY", "secret-key")
    server = Fake()
    yield server
    server.shutdown()
    server.server_close()


def requests_of(n, **fields):
    return [dict(id=str(i), prompt=f"question {i}", max_tokens=3, **fields) for i in range(n)]


def test_both_shapes_of_log_probabilities(fake, tmp_path):
    args = client_args(base_url=fake.url)
    answer, = ask(args, Server(args, ""), requests_of(1, logprobs=5), tmp_path)
    assert answer["logprobs"] == {" A": -0.1, " B": -2.4} and answer["text"] == " A" and answer["usage"]["prompt_tokens"] == 7
    fake.script = [chat_shape]
    args = client_args(base_url=fake.url, api="chat")
    answer, = ask(args, Server(args, "m"), requests_of(1, logprobs=5), tmp_path)
    assert answer["logprobs"] == {"A": -2.0, "B": -0.2} and answer["text"] == "B"
    (path, body), (chat_path, chat_body) = fake.bodies
    assert path == "/v1/completions" and body == dict(model="m", prompt="question 0", max_tokens=3, temperature=0, top_p=1, logprobs=5)
    assert chat_path == "/v1/chat/completions" and chat_body["messages"] == [{"role": "user", "content": "question 0"}]
    assert chat_body["top_logprobs"] == 5 and chat_body["logprobs"] is True and "prompt" not in chat_body


def test_scores_by_echo(fake, tmp_path):
    args = client_args(base_url=fake.url)
    answer, = ask(args, Server(args, "m"), [dict(id="0", prompt="ABC", choices=[" A", " BB", "x"])], tmp_path)
    assert answer["scores"] == [-2.0, -11.0, -1.0]  # the choice's tokens alone, neither the prompt's nor the generated one


@pytest.mark.parametrize("reply", [
    {"text": "!", "logprobs": {"tokens": ["!"], "token_logprobs": [-1.0], "text_offset": [3]}},  # echo left out
    {"text": "hello!", "logprobs": {"tokens": list("hello!"), "token_logprobs": [None, *[-1.0] * 5], "text_offset": list(range(6))}},
    {"text": "ABC A!", "logprobs": None},
    {"text": "ABC A!", "logprobs": {"tokens": ["!"], "token_logprobs": [-1.0], "text_offset": [5]}},  # the generated token alone
    {"text": "ABC A!", "logprobs": {"tokens": list("ABC A!"), "token_logprobs": [None, None, None, -1.0, -1.0, -1.0],
                                    "text_offset": list(range(6))}},
])
def test_a_server_that_does_not_echo_is_found_out(fake, tmp_path, capsys, reply):
    fake.script = [lambda body: (200, {"choices": [reply]}, {})] * 3
    args = client_args(base_url=fake.url)
    with pytest.raises(SystemExit):
        ask(args, Server(args, "m"), [dict(id="0", prompt="ABC", choices=[" A"])], tmp_path)
    assert "prompt" in capsys.readouterr().err


def test_no_log_probabilities_is_said(fake, tmp_path, capsys):
    fake.script = [lambda body: (200, {"choices": [{"text": " A", "logprobs": None}]}, {})]
    args = client_args(base_url=fake.url)
    with pytest.raises(SystemExit):
        ask(args, Server(args, "m"), requests_of(1, logprobs=5), tmp_path)
    assert "gives no log-probabilities" in capsys.readouterr().err


def test_what_passes_is_tried_again(fake, tmp_path):
    dates = formatdate(time.time() - 5, usegmt=True)  # in the past: at once
    slow = lambda body: (time.sleep(2.5), good(body))[1]  # noqa: E731
    fake.script = [refuse(429, **{"Retry-After": "0.2"}), refuse(500), refuse(503, **{"Retry-After": dates}),
                   lambda body: (200, b"{not json", {}), slow, good]
    args = client_args(base_url=fake.url, timeout=1.0)
    started = time.time()
    answer, = ask(args, Server(args, "m"), requests_of(1), tmp_path)
    assert answer["text"] == " A" and len(fake.bodies) == 6 and time.time() - started > 0.2 + 1.0


def test_what_stays_is_not_tried_again(fake, tmp_path, capsys):
    args = client_args(base_url=fake.url)
    fake.script = [refuse(401, "bad key secret-key")]
    with pytest.raises(SystemExit):
        ask(args, Server(args, "m"), requests_of(3), tmp_path)
    message = capsys.readouterr().err
    assert len(fake.bodies) == 1 and "$TEST_KEY" in message and "secret-key" not in message and message.count("\n") == 1
    fake.script = [good, refuse(500), *[refuse(500)] * 20]  # one answer fails for good: the others count, and it is asked next time
    args.concurrency = 1
    answers = ask(args, Server(args, "m"), requests_of(2), tmp_path)
    assert answers[0]["text"] == " A" and "500" in answers[1]["error"] and len(fake.bodies) == 2 + neqa.TRIES
    fake.script = []
    assert [a["text"] for a in ask(args, Server(args, "m"), requests_of(2), tmp_path)] == [" A", " A"]
    assert len(fake.bodies) == 3 + neqa.TRIES


def test_nobody_waits_for_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(neqa.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(neqa.ServerError, match="refused"):
        neqa.post("http://127.0.0.1:9/v1", {}, patient=False)


def test_refused_parameters_and_overflow(fake, tmp_path, capsys):
    args = client_args(base_url=fake.url, api="chat")
    fake.script = [refuse(400, "Unsupported parameter: 'max_tokens'"), refuse(400, "'temperature' does not support 0")]
    answers = ask(args, Server(args, "o1"), requests_of(2), tmp_path)
    assert all(answer["text"] for answer in answers)
    assert fake.bodies[-1][1].keys() == {"model", "max_completion_tokens", "top_p", "messages"} and len(fake.bodies) == 4
    assert capsys.readouterr().err.count("refuses") == 2
    fake.script = [good, refuse(400, "This model's maximum context length is 4096 tokens, your prompt has 5000")]
    answers = ask(client_args(base_url=fake.url, concurrency=1), Server(args, "m"), requests_of(2), tmp_path)
    assert [answer.get("skipped") for answer in answers] == [None, "overflow"]


def test_cache_is_whole_after_anything(fake, tmp_path, capsys):
    args, requests = client_args(base_url=fake.url), requests_of(12)
    model = Server(args, "m")
    ask(args, model, requests[:8], tmp_path)
    path = tmp_path / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # killed in the middle of a line: five are whole
    answers = ask(args, model, requests, tmp_path)
    assert len(answers) == 12 and all(answer["text"] == " A" for answer in answers) and len(fake.bodies) == 8 + 7
    assert "torn line" in capsys.readouterr().err
    assert [answer["id"] for answer in ask(args, model, requests, tmp_path)] == [str(i) for i in range(12)] and len(fake.bodies) == 15
    ask(args, model, [{**requests[0], "max_tokens": 4}], tmp_path)  # another request, though the prompt is the same
    ask(args, Server(args, "other"), requests[:1], tmp_path)
    assert len(fake.bodies) == 17
    ask(client_args(base_url=fake.url, refresh=True), model, requests[:2], tmp_path)
    assert len(fake.bodies) == 19
    twice = ask(args, model, [dict(requests[0], id="x", prompt="new"), dict(requests[0], id="y", prompt="new")], tmp_path)
    assert [answer["id"] for answer in twice] == ["x", "y"] and len(fake.bodies) == 20  # the same question is asked once
    assert b"secret-key" not in b"".join(file.read_bytes() for file in tmp_path.iterdir()) and set(fake.keys) == {"Bearer secret-key"}


def test_concurrency_is_kept_to(fake, tmp_path):
    fake.script = [lambda body: (time.sleep(0.05), good(body))[1]] * 13
    args = client_args(base_url=fake.url, concurrency=3)
    ask(args, Server(args, "m"), requests_of(13), tmp_path)
    assert fake.most == 3 and len(fake.bodies) == 13


def test_dry_run_and_limit_ask_nothing(fake, tmp_path, capsys):
    args = client_args(base_url=fake.url, dry_run=True, price_in=1e6)
    with pytest.raises(SystemExit) as stop:
        ask(args, Server(args, "m"), requests_of(4), tmp_path)
    said = capsys.readouterr().out
    assert not stop.value.code and "question 0" in said and "4 calls" in said and "$" in said and not fake.bodies
    with pytest.raises(SystemExit) as stop:
        ask(client_args(base_url=fake.url, max_prompt_tokens=3), Server(args, "m"), requests_of(4), tmp_path)
    assert stop.value.code == 2 and "--yes" in capsys.readouterr().err and not fake.bodies


def small_gpt(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=32, bias=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def dense_logits(model, ids):
    """GPT-2 again, by another route: one position and one head at a time, from the state dict."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    c, n = model.config, len(ids)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = torch.stack([w["transformer.wte.weight"][token] + w["transformer.wpe.weight"][i] for i, token in enumerate(ids)])
    for i in range(c.n_layer):
        at, size = f"transformer.h.{i}", c.n_embd // c.n_head
        qkv = norm(x, f"{at}.ln_1") @ w[f"{at}.attn.c_attn.weight"].T + w[f"{at}.attn.c_attn.bias"]
        out = torch.zeros_like(x)
        for h in range(c.n_head):
            q, k, v = (qkv[:, part * c.n_embd + h * size : part * c.n_embd + (h + 1) * size] for part in range(3))
            for t in range(n):
                p = torch.stack([q[t] @ k[j] / math.sqrt(size) for j in range(t + 1)]).softmax(0)
                out[t, h * size : (h + 1) * size] = p @ v[: t + 1]
        x = x + out @ w[f"{at}.attn.c_proj.weight"].T + w[f"{at}.attn.c_proj.bias"]
        u = norm(x, f"{at}.ln_2") @ w[f"{at}.mlp.c_fc.weight"].T + w[f"{at}.mlp.c_fc.bias"]
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ w[f"{at}.mlp.c_proj.weight"].T + w[f"{at}.mlp.c_proj.bias"]
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def test_local_model_against_a_dense_gpt2():
    model = small_gpt()
    local = Local(model, lambda text: list(text.encode("latin1")), lambda ids: bytes(ids).decode("latin1"), "small")
    for prompt in ("hello world", "hello worms", "hello", "other"):  # what is shared with the prompt before comes from the cache
        logprobs = dense_logits(model, list((prompt + " Bc").encode())).log_softmax(-1)
        n = len(prompt)
        expected = sum(float(logprobs[n - 1 + j, token]) for j, token in enumerate(b" Bc"))
        got = local.answer(dict(prompt=prompt, choices=[" Bc", " A"]))["scores"]
        assert got[0] == pytest.approx(expected, abs=1e-4)
        ids = list(prompt.encode())
        for _ in range(6):
            ids.append(int(dense_logits(model, ids)[-1].argmax()))
        answer = local.answer(dict(prompt=prompt, max_tokens=6, logprobs=3))
        assert answer["text"] == bytes(ids[n:]).decode("latin1") and len(answer["logprobs"]) == 3
        assert max(answer["logprobs"].values()) == pytest.approx(float(logprobs[n - 1].max()), abs=1e-4)
    stop = answer["text"][2]
    assert local.answer(dict(prompt="other", max_tokens=6, stop=[stop]))["text"] == answer["text"][: answer["text"].index(stop)]
    assert local.answer(dict(prompt="x" * 62, max_tokens=3))["skipped"] == "overflow"
    assert "skipped" not in local.answer(dict(prompt="x" * 61, max_tokens=3))
    assert "skipped" not in local.answer(dict(prompt="x" * 61, choices=["abc"]))


def test_gpt2_parameter_counts():
    for name, count in {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}.items():
        size = neqa.GPT_SIZES[name]
        with torch.device("meta"):  # one block is enough: the others have as many parameters
            model = GPT(GPTConfig(**{**size, "n_layer": 1}, vocab_size=50257, bias=True))
        block = sum(p.numel() for p in model.transformer.h.parameters())
        assert sum(p.numel() for p in model.parameters()) + (size["n_layer"] - 1) * block == count == neqa.size_of(name)
    assert neqa.size_of("gemma3-270m") == 2.7e8 and neqa.size_of("Llama-3.1-8B-Instruct") == 8e9 and math.isnan(neqa.size_of("gpt-4o"))


# ------------------------------------------------------------------------------------------------------------ 2. the claims


def test_the_corners_of_the_grid():
    """Thresholds that held in all seeds: a "not" in a thousandth is never learnt, one in a third is; task 1 is, both times. Training on
    labels that are not turned, or drawing "not" as often as fillers, breaks one or the other."""
    rows = train_models(dict(d=32, layers=2, steps=400, models=[(0.001, 0), (0.3, 0)]))["results"]
    rare, common = (next(row for row in rows if row["share"] == share and row["step"] == 400) for share in (0.001, 0.3))
    assert rare["t1"] > 0.95 and rare["neqa"] < 0.25 and common["t1"] > 0.9 and common["neqa"] > 0.85
    half = next(row for row in rows if row["share"] == 0.001 and row["step"] == 200)
    assert half["neqa"] > rare["neqa"]  # it falls as task 1 is learnt


def test_eval_finds_a_known_reader(tmp_path, monkeypatch, capsys):
    """A reader of known t1 and s: task 1, task 2 and the flip rate come out, with 4 standard errors, by every way of scoring."""
    rows = [dict(question=f"Thing {i} is not", plain=f"Thing {i} is", choices=["x", "y"], answer=i % 2, rule="not/be") for i in range(600)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, extra in enumerate((["--debias"], ["--prompt", "cot"], ["--score", "text"], ["--score", "option", "--debias"])):
        figures = tool(monkeypatch, tmp_path, capsys, "eval", "--model", "echo:t1=0.85,s=0.3", "--data", "rows.jsonl", "--no_plot", "--out",
                       f"e{i}", *extra)[2]["models"][0]
        assert abs(figures["task1"]["accuracy"] - 0.85) < 4 * math.sqrt(0.13 / 600)
        assert abs(figures["task2"]["accuracy"] - 0.65) < 4 * math.sqrt(0.23 / 600)
        assert abs(figures["twins"]["s"] - 0.3) < 4 * math.sqrt(0.21 / 600) and abs(figures["neqa"]["accuracy"] - 0.36) < 0.08
        twins = figures["twins"]
        assert twins["composed"] + twins["covariance"] == pytest.approx(figures["neqa"]["accuracy"], abs=1e-9)
        assert twins["interval"][0] < twins["difference"] == pytest.approx(figures["neqa"]["accuracy"] - figures["task1"]["accuracy"])
        assert 0.4 < figures["neqa"]["share_a"] < 0.6 and figures["neqa"]["missing"] == 0


def test_requests_know_their_right_answer():
    """The letter that counts as right stands before the right text, in both orders and in all tasks."""
    args = argparse.Namespace(prompt="hint", debias=True, choices_only=False)
    rows = [dict(question=f"{i} is not", plain=f"{i} is", choices=["yes", "no"][:: 1 if i % 3 else -1], answer=i % 2, rule="r")
            for i in range(6)]
    for task in ("neqa", "task1", "task2"):
        for request in neqa.build_requests(args, rows, task, "logprob", 5):
            row = rows[request["row"]]
            plain_answer = row["choices"][1 - row["answer"]]
            wanted = {"neqa": row["choices"][row["answer"]], "task1": plain_answer, "task2": "different"}[task]
            assert f"\n{'AB'[request['gold']]}. {wanted}\n" in request["prompt"] + "\n"
            if task == "task2":
                assert all(f'"{row[name]} {plain_answer}."' in request["prompt"] for name in ("plain", "question"))
    assert len({request["prompt"] for request in neqa.build_requests(args, rows, "task2", "logprob", 5)}) == 12


def test_debias_takes_out_a_preference_for_a_letter():
    """A model that only likes A: by itself it says A everywhere, in both orders it has no preference for a text. The margin of the
    second order must be subtracted, not added."""
    args = argparse.Namespace(prompt="zeroshot", debias=True, choices_only=False, surface=False, seed=0)
    rows = [dict(question=f"{i} is not", choices=["x", "y"], answer=i % 2, rule="r") for i in range(40)]
    requests = neqa.build_requests(args, rows, "neqa", "logprob", 5)
    likes = [{" A": -0.1 if request["gold"] == 0 else -0.2, " B": -3.0 if request["gold"] == 0 else -2.9} for request in requests]
    judged = neqa.score_task(args, rows, requests, [dict(logprobs=logprobs) for logprobs in likes], "logprob")
    assert all(entry["right"] for entry in judged)
    args.debias = False
    single = neqa.score_task(args, rows, requests[::2], [dict(logprobs=logprobs) for logprobs in likes[::2]], "logprob")
    assert all(entry["pick"] == 0 for entry in single) and sum(entry["right"] for entry in single) == 20


# --------------------------------------------------------------------------------------------------------------- 3. the tool


def tool(monkeypatch, folder, capsys, *args):
    """main() as in `python neqa.py …` in a folder → stdout, stderr, results."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["neqa.py", *map(str, args)])
    monkeypatch.setenv("NANOPAPERS_CACHE", str(folder / "cache"))
    neqa.main()
    said = capsys.readouterr()
    path, other = said.out.split()[-2:]
    if "results.json" not in path:  # with --no_plot the last words are no path
        path = next(word for word in said.out.split() if word.endswith("results.json"))
    return said.out, said.err, json.loads((folder / path).read_text())


def test_default_run_in_small(tmp_path):
    """The laboratory as a user starts it, alone (two processes) and under torchrun: the same figures, and the paths last."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    small = [str(HOUSE / "neqa.py"), "--steps", "4", "--seeds", "1", "--max_width", "16", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    jobs = [subprocess.Popen([sys.executable, *launcher, *small, name], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for name, launcher in (("one", []), ("two", torchrun))]
    found = []
    for job in jobs:
        out, err = job.communicate(timeout=300)
        assert job.returncode == 0, err
        path, picture = out.split()[-2:]
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
        found.append(json.loads((tmp_path / path).read_text())["rows"])
    assert found[0] == found[1] and len(found[0]) == 3 * 3 * 2


def test_tasks(tmp_path, monkeypatch, capsys):
    out, _, found = tool(monkeypatch, tmp_path, capsys, "compose")
    assert [row[1] for row in found["table"]] == ["positive", "U", "inverse"] and (tmp_path / out.split()[-1]).is_file()
    lines = ["model,size,n,task1,task2,neqa", *(f"m{i},{10**i},500,{0.55 + 0.05 * (i - 6)},{a2},{y}" for i, a2, y in
                                              ((6, 0.52, 0.45), (7, 0.55, 0.41), (8, 0.8, 0.55), (9, 0.98, 0.68)))]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    out, _, found = tool(monkeypatch, tmp_path, capsys, "fit", "m.csv", "--held_out", "--draws", 100)
    assert 7 < found["x0"] < 9 and "left out of the fit" in out and found["rmse"] < 0.05
    (tmp_path / "m.csv").write_text("\n".join(lines).replace("0.98,0.68", "0.5,0.5"))  # what is left out has no say
    assert tool(monkeypatch, tmp_path, capsys, "fit", "m.csv", "--held_out", "--draws", 100)[2]["x0"] == found["x0"]
    for i, name in enumerate(("t1=0.9,s=0.1", "t1=0.6,s=0.9")):
        tool(monkeypatch, tmp_path, capsys, "eval", "--model", f"echo:{name}", "--limit", 30, "--out", f"e{i}", "--by_rule")
    out, _, _ = tool(monkeypatch, tmp_path, capsys, "report", "e0/results.json", "e1/results.json")
    assert "| t1=0.9,s=0.1 zeroshot |" in out and "| t1=0.6,s=0.9 zeroshot |" in out
    out, _, found = tool(monkeypatch, tmp_path, capsys, "eval", "--model", "echo:t1=0.9,s=0.1,echo:t1=0.5,s=0.5,echo:t1=0.7,s=1", "--sizes",
                         "1e6,1e7,1e8", "--tasks", "neqa", "--limit", 100)
    assert "over size, NeQA is" in out and [model["size"] for model in found["models"]] == [1e6, 1e7, 1e8]


def test_negate(tmp_path, monkeypatch, capsys):
    (tmp_path / "q.txt").write_text("Birds can\n\nWhich stones?\nThe sun is\n")
    out, _, found = tool(monkeypatch, tmp_path, capsys, "negate", "q.txt")
    assert "not/modal\tBirds can't" in out and found["rules"] == {"not/modal": 1, "not/be": 1}
    assert found["left_out"][0][0] == "Which stones?"
    options = [{"text": text, "label": label} for text, label in zip(("gold", "b", "c", "d"), "ABCD")]
    stems = ("The sun is", "It is unlikely that", "Water can", "Ice was")
    (tmp_path / "obqa.jsonl").write_text("".join(json.dumps(dict(question=dict(stem=stem, choices=options), answerKey="A")) + "\n"
                                                 for stem in stems))
    tool(monkeypatch, tmp_path, capsys, "negate", "obqa.jsonl", "--export", "csv")
    rows = list(csv.DictReader(open(tmp_path / "out/neqa/negate/negated.csv")))
    assert [row["answer_index"] for row in rows] == ["1", "0", "1", "0"] and rows[0]["classes"] == "[' A', ' B']"
    back = neqa.read_rows(str(tmp_path / "out/neqa/negate/negated.csv"))  # our own export is read back
    assert [row["choices"][row["answer"]] == "gold" for row in back] == [False, True, False, False]  # gold/un-in- keeps its answer
    assert back[0]["question"] == "The sun isn't"


def test_finetune_on_made_reviews(tmp_path, monkeypatch, capsys):
    lines = ["sentence\tlabel", *(f"{'lovely' if i % 2 else 'awful'} film\t{i % 2}" for i in range(200))]
    (tmp_path / "r.tsv").write_text("\n".join(lines))
    out, _, found = tool(monkeypatch, tmp_path, capsys, "finetune", "--data", "r.tsv", "--model", "tiny", "--ratios", "0", "--epochs", 12,
                         "--batch_size", 4, "--lr", 2e-3, "--quiet")
    never, = found["results"]
    assert never["n"] == 20 and never["t1"] == 1 and never["neqa"] < 0.2  # "not" is never seen in training: it is read over
    assert never["composed"] == pytest.approx(compose(never["t1"], never["s"])) and (tmp_path / out.split()[-1]).is_file()
    assert neqa.suggest(" a film ", True, False) == "a film. This does suggest that it is good."
    assert neqa.suggest("a film!", True, True) == "a film! This does not suggest that it is bad."


ROW = dict(question="It is not", choices=["x", "y"], answer=0)
BAD = {
    "three.jsonl": json.dumps({**ROW, "choices": ["x", "y", "z"]}),
    "answer.jsonl": json.dumps(ROW) + "\n" + json.dumps({**ROW, "answer": 2}),
    "empty.jsonl": json.dumps({**ROW, "question": " "}), "torn.jsonl": json.dumps(ROW) + "\n{",
    "none.jsonl": "", "plain.jsonl": json.dumps(ROW),
    "cols.csv": "a,b\n1,2\n", "rows.csv": "prompt,classes,answer_index\nhello,\"[' A', ' B']\",0\n",
    "classes.csv": "prompt,classes,answer_index\n\"Question: q\nA. a\nB. b\nAnswer:\",\"[' yes', ' no']\",0\n",
    "two.csv": "model,size,n,task1,task2,neqa\na,1,10,.5,.5,.5\nb,2,10,.5,.6,.5\n",
    "same.csv": "model,size,n,task1,task2,neqa\na,1,10,.5,.5,.5\nb,2,10,.6,.5,.5\nc,3,10,.7,.5,.5\n",
    "over.csv": "model,size,n,task1,task2,neqa\na,1,10,.5,1.5,.5\nb,2,10,.6,.5,.5\nc,3,10,.7,.5,.5\n", "bad.tsv": "text\tlabel\nx\t1\n",
    "tiny.tsv": "sentence\tlabel\nx\t1\n",
}


@pytest.mark.parametrize("args, message", [
    (["eval", "--model", "echo:t1=1,s=0", "--data", "three.jsonl"], "three.jsonl, row 1: NeQA's questions have two choices"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "answer.jsonl"], "answer.jsonl, row 2: answer is 2, not 0 or 1"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "empty.jsonl"], "row 1: no question"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "torn.jsonl"], "torn.jsonl, line 2: not JSON"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "none.jsonl"], "holds no question"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "plain.jsonl", "--tasks", "task1"], "no plain twins"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "cols.csv"], "prompt, classes and answer_index are needed"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "rows.csv"], "rows.csv, row 1: not a question"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "classes.csv"], "classes.csv, row 1: not a question"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "nowhere"], "none of builtin, neqa, neqa100"),
    (["eval", "--model", "echo:t1=1,s=0", "--data", "."], "neqa_100.jsonl is missing"),
    (["eval", "--model", "echo:t1=1,s=0", "--tasks", "task3"], "--tasks task3: choose from"),
    (["eval", "--model", "echo:loud"], "write echo:t1=0.8,s=0.3"),
    (["eval"], "--model is missing"),
    (["eval", "--model", "gpt5"], "--model gpt5: choose from gpt2"),
    (["eval", "--model", "http:m", "--base_url", "localhost"], "is no address"),
    (["eval", "--model", "http:m", "--base_url", "http://127.0.0.1:9/v1"], "is the server running"),
    (["eval", "--model", "http", "--base_url", "http://127.0.0.1:9/v1"], "no list of models"),
    (["eval", "--model", "echo:t1=1,s=0", "--debias", "--score", "text"], "--debias averages log-probabilities"),
    (["eval", "--model", "echo:t1=1,s=0", "--sizes", "1,2"], "2 sizes for 1 models"),
    (["eval", "--model", "echo:t1=1,s=0", "--prompt", "threeshot"], "invalid choice"),
    (["fit"], "fit needs a file"), (["fit", "two.csv"], "a curve needs three or more"), (["fit", "same.csv"], "no transition to fit"),
    (["fit", "over.csv"], "accuracies between 0 and 1"), (["fit", "cols.csv"], "needs model, size, n"),
    (["fit", "gone.json"], "no such file"),
    (["finetune", "--ratios", "1.5"], "not between 0 and 1"), (["finetune", "--data", "bad.tsv"], "sentence and label"),
    (["finetune", "--data", "tiny.tsv", "--model", "tiny"], "too few"),
    (["finetune", "--model", "echo:t1=1,s=0", "--data", "bad.tsv"], "parted by tabs"),
    (["negate", "gone.txt"], "gone.txt"), (["negate", "plain.jsonl"], "not an OpenBookQA row"), (["report"], "report needs"),
    (["report", "two.csv"], "not the results.json"), (["lab", "x"], "lab takes no 'x'"), (["--seeds", "0"], "not between 1 and"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, args, message):
    for name, content in BAD.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        tool(monkeypatch, tmp_path, capsys, *args)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1, said


def test_a_chain_that_names_both_letters_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(neqa, "echo_reader", lambda spec, request: "So the answer is A. No: So the answer is B.")
    out, _, found = tool(monkeypatch, tmp_path, capsys, "eval", "--model", "echo:t1=1,s=0", "--prompt", "cot", "--tasks", "neqa", "--limit",
                         4)
    assert "neqa: 4 of 4 chains name both letters" in out and found["models"][0]["neqa"]["share_a"] == 0


def test_misaligned_twins(tmp_path, monkeypatch, capsys):
    other = {**ROW, "answer": 1}
    rows = dict(neqa_100=ROW, neqa_100_nonnegated=ROW, neqa_100_normalized_nonnegated=other, neqa_100_normalized=ROW)
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        tool(monkeypatch, tmp_path, capsys, "eval", "--model", "echo:t1=1,s=0", "--data", ".")
    assert "row 1: not the twin" in capsys.readouterr().err
    (tmp_path / "neqa_100_nonnegated.jsonl").write_text(json.dumps({**other, "choices": ["x", "z"]}) + "\n")
    with pytest.raises(SystemExit):
        tool(monkeypatch, tmp_path, capsys, "eval", "--model", "echo:t1=1,s=0", "--data", ".")
    assert "row 1: not the twin" in capsys.readouterr().err
    (tmp_path / "neqa_100_nonnegated.jsonl").write_text((json.dumps(other) + "\n") * 2)
    with pytest.raises(SystemExit):
        tool(monkeypatch, tmp_path, capsys, "eval", "--model", "echo:t1=1,s=0", "--data", ".")
    assert "have 1, 2, 1, 1 rows" in capsys.readouterr().err


def test_killed_and_resumed(tmp_path, fake):
    """Ctrl-C in the middle of an eval against a server: the answers so far are kept, and none is asked for again."""
    fake.script = [lambda body: (time.sleep(0.2), good(body))[1]] * 1000  # long enough to be interrupted on a busy machine
    command = [sys.executable, str(HOUSE / "neqa.py"), "eval", "--model", "http", "--base_url", fake.url, "--limit", "30",
               "--tasks", "neqa", "--concurrency", "2", "--no_plot", "--quiet"]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while len(fake.bodies) < 8:
        assert job.poll() is None and time.sleep(0.01) is None, job.stderr.read()
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 2 and "run the command again to go on" in err and err.count("\n") == 1
    kept = len((tmp_path / "out/neqa/eval/answers.jsonl").read_text().splitlines())
    asked = len(fake.bodies)
    fake.script = []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 5 <= kept < 30 and len(fake.bodies) - asked == 30 - kept
    prompts = [json.loads(line)["id"] for line in (tmp_path / "out/neqa/eval/answers.jsonl").read_text().splitlines()]
    assert len(prompts) == len(set(prompts)) == 30


def test_a_real_server(tmp_path, monkeypatch, capsys):
    """Against llama.cpp with a real model, where both are installed: NANOPAPERS_TEST_SERVER is its address."""
    if "NANOPAPERS_TEST_SERVER" not in os.environ:
        pytest.skip("NANOPAPERS_TEST_SERVER is not set")
    found = tool(monkeypatch, tmp_path, capsys, "eval", "--model", "http", "--base_url", os.environ["NANOPAPERS_TEST_SERVER"], "--limit", 3,
                 "--concurrency", 1, "--no_plot")[2]["models"][0]
    assert found["neqa"]["n"] == 3 and found["neqa"]["missing"] == 0 and found["task2"]["n"] == 3
