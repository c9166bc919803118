"""dump_rows: what a test has made, as a file that load_rows loads again."""

from __future__ import annotations

import datetime as dt
import decimal
import json

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from harness.asynchronous import ONE_EACH, World, over
from harness.factories import (
    AnimalFactory,
    CurrencyFactory,
    DocumentFactory,
    DogFactory,
    EmployeeFactory,
    EngineerFactory,
    GroupFactory,
    OrderFactory,
    OrderLineFactory,
    OrgFactory,
    PersonFactory,
    PlayerFactory,
    TeamFactory,
    TicketFactory,
    UserFactory,
)
from harness.models import Base as Zoo
from harness.models import Group, Org, User
from tidyrows import (
    CleanupManager,
    DataFileError,
    ResourceTracker,
    Scoped,
    TrackedFactory,
    dump_rows,
    load_rows,
)

FACTORIES = {
    "user": UserFactory, "org": OrgFactory, "group": GroupFactory, "order": OrderFactory,
    "line": OrderLineFactory, "person": PersonFactory, "employee": EmployeeFactory,
    "engineer": EngineerFactory, "animal": AnimalFactory, "dog": DogFactory,
    "document": DocumentFactory, "currency": CurrencyFactory, "ticket": TicketFactory,
    "team": TeamFactory, "player": PlayerFactory,
}  # fmt: skip  # one a row


def test_what_a_test_has_made_is_loaded_again(zoo_engine, tmp_path):
    path = tmp_path / "made.yaml"
    with CleanupManager(tracker := ResourceTracker(zoo_engine)):
        org = OrgFactory(name="Acme")
        boss = UserFactory(org=org, name=None)
        UserFactory.create_batch(2, org=org, manager=boss, groups=2)
        OrderFactory(user=boss)
        EngineerFactory(language="C"), PersonFactory(), EmployeeFactory()
        DogFactory(), DocumentFactory(), TicketFactory(), CurrencyFactory()
        dump_rows(tracker, path, factories=FACTORIES)
        rows = len(tracker)
    text = path.read_text()
    assert "{tag}" in text
    assert tracker.context.tag not in text
    with CleanupManager(tracker := ResourceTracker(zoo_engine)):
        loaded = load_rows(path, FACTORIES)
        assert len(tracker) == rows
        users = list(loaded.user.values())
        assert [user.manager for user in users] == [None, users[0], users[0]]
        assert [len(user.groups) for user in users] == [0, 2, 2]
        assert {user.org.name for user in users} == {"Acme"}
        assert dump_rows(tracker, factories=FACTORIES) == text


class Base(DeclarativeBase):
    pass


class Price(sa.types.TypeDecorator):
    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else str(value)

    def process_result_value(self, value, dialect):
        return None if value is None else decimal.Decimal(value)


class Moment(sa.types.TypeDecorator):
    impl = sa.DateTime
    cache_ok = True


class Shelf(Base):
    __tablename__ = "shelves"
    code: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    traits: Mapped[str | None] = mapped_column(sa.String(20))


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    extra: Mapped[dict | None] = mapped_column(sa.JSON)
    price: Mapped[decimal.Decimal] = mapped_column(sa.Numeric(10, 2), default=decimal.Decimal(0))
    text: Mapped[str] = mapped_column(sa.String(40), default="NO")
    short: Mapped[str | None] = mapped_column(sa.String(5), unique=True)
    day: Mapped[dt.date | None]
    moment: Mapped[dt.datetime | None] = mapped_column(Moment)
    count: Mapped[int | None]
    pause: Mapped[dt.timedelta | None]
    cost: Mapped[decimal.Decimal | None] = mapped_column(Price)
    shelf_code: Mapped[str | None] = mapped_column(sa.ForeignKey("shelves.code"))
    twin_id: Mapped[int | None] = mapped_column(sa.ForeignKey("items.id"))
    twin: Mapped[Item | None] = relationship(remote_side="Item.id", post_update=True)


class ShelfFactory(TrackedFactory[Shelf]):
    class Meta:
        model = Shelf

    code = Scoped("{tag}")


class ItemFactory(TrackedFactory[Item]):
    class Meta:
        model = Item
        rename = {"binary": "data"}  # noqa: RUF012 -- factory_boy's way

    binary = b"\0\1"


OWN = {"item": ItemFactory, "shelf": ShelfFactory}


def test_values_of_all_kinds_are_written_and_defaults_are_not(engine, tmp_path):
    Base.metadata.create_all(engine)
    with CleanupManager(tracker := ResourceTracker(engine)):
        plain = ItemFactory()
        day, moment = dt.date(2026, 3, 1), dt.datetime(2026, 3, 1, 12)
        shelf = ShelfFactory()
        full = ItemFactory(
            extra={"ref": [1]}, price=decimal.Decimal("1.50"), text="{tag}", short="EUR", day=day,
            moment=moment, count=3, pause=dt.timedelta(minutes=1), shelf_code=shelf.code,
            twin=plain,
        )  # fmt: skip  # one a row
        entries = json.loads((dumped(tracker, tmp_path / "items.json")).read_text())
        assert entries["item"] == {
            "item1": {"binary": {"base64": "AAE="}},
            "item2": {
                "twin": {"ref": "item.item1"},
                "binary": {"base64": "AAE="},
                "extra": {"exact": {"ref": [1]}},
                "price": "1.50",
                "text": {"exact": "{tag}"},
                "short": {"exact": "EUR"},
                "day": "2026-03-01",
                "moment": "2026-03-01T12:00:00",
                "count": {"exact": 3},
                "pause": 60.0,
                "shelf_code": {"ref": "shelf.shelf1"},
            },
        }
        full.twin = None
        tracker.session.commit()
    with CleanupManager(tracker):
        again = load_rows(tmp_path / "items.json", OWN).item.item2
        assert (again.data, again.extra, again.price) == (b"\0\1", {"ref": [1]}, full.price)
        assert (again.text, again.short, again.count) == ("{tag}", "EUR", 3)
        assert (again.day, again.moment, again.pause) == (day, moment, full.pause)


def test_texts_that_look_like_other_things_are_written_as_texts(engine, tmp_path):
    Base.metadata.create_all(engine)
    texts = ["\x85one", "two\u2028", "no", "12:30", " x ", "@a: {b}"]
    with CleanupManager(tracker := ResourceTracker(engine)):
        for text in texts:
            ShelfFactory(traits=text)
        path = tmp_path / "shelves.yaml"
        dump_rows(tracker, path, factories=OWN)
    with CleanupManager(tracker):
        shelves = load_rows(path, OWN).shelf.values()
        assert [shelf.traits for shelf in shelves] == texts


def dumped(tracker, path):
    dump_rows(tracker, path, factories=OWN)
    return path


def test_what_has_no_form_in_a_file_is_refused_by_name(engine):
    Base.metadata.create_all(engine)
    Zoo.metadata.tables["orgs"].create(engine)
    with CleanupManager(tracker := ResourceTracker(engine)):
        item = ItemFactory(cost=decimal.Decimal(1))
        with pytest.raises(DataFileError, match=r"items\.cost holds a Decimal, which has no form"):
            dump_rows(tracker, factories=OWN)
        item.cost, item.twin = None, item
        tracker.session.commit()
        with pytest.raises(DataFileError, match=r"in a circle: item\.item1 -> item\.item1"):
            dump_rows(tracker, factories=OWN)
        item.twin = None
        tracker.session.commit()
        with Session(engine) as session:
            session.add(Org(name="raw"))
            session.commit()
        with pytest.raises(DataFileError, match=r"No factory makes the rows of .*orgs\. Write fac"):
            dump_rows(tracker, factories=OWN)
        with pytest.raises(DataFileError, match=r"dump_rows writes \.yaml, \.yml, \.json"):
            dump_rows(tracker, "made.toml", factories=OWN)


def test_the_factories_of_the_process_are_known_by_the_names_of_the_models(zoo_engine):
    other = type(
        "Org", (sa.orm.declarative_base(),), {"__table__": Org.__table__.to_metadata(sa.MetaData())}
    )
    namesake = type("OrgFactory", (TrackedFactory,), {"Meta": type("Meta", (), {"model": other})})
    with CleanupManager(tracker := ResourceTracker(zoo_engine)):
        OrderFactory(lines=None)
        sections = {line.partition(":")[0] for line in dump_rows(tracker).splitlines()}
        assert sections >= {"user", "org", "order"}
    assert namesake._meta.get_model_class().__name__ == Org.__name__


@over(*ONE_EACH)
def test_rows_of_an_asynchronous_engine_are_written_in_run_sync(zoo_database, driver):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            await UserFactory.create_async(groups=1)
            text = await tracker.run_sync(dump_rows)
            assert "groups:\n    - {ref: group.group1}" in text
            with pytest.raises(Exception, match="run_sync"):
                dump_rows(tracker)

    World(zoo_database, driver).run(main)


def test_an_association_with_a_stranger_is_refused(zoo_engine):
    with Session(zoo_engine) as session:
        session.add(Group(name="a stranger's"))
        session.commit()
    with CleanupManager(tracker := ResourceTracker(zoo_engine)):
        user = UserFactory()
        user.groups.append(tracker.session.scalars(sa.select(Group)).one())
        tracker.session.commit()
        with pytest.raises(
            DataFileError, match="A row of user_groups references a row that is not"
        ):
            dump_rows(tracker, factories=FACTORIES)
        assert tracker.session.scalars(sa.select(User)).one().groups
