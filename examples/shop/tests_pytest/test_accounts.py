"""Sign up, log in, log out."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from app.models import AuditRow, LoginSession, User
from app.web import COOKIE
from factories import PASSWORD, UserFactory

pytestmark = pytest.mark.tidy(own=[AuditRow])


def sessions_of(tidy, user):
    mine = select(func.count()).select_from(LoginSession).where(LoginSession.user_id == user.id)
    return tidy.session.scalar(mine)


@pytest.mark.usefixtures("tidy")
def test_a_user_logs_in(device):
    user = UserFactory()
    customer = device()
    assert customer.log_in(user.email, PASSWORD).status_code == 303
    assert user.name in customer.orders().text.replace("&#39;", "'")


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("password", ["", "wrong", PASSWORD.upper()])
def test_a_wrong_password_is_refused(device, password):
    user = UserFactory()
    answer = device().log_in(user.email, password)
    assert answer.status_code == 401
    assert COOKIE not in answer.cookies


def test_a_stranger_is_refused(tidy, device):
    email = tidy.context.text("stranger-{tag}@example.test")
    # The audit row of a log-in by nobody references nothing: say that it is ours.
    tidy.tracker.track_query(select(AuditRow).where(AuditRow.email == email), late=True)
    assert device().log_in(email, PASSWORD).status_code == 401


def test_the_factory_hands_over_a_session_that_the_shop_made(tidy, signed_in, device):
    user = signed_in(name="Ann")
    assert "Ann" in device(user).orders().text
    assert tidy.session.get(LoginSession, user.cookies[COOKIE]).user_id == user.id


def test_who_logs_out_is_out(tidy, signed_in, device):
    user = signed_in()
    customer = device(user)
    assert customer.log_out().status_code == 303
    assert device(user).orders().status_code == 401, "the old cookie is worth nothing"
    assert sessions_of(tidy, user) == 0


def test_two_devices_are_two_sessions(tidy, signed_in, device):
    user = signed_in()
    second = device()
    second.log_in(user.email, PASSWORD)
    assert sessions_of(tidy, user) == 2
    device(user).log_out()
    assert second.orders().status_code == 200


@pytest.mark.parametrize("forged", ["0" * 64, "' OR 1=1 --"])
def test_a_forged_cookie_is_refused(device, forged):
    customer = device()
    customer.http.cookies.set(COOKIE, forged)
    assert customer.orders().status_code == 401


def test_who_signs_up_can_log_in(tidy, device):
    # The shop makes this user: no row of ours is referenced, but the address carries our tag.
    tidy.tracker.track_tagged(User.email, "new-{tag}@example.test", late=True)
    email = tidy.context.text("new-{tag}@example.test")
    assert device().sign_up(email, PASSWORD).status_code == 303
    assert device().log_in(email, PASSWORD).status_code == 303


@pytest.mark.usefixtures("tidy")
def test_an_address_is_taken_once(device):
    user = UserFactory()
    assert device().sign_up(user.email, PASSWORD).status_code == 409


@pytest.mark.parametrize(
    ("template", "password"),
    [
        ("no-address-{tag}", PASSWORD),
        ("two@at@{tag}", PASSWORD),
        ("ok-{tag}@example.test", "short"),
    ],
)
def test_a_bad_sign_up_makes_no_user(tidy, device, template, password):
    email = tidy.context.text(template)
    assert device().sign_up(email, password).status_code == 400
    assert tidy.session.scalar(select(User).where(User.email == email)) is None
