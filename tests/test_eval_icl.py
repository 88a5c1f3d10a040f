"""The specification of eval_icl.py: the harness's requests and metrics, scores that no batching changes, one
sweep for every r, built-in tasks, convergence, and errors that a person can act on."""

import copy
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_icl
import prepare_data
from eval_icl import TASKS, convergence, encode, evaluate_loss, load_tasks, main, run_tasks, score
from model import AbbIE, AbbIEConfig, UserError, save_checkpoint
from prepare_data import Shards, get_tokenizer

ROOT = Path(__file__).parent.parent
SHAPE = dict(vocab_size=257, block_size=96, n_embd=32, n_attn_heads=2, ffn_dim=64, n_head_blocks=1,
             n_body_blocks=2, n_tail_blocks=1)


def make_model(rule="abbie_d", scale=1.0) -> AbbIE:
    """Random weights, large enough that answers differ between examples and between r."""
    torch.manual_seed(0)
    model = AbbIE(AbbIEConfig(**SHAPE, rule=rule))
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(std=1 if p is model.embed.weight else scale / p.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer("bytes")


SCIQ = {"question": "What flies?", "correct_answer": "bee", "distractor1": "ox", "distractor2": "cat",
        "distractor3": "cow"}
ROWS = {
    "hellaswag": [
        {"activity_label": "Bee", "ctx_a": "A bee flies [title] home.", "ctx_b": "THE Bee",
         "label": str(i % 4),
         "endings": ["[step] sleeps.", "eats [x] a  stone.", f"waits {i} days.", " hums "]}
        for i in range(5)],
    "lambada_openai": [{"text": f"It rained for {i} days and then it\nrained some more"} for i in range(5)],
    "arc_easy": [
        {"question": f"What do bees make {i}?", "answerKey": "2",
         "choices": {"text": ["iron", "honey", "a big noise"][:2 + i % 2], "label": list("123")[:2 + i % 2]}}
        for i in range(7)],
    "arc_challenge": [
        {"question": "Where do bees live?", "answerKey": "C",
         "choices": {"text": ["sea", "moon", "hive", "fire", "ice"], "label": list("ABCDE")}}],
    "commonsense_qa": [
        {"question": " Who flies? ", "answerKey": "A",
         "choices": {"text": ["bee", "ox", "cat", "dog", "cow"], "label": list("ABCDE")}}],
    "piqa": [
        {"goal": "Find honey", "sol1": "ask a bee", "sol2": "ask an ox", "label": i % 2} for i in range(4)],
    "openbookqa": [
        {"question_stem": "Bees make", "answerKey": " A",
         "choices": {"text": ["honey", "wool", "milk", "tin"], "label": list("ABCD")}}],
    "sciq": [{"support": "  Bees fly.", **SCIQ}, {"support": "", **SCIQ}],
    "winogrande": [
        {"sentence": "The ox met the bee and the _ flew away.", "option1": "ox", "option2": "bee",
         "answer": "2"}],
}
# The context and the continuations of each task's last row, as the harness makes them, and the right one.
REQUESTS = {
    "hellaswag": ("Bee: A bee flies. home. The bee",
                  ["  sleeps.", " eats a stone.", " waits 4 days.", " hums"], 0),
    "lambada_openai": ("It rained for 4 days and then it\nrained some", [" more"], 0),
    "arc_easy": ("Question: What do bees make 6?\nAnswer:", [" iron", " honey"], 1),
    "arc_challenge": ("Question: Where do bees live?\nAnswer:",
                      [" sea", " moon", " hive", " fire", " ice"], 2),
    "commonsense_qa": ("Question: Who flies?\nA. bee\nB. ox\nC. cat\nD. dog\nE. cow\nAnswer:",
                       [" A", " B", " C", " D", " E"], 0),
    "piqa": ("Question: Find honey\nAnswer:", [" ask a bee", " ask an ox"], 1),
    "openbookqa": ("Bees make", [" honey", " wool", " milk", " tin"], 0),
    "sciq": ("\nQuestion: What flies?\nAnswer:", [" ox", " cat", " cow", " bee"], 3),
}


@pytest.fixture(scope="module")
def icl(tmp_path_factory) -> Path:
    """DATA_DIR/TASK/SPLIT.jsonl for all nine tasks."""
    folder = tmp_path_factory.mktemp("icl")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        path = folder / name / f"{TASKS[name].split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def ckpt(model, corpus, tmp_path_factory) -> Path:
    meta = {**dataclasses.asdict(model.config), "tokenizer": "bytes", "data": str(corpus), "step": 1}
    return save_checkpoint(tmp_path_factory.mktemp("run"), 1, model.state_dict(), {"step": 1}, meta)


def by_hand(model, tokens, iters: int):
    """One request alone: full logits, log-softmax, the last positions."""
    context, continuation = tokens
    ids = (context + continuation)[-(model.config.block_size + 1):]
    logits = model(torch.tensor([ids[:-1]]), iters=iters)[0][0, -len(continuation):]
    target = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == target).all())


# ------------------------------------------------------------------------------------------------ requests

@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_the_harness_strings(name, icl):
    context, continuations, gold = REQUESTS[name]
    example = load_tasks([name], None, icl, 96, None)[name][-1]
    assert example.requests == [(context, continuation) for continuation in continuations]
    assert example.gold == gold


def test_winogrande_scores_one_continuation_after_two_contexts(icl):
    example, = load_tasks(["winogrande"], None, icl, 96, None)["winogrande"]
    assert example.requests == [("The ox met the bee and the ox", " flew away."),
                                ("The ox met the bee and the bee", " flew away.")]
    assert example.gold == 1


def test_the_docstring_shows_what_the_code_does():
    text = eval_icl.__doc__
    row = json.loads(text[text.index("{"):text.index("}}") + 2])
    lines = [line.strip() for line in text.splitlines() if line.startswith('    "Question')]
    requests = TASKS["arc_easy"].render(row).requests
    assert len(lines) == len(requests) == 2
    for (context, continuation), line in zip(requests, lines):
        assert line.startswith(f"{json.dumps(context)}  {json.dumps(continuation)}")


def test_whitespace_and_empty_contexts(tokenizer):
    assert encode(tokenizer, [("a b  ", " c")]) == [(list(b"a b"), list(b"   c"))]
    assert encode(tokenizer, [("", "word")]) == [([256], list(b"word"))]


# -------------------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("rule", ["abbie_d", "abbie_c", "zero_pt", "recall"])
def test_scores_equal_one_request_at_a_time(rule, icl, tokenizer):
    model, iters = make_model(rule), [1, 2, 5]
    tasks = load_tasks(list(ROWS), None, icl, 96, None)
    requests = [request for task in tasks.values() for example in task for request in example.requests]
    requests += [("x" * 150, " long"), ("", "none")]
    tokens = encode(tokenizer, requests)
    scores, greedy, truncated = score(model, tokens, iters)
    expected = [[by_hand(model, pair, r) for r in iters] for pair in tokens]
    assert np.abs(scores - [[nats for nats, _ in row] for row in expected]).max() < 1e-4
    assert (greedy == [[hit for _, hit in row] for row in expected]).all()
    assert truncated == [len(requests) - 2]
    assert np.abs(scores[:, 0] - scores[:, 2]).max() > 0.1  # r matters here


def test_greedy_is_seen(model, tokenizer):
    """A continuation made of argmaxes is greedy, and one wrong token ends that."""
    ids = list(b"The bee")
    for _ in range(4):
        ids.append(model(torch.tensor([ids]), iters=3)[0][0, -1].argmax().item())
    wrong = [*ids[7:-1], (ids[-1] + 1) % 256]
    _, greedy, _ = score(model, [(ids[:7], ids[7:]), (ids[:7], wrong)], [3])
    assert greedy[:, 0].tolist() == [True, False]


def test_batch_size_changes_nothing(model, icl, tokenizer):
    examples = [e for examples in load_tasks(list(ROWS), None, icl, 96, None).values() for e in examples]
    tokens = encode(tokenizer, [request for example in examples for request in example.requests])
    one, many = (score(model, tokens, [1, 3], batch_size=n) for n in (1, 64))
    assert np.abs(one[0] - many[0]).max() < 1e-4
    assert (one[1] == many[1]).all()


def test_one_sweep_and_shared_contexts(model, icl, tokenizer):
    """A sweep costs max(iters) Bodies and a Tail per entry; a context is read once for all continuations."""
    body, tail = [], []  # tokens of every call
    hooks = [model.body[0].register_forward_pre_hook(lambda _, args: body.append(args[0].shape[:2].numel())),
             model.tail[0].register_forward_pre_hook(lambda _, args: tail.append(args[0].shape[:2].numel()))]
    example = load_tasks(["hellaswag"], None, icl, 96, None)["hellaswag"][0]
    tokens = encode(tokenizer, example.requests)
    try:
        score(model, tokens, [1, 2, 4, 8])
    finally:
        for hook in hooks:
            hook.remove()
    assert (len(body), len(tail)) == (8, 4)
    assert body[0] == len(tokens[0][0]) + sum(len(continuation) - 1 for _, continuation in tokens)


def test_validation_loss_is_the_model_s(model, corpus):
    shards = Shards(corpus, "val", 96)
    chosen = np.arange(10) * shards.n_windows // 10
    losses = evaluate_loss(model, shards, [4, 1], n_windows=10, batch_size=3)
    assert list(losses) == [1, 4]
    for r, loss in losses.items():
        assert loss == pytest.approx(model(*shards.batch(chosen), iters=r)[1].item(), abs=1e-5)


def test_logits_are_held_in_parts(model, corpus, tokenizer, icl, monkeypatch):
    shards, widest = Shards(corpus, "val", 96), []
    tokens = encode(tokenizer, load_tasks(["hellaswag"], None, icl, 96, None)["hellaswag"][0].requests)
    whole = evaluate_loss(model, shards, [2], n_windows=4), score(model, tokens, [2])[0]
    monkeypatch.setattr(eval_icl, "CHUNK", 257 * 10)
    inner = model.logits
    monkeypatch.setattr(model, "logits", lambda z: (widest.append(z.shape[:-1].numel()), inner(z))[1])
    parts = evaluate_loss(model, shards, [2], n_windows=4), score(model, tokens, [2])[0]
    assert max(widest) == 10
    assert parts[0][2] == pytest.approx(whole[0][2], abs=1e-5) and np.allclose(parts[1], whole[1], atol=1e-4)


# -------------------------------------------------------------------------------------------------- metrics

def test_metrics_follow_from_the_samples(model, icl, tokenizer, tmp_path):
    """Every metric, recomputed from --log_samples and the rows."""
    with open(tmp_path / "s.jsonl", "w") as log:
        results = run_tasks(model, tokenizer, list(ROWS), [1, 4], None, icl, log=log, bootstrap_iters=2000)
    results, samples = results["tasks"], [json.loads(line) for line in open(tmp_path / "s.jsonl")]
    assert set(samples[0]) == {"task", "doc_id", "iters", "loglikelihoods", "is_greedy", "gold"}
    for name, rows in ROWS.items():
        assert results[name]["n"] == len(rows)
        examples = load_tasks([name], None, icl, 96, None)[name]
        for r in (1, 4):
            mine = [s for s in samples if s["task"] == name and s["iters"] == r]
            assert [s["doc_id"] for s in mine] == list(range(len(rows)))
            found, lls = results[name]["iters"][str(r)], [s["loglikelihoods"] for s in mine]
            if name == "lambada_openai":
                assert found["perplexity"] == pytest.approx(math.exp(-np.mean(lls)))
                hits = [all(s["is_greedy"]) for s in mine]
            else:
                hits = [max(range(len(ll)), key=ll.__getitem__) == s["gold"] for ll, s in zip(lls, mine)]
            assert found["acc"] == pytest.approx(np.mean(hits))
            n, mean = len(hits), np.mean(hits)
            if n == 1:
                assert found["acc_stderr"] == "N/A"
            else:
                variance = sum((hit - mean) ** 2 for hit in hits) / (n - 1)
                assert found["acc_stderr"] == pytest.approx(math.sqrt(variance) / math.sqrt(n))
            assert ("acc_norm" in found) == (name not in ("commonsense_qa", "winogrande", "lambada_openai"))
            if "acc_norm" in found:  # per character, without the delimiter
                choices = [[continuation[1:] for _, continuation in e.requests] for e in examples]
                hits = [np.argmax([x / len(c) for x, c in zip(ll, cs)]) == s["gold"]
                        for ll, cs, s in zip(lls, choices, mine)]
                assert found["acc_norm"] == pytest.approx(np.mean(hits))


def test_bootstrap_draws_what_the_harness_draws():
    """Chunk i of 1000 resamples comes from random.Random(i).choices."""
    x = list(np.random.default_rng(0).normal(-3, 1, 37))
    resampled = []
    for i in range(2):
        rng = random.Random(i)
        resampled += [math.exp(-np.mean(rng.choices(x, k=len(x)))) for _ in range(1000)]
    assert eval_icl.bootstrap_stderr(np.array(x), 2500) == pytest.approx(np.std(resampled, ddof=1), rel=1e-9)
    assert eval_icl.bootstrap_stderr(np.array(x), 0) == "N/A"


def test_paired_test_is_the_exact_binomial():
    before, after = np.zeros(20, bool), np.zeros(20, bool)
    before[:2], after[2:12] = True, True
    result = eval_icl.mcnemar(before, after)
    assert (result["gained"], result["lost"]) == (10, 2)
    assert result["p"] == pytest.approx(2 * (1 + 12 + 66) / 2 ** 12)
    assert eval_icl.mcnemar(before, before)["p"] == 1


# ------------------------------------------------------------------------------------------ built-in tasks

def test_built_in_tasks(corpus, model, tokenizer):
    examples = load_tasks(["cloze", "lastword"], corpus, "nowhere", 96, None)
    assert examples == load_tasks(["cloze", "lastword"], corpus, "nowhere", 96, None)
    text = "".join(tokenizer.decode(d.tolist()) for d in prepare_data.documents(corpus, "val"))
    assert {example.gold for example in examples["cloze"]} == {0, 1, 2, 3}
    for example in examples["cloze"]:
        context, continuation = example.requests[example.gold]
        assert len(example.requests) == 4 and context + continuation in text and len(context) <= 48
    for example in examples["lastword"]:
        (context, word), = example.requests
        assert context + word + "\n" in text and " " not in word[1:]
    results = run_tasks(model, tokenizer, list(TASKS)[:2], [1, 2], corpus, limit=20, bootstrap_iters=100)
    tasks = results["tasks"]
    assert all(task["n"] == 20 and task["truncated"] == 0 for task in tasks.values())


def test_training_shows_in_the_built_in_tasks(corpus, tokenizer):
    torch.manual_seed(0)
    untrained, shards = AbbIE(AbbIEConfig(**SHAPE)), Shards(corpus, "train", 96)
    model = copy.deepcopy(untrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(40):
        loss = model(*shards.batch(np.arange(8 * step, 8 * step + 8) % shards.n_windows))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = (run_tasks(m, tokenizer, ["lastword"], [2], corpus, limit=50, bootstrap_iters=0)["tasks"]
                     for m in (untrained, model))
    before, after = (task["lastword"]["iters"]["2"]["perplexity"] for task in (before, after))
    assert after < before / 100


# -------------------------------------------------------------------------------------------- convergence

def test_convergence_tells_the_rules_apart(corpus):
    """D's change falls to a quarter with each iteration by construction, C's does not; D keeps its start,
    while recall forgets it."""
    idx = Shards(corpus, "val", 96).batch([0, 1])[0]
    d, c = (convergence(make_model(rule), idx, 8) for rule in ("abbie_d", "abbie_c"))
    recall = convergence(make_model("recall", scale=0.3), idx, 8)
    assert d["8"]["change"] / d["7"]["change"] == pytest.approx(0.25, abs=0.05)
    assert c["8"]["change"] / c["7"]["change"] > 0.6
    assert d["8"]["settled"] == 1 and d["8"]["cosine"] > d["2"]["cosine"]
    settled = [entry["settled"] for entry in d.values()]
    assert settled == sorted(settled)
    assert d["8"]["from_noise"] > 0.8 * d["1"]["from_noise"]
    assert recall["8"]["from_noise"] < 0.05 * recall["1"]["from_noise"]


# -------------------------------------------------------------------------------------------- the command

def evaluate(args, **env):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_command_writes_the_same_on_any_number_of_processes(ckpt, icl, tmp_path, capsys):
    args = ["--ckpt", str(ckpt), "--iters=2,1,4", "--tasks", "arc_easy,lambada_openai,cloze", "--ppl",
            "--data_dir", str(icl), "--convergence", "--batch_size=2", "--bootstrap_iters=200", "--limit=6"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main([*args, f"--out={tmp_path}/1.json", f"--log_samples={tmp_path}/1.jsonl"])
    torch.set_num_threads(threads)
    table = capsys.readouterr().out
    two = evaluate(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_icl.py", *args,
                    f"--out={tmp_path}/2.json", f"--log_samples={tmp_path}/2.jsonl"])
    assert two.returncode == 0, two.stderr
    assert two.stdout == table
    for name in ("1.json", "1.jsonl"):
        assert (tmp_path / name).read_text() == (tmp_path / name.replace("1", "2", 1)).read_text()
    results = json.loads((tmp_path / "1.json").read_text())
    assert list(results["tasks"]["arc_easy"]["iters"]) == ["1", "2", "4"]
    assert results["tasks"]["arc_easy"]["paired"]["reference"] == 2
    assert "6/2376" in table and "*" in table
    loss = results["ppl"]["iters"]["2"]
    meta = json.loads((Path(results["ppl"]["data"]) / "meta.json").read_text())["splits"]["val"]
    assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
    assert loss["bits_per_byte"] == pytest.approx(loss["loss"] / math.log(2) * meta["tokens"] / meta["bytes"])
    assert results["ppl"]["n"] + results["ppl"]["left_out"] == meta["tokens"]
    assert set(results["convergence"]) == {"n", "trained", "untrained"}
    pytest.importorskip("matplotlib")
    for figure in ("evaluation", "fixed_point"):
        drawn = evaluate(["results/plot.py", figure, f"{tmp_path}/1.json", f"--out={tmp_path}/figures"])
        assert drawn.returncode == 0, drawn.stderr
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 5000


def test_an_error_is_two_lines_and_status_2(ckpt, tmp_path):
    run = evaluate(["eval_icl.py", f"--ckpt={ckpt}", "--tasks=arc_easy", f"--data_dir={tmp_path}"])
    assert (run.returncode, run.stdout) == (2, "")
    assert "python prepare_data.py icl" in run.stderr and len(run.stderr.splitlines()) <= 3


def test_errors_name_what_is_wrong(ckpt, icl, tmp_path, corpus):
    def refused(*args, match):
        with pytest.raises((UserError, OSError), match=match) as error:
            main([f"--ckpt={ckpt}", *args])
        assert len(str(error.value).splitlines()) <= 3

    refused("--tasks=arc_esy", match="did you mean arc_easy")
    refused("--iters=0", match="iters")
    refused("--iters=129", match="iters")
    refused("--limit=0", match="at least 1")
    refused("--tasks=arc_easy", f"--data_dir={icl}", f"--out={tmp_path}/no/r.json", match="No such file")
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.jsonl").write_text("{}\n")
    refused("--tasks=piqa", f"--data_dir={tmp_path}", match="scored on its validation split, not on train")
    good, rows = json.dumps(ROWS["piqa"][0]), tmp_path / "piqa" / "validation.jsonl"
    no_choice, empty = good.replace('"label": 0', '"label": 2'), good.replace("ask a bee", "")
    for bad in ('{"goal": "x"}', "{", "[]", no_choice, empty):
        rows.write_text(f"{good}\n{bad}\n")
        refused("--tasks=piqa", f"--data_dir={tmp_path}", match="line 2, is no row of piqa")
    rows.write_text("")
    refused("--tasks=piqa", f"--data_dir={tmp_path}", match="no rows")
    rows.write_text(good.replace("ask a bee", "ask " * 30) + "\n")
    refused("--tasks=piqa", f"--data_dir={tmp_path}", match="does not fit into a context of 96")
    refused(f"--ppl={tmp_path}", match="prepare_data.py")


# --------------------------------------------------------------------------------------------- the harness

def test_harness_adapter(model, tokenizer):
    """Log-likelihoods, rolling ones over texts longer than the context, and generation up to a stop."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval==0.4.13")
    from lm_eval.api.instance import Instance
    adapter = eval_icl.harness_model(model, tokenizer, iters=3, batch_size=2)

    def requests(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]

    pairs = [("Bees make", " honey"), ("", "word")]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs))
    for one, tokens in zip(found, encode(tokenizer, pairs)):
        nats, greedy = by_hand(model, tokens, 3)
        assert one == (pytest.approx(nats, abs=1e-4), greedy)

    text = "A bee flies home. " * 8  # 144 tokens: one window of 96, and one that ends with the text
    ids = list(text.encode())
    first, second = by_hand(model, ([256], ids[:96]), 3), by_hand(model, (ids[47:96], ids[96:]), 3)
    found = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("Bee",)))
    assert found[0] == pytest.approx(first[0] + second[0], abs=1e-3)
    assert found[1] == pytest.approx(by_hand(model, ([256], list(b"Bee")), 3)[0], abs=1e-4)

    for prompt in map(chr, range(97, 123)):  # the first after which no end of text comes
        greedy = list(prompt.encode())
        for _ in range(12):
            greedy.append(model(torch.tensor([greedy]), iters=3)[0][0, -1].argmax().item())
        if 256 not in greedy:
            break
    text = tokenizer.decode(greedy[1:])
    stop = text[5]
    settings = {"max_gen_toks": 12, "do_sample": False}
    found = adapter.generate_until(requests("generate_until", (prompt, {**settings, "until": [stop]}),
                                            (prompt, {**settings, "until": []})))
    assert found == [text[:text.index(stop)], text]
