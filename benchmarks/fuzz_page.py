"""The figures of the fuzzing in SECURITY.md, from benchmarks/results.

python benchmarks/fuzz_page.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "SECURITY.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def stored(name: str) -> dict[str, Any]:
    """A document of benchmarks/results."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def row(name: str) -> str:
    """A line of the table."""
    document = stored(name)
    figures = document["figures"]
    slowest, largest = figures["slowest"], figures["largest"]
    how = "guided by atheris" if figures["guided_by_atheris"] else "malformed" if name == "malformed" else "blind"
    refused = ", ".join(f"{number:,} {error}" for error, number in figures["refused_by"].items())
    return (
        f"| `{document['command']}` | {figures['seconds'] / 60:.0f} min, {how} | {figures['inputs']:,} | {figures['taken']:,} "
        f"| {refused} | {len(figures['findings'])} | {slowest['seconds']:.2f} s ({slowest['target']}) "
        f"| {largest['bytes'] / 1e6:.0f} MB ({largest['target']}, {largest['bytes_of_input']:,} bytes) | {document['umbel_commit']} |"
    )


def main() -> None:
    limits = stored("fuzz")["figures"]["limits"]
    lines = [
        "| command | | inputs | taken | refused | findings | slowest | most memory | commit |",
        "|---|---|---|---|---|---|---|---|---|",
        row("fuzz"),
        row("malformed"),
        "",
        f"Limits: {limits['seconds']:g} s of processor time, {limits['bytes'] >> 20} MiB + {limits['times_input']} times the input's "
        f"length of resident memory, {limits['address_room'] >> 20} MiB of addresses. {stored('fuzz')['machine']}.",
    ]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
