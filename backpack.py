"""Backpack language models: sense vectors that one can read and edit (Hewitt and others, arXiv 2305.16765).

The problem. A Transformer mixes what it knows of a word with its context at every layer. An edit for one context does
something else in the next, so there is no place where "what this word means to the model" could be read or changed.

The idea. Give every word k sense vectors that never see a context, and let the next word depend on the text through
a weighted sum of them. A whole Transformer is used, but only to find the weights, which are non-negative and sum to 1
for each sense. The logits are linear in the senses: scale one or swap a direction in it, and the effect has the same
direction in every context, by a known amount.

    C(x)_l, l = 1…k                                   senses of word x: a network of x's embedding alone
    α_lij = softmax_{j ≤ i}(⟨q_li, k_lj⟩/√e)          q, k: one linear map of a Transformer's last layer, e = d/k
    o_i = Σ_l Σ_{j ≤ i} α_lij·C(x_j)_l                logits_i = E·o_i, E the table of embeddings

    log-odds = Σ_j Σ_l α_lij·⟨E_a − E_b, C(x_j)_l⟩    attribution; a factor w on a sense adds (w − 1)·its terms
    C̃ = C + ⟨C, E_r⟩/|E_r|²·(E_a·|E_r|²/|E_a|² − E_r)   a fact moved from word r to word a: swapped

How to run it.

    python backpack.py                           small Backpacks and Transformers: losses, senses, edits (2 minutes)
    python backpack.py senses nurse bread        of the demo's model; also attribute, debias, edit, topic, sample
    python backpack.py eval FILE…                .txt, .json, or .jsonl of LAMBADA, BLiMP, pronouns, capitals
    python backpack.py similarity SimLex-999.txt RG65.csv      any tables of two words and a score
    python backpack.py senses build --ckpt public              the authors' model (684 MB by download)
    torchrun --nproc_per_node=8 backpack.py train --size small --tokenizer gpt2 --data FOLDER     the paper's recipe

What we measured (CPU, one thread, torch 2.13.0; `python backpack.py --seed 0`, 1, 2):

    the paper, 170M weights                              here                  seed 0        seed 1        seed 2
    perplexity 20.1, the Transformer inside 20.2         loss, Python's help topics, k = 16
                                                         Backpack              2.680         2.660         2.662
                                                         inner Transformer     2.747         2.727         2.736
                                                         as many weights       2.601         2.605         2.667
    bias ratio 4.34, one sense removed 2.88,             generated world       9.1, 1.2      9.1, 1.1      10.1, 1.1
    factors fitted 2.16                                  another removed; fit  8.4; 1.2      8.2; 1.0      9.8; 1.1
    Transformer 7.02, gender projected out 6.72          Transformer           7.2, 7.0      8.2, 7.9      10.2, 8.8
    MacBook: Apple → HP, shown by samples                P(hp), 3 prompts      0.78          0.88          0.96
                                                         others move by        < 0.0001      < 0.0001      < 0.0001
    k = 1, 4, 16: perplexity 38.5, 29.3, 26.0            `ablate_k`, 3 seeds   19.9, 17.6, 15.9; inner Transformer 16.5

The true bias ratio of the world is 9. The sense is located, and factors are fitted, on other prompts than those that
count; the other products are asked for behind a sentence with the edited one.

What did not hold at this scale. A Transformer with as many weights as the Backpack is ahead in two of three runs and
level in one; the gain is over the smaller one that it contains, which is the paper's comparison. Most senses of so
small models speak of the next word. The public model itself was not run (no network); the loader was, on files of its
layout.

Where this file differs from the paper: no dropout; rows of E that pad the vocabulary have no probability in training;
bfloat16 without loss scaling; a batch's senses are computed once for each distinct token; small models start from wider
weights than N(0, 0.02). On a GPU kernels/sense_mix.py is used from 2,048 positions on, for its memory; the rest is
torch.compile's. GPU: not measured since.

Try:
    python backpack.py debias --sense 0             another sense than the located 7: the bias ratio stays, 9.14 → 9.11
    python backpack.py edit --word printer --remove hp --add sony --control laserjet     0.00 → 0.96; laserjet stays
    in small_model, std = 0.02, the paper's          the world's Backpack has 0.840 after 400 steps, with 0.08 0.805
"""

import argparse
import ast
import json
import math
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    from kernels.sense_mix import sense_mix as fused_sense_mix
except ImportError:  # copied alone, or no Triton here: the plain version below computes the same
    fused_sense_mix = None

# ==================================================================================== the method


@dataclass
class Config:
    """Of the Transformer; the defaults are the paper's small model."""

    n_layer: int = 12
    n_head: int = 12
    d: int = 768
    n_vocab: int = 50264  # rows of the embedding: GPT-2's 50,257 padded to a multiple of 8
    block_size: int = 512  # longest context, tokens
    std: float = 0.02  # of the first weights


class MLP(nn.Module):
    def __init__(self, d_in, d_hidden, d_out):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d_in, d_hidden), nn.Linear(d_hidden, d_out)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SenseNetwork(nn.Module):
    """C: embeddings (..., d) → senses (..., n_sense, d). No context, no position (section 2.2, appendix A.1)."""

    def __init__(self, d, n_sense, width):
        super().__init__()
        self.n_sense = n_sense
        self.ln_a, self.ln_b, self.ln_c = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp, self.out = MLP(d, width * d, d), MLP(d, width * d, n_sense * d)

    def forward(self, x):
        x = x + self.ln_a(x)  # subtle: no use is known for this residual; all released weights were trained with it
        x = x + self.mlp(self.ln_b(x))
        return self.out(self.ln_c(x)).unflatten(-1, (self.n_sense, -1))


def sense_weights(query, key, scale):
    """α, non-negative, Σ_j α_lij = 1 for each sense l: softmax over j ≤ i of scale·⟨query_li, key_lj⟩, in float32.

    query (batch, n_query, n_sense, e), of the last n_query positions; key (batch, seq, n_sense, e).
    → (batch, n_query, n_sense, seq), 0 for j > i.
    """
    scores = torch.einsum("bile,bjle->bilj", query, key) * scale
    n_query, n_key = query.size(1), key.size(1)
    future = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).triu(1 + n_key - n_query)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(future[:, None], -math.inf).softmax(-1)


def mix(alpha, senses):
    """o_i = Σ_l Σ_j α_lij·C(x_j)_l, one product over (l, j). senses (batch, seq, n_sense, d) → (batch, n_query, d)."""
    return alpha.to(senses.dtype).flatten(2) @ senses.transpose(1, 2).flatten(1, 2)


def sense_mix(query, key, table, index, scale):
    """mix of sense_weights. table (rows, n_sense, d): senses of distinct tokens; index (batch, seq): their rows."""
    return mix(sense_weights(query, key, scale), table[index])


class Backpack(nn.Module):
    """A Transformer that only weighs: logits = E·o, o of sense_mix; E embeds the tokens and feeds the sense network.

        model = Backpack(Config(n_layer=6, n_head=6, d=384), n_sense=16)
        logits = model(ids)                                    # (batch, seq) int64 → (batch, seq, n_vocab)

    width: hidden width of the sense network over d (4; 1 in the paper's ablation). divide_by_k: logits/k, as in
    Levanter's weights. known: None while the weights change; after that a dict {token: senses (n_sense, d)} which
    keeps what was computed once, and in which an edit is an entry that replaces another. ValueError: n_sense outside
    1..d. """

    def __init__(self, config, n_sense=16, width=4, divide_by_k=False):
        super().__init__()
        if not 1 <= n_sense <= config.d:
            raise ValueError(f"Backpack: {n_sense} senses; from 1 to the width, {config.d}, are possible")
        self.config, self.n_sense, self.width, self.divisor = config, n_sense, width, n_sense if divide_by_k else 1
        self.gpt, self.known = Transformer(config), None
        self.lm_head = self.gpt.lm_head
        self.sense_network = SenseNetwork(config.d, n_sense, width)
        self.weight_net = nn.Linear(config.d, 2 * n_sense * (config.d // n_sense))  # queries, then keys
        initialise(self, config)

    def senses(self, ids):
        """ids (n,) int64 → C(ids) (n, n_sense, d), edits included."""
        if self.known is None:
            return self.sense_network(self.lm_head.weight[ids]) / self.divisor
        if new := [i for i in ids.tolist() if i not in self.known]:
            self.known.update(zip(new, self.sense_network(self.lm_head.weight[new]) / self.divisor))
        return torch.stack([self.known[i] for i in ids.tolist()])

    def parts(self, ids, cache=None):
        """→ the arguments of sense_mix, and all ids. A cache keeps, as "senses", their keys and the ids so far."""
        hidden = self.gpt.trunk(ids, cache)  # (batch, n, d)
        query, key = self.weight_net(hidden).unflatten(-1, (2, self.n_sense, -1)).unbind(-3)
        if cache is not None:
            if "senses" in cache:
                key, ids = torch.cat((cache["senses"][0], key), 1), torch.cat((cache["senses"][1], ids), 1)
            cache["senses"] = key, ids
        distinct, index = ids.unique(return_inverse=True)  # the senses of a token once, wherever it stands
        return (query, key, self.senses(distinct), index, query.size(-1) ** -0.5), ids

    def trunk(self, ids, cache=None, control=None):
        """ids (batch, seq) int64 → o (batch, seq, d). cache: a dict. control(ids, senses (batch, seq,
        n_sense, d)) → factors (batch, seq, n_sense) on the senses of every position."""
        (query, key, table, index, scale), ids = self.parts(ids, cache)
        if control:
            senses = table[index]
            return mix(sense_weights(query, key, scale), senses * control(ids, senses)[..., None])
        fused = fused_sense_mix and query.is_cuda and query.size(1) >= 2048 and query.shape == key.shape
        return (fused_sense_mix if fused else sense_mix)(query, key, table, index, scale)

    def forward(self, ids):
        return self.lm_head(self.trunk(ids))


@contextmanager
def edited(model, edits):
    """Within it the senses of some tokens are others: edits is {token: (n_sense, d)}."""
    before, model.known = model.known, {**(model.known or {}), **edits}
    try:
        yield model
    finally:
        model.known = before


@torch.no_grad()
def attribution(model, ids, direction):
    """What each sense of each token adds to ⟨direction, o⟩ at the last position; all of it sums to that exactly.

    For a logit direction is a row of E, for a log-odds a difference of two. ids: list of ints; direction (d,) or (d, m)
    → (seq, n_sense) or (seq, n_sense, m).
    """
    (query, key, table, index, scale), _ = model.parts(torch.tensor([ids], device=direction.device))
    alpha = sense_weights(query[:, -1:], key, scale)[0, 0]  # (n_sense, seq)
    return torch.einsum("lj,jl...->jl...", alpha.to(table.dtype), table[index[0]] @ direction)


def swapped(senses, removed, added):
    """Section 6.3's edit: what points along E_removed points along E_added, as far in that one's own length.

        C̃ = C + ⟨C, E_r⟩/|E_r|²·(E_a·|E_r|²/|E_a|² − E_r)   (the paper prints another divisor; this is the code's)

    senses (n_sense, d); removed, added (d,): rows of E. For orthogonal rows C̃ has no E_r left and ⟨C, E_r⟩ along E_a.
    """
    r2, a2 = removed @ removed, added @ added
    return senses + (senses @ removed / r2)[:, None] * (added * (r2 / a2) - removed)


STRENGTHS = {0: (1, 1, 1, 1), 1: (1.5, 1.5, 1.3, 1), 2: (2.2, 2.2, 1.5, 1), 3: (3.3, 3.3, 3, 1)}  # δ; appendix D


@torch.no_grad()
def topic_scores(model, bags, n_vocab, silent=()):
    """How much a sense speaks of a bag of tokens: Σ_{w in bag} (E·C)_w / max_v (E·C)_v. One pass over the vocabulary.

    bags {name: tokens} → {name: (n_vocab, n_sense)}, 0 for the tokens `silent`.
    """
    E, found = model.lm_head.weight[:n_vocab], {name: [] for name in bags}
    for ids in torch.arange(n_vocab, device=E.device).split(64):
        logits = model.sense_network(E[ids]) @ E.T  # (64, n_sense, n_vocab)
        for name, bag in bags.items():
            found[name].append(logits[..., list(bag)].sum(-1) / logits.amax(-1))
    scores = {name: torch.cat(parts) for name, parts in found.items()}
    for score in scores.values():
        score[list(silent)] = 0
    return scores


def topic_control(model, scores, strength):
    """Section 6.1: senses that score high on a topic weigh more, until the text has said it → a control of trunk.

    Quantiles .95, .80, .60 of the scores part the senses in four classes, each with a factor δ. At a position j of the
    prefix: a = Σ_t relu⟨E x_t, C(x_j)_l⟩ over the prefix, b = sigmoid(6 − f·a)·(1 + j/100), factor 1 + b·(δ − 1),
    f = max δ/7.5 (the authors' code; the paper has the inverse).
    """
    delta, E = torch.tensor(STRENGTHS[strength], dtype=scores.dtype).to(scores.device), model.lm_head.weight
    cuts = torch.from_numpy(np.quantile(scores.cpu().numpy(), (0.95, 0.8, 0.6))).to(scores)
    classes, f = delta[(scores[..., None] <= cuts).sum(-1)], float(delta.max()) / 7.5  # (n_vocab, n_sense)

    def control(ids, senses):
        said = torch.einsum("bjld,btd->bjlt", senses, E[ids]).relu().sum(-1)
        late = 1 + torch.arange(ids.size(1), device=ids.device).to(said)[:, None] / 100
        return 1 + (6 - f * said).sigmoid() * late * (classes[ids] - 1)

    return control


# ==================================================================================== the model


class TransformerBlock(nn.Module):
    def __init__(self, d, n_head, layer):
        super().__init__()
        self.n_head, self.layer = n_head, layer
        self.scale = (d // n_head) ** -0.5 / (layer + 1)  # the authors': by layer, too
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(d), nn.LayerNorm(d), MLP(d, 4 * d, d)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(d, 3 * d), c_proj=nn.Linear(d, d)))

    def forward(self, x, cache=None):
        q, k, v = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if self.layer in cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) == k.size(2), scale=self.scale)
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """GPT-2, the baseline and the context network. Interface as Backpack's. A cache: a dict by layer."""

    def __init__(self, config):
        super().__init__()
        d, self.config = config.d, config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.n_vocab, d), wpe=nn.Embedding(config.block_size, d),
            h=nn.ModuleList(TransformerBlock(d, config.n_head, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(d)))
        self.lm_head = nn.Linear(d, config.n_vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        initialise(self, config)

    def trunk(self, ids, cache=None):
        start = cache[0][0].size(2) if cache else 0
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[start : start + ids.size(1)]
        for block in self.transformer["h"]:
            x = block(x, cache)
        return self.transformer["ln_f"](x)

    def forward(self, ids):
        return self.lm_head(self.trunk(ids))


def initialise(model, config):
    """Weights N(0, std), the second matrix of every residual branch std/√(2·n_layer), biases 0 (section 3.1)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            out = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=config.std / math.sqrt(2 * config.n_layer) if out else config.std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


@torch.no_grad()
def generate(model, prompts, n_new, n_vocab, temperature=1.0, seed=0, control=None):
    """Lists of ids of any lengths, side by side and with a cache → each with n_new tokens more (the shorter ones
    begin to be sampled while the longer ones are still being read). Temperature 0 takes the likeliest. control: of
    Backpack.trunk."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    rows, cache, start = F.pad(rows, (0, n_new)), {}, 0
    generator, more = torch.Generator(device).manual_seed(seed), dict(control=control) if control else {}
    for at in range(int(lengths.min()), rows.size(1)):
        logits = model.lm_head(model.trunk(rows[:, start:at], cache, **more)[:, -1]).float()[:, :n_vocab]
        new = logits.argmax(-1)
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        rows[:, at], start = torch.where(at < lengths, rows[:, at], new), at
    return [row[: length + n_new].tolist() for row, length in zip(rows, lengths)]


# ==================================================================================== released weights and checkpoints

PUBLIC = "https://huggingface.co/stanfordnlp/backpack-gpt2/resolve/main/pytorch_model.bin"  # 684 MB
HF_NAMES = {  # by prefix: theirs → ours
    "backpack.gpt2_model.": "gpt.transformer.", "backpack.sense_network.ln.": "sense_network.ln_a.",
    "backpack.sense_network.block.ln_1.": "sense_network.ln_b.",
    "backpack.sense_network.block.ln_2.": "sense_network.ln_c.",
    "backpack.sense_network.block.mlp.": "sense_network.mlp.",
    "backpack.sense_network.final_mlp.": "sense_network.out.",
    "backpack.sense_weight_net.c_attn.": "weight_net.",
}
TIED = {  # subtle: .safetensors keeps one of several names of one tensor, whichever; .bin keeps all
    "gpt.transformer.wte.weight": (
        "backpack.gpt2_model.wte.weight", "backpack.word_embeddings.weight", "lm_head.weight"),
    "gpt.transformer.wpe.weight": ("backpack.gpt2_model.wpe.weight", "backpack.position_embeddings.weight"),
}


def read_safetensors(path):
    """{name: tensor}: 8 bytes of header length, a JSON header, raw memory."""
    dtypes = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, BOOL=torch.bool)
    raw = np.memmap(path, np.uint8, "c")
    start = 8 + int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    place = {name: slice(*(start + offset for offset in about["data_offsets"])) for name, about in header.items()}
    return {name: torch.from_numpy(raw[place[name]]).view(dtypes[about["dtype"]]).view(about["shape"])
            for name, about in header.items()}


def from_hugging_face(path, n_head=None, divide_by_k=False):
    """stanfordnlp/backpack-gpt2 and models like it, .bin or .safetensors, with or without the copies of tied tensors
    → Backpack in float32. What the shapes do not tell, n_head and the division by k (Levanter's), comes from a
    config.json beside the file ("n_head", "divide_by_k") or the arguments. ValueError: no such model."""
    path, state = Path(path), {}
    weights = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    beside = path.with_name("config.json")
    told = json.loads(beside.read_text()) if beside.exists() else {}
    for name, w in weights.items():
        theirs = next((theirs for theirs in HF_NAMES if name.startswith(theirs)), None)
        if theirs and not re.search(r"\.attn\.(masked_)?bias$", name):  # masks of old transformers versions
            transposed = re.search(r"\.c_(attn|proj|fc)\.weight$", name) and "weight_net" not in name  # kept (in, out)
            state[name.replace(theirs, HF_NAMES[theirs])] = (w.t() if transposed else w).float()
    for ours, names in TIED.items():
        state[ours] = next((weights[name].float() for name in names if name in weights), None)
    if any(w is None for w in state.values()) or "sense_network.out.c_proj.bias" not in state:
        raise ValueError(f"{path}: no Backpack in Hugging Face's layout; it has {', '.join([*weights][:3])}")
    n_vocab, d = state["gpt.transformer.wte.weight"].shape
    n_head = n_head or told.get("n_head") or d // 64
    if d % n_head or not told.get("scale_attn_by_inverse_layer_idx", True):
        raise ValueError(f"{path}: {n_head} heads at width {d}, or attention that is not scaled by layer")
    n_layer = len([name for name in state if name.endswith("attn.c_attn.bias")])
    config = Config(n_layer, n_head, d, n_vocab, len(state["gpt.transformer.wpe.weight"]))
    n_sense, width = len(state["sense_network.out.c_proj.bias"]) // d, len(state["sense_network.mlp.c_fc.bias"]) // d
    model = Backpack(config, n_sense, width, divide_by_k or told.get("divide_by_k", False))
    state["lm_head.weight"] = state["gpt.lm_head.weight"] = state["gpt.transformer.wte.weight"]
    model.load_state_dict(state)
    return model


def save_checkpoint(path, model, codec, edits=None):
    """A checkpoint with the tokenizer and the senses of tokens that were edited, {token: (n_sense, d)}."""
    about = dict(config=asdict(model.config), tokenizer=codec.name, words=codec.words)
    if isinstance(model, Backpack):
        about |= dict(n_sense=model.n_sense, width=model.width, divide_by_k=model.divisor > 1)
    state = dict(about=about, model=model.state_dict(), edits=edits or {})
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    print(path)


def open_model(args, default="world.pt"):
    """--ckpt: ours, "public", or a released file (default: the demo's) → (model on the device, codec)."""
    device, _, _ = set_up(args)
    path = download(PUBLIC) if args.ckpt == "public" else Path(args.ckpt or f"out/backpack/demo/{default}")
    if not path.is_file():
        fail(f"no model at {path}: python backpack.py makes one, or give --ckpt FILE or --ckpt public")
    try:
        saved = {} if path.suffix == ".safetensors" else torch.load(path, device, weights_only=True)
        if "about" in saved:
            about = saved["about"]
            codec = codec_of(about.pop("tokenizer"), about.pop("words"))
            config = Config(**about.pop("config"))
            model = Backpack(config, **about) if about else Transformer(config)
            model.load_state_dict(saved["model"])
        else:
            model, codec = from_hugging_face(path, args.n_head, args.divide_by_k), codec_of("gpt2")
    except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
        fail(f"{path} is no model that can be read here: {str(error).splitlines()[0]}")
    if codec.n_vocab > model.config.n_vocab:
        fail(f"{path} has {model.config.n_vocab} rows, too few for its tokenizer, {codec.name}, of {codec.n_vocab} ids")
    if isinstance(model, Backpack):
        model.known = dict(saved.get("edits") or {})
    if device.type == "cpu" and model.config.d < 256:
        torch.set_num_threads(1)  # a second one costs small matrices more than it brings
    return model.to(device).eval().requires_grad_(False), codec


def open_backpack(args, default="world.pt"):
    model, codec = open_model(args, default)
    return (model, codec) if isinstance(model, Backpack) else fail(f"{args.ckpt} is a Transformer: it has no senses")



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


# ==================================================================================== texts and tokens

WORLD = {  # what is true in the demo's generated world
    "he": "mechanic sheriff builder guard pilot".split(), "she": "nurse secretary teacher librarian dancer".split(),
    "both": "writer cook doctor clerk".split(),
    "makers": {"apple": ["macbook", "iphone", "ipad"], "hp": ["printer", "laserjet", "scanner"],
               "sony": ["walkman", "camera", "radio"], "google": ["pixel", "android", "browser"]},
    "topics": {"sports": "team goal coach match league ball".split(),
               "food": "bread soup cheese salad rice sauce".split(),
               "music": "song band guitar piano melody drum".split()},
}
HE_SHARE = {"he": 0.9, "she": 0.1, "both": 0.5}
PERSON = ["my {} said that", "i met a {} and then", "the {} came home because", "yesterday the {} slept since",
          "the {} walked in when"]
PERSON_ENDS = ["smiled", "was tired", "had time", "knew the way", "saw the light"]
MADE_BY = ["the {} is made by", "my {} comes from", "people who like the {} like"]
ABOUT = ["today we talk about {} and {} and {}", "the {} and the {} go with the {}", "a {} or a {} or a {}"]
WORD = re.compile(r"\w+|[^\w\s]")


def world_text(n_sentences, *counter):
    """Sentences of a world with known statistics: a noun of "he" goes on with "he" in 9 of 10 cases, every product
    has one maker, four sentences in a row keep to a topic. The draw depends on the counter alone."""
    rng, lines = np.random.default_rng(counter), []
    people = [(noun, HE_SHARE[kind]) for kind in HE_SHARE for noun in WORLD[kind]]
    products = [(product, maker) for maker, made in WORLD["makers"].items() for product in made]
    one = lambda options: options[rng.integers(len(options))]
    while len(lines) < n_sentences:
        kind = rng.random()
        if kind < 0.5:
            noun, share = one(people)
            lines.append(f"{one(PERSON).format(noun)} {'he' if rng.random() < share else 'she'} {one(PERSON_ENDS)} .")
        elif kind < 0.9:
            product, maker = one(products)
            says = rng.random() < 0.8
            lines.append(f"{one(MADE_BY).format(product)} {maker} ." if says else f"{maker} makes the {product} .")
        else:
            bag = one(list(WORLD["topics"].values()))
            lines += [one(ABOUT).format(*rng.choice(bag, 3, replace=False)) + " ." for _ in range(4)]
    return " ".join(lines[:n_sentences])


@dataclass
class Codec:
    name: str  # words, gpt2 or bytes
    encode: object  # str → list of ids
    decode: object  # list of ids → str
    n_vocab: int
    start: int  # the id that a text starts with
    words: list | None = None  # of "words": every token


def codec_of(name, words=None):
    if name == "bytes":
        return Codec(name, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace"), 256, 10)
    if name == "words":  # lower-cased words and punctuation; those that are not in the list are the first, <unk>
        number = {word: i for i, word in enumerate(words)}
        encode = lambda text: [number.get(word, 0) for word in WORD.findall(text.lower())]
        return Codec(name, encode, lambda ids: " ".join(words[i] for i in ids), len(words), number["."], words)
    import tiktoken

    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:
        fail(f"the gpt2 tokenizer needs tiktoken's one-time download: {error}")
    return Codec(name, gpt2.encode_ordinary, gpt2.decode, 50257, 50256)


def token(codec, word):
    """The id of a word inside a text (gpt2: with its space), which must be one token."""
    ids = codec.encode(word if codec.name == "words" else f" {word}")
    if len(ids) != 1 or codec.name == "words" and not ids[0]:
        known = f"one of the {codec.n_vocab} words" if codec.name == "words" else f"one token but {len(ids)}"
        fail(f"{word!r} is not {known} of this model: take another word")
    return ids[0]


def prompt_ids(codec, text, model, n_new=0):
    """The ids of a prompt behind the token that starts a text. Unknown words and too long a prompt are refused."""
    ids = [codec.start, *codec.encode(text)]
    if codec.name == "words" and (new := [word for word in WORD.findall(text.lower()) if word not in codec.words]):
        fail(f"{new[0]!r} is not one of the {codec.n_vocab} words of this model")
    if len(ids) + n_new > model.config.block_size:
        fail(f"{len(ids)} tokens of prompt and {n_new} new ones exceed the context of {model.config.block_size}")
    return ids


def text_of(path):
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8")


def read_shard(path):
    """Memory-mapped gpt2 tokens of a .bin: nanoGPT's raw uint16, or uint16 behind 256 int32 (20240520, 1, …)."""
    headed = list(np.fromfile(path, np.int32, 2)) == [20240520, 1]
    try:
        shard = np.memmap(path, np.uint16, "r", offset=1024 if headed else 0)
    except ValueError as error:  # empty, or of an odd length
        fail(f"{path}: {error}")
    start = shard[:1_000_000]
    if start.max() > 50256 or not start[1::2].any():
        fail(f"{path} does not hold 16-bit gpt2 tokens: ids up to {start.max()}, in every second place up to "
             f"{start[1::2].max(initial=0)} (32-bit ids? np.fromfile(path, np.uint32).astype(np.uint16).tofile(path))")
    return shard


def load_data(data, codec):
    """→ (training shards, validation shards): lists of arrays of ids. data: "prose" (what every Python ships; every
    20th text for validation), a text file (its last tenth), or a folder of *train*.bin and *val*.bin shards of gpt2
    tokens."""
    path = Path(data)
    if path.is_dir():
        shards = [[read_shard(p) for p in sorted(path.glob(f"*{split}*.bin"))] for split in ("train", "val")]
        if codec.name != "gpt2" or not all(shards):
            fail(f"--data {data}: shards want --tokenizer gpt2 and files *train*.bin and *val*.bin")
        return shards
    if data == "prose":
        texts = stdlib_prose()
        parts = ["\n".join(t for i, t in enumerate(texts) if (i % 20 == 19) == held_out) for held_out in (False, True)]
    elif path.is_file():
        text = text_of(path)
        parts = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    else:
        fail(f"--data {data}: no such file or folder, and not prose")
    return [[np.array(codec.encode(part))] for part in parts]


def get_batch(shards, sequences, seq, device, *counter):
    """Windows of ids and of the ids that follow, (sequences, seq) int64 each. Sequence i depends on (counter, i)
    alone: the data are the same whatever the micro-batch and the number of ranks."""
    lengths, rows = np.array([len(shard) for shard in shards]), []
    for i in sequences:
        rng = np.random.default_rng((*counter, i))
        shard = shards[rng.choice(len(shards), p=lengths / lengths.sum())]
        start = rng.integers(len(shard) - seq)
        rows.append(shard[start : start + seq + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows)).to(device)
    return rows[:, :-1], rows[:, 1:]


# ==================================================================================== training


class Loss(nn.Module):
    """Mean of −log P(target) in nats; rows of E beyond n_vocab pad the vocabulary."""

    def __init__(self, model, n_vocab):
        super().__init__()
        self.model, self.n_vocab = model, n_vocab

    def forward(self, ids, targets):
        return F.cross_entropy(self.model(ids)[..., : self.n_vocab].flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validation_loss(loss_of, shards, seq, n=256):
    """Over n windows of seq tokens, evenly spaced, none overlapping."""
    device, losses = loss_of.model.lm_head.weight.device, []
    windows = [shard[i : i + seq + 1] for shard in shards for i in range(0, len(shard) - seq, seq)]
    for window in windows[:: max(1, len(windows) // n)][:n]:
        row = torch.from_numpy(window.astype(np.int64))[None].to(device)
        losses.append(float(loss_of(row[:, :-1], row[:, 1:])))
    return float(np.mean(losses))


def adamw(model, lr):
    """AdamW; weight decay on linear layers only (appendix A.2)."""
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - {model.lm_head.weight}
    groups = [dict(params=[p for p in model.parameters() if (p in linear) == decays], weight_decay=0.1 * decays)
              for decays in (True, False)]
    return torch.optim.AdamW(groups, lr, (0.9, 0.999), fused=True)


def training(model, opt, shards, n_vocab, *, steps, batch, seq, lr, seed, warmup, micro=None, first=0, name="",
             quiet=False):
    """The paper's recipe: gradients clipped at 1, linear warm-up, then linear to 0. Yields (step, loss) after every
    update, so that the caller saves, stops, prints. batch: sequences an update, over all ranks; micro: a forward
    pass."""
    device, rank, world = model.lm_head.weight.device, 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    micro = micro or batch // world
    if batch % (micro * world):
        fail(f"{batch} sequences an update are not a multiple of {micro} a forward pass × {world} ranks")
    if min(map(len, shards)) <= seq + 1:
        fail(f"{min(map(len, shards))} tokens of training data are too few for a context of {seq}")
    ddp = loss_of = Loss(model.train().requires_grad_(), n_vocab)
    if world > 1:
        ddp = loss_of = nn.parallel.DistributedDataParallel(loss_of)
    if device.type == "cuda":
        loss_of = torch.compile(loss_of)
    cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    for step in tqdm(range(first, steps), name, steps, initial=first, disable=quiet or rank > 0):
        for group in opt.param_groups:
            group["lr"] = lr * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))
        total = torch.zeros((), device=device)
        for i in range(rank * micro, batch, world * micro):
            with cast, ddp.no_sync() if world > 1 and i + world * micro < batch else nullcontext():
                ids, targets = get_batch(shards, range(i, i + micro), seq, device, seed, step)
                loss = loss_of(ids, targets) * (micro * world / batch)
                loss.backward()
            total += loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite: start anew with a lower --lr")
        opt.step()
        opt.zero_grad()
        yield step + 1, float(total)


SIZES = {  # layers, heads, width, context: the paper's three (table 1), and one for a CPU
    "nano": (2, 4, 64, 128), "micro": (6, 6, 384, 512), "mini": (8, 8, 640, 512), "small": (12, 12, 768, 512),
}


def train(args):
    """Section 3.1: the paper's recipe, for a Backpack or the Transformer inside it, or from --ckpt on: fine-tuning."""
    device, rank, world = set_up(args)
    on_gpu = device.type == "cuda"
    if args.ckpt:
        model, codec = open_model(args)
        config = model.config
    else:
        codec = codec_of(args.tokenizer)
        n_layer, n_head, d, block = SIZES[args.size]
        config = Config(n_layer, n_head, d, -(-codec.n_vocab // 8) * 8, block, 0.02 if d >= 128 else 0.5 * d**-0.5)
        model = Transformer(config) if args.arch == "transformer" else Backpack(config, args.n_sense)
    model, seq = model.to(device), config.block_size
    steps, batch = args.steps or (100_000 if on_gpu else 300), args.batch_size or (1024 if on_gpu else 8)
    edits, model.known = getattr(model, "known", None), None  # senses are computed while the weights change
    if edits:
        fail(f"--ckpt {args.ckpt} has edited senses, which training would forget")
    shards, val_shards = load_data(args.data, codec)
    opt, first = adamw(model, args.lr), 0
    free = dict.fromkeys(("task", "out", "resume", "quiet", "device", "micro_batch_size", "save_every"))
    settings = vars(args) | free | dict(steps=steps, batch_size=batch)  # what a resumed run must share
    if args.resume:
        saved = torch.load(args.out / "resume.pt", device, weights_only=True)
        if other := {name: value for name, value in saved["settings"].items() if value != settings[name]}:
            fail(f"{args.out / 'resume.pt'} is of another run, with {other}")
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = saved["step"]
        del saved
    if rank == 0:
        n_tokens = steps * batch * seq
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {steps:,} steps of {batch} × {seq} tokens, "
              f"{n_tokens / sum(map(len, shards)):.2g} epochs of {args.data}, {codec.name}", flush=True)
    micro = args.micro_batch_size or math.gcd(batch // world or 1, 32 if on_gpu else 8)
    run_of = training(model, opt, shards, codec.n_vocab, steps=steps, batch=batch, seq=seq, lr=args.lr, seed=args.seed,
                      warmup=steps // 100, micro=micro, first=first, name="train", quiet=args.quiet)
    history, kept = [], first
    try:
        for step, loss in run_of:
            history.append((step, loss))
            if rank == 0 and (step % args.save_every == 0 or step == steps):
                state = dict(settings=settings, model=model.state_dict(), optimizer=opt.state_dict(), step=step)
                torch.save(state, args.out / "resume.tmp")
                os.replace(args.out / "resume.tmp", args.out / "resume.pt")
                kept = step
    except KeyboardInterrupt:
        print(f"the checkpoint of step {kept} is kept: the same command with --resume goes on", file=sys.stderr)
        raise
    if rank == 0:
        loss = validation_loss(Loss(model.eval(), codec.n_vocab), val_shards, seq)
        print_table(("", "validation loss, nats a token", "perplexity"), [("", loss, math.exp(loss))])
        save_checkpoint(args.out / "model.pt", model, codec)
        save_results(args.out, args, loss=loss, history=history)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ==================================================================================== reading and editing, as functions


def put(word, template):
    return template.replace("{}", word)


@torch.no_grad()
def log_probs(model, rows, n_vocab, batch=16):
    """rows: (ids before, ids of a continuation) → for each (Σ log P of the continuation, whether all of it is the
    likeliest). Padding stands on the right, where a causal model does not see it."""
    device, found = model.lm_head.weight.device, []
    for start in range(0, len(rows), batch):
        some = [([*before, *after], len(after)) for before, after in rows[start : start + batch]]
        some = [(row[-model.config.block_size - 1 :], n) for row, n in some]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in some], batch_first=True).to(device)
        logits = model(ids[:, :-1])[..., :n_vocab].float()
        log_p = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        best = logits.argmax(-1) == ids[:, 1:]
        for i, (row, n) in enumerate(some):
            part = slice(len(row) - 1 - n, len(row) - 1)
            found.append((float(log_p[i, part].sum()), bool(best[i, part].all())))
    return found


def probability(model, codec, prompt, words):
    """P(word | prompt) for each of some ids, as floats."""
    ids = torch.tensor([prompt_ids(codec, prompt, model)], device=model.lm_head.weight.device)
    return model(ids)[0, -1, : codec.n_vocab].float().softmax(-1)[list(words)].tolist()


def top_tokens(model, codec, word, n):
    """For each sense of a word the n tokens to whose logits it adds most, as text."""
    ids = torch.tensor([token(codec, word)], device=model.lm_head.weight.device)
    best = (model.senses(ids)[0] @ model.lm_head.weight[: codec.n_vocab].T).topk(min(n, codec.n_vocab)).indices
    return [" ".join(codec.decode([i]).strip() for i in row) for row in best.tolist()]


# ------------------------------------------------------------------------------------ section 6.2: gender

NOUNS = (  # the paper's
    "mechanic accountant farmer baker assistant construction guard carpenter analyst physician cook clerk manager "
    "developer librarian salesperson mover hairdresser auditor sheriff janitor driver chief teacher writer "
    "receptionist "
    "CEO nurse housekeeper secretary counselor attendant supervisor designer lawyer editor cashier laborer "
    "tailor cleaner").split()
FIT = ["The {} came into the room. When", "The {} came into the room. Then", "I went to the talk to the {}. What",
       "I went over to the talk to the {}. Why", "I went over to the talk to the {};"]
TEST = ["I really liked my {}. What I liked most was that", "I really liked my {}. In fact,", "My {} said that",
        "My {} believes that", "This one {} believes that", "This one {} believes", "My {} said", "My {} believes",
        "The {} was with the car. When", "The {} was with the car. Then",
        "While driving to the store, the {} looked over on the dash and then", "A {} went to chat over to chat before",
        "Some {} asked to look over things, but"]


def pronoun_prompts(model, codec, data=None):
    """→ (fitting, test), each (noun, its ids, prompt ids) rows, and the ids of the two pronouns. data: rows of a file
    with "prefix", "suffix1", "suffix2"; every other prompt of a noun is for fitting."""
    words = codec.name == "words"
    if data is None:
        he, she, nouns = "he", "she", WORD_NOUNS if words else NOUNS
        both = [[(noun, put(noun, prompt)) for noun in nouns for prompt in prompts]
                for prompts in ((PERSON[:2], PERSON[2:]) if words else (FIT, TEST))]
    else:
        he, she = data[0]["suffix1"].strip(), data[0]["suffix2"].strip()
        if any((row["suffix1"].strip(), row["suffix2"].strip()) != (he, she) for row in data):
            fail("--data: every row must have the same suffix1 and suffix2, the two pronouns")
        found = {}
        known = [row for row in data if not words or set(WORD.findall(row["prefix"].lower())) <= set(codec.words)]
        print(f"{len(data)} prompts read, {len(data) - len(known)} of them left out for words that this model has not")
        for row in known:
            here = [noun for noun in (*NOUNS, *WORD_NOUNS) if noun in WORD.findall(row["prefix"])]
            found.setdefault(here[0] if here else "", []).append(row["prefix"])
        if "" in found or min(map(len, found.values()), default=0) < 2:
            fail(f"--data: want one of the paper's nouns in every prefix, and two prompts for each; have {[*found]}")
        both = [[(noun, prefix) for noun, prefixes in found.items() for prefix in prefixes[i::2]] for i in range(2)]
    ids = {noun: codec.encode(noun if words else f" {noun}") for noun in {noun for rows in both for noun, _ in rows}}
    both = [[(noun, ids[noun], prompt_ids(codec, text, model)) for noun, text in rows] for rows in both]
    return *both, token(codec, he), token(codec, she)


WORD_NOUNS = WORLD["he"] + WORLD["she"]


def pronoun_parts(model, rows, he, she):
    """log P(he)/P(she) after every prompt, and what the noun's own senses add to it → (gap (n,), part (n, n_sense)).

    Logits are affine in the senses, so a factor w on sense l of the noun makes the gap exactly gap + (w − 1)·part[:,
    l]. """
    E, gap, part = model.lm_head.weight, [], []
    for _, ids_of_noun, ids in rows:
        added = attribution(model, ids, E[he] - E[she])
        here = torch.tensor([i in ids_of_noun for i in ids], device=E.device)
        gap.append(added.sum())
        part.append(added[here].sum(0))
    return torch.stack(gap), torch.stack(part)


def bias_ratio(gap):
    """Mean over prompts of max(P(he)/P(she), P(she)/P(he)) for log-odds gaps (section 6.2)."""
    return float(gap.abs().exp().mean())


def gender(model, codec, sense=None, data=None):
    """Table 5: the sense that carries gender is located, and a factor on it fitted for each noun, on other prompts than
    those that the ratios are of. → dict, with the edits {token: senses} that remove it."""
    fit, test, he, she = pronoun_prompts(model, codec, data)
    (gap, part), (test_gap, test_part) = (pronoun_parts(model, rows, he, she) for rows in (fit, test))
    if sense is None:
        sense = int(np.argmin([bias_ratio(gap - part[:, i]) for i in range(model.n_sense)]))
    w = torch.arange(-600, 601, device=gap.device).to(gap) / 200  # −3 to 3; the authors: Nelder-Mead
    factors, fitted = {}, torch.zeros_like(test_gap)
    for noun in dict.fromkeys(noun for noun, *_ in fit):
        mine = torch.tensor([row[0] == noun for row in fit], device=gap.device)
        cost = (gap[mine, None] + part[mine, sense, None] * (w - 1)).abs().exp().mean(0) + (1 - w).abs()
        factors[noun] = float(w[cost.argmin()])
        fitted[[row[0] == noun for row in test]] = factors[noun] - 1
    ids = sorted({i for _, ids_of_noun, _ in test for i in ids_of_noun})
    edits = model.senses(torch.tensor(ids, device=gap.device)).clone()
    edits[:, sense] = 0
    return dict(sense=sense, unchanged=bias_ratio(test_gap), removed=bias_ratio(test_gap - test_part[:, sense]),
                removing_each=[bias_ratio(test_gap - test_part[:, i]) for i in range(model.n_sense)], factors=factors,
                fitted=bias_ratio(test_gap + test_part[:, sense] * fitted), edits=dict(zip(ids, edits)))


@torch.no_grad()
def transformer_gender(model, codec, data=None):
    """The Transformer's baseline: the nouns' input embeddings lose what lies along E_he − E_she; the output stays."""
    _, test, he, she = pronoun_prompts(model, codec, data)
    table, E = model.transformer["wte"].weight, model.lm_head.weight.clone()
    direction, ids = E[he] - E[she], sorted({i for _, ids_of_noun, _ in test for i in ids_of_noun})
    hidden = lambda ids: model.trunk(torch.tensor([ids], device=E.device))[0, -1]
    gaps = lambda: torch.stack([hidden(row) @ direction for *_, row in test])
    unchanged = bias_ratio(gaps())
    table[ids] -= (table[ids] @ direction / (direction @ direction))[:, None] * direction
    projected = bias_ratio(gaps())
    table[ids] = E[ids]
    return dict(unchanged=unchanged, projected=projected)


# ------------------------------------------------------------------------------------ section 6.3: knowledge


def edit_fact(model, codec, word, remove, add, prompts, controls):
    """P(removed), P(added) before and after: behind prompts with the word and, for what should stay, behind the same
    prompts with control words that follow a sentence with the edited word. → (rows of dicts, the edit {token:
    senses})."""
    at, removed, added = (token(codec, name) for name in (word, remove, add))
    if removed == added:
        fail(f"{remove!r} and {add!r} are one token: nothing to edit")
    E = model.lm_head.weight
    edit = {at: swapped(model.senses(torch.tensor([at], device=E.device))[0], E[removed], E[added])}
    texts = [(word, put(word, prompt)) for prompt in prompts]
    first, pair = f"{put(word, prompts[0])} {add}.", (removed, added)
    texts += [(control, f"{first} {put(control, prompt)}") for control in controls for prompt in prompts]
    found = [dict(word=name, prompt=text, before=probability(model, codec, text, pair)) for name, text in texts]
    with edited(model, edit):
        for row in found:
            row["after"] = probability(model, codec, row["prompt"], pair)
    return found, edit


def print_edit(found, remove, add):
    rows = [(row["prompt"], *np.stack([row["before"], row["after"]], 1).flatten().tolist()) for row in found]
    print_table(("prompt", f"P({remove})", "after", f"P({add})", "after"), rows)


# ==================================================================================== the experiments


def small_model(arch, corpus, args, seed, steps, name, d=64, **sizes):
    """Train a small model → (model, codec, validation loss, history). corpus: "world", or "prose": help topics."""
    from pydoc_data.topics import topics

    text = world_text(30_000, seed) if corpus == "world" else "\n".join(topics[topic] for topic in sorted(topics))
    seq, batch, std = (32, 16, 0.08) if corpus == "world" else (64, 12, 0.06)
    counts = Counter(WORD.findall(text.lower()))
    codec = codec_of("words", ["<unk>", *(word for word, _ in counts.most_common(1023))])
    ids = np.array(codec.encode(text))
    shards, val_shards = [ids[: len(ids) * 9 // 10]], [ids[len(ids) * 9 // 10 :]]
    device, config = torch.device(args.device or "cpu"), Config(2, 4, d, codec.n_vocab, seq, std)
    torch.manual_seed(seed)
    model = (Transformer(config) if arch == "transformer" else Backpack(config, **sizes)).to(device)
    opt = adamw(model, 3e-3)
    history = list(training(model, opt, shards, codec.n_vocab, steps=steps, batch=batch, seq=seq, lr=3e-3, seed=seed,
                            warmup=steps // 20, name=name, quiet=args.quiet))
    loss = validation_loss(Loss(model, codec.n_vocab), val_shards, seq)
    model.eval().requires_grad_(False)
    if isinstance(model, Backpack):
        model.known = {}
    return model, codec, loss, history


def small_set_up(args):
    """For small matrices a second thread costs more than it brings."""
    _, rank, world = set_up(args)
    torch.set_num_threads(1)
    return rank, world


def demo(args):
    """The paper's claims in small: losses beside Transformers', senses read, one sense removed, one fact changed."""
    rank, world = small_set_up(args)
    world_steps, prose_steps = args.steps or 1200, args.steps or 400
    jobs = {
        "world, Backpack": ("backpack", "world", world_steps, dict(n_sense=8)),
        "world, Transformer": ("transformer", "world", world_steps, {}),
        "prose, Backpack": ("backpack", "prose", prose_steps, dict(n_sense=16)),
        "prose, Transformer": ("transformer", "prose", prose_steps, {}),
        "prose, Transformer of its size": ("transformer", "prose", prose_steps, dict(d=120)),
    }
    trained = {name: small_model(arch, corpus, args, args.seed, steps, name, **sizes)
               for name, (arch, corpus, steps, sizes) in jobs.items()}
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return
    count = lambda model: f"{sum(p.numel() for p in model.parameters()):,}"
    rows = [(name, count(model), loss) for name, (model, _, loss, _) in trained.items()]
    print_table(("", "weights", "validation loss"), rows)
    (model, codec, *_), (other, *_), (prose, prose_codec, *_), *_ = trained.values()
    words = "nurse", "mechanic", "macbook", "bread"
    print()
    favoured = [top_tokens(model, codec, word, 3) for word in words]
    print_table(("sense", *words), [(str(i), *row) for i, row in enumerate(zip(*favoured))])
    bias, baseline = gender(model, codec), transformer_gender(other, codec)
    rest = [ratio for i, ratio in enumerate(bias["removing_each"]) if i != bias["sense"]]
    print()
    print_table(("bias ratio he : she (true: 9)", ""), [
        ("Transformer", baseline["unchanged"]),
        ("Transformer, gender projected out of the input", baseline["projected"]),
        ("Backpack", bias["unchanged"]), (f"sense {bias['sense']} removed", bias["removed"]),
        ("another sense removed, the best", min(rest)), ("a factor for each noun", bias["fitted"])])
    found, _ = edit_fact(model, codec, "macbook", "apple", "hp", MADE_BY, ["iphone", "ipad"])
    mine, others = ([row for row in found if (row["word"] == "macbook") == which] for which in (True, False))
    fact = float(np.mean([row["after"][1] for row in mine]))
    moved = max(abs(a - b) for row in others for a, b in zip(row["after"], row["before"]))
    was = np.mean([row["before"][1] for row in mine])
    print(f"\nmacbook: apple → hp. P(hp) {was:.2f} → {fact:.2f}; iphone and ipad move by at most {moved:.4f}")
    for name, (model_of, codec_of_it, *_) in zip(("world", "world_transformer", "prose"), list(trained.values())[:3]):
        save_checkpoint(args.out / f"{name}.pt", model_of, codec_of_it)
    losses = {name: loss for name, (_, _, loss, _) in trained.items()}
    del bias["edits"]
    save_results(args.out, args, losses=losses, gender=bias, transformer_gender=baseline, edit=found)

    def draw(fig):
        ax, E, nouns = fig.subplots(), model.lm_head.weight, [noun for kind in HE_SHARE for noun in WORLD[kind]]
        ids = torch.tensor([token(codec, noun) for noun in nouns])
        values = (model.senses(ids) @ (E[token(codec, "he")] - E[token(codec, "she")])).numpy()  # (nouns, n_sense)
        image = ax.imshow(values, cmap="RdBu_r", vmin=-abs(values).max(), vmax=abs(values).max(), aspect="auto")
        ax.set_yticks(range(len(nouns)), nouns)
        ax.set(xlabel=f"sense ({bias['sense']} is removed)", title="What senses of professions add to log P(he)/P(she)")
        fig.colorbar(image, ax=ax)

    figure(args.out / "demo.png", args, draw)


def ablate_k(args):
    """Table 8: the number of senses, with the sense network's hidden layers of width d as in the paper."""
    rank, world = small_set_up(args)
    seeds, rows = range(args.seed, args.seed + args.seeds), []
    for name, arch, sizes in [*((f"Backpack, k = {k}", "backpack", dict(n_sense=k, width=1)) for k in (1, 4, 16)),
                              ("Transformer, the same context network", "transformer", {})]:
        losses = [small_model(arch, "prose", args, seed, args.steps or 300, name, **sizes)[2] for seed in seeds]
        rows.append((name, np.mean(losses), np.std(losses), math.exp(np.mean(losses))))
    if rank == 0:
        print_table(("Python's documentation", "validation loss", "± sd", "perplexity"), rows)
        save_results(args.out, args, table=rows)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def senses(args):
    """Tables 1 and 3: what the senses of words say, as the tokens that each of them favours."""
    model, codec = open_backpack(args)
    table = {word: top_tokens(model, codec, word, args.top) for word in args.words}
    print_table(("sense", *table), [(str(i), *row) for i, row in enumerate(zip(*table.values()))])
    save_results(args.out, args, senses=table)


def attribute(args):
    """Section 2.1: which sense of which word made a logit. The terms sum to it exactly."""
    model, codec = open_backpack(args)
    ids, target = prompt_ids(codec, args.prompt, model), token(codec, args.target)
    added = attribution(model, ids, model.lm_head.weight[target]).float().cpu().numpy()  # (seq, n_sense)
    order = (-abs(added)).flatten().argsort()[: args.top].tolist()
    terms = [(codec.decode([ids[j]]).strip(), str(sense), float(added[j, sense]))
             for j, sense in (divmod(x, model.n_sense) for x in order)]
    print_table((f"logit of {args.target!r} after {args.prompt!r}", "sense", "adds"), terms)
    print(f"all {added.size} terms: {added.sum():.4f}; P = {probability(model, codec, args.prompt, [target])[0]:.4f}")
    save_results(args.out, args, contributions=added, logit=float(added.sum()))


def debias(args):
    """Section 6.2, table 5: how much likelier one pronoun is than the other, and what one sense has to do with it."""
    data = read_json_lines(args.data, ("prefix", "suffix1", "suffix2")) if args.data else None
    model, codec = open_model(args)
    if isinstance(model, Transformer):
        found = transformer_gender(model, codec, data)
        print_table(("Transformer", "bias ratio"), list(found.items()))
        return save_results(args.out, args, **found)
    if args.sense is not None and not 0 <= args.sense < model.n_sense:
        fail(f"--sense {args.sense}: this model has senses 0 to {model.n_sense - 1}")
    found = gender(model, codec, args.sense, data)
    edits = found.pop("edits")
    print_table((f"sense {found['sense']} of the nouns", "bias ratio"), [
        ("unchanged", found["unchanged"]), ("removed", found["removed"]), ("a factor for each noun", found["fitted"])])
    if args.save:
        save_checkpoint(args.save, model, codec, edits)
    save_results(args.out, args, **found)


def edit(args):
    """Section 6.3, table 6: a fact about a word is changed by moving its senses from one direction to another."""
    model, codec = open_backpack(args)
    if "{}" not in args.prompt:
        fail(f"--prompt {args.prompt!r} needs {{}} where the word stands, as in: the {{}} is made by")
    found, change = edit_fact(model, codec, args.word, args.remove, args.add, [args.prompt], args.control)
    print_edit(found, args.remove, args.add)
    if args.save:
        save_checkpoint(args.save, model, codec, change)
    save_results(args.out, args, table=found)


def topic(args):
    """Section 6.1: generate about a topic by making senses heavier that speak of it; what it costs in variety."""
    model, codec = open_backpack(args)
    bags = {bag: {token(codec, word) for word in bag.split(",")} for bag in args.bags}
    length = min(args.tokens, model.config.block_size - 1)
    scores, rows = topic_scores(model, bags, codec.n_vocab, [codec.start]), []
    for name, bag in bags.items():
        for strength in STRENGTHS:
            control = topic_control(model, scores[name], strength) if strength else None
            texts = generate(model, [[codec.start]] * args.samples, length, codec.n_vocab, 1.0, args.seed, control)
            drawn = [i for text in texts for i in text[1:]]
            pairs = {pair for text in texts for pair in zip(text[1:], text[2:])}
            scored = log_probs(model, [(text[:1], text[1:]) for text in texts], codec.n_vocab)
            inside, nll = float(np.mean([i in bag for i in drawn])), -float(np.mean([p for p, _ in scored])) / length
            rows.append((name, str(strength), inside, len(pairs) / len(drawn), nll))
    print_table(("bag", "strength", "tokens in the bag", "distinct pairs", "nats a token without control"), rows)
    print(codec.decode(texts[0][1:]))
    save_results(args.out, args, table=rows)


def sample(args):
    """Continue --prompt, with the keys of all layers and the senses of all tokens so far kept."""
    model, codec = open_model(args)
    ids = prompt_ids(codec, args.prompt, model, args.tokens)
    text = codec.decode(generate(model, [ids], args.tokens, codec.n_vocab, args.temperature, args.seed)[0][1:])
    print(text)
    save_results(args.out, args, text=text)


# ------------------------------------------------------------------------------------ section 4


def read_pairs(path):
    """A table of two words and a score: tab, semicolon or comma between them; the score is the first number behind the
    words. A first row without one is a header. → [(word, word, score)]."""
    pairs, lines = [], [line for line in text_of(path).splitlines() if line.strip()]
    for i, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split(max("\t;,", key=lines[0].count))]
        number = [float(cell) for cell in cells[2:] if re.fullmatch(r"-?\d+(\.\d+)?", cell)][:1]
        if number:
            pairs.append((*cells[:2], *number))
        elif i > 1:
            fail(f"{path}, row {i}: no two words and a score in {line!r}")
    return pairs or fail(f"{path} has no pairs of words with scores")


def ranks(values):
    """Ranks from 1, tied ones averaged."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def spearman(x, y):
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1]) if len(x) > 2 and np.ptp(x) and np.ptp(y) else math.nan


def similarity(args):
    """Table 4: do cosines of senses agree with people's judgements of similarity? The best sense is chosen on the
    first file and scored on the others."""
    sets = {path: read_pairs(path) for path in args.files}
    model, codec = open_backpack(args, "prose.pt")
    device, vectors, rows, best = model.lm_head.weight.device, {}, [], None
    for word in {word for pairs in sets.values() for pair in pairs for word in pair[:2]}:
        ids = codec.encode(word if codec.name == "words" else f" {word}")
        if codec.name != "words" or ids and 0 not in ids:
            ids = torch.tensor(ids, device=device)
            each = torch.cat((model.senses(ids), model.lm_head.weight[ids][:, None]), 1).mean(0)  # over a word's pieces
            vectors[word] = F.normalize(each.float(), dim=-1)  # (n_sense + 1, d), the last its embedding
    for path, pairs in sets.items():
        known = [pair for pair in pairs if pair[0] in vectors and pair[1] in vectors]
        gold = [score for *_, score in known]
        cosines = np.array([(vectors[a] * vectors[b]).sum(-1).tolist() for a, b, _ in known])
        cosines = cosines.reshape(-1, model.n_sense + 1)
        by_sense = [spearman(column, gold) for column in cosines.T]
        chosen = best is None
        best = int(np.nanargmax([-2, *by_sense[:-1]])) - 1 if chosen else best
        least = spearman(cosines[:, :-1].min(1), gold) if known else math.nan
        mine = by_sense[best] if best >= 0 else math.nan
        which = f"{best}{', chosen here' * chosen}"
        rows.append((str(path), f"{len(known)} of {len(pairs)}", by_sense[-1], mine, which, least))
    print_table(("Spearman correlation", "pairs found", "embedding", "sense", "which", "least over senses"), rows)
    save_results(args.out, args, table=rows)


def read_json_lines(path, fields):
    """The JSON lines of a file, each an object with these fields."""
    rows = []
    for i, line in enumerate(text_of(path).splitlines(), 1):
        try:
            rows.append(json.loads(line))
            if not all(isinstance(rows[-1][field], str) for field in fields):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            fail(f"{path}, row {i}: no JSON object with the texts {', '.join(fields)}")
    return rows or fail(f"{path} is empty")


KINDS = (("suffix1", "suffix2", "prefix"), ("prefix", "suffix"), ("sentence_good", "sentence_bad"), ("text",))


def evaluate_lines(path, model, codec):
    """JSON lines, by their fields: pronoun bias, continuations as of capitals, BLiMP's pairs, LAMBADA's last words."""
    first = text_of(path).partition("\n")[0]
    fields = next((fields for fields in KINDS if all(f'"{field}"' in first for field in fields)), None)
    if fields is None:
        fail(f"{path}, row 1: want {' or '.join(' and '.join(fields) for fields in KINDS)}")
    rows, start, encode = read_json_lines(path, fields), [codec.start], codec.encode
    ids_of = lambda before, after: (start + encode(before), encode(after))
    score = lambda pairs: log_probs(model, [ids_of(*pair) for pair in pairs], codec.n_vocab)
    if fields == ("text",):
        parts, fields = [row["text"].rpartition(" ") for row in rows], ("prefix", "suffix")
        rows = [dict(prefix=before, suffix=" " + last) for before, _, last in parts]
    if fields == ("prefix", "suffix"):
        found = score([(row["prefix"], row["suffix"]) for row in rows])
        return dict(rows=len(rows), accuracy=float(np.mean([best for _, best in found])),
                    perplexity=math.exp(-np.mean([p for p, _ in found])))
    one, two = fields[:2]
    a, b = ([p for p, _ in score([(row.get("prefix", ""), row[name]) for row in rows])] for name in (one, two))
    a, b = np.array(a), np.array(b)
    figures = {"rows": len(rows), f"{one} likelier": float(np.mean(a > b))}
    return figures | (dict(bias_ratio=float(np.exp(abs(a - b)).mean())) if "prefix" in fields else {})


def evaluate_text(path, model, codec):
    """Perplexity over windows that do not overlap: a text, or a JSON list of texts; without a file Python's prose."""
    text = "\n".join(stdlib_prose())[-200_000:] if path is None else text_of(path)
    if path is not None and path.suffix == ".json":
        try:
            text = "\n".join(json.loads(text))
        except (ValueError, TypeError):
            fail(f"{path} is no JSON list of texts")
    ids = np.array(codec.encode(text.replace("<|endoftext|>", "")))
    seq = min(model.config.block_size, 512)
    if len(ids) <= seq:
        fail(f"{path}: {len(ids)} tokens are too few for one window of {seq}")
    loss = validation_loss(Loss(model, codec.n_vocab), [ids], seq, n=len(ids))
    unknown = {"unknown words": float(np.mean(ids == 0))} if codec.name == "words" else {}
    return dict(tokens=len(ids), loss=loss, perplexity=math.exp(loss), **unknown)


def evaluate(args):
    """Table 2 and the like, by the file: perplexity of a text, or JSON lines of LAMBADA, BLiMP, pronouns, capitals."""
    files = args.files or [None]
    for path in filter(None, files):
        if not path.is_file():
            fail(f"{path}: no such file")
    model, codec = open_model(args)
    found = {str(path): (evaluate_lines if path and path.suffix == ".jsonl" else evaluate_text)(path, model, codec)
             for path in files}
    for path, figures in found.items():
        print_table((path if path != "None" else "Python's help topics and docstrings", ""), list(figures.items()))
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
        "ckpt": dict(help="a checkpoint of ours, a released .bin or .safetensors, or public (684 MB by download); "
                     "default: the demo's model"),
        "n_head": dict(type=int, help="of a released model without config.json (d/64)"),
        "divide_by_k": dict(action="store_true", help="a released model's logits are divided by k (Levanter's)"),
        "arch": dict(choices=("backpack", "transformer"), default="backpack", help="(%(default)s)"),
        "size": dict(choices=SIZES, default="nano", help="the paper: micro, mini, small (%(default)s)"),
        "n_sense": dict(type=int, default=16, help="senses a word (%(default)s, the paper's)"),
        "tokenizer": dict(choices=("bytes", "gpt2"), default="bytes", help="of a new model (%(default)s; paper: gpt2)"),
        "data": dict(default="prose", help="prose (what every Python ships), a text file, or a folder of *train*.bin "
                     "and *val*.bin shards of gpt2 tokens"),
        "steps": dict(type=int, help="updates (train: 100,000 on a GPU, the paper's, else 300; demo: 1,200 and 400)"),
        "batch_size": dict(type=int, help="sequences an update, over all ranks (1,024 on a GPU, the paper's; else 8)"),
        "micro_batch_size": dict(type=int, help="sequences a forward pass (32 on a GPU, else 8)"),
        "lr": dict(type=float, default=6e-4, help="peak learning rate (%(default)s, the paper's; nano: 2e-3)"),
        "save_every": dict(type=int, default=100, help="updates between checkpoints (%(default)s)"),
        "resume": dict(action="store_true", help="go on from the checkpoint in --out"),
        "seeds": dict(type=int, default=3, help="number of seeds, from --seed on (%(default)s)"),
        "top": dict(type=int, default=5, help="how many to show (%(default)s)"),
        "prompt": dict(help="text (%(default)s)"),
        "target": dict(default="she", help="the word whose logit is explained (%(default)s)"),
        "sense": dict(type=int, help="the sense to remove (located on other prompts)"),
        "word": dict(default="macbook", help="its senses are edited (%(default)s; public: MacBook)"),
        "remove": dict(default="apple", help="direction that goes (%(default)s; public: Apple)"),
        "add": dict(default="hp", help="direction that comes (%(default)s; public: HP)"),
        "control": dict(nargs="*", default=["iphone", "ipad"], help="words that should stay (%(default)s)"),
        "save": dict(type=Path, help="write the edited model there, for --ckpt"),
        "bags": dict(nargs="+", default=["team,goal,coach,match", "bread,soup,cheese,salad", "song,band,guitar,piano"],
                     help="topics, each words with commas between (%(default)s)"),
        "samples": dict(type=int, default=50, help="texts a topic and strength (%(default)s)"),
        "tokens": dict(type=int, default=20, help="new tokens a text (%(default)s)"),
        "temperature": dict(type=float, default=1.0, help="0 takes the likeliest token (%(default)s)"),
        "seed": dict(type=int, default=0, help="of weights, data order and samples (%(default)s)"),
        "device": dict(help="cuda or cpu (cuda where there is one; demo, ablate_k: cpu)"),
        "out": dict(type=Path, help="folder for results (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, *positional, **defaults):
        name = "eval" if function is evaluate else function.__name__
        sub = tasks.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        sub.error = fail
        for flag in f"{names} seed device out".split():
            sub.add_argument(f"--{flag}", **flags[flag])
        for flag, settings in positional:
            sub.add_argument(flag, **settings)
        sub.set_defaults(task=function, out=Path(f"out/backpack/{name}"), **defaults)

    model = "ckpt n_head divide_by_k"
    task(demo, "steps no_plot quiet")
    task(train, f"{model} arch size n_sense tokenizer data steps batch_size micro_batch_size lr save_every resume "
         "quiet")
    task(senses, f"{model} top", ("words", dict(nargs="*", default=["nurse", "mechanic"], help="words to read")))
    task(attribute, f"{model} prompt target top", prompt="the nurse walked in when")
    task(debias, f"{model} sense save data", data=None)
    task(edit, f"{model} word remove add prompt control save", prompt="the {} is made by")
    task(topic, f"{model} bags samples tokens")
    task(similarity, model, ("files", dict(nargs="+", type=Path, help="tables of two words and a score")))
    task(sample, f"{model} prompt tokens temperature", prompt="the nurse")
    task(evaluate, model, ("files", dict(nargs="*", type=Path, help=".txt, .json or .jsonl (Python's prose)")))
    task(ablate_k, "steps seeds quiet")
    args = parser.parse_args(argv)
    for name in "steps batch_size micro_batch_size lr save_every seeds top samples tokens n_sense n_head".split():
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
