"""Two machines on one: what happens to a run when one of them dies, never comes, or differs.

    python tests/faults/two_nodes.py            as root, with the command `ip`; ten minutes

Each machine is a network namespace of Linux: an own network, joined to the other by a virtual
cable. The commands are those of config/README.md. Not part of `make test`: it needs root. The last
line is a JSON summary; the exit code is 1 if a promise was broken. Results: records/scale.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NODES = {"concept0": "10.77.0.1", "concept1": "10.77.0.2"}  # namespaces and their addresses
TINY = ["--block_size=64", "--n_layer=1", "--n_head=2", "--n_concept=8", "--concept_dim=32",
        "--token_dim=32", "--ffn_dim=64", "--n_mixer=1", "--batch_size=8", "--micro_batch=2",
        "--warmup_steps=5", "--eval_interval=40", "--eval_rows=16", "--log_interval=1",
        "--dtype=fp32", "--health_rows=0", "--init_table=random", "--save_minutes=0.02"]
STEPS = "--max_steps=400"


@contextlib.contextmanager
def machines():
    """The two namespaces and the cable between them."""
    def ip(*words):
        subprocess.run(["ip", *words], check=True)
    for name in NODES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
    try:
        for name in NODES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = NODES
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns",
           second)
        for name, address in NODES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name])


class Node:
    """The command of one machine, in a shell loop if `again`. Its output goes to a file."""

    def __init__(self, folder, name, args, again=True, script="train.py", torchrun=(), env=(),
                 join_timeout=600):
        address = NODES[name]
        # torchrun finds out by its host name whether it is the endpoint; both have the same here
        is_host = int(name == "concept0")
        command = [str(BIN / "torchrun"), "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                   f"--rdzv_endpoint={NODES['concept0']}:29400", "--rdzv_id=two",
                   f"--rdzv_conf=is_host={is_host},join_timeout={join_timeout}",
                   f"--local_addr={address}", *torchrun, script, *args]
        if again:
            command = ["bash", "-c", 'until "$@"; do sleep 1; done', "loop", *command]
        self.path = folder / f"{name}.log"
        self.file = open(self.path, "a")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", name, *command], cwd=ROOT, stdout=self.file,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **dict(env)})

    def kill(self):
        """As the loss of power: the loop, torchrun and the worker at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self):
        """All processes of this machine: torchrun's workers have sessions of their own."""
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    todo += map(int, task.read_text().split())
        return found

    def torchrun(self):
        """The process id of torchrun, and that of its worker."""
        for pid in self.pids():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if len(words) > 1 and words[1].endswith(b"torchrun"):
                worker = [child for child in self.pids() if child > pid]
                return pid, max(worker)
        raise RuntimeError("torchrun does not run")

    def wait(self, timeout=300):
        return self.process.wait(timeout)

    def text(self):
        return self.path.read_text()


def losses(out_dir):
    with open(out_dir / "log.jsonl") as file:
        records = [json.loads(line) for line in file]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def wait_for_step(out_dir, step, timeout=120):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if max(losses(out_dir), default=0) >= step:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{out_dir} has not reached step {step}")


def start_both(folder, args, **how):
    return [Node(folder, name, args, **how) for name in NODES]


def message(text):
    """The first line that says what was wrong, without a traceback's frames."""
    lines = [line for line in text.splitlines() if "error: " in line or "Error: " in line]
    return lines[0] if lines else ""


def main():
    home = Path(tempfile.mkdtemp(prefix="two_nodes_"))
    texts = home / "texts"
    texts.mkdir()
    for n in range(40):
        words = [f"Text {n} counts {n * i % 97} of {i} stones." for i in range(60)]
        (texts / f"{n}.txt").write_text(" ".join(words))
    subprocess.run([sys.executable, "prepare.py", f"--input={texts}/*.txt",
                    f"--out_dir={home}/bins", "--tokenizer=byte", "--val_fraction=0.2",
                    "--num_proc=1"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found, broken = {}, []

    def promise(name, kept, **facts):
        found[name] = dict(kept=bool(kept), **facts)
        print(f"{'kept  ' if kept else 'BROKEN'} {name} {facts}", flush=True)
        if not kept:
            broken.append(name)

    def arguments(out, *more):
        return [f"--data_dir={home}/bins", f"--out_dir={out}", *TINY, STEPS, *more]

    with machines():
        for kind in ("ddp", "fsdp"):
            more = [f"--parallel={kind}"]
            whole = home / f"{kind}_whole"
            start = time.monotonic()
            codes = [node.wait() for node in start_both(home, arguments(whole, *more))]
            expected = losses(whole)
            promise(f"{kind}: two machines train", codes == [0, 0] and len(expected) == 400,
                    seconds=round(time.monotonic() - start))
            for victim, name in enumerate(NODES):
                out = home / f"{kind}_killed_{victim}"
                nodes = start_both(home, arguments(out, *more))
                wait_for_step(out, 150)
                nodes[victim].kill()
                time.sleep(5)  # the machine boots
                start = time.monotonic()
                nodes[victim] = Node(home, name, arguments(out, *more))
                codes = [node.wait() for node in nodes]
                promise(f"{kind}: machine {victim} is killed and comes back",
                        codes == [0, 0] and losses(out) == expected,
                        seconds_to_the_end=round(time.monotonic() - start),
                        differ=sum(losses(out)[step] != loss for step, loss in expected.items()))

        more, expected = ["--parallel=ddp"], losses(home / "ddp_whole")
        out = home / "restarted"
        nodes = start_both(home, arguments(out, *more), again=False, torchrun=["--max-restarts=3"],
                           env=dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        wait_for_step(out, 150)
        os.kill(nodes[1].torchrun()[1], signal.SIGKILL)
        codes = [node.wait() for node in nodes]
        promise("--max-restarts: a worker is killed", codes == [0, 0] and losses(out) == expected)

        out = home / "signalled"
        nodes = start_both(home, arguments(out, *more), again=False)
        wait_for_step(out, 150)
        start = time.monotonic()
        for node in nodes:
            os.kill(node.torchrun()[0], signal.SIGTERM)
        codes = [node.wait() for node in nodes]
        seconds = round(time.monotonic() - start, 1)
        at = max(losses(out))
        codes += [node.wait() for node in start_both(home, arguments(out, *more), again=False)]
        promise("SIGTERM to both, as SLURM sends it, then the same command",
                seconds < 30 and at < 400 and codes[2:] == [0, 0] and losses(out) == expected,
                seconds_to_stop=seconds, stopped_at=at, exit_codes=codes[:2])

        alone = home / "alone"
        alone.mkdir()
        start = time.monotonic()
        node = Node(alone, "concept0", arguments(home / "never"), again=False, join_timeout=20)
        code = node.wait()
        last = [line for line in node.text().splitlines() if line.strip()][-1]
        promise("a machine that never comes", code != 0 and time.monotonic() - start < 60,
                seconds=round(time.monotonic() - start), message=last)

        for name, second, words in (
                ("other settings", dict(args=["--seed=2"]), "seed: 1337 in process 0"),
                ("another torch", dict(script="other_torch.py"), "torch: ")):
            folder = home / name.replace(" ", "_")
            folder.mkdir()
            (folder / "other_torch.py").write_text(
                "import runpy, sys, torch\ntorch.__version__ = '2.11.0'\n"
                f"sys.path[0] = '{ROOT}'\nsys.argv[0] = 'train.py'\n"
                f"runpy.run_path('{ROOT}/train.py', run_name='__main__')\n")
            args = arguments(folder / "run")
            start = time.monotonic()
            script = str(folder / second["script"]) if "script" in second else "train.py"
            nodes = [Node(folder, "concept0", args, again=False),
                     Node(folder, "concept1", args + second.get("args", []), again=False,
                          script=script)]
            codes = [node.wait() for node in nodes]
            said = message(nodes[0].text() + nodes[1].text())
            promise(f"a machine with {name}", 0 not in codes and words in "".join(
                node.text() for node in nodes), seconds=round(time.monotonic() - start),
                message=said)
    print(json.dumps(dict(folder=str(home), broken=broken, promises=found)))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
