"""NeQA: how negation shapes scaling curves (Zhang, Yasunaga, Zhou, HaoChen, Zou, Liang, Yeung; 2023; arXiv 2305.17311).

The problem. A two-choice question is negated ("The capital of France is not": Rome, or Paris?), so that its answer is
the choice that is wrong without the negation. With size some language models get worse at it (inverse scaling), some
worse and then better (a U), some better. Why three shapes from one task?

The idea. Two abilities are composed. Task 1: answer the plain question, right with probability t1. Task 2: understand
that the negation turns the answer, with probability s; who misses it answers the plain question. If the two are
independent (`compose`, `understanding`),

    P(right) = t1·s + (1 − t1)·(1 − s)                 s = 2·a2 − 1,  a2 the accuracy of a two-choice test of task 2

While s is near 0 the score is 1 − t1: it falls as the model gets to know more. It rises when s does. Prompts and model
families that move the rise of s to smaller models turn inverse into U into positive. Without independence the score is
that plus 2·Cov(right on the plain question, turns its answer), exactly (`covariance_term`).

How to run it.

    python neqa.py                                 the laboratory: networks of growing size in a world with a rare "not"
    python neqa.py eval --model NAME --base_url http://127.0.0.1:8000/v1     any OpenAI-compatible server
    python neqa.py negate own.jsonl                your own question, choices, answer → negated questions with twins
    python neqa.py eval --model NAME --size 7e9 --data out/neqa/negate/negated.jsonl
    python neqa.py fit A/results.json B/results.json C/results.json    the shape, t1 and s over three sizes or more
    python neqa.py compose                         the formula's three shapes

What we measured. `python neqa.py` (seeds 0 to 2, chance ½, torch 2.13, one CPU thread, 97 s of CPU). NeQA is exact,
over 400 facts; s is measured on the 400 others, so that the second line of a share is a prediction:

    parameters                               2,362   7,794   27,874   104,898
    "not" in 0.03 % of the sentences, NeQA    .381    .082     .032      .003       inverse, in 3 of 3 seeds
      predicted from t1 and s                 .415    .124     .039      .001
    2 %                                       .386    .274     .514      .553       U, 2 of 3 seeds
      predicted                               .419    .314     .537      .569
    30 %                                      .511    .720     .972      .993       positive, 3 of 3 seeds
      predicted                               .503    .680     .970     1.000

The falling arm is task 1 being learnt (t1 .63, .93, 1, 1) while s is low; the rising arm is s alone. The prediction
errs by at most .043, where models are small: there knowing and turning are not independent. We took 2 % because it
shows a U (at 3 % the fall was .03, too little to be named); its right arm only reaches chance in these seeds. These
networks do not say why GPT-3's curve fell.

A real model. Gemma 3 of 270M weights (4 bits, base) behind llama-cpp-python's server, our 204 questions (95 %: ± .07):

    eval --api completions --extra '{"logprobs": 50}'    NeQA .544, task 1 .500, task 2 .725; says A .76, .85, .64
    the same with --prompt hint                          NeQA .544, task 1 .461, task 2 .662; says A .69, .70, .82

It answers by letter, not by content: it turns .09 of its answers in both, while task 2 would make s .45 and .32. Read
"says_a" first, and use --debias.

The negator on 72 rewritten sentences of Wikipedia and questions to a search engine that nobody tuned it on: 70 right.
Of the paper's 100 twins it writes 85 as they did; 8 it leaves to the prefix or out, 7 have another form ("can't").
`shape` calls 4, 6 and 13 equal models (100 questions) anything but flat in 6, 6 and 7 of 100 tables. The 95 % interval
of x0 held 95, 96 and 98 % in 300 tables (x0 inside, steep, beyond the sizes).

What did not hold. s is no sigmoid in size: where "not" is rare it is ever better ignored (.191, .078, .038, .001).
Single seeds differ where s turns (.48 to .64 at 104,898). `wilson` and χ² take questions as independent; the public set
repeats 278 texts. The paper's fine-tuning of GPT-2 is not here. We did not ask the paper's models.

Ours, not the paper's: the laboratory, the 204 built-in questions, the rule that names a shape, the fit, --debias.

Try: --seed 3 (three other seeds): the U is .370, .184, .518, .669, in 3 of 3 seeds; the prediction errs by .058.
--steps 800: the curve of 2 % is positive, .346, .481, .709, .746: its U at 400 steps passes as training goes on.
In `compose_`, 0.5 + 0.5 / (1 + …) for s, so a2 where s belongs: no curve falls below ½, and inverse becomes flat.
"""

import argparse
import ast
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import NormalDist

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import HTTPError

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()

# ==================================================================================== the method: composition


def compose(t1, s):
    """Section 5: accuracy on negated questions of a model that is right on plain ones with probability t1 and turns its
    answer with probability s, independently. Numbers or arrays."""
    return t1 * s + (1 - t1) * (1 - s)


def understanding(a2):
    """s from the accuracy a2 of a two-choice test, where guessing gives ½: s = 2·a2 − 1, not a2 itself."""
    return 2 * a2 - 1


def covariance_term(right, turned):
    """2·Cov of two 0/1 arrays over the same questions: measured accuracy minus compose(mean right, mean turned)."""
    right, turned = np.asarray(right, float), np.asarray(turned, float)
    return 2 * ((right * turned).mean() - right.mean() * turned.mean())


def wilson(k, n, z=1.959963984540054):
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


def equal_p(y, n):
    """p-value of "all these models have one accuracy": χ² of homogeneity. y: (m,) accuracies of n (m,) questions."""
    pooled = (y * n).sum() / n.sum()
    if pooled in (0, 1):
        return 1.0
    chi2 = (n * (y - pooled) ** 2).sum() / (pooled * (1 - pooled))
    return float(torch.special.gammaincc(*torch.tensor([(len(y) - 1) / 2, chi2 / 2], dtype=torch.float64)))


def shape(y, n=None):
    """→ "flat", "inverse", "U", "inverted U", "positive" or "unclear".

    y: (m,) accuracies, smallest model first; n: a number or (m,) of questions behind each, None where y is exact.
    With n the models must differ at all (χ² at 5 %), else the curve is flat. Then two models differ by 0.05 or more
    and, with n, by more than sampling gives any pair of one table in twenty (Bonferroni). From the highest model
    before the lowest to that and up to the highest after it is a U; and so on. """
    y, z = np.asarray(y, float), NormalDist().inv_cdf(1 - 0.025 / max(1, math.comb(len(y), 2)))
    error = np.zeros(len(y))
    if n is not None:
        n = error + n
        smoothed = (y * n + 2) / (n + 4)  # no error of 0 at accuracies 0 and 1
        error = np.sqrt(smoothed * (1 - smoothed) / (n + 4))
    differ = lambda i, j: abs(y[i] - y[j]) >= max(0.05, z * math.hypot(error[i], error[j]))
    low, high = y.argmin(), y.argmax()
    if n is not None and equal_p(y, n) >= 0.05 or n is None and not differ(low, high):
        return "flat"
    if differ(y[: low + 1].argmax(), low) and differ(low + y[low:].argmax(), low):
        return "U"
    if differ(y[: high + 1].argmin(), high) and differ(high + y[high:].argmin(), high):
        return "inverted U"
    return "unclear" if not differ(low, high) else "inverse" if high < low else "positive"


def fit_curves(x, right, n):
    """Section 5's curves: t1 a line in x (weighted least squares), and s = σ(k·(x − x0)), of which task 2 shows ½ +
    s/2, by maximum likelihood (binomial) over a fine grid: no start, no local optimum.

    x: (m,) log10 of parameters; right, n: {"task1", "task2"} → (m,) right answers of n. → functions t1(x) and s(x),
    x0, and its 95 % interval (profile likelihood; its ends lie at most a width of the sizes beyond them). """
    line, span = np.polyfit(x, right["task1"] / n["task1"], 1, w=np.sqrt(n["task1"])), np.ptp(x)
    rise = lambda x0, k, at: 1 / (1 + np.exp(-np.clip(k * (at - x0), -700, 700)))
    middles, slopes = np.linspace(x.min() - span, x.max() + span, 301), np.geomspace(1, 60, 60) / span
    s = rise(middles[:, None, None], slopes[:, None], x)  # (x0, k, model)
    a2, k2, n2 = np.clip(0.5 + s / 2, 0, 1 - 1e-9), right["task2"], n["task2"]
    likely = (k2 * np.log(a2) + (n2 - k2) * np.log1p(-a2)).sum(-1)  # (x0, k)
    best, k = np.unravel_index(likely.argmax(), likely.shape)
    inside = middles[likely.max(1) >= likely.max() - 1.9207]  # half of χ²'s 95 % point
    t1, s = lambda at: np.clip(np.polyval(line, at), 0, 1), lambda at: rise(middles[best], slopes[k], at)
    return t1, s, middles[best], (inside[0], inside[-1])


# ==================================================================================== the method: prompts and letters

HEADER = "The following are multiple choice questions (with answers) about common sense."
HINT = " Note that if there is a negation in the question, we should choose the wrong answer to the {} question."
HINT_TASK2 = "Negated sentences are different from original sentences.\n\n"
SHOTS = (  # negated question, plain question, choices, the right one of the negated question
    ("If a cat has a body temp that is below average, it isn't in",
     "If a cat has a body temp that is below average, it is in", ("danger", "safe ranges"), 1),
    ("As the barometer reading goes lower there is not a greater chance of",
     "As the barometer reading goes lower there is a greater chance of", ("sunshine", "getting wet"), 0),
    ("Coral is a type of living organism which cannot be identified in",
     "Coral is a type of living organism which can be identified in",
     ("saltwater locations that are open", "any where with liquid"), 1),
)
CHAIN = """ Let's think step-by-step.
First, let's answer non-negated question: "{}?"
For this non-negated question, we have {}.
Then, to answer the negated question, take the other answer, which would be {}.
So the answer is {}."""
PROMPTS = ("zeroshot", "hint", "fewshot", "fewshot_hint", "cot")


def build_prompt(kind, question, choices):
    """The reference's prompt, to the byte. kind: one of PROMPTS (ValueError: another); choices: two texts."""
    if kind not in PROMPTS:
        raise ValueError(f"a prompt is one of {', '.join(PROMPTS)}, not {kind}")
    block = lambda question, choices: f"Question: {question}\nA. {choices[0]}\nB. {choices[1]}\nAnswer:"
    hint = {"hint": HINT.format("original"), "fewshot_hint": HINT.format("non-negated")}.get(kind, "")
    blocks = [HEADER + hint]
    for negated, plain, options, right in SHOTS if kind in ("fewshot", "fewshot_hint", "cot") else ():
        letter, other = "AB"[right], "BA"[right]
        answer = CHAIN.format(plain, other, letter, letter) if kind == "cot" else f" {letter}"
        blocks.append(block(negated, options) + answer)
    return "\n\n".join([*blocks, block(question, choices)])


def build_task2(plain, negated, answer, swap, hint=False):
    """Are the two sentences the same? answer: the plain question's right choice; swap: "different" comes first."""
    first, second = ("different", "the same") if swap else ("the same", "different")
    return (f'{HINT_TASK2 if hint else ""}Sentence 1: "{plain} {answer}."\nSentence 2: "{negated} {answer}."\n'
            f"Question: The above two sentences are?\nA. {first}\nB. {second}\nAnswer:")


def letter_margin(logprobs):
    """{first token: log-probability} → log P(A) − log P(B), over all ways in which a tokenizer writes a letter. A
    letter that is not among the tokens counts as one nat below the last of them; None where neither is."""
    a, b = (sum(math.exp(logprobs[token]) for token in logprobs if token.strip(" ▁Ġ") == letter) for letter in "AB")
    floor = math.exp(min(logprobs.values(), default=0) - 1)
    return math.log((a or floor) / (b or floor)) if a or b else None


def read_letter(text):
    """What a written answer or a chain of thought picks: 0 (A), 1 (B), or None where it picks none or both.

    The last "answer is X" or "answer: X" counts; else a letter that the answer begins with; else the only letter that
    stands alone. Bold and brackets do not matter. "A penguin" is an article, "not A" no pick, and what follows in a
    question that the model makes up is not read.
    """
    text = text.split("\nQuestion:")[0]
    text = re.sub(r"\bA (?!(and|or|but|is|was|because|since|as|would|it) )(?=[a-z])", "", text)  # the article
    text = re.sub(r"\\\w+|[*_`()\[\]\"“”$\\{}]", "", text)
    letter = r"(?<![Nn]ot )(?<![Nn]or )(?<![Nn]either )\b([AB])\b(?!['’-])"
    found = re.findall(rf"(?i:answer|choice|option)(?i: is| would be|:)*:?\s*(?i:option |choice )?{letter}", text)
    found = found[-1:] or re.findall(r"^\s*([AB])(?:[.:,;\n]|\s*$)", text) or list(set(re.findall(letter, text)))
    return "AB".index(found[0]) if len(found) == 1 else None


# ==================================================================================== the method: a negator

AUXILIARIES = {  # rule: finite form, and its contracted negation where there is one
    "not/be": "is:isn't are:aren't was:wasn't were:weren't "
              "it's: he's: she's: that's: there's: they're: we're: you're: i'm:",
    "not/modal": "can:can't could:couldn't will:won't would:wouldn't should:shouldn't may: might: must: "
                 "it'll: he'll: she'll: they'll: we'll: you'll:",
    "do": "does:doesn't do:don't did:didn't",
}
NEGATIVE = set("not nothing none never nobody nowhere no cannot neither nor incorrect false except".split())
ALREADY = set("""unable unlike unlikely incapable unusual impossible rarely rare barely scarcely hardly
seldom""".split())
PREFIXES = ("Which of the following is not true? ", "Choose the incorrect answer. ")
# subtle: with these "some birds cannot" and "some birds can" are both true
UNSURE = set("""all every each both some only most many few several always everyone everybody everything someone
somebody something also too already still just either unless whether sometimes probably possibly certainly
perhaps""".split())
WH = set("who whom whose what which where when".split())
PLURAL = set("i you we they people men women children mice".split()) | WH
SUBORDINATORS = WH | set("that while if because although though how why".split())
PREPOSITIONS = set("""to of in on at for with by from into onto over under about like than as through during between
against near since until after before""".split())
NO_VERB_AFTER = PREPOSITIONS | set("""a an the and or its their his her our your my this these those any more less
very so such be been being and or but has have had is are was were can could will would should may might must does do
did tin trash""".split())
VERBS = """absorb accept add admit affect agree allow announce appear apply argue arrive ask attend attract avoid
become begin believe belong bite blow boil borrow breathe bring build burn buy call carry catch cause change chase
choose climb collect come compare compete complain conduct confirm connect consider consist consume contain contribute
convert cover create cross cut decide decompose decrease define deliver deny depend describe destroy develop die dig
disappear discover discuss drink drive earn eat eliminate emit employ enable encourage enjoy enter escape establish
evaporate exist expand experience explain explode explore extract fail fall feed feel fight find finish float flow fly
follow forget form freeze gain generate get give go grow happen hatch hate have hear help hibernate hold hunt identify
imply improve include increase indicate inform inhabit inspire intend introduce invent invite involve join keep kill
know lack last leak learn lend lie listen live look lose love maintain make manage marry meet melt mention migrate
move need observe obtain occur oppose orbit organize originate pass pay perform play portray possess predict prefer
prepare prevent produce promise protect prove provide publish pull push put raise reach receive recycle reduce reflect
release remain replace reply represent reproduce require result retire return reveal ride rise rotate run rust say
search see seem select sell send serve settle show shrink sing sink sit sleep smell spend spin spread stand start stay
stop store suffer suggest surround survive swim take talk taste teach tell tend think thrive travel treat try turn
understand use visit wait walk want watch wear weigh win wish wonder work worry write""".split()
PAST = dict(pair.split(":") for pair in """ate:eat became:become began:begin brought:bring built:build came:come
fell:fall felt:feel fought:fight found:find flew:fly froze:freeze gave:give got:get went:go grew:grow held:hold
kept:keep lost:lose made:make ran:run saw:see sank:sink sat:sit slept:sleep stood:stand swam:swim took:take wore:wear
wrote:write bought:buy caught:catch drank:drink drove:drive dug:dig knew:know rose:rise sold:sell sent:send
taught:teach thought:think said:say told:tell sang:sing met:meet won:win spent:spend chose:choose lent:lend bit:bite
forgot:forget""".split())
STRONG = set("""ate became began came fell flew froze gave went grew ran saw swam took wore wrote drank drove knew
rose sang chose forgot bit""".split())


def finite_forms():
    """{finite form: (kind, contracted negation, negation in full)}: is → isn't, is not; eats → doesn't eat, does not
    eat. kind: of an auxiliary its rule; of a verb base, s, past, or strong (a past form that is no participle)."""
    found = {}
    for base in VERBS:
        stem = base[:-1] + "i" if re.search(r"[^aeiou]y$", base) else base
        found |= {base: ("base", "do", base), stem + ("d" if base.endswith("e") else "ed"): ("past", "did", base),
                  stem + ("es" if re.search(r"(s|x|ch|sh|o|i)$", stem) else "s"): ("s", "does", base)}
    found |= {"has": ("s", "does", "have"), "had": ("strong", "did", "have")}
    found |= {past: ("strong" if past in STRONG else "past", "did", base) for past, base in PAST.items()}
    verbs = {form: (kind, f"{do}n't {base}", f"{do} not {base}") for form, (kind, do, base) in found.items()}
    return verbs | {form: (rule, short, f"{form} not") for rule, pairs in AUXILIARIES.items()
                    for form, short in (pair.split(":") for pair in pairs.split())}


class Negator:
    """Negates question stems one after the other. negator(text) → (negated text, rule, is the answer turned?), or
    (None, why it was left out, False).

    The paper's rules, on whole words of the last clause: gold/not, gold/un-in- (negative already: it stays, and so does
    the answer); because → not because; the finite auxiliary; the finite verb of a table of 263 (the paper has a parser
    here); or, before what is no question, a sentence that asks for the wrong answer. The last is also what happens
    where anything makes the verb doubtful; a doubtful question is left out, and so are how, why, and yes or no.
    Contracted ("isn't") and full forms take turns, by rule; "Where does the Nile" has only the contracted one.
    """

    def __init__(self):
        self.used, self.forms = Counter(), finite_forms()

    def is_finite(self, said, i, question):
        """Is word i of a clause a finite verb? True, False, or None: perhaps."""
        word, before, after = ["", *said, ""][i + 1], ["", *said, ""][i], ["", *said, ""][i + 2]
        kind, short, _ = self.forms.get(word, ("", "", ""))
        if kind in ("", "not/be") or "'" in word:
            return bool(kind)
        if before in NO_VERB_AFTER or "'" in before or not (before or question):
            return False  # a noun, or no finite verb: "a can", "to have"
        if kind == "not/modal":
            return not re.search(r"[^sui]s$", after)  # not "the watering can leaks"
        if kind == "do":  # as "Where does the Nile", not as "Annelids do what" or "Who does the voice"
            return question and said[0] in (WH | PREPOSITIONS) - {"who"} and i < 5 or None
        if short.endswith(" have") and (question or re.search(r"(n|ne|ng|t|d)$", after)):  # "has eaten"
            return None
        plural = before in PLURAL or bool(re.search(r"[^sui]s$", before))
        noun = after == "of" and word != "consists"  # "the results of"
        fits = {"base": plural, "s": not plural and not noun, "past": after not in PREPOSITIONS, "strong": True}
        return fits[kind] or before in WH or None

    def find(self, text, said, question):
        """→ the number of the one word of the last clause to negate, or None."""
        sure = {i: self.is_finite(said, i, question) for i in range(len(said))}
        kinds = {i: self.forms[said[i]][0] for i in sure if sure[i] is not False}  # certain and perhaps
        if set(kinds.values()) & set(AUXILIARIES):  # beside them are no finite verbs: "was built", "do plants need"
            kinds = {i: kind for i, kind in kinds.items() if kind not in ("base", "past")}
        nested = len(SUBORDINATORS & set(said[1 + (said[0] in PREPOSITIONS) :]))  # "In which city"
        slot_at_end = re.search(r"___[\s.?]*$", text) or not re.search(r"___|[.?!]\s*$", text)
        if len(kinds) == 1 and not nested or len(kinds) > nested and slot_at_end and not question:
            i = max(kinds)  # of "a thing that can fly is", the last
            if sure[i] and not {"and", "but", "or"} & set(said[i + 1 :]):
                return i

    def __call__(self, text):
        clause = re.search(r"[^,.?!;:]*[^\W_][^,.?!;:]*[\W_]*$", text)  # the last that has a word
        if not clause:
            return None, "no words", False
        words = list(re.compile(r"[\w'’-]*[^\W_][\w'’-]*").finditer(text, clause.start()))
        said = [word[0] if word[0] in ("May", "Will") else word[0].lower().replace("’", "'") for word in words]
        if text.startswith(PREFIXES) or NEGATIVE & set(said) or any(word.endswith("n't") for word in said):
            return text, "gold/not", False
        if ALREADY & set(said):
            return text, "gold/un-in-", False
        first = re.search(r"[^\W_]+", text)[0].lower()
        asks = first in WH - {"where", "when"} or first in ("where", "when", "how", "why") and "," not in text
        question = text.rstrip().endswith("?") and "___" not in text or asks
        leads = self.forms.get(said[0], ("",))[0] in AUXILIARIES and (question or first == said[0])
        if leads or question and first in ("how", "why"):
            return None, "how, why, or yes or no: negated, it does not ask for the other choice", False
        i = None if UNSURE & set(said) else self.find(text, said, question)
        rule, short, full = "not/because", "not because", "not because"
        if "because" in said[1:] and not question:
            i = said.index("because")
        elif i is not None:
            rule, short, full = self.forms[said[i]]
            rule = rule if rule.startswith("not/") else "not/do"
        elif not question:
            self.used["prompt"] += 1
            return PREFIXES[self.used["prompt"] % 2 - 1] + text, "prompt", True
        if i is None or question and not short:
            return None, "a question in which no single word to negate was found", False
        self.used[rule] += 1
        new = short if short and (question or self.used[rule] % 2) else full
        begin, end = words[i].span()
        new = new[0].upper() + new[1:] if text[begin].isupper() else new
        return text[:begin] + new + text[end:], rule, True


# ==================================================================================== data

RAW = "https://raw.githubusercontent.com/yuhui-zh15/NeQA/main/"
PUBLIC = {  # files of the paper's repository: the first digits of their SHA-256
    "data_pipeline/neqa.jsonl": "34a63d222131",
    "eval_pipeline/neqa_100.jsonl": "bcabddffa439",
    "eval_pipeline/neqa_100_nonnegated.jsonl": "c3a4d52e4d58",
    "eval_pipeline/neqa_100_normalized_nonnegated.jsonl": "d660623a72fb",
    "eval_pipeline/neqa_100_normalized.jsonl": "44d105c2f4e9",
}
# a question; its subjects, each with the right and a wrong choice. Last: what is negative already | its plain twin
TABLES = """The capital of {} is
France: Paris/Tokyo, Japan: Tokyo/Cairo, Egypt: Cairo/Rome, Italy: Rome/Madrid, Spain: Madrid/Nairobi, Kenya:
Nairobi/Lima, Peru: Lima/Oslo, Norway: Oslo/Athens, Greece: Athens/Havana, Cuba: Havana/Vienna, Austria:
Vienna/Lisbon, Portugal: Lisbon/Dublin, Ireland: Dublin/Warsaw, Poland: Warsaw/Santiago, Chile: Santiago/Bangkok,
Thailand: Bangkok/Baghdad, Iraq: Baghdad/Helsinki, Finland: Helsinki/Budapest, Hungary: Budapest/Berlin, Germany:
Berlin/Paris

{} is a kind of
A sparrow: bird/fish, A trout: fish/insect, A wasp: insect/snake, A python: snake/tree, An oak: tree/flower, A rose:
flower/bird, An eagle: bird/fish, A salmon: fish/insect, A beetle: insect/snake, A cobra: snake/tree, A birch:
tree/flower, A tulip: flower/instrument, A violin: instrument/fruit, A hammer: tool/fruit, A sofa:
furniture/vegetable, A trumpet: instrument/vegetable, A screwdriver: tool/animal, A wardrobe: furniture/insect, A
mosquito: insect/instrument, A flute: instrument/bird

The colour of {} is
a banana's ripe peel: yellow/blue, fresh snow: white/black, coal: black/green, healthy grass: green/red, blood:
red/green, a clear sky at noon: blue/red, a ripe strawberry: red/blue, an emerald: green/red, a lemon: yellow/blue,
milk: white/black

The opposite of {} is
hot: cold/small, big: small/dark, light: dark/slow, fast: slow/late, early: late/closed, open: closed/poor, rich:
poor/dry, wet: dry/quiet, loud: quiet/old, young: old/empty, full: empty/soft, hard: soft/cold

The day after {} is
Monday: Tuesday/Wednesday, Tuesday: Wednesday/Thursday, Wednesday: Thursday/Friday, Thursday: Friday/Saturday, Friday:
Saturday/Sunday, Saturday: Sunday/Monday, Sunday: Monday/Tuesday

{} comes right after
February: January/June, March: February/July, April: March/August, May: April/September, June: May/October, July:
June/November, August: July/December, September: August/January, October: September/February, November: October/March,
December: November/April, January: December/May

{} makes
Two plus three: five/eight, Four plus four: eight/nine, Six minus two: four/nine, Three times three: nine/six, Ten
minus seven: three/two, One plus one: two/six, Five plus one: six/ten, Twenty minus ten: ten/twelve, Two times six:
twelve/fifteen, Five times three: fifteen/eleven, Nine plus two: eleven/seven, Eight minus one: seven/five

{} lives in
A camel: the desert/the sea, A whale: the sea/the jungle, A monkey: the jungle/the sea, A mole: the ground/the sky, A
penguin: the Antarctic/the desert, A frog: a pond/a hive, A bee: a hive/a kennel, A dog: a kennel/a hive, A spider: a
web/the sky, A king: a palace/a nest

{} gives people
A cow: milk/eggs, A hen: eggs/wool, A sheep: wool/honey, A candle: light/milk, A stove: heat/eggs, A well: water/wool

People use {} to
scissors: cut paper/make calls, a pen: write/sweep the floor, a broom: sweep the floor/open a lock, a key: open a
lock/bake bread, an oven: bake bread/tell the time, a kettle: boil water/sew clothes, a needle: sew clothes/call a
friend, a phone: call a friend/reach a roof, a ladder: reach a roof/tell the time, a clock: tell the time/rest the
head, a pillow: rest the head/eat soup, a spoon: eat soup/unlock a door

{} can
Birds: lay eggs/read books, Fish: swim/write letters, Fire: burn wood/lay eggs, Magnets: attract iron/bake bread,
Doctors: treat patients/lay eggs, Aeroplanes: fly/speak French, Knives: cut bread/swim, Cars: drive on roads/bake bread,
Bakers: bake bread/breathe fire, Snakes: crawl/write letters

A thing made of {} would be
glass: brittle/soft, feathers: light/heavy, lead: heavy/light, ice: cold/hot, rubber: elastic/brittle, silk:
soft/hard, steel: hard/soft, cardboard: dry/liquid

If {}, it will
ice lies in the sun: melt/burn, a stone falls into a pond: sink/burn, dry wood lies in a fire: burn/freeze, a plant
gets no water: wither/explode, a wine glass falls onto a stone floor: shatter/melt, water boils for hours:
evaporate/freeze, a balloon meets a needle: burst/rust, iron lies in the rain: rust/melt

{} is found on the continent of
Brazil: South America/Asia, India: Asia/Africa, Nigeria: Africa/Europe, Poland: Europe/South America, Canada: North
America/Asia, China: Asia/Europe, Sweden: Europe/Africa, Kenya: Africa/South America, Argentina: South America/Europe,
Mexico: North America/Africa, Ghana: Africa/Asia, Japan: Asia/Europe, Hungary: Europe/South America, Peru: South
America/Asia

{}, counted:
Legs on a spider: eight/seven, Days in a week: seven/three, Sides of a triangle: three/twenty-four, Hours in a day:
twenty-four/sixty, Minutes in an hour: sixty/twelve, Months in a year: twelve/two, Wheels on a bicycle: two/four,
Corners of a square: four/twenty-six, Letters in the English alphabet: twenty-six/five, Fingers on a hand: five/eight

People say that {} because
the desert is hard to live in: it has little water/it is green, a fridge keeps food fresh: it is cold inside/it is
made of water, a lamp helps at night: it gives light/it stores water, gold costs much: there is little of it/it is
easy to find, a cactus needs little rain: it stores water/it can swim, a wool coat is warm: it holds air/it is made of
ice, an owl hunts well at night: its eyes see in the dark/it is made of wool, a boat floats: water pushes it up/it is
hungry, a plant stands at the window: it needs light/it needs darkness, ice is slippery: its surface is wet/it is
dark, a shout echoes in a cave: its walls reflect sound/it is full of milk, the moon shines: the sun lights it/it is
on fire, bread rises: yeast makes gas in it/it has wings, a ball bounces: it is elastic/it is alive, leaves are green:
they hold chlorophyll/they hold blood, the sea tastes bad: it is salty/it is sweet, a bat finds its way: it hears
echoes/it reads maps, metal spoons get hot in soup: metal conducts heat/metal is alive

{}
A desert is rarely | A desert is usually: dry/wet, Summer days are rarely | Summer days are usually: warm/icy, A snail
is unable to | A snail is able to: crawl/gallop, A stone is unable to | A stone is able to: fall/speak, It is unusual
to wear in winter | It is usual to wear in winter: a coat/a swimsuit, It is unusual to eat for breakfast | It is usual
to eat for breakfast: bread/candles, A fish out of water is unlikely to | A fish out of water is likely to: die/sing,
A hungry wolf is unlikely to eat | A hungry wolf is likely to eat: a sheep/a brick, A car is incapable of | A car is
capable of: carrying people/laying eggs, A child is incapable of | A child is capable of: running/laying eggs, Trees
are never found | Trees are often found: in forests/on the moon, Nobody drinks | Everybody drinks: water/sand, A book
has no | A book has: pages/engine, At midnight people rarely see | At midnight people often see: stars/the sun, It is
impossible to cut with a knife | It is possible to cut with a knife: bread/the wind"""


def builtin_rows():
    """204 questions of our own with plain twins → rows as of read_questions; answers B and A in turn, as theirs."""
    negator, rows = Negator(), []
    for table in TABLES.split("\n\n"):
        template, facts = table.split("\n", 1)
        for subject, gold, wrong in re.findall(r"(.+?): (.+?)/(.+?)(?:, |$)", " ".join(facts.split())):
            text, _, plain = template.format(subject).partition(" | ")
            odd = len(rows) % 2
            rows.append(dict(question=negator(text)[0], choices=[wrong, gold] if odd else [gold, wrong], answer=1 - odd,
                             plain=plain or text))
    return rows


def read_table(path):
    """A .csv, .tsv or .jsonl file (UTF-8; also .gz) → its rows, dicts."""
    path = Path(path)
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        if re.search(r"\.[ct]sv\b", path.name):
            mark = max(",;\t", key=text.split("\n")[0].count)
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8")
    except (EOFError, ValueError, csv.Error) as error:
        fail(f"{path} is not what its name says (.jsonl, .csv or .tsv): {error}")


def as_row(entry, where, most=2):
    """One entry of people's files → dict(question, choices, answer: index, plain: the twin's question or None).

    Read are question, choices (a list) and answer (an index from 0, a letter, or the choice's text); OpenBookQA in
    both its forms; the Inverse Scaling Prize's prompt, classes, answer_index. What can be read in two ways is
    refused, by a line that says where.
    """
    if not isinstance(entry, dict):
        fail(f"{where}: not a question but {str(entry)[:60]!r}")
    if {"prompt", "answer_index"} <= entry.keys():
        found = re.search(r"Question: (.*)\r?\nA\. (.*)\r?\nB\. (.*)\r?\nAnswer:\s*$", str(entry["prompt"]), re.S)
        if not found:
            fail(f"{where}: the prompt does not ask a question with the choices A and B")
        entry = dict(question=found[1], choices=[found[2], found[3]], answer=entry["answer_index"])
    if isinstance(entry.get("question"), dict):
        entry = {**entry, **entry["question"], "question": entry["question"].get("stem")}
    question, options = entry.get("question", entry.get("question_stem")), entry.get("choices")
    key = entry.get("answer", entry.get("answerKey"))
    try:
        options = ast.literal_eval(options) if isinstance(options, str) else options
        if isinstance(options, dict):
            options = [dict(label=label, text=text) for label, text in zip(options["label"], options["text"])]
        labelled = bool(options) and isinstance(options[0], dict)
        labels = [str(option["label"]) for option in options] if labelled else "ABCDEFGH"
        options = [str(option["text"] if labelled else option).strip() for option in options]
    except (ValueError, SyntaxError, KeyError, TypeError):
        fail(f'{where}: choices must be a list as ["one", "two"], not {str(options)[:60]!r}')
    if not isinstance(question, str) or not question.strip():
        fail(f"{where}: no question")
    if not 1 < len(set(options)) == len(options) <= most:
        fail(f"{where}: a question of NeQA has two different choices, not {options} (of more, negate makes two)")
    readings = {i for i, names in enumerate(zip(labels, options)) if str(key).strip() in names}
    if not labelled and re.fullmatch(r"\d", str(key).strip()):
        readings = {int(key)} if isinstance(key, int) else readings | {int(key)}
    if len(readings) != 1 or max(readings) >= len(options):
        fail(f"{where}: the answer {key!r} must mean one of {options}: an index (0 to {len(options) - 1}), a letter or "
             "a choice's text, and not two of these at once")
    return dict(question=question.strip(), choices=options, answer=readings.pop(), plain=entry.get("plain"))


def read_questions(data):
    """--data → rows as of as_row; the 100 with twins also have normalized: (plain, negated) without the slot."""
    if data == "builtin":
        return builtin_rows()
    full, *hundred = PUBLIC
    fetch = lambda name: download(RAW + name, PUBLIC[name])
    read = lambda path: [as_row(entry, f"{path}, row {i}") for i, entry in enumerate(read_table(path), 1)]
    if data != "neqa100" and not Path(data).is_dir():
        return read(fetch(full) if data == "neqa" else data) or fail(f"{data} holds no question")
    rows, plains, *normalized = (
        read(fetch(name) if data == "neqa100" else Path(data) / Path(name).name) for name in hundred)
    key = lambda row, flip=0: (row["choices"], row["answer"] ^ flip)
    if [key(row, 1) for row in rows] != [key(row) for row in plains] or {*map(len, normalized)} != {len(rows)}:
        fail(f"{data}: the files neqa_100*.jsonl are no twins, row by row: the same choices, and the other answer")
    for row, plain, *bare in zip(rows, plains, *normalized):
        row |= dict(plain=plain["question"], normalized=[twin["question"] for twin in bare])
    return rows


# ==================================================================================== the laboratory's model and world

SUBJECTS, ATTRIBUTES, FILLERS = 40, 20, 16  # a sentence: subject, attribute, adverb: a filler or, rarely, "not"
NOT = SUBJECTS + ATTRIBUTES + FILLERS  # the last token


class Reader(nn.Module):
    """A small GPT that reads subject, attribute and adverb and says false or true. d: width."""

    def __init__(self, d, layers=3, heads=2):
        super().__init__()
        self.tokens, self.positions = nn.Parameter(torch.randn(NOT + 1, d) / 2), nn.Parameter(torch.randn(3, d) / 2)
        stack = lambda n_in, n_out: nn.ModuleList(nn.Linear(n_in * d, n_out * d) for _ in range(layers))
        self.qkv, self.out, self.up, self.down = stack(1, 3), stack(1, 1), stack(1, 2), stack(2, 1)
        self.head, self.heads = nn.Linear(d, 2), heads
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)

    def forward(self, sentences):  # (batch, 3) token ids → logits (batch, 2)
        x = self.tokens[sentences] + self.positions  # (batch, 3, d)
        later = torch.ones(3, 3, dtype=torch.bool).triu(1)
        norm = lambda x: F.layer_norm(x, x.shape[-1:])
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down):
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv(norm(x)).chunk(3, -1))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)  # (batch, head, 3, 3)
            x = x + out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(norm(x))))
        return self.head(norm(x)[:, -1])


def draw_sentences(table, rng, share, size):
    """size sentences (*size, 3) and their truth (*size): the table's entry, turned where the adverb is "not"."""
    subject, attribute, adverb = (torch.randint(n, size, generator=rng) for n in (SUBJECTS, ATTRIBUTES, FILLERS))
    negated = torch.rand(size, generator=rng) < share
    adverb = torch.where(negated, NOT, SUBJECTS + ATTRIBUTES + adverb)
    return torch.stack([subject, SUBJECTS + attribute, adverb], -1), table[subject, attribute] ^ negated


def measure_reader(said, tables):
    """Answers to every sentence (models, subject, attribute, adverb), "not" last, and the truth (models, subject,
    attribute) → t1, s, NeQA, a tensor (3, models). s is measured on the even subjects and the other two on the odd
    ones, so that compose(t1, s) is a prediction and not an identity."""
    true, plain, negated = tables[..., None], said[..., :-1], said[..., -1:]
    shares = (plain == true)[:, 1::2], (plain != negated)[:, ::2], (negated != true)[:, 1::2]
    return torch.stack([share.double().mean((1, 2, 3)) for share in shares])


def train(d, models, steps, quiet=True, batch=256):
    """Train a Reader of width d for each (share of "not", seed) of models, side by side: the loss is the sum of
    theirs, so none knows of the others, and each has its own stream of sentences → what `measure` finds."""
    readers, streams, tables = [], [], []
    for share, seed in models:
        torch.manual_seed(seed)
        tables.append(torch.randint(2, (SUBJECTS, ATTRIBUTES)))
        readers.append(Reader(d))
        rng = torch.Generator().manual_seed(seed * 1000 + d)
        streams.append(draw_sentences(tables[-1], rng, share, (steps, batch)))
    sentences, labels = (torch.stack(part, 1) for part in zip(*streams))  # (steps, models, batch, …)
    weights = {name: w.detach().requires_grad_() for name, w in stack_module_state(readers)[0].items()}
    bare = Reader(d).to("meta")
    say = vmap(lambda w, x: functional_call(bare, w, x))
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=0, fused=True)
    for step in tqdm(range(steps), f"width {d}", disable=quiet):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, (steps - step) / max(1, steps - 50))
        logits = say(weights, sentences[step])  # (models, batch, 2)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[step].flatten(), reduction="sum") / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    every = torch.cartesian_prod(torch.arange(SUBJECTS), torch.arange(SUBJECTS, SUBJECTS + ATTRIBUTES),
                                 torch.arange(SUBJECTS + ATTRIBUTES, NOT + 1))
    with torch.no_grad():
        said = say(weights, every.expand(len(models), -1, -1)).argmax(-1)
    return measure_reader(said.unflatten(1, (SUBJECTS, ATTRIBUTES, FILLERS + 1)), torch.stack(tables))


# ==================================================================================== the same in every file


def fail(message):
    """For what a user can mend: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run(args):
    """args.task(args), with a folder. What a user can mend ends in one line (exit code 2), Ctrl-C in none (130)."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.task(args)
        sys.stdout.flush()
        if "RANK" in os.environ:  # subtle: a rank aborted now and then while torch took its threads down
            os._exit(0)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def download(url, sha256=None):
    """Fetch a file once → its path in the cache. Under torchrun rank 0 does, others wait. OSError: not to be had."""
    path = CACHE / url.split("://")[1]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)  # to another name first; sha256: its first digits
        except Exception as error:  # whatever it was, the file is not there
            print(f"{url}: {error}", file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()
    if not path.exists():
        raise OSError(f"no {path}: fetch {url} by other means and put it there")
    return path


def save_results(folder, args, **figures):
    """folder/results.json: the command, versions, device and every figure of the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {torch.get_num_threads()} threads"
    about = dict(command=sys.argv, args=vars(args), python=sys.version, torch=torch.__version__, device=device)
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else getattr(x, "__name__", str(x))
    (folder / "results.json").write_text(json.dumps(about | figures, indent=1, default=plain))
    print(folder / "results.json")


def print_table(header, rows):
    """Rows of strings and numbers as aligned text, the first column left. NaN: what the data do not identify."""
    text = lambda x: str(x) if not isinstance(x, float) else "undefined" if x != x else f"{x:.3f}"
    cells = [[text(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])), sep="  ")


def figure(path, args, draw, size=(7, 4.5)):
    """draw(fig) on a matplotlib figure of this size in inches, saved as path."""
    if args.no_plot:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=size, layout="constrained")
    draw(fig)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(path)


# ============================================================================ the same in every file that asks a server

OVERFLOW = re.compile(r"(?i)context.{0,40}(length|window|size)|too long|reduce the length|length is \d+ while limit|"
                      r"exceed.{0,60}(token|length|limit|context)|max_new_tokens.{0,20}must be")  # as vendors word it
THOUGHT = re.compile(r"(?is)^.*[<\[]/think(ing)?[>\]]|^\s*[<\[]think(ing)?[>\]].*")  # no answer, finished or not


def json_object(text):
    """--extra's type. ValueError: not a JSON object."""
    if not isinstance(value := json.loads(text), dict):
        raise ValueError
    return value


def server_flags(max_tokens):
    """The flags that `ask` reads: {name: arguments of argparse}."""
    base_url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
    return {
        "model": dict(required=True, metavar="NAME", help="the model's name at the server"),
        "base_url": dict(default=base_url, help="an OpenAI-compatible server, as http://127.0.0.1:8000/v1"),
        "api": dict(choices=("chat", "completions"), default="chat", help="the prompt as a user's message, or bare"),
        "api_key_env": dict(default="OPENAI_API_KEY", help="the environment variable that holds the key"),
        "max_tokens": dict(type=int, default=max_tokens, help="tokens of an answer; a model that thinks needs more"),
        "extra": dict(type=json_object, default={}, metavar="JSON", help="more for the request's body, as "
                      '\'{"reasoning_effort": "low"}\'; null leaves a field out, as \'{"temperature": null}\''),
        "concurrency": dict(type=int, default=8, help="calls under way at once"),
        "timeout": dict(type=float, default=120.0, help="seconds to wait for an answer"),
        "price": dict(type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="dollars a million tokens"),
        "dry_run": dict(action="store_true", help="print calls, tokens, dollars and one whole prompt; ask nothing"),
    }


def session(concurrency, tries, longest_wait):
    """Keeps connections, tries again what passes, and drops the key when it is sent on to another host."""
    retry = Retry(tries, read=1, status_forcelist=(408, 409, 429, 500, 502, 503, 504, 529), allowed_methods=None,
                  backoff_factor=0.5, backoff_jitter=1, backoff_max=30, retry_after_max=longest_wait,
                  raise_on_status=False)
    http = requests.Session()
    for scheme in ("http://", "https://"):
        http.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
    return http


def call(http, args, prompt, **more):
    """One prompt → dict(text, finish: why the server stopped, read: prompt tokens that it counted, logprobs), or
    dict(missing=why). more: fields of the request's body."""
    chat, key, said = args.api == "chat", os.environ.get(args.api_key_env, ""), ""
    body = dict(model=args.model, max_tokens=args.max_tokens, temperature=0) | more | args.extra
    body |= dict(messages=[dict(role="user", content=prompt)]) if chat else dict(prompt=prompt)
    try:
        reply = http.post(f"{args.base_url.rstrip('/')}/{'chat/' if chat else ''}completions", timeout=args.timeout,
                          json={name: value for name, value in body.items() if value is not None},
                          headers={"Authorization": f"Bearer {key}"} if key else {})
        said = reply.text.replace(key or "\0", "[key]")
        if not reply.ok:
            overflow = reply.status_code in (400, 413, 422, 500) and OVERFLOW.search(said)
            return dict(missing=f"{'overflow: ' * bool(overflow)}status {reply.status_code}: {said[:300]}")
        choice = reply.json()["choices"][0]
        text = (choice["message"]["content"] if chat else choice["text"]) or ""
        if isinstance(text, list):  # parts, as Mistral sends them
            text = "".join(part["text"] for part in text if part["type"] == "text")
        return dict(text=THOUGHT.sub("", text), finish=choice.get("finish_reason"), logprobs=choice.get("logprobs"),
                    read=(reply.json().get("usage") or {}).get("prompt_tokens"))
    except (requests.RequestException, HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        return dict(missing=f"{type(error).__name__}: {error}; the server said: {said[:200]}")


def failed(answer):
    """No answer, and not because the prompt is too long: asked again by the next run."""
    return not answer.get("missing", "overflow").startswith("overflow")


def ask(args, groups, **more):
    """→ an answer (see `call`) for each prompt, nested as groups is: lists of prompts. The prompts of a group are asked
    one after another, so that a server which keeps what it has read reads a shared beginning once.

    Each answer is appended to args.out/answers.jsonl as it comes: a killed run goes on, a finished one asks nothing;
    failures are asked again next time. Ends the program (exit 2) where the first call fails, where ten groups in a row
    fail, and where the server cuts the longest prompt without a word: its halves then hold more tokens than it does.
    """
    about = [args.base_url, args.api, args.model, args.max_tokens, args.extra, more]
    name = lambda prompt: hashlib.sha256(json.dumps([*about, prompt]).encode()).hexdigest()
    path, prompts = args.out / "answers.jsonl", [prompt for group in groups for prompt in group]
    known, lock, stopped, in_a_row = {}, threading.Lock(), threading.Event(), 0
    for line in path.read_text("utf-8").split("\n") if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):  # a line that a killed run left torn
            known[json.loads(line)["key"]] = json.loads(line)
    todo = [prompt for prompt in dict.fromkeys(prompts) if name(prompt) not in known]
    if args.dry_run:
        tokens = [sum(len(prompt.encode()) for prompt in todo) / 4, len(todo) * args.max_tokens]
        print(f"{prompts[0]}\n\nAbove is one prompt of {len(todo):,} calls to {args.model}: about {tokens[0]:,.0f} "
              f"prompt tokens (bytes / 4; UUIDs take twice that), at most {tokens[1]:,} answer tokens, "
              f"${np.dot(tokens, args.price) / 1e6:,.2f}. Nothing was asked.")
        raise SystemExit(0)

    def answer(prompt, http):
        if name(prompt) not in known and not stopped.is_set():
            found = call(http, args, prompt, **more)
            with lock:
                known[name(prompt)] = found
                if not failed(found):
                    print("", json.dumps(dict(found, key=name(prompt))), sep="\n", end="", file=file, flush=True)
                bar.update()
        return known.get(name(prompt), dict(missing="stopped"))

    pool, http = ThreadPoolExecutor(args.concurrency), session(args.concurrency, 5, 60)
    with open(path, "a", encoding="utf-8") as file, tqdm(desc=args.model, disable=args.quiet or not todo) as bar:
        bar.total, size, longest = len(todo), path.stat().st_size, max(prompts, key=len)
        try:
            first = answer(longest, session(1, 2, 5))  # alone: a wrong address, key or model would fail every call
            if failed(first):
                fail(f"{args.model} at {args.base_url} (--api {args.api}, key from ${args.api_key_env}): "
                     f"{first['missing']}")
            if todo and len(longest) > 4000 and "text" in first:
                pieces = [longest, longest[: len(longest) // 2], longest[len(longest) // 2 :], "Hi"]
                reads = [answer(piece, http).get("read") for piece in pieces]
                if None in reads:
                    print("whether the server cuts long prompts cannot be seen: it does not say usage.prompt_tokens",
                          file=sys.stderr)
                elif (held := reads[1] + reads[2] - reads[3]) > 1.02 * reads[0] + 16:
                    os.truncate(path, size)
                    fail(f"the server read {reads[0]:,} tokens of a prompt of {held:,} and said nothing: raise its "
                         "window (Ollama: OLLAMA_CONTEXT_LENGTH; LM Studio: context length), or ask for less")
            for found in pool.map(lambda group: [answer(prompt, http) for prompt in group], groups):
                in_a_row = in_a_row + 1 if all(map(failed, found)) else 0
                if in_a_row == 10:
                    fail(f"ten in a row failed; what was answered is kept in {path}. The last: {found[-1]['missing']}")
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    return [[known[name(prompt)] for prompt in group] for group in groups]


# ==================================================================================== the experiments

SHARES, WIDTHS = (0.0003, 0.02, 0.3), (8, 16, 32, 64)  # of sentences with "not"; of the laboratory's models
TASKS, UNREAD = ("neqa", "task1", "task2"), ("failed", "empty", "cut", "no letter")


def lab(args):
    """Train small Transformers of growing size in a world where "not" is rare, less rare and common: three shapes."""
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    torch.set_num_threads(1)  # two are faster, and move accuracies of the U by .005
    models = [(share, seed) for share in SHARES for seed in range(args.seed, args.seed + args.seeds)]
    found = [train(d, models, args.steps, args.quiet) for d in WIDTHS]
    sizes = [sum(p.numel() for p in Reader(d).parameters()) for d in WIDTHS]
    t1, s, neqa = torch.stack(found, -1).unflatten(1, (len(SHARES), -1)).numpy()  # each (share, seed, size)
    predicted, names = compose(t1, s), [shape(curve) for curve in neqa.mean(1)]
    print_table(['share of "not"', "parameters", "task 1", "s", "NeQA", "predicted"], [
        (f"{share:.2%}", f"{size:,}", *(part[i, :, j].mean() for part in (t1, s, neqa, predicted)))
        for i, share in enumerate(SHARES) for j, size in enumerate(sizes)])
    for share, name, curves in zip(SHARES, names, neqa):
        alike = sum(shape(curve) == name for curve in curves)
        print(f'"not" in {share:.2%} of the sentences: {name}, as are {alike} of {args.seeds} seeds')
    print("predicted: t1·s + (1 − t1)·(1 − s), s from other subjects than those scored; it errs by at most "
          f"{np.abs((predicted - neqa).mean(1)).max():.3f}")
    save_results(args.out, args, sizes=sizes, t1=t1, s=s, neqa=neqa, predicted=predicted, shapes=names)

    def draw_lab(fig):
        ax = fig.subplots()
        for i, share in enumerate(SHARES):
            ax.plot(sizes, neqa[i].T, color=f"C{i}", lw=0.6, alpha=0.5)
            ax.plot(sizes, neqa[i].mean(0), "o-", color=f"C{i}", label=f'"not" in {share:.2%}: {names[i]}')
            ax.plot(sizes, predicted[i].mean(0), "--", color=f"C{i}")
        ax.plot(sizes, t1.mean((0, 1)), "k:", label='sentences without "not" (task 1)')
        ax.set(xscale="log", xlabel="parameters", ylabel="accuracy (dashed: predicted; thin: each seed)", ylim=(0, 1))
        fig.legend(loc="outside upper center", ncols=2)

    figure(args.out / "lab.png", args, draw_lab)


def compose_(args):
    """Figure 5: one line for task 1, and s that rises late, halfway or early: three shapes."""
    x, rows = np.linspace(-10, 10, 100), []
    for place in (14, 0, -8):
        y = compose(0.75 + 0.025 * x, 1 / (1 + np.exp(place - x)))
        rows.append((f"{place}", shape(y), y[0], y.min(), y[-1]))
    print_table(["s turns at", "shape", "smallest", "lowest", "largest"], rows)
    print("x from −10 to 10; t1 = 0.75 + 0.025·x; s = σ(x − place), the paper's place 0")
    save_results(args.out, args, rows=rows)


def question(row, i, task, args):
    """→ (prompts of row i: one, or with --debias a second with the choices the other way round, its right letter)."""
    prompts, right = [], row["answer"] ^ (task == "task1")  # without the negation it is the other choice
    for order in range(2 if args.debias else 1):
        if task == "task2":
            strip = lambda text: re.sub(r"\s*(___)?[\s?]*$", "", text)
            twins = row.get("normalized") or (strip(row["plain"]), strip(row["question"]))
            swap, right = (i + order) % 2 == 1, 1 - i % 2
            prompts.append(build_task2(*twins, row["choices"][1 - row["answer"]], swap, "hint" in args.prompt))
        else:
            choices = row["choices"][::-1] if order else row["choices"]
            prompts.append(build_prompt(args.prompt, row["plain"] if task == "task1" else row["question"], choices))
    return prompts, "AB"[right]


def first_token(logprobs):
    """The likeliest first tokens of an answer {token: log-probability}, in the shape of chat or of completions."""
    try:
        if "content" in logprobs:
            return {top["token"]: top["logprob"] for top in logprobs["content"][0]["top_logprobs"]}
        return dict(logprobs["top_logprobs"][0])
    except (TypeError, KeyError, IndexError, ValueError):
        fail("the server gives no log-probabilities; --score text reads what it writes")


def judge(answers, score):
    """One question's answers (two with --debias) → "A", "B", or why neither: see UNREAD."""
    first = answers[0]
    if any("missing" in answer for answer in answers):
        return "failed"
    if score == "text" and (pick := read_letter(first["text"])) is None:
        return "empty" if not first["text"].strip() else "cut" if first["finish"] == "length" else "no letter"
    if score == "text":
        return "AB"[pick]
    margins = [letter_margin(first_token(answer["logprobs"])) for answer in answers]
    margin = 0 if None in margins else margins[0] - sum(margins[1:])  # the second has the letters the other way round
    return "A" if margin > 0 else "B" if margin < 0 else "no letter"


def eval_(args):
    """Ask a server negated questions, their plain twins (task 1), and whether the two say the same (task 2)."""
    rows = read_questions(args.data)[: args.limit]
    score = args.score or ("text" if args.api == "chat" or args.prompt == "cot" else "logprob")
    if score == "logprob" and args.prompt == "cot" or score == "text" and args.debias:
        fail("a chain of thought is read as text, and --debias reads log-probabilities (--score logprob)")
    args.max_tokens = args.max_tokens or (1 if score == "logprob" else 400 if args.prompt == "cot" else 64)
    more = dict(logprobs=5) if args.api == "completions" else dict(logprobs=True, top_logprobs=20)
    asked = [(task, i, *question(row, i, task, args)) for task in TASKS for i, row in enumerate(rows)
             if row["plain"] or task == "neqa"]
    if score == "logprob" and not args.dry_run:
        first_token(ask(args, [asked[0][2]], **more)[0][0].get("logprobs"))  # are there any? before all is asked
    answers = ask(args, [prompts for *_, prompts, _ in asked], **more if score == "logprob" else {})
    picks = {(task, i): (judge(got, score), right) for (task, i, _, right), got in zip(asked, answers)}
    with open(args.out / "answers.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["task", "row", "pick", "right", "question", "choice A", "choice B", "said"]] + [
            [task, i + 1, *pick, rows[i]["question"], *rows[i]["choices"], got[0].get("text", got[0].get("missing"))]
            for ((task, i), pick), got in zip(picks.items(), answers)])
    tasks, columns = {}, ["n", "accuracy", "low", "high", "says_a", *UNREAD]
    for task in TASKS:
        found = [pick for (about, _), pick in picks.items() if about == task]
        counts = Counter(letter for letter, _ in found)
        if n := len(found) - counts["failed"]:
            k = sum(letter == right for letter, right in found)
            figures = (k / n, *wilson(k, n)) if counts["A"] + counts["B"] >= 0.95 * n else (math.nan,) * 3
            counted = [n, *figures, counts["A"] / n, *(counts[why] for why in UNREAD)]
            tasks[task] = dict(zip(columns, counted), k=k)
    print_table(["task", *columns], [(task, *(found[key] for key in columns)) for task, found in tasks.items()])
    twins = sum(bool(row["plain"]) for row in rows)
    print(f"{twins} of {len(rows)} questions have a plain twin. low, high: 95 % (Wilson). undefined: more than one "
          "answer in twenty cannot be read; see answers.csv (--max_tokens gives room to think)")
    both = [(*pick, *picks["neqa", i]) for (task, i), pick in picks.items() if task == "task1"]
    both = np.array([letters for letters in both if set(letters) <= {"A", "B"}])
    if len(both):
        plain, plain_right, negated, right = both.T
        knows, turns = plain == plain_right, plain != negated
        tasks["twins"] = dict(n=len(both), t1=knows.mean(), s=turns.mean(), neqa=np.mean(negated == right),
                              composed=compose(knows.mean(), turns.mean()), cov=covariance_term(knows, turns))
        print("both twins read: {n}; t1 {t1:.3f} and s {s:.3f} (answers that turn) compose {composed:.3f}, {cov:+.3f} "
              "(2·Cov) = NeQA {neqa:.3f}".format(**tasks["twins"]))
    if {"task1", "task2"} <= tasks.keys():
        t1, s = tasks["task1"]["accuracy"], understanding(tasks["task2"]["accuracy"])
        print(f"composed of task 1 and s = 2·a2 − 1 = {s:.3f} of task 2: {compose(t1, s if s >= 0 else math.nan):.3f}")
    save_results(args.out, args, size=args.size, tasks=tasks)
    print(args.out / "answers.csv")
    if failed := sum(pick == "failed" for pick, _ in picks.values()):
        fail(f"{failed} calls failed: see answers.csv; the same command asks them again")


def negate(args):
    """Negate your own questions: rows of question, choices and answer become what eval takes, of two choices each."""
    negator, rng, made, dropped = Negator(), np.random.default_rng(args.seed), [], []
    for i, entry in enumerate(read_table(args.file), 1):
        row = as_row(entry, f"{args.file}, row {i}", most=8)
        question, rule, turned = negator(row["question"])
        if question is None:
            dropped.append(f"{row['question']}: {rule}")
            continue
        gold = row["choices"].pop(row["answer"])
        wrong = str(rng.choice(row["choices"]))
        right, other = (wrong, gold) if turned else (gold, wrong)  # what is negative already keeps its answer
        answer = 1 - len(made) % 2  # B and A in turn
        made.append(dict(question=question, choices=[other, right] if answer else [right, other], answer=answer,
                         plain=row["question"] if turned else None, rule=rule))
    rules = Counter(row["rule"] for row in made)
    (args.out / "negated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    print_table(["rule", "questions"], rules.most_common())
    print(*(row["question"] for row in made[:8]), f"{len(dropped)} left out", *dropped[:8], sep="\n")
    save_results(args.out, args, rules=rules, dropped=dropped)
    print(args.out / "negated.jsonl")


def fit(args):
    """Fit t1 and s to evals of several models, and set the composed curve beside measured NeQA."""
    models = []
    for path in args.files:
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            models.append(dict(name=found["args"]["model"], size=found["size"], **found["tasks"]))
            if not math.log10(models[-1]["size"] or 0) or math.isnan(models[-1]["neqa"]["accuracy"]):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            fail(f"{path}: not the results.json of an eval with an accuracy and a size (eval has --size)")
    models.sort(key=lambda model: model["size"])
    x = np.log10([model["size"] for model in models])
    if len(set(x)) < 3:
        fail(f"{len(set(x))} sizes: a curve needs three or more")
    tasks = [task for task in TASKS if all(task in model for model in models)]
    right, n = ({task: np.array([model[task][key] for model in models], float) for task in tasks} for key in "kn")
    columns = {task: right[task] / n[task] for task in tasks}
    figures = dict(shape=shape(columns["neqa"], n["neqa"]), equal_p=equal_p(columns["neqa"], n["neqa"]))
    if len(tasks) == 3:
        t1, s, figures["log10_x0"], figures["interval"] = fit_curves(x, right, n)
        columns |= {"t1, fitted": t1(x), "s, fitted": s(x), "NeQA, composed": compose(t1(x), s(x))}
    print_table(["model", "parameters", *columns], [
        (model["name"], f"{model['size']:.3g}", *(y[i] for y in columns.values())) for i, model in enumerate(models)])
    print("NeQA over size: {shape} (p of no difference: {equal_p:.3g})".format(**figures))
    if len(tasks) == 3:
        print("s turns at 10^{log10_x0:.2f} parameters (95 %: {interval[0]:.2f}, {interval[1]:.2f})".format(**figures))
    save_results(args.out, args, models=models, columns=columns, **figures)


# ==================================================================================== command line


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "lab")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    server = server_flags(None)
    flags = server | {
        "steps": dict(type=int, default=400, help="updates of 256 sentences (%(default)s)"),
        "seeds": dict(type=int, default=3, help="tables of truth, weights and streams, from --seed on (%(default)s)"),
        "data": dict(default="builtin", help="builtin (ours), neqa (1,718 questions) or neqa100 (100 with twins) by "
                     "download, a folder with neqa_100*.jsonl, or a file of question, choices, answer (%(default)s)"),
        "prompt": dict(choices=PROMPTS, default="zeroshot", help="the paper's (%(default)s)"),
        "score": dict(choices=("logprob", "text"), help="log-probabilities of the letters (the paper; default of "
                      "completions), or what it writes (default of chat and of cot)"),
        "debias": dict(action="store_true", help="ask in both orders and average: takes out a preference for a letter"),
        "limit": dict(type=int, help="the first so many questions (all)"),
        "size": dict(type=float, help="parameters of the model, for fit"),
        "seed": dict(type=int, default=0, help="of tables, weights, streams, wrong choices (%(default)s)"),
        "out": dict(type=Path, help="folder for results, answers and figures (out/neqa/…)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, **defaults):
        about, name = function.__doc__.strip(), function.__name__.strip("_")
        sub = tasks.add_parser(name, help=about.split("\n")[0], description=about)
        sub.error = fail
        for flag in names.split():
            sub.add_argument(f"--{flag}", **flags[flag])
        sub.set_defaults(task=function, **dict(out=Path(f"out/neqa/{name}")) | defaults)
        return sub

    task(lab, "steps seeds seed out no_plot quiet")
    task(eval_, f"{' '.join(server)} data prompt score debias limit size out quiet", out=None)
    task(negate, "seed out").add_argument("file", help="questions: .jsonl, .csv or .tsv")
    task(compose_, "out")
    task(fit, "out").add_argument("files", nargs="+", help="results.json of evals of three sizes or more")
    args = parser.parse_args(argv)
    for name in ("steps", "seeds", "limit", "concurrency", "size", "max_tokens", "timeout"):
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    if args.out is None:
        parts = (args.model, Path(args.data).stem, args.prompt, *["debias"] * args.debias)
        args.out = Path("out/neqa") / re.sub(r"[^\w.-]+", "_", "-".join(("eval", *parts)))
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
