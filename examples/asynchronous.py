"""The same in an asynchronous suite, on embedded SQLite (pip install "tidyrows[sqlite-async]").

Run it: python examples/asynchronous.py
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import factory
from sqlalchemy import ForeignKey, String, func, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

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


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = factory.Faker("company")


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("user-{tag}@example.test")
    org = factory.SubFactory(OrgFactory)


async def main(folder: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{folder / 'shop.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)

    async with CleanupManager(ResourceTracker(engine)) as cleanup:
        users = await UserFactory.create_batch_async(3)
        print("made", ", ".join(f"{user.email} of {user.org.name}" for user in users))
    print(cleanup.report)

    async with engine.connect() as connection:
        left = await connection.scalar(select(func.count()).select_from(User))
    assert left == 0
    await engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
