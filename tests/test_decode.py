"""The specification of decode.py. References are whole sequences without a cache."""

import random
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
            assert_best(uncached_logits(model, prompt, new, iters), new)


ALONE = [{"early_exit": early_exit} for early_exit in EXITS]
ALONE += [{"temperature": 1.0, "top_k": 20, "top_p": 0.9}]


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


def test_the_last_slot_cache_takes_the_memory_of_one_iteration():
    for cache in (KVCache(make(), 3, 8, mode="last"), KVCache(make(), 3, 1)):
        assert cache.keys.shape == cache.values.shape == (4, 3, 2, 32, 8)  # blocks, rows, heads, places


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
    cache = KVCache(model, len(idx), 8, mode, tail_every_iter=early_exit.startswith("kl"))
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
    for chunks, mode in (([10, 1, 13], "full"), ([24], "last"), ([24], "full")):
        calls = count_body_calls(model)
        logits, found = read(model, idx, early_exit, chunks, mode)
        assert torch.equal(found, depths)
        assert_close(logits, wanted)
    # Iteration k works on the tokens that still move, padded to as many as the longest row has.
    assert [T for B, T in calls] == [(depths > k).sum(1).max() for k in range(depths.max())]


def test_a_threshold_that_nothing_meets_is_plain_decoding_with_one_slot_too():
    model, keys = make(block_size=S), {"cache_mode": "last"}
    plain = generate(model, PROMPTS, 20, 4, **keys)
    for early_exit in ("kl:1e-30", "u:1e-30"):
        assert generate(model, PROMPTS, 20, 4, early_exit=early_exit, **keys) == plain


# ---------------------------------------------------------------------------------------- the last-slot cache


class Appending:
    """The reference for mode "last": past keys and values are those of the last iteration."""

    mask, causal = None, False

    def __init__(self):
        self.past, self.now = {}, {}

    def at(self, part, i, k=0):
        self.where = part, i
        return self

    def store(self, *new):
        self.now[self.where] = new
        if self.where in self.past:
            self.now[self.where] = [torch.cat(pair, dim=2) for pair in zip(self.past[self.where], new)]
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


# ---------------------------------------------------------------------------------- self-speculative decoding


@pytest.mark.parametrize("rule", RULES)
def test_drafting_changes_no_token_past_the_context(rule):
    prompts = PROMPTS[1:3]
    for seed, (iters, draft_iters, draft_tokens) in enumerate([(2, 1, 1), (8, 2, 4), (4, 3, 20)]):
        model = make(seed, rule=rule, block_size=S)
        keys = dict(draft_iters=draft_iters, draft_tokens=draft_tokens)
        for prompt, new in zip(prompts, generate(model, prompts, S + 6, iters, **keys)):
            assert len(new) == S + 6
            assert_best(uncached_logits(model, prompt, new, iters), new)


def test_the_drafts_iterations_are_not_repeated():
    model, stats = make(), Stats()
    calls = count_body_calls(model)
    generate(model, [[1, 2, 3]], 1 + 10, 8, draft_iters=3, draft_tokens=4, stats=stats)
    assert stats.accepted == stats.drafted == 8  # in two rounds
    # Each takes 5 tokens through 3 iterations one by one, and through the other 5 together.
    assert [T for B, T in calls] == [3] * 8 + 2 * ([1] * 5 * 3 + [5] * 5)


@torch.no_grad()
def test_sampling_with_a_draft_is_distributed_as_without():
    """The second token, the first one that is drafted, comes as often as is due after each first."""
    keys = dict(vocab_size=4, n_embd=16, n_attn_heads=2, n_head_blocks=0, n_body_blocks=1, block_size=8)
    model, runs = make(rule="abbie_c", **keys), 400

    def likely(ids, iters):
        return model(torch.tensor([ids]), iters=iters)[0][0, -1].softmax(-1)

    def due(iters):
        return torch.stack([likely([1, 2], 3)[a] * likely([1, 2, a], iters) for a in range(4)])

    seen = torch.zeros(4, 4)
    for first, second, _ in generate(model, [[1, 2]] * runs, 3, 3, draft_iters=1, temperature=1.0):
        seen[first, second] += 1 / runs
    assert (seen - due(3)).abs().sum() < 0.2  # chance alone makes 0.13
    assert (seen - due(1)).abs().sum() > 0.4  # what accepting every draft would give


# ----------------------------------------------------------------------------------- weights for decoding


@torch.no_grad()
def test_int8_multiplies_rounded_inputs_by_rounded_weights():
    linear, scales = torch.nn.Linear(96, 40, bias=False), torch.logspace(-3, 3, 7)
    x = torch.randn(5, 7, 96) * scales[:, None]

    def rounded(rows, steps):
        step = rows.abs().amax(-1, keepdim=True) / steps
        return (rows / step).round() * step

    got = decode.Int8Linear(linear)(x)
    wanted = rounded(x, 63) @ rounded(linear.weight, 127).T
    ties = 2e-3 * wanted.abs().amax(-1, keepdim=True)  # may be rounded either way
    assert ((got - wanted).abs() <= ties).all()
    assert_close(torch.cat([decode.Int8Linear(linear)(row[None]) for row in x]), got)


def test_laying_out_for_decoding_changes_no_value():
    model, other = make(), decode.lay_out_for_decoding(make())
    assert other.embed.weight is other.unembed.weight and not other.unembed.weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert generate(model, PROMPTS[:1], 12, 3) == generate(other, PROMPTS[:1], 12, 3)


# ------------------------------------------------------------------------------------------- choosing a token


def test_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 1.0]])
    assert_close(distribution(logits, 0.5, 0, 1.0), (logits.double() / 0.5).softmax(-1))
    assert distribution(logits, 0, 3, 0.5).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    for top_k, top_p, kept in (
        (2, 1.0, [[1, 1, 0, 0], [0, 1, 1, 0]]),
        (0, 0.7, [[1, 1, 0, 0], [0, 1, 1, 0]]),  # 0.64 + 0.24
        (0, 0.6, [[1, 0, 0, 0], [0, 1, 1, 0]]),
    ):
        p = distribution(logits, 1.0, top_k, top_p)
        assert (p > 0).tolist() == kept
        assert_close(p.sum(-1), torch.ones(2).double())
    assert distribution(logits, 1e-300, 0, 1.0)[0].tolist() == [1, 0, 0, 0]


def test_draws_follow_the_distribution_and_never_hit_a_zero():
    p, rng = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64), random.Random(0)
    counts = torch.bincount(torch.tensor([draw(p, [rng])[0] for _ in range(4000)]), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert (counts / 4000 - p[0]).abs().max() < 0.03


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "prompts, message", [([[1], []], "no tokens"), ([[1] * 33], "longer than"), ([[1], [97]], "of 97")]
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        generate(make(), prompts, 5)
