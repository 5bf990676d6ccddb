"""lost_in_middle.py: prompts to the byte, metrics, statistics and readers by other routes; the laboratory's claims in small; the tool."""

import gzip
import http.server
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

import lost_in_middle as lim

HOUSE = Path(__file__).parent.parent
DATA = Path(os.environ["NANOPAPERS_TEST_DATA"]) / "lost_in_middle" if "NANOPAPERS_TEST_DATA" in os.environ else None
needs_data = pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    lim.start_lab_worker()
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------- 1. the mathematics

DOCS = [dict(title="Ada", text="A {brace} stays."), dict(title="Bob (x)", text="Second."), dict(title="Cy", text="Third, é.")]
PAIRS = [("k1", "v1"), ("k2", "v2"), ("k3", "v3")]
LISTED = "Document [1](Title: Ada) A {brace} stays.\nDocument [2](Title: Bob (x)) Second.\nDocument [3](Title: Cy) Third, é."
WRITE = ("Write a high-quality answer for the given question using only the provided search results "
         "(some of which might be irrelevant).")
EXTRACT = "Extract the value corresponding to the specified key in the JSON object below."


@pytest.mark.parametrize("got, expected", [
    (lim.qa_prompt("who is it", DOCS), f"{WRITE}\n\n{LISTED}\n\nQuestion: who is it\nAnswer:"),
    (lim.qa_prompt("who is it", DOCS, query_aware=True), f"{WRITE}\n\nQuestion: who is it\n\n{LISTED}\n\nQuestion: who is it\nAnswer:"),
    (lim.qa_prompt("who is it", DOCS, mention_random_order=True),
     f"{WRITE} The search results are ordered randomly.\n\n{LISTED}\n\nQuestion: who is it\nAnswer:"),
    (lim.qa_prompt("who is it", []), "Question: who is it\nAnswer:"),
    (lim.qa_prompt("who is it", DOCS[1:2]), f"{WRITE}\n\nDocument [1](Title: Bob (x)) Second.\n\nQuestion: who is it\nAnswer:"),
    (lim.kv_prompt("k2", PAIRS), f'{EXTRACT}\n\nJSON data:\n{{"k1": "v1",\n "k2": "v2",\n "k3": "v3"}}\n\nKey: "k2"\nCorresponding value:'),
    (lim.kv_prompt("k2", PAIRS, query_aware=True),
     f'{EXTRACT}\n\nKey: "k2"\n\nJSON data:\n{{"k1": "v1",\n "k2": "v2",\n "k3": "v3"}}\n\nKey: "k2"\nCorresponding value:'),
])
def test_prompts_to_the_byte(got, expected):
    assert got.encode() == expected.encode()


def test_prompt_properties():
    with pytest.raises(ValueError, match="query-aware"):
        lim.qa_prompt("q", DOCS, query_aware=True, mention_random_order=True)
    row = lim.make_pairs(1, 30, 0)[0]
    prompt = lim.kv_prompt(row["key"], row["ordered_kv_records"], query_aware=True)
    inside = prompt.split("JSON data:\n")[1].split("\n\nKey:")[0]
    assert list(json.loads(inside).items()) == [tuple(r) for r in row["ordered_kv_records"]] and prompt.count(f'Key: "{row["key"]}"') == 2


def test_moving_the_gold():
    others = list("abcdef")
    for g in range(7):
        placed = lim.place(others, "G", g)
        assert placed[g] == "G" and [x for x in placed if x != "G"] == others and len(placed) == 7
    for g in (-1, 7):
        with pytest.raises(ValueError, match="0 to 6"):
            lim.place(others, "G", g)


@pytest.mark.parametrize("metric, said, answers, expected", [
    ("subspan", "It was The Beatles!", ["beatles"], 1),
    ("subspan", "wilhelm\nconrad röntgen", ["Wilhelm Conrad Röntgen"], 0),  # only the first line counts
    ("subspan", "\n\n Wilhelm Conrad Röntgen\nmore", ["Wilhelm Conrad Röntgen"], 1),
    ("subspan", "in 2018", ["2"], 1),
    ("subspan", "U.S.A.", ["usa"], 1),
    ("subspan", "a well–known man", ["well-known"], 0),  # the dash is not ASCII: it stays
    ("subspan", "anything", ["*"], 1),
    ("subspan", "yes", ["no", "yes"], 1),
    ("subspan", "then", ["the n"], 1),  # "the" goes, "n" is left
    ("subspan", "", ["x"], 0),
    ("word_subspan", "in 2018", ["2"], 0),
    ("word_subspan", "the 2 of them", ["2"], 1),
    ("word_subspan", "two", ["two"], 1),
    ("em", "The Beatles!", ["beatles"], 1),
    ("em", "the Beatles sang", ["beatles"], 0),
    ("f1", "red green blue", ["red green"], 0.8),
    ("f1", "red red", ["red"], 2 / 3),
    ("f1", "nothing", ["red", "blue"], 0),
    ("f1", "red", ["blue", "red"], 1),
    ("kv", 'the\n\nvalue is "AB-12"', ["ab-12"], 1),  # no cut at the newline, no case
    ("kv", "ab12", ["ab-12"], 0),
    ("kv_first", ' "1234", "k2": "9"', ["1234"], 1),
    ("kv_first", ' "9", "1234"', ["1234"], 0),
    ("kv_first", "see 0f8fad5b-d9cb-469f-a165-70867728950E.", ["0f8fad5b-d9cb-469f-a165-70867728950e"], 1),
    ("kv_first", "7c9e6679-7425-40de-944b-e07fc1f90ae7 0f8fad5b-d9cb-469f-a165-70867728950e", ["0f8fad5b-d9cb-469f-a165-70867728950e"], 0),
    ("kv_first", "", ["1234"], 0),
])
def test_metrics(metric, said, answers, expected):
    assert lim.score_answer(metric, said, answers) == pytest.approx(expected)


def test_metric_properties():
    assert lim.normalise("An") == "" and lim.normalise(" The  cat, a  DOG’s ") == "cat dog’s"
    assert lim.score_answer("subspan", "\nParis", ["paris"], lstrip=False) == 0
    rng = np.random.default_rng(0)
    words = ["red", "Blue", "the", "2018", "20", "a", "é"]
    for _ in range(200):
        said, gold = (" ".join(rng.choice(words, 3)) for _ in range(2))
        em, word, sub = (lim.score_answer(m, said, [gold]) for m in ("em", "word_subspan", "subspan"))
        assert em <= word <= sub and (em == 0 or lim.score_answer("f1", said, [gold]) == 1)
        for metric in ("subspan", "word_subspan", "em", "f1"):
            assert lim.score_answer(metric, f"The {said.upper()}!", [gold]) == lim.score_answer(metric, said, [gold])


def test_which_item_was_answered():
    assert lim.answered_index('it is "B2", not A1', ["a1", "b2"]) == 1 and lim.answered_index("none", ["a1"]) == -1
    assert lim.answered_index("abc", ["ab", "abc"]) == 1  # at the same place the longer one
    matrix = lim.answer_matrix([0, 0, 2, 2, 2], [0, -1, 0, 2, 1], [0, 2], 3)
    assert matrix.tolist() == [[1, 0, 0, 1], [1, 1, 1, 0]]
    assert lim.corrected(matrix, [0, 2]) == pytest.approx([1 / 2 - 1 / 3, 1 / 3 - 0])
    always_first = lim.answer_matrix([0, 1, 2] * 4, [0] * 12, [0, 1, 2], 3)
    perfect = lim.answer_matrix([0, 1, 2] * 4, [0, 1, 2] * 4, [0, 1, 2], 3)
    assert lim.corrected(always_first, [0, 1, 2]) == [0, 0, 0] and lim.corrected(perfect, [0, 1, 2]) == [1, 1, 1]
    assert lim.corrected(perfect[:1], [0]) == [None]


def test_wilson():
    assert lim.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5) and lim.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)


def test_paired_bootstrap():
    rng = np.random.default_rng(1)
    correct = (rng.random((400, 3)) < [0.9, 0.5, 0.7]).astype(float)
    correct[:, 2] = correct[:, 0]  # the same questions right: paired, their difference has no width
    assert lim.paired_bootstrap(correct, lambda m: m[..., 0] - m[..., 2]) == (0, 0, 0)
    value, low, high = lim.paired_bootstrap(correct, lambda m: m[..., 0] - m[..., 1], draws=4000)
    difference = correct[:, 0] - correct[:, 1]
    half = 1.96 * difference.std() / 20  # the normal interval of a mean of 400
    assert value == pytest.approx(difference.mean()) and (low, high) == pytest.approx((value - half, value + half), abs=0.006)


def test_mcnemar():
    a, b = np.array([1] * 10 + [0] * 2 + [1] * 5), np.array([0] * 10 + [1] * 2 + [1] * 5)
    assert lim.mcnemar(a, b) == pytest.approx(2 * (1 + 12 + 66) / 2**12) == lim.mcnemar(b, a)
    assert lim.mcnemar(a, a) == 1
    for n_first, n_second in itertools.product(range(4), range(4)):  # every assignment of the discordant pairs, by hand
        signs = [sum(s) for s in itertools.product((0, 1), repeat=n_first + n_second)]
        far = [s for s in signs if abs(2 * s - n_first - n_second) >= abs(n_first - n_second)]
        a = np.array([1] * n_first + [0] * n_second)
        assert lim.mcnemar(a, 1 - a) == pytest.approx(len(far) / len(signs))


def test_flat_p():
    correct = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1]], float)
    orders = [list(itertools.permutations(row)) for row in correct]
    spreads = [np.ptp(np.mean(rows, 0)) for rows in itertools.product(*orders)]
    exact = np.mean(np.array(spreads) >= np.ptp(correct.mean(0)) - 1e-9)
    assert lim.flat_p(correct, draws=8000) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 8000))
    rng = np.random.default_rng(3)
    found = [lim.flat_p((rng.random((40, 4)) < 0.6).astype(float), draws=99) for _ in range(200)]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)  # of noise, no more is called uneven
    assert lim.flat_p(np.zeros((5, 3))) == 1


@pytest.mark.parametrize("accuracy, expected", [
    ((0.9, 0.5, 0.5, 0.9), "U"), ((0.9, 0.5, 0.5, 0.5), "primacy"), ((0.5, 0.5, 0.5, 0.9), "recency"), ((0.5, 0.9, 0.9, 0.5), "uneven"),
    ((0.7, 0.7, 0.7, 0.7), "flat"), ((0.99, 0.96, 0.95, 0.99), "flat"), ((0.9, 0.4), "primacy"), ((0.4, 0.9), "recency"),
    ((0.8, 0.5, 0.8), "U"),
])
def test_shapes_have_a_rule(accuracy, expected):
    """The same number right at a position as its accuracy says, in an order of its own."""
    rng = np.random.default_rng(0)
    correct = np.column_stack([rng.permutation(np.arange(500) < round(500 * a)) for a in accuracy]).astype(float)
    assert lim.curve_shape(correct) == expected


def test_few_questions_decide_nothing():
    correct = np.zeros((10, 3))
    correct[:6, 0] = correct[2:5, 1] = correct[4:9, 2] = 1
    assert lim.curve_shape(correct) == "undecided" and lim.flat_p(correct) > 0.05


def test_summary():
    columns = [(np.arange(200) < n).astype(float) for n in (180, 100, 120, 160)]
    s = lim.summarise(np.column_stack(columns), [0, 4, 9, 14])
    assert (s["best_position"], s["worst_position"], s["best"], s["worst"]) == (0, 4, 0.9, 0.5)
    assert (s["spread"][0], s["primacy"][0], s["recency"][0]) == pytest.approx((0.4, 0.4, 0.3)) and s["shape"] == "U"
    assert s["mcnemar_p"] == pytest.approx(2 / 2**80)
    assert all(s[name][1] <= s[name][0] <= s[name][2] for name in ("spread", "primacy", "recency"))


READERS = [dict(pos="learned"), dict(pos="rope"), dict(pos="alibi", alibi=4), dict(pos="none"), dict(window=5), dict(window=5, sink=True),
           dict(smear=True, pos="rope", window=4)]


@pytest.mark.parametrize("settings", READERS)
def test_many_queries_equal_one_at_a_time(settings):
    torch.manual_seed(0)
    model = lim.PairReader(6, **settings)
    keys, values = lim.draw_contexts(3, 6, torch.Generator().manual_seed(0))
    together = model(keys, values, keys[:, [4, 0, 5]])
    one_by_one = torch.cat([model(keys, values, keys[:, i : i + 1]) for i in (4, 0, 5)], 1)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [*READERS, dict(mask="bidirectional"), dict(mask="bidirectional", window=3),
                                      dict(query_aware=True, window=3)])
def test_who_sees_whom(settings):
    """attention_bias against loops."""
    model, n_query = lim.PairReader(4, **settings), 1 if {"mask", "query_aware"} & settings.keys() else 3
    position = torch.cat([torch.arange(8), torch.full((n_query,), 8)])
    bias = model.attention_bias(position, n_query)
    heads, n = bias.shape[0], len(position)
    for h, i, j in itertools.product(range(heads), range(n), range(n)):
        distance = int(position[i] - position[j])
        see = "mask" in settings or i == j or (distance > 0 and j < 8)
        if "window" in settings and not ("sink" in settings and j == 0):
            see = see and abs(distance) < settings["window"]
        slope = 2 ** (-settings["alibi"] * (h + 1) / 4) if settings.get("pos") == "alibi" else 0
        assert bias[h, i, j].item() == pytest.approx(-slope * distance if see else -math.inf)
    assert heads == (4 if settings.get("pos") == "alibi" else 1)


def test_readers_that_show_the_query_take_one():
    keys, values = lim.draw_contexts(2, 5, torch.Generator().manual_seed(0))
    for settings in (dict(query_aware=True), dict(mask="bidirectional")):
        model = lim.PairReader(5, **settings)
        assert model(keys, values, keys[:, :1]).shape == (2, 1, 32)
        with pytest.raises(ValueError, match="only one"):
            model(keys, values, keys)


def test_no_positions_means_no_order():
    """With keys bound to values and no positions, one layer reads a set of pairs: their order cannot matter."""
    torch.manual_seed(1)
    model = lim.PairReader(6, layers=1, pos="none", smear=True)
    keys, values = lim.draw_contexts(4, 6, torch.Generator().manual_seed(2))
    order = torch.randperm(6)
    torch.testing.assert_close(model(keys[:, order], values[:, order], keys), model(keys, values, keys), atol=1e-5, rtol=0)
    changed = model(keys, (values + 1) % 32, keys)
    assert (changed - model(keys, values, keys)).abs().max() > 1e-3


def test_rotary():
    x, position = torch.randn(7, 16, dtype=torch.float64), torch.arange(7)
    turned = lim.rotary(position)(x)
    z = torch.complex(x[:, :8], x[:, 8:]) * torch.exp(1j * position[:, None].double() * 10000.0 ** (-torch.arange(8).double() / 8))
    torch.testing.assert_close(turned, torch.cat([z.real, z.imag], -1), atol=1e-5, rtol=0)
    later = lim.rotary(position + 5)(x)
    torch.testing.assert_close(turned @ turned.T, later @ later.T, atol=1e-4, rtol=0)  # only distances count


def test_training_positions():
    rarest = math.exp(-6)
    for kind, i, weight in (("ushape", 0, 1), ("ushape", 5, math.exp(6 * (abs(10 / 15 - 1) - 1))), ("recency", 15, 1),
                            ("recency", 0, rarest), ("primacy", 0, 1), ("primacy", 15, rarest), ("uniform", 7, 1)):
        assert lim.position_weights(kind, 16)[i].item() == pytest.approx(weight, rel=1e-5)
    keys, values = lim.draw_contexts(500, 16, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 16 for row in keys.tolist()) and keys.max() == 63 and values.max() == 31 and values.min() == 0
    assert keys[:, 0].float().mean().item() == pytest.approx(31.5, abs=4 * 18.5 / math.sqrt(500))


def test_made_pairs():
    rows = lim.make_pairs(3, 20, 7)
    assert rows == lim.make_pairs(3, 20, 7) and rows[:2] == lim.make_pairs(2, 20, 7) and rows != lim.make_pairs(3, 20, 8)
    for row in rows:
        names = [name for record in row["ordered_kv_records"] for name in record]
        assert len(set(names)) == 40 and all(uuid.UUID(name).version == 4 and str(uuid.UUID(name)) == name for name in names)
        assert [row["key"], row["value"]] in row["ordered_kv_records"]
    short = lim.make_pairs(5, 4500, 0, "short")[0]["ordered_kv_records"]
    assert all(re.fullmatch(r"k\d{4}", k) and re.fullmatch(r"\d{4}", v) for k, v in short)
    assert len({k[1:] for k, _ in short} | {v for _, v in short}) == 9000  # no value hides in a key
    where = [row["ordered_kv_records"].index([row["key"], row["value"]]) for row in lim.make_pairs(400, 20, 0)]
    assert statistics.mean(where) == pytest.approx(9.5, abs=4 * 5.77 / 20)


def test_invented_facts():
    rows = lim.builtin_facts()
    names = [lim.invented(i) for i in range(400)]
    assert len(set(names)) == 400 and not any(a != b and a in b for a, b in itertools.permutations(names, 2))
    assert len(rows) == 60 and len({row["question"] for row in rows}) == 60
    for row in rows:
        [answer] = row["answers"]
        holders = [other for other in rows if answer.lower() in f"{other['gold']['text']} {other['gold']['title']}".lower()]
        assert holders == [row] and answer not in row["question"] and row["gold"]["text"].count(answer) == 1


def test_retriever():
    docs = [dict(title="x", text="red fish"), dict(title="y", text="blue fish"), dict(title="z", text="red sea, blue sea, green")]
    assert lim.by_overlap("the red fish", docs) == [docs[0], docs[1], docs[2]]  # log 3/2 + log 3/2, log 3/2, log 3/2: ties stay
    assert lim.by_overlap("green", docs) == [docs[2], docs[0], docs[1]]
    order = lim.by_overlap(lim.FACTS[2][1].format(s="Nobody"), [row["gold"] for row in lim.builtin_facts()])
    assert all(doc["title"].endswith("(composer)") for doc in order[:10])




def flags(*words):
    return lim.parse_args([*map(str, words)])


def test_distractors():
    for words in ((), ("--distractors", "random")):
        rows = lim.load_qa(flags("run", "--model", "echo:first", "--setting", "qa", *words), 8)
        assert len(rows) == 60
        for row in rows:
            assert len(row["others"]) == 7 and row["gold"]["text"] not in [doc["text"] for doc in row["others"]]
            assert not any(row["answers"][0].lower() in doc["text"].lower() for doc in row["others"])
    plain = lim.load_qa(flags("run", "--model", "echo:first"), 8)
    mixed = lim.load_qa(flags("run", "--model", "echo:first", "--order", "shuffled"), 8)
    part = lim.load_qa(flags("run", "--model", "echo:first", "--order", "shuffled", "--limit", 5), 8)
    assert part == mixed[:5]  # the order is each example's own, not the file's
    ranks = {tuple(a["others"].index(doc) for doc in b["others"]) for a, b in zip(plain, mixed)}
    other = lim.load_qa(flags("run", "--model", "echo:first", "--order", "shuffled", "--seed", 1), 8)
    assert len(ranks) > 50 and [r["others"] for r in mixed] != [r["others"] for r in other]
    assert [sorted(d["text"] for d in r["others"]) for r in plain] == [sorted(d["text"] for d in r["others"]) for r in mixed]


def test_positions():
    assert lim.parse_positions("auto", 20) == [0, 4, 9, 14, 19] and lim.parse_positions("auto", 75) == [0, 24, 49, 74]
    assert [lim.parse_positions("auto", total) for total in (15, 2, 1)] == [[0, 4, 7, 10, 14], [0, 1], [0]]
    assert lim.parse_positions("all", 3) == [0, 1, 2] and lim.parse_positions("9,0,9", 10) == [0, 9]


def test_the_papers_tables():
    for (_, total), models in lim.PAPER.items():
        assert all(len(curve) == len(lim.PAPER_POSITIONS[total]) and all(0 < a <= 100 for a in curve) for curve in models.values())
    assert lim.PAPER["qa", 20]["gpt-3.5-turbo"] == (75.8, 57.2, 53.8, 55.4, 63.2)
    below = [m for m, curve in lim.PAPER["qa", 20].items() if m in lim.PAPER_CONTROLS and min(curve) < lim.PAPER_CONTROLS[m][0]]
    assert below == ["gpt-3.5-turbo", "gpt-3.5-turbo-16k"]  # section 2.3: worse in the middle than with no document


@needs_data
def test_published_files():
    rows = [lim.qa_example(row, where) for where, row in lim.read_examples(DATA / "nq-open-oracle.jsonl.gz")]
    assert len(rows) == 2655 and sum(len(row["answers"]) == 1 for row in rows) == 1425
    assert all(lim.score_answer("subspan", row["gold"]["text"].replace("\n", " "), row["answers"]) for row in rows)  # whoever copies it
    assert sum(any(not lim.normalise(a) for a in row["answers"]) for row in rows) == 1 and rows[0]["others"] == []
    for k in (75, 140):
        pairs = [lim.kv_example(row, where) for where, row in lim.read_examples(DATA / f"kv-retrieval-{k}_keys.jsonl.gz")]
        assert len(pairs) == 500 and all(len(row["others"]) == k - 1 for row in pairs)
    words = ("--data", DATA / "nq-open-oracle.jsonl.gz", "--distractors", "random", "--limit", 20)
    made = lim.load_qa(flags("run", "--model", "echo:first", *words), 10)
    assert all(len(row["others"]) == 9 and not any(lim.has_answer(doc, row["answers"]) for doc in row["others"]) for row in made)


# ----------------------------------------------------------------------------------------------------------- 2. the claims


def trained(checkpoints, seed=3, **settings):
    """Percent right at each pair, of a seed that set no threshold."""
    job = dict(lim.PLAIN, contexts=400, test_pairs=(settings.get("pairs", 16),), checkpoints=checkpoints, seed=seed, **settings)
    return [100 * correct.mean(0) for correct in lim.train_reader(job)["correct"].values()]


def test_flat_when_it_should_be():
    """Catches: the wrong value as target, a query that does not see the context, positions that leak."""
    [uniform] = trained((100,), reader=lim.BOUND)
    assert uniform.min() >= 95


def test_data_bend_the_curve():
    """Catches: weights on the middle, or drawn evenly."""
    [ushape] = trained((100,), reader=lim.BOUND, train_positions="ushape")
    assert min(ushape[0], ushape[-1]) - ushape[1:-1].min() > 80


def test_a_window_cuts():
    """Catches: a window off by one token or pair."""
    [window] = trained((110,), reader=dict(lim.BOUND, window=17))
    assert window[:8].max() < 10 and window[8:].min() >= 95


def test_a_u_that_nobody_put_in():
    """Two layers, ALiBi, eight pairs, no help: both ends lead half-way. Catches: slopes of the wrong sign or size (no induction)."""
    [early] = trained((150,), pairs=8, reader=dict(pos="alibi"))
    assert min(early[0], early[-1]) - early[1:-1].min() > 10


# ------------------------------------------------------------------------------------------------------------- 3. the tool


def tool(monkeypatch, capsys, *words):
    """main() in this process → (exit code, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["lost_in_middle.py", *map(str, words)])
    code = 0
    try:
        lim.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: tool(monkeypatch, capsys, *words)


def results(out):
    return json.loads(Path(out.split()[-2]).read_text())


def test_known_curve_is_measured(call):
    code, out, _ = call("run", "--model", "echo:u:0.9", "--keys", 20, "--limit", 300)
    found = results(out)["analysis"]["kv"]["kv"]
    assert code == 0 and Path(out.split()[-1]).stat().st_size > 10_000
    for p, a, (low, high) in zip(found["positions"], found["accuracy"], found["interval"]):
        x = p / 19
        truth = 0.9 * (1 - 2 * x * (1 - x))
        assert abs(a - truth) < 3 * math.sqrt(truth * (1 - truth) / 300) and low < a < high
    a = found["accuracy"]
    s = found["summary"]
    assert s["shape"] == "U" and s["spread"][0] == pytest.approx(max(a) - min(a)) and s["primacy"][0] == pytest.approx(a[0] - min(a[1:-1]))
    assert s["recency"][0] == pytest.approx(a[-1] - min(a[1:-1])) and found["n"] == 300 and "shape: U" in out
    assert [sum(row) for row in found["matrix"]] == [300] * 5 and found["matrix"][2][9] == round(300 * a[2])


def test_a_habit_is_not_retrieval(call):
    _, out, _ = call("run", "--model", "echo:first", "--keys", 6, "--limit", 40, "--no_plot", "--positions", "all")
    found = results(out.replace("no figure (--no_plot)", "none"))["analysis"]["kv"]["kv"]
    assert found["accuracy"] == [1, 0, 0, 0, 0, 0] and found["corrected"] == [0] * 6 and "a habit, not retrieval: 100.0 of the 100.0" in out
    _, out, _ = call("run", "--model", "echo:flat:1", "--keys", 6, "--limit", 40, "--no_plot")
    assert "habit, not" not in out and "shape: flat" in out


def test_controls_and_the_papers_curve(call):
    code, out, _ = call("run", "--setting", "qa", "--model", "echo:flat:0.8", "--controls", "--compare_paper", "gpt-3.5-turbo")
    found = results(out)["analysis"]
    assert code == 0 and found["closedbook"]["subspan"]["accuracy"] == [0] and abs(found["oracle"]["subspan"]["accuracy"][0] - 0.8) < 0.16
    assert found["qa"]["subspan"]["positions"] == [0, 4, 9] and found["qa"]["em"]["metric"] == "em" and "closedbook 0.0; the worst" in out
    rows = [json.loads(line) for line in Path("out/lost_in_middle/qa/responses.jsonl").read_text().splitlines()]
    assert len(rows) == 60 * 5


def test_runs_are_scored_shown_and_compared(call):
    for name, model in (("a", "echo:primacy:0.9"), ("b", "echo:flat:0.9")):
        call("run", "--model", model, "--keys", 10, "--limit", 60, "--positions", "0,5,9", "--out", name, "--no_plot", "--quiet")
    code, out, _ = call("score", "a", "b", "--metric", "em")
    table = results(out)["analysis"]
    em, kv = (table["a"]["kv"][metric]["accuracy"] for metric in ("em", "kv"))
    assert code == 0 and list(table["a"]["kv"]) == ["em", "kv", "kv_first"] and em == kv
    code, out, _ = call("report", "a", "b")
    first, second = (table[name]["kv"]["kv"]["accuracy"] for name in "ab")
    assert code == 0 and "b less a, points, on 60 shared examples" in out and f"at 9 {100 * (second[2] - first[2]):.1f} [" in out
    assert Path("out/lost_in_middle/report/report.md").read_text().startswith("| run | setting")
    assert call("plot", "a", "b")[0] == 0
    wrong = round(60 * (1 - first[2]))
    code, out, _ = call("show", "a", "--wrong", "--position", 9, "--limit", 100)
    assert code == 0 and out.count("gold at 9 of 10, wrong") == wrong == out.count("gold at")
    assert "no such answer" in call("show", "a", "--position", 3)[1]


def test_rank_scoring(call):
    example = dict(id="1", key="b", gold=["b", "2"], answers=["2"], others=[["a", "1"], ["c", "3"]])
    [request] = lim.requests_of(flags("run", "--model", "echo:first", "--scoring", "rank"), "kv", [example], 3, [2])
    assert request["choices"] == [' "1"', ' "3"', ' "2"'] and request["prompt"] == lim.kv_prompt("b", [("a", "1"), ("c", "3"), ("b", "2")])
    _, out, _ = call("run", "--model", "echo:flat:1", "--keys", 7, "--limit", 10, "--scoring", "rank", "--no_plot")
    assert "kv_first" in out and out.count("100.0   72.2 – 100.0") == 5


def test_made_data_run_as_the_built_in(call):
    _, out, _ = call("make_kv", "--keys", 12, "--examples", 15, "--out", "made")
    made = out.split()[-1]
    assert results(out)["sha256"] == lim.hashlib.sha256(Path(made).read_bytes()).hexdigest()
    again = call("make_kv", "--keys", 12, "--examples", 15, "--out", "again")[1].split()[-1]
    assert Path(made).read_bytes() == Path(again).read_bytes()
    tables = [results(call("run", "--model", "echo:u:0.9", "--keys", 12, "--limit", 15, *data, "--out", "x")[1])["analysis"]["kv"]["kv"]
              for data in ((), ("--data", made))]
    assert tables[0] == tables[1]
    _, out, _ = call("make_qa", "--docs", 6, "--gold_index", 4)
    rows = [json.loads(line) for line in gzip.open(out.split()[-1], "rt")]
    assert len(rows) == 60 and all([doc["isgold"] for doc in row["ctxs"]] == [False] * 4 + [True, False] for row in rows)
    code, out, _ = call("run", "--setting", "qa", "--model", "echo:flat:1", "--docs", 6, "--data", out.split()[-1], "--no_plot")
    assert code == 0 and out.count("100.0   94.0 – 100.0         100.0  100.0  100.0") == 5


def test_from_retrieval_results_and_the_oracle(call):
    gold = dict(title="G", chunked_long_answer="The gold of Rome.")
    docs = [dict(title=f"T{i}", text=f"text {i}" + (" Rome" if i == 1 else ""), hasanswer=i == 1, score="1.5", id=str(i)) for i in range(5)]
    Path("r.jsonl").write_text(json.dumps(dict(question="where", answers=["Rome"], ctxs=docs, nq_annotated_gold=gold)) + "\n")
    out = call("make_qa", "--retrieved", "r.jsonl", "--docs", 4, "--gold_index", 1)[1]
    [row] = [json.loads(line) for line in gzip.open(out.split()[-1], "rt")]
    assert [doc["title"] for doc in row["ctxs"]] == ["T0", "G", "T2", "T3"] and row["ctxs"][1]["isgold"]
    oracle = [dict(question=f"q{i}", answers=["*" if i == 3 else f"answer{i}"],  # the fourth normalises to nothing
                   ctxs=[dict(title="t", text=f"has answer{i}", isgold=True)]) for i in range(4)]
    Path("o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in oracle))
    out = call("make_qa", "--from_oracle", "o.jsonl", "--docs", 4, "--gold_index", 3)[1]
    rows = [json.loads(line) for line in gzip.open(out.split()[-1], "rt")]
    assert len(rows) == 4 and all(len({doc["text"] for doc in row["ctxs"]}) == 4 and row["ctxs"][3]["isgold"] for row in rows)
    code, out, _ = call("odqa", "--retrieved", "r.jsonl", "--k", "1,2,5", "--model", "echo:flat:1", "--no_plot")
    assert code == 0 and [line.split()[1] for line in out.splitlines()[1:4]] == ["0.0", "100.0", "100.0"]


def test_needle_and_odqa(call):
    code, out, _ = call("needle", "--model", "echo:u:1", "--lengths", "60,120", "--depths", "0,50,100")
    found = results(out)
    assert code == 0 and np.array(found["accuracy"]).shape == (2, 3) and found["accuracy"][0][0] == 1
    _, out, _ = call("needle", "--model", "echo:first", "--lengths", "60", "--depths", "0,50,100", "--limit", 1, "--dry_run")
    assert "3 calls" in out
    for order in ("ranked", "ends"):
        code, out, _ = call("odqa", "--model", "echo:flat:1", "--k", "2,10,20", "--order", order)
        found = results(out)
        assert code == 0 and found["recall"][1:] == [1, 1] and 0 < found["recall"][0] < 0.5
        assert found["reader"]["accuracy"] == found["recall"]


def test_ends_and_depth_are_where_they_should_be(call, monkeypatch):
    seen = []
    monkeypatch.setattr(lim, "ask_all", lambda args, device, requests, out: seen.extend(requests) or sys.exit(0))
    call("odqa", "--model", "echo:first", "--k", "5", "--limit", 1, "--order", "ranked")
    call("odqa", "--model", "echo:first", "--k", "5", "--limit", 1, "--order", "ends")
    ranked, ends = (request["values"] for request in seen)
    assert ends == [ranked[i] for i in (0, 2, 4, 3, 1)]
    seen.clear()
    call("needle", "--model", "echo:first", "--lengths", "200", "--depths", "0,50,100", "--limit", 1)
    shares = []
    for request in seen:
        text = request["prompt"].split("\n\n")[1]
        before, after = text.split(lim.builtin_facts()[0]["gold"]["text"])
        shares.append(len(before) / (len(before) + len(after)))
        assert len((before + after).split()) == 200
    assert shares[0] == 0 and 0.4 < shares[1] < 0.6 and shares[2] == 1


class Fake(http.server.BaseHTTPRequestHandler):
    """/v1/completions: answers with the asked key's value; too long for example `long`, down for example `down`."""

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        pairs = json.loads(prompt.split("JSON data:\n")[1].split("\n\nKey:")[0])
        key = re.search(r'Key: "([^"]+)"\nCorr', prompt)[1]
        self.server.asked.append(key)
        status, body = 200, dict(choices=[dict(text=f" {pairs[key]}")], usage=dict(prompt_tokens=9, completion_tokens=1))
        if key == self.server.long and list(pairs).index(key) == 2:
            status, body = 400, dict(error=dict(message="This model's maximum context length is 10 tokens"))
        if key == self.server.down and list(pairs).index(key) == 0:
            status, body = 403, dict(error=dict(message="not this one"))
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


def test_a_live_server(call):
    """Overflow at one position leaves the example out at all; a failed call ends with status 1 and is asked again, alone."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    keys = [row["key"] for row in lim.make_pairs(8, 5, 0)]
    server.asked, server.long, server.down = [], keys[2], keys[5]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ("run", "--model", "http:fake", "--base_url", f"http://127.0.0.1:{server.server_port}/v1", "--keys", 5, "--limit", 8,
             "--positions", "0,2,4", "--no_plot", "--quiet")
    try:
        code, out, err = call(*words)
        found = json.loads(Path("out/lost_in_middle/kv/results.json").read_text())["analysis"]["kv"]["kv"]
        assert code == 1 and "1 calls failed" in err and "not this one" in err and found["n"] == 6 and found["accuracy"] == [1, 1, 1]
        assert found["left_out"]["3"] == "overflow" and "left out at all positions: 2" in out and len(server.asked) == 24
        server.down = None
        code, out, err = call(*words)
        assert code == 0 and server.asked[24:] == [keys[5]] and "n = 7" in out and "left out at all positions: 1 (1 × overflow): 3" in out
        code, _, err = call(*words, "--on_overflow", "error")
        assert code == 2 and err.startswith("error: example 3, position 2, does not fit") and len(server.asked) == 25
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif("NANOPAPERS_TEST_SERVER" not in os.environ, reason="NANOPAPERS_TEST_SERVER is not set")
def test_a_real_server(call):
    code, out, err = call("run", "--model", "http", "--base_url", os.environ["NANOPAPERS_TEST_SERVER"], "--keys", 4, "--key_style", "short",
                          "--limit", 2, "--max_tokens", 8, "--concurrency", 1, "--no_plot", "--quiet")
    rows = [json.loads(line) for line in Path("out/lost_in_middle/kv/responses.jsonl").read_text().splitlines()]
    assert code == 0 and len(rows) == 8 and all(row["text"].strip() for row in rows), err


def test_a_local_model(call, monkeypatch):
    """A random GPT with a window of 260 letters: prompts of 4 pairs fit, of 8 do not. Ranking against log-softmax by hand."""
    torch.manual_seed(0)
    model = lim.GPT(lim.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=260, vocab_size=128)).eval()
    encode, decode = (lambda text: [min(ord(c), 127) for c in text]), lambda ids: "".join(map(chr, ids))
    monkeypatch.setattr(lim, "connect", lambda *rest: lim.Local(model, encode, decode, "tiny"))
    flags_ = ("run", "--model", "gpt2", "--limit", 6, "--scoring", "rank", "--no_plot")
    code, out, _ = call(*flags_, "--keys", 4, "--positions", "0,3")
    rows = [json.loads(line) for line in Path("out/lost_in_middle/kv/responses.jsonl").read_text().splitlines()]
    example = lim.kv_example(lim.make_pairs(6, 4, 0, "short")[0], "made:1")
    pairs, scores = lim.place(example["others"], example["gold"], 3), []
    prompt = lim.kv_prompt(example["key"], pairs)
    for _, value in pairs:
        ids = torch.tensor([encode(f'{prompt} "{value}"')])
        logprobs = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        scores.append(logprobs[len(prompt) - 1 :].sum().item())
    assert code == 0 and rows[1]["text"] == pairs[int(np.argmax(scores))][1] and rows[1]["answered"] == int(np.argmax(scores))
    code, _, err = call(*flags_, "--keys", 8)
    assert code == 2 and "no example was answered at every position" in err and "overflow" in err


def test_dry_run_asks_nobody(call):
    code, out, _ = call("run", "--model", "http:x", "--base_url", "http://127.0.0.1:9/v1", "--keys", 4, "--limit", 3, "--dry_run")
    assert code == 0 and "12 calls" in out and "Nothing was asked" in out and out.startswith("Extract the value")


class Here:
    """A pool of no processes: the jobs run here."""

    imap = map

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        pass


def test_lab_in_small(call, monkeypatch):
    monkeypatch.setattr(lim, "lab_pool", Here)
    code, out, err = call("lab", "--steps", 6, "--pairs", 4, "--test_pairs", 9, "--checkpoints", 2, "--seeds", 2, "--pos", "rope")
    found = results(out)
    assert code == 0 and found["readers"] == 2 and found["claims"] == [] and "2/2" in err
    assert [(c["step"], c["pairs"], len(c["accuracy"]), len(c["accuracy"][0])) for c in found["curves"]] == [
        (3, 4, 2, 4), (3, 9, 2, 9), (6, 4, 2, 4), (6, 9, 2, 9)]
    assert Path(out.split()[-1]).stat().st_size > 10_000


def test_lab_default_panels(call, monkeypatch):
    """All panels with readers that are not trained: every claim is computed, and none that needs training holds."""
    def untrained(job):
        rng = np.random.default_rng(job["seed"])
        return dict(job, seconds=1, correct={(s, n): rng.random((50, n)) < 0.3 for s in job["checkpoints"] for n in job["test_pairs"]})

    monkeypatch.setattr(lim, "lab_pool", Here)
    monkeypatch.setattr(lim, "train_reader", untrained)
    code, out, _ = call("lab", "--quiet")
    found = results(out)
    holds = {text for text, _, ok in found["claims"] if ok}
    assert code == 0 and len(found["claims"]) == 11 and {c["panel"] for c in found["curves"]} == set(lim.LAB)
    assert all("pairs out of sight" in text or "both ends stand" in text for text in holds) and out.count("FAILS: ") >= 9
    jobs, _ = lim.lab_jobs(flags("lab"))
    full, _ = lim.lab_jobs(flags("lab", "--full"))
    assert len(jobs) == found["readers"] == 1 * 3 + 3 * 3 + 3 + 2 * 3 + 2 and len(full) == len(jobs) + 4


def test_jobs_come_back_in_order(monkeypatch):
    monkeypatch.setattr(lim, "lab_pool", Here)
    monkeypatch.setattr(lim, "train_reader", lambda job: job["name"])
    sizes = [(5, 1), (9, 2), (1, 3), (9, 1)]
    jobs = [dict(name=i, checkpoints=(steps,), reader=dict(layers=layers)) for i, (steps, layers) in enumerate(sizes)]
    assert lim.train_all(flags("lab", "--quiet"), jobs) == [0, 1, 2, 3]


GOOD = dict(question="q", answers=["a"], ctxs=[dict(title="t", text="a", isgold=True), dict(title="t", text="b")])
KV = dict(ordered_kv_records=[["k", "v"], ["l", "w"]], key="k", value="v")
RUN_KV, RUN_QA = ("run", "--model", "echo:flat:1", "--keys", 2), ("run", "--model", "echo:flat:1", "--setting", "qa", "--docs", 2)


@pytest.mark.parametrize("rows, words, message", [
    ([dict(GOOD, question=" ")], RUN_QA, "bad.jsonl:1 has no question"),
    ([GOOD, dict(GOOD, answers="a")], RUN_QA, "bad.jsonl:2 has no list of answers"),
    ([dict(GOOD, ctxs=[dict(text="x")])], RUN_QA, "list ctxs of documents with title and text"),
    ([dict(GOOD, ctxs=GOOD["ctxs"][1:])], RUN_QA, "has 0 documents with isgold, needs 1"),
    ([dict(GOOD, ctxs=GOOD["ctxs"][:1] * 2)], RUN_QA, "has 2 documents with isgold"),
    ([GOOD], ("run", "--model", "echo:first", "--setting", "qa", "--docs", 4), "row 1 has 1 distractors, --docs 4 needs 3"),
    ([GOOD], ("make_qa", "--docs", 4), "--distractors random takes other rows' documents"),
    ([], RUN_QA, "has no rows"),
    (["{broken"], RUN_QA, "bad.jsonl:1 is not a line of JSON"),
    ([GOOD, ["list"]], RUN_QA, "bad.jsonl:2 is not a line of JSON (not a JSON object)"),
    ([dict(KV, key="z")], RUN_KV, "bad.jsonl:1: its key z is not among its 2 records"),
    ([dict(KV, ordered_kv_records=[["k", "v"], ["k", "w"]])], RUN_KV, "has the key k twice"),
    ([dict(KV, value="other")], RUN_KV, "its value is not the one that the records give for k"),
    ([dict(KV, ordered_kv_records="k")], RUN_KV, "has no ordered_kv_records"),
    ([GOOD], RUN_KV, "has no ordered_kv_records"),
    ([KV], ("run", "--model", "echo:first", "--keys", 3), "row 1 has 2 pairs, --keys 3 asks for more"),
    ([], RUN_KV, "has no rows"),
])
def test_bad_data(call, rows, words, message):
    Path("bad.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    code, out, err = call(*words, "--data", "bad.jsonl")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("words, message", [
    (["nonsense"], "invalid choice"),
    (["run"], "run needs --model"),
    (["needle"], "needle needs --model"),
    (["run", "--model", "gpt5"], "--model gpt5: choose from gpt2"),
    (["run", "--model", "echo:v:0.5"], "--model echo:v:0.5: there are"),
    (["run", "--model", "echo:u:2"], "accuracies from 0 to 1"),
    (["run", "--model", "echo:u:high"], "accuracies from 0 to 1"),
    (["run", "--model", "echo:first", "--data", "nowhere.gz"], "nowhere.gz is not there: --data paper downloads"),
    (["run", "--model", "echo:first", "--data", "torn.jsonl.gz"], "torn.jsonl.gz cannot be read after line 0"),
    (["run", "--model", "echo:first", "--positions", "0,75"], "--positions 0,75: with 75 items the indices go from 0 to 74"),
    (["run", "--model", "echo:first", "--positions", "first"], "--positions first: auto, all, or indices"),
    (["run", "--model", "echo:first", "--keys", "1"], "1 is not between 2 and 4500"),
    (["run", "--model", "echo:first", "--query_aware", "--mention_random_order"], "choose one"),
    (["run", "--model", "echo:first", "--order", "ends"], "--order ends is for odqa"),
    (["run", "--model", "echo:first", "--setting", "qa", "--docs", "61"], "has 59 distractors, --docs 61 needs 60"),
    (["run", "--model", "echo:first", "--setting", "qa", "--data", "paper", "--docs", "7"], "10, 20 or 30 documents"),
    (["run", "--model", "echo:first", "--data", "paper", "--keys", "76"], "75, 140 or 300 pairs"),
    (["run", "--model", "echo:first", "--scoring", "rank", "--setting", "oracle"], "--scoring rank needs candidates"),
    (["run", "--model", "echo:first", "--compare_paper", "gpt-9"], "--compare_paper gpt-9: the paper has no such curve of kv with 75"),
    (["run", "--model", "http:x", "--base_url", "localhost"], "--base_url localhost is no address"),
    (["run", "--model", "http:x", "--base_url", "http://127.0.0.1:9/v1"], "is the server running"),
    (["run", "--model", "echo:first", "--out", "torn.jsonl.gz"], "--out torn.jsonl.gz is a file"),
    (["run", "somewhere", "--model", "echo:first"], "run takes no somewhere"),
    (["score"], "score needs the folder of a run"),
    (["report", "empty"], "empty has no responses.jsonl"),
    (["show", "odd"], "responses.jsonl is not the responses of a run"),
    (["odqa", "--model", "echo:first", "--k", "1,zwei"], "--k 1,zwei: whole numbers"),
    (["odqa", "--model", "echo:first", "--k", "0"], "--k 0: numbers from 1"),
    (["odqa", "--model", "echo:first", "--k", "61"], "has 60 documents, --k 61 needs 61"),
    (["needle", "--model", "echo:first", "--depths", "101"], "--depths 101: numbers from 0 to 100"),
    (["make_qa", "--docs", "5", "--gold_index", "5"], "--gold_index 5: with --docs 5 the indices go from 0 to 4"),
    (["make_qa", "--retrieved", "a", "--from_oracle", "b"], "--retrieved and --from_oracle: give one"),
    (["lab", "--mask", "bidirectional", "--layers", "1"], "changes nothing"),
    (["lab", "--alibi", "4"], "--alibi is the slope of --pos alibi"),
    (["lab", "--sink"], "give --window too"),
    (["lab", "--pos", "sinus"], "--pos"),
    (["lab", "--pairs", "65"], "65 is not between 3 and 64"),
    (["lab", "--device", "abacus"], "--device abacus"),
    (["--seed", "-1"], "--seed"),
])
def test_mistakes_end_in_one_line(call, words, message):
    Path("empty").mkdir()
    Path("odd").mkdir()
    Path("odd/responses.jsonl").write_text('{"a": 1}\n')
    Path("torn.jsonl.gz").write_bytes(gzip.compress(b'{"key": "k"}\n' * 50)[:12])
    code, out, err = call(*words)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_interrupt(call, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(lim.TASKS, "lab", stop)
    assert call("lab") == (2, "", "error: stopped\n")


def test_help_is_the_manual(capsys):
    with pytest.raises(SystemExit) as stop:
        lim.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{flag}" in text for flag in "device dtype seed out data model no_plot quiet setting keys full base_url".split())


def test_two_ranks_equal_one(call, tmp_path):
    flags_ = ("lab", "--steps", 4, "--pairs", 4, "--layers", 1, "--seeds", 2, "--checkpoints", 1, "--no_plot", "--quiet")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HOUSE / "lost_in_middle.py", *flags_,
               "--out", "two"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two/results.json").read_text())
    jobs, _ = lim.lab_jobs(flags(*flags_))
    alone = lim.lab_curves([lim.train_reader(job) for job in jobs])
    assert done.stdout.count("two/results.json") == 1
    np.testing.assert_allclose(found["curves"][0]["accuracy"], alone[0]["accuracy"], atol=0.004)  # threads may round one answer differently
