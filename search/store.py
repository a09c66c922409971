"""The evaluation store: every measured sub-network, in SQLite, as soon as it is measured.

The file is whole after a kill at any moment: each evaluation is one transaction under SQLite's rollback journal with
full synchronisation. (A write-ahead log would be quicker, but a copy of the file alone would miss rows.)
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from search.scores import Score, ScoreKey
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, out_of_space

APPLICATION = 0x4E415343  # "NASC", in the file's header: tells our stores from other SQLite files
VERSION = 1
SCHEMA = """
CREATE TABLE architectures (key TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE evaluations (
    architecture TEXT NOT NULL REFERENCES architectures (key),
    weights TEXT NOT NULL,
    task TEXT NOT NULL,
    documents TEXT NOT NULL,
    score REAL NOT NULL,
    stderr REAL,
    n INTEGER NOT NULL,
    seconds REAL NOT NULL,
    timestamp TEXT NOT NULL,
    PRIMARY KEY (architecture, weights, task, documents)
);
"""


class StoredRow(NamedTuple):
    """A row of the table as it is stored. `architecture`, `weights` and `documents` are fingerprints, `task` is the
    task's name with its metric; `timestamp` is UTC, ISO 8601."""

    architecture: str
    weights: str
    task: str
    documents: str
    score: float
    stderr: float | None
    n: int
    seconds: float
    timestamp: str


class EvaluationStore:
    """`evaluations.db`. Opening an existing one resumes. Raises `RequestError` for a file that is damaged, or that
    another program made.

    Usable from several threads, and from several processes that wait for one another's writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise RequestError(f"cannot open the evaluation store {self.path}: {error}") from None
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        """Make the tables of a new file, or check that an old one is ours and whole."""
        try:
            self._connection.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                (application,) = self._connection.execute("PRAGMA application_id").fetchone()
                (version,) = self._connection.execute("PRAGMA user_version").fetchone()
                if not tables and not application:
                    for statement in SCHEMA.split(";\n"):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._connection.execute(f"PRAGMA user_version = {VERSION}")
                elif application != APPLICATION:
                    raise RequestError(f"{self.path} is a database of something else, not an evaluation store")
                elif version != VERSION:
                    raise RequestError(f"{self.path} has version {version} of the evaluation store; known is {VERSION}")
            (state,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if out_of_space(error):
                raise
            if is_busy(error):
                raise RequestError(f"{self.path}: {error}; nothing is lost, try again in a while") from None
            raise RequestError(f"{self.path} is damaged or no evaluation store: {error}") from None
        if state != "ok":
            raise RequestError(f"{self.path} is damaged: {' '.join(state.split())}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Within, everything is written when the block ends, or nothing where it raises."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def put(self, architecture: Architecture, weights: str, key: ScoreKey, score: Score, seconds: float) -> None:
        """Record the score of an architecture with these weights; it is on disk when this returns.

        Recorded again, the first record stays. Raises ValueError for a score that is not a number.
        """
        if math.isnan(score.value):
            raise ValueError(f"the score of {architecture.key} on {key.name} is not a number")
        stderr = None if score.stderr is None or math.isnan(score.stderr) else score.stderr
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        row = StoredRow(architecture.key, weights, *key.place, score.value, stderr, score.n, float(seconds), stamp)
        with self._transaction():
            self._connection.execute(
                "INSERT OR IGNORE INTO architectures VALUES (?, ?)",
                (architecture.key, json.dumps(architecture.to_dict(), sort_keys=True)),
            )
            self._connection.execute("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def get(self, architecture: Architecture, weights: str, key: ScoreKey) -> Score | None:
        """The recorded score, or None."""
        rows = self._rows(
            "SELECT score, stderr, n FROM evaluations"
            " WHERE architecture = ? AND weights = ? AND task = ? AND documents = ?",
            (architecture.key, weights, *key.place),
        )
        return key.score(*rows[0]) if rows else None

    def all(
        self, *, weights: str | None = None, task: str | None = None, documents: str | None = None
    ) -> list[tuple[Architecture, StoredRow]]:
        """All recorded scores in the order in which they were recorded, or those with the values given."""
        wanted = {"weights": weights, "task": task, "documents": documents}
        conditions = [f"evaluations.{column} = ?" for column, value in wanted.items() if value is not None]
        rows = self._rows(
            "SELECT json, evaluations.* FROM evaluations JOIN architectures ON key = architecture"
            + (" WHERE " + " AND ".join(conditions) if conditions else "")
            + " ORDER BY evaluations.rowid",
            [value for value in wanted.values() if value is not None],
        )
        return [(Architecture.from_dict(json.loads(row[0])), StoredRow(*row[1:])) for row in rows]

    def _rows(self, query: str, values: Sequence[str]) -> list[tuple]:
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                if is_busy(error):
                    raise RequestError(f"{self.path}: {error}; nothing is lost, try again in a while") from None
                raise RequestError(f"{self.path} is damaged: {error}") from None

    def close(self) -> None:
        """Close the file; everything recorded is already on disk."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> EvaluationStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process holds the file."""
    code = getattr(error, "sqlite_errorcode", 0)  # of an error of the database, not of a wrong use of the module
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
