"""What the README shows is run."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readmes_own_task_runs_and_every_client_gets_a_good_model():
    names = {}
    exec(BLOCKS[0], names)
    assert names["result"].figures["accuracy"] > 80, "two groups that disagree: one model for all could get 50"
    assert names["result"].figures["loss"] < 1
    with torch.no_grad():
        x, y = names["clients"][7]
        assert (names["personal"](x).argmax(1) == y).float().mean() > 0.8


def test_the_readmes_pretrained_model_is_tuned_and_exported(tmp_path, tiny_data_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = str(tiny_data_folder / "models" / "stories260K")
    for k in range(40):
        Path(f"site-{k}.txt").write_text(f"{'abcd'[k % 4]}{k:03d}" * 200)
    block = BLOCKS[1].replace('"gpt2"', repr(base)).replace("129, 128", "17, 16")
    block = block.replace("rounds=20", "rounds=1").replace("steps=25", "steps=2")
    exec(block, {})
    assert sorted(path.name for path in Path("adapters").iterdir()) == sorted(f"site-{k}" for k in range(40))
    assert (Path("adapters") / "site-7" / "adapter_config.json").exists()


def test_the_readme_names_files_that_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / path).exists(), path
