"""Which models leave memory to make room for another: pure functions of facts, asked by ``memory.plan_load``.

No clock, no log, no process in here: a plan is asked for far more often than it is carried out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opta_lmx.types import ModelState


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that holds memory, as the eviction policy sees it.

    ``memory_bytes`` is what its end gives back. ``last_used`` only orders (any one clock). ``protected``: pinned,
    or held by a bot's lease; ``leases`` counts the requests that use it now, ``grown_bytes`` is what those have been
    promised for their KV caches beyond what the load had set aside.
    """

    id: str
    memory_bytes: int
    last_used: float
    state: ModelState
    leases: int
    protected: bool
    grown_bytes: int = 0

    @property
    def idle(self) -> bool:
        """True if stopping it would disturb nobody."""
        return self.state is ModelState.READY and self.leases == 0 and not self.protected


def choose_victims(need_bytes: int, free_bytes: int, residents: Iterable[Resident]) -> tuple[str, ...] | None:
    """The idle models to stop, least recently used first, so that ``need_bytes`` fit; None if all would not do.

    () when it fits already. No victim is superfluous: walking from the oldest until there is room, then sparing
    the most recently used of those whose memory is not needed after all. Models of equal age go by id.
    """
    missing = need_bytes - free_bytes
    victims: list[Resident] = []
    for resident in sorted((r for r in residents if r.idle), key=lambda r: (r.last_used, r.id)):
        if missing <= 0:
            break
        victims.append(resident)
        missing -= resident.memory_bytes
    if missing > 0:
        return None
    for resident in reversed(victims[:]):
        if missing + resident.memory_bytes <= 0:
            victims.remove(resident)
            missing += resident.memory_bytes
    return tuple(victim.id for victim in victims)


def coming_bytes(residents: Iterable[Resident]) -> int:
    """What the processes that are being stopped will give back."""
    return sum(r.memory_bytes for r in residents if r.state is ModelState.STOPPING)


def waitable_bytes(residents: Sequence[Resident], *, evict: bool) -> int:
    """The most that waiting can free: an upper bound, for the choice between waiting and refusing at once.

    Stopping models go. A loading one stops being counted twice (reservation and footprint) when it is ready, and a
    busy one gives back twice what its requests had grown by. With ``evict`` the unprotected follow once they are idle.
    """
    twice = sum(r.memory_bytes for r in residents if r.state is ModelState.LOADING)
    twice += sum(2 * r.grown_bytes for r in residents)
    leaving = sum(r.memory_bytes for r in residents if r.state is not ModelState.STOPPING and not r.protected)
    return coming_bytes(residents) + twice + (leaving if evict else 0)
