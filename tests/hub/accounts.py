"""Who may do what: tokens, their roles, and the namespaces that they may write."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.hub.answers import Refusal


@dataclass(frozen=True)
class Account:
    """What a token stands for."""

    user: str
    """Name of the user, and of the namespace that is theirs."""
    role: str = "write"
    """`write` or `read`."""
    expired: bool = False
    namespaces: tuple[str, ...] = ()
    """Other namespaces that the token may write."""

    def may_write(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.namespaces


WRITER = "hf_loopbackWriterLoopbackWriterLoopb"
READER = "hf_loopbackReaderLoopbackReaderLoopb"
STRANGER = "hf_loopbackStrangerLoopbackStrangerL"
EXPIRED = "hf_loopbackExpiredLoopbackExpiredLoo"
COLLEAGUE = "hf_loopbackColleagueLoopbackColleagu"
TOKENS = {
    WRITER: Account("writer"),
    READER: Account("writer", role="read"),
    STRANGER: Account("stranger"),
    EXPIRED: Account("writer", expired=True),
    COLLEAGUE: Account("colleague", namespaces=("writer",)),
}
"""Tokens that every test Hub knows; none has ever been one of the Hub's."""


class Accounts:
    """The tokens of a Hub."""

    def __init__(self, tokens: dict[str, Account] = TOKENS) -> None:
        self.tokens = dict(tokens)

    def expire(self, token: str) -> None:
        self.tokens[token] = replace(self.tokens[token], expired=True)

    def renew(self) -> None:
        """The tokens are again what they were at the start."""
        self.tokens = dict(TOKENS)

    def of(self, authorization: str | None) -> Account | None:
        """The account of an `Authorization` header, None without one.

        Raises:
            Refusal: 401 for a token that is unknown or has expired.
        """
        if not authorization:
            return None
        account = self.tokens.get(authorization.removeprefix("Bearer "))
        if account is None or account.expired:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account


def known(account: Account | None) -> Account:
    """The account, which must be there."""
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    return account


def writing(account: Account | None, namespace: str) -> Account:
    """The account, which must be allowed to write to the namespace."""
    account = known(account)
    if not account.may_write(namespace):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if account.role != "write":
        raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
    return account
