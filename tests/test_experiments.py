"""What makes the numbers in results/: the study's rows, chains of variables, cuts, the records themselves."""

import re

import numpy as np
import pytest
import torch
from common import ROOT, TINY

import train
from checkpoint import load_model
from config import load_config
from data import Shards
from eval_icl import evaluate_loss
from experiments import append, evaluation, hops, induction, partition, plot, read, rows, speed, study
from model import AbbIE, AbbIEConfig, UserError

TOY = ["--n_embd=32", "--n_attn_heads=2", "--ffn_dim=64", "--device=cpu", "--dtype=float32"]
SHORT = ["--block_size=96", "--tokens_per_step=192", "--eval_tokens=192"]


@pytest.fixture(autouse=True)
def no_sample_after_training(monkeypatch):
    monkeypatch.setattr(train, "show_off", lambda *_: None)  # tested in test_train.py, and slow


def model_of(model_class=AbbIE, **changes) -> AbbIE:
    torch.manual_seed(0)
    return model_class(AbbIEConfig(**{**TINY, "vocab_size": 257, **changes})).eval()


# --------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("print_table", [lambda: study.main(["--table"]), lambda: induction.main([])])
def test_tables_stand_in_the_results_document_as_they_are_printed(print_table, capsys):
    print_table()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    document = (ROOT / "RESULTS.md").read_text()
    assert len(printed) > 30 and "\n".join(printed[:20]) in document
    assert set(printed) <= set(document.splitlines())


def test_reproduce_names_every_row_with_its_seeds():
    lines = (ROOT / "REPRODUCE.md").read_text().splitlines()
    for name, row in rows.SMALL.rows.items():
        (line,) = (line for line in lines if line.startswith("| `") and f"`{name}`" in line.split("|")[1])
        assert line.endswith(f"| {', '.join(map(str, range(1, row.seeds + 1)))} |"), name


def test_every_figure_of_the_documents_has_a_function():
    for document in ("README.md", "RESULTS.md"):
        shown = re.findall(r"\(assets/(\w+)\.png\)", (ROOT / document).read_text())
        assert shown and set(shown) <= set(plot.FIGURES)


def test_a_figure_is_drawn_from_the_records_and_a_missing_one_is_left_out(tmp_path, capsys):
    (record,) = read("partition")
    append("partition", record, tmp_path / "records")
    plot.main(["--results", str(tmp_path / "records"), "--out", str(tmp_path / "figures")])
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["partition.png"]
    assert "hops is left out: results/hops.jsonl has no panel" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- the study


@pytest.mark.parametrize("of", [rows.SMALL, rows.GPU])
def test_rows_differ_by_their_flags_only(of):
    base = vars(load_config(of.base))
    for row in of.rows.values():
        config = vars(load_config([*of.base, *row.flags]))
        changed = {key for key in config if config[key] != base[key]} - {"n_kv_heads"}  # it follows
        assert changed == {flag[2:].partition("=")[0] for flag in row.flags}, row.title


def test_equal_flops_controls_cost_what_they_control():
    """FLOPs of the whole run, against the row with poisson:6 of which 3 have gradients, at its mean of 6."""

    def flops(name, study=rows.SMALL):
        config = load_config([*study.base, *study.rows[name].flags])
        with torch.device("meta"):  # no memory
            model = AbbIE(config.model_config(257 if study is rows.SMALL else 50257))
        return model.flops_per_token() * config.max_steps

    assert flops("std_ten") == pytest.approx(flops("recall_p6b3"), rel=0.01)
    assert flops("std_more") == pytest.approx(flops("recall_p6b3"), rel=0.05)
    assert flops("std_six") == pytest.approx(flops("recall_2_8k"), rel=0.01)
    assert flops("std_more_2") == pytest.approx(flops("recall_2_8k"), rel=0.01)
    same = ["recall_6b3_2k", "recall_1to7_2k", "recall_p4_2k", "recall_p8b2_2k", "recall_p10b1_2k"]
    assert {flops(name) for name in same} == {flops("recall_p6b3_2k")}
    for control, name in [
        ("std_deep", "recall"), ("std_more_2", "recall"),
        ("std_deeper", "recall_p6b3"), ("std_more", "recall_p6b3"),
    ]:  # fmt: skip
        assert flops(control, rows.GPU) == pytest.approx(flops(name, rows.GPU), rel=0.05)


VARIANTS = [  # and what the Tail reads, less h = 3, after updates of 1, 2 and 4
    (AbbIE, "abbie_d", 1 / 2 + 2 / 4 + 4 / 4),
    (rows.RawTail, "abbie_d", 4 * (3 + 2) - 3),
    (rows.EqualWeights, "abbie_d", (1 + 2 + 4) / 3),
    (AbbIE, "recall", 4),  # h + Delta, whatever x is
    (rows.Undamped, "recall", 4),
    (rows.NoRecall, "recall", 1 / 2 + 2 / 2 + 4),  # wanders off
]


@pytest.mark.parametrize("variant, rule, expected", VARIANTS)
def test_variants_weigh_updates_as_their_docstrings_say(variant, rule, expected):
    model = model_of(variant, rule=rule)
    updates, seen = iter([1, 2, 4]), []
    x = h = torch.full((1,), 3.0)
    for k in range(3):
        u, x = model.iterate(x, h, k, lambda x, c=1.0: x + c * next(updates))
        seen.append(u.item() - 3)
    assert seen[0] == pytest.approx(1)  # standard at r = 1
    assert seen[2] == pytest.approx(expected)


def test_half_tail_starts_with_half_the_output_projections():
    ours, half = model_of().state_dict(), model_of(rows.HalfTail).state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], half[name])}
    assert changed == {"tail.0.attn.proj.weight", "tail.0.mlp.down.weight"}
    assert all(torch.equal(half[name], ours[name] / 2) for name in changed)


def test_two_depths_add_a_tenth_of_an_earlier_loss_from_one_sweep():
    plain, both = (model_of(of, rule="recall", iters="poisson:6") for of in (AbbIE, rows.TwoDepths))
    x = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    at = {r: plain(x[:, :-1], x[:, 1:], r)[1].item() for r in (1, 2, 5, 7)}
    for r, early in ((1, None), (2, 1), (7, 5)):
        loss = both(x[:, :-1], x[:, 1:], r)[1].item()
        assert loss == pytest.approx(at[r] + (at[early] / 10 if early else 0), rel=1e-5)
    assert torch.equal(both(x)[0], plain(x)[0])
    matrices = sum(p.numel() for p in both.tail.parameters() if p.dim() == 2)
    tail = 2 * matrices + 2 * 32 * 32 + 2 * both.unembed.weight.numel()  # width 32, context 32
    assert both.flops_per_token(1) == plain.flops_per_token(1)
    assert both.flops_per_token(7) == pytest.approx(plain.flops_per_token(7) + 3 * tail)


def test_a_row_is_trained_once_recorded_and_paired(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "VAL_TOKENS", 960)
    flags = " ".join([*TOY, *SHORT, f"--data={corpus}", "--max_steps=2"])
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--flags", flags, "--limit", "20"]
    study.main(["--row", "abbie_d", "--seed", "3", *where])
    (run,) = read("study", tmp_path)
    assert (run["row"], run["seed"], run["steps"], run["tokens"]) == ("abbie_d", 3, 2, 384)
    assert list(run["val_loss"]) == rows.SMALL.iters.split(",") and run["val_tokens"] == 960
    assert 4 < run["val_loss"]["1"] < 6 and 0 < run["val_stderr"]["1"] < 0.5
    assert set(run["tasks"]) == {"cloze", "lastword"} and {"trained", "untrained"} < set(run["convergence"])
    assert f"| 1 | 1.00 | {run['val_loss']['1']:.3f} |" in capsys.readouterr().out
    study.main(["--row", "abbie_d", "--seed", "3", *where])
    assert len(read("study", tmp_path)) == 1 and "validation loss" not in capsys.readouterr().out

    folder = tmp_path / "out" / "study" / "abbie_d-3"
    with pytest.raises(UserError, match="no run of abbie_c: rule is"):
        study.main(["--row", "abbie_c", "--seed", "3", "--evaluate", str(folder), *where])
    raw_tail = ["--row", "abbie_d_raw_tail", "--seed", "3"]
    study.main([*raw_tail, "--evaluate", str(folder), *where])  # the same weights, another model
    study.main(["--pair", "abbie_d_raw_tail,abbie_d", *where])
    assert "abbie_d_raw_tail at r = 2 less abbie_d at r = 2: +" in capsys.readouterr().out
    (pair,) = read("study_pairs", tmp_path)
    study.main(["--table", "--results", str(tmp_path)])
    compared = f"| `abbie_d_raw_tail` at r = 2, `abbie_d` at 2 | 3 | {pair['gap']['2']:+.3f} ± "
    assert compared in capsys.readouterr().out
    for pair, why in {"abbie_d": "give two", "abbie_d,no": "give two", "std,recall": "run both"}.items():
        with pytest.raises(UserError, match=why):
            study.main(["--pair", pair, *where])
    ours, raw = read("study", tmp_path)
    assert raw["val_loss"]["1"] == ours["val_loss"]["1"] and raw["val_loss"]["8"] != ours["val_loss"]["8"]


def test_a_row_may_go_on_from_a_step_of_another(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "VAL_TOKENS", 960)
    monkeypatch.setitem(rows.SHORT, "then", rows.Row("", ["--rule=recall", "--iters=3"], start=("recall", 2)))
    flags = " ".join([*TOY, *SHORT, f"--data={corpus}", "--max_steps=4", "--save_every=2", "--keep_last=9"])
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--flags", flags, "--limit", "20"]
    study.main(["--row", "recall", *where])
    study.main(["--row", "then", *where])
    first, then = read("study", tmp_path)
    assert then["steps"] == 4 and then["tokens"] == first["tokens"]
    assert first["flops"] < then["flops"] < 1.5 * first["flops"]  # two steps at r = 2, two at r = 3


def test_a_std_is_read_at_1_and_2_only(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "VAL_TOKENS", 960)
    flags = " ".join([*TOY, *SHORT, f"--data={corpus}", "--max_steps=2"])
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--flags", flags, "--limit", "20"]
    study.main(["--row", "std", *where])
    (run,) = read("study", tmp_path)
    assert list(run["val_loss"]) == list(run["tasks"]["cloze"]["iters"]) == ["1", "2"]
    assert f"| {run['val_loss']['2']:.3f} |  |  |" in capsys.readouterr().out


def test_learning_rates_and_seeds_are_compared_at_the_r_of_training(capsys):
    def run(row, seed, first):
        return {"row": row, "seed": seed, "val_loss": {r: first + int(r) / 10 for r in ("1", "2", "6")}}

    runs = [run("recall_2_8k", 1, 1.0), run("recall_2_8k", 2, 2.0), run("recall_2_8k_2e-3", 1, 3.0)]
    runs += [run("recall_p6b3_5e-4", 1, 4.0), run("recall_p6b3", 2, 5.0)]
    found = study.losses_by_rate(rows.SMALL, runs)
    assert list(found) == list(rows.RATED)
    assert found["recall_2_8k"] == {"2e-3": 3.2, "1e-3": 1.2}
    assert found["recall_p6b3"] == {"5e-4": 4.6} and found["std_8k"] == {}
    study.print_rates(rows.SMALL, found)
    study.print_seeds(rows.SMALL, study.runs_by_row(rows.SMALL, rows.SMALL.rows, runs))
    printed = capsys.readouterr().out
    assert "| at | 2e-3 | 1e-3 | 5e-4 |\n" in printed
    assert "`recall_2_8k` | r=2 | 3.200 | 1.200 |  |" in printed
    assert "| `recall_2_8k` | r=2 | 1.200 | 2.200 |" in printed and "`recall_p6b3` | r=6 | 5" not in printed


# ----------------------------------------------------------------------------------------------- convergence


def test_abbie_d_converges_by_construction_and_abbie_c_does_not():
    idx = torch.randint(257, (2, 16))
    ours = evaluation.convergence(model_of(), idx, 8)
    of_c = evaluation.convergence(model_of(rule="abbie_c"), idx, 8)
    assert set(ours["8"]) == set("change cosine settled from_zero from_noise from_other".split())
    assert ours["8"]["change"] < ours["2"]["change"] / 500  # a quarter each iteration
    assert of_c["8"]["change"] > of_c["2"]["change"] / 10
    assert ours["8"]["settled"] == 1


# ------------------------------------------------------------------------------------------------------- cuts


def test_every_contiguous_body_is_tried(corpus, tmp_path):
    run = tmp_path / "std"
    flags = [*TOY, *SHORT, f"--data={corpus}", "--max_steps=1", f"--out_dir={run}"]
    train.main(["config/std_tiny.py", *flags])
    partition.main(["--ckpt", str(run), "--rules", "recall", "--tokens", "960", "--results", str(tmp_path)])
    (found,) = read("partition", tmp_path)
    cuts = {(cut["n_head_blocks"], cut["n_body_blocks"]): cut["cost"] for cut in found["cuts"]}
    assert set(cuts) == {(head, body) for body in range(1, 5) for head in range(5 - body)}
    model = load_model(run, rule="recall", n_head_blocks=2, n_body_blocks=1).eval()
    losses = evaluate_loss(model, Shards(str(corpus), "val", 96), [1, 2], n_windows=10)
    assert cuts[2, 1] == pytest.approx(losses[2] - losses[1], abs=0.02)  # in bfloat16


# ----------------------------------------------------------------------------------------------------- chains


def solve(text: str):
    """A program -> [(variable, value that it has, look-ups that this takes)] of its queries."""
    source, queries = {}, []
    for statement in text.split(";"):
        if statement[0] != "?":
            name, value = re.fullmatch(r"([a-z])=([a-z0-9])", statement).groups()
            assert name not in source and name not in source.values()  # defined once, and before its use
            source[name] = value
        else:
            at, n_hops = statement[1], 0
            while at in source:
                at, n_hops = source[at], n_hops + 1
            assert statement[2] == at
            queries.append((statement[1], at, n_hops))
    assert len({name for name, _, _ in queries}) == len(queries)
    assert sum(n_hops for _, _, n_hops in queries) == len(source)  # chains share nothing, all are asked for
    return queries


def test_programs_are_right_and_fill_their_window():
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(300):
        text = hops.program(rng, 16, 6)
        found = solve(text)
        assert len(text) == 16 * 4 - 1 and all(value.isdigit() for _, value, _ in found)
        asked = hops.questions(np.frombuffer(text.encode(), dtype=np.uint8))
        assert [(text[at], text[at + 1], n_hops) for at, n_hops in asked] == found
        lengths |= {n for _, _, n in found}
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_chains_of_the_first_stages_also_end_in_letters_that_name_nothing():
    rng = np.random.default_rng(0)
    values = [value for _ in range(100) for _, value, _ in solve(hops.program(rng, 8, 2, letters=True))]
    assert 0.5 < np.mean([value.isalpha() for value in values]) < 0.9


class Oracle:
    """Knows every answer that takes at most r look-ups, and says 'x' otherwise."""

    def logits_at(self, x, iters):
        for r in iters:
            logits = torch.zeros(*x.shape, 257)
            logits[:, :, ord("x")] = 1
            for row, tokens in enumerate(x.numpy()):
                found = solve(bytes(tokens[:-1].tolist()).decode())  # without the end of the text
                for (at, n_hops), (_, digit, _) in zip(hops.questions(tokens), found):
                    logits[row, at, ord(digit)] = 2 if n_hops <= r else 0
            yield logits


@pytest.fixture
def programs(tmp_path):
    hops.write(str(tmp_path / "programs"), 64, 4, n_train=20, n_val=100)
    return Shards(str(tmp_path / "programs"), "val", 64)


def test_accuracy_of_one_who_needs_an_iteration_per_hop(programs):
    found = hops.accuracy(Oracle(), programs, [1, 3], 80)
    assert set(found["n"]) == {1, 2, 3, 4} and min(found["n"].values()) > 5
    assert found["acc"] == {r: {n: float(n <= r) for n in (1, 2, 3, 4)} for r in (1, 3)}


def test_early_exit_answers_as_the_iterations_that_were_run(programs):
    model = model_of(rule="recall", block_size=64)
    at = hops.accuracy(model, programs, [2, 5], 20)["acc"]
    specs = ("kl:1e9", "kl:1e-30", "kl:3e-2")
    early, never, some = (hops.accuracy_with_exit(model, programs, spec, 5, 20) for spec in specs)
    assert early["acc"] == at[2] and early["mean_iters"] == 2 and set(early["iters"].values()) == {2}
    assert never["acc"] == at[5] and never["mean_iters"] == 5
    assert 2 < some["mean_iters"] < 5 and all(2 <= depth <= 5 for depth in some["iters"].values())


@pytest.fixture
def short_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hops, "N_PROGRAMS", 50)
    monkeypatch.setattr(hops, "N_VAL", 20)
    stages = [(32, 1, True, ["--iters=1"]), (64, 2, False, ["--iters=2-3", "--max_steps=3"])]
    monkeypatch.setattr(hops, "STAGES", stages)
    monkeypatch.setattr(hops, "ROUND", 2)
    monkeypatch.setattr(hops, "LIMIT", 4)
    return ["--train", "--out_dir", "out", "--flags", " ".join([*TOY, "--eval_tokens=64"])]


def test_stages_follow_one_another_and_a_second_call_repeats_none(short_stages, tmp_path, capsys):
    hops.main(short_stages)
    first, last = load_model("out/0"), load_model("out/2")
    assert last.meta["init_from"] == "out/1" and last.meta["step"] == 3 and last.config.block_size == 64
    assert not torch.equal(first.embed.weight, last.embed.weight)
    capsys.readouterr()
    hops.main(short_stages)
    assert "from step 3 of out/2/step_00000003" in capsys.readouterr().out

    found = ["--ckpt", "out/2", "--data", "data/hops_64_2", "--iters", "1,4", "--results", str(tmp_path)]
    hops.main([*found, "--title", "a try", "--exit", "kl:1e-2"])
    (entry,) = read("hops", tmp_path)
    assert set(entry["acc"]) == {"1", "4"} and entry["config"]["step"] == 3 and "kl:1e-2" in entry["exit"]
    assert entry["stage_steps"] == [4, 3] and entry["config"]["init_from"] == "1"


def test_programs_that_chains_cannot_fill_are_refused(tmp_path):
    for block_size in ("12", "256"):
        with pytest.raises(UserError, match="a multiple of 8 up to 128"):
            hops.main(["--data", str(tmp_path / "data"), "--block_size", block_size])


def test_a_stage_goes_on_until_its_chains_are_learnt_or_the_limit_is_met(short_stages, monkeypatch):
    shares = iter([0.5, 0.97, 0.1])
    monkeypatch.setattr(hops, "LIMIT", 6)

    def accuracy(model, shards, iters, n):
        return {"acc": {iters[0]: dict.fromkeys([1, 2], next(shares))}}

    monkeypatch.setattr(hops, "accuracy", accuracy)
    hops.main(short_stages)
    assert load_model("out/1").meta["step"] == 4 and load_model("out/2").meta["step"] == 3


def test_parts_of_the_first_stages_can_be_left_out(short_stages, monkeypatch):
    monkeypatch.setattr(hops, "LIMIT", 2)
    for what in hops.WITHOUT:
        hops.main([*short_stages, "--without", what, "--out_dir", what])
    for what in ("letters", "exact"):
        assert load_model(f"{what}/0").embed.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert load_model("init/1").meta["init_from"] == ""
    data = {what: load_model(f"{what}/1").meta["data"] for what in ("letters", "exact")}
    assert data == {"letters": "data/hops_32_1", "exact": "data/hops_32_1_letters"}
    iters = {what: load_model(f"{what}/2").meta["iters"] for what in ("letters", "exact")}
    assert iters == {"letters": "2-3", "exact": "1-3"}


# ------------------------------------------------------------------------------------------------------ speed


def test_nanogpt_is_asked_for_where_it_is_missing():
    config = load_config(["config/std_tiny.py"])
    with pytest.raises(UserError, match="git clone https://github.com/karpathy/nanoGPT"):
        speed.load_nanogpt("", config)  # not our own model.py


# ------------------------------------------------------------------------------ finding again what was read


class Copier(AbbIE):
    """From r = 2 on predicts what followed the same two tokens the last time; else any token."""

    def logits_at(self, idx, iters):
        for r in iters:
            logits = torch.zeros(*idx.shape, 257)
            for b, row in enumerate(idx.tolist() if r > 1 else []):
                followed = {}
                for t in range(1, len(row)):
                    followed[tuple(row[t - 2 : t])] = row[t]
                    seen = followed.get(tuple(row[t - 1 : t + 1]))
                    if seen is not None:
                        logits[b, t, seen] = 9.0
            yield logits


def test_a_model_that_looks_up_is_told_from_one_that_does_not(corpus, tmp_path, monkeypatch):
    copier = model_of(Copier)
    copier.meta = {"tokenizer": "bytes", "data": str(corpus)}
    monkeypatch.setattr(induction, "load_model", lambda _: copier)
    monkeypatch.setattr(induction, "STRINGS", 4)
    monkeypatch.setattr(induction, "WINDOWS", 8)
    monkeypatch.setattr(induction, "LONG_MATCH", 5)  # windows of 32 bytes hold no longer ones
    induction.main(["--ckpt", "a-model", "--iters", "1,2", "--results", str(tmp_path)])
    (run,) = read("induction", tmp_path)
    one, two = run["iters"]["1"], run["iters"]["2"]
    assert one["first_copy"] == one["second_copy"] == pytest.approx(5.549, abs=1e-3)  # ln 257
    assert two["second_copy"] < 2 < two["first_copy"]
    assert len(two["text_by_quarter"]) == 4
    assert sum(run["share_of_text"].values()) == pytest.approx(1, abs=1e-3)
    assert two["text_by_match"]["long_right"] < 1 < 5 < two["text_by_match"]["long_wrong"]
    assert induction.looks_up(run, "2") and not induction.looks_up(run, "1")


def test_matches_of_any_length_weigh_by_their_share_of_the_text():
    share = {"no_match": 0.6, "short_wrong": 0.1, "short_right": 0.1, "long_wrong": 0.1, "long_right": 0.1}
    nats = {"no_match": 1.0, "short_wrong": 2.0, "short_right": 0.5, "long_wrong": 4.0, "long_right": 0.1}
    run = {"trained_iters": "poisson:6", "share_of_text": share, "iters": {"6": {"text_by_match": nats}}}
    found = induction.where_a_look_up(run, induction.trained_at(run))
    assert found == pytest.approx({"finds nothing": 1.0, "is wrong": 3.0, "is right": 0.3})


def test_the_longest_match_and_what_followed_it():
    text = np.frombuffer(b"abcabd.abcx", np.uint8)[None]
    lengths, right = induction.longest_matches(text[:, :-1], text[:, 1:])
    assert lengths[0].tolist() == [0, 0, 0, 1, 2, 0, 0, 1, 2, 3]
    assert right[0].tolist() == [False] * 3 + [True, False] + [False] * 2 + [True, False, False]
