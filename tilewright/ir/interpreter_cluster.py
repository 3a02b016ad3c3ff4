"""Rules of what the blocks tell each other that run one program together (`tilewright.ir.cluster_ops`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.ir import cluster_ops as c
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.core import Value
from tilewright.ir.interpreter_machine import Frame, Steps, Trap, await_condition, rule

#: slots of a mailbox
SLOTS = 2


@dataclass(eq=False)
class Mailbox:
    """A block's: what has come, by use and by the sender's number; ``used``: how often the block has read it."""

    used: int = 0
    messages: dict[int, dict[int, Any]] = field(default_factory=dict)


@rule(c.MakeMailbox)
def _mailbox(frame: Frame, op: c.MakeMailbox) -> Value:
    frame.program.mailboxes[op.result] = Mailbox()
    return op.result


@rule(c.AwaitMailboxes)
def _await_mailboxes(frame: Frame, op: c.AwaitMailboxes) -> Steps:
    own, peers = set(frame.program.mailboxes), frame.program.peers
    text = "the other blocks of the cluster to make their mailboxes"
    yield from await_condition(lambda: all(own <= set(peer.mailboxes) for peer in peers), op, text)
    frame.program.knows_mailboxes = True


@rule(c.ClusterReduce)
def _cluster_reduce(frame: Frame, op: c.ClusterReduce) -> Steps:
    program, key = frame.program, op if op.mailbox is None else frame.read(op.mailbox)
    box = program.mailboxes.setdefault(key, Mailbox())
    count = box.used if op.count is None else int(frame.read(op.count))
    if op.mailbox is not None and not program.knows_mailboxes:
        raise Trap("sends a message before the other blocks are known to have mailboxes (async.await_mailboxes)")
    if count != box.used:
        raise Trap(f"use {count} of a mailbox comes after {box.used} uses")
    for rank, peer in enumerate(program.peers):
        if peer.ended:
            raise Trap(f"sends a message to block {rank} of the cluster, which has ended")
        other = peer.mailboxes.setdefault(key, Mailbox())
        if count >= other.used + SLOTS:
            raise Trap(f"the message of use {count} overwrites one that block {rank} has not read")
        other.messages.setdefault(count, {})[program.rank] = frame.read(op.source)
    found = box.messages[count]
    text = f"messages from all blocks of the cluster (use {count} of the mailbox)"
    yield from await_condition(lambda: len(found) == len(program.peers), op, text)
    del box.messages[count]
    box.used += 1
    return numerics.reduce(op.fn, np.stack([found[rank] for rank in range(len(found))]), 0)


__all__ = ["SLOTS", "Mailbox"]
