"""A worker is killed in the middle of its test; the next job's first line deletes what it left.

python examples/killed_worker.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import factory
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tidyrows import (
    CleanupManager,
    Ledger,
    ResourceTracker,
    Scoped,
    TrackedFactory,
    find_orphans,
    sweep,
)

URL = "sqlite:///killed_worker.db"


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("user-{tag}@example.test")
    name = factory.Faker("name")


def worker():
    """One worker of a suite: it never comes to its cleanup."""
    engine = create_engine(URL)
    with CleanupManager(ResourceTracker(engine, ledger=Ledger(engine))):
        UserFactory.create_batch(3)
        os.kill(os.getpid(), signal.SIGKILL)


def count(engine):
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(User))


def main():
    engine = create_engine(URL)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    Ledger(engine).install()
    with Session(engine) as session:
        session.add(User(email="stranger@example.test", name="A stranger"))
        session.commit()

    subprocess.run([sys.executable, __file__, "worker"], check=False)
    print("after the kill:", count(engine), "users")
    for orphans in find_orphans(engine):
        print("left by", orphans)
    print("sweep:", sweep(engine))
    print("after the sweep:", count(engine), "user")
    assert count(engine) == 1
    engine.dispose()


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
