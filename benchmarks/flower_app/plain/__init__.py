"""FedAvg on digits as an ordinary Flower app."""
