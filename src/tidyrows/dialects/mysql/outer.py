"""Outer transactions of MariaDB and MySQL."""

from __future__ import annotations

import re

from tidyrows.dialects.base import Dialect
from tidyrows.dialects.outer import ENDS, starting


class MySQLOuter(Dialect):
    """DDL commits, and no SET is undone."""

    ending = starting(
        *ENDS,
        "ALTER",
        r"CREATE(?!\s+TEMPORARY\b)(?!\s+OR\s+REPLACE\s+TEMPORARY\b)",
        r"DROP(?!\s+TEMPORARY\b)(?!\s+PREPARE\b)",
        "ANALYZE",
        "CHECK",
        "FLUSH",
        "GRANT",
        "INSTALL",
        "LOCK",
        "OPTIMIZE",
        "RENAME",
        "REPAIR",
        "REVOKE",
        r"SET\s+(?:SESSION\s+|LOCAL\s+|@@(?:SESSION\.)?)?autocommit",
        r"SET\s+PASSWORD",
        "TRUNCATE",
        "UNINSTALL",
        "UNLOCK",
        "XA",
    )
    session_changing = re.compile(
        r"^\s*(?:SET(?!\s+STATEMENT)|USE|PREPARE|HANDLER|CREATE\s+TEMPORARY)\b"
        r"|\bGET_LOCK\s*\(|@\w+\s*:=|\bINTO\s+@",
        re.IGNORECASE,
    )
    savepoint_gone_codes = frozenset({1305})
    release_with_set = True

    @property
    def close_sends(self) -> bool:
        """The driver mysqldb looks for further results, and refuses two threads at once."""
        return self.driver == "mysqldb"
