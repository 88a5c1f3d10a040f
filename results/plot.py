"""Draw the figures of the README from the JSON files beside this script: one function per figure.

    python results/plot.py                              # all figures whose results are there, into assets/
    python results/plot.py evaluation results/X.json    # one, from another file that eval_icl.py --out wrote
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from config import ArgumentParser, cli  # noqa: E402
from model import UserError  # noqa: E402

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    sys.exit("error: figures need matplotlib\npip install matplotlib")


def subplots(n: int):
    """A figure of n panels side by side."""
    figure, axes = plt.subplots(1, n, figsize=(5 * n, 4), squeeze=False, layout="constrained")
    return figure, axes[0]


def over_iters(ax, label: str, scores: dict, metric: str, scale: float = 1):
    """One metric against r, {r: {metric, metric_stderr}}, with its standard error where there is one."""
    r = [int(key) for key in scores]
    y = [scale * score[metric] for score in scores.values()]
    stderr = [score.get(metric + "_stderr", "N/A") for score in scores.values()]
    ax.errorbar(r, y, [0 if s == "N/A" else scale * s for s in stderr], marker="o", capsize=3, label=label)


def finish(ax, title: str, ylabel: str, iters, trained: int | None):
    iters = list(iters)
    ax.set_xscale("log", base=2)
    ax.set_xticks(iters, [str(r) for r in iters])
    ax.set(title=title, xlabel="iterations r of the Body", ylabel=ylabel)
    if trained is not None:
        ax.axvline(trained, color="grey", linestyle=":", label=f"trained at r = {trained}")
    ax.legend(fontsize="small")


def evaluation(path: Path, out: Path):
    """Accuracy, word perplexity and validation loss against r."""
    found = json.loads(path.read_text())
    panels = {"accuracy (%)": [], "perplexity per word": [], "loss (nats per token)": []}
    for name, task in found.get("tasks", {}).items():
        first = next(iter(task["iters"].values()))
        metric = "acc_norm" if "acc_norm" in first else "acc"
        panels["accuracy (%)"].append((name, task["iters"], metric, 100))
        if "perplexity" in first:
            panels["perplexity per word"].append((name, task["iters"], "perplexity", 1))
    if "ppl" in found:
        panels["loss (nats per token)"].append((found["ppl"]["data"], found["ppl"]["iters"], "loss", 1))
    panels = {ylabel: lines for ylabel, lines in panels.items() if lines}
    if not panels:
        raise UserError(f"{path} holds neither tasks nor perplexities\nmake it with eval_icl.py --out {path}")
    figure, axes = subplots(len(panels))
    for ax, (ylabel, lines) in zip(axes, panels.items()):
        for name, scores, metric, scale in lines:
            over_iters(ax, f"{name} {metric}" if scale == 100 else name, scores, metric, scale)
        if ylabel.startswith("perplexity"):
            ax.set_yscale("log")
        finish(ax, Path(found["ckpt"]).parent.name, ylabel, map(int, scores), found.get("trained_iters"))
    figure.savefig(out)
    plt.close(figure)


def fixed_point(path: Path, out: Path):
    """How the state that the Tail reads changes with each iteration, trained and untrained."""
    found = json.loads(path.read_text())
    if "convergence" not in found:
        raise UserError(f"{path} holds no convergence\nmake it with eval_icl.py --convergence --out {path}")
    titles = {"change": "change from the iteration before", "settled": "tokens whose argmax has settled",
              "from_noise": "distance when started from noise"}
    figure, axes = subplots(len(titles))
    for ax, (quantity, title) in zip(axes, titles.items()):
        for which, style in (("trained", "-"), ("untrained", "--")):
            entries = found["convergence"][which]
            points = {int(r): entry[quantity] for r, entry in entries.items() if quantity in entry}
            ax.plot(points.keys(), points.values(), style, marker=".", label=which)
        if quantity != "settled":
            ax.set_yscale("log")
        powers = [2 ** i for i in range(8) if 2 ** i <= max(points)]
        ylabel = "fraction" if quantity == "settled" else "relative change"
        finish(ax, title, ylabel, powers, found.get("trained_iters"))
    figure.savefig(out)
    plt.close(figure)


# figure -> (function, the results that it is drawn from)
FIGURES = {"evaluation": (evaluation, "eval_tiny.json"), "fixed_point": (fixed_point, "eval_tiny.json")}


def main(argv: list[str]):
    parser = ArgumentParser(prog="results/plot.py", description=__doc__)
    parser.add_argument("figure", nargs="?", choices=FIGURES)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder of the figures (assets/)")
    args = parser.parse_args(argv)
    args.out.mkdir(exist_ok=True)
    for name, (draw, file) in FIGURES.items():
        path = args.file or ROOT / "results" / file
        if args.figure == name or (args.figure is None and path.exists()):
            draw(path, args.out / f"{name}.png")
            print(args.out / f"{name}.png")


if __name__ == "__main__":
    cli(main)
