"""What others wrote is taken, or refused by the error of its boundary: spoilt inputs and claims too large."""

import json
import re
import struct
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

pytest.importorskip("flwr", reason="flwr is not installed")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from flwr.app import Metadata
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

import fuzz_targets
from fuzz_targets import both, malformed, objects_of, spoilt_bytes, targets, unwrapped, wrapped
from umbel.errors import DataError, DeployError, RecipeError, RunFolderError, UmbelError, WireError
from umbel.flower.answers import scores_in
from umbel.flower.arriving import messages, put_together
from umbel.flower.facts import facts_of_node
from umbel.flower.node import node_of
from umbel.flower.post import opened
from umbel.flower.wire import packed, unpacked
from umbel.flower.work import NodeSettings, check_allowed
from umbel.folder import read_json
from umbel.onboarding import read_client
from umbel.recipe import Recipe, load, read
from umbel.secure import messages as masks
from umbel.secure.secrets import usable
from umbel.tasks import TASKS
from umbel.untrusted import arrays_of, plain, table_in, tensors_in, toml_in

MESSAGES = ("uploads", "scores", "question: train", "question: hello", "answer to hello")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    known = dict(TASKS)
    yield {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}
    TASKS.clear()
    TASKS.update(known)


@pytest.fixture(scope="module")
def pair(every, tmp_path_factory):
    return both(tmp_path_factory.mktemp("pair"))


def check(every, per_target, seed):
    """Gives each target so many spoilt inputs: whatever it refuses it refuses by its own error."""
    draw = Random(seed)
    for target in every.values():
        refused = 0
        for content in target.valid:
            target.take(content)
        for _ in range(per_target):
            content = draw.choice(target.valid)
            for _ in range(draw.choice((1, 1, 2))):
                try:
                    content = target.spoil(content, draw)
                except Exception:  # it has no format any more
                    content = spoilt_bytes(content, draw)
            try:
                target.take(content)
            except target.refuses:
                refused += 1
        # Lines of figures end where the first is spoilt, and a spoilt inbox is empty.
        assert refused or target.name in ("run folder: metrics.jsonl", "node's inbox"), target.name


def check_malformed(every, number, seed):
    draw = Random(seed)
    for place in range(number):
        target = every[MESSAGES[place % len(MESSAGES)]]
        how, content = malformed(target, draw)
        with pytest.raises(WireError):
            raise AssertionError(how, target.take(content))


def test_spoilt_inputs_are_taken_or_refused(every):
    check(every, 15, seed=3)


def test_malformed_messages_are_refused(every):
    check_malformed(every, 200, seed=3)


@pytest.mark.slow
def test_many_spoilt_inputs_are_taken_or_refused(every):
    check(every, 400, seed=4)


@pytest.mark.slow
def test_many_malformed_messages_are_refused(every):
    check_malformed(every, 5000, seed=4)


# Bytes of any kind.


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_tensors_or_refused(content):
    try:
        tensors_in(content)
    except ValueError as error:
        assert str(error)  # noqa: PT017


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "__metadata__", "b"]), json_values), st.binary(max_size=16))
def test_any_header_is_of_the_bytes_after_it_or_refused(header, body):
    text = json.dumps(header).encode()
    try:
        found = tensors_in(struct.pack("<Q", len(text)) + text + body)
    except ValueError:
        return
    assert sum(leaf.nbytes for leaf in found.values()) == len(body)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["clients", "name", "examples", "fingerprint", "slots"]), json_values))
def test_whoever_says_anything_is_no_node(told):
    with pytest.raises(WireError):
        raise AssertionError(facts_of_node(told, "node 'ward'", 5))


# Claims that are too large, one by one.


def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(1,), places=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(places)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 1 << 63), "its header would have"),
        (safetensors(b"[]"), "no JSON object"),
        (safetensors({"a": entry(shape=[1 << 40], places=[0, 1 << 42])}, bytes(4)), "tensors have"),
        (safetensors({"a": entry(shape=[0, 1 << 61, 1 << 61], places=[0, 0])}), "too large"),
        (safetensors({"a": entry(shape=[2])}, bytes(4)), "not of 4 bytes"),
        (safetensors({"a": entry(places=[4, 8])}, bytes(8)), "begins at byte 4"),
        (safetensors({"a": entry(), "b": entry()}, bytes(4)), "begins at byte 0"),
        (safetensors({"a": entry()}, bytes(5)), "5 are there"),
        (safetensors({"a": entry(shape=[1] * 17)}, bytes(4)), "no shape"),
        (safetensors({"a": entry(shape=[1.0])}, bytes(4)), "no shape"),
        (safetensors({"a": entry(shape=[True])}, bytes(4)), "no shape"),
        (safetensors({"a": entry("F8_E4M3", [4])}, bytes(4)), "of the type 'F8_E4M3'"),
        (safetensors({"a": entry("BOOL", [4])}, b"\0\1\2\0"), "others than 0 and 1"),
        (safetensors(b'{"a":1,"a":1}'), "'a' is in it twice"),
        (safetensors(b'{"a":' + b"[" * 100_000), "too deep"),
        (safetensors(b'{"a":NaN}'), "NaN is no number"),
        (safetensors({"__metadata__": {"a": 1}}), "metadata"),
    ],
)
def test_tensors_that_claim_what_is_not_there(content, told):
    with pytest.raises(ValueError, match=told):
        tensors_in(content)
    with pytest.raises(WireError, match=told) if content else pytest.raises(AssertionError):
        raise AssertionError(unpacked(content, "node 'ward'"))


def test_tensors_come_in_the_order_of_the_header():
    tensors = {f"{place}": torch.full((place,), place) for place in (3, 1, 2)} | {"b": torch.tensor([True, False])}
    found = tensors_in(save(tensors))
    assert {name: leaf.tolist() for name, leaf in found.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert list(found) == list(tensors_in(save(tensors)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a":[' + "[]," * 300_000 + "1]}", "lists and tables"),
        ('{"a":[' + "1," * 3_000_000 + "1]}", "values"),
        ('{"a":1e999}', "1e999 is no number"),
        ('{"a":' * 200 + "1" + "}" * 200, "too deep"),
        ('{"a":' + "9" * 5000 + "}", "4300"),
        (b'{"a":"\xff"}', "utf-8"),
        ("[1]", "no JSON object"),
        ('{"a":"' + "x" * (17 << 20) + '"}', "bytes"),
    ],
    ids=lambda text: str(text)[:12],
)
def test_tables_that_would_take_more_than_they_are_long(text, told):
    with pytest.raises(ValueError, match=told):
        table_in(text)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, ".".join("a" * 5000) + " = 1", "x = '" + "y" * (1 << 21) + "'"]
)
def test_recipes_that_would_take_more_than_they_are_long(text, tmp_path):
    with pytest.raises(ValueError, match=r"too deep|points|bytes"):
        toml_in(text)
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.toml cannot be read"):
        load(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    "table",
    [
        {"task": {"name": {}}, "method": {"fedavg": {}}},
        {"task": {"name": "digits"}, "method": {"fedavg": {"name": [1]}}},
        {"task": {"name": "digits"}, "method": {"fedavg": {"like": {}}}},
        {"task": {"name": "digits"}, "method": {"fedavg": {}, "other": True}},
        {"seed": 1 << 63, "task": {"name": "digits"}, "method": {"fedavg": {}}},
        {"task": {"name": "digits"}, "method": {"fedavg": {"local": {"steps": -(10**5000)}}}},
    ],
)
def test_names_and_numbers_in_recipes_that_are_none(table):
    with pytest.raises(RecipeError, match=r"method|task|64 are the most"):
        read(table, "fedavg")


def test_settings_that_are_too_deep_to_be_shown(tmp_path):
    (tmp_path / "node.toml").write_text('superlink = "here:1"\n' + ".".join("a" * 1500) + " = 1")
    with pytest.raises(DeployError, match="too deep"):
        node_of(tmp_path / "node.toml")


def test_recipes_that_are_too_deep():
    table = {}
    for _ in range(500):
        table = {"a": table}
    with pytest.raises(RecipeError, match="32 deep"):
        read({"local": table}, "fedavg")


def npz(path, members, header=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content if header is None else header + content)
    return path


def array_header(descr, shape):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (array_header("'|O'", "(1,)"), "of the type object"),
        (array_header("'<f4'", "(1000000000000,)"), "not of 8 bytes"),
        (array_header("'<f4'", "(-2,)"), "not of 8 bytes"),
        (array_header("[('a', '<f8')]", "(1,)"), "of the type"),
        (array_header("'<f4'", "(2,"), "cannot be read"),
        (b"\x93NUMPY\x03\x00", "of the format"),
        (b"\x80\x04N.", "magic"),
    ],
)
def test_arrays_that_claim_what_is_not_there(header, told, tmp_path):
    path = npz(tmp_path / "client.npz", [("x.npy", bytes(8))], header)
    with pytest.raises(DataError, match=f"client.npz cannot be read.*{told}"):
        read_client(path)


def test_archives_that_are_far_longer_than_they_look(tmp_path, monkeypatch):
    monkeypatch.setattr("umbel.untrusted.UNPACKED_BYTES", 1 << 16)
    header = array_header("'|u1'", f"({1 << 20},)")
    with pytest.raises(ValueError, match="are read at most"):
        arrays_of(npz(tmp_path / "bomb.npz", [("x.npy", bytes(1 << 20))], header))


def test_an_archive_with_a_name_twice(tmp_path):
    content = array_header("'|u1'", "(2,)") + bytes(2)
    with zipfile.ZipFile(tmp_path / "client.npz", "w") as archive:
        archive.writestr("x.npy", content)
        archive.writestr("x", content)
    with pytest.raises(DataError, match="'x' is in it twice"):
        read_client(tmp_path / "client.npz")


def test_good_arrays_are_read(tmp_path):
    given_arrays = {"x": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "y": np.array([1, 2], np.uint8)}
    np.savez_compressed(tmp_path / "client.npz", **given_arrays)
    (x, y), test = read_client(tmp_path / "client.npz")
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert y.tolist() == [1, 2]
    assert test is None


def test_what_is_shown_is_one_short_line():
    assert plain("a\x1b[2Jb\nc" + "d" * 500) == "a [2Jb c" + "d" * 292 + "…"


# Flower's objects.


def taken(objects, most=1 << 20):
    return put_together((name for name, _ in objects), dict(objects).__getitem__, most)


def test_a_chunk_that_is_named_a_thousand_times_is_not_put_together_as_often():
    objects = objects_of({}, {"uploads": bytes(2_000_000)}, "train")
    assert taken(objects, 4_000_000).content.array_records["tensors"]["uploads"].data == bytes(2_000_000)
    with pytest.raises(WireError, match="more than 1048576 bytes"):
        taken(objects)
    place = next(place for place, (_, own) in enumerate(objects) if own.startswith(b"Array "))
    name, own = objects[place]
    head, _, body = own.partition(b"\0")
    told = json.loads(body) | {"arraychunk_ids": [0] * 1000}
    objects[place] = name, head + b"\0" + json.dumps(told).encode()
    with pytest.raises(WireError, match="put together it would have 2000"):
        taken(objects, 4_000_000)


def test_objects_that_are_no_message():
    objects = objects_of({}, {"uploads": b"abc"}, "train")
    for wrong, told in (
        (objects[:-1], "no Message"),
        (objects[1:], "a part of it is missing"),
        ([(name, own.replace(b"ConfigRecord", b"Context", 1)) for name, own in objects], "no class"),
        ([(name, own.split(b"\0")[0]) for name, own in objects], "no class"),
        (
            [(name, own[:-3] + b"xyz" if own.startswith(b"Message") else own) for name, own in objects],
            "put it together",
        ),
    ):
        with pytest.raises(WireError, match=told):
            taken(wrong)
    with pytest.raises(WireError, match="16384 are taken at most"):
        put_together(map(str, range(20_000)), str.encode, 1)


class FakeLink:
    """A SuperLink with one answer."""

    def __init__(self, objects, metadata, there=True):
        self.objects, self.metadata, self.there, self.confirmed = objects, metadata, there, []

    def PullMessages(self, request):
        names = [name for name, _ in self.objects]
        tree = ObjectTree(object_id=names[-1], children=[ObjectTree(object_id=name) for name in names[:-1]])
        message = ProtoMessage(metadata=metadata_to_proto(self.metadata))
        return PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree])

    def PullObject(self, request):
        content = dict(self.objects)[request.object_id]
        return PullObjectResponse(object_found=True, object_available=self.there, object_content=content)

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


def answer_through(objects, most=1 << 20, there=True, asked="asked"):
    """What the server has of an answer to "asked", by the words of the SuperLink."""
    made = Metadata(1, objects[-1][0], 5, 1, asked, "", 1.0, 60.0, "train")
    grid = HttpGrid(token="token")
    grid.set_run(Run.create_empty(1))
    grid._client = FakeLink(objects, made, there)
    (found,) = messages(grid, ["asked"], most)
    assert grid._client.confirmed == [objects[-1][0]]
    return found


def test_answers_come_through_the_superlink_by_its_own_word(every, monkeypatch):
    objects = objects_of({"seconds": 1.0}, {"uploads": b"abc"}, "train")
    asked = taken(objects).metadata.reply_to_message_id
    assert opened(answer_through(objects, asked=asked).content, "") == ({"seconds": 1.0}, {"uploads": b"abc"})
    monkeypatch.setattr("umbel.flower.arriving.STALLED", -1.0)
    for wrong, told in (
        (answer_through(objects, 10, asked=asked), "has more than 10 bytes"),
        (answer_through(objects[1:], asked=asked), "a part of it is missing"),
        (answer_through(objects, asked="another"), "answers another message"),
        (answer_through(objects, there=False, asked=asked), "nothing more of it has come"),
    ):
        assert wrong.has_error()
        assert told in wrong.error.reason
        assert wrong.metadata.reply_to_message_id in (asked, "another")


def test_wrapping_changes_nothing():
    objects = objects_of({"a": 1}, {"uploads": b"abc"}, "train")
    assert unwrapped(wrapped(objects)) == objects


# What an upload says of itself.


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("weight", lambda leaf: leaf * 1000, "counts itself as .*6000.*lets it count 6"),
        ("weight", lambda leaf: -leaf, "counts itself"),
        ("route_examples", lambda leaf: -leaf, "route_examples is below 0"),
        ("route_examples", lambda leaf: leaf + 100, "routes more examples than it has"),
        ("sent", lambda leaf: leaf + 7, "sends the adapters .*7.*of 2"),
        ("sent", torch.zeros_like, "sends the adapters .*0, 0"),
    ],
)
def test_claims_are_held_against_what_the_server_knows(name, change, told, pair):
    tensors = unpacked(pair.uploads[1]["uploads"], "")
    tensors = {own: leaf for own, leaf in tensors.items() if own.startswith("0/")}
    found, wrong = pair.forms.opened(
        "node 'ward'", [0], pair.forms.first, 1, {"uploads": packed(tensors)}, {0: 6.0}
    )
    assert (list(found), wrong) == ([0], {})
    spoilt = {"uploads": packed(tensors | {f"0/{name}": change(tensors[f"0/{name}"])})}
    found, wrong = pair.forms.opened("node 'ward'", [0], pair.forms.first, 1, spoilt, {0: 6.0})
    assert found == {}
    assert wrong[0].reason == "malformed"
    assert re.search(told, str(wrong[0]))


def test_an_upload_that_is_not_finite_is_no_reason_for_a_trial(pair):
    before, tensors = pair.forms.pattern, unpacked(pair.uploads[1]["uploads"], "")
    own = {name: leaf * torch.nan if leaf.is_floating_point() else leaf for name, leaf in tensors.items()}
    found, wrong = pair.forms.opened("node 'ward'", [0, 1, 2], pair.forms.first, 1, {"uploads": packed(own)}, {})
    assert (found, {trouble.reason for trouble in wrong.values()}) == ({}, {"not finite"})
    assert pair.forms.pattern is before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors | {"loss": tensors["loss"].bfloat16()}, "loss is not of the 3 tests"),
        (lambda tensors: tensors | {"loss": tensors["loss"] * torch.nan}, "loss holds NaN"),
        (lambda tensors: {"loss": tensors["loss"]}, "lack the accuracy"),
        (lambda tensors: tensors | {"more": tensors["loss"]}, "where loss, accuracy, mixture are known"),
        (lambda tensors: tensors | {"loss": tensors["loss"] - 1e3}, r"loss is not between 0 and 1e\+30"),
        (lambda tensors: tensors | {"loss": tensors["loss"] * 1e300}, r"loss is not between 0 and 1e\+30"),
        (lambda tensors: tensors | {"accuracy": tensors["accuracy"] + 200}, "accuracy is not between 0 and 100"),
        (lambda tensors: tensors | {"mixture": tensors["mixture"].double() * -1e300}, "mixture is not between 0"),
        (lambda tensors: tensors | {"mixture": tensors["mixture"] / 2}, "do not sum to 1"),
        (lambda tensors: tensors | {"mixture": tensors["mixture"][:, :1]}, "has 1 shares, where 2 were expected"),
    ],
)
def test_scores_that_are_none(change, told, pair):
    tensors = unpacked(pair.scores[1]["scores"], "")
    with pytest.raises(WireError, match=told):
        scores_in({"scores": packed(change(tensors))}, 3, True, 2, "node 'ward'")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"examples": [1 << 80]}, "for 'examples'"),
        ({"examples": [1, 2]}, "says 'examples' of 2"),
        ({"clients": [7]}, "its clients are 7"),
        ({"clients": [0, 0], "examples": [1, 1]}, "its clients are 0, 0"),
        ({"name": "x" * 1000}, "for 'name'"),
        ({"slots": [1, 2]}, "says 'slots' of 2"),
        ({"label_counts": [[-1]]}, "for 'label_counts'"),
    ],
)
def test_introductions_that_make_no_sense(told, why):
    facts = {"name": "ward", "clients": [0], "examples": [5], "fingerprint": {}}
    assert facts_of_node(facts, "node 'ward'", 5) == facts
    with pytest.raises(WireError, match=why):
        facts_of_node(facts | told, "node 'ward'", 5)


# Other boundaries.


def test_a_recipe_from_the_network_names_no_path(pair):
    recipe = pair.recipe
    check_allowed(NodeSettings(), recipe)
    for base in ("/etc/models", "~/models", "../models", "a/../../b"):
        wrong = Recipe("floral", replace(recipe.task, base=base), recipe.method, recipe.schedule)
        with pytest.raises(RecipeError, match="its owner has not let in"):
            check_allowed(NodeSettings(), wrong)


def test_messages_of_secure_sums_are_bounded():
    for wrong in (
        {"client": -1, "values": b""},
        {"client": 1 << 40, "values": b""},
        {"client": 1},
    ):
        with pytest.raises(WireError, match="these bytes are no Masked"):
            masks.unpacked(masks.Masked, fuzz_targets.msgspec.msgpack.encode(wrong))
    with pytest.raises(WireError, match="no Masked"):
        masks.unpacked(masks.Masked, b"\x83\xa6client\x01\xa6values\xc4\x00\xa1x" + b"\x91" * 100_000)
    with pytest.raises(WireError, match="no Advertised"):
        masks.unpacked(masks.Advertised, masks.packed(masks.Advertised(1, b"short", b"m" * 32)))


def test_a_key_that_nobody_can_agree_with():
    assert not usable(bytes(32))
    assert usable(b"\x09" + bytes(31))


def test_a_json_file_that_is_too_long_is_not_read_whole(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(RunFolderError, match="bytes"):
        read_json(tmp_path / "run.json")
    assert issubclass(RunFolderError, UmbelError)
