"""The tables of the storm, and the factories that fill them."""

from __future__ import annotations

import factory
import sqlalchemy as sa
from sqlalchemy import orm

from tidyrows import Scoped, TrackedFactory


class Base(orm.DeclarativeBase):
    """The storm's own metadata."""


user_tags = sa.Table(
    "user_tags",
    Base.metadata,
    sa.Column("user_id", sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("tag_id", sa.ForeignKey("tags.id"), primary_key=True),
)


class Org(Base):
    """``v`` is what the application counts up."""

    __tablename__ = "orgs"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(80), unique=True)
    v: orm.Mapped[int] = orm.mapped_column(default=0)


class Tag(Base):
    __tablename__ = "tags"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(80), unique=True)


class User(Base):
    __tablename__ = "users"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    email: orm.Mapped[str] = orm.mapped_column(sa.String(120), unique=True)
    org_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("orgs.id"), index=True)
    manager_id: orm.Mapped[int | None] = orm.mapped_column(sa.ForeignKey("users.id"), index=True)
    org: orm.Mapped[Org] = orm.relationship()
    manager: orm.Mapped[User | None] = orm.relationship(remote_side="User.id")
    tags: orm.Mapped[list[Tag]] = orm.relationship(secondary=user_tags)


class Order(Base):
    __tablename__ = "orders"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    user_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("users.id"), index=True)
    user: orm.Mapped[User] = orm.relationship()


class Line(Base):
    __tablename__ = "order_lines"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    order_id: orm.Mapped[int] = orm.mapped_column(
        sa.ForeignKey("orders.id", ondelete="CASCADE"), index=True
    )
    order: orm.Mapped[Order] = orm.relationship()


class Audit(Base):
    """What the application keeps: a cleanup may only detach it."""

    __tablename__ = "audit"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    text: orm.Mapped[str] = orm.mapped_column(sa.String(80))
    user_id: orm.Mapped[int | None] = orm.mapped_column(sa.ForeignKey("users.id"), index=True)


class OrgFactory(TrackedFactory[Org]):
    class Meta:
        model = Org

    name = Scoped("org-{tag}")


class TagFactory(TrackedFactory[Tag]):
    class Meta:
        model = Tag

    name = Scoped("tag-{tag}")


class UserFactory(TrackedFactory[User]):
    class Meta:
        model = User

    email = Scoped("user-{tag}@example.test")
    org = factory.SubFactory(OrgFactory)

    @factory.post_generation
    def tagged(self, create, extracted, **kwargs):
        if extracted:
            self.tags.append(TagFactory())


class LineFactory(TrackedFactory[Line]):
    class Meta:
        model = Line

    order = factory.SubFactory("storm.shop.OrderFactory", lines=None)


class OrderFactory(TrackedFactory[Order]):
    class Meta:
        model = Order

    user = factory.SubFactory(UserFactory)
    lines = factory.RelatedFactoryList(LineFactory, factory_related_name="order", size=2)
