"""Scoped values find their column, are cut to fit it, and work wherever factory_boy evaluates."""

from __future__ import annotations

import re

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    mapped_column,
    synonym,
)

from tidyrows.capture.ownership import entered
from tidyrows.errors import ScopeError
from tidyrows.factories import Scoped, ScopedEmail, ScopedInteger, TrackedFactory
from tidyrows.worker import WorkerContext

CONTEXT = WorkerContext("run", "gw3", 3, "test_it", 8)
TAG = rf"{CONTEXT.tag}[0-9a-z]{{1,5}}"


class Base(DeclarativeBase):
    pass


class Lower(sa.types.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    name: Mapped[str | None] = mapped_column("name_in_database", sa.String(18))
    long: Mapped[str | None] = mapped_column(sa.String(100))
    text: Mapped[str | None] = mapped_column(sa.Text)
    endless: Mapped[str | None] = mapped_column(sa.String)
    short: Mapped[str | None] = mapped_column(sa.String(15))
    lower: Mapped[str | None] = mapped_column(Lower(18))
    small: Mapped[int | None] = mapped_column(sa.SmallInteger)
    number: Mapped[int | None] = mapped_column(sa.Integer)
    big: Mapped[int | None] = mapped_column(sa.BigInteger)
    shouted: Mapped[str] = column_property(sa.func.upper(name))
    alias: Mapped[str] = synonym("name")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "thing"}  # noqa: RUF012 -- SQLAlchemy's way

    @hybrid_property
    def mixed(self):
        return self.text

    @mixed.inplace.setter
    def _set_mixed(self, value):
        self.text = value


class SpecialThing(Thing):
    __tablename__ = "special_things"
    id: Mapped[int] = mapped_column(sa.ForeignKey("things.id"), primary_key=True)
    code: Mapped[str] = mapped_column(sa.String(17))
    __mapper_args__ = {"polymorphic_identity": "special"}  # noqa: RUF012 -- SQLAlchemy's way


class ThingFactory(TrackedFactory[Thing]):
    class Meta:
        model = Thing


class Ambient:
    """All that declarations ask of a tracker."""

    active = True
    is_async = False
    in_transaction = False
    context = CONTEXT

    @property
    def sessions(self):
        return self

    def integer(self, start):
        return self.context.integer(start)

    def watch(self, session):
        pass


@pytest.fixture(autouse=True)
def ambient():
    with entered(Ambient()):
        yield


@pytest.mark.parametrize(
    ("field", "form"),
    [
        ("name", f"us{TAG}"),
        ("lower", f"us{TAG}"),
        ("long", f"user-{TAG}-end"),
        ("text", f"user-{TAG}-end"),
        ("endless", f"user-{TAG}-end"),
        ("alias", f"user-{TAG}-end"),
        ("mixed", f"user-{TAG}-end"),
    ],
)
def test_a_value_is_cut_to_the_column_it_fills_where_that_has_a_length(field, form):
    thing = ThingFactory.build(**{field: Scoped("user-{tag}-end")})
    assert re.fullmatch(form, getattr(thing, field))


def test_a_column_too_short_is_refused_by_name():
    with pytest.raises(ScopeError, match=r"things\.short holds 15 characters.*needs 16") as caught:
        ThingFactory.build(short=Scoped("x{tag}"))
    assert caught.value.column == "things.short"


def test_a_bad_template_is_refused_where_it_is_written():
    with pytest.raises(ScopeError, match="another run"):
        Scoped("user")


def test_the_column_is_found_through_rename_and_joined_inheritance():
    class Renaming(TrackedFactory[SpecialThing]):
        class Meta:
            model = SpecialThing
            rename = {"name_": "name"}  # noqa: RUF012 -- factory_boy's way

        name_ = Scoped("user-{tag}")
        code = Scoped("user-{tag}")

    made = Renaming.build()
    assert re.fullmatch(f"us{TAG}", made.name)
    assert re.fullmatch(f"u{TAG}", made.code)


def test_it_works_wherever_factory_boy_evaluates():
    class Everywhere(ThingFactory):
        class Params:
            trait = factory.Trait(text=Scoped("trait-{tag}"))
            param = Scoped("param-{tag}")

        name = Scoped("user-{tag}")
        long = factory.Maybe("trait", Scoped("yes-{tag}"), Scoped("no-{tag}"))
        endless = factory.LazyAttribute(lambda it: f"{it.param} {it.name}")
        lower = factory.Transformer(Scoped("UP{tag}"), transform=str.upper)

    plain, trait = Everywhere.build(), Everywhere.build(trait=True)
    assert re.fullmatch(f"us{TAG}", plain.name)
    assert plain.long.startswith("no-")
    assert plain.text is None
    assert trait.long.startswith("yes-")
    assert trait.text.startswith("trait-")
    assert re.fullmatch(f"param-{TAG} us{TAG}", plain.endless)
    assert plain.lower == plain.lower.upper()
    assert len(plain.lower) <= 18
    assert re.fullmatch(f"us{TAG}", Everywhere.stub().name)


def test_it_works_in_subfactories_dictionaries_and_as_an_override():
    class Outer(factory.Factory):
        class Meta:
            model = dict

        thing = factory.SubFactory(ThingFactory, name=Scoped("sub-{tag}"))
        facts = factory.Dict({"a": Scoped("a-{tag}"), "b": factory.List([Scoped("b-{tag}")])})

    made = Outer.build(thing__long=Scoped("deep-{tag}"))
    assert re.fullmatch(f"su{TAG}", made["thing"].name)
    assert re.fullmatch(f"deep-{TAG}", made["thing"].long)
    assert re.fullmatch(f"b-{TAG}", made["facts"]["b"][0])


def test_it_works_under_plain_factories_and_without_a_model_that_is_mapped():
    class Plain(SQLAlchemyModelFactory):
        class Meta:
            model = Thing

        name = Scoped("user-{tag}")

    assert re.fullmatch(f"us{TAG}", Plain.build().name)
    made = factory.build(dict, name=Scoped("user-{tag}"), email=ScopedEmail(), id=ScopedInteger())
    assert re.fullmatch(f"user-{TAG}", made["name"])


def test_without_a_tracker_the_context_is_this_process(monkeypatch):
    monkeypatch.setattr(Ambient, "active", False)
    name = ThingFactory.build(long=Scoped("{tag}")).long
    assert name.startswith(WorkerContext.current().tag)


def test_a_value_is_stored_whole(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'things.db'}")
    Base.metadata.create_all(engine)
    with Session(engine) as session:

        class Stored(ThingFactory):
            class Meta:
                sqlalchemy_session = session
                sqlalchemy_session_persistence = "commit"

            name = Scoped("user-{tag}")

        names = [thing.name for thing in Stored.create_batch(50)]
        assert len(set(names)) == 50
        assert set(session.scalars(sa.select(Thing.name))) == set(names)
    engine.dispose()


# -- e-mail ------------------------------------------------------------------------------------


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(31))
    tight: Mapped[str] = mapped_column(sa.String(28))
    wide: Mapped[str] = mapped_column(sa.String(500))


class AccountFactory(TrackedFactory[Account]):
    class Meta:
        model = Account


def test_only_the_prefix_of_an_address_is_cut():
    assert re.fullmatch(f"us{TAG}@example.test", AccountFactory.build(email=ScopedEmail()).email)
    wide = AccountFactory.build(wide=ScopedEmail("first.last", "mail.example")).wide
    assert re.fullmatch(f"first[.]last-{TAG}@mail[.]example", wide)
    assert re.fullmatch(f"{TAG}@x", AccountFactory.build(email=ScopedEmail("", "x")).email)


def test_the_part_before_the_at_sign_is_never_longer_than_an_address_allows():
    local = AccountFactory.build(wide=ScopedEmail("x" * 100)).wide.partition("@")[0]
    assert len(local) <= 64


def test_an_address_that_cannot_fit_is_refused():
    with pytest.raises(ScopeError, match=r"accounts\.tight holds 28 .* needs 29"):
        AccountFactory.build(tight=ScopedEmail())


@pytest.mark.parametrize(
    ("prefix", "domain"),
    [("a b", "x"), (".a", "x"), ("a..b", "x"), ("a@b", "x"), ("a", ""), ("a", "x y"), ("a", "x.")],
)
def test_what_has_no_place_in_an_address_is_refused(prefix, domain):
    with pytest.raises(ScopeError):
        ScopedEmail(prefix, domain)


def test_braces_in_a_prefix_are_themselves():
    assert AccountFactory.build(wide=ScopedEmail("{tag}")).wide.startswith("{tag}-")


# -- integers ----------------------------------------------------------------------------------


def test_integers_carry_the_worker_and_do_not_repeat():
    first, second = (ThingFactory.build(number=ScopedInteger(500)).number for _ in range(2))
    assert first % 1000 == 503
    assert second == first + 1000


@pytest.mark.parametrize(
    ("field", "largest"),
    [("small", 2**15), ("number", 2**31), ("big", 2**63)],
)
def test_an_integer_that_the_column_cannot_hold_is_refused(field, largest):
    with pytest.raises(ScopeError, match=rf"things\.{field} holds integers up to {largest - 1}"):
        ThingFactory.build(**{field: ScopedInteger(largest - 3)})
    ThingFactory.build(**{field: ScopedInteger(-largest + 1)})


def test_a_field_without_a_column_takes_any_integer():
    assert ThingFactory.stub(whatever=ScopedInteger(2**70)).whatever > 2**70


def test_declarations_show_what_they_are():
    assert repr([Scoped("{tag}"), ScopedEmail("a"), ScopedInteger(3)]) == (
        "[Scoped('{tag}'), ScopedEmail('a', 'example.test'), ScopedInteger(3)]"
    )
