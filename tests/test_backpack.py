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


def small(n_sense=3, block=16, **more):
    """A Backpack in float64 whose every parameter is random, biases and norms too."""
    torch.manual_seed(0)
    model = Backpack(Config(2, 2, 12, 11, block), n_sense, **more).double().eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0, std=0.3)
    return model


def some_ids(batch=2, seq=9, n_vocab=11):
    return torch.from_numpy(np.random.default_rng(1).integers(n_vocab, size=(batch, seq)))


# ==================================================================================== the mathematics


def norm(x, ln):
    return (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * ln.weight + ln.bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def naive(model, idx):
    """Sections 2 and 3 and appendix A in loops over sequences, positions, senses and heads → logits."""
    E, P = model.gpt.transformer["wte"].weight, model.gpt.transformer["wpe"].weight
    d, net, n_head, n_sense, logits = model.config.d, model.sense_network, model.config.n_head, model.n_sense, []
    e = d // n_sense

    def soft(q, k, scale):  # causal softmax of one head in loops
        rows = []
        for i in range(len(q)):
            s = torch.stack([(q[i] * k[j]).sum() * scale for j in range(i + 1)])
            z = (s - s.max()).exp()
            rows.append(z / z.sum())
        return rows

    for ids in idx:
        x = E[ids] + P[: len(ids)]
        for layer, block in enumerate(model.gpt.transformer["h"]):
            q, k, v = linear(norm(x, block.ln_1), block.attn["c_attn"]).split(d, -1)
            width, heads = d // n_head, []
            for h in range(n_head):
                part = slice(h * width, (h + 1) * width)
                alpha = soft(q[:, part], k[:, part], 1 / (math.sqrt(width) * (layer + 1)))
                heads.append(torch.stack([sum(a[j] * v[j, part] for j in range(i + 1)) for i, a in enumerate(alpha)]))
            x = x + linear(torch.cat(heads, -1), block.attn["c_proj"])
            x = x + linear(gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
        x = linear(norm(x, model.gpt.transformer["ln_f"]), model.weight_net)
        r0 = E[ids]
        r1 = r0 + norm(r0, net.ln_a)
        r2 = r1 + linear(gelu(linear(norm(r1, net.ln_b), net.mlp.c_fc)), net.mlp.c_proj)
        flat = linear(gelu(linear(norm(r2, net.ln_c), net.out.c_fc)), net.out.c_proj)  # sense l is [l·d : (l + 1)·d]
        out = [0] * len(ids)
        for sense in range(n_sense):
            q, k = (x[:, n * n_sense * e + sense * e : n * n_sense * e + (sense + 1) * e] for n in (0, 1))
            alpha = soft(q, k, 1 / math.sqrt(e))
            for i in range(len(ids)):
                for j in range(i + 1):
                    out[i] = out[i] + alpha[i][j] * flat[j, sense * d : (sense + 1) * d]
        logits.append(torch.stack(out) @ E.T / model.divisor)
    return torch.stack(logits)


@pytest.mark.parametrize("n_sense, more", [(1, {}), (5, {}), (4, dict(width=1, divide_by_k=True))])
def test_equals_the_definition_in_loops(n_sense, more):
    model, ids = small(n_sense, **more), some_ids(2, 5)
    weight, params, results = torch.randn(2, 5, 11, dtype=torch.float64), list(model.parameters()), []
    for logits in (model(ids), naive(model, ids)):
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
    torch.testing.assert_close(
        bp.sense_mix(query, key, dense, torch.arange(ids.numel()).view(ids.shape), scale), model.trunk(ids)
    )
    alpha = bp.sense_weights(query, key, scale)
    torch.testing.assert_close(alpha.sum(-1), torch.ones_like(alpha[..., 0]))


def test_the_class_alone_is_the_papers():
    """Biases, N(0, 0.02), residual branches narrower; 170M parameters at the paper's small size (table 1)."""
    torch.manual_seed(0)
    model = Backpack(Config(2, 2, 64, 500, 32), 16)
    assert all(
        module.bias is not None
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)) and module is not model.lm_head
    )
    assert float(model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.sense_network.out.c_proj.weight.std()) == pytest.approx(0.02 / 2, rel=0.02)
    with torch.device("meta"):
        n = sum(p.numel() for p in Backpack(Config(), 16).parameters())
    assert n / 1e6 == pytest.approx(170, abs=1.5)
    with pytest.raises(ValueError, match="65 senses"):
        Backpack(Config(2, 2, 64, 500, 32), 65)


@torch.no_grad()
def test_scaling_a_sense_moves_logits_by_a_known_amount():
    """Exactly affine in every context; texts without the word do not move a bit; the edit ends with its block."""
    model, ids = small(), some_ids(4, 9)
    model.known = {}  # training is over
    ids[0, ids[0] == 4] = 5
    ids[1:, 2] = 4
    (query, key, _, _, scale), _ = model.parts(ids)
    alpha, senses, before = bp.sense_weights(query, key, scale), model.senses(torch.tensor([4]))[0], model(ids)
    new = senses.clone()
    new[1] *= -0.7
    at = torch.einsum("bij,bj->bi", alpha[:, :, 1], (ids == 4).double())
    with bp.edited(model, {4: new}):
        after = model(ids)
    torch.testing.assert_close(after, before - 1.7 * at[..., None] * (model.lm_head.weight @ senses[1]))
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])
    assert torch.equal(model(ids), before)


def test_attribution_sums_to_the_logits():
    model, ids = small(5), some_ids(1, 12)[0].tolist()
    E = model.lm_head.weight.detach()
    added = bp.attribution(model, ids, E.T)
    assert added.shape == (12, 5, 11)
    torch.testing.assert_close(added.sum((0, 1)), model(torch.tensor([ids]))[0, -1].detach())
    torch.testing.assert_close(bp.attribution(model, ids, E[3]), added[..., 3])


def test_swapped_directions():
    E, senses = torch.randn(3, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    removed = E[0]
    added = E[1] - (E[1] @ removed) / (removed @ removed) * removed  # orthogonal
    new = bp.swapped(senses, removed, added)
    torch.testing.assert_close(new @ removed, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(new @ added, senses @ added + senses @ removed)
    by_hand = [c + (c @ E[0]) / (E[0] @ E[0]) * (E[1] / (E[1] @ E[1]) * (E[0] @ E[0]) - E[0]) for c in senses]
    torch.testing.assert_close(bp.swapped(senses, E[0], E[1]), torch.stack(by_hand))


@torch.no_grad()
def test_topic_control():
    """In loops; two bags in one pass as each alone; strength 0 changes no bit."""
    model, ids = small(), some_ids(2, 7) % 9
    E = model.lm_head.weight
    found = bp.topic_scores(model, {"a": [2, 3], "b": [5]}, 9, silent=[0])
    none = bp.topic_control(model, found["a"], 0)
    assert torch.equal(model.trunk(ids, control=none), model.trunk(ids))
    scores = np.zeros((9, 3))
    for x in range(1, 9):  # 0 is silent
        for sense in range(3):
            logits = (E[:9] @ model.senses(torch.tensor([x]))[0, sense]).numpy()
            scores[x, sense] = logits[[2, 3]].sum() / logits.max()
    np.testing.assert_allclose(found["a"], scores)
    delta = np.select([scores > np.quantile(scores, q) for q in (0.95, 0.8, 0.6)], (3.3, 3.3, 3.0), 1.0)
    got, f = bp.topic_control(model, found["a"], 3)(ids, model.senses(torch.arange(9))[ids]), 3.3 / 7.5
    for b, j, sense in np.ndindex(2, 7, 3):
        over_words = (E @ model.senses(ids[b, j : j + 1])[0, sense]).numpy()
        said = sum(max(over_words[ids[b, t]], 0) for t in range(7))
        anneal = 1 / (1 + math.exp(-(6 - f * said))) * (1 + j / 100)
        assert float(got[b, j, sense]) == pytest.approx(1 + anneal * (delta[ids[b, j], sense] - 1), rel=1e-9)


@torch.no_grad()
def test_cached_generation_equals_full_recompute():
    """Greedy texts of unequal prompts, after an edit, with a control and of the Transformer, token by token."""
    model, prompts = small(5, block=32), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1]]
    control = bp.topic_control(model, bp.topic_scores(model, {"a": [2]}, 11)["a"], 3)
    with bp.edited(model, {2: torch.randn(5, 12, dtype=torch.float64)}):
        for how, trunk in (
            (dict(), model.trunk),
            (dict(control=control), lambda ids: model.trunk(ids, control=control)),
        ):
            for prompt, text in zip(prompts, bp.generate(model, prompts, 15, 11, temperature=0, **how)):
                assert text[: len(prompt)] == prompt and len(text) == len(prompt) + 15
                for n in range(len(prompt), len(text)):
                    assert int(model.lm_head(trunk(torch.tensor([text[:n]])))[0, -1].argmax()) == text[n]
    text = bp.generate(model.gpt, [[1, 2]], 9, 11, temperature=0)[0]
    assert all(int(model.gpt(torch.tensor([text[:n]]))[0, -1].argmax()) == text[n] for n in range(2, 11))
    assert bp.generate(model, prompts, 9, 11, seed=1) == bp.generate(model, prompts, 9, 11, seed=1)


@torch.no_grad()
def test_padded_batches_score_as_alone():
    model, rows = small(), [([1, 2], [3, 4]), ([5], [6]), ([7, 8, 9], [1, 2, 3, 4])]
    for (before, after), (log_p, best) in zip(rows, bp.log_probs(model, rows, 10)):
        logits = model(torch.tensor([[*before, *after][:-1]]))[0, len(before) - 1 :, :10]
        assert log_p == pytest.approx(float(logits.log_softmax(-1)[range(len(after)), after].sum()), rel=1e-5)
        assert best == (logits.argmax(-1).tolist() == after)


# ==================================================================================== released files


def hf_weights(model):
    """A Backpack's tensors under Hugging Face's names, linear layers of GPT-2 and the sense network (in, out)."""
    ours, weights = {v: k for k, v in bp.HF_NAMES.items()}, {}
    for name, p in model.named_parameters():
        prefix = next(prefix for prefix in ours if name.startswith(prefix))
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name.replace(prefix, ours[prefix], 1)] = p.detach().t().contiguous() if conv else p.detach().clone()
    wte, wpe = weights["backpack.gpt2_model.wte.weight"], weights["backpack.gpt2_model.wpe.weight"]
    masks = {"backpack.gpt2_model.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    copies = {"backpack.word_embeddings.weight": wte, "backpack.position_embeddings.weight": wpe, "lm_head.weight": wte}
    return weights | masks | copies


def write_safetensors(path, tensors):
    kinds, header, at = (
        {torch.float32: "F32", torch.bool: "BOOL", torch.float16: "F16"},
        {"__metadata__": {"format": "pt"}},
        0,
    )
    for name, t in tensors.items():
        header[name] = dict(dtype=kinds[t.dtype], shape=list(t.shape), data_offsets=[at, at := at + t.nbytes])
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(t.numpy().tobytes() for t in tensors.values()))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize(
    "dropped",
    [
        (),
        ("lm_head.weight",),
        ("backpack.gpt2_model.wte.weight", "lm_head.weight"),
        ("backpack.word_embeddings.weight", "backpack.gpt2_model.wpe.weight"),
    ],
)
def test_released_layouts_with_and_without_tied_copies(tmp_path, suffix, dropped):
    """A file without its lm_head is no other layout: the logits are divided by k by flag or config alone."""
    model, ids = small(4).float(), some_ids()
    weights = {name: w for name, w in hf_weights(model).items() if name not in dropped}
    path = tmp_path / f"model{suffix}"
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
    """A world of 500 steps, as the demo makes it, saved where the tasks look for it."""
    folder = tmp_path_factory.mktemp("world")
    args = bp.parse_args(["demo", "--quiet"])
    args.device = "cpu"
    torch.set_num_threads(1)
    model, codec, loss, _ = bp.small_model("backpack", "world", args, 1, 500, "world", n_sense=8)
    bp.save_checkpoint(folder / "world.pt", model, codec)
    return folder / "world.pt", model, codec, loss


def test_one_sense_carries_gender_and_an_edit_moves_a_fact(world):
    _, model, codec, loss = world
    assert loss < 0.95
    found = bp.gender(model, codec)
    rest = [ratio for i, ratio in enumerate(found["removing_each"]) if i != found["sense"]]
    assert (
        found["unchanged"] > 4
        and found["removed"] < found["unchanged"] / 2 < min(rest)
        and found["fitted"] < found["removed"] + 0.5
    )
    rows, edit = bp.edit_fact(model, codec, "macbook", "apple", "hp", bp.MADE_BY, ["iphone"])
    mine, others = ([row for row in rows if (row["word"] == "macbook") == which] for which in (True, False))
    assert np.mean([row["after"][1] for row in mine]) > 0.4 > 0.1 > np.mean([row["before"][1] for row in mine])
    assert max(abs(a - b) for row in others for a, b in zip(row["before"], row["after"])) < 0.02
    with bp.edited(model, found["edits"]):  # what gender says of a removed sense is what the model does
        test = bp.pronoun_prompts(model, codec)[1:]
        gap, _ = bp.pronoun_parts(model, *test)
    assert bp.bias_ratio(gap) == pytest.approx(found["removed"], rel=1e-4)


def test_tasks_on_the_demos_model(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ckpt = ("--ckpt", world[0])
    here("senses", "nurse", "bread", *ckpt)
    logit = here("attribute", *ckpt)
    assert np.sum(logit["contributions"]) == pytest.approx(logit["logit"], rel=1e-4)
    removed = here("debias", "--save", "d.pt", *ckpt)["removed"]
    assert here("debias", "--ckpt", "d.pt")["unchanged"] == pytest.approx(
        removed, rel=1e-4
    )  # an edited model can be saved
    after = here("edit", "--save", "e.pt", *ckpt)["table"][0]["after"]
    assert here("edit", "--ckpt", "e.pt")["table"][0]["before"] == pytest.approx(after, abs=1e-5)
    text = here("sample", "--ckpt", "e.pt", "--prompt", "the macbook is made by", "--tokens", 1, "--temperature", 0)[
        "text"
    ]
    assert text == "the macbook is made by " + ("hp" if after[1] > after[0] else "apple")
    assert len(here("topic", "--samples", 3, "--tokens", 6, *ckpt)["table"]) == 12
    capsys.readouterr()


def test_evaluation_files(world, tmp_path, monkeypatch, capsys):
    """By their fields; pronouns, two words and a score, a text, each with what was left out."""
    monkeypatch.chdir(tmp_path)
    ckpt = ("--ckpt", world[0])
    prompts = [
        dict(prefix=p.format(noun), suffix1=" he", suffix2=" she") for noun in ("nurse", "pilot") for p in bp.PERSON[:4]
    ]
    Path("bias.jsonl").write_text("\n".join(map(json.dumps, [*prompts, dict(prompts[0], prefix="A nurse never")])))
    found = here("debias", "--data", "bias.jsonl", *ckpt)
    assert found["unchanged"] > 3 and set(found["factors"]) == {"nurse", "pilot"}
    assert "1 of them left out" in capsys.readouterr().out
    assert here("eval", "bias.jsonl", *ckpt)["bias.jsonl"]["bias_ratio"] > 3
    Path("made.jsonl").write_text(json.dumps(dict(prefix="the macbook is made by", suffix=" apple")) + "\n")
    Path("last.jsonl").write_text(json.dumps(dict(text="the iphone is made by apple")) + "\n")
    Path("blimp.jsonl").write_text(
        json.dumps(dict(sentence_good="the pilot slept .", sentence_bad="pilot . the slept")) + "\n"
    )
    done = here("eval", "made.jsonl", "last.jsonl", "blimp.jsonl", *ckpt)
    assert (
        done["made.jsonl"]["accuracy"]
        == done["last.jsonl"]["accuracy"]
        == done["blimp.jsonl"]["sentence_good likelier"]
        == 1
    )
    Path("text.json").write_text(json.dumps(["<|endoftext|>" + bp.world_text(60, 9), "zebra"]))
    assert here("eval", "text.json", *ckpt)["text.json"]["loss"] < 1.2
    Path("one.txt").write_text(
        "word1\tword2\tPOS\tscore\nnurse\tsecretary\tN\t9\nnurse\tbread\tN\t1\nsoup\tbread\tN\t8\nzebra\tsoup\tN\t3\n"
    )
    Path("two.csv").write_text("pilot;guard;9\npilot;soup;2\nrice;salad;8 \n")
    table = here("similarity", "one.txt", "two.csv", *ckpt)["table"]
    assert (
        [row[1] for row in table] == ["3 of 4", "3 of 3"]
        and "chosen here" in table[0][4]
        and "chosen" not in table[1][4]
    )


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_real_evaluation_files(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(DATA) / "backpack"
    done = here(
        "eval",
        folder / "pronoun_gender_bias_eval-test.jsonl",
        folder / "country_capital_fixed-val.jsonl",
        "--ckpt",
        world[0],
    )
    assert [figures["rows"] for figures in list(done.values())] == [360, 119]
    sets = [folder / name for name in ("SimLex-999_SimLex-999.txt", "RG65.csv", "WS353.csv", "SimVerb-3500.txt")]
    assert [len(bp.read_pairs(path)) for path in sets] == [999, 65, 353, 3500]


def test_train_fine_tune_resume_and_ranks(tmp_path, monkeypatch, capsys):
    """A killed run goes on exactly; two ranks equal one at default flags; a saved model can be trained on."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text((HOUSE / "README.md").read_text("utf-8")[:30_000])
    flags = ["train", "--steps", "8", "--data", "t.txt", "--save_every", "2", "--quiet"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.Popen(
        [*launch, str(HOUSE / "backpack.py"), *flags, "--out", "two"], env=env, stderr=subprocess.PIPE
    )
    killed = subprocess.Popen([sys.executable, str(HOUSE / "backpack.py"), *flags, "--out", "killed"], env=env)
    while killed.poll() is None and not Path("killed/resume.pt").exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    one = here(*flags, "--out", "one")["history"]
    here(*flags, "--out", "killed", "--resume")
    assert two.wait() == 0, two.stderr.read()
    losses = dict(json.loads(Path("two/results.json").read_text())["history"])
    assert [losses[step] for step, _ in one] == pytest.approx([loss for _, loss in one], rel=1e-5)
    states = [torch.load(f"{name}/model.pt", weights_only=True)["model"] for name in ("one", "killed")]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    tuned = here("train", "--ckpt", "one/model.pt", "--data", "t.txt", "--steps", "3", "--quiet", "--out", "tuned")
    assert tuned["history"][0][1] < one[0][1] - 0.1
    model = Backpack(Config(1, 2, 16, 256, 128), 4)
    with torch.autocast("cpu", torch.bfloat16):  # the path that a GPU takes
        opt = bp.adamw(model, 1e-3)
        steps = list(
            bp.training(
                model, opt, [np.arange(999) % 7], 256, steps=2, batch=2, seq=32, lr=1e-3, seed=0, warmup=0, quiet=True
            )
        )
    assert steps[1][1] < 5.6


def test_ablate_and_demo_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(here("ablate_k", "--steps", 2, "--seeds", 1, "--quiet")["table"]) == 4
    found = here("demo", "--steps", 2, "--quiet")
    assert len(found["losses"]) == 5 and Path("out/backpack/demo/demo.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "sense" in shown and "bias ratio" in shown and "apple → hp" in shown
    here("senses", "nurse")  # the demo's model is the default


@pytest.mark.parametrize(
    "args, words",
    [
        (["debias", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "--ckpt", "nowhere.pt"], "nowhere.pt"),
        (["sample", "--sense", "99"], "--sense"),
        (["debias", "--sense", "99"], "senses 0 to 7"),
        (["senses", "zebra"], "zebra"),
        (["eval", "."], "no such file"),
        (["eval", "latin.txt"], "UTF-8"),
        (["eval", "five.jsonl"], "row 1"),
        (["eval", "empty.jsonl"], "row 1"),
        (["eval", "empty.txt"], "too few"),
        (["similarity", "five.jsonl"], "no pairs"),
        (["senses", "--ckpt", "latin.txt"], "no model"),
        (["senses", "--ckpt", "hf/model.bin"], "hf/model.bin"),
        (["senses", "--out", "latin.txt/x"], "latin.txt"),
        (["edit", "--prompt", "made by"], "{}"),
        (["edit", "--add", "apple"], "nothing to edit"),
        (["sample", "--tokens", "99"], "context of 32"),
        (["train", "--batch_size", "6", "--micro_batch_size", "4"], "not a multiple"),
        (["nonsense"], "senses"),
    ],
)
def test_mistakes_end_in_one_line(args, words, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out/backpack/demo").mkdir(parents=True)
    Path("out/backpack/demo/world.pt").symlink_to(world[0])
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("five.jsonl").write_text('{"text": 5}')
    for name in ("empty.jsonl", "empty.txt"):
        Path(name).write_text("")
    Path("hf").mkdir()
    torch.save(hf_weights(small(4).float()), "hf/model.bin")
    Path("hf/config.json").write_text("{broken")
    monkeypatch.setattr(sys, "argv", ["backpack.py", *args])
    with pytest.raises(SystemExit) as stop:
        bp.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
