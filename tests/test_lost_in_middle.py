"""lost_in_middle.py: prompts to the byte, metrics, statistics, readers; what servers do; data; a user's mistakes."""

import gzip
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import lost_in_middle as lim

HOUSE = Path(__file__).parent.parent
DATA = Path(os.environ["NANOPAPERS_TEST_DATA"]) / "lost_in_middle" if "NANOPAPERS_TEST_DATA" in os.environ else None
needs_data = pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")


# ---------------------------------------------------------------------------------------------- 1. the mathematics

DOCS = [dict(title="Ada", text="A {brace} stays."), dict(title="Bob (x)", text="Second."), dict(title="", text="é.")]
PAIRS = [("k1", "v1"), ("k2", "v2"), ("k3", "v3")]


def test_prompts_to_the_byte():
    """Against digests of what the authors' templates and functions make of the same documents and pairs."""
    for prompt, digest in (
        (lim.qa_prompt("who is it", DOCS), "7461fcad6334bbfb"),
        (lim.qa_prompt("who is it", DOCS, query_aware=True), "c7f554f53d3bcfe2"),
        (lim.qa_prompt("who is it", DOCS, mention_random_order=True), "927498088089c0b6"),
        (lim.qa_prompt("who is it", []), "6afc07fa1542188d"),
        (lim.kv_prompt("k2", PAIRS), "42dbaecb598d66ae"),
        (lim.kv_prompt("k2", PAIRS, query_aware=True), "92ed4609ef6119ae"),
    ):
        assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == digest, prompt


def test_moving_the_gold():
    for g in range(7):
        placed = lim.place(list("abcdef"), "G", g)
        assert placed.index("G") == g and "".join(placed).replace("G", "") == "abcdef"
    with pytest.raises(ValueError, match="0 to 6"):
        lim.place(list("abcdef"), "G", 7)


@pytest.mark.parametrize("metric, said, answers, expected", [
    ("subspan", "It was The Beatles!", ["beatles"], 1),
    ("subspan", "wilhelm\nconrad röntgen", ["Wilhelm Conrad Röntgen"], 0),  # only the first line counts
    ("subspan", "\n\n Wilhelm Conrad Röntgen\nmore", ["Wilhelm Conrad Röntgen"], 1),
    ("subspan", "in 2018", ["2"], 1),
    ("word", "in 2018", ["2"], 0),
    ("word", "the 2 of them", ["no", "2"], 1),
    ("subspan", "a well–known man", ["well-known"], 0),  # the dash is not ASCII: it stays
    ("subspan", "anything", ["*"], 1),
    ("subspan", "then", ["the n"], 1),  # "the" goes, "n" is left
    ("kv", 'the\n\nvalue is "AB-12"', ["ab-12"], 1),  # no cut at the newline, no case
    ("kv", "ab12", ["ab-12"], 0),
])
def test_metrics(metric, said, answers, expected):
    assert lim.score_answer(metric, said, answers) == expected


def test_normalise_as_the_authors():
    """Their script removes articles by `regex`, for which a combining accent is part of its word."""
    regex, rng = pytest.importorskip("regex"), np.random.default_rng(0)
    pieces = ["a", "an", "the", "A", "\u0301", "é", " ", " ", "–", "_", "’", "b", "2"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces, 6))
        bare = "".join(c for c in text.lower() if c not in lim.string.punctuation)
        assert lim.normalise(text) == " ".join(regex.sub(r"\b(a|an|the)\b", " ", bare).split()), ascii(text)


def test_which_item_was_answered():
    assert [lim.answered_index(text, ["a1", "b2"]) for text in ('it is "B2", not A1', "none")] == [1, -1]
    copied = '{"k1": "v1",\n "k2": "v2"}'  # the data, and no answer; a new paragraph is another matter
    assert lim.answered_index(copied, ["v1", "v2"], ["k2"]) == -1
    assert lim.answered_index('v1\n\nKey: "k2"', ["v1", "v2"], ["k2"]) == 0
    matrix = lim.answer_matrix([(0, 0), (0, -1), (2, 0), (2, 2), (2, 1)], [0, 2], 3)
    assert matrix.tolist() == [[1, 0, 0, 1], [1, 1, 1, 0]]
    assert lim.beyond_habit(matrix, [0, 2]) == pytest.approx([1 / 2 - 1 / 3, 1 / 3])


@pytest.mark.parametrize("n, more, less", [(60, 0.02, 0.02), (100, 0.3, 0.1), (200, 0.01, 0)])
def test_intervals_cover(n, more, less):
    """Also where nearly all differences are 0, and where a percentile bootstrap has no width."""
    x = np.random.default_rng(0).choice([1, -1, 0], (2000, n), p=[more, less, 1 - more - less])
    _, low, high = np.transpose([lim.paired_interval(row) for row in x])
    assert ((low <= more - less) & (more - less <= high)).mean() >= 0.935
    assert lim.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert np.min(lim.print_curve([0], np.ones((40, 1)), {})[2]) >= 0  # matplotlib refuses an error bar of −1e-14


def test_flat_p():
    """All 27 outcomes of three questions, by hand: a spread of 1 is reached when they agree."""
    assert lim.flat_p(np.eye(3)[[0, 0, 0]], draws=8000) == pytest.approx(1 / 9, abs=0.02)
    assert lim.flat_p(np.zeros((5, 3))) == 1


@pytest.mark.parametrize("positions", [5, 10])
def test_flat_models_get_no_shape(positions, monkeypatch):
    """The best of ten noisy positions always beats the worst: McNemar of the two, picked after looking, called 46 % of
    flat models uneven."""
    rng, named, flat_p = np.random.default_rng(positions), 0, lim.flat_p
    monkeypatch.setattr(lim, "flat_p", lambda correct, seed: flat_p(correct, seed, draws=99))
    for _ in range(150):
        found = lim.summarise((rng.random((100, positions)) < 0.6).astype(float))
        named += found["shape"] != "undecided"
    assert named <= 15  # of 150; 7.5 are expected


@pytest.mark.parametrize("accuracy, n, expected", [
    ((0.9, 0.5, 0.5, 0.9), 500, "U"), ((0.9, 0.5, 0.5, 0.5), 500, "primacy"), ((0.5, 0.5, 0.9), 500, "recency"),
    ((0.5, 0.9, 0.9, 0.5), 500, "uneven"), ((1, 1, 1), 4, "undecided"), ((0.6, 0.3, 0.5), 10, "undecided"),
])
def test_shapes_have_a_rule(accuracy, n, expected):
    rng = np.random.default_rng(0)
    correct = np.column_stack([rng.permutation(np.arange(n) < round(n * a)) for a in accuracy]).astype(float)
    found = lim.summarise(correct)
    assert found["shape"] == expected and found["primacy"][0] == pytest.approx(accuracy[0] - np.mean(accuracy[1:-1]))


@pytest.mark.parametrize("pos, window", [("learned", None), ("rope", 5), ("alibi", None), ("none", 5)])
def test_many_queries_equal_one_at_a_time(pos, window):
    torch.manual_seed(0)
    model = lim.PairReader(2, pos, True, window)
    keys, values = lim.contexts(3, 6, torch.Generator().manual_seed(0))
    together = model(keys, values, keys[:, [4, 0, 5]])
    one_by_one = torch.cat([model(keys, values, keys[:, i : i + 1]) for i in (4, 0, 5)], 1)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- 2. the claims


def test_data_bend_the_curve_and_even_data_do_not():
    uniform = lim.train_reader(3, (100,), dict(lim.BOUND, pos="learned"))[100]
    ends = lim.train_reader(3, (100,), dict(lim.BOUND, pos="learned"), ends=True)[100]
    assert uniform.min() >= 0.95 and min(ends[0], ends[-1]) - ends[1:-1].min() > 0.8


def test_a_u_that_nobody_put_in():
    found = lim.train_reader(3, (150,), lim.LAB["uniform data, ALiBi"]["reader"], n=8, test=8)[150]
    assert min(found[0], found[-1]) - found[1:-1].min() > 0.1


def test_a_window_cuts():
    found = lim.train_reader(3, (110,), dict(lim.BOUND, pos="learned", window=17))[110]
    assert found[:8].max() < 0.1 and found[8:].min() >= 0.95


def test_a_step_in_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        for reader in (dict(layers=1, smear=True, pos="rope"), dict(lim.FAR, query_first=True)):
            assert np.isfinite(lim.train_reader(0, (2,), reader, n=4, test=4, one=True)[2]).all()


# ------------------------------------------------------------------------------------------------------ 3. servers


@contextmanager
def server(reply):
    """An OpenAI-compatible server in this process → (its base_url, the list of bodies that it was sent). reply(prompt,
    n-th request) gives a text, a whole JSON body, bytes, or (status, headers, one of these)."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            with lock:
                seen.append(dict(body, prompt=prompt, key=self.headers.get("Authorization")))
                said = reply(prompt, len(seen) - 1)
            status, headers, said = said if isinstance(said, tuple) else (200, {}, said)
            said = completion(said, prompt, "messages" in body) if isinstance(said, str) else said
            said = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in (dict([("Content-Length", len(said))]) | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(said)
            self.close_connection = "Content-Length" in headers  # more was promised

        def log_message(self, *args):
            """Say nothing."""

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=here.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{here.server_port}/v1", seen
    finally:
        here.shutdown()
        here.server_close()


def completion(text, prompt, chat=True, finish="stop", read=None):
    said = dict(message=dict(content=text)) if chat else dict(text=text)
    return dict(choices=[dict(said, finish_reason=finish)],
                usage=dict(prompt_tokens=10 + len(prompt) // 4 if read is None else read))


def value_of(prompt):
    pairs = dict(re.findall(r'"([^"]+)": "([^"]+)"', prompt))
    return pairs.get((re.findall(r'Key: "([^"]+)"\nCorr', prompt) or [""])[0], "none")


@pytest.fixture
def tool(capsys, tmp_path, monkeypatch):
    """Runs the tool in this process, in an empty folder → (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def call(*words):
        code = 0
        try:
            lim.run(lim.parse_args([*map(str, words), "--quiet", *["--no_plot"] * (words[0] != "lab")]))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def asking(url, *words):
    return ["run", "--model", "m", "--base_url", url, "--items", 5, "--limit", 8, "--out", "o", *words]


def results(folder="o"):
    return json.loads(Path(folder, "results.json").read_text())


def test_a_known_curve(tool):
    """Right at the ends, else the first value: accuracy, habit, order of the calls, nothing asked twice."""
    def reply(prompt, n):
        pairs, right = re.findall(r'": "([^"]+)"', prompt), value_of(prompt)
        return right if pairs.index(right) in (0, 4) else pairs[0]

    with server(reply) as (url, seen):
        code, out, err = tool(*asking(url, "--concurrency", 1))
        assert code == 0 and not err and "shape: U" in out and len(seen) == 40
        assert re.findall(r"^\d +(\S+).*?\] +(\S+)", out, re.M) == [
            ("100.0", "25.0"), ("0.0", "0.0"), ("0.0", "0.0"), ("0.0", "0.0"), ("100.0", "100.0")]
        for _, group in itertools.groupby([body["prompt"] for body in seen[1:]], value_of):
            ids = [re.findall(r'": "([^"]+)"', prompt).index(value_of(prompt)) for prompt in group]
            assert ids == sorted(ids, reverse=True) and len(ids) >= 4  # last to first: each begins as the one before
        assert tool(*asking(url))[0] == 0 and len(seen) == 40
        words = ("--base_url", url, "--items", "5", "--limit", "3", "--quiet", "--api", "completions")
        lim.run(lim.parse_args(["run", "--model", "x/y", *words]))  # with its figure
        assert Path("out/lost_in_middle/positions-kv-x_y/curve.png").stat().st_size > 10_000


LONG = asking("", "--items", 60, "--limit", 2)[5:]


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_prompt_cut_in_silence(tool, cut):
    """Catches a server that drops a tenth of the longest prompt, and does not keep what it answered."""
    def reply(prompt, n):
        return completion(value_of(prompt), prompt, read=min(10 + len(prompt) // 4, int(1264 * cut)))

    with server(reply) as (url, _):
        code, out, err = tool("run", "--model", "m", "--base_url", url, *LONG)
        assert code == 2 and "said nothing: raise its window" in err and err.count("\n") == 1 and not out
        assert not Path("o/answers.jsonl").read_text()


def test_a_window_that_is_wide_enough(tool):
    with server(lambda prompt, n: value_of(prompt)) as (url, seen):
        for _ in range(2):
            assert tool("run", "--model", "m", "--base_url", url, *LONG)[0] == 0 and len(seen) == 13
    with server(lambda prompt, n: completion(value_of(prompt), prompt) | dict(usage=None)) as (url, _):
        assert "cannot be seen" in tool("run", "--model", "m", "--base_url", url, *LONG)[2]


@pytest.mark.parametrize("reply, message", [  # each fails at the first call: one line, within seconds
    (lambda p, n: b"<html>log in</html>", "<html>log in"),
    (lambda p, n: (401, {}, dict(error="wrong key sk-secret")), "wrong key [key]"),
    (lambda p, n: (429, {"Retry-After": 86400}, dict(error="insufficient_quota")), "insufficient_quota"),
    (lambda p, n: (429, {"Retry-After": "inf"}, b"x"), "Retry-After"),
    (lambda p, n: (400, {"Content-Length": 999}, b'{"err'), "IncompleteRead"),
    (lambda p, n: b"null", "TypeError"),
    (lambda p, n: (400, {}, dict(error="temperature and top_p cannot both be specified")), "top_p"),
])
def test_a_first_call_that_fails(tool, monkeypatch, reply, message):
    session = lim.session
    assert session(1, 2, 5).get_adapter("http://x").max_retries.retry_after_max == 5  # a day is not slept
    monkeypatch.setattr(lim, "session", lambda n, tries, longest: session(n, tries, 0.1))  # seconds, not minutes
    with server(reply) as (url, seen):
        code, out, err = tool(*asking(url))
        assert code == 2 and message in err and err.count("\n") == 1 and not out and "sk-secret" not in err, err
        assert len(seen) <= 3 and "sk-secret" not in Path("o/answers.jsonl").read_text() and "top_p" not in seen[0]


@pytest.mark.parametrize("text, finish, accuracy", [
    ([dict(type="thinking", thinking=[]), dict(type="text", text="RIGHT")], "stop", 1),
    ("<think>first: FIRST</think>\nRIGHT", "stop", 1),
    (None, "length", None),  # a model that thought until its tokens were spent
    ("<think>is it FIRST", "length", None),
    ("the value of this key in", "length", None),
    ("no idea\nand", "length", 0),  # its first line is whole
])
def test_thinking_and_empty_answers(tool, text, finish, accuracy):
    """An answer that cannot be read is no wrong answer: no figure comes of it."""
    def reply(prompt, n):
        first = re.search(r'": "([^"]+)"', prompt)[1]
        said = json.loads(json.dumps(text).replace("RIGHT", value_of(prompt)).replace("FIRST", first))
        return completion(said, prompt, finish=finish)

    with server(reply) as (url, seen):
        code, out, err = tool(*asking(url))
        assert np.mean(results()["correct"]) == accuracy if accuracy is not None else "40 empty or cut" in out
        assert code == 0 if accuracy is not None else "no curve can be read" in err
        assert tool(*asking(url))[0] == code and len(seen) == 40  # a null in the cache is no trouble


OVERFLOWS = ["Please reduce the length of the messages or completion.", "Current length is 8913 while limit is 8192",
             "`inputs` tokens + `max_new_tokens` must be <= 4096", "Input is too long for requested model.",
             "the request exceeds the available context size", "This model's maximum context length is 10 tokens",
             "The input token count (9) exceeds the maximum number of tokens allowed (8)"]


def test_overflow_leaves_the_example_out_everywhere(tool):
    """In every vendor's words; and it converges."""
    assert all(map(lim.OVERFLOW.search, OVERFLOWS)) and not lim.OVERFLOW.search("Rate limit reached, try again")
    keys = [row["key"] for row in lim.make_pairs(8, 5, 0)]

    def reply(prompt, n):
        long = keys[2] in prompt and re.findall(r'"([^"]+)": "', prompt).index(keys[2]) == 3
        return (400, {}, dict(error=dict(message=OVERFLOWS[1]))) if long else value_of(prompt)

    with server(reply) as (url, seen):
        assert "1 of 8 examples are left out" in tool(*asking(url))[2] and np.shape(results()["correct"]) == (7, 5)
        assert tool(*asking(url))[0] == 0 and len(seen) == 40


def test_failures_are_asked_again_alone(tool):
    down, key = True, list(lim.make_pairs(8, 5, 0))[4]["key"]

    def reply(prompt, n):
        return (403, {}, b"not this") if down and f'Key: "{key}"' in prompt else value_of(prompt)

    with server(reply) as (url, seen):
        assert "not this" in tool(*asking(url))[2] and len(results()["correct"]) == 7
        down = False
        assert tool(*asking(url))[0] == 0 and len(seen) == 45 and len(results()["correct"]) == 8
    with server(lambda p, n: value_of(p) if n < 3 else (403, {}, b"gone")) as (url, seen):
        assert "ten in a row" in tool(*asking(url, "--limit", 300, "--out", "p"))[2] and len(seen) < 150


def test_the_key_stays_with_its_host(tool):
    with server(lambda p, n: value_of(p)) as (there, got):
        to = {"Location": there.replace("127.0.0.1", "localhost") + "/chat/completions"}
        with server(lambda p, n: (307, to, b"")) as (url, seen):
            assert tool(*asking(url, "--limit", 1, "--extra", '{"temperature": null, "seed": 1}'))[0] == 0
    assert seen[0]["key"] == "Bearer sk-secret" and got[0]["key"] is None
    assert "temperature" not in got[0] and got[0]["seed"] == 1


def test_kill_and_resume_asks_nothing_twice(tool, tmp_path):
    process, reached = None, threading.Event()

    def reply(prompt, n):
        if n == 15:
            process.send_signal(signal.SIGKILL)
            reached.set()
        return value_of(prompt)

    with server(reply) as (url, seen):
        command = [sys.executable, HOUSE / "lost_in_middle.py", *map(str, asking(url, "--concurrency", 1))]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        process.wait()
        assert reached.is_set() and len(seen) == 16
        with open("o/answers.jsonl", "a") as file:
            file.write('\n{"key": "to')  # a torn line
        for _ in range(2):
            assert tool(*asking(url))[0] == 0 and len(seen) == 41  # the one that was under way, again
        assert len({body["prompt"] for body in seen}) == 40


def test_dry_run_asks_nobody(tool):
    code, out, err = tool(*asking("http://127.0.0.1:9/v1", "--dry_run", "--price", 0, 1e6))
    assert code == 0 and "40 calls" in out and "$4,000.00" in out and out.startswith("Extract the value")


# --------------------------------------------------------------------------------------------------------- 4. data


def write(path, *rows, before=""):
    Path(path).write_text(before + "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


OWN = [dict(question=f"who is {x}", answer=x, documents=[f"Here {x} lives.", "A", dict(title="t", text="B"), "C"])
       for x in "PQR"]


QA_WORDS = ("--setting", "qa", "--items", 3, "--data", "d.jsonl")


def own(*words):
    return lim.parse_args(["run", "--model", "m", "--setting", "qa", "--data", "d.jsonl", *map(str, words)])


@pytest.mark.parametrize("before, rows", [("", OWN), ("\ufeff", OWN), ("", [json.dumps(OWN)])])
def test_own_files(tool, before, rows):
    write("d.jsonl", *rows, before=before)
    assert lim.load_qa(own(), 3)[2]["others"] == [dict(title="", text="A"), dict(title="t", text="B")]
    with server(lambda p, n: re.search("Here (.)", p)[1] if "Here" in p else "?") as (url, seen):
        code, out, _ = tool("run", "--model", "m", "--base_url", url, *QA_WORDS, "--controls", "--out", "o")
        assert "closed-book: 0.0 %" in out and "oracle: 100.0 %" in out and len(seen) == 15


def test_answers_are_words_not_letters(tool):
    """Ed is not in "played"; a file without hasanswer makes no distractor of an answer; that field wins."""
    docs = [dict(title="t", text=text) for text in ("He played.", "It was Ed.", "Red.")]
    row = dict(question="who", answers=["Ed"], ctxs=docs)
    write("d.jsonl", row, dict(row, ctxs=[docs[0], dict(docs[1], isgold=True), dict(docs[1], title="u"), docs[2]]),
          dict(row, ctxs=[dict(doc, hasanswer="played" in doc["text"]) for doc in docs]))
    assert [row["gold"]["text"] for row in lim.load_qa(own(), 3)] == ["It was Ed.", "It was Ed.", "He played."]
    assert lim.load_qa(own(), 3)[1]["others"] == [docs[0], docs[2]]


@needs_data
def test_published_files():
    oracle = ("--data", DATA / "nq-open-oracle.jsonl.gz")
    rows = lim.load_questions(own(*oracle), None)
    assert len(rows) == 2655 and all(
        lim.score_answer("subspan", row["docs"][0]["text"].replace("\n", " "), row["answers"]) for row in rows)
    made = lim.load_qa(own(*oracle, "--distractors", "random"), 20)  # of all 2,655 questions
    assert len(made) == 2655 and len(made[0]["others"]) == 19
    for k, digest in ((75, "bdc6603cf2337906"), (140, "31db277453ecc729")):
        pairs = lim.load_kv(own("--data", DATA / f"kv-retrieval-{k}_keys.jsonl.gz"), k)
        prompts = [lim.kv_prompt(row["query"], lim.place(row["others"], row["gold"], k // 2)) for row in pairs]
        assert hashlib.sha256("".join(prompts).encode()).hexdigest()[:16] == digest


def test_made_data():
    assert list(lim.make_pairs(3, 20, 7))[:2] == list(lim.make_pairs(2, 20, 7)) != list(lim.make_pairs(2, 20, 8))
    for row in [*lim.make_pairs(2, 20, 0), *lim.make_pairs(2, 4500, 0, "short")]:
        names = [name.strip("k") for record in row["ordered_kv_records"] for name in record]
        assert len({*names}) == len(names) and row["key"].strip("k") in names[::2]
    for row in lim.builtin_facts():
        assert [row["answers"][0] in doc["text"] for doc in row["docs"]] == row["holds"] and sum(row["holds"]) == 1
    mixed = lim.load_qa(own("--data", "builtin", "--order", "random"), 8)
    assert mixed[:5] == lim.load_qa(own("--data", "builtin", "--order", "random", "--limit", 5), 8)


def test_report_pairs_by_content(tool):
    """Another seed: not the same questions, whatever their line."""
    with server(lambda p, n: value_of(p) if n % 3 else "?") as (url, _):
        for name, words in dict(a=(), b=("--limit", 5), seed=("--seed", 7)).items():
            tool(*asking(url), *words, "--out", name)
    a, b = (dict(zip(r["examples"], r["correct"])) for r in map(results, "ab"))
    gain = np.mean([np.subtract(b[key], a[key]) for key in b], 0)
    out = tool("report", "a", "b", "--out", "r")[1]
    assert out.startswith("5 examples") and re.search(rf"\n4 .*\]  +{100 * gain[4]:.1f} \[", out)
    assert "did not ask the same examples" in tool("report", "a", "seed", "--out", "r")[2]


def test_odqa(tool):
    with server(lambda p, n: re.findall(r"founded by (\w+)", p)[-1]) as (url, _):
        assert tool("odqa", "--model", "m", "--base_url", url, "--k", 1, 5, 20, "--out", "o")[0] == 0
    recall, correct = results()["recall"], np.mean(results()["correct"], 0)
    assert correct[0] == recall[0] < recall[1] < recall[2] == 1 and correct[2] < 0.2


def test_lab_in_small(tool):
    code, out, _ = tool("lab", "--steps", 2, "--seeds", 1, "--out", "o")
    assert code == 0 and len(out.splitlines()) == 1 + len(lim.LAB) + 2 and out.splitlines()[-1].endswith("results.json")


KV = dict(ordered_kv_records=[["k", "v"], ["l", "w"], ["m", "x"]], key="k")


@pytest.mark.parametrize("rows, words, message", [
    ([dict(OWN[0], question=" ")], QA_WORDS, "d.jsonl:1 needs question"),
    ([OWN[0], "", dict(OWN[1], answer=None)], QA_WORDS, "d.jsonl:3 needs question"),
    ([dict(OWN[0], documents=["P", "P.", "C"])], QA_WORDS, "has 2 gold documents"),
    ([OWN[0], "3"], QA_WORDS, "d.jsonl:2 is no JSON object"),
    ([], QA_WORDS, "has no rows"),
    ([dict(KV, key="z")], QA_WORDS[2:], "d.jsonl:1 needs ordered_kv_records"),
    ([dict(KV, ordered_kv_records=KV["ordered_kv_records"] * 2)], QA_WORDS[2:], "is there twice"),
    ([], ("--data", "torn.gz"), "torn.gz:0 is no JSON object"),
    ([], ("--data", "latin.jsonl"), "latin.jsonl:0 is no JSON object"),
    ([], ("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ([], ("--positions", 0, 2, 75), "--positions: at least three of 0 to 74"),
    ([], ("--controls",), "pairs have no --controls"),
    ([], ("--compare_paper", "gpt-9"), "--compare_paper gpt-9: the paper has no such curve"),
    ([], ("--extra", "3"), "--extra"),
    ([], ("--base_url", "localhost:1"), "localhost:1"),
    ([], ("--k", "3"), "--k"),
])
def test_mistakes_end_in_one_line(tool, rows, words, message):
    write("d.jsonl", *rows)
    Path("torn.gz").write_bytes(gzip.compress(b'{"key": "k"}\n' * 50)[:30])
    Path("latin.jsonl").write_bytes(b'{"key": "\xe9"}')
    code, out, err = tool("run", "--model", "m", "--base_url", "http://127.0.0.1:9/v1", *words)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("words", ["--seeds 0", "--steps -1", "lab --steps 0"])
def test_a_laboratory_of_nothing(words, capsys):
    with pytest.raises(SystemExit) as stop:
        lim.parse_args(words.split())
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {words.removeprefix('lab ')} must be above 0\n"
