"""Processes of one machine that meet at a Unix socket and exchange values and file descriptors.

Rank 0 listens, the others connect, and everything goes through it. The socket's name is abstract (no file is
left behind) and random, so that jobs do not meet each other's; processes of other users are turned away.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tilewright.runtime.errors import DeviceError

_LENGTH = struct.Struct("<Q")
_PEER_CREDENTIALS = struct.Struct("3i")
#: descriptors that one message carries at most (the kernel's SCM_MAX_FD is 253)
_MOST_DESCRIPTORS = 128


def new_address() -> str:
    """A name that no other job has, for one process to choose and all to be told."""
    return f"tilewright-{secrets.token_hex(16)}"


class Rendezvous:
    """The meeting of ``size`` processes. Every method is collective, and DeviceError when a rank is gone.

    ``timeout``: seconds to wait for the others, at the start and in each exchange.
    """

    def __init__(self, rank: int, size: int, address: str, timeout: float = 60.0) -> None:
        if not 0 <= rank < size:
            raise DeviceError(f"Rank {rank} is not one of {size} ranks.")
        self.rank, self.size, self.timeout = rank, size, timeout
        self._name = "\0" + address
        self._peers: dict[int, socket.socket] = {}
        try:
            if rank == 0:
                self._listen(address)
            else:
                self._connect(address)
        except BaseException:
            self.close()
            raise

    # --- meeting ------------------------------------------------------------------------------------------

    def _listen(self, address: str) -> None:
        deadline = time.monotonic() + self.timeout
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(self._name)
            except OSError as error:
                raise DeviceError(
                    f"Another job has the address {address!r}: take one from tw.World.address()."
                ) from error
            listener.listen(self.size)
            while len(self._peers) < self.size - 1:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    missing = [rank for rank in range(1, self.size) if rank not in self._peers]
                    raise DeviceError(
                        f"Rank {', '.join(map(str, missing))} did not come to {address!r} within {self.timeout:g} s."
                    ) from None
                self._admit(peer)

    def _admit(self, peer: socket.socket) -> None:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        if _PEER_CREDENTIALS.unpack(credentials)[1] != os.getuid():
            peer.close()
            return
        peer.settimeout(self.timeout)
        hello, _ = _receive(peer, "a rank")
        rank, size = hello
        complaint = None
        if size != self.size:
            complaint = f"Rank {rank} says that there are {size} ranks, rank 0 that there are {self.size}."
        elif rank in self._peers:
            complaint = f"Two processes say that they are rank {rank}."
        _send(peer, complaint)
        if complaint is not None:
            peer.close()
            raise DeviceError(complaint)
        self._peers[rank] = peer

    def _connect(self, address: str) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            peer.settimeout(self.timeout)
            try:
                peer.connect(self._name)
                break
            except OSError:  # rank 0 does not listen yet
                peer.close()
                if time.monotonic() > deadline:
                    raise DeviceError(
                        f"Rank {self.rank} found nobody at {address!r} within {self.timeout:g} s: rank 0 has not "
                        "started, or was given another address."
                    ) from None
                time.sleep(0.01)
        self._peers[0] = peer
        _send(peer, (self.rank, self.size))
        complaint, _ = _receive(peer, "rank 0")
        if complaint is not None:
            raise DeviceError(complaint)

    # --- exchanges ----------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The values (what JSON can say) of all ranks, by rank, on every rank."""
        return self.gather_descriptors(value, None)[0]

    def gather_descriptors(self, value: Any, descriptor: int | None) -> tuple[list[Any], list[int | None]]:
        """Like `gather`, with a file descriptor of each rank; those received are new ones, for the caller to close."""
        own = [] if descriptor is None else [descriptor]
        if self.rank:
            _send(self._peers[0], value, own)
            (values, holders, complaint), received = _receive(self._peers[0], "rank 0")
            if complaint is not None:
                raise DeviceError(complaint)
            found: list[int | None] = [None] * self.size
            for rank, one in zip(holders, received, strict=True):
                found[rank] = one
            return values, found
        parts = {0: (value, own)}
        try:
            for rank, peer in sorted(self._peers.items()):
                parts[rank] = _receive(peer, f"rank {rank}")
        except DeviceError as error:
            self._tell(str(error))
            raise
        values = [parts[rank][0] for rank in range(self.size)]
        for rank, peer in self._peers.items():
            others = [(r, one) for r in range(self.size) for one in parts[r][1] if r != rank]
            _send(peer, (values, [r for r, _ in others], None), [one for _, one in others])
        return values, [next(iter(parts[r][1]), None) if r else None for r in range(self.size)]

    def _tell(self, complaint: str) -> None:
        """Let the other ranks fail too instead of waiting."""
        for peer in self._peers.values():
            with suppress(DeviceError):
                _send(peer, (None, [], complaint))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather(None)

    def close(self) -> None:
        """Leave. Ranks that still wait for this one are told that it is gone."""
        for peer in self._peers.values():
            with suppress(OSError):
                peer.close()
        self._peers.clear()


def _send(peer: socket.socket, value: Any, descriptors: Sequence[int] = ()) -> None:
    data = json.dumps(value).encode()
    if len(descriptors) > _MOST_DESCRIPTORS:
        raise DeviceError(f"{len(descriptors)} file descriptors do not fit into one message.")
    try:
        # the descriptors travel with the first byte of the length
        socket.send_fds(peer, [_LENGTH.pack(len(data))], list(descriptors))
        peer.sendall(data)
    except OSError as error:
        raise DeviceError(f"Another rank has ended or hangs ({error}): start all ranks again.") from error


def _receive(peer: socket.socket, who: str) -> tuple[Any, list[int]]:
    try:
        header, descriptors, flags, _ = socket.recv_fds(peer, _LENGTH.size, _MOST_DESCRIPTORS)
        header += _exactly(peer, _LENGTH.size - len(header)) if header else b""
        data = _exactly(peer, _LENGTH.unpack(header)[0]) if header else b""
    except TimeoutError as error:
        raise DeviceError(f"Nothing came from {who} within {peer.gettimeout():g} s: it hangs.") from error
    except OSError as error:
        raise DeviceError(f"{who} has ended ({error}): start all ranks again.") from error
    if flags & socket.MSG_CTRUNC:
        for descriptor in descriptors:
            os.close(descriptor)
        raise DeviceError(f"File descriptors of {who} do not fit into this process: raise its limit (ulimit -n).")
    if not data:
        raise DeviceError(f"{who} has ended: start all ranks again.")
    return json.loads(data), list(descriptors)


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = peer.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the connection was closed")
        data += part
    return bytes(data)
