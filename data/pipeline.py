"""prepare.py as a datatrove pipeline: shards are read, filtered and tokenised by many tasks, then merged into one set.

    python data/pipeline.py --input=texts --out_dir=data/mine --tasks=8 --workers=2 --minhash_bands=14
    python data/pipeline.py --input=/shared/texts --out_dir=/shared/mine --tasks=500 --executor=slurm --partition=cpu

Takes all settings of prepare.py too (python prepare.py --help) and gives its bytes. The shards stay in `parts_dir`,
with datatrove's logs and statistics; run again, what is complete is left alone and what was stopped goes on. slurm and
ray need a disk that all machines share, and paths that mean the same on all of them.
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
    mine = [arg for arg in sys.argv[1:] if arg in ("-h", "--help") or arg.removeprefix("--").partition("=")[0] in own]
    config = configure(globals(), mine)
    settings = configure({"__file__": os.path.join(ROOT, "prepare.py")}, [a for a in sys.argv[1:] if a not in mine])

try:
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    sys.exit(f"{error}; pip install -r requirements-extra.txt, or use prepare.py --shard=i/n and merge without it")

from data.bins import DataError
from data.documents import one_message, summary
from data.filters import Filters
from data.inputs import find_inputs, part_of


class Shard(PipelineStep):
    """Task i of n: shard i of the data set. A slurm job has this class without its file: run imports what it needs."""

    name, type = "read, filter, tokenise", "PREPARE"

    def __init__(self, settings, parts_dir):
        super().__init__()
        self.settings, self.parts_dir = settings, parts_dir

    def run(self, data=None, rank=0, world_size=1):
        from data.inputs import find_inputs, prepare_text

        part = {"shard": f"{rank}/{world_size}", "out_dir": f"{self.parts_dir}/shard_{rank:05d}"}
        files = find_inputs(self.settings["input"], self.settings["follow_links"])
        done = prepare_text({**self.settings, **part}, files)
        counts = {name: count for name, count in done.items() if isinstance(count, int) and name != "n_vocab"}
        for name, count in {**counts, **done.get("dropped", {})}.items():
            self.stat_update(name, value=count, unit="shard")
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
    """Settings of prepare.py and of this file -> the executor that runs all; what it `depends` on makes the shards."""
    parts = config["parts_dir"] or settings["out_dir"].rstrip("/") + "_parts"
    kind = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
    if config["executor"] not in kind:
        raise DataError(f"--executor={config['executor']}: expected local, slurm or ray")
    settings = {**settings, "num_proc": settings["num_proc"] or config["cpus_per_task"]}
    machine = {name: config[name] for name in ("cpus_per_task", "mem_per_cpu_gb")}
    of_kind = {"local": {}, "slurm": {**machine, "partition": config["partition"], "time": config["time"],
                                      "job_name": "prepare", "env_command": f"export PYTHONPATH={shlex.quote(ROOT)}"},
               "ray": {**machine, "ray_remote_kwargs": {"runtime_env": {"env_vars": {"PYTHONPATH": ROOT}}}}}
    of_kind = {**of_kind[config["executor"]], "skip_completed": False}  # a finished folder knows that it is
    shards = kind[config["executor"]](
        pipeline=[Shard(settings, parts)], tasks=config["tasks"], workers=min(config["workers"], config["tasks"]),
        logging_dir=os.path.join(parts, "logs_shards"), **of_kind)
    return kind[config["executor"]](pipeline=[Merge(settings["out_dir"], parts)], tasks=1, workers=1, depends=shards,
                                    logging_dir=os.path.join(parts, "logs_merge"), **of_kind)


def check(settings, tasks):
    """DataError for what would fail in every task."""
    if not settings["input"] or not settings["out_dir"] or settings["shard"] or settings["input"] == "-":
        raise DataError("expected: python data/pipeline.py --input=GLOB[,GLOB] --out_dir=DIR --tasks=N, no --shard")
    Filters(settings)
    part_of(find_inputs(settings["input"], settings["follow_links"]).sizes, f"0/{tasks}")


if __name__ == "__main__":
    with one_message():
        check(settings, tasks)
        make_executors(settings, config).run()
        print(json.dumps(summary(settings["out_dir"], 1.0) if executor == "local" else {"launched": executor}))
