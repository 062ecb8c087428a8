"""How requests reach Redis through a client of the user's, for threads and for tasks.

Promises: the client's settings, retries, instrumentation and time limits hold; a failure is a `StoreError` that says
whether the server may have done it. Does not: close the client. Costs what the client's call does; as safe as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilient.errors import StoreError
from resilient.stores._redis_wire import failure, no_script, unknowns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient.stores._lua import Request

__all__ = ["Client", "TaskClient"]


class Client:
    """Through a client of the user's: its settings, its retries, its instrumentation, its time limits."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._sure = _without_retry(client)

    def run(self, request: Request) -> Any:
        """The server's answer to a request."""
        script, key, args = request
        try:
            try:
                return self._client.execute_command("EVALSHA", script.sha, 1, key, *args)
            except Exception as error:
                if not no_script(error):
                    raise
            return self._client.execute_command("EVAL", script.text, 1, key, *args)
        except Exception as error:
            raise _blamed(error, script.writes, self._sure) from error

    def run_all(self, requests: Sequence[Request]) -> list[Any]:
        """The server's answers to requests that are sent together; for one that fails alone, its error."""
        answers = self._together(requests)
        while unknown := unknowns(answers):
            # One alone brings the script along, for the others.
            first, *rest = unknown
            try:
                answers[first] = self.run(requests[first])
            except StoreError as error:
                answers[first] = error
            if rest:
                for at, answer in zip(rest, self._together([requests[at] for at in rest]), strict=True):
                    answers[at] = answer
        return [_blamed(one, False, self._sure) if isinstance(one, Exception) else one for one in answers]

    def _together(self, requests: Sequence[Request]) -> list[Any]:
        try:
            pipeline = self._client.pipeline(transaction=False)
            for script, key, args in requests:
                pipeline.execute_command("EVALSHA", script.sha, 1, key, *args)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        except Exception as error:
            raise _blamed(error, any(request.script.writes for request in requests), self._sure) from error
        return answers

    def scan(self, node: str, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        """A piece of a node's keys, and where the next begins."""
        try:
            if not node:
                after, keys = self._client.scan(cursor, match=match, count=count)
                return int(after), keys
            target = self._client.get_node(node_name=node)
            cursors, keys = self._client.scan(cursor, match=match, count=count, target_nodes=target)
            return int(cursors[node]), keys
        except Exception as error:
            raise _blamed(error, False, self._sure) from error

    def nodes(self) -> list[str]:
        """The names of all masters of a cluster; otherwise one server, without a name."""
        if not hasattr(self._client, "get_primaries"):
            return [""]
        return sorted(node.name for node in self._client.get_primaries())

    def close(self) -> None:
        """The client is the user's."""


class TaskClient:
    """`Client`, for tasks."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._sure = _without_retry(client)

    async def run(self, request: Request) -> Any:
        """The server's answer to a request."""
        script, key, args = request
        try:
            try:
                return await self._client.execute_command("EVALSHA", script.sha, 1, key, *args)
            except Exception as error:
                if not no_script(error):
                    raise
            return await self._client.execute_command("EVAL", script.text, 1, key, *args)
        except Exception as error:
            raise _blamed(error, script.writes, self._sure) from error

    async def run_all(self, requests: Sequence[Request]) -> list[Any]:
        """The server's answers to requests that are sent together; for one that fails alone, its error."""
        answers = await self._together(requests)
        while unknown := unknowns(answers):
            # One alone brings the script along, for the others.
            first, *rest = unknown
            try:
                answers[first] = await self.run(requests[first])
            except StoreError as error:
                answers[first] = error
            if rest:
                for at, answer in zip(rest, await self._together([requests[at] for at in rest]), strict=True):
                    answers[at] = answer
        return [_blamed(one, False, self._sure) if isinstance(one, Exception) else one for one in answers]

    async def _together(self, requests: Sequence[Request]) -> list[Any]:
        try:
            pipeline = self._client.pipeline(transaction=False)
            for script, key, args in requests:
                pipeline.execute_command("EVALSHA", script.sha, 1, key, *args)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        except Exception as error:
            raise _blamed(error, any(request.script.writes for request in requests), self._sure) from error
        return answers

    async def scan(self, node: str, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        """A piece of a node's keys, and where the next begins."""
        try:
            if not node:
                after, keys = await self._client.scan(cursor, match=match, count=count)
                return int(after), keys
            target = self._client.get_node(node_name=node)
            cursors, keys = await self._client.scan(cursor, match=match, count=count, target_nodes=target)
            return int(cursors[node]), keys
        except Exception as error:
            raise _blamed(error, False, self._sure) from error

    async def nodes(self) -> list[str]:
        """The names of all masters of a cluster; otherwise one server, without a name."""
        if not hasattr(self._client, "get_primaries"):
            return [""]
        await self._client.initialize()
        return sorted(node.name for node in self._client.get_primaries())

    async def aclose(self) -> None:
        """The client is the user's."""


def _without_retry(client: Any) -> bool:
    """Whether the client is known to send everything only once."""
    get_retry = getattr(client, "get_retry", None)
    if get_retry is None:
        return False
    retry = get_retry()
    return retry is None or getattr(retry, "_retries", 1) == 0


def _blamed(error: Exception, writes: bool, sure: bool) -> Exception:
    # Of a client that repeats by itself, the last failure says nothing about the attempts before.
    return failure(error, writes and not (sure and "connecting to" in str(error)))
