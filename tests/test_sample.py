"""sample.py: decoding, against whole sequences without a cache; streamed text; the lens; flags."""

import os
import pty
import random
import signal
import subprocess
from functools import partial

import pytest
import torch
from common import ROOT, calls_of, make, refused, save, start_python, tokens
from torch.nn import functional as F

import sample
from checkpoint import load_model
from data import get_tokenizer
from model import MAX_ITERS
from sample import Chunk, KVCache, Stats, distribution, draw, generate, settle, step

S = 16  # context of most models here
assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
DRAWN = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
OPTIONS = [DRAWN, {"cache_mode": "last", **DRAWN}, {"early_exit": "kl:1e-3"}]
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


# -------------------------------------------------------------------------------------------- plain decoding


@pytest.mark.parametrize("rule", MAX_ITERS)
def test_cached_decoding_equals_uncached_past_the_context(rule):
    model = make(rule=rule, block_size=S)
    for iters in (1, 2, 3, 8):
        for prompt, new in zip(PROMPTS, generate(model, PROMPTS, S + 6, iters)):
            assert len(new) == S + 6
            assert_best(uncached_logits(model, prompt, new, iters), new)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_equals_its_rows_alone(options):
    model, stats, batch_stats, alone = calm("recall", block_size=S), Stats(), Stats(), []
    batch = generate(model, PROMPTS, 20, 8, seed=7, stats=batch_stats, **options)
    for b, prompt in enumerate(PROMPTS):
        alone += generate(model, [prompt], 20, 8, seed=7 + b, stats=stats, **options)
    assert batch == alone and batch_stats.iters == stats.iters
    assert (len(stats.iters) > 1) == ("early_exit" in options)
    again, other = (generate(model, PROMPTS, 20, 8, seed=seed, **options) for seed in (7, 8))
    assert again == batch and (other == batch) == ("early_exit" in options)


def test_a_row_ends_with_any_stop_token_and_the_others_go_on():
    model = make(block_size=S)
    alone = generate(model, PROMPTS, 20, 2)
    stops = frozenset({alone[1][5], alone[3][9]})
    ends = [next((i for i, token in enumerate(new) if token in stops), 20) for new in alone]
    wanted = [new[:end] for new, end in zip(alone, ends)]
    assert min(ends) < 20 and generate(model, PROMPTS, 20, 2, stop_tokens=stops) == wanted
    assert generate(model, PROMPTS, 20, 2, stop_tokens=stops, draft_iters=1) == wanted


@pytest.mark.parametrize("options", [{}, {"draft_iters": 1}], ids=str)
def test_bf16_chooses_as_float32_does_within_its_own_precision(options):
    exact, half = make(block_size=64), make(block_size=64).bfloat16()
    for prompt, new in zip(PROMPTS, generate(half, PROMPTS, 20, 3, **options)):
        assert_best(uncached_logits(exact, prompt, new, 3), new, margin=0.1)  # of logits up to 8


def test_a_cache_is_as_large_as_needed(monkeypatch):
    model, lengths = make(), []
    assert KVCache(model, 3, 8).keys.shape == (4 + 7 * 2, 3, 2, 33, 8)  # slots, rows, heads, places, channels
    assert KVCache(model, 3, 8, mode="last").keys.shape == (4, 3, 2, 33, 8)

    def watched(*args, length, **keys):
        lengths.append(length)
        return KVCache(*args, length=length, **keys)

    monkeypatch.setattr(sample, "KVCache", watched)
    generate(model, [[1, 2], [3]], 5, 2)
    assert lengths == [2 + 5]


# -------------------------------------------------------------------------------- one slot, and early exit


class Appending:
    """The reference for one slot per block, without a cache's places: what the new tokens last wrote stands
    behind what the old ones left. `frozen` (T, 1): tokens that write no more."""

    def __init__(self):
        self.past, self.now, self.frozen = {}, {}, None

    def at(self, index, k):
        self.index = index
        return self

    def extend(self, *new):
        if self.frozen is not None and self.index in self.now:
            new = [torch.where(self.frozen, old, one) for old, one in zip(self.now[self.index], new)]
        self.now[self.index], past = new, self.past.get(self.index)
        keys, values = new if past is None else (torch.cat(pair, dim=2) for pair in zip(past, new))
        T, end = new[0].shape[2], keys.shape[2]
        return keys, values, torch.arange(end) <= torch.arange(end - T, end)[:, None]

    def keep(self):
        for index, new in self.now.items():
            past = self.past.get(index)
            self.past[index] = new if past is None else [torch.cat(pair, dim=2) for pair in zip(past, new)]
        self.now, self.frozen = {}, None


CHUNKS = [(0, 5), *((t, t + 1) for t in range(5, 24))]  # a prompt, then token by token


def calm(rule, **keys):
    """A model some of whose tokens settle after two iterations and some after more."""
    model = make(rule=rule, seed=3, **keys)
    if rule == "recall":  # calmer, so that it settles at all
        with torch.no_grad():
            for block in model.body:
                block.attn.out.weight.mul_(0.3)
                block.mlp.down.weight.mul_(0.3)
    return model


@pytest.mark.parametrize("rule", MAX_ITERS)
@torch.no_grad()
def test_one_slot_holds_what_the_last_iteration_wrote(rule):
    model, idx = make(rule=rule), tokens(1, 24)
    cache, reference = KVCache(model, 1, 4, mode="last"), Appending()
    for start, end in CHUNKS:
        positions = torch.arange(start, end)[None]
        x, cos_sin = model.embed(idx[:, start:end]), model.cos_sin(idx, positions)
        [z] = model.sweep(x, [4], cos_sin, reference)
        reference.keep()
        assert_close(step(model, idx[:, start:end], cache), model.logits(z)[:, -1])


@pytest.mark.parametrize("rule", ["abbie_d", "recall"])
@torch.no_grad()
def test_early_exit_equals_the_uncached_rule_with_masks(rule):
    """A token whose prediction changes by less than the threshold keeps its state, keys and values."""
    model, idx, iters, threshold = calm(rule), tokens(1, 24), 8, 1e-3
    cache, reference, depths = KVCache(model, 1, iters, mode="last"), Appending(), []
    for start, end in CHUNKS:
        part, positions = idx[:, start:end], torch.arange(start, end)[None]
        cos_sin = model.cos_sin(idx, positions)
        h = model.run(model.head, model.embed(part), cos_sin, reference)
        x, logits, ran = h, None, torch.zeros(end - start, dtype=torch.int64)
        runs = torch.ones(end - start, 1, dtype=torch.bool)
        for k in range(iters):
            reference.frozen = ~runs
            u, new = model.iterate(x, h, k, k + 1, cos_sin, reference)
            x = torch.where(runs, new, x)
            found = model.logits(model.norm(model.run(model.tail, u, cos_sin, reference)))
            before, logits = logits, found if logits is None else torch.where(runs, found, logits)
            ran += runs[:, 0]
            if before is not None:
                p, q = logits.softmax(-1), before.softmax(-1)
                runs = runs & ((p * (p / q).log()).sum(-1) >= threshold)[0, :, None]
        reference.keep()

        chunk = Chunk(cache, [end - start])
        z, found = settle(model, model.embed(part), cos_sin, chunk, iters, threshold)
        cache.lengths = [end]
        assert_close(model.logits(z), logits)
        assert found[0].tolist() == ran.tolist()
        depths += ran.tolist()
    assert len(set(depths)) > 1 and max(depths) <= iters


def test_a_settled_token_costs_no_more_iterations():
    model, stats = calm("recall"), Stats()
    calls = calls_of(model.body[0])
    generate(model, [[5]], 20, 8, early_exit="kl:1e-3", stats=stats)
    assert len(calls) == sum(k * n for k, n in stats.iters.items()) < 8 * 20
    plain = generate(model, PROMPTS, 10, 4, cache_mode="last")
    assert generate(model, PROMPTS, 10, 4, early_exit="kl:1e-30") == plain


# ---------------------------------------------------------------------------------- self-speculative decoding


@pytest.mark.parametrize("rule", MAX_ITERS)
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
    calls = calls_of(model.body[0])
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
    refused("not finite", distribution, logits / 0, 1.0, 0, 1.0)


def test_draws_follow_the_distribution_and_never_hit_a_zero():
    p, rng = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64), random.Random(0)
    counts = torch.bincount(torch.tensor([draw(p, [rng])[0] for _ in range(4000)]), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert (counts / 4000 - p[0]).abs().max() < 0.03


# ------------------------------------------------------------------------------------------------ text, lens


def test_characters_that_span_tokens_come_whole(monkeypatch):
    def speak(ids: bytes) -> list[str]:
        monkeypatch.setattr(sample, "stream", lambda *args, **options: ((0, i) for i in ids))
        return [piece for _, piece in sample.stream_text(None, get_tokenizer("bytes"), [[1]], 9, 1)]

    assert speak("aé中🙂b".encode()) == ["a", "", "é", "", "", "中", "", "", "", "🙂", "b", ""]
    assert "".join(speak(b"a\xe4\xb8")) == "a\ufffd"  # cut in the middle
    assert speak([97, 300, 98]) == ["a", "", "b", ""]  # 300: of a vocab_size beyond the tokenizer's


def test_the_lens_shows_the_best_token_of_every_position_and_iteration():
    model, tokenizer, iters = make(vocab_size=257), get_tokenizer("bytes"), [1, 2, 4]
    ids = list(b"a\nbc")
    title, *rows, kl = sample.lens(model, tokenizer, ids, iters, last=3).splitlines()
    assert title.split() == ["after", "r=1", "r=2", "r=4"]
    assert [row.split()[0] for row in rows] == ["\\n", "b", "c"], "the last three tokens"
    logits = torch.cat(list(model.logits_at(torch.tensor([ids]), iters)))[:, 1:]  # (R, T, V)
    p, best = logits.softmax(-1).max(-1)
    for t, row in enumerate(rows):
        for r in range(3):
            assert f"{p[r, t]:.0%}" in row
        assert row.count("*") == sum(best[r, t] != best[r - 1, t] for r in (1, 2))
    p, q = logits[0].log_softmax(-1), logits[1].log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert float(kl.split()[1]) == pytest.approx(expected, rel=0.2)


# --------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with two runs, the second one newer and nested."""
    folder = tmp_path_factory.mktemp("work")
    for name, seed in (("old", 1), ("study/new", 2)):
        save(folder / "out" / name, 1, make(seed, vocab_size=257, block_size=64))
    (folder / "prompt.txt").write_text("def \n")
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*args):
        sample.main([*args, "--max_new_tokens=20"])
        return capsys.readouterr()

    return run


def best(model, n: int, iters: int, prompt=b"def ") -> str:
    """The text that the best tokens make."""
    [ids] = generate(model, [list(prompt) or [256]], n, iters, stop_tokens={256})
    return get_tokenizer("bytes").decode(ids)


def test_only_generated_text_is_on_stdout(cli):
    flags = ["--iters=3", "--temperature=0"]
    out, err = cli("--prompt", "def ", *flags)
    assert out == best(load_model("out/study/new"), 20, 3) + "\n"
    for part in ("out/study/new/step_00000001", "def ", "tokens/s", "3 iterations per token"):
        assert part in err
    assert cli("--prompt_file=prompt.txt", *flags).out == out, "the file's final newline is no prompt"
    drafted = cli("--prompt", "def ", *flags, "--draft_iters=1")
    assert drafted.out == out and "drafted tokens accepted" in drafted.err
    older = cli("--prompt", "def ", *flags, "--ckpt=out/old").out
    assert older == best(load_model("out/old"), 20, 3) + "\n" != out
    unprompted = best(load_model("out/study/new"), 20, 3, b"")  # begins with end-of-text
    assert cli(*flags).out == unprompted + "\n"


def test_samples_and_several_iters_follow_one_another(cli):
    five, six = (cli("--prompt", "def ", f"--seed={seed}").out for seed in (5, 6))
    assert cli("--prompt", "def ", "--num_samples=2", "--seed=5").out == f"{five}---\n{six}"
    one, four = (cli("--prompt", "def ", f"--iters={r}").out for r in (1, 4))
    both = cli("--prompt", "def ", "--iters=1,4")
    assert both.out == f"{one}---\n{four}"
    assert "iters 1: def " in both.err and "iters 4: def " in both.err


def test_early_exit_reports_its_iterations(cli):
    err = cli("--prompt", "x" * 70, "--iters=8", "--exit", "kl:1e-2").err
    assert "the prompt has 70 tokens, of which the model's context takes the last 64" in err
    assert "iterations per token, the prompt's included (" in err


def test_a_sample_needs_no_prompt_nor_any_input(folder):
    ours, theirs = pty.openpty()
    flags, printed = ["--iters=8", "--max_new_tokens=20", "--top_k=0", "--temperature=3"], []
    for pipes in (
        {"stdout": theirs, "stdin": theirs},
        {"stdin": subprocess.PIPE},
        {"preexec_fn": lambda: os.close(0)},
    ):
        with start_python([ROOT / "sample.py", *flags], folder, **pipes) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out)
    assert printed[1] == printed[2] != b"\n"
    os.close(theirs)
    shown = os.read(ours, 10_000).replace(b"\r\n", b"\n")
    os.close(ours)
    assert shown.startswith(b"") and not any(byte < 32 and byte not in b"\n\t" for byte in shown)


def test_text_comes_while_it_is_generated(folder):
    """Killed at its first bytes, the process has written the beginning of its text and not the end."""
    whole = best(load_model(folder / "out" / "study/new"), 150, 8).encode()
    flags = ["--prompt=def ", "--iters=8", "--temperature=0", "--max_new_tokens=2000"]  # for seconds
    with start_python([ROOT / "sample.py", *flags], folder, {"PYTHONUNBUFFERED": ""}) as process:
        first = os.read(process.stdout.fileno(), 1)
        alive = process.poll() is None
        process.kill()
        out, err = process.communicate()
    assert alive and process.returncode == -signal.SIGKILL and b"tokens/s" not in err
    assert len(first + out) < len(whole) and whole.startswith(first + out)


def test_before_any_training_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "--ckpt models/chains_abbie_d\n.*train.py config/abbie_tiny.py"
    refused(message, sample.main, ["--iters=8"])


def test_bad_prompts_are_refused():
    model = make()
    refused("no tokens", generate, model, [[1], []], 5)
    refused("longer than", generate, model, [[1] * 33], 5)
    refused("of 97", generate, model, [[1], [97]], 5)
