"""The node's side."""

from time import perf_counter

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .task import load_data, net
from .task import test as test_fn
from .task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    model = net()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    data = load_data(str(context.run_config["data"]), str(context.node_config["name"]))
    begin = perf_counter()
    loss = train_fn(
        model,
        data["x"],
        data["y"],
        float(context.run_config["learning-rate"]),
        int(context.run_config["batch-size"]),
    )
    seconds = perf_counter() - begin
    metrics = MetricRecord({"train-loss": loss, "train-seconds": seconds, "num-examples": len(data["y"])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    model = net()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    data = load_data(str(context.run_config["data"]), str(context.node_config["name"]))
    loss, accuracy = test_fn(model, data["x_test"], data["y_test"])
    metrics = MetricRecord({"eval-loss": loss, "eval-accuracy": accuracy, "num-examples": len(data["y_test"])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
