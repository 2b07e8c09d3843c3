"""The data sets of files, and the tasks that are made of them: who has what, and as whom they see it."""

import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from umbel.errors import DataError, RecipeError
from umbel.tasks import CIFAR10, CIFAR100, MNIST, FEMNISTDigits, Shakespeare, corpora, texts
from umbel.tasks.cifar import DEVIATION, MEAN

READERS = {
    "mnist": (corpora.mnist, "images/mnist_x_train.npy.xz"),
    "cifar10": (corpora.cifar10, "images/cifar10_train20k.webp"),
    "cifar100": (corpora.cifar100, "images/cifar100_10k.webp"),
    "femnist_digits": (corpora.femnist_digits, "images/femnist_digits12.npz"),
    "shakespeare_by_role": (corpora.shakespeare_by_role, "text/shakespeare_by_role.parquet"),
}


def numbers(images, known):
    """Which of the known images each of these is; KeyError if none."""
    number = {image.tobytes(): i for i, image in enumerate(known.numpy())}
    return [number[np.ascontiguousarray(image).tobytes()] for image in images.numpy()]


def pixels(x, mean=(0,), deviation=(1,)):
    """What `x` was before it was scaled."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
    return ((x * deviation + mean) * 255).round().byte()


# Reading.


def test_sheets_are_read_tile_by_tile_and_row_by_row(tiny_data):
    corpus = corpora.cifar10()
    assert corpus.train.x.shape == (500, 3, 32, 32)
    assert corpus.test.x.shape == (100, 3, 32, 32)
    assert corpus.train.x.dtype == torch.uint8
    first = np.asarray(Image.open(tiny_data / "images" / "cifar10_train20k.webp"))
    last = np.asarray(Image.open(tiny_data / "images" / "cifar10_train_rest_2.webp"))
    for number, sheet, row, column in ((0, first, 0, 0), (3, first, 0, 3), (107, first, 1, 7), (499, last, 0, 99)):
        tile = sheet[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert (corpus.train.x[number].permute(1, 2, 0).numpy() == tile).all()


def test_a_corpus_is_read_once_and_another_folders_anew(tiny_data, tmp_path, monkeypatch):
    once = corpora.mnist()
    assert corpora.mnist() is once
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError):
        corpora.mnist()


@pytest.mark.parametrize("name", READERS)
def test_what_is_missing_is_named_and_what_to_do(name, tmp_path, monkeypatch):
    read, file = READERS[name]
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError) as raised:
        read()
    for told in (file, str(tmp_path / "nowhere"), "UMBEL_DATA"):
        assert told in str(raised.value)
    assert "pip install umbel[hf]" in str(raised.value)


@pytest.mark.parametrize(
    ("read", "files"),
    [
        (corpora.mnist, ["images/mnist_labels.npz", "images/mnist_x_test.npy.xz"]),
        (corpora.cifar10, ["images/cifar10_test.webp", "images/cifar10_labels.npz"]),
        (corpora.cifar100, ["images/cifar100_10k.webp"]),
        (corpora.femnist_digits, ["images/femnist_digits12.npz"]),
        (corpora.shakespeare_by_speech, ["text/shakespeare_by_role.parquet"]),
        (texts.news, ["text/ag_news.parquet"]),
        (texts.articles, ["text/wikitext2_test.txt.xz"]),
    ],
)
def test_a_file_that_is_damaged_is_named(read, files, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for place, file in enumerate(files):
        pointer, whole = b"version https://git-lfs.github.com/spec/v1\n", (tiny_data / file).read_bytes()
        for wrong, content in {"pointer": pointer, "half": whole[: len(whole) // 2], "empty": b""}.items():
            folder = tmp_path / f"{place}-{wrong}"
            shutil.copytree(tiny_data, folder)
            (folder / file).write_bytes(content)
            monkeypatch.setenv("UMBEL_DATA", str(folder))
            with pytest.raises(DataError, match=rf"{re.escape(file)} cannot be read, fetch it again"):
                read()


def test_the_folder_is_the_users_cache_if_none_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("UMBEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpora.data_folder() == tmp_path / "umbel" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpora.data_folder() == tmp_path / ".cache" / "umbel" / "data"


@pytest.mark.parametrize(
    ("name", "hub", "columns", "shape"),
    [
        ("mnist", "ylecun/mnist", ("image", "label"), (28, 28)),
        ("cifar10", "uoft-cs/cifar10", ("img", "label"), (32, 32, 3)),
        ("cifar100", "uoft-cs/cifar100", ("img", "fine_label"), (32, 32, 3)),
    ],
)
def test_without_files_the_hub_is_asked(name, hub, columns, shape, tmp_path, monkeypatch):
    draw = np.random.Generator(np.random.Philox(key=1))
    x = {split: draw.integers(0, 256, (n, *shape), dtype=np.uint8) for split, n in (("train", 3), ("test", 2))}

    def load_dataset(asked, config, split):
        assert asked == hub
        return {columns[0]: [Image.fromarray(image) for image in x[split]], columns[1]: list(range(len(x[split])))}

    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = READERS[name][0]()
    for split, images in (("train", corpus.train), ("test", corpus.test)):
        found = images.x[:, 0] if len(shape) == 2 else images.x.permute(0, 2, 3, 1)
        assert (found.numpy() == x[split]).all()
        assert images.y.tolist() == list(range(len(x[split])))


class DatasetsError(Exception):
    """As `datasets` has it, which is no ValueError."""


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), DatasetsError("no route to host")])
def test_a_hub_that_cannot_be_reached_is_told(error, tmp_path, monkeypatch):
    def load_dataset(asked, config, split):
        raise error

    monkeypatch.setenv("UMBEL_DATA", str(tmp_path))
    known = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", known)
    with pytest.raises(DataError, match=r"UMBEL_DATA.*no route to host"):
        corpora.mnist()


def from_hub(monkeypatch, folder, columns):
    """Makes the hub answer so, and the data folder empty."""

    class Rows(dict):
        def select(self, places):
            return {name: [values[place] for place in places] for name, values in self.items()}

    monkeypatch.setenv("UMBEL_DATA", str(folder))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, split: Rows(columns)))


def test_the_hubs_writers_are_those_who_wrote_most_digits(tmp_path, monkeypatch):
    # Writer w has w digits and, before them, a letter.
    who = [(f"f{writer:04d}", place) for writer in range(15) for place in range(writer + 1)]
    images = [Image.fromarray(np.full((28, 28), row, dtype=np.uint8)) for row in range(len(who))]
    columns = {"image": images, "writer_id": [name for name, _ in who]}
    from_hub(
        monkeypatch, tmp_path, columns | {"character": [(place - 1) % 10 if place else 36 for _, place in who]}
    )
    written = corpora.femnist_digits()
    assert written.writer.bincount().tolist() == list(range(3, 15))
    expected = [row for row, (name, place) in enumerate(who) if place and name > "f0002"]
    assert written.images.x[:, 0, 0, 0].tolist() == expected
    assert written.images.y.tolist() == [(who[row][1] - 1) % 10 for row in expected]
    assert corpora.femnist_digits(13).writer.bincount().tolist() == list(range(2, 15))
    assert corpora.femnist_digits(2).writer.bincount().tolist() == [13, 14]
    with pytest.raises(DataError, match="FEMNIST has 14 writers of digits; lower num_writers = 15"):
        corpora.femnist_digits(15)


def test_more_writers_than_the_folder_has_are_asked_of_the_hub(tiny_data, monkeypatch):
    assert FEMNISTDigits(num_writers=2).load(0).num_clients == 2
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"take num_writers = 12, or pip install umbel\[hf\]"):
        corpora.femnist_digits(13)


def test_the_hubs_windows_of_shakespeare_are_put_together(tmp_path, monkeypatch):
    says = {"B": ["".join(chr(97 + n % 26) for n in range(100))], "A": ["x" * 81 + "y", "z" * 90]}
    rows = [
        (role, text[at : at + 80], text[at + 80])
        for role, own in says.items()
        for text in own
        for at in range(len(text) - 80)
    ]
    from_hub(monkeypatch, tmp_path, dict(zip(("character_id", "x", "y"), zip(*rows, strict=True), strict=True)))
    assert [(role.name, role.text) for role in corpora.shakespeare_by_role()] == [
        ("A", "".join(says["A"])),
        ("B", says["B"][0]),
    ]


# mnist and cifar10.

GROUPED = {
    "mnist": (MNIST, corpora.mnist, pixels),
    "cifar10": (CIFAR10, corpora.cifar10, lambda x: pixels(x, MEAN, DEVIATION)),
}
every_grouped = pytest.mark.parametrize("name", GROUPED)


@every_grouped
@pytest.mark.parametrize("variant", ["rotate", "label_shift"])
def test_images_are_dealt_to_clients_whose_group_turns_them_or_shifts_labels(tiny_data, name, variant):
    recipe, corpus, unscaled = GROUPED[name]
    task, corpus = recipe(variant, num_clients=8).load(0), corpus()
    for examples, images in ((task.train, corpus.train), (task.test, corpus.test)):
        owned = []
        for client in range(8):
            x, y = examples.of_client(client)
            group = client % 4 if variant == "rotate" else 0
            for _ in range(group):  # back by a quarter turn to the right: the first row becomes the last column
                x = x.transpose(2, 3).flip(3)
            own = numbers(unscaled(x), images.x)
            shift = client % 4 if variant == "label_shift" else 0
            assert y.tolist() == [(int(images.y[i]) + shift) % 10 for i in own]
            owned += own
        assert sorted(owned) == list(range(len(images.y)))  # each has one owner
        assert max(examples.count) - min(examples.count) <= 1


@every_grouped
def test_a_reduced_client_keeps_some_of_what_it_had_and_is_tested_on_all(tiny_data, name):
    recipe, _, _ = GROUPED[name]
    whole, half, few = (recipe(num_clients=4, reduction=share).load(3) for share in (1, 0.5, 0.001))
    assert few.train.count.tolist() == [10] * 4
    assert half.train.count.tolist() == [round(n / 2) for n in whole.train.count]
    for client in range(4):
        sets = [{image.numpy().tobytes() for image in t.train.of_client(client)[0]} for t in (few, half, whole)]
        assert sets[0] < sets[1] < sets[2]
    assert torch.equal(half.test.x, whole.test.x)
    assert torch.equal(half.test.y, whole.test.y)


def test_pixels_are_scaled_as_published(tiny_data):
    task, corpus = MNIST("label_shift", num_clients=4).load(0), corpora.mnist()
    assert task.train.x.dtype == torch.float32
    assert task.train.x.is_contiguous()
    assert set((task.train.x * 255).round().byte().unique().tolist()) == set(corpus.train.x.unique().tolist())
    assert 0 <= task.train.x.min() < task.train.x.max() <= 1
    x, (mean, deviation) = corpora.cifar10().train.x[:1], (MEAN, DEVIATION)
    scaled = CIFAR10("label_shift", num_clients=1, num_groups=1).load(0).train.x
    red = (x[0, 0, 0, 0].item() / 255 - mean[0]) / deviation[0]
    assert red in [pytest.approx(value) for value in scaled[:, 0, 0, 0].tolist()]
    # The corpus itself is shared, and nobody has written to it.
    assert corpora.cifar10().train.x.dtype == torch.uint8


# cifar100.


def test_a_group_of_cifar100_has_ten_labels_to_itself(tiny_data):
    task, corpus = CIFAR100(num_clients=20).load(0), corpora.cifar100()
    for examples, images, count in ((task.train, corpus.train, 20), (task.test, corpus.test, 5)):
        assert examples.count.tolist() == [count] * 20
        owned = []
        for client in range(20):
            x, y = examples.of_client(client)
            assert (y % 10 == client % 10).all()
            own = numbers(pixels(x, MEAN, DEVIATION), images.x)
            assert y.tolist() == images.y[own].tolist()
            owned += own
        assert sorted(owned) == list(range(len(images.y)))
    assert task.group.tolist() == [client % 10 for client in range(20)]
    assert task.model(task.train.x[:1]).shape == (1, 100)


def test_cifar100_may_have_fewer_examples_and_the_same_test(tiny_data):
    whole, few = (CIFAR100(num_clients=20, samples_per_client=n).load(0) for n in (0, 3))
    assert few.train.count.tolist() == [3] * 20
    for client in range(20):
        assert torch.equal(few.train.of_client(client)[0], whole.train.of_client(client)[0][:3])
    assert torch.equal(few.test.x, whole.test.x)


# femnist_digits.


@pytest.mark.parametrize("model", ["cnn", "resnet_gn"])
def test_each_writer_is_a_client(tiny_data, model):
    task, written = FEMNISTDigits(model, width=8).load(0), corpora.femnist_digits()
    assert task.train.count.tolist() == [16] * 3
    assert task.test.count.tolist() == [4] * 3
    owned = []
    for client in range(3):
        for examples in (task.train, task.test):
            x, y = examples.of_client(client)
            own = numbers(pixels(1 - x), written.images.x)
            assert written.writer[own].tolist() == [client] * len(own)
            assert y.tolist() == written.images.y[own].tolist()
            owned += own
    assert sorted(owned) == list(range(60))
    assert task.model(task.train.x[:2]).shape == (2, 10)


# shakespeare.


def test_a_role_has_its_speeches_in_order(tiny_data):
    roles = corpora.shakespeare_by_role()
    assert [(role.name, len(role.text)) for role in roles] == [
        ("a/ANN", 500),
        ("a/TOM", 700),
        ("a/X", 9),
        ("b/TOM", 410 + 1 + 300),
    ]
    assert roles[3].text[410] == "\n"


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_each_role_that_says_enough_is_a_client_and_letters_are_followed_by_the_next(tiny_data, model):
    task = Shakespeare(model, least_letters=500, hidden=8).load(0)
    texts = [role.text for role in corpora.shakespeare_by_role()]
    letters = sorted(set("".join(texts)))
    for client, text in enumerate([texts[3], texts[1], texts[0]]):  # those who say most first
        found = []
        for examples in (task.train, task.test):
            x, y = examples.of_client(client)
            found += [("".join(letters[i] for i in a), "".join(letters[i] for i in b)) for a, b in zip(x, y)]  # noqa: B905
        starts = range(0, (len(text) - 1) // 80 * 80, 80)
        assert sorted(found) == sorted((text[i : i + 80], text[i + 1 : i + 81]) for i in starts)
    assert task.num_clients == 3
    assert task.model(task.train.x[:2]).shape == (2, 80, len(letters))
    assert Shakespeare(model, least_letters=500, num_clients=2, hidden=8).load(0).num_clients == 2


def test_somebody_must_say_enough(tiny_data):
    with pytest.raises(RecipeError, match="lower least_letters"):
        Shakespeare(least_letters=5000).load(0)


# Settings.


def test_labels_shift_to_ten_groups_and_pictures_turn_to_four(tiny_data):
    task = MNIST("label_shift", num_groups=10, num_clients=20).load(0)
    assert task.group.unique().tolist() == list(range(10))
    with pytest.raises(RecipeError, match="1 to 10, for there are 10 labels"):
        MNIST("label_shift", num_groups=11)


def test_more_roles_than_there_are_are_refused(tiny_data):
    with pytest.raises(RecipeError, match=r"num_clients = 5000, but \d+ roles say"):
        Shakespeare(num_clients=5000, least_letters=240).load(0)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (MNIST, {"num_groups": 5}),
        (MNIST, {"num_clients": 3}),
        (MNIST, {"reduction": 0}),
        (CIFAR10, {"reduction": 1.5}),
        (CIFAR10, {"num_clients": 2000}),
        (CIFAR100, {"num_clients": 15}),
        (CIFAR100, {"samples_per_client": -1}),
        (CIFAR100, {"dropout": 1.0}),
        (FEMNISTDigits, {"test_fraction": 1.0}),
        (FEMNISTDigits, {"width": 12}),
        (Shakespeare, {"least_letters": 100}),
        (Shakespeare, {"hidden": 6}),
        (Shakespeare, {"num_clients": -1}),
        (MNIST, {"hidden": 0}),
    ],
)
def test_senseless_settings_are_refused(recipe, settings):
    with pytest.raises(RecipeError, match=f"(?i){next(iter(settings))}"):
        recipe(**settings)


# The true data.


def test_true_mnist_is_that_of_the_paper(real_data):
    corpus, task = corpora.mnist(), MNIST(reduction=0.05).load(0)
    assert corpus.train.y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert corpus.test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert task.train.count.tolist() == [10] * 300
    assert task.test.count.tolist() == [34] * 100 + [33] * 200
    assert sum(p.numel() for p in task.model.parameters()) == 159_010


def test_true_cifar10_is_that_of_the_paper(real_data):
    corpus, task = corpora.cifar10(), CIFAR10(reduction=0.05).load(0)
    assert corpus.train.y.bincount().tolist() == [5000] * 10
    assert corpus.test.y.bincount().tolist() == [1000] * 10
    assert task.train.count.tolist() == [125] * 20
    assert task.test.count.tolist() == [500] * 20
    assert sum(p.numel() for p in task.model.parameters()) == 87_178
    # The well-known means and deviations come to these after scaling.
    every = corpus.train.x[::7].double() / 255
    assert every.mean((0, 2, 3)).tolist() == pytest.approx(MEAN, abs=2e-3)


def test_true_cifar100_has_eighty_images_a_client(real_data):
    corpus, task = corpora.cifar100(), CIFAR100().load(0)
    assert corpus.train.y.bincount().tolist() == [80] * 100
    assert task.train.count.tolist() == [80] * 100
    assert task.test.count.tolist() == [20] * 100
    assert sum(p.numel() for p in task.model.parameters()) == 1_264_388


def test_true_natural_partitions_are_as_large_as_told(real_data):
    written = corpora.femnist_digits()
    assert (len(written.writer), written.writer.bincount().min(), written.writer.bincount().max()) == (
        5997,
        454,
        544,
    )
    roles = corpora.shakespeare_by_role()
    assert len(roles) == 1352
    assert Shakespeare(num_clients=5, hidden=8).load(0).num_clients == 5
