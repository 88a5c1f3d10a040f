"""The specification of sample.py, and of model.py's cache. References are whole sequences without a cache."""

import io
import itertools
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import make

import sample
from model import RULES, KVCache, UserError, save_checkpoint
from prepare_data import get_tokenizer
from sample import Stats, Text, distribution, draw, generate, lay_out_for_decoding, static_step, stream

ROOT = Path(__file__).parent.parent
S = 16  # context of most models here
PROMPTS = [[5, 6, 7], list(range(20, 30)), [3] * S, [4]]  # ragged; one fills its context


@torch.no_grad()
def uncached_logits(model, prompt, new, iters):
    """The logits (len(new), V) from which `new` was chosen, by the stated rule of overflow."""
    S, context, i, out = model.config.block_size, list(prompt), 0, []
    while i < len(new):
        take = min(S - len(context) + 1, len(new) - i)
        whole = context + new[i:i + take - 1]
        out.append(model(torch.tensor([whole]), iters=iters)[0][0, len(context) - 1:])
        i += take
        context = (whole + [new[i - 1]])[-(S // 2):]
    return torch.cat(out)


def assert_greedy(model, prompt, new, iters):
    """Every id is the best of the uncached logits, or within 1e-4 of it."""
    logits = uncached_logits(model, prompt, new, iters)
    chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 1e-4


def count_body_calls(model) -> list[tuple]:
    shapes = []
    model.body[0].register_forward_hook(lambda block, args, out: shapes.append(tuple(args[0].shape[:2])))
    return shapes


# --------------------------------------------------------------------------------------------- the full cache

@pytest.mark.parametrize("rule", RULES)
def test_cached_decoding_equals_uncached_at_iters_1_to_8_in_a_ragged_batch_past_the_context(rule):
    model = make(rule=rule, block_size=S)
    for iters in range(1, 9):
        for prompt, new in zip(PROMPTS, generate(model, PROMPTS, S + 6, iters)):
            assert len(new) == S + 6
            assert_greedy(model, prompt, new, iters)


@pytest.mark.parametrize("rule", RULES)
def test_logits_of_a_step_equal_those_without_a_cache(rule):
    model, idx = make(rule=rule), torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    for iters in range(1, 9):
        whole, cache = model(idx, iters=iters)[0], KVCache(model.config, 2, iters)
        close = dict(atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model.step(idx[:, :5], cache, iters), whole[:, 4], **close)
        torch.testing.assert_close(model.step(idx[:, 5:6], cache, iters), whole[:, 5], **close)
        torch.testing.assert_close(model.step(idx[:, 6:9], cache, iters), whole[:, 8], **close)  # several
        torch.testing.assert_close(model.step(idx[1:, 9:10], cache, iters, rows=[1]), whole[1:, 9],
                                   **close)
        ragged = torch.stack([idx[0, 9:12], torch.cat([idx[1, 10:], idx[1, :1]])])  # the second is padded
        torch.testing.assert_close(model.step(ragged, cache, iters, [3, 2]), whole[:, 11], **close)


def test_a_batch_equals_its_rows_alone_when_sampling():
    model = make(block_size=S)
    keys = dict(temperature=1.0, top_k=20, top_p=0.9)
    batch = generate(model, PROMPTS, 20, 3, seed=7, **keys)
    assert batch == [generate(model, [p], 20, 3, seed=7 + b, **keys)[0] for b, p in enumerate(PROMPTS)]
    assert batch == generate(model, PROMPTS, 20, 3, seed=7, **keys)
    assert batch != generate(model, PROMPTS, 20, 3, seed=8, **keys)


def test_rows_that_end_leave_the_batch_and_the_others_do_not_notice():
    model = make(block_size=S)
    alone = generate(model, PROMPTS, 20, 2)
    done, got, shapes = set(), [[] for _ in PROMPTS], count_body_calls(model)
    for b, token in stream(model, PROMPTS, 20, 2, done=done):
        got[b].append(token)
        if len(got[b]) == 4 and b != 1:
            done.add(b)
    assert got == [alone[0][:4], alone[1], alone[2][:4], alone[3][:4]]
    assert shapes[-1] == (1, 1)
    stop = alone[1][5]
    end = [new[:new.index(stop)] if stop in new else new for new in alone]
    assert generate(model, PROMPTS, 20, 2, stop_token=stop) == end


def test_cache_memory():
    config = make(rule="abbie_d").config  # blocks 1 + 2 + 1, 2 KV heads of 8 channels
    per_slot = 2 * 2 * 8 * 4
    assert KVCache(config, max_iters=8).bytes_per_token == (2 + 2 * 8) * per_slot
    assert KVCache(config, max_iters=8, mode="last").bytes_per_token == (2 + 2) * per_slot


# --------------------------------------------------------------- tokens that run fewer iterations than others

class Whole:
    """The reference: a whole sequence at once, token t running depths[t] iterations; at the iterations that
    it skips, the others see its last keys and values."""
    mask, causal = None, True

    def __init__(self, depths):
        self.depths, self.last = torch.tensor(depths), {}

    def at(self, part, i, k=0):
        self.where = part, i, k
        return self

    def store(self, k, v):
        part, i, iteration = self.where
        if part == "body":
            if iteration > 0:
                frozen = (self.depths <= iteration)[:, None]
                k, v = (torch.where(frozen, old, new) for old, new in zip(self.last[i], (k, v)))
            self.last[i] = k, v
        return k, v

    @torch.no_grad()
    def logits(self, model, ids):
        idx, u = torch.tensor([ids]), 0
        rope = model.rope(idx)
        h = model.run_head(idx, rope, self)
        x = model.start(h)
        for k in range(max(self.depths)):
            new, next_x = model.iterate(x, h, k, rope, self)
            runs = (self.depths > k)[:, None]
            u, x = torch.where(runs, new, u), torch.where(runs, next_x, x)
        return model.logits(model.run_tail(u, rope, self))[0]


@pytest.mark.parametrize("rule", RULES)
def test_iterations_may_change_from_one_token_to_the_next(rule):
    model, ids = make(rule=rule), list(range(10, 22))
    depths = [5, 5, 5, 1, 3, 5, 2, 2, 4, 1, 1, 5]
    cache, got = KVCache(model.config, 1, max_iters=5), []
    model.step(torch.tensor([ids[:3]]), cache, 5)
    for token, iters in zip(ids[3:], depths[3:]):
        got.append(model.step(torch.tensor([[token]]), cache, iters)[0])
    torch.testing.assert_close(torch.stack(got), Whole(depths).logits(model, ids)[3:], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("exit", ["kl:1e-2", "u:1e-2"])
@pytest.mark.parametrize("rule", ["abbie_d", "recall"])
def test_adaptive_depth_equals_the_masked_reference_and_skips_the_work(rule, exit, monkeypatch):
    model, depths = make(rule=rule, seed=3, block_size=64), {b: [] for b in range(3)}
    prompts, n, iters = [p for p in PROMPTS if 1 < len(p)], 12, 8
    if rule == "recall":  # calmer, so that it settles at all
        with torch.no_grad():
            for block in model.body:
                block.attn.proj.weight.mul_(0.3)
                block.mlp.down.weight.mul_(0.3)
    fill = sample.KVCache.chunk

    def spy(cache, starts, T, rows=None):
        chunk = fill(cache, starts, T, rows)
        filled = chunk.fill_deeper
        rows = range(len(starts)) if rows is None else rows
        chunk.fill_deeper = lambda k: (T == 1 and [depths[b].append(k) for b in rows], filled(k))
        return chunk
    monkeypatch.setattr(sample.KVCache, "chunk", spy)
    stats, calls = Stats(), count_body_calls(model)
    new = generate(model, prompts, n, iters, exit=exit, stats=stats)
    total = sum(stats.iters.values())
    assert total == (n - 1) * len(prompts) and len(stats.iters) > 1
    assert stats.depth == {b: ran[-1] for b, ran in depths.items()}
    decoding = [B for B, T in calls if T == 1]
    assert sum(decoding) == sum(k * count for k, count in stats.iters.items())  # work ends with settling
    for b, prompt in enumerate(prompts):
        ids, used = prompt + new[b], [iters] * len(prompt) + depths[b]
        logits = Whole(used).logits(model, ids[:-1])[len(prompt) - 1:]
        assert len(logits) == n
        chosen = logits.gather(1, torch.tensor(new[b])[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-4


def test_a_threshold_that_nothing_meets_is_plain_decoding():
    model = make(block_size=S)
    for mode in ("full", "last"):
        plain = generate(model, PROMPTS, 20, 4, cache_mode=mode)
        assert generate(model, PROMPTS, 20, 4, exit="kl:1e-30", cache_mode=mode) == plain
        assert generate(model, PROMPTS, 20, 4, exit="u:1e-30", cache_mode=mode) == plain


# ---------------------------------------------------------------------------------------- the last-slot cache

class Appending:
    """The reference for mode "last", a token at a time: past keys and values are of the last iteration."""
    mask, causal = None, False

    def __init__(self):
        self.past, self.now = {}, {}

    def at(self, part, i, k=0):
        self.where = part, i
        return self

    def store(self, k, v):
        self.now[self.where] = k, v
        old = self.past.get(self.where)
        return (k, v) if old is None else tuple(torch.cat(pair, dim=2) for pair in zip(old, (k, v)))

    def commit(self):
        for where, (k, v) in self.now.items():
            old = self.past.get(where)
            self.past[where] = (k, v) if old is None else tuple(torch.cat(p, dim=2) for p in zip(old, (k, v)))


@pytest.mark.parametrize("rule", RULES)
def test_mode_last_keeps_the_last_iteration_of_an_exact_prompt(rule):
    model, idx, iters = make(rule=rule), torch.arange(10, 22)[None], 4
    cache, ref = KVCache(model.config, 1, iters, mode="last"), Appending()
    ref.causal = True
    for start, end in ((0, 5), *((t, t + 1) for t in range(5, 12))):
        got = model.step(idx[:, start:end], cache, iters)
        rope = tuple(table[start:end] for table in model.rope_on(idx.device))
        with torch.no_grad():
            h = model.run_head(idx[:, start:end], rope, ref)
            x = model.start(h)
            for k in range(iters):
                u, x = model.iterate(x, h, k, rope, ref)
            want = model.logits(model.run_tail(u, rope, ref))[:, -1]
        ref.commit()
        ref.causal = False
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
        if start == 0:
            torch.testing.assert_close(got, model(idx[:, :5], iters=iters)[0][:, -1], atol=1e-4, rtol=1e-5)


def test_mode_last_in_a_ragged_batch_equals_its_rows_alone():
    model = make(block_size=S)
    batch = generate(model, PROMPTS, 20, 4, cache_mode="last")
    assert batch == [generate(model, [p], 20, 4, cache_mode="last")[0] for p in PROMPTS]
    assert batch != generate(model, PROMPTS, 20, 4)


# ---------------------------------------------------------------------------------- self-speculative decoding

@pytest.mark.parametrize("rule", RULES)
def test_drafting_changes_no_token_past_the_context(rule):
    for seed, (iters, draft_iters, draft_tokens) in enumerate([(2, 1, 1), (8, 2, 4), (4, 3, 20)]):
        model = make(seed, rule=rule, block_size=S)
        keys = dict(draft_iters=draft_iters, draft_tokens=draft_tokens)
        for prompt, new in zip(PROMPTS, generate(model, PROMPTS, S + 6, iters, **keys)):
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
    model = make(vocab_size=4, n_embd=16, n_attn_heads=2, n_head_blocks=0, n_body_blocks=1, block_size=8,
                 rule="abbie_c")
    prompt, iters, draft_iters, runs = [1, 2], 3, 1, 300

    def probabilities(second, third):
        """Of every triple of new tokens, the first at iters, the others at (second, third)."""
        cells = {}
        for new in itertools.product(range(4), repeat=3):
            p = 1.0
            for n, r in enumerate((iters, second, third)):
                logits = model(torch.tensor([prompt + list(new[:n])]), iters=r)[0][:, -1]
                p *= float(distribution(logits, 1.0, 0, 1.0)[0, new[n]])
            cells[new] = p
        return cells

    counts = dict.fromkeys(itertools.product(range(4), repeat=3), 0)
    for seed in range(runs):
        [new] = generate(model, [prompt], 3, iters, draft_iters=draft_iters, temperature=1.0, seed=seed)
        counts[tuple(new)] += 1

    def misfit(p):
        """Pearson's chi-square, cells below 3 expected runs merged, over their number: 1 is due."""
        small = [c for c in p if runs * p[c] < 3]
        pairs = [(counts[c], runs * p[c]) for c in p if c not in small]
        pairs.append((sum(counts[c] for c in small), sum(runs * p[c] for c in small) + 1e-9))
        return sum((seen - due) ** 2 / due for seen, due in pairs) / len(pairs)

    with torch.no_grad():
        assert misfit(probabilities(iters, iters)) < 1.6
        assert misfit(probabilities(draft_iters, iters)) > 3  # what accepting every draft would give


# -------------------------------------------------------------------------------------------- the static step

def test_the_static_step_compiles_whole_and_equals_the_ordinary_one(monkeypatch):
    model = make(block_size=S)
    plain = generate(model, PROMPTS, 20, 2)
    monkeypatch.setattr(sample, "static_step", lambda *args: static_step(*args, backend="aot_eager"))
    for _ in range(2):  # the second time, with the step that is kept
        done, got = set(), [[] for _ in PROMPTS]
        for b, token in stream(model, PROMPTS, 20, 2, compile=True, done=done):
            got[b].append(token)
            if b == 0 and len(got[0]) == 6:
                done.add(0)
        assert got == [plain[0][:6], *plain[1:]]
    assert len(model.static_steps) == 1


def test_laying_out_for_decoding_changes_no_value():
    model, other = make(), lay_out_for_decoding(make())
    assert other.embed.weight is other.unembed.weight and not other.unembed.weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert generate(model, PROMPTS[:1], 12, 3) == generate(other, PROMPTS[:1], 12, 3)


# ------------------------------------------------------------------------------------------- choosing a token

def test_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 1.0]])
    p = distribution(logits, 0.5, 0, 1.0)
    torch.testing.assert_close(p, (logits.double() / 0.5).softmax(-1))
    assert distribution(logits, 0, 3, 0.5).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert (distribution(logits, 1.0, 2, 1.0) > 0).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert (distribution(logits, 1.0, 0, 0.7) > 0).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]  # 0.64 + 0.24
    assert (distribution(logits, 1.0, 0, 0.6) > 0).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert distribution(logits, 1e-300, 0, 1.0)[0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(distribution(logits, 1.0, 3, 0.9).sum(-1), torch.ones(2, dtype=torch.float64))


def test_draws_follow_the_distribution_and_never_hit_a_zero():
    p, rng = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64), random.Random(0)
    counts = torch.bincount(torch.tensor([draw(p, [rng])[0] for _ in range(4000)]), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert (counts / 4000 - p[0]).abs().max() < 0.03


# ------------------------------------------------------------------------------------------------------- text

def speak(ids, stops=()):
    text = Text(get_tokenizer("bytes"), list(stops))
    return [text.add(i) for i in ids] + [text.end()], text.stopped


def test_characters_that_span_tokens_come_whole():
    pieces, _ = speak("aé中🙂b".encode())
    assert pieces == ["a", "", "é", "", "", "中", "", "", "", "🙂", "b", ""]
    assert "".join(speak(b"a\xe4\xb8")[0]) == "a\ufffd"  # cut in the middle
    assert "".join(speak(b"\xffa")[0]) == "\ufffda"


def test_a_stop_string_is_never_shown_nor_what_may_become_one():
    assert speak(b"ab\n\ncd", ["\n\n"]) == (["a", "b", "", "", "", "", ""], True)
    assert speak(b"a\nb", ["\n\n"]) == (["a", "", "\nb", ""], False)
    assert speak(b"a\n", ["\n\n"]) == (["a", "", "\n"], False)
    assert speak("xé".encode(), ["é"]) == (["x", "", "", ""], True)


# ----------------------------------------------------------------------------------------------- command line

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with two checkpoints, the second one newer."""
    folder = tmp_path_factory.mktemp("work")
    for name, seed in (("old", 1), ("new", 2)):
        model = make(seed, vocab_size=257, block_size=64)
        config = {**vars(model.config), "tokenizer": "bytes", "step": 1}
        save_checkpoint(folder / "out" / name, 1, model.state_dict(), {}, config)
    config["tokenizer"] = "nonsense"
    save_checkpoint(folder / "strange", 1, model.state_dict(), {}, config)
    (folder / "prompt.txt").write_text("def ")
    (folder / "latin.txt").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*args, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        sample.main([*args, "--max_new_tokens=20"])
        return capsys.readouterr()
    return run


def test_only_generated_text_is_on_stdout_from_the_newest_checkpoint(cli):
    model, tokenizer = sample.AbbIE.from_checkpoint("out/new"), get_tokenizer("bytes")
    [new] = generate(model, [list(b"def ")], 20, 3, stop_token=256)
    out, err = cli("--prompt", "def ", "--iters=3", "--temperature=0")
    assert out == tokenizer.decode(new) + "\n"
    assert "def " in err and "tokens/s" in err and "3 iterations per token" in err
    assert cli("--prompt_file=prompt.txt", "--iters", "3", "--temperature", "0").out == out
    assert cli("--iters=3", "--temperature=0", stdin="def ").out == out
    drafted = cli("--prompt", "def ", "--iters=3", "--temperature=0", "--draft_iters=1")
    assert drafted.out == out and "drafted tokens accepted" in drafted.err
    assert cli("--prompt", "def ", "--iters=3", "--temperature=0", "--ckpt=out/old").out != out


def test_flags_of_sampling(cli):
    out = cli("--prompt", "def ", "--num_samples=2", "--seed=5").out
    assert cli("--prompt", "def ", "--num_samples=2", "--seed=5").out == out
    alone = [cli("--prompt", "def ", f"--seed={seed}").out for seed in (5, 6)]
    assert out == "".join(alone) and alone[0] != alone[1]
    stop = alone[0][3]
    assert cli("--prompt", "def ", "--seed=5", "--stop", stop).out == alone[0][:alone[0].index(stop)] + "\n"
    report = cli("--prompt", "def ", "--iters=8", "--exit", "kl:1e-2").err
    assert "iterations per token (" in report and "%" in report
    side = cli("--prompt", "def ", "--compare=1,2,4").out
    assert side.splitlines()[0].split(" | ")[2].strip() == "iters 4" and "def " in side


def test_text_streams_and_a_terminal_without_a_prompt_is_interactive(folder):
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, ROOT / "sample.py", "--max_new_tokens=5", "--iters=1"], cwd=folder,
                          stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.write(ours, b"\n")         # an empty prompt is refused, and the next one asked for
        os.write(ours, b"def \n\x04")
        out, err = process.communicate(timeout=300)
        os.close(ours)
    assert process.returncode == 0, err
    assert out.strip() or out and "the prompt is empty" in err and "tokens/s" in err
    assert err.count("> ") >= 3


def test_an_error_is_short(folder):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt=a", "--iters=0"], cwd=folder,
                          text=True, capture_output=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) <= 3
    assert done.stderr.startswith("error: iters=0")


@pytest.mark.parametrize("args, message", [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "x" * 65], "65 tokens, the model's context 64"),
    (["--prompt=a", "--iters=1000000000"], "1 to 128"),
    (["--prompt=a", "--iters=two"], "invalid int value"),
    (["--prompt=a", "--ckpt=strange"], "unknown tokenizer 'nonsense'"),
    (["--prompt=a", "--ckpt=prompt.txt"], "is no checkpoint"),
    (["--prompt=a", "--prompt_file=prompt.txt"], "exclude each other"),
    (["--prompt_file=latin.txt"], "no UTF-8"),
    (["--prompt=a", "--draft_iters=2"], "draft_iters=2 must be below iters=2"),
    (["--prompt=a", "--draft_iters=1", "--cache=last"], "drafting needs cache=full"),
    (["--prompt=a", "--draft_iters=1", "--exit=kl:1"], "exclude each other"),
    (["--prompt=a", "--exit=entropy:1"], "give kl:1e-3"),
    (["--prompt=a", "--exit=kl:0"], "give kl:1e-3"),
    (["--prompt=a", "--temperature=-1"], "temperature=-1"),
    (["--prompt=a", "--temperature=nan"], "temperature=nan"),
    (["--prompt=a", "--top_p=0"], "top_p=0"),
    (["--prompt=a", "--top_k=-1"], "top_k=-1"),
    (["--prompt=a", "--num_samples=0"], "num_samples=0"),
    (["--prompt=a", "--cache=half"], "neither full nor last"),
    (["--prompt=a", "--dtype=int8"], "neither float32 nor bfloat16"),
    (["--prompt=a", "--compare=1,x"], "compare='1,x'"),
    (["--prompt=a", "--compare=1,2", "--iters=2"], "leave out --iters"),
    (["--prompt=a", "--device=tpu"], "device=tpu cannot be used"),
    (["--promt=a"], "did you mean --prompt?"),
])
def test_bad_input_is_refused(cli, args, message):
    with pytest.raises(UserError) as error:
        cli(*args)
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_bad_calls_are_refused():
    model = make()
    for prompts, message in (([], "no tokens"), ([[1], []], "no tokens"), ([[1] * 33], "longer than")):
        with pytest.raises(UserError, match=message):
            generate(model, prompts, 5)
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(model, [[1]], 0)
    cache = KVCache(model.config, 1, max_iters=2)
    with pytest.raises(UserError, match="made for 2 iterations"):
        model.step(torch.tensor([[1]]), cache, 3)
    with pytest.raises(UserError, match="do not fit"):
        model.step(torch.ones(1, 33, dtype=torch.int64), cache, 2)
