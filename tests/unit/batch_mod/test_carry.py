"""What is carried into a job and back, and how the rest of an app is called there."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
from flwr.app import MetricRecord, RecordDict
from worlds.site.batch_app import make_app, make_context, make_message

from flwr_hpc.batch_mod import app as app_module
from flwr_hpc.batch_mod.app import AppRef, call, copy_app, find_app, import_app
from flwr_hpc.batch_mod.carry import (
    AppError,
    Failure,
    check_versions,
    load,
    save,
    take_over,
    versions,
)
from flwr_hpc.errors import UserError

LAYERS = """
SEEN = []

def outer(message, context, call_next):
    SEEN.append("outer")
    message.content["config"]["s"] = "changed by outer"
    context.state["outer"] = MetricRecord({"n": 1})
    try:
        return call_next(message, context)
    except Exception:
        SEEN.append("outer caught")
        raise

def inner(message, context, call_next):
    SEEN.append("inner")
    return call_next(message, context)

app = ClientApp(mods=[outer, flwr_hpc.batch(), inner])

@app.lifespan()
def lifespan(context):
    SEEN.append("open")
    yield
    SEEN.append("close")

@app.train()
def train(message, context):
    SEEN.append(message.content["config"]["s"])
    context.state["kept"]["n"] += 1
    context.state["new"] = ConfigRecord({"x": "y"})
    context.run_config["lr"] = 0.25
    if message.content["options"].get("fail"):
        raise ZeroDivisionError("divided")
    if message.content["options"].get("exit"):
        sys.exit(3)
    return Message(message.content, reply_to=message)

@app.query("plain")
def plain(message, context):
    return Message(message.content, reply_to=message)
"""


def test_every_record_survives(tmp_path: Path) -> None:
    """Protects weights, numbers and metadata from any change on the way."""
    message, context = make_message(lr=0.1), make_context(site="x")
    save(tmp_path / "deep" / "request.pkl", (message, context))
    there, context_there = load(tmp_path / "deep" / "request.pkl")
    assert there.content == message.content
    assert there.metadata == message.metadata
    assert context_there == context
    assert (there.content["arrays"]["w"].numpy() == message.content["arrays"]["w"].numpy()).all()


def test_context_is_taken_over_in_place() -> None:
    """Protects Flower, which stores the very object it handed out."""
    context = make_context()
    state, left = context.state, copy.deepcopy(context)
    del left.state["kept"]
    left.state["new"] = MetricRecord({"n": 2})
    left.run_config["lr"] = 1.0
    take_over(context, left)
    assert context.state is state
    assert dict(state) == {"new": MetricRecord({"n": 2})}
    assert context.run_config == {"lr": 1.0}
    take_over(context, context)
    assert dict(state) == {"new": MetricRecord({"n": 2})}


def test_the_rest_of_the_app_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects what lies behind the mod from what lies before it, which ran elsewhere."""
    module = make_app(LAYERS, tmp_path, monkeypatch)
    message, context = make_message(), make_context()
    reply = call(module.app, message, context)
    assert module.SEEN == ["open", "outer", "inner", "ü", "close"]
    assert reply.failure is None
    assert reply.message is not None
    assert reply.message.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.message.content["config"]["s"] == "ü"
    assert reply.context is not None
    assert set(reply.context.state) == {"kept", "new"}
    assert reply.context.state["kept"]["n"] == 2
    assert reply.context.run_config == {"lr": 0.25}
    assert app_module.rest() is None


def test_errors_leave_the_state_and_skip_what_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the mods before ours, which see the error once, at the login node."""
    module = make_app(LAYERS, tmp_path, monkeypatch)
    reply = call(module.app, make_message(fail=True), make_context())
    assert "outer caught" not in module.SEEN
    assert reply.failure is not None
    assert (reply.failure.kind, reply.failure.text) == ("ZeroDivisionError", "divided")
    assert reply.context is not None
    assert reply.context.state["kept"]["n"] == 2
    reply = call(module.app, make_message(exit=True), make_context())
    assert reply.failure is not None
    assert str(reply.failure.exception()) == "SystemExit: 3"


def test_app_without_such_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the message of Flower's own refusal."""
    module = make_app(LAYERS, tmp_path, monkeypatch)
    reply = call(module.app, make_message("query.other"), make_context())
    assert reply.failure is not None
    assert "No query function registered" in str(reply.failure.exception())


class Picky(Exception):
    """Can be pickled but not unpickled."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def _caught(exc: Exception) -> Exception:
    try:
        raise exc
    except Exception as caught:
        failure = pickle.loads(pickle.dumps(Failure.of(caught)))
    assert isinstance(failure, Failure)
    return failure.exception()


def test_exceptions_come_back() -> None:
    """Protects the type and the words of an error, with the job's traceback beside them."""
    revived = _caught(KeyError("lr"))
    assert isinstance(revived, KeyError)
    assert str(revived) == "'lr'"
    assert "test_carry" in revived.__notes__[0]
    revived = _caught(Picky(1, 2))
    assert isinstance(revived, AppError)
    assert str(revived).endswith("Picky: 1 and 2")
    unpicklable = ValueError("held", lambda: None)
    assert "held" in str(_caught(unpicklable))


def test_an_exception_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the login node from torch, whose errors are of its own types."""
    import torch

    failure = Failure.of(torch.OutOfMemoryError("no memory"))
    for name in [m for m in sys.modules if m.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    revived = failure.exception()
    assert "torch" not in sys.modules
    assert isinstance(revived, AppError)
    assert "no memory" in str(revived)


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a container whose Flower pickles in another way."""
    check_versions(versions())
    with pytest.raises(UserError, match=r"flwr is 0\.1 at the login node"):
        check_versions({"flwr": "0.1"})


def test_the_app_is_found_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects jobs from needing Flower's home; what Flower would not send stays."""
    module = make_app(LAYERS, tmp_path, monkeypatch)
    found = find_app(str(module.__file__))
    assert found == AppRef(str(tmp_path / "the app"), f"{module.__name__}:app")
    (tmp_path / "the app" / "data.bin").write_bytes(b"large")
    copied = copy_app(found, tmp_path / "site" / "app")
    assert not (tmp_path / "site" / "app" / "data.bin").exists()
    assert copy_app(found, tmp_path / "site" / "app") == copied
    assert import_app(AppRef(copied.folder, copied.ref)) is module.app
    assert find_app(str(module.__file__), "other:app").ref == "other:app"


def test_mistaken_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a job that fails without a word on why."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="Name the app"):
        find_app(str(tmp_path / "x.py"))
    assert find_app(str(tmp_path / "x.py"), "m:app") == AppRef("", "m:app")
    with pytest.raises(UserError, match="is not a ClientApp"):
        import_app(AppRef("", f"{RecordDict.__module__}:RecordDict"))
