"""Test cases of unittest whose rows are deleted after the test."""

from __future__ import annotations

import functools
import unittest
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from tidyrows.errors import NotBoundError, add_note, text_of
from tidyrows.factories.seeding import BaseSeed, Seeded, worker_id
from tidyrows.greenlets import is_async
from tidyrows.isolation.levels import WORKER
from tidyrows.testing.summary import ResidueOfProcess
from tidyrows.testing.tidy import Tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


RESIDUE = ResidueOfProcess()
"""Printed when the process ends; unittest has no hook for the end of a run."""
__unittest = True
"""unittest leaves the frames of such a module out of a traceback."""


class TidyTestCase(unittest.TestCase):
    """A test case whose rows are deleted after its own ``tearDown`` and ``addCleanup`` functions.

    Attributes:
        tidy_engine: where the rows go, as for :class:`Tidy`; or override ``make_tidy_engine``.
        tidy_options: passed to :class:`Tidy`; ``isolation`` is that of each test.
        tidy: of the test, from the first line of ``setUp`` on.
        tidy_class: of the class, from the first line of ``setUpClass`` on; its rows are deleted
            after the last test of the class, and where ``setUpClass`` fails.

    Example:
        >>> class LoginTest(TidyTestCase):
        ...     tidy_engine = engine
        ...
        ...     def test_login(self):
        ...         UserFactory()
    """

    # It overrides private methods of unittest, _callSetUp and the like, as unittest's own
    # IsolatedAsyncioTestCase does: there it does not matter whether the test's setUp calls
    # super(), and an error is the test's own. No public method offers that.

    tidy_engine: ClassVar[Any] = None
    tidy_options: ClassVar[dict[str, Any]] = {}
    tidy_class: ClassVar[Tidy]
    tidy: Tidy

    _tidy_class_started: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("setUpClass")
        if isinstance(own, classmethod):
            cls.setUpClass = classmethod(_with_class_tracker(own.__func__))  # type: ignore[assignment,method-assign]
        elif not issubclass(next(c for c in cls.__mro__ if "setUpClass" in vars(c)), TidyTestCase):
            # A mixin's setUpClass, which need not call super(), comes first.
            def mixin_set_up(called: Any) -> None:
                super(cls, called).setUpClass()

            cls.setUpClass = classmethod(_with_class_tracker(mixin_set_up))  # type: ignore[assignment,method-assign]

    @classmethod
    def make_tidy_engine(cls) -> Any:
        """Where the rows go: ``tidy_engine``, unless a class overrides this.

        Raises:
            NotBoundError: the class has neither.
        """
        if cls.tidy_engine is None:
            raise NotBoundError(
                f"{cls.__qualname__} does not say where its rows go: write tidy_engine = engine in "
                f"the class, or override make_tidy_engine()."
            )
        return cls.tidy_engine

    @classmethod
    def setUpClass(cls) -> None:
        """Start the tracker of the class."""
        cls._start_class()

    @classmethod
    def _start_class(cls) -> None:
        if cls.__dict__.get("_tidy_class_started"):
            return
        bind = cls.make_tidy_engine()
        if is_async(bind):
            return
        options = cls.tidy_options | {"isolation": WORKER}  # its rows are those of several tests
        cls.tidy_class = Tidy(bind, test=cls.__qualname__, **options)
        cls.tidy_class.start()
        cls._tidy_class_started = True
        cls.addClassCleanup(cls._finish_class)

    @classmethod
    def _finish_class(cls) -> None:
        if cls.__dict__.get("_tidy_class_started"):
            cls._tidy_class_started = False
            try:
                cls.tidy_class.finish()
            finally:
                RESIDUE.add(cls.tidy_class)

    # -- one test ----------------------------------------------------------------------------------

    def _callSetUp(self) -> None:  # noqa: N802 -- unittest's name
        self._tidy_errors: list[BaseException] = []
        self._tidy_started = False
        name = self.id()
        self.tidy = Tidy(self.make_tidy_engine(), test=name, **self.tidy_options)
        self._start_test()
        self._collect(super()._callSetUp)  # type: ignore[misc]

    def _start_test(self) -> None:
        self.tidy.start()
        self._tidy_started = True
        self.addCleanup(self._finish_test)  # the first one, hence the last one to be called

    def _finish_test(self) -> None:
        if self._tidy_started:
            with self._finishing():
                self._show(self.tidy.finish(failed=bool(self._tidy_errors)))

    @contextmanager
    def _finishing(self) -> Iterator[None]:
        """A finish that is interrupted may be repeated; one that fails is not."""
        interrupted = False
        try:
            yield
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            self._tidy_started = interrupted
            RESIDUE.add(self.tidy)

    def _collect(self, call: Callable[[], Any], *, expected: bool = False) -> None:
        try:
            call()
        except BaseException as error:
            self._collect_error(error, expected=expected)
            raise

    def _collect_error(self, error: BaseException, *, expected: bool = False) -> None:
        if isinstance(error, KeyboardInterrupt):
            try:  # unittest calls no cleanup after it
                try:
                    self._finish_test()
                finally:
                    self._finish_class()
            except Exception as failure:  # noqa: BLE001 -- the interrupt comes first
                add_note(error, f"tidyrows: the cleanup after this failed too: {text_of(failure)}")
        elif not (expected or isinstance(error, unittest.SkipTest)):
            self._tidy_errors.append(error)

    def _callTestMethod(self, method: Callable[[], Any]) -> None:  # noqa: N802 -- unittest's name
        name = "__unittest_expecting_failure__"
        expected = getattr(self, name, False) or getattr(method, name, False)
        self._collect(functools.partial(super()._callTestMethod, method), expected=expected)  # type: ignore[misc]

    def _callTearDown(self) -> None:  # noqa: N802 -- unittest's name
        self._collect(super()._callTearDown)  # type: ignore[misc]

    def _callCleanup(self, function: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N802 -- unittest's name
        self._collect(functools.partial(super()._callCleanup, function, *args, **kwargs))  # type: ignore[misc]

    @contextmanager
    def subTest(self, *args: Any, **params: Any) -> Iterator[None]:  # noqa: N802 -- unittest's name
        """As unittest's; a failure in it is the test's."""
        with super().subTest(*args, **params):
            try:
                yield
            except BaseException as error:
                self._collect_error(error)
                raise

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        """As unittest's."""
        self._tidy_result = result
        seeded = Seeded(BaseSeed.of_process(), self.id())
        try:
            with seeded if RESIDUE.forward is None else nullcontext():  # pytest's plugin seeds too
                return super().run(result)
        finally:
            if self._tidy_errors:
                RESIDUE.note_failure(seeded)
            self._tidy_result = None
            self._tidy_errors = []  # they hold the frames of the test

    def _show(self, kept: str | None) -> None:
        """Add to the failure which rows were kept; unittest has formatted it by now, pytest not."""
        if kept is None:
            return
        for error in self._tidy_errors:
            add_note(error, kept)
        for name in ("failures", "errors"):
            reported: list[Any] = getattr(self._tidy_result, name, [])
            for at, (test, text) in enumerate(reported):
                if test is self or getattr(test, "test_case", None) is self:
                    reported[at] = (test, f"{text}\n{kept}\n")


def _with_class_tracker(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A setUpClass with ``tidy_class``, whether or not it calls ``super()``."""

    @functools.wraps(function)
    def set_up(cls: Any) -> Any:
        cls._start_class()
        key = (worker_id(), cls.__module__, cls.__qualname__)
        seeded = Seeded(BaseSeed.of_process(), *key, is_shared=True)
        with seeded if RESIDUE.forward is None else nullcontext():  # as above
            return function(cls)

    return set_up


class AsyncTidyTestCase(TidyTestCase, unittest.IsolatedAsyncioTestCase):
    """As :class:`TidyTestCase`, in an asyncio loop: rows are deleted in the test's own loop.

    There is a ``tidy_class`` only where the engine is synchronous: ``setUpClass`` has no loop.
    """

    def _start_test(self) -> None:
        self._callAsync(self._start)  # type: ignore[attr-defined]

    async def _start(self) -> None:
        await self.tidy.start_async()
        self._tidy_started = True
        self.addAsyncCleanup(self._finish)

    def _finish_test(self) -> None:
        self._callAsync(self._finish)  # type: ignore[attr-defined]

    async def _finish(self) -> None:
        if self._tidy_started:
            with self._finishing():
                self._show(await self.tidy.finish_async(failed=bool(self._tidy_errors)))
