"""Lexinvariant language models: no fixed token embeddings (Huang and others, arXiv 2305.16349)."""

import argparse
import ast
import itertools
import json
import math
import os
import re
import signal
import sys
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ==================================================================================== the method: symbols without meaning


def first_occurrences(ids):
    """(batch, seq) ids → where the symbol of each position stands first, (batch, seq) int64."""
    return (ids[:, :, None] == ids[:, None, :]).int().argmax(-1)


def pointers(symbols):
    """What the compact head must know of (batch, seq + 1) symbols → first (batch, seq), where each position's symbol
    stands first; target (batch, seq), where the next symbol does, −1 if it is new; n_seen (batch, seq), how many
    distinct symbols there are up to a position. Looks at no later one than the target."""
    first, position = first_occurrences(symbols), torch.arange(symbols.shape[1], device=symbols.device)
    target = torch.where(first[:, 1:] < position[1:], first[:, 1:], -1)
    return first[:, :-1], target, (first == position)[:, :-1].cumsum(1)


def pointer_logits(query, rows, first):
    """z[t, s] = ⟨query_t, rows_s⟩/√d where s ≤ t is a first occurrence, elsewhere −∞. query, rows (batch, seq, d),
    first (batch, seq) → (batch, seq, seq), float32 or wider."""
    z = query @ rows.mT / math.sqrt(query.shape[-1])
    position = torch.arange(z.shape[1], device=z.device)
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
    novel = new - (n_vocab - n_seen).clamp_min(1).log()
    return torch.logaddexp(z.logsumexp(2), new) - torch.where(target >= 0, chosen, novel)


def permutations(n, n_vocab, p, device=None):
    """n random permutations of the ids, (n, n_vocab) int64. Each symbol is chosen with probability p, a number or
    (n, 1); the chosen ones change places at random."""
    ids = torch.arange(n_vocab, device=device)
    chosen, shuffle = torch.rand(2, n, n_vocab, device=device)
    chosen = chosen < p
    old = torch.where(chosen, ids, n_vocab + ids).argsort(1)  # the chosen ones in order, then the others
    new = torch.where(chosen, shuffle, 2.0 + ids).argsort(1)  # the chosen ones shuffled, then the others as above
    return torch.empty_like(old).scatter_(1, old, new)


MODES = ("gaussian", "canonical", "permute", "standard")


class LexinvariantEmbedding(nn.Module):
    """The two ends of a language model whose symbols mean nothing beforehand, around any causal trunk:

        symbols, rows = embedding(x)                   # x (batch, seq + 1) ids → symbols, the same shape; rows (…, seq, d)
        hidden = trunk(embedding.enter(rows))          # (batch, seq, d)
        loss = embedding.loss(hidden, symbols, rows)   # (batch, seq) nats

    gaussian   the paper's: a fresh row of N(0, I) for each symbol of each sequence, for input and read-out. There is no
               table: a symbol's row is the draw at its first occurrence. So for one draw the losses do not change by a
               bit when symbols are renamed
    canonical  ours: a symbol's id is the rank of its first occurrence, then a learned table; likewise to the bit
    permute    a fresh permutation of the ids of each sequence, then an ordinary model: invariant on average (appendix
               G). With p < 1 only so many symbols take part: the paper's regularising (section 3.6, p = 0.2)
    standard   an ordinary table

    The first two have the compact head, the others a softmax over the vocabulary. readout: a matrix before the head
    that starts at zero (ours), or none (the paper's). All draws come from torch's global generator. """

    def __init__(self, n_vocab, d_model, mode="gaussian", p=1.0, readout=True):
        super().__init__()
        self.n_vocab, self.mode, self.p, self.compact = n_vocab, mode, p, mode in ("gaussian", "canonical")
        self.table = None if mode == "gaussian" else nn.Parameter(torch.randn(n_vocab, d_model))
        self.scale, self.shift = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))  # appendix B
        self.readout = nn.Linear(d_model, d_model, bias=False) if readout else nn.Identity()
        self.new = nn.Linear(d_model, 1) if self.compact else None
        for head in (self.readout, self.new or self.readout):
            for weight in head.parameters():
                nn.init.zeros_(weight)

    def forward(self, x, p=None, mine=slice(None)):
        """p: instead of the module's own, a number or (batch, 1). mine: the sequences wanted; the draw is of all of
        x, so that each sequence's is the same on any number of ranks."""
        if self.mode == "gaussian":
            draw = torch.randn(len(x), x.shape[1] - 1, len(self.scale), device=x.device)[mine]
            first = first_occurrences(x[mine, :-1])[..., None]
            return x[mine], draw.gather(1, first.expand_as(draw))
        if self.mode == "permute":
            x = permutations(len(x), self.n_vocab, self.p if p is None else p, x.device).gather(1, x)
        if self.mode == "canonical":
            first = first_occurrences(x)
            rank = (first == torch.arange(x.shape[1], device=x.device)).cumsum(1) - 1
            x = rank.gather(1, first)  # banana → 0 1 2 1 2 1
        return x[mine], F.embedding(x[mine, :-1], self.table)

    def enter(self, rows):
        return rows * self.scale + self.shift

    def loss(self, hidden, symbols, rows):
        if not self.compact:
            log_probs = self.log_probs(hidden, symbols, rows)
            return -log_probs.gather(2, symbols[:, 1:, None]).squeeze(2)
        (first, target, n_seen), new = pointers(symbols), self.new(hidden).squeeze(2).float()
        return pointer_cross_entropy(self.readout(hidden), rows, first, target, new, n_seen, self.n_vocab)

    def log_probs(self, hidden, symbols, rows):
        """log p of every symbol at every position, (batch, seq, n_vocab); canonical: of ranks, those unseen equal."""
        query = self.readout(hidden)
        if not self.compact:
            return (query @ self.table.T / math.sqrt(len(self.scale))).float().log_softmax(2)
        first, _, n_seen = pointers(symbols)
        z = pointer_logits(query, rows, first)
        seen = torch.full((*z.shape[:2], self.n_vocab), -math.inf, device=z.device)
        seen = seen.scatter_reduce(2, symbols[:, None, :-1].expand_as(z), z, "amax")
        unseen = self.new(hidden).float() - (self.n_vocab - n_seen).clamp_min(1)[..., None].log()
        return torch.where(seen > -math.inf, seen, unseen).log_softmax(2)


# ==================================================================================== the method: the best there is


def bayes_losses(transition, x):
    """Of a Markov chain q and of the best lexinvariant predictor p′(x) = mean over all d! permutations π of q(πx),
    exactly.

    transition (d, d): rows sum to 1, the first symbol is uniform; x (n, T) → losses of q and of p′, (n, T) nats each,
    and p′'s reading, (n, T): the plain symbol that the posterior over π, given x_1 … x_t, finds likeliest for x_t. """
    d = len(transition)
    log_p, pi = np.log(transition), np.array(list(itertools.permutations(range(d))))  # (d!, d)
    known = np.concatenate([np.full((len(x), 1), math.log(d)), -log_p[x[:, :-1], x[:, 1:]]], 1)
    weight, total = np.full((len(x), len(pi)), -math.log(len(pi))), np.zeros(len(x))  # log q(πx)/d!, and of their sum
    best, reading = np.empty(x.shape), np.empty_like(x)
    for t in range(x.shape[1]):
        plain = pi[:, x[:, t]].T  # (n, d!): what each π reads here
        weight += log_p[pi[:, x[:, t - 1]].T, plain] if t else -math.log(d)
        before, total = total, np.logaddexp.reduce(weight, 1)
        best[:, t] = before - total
        posterior = np.exp(weight - total[:, None])
        reading[:, t] = np.stack([(posterior * (plain == symbol)).sum(1) for symbol in range(d)]).argmax(0)
    return known, best, reading


def random_chain(d, rng, concentration=0.4):
    chain = rng.dirichlet(np.full(d, concentration), d) + 1e-3
    return chain / chain.sum(1, keepdims=True)


def chain_text(transition, n, length, rng):
    """n sequences from a chain, first symbol uniform → (n, length) int64."""
    cumulative, x = transition.cumsum(1), np.empty((n, length), np.int64)
    x[:, 0] = rng.integers(len(transition), size=n)
    for t in range(1, length):
        x[:, t] = (rng.random((n, 1)) > cumulative[x[:, t - 1]]).sum(1).clip(max=len(transition) - 1)
    return x


# ==================================================================================== the model


def relative_buckets(seq, n=32, far=128, device=None):
    """T5's causal buckets of the distance t − s, (seq, seq): one each up to n/2, then logarithmic up to far, then the
    last."""
    distance = (torch.arange(seq, device=device)[:, None] - torch.arange(seq, device=device)).clamp_min(0)
    large = n // 2 + (torch.log(distance.clamp_min(1) / (n // 2)) / math.log(far / (n // 2)) * (n // 2)).long()
    return torch.where(distance < n // 2, distance, large.clamp_max(n - 1))


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
            self.scale = nn.Parameter(torch.ones(n_head, 1, 1))
            return
        self.conv = nn.Conv1d(3 * d_model, 3 * d_model, 4, groups=3 * d_model, bias=False)
        taps = torch.zeros(3 * d_model, 1, 4)
        taps[:, 0, 3] = 1  # the position itself …
        taps[d_model : 2 * d_model, 0, 2:] = 0.5  # … but of a key half it, half the one before
        with torch.no_grad():
            self.conv.weight.copy_(taps)
            q, k, v = self.qkv.weight.chunk(3)
            k.copy_(q)
            self.out.weight.copy_(v.T)

    def forward(self, x, buckets):  # (batch, seq, d_model), (seq, seq)
        qkv = self.qkv(x)
        if not self.paper:
            qkv = self.conv(F.pad(qkv.mT, (3, 0))).mT
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (batch, head, seq, head width) each
        if self.paper:
            q, k = (F.normalize(q, dim=-1) * self.scale).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        mask = self.bias(buckets).permute(2, 0, 1) + torch.full(buckets.shape, -math.inf, device=x.device).triu(1)
        dropout, scale = (0.05 * self.training, 1.0) if self.paper else (0.0, None)
        y = F.scaled_dot_product_attention(q, k, v, mask.to(v.dtype), dropout, scale=scale)
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
        self.embedding = LexinvariantEmbedding(n_vocab, d_model, mode, p, readout=not paper)
        self.layers = nn.ModuleList(TrunkLayer(d_model, n_head, d_ff, paper) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)

    def forward(self, x, p=None, mine=slice(None)):
        """x (batch, seq + 1) ids; p, mine as in LexinvariantEmbedding → loss (batch, seq) in nats, hidden (batch, seq,
        d_model), symbols (batch, seq + 1), rows (batch, seq, d_model)."""
        symbols, rows = self.embedding(x, p, mine)
        hidden, buckets = self.embedding.enter(rows), relative_buckets(rows.shape[1], device=x.device)
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
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here: {error}")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    torch.set_float32_matmul_precision("high")
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


class Adafactor(torch.optim.Optimizer):
    """Shazeer and Stern 2018 with the step relative to the parameter's size, as the paper trains. torch's own caps the
    rate at 1/√t, which from step 10,000 on is below the paper's cosine. No momentum."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, square = self.state[p], p.grad.square() + 1e-30
                state["step"] = state.get("step", 0) + 1
                means = [square.mean(-1, True), square.mean(-2, True)] if p.dim() > 1 else [square]
                for name, mean in zip(("row", "column"), means):
                    state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, state["step"] ** -0.8)
                row = state["row"]
                v = row * state["column"] / row.mean(-2, True) if p.dim() > 1 else row
                update = p.grad * v.rsqrt()
                update /= update.square().mean().sqrt().clamp_min(1)
                p.sub_(update * p.square().mean().sqrt().clamp_min(1e-3) * group["lr"])


def optimizers(model, lr):
    """Muon for the matrices at five times the rate of AdamW for the rest; the paper's trunk: Adafactor."""
    if model.config["paper"]:
        return [Adafactor(model.parameters(), lr)]
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 1]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=5 * lr, weight_decay=0.0),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step, steps, paper):
    """Share of the peak learning rate. paper: 1,000 steps of warm-up, a cosine to a tenth."""
    if paper:
        return min(1, (step + 1) / min(1000, max(1, steps // 10))) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    return min(1, (step + 1) / 50) * (0.1 + 0.9 * min(1, 2 * (1 - step / steps)))


def training(model, opts, batch_of, steps, seed, first=0, name="", quiet=False):
    """Updates first + 1 … steps on batch_of(step) → x (batch, seq + 1) ids, p (see LexinvariantEmbedding). Yields
    (updates done, loss) after each, so that the caller saves or stops. Under torchrun x is the batch of all ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, ddp = model.norm.weight.device, nn.parallel.DistributedDataParallel(model) if world > 1 else model
    cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    for step in tqdm(range(first, steps), name, steps, initial=first, disable=quiet or rank > 0):
        model.train()
        torch.manual_seed(1_000_003 * seed + step)  # the draws of a step are the same after a resume, on every rank
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = opt.defaults["lr"] * rate(step, steps, model.config["paper"])
        x, p = batch_of(step)
        with cast:
            loss = ddp(x.to(device), p, slice(rank, None, world))[0].mean()
        loss.backward()
        if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            fail(f"{name}: the gradient is not finite at step {step + 1}: lower --lr")
        for opt in opts:
            opt.step()
            opt.zero_grad()
        model.eval()
        yield step + 1, float(loss.detach())


def fit(model, batch_of, steps, seed, lr=4e-3, name="", quiet=True):
    for _ in training(model, optimizers(model, lr), batch_of, steps, seed, 0, name, quiet):
        pass
    return model


EVALUATION = 10**9  # seeds of evaluation: no draw of the training comes back


@torch.no_grad()
def read(model, x, p=None, seed=0):
    """The model on x (n, seq + 1), 50 sequences at a time, with draws of their own → loss (n, seq), hidden (n, seq, d),
    symbols (n, seq + 1), rows (n, seq, d), on the CPU."""
    parts = []
    for start in range(0, len(x), 50):
        torch.manual_seed(EVALUATION + 1_000_003 * seed + start)
        parts.append([part.float().cpu() if part.is_floating_point() else part.cpu()
                      for part in model(x[start : start + 50].to(model.norm.weight.device), p)])
    return [torch.cat(part) for part in zip(*parts)]


# ==================================================================================== text

LETTERS = " abcdefghijklmnopqrstuvwxyz"  # az27: lower case, everything else is one space
SIZE = {"az27": 27, "ascii": 128}


def to_ids(text, alphabet):
    """Text → ids, uint8: az27 (0 the space, 1 to 26 the letters), or ascii (others are left out)."""
    if alphabet == "az27":
        raw = np.frombuffer(re.sub("[^a-z]+", " ", text.lower()).encode(), np.uint8)
        return np.where(raw == 32, 0, raw - 96).astype(np.uint8)
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)


def to_text(ids, alphabet):
    return "".join(LETTERS[i] if alphabet == "az27" else chr(i) for i in ids)


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
    elif os.path.isfile(data):
        text = text_of(data)
        parts = [text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]]
    else:
        fail(f"--data {data}: no such file, and not prose")
    train, val = (to_ids(part, alphabet) for part in parts)
    if "\0" in parts[0] or min(len(train), len(val)) < seq + 2:
        fail(f"--data {data}: {len(train)} characters to train on and {len(val)} to validate, want {seq + 2} of each "
             "and no zero byte")
    kept = "letters, all else as spaces" if alphabet == "az27" else "ASCII, all else left out"
    return train, val, f"{data}: {sum(map(len, parts)):,} characters, read as {len(train) + len(val):,} ({kept})"


def windows(ids, n, seq, *counter):
    """n random windows (n, seq + 1) int64 of ids (length,). They depend on the counter alone."""
    starts = np.random.default_rng(counter).integers(len(ids) - seq, size=n)
    return torch.from_numpy(ids[starts[:, None] + np.arange(seq + 1)].astype(np.int64))


def by_position(curve, edges=(0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)):
    """A value for each position → {"0-8": mean, …}."""
    return {f"{a}-{b}": float(np.mean(curve[a:b])) for a, b in itertools.pairwise(edges) if a < len(curve)}


def print_curves(title, curves):
    spans = [by_position(curve) for curve in curves.values()]
    print_table([title, *spans[0]], [[name, *span.values()] for name, span in zip(curves, spans)])


# ==================================================================================== deciphering


def train_probe(model, batch_of, n_vocab, steps, seed=0, quiet=True):
    """Section 3.2: a frozen model's last hidden state → logits of the plain symbol, two layers. batch_of(step) → plain
    texts (batch, seq + 1)."""
    device, d_model = model.norm.weight.device, model.config["d_model"]
    torch.manual_seed(seed)
    probe = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, n_vocab)).to(device)
    opt = torch.optim.AdamW(probe.parameters(), 2e-3)
    for step in tqdm(range(steps), "probe", disable=quiet):
        x = batch_of(step)
        hidden = read(model, x, 1.0, step + 1)[1].to(device)
        F.cross_entropy(probe(hidden).transpose(1, 2), x[:, :-1].to(device)).backward()
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        opt.step()
        opt.zero_grad()
    return probe.cpu().requires_grad_(False)


def key_precision(cipher, plain, guess, start, width):
    """The paper's measure: in a window each cipher symbol is read as what most of its positions say. (n, seq) int64
    each → the share of symbols present that are read right, (n,). A tie goes to the lower id."""
    size, part = int(max(cipher.max(), plain.max(), guess.max())) + 1, slice(start, start + width)
    votes, truth = torch.zeros(len(cipher), size * size), torch.zeros(len(cipher), size, dtype=torch.int64)
    votes.scatter_add_(1, cipher[:, part] * size + guess[:, part], torch.ones(cipher[:, part].shape))
    truth.scatter_(1, cipher[:, part], plain[:, part])
    votes = votes.view(-1, size, size)
    present = votes.sum(2) > 0
    return ((votes.argmax(2) == truth) & present).sum(1) / present.sum(1)


def read_cipher(model, probe, cipher, seq, draws=8):
    """One reading of each symbol of a text: cipher (length,) int64 ids → plain ids (length,). Every window of seq
    symbols votes with the logarithms of the probe's probabilities, over several draws; late positions count more."""
    seq = min(seq, len(cipher))
    starts = sorted({*range(0, len(cipher) - seq, max(1, seq // 2)), len(cipher) - seq})
    parts = torch.stack([cipher[start : start + seq] for start in starts])
    votes = torch.zeros(model.config["n_vocab"], model.config["n_vocab"])
    for draw in range(draws):
        hidden = read(model, F.pad(parts, (0, 1)), 1.0, draw)[1]
        log_p = probe(hidden).log_softmax(2) * torch.arange(1, seq + 1)[:, None]
        votes.index_add_(0, parts.flatten(), log_p.flatten(0, 1))
    return votes.argmax(1)[cipher]


# ==================================================================================== the experiments


def lookup_batch(n, n_vocab, fixed, rng, pairs=8, queries=24):
    """Section 3.4's LookUp, lines "key > value ⏎" of random symbols (0 is >, 1 the line's end): 8 pairs, then queries.
    fixed (n_vocab,): the value of each key; None: random values. → ids (n, length), the predictions of the answers."""
    symbols = np.arange(2, n_vocab)
    keys = np.stack([rng.permutation(symbols)[:pairs] for _ in range(n)])
    values = rng.choice(symbols, keys.shape) if fixed is None else fixed[keys]
    asked = rng.integers(pairs, size=(n, queries))
    left, right = (np.concatenate([x, np.take_along_axis(x, asked, 1)], 1) for x in (keys, values))
    ids = np.stack([left, np.zeros_like(left), right, np.ones_like(left)], 2).reshape(n, -1)
    return torch.from_numpy(ids), list(range(4 * pairs + 1, ids.shape[1] - 1, 4))


def permutation_batch(n, n_vocab, fixed, rng, length=3, keep=2, lines=9):
    """Section 3.4's Permutation, lines "A 2 C > C A ⏎": in each line of a sequence the same places of three random
    symbols, in the same order. fixed is not used. Returns as above, the answers of the second half of the lines."""
    order = np.stack([rng.permutation(length)[:keep] for _ in range(n)])[:, None]  # (n, 1, keep)
    words = np.stack([[rng.permutation(np.arange(2, n_vocab))[:length] for _ in range(lines)] for _ in range(n)])
    answers, ends = np.take_along_axis(words, order, 2), np.zeros((n, lines, 1), np.int64)
    ids = np.concatenate([words, ends, answers, ends + 1], 2).reshape(n, -1)
    line = length + keep + 2
    return torch.from_numpy(ids), [line * i + length + j for i in range(lines // 2, lines) for j in range(keep)]


def task_accuracy(task, mode, seed, steps, n_vocab=64):
    """Train a small model on LookUp or Permutation with all symbols, its loss over every prediction → share of the
    answers right on 500 new sequences: (as in training, with random values)."""
    torch.manual_seed(seed)
    model, make = LexinvariantLM(n_vocab, mode), lookup_batch if task == "lookup" else permutation_batch
    fixed = np.arange(n_vocab)
    fixed[2:] = np.random.default_rng(seed).permutation(fixed[2:])  # what a model could know by heart
    fit(model, lambda step: (make(16, n_vocab, fixed, np.random.default_rng([seed, 1, step]))[0], None), steps, seed)
    found = []
    for values in (fixed, None):
        x, answers = make(500, n_vocab, values, np.random.default_rng([seed, 2]))
        _, hidden, symbols, rows = read(model, x)
        guess = [model.embedding.log_probs(*part).argmax(2) for part in zip(*(t.split(50) for t in (hidden, symbols, rows)))]
        found.append(float((torch.cat(guess) == symbols[:, 1:])[:, answers].float().mean()))
    return found


def regret(seed, alphabets=(3, 4, 5, 6), length=200, n=20):
    """Cumulative loss of the exact p′ over that of q on random chains → rows (d, most, at the end, ln d!), curves."""
    rng, rows, curves = np.random.default_rng([seed, 1]), [], {}
    for d in alphabets:
        chain = random_chain(d, rng)
        known, best, _ = bayes_losses(chain, chain_text(chain, n, length, rng))
        paid = (best - known).cumsum(1)
        rows.append((d, float(paid.max()), float(paid[:, -1].mean()), math.lgamma(d + 1)))
        curves[d] = paid.mean(0)
    return rows, curves


def chain_run(mode, d, steps, seed, seq=64, batch=32, quiet=True):
    """Train on texts of one random chain and compare with p′ on 2,000 new ones, position by position → dict of curves:
    losses of q, p′ and the model; share of symbols read right by p′ and by a probe of the frozen model."""
    chain = random_chain(d, np.random.default_rng([seed, 2]))
    texts = lambda n, *counter: chain_text(chain, n, seq + 1, np.random.default_rng([seed, *counter]))
    torch.manual_seed(seed)
    model = LexinvariantLM(d, mode, d_model=48, d_ff=96)
    fit(model, lambda step: (torch.from_numpy(texts(batch, 3, step)), None), steps, seed, 4e-3, f"{mode}, chain", quiet)
    x = texts(2000, 4)
    known, best, reading = bayes_losses(chain, x)
    loss, hidden, *_ = read(model, torch.from_numpy(x))
    probe = train_probe(model, lambda step: torch.from_numpy(texts(batch, 5, step)), d, max(1, steps // 2), seed, quiet)
    right = probe(hidden).argmax(2).numpy() == x[:, :-1]
    gap = (loss.numpy() - best[:, 1:]).mean(0)
    return dict(known=known[:, 1:].mean(0), best=best[:, 1:].mean(0), model=loss.numpy().mean(0), gap=gap,
                exact=(reading == x)[:, :-1].mean(0), probe=right.mean(0))


def english_run(mode, train, val, steps, seed, seq=192):
    """Train on English and evaluate on 400 texts → {what: loss by position}. permute: one model for any share of
    permuted symbols, which is all in six of ten training sequences and a random one in the others."""
    torch.manual_seed(seed)
    model = LexinvariantLM(27, mode, n_layer=3)

    def batch_of(step):
        u = torch.rand(8, 2)
        return windows(train, 8, seq, seed, 1, step), torch.where(u[:, :1] < 0.6, 1.0, u[:, 1:])

    fit(model, batch_of, steps, seed)
    x = windows(val, 400, seq, seed, 2)
    shares = {"none permuted": 0.0, "a quarter permuted": 0.25, "all permuted": 1.0} if mode == "permute" else {mode: None}
    return {name: read(model, x, p)[0].numpy().mean(0) for name, p in shares.items()}


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def run_all(jobs, quiet):
    """[(function, *arguments), …] on all cores → their results, in order."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), start_worker) as pool:
        try:
            futures = [pool.submit(*job) for job in jobs]
            return [future.result() for future in tqdm(futures, "models", disable=quiet)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def print_regret(rows):
    print("The price of not knowing the alphabet: loss of the exact p′ over that of q, random chains, 20 texts of 200")
    print_table(["symbols d", "most ever paid", "at the end", "bound ln d!"], rows)


def print_chain(mode, d, found):
    print(f"\nA chain of {d} symbols: a trained {mode} model beside the exact p′")
    print_curves("nats a symbol, by position",
                 {"q, which knows the alphabet": found["known"], "p′": found["best"], "model": found["model"]})
    print_curves("symbols read right", {"p′": found["exact"], "model and probe": found["probe"]})
    print(f"largest gap to p′ past position 4: {found['gap'][4:].max():.3f} nats")


def draw_curves(ax, curves, title, ylabel, **lines):
    for name, curve in curves.items():
        spans = [[int(n) for n in span.split("-")] for span in by_position(curve)]
        ax.plot([(a + min(b, len(curve))) / 2 for a, b in spans], list(by_position(curve).values()), "o-", ms=4, label=name)
    for name, level in lines.items():
        ax.axhline(level, color="grey", ls=":", label=name.replace("_", " "))
    ax.set(xlabel="symbols of context", ylabel=ylabel, title=title)
    ax.legend(fontsize=8)


def unigram(ids):
    """Entropy of the symbols' frequencies, nats: no reader of single symbols does better."""
    p = np.bincount(ids) / len(ids)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def demo(args):
    """The theorem, LookUp, a chain read beside the exact reader, English without an alphabet (CPU, minutes)."""
    rows, regrets = regret(args.seed)
    print_regret(rows)
    train, val, note = load_text(args.data, "az27", 192)
    few = lambda steps: min(args.steps, steps)
    english_1, english_2, gaussian, standard, chain = run_all(
        [(english_run, "permute", train, val, args.steps, args.seed),
         (english_run, "gaussian", train, val, args.steps, args.seed),
         (task_accuracy, "lookup", "gaussian", args.seed, few(230)),
         (task_accuracy, "lookup", "standard", args.seed, few(230)),
         (chain_run, "canonical", 4, few(500), args.seed)], args.quiet)
    print("\nLookUp, both models trained on all symbols with one fixed map of keys to values")
    print_table(["share of answers right", "as in training", "random values"],
                [["gaussian", *gaussian], ["standard", *standard]])
    print_chain("canonical", 4, chain)
    english = english_1 | {"gaussian, another model": english_2["gaussian"]}
    print(f"\nEnglish, nats a character. {note}")
    print_curves("positions", english)
    print(f"a reader of single symbols has at best {unigram(val):.3f}")
    save_results(args.out, args, regret=rows, lookup=dict(gaussian=gaussian, standard=standard), chain=chain,
                 english=english)

    def draw(fig):
        axes = fig.subplots(2, 2)
        for (d, curve), color in zip(regrets.items(), ("C0", "C1", "C2", "C3")):
            axes[0, 0].plot(curve, color=color, label=f"d = {d}")
            axes[0, 0].axhline(math.lgamma(d + 1), color=color, ls=":")
        axes[0, 0].set(xlabel="symbols read", ylabel="nats lost to q, in all", title="Not knowing d symbols costs at most ln d!")
        axes[0, 0].legend(fontsize=8)
        for i, (name, pair) in enumerate((("gaussian", gaussian), ("standard", standard))):
            axes[0, 1].bar(np.arange(2) + 0.4 * i, pair, 0.4, label=name)
        axes[0, 1].set_xticks([0.2, 1.2], ["values as in training", "random values"])
        axes[0, 1].set(ylabel="share of answers right", title="LookUp, both trained on all symbols")
        axes[0, 1].legend(fontsize=8)
        draw_curves(axes[1, 0], {"exact reader p′": chain["exact"], "model and probe": chain["probe"]},
                    "A chain of 4 symbols, deciphered", "symbols read right", chance=0.25)
        draw_curves(axes[1, 1], english, "English, symbols permuted anew in each text", "nats a character",
                    reader_of_single_symbols=unigram(val))

    figure(args.out / "demo.png", args, draw, (11, 8))


def bayes(args):
    """Section 2.3: what not knowing the alphabet costs, and a trained model beside the best that there can be."""
    set_up(args)
    if not 2 <= args.symbols <= 7:
        fail(f"--symbols {args.symbols}: p′ is a sum over all permutations, of 2 to 7 symbols")
    rows, _ = regret(args.seed)
    print_regret(rows)
    found = chain_run(args.mode, args.symbols, args.steps, args.seed, quiet=args.quiet)
    print_chain(args.mode, args.symbols, found)
    save_results(args.out, args, regret=rows, chain=found)


def lookup(args):
    """Table 1: LookUp and Permutation. All models are trained on all symbols."""
    seeds = range(args.seed, args.seed + args.seeds)
    steps = args.steps or (230 if args.kind == "lookup" else 1000)
    jobs = [(task_accuracy, args.kind, mode, seed, steps) for mode in MODES for seed in seeds]
    found = np.array(run_all(jobs, args.quiet)).reshape(len(MODES), len(seeds), 2)
    print_table([f"{args.kind}, share right, seeds {args.seed} to {seeds[-1]}", "as in training", *("random" for _ in seeds)],
                [[mode, float(row[:, 0].mean()), *map(float, row[:, 1])] for mode, row in zip(MODES, found)])
    print("The paper's table 1 (150M weights, text models, the Pile): LookUp 48.5 % standard, 91.8 % lexinvariant; "
          "Permutation 27.7 and 59.4 %")
    save_results(args.out, args, found=dict(zip(MODES, found.tolist())))


PRESETS = {
    "cpu": dict(alphabet="az27", d_model=64, n_layer=3, n_head=2, d_ff=128, seq=192, batch_size=8, steps=800, lr=4e-3),
    "gpu": dict(alphabet="ascii", d_model=512, n_layer=6, n_head=8, d_ff=2048, seq=512, batch_size=64, steps=12_000,
                lr=2e-3),
    "paper": dict(alphabet="ascii", d_model=1024, n_layer=12, n_head=8, d_ff=4096, seq=512, batch_size=64,
                  steps=250_000, lr=0.01),
}


def train(args):
    """Section 3.1: train a model, its loss by position. Ctrl-C and --resume; torchrun shares the batch out."""
    device, rank, world = set_up(args)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not 0 <= args.p <= 1 or args.p < 1 and args.mode != "permute":
        fail(f"--p {args.p}: a probability, and below 1 for --mode permute only")
    if args.batch_size % world:
        fail(f"--batch_size {args.batch_size} does not divide among {world} ranks")
    ids, val, note = load_text(args.data, args.alphabet, args.seq)
    torch.manual_seed(args.seed)
    model = LexinvariantLM(SIZE[args.alphabet], args.mode, args.d_model, args.n_layer, args.n_head, args.d_ff, args.p,
                           paper=args.preset == "paper").to(device)
    opts, checkpoint, first = optimizers(model, args.lr), args.out / "checkpoint.pt", 0
    settings = {name: getattr(args, name) for name in
                "preset mode p data alphabet seq batch_size steps lr seed".split()}  # what a resumed run must share
    if args.resume:
        saved = load_checkpoint(checkpoint)
        if other := {name: value for name, value in saved["settings"].items() if value != settings[name]}:
            fail(f"{checkpoint} is of another run, with {other}")
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"]):
            opt.load_state_dict(state)
        first = saved["step"]
    if rank == 0:
        print(f"{note}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M weights, {args.steps:,} steps of "
              f"{args.batch_size} × {args.seq} characters, {device.type}", flush=True)
    stop = torch.zeros(1, device=device)  # subtle: all ranks leave after the same step
    signal.signal(signal.SIGINT, lambda *_: (stop.fill_(1), signal.signal(signal.SIGINT, signal.SIG_DFL)))
    batch_of = lambda step: (windows(ids, args.batch_size, args.seq, args.seed, 1, step), None)
    step, loss = first, math.nan
    for step, loss in training(model, opts, batch_of, args.steps, args.seed, first, args.mode, args.quiet):
        if world > 1:
            dist.all_reduce(stop)
        if rank == 0 and (stop or step == args.steps or step % args.save_every == 0):
            state = dict(config=model.config, settings=settings, model=model.state_dict(), step=step,
                         optimizers=[opt.state_dict() for opt in opts])
            torch.save(state, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", checkpoint)
        if stop:
            break
    if rank == 0 and not stop:
        shares = {"none permuted": 0.0, "all permuted": 1.0} if args.mode == "permute" else {args.mode: None}
        x = windows(val, 100, args.seq, args.seed, 2)
        curves = {name: read(model, x, p)[0].numpy().mean(0) for name, p in shares.items()}
        print_curves("validation, nats a character", curves)
        print(f"a reader of single symbols has at best {unigram(val):.3f}; last training loss {loss:.3f}")
        save_results(args.out, args, curves=curves, loss=loss)
        figure(args.out / "train.png", args, lambda fig: draw_curves(fig.subplots(), curves, args.preset, "nats a character"))
        print(checkpoint)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if stop:
        print(f"interrupted after step {step} of {args.steps}: the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130)


def load_checkpoint(path):
    """What `train` saved. Anything else is refused."""
    if not Path(path).is_file():
        fail(f"no {path}: `python lexinvariant.py train` makes one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"config", "settings", "model", "optimizers", "step"} <= set(saved):
            return saved
    except Exception:  # torch raises a dozen kinds here
        pass
    fail(f"{path} is no checkpoint of lexinvariant.py train")


def decipher(args):
    """Figures 4 and 5: a probe of a frozen model reads substitution ciphers, and yours by --text."""
    device, _, _ = set_up(args)
    saved = load_checkpoint(args.model)
    config, settings = saved["config"], saved["settings"]
    alphabet, seq, n_vocab = settings["alphabet"], settings["seq"], config["n_vocab"]
    if config["mode"] == "standard" or config["p"] < 1:
        fail(f"{args.model} knows its symbols by name ({config['mode']}, p = {config['p']}): nothing to decipher with")
    cipher = args.text
    if cipher is not None:
        cipher = " ".join((text_of(cipher) if os.path.isfile(cipher) else cipher).split())
        symbols = list(dict.fromkeys(cipher))
        if len(cipher) < 20 or len(symbols) > n_vocab:
            fail(f"--text has {len(cipher)} characters, {len(symbols)} of them distinct: want 20 or more, and at most "
                 f"{n_vocab} distinct ones (upper and lower case differ) for the alphabet of {args.model}")
    train, val, note = load_text(args.data or settings["data"], alphabet, seq)
    model = LexinvariantLM(**config).to(device).eval()
    model.load_state_dict(saved["model"])
    probe = train_probe(model, lambda step: windows(train, 16, seq, args.seed, 3, step), n_vocab, args.steps, args.seed,
                        args.quiet)
    x = windows(val, 400, seq, args.seed, 4)
    _, hidden, symbols_seen, _ = read(model, x, 1.0)
    guess, plain = probe(hidden).argmax(2), x[:, :-1]
    seen = symbols_seen[:, :-1]
    width = min(100, seq // 4)
    starts = range(0, seq - width + 1, width)
    precision = [key_precision(seen, plain, guess, start, width) for start in starts]
    right = (guess == plain).float()
    most = int(np.bincount(train).argmax())
    print(f"{args.model}: {config['mode']}, {alphabet}, {saved['step']:,} steps. {note}")
    print_table(["400 texts, window", *(f"{start}-{start + width}" for start in starts)],
                [["characters read right", *(float(right[:, s : s + width].mean()) for s in starts)],
                 ["always the commonest", *(float((plain[:, s : s + width] == most).float().mean()) for s in starts)],
                 ["key precision", *(float(p.mean()) for p in precision)]])
    print("The paper (150M weights, 8 billion characters): key precision 0.996 in the last window")
    found = dict(precision=[float(p.mean()) for p in precision], right=right.mean(0))
    if cipher is not None:
        ids = torch.tensor([symbols.index(c) for c in cipher])
        trials = windows(val, 20, len(ids) - 1, args.seed, 5)
        share = float(np.mean([(read_cipher(model, probe, row, seq) == row).float().mean() for row in trials]))
        found |= dict(reading=to_text(read_cipher(model, probe, ids, seq).tolist(), alphabet), confidence=share)
        print(f"\ncipher:  {cipher}\nreading: {found['reading']}")
        print(f"confidence: of 20 other texts of {len(ids)} characters it reads {share:.2f} of the characters right"
              + ("; take it for noise" if share < 0.5 else ""))
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
        "p": dict(type=float, default=1.0, help="--mode permute: probability that a symbol takes part (%(default)s; the "
                  "paper's regularising: 0.2)"),
        "data": dict(help="a text file, or prose: what every Python ships (%(default)s)"),
        "alphabet": dict(choices=SIZE, help="az27: letters and space; ascii: 128, the paper's (the preset's)"),
        "model": dict(type=Path, default=Path("out/lexinvariant/train/checkpoint.pt"), help="what train saved "
                      "(%(default)s)"),
        "text": dict(help="your cipher, or a file with it; every distinct character is a symbol"),
        "task": dict(dest="kind", choices=("lookup", "permutation"), default="lookup", help="(%(default)s)"),
        "symbols": dict(type=int, default=4, help="of the chain, 2 to 7 (%(default)s)"),
        "steps": dict(type=int, help="updates (%(default)s; train: the preset's; lookup 230, permutation 1,000)"),
        "seeds": dict(type=int, default=3, help="number of seeds, from --seed on (%(default)s)"),
        "batch_size": dict(type=int, help="sequences an update, over all ranks (the preset's; the paper's 64)"),
        "seq": dict(type=int, help="characters of context (the preset's; the paper's 512)"),
        "lr": dict(type=float, help="peak learning rate of AdamW, Muon's is five times that; or of Adafactor (the "
                   "preset's; the paper's 0.01)"),
        "save_every": dict(type=int, default=1000, help="updates between checkpoints (%(default)s)"),
        "resume": dict(action="store_true", help="go on from the checkpoint in --out"),
        "seed": dict(type=int, default=0, help="of weights, data order and draws (%(default)s)"),
        "device": dict(help="cuda or cpu (cuda where there is one)"),
        "out": dict(type=Path, help="folder for results, figures and checkpoints (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, **defaults):
        about = function.__doc__.strip()
        sub = tasks.add_parser(function.__name__, help=about.split("\n")[0], description=about)
        sub.error = fail
        for name in names.split():
            sub.add_argument(f"--{name}", **flags[name])
        sub.set_defaults(task=function, **dict(out=Path(f"out/lexinvariant/{function.__name__}")) | defaults)

    task(demo, "data steps seed out no_plot quiet", data="prose", steps=800)
    task(train, "preset mode p data alphabet steps batch_size seq lr save_every resume seed device out no_plot quiet",
         mode="gaussian", data="prose")
    task(decipher, "model data text steps seed device out quiet", steps=600)
    task(lookup, "task steps seeds seed out quiet")
    task(bayes, "mode symbols steps seed device out quiet", mode="canonical", steps=500)
    args = parser.parse_args(argv)
    for name in "steps seeds batch_size seq lr save_every".split():
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
