"""sample.py: decoding, against whole sequences without a cache; streamed text; the lens; flags."""

import os
import pty
import signal
from collections import Counter

import pytest
import torch
from common import ROOT, calls_of, make, refused, save, start_python, tokens
from torch.nn import functional as F
from torch.testing import assert_close

import sample
from checkpoint import load_model
from data import get_tokenizer
from model import MAX_ITERS
from sample import Decoding, KVCache, generate, step

S = 16  # context of most models here
PROMPTS = [[5, 6, 7], list(range(20, 30)), [3] * S, [4]]  # ragged; one fills its context
DRAWN = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
EXIT = {"early_exit": 1e-3}
EXACT = [(rule, "float32", 1e-4) for rule in MAX_ITERS]


@torch.no_grad()
def assert_best(new, model, prompt, iters, margin=1e-4):
    """Every new id is the best of its logits, or within the margin of it, in whole sequences without a cache.
    A full context goes on with its last half."""
    context, i = list(prompt), 0
    while i < len(new):
        chunk = new[i : i + S + 1 - len(context)]
        logits = model(torch.tensor([context + chunk[:-1]]), iters=iters)[0][0, len(context) - 1 :]
        chosen = logits.gather(1, torch.tensor(chunk)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < margin
        context, i = (context + chunk)[-(S // 2) :], i + len(chunk)


# ------------------------------------------------------------------------------- plain decoding, and drafting


@pytest.mark.parametrize("drafting", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("rule, dtype, margin", [*EXACT, ("abbie_d", "bfloat16", 0.1)])
def test_tokens_are_those_of_whole_sequences_past_the_context(rule, dtype, margin, drafting):
    exact, model = make(rule=rule, block_size=S), make(rule=rule, block_size=S)
    model.to(getattr(torch, dtype))
    for iters, draft_iters, draft_tokens in [(2, 1, 1), (8, 2, 4), (4, 3, 20)]:
        prompts, options = PROMPTS, {}
        if drafting:  # one prompt after the other
            prompts = PROMPTS[1:3]
            options = dict(draft_iters=draft_iters, draft_tokens=draft_tokens)
        for prompt, new in zip(prompts, generate(model, prompts, S + 6, iters, **options)):
            assert len(new) == S + 6
            assert_best(new, exact, prompt, iters, margin)


@pytest.mark.parametrize("options", [DRAWN, {"cache_mode": "last", **DRAWN}, EXIT], ids=str)
def test_a_batch_equals_its_rows_alone(options):
    model, stats, batch_stats, alone = make(block_size=S), Counter(), Counter(), []
    batch = generate(model, PROMPTS, 20, 8, seed=7, stats=batch_stats, **options)
    for b, prompt in enumerate(PROMPTS):
        alone += generate(model, [prompt], 20, 8, seed=7 + b, stats=stats, **options)
    assert batch == alone and batch_stats == stats


def test_a_row_ends_with_any_stop_token_and_the_others_go_on():
    model = make(block_size=S)
    alone = generate(model, PROMPTS, 20, 2)
    stops = frozenset({alone[1][5], alone[3][9]})
    ends = [next((i for i, token in enumerate(new) if token in stops), 20) for new in alone]
    wanted = [new[:end] for new, end in zip(alone, ends)]
    assert min(ends) < 20
    for draft_iters in (0, 1):
        assert generate(model, PROMPTS, 20, 2, stop_tokens=stops, draft_iters=draft_iters) == wanted


def test_a_cache_is_as_large_as_needed(monkeypatch):
    model, lengths = make(), []
    assert KVCache(model, 3, 8).keys.shape == (4 + 7 * 2, 3, 2, 33, 8)  # slots, B, K, S + 1, E
    assert KVCache(model, 3, 8, mode="last").keys.shape == (4, 3, 2, 33, 8)
    init = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda *args: lengths.append(args[-1]) or init(*args))
    generate(model, [[1, 2], [3]], 5, 2)
    assert lengths == [2 + 5]


def test_the_drafts_iterations_are_not_repeated():
    model, stats = make(), Counter()
    calls = calls_of(model.body[0])
    generate(model, [[1, 2, 3]], 1 + 10, 8, draft_iters=3, draft_tokens=4, stats=stats)
    assert stats["accepted"] == stats["drafted"] == 8  # in two rounds
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


# ---------------------------------------------------------------------------------- one slot, and early exit


class Appending:
    """The reference for one slot per block, without places: what the new tokens last wrote stands behind what
    the old ones left. `running` (T, 1): tokens that still write."""

    def __init__(self):
        self.old, self.new, self.all = {}, {}, {}

    def at(self, index, k):
        self.index = index
        return self

    def extend(self, *new):
        written = self.new.get(self.index, new)
        new = self.new[self.index] = [torch.where(self.running, *pair) for pair in zip(new, written)]
        old = self.old.get(self.index, [part[:, :, :0] for part in new])
        both = self.all[self.index] = [torch.cat(pair, dim=2) for pair in zip(old, new)]
        T, end = new[0].shape[2], both[0].shape[2]
        return *both, torch.arange(end) <= torch.arange(end - T, end)[:, None]

    def keep(self):
        self.old, self.new, self.all = self.all, {}, {}


CHUNKS = [(0, 6), *((t, t + 1) for t in range(6, 12)), (12, 18), (18, 24)]


@pytest.mark.parametrize("early_exit", [0, 1e-3])
@torch.no_grad()
def test_one_slot_and_early_exit_equal_the_uncached_rule_with_masks(early_exit):
    """A slot holds what the last iteration wrote. A token whose prediction changes by less than early_exit
    keeps its state, keys and values."""
    model, idx, iters = make(seed=3, rule="recall"), tokens(1, 24), 8
    for block in model.body:  # calmer, so that some tokens settle soon and some late
        block.attn.out.weight *= 0.3
        block.mlp.down.weight *= 0.3
    cache, reference, depths = KVCache(model, 1, iters, mode="last"), Appending(), Counter()
    for start, end in CHUNKS:
        part, cos_sin = idx[:, start:end], model.cos_sin(idx, torch.arange(start, end)[None])
        running = torch.ones(end - start, 1, dtype=torch.bool)
        reference.running, ran, logits = running, 0, None
        x = h = model.run(model.head, model.embed(part), cos_sin, reference)
        for k in range(iters):
            u, new = model.iterate(x, h, k, k + 1, cos_sin, reference)
            now = model.logits(model.norm(model.run(model.tail, u, cos_sin, reference)))
            before, logits = logits, now if logits is None else torch.where(running, now, logits)
            x, ran = torch.where(running, new, x), ran + running.long()
            if early_exit and before is not None:
                p, q = logits.softmax(-1), before.softmax(-1)
                running = running & ((p * (p / q).log()).sum(-1) >= early_exit)[0, :, None]
                reference.running = running
        reference.keep()
        depths.update(ran[:, 0].tolist())

        stats = Counter()
        ours = step(cache, part, [end - start], early_exit, stats)
        assert_close(ours, logits[:, -1], atol=1e-4, rtol=1e-4)
        assert not early_exit or stats["iterations"] == ran.sum()
    assert (len(depths) > 2) == (early_exit > 0)


def test_a_settled_token_costs_no_more_iterations():
    model, stats = make(), Counter()
    calls = calls_of(model.body[0])
    generate(model, [[5]], 20, 8, stats=stats, **EXIT)
    assert len(calls) == stats["iterations"] < 8 * 20
    last = generate(model, PROMPTS, 10, 4, cache_mode="last")
    assert generate(model, PROMPTS, 10, 4, early_exit=1e-30) == last != generate(model, PROMPTS, 10, 4)


# ------------------------------------------------------------------------------------- choosing a token, text


def test_tokens_are_drawn_by_their_probability_among_the_best():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 1.0]])

    def p(temperature=1.0, **options):
        return Decoding(1, 1, temperature, **options).distribution(logits)

    assert_close(p(0.5), (logits.double() / 0.5).softmax(-1))
    assert p(0.0, top_k=3, top_p=0.5).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert p(1e-308)[0].tolist() == [1, 0, 0, 0]
    for options, kept in (
        ({"top_k": 2}, [[1, 1, 0, 0], [0, 1, 1, 0]]),
        ({"top_p": 0.7}, [[1, 1, 0, 0], [0, 1, 1, 0]]),  # 0.64 + 0.24
        ({"top_p": 0.6}, [[1, 0, 0, 0], [0, 1, 1, 0]]),
    ):
        assert (p(**options) > 0).tolist() == kept
        assert_close(p(**options).sum(-1), torch.ones(2).double())


def test_characters_that_span_tokens_come_whole(monkeypatch):
    def speak(ids: bytes) -> list[str]:
        monkeypatch.setattr(sample, "stream", lambda *args, **options: ((0, i) for i in ids))
        return [piece for _, piece in sample.stream_text(None, get_tokenizer("bytes"), [[1]], 9, 1)]

    assert speak("aé中🙂b".encode()) == ["a", "", "é", "", "", "中", "", "", "", "🙂", "b", ""]
    assert "".join(speak(b"a\xe4\xb8")) == "a\ufffd"  # cut in the middle
    assert speak([97, 300, 98]) == ["a", "", "b", ""]  # 300: beyond the tokenizer's


def test_the_lens_shows_the_best_token_of_every_position_and_iteration():
    model, tokenizer, iters = make(vocab_size=257), get_tokenizer("bytes"), [1, 2, 4]
    ids = list(b"a\nbc")
    title, *rows, kl = sample.lens(model, tokenizer, ids, iters, last=3).splitlines()
    assert title.split() == ["after", "r=1", "r=2", "r=4"]
    assert [row.split()[0] for row in rows] == ["\\n", "b", "c"], "the last three tokens"
    logits = torch.cat(list(model.logits_at(torch.tensor([ids]), iters)))[:, 1:]  # (R, T, V)
    p, best = logits.softmax(-1).max(-1)
    for t, row in enumerate(rows):
        assert all(f"{p[r, t]:.0%}" in row for r in range(3))
        assert row.count("*") == sum(best[r, t] != best[r - 1, t] for r in (1, 2))
    p, q = logits[0].log_softmax(-1), logits[1].log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert float(kl.split()[1]) == pytest.approx(expected, rel=0.2)


# --------------------------------------------------------------------------------------------- command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a run."""
    save(tmp_path / "out/run", 1, make(vocab_size=257, block_size=64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(folder, capsys):
    def run(*args):
        sample.main([*args, "--max_new_tokens=20"])
        return capsys.readouterr()

    return run


def best(n: int, iters: int, prompt=b"def ") -> str:
    """The text that the best tokens of the run make."""
    [ids] = generate(load_model("out/run"), [list(prompt)], n, iters, stop_tokens={256})
    return get_tokenizer("bytes").decode(ids)


def test_only_generated_text_is_on_stdout(cli, folder):
    flags = ["--iters=3", "--temperature=0"]
    out, err = cli("--prompt", "def ", *flags)
    assert out == best(20, 3) + "\n"
    for part in ("out/run/step_00000001", "def ", "tokens/s", "3 iterations per token"):
        assert part in err
    (folder / "prompt.txt").write_text("def \n")
    assert cli("--prompt_file=prompt.txt", *flags).out == out, "without the final newline"
    drafted = cli("--prompt", "def ", *flags, "--draft_iters=1")
    assert drafted.out == out and "drafted tokens accepted" in drafted.err
    assert cli(*flags).out == best(20, 3, [256]) + "\n", "a text begins with end-of-text"
    err = cli("--prompt", "x" * 70, *flags, "--exit", "kl:1e3").err
    assert "last 64 of 70 tokens" in err and "2.0 iterations per token" in err


def test_samples_and_several_iters_follow_one_another(cli):
    five, six = (cli("--prompt", "def ", f"--seed={seed}").out for seed in (5, 6))
    assert cli("--prompt", "def ", "--num_samples=2", "--seed=5").out == f"{five}---\n{six}"
    assert five != six
    one, four = (cli("--prompt", "def ", f"--iters={r}").out for r in (1, 4))
    both = cli("--prompt", "def ", "--iters=1,4")
    assert both.out == f"{one}---\n{four}"
    assert "iters 1: def " in both.err and "iters 4: def " in both.err


def test_a_sample_needs_no_prompt_nor_any_input(folder):
    """On a terminal, to which no control characters come, and where standard input is closed."""
    ours, theirs = pty.openpty()
    flags = ["--iters=8", "--max_new_tokens=20", "--top_k=0", "--temperature=3"]
    for pipes in ({"stdout": theirs, "stdin": theirs}, {"preexec_fn": lambda: os.close(0)}):
        with start_python([ROOT / "sample.py", *flags], folder, **pipes) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    shown = os.read(ours, 10_000).replace(b"\r\n", b"\n")
    assert len(shown) >= len(out) > 10
    assert not any(byte < 32 and byte not in b"\n\t" for byte in shown)


def test_text_comes_while_it_is_generated(folder):
    """Killed at its first bytes, the process has written the beginning of its text and not the end."""
    whole = best(150, 8).encode()
    flags = ["--prompt=def ", "--iters=8", "--temperature=0", "--max_new_tokens=2000"]  # for seconds
    with start_python([ROOT / "sample.py", *flags], folder, {"PYTHONUNBUFFERED": ""}) as process:
        first = os.read(process.stdout.fileno(), 1)
        process.kill()
        out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL and b"tokens/s" not in err
    assert len(first + out) < len(whole) and whole.startswith(first + out)


def test_before_any_training_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "--ckpt models/chains_abbie_d\n.*train.py config/abbie_tiny.py"
    refused(message, sample.main, ["--iters=8"])


def test_bad_prompts_and_options_are_refused():
    model = make()
    for prompt in ([], [1] * 33, [97]):
        refused("token id", generate, model, [[1], prompt], 5)
    wrong = {"temperature": float("nan"), "top_k": -1, "top_p": 0, "early_exit": -1, "draft_iters": 2}
    for name, value in wrong.items():
        refused(f"{name}={value} must be", generate, model, [[1]], 5, 2, **{name: value})
    refused("max_new_tokens=0 must be", generate, model, [[1]], 0)
