"""Quiesces an SQLite database: holds the lock that every writer needs, between two transactions, with all that was
committed in the database file itself. Writers wait meanwhile, for as long as their busy timeout allows.

    sqlite_agent.py --volume data --database /srv/data/app.db --mount /srv/data

With --mount the filesystem is frozen as well, so that nothing at all is written until the cut; that needs root. A
filesystem stays frozen when this program is killed: start it again, it thaws first.
"""

import argparse
import errno
import fcntl
import os
import sqlite3
import subprocess
import sys
import threading
import time

import grpc
from tidemark.common.v1.common_pb2 import Coherence
from tidemark_agent import Agent, Files, Gone, Workload

# linux/fs.h
FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


def thaw_filesystem(directory):
    """Does nothing where it isn't frozen."""
    try:
        fcntl.ioctl(directory, FITHAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


class Sqlite(Workload):
    """Holds one database still."""

    def __init__(self, database, mount):
        self._database = database
        self._mount = mount
        self._lock = None
        self._frozen = None

    def freeze(self, volume, seconds):
        # So that a refusal is still heard.
        until = time.monotonic() + seconds * 0.9
        self._lock = self._connect()
        self._retry(until, self._try_lock, "others held the lock of all writers for the whole time")
        # Nothing is committed any more: what the log still has goes into the database.
        other = self._connect()
        try:
            self._retry(until, lambda: try_checkpoint(other), "a reader needs what the log still has")
        finally:
            other.close()
        subprocess.run(["sync", "--file-system", self._database], check=True, timeout=seconds)
        if self._mount:
            frozen = os.open(self._mount, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.ioctl(frozen, FIFREEZE, 0)
            except OSError:
                os.close(frozen)
                raise
            self._frozen = frozen

    def thaw(self, volume):
        if self._frozen is not None:
            thaw_filesystem(self._frozen)
            os.close(self._frozen)
            self._frozen = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _try_lock(self):
        try:
            self._lock.execute("BEGIN IMMEDIATE")
            return True
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return False

    def _connect(self):
        return sqlite3.connect(self._database, timeout=0, isolation_level=None)

    def _retry(self, until, attempt, reason):
        # SQLite's own wait sleeps for up to 100 ms, and never gets its turn beside a writer without pauses.
        while not attempt():
            if time.monotonic() > until:
                raise TimeoutError(reason)
            time.sleep(0.0005)


def try_checkpoint(connection):
    """Whether all of the log is in the database. Another checkpoint under way, as a writer begins one behind a commit,
    is a no, too. Without a log the numbers are both -1."""
    busy, in_log, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return not busy and copied == in_log


def hint(agent, volume, workload):
    """Says once that the moment is good, as a batch job would between two of its steps."""
    try:
        workload.freeze(volume, 10)
        done = agent.hint(volume, 30)
        print("hinted", done.cut, Coherence.Name(done.coherence), done.reason, flush=True)
    finally:
        workload.thaw(volume)


def main():
    parser = argparse.ArgumentParser(description="Quiesces an SQLite database for Tidemark.")
    parser.add_argument("--capture", default="http://127.0.0.1:7401", help="URL of the capture service")
    parser.add_argument("--tls-ca", metavar="FILE", help="CAs that its certificate must be of; an https URL needs it")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate that says who the agent is")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key")
    parser.add_argument("--token-file", metavar="FILE", help="token that says who the agent is, in place of a certificate")
    parser.add_argument("--volume", required=True, help="name or UUID of the volume that the database is on")
    parser.add_argument("--database", required=True, help="its file")
    parser.add_argument("--mount", help="where its filesystem is mounted, to freeze that too")
    parser.add_argument("--hint", action="store_true", help="say once that the moment is good, then serve on")
    arguments = parser.parse_args()

    if arguments.mount:
        left = os.open(arguments.mount, os.O_RDONLY | os.O_DIRECTORY)
        thaw_filesystem(left)
        os.close(left)

    files = Files(arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.token_file)
    first = True
    while True:
        try:
            agent = Agent(
                arguments.capture,
                "sqlite",
                [arguments.volume],
                Sqlite(arguments.database, arguments.mount),
                files,
            )

            def attached(agent=agent, hints=first and arguments.hint):
                print("attached", flush=True)
                if hints:
                    own = Sqlite(arguments.database, arguments.mount)
                    threading.Thread(target=hint, args=(agent, arguments.volume, own), daemon=True).start()

            agent.serve(attached)
        except ValueError as error:
            sys.exit(f"sqlite_agent: {error}")
        except (grpc.RpcError, OSError, Gone) as error:
            print("attach again:", error, flush=True)
        first = False
        time.sleep(0.5)


if __name__ == "__main__":
    main()
