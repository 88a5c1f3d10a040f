"""The scripts behind the README's results: chains of variables, the study's rows, cuts of a Std model."""

import json
import re

import numpy as np
import pytest
import torch

import eval_icl
import train
from config import load_config
from model import AbbIE, AbbIEConfig, UserError
from prepare_data import Shards
from results import hops, partition, study

SHAPE = dict(vocab_size=257, block_size=32, n_embd=32, n_attn_heads=2, ffn_dim=64, n_head_blocks=1,
             n_body_blocks=2, n_tail_blocks=1)
TOY = ["--n_embd=32", "--n_attn_heads=2", "--ffn_dim=64", "--device=cpu", "--dtype=float32"]


@pytest.fixture(autouse=True)
def no_sample_after_training(monkeypatch):
    monkeypatch.setattr(train, "show_off", lambda *_: None)  # tested in test_train.py, and slow


# ------------------------------------------------------------------------------------- chains of variables

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
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(300):
        text = hops.program(rng, 16, 6)
        assert len(text) == 16 * 4 - 1
        assert all(value.isdigit() for _, value, _ in solve(text))
        lengths |= {n for _, _, n in solve(text)}
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_chains_of_the_first_stages_also_end_in_letters_that_name_nothing():
    rng = np.random.default_rng(0)
    values = [value for _ in range(100) for _, value, _ in solve(hops.program(rng, 8, 2, letters=True))]
    assert 0.5 < np.mean([value.isalpha() for value in values]) < 0.9


def test_questions_are_found_in_tokens():
    text = hops.program(np.random.default_rng(1), 32, 4)
    tokens = np.frombuffer(text.encode(), dtype=np.uint8)
    found = [(text[at], text[at + 1], n_hops) for at, n_hops in hops.questions(tokens)]
    assert found == solve(text)


class Oracle:
    """Knows every answer that takes at most r look-ups, and says 'x' otherwise."""

    def logits_at(self, x, iters):
        for r in iters:
            logits = torch.zeros(*x.shape, 257)
            logits[:, :, ord("x")] = 1
            for row, tokens in enumerate(x.tolist()):
                text = bytes(t for t in tokens if t < 256).decode().rstrip(";")
                ats = [at for at, _ in hops.questions(np.array(tokens))]
                for at, (_, digit, n_hops) in zip(ats, solve(text)):
                    logits[row, at, ord(digit)] = 2 if n_hops <= r else 0
            yield logits


def test_accuracy_of_one_who_needs_an_iteration_per_hop(tmp_path):
    hops.write(str(tmp_path / "programs"), 64, 4, n_train=20, n_val=100)
    found = hops.accuracy(Oracle(), Shards(str(tmp_path / "programs"), "val", 64), [1, 3], 80)
    assert set(found["n"]) == {1, 2, 3, 4} and min(found["n"].values()) > 5
    assert found["acc"] == {r: {n: float(n <= r) for n in (1, 2, 3, 4)} for r in (1, 3)}


def test_tokens_that_stop_by_themselves_answer_as_at_the_iterations_that_they_ran(tmp_path):
    hops.write(str(tmp_path / "programs"), 64, 4, n_train=20, n_val=70)
    shards = Shards(str(tmp_path / "programs"), "val", 64)
    torch.manual_seed(0)
    model = AbbIE(AbbIEConfig(**{**SHAPE, "rule": "recall", "block_size": 64})).eval()
    at = hops.accuracy(model, shards, [2, 5], 70)["acc"]
    soon, never, some = (hops.adaptive(model, shards, f"kl:{x}", 5, 70) for x in (1e9, 1e-30, 3e-2))
    assert soon["acc"] == at[2] and soon["mean_iters"] == 2 and set(soon["iters"].values()) == {2}
    assert never["acc"] == at[5] and never["mean_iters"] == 5
    assert 2 < some["mean_iters"] < 5 and all(2 <= depth <= 5 for depth in some["iters"].values())


@pytest.fixture
def short_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hops, "N_PROGRAMS", 50)
    monkeypatch.setattr(hops, "STAGES", [(32, 1, True, ["--iters=1"]),
                                         (64, 2, False, ["--iters=2-3", "--max_steps=3"])])
    monkeypatch.setattr(hops, "ROUND", 2)
    monkeypatch.setattr(hops, "LIMIT", 6)
    (tmp_path / "config").symlink_to(study.ROOT / "config")
    return ["--train", "--out_dir", "out", "--flags", " ".join([*TOY, "--eval_tokens=64"])]


def test_stages_follow_one_another_and_a_second_call_repeats_none(short_stages, tmp_path, capsys):
    hops.main(short_stages)
    first, last = AbbIE.from_checkpoint("out/0"), AbbIE.from_checkpoint("out/2")
    assert last.meta["init_from"] == "out/1" and last.meta["step"] == 3 and last.config.block_size == 64
    assert not torch.equal(first.embed.weight, last.embed.weight)
    capsys.readouterr()
    hops.main(short_stages)
    assert "from step 3 of out/2/step_00000003" in capsys.readouterr().out

    hops.main(["--ckpt", "out/2", "--data", "data/hops_64_2", "--iters", "1,4", "--out", "tries.json"])
    entry, = json.loads((tmp_path / "tries.json").read_text())
    assert set(entry["acc"]) == {"1", "4"} and entry["config"]["step"] == 3
    assert entry["stage_steps"] == [6, 3]


def test_a_stage_goes_on_until_its_chains_are_learnt_or_the_limit_is_met(short_stages, monkeypatch, capsys):
    hops.main(short_stages)
    assert AbbIE.from_checkpoint("out/1").meta["step"] == 6
    assert "stage 1, step 4: right at r = 1, by hops: 1: " in capsys.readouterr().out
    found = iter([0.5, 0.97, 0.1])
    monkeypatch.setattr(hops, "accuracy", lambda model, shards, iters, n:
                        {"acc": {iters[0]: dict.fromkeys([1, 2], next(found))}})
    hops.main([*short_stages, "--out_dir", "again"])
    assert AbbIE.from_checkpoint("again/1").meta["step"] == 4
    assert AbbIE.from_checkpoint("again/2").meta["init_from"] == "again/1"


def test_parts_of_the_first_stages_can_be_left_out(short_stages, monkeypatch):
    monkeypatch.setattr(hops, "LIMIT", 2)
    for what in hops.WITHOUT:
        hops.main([*short_stages, "--without", what, "--out_dir", what])
    stds = (AbbIE.from_checkpoint(f"{what}/0").embed.weight.std() for what in ("letters", "exact"))
    letters, exact = (std.item() for std in stds)
    assert letters == exact == pytest.approx(32 ** -0.5, rel=0.05)
    assert AbbIE.from_checkpoint("init/1").meta["init_from"] == ""
    data = {what: AbbIE.from_checkpoint(f"{what}/1").meta["data"] for what in ("letters", "exact")}
    assert data == {"letters": "data/hops_32_1", "exact": "data/hops_32_1_letters"}
    iters = {what: AbbIE.from_checkpoint(f"{what}/2").meta["iters"] for what in ("letters", "exact")}
    assert iters == {"letters": "2-3", "exact": "1-3"}


# ------------------------------------------------------------------------------------------------ the study

def test_rows_differ_by_their_flags_only():
    for small, rows in ((study.SMALL, study.ROWS), (study.GPU, study.GPU_ROWS)):
        base = vars(load_config(small))
        for row in rows:
            flags = study.ROWS[row][1]
            config = vars(load_config([*small, *flags]))
            changed = {key for key in config if config[key] != base[key] and key != "n_kv_heads"}  # follows
            assert changed == {flag[2:].partition("=")[0] for flag in flags}, row


def test_raw_tail_reads_the_doubled_state():
    torch.manual_seed(0)
    ours = AbbIE(AbbIEConfig(**SHAPE))
    raw = study.RawTail(ours.config)
    raw.load_state_dict(ours.state_dict())
    x = torch.randint(257, (2, 16))
    rope, (h, u) = ours.rope(x), [None, None]
    state = h = ours.run_head(x, rope)
    for k in range(3):
        u, state = ours.iterate(state, h, k, rope)
    assert torch.equal(raw(x, iters=1)[0], ours(x, iters=1)[0])
    torch.testing.assert_close(raw(x, iters=3)[0], ours.logits(ours.run_tail(4 * u, rope)))


def test_half_tail_starts_with_half_the_output_projections():
    torch.manual_seed(0)
    ours = AbbIE(AbbIEConfig(**SHAPE)).state_dict()
    torch.manual_seed(0)
    half = study.HalfTail(AbbIEConfig(**SHAPE)).state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], half[name])}
    assert changed == {"tail.0.attn.proj.weight", "tail.0.mlp.down.weight"}
    assert all(torch.equal(half[name], ours[name] / 2) for name in changed)


def test_a_row_is_trained_once_and_becomes_a_line_of_the_tables(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "AbbIE", AbbIE)  # put back afterwards
    monkeypatch.setattr(eval_icl, "AbbIE", AbbIE)
    monkeypatch.setattr(study, "VAL_TOKENS", 512)
    monkeypatch.setattr(study, "SMALL_TASKS", "lastword")
    flags = [*TOY, f"--data={corpus}", "--max_steps=2", "--block_size=96", "--tokens_per_step=192",
             "--eval_tokens=192"]
    command = ["--row", "abbie_d_raw_tail", "--seed", "3", "--out", str(tmp_path / "out"), "--results",
               str(tmp_path / "study.json"), "--flags", " ".join(flags)]
    study.main(command)
    run = json.loads((tmp_path / "study.json").read_text())["abbie_d_raw_tail-3"]
    assert run["steps"] == 2 and run["tokens"] == 384 and run["val_tokens"] == 480
    assert list(run["val_loss"]) == study.SMALL_ITERS.split(",")
    assert 4 < run["val_loss"]["1"] < 6
    assert set(run["tasks"]) == {"lastword"} and {"trained", "untrained"} < set(run["convergence"])
    printed = capsys.readouterr().out
    assert f"| `abbie_d`, raw state to the Tail, 2 | 1 | 1.00 | {run['val_loss']['1']:.3f} |" in printed
    study.main(command)
    assert "validation loss" not in capsys.readouterr().out  # not run again


def test_the_study_of_a_gpu_goes_the_same_way_and_adds_perplexity(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "AbbIE", AbbIE)  # put back afterwards
    monkeypatch.setattr(eval_icl, "AbbIE", AbbIE)
    monkeypatch.setattr(study, "GPU_TASKS", "lastword")
    monkeypatch.setattr(study, "GPU_ROWS", ["std", "recall"])
    flags = [*TOY, f"--data={corpus}", "--max_steps=1", "--block_size=96", "--tokens_per_step=192",
             "--eval_tokens=192"]
    study.main(["--gpu", "--all", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "gpu.json"),
                "--flags", " ".join(flags)])
    runs = json.loads((tmp_path / "gpu.json").read_text())
    assert list(runs) == ["std-1", "recall-1"] and list(runs["std-1"]["ppl"]["iters"]) == ["1", "2", "4", "8"]
    printed = capsys.readouterr().out
    assert "\nperplexity, whole validation split | r=1 | r=2 | r=4 | r=8\n`std` | " in printed
    gap = runs["recall-1"]["val_loss"]["2"] - runs["std-1"]["val_loss"]["1"]
    assert re.search(rf"\| `recall`, 2 \| 1 \| .* \| {gap:+.3f} \|".replace("+", r"\+"), printed)


def test_a_row_is_compared_with_the_std_of_its_size_and_seed_at_the_trained_r():
    losses = {"std-1": (1.5, 9), "std-2": (1.75, 9), "std_wide-2": (1.25, 9), "std_deep-2": (1.5, 9),
              "recall-1": (9, 1.25), "recall-2": (9, 1.25), "recall_wide-1": (9, 1), "recall_wide-2": (9, 1)}
    results = {name: {"row": name[:-2], "seed": int(name[-1]), "val_loss": {"1": at_1, "2": at_2}}
               for name, (at_1, at_2) in losses.items()}
    assert study.against_std("recall", results) == [-0.25, -0.5]
    assert study.against_std("recall_wide", results) == [-0.25]  # seed 1 has no Std
    assert study.against_std("std_deep", results) == [-0.25]
    assert study.against_std("std", results) == []


def test_the_readme_has_the_table_of_the_results(capsys):
    study.main(["--table"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 20 and "\n".join(printed) in (study.ROOT / "README.md").read_text()


def test_every_row_of_the_study_stands_in_reproduce_md():
    text = (study.ROOT / "REPRODUCE.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    for row, (_, flags, seeds) in study.ROWS.items():
        line, = (line for line in lines if f"`{row}`" in line.split("|")[1])
        assert line.endswith(f"| {', '.join(map(str, range(1, seeds + 1)))} |"), row
        assert flags == [] or any(flag in line for flag in flags), row


def test_an_unknown_row_is_refused():
    with pytest.raises(UserError, match="did you mean recall"):
        study.main(["--row", "recal"])


# ----------------------------------------------------------------------------------------------- figures

def test_every_figure_of_the_readme_is_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    from results import plot
    plot.main(["--out", str(tmp_path)])
    shown = re.findall(r"\(assets/(\w+)\.png\)", (study.ROOT / "README.md").read_text())
    assert shown and set(shown) <= {path.stem for path in tmp_path.glob("*.png")}


# --------------------------------------------------------------------------------------- cuts of a Std model

def test_every_contiguous_body_is_tried(corpus, tmp_path):
    train.main(["config/std_tiny.py", *TOY, f"--data={corpus}", "--max_steps=1", "--block_size=96",
                "--tokens_per_step=192", "--eval_tokens=192", f"--out_dir={tmp_path / 'std'}"])
    partition.main(["--ckpt", str(tmp_path / "std"), "--rules", "recall", "--tokens", "960",
                    "--out", str(tmp_path / "cuts.json")])
    found = json.loads((tmp_path / "cuts.json").read_text())
    cuts = {(cut["n_head_blocks"], cut["n_body_blocks"]): cut["cost"] for cut in found["cuts"]}
    assert set(cuts) == {(head, body) for body in range(1, 5) for head in range(5 - body)}
    model = AbbIE.from_checkpoint(tmp_path / "std", rule="recall", n_head_blocks=2, n_body_blocks=1).eval()
    losses = eval_icl.evaluate_loss(model, Shards(str(corpus), "val", 96), [1, 2], n_windows=10)
    assert cuts[2, 1] == pytest.approx(losses[2] - losses[1], abs=0.02)  # in bfloat16
