"""Draw the figures of README.md and RESULTS.md from results/*.jsonl into assets/: one function per figure.

python -m experiments.plot                    # all figures whose records are there
python -m experiments.plot more_iterations    # one
"""

import statistics
from pathlib import Path

from config import ArgumentParser, cli
from experiments import RESULTS, ROOT, read
from experiments.induction import looks_up, tested, trained_at, where_a_look_up
from experiments.rows import ABLATIONS, DEPTHS, LONGER, MANY, SHORT, SMALL
from experiments.study import losses_by_rate
from model import UserError, check

try:
    import matplotlib
    from matplotlib import pyplot as plt
except ImportError:
    matplotlib = None

# One colour per rule, in every panel of every figure; what else differs is the line's style and marker.
RULE_COLOURS = {
    "std": "#555555",
    "abbie_d": "#1f77b4",
    "recall": "#d62728",
    "abbie_c": "#2ca02c",
    "zero_pt": "#9467bd",
    "abbie_d_literal": "#ff7f0e",
}
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MAIN_ROWS = (
    "std",
    "std_deep",
    "abbie_d",
    "recall",
    "abbie_c",
    "zero_pt",
)  # of the study; others are variants


def colour_of(row: str) -> str:
    """The colour of a row's rule: that of the longest name of a rule with which the row's begins."""
    rules = [rule for rule in RULE_COLOURS if row.startswith(rule)]
    return RULE_COLOURS[max(rules, key=len)] if rules else "#000000"


def subplots(n: int, **options):
    """A figure of n panels, at most four side by side."""
    down, across = -(-n // 4), min(n, 4)
    size = (5 * across, 4.4 * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", **options)
    for ax in axes.flat[n:]:
        ax.remove()
    return figure, axes.flat[:n]


def set_iters(ax, iters, **labels):
    """r on a logarithmic axis."""
    ticks = [r for r in iters if r in (1, 2, 3, 4, 6) or r >= 8]
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(r) for r in ticks])
    ax.minorticks_off()
    ax.set(xlabel="iterations r of the Body", **labels)


def legend_below(ax, columns: int = 2):
    """Outside of the panel, so that no curve is covered."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize="small", frameon=False)


def save(figure, path: Path):
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------- the study


def runs_of(folder: Path) -> dict[str, list[dict]]:
    """{row: its runs}."""
    rows = {}
    for run in read("study", folder):
        rows.setdefault(run["row"], []).append(run)
    check(bool(rows), "results/study.jsonl is empty")
    return rows


def loss_curve(ax, runs: list[dict], label: str, **style):
    """Mean of a row's loss against r, and the band of its seeds."""
    iters = [int(r) for r in runs[0]["val_loss"]]
    losses = [[run["val_loss"][str(r)] for run in runs] for r in iters]
    ax.plot(iters, [statistics.mean(seeds) for seeds in losses], label=label, **style)
    low, high = [min(seeds) for seeds in losses], [max(seeds) for seeds in losses]
    ax.fill_between(iters, low, high, color=style["color"], alpha=0.2, linewidth=0)
    return iters


# Rows of the figure at the top of the README, each at the best learning rate that was tried of it: by the
# mean of its seeds where several rates have three, or else by seed 1.
MANY_R = "recall_p6b3_2e-3"
CURVES = {
    MANY_R: "recall, trained at many r",
    "recall_2_8k": "recall, trained at r = 2",
    "abbie_d_p6b3": "abbie_d, trained at many r",
    "abbie_d_2_8k": "abbie_d, trained at r = 2",
}
# Of a control: its name, and what is equal; the style of its line; x of the marks of its seeds; and how far
# its label is from its line, in points.
CONTROLS = {
    "std_8k": ("Std", "equal parameters and tokens", "--", 39, 2),
    "std_ten": ("Std of ten blocks", "equal FLOPs and tokens", ":", 46, 2),
    "std_more_2e-3": ("Std on 2.4 times the tokens", "equal parameters and FLOPs", "-.", 54, -15),
}


# Rows on a quarter of the text and on all of it at the same rate, where they are read, and their line.
TEXT_MB = (2.56, 11.7)
BY_TEXT = {
    "Std": (("std_quarter", "std_8k_2e-3"), "1", "o--"),
    "Std of ten blocks": (("std_ten_quarter", "std_ten"), "1", "D:"),
    "Std on 2.4 times the tokens": (("std_more_quarter", "std_more_2e-3"), "1", "v-."),
    "recall, r = 6": (("recall_quarter", MANY_R), "6", "o-"),
}


def draw_by_text(ax, found: dict[str, list[dict]]):
    """Loss against the amount of text: a pale mark for every seed; lines of the means of those seeds that a
    row has on both."""
    for label, (rows, r, style) in BY_TEXT.items():
        losses = [{run["seed"]: run["val_loss"][r] for run in found.get(row, [])} for row in rows]
        how = {"color": colour_of(rows[0]), "markersize": 5}
        for size, seeds in zip(TEXT_MB, losses):
            ax.plot([size] * len(seeds), seeds.values(), style[0], alpha=0.4, **how)
        both = losses[0].keys() & losses[1].keys()
        if both:
            means = [statistics.mean(seeds[seed] for seed in both) for seeds in losses]
            ax.plot(TEXT_MB, means, style, label=f"{label} ({len(both)})", **how)
    ax.set_xscale("log")
    ax.set_xticks(TEXT_MB, [f"{size:.1f}" for size in TEXT_MB])
    ax.minorticks_off()
    ax.set(xlabel="MB of text, for 3.2 and 0.7 epochs of recall", ylabel="validation loss")
    ax.set_xlim(2.2, 13.6)
    legend_below(ax)


def more_iterations(folder: Path, path: Path):
    """The figure at the top of the README: loss and accuracy against r of a model trained at many r, with its
    controls; and loss against the amount of text."""
    found = runs_of(folder)
    check(MANY_R in found, f"results/study.jsonl has no row {MANY_R} yet")
    figure, (left, right, by_text) = plt.subplots(
        1, 3, figsize=(15.5, 4.6), layout="constrained", width_ratios=(1.7, 1, 1)
    )
    small, grey = {"fontsize": "small", "va": "bottom"}, colour_of("std")
    for ax in (left, right):
        ax.axvspan(2, 10, color="#d62728", alpha=0.07, linewidth=0)  # from the 10th to the 90th percentile
        where = ax.get_xaxis_transform()  # x in data, y in shares of the panel
        ax.text(
            4.5, 1.0, "87 % of the steps of training", color="#a03030", ha="center", transform=where, **small
        )

    iters = [1, 32]
    for row, label in CURVES.items():
        if row in found:
            n = f" ({len(found[row])} seeds)" if len(found[row]) > 1 else ""
            style = {"color": colour_of(row), "marker": "o", "linestyle": "-" if "many r" in label else "--"}
            iters = loss_curve(left, found[row], label + n, **style)
    tasks = {"cloze": "-", "lastword": ":"}
    for task, style in tasks.items():
        runs = [run["tasks"][task]["iters"] for run in found[MANY_R]]
        columns = list(runs[0])
        accuracies = [[100 * run[r]["acc"] for run in runs] for r in columns]
        means = [statistics.mean(seeds) for seeds in accuracies]
        depths, red = list(map(int, columns)), colour_of("recall")
        right.plot(depths, means, color=red, marker="o", linestyle=style, label=f"recall, {task}")
        bands = [min(seeds) for seeds in accuracies], [max(seeds) for seeds in accuracies]
        right.fill_between(depths, *bands, color=red, alpha=0.2, linewidth=0)

    for row, (name, equal, style, place, below) in CONTROLS.items():
        if row not in found:
            continue
        line = {"color": grey, "linestyle": style, "linewidth": 1}
        losses = [run["val_loss"]["1"] for run in found[row]]
        loss = statistics.mean(losses)
        left.axhline(loss, **line)
        left.plot([place] * len(losses), losses, "_", color=grey, markersize=9)  # each seed
        text = {"color": "#333333", "ha": "right", "textcoords": "offset points", **small}
        left.annotate(f"{name}, {equal} ({len(losses)}): {loss:.3f}", (32, loss), (0, below), **text)
        for task in tasks:
            runs = [run["tasks"][task]["iters"]["1"]["acc"] for run in found[row]]
            right.axhline(100 * statistics.mean(runs), label=name if task == "cloze" else None, **line)
    set_iters(left, iters, ylabel="validation loss, nats per byte")
    set_iters(right, [1, 2, 4, 8], ylabel="accuracy in %")
    left.set_ylim(top=min(left.get_ylim()[1], 1.3))  # recall trained at r = 2 leaves the panel
    legend_below(left)
    legend_below(right)
    draw_by_text(by_text, found)
    save(figure, path)


# A colour for the rule, a marker for how it spends its FLOPs.
RATES = {
    "std_8k": ("Std", "o:"), "std_six": ("Std of six blocks", "s--"), "std_ten": ("Std of ten blocks", "D--"),
    "std_more_2": ("Std, 1.48 times the tokens", "^-"), "std_more": ("Std, 2.4 times the tokens", "v-"),
    "recall_2_8k": ("recall, trained at r = 2", "o--"), "recall_p6b3": ("recall, trained at many r", "o-"),
}  # fmt: skip


def learning_rates(folder: Path, path: Path):
    """Loss after 8000 steps (or as many FLOPs) against the learning rate: lines of seed 1, pale marks of the
    other seeds."""
    found, *others = (losses_by_rate(SMALL, read("study", folder), seed) for seed in (1, 2, 3))
    found = {row: losses for row, losses in found.items() if len(losses) > 1}
    check(bool(found), "results/study.jsonl has no row at two learning rates yet")
    figure, ax = plt.subplots(figsize=(6, 5.2), layout="constrained")
    for row, losses in found.items():
        label, style = RATES[row]
        ax.plot([float(lr) for lr in losses], losses.values(), style, color=colour_of(row), label=label)
        for other in others:
            rates, pale = [float(lr) for lr in other[row]], {"alpha": 0.35, "linestyle": "none"}
            ax.plot(rates, other[row].values(), style[0], color=colour_of(row), **pale)
    rates = sorted({float(lr) for losses in found.values() for lr in losses})
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    ax.minorticks_off()
    ax.set(xlabel="learning rate", ylabel="validation loss, nats per byte")
    legend_below(ax)
    save(figure, path)


# Runs of the study by what their training cost: the FLOPs of Std on the same tokens, 1.5 times and 2.4 times.
LOOK_UP = {
    "std_8k": ("Std (1)", "o"), "std_4_heads": ("Std (1)", "o"), "std_six": ("Std of six blocks (1.5)", "s"),
    "std_more_2": ("Std on more tokens (1.5)", "^"), "std_ten": ("Std of ten blocks (2.4)", "D"),
    "std_more": ("Std on more tokens (2.4)", "v"), "recall_2_8k": ("recall, trained at r = 2 (1.5)", "P"),
    "recall_p6b3": ("recall, trained at many r (2.4)", "*"),
    "recall_4_heads": ("recall, trained at many r (2.4)", "*"),
}  # fmt: skip


def look_up(folder: Path, path: Path):
    """Loss where a look-up would be right against loss where it finds nothing, a point for each model, filled
    if it looks up random letters."""
    (figure, ax), shown = plt.subplots(figsize=(7, 6), layout="constrained"), {}
    for run in tested(folder):
        name = Path(run["ckpt"]).name.rpartition("-")[0]  # of the row, with or without a learning rate
        row = name if name in LOOK_UP else name.rpartition("_")[0]
        by_look_up = where_a_look_up(run, trained_at(run))
        apart = any(mark in name for mark in ("_books", "_quarter", "_16k", "_32k"))  # other text, or longer
        if row not in LOOK_UP or apart or not by_look_up:
            continue
        (label, marker), color = LOOK_UP[row], colour_of(row)
        style = {"marker": marker, "color": color, "linestyle": "none", "markersize": 9}
        style["fillstyle"] = "full" if looks_up(run, trained_at(run)) else "none"
        ax.plot(by_look_up["finds nothing"], by_look_up["is right"], **style)
        shown[label] = plt.Line2D([], [], **{**style, "fillstyle": "none"}, label=label)
    check(bool(shown), "results/induction.jsonl has no run of the study yet")
    ax.set(xlabel="nats per byte where a look-up finds nothing: new text")
    ax.set(ylabel="where it would be right: repeated text")
    ax.legend(
        handles=shown.values(),
        title="filled: looks up random letters\n(training FLOPs, Std = 1)",
        fontsize="small",
    )
    save(figure, path)


def exits(folder: Path, path: Path):
    """Loss, and accuracy, against iterations per token, at fixed r and with early exit: the models of a data
    set, in the mean, have a row."""
    found = {}
    for run in read("exits", folder):
        found.setdefault(run["data"], []).append(run)
    check(bool(found), "results/exits.jsonl is not there yet")
    size = (10, 4.4 * len(found))
    figure, panels = plt.subplots(len(found), 2, figsize=size, layout="constrained", squeeze=False)
    fixed, rules = ["2", "3", "4", "6", "8"], ["kl:1e-1", "kl:3e-2", "kl:1e-2"]
    for (data, runs), (left, right) in zip(found.items(), panels):

        def draw(ax, points: list[dict], what: str, label: str, marker: str, runs=runs):
            """points: for each model {column: {"iters": mean, what: value}}."""
            how = {"marker": marker, "markersize": 5}
            for columns, name, color, line in (
                (fixed, "fixed r", "#555555", ":"),
                (rules, "early exit (kl)", colour_of(runs[0]["rule"]), "-"),
            ):
                x, y = (
                    [statistics.mean(model[column][key] for model in points) for column in columns]
                    for key in ("iters", what)
                )
                ax.plot(x, y, color=color, ls=line, label=f"{label}, {name}", **how)

        for cache, marker in (("full", "o"), ("last", "s")):
            draw(left, [run[cache] for run in runs], "loss", f"cache {cache}", marker)
        scored = [run["tasks"] for run in runs if "tasks" in run]
        for task, marker in zip(scored[0] if scored else (), "o^"):
            draw(right, [tasks[task] for tasks in scored], "acc", task, marker)
        n = f", {len(runs)} seeds" if len(runs) > 1 else ""
        left.set(title=f"{runs[0]['rule']}, {data}{n}", ylabel="validation loss, nats per byte")
        right.set(ylabel="accuracy")
        for ax in (left, right):
            ax.set_xlabel("iterations per token, mean")
            legend_below(ax)
    save(figure, path)


def study_loss(folder: Path, path: Path):
    """Validation loss against r for every row of the study, mean and range over its seeds."""
    found = runs_of(folder)
    short = [row for row in SHORT if row in found and found[row][0]["steps"] == 2000]
    wide = [row for row in short if row.endswith("_wide")]
    panels = {
        "the rules (number of seeds)": [row for row in MAIN_ROWS if row in found],
        "variants, 2000 steps": [row for row in short if row not in (*MAIN_ROWS, *wide)],
        "two and four times as long": [row for row in found if row.endswith(("_long", "_longer"))],
        "trained at many r, and controls": [row for row in MANY if row in found],
        "16,000 steps": [row for row in LONGER if row in found],
        "what makes recall iterate, 2000 steps": [row for row in ABLATIONS if row in found],
        "depths and gradients, 2000 steps": [row for row in ("recall_p6b3_2k", *DEPTHS) if row in found],
        "twice as wide": wide,
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    figure, axes = subplots(len(panels))
    for ax, (title, rows) in zip(axes, panels.items()):
        used, iters = {}, []
        one_rule = len({colour_of(row) for row in rows}) == 1
        for i, row in enumerate(rows):
            color = f"C{i}" if one_rule else colour_of(row)
            style = STYLES[used.get(color, 0) % len(STYLES)]
            used[color] = used.get(color, 0) + 1
            label = f"{row} ({len(found[row])})"
            drawn = loss_curve(ax, found[row], label, color=color, linestyle=style, marker=".")
            iters = max(iters, drawn, key=len)  # a Std is read at 1 and 2 only
        ax.set_ylim(top=min(ax.get_ylim()[1], 1.8))
        set_iters(ax, iters, title=title, ylabel="validation loss, nats per byte")
        legend_below(ax)
    save(figure, path)


def study_flops(folder: Path, path: Path):
    """Validation loss at the trained r against the FLOPs spent in training, mean over seeds."""
    found = runs_of(folder)
    figure, (ax,) = subplots(1)
    for row in (row for row in MAIN_ROWS if row in found):
        r = "1" if row.startswith("std") else "2"
        points = list(zip(*(run["curve"][1:] for run in found[row])))  # per evaluation, its seeds
        flops = [seeds[0]["flops"] for seeds in points]
        losses = [statistics.mean(seed["val_loss"][r] for seed in seeds) for seeds in points]
        style = "--" if row == "std_deep" else "-"
        ax.plot(flops, losses, style, marker=".", color=colour_of(row), label=f"{row}, r = {r}")
    ax.set(title="loss against training compute", xlabel="training FLOPs", ylabel="validation loss")
    legend_below(ax, columns=3)
    save(figure, path)


def study_change(folder: Path, path: Path):
    """How much the state that the Tail reads changes with each iteration, trained and untrained."""
    found = runs_of(folder)
    figure, axes = subplots(2, sharey=True)
    for ax, which in zip(axes, ("trained", "untrained")):
        for row in (row for row in MAIN_ROWS if row in found and not row.startswith("std")):
            entries = found[row][0]["convergence"][which].items()
            change = {int(r): entry["change"] for r, entry in entries if "change" in entry}
            ax.plot(change.keys(), change.values(), marker=".", color=colour_of(row), label=row)
        ax.set_yscale("log")
        title = "trained at r = 2" if which == "trained" else "untrained"
        set_iters(ax, [2, 4, 8, 16], title=title, ylabel="relative change from the iteration before")
        legend_below(ax, columns=4)
    save(figure, path)


def study_tasks(folder: Path, path: Path):
    """Accuracy of the built-in tasks against r, mean over seeds."""
    found = runs_of(folder)
    rows = [row for row in MAIN_ROWS if row in found]
    tasks = found[rows[0]][0]["tasks"]
    figure, axes = subplots(len(tasks))
    for ax, task in zip(axes, tasks):
        for row in rows:
            scores = [run["tasks"][task]["iters"] for run in found[row]]
            iters = [int(r) for r in scores[0]]
            acc = [100 * statistics.mean(score[str(r)]["acc"] for score in scores) for r in iters]
            style = "--" if row == "std_deep" else "-"
            ax.plot(iters, acc, style, marker=".", color=colour_of(row), label=row)
        set_iters(ax, iters, title=f"{task}, {tasks[task]['n']} examples", ylabel="accuracy, %")
        legend_below(ax, columns=3)
    save(figure, path)


# ----------------------------------------------------------------------------------------- one model, every r


def newest(name: str, what: str, folder: Path) -> dict:
    records = [record for record in read(name, folder) if record["what"] == what]
    check(bool(records), f"results/{name}.jsonl has no {what!r} yet")
    return records[-1]


def evaluation(folder: Path, path: Path):
    """Accuracy, perplexity per word and validation loss against r, with standard errors."""
    found = newest("evaluation", "tiny", folder)
    tasks = found["tasks"]
    panels = {
        "accuracy, %": [(name, task["iters"], "acc") for name, task in tasks.items()],
        "perplexity per word": [
            (name, task["iters"], "perplexity") for name, task in tasks.items() if name == "lastword"
        ],
        "loss, nats per token": [(found["ppl"]["data"], found["ppl"]["iters"], "loss")],
    }
    figure, axes = subplots(len(panels))
    for ax, (ylabel, lines) in zip(axes, panels.items()):
        for (name, scores, metric), style in zip(lines, STYLES):
            iters, scale = [int(r) for r in scores], 100 if metric == "acc" else 1
            values = [scale * score[metric] for score in scores.values()]
            errors = [scale * score[f"{metric}_stderr"] for score in scores.values()]
            ax.errorbar(
                iters, values, errors, marker="o", capsize=3, label=name, linestyle=style,
                color=RULE_COLOURS["abbie_d"],
            )  # fmt: skip
        ax.axvline(found["trained_iters"], color="grey", linestyle=":", label="trained at")
        set_iters(ax, iters, title="abbie_tiny", ylabel=ylabel)
        legend_below(ax, columns=3)
    save(figure, path)


def fixed_point(folder: Path, path: Path):
    """How the state that the Tail reads changes with each iteration, trained and untrained."""
    found = newest("evaluation", "tiny", folder)["convergence"]
    titles = {
        "change": "change from the iteration before",
        "settled": "tokens whose argmax has settled",
        "from_noise": "distance when started from noise",
    }
    figure, axes = subplots(len(titles))
    for ax, (quantity, title) in zip(axes, titles.items()):
        for which, style in (("trained", "-"), ("untrained", "--")):
            points = {int(r): entry[quantity] for r, entry in found[which].items() if quantity in entry}
            color = RULE_COLOURS["abbie_d"]
            ax.plot(points.keys(), points.values(), style, marker=".", color=color, label=f"abbie_d, {which}")
        if quantity != "settled":
            ax.set_yscale("log")
        if quantity == "from_noise":  # a flat line is to look flat
            ax.set_ylim(min(0.1, ax.get_ylim()[0]), 2)
        ylabel = "fraction" if quantity == "settled" else "relative distance"
        set_iters(ax, [2**i for i in range(8) if 2**i <= max(points)], title=title, ylabel=ylabel)
        legend_below(ax)
    save(figure, path)


# ------------------------------------------------------------------------------------------- cuts and chains


def partition(folder: Path, path: Path):
    """What repeating each contiguous Body of an untouched Std model costs: a panel for each rule."""
    records = read("partition", folder)
    check(bool(records), "results/partition.jsonl is empty")
    found = records[-1]
    rules = sorted({cut["rule"] for cut in found["cuts"]})
    n = max(cut["n_body_blocks"] for cut in found["cuts"])
    figure, axes = subplots(len(rules))
    for ax, rule in zip(axes, rules):
        cost = [[float("nan")] * n for _ in range(n)]  # [blocks of the Head][blocks of the Body - 1]
        for cut in (cut for cut in found["cuts"] if cut["rule"] == rule):
            head, body = cut["n_head_blocks"], cut["n_body_blocks"]
            cost[head][body - 1] = cut["cost"]
            ax.text(body, head, f"{cut['cost']:.3f}", ha="center", va="center", fontsize="small")
        ax.imshow(cost, extent=(0.5, n + 0.5, n - 0.5, -0.5), cmap="RdYlGn_r", norm="symlog", aspect="auto")
        ax.set(title=f"{rule}, r = {found['iters']}", xlabel="blocks of the Body", ylabel="blocks of Head")
    figure.suptitle(f"added loss (nats per token) over r = 1, {found['loss_at_1']:.3f}")
    save(figure, path)


def panels_of(folder: Path) -> dict[str, list[dict]]:
    """{title of a panel: its seeds}, of the tries that have a panel."""
    panels = {}
    for entry in read("hops", folder):
        if entry["figure"]:
            panels.setdefault(entry["figure"], []).append(entry)
    return panels


def hops(folder: Path, path: Path):
    """Accuracy of variable chains by hops and r: a panel for each model, the mean of its seeds; what it was
    trained on is framed."""
    panels = panels_of(folder)
    check(bool(panels), "results/hops.jsonl has no panel")
    widths = [len(seeds[0]["acc"]) for seeds in panels.values()]
    size = (0.55 * sum(widths) + 1.5, 4.5)
    shared = {"width_ratios": widths, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", **shared)
    for ax, (title, seeds) in zip(axes[0], panels.items()):
        entry = seeds[0]
        lengths, iters = [int(n) for n in entry["n"]], [int(r) for r in entry["acc"]]
        acc = []
        for n in lengths:
            acc.append([100 * statistics.mean(seed["acc"][str(r)][str(n)] for seed in seeds) for r in iters])
        image = ax.imshow(acc, origin="lower", vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for i, row in enumerate(acc):
            for j, value in enumerate(row):
                color = "black" if value > 60 else "white"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize="small", color=color)
        low, _, high = str(entry["config"]["iters"]).partition("-")
        left, right = iters.index(int(low)), iters.index(int(high or low))
        frame = {"fill": False, "edgecolor": "red", "linewidth": 2.5, "clip_on": False}
        ax.add_patch(plt.Rectangle((left - 0.5, -0.5), right - left + 1, entry["trained_hops"], **frame))
        ax.set_xticks(range(len(iters)), iters)
        ax.set_yticks(range(len(lengths)), lengths)
        ax.set_title(title + (f", mean of {len(seeds)} seeds" if len(seeds) > 1 else ""), fontsize="medium")
        ax.set_xlabel("r at test time")
    axes[0][0].set_ylabel("hops of the chain")
    figure.colorbar(image, ax=axes, label="answers that are right, % (framed: seen in training)")
    save(figure, path)


def hops_exit(folder: Path, path: Path):
    """Chains with early exit: a row of panels for each model, a style for each seed. Left: the iterations of
    a query, by its hops. Right: accuracy, beside that at the best r for every token."""
    panels = {title: seeds for title, seeds in panels_of(folder).items() if "exit" in seeds[0]}
    check(bool(panels), "results/hops.jsonl has no try with --exit")
    size = (10, 4.4 * len(panels))
    figure, axes = plt.subplots(len(panels), 2, figsize=size, squeeze=False, layout="constrained")
    for (left, right), (title, seeds) in zip(axes, panels.items()):
        color = colour_of(seeds[0]["config"]["rule"])
        for entry, style in zip(seeds, STYLES):
            spec, found = next(iter(entry["exit"].items()))
            lengths = [int(n) for n in found["iters"]]
            line = {"color": color, "linestyle": style, "marker": "."}
            label = f"seed {entry['config']['seed']}: {found['mean_iters']:.1f} per token"
            left.plot(lengths, found["iters"].values(), label=label, **line)
            right.plot(
                lengths,
                [100 * found["acc"][str(n)] for n in lengths],
                label=f"seed {entry['config']['seed']}",
                **line,
            )
            best = max(entry["acc"], key=lambda r: sum(entry["acc"][r].values()))
            at_best = [100 * entry["acc"][best][str(n)] for n in lengths]
            right.plot(lengths, at_best, label=f"r = {best}", **{**line, "color": "grey"})
        left.plot(lengths, lengths, color="black", linewidth=0.8, label="one iteration a hop")
        right.axvline(
            seeds[0]["trained_hops"] + 0.5, color="black", linewidth=0.8, label="longest in training"
        )
        left.set(title=f"{title}, --exit {spec}", ylabel="iterations that a query takes")
        right.set(
            title="with early exit; grey: every token at the best r", ylabel="answers that are right, %"
        )
        for ax in (left, right):
            ax.set(xlabel="hops of the chain", xticks=lengths)
            legend_below(ax, columns=3)
    save(figure, path)


FIGURES = {
    "more_iterations": more_iterations,
    "learning_rates": learning_rates,
    "look_up": look_up,
    "exits": exits,
    "study_loss": study_loss,
    "study_flops": study_flops,
    "study_change": study_change,
    "study_tasks": study_tasks,
    "evaluation": evaluation,
    "fixed_point": fixed_point,
    "partition": partition,
    "hops": hops,
    "hops_exit": hops_exit,
}


def main(argv: list[str]):
    parser = ArgumentParser(prog="-m experiments.plot", description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (results)")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder of the figures (assets)")
    args = parser.parse_args(argv)
    check(matplotlib is not None, "figures need matplotlib\npip install matplotlib")
    matplotlib.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures or FIGURES:
        check(name in FIGURES, f"no figure {name}\nfigures: {', '.join(FIGURES)}")
        try:
            FIGURES[name](args.results, args.out / f"{name}.png")
            print(args.out / f"{name}.png")
        except UserError as error:
            if args.figures:
                raise
            print(f"{name} is left out: {error}")


if __name__ == "__main__":
    cli(main)
