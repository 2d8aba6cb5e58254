"""What a workload in Python needs to be quiesced: it is asked to freeze before a cut, told to thaw behind it, and can
say itself that a moment is good. README.md beside this file says how to get the modules that this one imports.

Whatever ends a session thaws the workload: a service that dies never leaves it frozen.
"""

import ipaddress
import queue
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import grpc
from tidemark.capture.v1.capture_pb2 import AttachRequest, Frozen, Hello, Hint, Refused
from tidemark.capture.v1.capture_pb2_grpc import CoherenceStub

# How long the workload is held frozen without hearing from the service, in seconds.
HOLD_MAX = 30.0
# A connection that is dead this long is noticed, and the workload thawed.
KEEPALIVE_MS = 5000
OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
]


class Gone(Exception):
    """The session has ended: attach again."""


class Workload:
    """What is frozen and thawed. Volumes are named as they were to Agent."""

    def freeze(self, volume, seconds):
        """Makes the volume's content complete, flushes it, and holds still until thaw. Returns within that many
        seconds; an exception refuses, and is the reason that the generation tells."""
        raise NotImplementedError

    def thaw(self, volume):
        """Goes on. Comes after each freeze, also after one that failed, and at the beginning of each session: a process
        that was killed may have left the volume frozen. Does no harm where it isn't."""
        raise NotImplementedError


class Files(NamedTuple):
    """Says who the agent is, and whom it trusts, where the service asks (docs/SECURITY.md); read anew for each session."""

    # CAs that the service's certificate must be of: https needs it.
    ca: str | None = None
    # The agent's certificate with its chain, and its key; both or neither.
    cert: str | None = None
    key: str | None = None
    # The agent's token, in place of a certificate.
    token: str | None = None


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def connect(address, files):
    """A channel to "https://HOST:PORT", or to "http://HOST:PORT" of this machine. Raises ValueError or OSError where the
    address or a file can't be used."""
    url = urlsplit(address)
    if url.scheme == "http":
        if not is_loopback(url.hostname):
            raise ValueError(f"{address} is another machine, and the connection would be plain text: write https")
        return grpc.insecure_channel(url.netloc, options=OPTIONS)
    if url.scheme != "https":
        raise ValueError(f"{address} is no address of a capture service: write https://HOST:PORT or http://HOST:PORT")
    if files.ca is None:
        raise ValueError(f"{address} needs the CAs that its certificate must be of")
    if (files.cert is None) != (files.key is None):
        raise ValueError("a certificate and its key go together")
    ca, key, cert = (None if name is None else Path(name).read_bytes() for name in (files.ca, files.key, files.cert))
    return grpc.secure_channel(url.netloc, grpc.ssl_channel_credentials(ca, key, cert), options=OPTIONS)


class Agent:
    """One session with the capture service at `address` ("https://HOST:PORT", "http://HOST:PORT"), as the one who quiesces
    these volumes. Raises as `connect` does."""

    def __init__(self, address, name, volumes, workload, files=Files()):
        self._metadata = []
        if files.token is not None:
            self._metadata.append(("authorization", "Bearer " + Path(files.token).read_text().strip()))
        self._channel = connect(address, files)
        self._hello = Hello(name=name, volumes=volumes)
        self._workload = workload
        # What is to be sent: None is the end.
        self._out = queue.SimpleQueue()
        # What was received: None is the end.
        self._inbox = queue.SimpleQueue()
        self._hints = {}
        self._lock = threading.Lock()
        self._ended = False

    def serve(self, attached=lambda: None):
        """Freezes and thaws as the service asks, until the session ends; raises grpc.RpcError or Gone then, always.
        The workload has been thawed. `attached` is called once the service knows the agent."""
        for volume in self._hello.volumes:
            self._workload.thaw(volume)
        # Volume, and until when it is held, by the number of the freeze.
        held = {}
        call = CoherenceStub(self._channel).Attach(iter(self._out.get, None), metadata=self._metadata)
        self._send(hello=self._hello)
        reader = threading.Thread(target=self._read, args=(call,), daemon=True)
        reader.start()
        try:
            self._answer(held, attached)
        finally:
            for volume, _ in held.values():
                self._workload.thaw(volume)
            with self._lock:
                self._ended = True
                for answer in self._hints.values():
                    answer.put(None)
            self._out.put(None)
            call.cancel()
            self._channel.close()

    def hint(self, volume, hold):
        """Says that the volume's content is complete and flushed now. The caller holds still until this returns, for at
        most `hold` seconds. Gives what became of it: `cut`, `coherence`, `reason`. Raises Gone where the session has
        ended, or nothing was heard in time."""
        answer = queue.SimpleQueue()
        with self._lock:
            if self._ended:
                raise Gone("the session has ended: attach again")
            number = len(self._hints) + 1
            self._hints[number] = answer
        self._send(hint=Hint(hint_id=number, volume=volume, hold_ms=int(hold * 1000)))
        try:
            done = answer.get(timeout=hold)
        except queue.Empty:
            done = None
        if done is None:
            raise Gone("nothing was heard of the hint: go on, and try again later")
        return done

    def _send(self, **message):
        self._out.put(AttachRequest(**message))

    def _read(self, call):
        try:
            for message in call:
                self._inbox.put(message)
            self._inbox.put(Gone("the capture service ended the session: attach again"))
        except grpc.RpcError as error:
            self._inbox.put(error)

    def _next(self, timeout):
        """None when nothing came in time."""
        try:
            message = self._inbox.get(timeout=max(timeout, 0))
        except queue.Empty:
            return None
        if isinstance(message, Exception):
            raise message
        return message

    def _answer(self, held, attached):
        while True:
            first = min((until, number) for number, (_, until) in held.items()) if held else None
            message = self._next(first[0] - time.monotonic() if first else HOLD_MAX)
            if message is None:
                if first and first[0] <= time.monotonic():
                    volume, _ = held.pop(first[1])
                    self._workload.thaw(volume)
                    self._refuse(first[1], "it was held frozen for too long")
                continue
            kind = message.WhichOneof("message")
            if kind == "welcome":
                attached()
            elif kind == "freeze":
                self._freeze(message.freeze, held)
            elif kind == "thaw" and message.thaw.freeze_id in held:
                volume, _ = held.pop(message.thaw.freeze_id)
                self._workload.thaw(volume)
            elif kind == "done" and message.done.hint_id in self._hints:
                self._hints[message.done.hint_id].put(message.done)

    def _freeze(self, asked, held):
        # Until it has ended nothing else is heard; a freeze that the service no longer wants is thawed right after.
        try:
            self._workload.freeze(asked.volume, asked.deadline_ms / 1000)
        except Exception as error:  # whatever it is, the others must not stay frozen for it
            self._workload.thaw(asked.volume)
            self._refuse(asked.freeze_id, str(error) or type(error).__name__)
            return
        held[asked.freeze_id] = (asked.volume, time.monotonic() + HOLD_MAX)
        self._send(frozen=Frozen(freeze_id=asked.freeze_id))

    def _refuse(self, freeze_id, reason):
        self._send(refused=Refused(freeze_id=freeze_id, reason=reason))
