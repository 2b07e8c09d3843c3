"""A SuperNode that stays in memory: one process that asks the SuperLink for messages and answers them itself.

To the SuperLink it is a SuperNode like any other: TLS, its own key, heartbeats. It differs from Flower's own in
two ways. Model and data are loaded once, and it looks for messages often while a run goes on: Flower's starts a
process for each message and looks every three seconds. And it runs no app that comes over the network: what is run
is what is installed here.

Whatever dies meanwhile, it goes on: it waits for a SuperLink that is gone, and a node that was killed and is
started again does at once what it had left undone.
"""

import fcntl
import ipaddress
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.errors import DeployError, WireError
from umbel.flower.apps import answered, hear, refusal
from umbel.flower.arriving import put_together
from umbel.flower.exchange import LOG
from umbel.flower.work import NodeSettings, Site, settings_of
from umbel.folder import write
from umbel.untrusted import toml_of

if TYPE_CHECKING:
    from flwr.app import Message

BUSY, IDLE = 0.1, 2.0  # seconds between two looks, in a run and long after one
AGAIN = 1.0  # seconds until a connection that broke is made again
EASE = 4.0  # how many times longer a pause is than the look before it took: a slow server is left in peace
LINK = {"superlink": str, "root_certificates": str, "key": str, "insecure": bool}
"""What a node's file says beside NodeSettings."""


@dataclass(frozen=True)
class Link:
    """How a node reaches the SuperLink."""

    superlink: str  # host:port
    root_certificates: bytes | None  # PEM; None: no TLS
    key: Path | None  # the node's private key, an OpenSSH file


def node_of(path: Path, superlink: str = "") -> tuple[NodeSettings, Link]:
    """What a node's file says; paths in it are seen from its folder. `superlink` goes before the file's.

    Raises:
        DeployError: there is none, it names files that are not there, or a server elsewhere and no certificates.
        RecipeError: a setting is unknown or of the wrong type.
    """
    try:
        table = {name.replace("-", "_"): value for name, value in toml_of(path).items()}
    except (OSError, ValueError) as error:
        raise DeployError(f"{path} cannot be read as a node's settings: {error}") from None
    table |= {"superlink": superlink} if superlink else {}
    if "superlink" not in table:
        raise DeployError(f'{path} has no superlink = "host:port"')
    for name, kind in LINK.items():
        if name in table and type(table[name]) is not kind:
            raise DeployError(f"{path}: {name} = {table[name]!r}, where {kind.__name__} is wanted")
    settings = settings_of({name: value for name, value in table.items() if name not in LINK})
    files: dict[str, Path | None] = {}
    for name in ("root_certificates", "key"):
        value = table.get(name, "")
        files[name] = place = _seen_from(path, value) if value else None
        if place and not place.is_file():
            raise DeployError(f"{path}: {name} = {value!r}, but there is no file {place}")
    if files["root_certificates"] is None and not table.get("insecure") and not _is_here(table["superlink"]):
        raise DeployError(
            f"{path} names no root_certificates: whoever is on the way to {table['superlink']} could read and "
            "change all that is said; name the server's ca.crt, or, where that is meant, write insecure = true"
        )
    paths = ("state", "recipe") if ":" in settings.data else ("state", "recipe", "data")  # or data is a function
    places: dict[str, Any] = {name: str(_seen_from(path, table[name])) for name in paths if table.get(name)}
    certificates = files["root_certificates"]
    link = Link(table["superlink"], certificates.read_bytes() if certificates else None, files["key"])
    return replace(settings, **places), link


def _seen_from(path: Path, named: str) -> Path:
    """The place that a node's file names.

    Raises:
        DeployError: it is in the home of a user that is not there.
    """
    try:
        return path.parent / Path(named).expanduser()
    except RuntimeError as error:
        raise DeployError(f"{path}: {named!r}: {error}") from None


def _is_here(superlink: str) -> bool:
    """Whether host:port is on this machine."""
    host = superlink.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(settings: NodeSettings, link: Link, ended: Callable[[], bool] = lambda: False) -> None:
    """Answers the SuperLink's messages until `ended`, which is asked between two of them.

    Raises:
        DeployError: the key cannot be read, or another process answers for this node.
    """
    hear()
    site, keys = Site(settings), _keys(link.key)
    state = Path(settings.state).expanduser()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(state, settings.name):
        while True:
            _connected(site, link, keys, Inbox(state / "inbox"), ended)
            if ended():
                return
            # Flower's connection keeps errors to itself, but for the log.
            LOG.warning("node %r has lost its connection and makes a new one", settings.name)
            time.sleep(AGAIN)


def _connected(site: Site, link: Link, keys: Any, inbox: "Inbox", ended: Callable[[], bool]) -> None:
    """Answers messages until `ended`, or until the connection breaks."""
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode.fleet_http_connection import http_request_response

    settings, known = site.settings, inbox.path.with_name("node-id")
    _let_go(link, keys, known)
    insecure = link.root_certificates is None
    with http_request_response(link.superlink, insecure, link.root_certificates, keys) as connection:
        node, receive, send, _, _, pull, push, confirm = connection
        write(known, str(node).encode())
        LOG.info("node %r is online at %s, with clients %s", settings.name, link.superlink, settings.clients)
        # The SuperLink gives a message out once: what a process before this one has left undone is done first.
        if (left := inbox.message(node)) is not None:
            LOG.info("node %r goes on with a message that it had not answered", settings.name)
            with suppress(RunNotRunningException):  # nor is anybody waiting for the answer
                _send(_answered(site, left, inbox, pull, confirm), 0.0, send, push)
        inbox.clear()
        pause = BUSY
        while not ended():
            begin = time.perf_counter()
            if (came := receive()) is None:
                time.sleep(max(pause, EASE * (time.perf_counter() - begin)))
                pause = min(pause * 1.02, IDLE)
                continue
            pause = BUSY
            inbox.put(*came)
            begin = time.perf_counter()
            try:
                answer = _answered(site, came[0], inbox, pull, confirm)
                _send(answer, time.perf_counter() - begin, send, push)
            except RunNotRunningException:
                LOG.warning("the run of a message has ended; it is not answered")
            inbox.clear()


def _answered(site: Site, message: "Message", inbox: "Inbox", pull: Any, confirm: Any) -> "Message":
    """The answer to a message, whose content is fetched first if it has yet to come."""
    if not list(message.content):
        try:
            message = _whole(message, inbox.objects(), pull, confirm, site.most)
        except WireError as error:
            return refusal(site, message, f"its message was refused: {error}")
        inbox.put(message)
    return answered(site, message)


def _let_go(link: Link, keys: Any, known: Path) -> None:
    """Tells the SuperLink that the process before this one is no more: else it lets nobody in for a minute."""
    import httpx
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    if keys is None or not known.is_file():
        return
    insecure = link.root_certificates is None
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(*keys),
    ]
    with FleetHttpClient.from_server_address(
        link.superlink, insecure, link.root_certificates, interceptors
    ) as client:
        while True:
            try:
                client.DeactivateNode(DeactivateNodeRequest(node_id=int(known.read_text())))
            except httpx.TransportError as error:
                if "ssl" not in str(error).lower():
                    time.sleep(AGAIN)  # it is not up yet
                    continue
            except (httpx.HTTPError, RuntimeError, ValueError):
                pass  # it knew that already, or is another SuperLink
            return


@contextmanager
def _alone(state: Path, name: str) -> Iterator[None]:
    """Keeps the node's folder to this process; whoever is killed has let go of it."""
    handle = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise DeployError(f"node {name!r}: another process uses {state}; stop it first") from None
    try:
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Inbox:
    """The message that is being answered, on disk: whoever is killed meanwhile answers it when it is back."""

    path: Path

    def put(self, message: "Message", objects: Any = None) -> None:
        """Keeps a message until `clear`; one whose content has yet to come, with the names of what is in it."""
        from flwr.common.serde import message_to_proto

        if objects is not None:
            write(self.path.with_suffix(".objects"), objects.SerializeToString(), secret=True)
        write(self.path, message_to_proto(message).SerializeToString(), secret=True)

    def objects(self) -> Any:
        """What is in a message that came without its content."""
        from flwr.proto.message_pb2 import ObjectTree

        return ObjectTree.FromString(self.path.with_suffix(".objects").read_bytes())

    def message(self, node: int) -> "Message | None":
        """The message that is there, if it was to this node of Flower's."""
        from flwr.common.serde import message_from_proto
        from flwr.proto.message_pb2 import Message as Encoded

        if not self.path.is_file():
            return None
        try:
            message: Any = message_from_proto(Encoded.FromString(self.path.read_bytes()))
            if not list(message.content):
                self.objects()
        except Exception as error:  # of protobuf and of Flower; the server asks again
            LOG.error("%s is damaged and left out (%s)", self.path, error)
            return None
        return message if message.metadata.dst_node_id == node else None

    def clear(self) -> None:
        """Forgets it."""
        for path in (self.path, self.path.with_suffix(".objects")):
            path.unlink(missing_ok=True)


def _whole(message: "Message", objects: Any, pull: Any, confirm: Any, most: int) -> "Message":
    """The message with its content. Raises WireError if it has more bytes than `most`, or is none."""
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    run = message.metadata.run_id
    names = (leaf.object_id for leaf in iterate_object_tree(objects))
    try:
        return put_together(names, lambda one: pull(run, one), most)
    finally:
        confirm(run, message.metadata.message_id)


def _send(answer: "Message", seconds: float, send: Any, push: Any) -> None:
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import push_objects
    from flwr.supercore.run import RunNotRunningException

    answer.metadata.__dict__["_message_id"] = answer.object_id
    try:
        with no_object_id_recompute():
            objects, run = get_all_nested_objects(answer), answer.metadata.run_id
            wanted, session = send(answer, get_object_tree(answer), seconds)
            push_objects(objects, lambda one, content: push(run, session, one, content), object_ids_to_push=wanted)
    except RunNotRunningException:
        LOG.warning("the run has ended; nobody waits for the answer")


def _keys(path: Path | None) -> Any:
    """The node's private and public key, None without a file."""
    if path is None:
        return None
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise DeployError(f"{path} is no private key that can be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeployError(
            f"{path} is no elliptic curve key; make one by ssh-keygen -t ecdsa -b 384 -N '' -f {path}"
        )
    return key, key.public_key()
