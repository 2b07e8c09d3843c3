"""What is fuzzed: every function that reads what somebody else wrote, with inputs that it takes, and ways to spoil them.

An input is bytes. A target takes it through the very functions that a receiver calls, and must either take it or
raise the error of its boundary; anything else is a finding.
"""

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import tomli_w
import torch
from safetensors.torch import save
from torch import nn

from umbel import tree
from umbel.adapters import AdapterPlan
from umbel.adapters.lora_folders import _read as read_adapter
from umbel.clients import Examples
from umbel.errors import DataError, DeployError, RecipeError, RunFolderError, UmbelError, WireError
from umbel.flower.answers import Uploads, scores_in
from umbel.flower.arriving import most_bytes, put_together
from umbel.flower.facts import Figure, Number, fact, facts_of_node
from umbel.flower.fingerprint import fingerprint
from umbel.flower.letters import letters
from umbel.flower.node import Inbox, node_of
from umbel.flower.post import KINDS, content_of, opened
from umbel.flower.roster import Roster
from umbel.flower.wire import Facts, Parts, packed, unpacked
from umbel.flower.work import NodeSettings, Site, received
from umbel.folder import Checkpoint, RunFolder, read_lines
from umbel.methods import FLoRAL
from umbel.onboarding import read_client
from umbel.recipe import Recipe, load, read
from umbel.rounds import start
from umbel.runs import restored
from umbel.schedule import Schedule
from umbel.secure import messages as masks
from umbel.secure.settings import Secure
from umbel.tables import read_run
from umbel.tasks import TASKS, Task
from umbel.train import LocalTraining
from umbel.weighting import Weighting

RUN = "0123456789abcdef"
CLIENTS = (0, 1, 2)
MOST = most_bytes(3, 4096, 3)
Draw = Random


@dataclass(frozen=True)
class Target:
    """A function that reads what somebody else wrote."""

    name: str
    valid: tuple[bytes, ...]
    take: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    spoil: Callable[[bytes, Draw], bytes]  # knows the format; gives what the function will see as its own


@dataclass(frozen=True)
class Tiny:
    """Three clients, a model of two layers."""

    base: str = "tiny"

    def load(self, seed: int) -> Task:
        draw = torch.Generator().manual_seed(0)
        clients = [(torch.randn(6, 4, generator=draw), torch.arange(6) % 3) for _ in CLIENTS]
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        return Task("tiny", module, "cross_entropy", Examples.of(clients), Examples.of(clients))


@dataclass(frozen=True)
class Both:
    """A server and a node in the middle of a run, and what they have told each other."""

    recipe: Recipe
    task: Task
    forms: Uploads
    site: Site
    hello: tuple[Facts, Parts]
    letter: tuple[Facts, Parts]  # to train
    introduced: tuple[Facts, Parts]
    uploads: tuple[Facts, Parts]
    scores: tuple[Facts, Parts]


def both(folder: Path) -> Both:
    """A server and a node that have gone through a round of each kind of question."""
    TASKS["tiny"] = Tiny
    method = FLoRAL(num_adapters=2, adapter=AdapterPlan(rank=2), local=LocalTraining(batch_size=3))
    recipe = Recipe("floral", Tiny(), method, Schedule(rounds=3))
    task = recipe.task.load(0)
    cohort, at = start(task, method, recipe.schedule, replace(recipe.engine, mode="looped"))
    forms = Uploads(cohort, at.shared, at.store.fresh(1))
    site = Site(NodeSettings("ward", "0-2", str(folder / "state")))
    table = {key: value for key, value in recipe.table().items() if key != "engine"}
    hello: Facts = {"recipe": table, "label": "floral", "fingerprint": fingerprint(recipe.task, task, at.shared)}
    hello["run"] = RUN
    introduced = site.answer("hello", hello, {})
    moved = tree.map_tensors(lambda leaf: leaf + 1 if leaf.is_floating_point() else leaf, at.shared)
    ((_, _, facts, parts),) = letters(cohort, at.shared, moved, dict.fromkeys(CLIENTS, 1), np.array(CLIENTS), ())
    letter = facts | {"run": RUN, "round": 1, "weights": {str(client): 6.0 for client in CLIENTS}}, parts
    uploads, scores = site.answer("train", *letter), site.answer("evaluate", *letter)
    for answer in (introduced, uploads, scores):
        if "refused" in answer[0]:
            raise SystemExit(str(answer[0]["refused"]))
    return Both(recipe, task, forms, site, (hello, {}), letter, introduced, uploads, scores)


# Messages as Flower's objects, in a container of ours: MessagePack of [name, content], the message's own last.


def objects_of(facts: Facts, parts: Parts, kind: str) -> list[tuple[str, bytes]]:
    """What Flower takes a message with this content apart into."""
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_task_id", "_node_id"):  # of which Flower's processes have one each
        setattr(TaskIdentity, name, 1)
    message = Message(content_of(facts, parts), 1, KINDS[kind])
    return [(name, one.deflate()) for name, one in get_all_nested_objects(message).items()]


def wrapped(objects: Iterable[tuple[str, bytes]]) -> bytes:
    return msgspec.msgpack.encode(list(objects))


def unwrapped(content: bytes) -> list[tuple[str, bytes]]:
    return msgspec.msgpack.decode(content, type=list[tuple[str, bytes]])


def as_message(content: bytes, who: str) -> tuple[Facts, Parts]:
    """The facts and parts of wrapped objects, by the way that a message takes in a real run."""
    try:
        objects = unwrapped(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"the container itself is spoilt: {error}") from None
    held = dict(objects)
    message = put_together((name for name, _ in objects), held.__getitem__, MOST)
    if message.has_error():
        raise WireError("an error came")
    return opened(message.content, who)


# What the server does with answers, and the node with questions.


def take_introduction(rule: Weighting, facts: Facts) -> object:
    told = facts_of_node(facts, "node 'ward'", len(CLIENTS))
    roster = Roster()
    if why := roster.entered(1, told, [1]):
        raise WireError(why)
    return roster.weights(rule, np.array(told["clients"], dtype=np.int64))


def take_uploads(forms: Uploads, facts: Facts, parts: Parts) -> object:
    fact(facts, "seconds", Figure, "node 'ward'")
    found, wrong = forms.opened("node 'ward'", CLIENTS, forms.first, 1, parts, dict.fromkeys(CLIENTS, 6.0))
    if wrong:
        raise WireError(str(next(iter(wrong.values()))))
    # What is taken must be of use: its sums are those of the round.
    return [forms.cohort.method.contribution(upload) for upload in found.values()]


def take_question(site: Site, kind: str, facts: Facts, parts: Parts) -> object:
    """As Site.answer, but for the training itself, which a spoilt message must not reach."""
    if kind == "train":
        try:
            work = site._work(kind, facts)
        except UmbelError as error:
            raise WireError(str(error)) from None
        fact(facts, "round", Number, "the server")
        weights = fact(facts, "weights", dict[str, Figure], "the server")
        return [fact(weights, str(client), Figure, "the server") for client, _ in received(work, facts, parts)]
    answer, _ = site.answer(kind, facts, parts)
    if why := answer.get("refused") or answer.get("failed"):
        raise WireError(str(why))
    return answer


@dataclass(frozen=True)
class Masked:
    """A node whose clients have advertised their keys in a secure sum."""

    site: Site
    pages: dict[Path, bytes]  # what its clients remember
    letter: tuple[Facts, Parts]  # to share secrets

    def take(self, facts: Facts, parts: Parts) -> object:
        """The question, as the first after the keys."""
        for path, page in self.pages.items():
            path.write_bytes(page)
        return take_question(self.site, "share", facts, parts)

    def take_page(self, content: bytes) -> object:
        """What a client remembers."""
        path = next(iter(self.pages))
        path.write_bytes(content)
        return next(iter(self.site.works.values())).protection.vault.state(0)  # type: ignore[union-attr]


def masked(pair: Both, folder: Path) -> Masked:
    """A node in a run with masks."""
    recipe = replace(pair.recipe, schedule=Schedule(rounds=3, secure=Secure("masks")))
    table = {key: value for key, value in recipe.table().items() if key != "engine"}
    site = Site(NodeSettings("ward", "0-2", str(folder / "masked")))
    facts: Facts = {"recipe": table, "label": "floral", "fingerprint": pair.hello[0]["fingerprint"], "run": RUN}
    told, _ = site.answer("hello", facts, {})
    if "refused" in told:
        raise SystemExit(str(told["refused"]))
    about: Facts = {"run": RUN, "clients": list(CLIENTS), "about": "train", "round": 1}
    _, said = site.answer("advertise", about, {})
    keys = {client: masks.unpacked(masks.Advertised, said[f"advertise/{client}"]) for client in CLIENTS}
    parts = {f"share/{client}": masks.packed(masks.Roster(b"x" * 16, keys, 2)) for client in CLIENTS}
    pages = {path: path.read_bytes() for path in sorted((folder / "masked" / RUN).glob("secret-*.msgpack"))}
    return Masked(site, pages, (about, parts))


# Ways to spoil.

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    0.5, -0.0, 1e308, float("nan"), float("inf"),
)  # fmt: skip
THINGS: tuple[Any, ...] = (
    *NUMBERS, "", "a", "\0", "\x1b[2J", "../../etc/passwd", "é" * 300, "9" * 5000, "F32", "U8", "BOOL", "F4",
    None, True, False, [], {}, [0], [[]], [0, 0], {"a": 1}, [1] * 1000,
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 40, b"null", b"[" * 2000, b'{"a":' * 1500, b'"', b"\\ud800",
    b"\0", b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 10**8), b"__metadata__",
)  # fmt: skip


def spoilt_bytes(content: bytes, draw: Draw) -> bytes:
    """Some of the bytes changed, left out, doubled or put in."""
    spoilt = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(spoilt) + 1)
        end = min(len(spoilt), at + draw.choice((1, 1, 2, 4, 8, 64)))
        match draw.randrange(7):
            case 0 if at < len(spoilt):
                spoilt[at] ^= 1 << draw.randrange(8)
            case 1:
                spoilt[at:end] = draw.randbytes(end - at)
            case 2:
                del spoilt[at:end]
            case 3:
                spoilt[at:at] = spoilt[at:end] * draw.choice((1, 2, 50))
            case 4:
                spoilt[at:end] = draw.choice(TOKENS)
            case 5:
                spoilt[at:at] = draw.choice(TOKENS)
            case _:
                del spoilt[at:]
    return bytes(spoilt)


def spoilt_value(value: Any, draw: Draw) -> Any:
    """One place in the lists and tables changed."""
    if draw.random() < 0.15:
        return draw.choice(THINGS)
    if isinstance(value, dict) and value:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {own: leaf for own, leaf in value.items() if own != key}
            case 1:
                return value | {str(draw.choice(THINGS)): draw.choice(THINGS)}
            case 2:
                return {(own if own != key else f"{key}x"): leaf for own, leaf in value.items()}
            case _:
                return value | {key: spoilt_value(value[key], draw)}
    if isinstance(value, list) and value:
        at = draw.randrange(len(value))
        match draw.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value * draw.choice((2, 2, 100))
            case 2:
                return value[::-1]
            case _:
                return [*value[:at], spoilt_value(value[at], draw), *value[at + 1 :]]
    return draw.choice(THINGS)


def deep(draw: Draw) -> bytes:
    """JSON of lists or tables in one another."""
    depth = draw.choice((50, 900, 5000, 200_000))
    return b"[" * depth + b"]" * depth if draw.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth


def many(draw: Draw) -> bytes:
    """JSON of so many values that they take more memory than they are long."""
    return b"[" + b",".join([draw.choice((b"[]", b"{}", b"1234", b'""'))] * draw.choice((1000, 200_000))) + b"]"


def spoilt_json(content: bytes, draw: Draw) -> bytes:
    if draw.random() < 0.4:
        return spoilt_bytes(content, draw)
    if draw.random() < 0.05:
        key = json.dumps(draw.choice([*json.loads(content), "more"])).encode()
        return b'{"more":' + key + b"," + key + b":" + draw.choice((deep, many))(draw) + b"}"
    if draw.random() < 0.1:
        return content[:-1] + b"," + content[1:]  # every name twice
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = spoilt_value(value, draw)
    return json.dumps(value).encode()


def spoilt_lines(content: bytes, draw: Draw) -> bytes:
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = spoilt_json(lines[at], draw)
    return b"\n".join(lines) + b"\n" * draw.randrange(2)


def spoilt_toml(content: bytes, draw: Draw) -> bytes:
    if draw.random() < 0.5:
        return spoilt_bytes(content, draw)
    if draw.random() < 0.05:
        return (
            content
            + b"\n"
            + draw.choice((b"a=" + deep(draw)[:4000], b".".join([b"a"] * draw.choice((1000, 2000, 3000))) + b"=1"))
        )
    import tomllib

    value = spoilt_value(tomllib.loads(content.decode()), draw)
    try:
        return tomli_w.dumps(value).encode()
    except (TypeError, AttributeError, ValueError):  # TOML knows no null, and a document is a table
        return spoilt_bytes(content, draw)


def parts_of(content: bytes) -> tuple[bytes, bytes]:
    """A safetensors header without its length, and the bytes after it."""
    length = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + length], content[8 + length :]


def spoilt_tensors(content: bytes, draw: Draw) -> bytes:
    """Safetensors with something wrong in the header, whose own length is right, or in the numbers."""
    if len(content) < 8 or draw.random() < 0.2:
        return spoilt_bytes(content, draw)
    header, body = parts_of(content)
    if draw.random() < 0.3 and body:
        at = draw.randrange(len(body))
        wrong = draw.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff" * 8, b"", b"\0" * 64))
        body = body[: at - at % 4] + wrong + body[at - at % 4 + draw.choice((4, len(wrong))) :]
    else:
        header = spoilt_json(header, draw)
    return struct.pack("<Q", len(header)) + header + body


def spoilt_objects(content: bytes, draw: Draw) -> bytes:
    """Flower's objects, with one of them spoilt, or their order, or what is in one."""
    objects = unwrapped(content)
    at = draw.randrange(len(objects))
    name, own = objects[at]
    head, _, body = own.partition(b"\0")
    match draw.randrange(8):
        case 0:
            objects[at] = name, spoilt_bytes(own, draw)
        case 1:
            objects[at] = name, spoilt_bytes(head, draw) + b"\0" + body
        case 2:
            objects.pop(at)
        case 3:
            objects[at] = name, objects[draw.randrange(len(objects))][1]
        case 4:
            objects.insert(at, (hashlib.sha256(own).hexdigest(), own))
        case 5 if b'"arraychunk_ids"' in body:  # a few bytes that stand for many
            told = json.loads(body) | {"arraychunk_ids": [0] * draw.choice((2, 10_000, 300_000))}
            objects[at] = name, head + b"\0" + json.dumps(told).encode()
        case 6 if body.startswith(b"{"):
            objects[at] = name, head + b"\0" + spoilt_json(body, draw)
        case _:
            objects[at] = name, head + b"\0" + spoilt_bytes(body, draw)
    return wrapped(objects)


def spoilt_message(kind: str) -> Callable[[bytes, Draw], bytes]:
    """Spoils facts or tensors inside a message, which Flower then puts together without any trouble."""

    def spoil(content: bytes, draw: Draw) -> bytes:
        if draw.random() < 0.3:
            return spoilt_objects(content, draw)
        facts, parts = as_message(content, "")
        told = json.dumps(facts).encode()
        named = {name: part for name, part in parts.items() if part}
        if named and draw.random() < 0.6:
            name = draw.choice(list(named))
            spoilt = spoilt_page if kind == "share" else spoilt_tensors
            parts = parts | {name: spoilt(parts[name], draw)}
        else:
            told = spoilt_json(told, draw)
        return wrapped(objects_with(told, parts, kind))

    return spoil


def objects_with(told: bytes, parts: Parts, kind: str) -> list[tuple[str, bytes]]:
    """As `objects_of`, with facts that need not be JSON."""
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    content = content_of({}, parts)
    content.config_records["umbel"]["facts"] = told.decode("utf-8", "replace")
    return [
        (name, one.deflate()) for name, one in get_all_nested_objects(Message(content, 1, KINDS[kind])).items()
    ]


def spoilt_npz(content: bytes, draw: Draw) -> bytes:
    """An archive with headers that claim what is not there, or members that should not be."""
    if draw.random() < 0.4:
        return spoilt_bytes(content, draw)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name in archive.namelist():
            member = archive.read(name)
            match draw.randrange(5):
                case 0:
                    shape = draw.choice(
                        (b"(1000000000000,)", b"(-1,)", b"(0, 9223372036854775807)", b"()", b"(7,)")
                    )
                    kind = draw.choice((b"'|O'", b"'<f4'", b"'<U9'", b"[('a', '<f8')]", b"'>f8'", b"'<M8[s]'"))
                    header = b"{'descr': " + kind + b", 'fortran_order': False, 'shape': " + shape + b", }"
                    header += b" " * (-(len(header) + 11) % 64) + b"\n"
                    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + member[-8:]
                case 1:
                    member = spoilt_bytes(member, draw)
                case 2 if draw.random() < 0.05:
                    member += bytes(1 << 22)
            made.writestr(name, member)
    return out.getvalue()


def spoilt_pack(content: bytes, draw: Draw) -> bytes:
    """A message of a secure sum; its first byte says which."""
    if draw.random() < 0.5:
        return content[:1] + spoilt_bytes(content[1:], draw)
    if draw.random() < 0.1:
        return content[:1] + draw.choice((b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"))
    value = spoilt_value(msgspec.msgpack.decode(content[1:]), draw)
    try:
        return content[:1] + msgspec.msgpack.encode(value)
    except OverflowError:
        return content[:1] + spoilt_bytes(content[1:], draw)


def spoilt_page(content: bytes, draw: Draw) -> bytes:
    return spoilt_pack(b"\0" + content, draw)[1:]


# The targets.

KINDS_OF_MASKS: tuple[type, ...] = (
    masks.Advertised, masks.Roster, masks.Sealed, masks.Delivery, masks.Masked, masks.Question, masks.Shown,
    masks.ClientState,
)  # fmt: skip


def mask_messages() -> tuple[bytes, ...]:
    """One of each kind."""
    own = masks.Advertised(1, b"s" * 32, b"m" * 32)
    share = (1, b"h" * 16)
    whole = (
        own,
        masks.Roster(b"x" * 16, {1: own, 2: own}, 2),
        masks.Sealed(1, {2: b"b" * 68}, b"c" * 32),
        masks.Delivery({2: b"b" * 68}),
        masks.Masked(1, b"v" * 64),
        masks.Question((1, 2), (3,)),
        masks.Shown(1, {2: share}, {3: share}),
        masks.ClientState(
            1, b"s" * 16, b"m" * 16, masks.Roster(b"x" * 16, {1: own}, 1), b"o" * 16, {2: (share, share)}
        ),
    )
    return tuple(bytes([place]) + masks.packed(message) for place, message in enumerate(whole))


def take_mask(content: bytes) -> object:
    return masks.unpacked(KINDS_OF_MASKS[(content[0] if content else 0) % len(KINDS_OF_MASKS)], content[1:])


def targets(folder: Path) -> list[Target]:
    """All of them; what they need on disk lies in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = both(folder)
    forms, site, hidden = pair.forms, pair.site, masked(pair, folder)
    other = Site(replace(site.settings, state=str(folder / "other")))  # whose recipe is spoilt, and kept

    def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        def take(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return take

    def message(name: str, told: tuple[Facts, Parts], kind: str, use: Callable[[Facts, Parts], object]) -> Target:
        valid = wrapped(objects_of(*told, kind))
        return Target(
            name, (valid,), lambda c: use(*as_message(c, "node 'ward'")), (WireError,), spoilt_message(kind)
        )

    large = objects_of({"seconds": 1.0}, {"uploads": bytes(1 << 21)}, "train")

    found = [
        message("answer to hello", pair.introduced, "hello", lambda f, _: take_introduction(forms.cohort.weighting, f)),
        message("uploads", pair.uploads, "train", lambda f, p: take_uploads(forms, f, p)),
        message("scores", pair.scores, "evaluate", lambda _, p: scores_in(p, 3, True, 2, "node 'ward'")),
        message("question: train", pair.letter, "train", lambda f, p: take_question(site, "train", f, p)),
        message("question: hello", pair.hello, "hello", lambda f, p: take_question(other, "hello", f, p)),
        message("question: share", hidden.letter, "share", hidden.take),
        Target("secrets kept", tuple(hidden.pages.values()), hidden.take_page, (WireError,), spoilt_page),
        Target(
            "Flower's objects",
            (wrapped(large), wrapped(objects_of(*pair.uploads, "train"))),
            lambda c: as_message(c, "node 'ward'"),
            (WireError,),
            spoilt_objects,
        ),
        Target(
            "tensors of a message",
            (pair.uploads[1]["uploads"], pair.scores[1]["scores"], save({"b": torch.tensor([True]), "e": torch.zeros(0, 3)})),
            lambda c: unpacked(c, "node 'ward'"),
            (WireError,),
            spoilt_tensors,
        ),
        Target("secure sums", mask_messages(), take_mask, (WireError,), spoilt_pack),
    ]  # fmt: skip
    kept = next(iter(site.works.values())).kept
    state = (kept.folder / "client-000000.safetensors").read_bytes()
    fresh = replace(kept, folder=folder / "kept")

    def take_state(_path: Path) -> object:
        return replace(fresh, rows={}).latest(0)

    cohort_start = start(pair.task, pair.recipe.method, pair.recipe.schedule, pair.recipe.engine)
    seen = {"seen": torch.arange(2)} | {f"shared/{n}": leaf for n, leaf in tree.tensors(forms.first).items()}
    seen |= {
        f"private/{n}": leaf.repeat(2, *[1] * (leaf.dim() - 1)) for n, leaf in tree.tensors(forms.fresh).items()
    }

    def take_checkpoint(path: Path) -> object:
        content = path.read_bytes()
        listing = {"round": 1, "sha256": hashlib.sha256(content).hexdigest(), "identity": "it"}
        (path.parent / "000001.json").write_text(json.dumps(listing))
        checkpoint, _ = RunFolder(path.parents[1], "it").latest()
        return restored(replace(cohort_start[1]), checkpoint, path) if isinstance(checkpoint, Checkpoint) else None

    def take_listing(path: Path) -> object:
        return RunFolder(path.parents[1], "it").latest()

    (folder / "listed/checkpoints").mkdir(parents=True, exist_ok=True)
    whole = packed(seen)
    (folder / "listed/checkpoints/000001.safetensors").write_bytes(whole)
    listing = {"round": 1, "sha256": hashlib.sha256(whole).hexdigest(), "identity": "it"}

    run = folder / "run"
    run.mkdir(exist_ok=True)
    table = pair.recipe.table()
    facts = {"identity": "it", "task": "tiny", "num_clients": 3, "chunk": 1, "schedule": table | {}}
    lines = [{"round": r, "loss": 0.5, "accuracy": 50.0, "seconds": 0.1} for r in (1, 2, 3)]
    texts = {
        "run.json": json.dumps(facts).encode(),
        "recipe.toml": tomli_w.dumps(table).encode(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "onboard.json": json.dumps({"round": 3, "metric": "accuracy", "ways": {}}).encode(),
    }
    for name, text in texts.items():
        (run / name).write_bytes(text)

    def take_part_of_run(name: str) -> Callable[[bytes], object]:
        def take(content: bytes) -> object:
            (run / name).write_bytes(content)
            try:
                return read_run(run), read_lines(run / "metrics.jsonl")
            finally:
                (run / name).write_bytes(texts[name])

        return take

    spoils = {".json": spoilt_json, ".toml": spoilt_toml, ".jsonl": spoilt_lines}
    found += [
        Target(f"run folder: {name}", (text,), take_part_of_run(name), (RunFolderError, RecipeError), spoils[Path(name).suffix])
        for name, text in texts.items()
    ]  # fmt: skip

    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"], "rank_pattern": {}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    names = {
        "base_model.model.0.lora_A.weight": torch.ones(2, 4),
        "base_model.model.0.lora_B.weight": torch.ones(5, 2),
    }
    data = {"x": np.ones((6, 4), np.float32), "y": np.arange(6)}
    archive = io.BytesIO()
    np.savez_compressed(archive, **data)  # type: ignore[arg-type]
    recipe = tomli_w.dumps({key: value for key, value in table.items() if key != "engine"}).encode()
    settings = (
        b'name = "ward"\nsuperlink = "here:1"\nclients = "0-2"\nstate = "state"\nthreads = 1\ninsecure = true\n'
    )

    from flwr.common.serde import message_to_proto

    letter = put_together((n for n, _ in large), dict(large).__getitem__, MOST)
    found += [
        Target("private state", (state,), in_file("kept/client-000000.safetensors", take_state), (WireError,), spoilt_tensors),
        Target("checkpoint", (whole,), in_file("saved/checkpoints/000001.safetensors", take_checkpoint), (RunFolderError,), spoilt_tensors),
        Target("checkpoint's listing", (json.dumps(listing).encode(),), in_file("listed/checkpoints/000001.json", take_listing), (RunFolderError,), spoilt_json),
        Target("adapter's tensors", (save(names),), in_file("adapter/adapter_model.safetensors", lambda p: read_adapter(p.parent)), (RecipeError,), spoilt_tensors),
        Target("client's file (npz)", (archive.getvalue(),), in_file("client.npz", read_client), (DataError,), spoilt_npz),
        Target("client's file (safetensors)", (save({k: torch.from_numpy(v) for k, v in data.items()}),), in_file("client.safetensors", read_client), (DataError,), spoilt_tensors),
        Target("recipe", (recipe,), in_file("recipe.toml", lambda p: read(load(p), "floral")), (RecipeError,), spoilt_toml),
        Target("node's settings", (settings,), in_file("node.toml", node_of), (DeployError, RecipeError), spoilt_toml),
        Target("node's inbox", (message_to_proto(letter).SerializeToString(),), in_file("inbox", lambda p: Inbox(p).message(1)), (UmbelError,), spoilt_bytes),
    ]  # fmt: skip
    return found


# Messages that are surely malformed.


def malformed(target: Target, draw: Draw) -> tuple[str, bytes]:
    """How a valid message was spoilt so that nobody may take it, and the message.

    Args:
        target: one of those that read a message: "uploads", "scores", "question: train", "answer to hello",
            "question: hello".
        draw: of what is spoilt.
    """
    content = target.valid[0]
    kind = {"uploads": "train", "scores": "evaluate", "question: train": "train"}.get(target.name, "hello")
    facts, parts = _valid(content)
    part = draw.choice([name for name, own in parts.items() if own] or [""])
    how = draw.choice(OF_OBJECTS + (OF_TENSORS if part else ()) + OF_FACTS)
    if how == "facts too many" and draw.random() < 0.9:  # it takes its time
        how = "no JSON"
    if how in OF_OBJECTS:
        return how, wrapped(_without(unwrapped(content), how, draw))
    told = json.dumps(facts)
    if how in OF_TENSORS:
        parts = parts | {part: _claiming(parts[part], how, draw)}
    else:
        told = _told(facts, target.name, how, draw)
    return how, wrapped(objects_with(told.encode(), parts, kind))


@cache
def _valid(content: bytes) -> tuple[Facts, Parts]:
    return as_message(content, "")


OF_OBJECTS = (
    "object missing",
    "object cut short",
    "object of another class",
    "object's head spoilt",
    "bomb of chunks",
)
OF_TENSORS = (
    "bytes cut off", "bytes too many", "header too long", "name twice", "name unknown", "type changed",
    "type unknown", "axis added", "shape overflows", "place moved", "NaN", "infinity", "tensor missing", "deep header",
)  # fmt: skip
OF_FACTS = (
    "no JSON",
    "facts no table",
    "facts too deep",
    "facts too many",
    "fact missing",
    "fact of another type",
)


def _without(objects: list[tuple[str, bytes]], how: str, draw: Draw) -> list[tuple[str, bytes]]:
    at = draw.randrange(len(objects))
    name, own = objects[at]
    head, _, body = own.partition(b"\0")
    match how:
        case "object missing":
            return objects[:at] + objects[at + 1 :]
        case "object cut short":
            # Of a body without a length of its own the last byte may be missed by nobody: the first is cut as well.
            objects[at] = name, own[1 : -draw.randrange(1, len(own) - 1)]
        case "object of another class":
            others = [kind for kind in (b"Array", b"Context", b"RecordDict") if not head.startswith(kind)]
            objects[at] = name, b" ".join([draw.choice(others), *head.split(b" ")[1:]]) + b"\0" + body
        case "object's head spoilt":
            objects[at] = name, draw.choice((head + b" 1", head.replace(b" ", b""), b"\xff" + head)) + b"\0" + body
        case "bomb of chunks":
            _, _, body = objects[-1][1].partition(b"\0")
            held = _bomb(draw.choice((2_000, 10_000, 16_000, 300_000)))
            return [*held, _object("Message", [held[-1][0]], body)]
    return objects


@cache
def _bomb(times: int) -> tuple[tuple[str, bytes], ...]:
    """A record with an array of so many times the same 64 KiB."""
    chunk = _object("ArrayChunk", [], Random(times).randbytes(1 << 16))
    told = {"dtype": "uint8", "shape": [1], "stype": "safetensors", "arraychunk_ids": [0] * times}
    array = _object("Array", [chunk[0]], json.dumps(told).encode())
    arrays = _object("ArrayRecord", [array[0]], json.dumps({"uploads": array[0]}).encode())
    return chunk, array, arrays, _object("RecordDict", [arrays[0]], json.dumps({"tensors": arrays[0]}).encode())


def _object(kind: str, children: list[str], body: bytes) -> tuple[str, bytes]:
    own = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return hashlib.sha256(own).hexdigest(), own


def _claiming(content: bytes, how: str, draw: Draw) -> bytes:
    header, body = parts_of(content)
    told = json.loads(header)
    told.pop("__metadata__", None)
    floats = [own for own, entry in told.items() if entry["dtype"] in ("F32", "F64") and 0 not in entry["shape"]]
    name = draw.choice(floats)
    entry = told[name]
    begin, end = entry["data_offsets"]
    match how:
        case "bytes cut off":
            body = body[: -draw.randrange(1, len(body))]
        case "bytes too many":
            body += draw.randbytes(draw.choice((1, 8, 5000)))
        case "header too long":
            length = draw.choice((len(content), 10**8, 2**31, 2**63, 2**64 - 1))
            return struct.pack("<Q", length) + header + body
        case "name twice":
            text = json.dumps({name: entry})
            header = header.rstrip()[:-1] + b"," + text[1:].encode()
            return struct.pack("<Q", len(header)) + header + body
        case "name unknown":
            told = {(f"{own}{draw.randrange(99)}" if own == name else own): value for own, value in told.items()}
        case "type changed":
            entry["dtype"] = "I32" if entry["dtype"] == "F32" else "I64"
        case "type unknown":
            entry["dtype"] = draw.choice(("F4", "F8_E8M0", "C64", "O", "", None, 7, "float32"))
        case "axis added":
            entry["shape"] = draw.choice(([1, *entry["shape"]], [*entry["shape"], 1]))
        case "shape overflows":
            entry["shape"] = draw.choice(
                ([2**62, 4], [0, 2**62, 2**62], [-1], [2**64], [1.0], [1] * 100, [10**12])
            )
        case "place moved":
            entry["data_offsets"] = draw.choice(
                ([begin + 4, end + 4], [end, begin], [0, 2**63], [begin, end, end], [begin])
            )
        case "NaN" | "infinity":
            number = float("nan" if how == "NaN" else "inf") * draw.choice((1, -1))
            size = 4 if entry["dtype"] == "F32" else 8
            at = begin + size * draw.randrange((end - begin) // size)
            body = body[:at] + struct.pack("<f" if size == 4 else "<d", number) + body[at + size :]
        case "tensor missing":
            # Any but the last: what follows it is then out of its place.
            if len(told) > 1 and end < len(body):
                del told[name]
            else:
                body = body[: begin + 1]
        case "deep header":
            header = b'{"a":' + b"[" * draw.choice((2000, 100_000))
            return struct.pack("<Q", len(header)) + header + body
    header = json.dumps(told).encode()
    return struct.pack("<Q", len(header)) + header + body


TOO_MANY = '{"a":[' + ",".join(["[]"] * 270_000) + "]}"
NEEDED = {
    "uploads": ("seconds",),
    "question: train": ("run", "round", "weights", "clients", "unchanged"),
    "question: hello": ("run", "recipe", "label", "fingerprint"),
    "answer to hello": ("name", "clients", "examples", "fingerprint"),
}


def _told(facts: Facts, name: str, how: str, draw: Draw) -> str:
    match how:
        case "no JSON":
            return draw.choice(("", "{", '{"a": }', json.dumps(facts)[:-1], "\0", json.dumps(facts) + "x"))
        case "facts no table":
            return draw.choice(("[]", "1", '"a"', "null", "NaN", json.dumps([facts])))
        case "facts too deep":
            depth = draw.choice((1_100, 5_000, 100_000) if draw.random() < 0.1 else (1_100, 5_000))
            return '{"a":' + "[" * depth + "]" * depth + "}"
        case "facts too many":
            return TOO_MANY
    needed = draw.choice(NEEDED.get(name, ("",)))
    if not needed:
        return "{"  # scores say nothing in words
    if how == "fact missing":
        return json.dumps({key: value for key, value in facts.items() if key != needed})
    wrong: Any = draw.choice((None, -1, [], {}, [[]], 1e400, 10**30, "\x1b[2J" * 99, [None], {"a": None}, True))
    if type(wrong) is type(facts[needed]) and wrong in ([], {}):
        wrong = None
    return json.dumps(facts | {needed: wrong})
