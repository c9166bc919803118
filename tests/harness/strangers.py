"""Strangers' rows in every table of the zoo, so that no test runs in an empty house."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from sqlalchemy.orm import Session

from harness import loops
from harness.bystanders import Bystanders
from harness.models import (
    OWN_TABLES,
    Animal,
    Cat,
    Currency,
    Document,
    Dog,
    Employee,
    Engineer,
    Group,
    Node,
    Order,
    OrderLine,
    Org,
    Person,
    Player,
    Team,
    Ticket,
    User,
)


def strangers(engine: sa.Engine, count: int = 3) -> Bystanders:
    """Fill the zoo with ``count`` strangers' rows of each kind, unseen by trackers on ``engine``.

    Natural keys taken: currencies ``X00``, ``X01``, ...; chickens, eggs, nodes, yins, yangs and
    ``OWN_TABLES`` from 900,000 on; e-mails ``stranger-<n>-<random>@example.test``.

    Returns:
        The bystanders, to add to and to ask at the end.
    """
    outside = sa.create_engine(engine.url)
    try:
        with Session(outside) as session:
            _add_objects(session, count)
            session.commit()
        with outside.begin() as connection:
            for number in range(900_000, 900_000 + count):
                loops.chicken_and_egg(connection, number, number)
                loops.root_node(connection, number)
                for table in OWN_TABLES:
                    connection.execute(sa.insert(table).values(id=number, id_1=number))
                connection.execute(
                    sa.insert(Node).values(id=number + 1000, parent_id=number),
                )
                if engine.dialect.name in {"postgresql", "sqlite"}:
                    loops.yin_and_yang(connection, number, number)
    finally:
        outside.dispose()
    return Bystanders(engine)


def _add_objects(session: Session, count: int) -> None:
    mark = uuid.uuid4().hex[:8]
    org, group = Org(name="Strangers Ltd"), Group(name="strangers")
    boss = None
    for number in range(count):
        user = User(
            email=f"stranger-{number}-{mark}@example.test", org=org, manager=boss, groups=[group]
        )
        boss = boss or user
        lines = [OrderLine(line_no=line, sku=f"S{line}") for line in (1, 2)]
        team = Team(name=f"team {number}")
        player = Player(name=f"player {number}", team=team)
        team.captain = player
        session.add_all([
            user,
            Order(user=user, lines=lines),
            team,
            player,
            Person(name=f"person {number}"),
            Employee(name=f"employee {number}"),
            Engineer(name=f"engineer {number}"),
            Animal(name=f"animal {number}"),
            Dog(name=f"dog {number}"),
            Cat(name=f"cat {number}"),
            Document(title=f"document {number}"),
            Ticket(title=f"ticket {number}"),
            Currency(code=f"X{number:02}", name="stranger"),
        ])  # fmt: skip  # one object per line
