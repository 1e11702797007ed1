"""Who may ask for what: roles by user and group. Pure: numbers in, a role or None out.

Root and the supervisor's own user are admin. Everybody else has the highest role that one of his groups has.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

Role: TypeAlias = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")  # each may what the one before may
TAKES: Mapping[str, Role] = {"see": "viewer", "operate": "operator", "admin": "admin"}  # access of a route -> role


class Access(NamedTuple):
    """owner_uid: of the supervisor. roles: gid -> what its members are."""

    owner_uid: int
    roles: Mapping[int, Role] = {}

    def role(self, uid: int, gids: Iterable[int]) -> Role | None:
        """None: a stranger."""
        if uid in (0, self.owner_uid):
            return "admin"
        found = [ROLES.index(self.roles[gid]) for gid in gids if gid in self.roles]
        return ROLES[max(found)] if found else None


def may(role: Role, access: str) -> bool:
    """Whether who has role may use a route of that access."""
    return ROLES.index(role) >= ROLES.index(TAKES[access])
