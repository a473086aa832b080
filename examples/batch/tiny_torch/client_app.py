"""The client: an ordinary Flower ClientApp, and one line that puts it into batch jobs."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import flwr_hpc

# The line. Without it, `app = ClientApp()`, everything below runs at the login node.
app = ClientApp(mods=[flwr_hpc.batch()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came with the message on this node's data."""
    from tiny_torch import task  # here and not above: it imports torch

    model = task.Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data, _ = task.load_data(int(context.node_config["partition-id"]))
    config = context.run_config
    loss = task.train(model, data, int(config["local-epochs"]), float(config["lr"]))

    # What a node keeps between rounds is carried into the job and back like the message.
    rounds = context.state.get("rounds", MetricRecord({"trained": 0}))
    context.state["rounds"] = MetricRecord({"trained": rounds["trained"] + 1})

    metrics = {
        "num-examples": len(data.dataset),
        "train-loss": loss,
        "rounds-trained": context.state["rounds"]["trained"],
    }
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the model that came with the message on this node's data."""
    from tiny_torch import task

    model = task.Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, data = task.load_data(int(context.node_config["partition-id"]))
    metrics = {"num-examples": len(data.dataset), "accuracy": task.test(model, data)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
