"""Small bases that are pretrained here: from what, that they go on where stopped, and that tasks take them."""

import shutil
from dataclasses import replace
from math import log, sqrt

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import small_texts
from umbel import pretraining, scratch
from umbel.errors import DataError, RunFolderError
from umbel.pretrainable import Settings, Size, Streams, divided, of_texts, tokenizer_of
from umbel.pretraining import main, pretrain
from umbel.scratch import Plan
from umbel.seeds import generator
from umbel.tasks import CIFARViT, Multilingual, texts, unused
from umbel.tasks.bases import load_pretrained
from umbel.tasks.dolly import by_category
from umbel.tasks.flan_feddpa import by_task
from umbel.tasks.glue import sentences
from umbel.tasks.multilingual import LANGUAGES, own_documents
from umbel.tasks.texts import plain
from umbel.tasks.tokens import Tokenizer

CPU = torch.device("cpu")
TINY = Size(16, 1, 2, 300)
SETTINGS = {kind: Settings(kind, TINY, length=16, batch=4) for kind in ("gpt2", "llama", "vit")}
PLAN = Plan(steps=12, rate=1e-2)


@pytest.fixture
def small(tmp_path, tiny_data, monkeypatch):
    """A data folder with small texts, and with the images of noise."""
    folder = tmp_path / "data"
    small_texts.write_texts(folder)
    (folder / "images").symlink_to(tiny_data / "images")
    monkeypatch.setenv("UMBEL_DATA", str(folder))
    return folder


def stop_at(step, monkeypatch):
    """Makes a training save after each step, and stop before this one."""
    monkeypatch.setattr(scratch, "SAVED", 0.0)
    true = scratch._step

    def stopping(work, plan, optimizer, state):
        if state.step == step:
            raise KeyboardInterrupt
        return true(work, plan, optimizer, state)

    monkeypatch.setattr(scratch, "_step", stopping)


# What is learnt from.


def task_documents():
    for language in texts.CAPTION_LANGUAGES:
        yield from own_documents("captions", language)
    for text in ("paragraphs", "verses", "declaration"):
        for language in LANGUAGES[text]:
            yield from own_documents(text, language)
    yield from (*texts.modules(), *texts.articles())
    yield from (document for own in (*texts.news(), *texts.speeches()) for document in own)


def test_no_true_document_of_a_task_is_learnt_from(real_data):
    used = {document.text.strip() for document in task_documents()}
    asked = {prompt.strip() for own in by_category().values() for prompt, _ in own}
    for number in (1, 2):
        asked |= {prompt.strip() for part in by_task(number) for own in part.values() for prompt, _ in own}
    sources = unused.texts()
    assert {text.strip() for own in sources.values() for text in own}.isdisjoint(used | asked)
    asked_of = {plain(one) for part in sentences("qnli") for one in part.first}
    questions = (text for name, own in sources.items() if "questions" in name for text in own)
    lines = {plain(line) for text in questions for line in text.split("\n")}
    assert lines.isdisjoint(asked_of)
    assert len(sources["newsgroups"]) > 19_000
    assert len(sources["declarations"]) == 15
    assert all(sources.values())


def test_captions_that_are_also_a_tasks_are_left_out(small, monkeypatch):
    said = [texts.Document("multi30k", n, text) for n, text in enumerate(("a", "b", "c", "d", "b "))]
    monkeypatch.setitem(unused.READ, "captions", lambda language: said)
    monkeypatch.setattr(unused, "own_documents", lambda text, language: said[1::2] + said[2:3])
    assert unused.texts()["captions_de"] == ("a", "b ")


def test_what_is_held_out_is_not_learnt_from(small):
    kept, held = divided(unused.texts(), 0)
    for name, documents in unused.texts().items():
        assert sorted((*kept[name], *held[name])) == sorted(documents)
        assert len(held[name]) == -(-len(documents) // 100)


def test_a_missing_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    with pytest.raises(DataError, match="newsgroups20"):
        unused.texts()


def test_windows_lie_within_a_source_which_counts_by_the_root_of_its_size():
    small, large = [5] * 100, [7] * 900
    streams = Streams.of([small, large, [9] * 10], least=11, device=CPU)
    x, y = streams.windows(4000, 10, generator(0, "test"))
    assert x.shape == y.shape == (4000, 10)
    assert ((x == x[:, :1]) & (y == x[:, :1])).all()
    assert set(x.flatten().tolist()) == {5, 7}  # the third is too short
    share = sqrt(100) / (sqrt(100) + sqrt(900))
    assert abs((x[:, 0] == 5).float().mean() - share) < 0.03


def test_what_follows_is_the_next_token():
    x, y = Streams.of([range(100)], 5, CPU).windows(50, 4, generator(0, "test"))
    assert torch.equal(y, x + 1)
    assert x.min() >= 0
    assert y.max() <= 99


def test_the_tokenizer_reads_every_text_and_has_an_end_and_padding():
    own = tokenizer_of({"de": ["das Haus, das große Haus"] * 9, "cs": ["dům"] * 9}, 290)
    assert len(own) <= 290
    assert (own.eos_token_id, own.pad_token_id) == (0, 1)
    for text in ("das Haus", "žluťoučký kůň 中文\n\t🙂"):
        assert own.decode(own(text)["input_ids"]) == text
    assert len(own(" Haus")["input_ids"]) == 1


def test_the_rate_rises_then_falls_to_a_tenth():
    plan = Plan(steps=1000, rate=2.0)
    assert plan.rate_at(0, 1000) == 0.02
    assert plan.rate_at(99, 1000) == 2.0
    assert abs(plan.rate_at(1000, 1000) - 0.2) < 1e-9
    assert Plan(rate=2.0).rate_at(50, 0) == 2.0 * 51 / 100  # while it is not known how many there are


# Stopping and going on.


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_training_that_was_stopped_gives_the_same_weights(kind, small, tmp_path, monkeypatch):
    whole = pretrain(SETTINGS[kind], PLAN, tmp_path / "whole", CPU, quiet=True)
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(SETTINGS[kind], PLAN, tmp_path / "parts", CPU, quiet=True)
    state = pretrain(SETTINGS[kind], PLAN, tmp_path / "parts", CPU, quiet=True)
    assert (state.step, state.best, state.since) == (12, whole.best, 7)
    for name in ("model.safetensors", "training/checkpoints/000012.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    lines = [(tmp_path / run / "training" / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_a_finished_training_is_left_as_it_is(small, tmp_path, monkeypatch):
    once = pretrain(SETTINGS["vit"], PLAN, tmp_path / "out", CPU, quiet=True)
    monkeypatch.setattr(pretraining, "of_images", None)
    again = pretrain(SETTINGS["vit"], PLAN, tmp_path / "out", CPU, quiet=True)
    assert (again.step, again.best) == (once.step, once.best)


def test_a_model_is_not_written_over(small, tmp_path):
    pretrain(SETTINGS["vit"], replace(PLAN, steps=1), tmp_path / "out", CPU, quiet=True)
    shutil.rmtree(tmp_path / "out" / "training")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match="has a model and no training"):
        pretrain(SETTINGS["vit"], replace(PLAN, steps=1), tmp_path / "out", CPU, quiet=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_other_options_in_the_same_folder_are_refused(small, tmp_path):
    pretrain(SETTINGS["vit"], replace(PLAN, steps=1), tmp_path / "out", CPU, quiet=True)
    with pytest.raises(RunFolderError, match="--out"):
        pretrain(SETTINGS["vit"], replace(PLAN, steps=2), tmp_path / "out", CPU, quiet=True)


def test_minutes_decide_how_many_steps_there_are(small, tmp_path):
    state = pretrain(SETTINGS["vit"], Plan(minutes=1e-4), tmp_path / "out", CPU, quiet=True)
    assert state.step == state.total >= 31  # thirty steps are needed to tell
    assert state.best < float("inf")


# What comes of it.


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tasks_take_a_language_model_that_has_learnt(kind, small, tmp_path):
    state = pretrain(SETTINGS[kind], replace(PLAN, steps=60), tmp_path / "out", CPU, quiet=True)
    base = str(tmp_path / "out")
    assert state.best < log(len(AutoTokenizer.from_pretrained(base)))
    task = Multilingual(base=base, length=16, tokens_per_client=64, public_windows=6).load(0)
    assert task.model(task.public).shape == (6, 16, len(AutoTokenizer.from_pretrained(base)))
    assert Tokenizer(base).end == [0]
    assert load_pretrained(base, "text", num_labels=2).pad_id == 1


def test_the_best_weights_are_those_in_the_folder(small, tmp_path):
    state = pretrain(SETTINGS["gpt2"], PLAN, tmp_path / "out", CPU, quiet=True)
    model = load_pretrained(str(tmp_path / "out"), "causal_lm")
    subject = of_texts(SETTINGS["gpt2"], tmp_path / "out", CPU)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in subject.held]
    assert abs(float(torch.stack(losses).mean()) - state.best) < 1e-5


def test_a_task_takes_a_vision_transformer(small, tmp_path):
    pretrain(SETTINGS["vit"], PLAN, tmp_path / "out", CPU, quiet=True)
    task = CIFARViT(str(tmp_path / "out"), num_holders=2).load(0)
    assert task.num_labels == 110
    assert not (tmp_path / "out" / ".aside").exists()


def test_the_command_writes_to_the_users_cache_and_tells_where(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretraining, "VIT", TINY)
    assert main(["vit", "--steps", "2", "--batch", "4", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    folder = tmp_path / "cache" / "umbel" / "models" / "vit"
    assert (folder / "config.json").is_file()
    assert str(folder) in told.out
    assert "step 2 of 2" in told.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_any_work(tmp_path, capsys):
    assert main(["vit", "--steps", "2", "--device", "cuda", "--out", str(tmp_path / "out")]) == 1
    assert "--device cuda, but PyTorch sees no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    assert main(["gpt2", "--steps", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "newsgroups20" in capsys.readouterr().err
    for wrong in (["gpt3"], ["gpt2", "--steps", "0"], ["gpt2", "--minutes", "nan"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "--minutes" in capsys.readouterr().err
