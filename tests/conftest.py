"""One thread, so that suites on a shared machine do not fight over cores."""

import torch

torch.set_num_threads(1)
