"""Everything that can go wrong and is not a bug.

::

    QuotepushError
    ├── PeerError       a client broke a rule; it is told so and keeps or loses its connection
    │   └── CallRefused       a backend's call that cannot be carried out as it is
    │       └── NotOnline     the connection that it names is not there
    └── OperatorError   a setting, the lock, Redis or a port; printed in one line, no traceback
        ├── SettingsError     exit 2   a wrong setting: starting again cannot help
        ├── LockError         exit 1   the lock file cannot be made
        ├── AlreadyRunning    exit 3   another main holds the lock
        ├── NodeTaken         exit 1   another machine's main has this node's name
        ├── RedisUnavailable  exit 1   no answer, or not the answer we may have
        ├── PortUnavailable   exit 1   somebody else listens there
        ├── BackendUnavailable  exit 1 Redis, or a node, does not answer a backend's call in time
        └── WorkerUnfit       exit 3   a worker says that it can never run here

Anything else that is raised is a bug and keeps its traceback.
"""

__all__ = [
    "AlreadyRunning",
    "BackendUnavailable",
    "CallRefused",
    "LockError",
    "NodeTaken",
    "NotOnline",
    "OperatorError",
    "PeerError",
    "PortUnavailable",
    "QuotepushError",
    "RedisUnavailable",
    "SettingsError",
    "WorkerUnfit",
    "reason_of",
]


class QuotepushError(Exception):
    """The root of both families."""


class PeerError(QuotepushError):
    """A client broke a rule of the protocol.

    Args:
        error: the word on the wire, e.g. ``bad_code`` (docs/protocol.md lists them).
        message: one sentence for the human who reads the client's log.
        close_code: close the connection with this WebSocket code; None keeps it open.
        retry_after_ms: the same request can succeed after so long; None: it never will.
    """

    def __init__(
        self, error: str, message: str, *, close_code: int | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(error, message)
        self.error = error
        self.message = message
        self.close_code = close_code
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


class CallRefused(PeerError):
    """A backend's call cannot be carried out as it is; to call again does not help.

    ``error`` is its word: ``bad_request``, ``bad_code``, ``too_large``, ``not_online``, ``key_needed``, ``wrong_key``,
    or another one that a node has said.
    """


class NotOnline(CallRefused):
    """The connection that a call names is not there, or no longer."""

    def __init__(self, conn: str) -> None:
        super().__init__("not_online", f"there is no connection {conn!r}")
        self.args = (conn,)
        self.conn = conn


class OperatorError(QuotepushError):
    """Something only the operator can put right. The text ends with the remedy.

    ``exit_code`` is main's: 1 try again, 2 wrong setting, 3 cannot run here at all.
    """

    exit_code = 1


class SettingsError(OperatorError):
    """One or more settings are wrong.

    Args:
        faults: one line each; all of them, so that nobody has to start ten times.
    """

    exit_code = 2

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(self.faults)


class LockError(OperatorError):
    """The lock file cannot be created or opened."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot open the lock file {self.path}: {self.reason}; choose another with --lock-file"


class AlreadyRunning(OperatorError):
    """Another main holds the lock.

    Args:
        path: the lock file.
        pid: the holder as the file names it, 0 if it has not written it yet.
    """

    exit_code = 3

    def __init__(self, path: str, pid: int) -> None:
        super().__init__(path, pid)
        self.path = path
        self.pid = pid

    def __str__(self) -> str:
        return (
            f"Process already exist: pid {self.pid or 'unknown'} holds {self.path}; "
            "stop it first, or give this one its own --node or --lock-file"
        )


class NodeTaken(OperatorError):
    """Another main, alive, has this node's name in the cluster.

    Args:
        node: the name.
        holder: what is known of the other one.
    """

    def __init__(self, node: str, holder: str) -> None:
        super().__init__(node, holder)
        self.node = node
        self.holder = holder

    def __str__(self) -> str:
        return (
            f"the name {self.node!r} is taken in this cluster by another server ({self.holder}); "
            "give this one its own with --node, or another cluster with --redis-prefix"
        )


class RedisUnavailable(OperatorError):
    """Redis does not answer, or refuses us.

    Args:
        role: ``feed_redis`` or ``registry_redis``.
        where: the address without its password.
        reason: what the connection said.
    """

    def __init__(self, role: str, where: str, reason: str) -> None:
        super().__init__(role, where, reason)
        self.role = role
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        what_helps = _what_helps(self.reason, "start it or set --redis")
        return f"cannot use Redis at {self.where} ({self.role}): {self.reason}; {what_helps}"


class PortUnavailable(OperatorError):
    """A listening socket cannot be opened."""

    def __init__(self, host: str, port: int, reason: str, flag: str) -> None:
        super().__init__(host, port, reason, flag)
        self.host = host
        self.port = port
        self.reason = reason
        self.flag = flag

    def __str__(self) -> str:
        return f"cannot listen on {self.host}:{self.port}: {self.reason}; choose another with {self.flag}"


class BackendUnavailable(OperatorError):
    """A backend's call was not answered in time: Redis is away or refuses us, or a node is silent.

    Args:
        reason: what is missing; where a command may have been carried out all the same, it says so.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; {_what_helps(self.reason, 'try again when it is back')}"


class WorkerUnfit(OperatorError):
    """A worker ended with exit code 3: it cannot run on this machine at all."""

    exit_code = 3

    def __init__(self, worker: int) -> None:
        super().__init__(worker)
        self.worker = worker

    def __str__(self) -> str:
        return f"worker {self.worker} cannot run here; its last lines in the log say why"


def _what_helps(reason: str, otherwise: str) -> str:
    if "permission" in reason:
        return "docs/operations.md has the rights that its user needs"
    if "authenticat" in reason.lower() or "password" in reason:
        return "its address has room for user and password: redis://user:password@…"
    return otherwise


def reason_of(error: Exception, timeout_s: float) -> str:
    """Return in one line why Redis refused, or did not answer in time, and what helps where that is not plain."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {timeout_s:g} s"
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if "same slot" in reason:
        reason += ": in a Redis Cluster the prefix needs a hash tag, such as {qp}:, or the address redis+cluster://"
    if "read only replica" in reason:
        reason = "it is a replica and takes no writes: name its master, or for the registry another Redis"
    return reason
