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


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices; a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def norm(x, ln):
    x = x - x.mean(-1, keepdim=True)
    return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * ln.weight + ln.bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def mlp(x, layers):
    return linear(gelu(linear(x, layers.c_fc)), layers.c_proj)


def heads(x, layer, n, e):
    """x through a linear layer → what stands there for queries, keys, … each of n heads of width e, head by head."""
    return [part.split(e, -1) for part in linear(x, layer).split(n * e, -1)]


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
    x, width, e = E[ids] + gpt["wpe"].weight[: len(ids)], d // model.config.n_head, d // model.n_sense
    for layer, block in enumerate(gpt["h"]):
        q, k, v = heads(norm(x, block.ln_1), block.attn["c_attn"], model.config.n_head, width)
        mixed = [weighted(*parts, 1 / (math.sqrt(width) * (layer + 1))) for parts in zip(q, k, v)]
        x = x + linear(torch.cat(mixed, -1), block.attn["c_proj"])
        x = x + mlp(norm(x, block.ln_2), block.mlp)
    r = E[ids] + norm(E[ids], net.ln_a)
    r = r + mlp(norm(r, net.ln_b), net.mlp)
    senses = mlp(norm(r, net.ln_c), net.out).split(d, -1)  # sense l is [l·d : (l + 1)·d]
    q, k = heads(norm(x, gpt["ln_f"]), model.weight_net, model.n_sense, e)
    return sum(weighted(*parts, 1 / math.sqrt(e)) for parts in zip(q, k, senses)) @ E.T / model.divisor


@pytest.mark.parametrize("n_sense, divisor", [(1, 1), (5, 1), (4, 4)])
def test_equals_the_definition_in_loops(n_sense, divisor):
    model, ids = small(n_sense), some_ids(2, 5)
    model.divisor = divisor
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
    assert not torch.isclose(model(ids)[:, 6:], model(changed)[:, 6:]).all(-1).any()
    (query, key, table, index, scale), _ = model.parts(ids)
    assert len(table) == len(ids.unique())  # once a distinct token
    dense = model.sense_network(model.lm_head.weight[ids]).flatten(0, 1)  # at every position
    rows = torch.arange(ids.numel()).view(ids.shape)
    torch.testing.assert_close(bp.sense_mix(query, key, dense, rows, scale), model.trunk(ids))


def test_the_class_alone_is_the_papers():
    """Biases, N(0, 0.02), residual branches narrower; 170M parameters at the paper's small size (table 1)."""
    torch.manual_seed(0)
    model = Backpack(Config(2, 2, 64, 500, 32), 16)
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm))]
    assert all(m.bias is not None and not m.bias.any() for m in linear if m is not model.lm_head)
    assert float(model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.sense_network.out.c_proj.weight.std()) == pytest.approx(0.02 / 2, rel=0.02)
    with torch.device("meta"):
        assert sum(p.numel() for p in Backpack(Config(), 16).parameters()) == 170_083_584
    with pytest.raises(ValueError, match="65 senses"):
        Backpack(Config(2, 2, 64, 500, 32), 65)


@torch.no_grad()
def test_scaling_a_sense_moves_logits_by_a_known_amount():
    """Exactly linear in every context; texts without the word do not move a bit; the edit ends with its block."""
    model, ids = small(), some_ids(4, 9)
    model.known = {}  # training is over
    ids[0, ids[0] == 4] = 5
    ids[1:, 2] = 4
    (query, key, _, _, scale), _ = model.parts(ids)
    alpha, senses, before = bp.sense_weights(query, key, scale), model.senses(torch.tensor([4]))[0], model(ids)
    torch.testing.assert_close(alpha.sum(-1), torch.ones_like(alpha[..., 0]))
    new = senses.clone()
    new[1] *= -0.7
    at = torch.einsum("bij,bj->bi", alpha[:, :, 1], (ids == 4).double())
    with bp.edited(model, {4: new}):
        after = model(ids)
    torch.testing.assert_close(after, before - 1.7 * at[..., None] * (model.lm_head.weight @ senses[1]))
    assert torch.equal(after[0], before[0]) and torch.equal(model(ids), before)


def test_attribution_sums_to_the_logits():
    model, ids = small(5), some_ids(1, 12)[0].tolist()
    E = model.lm_head.weight.detach()
    added = bp.attribution(model, ids, E.T)
    assert added.shape == (12, 5, 11)
    torch.testing.assert_close(added.sum((0, 1)), model(torch.tensor([ids]))[0, -1])
    torch.testing.assert_close(bp.attribution(model, ids, E[3]), added[..., 3])


def test_swapped_directions():
    E, senses = torch.randn(3, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    added = E[1] - (E[1] @ E[0]) / (E[0] @ E[0]) * E[0]  # orthogonal
    new = bp.swapped(senses, E[0], added)
    torch.testing.assert_close(new @ E[0], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(new @ added, senses @ added + senses @ E[0])
    by_hand = [c + (c @ E[0]) / (E[0] @ E[0]) * (E[1] / (E[1] @ E[1]) * (E[0] @ E[0]) - E[0]) for c in senses]
    torch.testing.assert_close(bp.swapped(senses, E[0], E[1]), torch.stack(by_hand))


@torch.no_grad()
def test_topic_control():
    """In loops; two bags in one pass as each alone; strength 0 changes no bit."""
    model, ids = small(), some_ids(2, 7)
    E, found = model.lm_head.weight, bp.topic_scores(model, {"a": [2, 3], "b": [5]}, silent=[0])
    assert torch.equal(model.trunk(ids, control=bp.topic_control(model, found["a"], 0)), model.trunk(ids))
    logits = (model.senses(torch.arange(11)) @ E.T).numpy()  # (token, sense, word)
    for name, bag in (("a", [2, 3]), ("b", [5])):
        scores = logits[..., bag].sum(-1) / logits.max(-1)
        scores[0] = 0
        np.testing.assert_allclose(found[name], scores)
    scores = found["a"].numpy()
    delta = np.select([scores > np.quantile(scores, q) for q in (0.95, 0.8, 0.6)], (3.3, 3.3, 3.0), 1.0)
    got, f = bp.topic_control(model, found["a"], 3)(ids, model.senses(torch.arange(11))[ids]), 3.3 / 7.5
    for b, j, sense in np.ndindex(2, 7, 3):
        said = sum(max(logits[ids[b, j], sense, ids[b, t]], 0) for t in range(7))
        anneal = 1 / (1 + math.exp(-(6 - f * said))) * (1 + j / 100)
        assert float(got[b, j, sense]) == pytest.approx(1 + anneal * (delta[ids[b, j], sense] - 1), rel=1e-6)


@torch.no_grad()
def test_cached_generation_equals_full_recompute():
    """Greedy, two texts at once, after an edit, with a control and of the Transformer, token by token."""
    model, prompts = small(5, block=32), some_ids(2, 4)
    control = bp.topic_control(model, bp.topic_scores(model, {"a": [2]})["a"], 3)
    with bp.edited(model, {2: torch.randn(5, 12, dtype=torch.float64)}):
        for which, more in ((model, {}), (model, dict(control=control)), (model.gpt, {})):
            texts = bp.generate(which, prompts, 15, temperature=0, **more)
            assert texts.shape == (2, 19) and torch.equal(texts[:, :4], prompts)
            logits = torch.stack([which.lm_head(which.trunk(texts[:, :n], **more))[:, -1] for n in range(4, 19)], 1)
            assert torch.equal(logits.argmax(-1), texts[:, 4:])
    torch.manual_seed(3)  # drawn by the model's probabilities: of its first new token
    drawn = bp.generate(model, prompts[:1].expand(4000, -1), 1)[:, -1].bincount(minlength=11) / 4000
    torch.testing.assert_close(drawn, model(prompts[:1])[0, -1].softmax(-1).float(), rtol=0, atol=0.03)


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
    kinds, header, at = {torch.float32: "F32", torch.bool: "BOOL"}, {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = dict(dtype=kinds[t.dtype], shape=list(t.shape), data_offsets=[at, at := at + t.nbytes])
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
    model, codec, loss = bp.small_model(bp.parse_args(["--quiet"]), 1, bp.world_text(30_000, 1), 400, 8)
    path = tmp_path_factory.mktemp("world") / "world.pt"
    bp.save_checkpoint(path, model, codec)
    return path, model, codec, loss


def test_one_sense_carries_gender_and_an_edit_moves_a_fact(world):
    _, model, codec, loss = world
    assert loss < 0.85
    fit, test = bp.pronoun_prompts(codec, bp.WORLD_PROMPTS)
    ratios, sense, edit = bp.gender(model, fit, test)
    assert ratios["unchanged"] > 4 and ratios["sense removed"] < 2 < ratios["the best other removed"]
    assert ratios["a factor for each noun"] < 2
    with bp.edited(model, edit):  # what is said of a removed sense is what the model does
        logits = [model(torch.tensor([ids]))[0, -1] for _, _, ids, *_ in test]
    he, she = test[0][3:]
    assert bp.bias_ratio([float(z[he] - z[she]) for z in logits]) == pytest.approx(ratios["sense removed"], rel=1e-4)
    texts = [prompt.format("macbook") for prompt in bp.MADE_BY] + ["the macbook is made by hp . my iphone comes from"]
    rows, _ = bp.edit_fact(model, codec, "macbook", "apple", "hp", texts)
    p = np.array([row[1:] for row in rows])
    assert p[:3, 3].mean() > 0.5 > 0.1 > p[:3, 1].mean() and abs(p[3, 2:] - p[3, :2]).max() < 0.01 < 0.8 < p[3, 2]


def test_tasks_on_the_demos_model(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = ("--ckpt", world[0])
    assert len(here("senses", "nurse", "pilot", *ckpt)["table"]) == 8
    prompt = "the nurse walked in when"
    added = np.array(here("attribute", "--prompt", prompt, *ckpt)["table"])[:, 1:].astype(float)
    ids = bp.prompt_ids(world[2], prompt, world[1])
    logit = world[1](torch.tensor([ids]))[0, -1, bp.token(world[2], "she")]
    assert added.shape == (6, 8) and added.sum() == pytest.approx(float(logit), rel=1e-4)
    removed = here("debias", "--save", "d.pt", *ckpt)["table"][1][1]
    assert here("debias", "--ckpt", "d.pt")["table"][0][1] == pytest.approx(removed, rel=1e-4)
    text, *_, after = here("edit", "--save", "e.pt", "--ckpt", "d.pt")["table"][0]  # on top of the other edit
    assert here("edit", "--ckpt", "e.pt")["table"][0][2] == pytest.approx(after, abs=1e-5) and after > 0.5
    assert here("debias", "--ckpt", "e.pt")["table"][0][1] == pytest.approx(removed, rel=1e-4)
    assert here("sample", "--ckpt", "e.pt", "--prompt", text, "--tokens", 1)["text"].startswith(text)
    assert len(here("topic", "--samples", 3, "--tokens", 6, *ckpt)["table"]) == 8


def test_evaluation_files(world, tmp_path, monkeypatch, capsys):
    """By their fields; pronouns, two words and a score, a text, each with what was left out."""
    monkeypatch.chdir(tmp_path)
    ckpt = ("--ckpt", world[0])
    lines = lambda *rows: "\r\n".join(map(json.dumps, rows)) + "\n"
    texts = [prompt.format(noun) for noun in ("nurse", "pilot") for prompt in bp.PERSON]
    Path("bias.jsonl").write_text(lines(*(dict(prefix=text, suffix1=" he", suffix2=" she") for text in (
        *texts, "A nurse never"))))
    assert here("debias", "--data", "bias.jsonl", *ckpt)["table"][0][1] > 3
    assert "10 of 11 prompts" in capsys.readouterr().out
    Path("capital.jsonl").write_text(lines(dict(prefix="the macbook is made by", suffix=" apple"), dict(
        prefix="the ipad is made by", suffix=" hp"), dict(prefix="the macbook is made by", suffix=" zebra")))
    Path("lambada.jsonl").write_text(lines(dict(text="the iphone is made by apple\n")))
    Path("blimp.jsonl").write_text(lines(dict(sentence_good="the pilot slept .", sentence_bad="pilot . the slept")))
    names = "bias.jsonl capital.jsonl lambada.jsonl blimp.jsonl".split()
    bias, capital, lambada, blimp = map(here("eval", *names, *ckpt).get, names)
    assert bias["rows"] == 11 and bias["bias ratio"] > 3 and bias["with words unknown here, left out"] == 1
    assert capital["accuracy"] == 0.5 and lambada["accuracy"] == blimp["the first likelier"] == 1
    Path("text.json").write_text(json.dumps(["<|endoftext|>" + bp.world_text(100, 9), "zebra"]))
    assert here("eval", "text.json", *ckpt)["text.json"]["loss"] < 1.1
    Path("one.txt").write_text(
        "word1\tword2\tPOS\tscore\nnurse\tsecretary\tN\t9\nnurse\tapple\tN\t1\npilot\tguard\tN\t8\nzebra\tguard\tN\t3\n")
    Path("two.csv").write_bytes("\ufeffpilot;guard;9\r\npilot;sony;2\r\nhp;apple;8 \r\n".encode())
    assert [row[1:3] for row in here("similarity", "one.txt", "two.csv", *ckpt)["table"]] == [[3, 4], [3, 3]]
    assert bp.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1 2.5 2.5 4


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_real_evaluation_files(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(DATA) / "backpack"
    sets = [folder / name for name in ("SimLex-999_SimLex-999.txt", "RG65.csv", "WS353.csv", "SimVerb-3500.txt")]
    table = here("similarity", *sets, "--ckpt", world[0])["table"]
    assert [row[2] for row in table] == [999, 65, 353, 3500]
    prompts, capitals = folder / "pronoun_gender_bias_eval-test.jsonl", folder / "country_capital_fixed-val.jsonl"
    here("train", "--data", prompts, "--steps", 2, "--quiet")  # a model that knows their words
    found = here("eval", prompts, capitals, "--ckpt", "out/backpack/train/model.pt")
    assert found[str(prompts)]["rows"] == 360 and found[str(capitals)]["rows"] == 119
    assert here("debias", "--data", prompts, "--ckpt", "out/backpack/train/model.pt")["table"][0][1] > 1


def test_train_fine_tune_resume_and_ranks(tmp_path, monkeypatch):
    """A killed run goes on exactly; two ranks equal one at default flags; a saved model can be trained on."""
    monkeypatch.chdir(tmp_path)
    flags = ["train", "--steps", "104", "--quiet"]
    Path("t.txt").write_text((HOUSE / "README.md").read_text("utf-8")[:30_000])
    flags += ["--data", str(tmp_path / "t.txt"), "--n_sense", "2", "--batch_size", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, str(HOUSE / "backpack.py"), *flags], env=env)
    while killed.poll() is None and not Path("out/backpack/train/model.pt").exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    saved = torch.load("out/backpack/train/model.pt", weights_only=True)["step"]
    rest = here(*flags, "--resume")
    assert rest["history"][0][0] == saved + 1 == 101
    Path("out/backpack/train").rename("resumed")
    one = here(*flags)["history"]
    states = [torch.load(f"{name}/model.pt", weights_only=True)["model"] for name in ("resumed", "out/backpack/train")]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["train", "--steps", "6", "--quiet", "--data", "t.txt"]
    done = subprocess.run([*launch, str(HOUSE / "backpack.py"), *flags, "--out", "two"], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(Path("two/results.json").read_text())["history"]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in here(*flags)["history"]], rel=1e-5)
    tuned = here("train", "--ckpt", "resumed/model.pt", "--data", "t.txt", "--steps", "3", "--quiet", "--out", "tuned")
    assert tuned["history"][0][1] < one[0][1] - 0.1


def test_a_step_as_on_a_gpu():
    model = Backpack(Config(1, 2, 16, 256, 32), 4)
    opt, ids = bp.adamw(model, 1e-2), bp.get_windows(model, np.arange(999) % 7, range(2), 0)
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))
    assert not {id(model.lm_head.weight)} & {id(p) for p in opt.param_groups[1]["params"]}
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = bp.loss_of(model, *ids)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5


def test_ablate_and_demo_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = bp.help_topics()[:60_000]
    monkeypatch.setattr(bp, "help_topics", lambda: text)
    assert len(here("ablate_k", "--steps", 2, "--quiet")["table"]) == 4
    found = here("demo", "--steps", 4, "--quiet")
    assert found["Transformer of its size"] > 4 and Path("out/backpack/demo/demo.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "sense" in shown and "bias ratio" in shown and "apple → hp" in shown
    here("senses", "nurse")  # the demo's model is the default


MISTAKES = {
    "debias --data nowhere.jsonl": "nowhere.jsonl", "train --ckpt nowhere.pt": "nowhere.pt",
    "train --ckpt edited.pt": "edited senses", "train --data .": "gpt2", "train --data empty.txt": "0 tokens",
    "train --n_sense 99": "99 senses", "train --batch_size 6 --micro_batch_size 4": "multiple",
    "train --resume": "no model", "sample --sense 99": "--sense", "sample --tokens 99": "context of 64",
    "senses zebra": "zebra", "senses --ckpt latin.txt": "no model", "senses --ckpt hf/model.bin": "hf/model.bin",
    "senses --out latin.txt/x": "latin.txt", "edit --add apple": "nothing to edit", "eval .": "directory",
    "eval latin.txt": "UTF-8", "eval five.jsonl": "row 1", "eval blank.jsonl": "row 1", "eval two.jsonl": "several",
    "eval empty.jsonl": "empty", "eval empty.txt": "too few", "similarity five.jsonl": "no pairs",
    "similarity comma.csv": "row 2", "nonsense": "senses",
}


@pytest.mark.parametrize("line, words", MISTAKES.items())
def test_mistakes_end_in_one_line(line, words, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out/backpack/demo").mkdir(parents=True)
    Path("out/backpack/demo/world.pt").symlink_to(world[0])
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("five.jsonl").write_text('{"text": 5}')
    for name in ("empty.jsonl", "empty.txt"):
        Path(name).write_text("")
    Path("two.jsonl").write_text('{"text": "a b"}\n{"sentence_good": "a", "sentence_bad": "b"}')
    Path("blank.jsonl").write_text('{"prefix": "a", "suffix": " "}')
    Path("comma.csv").write_text("one;two;score\npilot;guard;7,5\n")
    Path("hf").mkdir()
    torch.save(hf_weights(small(4).float()), "hf/model.bin")
    Path("hf/config.json").write_text("{broken")
    with bp.edited(world[1], {3: torch.zeros(8, 64)}):
        bp.save_checkpoint("edited.pt", world[1], world[2])
    monkeypatch.setattr(sys, "argv", ["backpack.py", *line.split()])
    with pytest.raises(SystemExit) as stop:
        bp.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
