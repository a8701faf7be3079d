"""How a command of the cluster becomes an order to a worker's sessions, and its outcome a reply."""

from collections.abc import Awaitable, Callable, Mapping

from quotepush.cluster.commands import Command, Reply, payload_of
from quotepush.entitlement import BadClaim, entitlement_of
from quotepush.push.orders import Audience, Message, Orders, Outcome

__all__ = ["carry_out", "reply_of"]


async def carry_out(orders: Orders, command: Command) -> Outcome:
    """Do what a checked command says, as far as it is about the sessions of this worker."""
    return await _ORDERS[command.op](orders, command)


def reply_of(outcome: Outcome, command_id: str, node: str) -> Reply:
    """Return the outcome as the cluster says it."""
    return Reply(
        command_id,
        node,
        outcome.delivered,
        outcome.fds,
        outcome.session,
        outcome.users,
        outcome.error,
        outcome.message,
    )


async def _send(orders: Orders, command: Command) -> Outcome:
    to, sender = command.to, command.sender
    assert to is not None, "it has been checked"
    message = Message(
        payload_of(command),
        is_raw=command.raw,
        sender=None if sender is None else {"conn": sender.conn, "user": sender.user},
        sent_ms=command.sent or None,
        kept=command.id if command.keep else "",
    )
    exclude = {*command.exclude, *([] if sender is None else [sender.conn])}
    return await orders.send(message, Audience(to.conns, to.users, to.group, to.all, frozenset(exclude)))


async def _entitle(orders: Orders, command: Command) -> Outcome:
    try:
        entitlement = entitlement_of(command.claims or {}, orders.delays)
    except BadClaim as e:
        return Outcome(error="bad_request", message=str(e))
    return await orders.entitle(entitlement, command.conns, command.users or ())


_ORDERS: Mapping[str, Callable[[Orders, Command], Awaitable[Outcome]]] = {
    "send": _send,
    "close": lambda orders, c: orders.close(c.conns or (), c.code, c.reason),
    "kick": lambda orders, c: orders.kick(c.users or (), c.code, c.reason),
    "bind": lambda orders, c: orders.bind(c.conn, c.user, c.conn_key),
    "unbind": lambda orders, c: orders.unbind(c.conn),
    "join": lambda orders, c: orders.join(c.conns or (), c.group),
    "leave": lambda orders, c: orders.leave(c.conns or (), c.group),
    "dissolve": lambda orders, c: orders.dissolve(c.group),
    "get_session": lambda orders, c: orders.session(c.conn),
    "set_session": lambda orders, c: orders.session(c.conn, c.data, is_replaced=True),
    "update_session": lambda orders, c: orders.session(c.conn, c.data),
    "entitle": _entitle,
}
