"""A command of test_distributed.py: its second process is late, more than torch waits elsewhere."""

import time
from datetime import timedelta

import torch.distributed as dist

import command


def main():
    join = dist.init_process_group
    dist.init_process_group = lambda backend: join(backend, timeout=timedelta(seconds=1))
    command.pick_device("cpu")
    time.sleep(3 * command.rank())
    command.barrier()
    print("all are here")
