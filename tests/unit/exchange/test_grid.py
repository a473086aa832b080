"""The exchange grid: strategies unaware, memory bounded, bad replies refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from worlds.exchange.federation import (
    NODES,
    Federation,
    InProcess,
    assert_equal,
    initial,
    plain_site,
    values,
)

from flwr_hpc.exchange.grid import REJECTED, TTL_S
from flwr_hpc.exchange.records import LazyArray, RecordTensors
from flwr_hpc.exchange.store import PREFIX
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of, write_safetensors
from flwr_hpc.exchange.tensors import TensorInfo
from flwr_hpc.protocol import MEAN_GRADIENT, ORDER, Order, to_json
from strategies.engine.messages import part_of


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
def test_flowers_own_strategies_give_the_same_arrays(tmp_path, strategy, inline_below_mb):
    """Bit by bit, by reference or inline: the strategy does not notice the exchange."""
    expected = strategy().start(InProcess(plain_site), initial(), 3)
    federation = Federation(tmp_path, inline_below_mb)
    result = federation.run(3, strategy)
    # FedAdam sums in the order of the sampled nodes, which is random.
    for name, array in values(expected.arrays).items():
        np.testing.assert_allclose(values(result.arrays)[name], array, rtol=1e-6, atol=1e-7)
    assert result.train_metrics_clientapp[3] == pytest.approx(expected.train_metrics_clientapp[3])
    assert federation.grid.rejected == 0


def test_fedavg_is_exact(tmp_path, monkeypatch):
    """With the order of the nodes fixed, every bit agrees."""
    monkeypatch.setattr("random.sample", lambda population, k: list(population)[:k])
    expected = FedAvg(min_train_nodes=3).start(InProcess(plain_site), initial(), 3)
    result = Federation(tmp_path).run(3, min_train_nodes=3)
    assert_equal(values(result.arrays), values(expected.arrays))


def test_arrays_are_published_once_and_leave_memory(tmp_path):
    """Many messages share one payload, and the caller's record becomes lazy in place."""
    federation = Federation(tmp_path)
    arrays = initial()
    before = values(arrays)
    puts = []
    put = federation.store.put
    federation.grid._store.put = lambda *a: puts.append(a) or put(*a)
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.1})})
    federation.inner.site = lambda message: RecordDict()
    federation.grid.push_messages([Message(content, n, "train") for n in NODES])
    assert len(puts) == 1
    assert len({str(m.content[f"{PREFIX}arrays"]["key"]) for m in federation.inner.pushed}) == 1
    assert all("arrays" not in m.content for m in federation.inner.pushed)
    assert all(m.content["config"]["lr"] == 0.1 for m in federation.inner.pushed)
    assert content["arrays"] is arrays  # the caller's message is as it was
    assert all(isinstance(a, LazyArray) for a in arrays.values())
    assert_equal(values(arrays), before)


def test_a_changed_record_is_a_new_version(tmp_path):
    """Replacing one array is noticed without a flag."""
    federation = Federation(tmp_path)
    arrays = initial()
    federation.train(11, arrays=arrays)
    arrays["w"] = Array(np.zeros((4, 3), np.float32))
    federation.train(11, arrays=arrays)
    keys = [str(m.content[f"{PREFIX}arrays"]["key"]) for m in federation.inner.pushed]
    assert len(set(keys)) == 2
    assert values(arrays)["w"].sum() == 0


def test_replies_are_lazy_and_in_the_order_of_the_model(tmp_path):
    """One tensor at a time, numbered as the strategy numbers them."""
    (reply,) = Federation(tmp_path).train(11)
    assert list(reply.content["arrays"]) == ["w", "b", "steps"]
    assert all(isinstance(a, LazyArray) for a in reply.content["arrays"].values())
    assert set(reply.content) == {"metrics", "arrays"}


def order_of(**fields):
    return ConfigRecord({"json": to_json(Order("run", "a", 1, "train", **fields))})


def ask_for_a_part(federation, merges, returns, answer, kind="train"):
    """Hand in an order whose reply is `answer`, or collect it."""
    arrays = {"arrays": part_of(initial(), merges)} if merges and kind == "train" else {}
    content = RecordDict({**arrays, ORDER: order_of(merges=merges, returns=returns)})
    path = federation.folder / "answer"
    save(RecordTensors(part_of(initial(), answer)), path)

    def site(message):
        found = RecordDict()
        federation.site.exchange.send(found, "arrays", path, sha256_of(path), 11)
        return found

    federation.inner.site = site
    (reply,) = federation.grid.send_and_receive([Message(content, 11, kind)])
    return reply


@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
def test_a_part_travels_and_only_what_was_asked_for_comes_back(tmp_path, inline_below_mb):
    """Streaming DiLoCo: neither what was sent nor the whole model says what a reply holds."""
    federation = Federation(tmp_path, inline_below_mb)
    federation.grid.expect(initial())
    for kind in ("train", "query.collect"):
        for merges in (["w"], []):
            reply = ask_for_a_part(federation, merges, ["b", "steps"], ["b", "steps"], kind)
            assert_equal(
                values(reply.content["arrays"]), values(part_of(initial(), ["b", "steps"]))
            )
    for answer in (["w"], ["b"], ["w", "b", "steps"]):
        reply = ask_for_a_part(federation, ["w"], ["b", "steps"], answer)
        assert reply.error.code == REJECTED, answer
    assert federation.grid.rejected == 3
    reply = ask_for_a_part(federation, None, None, ["w", "b", "steps"])
    assert set(reply.content["arrays"]) == {"w", "b", "steps"}


def test_every_message_lives_for_weeks_and_others_pass_untouched(tmp_path):
    """Jobs queue for days; messages without arrays and errors are no business of ours."""
    federation = Federation(tmp_path)
    federation.inner.site = lambda message: Error(7, "mine")
    message = Message(RecordDict({"wait": ConfigRecord({"wait_s": 1.0})}), 11, "query.describe")
    ids = federation.grid.push_messages([message])
    assert federation.inner.pushed == [message]
    assert message.metadata.ttl == TTL_S
    (reply,) = federation.grid.pull_messages(ids)
    assert (reply.error.code, reply.error.reason) == (7, "mine")
    assert federation.grid.rejected == 0
    assert federation.grid.run == "the run"


def test_disk_holds_the_newest_version_alone(tmp_path):
    """Replies go once aggregated, versions once a newer one is out."""
    federation = Federation(tmp_path)
    result = federation.run(4)
    assert len(federation.files("store")) == 1
    assert len(federation.files("server")) == 1
    del result
    federation.grid.close()
    assert federation.files("store") == []


def test_what_orders_carry_besides_displaces_no_version(tmp_path):
    """The newest weights wait for the next site, also when each site's order carries its own."""
    federation, weights = Federation(tmp_path), initial()
    federation.inner.site = lambda message: RecordDict()
    for node, size in ((11, 2.0), (12, 3.0)):
        correction = ArrayRecord({"w": Array(np.full((4, 3), size, dtype=np.float32))})
        content = RecordDict({"arrays": weights, "correction": correction})
        list(federation.grid.send_and_receive([Message(content, node, "train")]))
    federation.grid.push_messages([])
    sha256 = weights["w"].source.sha256  # it has become lazy over what was published
    assert sha256 in {path.stem for path in federation.files("store")}
    assert len(federation.files("store")) == 2


def test_a_gradient_is_held_to_the_layout_of_the_weights(tmp_path):
    """Protects the control variates of every site from one site's reply."""
    federation = Federation(tmp_path)
    wrong = ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})
    federation.inner.site = lambda message: RecordDict({"gradient": wrong})
    federation.grid.expect(initial())
    asked = RecordDict({ORDER: order_of(options={MEAN_GRADIENT: True})})
    (reply,) = federation.grid.send_and_receive([Message(asked, 11, "query.collect")])
    assert reply.error.code == REJECTED


def test_a_version_that_a_site_still_has_to_fetch_stays(tmp_path):
    """Asynchronous strategies publish while slow sites are on their way."""
    federation = Federation(tmp_path)
    federation.inner.site = lambda message: RecordDict()
    push = federation.grid.push_messages

    def version(value):
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.full(9, value))})})
        return list(push([Message(content, NODES[value % 2], "train")]))

    slow = version(0)
    for value in (1, 3, 5):
        federation.grid.pull_messages(version(value))
    assert len(federation.files("store")) == 2
    collect = push([Message(RecordDict(), NODES[0], "query.collect")])
    federation.grid.pull_messages(collect)  # not the answer to what carried the weights
    federation.grid.pull_messages(version(7))
    assert len(federation.files("store")) == 2
    federation.grid.pull_messages(slow)
    federation.grid.pull_messages(version(9))
    assert len(federation.files("store")) == 1


def test_a_version_is_put_again_when_its_file_is_gone(tmp_path):
    """Checkpoints delete files that lazy records still read."""
    federation = Federation(tmp_path)
    arrays = initial()
    expected = values(arrays)
    federation.train(11, arrays=arrays)
    for path in federation.files("server"):
        path.unlink()
    (reply,) = federation.train(12, arrays=arrays)
    assert reply.has_content()
    assert_equal(values(arrays), expected)


def test_a_version_that_was_deleted_is_put_again(tmp_path):
    """A strategy may go back to weights that newer ones have displaced."""
    federation = Federation(tmp_path)
    old, new = initial(), ArrayRecord({"w": Array(np.zeros((4, 3), np.float32))})
    for arrays in (old, new):
        federation.train(11, arrays=arrays)
    federation.grid.push_messages([])
    assert old["w"].source.sha256 not in {path.stem for path in federation.files("store")}
    (reply,) = federation.train(12, arrays=old)  # a site that has not fetched it yet
    assert reply.has_content()


def test_a_new_server_empties_its_folder(tmp_path):
    """What a killed session left does not pile up."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "old.safetensors").write_bytes(b"x")
    federation = Federation(tmp_path)
    assert federation.files("server") == []


def with_nan(node, path, content):
    if node != 12:
        return path
    arrays = values(initial()) | {"b": np.full(5, np.nan)}
    save(RecordTensors(ArrayRecord({n: Array(a) for n, a in arrays.items()})), path)
    return path


def test_a_refusal_answers_the_message_and_names_the_order(tmp_path):
    """The strategy finds the order it failed, the log the facility."""
    federation = Federation(tmp_path, spoil=with_nan)

    content = RecordDict({"arrays": initial(), ORDER: order_of()})
    messages = [Message(content, node, "train") for node in (11, 12)]
    good, bad = federation.grid.send_and_receive(messages)
    assert good.has_content()
    assert bad.error.code == REJECTED
    assert bad.metadata.src_node_id == 12
    assert bad.metadata.reply_to_message_id == federation.inner.pushed[1].metadata.message_id
    assert federation.events[0][1]["facility"] == "a"
    assert federation.events[0][1]["order_id"] == "run-a-000001"


def test_a_resumed_run_checks_orders_of_the_session_before(tmp_path):
    """`expect` stands in until weights are pushed to a node."""
    federation = Federation(tmp_path)
    wrong = ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})
    federation.inner.site = lambda message: RecordDict({"arrays": wrong})
    collect = [Message(RecordDict({ORDER: order_of()}), 11, "query.collect")]
    (reply,) = federation.grid.send_and_receive(collect)
    assert reply.content["arrays"]["w"].shape == (2, 2)  # nothing is known of the model yet
    federation.grid.expect(initial())
    (reply,) = federation.grid.send_and_receive(collect)
    assert reply.error.code == REJECTED


@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
def test_bfloat16_replies_average_as_float32(tmp_path, inline_below_mb):
    """Sites may send bfloat16, which numpy lacks; the model stays float32."""

    def spoil(node, path, content):
        file = TensorFile(path)
        bits = {n: (file.tensor(n).astype(np.float32).view(np.uint32) >> 16) for n in file.layout}
        layout = {n: TensorInfo("BF16", file.layout[n].shape) for n in bits}
        half = path.with_name("bf16")
        write_safetensors(half, ((n, b.astype(np.uint16)) for n, b in bits.items()), layout)
        return half

    federation = Federation(tmp_path, inline_below_mb, spoil=spoil)
    result = federation.run(1)
    exact = FedAvg().start(InProcess(plain_site), initial(), 1)
    assert federation.grid.rejected == 0
    for name, array in values(result.arrays).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, values(exact.arrays)[name], rtol=1e-2)


def test_arrays_that_no_file_can_hold_travel_as_they_are(tmp_path):
    """Foreign strategies may send what is not weights."""
    federation = Federation(tmp_path)
    federation.inner.site = lambda message: RecordDict()
    odd = ArrayRecord({"z": Array(np.zeros(3, np.complex64))})
    federation.train(11, arrays=odd)
    assert federation.inner.pushed[0].content["arrays"] is odd
