"""Fill in masks, or turn texts into vectors.

    python tools/sample.py --out_dir=out/demo --text="The capital of France is [MASK]."
    python tools/sample.py --out_dir=out/demo < sentences.txt          one text a line
    python tools/sample.py --out_dir=out/demo --embed=sentences.txt --to=embeddings.npy

Each [MASK] stands for one token. Prints the text with the likeliest tokens in place, and the
candidates for each mask with their probabilities. All masks of a text are filled from one forward
pass, independently of each other.

--embed writes a float32 matrix with a row for each line, in their order; an empty line has a row
too. Texts longer than the model reads are cut and counted. Memory does not grow with the file. If
it is killed, the same command continues where it was and gives the same bytes.
"""

# ---- settings -----------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/
text = ""  # text with one or more [MASK]; empty: one text a line from standard input
checkpoint = "auto"  # auto | best | last | PATH; auto: the best, or a newer one not yet evaluated
top = 5  # candidates to show for each mask
embed = ""  # embed this file instead: a text a line, or .jsonl, .parquet with a field "text"
to = "embeddings.npy"  # where embeddings go; np.load(to, mmap_mode="r") reads them
pooling = "auto"  # max (over concepts; transformer: tokens) | concepts (all) | mean (tokens) | auto
batch_tokens = 4096  # tokens (or concepts) at once; texts in a batch have equal length, no padding
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -------------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

config = configure(globals())

# Before torch is imported: by default its CPU library keeps compiled kernels for 1,024 shapes,
# which are a GB here, where most shapes of batches occur once.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from lib.embed import choose_pooling, embed_file, embed_rows, rows_of, sha256_of
from lib.files import print_result
from lib.fill import fill_texts
from lib.machine import DTYPES, choose_dtype, find_machine
from lib.run import load_run, user_mistakes


def check_settings():
    """Raises ValueError for numbers out of range and for settings that would be ignored."""
    if min(top, batch_tokens) < 1:
        raise ValueError(f"top={top}, batch_tokens={batch_tokens}: expected 1 or more")
    if embed:
        unused, use, cure = ("text", "top"), "filling masks", "leave out --embed"
    else:
        unused, use, cure = ("to", "pooling"), "embedding", "name a file of texts with --embed=FILE"
    defaults = read_settings(__file__)
    given = [name for name in unused if config[name] != defaults[name][0]]
    if given:
        raise ValueError(f"{', '.join(given)}: {use} only; {cure}")
    folder = os.path.dirname(to) or "."
    if embed and (not to.strip() or os.path.isdir(to) or not os.path.isdir(folder)):
        raise ValueError(f"--to={to!r}: expected a file in a folder that exists, as "
                         "--to=embeddings.npy")


# ---- filling masks ------------------------------------------------------------

def read_masked_texts():
    """The setting `text`, or the lines of standard input that are not empty."""
    if text:
        return [text]
    if sys.stdin.isatty():
        print("one text with [MASK] a line, end with Ctrl-D", file=sys.stderr)
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise ValueError("no text; give --text='... [MASK] ...' or lines on standard input")
    return lines


def fill_and_print(texts):
    """Fills the masks of all texts and prints them -> for each a dict of text, filled and masks."""
    results = fill_texts(model, tok, texts, top, batch_tokens, machine.device)
    for result in results:
        print(f"{result['text']}\n  {result['filled']}")
        for candidates in result["masks"]:
            shown = [f"{c['token'].strip() or c['token']!r} {c['p']:.1%}" for c in candidates]
            print("    " + "  ".join(shown))
    return results


# ---- embedding ----------------------------------------------------------------

def embed_texts():
    """Embeds the file `embed` into `to` -> a summary."""
    setting, name = choose_pooling(pooling, model.arch)

    def vectors(texts):
        rows, cut = rows_of(texts, tok, model.cfg.longest)
        found = embed_rows(model, rows, [name], batch_tokens, machine.device)
        return found[name].numpy(), cut

    # dtype, device and batch_tokens change the rounding, so they belong to the identity too.
    identity = dict(weights_sha256=sha256_of(loaded["model"]), tokenizer=tok.fingerprint,
                    pooling=setting, dtype=dtype, device=machine.device.type,
                    batch_tokens=batch_tokens)
    state = embed_file(embed, to, vectors, identity)
    made = state["identity"]
    print(f"{to}: {made['texts']:,} x {made['width']} float32, {setting} pooling; "
          f"{state['cut']:,} texts longer than {model.cfg.longest} tokens were cut, "
          f"{state['replaced']:,} held bytes that are not UTF-8")
    return dict(to=to, texts=made["texts"], width=made["width"], pooling=setting,
                cut=state["cut"], replaced=state["replaced"])


# ---- work ---------------------------------------------------------------------

with user_mistakes():
    check_settings()
    machine = find_machine(device)
    dtype, _ = choose_dtype(dtype, machine.device)
    model, tok, loaded = load_run(out_dir, machine.device, checkpoint)
    model.freeze(DTYPES[dtype])
    if embed:
        try:
            print_result(embed_texts())
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where it was")
        sys.exit()
    results = fill_and_print(read_masked_texts())
print_result(results[0] if text else results)
