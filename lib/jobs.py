"""Runs Python commands as processes of their own, several at a time on one machine."""

import os
import subprocess
import sys

import torch


def run_python(arguments, log_path, number, jobs):
    """Runs `python ARGUMENTS...` to its end -> exit code. Its output and errors replace log_path.

    jobs: how many such processes run at a time; each gets its share of the CPU's threads.
    number: counts the processes from 0; with several GPUs, they take turns on them.
    """
    environment = dict(os.environ)
    if not environment.get("OMP_NUM_THREADS"):  # what the user has set stays
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # A process sees one GPU only, and calls it cuda:0 whichever it is.
    n_gpu = torch.cuda.device_count()
    if n_gpu > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(number % min(n_gpu, jobs))
    with open(log_path, "w") as log:
        # close_fds: what this process has made inheritable stays open, such as a folder's lock
        done = subprocess.run([sys.executable, *arguments], env=environment, stdout=log,
                              stderr=subprocess.STDOUT, close_fds=False)
    return done.returncode


def last_line(path):
    """Last line of a log file that is not empty; most often the message of what went wrong."""
    with open(path, errors="replace") as file:
        lines = file.read().strip().splitlines()
    return lines[-1] if lines else "nothing"
