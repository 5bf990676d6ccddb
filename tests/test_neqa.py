"""neqa.py: the composition and its statistics, the authors' prompts, the negator, other people's files, the laboratory,
and evals of readers of known ability behind a server that runs in this process."""

import csv
import gzip
import hashlib
import json
import math
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import neqa
from neqa import Negator, build_prompt, build_task2, builtin_rows, compose, read_letter, shape

DATA = Path(os.environ.get("NANOPAPERS_TEST_DATA", "")) / "neqa"
needs_data = pytest.mark.skipif("NANOPAPERS_TEST_DATA" not in os.environ, reason="NANOPAPERS_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small lose by a second one
    yield
    torch.set_num_threads(threads)


def tool(capsys, *words):
    """Run a task → what it printed, its results.json."""
    args = neqa.parse_args([*map(str, words)])
    neqa.run(args)
    return capsys.readouterr().out, json.loads((args.out / "results.json").read_text())


def refused(capsys, *words):
    """Run a task that ends in one line on stderr, exit code 2 → that line."""
    with pytest.raises(SystemExit) as stop:
        neqa.run(neqa.parse_args([*map(str, words)]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


# ------------------------------------------------------------------------------------------------------ the mathematics


def test_composition():
    t1, x = np.linspace(0, 1, 11), np.linspace(-10, 10, 100)
    assert np.allclose(compose(t1, 0), 1 - t1) and np.allclose(compose(t1, 1), t1)
    assert np.allclose(compose(t1, 0.5), 0.5)
    s = 1 / (1 + np.exp(-x))
    y = compose(0.75 + 0.025 * x, s)  # the paper's simulation
    assert round(y.min(), 5) == 0.34050 and round(x[y.argmin()], 4) == -2.7273 and round(y[-1], 5) == 0.99995
    assert np.allclose(neqa.understanding(0.5 + s / 2), s)
    rng = np.random.default_rng(0)
    right = rng.random(500) < 0.7
    turned = np.where(rng.random(500) < 0.8, right, rng.random(500) < 0.4)
    gap = np.mean(right == turned) - compose(right.mean(), turned.mean())
    assert gap > 0.1 and abs(neqa.covariance_term(right, turned) - gap) < 1e-12


def test_equal_p_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    k, n = np.array([54, 54, 36, 33]), np.array([100, 120, 100, 90])
    assert math.isclose(neqa.equal_p(k / n, n), stats.chi2_contingency([k, n - k], correction=False)[1], rel_tol=1e-9)
    assert neqa.equal_p(np.ones(3), n[:3]) == 1


@pytest.mark.parametrize("y, n, name", [
    ([0.46, 0.38, 0.12, 0.01], None, "inverse"), ([0.45, 0.39, 0.39, 0.84], None, "U"),
    ([0.5, 0.6, 0.99], None, "positive"), ([0.5, 0.52, 0.5], None, "flat"), ([0.5, 0.8, 0.55], None, "inverted U"),
    ([0.4, 0.06, 0.1, 0.01], None, "inverse"), ([0.54, 0.54, 0.36, 0.33], 100, "inverse"),
    ([0.54, 0.5, 0.45, 0.47], 100, "flat"), ([0.6, 0.3, 0.9], 100, "U"), ([0.45, 0.39, 0.84], 100, "positive"),
    ([0.5, 0.5, 0.5], 100, "flat"),
])
def test_shape(y, n, name):
    assert shape(y, n) == name


@pytest.mark.parametrize("m", [4, 6, 13])
def test_equal_models_have_no_shape(m):
    """They were called one in 22, 40 and 78 of 100 tables of 4, 6 and 13 models."""
    tables = np.random.default_rng(m).binomial(100, 0.5, (600, m)) / 100
    assert np.mean([shape(y, 100) != "flat" for y in tables]) < 0.075
    falling = np.random.default_rng(m).binomial(100, np.linspace(0.8, 0.2, m), (300, m)) / 100
    named = [shape(y, 100) for y in falling]
    assert named.count("inverse") > 280 and named.count("U") + named.count("inverted U") < 15


def test_fit_finds_what_made_the_data_and_its_interval_covers():
    x, n, rng = np.linspace(8, 10.5, 6), np.full(6, 200), np.random.default_rng(1)
    t1, s = 0.55 + 0.15 * (x - 8), 1 / (1 + np.exp(-4 * (x - 9.4)))
    tables = [(rng.binomial(n, t1), rng.binomial(n, 0.5 + s / 2)) for _ in range(60)]
    fits = [neqa.fit_curves(x, dict(task1=k1, task2=k2), dict(task1=n, task2=n)) for k1, k2 in tables]
    assert 53 <= sum(low <= 9.4 <= high for *_, (low, high) in fits)
    assert np.mean([high - low for *_, (low, high) in fits]) < 1
    exact = neqa.fit_curves(x, dict(task1=1e6 * t1, task2=1e6 * (0.5 + s / 2)), dict(task1=np.full(6, 1e6),
                                                                                     task2=np.full(6, 1e6)))
    assert abs(exact[2] - 9.4) < 0.02 and np.abs(exact[0](x) - t1).max() < 0.01 and np.abs(exact[1](x) - s).max() < 0.02


# -------------------------------------------------------------------------------------------------- prompts and letters


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind, expected", list(zip(neqa.PROMPTS, (
    "71e29653e3e018a9", "5f416883a7c3c6cb", "aa8ba4aa32e91206", "e822d5ca1f4c9eca", "66da7daeee9856d5"))))
def test_prompts_to_the_byte(kind, expected):
    assert digest(build_prompt(kind, "Birds cannot", ("fly", "bark"))) == expected


def test_task2_prompts_to_the_byte():
    asked = [build_task2("Birds can", "Birds cannot", "fly", swap, hint) for swap in (False, True) for hint in (False,
                                                                                                                True)]
    assert list(map(digest, asked)) == ["77aa581b05451693", "40ba1a6b1570c5ba", "cf2d801f9622ae9e", "6b765d628c9bd5ba"]
    with pytest.raises(ValueError, match="zeroshot"):
        build_prompt("oneshot", "?", ("a", "b"))


def test_letter_margin():
    assert neqa.letter_margin({" A": -1.0, "A": -1.0, "▁B": -1.0}) == pytest.approx(math.log(2))  # its tokens add up
    assert neqa.letter_margin({" A": -1.0, "x": -3.0}) == pytest.approx(3.0)  # B: one nat below the last
    assert neqa.letter_margin({"x": -0.1}) is None and neqa.letter_margin({}) is None


@pytest.mark.parametrize("text, pick", [
    (" B", 1), ("A", 0), ("Answer: A.", 0), ("(B)", 1), ("**B**", 1), ("B. bark", 1), ("A: fly", 0), ("I'd say A", 0),
    ("A penguin can't fly, so B", 1), ("A tricky one! The answer is B.", 1), ("So the answer is **A**.", 0),
    ("First …\n\nFor the plain question, we have A.\n\nSo the answer is **B**.", 1), ("Not A, so B", 1),
    ("So the answer is A. No: so the answer is B.", 1), ("The correct option is \\boxed{A}", 0),
    ("answer is: (A) fly", 0), (" B\nQuestion: Cats can\nA. fly\nB. purr\nAnswer: A", 1), ("Both A and B", None),
    ("A or B?", None), ("", None), ("The answer is not A", None), ("I can't say", None), ("A bird is an animal", None),
    ("The answer is a bird", None),
])
def test_read_letter(text, pick):
    assert read_letter(text) == pick


# ---------------------------------------------------------------------------------------------------------- the negator


# a tuple: contracted, in full; None: left out; "gold": unchanged; else the prefix
@pytest.mark.parametrize("text, expected", [
    ("A candle is", ("A candle isn't", "A candle is not")), ("The waste of plants contains", "prompt"),
    ("An area of forest can", ("An area of forest can't", "An area of forest can not")),
    ("It's made of", ("It's not made of",) * 2),
    ("Where does the Nile begin?", ("Where doesn't the Nile begin?",) * 2),
    ("They're made of", ("They're not made of",) * 2),
    ("Which bird eats fish?", ("Which bird doesn't eat fish?",) * 2),
    ("Who wrote Hamlet?", ("Who didn't write Hamlet?",) * 2),
    ("In which city was he born?", ("In which city wasn't he born?",) * 2), ("Why is the sky blue?", None),
    ("Is the sun hot?", None), ("How many legs does a spider have?", None), ("Who does the voice of Stewie?", None),
    ("May comes right after", ("May doesn't come right after", "May does not come right after")),
    ("Since May the shop is", ("Since May the shop isn't", "Since May the shop is not")),
    ("Annelids do what", "prompt"), ("A plant must have", ("A plant must not have",) * 2),
    ("It should be", ("It shouldn't be", "It should not be")), ("She'll need", ("She'll not need",) * 2),
    ("A dog has", ("A dog doesn't have", "A dog does not have")), ("A dog has eaten", "prompt"),
    ("The watering can leaks", "prompt"), ("A can of soda", "prompt"), ("Some birds can", "prompt"),
    ("Dogs are animals and", "prompt"),
    ("The boat was built of", ("The boat wasn't built of", "The boat was not built of")),
    ("Houses built of", "prompt"),
    ("Wet things that are warm are", ("Wet things that are warm aren't", "Wet things that are warm are not")),
    ("When it rains, plants grow", ("When it rains, plants don't grow", "When it rains, plants do not grow")),
    ("Birds fly because", ("Birds fly not because",) * 2), ("Birds cannot", "gold"), ("Rain isn't", "gold"),
    ("Nobody is", "gold"), ("It is unlikely that", "gold"), ("He ate", ("He didn't eat", "He did not eat")),
    ("J. R. Smith is", ("J. R. Smith isn't", "J. R. Smith is not")),
    ("Drums are made of ___?", ("Drums aren't made of ___?", "Drums are not made of ___?")), (" . ", None),
    ("Birds fly. ___", ("Birds don't fly. ___", "Birds do not fly. ___")),
    ("Choose the incorrect answer. Rain is", "gold"),
])
def test_negator(text, expected):
    negator = Negator()
    for turn in range(2):
        negated, rule, turned = negator(text)
        wanted = {"prompt": neqa.PREFIXES[turn] + text, "gold": text,
                  None: None}.get(expected) or expected and expected[turn]
        assert negated == wanted and turned == (expected not in ("gold", None))
        assert negated is None or Negator()(negated)[0] == negated  # never a second negation


def test_builtin_questions():
    rows = builtin_rows()
    assert len(rows) == len({row["question"] for row in rows}) == 204 and sum(row["answer"] for row in rows) == 102
    negative = r"\bnot\b|n't\b|incorrect|rarely|unable|unusual|unlikely|incapable|never|Nobody|no$|impossible"
    for row in rows:
        right = row["choices"][row["answer"]]
        assert re.search(negative, row["question"]) and not re.search(negative, row["plain"]), row
        assert right.lower() not in row["plain"].lower().split(), row  # 12 rows offered the subject itself
    may = next(row for row in rows if row["plain"] == "May comes right after")  # was "May not comes"
    assert may["question"] in ("May doesn't come right after", "May does not come right after")
    assert rows[0]["plain"] == "The capital of France is" and rows[0]["choices"][1 - rows[0]["answer"]] == "Paris"


# ------------------------------------------------------------------------------------------------- other people's files

ROW = dict(question="Birds can", choices=["fly", "bark"], answer=0)


def write(name, content, encoding="utf-8"):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return name


@pytest.mark.parametrize("entry", [
    ROW, {**ROW, "answer": "A"}, {**ROW, "answer": "fly"}, {**ROW, "answer": "0"}, {**ROW, "metadata": ["odd"]},
    dict(question=dict(stem="Birds can", choices=[dict(text="fly", label="A"), dict(text="bark", label="B")]),
         answerKey="A"),
    dict(question_stem="Birds can", choices=dict(text=["fly", "bark"], label=["1", "2"]), answerKey="1"),
    dict(prompt=build_prompt("zeroshot", "Birds can", ("fly", "bark")), classes="[' A', ' B']", answer_index="0"),
    {**ROW, "choices": "['fly', 'bark']"},
])
def test_own_rows(entry):
    row = neqa.as_row(entry, "here")
    assert (row["question"], row["choices"], row["answer"]) == ("Birds can", ["fly", "bark"], 0)


def test_files_as_people_have_them():
    plain = json.dumps(ROW)
    cells = "question;choices;answer\r\nBirds can;\"['fly', 'bark']\";0\r\n"
    packed = gzip.compress(plain.encode())
    for name, content in dict({"bom.jsonl": "\ufeff" + plain + "\r\n\r\n", "a.csv": "\ufeff" + cells,
                               "b.jsonl.gz": packed,
                               "c.tsv": cells.replace(";", "\t")}).items():
        row, = neqa.read_questions(write(name, content))
        assert (row["question"], row["choices"], row["answer"], row["plain"]) == ("Birds can", ["fly", "bark"], 0, None)


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", json.dumps({**ROW, "choices": ["x", "y", "z"]}), "row 1: a question of NeQA has two different"),
    ("b.jsonl", json.dumps(ROW) + "\n" + json.dumps({**ROW, "answer": 2}),
     "b.jsonl, row 2: the answer 2 must mean one of ['fly', 'bark']"),
    ("c.csv", "question,choices,answer\nHow many?,\"['1', '2']\",1\n", "c.csv, row 1: the answer '1' must mean one of"),
    ("d.jsonl", json.dumps({**ROW, "question": " "}), "row 1: no question"),
    ("e.jsonl", "{", "is not what its name says"), ("f.jsonl", "", "holds no question"),
    ("g.jsonl", "[1, 2]", "row 1: not a question but"), ("h.csv", "a,b\n1,2\n", "choices must"),
    ("i.csv", "question,choices,answer\nm\xe4h,\"['a', 'b']\",0\n".encode("latin-1"), "not UTF-8 (byte 25)"),
    ("j.csv", "prompt,classes,answer_index\nhello,\"[' A', ' B']\",0\n", "does not ask a question with the choices"),
    ("k.jsonl", json.dumps({**ROW, "choices": ["x", "x"]}), "two different choices"),
    ("l.jsonl.gz", b"\x1f\x8b\x08", "l.jsonl.gz"),
])
def test_files_that_are_refused(capsys, name, content, message):
    write(name, content)
    assert message in refused(capsys, "eval", "--model", "m", "--data", name)


@needs_data
def test_the_published_files():
    rows = neqa.read_questions(DATA / "neqa.jsonl")
    assert len(rows) == 1718 and sum(row["answer"] for row in rows) == 859
    assert len(neqa.read_questions(DATA / "sample_not_be_300.csv")) == 300
    twins = neqa.read_questions(DATA)
    prompts = [build_task2(*row["normalized"], row["choices"][1 - row["answer"]], i % 2 == 1) for i,
               row in enumerate(twins)]
    assert digest("".join(prompts)) == "4f1f69ef2cd21897"
    assert digest("".join(build_prompt("zeroshot", row["question"],
                                       row["choices"]) for row in twins)) == "6208b46d716dbc37"


def test_the_four_files_of_the_100(capsys):
    names = [Path(name).name for name in neqa.PUBLIC if "100" in name]
    negated, other = {**ROW, "question": "Birds cannot", "answer": 1}, {**ROW, "answer": 1}
    for name, row in zip(names, (negated, ROW, ROW, negated)):
        write(name, json.dumps(row))
    row, = neqa.read_questions(".")
    assert row["plain"] == "Birds can" and row["normalized"] == ["Birds can", "Birds cannot"] and row["answer"] == 1
    write(names[1], json.dumps(other))
    assert "no twins, row by row" in refused(capsys, "eval", "--model", "m", "--data", ".")


# ------------------------------------------------------------------------------------------------------- the laboratory


def test_models_side_by_side_are_models_alone():
    models = [(0.03, 0), (0.3, 1)]
    together = neqa.train(8, models, 30)
    alone = torch.cat([neqa.train(8, [model], 30) for model in models], 1)
    assert torch.allclose(together, alone, atol=0.02) and together.shape == (3, 2)


def test_the_world():
    table = torch.randint(2, (40, 20))
    sentences, labels = neqa.draw_sentences(table, torch.Generator().manual_seed(2), 0.3, (20_000,))
    subject, attribute, adverb = sentences.T
    assert torch.equal(labels, table[subject, attribute - 40] ^ (adverb == neqa.NOT))
    assert set(adverb.tolist()) == {*range(60, 77)}
    assert abs((adverb == neqa.NOT).double().mean() - 0.3) < 0.02


def test_s_is_measured_on_other_subjects_than_the_score():
    """On the same it would be an identity, and the composition no prediction."""
    true = torch.randint(2, (1, 4, 3))
    said = true[..., None].repeat(1, 1, 1, 3)  # all is known, "not" is not heard …
    said[:, ::2, :, -1] ^= 1  # … but of the even subjects
    assert neqa.measure_reader(said, true).flatten().tolist() == [1, 1, 0]


def test_rare_not_is_ignored_and_common_not_is_learnt():
    """The two ends of the paper's Figure 6 in miniature: with size NeQA falls, or rises."""
    (t1, _), (s, s_often), (neqa_rare, neqa_often) = neqa.train(16, [(0.0003, 0), (0.3, 0)], 350)
    assert t1 > 0.8 and s < 0.3 and neqa_rare < 0.3 and s_often > 0.55 and neqa_often > 0.55


def test_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(neqa.train(8, [(0.3, 0), (0.03, 0)], 3)).all()


def test_default_run_in_small(capsys, monkeypatch):
    monkeypatch.setattr(neqa, "WIDTHS", (4, 6, 8))
    out, found = tool(capsys, "--steps", 4, "--seeds", 2, "--quiet")
    assert "predicted" in out and Path("out/neqa/lab/lab.png").is_file() and np.shape(found["neqa"]) == (3, 2, 3)
    assert np.allclose(found["predicted"], compose(np.array(found["t1"]), np.array(found["s"])))
    assert found["sizes"] == [798, 1484, 2362]


# ------------------------------------------------------------------------------------------------------------- evals


@contextmanager
def server(answer):
    """An OpenAI-compatible server in this process → (its address, the prompts that it got). answer(prompt, body) → the
    text that it writes, or a dict: fields of the choice beside the text."""
    prompts = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            prompts.append(prompt)
            said = answer(prompt, body)
            said = said if isinstance(said, dict) else dict(text=said)
            choice = dict(finish_reason="stop") | {key: value for key, value in said.items() if key != "text"}
            choice |= dict(text=said["text"]) if "prompt" in body else dict(message=dict(content=said["text"]))
            reply = json.dumps(dict(choices=[choice])).encode()
            self.send_response(said.get("status", 200))
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/v1", prompts
    finally:
        made.shutdown()
        made.server_close()


def luck(text, n):
    return int(hashlib.sha256(f"{text}{n}".encode()).hexdigest()[:8], 16) / 2**32


def reader(t1, s, rows, style=str):
    """Knows the plain answer of a share t1 of the questions, turns it on a share s of the negated ones, and sees that
    the two of task 2 differ with (1 + s)/2. style: its letter → what it says."""
    gold = {row["plain"]: row["choices"][1 - row["answer"]] for row in rows}
    plain = {row["question"]: row["plain"] for row in rows} | {text: text for text in gold}

    def answer(prompt, body):
        question, a, b = re.findall(r"Question: (.*)\nA\. (.*)\nB\. (.*)\nAnswer:", prompt)[-1]
        if "Sentence 1" in prompt:
            first = re.search('"(.*)"', prompt)[1]
            return style("AB"[(a == "different") == (luck(first, 2) > (1 + s) / 2)])
        text = plain[question]
        pick = int((a, b)[1] == gold[text]) ^ (luck(text, 0) > t1) ^ (question != text and luck(text, 1) < s)
        return style("AB"[pick])

    return answer


def logprobs(letter):
    ranked = {f" {letter}": -0.2, f" {'AB'[letter == 'A']}": -1.8, " The": -4.0}
    return dict(text=letter, logprobs=dict(top_logprobs=[ranked]))


def chat_logprobs(letter):
    tops = [dict(token=letter, logprob=-0.2), dict(token="AB"[letter == "A"], logprob=-1.8)]
    return dict(text=letter, logprobs=dict(content=[dict(token=letter, logprob=-0.2, top_logprobs=tops)]))


@pytest.mark.parametrize("words, style", [
    (["--api", "completions"], logprobs), (["--score", "logprob"], chat_logprobs), (["--api", "completions",
                                                                                     "--debias"], logprobs),
    ([], lambda letter: f"<think>A or B?</think>**{letter}**. So much for that."),
    (["--prompt", "cot"],
     lambda letter: f"Let's think step-by-step.\n\nFor the plain one, we have A.\n\nSo the answer is **{letter}**."),
])
def test_eval_finds_a_known_reader(capsys, words, style):
    rows = builtin_rows()
    with server(reader(0.8, 0.3, rows, style)) as (url, prompts):
        out, found = tool(capsys, "eval", "--model", "m-7b", "--base_url", url, "--quiet", *words)
        tasks = found["tasks"]
        knows = [luck(row["plain"], 0) <= 0.8 for row in rows]
        turns = [luck(row["plain"], 1) < 0.3 for row in rows]
        assert tasks["task1"]["accuracy"] == np.mean(knows)
        assert tasks["neqa"]["accuracy"] == np.mean(np.equal(knows, turns))
        assert tasks["twins"]["s"] == np.mean(turns) and tasks["twins"]["n"] == 204
        gap = tasks["neqa"]["accuracy"] - compose(np.mean(knows), np.mean(turns))
        assert tasks["twins"]["cov"] == pytest.approx(gap, abs=1e-12)
        assert abs(tasks["task2"]["accuracy"] - 0.65) < 0.12 and "2·Cov" in out
        assert len(prompts) == 204 * 3 * (1 + ("--debias" in words))
        tool(capsys, "eval", "--model", "m-7b", "--base_url", url, "--quiet", *words)
        assert len(prompts) == 204 * 3 * (1 + ("--debias" in words))  # a second run asks nothing
    told = list(csv.DictReader(open(next(Path("out/neqa").glob("eval-m-7b-*")) / "answers.csv", encoding="utf-8")))
    assert len(told) == 612
    assert sum(line["pick"] == line["right"] for line in told if line["task"] == "task1") == sum(knows)


def test_debias_takes_out_a_preference_for_a_letter(capsys):
    known = reader(1, 1, builtin_rows(), lambda letter: -1.0 if letter == "A" else 1.0)  # right by 1, and A by 3

    def answer(prompt, body):
        return dict(text="A", logprobs=dict(top_logprobs=[{" A": -0.1, " B": -3.1 + known(prompt, body)}]))

    with server(answer) as (url, _):
        words = ["eval", "--model", "m", "--base_url", url, "--api", "completions", "--quiet", "--limit", 20]
        plain, both = tool(capsys, *words)[1]["tasks"], tool(capsys, *words, "--debias")[1]["tasks"]
    assert plain["neqa"]["accuracy"] == 0.5 and plain["neqa"]["says_a"] == 1
    assert both["neqa"]["accuracy"] == both["task2"]["accuracy"] == 1 and both["neqa"]["says_a"] == 0.5


@pytest.mark.parametrize("said, why", [
    (dict(text="", finish_reason="length"), "empty"), (dict(text="<think>Hmm, A", finish_reason="length"), "empty"),
    (dict(text="Let us see what a bird", finish_reason="length"), "cut"), (dict(text="Both A and B"), "no letter"),
])
def test_what_cannot_be_read_gets_no_accuracy(capsys, said, why):
    with server(lambda prompt, body: said) as (url, _):
        out, found = tool(capsys, "eval", "--model", "m", "--base_url", url, "--limit", 6, "--quiet")
    assert found["tasks"]["neqa"][why] == 6 and "undefined" in out and math.isnan(found["tasks"]["neqa"]["accuracy"])
    assert "twins" not in found["tasks"]


def test_no_log_probabilities_and_no_server(capsys):
    with server(lambda prompt, body: "A") as (url, _):
        words = ["eval", "--model", "m", "--base_url", url, "--api", "completions", "--limit", 2, "--quiet"]
        assert "--score text" in refused(capsys, *words)
        assert tool(capsys, *words, "--score", "text")[1]["tasks"]["neqa"]["says_a"] == 1
    with server(lambda prompt, body: dict(text="", status=401)) as (url, prompts):
        assert "status 401" in refused(capsys, "eval", "--model", "m", "--base_url", url, "--quiet")
        assert len(prompts) < 3
    assert "127.0.0.1" in refused(capsys, "eval", "--model", "m", "--base_url", url, "--quiet")


def test_failed_calls_are_said_and_asked_again(capsys):
    down = [True]

    def answer(prompt, body):
        return dict(text="A", status=400 if down[0] and "Japan" in prompt else 200)

    with server(answer) as (url, prompts):
        words = ["eval", "--model", "m", "--base_url", url, "--limit", 6, "--quiet", "--out", "o"]
        assert "3 calls failed" in refused(capsys, *words)
        down[0], before = False, len(prompts)
        assert tool(capsys, *words)[1]["tasks"]["neqa"]["n"] == 6 and len(prompts) == before + 3


def test_ones_own_rows_from_end_to_end(capsys):
    """question, choices, answer → negate → eval of three models → fit; one row is negative already."""
    facts = [f"Bird {i} can" for i in range(30)] + ["A bird is rarely"]
    write("own.jsonl", "\n".join(json.dumps(dict(question=text, choices=["fly", "bark", "moo"],
                                                 answer=0)) for text in facts))
    out, found = tool(capsys, "negate", "own.jsonl")
    rows = neqa.read_questions("out/neqa/negate/negated.jsonl")
    assert len(rows) == 31 and sum(row["plain"] is None for row in rows) == 1
    assert sum(row["answer"] for row in rows) in (15, 16)
    # the right one is now wrong
    assert rows[0]["question"] == "Bird 0 can't" and rows[0]["choices"][1 - rows[0]["answer"]] == "fly"
    assert rows[30]["choices"][rows[30]["answer"]] == "fly"  # it keeps its answer
    files = []
    for size, t1, s in ((1e8, 0.6, 0.0), (1e9, 0.9, 0.0), (1e10, 1.0, 1.0)):
        known = reader(t1, s, [row for row in rows if row["plain"]])
        with server(lambda prompt, body, known=known: "A" if "rarely" in prompt else known(prompt, body)) as (url, _):
            out, found = tool(capsys, "eval", "--model", "m", "--base_url", url, "--data",
                              "out/neqa/negate/negated.jsonl",
                              "--size", size, "--quiet", "--out", f"{size}")
        assert "30 of 31 questions have a plain twin" in out and found["tasks"]["task1"]["n"] == 30
        files.append(f"{size}/results.json")
    found = tool(capsys, "fit", *files)[1]
    assert found["shape"] in ("U", "positive") and 9 < found["log10_x0"] < 10
    assert len(found["columns"]["NeQA, composed"]) == 3
    found = json.loads(Path(files[0]).read_text())
    del found["tasks"]["task1"]
    # the shape alone
    assert "log10_x0" not in tool(capsys, "fit", write("no_twins.json", json.dumps(found)), *files[1:])[1]
    sizeless = write("sizeless.json", json.dumps(found | dict(size=None)))
    assert "sizeless.json: not the results.json of an eval with an accuracy and a size" in refused(capsys, "fit",
                                                                                                   sizeless)
    assert "2 sizes: a curve needs three" in refused(capsys, "fit", *files[:2])


# ------------------------------------------------------------------------------------------------------ users' mistakes


@pytest.mark.parametrize("words, message", [
    (["eval"], "required: --model"), (["eval", "--model", "m", "--data", "nowhere"], "nowhere"),
    (["eval", "--model", "m", "--prompt", "cot", "--score", "logprob"], "read as text"),
    (["eval", "--model", "m", "--debias"], "--debias reads log-probabilities"),
    (["--steps", 0], "--steps 0 must be above 0"), (["eval", "--model", "m", "--steps", 3], "unrecognized arguments"),
    (["eval", "--model", "m", "--extra", "[]"], "--extra"),
    (["eval", "--model", "m", "--prompt", "oneshot"], "invalid choice"), (["fit", "gone.json"], "gone.json"),
    (["fit", "own.jsonl"], "own.jsonl: not the results.json of an eval"), (["negate", "gone.jsonl"], "gone.jsonl"),
    (["train"], "invalid choice"), (["--seeds", "x"], "--seeds"),
])
def test_mistakes_end_in_one_line(capsys, words, message):
    write("own.jsonl", json.dumps(ROW))
    assert message in refused(capsys, *words)
