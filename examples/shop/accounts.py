"""Accounts of the shop as tidyrows makes them: signed up and logged in over HTTP."""

from __future__ import annotations

import secrets

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.models import AuditRow, LoginSession, User
from client import Customer


class ShopAccounts:
    """Makes accounts as a visitor does. Nobody deletes one over HTTP: that is done in the database.

    Args:
        url: where the shop is.
        engine: on its database.
    """

    kind = "shop-account"

    def __init__(self, url, engine):
        self.url, self.engine = url, engine

    def create(self, username, role):
        password = secrets.token_urlsafe()
        with Customer(self.url) as customer:
            assert customer.sign_up(username, password, name=role).is_redirect
        return password

    def log_in(self, username, credentials):
        with Customer(self.url) as customer:
            assert customer.log_in(username, credentials).is_redirect
            return customer.http.cookies

    def delete(self, username):
        with Session(self.engine) as session, session.begin():
            mine = select(User.id).where(User.email == username).scalar_subquery()
            session.execute(delete(AuditRow).where(AuditRow.email == username))
            session.execute(delete(LoginSession).where(LoginSession.user_id == mine))
            session.execute(delete(User).where(User.email == username))
