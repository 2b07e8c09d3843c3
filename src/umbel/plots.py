"""The report's figures: runs → SVG text that takes its colours from the page around it.

Matplotlib draws with stand-in colours, which become CSS variables afterwards, so that one figure is
readable on a light and on a dark page. Text stays text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import pairwise, zip_longest
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from umbel.tables import Group, Onboarded, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

Against = Literal["round", "bytes", "seconds"]
Key = Literal["accuracy", "loss", "worst_decile"]

NUM_COLOURS = 8  # of the page's series, --s0 to --s7
INK, FAINT, SHADE = "#010101", "#020202", "#030303"
STAND_INS = {INK: "var(--ink)", FAINT: "var(--faint)", SHADE: "var(--shade)"} | {
    f"#0{i}0a0b": f"var(--s{i})" for i in range(NUM_COLOURS)
}
ROUTES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#999999")
"""Paul Tol's bright colours, which colour-blind readers can tell apart: pixels have no CSS variables."""

MAX_POINTS = 400  # of a curve: more than there are pixels
MAX_DOTS = 400  # clients of a method that are drawn one by one


def curves(groups: Sequence[Group], key: Key, against: Against) -> str:
    """The figure over rounds, bytes or seconds: the mean over seeds, and a band from the lowest to the highest."""

    def draw(figure: "Figure") -> None:
        axes = _axes(figure)
        for place, group in enumerate(groups):
            drawn = [points for run in group.runs if len((points := _curve(run, key, against))[0])]
            if not drawn:
                continue
            length = min(len(x) for x, _ in drawn)
            at = np.unique(np.linspace(0, length - 1, MAX_POINTS).round().astype(int))
            x = np.mean([own[at] for own, _ in drawn], axis=0)
            y = np.stack([own[at] for _, own in drawn])
            if len(drawn) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=_colour(place), alpha=0.16, linewidth=0)
            marker = "o" if length == 1 else None
            axes.plot(x, y.mean(0), color=_colour(place), linestyle=_dashes(group), marker=marker, markersize=3.5)
        _score_axis(axes, groups, key, axis="y")
        if against == "bytes":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(_bytes_tick)
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(_X_LABELS[against])

    return _svg(draw, 5.6, 3.3, f"curves-{key}-{against}")


def sorted_scores(groups: Sequence[Group]) -> str:
    """Every client's final score, the worst first, over the share of clients; the worst tenth is shaded."""
    key = score_key(groups)

    def draw(figure: "Figure") -> None:
        axes = _axes(figure)
        axes.axvspan(0, 10, color=SHADE, linewidth=0)
        for place, group in enumerate(groups):
            scores = np.sort(_final_scores(group, key))
            if len(scores) == 0:
                continue
            scores = scores if key == "accuracy" else scores[::-1]
            at = np.unique(np.linspace(0, len(scores) - 1, MAX_POINTS).round().astype(int))
            share = 100 * (np.arange(len(scores)) + 0.5) / len(scores)
            axes.plot(share[at], scores[at], color=_colour(place), linestyle=_dashes(group), drawstyle="steps-mid")
        axes.set_xlim(0, 100)
        axes.set_xlabel("clients, worst first, %  (shaded: the worst decile)")
        _score_axis(axes, groups, key, axis="y")

    return _svg(draw, 5.6, 3.3, "sorted")


def strips(groups: Sequence[Group]) -> str:
    """A row for each method: a dot for each client, a line at the mean, a triangle at the worst decile's mean."""
    key = score_key(groups)

    def draw(figure: "Figure") -> None:
        axes = _axes(figure)
        for place, group in enumerate(groups):
            scores = np.sort(_final_scores(group, key))
            if len(scores) == 0:
                continue
            bad_first = scores if key == "accuracy" else scores[::-1]
            worst = bad_first[: max(1, round(0.1 * len(scores)))].mean()
            dots = scores[np.unique(np.linspace(0, len(scores) - 1, MAX_DOTS).round().astype(int))]
            height = place + 0.3 * _scatter(len(dots))
            colour = _colour(place)
            axes.plot(dots, height, "o", color=colour, alpha=0.35, markersize=3.2, markeredgewidth=0)
            axes.plot([scores.mean()] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
            axes.plot([worst], [place + 0.4], marker="^", color=INK, markersize=5, markeredgewidth=0)
        axes.set_yticks(range(len(groups)), [group.label for group in groups], parse_math=False)
        axes.set_ylim(len(groups) - 0.35, -0.6)
        axes.grid(visible=False, axis="y")
        _score_axis(axes, groups, key, axis="x")

    return _svg(draw, 5.6, max(3.3, 0.75 + 0.36 * len(groups)), "strips")


def routes(run: Run, salt: str) -> str:
    """How the clients' mixtures settle.

    Top left clients (rows) over rounds, in the colour of the heaviest route, the fuller the heavier; top
    right every weight at the end, the same rows. Below, how far routes agree with the true groups and how
    open they are, and how much each route is used at the end.
    """
    marks = [line for line in run.snapshots if line.get("mixture")]
    mixture = np.array([line["mixture"] for line in marks])  # (snapshots, clients, routes)
    _, num_clients, num_routes = mixture.shape
    group = marks[-1].get("group")
    order = _rows(mixture[-1], group)
    upper = min(3.6, max(1.7, 0.055 * num_clients))

    def draw(figure: "Figure") -> None:
        grid = figure.add_gridspec(2, 2, width_ratios=(4.6, 1.2), height_ratios=(upper, 0.72))
        over_rounds, at_end = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        agreement, usage = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        last = int(marks[-1]["round"])
        over_rounds.imshow(
            _settling(mixture[:, order], [int(line["round"]) for line in marks]),
            extent=(0, last, num_clients, 0),
            aspect="auto",
            interpolation="none",
        )
        at_end.imshow(
            _weights(mixture[-1][order]),
            extent=(-0.5, num_routes - 0.5, num_clients, 0),
            aspect="auto",
            interpolation="none",
        )
        for axes in (over_rounds, at_end):
            _group_lines(axes, None if group is None else np.array(group)[order])
            axes.tick_params(labelbottom=False, length=0)
        at_end.tick_params(labelleft=False)
        over_rounds.set_title("heaviest route over rounds")
        at_end.set_title("weights at the end")
        if group is None:
            over_rounds.set_ylabel("clients")
        _agreement(agreement, run, num_routes, last)
        for axes in (agreement, usage):
            _bare(axes)
            axes.set_ylim(0, 1.04)
        final = mixture[-1].mean(0)
        usage.bar(range(num_routes), final, color=[ROUTES[c % len(ROUTES)] for c in range(num_routes)], width=0.8)
        usage.set_xlim(-0.5, num_routes - 0.5)
        usage.set_ylim(0, max(0.05, 1.15 * float(final.max())))
        usage.set_xlabel("share of weight by route")
        usage.set_xticks(range(0, num_routes, 1 if num_routes <= 8 else -(-num_routes // 5)))
        usage.yaxis.tick_right()
        at_end.set_xticks([])

    return _svg(draw, 5.6, upper + 1.55, salt)


def trust(run: Run, salt: str) -> str:
    """Whom the clients trust at the end: a row for each client, a column for each whom it may mix."""
    mark = [line for line in run.snapshots if line.get("mixture")][-1]
    weights, group = np.array(mark["mixture"]), mark.get("group")
    rows = np.argsort(group, kind="stable") if group is not None else np.arange(len(weights))
    columns = rows if weights.shape[0] == weights.shape[1] else np.arange(weights.shape[1])
    shown = weights[rows][:, columns]
    pixels = np.empty((*shown.shape, 4))
    pixels[..., :3] = _rgb()[0]
    pixels[..., 3] = shown.clip(0, 1) / max(float(shown.max()), 1e-30)

    def draw(figure: "Figure") -> None:
        axes = _axes(figure)
        axes.imshow(
            pixels, extent=(0, shown.shape[1], len(shown), 0), aspect="auto", interpolation="none", rasterized=True
        )
        _group_lines(axes, None if group is None else np.array(group)[rows])
        axes.set_xticks([])
        axes.set_xlabel("trusted clients")
        if group is None:
            axes.set_ylabel("clients")

    return _svg(draw, 4.0, 3.6, salt)


def places(run: Run, salt: str) -> str:
    """Where the server saw the adapters: four rounds, a colour for a cluster, a letter for a group."""
    marks = [run.places[at] for at in sorted({round(at) for at in np.linspace(0, len(run.places) - 1, 4)})]

    num_rows = -(-len(marks) // 2)

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(num_rows, 2, squeeze=False).flat
        for axes, mark in zip_longest(panels, marks):
            if mark is None:
                axes.set_axis_off()
                continue
            at, cluster = np.array(mark["places"]), np.array(mark["cluster"])
            group = np.array(mark.get("group", np.zeros(len(at), dtype=int)))
            for colour in np.unique(cluster[cluster >= 0]):  # below: the server has not seen it yet
                for one in np.unique(group):
                    own = (cluster == colour) & (group == one)
                    mark_of = _glyph(_LETTERS[one % len(_LETTERS)]) if "group" in mark else "o"
                    axes.scatter(*at[own].T, color=_colour(int(colour)), marker=mark_of, s=26, linewidths=0.4)
            axes.set_title(f"round {mark['round']}")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)

    return _svg(draw, 5.6, 2.6 * num_rows, salt)


def onboarding(found: Onboarded, salt: str) -> str:
    """How well unseen clients do over the number of their samples, a line for each way, and those that trained."""

    def draw(figure: "Figure") -> None:
        axes = _axes(figure)
        place = {samples: position for position, samples in enumerate(found.samples)}
        for colour, (way, points) in enumerate(found.ways.items()):
            at, means = [place[samples] for samples in points], [point.mean for point in points.values()]
            if len(found.trained.values) > 1:
                low, high = ([pick(point.values) for point in points.values()] for pick in (min, max))
                axes.fill_between(at, low, high, color=_colour(colour), alpha=0.16, linewidth=0)
            axes.plot(at, means, color=_colour(colour), marker="o", markersize=3.5, label=way)
        axes.axhline(found.trained.mean, color=INK, linestyle="--", linewidth=1.1, label="clients that trained")
        axes.set_xticks(range(len(place)), [str(samples) for samples in place])
        axes.set_xlabel("samples of a client that never trained")
        axes.set_ylabel("accuracy, %" if found.metric == "accuracy" else "loss")
        if found.metric != "accuracy":
            _log_scale(axes, "y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=4, frameon=False, fontsize=8)

    return _svg(draw, 5.6, 3.3, salt)


def score_key(groups: Sequence[Group]) -> Key:
    """What the figures show: accuracy where every run has one."""
    scored = [run.scored[-1] for group in groups for run in group.runs if run.scored]
    return "accuracy" if scored and all("accuracy" in line for line in scored) else "loss"


_X_LABELS = {
    "round": "round",
    "bytes": "bytes sent and received, per client",
    "seconds": "seconds of training",
}

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": FAINT,
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def _svg(draw: Callable[["Figure"], None], width: float, height: float, salt: str) -> str:
    """The SVG of what `draw` puts on a figure of so many inches; `salt` keeps its ids apart from the others'."""
    from matplotlib import RcParams, rc_context
    from matplotlib.figure import Figure

    style = RcParams(_STYLE | {"svg.hashsalt": f"umbel-{salt}"})
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # else the text changes with every second
    text = StringIO()
    with rc_context(style):
        figure = Figure(figsize=(width, height))
        draw(figure)
        figure.savefig(text, format="svg", metadata=nothing)
    return _for_page(text.getvalue())


def _for_page(svg: str) -> str:
    """The <svg> element alone: no addresses, the page's colours, and a size that follows the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)  # it would speak of the whole page
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # "axes_1" in every figure; nothing refers to it
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg


def _axes(figure: "Figure") -> "Axes":
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    return axes


def _glyph(letter: str) -> "Path":
    """A letter as a marker, with its middle at the point."""
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    outline = TextPath((0, 0), letter)
    middle = outline.get_extents().get_points().mean(0)
    return outline.transformed(Affine2D().translate(*-middle))


def _bare(axes: "Axes") -> None:
    axes.grid(visible=False, axis="x")
    axes.tick_params(length=0)


def _colour(place: int) -> str:
    return f"#0{place % NUM_COLOURS}0a0b"


def _dashes(group: Group) -> str:
    return "--" if group.oracle else "-"


def _score_axis(axes: "Axes", groups: Sequence[Group], key: Key, axis: Literal["x", "y"]) -> None:
    percent = score_key(groups) == "accuracy"
    label = ("accuracy" if percent else "loss") + (" of the worst decile" if key == "worst_decile" else "")
    (axes.set_ylabel if axis == "y" else axes.set_xlabel)(label + (", %" if percent else ""))
    if not percent:
        _log_scale(axes, axis)


def _log_scale(axes: "Axes", axis: Literal["x", "y"]) -> None:
    from matplotlib.ticker import LogFormatter

    (axes.set_yscale if axis == "y" else axes.set_xscale)("log")
    scale = axes.yaxis if axis == "y" else axes.xaxis
    scale.set_major_formatter(LogFormatter())  # the default one writes TeX
    scale.set_minor_formatter(LogFormatter())


def _curve(run: Run, key: Key, against: Against) -> tuple[np.ndarray, np.ndarray]:
    """What is drawn of a run: (n,) positions and (n,) scores of the evaluated rounds."""
    position = {
        "round": _values(run.history, "round"),
        "bytes": (_values(run.history, "bytes_up") + _values(run.history, "bytes_down")).cumsum(),
        "seconds": _values(run.history, "train_seconds").cumsum(),
    }[against]
    if against == "bytes" and run.num_members:
        position = position / run.num_members
    kept = np.array([key in line for line in run.history], dtype=bool)
    return position[kept], _values(run.scored, key)


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """The lines' figures, NaN for what is missing or infinite; drawing leaves gaps there."""
    values = np.array([line.get(key, np.nan) for line in lines], dtype=float)
    values[~np.isfinite(values)] = np.nan
    return values


def _final_scores(group: Group, key: str) -> np.ndarray:
    """All seeds' clients' finite scores at the end."""
    found = [_finite(run.snapshots[-1][key]) for run in group.runs if run.snapshots and key in run.snapshots[-1]]
    return np.concatenate(found) if found else np.empty(0)


def _finite(scores: Sequence[float]) -> np.ndarray:
    values = np.array(scores, dtype=float)
    kept: np.ndarray = values[np.isfinite(values)]
    return kept


def _scatter(count: int) -> np.ndarray:
    """(count,) heights in [-1, 1] that look random and are always the same: multiples of the golden ratio."""
    heights: np.ndarray = 2 * ((np.arange(count) * 0.6180339887) % 1) - 1
    return heights


def _bytes_tick(value: float, _position: object) -> str:
    from umbel.tables import num_bytes

    return num_bytes(value).replace(".0 ", " ")


def _rows(final: np.ndarray, group: Sequence[int] | None) -> np.ndarray:
    """The clients by true group, then by their heaviest route at the end."""
    keys = [np.arange(len(final)), final.argmax(1)]
    return np.lexsort([*keys, np.array(group)] if group is not None else keys)


def _settling(mixture: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """(clients, columns, 4) pixels: the heaviest route's colour, with its weight as opacity.

    A snapshot fills the rounds since the one before it.
    """
    spans = np.diff([0, *at])
    unit = gcd(*(int(span) for span in spans))
    top = mixture.argmax(2)
    pixels = _pixels(top, np.take_along_axis(mixture, top[..., None], 2)[..., 0], mixture.shape[2])
    return np.repeat(pixels, spans // unit, axis=0).transpose(1, 0, 2)


def _weights(mixture: np.ndarray) -> np.ndarray:
    """(clients, routes, 4) pixels: each route's colour, with its weight as opacity."""
    pixels = np.empty((*mixture.shape, 4))
    pixels[..., :3] = _rgb()[np.arange(mixture.shape[1]) % len(ROUTES)]
    pixels[..., 3] = mixture.clip(0, 1)
    return pixels


def _pixels(route: np.ndarray, weight: np.ndarray, num_routes: int) -> np.ndarray:
    even = 1 / num_routes
    pixels = np.empty((*route.shape, 4))
    pixels[..., :3] = _rgb()[route % len(ROUTES)]
    # The heaviest route of an even mixture weighs 1/C: that is nearly nothing.
    pixels[..., 3] = 0.12 + 0.88 * ((weight - even) / (1 - even) if num_routes > 1 else weight).clip(0, 1)
    return pixels


def _rgb() -> np.ndarray:
    return np.array([[int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for code in ROUTES])


def _group_lines(axes: "Axes", group: np.ndarray | None) -> None:
    """Thin lines between true groups, whose names stand at the left."""
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_yticks([])
    if group is None:
        return
    starts = [0, *(np.flatnonzero(np.diff(group)) + 1), len(group)]
    for start in starts[1:-1]:
        axes.axhline(start, color=INK, linewidth=0.7)
    if len(starts) <= 40:
        middles = [(a + b) / 2 for a, b in pairwise(starts)]
        axes.set_yticks(middles, [f"group {group[start]}" for start in starts[:-1]])


def _agreement(axes: "Axes", run: Run, num_routes: int, last: int) -> None:
    """NMI with the true groups and the entropy's share of its maximum, over rounds."""
    lines = [line for line in run.scored if "entropy_nats" in line]
    at = [line["round"] for line in lines]
    how: dict[str, Any] = {"color": INK, "linewidth": 1.3, "markersize": 3.5, "clip_on": len(at) > 1}
    dot, cross = ("o", "x") if len(at) == 1 else (None, None)  # a line of one point would not be seen
    if num_routes > 1:
        share = [line["entropy_nats"] / np.log(num_routes) for line in lines]
        axes.plot(at, share, linestyle=":", marker=cross, label="entropy / log C", **how)
    if lines and "nmi" in lines[-1]:
        axes.plot(at, [line["nmi"] for line in lines], marker=dot, label="NMI with true groups", **how)
    axes.set_xlim(0, last)
    axes.set_xlabel("round")
    if axes.lines:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 0.96),
            borderaxespad=0.0,
            borderpad=0.1,
            ncols=2,
            frameon=False,
            fontsize=8,
            handlelength=1.8,
            columnspacing=1.4,
        )
