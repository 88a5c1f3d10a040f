"""Draw the figures of the README from the JSON files beside this script: one function per figure.

    python results/plot.py                              # all figures whose results are there, into assets/
    python results/plot.py evaluation results/X.json    # one, from another file that eval_icl.py --out wrote
"""

import json
import statistics
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
        if quantity == "from_noise":  # a flat line is to look flat
            ax.set_ylim(min(0.1, ax.get_ylim()[0]), 2)
        powers = [2 ** i for i in range(8) if 2 ** i <= max(points)]
        ylabel = {"change": "relative change", "settled": "fraction"}.get(quantity, "relative distance")
        finish(ax, title, ylabel, powers, found.get("trained_iters"))
    figure.savefig(out)
    plt.close(figure)


def runs_of(path: Path) -> dict:
    """results/study.json -> {row: its runs}."""
    rows = {}
    for run in json.loads(path.read_text()).values():
        rows.setdefault(run["row"], []).append(run)
    return rows


RULES = ("std", "std_deep", "abbie_d", "recall", "abbie_c", "zero_pt")  # rows; the others are variants


def study_loss(path: Path, out: Path):
    """Validation loss against r for every row of the study, mean and range over its seeds."""
    found = runs_of(path)
    longer = [row for row in found if row.endswith(("_long", "_longer"))]
    wider = [row for row in found if row.endswith("_wide")]
    panels = {"the rules (number of seeds)": [row for row in found if row in RULES],
              "variants": [row for row in found if row not in (*RULES, *longer, *wider)],
              "two and four times as long": longer, "twice as wide": wider}
    panels = {title: rows for title, rows in panels.items() if rows}
    figure, axes = subplots(len(panels))
    for ax, (title, rows) in zip(axes, panels.items()):
        for row in ["abbie_d", *rows] if title == "variants" else rows:
            runs = found[row]
            losses = {int(r): [run["val_loss"][r] for run in runs] for r in runs[0]["val_loss"]}
            mean = {r: sum(values) / len(values) for r, values in losses.items()}
            line, = ax.plot(mean.keys(), mean.values(), marker="o", label=f"{row} ({len(runs)})")
            ax.fill_between(list(mean), *zip(*((min(v), max(v)) for v in losses.values())),
                            color=line.get_color(), alpha=0.2)
        ax.set_ylim(top=min(ax.get_ylim()[1], 1.8))
        finish(ax, title, "validation loss, nats per byte", mean, 2)
    figure.savefig(out)
    plt.close(figure)


def study_flops(path: Path, out: Path):
    """Validation loss at the trained r against the FLOPs spent in training, mean over seeds."""
    figure, (ax,) = subplots(1)
    for row, runs in runs_of(path).items():
        if row in RULES:
            r = "1" if row.startswith("std") else "2"
            points = list(zip(*(run["curve"][1:] for run in runs)))  # per evaluation, its seeds
            ax.plot([seeds[0]["flops"] for seeds in points],
                    [sum(e["val_loss"][r] for e in seeds) / len(seeds) for seeds in points],
                    marker="o", label=f"{row}, r = {r}")
    ax.set(title="loss against training compute", xlabel="training FLOPs", ylabel="validation loss")
    ax.legend(fontsize="small")
    figure.savefig(out)
    plt.close(figure)


def study_change(path: Path, out: Path):
    """How much the state that the Tail reads changes with each iteration, trained and untrained."""
    figure, axes = subplots(2)
    for row, runs in runs_of(path).items():
        if row in RULES and not row.startswith("std"):
            for ax, which in zip(axes, ("trained", "untrained")):
                entries = runs[0]["convergence"][which].items()
                change = {int(r): entry["change"] for r, entry in entries if "change" in entry}
                ax.plot(change.keys(), change.values(), marker=".", label=row)
    for ax, which in zip(axes, ("trained at r = 2", "untrained")):
        ax.set_yscale("log")
        finish(ax, which, "relative change from the iteration before", [2, 4, 8, 16], None)
    figure.savefig(out)
    plt.close(figure)


def study_tasks(path: Path, out: Path):
    """Accuracy of the tasks against r, mean over seeds."""
    rows = {row: runs for row, runs in runs_of(path).items() if row in RULES}
    tasks = next(iter(rows.values()))[0]["tasks"]
    figure, axes = subplots(len(tasks))
    for ax, task in zip(axes, tasks):
        for row, runs in rows.items():
            found = [run["tasks"][task]["iters"] for run in runs]
            acc = {int(r): 100 * sum(f[r]["acc"] for f in found) / len(found) for r in found[0]}
            ax.plot(acc.keys(), acc.values(), marker="o", label=row)
        finish(ax, f"{task}, {tasks[task]['n']} examples", "accuracy, %", acc, 2)
    figure.savefig(out)
    plt.close(figure)


def partition(path: Path, out: Path):
    """What repeating each contiguous Body of an untouched Std model costs: a panel for each rule."""
    found = json.loads(path.read_text())
    rules = sorted({cut["rule"] for cut in found["cuts"]})
    n = max(cut["n_body_blocks"] for cut in found["cuts"])
    figure, axes = subplots(len(rules))
    for ax, rule in zip(axes, rules):
        cost = [[float("nan")] * n for _ in range(n)]  # [blocks of the Head][blocks of the Body - 1]
        for cut in found["cuts"]:
            if cut["rule"] == rule:
                head, body = cut["n_head_blocks"], cut["n_body_blocks"]
                cost[head][body - 1] = cut["cost"]
                ax.text(body, head, f"{cut['cost']:.3f}", ha="center", va="center", fontsize="small")
        ax.imshow(cost, extent=(0.5, n + 0.5, n - 0.5, -0.5), cmap="RdYlGn_r", norm="symlog", aspect="auto")
        ax.set(title=f"{rule}, r = {found['iters']}", xlabel="blocks of the Body", ylabel="blocks of Head")
    figure.suptitle(f"added loss (nats per token) over r = 1, {found['loss_at_1']:.3f}")
    figure.savefig(out)
    plt.close(figure)


def panels_of(path: Path) -> dict:
    """results/hops.json -> {title of a panel: its seeds}."""
    panels = {}
    for entry in json.loads(path.read_text()):
        panels.setdefault(entry["figure"], []).append(entry)
    panels.pop("", None)
    return panels


def hops(path: Path, out: Path):
    """Accuracy of variable chains by hops and r: a panel for each model, the mean of its seeds; what it was
    trained on is framed."""
    panels = panels_of(path)
    widths = [len(seeds[0]["acc"]) for seeds in panels.values()]
    figure, axes = plt.subplots(1, len(panels), figsize=(0.55 * sum(widths) + 1.5, 4.5), layout="constrained",
                                width_ratios=widths, sharey=True)
    for ax, (title, seeds) in zip(axes, panels.items()):
        entry = seeds[0]
        lengths, iters = [int(n) for n in entry["n"]], [int(r) for r in entry["acc"]]
        acc = [[100 * statistics.mean(seed["acc"][str(r)][str(n)] for seed in seeds) for r in iters]
               for n in lengths]
        image = ax.imshow(acc, origin="lower", vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for i, row in enumerate(acc):
            for j, value in enumerate(row):
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize="small",
                        color="black" if value > 60 else "white")
        low, _, high = str(entry["config"]["iters"]).partition("-")
        left, right = iters.index(int(low)), iters.index(int(high or low))
        ax.add_patch(plt.Rectangle((left - 0.5, -0.5), right - left + 1, entry["trained_hops"], fill=False,
                                   edgecolor="red", linewidth=2.5, clip_on=False))
        ax.set_xticks(range(len(iters)), iters)
        ax.set_yticks(range(len(lengths)), lengths)
        ax.set_title(title + (f", mean of {len(seeds)} seeds" if len(seeds) > 1 else ""), fontsize="medium")
        ax.set_xlabel("r at test time")
    axes[0].set_ylabel("hops of the chain")
    figure.colorbar(image, ax=axes, label="answers that are right, % (framed: seen in training)")
    figure.savefig(out)
    plt.close(figure)


def hops_exit(path: Path, out: Path):
    """Chains when each token stops by itself: a row for each model, a colour for each seed. Left: the
    iterations that a query takes, by its hops. Right: accuracy, dashed with the best r for every token."""
    panels = {title: seeds for title, seeds in panels_of(path).items() if "exit" in seeds[0]}
    if not panels:
        raise UserError(f"{path} has no try with --exit\nmake one: results/hops.py --exit kl:1e-2")
    figure, axes = plt.subplots(len(panels), 2, figsize=(10, 4 * len(panels)), squeeze=False,
                                layout="constrained")
    for (left, right), (title, seeds) in zip(axes, panels.items()):
        for entry in seeds:
            exit, found = next(iter(entry["exit"].items()))
            lengths = [int(n) for n in found["iters"]]
            label = f"seed {entry['config']['seed']}: {found['mean_iters']:.1f} iterations per token"
            line, = left.plot(lengths, found["iters"].values(), marker=".", label=label)
            best = max(entry["acc"], key=lambda r: sum(entry["acc"][r].values()))
            for acc, style in ((found["acc"], "-"), (entry["acc"][best], "--")):
                right.plot(lengths, [100 * acc[str(n)] for n in lengths], style, marker=".",
                           color=line.get_color(), label=f"best r: {best}" if style == "--" else None)
        left.plot(lengths, lengths, color="grey", linestyle=":", label="one iteration a hop")
        most = seeds[0]["trained_hops"]
        right.axvline(most + 0.5, color="grey", linestyle=":", label="longest in training")
        left.set(title=f"{title}, --exit {exit}", ylabel="iterations that a query takes")
        right.set(title=f"with --exit {exit}; dashed: every token r", ylabel="answers that are right, %")
        for ax in (left, right):
            ax.set(xlabel="hops of the chain", xticks=lengths)
            ax.legend(fontsize="small")
    figure.savefig(out)
    plt.close(figure)


# figure -> (function, the results that it is drawn from)
FIGURES = {"evaluation": (evaluation, "eval_tiny.json"), "fixed_point": (fixed_point, "eval_tiny.json"),
           "study_loss": (study_loss, "study.json"), "study_flops": (study_flops, "study.json"),
           "study_change": (study_change, "study.json"), "study_tasks": (study_tasks, "study.json"),
           "partition": (partition, "partition.json"), "hops": (hops, "hops.json"),
           "hops_exit": (hops_exit, "hops.json")}


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
