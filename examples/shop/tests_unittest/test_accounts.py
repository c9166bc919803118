"""Sign up, log in, log out."""

from __future__ import annotations

from sqlalchemy import func, select

from app.models import AuditRow, LoginSession, User
from app.web import COOKIE
from factories import PASSWORD, UserFactory
from shop_case import ShopCase


class LogIn(ShopCase):
    def test_a_user_logs_in(self):
        user = UserFactory(name="Ann")
        customer = self.device()
        self.assertEqual(customer.log_in(user.email, PASSWORD).status_code, 303)
        self.assertIn("Ann", customer.orders().text)

    def test_a_wrong_password_is_refused(self):
        user = UserFactory()
        for password in ("", "wrong", PASSWORD.upper()):
            with self.subTest(password):
                answer = self.device().log_in(user.email, password)
                self.assertEqual(answer.status_code, 401)
                self.assertNotIn(COOKIE, answer.cookies)

    def test_a_stranger_is_refused(self):
        email = self.tidy.context.text("stranger-{tag}@example.test")
        # The audit row of a log-in by nobody references nothing: say that it is ours.
        self.tidy.tracker.track_query(select(AuditRow).where(AuditRow.email == email), late=True)
        self.assertEqual(self.device().log_in(email, PASSWORD).status_code, 401)

    def test_a_guest_must_log_in_first(self):
        for what in ("basket", "orders", "place_order", "log_out"):
            with self.subTest(what):
                self.assertEqual(getattr(self.device(), what)().status_code, 401)


class Sessions(ShopCase):
    def sessions_of(self, user):
        mine = LoginSession.user_id == user.id
        return self.scalar(select(func.count()).select_from(LoginSession).where(mine))

    def test_the_factory_hands_over_a_session_that_the_shop_made(self):
        user = self.signed_in(name="Ann")
        self.assertIn("Ann", self.device(user).orders().text)
        made = self.tidy.session.get(LoginSession, user.cookies[COOKIE])
        self.assertEqual(made.user_id, user.id)

    def test_who_logs_out_is_out(self):
        user = self.signed_in()
        self.assertEqual(self.device(user).log_out().status_code, 303)
        self.assertEqual(self.device(user).orders().status_code, 401, "the cookie is worth nothing")
        self.assertEqual(self.sessions_of(user), 0)

    def test_two_devices_are_two_sessions(self):
        user = self.signed_in()
        second = self.device()
        second.log_in(user.email, PASSWORD)
        self.assertEqual(self.sessions_of(user), 2)
        self.device(user).log_out()
        self.assertEqual(second.orders().status_code, 200)

    def test_a_forged_cookie_is_refused(self):
        for forged in ("0" * 64, "' OR 1=1 --"):
            with self.subTest(forged):
                customer = self.device()
                customer.http.cookies.set(COOKIE, forged)
                self.assertEqual(customer.orders().status_code, 401)


class SignUp(ShopCase):
    def test_who_signs_up_can_log_in(self):
        # The shop makes this user: no row of ours is referenced, but the address carries our tag.
        self.tidy.tracker.track_tagged(User.email, "new-{tag}@example.test", late=True)
        email = self.tidy.context.text("new-{tag}@example.test")
        self.assertEqual(self.device().sign_up(email, PASSWORD).status_code, 303)
        self.assertEqual(self.device().log_in(email, PASSWORD).status_code, 303)

    def test_an_address_is_taken_once(self):
        user = UserFactory()
        self.assertEqual(self.device().sign_up(user.email, PASSWORD).status_code, 409)

    def test_a_bad_sign_up_makes_no_user(self):
        for template, password in (
            ("no-address-{tag}", PASSWORD),
            ("two@at@{tag}", PASSWORD),
            ("ok-{tag}@example.test", "short"),
        ):
            with self.subTest(template):
                email = self.tidy.context.text(template)
                self.assertEqual(self.device().sign_up(email, password).status_code, 400)
                self.assertIsNone(self.scalar(select(User).where(User.email == email)))
