"""Negation and the shape of scaling curves: NeQA (Zhang, Yasunaga, Zhou, HaoChen, Zou, Liang, Yeung; ACL Findings; arXiv 2305.17311).

The problem. A two-choice question is negated ("The capital of France is not": Rome, or Paris?), so that the answer is the choice that
is wrong without the negation. With size some language models get worse at it (inverse scaling), some worse and then better (a U),
some better. Why three shapes from one task?

The idea. Two abilities are composed. Task 1: answer the plain question, with probability t1. Task 2: understand that the negation
turns the answer, with probability s; whoever misses it answers the plain question. If the two are independent,

    P(right) = t1·s + (1 − t1)·(1 − s)                 s = 2·a2 − 1,  a2 the accuracy of a two-choice test of task 2

While s is near 0 the score is 1 − t1: it falls as the model gets to know more. It rises when s does. Prompts and families that move
the rise of s to smaller models turn inverse into U into positive. Without independence, the score is exactly

    P(right) = t1·s + (1 − t1)·(1 − s) + 2·Cov(right on the plain question, turns its answer)

How to run it.

    python neqa.py                                 the laboratory: models of 798 to 406,402 parameters in a world with a rare "not"
    python neqa.py eval --model http --base_url http://127.0.0.1:8011/v1 --data builtin       any OpenAI-compatible server
    python neqa.py eval --model gpt2,gpt2-medium,gpt2-large --data neqa100 --prompt hint --debias      a scaling curve (downloads)
    python neqa.py negate questions.txt            negate your own questions: rule and reason; an OpenBookQA .jsonl becomes a data set
    python neqa.py compose | fit results.json      the formula's three shapes; t1, s and the predicted curve of measured models
    python neqa.py finetune --ratios 0,0.05,0.3    the paper's simulation: GPT-2 fine-tuned on SST-2 with a share of negated sentences

What we measured. `python neqa.py` (torch 2.13.0, 2 cores of an AMD EPYC, 81 s; seeds 0 to 2; exact over 800 facts, chance 0.5):

    accuracy on negated sentences,        parameters:     798   2,362   7,794   27,874   104,898   406,402
    "not" in 0.03 % of the sentences, NeQA               .478    .361    .174     .008      .005               inverse, 3 of 3 seeds
    3 %                                                  .436    .396    .349     .723      .738      .709     U, 2 of 3
      t1 and s                                      .579 .247 .608 .158 .936 .334 .999 .724  1 .738    1 .709
      composed from t1 and s                             .460    .424    .355     .723      .738      .709
    30 %                                                 .511    .570    .675     .927      .993               positive, 3 of 3

The falling arm is task 1 being learnt while s stays low; the rising arm is s alone, for t1 is 1 by then. The composed value errs by at most
.05, which is the covariance term. What did not hold: s is no sigmoid in size, it falls before it rises, since an unlearnt "not" is ever
better ignored; and single seeds differ widely where it turns (.55, .60, .98 at 406,402). With "not" in 0.1 % two of five seeds leave the
inverse curve at 104,898 parameters. At the smallest sizes s is disagreement by chance. These networks do not say why GPT-3's curve fell.

A real model. Gemma 3 of 270M weights (4 bits, base) behind llama-cpp-python's server, our 204 questions (95 % ± .07 throughout):

    eval --model http --base_url http://127.0.0.1:8011/v1 --top_logprobs 50            NeQA .554, task 1 .475, task 2 .725; says A .78
    the same with --prompt hint                                                        NeQA .539, task 1 .480, task 2 .657; says A .69

It answers by letter, not by content (it turns .07 and .10 of its answers), so both scores are guesses: read "says A" first, use --debias.

What the paper reports (100 questions): GPT-3's ada, babbage, curie and davinci .54, .54, .36, .33 zero-shot; text-davinci-002 and -003
.98 with few-shot chains of thought.

Ours, not the paper's: the laboratory, the built-in questions, the rule that names a shape, the fit, scoring in both orders (--debias),
the flip rate. The paper's code asks for the first token's 50 likeliest and compares " A" with " B"; so does --score logprob.
"""

import argparse
import ast
import csv
import email.utils
import hashlib
import http.client
import io
import json
import math
import os
import platform
import queue
import random
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ============================================================================================== the method: composition


def compose(t1, s):
    """Section 5: the accuracy on negated questions of a model that is right on plain ones with probability t1 and turns its answer
    with probability s, independently. Numbers or arrays."""
    return t1 * s + (1 - t1) * (1 - s)


def understanding(a2):
    """s from the accuracy a2 of a two-choice test, where guessing gives ½: s = 2·a2 − 1, not a2 itself."""
    return 2 * a2 - 1


def covariance_term(right, turned):
    """2·Cov of two 0/1 arrays over the same questions: measured accuracy minus compose(mean right, mean turned), exactly."""
    right, turned = np.asarray(right, float), np.asarray(turned, float)
    return 2 * ((right * turned).mean() - right.mean() * turned.mean())


def wilson(k, n, z=1.959963984540054):
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


ARM = 0.05  # accuracy: what moves by less is flat


def shape(y, error=0.0):
    """→ "inverse", "U", "inverted U", "positive" or "flat", by this rule. An arm is a fall or a rise from one size to a larger one by
    ARM or more and by 1.96 standard errors of the difference. A fall to the lowest point and a rise from it make a U, a rise to the
    highest point and a fall from it an inverted U, a fall alone is inverse, a rise alone positive.

    y: (n,) accuracy, smallest model first; error: its standard error, a number or (n,); 0 leaves the errors out."""
    y, error = np.asarray(y, float), np.zeros(len(y)) + error

    def arm(sign, start, stop):  # does sign·y move up between two of the points start … stop − 1?
        return any(sign * (y[j] - y[i]) >= max(ARM, 1.96 * math.hypot(error[i], error[j]))
                   for i in range(start, stop) for j in range(i + 1, stop))

    low, high, n = int(y.argmin()), int(y.argmax()), len(y)
    if arm(-1, 0, low + 1) and arm(1, low, n):
        return "U"
    if arm(1, 0, high + 1) and arm(-1, high, n):
        return "inverted U"
    fall, rise = arm(-1, 0, n), arm(1, 0, n)
    return {(True, False): "inverse", (False, True): "positive", (False, False): "flat"}.get((fall, rise)) or \
        ("positive" if y[-1] > y[0] else "inverse")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fit_curves(x, counts, n, draws=1000, seed=0):
    """Section 5's curves from data, by binomial maximum likelihood over a grid: t1 a line in x, s a logistic k·(x − x0).

    x: (m,) log10 of parameters; counts: {"task1", "task2", "neqa"} → (m,) right answers of n (m,). → dict: functions t1(x), s(x) and
    predicted(x), x0, slope k, x0_interval (95 %, parametric bootstrap; ±inf where it leaves the grid), rmse of predicted against
    measured NeQA, misfit of t1 and of s = 2·a2 − 1 (root mean squares).
    """
    x, n, rng = np.asarray(x, float), np.asarray(n, float), np.random.default_rng(seed)
    span = np.ptp(x)
    ends = np.stack(np.meshgrid(*[np.linspace(0.002, 0.998, 167)] * 2, indexing="ij"), -1).reshape(-1, 2)
    middles = np.linspace(x.min() - span, x.max() + span, 181)
    pairs = np.stack(np.meshgrid(middles, np.geomspace(1, 60, 40) / span, indexing="ij"), -1).reshape(-1, 2)

    def line(p, at):
        return p[..., :1] + (p[..., 1:] - p[..., :1]) * (at - x.min()) / span

    def logistic(p, at):
        return sigmoid(np.clip(p[..., 1:] * (at - p[..., :1]), -60, 60))

    def rms(gap):
        return float(np.sqrt(np.mean(gap**2)))

    table1, table2 = line(ends, x), np.clip(0.5 + 0.5 * logistic(pairs, x), 0, 1 - 1e-9)

    def likeliest(table, k):  # (grid, m) probabilities and (draws, m) counts → the best row of each draw
        return np.argmax(k @ np.log(table).T + (n - k) @ np.log1p(-table).T, 1)

    best1 = ends[likeliest(table1, np.asarray(counts["task1"], float)[None])[0]]
    best2 = pairs[likeliest(table2, np.asarray(counts["task2"], float)[None])[0]]
    again = rng.binomial(n.astype(int), 0.5 + 0.5 * logistic(best2, x), (draws, len(x)))
    low, high = np.quantile(pairs[likeliest(table2, again), 0], (0.025, 0.975))
    t1, s = (lambda at: np.clip(line(best1, np.asarray(at, float)), 0, 1)), (lambda at: logistic(best2, np.asarray(at, float)))
    share = {name: np.asarray(k, float) / n for name, k in counts.items()}
    return dict(t1=t1, s=s, predicted=lambda at: compose(t1(at), s(at)), x0=float(best2[0]), k=float(best2[1]),
                x0_interval=(-math.inf if low == middles[0] else float(low), math.inf if high == middles[-1] else float(high)),
                rmse=rms(compose(t1(x), s(x)) - share["neqa"]), misfit_t1=rms(t1(x) - share["task1"]),
                misfit_s=rms(s(x) - understanding(share["task2"])))


# ============================================================================================== the method: prompts and scores

HEADER = "The following are multiple choice questions (with answers) about common sense."
HINT = " Note that if there is a negation in the question, we should choose the wrong answer to the {} question."
HINT_TASK2 = "Negated sentences are different from original sentences.\n\n"
SHOTS = (  # negated question, plain question, choices, the right one of the negated question
    ("If a cat has a body temp that is below average, it isn't in", "If a cat has a body temp that is below average, it is in",
     ("danger", "safe ranges"), 1),
    ("As the barometer reading goes lower there is not a greater chance of",
     "As the barometer reading goes lower there is a greater chance of", ("sunshine", "getting wet"), 0),
    ("Coral is a type of living organism which cannot be identified in", "Coral is a type of living organism which can be identified in",
     ("saltwater locations that are open", "any where with liquid"), 1),
)
PROMPTS = ("zeroshot", "hint", "fewshot", "fewshot_hint", "cot")


def block(question, choices):
    return f"Question: {question}\nA. {choices[0]}\nB. {choices[1]}\nAnswer:"


def build_prompt(kind, question, choices):
    """The reference's prompt, to the byte. kind: one of PROMPTS; choices: two texts."""
    if kind not in PROMPTS:
        raise ValueError(f"a prompt is one of {', '.join(PROMPTS)}, not {kind}")
    hint = {"hint": HINT.format("original"), "fewshot_hint": HINT.format("non-negated")}.get(kind, "")
    blocks = [HEADER + hint]
    for negated, plain, options, right in SHOTS if kind in ("fewshot", "fewshot_hint", "cot") else ():
        answer = f" {'AB'[right]}"
        if kind == "cot":
            answer = (f" Let's think step-by-step.\nFirst, let's answer non-negated question: \"{plain}?\"\n"
                      f"For this non-negated question, we have {'BA'[right]}.\nThen, to answer the negated question, take the other "
                      f"answer, which would be {'AB'[right]}.\nSo the answer is {'AB'[right]}.")
        blocks.append(block(negated, options) + answer)
    return "\n\n".join([*blocks, block(question, choices)])


def build_task2(plain, negated, answer, swap, hint=False):
    """Are the two sentences the same? answer: the right choice of the plain question; swap: "different" comes first."""
    options = ("different", "the same") if swap else ("the same", "different")
    return (HINT_TASK2 * hint + f'Sentence 1: "{plain} {answer}."\nSentence 2: "{negated} {answer}."\n'
            f"Question: The above two sentences are?\nA. {options[0]}\nB. {options[1]}\nAnswer:")


def letter_logprobs(logprobs, surface=False):
    """{token: log-probability} → log P(A), log P(B), −inf where a letter is not there. The letter may stand behind a space in
    whatever way the tokenizer writes one; surface also takes "A." and "A)"."""
    mass = [0.0, 0.0]
    for token, value in logprobs.items():
        bare = token.lstrip(" ▁Ġ")
        bare = bare.rstrip(".):\n") if surface else bare
        if bare in ("A", "B"):
            mass["AB".index(bare)] += math.exp(value)
    return tuple(math.log(p) if p > 0 else -math.inf for p in mass)


def letter_margin(logprobs, surface=False):
    """log P(A) − log P(B). A letter that is not among the tokens given counts as one nat below the last of them; 0 where both are
    missing."""
    a, b = letter_logprobs(logprobs, surface)
    floor = min(logprobs.values(), default=0.0) - 1
    return max(a, floor) - max(b, floor)


def read_letter(text):
    """What a written answer picks: 0 (A), 1 (B) or None, by its first A or B that stands alone."""
    found = re.search(r"(?<![A-Za-z'])([AB])(?![A-Za-z'])", text)
    return "AB".index(found[1]) if found else None


def read_chain(text):
    """→ (0, 1 or None, did it name both?): the last "So the answer is X." before the first blank line."""
    found = re.findall(r"So the answer is ([AB])\.", text.split("\n\n")[0])
    return ("AB".index(found[-1]) if found else None), len(set(found)) > 1


# ============================================================================================== the method: a negator

BE = {"is": "isn't", "are": "aren't", "was": "wasn't", "were": "weren't"}
MODALS = {"may": "may not", "might": "might not", "can": "can't", "could": "couldn't", "will": "won't", "would": "wouldn't"}
NEGATIVE = {"not", "nothing", "none", "never", "nobody", "nowhere", "no", "cannot"}
ALREADY = {"unable", "unlike", "unlikely", "incapable", "unusual", "impossible", "rarely", "rare", "barely", "scarcely"}
PREFIXES = ("Which of the following is not true? ", "Choose the incorrect answer. ")
VERBS = """absorb act affect allow appear attract become begin belong blow boil breathe bring build burn buy carry catch cause change chase
climb collect come conduct consist consume contain contribute convert cool cover create cut decompose decrease depend die dig drink drive
eat eliminate emit evaporate exist expand experience explode extend extract fall feed feel fight find float flow fly form freeze gain
generate get give go grow happen hatch have hear heat help hibernate hold hunt include increase indicate inhabit involve keep kill lack
last lay lead leave let lie like live look lose love maintain make mean melt mine move need obtain occur open orbit originate pass pay
perform play prefer prevent produce protect provide pull push reach receive recycle reduce reflect release remain reproduce require result
ride rotate run see send serve show shrink sink sit sleep smell spin spread stand start stay stop store suffer survive swim take taste
teach tend thrive travel turn understand use want warm wash wear weigh work write""".split()
PAST = dict(zip(
    "ate became began brought built came fell felt fought found flew froze gave got went grew had held kept led left lost made meant ran "
    "saw sank sat slept spun stood swam took wore wrote died bought caught cut drank drove dug laid lay".split(),
    "eat become begin bring build come fall feel fight find fly freeze give get go grow have hold keep lead leave lose make mean run see "
    "sink sit sleep spin stand swim take wear write die buy catch cut drink drive dig lay lie".split()))
NO_VERB_AFTER = set("""a an the to of in on at for with by from and or its their his her our your my this these those some any more most
less many each every as than into onto over under about like very so such can could may might will would should must is are was were be been
being do does did has have had who whose""".split())


def verb_forms():
    """{form: (auxiliary, base)} of the verbs above: eats → does, eat; eat → do, eat; ate → did, eat."""
    forms = {}
    for base in VERBS:
        ending = base[:-1] + "ies" if re.search(r"[^aeiou]y$", base) else base + ("es" if re.search(r"(s|x|ch|sh|o)$", base) else "s")
        forms[base] = ("do", base)
        forms["has" if base == "have" else ending] = ("does", base)
        if base not in PAST.values():
            forms[base + "d" if base.endswith("e") else base[:-1] + "ied" if ending.endswith("ies") else base + "ed"] = ("did", base)
    return forms | {past: ("did", base) for past, base in PAST.items() if past not in forms}


class Negator:
    """Negates question stems one after the other: call it with a text → (negated text, rule, is the answer turned?), or
    (None, why it was left out, False). The paper's rules, on whole words of the last clause, the first that fits:

    gold/not, gold/un-in-: it is negative already, and stays; because → not because; the only is, are, was or were; the only modal;
    do, does, did or the only verb that a table of about 190 knows (the paper has a parser here), where nothing makes it doubtful; or,
    before what is no question, a sentence that asks for the wrong answer. Contracted ("isn't") and full forms take turns, by rule.
    """

    def __init__(self):
        self.used, self.forms = Counter(), verb_forms()

    def turn(self, rule):
        self.used[rule] += 1
        return (self.used[rule] - 1) % 2  # 0: contracted, 1: in full

    def __call__(self, text):
        if text.startswith(PREFIXES):
            return text, "gold/not", False
        clauses = [match for match in re.finditer(r"[^,.?]+", text) if match[0].strip(" _")]
        if not clauses:
            return None, "no words", False
        start = clauses[-1].start()
        words = [(start + m.start(), start + m.end(), m[0].lower()) for m in re.finditer(r"[\w'’-]+", clauses[-1][0])]
        said = [word.replace("’", "'") for *_, word in words]

        def replaced(i, new):
            begin, end, _ = words[i]
            return text[:begin] + (new[0].upper() + new[1:] if text[begin].isupper() else new) + text[end:]

        if NEGATIVE & set(said) or any(word.endswith("n't") for word in said):
            return text, "gold/not", False
        if ALREADY & set(said):
            return text, "gold/un-in-", False
        if "because" in said:
            return replaced(said.index("because"), "not because"), "not/because", True
        for rule, table in (("not/be", BE), ("not/modal", MODALS)):
            found = [i for i, word in enumerate(said) if word in table]
            if len(found) == 1 and not (rule == "not/modal" and found[0] and said[found[0] - 1] in ("a", "an", "the", "tin", "in")):
                word = said[found[0]]
                return replaced(found[0], f"{word} not" if self.turn(rule) else table[word]), rule, True
        helpers = [i for i, word in enumerate(said) if word in ("do", "does", "did")]
        if len(helpers) == 1:
            word = said[helpers[0]]
            return replaced(helpers[0], f"{word} not" if self.turn("not/do") else f"{word}n't"), "not/do", True
        found = [i for i, word in enumerate(said) if word in self.forms]
        if len(found) == 1 and not helpers and found[0] > 0 and not (NO_VERB_AFTER & {said[found[0] - 1]}) \
                and not said[found[0] - 1].endswith(("'s", "'")) and not any(word in BE or word in MODALS for word in said):
            auxiliary, base = self.forms[said[found[0]]]
            after = said[found[0] + 1] if found[0] + 1 < len(said) else ""
            if not (base == "have" and re.search(r"(ed|en|been)$", after)):  # "has eaten": have helps another verb
                return replaced(found[0], f"{auxiliary} not {base}" if self.turn("not/do") else f"{auxiliary}n't {base}"), "not/do", True
        if not text.rstrip().endswith("?") and said[0] != "which" and not text.lower().startswith("which"):
            return PREFIXES[self.turn("prompt")] + text, "prompt", True
        return None, "a question in which no single word to negate was found", False


# ============================================================================================== data

RAW = "https://raw.githubusercontent.com/yuhui-zh15/NeQA/main/"
SST2 = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
TABLES = (  # a question, then subject: answer; the wrong choice is the next other answer of the line
    ("The capital of {} is", "France: Paris, Japan: Tokyo, Egypt: Cairo, Italy: Rome, Spain: Madrid, Kenya: Nairobi, Peru: Lima, "
     "Norway: Oslo, Greece: Athens, Cuba: Havana, Austria: Vienna, Portugal: Lisbon, Ireland: Dublin, Poland: Warsaw, Chile: Santiago, "
     "Thailand: Bangkok, Iraq: Baghdad, Finland: Helsinki, Hungary: Budapest, Germany: Berlin"),
    ("{} is a kind of", "A sparrow: bird, A trout: fish, A wasp: insect, A python: snake, An oak: tree, A rose: flower, An eagle: bird, "
     "A salmon: fish, A beetle: insect, A cobra: snake, A birch: tree, A tulip: flower, A violin: instrument, A hammer: tool, "
     "A sofa: furniture, A trumpet: instrument, A screwdriver: tool, A wardrobe: furniture, A mosquito: insect, A flute: instrument"),
    ("The colour of {} is", "a ripe banana: yellow, fresh snow: white, coal: black, grass: green, blood: red, a clear sky: blue, "
     "a ripe tomato: red, an emerald: green, a lemon: yellow, a polar bear: white"),
    ("The opposite of {} is", "hot: cold, big: small, light: dark, fast: slow, early: late, open: closed, rich: poor, wet: dry, "
     "loud: quiet, young: old, full: empty, hard: soft"),
    ("The day after {} is", "Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday, "
     "Saturday: Sunday, Sunday: Monday"),
    ("{} comes right after", "February: January, March: February, April: March, May: April, June: May, July: June, August: July, "
     "September: August, October: September, November: October, December: November, January: December"),
    ("{} makes", "Two plus three: five, Four plus four: eight, Six minus two: four, Three times three: nine, Ten minus seven: three, "
     "One plus one: two, Five plus one: six, Twenty minus ten: ten, Two times six: twelve, Five times three: fifteen, "
     "Nine plus two: eleven, Eight minus one: seven"),
    ("{} lives in", "A camel: the desert, A whale: the sea, A monkey: the jungle, A mole: the ground, A penguin: the Antarctic, "
     "A frog: a pond, A bee: a hive, A dog: a kennel, A spider: a web, A king: a palace"),
    ("{} gives people", "A cow: milk, A hen: eggs, A sheep: wool, A candle: light, A stove: heat, A well: water"),
    ("People use {} to", "scissors: cut paper, a pen: write, a broom: sweep the floor, a key: open a lock, an oven: bake bread, "
     "a kettle: boil water, a needle: sew clothes, a phone: call a friend, a ladder: reach a roof, a clock: tell the time, "
     "a pillow: rest the head, a spoon: eat soup"),
    ("{} can", "Birds: fly, Fish: swim, Fire: burn wood, Magnets: attract iron, Doctors: treat patients, Pilots: steer aeroplanes, "
     "Knives: cut bread, Cars: drive on roads, Bakers: bake bread, Snakes: crawl"),
    ("A thing made of {} would be", "glass: brittle, feathers: light, lead: heavy, ice: cold, rubber: elastic, silk: soft, steel: hard, "
     "cardboard: stiff"),
    ("If {}, it will", "ice lies in the sun: melt, a stone falls into a pond: sink, wood lies in a fire: burn, "
     "a plant gets no water: wither, a glass falls onto a stone floor: shatter, water boils for hours: evaporate, "
     "a balloon meets a needle: burst, iron lies in the rain: rust"),
    ("{} is found on the continent of", "Brazil: South America, India: Asia, Nigeria: Africa, France: Europe, Canada: North America, "
     "China: Asia, Sweden: Europe, Egypt: Africa, Argentina: South America, Mexico: North America, "
     "Kenya: Africa, Japan: Asia, Poland: Europe, Peru: South America"),
    ("{}, counted:", "Legs on a spider: eight, Days in a week: seven, Sides of a triangle: three, Hours in a day: twenty-four, "
     "Minutes in an hour: sixty, Months in a year: twelve, Wheels on a bicycle: two, Corners of a square: four, "
     "Letters in the English alphabet: twenty-six, Fingers on a hand: five"),
    ("People say that {} because", "the desert is hard to live in: it has little water, a fridge keeps food fresh: it is cold inside, "
     "a lamp helps at night: it gives light, gold costs much: there is little of it, a cactus needs little rain: it stores water, "
     "a wool coat is warm: it holds air, an owl hunts well at night: its eyes see in the dark, a boat floats: it weighs less than its "
     "water, a plant stands at the window: it needs light, ice is slippery: its surface melts, a shout echoes in a cave: its walls reflect "
     "sound, the moon shines: the sun lights it, bread rises: yeast makes gas in it, a ball bounces: it is elastic, "
     "leaves are green: they hold chlorophyll, the sea tastes bad: it is salty, a bat finds its way: it hears echoes, "
     "metal spoons get hot in soup: metal conducts heat"),
)
NEGATIVE_TWINS = (  # negative as it stands, the plain twin, the plain twin's answer, the wrong choice
    ("A desert is rarely", "A desert is usually", "dry", "wet"), ("Summer days are rarely", "Summer days are usually", "warm", "icy"),
    ("A snail is unable to", "A snail is able to", "crawl", "gallop"), ("A stone is unable to", "A stone is able to", "fall", "speak"),
    ("It is unusual to wear in winter", "It is usual to wear in winter", "a coat", "a swimsuit"),
    ("It is unusual to eat for breakfast", "It is usual to eat for breakfast", "bread", "candles"),
    ("A fish out of water is unlikely to", "A fish out of water is likely to", "die", "sing"),
    ("A hungry wolf is unlikely to eat", "A hungry wolf is likely to eat", "a sheep", "a brick"),
    ("A car is incapable of", "A car is capable of", "carrying people", "laying eggs"),
    ("A child is incapable of", "A child is capable of", "running", "flying"),
    ("Trees are never found in", "Trees are often found in", "forests", "volcanoes"),
    ("Nobody drinks", "Everybody drinks", "water", "sand"), ("A book has no", "A book has", "pages", "engine"),
    ("At midnight people rarely see", "At midnight people often see", "stars", "the sun"),
    ("It is impossible to cut with a knife", "It is possible to cut with a knife", "bread", "the wind"),
)


def builtin_rows():
    """Our own questions, each with its plain twin → rows as of read_rows; by the negator, answers B and A in turn as in the paper's."""
    negator, made = Negator(), []
    for question, line in TABLES:
        pairs = [pair.split(": ") for pair in line.split(", ")]
        for i, (subject, gold) in enumerate(pairs):
            wrong = next(other for _, other in pairs[i + 1 :] + pairs if other != gold)
            plain = question.format(subject)
            negated, rule, _ = negator(plain)
            made.append((negated, plain, gold, wrong, rule))
    made += [(*twin, negator(twin[0])[1]) for twin in NEGATIVE_TWINS]
    return [dict(question=negated, choices=[gold, wrong] if i % 2 == 0 else [wrong, gold], answer=1 - i % 2, plain=plain, rule=rule)
            for i, (negated, plain, gold, wrong, rule) in enumerate(made)]


def check_row(row, where):
    """A row: question (str), choices (two str), answer (0 or 1), or one line that says what is wrong."""
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        fail(f"{where}: no question")
    if not isinstance(row.get("choices"), list) or len(row["choices"]) != 2:
        fail(f"{where}: NeQA's questions have two choices, this one {row.get('choices')!r}")
    if row.get("answer") not in (0, 1):
        fail(f"{where}: answer is {row.get('answer')!r}, not 0 or 1")
    return row


def read_jsonl(path):
    rows = []
    for i, line in enumerate(path.read_text("utf-8").splitlines()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            fail(f"{path}, line {i + 1}: not JSON")
    return rows


def read_prize(path):
    """The Inverse Scaling Prize's CSV (prompt, classes, answer_index) → rows. Its prompt is the zero-shot one."""
    rows = []
    for i, line in enumerate(csv.DictReader(io.StringIO(path.read_text("utf-8")))):
        if not {"prompt", "classes", "answer_index"} <= set(line):
            fail(f"{path}: the columns are {', '.join(map(str, line))}; prompt, classes and answer_index are needed")
        found = re.search(r"Question: (.*)\nA\. (.*)\nB\. (.*)\nAnswer:\Z", line["prompt"], re.S)
        try:
            classes = ast.literal_eval(line["classes"])
        except (ValueError, SyntaxError):
            classes = None
        if not found or classes != [" A", " B"] or line["answer_index"] not in ("0", "1"):
            fail(f"{path}, row {i + 1}: not a question with the choices A and B")
        rows.append(dict(question=found[1], choices=[found[2], found[3]], answer=int(line["answer_index"])))
    return rows


def read_twins(folder):
    """The 100 questions with plain twins (neqa_100*.jsonl, from a folder, or by download where it is None) → rows. normalized:
    (plain, negated) without the slot, for task 2."""
    names = ["neqa_100", "neqa_100_nonnegated", "neqa_100_normalized_nonnegated", "neqa_100_normalized"]
    files = [folder / f"{name}.jsonl" if folder else download(f"{RAW}eval_pipeline/{name}.jsonl") for name in names]
    for path in files:
        if not path.is_file():
            fail(f"{path} is missing: the four files neqa_100*.jsonl belong together")
    tables = [read_jsonl(path) for path in files]
    if len({len(table) for table in tables}) != 1:
        fail(f"{files[0].parent}: the files neqa_100*.jsonl have {', '.join(str(len(table)) for table in tables)} rows")
    rows = []
    for i, (negated, plain, plain_normalized, normalized) in enumerate(zip(*tables)):
        for path, row in zip(files, (negated, plain, plain_normalized, normalized)):
            check_row(row, f"{path}, row {i + 1}")
        if plain["choices"] != negated["choices"] or plain["answer"] == negated["answer"]:
            fail(f"{files[1]}, row {i + 1}: not the twin of {files[0].name}: the choices must be the same and the answers differ")
        rows.append(dict(negated, plain=plain["question"], rule="twin", normalized=(plain_normalized["question"], normalized["question"])))
    return rows


def read_rows(data):
    """--data → rows: question, choices, answer, rule, and plain (the twin's question) where there is one."""
    path = Path(data)
    if data == "builtin":
        return builtin_rows()
    if data == "neqa100" or path.is_dir():
        return read_twins(path if path.is_dir() else None)
    if data == "neqa":
        path = download(RAW + "data_pipeline/neqa.jsonl")
    if not path.is_file():
        fail(f"--data {data}: no such file or folder, and none of builtin, neqa, neqa100")
    rows = read_prize(path) if path.suffix == ".csv" else read_jsonl(path)
    if not rows:
        fail(f"{path} holds no question")
    for i, row in enumerate(rows):
        about = check_row(row, f"{path}, row {i + 1}").get("metadata") or {}
        row.setdefault("rule", about.get("negation_rule") or about.get("dataset") or "–")
        row.setdefault("plain", None)
    return rows


# ============================================================================================== the laboratory: a world with a rare "not"

SUBJECTS, ATTRIBUTES, FILLERS = 40, 20, 16  # a sentence: subject, attribute, adverb; the adverb is a filler or, rarely, "not"
NOT = SUBJECTS + ATTRIBUTES + FILLERS  # the last token
HEADS = 2
GRID = {0.0003: (4, 8, 16, 32, 64), 0.03: (4, 8, 16, 32, 64, 128), 0.3: (4, 8, 16, 32, 64)}  # share of "not": widths


def n_parameters(d, layers):
    return (NOT + 1) * d + 3 * d + layers * (8 * d * d + 7 * d) + 2 * d + 2


def init_models(seeds, d, layers):
    """Weights of len(seeds) transformers of width d, {name: (models, …)}, each model drawn from its own seed."""
    shapes = {"tokens": (NOT + 1, d), "positions": (3, d), "head": (d, 2)}
    for i in range(layers):
        shapes |= {f"{i}.qkv": (d, 3 * d), f"{i}.out": (d, d), f"{i}.up": (d, 2 * d), f"{i}.down": (2 * d, d)}
    weights = {}
    generators = [torch.Generator().manual_seed(counter_seed(seed, 0)) for seed in seeds]
    for name, size in shapes.items():
        std = 0.5 if name in ("tokens", "positions") else size[0] ** -0.5
        weights[name] = torch.stack([torch.randn(size, generator=generator) * std for generator in generators])
        if name not in ("tokens", "positions"):
            weights[f"{name}.bias"] = torch.zeros(len(seeds), 1, size[1])
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def forward_models(weights, sentences, layers):
    """sentences: (models, batch, 3) token ids → logits (models, batch, 2), false and true. A GPT for each model, with the layer norms'
    parameters left out, and in the last layer the last token alone."""
    models, batch, _ = sentences.shape
    d = weights["tokens"].shape[-1]

    def linear(x, name):
        return torch.baddbmm(weights[f"{name}.bias"], x.flatten(1, -2), weights[name]).unflatten(1, x.shape[1:-1])

    def norm(x):
        return F.layer_norm(x, (d,))

    offsets = torch.arange(models)[:, None, None] * (NOT + 1)
    x = F.embedding(sentences + offsets, weights["tokens"].flatten(0, 1)) + weights["positions"][:, None]  # (models, batch, 3, d)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    for i in range(layers):
        q, k, v = linear(norm(x), f"{i}.qkv").unflatten(-1, (3 * HEADS, -1)).transpose(2, 3).chunk(3, 2)  # (models, batch, head, 3, …)
        if i == layers - 1:
            x, q = x[:, :, -1:], q[..., -1:, :]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(~causal[-q.shape[-2]:], -math.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(2, 3).flatten(3), f"{i}.out")
        x = x + linear(F.gelu(linear(norm(x), f"{i}.up"), approximate="tanh"), f"{i}.down")
    return linear(norm(x), "head")[:, :, 0]


def truth_table(seed):
    """Which subject has which attribute: (SUBJECTS, ATTRIBUTES) of 0 and 1."""
    return torch.randint(2, (SUBJECTS, ATTRIBUTES), generator=torch.Generator().manual_seed(counter_seed(seed, 1)))


def draw_sentences(table, seed, share, steps, batch):
    """→ sentences (steps, batch, 3) and labels (steps, batch) of one model: the table's entry, turned where the adverb is "not"."""
    rng = torch.Generator().manual_seed(counter_seed(seed, 2))
    subject, attribute, filler = (torch.randint(n, (steps, batch), generator=rng) for n in (SUBJECTS, ATTRIBUTES, FILLERS))
    negated = torch.rand(steps, batch, generator=rng) < share
    adverb = torch.where(negated, NOT, SUBJECTS + ATTRIBUTES + filler)
    return torch.stack([subject, SUBJECTS + attribute, adverb], -1), truth_table(table)[subject, attribute] ^ negated


@torch.no_grad()
def measure_models(weights, seeds, layers):
    """Exact, over all subjects, attributes and fillers → for each model t1, s (the flip rate: "not" changes the answer), neqa,
    composed and covariance (2·Cov): neqa = composed + covariance."""
    pairs = torch.cartesian_prod(torch.arange(SUBJECTS), SUBJECTS + torch.arange(ATTRIBUTES))
    adverbs = SUBJECTS + ATTRIBUTES + torch.arange(FILLERS + 1)
    sentences = torch.cat([pairs[:, None].expand(-1, FILLERS + 1, -1), adverbs[None, :, None].expand(len(pairs), -1, -1)], -1)
    said = forward_models(weights, sentences.flatten(0, 1).expand(len(seeds), -1, -1), layers).argmax(-1).unflatten(1, (-1, FILLERS + 1))
    results = []
    for seed, answer in zip(seeds, said):
        true = truth_table(seed).flatten()[:, None]
        right, turned = (answer[:, :-1] == true).double(), (answer[:, -1:] != answer[:, :-1]).double()
        t1, s = float(right.mean()), float(turned.mean())
        results.append(dict(t1=t1, s=s, neqa=float((answer[:, -1:] != true).double().mean()), composed=compose(t1, s),
                            covariance=float(covariance_term(right, turned))))
    return results


def train_models(job):
    """job: dict of d, layers, steps, models [(share, seed), …], batch → a list of results, one for each model and checkpoint. All
    models of a width train at once, each on its own stream; the loss is the sum of theirs, so none knows of the others."""
    d, layers, steps, batch = job["d"], job["layers"], job["steps"], job.get("batch", 256)
    torch.set_flush_denormal(True)
    keys = [counter_seed(seed, d, round(share * 1e6)) for share, seed in job["models"]]  # weights and stream
    tables = [seed for _, seed in job["models"]]
    weights = init_models(keys, d, layers)
    streams = [draw_sentences(table, key, share, steps, batch) for (share, table), key in zip(job["models"], keys)]
    sentences, labels = (torch.stack(parts, 1) for parts in zip(*streams))  # (steps, models, batch, …)
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=0.0, fused=True)
    results, started = [], time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, (steps - step) / max(1, steps - 50))
        logits = forward_models(weights, sentences[step], layers)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[step].flatten(), reduction="sum") / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step + 1 in (steps // 2, steps):
            for (share, seed), measured in zip(job["models"], measure_models(weights, tables, layers)):
                results.append(dict(d=d, parameters=n_parameters(d, layers), share=share, seed=seed, step=step + 1, **measured))
    return dict(results=results, seconds=time.process_time() - started)


# ============================================================================================== the model, as in sophia.py


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False  # in linear layers and layer norms; OpenAI's weights have them
    scale_attn_by_layer: bool = False  # divide attention logits of layer i by i + 1 as well


GPT_SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=128),
    "30M": dict(n_layer=6, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


class SelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.scale = (config.n_embd // config.n_head) ** -0.5 / (layer + 1 if config.scale_attn_by_layer else 1)

    def forward(self, x, cache=None):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        if cache is not None:  # (batch, head, seq, head_dim) of every token so far, this layer's pair at cache[layer]
            if len(cache) > self.layer:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer : self.layer + 1] = [(k, v)]
        n_query, n_key = q.size(2), k.size(2)
        mask = None
        if 1 < n_query < n_key:  # several new tokens after a cached prefix: query i sees keys up to its own position
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=x.device).tril(n_key - n_query)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n_query == n_key, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, head tied to the token embedding. Module names are nanoGPT's."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"GPT: width {config.n_embd} is not a multiple of {config.n_head} heads")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, idx, cache=None):
        """idx: (batch, seq) int64 → (batch, seq, n_embd), all but the head. cache: a list, empty at first, that keeps every
        layer's keys and values; later calls pass only the new tokens."""
        start = cache[0][0].size(2) if cache else 0
        if start + idx.size(1) > self.config.block_size:
            raise ValueError(f"GPT: {start + idx.size(1)} tokens exceed the context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start : start + idx.size(1)]
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx, cache=None):
        """idx: (batch, seq) int64 → logits (batch, seq, vocab_size)."""
        return self.lm_head(self.trunk(idx, cache))

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's public weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded once (0.5 to 6 GB)."""
        if not name.startswith("gpt2"):
            fail(f"there are public weights of {', '.join(size for size in GPT_SIZES if size.startswith('gpt2'))}, none of {name}")
        url = f"https://huggingface.co/openai-community/{name}/resolve/main/model.safetensors"
        return cls(GPTConfig(**GPT_SIZES[name], vocab_size=50257, bias=True)).load_openai(read_safetensors(download(url)))

    def load_openai(self, weights):
        """Copy OpenAI's tensors, {name: tensor}, into this model (bias=True, vocab_size=50257). KeyError names a missing one."""
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        with torch.no_grad():
            for name, p in self.transformer.named_parameters():
                w = weights[name]
                if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                    w = w.t()  # OpenAI's Conv1D keeps (in, out)
                if w.shape != p.shape:
                    raise ValueError(f"GPT: {name} is {tuple(w.shape)} in the file and {tuple(p.shape)} in the model")
                p.copy_(w)
        return self


# ------------------------------------------------------------------- the model client, the same in lost_in_middle.py and neqa.py

# A request is a dict of id (a str of its own), prompt (str) and either max_tokens (int: generate greedily; logprobs=N: give the N
# likeliest first tokens too; stop: a list of str that end the answer) or choices (a list of str: score each as the prompt's
# continuation). Other keys are the caller's. An answer is a dict of id and text, logprobs {token: log-probability} or scores
# [log-probability of each choice, nats], with usage; or of skipped="overflow" where the model's window is too short; or of error.
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses that pass
BACKOFF, TRIES = 1.0, 8  # seconds before the second try, doubled at each further one up to 60, and drawn from 0 to that


def client_flags(flag):
    """The flags that `ask` reads. flag: parser.add_argument."""
    flag("--model", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (public weights, run here); http or http:NAME (an OpenAI-compatible "
         "server: OpenAI, vLLM, Ollama, llama.cpp); echo:… (a fake of known accuracy)")
    flag("--base_url", default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"), help="http: the server, as "
         "http://127.0.0.1:8011/v1 (environment: OPENAI_BASE_URL)")
    flag("--api", choices=("completions", "chat"), default="completions", help="http: /completions, or /chat/completions with the "
         "prompt as one user message")
    flag("--api_key_env", default="OPENAI_API_KEY", help="http: the environment variable that holds the key")
    flag("--concurrency", type=number(int, 1, 256), default=8, help="http: calls under way at once")
    flag("--timeout", type=number(float, 0.1), default=120.0, help="http: seconds to wait for an answer")
    flag("--price_in", type=number(float, 0), default=0.0, help="dollars for a million prompt tokens")
    flag("--price_out", type=number(float, 0), default=0.0, help="dollars for a million answer tokens")
    flag("--max_prompt_tokens", type=number(int, 1), default=5_000_000, help="http: a run that sends more than this needs --yes")
    flag("--yes", action="store_true", help="http: yes, send them all")
    flag("--dry_run", action="store_true", help="print calls, tokens, cost and one whole prompt; ask nothing")
    flag("--refresh", action="store_true", help="ask again what is in the cache")


class ServerError(Exception):
    """What a server answered instead of an answer; args: status (0: no connection, or nothing that can be read), its message."""


def post(url, body, key="", timeout=120.0, patient=True):
    """JSON to url → JSON back. What may pass is tried again, at the time that Retry-After names or after a random, growing wait;
    where patient is false a server that is not there is not waited for. body None: GET. Raises ServerError."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    for attempt in range(TRIES):
        wait = random.uniform(0, min(60.0, BACKOFF * 2**attempt))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            status, message, after = error.code, error.read().decode(errors="replace"), error.headers.get("Retry-After")
            try:
                message = json.loads(message)
                message = message.get("error", message)
                message = message.get("message", message) if isinstance(message, dict) else message
            except (ValueError, AttributeError):
                message = message or error.reason
            if status not in RETRIED:
                break
            if after:
                try:
                    wait = float(after)
                except ValueError:
                    wait = max(0.0, (email.utils.parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, a timeout, half a reply, no JSON
            status, message = 0, f"{type(error).__name__}: {error}"
            if not patient and isinstance(error, urllib.error.URLError):
                break
        if attempt < TRIES - 1:
            time.sleep(wait)
    message = " ".join(str(message).split())[:400]
    raise ServerError(status, message.replace(key, "[key]") if key else message)


def first_token(choice):
    """{token: log-probability} at the first generated position, from the shape of /completions or that of /chat/completions, which
    some servers give at the other address; empty where there is none."""
    shape = choice.get("logprobs") or {}
    if shape.get("content"):
        first = shape["content"][0]
        return {entry["token"]: entry["logprob"] for entry in [first, *(first.get("top_logprobs") or [])]}
    top = (shape.get("top_logprobs") or [None])[0] or {}
    return {**top, **dict(zip((shape.get("tokens") or [])[:1], (shape.get("token_logprobs") or [])[:1]))}


def echoed(choice, text, start):
    """Log-probability of text[start:] after text[:start], from a reply that echoes text with its log-probabilities. ValueError
    where the reply does not hold them: a server that leaves echo out would otherwise score every choice alike."""
    shape = choice.get("logprobs") or {}
    tokens, logprobs = shape.get("tokens"), shape.get("token_logprobs")
    if shape.get("content"):
        tokens, logprobs = zip(*((entry["token"], entry["logprob"]) for entry in shape["content"]))
    if not tokens or not choice.get("text", "").startswith(text):
        raise ValueError("the server does not echo the prompt with its log-probabilities")
    offsets = shape.get("text_offset") or np.cumsum([0, *map(len, tokens)]).tolist()
    if offsets[0] != 0 or len(tokens) < 2 or None in logprobs[1:]:
        raise ValueError("the server gives no log-probabilities of the prompt")
    picked = [logprob for offset, logprob in zip(offsets, logprobs) if start <= offset < len(text)]
    if not picked or None in picked:
        raise ValueError(f"the server's tokens do not part at {text[start:]!r}")
    return sum(picked)


class Server:
    """Answers requests by an OpenAI-compatible server. The key is read from the environment and goes nowhere else."""

    def __init__(self, args, name):
        self.url, self.api, self.timeout = args.base_url.rstrip("/"), args.api, args.timeout
        self.key, self.changes, self.key_env = os.environ.get(args.api_key_env, ""), {}, args.api_key_env
        if not self.url.startswith(("http://", "https://")):
            fail(f"--base_url {self.url} is no address: http://127.0.0.1:8011/v1 is one")
        self.name = name or self.only_model()
        self.where = [self.url, self.api, self.name]

    def only_model(self):
        """The name of the server's only model."""
        try:
            models = [model["id"] for model in post(f"{self.url}/models", None, self.key, self.timeout, patient=False)["data"]]
        except (ServerError, KeyError, TypeError) as error:
            fail(f"no list of models at {self.url}/models ({self.explain(error)}): name one, as in --model http:NAME")
        if len(models) != 1:
            fail(f"{self.url} has {len(models)} models: name one, as in --model http:{models[0] if models else 'NAME'} "
                 f"({', '.join(models[:10])})")
        return models[0]

    def explain(self, error):
        if not isinstance(error, ServerError):
            return str(error)
        status, message = error.args
        cure = {0: f"; is the server running at {self.url}?", 401: f"; the key is read from ${self.key_env}",
                404: "" if self.url.endswith("/v1") else "; addresses mostly end in /v1"}.get(status, "")
        return f"{f'status {status}: ' if status else ''}{message}{cure}"

    def call(self, request, patient, **extra):
        body = dict(model=self.name, max_tokens=request.get("max_tokens", 1), temperature=0, top_p=1, **extra)
        if self.api == "chat":
            body["messages"] = [dict(role="user", content=body.pop("prompt"))]
        while True:
            for old, new in self.changes.items():
                if old in body:
                    value = body.pop(old)
                    body.update({new: value} if new else {})
            try:
                return post(f"{self.url}/{'chat/completions' if self.api == 'chat' else 'completions'}", body, self.key, self.timeout,
                            patient)
            except ServerError as error:  # some models refuse a parameter: leave it out, or take the name that they want
                refused = [name for name in ("max_tokens", "temperature", "top_p") if name in body and name in str(error.args[1])]
                if error.args[0] != 400 or not refused or is_overflow(error):
                    raise
                self.changes[refused[0]] = "max_completion_tokens" if refused[0] == "max_tokens" else None
                print(f"{self.name} refuses {refused[0]}: asked without it ({error.args[1]})", file=sys.stderr)

    def answer(self, request, patient=True):
        usage, top = dict(prompt_tokens=0, completion_tokens=0), request.get("logprobs")

        def add_up(reply):
            for name in usage:
                usage[name] += (reply.get("usage") or {}).get(name) or 0
            return reply["choices"][0]

        if "choices" in request:
            if self.api == "chat":
                fail("a chat endpoint gives no log-probability of a given text: use --api completions, or score what is generated")
            scores = []
            for text in (request["prompt"] + choice for choice in request["choices"]):
                choice = add_up(self.call({}, patient, prompt=text, echo=True, logprobs=1))
                scores.append(echoed(choice, text, len(request["prompt"])))
            return dict(scores=scores, usage=usage)
        extra = dict(prompt=request["prompt"], **({"stop": request["stop"]} if request.get("stop") else {}))
        if top:
            extra.update(dict(logprobs=True, top_logprobs=top) if self.api == "chat" else dict(logprobs=top))
        choice = add_up(self.call(request, patient, **extra))
        text = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content") or ""
        answer = dict(text=text, finish=choice.get("finish_reason"), usage=usage)
        if top:
            answer["logprobs"] = first_token(choice)
            if not answer["logprobs"]:
                raise ValueError("the server gives no log-probabilities")
        return answer


def is_overflow(error):
    """Does this ServerError say that the prompt is longer than the model's window?"""
    status, message = error.args
    return status in (400, 413, 422, 500) and bool(re.search(r"(?i)context.{0,40}(length|window|size)|maximum.{0,20}(context|length)|"
                                                             r"(exceed|too long).{0,60}(context|token)", message))


class Local:
    """Answers requests by a GPT in this process. What a prompt shares with the one before is not read again: its keys and values
    are still in the cache."""

    def __init__(self, model, encode, decode, name):
        self.model, self.encode, self.decode, self.where = model.eval(), encode, decode, ["local", name]
        self.ids, self.cache = [], []

    def read(self, ids, n):
        """Log-probabilities (n, vocab) of what follows each of the last n ids."""
        shared = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        shared = min(shared, len(ids) - n)
        self.cache[:] = [(k[:, :, :shared], v[:, :, :shared]) for k, v in self.cache] if shared else []
        with torch.inference_mode():
            new = torch.tensor([ids[shared:]], device=self.model.lm_head.weight.device)
            logits = self.model.lm_head(self.model.trunk(new, self.cache)[0, -n:])
            self.ids = list(ids)
            return logits.float().log_softmax(-1)

    def answer(self, request, patient=True):
        prompt, window = self.encode(request["prompt"]), self.model.config.block_size
        choices = [self.encode(choice) for choice in request.get("choices", ())]
        longest = max([request.get("max_tokens", 0), *map(len, choices)])
        usage = dict(prompt_tokens=len(prompt), completion_tokens=0)
        if len(prompt) + longest > window:
            return dict(skipped="overflow", usage=usage, detail=f"{len(prompt)} + {longest} tokens, window {window}")
        if choices:
            return dict(usage=usage, scores=[self.read((prompt + ids)[:-1], len(ids)).gather(
                1, torch.tensor(ids, device=self.model.lm_head.weight.device)[:, None]).sum().item() for ids in choices])
        ids, text, top = list(prompt), "", {}
        while len(ids) < len(prompt) + request["max_tokens"]:
            logprobs = self.read(ids, 1)[0]
            if len(ids) == len(prompt):
                best = logprobs.topk(request.get("logprobs") or 1)
                top = {self.decode([token]): value for value, token in zip(best.values.tolist(), best.indices.tolist())}
            ids.append(int(logprobs.argmax()))
            text = self.decode(ids[len(prompt):])
            stops = [text.index(stop) for stop in request.get("stop") or () if stop in text]
            if stops or ids[-1] == 50256:  # GPT-2's end of text
                text = text[: min(stops, default=len(text))].removesuffix("<|endoftext|>")
                break
        usage["completion_tokens"] = len(ids) - len(prompt)
        return dict(text=text, usage=usage, **({"logprobs": top} if request.get("logprobs") else {}))


class Echo:
    """Answers requests by the caller's function of (what stands after "echo:", request) → a text, {token: log-probability} of the
    first token, or a list of scores."""

    def __init__(self, function, spec):
        self.function, self.spec, self.where = function, spec, ["echo", spec]

    def answer(self, request, patient=True):
        said = self.function(self.spec, request)
        name = {list: "scores", dict: "logprobs"}.get(type(said), "text")
        return {"text": "", name: said, "usage": dict(prompt_tokens=0, completion_tokens=0)}


def connect(args, device, name, echo=None):
    """--model's name → a Server, Local or Echo."""
    kind, _, rest = (name or "").partition(":")
    if kind == "http":
        return Server(args, rest)
    if kind == "echo" and echo:
        return Echo(echo, rest)
    if kind not in GPT_SIZES or not kind.startswith("gpt2"):
        fail(f"--model {name}: choose from {', '.join(size for size in GPT_SIZES if size.startswith('gpt2'))}, http, http:NAME, echo:…")
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets through whatever its downloader raises
        fail(f"--model {name} needs tiktoken's one-time download of gpt2 ({type(error).__name__}); --model http and echo:… do not")
    return Local(GPT.from_pretrained(name).to(device), gpt2.encode_ordinary, gpt2.decode, name)


def announce(args, requests):
    """Calls, tokens and dollars to come, from at most 200 of the requests; stops here on --dry_run."""
    sample = requests[:: -(-len(requests) // 200)]
    try:
        import tiktoken

        gpt2, how = tiktoken.get_encoding("gpt2"), "counted as GPT-2 does"
        sizes = [sum(len(gpt2.encode_ordinary(r["prompt"] + choice)) for choice in r.get("choices", ("",))) for r in sample]
    except Exception:  # no download of tiktoken's here
        sizes, how = [sum(len(r["prompt"] + choice) for choice in r.get("choices", ("",))) / 4 for r in sample], "characters / 4"
    total, answers = sum(sizes) / len(sample) * len(requests), sum(request.get("max_tokens", 0) for request in requests)
    cost = (total * args.price_in + answers * args.price_out) / 1e6
    if args.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            calls = sum(len(request.get("choices", ("",))) for request in requests)
            print(f"{requests[0]['prompt']}\n\n{calls:,} calls to {args.model}: about {total:,.0f} prompt tokens ({how}), the longest "
                  f"{max(sizes):,.0f}, and at most {answers:,} answer tokens: at most about ${cost:.2f}. Above is one prompt. Nothing "
                  "was asked.")
        raise SystemExit(0)
    if "http" in args.model and total > args.max_prompt_tokens and not args.yes:
        fail(f"this sends about {total:,.0f} prompt tokens to {args.base_url}, about ${cost:.2f}: add --yes, or ask for less")


def read_answers(out):
    """{key: answer} of every whole line of out/answers*.jsonl; a line that a killed run left torn is not counted."""
    answers = {}
    for path in sorted(out.glob("answers*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                answer = json.loads(line)
                answers[answer["key"]] = answer
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    print(f"{path}: a torn line is left out", file=sys.stderr)
    return answers


def ask(args, model, requests, out):
    """→ an answer for each request, in order. Every answer is appended to out/answers.jsonl as it comes, so that a killed run goes
    on where it stopped and a finished one asks nothing. Under torchrun the ranks share the requests, each with a file of its own."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    fields = ("prompt", "max_tokens", "choices", "stop", "logprobs", *(["id"] if isinstance(model, Echo) else []))
    keys = [hashlib.sha256(json.dumps([model.where, [request.get(name) for name in fields]]).encode()).hexdigest()
            for request in requests]
    out.mkdir(parents=True, exist_ok=True)
    known = {} if args.refresh else read_answers(out)
    todo = [i for i in dict(zip(reversed(keys), reversed(range(len(keys))))).values() if keys[i] not in known]
    if todo:
        announce(args, [requests[i] for i in sorted(todo)])
    if world > 1:
        dist.barrier()  # all have read the cache before one writes
    todo = sorted(todo)[rank::world]
    fresh, started = {}, time.time()
    work, done = queue.SimpleQueue(), queue.SimpleQueue()

    def answer(i, patient=True):
        try:
            return model.answer(requests[i], patient)
        except ServerError as error:
            return dict(skipped="overflow", detail=error.args[1]) if is_overflow(error) else dict(error=model.explain(error))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # a reply of another shape
            return dict(error=f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error))

    def loop():
        while True:
            i = work.get()
            done.put((i, answer(i)))

    first = answer(todo[0], patient=False) if isinstance(model, Server) and todo else None  # alone: a wrong key, name or address
    if first and "error" in first:  # would fail every call
        fail(f"{model.name} at {model.url}: {first['error']}")
    path = out / f"answers{f'.{rank}' if world > 1 else ''}.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    try:
        with open(path, "a") as file, tqdm(total=len(todo), desc=model.where[-1], disable=args.quiet or rank > 0) as bar:
            file.write("\n" * torn)

            def keep(i, result):
                fresh[keys[i]] = dict(key=keys[i], id=requests[i]["id"], model=model.where[-1], time=round(time.time(), 3), **result)
                if "error" not in result:  # what failed is asked again next time
                    file.write(json.dumps(fresh[keys[i]]) + "\n")
                    file.flush()
                bar.update()

            if first:
                keep(todo[0], first)
                for _ in range(min(args.concurrency, len(todo))):
                    threading.Thread(target=loop, daemon=True).start()
                for i in todo[1:]:
                    work.put(i)
                for _ in todo[1:]:
                    keep(*done.get())
            else:
                for i in todo:
                    keep(i, answer(i))
    except KeyboardInterrupt:
        fail(f"stopped; {len(fresh)} new answers are in {path}: run the command again to go on")
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, fresh)
        fresh = {key: value for share in shares for key, value in share.items()}
    answers = [fresh.get(key) or known[key] for key in keys]
    if rank == 0 and not args.quiet:
        used = [sum(answer.get("usage", {}).get(name, 0) for answer in fresh.values()) for name in ("prompt_tokens", "completion_tokens")]
        failed, skipped = (sum(name in answer for answer in answers) for name in ("error", "skipped"))
        print(f"{model.where[-1]}: {len(fresh):,} answers asked, {len(requests) - len(fresh):,} from {out}; {used[0]:,} prompt and "
              f"{used[1]:,} answer tokens, ${(used[0] * args.price_in + used[1] * args.price_out) / 1e6:.2f}, "
              f"{time.time() - started:.0f} s; {skipped:,} too long for the window, {failed:,} failed", file=sys.stderr)
    return [{**answer, "id": request["id"]} for answer, request in zip(answers, requests)]


# ============================================================================================== the same in every file

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()


def fail(message):
    """For what a user can mend: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an int or a float from low to high, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def set_up(args):
    """Seeds, device, dtype and torchrun's process group → (device, dtype, rank, world)."""
    rank, world, local = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if args.device == "auto" else args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here, {best} can ({str(error).splitlines()[0]})")
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    torch.set_float32_matmul_precision("high")
    return device, dtype, rank, world


def download(url, sha256=""):
    """Fetch url into the cache, once, and return its path. A broken download goes on where it stopped; a file counts only when
    its length and, where given, its sha256 (a prefix will do) are right."""
    path = CACHE / url.split("://")[1]
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as reply, open(part, "ab" if reply.status == 206 else "wb") as file:
            length = int(reply.headers.get("Content-Length") or 0) + file.tell()
            with tqdm(total=length, initial=file.tell(), unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 20):
                    bar.update(file.write(chunk))
    except OSError as error:
        if getattr(error, "code", 0) == 416:  # nothing is left to send, yet the file never passed the checks below
            part.unlink()
        fail(f"no download of {url} ({error}): try again, or fetch it elsewhere and put it at {path}")
    if part.stat().st_size < length:
        fail(f"{url} broke off at {part.stat().st_size:,} of {length:,} bytes: run the command again to go on")
    with open(part, "rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
            part.unlink()
            fail(f"{url} has another sha256 than {sha256}: removed")
    os.replace(part, path)
    return path


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, a JSON header, then raw memory."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
              "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    raw = np.memmap(path, np.uint8, "c")
    try:
        start = 8 + int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: torch.from_numpy(raw[start + about["data_offsets"][0] : start + about["data_offsets"][1]])
                .view(dtypes[about["dtype"]]).view(about["shape"]) for name, about in header.items()}
    except (ValueError, KeyError, RuntimeError) as error:
        fail(f"{path} is not a whole safetensors file ({error})")


def save_results(folder, args, figures):
    """folder/results.json: the command, git revision, versions, device, seed and every figure of the table. Returns its path."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()} CPU"
    about = dict(command=" ".join(["python", *sys.argv]), revision=git.stdout.strip() or "unknown", torch=torch.__version__,
                 python=platform.python_version(), device=device, seed=args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    strict = json.loads(json.dumps(dict(**about, **figures)), parse_constant=str)  # JSON has no NaN and no Infinity
    (folder / "results.json").write_text(json.dumps(strict, indent=1))
    return folder / "results.json"


def print_table(header, rows):
    """Rows of strings and numbers as aligned plain text, first column left, the others right."""
    rows = [[f"{x:.3f}" if isinstance(x, float) and x == x else "–" if x != x else str(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), sep="  ")


def counter_seed(*counter):
    """A random seed below 2^31 that depends on the counter alone."""
    return int(np.random.default_rng(counter).integers(2**31))


# ============================================================================================== experiments


def shared_out(jobs, args):
    """train_models of every job → all results, and the CPU seconds: shared out among torchrun's ranks, or among two processes."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    alone = world > 1 or len(jobs) == 1
    with (nullcontext() if alone else ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,))) as pool:
        bar = tqdm(total=len(jobs[rank::world]), desc=args.task, unit="width", disable=args.quiet or rank > 0)
        done = []
        with bar:
            for job in (pool.map if pool else map)(train_models, jobs[rank::world]):
                done.append(job)
                bar.update()
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, done)
        done = [job for share in shares for job in share]
    rows = sorted((row for job in done for row in job["results"]), key=lambda r: (r["share"], r["step"], r["d"], r["seed"]))
    return rows, sum(job["seconds"] for job in done)


def curves_of(rows, share, step, name):
    """→ parameters (sizes,) and name's values (sizes, seeds) of one share of "not" and one checkpoint."""
    rows = [row for row in rows if (row["share"], row["step"]) == (share, step)]
    sizes = sorted({row["parameters"] for row in rows})
    return np.array(sizes), np.array([[row[name] for row in rows if row["parameters"] == size] for size in sizes])


def lab(args):
    """Section 5 from scratch: what a network of growing size makes of a "not" that is rare, less rare and common."""
    *_, rank, _ = set_up(args)
    out = Path(args.out or "out/neqa/lab")
    grid = {share: widths[:5] for share, widths in GRID.items()} if args.quick else GRID
    layers, seeds = 2 if args.quick else 3, range(args.seed, args.seed + args.seeds)
    widths = [d for d in sorted({d for widths in grid.values() for d in widths}, reverse=True) if d <= args.max_width]
    jobs = [dict(d=d, layers=layers, steps=args.steps, models=[(share, seed) for share in grid if d in grid[share] for seed in seeds])
            for d in widths]
    rows, seconds = shared_out(jobs, args)
    if rank:
        return
    table, shapes = [], {}
    for share in grid:
        for step in (args.steps // 2, args.steps):
            sizes, neqa = curves_of(rows, share, step, "neqa")
            named, each = shape(neqa.mean(1)), [shape(curve) for curve in neqa.T]
            shapes[f"{share:g}, {step} steps"] = dict(mean=named, seeds=each)
        for i, size in enumerate(sizes):
            means = {name: curves_of(rows, share, args.steps, name)[1][i].mean() for name in ("t1", "s", "composed", "covariance")}
            table.append((f"{share:g}" if i == 0 else "", f"{size:,}", *(means[name] for name in ("t1", "s")), neqa[i].mean(),
                          " ".join(f"{value:.2f}" for value in neqa[i]), means["composed"], f"{means['covariance']:+.3f}"))
    print_table(('share of "not"', "parameters", "task 1", "s (flips)", "NeQA", "each seed", "composed", "+ 2 Cov"), table)
    print(f'\n{args.steps} steps, {layers} layers; chance is 0.5. Exact, over all {SUBJECTS * ATTRIBUTES} facts; NeQA = composed + 2 Cov.')
    for name, found in shapes.items():
        print(f"{name}: {found['mean']} (mean of seeds); {Counter(found['seeds']).get(found['mean'], 0)} of {len(seeds)} seeds alone")
    print("s at the smallest widths is disagreement by chance, not understanding. These are small networks in a made world: they show how "
          "the shapes can come about, not that GPT-3's came about so.")
    print(f"{seconds:.0f} CPU seconds of training", save_results(out, args, dict(rows=rows, shapes=shapes, cpu_seconds=seconds)),
          plot_lab(out, args, rows, list(grid)), sep="\n")


def compose_task(args):
    """Figure 5: one line for task 1, three places for the transition of task 2, three shapes."""
    set_up(args)
    out, x = Path(args.out or "out/neqa/compose"), np.linspace(-10, 10, 100)
    t1 = 0.75 + 0.025 * x
    curves = {x0: compose(t1, sigmoid(x - x0)) for x0 in args.transitions}
    table = [(f"{x0:g}", shape(y), float(y[0]), f"{y.min():.3f} at {x[y.argmin()]:+.2f}", float(y[-1])) for x0, y in curves.items()]
    print_table(("transition of s at", "shape", "smallest", "lowest", "largest"), table)
    print("\nt1 = 0.75 + 0.025 x, s = σ(x − transition), x from −10 to 10 (the paper's simulation has its transition at 0).")
    print(save_results(out, args, dict(x=x.tolist(), curves={f"{x0:g}": y.tolist() for x0, y in curves.items()}, table=table)),
          plot_compose(out, args, x, t1, curves), sep="\n")


def size_of(name):
    """Parameters of a model by its name: GPT-2's, or …-270m, …-7b; nan where it does not say."""
    known = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
    found = re.search(r"(?i)(\d+(?:\.\d+)?)([mb])(?![a-z])", name)
    return known.get(name) or (float(found[1]) * {"m": 1e6, "b": 1e9}[found[2].lower()] if found else math.nan)


def known_reader(spec):
    """echo:t1=0.8,s=0.3 → (t1, s)."""
    try:
        known = {name: float(value) for name, value in (part.split("=") for part in spec.split(","))}
        return known["t1"], known["s"]
    except (ValueError, KeyError):
        fail(f"--model echo:{spec}: write echo:t1=0.8,s=0.3")


def echo_reader(spec, request):
    """--model echo:t1=0.8,s=0.3: knows the plain answer of a share t1 of the questions, turns it on a share s of the negated ones, and
    sees the two sentences of task 2 differ with (1 + s)/2."""
    t1, s = known_reader(spec)
    knows, turns = (counter_seed(request["row"], n) / 2**31 < p for n, p in ((1, t1), (2, s)))
    right = {"task1": knows, "neqa": knows == turns, "task2": counter_seed(request["row"], 3) / 2**31 < (1 + s) / 2}[request["task"]]
    pick = request["gold"] if right else 1 - request["gold"]
    if "choices" in request:
        return [-1.0 if j == pick else -100.0 for j in range(2)]
    if request.get("logprobs"):
        return {f" {'AB'[j]}": math.log(0.9 if j == pick else 0.1) for j in range(2)}
    return f" So the answer is {'AB'[pick]}."


def build_requests(args, rows, task, mode, n_top):
    """All requests of a task, (row, order) by (row, order); order 1 shows the choices the other way round."""
    requests, kind = [], args.prompt
    for i, row in enumerate(rows):
        for order in range(2 if args.debias else 1):
            question, choices, gold = row["question"], row["choices"], row["answer"]
            if task == "task1":
                question, gold = row["plain"], 1 - row["answer"]
            if task == "task2":
                plain, negated = row.get("normalized") or (row["plain"], row["question"])
                swap = (i + order) % 2 == 1
                prompt, shown = build_task2(plain, negated, choices[1 - gold], swap, "hint" in kind), ("the same", "different")
                gold_shown = 0 if swap else 1
                bare = prompt[: prompt.rindex("\nA. ")] + "\nAnswer:"
            else:
                shown = choices[::-1] if order else choices
                question = "" if args.choices_only else question
                prompt, gold_shown = build_prompt(kind, question, shown), gold ^ order
                bare = f"{HEADER}\n\nQuestion: {question}\nAnswer:"
            request = dict(id=f"{task}/{i}/{order}", prompt=prompt, task=task, row=i, order=order, gold=gold_shown)
            if mode == "option":
                request |= dict(prompt=bare, choices=[f" {text}" for text in (shown if task != "task2" or not swap else shown[::-1])])
            elif mode == "chain" and task != "task2":
                request |= dict(max_tokens=200, stop=["\n\n"])
            else:
                request |= dict(max_tokens=10 if mode == "text" else 1, **({} if mode == "text" else dict(logprobs=n_top)))
            requests.append(request)
    return requests


def judge(request, answer, mode, surface=False):
    """→ margin of the choice shown as A over that shown as B (0: undecided), did it say anything that can be read?, strict: the likeliest
    token is a letter, and the right one."""
    if "scores" in answer:
        a, b = (score / max(1, len(text)) for score, text in zip(answer["scores"], request["choices"]))  # a character's mean
        return a - b, True, None
    if "logprobs" in answer:
        first = letter_logprobs({max(answer["logprobs"], key=answer["logprobs"].get): 0.0} if answer["logprobs"] else {})
        top = None if max(first) < 0 else int(first[1] == 0)
        seen = max(letter_logprobs(answer["logprobs"], surface)) > -math.inf
        return letter_margin(answer["logprobs"], surface), seen, top == request["gold"]
    pick = read_chain(answer["text"])[0] if mode == "chain" else read_letter(answer["text"])
    return 0.0 if pick is None else 1.0 - 2 * pick, pick is not None, None


def score_task(args, rows, requests, answers, mode):
    """→ for each row None (not answered) or dict of right, pick (the choice of the row, 0 or 1, −1 none), shown_a, seen, strict."""
    n_orders = 2 if args.debias else 1
    judged = []
    for i in range(len(rows)):
        pairs = list(zip(requests, answers))[i * n_orders : (i + 1) * n_orders]
        if any("error" in answer or "skipped" in answer for _, answer in pairs):
            judged.append(None)
            continue
        found = [judge(request, answer, mode, args.surface) for request, answer in pairs]
        margin = found[0][0] if n_orders == 1 else (found[0][0] - found[1][0]) / 2
        seen = all(entry[1] for entry in found)
        pick = -1 if mode in ("text", "chain") and not seen else int(margin < 0) if margin else counter_seed(args.seed, i) % 2
        judged.append(dict(right=int(pick == pairs[0][0]["gold"]), pick=pick, shown_a=pick == 0, seen=seen, strict=found[0][2]))
    return judged


def summary(rows, judged):
    """Counts and shares of one task; by: right answers and number, for each rule."""
    kept = [(row, entry) for row, entry in zip(rows, judged) if entry]
    if not kept:
        return None
    n, k = len(kept), sum(entry["right"] for _, entry in kept)
    by = {rule: [sum(e["right"] for r, e in kept if r["rule"] == rule), sum(r["rule"] == rule for r, _ in kept)]
          for rule in dict.fromkeys(row["rule"] for row, _ in kept)}
    strict = [entry["strict"] for _, entry in kept if entry["strict"] is not None]
    return dict(k=k, n=n, accuracy=k / n, interval=wilson(k, n), strict=sum(strict) / n if strict else None,
                share_a=sum(e["shown_a"] for _, e in kept) / n, missing=1 - sum(e["seen"] for _, e in kept) / n, by=by)


def twin_figures(rows, neqa, task1, seed, draws=2000):
    """From questions answered with and without the negation: t1, flip rate s, composed, 2·Cov, and NeQA − task 1 with its 95 % interval,
    by drawing question texts anew (rows that share a text go together)."""
    both = [(row, a, b) for row, a, b in zip(rows, neqa, task1) if a and b and a["pick"] >= 0 and b["pick"] >= 0]
    if not both:
        return None
    right = np.array([b["right"] for *_, b in both])
    turned = np.array([a["pick"] != b["pick"] for _, a, b in both])
    gaps, texts = np.array([a["right"] - b["right"] for _, a, b in both]), {}
    groups = np.array([texts.setdefault(row["question"], len(texts)) for row, *_ in both])
    totals, sizes = np.bincount(groups, gaps), np.bincount(groups)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(draws, len(sizes)))
    low, high = np.quantile(totals[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    t1, s = float(right.mean()), float(turned.mean())
    return dict(n=len(both), t1=t1, s=s, composed=compose(t1, s), covariance=float(covariance_term(right, turned)),
                difference=float(gaps.mean()), interval=(float(low), float(high)))


def evaluate_negation(args):
    """Figures 2 to 4 for any model: NeQA, and where the questions have plain twins, task 1, task 2 and the composition."""
    device, _, rank, _ = set_up(args)
    out, rows = Path(args.out or "out/neqa/eval"), read_rows(args.data or "builtin")[: args.limit]
    mode = {"auto": "logprob"}.get(args.score, args.score) if args.prompt != "cot" else "chain"
    if args.debias and mode in ("text", "chain"):
        fail("--debias averages log-probabilities of both orders: it goes with --score logprob or option, not with written answers")
    if not args.model:
        fail("--model is missing: gpt2 (or several, as gpt2,gpt2-medium), http, or echo:t1=0.8,s=0.3")
    names = re.split(r",(?!s=)", args.model)
    if args.sizes and len(args.sizes) != len(names):
        fail(f"--sizes names {len(args.sizes)} sizes for {len(names)} models")
    twins = [row for row in rows if row.get("plain")]
    sets = {"neqa": rows, **({"task1": twins, "task2": twins} if len(twins) == len(rows) else {})}
    sets = {task: those for task, those in sets.items() if task in args.tasks}
    if not sets:
        fail(f"--tasks {','.join(args.tasks)}: these questions have no plain twins; builtin and neqa100 have")
    models, notes, failed = [], [], 0
    for i, name in enumerate(names):
        model = connect(args, device, name, echo_reader)
        if isinstance(model, Echo):
            known_reader(model.spec)
        n_top = args.top_logprobs or (5 if args.api == "completions" else 20) if isinstance(model, Server) else 50
        requests = {task: build_requests(args, those, task, mode, n_top) for task, those in sets.items()}
        answers = iter(ask(args, model, [request for task in requests.values() for request in task], out))
        judged, figures = {}, dict(model=model.where[-1], size=args.sizes[i] if args.sizes else size_of(model.where[-1]))
        for task, those in sets.items():
            got = [next(answers) for _ in requests[task]]
            failed += sum("error" in answer for answer in got)
            if mode == "chain" and task != "task2" and (both := sum(read_chain(answer.get("text", ""))[1] for answer in got)):
                notes.append(f"{model.where[-1]}, {task}: {both} of {len(got)} chains name both letters; the last one counts")
            task_mode = "logprob" if mode == "chain" and task == "task2" else mode
            judged[task] = score_task(args, those, requests[task], got, task_mode)
            figures[task] = summary(those, judged[task])
        if {"neqa", "task1"} <= set(judged):
            figures["twins"] = twin_figures(rows, judged["neqa"], judged["task1"], args.seed)
        models.append(figures)
    if rank:
        return
    table = []
    for figures in models:
        for task in sets:
            if found := figures[task]:
                low, high = found["interval"]
                table.append((figures["model"] if task == next(iter(sets)) else "", task, found["n"], found["accuracy"],
                              f"{low:.2f}-{high:.2f}", "–" if found["strict"] is None else found["strict"], found["share_a"],
                              found["missing"]))
                if found["missing"] > 0.05:
                    notes.append(f"{figures['model']}, {task}: {found['missing']:.0%} of the answers name neither letter; its accuracy "
                                 "says little")
        if twin := figures.get("twins"):
            predicted = ""
            if figures.get("task2"):
                s2 = understanding(figures["task2"]["accuracy"])
                predicted = f"; s by task 2 = {s2:.2f}: " + (f"composed {compose(twin['t1'], s2):.3f}" if s2 >= 0 else "no probability")
            notes.append(f"{figures['model']}: turns {twin['s']:.2f} of its answers; composed {twin['composed']:.3f} "
                         f"{twin['covariance']:+.3f} (2 Cov) = NeQA{predicted}; NeQA − task 1 = {twin['difference']:+.3f} "
                         f"({twin['interval'][0]:+.2f} to {twin['interval'][1]:+.2f})")
    if not table:
        fail(f"not one answer could be scored ({failed} failed, the others did not fit the model's window)")
    print_table(("model", "task", "questions", "accuracy", "95 % (Wilson)", "strict", "says A", "neither"), table)
    print("", *notes, sep="\n")
    if args.by_rule:
        print_table(("model and rule", "right", "questions", "accuracy", "95 %"), [
            (f"{figures['model']}, {rule}", k, n, k / n, "{:.2f}-{:.2f}".format(*wilson(k, n))) for figures in models
            for rule, (k, n) in figures[next(iter(sets))]["by"].items()])
    sized = sorted((f for f in models if f["size"] == f["size"] and f.get("neqa")), key=lambda f: f["size"])
    if len(sized) >= 3:
        p, n = (np.array([f["neqa"][key] for f in sized]) for key in ("accuracy", "n"))
        print(f"over size, NeQA is {shape(p, np.sqrt(p * (1 - p) / n))}")
    for figures in models:
        figures["size"] = figures["size"] if figures["size"] == figures["size"] else None
    path = save_results(out, args, dict(data=args.data or "builtin", prompt=args.prompt, score=mode, debias=args.debias, models=models))
    print(path, plot_eval(out, args, models, list(sets)), sep="\n")
    if failed:
        raise SystemExit(1)


def export_rows(path, rows):
    """.csv: the Inverse Scaling Prize's form (prompt, classes, answer_index); else JSON lines."""
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("", "prompt", "classes", "answer_index"))
            writer.writerows((i, build_prompt("zeroshot", row["question"], row["choices"]), "[' A', ' B']", row["answer"])
                             for i, row in enumerate(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def negate_task(args):
    """Negate a text file, line by line, or an OpenBookQA .jsonl, which becomes two-choice questions; without a file: the built-in set."""
    set_up(args)
    out, negator, rng, rows, dropped = Path(args.out or "out/neqa/negate"), Negator(), np.random.default_rng(args.seed), [], []
    out.mkdir(parents=True, exist_ok=True)
    if not args.file:
        rows = builtin_rows()
    elif args.file.endswith(".jsonl"):
        for i, line in enumerate(read_jsonl(Path(args.file))):
            try:
                stem, options = line["question"]["stem"], {choice["label"]: choice["text"] for choice in line["question"]["choices"]}
                gold = options.pop(line["answerKey"])
                wrong = list(options.values())[rng.integers(len(options))]
            except (KeyError, TypeError, ValueError):
                fail(f"{args.file}, line {i + 1}: not an OpenBookQA row: question.stem, question.choices with label and text, answerKey")
            negated, rule, turned = negator(stem)
            if negated is None:
                dropped.append((stem, rule))
                continue
            answer = 1 - len(rows) % 2  # B and A in turn, as in the paper's set
            right, other = (wrong, gold) if turned else (gold, wrong)
            rows.append(dict(question=negated, choices=[right, other] if answer == 0 else [other, right], answer=answer,
                             plain=stem if turned else None, rule=rule))
    else:
        lines = sys.stdin if args.file == "-" else Path(args.file).read_text("utf-8").splitlines()
        for line in filter(None, map(str.strip, lines)):
            negated, rule, turned = negator(line)
            dropped += [(line, rule)] if negated is None else []
            print(f"{rule}\t{negated if negated is not None else line}")
            rows += [] if negated is None else [dict(question=negated, plain=line if turned else None, rule=rule)]
    if not rows:
        fail(f"{args.file}: nothing to negate")
    asked = "choices" in rows[0]
    path = out / f"negated.{args.export if asked else 'jsonl'}"
    export_rows(path, rows)
    if asked:
        for row in rows[:: max(1, len(rows) // 10)][:10]:
            print(f"{row['rule']}\t{row['question']}")
    print()
    print_table(("rule", "questions"), sorted(Counter(row["rule"] for row in rows).items(), key=lambda pair: -pair[1]))
    for text, why in dropped[:5]:
        print(f"left out: {text} ({why})")
    print(f"{len(rows)} negated, {len(dropped)} left out", save_results(out, args, dict(
        rules=Counter(row["rule"] for row in rows), left_out=[list(pair) for pair in dropped])), path, sep="\n")


def read_measured(path):
    """An eval's results.json, or a CSV with columns model, size, n, task1, task2, neqa (accuracies) → rows of those, smallest first."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such file")
    try:
        if path.suffix == ".json":
            rows = [dict(model=m["model"], size=float(m["size"]), n=m["neqa"]["n"], task1=m["task1"]["accuracy"],
                         task2=m["task2"]["accuracy"], neqa=m["neqa"]["accuracy"]) for m in json.loads(path.read_text())["models"]]
        else:
            rows = [dict(model=r["model"], **{key: float(r[key]) for key in ("size", "n", "task1", "task2", "neqa")})
                    for r in csv.DictReader(io.StringIO(path.read_text()))]
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{path}: needs model, size, n and the accuracies task1, task2, neqa of every model ({type(error).__name__}: {error})")
    for row in rows:
        if not (row["size"] > 0 and row["n"] >= 1 and all(0 <= row[t] <= 1 for t in ("task1", "task2", "neqa"))):
            fail(f"{path}, {row['model']}: size and n must be positive, accuracies between 0 and 1")
    if len({row["size"] for row in rows}) < 3:
        fail(f"{path} has {len({row['size'] for row in rows})} sizes: a curve needs three or more")
    return sorted(rows, key=lambda row: row["size"])


def fit(args):
    """t1 and s fitted to measured models, the composed curve against measured NeQA, and where s turns."""
    set_up(args)
    if not args.file:
        fail("fit needs a file: the results.json of eval with three or more models, or a CSV of model, size, n, task1, task2, neqa")
    out, rows = Path(args.out or "out/neqa/fit"), read_measured(args.file)
    x, n = np.log10([row["size"] for row in rows]), np.array([row["n"] for row in rows])
    share = {task: np.array([row[task] for row in rows]) for task in ("task1", "task2", "neqa")}
    if np.ptp(share["task2"]) == 0:
        fail(f"{args.file}: all models have task2 = {share['task2'][0]:g}: there is no transition to fit")
    used = slice(0, len(rows) - 1 if args.held_out else None)
    if args.held_out and len(rows) < 4:
        fail("--held_out leaves the largest model out of the fit: it needs four sizes or more")
    curves = fit_curves(x[used], {task: (p * n)[used] for task, p in share.items()}, n[used], args.draws, args.seed)
    predicted = curves["predicted"](x)
    print_table(("model", "parameters", "task 1", "s = 2·a2 − 1", "NeQA", "predicted"), [
        (row["model"], f"{row['size']:.3g}", row["task1"], understanding(row["task2"]), row["neqa"], float(p))
        for row, p in zip(rows, predicted)])
    low, high = curves["x0_interval"]
    ends = [f"10^{end:.2f}" if math.isfinite(end) else "beyond the sizes" for end in (low, high)]
    error = np.sqrt(share["neqa"] * (1 - share["neqa"]) / n)
    print(f"\ns turns at 10^{curves['x0']:.2f} parameters (95 %: {ends[0]} to {ends[1]}); predicted against measured NeQA: root mean "
          f"square {curves['rmse']:.3f}; misfit of task 1 {curves['misfit_t1']:.3f}, of s {curves['misfit_s']:.3f}")
    print(f"NeQA over size is {shape(share['neqa'], error)}; the predicted curve {shape(predicted)}")
    if args.held_out:
        print(f"{rows[-1]['model']}, left out of the fit: predicted {predicted[-1]:.3f}, measured {share['neqa'][-1]:.3f}")
    found = {key: value for key, value in curves.items() if not callable(value)}
    print(save_results(out, args, dict(rows=rows, predicted=predicted.tolist(), **found)), plot_fit(out, args, x, share, curves), sep="\n")


def suggest(text, good, negated):
    """A sentence and what it suggests, always true: the paper's fine-tuning text."""
    text = text.strip()
    text += "" if text.endswith((".", "!", "?")) else "."
    return f"{text} This does {'not ' if negated else ''}suggest that it is {'good' if good != negated else 'bad'}."


def read_reviews(data):
    """(sentence, label) pairs → (training, test): SST-2 by download, or a .tsv with columns sentence and label (the last tenth tests)."""
    if data:
        path = Path(data)
        if not path.is_file():
            fail(f"--data {data}: no such file")
        parts = [path.read_text("utf-8")]
    else:
        with zipfile.ZipFile(download(SST2)) as archive:
            parts = [archive.read(f"SST-2/{name}.tsv").decode() for name in ("train", "dev")]
    tables = []
    for text in parts:
        lines = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
        if not lines or not {"sentence", "label"} <= set(lines[0]) or any(line["label"] not in ("0", "1") for line in lines):
            fail(f"{data or SST2}: needs the columns sentence and label (0 or 1), parted by tabs")
        tables.append([(line["sentence"], int(line["label"])) for line in lines])
    return tables if len(tables) == 2 else (tables[0][: len(tables[0]) * 9 // 10], tables[0][len(tables[0]) * 9 // 10 :])


def finetune(args):
    """Figure 6: fine-tune on true sentences, a share of them negated, and ask with and without the negation."""
    device, dtype, rank, world = set_up(args)
    out, (train, test) = Path(args.out or "out/neqa/finetune"), read_reviews(args.data)
    train, test, results, seq = train[: args.limit], test[: args.limit or 872], [], 128
    for name in (args.model or "gpt2").split(","):
        for share in args.ratios:
            if name == "tiny":
                torch.manual_seed(args.seed)
                reader = Local(GPT(GPTConfig(512, 256, n_layer=2, n_head=4, n_embd=64, bias=True)).to(device),
                               lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace"), "tiny")
            else:
                reader = connect(args, device, name)
            if not isinstance(reader, Local):
                fail("finetune needs weights: --model gpt2, gpt2-medium, gpt2-large, gpt2-xl, or tiny (random, on bytes)")
            negated = np.random.default_rng((args.seed, 1)).random(len(train)) < share
            text = "\n".join(suggest(sentence, label == 1, turned) for (sentence, label), turned in zip(train, negated))
            ids = torch.tensor(reader.encode(text))
            if len(ids) <= seq:
                fail(f"{len(ids)} tokens are too few for one block of {seq}")
            blocks = ids[: len(ids) // seq * seq].view(-1, seq)
            lr = args.lr or (1e-3 if name == "tiny" else 2e-5)
            optimizer = torch.optim.AdamW(reader.model.parameters(), lr=lr, weight_decay=0.01)
            per_step = args.batch_size * world
            steps = max(1, args.epochs * len(blocks) // per_step)
            order = torch.cat([torch.randperm(len(blocks), generator=torch.Generator().manual_seed(counter_seed(args.seed, e)))
                               for e in range(args.epochs + per_step // len(blocks) + 1)])
            for step in tqdm(range(steps), f"{name}, share {share:g}", disable=args.quiet or rank > 0):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / steps)
                rows = blocks[order[step * per_step + rank : (step + 1) * per_step : world]].to(device)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = F.cross_entropy(reader.model(rows)[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                if world > 1:
                    for p in reader.model.parameters():
                        dist.all_reduce(p.grad)
                        p.grad /= world
                optimizer.step()
            right, turned, strict = [], [], 0
            for sentence, label in test:
                picks = []
                for negation in (False, True):
                    prompt = suggest(sentence, label == 1, negation)
                    prompt, wanted = prompt[: prompt.rindex(" ")], prompt[prompt.rindex(" ") : -1]
                    scores = reader.answer(dict(prompt=prompt, choices=[" good", " bad"]))["scores"]
                    picks.append(int(scores[1] > scores[0]))
                    if negation:
                        said = reader.answer(dict(prompt=prompt, max_tokens=5 if name == "tiny" else 1))["text"]
                        strict += bool(re.match(rf"{wanted}(?![a-z])", said))
                right.append(picks[0] == 1 - label)
                turned.append(picks[0] != picks[1])
            t1, s = float(np.mean(right)), float(np.mean(turned))
            size = sum(p.numel() for p in reader.model.parameters())
            results.append(dict(model=name, size=size, ratio=share, steps=steps, n=len(test), t1=t1, s=s, composed=compose(t1, s),
                                neqa=float(np.mean(np.equal(right, turned))), strict=strict / len(test)))
    if rank == 0:
        print_table(("model", "share negated", "steps", "task 1", "s (flips)", "negated", "composed", "negated, strict"), [
            (r["model"], f"{r['ratio']:g}", r["steps"], r["t1"], r["s"], r["neqa"], r["composed"], r["strict"]) for r in results])
        print(f"{len(test)} test sentences", save_results(out, args, dict(results=results)), plot_finetune(out, args, results), sep="\n")


def report(args):
    """One table and figure from several evals: report out/a/results.json out/b/results.json."""
    set_up(args)
    out, models, tasks = Path(args.out or "out/neqa/report"), [], ("neqa", "task1", "task2")
    for name in [args.file, *args.more]:
        if not name or not Path(name).is_file():
            fail(f"report needs results.json files of eval{f': {name} is not there' if name else ''}")
        try:
            found = json.loads(Path(name).read_text())
            models += [{**model, "model": f"{model['model']} {found['prompt']}"} for model in found["models"]]
        except (ValueError, KeyError, TypeError):
            fail(f"{name} is not the results.json of an eval")
    lines = ["| model and prompt | NeQA | task 1 | task 2 | flips | composed |", "|---|---|---|---|---|---|"]
    for model in models:
        cells = [f"{model[t]['accuracy']:.3f} ({model[t]['interval'][0]:.2f}-{model[t]['interval'][1]:.2f})" if model.get(t) else "–"
                 for t in tasks]
        twin = model.get("twins")
        cells += [f"{twin['s']:.2f}", f"{twin['composed']:.3f}"] if twin else ["–", "–"]
        lines.append(f"| {model['model']} | {' | '.join(cells)} |")
    print("\n".join(lines))
    print(save_results(out, args, dict(models=models)), plot_eval(out, args, models, list(tasks)), sep="\n")


# ============================================================================================== figures


def figure(out, name, args, draw, **size):
    """draw(axes) on a matplotlib figure saved as out/name → its path, or "no figure" with --no_plot."""
    if args.no_plot:
        return "no figure (--no_plot)"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(constrained_layout=True, **size)
    draw(axes)
    fig.savefig(out / name, dpi=120)
    plt.close(fig)
    return out / name


def plot_lab(out, args, rows, shares):
    def draw(axes):
        titles = ("negated questions (dashed: composed from t1 and s)", "task 1: plain questions", 'task 2: answers that "not" turns')
        for ax, name, title in zip(axes, ("neqa", "t1", "s"), titles):
            for i, share in enumerate(shares):
                sizes, values = curves_of(rows, share, args.steps, name)
                ax.plot(sizes, values, color=f"C{i}", lw=0.7, alpha=0.5)
                ax.plot(sizes, values.mean(1), color=f"C{i}", lw=2.2, marker="o", label=f'"not" in {100 * share:g} % of the sentences')
                if name == "neqa":
                    ax.plot(sizes, curves_of(rows, share, args.steps, "composed")[1].mean(1), "--", color=f"C{i}", lw=1.2)
            ax.axhline(0.5, color="grey", lw=0.8)
            ax.set(xscale="log", xlabel="parameters", title=title, ylim=(-0.02, 1.02))
        axes[0].set_ylabel(f"accuracy after {args.steps} steps (thin: each seed)")
        axes[0].legend(loc="upper left", fontsize=8)

    return figure(out, "lab.png", args, draw, ncols=3, figsize=(14, 4.2))


def plot_compose(out, args, x, t1, curves):
    def draw(ax):
        ax.plot(x, t1, color="black", lw=1, label="task 1")
        for i, (x0, y) in enumerate(curves.items()):
            ax.plot(x, sigmoid(x - x0), ":", color=f"C{i}", lw=1)
            ax.plot(x, y, color=f"C{i}", lw=2, label=f"transition at {x0:g}: {shape(y)}")
        ax.axhline(0.5, color="grey", lw=0.8)
        ax.set(xlabel="log size, arbitrary units", ylabel="accuracy (dotted: s)", title="t1·s + (1 − t1)·(1 − s)")
        ax.legend()

    return figure(out, "compose.png", args, draw, figsize=(7, 4.5))


def plot_eval(out, args, models, tasks):
    def draw(ax):
        sized = all(model["size"] for model in models) and len({model["size"] for model in models}) == len(models) > 1
        for i, task in enumerate(tasks):
            those = sorted(((model["size"] if sized else j, model[task]) for j, model in enumerate(models) if model.get(task)),
                           key=lambda pair: pair[0])
            if those:
                x, y = np.array([pair[0] for pair in those]), np.array([found["accuracy"] for _, found in those])
                ends = np.abs(np.array([found["interval"] for _, found in those]).T - y)
                ax.errorbar(x if sized else x + 0.1 * (i - 1), y, ends, fmt="o-" if sized else "o", capsize=3, color=f"C{i}",
                            label={"neqa": "negated", "task1": "task 1: plain", "task2": "task 2: same or different"}[task])
        ax.axhline(0.5, color="grey", lw=0.8)
        ax.set(ylim=(0, 1), ylabel="accuracy (95 %, Wilson)", title="negated and plain questions")
        if sized:
            ax.set(xscale="log", xlabel="parameters")
        else:
            ax.set_xticks(range(len(models)), [model["model"] for model in models], rotation=15)
            ax.set_xlim(-0.6, len(models) - 0.4)
        ax.legend()

    return figure(out, "eval.png", args, draw, figsize=(7, 4.5))


def plot_fit(out, args, x, share, curves):
    def draw(ax):
        at = np.linspace(x.min() - 0.2, x.max() + 0.2, 200)
        for i, (label, measured, fitted) in enumerate((("task 1", share["task1"], curves["t1"]), ("s", understanding(share["task2"]),
                                                       curves["s"]), ("NeQA", share["neqa"], curves["predicted"]))):
            ax.plot(10**x, measured, "o", color=f"C{i}", label=f"{label}, measured")
            composed = label == "NeQA"
            ax.plot(10**at, fitted(at), color=f"C{i}", lw=1 + composed, label=f"{label}, {'composed' if composed else 'fitted'}")
        ax.axhline(0.5, color="grey", lw=0.8)
        ax.set(xscale="log", xlabel="parameters", ylabel="accuracy, s", title="task 1 and s fitted, NeQA predicted")
        ax.legend(fontsize=8)

    return figure(out, "fit.png", args, draw, figsize=(7, 4.5))


def plot_finetune(out, args, results):
    def draw(ax):
        for i, share in enumerate(dict.fromkeys(r["ratio"] for r in results)):
            rows = sorted((r for r in results if r["ratio"] == share), key=lambda r: r["size"])
            for key, style in (("neqa", "o-"), ("t1", "s:"), ("composed", "--")):
                ax.plot([r["size"] for r in rows], [r[key] for r in rows], style, color=f"C{i}",
                        label=f"{share:g} negated: {dict(neqa='negated', t1='task 1', composed='composed')[key]}")
        ax.axhline(0.5, color="grey", lw=0.8)
        ax.set(xscale="log", xlabel="parameters", ylabel="accuracy", ylim=(0, 1), title="fine-tuned on a share of negated sentences")
        ax.legend(fontsize=7)

    return figure(out, "finetune.png", args, draw, figsize=(7, 4.5))


# ============================================================================================== command line

TASKS = {"lab": lab, "eval": evaluate_negation, "negate": negate_task, "compose": compose_task, "fit": fit, "finetune": finetune,
         "report": report}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count, share = parser.add_argument, number(int, 1), number(float, 0, 1)

    def several(kind):
        def parse(text):
            return [kind(part) for part in text.split(",")]

        parse.__name__ = f"list of {kind.__name__}"
        return parse

    flag("task", nargs="?", choices=TASKS, default="lab", help="lab (the default): small networks of growing size; eval: any model on "
         "negated questions, their plain twins and task 2; negate: your own questions; compose: the formula; fit: measured models; "
         "finetune: the paper's simulation with GPT-2 and SST-2; report: several evals in one table")
    flag("file", nargs="?", help="negate: a text file of questions, - for standard input, or OpenBookQA's .jsonl; fit, report: "
         "results.json")
    flag("more", nargs="*", help="report: further results.json files")
    flag("--data", help="eval: builtin (the default, ours), neqa (1,718 questions) or neqa100 (100 with twins) by download, a .jsonl of "
         "question, choices, answer, a .csv in the Inverse Scaling Prize's form, a folder with neqa_100*.jsonl; finetune: a .tsv of "
         "sentence, label instead of SST-2")
    flag("--tasks", type=several(str), default=["neqa", "task1", "task2"], help="eval: of neqa,task1,task2 (all; the last two need twins)")
    flag("--prompt", choices=PROMPTS, default="zeroshot", help="eval: the paper's prompts; task 2 has zeroshot and, for both hints, hint")
    flag("--score", choices=("auto", "logprob", "text", "option"), default="auto", help="eval: log-probability of the letters (auto), the "
         "letter that it writes, or a character's mean log-probability of each choice's text; cot is read from the text")
    flag("--top_logprobs", type=count, help="eval, http: ask for so many log-probabilities (5, or 20 with --api chat: OpenAI's limits; "
         "servers of one's own give more)")
    flag("--surface", action="store_true", help='eval: "A." and "A)" count as A too')
    flag("--debias", action="store_true", help="eval: ask in both orders and average: takes out a preference for a letter")
    flag("--choices_only", action="store_true", help="eval: leave the question out (a control: 0.5 is what it should give)")
    flag("--by_rule", action="store_true", help="eval: accuracy by kind of negation")
    flag("--limit", type=count, help="eval: the first so many questions; finetune: sentences")
    flag("--sizes", type=several(number(float, 1)), help="eval: parameters of the models, in their order (else from their names)")
    client_flags(flag)
    flag("--quick", action="store_true", help="lab: two layers, at most width 64: half the time")
    flag("--seeds", type=count, default=3, help="lab: tables, weights and streams, from --seed on")
    flag("--steps", type=number(int, 2), default=400, help="lab: of 256 sentences")
    flag("--max_width", type=number(int, 16), default=128, help="lab: leave out wider networks")
    flag("--transitions", type=several(number(float, -1e3, 1e3)), default=[-8.0, 0.0, 14.0], help="compose: where s turns")
    flag("--held_out", action="store_true", help="fit: without the largest model, which is then predicted")
    flag("--draws", type=number(int, 100, 100_000), default=1000, help="fit: bootstrap draws")
    flag("--export", choices=("jsonl", "csv"), default="jsonl", help="negate: csv is the Inverse Scaling Prize's form")
    flag("--ratios", type=several(share), default=[0.0, 0.05, 0.3], help="finetune: shares of negated sentences")
    flag("--epochs", type=count, default=3, help="finetune: the paper's trainer's default")
    flag("--batch_size", type=count, default=8, help="finetune: blocks of 128 tokens a process and step")
    flag("--lr", type=number(float, 0), help="finetune: 2e-5 (the paper's), falling to 0 in a line; tiny: 1e-3")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="finetune: of matmuls; auto: bfloat16 on cuda")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of tables, weights, streams, ties and bootstrap")
    flag("--out", help="folder for results, answers and figures (out/neqa/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if unknown := set(args.tasks) - {"neqa", "task1", "task2"}:
        fail(f"--tasks {','.join(sorted(unknown))}: choose from neqa, task1, task2")
    if args.file and args.task not in ("negate", "fit", "report"):
        fail(f"{args.task} takes no '{args.file}'")
    return args


def main():
    args = parse_args()
    try:
        TASKS[args.task](args)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while another goes on can abort at its exit
            dist.destroy_process_group()
    except KeyboardInterrupt:
        fail("stopped")
    except OSError as error:
        fail(f"{error.filename or error}: {error.strerror or type(error).__name__}")


if __name__ == "__main__":
    main()
