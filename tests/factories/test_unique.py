"""Unique adds a tag to what another declaration makes, where the value stays valid."""

from __future__ import annotations

import datetime as dt
import json
import re
import subprocess
import sys
import uuid
from contextlib import ExitStack
from decimal import Decimal
from enum import StrEnum
from itertools import chain

import factory
import pytest
import sqlalchemy as sa
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from harness.forks import Process
from harness.suites import fresh_environment
from tidyrows import (
    ArgumentError,
    CleanupManager,
    ResourceTracker,
    ScopeError,
    SessionStateError,
    TrackedFactory,
    Unique,
    WorkerContext,
)

TAG = r"[0-9a-z]{12,16}"


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str | None] = mapped_column(sa.Text)
    wide: Mapped[str | None] = mapped_column(sa.String(300))
    short: Mapped[str | None] = mapped_column(sa.String(22))
    tight: Mapped[str | None] = mapped_column(sa.String(16))
    small: Mapped[str | None] = mapped_column(sa.String(15))
    kind: Mapped[str | None] = mapped_column(sa.Enum("a", "b"))
    token: Mapped[str | None] = mapped_column(sa.Uuid(as_uuid=False))
    ip: Mapped[str | None] = mapped_column(postgresql.INET)


class PageFactory(TrackedFactory[Page]):
    class Meta:
        model = Page


def made(field, value):
    return getattr(PageFactory.build(**{field: Unique(factory.LazyFunction(lambda: value))}), field)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ("julia", f"julia-{TAG}"),
        ("", TAG),
        ("Größe ", f"Größe -{TAG}"),
        ("a {tag} {0} %s", rf"a \{{tag\}} \{{0\}} %s-{TAG}"),
        ("j.doe@example.test", f"j[.]doe-{TAG}@example[.]test"),
        ("a@b@c", f"a@b@c-{TAG}"),
        ("https://example.test", f"https://example[.]test/{TAG}"),
        ("https://example.test/", f"https://example[.]test/{TAG}"),
        ("https://example.test/a/b?c=d", f"https://example[.]test/a/b[?]c=d-{TAG}"),
        ("https://me@example.test:80?c=d", f"https://me@example[.]test:80/[?]c=d-{TAG}"),
    ],
)
def test_the_tag_stands_where_the_value_stays_valid(value, form):
    assert re.fullmatch(form, made("text", value))
    assert re.fullmatch(form, made("wide", value))


@pytest.mark.parametrize(
    ("field", "value", "form"),
    [
        ("short", "abcde", f"abcde-{TAG}"),
        ("short", "abcdef", f"abcde-{TAG}"),
        ("short", "my-new-title", f"my-ne-{TAG}"),
        ("short", "my-t-title", f"my-t-{TAG}"),
        ("short", "juliadoe@a.b", f"j-{TAG}@a[.]b"),
        ("short", "a@bc.de", f"{TAG}@bc[.]de"),
        ("tight", "julia", TAG),
        ("wide", f"{'j' * 100}@a.b", f"j{{47}}-{TAG}@a[.]b"),
        ("text", f"{'j' * 100}@a.b", f"j{{47}}-{TAG}@a[.]b"),
        ("wide", f"ftp://{'a' * 271}/bcdefg", f"ftp://a{{271}}/bcdef-{TAG}"),
    ],
)
def test_only_text_is_cut_to_the_column(field, value, form):
    assert re.fullmatch(form, made(field, value))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("small", "julia", r"pages[.]small holds 15 characters.*needs 16[.] Make the column"),
        ("short", "julia@example.test", r"pages[.]short holds 22 characters.*needs 29[.]"),
        ("short", "https://example.test/a", r"pages[.]short holds 22 characters.*needs 37[.]"),
        ("text", 7, r"the int for pages[.]text.*Write text = ScopedInteger\(\)"),
        (
            "text",
            uuid.UUID(int=1),
            r"the UUID for pages[.]text.*factory[.]LazyFunction\(uuid[.]uuid4\)",
        ),
        (
            "text",
            dt.date(2000, 1, 1),
            r"the date for.*text = factory[.]LazyAttribute\(lambda",
        ),
        ("text", Decimal(1), r"the Decimal for pages[.]text.*number = ScopedInteger\(\) in class"),
        ("text", StrEnum("Kind", ["A"]).A, "the Kind for pages[.]text.*text only"),
        ("text", b"julia", "the bytes for pages[.]text.*text only"),
        ("kind", "a", "the str for pages[.]kind.*the type Enum takes text of one form only"),
        ("token", str(uuid.UUID(int=1)), "the type Uuid.*token = factory[.]LazyFunction"),
        ("ip", "10.0.0.1", "the type INET takes text of one form"),
    ],
)
def test_what_can_carry_no_tag_is_refused_by_name_with_the_line_to_write(field, value, message):
    with pytest.raises(ScopeError, match=message) as caught:
        made(field, value)
    assert caught.value.column == f"pages.{field}"


@pytest.mark.parametrize("wrong", ["julia", factory.PostGeneration(print), factory.Trait()])
def test_what_is_no_declaration_of_an_attribute_is_refused_where_it_is_written(wrong):
    with pytest.raises(ArgumentError, match=r'write declaration=factory.Faker\("user_name"\)'):
        Unique(wrong)


class EverywhereFactory(PageFactory):
    class Params:
        other = Unique(factory.Faker("word"))
        named = factory.Trait(small=Unique(factory.Maybe("other", None, "x")))

    text = Unique(factory.Faker("name", locale="de_DE"))
    wide = Unique(factory.LazyAttribute(lambda it: it.other))
    short = Unique(factory.Sequence(lambda n: f"s{n}"))
    tight = factory.Maybe("other", Unique(factory.Iterator("ab")), "none")


def test_every_declaration_of_an_attribute_can_be_wrapped_and_gets_its_overrides():
    one, two = EverywhereFactory.build_batch(2)
    assert re.fullmatch(f"(\\w+)-{TAG}-{TAG}", one.wide)
    assert re.fullmatch(f"s\\d+-{TAG}", two.short)
    assert re.fullmatch(TAG, one.tight)
    assert EverywhereFactory.build(named=True).small is None
    tokyo = PageFactory.build(text=Unique(factory.Faker("name")), text__locale="ja_JP").text
    assert not tokyo.partition("-")[0].isascii()
    inner = factory.Transformer(factory.SelfAttribute("short"), transform=str.upper)
    assert PageFactory.build(text=Unique(inner), short="abc").text.startswith("ABC-")
    assert repr(Unique(factory.SelfAttribute("a"))).startswith("Unique(<SelfAttribute('a'")


def test_it_works_in_subfactories_dictionaries_and_plain_factories():
    class Plain(SQLAlchemyModelFactory):
        class Meta:
            model = Page

        short = Unique(factory.Faker("word"))

    class Outer(factory.DictFactory):
        page = factory.SubFactory(Plain, text=Unique(factory.SelfAttribute("..name")))
        name = Unique(factory.Faker("word"))

    outer = Outer.build()
    assert re.fullmatch(f"{outer['name']}-{TAG}", outer["page"].text)
    assert len(outer["page"].short) <= 22
    with pytest.raises(ScopeError, match=r"the int for DictFactory[.]number"):
        factory.DictFactory.build(number=Unique(factory.Iterator([1])))


async def later(it):
    return it.short


def test_a_coroutine_is_awaited_or_refused_by_name():
    with pytest.raises(SessionStateError, match=r"PageFactory[.]text is asynchronous"):
        PageFactory.build(text=Unique(factory.LazyAttribute(later)), short="abc")


# --- in a database


class Member(Base):
    __tablename__ = "members"
    __table_args__ = (sa.UniqueConstraint("team", "nick"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    team: Mapped[int]
    nick: Mapped[str] = mapped_column(sa.String(20))
    mail: Mapped[str] = mapped_column(sa.String(40), unique=True)


ALIKE = ["straße", "STRASSE", "stráße", "strasse ", "Strasse\u0301", "stra\u017f\u017fe"]
"""Equal in many collations, or in Python's own forms of text."""
NO_CASE = {"sqlite": "NOCASE", "mysql": "utf8mb4_unicode_ci"}


class MemberFactory(TrackedFactory[Member]):
    class Meta:
        model = Member

    team = 1
    nick = Unique(factory.Iterator(ALIKE))
    mail = Unique(factory.LazyFunction(lambda: "mail@example.test"))


def test_workers_and_runs_share_no_value_of_a_unique_constraint(engine):
    """Of one column, and of several; where the database takes a and A and á for the same."""
    collation = NO_CASE.get(engine.dialect.name)
    table = Member.__table__.to_metadata(sa.MetaData())
    for name in ("nick", "mail"):
        table.c[name].type = sa.String(table.c[name].type.length, collation=collation)
    table.create(engine)
    with ExitStack() as blocks, Session(engine) as session:
        made = []
        for run, worker in (("one", 0), ("one", 1), ("two", 0)):
            context = WorkerContext(run, f"gw{worker}", worker, worker_count=2)
            blocks.enter_context(CleanupManager(ResourceTracker(engine, context=context)))
            made += [(each.nick, each.mail) for each in MemberFactory.create_batch(12)]
        assert sorted(session.execute(sa.select(Member.nick, Member.mail))) == sorted(made)


# --- in other processes

DRAW = """
import json
import os
import sys

import factory.random

from tidyrows import Scoped, ScopedInteger, TrackedFactory, Unique


class Factory(factory.DictFactory):
    scoped = Scoped("user-{tag}")
    unique = Unique(factory.Faker("user_name"))
    integer = ScopedInteger(1)


factory.random.reseed_random(0)
made = Factory.build_batch(int(sys.argv[1]))
last = made[-1]["unique"].partition("-")[0]
print(json.dumps([last, *map(list, zip(*map(dict.values, made)))]))
"""


@pytest.mark.parametrize("size", [1_000, pytest.param(20_000, marks=pytest.mark.soak)])
def test_four_processes_with_one_seed_draw_no_value_twice(size):
    """As the workers of one run; without the tag they would draw the same names."""
    kin = {"TIDYROWS_RUN": "four", "TIDYROWS_WORKER_COUNT": "4"}
    processes = [
        Process(
            [sys.executable, "-c", DRAW, str(size)],
            env={**fresh_environment(), **kin, "TIDYROWS_WORKER": f"gw{worker}"},
            stdout=subprocess.PIPE,
        )
        for worker in range(4)
    ]
    drawn = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    last, *kinds = zip(*drawn, strict=True)
    assert len(set(last)) == 1, "each has drawn the same names"
    for lists in kinds:
        assert len(set(chain.from_iterable(lists))) == 4 * size
