"""What makes the numbers in experiments/README.md: rows of the study, figures, speed."""

import re

import matplotlib.image
import pytest
from common import ROOT, make, tokens

import train
from config import load_config
from experiments import RESULTS, plot, read, speed, study

TOY = """--n_embd=32 --n_attn_heads=2 --ffn_dim=64 --block_size=96
    --tokens_per_step=192 --micro_batch=2 --max_steps=2 --device=cpu
    --eval_iters=1,2,6 --eval_tokens=192"""


def test_rows_are_flags_of_train_py_are_recorded_and_are_those_of_the_document():
    recorded = {record["row"] for record in read("study")}
    for name, row in study.ROWS.items():
        flags = [*study.SHARED.split(), *row.flags.split()]
        config = load_config([f"{ROOT}/config/abbie_tiny.py", *flags])
        assert name.startswith(config.rule if row.r > 1 else "std")
        assert {name, row.std} <= recorded & study.ROWS.keys()
    text = (ROOT / "experiments/README.md").read_text()
    assert set(re.findall(r"^\| `(\w[\w-]*)`", text, re.M)) <= recorded
    assert set(re.findall(r"--row (\S+)", text)) <= study.ROWS.keys()
    assert set(re.findall(r"experiments.speed (\w+)", text)) == speed.PARTS.keys()


def test_a_row_is_trained_evaluated_and_recorded_once(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "final_report", lambda *_, **__: None)  # slow, and tested elsewhere
    results = f"--results={tmp_path}"
    argv = ["--row=recall_p6b3_2e-3", f"--out={tmp_path}/out", results, "--limit=20"]
    for _ in range(2):
        study.main([*argv, *TOY.split(), f"--data={corpus}"])
    (run,) = read("study", tmp_path)
    assert (run["steps"], run["val_tokens"]) == (2, 192)
    assert {"--backprop_iters=3", "--max_steps=2"} <= set(run["flags"])
    assert 5 < run["val_loss"]["6"] < 6 and "8" in run["tasks"]["cloze"]["iters"]
    assert set(run["convergence"]["untrained"]) == {str(r) for r in range(2, 17)}
    study.main([results])
    assert f"| {run['val_loss']['6']:.3f} |" in capsys.readouterr().out


def test_the_table_compares_each_row_with_its_std_seed_by_seed():
    header, _, *rows = [line.split(" | ") for line in study.table(read("study"))]
    cells = next(cells for cells in rows if cells[0] == "| `abbie_d_2_8k`")
    row = dict(zip(header, cells))
    assert (row["seeds"], row["FLOPs"]) == ("3", "1.48")
    assert (row["r=2"], row["less Std"]) == ("1.116 ± 0.055", "-0.014 ± 0.005")


def test_abbie_d_converges_by_a_quarter_and_abbie_c_does_not():
    ours, other = (study.changes(make(rule=rule), tokens(), 8) for rule in ("abbie_d", "abbie_c"))
    assert ours["8"]["change"] / ours["7"]["change"] == pytest.approx(0.25, rel=0.05)
    assert other["8"]["change"] / other["7"]["change"] > 0.6


def test_every_figure_is_drawn_from_the_records_or_left_out(tmp_path, capsys):
    plot.main(["--out", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == set(plot.FIGURES)
    for path in tmp_path.iterdir():
        assert matplotlib.image.imread(path).shape[1] > 800
    chains = plot.draw_chains(RESULTS)
    assert len(chains.axes) == 3, "the last is of models trained at r = 2 alone"
    plot.main(["--results", str(tmp_path), "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("is left out") == 3


@pytest.mark.parametrize("part", ["hugging_face", "draft", "sweep", "kernels"])
def test_a_part_of_speed_adds_its_record(part, corpus, tmp_path, monkeypatch):
    model = make(vocab_size=257, block_size=256)
    model.meta = {"ckpt": "a-model", "data": str(corpus)}
    for name in ("random_model", "load_model"):
        monkeypatch.setattr(speed, name, lambda *_, **__: model)
    speed.main([part, "--rounds=1", "--new_tokens=3", f"--results={tmp_path}"])
    (run,) = read("speed", tmp_path)
    if part == "draft":
        assert run["prompts_equal_to_plain"] == {"4": 4, "8": 4}
    if part == "kernels":
        count = run["kernels_per_token"]
        first, later = count["2"] - count["1"], (count["8"] - count["2"]) / 6
        assert later == pytest.approx(first, rel=0.15), "as many with every iteration"
