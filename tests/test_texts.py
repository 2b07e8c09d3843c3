"""Tasks on texts and images for pretrained bases: who has which documents, and what counts."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from pyarrow import Table, parquet
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import small_texts
from small_texts import END, LETTERS, PAD, XQUAD
from umbel.adapters import AdapterPlan, mix, with_paths
from umbel.attacks import Attack
from umbel.cli.watch import Watch
from umbel.errors import DataError, ModelError, RecipeError, RunFolderError
from umbel.flower.fingerprint import differences, fingerprint
from umbel.methods import FedAvg, FedEM, KNNPer, Population, Trust
from umbel.model import pretrained as pretrained_module
from umbel.model.dropout import seed_dropout
from umbel.model.loss import IGNORED, Loss, cross_entropy
from umbel.model.pretrained import of_transformers
from umbel.model.stacked import stackable
from umbel.runs import resume, run
from umbel.schedule import Schedule
from umbel.seeds import seeded
from umbel.tasks import (
    GLUE,
    AGNews,
    CIFARViT,
    CodeVsProse,
    Dolly,
    FlanFedDPA,
    Multilingual,
    ShakespeareRoles,
    dolly,
    flan_feddpa,
    glue,
    texts,
)
from umbel.tasks import vectors as vectors_module
from umbel.tasks.bases import load_pretrained
from umbel.tasks.cifar import DEVIATION, MEAN
from umbel.tasks.cifar_vit import divided
from umbel.tasks.glue import Sentences, _split, sentences
from umbel.tasks.language import Reader, Windows
from umbel.tasks.slots import Holders, held
from umbel.tasks.task import task_of
from umbel.tasks.texts import Document
from umbel.tasks.texts import plain as plainly
from umbel.tasks.tokens import Tokenizer
from umbel.tasks.vectors import vectors
from umbel.train import LocalTraining

SMALL = {"length": 16, "tokens_per_client": 640, "public_windows": 10}
LANGUAGE = {  # each with its categories' letters
    "captions": (Multilingual(**SMALL), "dfc"),
    "captions_mixed": (Multilingual(**SMALL, heterogeneity="mixed"), "dfc"),
    "one": (Multilingual(**SMALL, languages=("fr",)), "f"),
    "two_mixed": (Multilingual(**SMALL, heterogeneity="mixed", languages=("en", "fr")), "ef"),
    "paragraphs": (Multilingual(**SMALL, text="paragraphs", languages=("es", "zh"), clients_per_language=2), "el"),
    "verses": (Multilingual(**SMALL, text="verses", languages=("de", "fr")), "df"),
    "declaration": (
        Multilingual(**SMALL, text="declaration", languages=("it", "de"), clients_per_language=2),
        "gb",
    ),
    "code": (CodeVsProse(**SMALL, clients_per_kind=2), "pw"),
    "code_mixed": (CodeVsProse(**SMALL, clients_per_kind=2, heterogeneity="mixed"), "pw"),
    "news": (AGNews(**SMALL), "wsbt"),
    "news_mixed": (AGNews(**SMALL, heterogeneity="mixed"), "wsbt"),
    "roles": (ShakespeareRoles(**SMALL, num_clients=3), "abc"),
}
every_language_task = pytest.mark.parametrize("name", LANGUAGE)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    small_texts.write_texts(folder)
    small_texts.write_base(folder / "models" / "stories260K")
    return folder


@pytest.fixture
def small(text_folder, monkeypatch):
    """Makes the texts of letters those that tasks read, and every task's default base one of them."""
    monkeypatch.setenv("UMBEL_DATA", str(text_folder))
    return text_folder


def said(ids):
    """What the ids say, with "|" at ends."""
    return small_texts.tokenizer().decode(ids.flatten(), skip_special_tokens=False).replace("<end>", "|")


def marks(ids):
    """Which documents the windows are of, as (letter, number); a window may begin within a mark."""
    return {mark for row in ids for mark in re.findall(r"[a-z]\d{4}", said(row))}


def letters(ids):
    """(windows,) the letter of each window's category."""
    return ["".join(sorted(set(re.findall(r"[a-z]", said(row).replace("<pad>", ""))))) for row in ids]


# Language modelling.


@every_language_task
def test_a_window_is_followed_by_its_next_token_and_none_is_there_twice(name, small):
    task = LANGUAGE[name][0].load(0)
    for examples in (task.train, task.test):
        assert examples.x.shape[1] == 16
        assert torch.equal(examples.x[:, 1:], examples.y[:, :-1])
    for client in range(task.num_clients):
        x, y = task.train.of_client(client)
        joined = y[:-1, -1] == x[1:, 0]
        assert joined.float().mean() > 0.9  # windows of one category follow each other


@every_language_task
def test_no_document_that_is_tested_or_public_is_trained_on(name, small):
    task = LANGUAGE[name][0].load(0)
    train, test, public = marks(task.train.x), marks(task.test.x), marks(task.public)
    if name[:4] in ("capt", "two_", "para", "vers", "decl"):  # translations have the same number
        train, test, public = ({mark[1:] for mark in part} for part in (train, test, public))
    if name.startswith("para"):  # and those of one article belong together
        train, test, public = ({int(mark) // 5 for mark in part} for part in (train, test, public))
    if name in ("verses", "declaration"):  # as those of one fiftieth do, of which every second one is left out
        train, test, public = ({int(mark) // 6 for mark in part} for part in (train, test, public))
        assert all(part % 2 for part in train | test | public)
    assert train
    assert test
    assert public
    assert train.isdisjoint(test)
    assert public.isdisjoint(train | test)


def test_a_file_without_the_language_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    table = Table.from_pylist([{"code": "deu", "text": "Jeder\nhat"}])
    parquet.write_table(table, tmp_path / "text" / "udhr.parquet")
    assert [one.text for one in texts.declaration("de")] == ["Jeder", "hat"]
    with pytest.raises(DataError, match=r"udhr\.parquet .* has nothing in 'it'"):
        texts.declaration("it")


def test_a_text_that_two_categories_have_is_not_trained_on_where_it_is_tested(small):
    reader, windows = Reader(Tokenizer("models/stories260K")), Windows(16, 0, 0.5, 0)
    of = [[Document(kind, n, small_texts.document("x", n)) for n in range(12)] for kind in ("one", "two")]
    found = windows.divided(of, np.eye(2, dtype=np.int64), reader, 0)
    train, test = (
        [{document.text for document in own[at]} for at, own in enumerate(part)]
        for part in (found.train, found.test)
    )
    assert [len(own) for own in test] == [6, 6]
    assert train[0] | train[1] | test[0] | test[1] == {document.text for document in of[0]}
    for own in train:
        assert own.isdisjoint(test[0] | test[1])


@every_language_task
def test_clients_have_the_categories_they_should_have(name, small):
    recipe, categories = LANGUAGE[name]
    task = recipe.load(0)
    mixed, paired = name.endswith("mixed"), name.startswith(("news", "code"))
    for client in range(task.num_clients):
        main = client % len(categories)
        other = main ^ 1 if paired else (main + 1) % len(categories)
        if task.group is not None:
            assert task.group[client] == main
        for examples in (task.train, task.test):
            found = letters(examples.of_client(client)[0])
            count = {letter: found.count(letter) for letter in sorted(set(found))}
            if not mixed:
                assert count == {categories[main]: len(found)}
            else:
                assert count == {categories[main]: len(found) // 4 * 3, categories[other]: len(found) // 4}


@every_language_task
def test_no_client_has_more_tokens_than_it_may(name, small):
    recipe = LANGUAGE[name][0]
    task = recipe.load(0)
    assert task.train.count.max() <= 40  # windows of 16 tokens of 640
    assert task.test.count.max() <= 10  # a fifth of all is for testing
    if name != "roles":
        assert task.train.count.min() == 40
    everything = type(recipe)(**vars(recipe) | {"tokens_per_client": 0}).load(0)
    assert everything.train.count.sum() > task.train.count.sum()


@every_language_task
def test_every_category_is_in_the_public_windows(name, small):
    recipe, categories = LANGUAGE[name]
    found = letters(recipe.load(0).public)
    assert len(found) == 10
    counts = [found.count(letter) for letter in categories]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == 10
    assert type(recipe)(**vars(recipe) | {"public_windows": 0}).load(0).public is None


@every_language_task
def test_the_seed_decides_which_documents_are_whose(name, small):
    recipe = LANGUAGE[name][0]
    one, again, other = (recipe.load(seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.x, again.train.x)
    assert torch.equal(one.test.x, again.test.x)
    assert torch.equal(one.public, again.public)
    assert marks(one.test.x) != marks(other.test.x)


@pytest.mark.parametrize("name", ["two_mixed", "code_mixed", "news_mixed"])
def test_four_windows_are_enough_for_a_mixture(name, small):
    recipe = LANGUAGE[name][0]
    task = type(recipe)(**vars(recipe) | {"tokens_per_client": 64, "public_windows": 4}).load(0)
    assert set(task.train.count) == set(task.test.count) == {4}


def test_news_can_be_classified(small):
    task = AGNews(task="classification", heterogeneity="mixed", length=32, public_windows=6).load(0)
    assert task.loss == "cross_entropy"
    assert task.model.kind == "text"
    assert task.public.shape == (6, 32)
    for client in range(8):
        x, y = task.train.of_client(client)
        counts = y.bincount(minlength=4).tolist()
        main = client % 4
        assert counts[main] == 3 * counts[main ^ 1] == len(y) * 3 // 4
        assert letters(x) == ["wsbt"[label] for label in y]
    assert marks(task.train.x).isdisjoint(marks(task.test.x) | marks(task.public))


def test_too_few_news_are_told_with_the_settings_to_change(small):
    recipe = AGNews(task="classification", clients_per_class=150, length=32, public_windows=6)
    with pytest.raises(RecipeError, match=r"client \d+ .*train.*clients_per_class.*test_fraction"):
        AGNews(**vars(recipe) | {"heterogeneity": "mixed"}).load(0)
    with pytest.raises(RecipeError, match=r"client \d+ .*for test.*clients_per_class"):
        AGNews(**vars(recipe) | {"clients_per_class": 60}).load(0)


def test_too_little_text_is_told(small):
    with pytest.raises(RecipeError, match="client 0 has too little text"):
        Multilingual(clients_per_language=400).load(0)
    with pytest.raises(RecipeError, match="public_windows"):
        CodeVsProse(public_windows=5000, length=64).load(0)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (lambda: Multilingual(languages=("de", "xx")), "xx.*languages are cs, de, en, fr"),
        (lambda: Multilingual(languages=("de",), heterogeneity="mixed"), "languages"),
        (lambda: Multilingual(languages=("de", "de")), "once each"),
        (lambda: Multilingual(languages=()), "one at least"),
        (lambda: Multilingual(clients_per_language=0), "clients_per_language"),
        (lambda: CodeVsProse(length=1), "length"),
        (lambda: CodeVsProse(clients_per_kind=0), "clients_per_kind"),
        (lambda: AGNews(tokens_per_client=100), "tokens_per_client"),
        (lambda: AGNews(clients_per_class=0), "clients_per_class"),
        (lambda: ShakespeareRoles(test_fraction=1.0), "test_fraction"),
        (lambda: ShakespeareRoles(public_windows=-1), "public_windows"),
        (lambda: ShakespeareRoles(num_clients=0), "num_clients"),
        (lambda: GLUE(tasks=()), "tasks"),
        (lambda: GLUE(alpha=0), "alpha"),
        (lambda: GLUE(length=3), "length"),
        (lambda: GLUE(train_examples=-1), "train_examples"),
        (lambda: GLUE(embedded=True, bits=4), "bits"),
        (lambda: GLUE(embedded=True, pooling="pairs"), "pooling"),
        (lambda: AGNews(pooling="mean"), "pooling is of a classifier"),
        (lambda: Dolly(num_holders=0), "num_holders"),
        (lambda: Dolly(least_examples=0), "least_examples"),
        (lambda: Dolly(categories=("open_qa", "open_qa")), "categories"),
        (lambda: Dolly(test_examples=-1), "test_examples"),
        (lambda: Dolly(train_examples=-1), "train_examples"),
        (lambda: Dolly(test_fraction=0.0), "test_fraction"),
        (lambda: Dolly(length=2), "length"),
        (lambda: FlanFedDPA(length=2), "length"),
        (lambda: CIFARViT(num_groups=11), "num_groups"),
        (lambda: CIFARViT(num_clients=7), "num_clients"),
        (lambda: CIFARViT(train_examples=-1), "train_examples"),
    ],
)
def test_settings_that_make_no_task_are_refused_by_name(recipe, told):
    with pytest.raises(RecipeError, match=told):
        recipe()


def test_a_base_without_a_tokenizer_is_told(small, tmp_path):
    small_texts.write_vit(tmp_path / "vit")
    with pytest.raises(DataError, match=r"no tokenizer can be read from .*vit"):
        Tokenizer(str(tmp_path / "vit"))
    with pytest.raises(DataError, match=r"'nowhere': no such folder here, .*\(UMBEL_DATA\).* no tokenizer"):
        Tokenizer("nowhere")


# Slots.


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_examples", [9, 60, 408, 3000])
def test_every_example_of_a_task_is_dealt_once_and_no_slot_is_tiny(seed, num_examples):
    dealt = Holders(10, 0.5, 8, 0).dealt(num_examples, seed, 0)
    assert len(dealt) == 10
    assert sorted(np.concatenate(dealt).tolist()) == list(range(num_examples))
    sizes = np.array([len(own) for own in dealt])
    assert ((sizes == 0) | (sizes >= 8)).all()
    assert ((sizes == 0) | (sizes >= 0.01 * num_examples - 1)).all()


@pytest.mark.parametrize(("num_holders", "alpha"), [(150, 100.0), (150, 0.5), (1000, 1e4), (2000, 0.01)])
def test_many_holders_share_every_example_of_a_task(num_holders, alpha):
    dealt = Holders(num_holders, alpha, 1, 0).dealt(10_000, 0, 0)
    assert len(dealt) == num_holders
    assert sorted(np.concatenate(dealt).tolist()) == list(range(10_000))
    if alpha >= 100:
        assert min(len(own) for own in dealt) > 0


@pytest.mark.parametrize("seed", range(5))
def test_examples_that_share_a_key_or_are_linked_are_held_together(seed):
    keys = [(f"a{n // 2}", f"b{(n + 1) // 2}" if n % 10 else f"c{n}") for n in range(200)]  # ten in a chain
    keys += [(f"d{n}",) for n in range(100)]
    rows = held(keys, ["x"] * 100 + ["y"] * 200, 0.2, seed, "test")
    assert len(set(rows)) == len(rows)
    assert sum(row < 100 for row in rows) == 20
    assert sum(row >= 100 for row in rows) == 40
    mine = {key for row in rows for key in keys[row]}
    assert mine.isdisjoint(key for row in set(range(300)).difference(rows) for key in keys[row])
    assert rows != held(keys, ["x"] * 100 + ["y"] * 200, 0.2, seed + 1, "test")


def test_shares_are_more_even_the_higher_alpha():
    sizes = [[len(own) for own in Holders(10, alpha, 1, 0).dealt(10_000, 0, 0)] for alpha in (0.1, 100.0)]
    assert np.std(sizes[0]) > 5 * np.std(sizes[1])


def test_too_few_examples_for_a_slot_are_told():
    with pytest.raises(RecipeError, match="least_examples"):
        Holders(10, 0.5, 8, 0).dealt(7, 0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_slots_of_glue_are_of_their_task_and_holder(seed, small):
    task = GLUE(length=24, test_examples=10, num_holders=4).load(seed)
    assert len(task.owner) == len(task.group) == task.num_clients
    assert len(set(zip(task.owner.tolist(), task.group.tolist(), strict=True))) == task.num_clients
    assert task.group.unique().tolist() == [0, 1, 2, 3, 4]
    assert task.train.count.min() >= 8
    tested = {}
    for slot in range(task.num_clients):
        of = int(task.group[slot])
        name = ("sst2", "mrpc", "rte", "cola", "qnli")[of]
        assert {said(row)[0] for row in task.train.of_client(slot)[0]} == {name[0]}
        x, y = task.test.of_client(slot)
        assert len(y) == 10
        assert torch.equal(tested.setdefault(of, x), x)  # the same for all slots of a task
    for of, count in enumerate((120, 120, 120, 120, 48)):  # of QNLI four fifths of 60
        assert task.train.count[task.group.numpy() == of].sum() == count


def test_glue_trains_on_nothing_that_it_tests_on_and_on_all_else(small):
    task = GLUE(length=24, test_examples=0, num_holders=3).load(0)
    train, test = ({said(row) for row in part.x} for part in (task.train, task.test))
    assert train.isdisjoint(test)
    assert len(train) + len(test) == 4 * 180 + 60
    fewer = GLUE(tasks=("rte", "sst2"), length=24, train_examples=50, num_holders=3).load(0)
    assert fewer.train.count.sum() == 100


def test_a_sentence_of_glues_test_is_known_in_other_capitals_too(monkeypatch):
    parts = (
        Sentences(["A b.", "c", "d"], ["e", "The  End", "f"], [0, 1, 0]),
        Sentences(["a  B."], ["the end"], [1]),
    )
    monkeypatch.setattr(glue, "sentences", lambda name: parts)
    train, test = glue._split("rte", 0)
    assert (train.first, train.second, test.first) == (["d"], ["f"], ["a  B."])


@pytest.mark.parametrize("seed", range(3))
def test_no_question_and_no_sentence_of_qnlis_test_is_trained_on(seed, small):
    task = GLUE(tasks=("qnli",), length=24, test_examples=0, num_holders=2).load(seed)
    train, test = (
        [said(row).replace("<pad>", "").split("\n") for row in part.x] for part in (task.train, task.test)
    )
    assert len(train) == 48
    for column in (0, 1):
        assert {pair[column] for pair in train}.isdisjoint(pair[column] for pair in test)


def test_labels_of_two_tasks_of_glue_do_not_meet(small):
    task = GLUE(tasks=("rte", "sst2"), length=24, num_holders=2).load(0)
    assert task.num_labels == 4
    for part in (task.train, task.test):
        for slot in range(part.num_clients):
            name = 2 * int(task.group[slot])
            assert set(part.of_client(slot)[1].tolist()) <= {name, name + 1}
    assert task.model(task.train.x[:2]).shape == (2, 4)


def test_pairs_are_joined_and_padding_is_the_bases_own(small):
    task = GLUE(tasks=("rte", "sst2"), length=24, num_holders=2).load(0)
    assert task.model.pad_id == PAD
    rows = [said(row) for row in task.train.x]
    assert all(re.fullmatch(r"(rtrain(\d+)\nttrain\2|strain\d+)(<pad>)+", row) for row in rows)
    labelled = zip(rows, (task.train.y % 2).tolist(), strict=True)
    assert all(int(re.search(r"train(\d+)", row)[1]) % 2 == label for row, label in labelled)


def test_padding_changes_no_answer(small):
    task = GLUE(tasks=("rte",), length=24, num_holders=2).load(0)
    x = task.train.x[:4]
    wider = torch.cat([x, torch.full((4, 8), PAD)], 1)
    with torch.no_grad():
        assert torch.allclose(task.model(x), task.model(wider), atol=1e-6)


@pytest.fixture
def bert(tmp_path):
    """A tokenizer like BERT's, in a folder with a config that says so."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "dog"]
    own = BertTokenizer(vocab={word: at for at, word in enumerate(words)})
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return own


def small_bert(pooling="own", **settings):
    shape = {
        "vocab_size": settings.pop("vocab_size", 16),
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = BertConfig(**shape, intermediate_size=8, initializer_range=0.5, **settings)
    torch.manual_seed(0)
    return of_transformers(BertForSequenceClassification(config), "text", pooling=pooling)


def test_a_tokenizer_that_joins_pairs_does_so_itself(bert, tmp_path):
    x = Tokenizer(str(tmp_path)).padded(["a cat sat"], ["a dog"], 12, 0)
    assert bert.convert_ids_to_tokens(x[0].tolist()) == (
        ["[CLS]", "a", "cat", "sat", "[SEP]", "a", "dog", "[SEP]"] + 4 * ["[PAD]"]
    )


def test_a_base_like_bert_is_told_which_text_of_a_pair_a_token_is_of(bert, tmp_path):
    tokenizer, base = Tokenizer(str(tmp_path)), small_bert()
    first, second = ["a cat sat", "a", "dog", "a cat sat a dog"], ["a dog", "cat", "", "sat sat sat sat"]
    x = tokenizer.padded(first, second, 9, base.pad_id)  # the last pair is cut
    own = bert(first, second, truncation=True, max_length=9, padding="max_length", return_tensors="pt")
    assert torch.equal(own["input_ids"], x)
    with torch.no_grad():
        one_text = base(x)
        base.separate(tokenizer.separator)
        wanted = base.model(**own).logits
        torch.testing.assert_close(base(x), wanted)
        assert ((one_text - wanted).abs().amax(1) > 0.01).all()
        alone = tokenizer.padded(first, [], 9, base.pad_id)
        read = bert(first, padding="max_length", max_length=9, return_tensors="pt")
        torch.testing.assert_close(base(alone), base.model(**read).logits)


def test_a_head_on_mean_states_sees_each_texts_own_tokens(bert, tmp_path):
    base, plain = small_bert("mean"), small_bert()
    x = Tokenizer(str(tmp_path)).padded(["a cat sat", "dog"], ["a dog", ""], 12, base.pad_id)
    with torch.no_grad():
        found = base(x)
        for row, ids in zip(found, x, strict=True):
            states = base.model.bert(input_ids=ids[ids != base.pad_id][None]).last_hidden_state
            torch.testing.assert_close(row, base.model.classifier(states.mean(1))[0])
        assert (plain(x) - found).abs().max() > 0.01
        assert base(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_texts_of_pairs_are_read_as_if_each_stood_alone(bert, tmp_path, implementation):
    base = small_bert("pairs", attn_implementation=implementation)
    tokenizer = Tokenizer(str(tmp_path))
    base.separate(tokenizer.separator)
    first, second = ["a cat sat", "dog", "a", "a cat sat a dog"], ["a dog", "cat sat dog cat", "", "sat sat sat"]
    x = tokenizer.apart(first, second, 14, base.pad_id)
    assert bert.convert_ids_to_tokens(x[0].tolist()) == (
        ["[CLS]", "a", "cat", "sat", "[SEP]", "[CLS]", "a", "dog", "[SEP]"] + 5 * ["[PAD]"]
    )

    def mean(text):
        ids = bert(text, return_tensors="pt")["input_ids"]
        return base.model.bert(input_ids=ids).last_hidden_state.mean(1)[0]

    with torch.no_grad():
        for own in base.model.classifier.parameters():
            torch.nn.init.normal_(own, generator=torch.Generator().manual_seed(1))
        answers = base(x)
        for row, one, two in zip(answers, first, second, strict=True):
            u, v = mean(one), mean(two) if two else torch.zeros(8)
            wanted = base.model.classifier(torch.cat([u, v, (u - v).abs(), u * v]))
            torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-5)
        wider = torch.cat([x, torch.full((4, 3), base.pad_id)], 1)
        torch.testing.assert_close(base(wider), answers, rtol=1e-5, atol=1e-6)


def test_a_head_on_pairs_begins_as_one_on_the_first_text(bert, tmp_path):
    base, mean = small_bert("pairs"), small_bert("mean")
    x = Tokenizer(str(tmp_path)).apart(["a cat sat", "dog"], [], 12, base.pad_id)
    with torch.no_grad():
        torch.testing.assert_close(base(x), mean(x))
    assert base.model.classifier.weight.shape == (2, 32)
    assert all(leaf.requires_grad for leaf in base.model.classifier.parameters())


def test_of_pairs_read_apart_the_longer_text_is_cut(bert, tmp_path):
    tokenizer = Tokenizer(str(tmp_path))
    x = tokenizer.apart(
        ["a cat sat a dog", "a", "a cat sat a dog"], ["a", "a cat sat a dog", "dog sat cat a a"], 8, 0
    )
    words = [" ".join(bert.convert_ids_to_tokens(row.tolist())) for row in x]
    assert words == [
        "[CLS] a cat sat [SEP] [CLS] a [SEP]",
        "[CLS] a [SEP] [CLS] a cat sat [SEP]",
        "[CLS] a cat [SEP] [CLS] dog sat [SEP]",
    ]


def test_labels_of_other_tasks_are_not_told_apart_where_each_has_its_own(small):
    settings = {"tasks": ("rte", "sst2"), "length": 24, "num_holders": 2}
    one, own = (GLUE(**settings, heads=heads).load(0) for heads in ("one", "own"))
    assert torch.equal(one.train.y, own.train.y)
    y, logits = torch.tensor([[1, 2]]), torch.tensor([[[0.0, 3.0, 9.0, -9.0], [9.0, -9.0, 1.0, 0.0]]])
    loss = Loss(own.model, own.loss, labels_each=own.labels_each)
    wanted = torch.tensor([[1 + torch.exp(torch.tensor(-3.0)), 1 + torch.exp(torch.tensor(-1.0))]]).log()
    torch.testing.assert_close(loss.per_example(logits, y), wanted)
    assert (Loss(one.model, one.loss).per_example(logits, y) > 6).all()
    model = torch.nn.Linear(1, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 1.0, 5.0, 9.0]))
    data = [(torch.ones(4, 1), torch.tensor(labels)) for labels in ([0, 1, 1, 1], [2, 3, 2, 2])]
    task = task_of(model, data, test=data)
    for labels_each, accuracy in ((0, 12.5), (2, 50.0)):
        told = run(replace(task, labels_each=labels_each), FedAvg(LocalTraining(lr=1e-9)), rounds=1)
        assert told.figures["accuracy"] == accuracy


PUBLIC = {"public": torch.ones(3, 1)}


@pytest.mark.parametrize(
    ("method", "plan", "more", "says"),
    [
        (FedEM(2), {}, {}, "labels of each task's own, which FedEM cannot"),
        (KNNPer(), {}, {}, "which KNNPer cannot"),
        (Trust(scheme="predictions"), {}, PUBLIC, "which Trust cannot"),
        (FedAvg(), {"attack": Attack("label_flip", share=0.5)}, {}, "label_flip"),
        (FedAvg(), {"attack": Attack("backdoor", share=0.5)}, {}, "backdoor"),
    ],
)
def test_what_would_mix_the_labels_of_tasks_is_refused(method, plan, more, says):
    data = [(torch.ones(4, 1), torch.tensor(labels)) for labels in ([0, 1, 1, 1], [2, 3, 2, 2])]
    task = replace(task_of(torch.nn.Linear(1, 4), data, test=data), **more)
    run(task, method, schedule=Schedule(rounds=1, **plan))
    with pytest.raises(RecipeError, match=says):
        run(replace(task, labels_each=2), method, schedule=Schedule(rounds=1, **plan))


def test_a_run_and_a_deployment_know_whether_each_task_has_its_labels(tmp_path):
    data = [(torch.ones(4, 1), torch.tensor(labels)) for labels in ([0, 1, 1, 1], [2, 3, 2, 2])]
    one = task_of(torch.nn.Linear(1, 4), data, test=data)
    own = replace(one, labels_each=2)
    result = run(one, FedAvg(), rounds=1, folder=tmp_path / "run")
    with pytest.raises(RunFolderError):
        resume(tmp_path / "run", own, FedAvg())
    prints = [fingerprint(SimpleNamespace(), task, result.progress.shared) for task in (one, own)]
    assert "labels of each task" in differences(*prints)[0]


def test_nodes_of_another_vocabulary_tokenizer_or_public_texts_are_told_apart(tmp_path, monkeypatch):
    method = FedAvg(local=LocalTraining(batch_size=2))

    def printed(place, public=0, **config):
        (tmp_path / place / "base").mkdir(parents=True)
        (tmp_path / place / "base" / "config.json").write_text("{}")
        (tmp_path / place / "base" / "vocab.txt").write_text("a b" if place == "words" else "a c")
        monkeypatch.setenv("UMBEL_DATA", str(tmp_path / place))
        x = torch.tensor([[3, 4], [5, 6]])
        task = replace(task_of(small_bert(**config), [(x, torch.arange(2))]), public=torch.full((1, 2), public))
        shared, _ = method.init(task.model, Population(1, 0))
        return fingerprint(SimpleNamespace(base="base"), task, shared)

    server = printed("server")
    assert differences(server, printed("same")) == []
    assert differences(server, printed("words"))[0].startswith("tokenizer: the node has sha256:")
    assert differences(server, printed("public", public=1))[0].startswith("public inputs: the node has int64")
    other = differences(server, printed("larger", vocab_size=17))
    assert re.match(r"tensor model\S*word_embeddings.weight: the node has float32 \[17, 8\]", other[0])


def test_texts_are_read_apart_only_where_something_ends_them(small):
    with pytest.raises(ModelError, match=r"pooling = 'pairs' wants a tokenizer like BERT's.*'mean' or 'own'"):
        GLUE(tasks=("rte",), length=24, num_holders=2, pooling="pairs").load(0)


def test_a_head_that_is_more_than_a_layer_takes_no_mean():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, pad_token_id=1, **sizes))
    with pytest.raises(ModelError, match=r"classifier \(RobertaClassificationHead\); leave pooling at 'own'"):
        of_transformers(roberta, "text", pooling="mean")


def test_a_base_that_never_learned_to_tell_texts_apart_is_told_nothing(bert, small, tmp_path):
    base = small_bert(type_vocab_size=1)
    base.separate(Tokenizer(str(tmp_path)).separator)
    assert base.separator == -1
    assert Tokenizer("models/stories260K").separator == -1


@pytest.mark.parametrize("num_clients", [1, 3])
def test_what_all_texts_have_as_padding_is_not_computed(num_clients):
    base = small_bert()
    x = torch.zeros(num_clients, 2, 9, dtype=torch.long)
    for place, length in enumerate(torch.tensor([5, 3, 4, 1, 2, 5])[: 2 * num_clients].tolist()):
        x.view(-1, 9)[place, :length] = torch.arange(3, 3 + length)
    lengths = []
    base.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    params = {"model.classifier.bias": torch.randn(num_clients, 2)}
    loss = Loss(stackable(base), "cross_entropy")
    with torch.no_grad():
        outputs = [replace(loss, whole=whole).outputs(params, x) for whole in (True, False)]
    assert lengths == [9, 5]
    torch.testing.assert_close(*outputs)
    assert base.shortened(torch.zeros(2, 9)).shape == (2, 1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_texts_of_a_length_are_computed_together_and_answered_in_order(dropout, monkeypatch):
    base = small_bert()
    bank = AdapterPlan(peft={"r": 2, "target_modules": ["query"], "lora_dropout": dropout}).bank(base)
    module = stackable(seed_dropout(with_paths(base, bank)))
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (3, 6), generator=draw)
    lengths[1] = lengths[1].clamp(max=3)
    lengths[0, 2] = 0
    ids = torch.randint(3, 16, (3, 6, 9), generator=draw)
    x = torch.where(torch.arange(9) < lengths.unsqueeze(-1), ids, 0)
    adapters = {
        name: leaf + torch.randn(3, *leaf.shape, generator=draw) for name, leaf in bank.init(1, draw, 0.3).items()
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in adapters.items()}
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))

    def answers(products, training=True):
        monkeypatch.setattr(pretrained_module, "PIECE_PRODUCTS", products)
        seen.clear()
        params = mix(bank, {}, leaves, torch.ones(3, 1))
        return Loss(module, "cross_entropy").outputs(params, x, training, torch.tensor([5, 6, 7]))

    whole, parted = answers(1e9, False), answers(0.0, False)
    assert len(seen) > 1
    assert sum(rows * places for rows, places in seen) < 0.8 * x.numel()
    torch.testing.assert_close(whole, parted)
    trained = [answers(products) for products in (1e9, 0.0)]
    torch.testing.assert_close(*trained)
    assert torch.allclose(trained[0], whole, atol=1e-6) == (not dropout)
    weight = torch.randn(whole.shape, generator=draw)
    one, other = (torch.autograd.grad((each * weight).sum(), [*leaves.values()]) for each in trained)
    for wanted, found in zip(one, other, strict=True):
        torch.testing.assert_close(wanted, found)
    if dropout:
        seen_alone = Loss(module, "cross_entropy").outputs(
            mix(bank, {}, {n: leaf[1:2] for n, leaf in leaves.items()}, torch.ones(1, 1)),
            x[1:2],
            True,
            torch.tensor([6]),
        )
        torch.testing.assert_close(seen_alone[0], trained[0][1])  # its texts are shorter than the others'


def test_every_text_of_a_batch_has_masks_of_its_own(monkeypatch):
    monkeypatch.setattr(pretrained_module, "PIECE_PRODUCTS", 0.0)
    base = small_bert()
    bank = AdapterPlan(peft={"r": 2, "target_modules": ["query"], "lora_dropout": 0.5}).bank(base)
    module, draw = stackable(seed_dropout(with_paths(base, bank))), torch.Generator().manual_seed(0)
    params = mix(bank, {}, {n: leaf[None] for n, leaf in bank.init(1, draw, 9.0).items()}, torch.ones(1, 1))
    x = torch.arange(3, 9).repeat(1, 16, 1)
    x[0, ::2, 4:] = 0
    outputs = Loss(module, "cross_entropy").outputs(params, x, True, torch.tensor([5]))
    assert len({row.tolist()[0] for row in outputs[0, 1::2].detach()}) == 8


# Texts as vectors.


@pytest.fixture
def passed(small, monkeypatch, tmp_path):
    """How many texts pass the base, each time it is asked; nothing is kept at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counts = []
    true = vectors_module._passed

    def counting(model, ids):
        counts.append(len(ids))
        return true(model, ids)

    monkeypatch.setattr(vectors_module, "_passed", counting)
    return counts


def test_a_texts_vector_is_the_mean_of_its_tokens_states(passed, monkeypatch):
    monkeypatch.setattr(vectors_module, "TOKENS", 24)
    found = vectors(["abc", "", "a longer one", "abc", "zz"], "models/stories260K", 8)
    base = load_pretrained("models/stories260K", "text", 2).model
    for row, text in ((0, "abc"), (2, "a longer"), (4, "zz")):  # cut at 8
        ids = small_texts.tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = base(input_ids=ids, output_hidden_states=True).hidden_states
        means = [states[at][0].mean(0) for at in (len(states) // 2, -1)]
        wanted = torch.cat([mean / mean.square().mean().sqrt() for mean in means])
        torch.testing.assert_close(found[row], wanted, atol=2e-3, rtol=2e-3)
    assert torch.equal(found[3], found[0])
    assert not found[1].any()


def test_texts_pass_the_base_once(passed):
    first = vectors(["a", "b", "a", ""], "models/stories260K", 8)
    again = vectors(["c", "b", "a"], "models/stories260K", 8)
    assert passed == [2, 1]
    assert torch.equal(again[1:], first[[1, 0]])
    vectors(["a"], "models/stories260K", 9)  # might be cut elsewhere
    assert passed == [2, 1, 1]
    assert vectors(["", ""], "models/stories260K", 8).tolist() == [[0.0], [0.0]]


def test_a_base_without_a_pooler_gives_vectors_with_pooling_mean(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=258, **sizes), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    small_texts.tokenizer().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    with pytest.raises(ModelError, match="take pooling = 'mean'"):
        vectors(["a", "bc"], base, 8)
    assert vectors(["a", "bc"], base, 8, pooling="mean").shape == (2, 16)
    GLUE(base=base, embedded=True, pooling="mean")


TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("pooling", ["mean", "pairs"])
@pytest.mark.parametrize(
    ("name", "more", "good"),
    [
        ("Bert", {}, ("mean", "pairs")),
        ("Albert", {"embedding_size": 8}, ("mean", "pairs")),
        ("FNet", {}, ()),
        ("SqueezeBert", {"embedding_size": 16}, ()),
        ("MobileBert", {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}, ("mean",)),
    ],
)
def test_architectures_in_which_texts_are_not_alone_are_refused(name, more, good, pooling):
    config = getattr(transformers, f"{name}Config")(**TINY | more)
    with seeded(0, "test", name):
        made = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model = of_transformers(made, "text", pooling=pooling)
    if pooling in good:
        model.separate(9)
        return
    with pytest.raises(ModelError, match=r"take (pooling = )?'own'"):
        model.separate(9)


@pytest.mark.parametrize("fast", [True, False])
def test_vectors_of_another_tokenizer_are_no_vectors_of_this_one(passed, monkeypatch, fast):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", fast)
    read = Tokenizer.__init__

    def turned(self, base):
        read(self, base)
        told = json.loads(self._own.backend_tokenizer.to_str())
        known = told["model"]["vocab"]
        known["a"], known["b"] = known["b"], known["a"]
        raw = tokenizers.Tokenizer.from_str(json.dumps(told))
        self._own = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")

    first = vectors(["a", "b"], "models/stories260K", 8)
    monkeypatch.setattr(Tokenizer, "__init__", turned)
    for _ in range(2):
        assert torch.equal(vectors(["b", "a"], "models/stories260K", 8), first)
    assert passed == [2, 2]


@pytest.mark.parametrize("quiet", [False, True])
def test_what_takes_long_is_told_while_a_run_is_watched(quiet, small, tmp_path, monkeypatch, capsys):
    vectors_module.LOG.setLevel(0)  # whatever an earlier test's command has left
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vectors_module, "SAID_EVERY", 0.0)
    with Watch("glue", 1, [], quiet):
        vectors(["a", "b c"], "models/stories260K", 8)
    told = capsys.readouterr().err
    assert told == ("" if quiet else "glue: texts passed through models/stories260K: 0 of 2\n")
    vectors(["another"], "models/stories260K", 8)
    assert not capsys.readouterr().err
    assert vectors_module.LOG.level == 0  # as it was


def test_embedded_slots_are_those_of_the_texts(passed):
    settings = {"tasks": ("rte", "sst2"), "length": 24, "num_holders": 3, "test_examples": 10}
    plain, own = (GLUE(**settings, embedded=on).load(0) for on in (False, True))
    assert torch.equal(own.train.y, plain.train.y)
    assert torch.equal(own.owner, plain.owner)
    first, second, apart, product = own.train.x.chunk(4, 1)
    torch.testing.assert_close(apart, (first - second).abs())
    torch.testing.assert_close(product, first * second)
    pairs = torch.cat([torch.full((n,), g == 0) for n, g in zip(own.train.count, own.group, strict=True)])
    assert torch.equal(second.any(1), pairs)
    trained = {name for name, leaf in own.model.named_parameters() if leaf.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}
    assert own.model(own.train.x[:3]).shape == (3, 4)


# Following instructions.


def counted(x, y):
    """For one example what is given, and what counts."""
    places = torch.nonzero(y != IGNORED).squeeze(1)
    assert torch.equal(places, torch.arange(int(places[0]), int(places[-1]) + 1))
    return said(x[: int(places[0]) + 1]), said(y[places])


def test_only_a_response_and_its_end_count_and_no_prompt_has_it(small):
    task = Dolly(num_holders=3, length=128).load(0)
    assert task.group.unique().tolist() == list(range(8))
    for examples in (task.train, task.test):
        for x, y in zip(examples.x, examples.y, strict=True):
            given, answer = counted(x, y)
            context = re.fullmatch(
                r"(### Context:\n[c\d ]+\n\n)?### Instruction:\nsay (\d+)\n\n### Response:\n", given
            )
            assert answer == f"r{context[2]}!|"
            assert answer[:-1] not in given
            end = len(given) + len(answer) - 1
            assert (y[end:] == IGNORED).all()


def test_padding_counts_nothing_whatever_it_is(small):
    task = Dolly(categories=("open_qa",), num_holders=2, length=128).load(0)
    x, y = task.train.x[:3].clone(), task.train.y[:3]
    before = cross_entropy(task.model(x), y)
    for row, targets in zip(x, y, strict=True):
        row[int(torch.nonzero(targets != IGNORED).max()) + 1 :] = 77
    assert torch.equal(before, cross_entropy(task.model(x), y))


def test_dollys_test_part_is_held_back_and_common_to_a_category(small):
    task = Dolly(num_holders=3, length=128).load(0)
    train, test = ({said(row) for row in part.x} for part in (task.train, task.test))
    assert train.isdisjoint(test)
    assert len(train) + len(test) == 480
    for slot in range(task.num_clients):
        assert task.test.count[slot] == 6  # a tenth of 60
    fewer = Dolly(num_holders=2, train_examples=20, categories=("open_qa",)).load(0)
    assert fewer.train.count.sum() == 20


@pytest.mark.parametrize("seed", range(3))
def test_no_context_of_dollys_test_is_trained_on_in_any_category(seed, small):
    parts = dolly.divided(dolly.by_category(), 0.1, seed)
    train, test = ([pair for own in part.values() for pair in own] for part in parts)
    assert len(set(train) | set(test)) == len(train) + len(test) == 480
    contexts = [
        {found[0] for prompt, _ in part if (found := re.search(r"c\d+", prompt))} for part in (train, test)
    ]
    assert contexts[1]
    assert contexts[0].isdisjoint(contexts[1])


def test_an_instruction_with_and_without_context_is_held_together():
    pairs = [
        (f"### Context:\nc{n}\n\n" * two + f"{dolly._ASKED}say {n}", "r") for n in range(20) for two in (0, 1)
    ]
    train, test = dolly.divided({"a": pairs[::2], "b": pairs[1::2]}, 0.2, 0)
    assert [len(own) for own in (train["a"], train["b"], test["a"], test["b"])] == [16, 16, 4, 4]
    assert {one.split()[-1] for one, _ in test["a"]} == {one.split()[-1] for one, _ in test["b"]}


def test_a_fraction_that_empties_a_part_is_told(small):
    with pytest.raises(RecipeError, match=r"test_fraction.*brainstorming"):
        Dolly(test_fraction=0.999, num_holders=2).load(0)


@pytest.mark.parametrize(
    ("prompt", "answer"), [("say 1", "r1!"), ("c" * 300, "r1!"), ("say 1", "r" * 300), ("", "r1!")]
)
def test_what_a_tokenizer_puts_in_front_stays_in_front_of_a_prompt(prompt, answer, small):
    own = Tokenizer("models/stories260K")
    own.begin = []
    bare, wanted = own.answered([(prompt, answer)], 64)
    own.begin = [9]
    x, y = own.answered([(prompt, answer)], 64)
    assert x.shape == y.shape == (1, 64)
    assert x[0, 0] == 9
    asked, told = (targets[0][targets[0] != IGNORED] for targets in (wanted, y))
    assert torch.equal(told, asked[: len(told)])
    assert len(asked) - len(told) <= (len(answer) == 300)
    if prompt == "say 1" and answer == "r1!":
        assert torch.equal(x[0, 1:], bare[0, :-1])


def test_a_long_prompt_loses_its_contexts_front_and_keeps_its_instruction(small):
    prompt = f"### Context:\n{'c' * 300}\n\n{dolly._ASKED}say 1\n\n### Response:\n"
    x, y = Tokenizer("models/stories260K").answered([(prompt, "r1!")], 64)
    given, answer = counted(x[0], y[0])
    assert re.fullmatch(r"c+\n\n### Instruction:\nsay 1\n\n### Response:\n", given)
    assert answer == "r1!|"


def test_what_is_too_long_is_cut(small):
    tokenizer = Tokenizer("models/stories260K")
    pairs = [("p" * 30 + "q", "a"), ("q", "a" * 30), ("p" * 30 + "q", "a" * 30), ("", "ab")]
    x, y = tokenizer.answered(pairs, 8)
    told = [counted(*row) for row in zip(x, y, strict=True)]
    assert told[0] == ("p" * 6 + "q", "a|")
    assert told[1] == ("q", "a" * 8)
    assert told[2] == ("ppppq", "a" * 4)
    assert told[3][1] == "ab|"


@pytest.mark.parametrize("number", [1, 2])
def test_flan_has_a_task_for_each_of_eight_clients(number, small):
    task = FlanFedDPA(set=number, length=64).load(0)
    assert task.num_clients == 8
    assert task.group.tolist() == list(range(8))
    for client in range(8):
        for part, split in ((task.train, "train"), (task.test, "test")):
            x, y = part.of_client(client)
            assert len(y) == (30 if split == "train" else 20)
            for n, row in enumerate(zip(x, y, strict=True)):
                assert counted(*row) == (f"{number}{split} {client}-{n}?\n", f"<{client}-{n}>|")


# Images.


def test_labels_of_two_data_sets_do_not_meet(tiny_data, tmp_path):
    base = small_texts.write_vit(tmp_path / "vit")
    task = CIFARViT(base, num_holders=3, test_examples=30).load(0)
    assert task.num_labels == 110
    for slot in range(task.num_clients):
        for part in (task.train, task.test):
            labels = part.of_client(slot)[1]
            assert ((labels < 10) if task.group[slot] == 0 else (labels >= 10)).all()
    assert task.train.count.sum() == 300 + 400  # three fifths of 500, and CIFAR-100's
    assert task.train.y.max() <= 109


def test_the_images_for_pretraining_are_in_no_client(tiny_data, tmp_path):
    task = CIFARViT(small_texts.write_vit(tmp_path / "vit"), "classes", num_clients=4, num_groups=2).load(0)
    first, rest = divided(texts_images())
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    pixels = ((task.train.x * deviation + mean) * 255).round().byte()
    seen = {image.numpy().tobytes() for image in pixels}
    assert seen == {image.numpy().tobytes() for image in rest.x}
    assert seen.isdisjoint(image.numpy().tobytes() for image in first.x)
    assert task.owner is None
    assert task.group.tolist() == [0, 1, 0, 1]
    for client in range(4):
        for part in (task.train, task.test):
            assert (part.of_client(client)[1] % 2 == client % 2).all()


def texts_images():
    from umbel.tasks.corpora import cifar10

    return cifar10().train


def test_images_are_scaled_and_enlarged_as_the_base_wants(tiny_data, tmp_path):
    base = small_texts.write_vit(tmp_path / "vit", size=48)
    told = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(told))
    task = CIFARViT(base, "classes", num_clients=4, num_groups=2, train_examples=50).load(0)
    assert task.train.x.shape == (50, 3, 32, 32)
    assert torch.allclose((task.train.x + 1) * 127.5, ((task.train.x + 1) * 127.5).round(), atol=1e-3)
    assert task.model(task.train.x[:2]).shape == (2, 10)
    trained = [name for name, leaf in task.model.named_parameters() if leaf.requires_grad]
    assert trained == ["model.classifier.weight", "model.classifier.bias"]
    assert task.model.pixels == ((0.5,) * 3, (0.5,) * 3, (32, 32), (48, 48))


# The hub.


def hub(monkeypatch, tmp_path, answers):
    """Makes the hub answer so, and the data folder empty."""

    def load_dataset(name, config, split):
        return answers[name, config, split]

    monkeypatch.setenv("UMBEL_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_texts_that_are_not_in_the_folder_come_from_the_hub(monkeypatch, tmp_path):
    answers = {
        ("bentrevett/multi30k", None, split): {"de": [f"{split} {n}" for n in range(2)]}
        for split in ("train", "validation", "test")
    }
    context = [f"c{n // 3}" for n in range(30)]
    answers["google/xquad", "xquad.ru", "validation"] = {"context": context}
    lines = ["", " = One = \n", " a\n", " = = Part = = \n", " b\n", " = Two = \n", " c\n"]
    for split in ("validation", "test"):
        answers["Salesforce/wikitext", "wikitext-2-v1", split] = {"text": [f"{line}" for line in lines]}
    for split in ("train", "test"):
        answers["fancyzhx/ag_news", None, split] = {"label": [0, 3], "text": [f"{split} w", f"{split} t"]}
    hub(monkeypatch, tmp_path, answers)
    assert [one.text for one in texts.captions("de")][1:3] == ["train 1", "validation 0"]
    assert [(one.number, one.text) for one in texts.paragraphs("ru")][4:6] == [(0, "c4"), (1, "c5")]
    assert [one.text for one in texts.articles()] == ["= One = \n a\n = = Part = = \n b", "= Two = \n c"]
    assert [[one.text for one in own] for own in texts.news()] == [
        ["train w", "test w"],
        [],
        [],
        ["train t", "test t"],
    ]


def test_glue_comes_from_the_hub_with_its_own_columns(monkeypatch, tmp_path):
    pair = {"question": ["q"], "sentence": ["s"], "label": [1]}
    answers = {("nyu-mll/glue", "qnli", split): pair for split in ("train", "validation")}
    answers |= {
        ("nyu-mll/glue", "cola", split): {"sentence": ["s"], "label": [0]} for split in ("train", "validation")
    }
    hub(monkeypatch, tmp_path, answers)
    train, test = sentences("qnli")
    assert (train.first, train.second, train.label) == (["q"], ["s"], [1])
    assert sentences("cola")[1].second == [""]
    assert test.label == [1]


READERS = {
    "multi30k": lambda: texts.captions("de"),
    "xquad_contexts": lambda: texts.paragraphs("de"),
    "wikitext2_valid": texts.articles,
    "ag_news": texts.news,
    "shakespeare_by_role": texts.speeches,
    "glue": lambda: sentences("rte"),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_missing_is_named_and_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=rf"text/{name}.*UMBEL_DATA") as raised:
        READERS[name]()
    on_hub = name != "shakespeare_by_role"
    assert ("pip install umbel[hf]" in str(raised.value)) == on_hub


def test_a_hub_without_the_language_is_told(monkeypatch, tmp_path):
    hub(monkeypatch, tmp_path, {("bentrevett/multi30k", None, "train"): {"de": ["x"], "en": ["y"]}})
    with pytest.raises(DataError, match=r"bentrevett/multi30k.*'cs'"):
        texts.captions("cs")


def test_modules_are_those_of_the_python_that_runs_where_the_folder_has_none(monkeypatch, tmp_path):
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    library = tmp_path / "lib"
    text = "x = 1  # é\n" * 200
    for name in (
        "b.py",
        "a.py",
        "_sysconfigdata_x.py",
        "json/encoder.py",
        "test/t.py",
        "site-packages/s.py",
        "a/b/c.py",
    ):
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n{text}", encoding="utf-8")
    (library / "short.py").write_text("x = 1")
    (library / "long.py").write_text("x = 1\n" * 11_000)
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(library))
    assert [one.text.split()[1] for one in texts.modules()] == ["a.py", "b.py", "json/encoder.py"]
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"python_stdlib_code.*UMBEL_DATA.*no sources of its library"):
        texts.modules()


# True texts.


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the file has the modules of Python 3.11.7")
def test_the_file_has_the_modules_of_the_python_that_runs(real_data, monkeypatch, tmp_path):
    stored = texts.modules()
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    assert texts.modules() == stored


def test_true_texts_are_as_many_as_told(real_data):
    assert [len(texts.captions(language)) for language in LETTERS] == [30980, 30988, 31004, 30979]
    assert {len(texts.paragraphs(language)) for language in XQUAD} == {240}
    assert len({one.number for one in texts.paragraphs("zh")}) == 48
    assert len(texts.articles()) == 122
    assert len(texts.modules()) == 293
    assert [len(own) > 4000 for own in texts.news()] == 4 * [True]
    assert texts.speeches()[0][0].source == "hamlet/HAMLET"
    assert len(sentences("sst2")[0].label) == 67_349
    assert len(sentences("qnli")[0].label) == 0
    assert sum(len(own) for own in dolly.by_category().values()) == 14_824


# Nearly all of a training set stays, all of a development set does.
TRUE_GLUE = {
    "cola": (8535, 1043),
    "mrpc": (3616, 408),
    "rte": (2278, 277),
    "sst2": (67_349, 872),
    "qnli": (4300, 1093),
}


@pytest.mark.parametrize("seed", range(3))
def test_the_true_test_parts_share_nothing_with_training(seed, real_data):
    for name, (least, tested) in TRUE_GLUE.items():
        train, test = _split(name, seed)
        assert (len(train.label) >= least, len(test.label)) == (True, tested), name
        sentences_of = ({plainly(one) for one in (*part.first, *part.second)} - {""} for part in (train, test))
        assert set.isdisjoint(*sentences_of), name
    instructions = dolly.by_category()
    train, test = dolly.divided(instructions, 0.1, seed)
    for category, own in instructions.items():
        assert len(test[category]) == round(0.1 * len(own))
        assert len(train[category]) + len(test[category]) == len(own)
    seen, asked = ({one for own in of.values() for p, _ in own for one in parts(p)} for of in (train, test))
    assert seen.isdisjoint(asked)
    for part in (1, 2):
        seen, asked = ({plainly(p) for own in of.values() for p, _ in own} for of in flan_feddpa.by_task(part))
        assert min(len(seen), len(asked)) > 1000
        assert seen.isdisjoint(asked)
        known, told = (
            {line for prompt in prompts for line in prompt.splitlines() if len(line) > 200}
            for prompts in ([p for own in of.values() for p, _ in own] for of in flan_feddpa.by_task(part))
        )
        assert known.isdisjoint(told)


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_no_true_text_that_is_tested_or_public_is_trained_on_by_anyone(seed, real_data):
    reader, windows = Reader(Tokenizer("models/stories260K")), Windows(64, 0, 0.2, 64)
    captions = [texts.captions(language)[:6000] for language in ("de", "fr", "cs")]
    for categories in (texts.speeches()[:20], captions, texts.news()):
        found = windows.divided(categories, np.eye(len(categories), dtype=np.int64), reader, seed, seen_whole=True)
        train, test = (
            {plain(one) for own in part for docs in own for one in docs} for part in (found.train, found.test)
        )
        public = {plain(one) for own in found.public for one in own}
        assert min(map(len, (train, test, public))) > 0
        assert train.isdisjoint(test)
        assert public.isdisjoint(train | test)


def plain(document):
    """What it says; of news the story, for one is there under two titles."""
    return plainly(document.text.partition("\n")[2] or document.text)


def parts(prompt):
    """A prompt's context, if it has one, and its instruction."""
    context, _, instruction = prompt.partition("### Instruction:\n")
    return {instruction.strip()} | ({context.strip()} if context else set())


def test_a_true_base_predicts_true_text(real_data):
    task = Multilingual(languages=("en", "de"), clients_per_language=1, tokens_per_client=2560).load(0)
    english, german = (task.test.of_client(client) for client in (0, 1))
    with torch.no_grad():
        losses = [float(cross_entropy(task.model(x), y).mean()) for x, y in (english, german)]
    assert losses[0] < losses[1]  # the base has read English stories
    assert losses[0] < 5


def test_ends_are_between_documents(small):
    task = CodeVsProse(**SMALL).load(0)
    assert (task.train.x == END).any()


def test_a_base_whose_weights_are_not_whole_is_refused(tmp_path):
    base = small_bert().model
    for name, own, config in (
        ("whole", base, base.config),
        ("no pooler", base.bert.__class__(base.config, add_pooling_layer=False), base.config),
        ("wider", base, BertConfig(**{**base.config.to_dict(), "intermediate_size": 12})),
    ):
        own.save_pretrained(tmp_path / name)
        config.save_pretrained(tmp_path / name)
    load_pretrained(str(tmp_path / "whole"), "text", num_labels=3)  # a head of another size is drawn
    load_pretrained(str(tmp_path / "no pooler"), "text", num_labels=2, pooling="mean")
    with pytest.raises(
        ModelError, match=r"bert.pooler.dense.bias, .*frozen random numbers; take pooling = 'mean'"
    ):
        load_pretrained(str(tmp_path / "no pooler"), "text", num_labels=2)
    for labels in (2, 0):
        with pytest.raises(ModelError, match=r"bert.encoder.*intermediate.*; name a base whose weights are whole"):
            load_pretrained(str(tmp_path / "wider"), "text", num_labels=labels)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"no tensors at all"),
        ("model.safetensors", b""),
        ("config.json", b'{"model_type": "gpt2", "n_embd": "eight"}'),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": 3, "model": []}'),
        ("config.json", b'{"model_type": "gpt2", "n_head": 0}'),
    ],
)
def test_a_damaged_base_is_told_by_its_folder(file, content, small, tmp_path):
    base = small_texts.write_base(tmp_path / "base")
    (tmp_path / "base" / file).write_bytes(content)
    with pytest.raises(DataError, match=r"task\.base = .*base.*: no .* can be read from .*base"):
        CodeVsProse(**SMALL | {"base": base}).load(0)


def test_a_text_longer_than_the_base_reads_is_told(small):
    with pytest.raises(DataError, match=r"cannot read a text of 300 tokens .*made for 256: lower task\.length"):
        CodeVsProse(**SMALL | {"length": 300, "tokens_per_client": 0, "public_windows": 0}).load(0)


def test_texts_that_are_padded_beyond_what_the_base_reads_are_no_trouble():
    bert = small_bert(max_position_embeddings=8)
    short = torch.full((4, 40), bert.pad_id)
    short[:, :3] = 5
    task_of(bert, [(short, torch.arange(4) % 2)])
    bert.check_ids(short[:0])
    for wrong in (-3, 16):
        with pytest.raises(DataError, match=f"embeddings of 16 tokens, and a text has the id {wrong}"):
            bert.check_ids(torch.where(short == 5, wrong, short))


def test_ids_of_another_bases_tokenizer_are_told(small, tmp_path):
    base = small_texts.write_base(tmp_path / "base")
    fewer = load_pretrained(base, "causal_lm").model
    fewer.resize_token_embeddings(90)
    fewer.save_pretrained(base)
    with pytest.raises(DataError, match=r"base has embeddings of 90 tokens, and a text has the id \d+"):
        CodeVsProse(**SMALL | {"base": base}).load(0)
