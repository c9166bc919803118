"""What becomes of the rows that the application made."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from behave import given, then, when

from app.models import AuditRow
from tidyrows import CleanupError, CleanupManager
from tidyrows.testing import Tidy


def by_table(rows):
    return {table.name: len(found) for table, found in rows.items()}


@given("a test within this one")
def within(context, **options):
    """Its report can be looked at, since it ends before the scenario does."""
    context.ending = ExitStack()
    context.add_cleanup(context.ending.close)
    inner = Tidy(context.engine, test="inner", **options)
    context.inner = context.ending.enter_context(inner)


@given("a test within this one, which owns the audit rows")
def within_owning(context):
    within(context, own=[AuditRow])


@when("the test within is over")
def over(context):
    context.ending.close()


@when("{who:Person} orders the {what:Thing} and does not wait")
def orders_without_waiting(context, who, what):
    story = context.story
    customer, sku = story.devices[who], story.products[what].sku
    context.held = context.payments.hold(story.users[who].email)

    def order():
        customer.add_to_basket(sku)
        story.answer = customer.place_order()

    pool = ThreadPoolExecutor()
    context.request = pool.submit(order)
    context.add_cleanup(pool.shutdown)
    context.add_cleanup(context.held.answer.set)
    assert context.held.arrived.wait(60)


@when("the payment is being answered")
def being_answered(context):
    context.held.answer.set()


@when("the payment is answered")
def answered(context):
    context.held.answer.set()
    context.request.result()


@then("a cleanup without patience gives up")
def gives_up(context):
    limits = {"lock_timeout": 0.2, "deadline": 0.5}
    try:
        CleanupManager(context.inner.tracker, own=[AuditRow], **limits).cleanup()
    except CleanupError as error:
        said = str(error)
    else:
        said = "it is done"
    assert "gave up" in said, said


@then("nothing is left of it")
def nothing_left(context):
    assert not context.inner.report.leftovers


@then("these rows of the application went with it")
def went_with_it(context):
    expected = {row["table"]: int(row["rows"]) for row in context.table}
    assert by_table(context.inner.report.dependents) == expected


@then("no row is detached")
def none_detached(context):
    assert not context.inner.report.detached


@then("{n:d} audit rows are detached")
def detached(context, n):
    assert by_table(context.inner.report.detached) == {"audit_rows": n}
    (rows,) = context.inner.report.detached.values()
    # So that this scenario leaves nothing all the same:
    context.tidy.tracker.track_rows(AuditRow, [row.key for row in rows])


@then("it fails")
def fails(context):
    raise AssertionError("halfway")


@then("its process is killed")
def killed(context):
    os.kill(os.getpid(), signal.SIGKILL)
