"""Which sites fail, how long they rest, and when nobody is left who could go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.engine.engine import Engine
from strategies.engine.runtime import RunFailed


@dataclass
class _Trouble:
    """A site's last one."""

    reason: str
    count: int = 0  # In a row, with nothing useful between
    rests_until: float = 0.0  # On the server's clock


class Troubles:
    """Counts failures per facility; forgets them with the first useful result."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._settings = engine.runtime.settings
        self._of: dict[str, _Trouble] = {}
        self._online_at = engine.now()  # when some site was, for the last time

    def rests(self, facility: str) -> bool:
        """Return whether a site has failed and is left alone for a while."""
        trouble, site = self._of.get(facility), self._engine.sites.get(facility)
        if site is not None and site.refusal:
            return True
        return trouble is not None and self._engine.now() < trouble.rests_until

    def failed(self, facility: str, reason: str) -> float:
        """Count a failure; returns how long the site rests, twice as long each time."""
        trouble = self.useless(facility, reason)
        s = self._settings
        doubled = 2.0 ** min(trouble.count - 1, 30)
        pause = max(s.retry_delay_s, min(s.backoff_s * doubled, s.backoff_max_s))
        trouble.rests_until = self._engine.now() + pause
        return pause

    def useless(self, facility: str, reason: str) -> _Trouble:
        """Count a result that is worth nothing; the site need not rest."""
        trouble = self._of.setdefault(facility, _Trouble(reason))
        trouble.reason, trouble.count = reason, trouble.count + 1
        return trouble

    def clear(self, facility: str) -> None:
        """Forget a site's troubles, since it has done something useful."""
        self._of.pop(facility, None)

    def check(self, *, failures: bool) -> None:
        """End a run that cannot go on: nobody is there, or (`failures`) nobody there succeeds."""
        now, grace_s = self._engine.now(), self._settings.offline_grace_s
        if any(site.online for site in self._engine.sites.values()):
            self._online_at = now
        elif now - self._online_at > grace_s:
            raise RunFailed(f"no site was online for {grace_s:g} s. {self.reasons()}")
        limit = self._settings.max_failed_rounds
        hopeless = {name for name, t in self._of.items() if t.count >= limit}
        if failures and hopeless and len(hopeless) >= self._engine.num_reachable:
            living = {site.facility for site in self._engine.reachable()}
            if living and living <= hopeless:
                raise RunFailed(
                    f"every site that is left failed {limit} times in a row. {self.reasons()}"
                )

    def reasons(self) -> str:
        """Return what is wrong with every site."""
        names = sorted(self._engine.sites.keys() | self._of.keys())
        return "; ".join(self._reason(name) for name in names) or "No site has ever answered"

    def _reason(self, name: str) -> str:
        trouble, site = self._of.get(name), self._engine.sites.get(name)
        why = [trouble.reason] if trouble else []
        if site is not None and site.offline_since is not None:
            away_s = self._engine.now() - site.offline_since
            why.append(f"offline for {away_s:.0f} s (look at the log of its SuperNode)")
        return f"{name}: {', then '.join(why) or 'no result'}"

    def save(self) -> dict[str, Any]:
        """Return the troubles as JSON; times as what is left of them."""
        now = self._engine.now()
        return {
            name: {"reason": t.reason, "count": t.count, "rests_s": max(0.0, t.rests_until - now)}
            for name, t in self._of.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `save`."""
        now = self._engine.now()
        for name, t in state.items():
            self._of[name] = _Trouble(t["reason"], t["count"], now + t["rests_s"])
