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

    python backpack.py                           small Backpacks and Transformers: losses, senses, edits (1 minute)
    python backpack.py senses nurse pilot        of the demo's model; also attribute, debias, edit, topic, sample
    python backpack.py eval FILE…                .txt, .json, or .jsonl of LAMBADA, BLiMP, pronouns, capitals
    python backpack.py similarity SimLex-999.txt RG65.csv      any tables of two words and a score
    python backpack.py senses build --ckpt public              the authors' model (684 MB by download)
    torchrun --nproc_per_node=8 backpack.py train --size small --tokenizer gpt2 --data FOLDER       the paper's recipe
        with --steps 100000 --batch_size 1024 --micro_batch_size 32; FOLDER has nanoGPT's train.bin and val.bin

What we measured (CPU, one thread, torch 2.13.0; `python backpack.py --seed 0`, 1, 2):

    the paper, 170M weights                           here                       seed 0        seed 1        seed 2
    perplexity 20.1, the Transformer inside 20.2      loss, Python's help topics, k = 16
                                                      Backpack                   2.681         2.728         2.681
                                                      Transformer inside         2.752         2.736         2.741
                                                      Transformer of its size    2.635         2.660         2.647
    bias ratio 4.34, one sense removed 2.88,          generated world, k = 8     9.4, 1.2      8.1, 1.1      9.2, 1.1
    factors fitted 2.16                               best other removed; fit    9.4; 1.0      8.0; 1.1      8.8; 1.1
                                                      all senses projected       1.2           1.1           1.1
    MacBook: Apple → HP, shown by samples             P(hp), mean of 3 prompts   0.90          0.97          0.99
                                                      iphone, ipad move by       0.00002       0.0002        0.0001
    k = 1, 4, 16: perplexity 38.5, 29.3, 26.0         `ablate_k`, 3 seeds      17.7, 16.1, 15.7; inner Transformer 17.0

The true bias ratio of the generated world is 9. The sense is located, and factors are fitted, on other prompts than
those that count; the other products are asked for behind a sentence with the edited one. "All senses projected",
without what lies along E_he − E_she, is the simple way: it locates no sense and removes as much.

What did not hold at this scale. A Transformer with as many weights as the Backpack is ahead in all three runs; the
gain is over the smaller one that it contains, which is the paper's comparison. Most senses of so small models speak
of the next word. Topic control (`topic --samples 200`, help topics, strength 0 to 3) raises the share of "class,
method, instance, attribute" from 0.008 to 0.024, of "string, bytes, character, encoding" only from 0.004 to 0.005; in
the world it lowers that of "bread, soup, cheese, salad" from 0.010 to 0.001. The public model was not run (no
network); the loader was, on files of its layout.

A batch's senses are computed once for each distinct token. Of 8,192 words of web text 2,929 are distinct: at the
paper's micro size their senses cost 1/2.6 of one computation a position, and the forward pass of 16 × 512 tokens with
50,264 rows 1.53 times the Transformer's (CPU time, one thread; the paper: 1.4).

Where this file differs from the paper: no dropout; rows of E that pad the vocabulary have no probability in training;
bfloat16 without loss scaling; small models start from wider weights than N(0, 0.02) and, in `ablate_k`, keep the sense
network's width. On a GPU kernels/sense_mix.py is used from 2,048 positions on, for its memory; the rest is
torch.compile's. GPU: not measured since.

Try:
    python backpack.py edit --word printer --remove hp --add sony "the printer is made by"      P(sony) 0.00 → 0.96
    python backpack.py attribute                            sense 7 of "nurse" alone adds 2.87 to the logit of "she"
    in small_model, std = 0.02, the paper's, 400 steps      loss 0.84 instead of 0.72, and no bias yet: ratio 1.16
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
    n_vocab: int = 50264  # rows of the embedding, a multiple of 8 for the sake of GPUs
    block_size: int = 512  # longest context, tokens
    std: float = 0.02  # of the first weights
    n_tokens: int = 50257  # GPT-2's; the rows from here on pad the table and have no probability


class MLP(nn.Module):
    def __init__(self, d, d_out):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d_out)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SenseNetwork(nn.Module):
    """C: embeddings (..., d) → senses (..., n_sense, d). No context, no position (section 2.2, appendix A.1)."""

    def __init__(self, d, n_sense):
        super().__init__()
        self.n_sense = n_sense
        self.ln_a, self.ln_b, self.ln_c = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp, self.out = MLP(d, d), MLP(d, n_sense * d)

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
    n_query, seq = query.size(1), key.size(1)
    future = torch.ones(n_query, seq, dtype=torch.bool, device=query.device).triu(1 + seq - n_query)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(future[:, None], -math.inf).softmax(-1)


def sense_mix(query, key, table, index, scale):
    """o_i = Σ_l Σ_j α_lij·C(x_j)_l as one product over (l, j).

    query, key, scale: of sense_weights; table (rows, n_sense, d): senses of distinct tokens; index (batch, seq): the
    row of each position → (batch, n_query, d).
    """
    senses = table[index].transpose(1, 2).flatten(1, 2)  # (batch, n_sense·seq, d)
    return sense_weights(query, key, scale).to(table.dtype).flatten(2) @ senses


class Backpack(nn.Module):
    """A Transformer that only weighs: logits = E·o, o of sense_mix; E embeds the tokens and feeds the sense network.

        model = Backpack(Config(n_layer=6, n_head=6, d=384), n_sense=16)
        logits = model(ids)                       # (batch, seq) int64 → (batch, seq, n_tokens)

    n_sense: from 1 to d. known: None while the weights change; after that a dict {token: senses (n_sense, d)} which
    keeps what was computed once, and in which an edit is an entry that replaces another.
    """

    def __init__(self, config, n_sense=16):
        super().__init__()
        self.config, self.n_sense, self.known = config, n_sense, None
        self.gpt = Transformer(config)
        self.lm_head = self.gpt.lm_head
        self.sense_network = SenseNetwork(config.d, n_sense)
        self.weight_net = nn.Linear(config.d, 2 * n_sense * (config.d // n_sense))  # queries, then keys
        initialise(self, config)

    def senses(self, ids):
        """ids (n,) int64, or a list → C(ids) (n, n_sense, d), edits included."""
        if self.known is None:
            return self.sense_network(self.lm_head.weight[ids])
        ids = torch.as_tensor(ids).tolist()
        if new := [i for i in ids if i not in self.known]:
            self.known.update(zip(new, self.sense_network(self.lm_head.weight[new])))
        return torch.stack([self.known[i] for i in ids])

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
        if control:  # each position gets a row of its own
            senses = table[index]
            table = (senses * control(ids, senses)[..., None]).flatten(0, 1)
            index = torch.arange(len(table), device=index.device).view_as(index)
        fused = fused_sense_mix and query.is_cuda and query.size(1) >= 2048 and query.shape == key.shape
        return (fused_sense_mix if fused else sense_mix)(query, key, table, index, scale)

    def forward(self, ids):
        return self.lm_head(self.trunk(ids))[..., : self.config.n_tokens]


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


STRENGTHS = (1, 1, 1, 1), (1.5, 1.5, 1.3, 1), (2.2, 2.2, 1.5, 1), (3.3, 3.3, 3, 1)  # δ for 0 … 3; appendix D


@torch.no_grad()
def topic_scores(model, bags):
    """How much a sense speaks of a bag of tokens: Σ_{w in bag} (E·C)_w / max_v (E·C)_v. One pass over the vocabulary.

    bags: lists of tokens → for each of them (n_tokens, n_sense).
    """
    E, found = model.lm_head.weight[: model.config.n_tokens], []
    for rows in E.split(64):
        logits = model.sense_network(rows) @ E.T  # (64, n_sense, n_tokens)
        found.append([logits[..., bag].sum(-1) / logits.amax(-1) for bag in bags])
    return [torch.cat(parts) for parts in zip(*found)]


def topic_control(model, scores, strength):
    """Section 6.1: senses that score high on a topic weigh more, until the text has said it → a control of trunk.

    Quantiles .95, .80, .60 of the scores part the senses in four classes, each with a factor δ. At a position j of the
    prefix: a = Σ_t relu⟨E x_t, C(x_j)_l⟩ over the prefix, b = sigmoid(6 − f·a)·(1 + j/100), factor 1 + b·(δ − 1),
    f = max δ/7.5 (the authors' code; the paper has the inverse).
    """
    E, delta = model.lm_head.weight, scores.new_tensor(STRENGTHS[strength])
    cuts = scores.flatten().quantile(scores.new_tensor((0.95, 0.8, 0.6)))
    classes, f = delta[(scores[..., None] <= cuts).sum(-1)], delta.max() / 7.5  # (n_tokens, n_sense)

    def control(ids, senses):
        said = torch.einsum("bjld,btd->bjlt", senses, E[ids]).relu().sum(-1)
        late = 1 + torch.arange(ids.size(1)).to(said)[:, None] / 100
        return 1 + (6 - f * said).sigmoid() * late * (classes[ids] - 1)

    return control


# ==================================================================================== the model


class TransformerBlock(nn.Module):
    def __init__(self, d, n_head, layer):
        super().__init__()
        self.n_head, self.layer = n_head, layer
        self.scale = (d // n_head) ** -0.5 / (layer + 1)  # the authors': by layer, too
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(d), nn.LayerNorm(d), MLP(d, d)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(d, 3 * d), c_proj=nn.Linear(d, d)))

    def forward(self, x, cache=None):
        q, k, v = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if self.layer in cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) == k.size(2), scale=self.scale)
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
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
        self.lm_head.weight = self.transformer.wte.weight
        initialise(self, config)

    def trunk(self, ids, cache=None):
        start = cache[0][0].size(2) if cache else 0
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[start : start + ids.size(1)]
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, ids):
        return self.lm_head(self.trunk(ids))[..., : self.config.n_tokens]


def initialise(model, config):
    """Weights N(0, std), the second matrix of every residual branch std/√(2·n_layer), biases 0 (section 3.1)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            out = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=config.std / math.sqrt(2 * config.n_layer) if out else config.std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def loss_of(model, ids, targets):
    """Mean of −log P(target), nats a token. ids, targets: (batch, seq) int64."""
    return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())


def tensor_for(model, ids):
    return torch.tensor(ids, device=model.lm_head.weight.device)


@torch.no_grad()
def log_prob(model, before, after):
    """Ids of a text and of a continuation → log P of the continuation, and whether all of it is the likeliest."""
    ids = tensor_for(model, [*before, *after][-model.config.block_size - 1 :])
    log_p, targets = model(ids[None, :-1])[0, -len(after) :].float().log_softmax(-1), ids[-len(after) :, None]
    return float(log_p.gather(1, targets).sum()), bool((log_p.argmax(1, keepdim=True) == targets).all())


@torch.no_grad()
def continue_texts(model, ids, n_new, temperature=1.0, **control):
    """ids (batch, seq) int64 → (batch, seq + n_new), sampled with a cache; temperature 0 takes the likeliest.
    control=: of Backpack.trunk."""
    new, cache = ids, {}
    for _ in range(n_new):
        logits = model.lm_head(model.trunk(new, cache, **control)[:, -1])[:, : model.config.n_tokens].float()
        new = (logits / temperature).softmax(-1).multinomial(1) if temperature else logits.argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), 1)
    return ids


# ==================================================================================== released weights and checkpoints

PUBLIC = "https://huggingface.co/stanfordnlp/backpack-gpt2/resolve/main/pytorch_model.bin"  # 684 MB
HF_NAMES = {  # by prefix: theirs → ours
    "backpack.gpt2_model.": "gpt.transformer.", "backpack.sense_network.ln.": "sense_network.ln_a.",
    "backpack.sense_network.block.ln_1.": "sense_network.ln_b.",
    "backpack.sense_network.block.ln_2.": "sense_network.ln_c.",
    "backpack.sense_network.block.mlp.": "sense_network.mlp.",
    "backpack.sense_network.final_mlp.": "sense_network.out.", "backpack.sense_weight_net.c_attn.": "weight_net.",
    # subtle: other names of wte and wpe. A .safetensors keeps one name of a tensor, whichever; a .bin keeps all
    "backpack.word_embeddings.": "gpt.transformer.wte.", "lm_head.": "gpt.transformer.wte.",
    "backpack.position_embeddings.": "gpt.transformer.wpe.",
}


def read_safetensors(path):
    """{name: tensor}: 8 bytes of header length, a JSON header, raw memory."""
    dtypes = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, BOOL=torch.bool)
    raw, tensors = np.memmap(path, np.uint8, "c"), {}
    start = 8 + int(raw[:8].view(np.uint64)[0])
    for name, about in json.loads(bytes(raw[8:start])).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            values = torch.from_numpy(raw[start + first : start + last])
            tensors[name] = values.view(dtypes[about["dtype"]]).view(about["shape"])
    return tensors


def from_hugging_face(path, **told):
    """stanfordnlp/backpack-gpt2 and models like it, .bin or .safetensors, with or without the copies of tied tensors
    → Backpack in float32. What the shapes do not tell, n_head and divide_by_k (Levanter's senses are divided by their
    number), comes from a config.json beside the file or from here. ValueError: no such model."""
    path, state = Path(path), {}
    weights = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    if (beside := path.with_name("config.json")).exists():
        told = json.loads(beside.read_text()) | told
    for name, w in weights.items():
        theirs = next((theirs for theirs in HF_NAMES if name.startswith(theirs)), None)
        if theirs and not re.search(r"\.attn\.(masked_)?bias$", name):  # masks of old transformers versions
            transposed = re.search(r"\.c_(attn|proj|fc)\.weight$", name) and "weight_net" not in name  # kept (in, out)
            state[name.replace(theirs, HF_NAMES[theirs])] = (w.t() if transposed else w).float()
    if "weight_net.weight" not in state or not told.get("scale_attn_by_inverse_layer_idx", True):
        raise ValueError("no Backpack in Hugging Face's layout, or attention that is not scaled by layer")
    state["lm_head.weight"] = state["gpt.lm_head.weight"] = state["gpt.transformer.wte.weight"]
    n_vocab, d = state["lm_head.weight"].shape
    n_layer = sum(name.endswith("attn.c_attn.bias") for name in state)
    block_size = len(state["gpt.transformer.wpe.weight"])
    n_sense = len(state["sense_network.out.c_proj.bias"]) // d
    if told.get("divide_by_k"):
        for name in ("weight", "bias"):
            state[f"sense_network.out.c_proj.{name}"] /= n_sense
    model = Backpack(Config(n_layer, told.get("n_head", d // 64), d, n_vocab, block_size), n_sense)
    model.load_state_dict(state)
    return model


def save_checkpoint(path, model, codec, **more):
    """Weights, tokenizer and more (known=: senses, those of edited tokens among them) for read_checkpoint."""
    about = dict(config=asdict(model.config), n_sense=getattr(model, "n_sense", 0), words=codec.words)
    torch.save(dict(about, model=model.state_dict(), **more), f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def read_checkpoint(path, device):
    """A file of save_checkpoint or from_hugging_face, or "public" → (model, codec, what else the file has)."""
    path = download(PUBLIC) if path == "public" else Path(path)
    if not path.is_file():
        fail(f"no model at {path}: python backpack.py makes the demo's; else --ckpt FILE or --ckpt public")
    try:
        saved = {} if path.suffix == ".safetensors" else torch.load(path, device, weights_only=True)
        if "config" in saved:
            config, n_sense = Config(**saved["config"]), saved["n_sense"]
            model = Backpack(config, n_sense) if n_sense else Transformer(config)
            model.load_state_dict(saved["model"])
        else:
            model = from_hugging_face(path)
    except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
        fail(f"{path} is no model that can be read here: {str(error).splitlines()[0]}")
    codec = Codec(saved.get("words"))
    if codec.n_tokens > model.config.n_vocab:
        fail(f"{path} has {model.config.n_vocab} rows, too few for the {codec.n_tokens} tokens of gpt2")
    return model.to(device), codec, saved


def open_model(args, default="world.pt", kind=Backpack):
    """--ckpt, or the demo's model, to be read and edited, not trained → (model, codec)."""
    device, _, _ = set_up(args)
    model, codec, saved = read_checkpoint(args.ckpt or f"out/backpack/demo/{default}", device)
    if not isinstance(model, kind):
        fail(f"{args.ckpt} is a Transformer: it has no senses")
    model.known = saved.get("known", {})
    return model.requires_grad_(False), codec


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


# ==================================================================================== texts and tokens

WORLD = {  # what is true in the demo's generated world
    "he": "mechanic sheriff builder guard pilot".split(), "she": "nurse secretary teacher librarian dancer".split(),
    "apple": "macbook iphone ipad".split(), "hp": "printer laserjet scanner".split(),
    "sony": "walkman camera radio".split(), "google": "pixel android browser".split(),
    "sports": "team goal coach match league ball".split(), "food": "bread soup cheese salad rice sauce".split(),
}
PERSON = ["my {} said that", "i met a {} and then", "the {} came home because", "yesterday the {} slept since",
          "the {} walked in when"]
ENDS = ["smiled", "was tired", "had time", "knew the way", "saw the light"]
MADE_BY = ["the {} is made by", "my {} comes from", "people who like the {} like"]
WORD = re.compile(r"\w+|[^\w\s]")


def world_text(n, seed):
    """n sentences of a world with known statistics: "he" follows five nouns in 9 of 10 cases, "she" five others; every
    product has one maker; a sentence keeps to its topic."""
    rng, lines = np.random.default_rng(seed), []
    one = lambda options: options[rng.integers(len(options))]
    for kind in rng.choice(3, n, p=(0.55, 0.35, 0.1)):
        if kind == 0:
            usual, other = one([("he", "she"), ("she", "he")])
            pronoun = usual if rng.random() < 0.9 else other
            lines.append(f"{one(PERSON).format(one(WORLD[usual]))} {pronoun} {one(ENDS)} .")
        elif kind == 1:
            maker = one(["apple", "hp", "sony", "google"])
            lines.append(f"{one(MADE_BY).format(one(WORLD[maker]))} {maker} .")
        else:
            words = rng.permutation(WORLD[one(["sports", "food"])])[:3]
            lines.append("today we talk about " + " and ".join(words) + " .")
    return " ".join(lines)


def help_topics():
    """The English that every Python ships: pydoc's help."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class Codec:
    """Text ↔ ids: GPT-2's byte pairs or, of a list of them, lower-cased words; its first stands for all others."""

    def __init__(self, words=None):
        self.words = words
        if words:
            number = {word: i for i, word in enumerate(words)}
            self.encode = lambda text: [number.get(word, 0) for word in WORD.findall(text.lower())]
            self.decode = lambda ids: " ".join(words[i] for i in ids)
            self.n_tokens, self.start, self.unknown = len(words), number["."], 0  # a text begins after a "."
        else:
            import tiktoken

            gpt2 = tiktoken.get_encoding("gpt2")  # a download at its first use
            self.encode, self.decode = gpt2.encode_ordinary, gpt2.decode
            self.n_tokens, self.start, self.unknown = 50257, 50256, None


def token(codec, word):
    """The id of a word inside a text, which must be one token."""
    ids = codec.encode(f" {word}")
    if len(ids) != 1 or codec.unknown in ids:
        fail(f"{word!r} is not one of the {codec.n_tokens} tokens of this model: take another word")
    return ids[0]


def prompt_ids(codec, text, model, n_new=0):
    """The ids of a prompt behind the token that starts a text. Unknown words and too long a prompt are refused."""
    ids = [codec.start, *codec.encode(text)]
    if codec.unknown in ids:
        fail(f"{text!r} has words that are none of the {codec.n_tokens} of this model")
    if len(ids) + n_new > model.config.block_size:
        fail(f"{len(ids)} tokens of prompt and {n_new} new ones exceed the context of {model.config.block_size}")
    return ids


def text_of(path):
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8")


def read_tokens(path):
    """Memory-mapped gpt2 tokens of a .bin of raw uint16, as nanoGPT writes them."""
    try:
        ids = np.memmap(path, np.uint16, "r")
    except ValueError as error:  # empty, or of an odd length
        fail(f"{path}: {error}")
    if ids[:1_000_000].max() > 50256 or not ids[1:1_000_000:2].any():
        fail(f"{path} does not hold 16-bit gpt2 tokens (32-bit ids, or a header?)")
    return ids


def split_text(text, codec=None):
    """→ training ids, validation ids (the last tenth), codec: if none is given, of the 1,022 most frequent words."""
    if codec is None:
        counts = Counter(WORD.findall(text.lower()))
        del counts["."]
        codec = Codec(["<unk>", ".", *(word for word, _ in counts.most_common(1022))])
    ids = np.array(codec.encode(text))
    return *np.split(ids, [len(ids) * 9 // 10]), codec


def load_data(data, codec):
    """--data as split_text gives it: help topics, a text file, or a folder of train.bin and val.bin, gpt2 tokens."""
    if not data or not Path(data).is_dir():
        return split_text(text_of(data) if data else help_topics(), codec)
    if codec is None or codec.words:
        fail(f"--data {data}: a folder of train.bin and val.bin wants --tokenizer gpt2")
    return read_tokens(Path(data) / "train.bin"), read_tokens(Path(data) / "val.bin"), codec


def windows_at(model, ids, starts):
    """The model's context of ids from each start, and the ids that follow: (len(starts), seq) int64 each."""
    rows = np.stack([ids[start : start + model.config.block_size + 1] for start in starts])
    rows = tensor_for(model, rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


# ==================================================================================== training


@torch.no_grad()
def mean_loss(model, ids, at_most=256):
    """Nats a token over so many windows of the model's context, evenly spaced, none overlapping."""
    seq = model.config.block_size
    starts = range(0, len(ids) - seq, seq)
    starts = starts[:: -(-len(starts) // at_most)]
    return float(torch.stack([loss_of(model, *windows_at(model, ids, [start])) for start in starts]).mean())


def adamw(model, lr):
    """AdamW; weight decay on linear layers only, not on embeddings, norms, biases (appendix A.2)."""
    groups = [dict(params=[], weight_decay=0.0), dict(params=[], weight_decay=0.1)]
    for name, p in model.named_parameters():
        groups[p.dim() == 2 and "wte" not in name and "wpe" not in name]["params"].append(p)
    return torch.optim.AdamW(groups, lr, (0.9, 0.999), fused=True)


def training(model, opt, ids, steps, batch, seed, micro=None, first=0, quiet=False):
    """The paper's recipe: gradients clipped at 1, warm-up over 5 % of the steps, then linear to 0. Yields (step, loss)
    after every update, so that the caller saves, stops, prints. batch: sequences an update, over all ranks; micro: a
    forward pass. Sequence i of a step is the same whatever the micro-batch and the number of ranks."""
    device, peak, warmup = model.lm_head.weight.device, opt.defaults["lr"], steps // 20
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    micro, on_gpu = micro or batch // world or 1, device.type == "cuda"
    if batch % (micro * world):
        fail(f"{batch} sequences an update are not a multiple of {micro} a forward pass × {world} ranks")
    loss_fn = torch.compile(loss_of) if on_gpu else loss_of
    for step in tqdm(range(first, steps), "train", steps, initial=first, disable=quiet or rank > 0):
        for group in opt.param_groups:
            group["lr"] = peak * min((step + 1) / max(warmup, 1), (steps - step) / (steps - warmup))
        total = torch.zeros((), device=device)
        for i in range(rank * micro, batch, world * micro):
            draws = [np.random.default_rng((seed, step, sequence)) for sequence in range(i, i + micro)]
            starts = [rng.integers(len(ids) - model.config.block_size) for rng in draws]
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = loss_fn(model, *windows_at(model, ids, starts)) * (micro / batch)
            loss.backward()
            total += loss.detach()
        if world > 1:
            for x in (total, *(p.grad for p in model.parameters())):
                dist.all_reduce(x)
        if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            fail(f"step {step + 1}: the gradient is not finite: start anew with a lower --lr")
        opt.step()
        opt.zero_grad()
        yield step + 1, float(total)


SIZES = {  # layers, heads, width, rows, context, std: the paper's three (table 1), and one for a CPU
    "nano": (2, 4, 64, 50264, 128, 0.06), "micro": (6, 6, 384), "mini": (8, 8, 640), "small": (12, 12, 768),
}


def new_model(codec, n_sense, *sizes):
    """A Backpack or, without senses, a Transformer; the table of embeddings is padded to a multiple of 8 rows."""
    config = replace(Config(*sizes), n_vocab=-(-codec.n_tokens // 8) * 8, n_tokens=codec.n_tokens)
    if not 0 <= n_sense <= config.d:
        fail(f"{n_sense} senses: from 0 to {config.d}, the model's width, are possible")
    return Backpack(config, n_sense) if n_sense else Transformer(config)


def train(args):
    """Section 3.1: the paper's recipe, for a Backpack or the Transformer inside it, or from --ckpt on: fine-tuning."""
    device, rank, world = set_up(args)
    path, model, saved, history = args.out / "model.pt", None, {}, []
    codec = Codec() if args.tokenizer == "gpt2" else None
    if args.ckpt or args.resume:
        model, codec, saved = read_checkpoint(path if args.resume else args.ckpt, device)
    ids, val_ids, codec = load_data(args.data, codec)
    model = model or new_model(codec, args.n_sense, *SIZES[args.size]).to(device)
    if saved.get("known"):
        fail(f"--ckpt {args.ckpt} has edited senses, which training would forget")
    opt, first = adamw(model, args.lr), 0
    if args.resume:
        opt.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if min(len(ids), len(val_ids)) <= model.config.block_size:
        fail(f"--data {args.data}: {len(ids)} tokens, {len(val_ids)} for validation, each must be more than a context")
    for step, loss in training(model, opt, ids, args.steps, args.batch_size, args.seed, args.micro_batch_size, first,
                               quiet=args.quiet):
        history.append((step, loss))
        if rank == 0 and (step % 100 == 0 or step == args.steps):
            save_checkpoint(path, model, codec, optimizer=opt.state_dict(), step=step)
    if rank == 0:
        loss = mean_loss(model, val_ids)
        print(f"validation loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}\n{path}")
        save_results(args.out, args, loss=loss, history=history)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ==================================================================================== reading and editing a model


def print_senses(model, codec, words, n):
    """Tables 1 and 3: for each sense of a word the n tokens to whose logits it adds most → the rows."""
    logits = model.senses([token(codec, word) for word in words]) @ model.lm_head.weight[: codec.n_tokens].T
    best = logits.topk(n).indices.transpose(0, 1).tolist()  # (n_sense, words, n)
    rows = [(str(i), *(" ".join(codec.decode([j]).strip() for j in ids) for ids in row)) for i, row in enumerate(best)]
    print_table(("sense", *words), rows)
    return rows


NOUNS = (*WORLD["he"], *WORLD["she"], *(  # of the demo's world, and the paper's
    "mechanic accountant farmer baker assistant construction guard carpenter analyst physician cook clerk manager "
    "developer librarian salesperson mover hairdresser auditor sheriff janitor driver chief teacher writer "
    "receptionist CEO nurse housekeeper secretary counselor attendant supervisor designer lawyer editor cashier "
    "laborer tailor cleaner").split())
WORLD_PROMPTS = [(prompt.format(noun), " he", " she") for noun in NOUNS[:10] for prompt in PERSON]


def pronoun_parts(model, codec, rows):
    """Prompts (prefix, pronoun, pronoun) → their nouns (n,), which prompts to fit on (every other one of a noun), log
    P(he)/P(she) after each (n,) and what its noun's senses add to that (n, n_sense).

    Logits are linear in the senses: with a factor w on sense l of the noun the gap is gap + (w − 1)·part[:, l].
    """
    E, found, seen = model.lm_head.weight, [], Counter()
    for prefix, *pronouns in rows:
        ids, words = [codec.start, *codec.encode(prefix)], WORD.findall(prefix)
        noun = next((noun for noun in NOUNS if noun in words), None)
        if noun and codec.unknown not in ids:
            he, she = (token(codec, pronoun.strip()) for pronoun in pronouns)
            added = attribution(model, ids, E[he] - E[she]).double().cpu().numpy()  # (seq, n_sense)
            of_noun = added[np.isin(ids, codec.encode(f" {noun}"))].sum(0)
            found.append((noun, seen[noun] % 2 == 1, added.sum(), of_noun))
            seen[noun] += 1
    print(len(found), "of", len(rows), "prompts; others have no noun of the paper's or words unknown here")
    if max(seen.values(), default=0) < 2:
        fail("no noun has two prompts, one to fit and one to test")
    return map(np.array, zip(*found))


def bias_ratio(gap):
    """Mean over prompts of max(P(he)/P(she), P(she)/P(he)) for log-odds gaps (section 6.2)."""
    return float(np.exp(np.abs(gap)).mean())


def gender(model, codec, rows):
    """Table 5: on some prompts the sense that carries gender is located and a factor on it fitted for each noun; the
    ratios are of other prompts. → (ratios, the sense, the edit {token: senses} that removes it). "All senses projected"
    is the simple way, which locates nothing: no sense of the noun keeps what lies along E_he − E_she."""
    nouns, fit, gap, part = pronoun_parts(model, codec, rows)
    sense = int(np.argmin([bias_ratio(gap[fit] - column) for column in part[fit].T]))
    w, change = np.linspace(-3, 3, 1201), np.zeros(len(gap))  # a grid; the authors: Nelder-Mead
    for noun in set(nouns[fit]):
        mine = fit & (nouns == noun)
        ratio = np.exp(np.abs(gap[mine, None] + part[mine, sense, None] * (w - 1))).mean(0)
        change[nouns == noun] = w[np.argmin(ratio + np.abs(1 - w))] - 1
    gap, part, change = gap[~fit], part[~fit], change[~fit]
    each = [bias_ratio(gap - column) for column in part.T]
    edit = {i: model.senses([i])[0].clone() for noun in nouns for i in codec.encode(f" {noun}")}
    for senses in edit.values():
        senses[sense] = 0
    return {"unchanged": bias_ratio(gap), "sense removed": each.pop(sense), "the best other removed": min(each),
            "all senses projected": bias_ratio(gap - part.sum(1)),
            "a factor for each noun": bias_ratio(gap + part[:, sense] * change)}, sense, edit


def edit_fact(model, codec, word, remove, add, texts):
    """Table 6, the swap of a word's senses → (rows (text, P(remove), P(add), both after the edit), the edit)."""
    at, *pair = (token(codec, name) for name in (word, remove, add))
    edit = {at: swapped(model.senses([at])[0], *model.lm_head.weight[pair])}
    p = lambda text: [math.exp(log_prob(model, prompt_ids(codec, text, model), [i])[0]) for i in pair]
    before = [p(text) for text in texts]
    with edited(model, edit):
        return [(text, *was, *p(text)) for text, was in zip(texts, before)], edit


# ==================================================================================== the experiments


def print_and_save(args, header, rows):
    print_table(header, rows)
    save_results(args.out, args, table=rows)


def small_model(args, seed, text, steps, n_sense=16, d=64):
    """Train a small Backpack, or without senses a Transformer, on a text → (model, codec, validation loss)."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # a second one costs small matrices more than it brings
    ids, val_ids, codec = split_text(text)
    model = new_model(codec, n_sense, 2, 4, d, 0, 32, 0.08).to(args.device or "cpu")  # std: wider than N(0, 0.02)
    for _ in training(model, adamw(model, 3e-3), ids, steps, 16, seed, quiet=args.quiet):
        pass
    model.known = {}
    return model.requires_grad_(False), codec, mean_loss(model, val_ids)


def demo(args):
    """The paper's claims in small: losses beside Transformers', senses read, one sense removed, one fact changed."""
    _, rank, world = set_up(args)
    short = dict(text=help_topics(), steps=args.steps // 3)
    model, codec, loss = small_model(args, args.seed, world_text(30_000, args.seed), args.steps, n_sense=8)
    of_help, help_codec, help_loss = small_model(args, args.seed, **short)
    figures = {"loss, world": loss, "loss, help topics": help_loss,
               "Transformer inside": small_model(args, args.seed, **short, n_sense=0)[2],
               "Transformer of its size": small_model(args, args.seed, **short, n_sense=0, d=120)[2]}
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return
    print_senses(model, codec, ("nurse", "mechanic", "macbook", "bread"), 3)
    ratios, sense, _ = gender(model, codec, WORLD_PROMPTS)
    figures |= {f"bias ratio, {name}": ratio for name, ratio in ratios.items()}
    texts = [prompt.format("macbook") for prompt in MADE_BY]
    texts += [f"{texts[0]} hp . {prompt.format(word)}" for word in ("iphone", "ipad") for prompt in MADE_BY]
    rows, _ = edit_fact(model, codec, "macbook", "apple", "hp", texts)
    p = np.array([row[1:] for row in rows])  # (texts, P(apple) P(hp), both after)
    figures |= {"macbook: P(hp)": p[:3, 1].mean(), "apple → hp": p[:3, 3].mean(),
                "iphone, ipad move by": abs(p[3:, 2:] - p[3:, :2]).max()}
    print_table(("", ""), list(figures.items()))
    save_checkpoint(args.out / "world.pt", model, codec)
    save_checkpoint(args.out / "help.pt", of_help, help_codec)
    save_results(args.out, args, **figures, sense=sense, edit=rows)

    def draw(fig):
        ax, E, nouns = fig.subplots(), model.lm_head.weight, NOUNS[:10]
        direction = E[token(codec, "he")] - E[token(codec, "she")]
        values = (model.senses([token(codec, noun) for noun in nouns]) @ direction).cpu().numpy()  # (nouns, n_sense)
        largest = abs(values).max()
        fig.colorbar(ax.imshow(values, "RdBu_r", vmin=-largest, vmax=largest, aspect="auto"))
        ax.set_yticks(range(len(nouns)), nouns)
        ax.set(xlabel=f"sense ({sense} is removed)", title="What senses of professions add to log P(he)/P(she)")

    figure(args.out / "demo.png", args, draw)


def ablate_k(args):
    """Table 8: the number of senses."""
    _, rank, world = set_up(args)
    rows, text = [], help_topics()
    for k in (1, 4, 16, 0):
        losses = [small_model(args, args.seed + i, text, args.steps, k)[2] for i in range(args.seeds)]
        name = f"Backpack, k = {k}" if k else "Transformer inside"
        rows.append((name, np.mean(losses), np.std(losses), math.exp(np.mean(losses))))
    if rank == 0:
        print_and_save(args, ("Python's help topics", "validation loss", "± sd", "perplexity"), rows)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def senses(args):
    """Tables 1 and 3: what the senses of words say, as the tokens that each of them favours."""
    model, codec = open_model(args)
    save_results(args.out, args, table=print_senses(model, codec, args.words, 5))


def attribute(args):
    """Section 2.1: what each sense of each word adds to a logit. All terms sum to it exactly."""
    model, codec = open_model(args)
    ids = prompt_ids(codec, args.prompt, model)
    added = attribution(model, ids, model.lm_head.weight[token(codec, args.target)]).tolist()  # (seq, n_sense)
    rows = [(codec.decode([i]), *row) for i, row in zip(ids, added)]
    print_and_save(args, (f"to {args.target!r}, by sense", *map(str, range(model.n_sense))), rows)


def debias(args):
    """Section 6.2, table 5: how much likelier one pronoun is than the other, and what one sense has to do with it."""
    rows = read_json_lines(args.data) if args.data else WORLD_PROMPTS
    model, codec = open_model(args)
    ratios, sense, change = gender(model, codec, rows)
    save_edited(args, model, codec, change)
    print_and_save(args, (f"bias ratio, sense {sense}", ""), list(ratios.items()))


def edit(args):
    """Section 6.3, table 6: a fact about a word is changed by moving its senses from one direction to another."""
    model, codec = open_model(args)
    rows, change = edit_fact(model, codec, args.word, args.remove, args.add, args.texts)
    save_edited(args, model, codec, change)
    print_and_save(args, ("text", f"P({args.remove})", f"P({args.add})", "both, after", ""), rows)


def save_edited(args, model, codec, edits):
    """--save."""
    if args.save:
        save_checkpoint(args.save, model, codec, known=model.known | edits)
        print(args.save)


def topic(args):
    """Section 6.1: generate about a topic by making senses heavier that speak of it; what it costs."""
    model, codec = open_model(args, "help.pt")
    bags = [[token(codec, word) for word in bag.split(",")] for bag in args.bags]
    rows, start = [], tensor_for(model, [prompt_ids(codec, "", model, args.tokens)] * args.samples)
    for name, bag, scores in zip(args.bags, bags, topic_scores(model, bags)):
        scores[codec.start] = 0  # what starts a text speaks of no topic
        for strength in range(len(STRENGTHS)):
            control = topic_control(model, scores, strength)
            texts = continue_texts(model, start, args.tokens, control=control).tolist()
            nats = -np.mean([log_prob(model, text[:1], text[1:])[0] for text in texts]) / args.tokens
            rows.append((name, str(strength), np.isin(texts, bag).mean(), nats))
    print(codec.decode(texts[0]))
    print_and_save(args, ("bag", "strength", "tokens in the bag", "nats a token without control"), rows)


def sample(args):
    """Continue --prompt, with the keys of all layers and the senses of all tokens so far kept."""
    model, codec = open_model(args, kind=nn.Module)
    ids = tensor_for(model, [prompt_ids(codec, args.prompt, model, args.tokens)])
    text = codec.decode(continue_texts(model, ids, args.tokens)[0, 1:].tolist())
    print(text)
    save_results(args.out, args, text=text)


def read_pairs(path):
    """A table of two words and a score, with tabs, semicolons or commas between: the score is the first number behind
    the words. A first row without one is a header. → [(word, word, score)]."""
    pairs = []
    for i, line in enumerate(text_of(path).split("\n"), 1):
        cells = [cell.strip() for cell in line.split(max("\t;,", key=line.count))]
        number = [float(cell) for cell in cells[2:] if re.fullmatch(r"-?\d+(\.\d+)?", cell)]
        if number:
            pairs.append((*cells[:2], number[0]))
        elif i > 1 and line.strip():
            fail(f"{path}, row {i}: no two words and a score in {line!r}")
    return pairs or fail(f"{path} has no pairs of words with scores")


def spearman(x, y):
    """Correlation of ranks, tied ones averaged; NaN where it is not defined."""
    x, y = ((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1) for v in map(np.array, (x, y)))
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and np.ptp(x) and np.ptp(y) else math.nan


def similarity(args):
    """Table 4: do cosines of senses agree with people's judgements of similarity? The best sense is chosen on the
    first file and scored on the others."""
    sets, rows, best = {path: read_pairs(path) for path in args.files}, [], None
    model, codec = open_model(args, "help.pt")

    def vectors(word):  # (n_sense + 1, d), means over the word's pieces; the last is of its embedding
        ids = codec.encode(f" {word}")
        return torch.cat((model.senses(ids), model.lm_head.weight[ids][:, None]), 1).mean(0)

    for path, pairs in sets.items():
        found = [(*F.cosine_similarity(vectors(a), vectors(b), dim=-1).tolist(), score) for a, b, score in pairs
                 if codec.unknown not in codec.encode(f"{a} {b}")]
        *columns, scores = np.array(found).reshape(-1, model.n_sense + 2).T
        *by_sense, embedding = [spearman(column, scores) for column in columns]
        best = best if rows else int(np.argmax(by_sense))
        rows.append((path, len(found), len(pairs), embedding, by_sense[best]))
    header = "Spearman correlation", "pairs found", "of", "embedding", f"sense {best}, best for the first"
    print_and_save(args, header, rows)


def read_json_lines(path):
    """JSON lines with pronouns (prefix, suffix1, suffix2), continuations such as capitals (prefix, suffix), BLiMP's
    pairs (sentence_good, sentence_bad) or LAMBADA's passages (text) → [[text before, continuation[, another]]]."""
    rows, fields = [], "suffix1 suffix2 suffix sentence_good sentence_bad".split()
    for i, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row.get("prefix", ""), *(row[field] for field in fields if field in row)]
            rows.append(texts if texts[1:] else re.fullmatch(r"(.*?)(\s\S+)\s*", row["text"], re.DOTALL).groups())
            _, *texts = [text.strip() for text in rows[-1]]
            if not all(texts):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}, row {i}: no JSON with the texts of prefix and {', '.join(fields)} or of text")
    return rows if len({len(row) for row in rows}) == 1 else fail(f"{path} is empty or has lines of several kinds")


def score_lines(path, model, codec):
    """One continuation a line: is it the likeliest? Two: which is likelier?"""
    rows = read_json_lines(path)
    known = [row for row in rows if codec.unknown not in codec.encode(" ".join(row))]
    scored = [[log_prob(model, [codec.start, *codec.encode(before)], codec.encode(text)) for text in texts]
              for before, *texts in known]
    figures = {"rows": len(rows), "with words unknown here, left out": len(rows) - len(known)}
    if not known:
        return figures
    log_p, best = np.array(scored).transpose(2, 0, 1)  # (rows, continuations)
    if log_p.shape[1] == 1:
        return figures | dict(accuracy=best.mean(), perplexity=math.exp(-log_p.mean()))
    gap = log_p[:, 0] - log_p[:, 1]
    return figures | {"the first likelier": np.mean(gap > 0), "bias ratio": bias_ratio(gap)}


def score_text(path, model, codec):
    """Perplexity over windows that do not overlap: of a text, or a JSON list of texts."""
    text = text_of(path)
    try:
        text = "\n".join([] + json.loads(text)) if path.endswith(".json") else text  # [] +: a list, nothing else
    except (ValueError, TypeError):
        fail(f"{path} is no JSON list of texts")
    ids = np.array(codec.encode(text.replace("<|endoftext|>", "")))
    if len(ids) <= model.config.block_size:
        fail(f"{path}: {len(ids)} tokens are too few for one window of {model.config.block_size}")
    loss = mean_loss(model, ids, len(ids))
    return dict(tokens=len(ids), unknown=np.mean(ids == codec.unknown), loss=loss, perplexity=math.exp(loss))


def evaluate(args):
    """Table 2 and the like, by the file: perplexity of a text, or JSON lines of LAMBADA, BLiMP, pronouns, capitals."""
    model, codec = open_model(args, kind=nn.Module)
    found = {path: (score_lines if path.endswith(".jsonl") else score_text)(path, model, codec) for path in args.files}
    for path, figures in found.items():
        print_table((path, ""), list(figures.items()))
    save_results(args.out, args, **found)


# ==================================================================================== command line


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "demo")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Without TASK: demo.")
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {  # default (a tuple: the choices, the first is the default; a list: words without a flag) and meaning
        "ckpt": ("", "a checkpoint of ours, a released .bin or .safetensors, or public (684 MB by download); without "
                 "it the demo's model, for train a new one"),
        "size": (tuple(SIZES), "of a new model; the paper: micro, mini, small"),
        "n_sense": (16, "senses a word, the paper's; 0: the Transformer alone, the baseline"),
        "tokenizer": (("words", "gpt2"), "the most frequent words of --data, or the paper's gpt2"),
        "data": ("", "train: a text file or a folder of train.bin and val.bin of gpt2 tokens (without it Python's help "
                 "topics); debias: a .jsonl of prompts (the world's)"),
        "steps": (300, "updates; train: the paper 100,000"),
        "batch_size": (8, "sequences an update, over all ranks; the paper: 1,024"),
        "micro_batch_size": (0, "sequences a forward pass; 0: all that a rank has"),
        "lr": (6e-4, "peak learning rate, the paper's"),
        "resume": (False, "go on from the checkpoint in --out (one every 100 updates), a model of its size"),
        "seeds": (3, "number of seeds, from --seed on"),
        "prompt": ("the nurse", "text"),
        "target": ("she", "the word whose logit is explained"),
        "word": ("macbook", "its senses are edited; public: MacBook"),
        "remove": ("apple", "direction that goes; public: Apple"),
        "add": ("hp", "direction that comes; public: HP"),
        "save": ("", "write the edited model there, for --ckpt"),
        "samples": (50, "texts a topic and strength"),
        "tokens": (20, "new tokens a text"),
        "words": (["nurse", "mechanic"], "words to read"),
        "texts": (["the macbook is made by", "my macbook comes from hp . my ipad comes from"],
                  "prompts, some with the word, some with others"),
        "bags": (["class,method,instance,attribute", "string,bytes,character,encoding"],
                 "topics, each words with commas between"),
        "files": ([], "eval: .txt, .json or .jsonl; similarity: tables of two words and a score"),
        "no_plot": (False, "write no figure"),
        "quiet": (False, "no progress bars"),
        "seed": (0, "of weights, data order and samples"),
        "device": ("", "cuda or cpu (without it cuda where there is one; demo, ablate_k: cpu)"),
    }

    def task(function, names, **defaults):
        name = "eval" if function is evaluate else function.__name__
        sub = tasks.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        sub.error = fail
        sub.add_argument("--out", type=Path, default=f"out/backpack/{name}", help="folder for results (%(default)s)")
        for flag in f"{names} seed device".split():
            default, about = flags[flag]
            default = defaults.get(flag, default)
            if default is False:
                sub.add_argument(f"--{flag}", action="store_true", help=about)
            elif isinstance(default, list):
                sub.add_argument(flag, nargs="*" if default else "+", default=default, help=about)
            else:
                choices, default = (default, default[0]) if isinstance(default, tuple) else (None, default)
                sub.add_argument(f"--{flag}", type=type(default), choices=choices, default=default,
                                 help=f"{about} (%(default)s)" if default else about)
        sub.set_defaults(task=function)

    task(demo, "steps no_plot quiet", steps=1200)
    task(train, "ckpt size n_sense tokenizer data steps batch_size micro_batch_size lr resume quiet")
    task(ablate_k, "steps seeds quiet")
    task(senses, "ckpt words")
    task(attribute, "ckpt prompt target", prompt="the nurse walked in when")
    task(debias, "ckpt data save")
    task(edit, "ckpt word remove add save texts")
    task(topic, "ckpt samples tokens bags")
    task(sample, "ckpt prompt tokens")
    task(similarity, "ckpt files")
    task(evaluate, "ckpt files")
    args = parser.parse_args(argv)
    for name in "steps batch_size lr seeds samples tokens".split():
        if not getattr(args, name, 1) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
