"""Lost in the middle: how language models use long contexts (Liu, Lin, Hewitt, Paranjape, Bevilacqua, Petroni, Liang;
arXiv 2307.03172).

The problem. A model that accepts a long context need not use all of it. A benchmark with one number cannot tell: it
mixes what the model knows, what it reads, and where the answer happens to stand.

The idea. Fix a question and k items, exactly one of which (the gold) answers it, and move only that one:

    context(g) = others[:g] + [gold] + others[g:]         g = 0 … k − 1; the others, and their order, stay
    accuracy(g) = mean over questions of right(answer(context(g)))
    spread = best − worst    primacy = first − mean of the middle    recency = last − mean of the middle

Two tasks: documents and a question about one (multi-document QA), and JSON pairs of random UUIDs of which one is asked
for (key-value retrieval; no knowledge helps). Prompts and metrics (subspan, kv) are the authors' to the byte.

What is easily misread. The best of many noisy positions always beats the worst: `flat_p` is the p-value of the spread,
and a curve has a name only below 0.05. All positions, and the controls, are of the same questions: an example that one
prompt could not be asked leaves them all. A model that always copies the first item has accuracy 1 at g = 0:

    beyond habit(g) = P(answers item g | gold at g) − P(answers item g | gold elsewhere)

And servers make curves of their own: one that cuts long prompts without a word loses the middle or an end. The halves
of the longest prompt then hold more tokens than the whole, and the run stops. Thinking that never ended is no wrong
answer: with more than 5 % of the answers empty or cut there is no figure.

How to run it.

    python lost_in_middle.py                               why a curve bends: small readers trained here
    python lost_in_middle.py run --model NAME --base_url http://127.0.0.1:8000/v1 --dry_run       calls, tokens, dollars
    python lost_in_middle.py run --model NAME --setting qa --controls          documents; closed-book and oracle beside
    python lost_in_middle.py run --model NAME --setting qa --data mine.jsonl   rows of question, documents, answer
    python lost_in_middle.py run --model NAME --setting qa --data paper --items 20 --compare_paper gpt-3.5-turbo
    python lost_in_middle.py report RUN RUN | odqa --model NAME          two runs, paired; more documents (section 5)

What was measured. The laboratory: readers of width 64 learn k1 v1 … kN vN, key → value; accuracy in %, mean of seeds 0
to 2, two threads of an AMD EPYC, torch 2.13.0 (`python lost_in_middle.py lab --seeds 3`):

                                              step    first pair   lowest between   last
    uniform data, ALiBi                       150     76           52               71
      the same                                550     99           96               98
    data that favour both ends                100     100          8                100
      the same                                150     100          98               100
    RoPE, trained on 16 pairs, asked on 48    200     52           62               100
    no positions, the same                    150     100          100              100
    3 layers that see 4 pairs                 500     18           20               99
    the same, query in front too              500     96           96               100

The U comes and goes while training goes on, or comes with the data; a reader that cannot see far loses the beginning
for good, unless the query stands in front too (section 4.2's cure). Mechanisms in miniature, no replication of the
curves of large models; why even data give a passing U under ALiBi we have not isolated.

A real model: Gemma 3 of 270M weights (4 bits, base) behind llama-cpp-python's server, 40 examples of 8 short pairs:

    run --api completions --items 8 --key_style short --limit 40 --max_tokens 16 --concurrency 1
    gold at 0, 2, 4, 5, 7     accuracy 100, 25, 52, 45, 42     beyond habit 82, 24, 45, 34, 40     shape: primacy

With the gold at 2, 14 of its 40 answers were item 0. Positions are sent from last to first, so that a server's prefix
cache helps; how much was not measured.

What did not hold. No data show that a curve is flat: the shapes are U, primacy, recency, uneven or undecided. RoPE
beyond its trained length gives recency and no U. The 2023 curves of the paper (`PAPER`) were not measured here.

Try:
    run --model gpt-4o-mini --dry_run               one whole prompt; 2,000 calls, about 3.1 million tokens by bytes
    in LAB, window 17 for 9                         all 8 pairs at 100: nothing is out of sight (seed 0)
    in LAB, no ends=True for the second             all 16 pairs at 100 at step 100: the U was the data's (seed 0)
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import string
import sys
import threading
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, product
from pathlib import Path

import numpy as np
import requests
import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import HTTPError

# ==================================================================================== the method: prompts


def place(others, gold, index):
    """The one controlled change of the paper: the gold item stands at index (from 0), the others keep their order."""
    if not 0 <= index <= len(others):
        raise ValueError(f"index {index} is not within 0 to {len(others)}")
    return [*others[:index], gold, *others[index:]]


def qa_prompt(question, docs, query_aware=False, mention_random_order=False):
    """Multi-document QA, to the byte the authors' template. docs: dicts with title and text; [] gives the closed-book
    prompt. query_aware: the question also in front (section 4.2); mention_random_order: appendix C. """
    end = f"Question: {question}\nAnswer:"
    if not docs:
        return end
    if query_aware and mention_random_order:
        raise ValueError("there is no prompt that is query-aware and mentions the random order")
    start = ("Write a high-quality answer for the given question using only the provided search results "
             "(some of which might be irrelevant).")
    start += " The search results are ordered randomly." * mention_random_order
    lines = "\n".join(f"Document [{i}](Title: {doc['title']}) {doc['text']}" for i, doc in enumerate(docs, 1))
    return "\n\n".join([start, *[f"Question: {question}"] * query_aware, lines, end])


def kv_prompt(key, records, query_aware=False):
    """Key-value retrieval, to the byte the authors' template. records: (key, value) pairs, printed as a JSON object."""
    start = "Extract the value corresponding to the specified key in the JSON object below."
    data = "JSON data:\n{" + ",\n ".join(f'"{k}": "{v}"' for k, v in records) + "}"
    return "\n\n".join([start, *[f'Key: "{key}"'] * query_aware, data, f'Key: "{key}"\nCorresponding value:'])

# ==================================================================================== the method: metrics


def normalise(text):
    """Lower case, without ASCII punctuation, without the words a, an and the, single spaces. Unicode dashes stay.

    subtle: an accent of its own (á as two characters) is part of its word, as in the authors' `regex`, not in `re`."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"(?<![\w\u0300-\u036f])(a|an|the)(?![\w\u0300-\u036f])", " ", text).split())


def score_answer(metric, text, answers):
    """One answer of a model against the gold answers → 0.0 or 1.0.

    subspan (the paper's for QA): a normalised gold answer is a substring of the first line, leading blank lines aside;
    an answer that normalises to nothing is in every line. word: the same at word boundaries ("2" is not in "2018").
    kv (the paper's for pairs): the value is a substring of all the text. """
    if metric == "kv":
        return float(any(value.lower() in text.lower() for value in answers))
    line, edge = normalise(text.lstrip().split("\n")[0]), " " * (metric == "word")
    return float(any(f"{edge}{normalise(gold)}{edge}" in f"{edge}{line}{edge}" for gold in answers))


def answered_index(text, values, keys=()):
    """Which item was answered: the index of the value that occurs first in the text, −1 for none. values: one for each
    item in order. keys: of the other items; who names one in the same paragraph copies the data and answers nothing."""
    text = text.lower()
    places = [(text.find(value.lower()), -len(value), i) for i, value in enumerate(values) if value.lower() in text]
    if not places:
        return -1
    at, _, index = min(places)
    end = text.find("\n\n", at)
    paragraph = text[: end if end >= 0 else None]
    return -1 if any(key.lower() in paragraph for key in keys) else index


def answer_matrix(answered, positions, total):
    """Counts (positions, total + 1) of answered, pairs (where the gold stood, which item was answered); the last column
    is −1, none."""
    matrix = np.zeros((len(positions), total + 1), int)
    for gold, item in answered:
        matrix[positions.index(gold), item] += 1
    return matrix


def beyond_habit(matrix, positions):
    """P(answers item g | gold at g) − P(answers item g | gold elsewhere), for each g of at least two positions. A model
    that always copies the first value has accuracy 1 at g = 0, and 0 here."""
    shares = matrix / matrix.sum(1, keepdims=True)
    return np.array([shares[i, g] - np.delete(shares[:, g], i).mean() for i, g in enumerate(positions)])

# ==================================================================================== the method: statistics


def wilson(k, n, z=1.959963984540054):
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


def paired_interval(x, z=1.959963984540054):
    """Mean of n paired differences between −1 and 1 → (mean, low, high) at 95 %. Bonett and Price's (2012), as if one
    question more had come out at +1 and one at −1: unlike a bootstrap's it has a width when all n are alike."""
    n, total = len(x) + 2, float(np.sum(x))
    half = z * math.sqrt(float(np.square(x).sum()) + 2 - total**2 / n) / n
    return total / len(x), max(-1.0, total / n - half), min(1.0, total / n + half)


def flat_p(correct, seed=0, draws=2000):
    """p-value of the spread (best − worst position) if position did not matter: each question's outcomes are shuffled
    among the positions. The best of many noisy positions always beats the worst. correct: (questions, positions)."""
    rng, reached = np.random.default_rng((seed, 2)), 0
    spread = np.ptp(correct.mean(0))
    for _ in range(draws):
        reached += np.ptp(rng.permuted(correct, axis=1).mean(0)) >= spread - 1e-12
    return (1 + reached) / (1 + draws)


def summarise(correct, seed=0):
    """A curve's numbers and name. correct: (questions, positions) in 0 to 1 → dict(spread = best − worst, flat_p,
    primacy = first − mean of the middle, recency = last − mean of the middle, each (value, low, high), shape).

    shape: undecided where flat_p > 0.05 (no data show that a curve is flat), else U, primacy or recency where both
    ends, the first alone, the last alone stand above the middle, else uneven."""
    found, middle = dict(spread=float(np.ptp(correct.mean(0))), flat_p=flat_p(correct, seed)), correct[:, 1:-1].mean(1)
    found |= dict(primacy=paired_interval(correct[:, 0] - middle), recency=paired_interval(correct[:, -1] - middle))
    above = [end for end in ("primacy", "recency") if found[end][1] > 0]
    shape = "U" if len(above) == 2 else above[0] if above else "uneven"
    return dict(found, shape=shape if found["flat_p"] <= 0.05 else "undecided")

# ==================================================================================== the model: readers of the lab

N_KEYS, N_VALUES = 64, 32  # symbols; chance is 1/32, guessing among the values present about 1/N
WIDTH, N_HEADS = 64, 4


def rotary(position):
    """RoPE as a function of (…, seq, channels): turns channel pairs (c, c + half) by position·10000^(−c/half)."""

    def turn(x):
        half = x.shape[-1] // 2
        angle = position[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x.split(half, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    return turn


class PairReader(nn.Module):
    """A causal transformer that reads k1 v1 … kN vN and is asked for the values of M keys.

    pos: learned, rope, alibi or none. smear: a value's token carries its key's embedding too, which spares the long
    plateau before retrieval is found. window: tokens that a token sees, itself included. query_first: the query stands
    in front as well (then M must be 1, since the pairs see it)."""

    def __init__(self, layers, pos, smear, window=None, query_first=False):
        super().__init__()
        self.pos, self.smear, self.window, self.query_first = pos, smear, window, query_first
        self.embed = nn.Embedding(N_KEYS + N_VALUES, WIDTH)
        self.is_query = nn.Parameter(torch.zeros(WIDTH))
        self.place = nn.Embedding(100, WIDTH) if pos == "learned" else None
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(WIDTH), qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH),
            norm2=nn.LayerNorm(WIDTH),
            mlp=nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
        )) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_VALUES)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.05)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def bias(self, position, n_query):
        """(heads or 1, seq, seq), added to the logits: ALiBi's penalty, and −inf where a token may not look."""
        distance = position[:, None] - position
        see = distance >= 0
        see[:, -n_query:] = False  # no query sees another …
        see.fill_diagonal_(True)  # … but itself
        if self.window:
            see = see & (distance < self.window)
        slopes = 2.0 ** (-8 * torch.arange(1, N_HEADS + 1) / N_HEADS) * (self.pos == "alibi")
        return (-slopes[:, None, None] * distance).masked_fill(~see, -math.inf)

    def forward(self, keys, values, queries):
        """keys, values: (batch, N) symbols; queries: (batch, M) keys → logits of their values (batch, M, 32). Each
        query sees the context and itself, and all stand right behind the context: one pass equals M passes. """
        key, value = self.embed(keys), self.embed(N_KEYS + values)
        x = rearrange([key, value + key if self.smear else value], "two b n d -> b (n two) d")
        query = self.embed(queries) + self.is_query
        x = torch.cat([query, x, query] if self.query_first else [x, query], 1)  # (batch, seq, WIDTH)
        n_context = x.shape[1] - queries.shape[1]
        position = torch.arange(x.shape[1]).clamp(max=n_context)
        x = x + self.place(position) if self.place else x
        bias, turn = self.bias(position, queries.shape[1]), rotary(position) if self.pos == "rope" else lambda t: t
        for block in self.blocks:
            q, k, v = rearrange(block.qkv(block.norm1(x)), "b t (three h c) -> three b h t c", three=3, h=N_HEADS)
            seen = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=bias)
            x = x + block.proj(rearrange(seen, "b h t c -> b t (h c)"))
            x = x + block.mlp(block.norm2(x))
        return self.head(self.norm(x[:, n_context:]))


def contexts(batch, n, generator):
    """→ keys (batch, n), distinct within a context, and values (batch, n), drawn with replacement."""
    keys = torch.rand(batch, N_KEYS, generator=generator).argsort(1)[:, :n]
    return keys, torch.randint(N_VALUES, (batch, n), generator=generator)


@torch.no_grad()
def accuracy_by_place(model, n, seed, batch=400):
    """Asks for every pair of 400 contexts → accuracy (n,): all positions on the same contexts."""
    keys, values = contexts(batch, n, torch.Generator().manual_seed(10**6 + seed))
    times = n if model.query_first else 1  # where the context sees its query it can have only one
    said = model(keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0), keys.reshape(batch * times, -1))
    return (said.reshape(batch, n, -1).argmax(-1) == values).float().mean(0).numpy()


def train_reader(seed, steps, reader, n=16, test=16, ends=False, one=False, lr=2e-3):
    """Trains one reader → {step: accuracy (test,)} at each of steps, asked on contexts of test pairs. Each step: 64
    contexts of n pairs and as many queries (one: a single one); ends: the first and last pair are asked for e⁶ ≈ 400
    times as often as the middle. The loss is on the answers alone."""
    torch.manual_seed(seed)
    model, generator, found = PairReader(**reader), torch.Generator().manual_seed(seed), {}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    weights = torch.exp(6 * ends * (torch.linspace(-1, 1, n).abs() - 1)).expand(64, n)
    for step in range(1, max(steps) + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 50)
        keys, values = contexts(64, n, generator)
        asked = torch.multinomial(weights, 1 if one else n, ends, generator=generator)
        said = model(keys, values, keys.gather(1, asked))
        loss = F.cross_entropy(said.flatten(0, 1), values.gather(1, asked).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in steps:
            found[step] = accuracy_by_place(model, test, seed)
    return found

# ==================================================================================== the same in every file

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()


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

# ==================================================================================== the same where a server is asked

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

# ==================================================================================== questions and pairs

ORIGIN = "https://raw.githubusercontent.com/nelson-liu/lost-in-the-middle/main/"
RETRIEVED = ("https://nlp.stanford.edu/data/nfliu/lost-in-the-middle/"
             "nq-open-contriever-msmarco-retrieved-documents.jsonl.gz")
FACT = ("{s} is a market town on a slow brown river. It was founded by {a}, a cloth trader, who bought the ford and "
        "built the first mill. Much of the old wall still stands, and a fair is held below it.")
STARTS = "Ard Bov Cem Dul Eskr Fenn Gorv Hask Ilm Jorr Keld Lumb Morv Nask Orl Pesk Quill Rund Solv Tarn".split()
ENDS = "adran elith omund upell astor ivenn".split()


def builtin_facts():
    """60 rows as those of load_questions, with 20 documents each, of which one answers. Every name is invented."""
    names = [head + tail for tail in ENDS for head in STARTS]  # 120, none part of another
    docs = [dict(title=s, text=FACT.format(s=s, a=a), answer=a) for s, a in zip(names[:60], names[60:])]
    rows = []
    for i, gold in enumerate(docs):
        near = random.Random(i).sample(docs[i - i % 20 :][:20], 20)
        rows.append(dict(query=f"who founded the town of {gold['title']}", answers=[gold["answer"]], docs=near,
                         holds=[doc is gold for doc in near]))
    return rows


def has_answer(doc, answers):
    """Does its text hold an answer, at word boundaries?"""
    text = f" {normalise(doc['text'])} "
    return any(f" {gold} " in text for gold in map(normalise, answers) if gold)


def read_json_rows(path):
    """(where, dict) for each row of a file of JSON lines or of one JSON list, gzipped or not. where: file:row."""
    rows, i = [], 0
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        lines = json.loads(text) if text.lstrip()[:1] == "[" else text.split("\n")
        for i, line in enumerate(lines, 1):
            row = json.loads(line.strip() or "{}") if isinstance(line, str) else line
            rows += [(f"{path}:{i}", dict(row))] * bool(row)
    except (ValueError, TypeError, EOFError, zlib.error) as error:
        fail(f"{path}:{i} is no JSON object ({error}): JSON lines are read, or one JSON list, as .gz too")
    return rows or fail(f"{path} has no rows")


def load_questions(args, url):
    """→ rows of query, answers, docs, and which of the docs hold an answer: from the authors' files (question, answers,
    ctxs), one's own (question, documents, answer; a document may be a bare text), or built in."""
    if args.data == "builtin":
        return builtin_facts()
    rows = []
    for where, row in read_json_rows(download(url) if args.data == "paper" else args.data):
        answers = row.get("answers", row.get("answer"))
        answers = [answers] if isinstance(answers, str) else answers
        try:
            docs = [dict(title="", text=doc) if isinstance(doc, str) else dict(title="") | doc
                    for doc in row.get("ctxs", row.get("documents"))]
            assert all(text.strip() for text in [row["question"], *answers, *(doc["text"] for doc in docs)]) and answers
        except (TypeError, KeyError, AttributeError, AssertionError):
            fail(f"{where} needs question (text), answer (text or texts) and documents (texts, or title and text)")
        holds = [doc.get("hasanswer", has_answer(doc, answers)) for doc in docs]
        rows.append(dict(query=row["question"], answers=answers, docs=docs, holds=holds))
    return rows


def load_qa(args, total):
    """→ examples dict(query, answers, gold, others), total − 1 others each. The gold document is the one with isgold,
    else the only one that holds an answer; none of the others holds one."""
    name = f"{total}_total_documents/nq-open-{total}_total_documents_gold_at_0.jsonl.gz"
    rows = load_questions(args, f"{ORIGIN}qa_data/{name}")
    pool, examples = [doc for row in rows for doc in row["docs"]], []
    for row in rows[: args.limit]:
        held = [doc for doc, hold in zip(row["docs"], row["holds"]) if hold]
        golds = [doc for doc in row["docs"] if doc.get("isgold")] or held
        others = [doc for doc in row["docs"] if doc not in held + golds]
        rng = random.Random(f"{args.seed} {row['query']}")  # of its own: a shorter run sees the same order
        if args.distractors == "random":
            others = (doc for doc in rng.sample(pool, len(pool)) if not has_answer(doc, row["answers"]))
        others = list(islice(others, total - 1))
        if len(golds) != 1 or len(others) < total - 1:
            fail(f"{args.data}: {row['query']!r} has {len(golds)} gold documents (isgold, or the one that holds the "
                 f"answer) and {len(others)} others; needed: 1 and {total - 1} (--items {total}; --distractors random)")
        if args.order == "random":
            rng.shuffle(others)
        examples.append(dict(query=row["query"], answers=row["answers"], gold=golds[0], others=others))
    return examples


def make_pairs(n, k, seed, style="uuid"):
    """n rows of k random pairs, one of them asked for, in the authors' format. Keys and values are distinct within a
    row, and row i depends on seed, k and i alone. style: uuid (version 4), or short: k and 4 digits → 4 digits."""
    for i in range(n):
        rng = random.Random(f"{seed} {k} {i}")
        if style == "short":
            names = [f"{'k' * (j < k)}{x}" for j, x in enumerate(rng.sample(range(1000, 10000), 2 * k))]
        else:
            names = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * k)]
        yield dict(ordered_kv_records=list(zip(names[:k], names[k:])), key=rng.choice(names[:k]))


def load_kv(args, total):
    """→ examples dict(query, answers, gold, others): pairs in the authors' format, total − 1 others each."""
    if args.data == "builtin":
        rows = [("made", row) for row in make_pairs(args.limit or 500, total, args.seed, args.key_style)]
    else:
        url = f"{ORIGIN}kv_retrieval_data/kv-retrieval-{total}_keys.jsonl.gz"
        rows = read_json_rows(download(url) if args.data == "paper" else args.data)
    examples = []
    for where, row in rows[: args.limit]:
        try:
            others = {str(key): str(value) for key, value in row["ordered_kv_records"]}
            gold = row["key"], others.pop(row["key"])
        except (KeyError, TypeError, ValueError):
            fail(f"{where} needs ordered_kv_records, a list of [key, value], and key, one of them")
        if not total <= len(others) + 1 == len(row["ordered_kv_records"]):
            fail(f"{where} has {len(others) + 1} different keys: --items {total} asks for more, or one is there twice")
        examples.append(dict(query=gold[0], answers=[gold[1]], gold=gold, others=list(others.items())[: total - 1]))
    return examples

# ==================================================================================== the experiments: asking

PAPER = """
qa 10 claude-1.3 62.9 58.3 59.7
qa 10 claude-1.3-100k 63.1 58.3 59.7
qa 10 gpt-3.5-turbo 76.8 61.2 62.4
qa 10 gpt-3.5-turbo-16k 76.9 61.0 62.5
qa 10 mpt-30b-instruct 60.2 56.2 59.7
qa 10 longchat-13b-16k 72.1 58.9 58.5
qa 20 claude-1.3 59.9 55.9 56.8 57.2 60.1
qa 20 claude-1.3-100k 59.8 55.9 57.0 57.4 60.0
qa 20 gpt-3.5-turbo 75.8 57.2 53.8 55.4 63.2
qa 20 gpt-3.5-turbo-16k 75.7 57.3 54.1 55.4 63.1
qa 20 mpt-30b-instruct 53.7 51.8 52.2 52.7 56.3
qa 20 longchat-13b-16k 68.6 57.4 55.3 52.5 55.0
qa 20 llama-2-70b-chat 56.8 53.3 54.1 59.7 69.5
qa 30 claude-1.3 59.1 55.1 54.8 55.7 56.4 56.2 59.9
qa 30 claude-1.3-100k 59.1 55.1 54.9 55.7 56.6 56.1 60.0
qa 30 gpt-3.5-turbo-16k 73.4 55.1 50.5 50.9 51.8 54.9 63.7
qa 30 mpt-30b-instruct 51.6 51.3 51.2 49.0 49.6 51.3 54.1
qa 30 longchat-13b-16k 66.9 54.8 52.5 52.9 52.2 51.3 55.1
kv 140 mpt-30b-instruct 100.0 93.6 88.6 80.4 96.2
kv 140 longchat-13b-16k 37.0 38.2 35.4 65.6 88.6
controls 1 longchat-13b-16k 35.0 83.4
controls 1 mpt-30b-instruct 31.5 81.9
controls 1 gpt-3.5-turbo 56.1 88.3
controls 1 gpt-3.5-turbo-16k 56.0 88.6
controls 1 claude-1.3 48.3 76.1
controls 1 claude-1.3-100k 48.2 76.4
"""  # accuracy in %, appendix G (llama-2 and kv: the authors' repository); controls, table 1: closed-book and oracle
PAPER_STEP = {10: 5, 20: 5, 30: 5, 75: 25, 140: 35, 300: 50}  # of so many items the gold is 0, step − 1, 2·step − 1, …


def paper_curve(setting, total, model):
    """Accuracies in % of a curve of the paper; []: it has none."""
    lines = [line for line in PAPER.split("\n") if line.startswith(f"{setting} {total} {model} ")]
    return [float(word) for line in lines for word in line.split()[3:]]


def choose_positions(positions, total):
    """Where the gold stands, from 0: positions, or the paper's for so many items, or five or more from end to end."""
    step = PAPER_STEP.get(total, max(1, total // 4))
    chosen = sorted({*(positions or (0, *range(step - 1, total, step), total - 1))})
    if len(chosen) < 3 or not 0 <= chosen[0] <= chosen[-1] < total:
        fail(f"--positions: at least three of 0 to {total - 1}, and --items no fewer")
    return chosen


def prompts_of(args, example, positions):
    """→ {what: prompt}: the gold at each of positions, from last to first (each begins as the one before, up to where
    its gold stands); then the controls, without documents and with the gold one alone."""
    query, prompts = example["query"], {}
    for g in reversed(positions):
        items = place(example["others"], example["gold"], g)
        if args.setting == "kv":
            prompts[g] = kv_prompt(query, items, args.query_aware)
        else:
            prompts[g] = qa_prompt(query, items, args.query_aware, args.order == "random")
    if args.controls:
        prompts |= {"closed-book": qa_prompt(query, []), "oracle": qa_prompt(query, [example["gold"]])}
    return prompts


def ask_all(args, examples, prompts, metric):
    """Asks each example its prompts ({column: prompt}) → (kept examples, {column: texts}, {column: correct (n,)}).

    An example that misses one answer (prompt too long, call failed) is left out whole: all columns are of the same
    questions. Ends the program where more than 5 % of the answers cannot be read: empty, or wrong and cut on their
    first line."""
    answers = ask(args, [list(asked.values()) for asked in prompts])
    missing = [answer["missing"] for found in answers for answer in found if "missing" in answer]
    kept = [(e, found) for e, found in zip(examples, answers) if all("text" in answer for answer in found)]
    if missing:
        print(f"{len(examples) - len(kept)} of {len(examples)} examples are left out everywhere, the first by "
              f"{missing[0]} (the next run asks what failed again; what overflowed, without {args.out}/answers.jsonl)",
              file=sys.stderr)
    if not kept:
        fail("no example was answered throughout: fewer --items fit a short window")
    texts = [[answer["text"].strip() for answer in found] for _, found in kept]
    correct = np.array([[score_answer(metric, text, e["answers"]) for text in said]
                        for (e, _), said in zip(kept, texts)])
    unread = sum(not text or answer["finish"] == "length" and "\n" not in text and not right
                 for (_, found), *columns in zip(kept, texts, correct) for answer, text, right in zip(found, *columns))
    words = np.mean([len(text.split()) for said in texts for text in said])
    print(f"{args.model}: {len(kept)} examples, answers of {words:.1f} words, {unread} of {correct.size} empty or cut")
    if unread > 0.05 * correct.size:
        fail("no curve can be read from the rest: raise --max_tokens, or have the model think less "
             '(--extra \'{"reasoning_effort": "low"}\')')
    return [e for e, _ in kept], dict(zip(prompts[0], zip(*texts))), dict(zip(prompts[0], correct.T))

# ==================================================================================== the experiments


def percent(x, low=None, high=None):
    return f"{100 * x:.1f}" if low is None else f"{100 * x:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def print_curve(positions, correct, columns):
    """Accuracy and its interval at each position, beside further columns → what draw_panels draws. correct: (n,
    positions)."""
    spans = np.array([(k / len(correct), *wilson(k, len(correct))) for k in correct.sum(0)])
    text = [percent(*span) for span in spans]
    print_table(("gold at", "accuracy, % [95 %]", *columns), list(zip(positions, text, *columns.values())))
    accuracy, low, high = 100 * spans.T
    return positions, accuracy, (abs(accuracy - low), abs(high - accuracy))  # abs: of −1e-14 at 100 %


def draw_panels(fig, panels, xlabel):
    """panels: {title: {label: (x, accuracies in %) or (x, accuracies, error bars)}}."""
    for i, (title, curves) in enumerate(panels.items(), 1):
        ax = fig.add_subplot(-(-len(panels) // 3), min(3, len(panels)), i)
        for label, curve in curves.items():
            ax.errorbar(*curve, marker=".", capsize=2, label=label)
        ax.set(title=title, xlabel=xlabel, ylabel="accuracy, %", ylim=(-3, 104))
        ax.legend(fontsize=8)


def positions(args):
    """Sections 2 and 3: a model's accuracy against the position of the item that answers (the task `run`)."""
    kv, total = args.setting == "kv", args.items or dict(kv=75, qa=10)[args.setting]
    places, overlay = choose_positions(args.positions, total), paper_curve(args.setting, total, args.compare_paper)
    if args.query_aware and args.order == "random" or kv and args.controls:
        fail("--query_aware with --order random has no prompt in the paper, and pairs have no --controls")
    if args.compare_paper and len(overlay) != len(places):
        fail(f"--compare_paper {args.compare_paper}: the paper has no such curve of {args.setting}, {total} items")
    examples = (load_kv if kv else load_qa)(args, total)
    examples, texts, correct = ask_all(args, examples, [prompts_of(args, e, places) for e in examples],
                                       "kv" if kv else args.metric)
    curve, columns = np.stack([correct[g] for g in places], 1), {}
    if kv or args.data == "builtin":  # each item has a value by which an answer names it
        answered = []
        for example, g in product(range(len(examples)), places):
            others, gold = examples[example]["others"], examples[example]["gold"]
            values = [item[1] if kv else item["answer"] for item in place(others, gold, g)]
            keys = [key for key, _ in others] if kv else ()
            answered.append((g, answered_index(texts[g][example], values, keys)))
        matrix = answer_matrix(answered, places, total)
        columns = {"beyond habit, %": map(percent, beyond_habit(matrix, places)), "said none": matrix[:, -1]}
        columns |= {f"said {g}": matrix[:, g] for g in places}
    curves = {f"{args.model}, n = {len(curve)}": print_curve(places, curve, columns)}
    found = summarise(curve, args.seed)
    print(f"shape: {found['shape']}. In points: spread {percent(found['spread'])} (p {found['flat_p']:.4f} if position "
          f"did not matter), primacy {percent(*found['primacy'])}, recency {percent(*found['recency'])}")
    if overlay:
        curves[f"paper: {args.compare_paper}"] = places, overlay
    for control in ("closed-book", "oracle") if args.controls else ():
        print(f"{control}: {percent(correct[control].mean())} %, on the same questions")
        curves[control] = places, [100 * correct[control].mean()] * len(places)
    if args.controls and (paper := paper_curve("controls", 1, args.compare_paper)):
        print("the paper's closed-book and oracle, %:", *paper)
    xlabel = f"index of the gold item, 0 to {total - 1}"
    figure(args.out / "curve.png", args, lambda fig: draw_panels(fig, {args.setting: curves}, xlabel))
    save_results(args.out, args, setting=[args.setting, total, args.metric, places], correct=curve, curves=curves,
                 examples=[json.dumps([e["query"], e["answers"]]) for e in examples], texts=texts, **found)


def report(args):
    """Two runs beside each other, on the examples that both have (a seed, a number of pairs makes other ones)."""
    runs = [json.loads(Path(folder, "results.json").read_text("utf-8")) for folder in args.runs]
    right = [dict(zip(run["examples"], run["correct"])) for run in runs]
    shared = [example for example in right[0] if example in right[1]]
    if not shared or runs[0]["setting"] != runs[1]["setting"]:
        fail(f"they did not ask the same examples in the same way: {runs[0]['setting']}, {runs[1]['setting']}")
    first, second = (np.array([answers[example] for example in shared]) for answers in right)
    gains = [percent(*paired_interval(x)) for x in (second - first).T]
    print(f"{len(shared)} examples: {args.runs[0]}, then {args.runs[1]} and what it has more, in points")
    curves = {args.runs[0]: print_curve(runs[0]["setting"][-1], first, {}),
              args.runs[1]: print_curve(runs[0]["setting"][-1], second, {"more [95 %]": gains})}
    figure(args.out / "curves.png", args, lambda fig: draw_panels(fig, {"runs": curves}, "index of the gold item"))


def odqa(args):
    """Section 5: as more documents are retrieved, does the reader gain what the retriever finds?"""
    rows, counts = load_questions(args, RETRIEVED)[: args.limit], sorted(args.k)
    if min(len(row["docs"]) for row in rows) < counts[-1]:
        fail(f"--k: numbers of documents, no more than every question has in --data {args.data}")
    prompts = [{k: qa_prompt(row["query"], row["docs"][:k]) for k in counts} for row in rows]
    rows, _, correct = ask_all(args, rows, prompts, args.metric)
    curve = np.stack([correct[k] for k in counts], 1)
    recall = np.mean([[any(row["holds"][:k]) for k in counts] for row in rows], 0)
    gains = ["", *(percent(*paired_interval(x)) for x in np.diff(curve).T)]
    reader = print_curve(counts, curve, {"gain [95 %]": gains, "recall, %": map(percent, recall)})
    curves = {args.model: reader, "retriever: recall": (counts, 100 * recall)}
    figure(args.out / "odqa.png", args, lambda fig: draw_panels(fig, {"odqa": curves}, "documents"))
    save_results(args.out, args, k=counts, recall=recall, correct=curve)


BOUND, FAR = dict(layers=1, smear=True), dict(layers=3, smear=True, window=9, pos="learned")
LAB = {  # what bends the curve, and what does not: arguments of train_reader
    "uniform data, ALiBi": dict(steps=(150, 550), reader=dict(layers=2, smear=False, pos="alibi")),
    "data that favour both ends": dict(steps=(100, 150), ends=True, reader=dict(BOUND, pos="learned")),
    "RoPE, trained on 16 pairs, asked on 48": dict(steps=(200,), test=48, reader=dict(BOUND, pos="rope")),
    "no positions, the same": dict(steps=(150,), test=48, reader=dict(BOUND, pos="none")),
    "3 layers that see 4 pairs": dict(steps=(500,), n=8, test=8, one=True, lr=3e-3, reader=FAR),
    "the same, query in front too": dict(steps=(500,), n=8, test=8, one=True, lr=3e-3,
                                         reader=dict(FAR, query_first=True)),
}


def lab(args):
    """Why a curve bends: small readers trained here, five mechanisms (two minutes)."""
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    torch.set_num_threads(1)  # these tensors are small
    seeds, rows, panels = range(args.seed, args.seed + args.seeds), [], {}
    for name in tqdm(LAB, disable=args.quiet):
        job = dict(LAB[name], steps=[min(step, args.steps) for step in LAB[name]["steps"]])
        found, panels[name] = [train_reader(seed, **job) for seed in seeds], {}
        for step in found[0]:
            accuracy = 100 * np.array([one[step] for one in found])  # (seeds, pairs)
            mean = accuracy.mean(0)
            rows.append((name, step, *map("{:.0f}".format, (mean[0], mean[1:-1].min(), mean[-1]))))
            panels[name][f"step {step}"] = range(len(mean)), mean, (mean - accuracy.min(0), accuracy.max(0) - mean)
    print_table(("accuracy, %", "step", "first", "lowest middle", "last"), rows)
    xlabel = "which pair is asked for (bars: lowest and highest seed)"
    figure(args.out / "lab.png", args, lambda fig: draw_panels(fig, panels, xlabel), (14, 7))
    save_results(args.out, args, rows=rows)

# ==================================================================================== command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = server_flags(100) | {
        "setting": dict(choices=("kv", "qa"), default="kv", help="key-value pairs, or documents and a question"),
        "data": dict(default="builtin", help="builtin (made here), paper (the authors' files, a download), or a file: "
                     "the authors' format, or rows of question, documents, answer (JSON lines or a list, .gz too)"),
        "items": dict(type=int, help="documents (10; the paper's 10, 20, 30) or pairs (75; the paper's 75, 140, 300)"),
        "key_style": dict(choices=("uuid", "short"), default="uuid", help="pairs made here: the paper's UUIDs, or 4 "
                          "digits, better below a billion weights"),
        "positions": dict(type=int, nargs="+", help="of the gold item, from 0 (the paper's, else five or more)"),
        "limit": dict(type=int, help="the first so many examples (pairs made here: 500, as the paper)"),
        "query_aware": dict(action="store_true", help="the query also in front (section 4.2)"),
        "order": dict(choices=("ranked", "random"), default="ranked", help="qa: of the other documents; random: the "
                      "prompt says so (appendix C)"),
        "distractors": dict(choices=("retrieved", "random"), default="retrieved", help="qa: near misses, or other "
                            "questions' documents (appendix B)"),
        "controls": dict(action="store_true", help="qa: also without documents, and with the gold one alone"),
        "metric": dict(choices=("subspan", "word"), default="subspan", help="qa: the paper's, or at word boundaries"),
        "runs": dict(nargs=2, metavar="RUN", help="a folder that run wrote"),
        "compare_paper": dict(metavar="MODEL", help="overlay the paper's curve, as gpt-3.5-turbo or mpt-30b-instruct"),
        "k": dict(type=int, nargs="+", default=[1, 2, 5, 10, 20], help="numbers of documents (the paper's 5 to 50)"),
        "seeds": dict(type=int, default=2, help="readers of each kind, from --seed on"),
        "steps": dict(type=int, default=550, help="stop every reader here (each kind has its own number, up to 550)"),
        "seed": dict(type=int, default=0, help="of pairs, orders, the p-value and readers"),
        "out": dict(type=Path, help="folder for answers, results and figure (out/lost_in_middle/ and the run's name)"),
        "no_plot": dict(action="store_true", help="no figure"),
        "quiet": dict(action="store_true", help="no progress bar"),
    }

    asking, shown = " ".join(server_flags(100)), "out no_plot quiet"
    for name, function, names in (
        ("lab", lab, f"seeds steps seed {shown}"),
        ("run", positions, f"{asking} setting data items key_style positions limit query_aware order distractors "
                           f"controls metric compare_paper seed {shown}"),
        ("odqa", odqa, f"{asking} data k limit metric {shown}"),
        ("report", report, f"runs {shown}"),
    ):
        sub = tasks.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.error = fail
        for flag in names.split():
            sub.add_argument(flag if flag == "runs" else f"--{flag}", **flags[flag])
        sub.set_defaults(task=function)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv if argv and (argv[0] in ("-h", "--help") or argv[0][0] != "-") else ["lab", *argv])
    for name in ("steps", "seeds"):
        if not getattr(args, name, 1) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    words = [args.task.__name__, *(getattr(args, name, "") for name in ("setting", "model"))]
    args.out = args.out or Path("out/lost_in_middle", re.sub(r"[^\w.-]+", "_", "-".join(filter(None, words))))
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
