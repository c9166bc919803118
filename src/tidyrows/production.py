"""Refuse what looks like production: a host, a database, an environment (promise 9)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from tidyrows.arguments import Kind
from tidyrows.errors import ProductionDatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import sqlalchemy as sa

ALLOW_VARIABLE = "TIDYROWS_ALLOW_PRODUCTION"
"""The variable with allowed names, separated by commas; it has no value that allows everything."""

ENVIRONMENT_VARIABLES = (
    "APP_ENV",
    "ENV",
    "ENVIRONMENT",
    "STAGE",
    "PYTHON_ENV",
    "FLASK_ENV",
    "DJANGO_ENV",
    "DJANGO_SETTINGS_MODULE",  # shop.settings.production
    "DJANGO_CONFIGURATION",  # ShopProduction
    "DJANGO_ENVIRONMENT",
    "FASTAPI_ENV",
    "QUART_ENV",
    "LITESTAR_ENV",
    "ENV_FOR_DYNACONF",
    "FLASK_CONFIG",
    "APP_SETTINGS",  # config.ProductionConfig
    "APP_ENVIRONMENT",
    "APPLICATION_ENV",
    "DEPLOY_ENV",
    "DEPLOYMENT_ENVIRONMENT",
    "NODE_ENV",  # of an application under test that is not in Python, as the next
    "RAILS_ENV",
    "RACK_ENV",
    "HANAMI_ENV",
    "MIX_ENV",
    "GO_ENV",
    "RUST_ENV",
    "SYMFONY_ENV",
    "YII_ENV",
    "CI_ENVIRONMENT",
    "WP_ENV",
    "WP_ENVIRONMENT_TYPE",
    "ASPNETCORE_ENVIRONMENT",
    "DOTNET_ENVIRONMENT",
    "SPRING_PROFILES_ACTIVE",  # several, with commas
    "QUARKUS_PROFILE",
    "MICRONAUT_ENVIRONMENTS",
)
"""Variables that name the environment of a program. Those of one hosting company are not here: they
say where a program runs, not for what purpose."""

_WORD = re.compile(
    r"""
    (?<![a-z]) (production(?!s|al|i[sz])
        | prod(?!uc|ig|rom|ded|der|ding|s(?![a-z])) | prd(?!s(?![a-z])))
    | (production|prod|prd) (?![a-z])
    | (?<![a-z]) (?:my|app|db|site|web)? (live) (?:db|database|env|sql|pg|site)? (?![a-z])
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""The first word begins a longer one (proddb, but not product), the second ends one (myprod)."""
_HARMLESS = re.compile(
    r"""
    (?:pre|non|not) [-_ ]? (?:production|prod|prd) (?![a-z])
    | (?<![a-z]) (?:re|co|over|under|post) prod(?:uction)? (?![a-z])
    """,
    re.IGNORECASE | re.VERBOSE,
)
_FEATURE = re.compile(
    r"""
    live [-_ ]? (?:servers?|views?|streams?|streaming|chats?|scores?|events?|feeds?|blogs?|reload
    |search|updates?|tests?|testing|demo|coding|video|music|shows?|class|classes|sessions?)
    (?![a-z])
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What else is called live. In the name of a host it may be production all the same."""
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_CONNECTION_STRING = re.compile(r"[=@\s]|://")
_HOSTS = ("host", "hostaddr", "PGHOST", "PGHOSTADDR")
_ELSEWHERE = ("host", "hostaddr", "dbname", "database", "service", "unix_socket")
"""Parameters of a URL that name hosts and databases."""


def _is_permission(allowed: object) -> bool:
    """Whether it is a boolean or a collection of names; one string is a collection of letters."""
    return isinstance(allowed, bool) or (
        isinstance(allowed, Collection)
        and not isinstance(allowed, (str, bytes))
        and all(isinstance(name, str) for name in allowed)
    )


PERMISSION = Kind(_is_permission, "True, False or a list of names", "['app_prod']")
"""What an argument ``allow_production=`` takes."""


def refuse_production(
    url: sa.URL,
    allowed: bool | Collection[str] = False,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Raise ProductionDatabaseError if host, database or environment is named like production.

    ``allowed`` is True, or exact names that are allowed: of a host, of a database (of SQLite, of
    its file), or the value of an environment variable, as ``production`` or, for one variable only,
    ``APP_ENV=production``. User, password and other parameters of the URL are not read or shown.
    """
    _refuse(chain(_of_url(url), _of_environment(environ)), allowed, environ)


def refuse_places(
    places: Iterable[tuple[str, str]],
    allowed: bool | Collection[str] = False,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """As ``refuse_production``, of the hosts and databases to which a connection leads.

    Raises:
        ProductionDatabaseError: the name of a host, database, or file looks like production.
    """
    _refuse(_of_places(places), allowed, environ)


def _refuse(
    suspects: Iterable[tuple[str, str, str]],
    allowed: bool | Collection[str],
    environ: Mapping[str, str],
) -> None:
    if allowed is True:
        return
    listed = environ.get(ALLOW_VARIABLE, "").split(",")
    names = {name.strip() for name in listed} | set(allowed or ())
    found = [
        (where, value, word)
        for where, value, word in suspects
        if names.isdisjoint({value, _permission(where, value)})
    ]
    if not found:
        return
    shown = "; the ".join(
        f"{_shown(where, value)} looks like production (it contains {word!r})"
        for where, value, word in found
    )
    needed = list(dict.fromkeys(_permission(where, value) for where, value, _word in found))
    raise ProductionDatabaseError(
        f"The {shown}, and tidyrows deletes rows. If it is for tests all the same, add "
        f"allow_production={needed!r} to the call that was refused, or set "
        f"{ALLOW_VARIABLE}={','.join(needed)}; allow_production=True allows everything.",
        matched=found[0][2],
        found=tuple((where, value) for where, value, _word in found),
    )


def _shown(where: str, value: str) -> str:
    if where.isupper():
        return f"environment variable {where}={value!r}"
    return f"{where} {value!r}"


def _permission(where: str, value: str) -> str:
    """The narrowest name that allows this."""
    return f"{where}={value}" if where.isupper() else value


def _of_url(url: sa.URL) -> Iterator[tuple[str, str, str]]:
    # The name of a file, without its folders and the parameters of a URI.
    places = [("host", url.host or ""), ("database", (url.database or "").partition("?")[0])]
    for part in _ELSEWHERE:  # postgresql://user@/?host=...&dbname=...
        given = url.query.get(part, ())
        places += [(part, value) for value in ([given] if isinstance(given, str) else given)]
    return _of_places(places)


def _of_places(places: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    for where, value in places:
        if where == "database":
            names = [re.split(r"[/\\]", value)[-1]]  # a file without its folders
        else:
            names = value.split(",") if where in _HOSTS else [value]
        for name in names:
            word = _word_in(name, is_host=where in _HOSTS)
            if word:  # a whole connection string may contain a password
                yield where, word if _CONNECTION_STRING.search(name) else name, word


def _of_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    present = set(environ)  # to ask os.environ for each one takes ten times as long
    for variable in ENVIRONMENT_VARIABLES:
        for value in environ[variable].split(",") if variable in present else ():
            word = _word_in(value)
            if word:
                yield variable, value, word


@lru_cache(maxsize=256)
def _word_in(name: str, *, is_host: bool = False) -> str | None:
    """The word for production in a name, by itself or joined with other letters."""
    for written in (name, _CAMEL_CASE.sub(" ", name)):
        rest = _HARMLESS.sub(" ", written)
        match = _WORD.search(rest if is_host else _FEATURE.sub(" ", rest))
        if match is not None:
            return match[match.lastindex or 0]
    return None


def looks_like_production(name: str) -> bool:
    """Whether the name of a database, or of its file, has a word for production."""
    return any(_of_places([("database", name)]))
