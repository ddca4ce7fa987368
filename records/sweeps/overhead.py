"""CPU time of a sweep beside that of the same runs of train.py without it, in turns.

    python records/sweeps/overhead.py DATA_DIR STEPS TURNS

Three runs of config/mini.py. CPU time, user and system, of whole process trees: other work on the
machine changes it less than the time on the clock. Of the sweep's own process it is known exactly.
"""
import subprocess
import sys
import tempfile
import time

# Runs a command in this process -> CPU seconds of itself, and of the processes that it started.
OWN = """
import atexit, resource, runpy, sys
def seconds(who):
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime
path, *sys.argv = sys.argv[1:]
atexit.register(lambda: open(path, "w").write(f"{seconds(resource.RUSAGE_SELF)} "
                                              f"{seconds(resource.RUSAGE_CHILDREN)}"))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def timed(*command):
    """-> CPU seconds of a command itself, those of its children, seconds on the clock."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as answer:
        subprocess.run([sys.executable, "-c", OWN, answer.name, *command], check=True,
                       stdout=subprocess.DEVNULL)
        own, children = map(float, answer.read().split())
    return own, children, time.monotonic() - start


def main():
    data_dir, n_steps, n_turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
    base = ["config/mini.py", f"--data_dir={data_dir}", f"--max_steps={n_steps}"]
    for turn in range(n_turns):
        with tempfile.TemporaryDirectory() as folder:
            own, children, clock = timed("tools/sweep.py", f"--base={' '.join(base)}", "--arms=a",
                                         "--seeds=1,2,3", f"--out_dir={folder}/sweep")
            alone = [timed("train.py", *base, f"--seed={seed}", f"--out_dir={folder}/{seed}")
                     for seed in (1, 2, 3)]
        cpu = sum(a + b for a, b, _ in alone)
        print(f"turn {turn}: sweep {own:.1f} s of its own and {children:.1f} s of its runs, "
              f"{clock:.0f} s on the clock; the runs alone {cpu:.1f} s, "
              f"{sum(c for *_, c in alone):.0f} s on the clock", flush=True)


if __name__ == "__main__":
    main()
