"""The specification of eval_icl.py: the harness's requests and metrics, scores that no batching changes, one
sweep for every r, built-in tasks, the harness itself, ranks, and errors that a person can act on."""

import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, make, save

import eval_icl
from data import Shards, documents, get_tokenizer
from decode import resolve_exit
from eval_icl import encode_requests, main, run_tasks, score
from model import AbbIE, UserError
from tasks import BUILT_IN, DOWNLOADED, TASKS, Example, load_tasks

SHAPE = {"vocab_size": 257, "block_size": 96}


@pytest.fixture(scope="module")
def model() -> AbbIE:
    return make(**SHAPE)


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer("bytes")


@pytest.fixture(scope="module")
def ckpt(model, corpus, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 1, model, data=str(corpus))


OX = "The ox met the bee and the"


def choices(key: str, *texts: str, labels: str = "ABCDE") -> dict:
    return {"answerKey": key, "choices": {"text": list(texts), "label": list(labels[: len(texts)])}}


SCIQ = {"question": "What flies?", "correct_answer": "bee"}
SCIQ |= {"distractor1": "ox", "distractor2": "cat", "distractor3": "cow"}
BEE = {"activity_label": "Bee", "ctx_a": "A bee flies [title] home.", "ctx_b": "THE Bee"}
BEE["endings"] = ["[step] sleeps.", "eats [x] a  stone.", "waits 4 days.", " hums "]
MADE = ["iron", "honey", "noise"]
ROWS = {
    "hellaswag": [{**BEE, "label": str(i % 4)} for i in range(5)],
    "lambada_openai": [{"text": f"It rained for {i} days and then it\nrained some more"} for i in range(5)],
    "arc_easy": [
        {"question": f"What do bees make {i}?", **choices("2", *MADE[: 2 + i % 2], labels="123")}
        for i in range(7)
    ],
    "arc_challenge": [
        {"question": "Where do bees live?", **choices("C", "sea", "moon", "hive", "fire", "ice")}
    ],
    "commonsense_qa": [{"question": " Who flies? ", **choices("A", "bee", "ox", "cat", "dog", "cow")}],
    "piqa": [
        {"goal": "Find honey", "sol1": "ask a bee", "sol2": "ask an ox", "label": i % 2} for i in range(4)
    ],
    "openbookqa": [{"question_stem": "Bees make", **choices(" A", "honey", "wool", "milk", "tin")}],
    "sciq": [{"support": "  Bees fly.", **SCIQ}, {"support": "", **SCIQ}],
    "winogrande": [{"sentence": f"{OX} _ flew away.", "option1": "ox", "option2": "bee", "answer": "2"}],
}


def asked(context: str, *continuations: str) -> list[tuple[str, str]]:
    return [(context, continuation) for continuation in continuations]


# The requests that the harness makes of each task's last row, and the number of the right one.
REQUESTS = {
    "hellaswag": (
        asked("Bee: A bee flies. home. The bee", "  sleeps.", " eats a stone.", " waits 4 days.", " hums"), 0
    ),
    "lambada_openai": (asked("It rained for 4 days and then it\nrained some", " more"), 0),
    "arc_easy": (asked("Question: What do bees make 6?\nAnswer:", " iron", " honey"), 1),
    "arc_challenge": (
        asked("Question: Where do bees live?\nAnswer:", " sea", " moon", " hive", " fire", " ice"), 2
    ),
    "commonsense_qa": (
        asked("Question: Who flies?\nA. bee\nB. ox\nC. cat\nD. dog\nE. cow\nAnswer:",
              " A", " B", " C", " D", " E"), 0
    ),
    "piqa": (asked("Question: Find honey\nAnswer:", " ask a bee", " ask an ox"), 1),
    "openbookqa": (asked("Bees make", " honey", " wool", " milk", " tin"), 0),
    "sciq": (asked("\nQuestion: What flies?\nAnswer:", " ox", " cat", " cow", " bee"), 3),
    "winogrande": ([(f"{OX} ox", " flew away."), (f"{OX} bee", " flew away.")], 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def icl(tmp_path_factory) -> Path:
    """DATA_DIR/TASK/SPLIT.jsonl for all nine tasks."""
    folder = tmp_path_factory.mktemp("icl")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        write_rows(folder / name / f"{TASKS[name].split}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def examples_of(name: str, icl: Path) -> list[Example]:
    return load_tasks([name], None, icl, 96, None)[name]


def pairs_of(icl: Path, tokenizer, *names: str) -> list:
    """All requests of some tasks, as tokens."""
    requests = []
    for name in names:
        for example in examples_of(name, icl):
            requests += example.requests
    return encode_requests(tokenizer, requests)


def by_hand(model, context, continuation, iters: int) -> tuple[float, bool]:
    """One request alone: full logits, log-softmax, the last positions."""
    ids = (context + continuation)[-(model.config.block_size + 1) :]
    logits = model(torch.tensor([ids[:-1]]), iters=iters)[0][0, -len(continuation) :]
    target = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == target).all())


def greedy_text(model, ids: list[int], n: int, iters: int) -> list[int]:
    """The n best next tokens, one after the other, without a cache."""
    new = list(ids)
    for _ in range(n):
        new.append(model(torch.tensor([new]), iters=iters)[0][0, -1].argmax().item())
    return new[len(ids) :]


def calls_of(part) -> list[int]:
    """The tokens of every call from now on."""
    calls = []
    part.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[:-1].numel()))
    return calls


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize("name", DOWNLOADED)
def test_requests_are_the_harness_strings(name, icl):
    assert examples_of(name, icl)[-1] == REQUESTS[name]


def test_whitespace_and_empty_contexts(tokenizer):
    assert encode_requests(tokenizer, [("a b  ", " c")]) == [(list(b"a b"), list(b"   c"))]
    assert encode_requests(tokenizer, [("", "word")]) == [([256], list(b"word"))]


# -------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "rule, batch_size", [("abbie_d", 1), ("abbie_c", 3), ("zero_pt", 32), ("recall", 64)]
)
def test_scores_equal_one_request_at_a_time(rule, batch_size, icl, tokenizer):
    model, iters = make(**SHAPE, rule=rule), [1, 2, 5]
    pairs = pairs_of(icl, tokenizer, *ROWS)
    pairs += encode_requests(tokenizer, [("x" * 150, " long"), ("", "none")])
    context = list(b"The bee")
    pairs.append((context, greedy_text(model, context, 4, iters=2)))
    scores, greedy, truncated, _ = score(model, pairs, iters, batch_size)
    expected = [[by_hand(model, *pair, r) for r in iters] for pair in pairs]
    assert np.abs(scores - [[nats for nats, _ in row] for row in expected]).max() < 1e-4
    assert (greedy == [[hit for _, hit in row] for row in expected]).all()
    assert truncated == [len(pairs) - 3]
    assert greedy[-1, 1] and not greedy.all()
    assert np.abs(scores[:, 0] - scores[:, 2]).max() > 0.1  # r matters here


@pytest.mark.parametrize("exit", ["kl:3e-3", "u:5e-2"])
def test_adaptive_scores_do_not_depend_on_neighbours(exit, model, icl, tokenizer):
    pairs = pairs_of(icl, tokenizer, "hellaswag")[:4] + pairs_of(icl, tokenizer, "arc_easy")[:6]
    scores, _, _, mean_iters = score(model, pairs, [1, 2, 6, exit, "kl:1e-30", "u:1e9"], batch_size=5)
    assert np.allclose(scores[:, :3], score(model, pairs, [1, 2, 6])[0], atol=1e-5)
    assert np.allclose(scores[:, 4:], scores[:, [2, 1]], atol=1e-4)  # nothing exits, everything at once
    assert mean_iters[4:] == [6, 2] and 2 < mean_iters[3] < 6
    for pair, row in zip(pairs, scores):
        alone, *_ = score(model, [pair], [6, exit])
        assert row[3] == pytest.approx(alone[0, 1], abs=1e-3)


def test_a_threshold_for_the_wanted_mean(corpus):
    model = make(**SHAPE)
    model.meta = {"data": str(corpus)}
    exit = resolve_exit(model, "mean:3.2", 8)
    found = eval_icl.perplexity(model, Shards(corpus, "val", 96), [8, exit])["iters"][exit]
    assert found["mean_iters"] == pytest.approx(3.2, abs=0.2)
    with pytest.raises(UserError, match="between 2 and iters=8"):
        resolve_exit(model, "mean:9", 8)


def test_exits_that_are_the_same_have_one_column(ckpt, tmp_path):
    flags = ["--exit=kl:1e1,kl:1e1,kl:1e-9", "--tasks=cloze", "--limit=5", f"--out={tmp_path}/r.json"]
    main([f"--ckpt={ckpt}", "--iters=1,8", *flags])
    found = json.loads((tmp_path / "r.json").read_text())["tasks"]["cloze"]["iters"]
    assert list(found) == ["1", "8", "kl:1e1", "kl:1e-9"]
    assert found["kl:1e1"]["mean_iters"] == 2 and found["kl:1e-9"]["mean_iters"] > 7


def test_data_that_is_named_counts_for_the_built_in_tasks_too(corpus, tmp_path, capsys):
    nowhere = save(tmp_path / "run", 1, make(**SHAPE), tokenizer="bytes", data=str(tmp_path / "gone"))
    flags = [f"--ckpt={nowhere}", "--iters=1", "--tasks=cloze", "--limit=3"]
    with pytest.raises(UserError, match="gone holds no prepared data"):
        main(flags)
    main([*flags, f"--ppl={corpus}"])
    assert "cloze" in capsys.readouterr().out


def test_one_sweep_and_shared_contexts(icl, tokenizer):
    """A sweep costs max(iters) Bodies and a Tail per entry; a context is read once for all its
    continuations."""
    model = make(**SHAPE)
    body, tail = calls_of(model.body[0]), calls_of(model.tail[0])
    pairs = pairs_of(icl, tokenizer, "hellaswag")[:4]
    score(model, pairs, [1, 2, 4, 8])
    assert (len(body), len(tail)) == (8, 4)
    context = list(b"The ox saw")
    score(model, [(context, list(text)) for text in (b" a big ox", b" a bee", b" a b")], [1])
    assert body[-1] == len(context) + len(b" a big o") + len(b" a be") + len(b" a ")


def test_validation_loss_is_the_model_s(model, corpus):
    shards = Shards(corpus, "val", 96)
    chosen = np.arange(10) * shards.n_windows // 10  # evenly over the split
    losses = eval_icl.evaluate_loss(model, shards, [4, 1], n_windows=10, batch_size=3)
    assert list(losses) == [1, 4]
    for r, loss in losses.items():
        assert loss == pytest.approx(model(*shards.batch(chosen), iters=r)[1].item(), abs=1e-5)


def test_logits_are_held_in_parts(corpus, monkeypatch):
    model = make(**SHAPE)
    shards = Shards(corpus, "val", 96)
    whole = eval_icl.evaluate_loss(model, shards, [2], n_windows=4)
    monkeypatch.setattr(eval_icl, "LOGITS_AT_A_TIME", 257 * 10)
    parts = calls_of(model.unembed)
    assert eval_icl.evaluate_loss(model, shards, [2], n_windows=4) == pytest.approx(whole, abs=1e-5)
    assert max(parts) == 10


# -------------------------------------------------------------------------------------------------- metrics


def test_acc_norm_is_per_character_without_the_space():
    example = Example([("Bees make", " honey"), ("Bees make", " iron")], 0)
    scores, greedy = np.array([[-4.9], [-4.0]]), np.zeros((2, 1), bool)  # -0.98 a character against -1
    assert not eval_icl.is_right(example, scores, greedy, "acc")
    assert eval_icl.is_right(example, scores, greedy, "acc_norm")


def test_metrics_follow_from_the_samples(model, icl, tokenizer, tmp_path):
    """Every metric, recomputed from --log_samples and the rows."""
    with open(tmp_path / "s.jsonl", "w") as log:
        results = run_tasks(model, tokenizer, list(ROWS), [1, 4], None, icl, log=log, bootstrap_iters=2000)
    samples = [json.loads(line) for line in open(tmp_path / "s.jsonl")]
    assert list(samples[0]) == ["task", "doc_id", "iters", "loglikelihoods", "is_greedy", "gold"]
    for name, r in itertools.product(ROWS, (1, 4)):
        mine = [line for line in samples if line["task"] == name and line["iters"] == r]
        assert [line["doc_id"] for line in mine] == list(range(len(ROWS[name])))
        found = results["tasks"][name]["iters"][str(r)]
        assert ("acc_norm" in found) == (name not in ("commonsense_qa", "winogrande", "lambada_openai"))
        nats, gold = [line["loglikelihoods"] for line in mine], [line["gold"] for line in mine]
        right = {"acc": [np.argmax(row) for row in nats] == np.array(gold)}
        if name == "lambada_openai":
            right = {"acc": np.array([all(line["is_greedy"]) for line in mine])}
            assert found["perplexity"] == pytest.approx(math.exp(-np.mean(nats)))
        if "acc_norm" in found:
            lengths = [[len(text[1:]) for _, text in e.requests] for e in examples_of(name, icl)]
            best = [np.argmax(np.divide(*row)) for row in zip(nats, lengths)]
            right["acc_norm"] = best == np.array(gold)
        for metric, hits in right.items():
            stderr = np.std(hits, ddof=1) / len(hits) ** 0.5 if len(hits) > 1 else "N/A"
            assert found[metric] == pytest.approx(np.mean(hits))
            assert found[metric + "_stderr"] == (stderr if stderr == "N/A" else pytest.approx(stderr))


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
    assert result["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert eval_icl.mcnemar(before, before)["p"] == 1


# ------------------------------------------------------------------------------------------ built-in tasks


def test_built_in_tasks_are_made_of_validation_text(corpus, tokenizer):
    tasks = load_tasks(BUILT_IN, corpus, "nowhere", 96, None)
    text = "".join(tokenizer.decode(tokens.tolist()) for tokens in documents(corpus, "val"))
    assert {example.gold for example in tasks["cloze"]} == {0, 1, 2, 3}
    for example in tasks["cloze"]:
        context, continuation = example.requests[example.gold]
        assert len(example.requests) == 4
        assert context + continuation in text and len(context) <= 48
    for example in tasks["lastword"]:
        [(context, word)] = example.requests
        assert context + word + "\n" in text and " " not in word[1:]


def test_built_in_tasks_are_the_same_ones_with_every_limit(corpus):
    """300 examples by default, as many as the text yields with a larger limit, and always the same first."""
    few, usual, many = (load_tasks(BUILT_IN, corpus, "nowhere", 96, limit) for limit in (20, None, 2000))
    for name in BUILT_IN:
        assert len(few[name]) == 20 and len(usual[name]) == 300 < len(many[name]) <= 2000
        assert many[name][:300] == usual[name] and usual[name][:20] == few[name]


# -------------------------------------------------------------------------------------------- the command


def start(command: list[str], **env) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes)


def test_command_writes_the_same_on_any_number_of_processes(ckpt, icl, tmp_path, capsys):
    args = [f"--ckpt={ckpt}", "--iters=2,1,4", "--tasks=arc_easy,lambada_openai,cloze", "--ppl", "--limit=6",
            f"--data_dir={icl}", "--batch_size=2", "--bootstrap_iters=200", "--exit=kl:1e-2"]  # fmt: skip
    main([*args, f"--out={tmp_path}/1.json", f"--log_samples={tmp_path}/1.jsonl"])
    table = capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_icl.py"]
    two = start([*torchrun, *args, f"--out={tmp_path}/2.json", f"--log_samples={tmp_path}/2.jsonl"])
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert out == table
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()

    results = json.loads((tmp_path / "1.json").read_text())
    assert list(results["tasks"]["arc_easy"]["iters"]) == ["1", "2", "4", "kl:1e-2"]
    assert 2 <= results["ppl"]["iters"]["kl:1e-2"]["mean_iters"] <= 4 and "mean_iters" in table
    assert results["tasks"]["arc_easy"]["paired"]["reference"] == 2
    assert "6/2376" in table and "*" in table
    loss, val = results["ppl"]["iters"]["2"], Shards(results["ppl"]["data"], "val", 96)
    assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
    assert loss["bits_per_byte"] == pytest.approx(loss["loss"] / math.log(2) * val.n_tokens / val.n_bytes)
    assert results["ppl"]["n"] + results["ppl"]["left_out"] == val.n_tokens


def test_three_ranks_end_with_one_error_and_status_2(ckpt, icl, tmp_path):
    """Ranks 0 and 1 do not find their data, rank 2 does: one error, and nobody waits for anybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env, ranks = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, []
    for rank, data_dir in enumerate([tmp_path, tmp_path, icl]):
        command = ["eval_icl.py", f"--ckpt={ckpt}", "--tasks=arc_easy", f"--data_dir={data_dir}"]
        ranks.append(start(command, RANK=str(rank), LOCAL_RANK=str(rank), **env))
    (out, err), *others = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert out == "" and others == [("", ""), ("", "")]
    assert err.startswith("error: ") and "prepare_data.py icl" in err and len(err.splitlines()) <= 3


def test_errors_name_what_is_wrong(ckpt, tmp_path, monkeypatch):
    def refused(*args, match):
        with pytest.raises(UserError, match=match) as error:
            main([f"--ckpt={ckpt}", *args])
        assert len(str(error.value).splitlines()) <= 3

    refused("--tasks=arc_esy", match="did you mean arc_easy")
    refused("--limit=0", match="at least 1")
    refused("--tasks=cloze", "--num_fewshot=5", match="--num_fewshot is for --lm_eval")
    refused("--tasks=arc_easy", f"--data_dir={tmp_path}", match="python prepare_data.py icl")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    refused("--lm_eval=mmlu", match="pip install lm_eval")
    strange = save(tmp_path / "strange", 1, make(**SHAPE), tokenizer="p50k_base")
    refused(f"--ckpt={strange}", "--lm_eval=mmlu", match="not of p50k_base")


def test_unusable_rows_are_named(model, tokenizer, tmp_path):
    def refused(*rows, match):
        write_rows(tmp_path / "piqa/validation.jsonl", rows)
        with pytest.raises(UserError, match=match):
            run_tasks(model, tokenizer, ["piqa"], [1], None, tmp_path)

    (tmp_path / "piqa").mkdir()
    sound = ROWS["piqa"][0]
    refused(match="no rows")
    refused(sound, {"goal": "x"}, match="line 2, is no row of piqa .*KeyError")
    refused(sound, {**sound, "label": 2}, match="line 2, is no row of piqa .*no choice 2")
    refused(sound, {**sound, "sol1": ""}, match="line 2, is no row of piqa .*an empty choice")
    refused({**sound, "sol1": "ask " * 30}, match="does not fit into a context of 96")


# --------------------------------------------------------------------------------------------- the harness


def test_the_harness_runs_its_tasks_on_our_models(ckpt, model, tokenizer, tmp_path, capsys):
    """A task file of one's own, scored by the harness with a shot before every context: the same word
    perplexity as by hand, at every r."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval==0.4.13")
    rows = [{"text": "The bee", "end": " flies"}, {"text": "It", "end": " rains"}, {"text": "I", "end": ""}]
    write_rows(tmp_path / "test.jsonl", rows)
    write_rows(tmp_path / "train.jsonl", [{"text": "A cat", "end": " purrs"}])
    files = {split: f"{tmp_path}/{split}.jsonl" for split in ("train", "test")}
    metric = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    task = {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": f"{tmp_path}/cache"},
        "output_type": "loglikelihood",
        "training_split": "train",
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{end}}",
        "target_delimiter": "",
        "metric_list": [metric],
    }
    (tmp_path / "endings.yaml").write_text(json.dumps(task))  # JSON is YAML
    args = [f"--ckpt={ckpt}", "--iters=1,3", f"--include_path={tmp_path}", f"--out={tmp_path}/r.json"]
    args += ["--num_fewshot=1", "--limit=2", "--bootstrap_iters=10"]
    main([*args, "--lm_eval=endings"])
    assert "endings" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())["lm_eval"]
    shot = "A cat purrs\n\n"
    pairs = encode_requests(tokenizer, [(shot + row["text"], row["end"]) for row in rows[:2]])
    for r in (1, 3):
        nats = [by_hand(model, *pair, r)[0] for pair in pairs]
        expected = math.exp(-np.mean(nats))
        assert found[str(r)]["endings"]["perplexity,none"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="did you mean endings"):
        main([*args, "--lm_eval=ending"])
