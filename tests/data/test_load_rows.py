"""load_rows: the rows of a file, made through factories, tracked, in one commit."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harness.asynchronous import ONE_EACH, World, over
from harness.factories import GroupFactory, OrderFactory, OrgFactory, UserFactory
from harness.models import Currency, User
from tidyrows import (
    ArgumentError,
    CleanupManager,
    DataFileError,
    NoSessionError,
    ResourceTracker,
    TrackedFactory,
    load_rows,
    load_rows_async,
)

FACTORIES = {"user": UserFactory, "org": OrgFactory, "group": GroupFactory, "order": OrderFactory}

YAML = """
user:
  ada: {name: Ada, email: ada@example.test, org: {ref: org.acme}, manager: {ref: user.eva}}
  eva: {email: {exact: eva@example.test}, org_id: {ref: org.acme}}
  many: {count: 3, traits: [managed], name: "User {n}", groups: [{ref: group.admins}]}
org:
  acme: {name: Acme}
group:
  admins:
order:
  first: {user: {ref: user.ada}, note: {ref: org.acme.name}, lines__sku: spade}
"""
JSON = """
{"user": {"ada": {"name": "Ada", "email": "ada@example.test", "org": {"ref": "org.acme"}}},
 "org": {"acme": {"name": "Acme \\u00e9"}}}
"""
TOML = """
[user.ada]
name = "Ada"
email = "ada@example.test"
org = {ref = "org.acme"}

[org.acme]
name = "Acme"
"""


@pytest.fixture
def write(tmp_path):
    def write(text, ending="yaml"):
        path = tmp_path / f"data.{ending}"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_rows_refer_to_each_other_and_leave_with_the_block(zoo_engine, write):
    with CleanupManager(ResourceTracker(zoo_engine)) as cleanup:
        rows = load_rows(write(YAML), FACTORIES)
        ada, eva = rows.user.ada, rows["user"]["eva"]
        assert ada.org is rows.org.acme
        assert ada.manager is eva
        assert eva.org_id == rows.org.acme.id
        assert [user.name for user in rows.user.many] == ["User 1", "User 2", "User 3"]
        assert all(user.manager is not None for user in rows.user.many)
        assert all(user.groups == [rows.group.admins] for user in rows.user.many)
        assert rows.order.first.note == "Acme"
        assert {line.sku for line in rows.order.first.lines} == {"spade"}
        assert list(rows.user) == ["ada", "eva", "many"]
    with zoo_engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(User)) == 0
    assert cleanup.report.total_deleted > 10


def test_a_text_of_a_unique_column_is_scoped_and_exact_is_not(zoo_engine, write):
    path = write(YAML)
    tracker = ResourceTracker(zoo_engine)
    with CleanupManager(tracker):
        ada = load_rows(path, FACTORIES).user.ada
        assert ada.email.startswith("ada-")
        assert tracker.context.tag in ada.email
        assert ada.email.endswith("@example.test")
        assert ada.org.name == "Acme"  # not unique
        again = """user: {ada: {email: ada@example.test, name: "a {tag} {x}"}}"""
        other = load_rows(write(again), FACTORIES).user.ada
        assert other.email != ada.email
        assert other.name.startswith(f"a {tracker.context.tag}")
        assert other.name.endswith(" {x}")


def test_all_rows_are_committed_together(zoo_engine, write):
    commits = []
    sa.event.listen(zoo_engine, "commit", lambda _: commits.append(1))
    with CleanupManager(ResourceTracker(zoo_engine)):
        load_rows(write(YAML), FACTORIES)
        assert len(commits) == 1
        clash = YAML.replace("ada@example.test", "{exact: eva@example.test}")
        commits.clear()
        with pytest.raises(sa.exc.IntegrityError):
            load_rows(write(clash.replace("Acme", "Other")), FACTORIES)
        assert not commits
        with zoo_engine.connect() as connection:
            names = connection.scalars(sa.text("SELECT name FROM orgs")).all()
        assert "Other" not in names


@pytest.mark.parametrize(("text", "ending"), [(JSON, "json"), (TOML, "toml")])
def test_json_and_toml_have_the_same_form(sqlite_engine, write, text, ending):
    User.metadata.create_all(sqlite_engine)
    with CleanupManager(ResourceTracker(sqlite_engine)):
        rows = load_rows(write(text, ending), FACTORIES)
        assert rows.user.ada.org is rows.org.acme
        assert rows.org.acme.name in {"Acme", "Acme é"}


@over(*ONE_EACH)
def test_rows_are_loaded_through_an_asynchronous_engine(zoo_database, driver, write):
    async def main(engine):
        tracker = ResourceTracker(engine)
        async with CleanupManager(tracker):
            rows = await load_rows_async(write(YAML), FACTORIES)
            assert rows.user.ada.org is rows.org.acme
            with pytest.raises(Exception, match="await load_rows_async"):
                load_rows(write(YAML), FACTORIES)

    World(zoo_database, driver).run(main)


# --- values by the type of the column


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


class Base(DeclarativeBase):
    pass


class Kinds(Base):
    __tablename__ = "kinds"
    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[dt.date | None]
    moment: Mapped[dt.datetime | None]
    clock: Mapped[dt.time | None]
    price: Mapped[decimal.Decimal | None] = mapped_column(sa.Numeric(10, 2))
    weight: Mapped[float | None]
    public: Mapped[uuid.UUID | None] = mapped_column(sa.Uuid)
    size: Mapped[Size | None]
    data: Mapped[bytes | None]
    extra: Mapped[dict | None] = mapped_column(sa.JSON)
    on: Mapped[bool | None]
    length: Mapped[int | None]
    pause: Mapped[dt.timedelta | None]
    count: Mapped[int | None]


class KindsFactory(TrackedFactory[Kinds]):
    class Meta:
        model = Kinds


ALL_KINDS = """
kinds:
  as_yaml: {day: 2026-03-01, moment: 2026-03-01 12:30:00, price: 1.50, size: LARGE, on: true,
            pause: 90, weight: 3, data: !!binary AAEC, extra: {exact: {ref: [1, null]}},
            count: {exact: 7}}
  as_text: {day: "2026-03-01", moment: "2026-03-01T12:30:00", clock: "12:30:00", price: "1.50",
            length: 5, public: 7a2f1c9e-8a55-4d5b-9d0e-0e9c2b1c7f10, data: {base64: AAEC}}
  day_only: {moment: 2026-03-01}
  from_environment: {length: {env: TIDY_LENGTH}, on: {env: TIDY_ON},
                     price: {env: TIDY_NONE, default: 2}}
  nothing: {day: null, extra: null}
"""


def test_values_have_the_type_of_the_column(engine, write, monkeypatch):
    Base.metadata.create_all(engine)
    monkeypatch.setenv("TIDY_LENGTH", "12")
    monkeypatch.setenv("TIDY_ON", "true")
    with CleanupManager(ResourceTracker(engine)):
        kinds = load_rows(write(ALL_KINDS), {"kinds": KindsFactory}).kinds
        day, moment = dt.date(2026, 3, 1), dt.datetime(2026, 3, 1, 12, 30)
        for row in kinds.as_yaml, kinds.as_text:
            assert (row.day, row.moment, row.price) == (day, moment, decimal.Decimal("1.50"))
            assert row.data == b"\0\1\2"
        assert (kinds.as_yaml.size, kinds.as_yaml.on) == (Size.LARGE, True)
        assert kinds.as_yaml.pause == dt.timedelta(seconds=90)
        assert kinds.as_yaml.extra == {"ref": [1, None]}
        assert kinds.as_yaml.count == 7
        assert kinds.as_text.clock == dt.time(12, 30)
        assert kinds.as_text.public == uuid.UUID("7a2f1c9e-8a55-4d5b-9d0e-0e9c2b1c7f10")
        assert kinds.day_only.moment == dt.datetime(2026, 3, 1)
        assert (kinds.from_environment.length, kinds.from_environment.on) == (12, True)
        assert kinds.from_environment.price == 2
        assert kinds.nothing.day is None


# --- what is wrong is said with its place, before a row is written


class CurrencyFactory(TrackedFactory[Currency]):
    class Meta:
        model = Currency

    name = "Dollar"


KNOWN = {**FACTORIES, "kinds": KindsFactory, "currency": CurrencyFactory}

WRONG = [
    ("usr: {ada: {}}", "1:1: there is no factory 'usr'. Did you mean user?"),
    ("user:\n  ada: {nmae: Ada}", "2:9: UserFactory has no 'nmae'. Did you mean name?"),
    ("user: {a: {org__nme: x}}", "1:12: OrgFactory has no 'nme'. Did you mean name?"),
    ("user: {a: {ogr__name: x}}", "1:12: UserFactory has no 'ogr'. Did you mean org?"),
    ("user: {a: {org: {ref: org.acm}}}\norg: {acme: }", "1:23: there is no row 'org.acm'. Did you"),
    ("user: {a: {org: {ref: group.g}}}\ngroup: {g: }", "a.org: it takes a Org, and group.g is a"),
    ("user: {a: {org: acme}}", "1:17: user.a.org: it takes a row, and this is 'acme'. Write {ref:"),
    ("user: {a: {org: {name: x}}}", "1:17: user.a.org: a mapping is one of {ref: ...}"),
    ("user: {a: {org: {ref: org.o}}}\norg: {o: {count: 2}}", "it takes one row, and org.o is"),
    ("user: {a: {name: {ref: org.o}}}\norg: {o: }", "users.name has no foreign key to org.o"),
    ("user: {a: {name: {ref: org.o.nme}}}\norg: {o: }", "org.o has no 'nme'. Did you mean name?"),
    ("user: {a: {}, a: {}}", "1:15: a is there twice; the first is in line 1."),
    ("user: {a.b: {}}", "1:8: 'a.b' is no name of a row"),
    ("user: {a: {count: many}}", "1:19: count is 'many', and takes a number of rows"),
    ("user: {a: {count: -1}}", "1:19: count is -1, and takes a number of rows"),
    ("user: {a: {count: true}}", "1:19: count is True, and takes a number of rows"),
    ("user: {a: {traits: [manged]}}", "1:21: UserFactory has no trait 'manged'. Did you mean"),
    ("user: {a: {name: NO}}", "1:18: user.a.name: the column holds text, and this is the boolean"),
    ("user: {a: {email: null}}", "1:19: user.a.email: users.email is NOT NULL"),
    ("user: {a: {name: {env: TIDY_NONE}}}", "1:24: the environment has no TIDY_NONE"),
    ("user: {a: {name: {exact: 1, ref: X}}}", "{ref: ...} takes no 'exact' beside it"),
    ("user: [a]", "1:7: user has named rows, and this is no mapping"),
    ("user: {a: b, c: d: e}", "1:18: no YAML that is read here"),
    ("user: {a: !!python/name:os.system }", "1:11: no YAML that is read here"),
    ("user: {a: !!python/object/new:os.system {}}", "1:11: tag:yaml.org,2002:python/object/new:os"),
    ("user: {a: &a {groups: [*a]}}", "1:11: this anchor contains itself"),
    ("user: {[1]: {}}", "1:8: a name is a text, and this is a list"),
    ("kinds: {a: {clock: 12:30:00}}", 'the column takes a time as "12:30:00"'),
    ("kinds: {a: {size: LARG}}", "1:19: kinds.a.size: Size has no member 'LARG'."),
    ("kinds: {a: {count: 3}}", "1:13: count is also a name of KindsFactory"),
    ("kinds: {a: {data: AAEC}}", "the column holds bytes, and this is the text 'AAEC'."),
    ("currency: {usd: {code: USD}}", "currencies.code holds 3 characters"),
]  # fmt: skip  # one a line


def test_what_is_wrong_is_said_with_its_place(write):
    unsaid = []
    for text, said in WRONG:
        path = write(text)
        with pytest.raises(DataFileError) as raised:  # no tracker is needed to find it
            load_rows(path, KNOWN)
        error = raised.value
        where = f"{path}:{error.line}:{error.column}: "
        if not str(error).startswith(where) or said not in str(error):
            unsaid.append((text, said, str(error)))
    assert unsaid == []


def test_a_circle_of_rows_is_named(write):
    circle = """user:
      a: {manager: {ref: user.b}}
      b: {manager: {ref: user.c}}
      c: {manager: {ref: user.a}}"""
    with pytest.raises(DataFileError, match=r"circle: user\.\w(?: -> user\.\w){3}\. Leave one"):
        load_rows(write(circle), FACTORIES)
    with pytest.raises(DataFileError, match=r":1:27: .*circle: user\.a -> user\.a\."):
        load_rows(write("user: {a: {manager: {ref: user.a}}}"), FACTORIES)


def test_json_and_toml_tell_the_place_as_far_as_it_is_known(write):
    json = '{"user": {"a": {"name": "x",\n  "nmae": "y"}}}'
    toml = '# a comment\n[user.a]\nname = "x"\nnmae = 1\n[user.b]\norg = { ref = "org.o" }'
    for text, ending, said in (
        (json, "json", "json:2:3: UserFactory has no 'nmae'"),
        (
            json.replace("nmae", "name"),
            "json",
            "json:2:3: name is there twice",
        ),
        (json[:-2], "json", "json:2:15: no JSON: , or } is expected here"),
        (toml, "toml", "toml:4: UserFactory has no 'nmae'"),
        (
            toml.replace("nmae = 1", "email = 1"),
            "toml",
            "toml:4: user.a.email: the column",
        ),
        (toml.replace("nmae = 1", ""), "toml", "toml:6: there is no row 'org.o'"),
        (toml.replace("nmae", "name"), "toml", "toml:4:9: no TOML: Cannot overwrite a value"),
        ("user", "ini", "data.ini: the ending of the name says no language"),
        ("[1]", "json", "json:1:1: a file has a mapping of factories"),
    ):
        with pytest.raises(DataFileError) as raised:
            load_rows(write(text, ending), FACTORIES)
        assert said in str(raised.value)


def test_a_wrong_name_of_the_result_is_told_the_nearest(zoo_engine, write):
    with CleanupManager(ResourceTracker(zoo_engine)):
        rows = load_rows(write("org: {acme: , items: }"), FACTORIES)
    with pytest.raises(KeyError, match=r"There is no org 'acne'. Did you mean acme"):
        rows["org"]["acne"]
    with pytest.raises(AttributeError, match=r"There is no factory 'ogr'. Did you mean org"):
        _ = rows.ogr
    assert not hasattr(rows, "ogr")
    assert rows["org"]["items"] in list(rows["org"].values())


def test_what_load_rows_is_given_is_checked(write, tmp_path):
    with pytest.raises(ArgumentError, match="factories must be a dict of names"):
        load_rows(write(YAML), {"user": User})
    with pytest.raises(DataFileError, match="cannot be read"):
        load_rows(tmp_path / "none.yaml", FACTORIES)
    with pytest.raises(NoSessionError):
        load_rows(write(YAML), FACTORIES)
