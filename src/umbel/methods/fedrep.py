"""FedRep: a common body and a head of each client's own, trained one after the other (Collins et al. 2021).

"Exploiting Shared Representations for Personalized Federated Learning", Algorithm 1,
https://arxiv.org/abs/2102.07078

    client k    h_k ← `head_epochs` epochs of SGD on f_k(φ, ·), φ as received and fixed
                φ_k ← local SGD on f_k(·, h_k) from φ, h_k fixed; sent
    server      φ as FedAvg's w; h_k is never sent
    served      (φ, h_k)

Which tensors are the head: see fedper.py. While the head is trained the body's running statistics are put
back as well.
"""

from dataclasses import dataclass, replace

from umbel.clients import ClientData
from umbel.methods.fedavg import Message, Upload
from umbel.methods.fedper import FedPer
from umbel.methods.partial import Private, parted, whole
from umbel.model.loss import Loss
from umbel.ranges import check_ranges
from umbel.train import local_train


@dataclass(frozen=True)
class FedRep(FedPer):
    head_epochs: int = 10

    def __post_init__(self) -> None:
        check_ranges(self, head_epochs="[1, inf)")

    def client_update(
        self, loss: Loss, message: Message, private: Private, data: ClientData
    ) -> tuple[Upload, Private]:
        rate, objective = self.local.lr, whole(loss)
        start = {"params": message.params, "own": private.params, "stats": message.stats | private.stats}
        steps = self.local.steps * self.head_epochs  # if given, as many make an epoch
        head = replace(self.local, epochs=self.head_epochs, steps=steps)
        first, head_loss = local_train(objective, start, data, head, {"own": rate})
        if not message.params:  # the head is the whole model
            return parted(first, private, data, head_loss)
        between = first | {"stats": first["stats"] | message.stats}
        trained, mean_loss = local_train(objective, between, data, self.local, {"params": rate})
        return parted(trained, private, data, mean_loss)
