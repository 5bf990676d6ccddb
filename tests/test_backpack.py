"""backpack.py: the definition in loops, exact identities of reading and editing, released files, the tool."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import backpack as bp
from backpack import Backpack, Config

HOUSE = Path(__file__).parent.parent
DATA = os.environ.get("NANOPAPERS_TEST_DATA")


def small(n_sense=3, block=16):
    """A Backpack in float64 whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    model = Backpack(Config(2, 2, 12, 11, block), n_sense).double()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0, std=0.3)
    return model


def some_ids(batch=2, seq=9):
    return torch.from_numpy(np.random.default_rng(1).integers(11, size=(batch, seq)))


# ==================================================================================== the mathematics


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x, layers):
    return layers.c_proj(gelu(layers.c_fc(x)))


def heads(x, layer, n, e):
    """x through a linear layer → what stands there for queries, keys, … each of n heads of width e, head by head."""
    return [part.split(e, -1) for part in layer(x).split(n * e, -1)]


def weighted(q, k, values, scale):
    """One causal head in loops over positions."""
    out = []
    for i in range(len(q)):
        p = torch.stack([(q[i] * k[j]).sum() * scale for j in range(i + 1)]).exp()
        out.append(sum(p[j] / p.sum() * values[j] for j in range(i + 1)))
    return torch.stack(out)


def naive(model, ids):
    """Sections 2 and 3 and appendix A for one sequence, in loops over positions, heads and senses → logits."""
    E, d, net, gpt = model.lm_head.weight, model.config.d, model.sense_network, model.gpt.transformer
    x, width, e = E[ids] + gpt.wpe.weight[: len(ids)], d // model.config.n_head, d // model.n_sense
    for layer, block in enumerate(gpt.h):
        q, k, v = heads(block.ln_1(x), block.attn.c_attn, model.config.n_head, width)
        mixed = [weighted(*parts, 1 / (math.sqrt(width) * (layer + 1))) for parts in zip(q, k, v)]
        x = x + block.attn.c_proj(torch.cat(mixed, -1))
        x = x + mlp(block.ln_2(x), block.mlp)
    r = E[ids] + net.ln_a(E[ids])
    r = r + mlp(net.ln_b(r), net.mlp)
    senses = mlp(net.ln_c(r), net.out).split(d, -1)  # sense l is [l·d : (l + 1)·d]
    q, k = heads(gpt.ln_f(x), model.weight_net, model.n_sense, e)
    return sum(weighted(*parts, 1 / math.sqrt(e)) for parts in zip(q, k, senses)) @ E.T


@pytest.mark.parametrize("n_sense", [1, 5])
def test_equals_the_definition_in_loops(n_sense):
    model, ids = small(n_sense), some_ids(2, 5)
    weight, params, results = torch.randn(2, 5, 11, dtype=torch.float64), list(model.parameters()), []
    for logits in (model(ids), torch.stack([naive(model, row) for row in ids])):
        results.append([logits.detach(), *torch.autograd.grad((logits * weight).sum(), params)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_future_is_not_seen_and_tokens_share_their_senses():
    model, ids = small(), some_ids()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    torch.testing.assert_close(model(ids)[:, :6], model(changed)[:, :6], rtol=1e-12, atol=1e-12)
    (query, key, table, index, scale), _ = model.parts(ids)
    assert len(table) == len(ids.unique())  # once a distinct token
    dense = model.sense_network(model.lm_head.weight[ids]).flatten(0, 1)  # at every position
    rows = torch.arange(ids.numel()).view(ids.shape)
    torch.testing.assert_close(bp.sense_mix(query, key, dense, rows, scale), model.trunk(ids))


def test_the_class_alone_is_the_papers():
    """Biases, N(0, 0.02), residual branches narrower; 170M parameters at the paper's small size (table 1)."""
    torch.manual_seed(0)
    model = Backpack(Config(2, 2, 64, 500, 32), 16)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    std = [float(layer.weight.detach().std()) for layer in (model.lm_head, model.sense_network.out.c_proj)]
    assert std == pytest.approx([0.02, 0.02 / 2], rel=0.02)
    with torch.device("meta"):
        assert sum(p.numel() for p in Backpack(Config(), 16).parameters()) == 170_083_584


@torch.no_grad()
def test_scaling_a_sense_moves_logits_by_a_known_amount():
    """Exactly linear in every context; texts without the word do not move a bit; the edit ends with its block."""
    model, ids = small(), some_ids(4, 9) % 4
    ids[1:, 2] = 4
    (query, key, _, _, scale), _ = model.parts(ids)
    model.known, alpha = {}, bp.sense_weights(query, key, scale)  # training is over
    senses, before = model.senses(torch.tensor([4]))[0], model(ids)
    new = senses.clone()
    new[1] *= -0.7
    at = (alpha[:, :, 1] * (ids == 4)[:, None]).sum(-1, keepdim=True)  # (batch, seq, 1)
    with bp.edited(model, {4: new}):
        after = model(ids)
    torch.testing.assert_close(after, before - 1.7 * at * (model.lm_head.weight @ senses[1]))
    assert torch.equal(after[0], before[0]) and torch.equal(model(ids), before)


def test_attribution_sums_to_the_logits():
    model, ids = small(5), some_ids(1, 12)[0].tolist()
    added = bp.attribution(model, ids, model.lm_head.weight.detach().T)  # (12, 5, 11)
    torch.testing.assert_close(added.sum((0, 1)), model(torch.tensor([ids]))[0, -1])


def test_swapped_directions():
    """For orthogonal words nothing is left along the one, and what was along it is along the other."""
    removed, added = torch.linalg.qr(torch.randn(12, 2, dtype=torch.float64)).Q.T * torch.tensor([[2.0], [3.0]])
    senses = torch.randn(4, 12, dtype=torch.float64)
    new = bp.swapped(senses, removed, added)
    torch.testing.assert_close(new @ removed, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(new @ added, senses @ added + senses @ removed)


@torch.no_grad()
def test_topic_control():
    """In loops; two bags in one pass as each alone; strength 0 changes no bit."""
    model, ids = small(), some_ids(2, 7)
    found = bp.topic_scores(model, [[5], [2, 3]])
    assert torch.equal(model.trunk(ids, control=bp.topic_control(model, found[1], 0)), model.trunk(ids))
    logits = (model.senses(torch.arange(11)) @ model.lm_head.weight.T).numpy()  # (token, sense, word)
    for got, bag in zip(found, ([5], [2, 3])):
        scores = logits[..., bag].sum(-1) / logits.max(-1)
        np.testing.assert_allclose(got, scores)
    delta = np.select([scores > np.quantile(scores, q) for q in (0.95, 0.8, 0.6)], (3.3, 3.3, 3.0), 1.0)
    got = bp.topic_control(model, found[1], 3)(ids, model.senses(torch.arange(11))[ids])
    for b, j, sense in np.ndindex(2, 7, 3):
        said = np.maximum(logits[ids[b, j], sense, ids[b]], 0).sum()
        anneal = 1 / (1 + math.exp(-(6 - 3.3 / 7.5 * said))) * (1 + j / 100)
        assert float(got[b, j, sense]) == pytest.approx(1 + anneal * (delta[ids[b, j], sense] - 1), rel=1e-6)


@torch.no_grad()
def test_cached_generation_equals_full_recompute():
    """Greedy, two texts at once, after an edit, with a control and of the Transformer, token by token."""
    model, prompts = small(5, block=32), some_ids(2, 4)
    control = bp.topic_control(model, bp.topic_scores(model, [[2]])[0], 3)
    with bp.edited(model, {2: torch.randn(5, 12, dtype=torch.float64)}):
        for which, more in ((model, {}), (model, dict(control=control)), (model.gpt, {})):
            texts = bp.continue_texts(which, prompts, 15, temperature=0, **more)
            assert torch.equal(texts[:, :4], prompts)
            logits = torch.stack([which.lm_head(which.trunk(texts[:, :n], **more))[:, -1] for n in range(4, 19)], 1)
            assert torch.equal(logits.argmax(-1), texts[:, 4:])


# ==================================================================================== released files


def hf_weights(model):
    """A Backpack's tensors under Hugging Face's names, linear layers of GPT-2 and the sense network (in, out)."""
    theirs, weights = {ours: name for name, ours in reversed(bp.HF_NAMES.items())}, {}
    for name, p in model.named_parameters():
        ours = next(prefix for prefix in theirs if name.startswith(prefix) and not prefix.endswith(("wte.", "wpe.")))
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name.replace(ours, theirs[ours], 1)] = (p.t() if conv else p).detach().clone()
    wte, wpe = weights["backpack.gpt2_model.wte.weight"], weights["backpack.gpt2_model.wpe.weight"]
    masks = {"backpack.gpt2_model.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    copies = {"backpack.word_embeddings.weight": wte, "backpack.position_embeddings.weight": wpe, "lm_head.weight": wte}
    return weights | masks | copies


def write_safetensors(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        kind = "BOOL" if t.dtype == torch.bool else "F32"
        header[name] = dict(dtype=kind, shape=list(t.shape), data_offsets=[at, at := at + t.nbytes])
    head = json.dumps(header).encode()
    data = b"".join(t.contiguous().numpy().tobytes() for t in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("dropped", [
    "", "lm_head", "gpt2_model.wte lm_head", "word_embeddings gpt2_model.wpe", "position_embeddings word_embeddings"])
def test_released_layouts_with_and_without_tied_copies(tmp_path, suffix, dropped):
    """A file without its lm_head is no other layout: the logits are divided by k by argument or config alone."""
    model, ids, path = small(4).float(), some_ids(), tmp_path / f"model{suffix}"
    weights = {name: w for name, w in hf_weights(model).items() if not any(x in name for x in dropped.split())}
    write_safetensors(path, weights) if suffix == ".safetensors" else torch.save(weights, path)
    torch.testing.assert_close(bp.from_hugging_face(path, n_head=2)(ids), model(ids))
    torch.testing.assert_close(bp.from_hugging_face(path, n_head=2, divide_by_k=True)(ids), model(ids) / 4)
    (tmp_path / "config.json").write_text(json.dumps(dict(n_head=2, divide_by_k=True)))
    torch.testing.assert_close(bp.from_hugging_face(path)(ids), model(ids) / 4)


# ==================================================================================== the claims and the tool


def here(*args):
    """The command in this process → its results."""
    args = bp.parse_args([str(arg) for arg in args])
    bp.run(args)
    return json.loads((args.out / "results.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of 400 steps, as the demo makes it, saved."""
    torch.set_num_threads(1)
    model, codec, loss = bp.small_model(bp.parse_args(["--quiet"]), 1, bp.world_text(30_000, 1), 360, 8)
    path = tmp_path_factory.mktemp("world") / "world.pt"
    bp.save_checkpoint(path, model, codec)
    return path, model, codec, loss


def test_one_sense_carries_gender_and_an_edit_moves_a_fact(world):
    _, model, codec, _ = world
    ratios, _, _ = bp.gender(model, codec, bp.WORLD_PROMPTS)
    assert 2 * ratios["sense removed"] < ratios["unchanged"] < 2 * ratios["the best other removed"]
    assert ratios["a factor for each noun"] < 2 < 4 < ratios["unchanged"]
    texts = [prompt.format("macbook") for prompt in bp.MADE_BY] + ["the macbook is made by hp . my iphone comes from"]
    rows, _ = bp.edit_fact(model, codec, "macbook", "apple", "hp", texts)
    p = np.array([row[1:] for row in rows])
    assert p[:3, 3].mean() > 0.5 > 0.1 > p[:3, 1].mean() and abs(p[3, 2:] - p[3, :2]).max() < 0.01 < 0.8 < p[3, 2]


def test_tasks_on_the_demos_model(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, model, codec, _ = world
    text = "the nurse walked in when"
    rows = here("attribute", "--prompt", text, "--ckpt", path)["table"]
    logit = model(torch.tensor([bp.prompt_ids(codec, text, model)]))[0, -1, bp.token(codec, "she")]
    assert sum(sum(row[1:]) for row in rows) == pytest.approx(float(logit), rel=1e-4)
    removed = here("debias", "--save", "d.pt", "--ckpt", path)["table"][1][1]
    assert here("debias", "--ckpt", "d.pt")["table"][0][1] == pytest.approx(removed, rel=1e-4)
    text, *_, after = here("edit", "--save", "e.pt", "--ckpt", "d.pt")["table"][0]  # on top of the other edit
    assert here("edit", "--ckpt", "e.pt")["table"][0][2] == pytest.approx(after, abs=1e-5) and after > 0.5
    assert here("debias", "--ckpt", "e.pt")["table"][0][1] == pytest.approx(removed, rel=1e-4)
    assert here("sample", "--ckpt", "e.pt", "--prompt", text)["text"].startswith(text)
    assert len(here("topic", "--samples", 3, "--tokens", 6, "--ckpt", path, "team,goal")["table"]) == 4
    seen, control = [], bp.topic_control
    monkeypatch.setattr(bp, "topic_control", lambda model, scores, s: seen.append(scores) or control(model, scores, s))
    here("topic", "--samples", 1, "--tokens", 2, "--ckpt", path, "team,goal")
    assert not seen[0][codec.start].any() and seen[0].any()  # what starts a text speaks of no topic


def test_evaluation_files(world, tmp_path, monkeypatch, capsys):
    """By their fields, with what was left out; two words and a score, in whatever columns."""
    monkeypatch.chdir(tmp_path)
    ckpt, texts = ("--ckpt", world[0]), [prompt.format(noun) for noun in ("nurse", "pilot") for prompt in bp.PERSON]
    files = {
        "bias": [dict(prefix=text, suffix1=" he", suffix2=" she") for text in (*texts, "A nurse never")],
        "capital": [dict(prefix=f"the {a} is made by", suffix=f" {b}") for a, b in (
            ("macbook", "apple"), ("ipad", "hp"), ("ipad", "zebra"))],
        "lambada": [dict(text="the iphone is made by apple\n")],
        "blimp": [dict(sentence_good="the ipad is made by apple .", sentence_bad="the ipad is made by hp .")],
    }
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("\r\n".join(map(json.dumps, rows)) + "\n")
    here("debias", "--data", "bias.jsonl", *ckpt)
    assert "10 of 11 prompts" in capsys.readouterr().out
    found = here("eval", *(f"{name}.jsonl" for name in files), *ckpt)
    bias, capital, lambada, blimp = (found[f"{name}.jsonl"] for name in files)
    assert bias["bias ratio"] > 3 and bias["with words unknown here, left out"] == 1
    assert capital["accuracy"] == 0.5 and lambada["accuracy"] == blimp["the first likelier"] == 1
    Path("text.json").write_text(json.dumps(["<|endoftext|>" + bp.world_text(100, 9)]))
    assert here("eval", "text.json", *ckpt)["text.json"]["loss"] < 1
    Path("one.txt").write_text("a\tb\tPOS\tscore\nnurse\tpilot\tN\t9\nnurse\thp\tN\t1\nhp\tsony\tN\t8\nhp\tzoo\tN\t3\n")
    Path("two.csv").write_bytes("\ufeffpilot;guard;9\r\npilot;sony;2\r\nhp;apple;8 \r\n".encode())
    assert [row[1:3] for row in here("similarity", "one.txt", "two.csv", *ckpt)["table"]] == [[3, 4], [3, 3]]
    assert bp.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1 2.5 2.5 4


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_real_evaluation_files(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "SimLex-999_SimLex-999.txt RG65.csv WS353.csv SimVerb-3500.txt pronoun_gender_bias_eval-test.jsonl".split()
    *sets, prompts, capitals = [f"{DATA}/backpack/{name}" for name in (*names, "country_capital_fixed-val.jsonl")]
    assert [row[2] for row in here("similarity", *sets, "--ckpt", world[0])["table"]] == [999, 65, 353, 3500]
    here("train", "--data", prompts, "--steps", 2, "--quiet")  # a model that knows their words
    ckpt = "--ckpt", "out/backpack/train/model.pt"
    found = here("eval", prompts, capitals, *ckpt)
    assert found[prompts]["rows"] == 360 and found[capitals]["rows"] == 119
    here("debias", "--data", prompts, *ckpt)


def test_train_fine_tune_resume_and_ranks(tmp_path, monkeypatch):
    """A killed run goes on exactly; two ranks equal one at default flags; a saved model can be trained on."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text((HOUSE / "README.md").read_text("utf-8")[:30_000])
    command, done = [str(HOUSE / "backpack.py"), "train", "--data", "t.txt", "--quiet"], Path("out/backpack/train")
    small, env = ["--steps", "104", "--n_sense", "2", "--batch_size", "1"], {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, *command, *small], env=env)
    while killed.poll() is None and not (done / "model.pt").exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert here(*command[1:], *small, "--resume")["history"][0][0] == 101
    done.rename("resumed")
    here(*command[1:], *small)
    states = [torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (Path("resumed"), done)]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.run([*launch, *command, "--steps", "6", "--out", "two"], env=env, capture_output=True)
    assert two.returncode == 0, two.stderr
    losses = [loss for _, loss in json.loads(Path("two/results.json").read_text())["history"]]
    assert losses == pytest.approx([loss for _, loss in here(*command[1:], "--steps", 6)["history"]], rel=1e-5)
    tuned = here(*command[1:], "--ckpt", "resumed/model.pt", "--steps", 3, "--out", "tuned")
    assert tuned["history"][0][1] < losses[0] - 0.1


def test_a_step_as_on_a_gpu():
    model = Backpack(Config(1, 2, 16, 256, 32), 4)
    opt, ids = bp.adamw(model, 1e-2), bp.windows_at(model, np.arange(999) % 7, (0, 3))
    assert [len(group["params"]) for group in opt.param_groups] == [23, 9]  # the linear layers' weights decay
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(bp.loss_of(model, *ids))
        losses[-1].backward()
        opt.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.5


def test_ablate_and_demo_in_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = bp.help_topics()[:60_000]
    monkeypatch.setattr(bp, "help_topics", lambda: text)
    assert len(here("ablate_k", "--steps", 2, "--seeds", 1, "--quiet")["table"]) == 4
    assert here("demo", "--steps", 4, "--quiet")["bias ratio, sense removed"] > 1
    assert Path("out/backpack/demo/demo.png").stat().st_size > 10_000
    table = here("senses", "nurse", "hp")["table"]  # the demo's model is the default
    assert [[len(cell.split()) for cell in row] for row in table] == [[1, 5, 5]] * 8
    here("train", "--ckpt", "out/backpack/demo/help.pt", "--steps", 1, "--quiet")  # it can be trained on


MISTAKES = {
    "debias --data nowhere.jsonl": "nowhere.jsonl", "train --ckpt nowhere.pt": "nowhere.pt",
    "train --ckpt edited.pt": "edited senses", "train --data .": "gpt2", "train --data empty.txt": "0 tokens",
    "train --n_sense 99": "99 senses", "train --batch_size 6 --micro_batch_size 4": "multiple",
    "train --resume": "no model", "sample --sense 99": "--sense", "sample --tokens 99": "context of 32",
    "senses zebra": "zebra", "senses --ckpt latin.txt": "no model", "senses --ckpt hf/model.bin": "hf/model.bin",
    "senses --out latin.txt/x": "latin.txt", "edit --add zebra": "zebra", "eval .": "directory",
    "eval latin.txt": "UTF-8", "eval five.jsonl": "row 1", "eval blank.jsonl": "row 1", "eval two.jsonl": "several",
    "eval empty.jsonl": "empty", "eval dict.json": "no JSON list", "eval empty.txt": "too few",
    "similarity five.jsonl": "no pairs",
    "similarity comma.csv": "row 2", "nonsense": "senses",
}


FILES = {
    "five.jsonl": '{"text": 5}', "blank.jsonl": '{"prefix": "a", "suffix": " "}', "empty.jsonl": "", "empty.txt": "",
    "two.jsonl": '{"text": "a b"}\n{"sentence_good": "a", "sentence_bad": "b"}', "hf/config.json": "{broken",
    "comma.csv": "one;two;score\npilot;guard;7,5\n",
}


@pytest.mark.parametrize("line, words", MISTAKES.items())
def test_mistakes_end_in_one_line(line, words, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("out/backpack/demo", "hf"):
        Path(folder).mkdir(parents=True)
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("dict.json").write_text('{"the nurse walked": "in when"}')
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("out/backpack/demo/world.pt").symlink_to(world[0])
    torch.save(hf_weights(small()), "hf/model.bin")
    bp.save_checkpoint("edited.pt", world[1], world[2], known={3: torch.zeros(8, 64)})
    monkeypatch.setattr(sys, "argv", ["backpack.py", *line.split()])
    with pytest.raises(SystemExit) as stop:
        bp.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
