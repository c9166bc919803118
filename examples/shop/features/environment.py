"""What the scenarios need: a database, a shop for this process, and rows that go after them.

``-D keep=yes`` leaves the rows of a failed scenario for study.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from behave import fixture, use_fixture

from app.models import AuditRow, connect, create_schema
from serving import running_payments, running_shop
from story import Story
from tidyrows.testing.behave import setup


@fixture
def shop(context):
    """One for the whole process."""
    with tempfile.TemporaryDirectory() as folder, running_payments() as payments:
        url = os.environ.get("SHOP_DATABASE_URL") or f"sqlite:///{Path(folder, 'shop.db')}"
        context.engine = connect(url)
        create_schema(context.engine)
        with running_shop(url, payments.url) as context.shop:
            context.payments = payments
            yield
        context.engine.dispose()


def before_all(context):
    use_fixture(shop, context)
    keep = context.config.userdata.getbool("keep")
    setup(context, context.engine, own=[AuditRow], keep_on_failure=keep)


def before_scenario(context, scenario):
    context.story = Story(context)
