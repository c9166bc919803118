"""Declarations of values that no other worker produces: text, e-mail addresses, integers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from factory.declarations import BaseDeclaration

from tidyrows.arguments import checked, instance_of, name, whole
from tidyrows.errors import ScopeError
from tidyrows.factories.column_limits import column_limits
from tidyrows.template import TAG_WIDTH, check, escaped
from tidyrows.tracking.tracker import current_tracker
from tidyrows.worker import WorkerContext

if TYPE_CHECKING:
    from factory.builder import BuildStep, Resolver

LOCAL_WIDTH = 64  # of an e-mail address, before the @ (RFC 5321)
ADDRESS_WIDTH = 254
_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*\.?")
_DOMAIN = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")


def active_context() -> WorkerContext:
    """The context of the ambient tracker, else of this process."""
    tracker = current_tracker()
    return WorkerContext.current() if tracker is None else tracker.context


class Scoped(BaseDeclaration):
    """Text that differs in every call, test, worker, run and host.

    It is cut to fit the mapped column: literal text is cut, the tag never.

    Args:
        template: literal text with ``{tag}``; or with the parts of a tag: ``{run}``, ``{worker}``,
            ``{n}`` and, optionally, ``{test}``.

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

    @checked(template=name("user-{tag}"))
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
        prefix: the beginning of the address; a hyphen and the tag follow.
        domain: the part after the @.

    Raises:
        ScopeError: prefix or domain is not valid in an address; or, when a value is made, the
            column is too short for tag and domain.
    """

    @checked(
        prefix=instance_of(str, need="a text", example="'user'"),
        domain=instance_of(str, need="a text", example="'example.test'"),
    )
    def __init__(self, prefix: str = "user", domain: str = "example.test") -> None:
        if prefix and not _LOCAL.fullmatch(prefix):
            raise ScopeError(
                f"{prefix!r} cannot begin an e-mail address: letters, digits and "
                f"!#$%&'*+/=?^_`{{|}}~- may, and single dots between them."
            )
        if not _DOMAIN.fullmatch(domain):
            raise ScopeError(f"{domain!r} is not a domain of an e-mail address; example.test is.")
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.prefix = prefix
        self.domain = domain
        begin = escaped(f"{prefix[: LOCAL_WIDTH - TAG_WIDTH - 1]}-") if prefix else ""
        self._template = f"{begin}{{tag}}@{domain}"

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> str:
        """The next text."""
        limits = column_limits(instance, step)
        length = ADDRESS_WIDTH if limits.length is None else min(limits.length, ADDRESS_WIDTH)
        return active_context().text(self._template, length, column=limits.name, keep_end=True)

    def __repr__(self) -> str:
        return f"ScopedEmail({self.prefix!r}, {self.domain!r})"


class ScopedInteger(BaseDeclaration):
    """An integer that differs in every call, test and worker of a run.

    The integers of several workers interleave, and another run begins at ``start`` again. Where the
    tracker has a ledger, they differ between runs and hosts too. Declarations of one column need
    the same ``start``.

    Args:
        start: the first worker's first integer.

    Raises:
        ScopeError: the mapped column cannot hold the next value.
    """

    @checked(start=whole("100"))
    def __init__(self, start: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.start = start

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> int:
        """The next integer."""
        tracker = current_tracker()
        source = WorkerContext.current() if tracker is None else tracker
        value = source.integer(self.start)
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
