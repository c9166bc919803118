"""The same session in a real browser."""

from __future__ import annotations

import shutil

import pytest

from app.models import AuditRow
from app.web import COOKIE
from factories import PASSWORD, ProductFactory, UserFactory

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402 -- only where selenium is there
from selenium.webdriver.support.expected_conditions import title_is  # noqa: E402 -- as above
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402 -- as above

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)

pytestmark = [
    pytest.mark.tidy(own=[AuditRow]),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are absent"),
]


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_signed_in_user_sees_the_order_in_a_browser(signed_in, device, browser, shop_url):
    user, product = signed_in(name="Ann"), ProductFactory()
    customer = device(user)
    customer.add_to_basket(product.sku)
    customer.place_order()

    browser.get(f"{shop_url}/login")  # a cookie is set where its site is open
    browser.add_cookie({"name": COOKIE, "value": user.cookies[COOKIE]})
    browser.get(f"{shop_url}/orders")

    assert browser.find_element(By.ID, "who").text == "Ann"
    assert product.name in browser.find_element(By.TAG_NAME, "li").text


def test_the_account_of_the_worker_is_signed_in_in_a_browser(buyer, browser, shop_url):
    browser.get(f"{shop_url}/login")  # a cookie is set where its site is open
    for cookie in buyer.selenium_cookies:
        browser.add_cookie(cookie)
    browser.get(f"{shop_url}/orders")
    assert browser.find_element(By.ID, "who").text == "buyer"


@pytest.mark.usefixtures("tidy")
def test_a_user_logs_in_with_the_form(browser, shop_url):
    user = UserFactory(name="Bob")
    browser.get(f"{shop_url}/login")
    browser.find_element(By.NAME, "email").send_keys(user.email)
    browser.find_element(By.NAME, "password").send_keys(PASSWORD)
    browser.find_element(By.TAG_NAME, "button").click()
    WebDriverWait(browser, 30).until(title_is("Products"))
    assert browser.find_element(By.ID, "who").text == "Bob"
