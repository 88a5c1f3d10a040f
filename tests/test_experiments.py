"""What makes the numbers in experiments/README.md: rows of the study, figures, speed."""

import importlib
import json
import re

import matplotlib.image
import pytest
from common import ROOT, make, tokens

import prepare_data
import train
from config import load_config
from data import Shards, documents
from experiments import RESULTS, append, plot, read, speed, study

README = ROOT / "experiments" / "README.md"
TOY = """--n_embd=32 --n_attn_heads=2 --ffn_dim=64 --block_size=96 --tokens_per_step=192 --micro_batch=2
    --max_steps=2 --eval_iters=1,2,6 --eval_tokens=192 --device=cpu""".split()


def test_the_document_and_the_records_name_one_another():
    """Its commands, flags and links are checked in test_readme.py."""
    text = README.read_text()
    files = {f"results/{path.name}" for path in RESULTS.iterdir()}
    assert set(re.findall(r"results/[\w.]+\w", text)) == files
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    headings = {re.sub(r"[^\w-]", "", heading) for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    recorded = {record["row"] for record in read("study")}
    rows = set(re.findall(r"^\| `(\w[\w-]*)`", text, re.M)) | set(study.ROWS)
    assert len(rows) > 20 and rows <= recorded
    assert set(re.findall(r"--row (\S+)", text)) <= set(study.ROWS)
    assert set(re.findall(r"experiments.speed (\w+)", text)) == set(speed.PARTS)


def test_rows_are_flags_of_train_py_the_last_of_which_holds():
    for name, row in study.ROWS.items():
        config = load_config([f"{ROOT}/config/abbie_tiny.py", *study.SHARED.split(), *row.flags.split()])
        assert row.std in study.ROWS and name.startswith(config.rule if row.r > 1 else "std")


def test_a_row_is_trained_evaluated_and_recorded_once(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "show_off", lambda *_, **__: None)  # slow, and tested elsewhere
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    argv = ["--row", "recall_p6b3_2e-3", "--seed", "3", *folders, "--limit=20", *TOY, f"--data={corpus}"]
    study.main(argv)
    (run,) = read("study", tmp_path)
    assert (run["seed"], run["steps"], run["val_tokens"]) == (3, 2, 192)
    assert list(run["val_loss"]) == ["1", "2", "6"] and 5 < run["val_loss"]["6"] < 6
    assert "--backprop_iters=3" in run["flags"] and "--max_steps=2" in run["flags"]
    assert set(run["tasks"]["cloze"]["iters"]) == {"1", "2", "4", "8"}
    assert set(run["convergence"]["untrained"]) == {str(r) for r in range(2, 17)}

    capsys.readouterr()
    study.main(argv)
    assert "is in" in capsys.readouterr().out and len(read("study", tmp_path)) == 1
    study.main(["--results", str(tmp_path)])
    assert f"| {run['val_loss']['6']:.3f} |" in capsys.readouterr().out


def record(row: str, seed: int, flops: float, **losses) -> dict:
    tasks = {"cloze": {"iters": {r: {"acc": 0.5 + seed / 100} for r in ("1", "2", "4", "8")}}}
    loss = {r.removeprefix("r"): value for r, value in losses.items()}
    return {"row": row, "seed": seed, "steps": 9, "flops": flops, "val_loss": loss, "tasks": tasks}


def test_the_table_compares_each_row_with_its_std_seed_by_seed():
    records = [record("std", 1, 2.0, r1=1.0), record("std", 2, 2.0, r1=2.0)]
    records.append(record("abbie_d", 2, 3.0, r1=5.0, r2=1.8))
    records.append(record("abbie_d", 1, 3.0, r1=5.0, r2=0.9))
    records += [record("gone", 1, 3.0, r1=7.0)]
    header, _, std, ours, gone = [line.split(" | ") for line in study.table(records)]
    of_ours = dict(zip(header, ours))
    assert of_ours["FLOPs"] == "1.50" and of_ours["seeds"] == "2" and of_ours["r=4"] == ""
    assert of_ours["r=2"] == "1.350 ± 0.636" and of_ours["less Std"] == "-0.150 ± 0.071"
    assert ours[-1].startswith("51.5 ± 0.7") and dict(zip(header, std))["less Std"] == ""
    assert gone[0] == "| `gone`" and "7.000" in gone


def test_abbie_d_converges_by_a_quarter_and_abbie_c_does_not():
    ours, other = (study.changes(make(rule=rule), tokens(), 8) for rule in ("abbie_d", "abbie_c"))
    assert list(ours) == [str(r) for r in range(2, 9)]
    assert ours["8"]["change"] / ours["7"]["change"] == pytest.approx(0.25, rel=0.05)
    assert other["8"]["change"] / other["7"]["change"] > 0.6


def test_a_quarter_of_the_text_is_every_fourth_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 9), ("val", 3)):
        lines = [json.dumps({"text": f"{split} {i} " * 40}) for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    texts = ["--input", "train.jsonl", "--val_input", "val.jsonl", "--tokenizer", "bytes"]
    prepare_data.main(["text", *texts, "--out", "data/stdlib"])
    study.write_quarter("data/stdlib_4th")
    for split, every in (("train", 4), ("val", 1)):
        whole, part = ([bytes(d.tolist()) for d in documents(f"data/{name}", split)]
                       for name in ("stdlib", "stdlib_4th"))  # fmt: skip
        assert sorted(part) == sorted(whole[::every]) and len(part) == 3


def test_every_figure_is_drawn_from_the_records(tmp_path):
    plot.main(["--out", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == set(plot.FIGURES)
    for name in plot.FIGURES:
        assert matplotlib.image.imread(tmp_path / f"{name}.png").shape[1] > 800


def test_chains_have_a_third_panel_for_models_trained_at_2_alone(tmp_path):
    acc = {r: {"1": 1.0, "3": 0.5, "5": 0.0} for r in ("1", "2", "4")}
    for iters, programs in (("2-6", "full"), ("2-6", "short"), (2, "full")):
        chain = {"title": "recall", "rule": "recall", "iters": iters, "programs": programs}
        append("chains", {**chain, "seed": 1, "n": acc["1"], "acc": acc}, tmp_path)
    matrix, lines = plot.draw_chains(tmp_path).axes
    assert matrix.images[0].get_array().tolist() == [[100] * 3, [50] * 3, [0] * 3]
    assert [line.get_ydata().tolist() for line in lines.lines] == [[100] * 3, [50] * 3, [0] * 3]


def test_a_figure_without_its_records_names_what_makes_them(tmp_path, capsys):
    plot.main(["--results", str(tmp_path), "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("is left out") == 3


def test_sides_take_turns():
    order = []
    seconds = speed.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3 and set(seconds) == {"a", "b"}  # once more, to warm up


def test_both_sides_have_one_shape(tmp_path, monkeypatch):
    original, built = speed.random_model, []
    llama = importlib.import_module("transformers").LlamaForCausalLM
    monkeypatch.setattr(speed, "random_model", lambda name, **_: original("abbie_tiny"))
    monkeypatch.setattr(llama, "eval", lambda self: built.append(self) or self.train(False))
    speed.main(["hugging_face", "--rounds", "1", "--new_tokens", "2", "--results", str(tmp_path)])
    (run,) = read("speed", tmp_path)
    assert sum(p.numel() for p in built[0].parameters()) == run["n_params"]
    assert set(run["tokens_per_s"]) == {"ours", "hugging_face"}
    assert run["ours_over_hugging_face"] > 0


def test_drafting_is_measured_on_validation_text(corpus, tmp_path, monkeypatch):
    model = make(vocab_size=257, block_size=96)
    model.meta = {"ckpt": "a-model", "data": str(corpus)}
    monkeypatch.setattr(speed, "load_model", lambda _: model)
    speed.main(["draft", "--rounds", "1", "--new_tokens", "3", "--results", str(tmp_path)])
    (run,) = read("speed", tmp_path)
    assert run["prompts_equal_to_plain"] == {"4": 4, "8": 4} and run["speedup"]["8"] > 0
    assert Shards(corpus, "val", 64).n_windows >= 4


def test_kernels_grow_by_as_many_with_every_iteration(tmp_path):
    speed.main(["kernels", "--results", str(tmp_path)])
    count = read("speed", tmp_path)[0]["kernels_per_token"]
    of_eight_blocks = (count["8"] - count["2"]) / 6
    assert of_eight_blocks == pytest.approx(count["2"] - count["1"], rel=0.05)
    assert count["1"] == pytest.approx(3 * of_eight_blocks, rel=0.05)
