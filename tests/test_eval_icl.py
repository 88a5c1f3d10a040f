"""eval_icl.py: scored as by lm-evaluation-harness, in one sweep, on any number of ranks."""

import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from common import calls_of, greedy, make, refused, save, start_python

import eval_icl
from data import Shards, documents, get_tokenizer
from eval_icl import BUILT_IN, DOWNLOADED, TASKS, Example, encode_requests, load_task, main, run_task, score
from model import AbbIE

BYTES = get_tokenizer("bytes")


def small(**keys) -> AbbIE:
    return make(vocab_size=257, block_size=96, **keys)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """A checkpoint whose data has moved."""
    folder = tmp_path_factory.mktemp("run")
    return f"--ckpt={save(folder, 1, small(), data=str(folder / 'gone'))}"


def choices(key: str, *texts: str, labels: str = "ABCDE") -> dict:
    return {"answerKey": key, "choices": {"text": list(texts), "label": list(labels[: len(texts)])}}


SCIQ = {"question": "What flies?", "correct_answer": "bee"}
SCIQ |= {"distractor1": "ox", "distractor2": "cat", "distractor3": "cow"}
BEE = {"activity_label": "Bee", "ctx_a": "A bee flies [title] home.", "ctx_b": "THE Bee"}
BEE["endings"] = ["[step] sleeps.", "eats [x] a  stone.", "waits 4 days.", " hums "]
MADE = ["iron", "honey", "noise"]
PIQA = {"goal": "Find hönéy", "sol1": "ask a bee", "sol2": "ask an öx " + "or a cow " * 9}
ROWS = {
    "hellaswag": [{**BEE, "label": str(i % 4)} for i in range(5)],
    "lambada_openai": [{"text": f"It rained for {i} days and then it\nrained some more"} for i in range(5)],
    "arc_easy": [
        {"question": f"What do bees make {i}?", **choices("2", *MADE[: 2 + i % 2], labels="123")}
        for i in range(7)
    ],
    "arc_challenge": [{"question": "Where?", **choices("C", "sea", "moon", "hive", "fire", "ice")}],
    "commonsense_qa": [{"question": " Who flies? ", **choices("A", "bee", "ox", "cat", "dog", "cow")}],
    "piqa": [{**PIQA, "label": i % 2} for i in range(4)],
    "openbookqa": [{"question_stem": "Bees make", **choices(" A", "honey", "wool", "milk", "tin")}],
    "sciq": [{"support": "  Bees fly.", **SCIQ}, {"support": "", **SCIQ}],
    "winogrande": [{"sentence": "The _ flew away.", "option1": "ox", "option2": "bee", "answer": "2"}],
}


def write_rows(folder: Path, name: str, rows: list):
    path = folder / name / f"{TASKS[name].split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def icl(tmp_path_factory) -> Path:
    """DATA_DIR/TASK/SPLIT.jsonl for all nine tasks."""
    folder = tmp_path_factory.mktemp("icl")
    for name, rows in ROWS.items():
        write_rows(folder, name, rows)
    return folder


def by_hand(model, context: list[int], continuation: list[int], iters: int) -> tuple[float, bool]:
    """One request alone: full logits, log-softmax, the last positions."""
    ids = (context + continuation)[-(model.config.block_size + 1) :]
    logits = model(torch.tensor([ids[:-1]]), iters=iters)[0][0, -len(continuation) :]
    target = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == target).all())


# ------------------------------------------------------------------------------------------ the harness


def harness(model: AbbIE, icl: Path, folder: Path, iters: int) -> dict:
    """What lm-evaluation-harness makes of the rows with its own task files, one request at a time by hand."""
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    class ByHand(TemplateLM):
        eot_token_id = 256
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return list(string.encode())

        def _loglikelihood_tokens(self, requests, **kwargs):
            return [by_hand(model, context, continuation, iters) for _, context, continuation in requests]

    paths = {"lambada_openai": "lambada/lambada_openai", "commonsense_qa": "commonsense_qa/default"}
    paths |= {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge"}
    paths |= {"winogrande": "winogrande/default"}
    for name in DOWNLOADED:  # its own definition, with nothing changed but where the rows are
        split = TASKS[name].split
        path = f"{Path(lm_eval.__file__).parent}/tasks/{paths.get(name, f'{name}/{name}')}.yaml"
        task = {"include": path, "task": name, "dataset_path": "json", "dataset_name": None}
        rows = {split: f"{icl}/{name}/{split}.jsonl"}
        task["dataset_kwargs"] = {"data_files": rows, "cache_dir": str(folder)}
        task |= {"training_split": None, "validation_split": None, "test_split": split}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    tasks = [f"{folder}/{name}.yaml" for name in DOWNLOADED]
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(ByHand(), tasks=tasks, task_manager=manager, bootstrap_iters=0)


def test_every_example_is_scored_as_by_the_harness(icl, tmp_path):
    model = small()
    theirs = harness(model, icl, tmp_path, iters=3)
    for name in DOWNLOADED:
        examples = load_task(name, None, icl, 96, None)
        result, lines = run_task(model, BYTES, name, examples, [1, 3, 4], batch_size=5)
        lines = [line for line in lines if line["iters"] == 3]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert [line["doc_id"] for line in lines] == [sample["doc_id"] for sample in samples]
        metrics = set(TASKS[name].metrics)
        for example, line, sample in zip(examples, lines, samples):
            scores, hits = zip(*[pair for [pair] in sample["resps"]])
            assert example.requests == list(sample["arguments"])
            assert line["loglikelihoods"] == pytest.approx(scores, abs=1e-4)
            assert tuple(line["is_greedy"]) == hits
            mine = eval_icl.measure(example, np.array([scores]).T, np.array([hits]).T)
            assert all(mine[metric] == sample[metric] for metric in metrics - {"perplexity"})
        entry, whole = result["iters"]["3"], theirs["results"][name]
        for metric in metrics:
            assert entry[metric] == pytest.approx(whole[f"{metric},none"], rel=1e-4)
            if metric != "perplexity" and len(samples) > 1:
                stderr = np.std([sample[metric] for sample in samples], ddof=1) / len(samples) ** 0.5
                assert entry[f"{metric}_stderr"] == pytest.approx(stderr)


# ----------------------------------------------------------------------------------------------- scores


def test_a_request_is_split_after_the_tokens_of_its_context():
    """Whitespace at its end belongs to the continuation; one that is empty becomes the end-of-text token."""
    for request, expected in [(("a b  ", " c"), (b"a b", b"   c")), (("", "word"), ([256], b"word"))]:
        [pair] = encode_requests(BYTES, [request])
        assert [part.tolist() for part in pair] == [list(part) for part in expected]
    refused("'' adds no token to its context", encode_requests, BYTES, [("a", " b"), ("a", "")])


@pytest.mark.parametrize("rule, batch_size", [("abbie_d", 3), ("recall", 64)])
def test_scores_of_a_sweep_equal_one_request_at_a_time(rule, batch_size, icl):
    model, iters = small(rule=rule), [1, 2, 5]
    examples = [example for name in DOWNLOADED for example in load_task(name, None, icl, 96, None)]
    requests = [request for example in examples for request in example.requests]
    pairs = encode_requests(BYTES, [*requests, ("x" * 150, " long"), ("", "none")])
    context = list(b"The bee")
    pairs.append((torch.tensor(context), torch.tensor(greedy(model, context, 4, iters=2))))
    scores, is_greedy = score(model, pairs, iters, batch_size)
    for row, hits, (context, tokens) in zip(scores, is_greedy, pairs):
        alone = [by_hand(model, context.tolist(), tokens.tolist(), r) for r in iters]
        assert row == pytest.approx([nats for nats, _ in alone], abs=1e-4)
        assert list(hits) == [hit for _, hit in alone]
    assert is_greedy[-1, 1] and not is_greedy.all()
    assert np.abs(scores[:, 0] - scores[:, 2]).max() > 0.1  # r matters here


def test_a_sweep_costs_the_largest_r_and_unembeds_what_is_scored():
    model = small()
    body, tail, unembed = calls_of(model.body[0]), calls_of(model.tail[0]), calls_of(model.unembed)
    requests = [("The ox saw", " a bee"), ("It", " hums")]
    score(model, encode_requests(BYTES, requests), [1, 2, 4, 8])
    assert (len(body), len(tail)) == (8, 4)
    assert unembed == 4 * [(len(" a bee") + len(" hums"),)]


def test_validation_loss_is_the_models(corpus, monkeypatch):
    model, shards = small(), Shards(corpus, "val", 96)
    windows = np.arange(10) * shards.n_windows // 10  # evenly over the split
    expected = {r: model(*shards.batch(windows), iters=r)[1].item() for r in (1, 4)}
    for held, batch_size in ((eval_icl.LOGITS_AT_A_TIME, 3), (257 * 10, 32)):
        monkeypatch.setattr(eval_icl, "LOGITS_AT_A_TIME", held)
        loss = eval_icl.evaluate_loss(model, shards, [4, 1], 10, batch_size=batch_size)
        assert loss == pytest.approx(expected, abs=1e-5)
    model.norm.weight.data[0] = math.nan
    refused("the model is not finite", eval_icl.perplexity, model, shards, [1])


# ---------------------------------------------------------------------------------------------- metrics


def test_acc_norm_is_per_character_without_the_space():
    example = Example([("Bees make", " höney"), ("Bees make", " iron")], 0)
    scores = np.array([[-4.9, -5.1], [-4.0, -4.0]])  # -0.98 and -1.02 a character, against -1
    assert eval_icl.measure(example, scores, None)["acc_norm"].tolist() == [True, False]


def test_the_error_of_a_perplexity_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    nats = rng.gamma(4, 1, 400)
    resampled = np.exp(rng.choice(nats, (5000, 400)).mean(1))
    entry = eval_icl.summarize({"perplexity": nats[:, None]}, [2])["2"]
    assert entry["perplexity"] == pytest.approx(math.exp(nats.mean()))
    assert entry["perplexity_stderr"] == pytest.approx(np.std(resampled), rel=0.05)


def test_paired_test_is_the_exact_binomial():
    before, after = np.zeros(20, bool), np.zeros(20, bool)
    before[:2], after[2:12] = True, True
    result = eval_icl.mcnemar(before, after)
    assert (result["gained"], result["lost"]) == (10, 2)
    assert result["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert eval_icl.mcnemar(before, before)["p"] == 1


# --------------------------------------------------------------------------------------- built-in tasks


def test_built_in_tasks_are_made_of_validation_text(corpus):
    """300 examples by default, and as many as the text yields with a larger limit."""
    tasks = {}
    for name in BUILT_IN:
        few, usual, many = (load_task(name, corpus, None, 96, limit) for limit in (20, None, 2000))
        assert len(few) == 20 and len(usual) == 300 < len(many) <= 2000
        assert many[:300] == usual and usual[:20] == few
        tasks[name] = usual
    text = "".join(BYTES.decode(tokens.tolist()) for tokens in documents(corpus, "val"))
    assert {example.gold for example in tasks["cloze"]} == {0, 1, 2, 3}
    for example in tasks["cloze"]:
        context, continuation = example.requests[example.gold]
        assert len(example.requests) == 4
        assert context + continuation in text and len(context) <= 48
    for example in tasks["lastword"]:
        [(context, word)] = example.requests
        assert context + word + "\n" in text and " " not in word[1:]


# ------------------------------------------------------------------------------------------ the command


def test_any_number_of_processes_writes_the_same(ckpt, icl, corpus, tmp_path, capsys):
    args = [ckpt, "--iters=2,1,4", "--tasks=arc_easy, lambada_openai ,cloze", f"--ppl={corpus}"]
    args += ["--limit=6", f"--data_dir={icl}", "--batch_size=2"]
    main([*args, f"--out={tmp_path}/1.json", f"--log_samples={tmp_path}/1.jsonl"])
    table, log = capsys.readouterr()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_icl.py"]
    files = [f"--out={tmp_path}/2.json", f"--log_samples={tmp_path}/2.jsonl"]
    two = start_python([*torchrun, *args, *files], text=True)
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert out == table and log.startswith("evaluating") and err.count("evaluating") == 1
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()

    results = json.loads((tmp_path / "1.json").read_text())
    assert list(results["tasks"]) == ["arc_easy", "lambada_openai", "cloze"]
    assert list(results["tasks"]["arc_easy"]["iters"]) == ["1", "2", "4"]
    assert results["tasks"]["arc_easy"]["paired"]["reference"] == 2
    loss, val = results["ppl"]["iters"]["2"], Shards(corpus, "val", 96)
    assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
    bits = loss["loss"] * val.n_tokens / math.log(2)
    assert loss["bits_per_byte"] == pytest.approx(bits / val.n_bytes)
    assert results["ppl"]["n"] + results["ppl"]["left_out"] == val.n_tokens


def test_two_ranks_end_with_one_error_and_status_2(ckpt, icl, tmp_path):
    """Rank 0 finds its data, rank 1 does not: one error, and nobody waits for anybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env, ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, []
    for rank, data_dir in enumerate([icl, tmp_path]):
        command = ["eval_icl.py", ckpt, "--tasks=arc_easy", f"--data_dir={data_dir}"]
        env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start_python(command, env=env, text=True))
    first, (out, err) = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert out == "" and first == ("", "")
    assert err.startswith("error: ") and "prepare_data.py icl" in err and len(err.splitlines()) <= 3


def test_rows_that_do_not_fit_are_left_out_and_counted(ckpt, tmp_path, capsys):
    """And the scores of a task are kept when a later one fails."""
    sound, long = ROWS["piqa"][0], {**ROWS["piqa"][0], "sol1": "ask " * 30}
    write_rows(tmp_path, "piqa", [long, sound, long, sound])
    write_rows(tmp_path, "winogrande", [{**ROWS["winogrande"][0], "sentence": "_" + "ask " * 30}])
    out, log = tmp_path / "r.json", tmp_path / "s.jsonl"
    log.write_text("of an earlier run")
    flags = [ckpt, "--iters=1,2", f"--data_dir={tmp_path}", f"--out={out}", f"--log_samples={log}"]
    main([*flags, "--tasks=piqa"])
    title, acc, _, note = capsys.readouterr().out.splitlines()
    assert title.split() == ["*:", "best", "n", "r=1", "r=2"]
    assert acc.split()[:3] == ["piqa", "acc", "2/1838"] and "*" in acc
    assert note.startswith("piqa: 2 rows left out")
    before = out.read_bytes(), log.read_bytes()
    result = json.loads(before[0])["tasks"]["piqa"]
    assert (result["n"], result["left_out"]) == (2, 2)
    lines = [json.loads(line) for line in before[1].splitlines()]
    assert [(line["doc_id"], line["iters"]) for line in lines] == [(1, 1), (1, 2), (3, 1), (3, 2)]

    out.unlink(), log.unlink()
    refused("winogrande: no row's continuations fit", main, [*flags, "--tasks=piqa,winogrande"])
    assert (out.read_bytes(), log.read_bytes()) == before
    refused("sciq/test.jsonl is missing", main, [*flags, "--tasks=piqa,sciq"])
    assert (out.read_bytes(), log.read_bytes()) == before


def test_bfloat16_is_a_flag_and_near(ckpt, corpus, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        flags = [f"--ppl={corpus}", f"--dtype={dtype}", f"--out={tmp_path}/r.json"]
        main([ckpt, "--iters=2", *flags])
        results = json.loads((tmp_path / "r.json").read_text())
        assert results["dtype"] == dtype
        losses.append(results["ppl"]["iters"]["2"]["loss"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], abs=0.05)


def test_data_that_has_moved_is_named_by_a_flag(ckpt):
    refused("gone holds no prepared data(.*\n)+.*--ppl", main, [ckpt, "--iters=1", "--limit=3"])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "has no rows"),
        ([PIQA], "line 1 is no row of piqa.*KeyError"),
        ([["x"]], "line 1 is no row of piqa.*TypeError"),
        ([ROWS["piqa"][0], {**PIQA, "label": 2}], "line 2 is no row of piqa.*no choice 2"),
        ([{**PIQA, "label": 0, "sol1": ""}], "line 1 is no row of piqa.*an empty choice"),
    ],
)
def test_unusable_rows_are_named(tmp_path, rows, message):
    write_rows(tmp_path, "piqa", rows)
    refused(message, load_task, "piqa", None, tmp_path, 96, None)
