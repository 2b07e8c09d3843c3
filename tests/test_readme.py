"""What the README shows is run."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readmes_own_task_runs_and_every_client_gets_a_good_model():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(block, names)
    assert names["result"].figures["accuracy"] > 80, "two groups that disagree: one model for all could get 50"
    assert names["result"].figures["loss"] < 1
    with torch.no_grad():
        x, y = names["clients"][7]
        assert (names["personal"](x).argmax(1) == y).float().mean() > 0.8


def test_the_readme_names_files_that_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / path).exists(), path
