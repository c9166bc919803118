"""sqlalchemy_get_or_create: a lost race harms nothing else, and finds the right row."""

from __future__ import annotations

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tidyrows.capture.ownership import entered
from tidyrows.factories import TrackedFactory
from tidyrows.worker import WorkerContext


class Base(DeclarativeBase):
    pass


class City(Base):
    __tablename__ = "goc_cities"
    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(sa.String(20), unique=True)
    text: Mapped[str | None] = mapped_column(sa.String(20), unique=True)
    title: Mapped[str | None] = mapped_column(sa.String(20), unique=True)


class Street(Base):
    __tablename__ = "goc_streets"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(20), unique=True)
    city_id: Mapped[int] = mapped_column(sa.ForeignKey("goc_cities.id"))
    city: Mapped[City] = relationship()


class CityFactory(TrackedFactory[City]):
    class Meta:
        model = City
        sqlalchemy_get_or_create = ("slug", "text")

    slug = factory.Sequence("slug{}".format)
    text = factory.Sequence("text{}".format)


class StreetFactory(TrackedFactory[Street]):
    class Meta:
        model = Street
        sqlalchemy_get_or_create = ("name",)

    name = factory.Sequence("street{}".format)
    city = factory.SubFactory(CityFactory)


class Ambient:
    active = True
    is_async = False
    owns_session = True
    in_transaction = True
    context = WorkerContext.current()

    def __init__(self, session):
        self.session = session
        self.engines = self.sessions = self.store = self

    def is_transient(self, error):
        return False

    def uncertain_keys(self):
        return set()

    def watch(self, session):
        pass


@pytest.fixture
def session(engine):
    """A session on an empty database; the transaction has an uncommitted city in it."""
    Base.metadata.create_all(engine)
    with Session(engine, expire_on_commit=False) as session:
        yield session


@pytest.fixture(params=["ambient", "flush", "commit"])
def cities(request, session):
    """The factories in the ambient session, or in a session that Meta names."""
    if request.param == "ambient":
        with entered(Ambient(session)):
            yield CityFactory, StreetFactory
        return

    class NamedCityFactory(CityFactory):
        class Meta:
            sqlalchemy_session = session
            sqlalchemy_session_persistence = request.param

    class NamedStreetFactory(StreetFactory):
        class Meta:
            sqlalchemy_session = session
            sqlalchemy_session_persistence = request.param

        city = factory.SubFactory(NamedCityFactory)

    yield NamedCityFactory, NamedStreetFactory


def names(session, column):
    session.commit()
    return sorted(session.scalars(sa.select(column)))


def test_a_row_that_is_there_is_found(cities, session):
    city, _ = cities
    first = city(slug="a", text="b")
    assert city(slug="a", text="b") is first
    assert names(session, City.slug) == ["a"]


def test_a_collision_finds_the_row_by_what_the_call_named(cities, session):
    city, _ = cities
    first = city(slug="a")
    assert city(slug="a") is first
    assert city(slug=factory.LazyFunction(lambda: "a")) is first
    assert names(session, City.slug) == ["a"]


def test_a_collision_leaves_what_was_not_committed_as_it_was(cities, session):
    """factory_boy rolls the session back, and every uncommitted row of the test is gone."""
    city, _ = cities
    city(slug="a")
    session.add(City(slug="kept"))
    city(slug="a")
    assert names(session, City.slug) == ["a", "kept"]


def test_a_nested_collision_finds_the_row_of_its_own_factory(cities, session):
    """factory_boy looks by the parameters of the class's last own call: the wrong row."""
    city, street = cities
    wrong, right = city(slug="wrong"), city(slug="right")
    city(slug="wrong")
    assert street(city__slug="right").city is right
    assert street(city__slug="wrong").city is wrong
    assert street(city__slug="new").city.slug == "new"
    assert names(session, City.slug) == ["new", "right", "wrong"]


@pytest.mark.parametrize("given", [{}, {"slug": "other"}])
def test_a_collision_on_another_column_is_raised(cities, session, given):
    city, _ = cities
    city(slug="a", title="taken")
    session.add(City(slug="kept"))
    with pytest.raises(sa.exc.IntegrityError):
        city(title="taken", **given)
    if city is not CityFactory:  # there the failing call rolls its session back
        assert names(session, City.slug) == ["a", "kept"]


def test_rows_that_both_match_are_raised(session):
    class Twins(TrackedFactory[City]):
        class Meta:
            model = City
            sqlalchemy_session = session
            sqlalchemy_get_or_create = ("title",)

    session.add_all([City(slug="a", title=None), City(slug="b", title=None)])
    with pytest.raises(sa.orm.exc.MultipleResultsFound):
        Twins(slug="c", title=None)


def test_a_missing_key_field_is_factory_boys_error(session):
    class Incomplete(TrackedFactory[City]):
        class Meta:
            model = City
            sqlalchemy_session = session
            sqlalchemy_get_or_create = ("slug",)

    with pytest.raises(factory.FactoryError, match="initialization value for 'slug'"):
        Incomplete()


def test_without_persistence_a_named_session_is_not_flushed(session):
    """As in factory_boy: a hook may still fill what the row needs."""

    class Unflushed(TrackedFactory[City]):
        class Meta:
            model = City
            sqlalchemy_session = session
            sqlalchemy_get_or_create = ("slug",)

        slug = "later"

    made = Unflushed()
    assert made.id is None
    assert Unflushed() is made
    assert names(session, City.slug) == ["later"]


def test_a_save_method_of_ones_own_is_called(session):
    class Own(TrackedFactory[City]):
        class Meta:
            model = City
            sqlalchemy_session = session
            sqlalchemy_session_persistence = "flush"
            sqlalchemy_get_or_create = ("slug",)

        slug = "a"

        @classmethod
        def _save(cls, model_class, session, args, kwargs):
            return super()._save(model_class, session, args, {**kwargs, "title": "own"})

    assert Own().title == "own"


def overtaken(persistence, session, engine):
    """A factory whose slug another worker takes after the look and before the insert."""

    class OvertakenFactory(TrackedFactory[City]):
        class Meta:
            model = City
            sqlalchemy_session = session
            sqlalchemy_session_persistence = persistence
            sqlalchemy_get_or_create = ("slug",)

        @classmethod
        def _save(cls, model_class, session, args, kwargs):
            with engine.begin() as other:
                other.execute(sa.insert(City).values(slug=kwargs["slug"], text="theirs"))
            return super()._save(model_class, session, args, kwargs)

    return OvertakenFactory


@pytest.mark.parametrize("persistence", ["flush", "commit"])
def test_a_race_that_another_worker_wins_finds_its_row(session, engine, persistence):
    """MySQL's REPEATABLE READ snapshot is from before the other's commit."""
    if engine.dialect.name != "sqlite":  # which has one writer at a time, so no uncommitted row
        session.add(City(slug="kept"))
        session.flush()
    found = overtaken(persistence, session, engine)(slug="raced")
    assert found.text == "theirs"
    assert "raced" in names(session, City.slug)
    assert ("kept" in names(session, City.slug)) is (engine.dialect.name != "sqlite")


def test_with_autocommit_there_is_no_transaction_to_save(engine):
    Base.metadata.create_all(engine)
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        assert overtaken("flush", session, engine)(slug="raced").text == "theirs"


def test_factory_boy_has_the_faults_that_are_mended_here(engine):
    """Should this fail, factory_boy is mended, and this module can go."""
    Base.metadata.create_all(engine)
    with Session(engine) as session:

        class PlainFactory(SQLAlchemyModelFactory):
            class Meta:
                model = City
                sqlalchemy_session = session
                sqlalchemy_session_persistence = "flush"
                sqlalchemy_get_or_create = ("slug", "text")

            text = factory.Sequence("text{}".format)

        PlainFactory(slug="a")
        session.commit()
        session.add(City(slug="kept"))
        PlainFactory(slug="a")
        assert names(session, City.slug) == ["a"]
