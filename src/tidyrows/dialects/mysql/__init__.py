"""MariaDB and MySQL, with PyMySQL and mysqlclient."""

from __future__ import annotations

from tidyrows.dialects.mysql.catalogue import MySQLCatalogue
from tidyrows.dialects.mysql.errors import MySQLErrors
from tidyrows.dialects.mysql.locks import MySQLLocks
from tidyrows.dialects.mysql.sessions import MySQLSessions
from tidyrows.dialects.mysql.statements import MySQLStatements

__all__ = ["MySQL"]


class MySQL(
    MySQLErrors,
    MySQLSessions,
    MySQLStatements,
    MySQLLocks,
    MySQLCatalogue,
):
    """A deadlock rolls back the whole transaction; DDL commits."""

    name = "mysql"
