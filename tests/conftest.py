"""One thread, so that suites on a shared machine do not fight over cores; no network; and data sets to read."""

import lzma
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's products, and the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here is not waited for
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np
import pytest
import torch
from PIL import Image

from umbel.tasks.corpora import data_folder

torch.set_num_threads(1)
os.fsync = lambda file: None  # no test cuts the power, and a disk takes longer to be sure than most tests take


@pytest.fixture(scope="session")
def real_data():
    """The folder with the true data sets, or else the test is skipped."""
    folder = data_folder()
    if not (folder / "images" / "mnist_labels.npz").exists():
        pytest.skip(f"no data sets in {folder}; set UMBEL_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_data_folder(tmp_path_factory):
    """Data sets of noise, in the format of the true ones and with the same classes."""
    import small_texts

    folder = tmp_path_factory.mktemp("data")
    draw = np.random.Generator(np.random.Philox(key=0))
    images, text = folder / "images", folder / "text"
    images.mkdir()
    small_texts.write_texts(folder)
    small_texts.write_base(folder / "models" / "stories260K")
    small_texts.write_vit(folder / "models" / "vit")

    def sheet(name, count):
        rows = count // 100
        pixels = draw.integers(0, 256, (rows * 32, 3200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name, lossless=True)

    for part, count in (("train", 420), ("test", 100)):
        with lzma.open(images / f"mnist_x_{part}.npy.xz", "wb", preset=0) as file:
            np.save(file, draw.integers(0, 256, (count, 28, 28), dtype=np.uint8))
    labels = {f"y_{part}": (np.arange(n) % 10).astype(np.uint8) for part, n in (("train", 420), ("test", 100))}
    np.savez_compressed(images / "mnist_labels.npz", **labels)

    sheet("cifar10_train20k.webp", 200)
    sheet("cifar10_test.webp", 100)
    for part in range(3):
        sheet(f"cifar10_train_rest_{part}.webp", 100)
    y = draw.integers(0, 10, 600, dtype=np.uint8)
    np.savez(images / "cifar10_labels.npz", train20k_y=y[:200], test_y=y[500:])
    np.savez(images / "cifar10_train_rest_labels.npz", train_rest_y=y[200:500])

    sheet("cifar100_10k.webp", 500)
    fine = (np.arange(500) % 100).astype(np.uint8)
    np.savez(images / "cifar100_10k_labels.npz", fine=fine, is_test=(np.arange(500) >= 400).astype(np.uint8))

    x = draw.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    y, client = (np.arange(60) // 6 % 10).astype(np.uint8), (np.arange(60) % 3).astype(np.uint8)
    np.savez(images / "femnist_digits12.npz", x=x, y=y, client=client)

    from pyarrow import Table, parquet

    def speech(length):
        return "".join(draw.choice(list("abcdefghij ,'"), length))

    said = [
        ("b", "TOM", 1, 300),
        ("a", "ANN", 0, 500),
        ("b", "TOM", 0, 410),
        ("a", "TOM", 1, 700),
        ("a", "X", 2, 9),
    ]
    rows = [{"play": p, "role": r, "ord": o, "speech": speech(n)} for p, r, o, n in said]
    parquet.write_table(Table.from_pylist(rows), text / "shakespeare_by_role.parquet")
    return folder


@pytest.fixture
def tiny_data(tiny_data_folder, monkeypatch):
    """Makes the data sets of noise those that tasks read, and what is kept of them no other's."""
    monkeypatch.setenv("UMBEL_DATA", str(tiny_data_folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_data_folder / "cache"))
    return tiny_data_folder
