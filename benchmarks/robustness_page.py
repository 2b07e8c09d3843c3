"""docs/robustness.md from the figures in benchmarks/results/: of chaos, sign flips and attacks.

python benchmarks/robustness_page.py
"""

from collections import Counter
from statistics import fmean
from typing import Any

import numpy as np

import results
from umbel.attacks import attackers
from umbel.hazards import Attack

FOLDER = "benchmarks/results"
FAULTS = """\
## Faults

    [faults]
    drop_out = 0.3      # of a round's clients, never start
    straggle = 0.1      # of the others, come after the deadline
    corrupt = 0.05      # of the uploads in time, are damaged on the way
    quorum = 0.5        # of the clients chosen; with fewer the server stays as it was

All rates are 0 by default, and then nothing changes by a bit. What happens to a client in a round is a function of
(seed, round, client), so neither chunks nor resumption change it.

| what | does the client train? | what it keeps | the server |
|---|---|---|---|
| missing | no | what it had | does not hear of it |
| late | yes | what it has trained | leaves the upload out |
| damaged on the way | yes | what it has trained | leaves it out where it notices |
| its own work is not finite | yes | what it had | leaves it out |

A node does not know what became of its upload, so it keeps what it has trained: its router, its personal model, AdamW's
moments. With the next round's message it goes on from the server's state as always.

The server notices what was cut short ("malformed"), what holds NaN or infinity ("not finite"), and, by holding a round's
uploads until all are in, what has a group of model tensors ten times (`outlier`) as long as the round's median ("outlier").
A flipped bit that makes a number a little larger is not noticed and does as little harm. What was left out is counted by
reason in `metrics.jsonl` (`lost`), in the table at the end of a run and in the report; bytes count what was sent.

A round without a quorum is over, not repeated: its time is up, and the next one draws other clients. The server's state
stays as it was, to the bit; clients that trained keep what they trained. Such rounds have `no_quorum` in their figures.
A round in which everyone's own work is not finite is still an error: the rate is too high.
"""
ROBUST = """\
## Robust means

    [robust]
    rule = "geometric_median"    # median, trimmed_mean, krum, multi_krum, norm_bound
    hostile = 0.25               # the share of weight that may be hostile: what is trimmed, Krum's f
    heaviest = 4.0               # a client counts at most so many times as much as the round's median client

A rule takes the place of the weighted mean in every method that has one: FedAvg and what is built on it, FLoRAL, Ensemble,
FedEM, IFCA, FedIT, FedSA, FFA, FedDPA. It works on one group of tensors at a time: the base, and each adapter (component,
cluster) by itself, with the mean's own weights n_k and n_k π_kc as sample weights. So nobody hides in an adapter that few
use. By the same token no rule helps where attackers hold half of one adapter's weight, however few they are among all clients.

The other methods refuse and say why: trust (every client has a mean of its own), FL-TAC and threshold clustering (they
cluster single uploads), FlexLoRA and FLoRAL with `averaging` other than "factor" (products are averaged), with ranks that
differ or a router for each layer, and Local.

- **Claims are bounded too.** Examples, routes and what the em router's sums are made of steer the other clients' routes. With any
  rule on, they are made positive and cut to `heaviest` times the median client's, and nobody has more examples routed to all
  adapters together than it has examples. Honest clients with more data than that count less.
- All uploads of a round are held until the last is in. There is no secure aggregation: single uploads are looked at.
- Soft routes are learned from small differences between adapters, which medians even out: routes take longer to form.
- `median` and `trimmed_mean` are of each number (Yin et al. 2018), `geometric_median` is RFA (Pillutla et al. 2019),
  `krum` and `multi_krum` are Blanchard et al. 2017 with weights for neighbours, `norm_bound` is Sun et al. 2019 without noise,
  its bound relative to the round's median step. `tests/test_robust.py` pins each by its breakdown point.
"""
ASYNCHRONOUS = """\
## Without a deadline

    clients_per_round = 30       # train at the same time; 0: all
    [asynchronous]
    buffer = 10                  # uploads make a step, which is what a round is here
    power = 0.5                  # what began s steps ago counts (1 + s)^-power
    spread = 1.0                 # the standard deviation of the logarithm of how long a client takes

FedBuff (Nguyen et al. 2022): a client that is done makes room for another; what it made counts as a step from where the server is
now, x ← x + Σ n_k (1 + s_k)^−p (x_k − x received) / Σ n_k. Who is done when is drawn by the seed, so nothing depends on what is
trained. For the same methods as robust means; the others refuse. Rounds have `clock`, in units of a typical client's work, and
`staleness`, the mean s, in their figures. With `buffer` as large as the number of clients it is the synchronous run, to the bit.
It does not go with `[faults]` yet. What clients are at work on is in no checkpoint: a run that was stopped is made again from
its start, to the same bits.
"""
ATTACKS = """\
## Attacks

    [attack]
    kind = "sign_flip"    # scale, gaussian, label_flip, backdoor, claim_all
    share = 0.2           # of the clients that train
    strength = 5.0

Attackers are drawn once by the seed, are sampled, routed and weighed as everyone else, and **are not evaluated: all figures are
means over honest clients**. A backdoor's attackers put a bright patch in a corner of half of their pictures and call them 0; where there
are adapters they send their steps, times the strength, in their heaviest adapter alone and the rest as received. Its success
is the share of honest clients' other test pictures that are called 0 once they have the patch. `claim_all` flips signs and claims all
examples, times the strength, for every adapter. The tables are `benchmarks/attacks.py`'s;
`umbel compare attacks` is a longer run of one attack, on FLoRAL.
"""


def chaos_lines(document: dict[str, Any]) -> list[str]:
    figures = document["figures"]
    rates = ", ".join(f"{key} {value:.0%}" for key, value in figures["faults"].items())
    lines = [
        f"Digits (label shift), {figures['rounds']} rounds of five local epochs, which FL-TAC and trust need to tell clients apart (the recipe",
        f"`faults` has one); accuracy in % at the end, by seed: without faults; with {figures['heard']} of the 40 clients drawn for each round,",
        f"which is as many as are heard on average with faults; and with {rates}. Trust's gain is its second seed, which fails without faults:",
        "",
        "| method | without | drawn | with | difference of the means | lost uploads |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in figures["methods"].items():
        clean, drawn, hurt = ([row[key] for row in rows] for key in ("clean", "drawn", "faults"))
        lost: dict[str, int] = {}
        for row in rows:
            for reason, count in row["lost"].items():
                lost[reason] = lost.get(reason, 0) + count
        said = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
        both = (" / ".join(f"{value:.1f}" for value in values) for values in (clean, drawn, hurt))
        lines.append(
            f"| {method} | {' | '.join(both)} | {fmean(hurt) - fmean(clean):+.1f} | {said} |".replace("+-", "−")
        )
    return [*lines, "", results.made(document), ""]


def flip_lines(document: dict[str, Any]) -> list[str]:
    figures = document["figures"]
    rules = list(figures["rules"])
    lines = [
        f"FLoRAL on digits as in its recipe, {figures['rounds']} rounds, 20 % of the clients flip their steps five times over (rules reckon",
        f"with {figures['rules']['multi_krum']['hostile']:.0%} of the weight where they ask):",
        "",
        "| seed (hostile in each group of ten) | no attack (all 40 train, the same 32 are tested) | plain mean | "
        + " | ".join(rules)
        + " |",
        "|---" * (3 + len(rules)) + "|",
    ]
    for row in figures["seeds"]:
        cells = [said([row[key]]) for key in ("clean", "plain", *rules)]
        hostile = np.bincount(attackers(Attack("sign_flip"), row["seed"], np.arange(40)) % 4, minlength=4)
        lines.append(f"| {row['seed']} ({', '.join(map(str, hostile))}) | " + " | ".join(cells) + " |")
    clean = fmean(row["clean"]["accuracy"] for row in figures["seeds"])
    lines += ["", "Of the mean accuracy without attack is left:"]
    for rule in rules:
        kept = [row[rule]["accuracy"] for row in figures["seeds"] if "failed" not in row[rule]]
        seeds = (
            "all seeds" if len(kept) == len(figures["seeds"]) else f"the {len(kept)} seeds that did not diverge"
        )
        lines.append(
            f"{rule} {fmean(kept) / clean:.1%} in the mean of {seeds}, {min(kept) / clean:.1%} on the worst;"
        )
    lines[-1] = lines[-1].replace(";", ".")
    return [
        *lines,
        "Only FLoRAL was run so long. After 40 rounds, below, whole models stand more: with the geometric median the Ensemble and IFCA have 84",
        "under the same attack and FLoRAL 56, under `gaussian` 91 and 63, for FLoRAL's clients share a base, which every attacker reaches.",
        "Half of a group's clients are half of its adapter's weight, which is where Krum's promise ends and a geometric median",
        "stands still; the damage of one group goes on through the shared base.",
        "",
        results.made(document),
        "",
    ]


def attack_lines(document: dict[str, Any]) -> list[str]:
    """A table for each rule: methods down, attacks across, every cell the mean over seeds."""
    figures = document["figures"]
    whole = len(figures["methods"]) * len(figures["attacks"]) * len(figures["rules"])
    counts = Counter(cell["seed"] for cell in figures["cells"])
    done = [seed for seed in figures["seeds"] if counts[seed] == whole]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in figures["cells"]:
        if cell["seed"] in done:
            found.setdefault((cell["rule"], cell["method"], cell["attack"]), []).append(cell)
    attacks = [
        "no attack" if name == "none" else f"{name} ×{strength:g}" for name, strength in figures["attacks"].items()
    ]
    local, stars = figures["local"], len(done) > 1
    lines = [
        f"Accuracy in % of the honest clients after {figures['rounds']} rounds on digits (label shift), "
        f"{'seed' if len(done) == 1 else 'mean of seeds'} {', '.join(map(str, done))}; {figures['share']:.0%} of the clients",
        f"are hostile; rate {local['lr']}, batches of {local['batch_size']}; rules that reckon with a hostile share are given "
        f"{figures['rules']['krum']['hostile']:.0%} of the weight. In brackets how often a backdoor's patch",
        "is obeyed. "
        + (
            "A number that stands for fewer seeds, for the others diverged, has a star for each of them. "
            if stars
            else ""
        )
        + "So few rounds are not enough for anyone's best: a row is to be compared with",
        "its own first column, and "
        + ("" if stars else "on one seed ")
        + "twenty points from it say little: under `gaussian` the plain mean of the ensemble is as much above it. Left out: FedBN,",
        "which is FedAvg on a model without norm layers; FedIT and FedDPA, which need a pretrained base.",
        "",
    ]
    for rule in figures["rules"]:
        rows = []
        for method in figures["methods"]:
            cells = [found.get((rule, method, attack), []) for attack in figures["attacks"]]
            if any("accuracy" in cell for cell in cells[0]):
                rows.append(f"| {method} | " + " | ".join(said(cell) for cell in cells) + " |")
        title = "The plain mean, or whatever else the method does" if rule == "none" else f"`{rule}`"
        lines += [f"**{title}**", "", f"| | {' | '.join(attacks)} |", "|---" * (len(attacks) + 1) + "|", *rows, ""]
    return [*lines, results.made(document), ""]


def said(cells: list[dict[str, Any]]) -> str:
    """One cell of a table: the mean of the seeds that came to their end."""
    ended = [cell for cell in cells if "accuracy" in cell]
    diverged = sum(cell.get("failed") == "diverged" for cell in cells)
    if not ended:
        return "diverged" if diverged else "–"
    success = [cell["attack_success"] for cell in ended if "attack_success" in cell]
    obeyed = f" ({fmean(success):.0f})" if success else ""
    return f"{fmean(cell['accuracy'] for cell in ended):.1f}{'*' * diverged}{obeyed}"


def main() -> None:
    lines = [
        "# Faults, attacks, robust means",
        "",
        "Made by `python benchmarks/robustness_page.py` from the figures in `benchmarks/results/`.",
        "",
        FAULTS,
        *chaos_lines(results.read(f"{FOLDER}/chaos.json")),
        ROBUST,
        *flip_lines(results.read(f"{FOLDER}/sign_flip.json")),
        ATTACKS,
        *attack_lines(results.read(f"{FOLDER}/attacks.json")),
        ASYNCHRONOUS,
    ]
    (results.ROOT / "docs/robustness.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
