"""Declarations of values that no other worker produces: text, e-mail addresses, integers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from factory.declarations import BaseDeclaration

from tidyrows.errors import ScopeError
from tidyrows.factories.active_context import active_context, next_integer
from tidyrows.factories.columns import column_limits
from tidyrows.template import TAG_WIDTH, check, escaped

if TYPE_CHECKING:
    from factory.builder import BuildStep, Resolver

_LOCAL_WIDTH = 64  # of an e-mail address, before the @ (RFC 5321)
_ADDRESS_WIDTH = 254
_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*\.?")
_DOMAIN = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")


class Scoped(BaseDeclaration):
    """Text that differs in every call, test, worker, run and host.

    It is cut to fit the mapped column: literal text goes, the tag stays whole.

    Args:
        template: literal text with ``{tag}``; or with ``{run}``, ``{worker}``, ``{n}`` and maybe
            ``{test}``, which are the tag's parts.

    Raises:
        ScopeError: the template could produce another run's value; or, when a value is made, the
            column is too short for the fields alone.

    Example:
        >>> class UserFactory(TrackedFactory[User]):
        ...     class Meta:
        ...         model = User
        ...
        ...     name = Scoped("user-{tag}")
        >>> UserFactory.build().name
        'user-qr0wctk03010'
    """

    def __init__(self, template: str) -> None:
        check(template)
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.template = template

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> str:
        """The next text."""
        limits = column_limits(instance, step)
        return active_context().text(self.template, limits.length, column=limits.name)

    def __repr__(self) -> str:
        return f"Scoped({self.template!r})"


class ScopedEmail(BaseDeclaration):
    """An e-mail address that differs in every call, test, worker, run and host.

    Only the prefix is cut to fit the mapped column, so the address stays valid.

    Args:
        prefix: what it begins with; a hyphen and the tag follow.
        domain: what stands after the @.

    Raises:
        ScopeError: prefix or domain have no place in an address; or, when a value is made, the
            column is too short for tag and domain.
    """

    def __init__(self, prefix: str = "user", domain: str = "example.test") -> None:
        if prefix and not _LOCAL.fullmatch(prefix):
            raise ScopeError(
                f"{prefix!r} cannot begin an e-mail address: letters, digits and "
                f"!#$%&'*+/=?^_`{{|}}~- may, and single dots between them."
            )
        if not _DOMAIN.fullmatch(domain):
            raise ScopeError(f"{domain!r} is no domain of an e-mail address, as example.test is.")
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.prefix = prefix
        self.domain = domain
        begin = escaped(f"{prefix[: _LOCAL_WIDTH - TAG_WIDTH - 1]}-") if prefix else ""
        self._template = f"{begin}{{tag}}@{domain}"

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> str:
        """The next text."""
        limits = column_limits(instance, step)
        length = _ADDRESS_WIDTH if limits.length is None else min(limits.length, _ADDRESS_WIDTH)
        return active_context().text(self._template, length, column=limits.name, keep_end=True)

    def __repr__(self) -> str:
        return f"ScopedEmail({self.prefix!r}, {self.domain!r})"


class ScopedInteger(BaseDeclaration):
    """An integer that differs in every call, test and worker of a run.

    The workers' integers interleave, and another run begins at ``start`` again. Where the tracker
    has a ledger they differ in all runs, on all hosts, too. Declarations that fill one column need
    the same ``start``.

    Args:
        start: the first worker's first integer.

    Raises:
        ScopeError: when a value is made that the mapped column cannot hold.
    """

    def __init__(self, start: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.start = start

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> int:
        """The next integer."""
        value = next_integer(self.start)
        limits = column_limits(instance, step)
        if limits.largest is not None and not -limits.largest <= value <= limits.largest:
            raise ScopeError(
                f"{limits.name} holds integers up to {limits.largest}, but the next one that no "
                f"other worker can have is {value}. Use BigInteger for the column, or "
                f"Scoped text.",
                column=limits.name,
            )
        return value

    def __repr__(self) -> str:
        return f"ScopedInteger({self.start})"
