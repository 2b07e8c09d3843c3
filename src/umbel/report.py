"""The report: run folders → one HTML file that needs nothing else, on a light page or a dark one."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from umbel import plots
from umbel.errors import RunFolderError
from umbel.folder import write
from umbel.tables import (
    Group,
    Onboarded,
    Run,
    best,
    columns,
    cost_columns,
    dropped,
    find_runs,
    grouped,
    losses,
    num_bytes,
    onboarded,
    said_of,
    seconds,
    spread,
    total,
    written,
)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """The HTML file `out` about these run folders, or folders of runs; the same runs give the same file.

    Raises:
        RunFolderError: a folder is neither, no round is done yet, some runs have accuracies and others losses
            only, or `out` cannot be written.
    """
    runs = find_runs(folders)
    if not any(run.scored for run in runs):
        raise RunFolderError(
            f"there is nothing to report yet: no evaluated round in {', '.join(map(str, folders))} (with "
            "[privacy] across machines scores stay with the nodes, in their scores.jsonl)"
        )
    rated = {"accuracy" in run.scored[-1]: run.path for run in runs if run.scored}
    if len(rated) > 1:
        raise RunFolderError(
            f"{rated[True]} has accuracies and {rated[False]} has losses only, and no axis has both; "
            "report them apart"
        )
    if not out.absolute().parent.is_dir():
        raise RunFolderError(f"{out} cannot be written: there is no folder {out.absolute().parent}")
    write(out, page(grouped(runs)).encode())
    return out


def page(groups: Sequence[Group]) -> str:
    """The groups' report as an HTML document."""
    title = escape(" · ".join(dict.fromkeys(_task(run) for group in groups for run in group.runs)))
    body = "\n".join(_sections(groups))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} – umbel</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p class=brand>umbel</p><h1>{title}</h1>\n<p>{_about(groups)}</p></header>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(groups: Sequence[Group]) -> Iterator[str]:
    legend = _legend(groups)
    score = plots.score_key(groups)
    what = score.capitalize()
    seeds = (
        " A line is the mean over seeds, its band reaches from the lowest to the highest seed."
        if any(len(group.runs) > 1 for group in groups)
        else ""
    )
    yield _section("Summary", _summary(groups), _notes(groups))
    yield _section(
        f"{what} over rounds",
        legend,
        _row(plots.curves(groups, score, "round"), plots.curves(groups, "worst_decile", "round")),
        _caption(
            "Each client's own model on its own test examples. Left: the mean over clients, right: the mean over "
            f"the worst tenth of them.{seeds}"
        ),
    )
    if any(run.snapshots for group in groups for run in group.runs):
        yield _section(
            "The spread over clients at the end",
            legend,
            _row(plots.strips(groups), plots.sorted_scores(groups)),
            _caption(
                "Every client of every seed. Left: a dot is a client, the line the mean over clients, the "
                "triangle the mean over the worst tenth of them. Right: the same clients in order."
            ),
        )
    mixed = [group for group in groups if any(_mixes(run) for run in group.runs)]
    trusting = [group for group in mixed if any(_trusts(run) for run in group.runs)]
    mixed = [group for group in mixed if group not in trusting]
    routed = [group for group in mixed if not group.oracle] or mixed  # an oracle's routes never change
    if routed:
        yield _section(
            "How routes settle",
            '<div class="row">',
            *(_routes(group, place) for place, group in enumerate(routed)),
            "</div>",
            _caption(
                "Each row is a client, with the same place left and right"
                + ("; lines part the true groups, which only oracles know" if _knows_groups(routed) else "")
                + ". Left: the colour is the route that the client weighs most after that round, its strength the "
                "weight (faint: undecided). Right: all weights after the last round. Colours are the routes' "
                "numbers and mean nothing across methods."
            ),
        )
    if trusting:
        yield _section(
            "Who trusts whom",
            '<div class="row">',
            *(_trust(group, place) for place, group in enumerate(trusting)),
            "</div>",
            _caption(
                "Each row is a client and each column a client whose adapter it mixes"
                + (", both by true groups, which only oracles know" if _knows_groups(trusting) else "")
                + ". The stronger, the more it weighs after the last round; full strength is the figure's highest "
                "weight. Inside and outside: the mean weight of another client of one's group and beyond."
            ),
        )
    placed = [group for group in groups if any(run.places for run in group.runs)]
    if placed:
        yield _section(
            "Adapters as the server saw them",
            '<div class="row">',
            *(_places(group, place) for place, group in enumerate(placed)),
            "</div>",
            _caption(
                "Each mark is a client's adapter, in the plane of the two principal components of that round's "
                "features, or of UMAP; its colour is the cluster"
                + (", its letter the true group, which only oracles know" if _knows_groups(placed) else "")
                + ". Planes of different rounds have different axes."
            ),
        )
    unseen = [(group, found) for group in groups if (found := onboarded(group)) is not None]
    if unseen:
        yield _section(
            "Clients that never trained",
            '<div class="row">',
            *(_onboarding(group, found, place) for place, (group, found) in enumerate(unseen)),
            "</div>",
            _caption(
                "Clients that were held out of training, given so many samples of their own. Routes: they learn "
                "their mixture alone, adapters untouched. Fine-tune: all tensors of the global model are trained. "
                "Global: the model of a client that nobody knows. Dashed: the clients that trained, with all of "
                "their samples."
            ),
        )
    yield _section(
        "What it costs",
        _costs(groups),
        legend,
        _row(plots.curves(groups, score, "bytes"), plots.curves(groups, score, "seconds")),
        _caption(
            f"{what} against the bytes that a client has sent and received so far, and against the seconds of "
            "training so far, without evaluation. Seconds are of this machine and way of stacking. In the table "
            "all is of one client in one round, but for what the server holds between rounds and the time of all "
            "the training. It trains so many parameters, of models, adapters and router; arithmetic is "
            "that of products and convolutions, forward and backward. What clients do to be served (fine-tuning, "
            "a memory of examples, routes of who never trained) is not among it."
        ),
        _travels(groups),
    )
    yield _section("Runs and recipes", _runs_table(groups), *(_recipe(group) for group in groups))


def _summary(groups: Sequence[Group]) -> str:
    shown = columns(groups)
    lost = any(dropped(run.history) for group in groups for run in group.runs)
    tops = {column.key: best(groups, column) for column in shown}
    titles = [column.title + (", %" if column.unit == "%" else "") for column in shown]
    rows = []
    for place, group in enumerate(groups):
        cells = "".join(
            f"<td{' class=best' if group.label in tops[column.key] else ''}>"
            f"{escape(written(spread(group, column.key), column.unit))}</td>"
            for column in shown
        )
        if lost:
            cells += f"<td>{sum(dropped(run.history) for run in group.runs)}</td>"
        bound = " <small>reference</small>" if group.oracle else ""
        name = f"<th scope=row>{_swatch(place, group)}{escape(group.label)}{bound}</th>"
        rows.append(f"<tr>{name}<td>{len(group.runs)}</td>{cells}</tr>")
    return _table("summary", ["method", "runs", *titles, *(["dropped"] if lost else [])], rows)


def _costs(groups: Sequence[Group]) -> str:
    shown = cost_columns(groups)
    rows = []
    for place, group in enumerate(groups):
        cells = (escape(written(spread(group, column.key), column.unit)) for column in shown)
        name = f"<th scope=row>{_swatch(place, group)}{escape(group.label)}</th>"
        rows.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return _table("summary", ["method", *(column.title for column in shown)], rows)


def _travels(groups: Sequence[Group]) -> str:
    """Which tensors travel: what a client sends and receives in a round, by group."""
    rows = []
    for group in groups:
        for way, title in (("up", "sent"), ("down", "received")):
            for name, size in group.runs[0].travels.get(way, {}).items():
                cells = (group.label, title, name, num_bytes(size))
                rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    if not rows:
        return ""
    table = _table("runs", ("method", "by a client", "tensors", "in the first round"), rows)
    return f"<details><summary>Which tensors travel</summary>{table}</details>"


def _onboarding(group: Group, found: Onboarded, place: int) -> str:
    facts = [f"{found.num_clients} unseen clients"]
    if not found.settles:
        facts.append("nothing to learn but by fine-tuning")
    figure = plots.onboarding(found, f"onboarding-{place}")
    return f"<figure><h3>{escape(group.label)} <small>{'; '.join(facts)}</small></h3>{figure}</figure>"


def _notes(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    notes = []
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Mean ± sample standard deviation over runs.")
    notes.append("The worst decile is the mean over the worst tenth of the clients.")
    if any(column.key == "nmi" for column in columns(groups)):
        notes.append("NMI: how far routes agree with the clients' true groups (1: fully).")
    spent = {run.history[-1]["delta"] for run in runs if run.history and "delta" in run.history[-1]}
    if spent:
        notes.append(
            f"ε is what the clients' training has told of one client or example, at δ = "
            f"{', '.join(f'{delta:g}' for delta in sorted(spent))}; the figures of this page are outside it."
        )
    if any(run.schedule.get("validation") for run in runs):
        notes.append("Runs with validation above 0 are tested on training examples.")
    notes.append("The best mean of each column is marked.")
    if any(group.oracle for group in groups):
        notes.append("Oracles know the true groups: references, which are not marked.")
    text = _caption(" ".join(notes))
    unfinished = [run for run in runs if len(run.history) < run.rounds]
    if unfinished:
        names = ", ".join(
            f"{escape(str(run.path))} ({len(run.history)} of {run.rounds} rounds)" for run in unfinished
        )
        text += f"<p class=warning>Not finished, so the figures are not those of whole runs: {names}.</p>"
    lost = losses(line for run in runs for line in run.history)
    if lost:
        text += f"<p class=warning>Updates of clients that did not count: {escape(said_of(lost))}.</p>"
    idle = sum("no_quorum" in line for run in runs for line in run.history)
    if idle:
        text += f"<p class=warning>{idle} rounds had too few updates and left the server as it was.</p>"
    return text


def _routes(group: Group, place: int) -> str:
    run = next(run for run in group.runs if _mixes(run))
    figure = plots.routes(run, f"routes-{place}")
    last = run.scored[-1]
    facts = [f"seed {run.seed}"]
    others = [f"{own.scored[-1]['nmi']:.2f}" for own in group.runs if own is not run and _knows_nmi(own)]
    if _knows_nmi(run):
        facts.append(f"NMI {last['nmi']:.2f}" + (f" (other seeds {', '.join(others)})" if others else ""))
    if last.get("dead"):
        facts.append(f"{last['dead']} of {len(run.snapshots[-1]['mixture'][0])} routes unused")
    return f"<figure><h3>{escape(group.label)} <small>{'; '.join(facts)}</small></h3>{figure}</figure>"


def _trust(group: Group, place: int) -> str:
    run = next(run for run in group.runs if _mixes(run))
    names = {"self_trust": "itself", "trust_inside": "inside", "trust_outside": "outside"}
    facts = [f"seed {run.seed}"]
    facts += [f"{said} {run.scored[-1][key]:.3f}" for key, said in names.items() if key in run.scored[-1]]
    figure = plots.trust(run, f"trust-{place}")
    return f"<figure><h3>{escape(group.label)} <small>{'; '.join(facts)}</small></h3>{figure}</figure>"


def _places(group: Group, place: int) -> str:
    run = next(run for run in group.runs if run.places)
    facts = [f"seed {run.seed}"]
    if "cluster_accuracy" in run.scored[-1]:
        facts.append(f"at the end {100 * run.scored[-1]['cluster_accuracy']:.0f} % in their group's cluster")
    figure = plots.places(run, f"places-{place}")
    return f"<figure><h3>{escape(group.label)} <small>{'; '.join(facts)}</small></h3>{figure}</figure>"


def _runs_table(groups: Sequence[Group]) -> str:
    heads = (
        "method",
        "seed",
        "rounds",
        "sent",
        "received",
        "training",
        "folder",
        "started",
        "umbel",
        "torch",
        "machine",
    )
    rows = []
    for group in groups:
        for run in group.runs:
            facts = run.facts
            cells = [
                group.label,
                str(run.seed),
                f"{len(run.history)} of {run.rounds}",
                num_bytes(total(run.history, "bytes_up")),
                num_bytes(total(run.history, "bytes_down")),
                seconds(total(run.history, "train_seconds")),
                str(run.path),
                *(str(facts.get(key) or "–") for key in ("started", "umbel_commit", "torch")),
                f"{facts.get('machine', '–')}; {_device(run)}",
            ]
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    table = _table("runs", heads, rows)
    return f"<details><summary>Runs, machines and versions</summary>{table}</details>"


def _recipe(group: Group) -> str:
    run = group.runs[0]
    file = run.path / "recipe.toml"
    text = file.read_text(encoding="utf-8") if file.is_file() else "started from Python, without a recipe"
    seeds = ", ".join(str(own.seed) for own in group.runs)
    what = f"<code>{escape(group.label)}</code> <small>as of seed {run.seed}; seeds {seeds} ran</small>"
    return f"<details><summary>{what}</summary><pre>{escape(text)}</pre></details>"


def _about(groups: Sequence[Group]) -> str:
    """The runs in one sentence."""
    runs = [run for group in groups for run in group.runs]
    parts = [
        _count(len(groups), "method"),
        _count(len({run.seed for run in runs}), "seed"),
        _range([run.rounds for run in runs], "round"),
        _range([run.num_clients for run in runs if run.num_clients], "client"),
    ]
    return ", ".join(filter(None, parts)) + "."


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _range(counts: Sequence[int], what: str) -> str:
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return _count(low, what) if low == high else f"{low:,} to {_count(high, what)}"


def _task(run: Run) -> str:
    task = run.recipe.get("task", {})
    return str(run.facts.get("task") or (task.get("name") if isinstance(task, dict) else None) or "runs")


def _device(run: Run) -> str:
    engine: Any = run.facts.get("engine")
    return str(engine.get("device", "–")) if isinstance(engine, dict) else "–"


def _mixes(run: Run) -> bool:
    return any(line.get("mixture") for line in run.snapshots)


def _trusts(run: Run) -> bool:
    """Whether what is mixed are the other clients themselves."""
    return bool(run.scored) and "self_trust" in run.scored[-1]


def _knows_nmi(run: Run) -> bool:
    return bool(run.scored) and "nmi" in run.scored[-1]


def _knows_groups(groups: Sequence[Group]) -> bool:
    runs = [run for group in groups for run in group.runs]
    return any("group" in line for run in runs for line in (*run.snapshots[-1:], *run.places[-1:]))


def _legend(groups: Sequence[Group]) -> str:
    entries = [f"<span>{_swatch(place, group)}{escape(group.label)}</span>" for place, group in enumerate(groups)]
    return f"<p class=legend>{''.join(entries)}</p>"


def _swatch(place: int, group: Group) -> str:
    dashed = " dashed" if group.oracle else ""
    return f'<i class="swatch{dashed}" style="--c:var(--s{place % plots.NUM_COLOURS})"></i>'


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _row(*figures: str) -> str:
    return '<div class="row">' + "".join(f"<figure>{figure}</figure>" for figure in figures) + "</div>"


def _table(kind: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f"<div class=scroll><table class={kind}><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _caption(text: str) -> str:
    return f"<p class=caption>{text}</p>"


# Series: Okabe and Ito's colours, which colour-blind readers can tell apart, darker or lighter to stand out.
_CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1d1f; --soft: #62626a;
  --faint: #b9b9c0; --shade: #ececef; --mark: #e4f0fa;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b5568c;
  --s4: #c98a00; --s5: #3fa7dd; --s6: #5b4b9a; --s7: #77777f; }
@media (prefers-color-scheme: dark) { :root { --page: #131316; --card: #1c1c21; --ink: #ececf0; --soft: #a0a0aa;
  --faint: #5b5b66; --shade: #2a2a31; --mark: #17364d;
  --s0: #56a8e0; --s1: #f5894a; --s2: #2cc79b; --s3: #df8fbd;
  --s4: #eab73f; --s5: #8fd3f7; --s6: #a596e8; --s7: #a5a5ad; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
header p { margin: 0; color: var(--soft); }
.brand { letter-spacing: .12em; font-size: 13px; text-transform: uppercase; }
h1 { font-size: 30px; line-height: 1.2; margin: 2px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 0 0 6px; }
small { color: var(--soft); font-weight: normal; font-size: 12.5px; }
section { background: var(--card); border-radius: 12px; padding: 20px 24px; margin-top: 18px;
  box-shadow: 0 1px 3px rgb(0 0 0 / .09); }
.caption { color: var(--soft); font-size: 13px; margin: 10px 0 0; max-width: 92ch; }
.warning { border-left: 3px solid var(--s1); padding-left: 10px; margin: 10px 0 0; font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.summary { width: 100%; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--faint); }
tbody tr + tr > * { border-top: 1px solid var(--shade); }
tbody th { font-weight: 500; }
.best { font-weight: 700; background: var(--mark); }
.runs { font-size: 12.5px; margin: 8px 0; } .runs th, .runs td { text-align: left; padding: 4px 10px; }
.legend { margin: 0 0 8px; display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13.5px; }
.scroll + .legend { margin-top: 16px; }
.swatch { display: inline-block; width: 20px; height: 0; border-top: 3px solid var(--c); vertical-align: middle;
  margin-right: 8px; } .swatch.dashed { border-top-style: dashed; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 20px 28px; }
figure { margin: 0; min-width: 0; max-width: 640px; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
details { margin-top: 8px; } summary { cursor: pointer; }
pre { font-size: 12.5px; line-height: 1.45; overflow-x: auto; background: var(--page); padding: 12px;
  border-radius: 8px; }
@media print { section { break-inside: avoid; box-shadow: none; } }
"""
