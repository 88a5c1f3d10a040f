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
        {"goal": "Find hönéy", "sol1": "ask a bee", "sol2": "ask an öx " + "or a cow " * 9, "label": i % 2}
        for i in range(4)
    ],
    "openbookqa": [{"question_stem": "Bees make", **choices(" A", "honey", "wool", "milk", "tin")}],
    "sciq": [{"support": "  Bees fly.", **SCIQ}, {"support": "", **SCIQ}],
    "winogrande": [{"sentence": f"{OX} _ flew away.", "option1": "ox", "option2": "bee", "answer": "2"}],
}


def write_rows(path: Path, rows: list[dict]):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def icl(tmp_path_factory) -> Path:
    """DATA_DIR/TASK/SPLIT.jsonl for all nine tasks."""
    folder = tmp_path_factory.mktemp("icl")
    for name, rows in ROWS.items():
        write_rows(folder / name / f"{TASKS[name].split}.jsonl", rows)
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
        rows = {"data_files": {split: f"{icl}/{name}/{split}.jsonl"}, "cache_dir": str(folder)}
        splits = {
            **dict.fromkeys(("training_split", "validation_split", "test_split")),
            f"{split}_split": split,
        }
        task = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": rows, **splits}
        path = f"{Path(lm_eval.__file__).parent}/tasks/{paths.get(name, f'{name}/{name}')}.yaml"
        (folder / f"{name}.yaml").write_text(json.dumps({"include": path, **task}))  # JSON is YAML
    tasks = [f"{folder}/{name}.yaml" for name in DOWNLOADED]
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(ByHand(), tasks=tasks, task_manager=manager, bootstrap_iters=0)


def test_every_example_is_scored_as_by_the_harness(model, icl, tokenizer, tmp_path):
    theirs = harness(model, icl, tmp_path, iters=3)
    for name in DOWNLOADED:
        examples = load_task(name, None, icl, 96, None)
        result, mine = run_task(model, tokenizer, name, examples, [1, 3, 4], batch_size=5)
        mine = [line for line in mine if line["iters"] == 3]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert [line["doc_id"] for line in mine] == [sample["doc_id"] for sample in samples]
        for example, line, sample in zip(examples, mine, samples):
            scores, hits = zip(*[pair for [pair] in sample["resps"]])
            assert example.requests == list(sample["arguments"])
            assert line["loglikelihoods"] == pytest.approx(scores, abs=1e-4)
            assert tuple(line["is_greedy"]) == hits
            for metric in set(TASKS[name].metrics) - {"perplexity"}:
                values = [[score] for score in line["loglikelihoods"]], [[hit] for hit in line["is_greedy"]]
                assert eval_icl.measure(metric, example, *map(np.array, values)) == [sample[metric]]
        entry = result["iters"]["3"]
        for metric in TASKS[name].metrics:
            assert entry[metric] == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-4)
            if metric != "perplexity" and len(samples) > 1:
                values = [sample[metric] for sample in samples]
                stderr = np.std(values, ddof=1) / len(values) ** 0.5
                assert entry[f"{metric}_stderr"] == pytest.approx(stderr)


# ----------------------------------------------------------------------------------------------- scores


def test_whitespace_and_empty_contexts(tokenizer):
    for request, expected in [(("a b  ", " c"), (b"a b", b"   c")), (("", "word"), ([256], b"word"))]:
        [pair] = encode_requests(tokenizer, [request])
        assert [part.tolist() for part in pair] == [list(part) for part in expected]


RULES = [("abbie_d", 1), ("abbie_c", 3), ("zero_pt", 32), ("recall", 64)]


@pytest.mark.parametrize("rule, batch_size", RULES)
def test_scores_of_a_sweep_equal_one_request_at_a_time(rule, batch_size, icl, tokenizer):
    model, iters = make(**SHAPE, rule=rule), [1, 2, 5]
    examples = [example for name in DOWNLOADED for example in load_task(name, None, icl, 96, None)]
    requests = [request for example in examples for request in example.requests]
    pairs = encode_requests(tokenizer, [*requests, ("x" * 150, " long"), ("", "none")])
    context = list(b"The bee")
    pairs.append((torch.tensor(context), torch.tensor(greedy(model, context, 4, iters=2))))
    scores, is_greedy = score(model, pairs, iters, batch_size)
    for row, hits, (context, tokens) in zip(scores, is_greedy, pairs):
        alone = [by_hand(model, context.tolist(), tokens.tolist(), r) for r in iters]
        assert row == pytest.approx([nats for nats, _ in alone], abs=1e-4)
        assert list(hits) == [hit for _, hit in alone]
    assert is_greedy[-1, 1] and not is_greedy.all()
    assert np.abs(scores[:, 0] - scores[:, 2]).max() > 0.1  # r matters here


def test_a_sweep_costs_the_largest_r_and_unembeds_what_is_scored(tokenizer):
    model = make(**SHAPE)
    body, tail, unembed = calls_of(model.body[0]), calls_of(model.tail[0]), calls_of(model.unembed)
    requests = [("The ox saw", " a bee"), ("It", " hums")]
    score(model, encode_requests(tokenizer, requests), [1, 2, 4, 8])
    assert (len(body), len(tail)) == (8, 4)
    assert unembed == 4 * [(len(" a bee") + len(" hums"),)]


def test_validation_loss_is_the_models(model, corpus, monkeypatch):
    shards = Shards(corpus, "val", 96)
    windows = np.arange(10) * shards.n_windows // 10  # evenly over the split
    expected = {r: model(*shards.batch(windows), iters=r)[1].item() for r in (1, 4)}
    for held, batch_size in ((eval_icl.LOGITS_AT_A_TIME, 3), (257 * 10, 32)):
        monkeypatch.setattr(eval_icl, "LOGITS_AT_A_TIME", held)
        loss = eval_icl.evaluate_loss(model, shards, [4, 1], 10, batch_size=batch_size)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_a_model_that_is_not_finite_has_no_perplexity(corpus):
    model = make(**SHAPE)
    model.norm.weight.data[0] = math.nan
    shards = Shards(corpus, "val", 96)
    refused("the model is not finite", eval_icl.perplexity, model, shards, [1, 2])


# ---------------------------------------------------------------------------------------------- metrics


def test_acc_norm_is_per_character_without_the_space():
    example = Example([("Bees make", " höney"), ("Bees make", " iron")], 0)
    for nats, right in ((-4.9, True), (-5.1, False)):  # -0.98 and -1.02 a character, against -1
        assert eval_icl.measure("acc_norm", example, np.array([[nats], [-4.0]]), None) == right


def test_the_error_of_a_perplexity_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    nats = rng.gamma(4, 1, 400)
    entry = eval_icl.summary("perplexity", nats)
    resampled = np.exp(rng.choice(nats, (5000, 400)).mean(1))
    assert entry["perplexity"] == pytest.approx(math.exp(nats.mean()))
    assert entry["perplexity_stderr"] == pytest.approx(np.std(resampled), rel=0.05)
    assert eval_icl.summary("perplexity", nats[:1])["perplexity_stderr"] is None


def test_paired_test_is_the_exact_binomial():
    before, after = np.zeros(20, bool), np.zeros(20, bool)
    before[:2], after[2:12] = True, True
    result = eval_icl.mcnemar(before, after)
    assert (result["gained"], result["lost"]) == (10, 2)
    assert result["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert eval_icl.mcnemar(before, before)["p"] == 1


def test_the_table_marks_the_best_r_and_says_what_it_gains(capsys):
    entries = {"1": {"acc": 0.25, "acc_stderr": 0.01}, "2": {"acc": 0.5, "acc_stderr": None}}
    paired = {"reference": 1, "2": {"acc": {"gained": 9, "lost": 1, "p": 0.021}}}
    task = {"n": 20, "left_out": 3, "truncated": 4, "iters": entries, "paired": paired}
    eval_icl.print_table({"tasks": {"piqa": task}})
    title, row, *notes = capsys.readouterr().out.splitlines()
    assert title.split() == ["*:", "best", "n", "r=1", "r=2"]
    assert row.split() == ["piqa", "acc", "20/1838", "25.00", "±", "1.00", "50.00*"]
    assert notes == [
        "piqa acc: r=2 gains 9 and loses 1 examples against r=1, McNemar p = 0.021",
        "piqa: 3 rows left out: a choice is longer than the model's context",
        "piqa: 4 rows longer than the context lost their beginning",
    ]


# --------------------------------------------------------------------------------------- built-in tasks


def test_built_in_tasks_are_made_of_validation_text(corpus, tokenizer):
    """300 examples by default, and as many as the text yields with a larger limit."""
    tasks = {}
    for name in BUILT_IN:
        few, usual, many = (load_task(name, corpus, "nowhere", 96, limit) for limit in (20, None, 2000))
        assert len(few) == 20 and len(usual) == 300 < len(many) <= 2000
        assert many[:300] == usual and usual[:20] == few
        tasks[name] = usual
    text = "".join(tokenizer.decode(tokens.tolist()) for tokens in documents(corpus, "val"))
    assert {example.gold for example in tasks["cloze"]} == {0, 1, 2, 3}
    for example in tasks["cloze"]:
        context, continuation = example.requests[example.gold]
        assert len(example.requests) == 4
        assert context + continuation in text and len(context) <= 48
    for example in tasks["lastword"]:
        [(context, word)] = example.requests
        assert context + word + "\n" in text and " " not in word[1:]


# ------------------------------------------------------------------------------------------ the command


def test_any_number_of_processes_writes_the_same(ckpt, icl, tmp_path, capsys):
    args = [f"--ckpt={ckpt}", "--iters=2,1,4", "--tasks=arc_easy, lambada_openai ,cloze", "--ppl"]
    args += ["--limit=6", f"--data_dir={icl}", "--batch_size=2"]
    main([*args, f"--out={tmp_path}/1.json", f"--log_samples={tmp_path}/1.jsonl"])
    table, log = capsys.readouterr()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval_icl.py"]
    files = [f"--out={tmp_path}/2.json", f"--log_samples={tmp_path}/2.jsonl"]
    two = start_python([*torchrun, *args, *files], text=True)
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert out == table and f"evaluating {ckpt}" in log and err.count("evaluating") == 1
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()

    results = json.loads((tmp_path / "1.json").read_text())
    assert list(results["tasks"]) == ["arc_easy", "lambada_openai", "cloze"]
    assert list(results["tasks"]["arc_easy"]["iters"]) == ["1", "2", "4"]
    assert results["tasks"]["arc_easy"]["paired"]["reference"] == 2
    assert "6/2376" in table and "*" in table
    loss, val = results["ppl"]["iters"]["2"], Shards(results["ppl"]["data"], "val", 96)
    assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
    assert loss["perplexity_stderr"] == pytest.approx(loss["perplexity"] * loss["loss_stderr"])
    bits = loss["loss"] * val.n_tokens / math.log(2)
    assert loss["bits_per_byte"] == pytest.approx(bits / val.n_bytes)
    assert results["ppl"]["n"] + results["ppl"]["left_out"] == val.n_tokens


def test_three_ranks_end_with_one_error_and_status_2(ckpt, icl, tmp_path):
    """Ranks 0 and 1 do not find their data, rank 2 does: one error, and nobody waits for anybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env, ranks = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, []
    for rank, data_dir in enumerate([tmp_path, tmp_path, icl]):
        command = ["eval_icl.py", f"--ckpt={ckpt}", "--tasks=arc_easy", f"--data_dir={data_dir}"]
        env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start_python(command, env=env, text=True))
    (out, err), *others = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert out == "" and others == [("", ""), ("", "")]
    assert err.startswith("error: ") and "prepare_data.py icl" in err and len(err.splitlines()) <= 3


def test_rows_that_do_not_fit_are_left_out_and_counted(ckpt, tmp_path, capsys):
    sound, long = ROWS["piqa"][0], {**ROWS["piqa"][0], "sol1": "ask " * 30}
    write_rows(tmp_path / "piqa/validation.jsonl", [long, sound, long, sound])
    (tmp_path / "s.jsonl").write_text("of an earlier run")
    flags = [f"--ckpt={ckpt}", "--iters=2", "--tasks=piqa", f"--data_dir={tmp_path}"]
    main([*flags, f"--out={tmp_path}/r.json", f"--log_samples={tmp_path}/s.jsonl"])
    result = json.loads((tmp_path / "r.json").read_text())["tasks"]["piqa"]
    assert (result["n"], result["left_out"]) == (2, 2)
    assert [json.loads(line)["doc_id"] for line in open(tmp_path / "s.jsonl")] == [1, 3]
    assert "2/1838" in (table := capsys.readouterr().out) and "piqa: 2 rows left out" in table


def test_scores_are_kept_when_a_later_task_fails(ckpt, tmp_path):
    write_rows(tmp_path / "arc_easy/test.jsonl", ROWS["arc_easy"])
    write_rows(tmp_path / "piqa/validation.jsonl", [{**ROWS["piqa"][0], "sol2": "ask " * 30}])
    out, log = tmp_path / "r.json", tmp_path / "s.jsonl"
    files = [f"--ckpt={ckpt}", "--iters=1,2", f"--out={out}", f"--log_samples={log}"]
    unfit = [*files, "--tasks=arc_easy,piqa", f"--data_dir={tmp_path}"]
    refused("piqa: no row's continuations fit", main, unfit)
    before = out.read_bytes(), log.read_bytes()
    assert list(json.loads(before[0])["tasks"]) == ["arc_easy"]
    assert len(before[1].splitlines()) == 2 * len(ROWS["arc_easy"])
    missing = [*files, "--tasks=sciq", f"--data_dir={tmp_path}"]
    refused("sciq/test.jsonl is missing", main, missing)
    assert (out.read_bytes(), log.read_bytes()) == before  # a command that is refused touches nothing


def test_bfloat16_is_a_flag_and_near(ckpt, corpus, tmp_path):
    results = {}
    for dtype in ("float32", "bfloat16"):
        flags = [f"--dtype={dtype}", f"--out={tmp_path}/r.json"]
        main([f"--ckpt={ckpt}", "--iters=2", "--ppl", *flags])
        results[dtype] = json.loads((tmp_path / "r.json").read_text())
        assert results[dtype]["dtype"] == dtype
    exact, rough = (results[dtype]["ppl"]["iters"]["2"]["loss"] for dtype in results)
    assert exact != rough and rough == pytest.approx(exact, abs=0.05)


def test_data_that_has_moved_is_named_by_a_flag(corpus, tmp_path, capsys):
    moved = save(tmp_path / "run", 1, make(**SHAPE), data=str(tmp_path / "gone"))
    flags = [f"--ckpt={moved}", "--iters=1", "--limit=3"]
    refused("gone holds no prepared data(.*\n)+.*--ppl", main, flags)
    main([*flags, "--tasks=cloze", f"--ppl={corpus}"])
    assert "cloze" in capsys.readouterr().out


def test_unusable_rows_are_named(ckpt, model, tmp_path):
    sound, path = ROWS["piqa"][0], tmp_path / "piqa/validation.jsonl"
    for rows, match in [
        ([], "has no rows"),
        ([sound, {"goal": "x"}], "line 2 is no row of piqa .*KeyError"),
        ([sound, ["x"]], "line 2 is no row of piqa .*TypeError"),
        ([sound, {**sound, "label": 2}], "line 2 is no row of piqa .*no choice 2"),
        ([sound, {**sound, "sol1": ""}], "line 2 is no row of piqa .*an empty choice"),
    ]:
        write_rows(path, rows)
        refused(match, main, [f"--ckpt={ckpt}", "--tasks=piqa", f"--data_dir={tmp_path}"])


def test_a_continuation_without_tokens_is_named(model):
    class Deaf:  # as a tokenizer that drops what it does not know
        def encode_ordinary(self, text):
            return list(text.encode("ascii", "ignore").rstrip())

    examples = [Example([("A", " b")], 0), Example([("A", " é")], 0)]
    message = "lastword, row 2: ' é' adds no token to its context"
    refused(message, run_task, model, Deaf(), "lastword", examples, [1])
