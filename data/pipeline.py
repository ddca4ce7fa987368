"""Runs prepare.py as a datatrove pipeline: many tasks make shards of the data set, one merges them.

    python data/pipeline.py --input=texts --out_dir=data/mine --tasks=8 --workers=2
    python data/pipeline.py --input=/disk/texts --out_dir=/disk/mine --tasks=500 --executor=slurm

Takes all settings of prepare.py too (python prepare.py --help) and writes the same bytes as
prepare.py on one machine. The shards stay in `parts_dir`, with datatrove's logs and statistics. Run
again, it leaves complete shards alone and goes on with those that were stopped. slurm and ray need
a disk that all machines share, and paths that mean the same on all of them.
"""

import json
import os
import shlex
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
from configurator import configure, read_settings

executor = "local"  # local (this machine), slurm or ray
tasks = 2  # shards; at most as many as there are input files
workers = 2  # tasks at a time; -1: all
cpus_per_task = 1  # cores, and tokenising processes, of a task
mem_per_cpu_gb = 2  # slurm and ray
partition = "cpu"  # slurm
time = "24:00:00"  # slurm: limit of a task
parts_dir = ""  # folder of the shards; "": out_dir with _parts after it
own = read_settings(__file__)
if __name__ == "__main__":
    mine = [arg for arg in sys.argv[1:]
            if arg in ("-h", "--help") or arg.removeprefix("--").partition("=")[0] in own]
    config = configure(globals(), mine)
    others = [arg for arg in sys.argv[1:] if arg not in mine]
    settings = configure({"__file__": os.path.join(ROOT, "prepare.py")}, others)

try:
    from datatrove import executor as executors
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    sys.exit(f"{error}; pip install -r requirements-extra.txt, or use prepare.py --shard=i/n and "
             "merge without it")

from data.bins import DataError
from data.documents import one_message, summary
from data.filters import Filters
from data.inputs import find_inputs, part_of

# datatrove sends a step to a slurm job as a pickle of the class, without this file. So `run`
# imports what it needs, along the PYTHONPATH that make_executors sets.


class Shard(PipelineStep):
    """Task i of n makes shard i of the data set."""

    name, type = "read, filter, tokenise", "PREPARE"

    def __init__(self, settings, parts_dir):
        super().__init__()
        self.settings, self.parts_dir = settings, parts_dir

    def run(self, data=None, rank=0, world_size=1):
        from data.inputs import find_inputs, prepare_text

        part = {"shard": f"{rank}/{world_size}", "out_dir": f"{self.parts_dir}/shard_{rank:05d}"}
        files = find_inputs(self.settings["input"], self.settings["follow_links"])
        done = prepare_text({**self.settings, **part}, files)
        # n_vocab is the same in all shards; datatrove would add it up.
        counts = {name: n for name, n in done.items() if isinstance(n, int) and name != "n_vocab"}
        for name, n in {**counts, **done.get("dropped", {})}.items():
            self.stat_update(name, value=n, unit="shard")
        yield from data or ()


class Merge(PipelineStep):
    """The one task that comes after all shards."""

    name, type = "drop what several shards have", "MERGE"

    def __init__(self, out_dir, parts_dir):
        super().__init__()
        self.out_dir, self.parts_dir = out_dir, parts_dir

    def run(self, data=None, rank=0, world_size=1):
        from data.merge import merge_parts

        merge_parts(f"{self.parts_dir}/shard_*", self.out_dir)
        yield from data or ()


def make_executors(settings, config):
    """Settings of prepare.py, settings of this file -> the executor of Merge.

    Its `depends` is the executor that makes the shards; running the first runs both.
    """
    parts = config["parts_dir"] or settings["out_dir"].rstrip("/") + "_parts"
    settings = {**settings, "num_proc": settings["num_proc"] or config["cpus_per_task"]}
    machine = {name: config[name] for name in ("cpus_per_task", "mem_per_cpu_gb")}
    if config["executor"] == "local":
        make, options = executors.LocalPipelineExecutor, {}
    elif config["executor"] == "slurm":
        make, options = executors.SlurmPipelineExecutor, {
            **machine, "partition": config["partition"], "time": config["time"],
            "job_name": "prepare", "env_command": f"export PYTHONPATH={shlex.quote(ROOT)}"}
    elif config["executor"] == "ray":
        environment = {"env_vars": {"PYTHONPATH": ROOT}}
        make, options = executors.RayPipelineExecutor, {
            **machine, "ray_remote_kwargs": {"runtime_env": environment}}
    else:
        raise DataError(f"--executor={config['executor']}: expected local, slurm or ray")
    options["skip_completed"] = False  # prepare.py itself leaves a finished folder alone
    shards = make(pipeline=[Shard(settings, parts)], tasks=config["tasks"],
                  workers=min(config["workers"], config["tasks"]),
                  logging_dir=os.path.join(parts, "logs_shards"), **options)
    return make(pipeline=[Merge(settings["out_dir"], parts)], tasks=1, workers=1, depends=shards,
                logging_dir=os.path.join(parts, "logs_merge"), **options)


def check(settings, tasks):
    """DataError for what would fail in every task."""
    if (not settings["input"] or not settings["out_dir"] or settings["shard"]
            or settings["input"] == "-"):
        raise DataError("expected: python data/pipeline.py --input=GLOB[,GLOB] --out_dir=DIR "
                        "--tasks=N, no --shard")
    Filters(settings)
    part_of(find_inputs(settings["input"], settings["follow_links"]).sizes, f"0/{tasks}")


if __name__ == "__main__":
    with one_message():
        check(settings, tasks)
        make_executors(settings, config).run()
        result = {"launched": executor}
        if executor == "local":
            result = summary(settings["out_dir"], 1.0)
        print(json.dumps(result))
