"""Fine-tune a pretrained model on GLUE, BoolQ or a data set of your own, over seeds, with controls.

    python finetune_glue.py --out_dir=out/demo --task=mrpc --glue_dir=glue        folders of GLUE's files
    python finetune_glue.py --out_dir=out/demo --task=smallbench                  SST-2, RTE, BoolQ, MRPC from the hub
    python finetune_glue.py --out_dir=out/demo --task=all --glue_dir=glue --controls=untrained,out/transformer
    python finetune_glue.py --out_dir=out/demo --task=rte --init_from_task=out/demo/glue/mnli
    python finetune_glue.py --out_dir=out/demo --task=my_folder                   a task.json says what is in it

Learning rates are compared on grid_seeds seeds, the best is reported on `seeds` others: median [smallest-largest],
beside the majority answer. Writes out_dir/glue.json, glue.md, and under out_dir/glue/TASK what each run predicted and
the weights of the best one. The same command again goes on where it was. With test predictions of all tasks there is a
submission for GLUE's server too: out_dir/glue_submission.zip.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/; results go there too
task = "mrpc"  # cola sst2 mrpc stsb qqp mnli qnli rte wnli ax boolq, smallbench, all, or a folder; several with commas
glue_dir = ""  # folders of GLUE's official files; empty: from the hub
hub = "nyu-mll/glue"  # where the `datasets` library finds GLUE, or a folder laid out like it
controls = ""  # also fine-tune these: "untrained" (the same network, fresh) and folders of other training runs
init_from_task = ""  # start from the weights of another task, such as out/demo/glue/mnli; its head is left behind
seeds = 5  # runs that are reported
grid_seeds = 3  # runs for each learning rate to choose it by, with other seeds; 0: take the middle one
lrs = ""  # learning rates to choose from, with commas; empty: the task's own
n_concept = 0  # of the pretrained concepts, so many are kept, the first ones; 0: all for one text, 16 for pairs
epochs = 0  # passes over the training set; 0: the task's own
batch_size = 0  # examples an update; 0: the task's own
max_tokens = 0  # tokens a row, longer ones are cut; 0: the task's own, and what the model reads
warmup = 0.06  # share of the updates from 0 to the peak learning rate, then linearly to 0
weight_decay = 0.01  # decoupled, on matrices only
dropout = 0.1  # on residual branches and before the head
patience = 3  # stop after so many epochs without a better score; 0: off
jobs = 1  # runs at a time; more than one: each in a process of its own, on the next GPU if there are several
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
one_run = ""  # what a process of its own is started with: INIT|LEARNING RATE|SEED
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import contextlib
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from lib import glue
from lib.files import FolderLock, remove_file, replace_file, write_json
from lib.heads import Classifier, keep_concepts
from lib.leaderboard import markdown, summary_of, write_submission
from lib.machine import choose_dtype, find_machine
from lib.run import build_model, load_run, model_state, read_checkpoint, user_mistakes
from lib.tuning import tune

HERE = os.path.dirname(os.path.abspath(__file__))


# ---- one run -----------------------------------------------------------------

def start(job, init, seed):
    """-> (Classifier as it starts, tokenizer, device): pretrained, fresh, or from another task; dropout switched on."""
    machine = find_machine(device)
    encoder, tok, checkpoint = load_run(out_dir if init in ("pretrained", "untrained") else init, "cpu")
    tok.encode([])  # refuses data that came as ids, without a text
    settings, weights = keep_concepts(checkpoint["model_settings"], encoder.state_dict(),
                                      recipe_of(job)["n_concept"])
    torch.manual_seed(seed)
    model = Classifier(build_model(settings | dict(dropout=dropout)), max(1, len(job.labels)), len(job.text), dropout)
    if init != "untrained":
        model.encoder.load_state_dict(weights)
    model.start_marks(tok)
    if init_from_task and init == "pretrained":
        before = read_checkpoint(os.path.join(init_from_task, "model.pt"))
        same = before["model_settings"] == settings | dict(dropout=0.0)
        if not same or before["tokenizer_fingerprint"] != tok.fingerprint:
            raise ValueError(f"{init_from_task} was fine-tuned from another model or tokenizer than that of {out_dir}, "
                             f"or with another --n_concept than {recipe_of(job)['n_concept']}")
        model.encoder.load_state_dict(before["model"])
        model.segments.data.copy_(before["head"]["segments"])
    return model.to(machine.device), tok, machine


def run_one(job, splits, init, lr, seed):
    """Fine-tunes once and writes what came out: predictions, weights, and last of all the scores."""
    model, tok, machine = start(job, init, seed)
    precision, _ = choose_dtype(dtype, machine.device)
    found, predictions, scale = tune(model, tok, machine, precision, job, splits, recipe_of(job), lr, seed)
    path = run_path(job, init, lr, seed)
    for split, values in predictions.items():
        labels = splits[split][1]
        glue.write_predictions(f"{path}.{split}.tsv", job, dict(prediction=values) | (
            {} if labels is None else dict(label=labels)))
    save_model(f"{path}.pt", model, job, tok, scale)
    write_json(f"{path}.json", dict(seed=seed, lr=lr) | found | dict(
        recipe=recipe_of(job), started_from=origin(init), data=glue.fingerprint(job, splits)))


def save_model(path, model, job, tok, scale):
    """The fine-tuned weights with what export.py and --init_from_task need to know."""
    settings, weights = model_state(model.encoder)
    head = {name: t.cpu() for name, t in model.state_dict().items() if not name.startswith("encoder.")}
    saved = dict(model_settings=settings | dict(dropout=0.0), model=weights, head=head, n_texts=model.n_texts,
                 task=job.name, labels=list(job.labels), scale=list(scale), tokenizer_fingerprint=tok.fingerprint)
    try:
        replace_file(path, lambda file: torch.save(saved, file))
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{path} could not be written: {error}") from None


# ---- all of them ---------------------------------------------------------------

def recipe_of(job):
    """What a run depends on besides its start, learning rate and seed."""
    own = {name: config[name] or getattr(job, name) for name in ("n_concept", "epochs", "batch_size", "max_tokens")}
    return own | {name: config[name] for name in ("warmup", "weight_decay", "dropout", "patience")}


def name_of(init):
    """What a start is called in tables and file names; one that has seen another task says so."""
    if init == "pretrained" and init_from_task:
        return f"pretrained_from_{os.path.basename(os.path.abspath(init_from_task))}"
    return init if init in ("pretrained", "untrained") else os.path.basename(os.path.abspath(init))


def run_path(job, init, lr, seed):
    """Path of a run's files without their endings."""
    return os.path.join(out_dir, "glue", job.name, f"{name_of(init)}_lr{lr:g}_seed{seed}")


@functools.cache
def origin(init):
    """Fingerprint of the weights a run starts from: results of an older checkpoint are not taken for a newer one's."""
    folder, digest = out_dir if init in ("pretrained", "untrained") else init, hashlib.sha256()
    paths = [os.path.join(folder, name) for name in ("best.pt", "ckpt.pt")]
    paths = [path for path in paths if os.path.exists(path)][:1]
    if init_from_task and init == "pretrained":
        paths.append(os.path.join(init_from_task, "model.pt"))
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def finished(job, data, init, lr, seed):
    """The result of a run that was made before with the same recipe and data from the same weights, or None."""
    try:
        with open(run_path(job, init, lr, seed) + ".json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    wanted = dict(recipe=recipe_of(job), started_from=origin(init), data=data)
    return found if {key: found.get(key) for key in wanted} == wanted else None


def run_all(job, splits, todo):
    """[(init, lr, seed)] -> their results; what is missing is run, `jobs` at a time. A failure ends the program."""
    data = glue.fingerprint(job, splits)
    missing = [run for run in todo if not finished(job, data, *run)]
    n_gpu, failed = torch.cuda.device_count(), []
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    bar = tqdm(total=len(missing), desc=job.name, unit="run", disable=not sys.stderr.isatty())

    def run(numbered):
        number, (init, lr, seed) = numbered
        if failed:
            return
        path, code = run_path(job, init, lr, seed), 0
        with open(path + ".log", "w") as output:
            if jobs == 1:
                with contextlib.redirect_stdout(output):
                    run_one(job, splits, init, lr, seed)
            else:
                env = os.environ | {"OMP_NUM_THREADS": threads}
                if n_gpu > 1:
                    env["CUDA_VISIBLE_DEVICES"] = str(number % min(n_gpu, jobs))
                arguments = [f"--{key}={value}" for key, value in config.items()] + [
                    f"--task={job.folder if os.path.isabs(job.folder) else job.name}", f"--one_run={init}|{lr}|{seed}"]
                code = subprocess.run([sys.executable, os.path.join(HERE, "finetune_glue.py"), *arguments], env=env,
                                      stdout=output, stderr=subprocess.STDOUT).returncode
        found = None if code else finished(job, data, init, lr, seed)
        if not found:
            with open(path + ".log", errors="replace") as output:
                failed.append(f"{path}.log ends with: {(output.read().strip().splitlines() or ['nothing'])[-1]}")
            return
        tqdm.write(f"{job.name} {name_of(init)} lr {lr:g} seed {seed}: {json.dumps(found['metrics'][job.dev[0]])} "
                   f"after epoch {found['best_epoch']} of {found['epochs']}, {found['examples_per_s']:.0f} examples/s"
                   f"{', constant answer' if found['degenerate'] else ''}{', diverged' if found['diverged'] else ''}",
                   file=sys.stdout)
        bar.update()

    if jobs == 1:
        list(map(run, enumerate(missing)))
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, enumerate(missing)))
    bar.close()
    if failed:
        sys.exit("error: " + "\n       ".join(failed) + "\n       what was finished is kept; the same command goes on")
    return [finished(job, data, *run) for run in todo]


def fine_tune(job, splits, notes):
    """One task: learning rates, seeds, controls -> its entry in glue.json."""
    grid = [float(lr) for lr in lrs.split(",")] if lrs else list(job.lrs)
    entry = dict(notes=notes, recipe=recipe_of(job), metric=" and ".join(job.metrics), controls={})
    constant = glue.majority(job, splits["train"][1])
    labels = splits[job.dev[0]][1]
    entry["majority"] = glue.score(job, labels, np.full(len(labels), constant))
    os.makedirs(os.path.join(out_dir, "glue", job.name), exist_ok=True)
    for init in ["pretrained", *filter(None, controls.split(","))]:
        chosen, compared = grid[len(grid) // 2], {}
        if grid_seeds and len(grid) > 1:
            todo = [(init, lr, 100 + seed) for lr in grid for seed in range(1, grid_seeds + 1)]
            found = run_all(job, splits, todo)
            compared = {f"{lr:g}": statistics.median(r["score"] for r in found if r["lr"] == lr) for lr in grid}
            chosen = max(grid, key=lambda lr: compared[f"{lr:g}"])
            for run in todo:
                remove_file(run_path(job, *run) + ".pt")
        todo = [(init, chosen, seed) for seed in range(1, seeds + 1)]
        runs = run_all(job, splits, todo)
        best = max(zip(runs, todo), key=lambda pair: pair[0]["score"])[1]
        for run in todo:  # of the weights, those of the best run stay: model.pt
            path = run_path(job, *run) + ".pt"
            if run == best and init == "pretrained" and os.path.exists(path):
                os.replace(path, os.path.join(out_dir, "glue", job.name, "model.pt"))
            remove_file(path)
        part = summary_of(runs, job) | dict(lr=chosen, learning_rates=compared)
        if init == "pretrained":
            entry |= part | dict(best_run=run_path(job, *best))
        else:
            entry["controls"][name_of(init)] = part
    return entry


def check():
    """-> tasks to run, read: [(task, splits, notes)]. Raises for settings, files and folders that cannot be right."""
    names = [name for part in task.split(",") for name in glue.GROUPS.get(part, (part,))]
    if min(seeds, jobs) < 1 or min(grid_seeds, n_concept, epochs, batch_size, max_tokens, patience, weight_decay) < 0:
        raise ValueError("expected seeds and jobs of 1 or more, all other numbers of 0 or more")
    if not 0 <= warmup < 1 or not 0 <= dropout < 1:
        raise ValueError(f"warmup={warmup}, dropout={dropout}: expected 0 or more and below 1")
    try:
        wrong = lrs and not all(0 < float(part) < 1 for part in lrs.split(","))
    except ValueError:
        wrong = True
    if wrong:
        raise ValueError(f"lrs={lrs!r}: expected learning rates with commas between, such as 1e-4,3e-4")
    if max_tokens and max_tokens < 8:
        raise ValueError(f"max_tokens={max_tokens}: expected 8 or more")
    if init_from_task and not os.path.exists(os.path.join(init_from_task, "model.pt")):
        raise ValueError(f"init_from_task={init_from_task}: no model.pt there; fine-tune first, for example "
                         f"python finetune_glue.py --out_dir={out_dir} --task=mnli")
    jobs_found = []
    for name in names:
        job = glue.find_task(name)
        try:
            splits, notes = (glue.read_task(job, glue_dir) if glue_dir or os.path.isabs(job.folder)
                             else glue.load_hub(job, hub))
        except FileNotFoundError as error:
            if name in task.split(","):
                raise
            print(f"{name} is left out: {error}", flush=True)
            continue
        if name == "mnli" and glue_dir:  # AX has no training data: the MNLI model answers it
            for test in glue.read_task(glue.TASKS["ax"], glue_dir)[0].values():
                splits["ax"] = test
        jobs_found.append((job, splits, notes))
    if not jobs_found:
        raise ValueError(f"none of the files of {task} is in {glue_dir or hub}")
    return jobs_found


def main(found):
    """Fine-tunes on all that was found and writes the tables."""
    path, results = os.path.join(out_dir, "glue.json"), {}
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                results = dict(json.load(file))
        except (ValueError, TypeError) as error:
            sys.exit(f"error: {path} is damaged: {error}; rm {path}, and give its tasks again: finished runs are kept")
    encoder, _, checkpoint = load_run(out_dir, "cpu")
    for job, splits, notes in found:
        if not job.dev:
            print(f"{job.name} has no training data of its own: --task=mnli answers it", flush=True)
            continue
        print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
        name = job.name + name_of("pretrained").removeprefix("pretrained")
        results[name] = dict(params=f"{encoder.num_params() / 1e6:.1f}M") | fine_tune(job, splits, notes)
        write_json(path, results)
    table = markdown(results, f"{out_dir} after {checkpoint['tokens']:,} tokens of pretraining")
    replace_file(os.path.join(out_dir, "glue.md"), lambda file: file.write(table.encode()))
    print("\n" + table)
    best_runs = {name: results[name]["best_run"] for name in results}
    missing = write_submission(os.path.join(out_dir, "glue_submission.zip"), best_runs)
    print(f"no submission yet, test predictions are missing for: {', '.join(missing)}" if missing
          else f"submission for GLUE's server: {out_dir}/glue_submission.zip")
    print(json.dumps({name: {k: results[name][k] for k in ("median", "min", "max", "majority", "lr")}
                      for name in results}))


if __name__ == "__main__":
    with user_mistakes():
        found = check()
        for init in ["pretrained", *filter(None, controls.split(","))]:
            start(found[0][0], init, 0)  # whether it can be loaded at all
    try:
        if one_run:
            init, lr, seed = one_run.split("|")
            run_one(*found[0][:2], init, float(lr), int(seed))
        else:
            with FolderLock(os.path.join(out_dir, "glue")):
                main(found)
    except BlockingIOError:
        sys.exit(f"error: another run is fine-tuning in {out_dir}; wait for it: --task takes several tasks, --jobs "
                 "runs several at a time")
    except OSError as error:
        sys.exit(f"error: {error}; what was finished is kept, and the same command goes on")
