"""The three figures of experiments/README.md, from the records, one message each. Needs matplotlib.

python -m experiments.plot                                   # -> experiments/figures/*.png
python -m experiments.plot chains --results FOLDER --out FOLDER
"""

import statistics
from pathlib import Path

from config import ArgumentParser, cli, optional
from experiments import RESULTS, ROOT, read
from model import UserError, check

COLOURS = {
    "abbie_d": "#1f77b4",
    "recall": "#d62728",
    "abbie_c": "#2ca02c",
    "zero_pt": "#9467bd",
    "Std": "#444444",
}


def new_figure(width: float, height: float, panels: int = 1, **options):
    """-> figure, list of axes side by side."""
    plt = optional("matplotlib.pyplot")
    plt.switch_backend("Agg")  # draws without a screen
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, panels, figsize=(width, height), squeeze=False, layout="constrained", **options
    )
    return figure, list(axes[0])


def log_axis(ax, iters: list[int]):
    """r on a logarithmic axis."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(iters, [str(r) for r in iters])
    ax.minorticks_off()
    ax.set_xlabel("iterations r")


# ----------------------------------------------------------------------------------------------------- chains


def chains_of(records: list[dict], rule: str, at_2: bool) -> list[dict]:
    """The records of one rule on full programs, trained at r = 2 alone or at a range of r."""
    full = [record for record in records if record["programs"] == "full" and record["rule"] == rule]
    return [record for record in full if (str(record["iters"]) == "2") == at_2]


def accuracy(records: list[dict], r: str, hops: str) -> float:
    """In %, the mean over seeds."""
    return 100 * statistics.mean(record["acc"][r][hops] for record in records)


def draw_chains(folder: Path):
    """Accuracy by hops and r for both rules; on the right the same of models trained at r = 2 alone."""
    records = read("chains", folder)
    rules = [rule for rule in ("abbie_d", "recall") if chains_of(records, rule, at_2=False)]
    check(bool(rules), f"{folder}/chains.jsonl has no record yet\npython -m experiments.chains makes one")
    alone = {rule: chains_of(records, rule, at_2=True) for rule in rules}
    alone = {rule: seeds for rule, seeds in alone.items() if seeds}
    figure, axes = new_figure(5.2 * len(rules) + 5.6 * bool(alone), 5.2, len(rules) + bool(alone))
    for ax, rule in zip(axes, rules):
        seeds = chains_of(records, rule, at_2=False)
        iters, lengths = list(seeds[0]["acc"]), list(seeds[0]["n"])
        table = [[accuracy(seeds, r, hops) for r in iters] for hops in lengths]
        ax.imshow(table, origin="lower", vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                colour = "white" if value > 60 else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=10, color=colour)
        ax.set_xticks(range(len(iters)), iters)
        ax.set_yticks(range(len(lengths)), lengths)
        n = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        ax.set_title(f"{rule}, trained at r = {seeds[0]['iters']}{n}: right answers, %", fontsize=12)
        ax.set(xlabel="iterations r", ylabel="hops (line: longest in training)")
        ax.axhline(5.5, color="#ff7f0e", linewidth=2)
    for rule, seeds in alone.items():
        ax = axes[-1]
        iters = [int(r) for r in seeds[0]["acc"]]
        for hops, style in (("1", "-"), ("3", "--"), ("5", ":")):
            values = [accuracy(seeds, str(r), hops) for r in iters]
            label = f"{rule}, {hops} hop{'s' * (hops != '1')}"
            ax.plot(iters, values, style, color=COLOURS[rule], marker="o", linewidth=2, label=label)
        log_axis(ax, iters)
        ax.set_title("both trained at r = 2 alone", fontsize=12)
        ax.set(ylabel="right answers, %", ylim=(-3, 103))
        ax.legend(
            frameon=False,
            fontsize=10,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=2,
            handlelength=3,
        )
    return figure


# ------------------------------------------------------------------------------------------------------- loss

CURVES = {
    "abbie_d_2_8k": ("abbie_d", "abbie_d, trained at r = 2", "-"),
    "recall_2_8k": ("recall", "recall, trained at r = 2", "--"),
    "recall_p6b3_2e-3": ("recall", "recall, r drawn per step", "-"),
}
BASELINES = {
    "std_8k": ("Std", "-"),
    "std_ten": ("deeper: 10 blocks instead of 4", "--"),
    "std_more_2e-3": ("longer: 2.4x the tokens", ":"),
}


def runs_of(row: str, folder: Path) -> list[dict]:
    runs = [record for record in read("study", folder) if record["row"] == row]
    check(bool(runs), f"{folder}/study.jsonl has no {row} yet\npython -m experiments.study --row {row}")
    return runs


def draw_loss(folder: Path):
    """Loss against r, means over seeds, beside standard Transformers at r = 1."""
    figure, (ax,) = new_figure(9.5, 5)
    for row, (rule, label, style) in CURVES.items():
        runs = runs_of(row, folder)
        iters = [int(r) for r in runs[0]["val_loss"]]
        losses = [statistics.mean(run["val_loss"][str(r)] for run in runs) for r in iters]
        ax.plot(iters, losses, style, marker="o", linewidth=2, color=COLOURS[rule], label=label)
    for row, (label, style) in BASELINES.items():
        loss = statistics.mean(run["val_loss"]["1"] for run in runs_of(row, folder))
        ax.axhline(loss, color=COLOURS["Std"], linestyle=style, linewidth=1.5)
        ax.annotate(f"{label}: {loss:.3f}", (1.0, loss), (6, -4), xycoords=("axes fraction", "data"),
                    textcoords="offset points", annotation_clip=False, fontsize=11)  # fmt: skip
    log_axis(ax, [1, 2, 3, 4, 6, 8, 16, 32])
    ax.set(ylabel="validation loss, nats per byte", ylim=(0.97, 1.26))
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=11, handlelength=3)
    return figure


# ----------------------------------------------------------------------------------------------------- change


def draw_change(folder: Path):
    """How much an iteration changes what the Tail reads, trained and untrained."""
    figure, axes = new_figure(10, 4.6, 2, sharey=True)
    for ax, which in zip(axes, ("trained", "untrained")):
        for row in ("zero_pt", "abbie_c", "recall", "abbie_d"):
            entries = runs_of(row, folder)[0]["convergence"][which]
            change = {int(r): entry["change"] for r, entry in entries.items() if "change" in entry}
            ax.plot(change.keys(), change.values(), marker="o", linewidth=2, color=COLOURS[row], label=row)
        ax.set_yscale("log")
        ax.set_ylim(1e-7, 3)
        ax.set_title("trained at r = 2" if which == "trained" else "not trained at all", fontsize=12)
        log_axis(ax, [2, 4, 8, 16])
    axes[0].set_ylabel("relative change by the iteration")
    axes[1].legend(frameon=False, fontsize=11, loc="lower left")
    return figure


FIGURES = {"chains": draw_chains, "loss": draw_loss, "change": draw_change}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.plot", description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "experiments" / "figures", help="folder of figures"
    )
    args = parser.parse_args(argv)
    for name in args.figures:
        check(name in FIGURES, f"no figure {name}\nfigures: {', '.join(FIGURES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures or FIGURES:
        try:
            figure = FIGURES[name](args.results)
        except UserError as error:
            if args.figures:
                raise
            print(f"{name} is left out: {error}")
            continue
        figure.savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    cli(main)
