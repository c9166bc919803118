"""A suite that swaps the base class must not notice: each test runs on both bases.

``tests/real/test_drop_in.py`` runs the suites of factory_boy and pytest-factoryboy.
"""

from __future__ import annotations

from unittest import mock

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from tidyrows import CleanupManager, ResourceTracker, worker
from tidyrows.factories import TrackedFactory

WITHOUT_SESSION = RuntimeError, sa.exc.OperationalError
"""The second one with a tracker: its session is used, and its database has no tables here."""


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str | None] = mapped_column(sa.String(20), unique=True)
    text: Mapped[str | None] = mapped_column(sa.String(20), unique=True)
    title: Mapped[str | None] = mapped_column(sa.String(20), unique=True)
    session: Mapped[str | None] = mapped_column(sa.String(20))  # a name that _save has too


@pytest.fixture(autouse=True)
def _lone_worker(monkeypatch):
    """With several workers sequences interleave, these tests' own workers included."""
    monkeypatch.setattr(worker._process, "current", worker.WorkerContext("lone", "main", 0))


@pytest.fixture(params=["factory_boy", "tidyrows", "tidyrows with a tracker"])
def base(request, tmp_path):
    if request.param != "tidyrows with a tracker":
        yield SQLAlchemyModelFactory if request.param == "factory_boy" else TrackedFactory
        return
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'tracked.db'}")
    with CleanupManager(ResourceTracker(engine)):
        yield TrackedFactory
    engine.dispose()


@pytest.fixture
def session(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'pages.db'}")
    Base.metadata.create_all(engine)
    session = scoped_session(sessionmaker(engine))
    yield session
    session.remove()
    engine.dispose()


@pytest.fixture
def pages(base, session):
    class PageFactory(base):
        class Meta:
            model = Page
            sqlalchemy_session = session

        id = factory.Sequence(int)
        text = factory.Sequence("text{}".format)

    return PageFactory


def keyed(pages, *fields):
    class KeyedFactory(pages):
        class Meta:
            sqlalchemy_get_or_create = fields
            sqlalchemy_session_persistence = "commit"

    return KeyedFactory


def test_sequences_and_keys_are_unrelated(pages):
    pages.reset_sequence(1)
    assert [pages.build().text, pages.build().text] == ["text1", "text2"]
    assert (pages(id=10).id, pages().text) == (10, "text4")
    pages.reset_sequence()
    assert (pages().id, pages.build().text) == (0, "text1")


def test_an_object_is_pending_until_somebody_flushes(pages, session):
    page = pages(id=None)
    assert page in session.new
    assert page.id is None


def test_get_or_create_gets_and_creates(pages, session):
    both = keyed(pages, "slug")
    made = both.create_batch(6, slug=factory.Iterator(["main", "alt"]))
    assert len(set(made)) == 2
    assert sorted(session.scalars(sa.select(Page.slug))) == ["alt", "main"]


def test_get_or_create_by_several_fields_finds_by_the_one_given(pages):
    both = keyed(pages, "slug", "text")
    first = both(slug="a")
    assert both(slug="a") is first
    with pytest.raises(sa.exc.IntegrityError):
        both(slug="a", text="other")


def test_get_or_create_raises_what_collides_elsewhere(pages):
    both = keyed(pages, "slug", "text")
    both(slug="a", title="taken")
    with pytest.raises(sa.exc.IntegrityError):
        both(slug="b", title="taken")


def test_get_or_create_needs_its_fields(pages):
    with pytest.raises(factory.FactoryError, match="initialization value for 'slug'"):
        keyed(pages, "slug")()


def test_get_or_create_raises_where_several_rows_match(pages, session):
    pages.create_batch(2, title=None)
    with pytest.raises(sa.orm.exc.MultipleResultsFound):
        keyed(pages, "title")(title=None)


@pytest.mark.parametrize(
    ("persistence", "flushes", "commits"), [(None, 0, 0), ("flush", 1, 0), ("commit", 0, 1)]
)
def test_persistence_flushes_or_commits_once(pages, session, persistence, flushes, commits):
    mocked = mock.NonCallableMagicMock(spec=session)

    class Persistent(pages):
        class Meta:
            sqlalchemy_session = mocked
            sqlalchemy_session_persistence = persistence

    Persistent()
    assert mocked.flush.call_count == flushes
    assert mocked.commit.call_count == commits
    assert mocked.add.call_count == 1


def test_a_persistence_that_does_not_exist_is_a_type_error(pages):
    with pytest.raises(TypeError, match="sqlalchemy_session_persistence"):

        class Wrong(pages):
            class Meta:
                sqlalchemy_session_persistence = "sometimes"


def test_an_unknown_option_is_a_type_error(pages):
    with pytest.raises(TypeError, match="unknown attribute"):

        class Wrong(pages):
            class Meta:
                sqlalchemy_sesion = None


def test_without_a_session_creating_is_a_runtime_error_and_building_is_not(base):
    class Sessionless(base):
        class Meta:
            model = Page
            sqlalchemy_session = None

    with pytest.raises(WITHOUT_SESSION, match=r"session|no such table"):
        Sessionless()
    assert Sessionless.build(slug="a").slug == "a"


def test_a_session_factory_is_called_and_its_session_kept(base, session):
    calls = []

    class Lazy(base):
        class Meta:
            model = Page
            sqlalchemy_session_factory = lambda: calls.append(1) or session  # noqa: E731 -- as in factory_boy's manual

    assert Lazy._meta.sqlalchemy_session is None
    Lazy.create_batch(2)
    assert len(calls) == 2
    assert Lazy._meta.sqlalchemy_session is session


def test_a_session_and_a_session_factory_are_one_too_many(pages, session):
    with pytest.raises(RuntimeError, match=r"^Provide either a sqlalchemy_session or a sqla"):

        class Both(pages):
            class Meta:
                sqlalchemy_session = session
                sqlalchemy_session_factory = session


@pytest.mark.parametrize("fields", [(), ("session",)])
def test_a_field_may_be_called_session(pages, fields):
    assert keyed(pages, *fields)(session="a word").session == "a word"


def test_a_session_set_on_meta_later_is_used(base, session):
    """Suites do so in a fixture."""

    class Late(base):
        class Meta:
            model = Page

    Late._meta.sqlalchemy_session = session
    assert Late() in session
    Late._meta.sqlalchemy_session = None
    with pytest.raises(WITHOUT_SESSION, match=r"session|no such table"):
        Late()


def test_a_create_method_of_ones_own_may_call_super(pages, session):
    class Own(pages):
        @classmethod
        def _create(cls, model_class, *args, **kwargs):
            kwargs["title"] = "own"
            return super()._create(model_class, *args, **kwargs)

    assert Own().title == "own"


def test_an_abstract_factory_creates_nothing(base):
    with pytest.raises(factory.FactoryError, match="abstract"):
        base.create()


def test_strategies_and_hooks(pages):
    seen = []

    class Hooked(pages):
        class Meta:
            strategy = factory.BUILD_STRATEGY
            exclude = ("extra",)
            inline_args = ()
            rename = {"title_": "title"}  # noqa: RUF012 -- factory_boy's way

        extra = 1
        title_ = factory.LazyAttribute(lambda it: f"t{it.extra}")

        @factory.post_generation
        def hook(self, create, extracted, **kwargs):
            seen.append((create, extracted, kwargs))

        @classmethod
        def _after_postgeneration(cls, instance, create, results=None):
            seen.append((instance.title, create, sorted(results)))

    assert Hooked(hook=3, hook__a=4).title == "t1"
    assert seen == [(False, 3, {"a": 4}), ("t1", False, ["hook"])]
    Hooked.create()
    assert seen[2:] == [(True, None, {}), ("t1", True, ["hook"])]
