"""A command for test_distributed.py: the second process arrives later than torch's timeout."""

import time
from datetime import timedelta

import torch.distributed as dist

import command


def main():
    init = dist.init_process_group
    dist.init_process_group = lambda backend: init(backend, timeout=timedelta(seconds=1))
    command.pick_device("cpu")
    time.sleep(3 * command.rank())
    command.barrier()
    print("all are here")
