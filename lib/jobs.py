"""Runs Python commands as processes of their own, several at a time on one machine."""

import os
import subprocess
import sys

import torch

from lib.machine import PARENT

running = set()  # processes of run_python
stopping = False  # after stop_all()


def stop_all():
    """SIGTERM to all processes of run_python, also to those that it is just starting."""
    global stopping
    stopping = True
    for process in list(running):
        process.terminate()


WATCH_SECONDS = 2.0  # between two calls of `watch`


def run_python(arguments, log_path, number, jobs, watch=None):
    """Runs `python ARGUMENTS...` to its end -> exit code. Its output and errors replace log_path.

    watch: a function that is called every few seconds; once it returns True, the process gets
    SIGTERM.

    jobs: how many such processes run at a time; each gets its share of the CPU's threads.
    number: counts the processes from 0; with several GPUs, they take turns on them.
    """
    environment = dict(os.environ) | {PARENT: str(os.getpid())}
    if not environment.get("OMP_NUM_THREADS"):  # what the user has set stays
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # A process sees one GPU only, and calls it cuda:0 whichever it is.
    n_gpu = torch.cuda.device_count()
    if n_gpu > 1:
        # Of those that the user leaves visible, which may be others than the first.
        names = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpu)))
        environment["CUDA_VISIBLE_DEVICES"] = names.split(",")[number % min(n_gpu, jobs)].strip()
    with open(log_path, "w") as log:
        # close_fds: what this process has made inheritable stays open, such as a folder's lock
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log,
                                   stderr=subprocess.STDOUT, close_fds=False)
        running.add(process)
        if stopping:
            process.terminate()
        try:
            while watch:
                try:
                    return process.wait(WATCH_SECONDS)
                except subprocess.TimeoutExpired:
                    if watch():
                        process.terminate()
                        watch = None
            return process.wait()
        finally:
            running.discard(process)


def last_line(path):
    """Last line of a log file that is not empty; most often the message of what went wrong."""
    with open(path, errors="replace") as file:
        lines = file.read().strip().splitlines()
    return lines[-1] if lines else "nothing"
