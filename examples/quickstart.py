"""A team's first ten minutes with tidyrows, on embedded SQLite.

Run it: python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import factory
from sqlalchemy import ForeignKey, String, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tidyrows import CleanupManager, ResourceTracker, Scoped, TrackedFactory


class Base(DeclarativeBase):
    pass


class Org(Base):
    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80))


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(60), unique=True)
    org_id: Mapped[int] = mapped_column(ForeignKey("orgs.id"))
    org: Mapped[Org] = relationship()


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    item: Mapped[str] = mapped_column(String(80))


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = factory.Faker("company")


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("user-{tag}@example.test")  # never the same in two workers, runs or hosts
    org = factory.SubFactory(OrgFactory)


def everything(engine):
    """Every row of the database, table by table."""
    with engine.connect() as connection:
        return {
            table.name: connection.execute(select(table)).all()
            for table in Base.metadata.sorted_tables
        }


with tempfile.TemporaryDirectory() as folder:
    engine = create_engine(f"sqlite:///{Path(folder, 'shop.db')}")
    event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA foreign_keys = ON"))
    Base.metadata.create_all(engine)

    # Somebody else's rows, in the same tables.
    with Session(engine) as session:
        session.add(User(email="stranger@example.test", org=Org(name="Their company")))
        session.commit()
    before = everything(engine)

    tracker = ResourceTracker(engine)
    with CleanupManager(tracker) as cleanup:
        ann, bob, cho = UserFactory.create_batch(3)

        # The application under test commits too. In this process it is heard as well.
        with Session(engine) as application:
            application.add_all(Order(user_id=user.id, item="a kettle") for user in (ann, bob))
            application.commit()

        print(f"Made {len(tracker)} rows; {ann.email} is one of them.")
        with Session(engine) as session:
            print(
                "A list page of ours only:",
                len(session.scalars(select(User).where(tracker.mine(User))).all()),
            )
        print("\nThe plan:")
        print(cleanup.plan())

    print("\nThe report:")
    print(cleanup.report)

    assert everything(engine) == before
    print("\nThe stranger's rows, untouched:")
    for table, rows in everything(engine).items():
        print(f"  {table}: {rows}")
    engine.dispose()
