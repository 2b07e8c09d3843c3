"""docs/theory.md and docs/theory.svg from the figures in benchmarks/results/theory.json.

python benchmarks/theory_page.py
"""

import re
from io import StringIO
from math import nan
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = dict[str, Any]

INK, FAINT = "#333333", "#bbbbbb"
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def number(stated: Table, digits: int = 3) -> str:
    """Mean ± standard error; the mean alone where every problem gave the same."""
    mean, error = f"{stated['mean']:.{digits}f}".replace("-", "−"), stated["error"]
    if error < 1e-6:
        return mean
    return f"{mean} ± {f'{error:.{digits}f}' if error >= 0.5 * 10**-digits else power(error)}"


def power(value: float) -> str:
    """One digit and a power of ten."""
    return f"{value:.0e}".replace("e-0", "e-")


def near(stated: Table, wanted: float, by: float) -> bool:
    return abs(float(stated["mean"]) - wanted) <= by


def claim(letter: str, title: str, says: str, measured: str, outcome: str, why: str) -> list[str]:
    """One claim's section."""
    parts = {"The paper": says, "Measured": measured, "Why": why}
    lines = [f"## ({letter}) {title}: {outcome}", ""]
    for name, text in parts.items():
        lines += [*wrapped(f"**{name}:** {text}"), ""]
    return lines


def wrapped(text: str) -> list[str]:
    return wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def verdict(holds: bool) -> str:
    return "holds" if holds else "fails"


def convergence(figures: Table) -> list[str]:
    """Claims (a) to (d)."""
    a, b, c, d = (
        figures[key] for key in ("a_variance", "b_no_noise", "c_falling_mismatch", "d_constant_mismatch")
    )
    low, high = a["constant_range"]
    slopes = ", ".join(f"{number(own['slope'])} (β = {beta})" for beta, own in c["beta"].items())
    over = ", ".join(f"{own['error_over_bound'][-1]['mean']:.0f}" for own in c["beta"].values())
    faster = all(near(own["slope"], -(1 + float(beta)), 0.1) for beta, own in c["beta"].items())
    gone = near(d["uniform_over_floor"][-1], 0, 0.1) and near(d["router_4_over_floor"][-1], 0, 0.1)
    router, last, longest = d["router_4_over_floor"], d["steps"][-1], c["steps"][-1]
    rise = " / ".join(f"{row['mean']:.2f}" for row in router)
    levels = " / ".join(f"{row['mean']:.3f}" for row in d["error_over_closed_form"])
    return [
        *claim(
            "a",
            "Noise is averaged over a cluster",
            "Theorem 4.5, first term: σ² ‖p_c‖² / (μT), and ‖p_c‖² = 1/K_c for equal clients.",
            f"slope {number(a['slope_in_clients'])} of log error over log K_c (2 to {a['clients_per_cluster'][-1]}) and "
            f"{number(a['slope_in_steps'])} over log T ({a['steps'][0]} to {a['steps'][-1]}); error · K_c μT / σ² = "
            f"{number(a['constant'])}, from {low:.2f} at the shortest T to {high:.2f} at the longest. "
            "Theorem B.10 allows 12.",
            verdict(near(a["slope_in_clients"], -1, 0.06) and a["constant_range"][1] < 12),
            "with right routes a cluster is plain local SGD over its K_c clients. Here the constant tends to 3/5, "
            "that of an average with weights t² over steps 1/t, and s = 15 makes it smaller at first.",
        ),
        *claim(
            "b",
            "Without noise and mismatch the error falls as T⁻²",
            "Theorem 4.5, last term: O(G² κ H² / (μ T²)).",
            f"slope {number(b['slope'])} for T = {b['steps'][0]} to {b['steps'][-1]:,}.",
            verdict(near(b["slope"], -2, 0.05)),
            "what is left is the start, forgotten as 1/T in the model and so as 1/T² in the error.",
        ),
        *claim(
            "c",
            "A mismatch that falls with β costs T^−(1+β)",
            "Theorem 4.5, middle term: if ‖δ_t‖₁² ≤ (t + s)^−β ‖δ_0‖₁², it adds O(G² ‖δ_0‖₁² / (μ T^(1+β))).",
            f"slope {slopes}: that of T^−β. At T = {longest:,} the error is {over} times Theorem B.10's explicit bound "
            "(‖δ_0‖₁ = 1, the run's own G²).",
            verdict(faster),
            "the proof takes every client's gradient as unbiased for f_c; another cluster's client pulls towards "
            "another optimum, which is a bias of size ‖δ_t‖₁ and not a variance that steps of 1/t average away.",
        ),
        *claim(
            "d",
            "A mismatch that stays does no harm in the end",
            "Theorem B.9: nothing is asked of δ_t; with the router (4), π^k_c ∝ exp(−η_t f^k(w_c)), mismatch adds "
            "32 G² log(KC) / (μT).",
            f"uniform routes: error {number(d['uniform_over_floor'][0], 4)} of ½ ‖mean − w*_c‖² at T = {d['steps'][0]} "
            f"and {number(d['uniform_over_floor'][-1], 4)} at T = {last:,}. The router (4), started *at the optimum* and "
            f"with steps as small as the theorem wants, climbs there: {rise} of that floor at T = "
            f"{' / '.join(f'{t:,}' for t in d['steps'])}, at the end {d['router_4_over_theorem_term']['mean']:.0f} times "
            "the theorem's term.",
            verdict(gone),
            "η_t → 0 makes the router (4) uniform, and uniform routes find the mean of all optima. umbel's em router "
            "has a temperature relative to how far the losses are apart, so this does not happen to it.",
        ),
        *wrapped(
            "The dependence on the mismatch itself is as the theorem has it, quadratic: with constant ‖δ‖₁ = "
            f"{' / '.join(str(m) for m in d['mismatch'])} the error at T = {last:,} is {levels} of the closed form "
            f"⅛ ‖δ‖₁² ‖w*_1 − w*_2‖², slope {number(d['slope_in_mismatch'])}. It is T that does not help."
        ),
        "",
    ]


def weights(figures: Table) -> list[str]:
    """Claims (e) and (f)."""
    e, f = figures["e_uniform_start"], figures["f_lemma"]
    exact = " / ".join(f"{own['mismatch']:.2f}" for own in e["balanced"].values())
    claimed = " / ".join(f"{own['claimed']:.2f}" for own in e["balanced"].values())
    factor = max(own["mismatch"] / own["claimed"] for own in e["balanced"].values())
    return [
        *claim(
            "e",
            "Uniform routes start with ‖δ_0‖₁ ≤ 1 − U_c",
            "Remark B.11.",
            f"‖δ_0‖₁ = {exact} for {' / '.join(e['balanced'])} equal clusters, where 1 − U_c = {claimed}. Over "
            f"{e['random_clusters']:,} clusters of random mixtures the largest quotient is {e['largest_ratio']:.2f}.",
            f"{verdict(factor <= 1.001)} by a factor of {factor:.0f}",
            "1 − U_c bounds what the clients with too little weight lack; those with too much have as much again. "
            "2 (1 − U_c) is right, and reached.",
        ),
        *claim(
            "f",
            "Lemma B.6 bounds the mismatch",
            "‖δ_t‖₁² ≤ … + 4 log KC.",
            f"4 log KC is {f['bound_two_clients_two_clusters']:.1f} for two clients in two clusters and "
            f"{f['bound_synthetic_linear']:.1f} for synthetic_linear. The largest ‖δ‖₁² there can be is "
            f"{f['largest_possible']:.0f}, the largest of all training runs in (h) was {f['largest_in_training']:.1f}.",
            "holds, and says nothing" if f["bound_two_clients_two_clusters"] > f["largest_possible"] else "holds",
            "two distributions are never further apart than 2 in ‖·‖₁, which is less than the lemma grants from KC = 3 on.",
        ),
    ]


def training(figures: Table) -> list[str]:
    """Claims (g) and (h)."""
    g, h = figures["g_aggregates"], figures["h_learned"]
    good = near(g["base_slope_in_clients"], -1, 0.05) and near(g["adapter_slope_in_groups"], 1, 0.05)
    routers, rounds = h["routers"], h["rounds"][-1]
    em, annealed, paper = (routers[name] for name in ("em", "gradient, noise annealed", "gradient, as published"))
    learned = em["last"]["mean"] < 0.01
    searched = results.read("results/table1_searched.json")["cells"]
    [on_mnist] = (
        method["runs"]
        for cell in searched
        if cell["recipe"] == "table1/mnist_r_5"
        for method in cell["methods"]
        if method["label"] == "floral-searched"
    )
    mnist = [run["figures"]["mismatch"] for run in on_mnist]
    from_round = [first for first in em["below_one_percent_from_round"] if first is not None]
    return [
        *claim(
            "g",
            "Sharing the base averages its noise over everybody",
            "Eq. 32: the variance of the base's aggregate goes as 1/K, that of the adapters' as C/K.",
            "variance of what `FLoRAL.server_update` moves over that of one client, one local step, fixed right "
            f"routes: base · K = {number(g['base_times_clients'])}, adapters · K/C = "
            f"{number(g['adapter_times_clients_over_groups'])} (C = 4). Slopes over log K: base "
            f"{number(g['base_slope_in_clients'])}, adapters {number(g['adapter_slope_in_clients'])}; over log C (K = 32): "
            f"base {number(g['base_slope_in_groups'])}, adapters {number(g['adapter_slope_in_groups'])}.",
            verdict(good),
            "every client adds to the base's mean, only a cluster's own K/C clients to its adapter's.",
        ),
        *claim(
            "h",
            "Learned routes make the mismatch vanish",
            "the assumption of Theorem 4.5. Logged: Σ_c ‖p̂(·|c) − p(·|c)‖₁ / C under the best naming of the groups, "
            f"with the weights that umbel's server aggregated with, on synthetic_linear, {h['seeds']} seeds, from 1 at the "
            "start (uniform routes).",
            f"after {rounds} rounds {power(em['last']['mean'])} with the em router (below 1 % for good from round "
            f"{' / '.join(map(str, from_round))}); {number(annealed['last'], 2)} with the paper's gradient router and its noise "
            f"annealed, slope over the last half {number(annealed['slope_in_last_half'], 2)}; {number(paper['last'], 2)} with "
            f"the noise as published, slope {number(paper['slope_in_last_half'], 2)}. On the way the em router's rose to "
            f"{max(em['highest']):.1f} in the worst seed, above uniform routes. Population MSE at the end: {power(em['loss']['mean'])}, "
            f"{power(annealed['loss']['mean'])} and {power(paper['loss']['mean'])}.",
            f"{verdict(learned)} for the em router on this task, not for the gradient router",
            "training mixes weights, so soft routes can fit as exactly as one-hot ones: as the loss goes so does the "
            "router's gradient, and the routes freeze while the error falls on. The published noise keeps them moving, slowly. "
            "On MNIST-R with ten images a client and adapters of 1 % the em router's mismatch does not vanish either: "
            f"{' / '.join(f'{one:.2f}' for one in mnist)} by seed at the end (`results/table1_searched.json`).",
        ),
    ]


def page(document: Table) -> str:
    """The whole of docs/theory.md."""
    figures = document["figures"]
    lines = [
        "# The theory, checked",
        "",
        "Which claims of Almansoori, Horváth, Takáč 2025 (arXiv 2410.03497, §4, App. B and C) hold in numbers. Made by",
        "`python benchmarks/theory_page.py` from `benchmarks/results/theory.json`; mean ± standard error.",
        "",
        "(a) to (d): quadratics f^k = ½ ‖w − w*_c(k)‖² (μ = L = 1, d = 10, C = 2), the algorithm that the paper analyses:",
        "H = 5 local steps with η_t = 1/(t + s), s = 15, aggregation by p̂(k|c), averaging weights (t + s)². T counts",
        "local steps, δ_t = |p̂_t(·|c) − p(·|c)|, ten random problems. One Hessian for all: nothing here tests client drift.",
        "",
        "![Error over clients per cluster; error over steps for falling mismatch; floors; mismatch over rounds](theory.svg)",
        "",
        *convergence(figures),
        *weights(figures),
        *training(figures),
        results.made(document),
        "",
    ]
    return "\n".join(lines)


def plot(figures: Table) -> str:
    """An SVG with four panels: (a), (c), (d) and (h)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "umbel", "font.size": 8, "axes.titlesize": 8.5}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "text.color": INK}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        _draw(figure, figures)
        text = StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"<\?xml.*?<svg", "<svg", text.getvalue(), flags=re.S)
    svg = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", svg)  # a hundredth of a point will do
    return "".join(f"{line.strip()}\n" for line in svg.splitlines())


def _draw(figure: "Figure", figures: Table) -> None:
    (by_clients, by_steps), (floors, over_rounds) = figure.subplots(2, 2)
    a, c, d, h = (figures[key] for key in ("a_variance", "c_falling_mismatch", "d_constant_mismatch", "h_learned"))
    counts, last = a["clients_per_cluster"], a["steps"][-1]
    means, errors = ([row[key] for row in a["error_at_last"]] for key in ("mean", "error"))
    by_clients.errorbar(counts, means, errors, fmt="o", color=COLOURS[0], markersize=4, label="measured")
    by_clients.plot(counts, [0.6 * 10 / (k * last) for k in counts], color=FAINT, label="0.6 σ² / (K_c μT)")
    by_clients.set(
        title=f"(a) noise, right routes, T = {last:,}", xlabel="clients per cluster K_c", ylabel="error"
    )
    by_clients.set_xticks(counts, [str(k) for k in counts])

    for colour, (beta, own) in zip(COLOURS, c["beta"].items(), strict=True):
        by_steps.plot(
            c["steps"],
            [row["mean"] for row in own["error"]],
            "o-",
            color=colour,
            markersize=4,
            label=f"β = {beta}",
        )
        by_steps.plot(c["steps"], [row["mean"] for row in own["bound"]], ":", color=colour)
    by_steps.plot([nan], [nan], ":", color=INK, label="Theorem B.10")
    by_steps.set(title="(c) mismatch that falls as T^(−β/2)", xlabel="steps T", ylabel="error")

    for colour, key, label in (
        (COLOURS[0], "uniform_over_floor", "uniform routes"),
        (COLOURS[1], "router_4_over_floor", "router (4), from the optimum"),
    ):
        floors.plot(d["steps"], [row["mean"] for row in d[key]], "o-", color=colour, markersize=4, label=label)
    floors.set(title="(d) mismatch that stays", xlabel="steps T", ylabel="error / ½‖mean − w*_c‖²")
    floors.set_ylim(0, 1.15)

    for colour, (router, own) in zip(COLOURS, h["routers"].items(), strict=True):
        over_rounds.plot(h["rounds"], own["curve"], color=colour, label=router)
        over_rounds.fill_between(h["rounds"], own["lowest"], own["highest"], color=colour, alpha=0.15, linewidth=0)
    over_rounds.set(title="(h) mismatch of learned routes", xlabel="round", ylabel="mean ‖p̂ − p‖₁")
    over_rounds.set_ylim(1e-5, 3)

    for axes in (by_clients, by_steps, floors, over_rounds):
        axes.set_xscale("log", base=2 if axes is by_clients else 10)
        if axes is not floors:
            axes.set_yscale("log")
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7)
    by_clients.set_xticks(counts, [str(k) for k in counts])


def main() -> None:
    document = results.read("benchmarks/results/theory.json")
    (results.ROOT / "docs/theory.md").write_text(page(document))
    (results.ROOT / "docs/theory.svg").write_text(plot(document["figures"]))


if __name__ == "__main__":
    main()
