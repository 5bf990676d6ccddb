"""backpack.py: the definition written out in loops, exact identities of reading and editing, released layouts, the tool as it is used."""

import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import backpack as bp
from backpack import Backpack, GPTConfig

HOUSE = Path(__file__).parent.parent
DATA = os.environ.get("NANOPAPERS_TEST_DATA")


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices; a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(n_sense=3, d=12, n_vocab=11, block=16, seed=0, dtype=torch.float64, **more):
    """A Backpack whose every parameter is random, biases and norms too. 5 senses do not divide a width of 12."""
    torch.manual_seed(seed)
    model = Backpack(GPTConfig(block, n_vocab, 2, 2, d, True, True), n_sense, **more).to(dtype).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0, std=0.3)
    return model


def some_ids(batch=2, seq=9, n_vocab=11, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).integers(n_vocab, size=(batch, seq)))


# ---------------------------------------------------------------------------------------------- the mathematics


def norm(x, ln):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * ln.weight + ln.bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def naive(model, idx):
    """Sections 2 and 3 and appendix A in loops over sequences, positions, senses and heads. → logits, weights [batch][sense][i][j]."""
    E, P, n_sense, e = model.gpt.transformer.wte.weight, model.gpt.transformer.wpe.weight, model.n_sense, model.width
    d, net, n_head, logits, weights = model.config.n_embd, model.sense_network, model.config.n_head, [], []

    def soft(q, k, scale):  # causal softmax of one head in loops
        rows = []
        for i in range(len(q)):
            s = torch.stack([(q[i] * k[j]).sum() * scale for j in range(i + 1)])
            z = (s - s.max()).exp()
            rows.append(z / z.sum())
        return rows

    for ids in idx:
        x = E[ids] + P[: len(ids)]
        for layer, block in enumerate(model.gpt.transformer.h):
            q, k, v = linear(norm(x, block.ln_1), block.attn.c_attn).split(d, -1)
            width, heads = d // n_head, []
            for h in range(n_head):
                part = slice(h * width, (h + 1) * width)
                alpha = soft(q[:, part], k[:, part], 1 / (math.sqrt(width) * (layer + 1)))
                heads.append(torch.stack([sum(a[j] * v[j, part] for j in range(i + 1)) for i, a in enumerate(alpha)]))
            x = x + linear(torch.cat(heads, -1), block.attn.c_proj)
            x = x + linear(gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
        x = linear(norm(x, model.gpt.transformer.ln_f), model.weight_net)
        r0 = E[ids]
        r1 = r0 + norm(r0, net.ln_a)
        r2 = r1 + linear(gelu(linear(norm(r1, net.ln_b), net.mlp.c_fc)), net.mlp.c_proj)
        flat = linear(gelu(linear(norm(r2, net.ln_c), net.out.c_fc)), net.out.c_proj)  # sense l is [l·d : (l + 1)·d]
        out, of_senses = [0] * len(ids), []
        for sense in range(n_sense):
            q, k = (x[:, n * n_sense * e + sense * e : n * n_sense * e + (sense + 1) * e] for n in (0, 1))
            alpha = soft(q, k, 1 / math.sqrt(e))
            of_senses.append(alpha)
            for i in range(len(ids)):
                for j in range(i + 1):
                    out[i] = out[i] + alpha[i][j] * flat[j, sense * d : (sense + 1) * d]
        logits.append(torch.stack(out) @ E.T / model.divisor)
        weights.append(of_senses)
    return torch.stack(logits), weights


@pytest.mark.parametrize("n_sense, more", [(1, {}), (5, {}), (4, dict(sense_width=1, divide_by_k=True))])
def test_equals_the_definition_in_loops(n_sense, more):
    model, idx = small(n_sense, **more), some_ids(2, 5)
    weight = torch.randn(2, 5, 11, dtype=torch.float64)
    params, results = list(model.parameters()), []
    for logits in (model(idx), naive(model, idx)[0]):
        results.append([logits.detach(), *torch.autograd.grad((logits * weight).sum(), params)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.float()(idx).double(), results[1][0], rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    query, key = (torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 0]])
    assert torch.autograd.gradcheck(lambda q, k, t: bp.sense_mix(q, k, t, index, 0.6), (query, key, table))
    whole = bp.sense_mix(query, key, table, index, 0.6)
    torch.testing.assert_close(bp.sense_mix(query[:, -2:], key, table, index, 0.6), whole[:, -2:])  # queries of the last positions
    torch.testing.assert_close(bp.mix_by_sense(query, key, table, index, 0.6), whole)


def test_weights_are_distributions_over_the_prefix():
    model, idx = small(5), some_ids()
    (query, key, _, _, scale), _ = model.parts(idx)
    alpha = bp.sense_weights(query, key, scale)
    assert (alpha >= 0).all() and (alpha.permute(0, 2, 1, 3).triu(1) == 0).all()
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2, 9, 5, dtype=torch.float64))
    for b, of_senses in enumerate(naive(model, idx)[1]):
        for sense, rows in enumerate(of_senses):
            for i, row in enumerate(rows):
                torch.testing.assert_close(alpha[b, i, sense, : i + 1], row)
    half = bp.sense_weights(query.bfloat16() * 300, key.bfloat16() * 300, scale)
    assert half.dtype == torch.float32 and half.isfinite().all()
    torch.testing.assert_close(half.sum(-1), torch.ones(2, 9, 5))


def test_the_future_is_not_seen():
    model, idx = small(), some_ids()
    other = idx.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    a, b = model(idx), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=1e-12, atol=1e-12)
    assert ((a - b)[:, 5:].abs().amax(-1) > 1e-3).all()


def test_first_position_is_a_bigram_table():
    """Weights there are 1 whatever the context network, so logits = E·Σ_l C(x)_l; a text of one token works."""
    model, idx = small(5), torch.arange(11)[:, None]
    table = model.senses(torch.arange(11)).sum(1) @ model.lm_head.weight.T
    torch.testing.assert_close(model(idx)[:, 0], table)
    torch.testing.assert_close(model(torch.cat((idx, idx), 1))[:, 0], table)


def test_one_sense_with_even_weights_is_a_running_mean():
    """CBOW: section 2.3."""
    model, idx = small(1), some_ids()
    with torch.no_grad():
        model.weight_net.weight.zero_()
        model.weight_net.bias.zero_()
    vectors = model.senses(torch.arange(11))[idx][:, :, 0]  # (batch, seq, d)
    mean = vectors.cumsum(1) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(model.trunk(idx), mean)


def test_a_self_attention_layer_is_a_backpack():
    """C(x)_l = O_l·V_l·x: section 2.3, against torch's own attention."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True, dtype=torch.float64)
    E, idx = torch.randn(11, 12, dtype=torch.float64), some_ids()
    q, k, v = layer.in_proj_weight.split(12)
    table = torch.stack([E @ v[4 * h : 4 * h + 4].T @ layer.out_proj.weight[:, 4 * h : 4 * h + 4].T for h in range(3)], 1)
    query, key = ((E[idx] @ w.T).unflatten(-1, (3, 4)) for w in (q, k))
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    torch.testing.assert_close(bp.sense_mix(query, key, table, idx, 0.5), layer(E[idx], E[idx], E[idx], attn_mask=mask)[0])


def test_permuted_senses_and_shifted_senses():
    model, idx = small(3), some_ids()
    before, order = model.trunk(idx), [2, 0, 1]
    with torch.no_grad():
        out, net = model.sense_network.out.c_proj, model.weight_net
        for p in (out.weight, out.bias):
            p.copy_(p.unflatten(0, (3, -1))[order].flatten(0, 1))
        for p in (net.weight, net.bias):
            p.copy_(p.unflatten(0, (2, 3, -1))[:, order].flatten(0, 2))
        torch.testing.assert_close(model.trunk(idx), before)
        shift = torch.randn(3, 12, dtype=torch.float64)
        out.bias.add_(shift.flatten())
    torch.testing.assert_close(model.trunk(idx), before + shift.sum(0))


def test_senses_once_a_distinct_token_or_at_every_position():
    model, idx = small(5), some_ids(3, 12)
    results = []
    for model.dedup in (True, False):
        out = model(idx)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    calls = []
    model.sense_network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    model.dedup = True
    model(idx)
    assert calls == [len(idx.unique())]


COUNTS = {"micro": (30_145_536, 41_659_776), "mini": (71_886_080, 103_856_000), "small": (124_051_968, 170_083_584)}
SHRUNK = {1: 74_351_360, 4: 75_582_080, 16: 80_504_960, 64: 100_196_480}


def test_parameter_counts():
    """Table 1 and table 8, to the unit, without memory for them."""
    def count(model):
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        for size, (context, total) in COUNTS.items():
            config = GPTConfig(**bp.SIZES[size], vocab_size=bp.ROWS, bias=True, scale_attn_by_layer=True)
            model = Backpack(config, 16)
            assert (count(model.gpt), count(bp.GPT(config)), count(model)) == (context, context, total)
        mini = GPTConfig(**bp.SIZES["mini"], vocab_size=bp.ROWS, bias=True, scale_attn_by_layer=True)
        assert {k: count(Backpack(mini, k, 1)) for k in SHRUNK} == SHRUNK


def test_initial_weights():
    torch.manual_seed(0)
    model = bp.build("backpack", GPTConfig(64, 500, 4, 4, 64, True, True), 16, std=0.05).requires_grad_(False)
    assert model.gpt.transformer.wte.weight.std() == pytest.approx(0.05, rel=0.03)
    for p in (model.sense_network.mlp.c_proj, model.sense_network.out.c_proj, model.gpt.transformer.h[1].attn.c_proj):
        assert p.weight.std() == pytest.approx(0.05 / math.sqrt(8), rel=0.05) and not p.bias.any()
    assert model.sense_network.out.c_fc.weight.std() == pytest.approx(0.05, rel=0.03) and (model.sense_network.ln_a.weight == 1).all()
    torch.manual_seed(0)
    same = bp.build("transformer", GPTConfig(64, 500, 4, 4, 64, True, True), std=0.05)
    assert [*same.state_dict()] == [*model.gpt.state_dict()]  # the Backpack's context network is the baseline, whole
    for n_sense in (0, 13):
        with pytest.raises(ValueError, match=f"{n_sense} senses; from 1 to the width, 12"):
            small(n_sense)


@torch.no_grad()
def test_scaling_a_sense_moves_logits_by_a_known_amount():
    """Exactly affine in every context, which a Transformer's input embeddings are not; texts without the word do not move a bit."""
    model, idx = small(3), some_ids(4, 9)
    idx[0, idx[0] == 4] = 5
    idx[1:, 2] = 4
    (query, key, _, _, scale), _ = model.parts(idx)
    alpha, senses, before = bp.sense_weights(query, key, scale), model.senses(torch.tensor([4]))[0], model(idx)
    new = senses.clone()
    new[1] *= -0.7
    moved = (-0.7 - 1) * torch.einsum("bij,bj->bi", alpha[:, :, 1], (idx == 4).double())[..., None] * (model.lm_head.weight @ senses[1])
    with bp.edited(model, {4: new}):
        after = model(idx)
        assert torch.equal(model.senses(torch.tensor([4, 5]))[0], new)
    torch.testing.assert_close(after, before + moved)
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])
    assert torch.equal(model(idx), before) and not model.edits  # the edit ends with its block
    table, outs = model.gpt.transformer.wte.weight, []
    head = table.clone()
    for factor in (1, 0.5, 0):
        old = table[4].clone()
        table[4] *= factor
        outs.append(model.gpt.trunk(idx) @ head.T)
        table[4] = old
    assert not torch.allclose(outs[1], (outs[0] + outs[2]) / 2, rtol=1e-3, atol=1e-3)


def test_attribution_sums_to_the_logits():
    model, ids = small(5), some_ids(1, 12)[0].tolist()
    E = model.lm_head.weight.detach()
    added = bp.attribution(model, ids, E.T)
    assert added.shape == (12, 5, 11)
    torch.testing.assert_close(added.sum((0, 1)), model(torch.tensor([ids]))[0, -1].detach())
    torch.testing.assert_close(bp.attribution(model, ids, E[3]), added[..., 3])
    one = model.senses(torch.tensor(ids[5:6]))[0].detach().clone()
    one[2] = 0  # without sense 2 of that token the logit misses just its terms
    missing = sum(added[j, 2, 3] for j in range(12) if ids[j] == ids[5])
    with bp.edited(model, {ids[5]: one}):
        torch.testing.assert_close(model(torch.tensor([ids]))[0, -1, 3].detach(), added[..., 3].sum() - missing)


def test_swapped_directions():
    E = torch.randn(3, 12, dtype=torch.float64)
    senses = torch.randn(4, 12, dtype=torch.float64)
    removed = E[0]
    added = E[1] - (E[1] @ removed) / (removed @ removed) * removed  # orthogonal
    new = bp.swapped(senses, removed, added)
    torch.testing.assert_close(new @ removed, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(new @ added, senses @ added + senses @ removed)
    rest = E[2] - (E[2] @ removed) / (removed @ removed) * removed - (E[2] @ added) / (added @ added) * added
    torch.testing.assert_close(new @ rest, senses @ rest)
    by_hand = [c + (c @ E[0]) / (E[0] @ E[0]) * (E[1] / (E[1] @ E[1]) * (E[0] @ E[0]) - E[0]) for c in senses]
    torch.testing.assert_close(bp.swapped(senses, E[0], E[1]), torch.stack(by_hand))


def test_factors_on_a_sense_are_what_the_model_does():
    """pronoun_parts tells without another pass what the model with a scaled sense says."""
    codec = bp.word_codec(["<unk>", ".", "the", "he", "she", "nurse", "cook", "x", "y", "z", "w"])
    model, prompts = small(3), ["the {} x", "y the {} the {} z"]
    nouns = {"nurse": [5], "cook": [6]}
    gap, part = bp.pronoun_parts(model, codec, nouns, prompts, 3, 4)
    assert gap.shape == (2, 2) and part.shape == (2, 2, 3)
    for n, (noun, (i,)) in enumerate(nouns.items()):
        for w in (0.0, -1.5):
            new = model.senses(torch.tensor([i]))[0].detach().clone()
            new[2] *= w
            with bp.edited(model, {i: new}):
                for p, prompt in enumerate(prompts):
                    a, b = bp.probability(model, codec, prompt.replace("{}", noun), [3, 4])
                    assert math.log(a / b) == pytest.approx(float(gap[n, p] + (w - 1) * part[n, p, 2]), abs=1e-5)


def test_debiasing_on_known_gaps():
    """One noun for he, one for she; sense 1 carries all of the gap, sense 0 nothing, sense 2 a tenth the other way."""
    gap = torch.tensor([[2.0, 2.0], [-2.0, -2.0]]).double()
    part = torch.stack((0 * gap, 1.0 * gap, -0.1 * gap), -1)
    found = bp.debiased((gap, part), (gap, part))
    assert found["sense"] == 1 and found["unchanged"] == pytest.approx(math.exp(2)) and found["removed"] == pytest.approx(1)
    assert found["removing_each"] == pytest.approx([math.exp(2), 1, math.exp(2.2)])
    assert bp.debiased((gap, part), (gap, part), sense=0)["removed"] == pytest.approx(math.exp(2))
    half = bp.debiased((gap, 0.5 * part), (gap, 0.5 * part))  # the free optimum: e^(1 + w)+ 1 − w falls until below 0
    assert half["factor by noun"] < half["factor by noun, in [0, 1]"] == pytest.approx(half["removed"]) == pytest.approx(math.exp(1))
    w = np.arange(-600, 601) / 200
    best = w[np.argmin(np.exp(np.abs(2 + (w - 1))) + np.abs(1 - w))]
    assert half["factors"] == pytest.approx([best, best])


def test_reduction_is_the_papers():
    assert [round(100 * bp.reduction(*pair)) for pair in ((4.34, 2.88), (4.34, 2.16), (7.02, 6.72), (7.02, 7.02))] == [44, 65, 5, 0]


def test_projected_embedding_is_put_back():
    torch.manual_seed(1)
    codec = bp.word_codec(["<unk>", ".", "the", "he", "she", "nurse", "cook", "x", "y", "z", "w"])
    model = bp.build("transformer", GPTConfig(16, 11, 2, 2, 12, True, True), std=0.3).double().requires_grad_(False)
    before, E = model.lm_head.weight.clone(), model.lm_head.weight
    prompts, texts = ["the {} x", "the {} the x y"], [[1, 2, 5, 7], [1, 2, 5, 2, 7, 8]]

    def by_hand():  # each text alone; the output matrix as it was
        return [float(model.trunk(torch.tensor([ids]))[0, -1] @ (before[3] - before[4])) for ids in texts]

    gap = bp.projected_gap(model, codec, {"nurse": [5]}, prompts, 3, 4, keep=1.0)
    assert gap.shape == (1, 2) and gap[0].tolist() == pytest.approx(by_hand(), abs=1e-9)
    moved = bp.projected_gap(model, codec, {"nurse": [5]}, prompts, 3, 4, keep=0.0)
    assert torch.equal(E, before) and not torch.allclose(moved, gap)
    direction = (E[3] - E[4]) / (E[3] - E[4]).norm()
    with torch.no_grad():
        E[5] -= (E[5] @ direction) * direction
    assert moved[0].tolist() == pytest.approx(by_hand(), abs=1e-9)


@torch.no_grad()
def test_topic_control():
    model, idx = small(3), some_ids(2, 7)
    E = model.lm_head.weight
    control = bp.TopicControl(model, [2, 3], 3, 9, silent=[0])
    assert torch.equal(model.trunk(idx, control=lambda ids, senses: torch.ones_like(senses[..., 0])), model.trunk(idx))
    none = bp.TopicControl(model, [2, 3], 0, 9)
    assert torch.equal(model.trunk(idx % 9, control=none), model.trunk(idx % 9))
    scores = np.zeros((9, 3))
    for x in range(1, 9):  # 0 is silent
        for sense in range(3):
            logits = (E[:9] @ model.senses(torch.tensor([x]))[0, sense]).numpy()
            scores[x, sense] = logits[[2, 3]].sum() / logits.max()
    cuts = [np.quantile(scores, q) for q in (0.95, 0.8, 0.6)]
    delta = np.select([scores > c for c in cuts], (3.3, 3.3, 3.0), 1.0)
    np.testing.assert_allclose(control.delta.numpy(), delta)
    idx = idx % 9
    got, f = control(idx, model.senses(torch.arange(9))[idx]), 3.3 / 7.5
    for b in range(2):
        for j in range(7):
            for sense in range(3):
                over_words = (E @ model.senses(idx[b, j : j + 1])[0, sense]).numpy()  # the projection on all of the vocabulary
                said = sum(max(over_words[idx[b, t]], 0) for t in range(7))
                anneal = 1 / (1 + math.exp(-(6 - f * said))) * (1 + j / 100)
                assert float(got[b, j, sense]) == pytest.approx(1 + anneal * (delta[idx[b, j], sense] - 1), rel=1e-9)


@torch.no_grad()
def test_cached_generation_equals_full_recompute():
    """Token by token, for one text, for prompts of unequal lengths side by side, with control, after an edit, and past the context."""
    model = small(5, block=32)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1]]
    control = bp.TopicControl(model, [2], 3, 11)
    edits = {2: torch.randn(5, 12, dtype=torch.float64)}
    for how in (dict(), dict(control=control), dict(temperature=0)):
        texts = [bp.continue_texts(model, prompts, 15, 7, 11, cached=cached, **how) for cached in (True, False)]
        assert texts[0] == texts[1] and [len(t) - len(p) for t, p in zip(texts[0], prompts)] == [15] * 3
        assert all(text[: len(p)] == p for text, p in zip(texts[0], prompts))
    plain = bp.continue_texts(model, prompts, 15, 7, 11, temperature=0)
    for prompt, text in zip(prompts, plain):  # greedy texts do not depend on their neighbours
        assert bp.generate(model, prompt, 15, temperature=0) == text == bp.continue_texts(model, [prompt], 15, 0, 11, temperature=0)[0]
        for n in range(len(prompt), len(text)):
            assert int(model(torch.tensor([text[:n]]))[0, -1].argmax()) == text[n]
    with bp.edited(model, edits):
        changed = bp.continue_texts(model, [[2, 1]], 15, 7, 11, temperature=0)[0]
        assert changed == bp.continue_texts(model, [[2, 1]], 15, 7, 11, temperature=0, cached=False)[0]
    assert changed != bp.continue_texts(model, [[2, 1]], 15, 7, 11, temperature=0)[0]
    text = bp.generate(model, [1, 2], 60, temperature=0)
    window = text[len(text) - 1 - ((len(text) - 1 - 33) % 16 + 16) : -1]  # read anew from the last half at every 16th token from the 33rd
    assert len(text) == 62 and text[-1] == int(model(torch.tensor([window]))[0, -1].argmax())


def test_padded_batches_score_as_alone():
    model, texts = small(3).requires_grad_(False), [[1, 2, 3, 4], [5, 6], [7, 8, 9, 1, 2, 3, 4]]
    together = bp.token_log_probs(model, texts, 10)
    for text, (log_p, best) in zip(texts, together):
        logits = model(torch.tensor([text[:-1]]))[0, :, :10].float()
        expected = [float(row.log_softmax(-1)[t]) for row, t in zip(logits, text[1:])]
        np.testing.assert_allclose(log_p, expected, rtol=1e-5)
        assert best.tolist() == [int(row.argmax()) == t for row, t in zip(logits, text[1:])]


def test_spearman():
    x = [1.0, 2.0, 2.0, 3.0, 9.0]
    assert bp.spearman(x, [2, 1, 1, 0, -5]) == pytest.approx(-1)
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([3.5, 1, 3.5, 2, 5])  # by hand, ties averaged
    assert bp.spearman(x, [7, 1, 7, 3, 8]) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert math.isnan(bp.spearman([1, 1, 1], [1, 2, 3])) and math.isnan(bp.spearman([], []))


# ---------------------------------------------------------------------------------------------- released layouts


def layouts(model):
    """A model's weights under the names of Hugging Face and of the authors, made here piece by piece."""
    t, net, n_layer = model.gpt.transformer, model.sense_network, model.config.n_layer
    hf, ours = {}, {}

    def both(hf_name, author_name, module, conv=False):
        for kind in ("weight", "bias"):
            p = getattr(module, kind).detach().clone()
            hf[f"{hf_name}.{kind}"] = p.T.contiguous() if conv and kind == "weight" else p
            ours[f"model.{author_name}.{kind}"] = p

    for i, block in enumerate(t.h):
        mine, theirs = f"backpack.gpt2_model.h.{i}", f"transformer.gpt2_model.layers.{i}"
        before = "transformer.gpt2_model.ln_0" if i == 0 else f"transformer.gpt2_model.layers.{i - 1}.norm2"
        both(f"{mine}.ln_1", before, block.ln_1)
        both(f"{mine}.ln_2", f"{theirs}.norm1", block.ln_2)
        both(f"{mine}.attn.c_attn", f"{theirs}.mixer.Wqkv", block.attn.c_attn, True)
        both(f"{mine}.attn.c_proj", f"{theirs}.mixer.out_proj", block.attn.c_proj, True)
        both(f"{mine}.mlp.c_fc", f"{theirs}.mlp.fc1", block.mlp.c_fc, True)
        both(f"{mine}.mlp.c_proj", f"{theirs}.mlp.fc2", block.mlp.c_proj, True)
        hf[f"{mine}.attn.bias"], hf[f"{mine}.attn.masked_bias"] = torch.ones(1, 1, 16, 16), torch.tensor(-1e4)
    both("backpack.gpt2_model.ln_f", f"transformer.gpt2_model.layers.{n_layer - 1}.norm2", t.ln_f)
    both("backpack.sense_network.ln", "transformer.content_model.ln_0", net.ln_a)
    both("backpack.sense_network.block.ln_1", "transformer.content_model.layers.0.norm1", net.ln_b)
    both("backpack.sense_network.block.ln_2", "transformer.content_model.layers.0.norm2", net.ln_c)
    both("backpack.sense_network.block.mlp.c_fc", "transformer.content_model.layers.0.mlp.fc1", net.mlp.c_fc, True)
    both("backpack.sense_network.block.mlp.c_proj", "transformer.content_model.layers.0.mlp.fc2", net.mlp.c_proj, True)
    both("backpack.sense_network.final_mlp.c_fc", "transformer.content_model.final_mlp.fc1", net.out.c_fc, True)
    both("backpack.sense_network.final_mlp.c_proj", "transformer.content_model.final_mlp.fc2", net.out.c_proj, True)
    both("backpack.sense_weight_net.c_attn", "transformer.contextualization_attn.Wqkv", model.weight_net)  # not transposed
    wte, wpe = t.wte.weight.detach(), t.wpe.weight.detach()
    hf |= {"backpack.gpt2_model.wte.weight": wte, "backpack.gpt2_model.wpe.weight": wpe, "backpack.word_embeddings.weight": wte,
           "backpack.position_embeddings.weight": wpe, "lm_head.weight": wte}
    for prefix in ("transformer.embeddings", "transformer.gpt2_model.embeddings", "transformer.content_model.embeddings"):
        ours |= {f"model.{prefix}.word_embeddings.weight": wte, f"model.{prefix}.position_embeddings.weight": wpe}
    return hf, ours | {"model.lm_head.weight": wte}


def test_three_released_layouts_give_the_same_logits():
    model, idx = small(4, dtype=torch.float32), some_ids()
    hf, authors = layouts(model)
    levanter = {name: w for name, w in hf.items() if name != "lm_head.weight"}
    for weights, layout, divisor in ((hf, "Hugging Face", 1), ({"state_dict": authors}, "the authors'", 1), (levanter, "Levanter", 4)):
        with torch.no_grad():
            loaded, found = bp.import_released(weights, Path("x.bin"), {}, n_head=2)
            assert found == layout and loaded.n_sense == 4 and loaded.sense_width == 4
            torch.testing.assert_close(loaded(idx) * divisor, model(idx), rtol=1e-5, atol=1e-5)
    assert {**bp.hf_state(model)}.keys() == {name for name in hf if not name.endswith((".attn.bias", "masked_bias"))}
    for name, w in bp.hf_state(model).items():
        assert torch.equal(w, hf[name]), name
    gpt = {name.replace("gpt2_model.", ""): w for name, w in authors.items() if "conte" not in name}
    baseline, _ = bp.import_released({"state_dict": gpt}, Path("x.ckpt"), {"n_head": 2})
    assert torch.equal(baseline(idx), model.gpt(idx))


def test_names_that_do_not_fit(capsys):
    model = small(4, dtype=torch.float32)
    hf, _ = layouts(model)
    key = "backpack.sense_network.ln.weight"
    for change, message in [
        (lambda w: w.pop(key), "lacks sense_network.ln_a.weight"),
        (lambda w: w.update({"backpack.more": w[key]}), "beyond the model's, backpack.more"),
        (lambda w: w.update({key: torch.zeros(5)}), "in another shape sense_network.ln_a.weight"),
        (lambda w: w.clear(), "it has no tensors"),
        (lambda w: w.pop("backpack.gpt2_model.wte.weight"), "no Backpack in a layout known"),
        (lambda w: w.pop("backpack.sense_network.final_mlp.c_proj.weight"), "the last matrix of its sense network is (0, 12)"),
    ]:
        weights = dict(hf)
        change(weights)
        with pytest.raises(SystemExit):
            bp.import_released(weights, Path("x.bin"), {}, n_head=2)
        assert message in capsys.readouterr().err
    for config, n_head, message in (({}, None, "give --n_head, a divisor of 12"), ({}, 5, "give --n_head"),
                                    ({"n_head": 3}, 2, "config.json says 3")):
        with pytest.raises(SystemExit):
            bp.import_released(hf, Path("x.bin"), config, n_head)
        assert message in capsys.readouterr().err


class Config:
    """Stands for the authors' classes in a checkpoint; loading must not call it."""

    def __init__(self):
        self.list = [1]

    def __reduce__(self):
        return (os.system, ("touch called",))


def test_authors_pickles_run_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, authors = layouts(small(4, dtype=torch.float32))
    torch.save(dict(state_dict=authors, hyper_parameters=Config(), epoch=3), "a.ckpt")
    saved = bp.load_weights(Path("a.ckpt"))
    assert saved["epoch"] == 3 and isinstance(saved["hyper_parameters"], bp.Stub) and not Path("called").exists()
    assert all(torch.equal(w, saved["state_dict"][name]) for name, w in authors.items())
    Path("b.ckpt").write_bytes(pickle.dumps(Config()))
    Path("c.ckpt").write_bytes(Path("a.ckpt").read_bytes()[:2000])
    for name in ("b.ckpt", "c.ckpt"):
        with pytest.raises(SystemExit):
            bp.load_weights(Path(name))
        assert "is no checkpoint, or not a whole one" in capsys.readouterr().err and not Path("called").exists()


# ---------------------------------------------------------------------------------------------- the claims


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Backpack of the generated world after half of the demo's steps, and a Transformer without any, saved as the demo saves them."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    folder, job = tmp_path_factory.mktemp("world"), dict(bp.WORLD_JOB, name="world", arch="backpack", n_sense=8, seed=0, steps=400)
    codec, _, val = bp.corpus_of("world", 0)
    result = bp.train_job(job, torch.device("cpu"), True)
    model = bp.job_model(job, codec).requires_grad_(False)
    model.load_state_dict(result["weights"])
    bp.save_model_file(folder / "world.pt", model, codec)
    torch.manual_seed(0)
    bp.save_model_file(folder / "world_transformer.pt", bp.job_model(dict(job, arch="transformer"), codec), codec)
    return dict(model=model, loss=result["loss"], codec=codec, val=val, folder=folder)


def test_the_world_is_as_stated():
    words = bp.WORD.findall(bp.world_text(20_000, 3))
    pairs, shares = list(zip(words, words[1:])), {}
    for kind, share in bp.HE_SHARE.items():
        sentences = " ".join(words).split(" . ")
        about = [s.split() for s in sentences if set(s.split()) & set(bp.WORLD[kind])]
        he = np.mean([("he" in s) for s in about])
        assert all(("he" in s) != ("she" in s) for s in about) and abs(he - share) < 4 * math.sqrt(share * (1 - share) / len(about))
        shares[kind] = len(about)
    made = [s.split() for s in sentences if " is made by " in s]
    for maker, products in bp.WORLD["makers"].items():
        assert {s[5] for s in made if s[1] in products} == {maker}
    assert len(pairs) > 100_000 and bp.world_text(50, 3) == bp.world_text(50, 3) != bp.world_text(50, 4)
    assert len(bp.world_text(50, 3).split(" . ")) == 50


def test_the_world_is_learnt(world):
    """A model that reads no context stays at the bigram's entropy; a mixture without the right weights too."""
    ids = world["val"].astype(int)
    unigram = np.bincount(ids)[ids[1:]] / len(ids)
    counts = np.zeros((world["codec"].n_vocab,) * 2)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    bigram = (counts / counts.sum(1, keepdims=True).clip(1))[ids[:-1], ids[1:]]
    assert world["loss"] < -np.log(bigram).mean() - 0.1 < -np.log(unigram).mean() - 1


def test_one_sense_carries_gender_and_an_edit_moves_a_fact(world):
    model, codec = world["model"], world["codec"]
    found = bp.gender(model, codec)
    assert found["unchanged"] > 5 and found["removed"] < found["unchanged"] / 2 and found["factor by noun"] < 2
    assert found["removing_each"][found["sense"]] == found["removed"] == min(found["removing_each"])
    rows, edits = bp.edit_figures(model, codec, "macbook", "apple", "hp", bp.MADE_BY, ["iphone", "ipad"])
    mine, others = ([r for r in rows if (r["word"] == "macbook") == which] for which in (True, False))
    assert all(r["before"][0] > 0.9 for r in rows) and np.mean([r["after"][1] for r in mine]) > 0.5 and len(others) == 6
    assert max(abs(a - b) for r in others for a, b in zip(r["before"], r["after"])) <= 0.02


# ---------------------------------------------------------------------------------------------- the tool


def tool(monkeypatch, capsys, tmp_path, *arguments):
    """A task by its command line, in this process → what it prints, results.json."""
    monkeypatch.setattr(sys, "argv", ["backpack.py", *map(str, arguments), "--quiet", "--device", "cpu", "--out", str(tmp_path / "out")])
    bp.main()
    text, results = capsys.readouterr().out, tmp_path / "out/results.json"
    return text, json.loads(results.read_text()) if results.exists() else None


def run(*command, cwd, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                          capture_output=True, text=True, timeout=300)


def test_demo_says_when_it_shows_nothing(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(monkeypatch, capsys, tmp_path, "--steps", 3)
    captured, results = capsys.readouterr(), json.loads((tmp_path / "out/results.json").read_text())
    assert stop.value.code == 1 and captured.err.count("\n") == 1 and "trained too little" in captured.err
    assert not all(results["checks"].values()) and len(results["table"]) == 5
    paths = [Path(path) for path in captured.out.split()[-2:]]
    assert [path.name for path in paths] == ["results.json", "demo.png"] and paths[1].stat().st_size > 30_000
    assert {"world.pt", "world_transformer.pt", "prose.pt"} <= {path.name for path in (tmp_path / "out").iterdir()}
    text, _ = tool(monkeypatch, capsys, tmp_path / "s", "senses", "--ckpt", tmp_path / "out/prose.pt", "--sense", 15)
    assert "sense 15" in text and "sense 14" not in text and "import" in text


def test_tasks_on_the_demos_model(world, tmp_path, monkeypatch, capsys):
    ckpt, model, codec = world["folder"] / "world.pt", world["model"], world["codec"]

    def go(task, *flags, file=ckpt):
        return tool(monkeypatch, capsys, tmp_path / task, task, *flags, "--ckpt", file)

    text, found = go("senses", "nurse", "bread", "--top", 3, "--sense", 2)
    row = model.senses(torch.tensor([codec.words.index("bread")]))[0, 2] @ model.lm_head.weight.T
    assert [word for word, _ in found["senses"]["bread"]["2"]] == [codec.words[i] for i in row.topk(3).indices] and "nurse" in text
    _, found = go("senses", "bread", "--top", 3, "--sense", 2, "--neg")
    assert [word for word, _ in found["senses"]["bread"]["2"]] == [codec.words[i] for i in (-row).topk(3).indices]
    text, found = go("debias")
    assert found["removed"] == pytest.approx(bp.gender(model, codec)["removed"], rel=1e-4) and f"sense {found['sense']} was located" in text
    text, again = go("debias", "--sense", (found["sense"] + 1) % 8)
    assert again["removed"] == pytest.approx(found["removing_each"][again["sense"]]) and "was given" in text
    text, found = go("debias", file=world["folder"] / "world_transformer.pt")
    assert set(found["transformer"]) == {"unchanged", "projected", "part by noun"}
    text, found = go("edit", "--word", "pixel", "--remove", "google", "--add", "sony", "--control", "android")
    assert {row["word"] for row in found["table"]} == {"pixel", "android"} and "after: " in text and len(found["table"]) == 6
    text, found = go("edit", "--prompt", "the {} is made by", "--control")
    assert len(found["table"]) == 1 and found["table"][0]["after"][1] > found["table"][0]["before"][1]
    text, found = go("attribute", "--prompt", "the nurse walked in when", "--target", "she", "--top", 4)
    ids = bp.prompt_ids(codec, "the nurse walked in when")
    assert found["logit"] == pytest.approx(float(model(torch.tensor([ids]))[0, -1, codec.words.index("she")]), abs=1e-4)
    assert np.sum(found["contributions"]) == pytest.approx(found["logit"], abs=1e-4) and text.count("nurse") >= 1
    text, found = go("topic", "--bag", "music", "--samples", 6, "--tokens", 20)
    drawn = bp.continue_texts(model, [[codec.eot]] * 6, 20, 0, codec.n_vocab)
    for row, strength in zip(found["table"], range(4), strict=True):
        if strength:
            bag = [codec.words.index(word) for word in bp.WORLD["topics"]["music"]]
            control = bp.TopicControl(model, bag, strength, codec.n_vocab, [codec.eot])
            drawn = bp.continue_texts(model, [[codec.eot]] * 6, 20, 0, codec.n_vocab, control)
        words = [codec.words[i] for ids in drawn for i in ids[1:]]
        assert row["share"] == pytest.approx(np.mean([w in bp.WORLD["topics"]["music"] for w in words]))
        assert row["distinct_1"] == len(set(words)) / len(words) and 0 < row["distinct_2"] <= 1 and row["nll"] > 0
    text, found = go("eval")
    assert found["text"]["perplexity"] == pytest.approx(math.exp(world["loss"]), rel=0.1)
    text, _ = go("sample", "--prompt", "the nurse", "--tokens", 7, "--temperature", 0)
    ids = bp.generate(model, bp.prompt_ids(codec, "the nurse"), 7, temperature=0)
    assert text.strip() == codec.decode(ids[1:])


def test_convert_round_trip(world, tmp_path, monkeypatch, capsys):
    ckpt = world["folder"] / "world.pt"
    tool(monkeypatch, capsys, tmp_path, "convert", "--ckpt", ckpt)
    again = tmp_path / "out/model.safetensors"
    args = bp.parse_args(["senses", "--ckpt", str(again), "--device", "cpu"])
    model, codec, _ = bp.open_model(args)
    first = world["model"]
    assert codec.words == world["codec"].words and model.n_sense == 8 and model.config == first.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True))
    assert "Hugging Face layout" in capsys.readouterr().err
    text, _ = tool(monkeypatch, capsys, tmp_path / "b", "senses", "nurse", "--ckpt", again)
    assert text.splitlines()[1:9] == tool(monkeypatch, capsys, tmp_path / "c", "senses", "nurse", "--ckpt", ckpt)[0].splitlines()[1:9]


def test_protocols(world, tmp_path):
    """LAMBADA, WikiText, BLiMP and plain text against sums by hand, on a small text that the world's model knows."""
    model, codec = world["model"], world["codec"]
    args = bp.argparse.Namespace(data=None, seed=0, quiet=True)

    def log_p(ids):
        logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        return [float(row[t]) for row, t in zip(logits, ids[1:])]

    passages = ["the macbook is made by apple", "my iphone comes from apple .", "the macbook is made by sony."]  # sony. is two tokens
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in passages))
    args.data = str(tmp_path / "l.jsonl")
    found = bp.eval_lambada(args, model, codec)
    last = [sum(log_p(codec.encode(text).tolist())[-n:]) for text, n in zip(passages, (1, 1, 2))]
    assert found["passages"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(last)), rel=1e-4)
    many = "the macbook is made by apple . " * 6  # more than a window
    article = f" \n = Title = \n \n {many}\n = = Part = = \n the nurse said \n = Other = \n \n my nurse , \n"
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", article)
    args.data = str(tmp_path / "w.zip")
    found = bp.eval_wikitext(args, model, codec)
    ids = [[codec.eot, *codec.encode(text).tolist()] for text in (f"= Title = {many} == Part == the nurse said", "= Other = my nurse,")]
    assert 33 < len(ids[0]) < 65
    total = sum(map(sum, map(log_p, (ids[0][:33], ids[0][32:], ids[1]))))
    assert found["articles"] == 2 and found["words"] == len(article.split())
    assert found["perplexity"] == pytest.approx(math.exp(-total / found["words"]), rel=1e-4)
    (tmp_path / "blimp").mkdir()
    pairs = [("the nurse said that she smiled", "the nurse that said smiled she"), ("and and", "the macbook is made by apple")]
    for name, rows in (("a", pairs[:1]), ("b", pairs)):
        lines = [json.dumps(dict(sentence_good=good, sentence_bad=bad)) for good, bad in rows]
        (tmp_path / f"blimp/{name}.jsonl").write_text("\n".join(lines))
    args.data = str(tmp_path / "blimp")
    found = bp.eval_blimp(args, model, codec)
    good, bad = (sum(log_p([codec.eot, *codec.encode(text).tolist()])) for text in pairs[1])
    expected = float(good > bad)
    assert found["paradigms"]["a"] == 1 and found["paradigms"]["b"] == (1 + expected) / 2 and found["accuracy"] == (3 + expected) / 4
    (tmp_path / "t.txt").write_text("the macbook is made by apple . " * 60)
    args.data = str(tmp_path / "t.txt")
    found, ids = bp.eval_text(args, model, codec), codec.encode("the macbook is made by apple . " * 60).tolist()
    windows = [log_p(ids[i : i + 33]) for i in range(0, len(ids) - 32, 32)]
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(windows)), rel=1e-4)


def test_one_process_tasks_say_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        bp.parse_args(["senses"])
    assert "senses is for one process" in capsys.readouterr().err and bp.parse_args(["ablate_k"]).task == "ablate_k"


def test_detokenized():
    text = ' the 1 @,@ 000 , " quoted " ( it \'s ) well @-@ known ; 3 @.@ 5 \n = = Head = = \n'
    assert bp.detokenized(text).split("\n") == [' the 1,000, "quoted" (it\'s) well-known; 3.5', "== Head ==", ""]


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_similarity_sets(world, tmp_path, monkeypatch, capsys):
    folder = Path(DATA) / "backpack"
    sets = {name: bp.similarity_pairs(name, folder) for name in bp.SIMILARITY}
    assert {name: len(pairs) for name, pairs in sets.items()} == {"SimLex-999": 999, "SimVerb-3500": 3500, "RG65": 65, "WordSim-353": 353}
    assert sets["SimLex-999"][0] == ("old", "new", 1.58) and sets["SimVerb-3500"][0] == ("take", "remove", 6.81)
    assert sets["RG65"][0] == ("cord", "smile", 0.02) and sets["WordSim-353"][0] == ("love", "sex", 6.77)
    torch.manual_seed(0)
    words = sorted({word for pair in sets["RG65"] for word in pair[:2]})
    codec = bp.word_codec(["<unk>", ".", *words])
    model = bp.build("backpack", GPTConfig(16, codec.n_vocab, 1, 2, 24, True, True), 3, std=0.3)
    bp.save_model_file(tmp_path / "rg.pt", model, codec)
    text, found = tool(monkeypatch, capsys, tmp_path, "similarity", "--ckpt", tmp_path / "rg.pt", "--data", folder)
    assert found["sets"]["RG65"]["pairs"] == 65 and found["sets"]["SimVerb-3500"]["pairs"] == 0
    assert "–" in text and "nan" not in text.lower()
    assert found["sets"]["SimVerb-3500"]["minimum"] is None
    cosines = []
    for a, b, _ in sets["RG65"]:
        ca, cb = (model.senses(torch.tensor([codec.words.index(w)]))[0] for w in (a, b))
        cosines.append(torch.cosine_similarity(ca, cb, dim=-1).tolist())
    gold = [pair[2] for pair in sets["RG65"]]
    assert found["sets"]["RG65"]["senses"] == pytest.approx([bp.spearman([c[i] for c in cosines], gold) for i in range(3)], abs=1e-3)
    assert found["sets"]["RG65"]["minimum"] == pytest.approx(bp.spearman([min(c) for c in cosines], gold), abs=1e-3)


def test_bench_and_ablation(tmp_path, monkeypatch, capsys):
    text, found = tool(monkeypatch, capsys, tmp_path / "b", "bench", "--steps", 1, "--n_sense", 4)
    assert found["same_text"] and found["table"][0][2] > 1.5 * found["table"][0][4]  # once a distinct token, not at every position
    text, found = tool(monkeypatch, capsys, tmp_path / "k", "ablate_k", "--steps", 2, "--senses_of", 1, 2)
    assert [row[0] for row in found["table"]] == ["Backpack, k = 1", "Backpack, k = 2", "Transformer, same context"]


TRAIN = ("train", "--size", "nano", "--seq", 16, "--batch_size", 4, "--micro_batch_size", 1, "--n_sense", 4, "--steps", 6,
         "--save_every", 3, "--eval_tokens", 2000)


def test_torchrun_and_resume_give_the_same_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    flags = (*TRAIN, "--data", tmp_path / "t.txt")
    _, one = tool(monkeypatch, capsys, tmp_path / "1", *flags)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HOUSE / "backpack.py")
    two = run(*launcher, *flags, "--quiet", "--device", "cpu", "--out", tmp_path / "2", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("validation loss") == 1
    both = json.loads((tmp_path / "2/results.json").read_text())
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-5) and both["history"][0] == pytest.approx(one["history"][0], rel=1e-5)

    def stop_after(step):
        def wrapped(path, state):
            save(path, state)
            if state.get("step") == step:
                raise KeyboardInterrupt
        return wrapped

    save = bp.save_checkpoint
    monkeypatch.setattr(bp, "save_checkpoint", stop_after(3))
    with pytest.raises(SystemExit) as stop:
        tool(monkeypatch, capsys, tmp_path / "3", *flags)
    assert stop.value.code == 130 and "--resume goes on" in capsys.readouterr().out
    monkeypatch.setattr(bp, "save_checkpoint", save)
    _, resumed = tool(monkeypatch, capsys, tmp_path / "3", *flags, "--resume")
    assert resumed["loss"] == one["loss"] and resumed["history"] == one["history"]
    with pytest.raises(SystemExit):
        tool(monkeypatch, capsys, tmp_path / "3", *flags, "--resume", "--lr", 0.1)
    assert "was made with lr = 0.002, this run has 0.1" in capsys.readouterr().err
    text, _ = tool(monkeypatch, capsys, tmp_path / "4", "sample", "--ckpt", tmp_path / "3/out/model.pt", "--prompt", "the ", "--tokens", 5)
    assert text.startswith("the ")
    _, baseline = tool(monkeypatch, capsys, tmp_path / "5", *flags, "--arch", "transformer", "--no_plot")
    assert baseline["settings"]["arch"] == "transformer" and baseline["loss"] != one["loss"]


@pytest.mark.parametrize("arguments, message", [
    (["nothing"], "invalid choice"), (["--seed", "-1"], "-1 is not between 0"), (["edit", "more"], "edit takes no further words: more"),
    (["senses", "--device", "abacus"], "cannot be had here"), (["senses", "--resume"], "--resume goes with train"),
    (["senses"], "no model at out/backpack/demo/world.pt: first python backpack.py"), (["senses", "--ckpt", "nowhere.pt"], "no such file"),
    (["senses", "--ckpt", "notes.txt"], "is no checkpoint"),
    (["senses", "--ckpt", "short.safetensors"], "is not a whole safetensors file"),
    (["senses", "--ckpt", "other.pt"], "no Backpack in a layout known"),
    (["senses", "WORLD", "--ckpt", "transformer.pt"], "it has no senses"), (["senses", "zebra"], "word 'zebra' is not one of"),
    (["senses", "nurse", "--sense", "8"], "this model has senses 0 to 7"), (["debias", "--sense", "8"], "this model has senses 0 to 7"),
    (["debias", "--n_head", "2"], "was made with n_head = 4, not 2"),
    (["debias", "--divide_by_k"], "was made with divide_by_k = False, not True"),
    (["edit", "--add", "apple"], "--remove and --add are both 'apple'"), (["edit", "--prompt", "the macbook"], "--prompt needs {}"),
    (["edit", "--word", "windows"], "--word 'windows' is not one of"),
    (["edit", "--word", "the nurse"], "--word 'the nurse' is not one of"), (["attribute", "--prompt", " "], "--prompt is empty"),
    (["attribute", "--target", "zebra"], "--target 'zebra'"),
    (["attribute", "--prompt", "the zebra said"], "--prompt: 'zebra' is not one of"),
    (["attribute", "--prompt", "the nurse " * 64], "129 tokens exceed the context of 32"),
    (["topic", "--strength", "4"], "invalid choice: 4"), (["topic", "--bag", "zebra"], "--bag 'zebra'"),
    (["topic", "--bag", ","], "--bag is empty"), (["sample", "--prompt", "zebra"], "'zebra'"),
    (["eval", "chess"], "eval chess: there are text, lambada"), (["eval", "text", "blimp", "--data", "x"], "name just one"),
    (["eval", "--data", "nowhere"], "--data nowhere: no such file"),
    (["eval", "--data", "notes.txt"], "are too few for one window of 32"),
    (["eval", "lambada", "--data", "notes.txt"], "row 1: no JSON with"),
    (["eval", "blimp", "--data", "notes.txt"], "neither a folder with BLiMP"),
    (["similarity", "--data", "empty"], "no SimLex-999.txt in it"),
    (["similarity", "--data", "broken"], "row 2: no two words and, in column 4, a score"),
    (["similarity", "--data", "fewer"], "has 1 pairs, SimLex-999 has 999"), (["ablate_k", "--senses_of", "65"], "from 1 to 64 senses"),
    (["ablate_k", "--senses_of", "0"], "0 is not between 1"), (["train", "--n_sense", "65"], "from 1 to 64 senses"),
    (["train", "--batch_size", "6", "--micro_batch_size", "4"], "--batch_size 6 is not"),
    (["train", "--steps", "5", "--warmup", "5"], "leaves nothing of --steps 5"),
    (["train", "--data", "nowhere"], "no such file or folder"), (["train", "--data", "notes.txt"], "are too few"),
    (["train", "--data", "long.txt", "--resume"], "--resume: no out"),
    (["train", "--data", "long.txt", "--lr", "1e30", "--steps", "9"], "the gradient is not finite: start anew with a lower --lr"),
    (["similarity"], "https://raw.githubusercontent.com"), (["eval", "wikitext"], "https://huggingface.co/datasets/ggml-org"),
    (["senses", "--ckpt", "public"], "https://huggingface.co/stanfordnlp/backpack-gpt2"),
])
def test_mistakes_end_in_one_line(arguments, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bp, "CACHE", tmp_path / "cache")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(bp.urllib.request, "urlopen", no_network)
    Path("notes.txt").write_text("a few words")
    Path("long.txt").write_text("a few words more " * 300)
    Path("short.safetensors").write_bytes(b"\xff" * 30)
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    for folder, line in (("empty", None), ("broken", "old\tnew\tA\tx"), ("fewer", "old\tnew\tA\t1.5")):
        Path(folder).mkdir()
        if line:
            Path(folder, "SimLex-999.txt").write_text(f"word1\tword2\tPOS\tSimLex999\n{line}\n")
    folder = world["folder"]
    if arguments[0] in ("senses", "debias", "edit", "attribute", "topic", "sample", "eval", "similarity") and "no model" not in message:
        if "--ckpt" not in arguments:
            arguments = [*arguments, "--ckpt", str(folder / "world.pt")]
        arguments = [str(folder / "world_transformer.pt") if a == "transformer.pt" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["backpack.py", *arguments, "--quiet"])
    with pytest.raises(SystemExit) as stop:
        bp.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err
