"""The specification of decode.py. References are whole sequences without a cache."""

import itertools
import random
from collections import Counter
from functools import partial

import pytest
import torch
from common import make, tokens

import decode
from decode import Chunk, KVCache, Stats, distribution, draw, generate, step
from model import RULES, UserError

S = 16  # context of most models here
assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
PROMPTS = [[5, 6, 7], list(range(20, 30)), [3] * S, [4]]  # ragged; one fills its context


@torch.no_grad()
def uncached_logits(model, prompt, new, iters):
    """The logits (len(new), V) from which `new` was chosen, by the stated rule of overflow."""
    S, context, i, out = model.config.block_size, list(prompt), 0, []
    while i < len(new):
        take = min(S - len(context) + 1, len(new) - i)
        whole = context + new[i : i + take - 1]
        out.append(model(torch.tensor([whole]), iters=iters)[0][0, len(context) - 1 :])
        i += take
        context = (whole + [new[i - 1]])[-(S // 2) :]
    return torch.cat(out)


def assert_best(logits, new, margin=1e-4):
    """Every id is the best of its logits (len(new), V), or within the margin of it."""
    chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < margin


def assert_greedy(model, prompt, new, iters):
    assert_best(uncached_logits(model, prompt, new, iters), new)


def count_body_calls(model) -> list[tuple]:
    shapes = []
    model.body[0].register_forward_hook(lambda block, args, out: shapes.append(tuple(args[0].shape[:2])))
    return shapes


EXITS = ["kl:1e-3", "u:1e-2"]


def settling_model(rule, **keys):
    """A model some of whose tokens settle after two iterations and some after more."""
    model = make(rule=rule, seed=3, **keys)
    if rule == "recall":  # calmer, so that it settles at all
        with torch.no_grad():
            for block in model.body:
                block.attn.proj.weight.mul_(0.3)
                block.mlp.down.weight.mul_(0.3)
    return model


# --------------------------------------------------------------------------------------------- the full cache


@pytest.mark.parametrize("rule", RULES)
def test_cached_decoding_equals_uncached_in_a_ragged_batch_past_the_context(rule):
    model = make(rule=rule, block_size=S)
    for iters in (1, 2, 3, 8):
        for prompt, new in zip(PROMPTS, generate(model, PROMPTS, S + 6, iters)):
            assert len(new) == S + 6
            assert_greedy(model, prompt, new, iters)


@pytest.mark.parametrize("rule", RULES)
def test_logits_of_a_step_equal_those_without_a_cache(rule):
    model, idx = make(rule=rule), tokens(2, 12)
    for iters in (1, 2, 3, 8):
        whole, cache = model(idx, iters=iters)[0], KVCache(model, 2, iters)
        assert_close(step(model, idx[:, :5], cache), whole[:, 4])
        assert_close(step(model, idx[:, 5:6], cache), whole[:, 5])
        assert_close(step(model, idx[:, 6:9], cache), whole[:, 8])  # several
        assert_close(step(model, idx[1:, 9:10], cache, rows=[1]), whole[1:, 9])
        ragged = torch.stack([idx[0, 9:12], torch.cat([idx[1, 10:], idx[1, :1]])])  # the second is padded
        assert_close(step(model, ragged, cache, [3, 2]), whole[:, 11])


ALONE = [{}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}]
ALONE += [{"early_exit": early_exit} for early_exit in EXITS]


@pytest.mark.parametrize("mode", ["full", "last"])
@pytest.mark.parametrize("options", ALONE, ids=str)
def test_a_batch_equals_its_rows_alone(options, mode):
    model, alone, stats, batch_stats = settling_model("recall", block_size=S), [], Stats(), Stats()
    options = {**options, "cache_mode": mode}
    batch = generate(model, PROMPTS, 20, 8, seed=7, stats=batch_stats, **options)
    for b, prompt in enumerate(PROMPTS):
        alone += generate(model, [prompt], 20, 8, seed=7 + b, stats=stats, **options)
    assert batch == alone and batch_stats.iters == stats.iters
    assert (len(stats.iters) > 1) == ("early_exit" in options)


def test_a_seed_draws_the_same_again_and_another_seed_does_not():
    runs = [generate(make(block_size=S), PROMPTS, 20, 3, seed=seed, temperature=1.0) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]


def test_rows_that_end_leave_the_batch_and_the_others_do_not_notice():
    model = make(block_size=S)
    alone = generate(model, PROMPTS, 20, 2)
    stop, shapes = alone[1][5], count_body_calls(model)
    end = [new[: new.index(stop)] if stop in new else new for new in alone]
    assert generate(model, PROMPTS, 20, 2, stop_token=stop) == end
    steps = sum(min(20, len(new) + 1) for new in end)  # one more draws the stop token
    assert sum(rows for rows, _ in shapes) == 2 * steps < 2 * 20 * len(PROMPTS)
    assert generate(model, PROMPTS, 20, 2, stop_token=stop, draft_iters=1) == end


@pytest.mark.parametrize("options", [{}, {"draft_iters": 1}, {"early_exit": "kl:1e-30"}], ids=str)
@pytest.mark.parametrize("lower, margin", [(torch.nn.Module.bfloat16, 0.1), (decode.quantize, 0.3)])
def test_lower_precision_chooses_as_float32_does_within_its_own(lower, margin, options):
    exact, model = make(block_size=64), lower(make(block_size=64))
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, 20, 3, **options)):
        assert_best(uncached_logits(exact, prompt, new, 3), new, margin)  # of logits up to 8
        assert_best(uncached_logits(model, prompt, new, 3).float(), new, margin=0.1)


def test_bfloat16_draws_tokens_that_are_likely_in_float32():
    exact, model = make(block_size=64), make(block_size=64).bfloat16()
    keys = dict(temperature=1.0, top_k=10, top_p=0.8, seed=7)
    drawn = generate(model, PROMPTS, 40, 3, **keys)
    assert drawn == generate(model, PROMPTS, 40, 3, **keys)
    for prompt, new in zip(PROMPTS, drawn):
        p = distribution(uncached_logits(exact, prompt, new, 3), temperature=1.0, top_k=11, top_p=0.85)
        assert len(new) == 40 and (p[range(40), new] > 0).all()


@pytest.mark.parametrize(
    "mode, looks, slots", [("full", False, 2 + 2 * 8), ("full", True, 1 + 3 * 8), ("last", True, 2 + 2)]
)
def test_slots_of_a_cache_of_1_2_1_blocks(mode, looks, slots):
    cache = KVCache(make(), 3, 8, mode, looks)
    assert cache.keys.shape == cache.values.shape == (slots, 3, 2, 32, 8)


# ------------------------------------------------------------------------------------------------- early exit


class Whole:
    """The reference: a whole sequence at once, token t running depths[t] iterations; at the iterations that
    it skips, the others see its last keys and values. Where early exit looks at the Tail in every iteration,
    these are of the Tail too."""

    mask, causal = None, True

    def __init__(self, depths, looks=False):
        self.depths, self.looks, self.last = torch.tensor(depths), looks, {}

    def at(self, part, i, k=0):
        self.where = part, i, k
        return self

    def store(self, k, v):
        part, i, iteration = self.where
        if iteration > 0:
            frozen = (self.depths <= iteration)[:, None]
            k, v = (torch.where(frozen, old, new) for old, new in zip(self.last[part, i], (k, v)))
        self.last[part, i] = k, v
        return k, v

    @torch.no_grad()
    def logits(self, model, ids):
        idx, u, z = torch.tensor([ids]), 0, 0
        rope = model.rope(idx)
        h = model.run_head(idx, rope, self)
        x = model.start(h)
        for k in range(max(self.depths)):
            new, next_x = model.advance(x, h, k, k + 1, rope, self)
            runs = (self.depths > k)[:, None]
            u, x = torch.where(runs, new, u), torch.where(runs, next_x, x)
            if self.looks:
                z = torch.where(runs, model.run_tail(u, rope, self, k), z)
        return model.logits(z if self.looks else model.run_tail(u, rope, self))[0]


def read(model, idx, early_exit, chunks, mode="full"):
    """Read idx (B, T) with early exit in chunks of so many tokens -> logits after each, and the depths of all
    tokens, (B, T)."""
    cache = KVCache(model, len(idx), 8, mode, looks=early_exit.startswith("kl"))
    rule, logits, depths, start = decode.parse_exit(early_exit), [], [], 0
    for T in chunks:
        kv = Chunk(cache, T)
        part = idx[:, start : start + T]
        z, depth = decode.adaptive_states(model, part, kv, rule, torch.ones_like(part).bool())
        logits.append(model.logits(z))
        depths.append(depth)
        cache.lengths, start = [start + T] * len(idx), start + T
    return torch.cat(logits, 1), torch.cat(depths, 1)


@pytest.mark.parametrize("early_exit", EXITS)
@pytest.mark.parametrize("rule", ["abbie_d", "recall"])
def test_early_exit_equals_the_masked_reference_and_skips_the_work(rule, early_exit):
    model, idx = settling_model(rule), tokens(3, 24)
    calls = count_body_calls(model)
    logits, depths = read(model, idx, early_exit, [1] * 24)
    assert len(depths.unique()) > 1
    assert sum(B for B, T in calls) == depths.sum(), "rows that have settled are not computed on"
    for b in range(3):
        wanted = Whole(depths[b].tolist(), early_exit.startswith("kl")).logits(model, idx[b].tolist())
        assert_close(logits[b], wanted)


@pytest.mark.parametrize("early_exit", EXITS)
@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_read_at_once_equals_one_read_token_by_token(rule, early_exit):
    model, idx = settling_model(rule), tokens(3, 24)
    wanted, depths = read(model, idx, early_exit, [1] * 24)
    for chunks in ([24], [10, 1, 13]):
        calls = count_body_calls(model)
        logits, found = read(model, idx, early_exit, chunks)
        assert torch.equal(found, depths)
        assert_close(logits, wanted)
        rows = [[int((depths[b] > k).sum()) for b in range(3)] for k in range(8)]
        if chunks == [24]:  # iteration k works on the tokens that still move, padded to the longest row's
            assert calls == [(sum(n > 0 for n in row), max(row)) for row in rows if any(row)]


def test_one_slot_reads_a_prompt_as_the_full_cache_does():
    model, idx = settling_model("recall"), tokens(2, 20)
    for early_exit in EXITS:
        full, last = (read(model, idx, early_exit, [20], mode) for mode in ("full", "last"))
        assert torch.equal(full[1], last[1])
        assert_close(full[0], last[0])


@pytest.mark.parametrize("mode", ["full", "last"])
def test_a_threshold_that_nothing_meets_is_plain_decoding(mode):
    model = make(block_size=S)
    plain = generate(model, PROMPTS, 20, 4, cache_mode=mode)
    for early_exit in ("kl:1e-30", "u:1e-30"):
        assert generate(model, PROMPTS, 20, 4, early_exit=early_exit, cache_mode=mode) == plain


# ---------------------------------------------------------------------------------------- the last-slot cache


class Appending:
    """The reference for mode "last", a token at a time: past keys and values are of the last iteration."""

    mask, causal = None, False

    def __init__(self):
        self.past, self.now = {}, {}

    def at(self, part, i, k=0):
        self.where = part, i
        return self

    def store(self, *new):
        empty = [x[:, :, :0] for x in new]
        pairs = zip(self.past.get(self.where, empty), new)
        self.now[self.where] = [torch.cat(pair, dim=2) for pair in pairs]
        return self.now[self.where]


@pytest.mark.parametrize("rule", RULES)
def test_mode_last_keeps_the_last_iteration_of_an_exact_prompt(rule):
    model, idx, iters = make(rule=rule), torch.arange(10, 22)[None], 4
    cache, ref = KVCache(model, 1, iters, mode="last"), Appending()
    for start, end in ((0, 5), *((t, t + 1) for t in range(5, 12))):
        got = step(model, idx[:, start:end], cache)
        rope = tuple(table[start:end] for table in model.rope_on(idx.device))
        ref.causal = start == 0
        with torch.no_grad():
            [z] = model.states_at(idx[:, start:end], [iters], rope, ref)
            assert_close(got, model.logits(z)[:, -1])
        ref.past = dict(ref.now)
        if start == 0:
            assert_close(got, model(idx[:, :5], iters=iters)[0][:, -1])


# ---------------------------------------------------------------------------------- self-speculative decoding


@pytest.mark.parametrize("rule", RULES)
def test_drafting_changes_no_token_past_the_context(rule):
    prompts = PROMPTS[1:3]
    for seed, (iters, draft_iters, draft_tokens) in enumerate([(2, 1, 1), (8, 2, 4), (4, 3, 20)]):
        model = make(seed, rule=rule, block_size=S)
        keys = dict(draft_iters=draft_iters, draft_tokens=draft_tokens)
        for prompt, new in zip(prompts, generate(model, prompts, S + 6, iters, **keys)):
            assert len(new) == S + 6
            assert_greedy(model, prompt, new, iters)


def test_the_drafts_iterations_are_not_repeated():
    model = make()
    calls = count_body_calls(model)
    generate(model, [[1, 2, 3]], 1 + 12, 8, draft_iters=3, draft_tokens=4)
    rounds, prefill = [], 8
    for shape in calls[prefill:]:
        rounds += [[]] if shape[1] == 1 and (not rounds or rounds[-1][-1] > 1) else []
        rounds[-1].append(shape[1])
    for widths in rounds:
        n = max(widths[-1], 1)
        assert widths == [1] * (3 * n) + [n] * 5  # 3 iterations token by token, the other 5 together


def test_sampling_with_a_draft_is_distributed_as_without():
    keys = dict(vocab_size=4, n_embd=16, n_attn_heads=2, n_head_blocks=0, n_body_blocks=1, block_size=8)
    model = make(rule="abbie_c", **keys)
    prompt, iters, draft_iters, runs = [1, 2], 3, 1, 300
    triples = list(itertools.product(range(4), repeat=3))

    @torch.no_grad()
    def misfit(*depths):
        """Pearson's chi-square of the triples drawn, where each token is due at its depth; cells below 3
        expected runs merged; over the number of cells: 1 is due."""
        due = dict.fromkeys(triples, float(runs))
        for new, n in itertools.product(triples, range(3)):
            logits = model(torch.tensor([prompt + list(new[:n])]), iters=depths[n])[0][:, -1]
            due[new] *= float(distribution(logits, 1.0, 0, 1.0)[0, new[n]])
        small = [new for new in triples if due[new] < 3]
        pairs = [(counts[new], due[new]) for new in triples if new not in small]
        pairs.append((sum(counts[new] for new in small), sum(due[new] for new in small) + 1e-9))
        return sum((seen - due) ** 2 / due for seen, due in pairs) / len(pairs)

    drafts = dict(draft_iters=draft_iters, temperature=1.0)
    drawn = [generate(model, [prompt], 3, iters, seed=seed, **drafts)[0] for seed in range(runs)]
    counts = Counter(map(tuple, drawn))
    assert misfit(iters, iters, iters) < 1.6
    assert misfit(iters, draft_iters, iters) > 3  # what accepting every draft would give


# ----------------------------------------------------------------------------------- weights for decoding


def as_int8(linear: torch.nn.Linear) -> torch.Tensor:
    """What int8 makes of a matrix: the nearest of 255 steps of each row."""
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    return (linear.weight / step).round() * step


@torch.no_grad()
def test_int8_multiplies_by_its_rounded_weights():
    linear, x = torch.nn.Linear(96, 40, bias=False), torch.randn(5, 7, 96) * torch.logspace(-3, 3, 7)[:, None]
    got = decode.Int8Linear(linear)(x)
    scale = x.abs().amax(-1, keepdim=True) / 63
    wanted = (x / scale).round() * scale @ as_int8(linear).T
    assert ((got - wanted).abs() <= 2e-3 * wanted.abs().amax(-1, keepdim=True)).all()  # ties in rounding
    assert_close(torch.cat([decode.Int8Linear(linear)(row[None]) for row in x]), got)


def test_laying_out_for_decoding_changes_no_value():
    model, other = make(), decode.lay_out_for_decoding(make())
    assert other.embed.weight is other.unembed.weight and not other.unembed.weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert generate(model, PROMPTS[:1], 12, 3) == generate(other, PROMPTS[:1], 12, 3)


# ------------------------------------------------------------------------------------------- choosing a token


def test_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 1.0]])
    p = distribution(logits, 0.5, 0, 1.0)
    assert_close(p, (logits.double() / 0.5).softmax(-1))
    assert distribution(logits, 0, 3, 0.5).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert (distribution(logits, 1.0, 2, 1.0) > 0).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert (distribution(logits, 1.0, 0, 0.7) > 0).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]  # 0.64 + 0.24
    assert (distribution(logits, 1.0, 0, 0.6) > 0).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert distribution(logits, 1e-300, 0, 1.0)[0].tolist() == [1, 0, 0, 0]
    assert_close(distribution(logits, 1.0, 3, 0.9).sum(-1), torch.ones(2, dtype=torch.float64))


def test_draws_follow_the_distribution_and_never_hit_a_zero():
    p, rng = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64), random.Random(0)
    counts = torch.bincount(torch.tensor([draw(p, [rng])[0] for _ in range(4000)]), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert (counts / 4000 - p[0]).abs().max() < 0.03


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "prompts, n, message",
    [
        ([], 5, "no tokens"),
        ([[1], []], 5, "no tokens"),
        ([[1] * 33], 5, "longer than"),
        ([[1], [97]], 5, "of 97"),
        ([[1]], 0, "max_new_tokens"),
    ],
)
def test_bad_calls_are_refused(prompts, n, message):
    with pytest.raises(UserError, match=message):
        generate(make(), prompts, n)


def test_what_does_not_fit_into_a_cache_is_refused():
    model = make()
    with pytest.raises(UserError, match="do not fit"):
        step(model, torch.ones(1, 33, dtype=torch.int64), KVCache(model))
