"""Text that suits the name of its column, made by Faker and cut to fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from factory.faker import Faker

if TYPE_CHECKING:
    from factory.builder import BuildStep, Resolver

_PEOPLE = re.compile(
    r"users?|people|persons?|customers?|authors?|employees?|members?|contacts?|patients?|students?"
    r"|teachers?|staff|guests?|clients?"
)

_PROVIDERS: tuple[tuple[re.Pattern[str], str, dict[str, Any]], ...] = tuple(
    (re.compile(rf"(?:^|_)(?:{words})$"), provider, arguments)
    for words, provider, arguments in (
        ("e_?mail|email_?address|mail", "ascii_safe_email", {}),
        ("user_?name|login|nick(?:_?name)?|handle", "user_name", {}),
        ("first_?name|given_?name|forename", "first_name", {}),
        ("last_?name|sur_?name|family_?name", "last_name", {}),
        ("full_?name|display_?name|author|owner", "name", {}),
        ("company(?:_?name)?|organi[sz]ation(?:_?name)?|employer", "company", {}),
        ("phone(?:_?number)?|mobile|tel(?:ephone)?|fax", "phone_number", {}),
        ("ur[li]|link|website|homepage|web_?site|avatar|image_url", "url", {}),
        ("host(?:_?name)?|domain(?:_?name)?", "domain_name", {}),
        ("ip(?:_?addr(?:ess)?)?|ipv4|remote_addr", "ipv4", {}),
        ("ipv6", "ipv6", {}),
        ("mac(?:_?addr(?:ess)?)?", "mac_address", {}),
        ("user_?agent", "user_agent", {}),
        ("slug", "slug", {}),
        ("city|town", "city", {}),
        ("country_?code", "country_code", {}),
        ("country", "country", {}),
        ("street(?:_?address)?|address(?:_?line)?(?:_?\\d)?", "street_address", {}),
        ("zip(?:_?code)?|post(?:al)?_?code", "postcode", {}),
        ("currency(?:_?code)?", "currency_code", {}),
        ("locale|language(?:_?code)?|lang", "locale", {}),
        ("time_?zone|tz", "timezone", {}),
        ("colou?r", "color_name", {}),
        ("job(?:_?title)?|profession|occupation", "job", {}),
        ("title|subject|headline|caption", "sentence", {"nb_words": 4}),
        ("description|summary|comments?|notes?|bio|about|abstract|message", "sentence", {}),
        ("body|content|text", "paragraph", {}),
        ("mime_?type|content_?type|media_?type", "mime_type", {}),
        ("file_?name", "file_name", {}),
        ("file_?path|path", "file_path", {}),
        ("uuid|guid", "uuid4", {}),
        ("sha256|digest|checksum", "sha256", {}),
        ("sha1|md5", "md5", {}),
    )
)


class FittedFaker(Faker):
    """A Faker whose text is cut or filled up to fit its column.

    Args:
        provider: the name of a provider of Faker.
        shortest: the least length in characters.
        longest: the greatest length in characters, or None.
        arguments: of the provider.
    """

    def __init__(
        self, provider: str, *, shortest: int = 0, longest: int | None = None, **arguments: Any
    ) -> None:
        super().__init__(provider, **arguments)  # type: ignore[no-untyped-call]  # factory_boy's is untyped
        self.shortest = shortest
        self.longest = longest

    def evaluate(self, instance: Resolver, step: BuildStep, extra: dict[str, Any]) -> str:
        """The next text."""
        text = str(super().evaluate(instance, step, extra)).replace("\n", " ")  # type: ignore[no-untyped-call]  # as above
        text = text[: self.longest].rstrip()
        return text.ljust(max(self.shortest, 0 if self.longest == 0 else 1), "x")


def text_declaration(
    name: str, table: str, *, shortest: int = 0, longest: int | None = None
) -> FittedFaker:
    """A declaration of text for a column.

    Args:
        name: the attribute.
        table: the name of the table: in a table of people, ``name`` is the name of a person.
        shortest: the least length in characters.
        longest: the greatest length in characters, or None.
    """
    word = name.strip("_").lower()
    provider, arguments = "word", {}
    if word == "name" and _PEOPLE.search(table.lower()):
        provider = "name"
    else:
        for pattern, suited, its in _PROVIDERS:
            if pattern.search(word):
                provider, arguments = suited, its
                break
    return FittedFaker(provider, shortest=shortest, longest=longest, **arguments)
