"""behave: every scenario has ``context.tidy``, and its rows are deleted after it.

Write this in ``features/environment.py``::

    from tidyrows.testing.behave import setup

    def before_all(context):
        setup(context, engine)

behave has no hook that a library can register: :func:`setup` puts its own in front of those
of ``environment.py``. ``before_tag``, ``before_feature``, ``before_scenario`` see ``context.tidy``.
In ``before_feature`` it is the feature's, whose rows live until the feature ends; in a scenario,
its Background and each row of an outline it is the scenario's, and the feature's is
``context.tidy_feature``. After ``setup``, in ``before_all``, it is the run's, which is
``context.tidy_run``. Rows are deleted after behave's own ``after_`` hooks and their cleanups.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from behave.fixture import fixture, use_fixture

from tidyrows.factories.seeding import BaseSeed, Seeded, worker_id
from tidyrows.isolation.levels import WORKER
from tidyrows.testing.summary import ResidueOfProcess
from tidyrows.testing.tidy import Tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

    from tidyrows.tracking.binding import Bind

_FAILED = frozenset({"failed", "error", "hook_error", "cleanup_error", "undefined"})


def setup(context: Any, bind: Bind | str | sa.URL, **options: Any) -> None:
    """Give the run, every feature and every scenario a :class:`Tidy`; call it in ``before_all``.

    Args:
        context: behave's.
        bind: where the rows go.
        options: passed to :class:`Tidy`; ``isolation`` is that of each scenario.
    """
    started: list[Any] = []
    use_fixture(_rows_of_the_run, context, bind, **options)

    def begin(context: Any) -> None:
        statement = getattr(context, "scenario", None) or getattr(context, "feature", None)
        if statement is None or any(each is statement for each in started):
            return
        started.append(statement)
        context.add_cleanup(started.remove, statement)
        use_fixture(tidy_rows, context, bind, statement=statement, **options)

    hooks = context._runner.hooks  # noqa: SLF001 -- the context has its runner, and so the hooks, under no public name
    for name in ("before_tag", "before_feature", "before_scenario"):
        hooks[name] = _before(begin, hooks.get(name))


def _before(begin: Callable[[Any], None], hook: Callable[..., None] | None) -> Callable[..., None]:
    def both(context: Any, statement: Any) -> None:
        begin(context)
        if hook is not None:
            hook(context, statement)

    return both if hook is None else functools.wraps(hook)(both)


@fixture  # type: ignore[untyped-decorator]  # behave ships no types
def _rows_of_the_run(context: Any, bind: Bind | str | sa.URL, **options: Any) -> Iterator[Tidy]:
    options["isolation"] = WORKER  # its rows are those of several scenarios
    context.tidy = context.tidy_run = tidy = Tidy(bind, **options).start()
    context.tidy_residue = ResidueOfProcess()
    yield tidy
    tidy.finish()
    context.tidy_residue.add(tidy)
    context.tidy_residue.print()


@fixture  # type: ignore[untyped-decorator]  # behave ships no types
def tidy_rows(
    context: Any, bind: Bind | str | sa.URL, *, statement: Any, **options: Any
) -> Iterator[Tidy]:
    """One feature's or scenario's rows, for behave's ``use_fixture``.

    Args:
        context: behave's; gets ``tidy``, and ``tidy_feature`` where the statement is a feature.
        bind: where the rows go.
        statement: the feature or scenario.
        options: passed to :class:`Tidy`.
    """
    name = f"{statement.filename}:{statement.line}"
    is_shared = statement.type == "feature"
    if is_shared:
        options["isolation"] = WORKER
    tidy = Tidy(bind, test=name, **options)
    tidy.start()
    context.tidy = tidy
    if is_shared:
        context.tidy_feature = tidy
    key = (worker_id(), name) if is_shared else (name,)
    with Seeded(BaseSeed.of_process(), *key, is_shared=is_shared) as seeded:
        yield tidy
    failed = statement.status.name in _FAILED
    try:
        kept = tidy.finish(failed=failed)
    finally:
        if "tidy_residue" in context:  # after setup()
            context.tidy_residue.add(tidy)
            if failed:
                context.tidy_residue.note_failure(seeded)
    if kept is not None:
        # behave shows what a cleanup prints only where the cleanup fails.
        print(kept, file=sys.__stderr__)
