"""unittest's test cases, whose rows are gone after the test."""

from __future__ import annotations

import functools
import unittest
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from tidyrows.errors import NotBoundError
from tidyrows.greenlets import is_async
from tidyrows.testing.tidy import Tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__unittest = True
"""unittest leaves frames of such a module out, and shows the test's own line."""


class _Rows:
    """What both kinds of test case do; unittest's own class stands behind it.

    ``_callSetUp`` and its kin are where ``IsolatedAsyncioTestCase`` hooks in too: a ``setUp`` that
    never calls ``super()`` does not matter there, and an error there is the test's own.
    """

    tidy_engine: ClassVar[Any] = None
    tidy_options: ClassVar[dict[str, Any]] = {}
    tidy_class: ClassVar[Tidy]
    tidy: Tidy

    _tidy_class_open: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("setUpClass")
        if isinstance(own, classmethod):
            cls.setUpClass = classmethod(_opening(own.__func__))  # type: ignore[attr-defined]
        elif not issubclass(next(c for c in cls.__mro__ if "setUpClass" in vars(c)), _Rows):
            # A mixin's, which need not call super(), comes first.
            def of_the_mixin(called: Any) -> None:
                super(cls, called).setUpClass()  # type: ignore[misc]

            cls.setUpClass = classmethod(_opening(of_the_mixin))  # type: ignore[attr-defined]

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
    def _open_class(cls) -> None:
        if cls.__dict__.get("_tidy_class_open"):
            return
        bind = cls.make_tidy_engine()
        if is_async(bind):
            return
        cls.tidy_class = Tidy(bind, test=cls.__qualname__, **cls.tidy_options)
        cls.tidy_class.start()
        cls._tidy_class_open = True
        cls.addClassCleanup(cls._close_class)  # type: ignore[attr-defined]

    @classmethod
    def _close_class(cls) -> None:
        if cls.__dict__.get("_tidy_class_open"):
            cls._tidy_class_open = False
            cls.tidy_class.finish()

    # -- one test ----------------------------------------------------------------------------------

    def _made(self) -> Tidy:
        self._tidy_errors: list[BaseException] = []
        self._tidy_open = False
        name = self.id()  # type: ignore[attr-defined]
        self.tidy = Tidy(self.make_tidy_engine(), test=name, **self.tidy_options)
        return self.tidy

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """What is interrupted is to be done yet; what fails is not tried again."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._tidy_open = False
            raise
        self._tidy_open = False

    def _interrupted(self) -> None:
        """Finish at once: unittest calls no cleanup after a KeyboardInterrupt.

        What cannot be done now is done when the process ends.
        """
        raise NotImplementedError

    @contextmanager
    def _noting(self, *, expected: bool = False) -> Iterator[None]:
        try:
            yield
        except unittest.SkipTest:
            raise
        except KeyboardInterrupt as error:
            try:
                self._interrupted()
            except Exception as failure:  # noqa: BLE001 -- the interrupt comes first
                error.add_note(f"tidyrows: the cleanup after this failed too: {failure}")
            raise
        except BaseException as error:
            if not expected:
                self._tidy_errors.append(error)
            raise

    def _callTestMethod(self, method: Callable[[], Any]) -> None:  # noqa: N802 -- unittest's name
        name = "__unittest_expecting_failure__"
        expected = getattr(self, name, False) or getattr(method, name, False)
        with self._noting(expected=expected):
            super()._callTestMethod(method)  # type: ignore[misc]

    def _callTearDown(self) -> None:  # noqa: N802 -- unittest's name
        with self._noting():
            super()._callTearDown()  # type: ignore[misc]

    def _callCleanup(self, function: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N802 -- unittest's name
        with self._noting():
            super()._callCleanup(function, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def subTest(self, *args: Any, **params: Any) -> Iterator[None]:  # noqa: N802 -- unittest's name
        """As unittest's; a failure in it is the test's."""
        with super().subTest(*args, **params), self._noting():  # type: ignore[misc]
            yield

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        """As unittest's."""
        self._tidy_result = result
        try:
            return super().run(result)  # type: ignore[misc,no-any-return]
        finally:
            self._tidy_result = None
            self._tidy_errors = []  # they hold the frames of the test

    def _say(self, note: str | None) -> None:
        """Show with the failure what was kept; unittest has formatted it by now, pytest has not."""
        if note is None:
            return
        for error in self._tidy_errors:
            error.add_note(note)
        for name in ("failures", "errors"):
            told: list[Any] = getattr(self._tidy_result, name, [])
            for at, (test, text) in enumerate(told):
                if test is self or getattr(test, "test_case", None) is self:
                    told[at] = (test, f"{text}\n{note}\n")


def _opening(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A setUpClass that finds ``tidy_class`` there, whether or not it calls ``super()``."""

    @functools.wraps(function)
    def opened(cls: Any) -> Any:
        cls._open_class()
        return function(cls)

    return opened


class TidyTestCase(_Rows, unittest.TestCase):
    """A test case whose rows are deleted after its own ``tearDown`` and ``addCleanup`` functions.

    Attributes:
        tidy_engine: where the rows go, as for :class:`Tidy`; or override ``make_tidy_engine``.
        tidy_options: passed to :class:`Tidy`.
        tidy: the test's, there from the first line of ``setUp`` on.
        tidy_class: the class's, there from the first line of ``setUpClass`` on; its rows are
            deleted after the last test of the class, and where ``setUpClass`` fails.

    Example:
        >>> class LoginTest(TidyTestCase):
        ...     tidy_engine = engine
        ...
        ...     def test_login(self):
        ...         UserFactory()
    """

    @classmethod
    def setUpClass(cls) -> None:
        """Listen for the rows of the class."""
        cls._open_class()

    def _callSetUp(self) -> None:  # noqa: N802 -- unittest's name
        self._made().start()
        self._tidy_open = True
        self.addCleanup(self._finish)  # the first one, hence the last one to be called
        with self._noting():
            super()._callSetUp()  # type: ignore[misc]

    def _finish(self) -> None:
        if self._tidy_open:
            with self._closing():
                self._say(self.tidy.finish(failed=bool(self._tidy_errors)))

    def _interrupted(self) -> None:
        try:
            self._finish()
        finally:
            self._close_class()


class AsyncTidyTestCase(_Rows, unittest.IsolatedAsyncioTestCase):
    """As :class:`TidyTestCase`, in an asyncio loop: rows are deleted in the test's own loop.

    ``tidy_class`` is there where the engine is synchronous: ``setUpClass`` has no loop.
    """

    @classmethod
    def setUpClass(cls) -> None:
        """Listen for the rows of the class."""
        cls._open_class()

    def _callSetUp(self) -> None:  # noqa: N802 -- unittest's name
        self._made()
        self._callAsync(self._start)  # type: ignore[attr-defined]
        with self._noting():
            super()._callSetUp()  # type: ignore[misc]

    async def _start(self) -> None:
        await self.tidy.start_async()
        self._tidy_open = True
        self.addAsyncCleanup(self._finish)

    async def _finish(self) -> None:
        if self._tidy_open:
            with self._closing():
                self._say(await self.tidy.finish_async(failed=bool(self._tidy_errors)))

    def _interrupted(self) -> None:
        try:
            self._callAsync(self._finish)  # type: ignore[attr-defined]
        finally:
            self._close_class()
