"""Lexinvariant language models: no fixed token embeddings (Huang and others, arXiv 2305.16349).

The problem. A language model knows its symbols: row v of a table is what v means. Could it do without, and read every
text as a cipher whose symbols mean nothing but what this text makes of them?

The idea. Give every sequence a fresh random table. Equal symbols share a vector inside a sequence and never across
sequences; the same vectors read out, so the model points at a symbol of this context instead of naming a known one.
What it learns is then the same for any renaming π of the alphabet,

    p(x_1 … x_T) = p(π(x_1) … π(x_T)),       and the best such p for a language q is p′(x) = mean over all π of q(πx)

The theorem. Not knowing d symbols costs little. The paper bounds the average L1 distance of p′ to q by Õ((d/T)^¼). One
line gives more: q(x) is one of the d! terms of the mean, so p′(x) ≥ q(x)/d!, and for every text of whatever length

    −ln p′(x) ≤ −ln q(x) + ln d!             in all: 64.6 nats for 27 symbols

The compact head. At position t a lexinvariant p can tell apart only the symbols seen so far; all others must have the
same probability. So a softmax over pointers to them and one entry NEW loses nothing (see pointer_cross_entropy), and no
table is needed: a symbol's vector is the draw at its first occurrence.

How to run it.

    python lexinvariant.py                        theorem, LookUp, a chain deciphered, English (2 minutes, one core)
    python lexinvariant.py lookup | bayes         table 1 of the paper, also --task permutation; the exact optimum
    python lexinvariant.py train --mode canonical, then decipher --text "wkh txlfn eurzq ira …"    your cipher
    torchrun --nproc_per_node=8 lexinvariant.py train --preset paper --data FILE       150M weights, 250,000 steps

What the paper reports (150M weights, 8 billion characters of the Pile): perplexity 3.38 lexinvariant and 2.00 standard
after 511 characters; 99.6 % of a cipher's key read by a probe; LookUp 91.8 against 48.5 %, Permutation 59.4 against
27.7 %.

What we measured (one core of an AMD EPYC shared with others, torch 2.13.0, seed 0).

    python lexinvariant.py                 121 CPU seconds
    the exact p′ loses to q                1.792, 3.178, 4.787, 6.579 nats in all for 3 to 6 symbols: ln d!
    LookUp of random values, both models   gaussian 0.982, 0.978, 0.972, standard 0.115, 0.146, 0.181 (seeds 0 to 2); as
        trained on all symbols             in training, where the standard model knows the map by heart: 0.98 and 1.00
    a chain of 4 symbols (canonical)       at most 0.021 nats from p′; symbols 32 to 64 read right 0.966, by p′ 0.999

    English, nats a character by position      0 to 8     32 to 64     128 to 192     (single characters: 2.840)
    one model, none permuted                   3.032      2.259        1.986
    a quarter permuted                         3.163      2.535        2.221
    all permuted                               3.431      2.832        2.424
    gaussian, a model of its own               3.294      2.879        2.565

    lookup                        seeds 0 to 2: canonical 0.933, 0.926, 0.926; permute 0.994, 0.991, 0.992
    lookup --task permutation     seed 0: gaussian 0.978, canonical 0.998, permute 1.000, standard 0.416

What did not hold at this scale. A cipher of English is not read: after `train --mode canonical --steps 400` (2.269
nats at 128 to 192) `decipher --steps 150` reads 0.233 of the characters there, where always the space would be 0.171;
key precision 0.094. It says so beside a reading. Gaussian rows read a chain of 4 symbols less well than canonical
ranks: `bayes --mode gaussian` is up to 0.16 nats from p′ and reads 0.74 of the symbols right. LookUp's training has one
fixed map on purpose, which rewards knowing it by heart. Settings were chosen on seeds 0 and 1 of these tasks.

GPU: not measured; `--preset gpu` and `--preset paper` have run on a CPU only, in tests of their parts.

Ours, not the paper's: the bound ln d!, canonical ranks, the compact head, the read-out matrix, Muon, and the trunk's
convolution and matched start (see RelativeAttention). `--preset paper` has the paper's trunk (unit queries and keys,
dropout), Adafactor (no momentum; its memory of squares stops growing at step 10,000) and cosine; head and read-out are
ours.

Try (`lookup --seeds 1`, random values: gaussian 0.982, standard 0.115):
    in RelativeAttention, no line with 0.5           gaussian 0.126: no key knows the symbol before, nothing to look up
    in RelativeAttention, no k.copy_(q)              gaussian 0.865: equal symbols have to find each other first
    in optimizers, AdamW for all                     gaussian 0.952, but standard does not learn its map (0.030)
"""

import argparse
import ast
import itertools
import json
import math
import os
import re
import sys
import sysconfig
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ==================================================================================== the method: no table


def positions_of(x):
    """0, 1, … along the second dimension of x, on its device."""
    return torch.arange(x.shape[1], device=x.device)


def first_occurrences(ids):
    """(batch, seq) ids → where the symbol of each position stands first, (batch, seq) int64."""
    return (ids[:, :, None] == ids[:, None, :]).int().argmax(-1)


def pointers(symbols):
    """What the compact head must know of (batch, seq + 1) symbols → first (batch, seq), where each position's symbol
    stands first; target (batch, seq), where the next symbol does, −1 if it is new; n_seen (batch, seq), how many
    distinct symbols there are up to a position. Looks at no later one than the target."""
    first, position = first_occurrences(symbols), positions_of(symbols)
    target = torch.where(first[:, 1:] < position[1:], first[:, 1:], -1)
    return first[:, :-1], target, (first == position)[:, :-1].cumsum(1)


def pointer_logits(query, rows, first):
    """z[t, s] = ⟨query_t, rows_s⟩/√d where s ≤ t is a first occurrence, elsewhere −∞. query, rows (batch, seq, d),
    first (batch, seq) → (batch, seq, seq), float32 or wider."""
    z = query @ rows.mT / math.sqrt(query.shape[-1])
    position = positions_of(first)
    seen = (first == position)[:, None] & (position <= position[:, None])
    return z.to(torch.promote_types(z.dtype, torch.float32)).masked_fill(~seen, -math.inf)


def pointer_cross_entropy(query, rows, first, target, new, n_seen, n_vocab):
    """Loss of the compact head, (batch, seq) nats: a softmax over the distinct symbols seen so far and one entry NEW.

    query (batch, seq, d); rows (batch, seq, d), each position's vector; first, target, n_seen as `pointers` makes them;
    new (batch, seq), the logit of NEW; z as above.

        −log p(y) = log(Σ_s e^z[t,s] + e^new_t) − z[t, first(y)]                     y has been seen
                                                − new_t + ln(n_vocab − n_seen_t)     y is one of those not seen

    Why nothing is lost: a lexinvariant p has p(x) = p(πx) for every π. Take a π that moves only symbols that are not
    in x_1 … x_t: the context stays, so p(y | x_1 … x_t) = p(πy | x_1 … x_t), the same for all unseen y. """
    z = pointer_logits(query, rows, first)
    new = new.masked_fill(n_seen == n_vocab, -math.inf)  # nothing is left to be new
    chosen = z.gather(2, target.clamp_min(0)[..., None]).squeeze(2)
    novel = new - (n_vocab - n_seen).clamp_min(1).to(new.dtype).log()
    return torch.logaddexp(z.logsumexp(2), new) - torch.where(target >= 0, chosen, novel)


def renamed(n, n_vocab, p, device=None):
    """What becomes of each symbol in n sequences, (n, n_vocab) int64: with probability p, a number or (n, 1), its place
    in a random permutation, else itself (section 3.6). p = 1: a permutation; between, two may become one."""
    permutation = torch.rand(n, n_vocab, device=device).argsort(1)
    chosen = torch.rand(n, n_vocab, device=device) < p
    return torch.where(chosen, permutation, torch.arange(n_vocab, device=device))


MODES = ("gaussian", "canonical", "permute", "standard")


class LexinvariantEmbedding(nn.Module):
    """The two ends of a language model whose symbols mean nothing beforehand, around any causal trunk:

        symbols, rows = embedding(x)  # x (batch, seq + 1) ids → symbols alike; rows (batch, seq, d)
        hidden = trunk(rows * embedding.scale + embedding.shift)  # (batch, seq, d); appendix B
        loss = embedding.loss(hidden, symbols, rows)  # (batch, seq) nats

    gaussian   the paper's: a fresh row of N(0, I) for each symbol of each sequence, for input and read-out. There is no
               table: a symbol's row is the draw at its first occurrence. So for one draw the losses do not change by a
               bit when symbols are renamed
    canonical  ours: a symbol's id is the rank of its first occurrence, then a learned table; likewise to the bit
    permute    a fresh permutation of the ids of each sequence, then an ordinary model: invariant on average (appendix
               G). With p < 1 a symbol is permuted with that probability: the regularising of section 3.6 (p = 0.2)
    standard   an ordinary table

    The first two have the compact head, the others a softmax over the vocabulary, all behind a matrix that starts at
    zero (ours). All draws come from torch's global generator. """

    def __init__(self, n_vocab, d_model, mode="gaussian", p=1.0):
        super().__init__()
        self.n_vocab, self.mode, self.p, self.compact = n_vocab, mode, p, mode in ("gaussian", "canonical")
        self.table = None if mode == "gaussian" else nn.Parameter(torch.randn(n_vocab, d_model))
        self.scale, self.shift = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.readout = nn.Linear(d_model, d_model, bias=False)
        self.new = nn.Linear(d_model, 1) if self.compact else None
        nn.init.zeros_(self.readout.weight)  # the first loss is near that of a uniform guess

    def forward(self, x, p=None, mine=slice(None)):
        """p: instead of the module's own, a number or (batch, 1). mine: the sequences wanted; the draw is of all of
        x, so that each sequence's is the same on any number of ranks."""
        if self.mode == "gaussian":
            draw = torch.randn(len(x), x.shape[1] - 1, len(self.scale), device=x.device)[mine]
            first = first_occurrences(x[mine, :-1])[..., None]
            return x[mine], draw.gather(1, first.expand_as(draw))
        if self.mode == "permute":
            x = renamed(len(x), self.n_vocab, self.p if p is None else p, x.device).gather(1, x)
        if self.mode == "canonical":
            first = first_occurrences(x)
            rank = (first == positions_of(x)).cumsum(1) - 1
            x = rank.gather(1, first)  # banana → 0 1 2 1 2 1
        return x[mine], F.embedding(x[mine, :-1], self.table)

    def logits(self, hidden):
        return (self.readout(hidden) @ self.table.T / math.sqrt(len(self.scale))).float()

    def loss(self, hidden, symbols, rows):
        if not self.compact:
            return F.cross_entropy(self.logits(hidden).mT, symbols[:, 1:], reduction="none")
        (first, target, n_seen), new = pointers(symbols), self.new(hidden).squeeze(2).float()
        return pointer_cross_entropy(self.readout(hidden), rows, first, target, new, n_seen, self.n_vocab)

    def right(self, hidden, symbols, rows):
        """Whether the next symbol is the likeliest one, (batch, seq) bool. Compact head: among those seen."""
        if not self.compact:
            return self.logits(hidden).argmax(2) == symbols[:, 1:]
        first, target, _ = pointers(symbols)
        return pointer_logits(self.readout(hidden), rows, first).argmax(2) == target


# ==================================================================================== the method: the best there is


def bayes_losses(transition, x):
    """Of a Markov chain q and of the best lexinvariant predictor p′(x) = mean over all d! permutations π of q(πx),
    exactly.

    transition (d, d): rows sum to 1, the first symbol is uniform; x (n, T) → losses of q and of p′, (n, T) nats each,
    and p′'s reading, (n, T): the plain symbol that the posterior over π, given x_1 … x_t, finds likeliest for x_t. """
    d = len(transition)
    log_q, pi = np.log(transition), np.array(list(itertools.permutations(range(d))))  # (d!, d), first the identity
    weight = np.full((len(x), len(pi)), -math.log(len(pi)))  # of each π: log q(πx)/d!
    mine, total, reading = np.empty(x.shape), np.empty(x.shape), np.empty_like(x)
    for t in range(x.shape[1]):
        plain = pi[:, x[:, t]].T  # (n, d!): what each π reads here
        weight += log_q[pi[:, x[:, t - 1]].T, plain] if t else -math.log(d)
        mine[:, t], total[:, t] = weight[:, 0], np.logaddexp.reduce(weight, 1)
        posterior = np.exp(weight - total[:, t, None])
        reading[:, t] = np.stack([(posterior * (plain == symbol)).sum(1) for symbol in range(d)]).argmax(0)
    return -np.diff(mine, prepend=-math.log(len(pi))), -np.diff(total, prepend=0), reading


def random_chain(d, rng, concentration=0.4):
    chain = rng.dirichlet(np.full(d, concentration), d) + 1e-3
    return chain / chain.sum(1, keepdims=True)


def chain_text(transition, n, length, rng):
    """n sequences from a chain, first symbol uniform → (n, length) int64."""
    ends, x = transition[:, :-1].cumsum(1), np.empty((n, length), np.int64)
    x[:, 0] = rng.integers(len(transition), size=n)
    for t in range(1, length):
        x[:, t] = (rng.random((n, 1)) > ends[x[:, t - 1]]).sum(1)
    return x


# ==================================================================================== the model


def relative_buckets(positions):
    """T5's 32 causal buckets of the distance t − s of positions (seq,), (seq, seq) int64: one each up to 16, then
    logarithmic up to 128, then the last."""
    distance = (positions[:, None] - positions).clamp_min(0)
    far = 16 + (torch.log(distance.clamp_min(1) / 16) / math.log(128 / 16) * 16).long()
    return torch.where(distance < 16, distance, far.clamp_max(31))


class RelativeAttention(nn.Module):
    """Causal attention with a learned bias for each bucket of distance.

    paper: unit queries and keys with a learned scale a head, dropout. Otherwise, ours, what lets a small model learn
    in seconds to look symbols up: a causal convolution of width 4 on each channel of q, k and v, whose keys start half
    on the symbol before, so that "what followed this symbol last time?" takes one layer; and matched weights, keys
    equal to queries and the output the transpose of the values: equal symbols attend to each other and are copied. """

    def __init__(self, d_model, n_head, paper):
        super().__init__()
        self.n_head, self.paper = n_head, paper
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.bias = nn.Embedding(32, n_head)
        nn.init.zeros_(self.bias.weight)
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=d_model**-0.5)
        if paper:
            self.scale = nn.Parameter(torch.full((n_head, 1, 1), (d_model / n_head) ** 0.5))  # logits of 1
            return
        self.conv = nn.Conv1d(3 * d_model, 3 * d_model, 4, groups=3 * d_model, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()[..., 3] = 1  # the position itself …
            self.conv.weight[d_model : 2 * d_model, 0, 2:] = 0.5  # … but of a key half it, half the one before
            q, k, v = self.qkv.weight.chunk(3)
            k.copy_(q)
            self.out.weight.copy_(v.T)

    def forward(self, x, buckets):  # (batch, seq, d_model), (seq, seq)
        qkv = self.qkv(x)
        if not self.paper:
            qkv = self.conv(F.pad(qkv.mT, (3, 0))).mT
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (batch, head, seq, head width) each
        if self.paper:
            q, k = (x.to(v.dtype) for x in (F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)))
        mask = self.bias(buckets).permute(2, 0, 1) + torch.full(buckets.shape, -math.inf, device=x.device).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, mask.to(v.dtype), 0.05 * (self.paper and self.training))
        return self.out(y.transpose(1, 2).flatten(2))


class TrunkLayer(nn.Module):
    def __init__(self, d_model, n_head, d_ff, paper):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(d_model, eps=1e-6), nn.RMSNorm(d_model, eps=1e-6)
        self.attention = RelativeAttention(d_model, n_head, paper)
        self.up, self.down = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)
        self.drop = nn.Dropout(0.05 if paper else 0.0)
        nn.init.normal_(self.up.weight, std=d_model**-0.5)
        nn.init.normal_(self.down.weight, std=d_ff**-0.5 if paper else 0.0)

    def forward(self, x, buckets):
        x = x + self.drop(self.attention(self.norm_1(x), buckets))
        return x + self.drop(self.down(F.relu(self.up(self.norm_2(x)))))


class LexinvariantLM(nn.Module):
    """A decoder with T5's relative positions (section 3.1) between the two ends of a LexinvariantEmbedding. paper: the
    paper's trunk and read-out, without what is ours (see RelativeAttention)."""

    def __init__(self, n_vocab, mode="gaussian", d_model=64, n_layer=2, n_head=2, d_ff=128, p=1.0, paper=False):
        super().__init__()
        self.config = dict(n_vocab=n_vocab, mode=mode, d_model=d_model, n_layer=n_layer, n_head=n_head, d_ff=d_ff, p=p,
                           paper=paper)
        self.embedding = LexinvariantEmbedding(n_vocab, d_model, mode, p)
        self.layers = nn.ModuleList(TrunkLayer(d_model, n_head, d_ff, paper) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)

    def forward(self, x, p=None, mine=slice(None)):
        """x (batch, seq + 1) ids; p, mine as in LexinvariantEmbedding → loss (batch, seq) in nats, hidden (batch, seq,
        d_model), symbols (batch, seq + 1), rows (batch, seq, d_model)."""
        symbols, rows = self.embedding(x, p, mine)
        hidden, buckets = rows * self.embedding.scale + self.embedding.shift, relative_buckets(positions_of(rows))
        for layer in self.layers:
            hidden = layer(hidden, buckets)
        hidden = self.norm(hidden)
        return self.embedding.loss(hidden, symbols, rows), hidden, symbols, rows


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


def set_up(args):
    """Seeds, device and torchrun's process group → (device, rank, world)."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", device.index or local))
            torch.set_float32_matmul_precision("high")
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here: {error}")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    return device, rank, world


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


def stdlib_sources():
    """The sources that every Python ships, a list of texts in a fixed order."""
    root, skip = Path(sysconfig.get_path("stdlib")), {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    return [p.read_text("utf-8", "ignore") for p in files]


def stdlib_prose():
    """The English that every Python ships, in a fixed order: help topics, then each module's docstrings."""
    from pydoc_data.topics import topics

    warnings.simplefilter("ignore", SyntaxWarning)  # of old escapes in other people's strings
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [[n for n in ast.walk(ast.parse(source)) if isinstance(n, documented)] for source in stdlib_sources()]
    docstrings = ["\n\n".join(filter(None, map(ast.get_docstring, file))) for file in nodes]
    return [topics[name] for name in sorted(topics)] + docstrings


# ==================================================================================== training


def optimizers(model, lr):
    """Muon for the matrices, at five times the rate of AdamW for the rest; for the paper's trunk Adafactor."""
    if model.config["paper"]:
        return [torch.optim.Adafactor(model.parameters(), lr)]
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 1]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=5 * lr, weight_decay=0.0),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step, steps, paper):
    """Share of the peak learning rate: linear over 50 steps, constant, from the middle on linear to 0.1 (a cosine
    learns LookUp later). paper: linear over 1,000 steps, and a cosine from 1 to 0.1."""
    if paper:
        return min(1, (step + 1) / 1000) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    return min(1, (step + 1) / 50, 2.1 - 2 * step / steps)


def update(model, opts, batch_of, steps, seed, first=0, quiet=True):
    """Updates first + 1 … steps on batch_of(step) → x (batch, seq + 1) ids, p (see LexinvariantEmbedding). Yields
    (updates done, loss) after each, so that the caller saves. Under torchrun x is the batch of all ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, paper = model.norm.weight.device, model.config["paper"]
    ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    for step in tqdm(range(first, steps), "train", steps, initial=first, disable=quiet or rank > 0):
        model.train()
        torch.manual_seed(1_000_003 * seed + step)  # the same draws after a resume, and on every rank
        x, p = batch_of(step)
        with cast:
            loss = ddp(x.to(device), p, slice(rank, None, world))[0].mean()
        loss.backward()
        if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            fail(f"the gradient is not finite at step {step + 1}: lower --lr")
        for opt in opts:
            for state in opt.state.values() if paper else ():
                state["step"].clamp_(max=9_999)  # subtle: torch's Adafactor caps the rate at 1/√step, so at 0.01
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * rate(step, steps, paper)
            opt.step()
            opt.zero_grad()
        model.eval()
        yield step + 1, float(loss.detach())


def train_small(n_vocab, mode, texts, steps, seed, quiet=True, p=(1.0,), **size):
    """A model for the experiments in miniature, trained on texts(step); p: of the embedding, by turns."""
    torch.manual_seed(seed)
    model = LexinvariantLM(n_vocab, mode, **size)
    batch_of = lambda step: (texts(step), p[step % len(p)])
    for _ in update(model, optimizers(model, 4e-3), batch_of, steps, seed, 0, quiet):
        pass
    return model


EVALUATION = 10**12


@torch.no_grad()
def read(model, x, p=None, seed=0):
    """The model on x (n, seq + 1), 50 sequences at a time, with draws that no training has → loss (n, seq), hidden (n,
    seq, d), symbols (n, seq + 1), rows (n, seq, d), on the CPU."""
    torch.manual_seed(EVALUATION + seed)
    parts = [model(part.to(model.norm.weight.device), p) for part in x.split(50)]
    return [torch.cat(part).cpu() for part in zip(*parts)]


# ==================================================================================== text

LETTERS = " abcdefghijklmnopqrstuvwxyz"
ALPHABETS = {"az27": LETTERS, "ascii": "".join(map(chr, range(128)))}


def to_ids(text, alphabet):
    """Text → ids, uint8: az27 (0 the space, 1 to 26 the letters; all else is a space), or ascii (all else left out)."""
    if alphabet == "ascii":
        return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    raw = np.frombuffer(re.sub("[^a-z]+", " ", text.lower()).encode(), np.uint8)
    return np.where(raw == 32, 0, raw - 96).astype(np.uint8)


def text_of(path):
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8")


def load_text(data, alphabet, seq):
    """→ (training ids, validation ids, a line on what was read). data: "prose", what every Python ships, every 20th
    text for validation; or a text file, its last 20th."""
    if data == "prose":
        texts = stdlib_prose()
        parts = ["\n".join(t for i, t in enumerate(texts) if (i % 20 == 19) == held_out) for held_out in (False, True)]
    else:
        text = text_of(data)
        parts = [text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]]
    train, val = (to_ids(part, alphabet) for part in parts)
    if "\0" in parts[0] or len(val) < seq + 2:
        fail(f"--data {data}: no text, it has zero bytes; or too little, {len(val)} characters to validate on")
    kept = "letters, all else as spaces" if alphabet == "az27" else "ASCII, all else left out"
    return train, val, f"{data}: {sum(map(len, parts)):,} characters, read as {len(train) + len(val):,} ({kept})"


def windows(ids, n, seq, *counter):
    """n random windows (n, seq + 1) int64 of ids (length,). They depend on the counter alone."""
    starts = np.random.default_rng(counter).integers(len(ids) - seq, size=n)
    return torch.from_numpy(ids[starts[:, None] + np.arange(seq + 1)].astype(np.int64))


def print_curves(title, curves):
    """{name: a value for each position} → a table of means over ranges of positions."""
    edges = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
    spans = [(a, b) for a, b in itertools.pairwise(edges) if a < len(next(iter(curves.values())))]
    print_table([title, *(f"{a}-{b}" for a, b in spans)],
                [[name, *(float(curve[a:b].mean()) for a, b in spans)] for name, curve in curves.items()])


# ==================================================================================== deciphering


def train_probe(model, batch_of, n_vocab, steps, seed):
    """Section 3.2: a frozen model's last hidden state → logits of the plain symbol, two layers. batch_of(step) → plain
    texts (batch, seq + 1)."""
    d_model = model.config["d_model"]
    torch.manual_seed(seed)
    probe = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, n_vocab))
    opt = torch.optim.AdamW(probe.parameters(), 2e-3)
    for step in range(steps):
        x = batch_of(step)
        hidden = read(model, x, 1.0, step + 1)[1]
        F.cross_entropy(probe(hidden).transpose(1, 2), x[:, :-1]).backward()
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        opt.step()
        opt.zero_grad()
    return probe.requires_grad_(False)


def key_precision(cipher, plain, guess):
    """The paper's measure: each cipher symbol of a text is read as what most of its positions say. (n, width) int64
    each → the share of symbols present that are read right, (n,). A tie goes to the lower id."""
    size = int(max(cipher.max(), plain.max(), guess.max())) + 1
    places, plain, guess = (F.one_hot(ids, size).float() for ids in (cipher, plain, guess))  # (n, width, size)
    truth, votes = places.mT @ plain, places.mT @ guess  # (n, size, size): cipher symbol, plain symbol
    present = places.any(1)
    return ((truth.argmax(2) == votes.argmax(2)) & present).sum(1) / present.sum(1)


def read_cipher(model, probe, cipher, seq, draws=8):
    """A reading of each symbol: (length,) int64 ids → (length,) ids, −1 if the symbol is not in the first seq. Every
    position votes by the probe's log-probabilities, over several draws."""
    start = cipher[:seq]
    hidden = read(model, F.pad(start, (0, 1)).expand(draws, -1), 1.0)[1]
    log_p = probe(hidden).log_softmax(2).mean(0)
    votes = torch.zeros(model.config["n_vocab"], model.config["n_vocab"]).index_add_(0, start, log_p)
    return torch.where(votes.any(1), votes.argmax(1), -1)[cipher]


# ==================================================================================== the experiments


def lines(left, right, shown):
    """Lines "left > right ⏎" of symbols, 0 is > and 1 the line's end: left (n, lines, a), right (n, lines, b) → ids
    (n, length), and which predictions are of right, from line `shown` on."""
    ends, answer = np.zeros((*left.shape[:2], 1), np.int64), left.shape[2] + np.arange(right.shape[2])
    ids = np.concatenate([left, ends, right, ends + 1], 2)  # (n, lines, a + b + 2)
    places = answer + ids.shape[2] * np.arange(shown, ids.shape[1])[:, None]
    return torch.from_numpy(ids.reshape(len(ids), -1)), places.flatten()


def lookup_batch(n, n_vocab, fixed, rng, pairs=8, queries=24):
    """Section 3.4's LookUp: pairs of keys and values, then queries. fixed (n_vocab,): the value of each key; None:
    random values."""
    keys = 2 + rng.random((n, n_vocab - 2)).argsort(1)[:, :pairs]
    values = rng.integers(2, n_vocab, keys.shape) if fixed is None else fixed[keys]
    asked = np.concatenate([np.tile(np.arange(pairs), (n, 1)), rng.integers(pairs, size=(n, queries))], 1)
    return lines(*(np.take_along_axis(x, asked, 1)[..., None] for x in (keys, values)), pairs)


def permutation_batch(n, n_vocab, fixed, rng, length=3, keep=2, demos=4, queries=5):
    """Section 3.4's Permutation, "A 2 C > C A": in every line of a sequence the same places of three random symbols,
    in the same order. fixed is not used."""
    order = rng.random((n, 1, length)).argsort(2)[..., :keep]
    words = 2 + rng.random((n, demos + queries, n_vocab - 2)).argsort(2)[..., :length]
    return lines(words, np.take_along_axis(words, order, 2), demos)


def symbol_task(make, mode, steps, seed, quiet, n_vocab=64):
    """A small model trained on one of the two with all symbols, its loss over every prediction → share of answers right
    on 500 new sequences, by answer: as in training, with random values."""
    fixed, found = np.arange(n_vocab), []
    fixed[2:] = np.random.default_rng(seed).permutation(fixed[2:])  # what a model could know by heart
    texts = lambda step, n=16, fixed=fixed: make(n, n_vocab, fixed, np.random.default_rng([seed, 1, step]))
    model = train_small(n_vocab, mode, lambda step: texts(step)[0], steps, seed, quiet)
    for values in (fixed, None):
        x, answers = texts(EVALUATION, 500, values)
        right = model.embedding.right(*read(model, x)[1:])
        found.append(right[:, answers].float().mean(0).numpy())
    return found


def symbol_tasks(name, make, modes, seeds, steps, seed, quiet):
    """symbol_task for each mode and so many seeds → {(mode, seed): its curves}, and a table."""
    found = {(mode, seed + i): symbol_task(make, mode, steps, seed + i, quiet) for mode in modes for i in range(seeds)}
    print(f"\n{name}, all models trained on all symbols: share of answers right")
    print_table(["embedding", "seed", "as in training", "random values"],
                [[*key, *(float(right.mean()) for right in pair)] for key, pair in found.items()])
    return found


def regret(seed, alphabets=(3, 4, 5, 6), length=200, n=20):
    """Theorem 2.1: the loss of the exact p′ over that of q on random chains, in all → {what: curve}, and a table."""
    rng, rows, curves = np.random.default_rng([seed, 1]), [], {}
    for d in alphabets:
        chain = random_chain(d, rng)
        known, best, _ = bayes_losses(chain, chain_text(chain, n, length, rng))
        paid = (best - known).cumsum(1)
        rows.append((d, float(paid.max()), float(paid[:, -1].mean()), math.lgamma(d + 1)))
        curves[f"{d} symbols, ln d! = {rows[-1][3]:.3f}"] = paid.mean(0)
    print(f"The price of not knowing d symbols: loss of the exact p′ over that of q, {n} texts of {length}")
    print_table(["d", "most ever paid", "mean at the end", "bound ln d!"], rows)
    return curves


def chain_run(mode, steps, seed, quiet, d=4, seq=64):
    """Train on texts of one random chain and compare with p′ on 2,000 new ones → two dicts of curves by position:
    losses; share of symbols read right by p′ and by a probe of the frozen model. Prints them."""
    chain = random_chain(d, np.random.default_rng([seed, 2]))
    texts = lambda step, n=32: torch.from_numpy(chain_text(chain, n, seq + 1, np.random.default_rng([seed, 3, step])))
    model = train_small(d, mode, texts, steps, seed, quiet, d_model=48, d_ff=96)
    probe = train_probe(model, lambda step: texts(steps + step), d, max(1, steps // 2), seed)
    x = texts(EVALUATION, 2000)
    known, best, reading = bayes_losses(chain, x.numpy())
    loss, hidden, *_ = read(model, x)
    read_right = (probe(hidden).argmax(2) == x[:, :-1]).numpy()
    losses = {"q, which knows the alphabet": known[:, 1:].mean(0), "p′, exact": best[:, 1:].mean(0),
              f"{mode} model": loss.numpy().mean(0)}
    right = {"p′, exact": (reading == x.numpy())[:, :-1].mean(0), f"{mode} model": read_right.mean(0)}
    print_curves(f"\nA chain of {d} symbols: nats a symbol", losses)
    print_curves("symbols read right", right)
    gap = losses[f"{mode} model"] - losses["p′, exact"]
    print(f"largest gap of the model to p′ past position 4: {gap[4:].max():.3f} nats")
    return losses, right


def english_run(mode, ids, val, steps, seed, quiet, seq=192):
    """Train on English and evaluate on 400 texts → {what: loss by position}. permute: one model for any share of
    permuted symbols, which is all in three of five training steps."""
    texts, p = lambda step: windows(ids, 8, seq, seed, 1, step), (1.0, 0.0, 1.0, 0.4, 1.0)
    model = train_small(27, mode, texts, steps, seed, quiet, p, n_layer=3)
    x, shares = windows(val, 400, seq, seed, 2), {mode: 1.0}
    if mode == "permute":
        shares = {"none permuted": 0.0, "a quarter permuted": 0.25, "all permuted": 1.0}
    return {name: read(model, x, p)[0].mean(0).numpy() for name, p in shares.items()}


def demo(args):
    """The theorem, LookUp, a chain read beside the exact reader, English without an alphabet (CPU, minutes)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    few = lambda steps: (min(args.steps, steps), args.seed, args.quiet)
    paid = regret(args.seed)
    lookups = symbol_tasks("LookUp", lookup_batch, ("gaussian", "standard"), 1, *few(230))
    losses, right = chain_run("canonical", *few(500))
    ids, val, note = load_text(args.data, "az27", 192)
    english = english_run("permute", ids, val, *few(500)) | english_run("gaussian", ids, val, *few(400))
    print_curves("\nEnglish: nats a character", english)
    share = np.bincount(val) / len(val)
    print(f"a reader of single characters: {-(share * np.log(share + 1e-9)).sum():.3f} at best. {note}")
    by_query = {mode: pair[1] for (mode, _), pair in lookups.items()}
    save_results(args.out, args, regret=paid, lookup=by_query, losses=losses, right=right, english=english)

    def draw(fig):
        panels = {"Not knowing d symbols costs at most ln d! nats in all": paid,
                  "LookUp, random values: share right, by query": by_query,
                  "A chain of 4 symbols: share of symbols read right": right, "English: nats a character": english}
        for ax, (title, curves) in zip(fig.subplots(2, 2).flat, panels.items()):
            for name, curve in curves.items():
                ax.plot(curve, label=name)
            ax.set(title=title, xlabel="symbols (LookUp: queries) read")
            ax.legend(fontsize=8)

    figure(args.out / "demo.png", args, draw, (11, 8))


def bayes(args):
    """Section 2.3: what not knowing the alphabet costs, and a trained model beside the best that there can be."""
    torch.set_num_threads(1)
    paid, (losses, right) = regret(args.seed), chain_run(args.mode, args.steps, args.seed, args.quiet)
    save_results(args.out, args, regret=paid, losses=losses, right=right)


def lookup(args):
    """Table 1: LookUp and Permutation. All models are trained on all symbols."""
    torch.set_num_threads(1)
    make, steps = {"lookup": (lookup_batch, 230), "permutation": (permutation_batch, 800)}[args.kind]
    found = symbol_tasks(args.kind, make, MODES, args.seeds, args.steps or steps, args.seed, args.quiet)
    print("The paper's table 1 (150M weights, trained on the Pile): LookUp 48.5 % standard, 91.8 % lexinvariant; "
          "Permutation 27.7 and 59.4 %")
    save_results(args.out, args, found=list(found.items()))


PRESETS = {  # size; run
    "cpu": (dict(d_model=64, n_layer=3, n_head=2, d_ff=128),
            dict(alphabet="az27", seq=192, batch_size=8, steps=800, lr=4e-3, save_every=100)),
    "gpu": (dict(d_model=512, n_layer=6, n_head=8, d_ff=2048),
            dict(alphabet="ascii", seq=512, batch_size=64, steps=12_000, lr=1e-3, save_every=1000)),
    "paper": (dict(d_model=1024, n_layer=12, n_head=8, d_ff=4096, paper=True),
              dict(alphabet="ascii", seq=512, batch_size=64, steps=250_000, lr=0.01, save_every=1000)),
}


def train(args):
    """Section 3.1: train a model, its loss by position. --resume goes on from the last checkpoint; torchrun works."""
    device, rank, world = set_up(args)
    size, defaults = PRESETS[args.preset]
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name, None) or value)
    if args.p != 1 and args.mode != "permute":
        fail(f"--p {args.p}: for --mode permute only")
    if args.batch_size % world:
        fail(f"--batch_size {args.batch_size} does not divide among {world} ranks")
    ids, val, note = load_text(args.data, args.alphabet, args.seq)
    model = LexinvariantLM(len(ALPHABETS[args.alphabet]), args.mode, p=args.p, **size).to(device)
    opts, checkpoint, first = optimizers(model, args.lr), args.out / "checkpoint.pt", 0
    settings = {name: vars(args)[name] for name in "preset mode p data alphabet seq batch_size steps lr seed".split()}
    if args.resume:
        saved = load_checkpoint(checkpoint)
        if saved["settings"] != settings:
            fail(f"{checkpoint} is of another run, with {saved['settings']}")
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"]):
            opt.load_state_dict(state)
        first = saved["step"]
    if rank == 0:
        print(note, flush=True)
    batch_of = lambda step: (windows(ids, args.batch_size, args.seq, args.seed, 1, step), None)
    for step, _ in update(model, opts, batch_of, args.steps, args.seed, first, args.quiet):
        if rank == 0 and (step == args.steps or step % args.save_every == 0):
            state = dict(config=model.config, settings=settings, model=model.state_dict(), step=step,
                         optimizers=[opt.state_dict() for opt in opts])
            torch.save(state, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", checkpoint)
    if rank == 0:
        x = windows(val, 100, args.seq, args.seed, 2)
        curves = {args.mode: read(model, x)[0].mean(0).numpy()}
        print_curves("validation, nats a character", curves)
        save_results(args.out, args, curves=curves)
        print(checkpoint)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def load_checkpoint(path):
    """What `train` saved. Anything else is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"config", "settings", "model", "optimizers", "step"} <= set(saved):
            return saved
    except Exception:  # torch raises a dozen kinds here
        pass
    fail(f"{path} is not there, or no checkpoint of `python lexinvariant.py train`")


def decipher(args):
    """Figures 4 and 5: a probe of a frozen model reads substitution ciphers, and yours by --text."""
    saved = load_checkpoint(args.model)
    config, (data, alphabet, seq) = saved["config"], (saved["settings"][name] for name in ("data", "alphabet", "seq"))
    if config["mode"] == "standard" or config["p"] < 1:
        fail(f"{args.model} knows symbols by name ({config['mode']}, p = {config['p']}): it does not decipher")
    if args.text is not None:
        cipher = " ".join((text_of(args.text) if os.path.isfile(args.text) else args.text).split())
        symbols = list(dict.fromkeys(cipher))
        if len(cipher) < 20 or len(symbols) > config["n_vocab"]:
            fail(f"--text: {len(cipher)} characters, {len(symbols)} different ones (case counts): want 20 or more, and "
                 f"at most {config['n_vocab']} different ones, as the model's alphabet has")
    ids, val, note = load_text(data, alphabet, seq)
    model = LexinvariantLM(**config).eval()
    model.load_state_dict(saved["model"])
    texts = lambda step: windows(ids, 16, seq, args.seed, 3, step)
    probe = train_probe(model, texts, config["n_vocab"], args.steps, args.seed)
    x = windows(val, 400, seq, args.seed, 4)
    _, hidden, seen, _ = read(model, x, 1.0)
    guess, plain, cipher_ids = probe(hidden).argmax(2), x[:, :-1], seen[:, :-1]
    curves = {"read right": (guess == plain).float().mean(0),
              "always the commonest": (plain == int(np.bincount(ids).argmax())).float().mean(0)}
    print(f"{config['mode']}, {saved['step']:,} steps. {note}")
    print_curves("characters of 400 texts", curves)
    last = slice(seq - min(100, seq // 2), seq)
    found = dict(curves, precision=float(key_precision(*(t[:, last] for t in (cipher_ids, plain, guess))).mean()))
    print(f"key precision in the last {last.stop - last.start} positions: {found['precision']:.3f}; the paper, with "
          "150M weights and 8 billion characters: 0.996")
    if args.text is not None:
        trials = windows(val, 20, min(len(cipher), len(val) - 1) - 1, args.seed, 5)
        share = float(np.mean([(read_cipher(model, probe, text, seq) == text).float().mean() for text in trials]))
        key = read_cipher(model, probe, torch.tensor([symbols.index(c) for c in cipher]), seq)
        found |= dict(reading="".join("_" if i < 0 else ALPHABETS[alphabet][i] for i in key), confidence=share)
        print(f"\ncipher   {cipher}\nreading  {found['reading']}\nconfidence: of other texts of this length it reads "
              f"{share:.2f} of the characters right" + (": take it for noise" if share < 0.5 else ""))
    save_results(args.out, args, **found)


# ==================================================================================== command line


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "demo")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Without TASK: demo.")
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {
        "preset": dict(choices=PRESETS, default="cpu", help="size, text, steps, rate (%(default)s)"),
        "mode": dict(choices=MODES, help="the construction, see LexinvariantEmbedding (%(default)s)"),
        "p": dict(type=float, default=1.0, help="--mode permute: probability that a symbol is permuted (%(default)s; "
                  "the paper's regularising: 0.2)"),
        "data": dict(help="a text file, or prose: what every Python ships (%(default)s)"),
        "alphabet": dict(choices=ALPHABETS, help="az27: letters and space; ascii: 128, the paper's (the preset's)"),
        "model": dict(type=Path, default=Path("out/lexinvariant/train/checkpoint.pt"),
                      help="what train saved (%(default)s)"),
        "text": dict(help="your cipher, or a file with it; every different character is a symbol"),
        "task": dict(dest="kind", choices=("lookup", "permutation"), default="lookup", help="(%(default)s)"),
        "steps": dict(type=int, help="updates (demo and bayes 500, decipher 600, lookup 230, --task permutation 800, "
                      "train: the preset's)"),
        "seeds": dict(type=int, default=3, help="number of seeds, from --seed on (%(default)s)"),
        "batch_size": dict(type=int, help="sequences an update, over all ranks (the preset's; the paper's 64)"),
        "seq": dict(type=int, help="characters of context (the preset's; the paper's 512)"),
        "lr": dict(type=float, help="peak learning rate; Muon's is five times it (the preset's; the paper's 0.01)"),
        "resume": dict(action="store_true", help="go on from the checkpoint in --out"),
        "seed": dict(type=int, default=0, help="of weights, data order and draws (%(default)s)"),
        "device": dict(help="cuda or cpu (cuda where there is one)"),
        "out": dict(type=Path, help="folder for results, figures and checkpoints (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, **defaults):
        sub = tasks.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.error = fail
        for name in names.split():
            sub.add_argument(f"--{name}", **flags[name])
        sub.set_defaults(task=function, **dict(out=Path(f"out/lexinvariant/{function.__name__}")) | defaults)

    task(demo, "data steps seed out no_plot quiet", data="prose", steps=500)
    task(train, "preset mode p data alphabet steps batch_size seq lr resume seed device out quiet",
         mode="gaussian", data="prose")
    task(decipher, "model text steps seed out", steps=600)
    task(lookup, "task steps seeds seed out quiet")
    task(bayes, "mode steps seed out quiet", mode="canonical", steps=500)
    args = parser.parse_args(argv)
    for name in "steps seeds batch_size seq lr".split():
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
