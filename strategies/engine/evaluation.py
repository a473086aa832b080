"""The evaluation of the last version, common to all loops."""

from __future__ import annotations

import logging

from flwr.app import ArrayRecord, Message

from strategies.engine.engine import Engine
from strategies.engine.state import SiteResult

log = logging.getLogger("strategies")


def final_evaluation(engine: Engine, version: int, arrays: ArrayRecord) -> list[Message]:
    """Evaluate a version at every site that is online and has not done so.

    Returns
    -------
    list of Message
        The replies by ``Settings.final_evaluation_s``; a site that fails is left out.
    """
    patience = engine.runtime.settings.final_evaluation_s
    waiting: set[str] = set()
    if patience <= 0:
        return []
    for facility, site in sorted(engine.sites.items()):
        if site.online and site.evaluated != version:
            if engine.busy(facility):
                engine.abandon(facility)
            engine.request(facility, "evaluate", weights=lambda: (version, arrays))
            waiting.add(facility)
    replies: list[Message] = []
    until = engine.now() + patience
    while waiting and engine.now() < until:
        for event in engine.events():
            if isinstance(event, SiteResult) and event.order.kind == "evaluate":
                replies.append(event.message)
            if event.facility in waiting:
                waiting.discard(event.facility)
                engine.settle(event.facility)
    for facility in waiting:
        log.warning("%s did not evaluate the last version in time", facility)
        engine.abandon(facility)
    engine.settle()
    engine.commit()
    return replies
