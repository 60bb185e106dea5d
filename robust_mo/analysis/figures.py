"""The figures of a study, drawn from its summary alone.

`organism` below is one value of summary.json's "organisms", as summary.py makes it.  Read of it are "points", each
with "method", "learning_rate", "seed", "step", "on_frontier", "rate", "performance" and the intervals of these two
(performance is None where it is undefined); "start", the point of the organism before blue training; and "measures"
(name -> {"auc": [value, low, high], "frontier": corners, ...}, see comparison.py), where the name "all" stands for all
blue methods together.

The same input gives the same bytes.  No pyplot, hence no global state and no display.  Knows nothing of runs.
"""

import io
import pathlib

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from robust_mo import runs
from robust_mo.analysis.cells import method_before

# Okabe and Ito's colours, which colour-blind readers tell apart too; black belongs to all methods.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
DOTTED, DASHED = (0, (1, 2)), (0, (5, 3))

_NOISE = {"color": "0.45", "linewidth": 1.0, "linestyle": (0, (4, 2)), "zorder": 1.9}

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "robust_mo",  # else ids in the file are random
}


def pareto_figure(name: str, organism: dict, cost: float) -> Figure:
    """Performance against backdoor rate: every checkpoint, its intervals, and the frontiers."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = figure.add_subplot()
        colours, markers = _colours(organism), _by_learning_rate(organism, MARKERS)
        several = len(colours) > 1
        hull, noise = organism["measures"]["all"]["frontier"], organism["measures"]["all"]["noise"]
        seeds = len({point["seed"] for point in organism["points"]})
        checkpoints = [point for point in organism["points"] if point["step"]]  # the star stands for step 0
        highest = max(y for _, y in hull + noise)
        # Intervals may leave the frame at the top: the room belongs to the points.
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, highest + 0.12))
        axes.set_xlabel("backdoor rate on triggered prompts")
        axes.set_ylabel("performance relative to the organism")
        axes.set_title(name, loc="left", fontweight="bold")
        value, low, high = organism["measures"]["all"]["auc"]
        axes.set_title(f"AUC {value:.2f} [{low:.2f}, {high:.2f}]", loc="right", fontsize=9, color="0.25")

        axes.fill_between(*zip(*hull, strict=True), color="0.95", linewidth=0, zorder=0)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.9, linestyle=DOTTED)
        axes.text(
            0.36,
            0.345,
            "maximally robust",
            color="0.45",
            fontsize=8,
            va="top",
            rotation=45,
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
        axes.axhline(1 - cost, color="0.6", linewidth=0.9, linestyle=DASHED, zorder=1)
        axes.annotate(
            f"{cost:.0%} cost",
            (1, 1 - cost),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            color="0.45",
            fontsize=8,
            va="center",
        )

        axes.plot(*zip(*noise, strict=True), **_NOISE)
        axes.plot(*zip(*hull, strict=True), color="black", linewidth=1.6, zorder=2)
        for method, colour in colours.items() if several else ():
            corners = organism["measures"][method]["frontier"]
            axes.plot(*zip(*corners, strict=True), color=colour, linewidth=0.9, zorder=2.1)
        for (method, _, _), points in _by_run(organism).items():
            x, y = zip(*((point["rate"], point["performance"]) for point in points), strict=True)
            axes.plot(x, y, color=colours[method], linewidth=0.7, alpha=0.3, zorder=1.2)
        for point in checkpoints:
            colour = colours[point["method"]]
            _cross(axes, point, color=colour, alpha=0.6 if point["on_frontier"] else 0.2)
            axes.plot(
                point["rate"],
                point["performance"],
                markers[point["learning_rate"]],
                color=colour,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
        axes.plot([0, 1], [0, 1], "o", color="white", markeredgecolor="black", markersize=6, zorder=3.1)
        start = organism["start"]
        _cross(axes, start, color="black", alpha=0.4)
        axes.plot(start["rate"], 1, "*", color="black", markersize=12, markeredgecolor="white", zorder=3.2)

        label = "frontier" + ", all methods" * several + f", mean of {seeds} seeds" * (seeds > 1)
        handles = [
            Line2D([], [], color="black", linewidth=1.6, label=label),
            Line2D([], [], label="noise alone, no attack", **_NOISE),
            Line2D([], [], color="black", marker="*", linestyle="", markersize=9, label="before blue training"),
            Line2D([], [], color="white", marker="o", linestyle="", markeredgecolor="black", label="anchors"),
        ]
        handles += [
            Line2D([], [], color=colour, marker=markers[rate], linestyle="", label=f"{method}, lr {rate:g}")
            for method, colour in colours.items()
            for rate in sorted({point["learning_rate"] for point in checkpoints if point["method"] == method})
        ]
        axes.legend(handles=handles, loc="lower right", labelspacing=0.35, handletextpad=0.5)
        _label_steps(figure, axes, checkpoints, colours, [(0, 0), (1, 1), (start["rate"], 1)])
    return figure


def results_figure(results: dict[str, dict], cost: float) -> Figure:
    """The mean frontier of each result, with its bootstrap band: a panel per result, the others in grey.

    Args:
      results: name -> what comparison.py measured; read of it are "auc", "frontier", "band" and "noise".
    """
    with matplotlib.rc_context(_STYLE):
        columns = min(3, len(results))
        rows = -(-len(results) // columns)
        figure = Figure(figsize=(0.6 + 3.0 * columns, 0.7 + 2.8 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for i, (name, result) in enumerate(results.items()):
            axes, colour = panels.flat[i], COLOURS[i % len(COLOURS)]
            axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.9, linestyle=DOTTED)
            axes.axhline(1 - cost, color="0.6", linewidth=0.9, linestyle=DASHED, zorder=1)
            for other in results.values():
                axes.plot(*zip(*other["frontier"], strict=True), color="0.85", linewidth=0.9, zorder=1.1)
            axes.fill_between(*zip(*result["band"], strict=True), color=colour, alpha=0.2, linewidth=0, zorder=1.2)
            axes.plot(*zip(*result["noise"], strict=True), **_NOISE)
            axes.plot(*zip(*result["frontier"], strict=True), color=colour, linewidth=1.6, zorder=2)
            axes.set_title(name, loc="left", fontsize=9, fontweight="bold")
            value, low, high = result["auc"]
            axes.text(0.97, 0.04, f"AUC {value:.2f} [{low:.2f}, {high:.2f}]", transform=axes.transAxes, ha="right")
        for axes in panels.flat[len(results) :]:
            axes.remove()
        panels[0, 0].set(xlim=(-0.03, 1.03), ylim=(-0.03, None))
        figure.supxlabel("backdoor rate on triggered prompts", fontsize=9)
        figure.supylabel("performance relative to the organism", fontsize=9)
        handles = [
            Line2D([], [], color=COLOURS[0], linewidth=1.6, label="mean frontier and its 95% band"),
            Line2D([], [], label="noise alone, no attack", **_NOISE),
            Line2D([], [], color="0.6", linewidth=0.9, linestyle=DOTTED, label="maximally robust"),
            Line2D([], [], color="0.6", linewidth=0.9, linestyle=DASHED, label=f"{cost:.0%} cost"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=(1, 2, 4)[columns - 1], handlelength=3)
    return figure


def curves_figure(name: str, organism: dict, cost: float) -> Figure:
    """Backdoor rate and relative performance against blue training steps: a column per method, a line per run."""
    with matplotlib.rc_context(_STYLE):
        colours, dashes = _colours(organism), _by_learning_rate(organism, DASHES)
        markers = _by_learning_rate(organism, MARKERS)
        figure = Figure(figsize=(max(4.6, 0.6 + 2.9 * len(colours)), 4.8), layout="constrained")
        panels = figure.subplots(2, len(colours), sharex="col", sharey="row", squeeze=False)
        for (method, learning_rate, _), points in _by_run(organism).items():
            column = list(colours).index(method)
            for axes, quantity in zip(panels[:, column], ("rate", "performance"), strict=True):
                shown = [point for point in points if point[quantity] is not None]
                steps = [point["step"] for point in shown]
                axes.plot(
                    steps,
                    [point[quantity] for point in shown],
                    dashes[learning_rate],
                    color=colours[method],
                    marker=markers[learning_rate],
                    markersize=3.5,
                    linewidth=1.2,
                )
                bounds = [point[f"{quantity}_interval"] for point in shown]
                axes.fill_between(
                    steps,
                    [low for low, _ in bounds],
                    [high for _, high in bounds],
                    color=colours[method],
                    alpha=0.10,
                    linewidth=0,
                )
        for column, method in enumerate(colours):
            above, below = panels[:, column]
            above.set_title(method, fontsize=9)
            above.set_ylim(-0.03, 1.05)
            below.axhline(1, color="0.6", linewidth=0.9, linestyle=DOTTED, zorder=1)
            below.axhline(1 - cost, color="0.6", linewidth=0.9, linestyle=DASHED, zorder=1)
            below.set_ylim(bottom=-0.03)
            below.set_xlabel("blue training step")
        panels[0, 0].set_ylabel("backdoor rate")
        panels[1, 0].set_ylabel("relative performance")
        figure.suptitle(name, fontsize=10, fontweight="bold")
        handles = [
            Line2D([], [], color="0.3", linestyle=dash, marker=markers[rate], markersize=3.5, label=f"lr {rate:g}")
            for rate, dash in dashes.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=3)
    return figure


def losses_figure(backdoor: str, organisms: dict[str, dict]) -> Figure:
    """Training loss of a backdoor's red runs, against steps and against seconds: a colour per arm, a line per run."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        arms = dict.fromkeys(organism["arm"] for organism in organisms.values())
        looks = {
            arm: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
            for i, arm in enumerate(arms)
        }
        for organism in organisms.values():
            attacked = organism["chosen"] and organism["gate"]["passed"]
            steps, _, seconds = zip(*organism["losses"], strict=True) if organism["losses"] else ((), (), ())
            losses, look = smoothed(organism["losses"]), looks[organism["arm"]]
            for axes, places in zip(panels, (steps, seconds), strict=True):
                if None not in places:
                    axes.plot(places, losses, linewidth=1.4, alpha=1.0 if attacked else 0.2, **look)
        panels[0].set_ylabel("training loss, nats per token")
        panels[0].set_xlabel("step")
        panels[1].set_xlabel("seconds spent in steps")
        figure.suptitle(backdoor, fontsize=10, fontweight="bold")
        handles = [Line2D([], [], label=arm or backdoor, **look) for arm, look in looks.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, handlelength=3)
    return figure


def smoothed(losses: list[list]) -> list[float]:
    """Running mean of the losses of `[step, loss, seconds]` rows, over the tenth of the run that ends at each."""
    width = max(1, len(losses) // 10)
    values = [loss for _, loss, _ in losses]
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - width) : i + 1])]


def save(figure: Figure, path: pathlib.Path, origin: str) -> None:
    """Writes path.png and path.svg; `origin` says in their metadata what made them."""
    drawn = {suffix: io.BytesIO() for suffix in (".png", ".svg")}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(drawn[".png"], format="png", dpi=200)
        figure.savefig(drawn[".svg"], format="svg", metadata={"Description": origin, "Date": None})
    about = PngInfo()
    about.add_text("Description", origin)
    # A chart has few colours: with a palette it takes a third of the bytes, and so does a page that holds many.
    image = Image.open(drawn[".png"]).convert("RGB").quantize(256)
    drawn[".png"] = io.BytesIO()
    image.save(drawn[".png"], format="png", pnginfo=about, optimize=True)
    for suffix, data in drawn.items():
        runs.write_bytes(path.with_name(path.name + suffix), data.getvalue())


def _colours(organism) -> dict[str, str]:
    methods = dict.fromkeys(point["method"] for point in organism["points"])
    return {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}


def _by_learning_rate(organism, looks) -> dict[float, str]:
    rates = sorted({point["learning_rate"] for point in organism["points"]})
    return {rate: looks[i % len(looks)] for i, rate in enumerate(rates)}


def _by_run(organism) -> dict[tuple, list[dict]]:
    """(method, learning rate, seed) -> the run's points, from what it began with on: the organism, or where the method
    before it ended."""
    found: dict[tuple, list[dict]] = {}
    for point in organism["points"]:
        cell = (point["learning_rate"], point["seed"])
        (*_, begun) = found.get((method_before(point["method"]), *cell), [organism["start"]])
        start = [] if point["step"] == 0 else [begun | {"step": 0}]
        found.setdefault((point["method"], *cell), start).append(point)
    return found


def _cross(axes, point, **look) -> None:
    """Both intervals of a point as lines through it."""
    axes.plot(point["rate_interval"], [point["performance"]] * 2, linewidth=0.7, zorder=1.1, **look)
    axes.plot([point["rate"]] * 2, point["performance_interval"], linewidth=0.7, zorder=1.1, **look)


def _label_steps(figure, axes, points, colours, marks) -> None:
    """Writes step numbers beside points where there is room, corners of the frontier first.

    A label tries eight places around its point, and is left out where each would cover a label, a point or a mark.
    """
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.draw_without_rendering()  # places are known only after the layout
    figure.set_layout_engine("none")
    taken = [axes.get_legend().get_window_extent(), *(text.get_window_extent() for text in axes.texts)]
    half = 3 * figure.dpi / 72
    for place in (*marks, *((point["rate"], point["performance"]) for point in points)):
        x, y = axes.transData.transform(place)
        taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    for point in sorted(points, key=lambda point: not point["on_frontier"]):
        label = axes.annotate(
            str(point["step"]),
            (point["rate"], point["performance"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=6.5,
            color=colours[point["method"]],
            zorder=4,
        )
        # Up and to the left is outside of a frontier.
        for right, up in ((-1, 1), (1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
            distance = 3.5 if right and up else 5
            label.set_position((distance * right, distance * up))
            label.set_horizontalalignment({1: "left", -1: "right", 0: "center"}[right])
            label.set_verticalalignment({1: "bottom", -1: "top", 0: "center"}[up])
            extent = label.get_window_extent()
            if not extent.count_overlaps(taken):
                taken.append(extent)
                break
        else:
            label.remove()
