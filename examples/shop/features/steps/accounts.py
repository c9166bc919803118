"""Users, log-ins, sessions."""

from __future__ import annotations

from behave import given, then, when
from sqlalchemy import func, select

from app.models import AuditRow, LoginSession, User
from app.web import COOKIE
from factories import PASSWORD, UserFactory

SECOND = "the second device"


@given("the user {who:Person}")
def a_user(context, who):
    context.story.users[who] = UserFactory(name=who)


@given("{who:Person} has logged in")
def has_logged_in(context, who):
    context.story.sign_in(who)


@given("{who:Person} has logged in on a second device")
def has_logged_in_again(context, who):
    context.story.device(SECOND).log_in(context.story.users[who].email, PASSWORD)


@when("{who:Person} logs in")
def logs_in(context, who):
    story = context.story
    story.answer = story.device(who).log_in(story.users[who].email, PASSWORD)


@when('{who:Person} logs in with the password "{password:Text}"')
def logs_in_with(context, who, password):
    story = context.story
    story.answer = story.device(who).log_in(story.users[who].email, password)


@when("somebody logs in whom the shop does not know")
def a_stranger(context):
    email = context.tidy.context.text("stranger-{tag}@example.test")
    # The audit row of a log-in by nobody references nothing: say that it is ours.
    context.tidy.tracker.track_query(select(AuditRow).where(AuditRow.email == email), late=True)
    context.story.answer = context.story.device().log_in(email, PASSWORD)


@when("a guest asks for {what:w}")
def a_guest(context, what):
    context.story.answer = getattr(context.story.device(), what)()


@when('a guest comes with the cookie "{forged:Text}"')
def a_forged_cookie(context, forged):
    context.story.answer = context.story.device(cookies={COOKIE: forged}).orders()


@when("{who:Person} logs out")
def logs_out(context, who):
    context.story.answer = context.story.devices[who].log_out()


@when("somebody new signs up")
def signs_up(context):
    # The shop makes this user: no row of ours is referenced, but the address carries our tag.
    context.tidy.tracker.track_tagged(User.email, "new-{tag}@example.test", late=True)
    context.email = context.tidy.context.text("new-{tag}@example.test")
    context.story.answer = context.story.device().sign_up(context.email, PASSWORD)


@when("they log in")
def they_log_in(context):
    context.story.answer = context.story.device().log_in(context.email, PASSWORD)


@when("somebody signs up with the address of {who:Person}")
def signs_up_again(context, who):
    story = context.story
    story.answer = story.device().sign_up(story.users[who].email, PASSWORD)


@when('somebody signs up as "{address:Text}" with the password "{password:Text}"')
def signs_up_as(context, address, password):
    context.email = context.tidy.context.text(address)
    context.story.answer = context.story.device().sign_up(context.email, password)


@then("there is no such user")
def no_such_user(context):
    assert context.story.scalar(select(User).where(User.email == context.email)) is None


@then("the answer is {status:d}")
def the_answer(context, status):
    assert context.story.answer.status_code == status, context.story.answer


@then("there is no cookie")
def no_cookie(context):
    assert COOKIE not in context.story.answer.cookies


@then("{who:Person} reads her name on the page of her orders")
def reads_her_name(context, who):
    assert who in context.story.devices[who].orders().text


@then("the session of her cookie is hers")
def her_session(context):
    (user,) = context.story.users.values()
    made = context.tidy.session.get(LoginSession, user.cookies[COOKIE])
    assert made.user_id == user.id


@then("the old cookie is worth nothing")
def the_old_cookie(context):
    (user,) = context.story.users.values()
    assert context.story.device(cookies=user.cookies).orders().status_code == 401


@then("{who:Person} has {n:d} sessions")
def sessions(context, who, n):
    mine = LoginSession.user_id == context.story.users[who].id
    assert context.story.scalar(select(func.count()).select_from(LoginSession).where(mine)) == n


@then("the second device is still logged in")
def still_logged_in(context):
    assert context.story.devices[SECOND].orders().status_code == 200
