"""The server: federated averaging."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average the clients' models and save the last one."""
    from tiny_torch.task import Net

    torch.manual_seed(0)
    config = context.run_config
    strategy = FedAvg(fraction_evaluate=float(config["fraction-evaluate"]))
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        timeout=24 * 3600.0,  # a round may wait in a queue
    )
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")
    print(f"train: {result.train_metrics_clientapp}")
    print(f"evaluate: {result.evaluate_metrics_clientapp}")
