"""What prepare.py needs in memory for inputs of several sizes: the most that it and its processes hold, together and each.

    python records/data/memory.py --input='../shared/data/corpus/*.jsonl.gz' --copies=1,10 --dir=/tmp/memory

An input of n copies is the same documents n times, each with a number before it, so that no two are equal; as .jsonl.
More settings for prepare.py: --args="--minhash_bands=14". Memory is read from /proc ten times a second: Linux.
"""

import glob
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

input = ""  # .jsonl.gz files, a glob
copies = "1,10"
dir = "/tmp/memory"
args = "--tokenizer=bpe:16000 --num_proc=2"
config = configure(globals())


def make(n):
    path = os.path.join(dir, f"{n}.jsonl")
    if not os.path.exists(path):
        with open(path + ".tmp", "w") as out:
            for i in range(n):
                for name in sorted(glob.glob(input)):
                    for number, line in enumerate(gzip.open(name, "rt")):
                        out.write(json.dumps({"text": f"{i} {number} {json.loads(line)['text']}"}) + "\n")
        os.rename(path + ".tmp", path)
    return path


def held():
    """Resident MB, without pages of files, of this process's descendants."""
    parents, mb = {}, {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/status") as file:
                fields = dict(line.split(":", 1) for line in file)
            parents[int(pid)] = int(fields["PPid"])
            mb[int(pid)] = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1e3
        except (OSError, KeyError, ValueError):
            pass
    mine, found = {os.getpid()}, []
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return [mb[pid] for pid in mine - {os.getpid()} if pid in mb]


os.makedirs(dir, exist_ok=True)
results = []
for n in map(int, copies.split(",")):
    path, out = make(n), os.path.join(dir, "out")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, os.path.join(ROOT, "prepare.py"), f"--input={path}", f"--out_dir={out}", *shlex.split(args)]
    process, most, one = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0.0, 0.0
    while process.poll() is None:
        now = held()
        most, one = max(most, sum(now)), max([one, *now])
        time.sleep(0.1)
    done = json.loads(process.stdout.read().splitlines()[-1])
    results.append({"input_mb": round(os.path.getsize(path) / 1e6), "documents": done["documents"],
                    "all_processes_mb": round(most), "largest_process_mb": round(one), "seconds": done["seconds"]})
    print(json.dumps(results[-1]), flush=True)
print(json.dumps({"args": args, "sizes": results}))
