"""The server's side: FedAvg, which writes down how long each round took."""

import json
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from .task import net

app = ServerApp()


class Timed(FedAvg):
    """FedAvg with a line of times for each round."""

    out = ""
    begin = 0.0
    train_seconds = 0.0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        told = [float(reply.content.metric_records["metrics"]["train-seconds"]) for reply in replies]  # type: ignore[arg-type]
        self.train_seconds = max(told)
        return super().aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        found = super().aggregate_evaluate(server_round, replies)
        now = perf_counter()
        line = {"round": server_round, "seconds": now - self.begin, "client_seconds": self.train_seconds}
        with Path(self.out).open("a") as file:
            file.write(json.dumps(line | {"accuracy": None if found is None else found["eval-accuracy"]}) + "\n")
        self.begin = now
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    num_nodes = int(context.run_config["num-nodes"])
    strategy = Timed(min_train_nodes=num_nodes, min_evaluate_nodes=num_nodes, min_available_nodes=num_nodes)
    strategy.out, strategy.begin = str(context.run_config["out"]), perf_counter()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
