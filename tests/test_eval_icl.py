"""eval_icl.py: scored as by lm-evaluation-harness, in one sweep, on any number of ranks."""

import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from common import calls_of, documents, greedy, make, refused, save, start_python

import eval_icl
from data import Shards, get_tokenizer
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


def choices(key: str, text: str, label: str) -> dict:
    return {"answerKey": key, "choices": {"text": text.split(), "label": list(label)}}


SCIQ = {"question": "What flies?", "correct_answer": "bee"}
SCIQ |= {"distractor1": "ox", "distractor2": "cat", "distractor3": "cow"}
BEE = {"activity_label": "Bee", "ctx_a": "A bee flies [title] home.", "ctx_b": "THE Bee"}
BEE["endings"] = ["[step] sleeps.", "eats [x] a  stone.", "waits 4 days.", " hums "]
PIQA = {"goal": "Find hönéy", "sol1": "ask a bee", "sol2": "ask an öx " + "or a cow " * 9}
WHAT = {"question": "What do bees make?"}
ROWS = {
    "hellaswag": [{**BEE, "label": str(i % 4)} for i in range(5)],
    "lambada_openai": [{"text": f"It rained for {i} days and then\nrained more"} for i in range(5)],
    "arc_easy": [{**WHAT, **choices("2", "iron honey", "12")}] * 7,
    "arc_challenge": [{**WHAT, **choices("C", "silk wool wax fire ice", "ABCDE")}],
    "commonsense_qa": [{"question": " Who? ", **choices("A", "bee ox cat dog cow", "ABCDE")}],
    "piqa": [{**PIQA, "label": i % 2} for i in range(4)],
    "openbookqa": [{"question_stem": "Bees make", **choices(" A", "wax wool milk tin", "ABCD")}],
    "sciq": [{"support": "  Bees fly.", **SCIQ}, {"support": "", **SCIQ}],
    "winogrande": [{"sentence": "The _ flew.", "option1": "ox", "option2": "bee", "answer": "2"}],
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


def by_hand(model, context: list[int], tokens: list[int], iters: int) -> tuple[float, bool]:
    """One request alone: full logits, log-softmax, the last positions."""
    ids = (context + tokens)[-(model.config.block_size + 1) :]
    logits = model(torch.tensor([ids[:-1]]), iters=iters)[0][0, -len(tokens) :]
    target = torch.tensor(tokens)
    nats = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == target).all())


def harness(model: AbbIE, icl: Path, cache: Path, iters: int) -> dict:
    """What lm-evaluation-harness makes of the rows with its own task files, a request at a time."""
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    class ByHand(TemplateLM):
        eot_token_id = 256
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return list(string.encode())

        def _loglikelihood_tokens(self, requests, **kwargs):
            return [by_hand(model, *tokens, iters) for _, *tokens in requests]

    folders, tasks = {"arc_easy": "arc", "arc_challenge": "arc", "lambada_openai": "lambada"}, []
    default = ("commonsense_qa", "winogrande")
    for name in DOWNLOADED:  # with nothing changed but where the rows are
        file = "default" if name in default else name
        path = Path(lm_eval.__file__).parent / "tasks" / folders.get(name, name) / f"{file}.yaml"
        task = load_yaml(path, resolve_func=True)
        task |= {"task": name, "dataset_path": "json", "dataset_name": None}
        task |= {"training_split": None, "validation_split": None, "test_split": "test"}
        rows = {"test": f"{icl}/{name}/{TASKS[name].split}.jsonl"}
        tasks.append({**task, "dataset_kwargs": {"data_files": rows, "cache_dir": str(cache)}})
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(ByHand(), tasks=tasks, task_manager=manager, bootstrap_iters=0)


def test_every_example_is_scored_as_by_the_harness(icl, tmp_path):
    model = small()
    theirs = harness(model, icl, tmp_path, iters=3)
    for name in DOWNLOADED:
        examples, metrics = load_task(name, None, icl, 96, None), TASKS[name].metrics
        result, lines = run_task(model, BYTES, name, examples, [1, 3, 4], batch_size=5)
        lines = [line for line in lines if line["iters"] == 3]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert [line["doc_id"] for line in lines] == [sample["doc_id"] for sample in samples]
        for example, line, sample in zip(examples, lines, samples):
            scores, hits = zip(*[pair for [pair] in sample["resps"]])
            assert example.requests == list(sample["arguments"])
            assert line["loglikelihoods"] == pytest.approx(scores, abs=1e-4)
            assert tuple(line["is_greedy"]) == hits
            mine = eval_icl.measure(metrics, example, np.array([scores]).T, np.array([hits]).T)
            assert all(mine[metric] == sample[metric] for metric in metrics if metric != "perplexity")
        for metric in metrics:
            entry, values = result["iters"]["3"], [sample[metric] for sample in samples]
            whole = theirs["results"][name][f"{metric},none"]
            assert entry[metric] == pytest.approx(whole, rel=1e-4)
            if metric != "perplexity" and len(values) > 1:
                stderr = np.std(values, ddof=1) / len(values) ** 0.5
                assert entry[f"{metric}_stderr"] == pytest.approx(stderr)


def test_a_request_is_split_after_the_tokens_of_its_context():
    """Whitespace at its end belongs to the continuation; one that is empty becomes the end-of-text token."""
    pairs = encode_requests(BYTES, [("a b  ", " c"), ("", "word")])
    expected = [(b"a b", b"   c"), ([256], b"word")]
    for pair, parts in zip(pairs, expected):
        assert [part.tolist() for part in pair] == [list(part) for part in parts]
    refused("'' adds no token to its context", encode_requests, BYTES, [("a", "")])


@pytest.mark.parametrize("rule", ["abbie_d", "recall"])
def test_scores_of_a_sweep_equal_one_request_at_a_time(rule):
    model, iters, context = small(rule=rule), [1, 2, 5], list(b"The bee")
    requests = [("It", " hums"), ("x" * 150, " long"), ("", "none"), ("The ox saw", " a bee")]
    pairs = encode_requests(BYTES, requests)
    pairs.append((torch.tensor(context), torch.tensor(greedy(model, context, 4, iters=2))))
    scores, is_greedy = score(model, pairs, iters, batch_size=2)
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


def test_metrics_are_those_made_by_hand():
    """acc_norm is per character, without the space before the choice; the error of a perplexity is that of a
    bootstrap; McNemar's test is the exact binomial one."""
    example = Example([("Bees make", " höney"), ("Bees make", " iron")], 0)
    scores = np.array([[-4.9, -5.1], [-4.0, -4.0]])  # -0.98 and -1.02 a character, against -1
    right = eval_icl.measure(eval_icl.NORM, example, scores, None)
    assert right["acc_norm"].tolist() == [True, False]

    rng = np.random.default_rng(0)
    nats = rng.gamma(4, 1, 400)
    resampled = np.exp(rng.choice(nats, (5000, 400)).mean(1))
    entry = eval_icl.summarize({"perplexity": nats[:, None]}, [2])["2"]
    assert entry["perplexity"] == pytest.approx(math.exp(nats.mean()))
    assert entry["perplexity_stderr"] == pytest.approx(np.std(resampled), rel=0.05)

    before, after = np.zeros(20, bool), np.zeros(20, bool)
    before[:2], after[2:12] = True, True
    p = pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert eval_icl.mcnemar(before, after) == {"gained": 10, "lost": 2, "p": p}
    assert eval_icl.mcnemar(before, before)["p"] == 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_are_made_of_validation_text(corpus, name):
    """300 examples by default, and as many as the text yields with a larger limit."""
    few, usual, many = (load_task(name, corpus, None, 96, limit) for limit in (20, None, 2000))
    assert len(few) == 20 and len(usual) == 300 < len(many) <= 2000
    assert many[:300] == usual and usual[:20] == few
    text = "".join(BYTES.decode(tokens) for tokens in documents(corpus, "val"))
    for example in usual:
        context, continuation = example.requests[example.gold]
        assert context + continuation in text and len(context) <= 48
        if name == "lastword":
            assert context + continuation + "\n" in text and " " not in continuation[1:]
    forms = {(len(example.requests), example.gold) for example in usual}
    assert forms == ({(4, gold) for gold in range(4)} if name == "cloze" else {(1, 0)})


# ------------------------------------------------------------------------------------------ the command


def two_ranks(*flags: list[str]) -> list[tuple]:
    """(status, standard output, standard error) of rank 0 and of rank 1, each with flags of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env, ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, []
    for rank in range(2):
        env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start_python(["eval_icl.py", *flags[rank]], env=env, text=True))
    printed = [rank.communicate(timeout=60) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, printed)]


def test_any_number_of_processes_writes_the_same(ckpt, icl, corpus, tmp_path, capsys):
    flags = [ckpt, "--iters=2,1,4", "--tasks=arc_easy, lambada_openai ,cloze", f"--ppl={corpus}"]
    flags += ["--limit=6", f"--data_dir={icl}", "--batch_size=2"]
    one, two = ([f"--out={tmp_path}/{n}.json", f"--log_samples={tmp_path}/{n}.jsonl"] for n in (1, 2))
    main([*flags, *one])
    table, log = capsys.readouterr()
    first, second = two_ranks(flags + two, flags + two)
    assert first == (0, table, log) and second == (0, "", "")
    for kind in ("json", "jsonl"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()

    results = json.loads((tmp_path / "1.json").read_text())
    assert list(results["tasks"]) == ["arc_easy", "lambada_openai", "cloze"]
    assert list(results["tasks"]["arc_easy"]["iters"]) == ["1", "2", "4"]
    assert results["tasks"]["arc_easy"]["paired"]["reference"] == 2
    loss, val = results["ppl"]["iters"]["2"], Shards(corpus, "val", 96)
    assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
    bits = loss["loss"] * val.n_tokens / math.log(2)
    assert loss["bits_per_byte"] == pytest.approx(bits / val.n_bytes)
    assert results["ppl"]["n"] + results["ppl"]["left_out"] == val.n_tokens


def test_ranks_end_with_one_error_and_status_2(ckpt, icl, tmp_path):
    """Rank 0 finds its data, rank 1 does not: nobody waits for anybody."""
    first, second = two_ranks(*([ckpt, "--tasks=sciq", f"--data_dir={at}"] for at in (icl, tmp_path)))
    assert first == (2, "", "") and second[:2] == (2, "")
    assert second[2].startswith("error: ") and len(second[2].splitlines()) <= 3


def test_the_table_marks_the_best_r_and_counts_the_rows(capsys):
    entries = {"1": {"acc": 0.25, "acc_stderr": 0.01}, "2": {"acc": 0.5, "acc_stderr": None}}
    task = {"n": 20, "left_out": 3, "iters": entries}
    eval_icl.print_table({"tasks": {"piqa": task}})
    title, row, note = capsys.readouterr().out.splitlines()
    assert title.split() == ["*:", "best", "n", "r=1", "r=2"]
    assert row.split() == ["piqa", "acc", "20/1838", "25.00", "±", "1.00", "50.00*"]
    assert note.startswith("piqa: 3 rows left out")


def test_rows_that_do_not_fit_are_left_out_and_counted(ckpt, tmp_path):
    """And the scores of a task are kept when a later one fails."""
    sound, long = ROWS["piqa"][0], {**ROWS["piqa"][0], "sol1": "ask " * 30}
    write_rows(tmp_path, "piqa", [long, sound, long, sound])
    write_rows(tmp_path, "winogrande", [{**ROWS["winogrande"][0], "sentence": "_" + "ask " * 30}])
    out, log = tmp_path / "r.json", tmp_path / "s.jsonl"
    log.write_text("of an earlier run")
    flags = [ckpt, "--iters=1,2", f"--data_dir={tmp_path}", f"--out={out}", f"--log_samples={log}"]
    main([*flags, "--tasks=piqa"])
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


UNUSABLE = {
    "has no rows": [],
    "line 1 is no row of piqa.*KeyError": [PIQA],
    "line 1 is no row of piqa.*TypeError": [["x"]],
    "line 2 is no row of piqa.*no choice 2": [{**PIQA, "label": 1}, {**PIQA, "label": 2}],
    "line 1 is no row of piqa.*an empty choice": [{**PIQA, "label": 0, "sol1": ""}],
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_unusable_rows_are_named(tmp_path, message):
    write_rows(tmp_path, "piqa", UNUSABLE[message])
    refused(message, load_task, "piqa", None, tmp_path, 96, None)
