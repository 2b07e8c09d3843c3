"""Public data sets as tensors, read from files of one folder or from the Hugging Face hub.

The folder is $UMBEL_DATA, or `umbel/data` in the user's cache. Images lie in `images/`: arrays as npz and
npy.xz, colour images as lossless WebP sheets with 100 tiles a row; texts lie in `text/` as parquet.

A corpus is read once in a process and then shared: nobody may write to its tensors.
"""

import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from umbel.errors import DataError

TILES = 100  # images in a row of a sheet
WRITERS = 12  # of FEMNIST, in the folder


@dataclass(frozen=True)
class Images:
    """Images and their labels."""

    x: Tensor  # (N, channels, height, width) uint8
    y: Tensor  # (N,) int64


@dataclass(frozen=True)
class Corpus:
    """A data set with a test set of its own."""

    train: Images
    test: Images


@dataclass(frozen=True)
class WrittenImages:
    """Images of which each has a writer."""

    images: Images
    writer: Tensor  # (N,) int64, 0 … writers − 1


@dataclass(frozen=True)
class Role:
    """All that one character of one play says, speech after speech."""

    name: str  # "play/character"
    text: str


def data_folder() -> Path:
    """The folder that corpora are read from: $UMBEL_DATA, or `umbel/data` in the user's cache."""
    named = os.environ.get("UMBEL_DATA")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "umbel" / "data"


def mnist() -> Corpus:
    """MNIST (LeCun et al. 1998): 60,000 and 10,000 digits, 1 × 28 × 28, in the official order.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    return _mnist(data_folder())


def cifar10() -> Corpus:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 photographs, 3 × 32 × 32, of 10 classes.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    return _cifar10(data_folder())


def cifar100() -> Corpus:
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine labels: photographs, 3 × 32 × 32.

    The folder's file has 10,000 of the 60,000 images, 80 and 20 a class, split by itself and not as
    officially; the hub has all of them, 500 and 100 a class.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    return _cifar100(data_folder())


def femnist_digits(num_writers: int = WRITERS) -> WrittenImages:
    """Digits of FEMNIST (Caldas et al. 2018), 1 × 28 × 28, by those who wrote most; paper is white, 255.

    The folder has 5,997 images of 12 writers; more, up to 3,597, are to be had from the hub only.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub.
    """
    return _femnist_digits(data_folder(), num_writers)


def shakespeare_by_role() -> tuple[Role, ...]:
    """The 37 plays of Shakespeare, 1,352 characters with all that each of them says, ordered by name.

    The hub has LEAF's (Caldas et al. 2018), 1,129 characters whose speeches are not told apart.

    Raises:
        DataError: it is neither in the folder nor to be had from the hub, or pyarrow is not installed.
    """
    return _shakespeare(data_folder())


def shakespeare_by_speech() -> tuple[Role, ...]:
    """The folder's `shakespeare_by_role`, with a line end between speeches.

    Raises:
        DataError: it is not in the folder, or pyarrow is not installed.
    """
    return _shakespeare_by_role(data_folder())


def hub_split(name: str, config: str | None, split: str, missing: DataError) -> Any:
    """A data set of the Hugging Face hub, which `datasets` keeps in a cache of its own.

    Args:
        name: on the hub.
        config: which of its parts, if it has several.
        split: as the hub calls it.
        missing: why the hub is asked.

    Raises:
        DataError: `datasets` is not installed, the hub cannot be reached, or it has no such data.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{missing}, or pip install umbel[hf] to get {name} from the Hugging Face hub") from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{missing}; nor can {name} be had from the Hugging Face hub: {error}") from error


@lru_cache(maxsize=1)
def _mnist(folder: Path) -> Corpus:
    try:
        files = _paths(
            folder, "images/mnist_x_train.npy.xz", "images/mnist_x_test.npy.xz", "images/mnist_labels.npz"
        )
    except DataError as missing:
        return _from_hub("ylecun/mnist", "image", "label", missing)
    train, test, labels = files
    y = _npz(labels, "y_train", "y_test")
    return Corpus(_images(_npy_xz(train)[:, None], y[0]), _images(_npy_xz(test)[:, None], y[1]))


@lru_cache(maxsize=1)
def _cifar10(folder: Path) -> Corpus:
    rest = [f"images/cifar10_train_rest_{part}.webp" for part in range(3)]
    names = ["images/cifar10_labels.npz", "images/cifar10_train_rest_labels.npz", "images/cifar10_test.webp"]
    try:
        files = _paths(folder, *names, "images/cifar10_train20k.webp", *rest)
    except DataError as missing:
        return _from_hub("uoft-cs/cifar10", "img", "label", missing)
    (first_y, test_y), (rest_y,) = _npz(files[0], "train20k_y", "test_y"), _npz(files[1], "train_rest_y")
    train = np.concatenate([_sheet(path) for path in files[3:]])
    return Corpus(_images(train, np.concatenate([first_y, rest_y])), _images(_sheet(files[2]), test_y))


@lru_cache(maxsize=1)
def _cifar100(folder: Path) -> Corpus:
    try:
        files = _paths(folder, "images/cifar100_10k.webp", "images/cifar100_10k_labels.npz")
    except DataError as missing:
        return _from_hub("uoft-cs/cifar100", "img", "fine_label", missing)
    x, (y, is_test) = _sheet(files[0]), _npz(files[1], "fine", "is_test")
    held = is_test.astype(bool)
    return Corpus(_images(x[~held], y[~held]), _images(x[held], y[held]))


@lru_cache(maxsize=1)
def _femnist_digits(folder: Path, num_writers: int) -> WrittenImages:
    try:
        files = _paths(folder, "images/femnist_digits12.npz")
        if num_writers > WRITERS:
            raise DataError(
                f"the data folder {folder} has {WRITERS} writers of FEMNIST: take num_writers = {WRITERS}"
            )
    except DataError as missing:
        return _femnist_from_hub(num_writers, missing)
    x, y, writer = _npz(files[0], "x", "y", "client")
    places, own = _busiest(writer, num_writers)
    return WrittenImages(_images(x[places, None], y[places]), own)


def _busiest(writer: np.ndarray, num_writers: int) -> tuple[np.ndarray, Tensor]:
    """Where the images of those with most are, and whose each is, by number in the order of the names."""
    names, count = np.unique(writer, return_counts=True)
    chosen = np.sort(names[np.argsort(-count, kind="stable")[:num_writers]])
    places = np.flatnonzero(np.isin(writer, chosen))
    return places, torch.from_numpy(np.searchsorted(chosen, writer[places]).astype(np.int64))


@lru_cache(maxsize=1)
def _shakespeare(folder: Path) -> tuple[Role, ...]:
    try:
        return _shakespeare_by_role(folder)
    except DataError as missing:
        return _shakespeare_from_hub(missing)


@lru_cache(maxsize=1)
def _shakespeare_by_role(folder: Path) -> tuple[Role, ...]:
    files = _paths(folder, "text/shakespeare_by_role.parquet")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{files[0]} needs pyarrow to be read: pip install umbel[data]") from error
    with readable(files[0]):
        columns = parquet.read_table(files[0]).to_pydict()
        rows = sorted(zip(columns["play"], columns["ord"], columns["role"], columns["speech"], strict=True))
    speeches: dict[str, list[str]] = {}
    for play, _, role, speech in rows:
        speeches.setdefault(f"{play}/{role}", []).append(speech)
    return tuple(Role(name, "\n".join(own)) for name, own in sorted(speeches.items()))


def _paths(folder: Path, *names: str) -> list[Path]:
    """The paths of the named files. Raises DataError where one of them is missing."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{', '.join(missing)} not in the data folder {folder}; set UMBEL_DATA to the folder that has it"
        )
    return [folder / name for name in names]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """For what reads a file that is there, but may be damaged, cut short, or the pointer to another one.

    Raises:
        DataError: it cannot be read, or lacks something.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read, fetch it again ({type(error).__name__}: {error})") from error


def _images(x: np.ndarray, y: np.ndarray) -> Images:
    return Images(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)))


def _npy_xz(path: Path) -> np.ndarray:
    with readable(path), lzma.open(path) as file:
        return np.lib.format.read_array(cast(Any, file), allow_pickle=False)


def _npz(path: Path, *names: str) -> list[np.ndarray]:
    """The named arrays of an npz file."""
    arrays = []
    with readable(path), zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as file:
                arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    return arrays


def _sheet(path: Path) -> np.ndarray:
    """(N, 3, 32, 32) uint8: the tiles of a sheet, row by row."""
    from PIL import Image

    with readable(path), Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        tiles = pixels.reshape(-1, 32, TILES, 32, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, 32, 32)


def _from_hub(name: str, image: str, label: str, missing: DataError) -> Corpus:
    parts = []
    for split in ("train", "test"):
        rows = hub_split(name, None, split, missing)
        x = np.stack([np.asarray(picture) for picture in rows[image]])
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        parts.append(_images(x, np.asarray(rows[label])))
    return Corpus(*parts)


def _femnist_from_hub(num_writers: int, missing: DataError) -> WrittenImages:
    rows = hub_split("flwrlabs/femnist", None, "train", missing)
    character, writer = np.asarray(list(rows["character"])), np.asarray(list(rows["writer_id"]))
    digits = np.flatnonzero(character < 10)  # "0" to "9" come before the letters
    if (known := len(np.unique(writer[digits]))) < num_writers:
        raise DataError(f"FEMNIST has {known} writers of digits; lower num_writers = {num_writers}")
    among, own = _busiest(writer[digits], num_writers)
    places = digits[among]
    x = np.stack([np.asarray(picture.convert("L")) for picture in rows.select(places.tolist())["image"]])
    return WrittenImages(_images(x[:, None], character[places]), own)


def _shakespeare_from_hub(missing: DataError) -> tuple[Role, ...]:
    """LEAF's windows of 80 letters, each one letter further than the last, put together again."""
    rows = hub_split("flwrlabs/shakespeare", None, "train", missing)
    pieces: dict[str, list[str]] = {}
    before = None
    for role, window, following in zip(rows["character_id"], rows["x"], rows["y"], strict=True):
        of = pieces.setdefault(role, [])
        if (role, window) != before:  # another text of the role begins
            of.append(window)
        of.append(following)
        before = (role, window[1:] + following)
    return tuple(Role(name, "".join(own)) for name, own in sorted(pieces.items()))
